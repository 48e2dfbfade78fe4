"""MTAD-GAT: attention over the metrics and over the time of a window; a GRU forecasts the next point and reconstructs.

Source: Zhao et al., "Multivariate Time-series Anomaly Detection via Graph Attention Network", ICDM 2020. The attention
is that of GATv2 (Brody et al., 2022) with a bias for each pair of nodes, as in the ML4ITS implementation, and the
decoder is a GRU that reads the whole latent code at every step. Otherwise than in the published code:

- The target is the very next point; the loss of a forecast is Huber's, or the absolute error where windows are
  measured by themselves: their gradients are finite, and a spike that nobody labelled does not carry them away.
- The code is a VAE's and reconstructs the values themselves. Their Gaussian likelihood is taken in log space (the
  published density underflows, and 1 - p(x) has no bound), with one variance for each feature, within
  exp(±LOG_VARIANCE). One that the decoder chose for each point was large just where a point was strange: scored with
  it and without it, the same networks had a VUS-PR of 0.18 and 0.44 on machines 2-1 and 2-3 of SMD.
- Each feature's parts of the score have the unit of its own training windows, not of the test set.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from models.base import Assessment, Bool, Constants, Context, Float64, check_shape, residual
from models.errors import ConfigError
from models.family import Batch, Family, Network, Weights
from models.mtad_gat_pass import Pass
from models.scaling import FLAT, INPUT_LIMIT, local_spread, normalise, standardise
from models.serving import ServedModel

LOG_VARIANCE = 8.0  # bound of the logarithm of a reconstruction's variance, both ways
HALF_LOG_TAU = 0.5 * math.log(2 * math.pi)
PIECE = 256  # windows at once where no gradient is wanted
CHUNK = 128  # windows of a served pass: each step of a GRU is a small product, and fewer rows leave it waiting
WINSOR = 0.99  # errors beyond this quantile count as it where their usual size is measured
# Least usual error of a feature, in deviations: else one that is forecast all but exactly drowns the others when it
# moves.
LEAST_UNIT = 0.3


@dataclass(frozen=True, slots=True)
class MTADGATConfig:
    """Shape, mode and scaling of one MTAD-GAT.

    Raises:
        ConfigError: a value is out of its bounds.
    """

    window: int = 30  # W, points that the network reads at once; 100 is published
    features: int = 1  # F, metrics of a point
    # forecasting: the next point only; reconstructing: the point within its window only; both: the sum of both scores.
    mode: Literal["forecasting", "reconstructing", "both"] = "both"
    gamma: float = 0.8  # weight of the reconstruction in the score of both
    kernel: int = 7  # points that the convolution spans, odd
    embed: int = 16  # dimensions in which two nodes are compared; 2 W and 2 F in published code
    hidden: int = 64  # units of the GRUs; 150 and 300 are published
    dense: int = 64  # units of the forecast's dense layers
    latent: int = 16  # dimensions of the code that the window is reconstructed from
    slope: float = 0.2  # of the LeakyReLU of the attention below 0
    dropout: float = 0.1  # in training only, between the dense layers
    # train: by the constants of the training data, for the KPI or entity it was trained on.
    # window: by each window's own deviation without its newest point, for series never seen.
    scaling: Literal["train", "window"] = "train"

    def __post_init__(self) -> None:
        bounds = {"window": (12, 4096), "features": (1, 4096), "kernel": (1, 255), "embed": (1, 8192)}
        bounds |= {"hidden": (4, 8192), "dense": (1, 8192), "latent": (1, 8192)}
        for name, (least, most) in bounds.items():
            if not least <= getattr(self, name) <= most:
                raise ConfigError(f"{name}={getattr(self, name)} must be from {least} to {most}")
        if self.kernel % 2 == 0:
            raise ConfigError(f"kernel={self.kernel} must be odd, so that a point is in its middle; use 7")
        if self.mode not in ("forecasting", "reconstructing", "both"):
            raise ConfigError(f"mode={self.mode!r} must be 'forecasting', 'reconstructing' or 'both'")
        if not 0 <= self.gamma < math.inf:
            raise ConfigError(f"gamma={self.gamma} must be at least 0 and finite; 0.8 is published")
        for name in ("slope", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 0 and below 1")
        if self.scaling not in ("train", "window"):
            raise ConfigError(f"scaling={self.scaling!r} must be 'train' or 'window'")

    @property
    def forecasts(self) -> bool:
        """Whether there is a forecast."""
        return self.mode != "reconstructing"

    @property
    def reconstructs(self) -> bool:
        """Whether there is a reconstruction."""
        return self.mode != "forecasting"


def shapes(config: MTADGATConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight, in the order of the layers."""
    w, f, d, h, k = config.window, config.features, config.embed, config.hidden, config.latent
    known: dict[str, tuple[int, ...]] = {"log_variance": (f,)} if config.reconstructs else {}
    known |= {"conv.weight": (f, f, config.kernel), "conv.bias": (f,)}
    for name, nodes, size in (("by_feature", f, w), ("by_time", w, f)):
        known |= {f"{name}.left": (d, size), f"{name}.offset": (d,), f"{name}.right": (d, size)}
        known |= {f"{name}.attention": (d,), f"{name}.bias": (nodes, nodes)}
    known |= _gru_shapes("gru", 3 * f, h)
    if config.forecasts:
        for index, (outputs, inputs) in enumerate(((config.dense, h), (config.dense, config.dense), (f, config.dense))):
            known |= {f"forecast.{3 * index}.weight": (outputs, inputs), f"forecast.{3 * index}.bias": (outputs,)}
    if config.reconstructs:
        known |= {"code.weight": (2 * k, h), "code.bias": (2 * k,)} | _gru_shapes("decoder", k, h)
        known |= {"out.weight": (f, h), "out.bias": (f,)}
    return known


