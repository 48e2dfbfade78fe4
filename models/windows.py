"""Training series on a regular grid, and the windows cut from them."""

from dataclasses import dataclass

import numpy as np

from models.base import Bool, Float64, Int64
from models.errors import ConfigError

LEAST_OBSERVED = 0.2  # share of a window that was observed: below it there is nothing to learn from


@dataclass(frozen=True, slots=True)
class TrainSeries:
    """One KPI or entity as columns on a regular grid.

    Raises:
        ConfigError: shapes or lengths disagree, or a value is infinite.
    """

    name: str
    values: Float64  # (N, F), NaN where missing
    anomalous: Bool  # (N,), labels; all False when unknown
    interval_ms: int  # grid step
    sha256: str = ""  # of the file that it was read from, for the record only
    metrics: tuple[str, ...] = ()  # names of an entity's features, in order; empty for a KPI
    start_ms: int = 0  # time of the first point, ms since 1970
    wanted: Bool | None = None  # (N,), points that may be learned to be normal, such as those of some hours; None: all

    def __post_init__(self) -> None:
        if self.values.ndim != 2 or self.values.shape[1] < 1:
            raise ConfigError(f"series {self.name!r}: values are {self.values.shape}, and (N, F) is needed")
        if self.anomalous.shape != (len(self.values),) or self.anomalous.dtype != np.bool_:
            raise ConfigError(
                f"series {self.name!r}: anomalous is {self.anomalous.shape} {self.anomalous.dtype}, "
                f"and ({len(self.values)},) bool is needed"
            )
        if self.wanted is not None and (self.wanted.shape != self.anomalous.shape or self.wanted.dtype != np.bool_):
            raise ConfigError(
                f"series {self.name!r}: wanted is {self.wanted.shape} {self.wanted.dtype}, "
                f"and ({len(self.values)},) bool is needed"
            )
        if np.isinf(self.values).any():
            raise ConfigError(f"series {self.name!r}: a value is infinite; write NaN where it is missing")
        if self.interval_ms < 1:
            raise ConfigError(f"series {self.name!r}: interval_ms={self.interval_ms} must be at least 1")

    @property
    def time_ms(self) -> Int64:
        """Of every point, ms since 1970, (N,) int64."""
        times: Int64 = self.start_ms + self.interval_ms * np.arange(len(self.values), dtype=np.int64)
        return times

    @property
    def normal(self) -> Float64:
        """The values without those that are labelled anomalous, (N, F); NaN where there is none."""
        values: Float64 = np.where(self.anomalous[:, None], np.nan, self.values)
        return values


def complete(values: Float64, longest: int) -> Float64:
    """Repeat the last value seen for at most `longest` points of a gap.

    A line to the next value would be smoother, and would show a window the target that it is to forecast.

    Args:
        values: (N, F) float64, NaN where missing; each feature has its own gaps.
        longest: in points; what is missing further from the last value, and at the beginning, stays NaN.

    Returns:
        A filled copy, (N, F) float64.
    """
    filled = values.copy()
    position = np.arange(len(values))
    for column in filled.T:  # a view: writes go to `filled`
        missing = np.isnan(column)
        if not missing.any() or missing.all():
            continue
        before = np.maximum.accumulate(np.where(missing, -1, position))  # last observed point, -1 when none
        fill = missing & (before >= 0) & (position - before <= longest)
        column[fill] = column[before[fill]]
    return filled


def usable_targets(series: TrainSeries, filled: Float64, history: int, *, clean: bool = True) -> Int64:
    """Positions of the points that a model may be trained on or judged by, ascending.

    The target itself was observed (one feature at least), is not labelled anomalous, and is wanted; the `history`
    points before it are complete in `filled`, and a fifth of their values were observed and not labelled.

    Args:
        series: the points.
        filled: their normal values, completed.
        history: points before the target.
        clean: no point before the target may be labelled either. A forecast is judged by its target alone, and would
            learn to go on as an anomaly does; a reconstruction leaves those very points out of its loss.
    """
    n = len(series.values)
    if n <= history:
        return np.empty(0, dtype=np.int64)
    count: Int64 = (~np.isnan(series.normal)).sum(axis=1)  # (N,), values observed
    unusable: Bool = np.asarray(np.isnan(filled).any(axis=1))
    if clean:
        unusable = unusable | series.anomalous

    def in_history(points: Bool | Int64) -> Int64:  # their sum, before target `history`, `history` + 1, ..., n - 1
        counts: Int64 = np.concatenate([[0], np.cumsum(points)])
        return counts[history:n] - counts[: n - history]

    enough = in_history(count) >= LEAST_OBSERVED * history * series.values.shape[1]
    target = count > 0 if series.wanted is None else (count > 0) & series.wanted
    return np.flatnonzero((in_history(unusable) == 0) & enough & target[history:]) + history


def usual_step(values: Float64) -> Float64:
    """Mean absolute change from one point to the next, (F,) float64; NaN for a feature without two neighbours.

    Args:
        values: (N, F) float64, NaN where missing.
    """
    steps = np.abs(np.diff(values, axis=0))
    known = ~np.isnan(steps)
    count = known.sum(axis=0)
    total = np.where(known, steps, 0.0).sum(axis=0)
    mean: Float64 = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
    return mean
