"""From raw values and times to what a network reads, and the size of error that a window leads one to expect."""

import numpy as np
from numpy.typing import NDArray

from models.base import Bool, Float64, Int64

# A standardised input or target beyond it is an outlier of some other KPI or unit: the network sees it as "far away".
# It keeps contaminated training data and a first spike in a live window from throwing the network off its range.
INPUT_LIMIT = 20.0

# A window whose deviation is below this share of its largest value is flat: float32 values carry 2**-24 of it.
FLAT = 2.0**-20
# The floor of a window of zeros; its inverse is still a normal number.
SMALLEST = 1e-100
MINUTE_MS, HOUR_MS, DAY_MS = 60_000, 3_600_000, 86_400_000


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
    with np.errstate(over="ignore"):
        x = np.clip((values - center) / scale, -INPUT_LIMIT, INPUT_LIMIT)
    return x.astype(np.float32, order="C")


def clock(time_ms: Int64) -> Int64:
    """Minute, hour and weekday (0 = Sunday) of times, UTC, (n, 3) int64."""
    day = time_ms // DAY_MS
    # 1970-01-01 was a Thursday.
    return np.stack([time_ms // MINUTE_MS % 60, time_ms // HOUR_MS % 24, (day + 4) % 7], axis=1)
