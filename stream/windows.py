"""The rolling windows of many series: rings indexed by the position on the grid, one row a series.

Two rings are kept. `seen` is what the model sees: the value as it arrived, or, where it is missing or was flagged as an
anomaly, the completed one. `actual` is what arrived, NaN where nothing did. So a flagged value is not learned, and
still there when a lasting shift is accepted as the new normal.

Values are stored as float32 differences from the series' first value (`origin`): a KPI of 3e9 ± 1e6 keeps its digits.
"""

from __future__ import annotations

import numpy as np

from stream.columns import BoolArray, Float64Array, Int32Array, Int64Array, grown

STEPS_MIN = 8  # changes that a mean of them needs
STEPS_MAX = 10_000  # changes that the mean of a series' steps remembers: a month of 5-minute points


class Windows:
    """Rings of W cells and F features for S series, structure of arrays.

    Attributes:
        newest: cell of the newest value, (S,) int64.
        filled: cells since the window began, at most W; 0 is a series without a value, (S,) int32.
        origin: what the stored values are relative to, (S, F) float64.
        seen: (S, W, F) float32, relative to `origin`.
        actual: (S, W, F) float32, relative to `origin`, NaN where nothing arrived.
        learned: `seen` holds the value that arrived, neither completed nor flagged, (S, W, F) bool.
        step_mean: mean absolute change from one learned value to the next over the life of the series, in which the
            last `STEPS_MAX` changes prevail, (S, F) float64.
        steps: changes that it is the mean of, at most `STEPS_MAX`, (S, F) int32.
    """

    ARRAYS = ("newest", "filled", "origin", "seen", "actual", "learned", "step_mean", "steps")

    def __init__(self, window: int, features: int, capacity: int = 0) -> None:
        self.window = window
        self.features = features
        self.newest: Int64Array = np.zeros(0, np.int64)
        self.filled: Int32Array = np.zeros(0, np.int32)
        self.origin: Float64Array = np.zeros((0, features))
        self.seen = np.zeros((0, window, features), np.float32)
        self.actual = np.zeros((0, window, features), np.float32)
        self.learned: BoolArray = np.zeros((0, window, features), np.bool_)
        self.step_mean: Float64Array = np.zeros((0, features))
        self.steps: Int32Array = np.zeros((0, features), np.int32)
        # Row r is the order in which a ring whose oldest cell stands at position r is read.
        self._turn = (np.arange(window)[:, None] + np.arange(window)) % window
        self.resize(capacity)

    def resize(self, capacity: int) -> None:
        """Give room to `capacity` series; those that are there keep their rows."""
        for name in self.ARRAYS:
            setattr(self, name, grown(getattr(self, name), capacity))

    def copy_rows(self, source: Int32Array, target: Int32Array) -> None:
        """Give the windows of `target` the content of those of `source`."""
        for name in self.ARRAYS:
            array = getattr(self, name)
            array[target] = array[source]

    def reset(self, slot: Int64Array) -> None:
        """Make the windows of these rows fresh ones."""
        for name in self.ARRAYS:
            getattr(self, name)[slot] = 0

    def begin(self, slot: Int32Array, value: Float64Array) -> None:
        """Start the windows of these series anew, relative to their first values, (K, F) without NaN."""
        self.filled[slot] = 0
        self.origin[slot] = value

    def forget_steps(self, slot: Int32Array) -> None:
        """Forget how far these series usually move: they move on another grid now."""
        self.step_mean[slot] = 0.0
        self.steps[slot] = 0

    def history(self, slot: Int32Array, cell: Int64Array) -> tuple[Float64Array, BoolArray]:
        """Return the W cells before `cell` as the model sees them, oldest first.

        Args:
            slot: series, (K,).
            cell: the cell after the newest one of each series, (K,).

        Returns:
            values (K, W, F) float64 in raw units and learned (K, W, F) bool.
        """
        at = slot[:, None].astype(np.intp) * self.window + self._turn[cell % self.window]  # (K, W), flat ring positions
        relative = self.seen.reshape(-1, self.features)[at]  # (K, W, F) float32
        return relative + self.origin[slot][:, None, :], self.learned.reshape(-1, self.features)[at]

    def arrived(self, slot: Int32Array) -> Float64Array:
        """Return the share of each full window that arrived, flagged or not, (K, F)."""
        share: Float64Array = (~np.isnan(self.actual[slot])).mean(axis=1)
        return share

    def append(
        self, slot: Int32Array, cell: Int64Array, seen: Float64Array, actual: Float64Array, learned: BoolArray
    ) -> None:
        """Put a value into the next cell of each series.

        Args:
            slot: series, (K,), each once.
            cell: `newest` + 1, or any cell for a window that begins.
            seen: what the model will see, (K, F); NaN repeats the newest cell (a window that is not full yet has no
                forecast to complete it with), and is the origin in the first one.
            actual: what arrived, (K, F), NaN for nothing.
            learned: whether `seen` is what arrived, (K, F).
        """
        position, before = cell % self.window, (cell - 1) % self.window
        origin, previous = self.origin[slot], self.seen[slot, before]
        relative = (seen - origin).astype(np.float32)
        unknown = np.isnan(relative)
        if unknown.any():  # in a window that begins, what the ring holds is of the one before
            relative = np.where(unknown, np.where((self.filled[slot] > 0)[:, None], previous, 0), relative)
        change = learned & self.learned[slot, before] & (self.filled[slot] > 0)[:, None]  # (K, F)
        steps = np.minimum(self.steps[slot] + change, STEPS_MAX)
        mean = self.step_mean[slot]
        step = np.abs(relative.astype(np.float64) - previous)
        grown = mean + (step - mean) / np.maximum(steps, 1)
        self.step_mean[slot] = np.where(change, grown, mean)
        self.steps[slot] = steps
        self.seen[slot, position] = relative
        self.actual[slot, position] = actual - origin
        self.learned[slot, position] = learned
        self.newest[slot] = cell
        self.filled[slot] = np.minimum(self.filled[slot] + 1, self.window)

    def kept(self, slot: Int32Array, value: Float64Array) -> Float64Array:
        """Return values, (K, F), as the windows would give them back."""
        origin = self.origin[slot]
        return (value - origin).astype(np.float32) + origin

    def inside(self, slot: Int32Array, cell: Int64Array) -> BoolArray:
        """Say of each cell whether the window holds it, (K,)."""
        behind = self.newest[slot] - cell
        return (behind >= 0) & (behind < self.filled[slot])

    def fill(self, slot: Int32Array, cell: Int64Array, value: Float64Array) -> None:
        """Put values that come late or once more into cells that the window holds, (K, F); NaN leaves what is there.

        A value that was flagged keeps what the model sees; only what arrived is replaced.
        """
        position = cell % self.window
        arrived = ~np.isnan(value)
        relative = (value - self.origin[slot]).astype(np.float32)
        before = self.actual[slot, position]
        flagged = ~self.learned[slot, position] & ~np.isnan(before)
        learn = arrived & ~flagged
        self.actual[slot, position] = np.where(arrived, relative, before)
        self.seen[slot, position] = np.where(learn, relative, self.seen[slot, position])
        self.learned[slot, position] |= learn

    def usual_step(self, slot: Int32Array) -> Float64Array:
        """Return the mean absolute change from point to point, (K, F); NaN for fewer than `STEPS_MIN` changes."""
        return np.where(self.steps[slot] >= STEPS_MIN, self.step_mean[slot], np.nan)

    def accept_actual(self, slot: Int32Array) -> None:
        """Make what arrived what the model sees: the values flagged so far are the new normal."""
        arrived = ~np.isnan(self.actual[slot])  # (K, W, F)
        self.seen[slot] = np.where(arrived, self.actual[slot], self.seen[slot])
        self.learned[slot] |= arrived
