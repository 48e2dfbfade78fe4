"""What the tests of the core share: a cheap forecaster, detectors made of it, streams with all that can happen."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
from hypothesis import seed
from hypothesis import strategies as st

from models.base import Assessment, Context, Float64, Model, residual
from models.pot import PotConfig
from stream import events, snapshot
from stream.columns import BoolArray, Columns, Float64Array, Int64Array
from stream.detector import Counts, Detector, DetectorConfig, Served
from stream.policy import Policy, Rule

T0 = 1_469_376_000_000  # 2016-07-24 16:00:00 UTC
MINUTE = 60_000
MODEL = "persistence@1"
# So small that a hundred points are enough for thresholds, excesses, alarms and a full ring.
SMALL_POT = PotConfig(q=0.05, level=0.75, min_scores=20, min_excess=10, max_excess=16)

Arrival = tuple[str, int, float]  # series, ms, value (NaN: missing)
Record = tuple[str, int, float | Mapping[int, float]]  # the same, or an entity with the values of some of its features


@dataclass(frozen=True)
class Persistence:
    """Expects the last value again; one unit of score is the range of the window. No sum: exact in any batch."""

    window: int = 9
    features: int = 1
    family: str = "persistence"
    reads_point: ClassVar[bool] = False
    looks_ahead: ClassVar[bool] = False
    parameters: ClassVar[int] = 0

    @property
    def history(self) -> int:
        return self.window

    @property
    def neutral(self) -> Float64:
        return np.arange(float(self.features))

    def assess(self, context: Context) -> Assessment:
        expected, spread = self.expected(context), self.spread(context)
        return Assessment(expected, spread, residual(context.value, expected, spread), expected)

    def expected(self, context: Context) -> Float64:
        last: Float64 = context.history[:, -1].copy()
        return last

    def spread(self, context: Context) -> Float64:
        history = context.history
        assert history.shape[1:] == (self.history, self.features)
        assert np.isfinite(history).all(), "the window of a model has no holes"
        spread = history.max(axis=1) - history.min(axis=1)
        assert context.usual_step.shape == spread.shape
        assert context.learned.shape == history.shape
        assert context.time_ms.shape == (len(history),)
        spread = (spread + np.nan_to_num(context.usual_step)) * (1 + context.learned.sum(axis=1) / 8)
        floor = np.maximum(np.abs(history).max(axis=1) * 2.0**-20, 1e-100)
        unit: Float64 = np.maximum(spread, floor)
        return unit


@dataclass(frozen=True)
class Halfway(Persistence):
    """Reads the point: expects what lies halfway between it and what was said at the one before, if that is known."""

    family: str = "halfway"
    reads_point: ClassVar[bool] = True
    looks_ahead: ClassVar[bool] = True

    @property
    def history(self) -> int:
        return self.window - 1

    def ahead(self, history: Float64) -> Float64:
        ahead: Float64 = (3 * history[:, -1] + history[:, -2]) / 4
        return ahead

    def assess(self, context: Context) -> Assessment:
        before, value = self.ahead(context.history), context.value
        if context.ahead is not None:
            kept = ~np.isnan(context.ahead)
            np.testing.assert_array_equal(context.ahead[kept], before[kept])
        missing = np.isnan(value)
        point = np.where(missing, before, value)
        expected, spread = (before + point) / 2, self.spread(context)
        slack = np.where(context.time_ms % 7 == 0, 0.25, 0.0)[:, None] * np.ones_like(spread)
        distance = np.abs(residual(value, expected, spread))
        error = np.sign(point - expected) * np.sqrt(np.maximum(distance * distance - slack, 0.0))
        ahead = np.where(missing, np.nan, (3 * point + context.history[:, -1]) / 4)
        return Assessment(expected, spread, np.where(missing, 0.0, error), before, slack, ahead)


@dataclass(frozen=True)
class Between:
    """A maintenance window."""

    begin_ms: int
    end_ms: int

    def active(self, timestamp_ms: Int64Array) -> BoolArray:
        return (self.begin_ms <= timestamp_ms) & (timestamp_ms < self.end_ms)


@dataclass(frozen=True)
class Setup:
    """All that a detector is made of."""

    config: DetectorConfig
    rules: tuple[Rule, ...]
    served: tuple[Served | None, ...]  # None of a rule that watches nothing

    def detector(self) -> Detector:
        return Detector(self.config, self.rules, self.served)


def config(
    *,
    pot: PotConfig = SMALL_POT,
    max_alarms: int = 1000,
    min_observed: float = 0.2,
    follow_ratio: float = 3.0,
    model: Model | None = None,
    model_ref: str = MODEL,
    metrics: Sequence[str] = (),
    calibration: Float64Array | None = None,
    **policy: Any,
) -> Setup:
    """Return what makes a detector of one rule for all series; what is not named here is asked of the policy."""
    pot = replace(pot, max_alarms=max_alarms)
    asked = {"q": pot.q, "warmup_ms": 0, "accept_after_ms": 30 * MINUTE, **policy}
    return Setup(
        DetectorConfig(pot, min_observed=min_observed, follow_ratio=follow_ratio),
        (Rule(policy=Policy(**asked)),),
        (Served(model_ref, model or Persistence(), tuple(metrics), _calibrations(calibration)),),
    )


def detector(
    setup: Setup | None = None,
    model: Model | None = None,
    *,
    model_ref: str = "",
    calibration: Float64Array | None = None,
) -> Detector:
    """Return a detector; what is given besides the setup takes the place of what the setup says for its only rule."""
    setup = setup or config()
    (served,) = setup.served
    assert served is not None
    served = replace(
        served,
        model=model or served.model,
        ref=model_ref or served.ref,
        calibrations=served.calibrations if calibration is None else _calibrations(calibration),
    )
    return Detector(setup.config, setup.rules, (served,))


def _calibrations(scores: Float64Array | None) -> tuple[Float64Array, ...]:
    return () if scores is None else (scores,)


def columns(to: Detector, arrivals: Sequence[Record], first_row: int = 0) -> Columns:
    """Return the arrivals as a batch, a row each."""
    points: list[tuple[int, int, float, int, int]] = []
    for row, (name, time, value) in enumerate(arrivals, first_row):
        if isinstance(value, Mapping):
            entity = to.index.entity(name)
            slot = -1 if entity is None else entity.slot
            assert slot >= 0, f"{name} is no entity of the detector"
            points += [(slot, time, x, row, feature) for feature, x in value.items()]
        else:
            points.append((to.index[name], time, value, row, 0))
    return Columns.of(*zip(*points, strict=True)) if points else Columns.empty()


@dataclass
class Outputs:
    """What came out, with the number of the arrival that caused it."""

    events: list[tuple[int, bytes]] = field(default_factory=list)
    rejects: list[tuple[int, str, str]] = field(default_factory=list)
    evicted: list[str] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)

    @property
    def data(self) -> list[dict[str, Any]]:
        """The events as any JSON reader sees them."""
        return [json.loads(encoded) for _, encoded in self.events]

    @property
    def kinds(self) -> list[str]:
        return [event["type"].removeprefix("tocsin.").removeprefix("anomaly.") for event in self.data]

    def by_series(self) -> dict[str, list[bytes]]:
        """The events of each series, in their order."""
        found: dict[str, list[bytes]] = {}
        for _, encoded in self.events:
            found.setdefault(json.loads(encoded)["subject"], []).append(encoded)
        return found


def run(start: Detector, arrivals: Sequence[Record], cuts: Iterable[int] = (), restore: Iterable[int] = ()) -> Outputs:
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
        out.evicted += result.evicted
        out.rejects += [(begin + reject.row, reject.reason, reject.detail) for reject in result.rejects]
    out.counts.add(now.counts)
    return out


def reborn(old: Detector) -> Detector:
    """Return a fresh detector with the state of the old one, taken through bytes and in another order."""
    blobs = snapshot.pack(old, np.arange(len(old.index.names), dtype=np.int32))
    new = Detector(old.config, old.rules, old.served)
    restored = snapshot.unpack(new, dict(sorted(blobs.items(), reverse=True)))
    assert restored.series == len(blobs)
    assert not restored.refused
    assert not restored.recalibrating
    return new


def iso(ms: int) -> str:
    text = str(np.datetime64(ms, "ms"))
    return text.removesuffix(".000") + "Z"


# -- streams ----------------------------------------------------------------------------------------------------------


def normal_points(n: int, *, name: str = "a", start: int = T0, interval: int = MINUTE, seed: int = 0) -> list[Arrival]:
    values = np.random.default_rng(seed).normal(10.0, 1.0, n)
    return [(name, start + i * interval, float(v)) for i, v in enumerate(values)]


LEVELS = ((0.0, 1.0), (3e9, 1e6), (5.0, 0.0), (-1e-3, 1e-4), (0.0, 0.0))  # mean and standard deviation
EDITS = (
    *("spike", "shift", "ramp", "null", "drop", "gap", "long gap"),
    *("repeat", "same cell", "late", "late spike", "shuffle", "too late", "jitter", "interval"),
)


@st.composite
def series(draw: st.DrawFn, name: str = "a", most: int = 100, edits: Sequence[str] = EDITS) -> list[Arrival]:
    """One KPI with all that can happen to it; in order of arrival."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    interval = draw(st.sampled_from([MINUTE, MINUTE, MINUTE, MINUTE, 1000, 7_000, 1, 3_600_000]))
    mean, sd = draw(st.sampled_from(LEVELS))
    values = mean + sd * rng.normal(size=draw(st.integers(most // 2, most) | st.integers(1, most)))
    points = [(T0 + i * interval, float(v)) for i, v in enumerate(values)]
    for _ in range(draw(st.integers(0, 8))):
        what, at = draw(st.sampled_from(edits)), len(points) - 1 - draw(st.integers(0, len(points) - 1))
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
        elif what == "late spike":
            points[at] = (time, value + far)
            points.insert(at + draw(st.integers(1, 3)), points.pop(at))
        elif what == "shuffle":
            length = draw(st.integers(2, 40))
            block = points[at : at + length]
            order = np.argsort(np.arange(len(block)) + rng.uniform(0, 3, len(block)))
            points[at : at + length] = [block[i] for i in order]
        elif what == "too late":
            points.insert(at + 1, (time - interval * draw(st.integers(9, 50)), value))
        elif what == "jitter":
            points = [(t + int(rng.integers(-interval // 5, interval // 5 + 1)), v) for t, v in points]
        elif what == "interval":
            other = draw(st.sampled_from([5, 2, 3]))
            points[at:] = [(time + (t - time) * other, v) for t, v in points[at:]]
    return [(name, time, value) for time, value in points]


@st.composite
def records(
    draw: st.DrawFn,
    name: str = "m",
    features: int = 0,
    most: int = 150,
    interval: int = MINUTE,
    delays: Sequence[int] = (0, 1, 3, 6),
) -> list[Record]:
    """A KPI (0 features) or an entity where something goes on all the time, but not in the first thirty points.

    Points come late, once more, in parts or not at all, at rates that are drawn; so late ones do hit incidents.
    """
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    width, n = max(features, 1), draw(st.integers(most // 2, most))
    mean, sd = draw(st.sampled_from([LEVELS[0], LEVELS[0], *LEVELS[1:4]]))
    values = mean + sd * rng.normal(size=(n, width))
    size = max(sd, abs(mean) / 100, 1e-3)

    def hit(*rates: float) -> BoolArray:
        at: BoolArray = rng.random((n, width)) < draw(st.sampled_from(rates))
        at[:30] = False
        return at

    spikes = hit(0.03, 0.1, 0.2)
    values[spikes] += size * draw(st.sampled_from([8.0, 30.0, -300.0])) * rng.choice([1.0, 1.0, 4.0], spikes.sum())
    for begin in rng.integers(min(30, n - 1), n, draw(st.integers(0, 3))):
        values[begin : begin + rng.integers(2, 20)] += size * 40
    for begin in rng.integers(min(30, n - 1), n, draw(st.integers(0, 2))):
        growing = size * np.array([6.0, 9.0, 20.0, 60.0])[: n - begin]
        values[begin : begin + 4] += growing[:, None]
    values[hit(0.0, 0.0, 0.05)] = math.nan
    dropped = hit(0.0, 0.0, 0.05, 0.3)
    times = T0 + np.arange(n) * interval
    for begin in rng.integers(min(30, n - 1), n, draw(st.integers(0, 2))):
        times[begin:] += interval * draw(st.sampled_from([1, 3, 9, 20]))
    pace, begin = draw(st.sampled_from([1, 1, 1, 2, 5])), min(35, n - 1)
    times[begin:] = times[begin] + pace * (times[begin:] - times[begin])

    how = draw(st.sampled_from(["whole", "parts", "alone"]))
    arrivals: list[tuple[float, Record]] = []
    delay = interval * draw(st.sampled_from(delays))
    jitter = interval // draw(st.sampled_from([3, 10**9, 10**9]))
    for i in range(n):
        time = int(times[i]) + (int(rng.integers(-jitter, jitter + 1)) if i else 0)
        there = {f: float(values[i, f]) for f in rng.permutation(width).tolist() if not dropped[i, f]}
        parts: list[dict[int, float]] = [there]
        if how == "alone":
            parts = [{f: x} for f, x in there.items()]
        elif how == "parts":
            first = rng.random() < 0.5
            parts = [{f: x for f, x in there.items() if (f % 2 == 0) == (first == k)} for k in (True, False)]
        for part in parts:
            if part:
                late = rng.random() * delay * (i > 10)
                arrivals.append((time + late, (name, time, part if features else part[0])))
    again = rng.random(len(arrivals)) < draw(st.sampled_from([0.0, 0.0, 0.05]))
    for k in np.flatnonzero(again).tolist():
        at, (_, time, value) = arrivals[k]
        other = {f: x + size for f, x in value.items()} if isinstance(value, Mapping) else value + size
        arrivals.append((at + interval * 4 * rng.random(), (name, time, other)))
    return [record for _, record in sorted(arrivals, key=lambda arrival: arrival[0])]


@st.composite
def mixed(draw: st.DrawFn, several: Sequence[Sequence[Record]]) -> list[Record]:
    """Streams shuffled together; each keeps its own order."""
    order = [i for i, one in enumerate(several) for _ in one]
    np.random.default_rng(draw(st.integers(0, 2**32 - 1))).shuffle(order)
    queues = [iter(one) for one in several]
    return [next(queues[i]) for i in order]


@st.composite
def streams(draw: st.DrawFn, names: Sequence[str] = ("a", "b", "c"), most: int = 100) -> list[Arrival]:
    """Up to three KPIs, shuffled together; each keeps its own order."""
    several = [draw(series(name, most) | records(name, 0, most)) for name in names[: draw(st.integers(1, len(names)))]]
    return draw(mixed(several))  # type: ignore[arg-type]  # of KPIs come KPIs


# -- how series are watched -------------------------------------------------------------------------------------------

policies = st.builds(
    Policy,
    interval_ms=st.sampled_from([0] * 5 + [MINUTE] * 4 + [1000]),
    q=st.sampled_from([0.05, 0.05, 0.0625, 0.01]),
    alarms_per_ms=st.sampled_from([0.0, 0.0, 0.02 / MINUTE, 1.0]),
    direction=st.sampled_from([0, 0, 1, -1]),
    least_deviation=st.sampled_from([0.0, 0.0, 0.0, 10.0]),
    least_share=st.sampled_from([0.0, 0.0, 0.0, 0.5]),
    drift=st.sampled_from([0, 0, 40]),
    lateness_ms=st.sampled_from([0, MINUTE, 3 * MINUTE, 100 * MINUTE]),
    wait=st.sampled_from([False, False, True]),
    silent_after=st.sampled_from([0, 1, 5]),
    warmup_ms=st.sampled_from([0, 0, 40_000]),
    open_after=st.sampled_from([1, 1, 2, 3]),
    recover_after=st.integers(1, 4),
    recover_ratio=st.sampled_from([1.0, 0.5, math.inf]),
    accept_after_ms=st.sampled_from([10_000, 5 * MINUTE, 40 * MINUTE]),
    cooldown_ms=st.sampled_from([0, 0, 20 * MINUTE]),
)
GLOBS = (*[("*",)] * 6, ("a*",), ("b", "c"), ("[ab]", "m*"), ("?",), ("A",))
LABELS: tuple[dict[str, str], ...] = ({}, {"team": "payments", "tier": "1"})


@st.composite
def setups(draw: st.DrawFn, served: st.SearchStrategy[Served]) -> Setup:
    """One to three rules, each with a policy and a model of its own."""
    rules = draw(
        st.lists(
            st.builds(
                Rule,
                match=st.sampled_from(GLOBS),
                name=st.sampled_from(["", "web"]),
                watch=st.sampled_from([True] * 6 + [False]),
                policy=policies,
                maintenance=st.sampled_from([(), (), (Between(T0 + 50 * MINUTE, T0 + 70 * MINUTE),)]),
                labels=st.sampled_from(LABELS),
            ),
            min_size=1,
            max_size=3,
        )
    )
    core = DetectorConfig(
        replace(SMALL_POT, max_alarms=draw(st.sampled_from([0, 5, 1000, 1000]))),
        min_observed=draw(st.sampled_from([0.0, 0.2, 0.5])),
        follow_ratio=draw(st.sampled_from([1.0, 3.0])),
    )
    models = [draw(served) for _ in rules]
    return Setup(
        core,
        tuple(replace(rule, model=model.ref) for rule, model in zip(rules, models, strict=True)),
        tuple(model if rule.watch else None for rule, model in zip(rules, models, strict=True)),
    )


def until_reached(test: Callable[[], None], unreached: Callable[[], Iterable[str]], seeds: int = 12) -> None:
    """Run a property with one seed after the other until nothing is left that its examples should reach.

    What one seed draws differs with the version of hypothesis, and some of what is to be reached is rare.
    """
    for number in range(seeds):
        seed(number)(test)()
        if not (left := sorted(unreached())):
            return
    raise AssertionError(f"no example has reached {left}")
