import numpy as np
import pytest

from stream.silence import NEVER, Changes, Kind, Silence

MINUTE = 60_000
T0 = 1_469_376_000_000
SILENT, RESUMED = Kind


def series(*span_min: int) -> Silence:
    silence = Silence(len(span_min))
    silence.span_ms[:] = np.array(span_min) * MINUTE
    return silence


def accept(silence: Silence, *points: tuple[int, int], arrived: int = -1, first_row: int = 0) -> list[tuple[int, ...]]:
    """Feed points (series, minute); return (kind, series, row, minute of the newest point, minute) of each change."""
    slot, minute = np.array(points, np.int64).reshape(-1, 2).T
    changes = silence.accept(
        slot.astype(np.int32),
        T0 + minute * MINUTE,
        np.full(len(slot), arrived),
        first_row + np.arange(len(slot)),
        silence.span_ms[slot],
    )
    return told(changes)


def told(changes: Changes) -> list[tuple[int, ...]]:
    last, time = (changes.last_ms - T0) // MINUTE, (changes.time_ms - T0) // MINUTE
    columns = (changes.kind, changes.slot, changes.row, last, time)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def test_a_series_falls_silent_when_the_others_have_passed_its_deadline() -> None:
    silence = series(5, 5)
    assert accept(silence, (0, 0), (1, 0), (1, 5)) == []
    assert accept(silence, (1, 6), (1, 7)) == [(SILENT, 0, 0, 0, 5)]
    assert silence.silent.tolist() == [True, False]


def test_its_next_point_resumes_it() -> None:
    silence = series(5, 5)
    assert accept(silence, (0, 0), (1, 4), (1, 6), (0, 7)) == [(SILENT, 0, 2, 0, 5), (RESUMED, 0, 3, 0, 7)]
    assert not silence.silent.any()


def test_alone_a_series_learns_of_its_silence_by_its_own_next_point() -> None:
    silence = series(5)
    assert accept(silence, (0, 0), (0, 5)) == []
    assert accept(silence, (0, 11)) == [(SILENT, 0, 0, 5, 10), (RESUMED, 0, 0, 5, 11)]


def test_all_that_fall_by_one_point_go_by_slot_after_the_series_of_the_point() -> None:
    silence = series(5, 3, 5, 4)
    accept(silence, (3, 0), (2, 0), (1, 0), (0, 0))
    assert accept(silence, (2, 9)) == [
        (SILENT, 2, 0, 0, 5),
        (RESUMED, 2, 0, 0, 9),
        (SILENT, 0, 0, 0, 5),
        (SILENT, 1, 0, 0, 3),
        (SILENT, 3, 0, 0, 4),
    ]


def test_a_late_point_or_the_same_again_resumes_nothing() -> None:
    silence = series(5, 5)
    accept(silence, (0, 2), (1, 2), (1, 9))
    assert accept(silence, (0, 1), (0, 2)) == []
    assert silence.silent.tolist() == [True, False]
    assert silence.last_ms[0] == T0 + 2 * MINUTE


def test_a_span_of_zero_is_never_silent_but_moves_the_watermark() -> None:
    silence = series(0, 5)
    assert silence.watermark_ms == NEVER
    assert accept(silence, (1, 0), (0, 90), (0, 500)) == [(SILENT, 1, 1, 0, 5)]
    assert accept(silence, (1, 501)) == [(RESUMED, 1, 0, 0, 501)]
    assert silence.watermark_ms == T0 + 501 * MINUTE


def test_a_span_that_becomes_known_counts_from_the_next_point_on() -> None:
    silence = series(0, 0)
    accept(silence, (0, 0), (1, 30))
    silence.span_ms[:] = 5 * MINUTE
    assert accept(silence, (1, 31)) == [(SILENT, 0, 0, 0, 5)]


def test_a_span_that_is_taken_away_leaves_the_silence_to_be_ended() -> None:
    silence = series(5, 5)
    accept(silence, (0, 0), (1, 9))
    silence.span_ms[:] = 0
    assert accept(silence, (0, 9)) == [(RESUMED, 0, 0, 0, 9)]


def test_a_series_without_a_point_is_not_awaited() -> None:
    silence = series(5, 5)
    assert accept(silence, (1, 0), (1, 4), (1, 8)) == []
    assert told(silence.clock(T0 * 2)) == []


