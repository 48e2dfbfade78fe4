"""What a sample shows of each series, on topics made by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream.doctor import Examined, Format, Key, Sampler, Series, examine, format_of, lateness

T0 = 1_767_571_200_000  # a Monday
MINUTE = 60_000


@dataclass
class Sent:
    """A record as a broker has it."""

    value: bytes | None
    key: bytes | None = None
    partition: int = 0
    offset: int = 0
    timestamp: int = -1


def point(kpi: str, time: Any, value: Any = 1.0, **more: Any) -> Sent:
    body = json.dumps({"kpi": kpi, "timestamp": time, "value": value}).encode()
    return Sent(body, **({"key": kpi.encode()} | more))


def entity(name: str, time: Any, values: Any, **more: Any) -> Sent:
    body = json.dumps({"entity": name, "timestamp": time, "values": values}).encode()
    return Sent(body, **({"key": name.encode()} | more))


def regular(kpi: str, n: int, interval_ms: int = MINUTE, *, begin_ms: int = T0, **more: Any) -> list[Sent]:
    return [point(kpi, begin_ms + i * interval_ms, float(i), **more) for i in range(n)]


def examined(*records: Sent, batch: int = 1_000_000) -> Examined:
    sampler = Sampler()
    for begin in range(0, len(records), batch):
        sampler.add(records[begin : begin + batch])
    return examine(sampler.sample())


def only(*records: Sent) -> Series:
    (series,) = examined(*records).series
    return series


# -- records ---------------------------------------------------------------------------------------------------------


def test_a_regular_series() -> None:
    series = only(*regular("a", 100))
    assert series == Series(
        name="a", kind="kpi", records=100, times=100, first="2026-01-05T00:00:00Z", last="2026-01-05T01:39:00Z",
        interval_ms=MINUTE, sure=1.0, on_grid=1.0, partitions=[0], formats=["milliseconds"],
    )  # fmt: skip
    assert series.known


def test_nothing() -> None:
    nothing = examined()
    assert nothing.series == [] and len(nothing.sample.size) == 0
    assert examined(Sent(b"{")).series == []


def test_batches_make_no_difference() -> None:
    records = [
        *regular("a", 40),
        *regular("b", 40, 5000, partition=1),
        Sent(b"{"),
        entity("e", T0, {"x": 1, "y": None}),
    ]
    whole = examined(*records)
    for batch in (1, 7):
        assert examined(*records, batch=batch).series == whole.series


@pytest.mark.parametrize(
    ("timestamp", "found"),
    [
        (1_469_376_000, Format.SECONDS),
        (1_469_376_000.5, Format.SECONDS),
        (1_469_376_000_000, Format.MILLISECONDS),
        (1.469376e12, Format.MILLISECONDS),
        ("2016-07-24T16:00:00Z", Format.ISO_ZONE),
        ("2016-07-24 16:00:00.25+02:00", Format.ISO_ZONE),
        ("20160724T160000-0530", Format.ISO_ZONE),
        ("2016-07-24T16:00:00+02", Format.ISO_ZONE),
        ("2016-07-24T16:00:00", Format.ISO_NO_ZONE),
        (" 2016-07-24 16:00 ", Format.ISO_NO_ZONE),
        ("2016-07-24", Format.ISO_NO_ZONE),
        ("20160724T160000", Format.ISO_NO_ZONE),
    ],
)
def test_formats(timestamp: int | float | str, found: Format) -> None:
    assert format_of(timestamp) is found
    assert only(point("a", timestamp)).formats == [found.words]


def test_formats_of_one_time_are_one_time() -> None:
    series = only(point("a", T0 // 1000), point("a", T0), point("a", "2026-01-05T00:00:00"))
    assert series.times == 1 and series.duplicates == 2 and len(series.formats) == 3


def test_keys() -> None:
    records = [point("a", T0, key=None), point("a", T0 + 1, key=b"host"), point("a", T0 + 2), point("ä", T0 + 3)]
    found = examined(*records)
    assert found.sample.key.tolist() == [Key.ABSENT, Key.OTHER, Key.SERIES, Key.SERIES]
    assert [one.unkeyed for one in found.series] == [2, 0]


def test_what_would_be_refused_is_counted_with_an_example_of_each_reason() -> None:
    bad = [
        Sent(b"{", offset=7, partition=3),
        Sent(b"{x", offset=8, partition=3),
        Sent(None),
        point("a", "yesterday"),
        Sent(b"\xff{"),
    ]
    late = [point("a", T0 + 700_000, timestamp=T0), point("a", T0 + 500_000, timestamp=T0)]
    found = examined(*bad, *late).sample
    assert {reason: one.count for reason, one in found.refused.items()} == {
        "not_json": 2, "empty": 1, "bad_timestamp": 1, "not_utf8": 1, "in_the_future": 1,
    }  # fmt: skip
    first = found.refused["not_json"]
    assert (first.partition, first.offset, first.example) == (3, 7, "{")
    assert found.refused["not_utf8"].example == "\\xff{"
    assert len(found.slot) == 1, "a refused record shows nothing of a series"
    assert len(found.size) == len(bad) + len(late)


def test_a_series_that_is_seen_in_two_partitions() -> None:
    records = [point("a", T0 + i * MINUTE, partition=i % 2) for i in range(40)]
    series = only(*records)
    assert series.partitions == [0, 1]
    assert (series.interval_ms, series.missing, series.late) == (MINUTE, 0.0, 0)


def test_a_partition_whose_sample_is_longer_makes_no_gaps() -> None:
    # As many records of each partition: of the busy one an hour, of the other one ten.
    busy = [point("b", T0 + 9 * 60 * MINUTE + i * 6000, partition=1) for i in range(600)]
    both = [point("a", T0 + i * MINUTE, partition=i % 2) for i in range(600) if i % 2 == 0 or i >= 540]
    series = {one.name: one for one in examined(*busy, *both).series}
    assert (series["a"].interval_ms, series["a"].missing) == (MINUTE, 0.0)


# -- grid ------------------------------------------------------------------------------------------------------------


def times(milliseconds: Sequence[int]) -> Series:
    return only(*(point("a", T0 + ms) for ms in milliseconds))


@pytest.mark.parametrize("interval_ms", [1, 500, 1000, 15_000, MINUTE, 300_000, 3_600_000, 86_400_000])
def test_intervals(interval_ms: int) -> None:
    assert times([i * interval_ms for i in range(30)]).interval_ms == interval_ms


@pytest.mark.parametrize(("count", "known"), [(1, False), (2, False), (3, False), (7, False), (8, True)])
def test_a_few_times_tell_an_interval_that_is_not_relied_upon(count: int, known: bool) -> None:
    series = times([i * MINUTE for i in range(count)])
    assert series.interval_ms == (MINUTE if count >= 3 else 0)
    assert series.known is known


def test_jitter() -> None:
    rng = np.random.default_rng(0)
    series = times([i * MINUTE + int(ms) for i, ms in enumerate(rng.integers(-3000, 3000, 300))])
    assert series.interval_ms == MINUTE and series.sure > 0.8 and series.on_grid == 1.0
    assert 2700 <= series.jitter_ms <= 3100 and series.missing == 0.0


def test_the_phase_of_the_first_points_need_not_be_that_of_all() -> None:
    # Eight points that jitter to one side, then those on the other.
    series = times([i * MINUTE + (20_000 if i < 8 else 0) for i in range(100)])
    assert series.on_grid == 0.92 and series.jitter_ms <= 20_000


def test_irregular_times() -> None:
    rng = np.random.default_rng(1)
    series = times(np.cumsum(rng.exponential(MINUTE, 300)).astype(int).tolist())
    assert not series.known and series.on_grid < 0.5


def test_two_series_of_one_name_crowd_the_grid() -> None:
    series = times(sorted([*range(0, 200 * MINUTE, MINUTE), *range(1000, 200 * MINUTE, MINUTE)]))
    assert series.times == 400
    assert series.crowded > 150 or series.interval_ms < MINUTE


def test_gaps() -> None:
    there = [i for i in range(200) if not 50 <= i < 60 and i != 100]
    series = times([i * MINUTE for i in there])
    assert (series.interval_ms, series.longest_gap) == (MINUTE, 10)
    assert series.missing == pytest.approx(11 / 200)


def test_intervals_that_change_are_not_sure() -> None:
    series = times([*range(0, 100 * MINUTE, MINUTE), *range(100 * MINUTE, 200 * MINUTE, 2 * MINUTE)])
    assert series.interval_ms == MINUTE and 0.5 <= series.sure < 0.8
    assert series.missing == pytest.approx(0.25, abs=0.01)


@given(seed=st.integers(0, 2**32 - 1), interval_s=st.sampled_from([1, 10, 60, 300]), missing=st.floats(0, 0.4))
def test_intervals_are_found_in_spite_of_jitter_and_gaps(seed: int, interval_s: int, missing: float) -> None:
    rng = np.random.default_rng(seed)
    there = np.flatnonzero(rng.random(400) >= missing)
    jitter = rng.integers(-interval_s * 20, interval_s * 20 + 1, len(there))  # 2 %
    series = times((there * interval_s * 1000 + jitter).tolist())
    assert series.interval_ms == interval_s * 1000 and series.known
    assert series.missing == pytest.approx(missing, abs=0.12)


# -- order -----------------------------------------------------------------------------------------------------------


def test_late_records() -> None:
    order = [0, 1, 2, 5, 3, 4, 6, 6, 2]
    found = examined(*(point("a", T0 + i * MINUTE) for i in order), *regular("b", 9))
    assert (found.late_ms[:9] // MINUTE).tolist() == [0, 0, 0, 0, 2, 1, 0, 0, 4]
    assert (found.series[0].late, found.series[0].late_ms) == (3, 4 * MINUTE)
    assert (found.series[0].duplicates, found.series[1].late) == (2, 0)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1), st.integers(T0, T0 + 2**32)), max_size=30))
def test_lateness_is_that_of_each_series_in_each_partition(arrivals: list[tuple[int, int, int]]) -> None:
    sampler = Sampler()
    sampler.add([point(f"k{series}", ms, partition=partition) for series, partition, ms in arrivals])
    newest: dict[tuple[int, int], int] = {}
    expected = []
    for series, partition, ms in arrivals:
        newest[series, partition] = max(newest.get((series, partition), ms), ms)
        expected.append(newest[series, partition] - ms)
    assert lateness(sampler.sample()).tolist() == expected


def test_duplicates_with_the_same_and_with_another_value() -> None:
    records = [point("a", T0, 1), point("a", T0, 1), point("a", T0 + 1, None), point("a", T0 + 1, None)]
    series = only(*records, point("a", T0, 2))
    assert (series.duplicates, series.conflicts, series.times) == (3, 1, 2)


def test_a_series_that_has_stopped() -> None:
    found = examined(*regular("a", 20), *regular("b", 100), *regular("other", 500, partition=1))
    assert [one.stopped_ms // MINUTE for one in found.series] == [80, 0, 0]


# -- values ----------------------------------------------------------------------------------------------------------


def test_nulls_and_nan() -> None:
    values = [1, None, math.nan, 2]
    assert only(*(point("a", T0 + i, value) for i, value in enumerate(values))).nulls == 0.5
    assert only(point("a", T0, None)).nulls == 1.0


@pytest.mark.parametrize(("count", "constant"), [(19, []), (20, [""])])
def test_what_never_changes(count: int, constant: list[str]) -> None:
    records = [point("a", T0 + i * MINUTE, 7) for i in range(count)]
    assert only(*records).constant == constant
    assert only(*records, point("a", T0, None)).constant == constant
    assert only(*records, point("a", T0 - 1, 8)).constant == []


def test_entities() -> None:
    records = [
        entity("e", T0 + i * MINUTE, {"cpu": i, "flag": 1} | ({"gpu": None if i % 4 else 0.5} if i % 2 == 0 else {}))
        for i in range(40)
    ]
    series = only(*records)
    assert (series.kind, series.records, series.times, series.interval_ms) == ("entity", 40, 40, MINUTE)
    assert series.metrics == {"cpu": 1.0, "flag": 1.0, "gpu": 0.25}
    assert series.constant == ["flag"] and series.duplicates == 0


def test_metrics_that_come_one_by_one_are_no_duplicates() -> None:
    parts = [entity("e", T0 + i * MINUTE, {metric: i}) for i in range(20) for metric in ("cpu", "mem")]
    series = only(*parts)
    assert (series.records, series.times, series.duplicates) == (40, 20, 0)
    assert series.metrics == {"cpu": 1.0, "mem": 1.0}


def test_a_kpi_and_an_entity_of_one_name_are_two_series() -> None:
    found = examined(point("a", T0), entity("a", T0, {"x": 1}))
    assert [(one.name, one.kind) for one in found.series] == [("a", "kpi"), ("a", "entity")]


def test_the_order_in_which_partitions_are_read_makes_no_difference() -> None:
    parts = [
        [*regular("b", 9, partition=0), Sent(b"{1", partition=0), entity("e", T0, {"y": 1}, partition=0)],
        [*regular("a", 9, partition=1), Sent(b"{2", partition=1), entity("e", T0 + 1, {"x": 1, "y": 2}, partition=1)],
    ]
    one, other = examined(*parts[0], *parts[1]), examined(*parts[1], *parts[0])
    assert one.series == other.series
    assert one.sample.refused == other.sample.refused and one.sample.refused["not_json"].example == "{1"


def test_many_series_at_once() -> None:
    rng = np.random.default_rng(0)
    interval = rng.choice([1000, 10_000, MINUTE], 3000)
    records = [point(f"k{k}", T0 + i * int(interval[k])) for i in range(20) for k in range(3000)]
    found = examined(*records)
    assert [one.interval_ms for one in found.series] == [int(interval[int(one.name[1:])]) for one in found.series]
