import json
import math
import time
from typing import Any

import numpy as np
import pytest

from stream.columns import Columns, SeriesIndex
from stream.records import METRICS_MAX, RECORD_BYTES_MAX, UNREADABLE, VALUE_MAX, Reject, decode

TIME = 1_469_376_000  # 2016-07-24 16:00:00 UTC
MS = TIME * 1000


def record(**fields: Any) -> bytes:
    """A good record, with these fields changed; ... leaves one out."""
    whole = {"kpi": "a", "timestamp": TIME, "value": 1.5} | fields
    return json.dumps({name: value for name, value in whole.items() if value is not ...}).encode()


def entity(**fields: Any) -> bytes:
    return record(**{"kpi": ..., "value": ..., "entity": "m", "values": {"cpu": 0.3, "mem": None}} | fields)


def points(columns: Columns, index: SeriesIndex) -> list[tuple[str, int, float | None, int]]:
    """(series, ms, value, row) of each point; a missing value is None, for NaN equals nothing."""
    return [
        (index.names[slot], stamp, None if math.isnan(value) else value, row)
        for slot, stamp, value, row in zip(
            columns.slot.tolist(),
            columns.timestamp_ms.tolist(),
            columns.value.tolist(),
            columns.row.tolist(),
            strict=True,
        )
    ]


def read(*raw: bytes | None, **options: Any) -> tuple[list[tuple[str, int, float | None, int]], list[Reject]]:
    index = SeriesIndex()
    columns, rejects = decode(raw, index, **options)
    assert columns.slot.dtype == np.int32
    assert columns.timestamp_ms.dtype == np.int64 == columns.row.dtype
    assert columns.value.dtype == np.float64
    return points(columns, index), rejects


