"""Batches of records from Kafka, unpacked within bounds.

A batch of a mebibyte can unpack to a thousand of them, and aiokafka unpacks a batch as a whole, before anybody sees a
record of it. So its gzip is bounded here, and a batch that is too large, damaged, or packed with what is not installed
becomes one record at the batch's first offset, which says why; `records.decode` refuses that with a reason. Else such
a batch would end the worker, and the next one, too.
"""

from __future__ import annotations

import gzip
import io
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

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


class _TooLargeError(Exception):
    """A batch unpacks to more than is taken."""


def unpacked(payload: Any) -> bytes:
    """Return what gzip packed.

    Raises:
        _TooLargeError: it is more than `UNPACKED_BYTES_MAX`; no more than that was unpacked.
    """
    content = bytearray()
    with gzip.GzipFile(fileobj=io.BytesIO(payload)) as file:
        while part := file.read(_PIECE_BYTES):
            content += part
            if len(content) > UNPACKED_BYTES_MAX:
                raise _TooLargeError(f"it unpacks to more than {UNPACKED_BYTES_MAX:,} bytes")
    return bytes(content)


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
        module.gzip_decode = unpacked
    fetcher.MemoryRecords = _Records
