"""The time grid of a series: which interval it has, and in which cell a point lies.

timestamp = phase + cell · interval, jitter of up to half an interval snaps to the nearest cell. All functions work on
columns and know no clock.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from stream.columns import BoolArray, Int32Array, Int64Array

PROBE_POINTS = 8  # distinct timestamps that a series must show before its interval is inferred; below every window

_SECOND = 1_000
# The intervals at which people collect: an inferred one this close to it (scrape jitter) is taken to be it.
_USUAL_MS = np.array(
    [s * _SECOND for s in (1, 2, 5, 10, 15, 20, 30)]
    + [m * 60 * _SECOND for m in (1, 2, 3, 5, 10, 15, 20, 30)]
    + [h * 3600 * _SECOND for h in (1, 2, 3, 4, 6, 8, 12, 24)],
    np.int64,
)
_USUAL_WITHIN = 0.02
_ALIKE_WITHIN = 0.1


def infer_interval(timestamp_ms: Int64Array) -> tuple[Int64Array, Int64Array]:
    """Return the interval and the phase of each series from its first timestamps.

    The interval is the commonest difference: the one that most others equal within a tenth (the smallest of
    equally common ones), as the median of those, set to a usual one where it is within 2 % of it. The phase is the
    median offset of the points from the grid through the first one.

    Args:
        timestamp_ms: (K, P) int64, rising strictly along each row, P >= 2.

    Returns:
        interval_ms (K,) int64 >= 1 and phase_ms (K,) int64.
    """
    difference = np.diff(timestamp_ms, axis=1)  # (K, P-1)
    alike = np.abs(difference[:, :, None] - difference[:, None, :]) <= _ALIKE_WITHIN * difference[:, :, None]
    support = alike.sum(axis=2)  # (K, P-1)
    commonest = np.where(support == support.max(axis=1, keepdims=True), difference, np.iinfo(np.int64).max).min(axis=1)
    near = np.abs(difference - commonest[:, None]) <= _ALIKE_WITHIN * commonest[:, None]
    interval = np.nanmedian(np.where(near, difference, np.nan), axis=1).astype(np.int64)
    usual = _USUAL_MS[np.abs(interval[:, None] - _USUAL_MS).argmin(axis=1)]
    interval = np.where(np.abs(interval - usual) <= _USUAL_WITHIN * usual, usual, np.maximum(interval, 1))
    since = timestamp_ms - timestamp_ms[:, :1]
    offset = (since + interval[:, None] // 2) % interval[:, None] - interval[:, None] // 2
    return interval, timestamp_ms[:, 0] + np.median(offset, axis=1).astype(np.int64)


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


_FAR = np.int64(1) << 40  # further apart than any two cells that a window could hold


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
    ahead = np.clip(cell - base, -_FAR, _FAR)  # relative to the newest cell before the batch
    # A running maximum per series: each series is lifted above the one before it, so that one accumulate serves all.
    lift = segment * (4 * _FAR)  # fits int64 for up to 2^21 series in one batch
    running = np.maximum(np.maximum.accumulate(ahead + lift) - lift, 0)
    before = np.zeros_like(running)
    before[1:] = running[:-1]
    before[start] = 0
    return Placed(order, cell, ahead - before, start)
