"""What was flagged is not learned: on made-up KPIs of several kinds, with the bundled checkpoint."""

from dataclasses import replace

import numpy as np
import pytest

from stream import backtest
from stream.events import TYPE_OPENED, TYPE_RESOLVED, Event, EventData
from stream.sample import Sample, generate
from stream.service import detector_factory, use_one_thread
from stream.settings import load_settings
from tests.live import START_MS

KINDS = ("requests", "cpu", "latency")
DAY = 288  # points
SIX_HOURS = 72


def events_of(one: Sample) -> list[Event]:
    use_one_thread()
    detector = detector_factory(load_settings({}))()
    points = backtest.sample_points([one])
    return [event for _, result in backtest.run(detector, points) for event in result.events]


def incidents(events: list[Event]) -> list[tuple[int, int, str]]:
    """Return (opening, end, reason) of each incident, in points from the beginning."""
    found = {}
    for event in events:
        if not isinstance(event.data, EventData):
            continue
        point = (int(np.datetime64(event.time.removesuffix("Z"), "ms").astype(np.int64)) - START_MS) // 300_000
        if event.type == TYPE_OPENED:
            found[event.data.incident] = (point, 10**9, "")
        elif event.type == TYPE_RESOLVED:
            found[event.data.incident] = (found[event.data.incident][0], point, event.data.reason)
    return list(found.values())


def gross(one: Sample) -> float:
    """Return a deviation that nobody would call normal for a KPI: six times its largest step."""
    return 6 * float(np.abs(np.diff(one.value)).max())


@pytest.mark.parametrize("kind", KINDS)
def test_six_hours_of_anomaly_then_normal_and_the_next_anomaly_is_found(kind: str) -> None:
    one = generate(16, 300, 3, START_MS, kind=kind, clean=True)
    calm = incidents(events_of(one))
    size = gross(one)
    start, spike = 8 * DAY, 8 * DAY + SIX_HOURS + 24  # the spike comes two hours after the end
    value = one.value.copy()
    times = (one.timestamp_ms - START_MS) // 300_000
    value[(times >= start) & (times < start + SIX_HOURS)] += size
    value[times == spike] += size
    found = incidents(events_of(replace(one, value=value)))
    new = [incident for incident in found if incident not in calm]
    first = next(incident for incident in new if incident[0] == start)
    assert first[1] - (start + SIX_HOURS) <= 6, "it ends soon after the anomaly, not before"
    assert any(incident[0] == spike for incident in new), "the threshold and the window have not learned the anomaly"
    echoes = [incident for incident in new if start + SIX_HOURS + 6 < incident[0] < spike]
    assert echoes == [], "what is normal again is not an anomaly"


@pytest.mark.parametrize("kind", KINDS)
def test_one_spike_is_one_incident(kind: str) -> None:
    one = generate(16, 300, 4, START_MS, kind=kind, clean=True)
    calm = incidents(events_of(one))
    size = gross(one)
    value = one.value.copy()
    times = (one.timestamp_ms - START_MS) // 300_000
    for day in (8, 10, 12):
        value[times == day * DAY + 100] += size
    found = incidents(events_of(replace(one, value=value)))
    new = [incident for incident in found if incident not in calm]
    assert [incident[0] for incident in new] == [day * DAY + 100 for day in (8, 10, 12)]
    assert all(end - begin <= 6 for begin, end, _ in new)
