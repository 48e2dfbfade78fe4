"""What the tests of the core share: a cheap forecaster, a point-by-point reference of the detector, small streams."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal, localcontext
from itertools import pairwise
from typing import Any

import numpy as np
from hypothesis import strategies as st

from models.base import Float64, Forecast, Forecaster
from models.pot import Outcome, PotConfig, Spot
from stream import events, grid, snapshot
from stream.columns import BoolArray, Columns, Float64Array
from stream.detector import Counts, Detector, DetectorConfig
from stream.incidents import IncidentPolicy

T0 = 1_469_376_000_000  # 2016-07-24 16:00:00 UTC
MINUTE = 60_000
MODEL = "persistence@1"
# So small that a hundred points are enough for thresholds, excesses, alarms and a full ring.
SMALL_POT = PotConfig(q=0.05, level=0.75, min_scores=20, min_excess=10, max_excess=16)

Arrival = tuple[str, int, float]  # series, ms, value (NaN: missing)


@dataclass(frozen=True)
class Persistence:
    """Expects the last value again; one unit of score is the range of the window. No sum: exact in any batch."""

    window: int = 9
    features: int = 1
    family: str = "persistence"

    def forecast(
        self, history: Float64, usual_step: Float64 | None = None, learned: BoolArray | None = None
    ) -> Forecast:
        assert history.shape[1:] == (self.window, self.features)
        assert np.isfinite(history).all(), "the window of a model has no holes"
        spread = history.max(axis=1) - history.min(axis=1)
        if usual_step is not None:
            spread = spread + np.nan_to_num(usual_step)
        if learned is not None:
            spread = spread * (1 + learned.sum(axis=1, keepdims=True) / 8)
        floor = np.maximum(np.abs(history).max(axis=1) * 2.0**-20, 1e-100)
        return Forecast(history[:, -1].copy(), np.maximum(spread, floor))


def config(
    *,
    interval_ms: int = 0,
    recover_after: int = 3,
    accept_after_ms: int = 30 * MINUTE,
    pot: PotConfig = SMALL_POT,
    max_alarms: int = 1000,
    warmup_ms: int = 0,
    min_observed: float = 0.2,
    follow_ratio: float = 3.0,
) -> DetectorConfig:
    pot = replace(pot, max_alarms=max_alarms)
    policy = IncidentPolicy(recover_after, accept_after_ms)
    return DetectorConfig(
        interval_ms, pot, policy, warmup_ms=warmup_ms, min_observed=min_observed, follow_ratio=follow_ratio
    )


def detector(
    settings: DetectorConfig | None = None,
    model: Forecaster | None = None,
    *,
    model_ref: str = MODEL,
    calibration: Float64Array | None = None,
) -> Detector:
    return Detector(settings or config(), model or Persistence(), model_ref, calibration=calibration)


def columns(to: Detector, arrivals: Sequence[Arrival], first_row: int = 0) -> Columns:
    """Return the arrivals as a batch, a row each."""
    slots = [to.index[name] for name, _, _ in arrivals]
    rows = np.arange(first_row, first_row + len(arrivals))
    return Columns.of(slots, [time for _, time, _ in arrivals], [value for _, _, value in arrivals], rows)


@dataclass
class Outputs:
    """What came out, with the number of the arrival that caused it."""

    events: list[tuple[int, bytes]] = field(default_factory=list)
    rejects: list[tuple[int, str, str]] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)

    @property
    def data(self) -> list[dict[str, Any]]:
        """The events as any JSON reader sees them."""
        return [json.loads(encoded) for _, encoded in self.events]

    @property
    def kinds(self) -> list[str]:
        return [event["type"].removeprefix("tocsin.anomaly.") for event in self.data]


def run(start: Detector, arrivals: Sequence[Arrival], cuts: Iterable[int] = (), restore: Iterable[int] = ()) -> Outputs:
    """Feed a stream, cut into batches at `cuts`; at each of `restore` the detector dies and a new one goes on."""
    now, out, restore = start, Outputs(), set(restore)
    bounds = sorted({0, len(arrivals), *cuts, *restore})
    for begin, end in pairwise(bounds):
        if begin in restore:
            out.counts.add(now.counts)
            now = reborn(now)
        result = now.accept(columns(now, arrivals[begin:end]))
        assert len(result.events) == len(result.event_rows)
        assert all(0 <= row < end - begin for row in result.event_rows)
        assert all(0 <= reject.row < end - begin for reject in result.rejects)
        out.events += [(begin + r, events.encode(e)) for r, e in zip(result.event_rows, result.events, strict=True)]
        out.rejects += [(begin + reject.row, reject.reason, reject.detail) for reject in result.rejects]
    out.counts.add(now.counts)
    return out


def reborn(old: Detector) -> Detector:
    """Return a fresh detector with the state of the old one, taken through bytes and in another order."""
    blobs = snapshot.pack(old, np.arange(len(old.index.names), dtype=np.int32))
    new = Detector(old.config, old.model, old.model_ref, calibration=old.calibration)
    restored = snapshot.unpack(new, dict(sorted(blobs.items(), reverse=True)))
    assert restored.series == len(blobs)
    assert not restored.refused
    assert not restored.recalibrating
    return new


# -- the reference ----------------------------------------------------------------------------------------------------


@dataclass
class _Incident:
    id: str
    opened: int
    severity: int = 0
    normal_run: int = 0
    anomalies: int = 0
    last: int = 0
    peak: tuple[float, int, float] = (0.0, 0, 0.0)  # ratio, time, value


@dataclass
class _Series:
    spot: Spot
    interval: int
    phase: int | None = None
    held: dict[int, float] = field(default_factory=dict)
    begin: int = 0  # first cell of the window
    newest: int | None = None
    origin: float = 0.0
    seen: dict[int, np.float32] = field(default_factory=dict)
    actual: dict[int, float | None] = field(default_factory=dict)
    learned: dict[int, bool] = field(default_factory=dict)
    steps: int = 0
    step_mean: float = 0.0
    first_score: int | None = None
    incident: _Incident | None = None


SEVERITIES = ("none", "warning", "major", "critical")


class Reference:
    """The detector once more, a point at a time and a dict per series, in the order in which the design tells it.

    It shares the forecaster, the threshold (one row of its own for each series) and the inference of the interval with
    the detector, and nothing else.
    """

    def __init__(self, settings: DetectorConfig, model: Forecaster, model_ref: str = MODEL) -> None:
        self.config = settings
        self.model = model
        self.model_ref = model_ref
        self.series: dict[str, _Series] = {}
        self.counts = Counts()
        self.events: list[tuple[int, dict[str, Any]]] = []
        self.too_late: list[int] = []

    def take(self, arrivals: Sequence[Arrival]) -> None:
        for row, (name, time, value) in enumerate(arrivals):
            self.counts.points += 1
            if math.isnan(value):
                self.counts.missing += 1
                continue
            if name not in self.series:
                self.series[name] = _Series(Spot(self.config.pot, 1), self.config.interval_ms)
            one = self.series[name]
            if one.interval:
                if one.phase is None:
                    one.phase = time % one.interval
                self._place(name, one, row, time, value)
            else:
                self.counts.duplicates += time in one.held
                one.held[time] = value
                if len(one.held) == 8:
                    interval, phase = grid.infer_interval(np.array([sorted(one.held)]))
                    one.interval, one.phase = int(interval[0]), int(phase[0])
                    for held in sorted(one.held):
                        self._place(name, one, row, held, one.held[held])
                    one.held = {}

    def _place(self, name: str, one: _Series, row: int, time: int, value: float) -> None:
        assert one.phase is not None
        cell = (time - one.phase + one.interval // 2) // one.interval
        if one.newest is None or cell - one.newest - 1 > self.model.window:
            self.counts.gaps += one.newest is not None
            one.begin, one.newest, one.origin = cell, cell - 1, value
            one.seen, one.actual, one.learned = {}, {}, {}
        if cell > one.newest:
            for missing in range(one.newest + 1, cell):
                self._complete(one, missing)
            self._observe(name, one, row, cell, time, value)
        elif cell < one.begin or one.newest - cell >= self.model.window:
            self.counts.too_late += 1
            self.too_late.append(row)
        else:
            if cell == one.newest:
                self.counts.duplicates += 1
            else:
                self.counts.late += 1
            flagged = one.actual[cell] is not None and not one.learned[cell]
            one.actual[cell] = value
            if not flagged:
                one.seen[cell], one.learned[cell] = np.float32(value - one.origin), True

    def _forecast(self, one: _Series, cell: int) -> tuple[float, float] | None:
        if cell - one.begin < self.model.window:
            return None
        history = [float(one.seen[c]) + one.origin for c in range(cell - self.model.window, cell)]
        learned = [one.learned[c] for c in range(cell - self.model.window, cell)]
        usual = one.step_mean if one.steps >= 8 else math.nan
        forecast = self.model.forecast(np.array(history).reshape(1, -1, 1), np.array([[usual]]), np.array([learned]))
        return float(forecast.expected[0, 0]), float(forecast.spread[0, 0])

    def _within(self, one: _Series, cell: int, expected: float) -> float:
        """What completes the cell, relative to the origin: no further than the window has been."""
        history = [float(one.seen[c]) + one.origin for c in range(cell - self.model.window, cell)]
        return min(max(expected, min(history)), max(history)) - one.origin

    def _complete(self, one: _Series, cell: int) -> None:
        forecast = self._forecast(one, cell)
        one.seen[cell] = one.seen[cell - 1] if forecast is None else np.float32(self._within(one, cell, forecast[0]))
        one.actual[cell], one.learned[cell], one.newest = None, False, cell
        self.counts.completed += forecast is not None

    def _observe(self, name: str, one: _Series, row: int, cell: int, time: int, value: float) -> None:
        forecast, before = self._forecast(one, cell), range(cell - self.model.window, cell)
        ratio = 0.0  # of a flagged point
        if forecast is not None:
            arrived = sum(one.actual[c] is not None for c in before)
            if arrived / self.model.window >= self.config.min_observed:
                completed = sum(not one.learned[c] for c in before)
                ratio = self._judge(name, one, row, time, value, forecast, completed)
        seen = value - one.origin
        if forecast is not None and ratio:
            if ratio <= self.config.follow_ratio:
                seen = forecast[0] + (value - forecast[0]) / ratio - one.origin
            else:
                seen = self._within(one, cell, forecast[0])
        one.seen[cell] = np.float32(seen)
        if not ratio and one.learned.get(cell - 1, False):
            one.steps = min(one.steps + 1, 10_000)
            one.step_mean += (abs(float(one.seen[cell]) - float(one.seen[cell - 1])) - one.step_mean) / one.steps
        one.actual[cell], one.learned[cell], one.newest = value, not ratio, cell

    def _judge(
        self,
        name: str,
        one: _Series,
        row: int,
        time: int,
        value: float,
        forecast: tuple[float, float],
        completed: int,
    ) -> float:
        expected, spread = forecast
        score = float(np.float32(min(abs(value - expected) / spread, 1e38)))
        if one.first_score is None:
            one.first_score = time
        may_start = time - one.first_score >= self.config.warmup_ms
        step = one.spot.step(np.array([0]), np.array([score]), np.array([may_start]))
        self.counts.scored += 1
        outcome, threshold, p = int(step.outcome[0]), float(step.threshold[0]), float(step.probability[0])
        if outcome == Outcome.WARMING:
            return 0.0
        anomalous, incident = outcome == Outcome.ANOMALY, one.incident
        q, policy = self.config.pot.q, self.config.incidents
        severity = 0 if not anomalous else 3 if p <= q / 100 else 2 if p <= q / 10 else 1
        ratio = min(score / threshold, 1e9) if threshold > 1e-200 else (1e9 if score > 0 else 0.0)
        kind = ""
        if not anomalous:
            if incident is None:
                return 0.0
            incident.normal_run += 1
            if incident.normal_run == policy.recover_after:
                kind, one.incident = "resolved", None
        elif incident is None:
            incident = one.incident = _Incident(_hash(name, time, self.model_ref), time)
            kind = "opened"
        elif time - incident.opened >= policy.accept_after_ms:
            kind, one.incident = "accepted", None
        elif severity > incident.severity:
            kind = "updated"
        assert incident is not None
        if anomalous:
            incident.anomalies += 1
            incident.normal_run = 0
            incident.severity = max(incident.severity, severity)
            incident.last = time
            if ratio > incident.peak[0]:
                incident.peak = (ratio, time, value)
        if kind == "accepted":
            for c, actual in one.actual.items():
                if actual is not None:
                    one.seen[c], one.learned[c] = np.float32(actual - one.origin), True
        self.counts.flagged += anomalous and kind != "accepted"
        if kind:
            self.counts.events += 1
            self.events.append((row, self._event(name, kind, time, incident, value, forecast, score, step, completed)))
        return ratio if anomalous and kind != "accepted" else 0.0

    def _event(
        self,
        name: str,
        kind: str,
        time: int,
        incident: _Incident,
        value: float,
        forecast: tuple[float, float],
        score: float,
        step: Any,
        completed: int,
    ) -> dict[str, Any]:
        expected, spread = forecast
        threshold = float(step.threshold[0])
        width = threshold * spread
        ratio = min(score / threshold, 1e9) if threshold > 1e-200 else (1e9 if score > 0 else 0.0)
        severity = SEVERITIES[incident.severity]
        data = {
            "kpi": name,
            "incident": incident.id,
            "severity": severity,
            "model": self.model_ref,
            "opened": iso(incident.opened),
            "anomalies": incident.anomalies,
            "value": value,
            "expected": like(width, expected),
            "lower": like(width, expected - width),
            "upper": like(width, expected + width),
            "score": six(score),
            "threshold": six(threshold),
            "ratio": six(ratio),
            "probability": six(max(float(step.probability[0]), 1e-12)),
            "window": {"cells": self.model.window, "completed": completed},
        }
        if kind in ("resolved", "accepted"):
            data["reason"] = "recovered" if kind == "resolved" else "accepted"
            data["last_anomaly"] = iso(incident.last)
            data["duration_s"] = (time - incident.opened) / 1000
            at, ms, peak = incident.peak
            data["peak"] = {"time": iso(ms), "value": peak, "ratio": six(at)}
        public = "resolved" if kind == "accepted" else kind
        return {
            "specversion": "1.0",
            "id": f"{incident.id}-{public}" + (f"-{severity}" if kind == "updated" else ""),
            "source": self.config.source,
            "type": f"tocsin.anomaly.{public}",
            "subject": name,
            "time": iso(time),
            "datacontenttype": "application/json",
            "partitionkey": name,
            "data": data,
        }


def _hash(name: str, opened: int, model_ref: str) -> str:
    return hashlib.blake2b(f"{name}\0{opened}\0{model_ref}".encode(), digest_size=8).hexdigest()


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


# -- streams ----------------------------------------------------------------------------------------------------------


def normal_points(n: int, *, name: str = "a", start: int = T0, interval: int = MINUTE, seed: int = 0) -> list[Arrival]:
    values = np.random.default_rng(seed).normal(10.0, 1.0, n)
    return [(name, start + i * interval, float(v)) for i, v in enumerate(values)]


EDITS = (
    *("spike", "shift", "ramp", "null", "drop", "gap", "long gap"),
    *("repeat", "same cell", "late", "too late", "jitter"),
)


@st.composite
def series(draw: st.DrawFn, name: str = "a", most: int = 100) -> list[Arrival]:
    """One KPI with all that can happen to it; in order of arrival."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    interval = draw(st.sampled_from([MINUTE, 1000, 7_000, 1, 3_600_000]))
    mean, sd = draw(st.sampled_from([(0.0, 1.0), (3e9, 1e6), (5.0, 0.0), (-1e-3, 1e-4), (0.0, 0.0)]))
    values = mean + sd * rng.normal(size=draw(st.integers(most // 2, most) | st.integers(1, most)))
    points = [(T0 + i * interval, float(v)) for i, v in enumerate(values)]
    for _ in range(draw(st.integers(0, 8))):
        what, at = draw(st.sampled_from(EDITS)), len(points) - 1 - draw(st.integers(0, len(points) - 1))
        time, value = points[at]
        far = max(sd, abs(mean) / 100, 1e-3) * draw(st.sampled_from([3.0, 30.0, -1000.0]))
        if what == "spike":
            points[at] = (time, value + far)
        elif what == "shift":
            length = draw(st.integers(2, 50))
            points[at : at + length] = [(t, v + far) for t, v in points[at : at + length]]
        elif what == "ramp":
            size = max(sd, abs(mean) / 100, 1e-3)
            points[at : at + 5] = [(t, v + size * 8.0 ** (k + 1)) for k, (t, v) in enumerate(points[at : at + 5])]
        elif what == "null":
            points[at] = (time, math.nan)
        elif what == "drop" and len(points) > 1:
            del points[at]
        elif what in ("gap", "long gap"):
            cells = draw(st.integers(1, 9) if what == "gap" else st.integers(8, 30))
            points[at:] = [(t + cells * interval, v) for t, v in points[at:]]
        elif what == "repeat":
            points.insert(at + 1 + draw(st.integers(0, 3)), (time, value + far))
        elif what == "same cell":
            points.insert(at + 1, (time + interval // 4, value + far))
        elif what == "late":
            points.insert(at + draw(st.integers(1, 12)), points.pop(at))
        elif what == "too late":
            points.insert(at + 1, (time - interval * draw(st.integers(9, 50)), value))
        elif what == "jitter":
            points = [(t + int(rng.integers(-interval // 5, interval // 5 + 1)), v) for t, v in points]
    return [(name, time, value) for time, value in points]


@st.composite
def streams(draw: st.DrawFn, names: Sequence[str] = ("a", "b", "c"), most: int = 100) -> list[Arrival]:
    """Up to three KPIs, shuffled together; each keeps its own order."""
    several = [draw(series(name, most)) for name in names[: draw(st.integers(1, len(names)))]]
    order = [i for i, one in enumerate(several) for _ in one]
    np.random.default_rng(draw(st.integers(0, 2**32 - 1))).shuffle(order)
    queues = [iter(one) for one in several]
    return [next(queues[i]) for i in order]
