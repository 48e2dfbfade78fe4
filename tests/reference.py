"""The detector once more, a point at a time and a dict per series, in the order in which the design tells it.

It shares the model, the threshold (one row of its own for each series), the inference of the interval and the
encoding of events with the core, and nothing else. It is written for clarity: a late point that changes what was
published takes a deep copy of the state before its cell, and goes through the cells from there once more.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal, localcontext
from fnmatch import fnmatchcase
from typing import Any

import msgspec
import numpy as np

from models.base import Assessment, Context
from models.pot import Health, Outcome, Spot
from stream import grid
from stream.detector import Counts, DetectorConfig, Served
from stream.policy import Policy, Rule

Record = tuple[str, int, float | Mapping[int, float]]  # series, ms, value of a KPI or those of an entity's features

PROBE = 8
STEPS_MIN, STEPS_MAX = 8, 10_000
ROW = np.array([0])
SEVERITIES = ("none", "warning", "major", "critical")


@dataclass
class Incident:
    """From its first anomalous point on; `state` is pending, muted or open."""

    opened: int
    state: str = "pending"
    severity: int = 0
    calm: int = 0
    run: int = 0
    anomalies: int = 0
    last: int = 0
    peak: tuple[float, int, float | None] = (0.0, 0, None)  # ratio, time, value


@dataclass(frozen=True)
class Said:
    """What the model says of a cell, a feature each."""

    expected: list[float]
    error: list[float]
    completion: list[float]  # no further than the window has been
    assessment: Assessment
    context: Context


@dataclass
class Memory:
    """What a step changes; a revision goes back to a copy of it."""

    spot: Spot
    origin: list[float]
    steps: list[int]
    step_mean: list[float]
    shift: list[float]  # of what was flagged last, from what was expected
    begin: int = 0  # first cell of the window
    newest: int | None = None
    seen: dict[int, list[np.float32]] = field(default_factory=dict)
    actual: dict[int, list[float]] = field(default_factory=dict)  # NaN: nothing came
    learned: dict[int, list[bool]] = field(default_factory=dict)
    first_score: int | None = None
    incident: Incident | None = None
    resolved: int | None = None


@dataclass(frozen=True)
class Input:
    """What is known of a cell before it is gone through."""

    time: int
    values: dict[int, float]


@dataclass(frozen=True)
class Statement:
    """An event as it comes out of a step, without an id of its own yet."""

    cell: int
    plain: str  # id, if it is published once
    kind: str
    time: int
    data: dict[str, Any]
    id: str = ""  # that it was published under


@dataclass
class Series:
    name: str
    rule: Rule
    served: Served
    waits: bool
    interval: int
    memory: Memory
    phase: int | None = None
    probing: bool = True
    known: tuple[int, int] | None = None  # interval and phase of a series that probes again
    held: list[Input] = field(default_factory=list)
    misfit: int = 0
    backoff: int = 0
    # waiting
    furthest: int | None = None
    pending: dict[int, Input] = field(default_factory=dict)
    # correcting
    before: dict[int, Memory] = field(default_factory=dict)
    inputs: dict[int, Input] = field(default_factory=dict)
    told: list[Statement] = field(default_factory=list)
    fills: dict[int, list[tuple[int, Input]]] = field(default_factory=dict)  # by the cell that was the newest then
    used: Counter[str] = field(default_factory=Counter)  # plain ids
    # silence
    last: int | None = None
    silent: bool = False

    @property
    def policy(self) -> Policy:
        return self.rule.policy

    @property
    def window(self) -> int:
        return self.served.model.history

    @property
    def features(self) -> int:
        return self.served.model.features

    @property
    def lateness_cells(self) -> int:
        return min(self.policy.lateness_ms // self.interval, self.window // 2 - 1)

    @property
    def span(self) -> int:
        return 0 if self.probing else self.policy.silent_after * self.interval


class Reference:
    def __init__(self, config: DetectorConfig, rules: Sequence[Rule], served: Sequence[Served | None]) -> None:
        self.config = config
        self.rules = list(zip(rules, served, strict=True))
        self.series: dict[tuple[str, bool], Series] = {}
        self.watermark = -1
        self.counts = Counts()
        self.out: list[tuple[int, str, int, bytes]] = []
        self.too_late: list[int] = []
        self.refused: list[tuple[int, str]] = []
        self.evicted: list[str] = []

    @property
    def events(self) -> list[tuple[int, bytes]]:
        """Events with the rows that caused them, in the order that is promised."""
        return [(row, event) for row, _, _, event in sorted(self.out, key=lambda one: one[:3])]

    def take(self, stream: Sequence[Record]) -> None:
        for row, (name, time, value) in enumerate(stream):
            entity = isinstance(value, Mapping)
            values = dict(value) if isinstance(value, Mapping) else {0: value}
            self.counts.points += len(values)
            there = {f: x for f, x in values.items() if not math.isnan(x)}
            self.counts.missing += len(values) - len(there)
            if not there:
                continue
            one = self.series.get((name, entity)) or self._new_series(name, entity)
            if one is None:
                self.counts.unwatched += len(there)
                continue
            if (name, entity) not in self.series and (reason := self._no_room(one, row, time)):
                self.counts.refused += len(there)
                self.refused.append((row, reason))
                continue
            self.series[name, entity] = one
            self._hear(one, row, time, there)

    def _new_series(self, name: str, entity: bool) -> Series | None:
        for rule, served in self.rules:
            if not any(fnmatchcase(name, glob) for glob in rule.match):
                continue
            if served is None:
                return None
            features = served.model.features
            if not entity and features > 1:
                continue
            policy, spot = rule.policy, Spot(self.config.pot, 1, served.prior)
            one = Series(
                name,
                rule,
                served,
                waits=policy.wait or features > 1,
                interval=policy.interval_ms,
                memory=Memory(spot, [0.0] * features, [0] * features, [0.0] * features, [0.0] * features),
            )
            one.probing = one.waits or not one.interval
            spot.set_drift(ROW, policy.drift)
            spot.set_risk(ROW, self._risk(one))
            return one
        return None

    def _risk(self, one: Series) -> float:
        policy, pot = one.policy, self.config.pot
        if not policy.alarms_per_ms:
            return policy.q
        return min(policy.alarms_per_ms * one.interval, pot.q_max) if one.interval else pot.q

    # -- room ---------------------------------------------------------------------------------------------------------

    def _no_room(self, new: Series, row: int, time: int) -> str:
        """Make room for a series; return why there is none, "" if there is."""
        watermark = max(self.watermark, time)
        bounds = [(new.policy.series_max, new.rule, "quota"), (self.config.series_max, None, "too_many_series")]
        for most, rule, reason in bounds:
            while most and sum(rule is None or one.rule is rule for one in self.series.values()) >= most:
                idle = [
                    (since, one.name)
                    for one in self.series.values()
                    if (rule is None or one.rule is rule) and (since := self._idle_since(one)) < watermark
                    if one.memory.incident is None or one.memory.incident.state != "open"
                ]
                if not idle or time + self.config.idle_ms < watermark:
                    return reason
                self._evict(min(idle)[1], row)
        return ""

    def _idle_since(self, one: Series) -> int:
        assert one.last is not None
        return one.last + max(one.span, self.config.idle_ms)

    def _evict(self, name: str, row: int) -> None:
        key = next(key for key in self.series if key[0] == name)
        if self.series[key].span and not self.series[key].silent:
            self._silent(self.series[key], row)
        del self.series[key]
        self.evicted.append(name)
        self.counts.evicted += 1

    # -- silence ------------------------------------------------------------------------------------------------------

    def _hear(self, one: Series, row: int, time: int, values: dict[int, float]) -> None:
        """Take a record in; see who has fallen silent, and who speaks again."""
        span = one.span
        if not one.silent and span and one.last is not None and time > one.last + span:
            self._silent(one, row)
        self._arrive(one, row, time, values)
        self.watermark = max(self.watermark, time)
        # One that would fall silent again at once stays silent; one that probes is not watched.
        up = not one.span or time + one.span >= self.watermark
        if one.silent and one.last is not None and time > one.last and up:
            one.silent = False
            silent_s = (time - one.last) / 1000
            self._tell_silence(one, row, "resumed", time, span, {"silent_s": silent_s})
        one.last = time if one.last is None else max(one.last, time)
        for other in self.series.values():
            if other is one or other.silent or other.last is None or not other.span:
                continue
            if self.watermark > other.last + other.span:
                self._silent(other, row)

    def _silent(self, one: Series, row: int) -> None:
        assert one.last is not None
        one.silent = True
        self._tell_silence(one, row, "silent", one.last + one.span, one.span, {})

    def _tell_silence(self, one: Series, row: int, kind: str, time: int, span: int, more: dict[str, Any]) -> None:
        assert one.last is not None
        data = {
            "kpi": one.name,
            "last_seen": iso(one.last),
            "interval_s": span / one.policy.silent_after / 1000,
            "silent_after_s": span / 1000,
            "basis": "event_time",
            **more,
            **self._of_rule(one),
        }
        self._publish(one, row, 0, f"kpi.{kind}", f"{_hash(one.name, one.last, 'silence')}-{kind}", time, data)

    def _of_rule(self, one: Series) -> dict[str, Any]:
        said: dict[str, Any] = {}
        if one.rule.name:
            said["rule"] = one.rule.name
        if one.rule.labels:
            said["labels"] = dict(one.rule.labels)
        return said

    # -- grid ---------------------------------------------------------------------------------------------------------

    def _arrive(self, one: Series, row: int, time: int, values: dict[int, float]) -> None:
        if not one.probing:
            if one.phase is None:
                one.phase = time % one.interval
            self._place(one, row, Input(time, values))
            return
        if one.waits:  # of what comes once more the last stays
            self.counts.duplicates += sum(len(h.values.keys() & values.keys()) for h in one.held if h.time == time)
            kept = [
                h if h.time != time else Input(time, {f: x for f, x in h.values.items() if f not in values})
                for h in one.held
            ]
            one.held = [h for h in kept if h.values]
        one.held.append(Input(time, values))
        times = sorted({held.time for held in one.held})
        if one.waits:
            need = 1 if one.interval else PROBE
            if len(times) >= need and times[-1] - times[need - 1] > one.policy.lateness_ms:
                self._decide(one, times[:need])
                early = sorted((held for held in one.held if held.time <= times[need - 1]), key=lambda held: held.time)
                self._release(one, row, [*early, *(held for held in one.held if held.time > times[need - 1])])
        else:
            latest = {held.time: held for held in one.held}
            self.counts.duplicates += len(one.held) - len(latest)
            one.held = list(latest.values())
            if len(times) == PROBE:
                self._decide(one, times)
                self._release(one, row, [latest[time] for time in times])

    def _decide(self, one: Series, times: list[int]) -> None:
        one.probing, one.misfit = False, 0
        if one.policy.interval_ms:
            one.phase = times[0] % one.interval
            return
        interval, phase = (int(x[0]) for x in grid.infer_interval(np.array([times])))
        if one.phase is not None:
            gaps = [b - a for a, b in itertools.pairwise(times)]
            regular = sum(abs(gap - interval) <= 0.1 * interval for gap in gaps) >= 5
            if not regular or abs(interval - one.interval) <= 0.1 * interval:
                one.backoff = min(one.backoff + 1, 8)
                return
            self.counts.regridded += 1
            one.memory.newest = None
            one.memory.steps = [0] * one.features
            one.memory.step_mean = [0.0] * one.features
            one.before, one.inputs, one.told, one.fills = {}, {}, [], {}
        one.interval, one.phase, one.backoff = interval, phase, 0
        one.memory.spot.set_risk(ROW, self._risk(one))

    def _release(self, one: Series, row: int, held: list[Input]) -> None:
        """Let go what was held; neighbours of one time go together."""
        one.held = []
        for time, together in itertools.groupby(held, key=lambda part: part.time):
            values: dict[int, float] = {}
            for part in together:
                values |= part.values
            self._place(one, row, Input(time, values))

    def _cell(self, one: Series, time: int) -> int:
        assert one.phase is not None
        return (time - one.phase + one.interval // 2) // one.interval

    def _place(self, one: Series, row: int, what: Input) -> None:
        cell = self._cell(one, what.time)
        if one.waits:
            self._wait(one, row, cell, what)
            return
        newest, value = one.memory.newest, what.values[0]
        lead = 1 if newest is None else cell - newest
        if lead > 0:
            self._advance(one, row, cell, what)
        elif self._late(one, row, cell, what):
            assert newest is not None
            stored, origin = one.memory.actual[cell][0], one.memory.origin[0]
            same = np.float32(value - origin) == np.float32(stored - origin)
            if not one.policy.lateness_ms or newest - cell > one.lateness_cells:
                self._fill(one, cell, what)
                one.fills.setdefault(newest, []).append((cell, what))
            elif not same:
                self._revise(one, row, cell, what)
        if not one.policy.interval_ms:
            one.misfit = max(one.misfit - 1, 0) if lead == 1 else one.misfit + 2
            if one.misfit >= 16 * 2**one.backoff:
                one.probing, one.misfit = True, 0

    def _late(self, one: Series, row: int, cell: int, what: Input) -> bool:
        """Whether the window holds the cell, which is no newer than its newest."""
        memory, points = one.memory, len(what.values)
        assert memory.newest is not None
        if cell < memory.begin or memory.newest - cell >= one.window:
            self.counts.too_late += points
            if row not in self.too_late:  # one record is refused once, whatever else it lets go of
                self.too_late.append(row)
            return False
        if cell == memory.newest:
            self.counts.duplicates += points
        else:
            self.counts.late += points
        return True

    def _fill(self, one: Series, cell: int, what: Input) -> None:
        memory = one.memory
        for f, value in what.values.items():
            flagged = not math.isnan(memory.actual[cell][f]) and not memory.learned[cell][f]
            memory.actual[cell][f] = value
            if not flagged:
                memory.seen[cell][f] = np.float32(value - memory.origin[f])
                memory.learned[cell][f] = True

    # -- waiting ------------------------------------------------------------------------------------------------------

    def _wait(self, one: Series, row: int, cell: int, what: Input) -> None:
        one.furthest = cell if one.furthest is None else max(one.furthest, cell)
        for overdue in sorted(one.pending):
            if overdue < one.furthest - one.lateness_cells:
                self._advance(one, row, overdue, one.pending.pop(overdue))
        newest = one.memory.newest
        if newest is not None and cell <= newest:
            if self._late(one, row, cell, what):
                self._fill(one, cell, what)
        elif cell < one.furthest - one.lateness_cells:  # of a gap that was waited for long enough
            self._advance(one, row, cell, what)
        else:
            before = one.pending.get(cell, Input(what.time, {}))
            self.counts.duplicates += len(before.values.keys() & what.values.keys())
            one.pending[cell] = Input(max(before.time, what.time), before.values | what.values)
        while (
            one.memory.newest is not None
            and (due := one.pending.get(one.memory.newest + 1)) is not None
            and len(due.values) == one.features
        ):
            self._advance(one, row, one.memory.newest + 1, one.pending.pop(one.memory.newest + 1))

    # -- cells --------------------------------------------------------------------------------------------------------

    def _advance(self, one: Series, row: int, cell: int, what: Input) -> None:
        """Go through the cells up to this one, and publish what comes of it."""
        memory = one.memory
        if memory.newest is not None and cell - memory.newest - 1 > one.window:
            self.counts.gaps += 1
        elif memory.newest is not None:
            for missing in range(memory.newest + 1, cell):
                self._pass(one, missing, None, self.counts)
        for statement in self._pass(one, cell, what, self.counts):
            self._state(one, row, statement, statement.kind)

    def _pass(self, one: Series, cell: int, what: Input | None, counts: Counts) -> list[Statement]:
        """Go through one cell; return what is to be said."""
        if not one.waits and one.policy.lateness_ms:
            keep = range(cell - one.lateness_cells, cell)
            one.before = {c: memory for c, memory in one.before.items() if c in keep}
            one.before[cell] = copy.deepcopy(one.memory)
            one.told = [told for told in one.told if told.cell > cell - one.window]
            one.inputs = {c: known for c, known in one.inputs.items() if c in keep}
            one.fills = {c: late for c, late in one.fills.items() if c >= cell - one.lateness_cells}
            if what is not None:
                one.inputs[cell] = what
        memory = one.memory
        if memory.newest is None or cell - memory.newest - 1 > one.window:
            assert what is not None
            memory.begin = cell
            neutral = np.asarray(one.served.model.neutral, np.float64).tolist()
            memory.origin = [what.values.get(f, neutral[f]) for f in range(one.features)]
            memory.seen, memory.actual, memory.learned = {}, {}, {}
        statements = self._step(one, cell, what, counts)
        for cells in (memory.seen, memory.actual, memory.learned):
            cells.pop(cell - one.window, None)
        return statements

    def _step(self, one: Series, cell: int, what: Input | None, counts: Counts) -> list[Statement]:
        memory, features = one.memory, range(one.features)
        values = {} if what is None else what.values
        said = self._assess(one, cell, values)
        statements: list[Statement] = []
        replaced: dict[int, float] = {}  # feature -> what the model is to see in its place
        if said is not None and what is not None:
            statements, replaced = self._judge(one, cell, what.time, values, said, counts)
        counts.completed += said is not None and len(values) < one.features
        seen: list[np.float32] = []
        for f in features:
            if f in values and f not in replaced:
                seen.append(np.float32(values[f] - memory.origin[f]))
            elif f in replaced:
                seen.append(np.float32(replaced[f] - memory.origin[f]))
            elif said is not None:
                seen.append(np.float32(said.completion[f] - memory.origin[f]))
            else:
                seen.append(memory.seen[cell - 1][f] if cell > memory.begin else np.float32(0))
        learned = [f in values and f not in replaced for f in features]
        for f in features:
            if learned[f] and cell > memory.begin and memory.learned[cell - 1][f]:
                memory.steps[f] = min(memory.steps[f] + 1, STEPS_MAX)
                step = abs(float(seen[f]) - float(memory.seen[cell - 1][f]))
                memory.step_mean[f] += (step - memory.step_mean[f]) / memory.steps[f]
        memory.seen[cell], memory.learned[cell] = seen, learned
        memory.actual[cell] = [values.get(f, math.nan) for f in features]
        memory.newest = cell
        return statements

    def _assess(self, one: Series, cell: int, values: Mapping[int, float]) -> Said | None:
        """What the model says of a cell; it is never told what it said before."""
        memory, features, model = one.memory, range(one.features), one.served.model
        if cell - memory.begin < one.window:
            return None
        assert one.phase is not None
        cells = range(cell - one.window, cell)
        history = [[float(memory.seen[c][f]) + memory.origin[f] for f in features] for c in cells]
        point = [values.get(f, math.nan) for f in features]
        if model.reads_point:
            point = [float(np.float32(x - memory.origin[f])) + memory.origin[f] for f, x in enumerate(point)]
        context = Context(
            np.array([history]),
            np.array([[memory.learned[c] for c in cells]]),
            np.array([point]),
            np.array([one.phase + cell * one.interval]),
            np.array([[memory.step_mean[f] if memory.steps[f] >= STEPS_MIN else math.nan for f in features]]),
            member=np.array([one.served.members[one.name]]) if one.served.members else None,
        )
        assessment = model.assess(context)
        columns = list(zip(*history, strict=True))
        completion = [
            min(max(x, min(column)), max(column))
            for x, column in zip(assessment.completion[0].tolist(), columns, strict=True)
        ]
        return Said(assessment.expected[0].tolist(), assessment.error[0].tolist(), completion, assessment, context)

    def _judge(
        self,
        one: Series,
        cell: int,
        time: int,
        values: dict[int, float],
        said: Said,
        counts: Counts,
    ) -> tuple[list[Statement], dict[int, float]]:
        memory, policy, expected, completion = one.memory, one.policy, said.expected, said.completion
        before = range(cell - one.window, cell)

        def enough(cells: int) -> bool:
            return cells / one.window >= self.config.min_observed

        scored = [
            f
            for f in sorted(values)
            if enough(sum(memory.learned[c][f] for c in before))
            or enough(sum(not math.isnan(memory.actual[c][f]) for c in before))
        ]
        if not scored:
            return [], {}
        residual = {f: said.error[f] for f in scored}
        if policy.direction:
            residual = {f: max(r * policy.direction, 0.0) for f, r in residual.items()}
        norm = abs(residual[0]) if one.features == 1 else math.sqrt(math.fsum(r * r for r in residual.values()))
        score = float(np.float32(min(norm, 1e30)))
        if memory.first_score is None:
            memory.first_score = time
            if one.served.calibrations:
                memory.spot.calibrate(ROW, one.served.calibrations[one.served.members.get(one.name, 0)])
        may_start = time - memory.first_score >= policy.warmup_ms
        step = memory.spot.step(ROW, np.array([score]), np.array([may_start]))
        counts.scored += 1
        outcome = int(step.outcome[0])
        if outcome == Outcome.WARMING:
            return [], {}
        deviation = {f: values[f] - expected[f] for f in scored}
        deviates = any(
            (abs(d) if not policy.direction else d * policy.direction)
            >= max(policy.least_deviation, policy.least_share * abs(expected[f]))
            for f, d in deviation.items()
        )
        anomalous = outcome == Outcome.ANOMALY and deviates
        threshold, p = float(step.threshold[0]), float(step.probability[0])
        half = said.assessment.half_width(np.array([[threshold]]))[0].tolist()
        ratio = min(score / max(threshold, 1e-300), 1e9)
        q = self._risk(one)
        severity = 0 if not anomalous else 3 if p <= q / 100 else 2 if p <= q / 10 else 1
        top = max(map(abs, residual.values()))
        squares = {f: (r / top) ** 2 if top else 0.0 for f, r in residual.items()}
        total = math.fsum(squares.values())
        share = {f: square / total if total else 0.0 for f, square in squares.items()}

        value = values[0] if one.features == 1 else None
        completed = sum(not learned for c in before for learned in memory.learned[c]) // one.features
        # What only the least deviation keeps from being an anomaly is as calm as can be.
        calm = policy.recover_ratio >= 1 or ratio < policy.recover_ratio or outcome == Outcome.ANOMALY
        restarted = bool(step.restarted[0])
        kind, incident = self._incident(one, time, anomalous, severity, ratio, value, calm, restarted)
        if kind.startswith("accepted"):
            for c, actual in memory.actual.items():
                for f, x in enumerate(actual):
                    if not math.isnan(x):
                        memory.seen[c][f], memory.learned[c][f] = np.float32(x - memory.origin[f]), True
        flagged = anomalous and not kind.startswith("accepted")
        counts.flagged += flagged
        replaced: dict[int, float] = {}
        if flagged:
            near = ratio <= self.config.follow_ratio
            goes_on = memory.incident is not None and memory.incident.anomalies > 1
            out = [f for f in scored if share[f] >= 1 / one.features]
            normal = expected
            if one.served.model.reads_point:  # once more, without what was flagged
                masked = said.context.value.copy()
                masked[0, out] = math.nan
                again = one.served.model.assess(replace(said.context, value=masked)).completion[0].tolist()
                history = said.context.history[0]
                low, high = history.min(axis=0).tolist(), history.max(axis=0).tolist()
                normal, completion = again, [min(max(x, low[f]), high[f]) for f, x in enumerate(again)]
            for f in out:
                unshifted = values[f] - memory.shift[f]
                if not near and goes_on and abs(unshifted - normal[f]) <= half[f]:
                    replaced[f] = unshifted
                    continue
                replaced[f] = normal[f] + (values[f] - normal[f]) / ratio if near else completion[f]
                memory.shift[f] = values[f] - normal[f]
        if incident is None or kind in ("", "accepted unknown"):
            return [], replaced

        def band(f: int) -> dict[str, float]:
            width = half[f]
            return {
                "value": values[f],
                "expected": like(width, expected[f]),
                "lower": like(width, expected[f] - width),
                "upper": like(width, expected[f] + width),
            }

        name = SEVERITIES[incident.severity]
        data: dict[str, Any] = {
            "kpi": one.name,
            "incident": _hash(one.name, incident.opened, one.served.ref),
            "severity": name,
            "model": one.served.ref,
            "opened": iso(incident.opened),
            "anomalies": incident.anomalies,
            "score": six(score),
            "threshold": six(threshold),
            "ratio": six(ratio),
            "probability": six(max(p, 1e-12)),
            "window": {"cells": one.served.model.window, "completed": completed},
        }
        if one.features == 1:
            data |= band(0)
        else:
            most = sorted((f for f in scored if share[f] >= 0.05), key=lambda f: (-share[f], f))[:5]
            told = [{"metric": one.served.metrics[f], "share": six(share[f]), **band(f)} for f in most]
            data |= {"features": told} if told else {}
        if kind in ("resolved", "accepted"):
            at, ms, peak = incident.peak
            data["reason"] = "recovered" if kind == "resolved" else "accepted"
            data["last_anomaly"] = iso(incident.last)
            data["duration_s"] = (time - incident.opened) / 1000
            data["peak"] = {"time": iso(ms), "ratio": six(at)} | ({} if peak is None else {"value": peak})
        health = Health(memory.spot.health(ROW)[0])
        if health not in (Health.OK, Health.WARMING):
            data["health"] = health.name.lower()
        data |= self._of_rule(one)
        public = "resolved" if kind == "accepted" else kind
        plain = f"{data['incident']}-{public}" + (f"-{name}" if kind == "updated" else "")
        return [Statement(cell, plain, public, time, data)], replaced

    def _incident(
        self,
        one: Series,
        time: int,
        anomalous: bool,
        severity: int,
        ratio: float,
        value: float | None,
        calm: bool,
        restarted: bool,
    ) -> tuple[str, Incident | None]:
        """Let a judged point be taken by the incident of its series; return what is to be said, and of which."""
        memory, policy, incident = one.memory, one.policy, one.memory.incident
        if not anomalous:
            if incident is None:
                return "", None
            if incident.state == "pending":
                memory.incident = None
                return "", None
            if not calm:
                return "", None
            incident.calm += 1
            if incident.calm < policy.recover_after:
                return "", None
            memory.incident = None
            if incident.state == "muted":
                return "", None
            memory.resolved = time
            return "resolved", incident

        if incident is None:
            incident = memory.incident = Incident(time)
        new = incident.state == "pending"
        graver = severity > incident.severity
        incident.calm = 0
        incident.run += 1
        incident.anomalies += 1
        incident.last = time
        incident.severity = max(incident.severity, severity)
        if ratio > incident.peak[0]:
            incident.peak = (ratio, time, value)
        if new and incident.run < policy.open_after:
            return "", None
        if not new and (restarted or time - incident.opened >= policy.accept_after_ms):
            memory.incident = None
            if incident.state == "muted":
                return "accepted unknown", incident
            memory.resolved = time
            return "accepted", incident
        if incident.state == "open":
            return ("updated", incident) if graver else ("", None)
        if self._muted(one, time):
            incident.state = "muted"
            return "", None
        incident.state = "open"
        return "opened", incident

    def _muted(self, one: Series, time: int) -> bool:
        cooling = one.memory.resolved is not None and time < one.memory.resolved + one.policy.cooldown_ms
        return cooling or any(bool(schedule.active(np.array([time]))[0]) for schedule in one.rule.maintenance)

    # -- revision -----------------------------------------------------------------------------------------------------

    def _revise(self, one: Series, row: int, cell: int, what: Input) -> None:
        """Go back to before the cell, go through the cells from there once more, and mend what was published."""
        newest = one.memory.newest
        assert newest is not None
        self.counts.revised += 1
        inputs = one.inputs | {cell: what}
        one.memory = copy.deepcopy(one.before[cell])
        second: dict[str, Statement] = {}
        for c in range(cell, newest + 1):
            for statement in self._pass(one, c, inputs.get(c), Counts()):
                second[statement.plain] = statement
            for late, value in one.fills.get(c, []):
                self._fill(one, late, value)
        first = {statement.plain: statement for statement in one.told if statement.cell >= cell}
        one.told = [statement for statement in one.told if statement.cell < cell]

        retracted = {s.data["incident"] for s in first.values() if s.kind == "opened" and s.plain not in second}
        mended: list[tuple[int, int, Statement, str]] = []  # cell, no longer or anew, what, as which kind
        for plain, published in first.items():
            if plain in second:
                continue
            incident, data = published.data["incident"], published.data | {"supersedes": published.id}
            if incident not in retracted:
                for gone in ("reason", "last_anomaly", "duration_s", "peak"):
                    data.pop(gone, None)
                data |= self._now(one, incident, second.values())
                mended.append((published.cell, 0, replace(published, data=data), "corrected"))
            elif published.kind == "opened":
                retraction = replace(published, plain=f"{incident}-retracted", data=data)
                mended.append((published.cell, 0, retraction, "retracted"))
        for plain, statement in second.items():
            if plain not in first:
                mended.append((statement.cell, 1, statement, statement.kind))
            elif _meaning(statement) == _meaning(first[plain]):
                one.told.append(first[plain])
            else:
                data = statement.data | {"supersedes": first[plain].id}
                mended.append((statement.cell, 1, replace(statement, data=data), "corrected"))
        for _, anew, statement, kind in sorted(mended, key=lambda one: one[:2]):
            self._state(one, row, statement, kind, stands=bool(anew))

    def _now(self, one: Series, id_: str, second: Iterable[Statement]) -> dict[str, Any]:
        """What the incident has come to."""
        incident = one.memory.incident
        if incident is not None and _hash(one.name, incident.opened, one.served.ref) == id_:
            return {"severity": SEVERITIES[incident.severity], "anomalies": incident.anomalies}
        data = [statement.data for statement in second if statement.data["incident"] == id_][-1]
        return {"severity": data["severity"], "anomalies": data["anomalies"]}

    # -- events -------------------------------------------------------------------------------------------------------

    def _state(self, one: Series, row: int, statement: Statement, kind: str, *, stands: bool = True) -> None:
        """Publish what came out of a step, or mends it; note what stands, so that it can be mended."""
        again = one.used[statement.plain]
        one.used[statement.plain] += 1
        statement = replace(statement, id=statement.plain + (f"-r{again + 1}" if again else ""))
        data = statement.data
        self._publish(one, row, 2, f"anomaly.{kind}", statement.id, statement.time, data)
        if stands and one.before:
            one.told.append(statement)

    def _publish(self, one: Series, row: int, rank: int, kind: str, id_: str, time: int, data: dict[str, Any]) -> None:
        self.counts.events += 1
        event = {
            "specversion": "1.0",
            "id": id_,
            "source": self.config.source,
            "type": f"tocsin.{kind}",
            "subject": one.name,
            "time": iso(time),
            "datacontenttype": "application/json",
            "partitionkey": one.name,
            "data": {name: data[name] for name in _ORDER if name in data},
        }
        assert set(data) <= set(_ORDER)
        self.out.append((row, one.name, rank, msgspec.json.encode(event)))


_SILENCE = ("last_seen", "interval_s", "silent_after_s", "basis", "silent_s")
_ANOMALY = (
    *("incident", "severity", "model", "opened", "anomalies", "score", "threshold", "ratio", "probability", "window"),
    *("value", "expected", "lower", "upper", "features", "reason", "last_anomaly", "duration_s", "peak"),
    *("supersedes", "health"),
)
_ORDER = ("kpi", *_SILENCE, *_ANOMALY, "rule", "labels")


def _meaning(statement: Statement) -> tuple[int, str, str, str]:
    data = statement.data
    return statement.time, data["severity"], data["opened"], data.get("reason", "")


def _hash(name: str, ms: int, what: str) -> str:
    return hashlib.blake2b(f"{name}\0{ms}\0{what}".encode(), digest_size=8).hexdigest()


def iso(ms: int) -> str:
    text = str(np.datetime64(ms, "ms"))
    return text.removesuffix(".000") + "Z"


def six(x: float) -> float:
    return float(f"{x:.6g}")


def like(width: float, x: float) -> float:
    """Round x to six digits of the width, by decimal arithmetic."""
    if width == 0:
        return six(x)
    with localcontext() as context:
        context.prec = 1000
        return float(Decimal(x).quantize(Decimal(1).scaleb(Decimal(width).adjusted() - 5)))