BAD: dict[str, tuple[bytes | None, str, str]] = {
    "tombstone": (None, "empty", "the record has no value (a tombstone?)"),
    "no bytes": (b"", "empty", "the record has no value (a tombstone?)"),
    "a blank": (b" ", "not_json", "the record is not JSON: Input data was truncated"),
    "cut JSON": (record()[:-1], "not_json", "the record is not JSON: Input data was truncated"),
    "two records": (record() * 2, "not_json", "trailing characters"),
    "plain text": (b"cpu=0.3", "not_json", "the record is not JSON: JSON is malformed: invalid character (byte 0)"),
    "byte order mark": (b"\xef\xbb\xbf" + record(), "not_json", "invalid character (byte 0)"),
    "UTF-16": (record().decode().encode("utf-16"), "not_utf8", "the record is not UTF-8: invalid start byte at byte 0"),
    "Latin-1 name": (record().replace(b'"a"', b'"\xe4"'), "not_utf8", "invalid continuation byte at byte 9"),
    "too large": (record(note="x" * 1_000_000), "too_large", f"bytes, the limit is {RECORD_BYTES_MAX}"),
    "too large and broken": (b"[" * 1_000_000, "too_large", "the record has 1000000 bytes, the limit is 65536"),
    "nested arrays": (b"[" * 60_000, "wrong_type", "Expected `object`, got `array`"),
    "nested beyond any stack": (b'{"x":' * 10_000 + b"1" + b"}" * 10_000, "not_json", "recursion"),
    "nested, with a NaN": (b'{"kpi":NaN,"x":' + b"[" * 30_000 + b"]" * 30_000 + b"}", "not_json", "is not JSON"),
    "a list": (b"[1,2]", "wrong_type", "Expected `object`, got `array`"),
    "a number": (b"7", "wrong_type", "Expected `object`, got `int`"),
    "null": (b"null", "wrong_type", "Expected `object`, got `null`"),
    "no timestamp": (record(timestamp=...), "wrong_type", "Object missing required field `timestamp`"),
    "no kpi": (record(kpi=...), "bad_name", "no series name: the record needs `kpi` (a string)"),
    "no value": (record(value=...), "wrong_type", "missing required field `value` (null says that it is missing)"),
    "null kpi": (record(kpi=None), "bad_name", "no series name"),
    "null timestamp": (record(timestamp=None), "wrong_type", "Expected `int | float | str`, got `null`"),
    "text value": (record(value="1.5"), "wrong_type", "Expected `float | null`, got `str` - at `$.value`"),
    "boolean value": (record(value=True), "wrong_type", "Expected `float | null`, got `bool` - at `$.value`"),
    "list value": (record(value=[1.5]), "wrong_type", "Expected `float | null`, got `array` - at `$.value`"),
    "number kpi": (record(kpi=7), "wrong_type", "Expected `str | null`, got `int` - at `$.kpi`"),
    "boolean timestamp": (record(timestamp=True), "wrong_type", "got `bool` - at `$.timestamp`"),
    "Infinity": (record(value=math.inf), "bad_value", "the value inf is beyond ±1e+30"),
    "-Infinity": (record(value=-math.inf), "bad_value", "the value -inf is beyond ±1e+30"),
    "1e308": (record(value=1e308), "bad_value", "the value 1e+308 is beyond ±1e+30"),
    "-1e31": (record(value=-1e31), "bad_value", "the value -1e+31 is beyond ±1e+30"),
    "1e400": (record().replace(b"1.5", b"1e400"), "wrong_type", "Number out of range - at `$.value`"),
    "value of 400 digits": (record(value=10**400), "wrong_type", "Number out of range - at `$.value`"),
    "empty name": (record(kpi=""), "bad_name", "the series name is empty"),
    "blank name": (record(kpi=" \t "), "bad_name", "the series name is empty"),
    "NUL in the name": (record(kpi="a\0b"), "bad_name", r"the series name 'a\x00b' holds a control character"),
    "newline in the name": (record(kpi="a\nb"), "bad_name", r"'a\nb' holds a control character"),
    "lone surrogate": (record(kpi="\ud800"), "bad_name", r"the series name '\ud800' holds a control character"),
    "long name": (record(kpi="é" * 257), "bad_name", f"the series name {'é' * 40!r}… is longer than 512 bytes"),
    "NaN timestamp": (record(timestamp=math.nan), "bad_timestamp", "the timestamp nan lies nowhere"),
    "infinite timestamp": (record(timestamp=math.inf), "bad_timestamp", "the timestamp inf lies beyond the year 2200"),
    "-infinite timestamp": (record(timestamp=-math.inf), "bad_timestamp", "the timestamp -inf lies before 1970"),
    "negative timestamp": (record(timestamp=-1), "bad_timestamp", "the timestamp -1 lies before 1970"),
    "negative ms": (record(timestamp=-MS), "bad_timestamp", f"the timestamp -{MS} lies before 1970"),
    "negative half second": (record(timestamp=-0.5), "bad_timestamp", "the timestamp -0.5 lies before 1970"),
    "-2^63": (record(timestamp=-(2**63)), "bad_timestamp", f"the timestamp -{2**63} lies before 1970"),
    "year 2300": (record(timestamp=10_413_792_000), "bad_timestamp", "10413792000 lies beyond the year 2200"),
    "microseconds": (record(timestamp=MS * 1000), "bad_timestamp", "beyond the year 2200 (seconds or ms expected)"),
    "nanoseconds": (record(timestamp=MS * 1_000_000), "bad_timestamp", "beyond the year 2200"),
    "timestamp of 400 digits": (record(timestamp=10**400), "bad_timestamp", f"the timestamp 1{'0' * 39} lies beyond"),
    "timestamp of 9,000 digits": (record().replace(str(TIME).encode(), b"1" * 9000), "wrong_type", "out of range"),
    "ISO year 2300": (record(timestamp="2300-01-01T00:00:00Z"), "bad_timestamp", "2300-01-01T00:00:00Z lies beyond"),
    "ISO year 1969": (record(timestamp="1969-12-31"), "bad_timestamp", "the timestamp 1969-12-31 lies before 1970"),
    "no such day": (record(timestamp="2016-02-30"), "bad_timestamp", "the timestamp '2016-02-30' is not ISO 8601"),
    "number as text": (record(timestamp=str(TIME)), "bad_timestamp", f"the timestamp '{TIME}' is not ISO 8601"),
    "empty timestamp": (record(timestamp=""), "bad_timestamp", "the timestamp '' is not ISO 8601"),
    "novel as timestamp": (record(timestamp="x" * 9000), "bad_timestamp", f"timestamp {'x' * 40!r} is not ISO 8601"),
    "half a surrogate pair": (b'{"timestamp":1469376000,"values":"\\ud800"}', "wrong_type", "surrogates not allowed"),
    "entity without values": (entity(values=...), "wrong_type", "an entity record needs `values` (metric -> number)"),
    "entity with no metric": (entity(values={}), "wrong_type", "an entity record needs `values` (metric -> number)"),
    "entity, blank": (entity(entity=" "), "bad_name", "the series name is empty"),
    "entity, bad metric": (entity(values={"cpu": 0.3, "\n": 1}), "bad_name", r"the series name 'm.\n' holds a control"),
    "entity, bad value": (entity(values={"cpu": 0.3, "mem": 1e31}), "bad_value", "the value 1e+31 is beyond"),
    "entity, text value": (entity(values={"cpu": 0.3, "mem": "x"}), "wrong_type", "got `str` - at `$.values[...]`"),
    "entity, list": (entity(values=[1, 2]), "wrong_type", "Expected `object | null`, got `array` - at `$.values`"),
    "entity, bad timestamp": (entity(timestamp=-5), "bad_timestamp", "the timestamp -5 lies before 1970"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_record_is_refused_and_its_neighbours_are_not(name: str) -> None:
    raw, reason, detail = BAD[name]
    good, rejects = read(record(), raw, record(kpi="b"), raw)
    assert good == [("a", MS, 1.5, 0), ("b", MS, 1.5, 2)]
    assert [(reject.row, reject.reason) for reject in rejects] == [(1, reason), (3, reason)]
    assert detail in rejects[0].detail
    assert rejects[0].detail.isprintable()
    assert len(rejects[0].detail) < 300


@pytest.mark.parametrize("name", BAD)
def test_a_bad_record_alone_has_the_same_reason(name: str) -> None:
    raw, reason, detail = BAD[name]
    good, (reject,) = read(raw)
    assert good == []
    assert (reject.row, reject.reason) == (0, reason)
    assert detail in reject.detail


GOOD: dict[str, tuple[bytes, list[tuple[str, int, float | None, int]]]] = {
    "seconds": (record(), [("a", MS, 1.5, 0)]),
    "milliseconds": (record(timestamp=MS + 7), [("a", MS + 7, 1.5, 0)]),
    "float seconds": (record(timestamp=TIME + 0.1234), [("a", MS + 123, 1.5, 0)]),
    "float milliseconds": (record(timestamp=MS + 0.75), [("a", MS + 1, 1.5, 0)]),
    "1970": (record(timestamp=0), [("a", 0, 1.5, 0)]),
    "far past": (record(timestamp=31_536_000), [("a", 31_536_000_000, 1.5, 0)]),  # 1971
    "the largest seconds": (record(timestamp=7_258_118_400), [("a", 7_258_118_400_000, 1.5, 0)]),
    "the least ms": (record(timestamp=100_000_000_000), [("a", 100_000_000_000, 1.5, 0)]),  # 1973
    "ISO, no zone": (record(timestamp="2016-07-24T16:00:00"), [("a", MS, 1.5, 0)]),
    "ISO, blank": (record(timestamp=" 2016-07-24 16:00:00.250 "), [("a", MS + 250, 1.5, 0)]),
    "ISO, Z": (record(timestamp="2016-07-24T16:00:00Z"), [("a", MS, 1.5, 0)]),
    "ISO, zone": (record(timestamp="2016-07-24T21:30:00+05:30"), [("a", MS, 1.5, 0)]),
    "ISO, day": (record(timestamp="2016-07-24"), [("a", MS - 16 * 3_600_000, 1.5, 0)]),
    "null": (record(value=None), [("a", MS, None, 0)]),
    "NaN": (record(value=math.nan), [("a", MS, None, 0)]),
    "whole number": (record(value=7), [("a", MS, 7.0, 0)]),
    "integer of 20 digits": (record(value=10**19), [("a", MS, 1e19, 0)]),
    "largest value": (record(value=-VALUE_MAX), [("a", MS, -VALUE_MAX, 0)]),
    "smallest value": (record(value=5e-324), [("a", MS, 5e-324, 0)]),
    "unknown fields": (record(host="x", tags={"deep": [1, {"x": None}]}), [("a", MS, 1.5, 0)]),
    "name of 512 bytes": (record(kpi="é" * 256), [("é" * 256, MS, 1.5, 0)]),
    "name in other scripts": (record(kpi="延迟 p99 🚀"), [("延迟 p99 🚀", MS, 1.5, 0)]),
    "surrogate pair": (record(kpi="\U0001f680"), [("🚀", MS, 1.5, 0)]),
    "a field twice": (b'{"kpi":"b","kpi":"a","timestamp":1469376000,"value":9,"value":1.5}', [("a", MS, 1.5, 0)]),
    "entity": (entity(), [("m.cpu", MS, 0.3, 0), ("m.mem", MS, None, 0)]),
    "entity, NaN": (entity(values={"cpu": math.nan}), [("m.cpu", MS, None, 0)]),
    "kpi and entity": (record(entity="m", values={"cpu": 0.3}), [("a", MS, 1.5, 0)]),
    "kpi null and entity": (entity(kpi=None, value=None), [("m.cpu", MS, 0.3, 0), ("m.mem", MS, None, 0)]),
}


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize(
    "neighbour", [record(kpi="z"), record(kpi="z", timestamp="2016-07-24"), b"x", entity(entity="z")]
)
def test_a_good_record_reads_the_same_in_any_company(name: str, neighbour: bytes) -> None:
    raw, expected = GOOD[name]
    assert read(raw) == (expected, [])
    good, _ = read(raw, neighbour)
    assert [point for point in good if point[3] == 0] == expected


def test_a_time_without_a_zone_is_utc_wherever_the_service_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    try:
        assert read(record(timestamp="2016-07-24T16:00:00")) == ([("a", MS, 1.5, 0)], [])
    finally:
        monkeypatch.undo()
        time.tzset()


def test_no_records_give_no_points() -> None:
    assert read() == ([], [])
    assert read(arrival_ms=[]) == ([], [])
    assert read(None, None, arrival_ms=[MS, MS])[0] == []


def test_slots_are_shared_between_batches_and_junk_takes_none() -> None:
    index = SeriesIndex(["old"])
    decode([record(kpi="new"), record(kpi="old"), record(kpi="bad\0"), record(kpi=""), b"junk"], index)
    assert index.names == ["old", "new"]
    columns, _ = decode([record(kpi="new"), record(kpi="old")], index)
    assert columns.slot.tolist() == [1, 0]


def test_rejects_come_in_the_order_of_the_records() -> None:
    _, rejects = read(record(kpi=""), b"x", record(timestamp=10**10), record(value="x"), None, arrival_ms=[MS] * 5)
    assert [(reject.row, reject.reason) for reject in rejects] == [
        (0, "bad_name"), (1, "not_json"), (2, "bad_timestamp"), (3, "wrong_type"), (4, "empty"),
    ]  # fmt: skip


@pytest.mark.parametrize(("ahead_ms", "refused"), [(600_000, False), (600_001, True)])
def test_a_point_ahead_of_its_arrival_is_refused(ahead_ms: int, refused: bool) -> None:
    raw = [record(kpi="b"), record(timestamp=MS + ahead_ms), entity(timestamp=MS + ahead_ms)]
    good, rejects = read(*raw, arrival_ms=[MS, MS, MS])
    assert [point[3] for point in good] == ([0] if refused else [0, 1, 2, 2])
    assert [(reject.row, reject.reason) for reject in rejects] == (
        [(1, "in_the_future"), (2, "in_the_future")] * refused
    )
    if refused:
        assert rejects[0].detail == "the timestamp lies 600.001 s ahead of its arrival, the limit is 600 s"


def test_a_refused_record_makes_no_series() -> None:
    index = SeriesIndex()
    refused = [
        record(kpi="infinite", value=float("inf")),
        record(kpi="ancient", timestamp=-1),
        record(kpi="future", timestamp=MS + 600_001),
        entity(timestamp=MS + 600_001),
    ]
    for batch in ([one] for one in refused), [[*refused, record(kpi="good")]]:
        for raw in batch:
            decode(raw, index, arrival_ms=[MS] * len(raw))
    assert index.names == ["good"]


def test_arrival_is_that_of_the_own_record() -> None:
    raw = [b"junk", record(timestamp=MS + 5_000), record(timestamp=MS + 5_000)]
    good, rejects = read(*raw, arrival_ms=[0, MS + 3_999, MS + 4_000], future_limit_ms=1_000)
    assert [point[3] for point in good] == [2]
    assert [(reject.row, reject.reason) for reject in rejects] == [(0, "not_json"), (1, "in_the_future")]
    assert read(record(timestamp=MS), arrival_ms=None)[1] == []
    assert read(record(timestamp=MS), arrival_ms=[-1])[1] == [], "a record without a time of its own"


def test_a_record_with_too_many_metrics_makes_no_series() -> None:
    values = ",".join(f'"m{i}":1' for i in range(METRICS_MAX + 1))
    index = SeriesIndex()
    columns, rejects = decode([f'{{"entity":"e","timestamp":1469376000,"values":{{{values}}}}}'.encode()], index)
    assert (len(columns), len(index)) == (0, 0)
    assert [(one.row, one.reason) for one in rejects] == [(0, "too_large")]
    assert f"{METRICS_MAX + 1} metrics, the limit is {METRICS_MAX}" in rejects[0].detail


def test_what_stands_for_a_batch_says_why_it_could_not_be_read() -> None:
    _, rejects = decode([UNREADABLE + b"it is too large"], SeriesIndex())
    assert [(one.reason, one.detail) for one in rejects] == [("bad_batch", "it is too large")]


@pytest.mark.parametrize("depth", [100, 10_000, 30_000])
def test_nesting_is_bounded(depth: int) -> None:
    deep = b'{"kpi":"a","timestamp":1469376000,"value":1,"more":' + b"[" * depth + b"]" * depth + b"}"
    columns, rejects = decode([deep], SeriesIndex())
    assert len(columns) + len(rejects) == 1
    assert len(rejects) == (depth > 100)
