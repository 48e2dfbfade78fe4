"""Nearest neighbours: how far the last points of a series lie from the most similar ones that were ever normal.

No network: the model is the training part of one KPI itself. The newest m points, the assessed one last, are held
against every run of m points of that part and of the history, and the Euclidean distance to the nearest is the score
(of several m the highest, each in units of what the training part gives it). Where a KPI is young, as in NAB with a few
hundred points to learn from, this finds what no network can have learnt yet.

Source: left matrix profile discords (Yeh et al., ICDM 2016; DAMP: Lu et al., KDD 2022); conformal k-NN on NAB
(Burnaev and Ishimtsev, 2016).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from models.base import LARGEST, Assessment, Context, Float64, check_shape
from models.errors import ConfigError

_NEAR = 0.9  # quantile of the training part's own distances that is the unit of each length
_HISTORY_MAX = 560
_FLAT = 1e-6  # of the deviation of the training part: distances below it are rounding


@dataclass(frozen=True)
class NeighboursConfig:
    """Shape of the model."""

    lengths: tuple[int, ...] = (16, 24, 36, 48)  # m, points that are held against each other
    history: int = 240  # H, points before the assessed one that are searched besides the training part

    def __post_init__(self) -> None:
        """Refuse what cannot work.

        Raises:
            ConfigError: a length is too short, or the history holds no neighbour.
        """
        if not self.lengths or min(self.lengths) < 2 or list(self.lengths) != sorted(set(self.lengths)):
            raise ConfigError(f"lengths={self.lengths}: at least one, rising, of at least 2 points each")
        if self.history < 2 * max(self.lengths):
            raise ConfigError(f"history={self.history} must be at least twice the longest of {self.lengths}")

    @classmethod
    def of(cls, points: int) -> NeighboursConfig:
        """Return what suits a training part of so many points: lengths that fit, and a history that it fills."""
        lengths = tuple(m for m in cls.lengths if 3 * m <= points) or cls.lengths[:1]
        return cls(lengths, max(2 * lengths[-1], min(points * 3 // 4, _HISTORY_MAX)))


class Neighbours:
    """The training part of one KPI, to hold its later points against.

    Attributes:
        config: the shape.
        calibration: the scores of the training part, each against the rest of it, oldest first, float64.
    """

    family = "neighbours"
    reads_point = True
    looks_ahead = False
    features = 1

    def __init__(self, values: Float64, config: NeighboursConfig) -> None:
        """Take the training part in.

        Args:
            values: of the KPI on its grid, (N,); NaN where a point is missing.
            config: the shape.

        Raises:
            ConfigError: it holds no two runs of the longest length that do not overlap.
        """
        self.config = config
        known = np.isfinite(values)
        if not known.any():
            raise ConfigError("no value to learn from")
        self.center = float(values[known].mean())
        self.scale = max(float(values[known].std()), _FLAT * abs(self.center), 1e-100)
        filled = np.interp(np.arange(len(values)), np.flatnonzero(known), values[known])
        x = (filled - self.center) / self.scale
        longest = max(config.lengths)
        if len(x) < 3 * longest:
            raise ConfigError(f"{len(x)} points to learn from; {3 * longest} are needed for runs of {longest}")
        own = [_own_distances(x, m) for m in config.lengths]
        runs = sliding_window_view(x, longest)[:, ::-1]
        self._parts = [0, *(m - 1 for m in config.lengths[:-1])]
        self.last, self.memory = runs[:, 0].copy(), runs[:, 1:].copy()  # newest first
        self.unit = [max(float(np.nanquantile(one, _NEAR)), _FLAT) for one in own]
        scores = np.stack([one / unit for one, unit in zip(own, self.unit, strict=True)]).max(axis=0)
        self.calibration = scores[np.isfinite(scores) & known]

    @property
    def window(self) -> int:
        """The longest run that is held against others."""
        return max(self.config.lengths)

    @property
    def history(self) -> int:
        """H, the points before the one that is assessed."""
        return self.config.history

    @property
    def neutral(self) -> Float64:
        """What stands for a value that has never been seen."""
        return np.array([self.center])

    @property
    def parameters(self) -> int:
        """The number of points that are remembered."""
        return len(self.last) + self.window - 1

    def assess(self, context: Context) -> Assessment:
        """Say of each point how far it and those before it lie from their nearest neighbours."""
        check_shape(context, self.config.history, 1)
        parts = [
            self._one((h[:, 0] - self.center) / self.scale, v)
            for h, v in zip(context.history, self._x(context), strict=True)
        ]
        expected, spread, error, completion, slack = (np.array(column)[:, None] for column in zip(*parts, strict=True))
        return Assessment(
            self.center + self.scale * expected,
            self.scale * spread,
            error,
            self.center + self.scale * completion,
            slack,
        )

    def _x(self, context: Context) -> Float64:
        x: Float64 = (context.value[:, 0] - self.center) / self.scale
        return x

    def _one(self, history: Float64, value: float) -> tuple[float, float, float, float, float]:
        """Assess one point, all standardised: expected, spread, error, completion, slack."""
        longest = self.window
        query = history[:-longest:-1]  # newest first, without the assessed point
        past = sliding_window_view(history, longest)[:, ::-1]
        last = np.concatenate((self.last, past[:, 0]))
        away = np.concatenate((self.memory, past[:, 1:])) - query
        before = np.add.reduceat(np.square(away, out=away), self._parts, axis=1).cumsum(axis=1)
        best = (-1.0, 0.0, 1.0, 0.0)  # score, expected, spread, slack
        completion = last[-1]
        for i, (m, unit) in enumerate(zip(self.config.lengths, self.unit, strict=True)):
            rest = before[: len(before) - m + 1, i]  # runs that share a point with the newest m are no neighbours
            if m == longest:
                completion = last[int(rest.argmin())]
            if not np.isnan(value):
                square = rest + np.square(last[: len(rest)] - value)
                k = int(square.argmin())
                if (score := float(np.sqrt(square[k])) / unit) > best[0]:
                    best = (score, float(last[k]), unit, -float(rest[k]) / unit**2)
        if best[0] < 0:  # no value to assess
            return completion, max(self.unit), 0.0, completion, 0.0
        score, expected, spread, slack = best
        return (
            expected,
            spread,
            float(np.clip(np.copysign(score, value - expected), -LARGEST, LARGEST)),
            completion,
            slack,
        )


def _own_distances(x: Float64, m: int) -> Float64:
    """Return the distance of the m points up to each one to the nearest run that shares none of them, (N,)."""
    nearest = np.full(len(x), np.inf)
    for lag in range(m, len(x) - m + 1):
        square = np.square(x[lag:] - x[:-lag])
        total = np.concatenate(([0.0], np.cumsum(square)))
        distance = total[m:] - total[:-m]
        later = nearest[lag + m - 1 :]
        np.minimum(later, distance, out=later)
        earlier = nearest[m - 1 : m - 1 + len(distance)]
        np.minimum(earlier, distance, out=earlier)
    return np.where(np.isfinite(nearest), np.sqrt(np.maximum(nearest, 0.0)), np.nan)
