import json
import math
import re
from dataclasses import replace
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
    NO_DURATION,
    SEVERITIES,
    Event,
    EventData,
    Feature,
    Peak,
    SilenceData,
    WindowInfo,
    incident_id,
    iso_time,
    make_event,
    rounded_to,
    significant,
    silence_id,
)
from stream.incidents import Severity
from tests.helpers import MINUTE, T0, Outputs, Persistence, Record, config, detector, normal_points, run

RFC3339 = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{3})?Z")
numbers = st.floats(allow_nan=False, allow_infinity=False)
texts = st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=12)
times = st.integers(0, 7_258_118_400_000)
labels = st.dictionaries(texts, texts, max_size=2)
features = st.builds(
    Feature, metric=texts, share=st.floats(0, 1), value=numbers, expected=numbers, lower=numbers, upper=numbers
)


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
        score=draw(numbers),
        threshold=draw(numbers),
        ratio=draw(numbers),
        probability=draw(st.floats(0, 1)),
        supersedes=draw(st.just("") | texts),
        health=draw(st.sampled_from(["", "prior", "degenerate", "drifting"])),
        rule=draw(st.just("") | texts),
        labels=draw(labels),
    )
    if draw(st.booleans()):
        names = ("value", "expected", "lower", "upper")
        data = msgspec.structs.replace(data, **{name: draw(numbers) for name in names})
    else:
        data = msgspec.structs.replace(data, features=draw(st.lists(features, min_size=1, max_size=5)))
    if not draw(st.booleans()):
        return data
    return msgspec.structs.replace(
        data,
        reason=draw(st.sampled_from(["recovered", "accepted"])),
        last_anomaly=iso_time(draw(times)),
        duration_s=draw(st.floats(0.001, 1e9)),
        peak=Peak(iso_time(draw(times)), draw(numbers), None if data.features else draw(numbers)),
    )


any_silence = st.builds(
    SilenceData,
    kpi=texts,
    last_seen=times.map(iso_time),
    interval_s=st.floats(0.001, 1e9),
    silent_after_s=st.floats(0.001, 1e9),
    basis=st.sampled_from(["event_time", "wall_clock"]),
    rule=st.just("") | texts,
    labels=labels,
)


def leaves(value: Any) -> list[Any]:
    if isinstance(value, dict | list):
        return [leaf for part in (value.values() if isinstance(value, dict) else value) for leaf in leaves(part)]
    return [value]


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
    assert (body["score"], body["probability"]) == (data.score, data.probability)
    assert body.get("value") == data.value
    assert ("value" in body) == ("expected" in body) == ("lower" in body) == ("upper" in body) != ("features" in body)
    for part, feature in zip(body.get("features", []), data.features, strict=True):
        assert part == msgspec.structs.asdict(feature)
    for name in ("supersedes", "health", "rule", "labels"):
        assert body.get(name) == (getattr(data, name) or None), "left out where there is none"
    assert (
        ("reason" in body)
        == ("peak" in body)
        == ("duration_s" in body)
        == ("last_anomaly" in body)
        == bool(data.reason)
    )


@given(any_data(), times, st.sampled_from(["opened", "updated", "resolved", "corrected", "retracted"]))
def test_what_is_encoded_is_decoded(data: EventData, time: int, kind: str) -> None:
    event = make_event(f"tocsin.anomaly.{kind}", "x", time, data)
    raw = events.encode(event)
    assert events.decode(raw) == event
    assert events.encode(events.decode(raw)) == raw
    assert None not in leaves(json.loads(raw))


@given(any_silence, times, st.sampled_from([events.TYPE_SILENT, events.TYPE_RESUMED]))
def test_silence_is_an_event_like_others(data: SilenceData, time: int, kind: str) -> None:
    if kind == events.TYPE_RESUMED:
        data = msgspec.structs.replace(data, silent_s=600.0)
    event = make_event(kind, "x", time, data, source="/prod/tocsin")
    raw = events.encode(event)
    assert events.decode(raw) == event
    assert events.encode(events.decode(raw)) == raw
    read = from_structured_event(KafkaMessage({"content-type": CONTENT_TYPE.encode()}, None, raw))
    assert (read.get_type(), read.get_source()) == (kind, "/prod/tocsin")
    assert read.get_subject() == read.get_extension("partitionkey") == data.kpi
    body: Any = read.get_data()
    assert body["basis"] in ("event_time", "wall_clock")
    assert RFC3339.fullmatch(body["last_seen"])
    assert ("silent_s" in body) == (kind == events.TYPE_RESUMED)
    assert None not in leaves(body)


