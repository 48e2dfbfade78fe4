"""Arrays of a row a series, which get more rows while a service runs."""

from __future__ import annotations

import math
import mmap
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

_T = TypeVar("_T", bound=np.generic)

_ROWS_MIN = 64
_OWN_PAGES_BYTES = 1 << 18  # a smaller array is not worth a call to the system
_HUGE_PAGES_BYTES = 4 << 20  # as numpy has it for its own


def enough(rows: int, room: int) -> int:
    """Return for how many rows to make room where there is none for so many: a sixteenth more at least.

    A KPI is 2 kB, so little is kept in reserve; for each new one some sixteen are copied, 32 kB.
    """
    return max(rows, room + room // 16, _ROWS_MIN)


def grown(array: npt.NDArray[_T], rows: int, fresh: float = 0) -> npt.NDArray[_T]:
    """Return an array with room for so many rows: those that are there, and behind them fresh ones.

    A large one has pages of its own, which go back to the system with it. On the heap what arrays have outgrown lies
    between what is still in use: 0.6 kB of each KPI that came to a running worker, as long as that runs.

    Args:
        array: the rows that are there, (R, ...).
        rows: how many there are to be, at least R.
        fresh: what the further rows hold; zeros take no memory before something is written to them.
    """
    larger = _zeros((rows, *array.shape[1:]), array.dtype)
    larger[: len(array)] = array
    if fresh:
        larger[len(array) :] = fresh
    return larger


def _zeros(shape: tuple[int, ...], dtype: np.dtype[_T]) -> npt.NDArray[_T]:
    size = math.prod(shape) * dtype.itemsize
    if size < _OWN_PAGES_BYTES:
        return np.zeros(shape, dtype)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if size >= _HUGE_PAGES_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    own: npt.NDArray[Any] = np.frombuffer(pages, dtype).reshape(shape)
    return own
