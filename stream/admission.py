"""Places for new series: the bound on all of a detector's, the quotas of its rules, and which idle ones go for others.

Nothing is looked at before a bound is reached. Then a new series takes the place of the one that has been idle longest:

    idle       the newest event time of the partition, that of the new point included, lies further than `idle_ms`, and
               than the series' own span of silence, behind its newest point: that it is silent has been told
    never      goes a series with an incident that has been told and has not ended
    refused    is a point of a new series where none is idle, or which is as old as an idle one itself

All of this follows from the points and their order: where batches end, a restart, or a clock make no difference. It is
planned before the points are gone through, as nothing of a series changes unless a point of its own comes. Where one of
those does come in the same batch, the batch is cut before the record that asks for the place.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from stream.columns import BoolArray, Columns, Int32Array, Int64Array
from stream.policy import PolicyTable
from stream.records import Reason
from stream.silence import NEVER, Silence

_ALL = -1  # the scope of the bound on all series; else that of a rule
_FAR = 2**62


@dataclass(slots=True)
class Plan:
    """What to do with the first points of a batch.

    Attributes:
        end: so many of them are to be gone through now.
        admitted: slots that get a place before that.
        evicted: slots that lose theirs before that, each with the record that takes it.
        refused: points among them that are not to be gone through, with the reason of each.
    """

    end: int
    admitted: list[int] = field(default_factory=list)
    evicted: list[tuple[int, int]] = field(default_factory=list)
    refused: list[tuple[int, Reason]] = field(default_factory=list)


class _Cut(Exception):
    """What comes before this point has to be gone through first."""

    def __init__(self, at: int) -> None:
        self.at = at


class Admission:
    """Counts the series that have a place and plans for the others.

    Attributes:
        most: how many series there may be; 0: any number.
        of_rule: how many each rule has, (R,).
    """

    def __init__(self, most: int, idle_ms: int, table: PolicyTable) -> None:
        self.most = most
        self.idle_ms = idle_ms
        self.quota = table.series_max
        self.of_rule: Int64Array = np.zeros(len(self.quota), np.int64)

    def fits(self, rules: Int32Array) -> bool:
        """Say whether there is room for new series of these rules, (K,), without any other going."""
        if self.most and self.of_rule.sum() + len(rules) > self.most:
            return False
        after = self.of_rule + np.bincount(rules, minlength=len(self.of_rule))
        return not ((self.quota > 0) & (after > self.quota)).any()

    def count(self, rules: Int32Array, change: int) -> None:
        """Note that series of these rules, (K,), have got their places (+1), or lost them (-1)."""
        np.add.at(self.of_rule, rules, change)


@dataclass(slots=True)
class Series:
    """What a plan goes by, an array of slots each.

    Attributes:
        placed: has a place.
        opened: has an incident that was told, asked for with an array of slots.
    """

    names: Sequence[str]
    rule: Int32Array
    placed: BoolArray
    silence: Silence
    opened: Callable[[Int64Array], BoolArray]


def plan(admission: Admission, series: Series, points: Columns, time_ms: Int64Array) -> Plan:
    """Return what to do with the points, in order of arrival, of which at least one is of a series without a place.

    Args:
        admission: the bounds and the counts; not changed.
        series: as it is before the points.
        points: (N,) of series that a rule watches, with values.
        time_ms: the event time that counts of each, (N,).
    """
    fresh = np.flatnonzero(~series.placed[points.slot])
    new, first = np.unique(points.slot[fresh], return_index=True)
    if admission.fits(series.rule[new]):
        return Plan(len(points), points.slot[fresh[np.sort(first)]].tolist())
    return _Planner(admission, series, points, time_ms, fresh).plan()


class _Planner:
    """Goes through the points of series without a place, in order."""

    def __init__(
        self, admission: Admission, series: Series, points: Columns, time_ms: Int64Array, fresh: Int64Array
    ) -> None:
        self.series = series
        self.points = points
        self.time_ms = time_ms
        self.fresh = fresh
        self.idle_ms = admission.idle_ms
        self.most, self.quota = admission.most, admission.quota
        self.taken, self.of_rule = int(admission.of_rule.sum()), admission.of_rule.copy()
        self.start = np.searchsorted(points.row, points.row, side="left")  # of the record of each point
        # Both before the record of each point, by series that have their places; what is refused is not heard.
        placed = series.placed[points.slot]
        heard = np.r_[series.silence.watermark_ms, np.where(placed, time_ms, NEVER)]
        self.newest = np.maximum.accumulate(heard)[self.start]
        last = np.where(placed, np.maximum(series.silence.last_ms[points.slot], time_ms), _FAR)
        self.oldest = np.minimum.accumulate(np.r_[_FAR, last])[self.start]
        # The same of new series.
        self.newest_new, self.oldest_new = NEVER, _FAR
        self.record, self.newest_of_record = 0, NEVER
        slot, at = np.unique(points.slot, return_index=True)
        self.first = dict(zip(slot.tolist(), at.tolist(), strict=True))
        self.queues: dict[int, list[tuple[int, str, int]]] = {}
        self.gone: set[int] = set()
        self.out = Plan(len(points))

    def plan(self) -> Plan:
        admitted: set[int] = set()
        for i in self.fresh.tolist():
            if i >= self.out.end:
                break
            slot, time = int(self.points.slot[i]), int(self.time_ms[i])
            self._begin(int(self.start[i]))
            if slot in admitted:
                self.newest_of_record = max(self.newest_of_record, time)
                continue
            try:
                reason = self._decide(i, int(self.series.rule[slot]))
            except _Cut as cut:
                self.out.end = cut.at
                break
            if reason is not None:
                self.out.refused.append((i, reason))
                continue
            admitted.add(slot)
            self.out.admitted.append(slot)
            self.newest_of_record = max(self.newest_of_record, time)
            self.oldest_new = min(self.oldest_new, time)
            self.taken += 1
            self.of_rule[self.series.rule[slot]] += 1
        self.out.refused = [one for one in self.out.refused if one[0] < self.out.end]
        return self.out

    def _begin(self, record: int) -> None:
        """From this record on, those before it have been heard."""
        if record != self.record:
            self.record = record
            self.newest_new = max(self.newest_new, self.newest_of_record)

    def _decide(self, i: int, rule: int) -> Reason | None:
        """Return why there is no room for the series of a point; None: there is."""
        # With its own time: where all others have stopped, nothing else would show it.
        watermark = max(int(self.newest[i]), self.newest_new, int(self.time_ms[i]))
        quota, too_old = int(self.quota[rule]), self.time_ms[i] + self.idle_ms < watermark
        while quota and self.of_rule[rule] >= quota:
            if too_old or not self._evict(i, rule, watermark):
                return "quota"
        while self.most and self.taken >= self.most:
            if too_old or not self._evict(i, _ALL, watermark):
                return "too_many_series"
        return None

    def _evict(self, i: int, scope: int, watermark: int) -> bool:
        """Let the series go that has been idle longest; False if none is idle."""
        start = int(self.start[i])
        # Those that came before could be idle again by now; how they are is not known before they are gone through.
        if start and min(int(self.oldest[i]), self.oldest_new) + self.idle_ms < watermark:
            raise _Cut(start)
        for due, _, slot in self._idle(scope):
            if due >= watermark:
                return False
            if slot in self.gone:
                continue
            first = self.first.get(slot, _FAR)
            if first < start:
                raise _Cut(start)
            if first < _FAR and self.start[first] == start:
                continue  # a point of its own has come with this very record
            silence = self.series.silence
            if start and silence.span_ms[slot] and not silence.silent[slot]:  # it may be told of on the way
                raise _Cut(start)
            if first < _FAR:
                self.out.end = min(self.out.end, int(self.start[first]))  # there it is a new series
            self.gone.add(slot)
            self.out.evicted.append((slot, int(self.points.row[i])))
            self.taken -= 1
            self.of_rule[self.series.rule[slot]] -= 1
            return True
        return False

    def _idle(self, scope: int) -> Iterator[tuple[int, str, int]]:
        """Yield (since when it is idle, name, slot) of series that are idle at the end of the batch, longest first."""
        if scope not in self.queues:
            self.queues[scope] = self._queue(scope)
        queue = self.queues[scope]
        while queue and queue[-1][2] in self.gone:
            queue.pop()
        yield from reversed(queue)

    def _queue(self, scope: int) -> list[tuple[int, str, int]]:
        series, silence = self.series, self.series.silence
        room = len(series.placed)
        due = silence.last_ms[:room] + np.maximum(silence.span_ms[:room], self.idle_ms)
        idle = series.placed & (due < max(int(self.newest[-1]), int(self.time_ms.max())))
        if scope != _ALL:
            idle &= series.rule == scope
        slots = np.flatnonzero(idle)
        slots = slots[~series.opened(slots)]
        most = len(self.points) + 2 * len(self.fresh)  # of which some may be in use, and some gone
        if len(slots) > most:
            slots = slots[due[slots] <= np.partition(due[slots], most)[most]]
        keyed = ((int(due[slot]), series.names[slot], slot) for slot in slots.tolist())
        return heapq.nsmallest(most, keyed)[::-1]
