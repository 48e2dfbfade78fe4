"""The state of a series as bytes, and back: what the store keeps.

A blob is a header (magic, version, kind, length, model, crc32 of its name and of all else) and a body. Kind "S" is a
series with a grid: one packed little-endian record of fixed length, so that thousands are packed by columns at once.
Kind "P" is a series whose interval is still being probed: its points. No blob can execute anything; a damaged one, or
one of an unknown version, is refused by the name of its series.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from stream.columns import BoolArray, Columns, Int32Array, name_problem
from stream.detector import NEVER, Detector
from stream.errors import StateError
from stream.incidents import Incidents

VERSION = 1
_MAGIC = b"TK"
_HEADER = np.dtype(
    [("magic", "S2"), ("version", "u1"), ("kind", "S1"), ("length", "<u4"), ("model", "<u8"), ("crc32", "<u4")]
)
_POINT = np.dtype([("timestamp_ms", "<i8"), ("value", "<f8")])


def model_id(detector: Detector) -> int:
    """Return the number that a blob keeps of the model whose scores its threshold was built from."""
    return int.from_bytes(hashlib.blake2b(detector.model_ref.encode(), digest_size=8).digest(), "little")


def row_dtype(detector: Detector) -> np.dtype[np.void]:
    """Return the packed record of one series: grid, window, incident, threshold."""
    w, f = detector.windows.window, detector.windows.features
    return np.dtype(
        [
            ("interval_ms", "<i8"),
            ("phase_ms", "<i8"),
            ("first_score_ms", "<i8"),
            ("newest", "<i8"),
            ("filled", "<i4"),
            ("origin", "<f8", (f,)),
            ("seen", "<f4", (w, f)),
            ("actual", "<f4", (w, f)),
            ("step_mean", "<f8", (f,)),
            ("steps", "<i4"),
            ("learned", "u1", ((w + 7) // 8,)),
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
            ("threshold", detector.threshold.dtype),
        ]
    )


def _fields(detector: Detector) -> tuple[tuple[object, tuple[str, ...]], ...]:
    """Return which arrays of which part are copied into the record as they are."""
    return (
        (detector, ("interval_ms", "phase_ms", "first_score_ms")),
        (detector.windows, ("newest", "filled", "origin", "seen", "actual", "step_mean", "steps")),
        (detector.incidents, Incidents.ARRAYS),
    )


def pack(detector: Detector, slots: Int32Array) -> dict[bytes, bytes]:
    """Return the blobs of these series by name; a series of which nothing is known yet has none."""
    blobs: dict[bytes, bytes] = {}
    known = slots[detector.windows.filled[slots] > 0]
    if len(known):
        rows = np.zeros(len(known), row_dtype(detector))
        for part, fields in _fields(detector):
            for name in fields:
                rows[name] = getattr(part, name)[known]
        rows["learned"] = np.packbits(detector.windows.learned[known], axis=1)
        rows["threshold"] = detector.threshold.pack(known)
        body, size = rows.tobytes(), rows.dtype.itemsize
        names_ = detector.names(known.tolist())
        blobs.update(_wrap(detector, b"S", names_, (body[i : i + size] for i in range(0, len(body), size))))
    held = detector.held.take(np.isin(detector.held.slot, slots))
    for slot in np.unique(held.slot).tolist():
        own = held.take(held.slot == slot)
        points = np.zeros(len(own), _POINT)
        points["timestamp_ms"], points["value"] = own.timestamp_ms, own.value
        blobs.update(_wrap(detector, b"P", detector.names([slot]), [points.tobytes()]))
    return blobs


def _wrap(
    detector: Detector, kind: bytes, names: Sequence[str], bodies: Iterable[bytes]
) -> Iterable[tuple[bytes, bytes]]:
    header = np.zeros((), _HEADER)
    header["magic"], header["version"], header["kind"], header["model"] = _MAGIC, VERSION, kind, model_id(detector)
    for name, body in zip(names, bodies, strict=True):
        field = name.encode()
        header["length"], header["crc32"] = len(body), 0
        header["crc32"] = _checksum(field, header.tobytes(), body)
        yield field, header.tobytes() + body


def _checksum(field: bytes, header: bytes, body: bytes) -> int:
    """Return the crc32 of a blob without the checksum itself, which ends the header, under the name of its series."""
    return zlib.crc32(body, zlib.crc32(header[:-4], zlib.crc32(field)))


@dataclass(frozen=True, slots=True)
class Restored:
    """What became of a partition's blobs."""

    series: int
    recalibrating: int  # series whose threshold belonged to another model: window kept, threshold begun anew
    refused: list[StateError]  # each names its series; such a series starts anew


