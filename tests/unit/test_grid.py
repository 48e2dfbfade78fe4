import numpy as np
import pytest

from stream.grid import infer_interval, place

T0 = 1_469_376_000_000
S, MIN, H = 1_000, 60_000, 3_600_000


def infer(*timestamps: int) -> tuple[int, int]:
    interval, phase = infer_interval(np.array([timestamps]))
    assert interval.dtype == phase.dtype == np.int64
    return int(interval[0]), int(phase[0])


def times(*differences: float, unit: int = MIN) -> list[int]:
    return [T0, *(T0 + np.rint(np.cumsum(differences) * unit).astype(np.int64)).tolist()]


@pytest.mark.parametrize(
    "interval", [1, 7, 10, 999, S, 7 * S, 10 * S, 37 * S, MIN, 5 * MIN, 7 * MIN, H, 24 * H, 168 * H]
)
@pytest.mark.parametrize("phase", [0, 1, 3_333])
def test_a_regular_series_has_its_own_interval_and_phase(interval: int, phase: int) -> None:
    assert infer(*(T0 + phase + interval * np.arange(8))) == (interval, T0 + phase)


@pytest.mark.parametrize(
    ("differences", "interval"),
    [
        ((1, 1, 1, 1, 1, 1, 1), 1),
        ((1, 2, 1, 1, 3, 1, 1), 1),  # gaps
        ((5, 1, 1, 7, 1, 9, 1), 1),
        ((5, 5, 1, 5, 5, 4, 5), 5),  # the commonest, not the smallest
        ((1, 2, 1, 2, 1, 2, 3), 1),  # as many of each: the smallest
        ((3, 2, 1, 4, 5, 7, 6), 1),  # no two alike
        ((1, 1, 0.4, 0.6, 1, 1, 1), 1),  # a restart in between
        ((1, 1, 1, 5000, 1, 1, 1), 1),
        ((10, 25, 10, 5, 5, 30, 25), 5),  # NAB speed_6005, its first points, minutes
        ((10, 19, 91, 10, 10, 187, 280), 10),  # NAB TravelTime_451
    ],
)
def test_the_commonest_difference_is_the_interval(differences: tuple[float, ...], interval: int) -> None:
    found, phase = infer(*times(*differences))
    assert found == interval * MIN
    assert abs(phase - T0) % found <= found // 4


@pytest.mark.parametrize(("interval", "clock"), [(S, 3), (10 * S, 40), (MIN, 250), (5 * MIN, 400)])
def test_the_jitter_of_a_clock_is_not_in_the_interval(interval: int, clock: int) -> None:
    rng = np.random.default_rng(interval)
    for _ in range(50):
        found, _ = infer(*(T0 + interval * np.arange(8) + rng.integers(-clock, clock + 1, 8)))
        assert found == interval


@pytest.mark.parametrize("interval", [10 * S, MIN, 15 * MIN])
def test_a_tenth_of_jitter_costs_few_series_their_interval(interval: int) -> None:
    # Telegraf's collection_jitter of 1 s at 10 s; the median of the differences alone is wrong for three of five.
    rng = np.random.default_rng(1)
    jitter = rng.integers(-interval // 10, interval // 10, (2000, 8))
    found, phase = infer_interval(T0 + interval * np.arange(8) + jitter)
    assert (found == interval).mean() > 0.97
    assert (np.abs(found / interval - 1) < 0.05).mean() > 0.995
    assert (np.abs(phase - T0) <= interval // 4)[found == interval].all()


def test_an_interval_that_is_not_round_is_kept() -> None:
    # A loop of "work, then sleep 60": 62 s, where a grid of 60 s would complete a point every half hour.
    assert infer(*(T0 + 62 * S * np.arange(8) + [0, 3, -2, 5, 1, -4, 2, 0]))[0] == 62 * S
    assert infer(*(T0 + 60_300 * np.arange(8)))[0] == 60_300


def test_phase_is_the_middle_of_the_points_even_when_the_first_is_off() -> None:
    late_first = T0 + MIN * np.arange(8)
    late_first[0] += 25 * S
    interval, phase = infer(*late_first)
    assert interval == MIN
    assert (phase - T0) % MIN == 0


def test_series_are_judged_each_by_itself() -> None:
    rows = np.array([times(*(i,) * 7) for i in (1, 5, 60)])
    interval, phase = infer_interval(rows)
    assert interval.tolist() == [MIN, 5 * MIN, H]
    assert phase.tolist() == [T0] * 3
    assert infer_interval(rows[:0])[0].shape == (0,)


def test_place_by_hand() -> None:
    #                        series 4 has cell 9      series 2 is new      series 4 again
    slot = np.array([4, 2, 4, 4, 2, 2, 4], np.int32)
    cell = np.array([10, -3, 13, 12, -3, -2, 14], np.int64)
    newest = np.array([9, 777, 9, 9, 777, 777, 9], np.int64)
    started = np.array([True, False, True, True, False, False, True])
    placed = place(slot, cell, newest, started)
    assert placed.order.tolist() == [1, 4, 5, 0, 2, 3, 6]
    assert placed.cell.tolist() == [-3, -3, -2, 10, 13, 12, 14]
    assert placed.lead.tolist() == [1, 0, 1, 1, 3, -1, 1]
    assert placed.start.tolist() == [True, False, False, True, False, False, False]


def test_place_nothing() -> None:
    empty = np.array([], np.int64)
    placed = place(empty.astype(np.int32), empty, empty, empty.astype(np.bool_))
    assert [len(part) for part in (placed.order, placed.cell, placed.lead, placed.start)] == [0, 0, 0, 0]


def test_place_keeps_points_apart_that_lie_ages_apart() -> None:
    # An interval of 1 ms inferred from the first points of a device that counted from 1970 until it had the time.
    cell = np.array([8, 1_469_376_000_000, 1_469_376_000_001, 7_258_118_400_000, 9], np.int64)
    placed = place(np.zeros(5, np.int32), cell, np.full(5, 7), np.ones(5, np.bool_))
    assert placed.lead.tolist() == [
        1,
        1_469_375_999_992,
        1,
        7_258_118_400_000 - 1_469_376_000_001,
        9 - 7_258_118_400_000,
    ]
