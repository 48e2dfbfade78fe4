"""Entities, one series of several metrics each, and KPIs that wait: order within the lateness changes nothing."""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from stream.detector import Served
from tests.helpers import MINUTE, T0, Halfway, Persistence, Record, Setup, mixed, records, run, setups, until_reached
from tests.reference import Reference

METRICS = ("cpu", "mem", "net")
PAIR = Served("pair@1", Halfway(features=2), METRICS[:2])  # reads the point
TRIPLE = Served("triple@1", Persistence(window=7, features=3), METRICS)
SINGLE = Served("persistence@1", Persistence())
places = st.sets(st.integers(1, 600), max_size=12)
deaths = st.sets(st.integers(1, 600), max_size=6)
seeds = st.integers(0, 2**32 - 1)


@st.composite
def watched(draw: st.DrawFn) -> Setup:
    """A rule for entities of three metrics, another for those of two, and others for KPIs."""
    first = draw(setups(st.just(TRIPLE)))
    second = draw(setups(st.just(PAIR)))
    rest = draw(setups(st.just(SINGLE)))
    rules = (
        dataclasses.replace(first.rules[0], match=("m*",), model=TRIPLE.ref, watch=True),
        dataclasses.replace(second.rules[0], match=("n",), model=PAIR.ref, watch=True),
        *rest.rules,
    )
    return Setup(first.config, rules, (TRIPLE, PAIR, *rest.served))


@st.composite
def several(draw: st.DrawFn, most: int = 100) -> list[Record]:
    parts = [draw(records("m1", 3, most))]
    if draw(st.booleans()):
        parts.append(draw(records("n", 2, most)))
    if draw(st.booleans()):
        parts.append(draw(records("m", 0, most)))
    return draw(mixed(parts))


def test_entities_equal_the_point_by_point_reference() -> None:
    told: Counter[str] = Counter()
    parts: Counter[int] = Counter()

    @settings(max_examples=70, deadline=None, database=None)
    @given(setup=watched(), stream=several())
    def compare(setup: Setup, stream: list[Record]) -> None:
        out = run(setup.detector(), stream)
        reference = Reference(setup.config, setup.rules, setup.served)
        reference.take(stream)
        assert out.events == reference.events
        assert [row for row, _, _ in out.rejects] == reference.too_late
        assert out.counts == reference.counts
        for event, kind in zip(out.data, out.kinds, strict=True):
            if event["subject"] in ("m1", "n"):
                told.update([kind + event["data"].get("reason", "")])
                parts.update([len(event["data"].get("features", []))])

    wanted = {"opened", "resolvedrecovered", "resolvedaccepted", "kpi.silent", "kpi.resumed"}
    until_reached(compare, lambda: wanted - set(told) | {f"{n} features" for n in (1, 2) if not parts[n]})
    assert set(told) <= {*wanted, "updated"}, told  # an entity waits, and has nothing to correct


@settings(max_examples=35, deadline=None, derandomize=True)
@given(setup=watched(), stream=several(), cuts=places, deaths=deaths)
def test_cuts_and_restarts_change_no_byte(setup: Setup, stream: list[Record], cuts: set[int], deaths: set[int]) -> None:
    whole = run(setup.detector(), stream)
    within = range(1, len(stream))
    cut = run(setup.detector(), stream, cuts.intersection(within), deaths.intersection(within))
    assert cut == whole


@settings(max_examples=8, deadline=None, derandomize=True)
@given(setup=watched(), stream=several(most=50), restart=st.booleans())
def test_one_record_at_a_time_changes_no_byte(setup: Setup, stream: list[Record], restart: bool) -> None:
    every = range(1, len(stream))
    assert run(setup.detector(), stream, every, every if restart else ()) == run(setup.detector(), stream)


# -- order within the lateness ----------------------------------------------------------------------------------------

LATENESS = 3  # cells; a third of the window, as much as is allowed


@st.composite
def in_order(draw: st.DrawFn) -> list[tuple[str, int, int, float]]:
    """Entities and a KPI, metric by metric, each value once and on the grid, by time."""
    points: list[tuple[str, int, int, float]] = []
    for name, features in (("m1", 3), ("n", 2), ("k", 0)):
        rng = np.random.default_rng(draw(seeds))
        n = draw(st.integers(40, 100))
        values = rng.normal(10, 1, (n, max(features, 1)))
        values[rng.random(values.shape) < 0.05] += 50
        begin = int(rng.integers(20, n))
        values[begin : begin + int(rng.integers(2, 10))] += 80
        there = rng.random(values.shape) >= draw(st.sampled_from([0.0, 0.1, 0.3]))
        skipped = rng.choice([0] * 9 + [1, 4, 20], n)
        there[:12], skipped[:12] = True, 0  # or another interval would be found, and the points lie beside its grid
        minute = np.arange(n) + skipped.cumsum() * draw(st.booleans())
        for i, f in zip(*np.nonzero(there), strict=True):
            points.append((name, int(minute[i]), int(f) if features else -1, float(values[i, f])))
    return sorted(points, key=lambda point: (point[1], point[0]))