def test_a_series_that_lags_stays_silent_until_it_is_up_with_the_others() -> None:
    silence = series(5, 5)
    points = ((1, 60), (0, 0), (0, 1), (0, 0), (1, 61), (0, 2), (0, 7), (1, 62), (0, 56), (0, 57), (1, 62))
    assert accept(silence, *points) == [(SILENT, 0, 4, 1, 6), (RESUMED, 0, 9, 56, 57)]


def test_far_times_of_many_series_overflow_nothing() -> None:
    size = 5_000
    silence = Silence(size)
    silence.span_ms[:] = MINUTE
    slot, none = np.arange(size, dtype=np.int32), np.full(size, -1)
    silence.accept(slot, np.zeros(size, np.int64), none, slot.astype(np.int64), silence.span_ms)
    far = np.full(2 * size, 2**60)
    changes = silence.accept(np.tile(slot, 2), far, np.tile(none, 2), np.arange(2 * size), np.full(2 * size, MINUTE))
    # The first point shows its own silence and, the watermark being there, that of all others.
    assert np.bincount(changes.kind).tolist() == [0, size, size]
    assert changes.slot[:2].tolist() == [0, 0]
    assert changes.kind.tolist() == [SILENT, RESUMED, *[SILENT] * (size - 1), *[RESUMED] * (size - 1)]
    assert not silence.silent.any()


def test_the_clock_goes_by_the_arrival_of_the_newest_record() -> None:
    silence = series(5, 3, 0, 9)
    assert silence.next_deadline_ms() is None
    now = 10**12
    accept(silence, (0, 0), (1, 1), (2, 0), arrived=now)
    accept(silence, (3, 0), arrived=-1)  # unknown: not to be judged by the clock
    accept(silence, (0, 0), arrived=now + MINUTE)  # nothing new, but a record
    accept(silence, (0, 1), arrived=now - MINUTE)
    assert silence.next_deadline_ms() == now + 3 * MINUTE
    assert len(silence.clock(now + 3 * MINUTE)) == 0
    changes = silence.clock(now + 6 * MINUTE + 1)
    assert changes.kind.tolist() == [SILENT, SILENT]
    assert changes.slot.tolist() == [1, 0]
    assert changes.row.tolist() == [-1, -1]
    assert changes.last_ms.tolist() == [T0 + MINUTE, T0 + MINUTE]
    assert changes.time_ms.tolist() == [now + 3 * MINUTE, now + 6 * MINUTE]
    assert changes.span_ms.tolist() == [3 * MINUTE, 5 * MINUTE]
    assert silence.next_deadline_ms() is None
    assert accept(silence, (0, 2), arrived=now + 7 * MINUTE) == [(RESUMED, 0, 0, 1, 2)]
    assert silence.next_deadline_ms() == now + 12 * MINUTE


def test_equal_deadlines_of_the_clock_go_by_slot() -> None:
    silence = series(1, 3, 2)
    for slot, arrived in ((0, 3), (1, 1), (2, 2)):
        accept(silence, (slot, 0), arrived=arrived * MINUTE)
    assert silence.clock(5 * MINUTE).slot.tolist() == [0, 1, 2]


def test_no_points_change_nothing() -> None:
    silence = series(5)
    accept(silence, (0, 0))
    silence.silent[0] = True
    assert accept(silence) == []


def test_resize_keeps_what_is_known() -> None:
    silence = series(5, 5)
    accept(silence, (0, 0), (1, 9), arrived=7)
    silence.resize(4)
    assert silence.silent.tolist() == [True, False, False, False]
    assert silence.last_ms.tolist() == [T0, T0 + 9 * MINUTE, NEVER, NEVER]
    assert silence.arrived_ms.tolist() == [7, 7, -1, -1]
    assert silence.span_ms.tolist() == [5 * MINUTE, 5 * MINUTE, 0, 0]
    assert accept(silence, (0, 10)) == [(RESUMED, 0, 0, 0, 10)]


@pytest.mark.parametrize("rows", [[7, 7, 7], [7, 8, 8]])
def test_points_of_one_record_share_its_row(rows: list[int]) -> None:
    silence = series(5, 5, 5)
    accept(silence, (0, 0), (1, 0), (2, 0))
    time = T0 + np.array([9, 9, 9]) * MINUTE
    changes = silence.accept(np.arange(3, dtype=np.int32), time, np.full(3, -1), np.array(rows), silence.span_ms)
    assert changes.row.tolist() == [rows[0]] * 4 + rows[1:]
