"""Settings of the threshold, and the score that a fitted tail and a risk make: the predictive quantile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from models.errors import ConfigError
from models.gpd import Float64Array, IntArray, TailFit, tail_quantile

FEW: Final = 10  # excesses below which a fit is not believed alone: z_q also lies above all that was seen
SHAPE_MEAN, SHAPE_SPREAD = 0.05, 0.2  # normal prior of the shape
_MIN_MASS_RATIO = 4.0  # tail mass is taken as at least 4 q, so that z_q lies above t even with no excess at all


@dataclass(frozen=True)
class PotConfig:
    """Settings of the threshold, the same for every series; the risk is that of series without one of their own.

    Raises:
        ConfigError: a value is out of its bounds, or the values do not fit together.
    """

    q: float = 1e-4  # risk: share of normal points flagged; lower trades detection for fewer false alarms
    level: float = 0.98  # share of scores below t; higher trades bias of the tail fit for variance
    min_scores: int = 250  # scores a series must have seen before it has a threshold of its own
    min_excess: int = 20  # excesses kept at least while calibration grows
    max_excess: int = 128  # size of the ring: memory (8 bytes each) against variance of z_q
    # Alarms, less an eighth of the points that were none, after which a row starts anew; 0: never. What alarms
    # more than one point in nine for good is the new normal.
    max_alarms: int = 1000

    def __post_init__(self) -> None:
        """Refuse what cannot work, naming field, value and bound."""
        if not 0 < self.q < 1:
            raise ConfigError(f"q={self.q} must lie in (0, 1)")
        if not 0 < self.level < 1:
            raise ConfigError(f"level={self.level} must lie in (0, 1)")
        if not self.q <= self.q_max:
            raise ConfigError(
                f"q={self.q} must be at most (1 - level) / {_MIN_MASS_RATIO:g} = {self.q_max:.12g}: "
                "z_q has to lie well above t; lower q or the level"
            )
        if self.min_excess < FEW:
            raise ConfigError(f"min_excess={self.min_excess} must be at least {FEW}: fewer do not carry a fit")
        if not self.min_excess < self.max_excess <= 32_767:
            raise ConfigError(
                f"max_excess={self.max_excess} must be above min_excess={self.min_excess} and at most 32767"
            )
        if not self.min_scores >= 2 * self.min_excess:
            raise ConfigError(
                f"min_scores={self.min_scores} must be at least 2 min_excess = {2 * self.min_excess}: "
                "the excesses are to be the upper tail, not the bulk"
            )
        if not 0 <= self.max_alarms <= 65_535:
            raise ConfigError(f"max_alarms={self.max_alarms} must lie in 0 ... 65535")

    @property
    def q_max(self) -> float:
        """Return the highest risk that a row may have, (1 - level) / 4 without what binary fractions add or take."""
        return round((1 - self.level) / _MIN_MASS_RATIO, 15)

    @property
    def n_full(self) -> int:
        """Scores at which the excesses of the level fill the ring, and t becomes final."""
        return int(np.ceil((self.max_excess - 1) / (1 - self.level) - 1e-6))


def tail_mass(share: Float64Array | float, q: Float64Array) -> Float64Array:
    """Return P(score > t): alarms are not in the share of excesses, and they are q of all."""
    return np.asarray(np.minimum(np.maximum(share * (1 - q) + q, _MIN_MASS_RATIO * q), 1.0), np.float64)


def predictive_reach(
    fit: TailFit, share: Float64Array | float, n_excess: IntArray | float, q: Float64Array
) -> Float64Array:
    """Return z_q - t, raised for what is not known of the fit and of the share, so that the expected risk is q."""
    hazard = np.log(tail_mass(share, q) / q)
    doubt = fit.hazard_variance(hazard) + 1.0 / np.maximum(n_excess, 1)
    hazard = hazard + np.minimum(doubt / 2.0, hazard)
    return tail_quantile(np.exp(-hazard), peak_threshold=0.0, shape=fit.shape, scale=fit.scale, mass=1.0)
