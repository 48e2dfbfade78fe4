from typing import Any

import numpy as np
import pandas as pd
import pytest

from stream.windows import STEPS_MIN, Windows

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
    learned = np.array([[seen is None]])
    windows.append(slots(0), np.array([cell]), np.array([[shown]]), np.array([[actual]]), learned)


def fill(windows: Windows, cell: int, value: float) -> None:
    windows.fill(slots(0), np.array([cell]), np.array([[value]]))


def history(windows: Windows, cell: int) -> tuple[list[float], list[bool]]:
    values, learned = windows.history(slots(0), np.array([cell]))
    assert values.dtype == np.float64
    assert values.shape == learned.shape == (1, windows.window, 1)
    return values[0, :, 0].tolist(), learned[0, :, 0].tolist()


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
    assert windows.actual(slots(0))[0, :, 0].tolist() == pytest.approx([0, 1, NAN, 99, 4], nan_ok=True)
    assert windows.arrived(slots(0)).tolist() == [[0.8]]


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
    windows.fill(slots(0, 0, 0), np.array([2, 4, 0]), np.array([[3.0], [5.5], [0.5]]))
    assert history(windows, 5) == ([0.5, 2, 3, 4, 5.5], [True] * 5)


def test_a_flagged_cell_keeps_what_the_model_sees() -> None:
    windows = one(0, [1, 2, 3, 4])
    put(windows, 4, 100.0, seen=5.0)
    fill(windows, 4, 90.0)
    assert history(windows, 5) == ([1, 2, 3, 4, 5], [True] * 4 + [False])
    windows.accept_actual(slots(0))
    assert history(windows, 5) == ([1, 2, 3, 4, 90], [True] * 5)


@pytest.mark.parametrize(
    ("cell", "inside"), [(10, False), (9, True), (5, True), (4, False), (3, False), (-1000, False), (10**15, False)]
)
def test_what_is_inside(cell: int, inside: bool) -> None:
    windows = one(0, list(range(10)))
    assert windows.inside(slots(0), np.array([cell])).tolist() == [inside]


def test_older_than_the_first_point_is_outside_too() -> None:
    windows = one(10, [1, 2, 3])
    assert windows.inside(slots(0, 0, 0), np.array([9, 10, 12])).tolist() == [False, True, True]
    assert one().inside(slots(0), np.array([0])).tolist() == [False], "nothing is inside a window without a value"


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


def test_the_usual_step_is_the_mean_change_between_learned_neighbours() -> None:
    windows = one(0, [0, 1, 3])
    put(windows, 3, NAN, seen=3.0)
    put(windows, 4, 100.0)  # after a cell that was completed: no change between two points
    put(windows, 5, 104.0)
    assert windows.steps.tolist() == [[3]]
    assert windows.step_mean[0, 0] == pytest.approx((1 + 2 + 4) / 3)
    assert np.isnan(windows.usual_step(slots(0))).all()
    end = 6 + STEPS_MIN - 3
    for cell in range(6, end):
        put(windows, cell, 104.0)
    assert windows.steps[0, 0] == STEPS_MIN
    assert windows.usual_step(slots(0))[0, 0] == pytest.approx(7 / STEPS_MIN)
    windows.forget_steps(slots(0))
    assert np.isnan(windows.usual_step(slots(0))).all()
    assert history(windows, end)[0] == [104.0] * 5, "the window itself is not forgotten"


