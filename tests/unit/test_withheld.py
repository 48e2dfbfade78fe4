"""Rings of flagged values: lent, given back, and as bytes."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream.columns import Float32Array
from stream.windows import Windows
from stream.withheld import Withheld, from_bytes, padded, to_bytes

NAN = float("nan")


def slots(*of: int) -> "np.ndarray[Any, np.dtype[np.int32]]":
    return np.array(of, np.int32)


def put(to: Withheld, slot: int, position: int, *value: float) -> None:
    to.put(slots(slot), np.array([position]), np.array([value], np.float32))


def made(series: int, window: int = 4, features: int = 1) -> Withheld:
    of = Withheld(window, features)
    of.resize(series)
    return of


def test_only_series_with_a_flagged_value_have_a_ring() -> None:
    of = made(3)
    of.put(slots(0, 1, 2), np.array([1, 2, 3]), np.array([[NAN], [7.0], [NAN]], np.float32))
    assert (of.lent, of.row.tolist()) == (1, [0, 1, 0])
    np.testing.assert_array_equal(of.rings(slots(0, 1))[:, :, 0], [[NAN] * 4, [NAN, NAN, 7, NAN]])
    np.testing.assert_array_equal(of.at(slots(2, 1), np.array([2, 2])), [[NAN], [7]])


def test_a_ring_is_given_back_with_its_last_value_and_lent_again_empty() -> None:
    of = made(2, features=2)
    put(of, 0, 1, 5.0, NAN)
    put(of, 0, 3, NAN, 6.0)
    put(of, 0, 1, NAN, NAN)
    assert of.lent == 1
    put(of, 0, 3, NAN, NAN)
    assert (of.lent, of.row.tolist()) == (0, [0, 0])
    put(of, 1, 0, 8.0, 9.0)
    assert len(of.ring) == 2, "the same ring"
    np.testing.assert_array_equal(of.rings(slots(1))[0], [[8, 9], *[[NAN, NAN]] * 3])
    assert np.isnan(of.ring[0]).all(), "nobody's ring stays empty"


def test_of_a_cell_only_values_that_are_withheld_are_replaced() -> None:
    of = made(2, features=2)
    put(of, 0, 1, 5.0, NAN)
    of.replace(slots(0, 1), np.array([1, 1]), np.array([[6.0, NAN], [NAN, NAN]], np.float32))
    np.testing.assert_array_equal(of.at(slots(0, 1), np.array([1, 1])), [[6, NAN], [NAN, NAN]])
    assert of.lent == 1


def test_copies_go_their_own_ways() -> None:
    of = made(4)
    put(of, 0, 1, 5.0)
    put(of, 3, 2, 9.0)
    of.copy_rows(slots(0, 1), slots(2, 3))
    put(of, 0, 1, NAN)
    assert of.at(slots(2), np.array([1])).tolist() == [[5]]
    assert (of.row > 0).tolist() == [False, False, True, False], "what the target had is gone"
    assert of.lent == 1


def test_rings_that_many_had_are_given_back_to_the_system() -> None:
    of = made(1000)
    all_ = np.arange(1000, dtype=np.int32)
    of.put(all_, np.arange(1000) % 4, all_[:, None].astype(np.float32))
    assert len(of.ring) == 1001
    of.release(np.delete(all_, [3, 998]))
    assert len(of.ring) == 3
    assert of.at(slots(3, 998, 4), np.array([3, 2, 0]))[:, 0].tolist() == pytest.approx([3, 998, NAN], nan_ok=True)
    put(of, 4, 0, 4.0)
    assert of.lent == 3
    assert of.at(slots(3, 998, 4), np.array([3, 2, 0])).tolist() == [[3], [998], [4]]


def test_windows_lend_no_ring_to_a_series_that_begins_anew() -> None:
    windows = Windows(3, 1, capacity=2)
    for what in ("begin", "reset"):
        windows.append(slots(0), np.array([5]), np.zeros((1, 1)), np.full((1, 1), 9.0), np.zeros((1, 1), np.bool_))
        assert windows.withheld.lent == 1
        if what == "begin":
            windows.begin(slots(0), np.zeros((1, 1)))
        else:
            windows.reset(np.array([0]))
        assert windows.withheld.lent == 0
    assert np.isnan(windows.actual(slots(0, 1))).all()


# -- as bytes ---------------------------------------------------------------------------------------------------------


def rings(seed: int, count: int, window: int, features: int, share: float) -> Float32Array:
    """Rings with at least one value each."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(count, window, features)).astype(np.float32)
    values[rng.random(values.shape) >= share] = np.nan
    values[:, 0, 0] = 1.5
    return values


@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(0, 5),
    window=st.integers(1, 30),
    features=st.integers(1, 4),
    share=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
)
def test_what_is_withheld_comes_back_from_its_bytes(
    seed: int, count: int, window: int, features: int, share: float
) -> None:
    values = rings(seed, count, window, features, share)
    parts = to_bytes(values)
    back, good = from_bytes(parts, window, features)
    np.testing.assert_array_equal(back, values)
    assert good.all() and good.shape == (count,)
    width = features * ((window + 7) // 8)
    assert [len(part) for part in parts] == (width + 4 * (~np.isnan(values)).sum(axis=(1, 2))).tolist()


def test_bytes_that_cannot_be_of_a_window_are_told_from_others() -> None:
    (whole,) = to_bytes(rings(0, 1, 9, 2, 0.5))
    nan = np.array([NAN], "<f4").tobytes()
    wrong = [b"", b"\x80", whole[:-1], whole + b"\0", whole + bytes(4), bytes(4), b"\x80\x00\x00\x00" + nan]
    padding = b"\x80\x01\x00\x00" + bytes(8)  # a bit behind the ninth cell
    back, good = from_bytes([whole, *wrong, padding, whole], 9, 2)
    assert good.tolist() == [True] + [False] * (len(wrong) + 1) + [True]
    np.testing.assert_array_equal(back[0], back[-1])


@pytest.mark.parametrize(("window", "bits"), [(1, 0x80), (7, 0xFE), (8, 0xFF), (9, 0x80), (16, 0xFF)])
def test_padding_is_what_lies_behind_the_last_cell(window: int, bits: int) -> None:
    width = (window + 7) // 8
    for last in range(256):
        row = np.full((1, 1, width), 0xFF, np.uint8)
        row[..., -1] = last
        assert padded(row, window).tolist() == [bool(last & ~bits)]
