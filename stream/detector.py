"""The core: points in, anomaly events out. No I/O, no clock, no logging; the live worker and the back-test share it.

A detector knows the rules, sends each series to the group of its model, and watches for silence. Batches are only a
matter of speed: cut differently, or with a snapshot and a restore between two of them, they give the same events.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import msgspec
import numpy as np

from models.arrays import enough, grown
from stream import silence as silences
from stream.admission import Admission, Plan, Series, plan
from stream.columns import BoolArray, Columns, Int32Array, Int64Array, SeriesIndex
from stream.events import (
    TYPE_RESUMED,
    TYPE_SILENT,
    Event,
    SilenceData,
    iso_time,
    make_event,
    shadowed,
    silence_id,
)
from stream.group import Group
from stream.places import NOWHERE as UNWATCHED
from stream.places import Places
from stream.policy import PolicyTable, Rule
from stream.records import Reason, Reject
from stream.results import Counts, DetectorConfig, Result, Served, Shared
from stream.ruleset import RuleSet
from stream.silence import Silence

__all__ = ["Counts", "Detector", "DetectorConfig", "Result", "Served"]


_SPARE_MAX = 65_536  # names that are known of series without a place; then they are forgotten


class Detector:
    """The series of a partition, or of a back-test.

    Deterministic: the events depend on the points and their order within each series alone; that a series is silent
    depends on what the others send, too.

    Attributes:
        index: names and slots, shared with the decoder.
        places: series by model.
        shadows: the same of the models that judge beside them; what they say goes to `Result.shadow`.
        counts: what has been done.
    """

    def __init__(
        self,
        config: DetectorConfig,
        rules: Sequence[Rule],
        served: Sequence[Served | None],
        *,
        shadows: Sequence[Served | None] = (),
        general: Served | None = None,
    ) -> None:
        """Make a detector without series.

        Args:
            config: what is the same for all series.
            rules: the first that matches a series is its own.
            served: the model of each rule; None for a rule that watches nothing. Equal ones share a group.
            shadows: of each rule the model that judges beside the first, of the same features; None of one without.
            general: judges the KPIs that the stack of their rule has no model for.
        """
        self.config = config
        self.rules = tuple(rules)
        self.served = tuple(served)
        self._rule_set = RuleSet(self.rules, digest="")
        self._features = {
            rule.model: one.model.features for rule, one in zip(rules, served, strict=True) if one is not None
        }
        self.counts = Counts()
        self.table = PolicyTable.of([rule.policy for rule in rules])
        self.silence = Silence()
        self.index = SeriesIndex(metrics_of=self._metrics_of)
        shared = Shared(config, self.rules, self.table, self.counts, self.index.names)
        self.places = Places(shared, served, general)
        self.shadows = Places(replace(shared, counts=Counts()), shadows or [None] * len(rules))
        self.rule_of: Int32Array = np.zeros(0, np.int32)
        self.admission = Admission(config.series_max, config.idle_ms, self.table)
        self.spare_max = _SPARE_MAX

    @property
    def groups(self) -> list[Group]:
        """Series by model."""
        return self.places.groups

    @property
    def group_of(self) -> Int32Array:
        """Number of each slot's group, UNWATCHED of none."""
        return self.places.group_of

    @property
    def row_of(self) -> Int32Array:
        """Row of each slot in its group."""
        return self.places.row_of

    # -- rules ------------------------------------------------------------------------------------------------------

    def rule_for(self, name: str, *, entity: bool = False) -> int:
        """Return the rule of a KPI (or of an entity) of this name, UNWATCHED if there is none."""
        found = self._rule_set.find(name, entity=entity, features=self._features)
        return UNWATCHED if found is None else found

    def _metrics_of(self, name: str) -> tuple[str, ...] | None:
        """Return the metrics of an entity that is one series; None if it is watched metric by metric."""
        rule = self.rule_for(name, entity=True)
        one = self.served[rule] if rule >= 0 else None
        return one.metrics if one is not None and one.model.features > 1 else None

    def admit(self) -> None:
        """Give all series that are new to the index their places."""
        new = self._register()
        self._place(new[self.group_of[new] >= 0])

    def _register(self) -> Int64Array:
        """Find the rules and groups of series that are new to the index; return their slots."""
        names = self.index.names
        new = np.array(self.index.new, np.int64)
        if not len(new):
            return new
        self.index.new.clear()
        if len(names) > len(self.rule_of):
            room = enough(len(names), len(self.rule_of))
            self.rule_of = grown(self.rule_of, room, UNWATCHED)
            self.places.resize(room)
            self.silence.resize(room)
            if self.shadows.groups:
                self.shadows.resize(room)
        for slot in new.tolist():
            self.rule_of[slot] = self.rule_for(names[slot], entity=slot in self.index.entities)
        rule, of_new = self.rule_of[new], [names[slot] for slot in new.tolist()]
        self.places.assign(new, of_new, rule)
        if self.shadows.groups:
            self.shadows.assign(new, of_new, rule)
        return new

    def _place(self, slots: Int64Array) -> None:
        """Give watched series their places."""
        rule, names = self.rule_of[slots], self.names(slots.tolist())
        self.places.add(slots, names, rule)
        if self.shadows.groups:
            self.shadows.add(slots, names, rule)
        self.silence.span_ms[slots] = self._span(rule, self.table.interval_ms[rule])
        self.admission.count(rule, 1)

    def _evict(self, evicted: Sequence[tuple[int, int]], result: Result) -> None:
        """Forget series, each for the record that takes its place."""
        for slot, row in evicted:
            if self.silence.span_ms[slot] and not self.silence.silent[slot]:  # that record would have shown it
                self._tell(self.silence.fallen(slot, row), "event_time", result)
            result.evicted.append(self.index.names[slot])
        slots = np.array([slot for slot, _ in evicted], np.int64)
        self.places.remove(slots)
        self.shadows.remove(slots)
        self.silence.reset(slots)
        self.admission.count(self.rule_of[slots], -1)
        self.counts.evicted += len(slots)

    def _span(self, rule: int | Int32Array, interval_ms: int | Int64Array) -> Int64Array:
        span: Int64Array = np.asarray(self.table.silent_after[rule] * interval_ms)
        return span

    # -- batches ----------------------------------------------------------------------------------------------------

    @property
    def capacity(self) -> int:
        """The number of series that there is room for."""
        return len(self.rule_of)

    def accept(self, points: Columns, arrived_ms: Int64Array | None = None, *, want_scores: bool = False) -> Result:
        """Take a batch of points, in the order of their arrival, and return what came of it.

        Args:
            points: the points; NaN says that a value is missing.
            arrived_ms: when each record arrived, ms since 1970, (N,); -1 unknown. Silence by the clock goes by it.
            want_scores: return the score of each cell, too.
        """
        self._register()
        result, heard, beside = Result(), Result(), Result()
        self.counts.points += len(points)
        arrived = np.full(len(points), -1) if arrived_ms is None else arrived_ms
        # A null says no more than its absence does: the cell is completed when the next value shows the gap.
        missing = np.isnan(points.value)
        unwatched = self.group_of[points.slot] < 0
        self.counts.missing += int(missing.sum())
        self.counts.unwatched += int((unwatched & ~missing).sum())
        if (out := missing | unwatched).any():
            points, arrived = points.take(~out), arrived[~out]
        while len(points):
            now = self._admitted(points, arrived, heard)
            part = np.arange(now.end)
            if now.refused:
                part = np.delete(part, [i for i, _ in now.refused])
                result.rejects += [self._refusal(points, i, reason) for i, reason in now.refused]
                self.counts.refused += len(now.refused)
            rest = len(part) < len(points)
            some, since = (points.take(part), arrived[part]) if rest else (points, arrived)
            self._go_through(some, since, result, heard, beside, want_scores=want_scores)
            points, arrived = points.take(slice(now.end, None)), arrived[now.end :]
        if self.shadows.groups:
            result.shadow = [shadowed(event) for event in beside.in_order().events]
            self.counts.shadow_events += len(result.shadow)
        result.events = heard.events + result.events  # of one record and series the silence comes first
        result.event_rows = heard.event_rows + result.event_rows
        result.evicted = heard.evicted
        self.counts.events += len(result.events)
        spare = len(self.index) - self.places.taken > self.spare_max
        self.index.release(np.flatnonzero(self.row_of[: len(self.index.names)] < 0).tolist() if spare else ())
        return result.in_order()

    def _admitted(self, points: Columns, arrived: Int64Array, heard: Result) -> Plan:
        """Give the new series of the first points their places; return which points those are."""
        if (self.row_of[points.slot] >= 0).all():
            return Plan(len(points))
        placed = self.row_of >= 0
        series = Series(self.index.names, self.rule_of, placed, self.silence, self.places.opened)
        now = plan(self.admission, series, points, _heard_ms(points, arrived))
        if now.evicted:
            self._evict(now.evicted, heard)
        if now.admitted:
            self._place(np.array(now.admitted, np.int64))
        return now

    def _refusal(self, points: Columns, i: int, reason: Reason) -> Reject:
        slot = int(points.slot[i])
        rule, new = self.rules[int(self.rule_of[slot])], f"the series {self.index.names[slot]!r} is new"
        if reason == "quota":
            detail = f"{new}, and its rule {rule.name!r} has the {rule.policy.series_max} that its `series_max` allows"
        else:
            detail = f"{new}, and there are {self.config.series_max} in this partition (TOCSIN_SERIES_MAX)"
        return Reject(int(points.row[i]), reason, f"{detail}; none that may go for it is idle")

    def _go_through(
        self,
        points: Columns,
        arrived: Int64Array,
        result: Result,
        heard: Result,
        beside: Result,
        *,
        want_scores: bool,
    ) -> None:
        """Take points of series that have their places; what comes of silence goes to `heard`, of shadows `beside`."""
        self.places.accept(points, result, want_scores=want_scores)
        if self.shadows.groups:
            self.shadows.accept(points, beside)
        if len(points):
            span = self._span(self.rule_of[points.slot], self._intervals(points))
            changes = self.silence.accept(points.slot, _heard_ms(points, arrived), arrived, points.row, span)
            self._tell(changes, "event_time", heard)

    def _intervals(self, points: Columns) -> Int64Array:
        """Return the interval that the series of each point has after it, (N,); 0 while it is not known."""
        interval = np.zeros(len(points), np.int64)
        for number, group in enumerate(self.groups):
            own = np.flatnonzero(self.group_of[points.slot] == number)
            if not len(own):  # its changes are those of an earlier batch
                continue
            row_of, row = self.row_of[points.slot[own]].astype(np.int64), points.row[own]
            placing = group.placing
            now = np.where(placing.probing[row_of], 0, placing.interval_ms[row_of])
            if placing.changes:
                slot = np.concatenate([change.slot for change in placing.changes]).astype(np.int64)
                at = np.concatenate([change.row for change in placing.changes])
                after = np.concatenate([change.interval_ms for change in placing.changes])
                before = np.concatenate([change.before_ms for change in placing.changes])
                order = np.lexsort((at, slot))  # stable: of one record the last change stands
                slot, at, after, before = slot[order], at[order], after[order], before[order]
                records = int(row.max()) + 2  # one key sorts by series and record
                place = np.searchsorted(slot * records + at, row_of * records + row, side="right") - 1
                known = (place >= 0) & (slot[place] == row_of)
                now = np.where(known, after[place], now)
                first = np.searchsorted(slot, row_of, side="left") % len(slot)
                now = np.where((slot[first] == row_of) & ~known, before[first], now)
            interval[own] = now
        return interval

    def clock(self, now_ms: int) -> list[Event]:
        """Return the events of series that are silent by the clock on the wall.

        Args:
            now_ms: a time up to which all records have been taken in, ms since 1970.
        """
        result = Result()
        self._tell(self.silence.clock(now_ms), "wall_clock", result)
        self.counts.events += len(result.events)
        return result.events

    def _tell(self, changes: silences.Changes, basis: str, result: Result) -> None:
        for i in range(len(changes)):
            slot, last = int(changes.slot[i]), int(changes.last_ms[i])
            rule, time = self.rules[int(self.rule_of[slot])], int(changes.time_ms[i])
            span_ms, name = int(changes.span_ms[i]), self.index.names[slot]
            interval_ms = span_ms / max(rule.policy.silent_after, 1)
            data = SilenceData(
                kpi=name,
                last_seen=iso_time(last),
                interval_s=interval_ms / 1000,
                silent_after_s=span_ms / 1000,
                basis=basis,  # type: ignore[arg-type]  # one of the two words
                rule=rule.name,
                labels=dict(rule.labels),
            )
            event_type, suffix = TYPE_SILENT, "silent"
            if changes.kind[i] == silences.Kind.RESUMED:
                event_type, suffix = TYPE_RESUMED, "resumed"
                data = msgspec.structs.replace(data, silent_s=(time - last) / 1000)
            event_id = f"{silence_id(name, last)}-{suffix}"
            result.events.append(make_event(event_type, event_id, time, data, source=self.config.source))
            result.event_rows.append(int(changes.row[i]))

    def topics_of(self, event: Event) -> tuple[str, ...]:
        """Return the further topics that the rule of an event's series sends it to."""
        rule = int(self.rule_of[self.index[event.subject]])
        return self.rules[rule].topics if rule >= 0 else ()

    def names(self, slots: Sequence[int]) -> list[str]:
        """Return the names of series."""
        return [self.index.names[slot] for slot in slots]

    def watched(self, slots: Int32Array) -> BoolArray:
        """Say of each series whether a rule watches it."""
        watched: BoolArray = self.group_of[slots] >= 0
        return watched


def _heard_ms(points: Columns, arrived: Int64Array) -> Int64Array:
    """Return when each point was heard in event time: a clock that runs ahead must not make all others look silent."""
    return np.where(arrived >= 0, np.minimum(points.timestamp_ms, arrived), points.timestamp_ms)
