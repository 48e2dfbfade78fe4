"""The window, its grid and its time, held against what pandas and the clock of a city say."""

import json
import math
from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream import records
from stream.columns import SeriesIndex
from stream.detector import Detector
from tests.helpers import MINUTE, T0, Arrival, Persistence, columns, config, normal_points, run

W = 9
FUTURE_MS = 5 * MINUTE
JUNK = (b"", b"{", b"null", b'{"kpi": "a"}', b'{"kpi": "a", "timestamp": "yesterday", "value": 1}', b"\xff\xfe")


def window_of(live: Detector, name: str) -> dict[int, float]:
    """What arrived in the cells of a window, by the time of the cell; NaN for nothing."""
    slot = live.index[name]
    group, row = live.groups[live.group_of[slot]], live.row_of[slot]
    windows, placing = group.windows, group.placing
    newest, actual = int(windows.newest[row]), windows.actual(np.array([row], np.int32))[0]
    found: dict[int, float] = {}
    for cell in range(newest - int(windows.filled[row]) + 1, newest + 1):
        value = float(actual[cell % windows.window, 0]) + float(windows.origin[row, 0])
        found[int(placing.phase_ms[row] + cell * placing.interval_ms[row])] = value
    return found


def reindexed(accepted: list[tuple[int, float]]) -> dict[int, float]:
    """The same by pandas: the last value of each minute, on the grid, from the newest gap that outlasts a window on."""
    frame = pd.DataFrame(accepted, columns=["time", "value"])
    phase = int(frame["time"].iloc[0]) % MINUTE
    frame["cell"] = (frame["time"] - phase + MINUTE // 2) // MINUTE
    newest = frame["cell"].cummax()
    fresh = newest - newest.shift(fill_value=newest.iloc[0]) > W + 1
    begin = int(newest[fresh].iloc[-1]) if fresh.any() else int(frame["cell"].iloc[0])
    last = int(newest.iloc[-1])
    held = frame[frame["cell"] >= begin].groupby("cell")["value"].last()
    held = held.reindex(range(max(begin, last - W + 1), last + 1))
    return {phase + int(cell) * MINUTE: float(value) for cell, value in held.items()}  # type: ignore[call-overload]


@st.composite
def arrivals(draw: st.DrawFn) -> list[tuple[int, bytes, int, float]]:
    """(ms of arrival, record, event time, value) with gaps, repeats, late, future and junk records."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    now, found = T0, []
    rates = draw(st.tuples(*[st.sampled_from([0.0, 0.05, 0.3])] * 5))
    for _ in range(draw(st.integers(1, 80))):
        now += MINUTE
        gap, late, again, future, junk = (rng.random() < rate for rate in rates)
        if gap:
            now += int(rng.integers(1, 25)) * MINUTE
        times = [now + int(rng.integers(-20_000, 20_000)) * (rng.random() < 0.2)]
        if late:
            times.append(now - int(rng.integers(1, 15)) * MINUTE)
        if again:
            times.append(times[0])
        if future:
            times.append(now + FUTURE_MS + int(rng.integers(1, 10**9)))
        for time in times:
            value = float(rng.integers(-1000, 1000)) if rng.random() < 0.9 else math.nan
            raw = {"kpi": "a", "timestamp": time, "value": None if math.isnan(value) else value}
            found.append((now, json.dumps(raw).encode(), time, value))
        if junk:
            found.append((now, JUNK[int(rng.integers(len(JUNK)))], -1, math.nan))
    return found


@settings(max_examples=80, deadline=None, derandomize=True)
@given(stream=arrivals(), lateness=st.sampled_from([0, 3]), size=st.integers(1, 100))
def test_the_window_is_what_pandas_makes_of_the_points(
    stream: list[tuple[int, bytes, int, float]], lateness: int, size: int
) -> None:
    live = config(interval_ms=MINUTE, lateness_ms=lateness * MINUTE).detector()
    for begin in range(0, len(stream), size):
        part = stream[begin : begin + size]
        points, _ = records.decode(
            [raw for _, raw, _, _ in part],
            live.index,
            arrival_ms=[arrived for arrived, _, _, _ in part],
            future_limit_ms=FUTURE_MS,
        )
        live.accept(points)
    accepted = [(time, value) for now, _, time, value in stream if 0 <= time <= now + FUTURE_MS and value == value]
    if accepted:
        found, expected = window_of(live, "a"), reindexed(accepted)
        assert list(found) == list(expected)
        np.testing.assert_array_equal(list(found.values()), list(expected.values()))


# -- the interval changes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lateness_ms", [0, 3 * MINUTE])
@pytest.mark.parametrize("cut", [1, 7, 10**6])
def test_an_interval_that_changes_is_found_and_scored_on_its_new_grid(cut: int, lateness_ms: int) -> None:
    values = iter(np.random.default_rng(0).normal(10, 1, 1000))
    time, changes = T0, []
    stream: list[Arrival] = []
    for minutes, count in ((5, 150), (1, 200), (5, 150)):
        changes.append(len(stream))
        for _ in range(count):
            stream.append(("a", time, float(next(values))))
            time += minutes * MINUTE
    live = config(lateness_ms=lateness_ms).detector()
    scored: list[int] = []
    for begin in range(0, len(stream), cut):
        result = live.accept(columns(live, stream[begin : begin + cut]), want_scores=True)
        for part in result.scores:
            scored += part.timestamp_ms[~np.isnan(part.score)].tolist()
    assert live.counts.regridded == 2
    assert live.groups[0].placing.interval_ms[0] == 5 * MINUTE
    for change, end in ((changes[1], changes[2]), (changes[2], len(stream))):
        due = [time for _, time, _ in stream[change + 16 + 8 + W : end]]  # misfits, a probe and a window later
        assert set(due) <= set(scored)
    steps = np.diff([time for time in scored if time > stream[changes[1] + 40][1] and time < stream[changes[2] - 1][1]])
    assert set(steps.tolist()) == {MINUTE}


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), share=st.sampled_from([0.0, 0.2, 0.4]))
def test_lost_points_do_not_change_the_interval(seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    points = normal_points(400, seed=seed)
    stream = [point for i, point in enumerate(points) if i < 30 or rng.random() >= share]
    live = config().detector()
    run(live, stream)
    assert live.counts.regridded == 0
    assert live.groups[0].placing.interval_ms[0] == MINUTE


# -- the clocks change ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("day", ["2026-03-29", "2026-10-25"])
@pytest.mark.parametrize("zone", ["Europe/Berlin", "UTC"])
def test_points_in_local_time_stay_evenly_spaced_when_the_clocks_change(day: str, zone: str) -> None:
    start = datetime.fromisoformat(f"{day}T00:00:00+00:00")
    moments = [(start + timedelta(minutes=m)).astimezone(ZoneInfo(zone)) for m in range(-120, 240)]
    raw = [json.dumps({"kpi": "a", "timestamp": moment.isoformat(), "value": 1.0}).encode() for moment in moments]
    points, rejects = records.decode(raw, SeriesIndex())
    assert rejects == []
    assert set(np.diff(points.timestamp_ms).tolist()) == {MINUTE}
    live = config(model=Persistence()).detector()
    decoded, _ = records.decode(raw, live.index)
    live.accept(decoded)
    counts = live.counts
    assert (counts.duplicates, counts.late, counts.gaps, counts.completed, counts.regridded) == (0, 0, 0, 0, 0)
    assert counts.scored == len(raw) - W
