"""What is found in real labelled data, with the bundled checkpoint that has never seen it."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from stream import backtest
from stream.csvfile import merge, read_table
from stream.events import TYPE_OPENED, Event
from stream.report import Summary, summarise
from stream.service import detector_factory, use_one_thread
from stream.settings import load_settings

pytestmark = pytest.mark.data


def run(path: Path) -> tuple[list[Event], Summary]:
    use_one_thread()
    settings = load_settings({})
    points = merge([read_table(path)])
    detector = detector_factory(settings)()
    events = [event for _, result in backtest.run(detector, points) for event in result.events]
    return events, summarise(points, events, detector.counts, elapsed_s=1.0)


def test_travel_time_451_alarms_at_its_labelled_point(data_dir: Path) -> None:
    events, summary = run(data_dir / "nab/data/realTraffic/TravelTime_451.csv.gz")
    opened = [datetime.fromisoformat(event.time) for event in events if event.type == TYPE_OPENED]
    assert datetime(2015, 8, 11, 12, 7, tzinfo=UTC) in opened
    assert len(opened) <= 3, "seven weeks of an irregular KPI"
    # seven tenths of its grid are missing, and completed
    assert summary.missing_completed > summary.scored


def test_a_real_kpi_s_segments_are_caught_at_once(data_dir: Path) -> None:
    _, summary = run(data_dir / "kpi/c02607e8.csv.gz")
    assert summary.caught >= 6
    assert len(summary.segments) == 7
    assert all(segment.delay_points is None or segment.delay_points <= 7 for segment in summary.segments)
    assert summary.false_alarms is not None
    assert summary.false_alarms <= 6, "q promises 1.8 in sixty-one days"


def test_a_kpi_with_real_gaps_gives_no_flood(data_dir: Path) -> None:
    _, summary = run(data_dir / "kpi/ab216663.csv.gz")
    assert summary.missing_completed > 100
    assert summary.false_alarms is not None
    assert summary.false_alarms <= 5
