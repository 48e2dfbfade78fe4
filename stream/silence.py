"""Silence: which series have stopped sending, by event time and by the clock on the wall.

A series that is `span_ms` behind falls silent; its next newer point that is not as far behind resumes it.

    event time    the newest event time of all series (the watermark) has passed its newest point by more than the span
    wall clock    the time at hand has passed the arrival of its newest record by more than the span

What event time changes follows from the order of the points alone, however they were cut into batches. A series that
keeps lagging more than the span behind the others stays silent, instead of resuming and falling silent with each point.

No loop over points: between two newer points of its own a series has one deadline, and the watermark only rises, so a
binary search finds the point that crosses it. Measured on one core of a shared machine, 10,000 points of 10,000 series:
0.2 ms when nothing happens, 3 ms when every series falls silent and resumes.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from models.arrays import grown
from stream.columns import BoolArray, Int8Array, Int32Array, Int64Array

NEVER = -1


class Kind(IntEnum):
    """What has become of a series."""

    SILENT = 1
    RESUMED = 2


@dataclass(frozen=True, slots=True)
class Changes:
    """M changes in the order in which they came about.

    Attributes:
        kind: `Kind`, (M,) uint8.
        slot: the series, (M,) int32.
        row: the record that caused it, (M,) int64; -1 the clock did.
        last_ms: newest event time of the series before the change, (M,) int64.
        time_ms: when it came about, (M,) int64: the deadline that has passed, or the event time that resumed it.
        span_ms: of the series, (M,) int64.
    """

    kind: Int8Array
    slot: Int32Array
    row: Int64Array
    last_ms: Int64Array
    time_ms: Int64Array
    span_ms: Int64Array

    def __len__(self) -> int:
        return len(self.slot)


class Silence:
    """What is known of the silence of each of S series, structure of arrays.

    Attributes:
        last_ms: newest event time, (S,) int64; NEVER without a point.
        arrived_ms: when the newest record arrived, ms since 1970 UTC, (S,) int64; -1 unknown.
        span_ms: how long a series may send nothing after its newest point, (S,) int64; 0 for ever.
        silent: (S,) bool.
    """

    ARRAYS = ("last_ms", "arrived_ms", "span_ms", "silent")

    def __init__(self, capacity: int = 0) -> None:
        self.last_ms: Int64Array = np.zeros(0, np.int64)
        self.arrived_ms: Int64Array = np.zeros(0, np.int64)
        self.span_ms: Int64Array = np.zeros(0, np.int64)
        self.silent: BoolArray = np.zeros(0, np.bool_)
        self.resize(capacity)

    def resize(self, capacity: int) -> None:
        """Give room to `capacity` series; those that are there keep their rows."""
        for name in self.ARRAYS:
            fresh = NEVER if name in ("last_ms", "arrived_ms") else 0
            setattr(self, name, grown(getattr(self, name), capacity, fresh))

    def reset(self, slot: Int64Array) -> None:
        """Make these rows those of series that have sent nothing yet."""
        for name in self.ARRAYS:
            getattr(self, name)[slot] = NEVER if name in ("last_ms", "arrived_ms") else 0

    @property
    def watermark_ms(self) -> int:
        """The newest event time over all series; NEVER without a point."""
        return int(self.last_ms.max(initial=NEVER))

    def accept(
        self,
        slot: Int32Array,
        timestamp_ms: Int64Array,
        arrived_ms: Int64Array,
        row: Int64Array,
        span_ms: Int64Array,
    ) -> Changes:
        """Take the points of a batch; return what they changed, as if they had come one by one.

        A point of X is taken in this order: X falls silent if the point lies beyond its deadline; X resumes if it is
        silent, the point is newer than all before, and not more than the span behind the watermark; then each other
        series whose deadline the watermark has passed falls silent, by slot. A point that is not newer changes nothing
        for its own series but the span.

        Args:
            slot: the series of each point, (N,), in the order of arrival.
            timestamp_ms: event time, (N,).
            arrived_ms: when its record arrived, (N,); -1 unknown.
            row: its record, (N,), handed through to what it caused.
            span_ms: how long its series may send nothing from this point on, (N,); 0 for ever.
        """
        if not len(slot):
            return _NOTHING
        concerned = self._concerned(slot, timestamp_ms, span_ms)
        changes = self._changes(slot, timestamp_ms, row, span_ms, concerned) if concerned.any() else _NOTHING
        np.maximum.at(self.last_ms, slot, timestamp_ms)
        np.maximum.at(self.arrived_ms, slot, arrived_ms)
        self.span_ms[slot] = span_ms  # of equal slots the last one stays
        return changes

    def fallen(self, slot: int, row: int) -> Changes:
        """Return that a series has fallen silent, by a record that passes its deadline."""
        last, span = self.last_ms[slot], self.span_ms[slot]
        one = (np.array([value], np.int64) for value in (row, last, last + span, span))
        return Changes(np.full(1, Kind.SILENT, np.uint8), np.array([slot], np.int32), *one)

    def clock(self, now_ms: int) -> Changes:
        """Return the series that fall silent by the clock on the wall, by deadline and slot."""
        deadline = self.arrived_ms + self.span_ms
        fallen = np.flatnonzero(self._awaited() & (deadline < now_ms))
        fallen = fallen[np.argsort(deadline[fallen], kind="stable")]
        self.silent[fallen] = True
        return Changes(
            np.full(len(fallen), Kind.SILENT, np.uint8),
            fallen.astype(np.int32),
            np.full(len(fallen), -1, np.int64),
            self.last_ms[fallen],
            deadline[fallen],
            self.span_ms[fallen],
        )

    def next_deadline_ms(self) -> int | None:
        """Return the earliest time of the wall past which `clock` finds something; None: it will find nothing."""
        awaited = self._awaited()
        return int((self.arrived_ms[awaited] + self.span_ms[awaited]).min()) if awaited.any() else None

    def _awaited(self) -> BoolArray:
        return (self.span_ms > 0) & (self.arrived_ms >= 0) & ~self.silent

    def _concerned(self, slot: Int32Array, timestamp_ms: Int64Array, span_ms: Int64Array) -> BoolArray:
        """Return the series for which the batch may change something, (S,) bool: it passes a deadline of theirs."""
        watermark = max(self.watermark_ms, int(timestamp_ms.max()))
        concerned = (self.last_ms + self.span_ms < watermark) & (self.span_ms > 0) & (self.last_ms >= 0) & ~self.silent
        passed = (span_ms > 0) & (timestamp_ms + span_ms < watermark)
        concerned[slot[passed | self.silent[slot]]] = True
        return concerned

    def _changes(
        self,
        slot: Int32Array,
        timestamp_ms: Int64Array,
        row: Int64Array,
        span_ms: Int64Array,
        concerned: BoolArray,
    ) -> Changes:
        """Return what the points change for the series `concerned`, and leave in `silent` how it ends.

        A stretch is the life of a series from one newer point of its own to the next, or to a point that changes its
        span; the first one begins before the batch. It has one deadline, and at most one fall into silence.
        """
        n = len(slot)
        watermark = np.maximum(np.maximum.accumulate(timestamp_ms), self.watermark_ms)  # after each point

        series = np.flatnonzero(concerned)
        own = np.flatnonzero(concerned[slot])
        whose = np.concatenate([series, slot[own]])
        begin = np.concatenate([np.full(len(series), -1), own])
        last_ms = np.concatenate([self.last_ms[series], timestamp_ms[own]])
        span = np.concatenate([self.span_ms[series], span_ms[own]])
        order = np.argsort(whose, kind="stable")
        whose, begin, last_ms, span = whose[order], begin[order], last_ms[order], span[order]
        # A running maximum per series: each is lifted above the one before it, so that one accumulate serves all.
        # Ranks, not times, are lifted: the product of a far time and many series need not fit.
        times, rank = np.unique(last_ms, return_inverse=True)
        lift = np.cumsum(begin < 0) * len(times)
        highest = np.maximum.accumulate(rank + lift)
        newer = np.diff(highest, prepend=-1) > 0  # the first of each series too
        last_ms = times[highest - lift]
        stretch = np.flatnonzero(newer | (np.diff(span, prepend=-1) != 0))
        whose, begin, last_ms, span, newer = (x[stretch] for x in (whose, begin, last_ms, span, newer))  # (M,)
        first = begin < 0
        end = np.append(np.where(first[1:], n, begin[1:]), n)  # the point that ends it, or n
        ends = end < n
        next_newer = np.append(newer[1:], False) & ends
        next_ms = timestamp_ms[np.minimum(end, n - 1)]

        deadline = last_ms + span
        awaited = (span > 0) & (last_ms >= 0)
        at = np.maximum(begin + 1, np.searchsorted(watermark, deadline, side="right"))
        # Only a point of another series makes it fall. (Its own crosses no deadline unless it is newer, but after a
        # newer point that is far behind the watermark older ones of its own may follow.)
        foreign = np.append(np.flatnonzero(slot[1:] != slot[:-1]) + 1, n)  # where the series changes
        mine = np.flatnonzero(awaited & (at < end))
        mine = mine[slot[at[mine]] == whose[mine]]
        at[mine] = foreign[np.searchsorted(foreign, at[mine], side="right")]
        falls = awaited & (at < end)
        shown = awaited & ~falls & next_newer & (next_ms > deadline)  # silent all along, as its own next point shows

        # Silence goes on into the next stretch unless that begins with a newer point that is up with the others.
        lags = ~first & (~newer | ((span > 0) & (deadline < watermark[np.maximum(begin, 0)])))
        enters = np.where(first, self.silent[whose], lags & np.append(False, (falls | shown)[:-1]))
        known = np.maximum.accumulate(np.where(enters | ~lags, np.arange(len(begin)), 0))
        silent = enters[known]  # from the beginning of the stretch on
        falls, shown = falls & ~silent, shown & ~silent
        over = next_newer & ~np.append(lags[1:], False)
        resumes = over & (silent | falls | shown)
        closing = ~ends
        self.silent[whose[closing]] = (silent | falls)[closing]

        which = np.concatenate([np.flatnonzero(part) for part in (shown, resumes, falls)])
        turn = np.repeat([0, 1, 2], [shown.sum(), resumes.sum(), falls.sum()])
        point = np.where(turn == 2, at[which], end[which])
        order = np.lexsort((whose[which], turn, point))
        which, turn, point = which[order], turn[order], point[order]
        return Changes(
            np.where(turn == 1, Kind.RESUMED, Kind.SILENT).astype(np.uint8),
            whose[which].astype(np.int32),
            row[point],
            last_ms[which],
            np.where(turn == 1, next_ms[which], deadline[which]),
            span[which],
        )


_NOTHING = Changes(np.zeros(0, np.uint8), np.zeros(0, np.int32), *(np.zeros(0, np.int64) for _ in range(4)))
