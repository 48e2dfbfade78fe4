from typing import Any

import numpy as np
import pandas as pd
import pytest

from stream.windows import Windows

W = 5
NAN = float("nan")


def slots(*of: int) -> "np.ndarray[Any, np.dtype[np.int32]]":
    return np.array(of, np.int32)


def one(start: int = 0, values: list[float] | None = None, window: int = W) -> Windows:
    """A series 0 whose values stand in the cells from `start` on."""
    windows = Windows(window, 1, capacity=1)
    for i, value in enumerate(values or []):
        put(windows, start + i, value)
    return windows


def put(windows: Windows, cell: int, actual: float, seen: float | None = None) -> None:
    """Append one cell; `seen` differs from `actual` where it was completed or flagged."""
    shown = actual if seen is None else seen
    if windows.filled[0] == 0:
        windows.begin(slots(0), np.array([[actual]]))
    windows.append(slots(0), np.array([cell]), np.array([[shown]]), np.array([[actual]]), np.array([seen is None]))


def history(windows: Windows, cell: int) -> tuple[list[float], list[bool]]:
    values, learned = windows.history(slots(0), np.array([cell]))
    assert values.dtype == np.float64
    assert values.shape == (1, windows.window, 1)
    return values[0, :, 0].tolist(), learned[0].tolist()


@pytest.mark.parametrize("start", [0, 3, -7, 10**12])
def test_history_is_oldest_first_wherever_the_ring_stands(start: int) -> None:
    windows = one(start, [1, 2, 3, 4, 5])
    assert history(windows, start + 5) == ([1, 2, 3, 4, 5], [True] * 5)
    for value in range(6, 20):
        put(windows, start + value - 1, value)
        assert history(windows, start + value)[0] == list(range(value - 4, value + 1))
    assert (windows.newest[0], windows.filled[0]) == (start + 18, 5)


def test_filled_counts_up_to_the_window() -> None:
    windows = one()
    filled = []
    for cell in range(8):
        put(windows, cell, 1.0)
        filled.append(int(windows.filled[0]))
    assert filled == [1, 2, 3, 4, 5, 5, 5, 5]


def test_what_is_completed_or_flagged_is_seen_and_not_learned() -> None:
    windows = one(0, [1, 2])
    put(windows, 2, NAN, seen=2.5)  # completed
    put(windows, 3, 100.0, seen=3.5)  # flagged
    put(windows, 4, 5.0)
    assert history(windows, 5) == ([1, 2, 2.5, 3.5, 5], [True, True, False, False, True])
    assert windows.actual[0, :, 0].tolist() == pytest.approx([0, 1, NAN, 99, 4], nan_ok=True)
    assert windows.arrived(slots(0)).tolist() == [0.8]


def test_without_a_forecast_a_missing_cell_repeats_the_one_before() -> None:
    windows = one(0, [7.0])
    put(windows, 1, NAN, seen=NAN)
    put(windows, 2, NAN, seen=NAN)
    put(windows, 3, 9.0)
    put(windows, 4, NAN, seen=NAN)
    assert history(windows, 5) == ([7, 7, 7, 9, 9], [True, False, False, True, False])


def test_a_late_value_fills_its_cell_and_a_repeated_one_replaces() -> None:
    windows = one(0, [1, 2])
    put(windows, 2, NAN, seen=2.5)
    put(windows, 3, 4.0)
    put(windows, 4, 5.0)
    inside = windows.overwrite(slots(0, 0, 0), np.array([2, 4, 0]), np.array([[3.0], [5.5], [0.5]]))
    assert inside.tolist() == [True] * 3
    assert history(windows, 5) == ([0.5, 2, 3, 4, 5.5], [True] * 5)


def test_a_flagged_cell_keeps_what_the_model_sees() -> None:
    windows = one(0, [1, 2, 3, 4])
    put(windows, 4, 100.0, seen=5.0)
    windows.overwrite(slots(0), np.array([4]), np.array([[90.0]]))
    assert history(windows, 5) == ([1, 2, 3, 4, 5], [True] * 4 + [False])
    windows.accept_actual(slots(0))
    assert history(windows, 5) == ([1, 2, 3, 4, 90], [True] * 5)


@pytest.mark.parametrize(("cell", "inside"), [(9, True), (5, True), (4, False), (3, False), (-1000, False)])
def test_older_than_the_window_is_not_written(cell: int, inside: bool) -> None:
    windows = one(0, list(range(10)))
    before = history(windows, 10)
    assert windows.overwrite(slots(0), np.array([cell]), np.array([[77.0]])).tolist() == [inside]
    assert (history(windows, 10) == before) is not inside


def test_older_than_the_first_point_is_outside_too() -> None:
    windows = one(10, [1, 2, 3])
    assert windows.overwrite(slots(0, 0), np.array([9, 10]), np.array([[0.0], [0.0]])).tolist() == [False, True]


def test_begin_forgets() -> None:
    windows = one(0, [1, 2, 3, 4, 5])
    windows.begin(slots(0), np.array([[1e9]]))
    assert windows.filled[0] == 0
    for i in range(5):
        put(windows, 100 + i, 1e9 + i)
    assert history(windows, 105) == ([1e9, 1e9 + 1, 1e9 + 2, 1e9 + 3, 1e9 + 4], [True] * 5)


