from collections.abc import Sequence

import numpy as np
import pytest

from stream import backtest, grid
from stream.backtest import head, training_series
from stream.errors import InputError
from stream.points import Points
from tests.helpers import MINUTE, T0, Arrival, columns, detector, normal_points
from tests.helpers import run as run_directly

NAN = float("nan")


def stream(arrivals: Sequence[Arrival], labels: Sequence[int] | None = None) -> Points:
    names = tuple(dict.fromkeys(name for name, _, _ in arrivals))
    return Points(
        names=names,
        timestamp_ms=np.array([time for _, time, _ in arrivals], np.int64),
        kpi=np.array([names.index(name) for name, _, _ in arrivals], np.int32),
        value=np.array([value for _, _, value in arrivals], np.float64),
        label=np.array(labels if labels is not None else [-1] * len(arrivals), np.int8),
    )


def spikes(n: int) -> list[Arrival]:
    points = normal_points(n)
    return [(name, time, 500.0 if i % 50 == 49 else value) for i, (name, time, value) in enumerate(points)]


# -- run --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 7, 1_000, 10_000])
def test_run_gives_what_the_detector_gives(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backtest, "BATCH_POINTS", batch)
    arrivals = spikes(300)
    gone, found = [], []
    for done, result in backtest.run(detector(), stream(arrivals)):
        gone.append(done)
        found += result.events
        assert result.scores == []
    assert gone == [*range(batch, 300, batch), 300]
    live = detector()
    assert found == live.accept(columns(live, arrivals)).events
    assert len(found) > 5


def test_run_can_begin_in_the_middle() -> None:
    arrivals = spikes(300)
    live = detector()
    ((done, result),) = backtest.run(live, stream(arrivals), first=200)
    assert done == 300
    assert live.counts.points == 100
    assert len(result.events) == len(run_directly(detector(), arrivals[200:]).events)
    assert list(backtest.run(live, stream(arrivals), first=300)) == []


def test_run_gives_a_score_a_cell_where_it_is_asked_for() -> None:
    ((_, result),) = backtest.run(detector(), stream(normal_points(100)), want_scores=True)
    assert sum(len(part.slot) for part in result.scores) == 100


def test_run_shares_the_names_of_the_detector() -> None:
    live = detector()
    live.index["already there"]
    list(backtest.run(live, stream([*normal_points(20, name="b"), *normal_points(20, name="a")])))
    assert live.index.names == ["already there", "b", "a"]
    assert live.row_of[:3].tolist() == [-1, 0, 1], "a series has a place once a point of it has come"
    assert live.groups[0].windows.filled[:2].tolist() == [9, 9]


def test_run_refuses_a_name_that_cannot_be_one() -> None:
    with pytest.raises(InputError, match=r"'a\\n' cannot be the name of a KPI"):
        next(backtest.run(detector(), stream([("fine", T0, 1.0), ("a\n", T0, 1.0)])))


# -- training series --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interval_ms", [0, MINUTE])
def test_a_training_series_is_the_kpi_on_its_grid(interval_ms: int) -> None:
    points = normal_points(20)
    values = [value for _, _, value in points]
    gappy = [*points[:5], ("a", points[5][1], NAN), *points[8:]]
    labels = [0] * len(gappy)
    labels[3] = labels[-1] = 1
    (series,) = training_series(stream(gappy, labels), interval_ms, {"a": "digest"})
    expected = [NAN if 5 <= i < 8 else value for i, value in enumerate(values)]
    np.testing.assert_array_equal(series.values[:, 0], expected)
    assert np.flatnonzero(series.anomalous).tolist() == [3, 19]
    assert (series.name, series.interval_ms, series.sha256) == ("a", MINUTE, "digest")


def test_order_and_repetition_of_the_points_do_not_matter() -> None:
    points = normal_points(40)
    (expected,) = training_series(stream(points))
    repeated = [("a", points[7][1], -1.0), *points]
    shuffled = [points[i] for i in np.random.default_rng(0).permutation(40)]
    for other in (shuffled, repeated):
        (series,) = training_series(stream(other))
        np.testing.assert_array_equal(series.values, expected.values)


def test_each_kpi_has_its_own_grid() -> None:
    a, b = normal_points(10), normal_points(10, name="b", start=T0 + 17, interval=5 * MINUTE)
    mixed = [point for pair in zip(a, b, strict=True) for point in pair]
    series = training_series(stream(mixed))
    assert [(one.name, one.interval_ms, len(one.values), one.sha256) for one in series] == [
        ("a", MINUTE, 10, ""),
        ("b", 5 * MINUTE, 10, ""),
    ]
    assert [len(one.values) for one in training_series(stream(mixed), MINUTE)] == [10, 46]


def test_jitter_falls_into_the_cells_that_the_detector_takes() -> None:
    rng = np.random.default_rng(1)
    points = [("a", time + int(rng.integers(-1000, 1000)), value) for _, time, value in normal_points(100)]
    (series,) = training_series(stream(points))
    live = detector()
    run_directly(live, points)
    (group,) = live.groups
    phase_ms = group.placing.phase_ms[0]
    assert series.interval_ms == group.placing.interval_ms[0] == MINUTE
    assert len(series.values) == group.windows.newest[0] + 1 - (points[0][1] - phase_ms + 30_000) // MINUTE == 100
    assert not np.isnan(series.values).any()


@pytest.mark.parametrize("n", [0, 1, grid.PROBE_POINTS - 1])
def test_too_few_points_have_no_grid(n: int) -> None:
    points = [*normal_points(n), *[("a", T0 + i * 17, NAN) for i in range(50)]]
    with pytest.raises(InputError, match=f"a: {n} points with a value; training needs at least 8"):
        training_series(stream(points))


def test_one_stray_timestamp_does_not_take_all_memory() -> None:
    points = [*normal_points(100, interval=1000), ("a", 4_102_444_800_000, 1.0)]  # the year 2100
    with pytest.raises(InputError, match=r"its 101 points span 2633068801 cells of 1 s, .* mend its timestamps"):
        training_series(stream(points))


def test_head_is_the_first_part_of_the_stream() -> None:
    points = stream(normal_points(10), [1] + [0] * 9)
    first, end = head(points, 0.35)
    assert end == len(first.value) == 3
    assert first.names == points.names
    assert first.label.tolist() == [1, 0, 0]
    assert head(points, 0.0)[1] == 0
    assert head(points, 1.0)[1] == 10
