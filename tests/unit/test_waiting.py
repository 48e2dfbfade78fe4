"""Open cells against the same in plain Python: what closes, when, and with what in it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream.columns import Columns
from stream.grid import NO_CELL
from stream.placing import Cells
from stream.waiting import Waiting

MINUTE = 60_000
NAN = float("nan")
W = 11  # room for six cells, lateness at most four

Record = tuple[int, int, dict[int, float]]  # cell, ms after it, values of features
Closed = tuple[int, int, list[float]]  # cell, time, values


def waiting(features: int, series: int = 1, window: int = W) -> Waiting:
    one = Waiting(window, features)
    one.resize(series)
    return one


def feed(to: Waiting, arrivals: Sequence[tuple[int, Record]], lateness: int, first_row: int = 0) -> Cells:
    """Take records of several series in as one batch, a row each."""
    points = [
        (slot, cell * MINUTE + after, value, row, feature, cell)
        for row, (slot, (cell, after, values)) in enumerate(arrivals, first_row)
        for feature, value in values.items()
    ]
    slot, time, value, row, feature, cells = zip(*points, strict=True) if points else ((),) * 6
    batch = Columns.of(slot, time, value, row, feature)
    return to.accept(batch, np.array(cells, np.int64), np.full(len(points), lateness))


def listed(ready: Cells, slot: int = 0) -> list[Closed]:
    """The cells of a series, in order."""
    own = np.flatnonzero(ready.slot == slot)
    return [(int(ready.cell[i]), int(ready.timestamp_ms[i]), ready.value[i].tolist()) for i in own]


def rows(ready: Cells) -> list[tuple[int, int]]:
    return [(int(cell), int(row)) for cell, row in zip(ready.cell, ready.row, strict=True)]


def same(one: Sequence[Closed], other: Sequence[Closed]) -> bool:
    return repr(one) == repr(other)  # NaN equals itself


def open_cells(of: Waiting, slot: int = 0) -> list[int]:
    return sorted(of.cell[slot][of.cell[slot] != NO_CELL].tolist())


# -- by hand ----------------------------------------------------------------------------------------------------------


def begun(features: int = 2, lateness: int = 2) -> Waiting:
    """A series whose cell 0 has been closed, with nothing open behind it but the cell 3 that closed it."""
    one = waiting(features)
    feed(one, [(0, (0, 0, {0: 1.0})), (0, (lateness + 1, 0, {0: 1.5}))], lateness)
    assert one.closed[0] == 0
    return one


def test_before_the_first_closing_a_complete_cell_is_not_closed() -> None:
    one = waiting(1)
    assert rows(feed(one, [(0, (7, 0, {0: 1.0})), (0, (5, 0, {0: 2.0})), (0, (8, 0, {0: 3.0}))], 3)) == []
    assert (open_cells(one), int(one.closed[0]), int(one.newest[0])) == ([5, 7, 8], NO_CELL, 8)
    # 9 makes 5 overdue, and what follows without a gap goes with it once 6 has come.
    assert rows(feed(one, [(0, (9, 0, {0: 4.0}))], 3, first_row=3)) == [(5, 3)]
    assert rows(feed(one, [(0, (6, 0, {0: 5.0}))], 3, first_row=4)) == [(6, 4), (7, 4), (8, 4), (9, 4)]


def test_a_cell_is_closed_when_it_is_complete_and_those_before_it_are_closed() -> None:
    one = begun()
    assert rows(feed(one, [(0, (1, 10, {1: 2.0}))], 2)) == []
    assert rows(feed(one, [(0, (2, 0, {0: 3.0, 1: 4.0}))], 2)) == [], "cell 1 may still be completed"
    ready = feed(one, [(0, (1, 5, {0: 1.0}))], 2, first_row=9)
    assert listed(ready) == [(1, MINUTE + 10, [1.0, 2.0]), (2, 2 * MINUTE, [3.0, 4.0])], "the latest time of the cell"
    assert rows(ready) == [(1, 9), (2, 9)]
    assert open_cells(one) == [3]


@pytest.mark.parametrize("lateness", [1, 2, 4])
def test_a_cell_is_closed_when_a_newer_one_lies_more_than_the_lateness_ahead(lateness: int) -> None:
    one = waiting(2)
    assert rows(feed(one, [(0, (10, 0, {0: 1.0})), (0, (10 + lateness, 0, {0: 2.0}))], lateness)) == []
    ready = feed(one, [(0, (11 + lateness, 0, {1: 3.0}))], lateness, first_row=2)
    assert same(listed(ready)[:1], [(10, 10 * MINUTE, [1.0, NAN])])
    assert rows(ready)[0] == (10, 2)


def test_overdue_cells_are_closed_in_order_and_gaps_between_them_are_none() -> None:
    one = waiting(2)
    feed(one, [(0, (13, 0, {0: 3.0})), (0, (10, 0, {0: 0.0})), (0, (12, 0, {1: 2.0}))], 4)
    ready = feed(one, [(0, (100, 0, {0: 9.0}))], 4)
    expected = [
        (10, 10 * MINUTE, [0.0, NAN]),
        (12, 12 * MINUTE, [NAN, 2.0]),
        (13, 13 * MINUTE, [3.0, NAN]),
    ]
    assert same(listed(ready), expected)
    assert (open_cells(one), int(one.closed[0])) == ([100], 13)


def test_a_late_value_is_handed_on_as_it_came() -> None:
    one = begun()
    assert same(listed(feed(one, [(0, (0, 7, {1: 5.0}))], 2)), [(0, 7, [NAN, 5.0])])
    assert same(listed(feed(one, [(0, (-50, 0, {0: 6.0}))], 2)), [(-50, -50 * MINUTE, [6.0, NAN])])
    assert (open_cells(one), int(one.closed[0])) == ([3], 0)


def test_a_cell_of_a_gap_that_was_waited_for_is_closed_at_once() -> None:
    one = begun()
    feed(one, [(0, (10, 0, {0: 1.0}))], 2)
    assert int(one.closed[0]) == 3
    assert same(listed(feed(one, [(0, (6, 0, {1: 2.0}))], 2)), [(6, 6 * MINUTE, [NAN, 2.0])])
    assert int(one.closed[0]) == 6
    # What else comes for it, or for the gap before it, is late.
    assert same(listed(feed(one, [(0, (6, 0, {0: 3.0}))], 2)), [(6, 6 * MINUTE, [3.0, NAN])])
    assert same(listed(feed(one, [(0, (5, 0, {0: 4.0, 1: 4.0}))], 2)), [(5, 5 * MINUTE, [4.0, 4.0])])
    assert (open_cells(one), int(one.closed[0])) == ([10], 6)
    # 8 lies within the lateness, and waits for 7; 7 does not, and lets 8 go.
    assert rows(feed(one, [(0, (8, 0, {0: 1.0, 1: 1.0}))], 2)) == []
    assert rows(feed(one, [(0, (7, 0, {0: 1.0}))], 2)) == [(7, 0), (8, 0)]


def test_the_last_value_of_a_feature_stays_and_the_others_are_counted() -> None:
    one = waiting(2)
    feed(one, [(0, (5, 0, {0: 1.0})), (0, (5, 0, {0: 2.0, 1: 2.0})), (0, (5, 3, {1: 3.0}))], 0)
    assert listed(feed(one, [(0, (6, 0, {0: 9.0}))], 0)) == [(5, 5 * MINUTE + 3, [2.0, 3.0])]
    assert one.repeats == 2


def test_a_record_that_names_a_feature_twice_counts_it_twice() -> None:
    one = waiting(2)
    batch = Columns.of([0, 0], [0, 0], [1.0, 2.0], [0, 0], [1, 1])
    one.accept(batch, np.zeros(2, np.int64), np.zeros(2, np.int64))
    assert same(listed(feed(one, [(0, (1, 0, {0: 1.0}))], 0)), [(0, 0, [NAN, 2.0])])
    assert one.repeats == 1


def test_records_of_a_batch_are_taken_one_by_one() -> None:
    """A cell that the first record closes does not wait for what the second brings, though both came together."""
    one = begun()
    ready = feed(one, [(0, (9, 0, {0: 1.0})), (0, (3, 0, {1: 2.0}))], 2)
    assert rows(ready) == [(3, 0), (3, 1)]
    assert same(listed(ready), [(3, 3 * MINUTE, [1.5, NAN]), (3, 3 * MINUTE, [NAN, 2.0])])


def test_new_rows_are_empty() -> None:
    one = begun()
    before = {name: getattr(one, name).copy() for name in ("closed", "newest", "cell", "time_ms", "value")}
    one.resize(5)
    for name, array in before.items():
        np.testing.assert_array_equal(getattr(one, name)[:1], array)
    assert [open_cells(one, slot) for slot in range(5)] == [[3], [], [], [], []]
    assert one.closed.tolist() == [0, NO_CELL, NO_CELL, NO_CELL, NO_CELL]
    assert rows(feed(one, [(4, (1, 0, {0: 1.0, 1: 1.0}))], 2)) == []


# -- against a dict ---------------------------------------------------------------------------------------------------


@dataclass
class Naive:
    """One series."""

    features: int
    lateness: int
    closed: int | None = None
    newest: int | None = None
    pending: dict[int, tuple[int, dict[int, float]]] = field(default_factory=dict)
    repeats: int = 0

    def take(self, record: Record) -> list[Closed]:
        cell, after, values = record
        time = cell * MINUTE + after
        out: list[Closed] = []
        if self.closed is not None and cell <= self.closed:
            return [(cell, time, self._row(values))]
        self.newest = cell if self.newest is None else max(self.newest, cell)
        for overdue in sorted(self.pending):
            if overdue < self.newest - self.lateness:
                out.append(self._close(overdue))
        if cell < self.newest - self.lateness:
            self.closed = cell
            out.append((cell, time, self._row(values)))
        else:
            latest, before = self.pending.get(cell, (time, {}))
            self.repeats += len(before.keys() & values.keys())
            self.pending[cell] = max(latest, time), before | values
        while self.closed is not None and len(self.pending.get(self.closed + 1, (0, {}))[1]) == self.features:
            out.append(self._close(self.closed + 1))
        return out

    def _close(self, cell: int) -> Closed:
        self.closed = cell
        time, values = self.pending.pop(cell)
        return cell, time, self._row(values)

    def _row(self, values: dict[int, float]) -> list[float]:
        return [values.get(f, NAN) for f in range(self.features)]


def random_records(rng: Any, n: int, features: int, spread: float) -> list[Record]:
    """Cells of which some are missing, come in parts, once more, late, or much too late."""
    found: list[tuple[float, Record]] = []
    cell = int(rng.integers(-20, 20))
    for _ in range(n):
        cell += 1 if rng.random() < 0.9 else int(rng.integers(1, 30))
        for f in range(features):
            for _ in range(1 + (rng.random() < 0.1)):
                if rng.random() < 0.15:
                    continue
                late = rng.uniform(0, spread) + (40 if rng.random() < 0.02 else 0)
                record = (cell, int(rng.integers(-MINUTE // 2, MINUTE // 2)), {f: float(rng.integers(1000))})
                if rng.random() < 0.3:  # together with another one
                    record[2][int(rng.integers(features))] = float(rng.integers(1000))
                found.append((cell + late, record))
    return [record for _, record in sorted(found, key=lambda one: one[0])]


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    features=st.sampled_from([1, 2, 3, 5]),
    window=st.sampled_from([3, 4, 11, 12]),
    lateness=st.integers(0, 5),
    spread=st.sampled_from([0.0, 1.5, 6.0]),
    restore=st.booleans(),
)
def test_waiting_equals_a_dict(
    seed: int, features: int, window: int, lateness: int, spread: float, restore: bool
) -> None:
    rng = np.random.default_rng(seed)
    lateness, series = min(lateness, window // 2 - 1), 3
    one = waiting(features, series, window)
    naive = [Naive(features, lateness) for _ in range(series)]
    streams = [random_records(rng, int(rng.integers(5, 40)), features, spread) for _ in range(series)]
    order = rng.permutation(np.repeat(np.arange(series), [len(stream) for stream in streams])).tolist()
    queues = [iter(stream) for stream in streams]
    arrivals = [(slot, next(queues[slot])) for slot in order]
    at = 0
    while at < len(arrivals):
        batch = arrivals[at : at + int(rng.integers(1, 12))]
        expected: list[list[Closed]] = [[] for _ in range(series)]
        causes: list[list[tuple[int, int]]] = [[] for _ in range(series)]
        for row, (slot, record) in enumerate(batch, at):
            came = naive[slot].take(record)
            expected[slot] += came
            causes[slot] += [(cell, row) for cell, _, _ in came]
        ready = feed(one, batch, lateness, first_row=at)
        at += len(batch)
        for slot, truth in enumerate(naive):
            assert same(listed(ready, slot), expected[slot])
            own = ready.slot == slot
            assert list(zip(ready.cell[own].tolist(), ready.row[own].tolist(), strict=True)) == causes[slot]
            # The ring holds all that is pending, and nothing else: no two cells ever share a place.
            assert open_cells(one, slot) == sorted(truth.pending)
            assert one.closed[slot] == (NO_CELL if truth.closed is None else truth.closed)
            if restore:
                keep = one.open_points(slot)
                assert (keep.slot == slot).all()
                again = waiting(features, series, window)
                again.restore(slot, int(one.closed[slot]), keep, (keep.timestamp_ms + MINUTE // 2) // MINUTE)
                assert open_cells(again, slot) == open_cells(one, slot)
                assert again.newest[slot] == (NO_CELL if truth.newest is None else truth.newest)
                for name in ("closed", "cell", "time_ms", "value"):
                    getattr(one, name)[slot] = getattr(again, name)[slot]
    assert one.repeats == sum(truth.repeats for truth in naive)


# -- the order of arrival ---------------------------------------------------------------------------------------------


def within(records: Iterable[Record], rng: Any, lateness: int) -> list[Record]:
    """Records in an order in which none comes after one that lies more than the lateness ahead."""
    pool = list(records)
    keys = [cell + rng.uniform(0, lateness + 1 - 1e-9) for cell, _, _ in pool]
    return [pool[i] for i in np.argsort(keys, kind="stable")]


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    features=st.integers(1, 4),
    lateness=st.integers(0, W // 2 - 1),
    n=st.integers(1, 40),
)
def test_every_order_within_the_lateness_closes_the_same_cells(seed: int, features: int, lateness: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    cells = np.cumsum(rng.choice([1, 1, 1, 1, 2, 7], n)).tolist()
    parts: list[Record] = [
        (cell, int(rng.integers(0, MINUTE // 3)), {f: float(rng.integers(100))})
        for cell in cells
        for f in range(features)
        if rng.random() < 0.8
    ]
    end: Record = (cells[-1] + lateness + 1, 0, {0: 1.0})
    results = []
    for _ in range(4):
        one = waiting(features)
        arrivals = [(0, record) for record in [*within(parts, rng, lateness), end]]
        closed: list[Closed] = []
        at = 0
        while at < len(arrivals):
            size = int(rng.integers(1, 15))
            closed += listed(feed(one, arrivals[at : at + size], lateness, first_row=at))
            at += size
        # Each cell once, rising: nothing was late, so nothing is filled in after it was closed.
        numbers = [cell for cell, _, _ in closed]
        assert numbers == sorted(set(numbers))
        assert numbers[: len({cell for cell, _, _ in parts})] == sorted({cell for cell, _, _ in parts})
        results.append(closed)
    assert all(same(result, results[0]) for result in results)
