"""Gross outliers among the highest scores of a calibration: what would have been alarms, had there been a threshold."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from models.gpd import IntArray, outlier_limit
from models.risk import FEW

_CLEAN, _CLEAN_SHAPE = 0.01, 0.05  # chance that a clean tail loses a score as an outlier, and the shape of that tail
_CLUSTER_GAP, _CLUSTERS = 8, 2  # points between outliers of one cluster; clusters that may be incidents


def find_outliers(
    peaks: npt.NDArray[np.float32], t: npt.NDArray[np.float32], allowed: IntArray
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float32]]:
    """Return which peaks stand out from the others above t, and the limit that they pass: (K, M), (K,).

    If more stand out than may, they are a habit of the series, and none is an outlier.

    Args:
        peaks: the highest scores; -inf in unused slots, (K, M).
        t: over it lie the excesses that the limit is made of, (K,).
        allowed: how many may stand out, (K,).
    """
    out, cap = _beyond_limit(peaks, t, allowed + 1)
    return out & (out.sum(axis=-1) <= allowed)[:, None], cap


def find_incidents(
    peaks: npt.NDArray[np.float32], place: npt.NDArray[np.float32], held: IntArray, allowed: IntArray
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float32]]:
    """Return which peaks are of incidents, and the limit: (K, M), (K,).

    An incident is more outliers than are allowed singly, up to a quarter of the peaks, in one or two clusters. That a
    tail, however heavy, has its highest scores all in one place is no chance; a habit of the series has many places.

    Args:
        peaks: the highest scores; -inf in unused slots, (K, M).
        place: when each came, counted in scores; any number in unused slots, (K, M).
        held: slots in use, (K,).
        allowed: how many outliers may stand out singly, (K,).
    """
    middle = np.take_along_axis(np.sort(peaks, axis=-1), (peaks.shape[-1] - 1 - held // 2)[:, None], axis=-1)[:, 0]
    out, cap = _beyond_limit(peaks, middle, held // 4)
    far = float(np.finfo(np.float32).max)
    times = np.sort(np.where(out, place, far), axis=-1)
    clusters = (np.diff(times, axis=-1) > _CLUSTER_GAP).sum(axis=-1) + out.all(axis=-1)  # the last gap is to the unused
    some = (out.sum(axis=-1) > allowed) & (clusters <= _CLUSTERS)
    return out & some[:, None], cap


def _beyond_limit(
    peaks: npt.NDArray[np.float32], t: npt.NDArray[np.float32], trim: IntArray
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float32]]:
    excess = np.where(peaks > t[:, None], peaks.astype(np.float64) - t[:, None], 0.0)
    count = np.count_nonzero(excess, axis=-1)
    few = count < FEW
    excess[few] = np.arange(peaks.shape[-1]) < FEW  # a stand-in, so that there is a limit
    count = np.maximum(count, FEW)
    limit = t + outlier_limit(excess, np.clip(trim, 1, count // 2), _CLEAN, shape=_CLEAN_SHAPE)
    # A series that was always forecast exactly but for a spike has scores up to the largest float32, and limits above.
    cap = np.minimum(limit, np.finfo(np.float32).max).astype(np.float32)
    return (peaks > cap[:, None]) & ~few[:, None], cap