def test_several_features() -> None:
    windows = Windows(2, 3, capacity=2)
    windows.begin(slots(1), np.array([[1.0, 2.0, 3.0]]))
    actual = np.array([[1.0, NAN, 3.0]])
    here, here_too = np.array([[True, False, True]]), np.array([[True, False, False]])
    windows.append(slots(1), np.array([0]), np.array([[1.0, 2.0, 3.0]]), actual, here)
    windows.append(slots(1), np.array([1]), np.array([[4.0, NAN, 6.0]]), np.array([[4.0, NAN, 60.0]]), here_too)
    values, learned = windows.history(slots(1), np.array([2]))
    assert values[0].tolist() == [[1, 2, 3], [4, 2, 6]]
    assert learned[0].tolist() == [[True, False, True], [True, False, False]]
    assert windows.arrived(slots(1)).tolist() == [[1.0, 0.0, 1.0]]
    assert windows.steps[1].tolist() == [1, 0, 0]
    windows.accept_actual(slots(1))
    assert windows.learned(slots(1))[0].tolist() == [[True, False, True], [True, False, True]]
    assert windows.history(slots(1), np.array([2]))[0][0].tolist() == [[1, 2, 3], [4, 2, 60]]


def test_a_late_record_of_an_entity_fills_only_what_it_brings() -> None:
    windows = Windows(2, 3, capacity=1)
    windows.begin(slots(0), np.zeros((1, 3)))
    came, learned = np.array([[1.0, NAN, 3.0]]), np.array([[True, False, False]])  # the third is flagged
    windows.append(slots(0), np.array([0]), np.array([[1.0, 0.5, 0.0]]), came, learned)
    windows.fill(slots(0), np.array([0]), np.array([[NAN, 2.0, 30.0]]))
    assert windows.actual(slots(0))[0, 0].tolist() == [1, 2, 30]
    assert windows.seen[0, 0].tolist() == [1, 2, 0]
    assert windows.learned(slots(0))[0, 0].tolist() == [True, True, False]


def test_copied_rows_are_alike_and_go_their_own_ways() -> None:
    windows = one(0, [1, 2, 3, 4, 5, 6])
    windows.resize(4)
    windows.copy_rows(slots(0, 0), slots(3, 1))
    for name in Windows.ARRAYS:
        array = getattr(windows, name)
        np.testing.assert_array_equal(array[[3, 1]], array[[0, 0]], err_msg=name)
        assert not array[2].any()
    put(windows, 6, 7.0)
    assert windows.history(slots(3), np.array([6]))[0][0, :, 0].tolist() == [2, 3, 4, 5, 6]
    assert history(windows, 7)[0] == [3, 4, 5, 6, 7]


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


