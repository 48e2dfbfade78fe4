"""The score of the Numenta Anomaly Benchmark: early detections within windows are worth most, the rest costs.

A file's labels are windows of rows. Of each window the earliest detection in it counts, 1 at its beginning and close to
0 at its end; a window without one costs 1. A detection outside all windows costs 0.11 (standard profile), less shortly
behind a window. The first 15 % of the rows (750 at most) are the probationary period: detections in it are not looked
at. The sum over all files is scaled so that 0 is a detector that says nothing, and 100 one that detects each window at
its first row. Chance is not 0: a detection every 600 rows gets 31 on the bench.

Source: Lavin and Ahmad, "Evaluating Real-time Anomaly Detection Algorithms", ICMLA 2015; rows and their positions as
the scorer of NAB 1.1 counts them. Pinned by the published results of its windowed Gaussian (tests/unit/test_nab.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from stream.columns import BoolArray, Float64Array, Int64Array
from stream.errors import InputError

PROBATION_SHARE: Final = 0.15
PROBATION_ROWS_MAX: Final = 750
_FAR: Final = 3.0  # window lengths behind a window at which a false detection costs all it can


class Profile(NamedTuple):
    """What a window detected at its first row, a false detection and a missed window are worth."""

    detected: float
    false: float
    missed: float


PROFILES: Final[Mapping[str, Profile]] = {
    "standard": Profile(1.0, 0.11, 1.0),
    "reward_low_FP_rate": Profile(1.0, 0.22, 1.0),
    "reward_low_FN_rate": Profile(1.0, 0.11, 2.0),
}
STANDARD: Final = PROFILES["standard"]


@dataclass(frozen=True, slots=True)
class FileScore:
    """What the detections in one file are worth.

    Attributes:
        raw: the sum over its windows and false detections.
        windows: that are scored; one within the probationary period is not.
        caught: of them.
        false: detections outside all windows.
    """

    raw: float
    windows: int
    caught: int
    false: int


def sigmoid(position: Float64Array) -> Float64Array:
    """Return what a detection is worth there: 0.987 at -1 (the window begins), 0 at 0 (it ends), below 0 behind it."""
    scaled: Float64Array = 2.0 / (1.0 + np.exp(5.0 * np.minimum(position, _FAR))) - 1.0
    return np.where(position >= _FAR, -1.0, scaled)


def probation(rows: int) -> int:
    """Return how many rows at the beginning of a file are not scored."""
    return min(int(PROBATION_SHARE * rows), PROBATION_ROWS_MAX)


def worth(rows: int, windows: Int64Array, profile: Profile = STANDARD) -> tuple[Float64Array, Int64Array]:
    """Return what a detection is worth at each row, and the window that the row lies in.

    Args:
        rows: N, of the file.
        windows: first and last row of each window, (K, 2), sorted, not overlapping.
        profile: the weights.

    Returns:
        worth (N,) float64, and the window (N,) int64, -1 outside all.
    """
    position, window = np.full(rows, _FAR), np.full(rows, -1)
    ends = [*windows[1:, 0].tolist(), rows]
    for k, (first, last) in enumerate(windows.tolist()):
        width = last - first + 1
        position[first : last + 1] = -(last - np.arange(first, last + 1) + 1) / width
        window[first : last + 1] = k
        behind = np.arange(last + 1, ends[k])
        position[behind] = (behind - last) / max(width - 1, 1)
    value = sigmoid(position)
    best = float(sigmoid(np.array([-1.0]))[0])
    return np.where(window >= 0, value * profile.detected / best, value * profile.false), window


def score_file(detections: Int64Array, rows: int, windows: Int64Array, profile: Profile = STANDARD) -> FileScore:
    """Score the detections in one file.

    Args:
        detections: rows, (D,), in any order; one of a row counts once.
        rows: of the file.
        windows: first and last row of each window, (K, 2), sorted, not overlapping.
        profile: the weights.
    """
    value, window = worth(rows, windows, profile)
    scored = np.flatnonzero(windows[:, 1] >= probation(rows)) if len(windows) else np.zeros(0, np.int64)
    at = np.unique(detections[detections >= probation(rows)])
    false = at[window[at] < 0]
    raw, caught = float(value[false].sum()), 0
    for k in scored.tolist():
        inside = at[window[at] == k]
        caught += bool(len(inside))
        raw += float(value[inside].max()) if len(inside) else -profile.missed
    return FileScore(raw, len(scored), caught, len(false))


def normalised(files: Iterable[FileScore], profile: Profile = STANDARD) -> float:
    """Return the score of a corpus: 0 of a detector that says nothing, 100 of a perfect one; NaN without windows."""
    files = list(files)
    windows = sum(one.windows for one in files)
    if not windows:
        return float("nan")
    nothing, perfect = -profile.missed * windows, profile.detected * windows
    return 100.0 * (sum(one.raw for one in files) - nothing) / (perfect - nothing)


@dataclass(frozen=True, slots=True)
class Labels:
    """The windows of a corpus, by the path of the file in it."""

    windows: Mapping[str, Sequence[tuple[int, int]]]  # ms since 1970, first and last

    @classmethod
    def read(cls, path: Path) -> Labels:
        """Read `combined_windows.json`; times have no zone and are taken for UTC, as those of the data.

        Raises:
            InputError: it cannot be read, or is something else.
        """
        try:
            content = json.loads(path.read_bytes())
            windows = {
                name: [(_ms(first), _ms(last)) for first, last in sorted(pairs)] for name, pairs in content.items()
            }
        except OSError as e:
            raise InputError(f"{path}: cannot be read: {e.strerror}") from None
        except (ValueError, TypeError, AttributeError) as e:
            raise InputError(f"{path}: not the windows of NAB, a list of [first, last] for each file: {e}") from None
        return cls(windows)

    @classmethod
    def beside(cls, file: Path) -> Labels | None:
        """Return the labels of the corpus that a file lies in, `labels/` beside the `data/` above it; None without."""
        for folder in file.resolve().parents:
            labels = folder.parent / "labels" / "combined_windows.json"
            if folder.name == "data" and labels.is_file():
                return cls.read(labels)
        return None

    def name_of(self, file: Path) -> str | None:
        """Return how the corpus names a file, `category/name.csv`; None if it is none of its files."""
        name = f"{file.resolve().parent.name}/{file.name.removesuffix('.gz')}"
        return name if name in self.windows else None

    def rows(self, name: str, timestamp_ms: Int64Array) -> Int64Array:
        """Return the windows of a file as first and last rows, (K, 2).

        Args:
            name: of the file, as the corpus names it.
            timestamp_ms: of its rows, in the order of the file, (N,); the first of equal ones stands for them.
        """
        pairs = self.windows[name]
        found = [
            (np.flatnonzero(timestamp_ms == first)[:1], np.flatnonzero(timestamp_ms == last)[:1])
            for first, last in pairs
        ]
        if any(len(first) != 1 or len(last) != 1 for first, last in found):
            raise InputError(f"{name}: a window begins or ends at no row of the file; is it that of the corpus?")
        return np.array([(int(first[0]), int(last[0])) for first, last in found], np.int64).reshape(-1, 2)


def inside(rows: int, windows: Int64Array) -> BoolArray:
    """Say of each row of a file whether it lies in a window, (N,)."""
    within: BoolArray = worth(rows, windows)[1] >= 0
    return within


def _ms(text: str) -> int:
    time = datetime.fromisoformat(text)
    return round((time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp() * 1000)
