"""The training data of one model, or of many that are trained at once: series end to end, and batches cut from them."""

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from models.base import Bool, Constants, Context, Float64, Int64
from models.errors import ConfigError
from models.family import Batch
from models.scaling import clock, normalise, standardise
from models.windows import TrainSeries, complete, usable_targets, usual_step

FEWEST = 100  # windows to train on, and FEWEST / 4 to hold out: with fewer the early stopping is a coin toss
FLAT_SCALE = 1e-6  # least training deviation, as a share of the mean: a flat KPI's noise is not its unit
# Of several features, the usual step is at least so much of the deviation: else one that hardly ever moves is strange
# beyond all measure as soon as it does, and drowns the others. Measured on five machines of SMD (38 metrics each), at
# limits set without labels: 56 of 94 labelled segments caught and 40 false alarms with it, 52 and 89 without it; with
# features that never move read and measured like the others, 6 and 23.
LEAST_STEP = 0.5
STILL_SHARE = 0.1  # deviation of a feature that never moved, as a share of its level: there is nothing to measure it by
# Share of the values, at each end, that do not make the usual range: of a KPI, and of one metric among several, whose
# habit is often to burst for minutes of a day; there a few values never do, however short the series.
ENDS, ENDS_OF_MANY, FEW = 0.01, 0.001, 5
BEYOND = 3.0  # usual ranges beyond which a value is no measure of the others


@dataclass(frozen=True, slots=True)
class Layout:
    """How windows are cut: what a family and its config say of them."""

    history: int  # H, points before the target
    features: int  # F
    scaling: str  # train or window
    reads_point: bool
    gap: int | None  # longest gap that is filled, in points; None: any
    held_out: float  # last part of each series' time


@dataclass(frozen=True, slots=True)
class Corpus:
    """All series end to end, with the windows to use. Member k of K is what model k is trained on; one model is K = 1.

    Attributes:
        layout: how windows are cut.
        points: (T, F) float64, gaps filled; a window is `points[target - H : target + 1]`.
        ready: the same, standardised, (T, F) float32, where constants of the training data do so; else None.
        learned: observed and not labelled anomalous, (T, F).
        time_ms: (T,).
        starts: (S,), where each series begins.
        member: (S,), which model each series is for.
        usual_step: (S, F), of the training part without labelled points.
        center: of the standardisation, (K, F) float64; 0 where windows are measured by themselves.
        scale: (K, F) float64, > 0; 1 where windows are measured by themselves.
        still: features that never moved in the training part, (K, F). A KPI moves by definition.
        labelled: whether the training part of a member holds labels, (K,).
        train: positions of the targets to train on, of each member.
        held_out: those that decide when to stop, ascending within each series.
    """

    layout: Layout
    points: Float64
    ready: NDArray[np.float32] | None
    learned: Bool
    time_ms: Int64
    starts: Int64
    member: Int64
    usual_step: Float64
    center: Float64
    scale: Float64
    still: Bool
    labelled: Bool
    train: tuple[Int64, ...]
    held_out: tuple[Int64, ...]

    @property
    def members(self) -> int:
        """K, the models that are trained."""
        return len(self.train)

    def batch(self, targets: Int64) -> Batch:
        """The windows of some targets, (n,) or (K, n), as the networks see them."""
        flat, lead = targets.reshape(-1), targets.shape
        series = np.searchsorted(self.starts, flat, side="right") - 1
        still = self.still[self.member[series]]  # (n, F)
        place = flat[:, None] + np.arange(-self.layout.history, 1)
        if self.ready is not None:
            x = self.ready[place]
        else:
            values = self.points[place]
            past, center, scale = normalise(values[:, :-1])
            x = np.concatenate([past, standardise(values[:, -1], center, scale)[:, None]], axis=1)
            x[np.broadcast_to(still[:, None], x.shape)] = 0
        counts = self.learned[place] & ~still[:, None]
        code = clock(self.time_ms[flat])
        return Batch(*(torch.from_numpy(one.reshape(*lead, *one.shape[1:])) for one in (x, counts, code)))

    def context(self, targets: Int64) -> Context:
        """The points of some targets as the service would show them to a model, (n,); without a member."""
        series = np.searchsorted(self.starts, targets, side="right") - 1
        past = targets[:, None] + np.arange(-self.layout.history, 0)
        return Context(
            history=self.points[past],
            learned=self.learned[past],
            value=np.where(self.learned[targets], self.points[targets], np.nan),
            time_ms=self.time_ms[targets],
            usual_step=self.usual_step[series],
        )

    def constants(self) -> list[Constants]:
        """What the served model of each member has to know of its training data."""
        every: list[Constants] = []
        for k in range(self.members):
            own: dict[str, Float64] = {"still": self.still[k].astype(np.float64)}
            if self.layout.scaling == "train":
                step = mean_step(self.usual_step[self.member == k])
                if self.layout.features > 1:
                    step = np.maximum(step, LEAST_STEP * self.scale[k])
                own |= {"center": self.center[k], "scale": self.scale[k], "usual_step": step}
            every.append(own)
        return every


