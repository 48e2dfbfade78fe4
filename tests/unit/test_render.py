"""What people read: lines as short as they are clear."""

from __future__ import annotations

import msgspec
import pytest

from stream import render
from stream.events import TYPE_OPENED, TYPE_RESUMED, TYPE_SILENT, SilenceData, make_event
from stream.report import Segment, Summary
from tests.unit.test_report import event


@pytest.mark.parametrize(
    ("value", "width", "shown"),
    [
        (415.531, 190.2, "416"),
        (1441.61, 90.0, "1,441.6"),
        (0.84213, 0.01, "0.8421"),
        (3_000_000_415.2, 1000.0, "3,000,000,415"),
        (5.0, 0.0, "5"),
        (1.5e-9, 1e-10, "1.5e-09"),
        (2e29, 1e28, "2e+29"),
        (-12.345, 1.0, "-12.35"),
        (0.5, float("inf"), "0.5"),
    ],
)
def test_numbers_have_the_digits_that_mean_something(value: float, width: float, shown: str) -> None:
    assert render.number(value, width) == shown


def test_an_event_is_one_line() -> None:
    line = render.event_line(event(TYPE_OPENED, "x", 3)).plain
    assert line == (
        "2016-07-24 16:03:00  opened    warning  a  1.00, expected 0.00 (-1.00 … 1.00), 2.00 × threshold, p = 1e-05"
    )


def test_silence_is_one_line() -> None:
    data = SilenceData(
        kpi="a", last_seen="2016-07-24T16:00:00Z", interval_s=60, silent_after_s=300, basis="wall_clock", rule="x"
    )
    silent = make_event(TYPE_SILENT, "x-silent", 1_469_376_300_000, data)
    assert render.event_line(silent).plain == (
        "2016-07-24 16:05:00  silent             a  "
        "no point for 5 min, the last one at 2016-07-24 16:00:00, by the clock"
    )
    resumed = make_event(TYPE_RESUMED, "x-resumed", 1_469_383_200_000, msgspec.structs.replace(data, silent_s=7200.0))
    assert render.event_line(resumed).plain == (
        "2016-07-24 18:00:00  resumed            a  sends points again after 2.0 h"
    )


SEGMENTS = (
    Segment("a.long.name.of.a.kpi", "2026-01-18T07:35:00Z", "2026-01-18T07:35:00Z", 1, "1", 0),
    Segment("b", "2026-01-19T20:20:00Z", "2026-01-19T20:30:00Z", 3, None, None),
    Segment("b", "2026-01-31T23:50:00Z", "2026-02-01T00:10:00Z", 1234, "2", 1),
)
SUMMARY = Summary(
    kpis=2, points=7954, scored=7894, missing_completed=59, events=20, incidents=10, silences=0, segments=SEGMENTS,
    caught=2, false_alarms=2, rejected=0, elapsed_s=3.0, points_per_s=2651.0, counts={},
)  # fmt: skip


def plain(summary: Summary) -> list[str]:
    return [line.plain for line in render.summary_lines(summary)]


def test_the_table_is_short_and_complete() -> None:
    lines = plain(SUMMARY)
    assert lines[:4] == [
        "labelled segment                 points                      KPI",
        "01-18 07:35                           1  at its first point  a.long.name.of.a.kpi",
        "01-19 20:20       – 20:30             3  missed              b",
        "01-31 23:50       – 02-01 00:10   1,234  after 1 point       b",
    ]
    assert "points                    7,954 of 2 KPIs, 7,894 scored" in lines
    assert "labelled segments caught  2 of 3" in lines


def test_one_kpi_needs_no_column_and_80_columns_are_enough() -> None:
    lines = plain(msgspec.structs.replace(SUMMARY, kpis=1))
    assert not any("a.long.name" in line for line in lines)
    assert max(map(len, lines)) <= 80


def test_years_and_seconds_are_shown_where_they_tell_something() -> None:
    segments = (SEGMENTS[0], Segment("b", "2027-01-19T20:20:01Z", "2027-01-19T20:20:03Z", 3, None, None))
    lines = plain(msgspec.structs.replace(SUMMARY, kpis=1, segments=segments))
    assert lines[2].startswith("2027-01-19 20:20:01  – 20:20:03")


def test_without_labels_nothing_is_said_of_them() -> None:
    text = "\n".join(plain(msgspec.structs.replace(SUMMARY, segments=(), false_alarms=None, rejected=3)))
    assert "segment" not in text and "false" not in text and "points rejected           3" in text
