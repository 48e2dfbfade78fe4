"""The generalised Pareto tail: fit, quantile, tail probability; many series at a time, one a row.

Excesses Y over a peak threshold t follow, for a high t, P(Y > y) = (1 + shape y / scale)^(-1/shape), and
exp(-y / scale) at shape 0 (Pickands, Balkema, de Haan). Everything here is float64: in float32 the quantile is
off by 1 % at shape 1e-6 and 0 from 1e-9 on.

Sums run along the last, contiguous axis, whose length the caller keeps fixed, so that the fit of a row has the
same bits alone and among 10,000 others.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

Float64Array: TypeAlias = npt.NDArray[np.float64]
IntArray: TypeAlias = npt.NDArray[np.integer[Any]]

SHAPE_MIN, SHAPE_MAX = -0.5, 0.7  # of a streaming fit; below -0.5 the information is infinite, above 0.7 z_q is a guess
_GRID = np.linspace(-14.0, 18.0, 65)  # a, where theta = expm1(a) / max Y; spacing 0.5
_GOLDEN_STEPS = 40  # 0.618^40 = 4e-9 of a grid cell
_INVERSE_GOLDEN = (5.0**0.5 - 1.0) / 2.0
_SHAPE_NEAR_ZERO = 1e-5  # the derivatives divide by the shape; so near 0 they are taken at +-1e-5
_MAX_SHAPE_STEP, _MAX_LOG_SCALE_STEP = 0.2, 0.7


class TailFit(NamedTuple):
    """A tail and how well it is known: the normal approximation of (shape, log scale), each (K,)."""

    shape: Float64Array
    scale: Float64Array
    var_shape: Float64Array
    covariance: Float64Array
    var_log_scale: Float64Array

    def hazard_variance(self, hazard: Float64Array) -> Float64Array:
        """Return the variance of -log S at the excess where the fit has -log S = hazard."""
        g = np.where(np.abs(self.shape) < _SHAPE_NEAR_ZERO, _SHAPE_NEAR_ZERO, self.shape)
        by_log_scale = np.expm1(-g * hazard) / g  # -v
        by_shape = (-by_log_scale - hazard) / g
        return np.asarray(
            by_shape**2 * self.var_shape
            + 2.0 * by_shape * by_log_scale * self.covariance
            + by_log_scale**2 * self.var_log_scale,
            np.float64,
        )


def fit_gpd(excess: Float64Array, count: IntArray) -> tuple[Float64Array, Float64Array, Float64Array]:
    """Return the maximum-likelihood shape, scale and log-likelihood of each row, with shape in [-0.5, 1].

    With theta = shape / scale the likelihood has a profile in theta alone: the best shape is mean log(1 + theta Y),
    here clamped. It is maximised on Y / mean Y, hence free of units, by a grid and a golden section, and compared
    with the exponential fit at theta = 0.

    Args:
        excess: score - t, positive in the first `count` columns; the rest is padding, (K, N).
        count: excesses of each row, (K,). A row without any gets shape 0, scale 0, log-likelihood 0.

    Source: Grimshaw 1993; models.md §4.1. Judge: `scipy.stats.genpareto` in tests/unit/test_gpd.py.
    """
    used = np.arange(excess.shape[-1]) < count[:, None]  # (K, N)
    n = np.maximum(count, 1).astype(np.float64)  # (K,)
    y = np.where(used, excess, 0.0)
    mean = y.sum(axis=-1) / n
    unit = np.where(mean > 0, mean, 1.0)
    y = y / unit[:, None]
    top = np.maximum(y.max(axis=-1, initial=0.0), 1e-300)

    def profile(a: Float64Array) -> tuple[Float64Array, Float64Array, Float64Array]:
        theta = np.expm1(a) / top
        mean_log = np.log1p(theta[:, None] * y).sum(axis=-1) / n
        with np.errstate(invalid="ignore", divide="ignore"):
            shape = np.where(a < 0, np.clip(mean_log, -0.5, -1e-300), np.clip(mean_log, 1e-300, 1.0))
            value = -np.log(shape / theta) - (1.0 + 1.0 / shape) * mean_log
        flat = np.abs(a) < 1e-9  # the exponential fit, to rounding
        return (
            np.where(flat, -1.0, value),
            np.where(flat, 0.0, shape),
            np.where(flat, 1.0, shape / np.where(flat, 1.0, theta)),
        )

    values = np.stack([profile(np.full(n.shape, a))[0] for a in _GRID], axis=-1)  # (K, grid)
    best = np.clip(values.argmax(axis=-1), 1, _GRID.size - 2)
    low, high = _GRID[best - 1], _GRID[best + 1]
    for _ in range(_GOLDEN_STEPS):
        width = _INVERSE_GOLDEN * (high - low)
        left_is_better = profile(high - width)[0] >= profile(low + width)[0]
        low, high = np.where(left_is_better, low, high - width), np.where(left_is_better, low + width, high)
    value, shape, scale = profile((low + high) / 2.0)
    exponential = ~(value > -1.0) | (count == 0)
    shape = np.where(exponential, 0.0, shape)
    scale = np.where(exponential, 1.0, scale) * mean
    loglik = n * (np.where(exponential, -1.0, value) - np.log(unit))
    return shape, scale, np.where(count > 0, loglik, 0.0)


def refit_gpd(
    excess: Float64Array,
    ceiling: Float64Array,
    count: IntArray,
    shape: Float64Array,
    scale: Float64Array,
    *,
    iterations: int,
    shape_mean: float,
    shape_spread: float,
) -> TailFit:
    """Return the tail fit of excesses that were only accepted up to a ceiling, by Newton steps from a start.

    Maximises sum[log f(Y_i) - log F(c_i)] - (shape - shape_mean)^2 / (2 shape_spread^2) over shape in
    [SHAPE_MIN, SHAPE_MAX]. The second term undoes the truncation: SPOT never accepts an excess above z_q, so a plain
    fit sinks at every refit and alarms ever more often. The third is a normal prior on the shape: with ten excesses
    the fit is nearly exponential, with a hundred it is nearly maximum likelihood.

    With h = -log S the cumulative hazard and v = y / (1 + shape y), y = Y / scale, every first and second
    derivative is a sum of h, v, v^2 (and their like at the ceilings): one logarithm an excess, one logarithm and one
    exponential a ceiling.

    Args:
        excess: score - t; 0 in unused columns, (K, M).
        ceiling: z_q - t when the excess was accepted; inf where there was none and in unused columns, (K, M).
        count: excesses in use, at least 1, (K,).
        shape: where to start, (K,).
        scale: where to start, > 0, (K,).
        iterations: Newton steps; 2 follow one new excess, 8 start from the exponential fit.
        shape_mean: mean of the prior.
        shape_spread: standard deviation of the prior.

    Source: models.md §4.6; derivatives pinned against numerical ones in tests/unit/test_gpd.py.
    """
    n = count.astype(np.float64)
    mean = excess.sum(axis=-1) / n
    top = excess.max(axis=-1)
    truncated = np.isfinite(ceiling)
    any_truncated = bool(truncated.any())
    if any_truncated:
        ceiling = np.where(truncated, ceiling, mean[:, None])  # any finite number; its weight is 0
    precision = 1.0 / shape_spread**2
    scale_min, scale_max = mean / 10.0, mean * 3.0  # a near-uniform truncated sample would drive the scale to infinity

    for _ in range(iterations):
        shape = np.clip(shape, SHAPE_MIN, SHAPE_MAX)
        g = np.where(np.abs(shape) < _SHAPE_NEAR_ZERO, np.where(shape < 0, -_SHAPE_NEAR_ZERO, _SHAPE_NEAR_ZERO), shape)
        scale = np.clip(scale, scale_min, scale_max)
        scale = np.maximum(scale, -1.001 * g * top)  # every excess lies inside the support
        by_shape, by_scale, a, b, d = _derivatives(excess, n, g, scale)
        if any_truncated:
            for total, part in zip(
                (by_shape, by_scale, a, b, d), _ceiling_derivatives(ceiling, truncated, g, scale), strict=True
            ):
                total += part
        by_shape = by_shape - precision * (shape - shape_mean)
        a = a + precision

        # -Hessian [[a, b], [b, d]]; where it is not safely positive definite, Fisher's information of a full sample
        safe = (a > 0) & (d > 0) & (a * d - b * b > 1e-3 * a * d)
        bounded = np.maximum(g, -0.4)
        information = n / (1.0 + 2.0 * bounded)
        a = np.where(safe, a, 2.0 * information / (1.0 + bounded) + precision)
        b = np.where(safe, b, information / (1.0 + bounded))
        d = np.where(safe, d, information)
        held = ((shape <= SHAPE_MIN) & (by_shape < 0)) | ((shape >= SHAPE_MAX) & (by_shape > 0))
        determinant = a * d - b * b
        step_shape = np.where(held, 0.0, (d * by_shape - b * by_scale) / determinant)
        step_scale = np.where(held, by_scale / d, (a * by_scale - b * by_shape) / determinant)
        shrink = 1.0 / np.maximum(
            1.0, np.maximum(np.abs(step_shape) / _MAX_SHAPE_STEP, np.abs(step_scale) / _MAX_LOG_SCALE_STEP)
        )
        shape = shape + shrink * step_shape
        scale = scale * np.exp(shrink * step_scale)  # a product, so that units stay exact

    shape = np.clip(shape, SHAPE_MIN, SHAPE_MAX)
    scale = np.maximum(np.clip(scale, scale_min, scale_max), -1.001 * shape * top)
    return TailFit(shape, scale, d / determinant, -b / determinant, a / determinant)


def outlier_limit(excess: Float64Array, trim: IntArray, risk: float, *, shape: float) -> Float64Array:
    """Return, for each row, the excess that a clean tail passes anywhere only with probability of about `risk`.

    Of the highest `trim` excesses only their number counts, not their size, so outliers among them cannot raise the
    limit far: the scale is the exponential maximum likelihood with those censored. The limit is the quantile at
    risk / count of a tail of that scale and a given shape, its hazard raised by half its variance for doubt.

    Args:
        excess: score - t; 0 in unused columns, more than one other in a row, (K, M).
        trim: how many may be outliers, 1 to half of the excesses, (K,).
        risk: of a whole row.
        shape: how heavy a tail still counts as clean.
    """
    size = excess.shape[-1]
    count = np.count_nonzero(excess, axis=-1)
    lowest = np.take_along_axis(np.sort(excess, axis=-1), (size - trim)[:, None], axis=-1)  # of the trimmed, (K, 1)
    n = count - trim
    scale = np.minimum(excess, lowest).sum(axis=-1) / n
    hazard = np.log(count / risk)
    hazard = hazard + np.minimum(hazard**2 / n / 2.0, hazard)
    return tail_quantile(np.exp(-hazard), peak_threshold=0.0, shape=shape, scale=scale, mass=1.0)


def _derivatives(
    excess: Float64Array, n: Float64Array, g: Float64Array, scale: Float64Array
) -> tuple[Float64Array, Float64Array, Float64Array, Float64Array, Float64Array]:
    """Return the gradient and -Hessian of sum log f in (shape, log scale): by shape, by scale, then a, b, d."""
    y = excess / scale[:, None]
    gy = y * g[:, None]
    h = np.log1p(gy).sum(axis=-1) / g
    gy += 1.0
    y /= gy
    v = y.sum(axis=-1)
    y *= y
    vv = y.sum(axis=-1)
    h_g = (v - h) / g
    h_gg = -(vv + 2.0 * h_g) / g
    return (
        -h - (1.0 + g) * h_g,
        (1.0 + g) * v - n,
        2.0 * h_g + (1.0 + g) * h_gg,
        (1.0 + g) * vv - v,
        (1.0 + g) * (v - g * vv),
    )


def _ceiling_derivatives(
    ceiling: Float64Array, truncated: npt.NDArray[np.bool_], g: Float64Array, scale: Float64Array
) -> tuple[Float64Array, Float64Array, Float64Array, Float64Array, Float64Array]:
    """Return what -sum log F(ceiling) adds to the five terms of `_derivatives`."""
    # in place: six buffers stay in the processor's cache, one for each term would not
    g = g[:, None]
    v = ceiling / scale[:, None]
    inside = g * v
    weight = truncated & (inside > -1.0 + 1e-9)  # beyond the end of the support F is 1
    unused = ~weight
    np.copyto(inside, 0.0, where=unused)
    h = np.log1p(inside)
    h /= g
    inside += 1.0
    rho = np.exp(-h)
    np.copyto(rho, 0.0, where=unused)
    rho /= 1.0 - rho  # S / F
    v /= inside
    h_g = np.subtract(v, h, out=h)
    h_g /= g
    rho_hg = rho * h_g
    by_shape = rho_hg.sum(axis=-1)
    rho_v = np.multiply(rho, v, out=inside)
    by_scale = rho_v.sum(axis=-1)
    rho += 1.0  # the curvature
    rho_hg *= rho
    by_both = np.multiply(rho_hg, v)
    cross = by_both.sum(axis=-1)
    rho_hg *= h_g
    square = rho_hg.sum(axis=-1)
    rho_vv = np.multiply(rho_v, v, out=by_both)
    vv = rho_vv.sum(axis=-1)
    rho_vv *= rho
    g = g[:, 0]
    return (
        -by_shape,
        by_scale,
        -square - (vv + 2.0 * by_shape) / g,
        cross + vv,
        -rho_vv.sum(axis=-1) + by_scale - g * vv,
    )


def tail_quantile(
    q: float | Float64Array,
    *,
    peak_threshold: float | Float64Array,
    shape: float | Float64Array,
    scale: float | Float64Array,
    mass: float | Float64Array,
) -> Float64Array:
    """Return z_q, the score that is exceeded with probability q; arguments broadcast.

    z_q = t + scale * ((q / mass)^-shape - 1) / shape; t - scale * log(q / mass) at shape 0.

    Args:
        q: risk, 0 < q <= mass.
        peak_threshold: t, in units of the score, as z_q.
        shape: of the excesses over t.
        scale: of the excesses over t, > 0.
        mass: P(score > t), N_t / n where nothing was excluded.

    Raises:
        ValueError: a q lies outside the tail (0 < q <= mass fails).

    Source: Siffer et al., KDD 2017, peaks-over-threshold quantile.
    """
    q_, mass_ = np.asarray(q, np.float64), np.asarray(mass, np.float64)
    if not np.all((q_ > 0) & (q_ <= mass_)):
        raise ValueError(f"risk q={q} is outside the tail, whose mass is {mass}; lower q or the level")
    g, hazard = np.broadcast_arrays(np.asarray(shape, np.float64), -np.log(q_ / mass_))
    flat = g == 0
    # expm1 keeps full precision as shape -> 0, where (r^-shape - 1) / shape cancels.
    reach = np.where(flat, hazard, np.expm1(g * hazard) / np.where(flat, 1.0, g))
    return np.asarray(peak_threshold + scale * reach, np.float64)


def tail_probability(
    score: float | Float64Array,
    *,
    peak_threshold: float | Float64Array,
    shape: float | Float64Array,
    scale: float | Float64Array,
    mass: float | Float64Array,
) -> Float64Array:
    """Return P(X > score) for a score above t, 1.0 for one at or below it; arguments broadcast.

    A bounded state remembers nothing of the scores below t, and the fit holds only above it; so nothing is claimed
    there. Beyond the end of the support (shape < 0), and above t at scale 0, the probability is 0.

    Source: Siffer et al., KDD 2017; the inverse of `tail_quantile`.
    """
    g, sigma, excess = np.broadcast_arrays(
        np.asarray(shape, np.float64), np.asarray(scale, np.float64), np.subtract(score, peak_threshold)
    )
    above = excess > 0
    with np.errstate(over="ignore"):
        y = np.where(above, excess, 0.0) / np.where(sigma > 0, sigma, 1.0)
    flat = g == 0
    gy = g * y
    outside = above & ((gy <= -1.0) | (sigma <= 0))
    hazard = np.where(flat, y, np.log1p(np.where(outside, 0.0, gy)) / np.where(flat, 1.0, g))
    return np.where(above, np.where(outside, 0.0, mass * np.exp(-hazard)), 1.0)
