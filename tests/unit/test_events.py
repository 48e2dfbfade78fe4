import json
import math
import re
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import numpy as np
import pytest
from cloudevents.core.bindings.kafka import KafkaMessage, from_structured_event
from hypothesis import given
from hypothesis import strategies as st

from stream import events
from stream.events import (
    CONTENT_TYPE,
    SEVERITIES,
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
from stream.incidents import Severity
from tests.helpers import MINUTE, T0, Outputs, config, detector, normal_points, run

RFC3339 = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{3})?Z")
numbers = st.floats(allow_nan=False, allow_infinity=False)
texts = st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=12)
times = st.integers(0, 7_258_118_400_000)


@st.composite
def any_data(draw: st.DrawFn) -> EventData:
    data = EventData(
        kpi=draw(texts),
        incident=f"{draw(st.integers(0, 2**64 - 1)):016x}",
        severity=draw(st.sampled_from(SEVERITIES)),
        model=draw(texts),
        opened=iso_time(draw(times)),
        anomalies=draw(st.integers(1, 10**6)),
        window=WindowInfo(30, draw(st.integers(0, 30))),
        value=draw(numbers),
        expected=draw(numbers),
        lower=draw(numbers),
        upper=draw(numbers),
        score=draw(numbers),
        threshold=draw(numbers),
        ratio=draw(numbers),
        probability=draw(st.floats(0, 1)),
    )
    if not draw(st.booleans()):
        return data
    return msgspec.structs.replace(
        data,
        reason=draw(st.sampled_from(["recovered", "accepted"])),
        last_anomaly=iso_time(draw(times)),
        duration_s=draw(st.floats(0.001, 1e9)),
        peak=Peak(iso_time(draw(times)), draw(numbers), draw(numbers)),
    )


def alarms() -> Outputs:
    """Events of all kinds, as the detector makes them."""
    points = normal_points(300)
    for i, value in {100: 60.0, 101: 5000.0, 150: -40.0}.items():
        points[i] = ("a", points[i][1], value)
    points[200:260] = [(name, time, value + 500) for name, time, value in points[200:260]]
    out = run(detector(config(accept_after_ms=30 * MINUTE)), points)
    assert {"opened", "updated", "resolved"} == set(out.kinds)
    return out


ALARMS = alarms()


@given(any_data(), times)
def test_an_independent_reader_finds_a_valid_cloudevent(data: EventData, time: int) -> None:
    event = make_event("tocsin.anomaly.opened", f"{data.incident}-opened", time, data, source="/prod/tocsin")
    read = from_structured_event(KafkaMessage({"content-type": CONTENT_TYPE.encode()}, None, events.encode(event)))
    assert read.get_specversion() == "1.0"
    assert read.get_id() == f"{data.incident}-opened"
    assert read.get_source() == "/prod/tocsin"
    assert read.get_type() == "tocsin.anomaly.opened"
    assert read.get_subject() == read.get_extension("partitionkey") == data.kpi
    assert read.get_time() == datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=time)
    assert read.get_datacontenttype() == "application/json"
    body: Any = read.get_data()
    assert body["severity"] in ("warning", "major", "critical")
    assert {name: body[name] for name in ("value", "score", "probability")} == {
        "value": data.value,
        "score": data.score,
        "probability": data.probability,
    }
    assert (
        ("reason" in body)
        == ("peak" in body)
        == ("duration_s" in body)
        == ("last_anomaly" in body)
        == bool(data.reason)
    )


@given(any_data(), times)
def test_what_is_encoded_is_decoded(data: EventData, time: int) -> None:
    event = make_event("tocsin.anomaly.resolved", "x", time, data)
    raw = events.encode(event)
    assert events.decode(raw) == event
    assert events.encode(events.decode(raw)) == raw
    assert b"null" not in raw.replace(json.dumps(data.kpi, ensure_ascii=False).encode(), b"").replace(
        json.dumps(data.model, ensure_ascii=False).encode(), b""
    )


def test_events_of_the_detector_are_valid_and_survive_a_round_trip() -> None:
    for _, raw in ALARMS.events:
        read = from_structured_event(KafkaMessage({"content-type": CONTENT_TYPE.encode()}, b"a", raw))
        assert read.get_subject() == "a"
        assert events.encode(events.decode(raw)) == raw


def leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for part in value.values() for leaf in leaves(part)]
    return [value]


def test_no_field_of_an_event_is_null_or_infinite() -> None:
    # msgspec writes NaN and infinity as null.
    for event in ALARMS.data:
        assert all(leaf is not None for leaf in leaves(event)), event
        for name in ("value", "expected", "lower", "upper", "score", "threshold", "ratio", "probability"):
            assert math.isfinite(event["data"][name])


def test_all_times_are_rfc_3339() -> None:
    for event in ALARMS.data:
        data = event["data"]
        stamps = [event["time"], data["opened"]]
        if "reason" in data:
            stamps += [data["last_anomaly"], data["peak"]["time"]]
        assert all(RFC3339.fullmatch(stamp) for stamp in stamps), stamps


def test_a_new_field_is_optional_and_unknown_ones_are_ignored() -> None:
    raw = json.loads(ALARMS.events[0][1])
    raw["traceparent"] = "00-x"
    raw["data"]["contributions"] = {"cpu": 1.0}
    assert events.encode(events.decode(json.dumps(raw).encode())) == ALARMS.events[0][1]
    required = [field.name for field in msgspec.structs.fields(Event)]
    assert required[:4] == ["specversion", "id", "source", "type"]


def test_severities_are_named_in_their_order() -> None:
    assert [name.upper() for name in SEVERITIES] == [severity.name for severity in Severity if severity]


@pytest.mark.parametrize(
    ("ms", "text"),
    [
        (0, "1970-01-01T00:00:00Z"),
        (1, "1970-01-01T00:00:00.001Z"),
        (T0, "2016-07-24T16:00:00Z"),
        (T0 + 250, "2016-07-24T16:00:00.250Z"),
        (7_258_118_399_999, "2199-12-31T23:59:59.999Z"),
        (99_999_999_999_999, "5138-11-16T09:46:39.999Z"),
    ],
)
def test_iso_time(ms: int, text: str) -> None:
    assert iso_time(ms) == text


@given(st.integers(0, 10**14))
def test_iso_time_loses_no_millisecond(ms: int) -> None:
    assert np.datetime64(iso_time(ms).removesuffix("Z"), "ms").astype(np.int64) == ms


@pytest.mark.parametrize(
    ("x", "rounded"),
    [(0.0, 0.0), (1234567.0, 1234570.0), (0.12345678, 0.123457), (-3.0e-9, -3e-9), (1e38, 1e38), (999999.5, 1e6)],
)
def test_significant(x: float, rounded: float) -> None:
    assert significant(x) == rounded


@pytest.mark.parametrize(
    ("width", "x", "rounded"),
    [
        (1.0, 3.14159265, 3.14159),
        (9.99, 3.14159265, 3.14159),
        (10.0, 3.14159265, 3.1416),
        (1e3, 3_000_123_456.789, 3_000_123_456.79),
        (1e6, 3_000_123_456.789, 3_000_123_460.0),
        (1e-9, 0.5, 0.5),
        (1e12, 123_456.0, 0.0),
        (0.0, 1234567.0, 1234570.0),
        (1e-100, 1.5, 1.5),
        (1e60, 1e30, 0.0),
    ],
)
def test_rounded_to(width: float, x: float, rounded: float) -> None:
    assert rounded_to(width, x) == rounded


@given(numbers.filter(lambda x: abs(x) < 1e32), st.floats(1e-300, 1e60))
def test_rounding_moves_nothing_by_more_than_a_hundred_thousandth_of_the_width(x: float, width: float) -> None:
    assert abs(rounded_to(width, x) - x) <= 0.51e-5 * width + 1e-15 * abs(x)


def test_incident_ids_differ_by_series_time_and_model() -> None:
    ids = {
        incident_id(series, opened, model)
        for series in ("a", "b", "a0")
        for opened in (0, 1, 1000)
        for model in ("m@1", "m@2", "0m@1")
    }
    assert len(ids) == 27
    assert all(0 <= one < 2**64 for one in ids)


def test_incident_ids_do_not_depend_on_the_process() -> None:
    # Pinned: a consumer that drops what it has seen keeps them over an upgrade.
    assert f"{incident_id('checkout.latency_p99', T0, 'deepant@1'):016x}" == "7b1182c7f19f65e7"  # by b2sum -l 64
