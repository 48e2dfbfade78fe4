"""The core: points in, anomaly events out. No I/O, no clock, no logging; the live worker and the back-test share it.

One batch goes one straight path: grid -> waves -> window, completion, forward pass -> threshold -> incident -> event.
A wave holds at most one cell of each series, so that everything in it is done on whole columns. Batches are only a
matter of speed: cut differently, or with a snapshot and a restore between two of them, they give the same events.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from enum import IntEnum

import msgspec
import numpy as np

from models.base import Forecast, Forecaster
from models.base import score as score_of
from models.pot import Outcome, PotConfig, Spot, Step
from stream import grid
from stream.columns import BoolArray, Columns, Float64Array, Int8Array, Int32Array, Int64Array, SeriesIndex
from stream.events import (
    SEVERITIES,
    TYPE_OPENED,
    TYPE_RESOLVED,
    TYPE_UPDATED,
    Event,
    EventData,
    Peak,
    WindowInfo,
    incident_id,
    iso_time,
    make_event,
    rounded_to,
    significant,
)
from stream.incidents import Action, IncidentPolicy, Incidents, severity_of
from stream.records import Reject
from stream.windows import Windows

_FIRST_CAPACITY = 64
NEVER = -1  # no event time: those are not negative
_NO_PHASE = np.iinfo(np.int64).min
_SCORE_MAX = 1e38  # below the largest float32
_PROBABILITY_MIN = 1e-12  # what a tail fitted to a hundred excesses says below it means no more than "never seen"
_RATIO_MAX = 1e9  # a threshold of 0 (a series that was always forecast exactly) has no ratio


@dataclass(frozen=True, slots=True)
class DetectorConfig:
    """How series are watched; the same for all series of a detector."""

    interval_ms: int = 0  # grid step; 0 infers each series' own from its first points
    pot: PotConfig = field(default_factory=PotConfig)
    incidents: IncidentPolicy = field(default_factory=IncidentPolicy)
    # Scores that a series without its own calibration must have seen, in event time: a day holds its whole season.
    warmup_ms: int = 24 * 3_600_000
    # A flagged value enters the window as missing, completed by the forecast. One that lies less than this many times
    # its threshold from the forecast enters at the edge of the band: replaced, it would leave the forecast to itself,
    # and a single false alarm on a slope would last for hours (Hampel's rule: follow the near, ignore the far).
    follow_ratio: float = 2.0
    min_observed: float = 0.2  # share of a window that must have arrived; below it the forecast rests on itself
    source: str = "tocsin"


@dataclass(slots=True)
class Counts:
    """What a detector has done, for people; not part of its state."""

    points: int = 0  # decoded points that came in
    missing: int = 0  # of them without a value
    scored: int = 0  # cells that got a score
    completed: int = 0  # missing cells that the model completed
    flagged: int = 0  # anomalous points
    duplicates: int = 0  # points that fell into a cell that was taken
    late: int = 0  # points older than the newest of their series, still inside its window
    too_late: int = 0  # points older than the window: rejected
    gaps: int = 0  # gaps longer than the window: it began anew
    events: int = 0

    def add(self, other: Counts) -> None:
        """Add another's counts to these."""
        for f in fields(self):
            setattr(self, f.name, getattr(self, f.name) + getattr(other, f.name))

    def as_dict(self) -> dict[str, int]:
        """Return the counts by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True, slots=True)
class Scores:
    """One row a cell that was passed: what came, what was expected, how it was judged. NaN is "none"."""

    slot: Int32Array
    timestamp_ms: Int64Array
    value: Float64Array
    expected: Float64Array
    score: Float64Array
    threshold: Float64Array
    probability: Float64Array
    anomaly: BoolArray


@dataclass(slots=True)
class Result:
    """What a batch gave: events in the order of the points that caused them, and points that were refused."""

    events: list[Event]
    event_rows: list[int]
    rejects: list[Reject]
    scores: list[Scores]


class _Kind(IntEnum):
    OBSERVED = 0  # the next cell, with a value
    MISSING = 1  # the next cell, without one
    RESTART = 2  # a value after a gap longer than the window
    REPEAT = 3  # a cell that the window holds already: late, or once more


@dataclass(frozen=True, slots=True)
class _Steps:
    """Cells to go through, ordered by wave; `ends` holds where each wave ends."""

    slot: Int32Array
    cell: Int64Array
    kind: Int8Array
    timestamp_ms: Int64Array
    value: Float64Array
    row: Int64Array
    ends: Int64Array


@dataclass(frozen=True, slots=True)
class _Judged:
    """Points of a wave, (K,), with what was expected of them and how they were judged."""

    slot: Int32Array
    timestamp_ms: Int64Array
    value: Float64Array
    forecast: Forecast
    score: Float64Array
    step: Step
    learned: Int64Array  # cells of the window that hold the value that arrived


class Detector:
    """The series that share one model and one policy.

    Deterministic: the events depend on the points and their order within each series alone.
    """

    def __init__(
        self,
        config: DetectorConfig,
        model: Forecaster,
        model_ref: str,
        *,
        calibration: Float64Array | None = None,
        index: SeriesIndex | None = None,
    ) -> None:
        """Make a detector without series.

        Args:
            config: the policy.
            model: gives the expected value of the next cell.
            model_ref: name@version of the model, said in events.
            calibration: scores of held-out normal points of the very KPI that the model was trained for; a series
                then has its threshold from the first full window. None: each series calibrates itself.
            index: names and slots, shared with the decoder.
        """
        if model.features != 1:
            raise ValueError(f"{model_ref} expects {model.features} features; a detector takes models of 1")
        self.config = config
        self.model = model
        self.model_ref = model_ref
        self.calibration = calibration
        self.index = SeriesIndex() if index is None else index
        self.counts = Counts()
        self.windows = Windows(model.window, model.features)
        self.threshold = Spot(config.pot)
        self.incidents = Incidents(config.incidents)
        self.interval_ms: Int64Array = np.zeros(0, np.int64)
        self.phase_ms: Int64Array = np.zeros(0, np.int64)
        self.first_score_ms: Int64Array = np.zeros(0, np.int64)
        self.held = Columns.empty()  # points of series whose interval is not known yet, in order of arrival
        self.capacity = 0

    # -- batches ------------------------------------------------------------------------------------------------

    def accept(self, points: Columns, *, want_scores: bool = False) -> Result:
        """Take a batch of points, in the order of their arrival, and return what came of it."""
        self.make_room(len(self.index.names))
        result = Result([], [], [], [])
        self.counts.points += len(points)
        missing = np.isnan(points.value)
        if missing.any():
            # A null says no more than its absence does: the cell is completed when the next value shows the gap.
            self.counts.missing += int(missing.sum())
            points = points.take(~missing)
        points = self._with_interval(points)
        if len(points):
            steps = self._steps(points)
            begin = 0
            for end in steps.ends.tolist():
                self._wave(steps, slice(begin, end), result, want_scores)
                begin = end
        self.counts.events += len(result.events)
        return _in_order(result)

    def make_room(self, series: int) -> None:
        """Grow the arrays to hold so many series."""
        if series <= self.capacity:
            return
        old, new = self.capacity, max(series, 2 * self.capacity, _FIRST_CAPACITY)
        for part in (self.windows, self.threshold, self.incidents):
            part.resize(new)
        for name in ("interval_ms", "phase_ms", "first_score_ms"):
            array = np.zeros(new, np.int64)
            array[:old] = getattr(self, name)
            setattr(self, name, array)
        fresh = np.arange(old, new)
        self.interval_ms[fresh] = self.config.interval_ms
        self.phase_ms[fresh] = _NO_PHASE
        self.first_score_ms[fresh] = NEVER
        if self.calibration is not None and len(self.calibration):
            self.threshold.calibrate(fresh, self.calibration)
        self.capacity = new

    # -- grid -----------------------------------------------------------------------------------------------------

    def _with_interval(self, points: Columns) -> Columns:
        """Hold back the points of series whose interval is not known; release them once it is."""
        unknown = self.interval_ms[points.slot] == 0
        if unknown.any():
            points = Columns.concatenate([points.take(~unknown), self._probe(points.take(unknown))])
        fresh = self.phase_ms[points.slot] == _NO_PHASE
        if fresh.any():  # a configured interval: the grid goes through the first point
            first = np.unique(points.slot[fresh], return_index=True)
            at = np.flatnonzero(fresh)[first[1]]
            self.phase_ms[first[0]] = points.timestamp_ms[at] % self.interval_ms[first[0]]
        return points

    def _probe(self, points: Columns) -> Columns:
        held = Columns.concatenate([self.held, points])
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
        self.counts.duplicates += len(probe) - len(last)
        probe, decided_probe = probe.take(last), decided[in_probe][last]  # now by series and time
        self.held = probe.take(~decided_probe)
        self.held.row[:] = -1  # rows of a batch mean nothing in the next one
        probe = probe.take(decided_probe)
        if len(probe):
            times = probe.timestamp_ms.reshape(-1, grid.PROBE_POINTS)  # (K, P)
            slots = probe.slot[:: grid.PROBE_POINTS]
            self.interval_ms[slots], self.phase_ms[slots] = grid.infer_interval(times)
            # What they cause is caused by the record that completed the probe.
            completing = probe.row.reshape(-1, grid.PROBE_POINTS).max(axis=1)
            probe.row[:] = np.repeat(completing, grid.PROBE_POINTS)
        return Columns.concatenate([probe, held.take(decided & ~in_probe)])

    def _steps(self, points: Columns) -> _Steps:
        """Lay the points out as cells to go through, with the missing cells between them, in waves."""
        interval = self.interval_ms[points.slot]
        cell = (points.timestamp_ms - self.phase_ms[points.slot] + interval // 2) // interval
        newest, started = self.windows.newest[points.slot], self.windows.filled[points.slot] > 0
        placed = grid.place(points.slot, cell, newest, started)
        points, cell, lead = points.take(placed.order), placed.cell, placed.lead

        gap = np.maximum(lead - 1, 0)
        restart = gap > self.model.window
        gap[restart] = 0
        kind = np.where(lead <= 0, _Kind.REPEAT, np.where(restart, _Kind.RESTART, _Kind.OBSERVED)).astype(np.uint8)
        self.counts.duplicates += int((lead == 0).sum())
        self.counts.late += int((lead < 0).sum())
        self.counts.gaps += int(restart.sum())

        series_start = placed.start
        if gap.any():  # each missing cell becomes a step of its own before the point that shows it
            steps = gap + 1
            last = np.cumsum(steps) - 1  # the step of the point itself
            source = np.repeat(np.arange(len(points)), steps)
            missing = np.ones(len(source), np.bool_)
            missing[last] = False
            before = last[source] - np.arange(len(source))
            points, interval = points.take(source), interval[placed.order][source]
            cell = cell[source] - before
            kind = np.where(missing, np.uint8(_Kind.MISSING), kind[source])
            points.value[missing] = np.nan
            points.timestamp_ms[missing] = self.phase_ms[points.slot[missing]] + cell[missing] * interval[missing]
            series_start = np.zeros(len(source), np.bool_)
            series_start[(last - gap)[placed.start]] = True

        position = np.arange(len(points))
        wave = position - np.maximum.accumulate(np.where(series_start, position, 0))
        order = np.argsort(wave, kind="stable")
        points = points.take(order)
        return _Steps(
            slot=points.slot,
            cell=cell[order],
            kind=kind[order],
            timestamp_ms=points.timestamp_ms,
            value=points.value,
            row=points.row,
            ends=np.cumsum(np.bincount(wave)),
        )

    # -- one wave -------------------------------------------------------------------------------------------------

    def _wave(self, steps: _Steps, at: slice, result: Result, want_scores: bool) -> None:
        slot, cell, kind = steps.slot[at], steps.cell[at], steps.kind[at]
        timestamp_ms, value, row = steps.timestamp_ms[at], steps.value[at], steps.row[at]
        if kind.any():
            if (repeat := kind == _Kind.REPEAT).any():
                self._overwrite(slot[repeat], cell[repeat], timestamp_ms[repeat], value[repeat], row[repeat], result)
                go_on = ~repeat
                if not go_on.any():
                    return
                slot, cell, kind = slot[go_on], cell[go_on], kind[go_on]
                timestamp_ms, value, row = timestamp_ms[go_on], value[go_on], row[go_on]
            if (restart := kind == _Kind.RESTART).any():
                self.windows.begin(slot[restart], value[restart, None])
        filled = self.windows.filled[slot]
        if (fresh := (filled == 0) & (kind == _Kind.OBSERVED)).any():
            self.windows.begin(slot[fresh], value[fresh, None])

        observed = kind != _Kind.MISSING
        expected, completion = np.full((2, len(slot), 1), np.nan)
        judged = np.full(len(slot), Outcome.WARMING, np.uint8)
        full = np.flatnonzero(filled == self.model.window)
        row_scores = None
        if len(full):
            history, learned = self.windows.history(slot[full], cell[full])
            forecast = self.model.forecast(history, self.windows.usual_step(slot[full]), learned)
            expected[full] = forecast.expected
            # Forecast from forecasts, a gap would run away: what completes it stays within what the window has seen.
            completion[full] = np.clip(forecast.expected, history.min(axis=1), history.max(axis=1))
            enough = learned.mean(axis=1) >= self.config.min_observed
            if not enough.all():  # flagged values are not learned, but they did arrive: a long incident stays judged
                enough = self.windows.arrived(slot[full]) >= self.config.min_observed
            scorable = np.flatnonzero(observed[full] & enough)
            self.counts.completed += int(len(full) - observed[full].sum())
            if len(scorable):
                which = full[scorable]
                row_scores = self._judge(
                    which, slot, timestamp_ms, value, row,
                    Forecast(forecast.expected[scorable], forecast.spread[scorable]), learned[scorable], judged, result,
                )  # fmt: skip
        flagged = judged == Outcome.ANOMALY
        learn = observed & ~flagged
        actual = np.where(observed, value, np.nan)[:, None]
        seen = np.where(learn[:, None], actual, completion)
        if row_scores is not None and flagged.any():
            ratio = _ratio(row_scores[0], row_scores[1])
            near = flagged & (ratio <= self.config.follow_ratio)
            seen[near] = expected[near] + (actual[near] - expected[near]) / ratio[near, None]
        self.windows.append(slot, cell, seen, actual, learn)
        if want_scores:
            score, threshold, probability = np.full((3, len(slot)), np.nan) if row_scores is None else row_scores
            result.scores.append(
                Scores(slot, timestamp_ms, actual[:, 0], expected[:, 0], score, threshold, probability, flagged)
            )

    def _overwrite(
        self,
        slot: Int32Array,
        cell: Int64Array,
        timestamp_ms: Int64Array,
        value: Float64Array,
        row: Int64Array,
        result: Result,
    ) -> None:
        inside = self.windows.overwrite(slot, cell, value[:, None])
        for i in np.flatnonzero(~inside).tolist():
            s = int(slot[i])
            oldest = self.windows.newest[s] - self.windows.filled[s] + 1
            detail = (
                f"the point of {self.index.names[s]!r} at {iso_time(int(timestamp_ms[i]))} is older than the window, "
                f"which begins at {iso_time(int(self.phase_ms[s] + oldest * self.interval_ms[s]))}"
            )
            result.rejects.append(Reject(int(row[i]), "too_late", detail))
            self.counts.too_late += 1
            self.counts.late -= 1

    def _judge(
        self,
        which: Int64Array,
        slot: Int32Array,
        timestamp_ms: Int64Array,
        value: Float64Array,
        row: Int64Array,
        forecast: Forecast,
        learned: BoolArray,
        judged: Int8Array,
        result: Result,
    ) -> Float64Array:
        """Score, threshold and incident of the points `which`; returns the wave's (3, N) scores for whoever asks."""
        s, time, x = slot[which], timestamp_ms[which], value[which]
        score = np.minimum(score_of(x[:, None], forecast), _SCORE_MAX)
        score = score.astype(np.float32).astype(np.float64)  # no more digits than the forecast has
        first = self.first_score_ms[s]
        if (unset := first == NEVER).any():
            self.first_score_ms[s[unset]] = time[unset]
            first = self.first_score_ms[s]
        step = self.threshold.step(s, score, time - first >= self.config.warmup_ms)
        self.counts.scored += len(which)
        outcome = step.outcome
        anomalous = outcome == Outcome.ANOMALY
        action = np.full(len(s), Action.NONE, np.uint8)
        known = np.flatnonzero(outcome != Outcome.WARMING)  # without a threshold a point says nothing of an incident
        ratio = _ratio(score[known], step.threshold[known])
        severity = severity_of(step.probability[known], self.config.pot.q)
        action[known] = self.incidents.step(s[known], time[known], anomalous[known], severity, ratio, x[known])
        for i in np.flatnonzero(action == Action.OPENED).tolist():
            self.incidents.id[s[i]] = incident_id(self.index.names[s[i]], int(time[i]), self.model_ref)
        if (accepted := action == Action.ACCEPTED).any():
            self.windows.accept_actual(s[accepted])
            outcome = np.where(accepted, np.uint8(Outcome.NORMAL), outcome)
        judged[which] = outcome
        self.counts.flagged += int((outcome == Outcome.ANOMALY).sum())
        point = _Judged(s, time, x, forecast, score, step, learned.sum(axis=1))
        for i in np.flatnonzero(action).tolist():
            result.events.append(self._event(point, i, Action(action[i])))
            result.event_rows.append(int(row[which[i]]))
        scores = np.full((3, len(slot)), np.nan)
        scores[:, which] = score, step.threshold, step.probability
        return scores

    # -- events ---------------------------------------------------------------------------------------------------

    def _event(self, point: _Judged, i: int, action: Action) -> Event:
        incidents, slot = self.incidents, int(point.slot[i])
        time, opened = int(point.timestamp_ms[i]), int(incidents.opened_ms[slot])
        expected, threshold = float(point.forecast.expected[i, 0]), float(point.step.threshold[i])
        width = threshold * float(point.forecast.spread[i, 0])
        data = EventData(
            kpi=self.index.names[slot],
            incident=f"{int(incidents.id[slot]):016x}",
            severity=SEVERITIES[int(incidents.severity[slot]) - 1],
            model=self.model_ref,
            opened=iso_time(opened),
            anomalies=int(incidents.anomalies[slot]),
            value=float(point.value[i]),
            expected=rounded_to(width, expected),
            lower=rounded_to(width, expected - width),
            upper=rounded_to(width, expected + width),
            score=significant(float(point.score[i])),
            threshold=significant(threshold),
            ratio=significant(float(_ratio(point.score[i], threshold))),
            probability=significant(max(float(point.step.probability[i]), _PROBABILITY_MIN)),
            window=WindowInfo(self.model.window, self.model.window - int(point.learned[i])),
        )
        if action in (Action.RESOLVED, Action.ACCEPTED):
            data = msgspec.structs.replace(
                data,
                reason="recovered" if action == Action.RESOLVED else "accepted",
                last_anomaly=iso_time(int(incidents.last_ms[slot])),
                duration_s=(time - opened) / 1000,
                peak=Peak(
                    iso_time(int(incidents.peak_ms[slot])),
                    float(incidents.peak_value[slot]),
                    significant(float(incidents.peak_ratio[slot])),
                ),
            )
        event_type, suffix = {
            Action.OPENED: (TYPE_OPENED, "opened"),
            Action.UPDATED: (TYPE_UPDATED, f"updated-{data.severity}"),
            Action.RESOLVED: (TYPE_RESOLVED, "resolved"),
            Action.ACCEPTED: (TYPE_RESOLVED, "resolved"),
        }[action]
        return make_event(event_type, f"{data.incident}-{suffix}", time, data, source=self.config.source)

    def names(self, slots: Sequence[int]) -> list[str]:
        """Return the names of series."""
        return [self.index.names[slot] for slot in slots]


