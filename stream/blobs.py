"""What a blob of the store is wrapped in: its header, and who may open it.

The header has magic, version, the shape of the window, the length of the body, the model and the crc32 of the blob's
name and of all else. What the body holds is the business of `snapshot`; how blobs of earlier versions become those of
this one, of `versions`.
"""

from __future__ import annotations

import hashlib
import struct
from typing import Any, NamedTuple

import numpy as np

from stream import versions
from stream.errors import StateError

VERSION = 3  # of the header, and of the layout in `snapshot`; another one needs a step in `versions`
SHADOW = b"\x00shadow"  # ends the name of a second blob; that of a series holds no control characters
_LAYOUT = struct.Struct("<2sBcIIIQI")
_KIND = b"S"
HEADER_BYTES = _LAYOUT.size


class Header(NamedTuple):
    """What a blob says of its body."""

    window: int
    features: int
    model: int  # `model_id` of it

    def sealed(self, field: bytes, body: bytes) -> bytes:
        """Return the blob of a body that is kept under a field."""
        header = _LAYOUT.pack(versions.MAGIC, VERSION, _KIND, self.window, self.features, len(body), self.model, 0)
        return header[:-4] + versions.checksum(field, header, body).to_bytes(4, "little") + body


def model_id(ref: str) -> int:
    """Return the number that a blob keeps of the model whose scores its threshold was built from."""
    return int.from_bytes(hashlib.blake2b(ref.encode(), digest_size=8).digest(), "little")


def opened(field: bytes, blob: bytes, threshold: np.dtype[Any]) -> tuple[Header, bytes]:
    """Return header and body of a blob, brought to the version of now.

    Args:
        field: what the blob is kept under.
        blob: of any version.
        threshold: the layout of a threshold, which has the size of its ring in it.

    Raises:
        StateError: it is none, damaged, or of an unknown version.
    """
    blob = versions.brought_to(VERSION, field, blob, threshold)
    if len(blob) < HEADER_BYTES:
        raise StateError(f"{_of(field)}: {len(blob)} bytes are too few for a header")
    magic, _, kind, window, features, length, model, crc32 = _LAYOUT.unpack_from(blob)
    body = blob[HEADER_BYTES:]
    if magic != versions.MAGIC:
        raise StateError(f"{_of(field)}: this is no state of Tocsin (it starts with {blob[:2]!r})")
    if kind != _KIND:
        raise StateError(f"{_of(field)}: kind {kind!r} is unknown")
    if length != len(body) or crc32 != versions.checksum(field, blob[:HEADER_BYTES], body):
        raise StateError(f"{_of(field)}: damaged (length or checksum is wrong)")
    return Header(window, features, model), body


def labelled(field: bytes, blob: bytes, threshold: np.dtype[Any]) -> tuple[int, int]:
    """Return the version of a blob as it is stored, and the number of its model.

    Raises:
        StateError: it is none, damaged, or of an unknown version.
    """
    header, _ = opened(field, blob, threshold)
    return versions.version_of(blob) or 0, header.model


def _of(field: bytes) -> str:
    return f"state of {field.decode('utf-8', 'replace')!r}"
