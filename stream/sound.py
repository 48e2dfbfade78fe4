"""Whether restored state can be that of a series: a checksum says that bytes are as somebody wrote them, no more.

What is let through here can be gone on with: no time is beyond the years that a point may be of, no number is one that
arithmetic cannot take, no count is larger than what it counts. Values within these bounds are believed.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from stream.columns import AnyArray, BoolArray, Float32Array, Int64Array
from stream.incidents import Severity, State
from stream.records import TIMESTAMP_MAX_MS
from stream.windows import STEPS_MAX
from stream.withheld import padded, unpacked

_INTERVAL_MAX_MS = 400 * 86_400_000
_LAST_MS = TIMESTAMP_MAX_MS + _INTERVAL_MAX_MS  # the cell of a point may begin a little later
_ARRIVED_MAX_MS = 2**60
_BACKOFF_MAX = 8
_FLOAT_MAX = 1e37  # of float32, with room for a sum of two
_FLOAT32_MAX = float(np.finfo(np.float32).max)
_NO_PHASE = np.iinfo(np.int64).min
_NO_CELL = -(2**62)


def sound(rows: AnyArray, window: int) -> BoolArray:
    """Say of each record of a window of so many cells whether it can be that of a series, (K,)."""
    placed = rows["phase_ms"] != _NO_PHASE
    interval, phase = rows["interval_ms"], np.where(placed, rows["phase_ms"], 0)
    good = (interval >= 0) & (interval <= _INTERVAL_MAX_MS) & (np.abs(phase) <= _LAST_MS) & (phase != _NO_PHASE)
    good &= (interval > 0) | ~placed
    good &= rows["backoff"] <= _BACKOFF_MAX
    good &= (rows["heard_ms"] >= 0) & (rows["heard_ms"] <= TIMESTAMP_MAX_MS)
    good &= (rows["arrived_ms"] >= -1) & (rows["arrived_ms"] <= _ARRIVED_MAX_MS)
    good &= _window(rows, window) & _cells(rows["newest"], rows["filled"] > 0, phase, interval)
    good &= (rows["filled"] == 0) | placed
    for name in ("first_score_ms", "opened_ms", "last_ms", "peak_ms", "resolved_ms"):
        good &= (rows[name] >= -1) & (rows[name] <= _LAST_MS)
    good &= _finite(rows["shift"]) & (rows["state"] <= State.OPEN) & (rows["severity"] <= Severity.CRITICAL)
    good &= (rows["state"] == State.CLEAR) | (rows["severity"] > 0)
    for name in ("normal_run", "anomalous_run", "anomalies"):
        good &= (rows[name] >= 0) & (rows[name] < 2**31 - 2**20)
    good &= (rows["peak_ratio"] >= 0) & _finite(rows["peak_ratio"][:, None])
    # The threshold's own fields are looked at by itself; here what its owner relies on: its scores are float32.
    for name in ("t", "z", "scale", "mean"):
        field = rows["threshold"][name]
        good &= (np.abs(field) <= _FLOAT32_MAX) | (field == np.inf)
    good &= _finite(rows["peak_value"][:, None]) | np.isnan(rows["peak_value"])
    result: BoolArray = good
    return result


def _window(rows: AnyArray, window: int) -> BoolArray:
    good = (rows["filled"] <= window) & (rows["steps"] <= STEPS_MAX).all(axis=1)
    good &= _finite(rows["origin"]) & _finite(rows["step_mean"]) & (rows["step_mean"] >= 0).all(axis=1)
    good &= _finite(rows["seen"]) & ~padded(rows["learned_bits"], window)
    result: BoolArray = good
    return result


def sound_withheld(rows: AnyArray, rings: Float32Array, window: int) -> BoolArray:
    """Say whether this, (K, W, F), can be what is withheld of series: of cells that they hold and have not learned."""
    there = ~np.isnan(rings)
    learned = unpacked(rows["learned_bits"], window).swapaxes(1, 2)
    behind = ((rows["newest"] % window)[:, None] - np.arange(window)) % window
    inside = behind < rows["filled"][:, None]
    result: BoolArray = _finite(np.where(there, rings, 0)) & ~(there & (learned | ~inside[:, :, None])).any(axis=(1, 2))
    return result


def _cells(cell: Int64Array, which: BoolArray, phase_ms: Int64Array, interval_ms: Int64Array) -> BoolArray:
    """Say of cells whether their time is one; of those outside `which`, that they are numbers to reckon with."""
    time = phase_ms.astype(np.float64) + cell.astype(np.float64) * interval_ms
    sane = np.abs(cell.astype(np.float64)) < 2.0**60
    inside: BoolArray = np.where(which, (time >= -_INTERVAL_MAX_MS) & (time <= _LAST_MS), sane).astype(np.bool_)
    return inside


def _finite(values: AnyArray) -> BoolArray:
    with np.errstate(invalid="ignore"):
        inside = np.asarray(np.abs(values) <= _FLOAT_MAX)
    result: BoolArray = np.asarray(inside.all(axis=tuple(range(1, inside.ndim))))
    return result


def sound_points(points: Iterable[tuple[int, float, int]], features: int) -> bool:
    """Say whether these can be points of a series: event time, value, feature."""
    return all(0 <= t <= TIMESTAMP_MAX_MS and abs(x) <= _FLOAT_MAX and 0 <= f < features for t, x, f in points)


def sound_cells(cells: Iterable[int], row: AnyArray) -> bool:
    """Say whether these can be cells of the series of a record, or none."""
    some = np.array([cell for cell in cells if cell != _NO_CELL], np.int64)
    phase = np.full(len(some), row["phase_ms"] if row["phase_ms"] != _NO_PHASE else 0)
    return bool(_cells(some, np.ones(len(some), np.bool_), phase, np.full(len(some), row["interval_ms"])).all())