def as_records(points: Iterable[tuple[str, int, int, float]]) -> list[Record]:
    """Metric by metric."""
    return [
        (name, T0 + minute * MINUTE, value if feature < 0 else {feature: value})
        for name, minute, feature, value in points
    ]


def joined(stream: Sequence[Record], rng: np.random.Generator, share: float) -> list[Record]:
    """Put metrics of one time that follow each other into one record, this share of them."""
    found: list[Record] = []
    for name, time, value in stream:
        before = found[-1] if found else None
        if before is not None and before[:2] == (name, time) and isinstance(value, Mapping) and rng.random() < share:
            assert isinstance(before[2], Mapping)
            found[-1] = (name, time, {**before[2], **value})
        else:
            found.append((name, time, value))
    return found


def waiting(draw: st.DrawFn) -> Setup:
    """Every series waits, as long as `LATENESS`; what is silent depends on the order of arrival, and is left out."""
    setup, interval_ms = draw(watched()), draw(st.sampled_from([0, MINUTE]))
    rules = tuple(
        dataclasses.replace(
            rule,
            match=(glob,),
            model=served.ref,
            watch=True,
            policy=dataclasses.replace(
                rule.policy, lateness_ms=LATENESS * MINUTE, wait=True, silent_after=0, interval_ms=interval_ms
            ),
        )
        for rule, glob, served in zip(setup.rules[:3], ("m*", "n", "k"), (TRIPLE, PAIR, SINGLE), strict=True)
    )
    return Setup(setup.config, rules, (TRIPLE, PAIR, SINGLE))


patient = st.composite(waiting)()


def test_shuffling_within_the_lateness_changes_no_event() -> None:
    told: Counter[str] = Counter()

    @settings(max_examples=60, deadline=None, database=None)
    @given(setup=patient, points=in_order(), seed=seeds, share=st.sampled_from([0.0, 0.5, 1.0]), cuts=places)
    def compare(
        setup: Setup, points: list[tuple[str, int, int, float]], seed: int, share: float, cuts: set[int]
    ) -> None:
        rng = np.random.default_rng(seed)
        expected = run(setup.detector(), joined(as_records(points), rng, 1.0))
        arrives = np.array([point[1] for point in points]) + rng.uniform(0, LATENESS, len(points))
        shuffled = joined(as_records(points[i] for i in np.argsort(arrives, kind="stable")), rng, share)
        found = run(setup.detector(), shuffled, cuts.intersection(range(1, len(shuffled))))
        assert found.by_series() == expected.by_series()
        assert found.rejects == expected.rejects == []
        assert found.counts.late == 0
        told.update(event["subject"] + kind for event, kind in zip(found.data, found.kinds, strict=True))

    until_reached(compare, lambda: [name for name in ("m1", "n", "k") if told[name + "opened"] <= 5])


@settings(max_examples=20, deadline=None, derandomize=True)
@given(setup=patient, points=in_order(), seed=seeds, share=st.sampled_from([0.0, 0.3, 0.8]))
def test_metrics_may_come_together_in_parts_or_one_by_one(
    setup: Setup, points: list[tuple[str, int, int, float]], seed: int, share: float
) -> None:
    together = joined(as_records(points), np.random.default_rng(0), 1.0)
    in_parts = joined(as_records(points), np.random.default_rng(seed), share)
    assert run(setup.detector(), in_parts).by_series() == run(setup.detector(), together).by_series()


@settings(max_examples=20, deadline=None, derandomize=True)
@given(setup=watched(), stream=several(), absent=places)
def test_a_null_says_no_more_than_its_absence(setup: Setup, stream: list[Record], absent: set[int]) -> None:
    nulls: list[Record] = []
    for i, (name, time, value) in enumerate(stream):
        if isinstance(value, Mapping):
            gone = {f for f in value if (i + f) in absent}
            nulls.append((name, time, {f: math.nan if f in gone else x for f, x in value.items()}))
        else:
            nulls.append((name, time, math.nan if i in absent else value))
    present: list[Record] = []
    for name, time, value in nulls:
        if isinstance(value, Mapping):
            there = {f: x for f, x in value.items() if not math.isnan(x)}
            if there:
                present.append((name, time, there))
        elif not math.isnan(value):
            present.append((name, time, value))
    with_nulls, without = run(setup.detector(), nulls), run(setup.detector(), present)
    assert [event for _, event in with_nulls.events] == [event for _, event in without.events]
    assert [why for _, *why in with_nulls.rejects] == [why for _, *why in without.rejects]