@pytest.mark.parametrize("raw", [b"", b"{}", b"[]", b'{"type": 1}', b"\xff"])
def test_what_is_no_event_is_none(raw: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        events.decode(raw)


def test_the_data_must_be_that_of_the_type() -> None:
    silence = SilenceData(kpi="a", last_seen="x", interval_s=60.0, silent_after_s=180.0, basis="event_time")
    raw = events.encode(make_event(events.TYPE_SILENT, "x", 0, silence))
    with pytest.raises(msgspec.ValidationError):
        events.decode(raw.replace(b"kpi.silent", b"anomaly.opened"))


def test_events_of_the_detector_are_valid_and_survive_a_round_trip() -> None:
    for _, raw in ALARMS.events:
        read = from_structured_event(KafkaMessage({"content-type": CONTENT_TYPE.encode()}, b"a", raw))
        assert read.get_subject() == "a"
        assert events.encode(events.decode(raw)) == raw


def test_no_field_of_an_event_is_null_or_infinite() -> None:
    # msgspec writes NaN and infinity as null.
    for event in ALARMS.data:
        assert all(leaf is not None for leaf in leaves(event)), event
        for name in ("value", "expected", "lower", "upper", "score", "threshold", "ratio", "probability"):
            assert math.isfinite(event["data"][name])


METRICS = ("cpu", "mem", "io", "net", "disk", "load", "swap")


def entity_alarms() -> Outputs:
    """Events of an entity of seven metrics, of which one, three and then all go wrong."""
    rng = np.random.default_rng(0)
    points: list[Record] = []
    for i in range(200):
        values = rng.normal(10.0, 1.0, 7)
        wrong = {100: [2], 130: [4, 0, 6], 160: range(7)}.get(i, [])
        values[list(wrong)] += 200.0 * (1 + np.arange(7))[list(wrong)]
        points.append(("host", T0 + i * MINUTE, dict(enumerate(map(float, values)))))
    setup = config(model=Persistence(features=7), metrics=METRICS, q=1e-3, model_ref="seven@1")
    return run(detector(setup), points)


def test_an_event_of_an_entity_names_the_metrics_that_make_up_its_score() -> None:
    out = entity_alarms()
    at = {event["time"]: event["data"] for event in out.data if event["type"] == events.TYPE_OPENED}
    named = {
        minute: [feature["metric"] for feature in at[iso_time(T0 + minute * MINUTE)]["features"]]
        for minute in (100, 130, 160)
    }
    assert named[100] == ["io"]
    assert set(named[130]) <= {"cpu", "disk", "swap"}
    assert named[130][0] == "swap", "the largest share first"
    assert 1 < len(named[160]) <= 5, "at most five, each with a twentieth of the score"
    for _, raw in out.events:
        read = from_structured_event(KafkaMessage({"content-type": CONTENT_TYPE.encode()}, b"host", raw))
        assert read.get_subject() == "host"
        assert events.encode(events.decode(raw)) == raw
    for event in out.data:
        data = event["data"]
        assert None not in leaves(event)
        assert not {"value", "expected", "lower", "upper"} & data.keys()
        assert "value" not in data.get("peak", {}), "an entity has no single one"
        shares = [feature["share"] for feature in data["features"]]
        assert shares == sorted(shares, reverse=True)
        assert all(share >= 0.05 for share in shares)
        assert sum(shares) <= 1 + 1e-5
        for feature in data["features"]:
            assert feature["lower"] <= feature["expected"] <= feature["upper"]
            outside = not feature["lower"] <= feature["value"] <= feature["upper"]
            assert outside or event["type"] != events.TYPE_OPENED or len(shares) > 1


def test_what_the_rule_says_is_in_the_event_only_if_it_says_something() -> None:
    for event in ALARMS.data:
        assert not {"rule", "labels", "supersedes", "features"} & event["data"].keys()
    spike = [*normal_points(100), ("a", T0 + 100 * MINUTE, 500.0)]
    setup = config()
    rule = replace(setup.rules[0], name="web", labels={"team": "payments"})
    event = run(detector(replace(setup, rules=(rule,))), spike).data[-1]
    assert (event["data"]["rule"], event["data"]["labels"]) == ("web", {"team": "payments"})


def test_a_duration_is_left_out_only_where_there_is_none() -> None:
    """Defaults are left out by identity: an incident may well have lasted 0 s."""
    data = msgspec.structs.replace(events.decode(ALARMS.events[0][1]).data, duration_s=float("0"))
    assert b'"duration_s":0.0' in events.encode(make_event(events.TYPE_RESOLVED, "x", 0, data))
    data = msgspec.structs.replace(data, duration_s=NO_DURATION)
    assert b"duration_s" not in events.encode(make_event(events.TYPE_RESOLVED, "x", 0, data))


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
    raw["data"]["forecast"] = {"cpu": 1.0}
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


def test_silence_ids_differ_by_series_and_time_and_are_pinned() -> None:
    assert len({silence_id(series, last) for series in ("a", "b", "a0") for last in (0, 1, 1000)}) == 9
    assert silence_id("checkout.latency_p99", T0) == "299c61149c04c9a9"  # by b2sum -l 64
