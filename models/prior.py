"""The tail that a series has before its own is known: that of the pooled scores of many other series.

The scores of a general checkpoint are errors in units of the series' own usual error, so the tails of series are
alike, but not the same, and the highest of the pooled scores are those of the few series that the model does not
suit. Of the highest twentieth of the excesses only their number counts, therefore, and what the tail of one more
series may differ by is doubt, which raises z_q as the doubt of a fit does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from models.gpd import Float64Array, TailFit, refit_gpd
from models.risk import SHAPE_MEAN, SHAPE_SPREAD, PotConfig, predictive_reach

_MIN_EXCESSES = 100  # of different height; fewer are the tail of one series, not of series in general
_CUT = 0.05  # share of the excesses, the highest, whose height does not count
_SHAPE_BETWEEN, _LOG_SCALE_BETWEEN = 0.1, 0.5  # standard deviations from series to series
_ITERATIONS = 16


@dataclass(frozen=True, slots=True)
class Prior:
    """A peak threshold, the tail above it, and how far one more series may be from it."""

    t: float
    tail: TailFit  # (1,) each
    share: float  # of excesses

    @classmethod
    def fit(cls, scores: npt.ArrayLike, config: PotConfig) -> Prior | None:
        """Return the prior that pooled scores give; None where they are too few or too even to have a tail.

        Args:
            scores: of normal points of many series, in any order, (N,).
            config: its level sets t.

        Raises:
            ValueError: not one dimension, or a score is not finite as float32.
        """
        with np.errstate(over="ignore"):
            x = np.asarray(scores).astype(np.float32).astype(np.float64)
        if x.ndim != 1 or not np.isfinite(x).all():
            raise ValueError(f"scores of shape {x.shape} with {np.count_nonzero(~np.isfinite(x))} that are not finite")
        k = int(np.floor(len(x) * (1 - config.level) + 1e-6))
        if k < _MIN_EXCESSES:
            return None
        ascending = np.sort(x)
        t, cut = ascending[-1 - k], ascending[-1 - int(k * _CUT)]
        excess = ascending[(ascending > t) & (ascending <= cut)] - t
        if len(np.unique(excess)) < _MIN_EXCESSES:
            return None
        tail = refit_gpd(
            excess[None],
            np.full((1, len(excess)), cut - t),
            np.array([len(excess)]),
            np.zeros(1),
            excess.mean(keepdims=True),
            iterations=_ITERATIONS,
            shape_mean=SHAPE_MEAN,
            shape_spread=SHAPE_SPREAD,
        )
        tail = tail._replace(
            var_shape=tail.var_shape + _SHAPE_BETWEEN**2, var_log_scale=tail.var_log_scale + _LOG_SCALE_BETWEEN**2
        )
        return cls(float(t), tail, np.count_nonzero(x > t) / len(x))

    def quantile(self, q: Float64Array) -> Float64Array:
        """Return z_q for each risk, the same shape."""
        return np.asarray(self.t + predictive_reach(self.tail, self.share, np.inf, q), np.float64)
