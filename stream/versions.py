"""Versions of the blobs of `snapshot`: those of earlier ones are brought forward, a step at a time.

`MIGRATIONS` says what leads from each version to the next. Whoever changes the layout raises `blobs.VERSION`, keeps
a copy of the layout that was left in here, and adds the step. A step gets blobs that nobody has looked at: it has to
refuse what is damaged, and leaves a blob whose checksum is right again. The layouts here never change any more.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import msgspec
import numpy as np

from stream.errors import StateError

MAGIC = b"TK"
Dtype = np.dtype[Any]
# field, blob, layout of a threshold -> blob of the next version; raises StateError, which names the series
Migration = Callable[[bytes, bytes, Dtype], bytes]


def checksum(field: bytes, header: bytes, body: bytes) -> int:
    """Return the crc32 of a blob without the checksum itself, which ends the header, under the name of its series."""
    return zlib.crc32(body, zlib.crc32(header[:-4], zlib.crc32(field)))


def version_of(blob: bytes) -> int | None:
    """Return the version of a blob; None of what is none."""
    return blob[2] if len(blob) > 2 and blob[:2] == MAGIC else None


def brought_to(version: int, field: bytes, blob: bytes, threshold: Dtype) -> bytes:
    """Return a blob as one of this version; what is none is left as it is, for the reader to refuse.

    Args:
        version: that the program reads.
        field: what the blob is kept under.
        blob: of any version.
        threshold: the layout of a threshold, which has the size of its ring in it.

    Raises:
        StateError: no way leads from its version to this one, or it is damaged.
    """
    while True:
        found = version_of(blob)
        if found is None or found == version:
            return blob
        step = MIGRATIONS.get(found) if found < version else None
        if step is None:
            why = "a later program wrote it" if found > version else "nothing leads from it"
            raise StateError(
                f"state of {field.decode('utf-8', 'replace')!r}: version {found} is unknown, "
                f"this program reads {min(MIGRATIONS)} to {version}; {why}"
            )
        blob = step(field, blob, threshold)
        assert version_of(blob) == found + 1, f"the step from version {found} led to {version_of(blob)}"


# -- 1 to 2 -----------------------------------------------------------------------------------------------------------
#
# Version 1 had one feature, no rules, no silence, no late points, no shape in its header, and a blob of its own kind
# for a series whose interval was not known yet.

_HEADER_1 = np.dtype(
    [("magic", "S2"), ("version", "u1"), ("kind", "S1"), ("length", "<u4"), ("model", "<u8"), ("crc32", "<u4")]
)
_HEADER_2 = np.dtype(
    [
        ("magic", "S2"),
        ("version", "u1"),
        ("kind", "S1"),
        ("window", "<u4"),
        ("features", "<u4"),
        ("length", "<u4"),
        ("model", "<u8"),
        ("crc32", "<u4"),
    ]
)
_POINT_1 = np.dtype([("timestamp_ms", "<i8"), ("value", "<f8")])
_NO_PHASE_2 = np.iinfo(np.int64).min
_NEVER_2 = -1
_OPEN_2 = 3
_STEPS_MAX_2 = 10_000
_MS_MAX = 2**53
# The checkpoints of that time are refused too: the threshold is of another model, whatever its name, and begins anew.
_NO_MODEL = 0


def _row_1(window: int, threshold: Dtype) -> Dtype:
    return np.dtype(
        [
            ("interval_ms", "<i8"),
            ("phase_ms", "<i8"),
            ("first_score_ms", "<i8"),
            ("newest", "<i8"),
            ("filled", "<i4"),
            ("origin", "<f8", (1,)),
            ("seen", "<f4", (window, 1)),
            ("actual", "<f4", (window, 1)),
            ("step_mean", "<f8", (1,)),
            ("steps", "<i4"),
            ("learned", "u1", ((window + 7) // 8,)),
            ("state", "u1"),
            ("id", "<u8"),
            ("severity", "u1"),
            ("opened_ms", "<i8"),
            ("last_ms", "<i8"),
            ("normal_run", "<i4"),
            ("anomalies", "<i4"),
            ("peak_ratio", "<f8"),
            ("peak_ms", "<i8"),
            ("peak_value", "<f8"),
            ("threshold", threshold),
        ]
    )


def _row_2(window: int, threshold: Dtype, features: int = 1) -> Dtype:
    return np.dtype(
        [
            ("interval_ms", "<i8"),
            ("phase_ms", "<i8"),
            ("misfit", "<u2"),
            ("backoff", "u1"),
            ("probing", "u1"),
            ("heard_ms", "<i8"),
            ("arrived_ms", "<i8"),
            ("silent", "u1"),
            ("first_score_ms", "<i8"),
            ("shift", "<f8", (features,)),
            ("newest", "<i8"),
            ("filled", "<u2" if window < 2**16 else "<u4"),
            ("origin", "<f8", (features,)),
            ("seen", "<f4", (window, features)),
            ("actual", "<f4", (window, features)),
            ("step_mean", "<f8", (features,)),
            ("steps", "<u2", (features,)),
            ("learned", "u1", ((window * features + 7) // 8,)),
            ("state", "u1"),
            ("id", "<u8"),
            ("opened_ms", "<i8"),
            ("severity", "u1"),
            ("last_ms", "<i8"),
            ("normal_run", "<i4"),
            ("anomalous_run", "<i4"),
            ("anomalies", "<i4"),
            ("peak_ratio", "<f8"),
            ("peak_ms", "<i8"),
            ("peak_value", "<f8"),
            ("resolved_ms", "<i8"),
            ("threshold", threshold),
        ]
    )


def _from_1(field: bytes, blob: bytes, threshold: Dtype) -> bytes:
    """Window, grid, usual step and incident stay; the threshold begins anew."""
    said = f"state of {field.decode('utf-8', 'replace')!r}: version 1"
    size = _HEADER_1.itemsize
    if len(blob) < size:
        raise StateError(f"{said}: {len(blob)} bytes are too few for a header")
    header, body = np.frombuffer(blob[:size], _HEADER_1)[0], blob[size:]
    if header["length"] != len(body) or header["crc32"] != checksum(field, blob[:size], body):
        raise StateError(f"{said}: damaged (length or checksum is wrong)")
    if header["kind"] == b"P" and len(body) and not len(body) % _POINT_1.itemsize:
        return _probing_from_1(field, np.frombuffer(body, _POINT_1), threshold)
    if header["kind"] != b"S":
        raise StateError(f"{said}: kind {bytes(header['kind'])!r} of {len(body)} bytes is unknown")
    window = _window_1(len(body), threshold)
    if window is None:
        raise StateError(f"{said}: no window has {len(body)} bytes; the threshold's ring was changed")
    old = np.frombuffer(body, _row_1(window, threshold))[0]
    newest_ms = int(old["phase_ms"]) + int(old["newest"]) * int(old["interval_ms"])
    bounds = (
        (old["filled"], 1, window),
        (old["state"], 0, 1),
        (old["interval_ms"], 1, _MS_MAX),
        (newest_ms, 0, _MS_MAX),
        (old["steps"], 0, _STEPS_MAX_2),
    )
    if not all(least <= value <= most for value, least, most in bounds):
        raise StateError(f"{said}: its fields are out of their bounds")
    row = np.zeros((), _row_2(window, threshold))
    for name in _row_1(window, threshold).names or ():
        row[name] = old[name]
    row["state"] = _OPEN_2 if old["state"] else 0
    row["anomalous_run"] = old["anomalies"] if old["state"] and not old["normal_run"] else 0
    row["resolved_ms"] = _NEVER_2
    row["heard_ms"] = newest_ms
    row["arrived_ms"] = _NEVER_2
    return _sealed_2(field, row.tobytes(), window)


def _probing_from_1(field: bytes, points: np.ndarray[Any, Dtype], threshold: Dtype) -> bytes:
    """Make a series of version 2 that holds its points still."""
    row = np.zeros((), _row_2(1, threshold))
    row["phase_ms"], row["probing"] = _NO_PHASE_2, 1
    row["heard_ms"], row["arrived_ms"] = points["timestamp_ms"].max(), _NEVER_2
    row["first_score_ms"] = row["resolved_ms"] = _NEVER_2
    held = [(time, value, 0) for time, value in points.tolist()]
    return _sealed_2(field, row.tobytes() + msgspec.msgpack.encode((held, [], None)), 1)


def _window_1(size: int, threshold: Dtype) -> int | None:
    """Return the window of a record of so many bytes: each further cell takes eight, and a bit."""
    window = max((size - _row_1(0, threshold).itemsize) * 8 // 65, 0)
    fits = (one for one in range(max(window - 1, 1), window + 2) if _row_1(one, threshold).itemsize == size)
    return next(fits, None)


def _sealed_2(field: bytes, body: bytes, window: int) -> bytes:
    header = np.zeros((), _HEADER_2)
    header["magic"], header["version"], header["kind"] = MAGIC, 2, b"S"
    header["window"], header["features"] = window, 1
    header["length"], header["model"] = len(body), _NO_MODEL
    header["crc32"] = checksum(field, header.tobytes(), body)
    return header.tobytes() + body


# -- 2 to 3 -----------------------------------------------------------------------------------------------------------
#
# Version 2 had a second ring, of what had arrived: the same as the first one where a cell was learned, NaN where it was
# missing. Now only that of the flagged cells is kept, behind the record, and the bits of each feature begin a byte.

_WINDOW_MAX_2 = 65_536


class _Revisable2(msgspec.Struct, array_like=True, frozen=True):
    copied: tuple[int, int]
    copies: bytes
    raw: bytes
    stamp: bytes
    published: list[tuple[int, str, str, bytes, bool, int]]
    fills: list[tuple[int, int, float]]


class _Tail2(msgspec.Struct, array_like=True, frozen=True):
    held: list[tuple[int, float, int]]
    open: list[tuple[int, float, int]]
    revisable: _Revisable2 | None


_decode_tail_2 = msgspec.msgpack.Decoder(_Tail2).decode


@lru_cache(maxsize=64)
def _rows_2_and_3(window: int, features: int, threshold: Dtype) -> tuple[Dtype, Dtype]:
    """Return the layouts of a record before and after; to make them takes longer than all else of the step."""
    old = _row_2(window, threshold, features)
    fields: list[Any] = []
    for name in old.names or ():
        if name == "actual":
            fields.append(("learned_bits", "u1", (features, (window + 7) // 8)))
        elif name != "learned":
            fields.append((name, old[name]))
    return old, np.dtype(fields)


def _from_2(field: bytes, blob: bytes, threshold: Dtype) -> bytes:
    """All stays; of a cell that was learned what had arrived is what the model sees."""
    said = f"state of {field.decode('utf-8', 'replace')!r}: version 2"
    head = _HEADER_2.itemsize
    if len(blob) < head:
        raise StateError(f"{said}: {len(blob)} bytes are too few for a header")
    header, body = np.frombuffer(blob[:head], _HEADER_2)[0].copy(), blob[head:]
    if header["length"] != len(body) or header["crc32"] != checksum(field, blob[:head], body):
        raise StateError(f"{said}: damaged (length or checksum is wrong)")
    if header["kind"] != b"S":
        raise StateError(f"{said}: kind {bytes(header['kind'])!r} is unknown")
    window, features = int(header["window"]), int(header["features"])
    # A shape that no record of these bytes can have would make a layout of gigabytes.
    fits = 0 < window <= _WINDOW_MAX_2 and 0 < 8 * window * features <= len(body)
    layout = _rows_2_and_3(window, features, threshold) if fits else None
    if layout is None or len(body) < layout[0].itemsize:
        raise StateError(
            f"{said}: {len(body)} bytes are too few for a window of {window} cells of {features} features; "
            "the threshold's ring was changed"
        )
    size = layout[0].itemsize
    record, (withheld,) = _lean_3(body[:size], layout)
    tail = None
    if len(body) > size:
        try:
            tail = _decode_tail_2(body[size:])
        except (msgspec.MsgspecError, UnicodeDecodeError):
            raise StateError(
                f"{said}: {len(body) - size} bytes too many for a window of {window}; the threshold's ring was changed"
            ) from None
    if tail is not None or withheld:
        record += _tail_3(tail or _Tail2([], [], None), withheld, layout, said)
    header["version"], header["length"] = 3, len(record)
    header["crc32"] = checksum(field, header.tobytes(), record)
    sealed: bytes = header.tobytes() + record
    return sealed


def _tail_3(tail: _Tail2, withheld: bytes, layout: tuple[Dtype, Dtype], said: str) -> bytes:
    past: tuple[object, ...] | None = None
    if (old := tail.revisable) is not None:
        if len(old.copies) != 2 * layout[0].itemsize:
            raise StateError(f"{said}: copies of another length than its record")
        copies, parts = _lean_3(old.copies, layout)
        past = (old.copied, copies, old.raw, old.stamp, old.published, old.fills, parts)
    packed: bytes = msgspec.msgpack.encode((tail.held, tail.open, past, withheld))
    return packed


def _lean_3(records: bytes, layout: tuple[Dtype, Dtype]) -> tuple[bytes, list[bytes]]:
    """Return records without what had arrived, and what is withheld of each: bits, and the values they stand for."""
    old, new = np.frombuffer(records, layout[0]), np.zeros(len(records) // layout[0].itemsize, layout[1])
    for name in layout[1].names or ():
        if name != "learned_bits":
            new[name] = old[name]
    _, window, features = old["seen"].shape
    learned = np.unpackbits(old["learned"], axis=1, count=window * features).astype(np.bool_)
    learned = learned.reshape(-1, window, features)
    new["learned_bits"] = np.packbits(learned.swapaxes(1, 2), axis=2)
    behind = ((old["newest"] % window)[:, None] - np.arange(window)) % window
    inside = behind < old["filled"][:, None]  # the others are of an earlier window
    flagged = (inside[:, :, None] & ~learned & ~np.isnan(old["actual"])).swapaxes(1, 2)
    return new.tobytes(), [
        np.packbits(there, axis=1).tobytes() + actual.T[there].astype("<f4").tobytes() if there.any() else b""
        for there, actual in zip(flagged, old["actual"], strict=True)
    ]


MIGRATIONS: dict[int, Migration] = {1: _from_1, 2: _from_2}
