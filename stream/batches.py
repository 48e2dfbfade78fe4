"""Batches of records from Kafka, unpacked within bounds.

A batch of a mebibyte can unpack to a thousand of them, and aiokafka unpacks a batch as a whole, before anybody sees a
record of it. So what unpacks is replaced here by what does so within a bound, and a batch that is too large or damaged
becomes one record at the batch's first offset, which says why; `records.decode` refuses that with a reason. Else such
a batch would end the worker, and the next one, too.
"""

from __future__ import annotations

import functools
import gzip
import io
import logging
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import cramjam
import numpy as np
from aiokafka.consumer import fetcher
from aiokafka.record import (
    _crecords,
    default_records,
    legacy_records,
    memory_records,
)

from stream.records import UNREADABLE

log = logging.getLogger(__name__)

UNPACKED_BYTES_MAX: Final = 64 << 20  # of one batch; producers make batches of up to 1 MiB before they pack them
_PIECE_BYTES: Final = 1 << 18  # unpacked at once
_XERIAL: Final = b"\x82SNAPPY\0"
_XERIAL_HEADER_BYTES: Final = 16  # and two versions


class BatchError(Exception):
    """A batch is damaged, or unpacks to more than is taken."""


def _too_large() -> BatchError:
    return BatchError(f"it unpacks to more than {UNPACKED_BYTES_MAX:,} bytes")


def _from_gzip(payload: Any) -> bytes:
    content = bytearray()
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(payload)) as file:
            while part := file.read(_PIECE_BYTES):
                content += part
                if len(content) > UNPACKED_BYTES_MAX:
                    raise _too_large()
    except (OSError, EOFError, zlib.error) as e:
        raise BatchError(f"damaged gzip: {e}") from None
    return bytes(content)


def _from_snappy(payload: Any) -> bytes:
    """Return what snappy packed, as one block or in the frame of xerial's Java library, which Kafka's clients use."""
    packed = memoryview(payload)
    if bytes(packed[: len(_XERIAL)]) != _XERIAL:
        return _block(packed, UNPACKED_BYTES_MAX)
    content, at = bytearray(), _XERIAL_HEADER_BYTES
    while at < len(packed):
        size = int.from_bytes(packed[at : at + 4], "big", signed=True)
        at += 4
        if not 0 < size <= len(packed) - at:
            raise BatchError(f"damaged snappy: a block of {size} bytes at {at} of {len(packed)}")
        content += _block(packed[at : at + size], UNPACKED_BYTES_MAX - len(content))
        at += size
    return bytes(content)


def _block(packed: memoryview, bytes_max: int) -> bytes:
    try:
        if cramjam.snappy.decompress_raw_len(packed) > bytes_max:
            raise _too_large()
        return bytes(cramjam.snappy.decompress_raw(packed))
    except cramjam.DecompressionError as e:
        raise BatchError(f"damaged snappy: {e}") from None


def _from_frames(codec: Any, name: str, payload: Any) -> bytes:
    """Return what lz4 or zstd packed; neither says before how much it is."""
    room = np.empty(UNPACKED_BYTES_MAX, np.uint8)  # takes memory only as far as it is written
    try:
        size = codec.decompress_into(payload, room)
    except cramjam.DecompressionError as e:
        if "whole buffer" in str(e):
            raise _too_large() from None
        raise BatchError(f"damaged {name}: {e}") from None
    return room[:size].tobytes()


CODECS: Final[dict[str, Callable[[Any], bytes]]] = {
    "gzip": _from_gzip,
    "snappy": _from_snappy,
    "lz4": functools.partial(_from_frames, cramjam.lz4, "lz4"),
    "zstd": functools.partial(_from_frames, cramjam.zstd, "zstd"),
}
"""What Kafka's codecs packed, unpacked; each raises `BatchError` beyond `UNPACKED_BYTES_MAX`, and takes no more."""


@dataclass(frozen=True, slots=True)
class _Instead:
    """The record that stands for a batch, as aiokafka knows records."""

    offset: int
    timestamp: int
    timestamp_type: int
    value: bytes
    key: None = None
    headers: tuple[tuple[str, bytes], ...] = ()
    checksum: None = None


class _Batch:
    """A batch that was packed."""

    def __init__(self, batch: Any) -> None:
        self._batch = batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batch, name)

    def __next__(self) -> Any:
        return next(self._batch)

    def __iter__(self) -> Iterator[Any]:
        try:
            return iter(self._batch)  # unpacks it
        except Exception as e:  # whatever a codec says of bytes that anybody may have sent
            first, last = self._batch.base_offset, self._batch.next_offset - 1
            log.error("a batch (offsets %d to %d) cannot be unpacked: %s", first, last, e)
            why = f"offsets {first} to {last}, {type(e).__name__}: {e}".encode("utf-8", "replace")[:500]
            kind = self._batch.timestamp_type or 0
            return iter((_Instead(first, self._batch.max_timestamp or -1, kind, UNREADABLE + why),))


class _Records:
    """What a broker has sent of one partition."""

    def __init__(self, content: bytes) -> None:
        self._records = memory_records.MemoryRecords(content)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._records, name)

    def next_batch(self) -> Any:
        batch = self._records.next_batch()
        return _Batch(batch) if batch.compression_type else batch


def bound_batches() -> None:
    """Let all consumers of this process unpack within bounds; once or many times."""
    modules = [default_records, legacy_records]
    modules += [getattr(_crecords, name) for name in ("default_records", "legacy_records") if hasattr(_crecords, name)]
    for module in modules:
        for name, unpacked in CODECS.items():
            setattr(module, f"{name}_decode", unpacked)
    fetcher.MemoryRecords = _Records