def _in_order(result: Result) -> Result:
    """Put events and rejects into the order of their records, however the points were cut into batches.

    A record of an entity can cause one of each metric: its events go by the name of the series, and of its rejects
    one stays, for it is one record that is refused.
    """
    order = sorted(range(len(result.events)), key=lambda i: (result.event_rows[i], result.events[i].subject))
    result.events = [result.events[i] for i in order]
    result.event_rows = [result.event_rows[i] for i in order]
    first: dict[int, Reject] = {}
    for reject in sorted(result.rejects, key=lambda reject: (reject.row, reject.detail)):
        first.setdefault(reject.row, reject)
    result.rejects = list(first.values())
    return result


def _ratio(score: Float64Array | float, threshold: Float64Array | float) -> Float64Array:
    """Return score / threshold, 1.0 being the edge for every model."""
    with np.errstate(over="ignore"):
        return np.minimum(score / np.maximum(threshold, 1e-300), _RATIO_MAX)


def _first_of_each(points: Columns, *, last: bool = False) -> Int64Array:
    """Return, by series and time, the index of the first (or last) point to arrive of each timestamp."""
    if not len(points):
        return np.zeros(0, np.int64)
    order = np.lexsort((points.timestamp_ms, points.slot))  # stable: equal ones stay in the order of arrival
    slot, time = points.slot[order], points.timestamp_ms[order]
    differs = (slot[1:] != slot[:-1]) | (time[1:] != time[:-1])
    return order[np.r_[differs, True] if last else np.r_[True, differs]]