def gather(members: Sequence[Sequence[TrainSeries]], layout: Layout) -> Corpus:
    """Fill, split and check series.

    Args:
        members: the series of each model.
        layout: how windows are cut.

    Raises:
        ConfigError: series of differing F, metrics or (with scaling "train") interval, a feature without a value, or
            too few windows.
    """
    parts = [_Member.of(series, layout) for series in members]
    every = [one for series in members for one in series]
    lengths = [len(one.values) for one in every]
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)[:-1]
    first = np.cumsum([0] + [len(series) for series in members])
    train, held_out = [], []
    for k, part in enumerate(parts):
        offset = starts[first[k] : first[k + 1]]
        train.append(_shifted(part.train, offset))
        held_out.append(_shifted(part.held_out, offset))
    member = np.repeat(np.arange(len(members)), [len(series) for series in members])
    center, scale = np.array([part.center for part in parts]), np.array([part.scale for part in parts])
    still = np.array([part.still for part in parts])
    ready = None
    if layout.scaling == "train":
        blocks = [
            np.where(part.still, np.float32(0), standardise(filled, part.center, part.scale))
            for part in parts
            for filled in part.filled
        ]
        ready = np.concatenate(blocks)
    return Corpus(
        layout=layout,
        points=np.concatenate([filled for part in parts for filled in part.filled]),
        ready=ready,
        learned=np.concatenate([~np.isnan(one.normal) for one in every]),
        time_ms=np.concatenate([one.time_ms for one in every]),
        starts=starts,
        member=member,
        usual_step=np.concatenate([part.steps for part in parts]),
        center=center,
        scale=scale,
        still=still,
        labelled=np.array([part.labelled for part in parts]),
        train=tuple(train),
        held_out=tuple(held_out),
    )


def enough(series: Sequence[TrainSeries], layout: Layout) -> str | None:
    """Say why a model cannot be trained on these series, or None when it can."""
    try:
        _Member.of(series, layout)
    except ConfigError as error:
        return str(error)
    return None


def tamed(values: Float64) -> Float64:
    """Values (N, F) with those that lie far outside of their usual range brought to its edge; NaN stays.

    A single wrong value of 1e12 that nobody labelled would be the unit of all others. The usual range is that of 98 %
    of the values, of several features of 99.8 % of the values of each, and three times as much on both sides; no limits
    where those are all the same. A unit that is too small for a burst that comes every day lets that one metric drown
    all others: on three machines of SMD the mean VUS-PR of the autoencoder was 0.41 with 98 % and 0.51 with 99.8 %.
    """
    if not len(values):
        return values
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # a feature without a value
        ends = ENDS if values.shape[1] == 1 else min(max(ENDS_OF_MANY, FEW / len(values)), ENDS)
        low, high = np.nanquantile(values, [ends, 1 - ends], axis=0)
    reach = np.where(high > low, BEYOND * (high - low), np.inf)
    bounded: Float64 = np.clip(values, low - reach, high + reach)
    return bounded


def mean_step(steps: Float64) -> Float64:
    """Usual step over some series, (S, F) to (F,); 0 for a feature that never shows two neighbours."""
    known = ~np.isnan(steps)
    total: Float64 = np.where(known, steps, 0.0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)
    return total


@dataclass(frozen=True, slots=True)
class _Member:
    """The series of one model; positions of targets count from the beginning of each series."""

    filled: list[Float64]
    steps: Float64
    train: list[Int64]
    held_out: list[Int64]
    center: Float64
    scale: Float64
    still: Bool
    labelled: bool

    @classmethod
    def of(cls, series: Sequence[TrainSeries], layout: Layout) -> "_Member":
        _check(series, layout)
        features = layout.features
        filled, train, held_out, usable, labelled = [], [], [], [], False
        for one in series:
            longest = len(one.values) if layout.gap is None else layout.gap
            filled.append(complete(one.normal, longest))
            split = _split(one, layout.held_out)
            targets = usable_targets(one, filled[-1], layout.history, clean=not layout.reads_point)
            train.append(targets[targets < split])
            held_out.append(targets[targets >= split])
            usable.append(one.normal[:split])
            labelled |= bool(one.anomalous[:split].any())
        normal = np.concatenate(usable)
        _check_values(series, normal, layout)
        moves = _moves(usable) if features > 1 else np.ones(1, np.bool_)
        _check_windows(series, train, held_out, layout)
        if not labelled:
            usable = [tamed(one) for one in usable]
        center, scale = np.zeros(features), np.ones(features)
        if layout.scaling == "train":
            center, scale = _measure(np.concatenate(usable), moves)
        steps = np.array([usual_step(one) for one in usable])
        return cls(filled, steps, train, held_out, center, scale, ~moves, labelled)