def _gru_shapes(name: str, inputs: int, hidden: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{name}.weight_ih_l0": (3 * hidden, inputs),
        f"{name}.weight_hh_l0": (3 * hidden, hidden),
        f"{name}.bias_ih_l0": (3 * hidden,),
        f"{name}.bias_hh_l0": (3 * hidden,),
    }


class Attention(nn.Module):
    """Graph attention over N nodes, each connected with all, by GATv2.

    e_ij = aᵀ LeakyReLU(L v_i + R v_j + c) + b_ij; α_i = softmax of e_i over j; h_i = sigmoid(Σ_j α_ij v_j).
    """

    def __init__(self, nodes: int, size: int, embed: int, slope: float) -> None:
        super().__init__()
        self.left = nn.Parameter(torch.empty(embed, size))
        self.offset = nn.Parameter(torch.zeros(embed))
        self.right = nn.Parameter(torch.empty(embed, size))
        self.attention = nn.Parameter(torch.empty(embed))
        self.bias = nn.Parameter(torch.zeros(nodes, nodes))
        self.slope = slope
        nn.init.xavier_uniform_(self.left, gain=1.414)
        nn.init.xavier_uniform_(self.right, gain=1.414)
        nn.init.uniform_(self.attention, -1 / math.sqrt(embed), 1 / math.sqrt(embed))

    def weights(self, v: Tensor) -> Tensor:
        """α, (B, N, N), of nodes v, (B, N, C); each row sums to 1."""
        # With w(x) = LeakyReLU(x) = (1 + s)/2 x + (1 - s)/2 |x|, the sum of a_d |x_d| over the d of one sign of a is a
        # distance in the norm of absolute values, and (B, N, N, D) is never made. The part of v_i in the linear term
        # is the same for all j, so the softmax does not know it.
        size = self.attention.abs()
        left = functional.linear(v, self.left, self.offset) * size  # (B, N, D)
        right = functional.linear(v, self.right) * size
        up, down = self.attention > 0, self.attention < 0
        e = _distance(left[..., up], right[..., up]) - _distance(left[..., down], right[..., down])
        linear = functional.linear(v, self.attention @ self.right)  # (B, N)
        e = (1 - self.slope) / 2 * e + (1 + self.slope) / 2 * linear[:, None, :]
        return torch.softmax(e + self.bias, dim=2)

    def forward(self, v: Tensor) -> Tensor:
        """h, (B, N, C), of nodes v, (B, N, C)."""
        return torch.sigmoid(self.weights(v) @ v)


