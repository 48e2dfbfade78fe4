"""Training series on a regular grid, and the windows cut from them."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.base import Bool, Float64
from models.errors import ConfigError

Int64 = NDArray[np.int64]

LEAST_OBSERVED = 0.2  # share of a window that was observed: below it there is nothing to forecast from


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

    def __post_init__(self) -> None:
        if self.values.ndim != 2 or self.values.shape[1] < 1:
            raise ConfigError(f"series {self.name!r}: values are {self.values.shape}, and (N, F) is needed")
        if self.anomalous.shape != (len(self.values),) or self.anomalous.dtype != np.bool_:
            raise ConfigError(
                f"series {self.name!r}: anomalous is {self.anomalous.shape} {self.anomalous.dtype}, "
                f"and ({len(self.values)},) bool is needed"
            )
        if np.isinf(self.values).any():
            raise ConfigError(f"series {self.name!r}: a value is infinite; write NaN where it is missing")
        if self.interval_ms < 1:
            raise ConfigError(f"series {self.name!r}: interval_ms={self.interval_ms} must be at least 1")


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


def usable_targets(series: TrainSeries, filled: Float64, window: int) -> Int64:
    """Positions of the points that a forecast may be trained on or judged by, ascending.

    The target itself was observed (one feature at least) and is not labelled anomalous; the `window` points before it
    are complete in `filled`, hold no labelled anomaly, and a fifth of their values were observed.
    """
    n = len(series.values)
    if n <= window:
        return np.empty(0, dtype=np.int64)
    count: Int64 = (~np.isnan(series.values)).sum(axis=1)  # (N,), values observed
    missing: Bool = np.asarray(np.isnan(filled).any(axis=1))

    def in_history(points: Bool | Int64) -> Int64:  # their sum, before target window, window + 1, ..., n - 1
        counts: Int64 = np.concatenate([[0], np.cumsum(points)])
        return counts[window:n] - counts[: n - window]

    clean = in_history(missing | series.anomalous) == 0
    enough = in_history(count) >= LEAST_OBSERVED * window * series.values.shape[1]
    return np.flatnonzero(clean & enough & ((count > 0) & ~series.anomalous)[window:]) + window


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
