"""Dense autoencoder: a window is squeezed through a few numbers and rebuilt; the error of its newest point scores it.

Source: the dense autoencoder whose error is normalised by that of the training data, a common baseline (for one,
Sakurada and Yairi, "Anomaly Detection Using Autoencoders with Nonlinear Dimensionality Reduction", MLSDA 2014). Layers
get narrower down to a bottleneck and wider again, the error is absolute, and a score of 1 is at the edge of what
training showed. Done otherwise than in the code that is passed around, and why:

- Layers have a non-linearity between them, and the bottleneck is exactly as wide as configured. Without any, all of it
  is one affine map and can do no more than principal components; and there the width is rounded up to a power of two.
- The unit of the error is the 99 % quantile of the training errors, per feature, and never less than a usual step.
  With the least and the largest error instead, one bad point sets the scale, and a constant error divides by 0.
- The newest point is hidden behind the one before it, in half of the windows in training and in all that are assessed.
  A network that sees it can copy part of an outlier into what it expects. So what is expected does not depend on the
  value itself, its band is exact, and it also completes a value that is missing, in the same pass.
  It costs nothing: the best delay-7 F1 of six KPIs was 0.905 on the mean with the point hidden and 0.904 with it
  visible; on four machines of SMD (38 metrics) the area under the precision-recall curve was 0.52 and 0.51.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from models import family
from models.base import Assessment, Constants, Context, Float64, check_shape, residual
from models.errors import ConfigError
from models.family import Batch, Family, Weights
from models.scaling import SMALLEST, local_spread
from models.serving import ServedModel, fitting_chunk

HIDDEN_SHARE = 0.5  # of the training windows whose newest point is hidden
# Products that sum over a number that 4 does not divide, to few outputs, were measured to differ in the last bits with
# the place of a row in its batch. With every layer but the bottleneck filled up so, no product is of that kind.
LANES = 16
QUANTILE = 0.99  # of the training errors, the unit of the score
# Least units in which training errors are told, in deviations of the training data. Of several features the trainer
# lets no usual step be below half of the deviation; of one, nothing but rounding is left of a KPI that is flatter.
LEAST_STEP, LEAST_LOCAL = 0.5, 1e-3
# Of several features, the least unit of an error, in deviations: one that is rebuilt to a hair would drown the others.
# On three machines of SMD the mean VUS-PR was 0.47 without this bound and 0.51 with it.
LEAST_REACH = 1.0
ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu}


@dataclass(frozen=True, slots=True)
class AutoEncoderConfig:
    """Shape and scaling of one autoencoder.

    Raises:
        ConfigError: a value is out of its bounds.
    """

    window: int = 30  # W, points that are rebuilt together; the last one is assessed
    features: int = 1  # F, metrics of a point
    bottleneck: int = 8  # numbers that a window is squeezed through; fewer than it holds, or it would be copied
    hidden: int = 128  # units of the widest layer, next to the window; the others lie evenly between, by ratio
    layers: int = 2  # between the window and the bottleneck, on each side
    # Between layers. After as many epochs the held-out error of six KPIs was 1 to 37 % lower with tanh.
    activation: Literal["tanh", "relu"] = "tanh"
    # train: by the constants of the training data, for the KPI it was trained on.
    # window: by each window's own mean and deviation, for series never seen.
    scaling: Literal["train", "window"] = "train"

    def __post_init__(self) -> None:
        for name, least, most in (
            ("window", 3, 65536),
            ("features", 1, 4096),
            ("bottleneck", 1, 65536),
            ("hidden", 1, 65536),
            ("layers", 1, 8),
        ):
            if not least <= getattr(self, name) <= most:
                raise ConfigError(f"{name}={getattr(self, name)} must be from {least} to {most}")
        if self.bottleneck >= self.inputs:
            raise ConfigError(
                f"bottleneck={self.bottleneck} must be below window x features = {self.inputs}: a wider one copies"
            )
        if self.hidden < self.bottleneck:
            raise ConfigError(f"hidden={self.hidden} must be at least bottleneck={self.bottleneck}")
        if self.activation not in ("tanh", "relu"):
            raise ConfigError(f"activation={self.activation!r} must be 'tanh' or 'relu'")
        if self.scaling not in ("train", "window"):
            raise ConfigError(f"scaling={self.scaling!r} must be 'train' or 'window'")

    @property
    def inputs(self) -> int:
        """D = W F, the numbers of a window."""
        return self.window * self.features

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of every layer of the encoder, from D to the bottleneck; the decoder's are the same backwards."""
        ratio = self.bottleneck / self.hidden
        between = (round(self.hidden * ratio ** (i / self.layers)) for i in range(self.layers))
        return self.inputs, *between, self.bottleneck

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every weight, in the order of the layers."""
        found: dict[str, tuple[int, ...]] = {}
        for side, widths in (("encoder", self.widths), ("decoder", self.widths[::-1])):
            for i, (inputs, outputs) in enumerate(pairwise(widths)):
                found[f"{side}.{i}.weight"], found[f"{side}.{i}.bias"] = (outputs, inputs), (outputs,)
        return found


class Network(family.Network):
    """The layers; takes and gives standardised windows."""

    def __init__(self, config: AutoEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = _dense(config.widths)
        self.decoder = _dense(config.widths[::-1])

    def encode(self, x: Tensor) -> Tensor:
        """The bottleneck, (B, bottleneck), of windows (B, W, F)."""
        return self._through(self.encoder, x.flatten(1))

    def decode(self, code: Tensor) -> Tensor:
        """Windows (B, W, F) of what came through the bottleneck."""
        return self._through(self.decoder, code).view(-1, self.config.window, self.config.features)

    def forward(self, x: Tensor) -> Tensor:
        """Rebuild windows, (B, W, F)."""
        rebuilt: Tensor = self.decode(self.encode(x))
        return rebuilt

    def loss(self, batch: Batch) -> Tensor:
        """Return the mean absolute error of the values of each window that count, (B,).

        Absolute, so that a spike that nobody labelled hardly moves it. Out of training the newest point is always
        hidden: the loss that decides when to stop is that of the task, and has no chance in it.
        """
        x, hidden = batch.x, family.hide_newest(batch.x)
        if self.training:
            hidden = torch.where(torch.rand(len(x), 1, 1) < HIDDEN_SHARE, hidden, x)
        error = torch.where(batch.counts, (self(hidden) - x).abs(), 0.0)
        return error.sum(dim=(1, 2)) / batch.counts.sum(dim=(1, 2)).clamp(min=1)

    @torch.no_grad()
    def measure(self, batch: Batch) -> dict[str, Float64]:
        """Return `reach`, the 99 % quantile of the errors of newest points in units of the usual step, (F,), >= 1.

        Where units are constants, a reach is no less than a deviation of the training data. A feature whose error is
        always the same has a reach like any other; one that is always rebuilt exactly, or never counts, has the least.
        """
        x, counts = batch.x.double().numpy(), batch.counts[:, -1].numpy()
        error = np.abs(x[:, -1] - self(family.hide_newest(batch.x))[:, -1].double().numpy())  # (B, F)
        history, features = x[:, :-1], self.config.features
        usual = np.full((len(x), features), np.nan)  # with scaling "window" each window's own is the best known
        if self.config.scaling == "train":
            usual[:] = np.abs(np.diff(history, axis=1)).mean(axis=(0, 1))
        local = measured_locally(self.config)
        unit = np.maximum(local_spread(history, usual), LEAST_LOCAL) if local else np.maximum(usual, LEAST_STEP)
        ratio = error / unit
        least = np.ones(features) if local else np.maximum(LEAST_REACH / unit[0], 1.0)
        return {"reach": np.array([_reach(ratio[counts[:, f], f], least[f]) for f in range(features)])}

    def _through(self, layers: nn.ModuleList, h: Tensor) -> Tensor:
        for i, layer in enumerate(layers):
            h = layer(h if i == 0 else ACTIVATIONS[self.config.activation](h))
        return h


def measured_locally(config: AutoEncoderConfig) -> bool:
    """Whether errors are in units of each window's own steps, or of constants.

    Of several features with scaling "train", they are constants: on four machines of SMD the area under the
    precision-recall curve was 0.52 with constants and 0.46 with the windows' own.
    """
    return config.scaling == "window" or config.features == 1


def pack(weights: Weights, config: AutoEncoderConfig) -> dict[str, Tensor]:
    """The weights as `forward` reads them, of a plain model or a stack, by the number of the layer.

    The hidden point equals the one before it, so the first layer adds its columns to those of that one, and reads W - 1
    points; of the last layer only the rows of the newest point are kept. Both are exact. Layers are filled up to a
    multiple of LANES with units that give 0.
    """
    names = [name for name in config.shapes if name.endswith(".weight")]
    last, bottleneck, features = len(names) - 1, len(names) // 2 - 1, config.features
    packed: dict[str, Tensor] = {}
    for i, name in enumerate(names):
        packed[f"{i}.weight"] = weights[name]  # (out, in)
        packed[f"{i}.bias"] = weights[name.removesuffix("weight") + "bias"]
    seen, hidden = packed["0.weight"][..., :-features], packed["0.weight"][..., -features:]
    packed["0.weight"] = torch.cat([seen[..., :-features], seen[..., -features:] + hidden], dim=-1)
    packed[f"{last}.weight"] = packed[f"{last}.weight"][..., -features:, :]
    packed[f"{last}.bias"] = packed[f"{last}.bias"][..., -features:]
    for i in range(last):
        if i != bottleneck:
            more = -packed[f"{i}.bias"].shape[-1] % LANES
            packed[f"{i}.weight"] = functional.pad(packed[f"{i}.weight"], (0, 0, 0, more))
            packed[f"{i}.bias"] = functional.pad(packed[f"{i}.bias"], (0, more))
            packed[f"{i + 1}.weight"] = functional.pad(packed[f"{i + 1}.weight"], (0, more))
    return {name: one.contiguous() for name, one in packed.items()}


def forward(activation: str, weights: Weights, history: Tensor) -> tuple[Tensor]:
    """The newest point of windows rebuilt without it, (B, F), from the W - 1 points before, (B, W - 1, F)."""
    h = history.flatten(1)
    layers = len(weights) // 2
    for i in range(layers):
        if i not in (0, layers // 2):  # the window and the bottleneck are taken as they are
            h = ACTIVATIONS[activation](h)
        h = torch.addmm(weights[f"{i}.bias"], h, weights[f"{i}.weight"].t())
    return (h,)


class AutoEncoder(ServedModel[AutoEncoderConfig]):
    """A trained autoencoder as the service uses it, or a stack of them.

    Constants: `usual_step`, the mean absolute change from point to point in the training data, not there when scaling
    is "window"; `reach`, the largest normal error in usual steps; 1 where it is not known.
    """

    family: ClassVar[str] = "autoencoder"
    reads_point: ClassVar[bool] = False  # the newest point is hidden

    def __init__(
        self, config: AutoEncoderConfig, weights: Weights, constants: Constants | None = None, *, stacked: bool = False
    ) -> None:
        """Take weights and constants over.

        Raises:
            ConfigError: a constant has another shape, or is not finite or not in its bounds.
        """
        super().__init__(config, weights, constants or {}, stacked=stacked)
        self.constants.setdefault("reach", np.ones_like(self.constants["scale"]))
        if self.constants["reach"].shape != self.constants["scale"].shape or not (self.constants["reach"] > 0).all():
            raise ConfigError(f"reach={self.constants['reach'].tolist()} must be above 0, for each feature")
        self.packed = pack(self.raw, config)
        self.forward = partial(forward, config.activation)
        self.chunk = fitting_chunk(4 * max(config.widths))

    @property
    def history(self) -> int:
        """H = W - 1: the window is the history and the point."""
        return self.config.window - 1

    def assess(self, context: Context) -> Assessment:
        """Rebuild the points of a context from their history, and say how far off they are.

        An error of 1 is at the edge of what the training showed; see `Network.measure`.

        Raises:
            ValueError: the context has another H or F.
        """
        check_shape(context, self.history, self.features)
        x, center, scale = self.standardised(context)
        if self.config.scaling == "window":
            usual = context.usual_step
        else:
            usual = self.constant("usual_step" if "usual_step" in self.constants else "scale", context)
        if measured_locally(self.config):
            unit = local_spread(context.history, usual, context.learned)
        else:
            unit = np.maximum(usual, SMALLEST)
        spread = unit * self.constant("reach", context)
        (y,) = self.run(self.forward, self.packed, [x], context, chunk=self.chunk)
        expected = np.where(self.still_rows(context), context.history[:, -1], center + scale * y)
        return Assessment(expected, spread, residual(context.value, expected, spread), completion=expected)


def _dense(widths: Sequence[int]) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(inputs, outputs) for inputs, outputs in pairwise(widths))


def _reach(ratio: Float64, least: float) -> float:
    return max(float(np.quantile(ratio, QUANTILE)), least) if len(ratio) else least


FAMILY = Family(
    name="autoencoder",
    title="dense AutoEncoder",
    method="a window is rebuilt from a few numbers, and the error of its newest point is the score",
    config=AutoEncoderConfig,
    shapes=lambda config: config.shapes,
    network=Network,
    serve=AutoEncoder,
    history=lambda config: int(config.window) - 1,
    reads_point=lambda config: True,  # in training: the whole window is rebuilt
)
