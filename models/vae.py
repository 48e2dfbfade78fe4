"""Dense variational autoencoder of windows: the score is the negative log-likelihood of the newest point, compressed.

Source: Kingma and Welling, "Auto-Encoding Variational Bayes", ICLR 2014, for the network and its bound; An and Cho,
"Variational Autoencoder based Anomaly Detection using Reconstruction Probability", 2015, for the score; Rezende et al.,
"Stochastic Backpropagation ...", ICML 2014, for the completion of what is missing by a Markov chain. Both encoder and
decoder are Gaussian with a diagonal variance; one or several features. Done otherwise, and why:

- A point is judged by the mean of its latent, not by draws of it: no chance in a score, and one pass instead of many.
- The score is the root of the likelihood's excess over a floor that hardly any training point is below. It orders
  points alike, and has the tail of an error and not of its square, which a threshold can be fitted to.
- Logarithms of variances are kept in bounds. A constant KPI would drive them to minus infinity, and a score with them.
- The newest point is hidden behind the one before it, in half of the windows in training and in all that are assessed.
  A network that sees it explains part of an outlier. So what is expected does not depend on the value itself, and the
  band is exact. The best delay-7 F1 of three KPIs was 0.95, 0.74 and 0.93 so, and 0.94, 0.73 and 0.89 with it visible.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from models import base, family
from models.base import LARGEST, Assessment, Bool, Constants, Context, Float64, check_shape
from models.errors import ConfigError
from models.family import Batch, Family, Weights
from models.serving import ServedModel, fitting_chunk

Float32 = NDArray[np.float32]

HIDDEN_SHARE = 0.5  # of the training windows whose newest point is hidden
LATENT_BOUNDS = (-10.0, 10.0)  # of the logarithm of a latent variance
# Deviations of a standardised value. None is further off than INPUT_LIMIT. Of several features, one that hardly ever
# moves would drown the others as soon as it does: the best delay-7 F1 of two machines of SMD was 0.71 and 0.81 with the
# least deviation of one feature, and 0.93 and 0.86 with that of several.
LEAST_DEVIATION, LEAST_OF_SEVERAL, LARGEST_DEVIATION = 0.02, 0.5, 20.0
FLOOR_QUANTILE = 0.01  # of the training points' likelihood
LANES = 16  # layers are filled up to a multiple of it; see `models.autoencoder`


@dataclass(frozen=True, slots=True)
class VAEConfig:
    """Shape and scaling of one variational autoencoder.

    Raises:
        ConfigError: a value is out of its bounds.
    """

    window: int = 30  # W, points that are rebuilt together; the last one is assessed
    features: int = 1  # F, metrics of a point
    latent: int = 4  # Z, dimensions of the latent; 8 and 16 were measured to tell less of KPIs
    hidden: int = 100  # units of every layer between
    layers: int = 2  # of encoder and decoder each, besides their last
    iterations: int = 10  # M, steps of the chain that completes what is missing
    seed: int = 0  # of the chain's noise, the same for every window
    # train: by the constants of the training data, for the KPI it was trained on.
    # window: by each window's own mean and deviation, for series never seen.
    scaling: Literal["train", "window"] = "train"

    def __post_init__(self) -> None:
        for name, least, most in (
            ("window", 3, 65536),
            ("features", 1, 4096),
            ("latent", 1, 4096),
            ("hidden", 1, 65536),
            ("layers", 1, 8),
            ("iterations", 1, 1000),
            ("seed", 0, 2**32 - 1),
        ):
            if not least <= getattr(self, name) <= most:
                raise ConfigError(f"{name}={getattr(self, name)} must be from {least} to {most}")
        if self.scaling not in ("train", "window"):
            raise ConfigError(f"scaling={self.scaling!r} must be 'train' or 'window'")

    @property
    def inputs(self) -> int:
        """D = W F, the numbers of a window."""
        return self.window * self.features

    @property
    def value_bounds(self) -> tuple[float, float]:
        """Of the logarithm of the variance of a value."""
        least = LEAST_DEVIATION if self.features == 1 else LEAST_OF_SEVERAL
        return 2 * math.log(least), 2 * math.log(LARGEST_DEVIATION)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every weight, in the order of the layers."""
        found: dict[str, tuple[int, ...]] = {}
        between = [self.hidden] * self.layers
        for side, first, last in (("encoder", self.inputs, self.latent), ("decoder", self.latent, self.inputs)):
            layers = [(str(i), pair) for i, pair in enumerate(pairwise([first, *between]))]
            for name, (inputs, outputs) in [*layers, ("mean", (self.hidden, last)), ("lgvar", (self.hidden, last))]:
                found[f"{side}.{name}.weight"], found[f"{side}.{name}.bias"] = (outputs, inputs), (outputs,)
        return found


