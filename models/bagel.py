"""Bagel: a conditional VAE of a KPI's windows; how unlikely the last point is under it is the score.

Source: Li, Chen, Pei, "Robust and Unsupervised KPI Anomaly Detection Based on Conditional Variational Autoencoder",
IPCCC 2018. Network, M-ELBO, missing injection and MCMC completion are those of the paper. Done otherwise:

- A missing value is 0 after standardisation, not 2 min - max of the KPI, which is far outside where values are
  negative or wide. In a live window it starts as what completed it when it was due, and MCMC goes on from there.
- The time code is UTC. An offset would only permute its columns, except that weekdays then begin at another hour.
- Latent noise is drawn once, from a seed: a score is the same in every run and in any batch.
- Likelihoods have heavy tails (they square the error), so what is given to the threshold is sqrt(2 (NLL - floor)), in
  the order of the paper's score: the distance in deviations, when the deviation is known and always the same.
- Held-out windows are judged by a Huber loss: a few unlabelled anomalies were measured to turn the mean likelihood of a
  good network worse than that of an untrained one, and training stopped at its first epoch.

The served passes are exact shortcuts of the layers: only the last point of a window is decoded; the one-hot time code
takes three columns of a layer; only windows that miss points go through MCMC, which decodes nothing else but those.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import huber_loss, softplus

from models import base, family
from models.base import Bool, Context, Float64, Int64
from models.batching import run_padded
from models.errors import ConfigError
from models.family import Weights
from models.scaling import FLAT, INPUT_LIMIT, SMALLEST, clock, standardise
from models.serving import ServedModel, fitting_chunk

Float32 = NDArray[np.float32]

MINUTES, HOURS, WEEKDAYS = 60, 24, 7  # columns of the one-hot time code y
CODE = MINUTES + HOURS + WEEKDAYS
REGULARISED = ("encoder1", "encoder2", "decoder1", "decoder2")  # with their biases, as in the authors' code
HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
# Of the training likelihoods: errors begin there. A lower one would only add a constant to nearly all squared errors.
FLOOR_QUANTILE = 0.01
# Missing points that one pass completes at most; a row goes to the smallest pass that takes it, whatever its batch.
HOLES = (4, 16, 48)


@dataclass(frozen=True, slots=True)
class BagelConfig:
    """Shape and scaling of one Bagel.

    Raises:
        ConfigError: a value is out of its bounds.
    """

    window: int = 120  # W, points of a window, the assessed one included
    features: int = 1  # a Bagel reads one KPI
    latent: int = 8  # Z, dimensions of the latent code
    hidden: int = 100  # units of each of the two hidden layers, of the encoder and of the decoder
    samples: int = 128  # S, latent draws that a score is the mean of
    iterations: int = 10  # of MCMC, for windows that miss points
    injection: float = 0.01  # share of the training points that are made missing, anew each time
    condition_dropout: float = 0.1  # of each column of the time code, in training
    std_floor: float = 1e-4  # least deviation, in those of the training data; a flat KPI would drive it to 0
    weight_decay: float = 1e-3  # times the squares of the hidden layers' weights, in the loss
    seed: int = 0  # of the latent noise
    # train: by the constants of the training data, for the KPI it was trained on.
    # window: by each window's own newest history point and deviation, for series never seen.
    scaling: Literal["train", "window"] = "train"

    def __post_init__(self) -> None:
        if self.features != 1:
            raise ConfigError(f"features={self.features} must be 1: a Bagel reads one KPI; use mtad_gat for entities")
        bounds = {"window": (3, 4096), "latent": (1, 256), "hidden": (1, 4096), "samples": (1, 4096)}
        bounds |= {"iterations": (1, 1000), "seed": (0, 2**32 - 1)}
        for name, (least, most) in bounds.items():
            if not least <= getattr(self, name) <= most:
                raise ConfigError(f"{name}={getattr(self, name)} must be from {least} to {most}")
        for name in ("injection", "condition_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 0 and below 1")
        if not 1e-6 <= self.std_floor <= 1:
            raise ConfigError(f"std_floor={self.std_floor} must be from 1e-6 to 1; 1e-4 is usual")
        if not 0 <= self.weight_decay < math.inf:
            raise ConfigError(f"weight_decay={self.weight_decay} must be at least 0 and finite")
        if self.scaling not in ("train", "window"):
            raise ConfigError(f"scaling={self.scaling!r} must be 'train' or 'window'")

    @property
    def layers(self) -> dict[str, tuple[int, int]]:
        """Outputs and inputs of every layer."""
        return {
            "encoder1": (self.hidden, self.window + CODE),
            "encoder2": (self.hidden, self.hidden),
            "z_mean": (self.latent, self.hidden),
            "z_std": (self.latent, self.hidden),
            "decoder1": (self.hidden, self.latent + CODE),
            "decoder2": (self.hidden, self.hidden),
            "x_mean": (self.window, self.hidden),
            "x_std": (self.window, self.hidden),
        }

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every weight, in the order of the layers."""
        shapes: dict[str, tuple[int, ...]] = {}
        for name, (outputs, inputs) in self.layers.items():
            shapes |= {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}
        return shapes


