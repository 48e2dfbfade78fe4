"""Packed batches: what Kafka's codecs pack is unpacked, what a bomb may cost, and what is damaged."""

import gzip
import struct
import tracemalloc
import zlib
from collections.abc import Callable

import cramjam
import pytest
from aiokafka import codec
from hypothesis import given
from hypothesis import strategies as st

from stream import batches
from stream.batches import CODECS, UNPACKED_BYTES_MAX, BatchError

XERIAL = struct.pack("!b7sii", -126, b"SNAPPY\0", 1, 1)
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "snappy": codec.snappy_encode,
    "lz4": codec.lz4_encode,
    "zstd": codec.zstd_encode,
}


def gzip_bomb(size: int) -> bytes:
    """Return gzip that unpacks to so many zero bytes, made a piece at a time."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    parts = [packer.compress(bytes(1 << 20)) for _ in range(size >> 20)]
    return b"".join([*parts, packer.flush()])


def bomb(name: str, size: int) -> bytes:
    """Return what unpacks to so many zero bytes."""
    return gzip_bomb(size) if name == "gzip" else PACKERS[name](bytes(size))


@pytest.mark.parametrize("name", CODECS)
@given(content=st.one_of(st.binary(max_size=3000), st.builds(bytes, st.integers(1, 200_000))))
def test_what_is_packed_is_unpacked(name: str, content: bytes) -> None:
    assert CODECS[name](PACKERS[name](content)) == content


def test_one_block_and_several_frames() -> None:
    assert CODECS["gzip"](gzip.compress(b"abc") + gzip.compress(b"def")) == b"abcdef"
    assert CODECS["snappy"](bytes(cramjam.snappy.compress_raw(b"abc"))) == b"abc"
    assert CODECS["snappy"](XERIAL) == b""
    assert CODECS["lz4"](bytes(cramjam.lz4.compress(b"abc")) * 2) == b"abcabc"


@pytest.mark.parametrize("name", CODECS)
def test_a_bomb_costs_no_more_than_the_bound(name: str) -> None:
    packed = bomb(name, 512 << 20)
    assert len(packed) < 30_000_000
    assert len(CODECS[name](bomb(name, UNPACKED_BYTES_MAX))) == UNPACKED_BYTES_MAX
    tracemalloc.start()
    with pytest.raises(BatchError, match="unpacks to more than 67,108,864 bytes"):
        CODECS[name](packed)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * UNPACKED_BYTES_MAX


@pytest.mark.parametrize("name", CODECS)
@given(data=st.data())
def test_what_is_damaged_is_refused_or_read(name: str, data: st.DataObject) -> None:
    packed = bytearray(PACKERS[name](data.draw(st.binary(min_size=1, max_size=500)) * 3))
    for _ in range(data.draw(st.integers(1, 3))):
        packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    cut = packed[: data.draw(st.integers(0, len(packed)))]
    for one in (bytes(packed), bytes(cut)):
        try:
            assert len(CODECS[name](one)) <= UNPACKED_BYTES_MAX
        except BatchError as e:
            assert str(e)


@pytest.mark.parametrize("size", [0, -4, -(2**31), 100])
def test_a_block_that_leads_nowhere_does_not_go_round_in_circles(size: int) -> None:
    with pytest.raises(BatchError, match=f"a block of {size} bytes at 20 of"):
        CODECS["snappy"](XERIAL + struct.pack("!i", size) + b"abc")


def test_the_bound_holds_over_all_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "UNPACKED_BYTES_MAX", 100_000)
    assert len(CODECS["snappy"](codec.snappy_encode(bytes(100_000)))) == 100_000
    with pytest.raises(BatchError, match="more than 100,000 bytes"):
        CODECS["snappy"](codec.snappy_encode(bytes(100_001)))
