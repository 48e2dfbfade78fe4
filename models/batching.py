"""Forward passes whose every row is the same bits in any batch.

Matrix kernels choose their order of summation by shape, so one window alone and the same window among 255 others can
differ in the last bits, and a score at the edge of its threshold then flips between a live run and its replay.
Batches of 8, 16, 32, 64, 128 and 256 rows were measured to agree bit for bit, at every position and with any
neighbours; 1, 2, 3, 31 and 63 were not. So a batch is cut into chunks of `chunk` rows, and the rest is padded to the
next of those sizes. `tests/unit/test_batching.py` holds every model family to it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SIZES = (8, 16, 32, 64, 128, 256)  # rows; each agrees with every other bit for bit


def run_padded(
    fn: Callable[..., tuple[Tensor, ...]], inputs: Sequence[NDArray[Any]], *, chunk: int = SIZES[-1]
) -> tuple[NDArray[np.float32], ...]:
    """Run `fn` over the rows of some arrays in batches of `SIZES` only.

    Args:
        fn: takes a tensor for each input, (n, ...), and returns a tuple of (n, ...) float32, row by row, for n in
            `SIZES`. It may return views of its inputs. Rows of padding are zeros, or False.
        inputs: arrays of N rows each, (N, ...) of any type that torch has; N = 0 is allowed.
        chunk: rows of a full batch, one of `SIZES`; changes the speed, never the result.

    Returns:
        fn's rows, (N, ...) float32 each. A row depends on the same row of the inputs only.

    Raises:
        ValueError: chunk is not one of `SIZES`.
    """
    if chunk not in SIZES:
        raise ValueError(f"chunk={chunk} is not one of {SIZES}: other sizes may change the last bits of a row")
    n = len(inputs[0])
    # Copied into torch's own memory: it is aligned alike in every call, and kernels may sum by alignment too.
    most = min(chunk, padded_size(n))
    buffers = [torch.zeros((most, *x.shape[1:]), dtype=torch.from_numpy(x[:0]).dtype) for x in inputs]
    rows = [buffer.numpy() for buffer in buffers]
    parts: list[tuple[NDArray[np.float32], ...]] = []
    with torch.inference_mode():
        for start in range(0, max(n, 1), chunk):  # n = 0 runs one batch of zeros, for the shape of the result
            taken = min(chunk, n - start)
            size = min(chunk, padded_size(taken))
            for row, x in zip(rows, inputs, strict=True):
                row[:taken] = x[start : start + taken]
                row[taken:size] = 0
            parts.append(tuple(y.numpy()[:taken].copy() for y in fn(*(buffer[:size] for buffer in buffers))))
    return parts[0] if len(parts) == 1 else tuple(np.concatenate(part) for part in zip(*parts, strict=True))


def padded_size(rows: int) -> int:
    """The smallest of `SIZES` that holds the rows, or the largest when none does."""
    return next((size for size in SIZES if size >= rows), SIZES[-1])
