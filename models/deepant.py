"""DeepAnT: a small convolutional network forecasts the next point; the error of the forecast is the score.

Source: Munir et al., "DeepAnT: A Deep Learning Approach for Unsupervised Anomaly Detection in Time Series", IEEE
Access 2019. The layers and their order are those of the published datacubeR checkpoint, whose weights load unchanged.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from models import family
from models.base import Assessment, Constants, Context, check_shape, residual
from models.errors import ConfigError
from models.family import Batch, Family, Weights
from models.scaling import local_spread
from models.serving import ServedModel, fitting_chunk


@dataclass(frozen=True, slots=True)
class DeepAnTConfig:
    """Shape and scaling of one DeepAnT.

    Raises:
        ConfigError: a value is out of its bounds; for `window` it names the nearest valid ones.
    """

    window: int = 30  # W, points of history; 10, 14, 18, ...: others would drop the newest points in the pooling
    features: int = 1  # F, metrics of a point
    filters: int = 32  # channels of both convolutions
    kernel: int = 3  # points that one filter spans; the pooling arithmetic above holds for 3 only
    hidden: int = 40  # units of the dense layer
    # In training only. The published 0.25 was measured to add 1 to 50 % to the held-out error: so small a network
    # underfits, and the held-out part of the data decides when to stop.
    dropout: float = 0.0
    # train: by the constants of the training data, for the KPI it was trained on.
    # window: by each window's own mean and deviation, for series never seen.
    scaling: Literal["train", "window"] = "train"

    def __post_init__(self) -> None:
        if self.window < 10 or self.window % 4 != 2:
            below, above = nearest_windows(self.window)
            raise ConfigError(
                f"window={self.window} is not 10, 14, 18, ...: pooling would drop its newest points; "
                f"use {below if below == above else f'{below} or {above}'}"
            )
        if self.kernel != 3:
            raise ConfigError(f"kernel={self.kernel} must be 3: the valid windows (10, 14, 18, ...) are derived for it")
        for name, most in (("features", 4096), ("filters", 4096), ("hidden", 65536), ("window", 65536)):
            if not 1 <= getattr(self, name) <= most:
                raise ConfigError(f"{name}={getattr(self, name)} must be from 1 to {most}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout={self.dropout} must be at least 0 and below 1")
        if self.scaling not in ("train", "window"):
            raise ConfigError(f"scaling={self.scaling!r} must be 'train' or 'window'")

    @property
    def pooled(self) -> int:
        """Time steps that are left after both poolings."""
        return ((self.window - 2) // 2 - 2) // 2

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every weight, in the order of the layers."""
        return {
            "conv1.weight": (self.filters, self.features, self.kernel),
            "conv1.bias": (self.filters,),
            "conv2.weight": (self.filters, self.filters, self.kernel),
            "conv2.bias": (self.filters,),
            "dense.weight": (self.hidden, self.filters * self.pooled),
            "dense.bias": (self.hidden,),
            "out.weight": (self.features, self.hidden),
            "out.bias": (self.features,),
        }


def nearest_windows(window: int) -> tuple[int, int]:
    """The valid windows next below and next above; both are 10 when `window` is below 10."""
    below = max(10, window - (window - 2) % 4)
    return below, below if below >= window else below + 4


class Network(family.Network):
    """The layers; takes and gives standardised values."""

    def __init__(self, config: DeepAnTConfig) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(config.features, config.filters, config.kernel)
        self.conv2 = nn.Conv1d(config.filters, config.filters, config.kernel)
        self.dense = nn.Linear(config.filters * config.pooled, config.hidden)
        self.dropout = nn.Dropout(config.dropout)
        self.out = nn.Linear(config.hidden, config.features)

    def forward(self, x: Tensor) -> Tensor:
        """Forecast (B, F) from windows x, (B, W, F)."""
        h = x.transpose(1, 2)  # (B, F, W)
        h = torch.max_pool1d(torch.relu(self.conv1(h)), 2)  # (B, C, (W - 2)/2)
        h = torch.max_pool1d(torch.relu(self.conv2(h)), 2)  # (B, C, P)
        h = self.dropout(torch.relu(self.dense(h.flatten(1))))  # (B, H)
        forecast: Tensor = self.out(h)
        return forecast

    def loss(self, batch: Batch) -> Tensor:
        """Return the mean absolute error of the features of each next point that count, (B,)."""
        return mean_error(self(batch.x[:, :-1]), batch)


def mean_error(forecast: Tensor, batch: Batch) -> Tensor:
    """Mean absolute error of forecasts (B, F) over the features of each last point that count, (B,)."""
    counts = batch.counts[:, -1]
    error = (forecast - batch.x[:, -1]).abs()
    return torch.where(counts, error, 0.0).sum(dim=1) / counts.sum(dim=1).clamp(min=1)


