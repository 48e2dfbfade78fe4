"""Values that arrived and were flagged: what the model is kept from seeing, beside the windows that it sees.

Few series have any at a time. Those are lent a ring each, for as long as one of the values lies in their window.

As bytes the values of a ring are a bit a cell, feature by feature, which says where there is one, and behind the bits
the values in the same order: less than a ring of its own however many there are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from models.arrays import grown
from stream.columns import AnyArray, BoolArray, Float32Array, Int32Array, Int64Array

_SPARE = 64  # rings that may lie idle


class Withheld:
    """Rings of W cells and F features for those of S series that need one.

    Attributes:
        row: the ring of each series, (S,) int32; 0 of one that has none.
        ring: (R, W, F) float32, NaN where nothing is withheld. Ring 0 is nobody's, and stays empty, as are idle ones.
    """

    def __init__(self, window: int, features: int) -> None:
        self.row: Int32Array = np.zeros(0, np.int32)
        self.ring: Float32Array = np.full((1, window, features), np.nan, np.float32)
        self._idle: list[int] = []

    def resize(self, capacity: int) -> None:
        """Give room to `capacity` series; those that are there keep their rings."""
        self.row = grown(self.row, capacity)

    @property
    def lent(self) -> int:
        """How many series have a ring."""
        return len(self.ring) - 1 - len(self._idle)

    def rings(self, slot: Int32Array) -> Float32Array:
        """Return what is withheld of series in the order of their rings, (K, W, F), NaN where nothing is."""
        return self.ring[self.row[slot]]

    def at(self, slot: Int32Array, position: Int64Array) -> Float32Array:
        """Return what is withheld at one position of each series, (K, F), NaN where nothing is."""
        return self.ring[self.row[slot], position]

    def put(self, slot: Int32Array, position: Int64Array, value: Float32Array) -> None:
        """Set what is withheld at one position of each series, (K, F), NaN for nothing; each series comes once."""
        some: BoolArray = np.asarray((~np.isnan(value)).any(axis=1))
        self._lend(slot[some & (self.row[slot] == 0)])
        own = np.flatnonzero(self.row[slot])
        row, at, value = self.row[slot[own]], position[own], value[own]
        emptied = ~some[own] & ~np.isnan(self.ring[row, at]).all(axis=1)
        self.ring[row, at] = value
        if emptied.any():
            ended = np.isnan(self.ring[row[emptied]]).all(axis=(1, 2))
            self.release(slot[own[emptied][ended]])

    def replace(self, slot: Int32Array, position: Int64Array, value: Float32Array) -> None:
        """Give cells, (K,), other values where some are withheld; NaN, (K, F), leaves what is there."""
        some = np.flatnonzero(~np.isnan(value).all(axis=1))
        row, at, value = self.row[slot[some]], position[some], value[some]
        self.ring[row, at] = np.where(np.isnan(value), self.ring[row, at], value)

    def release(self, slot: Int32Array | Int64Array) -> None:
        """Withhold nothing more of these series, (K,) without repeats."""
        row = self.row[slot]
        row = row[row > 0]
        if not len(row):
            return
        self.ring[row] = np.nan
        self.row[slot] = 0
        self._idle += row.tolist()
        if len(self._idle) > max(_SPARE, 3 * self.lent):  # what many shared is over
            series = np.flatnonzero(self.row)
            self.ring = np.concatenate([self.ring[:1], self.ring[self.row[series]]])
            self.row[series] = np.arange(1, len(self.ring))
            self._idle = []

    def restore(self, slot: Int32Array, rings: Float32Array) -> None:
        """Set all that is withheld of series, (K, W, F), some of each."""
        self.release(slot)
        self._lend(slot)
        self.ring[self.row[slot]] = rings

    def copy_rows(self, source: Int32Array, target: Int32Array) -> None:
        """Withhold of the series `target` what is withheld of those of `source`."""
        self.release(target)
        some = self.row[source] > 0
        if some.any():
            self.restore(target[some], self.rings(source[some]))

    def _lend(self, slot: Int32Array) -> None:
        """Give rings to series that have none."""
        count, rings = len(slot), len(self.ring)
        if not count:
            return
        if count > len(self._idle):
            more = max(count - len(self._idle), rings // 4)
            self.ring = grown(self.ring, rings + more, np.nan)
            self._idle += range(rings, rings + more)
        self.row[slot] = self._idle[-count:]
        del self._idle[-count:]


def to_bytes(rings: Float32Array) -> list[bytes]:
    """Return what is withheld of each series, (K, W, F), as bytes."""
    rings = rings.swapaxes(1, 2)  # (K, F, W)
    there = ~np.isnan(rings)
    bits = np.packbits(there, axis=2)  # (K, F, (W + 7) // 8)
    where, values = bits.tobytes(), rings[there].astype("<f4").tobytes()
    size, ends = bits.shape[1] * bits.shape[2], (4 * np.cumsum(there.sum(axis=(1, 2)))).tolist()
    return [
        where[i * size : (i + 1) * size] + values[begin:end]
        for i, (begin, end) in enumerate(zip([0, *ends], ends, strict=False))
    ]


def from_bytes(parts: Sequence[bytes], window: int, features: int) -> tuple[Float32Array, BoolArray]:
    """Return what `to_bytes` was given, (K, W, F), and which parts can be of such windows, (K,)."""
    width = (window + 7) // 8
    size = features * width
    length = np.array([len(part) for part in parts], np.int64)
    bits = np.frombuffer(b"".join(part[:size].ljust(size, b"\0") for part in parts), np.uint8)
    bits = bits.reshape(len(parts), features, width)
    there = unpacked(bits, window)  # (K, F, W)
    good: BoolArray = length == size + 4 * there.sum(axis=(1, 2))
    good &= there.any(axis=(1, 2)) & ~padded(bits, window)
    there[~good] = False
    rings = np.full(there.shape, np.nan, np.float32)
    rings[there] = np.frombuffer(
        b"".join(part[size:] for part, fine in zip(parts, good.tolist(), strict=True) if fine), "<f4"
    )
    good &= ~(np.isnan(rings) & there).any(axis=(1, 2))
    return rings.swapaxes(1, 2), good


def unpacked(bits: AnyArray, window: int) -> BoolArray:
    """Return bits, (..., (W + 7) // 8), as (..., W) bool."""
    return np.unpackbits(bits, axis=-1, count=window).view(np.bool_)


def padded(bits: AnyArray, window: int) -> BoolArray:
    """Say of bits, (K, F, (W + 7) // 8), whether some are set behind the last cell, (K,)."""
    behind = bits[..., -1] & (0xFF >> (window - 1) % 8 + 1)
    return np.asarray(behind.any(axis=-1))
