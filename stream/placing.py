"""From points to cells: the grid of each series, and the points that are held until it is known.

A series probes until its interval is known: its points are held, and released once enough of them have come. A series
whose interval was inferred probes again when its points keep missing the next cell, for its interval may have changed;
the grid it had is given up only if the new points are regular on another.

Immediate series (KPIs) need `grid.PROBE_POINTS` distinct timestamps in any order. Waiting series (entities, KPIs that
are told to) need that the earliest ones can no longer change, which is when they lie more than the lateness behind: so
the order of arrival within the lateness makes no difference. They keep the interval that they began with.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from models.arrays import grown
from stream import grid
from stream.columns import BoolArray, Columns, Float64Array, Int8Array, Int32Array, Int64Array
from stream.policy import PolicyTable

NO_PHASE = np.iinfo(np.int64).min
_MISFIT = 2  # a point that does not fall into the next cell counts so much against the grid, one that does 1 for it
_PATIENCE = 16  # misfit at which a series probes again, twice as much after each time that was in vain …
_ALIKE_WITHIN = 0.1  # of the new interval: the old one is another, and steps are one interval long …
_REGULAR_MIN = 5  # … of which there must be so many among the seven of a probe
_BACKOFF_MAX = 8  # … up to so many times


@dataclass(frozen=True, slots=True)
class Cells:
    """Cells that something has come for, in the order in which they are to be gone through within each series.

    Attributes:
        slot: the series, (N,) int32.
        cell: (N,) int64.
        timestamp_ms: event time of what came, (N,) int64.
        value: (N, F) float64, NaN where nothing came.
        row: the record that caused it, (N,) int64.
    """

    slot: Int32Array
    cell: Int64Array
    timestamp_ms: Int64Array
    value: Float64Array
    row: Int64Array


@dataclass(frozen=True, slots=True)
class GridChange:
    """From this record on a series has this interval, before it that one; 0: none for the time being. (N,) each."""

    slot: Int32Array
    row: Int64Array
    interval_ms: Int64Array
    before_ms: Int64Array


class Placing:
    """The grids of S series, structure of arrays.

    Attributes:
        interval_ms: grid step, (S,) int64; 0 while it is not known.
        phase_ms: time of cell 0, (S,) int64.
        misfit: how badly the last points fit, (S,) int32; `backoff` how often it was found to be nothing, (S,) uint8.
        probing: points are held, (S,) bool.
        waiting: see above, (S,) bool.
        rule: row of the policy table, (S,) int32.
        held: points of probing series, in order of arrival; their rows are -1, they mean nothing in another batch.
        changes: what happened to grids since `begin_batch`.
        repeats: points that were held and came once more; the last one stays.
    """

    ARRAYS = ("interval_ms", "phase_ms", "misfit", "backoff", "probing")

    def __init__(self, table: PolicyTable) -> None:
        self.table = table
        self.interval_ms: Int64Array = np.zeros(0, np.int64)
        self.phase_ms: Int64Array = np.zeros(0, np.int64)
        self.misfit: Int32Array = np.zeros(0, np.int32)
        self.backoff: Int8Array = np.zeros(0, np.uint8)
        self.probing: BoolArray = np.zeros(0, np.bool_)
        self.waiting: BoolArray = np.zeros(0, np.bool_)
        self.rule: Int32Array = np.zeros(0, np.int32)
        self.held = Columns.empty()
        self.changes: list[GridChange] = []
        self.repeats = 0

    def resize(self, capacity: int) -> None:
        """Give room to `capacity` series; those that are there keep their rows."""
        for name in (*self.ARRAYS, "waiting", "rule"):
            setattr(self, name, grown(getattr(self, name), capacity, NO_PHASE if name == "phase_ms" else 0))

    def add(self, slot: int, rule: int, waiting: bool) -> None:
        """Set a series up under a rule."""
        self.rule[slot], self.waiting[slot] = rule, waiting
        self.interval_ms[slot] = self.table.interval_ms[rule]
        # A configured grid goes through the first point, which of a waiting series is not the first to arrive.
        self.probing[slot] = waiting or not self.interval_ms[slot]

    def reset(self, slot: Int64Array) -> None:
        """Make these rows free; what was held of their series is forgotten."""
        for name in (*self.ARRAYS, "waiting", "rule"):
            getattr(self, name)[slot] = NO_PHASE if name == "phase_ms" else 0
        if len(self.held):
            self.held = self.held.take(~np.isin(self.held.slot, slot))

    def begin_batch(self) -> None:
        """Forget the changes of the batch before."""
        self.changes = []

    def lateness_cells(self, slot: Int32Array, window: int) -> Int64Array:
        """Return for how many cells a series welcomes late points, (K,): less than half a window."""
        interval = np.maximum(self.interval_ms[slot], 1)
        return np.minimum(self.table.lateness_ms[self.rule[slot]] // interval, window // 2 - 1)

    # -- probing --------------------------------------------------------------------------------------------------

    def release(self, points: Columns) -> tuple[Columns, Int32Array]:
        """Hold the points of probing series back; return those that can be placed, and series whose grid is another.

        The points of each series stay in order.
        """
        regridded = np.zeros(0, np.int32)
        hold = self.probing[points.slot]
        if hold.any():
            free, points = points.take(~hold), points.take(hold)
            wait = self.waiting[points.slot]
            parts = [free]
            if wait.any():
                parts.append(self._probe_waiting(points.take(wait)))
            if not wait.all():
                released, regridded = self._probe(points.take(~wait))
                parts.append(released)
            points = Columns.concatenate(parts)
        fresh = self.phase_ms[points.slot] == NO_PHASE
        if fresh.any():  # a configured interval: the grid goes through the first point
            first = np.unique(points.slot[fresh], return_index=True)
            at = np.flatnonzero(fresh)[first[1]]
            self.phase_ms[first[0]] = points.timestamp_ms[at] % self.interval_ms[first[0]]
        return points, regridded

    def _probe(self, points: Columns) -> tuple[Columns, Int32Array]:
        own = self.waiting[self.held.slot]
        held = Columns.concatenate([self.held.take(~own), points])
        by_slot = np.argsort(held.slot, kind="stable")
        held = held.take(by_slot)  # by series, each in the order of arrival
        start = np.flatnonzero(np.r_[True, held.slot[1:] != held.slot[:-1]])
        length = np.diff(np.r_[start, len(held)])

        # The P-th distinct timestamp to arrive decides: up to it the points are the probe, behind it they go on.
        new = np.zeros(len(held), np.bool_)
        new[_first_of_each(held)] = True
        distinct = np.cumsum(new)
        distinct = distinct - np.repeat(distinct[start] - 1, length)
        in_probe = (distinct < grid.PROBE_POINTS) | (new & (distinct == grid.PROBE_POINTS))
        decided = np.repeat(distinct[start + length - 1] >= grid.PROBE_POINTS, length)

        probe = held.take(in_probe)
        last = _first_of_each(probe, last=True)  # of equal timestamps the last one to arrive stays
        self.repeats += len(probe) - len(last)
        probe, decided_probe = probe.take(last), decided[in_probe][last]  # now by series and time
        kept = probe.take(~decided_probe)
        kept.row[:] = -1
        self.held = Columns.concatenate([self.held.take(own), kept])
        probe = probe.take(decided_probe)
        regridded = np.zeros(0, np.int32)
        if len(probe):
            times = probe.timestamp_ms.reshape(-1, grid.PROBE_POINTS)  # (K, P)
            # What they cause is caused by the record that completed the probe.
            completing = probe.row.reshape(-1, grid.PROBE_POINTS).max(axis=1)
            regridded = self._decide(probe.slot[:: grid.PROBE_POINTS], times, completing)
            probe.row[:] = np.repeat(completing, grid.PROBE_POINTS)
        return Columns.concatenate([probe, held.take(decided & ~in_probe)]), regridded

    def _decide(self, slots: Int32Array, times: Int64Array, row: Int64Array) -> Int32Array:
        """Set the grids of series whose probe is complete, times (K, P); return those that had another one before."""
        interval, phase = grid.infer_interval(times)
        before = self.interval_ms[slots]
        again = before > 0
        # An irregular series fits no grid, and is none the better for another.
        regular = np.abs(np.diff(times, axis=1) - interval[:, None]) <= _ALIKE_WITHIN * interval[:, None]
        other = ~again | (
            (regular.sum(axis=1) >= _REGULAR_MIN) & (np.abs(interval - before) > _ALIKE_WITHIN * interval)
        )
        self.interval_ms[slots[other]], self.phase_ms[slots[other]] = interval[other], phase[other]
        self.misfit[slots] = 0
        self.backoff[slots] = np.where(other, 0, np.minimum(self.backoff[slots] + 1, _BACKOFF_MAX))
        self.probing[slots] = False
        self.changes.append(GridChange(slots, row, self.interval_ms[slots], np.zeros(len(slots), np.int64)))
        changed: Int32Array = slots[again & other]
        return changed

    def _probe_waiting(self, points: Columns) -> Columns:
        """Hold points of waiting series; release those of which the earliest can no longer change."""
        held = Columns.concatenate([self.held, points])
        mine = np.zeros(len(self.waiting), np.bool_)
        mine[points.slot] = True
        ours = mine[held.slot]
        parts, kept = [], [held.take(~ours)]
        held = held.take(ours)
        for slot in np.unique(points.slot).tolist():  # once in the life of a series, or so
            own = held.take(held.slot == slot)
            need = 1 if self.interval_ms[slot] else grid.PROBE_POINTS
            lateness_ms = int(self.table.lateness_ms[self.rule[slot]])
            until = _settled_after(own.timestamp_ms, need, lateness_ms)
            if until is None:
                own = self._without_repeats(own)
                own.row[:] = -1
                kept.append(own)
                continue
            until = int(np.flatnonzero(own.row == own.row[until - 1])[-1]) + 1  # all that the record brought
            first = self._without_repeats(own.take(np.arange(until)))
            times = np.unique(first.timestamp_ms)[:need]
            row = int(first.row[-1])
            if self.interval_ms[slot]:
                self.phase_ms[slot] = times[0] % self.interval_ms[slot]
            else:
                interval, phase = grid.infer_interval(times[None])
                self.interval_ms[slot], self.phase_ms[slot] = interval[0], phase[0]
            self.probing[slot] = False
            one = np.array([slot], np.int32)
            self.changes.append(GridChange(one, np.array([row]), self.interval_ms[one], np.zeros(1, np.int64)))
            first.row[:] = row
            in_probe = first.timestamp_ms <= times[-1]
            early = np.flatnonzero(in_probe)
            early = early[np.argsort(first.timestamp_ms[early], kind="stable")]
            parts += [first.take(early), first.take(~in_probe), own.take(np.arange(until, len(own)))]
        self.held = Columns.concatenate(kept)
        return Columns.concatenate(parts) if parts else Columns.empty()

    def _without_repeats(self, points: Columns) -> Columns:
        """Return the points of one series without those that came once more later, in order of arrival."""
        latest = np.unique(np.stack([points.timestamp_ms, points.feature])[:, ::-1], axis=1, return_index=True)[1]
        self.repeats += len(points) - len(latest)
        return points.take(np.sort(len(points) - 1 - latest))

    # -- placing --------------------------------------------------------------------------------------------------

    def _cell(self, timestamp_ms: Int64Array, phase_ms: Int64Array, interval_ms: Int64Array) -> Int64Array:
        cell: Int64Array = (timestamp_ms - phase_ms + interval_ms // 2) // interval_ms
        return cell

    def cell(self, slot: Int32Array, timestamp_ms: Int64Array) -> Int64Array:
        """Return the cells of points, (N,)."""
        return self._cell(timestamp_ms, self.phase_ms[slot], self.interval_ms[slot])

    def time_ms(self, slot: Int32Array, cell: Int64Array) -> Int64Array:
        """Return the times of cells, (N,)."""
        time: Int64Array = self.phase_ms[slot] + cell * self.interval_ms[slot]
        return time

    def watch_fit(self, placed: grid.Placed, slot: Int32Array, row: Int64Array) -> BoolArray:
        """Note how well points fit their grids; say which come after the one that makes their series probe again.

        Args:
            placed: the points, as `grid.place` has laid them out.
            slot: the series of each, (N,), in that order.
            row: the record of each, (N,).

        Returns:
            (N,) bool in the same order: those points are to be held.
        """
        after = np.zeros(len(slot), np.bool_)
        inferred = (self.table.interval_ms[self.rule[slot]] == 0) & ~self.waiting[slot]
        odd = inferred & ((placed.lead != 1) | (self.misfit[slot] > 0))
        if not odd.any():
            return after
        concerned = np.zeros(len(self.misfit), np.bool_)
        concerned[slot[odd]] = True
        which = np.flatnonzero(concerned[slot])
        slot, row = slot[which], row[which]
        delta = np.where(placed.lead[which] == 1, -1, _MISFIT)
        start = np.r_[True, slot[1:] != slot[:-1]]
        first = np.flatnonzero(start)
        segment = np.cumsum(start) - 1
        total = np.cumsum(delta)
        count = total - (total[first] - delta[first])[segment] + self.misfit[slot]
        # A running minimum per series: each lies below all before it, so that one accumulate serves all.
        lift = (segment + 1) * (2 * int(np.abs(count).max()) + 2)
        lowest = np.minimum.accumulate(count - lift) + lift
        misfit = count - np.minimum(lowest, 0)  # never below 0
        enough = misfit >= _PATIENCE * 2 ** self.backoff[slot].astype(np.int64)
        last = np.r_[first[1:], len(slot)] - 1
        self.misfit[slot[last]] = misfit[last]
        if enough.any():
            seen = np.cumsum(enough)
            earlier = seen - enough - (seen[first] - enough[first])[segment]  # points before it that were enough
            trigger = np.flatnonzero(enough & (earlier == 0))
            self.probing[slot[trigger]] = True
            self.misfit[slot[trigger]] = 0
            before = self.interval_ms[slot[trigger]]
            self.changes.append(GridChange(slot[trigger], row[trigger], np.zeros(len(trigger), np.int64), before))
            after[which] = earlier > 0
        return after


def _settled_after(timestamp_ms: Int64Array, need: int, lateness_ms: int) -> int | None:
    """Return after how many points the `need` earliest timestamps lie more than the lateness behind the newest one."""

    def settled(count: int) -> bool:
        distinct = np.unique(timestamp_ms[:count])
        return len(distinct) >= need and bool(distinct[-1] - distinct[need - 1] > lateness_ms)

    low, high = need, len(timestamp_ms)
    if high < need or not settled(high):
        return None
    while low < high:  # once settled, always settled: the newest only rises, the earliest only fall
        middle = (low + high) // 2
        low, high = (low, middle) if settled(middle) else (middle + 1, high)
    return low


def _first_of_each(points: Columns, *, last: bool = False) -> Int64Array:
    """Return, by series and time, the index of the first (or last) point to arrive of each timestamp."""
    if not len(points):
        return np.zeros(0, np.int64)
    order = np.lexsort((points.timestamp_ms, points.slot))  # stable: equal ones stay in the order of arrival
    slot, time = points.slot[order], points.timestamp_ms[order]
    differs = (slot[1:] != slot[:-1]) | (time[1:] != time[:-1])
    return order[np.r_[differs, True] if last else np.r_[True, differs]]