def pack(weights: Weights, config: DeepAnTConfig) -> dict[str, Tensor]:
    """The weights as `forward` reads them, of a plain model or a stack: time is the outer axis of a window there."""
    lead = weights["conv1.bias"].shape[:-1]
    packed = {name: weights[name] for name in ("conv1.bias", "conv2.bias", "dense.bias", "out.bias")}
    for conv in ("conv1", "conv2"):  # (C, in, 3) to (3 in, C)
        packed[conv] = weights[f"{conv}.weight"].movedim(-1, -3).transpose(-2, -1).reshape(*lead, -1, config.filters)
    dense = weights["dense.weight"].reshape(*lead, config.hidden, config.filters, config.pooled)
    packed["dense"] = dense.transpose(-2, -1).reshape(*lead, config.hidden, -1)  # (H, P C)
    packed["out"] = weights["out.weight"]  # (F, H)
    return {name: one.contiguous() for name, one in packed.items()}


def forward(weights: Weights, x: Tensor) -> tuple[Tensor]:
    """The same function as `Network.forward` in eval mode, as matrix products over packed weights: (B, W, F) to (B, F).

    Time stays the outer axis, so a convolution is one product over overlapping views, and a pool is the larger of two
    halves of a row; this was measured 1.5 times (W = 30) to 3 times (W = 10) as fast as the layers.
    """
    h = _convolve(x, weights["conv1"], weights["conv1.bias"])  # (B, (W - 2)/2, C)
    h = _convolve(h, weights["conv2"], weights["conv2.bias"])  # (B, P, C)
    h = torch.relu(torch.addmm(weights["dense.bias"], h.reshape(len(h), -1), weights["dense"].t()))  # (B, H)
    return (torch.addmm(weights["out.bias"], h, weights["out"].t()),)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Convolution over 3 points, ReLU, max pool over 2: (B, T, in) to (B, (T - 2)/2, C)."""
    batch, time, inputs = x.shape
    filters = weight.shape[1]
    rows = x.contiguous().as_strided((batch, time - 2, 3 * inputs), (time * inputs, inputs, 1)).reshape(-1, 3 * inputs)
    h = torch.addmm(bias, rows, weight).view(batch, (time - 2) // 2, 2 * filters)
    return torch.relu(torch.maximum(h[..., :filters], h[..., filters:]))


class DeepAnT(ServedModel[DeepAnTConfig]):
    """A trained DeepAnT as the service uses it, or a stack of them.

    The constant `usual_step` is the mean absolute change from point to point in the training data; it is not there when
    it is not known (imported weights) or scaling is "window".
    """

    family: ClassVar[str] = "deepant"
    reads_point: ClassVar[bool] = False

    def __init__(
        self, config: DeepAnTConfig, weights: Weights, constants: Constants | None = None, *, stacked: bool = False
    ) -> None:
        super().__init__(config, weights, constants or {}, stacked=stacked)
        self.packed = pack(self.raw, config)
        self.chunk = fitting_chunk(4 * config.filters * (config.window - 2))

    @property
    def history(self) -> int:
        """H = W, the points of history that one forecast reads."""
        return self.config.window

    def assess(self, context: Context) -> Assessment:
        """Forecast the points of a context, and say how far off they are.

        The error is in units of the usual size of errors (see `local_spread`): by the usual step of each series when
        scaling is "window", by that of the training data when it is "train", by its deviation where that is not known.

        Raises:
            ValueError: the context has another H or F.
        """
        check_shape(context, self.history, self.features)
        x, center, scale = self.standardised(context)
        if self.config.scaling == "window":
            spread = local_spread(context.history, context.usual_step, context.learned)
        elif "usual_step" in self.constants:
            spread = local_spread(context.history, self.constant("usual_step", context), context.learned)
        else:
            spread = scale.copy()
        (y,) = self.run(forward, self.packed, [x], context, chunk=self.chunk)
        expected = center + scale * y
        if self.still.any():
            expected = np.where(self.still_rows(context), context.history[:, -1], expected)
        return Assessment(expected, spread, residual(context.value, expected, spread), completion=expected)


FAMILY = Family(
    name="deepant",
    title="DeepAnT",
    method="a convolutional network forecasts the next point, and the error of the forecast is the score",
    config=DeepAnTConfig,
    shapes=lambda config: config.shapes,
    network=Network,
    serve=DeepAnT,
    yardstick=lambda batch: mean_error(batch.x[:, -2], batch),
)