@pytest.mark.parametrize("features", [1, 3])
@pytest.mark.parametrize("seed", range(15))
def test_windows_equal_a_pandas_frame_on_the_grid(seed: int, features: int) -> None:
    """Random gaps, flags, late and repeated points, restarts; the truth is the long series, cut to its last cells."""
    rng = np.random.default_rng(seed)
    window, n = int(rng.integers(1, 9)), 4
    windows = Windows(window, features, capacity=n)
    # By cell, since the window began: values (F,).
    seen: list[dict[int, Any]] = [{} for _ in range(n)]
    actual: list[dict[int, Any]] = [{} for _ in range(n)]
    learned: list[dict[int, Any]] = [{} for _ in range(n)]
    changes: list[list[list[float]]] = [[[] for _ in range(features)] for _ in range(n)]
    newest = [int(rng.integers(-100, 100)) for _ in range(n)]

    def some(missing: float) -> Any:
        """Values of which some are missing, but never all."""
        gone = rng.random(features) < missing
        gone[rng.integers(features)] = False
        return np.where(gone, NAN, rng.integers(-1000, 1000, features) / 8)

    for turn in range(120):
        if turn % 30 == 29:  # of one series what was flagged is the new normal
            s = int(rng.integers(n))
            if seen[s] and windows.filled[s] == window:
                windows.accept_actual(slots(s))
                for cell in range(newest[s] - window + 1, newest[s] + 1):
                    came = ~np.isnan(actual[s][cell])
                    seen[s][cell] = np.where(came, actual[s][cell], seen[s][cell])
                    learned[s][cell] = learned[s][cell] | came
        which = np.flatnonzero(rng.random(n) < 0.7)
        kind = rng.choice(["next", "missing", "flagged", "fill", "restart"], len(which), p=[0.5, 0.15, 0.1, 0.2, 0.05])
        for s, what in zip(which.tolist(), kind.tolist(), strict=True):
            at = slots(s)
            if what == "fill" and seen[s]:
                cell, value = newest[s] - int(rng.integers(-1, window + 3)), some(0.5)
                inside = cell in seen[s] and cell > newest[s] - window
                assert windows.inside(at, np.array([cell])).tolist() == [inside]
                if inside:
                    windows.fill(at, np.array([cell]), value[None])
                    there, flagged = ~np.isnan(value), ~np.isnan(actual[s][cell]) & ~learned[s][cell]
                    actual[s][cell] = np.where(there, value, actual[s][cell])
                    seen[s][cell] = np.where(there & ~flagged, value, seen[s][cell])
                    learned[s][cell] = learned[s][cell] | (there & ~flagged)
                continue
            if what == "restart" or not seen[s]:
                newest[s] += int(rng.integers(window + 2, 3 * window + 3))
                seen[s], actual[s], learned[s] = {}, {}, {}
                value = some(0.3)
                shown, here = np.where(np.isnan(value), 7.5, value), ~np.isnan(value)
                windows.begin(at, shown[None])
                windows.append(at, np.array([newest[s]]), shown[None], value[None], here[None])
            else:
                newest[s] += 1
                value = some(0.3) * (NAN if what == "missing" else 1)
                flagged = ~np.isnan(value) & (what == "flagged") & (rng.random(features) < 0.6)
                here = ~np.isnan(value) & ~flagged
                given = np.where(flagged, value + 0.5, value)
                given[np.isnan(given) & (rng.random(features) < 0.5)] = 99.25  # completed; NaN repeats the cell before
                before, taught = seen[s][newest[s] - 1], learned[s][newest[s] - 1]
                shown = np.where(np.isnan(given), before, given)
                for f in np.flatnonzero(here & taught).tolist():
                    changes[s][f].append(abs(shown[f] - before[f]))
                windows.append(at, np.array([newest[s]]), given[None], value[None], here[None])
            seen[s][newest[s]], actual[s][newest[s]], learned[s][newest[s]] = shown, value, here
        for s in range(n):
            if not seen[s]:
                continue
            assert windows.newest[s] == newest[s]
            assert windows.filled[s] == min(len(seen[s]), window)
            assert windows.steps[s].tolist() == [len(of) for of in changes[s]]
            held = np.arange(newest[s] - int(windows.filled[s]) + 1, newest[s] + 1)
            came = np.array([actual[s][cell] for cell in held.tolist()]) - windows.origin[s]
            np.testing.assert_array_equal(windows.actual(slots(s))[0, held % window], came.astype(np.float32))
            here = [windows.actual_at(slots(s), np.array([cell]))[0] for cell in held.tolist()]
            np.testing.assert_array_equal(here, came.astype(np.float32))
            known = np.array([learned[s][cell] for cell in held.tolist()])
            np.testing.assert_array_equal(windows.learned(slots(s))[0, held % window], known)
            assert (windows.withheld.row[s] > 0) == (~np.isnan(came) & ~known).any()
            if windows.filled[s] == window and turn % 4 == 0:
                last = pd.RangeIndex(newest[s] - window + 1, newest[s] + 1)
                truth = [
                    pd.DataFrame.from_dict(of, orient="index").loc[last] for of in (seen[s], learned[s], actual[s])
                ]
                values, known = windows.history(slots(s), np.array([newest[s] + 1]))
                np.testing.assert_array_equal(values[0], truth[0])
                np.testing.assert_array_equal(known[0], truth[1])
                np.testing.assert_array_equal(windows.arrived(slots(s))[0], truth[2].notna().mean())
    for s in range(n):
        means = [float(np.mean(of)) if len(of) >= STEPS_MIN else NAN for of in changes[s]]
        np.testing.assert_allclose(windows.usual_step(slots(s))[0], means, rtol=1e-12)