def _distance(left: Tensor, right: Tensor) -> Tensor:
    """Σ_d |left_id + right_jd|, (B, N, N), of (B, N, D) each."""
    return torch.cdist(left, -right, p=1.0)


class MTADGATNetwork(Network):
    """The layers while they are trained; takes and gives standardised values."""

    def __init__(self, config: MTADGATConfig) -> None:
        super().__init__()
        self.config = config
        f, h = config.features, config.hidden
        self.conv = nn.Conv1d(f, f, config.kernel, padding=config.kernel // 2)
        self.by_feature = Attention(f, config.window, config.embed, config.slope)
        self.by_time = Attention(config.window, f, config.embed, config.slope)
        self.gru = nn.GRU(3 * f, h, batch_first=True)
        if config.forecasts:
            last = nn.Linear(config.dense, f)
            if config.scaling == "window":  # untrained, the forecast is the last value
                nn.init.zeros_(last.weight)
                nn.init.zeros_(last.bias)
            self.forecast = nn.Sequential(
                nn.Linear(h, config.dense),
                nn.ReLU(),
                nn.Dropout(config.dropout),
                nn.Linear(config.dense, config.dense),
                nn.ReLU(),
                nn.Dropout(config.dropout),
                last,
            )
        if config.reconstructs:
            self.code = nn.Linear(h, 2 * config.latent)
            self.decoder = nn.GRU(config.latent, h, batch_first=True)
            self.out = nn.Linear(h, f)
            self.log_variance = nn.Parameter(torch.zeros(f))

    def encode(self, x: Tensor) -> Tensor:
        """Last hidden state (B, hidden) of windows x, (B, W, F)."""
        v = torch.relu(self.conv(x.transpose(1, 2)))  # (B, F, W): the nodes are features
        by_feature = self.by_feature(v).transpose(1, 2)  # (B, W, F)
        by_time = self.by_time(v.transpose(1, 2))  # (B, W, F)
        state: Tensor = self.gru(torch.cat([x, by_feature, by_time], dim=2))[1][0]
        return state

    def ahead(self, x: Tensor, state: Tensor) -> Tensor:
        """Forecast (B, F) of the point after windows x, from their hidden state."""
        step: Tensor = self.forecast(state)
        return x[:, -1] + step if self.config.scaling == "window" else step

    def decode(self, z: Tensor) -> Tensor:
        """Mean of every point, (B, W, F), from latent codes z, (B, K).

        Every step reads the whole code: repeated along the time, not cut into pieces.
        """
        states = self.decoder(z[:, None, :].expand(-1, self.config.window, -1))[0]  # (B, W, hidden)
        mean: Tensor = self.out(states)
        return mean

    def loss(self, batch: Batch) -> Tensor:
        """Loss of the forecast, of the reconstruction, or their sum, (B,); see `Network`."""
        if len(batch.x) > PIECE and not torch.is_grad_enabled():
            # All held-out windows come at once, and a table of pairs of nodes for each is gigabytes.
            pieces = zip(*(torch.split(part, PIECE) for part in batch), strict=True)
            return torch.cat([self.loss(Batch(*piece)) for piece in pieces])
        total = torch.zeros(len(batch.x))
        if self.config.forecasts:
            x, center, scale = self._own(batch.x[:, :-1])
            target = ((batch.x[:, -1] - center) / scale).clamp(-INPUT_LIMIT, INPUT_LIMIT)
            # A window's own deviation is many times its steps: all of Huber's loss would be its parabola.
            beta = 1.0 if self.config.scaling == "train" else 0.0
            forecast = self.ahead(x, self.encode(x))
            error = functional.smooth_l1_loss(forecast, target, beta=beta, reduction="none")  # (B, F)
            total = total + _mean(error, batch.counts[:, -1])
        if self.config.reconstructs:
            x = self._own(batch.x[:, 1:])[0]
            mu, log_variance = self.code(self.encode(x)).chunk(2, dim=1)
            log_variance = log_variance.clamp(-LOG_VARIANCE, LOG_VARIANCE)
            z = mu + torch.exp(0.5 * log_variance) * torch.randn_like(mu) if self.training else mu
            # A variance that the decoder could choose for each point would be large just where a point is strange.
            spread = self.log_variance.clamp(-LOG_VARIANCE, LOG_VARIANCE)
            nll = gaussian_nll(x, self.decode(z), spread)  # (B, W, F)
            divergence = 0.5 * (log_variance.exp() + mu.square() - 1 - log_variance).sum(dim=1)
            cells = batch.counts[:, 1:].sum(dim=(1, 2)).clamp(min=1)
            total = total + _mean(nll, batch.counts[:, 1:]) + divergence / cells
        return total

    @torch.no_grad()
    def measure(self, batch: Batch) -> dict[str, Float64]:
        """Usual size of each feature's errors over training windows, standardised, (F,) for each part of the score.

        It is the root of the mean square, errors beyond their 99 % quantile taken as that: a few anomalies that nobody
        labelled do not make it, and the rare steps of a feature that mostly rests do, which a quartile knows nothing
        of. A feature that never counts gets 1; windows that are measured by themselves give nothing.
        """
        if self.config.scaling == "window":
            return {}
        was, parts = self.training, []
        self.eval()
        for x in torch.split(batch.x, PIECE):
            parts.append(self._errors(x))
        self.train(was)
        counts = batch.counts[:, -1].numpy()
        constants: dict[str, Float64] = {}
        for name in parts[0]:
            square = torch.cat([part[name] for part in parts]).double().square().numpy()
            square[:, ~counts.any(axis=0)] = 1.0
            square[~counts & counts.any(axis=0)] = np.nan
            most = np.nanquantile(square, WINSOR, axis=0)
            constants[f"{name}_unit"] = np.sqrt(np.nanmean(np.minimum(square, most), axis=0))
        return constants

    def _errors(self, x: Tensor) -> dict[str, Tensor]:
        """Error of the forecast and of the reconstruction of the last of H + 1 points, (B, F) each."""
        errors = {}
        if self.config.forecasts:
            errors["forecast"] = x[:, -1] - self.ahead(x[:, :-1], self.encode(x[:, :-1]))
        if self.config.reconstructs:
            mu = self.code(self.encode(x[:, 1:]))[:, : self.config.latent]
            errors["reconstruction"] = x[:, -1] - self.decode(mu)[:, -1]
        return errors

    def _own(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Windows (B, W, F) as this scaling has the network read them; what was subtracted and divided by, (B, F)."""
        if self.config.scaling == "train":
            return x, torch.zeros_like(x[:, 0]), torch.ones_like(x[:, 0])
        # As in `models.scaling.normalise`, but by all points except the newest: one pass then serves the
        # reconstruction of that point, which must not be measured by itself, and the forecast of the one after it.
        older = x[:, :-1]
        center, scale = older[:, -1], older.std(dim=1, correction=0)
        scale = torch.maximum(scale, (FLAT * older.abs().amax(dim=1)).clamp(min=1e-6))
        own = (x - center[:, None]) / scale[:, None]
        return own.clamp(-INPUT_LIMIT, INPUT_LIMIT), center, scale


def gaussian_nll(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """-log N(x; mean, exp(log_variance)), of any one shape, in nats."""
    return 0.5 * ((x - mean).square() * torch.exp(-log_variance) + log_variance) + HALF_LOG_TAU


def _mean(values: Tensor, counts: Tensor) -> Tensor:
    """Mean of the values that count of each window, (B,), of (B, ...) each; 0 where none does."""
    axes = tuple(range(1, values.ndim))
    return torch.where(counts, values, 0.0).sum(dim=axes) / counts.sum(dim=axes).clamp(min=1)


class MTADGAT(ServedModel[MTADGATConfig]):
    """A trained MTAD-GAT as the service uses it; each mode is a class of its own.

    The score of a feature is s = (f + γ r) / (1 + γ), or one of the two: f the squared error of the forecast and r that
    of the reconstruction, each in units of its usual size. Of a Gaussian of constant variance, r is the negative log
    likelihood of the point, twice as far as it is above its least, normalised by that of the training data. The units
    are `forecast_unit` and `reconstruction_unit` with scaling "train", and `local_spread` with scaling "window".
    """

    family: ClassVar[str] = "mtad_gat"

    def __init__(
        self, config: MTADGATConfig, weights: Weights, constants: Constants | None = None, *, stacked: bool = False
    ) -> None:
        if stacked:
            raise ConfigError("models of the family 'mtad_gat' cannot be stacked; serve them one by one")
        super().__init__(config, weights, constants or {})
        self.forward = Pass(config, self.raw)
        for name in ("forecast_unit", "reconstruction_unit"):
            unit = self.constants.get(name, np.ones(config.features))
            if unit.shape != (config.features,) or not (unit >= 0).all():
                raise ConfigError(f"{name}={unit.tolist()} must be {config.features} numbers of at least 0")

    @property
    def history(self) -> int:
        """H = W: a point is forecast from the W before it, and reconstructed from itself and the W - 1 before it."""
        return self.config.window

    def look(self, window: Float64, context: Context) -> list[Float64]:
        """Pass windows, (B, W, F): what the mode has of the forecast after them and their newest point, (B, F) each."""
        if self.config.scaling == "train":
            center, scale = self.constant("center", context), self.constant("scale", context)
            with np.errstate(over="ignore"):  # infinitely far is as far as INPUT_LIMIT
                x = standardise(window, center[:, None], scale[:, None])
        else:
            past, center, scale = normalise(window[:, :-1])
            with np.errstate(over="ignore"):
                x = np.concatenate([past, standardise(window[:, -1], center, scale)[:, None]], axis=1)
        still = self.still_rows(context)
        if still.any():
            x = np.where(still[:, None], np.float32(0), x)
        return [center + scale * y for y in self.run(self.forward, self.forward.packed, [x], context, chunk=CHUNK)]

    def forecast(self, context: Context) -> Float64:
        """What was to be expected of the points from their history, (B, F): as kept, where it is, else computed."""
        kept = np.full((len(context), self.features), np.nan) if context.ahead is None else context.ahead
        unknown: Bool = np.asarray(np.isnan(kept).any(axis=1))
        if not unknown.any():
            return kept
        some, forecast = context.take(unknown), kept.copy()
        forecast[unknown] = np.where(self.still_rows(some), some.history[:, -1], self.look(some.history, some)[0])
        return forecast

    def unit(self, part: str, context: Context) -> Float64:
        """Usual size of the errors of a part of the score, (B, F), in the units of history, > 0."""
        if self.config.scaling == "window":
            return local_spread(context.history, context.usual_step, context.learned)
        size, name = self.constant("scale", context), f"{part}_unit"
        return size * np.maximum(self.constant(name, context), LEAST_UNIT) if name in self.constants else size.copy()


class Forecasting(MTADGAT):
    """The mode that forecasts only; the decoder is not needed."""

    reads_point: ClassVar[bool] = False

    def assess(self, context: Context) -> Assessment:
        """Forecast the points and say how far off they are.

        Raises:
            ValueError: the context has another H or F.
        """
        check_shape(context, self.history, self.features)
        expected, unit = self.forecast(context), self.unit("forecast", context)
        return Assessment(expected, unit, residual(context.value, expected, unit), completion=expected)


class Reconstructing(MTADGAT):
    """The mode that reconstructs only; there is no forecast, so the last value stands for one that did not arrive."""

    reads_point: ClassVar[bool] = True

    def assess(self, context: Context) -> Assessment:
        """Reconstruct the points from the windows that end with them, and say how far off they are.

        Raises:
            ValueError: the context has another H or F.
        """
        check_shape(context, self.history, self.features)
        last = context.history[:, -1]
        (found,) = self.look(_moved_on(context, last), context)
        expected, unit = np.where(self.still_rows(context), last, found), self.unit("reconstruction", context)
        return Assessment(expected, unit, residual(context.value, expected, unit), completion=expected)


class Both(MTADGAT):
    """Forecast and reconstruction. The pass that reconstructs a point forecasts the next one, which is kept."""

    reads_point: ClassVar[bool] = True
    looks_ahead: ClassVar[bool] = True

    def assess(self, context: Context) -> Assessment:
        """Reconstruct the points, and say how far off they are from that and from their forecast.

        The expected value is the one with the least score: between forecast and reconstruction. What their distance
        leaves of the score there is the slack, below 0.

        Raises:
            ValueError: the context has another H or F.
        """
        check_shape(context, self.history, self.features)
        forecast, still, gamma = self.forecast(context), self.still_rows(context), self.config.gamma
        window = _moved_on(context, forecast)
        ahead, point = self.look(window, context)
        ahead, point = np.where(still, window[:, -1], ahead), np.where(still, forecast, point)
        unit = self.unit("forecast", context)
        # With a = 1 / unit² of the forecast and b = γ / unit² of the reconstruction, (1 + γ) s is the parabola
        # a (x - forecast)² + b (x - point)² = (a + b) (x - expected)² + a b / (a + b) (forecast - point)².
        ratio = gamma * np.square(unit / self.unit("reconstruction", context))  # b / a
        share = ratio / (1 + ratio)
        expected = forecast + share * (point - forecast)
        spread = unit * np.sqrt((1 + gamma) / (1 + ratio))
        least = np.square(residual(point, forecast, unit)) * share / (1 + gamma)
        away = residual(context.value, expected, spread)
        error = np.where(np.isnan(context.value), 0.0, np.copysign(np.sqrt(np.square(away) + least), away))
        return Assessment(expected, spread, error, completion=forecast, slack=-least, ahead=ahead)


def _moved_on(context: Context, instead: Float64) -> Float64:
    """The W windows that end with the points, (B, W, F), with other values where none arrived."""
    point = np.where(np.isnan(context.value), instead, context.value)
    return np.concatenate([context.history[:, 1:], point[:, None]], axis=1)


def serve(
    config: MTADGATConfig, weights: Weights, constants: Constants | None = None, *, stacked: bool = False
) -> MTADGAT:
    """The served model of a config's mode."""
    modes = {"forecasting": Forecasting, "reconstructing": Reconstructing, "both": Both}
    return modes[config.mode](config, weights, constants, stacked=stacked)


FAMILY = Family(
    name="mtad_gat",
    title="MTAD-GAT",
    method=(
        "attention over metrics and over time feeds a recurrent network that forecasts the next point and reconstructs "
        "the window; both errors make the score"
    ),
    config=MTADGATConfig,
    shapes=shapes,
    network=MTADGATNetwork,
    serve=serve,
    stackable=False,
    reads_point=lambda config: bool(config.mode != "forecasting"),
    training={"epochs": 8, "batch": 128, "learning_rate": 1e-3, "patience": 3, "windows_per_epoch": 6000},
)
