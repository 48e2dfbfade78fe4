"""The baselines and the nearest neighbours: models like any other, and what each of them says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from models.base import Context, Float64, norm
from models.errors import ConfigError
from models.windows import TrainSeries
from stream.evaluation.baselines import BASELINES, MAKERS, Made, Random
from stream.evaluation.neighbours import Neighbours, NeighboursConfig
from tests.contexts import context

RNG = np.random.default_rng(3)


def season(n: int, features: int = 1) -> Float64:
    time = np.arange(n)[:, None]
    wave: Float64 = 50 + 10 * np.sin(2 * np.pi * time / 48 + np.arange(features)) + RNG.normal(0, 0.5, (n, features))
    return wave


def series(values: Float64) -> TrainSeries:
    return TrainSeries("a", values, np.zeros(len(values), np.bool_), 300_000)


def points(model: Made, values: Float64, rows: int, *, last: Float64 | None = None) -> Context:
    """The last `rows` points of values, each after its own history."""
    length, n = model.history, len(values)
    history = np.stack([values[n - rows + k - length : n - rows + k] for k in range(rows)])
    value = values[n - rows :] if last is None else last
    return replace(context(history, value=value), time_ms=np.arange(rows) * 300_000)


ALL = [*[(name, make, 1) for name, make in {**BASELINES, **MAKERS}.items()], *[(n, m, 5) for n, m in BASELINES.items()]]


@pytest.mark.parametrize(("name", "make", "features"), ALL, ids=[f"{name}-{f}" for name, _, f in ALL])
def test_each_is_a_model(name: str, make: object, features: int) -> None:
    values = season(900, features)
    model: Made = make(series(values[:600]))  # type: ignore[operator]  # a maker
    asked = points(model, values, 9)
    told = model.assess(asked)
    for part in (told.expected, told.spread, told.error, told.completion, told.half_width(np.full((9, 1), 3.0))):
        assert part.shape == (9, features) and np.isfinite(part).all()
    assert (told.spread > 0).all()
    for k in range(9):  # a row says nothing of another
        alone = model.assess(asked.take(slice(k, k + 1)))
        for whole, one in zip(
            (told.expected, told.error, told.completion), (alone.expected, alone.error, alone.completion), strict=True
        ):
            assert whole[k].tobytes() == one[0].tobytes(), name
    absent = model.assess(replace(asked, value=np.full((9, features), np.nan)))
    assert not absent.error.any()


@pytest.mark.parametrize("wild", [0.0, 1e-9, 3e9, 1e30])
@pytest.mark.parametrize("name", [*BASELINES, *MAKERS])
def test_whatever_comes_is_answered_in_finite_numbers(name: str, wild: float) -> None:
    values = season(600)
    for learned in (values, np.full((600, 1), wild)):
        model = {**BASELINES, **MAKERS}[name](series(learned))
        told = model.assess(points(model, np.full((700, 1), wild), 3, last=np.array([[wild], [-wild], [values[0, 0]]])))
        assert all(np.isfinite(one).all() for one in (told.expected, told.spread, told.error, told.completion))


def test_chance_knows_nothing_and_says_the_same_again() -> None:
    model = Random("random", 30, 1, np.zeros(1))
    asked = replace(
        context(np.zeros((20_000, 30, 1)), value=RNG.normal(size=(20_000, 1))), time_ms=np.arange(20_000) * 60_000
    )
    score = norm(model.assess(asked).error)
    assert score.tobytes() == norm(model.assess(asked).error).tobytes()
    assert score.mean() == pytest.approx(1, rel=0.03)  # exponential: mean and deviation are 1
    assert score.std() == pytest.approx(1, rel=0.05)
    assert abs(np.corrcoef(score[1:], score[:-1])[0, 1]) < 0.03
    assert abs(np.corrcoef(score, np.abs(asked.value[:, 0]))[0, 1]) < 0.03


def test_a_spike_stands_out_for_all_but_chance() -> None:
    values = season(900)
    for name, make in {**BASELINES, **MAKERS}.items():
        model = make(series(values[:600]))
        plain, spike = (
            norm(model.assess(points(model, values, 20, last=values[-20:] + shift)).error) for shift in (0.0, 30.0)
        )
        assert (np.median(spike) > 4 * np.median(plain)) == (name != "random"), name


def test_principal_components_see_what_breaks_the_likeness_of_two_metrics() -> None:
    base = season(1200)
    values = np.hstack((base, 2 * base + RNG.normal(0, 0.1, base.shape)))
    model = BASELINES["PCA"](series(values[:900]))
    broken = values[-20:].copy()
    broken[:, 1] = values[-20:, 1] - 6  # well within what this metric does by itself
    plain, odd = (norm(model.assess(points(model, values, 20, last=last)).error) for last in (values[-20:], broken))
    assert odd.min() > 1.3 * plain.max()


# -- neighbours -----------------------------------------------------------------------------------------------------


def naive(model: Neighbours, learned: Float64, history: Float64, value: float) -> float:
    """The distance to the nearest run, in units, straight from the definition."""
    x, longest = (learned - model.center) / model.scale, model.window
    past = (history - model.center) / model.scale
    now = np.append(past, (value - model.center) / model.scale)
    best = 0.0
    for m, unit in zip(model.config.lengths, model.unit, strict=True):
        ends = [x[end - m : end] for end in range(longest, len(x) + 1)]
        ends += [past[end - m : end] for end in range(longest, len(past) - m + 2)]
        best = max(best, min(float(np.linalg.norm(now[-m:] - run)) for run in ends) / unit)
    return best


def test_neighbours_are_the_nearest_runs() -> None:
    values = season(700)[:, 0]
    model = Neighbours(values[:400], NeighboursConfig((5, 9, 16), 80))
    for at in range(500, 520):
        for value in (values[at], values[at] + 7):
            told = model.assess(context(values[None, at - 80 : at, None], value=np.array([[value]])))
            expected = naive(model, values[:400], values[at - 80 : at], value)
            assert abs(told.error[0, 0]) == pytest.approx(expected, rel=1e-9)
            away = (value - told.expected[0, 0]) / told.spread[0, 0]
            assert told.slack is not None
            assert away**2 - told.slack[0, 0] == pytest.approx(told.error[0, 0] ** 2, rel=1e-9)


def test_neighbours_remember_a_season_that_their_history_does_not_hold() -> None:
    values = season(48 * 10)[:, 0]
    model = Neighbours(values[:240], NeighboursConfig((16,), 32))
    wrong = values.copy()
    wrong[400:] = 40.0  # a level that this KPI has every night, only not now
    ordinary, odd = (
        np.array([
            norm(model.assess(context(one[None, at - 32 : at, None], value=one[at : at + 1, None])).error)[0]
            for at in range(408, 424)
        ])
        for one in (values, wrong)
    )  # fmt: skip
    assert odd.max() > 3 * ordinary.max()


def test_what_neighbours_learn_from_is_scored_against_the_rest_of_it() -> None:
    values = season(480)[:, 0]
    values[200:216] += 60
    model = Neighbours(values, NeighboursConfig((16,), 64))
    assert len(model.calibration) == 480 - 15
    assert model.calibration.max() > 5 * np.median(model.calibration), "it is its own neighbour"
    gaps = values.copy()
    gaps[100:110] = np.nan
    assert len(Neighbours(gaps, NeighboursConfig((16,), 64)).calibration) == 480 - 15 - 10


def test_shapes_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"lengths=\(9, 5\).*rising"):
        NeighboursConfig((9, 5))
    with pytest.raises(ConfigError, match="history=20 must be at least twice"):
        NeighboursConfig((16,), 20)
    with pytest.raises(ConfigError, match="30 points to learn from; 48 are needed"):
        Neighbours(np.zeros(30), NeighboursConfig((16,), 40))
    with pytest.raises(ConfigError, match="no value"):
        Neighbours(np.full(90, np.nan), NeighboursConfig((16,), 40))
    assert NeighboursConfig.of(100).lengths == (16, 24)
    assert NeighboursConfig.of(750) == NeighboursConfig((16, 24, 36, 48), 560)
