"""Offline training of any family: seeded, with early stopping on the last part of the time, for one model or many."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from models.base import Config, Constants, Int64, score
from models.checkpoint import Bundle, Source, Training
from models.corpus import FEWEST, Corpus, Layout, enough, gather
from models.errors import ConfigError
from models.family import Family
from models.fit import RETRIES, Fit, PassReport, Recipe, State, robust_mean
from models.resume import Store
from models.serving import ServedModel
from models.windows import TrainSeries

__all__ = ["EpochReport", "TrainConfig", "TrainSeries", "train"]

MOST_SCORES = 100_000  # kept as calibration: its 98 % quantile leaves 2,000 excesses
MEASURED = 4096  # windows from which a trained network measures its constants


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """What to train and for how long. `TrainConfig.of` begins with what suits the family.

    Raises:
        ConfigError: a value is out of its bounds.
    """

    family: Family
    model: Config  # of the family
    epochs: int = 30  # at most
    batch: int = 64  # windows per step; with 256 the few thousand windows of one KPI give too few steps
    learning_rate: float = 2e-3  # of Adam; the published 1e-5 ends worse than the last value as forecast
    decay: float = 0.9  # of the learning rate, per epoch
    patience: int = 5  # epochs without a better held-out loss until training stops
    clip_norm: float = 1.0  # of the gradient, over all weights
    held_out: float = 0.2  # last part of each series' time
    # Share of windows, those of the largest loss of each batch, that teach nothing: where there are no labels they may
    # be anomalies. Where there are, they say which points are.
    trim: float = 0.01
    longest_gap: int | None = None  # points that the last value may stand in for; None: W of a forecaster, else any
    windows_per_epoch: int | None = 200_000  # of one model, drawn anew each epoch when there are more; all when None
    seed: int = 0
    per_kpi: bool = False  # a model for each series, trained together, instead of one for all
    command: str = ""  # for the record
    created: str = ""  # for the record, ISO 8601

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "patience"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("learning_rate", "decay", "clip_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name}={getattr(self, name)} must be above 0 and finite")
        if not 0 < self.held_out < 1:
            raise ConfigError(f"held_out={self.held_out} must be between 0 and 1; 0.2 is usual")
        if not 0 <= self.trim < 0.5:
            raise ConfigError(f"trim={self.trim} must be at least 0 and below 0.5; 0.01 is usual")
        if self.longest_gap is not None and self.longest_gap < 0:
            raise ConfigError(f"longest_gap={self.longest_gap} must be at least 0")
        if self.windows_per_epoch is not None and self.windows_per_epoch < FEWEST:
            raise ConfigError(f"windows_per_epoch={self.windows_per_epoch} must be at least {FEWEST}")
        if self.seed < 0:
            raise ConfigError(f"seed={self.seed} must be at least 0")
        if not isinstance(self.model, self.family.config):
            raise ConfigError(f"model={self.model} is no config of {self.family.name}, {self.family.config.__name__}")
        if self.per_kpi and not self.family.stackable:
            raise ConfigError(
                f"family {self.family.name!r} cannot be trained per KPI: its models cannot be stacked; train them one "
                "by one, or one for all"
            )

    @classmethod
    def of(cls, family: Family, model: Config | None = None, **settings: Any) -> "TrainConfig":
        """A training as the family suggests it, with other settings where they are given."""
        return cls(family, family.config() if model is None else model, **{**family.training, **settings})

    @property
    def layout(self) -> Layout:
        """How windows are cut."""
        reads_point = self.family.reads_point(self.model)
        gap = self.longest_gap if self.longest_gap is not None or reads_point else self.model.window
        return Layout(
            history=self.family.history(self.model),
            features=self.model.features,
            scaling=self.model.scaling,
            reads_point=reads_point,
            gap=gap,
            held_out=self.held_out,
        )

    @property
    def recipe(self) -> Recipe:
        """How the weights are fitted."""
        return Recipe(**{one.name: getattr(self, one.name) for one in fields(Recipe)})


@dataclass(frozen=True, slots=True)
class EpochReport:
    """One epoch, as `progress` is told of it; of many models one pass over the data of all that still learn."""

    epoch: int  # from 1; of many models the pass
    epochs: int  # at most
    train_loss: float  # of many models the mean; nan where nothing was learned
    held_out_loss: float  # of many models the mean of the best of each
    best: bool  # better than ever; of many models one of them is
    done: int  # models that have ended
    models: int
    note: str = ""  # what went wrong and was taken back


def train(
    series: Sequence[TrainSeries],
    config: TrainConfig,
    progress: Callable[[EpochReport], None] | None = None,
    store: Store | None = None,
    *,
    resume: bool = False,
) -> Bundle:
    """Train a model on series, or a model for each of them, and score their held-out windows.

    With scaling "train" all series of a model must be of the one KPI that it is for: they share the scaling constants.
    A window is used when its target was observed, is wanted and is not labelled anomalous. What a forecaster reads
    before it holds no labelled anomaly and no gap longer than `longest_gap` (in shorter ones the last value is
    repeated); a network that reads the point itself is trained on windows with such points as well, which its loss
    leaves out. The last fifth of each series' time is held out. Without labels the windows of the largest losses teach
    nothing (`trim`).

    An epoch after which a loss is not finite, or far above that of the untrained weights, is taken back and repeated
    at a lower rate, at most RETRIES times; then the best weights until then are taken.

    Args:
        series: what to learn from; each with the F of the config, and the same metrics.
        config: the same config, data, machine and number of threads give the same weights.
        progress: called after every epoch; an exception that it raises ends the training.
        store: keeps the state after every epoch, the last one too: `Store.remove` it when the model is safe.
        resume: go on from what `store` keeps, if it does; the result is that of a training without a break.

    Returns:
        The model of the best epoch. Its calibrations are the scores of the held-out windows by the served model, one a
        member, in the order of the series and oldest first, at most MOST_SCORES, evenly taken; with scaling "window"
        by the usual step of each series' training part, so that they have no unit. Of many models, those that cannot
        be trained are left out, and named in the notes.

    Raises:
        ConfigError: series of differing F, metrics or (with scaling "train") interval, a feature without a value, too
            few windows, two series of one name to be trained per KPI, the training diverged in its first epoch at any
            rate, or another training was interrupted than the one that is to be resumed.
        CheckpointError: what `store` keeps cannot be read or written.
    """
    groups, names, notes = _grouped(series, config)
    corpus = gather(groups, config.layout)
    with torch.random.fork_rng(devices=[]):  # start values, dropout and noise draw from torch's global generator
        torch.manual_seed(config.seed)
        fit = Fit(config.family.network(config.model), corpus, config.recipe, names)
        state = _fitted(fit, config, _fingerprint(series, config) if store else {}, progress, store, resume=resume)
        kept = _learned(state, names, notes)
        constants = _constants(fit, state, corpus, kept)
    model = _serve(fit, state, constants, config, kept)
    calibrations = tuple(_calibrate(model, corpus, k, place) for place, k in enumerate(kept.tolist()))
    used = [one for k in kept for one in groups[k]]
    intervals = {one.interval_ms for one in used}
    return Bundle(
        model=model,
        calibrations=calibrations,
        interval_ms=intervals.pop() if len(intervals) == 1 else None,
        training=_record(state, corpus, used, config, notes),
        metrics=series[0].metrics if config.model.features > 1 else (),
        members=tuple(names[k] for k in kept) if names else (),
    )


def _grouped(
    series: Sequence[TrainSeries], config: TrainConfig
) -> tuple[list[Sequence[TrainSeries]], tuple[str, ...], list[str]]:
    """The series of each model, the names of the models (none of one for all), and what was left out."""
    if not config.per_kpi:
        return [series], (), []
    if twice := [name for name, count in Counter(one.name for one in series).items() if count > 1]:
        raise ConfigError(f"series {twice[0]!r} is there twice; each KPI needs its own name to get its own model")
    layout, notes, groups = config.layout, list[str](), list[Sequence[TrainSeries]]()
    for one in series:
        if problem := enough([one], layout):
            notes.append(f"{one.name} left out: {problem}")
        else:
            groups.append([one])
    if not groups:
        raise ConfigError(notes[0] if notes else "there are no series to train on; name at least one file")
    return groups, tuple(group[0].name for group in groups), notes


def _fitted(
    fit: Fit,
    config: TrainConfig,
    fingerprint: dict[str, Any],
    progress: Callable[[EpochReport], None] | None,
    store: Store | None,
    *,
    resume: bool,
) -> State:
    """Train until the end, from the beginning or from where it was interrupted."""
    state = fit.start()
    if store is not None and resume:
        state = store.load(state, fingerprint) or state

    def after(report: PassReport) -> None:
        if store is not None:
            store.save(report.state, fingerprint)
        if progress is not None:
            progress(_report(report, config, many=bool(fit.members)))

    fit.run(state, after)
    return state


def _report(made: PassReport, config: TrainConfig, *, many: bool) -> EpochReport:
    state = made.state
    failed = bool(made.note) and not many
    train_loss, held_out_loss = (math.nan, math.nan) if failed or not state.curve else state.curve[-1]
    return EpochReport(
        epoch=state.passes if many else int(state.epoch[0]) + failed,
        epochs=config.epochs,
        train_loss=train_loss,
        held_out_loss=held_out_loss,
        best=made.improved,
        done=int(state.done.sum()),
        models=len(state.done),
        note=made.note,
    )


def _learned(state: State, names: tuple[str, ...], notes: list[str]) -> Int64:
    """Which members have a good epoch at least; what went wrong is noted."""
    learned = state.best_epoch > 0
    if not learned.any():
        raise ConfigError(
            f"training diverged in its first epoch {RETRIES + 1} times, at ever lower rates: {state.notes[-1]}; use a "
            "learning rate far below it, or look for values in the data that are none"
        )
    notes += state.notes
    notes += [
        f"{name} left out: its training diverged at any rate"
        for name, ok in zip(names, learned, strict=False)
        if not ok
    ]
    return np.flatnonzero(learned)


def _constants(fit: Fit, state: State, corpus: Corpus, kept: Int64) -> list[Constants]:
    """What the served model of each member has besides weights."""
    known, found = corpus.constants(), list[Constants]()
    for k in kept.tolist():
        torch.manual_seed(fit.recipe.seed)  # not what the last pass left: a training that goes on may have made none
        # Also of the part that is held out: there errors are those of data that the network was not trained on.
        windows = np.sort(np.concatenate([corpus.train[k], corpus.held_out[k]]))
        some = windows[:: math.ceil(len(windows) / MEASURED)]
        with torch.no_grad():
            found.append({**known[k], **fit.load(state.best[k]).measure(corpus.batch(some))})
    return found


def _serve(fit: Fit, state: State, constants: list[Constants], config: TrainConfig, kept: Int64) -> ServedModel[Any]:
    weights = fit.state_dict(state.best[torch.from_numpy(kept)])
    named = {name: weights[name] for name in config.family.shapes(config.model)}
    if fit.members:
        stacked = {name: np.stack([one[name] for one in constants]) for name in constants[0]}
        model = config.family.serve(config.model, named, stacked, stacked=True)
    else:
        model = config.family.serve(config.model, {name: one[0] for name, one in named.items()}, constants[0])
    assert isinstance(model, ServedModel)
    return model


def _calibrate(model: ServedModel[Any], corpus: Corpus, k: int, place: int) -> NDArray[np.float32]:
    """Scores of a member's held-out windows as the service would give them, (n,) float32; its place in the stack."""
    targets = corpus.held_out[k][:: math.ceil(len(corpus.held_out[k]) / MOST_SCORES)]
    scores = []
    for some in _batches(targets, 4096):
        context = corpus.context(some)
        if model.members:
            context = replace(context, member=np.full(len(some), place))
        scores.append(score(context.value, model.assess(context)))
    largest = np.finfo(np.float32).max
    return np.minimum(np.concatenate(scores), largest).astype(np.float32)


