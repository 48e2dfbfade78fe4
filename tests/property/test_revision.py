"""Late points: what they prove wrong is corrected, until it is told as if every point had come in its time."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import MINUTE, T0, Arrival, Between, Record, Setup, config, mixed, records, run, until_reached
from tests.reference import Reference

W = 9
LATENESS = 3  # cells: the most that a window of 9 allows
places = st.sets(st.integers(1, 300), max_size=10)
deaths = st.sets(st.integers(1, 300), max_size=6)
seeds = st.integers(0, 2**32 - 1)


@st.composite
def correcting(draw: st.DrawFn, *, any_grid: bool = True) -> Setup:
    """A detector whose KPIs correct their events."""
    setup = config(
        interval_ms=draw(st.sampled_from([0, MINUTE])) if any_grid else MINUTE,
        lateness_ms=draw(st.integers(1, LATENESS)) * MINUTE if any_grid else LATENESS * MINUTE,
        direction=draw(st.sampled_from([0, 0, 1])),
        least_deviation=draw(st.sampled_from([0.0, 0.0, 0.0, 1.0])),
        drift=draw(st.sampled_from([0, 0, 40])),
        open_after=draw(st.sampled_from([1, 1, 2])),
        recover_after=draw(st.integers(1, 3)),
        recover_ratio=draw(st.sampled_from([1.0, 1.0, 0.5])),
        accept_after_ms=draw(st.sampled_from([8, 40])) * MINUTE,
        cooldown_ms=draw(st.sampled_from([0, 0, 10])) * MINUTE,
        max_alarms=draw(st.sampled_from([1000, 1000, 6])),
        follow_ratio=draw(st.sampled_from([1.0, 3.0])),
    )
    muted = draw(st.sampled_from([(), (), (Between(T0 + 60 * MINUTE, T0 + 70 * MINUTE),)]))
    return replace(setup, rules=tuple(replace(rule, maintenance=muted) for rule in setup.rules))


@st.composite
def late(draw: st.DrawFn) -> list[Record]:
    return draw(mixed([draw(records(name, delays=(1, 3))) for name in ("a", "b")[: draw(st.integers(1, 2))]]))


def test_corrections_equal_the_reference_that_goes_back() -> None:
    told: Counter[str] = Counter()

    @settings(max_examples=60, deadline=None, database=None)
    @given(setup=correcting(), stream=late())
    def compare(setup: Setup, stream: list[Record]) -> None:
        out = run(setup.detector(), stream)
        reference = Reference(setup.config, setup.rules, setup.served)
        reference.take(stream)
        assert out.events == reference.events
        assert out.counts == reference.counts
        check_ids(out.data)
        told.update(kind + event["data"].get("reason", "") for kind, event in zip(out.kinds, out.data, strict=True))

    wanted = {"opened", "updated", "resolvedrecovered", "resolvedaccepted", "retracted", "correctedrecovered"}
    until_reached(compare, lambda: wanted - set(told))


def check_ids(data: Sequence[dict[str, Any]]) -> None:
    """No event takes the id of another one, and what is corrected is what stands."""
    published: set[str] = set()
    superseded: set[str] = set()
    for event in data:
        assert event["id"] not in published
        published.add(event["id"])
        before = event["data"].get("supersedes")
        assert (before is not None) == (event["type"].split(".")[-1] in ("corrected", "retracted"))
        if before is not None:
            assert before in published
            assert before not in superseded, "an event is corrected once; then its correction is"
            superseded.add(before)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(setup=correcting(), stream=late(), cuts=places, deaths=deaths)
def test_cuts_and_restarts_change_no_correction(
    setup: Setup, stream: list[Record], cuts: set[int], deaths: set[int]
) -> None:
    within = range(1, len(stream))
    cut = run(setup.detector(), stream, cuts.intersection(within), deaths.intersection(within))
    assert cut == run(setup.detector(), stream)


# -- as if every point had come in its time ---------------------------------------------------------------------------


@st.composite
def in_order(draw: st.DrawFn) -> list[Arrival]:
    """A KPI on its grid, with spikes, shifts and gaps that leave something of the window."""
    rng = np.random.default_rng(draw(seeds))
    n = draw(st.integers(60, 150))
    values = rng.normal(10, 1, n)
    values[rng.random(n) < draw(st.sampled_from([0.02, 0.1]))] += 30
    for begin in rng.integers(40, n, draw(st.integers(0, 2))):
        values[begin : begin + rng.integers(2, 25)] += 80
    minute = np.arange(n) + rng.choice([0] * 19 + [1, 4], n).cumsum()
    return [("a", T0 + int(m) * MINUTE, float(v)) for m, v in zip(minute, values, strict=True)]


def known(data: Sequence[dict[str, Any]]) -> dict[str, tuple[Any, ...]]:
    """What a subscriber knows of each incident that stands, once it has read all events."""
    stands: dict[str, tuple[str, dict[str, Any]]] = {}  # by id: what it says first of all, and how
    for event in data:
        what = re.sub(r"-r\d+$", "", event["id"]).split("-", 1)[1]
        stands.pop(event["data"].get("supersedes", ""), None)
        if event["type"].endswith("retracted"):
            gone = event["data"]["incident"]
            stands = {id_: said for id_, said in stands.items() if said[1]["data"]["incident"] != gone}
        else:
            stands[event["id"]] = (what, event)
    incidents: dict[str, dict[str, Any]] = {}
    for what, event in stands.values():
        one = incidents.setdefault(event["data"]["incident"], {"severity": 0})
        severity = ("", "warning", "major", "critical").index(event["data"]["severity"])
        one["severity"] = max(one["severity"], severity)
        if what == "opened":
            one["opened"] = (event["time"], event["data"]["opened"], event["data"]["severity"])
        if "reason" in event["data"]:
            one["ended"] = (event["time"], event["data"]["reason"])
    return {id_: (one.get("opened"), one["severity"], one.get("ended")) for id_, one in incidents.items()}


def test_shuffled_within_the_lateness_it_comes_to_the_same() -> None:
    told: Counter[str] = Counter()

    @settings(max_examples=60, deadline=None, database=None)
    @given(setup=correcting(any_grid=False), points=in_order(), seed=seeds, cuts=places)
    def compare(setup: Setup, points: list[Arrival], seed: int, cuts: set[int]) -> None:
        delay = np.random.default_rng(seed).uniform(0, LATENESS * MINUTE, len(points))
        delay[:W] = 0  # the window begins with the first point, and holds nothing older
        order = np.argsort(np.array([time for _, time, _ in points]) + delay, kind="stable")
        shuffled = [points[i] for i in order]
        expected = run(setup.detector(), points)
        found = run(setup.detector(), shuffled, cuts.intersection(range(1, len(points))))
        assert found.rejects == []
        assert known(found.data) == known(expected.data)
        check_ids(found.data)
        told.update(found.kinds)

    wanted = ("opened", "resolved", "corrected", "retracted")
    until_reached(compare, lambda: [what for what in wanted if told[what] <= 5])
