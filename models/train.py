"""Offline training of a DeepAnT: seeded, with early stopping on the last part of the time."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.base import Bool, Float64, score
from models.checkpoint import Bundle, Source, Training
from models.deepant import DeepAnT, DeepAnTConfig, Network, normalise, standardise
from models.errors import ConfigError
from models.windows import Int64, TrainSeries, complete, usable_targets, usual_step

__all__ = ["EpochReport", "TrainConfig", "TrainSeries", "train"]

FEWEST = 100  # windows to train on, and FEWEST / 4 to hold out: with fewer the early stopping is a coin toss
MOST_SCORES = 100_000  # kept as calibration: its 98 % quantile leaves 2,000 excesses
FLAT_SCALE = 1e-6  # least training deviation, as a share of the mean: a flat KPI's noise is not its unit
# Of several features, the usual step is at least so much of the deviation: else one that hardly ever moves is strange
# beyond all measure as soon as it does, and drowns the others. Measured on five machines of SMD (38 metrics each), at
# limits set without labels: 56 of 94 labelled segments caught and 40 false alarms with it, 52 and 89 without it; with
# features that never move read and measured like the others, 6 and 23.
LEAST_STEP = 0.5
STILL_SHARE = 0.1  # deviation of a feature that never moved, as a share of its level: there is nothing to measure it by


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """What to train and for how long.

    Raises:
        ConfigError: a value is out of its bounds.
    """

    model: DeepAnTConfig = field(default_factory=DeepAnTConfig)
    epochs: int = 30  # at most
    batch: int = 64  # windows per step; with 256 the few thousand windows of one KPI give too few steps
    learning_rate: float = 2e-3  # of Adam; the published 1e-5 ends worse than the last value as forecast
    decay: float = 0.9  # of the learning rate, per epoch
    patience: int = 5  # epochs without a better held-out error until training stops
    clip_norm: float = 1.0  # of the gradient, over all weights
    held_out: float = 0.2  # last part of each series' time
    longest_gap: int | None = None  # points that the last value may stand in for; the window when None
    windows_per_epoch: int | None = 200_000  # drawn anew each epoch when there are more; all when None
    seed: int = 0
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
        if self.longest_gap is not None and self.longest_gap < 0:
            raise ConfigError(f"longest_gap={self.longest_gap} must be at least 0")
        if self.windows_per_epoch is not None and self.windows_per_epoch < FEWEST:
            raise ConfigError(f"windows_per_epoch={self.windows_per_epoch} must be at least {FEWEST}")

    @property
    def gap(self) -> int:
        """Longest gap that is filled, in points."""
        return self.model.window if self.longest_gap is None else self.longest_gap


@dataclass(frozen=True, slots=True)
class EpochReport:
    """One epoch, as `progress` is told of it."""

    epoch: int  # from 1
    epochs: int  # at most
    train_loss: float  # mean absolute error in standard deviations
    held_out_loss: float
    best: bool


@dataclass(frozen=True, slots=True)
class _Corpus:
    """All series end to end, with the windows to use: a window is `points[target - W : target]`."""

    points: Float64  # (T, F), gaps filled
    observed: Bool  # (T, F)
    moves: Bool  # (F,), features that were not always the same; a KPI moves by definition
    train: Int64  # (n,), positions of the targets
    held_out: Int64  # (m,), ascending
    starts: Int64  # (S,), where each series begins
    usual_step: Float64  # (S, F), of the training part without labelled points


def train(
    series: Sequence[TrainSeries], config: TrainConfig, progress: Callable[[EpochReport], None] | None = None
) -> Bundle:
    """Train a DeepAnT and score its held-out windows.

    With scaling "train" all series must be of the one KPI that the model is for: they share the scaling constants.
    A window is used when its target was observed and is not labelled anomalous, and its history holds no
    labelled anomaly and no gap longer than itself (in shorter ones the last value is repeated). The last fifth of each
    series' time is held out. The loss is the mean absolute error of standardised values within ±INPUT_LIMIT of
    `models.deepant`, which a spike that nobody labelled hardly moves.

    Of several features those of a target that were observed count. One that never moves in the training part can teach
    nothing: the network does not read it, and its forecast is its last value.

    Args:
        series: what to learn from; each with the F of the config, and the same metrics.
        config: the same config, seed, data, machine and number of threads give the same weights.
        progress: called after every epoch; an exception that it raises ends the training.

    Returns:
        The model of the best epoch. Its calibration is the scores of the held-out windows by the served forward
        pass, in the order of the series and oldest first, at most MOST_SCORES, evenly taken; with scaling "window"
        by the usual step of each series' training part, so that they have no unit.

    Raises:
        ConfigError: series of differing F, metrics or (with scaling "train") interval, a feature without a value, too
            few windows, or the training diverged.
    """
    corpus, center, scale = _prepare(series, config)
    with torch.random.fork_rng(devices=[]):  # dropout and start values draw from torch's global generator
        torch.manual_seed(config.seed)
        network = Network(config.model)
        network.unread(torch.from_numpy(~corpus.moves))
        history = _fit(network, corpus, center, scale, config, progress)
    own_step = _mean_step(corpus) if config.model.scaling == "train" else None
    if own_step is not None and config.model.features > 1:
        own_step = np.maximum(own_step, LEAST_STEP * scale)
    model = DeepAnT(config.model, network, center, scale, own_step)
    x, y = _standardised(corpus, corpus.held_out, center, scale, config.model)
    intervals = {one.interval_ms for one in series}
    training = Training(
        sources=tuple(Source(one.name, len(one.values), one.sha256) for one in series),
        seed=config.seed,
        epochs=len(history),
        best_epoch=max((report.epoch for report in history if report.best), default=0),
        windows=len(corpus.train),
        held_out_windows=len(corpus.held_out),
        train_losses=tuple(report.train_loss for report in history),
        held_out_losses=tuple(report.held_out_loss for report in history),
        persistence_loss=float(_mean_error(x[:, -1], y, _counts(corpus, corpus.held_out))),
        command=config.command,
        created=config.created,
    )
    return Bundle(
        model=model,
        calibration=_calibrate(model, corpus),
        interval_ms=intervals.pop() if len(intervals) == 1 else None,
        training=training,
        metrics=series[0].metrics if config.model.features > 1 else (),
    )


def _prepare(series: Sequence[TrainSeries], config: TrainConfig) -> tuple[_Corpus, Float64, Float64]:
    """Fill, split and check the series; the corpus and the scaling constants, (F,) each."""
    window, features = config.model.window, config.model.features
    if not series:
        raise ConfigError("there are no series to train on; name at least one file")
    for one in series:
        if one.values.shape[1] != features:
            raise ConfigError(f"series {one.name!r} has {one.values.shape[1]} features and the config {features}")
        if one.metrics != series[0].metrics:
            raise ConfigError(
                f"series {one.name!r} has the metrics {', '.join(one.metrics)} and {series[0].name!r} "
                f"{', '.join(series[0].metrics)}; a model needs the same of all, in one order"
            )
    intervals = sorted({one.interval_ms for one in series})
    if config.model.scaling == "train" and len(intervals) > 1:
        raise ConfigError(
            f"intervals_ms={intervals} differ; with scaling 'train' all series are of one KPI and interval"
        )
    points, observed, train_at, held_out_at, usable, starts, steps, start = [], [], [], [], [], [], [], 0
    for one in series:
        filled = complete(one.values, config.gap)
        split = len(filled) - math.ceil(config.held_out * len(filled))
        targets = usable_targets(one, filled, window)
        train_at.append(start + targets[targets < split])
        held_out_at.append(start + targets[targets >= split])
        normal = np.where(one.anomalous[:, None], np.nan, one.values)[:split]
        usable.append(normal)
        steps.append(usual_step(normal))
        starts.append(start)
        points.append(filled)
        observed.append(~np.isnan(one.values))
        start += len(filled)
    normal = np.concatenate(usable)
    empty: Bool = np.asarray(np.isnan(normal).all(axis=0))
    if empty.any() and features > 1:
        names = series[0].metrics or tuple(map(str, range(features)))
        without = ", ".join(name for name, none in zip(names, empty.tolist(), strict=True) if none)
        raise ConfigError(f"no value to train on, in the first {1 - config.held_out:.0%} of the time: {without}")
    moves = _moves(usable) if features > 1 else np.ones(1, np.bool_)
    corpus = _Corpus(
        np.concatenate(points),
        np.concatenate(observed),
        moves,
        np.concatenate(train_at),
        np.concatenate(held_out_at),
        np.array(starts),
        np.array(steps),
    )
    fewest_held_out = max(1, FEWEST // 4)
    if len(corpus.train) < FEWEST or len(corpus.held_out) < fewest_held_out:
        raise ConfigError(
            f"{start} points give {len(corpus.train)} windows to train on and {len(corpus.held_out)} to hold out; at "
            f"least {FEWEST} and {fewest_held_out} are needed, about {_fewest_points(window, config.held_out)} points "
            f"of one series without long gaps or labels (window={window}): give more data or a shorter window"
        )
    if config.model.scaling == "window":
        return corpus, np.zeros(features), np.ones(features)
    center, scale = _constants(normal)
    if not moves.all():
        # As strange as a tenth of its level; of one that was always 0 the unit is unknown: as the others move.
        level = STILL_SHARE * np.abs(center)
        typical = float(np.median(scale[moves])) if moves.any() else 1.0
        scale = np.where(moves, scale, np.where(level > 0, level, typical))
    return corpus, center, scale


def _moves(usable: Sequence[Float64]) -> Bool:
    """Which features are not the same all the time in any of the series, (N, F) each with NaN where missing: (F,)."""
    moves = np.zeros(usable[0].shape[1], np.bool_)
    for values in usable:
        known = np.where(np.isnan(values), -np.inf, values).max(axis=0) - np.where(
            np.isnan(values), np.inf, values
        ).min(axis=0)
        largest = np.abs(np.nan_to_num(values)).max(axis=0, initial=0.0)
        moves |= known > FLAT_SCALE * largest
    return moves


def _mean_step(corpus: _Corpus) -> Float64:
    """Usual step over all series, (F,); 0 for a feature that never shows two neighbours."""
    known = ~np.isnan(corpus.usual_step)
    total: Float64 = np.where(known, corpus.usual_step, 0.0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)
    return total


def _fewest_points(window: int, held_out: float) -> int:
    return math.ceil(max((FEWEST + window) / (1 - held_out), FEWEST / 4 / held_out))


def _constants(values: Float64) -> tuple[Float64, Float64]:
    """Mean and floored deviation of each feature of (N, F) values, without the missing."""
    center = np.nanmean(values, axis=0)
    scale = np.nanstd(values, axis=0)
    floored = np.maximum(scale, FLAT_SCALE * np.abs(center))
    return center, np.where(floored > 0, floored, 1.0)  # all zeros: the unit is the KPI's own


def _standardised(
    corpus: _Corpus, targets: Int64, center: Float64, scale: Float64, config: DeepAnTConfig
) -> tuple[Tensor, Tensor]:
    """Windows (n, W, F) and their targets (n, F) as the network sees them, float32 within ±INPUT_LIMIT."""
    history = _histories(corpus, targets, config.window)
    target = corpus.points[targets]
    if config.scaling == "train":
        x, y = standardise(history, center, scale), standardise(target, center, scale)
    else:
        x, center, scale = normalise(history)
        y = standardise(target, center, scale)
    return torch.from_numpy(x), torch.from_numpy(y)


def _histories(corpus: _Corpus, targets: Int64, window: int) -> Float64:
    """The windows that end just before the targets, (n, W, F) float64."""
    histories: Float64 = corpus.points[targets[:, None] + np.arange(-window, 0)]
    return histories


def _fit(
    network: Network,
    corpus: _Corpus,
    center: Float64,
    scale: Float64,
    config: TrainConfig,
    progress: Callable[[EpochReport], None] | None,
) -> list[EpochReport]:
    """Train in place, keep the best epoch's weights, and return what each epoch reached."""
    optimiser = torch.optim.Adam(network.parameters(), lr=config.learning_rate)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimiser, gamma=config.decay)
    draws = np.random.default_rng(config.seed)
    history: list[EpochReport] = []
    best_loss, best_state, since_best = math.inf, dict[str, Tensor](), 0
    for epoch in range(1, config.epochs + 1):
        network.train()
        total, seen = 0.0, 0
        for targets in _batches(draws.permutation(corpus.train)[: config.windows_per_epoch], config.batch):
            x, y = _standardised(corpus, targets, center, scale, config.model)
            loss = _mean_error(network(x), y, _counts(corpus, targets))
            optimiser.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            norm = torch.nn.utils.clip_grad_norm_(network.parameters(), config.clip_norm)
            _check(epoch, float(loss.detach()), float(norm), config)
            optimiser.step()
            total += float(loss.detach()) * len(targets)
            seen += len(targets)
        schedule.step()
        held_out_loss = _held_out_loss(network, corpus, center, scale, config)
        _check(epoch, held_out_loss, 0.0, config)
        better = held_out_loss < best_loss
        if better:
            best_loss, since_best = held_out_loss, 0
            best_state = {name: value.detach().clone() for name, value in network.state_dict().items()}
        else:
            since_best += 1
        history.append(EpochReport(epoch, config.epochs, total / seen, held_out_loss, better))
        if progress is not None:
            progress(history[-1])
        if since_best >= config.patience:
            break
    network.load_state_dict(best_state)
    return history