def _record(
    state: State, corpus: Corpus, used: Sequence[TrainSeries], config: TrainConfig, notes: Sequence[str]
) -> Training:
    return Training(
        sources=tuple(Source(one.name, len(one.values), one.sha256) for one in used),
        seed=config.seed,
        epochs=len(state.curve),
        best_epoch=state.best_pass,
        windows=sum(map(len, corpus.train)),
        held_out_windows=sum(map(len, corpus.held_out)),
        train_losses=tuple(train_loss for train_loss, _ in state.curve),
        held_out_losses=tuple(held_out_loss for _, held_out_loss in state.curve),
        persistence_loss=_yardstick(corpus, config),
        command=config.command,
        created=config.created,
        notes="; ".join(notes),
    )


def _yardstick(corpus: Corpus, config: TrainConfig) -> float | None:
    """Held-out loss of the last value as the forecast, the mean over the members; None where there is no such loss."""
    if config.family.yardstick is None:
        return None
    means = []
    for k, targets in enumerate(corpus.held_out):
        losses = torch.cat([config.family.yardstick(corpus.batch(some)) for some in _batches(targets, 4096)])
        trim = np.array([0.0 if corpus.labelled[k] else config.trim])
        means.append(float(robust_mean(losses[None].double(), torch.ones(1, len(losses), dtype=torch.bool), trim)))
    return sum(means) / len(means)


def _fingerprint(series: Sequence[TrainSeries], config: TrainConfig) -> dict[str, Any]:
    """What a training must have in common with the one that it goes on from."""
    told = {one.name: getattr(config, one.name) for one in fields(config)}
    for name in ("family", "model", "command", "created"):
        del told[name]
    order = hashlib.sha256("\n".join(one.name for one in series).encode()).hexdigest()[:16]
    shape = {name: value for name, value in asdict(config.model).items()}  # type: ignore[call-overload]  # a dataclass
    return {"family": config.family.name, **shape, **told, "series": len(series), "order": order} | {
        f"series {one.name}": _digest(one) for one in series
    }


def _digest(series: TrainSeries) -> str:
    digest = hashlib.sha256(json.dumps([series.interval_ms, series.start_ms, series.metrics]).encode())
    for array in (series.values, series.anomalous, series.wanted):
        digest.update(b"" if array is None else np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def _batches(targets: Int64, size: int) -> Iterator[Int64]:
    for start in range(0, len(targets), size):
        yield targets[start : start + size]
