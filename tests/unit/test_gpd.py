"""The tail fit, against scipy's genpareto, numerical derivatives, and scores with a known exact fit."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import genpareto

from models.gpd import (
    Float64Array,
    _ceiling_derivatives,
    _derivatives,
    fit_gpd,
    outlier_limit,
    refit_gpd,
    tail_probability,
    tail_quantile,
)

DATA = os.environ.get("TOCSIN_TEST_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="TOCSIN_TEST_DATA does not name the folder of labelled data")
PEAK_THRESHOLD = 0.9203352  # the 98 % quantile of RMS_loss.csv


@pytest.fixture(scope="module")
def scores() -> Float64Array:
    with gzip.open(Path(str(DATA)) / "pot" / "RMS_loss.csv.gz", "rt") as lines:
        return np.array([float(line) for line in lines])


@needs_data
@pytest.mark.data
@pytest.mark.parametrize("unit", [1e-6, 1e-3, 1.0, 1e3, 1e6])
def test_the_known_fit_is_found_in_any_unit(scores: Float64Array, unit: float) -> None:
    excess = (scores[scores > PEAK_THRESHOLD] - PEAK_THRESHOLD) * unit
    shape, scale, loglik = fit_gpd(excess[None], np.array([568]))
    assert len(excess) == 568
    assert shape[0] == pytest.approx(0.4886, abs=1e-3)
    assert scale[0] / unit == pytest.approx(0.0933, abs=2e-4)
    assert loglik[0] + 568 * np.log(unit) == pytest.approx(501.98, abs=0.01)
    t, mass = PEAK_THRESHOLD * unit, 568 / len(scores)
    for q, expected in ((1e-3, 1.5547), (5e-3, 1.1054)):
        z_q = tail_quantile(q, peak_threshold=t, shape=shape, scale=scale, mass=mass)
        assert z_q[0] / unit == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("shape", [-0.3, 0.0, 0.2, 0.6])
@pytest.mark.parametrize("n", [20, 128])
def test_fit_is_as_likely_as_scipys(shape: float, n: int) -> None:
    rng = np.random.default_rng(n)
    excess = genpareto.rvs(shape, scale=2.0, size=(8, n), random_state=rng)
    padded = np.concatenate([excess, np.full((8, 5), np.nan)], axis=-1)
    ours, scale, loglik = fit_gpd(padded, np.full(8, n))
    for row, y in enumerate(excess):
        assert genpareto.logpdf(y, ours[row], scale=scale[row]).sum() == pytest.approx(loglik[row], abs=1e-6)
        theirs = genpareto.fit(y, floc=0)
        if -0.5 <= theirs[0] <= 1:
            assert loglik[row] >= genpareto.logpdf(y, theirs[0], scale=theirs[2]).sum() - 1e-6
        assert -0.5 <= ours[row] <= 1


def test_rows_without_or_with_one_excess_have_a_fit() -> None:
    shape, scale, loglik = fit_gpd(np.array([[0.0, 0.0], [3.0, 0.0], [2.0, 2.0]]), np.array([0, 1, 2]))
    assert np.isfinite([shape, scale, loglik]).all()
    assert (shape[0], scale[0], loglik[0]) == (0, 0, 0)


@pytest.mark.parametrize("shape", [0.3, 1e-5, -0.2])
def test_derivatives_are_those_of_the_truncated_likelihood(shape: float) -> None:
    rng = np.random.default_rng(0)
    excess = rng.exponential(size=(1, 128))
    ceiling = excess + rng.exponential(3.0, size=excess.shape)
    ceiling[:, :20] = np.inf

    def loglik(g: float, log_scale: float) -> float:
        sigma = np.exp(log_scale)
        return float(genpareto.logpdf(excess, g, scale=sigma).sum() - genpareto.logcdf(ceiling, g, scale=sigma).sum())

    g, s, e = shape, 0.5, 1e-4
    truncated = np.isfinite(ceiling)
    one = (np.array([g]), np.exp(np.array([s])))
    parts = zip(
        _derivatives(excess, np.array([128.0]), *one),
        _ceiling_derivatives(np.where(truncated, ceiling, 1.0), truncated, *one),
        strict=True,
    )
    got = [float((a + b)[0]) for a, b in parts]
    middle = loglik(g, s)
    expected = [
        (loglik(g + e, s) - loglik(g - e, s)) / (2 * e),
        (loglik(g, s + e) - loglik(g, s - e)) / (2 * e),
        -(loglik(g + e, s) - 2 * middle + loglik(g - e, s)) / e**2,
        -(loglik(g + e, s + e) - loglik(g + e, s - e) - loglik(g - e, s + e) + loglik(g - e, s - e)) / (4 * e**2),
        -(loglik(g, s + e) - 2 * middle + loglik(g, s - e)) / e**2,
    ]
    assert got == pytest.approx(expected, rel=5e-3, abs=5e-3)


@pytest.mark.parametrize("shape", [0.0, 0.2, 0.5])
def test_without_ceilings_and_prior_newton_finds_the_profile_maximum(shape: float) -> None:
    excess = genpareto.rvs(shape, size=(20, 128), random_state=np.random.default_rng(1))
    n = np.full(20, 128)
    profile_shape, profile_scale, _ = fit_gpd(excess, n)
    fit = refit_gpd(
        excess,
        np.full_like(excess, np.inf),
        n,
        np.zeros(20),
        excess.mean(axis=-1),
        iterations=12,
        shape_mean=0.0,
        shape_spread=1e6,
    )
    inside = profile_shape < 0.69
    assert inside.sum() > 15
    assert np.allclose(fit.shape[inside], profile_shape[inside], atol=1e-5)
    assert np.allclose(fit.scale[inside], profile_scale[inside], rtol=1e-5)


def test_the_ceilings_undo_the_truncation() -> None:
    rng = np.random.default_rng(2)
    excess = rng.exponential(size=4000)
    excess = excess[excess < 2.0][:3000][None]  # 14 % cut off
    n = np.array([3000])

    def fit(ceiling: float) -> float:
        found = refit_gpd(
            excess,
            np.full_like(excess, ceiling),
            n,
            np.zeros(1),
            excess.mean(axis=-1),
            iterations=12,
            shape_mean=0.0,
            shape_spread=1e6,
        )
        return float(tail_quantile(1e-2, peak_threshold=0.0, shape=found.shape, scale=found.scale, mass=1.0)[0])

    truth = -np.log(1e-2)
    assert fit(np.inf) < 0.5 * truth
    assert fit(2.0) == pytest.approx(truth, rel=0.2)


@pytest.mark.parametrize("shape", [1e-12, -1e-12, 1e-9, -1e-9])
def test_quantile_and_probability_are_continuous_at_shape_0(shape: float) -> None:
    z_q = tail_quantile(1e-4, peak_threshold=5.0, shape=shape, scale=2.0, mass=0.02)
    assert z_q == pytest.approx(5.0 - 2.0 * np.log(1e-4 / 0.02), abs=1e-6 if abs(shape) > 1e-10 else 1e-9)
    back = tail_probability(z_q, peak_threshold=5.0, shape=shape, scale=2.0, mass=0.02)
    assert back == pytest.approx(1e-4, rel=1e-9)


@pytest.mark.parametrize("q", [0.0, 0.0201, 0.5, float("nan")])
def test_risk_outside_the_tail_is_refused(q: float) -> None:
    with pytest.raises(ValueError, match="outside the tail"):
        tail_quantile(q, peak_threshold=5.0, shape=0.1, scale=1.0, mass=0.02)


def test_probability_outside_the_support_of_the_fit() -> None:
    # at or below t; at the end of the support, 5 + 1 / 0.5, and beyond; scale 0
    p = tail_probability(
        np.array([4.0, 5.0, 7.0, 1e300, 5.1]),
        peak_threshold=5.0,
        shape=np.array([-0.5, -0.5, -0.5, -0.5, 0.0]),
        scale=np.array([1.0, 1.0, 1.0, 1.0, 0.0]),
        mass=0.02,
    )
    assert p.tolist() == [1.0, 1.0, 0.0, 0.0, 0.0]


def test_the_outlier_limit_passes_a_clean_tail_and_stops_gross_outliers() -> None:
    rng, half = np.random.default_rng(5), np.full(500, 20)
    excess = rng.exponential(size=(500, 40))
    limit = outlier_limit(excess, half, 0.01, shape=0.1)
    assert (excess.max(axis=-1) > limit).mean() < 0.04
    excess[:, :15] = 60.0 * (1 + rng.random((500, 15)))
    assert (outlier_limit(excess, half, 0.01, shape=0.1) < 60.0).mean() > 0.95
    ties = np.full((1, 40), 2.0)
    assert outlier_limit(ties, half[:1], 0.01, shape=0.1)[0] > 2.0