def test_large_values_keep_their_digits() -> None:
    # As plain float32 the step between two numbers at 3e9 is 256.
    rng = np.random.default_rng(0)
    values = 3e9 + rng.uniform(-1e6, 1e6, 50)
    windows = one(0, values.tolist())
    assert np.abs(np.array(history(windows, 50)[0]) - values[-5:]).max() < 0.1


def test_accept_leaves_what_never_arrived() -> None:
    windows = one(0, [1, 2])
    put(windows, 2, NAN, seen=2.5)
    put(windows, 3, 50.0, seen=3.5)
    put(windows, 4, 51.0, seen=4.5)
    windows.accept_actual(slots(0))
    assert history(windows, 5) == ([1, 2, 2.5, 50, 51], [True, True, False, True, True])


def test_several_features() -> None:
    windows = Windows(2, 3, capacity=2)
    windows.begin(slots(1), np.array([[1.0, 2.0, 3.0]]))
    actual = np.array([[1.0, NAN, 3.0]])
    windows.append(slots(1), np.array([0]), np.array([[1.0, 2.0, 3.0]]), actual, np.array([False]))
    windows.append(slots(1), np.array([1]), np.array([[4.0, NAN, 6.0]]), np.array([[4.0, NAN, 6.0]]), np.array([True]))
    values, _ = windows.history(slots(1), np.array([2]))
    assert values[0].tolist() == [[1, 2, 3], [4, 2, 6]]
    assert windows.arrived(slots(1)).tolist() == [0.0]
    windows.accept_actual(slots(1))
    assert windows.learned[1].tolist() == [False, True]


def test_resize_keeps_the_rows() -> None:
    windows = one(0, [1, 2, 3, 4, 5, 6])
    before = {name: getattr(windows, name).copy() for name in Windows.ARRAYS}
    windows.resize(100)
    for name, array in before.items():
        grown = getattr(windows, name)
        assert len(grown) == 100
        assert grown.dtype == array.dtype
        np.testing.assert_array_equal(grown[:1], array)
        assert not grown[1:].any()


@pytest.mark.parametrize("seed", range(30))
def test_windows_equal_a_pandas_series_on_the_grid(seed: int) -> None:
    """Random gaps, flags, late and repeated points, restarts; the truth is the long series, cut to its last cells."""
    rng = np.random.default_rng(seed)
    window, n = int(rng.integers(1, 9)), 4
    windows = Windows(window, 1, capacity=n)
    seen = [pd.Series(dtype=float) for _ in range(n)]
    actual = [pd.Series(dtype=float) for _ in range(n)]
    newest = [int(rng.integers(-100, 100)) for _ in range(n)]
    begun = [0] * n  # first cell of the window
    for _ in range(120):
        which = np.flatnonzero(rng.random(n) < 0.7)
        kind = rng.choice(
            ["next", "missing", "flagged", "overwrite", "restart"], len(which), p=[0.5, 0.15, 0.1, 0.2, 0.05]
        )
        for s, what in zip(which.tolist(), kind.tolist(), strict=True):
            at, value = slots(s), float(rng.integers(-1000, 1000)) / 8
            if len(seen[s]) == 0 or what == "restart":
                newest[s] += int(rng.integers(window + 2, 3 * window + 3))
                begun[s] = newest[s]
                seen[s], actual[s] = pd.Series({newest[s]: value}), pd.Series({newest[s]: value})
                windows.begin(at, np.array([[value]]))
                windows.append(at, np.array([newest[s]]), np.array([[value]]), np.array([[value]]), np.array([True]))
            elif what == "overwrite":
                cell = newest[s] - int(rng.integers(0, window + 3))
                inside = windows.overwrite(at, np.array([cell]), np.array([[value]]))
                assert inside.tolist() == [cell >= begun[s] and cell > newest[s] - window]
                if inside[0]:
                    flagged = not np.isnan(actual[s][cell]) and seen[s][cell] != actual[s][cell]
                    actual[s][cell] = value
                    if not flagged:
                        seen[s][cell] = value
            else:
                newest[s] += 1
                shown = {"next": value, "missing": NAN, "flagged": value + 0.5}[what]
                arrived = NAN if what == "missing" else value
                learned = np.array([what == "next"])
                windows.append(at, np.array([newest[s]]), np.array([[shown]]), np.array([[arrived]]), learned)
                seen[s][newest[s]] = seen[s][newest[s] - 1] if what == "missing" else shown
                actual[s][newest[s]] = arrived
        for s in range(n):
            if len(seen[s]) == 0:
                continue
            assert windows.newest[s] == newest[s]
            assert windows.filled[s] == min(newest[s] - begun[s] + 1, window)
            if windows.filled[s] == window:
                last = pd.RangeIndex(newest[s] - window + 1, newest[s] + 1)
                values, learned = windows.history(slots(s), np.array([newest[s] + 1]))
                np.testing.assert_array_equal(values[0, :, 0], seen[s].reindex(last))
                np.testing.assert_array_equal(learned[0], (actual[s] == seen[s]).reindex(last))
                assert windows.arrived(slots(s))[0] == actual[s].reindex(last).notna().mean()