def _shifted(targets: Iterable[Int64], offsets: Int64) -> Int64:
    return np.concatenate([one + offset for one, offset in zip(targets, offsets.tolist(), strict=True)])


def _split(series: TrainSeries, held_out: float) -> int:
    """Where the part begins that is held out: the last of the time, or of the points that are wanted."""
    n = len(series.values)
    wanted = np.arange(n) if series.wanted is None else np.flatnonzero(series.wanted)
    kept = len(wanted) - math.ceil(held_out * len(wanted))
    return int(wanted[kept]) if kept < len(wanted) else n


def _check(series: Sequence[TrainSeries], layout: Layout) -> None:
    if not series:
        raise ConfigError("there are no series to train on; name at least one file")
    for one in series:
        if one.values.shape[1] != layout.features:
            raise ConfigError(
                f"series {one.name!r} has {one.values.shape[1]} features and the config {layout.features}"
            )
        if one.metrics != series[0].metrics:
            raise ConfigError(
                f"series {one.name!r} has the metrics {', '.join(one.metrics)} and {series[0].name!r} "
                f"{', '.join(series[0].metrics)}; a model needs the same of all, in one order"
            )
    intervals = sorted({one.interval_ms for one in series})
    if layout.scaling == "train" and len(intervals) > 1:
        raise ConfigError(
            f"intervals_ms={intervals} differ; with scaling 'train' all series are of one KPI and interval"
        )


def _check_values(series: Sequence[TrainSeries], normal: Float64, layout: Layout) -> None:
    empty: Bool = np.asarray(np.isnan(normal).all(axis=0))
    if empty.any() and layout.features > 1:
        names = series[0].metrics or tuple(map(str, range(layout.features)))
        without = ", ".join(name for name, none in zip(names, empty.tolist(), strict=True) if none)
        raise ConfigError(f"no value to train on, in the first {1 - layout.held_out:.0%} of the time: {without}")


def _check_windows(
    series: Sequence[TrainSeries], train: Sequence[Int64], held_out: Sequence[Int64], layout: Layout
) -> None:
    fewest_held_out = max(1, FEWEST // 4)
    windows, held = sum(map(len, train)), sum(map(len, held_out))
    if windows >= FEWEST and held >= fewest_held_out:
        return
    needed = math.ceil(max((FEWEST + layout.history) / (1 - layout.held_out), FEWEST / 4 / layout.held_out))
    chosen = "" if all(one.wanted is None for one in series) else " of the chosen hours and days"
    raise ConfigError(
        f"{sum(len(one.values) for one in series)} points give {windows} windows to train on and {held} to hold out"
        f"{chosen}; at least {FEWEST} and {fewest_held_out} are needed, about {needed} points of one series without "
        f"long gaps or labels ({layout.history} points before each): give more data or a shorter window"
    )


def _moves(usable: Sequence[Float64]) -> Bool:
    """Which features are not the same all the time in any of the series, (N, F) each with NaN where missing: (F,)."""
    moves = np.zeros(usable[0].shape[1], np.bool_)
    for values in usable:
        missing = np.isnan(values)
        known = np.where(missing, -np.inf, values).max(axis=0, initial=-np.inf)
        known -= np.where(missing, np.inf, values).min(axis=0, initial=np.inf)
        largest = np.abs(np.nan_to_num(values)).max(axis=0, initial=0.0)
        moves |= known > FLAT_SCALE * largest
    return moves


def _measure(values: Float64, moves: Bool) -> tuple[Float64, Float64]:
    """Mean and floored deviation of each feature of (N, F) values, without the missing."""
    center = np.nanmean(values, axis=0)
    scale = np.nanstd(values, axis=0)
    floored = np.maximum(scale, FLAT_SCALE * np.abs(center))
    scale = np.where(floored > 0, floored, 1.0)  # all zeros: the unit is the KPI's own
    if not moves.all():
        # As strange as a tenth of its level; of one that was always 0 the unit is unknown: as the others move.
        level = STILL_SHARE * np.abs(center)
        typical = float(np.median(scale[moves])) if moves.any() else 1.0
        scale = np.where(moves, scale, np.where(level > 0, level, typical))
    return center, scale
