"""What a run was worth, on hand-made cases: caught, missed, false, and after how many points."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import msgspec
import numpy as np
import pytest

from stream.detector import Counts
from stream.events import (
    TYPE_OPENED,
    TYPE_RESOLVED,
    TYPE_UPDATED,
    Event,
    EventData,
    Feature,
    WindowInfo,
    iso_time,
    make_event,
)
from stream.points import Points
from stream.report import Summary, as_json, summarise
from tests.helpers import MINUTE, T0


def stream(*labels: str) -> Points:
    """Return one KPI a string: a point a minute, "1" anomalous, "0" normal, "." unknown; merged by time."""
    n = max(map(len, labels))
    rows = [(i, k, {"0": 0, "1": 1, ".": -1}[text[i]]) for i in range(n) for k, text in enumerate(labels)]
    minute, kpi, label = (np.array(column) for column in zip(*rows, strict=True))
    return Points(
        tuple("abc"[: len(labels)]),
        (T0 + minute * MINUTE).astype(np.int64),
        kpi.astype(np.int32),
        np.zeros(len(rows)),
        label.astype(np.int8),
    )


def event(kind: str, incident: str, minute: int, *, kpi: str = "a", opened: int = 0, last: int | None = None) -> Event:
    data = EventData(
        kpi=kpi, incident=incident, severity="warning", model="m@1", opened=iso_time(T0 + opened * MINUTE),
        anomalies=1, value=1, expected=0, lower=-1, upper=1, score=2, threshold=1, ratio=2, probability=1e-5,
        window=WindowInfo(30, 0), last_anomaly="" if last is None else iso_time(T0 + last * MINUTE),
        reason="" if last is None else "recovered",
    )  # fmt: skip
    return make_event(kind, f"{incident}-{minute}", T0 + minute * MINUTE, data)


def incident(begin: int, last: int, *, kpi: str = "a", resolved: bool = True) -> list[Event]:
    """Return the events of an incident that opened at a minute, had its last anomalous point at another, and ended."""
    name = f"{kpi}{begin}"
    made = [event(TYPE_OPENED, name, begin, kpi=kpi, opened=begin)]
    return made + [event(TYPE_RESOLVED, name, last + 3, kpi=kpi, opened=begin, last=last)] * resolved


def judged(points: Points, events: Sequence[Event], first: int = 0) -> Summary:
    return summarise(points, events, Counts(points=len(points.value)), elapsed_s=2.0, first=first)


@pytest.mark.parametrize(
    ("labels", "incidents", "caught", "delays", "false_alarms"),
    [
        ("0011100000", [(2, 4)], 1, [0], 0),
        ("0011100000", [(4, 6)], 1, [2], 0),  # at its last point
        ("0011100000", [(0, 3)], 1, [0], 0),  # open before it begins
        ("0011100000", [(5, 6)], 0, [None], 1),  # a point too late
        ("0011100000", [(0, 1)], 0, [None], 1),  # ended before it, though resolved inside of it
        ("0011100000", [], 0, [None], 0),
        ("0011100110", [(2, 8)], 2, [0, 0], 0),  # one incident over both
        ("0011100110", [(2, 2), (4, 4)], 1, [0, None], 0),  # two in one segment: neither is false
        ("0000000000", [(2, 4)], 0, [], 1),
        ("1100000001", [(0, 0), (9, 9)], 2, [0, 0], 0),  # at the edges
    ],
)
def test_segments_and_incidents(
    labels: str, incidents: list[tuple[int, int]], caught: int, delays: list[int | None], false_alarms: int
) -> None:
    summary = judged(stream(labels), [e for span in incidents for e in incident(*span)])
    assert (summary.caught, summary.false_alarms) == (caught, false_alarms)
    assert [segment.delay_points for segment in summary.segments] == delays
    assert [segment.incident is not None for segment in summary.segments] == [d is not None for d in delays]
    assert summary.incidents == len(incidents)


def test_an_incident_that_is_still_open_catches_what_follows() -> None:
    summary = judged(stream("0010000100"), incident(2, 2, resolved=False))
    assert summary.caught == 2


def test_kpis_are_kept_apart() -> None:
    summary = judged(stream("0110000", "0000110"), incident(1, 2, kpi="b"))
    assert (summary.caught, summary.false_alarms) == (0, 1)
    assert [(s.kpi, s.points) for s in summary.segments] == [("a", 2), ("b", 2)]
    both = judged(stream("0110000", "0000110"), incident(1, 2) + incident(5, 5, kpi="b"))
    assert [s.delay_points for s in both.segments] == [0, 1]


def test_without_labels_nothing_is_false() -> None:
    summary = judged(stream("......"), incident(2, 3))
    assert summary.false_alarms is None and summary.segments == () and summary.incidents == 1


def test_what_was_trained_on_is_not_counted() -> None:
    points = stream("0110000110")
    summary = judged(points, incident(7, 8), first=5)
    assert [(s.start, s.delay_points) for s in summary.segments] == [(iso_time(T0 + 7 * MINUTE), 0)]
    # the opening of an incident of the head is not reported, its end may be
    resolved = [e for e in incident(1, 2) if e.type == TYPE_RESOLVED]
    assert judged(points, resolved, first=5).false_alarms == 0
    reaching_in = [event(TYPE_UPDATED, "a4", 6, opened=4), event(TYPE_RESOLVED, "a4", 9, opened=4, last=7)]
    assert judged(points, reaching_in, first=5).caught == 1


def test_points_out_of_order_are_put_in_order() -> None:
    points = stream("0011100")
    order = np.array([0, 1, 3, 2, 4, 6, 5])
    shuffled = points.take(order)
    assert judged(shuffled, incident(3, 4)).segments == judged(points, incident(3, 4)).segments


def test_the_figures() -> None:
    summary = judged(stream("0011100"), incident(2, 4))
    assert summary.points == 7 and summary.points_per_s == 3.5 and summary.events == 2 and summary.kpis == 1
    assert as_json(summary)["summary"]["segments"][0]["points"] == 3


# -- entities ---------------------------------------------------------------------------------------------------------


def entities(*labels: str, metrics: tuple[str, ...] = ("cpu", "mem", "net")) -> Points:
    """Return one entity a string, as `stream` does KPIs: each minute a record of all metrics, of one label."""
    points = stream(*labels)
    many = points.take(np.repeat(np.arange(len(points)), len(metrics)))
    feature = np.tile(np.arange(len(metrics), dtype=np.int32), len(points))
    return dataclasses.replace(many, metrics=(metrics,) * len(labels), feature=feature)


def test_the_points_of_an_entity_s_segment_are_its_records() -> None:
    summary = judged(entities("0011100000", "0000000110"), incident(4, 6) + incident(1, 2, kpi="b"))
    assert (summary.caught, summary.false_alarms) == (1, 1)
    assert [(s.kpi, s.points, s.delay_points) for s in summary.segments] == [("a", 3, 2), ("b", 2, None)]
    assert (summary.kpis, summary.entities) == (0, 2)
    assert judged(stream("0011"), []).entities == 0


def test_a_segment_says_which_metrics_its_incident_named() -> None:
    made = event(TYPE_OPENED, "a2", 2, opened=2)
    features = [Feature(metric, 0.5, 1.0, 0.0, -1.0, 1.0) for metric in ("net", "cpu")]
    made = msgspec.structs.replace(made, data=msgspec.structs.replace(made.data, features=features))
    (segment,) = judged(entities("00111"), [made]).segments
    assert segment.metrics == ("net", "cpu")


def test_an_entity_watched_metric_by_metric_is_caught_by_any_of_them() -> None:
    (segment,) = judged(entities("0011100000"), incident(3, 4, kpi="a.mem")).segments
    assert (segment.kpi, segment.delay_points, segment.metrics) == ("a", 1, ("mem",))
    assert judged(entities("0011100000"), incident(3, 4, kpi="a.mem")).false_alarms == 0
