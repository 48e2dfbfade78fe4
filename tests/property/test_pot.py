"""What holds for any scores: a row is alone in any batch, units do not matter, quantile and probability agree."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import genpareto

from models.gpd import Float64Array, tail_probability, tail_quantile
from models.pot import Outcome, PotConfig, Prior, Spot

CONFIG = PotConfig(q=2e-3, min_scores=60, min_excess=12, max_excess=24)  # small: every phase within 1,500 steps
risks, scales = st.floats(1e-6, 1e-2), st.floats(1e-3, 1e3)
shapes = st.floats(-0.4, 0.4, allow_subnormal=False)
seeds = st.integers(0, 2**32 - 1)


@given(q=risks, shape=shapes, scale=scales)
def test_quantile_is_exceeded_with_probability_q(q: float, shape: float, scale: float) -> None:
    z_q = tail_quantile(q, peak_threshold=5.0, shape=shape, scale=scale, mass=0.02)
    # scipy is the judge: a SPOT reference implementation may share our mistakes.
    assert 0.02 * genpareto.sf(z_q - 5.0, c=shape, scale=scale) == pytest.approx(q, rel=1e-6)
    p = tail_probability(z_q, peak_threshold=5.0, shape=shape, scale=scale, mass=0.02)
    assert p == pytest.approx(q, rel=1e-6)


def mixed_scores(rng: np.random.Generator, steps: int, rows: int) -> Float64Array:
    """Return scores of several kinds: continuous, heavy, discrete, with outliers, drifting."""
    x = rng.exponential(size=(steps, rows))
    x[:, 1::5] = np.floor(3 * x[:, 1::5])
    x[:, 2::5] = np.expm1(x[:, 2::5])
    x[:, 3::5] += np.linspace(0, rng.integers(0, 20), steps)[:, None]
    x[:, 4::5] += 50 * (rng.random(x[:, 4::5].shape) < 0.01)
    return np.asarray(x, np.float64)


@settings(max_examples=15, deadline=None)
@given(seed=seeds, rows=st.integers(1, 40))
def test_a_row_is_judged_the_same_alone_and_in_any_batch(seed: int, rows: int) -> None:
    rng = np.random.default_rng(seed)
    whole, parted = Spot(CONFIG, rows), Spot(CONFIG, rows)
    everyone, may_start = np.arange(rows), np.ones(rows, np.bool_)
    for x in mixed_scores(rng, 300, rows):
        together = whole.step(everyone, x, may_start)
        cuts = np.sort(rng.integers(0, rows + 1, rng.integers(0, 5)))
        for part in np.split(rng.permutation(rows), cuts):
            step = parted.step(part, x[part], may_start[part])
            assert np.array_equal(step.outcome, together.outcome[part])
            assert np.array_equal(step.threshold, together.threshold[part], equal_nan=True)
            assert np.array_equal(step.probability, together.probability[part], equal_nan=True)
    assert whole.pack(everyone).tobytes() == parted.pack(everyone).tobytes()


def test_ten_thousand_rows_together_are_as_each_alone() -> None:
    rng = np.random.default_rng(0)
    rows, config = 10_000, PotConfig()
    spot = Spot(config, rows)
    everyone, may_start = np.arange(rows), np.ones(rows, np.bool_)
    spot.calibrate(everyone, rng.exponential(size=7000))
    sample = rng.choice(rows, 25, replace=False)
    alone = [Spot(config, 1) for _ in sample]
    for one in alone:
        one.unpack(np.zeros(1, np.int64), spot.pack(sample[:1]))
    for x in rng.exponential(size=(200, rows)):
        step = spot.step(everyone, x, may_start)
        for one, row in zip(alone, sample, strict=True):
            single = one.step(np.zeros(1, np.int64), x[row : row + 1], np.ones(1, np.bool_))
            assert single.threshold[0] == step.threshold[row]
            assert single.outcome[0] == step.outcome[row]
            assert single.probability[0] == step.probability[row]
    together = spot.pack(sample)
    for one, expected in zip(alone, together, strict=True):
        assert one.pack(np.zeros(1, np.int64))[0].tobytes() == expected.tobytes()


@settings(max_examples=8, deadline=None)
@given(seed=seeds, power=st.integers(-40, 40))
def test_a_power_of_two_scales_the_threshold_and_changes_no_decision(seed: int, power: int) -> None:
    rows, unit = np.arange(20), 2.0**power
    plain, scaled = Spot(CONFIG, 20), Spot(CONFIG, 20)
    may_start = np.ones(20, np.bool_)
    for x in mixed_scores(np.random.default_rng(seed), 400, 20):
        x = x.astype(np.float32).astype(np.float64)
        a, b = plain.step(rows, x, may_start), scaled.step(rows, x * unit, may_start)
        assert np.array_equal(a.outcome, b.outcome)
        assert np.array_equal(a.threshold * unit, b.threshold, equal_nan=True)
        assert np.array_equal(a.probability, b.probability, equal_nan=True)


@settings(max_examples=5, deadline=None)
@given(seed=seeds, at=st.integers(0, 1500))
def test_any_state_can_be_saved_and_restored(seed: int, at: int) -> None:
    rng = np.random.default_rng(seed)
    rows, may_start = np.arange(10), np.ones(10, np.bool_)
    spot, restored = Spot(CONFIG, 10), Spot(CONFIG, 10)
    for i, x in enumerate(mixed_scores(rng, 1500, 10)):
        if i == at:
            restored.unpack(rows, spot.pack(rows))
        step = spot.step(rows, x, may_start)
        assert (step.threshold[step.outcome > Outcome.WARMING] > -np.inf).all()
        if i >= at:
            assert np.array_equal(restored.step(rows, x, may_start).outcome, step.outcome)


def a_spot(rng: np.random.Generator, rows: int) -> Spot:
    """Return rows of many kinds: with and without a prior, of several risks and depths."""
    prior = Prior.fit(rng.exponential(size=12_000), CONFIG)
    spot = Spot(CONFIG, rows, prior if rng.random() < 0.5 else None)
    everyone = np.arange(rows)
    spot.set_drift(everyone, rng.choice([0, 0, 5, 40], rows))
    spot.set_risk(everyone, rng.choice([2e-3, 1e-3, 5e-3], rows))
    return spot


def same(spot: Spot, other: Spot, rows: int) -> bool:
    return spot.pack(np.arange(rows)).tobytes() == other.pack(np.arange(rows)).tobytes()


@settings(max_examples=6, deadline=None)
@given(seed=seeds, at=st.integers(0, 450))
def test_saving_at_any_point_changes_nothing_and_no_row_knows_its_neighbours(seed: int, at: int) -> None:
    rng = np.random.default_rng(seed)
    rows, everyone = 12, np.arange(12)
    spot = a_spot(rng, rows)
    saved = Spot(CONFIG, rows, spot._tails.prior)
    saved.unpack(everyone, spot.pack(everyone))
    for i, x in enumerate(mixed_scores(rng, 500, rows)):
        may_start = rng.random(rows) < 0.9
        if i == at:
            packed = saved.pack(everyone)
            saved = Spot(CONFIG, rows, spot._tails.prior)
            saved.unpack(everyone, packed)
        spot.step(everyone, x, may_start)
        for part in np.split(rng.permutation(rows), [5, 6]):
            saved.step(part, x[part], may_start[part])
    assert same(spot, saved, rows)


@settings(max_examples=6, deadline=None)
@given(seed=seeds, steps=st.integers(0, 400))
def test_copied_rows_and_risks_set_back_leave_no_trace(seed: int, steps: int) -> None:
    rng = np.random.default_rng(seed)
    rows, everyone, yes = 10, np.arange(10), np.ones(10, np.bool_)
    spot = a_spot(rng, rows)
    scores = mixed_scores(rng, steps + 200, rows)
    for x in scores[:steps]:
        spot.step(everyone, x, yes)
    spot.resize(2 * rows)
    copies = everyone + rows
    spot.copy_rows(everyone, copies)
    risk = spot.pack(copies)["q"]
    spot.set_risk(copies, 3e-3)
    spot.set_risk(copies, risk)
    assert spot.pack(copies).tobytes() == spot.pack(everyone).tobytes()
    for x in scores[steps:]:
        first, second = spot.step(everyone, x, yes), spot.step(copies, x, yes)
        assert np.array_equal(first.outcome, second.outcome)
        assert np.array_equal(first.threshold, second.threshold, equal_nan=True)
    assert spot.pack(copies).tobytes() == spot.pack(everyone).tobytes()
    assert np.array_equal(spot.health(copies), spot.health(everyone))
