"""Forward passes whose every row is the same bits in any batch.

Matrix kernels choose their order of summation by shape, so one window alone and the same window among 255 others can
differ in the last bits, and a score at the edge of its threshold then flips between a live run and its replay.
Batches of 8, 16, 32, 64, 128 and 256 rows were measured to agree bit for bit, at every position and with any
neighbours; 1, 2, 3, 31 and 63 were not. So a batch is cut into chunks of `chunk` rows, and the rest is padded to the
next of those sizes. `tests/unit/test_batching.py` holds every model family to it.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SIZES = (8, 16, 32, 64, 128, 256)  # rows; each agrees with every other bit for bit


def run_padded(
    fn: Callable[[Tensor], Tensor], x: NDArray[np.float32], *, chunk: int = SIZES[-1]
) -> NDArray[np.float32]:
    """Run `fn` over the rows of x in batches of `SIZES` only.

    Args:
        fn: maps (n, ...) float32 to (n, ...) float32, row by row, for n in `SIZES`. It may return a view of its input.
        x: the rows, (N, ...) float32; N = 0 is allowed.
        chunk: rows of a full batch, one of `SIZES`; changes the speed, never the result.

    Returns:
        fn's rows, (N, ...) float32. A row depends on the same row of x only.

    Raises:
        ValueError: chunk is not one of `SIZES`.
    """
    if chunk not in SIZES:
        raise ValueError(f"chunk={chunk} is not one of {SIZES}: other sizes may change the last bits of a row")
    n = len(x)
    # Copied into torch's own memory: it is aligned alike in every call, and kernels may sum by alignment too.
    buffer = torch.zeros((min(chunk, padded_size(n)), *x.shape[1:]), dtype=torch.float32)
    rows = buffer.numpy()
    parts: list[NDArray[np.float32]] = []
    with torch.inference_mode():
        for start in range(0, max(n, 1), chunk):  # n = 0 runs one batch of zeros, for the shape of the result
            taken = min(chunk, n - start)
            size = min(chunk, padded_size(taken))
            rows[:taken] = x[start : start + taken]
            rows[taken:size] = 0.0
            parts.append(fn(buffer[:size]).numpy()[:taken].copy())
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def padded_size(rows: int) -> int:
    """The smallest of `SIZES` that holds the rows, or the largest when none does."""
    return next((size for size in SIZES if size >= rows), SIZES[-1])
