"""What every forecasting family serves, and how a forecast becomes a score."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]
Bool = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Forecast:
    """The next point of each window, in the units of its history.

    Attributes:
        expected: the forecast, (B, F) float64, finite.
        spread: the error that counts as one unit of score, (B, F) float64, finite, > 0.
    """

    expected: Float64
    spread: Float64


class Forecaster(Protocol):
    """A model that forecasts the next point of a window."""

    @property
    def family(self) -> str:
        """The kind of network, as `config.json` names it."""

    @property
    def window(self) -> int:
        """W, the points of history that one forecast reads."""

    @property
    def features(self) -> int:
        """F, the metrics of one point."""

    @property
    def neutral(self) -> Float64:
        """What stands for a feature that has never been seen, (F,) float64: the middle of what the model knows."""

    def forecast(self, history: Float64, usual_step: Float64 | None = None, learned: Bool | None = None) -> Forecast:
        """Forecast the point after each window; history is (B, W, F) float64 without NaN, oldest point first.

        usual_step is the mean absolute change from point to point over each series' life, (B, F), if it is known;
        learned says which values were observed and normal, (B, W, F), the others being completed.
        """


def residual(value: Float64, forecast: Forecast) -> Float64:
    """Signed error in units of spread, (B, F) float64; 0 where the value is NaN (not observed)."""
    with np.errstate(over="ignore"):
        error = (value - forecast.expected) / forecast.spread
    finite: Float64 = np.clip(np.nan_to_num(error, nan=0.0), -_LARGEST, _LARGEST)
    return finite


def score(value: Float64, forecast: Forecast) -> Float64:
    """Euclidean norm over the features of the error in units of spread; higher is more anomalous.

    Args:
        value: the observed points, (B, F) float64; NaN where a feature was not observed.
        forecast: of the windows that end just before those points.

    Returns:
        (B,) float64, >= 0 and finite; NaN where no feature was observed, since there is nothing to score.
    """
    error = residual(value, forecast)
    norm: Float64 = np.abs(error[:, 0]) if error.shape[1] == 1 else np.sqrt((error * error).sum(axis=1))
    norm[np.isnan(value).all(axis=1)] = np.nan
    return norm


def contributions(value: Float64, forecast: Forecast) -> Float64:
    """Share of each feature in the squared score, (B, F) float64; a row sums to 1, or is all 0 for score 0 or NaN."""
    error = np.abs(residual(value, forecast))
    largest = error.max(axis=1, keepdims=True)
    # Scaling by the largest first keeps the squares of tiny errors from vanishing.
    squares = np.square(np.divide(error, largest, out=np.zeros_like(error), where=largest > 0))
    total = squares.sum(axis=1, keepdims=True)
    shares: Float64 = np.divide(squares, total, out=np.zeros_like(squares), where=total > 0)
    return shares


# Its square still sums over a million features without overflow.
_LARGEST = 1e150
