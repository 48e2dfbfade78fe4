"""The rolling windows of many series: rings indexed by the position on the grid, one row a series.

What the model sees is kept: the value as it arrived, or, where it is missing or was flagged as an anomaly, the
completed one. A cell is

    learned     it holds the value that arrived
    flagged     it does not, and what arrived is withheld (`withheld`): not learned, and still there when a lasting
                shift is accepted as the new normal
    missing     nothing arrived

Values are stored as float32 differences from the series' first value (`origin`): a KPI of 3e9 ± 1e6 keeps its digits.
"""

from __future__ import annotations

import numpy as np

from models.arrays import grown
from stream.columns import BoolArray, Float32Array, Float64Array, Int8Array, Int32Array, Int64Array
from stream.withheld import Withheld, unpacked

STEPS_MIN = 8  # changes that a mean of them needs
STEPS_MAX = 10_000  # changes that the mean of a series' steps remembers: a month of 5-minute points


class Windows:
    """Rings of W cells and F features for S series, structure of arrays.

    Attributes:
        newest: cell of the newest value, (S,) int64.
        filled: cells since the window began, at most W; 0 is a series without a value, (S,) int32.
        origin: what the stored values are relative to, (S, F) float64.
        seen: (S, W, F) float32, relative to `origin`.
        learned_bits: a bit a cell, set where it is learned, (S, F, (W + 7) // 8) uint8.
        withheld: what arrived of the cells that are flagged, relative to `origin`.
        step_mean: mean absolute change from one learned value to the next over the life of the series, in which the
            last `STEPS_MAX` changes prevail, (S, F) float64.
        steps: changes that it is the mean of, at most `STEPS_MAX`, (S, F) int32.
    """

    ARRAYS = ("newest", "filled", "origin", "seen", "learned_bits", "step_mean", "steps")

    def __init__(self, window: int, features: int, capacity: int = 0) -> None:
        self.window = window
        self.features = features
        self.newest: Int64Array = np.zeros(0, np.int64)
        self.filled: Int32Array = np.zeros(0, np.int32)
        self.origin: Float64Array = np.zeros((0, features))
        self.seen = np.zeros((0, window, features), np.float32)
        self.learned_bits: Int8Array = np.zeros((0, features, (window + 7) // 8), np.uint8)
        self.step_mean: Float64Array = np.zeros((0, features))
        self.steps: Int32Array = np.zeros((0, features), np.int32)
        self.withheld = Withheld(window, features)
        self._all_learned = np.packbits(np.ones(window, np.bool_))
        # Row r is the order in which a ring whose oldest cell stands at position r is read.
        self._turn = (np.arange(window)[:, None] + np.arange(window)) % window
        self.resize(capacity)

    def resize(self, capacity: int) -> None:
        """Give room to `capacity` series; those that are there keep their rows."""
        for name in self.ARRAYS:
            setattr(self, name, grown(getattr(self, name), capacity))
        self.withheld.resize(capacity)

    def copy_rows(self, source: Int32Array, target: Int32Array) -> None:
        """Give the windows of `target` the content of those of `source`."""
        for name in self.ARRAYS:
            array = getattr(self, name)
            array[target] = array[source]
        self.withheld.copy_rows(source, target)

    def reset(self, slot: Int64Array) -> None:
        """Make the windows of these rows fresh ones."""
        self.withheld.release(slot)
        for name in self.ARRAYS:
            getattr(self, name)[slot] = 0

    def begin(self, slot: Int32Array, value: Float64Array) -> None:
        """Start the windows of these series anew, relative to their first values, (K, F) without NaN."""
        self.empty(slot)
        self.origin[slot] = value

    def empty(self, slot: Int32Array) -> None:
        """Forget the values of these series; what a ring holds from here on is of no meaning until it is full."""
        self.filled[slot] = 0
        self.withheld.release(slot)

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
        relative = self.seen.reshape(-1, self.features).take(at, axis=0)  # (K, W, F) float32
        learned = np.ones(relative.shape, np.bool_)
        odd = np.flatnonzero((self.learned_bits[slot] != self._all_learned).any(axis=(1, 2)))
        if len(odd):
            rings = self.learned(slot[odd]).reshape(-1, self.features)
            at = np.arange(0, len(rings), self.window)[:, None] + self._turn[cell[odd] % self.window]
            learned[odd] = rings.take(at, axis=0)
        return relative + self.origin[slot][:, None, :], learned

    def learned(self, slot: Int32Array) -> BoolArray:
        """Return which cells are learned, in the order of the rings, (K, W, F)."""
        return unpacked(self.learned_bits[slot], self.window).swapaxes(1, 2)

    def actual(self, slot: Int32Array) -> Float32Array:
        """Return what arrived, learned or flagged, in the order of the rings, relative to `origin`.

        Returns:
            (K, W, F), NaN where nothing arrived; only of the cells that a window holds it has a meaning.
        """
        return np.where(self.learned(slot), self.seen[slot], self.withheld.rings(slot))

    def actual_at(self, slot: Int32Array, cell: Int64Array) -> Float32Array:
        """Return what arrived for one cell that each window holds, (K, F), relative to `origin`, NaN for nothing."""
        position = cell % self.window
        return np.where(self._learned_at(slot, cell), self.seen[slot, position], self.withheld.at(slot, position))

    def arrived(self, slot: Int32Array) -> Float64Array:
        """Return the share of each full window that arrived, flagged or not, (K, F)."""
        share: Float64Array = (self.learned(slot) | ~np.isnan(self.withheld.rings(slot))).mean(axis=1)
        return share

    def _bit(self, cell: Int64Array) -> tuple[Int64Array, Int8Array]:
        """Return in which byte of `learned_bits` cells are, (K,), and as which bit of it, (K, 1)."""
        position = cell % self.window
        return position >> 3, (128 >> (position & 7)).astype(np.uint8)[:, None]

    def _learned_at(self, slot: Int32Array, cell: Int64Array) -> BoolArray:
        byte, bit = self._bit(cell)
        learned: BoolArray = (self.learned_bits[slot, :, byte] & bit) > 0
        return learned

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
            learned: whether `seen` is what arrived, (K, F); what arrived besides is withheld.
        """
        position, before = cell % self.window, (cell - 1) % self.window
        origin, previous = self.origin[slot], self.seen[slot, before]
        relative = (seen - origin).astype(np.float32)
        unknown = np.isnan(relative)
        if unknown.any():  # in a window that begins, what the ring holds is of the one before
            relative = np.where(unknown, np.where((self.filled[slot] > 0)[:, None], previous, 0), relative)
        change = learned & self._learned_at(slot, cell - 1) & (self.filled[slot] > 0)[:, None]  # (K, F)
        steps = np.minimum(self.steps[slot] + change, STEPS_MAX)
        mean = self.step_mean[slot]
        step = np.abs(relative.astype(np.float64) - previous)
        grown = mean + (step - mean) / np.maximum(steps, 1)
        self.step_mean[slot] = np.where(change, grown, mean)
        self.steps[slot] = steps
        self.seen[slot, position] = relative
        byte, bit = self._bit(cell)
        bits = self.learned_bits[slot, :, byte]
        self.learned_bits[slot, :, byte] = np.where(learned, bits | bit, bits & ~bit)
        withheld = ~learned & ~np.isnan(actual)
        if self.withheld.lent or withheld.any():
            self.withheld.put(slot, position, np.where(withheld, actual - origin, np.nan).astype(np.float32))
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
        flagged = ~np.isnan(self.withheld.at(slot, position))
        learn = arrived & ~flagged
        self.withheld.replace(slot, position, np.where(flagged, relative, np.float32(np.nan)))
        self.seen[slot, position] = np.where(learn, relative, self.seen[slot, position])
        byte, bit = self._bit(cell)  # several cells of a series may share a byte
        feature = np.arange(self.features)
        np.bitwise_or.at(self.learned_bits, (slot[:, None], feature, byte[:, None]), np.where(learn, bit, np.uint8(0)))

    def usual_step(self, slot: Int32Array) -> Float64Array:
        """Return the mean absolute change from point to point, (K, F); NaN for fewer than `STEPS_MIN` changes."""
        return np.where(self.steps[slot] >= STEPS_MIN, self.step_mean[slot], np.nan)

    def accept_actual(self, slot: Int32Array) -> None:
        """Make what arrived what the model sees: the values flagged so far are the new normal."""
        slot = slot[self.withheld.row[slot] > 0]
        if not len(slot):
            return
        withheld = self.withheld.rings(slot)
        arrived = ~np.isnan(withheld)  # (K, W, F)
        self.seen[slot] = np.where(arrived, withheld, self.seen[slot])
        self.learned_bits[slot] |= np.packbits(arrived.swapaxes(1, 2), axis=2)
        self.withheld.release(slot)
