"""VUS-PR: the area under the precision-recall curve of ranges, averaged over how far a label's edges reach.

Labels begin and end somewhat arbitrarily, so around each labelled segment stand slopes of a width that is varied from 0
to a maximum, and the areas are averaged: a score that is high just beside a segment is neither right nor wrong.

Computed here, and not by a library, since the two that define it (`vus` 0.0.6, `TSB-AD` 1.5) bring TensorFlow or an
old numpy with them, and `aeon` has another definition. It is that of TSB-AD (Paparrizos et al., PVLDB 15, 2022, and
NeurIPS 2024), whose own values on 36 cases are those of tests/unit/test_metrics.py; instead of going through all
points for every pair of width and threshold, one sort serves them all.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from stream.columns import BoolArray, Float64Array, Int64Array

THRESHOLDS: Final = 250
PERIOD_ELSE: Final = 125  # where a series shows no period
_PERIOD_BASE, _PERIOD_MAX, _PERIOD_POINTS, _LAGS = 3, 300, 20_000, 400


def vus_pr(label: BoolArray, score: Float64Array, width: int) -> float:
    """Return the volume under the precision-recall surface, 0 … 1; NaN without an anomalous point.

    Args:
        label: which points are anomalous, (N,).
        score: higher is more anomalous, (N,), finite.
        width: the widest slopes reach `width // 2` points beyond a segment's ends.
    """
    if not label.any():
        return float("nan")
    first, last = segments(label)
    order = np.argsort(-score, kind="stable")
    ranked = score[order]
    steps = np.linspace(0, len(score) - 1, THRESHOLDS).astype(np.int64)
    threshold = ranked[steps]
    flagged = np.searchsorted(-ranked, -threshold, side="right")  # points with at least that score, (T,)
    areas = np.empty(width + 1)
    positive = float(label.sum())
    for reach in range(width + 1):
        extended = _extended(label, first, last, reach)
        hit = np.concatenate(([0.0], np.cumsum(extended[order])))[flagged]  # (T,)
        inside = np.concatenate(([0.0], np.cumsum(np.where(label, 0.0, extended)[order])))[flagged]
        # The slopes count as positive only as far as they were flagged.
        recall = np.minimum(hit / (positive + inside / 2.0), 1.0)
        highest = np.array([score[a : b + 1].max() for a, b in _reaching(first, last, reach, len(label))])
        recall *= (highest[None, :] >= threshold[:, None]).mean(axis=1)
        precision = hit / flagged
        areas[reach] = (np.diff(recall, prepend=0.0) * precision).sum()
    return float(areas.mean())


def segments(label: BoolArray) -> tuple[Int64Array, Int64Array]:
    """Return the first and the last point of each run of anomalous points, (K,) each."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], label, [False]))))
    return edges[::2], edges[1::2] - 1


def period(values: Float64Array) -> int:
    """Return the period of a series, points: the lag of the highest peak of its autocorrelation; 125 without one.

    It is the width that TSB-AD gives VUS.

    Args:
        values: (N,), finite; the first 20,000 count.
    """
    x = values[:_PERIOD_POINTS] - values[:_PERIOD_POINTS].mean()
    power = float(x @ x)
    if power <= 0 or len(x) <= _PERIOD_BASE + 2:
        return PERIOD_ELSE
    lags = min(_LAGS, len(x) - 1)
    spectrum = np.fft.rfft(x, 2 * len(x))
    correlation = np.fft.irfft(spectrum * spectrum.conj())[_PERIOD_BASE : lags + 1] / power
    peak = np.flatnonzero((correlation[1:-1] > correlation[:-2]) & (correlation[1:-1] > correlation[2:])) + 1
    if not len(peak):
        return PERIOD_ELSE
    highest = int(peak[np.argmax(correlation[peak])])
    return highest + _PERIOD_BASE if _PERIOD_BASE <= highest <= _PERIOD_MAX else PERIOD_ELSE


def _extended(label: BoolArray, first: Int64Array, last: Int64Array, reach: int) -> Float64Array:
    """Return labels with slopes, (N,) in 0 … 1: sqrt(1 - d / reach) at distance d up to reach // 2."""
    extended = label.astype(np.float64)
    half = reach // 2
    for a, b in zip(first.tolist(), last.tolist(), strict=True):
        behind = np.arange(b + 1, min(b + half + 1, len(label)))
        extended[behind] += np.sqrt(1.0 - (behind - b) / max(reach, 1))
        before = np.arange(max(a - half, 0), a)
        extended[before] += np.sqrt(1.0 - (a - before) / max(reach, 1))
    return np.minimum(extended, 1.0)


def _reaching(first: Int64Array, last: Int64Array, reach: int, n: int) -> list[tuple[int, int]]:
    """Return the segments with their slopes; those that touch are one."""
    half, found = reach // 2, list[tuple[int, int]]()
    begin = max(int(first[0]) - half, 0)
    for end, after in zip(last[:-1].tolist(), first[1:].tolist(), strict=True):
        if end + half < after - half:
            found.append((begin, end + half))
            begin = after - half
    return [*found, (begin, min(int(last[-1]) + half, n - 1))]