def _check(epoch: int, loss: float, norm: float, config: TrainConfig) -> None:
    """Refuse a training that left the numbers."""
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise ConfigError(
            f"training diverged in epoch {epoch}: loss {loss}, gradient norm {norm}; "
            f"use a learning rate below {config.learning_rate:g}, or another seed than {config.seed}"
        )


def _held_out_loss(network: Network, corpus: _Corpus, center: Float64, scale: Float64, config: TrainConfig) -> float:
    network.eval()
    total = 0.0
    with torch.inference_mode():
        for targets in _batches(corpus.held_out, 4096):
            x, y = _standardised(corpus, targets, center, scale, config.model)
            total += float(_mean_error(network(x), y, _counts(corpus, targets))) * len(targets)
    return total / len(corpus.held_out)


def _counts(corpus: _Corpus, targets: Int64) -> Tensor | None:
    """Which values of the targets count in the loss, (n, F) bool; None: all of them."""
    counts = corpus.observed[targets] & corpus.moves
    return None if counts.all() else torch.from_numpy(counts)


def _mean_error(forecast: Tensor, target: Tensor, counts: Tensor | None) -> Tensor:
    """Mean absolute error of the values that count."""
    error = (forecast - target).abs()
    return error.mean() if counts is None else torch.where(counts, error, 0.0).sum() / counts.sum().clamp(min=1)


def _calibrate(model: DeepAnT, corpus: _Corpus) -> NDArray[np.float32]:
    """Scores of the held-out windows as the service would give them, (n,) float32."""
    targets = corpus.held_out[:: math.ceil(len(corpus.held_out) / MOST_SCORES)]
    scores = []
    for some in _batches(targets, 4096):
        steps = corpus.usual_step[np.searchsorted(corpus.starts, some, side="right") - 1]
        learned = corpus.observed[some[:, None] + np.arange(-model.window, 0)]  # (B, W, F)
        forecast = model.forecast(_histories(corpus, some, model.window), steps, learned)
        scores.append(score(np.where(corpus.observed[some], corpus.points[some], np.nan), forecast))
    largest = np.finfo(np.float32).max
    return np.minimum(np.concatenate(scores), largest).astype(np.float32)


def _batches(targets: Int64, size: int) -> Iterator[Int64]:
    for start in range(0, len(targets), size):
        yield targets[start : start + size]
