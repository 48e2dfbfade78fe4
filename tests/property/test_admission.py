"""Bounds on the number of series: who gets a place and who loses it follows from the points and their order alone."""

import dataclasses
from collections import Counter

import numpy as np
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from stream.detector import Served
from tests.helpers import MINUTE, T0, Persistence, Record, Setup, run, setups, until_reached
from tests.reference import Reference

SERVED = (Served("persistence@1", Persistence(window=5)), Served("persistence@2", Persistence(window=7)))
PAIR = Served("pair@1", Persistence(window=5, features=2), ("cpu", "mem"))
NAMES = ("a", "b", "c", "d", "a1", "b1", "A")
cuts = st.sets(st.integers(1, 400), max_size=12)
deaths = st.sets(st.integers(1, 400), max_size=6)


@st.composite
def bounded(draw: st.DrawFn) -> Setup:
    """Entities and KPIs, with few places, and quotas of rules."""
    setup = draw(setups(st.sampled_from(SERVED)))
    first = dataclasses.replace(draw(setups(st.just(PAIR))).rules[0], match=("m*",), model=PAIR.ref, watch=True)
    quota = st.sampled_from([0, 0, 1, 2])
    rules = tuple(
        dataclasses.replace(rule, policy=dataclasses.replace(rule.policy, series_max=draw(quota)))
        for rule in (first, *setup.rules)
    )
    config = dataclasses.replace(
        setup.config,
        series_max=draw(st.sampled_from([0, 1, 2, 3, 3, 4])),
        idle_ms=draw(st.sampled_from([0, 2 * MINUTE, 8 * MINUTE, 8 * MINUTE, 30 * MINUTE])),
    )
    return Setup(config, rules, (PAIR, *setup.served))


@st.composite
def bursts(draw: st.DrawFn, most: int = 40) -> list[Record]:
    """Series that send for a while, some more than once, some late, some far behind."""
    arrivals: list[tuple[float, Record]] = []
    for _ in range(draw(st.integers(2, 14))):
        rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        name = draw(st.sampled_from((*NAMES, "m1", "m2")))
        begin, n = draw(st.integers(0, 120)), draw(st.integers(1, most))
        times = T0 + (begin + np.arange(n)) * MINUTE
        behind = draw(st.sampled_from([0, 0, 0, 0, 3, 15, 60])) * MINUTE
        values = rng.normal(10, 1, (n, 2))
        values[rng.random(values.shape) < draw(st.sampled_from([0.0, 0.1]))] += 50
        values[rng.random(values.shape) < draw(st.sampled_from([0.0, 0.0, 0.1]))] = np.nan
        delay = rng.uniform(0, draw(st.sampled_from([0.1, 0.1, 1.0, 4.0])), n) * MINUTE
        for time, value, late in zip(times.tolist(), values.tolist(), delay.tolist(), strict=True):
            entity = name.startswith("m")
            arrivals.append((time + late, (name, time - behind, dict(enumerate(value)) if entity else value[0])))
    return [record for _, record in sorted(arrivals, key=lambda one: one[0])]


def test_one_batch_equals_the_point_by_point_reference() -> None:
    seen: Counter[str] = Counter()

    @settings(max_examples=50, deadline=None, database=None, phases=[Phase.generate])
    @given(setup=bounded(), stream=bursts())
    def compare(setup: Setup, stream: list[Record]) -> None:
        live = setup.detector()
        out, reference = run(live, stream), Reference(setup.config, setup.rules, setup.served)
        reference.take(stream)
        assert out.events == reference.events
        assert out.evicted == reference.evicted
        refused = dict(reference.refused) | dict.fromkeys(reference.too_late, "too_late")
        assert [(row, reason) for row, reason, _ in out.rejects] == sorted(refused.items())
        assert out.counts == reference.counts
        if setup.config.series_max:
            assert live.places.taken <= setup.config.series_max
            assert sum(group.rows for group in live.groups) <= 4 * setup.config.series_max * len(live.groups)
        seen.update(reason for _, reason, _ in out.rejects)
        returned = set(out.evicted) & {live.index.names[slot] for slot in np.flatnonzero(live.row_of >= 0)}
        seen.update({"evicted": len(out.evicted), "returned": len(returned)})
        seen.update("told" for event in out.data if event["subject"] in out.evicted and "incident" in event["data"])

    wanted = ("quota", "too_many_series", "evicted", "returned", "told")
    until_reached(compare, lambda: [what for what in wanted if seen[what] <= 3])


@settings(max_examples=40, deadline=None, derandomize=True, phases=[Phase.generate])
@given(setup=bounded(), stream=bursts(), cut=cuts, death=deaths)
def test_cuts_and_restarts_change_no_byte(setup: Setup, stream: list[Record], cut: set[int], death: set[int]) -> None:
    whole = run(setup.detector(), stream)
    within = range(1, len(stream))
    assert run(setup.detector(), stream, cut.intersection(within), death.intersection(within)) == whole


@settings(max_examples=15, deadline=None, derandomize=True, phases=[Phase.generate])
@given(setup=bounded(), stream=bursts(most=20), restart=st.booleans())
def test_one_record_at_a_time_changes_no_byte(setup: Setup, stream: list[Record], restart: bool) -> None:
    every = range(1, len(stream))
    assert run(setup.detector(), stream, every, every if restart else ()) == run(setup.detector(), stream)
