"""What every family of models serves: a window and the point after it in, an assessment of that point out.

Whoever only asks models (the core, the settings, the commands that follow events) needs no torch for it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]
Bool = NDArray[np.bool_]

LARGEST = 1e150  # of an error: its square still sums over a million features without overflow


@dataclass(frozen=True, slots=True)
class Context:
    """Points of B series, one each, with all that a model may know of them. A row says nothing of another row.

    Attributes:
        history: the H cells before each point, oldest first, (B, H, F) float64, finite: what arrived and was normal,
            else what completed it.
        learned: which of them arrived and were normal, (B, H, F) bool; the others are completed.
        value: the points, (B, F) float64; NaN where a feature did not arrive.
        time_ms: of the points, ms since 1970, (B,) int64.
        usual_step: mean absolute change from one point to the next over the life of each series, (B, F) float64, >= 0;
            NaN where it is not known yet.
        ahead: what the model said of each point at the one before, (B, F) float64, from this very history; NaN where
            nothing is kept. None: nothing is.
        member: which weights of a stack each series has, (B,) int64; None for a model that is no stack.
    """

    history: Float64
    learned: Bool
    value: Float64
    time_ms: Int64
    usual_step: Float64
    ahead: Float64 | None = None
    member: Int64 | None = None

    def take(self, rows: Int64 | Bool | slice) -> "Context":
        """Return some of the rows."""
        return Context(*(_rows(getattr(self, one.name), rows) for one in fields(self)))

    def __len__(self) -> int:
        """The number of points."""
        return len(self.history)


@dataclass(frozen=True, slots=True)
class Assessment:
    """What a model says of points, in the units of their history where it has any. All (B, F) float64.

    Attributes:
        expected: what each value should be, finite.
        spread: how far from it a value lies whose error is 1, finite, > 0.
        error: signed, without a unit, finite: above 0 for a value above the expected one; 0 for one that did not
            arrive. Its Euclidean norm over the features is the score.
        completion: what stands for a value that did not arrive, finite.
        slack: the error of a value at distance d from `expected` is sqrt((d / spread)**2 - slack), and 0 where that is
            none; 0 for a forecast. None: 0 everywhere.
        ahead: the forecast of the next point, should this one enter the window as it came; NaN where it cannot be known
            yet. None from a model that does not look ahead.
    """

    expected: Float64
    spread: Float64
    error: Float64
    completion: Float64
    slack: Float64 | None = None
    ahead: Float64 | None = None

    def take(self, rows: Int64 | Bool | slice) -> "Assessment":
        """Return some of the rows."""
        return Assessment(*(_rows(getattr(self, one.name), rows) for one in fields(self)))

    def half_width(self, threshold: Float64) -> Float64:
        """Half the width of the band that is normal at these thresholds, (B, F); thresholds (B, 1)."""
        square = np.square(threshold) if self.slack is None else np.square(threshold) + self.slack
        width: Float64 = self.spread * np.sqrt(np.maximum(square, 0.0))
        return width


class Model(Protocol):
    """A trained model as the service uses it. Its answers depend on the same row of the context only, bit for bit."""

    @property
    def family(self) -> str:
        """The kind of network, as `config.json` names it."""

    @property
    def window(self) -> int:
        """W, the points that the network reads at once."""

    @property
    def history(self) -> int:
        """H, the points before the one that is assessed: W of a forecaster, W - 1 where the network reads it too."""

    @property
    def features(self) -> int:
        """F, the metrics of one point."""

    @property
    def reads_point(self) -> bool:
        """Whether what is expected of a value depends on that very value, as in a reconstruction."""

    @property
    def looks_ahead(self) -> bool:
        """Whether it gives `Assessment.ahead`, to be told of at the next point."""

    @property
    def neutral(self) -> Float64:
        """What stands for a feature that has never been seen, the middle of what the model knows: (F,), or (K, F)."""

    @property
    def parameters(self) -> int:
        """The number of weights."""

    def assess(self, context: Context) -> Assessment:
        """Say of each point what was expected and how far off it is.

        Raises:
            ValueError: the context has another H or F.
        """


class Config(Protocol):
    """Shape and scaling of a model: a frozen dataclass of plain values that raises ConfigError for a wrong one."""

    @property
    def window(self) -> int:
        """W, the points that the network reads at once."""

    @property
    def features(self) -> int:
        """F, the metrics of one point."""

    @property
    def scaling(self) -> str:
        """`train`: by constants of the training data; `window`: by each window itself, for series never seen."""


Constants = Mapping[str, Float64]  # what a model has besides weights, by name; small, float64


def residual(value: Float64, expected: Float64, spread: Float64) -> Float64:
    """Signed error in units of spread, (B, F) float64, finite; 0 where the value is NaN (did not arrive)."""
    with np.errstate(over="ignore"):
        error = (value - expected) / spread
    finite: Float64 = np.clip(np.nan_to_num(error, nan=0.0), -LARGEST, LARGEST)
    return finite


def norm(error: Float64) -> Float64:
    """Euclidean norm over the features, (B,) float64, >= 0: the score of errors, (B, F)."""
    length: Float64 = np.abs(error[:, 0]) if error.shape[1] == 1 else np.sqrt((error * error).sum(axis=1))
    return length


def score(value: Float64, assessment: Assessment) -> Float64:
    """Score of points, (B,) float64; higher is more anomalous; NaN where no feature arrived."""
    length = norm(assessment.error)
    length[np.isnan(value).all(axis=1)] = np.nan
    return length


def contributions(error: Float64) -> Float64:
    """Share of each feature in the squared score, (B, F) float64; a row sums to 1, or is all 0 for score 0."""
    size = np.abs(error)
    largest = size.max(axis=1, keepdims=True)
    # Scaling by the largest first keeps the squares of tiny errors from vanishing.
    squares = np.square(np.divide(size, largest, out=np.zeros_like(size), where=largest > 0))
    total = squares.sum(axis=1, keepdims=True)
    shares: Float64 = np.divide(squares, total, out=np.zeros_like(squares), where=total > 0)
    return shares


def check_shape(context: Context, history: int, features: int) -> None:
    """Refuse a context of another shape than a model reads.

    Raises:
        ValueError: it has.
    """
    if context.history.ndim != 3 or context.history.shape[1:] != (history, features):
        raise ValueError(f"history is {context.history.shape}, and this model reads (B, {history}, {features})")


def _rows(array: Any, rows: Int64 | Bool | slice) -> Any:
    return None if array is None else array[rows]