def unpack(detector: Detector, blobs: Mapping[bytes, bytes]) -> Restored:
    """Put the series of a partition into a detector that has none of them yet.

    A blob that is damaged or of an unknown version is refused by itself; the other series go on.
    """
    dtype = row_dtype(detector)
    names: list[str] = []
    bodies: list[bytes] = []
    models: list[int] = []
    refused: list[StateError] = []
    points: list[Columns] = []
    for field, blob in blobs.items():
        name = field.decode("utf-8", "replace")
        try:
            kind, model, body = _open(field, blob)
            if problem := name_problem(name):
                raise StateError(f"state of {name!r}: {problem}")
            if kind == b"P":
                if not detector.config.interval_ms:  # else there is nothing left to probe for
                    points.append(_open_points(detector, name, body))
            elif len(body) != dtype.itemsize:
                raise StateError(
                    f"state of {name!r}: {len(body)} bytes, but a window of {detector.windows.window} needs "
                    f"{dtype.itemsize}; the model's window or the threshold's ring was changed"
                )
            elif detector.config.interval_ms not in (0, interval := int(np.frombuffer(body, dtype)["interval_ms"][0])):
                raise StateError(
                    f"state of {name!r}: its grid of {interval / 1000:g} s is not the configured one of "
                    f"{detector.config.interval_ms / 1000:g} s"
                )
            else:
                names.append(name)
                bodies.append(body)
                models.append(model)
        except StateError as e:
            refused.append(e)
    slots = np.array([detector.index[name] for name in names], np.int32)
    detector.make_room(len(detector.index.names))
    recalibrating = 0
    if len(slots):
        rows = np.frombuffer(b"".join(bodies), dtype)
        same = np.array(models, np.uint64) == np.uint64(model_id(detector))
        recalibrating = int((~same).sum())
        refused += _put(detector, slots, rows, same, names)
    if points:
        detector.held = Columns.concatenate(points)
    return Restored(len(slots) + len(points), recalibrating, refused)


def _open(field: bytes, blob: bytes) -> tuple[bytes, int, bytes]:
    name = field.decode("utf-8", "replace")
    if len(blob) < _HEADER.itemsize:
        raise StateError(f"state of {name!r}: {len(blob)} bytes are too few for a header")
    header = np.frombuffer(blob[: _HEADER.itemsize], _HEADER)[0]
    body = blob[_HEADER.itemsize :]
    if header["magic"] != _MAGIC:
        raise StateError(f"state of {name!r}: this is no state of Tocsin (it starts with {blob[:2]!r})")
    if header["version"] != VERSION:
        raise StateError(f"state of {name!r}: version {header['version']} is unknown, this program reads {VERSION}")
    if header["kind"] not in (b"S", b"P"):
        raise StateError(f"state of {name!r}: kind {bytes(header['kind'])!r} is unknown")
    if header["length"] != len(body) or header["crc32"] != _checksum(field, blob[: _HEADER.itemsize], body):
        raise StateError(f"state of {name!r}: damaged (length or checksum is wrong)")
    return bytes(header["kind"]), int(header["model"]), body


def _open_points(detector: Detector, name: str, body: bytes) -> Columns:
    if len(body) % _POINT.itemsize:
        raise StateError(f"state of {name!r}: {len(body)} bytes are no whole number of points")
    points = np.frombuffer(body, _POINT)
    slot = detector.index[name]
    return Columns.of(np.full(len(points), slot), points["timestamp_ms"], points["value"], np.full(len(points), -1))


def _put(
    detector: Detector,
    slots: Int32Array,
    rows: np.ndarray[tuple[int], np.dtype[np.void]],
    same_model: BoolArray,
    names: Sequence[str],
) -> list[StateError]:
    """Write the rows into the arrays; return the complaints about single thresholds, which stay as new ones."""
    refused = []
    try:
        detector.threshold.unpack(slots[same_model], rows["threshold"][same_model])
    except StateError:  # find out whose it is
        for i in np.flatnonzero(same_model).tolist():
            try:
                detector.threshold.unpack(slots[i : i + 1], rows["threshold"][i : i + 1])
            except StateError as e:
                refused.append(StateError(f"state of {names[i]!r}: {e}"))
    for part, fields in _fields(detector):
        for name in fields:
            getattr(part, name)[slots] = rows[name]
    window = detector.windows.window
    detector.windows.learned[slots] = np.unpackbits(rows["learned"], axis=1, count=window).astype(np.bool_)
    detector.first_score_ms[slots[~same_model]] = NEVER
    return refused
