"""Convolutional variational autoencoder of 28 x 28 images, with five heads on one set of weights.

Source: the network that AWS published for anomaly detection with several served models ("Deploying variational
autoencoders for anomaly detection with TensorFlow Serving on Amazon SageMaker"). It is trained on normal images only;
an image is anomalous whose reconstruction error is above the 99th percentile of that of normal ones. The layers, their
order and their padding are the published ones (183,105 weights): `Network` tells how to carry weights over.

Done otherwise, and why:
- The error is computed from logits, exact at any of them; the published one cuts probabilities at 1e-7.
- The latent is its mean. The published one draws a noise vector at every call, one for the whole batch, and so gives
  the same image another error each time. With `sampled` the noise is drawn per image, from its pixels and a seed.
"""

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from models.base import Bool, Float64
from models.batching import run_padded
from models.errors import ConfigError
from models.family import Weights

Float32 = NDArray[np.float32]

SIDE = 28  # pixels; two convolutions of stride 2 make 7 of them
CODE = 7
CHANNELS = (32, 64)  # of both convolutions
SPREAD = 32  # channels of the image that the decoder starts from
LGVAR_LIMIT = 20.0  # e**20 is far beyond any latent; e**89 is beyond float32
QUANTILE = 99  # percentile of the normal errors
CHUNK = 64  # images at once: their activations are 25 MB

Head = Literal["vae", "encoder_mean", "encoder_lgvar", "encoder_sampler", "decoder"]
HEADS: tuple[Head, ...] = get_args(Head)


@dataclass(frozen=True, slots=True)
class ImageVAEConfig:
    """Shape of the network and where its latent comes from.

    Raises:
        ConfigError: a value is out of its bounds.
    """

    latent: int = 16  # dimensions of z
    sampled: bool = False  # whether `vae` and `errors` decode a sample of the latent, or its mean
    seed: int = 0  # of the noise of the samples

    def __post_init__(self) -> None:
        if not 1 <= self.latent <= 4096:
            raise ConfigError(f"latent={self.latent} must be from 1 to 4096; 16 is usual")
        if self.seed < 0:
            raise ConfigError(f"seed={self.seed} must be at least 0")


