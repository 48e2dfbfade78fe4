from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models.batching import SIZES, padded_size, run_padded
from models.deepant import DeepAnT, DeepAnTConfig, Network, forward

Pass = Callable[[Tensor], tuple[Tensor]]

COUNTS = [*range(1, 18), 24, 31, 32, 33, 47, 63, 64, 65, 100, 127, 128, 129, 200, 255, 256, 257, 300, 383, 511, 600]


def deepant(window: int, features: int) -> Pass:
    torch.manual_seed(window)
    config = DeepAnTConfig(window=window, features=features)
    packed = DeepAnT(config, Network(config).state_dict()).packed
    return lambda x: forward(packed, x)


def dense(window: int, features: int) -> Pass:
    torch.manual_seed(window)
    width = window * features
    layers = nn.Sequential(nn.Flatten(), nn.Linear(width, 24), nn.Tanh(), nn.Linear(24, 7)).eval()
    return lambda x: (layers(x),)


def run(fn: Pass, x: NDArray[np.float32], chunk: int = SIZES[-1]) -> NDArray[np.float32]:
    return run_padded(fn, [x], chunk=chunk)[0]


@pytest.mark.parametrize("features", [1, 5])
@pytest.mark.parametrize("window", [10, 30, 46, 118])
@pytest.mark.parametrize("family", ["deepant", "dense"])
def test_a_row_is_the_same_bits_in_any_batch_at_any_position(family: str, window: int, features: int) -> None:
    fn = (deepant if family == "deepant" else dense)(window, features)
    x = np.random.default_rng(window).normal(size=(600, window, features)).astype(np.float32)
    expected = run(fn, x)
    assert len(np.unique(expected[:, 0])) == 600  # rows differ, so the comparison below can fail
    for count in COUNTS:
        np.testing.assert_array_equal(run(fn, x[:count]), expected[:count], err_msg=f"first {count} rows")
        np.testing.assert_array_equal(run(fn, x[600 - count :]), expected[600 - count :])  # other positions
    order = np.random.default_rng(0).permutation(600)  # other neighbours
    np.testing.assert_array_equal(run(fn, x[order]), expected[order])
    for chunk in SIZES:
        np.testing.assert_array_equal(run(fn, x, chunk=chunk), expected, err_msg=f"chunk {chunk}")


def test_only_batches_of_the_stable_sizes_are_run() -> None:
    seen: list[int] = []

    def fn(x: Tensor) -> tuple[Tensor]:
        seen.append(len(x))
        return (x * 2,)

    for n in (0, 1, 8, 9, 255, 256, 257, 700):
        x = np.arange(n, dtype=np.float32)[:, None]
        np.testing.assert_array_equal(run(fn, x), x * 2)
    assert seen == [8, 8, 8, 16, 256, 256, 256, 8, 256, 256, 256]


def test_several_arrays_go_in_and_come_out_together() -> None:
    a, b = np.arange(20, dtype=np.float32)[:, None], np.arange(20, dtype=np.int64)
    more, less = run_padded(lambda x, k: (x + k[:, None], x[:, 0] - k), [a, b], chunk=8)
    np.testing.assert_array_equal(more, 2 * a)
    np.testing.assert_array_equal(less, np.zeros(20))


def test_padding_is_zero_and_not_the_rows_before() -> None:
    def fn(x: Tensor) -> tuple[Tensor]:
        return (x + x.sum(),)  # a batch that leaks shows what the padding holds

    x = np.ones((9, 1), dtype=np.float32)
    np.testing.assert_array_equal(run(fn, x, chunk=8)[8:], [[2.0]])


def test_the_result_survives_the_next_run() -> None:
    def same(x: Tensor) -> tuple[Tensor]:
        return (x,)  # a view of the reused buffer

    first = run(same, np.ones((3, 2), dtype=np.float32))
    run(same, np.zeros((3, 2), dtype=np.float32))
    np.testing.assert_array_equal(first, np.ones((3, 2)))


def test_other_chunks_are_refused() -> None:
    with pytest.raises(ValueError, match="chunk=100"):
        run_padded(lambda x: (x,), [np.zeros((1, 1), dtype=np.float32)], chunk=100)


@pytest.mark.parametrize(("rows", "size"), [(0, 8), (1, 8), (8, 8), (9, 16), (129, 256), (256, 256), (1000, 256)])
def test_padded_size(rows: int, size: int) -> None:
    assert padded_size(rows) == size