class Network(family.Network):
    """The layers; takes and gives standardised windows."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        between = [config.hidden] * config.layers
        self.encoder = Gaussian([config.inputs, *between, config.latent], LATENT_BOUNDS)
        self.decoder = Gaussian([config.latent, *between, config.inputs], config.value_bounds)

    def loss(self, batch: Batch) -> Tensor:
        """Return the negative evidence bound of each window, by one draw of the latent, in nats a value, (B,).

        Values that do not count have no part in the likelihood, and the divergence weighs as much as there are others:
        KL(q || N(0, 1)) = sum(exp(lgvar) + mean**2 - 1 - lgvar) / 2. Out of training the newest point is always hidden
        and the latent is its mean, so that the loss that decides when to stop has no chance in it.
        """
        x, hidden = batch.x, family.hide_newest(batch.x)
        if self.training:
            hidden = torch.where(torch.rand(len(x), 1, 1) < HIDDEN_SHARE, hidden, x)
        z_mean, z_lgvar = self.encoder(hidden.flatten(1))
        z = z_mean + torch.exp(z_lgvar / 2) * torch.randn_like(z_mean) if self.training else z_mean
        x_mean, x_lgvar = self.decoder(z)
        counts, values = batch.counts.flatten(1), x.flatten(1)
        nll = torch.where(counts, 0.5 * (values - x_mean).square() * torch.exp(-x_lgvar) + 0.5 * x_lgvar, 0.0)
        divergence = 0.5 * (torch.exp(z_lgvar) + z_mean.square() - 1 - z_lgvar).sum(dim=1)
        share = counts.float().mean(dim=1)
        bound: Tensor = nll.sum(dim=1) + share * divergence
        return bound / self.config.inputs

    @torch.no_grad()
    def measure(self, batch: Batch) -> dict[str, Float64]:
        """Return `floor`, the negative log-likelihood that 1 % of the newest points are below, (F,), nats."""
        mean, lgvar = self.decoder(self.encoder(family.hide_newest(batch.x).flatten(1))[0])
        features = self.config.features
        mean, lgvar = mean[:, -features:].double().numpy(), lgvar[:, -features:].double().numpy()
        nll = 0.5 * np.square(batch.x[:, -1].double().numpy() - mean) * np.exp(-lgvar) + 0.5 * lgvar
        counts = batch.counts[:, -1].numpy()
        return {"floor": np.array([self._floor(nll[counts[:, f], f]) for f in range(features)])}

    def _floor(self, nll: Float64) -> float:
        return float(np.quantile(nll, FLOOR_QUANTILE)) if len(nll) else self.config.value_bounds[0] / 2


class Gaussian(nn.Module):
    """Dense layers with tanh between them, and two heads: the mean and the logarithm of the variance."""

    def __init__(self, widths: Sequence[int], bounds: tuple[float, float]) -> None:
        super().__init__()
        for i, (inputs, outputs) in enumerate(pairwise(widths[:-1])):
            self.add_module(str(i), nn.Linear(inputs, outputs))
        self.mean, self.lgvar = (nn.Linear(widths[-2], widths[-1]) for _ in range(2))
        self.between, self.bounds = len(widths) - 2, bounds

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and bounded logarithm of the variance, (B, widths[-1]) each, of what is (B, widths[0])."""
        for i in range(self.between):
            h = torch.tanh(self.get_submodule(str(i))(h))
        mean: Tensor = self.mean(h)
        return mean, torch.clamp(self.lgvar(h), *self.bounds)


