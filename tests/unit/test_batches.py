"""Packed batches: what a bomb may cost."""

import gzip
import tracemalloc
import zlib

import pytest

from stream import batches


def bomb(size: int) -> bytes:
    """Return gzip that unpacks to so many zero bytes, made a piece at a time."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    parts = [packer.compress(bytes(1 << 20)) for _ in range(size >> 20)]
    return b"".join([*parts, packer.flush()])


def test_what_is_packed_is_unpacked() -> None:
    assert batches.unpacked(gzip.compress(b"abc") + gzip.compress(b"def")) == b"abcdef"


def test_a_bomb_costs_no_more_than_the_bound() -> None:
    packed = bomb(512 << 20)
    assert len(packed) < 600_000
    tracemalloc.start()
    with pytest.raises(Exception, match="unpacks to more than 67,108,864 bytes"):
        batches.unpacked(packed)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * batches.UNPACKED_BYTES_MAX