class Network(family.Network):
    """The layers as in the paper, while they are trained; takes and gives standardised values."""

    encoder1: nn.Linear
    encoder2: nn.Linear
    z_mean: nn.Linear
    z_std: nn.Linear
    decoder1: nn.Linear
    decoder2: nn.Linear
    x_mean: nn.Linear
    x_std: nn.Linear

    def __init__(self, config: BagelConfig) -> None:
        super().__init__()
        self.config = config
        for name, (outputs, inputs) in config.layers.items():
            self.add_module(name, nn.Linear(inputs, outputs))

    def encode(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of q(z | x, y), (..., Z), of windows (..., W) and their one-hot time codes (..., 91)."""
        h = torch.relu(self.encoder1(torch.cat([x, y], dim=-1)))
        h = torch.relu(self.encoder2(h))
        return self.z_mean(h), softplus(self.z_std(h)) + self.config.std_floor

    def decode(self, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of p(x | z, y), (..., W)."""
        h = torch.relu(self.decoder1(torch.cat([z, y], dim=-1)))
        h = torch.relu(self.decoder2(h))
        return self.x_mean(h), softplus(self.x_std(h)) + self.config.std_floor

    def loss(self, batch: family.Batch) -> Tensor:
        """Return -M-ELBO of each window by one latent draw, (B,); in training, with the squares of the weights.

        A value that does not count (missing, labelled anomalous, or left out at random in training) is 0 in the input.
        """
        x, normal, y = batch.x[..., 0], batch.counts[..., 0], one_hot(batch.code)
        if self.training:
            normal = normal & (torch.rand_like(x) >= self.config.injection)
            y = torch.dropout(y, self.config.condition_dropout, True)
        x = torch.where(normal, x, 0.0)
        z_mean, z_std = self.encode(x, y)
        noise = torch.randn_like(z_mean)
        z = z_mean + z_std * noise
        x_mean, x_std = self.decode(z, y)
        if not self.training:
            return -m_elbo(huber_log_density(x, x_mean, x_std), normal, z, z_std, noise)
        squares = torch.stack([one.square().sum() for one in self._regularised()]).sum()
        return self.config.weight_decay * squares - m_elbo(log_density(x, x_mean, x_std), normal, z, z_std, noise)

    def measure(self, batch: family.Batch) -> dict[str, Float64]:
        """Return `floor`: the NLL that hardly any training window falls below, (1,), nats."""
        counts = batch.counts[:, -1, 0]
        if not counts.any():
            return {}
        weights = {name: tensor.detach() for name, tensor in self.state_dict().items()}
        scoring, _ = pack(weights, self.config)
        x, code = batch.x[counts][..., 0].numpy(), batch.code[counts].numpy()
        fn = partial(last_point, scoring, noise=Noise.of(self.config).score, std_floor=self.config.std_floor)
        mean, precision, rest = run_padded(fn, [x, code], chunk=_chunk(self.config))
        nll = 0.5 * precision * np.square(x[:, -1] - mean) + rest
        return {"floor": np.quantile(nll.astype(np.float64), [FLOOR_QUANTILE])}

    def _regularised(self) -> list[Tensor]:
        return [one for name in REGULARISED for one in self.get_submodule(name).parameters()]


def one_hot(code: Tensor) -> Tensor:
    """Time code y, (..., 91) float32: columns of the minute, the hour and the weekday; of codes (..., 3)."""
    parts = [code[..., i, None] == torch.arange(n) for i, n in enumerate((MINUTES, HOURS, WEEKDAYS))]
    return torch.cat(parts, dim=-1).float()


def log_density(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Logarithm of N(x; mean, std**2), of each value."""
    return -0.5 * ((x - mean) / std).square() - std.log() - HALF_LOG_2PI


def huber_log_density(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """The same, but linear beyond one deviation; not normalised."""
    off = (x - mean) / std
    return -huber_loss(off, torch.zeros_like(off), reduction="none") - std.log() - HALF_LOG_2PI


def m_elbo(log_p: Tensor, normal: Tensor, z: Tensor, z_std: Tensor, noise: Tensor) -> Tensor:
    """Modified evidence lower bound of each window, (B,): sum(a log p(x|z,y)) + mean(a) log p(z) - log q(z|x,y).

    Only the prior is weighted by the share of normal points (β), so that it weighs no more in a window of few points.

    Args:
        log_p: of each point, (B, W).
        normal: a, (B, W) bool: which points are neither missing nor anomalous.
        z: draws of the latent code, (B, Z).
        z_std: their deviation, (B, Z).
        noise: (z - mean) / z_std, (B, Z).

    Source: Xu et al., "Unsupervised Anomaly Detection via Variational Auto-Encoder ...", WWW 2018, equation 3.
    """
    log_prior = (-0.5 * z.square() - HALF_LOG_2PI).sum(dim=-1)
    log_q = (-0.5 * noise.square() - z_std.log() - HALF_LOG_2PI).sum(dim=-1)
    return torch.where(normal, log_p, 0.0).sum(dim=-1) + normal.float().mean(dim=-1) * log_prior - log_q


@dataclass(frozen=True, slots=True)
class Noise:
    """Standard normal draws, the same for every row: of the score, (S, Z), and of each iteration of MCMC."""

    score: Tensor  # (S, Z)
    latent: Tensor  # (M, Z)
    point: Tensor  # (M, W)

    @classmethod
    def of(cls, config: BagelConfig) -> "Noise":
        """Draw it from the seed of a config."""
        draws = np.random.RandomState(config.seed)  # its stream is frozen; those of newer generators are not
        z, m = config.latent, config.iterations
        drawn = [draws.standard_normal(shape) for shape in ((config.samples, z), (m, z), (m, config.window))]
        for chain in drawn[1:]:
            chain[-1] = 0  # the last iteration takes the means: one draw for ever would shift all completions alike
        return cls(*(torch.from_numpy(one.astype(np.float32)) for one in drawn))


def pack(weights: Weights, config: BagelConfig) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights as `last_point` and as `complete` read them, of a plain model or a stack; matrices are (in, out)."""
    w, z, hidden = config.window, config.latent, config.hidden
    encoder1, decoder1 = weights["encoder1.weight"], weights["decoder1.weight"]
    rows = {
        "encoder1": encoder1[..., :w],
        "code": torch.cat([encoder1[..., w:], decoder1[..., z:]], dim=-2),
        "encoder2": weights["encoder2.weight"],
        "z": torch.cat([weights["z_mean.weight"], weights["z_std.weight"]], dim=-2),
        "decoder1": decoder1[..., :z],
        "decoder2": weights["decoder2.weight"],
    }
    shared = {name: one.transpose(-2, -1) for name, one in rows.items()}
    for name, of in (("code", ("encoder1", "decoder1")), ("z", ("z_mean", "z_std"))):
        shared[f"{name}.bias"] = torch.cat([weights[f"{one}.bias"] for one in of], dim=-1)
    shared |= {name: weights[name] for name in ("encoder2.bias", "decoder2.bias")}
    shared = {name: one.contiguous() for name, one in shared.items()}
    # Both heads side by side: one row for each point of a window.
    heads = torch.cat([weights["x_mean.weight"], weights["x_std.weight"]], dim=-1)  # (..., W, 2 H)
    bias = torch.stack([weights["x_mean.bias"], weights["x_std.bias"]], dim=-1)  # (..., W, 2)
    newest = heads[..., -1, :].reshape(*heads.shape[:-2], 2, hidden)
    last = {"last": newest.contiguous(), "last.bias": bias[..., -1, :].contiguous()}
    return shared | last, shared | {"heads": heads, "heads.bias": bias}


def last_point(w: Weights, x: Tensor, code: Tensor, *, noise: Tensor, std_floor: float) -> tuple[Tensor, ...]:
    """How likely the last point of each window is, as a function of it: -mean(log p) = A (x - m)**2 / 2 + C.

    With one mean and deviation for each latent draw, A = mean(1/std**2), m = mean(mean/std**2) / A, and
    C = mean(log std) + mean((mean - m)**2 / std**2) / 2 + log(2 pi) / 2.

    Args:
        w: the first of `pack`.
        x: windows, (n, W) float32, complete.
        code: minute, hour and weekday, (n, 3) int64.
        noise: standard normal draws, (S, Z).
        std_floor: as in the config.

    Returns:
        m, A (> 0) and C, (n,) float32.
    """
    encoder_y, decoder_y = _of_code(w, code)
    z_mean, z_std = _encode(w, encoder_y + x @ w["encoder1"], std_floor)
    n, samples = len(x), len(noise)
    # (mean + std noise) D = mean D + noise (std D): the first term is the same for all draws.
    h = (z_mean @ w["decoder1"] + decoder_y)[:, None]
    h = torch.baddbmm(h, noise.expand(n, -1, -1), z_std[:, :, None] * w["decoder1"]).relu_()  # (n, S, H)
    h = torch.addmm(w["decoder2.bias"], h.view(n * samples, -1), w["decoder2"]).relu_()
    heads = (h @ w["last"].t()).view(n, samples, 2) + w["last.bias"]
    mean, std = heads[..., 0], softplus(heads[..., 1]) + std_floor
    weight = std.square().reciprocal()
    precision = weight.mean(dim=1)
    middle = (mean * weight).mean(dim=1) / precision
    apart = ((mean - middle[:, None]).square() * weight).mean(dim=1)
    return middle, precision, std.log().mean(dim=1) + 0.5 * apart + HALF_LOG_2PI


def complete(
    w: Weights, known: Tensor, value: Tensor, at: Tensor, hole: Tensor, code: Tensor, *, noise: Noise, std_floor: float
) -> tuple[Tensor]:
    """Complete windows by MCMC: draw z from q(z | x, y), the missing points from p(x | z, y), and again.

    Only those points are decoded, and of the first layer only their columns change from one iteration to the next.

    Args:
        w: the second of `pack`.
        known: windows with 0 at the missing points, (n, W) float32.
        value: what the missing points start with, (n, m) float32; 0 where `hole` is not.
        at: where in the window they are, (n, m) int64.
        hole: which of these m are missing indeed; the others are padding, (n, m) bool.
        code: minute, hour and weekday, (n, 3) int64.
        noise: two draws for each iteration.
        std_floor: as in the config.

    Returns:
        The missing points, within ±INPUT_LIMIT, (n, m) float32; 0 where `hole` is not.
    """
    (n, m), flat = at.shape, at.reshape(-1)
    encoder_y, decoder_y = _of_code(w, code)
    still = encoder_y + known @ w["encoder1"]  # (n, H), what does not change
    columns = w["encoder1"].index_select(0, flat).view(n, m, -1)  # (n, m, H)
    heads = w["heads"].index_select(0, flat).view(n, 2 * m, -1).transpose(1, 2)  # (n, H, 2 m)
    heads_bias = w["heads.bias"].index_select(0, flat).view(n, m, 2)
    for z_noise, x_noise in zip(noise.latent, noise.point, strict=True):
        z_mean, z_std = _encode(w, still + torch.bmm(value[:, None], columns)[:, 0], std_floor)
        h = torch.relu((z_mean + z_std * z_noise) @ w["decoder1"] + decoder_y)
        h = torch.relu(torch.addmm(w["decoder2.bias"], h, w["decoder2"]))
        out = torch.bmm(h[:, None], heads).view(n, m, 2) + heads_bias
        value = out[..., 0] + (softplus(out[..., 1]) + std_floor) * x_noise[at]
        value = torch.where(hole, value.clamp(-INPUT_LIMIT, INPUT_LIMIT), 0.0)
    return (value,)


def _of_code(w: Weights, code: Tensor) -> tuple[Tensor, Tensor]:
    """What the time code adds to the first layer of the encoder and of the decoder, biases included, (n, H) each."""
    columns = (code + torch.tensor([0, MINUTES, MINUTES + HOURS])).reshape(-1)
    h = w["code"].index_select(0, columns).view(len(code), 3, -1).sum(dim=1) + w["code.bias"]
    encoder, decoder = h.chunk(2, dim=-1)
    return encoder, decoder


def _encode(w: Weights, first: Tensor, std_floor: float) -> tuple[Tensor, Tensor]:
    """Mean and deviation of q(z | x, y), (n, Z), from what enters the first layer's ReLU, (n, H)."""
    h = torch.relu(torch.addmm(w["encoder2.bias"], torch.relu(first), w["encoder2"]))
    mean, std = torch.addmm(w["z.bias"], h, w["z"]).chunk(2, dim=-1)
    return mean, softplus(std) + std_floor


class Bagel(ServedModel[BagelConfig]):
    """A trained Bagel as the service uses it, or a stack of them.

    The constant `floor` is the NLL at which errors begin; without it they begin at the least there can be.
    """

    family: ClassVar[str] = "bagel"
    reads_point: ClassVar[bool] = True

    def __init__(
        self, config: BagelConfig, weights: Weights, constants: base.Constants, *, stacked: bool = False
    ) -> None:
        """Take weights and constants over."""
        super().__init__(config, weights, constants, stacked=stacked)
        least = np.full_like(self.constants["center"], math.log(config.std_floor) + HALF_LOG_2PI)
        self.constants.setdefault("floor", least)
        self.packed, self.filling = pack(self.raw, config)
        self.noise = Noise.of(config)

    @property
    def history(self) -> int:
        """H = W - 1: the network reads the point itself too."""
        return self.config.window - 1

    def assess(self, context: Context) -> base.Assessment:
        """Complete the windows that miss points, and say how unlikely their last points are.

        The expected value is the mean of the latent draws, weighted by their precision. A point that did not arrive is
        completed by it; when scaling is "window" at most at the range of the history, so that a long gap cannot feed
        upon itself.

        The squared error is 2 (NLL - floor). A general model has no floor that suits every KPI, and is sure of itself
        where it should not be: when scaling is "window", the variance is raised by the square of the series' usual
        step u, and NLL counts from that of a point as expected with deviation u. Delay-7 F1 at the best limit, mean of
        six KPIs that the model had not seen: 0.82 for the plain NLL, 0.82 for the distance in deviations, 0.92 so.

        Raises:
            ValueError: the context has another H or F.
        """
        base.check_shape(context, self.history, self.features)
        x, center, scale = self._standardised(context)
        missing = np.concatenate([~context.learned[..., 0], np.isnan(context.value)], axis=1)
        code = clock(context.time_ms)
        x = self.completed(x, missing, code, context)
        fn = partial(last_point, noise=self.noise.score, std_floor=self.config.std_floor)
        out = self.run(fn, self.packed, [x, code], context, chunk=_chunk(self.config))
        mean, precision, rest = (one.astype(np.float64)[:, None] for one in out)
        expected = center + scale * np.where(self.still_rows(context), 0.0, mean)
        spread, slack = scale / np.sqrt(precision), 2 * (self.constant("floor", context) - rest)
        if self.config.scaling == "window":
            usual = _usual_step(context)
            spread = np.hypot(spread, usual)
            slack = -2 * np.log(spread / usual)
        away = base.residual(context.value, expected, spread)
        error = np.copysign(np.sqrt(np.maximum(np.square(away) - slack, 0.0)), away)
        return base.Assessment(
            expected=expected,
            spread=spread,
            error=np.where(np.isnan(context.value), 0.0, error),
            completion=self._bounded(expected, center, scale, context),
            slack=slack,
        )

    def _standardised(self, context: Context) -> tuple[Float32, Float64, Float64]:
        """Windows with their points, (B, W); a point that did not arrive is the last of the history. Center, scale."""
        history, center, scale = self.standardised(context)
        point = np.where(np.isnan(context.value), context.history[:, -1], context.value)
        x = np.concatenate([history[..., 0], standardise(point, center, scale)], axis=1)
        still = self.still_rows(context)
        return np.where(still, np.float32(0), x), np.where(still, context.history[:, -1], center), scale

    def _bounded(self, expected: Float64, center: Float64, scale: Float64, context: Context) -> Float64:
        """What may stand for a value, (B, 1): within the range of the training data, or of the window itself."""
        if self.config.scaling == "train":
            return np.clip(expected, center - INPUT_LIMIT * scale, center + INPUT_LIMIT * scale)
        return np.clip(expected, context.history.min(axis=1), context.history.max(axis=1))

    def completed(self, x: Float32, missing: Bool, code: Int64, context: Context) -> Float32:
        """Windows with their missing points completed, (B, W); `x` itself when none is missing."""
        counts = missing.sum(axis=1)
        if not counts.any():
            return x
        x = x.copy()
        sizes = (*(size for size in HOLES if size < self.config.window), self.config.window)
        passes = np.searchsorted(sizes, counts)
        fn = partial(complete, noise=self.noise, std_floor=self.config.std_floor)
        for which, size in enumerate(sizes):
            rows = np.flatnonzero((passes == which) & (counts > 0))
            if not len(rows):
                continue
            # Missing points first, in the order of time.
            at = np.argsort(~missing[rows], axis=1, kind="stable")[:, :size]
            hole = np.take_along_axis(missing[rows], at, axis=1)
            value = np.where(hole, np.take_along_axis(x[rows], at, axis=1), np.float32(0))
            known = np.where(missing[rows], np.float32(0), x[rows])
            inputs = [known, value, at, hole, code[rows]]
            chunk = fitting_chunk(12 * size * self.config.hidden)
            (filled,) = self.run(fn, self.filling, inputs, context.take(rows), chunk=chunk)
            row, column = np.nonzero(hole)
            x[rows[row], at[row, column]] = filled[row, column]
        return x


def _chunk(config: BagelConfig) -> int:
    """Windows at once: the two hidden layers of all draws should stay in the cache."""
    return fitting_chunk(8 * config.samples * config.hidden)


def _usual_step(context: Context) -> Float64:
    """The usual step of each series, (B, 1), > 0; while it is not known, that of its window."""
    history = np.ascontiguousarray(context.history[..., 0])
    steps = np.abs(np.diff(history, axis=1)).mean(axis=1)
    usual = np.where(np.isnan(context.usual_step[:, 0]), steps, context.usual_step[:, 0])
    floor = np.maximum(FLAT * np.abs(history).max(axis=1), SMALLEST)
    step: Float64 = np.maximum(usual, floor)[:, None]
    return step


FAMILY = family.Family(
    name="bagel",
    title="Bagel",
    method="a conditional VAE tells how likely the last point of a window is; the less likely, the higher the score",
    config=BagelConfig,
    shapes=lambda config: config.shapes,
    network=Network,
    serve=Bagel,
    history=lambda config: int(config.window) - 1,
    reads_point=lambda config: True,
    training={"epochs": 50, "batch": 128, "learning_rate": 1e-3, "decay": 0.97, "clip_norm": 10.0, "patience": 10},
)
