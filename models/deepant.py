"""DeepAnT: a small convolutional network forecasts the next point; the error of the forecast is the score.

Source: Munir et al., "DeepAnT: A Deep Learning Approach for Unsupervised Anomaly Detection in Time Series", IEEE
Access 2019. The layers and their order are those of the published datacubeR checkpoint, whose weights load unchanged.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models.base import Bool, Float64, Forecast, contributions, residual, score
from models.batching import SIZES, run_padded
from models.errors import ConfigError

__all__ = [
    "INPUT_LIMIT",
    "DeepAnT",
    "DeepAnTConfig",
    "Forecast",
    "Network",
    "contributions",
    "local_spread",
    "normalise",
    "residual",
    "score",
]

# A standardised input or target beyond it is an outlier of some other KPI or unit: the network sees it as "far away".
# It keeps contaminated training data and a first spike in a live window from throwing the network off its range.
INPUT_LIMIT = 20.0

# A window whose deviation is below this share of its largest value is flat: float32 values carry 2**-24 of it.
FLAT = 2.0**-20
# The floor of a window of zeros; its inverse is still a normal number.
SMALLEST = 1e-100


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


class Network(nn.Module):
    """The layers; takes and gives standardised values."""

    def __init__(self, config: DeepAnTConfig) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(config.features, config.filters, config.kernel)
        self.conv2 = nn.Conv1d(config.filters, config.filters, config.kernel)
        self.dense = nn.Linear(config.filters * config.pooled, config.hidden)
        self.dropout = nn.Dropout(config.dropout)
        self.out = nn.Linear(config.hidden, config.features)

    @torch.no_grad()
    def unread(self, features: Tensor) -> None:
        """Clear the weights that read these features and those that forecast them, (F,) bool."""
        self.conv1.weight[:, features] = 0
        self.out.weight[features] = 0
        self.out.bias[features] = 0

    def forward(self, x: Tensor) -> Tensor:
        """Forecast (B, F) from windows x, (B, W, F); the form that training differentiates."""
        h = x.transpose(1, 2)  # (B, F, W)
        h = torch.max_pool1d(torch.relu(self.conv1(h)), 2)  # (B, C, (W - 2)/2)
        h = torch.max_pool1d(torch.relu(self.conv2(h)), 2)  # (B, C, P)
        h = self.dropout(torch.relu(self.dense(h.flatten(1))))  # (B, H)
        forecast: Tensor = self.out(h)
        return forecast


class Served:
    """The same function as `Network.forward` in eval mode, as three matrix products over packed weights.

    Time stays the outer axis, so a convolution is one product over overlapping views, and a pool is the larger of two
    halves of a row; this was measured 1.5 times (W = 30) to 3 times (W = 10) as fast as the layers.
    """

    def __init__(self, network: Network, config: DeepAnTConfig) -> None:
        self.config = config
        with torch.no_grad():
            self.conv1, self.conv2 = (
                conv.weight.permute(2, 1, 0).reshape(-1, config.filters).clone()  # (3 in, C)
                for conv in (network.conv1, network.conv2)
            )
            self.bias1, self.bias2 = (
                network.get_parameter(f"{conv}.bias").detach().clone() for conv in ("conv1", "conv2")
            )
            dense = network.dense.weight.view(config.hidden, config.filters, config.pooled)
            self.dense = dense.transpose(1, 2).reshape(config.hidden, -1).clone()  # (H, P C)
            self.dense_bias = network.dense.bias.detach().clone()
            self.out, self.out_bias = network.out.weight.detach().clone(), network.out.bias.detach().clone()

    def __call__(self, x: Tensor) -> Tensor:
        """Forecast (B, F) from contiguous windows x, (B, W, F)."""
        h = self._convolve(x, self.conv1, self.bias1)  # (B, (W - 2)/2, C)
        h = self._convolve(h, self.conv2, self.bias2)  # (B, P, C)
        h = torch.relu_(torch.addmm(self.dense_bias, h.view(len(h), -1), self.dense.t()))  # (B, H)
        return torch.addmm(self.out_bias, h, self.out.t())

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Convolution over 3 points, ReLU, max pool over 2: (B, T, in) to (B, (T - 2)/2, C)."""
        batch, time, inputs = x.shape
        rows = x.as_strided((batch, time - 2, 3 * inputs), (time * inputs, inputs, 1)).reshape(-1, 3 * inputs)
        h = torch.addmm(bias, rows, weight).view(batch, (time - 2) // 2, 2 * self.config.filters)
        return torch.maximum(h[..., : self.config.filters], h[..., self.config.filters :]).relu_()


def normalise(history: Float64) -> tuple[NDArray[np.float32], Float64, Float64]:
    """Measure each window from its newest point, in units of its own deviation.

    From the newest point, and not from the mean, the untrained forecast is already the last value: measured on KPIs
    that the model had not seen, the error fell from 0.88 to 0.84 of the last value's, and delay-7 F1 rose by 0.01.

    Args:
        history: windows, (B, W, F) float64 without NaN.

    Returns:
        The windows, (B, W, F) float32 within ±INPUT_LIMIT; their centers and scales, (B, F) float64. The scale is
        floored so that a flat window becomes zeros and not noise. A row depends on the same row of history only.
    """
    # Time as the last, contiguous axis: numpy then sums every row alike, whatever the number of rows.
    x = np.ascontiguousarray(history.transpose(0, 2, 1))  # (B, F, W)
    center = x[:, :, -1].copy()
    scale = np.sqrt(np.square(x - x.mean(axis=2)[:, :, None]).mean(axis=2))
    np.maximum(scale, np.maximum(FLAT * np.abs(x).max(axis=2), SMALLEST), out=scale)
    return standardise(history, center[:, None, :], scale[:, None, :]), center, scale


class DeepAnT:
    """A trained DeepAnT as the service uses it.

    Attributes:
        config: shape and scaling.
        network: the layers, in eval mode; do not train them further, the served weights are a copy.
        center: subtracted from the values when scaling is "train", (F,) float64; zeros when it is "window".
        scale: divides them, (F,) float64, > 0; ones when scaling is "window".
        usual_step: mean absolute change from point to point in the training data, (F,) float64, or None when it is
            not known (imported weights) or scaling is "window".
    """

    family: Literal["deepant"] = "deepant"

    def __init__(
        self,
        config: DeepAnTConfig,
        network: Network,
        center: Float64 | None = None,
        scale: Float64 | None = None,
        usual_step: Float64 | None = None,
    ) -> None:
        self.config = config
        self.network = network.eval().requires_grad_(False)
        self.center = np.zeros(config.features) if center is None else np.array(center, dtype=np.float64)
        self.scale = np.ones(config.features) if scale is None else np.array(scale, dtype=np.float64)
        self.usual_step = None if usual_step is None else np.array(usual_step, dtype=np.float64)
        for name, constants in (("center", self.center), ("scale", self.scale), ("usual_step", self.usual_step)):
            if constants is None:
                continue
            if constants.shape != (config.features,) or not np.isfinite(constants).all():
                raise ConfigError(f"{name}={constants.tolist()} must be {config.features} finite numbers")
        if not (self.scale > 0).all():
            raise ConfigError(f"scale={self.scale.tolist()} must be above 0")
        if self.usual_step is not None and not (self.usual_step >= 0).all():
            raise ConfigError(f"usual_step={self.usual_step.tolist()} must be at least 0")
        # A feature that never moved in training has weights of zero. Its center would stay its forecast for ever after
        # it had moved to another level.
        read, told = network.conv1.weight.any(dim=2).any(dim=0), network.out.weight.any(dim=1) | (network.out.bias != 0)
        self.still: Bool = (~(read | told)).numpy()  # (F,)
        self.served = Served(network, config)
        # The activations of one chunk should stay in the cache.
        fitting = CACHE // (4 * config.filters * (config.window - 2))
        self.chunk = max([size for size in SIZES if size <= fitting], default=SIZES[0])

    @property
    def window(self) -> int:
        """W, the points of history that one forecast reads."""
        return self.config.window

    @property
    def features(self) -> int:
        """F, the metrics of one point."""
        return self.config.features

    @property
    def neutral(self) -> Float64:
        """What stands for a feature that has never been seen: the center of the training data, (F,) float64."""
        return self.center

    @property
    def parameters(self) -> int:
        """The number of weights."""
        return sum(math.prod(shape) for shape in self.config.shapes.values())

    def weights(self) -> "OrderedDict[str, Tensor]":
        """The weights by name, float32, in the order of the layers."""
        state = self.network.state_dict()
        return OrderedDict((name, state[name].detach().contiguous()) for name in self.config.shapes)

    def forecast(self, history: Float64, usual_step: Float64 | None = None, learned: Bool | None = None) -> Forecast:
        """Forecast the point after each window.

        Args:
            history: windows, oldest point first, (B, W, F) float64, finite.
            usual_step: mean absolute change from one point to the next over the life of each series, (B, F) float64,
                NaN where it is not known yet; it makes scores steadier and free of a unit (see `local_spread`).
                Used when scaling is "window"; a model with scaling "train" knows that of its training data.
                Without any, the spread is 1 when scaling is "window" and the constant scale when it is "train".
            learned: values that were observed and normal, (B, W, F) bool; the others are completed, and their steps
                say nothing of how the series moves. None: all of them.

        Returns:
            expected and spread, (B, F) float64, in the units of history. A row depends on the same row of the
            arguments only, bit for bit.

        Raises:
            ValueError: history has another shape than (B, W, F).
        """
        if history.ndim != 3 or history.shape[1:] != (self.window, self.features):
            raise ValueError(f"history is {history.shape}, and this model reads (B, {self.window}, {self.features})")
        shape = (len(history), self.features)
        if self.config.scaling == "train":
            x = standardise(history, self.center, self.scale)
            center, scale = np.broadcast_to(self.center, shape), np.broadcast_to(self.scale, shape)
            own = self.usual_step
            spread = scale.copy() if own is None else local_spread(history, np.broadcast_to(own, shape), learned)
        else:
            x, center, scale = normalise(history)
            spread = np.ones(shape) if usual_step is None else local_spread(history, usual_step, learned)
        y = run_padded(self.served, x, chunk=self.chunk)
        expected = center + scale * y
        if self.still.any():
            expected[:, self.still] = history[:, -1, self.still]
        return Forecast(expected=expected, spread=spread)


def local_spread(history: Float64, usual_step: Float64, learned: Bool | None = None) -> Float64:
    """Size of error that a window leads one to expect: sqrt((d + s) s), d the mean step in it, s the usual step.

    A KPI is noisier by day than by night, so errors are measured against the window's own steps; but only by the root,
    and never against less than the usual step, or the first count after a quiet night would be infinitely strange.
    Measured on KPIs that the model had not seen, at limits set without labels, the delay-7 F1 of six dense KPIs and of
    five sparse counters was 0.72 and 0.85 for the plain error, 0.78 and 0.91 with this, 0.83 and 0.62 with sqrt(d);
    for models trained on the six themselves, 0.72 for the plain error and 0.76 with this.

    Args:
        history: windows, (B, W, F) float64.
        usual_step: (B, F) float64, >= 0; NaN where it is not known yet: the window's own is taken.
        learned: (B, W, F) bool; a step from or to a value that is not counts as a usual one. None: all are.

    Returns:
        (B, F) float64, > 0, in the units of history.
    """
    x = np.ascontiguousarray(history.transpose(0, 2, 1))  # (B, F, W), as in `normalise`
    floor = np.maximum(FLAT * np.abs(x).max(axis=2), SMALLEST)
    steps = np.abs(np.diff(x, axis=2))
    usual = np.where(np.isnan(usual_step), steps.mean(axis=2), usual_step)
    if learned is not None:
        known = (learned[:, 1:] & learned[:, :-1]).transpose(0, 2, 1)
        steps = np.where(known, steps, usual[:, :, None])
    step = steps.mean(axis=2)
    usual = np.maximum(usual, floor)
    spread: Float64 = np.sqrt(step + usual) * np.sqrt(usual)
    return spread


def standardise(values: Float64, center: Float64, scale: Float64) -> NDArray[np.float32]:
    """(values - center) / scale within ±INPUT_LIMIT, float32; values are (..., F) float64."""
    x = np.clip((values - center) / scale, -INPUT_LIMIT, INPUT_LIMIT)
    return x.astype(np.float32, order="C")


CACHE = 2**20  # bytes of activations that one chunk may take
