"""The series that share one model: cells in, anomaly events out.

One batch goes one straight path: grid -> waves -> window, completion, forward pass -> threshold -> incident -> event.
A wave holds at most one cell of each series, so that everything in it is done on whole columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import partial

import numpy as np

from models.arrays import enough, grown
from models.base import Assessment, Context
from models.pot import Outcome
from stream import grid
from stream.columns import BoolArray, Columns, Float64Array, Int8Array, Int32Array, Int64Array
from stream.events import iso_time
from stream.judge import Judge, Verdict
from stream.judged import Judged, ratio_of
from stream.past import COPIES, Past
from stream.placing import Cells, Placing
from stream.records import Reject
from stream.results import Result, Scores, Served, Shared
from stream.revision import Said, mend
from stream.waiting import Waiting
from stream.windows import Windows


class _Kind(IntEnum):
    OBSERVED = 0  # the next cell, with a value
    MISSING = 1  # the next cell, without one
    RESTART = 2  # a value after a gap longer than the window
    REPEAT = 3  # a cell that the window holds already: late, or once more


@dataclass(frozen=True, slots=True)
class _Steps:
    """Cells to go through: (N,) each, values (N, F)."""

    slot: Int32Array
    cell: Int64Array
    kind: Int8Array
    timestamp_ms: Int64Array
    value: Float64Array
    row: Int64Array

    def take(self, which: BoolArray | slice | Int64Array) -> _Steps:
        return _Steps(*(getattr(self, name)[which] for name in _Steps.__dataclass_fields__))

    def __len__(self) -> int:
        return len(self.slot)


def _within(completion: Float64Array, history: Float64Array) -> Float64Array:
    """Return what stands for missing values, no further than the window has been."""
    inside: Float64Array = np.clip(completion, history.min(axis=1), history.max(axis=1))
    return inside


@dataclass(slots=True)
class _Output:
    """What steps say, before it is known whether it has been said already."""

    said: list[tuple[int, Said]]  # series, what it says
    scores: list[Scores] | None


class Group:
    """The series that share one model.

    A slot here is the row that a series has in the arrays of its group. A series that corrects its events takes three:
    the two behind its own are copies of its state from before earlier cells (`past`).
    """

    _ARRAYS = (("series", -1), ("shift", 0.0), ("member", 0), ("ahead", np.nan))  # with the value of a fresh row

    def __init__(self, shared: Shared, served: Served) -> None:
        """Make a group without series.

        Args:
            shared: what it has in common with other groups.
            served: the model that its series share.
        """
        self.config, self.rules, self.table, self.counts = shared.config, shared.rules, shared.table, shared.counts
        self.served = served
        self.model = served.model
        self.features, self.window = served.model.features, served.model.history
        self.waits = self.features > 1 or bool(self.table.wait.any())  # whether any series may
        self.rows = 0  # in use or free again
        self._free: dict[int, list[int]] = {1: [], 1 + COPIES: []}  # first rows of removed series, by how many each has
        self.capacity = 0
        self.placing = Placing(self.table)
        self.waiting = Waiting(self.window, self.features)
        self.windows = Windows(self.window, self.features)
        self.judge = Judge(shared, served, self.name)
        self.series: Int32Array = np.zeros(0, np.int32)  # slot of each row in the detector; -1 of a copy or a free row
        self._names = shared.names
        self.shift: Float64Array = np.zeros((0, self.features))  # of what was flagged last, from what was expected
        self.member: Int64Array | None = np.zeros(0, np.int64) if served.members else None  # of a stack, its weights
        # What the model said of the next point, if the window is still as it was then. Not state: it can be made anew.
        self.ahead: Float64Array | None = np.zeros((0, self.features)) if served.model.looks_ahead else None
        self.past = Past(self.window, self.features)

    @property
    def rule(self) -> Int32Array:
        """Row of the policy table of each series."""
        return self.placing.rule

    # -- series -----------------------------------------------------------------------------------------------------

    def name(self, slot: int) -> str:
        """Return the name of a series."""
        return self._names[int(self.series[slot])]

    def add(self, names: Sequence[str], rules: Sequence[int], series: Sequence[int]) -> Int64Array:
        """Give new series their rows.

        Args:
            names: of the series, (K,).
            rules: row of the policy table of each.
            series: slot of each in the detector.

        Returns:
            the row of each, (K,).
        """
        waiting = [self.features > 1 or self.rules[rule].policy.wait for rule in rules]
        corrects = [
            self.rules[rule].policy.lateness_ms > 0 and not wait for rule, wait in zip(rules, waiting, strict=True)
        ]
        rows = np.where(corrects, 1 + COPIES, 1)
        slots = np.array([self._row(count) for count in rows.tolist()], np.int64)
        self._make_room(self.rows)
        for slot, count, rule, wait in zip(slots.tolist(), rows.tolist(), rules, waiting, strict=True):
            self.placing.add(slot, rule, wait)
            self.rule[slot : slot + count] = rule
        self.past.corrects[slots] = corrects
        self.series[slots] = series
        self.judge.set_drift(slots, self.rule[slots])
        self._set_risk(slots)
        if self.member is not None:
            for name, slot, count in zip(names, slots.tolist(), rows.tolist(), strict=True):
                self.member[slot : slot + count] = self.served.members[name]
        return slots

    def _row(self, count: int) -> int:
        """Return the first of so many rows for a series."""
        if free := self._free[count]:
            return free.pop()
        self.rows += count
        return self.rows - count

    def remove(self, slots: Int64Array) -> None:
        """Forget series, (K,); their rows go to the next new ones."""
        corrects = self.past.corrects[slots]
        copies = slots[corrects]
        for slot, copied in zip(slots.tolist(), corrects.tolist(), strict=True):
            self._free[1 + COPIES if copied else 1].append(slot)
        rows = np.concatenate([slots, copies + 1, copies + 2])
        for part in (self.placing, self.windows, self.judge, self.past):
            part.reset(rows)
        if self.waits:
            self.waiting.reset(rows)
        for name, fresh in self._ARRAYS:
            if (array := getattr(self, name)) is not None:
                array[rows] = fresh

    def lacks(self, name: str) -> bool:
        """Say whether the model is a stack that holds none for a series."""
        return self.member is not None and name not in self.served.members

    def _make_room(self, rows: int) -> None:
        if rows <= self.capacity:
            return
        new = enough(rows, self.capacity)
        for part in (self.placing, self.windows, self.judge):
            part.resize(new)
        if self.waits:
            self.waiting.resize(new)
        self.past.resize(new, some=bool(self.table.lateness_ms.any()))
        for name, fresh in self._ARRAYS:
            if (array := getattr(self, name)) is not None:
                setattr(self, name, grown(array, new, fresh))
        self.capacity = new

    def resume(self, slot: Int32Array) -> None:
        """Bring restored series up to date with what their rules ask for now."""
        self._set_risk(slot)
        self.judge.set_drift(slot, self.rule[slot])
        if self.waits:
            closed = np.where(self.windows.filled[slot] > 0, self.windows.newest[slot], grid.NO_CELL)
            self.waiting.closed[slot], self.waiting.newest[slot] = closed, closed
        self.past.forget_copies(slot)

    def _set_risk(self, slot: Int32Array | Int64Array) -> None:
        """Give series the risk that their rules ask for at the intervals that they have."""
        self.judge.set_risk(slot, self.rule[slot], self.placing.interval_ms[slot])

    # -- batches ----------------------------------------------------------------------------------------------------

    def accept(self, points: Columns, result: Result, *, want_scores: bool = False) -> None:
        """Take points in, in the order of their arrival, none of them missing; add what came of it to the result."""
        self.placing.begin_batch()
        repeats = self.placing.repeats + self.waiting.repeats
        while len(points):
            points, regridded = self.placing.release(points)
            if self.placing.changes:
                self._set_risk(np.unique(np.concatenate([change.slot for change in self.placing.changes])))
            if len(regridded):
                self.windows.begin(regridded, self.windows.origin[regridded])
                self.windows.forget_steps(regridded)
                self.past.forget_copies(regridded)
                for one in regridded.tolist():
                    self.past.forget_grid(one, self.judge.ongoing(one))
                self.counts.regridded += len(regridded)
            wait = self.placing.waiting[points.slot]
            rest = Columns.empty()
            if wait.any():
                patient, points = points.take(wait), points.take(~wait)
                cell, lateness = self.placing.cell(patient.slot, patient.timestamp_ms), self._lateness(patient.slot)
                ready = self.waiting.accept(patient, cell, lateness)
                if len(ready.slot):
                    placed = self._placed(ready)
                    self._run(ready, placed.order, placed.lead, placed.start, result, want_scores)
            if len(points):
                cells = Cells(
                    points.slot,
                    self.placing.cell(points.slot, points.timestamp_ms),
                    points.timestamp_ms,
                    points.value[:, None],
                    points.row,
                )
                placed = self._placed(cells)
                after = self.placing.watch_fit(placed, cells.slot[placed.order], cells.row[placed.order])
                lead, start, order = placed.lead, placed.start, placed.order
                if after.any():
                    rest = points.take(np.sort(order[after]))
                    lead, start, order = lead[~after], start[~after], order[~after]
                self._run(cells, order, lead, start, result, want_scores)
            points = rest
        self.counts.duplicates += self.placing.repeats + self.waiting.repeats - repeats

    def _lateness(self, slot: Int32Array) -> Int64Array:
        return self.placing.lateness_cells(slot, self.window)

    def _placed(self, cells: Cells) -> grid.Placed:
        started = self.windows.filled[cells.slot] > 0
        return grid.place(cells.slot, cells.cell, self.windows.newest[cells.slot], started)

    def _run(
        self,
        cells: Cells,
        order: Int64Array,
        lead: Int64Array,
        start: BoolArray,
        result: Result,
        want_scores: bool,
    ) -> None:
        """Go through cells, wave by wave.

        Args:
            cells: what came.
            order: of the cells, by series and, within one, by arrival, (M,).
            lead: by how much each leads the newest one before it, (M,) in that order.
            start: the first one of its series, (M,) in that order.
            result: what comes of it is added here.
            want_scores: scores too.
        """
        steps, ends = self._steps(cells, order, lead, start)
        begin = 0
        for end in ends:
            wave = steps.take(slice(begin, end))
            begin = end
            repeat = wave.kind == _Kind.REPEAT
            output = _Output([], result.scores if want_scores else None)
            if repeat.any():
                self._repeat(wave.take(repeat), result)
                wave = wave.take(~repeat)
            if len(wave):
                self._advance(wave, output)
            self._publish(output, result)

    def _steps(self, cells: Cells, order: Int64Array, lead: Int64Array, start: BoolArray) -> tuple[_Steps, list[int]]:
        """Lay cells out with the missing ones between them, ordered by wave; and where each wave ends."""
        gap = np.maximum(lead - 1, 0)
        restart = gap > self.window
        gap[restart] = 0
        kind = np.where(lead <= 0, _Kind.REPEAT, np.where(restart, _Kind.RESTART, _Kind.OBSERVED)).astype(np.uint8)
        points = (~np.isnan(cells.value[order])).sum(axis=1)  # a record of an entity brings several
        self.counts.duplicates += int(points[lead == 0].sum())
        self.counts.late += int(points[lead < 0].sum())
        self.counts.gaps += int(restart.sum())
        steps = _Steps(
            cells.slot[order], cells.cell[order], kind, cells.timestamp_ms[order], cells.value[order], cells.row[order]
        )
        if gap.any():  # each missing cell becomes a step of its own before the point that shows it
            count = gap + 1
            last = np.cumsum(count) - 1  # the step of the point itself
            source = np.repeat(np.arange(len(steps)), count)
            missing = np.ones(len(source), np.bool_)
            missing[last] = False
            before = last[source] - np.arange(len(source))
            steps = steps.take(source)
            steps.cell[:] -= before
            steps.kind[missing] = _Kind.MISSING
            steps.value[missing] = np.nan
            steps.timestamp_ms[missing] = self.placing.time_ms(steps.slot[missing], steps.cell[missing])
            begins = np.zeros(len(source), np.bool_)
            begins[(last - gap)[start]] = True
            start = begins
        position = np.arange(len(steps))
        wave = position - np.maximum.accumulate(np.where(start, position, 0))
        return steps.take(np.argsort(wave, kind="stable")), np.cumsum(np.bincount(wave)).tolist()

    # -- one wave ---------------------------------------------------------------------------------------------------

    def _advance(self, wave: _Steps, output: _Output) -> None:
        """Step into the next cell of each series."""
        slot, cell, value = wave.slot, wave.cell, wave.value
        if wave.kind.any() and (restart := wave.kind == _Kind.RESTART).any():
            self._begin(slot[restart], value[restart])
            self.past.forget_copies(slot[restart])
        if (corrects := self.past.corrects[slot]).any():
            self._copy(slot[corrects], cell[corrects])
            self.past.note(slot[corrects], cell[corrects], value[corrects], wave.timestamp_ms[corrects])
        filled = self.windows.filled[slot]
        if (fresh := (filled == 0) & (wave.kind == _Kind.OBSERVED)).any():
            self._begin(slot[fresh], value[fresh])

        observed = ~np.isnan(value)  # (K, F)
        expected, completion = np.full((2, *value.shape), np.nan)
        flagged = np.zeros(len(slot), np.bool_)
        learn = observed
        full = np.flatnonzero(filled == self.window)
        row_scores = np.full((3, len(slot)), np.nan)  # score, threshold, probability
        judged: Judged | None = None
        if len(full):
            history, learned = self.windows.history(slot[full], cell[full])
            context = self._context(slot[full], cell[full], value[full], history, learned)
            assessment = self.model.assess(context)
            expected[full] = assessment.expected
            # Forecast from forecasts, a gap would run away: what completes it stays within what the window has seen.
            completion[full] = _within(assessment.completion, history)
            enough = learned.mean(axis=1) >= self.config.min_observed
            if not enough.all():  # flagged values are not learned, but they did arrive: a long incident stays judged
                enough |= self.windows.arrived(slot[full]) >= self.config.min_observed
            scored = observed[full] & enough
            self.counts.completed += int((~observed[full]).any(axis=1).sum())
            at = np.flatnonzero(scored.any(axis=1))
            if len(at):
                which = full[at]
                completed = ((~learned[at]).sum(axis=(1, 2)) // self.features).astype(np.int64)
                shown = np.where(scored[at], value[which], np.nan)
                verdict = self._judge(wave, which, shown, assessment.take(at), completed, output)
                judged, flagged[which] = verdict.judged, verdict.anomaly
                row_scores[:, which] = judged.score, judged.step.threshold, judged.step.probability
        seen = np.where(observed, value, completion)
        if judged is not None and flagged.any():
            learn = observed.copy()
            self._withhold(judged, np.flatnonzero(flagged[which]), which, context.take(at), completion, seen, learn)
        self.windows.append(slot, cell, seen, value, learn)
        if self.ahead is not None:
            self.ahead[slot] = np.nan
            if judged is not None and assessment.ahead is not None:  # only of points that entered as they came
                same = observed[which].all(axis=1) & (judged.step.outcome != Outcome.ANOMALY)
                self.ahead[judged.slot[same]] = assessment.ahead[at[same]]
        if output.scores is not None:
            one = self.features == 1
            half = np.full(len(slot), np.nan)
            if one and judged is not None:
                half[which] = judged.assessment.half_width(judged.step.threshold[:, None])[:, 0]
            middle = expected[:, 0] if one else row_scores[0] * np.nan
            output.scores.append(
                Scores(
                    self.series[slot],
                    wave.timestamp_ms,
                    value[:, 0] if one else row_scores[0] * np.nan,
                    middle,
                    middle - half,
                    middle + half,
                    row_scores[0],
                    row_scores[1],
                    row_scores[2],
                    flagged,
                )
            )

    def _context(
        self, slot: Int32Array, cell: Int64Array, value: Float64Array, history: Float64Array, learned: BoolArray
    ) -> Context:
        """Return what the model is told of the next cells of series with full windows."""
        return Context(
            history,
            learned,
            # A network that reads the point reads what the window will keep of it.
            self.windows.kept(slot, value) if self.model.reads_point else value,
            self.placing.time_ms(slot, cell),
            self.windows.usual_step(slot),
            None if self.ahead is None else self.ahead[slot],
            None if self.member is None else self.member[slot],
        )

    def _begin(self, slot: Int32Array, value: Float64Array) -> None:
        """Start windows anew; what has not come of an entity is what the model takes for its middle."""
        neutral = self.model.neutral if self.member is None else self.model.neutral[self.member[slot]]
        self.windows.begin(slot, np.where(np.isnan(value), neutral, value))

    def _withhold(
        self,
        judged: Judged,
        at: Int64Array,
        which: Int64Array,
        context: Context,
        completion: Float64Array,
        seen: Float64Array,
        learn: BoolArray,
    ) -> None:
        """Keep what was flagged from being learned: of an entity, the features with more than an average share of it.

        One that lies far from what was expected enters the window as missing, a near one at the edge of the band. In an
        incident that goes on, values that lie off by as much as the ones before enter without that shift.

        Args:
            judged: the points that were scored.
            at: those of them that were flagged.
            which: rows of the wave that `judged` is of.
            context: of the same points.
            completion: of the wave, what stands for a missing value.
            seen: of the wave, what enters the windows; changed here.
            learn: of the wave, what of that arrived; changed here.
        """
        rows, slot, value, some = which[at], judged.slot[at], judged.value[at], judged.assessment.take(at)
        square = np.square(judged.error[at] / judged.error[at].max(axis=1, keepdims=True))
        out = ~np.isnan(value) & (square * self.features >= square.sum(axis=1, keepdims=True))  # (K, F)
        threshold, expected, instead = judged.step.threshold[at, None], some.expected, completion[rows]
        if self.model.reads_point:  # what was flagged must not colour what stands for it
            own = context.take(at)
            again = self.model.assess(replace(own, value=np.where(out, np.nan, own.value)))
            expected, instead = again.completion, _within(again.completion, own.history)
        ratio = ratio_of(judged.score[at, None], threshold)
        near = ratio <= self.config.follow_ratio
        edge = expected + (value - expected) / ratio
        # What moves as ever, only shifted, still shows how the normal goes on: a season does not wait for an incident.
        shift = self.shift[slot]
        goes_on = (self.judge.incidents.anomalies[slot] > 1)[:, None]
        with np.errstate(invalid="ignore"):
            as_ever = np.abs(value - shift - expected) <= some.half_width(threshold)
        parallel = goes_on & ~near & as_ever
        self.shift[slot] = np.where(out & ~parallel, value - expected, shift)
        instead = np.where(near, edge, np.where(parallel, value - shift, instead))
        seen[rows] = np.where(out, instead, seen[rows])
        learn[rows] &= ~out

    def _judge(
        self,
        wave: _Steps,
        which: Int64Array,
        value: Float64Array,
        assessment: Assessment,
        completed: Int64Array,
        output: _Output,
    ) -> Verdict:
        """Have the points `which` of a wave judged, and take over what comes of it."""
        slot = wave.slot[which]
        member = None if self.member is None else self.member[slot]
        verdict = self.judge.judge(
            slot, wave.timestamp_ms[which], value, assessment, completed, self.rule[slot], member
        )
        if verdict.accepted.any():
            self.windows.accept_actual(slot[verdict.accepted])
        for i, event in verdict.said:
            at = which[i]
            output.said.append((int(slot[i]), Said(int(wave.cell[at]), event, int(wave.row[at]))))
        return verdict

    # -- late points ------------------------------------------------------------------------------------------------

    def _repeat(self, wave: _Steps, result: Result) -> None:
        """Take points in whose cells are behind: older than the window, to fill in, or to go back for."""
        inside = self.windows.inside(wave.slot, wave.cell)
        for i in np.flatnonzero(~inside).tolist():
            own = wave.slot[i : i + 1]
            oldest = self.windows.newest[own] - self.windows.filled[own] + 1
            begins = int(self.placing.time_ms(own, oldest)[0])
            detail = (
                f"the point of {self.name(own[0])!r} at {iso_time(int(wave.timestamp_ms[i]))} is older than the "
                f"window, which begins at {iso_time(begins)}"
            )
            result.rejects.append(Reject(int(wave.row[i]), "too_late", detail))
            points = int((~np.isnan(wave.value[i])).sum())
            self.counts.too_late += points
            self.counts.late -= points
        wave = wave.take(inside)
        if not len(wave):
            return
        revise = self.past.corrects[wave.slot]
        if revise.any():
            revise = revise & (self.windows.newest[wave.slot] - wave.cell <= self._lateness(wave.slot))
            revise &= self.past.reaches(wave.slot, wave.cell)
        if (plain := ~revise).any():
            slot, cell, value = wave.slot[plain], wave.cell[plain], wave.value[plain]
            self.windows.fill(slot, cell, value)
            self._forget_ahead(slot)
            for i in np.flatnonzero(self.past.corrects[slot]).tolist():
                self.past.note_fill(int(slot[i]), int(self.windows.newest[slot[i]]), int(cell[i]), float(value[i, 0]))
        if revise.any():
            wave = wave.take(revise)
            # float32 as the window holds it: a producer that repeats itself proves nothing wrong.
            same = (self.windows.actual_at(wave.slot, wave.cell) == self._relative(wave)).all(axis=1)
            if not same.all():
                self._revise(wave.take(~same), result)

    def _forget_ahead(self, slot: Int32Array) -> None:
        """Windows have changed: what was said of their next points came from others."""
        if self.ahead is not None:
            self.ahead[slot] = np.nan

    def _relative(self, wave: _Steps) -> Float64Array:
        relative: Float64Array = (wave.value - self.windows.origin[wave.slot]).astype(np.float32)
        return relative

    def _copy(self, slot: Int32Array, cell: Int64Array) -> None:
        """Keep copies of the state before cells that lie the lateness apart."""
        due = self.past.due(slot, cell, self._lateness(slot) + 1)
        if not due.any():
            return
        slot, cell = slot[due], cell[due]
        self._copy_rows(slot + 1, slot + 2)
        self._copy_rows(slot, slot + 1)
        self.past.copy_taken(slot, cell, [self.judge.ongoing(one) for one in slot.tolist()])

    def _copy_rows(self, source: Int32Array, target: Int32Array) -> None:
        for part in (self.windows, self.judge):
            part.copy_rows(source, target)
        for array in (self.shift, self.ahead):
            if array is not None:
                array[target] = array[source]

    def _revise(self, wave: _Steps, result: Result) -> None:
        """Go back to before the cells of late points, take them in, and go through what came since once more."""
        past, slot, newest = self.past, wave.slot, self.windows.newest[wave.slot].copy()
        past.note(slot, wave.cell, wave.value, wave.timestamp_ms)
        far = slot[wave.cell < past.copied[slot, 0]]
        self._copy_rows(far + 2, far + 1)
        past.copied[far, 0], past.copied[far, 1] = past.copied[far, 1], grid.NO_CELL
        self._copy_rows(slot + 1, slot)
        start = past.copied[slot, 0].copy()

        output = _Output([], None)
        before = self.counts.as_dict()
        for ahead in range(int((newest - start).max()) + 1):
            on = start + ahead <= newest
            at, cell = slot[on], (start + ahead)[on]  # (K,)
            value = past.raw[at, cell % self.window]
            missing = np.isnan(value).all(axis=1)
            stamp = np.where(missing, self.placing.time_ms(at, cell), past.stamp[at, cell % self.window])
            kind = np.where(missing, _Kind.MISSING, _Kind.OBSERVED).astype(np.uint8)
            self._advance(_Steps(at, cell, kind, stamp, value, wave.row[on]), output)
            for row_, at_cell in zip(at.tolist(), cell.tolist(), strict=True):
                for after, filled, what in past.fills.get(row_, ()):
                    if after == at_cell:
                        one = np.array([row_], np.int32)
                        self.windows.fill(one, np.array([filled]), np.array([[what]]))
                        self._forget_ahead(one)
        for name, count in before.items():  # what was counted is counted
            setattr(self.counts, name, count)
        self.counts.revised += len(slot)
        for i, one in enumerate(slot.tolist()):
            said = [what for whose, what in output.said if whose == one and what.cell >= wave.cell[i]]
            statements = past.statements.setdefault(one, [])
            for event in mend(statements, int(wave.cell[i]), said, partial(self.judge.standing, one)):
                result.events.append(event)
                result.event_rows.append(int(wave.row[i]))

    def _publish(self, output: _Output, result: Result) -> None:
        for slot, said in output.said:
            result.events.append(self.past.say(slot, said))
            result.event_rows.append(said.row)
