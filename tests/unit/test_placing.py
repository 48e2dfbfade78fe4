"""Grids: how they are found, when they are doubted, and when they are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream import grid
from stream.columns import Columns, Int64Array
from stream.placing import NO_PHASE, Placing
from stream.policy import Policy, PolicyTable
from tests.helpers import MINUTE, T0

P = grid.PROBE_POINTS
Placed = tuple[int, int]  # cell, event time

INFERRED, WAITING = Policy(), Policy(wait=True, lateness_ms=3 * MINUTE)


class Watch:
    """Series of which only the grids are looked at, one a policy."""

    def __init__(self, *policies: Policy) -> None:
        n = len(policies)
        self.placing = Placing(PolicyTable.of(policies))
        self.placing.resize(n)
        for slot, policy in enumerate(policies):
            self.placing.add(slot, slot, policy.wait)
        self.newest = np.zeros(n, np.int64)
        self.started = np.zeros(n, np.bool_)
        self.placed: list[list[Placed]] = [[] for _ in policies]
        self.rows: list[list[int]] = [[] for _ in policies]
        self.changes: list[list[tuple[int, int, int]]] = [[] for _ in policies]  # row, interval, before
        self.regridded: list[int] = []

    def send(self, points: Columns) -> None:
        """Do as a group does, windows and all that left out."""
        placing = self.placing
        placing.begin_batch()
        while len(points):
            points, regridded = placing.release(points)
            self.started[regridded] = False
            self.regridded += regridded.tolist()
            cell = placing.cell(points.slot, points.timestamp_ms)
            laid = grid.place(points.slot, cell, self.newest[points.slot], self.started[points.slot])
            after = placing.watch_fit(laid, points.slot[laid.order], points.row[laid.order])
            for i in laid.order[~after].tolist():
                slot = int(points.slot[i])
                self.newest[slot] = max(cell[i], self.newest[slot]) if self.started[slot] else cell[i]
                self.started[slot] = True
                self.placed[slot].append((int(cell[i]), int(points.timestamp_ms[i])))
                self.rows[slot].append(int(points.row[i]))
            points = points.take(np.sort(laid.order[after]))
        for change in placing.changes:
            for slot, *what in zip(change.slot, change.row, change.interval_ms, change.before_ms, strict=True):
                row, interval, before = (int(x) for x in what)
                self.changes[slot].append((row, interval, before))

    def send_times(self, times: Sequence[int] | Int64Array, first_row: int = 0) -> None:
        """Send points of series 0 in one batch."""
        rows = np.arange(first_row, first_row + len(times))
        self.send(Columns.of(np.zeros(len(times)), times, np.zeros(len(times)), rows))

    @property
    def interval_ms(self) -> int:
        return int(self.placing.interval_ms[0])

    @property
    def phase_ms(self) -> int:
        return int(self.placing.phase_ms[0])

    @property
    def probing(self) -> bool:
        return bool(self.placing.probing[0])


def every(interval: int, n: int, start: int = T0) -> list[int]:
    return [start + i * interval for i in range(n)]


def regular(interval: int = MINUTE, n: int = 20, start: int = T0) -> Watch:
    """A series whose grid is known."""
    one = Watch(INFERRED)
    one.send_times(every(interval, n, start))
    assert one.interval_ms == interval
    assert not one.probing
    one.placed, one.rows, one.changes = [[]], [[]], [[]]
    return one


# -- the first probe --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_points_are_held_until_there_are_eight_times(seed: int) -> None:
    one, times = Watch(INFERRED), np.random.default_rng(seed).permutation(every(MINUTE, P))
    for row, time in enumerate(times[:-1]):
        one.send_times([time], first_row=row)
        assert one.probing
        assert one.interval_ms == 0
    assert one.placed == [[]]
    assert (one.placing.held.row == -1).all(), "a row means nothing in another batch"
    one.send_times(times[-1:], first_row=42)
    assert one.placed == [[(i, T0 + i * MINUTE) for i in range(P)]], "by time, whatever the order of arrival"
    assert one.rows == [[42] * P], "caused by the one that was missing"
    assert one.changes == [[(42, MINUTE, 0)]]
    assert (one.interval_ms, one.phase_ms, len(one.placing.held), one.regridded) == (MINUTE, T0, 0, [])


def test_of_equal_times_the_last_one_stays_and_the_others_are_counted() -> None:
    one = Watch(INFERRED)
    times = [*every(MINUTE, 4), T0, T0, *every(MINUTE, 4, T0 + 4 * MINUTE)]
    points = Columns.of(np.zeros(10), times, np.arange(10.0))
    one.send(points.take(np.arange(5)))
    assert one.placing.held.value.tolist() == [4, 1, 2, 3]
    released, _ = one.placing.release(points.take(np.arange(5, 10)))
    assert released.value.tolist() == [5, 1, 2, 3, 6, 7, 8, 9]
    assert one.placing.repeats == 2


def test_what_comes_behind_the_probe_keeps_its_order_and_its_rows() -> None:
    one = Watch(INFERRED)
    one.send_times([*every(MINUTE, P), T0 + 10 * MINUTE, T0 + 3 * MINUTE])
    assert one.placed[0][P:] == [(10, T0 + 10 * MINUTE), (3, T0 + 3 * MINUTE)]
    assert one.rows == [[P - 1] * P + [P, P + 1]]


def test_series_of_a_batch_probe_each_for_itself() -> None:
    one = Watch(INFERRED, INFERRED, Policy(interval_ms=MINUTE))
    slot, step = np.arange(33) % 3, np.arange(33) // 3
    time = T0 + step * np.array([1000, 7000, 60_000])[slot] + slot
    one.send(Columns.of(slot, time, np.zeros(33)).take(slot * step != 7))
    assert one.placing.interval_ms.tolist() == [1000, 7000, MINUTE]
    assert [len(placed) for placed in one.placed] == [11, 10, 11]
    assert one.changes == [[(21, 1000, 0)], [(25, 7000, 0)], []]


# -- a configured interval --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [T0, T0 + 12_345, T0 - 1, 7])
def test_a_configured_grid_goes_through_the_first_point(first: int) -> None:
    one = Watch(Policy(interval_ms=MINUTE))
    assert one.phase_ms == NO_PHASE
    one.send_times([first, first - MINUTE, first + 29_999, first + 30_000, first + MINUTE])
    cell = first // MINUTE
    assert one.phase_ms == first % MINUTE
    assert [at for at, _ in one.placed[0]] == [cell, cell - 1, cell, cell + 1, cell + 1]
    assert one.placing.time_ms(np.zeros(1, np.int32), np.array([cell])).tolist() == [first]
    assert one.changes == [[]]


@pytest.mark.parametrize("interval", [1000, 5 * MINUTE])
def test_a_configured_interval_is_never_doubted(interval: int) -> None:
    one = Watch(Policy(interval_ms=MINUTE))
    one.send_times(every(interval, 500))
    assert (one.interval_ms, one.probing, len(one.placed[0]), one.changes) == (MINUTE, False, 500, [[]])
    assert one.placing.misfit[0] == 0


# -- series that wait -------------------------------------------------------------------------------------------------


def shuffled(times: Sequence[int], lateness_ms: int, rng: Any) -> list[int]:
    """In an order in which none comes after one that lies more than the lateness ahead."""
    keys = np.array(times) + rng.uniform(0, lateness_ms, len(times))
    return [times[i] for i in np.argsort(keys, kind="stable")]


@pytest.mark.parametrize(("configured", "need"), [(0, P), (MINUTE, 1)])
def test_a_waiting_series_probes_until_the_earliest_times_can_no_longer_change(configured: int, need: int) -> None:
    one = Watch(Policy(wait=True, lateness_ms=3 * MINUTE, interval_ms=configured))
    times = every(MINUTE, need + 4)
    one.send_times(times[:-1])
    assert one.probing, "the last of them may yet be preceded by one that comes just late enough"
    one.send_times(times[-1:], first_row=8)
    assert not one.probing
    assert one.changes == [[(8, MINUTE, 0)]]
    assert one.phase_ms == (T0 % MINUTE if configured else T0)
    assert [time for _, time in one.placed[0]] == times
    assert one.rows == [[8] * len(times)]


@pytest.mark.parametrize("configured", [0, MINUTE, 17_000])
@pytest.mark.parametrize("seed", range(10))
def test_the_grid_of_a_waiting_series_does_not_depend_on_the_order_within_the_lateness(
    seed: int, configured: int
) -> None:
    rng = np.random.default_rng(seed)
    steps = rng.choice([1, 1, 1, 2, 5], 30) * MINUTE + rng.integers(-9_000, 9_000, 30)
    times = (T0 + np.cumsum(steps)).tolist()
    found = []
    for _ in range(6):
        one, order, at = (
            Watch(Policy(wait=True, lateness_ms=3 * MINUTE, interval_ms=configured)),
            shuffled(times, 3 * MINUTE, rng),
            0,
        )
        while at < len(order):
            size = int(rng.integers(1, 9))
            one.send_times(order[at : at + size], first_row=at)
            at += size
        assert not one.probing
        assert sorted(time for _, time in one.placed[0]) == times
        found.append((one.interval_ms, one.phase_ms, sorted(one.placed[0]), one.placed[0][: 1 if configured else P]))
    assert all(one == found[0] for one in found)


def test_the_parts_of_an_entity_are_held_each_and_the_last_of_equal_ones_stays() -> None:
    one = Watch(Policy(wait=True, lateness_ms=MINUTE, interval_ms=MINUTE))
    time, feature = [T0, T0, T0 + MINUTE, T0, T0 + 2 * MINUTE], [0, 1, 0, 1, 2]
    points = Columns.of(np.zeros(5), time, np.arange(5.0), feature=feature)
    for i in range(4):
        one.send(points.take(np.array([i])))
    assert one.placing.held.value.tolist() == [0, 2, 3]
    assert one.placing.held.feature.tolist() == [0, 0, 1]
    released, _ = one.placing.release(points.take(np.array([4])))
    # What decided goes first, by time; the rest as it came.
    assert released.value.tolist() == [0, 3, 2, 4]
    assert released.row.tolist() == [4] * 4


def test_a_waiting_series_keeps_the_interval_that_it_began_with() -> None:
    one = Watch(WAITING)
    one.send_times([*every(MINUTE, 20), *every(5 * MINUTE, 200, T0 + 25 * MINUTE)])
    assert (one.interval_ms, one.probing, len(one.changes[0]), len(one.placed[0])) == (MINUTE, False, 1, 220)


def test_waiting_and_other_series_probe_side_by_side() -> None:
    one = Watch(INFERRED, WAITING)
    for i in range(13):
        one.send(Columns.of([0, 1], [T0 + i * MINUTE, T0 + i * 1000], [0.0, 0.0], [2 * i, 2 * i + 1]))
    assert one.placing.interval_ms.tolist() == [MINUTE, 0], "3 minutes have not passed"
    assert one.placing.held.slot.tolist() == [1] * 13
    one.send(Columns.of([1, 0], [T0 + 240_000, T0 + 13 * MINUTE], [0.0, 0.0]))
    assert one.placing.interval_ms.tolist() == [MINUTE, 1000]
    assert [len(placed) for placed in one.placed] == [14, 14]


@pytest.mark.parametrize(
    ("lateness_ms", "interval_ms", "window", "cells"),
    [(0, MINUTE, 9, 0), (59_999, MINUTE, 9, 0), (MINUTE, MINUTE, 9, 1), (10**12, MINUTE, 9, 3), (10**12, 1, 30, 14)],
)
def test_lateness_in_cells_is_less_than_half_a_window(
    lateness_ms: int, interval_ms: int, window: int, cells: int
) -> None:
    one = Watch(Policy(lateness_ms=lateness_ms, interval_ms=interval_ms))
    assert one.placing.lateness_cells(np.zeros(2, np.int32), window).tolist() == [cells] * 2


# -- probing again ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (5 * MINUTE, MINUTE),
        (MINUTE, 5 * MINUTE),
        (MINUTE, 2 * MINUTE),
        (10_000, 5_000),
        (10_000, 250),
        (60_000, 86_400_000),
    ],
)
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_an_interval_that_changes_is_noticed(before: int, after: int, size: int) -> None:
    one = regular(before, 30)
    times = every(after, 80, T0 + 30 * before)
    for at in range(0, len(times), size):
        one.send_times(times[at : at + size], first_row=at)
    assert one.interval_ms == after
    assert (one.phase_ms - times[0]) % after == 0
    assert one.regridded == [0]
    assert one.placing.backoff[0] == 0
    assert [time for _, time in one.placed[0]] == times, "nothing is lost"
    (stopped, none, had), (decided, got, known) = one.changes[0]
    assert (none, had, got, known) == (0, before, after, 0)
    assert decided == stopped + P, "eight points decide"
    assert stopped < 40
    # Up to the one that was once too often off the old grid, from there on the new one.
    cells = [cell for cell, _ in one.placed[0]]
    assert cells[: stopped + 1] == [(time - T0 + before // 2) // before for time in times[: stopped + 1]]
    assert np.diff(cells[stopped + 1 :]).tolist() == [1] * (len(times) - stopped - 2)
    assert one.rows[0] == [*range(stopped + 1), *[decided] * P, *range(decided + 1, len(times))]


def test_misfit_rises_by_two_and_falls_by_one() -> None:
    one = regular()
    end = T0 + 19 * MINUTE
    for time, misfit in [(end, 2), (end, 4), (end + MINUTE, 3), (end + 5 * MINUTE, 5), (end, 7), (end + 6 * MINUTE, 6)]:
        one.send_times([time])
        assert one.placing.misfit[0] == misfit
    one.send_times(every(MINUTE, 10, end + 7 * MINUTE))
    assert one.placing.misfit[0] == 0, "never below"
    one.send_times([end] * 7)
    assert (one.placing.misfit[0], one.probing) == (14, False)
    one.send_times([end])
    assert (one.placing.misfit[0], one.probing) == (0, True)


def test_what_comes_twice_refutes_no_grid_and_the_probes_grow_rarer() -> None:
    """A producer that sends every point twice; the more often the grid proves right, the longer it is not doubted."""
    one = regular()
    times = np.repeat(every(MINUTE, 30_000, T0 + 20 * MINUTE), 2)
    one.send_times(times)
    assert (one.interval_ms, one.regridded, one.placing.backoff[0]) == (MINUTE, [], 8)
    stops = [row for row, interval, _ in one.changes[0] if interval == 0]
    ends = [row for row, interval, _ in one.changes[0] if interval]
    between = [stop - end for end, stop in zip(ends, stops[1:], strict=False)]
    # Two points, one of them off: the doubt grows by one with each pair.
    assert between[:3] == pytest.approx([2 * 32, 2 * 64, 2 * 128], abs=20)
    assert between[7:] == pytest.approx([2 * 16 * 2**8] * len(between[7:]), abs=20)
    assert one.placing.repeats == (P - 1) * len(ends), "held, they are one point"


@pytest.mark.parametrize("seed", range(8))
def test_an_irregular_series_keeps_its_grid(seed: int) -> None:
    """It refutes every grid; a window that begins anew again and again would never be judged."""
    rng = np.random.default_rng(seed)
    one = Watch(INFERRED)
    one.send_times(T0 + np.cumsum(rng.exponential(MINUTE, 5000).astype(np.int64) + 1))
    assert one.regridded == []
    assert one.placing.backoff[0] > 0
    assert len({interval for _, interval, _ in one.changes[0] if interval}) == 1


@pytest.mark.parametrize(("odd", "taken"), [(0, True), (2, True), (3, False), (7, False)])
def test_five_of_seven_steps_must_be_of_the_new_interval(odd: int, taken: bool) -> None:
    one = regular(MINUTE, 30)
    one.send_times(every(5 * MINUTE, 8, T0 + 35 * MINUTE))
    assert one.probing
    steps = np.full(7, 5.0)
    steps[:odd] = (8.0, 3.0, 7.0, 11.0, 4.0, 13.0, 6.0)[:odd]
    start = T0 + 100 * MINUTE
    one.send_times([start, *(start + np.cumsum(steps * MINUTE).astype(np.int64))])
    assert not one.probing
    assert one.interval_ms == (5 * MINUTE if taken else MINUTE)
    assert one.regridded == ([0] if taken else [])
    assert one.placing.backoff[0] == (0 if taken else 1)


def test_an_interval_that_is_no_multiple_of_the_old_one_is_found() -> None:
    one = regular(MINUTE, 30)
    one.send_times(every(90_000, 60, T0 + 30 * MINUTE))  # every second point still falls into the next cell
    assert (one.interval_ms, one.probing, one.regridded) == (90_000, False, [0])


def test_the_same_interval_at_another_phase_keeps_the_grid() -> None:
    one = regular(MINUTE, 30)
    one.send_times([T0] * 8)  # once too often
    start = T0 + 30 * MINUTE + 25_000
    one.send_times([start, start + 1000, *every(MINUTE, 6, start + MINUTE)])  # two in one cell
    assert (one.interval_ms, one.phase_ms, one.regridded, one.placing.backoff[0]) == (MINUTE, T0, [], 1)


def test_new_rows_have_no_grid() -> None:
    one = regular()
    one.placing.resize(4)
    assert one.placing.interval_ms.tolist() == [MINUTE, 0, 0, 0]
    assert one.placing.phase_ms.tolist() == [T0, NO_PHASE, NO_PHASE, NO_PHASE]


# -- against the same a point at a time -------------------------------------------------------------------------------


@dataclass
class Naive:
    """One series that is not waiting, its interval inferred."""

    interval: int = 0
    phase: int = 0
    probing: bool = True
    newest: int | None = None
    misfit: int = 0
    backoff: int = 0
    held: list[int] = field(default_factory=list)
    repeats: int = 0
    placed: list[Placed] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    changes: list[tuple[int, int, int]] = field(default_factory=list)
    regridded: int = 0

    def take(self, time: int, row: int) -> None:
        if self.probing:
            self.repeats += time in self.held
            self.held = sorted({*self.held, time})
            if len(self.held) == P:
                self.decide(row)
                held, self.held = self.held, []
                for one in held:
                    self.take(one, row)
            return
        cell = (time - self.phase + self.interval // 2) // self.interval
        lead = 1 if self.newest is None else cell - self.newest
        self.newest = cell if self.newest is None else max(cell, self.newest)
        self.placed.append((cell, time))
        self.rows.append(row)
        self.misfit = max(self.misfit - 1, 0) if lead == 1 else self.misfit + 2
        if self.misfit >= 16 * 2**self.backoff:
            self.probing, self.misfit = True, 0
            self.changes.append((row, 0, self.interval))

    def decide(self, row: int) -> None:
        found, phase = (int(x[0]) for x in grid.infer_interval(np.array([self.held])))
        self.probing, self.misfit = False, 0
        if self.interval:
            alike = sum(abs(later - earlier - found) <= 0.1 * found for earlier, later in pairwise(self.held))
            if alike < 5 or abs(found - self.interval) <= 0.1 * found:
                self.backoff = min(self.backoff + 1, 8)
                self.changes.append((row, self.interval, 0))
                return
            self.regridded += 1
            self.newest = None
        self.interval, self.phase, self.backoff = found, phase, 0
        self.changes.append((row, found, 0))


def random_times(rng: Any, n: int) -> list[int]:
    """A series whose interval changes now and then, with gaps, jitter, and times that come late or once more."""
    interval, time = int(rng.choice([1000, MINUTE, 7000])), T0
    jitter = rng.choice([0, 0, 0.1, 0.4])
    times: list[int] = []
    while len(times) < n:
        kind = rng.choice(["on", "change", "gap", "again", "irregular"], p=[0.6, 0.2, 0.1, 0.05, 0.05])
        if kind == "change":
            interval = max(int(interval * rng.choice([0.2, 5, 0.5, 1.4])), 1)
        length = int(rng.integers(1, 60))
        if kind == "gap":
            time += interval * int(rng.integers(2, 50))
        elif kind == "again" and times:
            times += [times[int(rng.integers(max(len(times) - 20, 0), len(times)))] for _ in range(length % 12)]
        for _ in range(length):
            time += int(rng.exponential(interval)) + 1 if kind == "irregular" else interval
            times.append(time + int(rng.uniform(-jitter, jitter) * interval))
    if rng.random() < 0.5:
        order = np.argsort(np.arange(n) + rng.uniform(0, 4, n))
        return [times[i] for i in order]
    return times[:n]


@settings(max_examples=120, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 400), largest=st.sampled_from([1, 5, 100, 10_000]))
def test_placing_equals_a_point_at_a_time(seed: int, n: int, largest: int) -> None:
    rng = np.random.default_rng(seed)
    series = 3
    naive = [Naive() for _ in range(series)]
    queues = [iter(random_times(rng, n)) for _ in range(series)]
    slot = rng.permutation(np.repeat(np.arange(series), n))
    time = np.array([next(queues[s]) for s in slot])
    one = Watch(*[INFERRED] * series)
    at = 0
    while at < len(slot):
        end = min(at + int(rng.integers(1, largest + 1)), len(slot))
        one.send(Columns.of(slot[at:end], time[at:end], np.zeros(end - at), np.arange(at, end)))
        at = end
    for row, (s, t) in enumerate(zip(slot.tolist(), time.tolist(), strict=True)):
        naive[s].take(t, row)
    for s, truth in enumerate(naive):
        assert one.placed[s] == truth.placed
        assert one.rows[s] == truth.rows
        assert one.changes[s] == truth.changes
        assert one.regridded.count(s) == truth.regridded
        mine = [getattr(one.placing, name)[s] for name in ("interval_ms", "misfit", "backoff", "probing")]
        assert mine == [truth.interval, truth.misfit, truth.backoff, truth.probing]
        assert sorted(one.placing.held.timestamp_ms[one.placing.held.slot == s]) == truth.held
    assert one.placing.repeats == sum(truth.repeats for truth in naive)