@dataclass(frozen=True, slots=True)
class ImageTraining:
    """How to train. The published settings are 10 epochs of 12,584 images, 2,520 steps.

    Raises:
        ConfigError: a value is out of its bounds.
    """

    epochs: int = 10
    batch: int = 50  # images per step
    learning_rate: float = 1e-4  # of Adam
    seed: int = 0  # of the first weights, the order of the images and the latent noise

    def __post_init__(self) -> None:
        for name in ("epochs", "batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 < self.learning_rate < math.inf:
            raise ConfigError(f"learning_rate={self.learning_rate} must be above 0 and finite; 1e-4 is usual")


def shapes(config: ImageVAEConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight, in the order of the layers."""
    first, second = CHANNELS
    flat, latent = CODE * CODE * second, config.latent
    kernels = {
        "conv1": (first, 1, 3, 3),
        "conv2": (second, first, 3, 3),
        "mean": (latent, flat),
        "lgvar": (latent, flat),
        "dense": (CODE * CODE * SPREAD, latent),
        "up1": (SPREAD, second, 3, 3),  # transposed: (in, out, 3, 3)
        "up2": (second, first, 3, 3),
        "out": (first, 1, 3, 3),
    }
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in kernels.items():
        found[f"{name}.weight"] = shape
        found[f"{name}.bias"] = (shape[1] if name in ("up1", "up2", "out") else shape[0],)
    return found


class Codes(NamedTuple):
    """What one pass of the encoder tells of each image, (B, latent) float32 each."""

    mean: Float32
    lgvar: Float32  # log of the variance
    sample: Float32  # mean + exp(lgvar / 2) * noise


class Network(nn.Module):
    """The layers. Channels come first, in images (B, C, 28, 28) as in what is flattened.

    To carry published weights over: a convolution's (3, 3, in, out) becomes (out, in, 3, 3); a transposed one's
    (3, 3, out, in) becomes (in, out, 3, 3); the rows of `mean` and `lgvar` and the columns of `dense` are of (7, 7, C)
    there and of (C, 7, 7) here.
    """

    def __init__(self, config: ImageVAEConfig) -> None:
        super().__init__()
        first, second = CHANNELS
        self.conv1 = nn.Conv2d(1, first, 3, stride=2)
        self.conv2 = nn.Conv2d(first, second, 3, stride=2)
        self.mean = nn.Linear(CODE * CODE * second, config.latent)
        self.lgvar = nn.Linear(CODE * CODE * second, config.latent)
        self.dense = nn.Linear(config.latent, CODE * CODE * SPREAD)
        self.up1 = nn.ConvTranspose2d(SPREAD, second, 3, stride=2)
        self.up2 = nn.ConvTranspose2d(second, first, 3, stride=2)
        self.out = nn.ConvTranspose2d(first, 1, 3, padding=1)
        for layer in self.children():  # as published: uniform of Glorot, and zeros
            nn.init.xavier_uniform_(layer.get_parameter("weight"))
            nn.init.zeros_(layer.get_parameter("bias"))

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the latent, (B, latent) each, of images (B, 28, 28)."""
        # A stride of 2 over an even side: "same" padding is one row below and one column to the right, and none else.
        h = torch.relu(self.conv1(functional.pad(images[:, None], (0, 1, 0, 1))))  # (B, 32, 14, 14)
        h = torch.relu(self.conv2(functional.pad(h, (0, 1, 0, 1)))).flatten(1)  # (B, 64 * 7 * 7)
        return self.mean(h), torch.clamp(self.lgvar(h), -LGVAR_LIMIT, LGVAR_LIMIT)

    def decode(self, z: Tensor) -> Tensor:
        """Logits of the pixels, (B, 28, 28), of latents (B, latent)."""
        h = torch.relu(self.dense(z)).view(-1, SPREAD, CODE, CODE)  # (B, 32, 7, 7)
        # The mirror of the padding above: the last row and column of 2 n + 1 are cropped.
        h = torch.relu(self.up1(h)[:, :, :-1, :-1])  # (B, 64, 14, 14)
        h = torch.relu(self.up2(h)[:, :, :-1, :-1])  # (B, 32, 28, 28)
        logits: Tensor = self.out(h)[:, 0]
        return logits

    def loss(self, images: Tensor) -> Tensor:
        """Negative ELBO of each image, in nats, (B,); the noise comes from torch's global generator.

        KL = sum(exp(lgvar) + mean**2 - 1 - lgvar) / 2, added to the cross entropy summed over the pixels.
        """
        mean, lgvar = self.encode(images)
        logits = self.decode(mean + torch.exp(lgvar / 2) * torch.randn_like(mean))
        entropy = functional.binary_cross_entropy_with_logits(logits, images, reduction="none").sum(dim=(1, 2))
        return entropy + 0.5 * (torch.exp(lgvar) + mean.square() - 1 - lgvar).sum(dim=1)


class ImageVAE:
    """A trained network as it is served. Every answer depends on the same row only, bit for bit.

    Attributes:
        config: shape, and where the latent comes from.
        raw: the weights by name, float32, in the order of `shapes`.
        constants: `threshold`, the error in nats above which an image is anomalous, () float64; infinite before
            `calibrate` has set it.
    """

    family: ClassVar[str] = "image_vae"

    def __init__(
        self, config: ImageVAEConfig, weights: Weights, constants: Mapping[str, Float64] | None = None
    ) -> None:
        """Take weights and constants over.

        Raises:
            ConfigError: a weight is missing, unknown, of another shape or not finite.
        """
        needed = shapes(config)
        if {name: tuple(weight.shape) for name, weight in weights.items()} != needed:
            raise ConfigError(f"the weights are not those of latent={config.latent}: {', '.join(needed)} are needed")
        for name, weight in weights.items():
            if not bool(torch.isfinite(weight).all()):
                raise ConfigError(f"{name} holds a number that is not finite; train the model anew")
        self.config = config
        self.raw = {name: weights[name].detach().to(torch.float32) for name in needed}
        self.constants: dict[str, Float64] = {"threshold": np.array(np.inf), **(constants or {})}
        network = Network(config)
        network.load_state_dict(self.raw)
        self._network = network.eval().requires_grad_(False)

    @property
    def threshold(self) -> float:
        """The error above which an image is anomalous, in nats."""
        return float(self.constants["threshold"])

    @property
    def parameters(self) -> int:
        """The number of weights."""
        return sum(weight.numel() for weight in self.raw.values())

    def encode(self, images: NDArray[np.floating]) -> Codes:
        """All that the encoder says, in one pass.

        Args:
            images: (B, 28, 28), each pixel from 0 to 1.

        Raises:
            ValueError: another shape, or a pixel that is not from 0 to 1.
        """
        pixels = _checked(images)
        mean, lgvar = run_padded(self._network.encode, [pixels], chunk=CHUNK)
        sample = np.asarray(mean + np.exp(lgvar / 2) * self._noise(pixels), np.float32)
        return Codes(mean, lgvar, sample)

    def predict(self, head: Head, instances: NDArray[np.floating]) -> Float32:
        """Answer as one of the five served models does.

        Args:
            head: `vae` turns an image into its reconstruction, `encoder_mean`, `encoder_lgvar` and `encoder_sampler`
                an image into a latent, `decoder` a latent into an image.
            instances: images (B, 28, 28) with pixels from 0 to 1, or latents (B, latent) for `decoder`.

        Returns:
            images (B, 28, 28) with pixels from 0 to 1, or latents (B, latent), float32.

        Raises:
            ValueError: no such head, another shape, or a value that is out of its bounds.
        """
        if head not in HEADS:
            raise ValueError(f"head={head!r} is not one of {', '.join(HEADS)}")
        if head == "decoder":
            return _sigmoid(self._logits(_latents(instances, self.config.latent)))
        codes = self.encode(instances)
        if head == "vae":
            return _sigmoid(self._logits(self._chosen(codes)))
        return {"encoder_mean": codes.mean, "encoder_lgvar": codes.lgvar, "encoder_sampler": codes.sample}[head]

    def errors(self, images: NDArray[np.floating]) -> Float64:
        """Cross entropy of each image and its reconstruction, summed over the pixels, in nats, (B,) float64, >= 0.

        Per pixel x and logit l it is max(l, 0) - l x + log(1 + exp(-|l|)), which no l overflows.

        Raises:
            ValueError: another shape than (B, 28, 28), or a pixel that is not from 0 to 1.
        """
        x = _checked(images).astype(np.float64)
        logits = self._logits(self._chosen(self.encode(images))).astype(np.float64)
        entropy = np.maximum(logits, 0.0) - logits * x + np.log1p(np.exp(-np.abs(logits)))
        total: Float64 = entropy.reshape(len(x), SIDE * SIDE).sum(axis=1)
        return total

    def anomalous(self, images: NDArray[np.floating]) -> Bool:
        """Which images have an error above the threshold, (B,) bool.

        Raises:
            ValueError: as `errors`.
        """
        found: Bool = self.errors(images) > self.threshold
        return found

    def calibrate(self, normal: NDArray[np.floating]) -> None:
        """Set the threshold: the 99th percentile of the errors of normal images, rounded up to whole nats.

        Raises:
            ValueError: there are no images, or as `errors`.
        """
        if not len(normal):
            raise ValueError("no images to set the threshold by; give some hundred normal ones")
        self.constants["threshold"] = np.array(float(math.ceil(np.percentile(self.errors(normal), QUANTILE))))

    def _chosen(self, codes: Codes) -> Float32:
        return codes.sample if self.config.sampled else codes.mean

    def _logits(self, latents: Float32) -> Float32:
        (logits,) = run_padded(lambda z: (self._network.decode(z),), [latents], chunk=CHUNK)
        return logits

    def _noise(self, pixels: Float32) -> Float32:
        """Standard normal noise, (B, latent): the same for the same image, in whatever batch it comes."""
        noise = np.empty((len(pixels), self.config.latent), np.float32)
        for row, image in zip(noise, pixels, strict=True):
            own = np.random.default_rng([self.config.seed, zlib.crc32(image.tobytes())])
            row[:] = own.standard_normal(self.config.latent)
        return noise


def train_images(
    images: NDArray[np.floating], config: ImageVAEConfig | None = None, training: ImageTraining | None = None
) -> ImageVAE:
    """Train on normal images and set the threshold by them.

    Args:
        images: (N, 28, 28), each pixel from 0 to 1, none of them anomalous.
        config: shape; the published one when None.
        training: the same images, settings, machine and number of threads give the same weights.

    Raises:
        ConfigError: the training left the numbers.
        ValueError: no images, or as `ImageVAE.errors`.
    """
    config, training = config or ImageVAEConfig(), training or ImageTraining()
    pixels = torch.from_numpy(_checked(images))
    if not len(pixels):
        raise ValueError("no images to train on")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        network = Network(config)
        optimiser = torch.optim.Adam(network.parameters(), lr=training.learning_rate)
        for epoch in range(1, training.epochs + 1):
            for rows in torch.split(torch.randperm(len(pixels)), training.batch):
                loss = network.loss(pixels[rows]).mean()
                optimiser.zero_grad(set_to_none=True)
                torch.autograd.backward(loss)
                optimiser.step()
            if not math.isfinite(float(loss.detach())):
                raise ConfigError(
                    f"training diverged in epoch {epoch}: use a learning rate below {training.learning_rate:g}"
                )
    model = ImageVAE(config, network.state_dict())
    model.calibrate(images)
    return model


def _checked(images: NDArray[np.floating]) -> Float32:
    if images.ndim != 3 or images.shape[1:] != (SIDE, SIDE):
        raise ValueError(f"images are {images.shape}, and (B, {SIDE}, {SIDE}) is needed")
    if images.size and not (images.min() >= 0 and images.max() <= 1):  # also refuses NaN
        raise ValueError(f"pixels are from {images.min()} to {images.max()}, and 0 to 1 is needed: divide by 255")
    return np.ascontiguousarray(images, dtype=np.float32)


def _latents(latents: NDArray[np.floating], width: int) -> Float32:
    if latents.ndim != 2 or latents.shape[1] != width:
        raise ValueError(f"latents are {latents.shape}, and (B, {width}) is needed")
    if not np.isfinite(latents).all():
        raise ValueError("a latent is not finite")
    return np.ascontiguousarray(latents, dtype=np.float32)


def _sigmoid(logits: Float32) -> Float32:
    # exp of a number that is never positive does not overflow.
    small = np.exp(-np.abs(logits))
    pixels: Float32 = np.where(logits >= 0, 1, small) / (1 + small)
    return pixels.astype(np.float32, copy=False)
