from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from stream.silence import NEVER, Changes, Kind, Silence

SERIES = 4

# (series, event time, Kafka time, span from now on or -1 for that of before); both clocks run coarse, so that equal
# times, late points and leaps are all common
Point = tuple[int, int, int, int]
points = st.lists(
    st.tuples(
        st.integers(0, SERIES - 1),
        st.integers(0, 12) | st.integers(0, 60),
        st.integers(-1, 30),
        st.sampled_from([-1, -1, -1, -1, 0, 3, 8]),
    ),
    max_size=40,
)
spans = st.lists(st.sampled_from([0, 1, 2, 3, 5, 10]), min_size=SERIES, max_size=SERIES)

Change = tuple[Kind, int, int, int, int, int]  # as the fields of Changes


@dataclass
class Plain:
    """Silence, one point at a time."""

    span: list[int]
    last: list[int] = field(default_factory=lambda: [NEVER] * SERIES)
    arrived: list[int] = field(default_factory=lambda: [-1] * SERIES)
    silent: list[bool] = field(default_factory=lambda: [False] * SERIES)
    watermark: int = NEVER

    def accept(self, x: int, t: int, arrived: int, span: int, row: int) -> list[Change]:
        changes = []
        if self.awaited(x) and t > self.last[x] + self.span[x]:
            changes.append(self.fall(x, row))
        before = self.span[x]
        if span >= 0:
            self.span[x] = span
        up = self.span[x] == 0 or t + self.span[x] >= max(self.watermark, t)
        if self.silent[x] and t > self.last[x] and up:
            changes.append((Kind.RESUMED, x, row, self.last[x], t, before))
            self.silent[x] = False
        self.last[x] = max(self.last[x], t)
        self.arrived[x] = max(self.arrived[x], arrived)
        self.watermark = max(self.watermark, t)
        for y in range(SERIES):
            if y != x and self.awaited(y) and self.watermark > self.last[y] + self.span[y]:
                changes.append(self.fall(y, row))
        return changes

    def awaited(self, x: int) -> bool:
        return not self.silent[x] and self.span[x] > 0 and self.last[x] >= 0

    def fall(self, x: int, row: int) -> Change:
        self.silent[x] = True
        return (Kind.SILENT, x, row, self.last[x], self.last[x] + self.span[x], self.span[x])

    def clock(self, now: int) -> list[Change]:
        late = [
            (self.arrived[x] + self.span[x], x)
            for x in range(SERIES)
            if not self.silent[x] and self.span[x] > 0 and 0 <= self.arrived[x] < now - self.span[x]
        ]
        for _, x in late:
            self.silent[x] = True
        return [(Kind.SILENT, x, -1, self.last[x], deadline, self.span[x]) for deadline, x in sorted(late)]


def changes_of(changes: Changes) -> list[Change]:
    columns = (changes.kind, changes.slot, changes.row, changes.last_ms, changes.time_ms, changes.span_ms)
    return [(Kind(kind), *rest) for kind, *rest in zip(*(column.tolist() for column in columns), strict=True)]


def fresh(span: list[int]) -> Silence:
    silence = Silence(SERIES)
    silence.span_ms[:] = span
    return silence


def accept(silence: Silence, batch: list[Point], first_row: int) -> list[Change]:
    slot, time, arrived, span = np.array(batch, np.int64).reshape(-1, 4).T
    spans = silence.span_ms.tolist()
    for i, (x, after) in enumerate(zip(slot.tolist(), span.tolist(), strict=True)):
        spans[x] = span[i] = spans[x] if after < 0 else after
    row = first_row + np.arange(len(batch))
    return changes_of(silence.accept(slot.astype(np.int32), time, arrived, row, span))


def assert_equal(silence: Silence, plain: Plain) -> None:
    assert silence.last_ms.tolist() == plain.last
    assert silence.arrived_ms.tolist() == plain.arrived
    assert silence.silent.tolist() == plain.silent
    assert silence.watermark_ms == plain.watermark


@given(points, spans, st.lists(st.integers(0, 40), max_size=6))
def test_any_cut_into_batches_equals_one_point_at_a_time(batch: list[Point], span: list[int], cuts: list[int]) -> None:
    silence, plain = fresh(span), Plain(list(span))
    edges = [0, *sorted(min(cut, len(batch)) for cut in cuts), len(batch)]
    found = []
    for begin, end in pairwise(edges):
        found += accept(silence, batch[begin:end], begin)
    expected = [change for row, point in enumerate(batch) for change in plain.accept(*point, row)]
    assert found == expected
    assert_equal(silence, plain)


intervals = st.tuples(st.integers(0, SERIES - 1), st.sampled_from([0, 1, 4, 20]))


@given(spans, st.lists(st.tuples(points, st.none() | st.integers(0, 60), st.none() | intervals), max_size=6))
def test_batches_clocks_and_spans_that_become_known(
    span: list[int], turns: list[tuple[list[Point], int | None, tuple[int, int] | None]]
) -> None:
    silence, plain = fresh(span), Plain(list(span))
    row = 0
    for batch, now, known in turns:
        expected = [change for i, point in enumerate(batch) for change in plain.accept(*point, row + i)]
        assert accept(silence, batch, row) == expected
        row += len(batch)
        if now is not None:
            deadline, fallen = silence.next_deadline_ms(), plain.clock(now)
            assert (deadline is not None and now > deadline) == bool(fallen)
            assert not fallen or deadline == fallen[0][4]
            assert changes_of(silence.clock(now)) == fallen
            assert changes_of(silence.clock(now)) == []
        if known is not None:
            silence.span_ms[known[0]] = plain.span[known[0]] = known[1]
        assert_equal(silence, plain)


@given(points, spans)
def test_a_series_falls_silent_and_resumes_by_turns(batch: list[Point], span: list[int]) -> None:
    silence = fresh(span)
    silent = [False] * SERIES
    for kind, x, row, last, time, _ in accept(silence, batch, 0):
        assert silent[x] == (kind == Kind.RESUMED)
        assert last < time <= max(t for _, t, _, _ in batch[: row + 1])
        silent[x] = not silent[x]
    assert silence.silent.tolist() == silent


@given(points, points, spans)
def test_arrays_are_all_that_must_be_kept(before: list[Point], after: list[Point], span: list[int]) -> None:
    silence = fresh(span)
    accept(silence, before, 0)
    restored = Silence(SERIES)
    for name in Silence.ARRAYS:
        setattr(restored, name, getattr(silence, name).copy())
    assert accept(restored, after, 0) == accept(silence, after, 0)
