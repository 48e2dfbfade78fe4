"""Cells of series that wait: what has come for a cell is kept until it is complete, or as late as it may be.

A cell is closed, in order, when every feature has come and all cells before it are closed, or when a cell comes that
lies more than the lateness ahead. So what a cell holds when it is closed, and the order of the closings, are the same
for every order of arrival within the lateness.
"""

from __future__ import annotations

import numpy as np

from models.arrays import grown
from stream.columns import BoolArray, Columns, Float64Array, Int32Array, Int64Array
from stream.grid import NO_CELL
from stream.placing import Cells


class Waiting:
    """The open cells of S series of F features, rings of `room` cells.

    Attributes:
        closed: the newest cell that was closed, (S,) int64; NO_CELL before the first.
        newest: the newest cell that something has come for, (S,) int64.
        cell: the cell that each place of the ring holds, (S, R) int64; NO_CELL for an empty one.
        time_ms: latest event time of what came for it, (S, R) int64.
        value: (S, R, F) float64, NaN where nothing came.
        repeats: values that took the place of another one in an open cell, so far.
    """

    # With the value of a fresh row.
    _ARRAYS = (("closed", NO_CELL), ("newest", NO_CELL), ("cell", NO_CELL), ("time_ms", 0), ("value", np.nan))

    def __init__(self, window: int, features: int) -> None:
        self.room = window // 2 + 1  # a lateness is less than half a window
        self.features = features
        self.closed: Int64Array = np.zeros(0, np.int64)
        self.newest: Int64Array = np.zeros(0, np.int64)
        self.cell: Int64Array = np.zeros((0, self.room), np.int64)
        self.time_ms: Int64Array = np.zeros((0, self.room), np.int64)
        self.value: Float64Array = np.zeros((0, self.room, features))
        self.repeats = 0

    def resize(self, capacity: int) -> None:
        """Give room to `capacity` series; those that are there keep their rows."""
        for name, fresh in self._ARRAYS:
            setattr(self, name, grown(getattr(self, name), capacity, fresh))

    def reset(self, slot: Int64Array) -> None:
        """Make the cells of these rows empty."""
        for name, fresh in self._ARRAYS:
            getattr(self, name)[slot] = fresh

    def accept(self, points: Columns, cell: Int64Array, lateness: Int64Array) -> Cells:
        """Take points in, in the order of their arrival within each series; return what is ready to be stepped.

        Args:
            points: with the rows of these series as slots.
            cell: where each lies, (N,).
            lateness: for how many cells its series waits, (N,).

        Returns:
            cells that were closed, and late values for cells that were closed before, in order within each series.
        """
        order = np.argsort(points.slot, kind="stable")
        points, cell, lateness = points.take(order), cell[order], lateness[order]
        new_series = np.r_[True, points.slot[1:] != points.slot[:-1]]
        new_record = new_series | np.r_[
            True, (points.row[1:] != points.row[:-1]) | (points.timestamp_ms[1:] != points.timestamp_ms[:-1])
        ]  # fmt: skip
        record = np.cumsum(new_record) - 1  # of each point
        head = np.flatnonzero(new_record)
        position = np.arange(len(head))
        turn = position - np.maximum.accumulate(
            np.where(new_series[head], position, 0)
        )  # the how manieth of its series
        by_turn = np.argsort(turn[record], kind="stable")
        ends = np.cumsum(np.bincount(turn[record]))
        ready: list[Cells] = []
        begin = 0
        for end in ends.tolist():
            which = by_turn[begin:end]
            self._take(points.take(which), cell[which], lateness[which], ready)
            begin = end
        return _joined(ready, self.features)

    def _take(self, points: Columns, cell: Int64Array, lateness: Int64Array, ready: list[Cells]) -> None:
        """Take one record of each of several series in."""
        first = np.flatnonzero(np.r_[True, points.slot[1:] != points.slot[:-1]])
        record = np.cumsum(np.r_[True, points.slot[1:] != points.slot[:-1]]) - 1
        slot, at, row, time = points.slot[first], cell[first], points.row[first], points.timestamp_ms[first]
        value = np.full((len(first), self.features), np.nan)
        value[record, points.feature] = points.value
        self.repeats += len(points) - int((~np.isnan(value)).sum())

        late = at <= self.closed[slot]
        if late.any():
            ready.append(Cells(slot[late], at[late], time[late], value[late], row[late]))
            go_on = ~late
            slot, at, row, time, value = slot[go_on], at[go_on], row[go_on], time[go_on], value[go_on]
            first = first[go_on]
            if not len(slot):
                return
        self.newest[slot] = np.maximum(self.newest[slot], at)
        overdue = self.newest[slot] - lateness[first]
        while (due := self._oldest(slot) < overdue).any():
            self._close(slot[due], self._oldest(slot[due]), row[due], ready)
        passed = at < overdue  # a cell of a gap that has been waited for long enough
        if passed.any():
            ready.append(Cells(slot[passed], at[passed], time[passed], value[passed], row[passed]))
            self.closed[slot[passed]] = at[passed]
        self._open(slot[~passed], at[~passed], time[~passed], value[~passed])
        while (due := self._complete(slot)).any():
            slot, row = slot[due], row[due]
            self._close(slot, self.closed[slot] + 1, row, ready)

    def _open(self, slot: Int32Array, cell: Int64Array, time_ms: Int64Array, value: Float64Array) -> None:
        """Keep what has come for cells that are open."""
        place = cell % self.room
        fresh = self.cell[slot, place] != cell
        self.cell[slot, place] = cell
        self.value[slot[fresh], place[fresh]] = np.nan
        before = self.value[slot, place]
        self.repeats += int((~np.isnan(before) & ~np.isnan(value)).sum())
        self.time_ms[slot, place] = np.where(fresh, time_ms, np.maximum(self.time_ms[slot, place], time_ms))
        self.value[slot, place] = np.where(np.isnan(value), before, value)

    def _oldest(self, slot: Int32Array) -> Int64Array:
        """Return the oldest open cell of each series, a very late one if it has none."""
        cell = self.cell[slot]
        oldest: Int64Array = np.where(cell == NO_CELL, -NO_CELL, cell).min(axis=1)
        return oldest

    def _complete(self, slot: Int32Array) -> BoolArray:
        """Say of each series whether the cell after the closed ones has all its features."""
        next_cell = self.closed[slot] + 1
        place = next_cell % self.room
        here = (self.cell[slot, place] == next_cell) & (self.closed[slot] != NO_CELL)
        complete: BoolArray = here & ~np.isnan(self.value[slot, place]).any(axis=1)
        return complete

    def _close(self, slot: Int32Array, cell: Int64Array, row: Int64Array, ready: list[Cells]) -> None:
        place = cell % self.room
        ready.append(Cells(slot, cell, self.time_ms[slot, place], self.value[slot, place], row))
        self.cell[slot, place] = NO_CELL
        self.closed[slot] = cell

    # -- state ----------------------------------------------------------------------------------------------------

    def open_points(self, slot: int) -> Columns:
        """Return what is kept for the open cells of a series as points, oldest first."""
        places = np.flatnonzero(self.cell[slot] != NO_CELL)
        places = places[np.argsort(self.cell[slot, places])]
        at, feature = np.nonzero(~np.isnan(self.value[slot, places]))
        time, value = self.time_ms[slot, places][at], self.value[slot, places][at, feature]
        return Columns.of(np.full(len(at), slot), time, value, np.full(len(at), -1), feature)

    def restore(self, slot: int, closed: int, points: Columns, cell: Int64Array) -> None:
        """Set a series to what `open_points` gave, (N,) cells of the points with it."""
        self.closed[slot] = closed
        self.newest[slot] = max(closed, int(cell.max(initial=NO_CELL)))
        self.cell[slot] = NO_CELL
        self.value[slot] = np.nan
        self.cell[slot, cell % self.room] = cell
        self.time_ms[slot, cell % self.room] = points.timestamp_ms
        self.value[slot, cell % self.room, points.feature] = points.value


def _joined(ready: list[Cells], features: int) -> Cells:
    if not ready:
        none = np.zeros(0, np.int64)
        return Cells(none.astype(np.int32), none, none, np.zeros((0, features)), none)
    parts = (np.concatenate([getattr(one, name) for one in ready]) for name in Cells.__dataclass_fields__)
    return Cells(*parts)
