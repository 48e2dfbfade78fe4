import statistics

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from stream.grid import infer_interval, place

T0 = 1_469_376_000_000
point = st.tuples(st.integers(0, 4), st.integers(-20, 20) | st.sampled_from([-(2**43), 2**42, 2**43]))


@given(st.lists(point, max_size=40), st.dictionaries(st.integers(0, 4), st.integers(-20, 20)))
def test_place_equals_a_loop_over_the_points(points: list[tuple[int, int]], begun: dict[int, int]) -> None:
    slot = np.array([series for series, _ in points], np.int32)
    cell = np.array([at for _, at in points], np.int64)
    newest = np.array([begun.get(series, 10**6) for series, _ in points], np.int64)
    started = np.array([series in begun for series, _ in points], np.bool_)
    placed = place(slot, cell, newest, started)

    now, lead = dict(begun), []
    for series, at in points:
        lead.append(at - now[series] if series in now else 1)
        now[series] = max(now.get(series, at), at)
    by_series = sorted(range(len(points)), key=lambda i: points[i][0])  # stable
    assert placed.order.tolist() == by_series
    assert placed.cell.tolist() == [points[i][1] for i in by_series]
    assert placed.lead.tolist() == [lead[i] for i in by_series]
    first = {series: i for i, (series, _) in reversed(list(enumerate(points)))}
    assert placed.start.tolist() == [first[points[i][0]] == i for i in by_series]


def commonest(difference: list[int]) -> float:
    """The difference that most others equal within a tenth, the smallest of equals; the median of those."""
    support = {d: sum(abs(d - other) <= 0.1 * d for other in difference) for d in difference}
    best = min(d for d in difference if support[d] == max(support.values()))
    return statistics.median(d for d in difference if abs(d - best) <= 0.1 * best)


@given(st.lists(st.integers(1, 5), min_size=7, max_size=7), st.sampled_from([1, 250, 7_000, 60_000, 86_400_000]))
def test_without_jitter_the_commonest_difference_is_the_interval(gaps: list[int], interval: int) -> None:
    timestamps = T0 + interval * np.concatenate([[0], np.cumsum(gaps)])
    found, phase = infer_interval(timestamps[None])
    expected = commonest([gap * interval for gap in gaps])
    if all(gap * interval % expected == 0 for gap in gaps):  # all points lie on that grid
        assert found[0] == expected
        assert phase[0] == T0
    assert 1 <= found[0] <= 5 * interval


@given(st.lists(st.integers(-240, 240), min_size=8, max_size=8), st.sampled_from([1_000, 10_000, 60_000, 86_400_000]))
def test_on_the_right_grid_no_jitter_moves_a_point_out_of_its_cell(permille: list[int], interval: int) -> None:
    timestamps = T0 + interval * np.arange(8) + np.array(permille) * interval // 1000
    found, phase = infer_interval(timestamps[None])
    assert interval / 2 <= found[0] <= 2 * interval
    if found[0] == interval:
        cell = (timestamps - phase[0] + interval // 2) // interval
        assert np.diff(cell).tolist() == [1] * 7


@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=12), st.integers(0, 7_258_118_400_000))
def test_any_timestamps_give_a_grid(gaps: list[int], start: int) -> None:
    timestamps = start + np.concatenate([[0], np.cumsum(gaps)])
    found, phase = infer_interval(timestamps[None])
    assert min(gaps) / 2 <= found[0] <= 2 * max(gaps)
    assert abs(phase[0] - start) <= timestamps[-1] - start + found[0]
    together, phases = infer_interval(np.stack([timestamps, timestamps * 2 - start, timestamps]))
    assert (together[[0, 2]] == found).all() and (phases[[0, 2]] == phase).all()  # a row depends on itself only
