"""The time grid of a series: which interval it has, and in which cell a point lies.

timestamp = phase + cell · interval, jitter of up to half an interval snaps to the nearest cell. All functions work on
columns and know no clock.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from stream.columns import BoolArray, Float64Array, Int32Array, Int64Array

NO_CELL = -(2**62)  # no point has one so early
PROBE_POINTS = 8  # distinct timestamps that a series must show before its interval is inferred; below every window

_SECOND, _MINUTE, _HOUR = 1_000, 60_000, 3_600_000
# What people set an interval in, the roundest first.
_UNITS_MS = np.array(
    [h * _HOUR for h in (24, 12, 6, 4, 3, 2, 1)]
    + [m * _MINUTE for m in (30, 20, 15, 10, 5, 2, 1)]
    + [s * _SECOND for s in (30, 20, 15, 10, 5, 2, 1)]
    + [500, 200, 100, 50, 20, 10, 5, 2, 1]
)
_ALIKE_WITHIN = 0.1  # of a difference
_ON_GRID_WITHIN = 0.35  # of an interval
_DOUBT = 8.0  # standard errors of the slope: the error is known from a few points only, and most intervals are round
_DOUBT_IRREGULAR = 0.02  # of the interval, where there is no slope to doubt


def infer_interval(timestamp_ms: Int64Array) -> tuple[Int64Array, Int64Array]:
    """Return the interval and the phase of each series from its first timestamps.

    The interval is the commonest difference: the one that most others equal within a tenth, the smallest of equally
    common ones, as the median of those. Where every point then has a cell of its own, jitter aside, the median slope
    over all pairs of points is better. Jitter leaves either in some doubt, and within that the roundest number is
    taken: 1 s of jitter on points of 10 s would otherwise give 9.7 s, and every thirtieth point a wrong cell. The
    phase is the median offset of the points from the grid.

    Args:
        timestamp_ms: (K, P) int64, rising strictly along each row, P >= 2.

    Returns:
        interval_ms (K,) int64 >= 1 and phase_ms (K,) int64.

    Source: Theil-Sen estimator; standard error of a slope.
    """
    since = (timestamp_ms - timestamp_ms[:, :1]).astype(np.float64)  # (K, P)
    difference = np.diff(since, axis=1)  # (K, P-1)
    alike = np.abs(difference[:, :, None] - difference[:, None, :]) <= _ALIKE_WITHIN * difference[:, :, None]
    support = alike.sum(axis=2)  # (K, P-1)
    most = support == support.max(axis=1, keepdims=True)
    commonest = np.where(most, difference, np.inf).min(axis=1, keepdims=True)  # (K, 1), as all that follow
    near = np.abs(difference - commonest) <= _ALIKE_WITHIN * commonest
    commonest = np.nanmedian(np.where(near, difference, np.nan), axis=1, keepdims=True)

    slope = commonest
    earlier, later = np.triu_indices(since.shape[1], 1)
    for _ in range(2):  # the better slope of the first pass counts the cells of long gaps right
        cell = _cells(difference, slope)
        apart, cells = since[:, later] - since[:, earlier], cell[:, later] - cell[:, earlier]
        slopes = np.divide(apart, cells, out=np.full_like(apart, np.nan), where=cells > 0)
        slope = np.nanmedian(slopes, axis=1, keepdims=True)
    cell = _cells(difference, slope)
    offset = since - cell * slope
    offset -= np.median(offset, axis=1, keepdims=True)
    on_grid = np.abs(offset) <= _ON_GRID_WITHIN * slope
    regular = on_grid.all(axis=1, keepdims=True) & (np.diff(cell, axis=1) > 0).all(axis=1, keepdims=True)
    interval = np.where(regular, slope, commonest)

    leverage = np.square(cell - cell.mean(axis=1, keepdims=True)).sum(axis=1, keepdims=True)
    error = np.sqrt(np.square(offset).mean(axis=1, keepdims=True) / np.maximum(leverage, 1.0))
    doubt = np.where(regular, _DOUBT * error, _DOUBT_IRREGULAR * interval)
    candidates = np.maximum(np.rint(interval / _UNITS_MS), 1) * _UNITS_MS  # (K, units); whole ms are always likely
    likely = np.abs(candidates - interval) <= np.maximum(doubt, 0.5)
    interval = np.take_along_axis(candidates, likely.argmax(axis=1, keepdims=True), axis=1)
    phase = np.rint(np.median(since - _cells(difference, interval) * interval, axis=1)).astype(np.int64)
    return interval[:, 0].astype(np.int64), timestamp_ms[:, 0] + phase


def _cells(difference: Float64Array, interval: Float64Array) -> Float64Array:
    """Return the cell of each point on a grid through the first one, (K, P)."""
    cell = np.zeros((len(difference), difference.shape[1] + 1))
    cell[:, 1:] = np.cumsum(np.rint(difference / interval), axis=1)
    return cell


@dataclass(frozen=True, slots=True)
class Placed:
    """Where each point of a batch falls, sorted by series and, within one, in the order of arrival.

    Attributes:
        order: (N,) indices of the points, sorted by series.
        cell: (N,) int64, cell of each point (in `order`).
        lead: (N,) int64: > 0 the point advances its series by so many cells, 0 it falls in the newest cell again,
            < 0 it comes that many cells late.
        start: (N,) bool, the first point of its series in this batch.
    """

    order: Int64Array
    cell: Int64Array
    lead: Int64Array
    start: BoolArray


def place(slot: Int32Array, cell: Int64Array, newest: Int64Array, started: BoolArray) -> Placed:
    """Say of each point by how far it leads the newest cell that its series had when the point arrived.

    Args:
        slot: series of each point, (N,), in the order of arrival.
        cell: cell of each point, (N,).
        newest: newest cell of the point's series before the batch, (N,); ignored where `started` is False.
        started: False for a series that has no point yet: its first point leads by 1.
    """
    order = np.argsort(slot, kind="stable")
    slot, cell = slot[order], cell[order]
    start = np.ones(len(slot), np.bool_)
    start[1:] = slot[1:] != slot[:-1]
    first = np.flatnonzero(start)
    segment = np.cumsum(start) - 1
    base = np.where(started[order][first], newest[order][first], cell[first] - 1)[segment]
    ahead = cell - base  # of the newest cell before the batch
    # A running maximum per series: each series is lifted above the one before it, so that one accumulate serves all.
    lift = segment * ahead.max(initial=0)  # fits int64: 92,000 series of which one leaps 3,000 years of 1 ms
    running = np.maximum.accumulate(np.maximum(ahead, 0) + lift) - lift
    before = np.zeros_like(running)
    before[1:] = running[:-1]
    before[start] = 0
    return Placed(order, cell, ahead - before, start)
