"""Figures of a run over labelled points: of the scores, at every threshold, and of the alarms, at the one in force.

Point-adjusted F1 is no evidence: where a single flagged point makes a whole segment a hit, random scores reach 0.97 on
a server of SMD. It is computed only to be shown beside what random scores get on the same labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from stream.columns import BoolArray, Float64Array
from stream.errors import ConfigError
from stream.evaluation.vus import segments

DELAY: Final = 7  # points into a segment by which it must be flagged, as in the KPI challenge
_RANDOM_RUNS: Final = 5


@dataclass(frozen=True, slots=True)
class Confusion:
    """Points that were flagged rightly, wrongly, and not."""

    tp: int = 0
    fp: int = 0
    fn: int = 0

    def __add__(self, other: Confusion) -> Confusion:
        return Confusion(self.tp + other.tp, self.fp + other.fp, self.fn + other.fn)

    @property
    def f1(self) -> float:
        """2 tp / (2 tp + fp + fn); NaN where nothing is anomalous and nothing was flagged."""
        total = 2 * self.tp + self.fp + self.fn
        return 2 * self.tp / total if total else float("nan")


def auc_pr(label: BoolArray, score: Float64Array) -> float:
    """Return the average precision, 0 … 1; NaN without an anomalous point.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    try:
        from sklearn.metrics import average_precision_score
    except ImportError:
        raise ConfigError("AUC-PR needs scikit-learn: pip install 'tocsin[evaluate]'") from None
    return min(float(average_precision_score(label, score)), 1.0) if label.any() else float("nan")  # less rounding


def delayed(label: BoolArray, flagged: BoolArray, delay: int = DELAY) -> Confusion:
    """Count points, each segment as a whole: it is found if one of its first `delay + 1` points was flagged.

    Args:
        label: which points are anomalous, (N,).
        flagged: which ones alarmed, (N,).
        delay: points.
    """
    tp = fn = 0
    for first, last in zip(*(one.tolist() for one in segments(label)), strict=True):
        found = bool(flagged[first : min(first + delay, last) + 1].any())
        tp, fn = tp + found * (last - first + 1), fn + (not found) * (last - first + 1)
    return Confusion(tp, int((flagged & ~label).sum()), fn)


def best_f1(label: BoolArray, score: Float64Array, delay: int | None = None) -> float:
    """Return the highest F1 of any threshold, with segments found as a whole; it reads the labels.

    Args:
        label: which points are anomalous, (N,).
        score: higher is more anomalous, (N,).
        delay: a segment must be found by then, points; None: anywhere in it.
    """
    if not label.any():
        return float("nan")
    adjusted = score.astype(np.float64, copy=True)
    for first, last in zip(*(one.tolist() for one in segments(label)), strict=True):
        end = last if delay is None else min(first + delay, last)
        adjusted[first : last + 1] = score[first : end + 1].max()
    order = np.argsort(-adjusted, kind="stable")
    hits = np.cumsum(label[order])
    count = np.arange(1, len(order) + 1)
    ends = np.append(np.flatnonzero(np.diff(adjusted[order])), len(order) - 1)  # equal scores are flagged together
    return float((2 * hits[ends] / (count[ends] + label.sum())).max())


def random_best_f1(label: BoolArray, delay: int | None = None) -> float:
    """Return the mean of `best_f1` over scores that know nothing: the floor of a figure that reads the labels."""
    rng = np.random.default_rng(0)
    return float(np.mean([best_f1(label, rng.random(len(label)), delay) for _ in range(_RANDOM_RUNS)]))
