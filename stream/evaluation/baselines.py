"""What a model has to beat: chance, the last value, a moving z-score, principal components.

Each is a model like any other and goes through the same detector, so that its alarms rest on the same threshold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from models.base import Assessment, Context, Float64, check_shape, residual
from models.scaling import FLAT, SMALLEST, local_spread
from models.windows import TrainSeries
from stream.evaluation.neighbours import Neighbours, NeighboursConfig
from stream.results import Served

_LAST_HISTORY: Final = 30  # points: what the last value's usual steps are taken from
_Z_HISTORY: Final = 100
_PCA_NUMBERS: Final = 400  # in one window of the principal components, at most …
_PCA_POINTS: Final = 30  # … and points
_PCA_KEPT: Final = 0.9  # share of the variance that the components hold
_PCA_FITTED: Final = 0.7  # first part of the training part that they are fitted on; the rest calibrates the threshold
_PCA_WINDOWS: Final = 20_000
_FAR: Final = 1e6  # deviations: beyond it a value says no more


class Baseline:
    """What all of them are alike in."""

    reads_point = False
    looks_ahead = False
    parameters = 0

    def __init__(self, family: str, history: int, features: int, neutral: Float64) -> None:
        self.family = family
        self.window = self.history = history
        self.features = features
        self.neutral = neutral

    def assess(self, context: Context) -> Assessment:
        """Say of each point what was expected and how far off it is."""
        raise NotImplementedError


class Random(Baseline):
    """A score that knows nothing: exponentially distributed, made of the time alone."""

    def assess(self, context: Context) -> Assessment:
        """Say something."""
        check_shape(context, self.history, self.features)
        last = context.history[:, -1, :]
        chance = -np.log1p(-_uniform(context.time_ms))  # (B,)
        present = ~np.isnan(context.value)  # the first feature that arrived carries the score
        first = present & (np.cumsum(present, axis=1) == 1)
        # The band is as wide as the KPI usually moves; it means nothing.
        spread = local_spread(context.history, context.usual_step, context.learned)
        above = np.where(np.nan_to_num(context.value - last) < 0, -1.0, 1.0)
        return Assessment(last.copy(), spread, np.where(first, above * chance[:, None], 0.0), last.copy())


class LastValue(Baseline):
    """The point before is what is expected."""

    def assess(self, context: Context) -> Assessment:
        """Hold each point against the one before, in units of what the KPI usually moves by."""
        check_shape(context, self.history, self.features)
        last = context.history[:, -1, :]
        spread = local_spread(context.history, context.usual_step, context.learned)
        return Assessment(last.copy(), spread, residual(context.value, last, spread), last.copy())


class MovingZ(Baseline):
    """The mean of the history is what is expected, its deviation the unit."""

    def assess(self, context: Context) -> Assessment:
        """Hold each point against the mean of those before it."""
        check_shape(context, self.history, self.features)
        x = np.ascontiguousarray(context.history.transpose(0, 2, 1))  # (B, F, H)
        mean, spread = x.mean(axis=2), x.std(axis=2)
        np.maximum(spread, np.maximum(FLAT * np.abs(x).max(axis=2), SMALLEST), out=spread)
        return Assessment(mean, spread, residual(context.value, mean, spread), mean.copy())


class Principal(Baseline):
    """Windows are held against the principal components of the training part; what they do not explain is the error."""

    reads_point = True

    def __init__(self, values: Float64, family: str) -> None:
        """Fit the components.

        Args:
            values: of the training part, (N, F); NaN where missing.
            family: name.
        """
        n, features = values.shape
        self._points = max(min(_PCA_POINTS, _PCA_NUMBERS // features, n // 4), 2)
        fitted = values[: max(int(_PCA_FITTED * n), 2 * self._points)]
        known = np.isfinite(fitted)
        count = np.maximum(known.sum(axis=0), 1)
        center = np.where(known, fitted, 0.0).sum(axis=0) / count
        deviation = np.sqrt(np.where(known, np.square(fitted - center), 0.0).sum(axis=0) / count)
        super().__init__(family, self._points - 1, features, center)
        # One that never moved has no unit of its own: a step of 1 % of its level is one.
        self._scale = np.where(deviation > FLAT * np.abs(center), deviation, 0.01 * np.abs(center) + SMALLEST)
        x = np.where(known, (fitted - center) / self._scale, 0.0)
        windows = sliding_window_view(x, self._points, axis=0)  # (N', F, W)
        windows = windows[:: max(len(windows) // _PCA_WINDOWS, 1)].reshape(-1, features * self._points)
        size, directions = np.linalg.eigh(windows.T @ windows / len(windows))
        share = np.cumsum(size[::-1]) / max(float(size.sum()), SMALLEST)
        self._kept = directions[:, ::-1][:, : int(np.searchsorted(share, _PCA_KEPT)) + 1].copy()  # (F W, K)
        self._last = self._kept.reshape(features, self._points, -1)[:, -1].copy()  # the newest point's rows, (F, K)
        newest = windows.reshape(-1, features, self._points)[:, :, -1]
        rest = newest - (windows @ self._kept) @ self._last.T
        self._unit = np.maximum(np.sqrt(np.square(rest).mean(axis=0)), 1e-3)  # (F,)

    def assess(self, context: Context) -> Assessment:
        """Say how much of each point the components of its window leave over."""
        check_shape(context, self.history, self.features)
        rows = [self._one(history, value) for history, value in zip(context.history, context.value, strict=True)]
        expected = np.stack(rows)
        spread = np.broadcast_to(self._scale * self._unit, expected.shape).copy()
        return Assessment(expected, spread, residual(context.value, expected, spread), expected.copy())

    def _one(self, history: Float64, value: Float64) -> Float64:
        point = np.where(np.isnan(value), history[-1], value)
        x = np.clip((np.vstack((history, point)) - self.neutral) / self._scale, -_FAR, _FAR).T.reshape(-1)
        told: Float64 = (self._last @ (self._kept.T @ x)).reshape(self.features)
        expected: Float64 = self.neutral + self._scale * told
        return expected


def _uniform(time_ms: np.typing.NDArray[np.int64]) -> Float64:
    """Return a number in 0 … 1 for each time, as unlike that of the next as if it were drawn (splitmix64)."""
    z = time_ms.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    uniform: Float64 = (z >> np.uint64(11)).astype(np.float64) / 2**53
    return uniform


def _middle(series: TrainSeries) -> Float64:
    known = np.isfinite(series.values)
    mean: Float64 = np.where(known, series.values, 0.0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)
    return mean


def _neighbours(series: TrainSeries) -> Neighbours:
    return Neighbours(series.values[:, 0], NeighboursConfig.of(len(series.values)))


Made = Baseline | Neighbours
Maker = Callable[[TrainSeries], Made]

# Always printed beside a model.
BASELINES: Final[Mapping[str, Maker]] = {
    "random": lambda s: Random("random", _LAST_HISTORY, s.values.shape[1], _middle(s)),
    "last value": lambda s: LastValue("last value", _LAST_HISTORY, s.values.shape[1], _middle(s)),
    "moving z": lambda s: MovingZ(
        "moving z", min(_Z_HISTORY, max(len(s.values) // 2, 10)), s.values.shape[1], _middle(s)
    ),
    "PCA": lambda s: Principal(s.values, "PCA"),
}
# A model by itself that is made of a training part.
MAKERS: Final[Mapping[str, Maker]] = {"neighbours": _neighbours}


def served(name: str, part: TrainSeries) -> Served:
    """Return one of them, made of a part to learn from, as the core uses it.

    Raises:
        KeyError: there is none of that name.
    """
    made = {**MAKERS, **BASELINES}[name](part)
    scores = (made.calibration,) if isinstance(made, Neighbours) else ()
    return Served(f"{name.replace(' ', '-')}@0", made, part.metrics, scores)
