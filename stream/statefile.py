"""Files of exported state: JSON lines that any program can read, held together by digests. Nothing in them is code.

    {"tocsin_state": 1, "cluster": …, "group": …, "topic": …, "partitions": 6, "exported": "2026-01-05T00:00:00Z"}
    {"partition": 0, "offset": 1200, "whole": true, "series": 2, "fields": {"clock_ms": "1767571200000"}}
    {"series": "checkout.latency", "shadow": false, "sha256": …, "blob": …}        the blob in base64
    …                                                                         the other series, the other partitions
    {"end": true, "lines": 4, "sha256": …}                                         of all lines before

A partition that is `whole` has all of its series, and `fields` holds what the service keeps of it besides.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import IO, TypeVar

import msgspec

from stream.blobs import SHADOW
from stream.columns import name_problem
from stream.errors import InputError

FORMAT = 1
_LINE_BYTES_MAX = 64 << 20  # of a file from elsewhere that is read at once
_PARTITIONS_MAX = 100_000
_OWN = b"\x00"  # begins the names of fields that are no series
_T = TypeVar("_T")


class Origin(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a state was exported: the log that its offsets belong to."""

    tocsin_state: int
    cluster: str
    group: str
    topic: str
    partitions: int
    exported: str


class _Partition(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    partition: int
    offset: int
    whole: bool
    series: int
    fields: dict[str, str]


class _Series(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    series: str
    shadow: bool
    sha256: str
    blob: str


class _End(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    end: bool
    lines: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Section:
    """What is known of a partition, or of some of its series, as of an offset."""

    partition: int
    offset: int
    whole: bool
    blobs: Mapping[bytes, bytes]  # field of the store -> state
    fields: Mapping[bytes, bytes] = field(default_factory=dict)  # what the service keeps of a whole partition besides

    @classmethod
    def of(cls, partition: int, offset: int, stored: Mapping[bytes, bytes], *, whole: bool) -> Section:
        """Return what the store has, told apart."""
        own = {name: value for name, value in stored.items() if name.startswith(_OWN)}
        return cls(partition, offset, whole, {name: stored[name] for name in stored if name not in own}, own)


def write(to: IO[bytes], origin: Origin, sections: Iterable[Section]) -> None:
    """Write a file, in an order that is the same for the same state."""
    digest, lines = hashlib.sha256(), 0

    def put(line: msgspec.Struct) -> None:
        nonlocal lines
        text = msgspec.json.encode(line) + b"\n"
        digest.update(text)
        lines += 1
        to.write(text)

    put(origin)
    for one in sections:
        fields = {name[len(_OWN) :].decode(): value.decode() for name, value in sorted(one.fields.items())}
        put(_Partition(one.partition, one.offset, one.whole, len(one.blobs), fields))
        for name, blob in sorted(one.blobs.items()):
            text = name.removesuffix(SHADOW).decode()
            put(_Series(text, name.endswith(SHADOW), _sha256(blob), base64.b64encode(blob).decode()))
    to.write(msgspec.json.encode(_End(True, lines, digest.hexdigest())) + b"\n")


def read(source: IO[bytes], name: str) -> tuple[Origin, list[Section]]:
    """Read a file to its end and hold every digest.

    Raises:
        InputError: it is none, cut short, damaged, or of a later format; names the line.
    """
    lines = _Lines(source, name)
    origin = lines.next(Origin)
    if origin.tocsin_state != FORMAT:
        raise InputError(f"{name}: format {origin.tocsin_state} is unknown, this program reads {FORMAT}")
    if not 1 <= origin.partitions <= _PARTITIONS_MAX:
        raise lines.error(f"partitions={origin.partitions} must lie in 1 … {_PARTITIONS_MAX}")
    sections: list[Section] = []
    while not lines.at_end():
        head = lines.next(_Partition)
        if not 0 <= head.partition < origin.partitions or head.partition in {one.partition for one in sections}:
            raise lines.error(f"partition {head.partition} of {origin.partitions} is none, or comes twice")
        if head.offset < 0 or head.series < 0:
            raise lines.error(f"offset={head.offset} and series={head.series} must be at least 0")
        blobs: dict[bytes, bytes] = {}
        for _ in range(head.series):
            one = lines.next(_Series)
            field_ = one.series.encode("utf-8", "replace") + (SHADOW if one.shadow else b"")
            if (problem := name_problem(one.series)) or field_ in blobs:
                raise lines.error(problem or f"{one.series!r} comes twice")
            blobs[field_] = _blob(one, lines)
        fields = {_OWN + key.encode(): value.encode() for key, value in head.fields.items()}
        sections.append(Section(head.partition, head.offset, head.whole, blobs, fields))
    lines.check_end()
    return origin, sections


def _blob(one: _Series, lines: _Lines) -> bytes:
    try:
        blob = base64.b64decode(one.blob, validate=True)
    except binascii.Error as e:
        raise lines.error(f"the blob of {one.series!r} is no base64: {e}") from None
    if _sha256(blob) != one.sha256:
        raise lines.error(f"the blob of {one.series!r} is damaged: its digest is another")
    return blob


class _Lines:
    """The lines of a file, one ahead, with their digest."""

    def __init__(self, source: IO[bytes], name: str) -> None:
        self._source, self._name = source, name
        self._digest = hashlib.sha256()
        self.number = 0
        self._ahead = b""
        self._step()

    def _step(self) -> None:
        self._ahead = self._source.readline(_LINE_BYTES_MAX)
        self.number += 1
        if len(self._ahead) == _LINE_BYTES_MAX:
            raise self.error(f"longer than {_LINE_BYTES_MAX} bytes: this is no export of state")

    def error(self, problem: str) -> InputError:
        return InputError(f"{self._name}:{max(self.number - 1, 1)}: {problem}")

    def at_end(self) -> bool:
        if not self._ahead:
            raise self.error("the file ends in the middle: it was cut short")
        return self._ahead.startswith(b'{"end"')

    def next(self, kind: type[_T]) -> _T:
        line = self._ahead
        if not line:
            raise self.error("the file ends in the middle: it was cut short")
        self._step()
        try:
            found = msgspec.json.decode(line, type=kind)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
            raise self.error(f"this is no line of an export of state: {e}") from None
        self._digest.update(line)
        return found

    def check_end(self) -> None:
        lines, digest = self.number - 1, self._digest.hexdigest()
        end = self.next(_End)
        if (end.lines, end.sha256) != (lines, digest):
            raise self.error("the file was changed: its digest is another")
        if self._ahead:
            raise self.error("there is more behind the end")


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