def pack(weights: Weights, config: VAEConfig) -> dict[str, Tensor]:
    """The weights as the passes read them, of a plain model or a stack: layers filled up with units that give 0."""
    more = -config.hidden % LANES
    packed = dict(weights)
    for side in ("encoder", "decoder"):
        for i in range(config.layers):
            name = f"{side}.{i}"
            # The first layer has no units before it that were filled up.
            packed[f"{name}.weight"] = functional.pad(packed[f"{name}.weight"], (0, more if i else 0, 0, more))
            packed[f"{name}.bias"] = functional.pad(packed[f"{name}.bias"], (0, more))
        for head in ("mean", "lgvar"):
            name = f"{side}.{head}.weight"
            packed[name] = functional.pad(packed[name], (0, more))
    for head in ("mean", "lgvar"):
        packed[f"last.{head}.weight"] = packed[f"decoder.{head}.weight"][..., -config.features :, :]
        packed[f"last.{head}.bias"] = packed[f"decoder.{head}.bias"][..., -config.features :]
    return {name: one.contiguous() for name, one in packed.items()}


def last_point(layers: int, bounds: tuple[float, float], weights: Weights, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and logarithm of the variance of the newest point, (B, F) each, of windows (B, W, F).

    The heads are evaluated at the newest point only, and the latent's variance not at all. Both are exact.
    """
    z = _linear(weights, "encoder.mean", _between(layers, weights, "encoder", x.flatten(1)))
    h = _between(layers, weights, "decoder", z)
    return _linear(weights, "last.mean", h), torch.clamp(_linear(weights, "last.lgvar", h), *bounds)


def complete(layers: int, noise: Tensor, weights: Weights, x: Tensor, missing: Tensor) -> tuple[Tensor]:
    """Windows (B, W, F) whose missing values are rebuilt from the others, by a chain of as many steps as noise, (M, Z).

    Every step draws a latent given the whole window, and puts the mean that the decoder gives in place of what is
    missing; the last step takes the mean of the latent. What is not missing never changes. missing: (B, W, F) bool.
    """
    flat, gaps = x.flatten(1), missing.flatten(1)
    for step in range(len(noise)):
        h = _between(layers, weights, "encoder", flat)
        z = _linear(weights, "encoder.mean", h)
        if step < len(noise) - 1:
            lgvar = torch.clamp(_linear(weights, "encoder.lgvar", h), *LATENT_BOUNDS)
            z = z + torch.exp(lgvar / 2) * noise[step]
        rebuilt = _linear(weights, "decoder.mean", _between(layers, weights, "decoder", z))
        flat = torch.where(gaps, rebuilt, flat)
    return (flat.view(x.shape),)


def _between(layers: int, weights: Weights, side: str, h: Tensor) -> Tensor:
    for i in range(layers):
        h = torch.tanh(_linear(weights, f"{side}.{i}", h))
    return h


def _linear(weights: Weights, name: str, h: Tensor) -> Tensor:
    return torch.addmm(weights[f"{name}.bias"], h, weights[f"{name}.weight"].t())


class VAE(ServedModel[VAEConfig]):
    """A trained variational autoencoder as the service uses it, or a stack of them.

    Constant: `floor`, the likelihood from which a score counts, in nats, (F,); that of a value that is exactly as
    expected, and as sure as can be, where it is not known.
    """

    family: ClassVar[str] = "vae"
    reads_point: ClassVar[bool] = False  # the newest point is hidden

    def __init__(
        self, config: VAEConfig, weights: Weights, constants: Constants | None = None, *, stacked: bool = False
    ) -> None:
        """Take weights and constants over.

        Raises:
            ConfigError: a constant has another shape, or is not finite or not in its bounds.
        """
        super().__init__(config, weights, constants or {}, stacked=stacked)
        least = np.full_like(self.constants["scale"], config.value_bounds[0] / 2)
        if self.constants.setdefault("floor", least).shape != least.shape:
            raise ConfigError(f"floor={self.constants['floor'].tolist()} must be one number for each feature")
        self.packed = pack(self.raw, config)
        draws = np.random.RandomState(config.seed)  # its stream is frozen; those of newer generators are not
        noise = torch.from_numpy(draws.standard_normal((config.iterations, config.latent)).astype(np.float32))
        self.last_point = partial(last_point, config.layers, config.value_bounds)
        self.complete = partial(complete, config.layers, noise)
        self.chunk = fitting_chunk(4 * max(config.inputs, config.hidden))

    @property
    def history(self) -> int:
        """H = W - 1: the window is the history and the point."""
        return self.config.window - 1

    def assess(self, context: Context) -> Assessment:
        """Say how likely the points of a context are, given their windows.

        With a value d from the expected one, of deviation s (both standardised), NLL = (d / s)**2 / 2 + log s, without
        its constant; the error is sqrt(NLL - floor), with the sign of d, and 0 where that is none. What is missing in
        the history is rebuilt first (see `complete`), and with it the point itself, for its completion.

        Raises:
            ValueError: the context has another H or F.
        """
        check_shape(context, self.history, self.features)
        still = self.still_rows(context)
        past, center, scale = self.standardised(context)
        x, rebuilt = self._completed(past, context, still)
        mean, lgvar = self.run(self.last_point, self.packed, [x], context, chunk=self.chunk)
        expected, completion = (
            np.where(still, context.history[:, -1], center + scale * one.astype(np.float64))
            for one in (mean, np.where(np.isnan(rebuilt), mean, rebuilt))
        )
        log_std = 0.5 * np.where(still, 0.0, lgvar.astype(np.float64))
        spread = scale * np.exp(log_std) * math.sqrt(2)
        slack = np.where(still, 0.0, self.constant("floor", context) - log_std)
        error = compressed(context.value, expected, spread, slack)
        return Assessment(expected, spread, error, completion=completion, slack=slack)

    def _completed(self, past: Float32, context: Context, still: Bool) -> tuple[Float32, Float32]:
        """Windows whose newest point is hidden, their gaps rebuilt; and that point where the chain rebuilt it too.

        Args:
            past: standardised histories, (B, W - 1, F).
            context: says what did not arrive.
            still: features that are never rebuilt, (B, F).

        Returns:
            (B, W, F), and (B, F), NaN in rows without a gap, which no chain was run for.
        """
        gaps = ~context.learned & ~still[:, None]
        rebuilt = np.full(still.shape, np.nan, np.float32)
        rows = np.flatnonzero(gaps.any(axis=(1, 2)) | np.isnan(context.value).any(axis=1))
        if len(rows):
            x, missing = _with_newest(past[rows]), np.concatenate([gaps[rows], ~still[rows, None]], axis=1)
            (filled,) = self.run(self.complete, self.packed, [x, missing], context.take(rows), chunk=self.chunk)
            past = past.copy()
            past[rows], rebuilt[rows] = filled[:, :-1], filled[:, -1]
        return _with_newest(past), rebuilt


def _with_newest(past: Float32) -> Float32:
    """The same as `hide_newest`, of what comes before the newest point, (B, W - 1, F)."""
    return np.concatenate([past, past[:, -1:]], axis=1)


def compressed(value: Float64, expected: Float64, spread: Float64, slack: Float64) -> Float64:
    """Signed error sqrt((d / spread)**2 - slack), (B, F) float64, finite; 0 where that is none, or the value NaN."""
    off = base.residual(value, expected, spread)
    size = np.minimum(np.sqrt(np.maximum(np.square(off) - slack, 0.0)), LARGEST)
    error: Float64 = np.where(np.isnan(value), 0.0, np.where(off < 0, -size, size))
    return error


FAMILY = Family(
    name="vae",
    title="dense VAE",
    method="a variational autoencoder tells how likely the newest point of a window is; the score is how unlikely",
    config=VAEConfig,
    shapes=lambda config: config.shapes,
    network=Network,
    serve=VAE,
    history=lambda config: int(config.window) - 1,
    reads_point=lambda config: True,  # in training: the whole window is rebuilt
)
