"""Places for series: who is refused and why, who goes, and that nothing is kept of those without a place."""

import dataclasses
import json
from typing import Any

import numpy as np

from stream import snapshot
from stream.detector import Detector
from stream.policy import Rule
from stream.records import decode
from stream.results import Result, Served
from tests.helpers import MINUTE, T0, Arrival, Persistence, Setup, columns, config, normal_points, run

HOUR = 60 * MINUTE


def bounded(most: int, idle_ms: int = HOUR, **policy: Any) -> Setup:
    one = config(interval_ms=MINUTE, **policy)
    return dataclasses.replace(one, config=dataclasses.replace(one.config, series_max=most, idle_ms=idle_ms))


def taken(live: Detector, *points: tuple[str, int]) -> Result:
    """Take points, given as (series, minute), as records from Kafka."""
    records = [json.dumps({"kpi": name, "timestamp": T0 + at * MINUTE, "value": 1}).encode() for name, at in points]
    got, rejects = decode(records, live.index)
    assert not rejects
    return live.accept(got)


def test_a_refusal_names_the_series_and_the_bound() -> None:
    live = bounded(1).detector()
    (reject,) = taken(live, ("a", 0), ("b", 0)).rejects
    assert (reject.row, reject.reason) == (1, "too_many_series")
    assert reject.detail == (
        "the series 'b' is new, and there are 1 in this partition (TOCSIN_SERIES_MAX); none that may go for it is idle"
    )


def test_a_rule_has_a_bound_of_its_own() -> None:
    one = bounded(10, series_max=2)
    rules = (dataclasses.replace(one.rules[0], match=("checkout.*",), name="checkout"), Rule())
    live = Detector(one.config, rules, one.served * 2)
    result = taken(live, ("checkout.a", 0), ("checkout.b", 0), ("checkout.c", 0), ("d", 0), ("e", 0))
    assert [(reject.row, reject.reason) for reject in result.rejects] == [(2, "quota")]
    assert "its rule 'checkout' has the 2 that its `series_max` allows" in result.rejects[0].detail
    assert taken(live, ("d", 90), ("checkout.b", 90), ("checkout.c", 90)).evicted == ["checkout.a"], "one of its own"


def test_the_one_that_has_been_idle_longest_goes() -> None:
    live = bounded(3).detector()
    taken(live, ("c", 0), ("b", 1), ("a", 1), ("a", 2))
    assert taken(live, ("a", 60), ("d", 60)).evicted == [], "an hour is not more than an hour"
    assert taken(live, ("a", 63), ("e", 63), ("f", 63), ("g", 63)).evicted == ["c", "b"]
    assert sorted(live.index.names[slot] for slot in np.flatnonzero(live.row_of >= 0)) == ["a", "e", "f"]


def test_a_series_with_an_incident_that_goes_on_stays() -> None:
    live = bounded(2).detector()
    points: list[Arrival] = normal_points(80)
    points[-1] = ("a", points[-1][1], 500.0)
    assert [event.type for event in live.accept(columns(live, points)).events][-1] == "tocsin.anomaly.opened"
    assert taken(live, ("b", 79), ("b", 500), ("c", 500)).evicted == []
    assert taken(live, ("d", 600), ("b", 700), ("d", 700)).evicted == ["b", "d"], "others go, again and again"
    assert live.row_of[live.index["a"]] >= 0


def test_silence_is_told_before_a_series_goes() -> None:
    live = bounded(2, silent_after=100).detector()
    told = taken(live, ("a", 0), ("b", 0), ("b", 90), ("c", 90))
    assert (told.evicted, [one.reason for one in told.rejects]) == ([], ["too_many_series"]), "not silent yet"
    told = taken(live, ("b", 101), ("c", 101))
    assert ([event.type for event in told.events], told.evicted) == (["tocsin.kpi.silent"], ["a"])


def test_who_comes_back_starts_anew() -> None:
    setup = bounded(1)
    stream = [*normal_points(60), ("b", T0 + 500 * MINUTE, 1.0), *normal_points(60, start=T0 + 900 * MINUTE, seed=5)]
    live = setup.detector()
    assert run(live, stream).evicted == ["a", "b"]
    alone = setup.detector()
    run(alone, stream[-60:])
    again, anew = (snapshot.pack(one, np.array([one.index["a"]], np.int32)) for one in (live, alone))
    assert again == anew, "nothing of what it was is left"


def test_names_without_a_place_are_forgotten() -> None:
    live = bounded(1).detector()
    live.spare_max = 3
    taken(live, ("a", 0))
    for i in range(50):
        result = taken(live, ("a", 1 + i), *((f"junk{i}.{j}", 1 + i) for j in range(5)))
        assert len(result.rejects) == 5
    assert len(live.index) <= 1 + 2 * 5
    assert len(live.index.names) <= 1 + 2 * 5
    assert live.index.names[live.index["a"]] == "a"


def test_shadows_give_their_places_too() -> None:
    one = bounded(1)
    beside = Served("other@1", Persistence(window=12))
    live = Detector(one.config, one.rules, one.served, shadows=(beside,))
    for i in range(20):
        taken(live, (f"s{i}", 100 * i))
    assert [group.rows for group in (*live.groups, *live.shadows.groups)] == [1, 1]


def test_a_state_of_more_series_than_there_may_be_now_is_kept_until_they_are_idle() -> None:
    before = bounded(5).detector()
    taken(before, *((name, 0) for name in "abcde"))
    after = bounded(2).detector()
    assert snapshot.unpack(after, snapshot.pack(before, np.arange(5, dtype=np.int32))).series == 5
    assert [one.reason for one in taken(after, ("f", 0)).rejects] == ["too_many_series"]
    assert taken(after, ("e", 100), ("f", 100)).evicted == ["a", "b", "c", "d"]
