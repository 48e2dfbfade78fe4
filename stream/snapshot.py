"""The state of a series as bytes, and back: what the store keeps.

The body of a blob (see `blobs`) is one packed little-endian record of fixed length, so that thousands are packed by
columns at once, and behind it, in MessagePack, what only some series have: points that are held, cells that are open,
values that are withheld, what late points may still prove wrong. A series that is judged by a second model, in the
shadow of the first, has a second blob. No blob can execute anything; a damaged one, or one of an unknown version, is
refused by the name of its series. One of an earlier version is brought forward (`versions`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from models.pot import PotConfig, Spot
from stream import events
from stream.blobs import SHADOW, Header, model_id, opened
from stream.columns import AnyArray, BoolArray, Columns, Float32Array, Int32Array, Int64Array, name_problem
from stream.detector import Detector
from stream.errors import StateError
from stream.grid import NO_CELL
from stream.group import Group
from stream.incidents import Incidents
from stream.judge import NEVER
from stream.places import Places
from stream.placing import NO_PHASE, Placing
from stream.revision import Statement
from stream.sound import sound, sound_cells, sound_points, sound_withheld
from stream.withheld import from_bytes, to_bytes, unpacked

_WINDOW_FIELDS = ("newest", "filled", "origin", "seen", "learned_bits", "step_mean", "steps")
_WINDOW_MAX = 65_536
_SILENCE_FIELDS = (("heard_ms", "last_ms"), ("arrived_ms", "arrived_ms"), ("silent", "silent"))

_INCIDENTS = Incidents()  # for the types of its arrays

_Point = tuple[int, float, int]  # event time, value, feature


class _Revisable(msgspec.Struct, array_like=True, frozen=True):
    """What a series that corrects its events keeps of the recent past."""

    copied: tuple[int, int]  # the cells that the copies were taken before
    copies: bytes  # their records
    raw: bytes
    stamp: bytes
    published: list[tuple[int, str, str, bytes, bool, int]]
    fills: list[tuple[int, int, float]]
    withheld: tuple[bytes, bytes]  # of the copies


class _Tail(msgspec.Struct, array_like=True, frozen=True):
    """What only some series have."""

    held: list[_Point]
    open: list[_Point]
    revisable: _Revisable | None
    withheld: bytes  # none of a series that nothing is withheld of


_encode_tail = msgspec.msgpack.Encoder().encode
_decode_tail = msgspec.msgpack.Decoder(_Tail).decode


def row_dtype(group: Group, window: int | None = None) -> np.dtype[np.void]:
    """Return the packed record of one series: grid, silence, window, incident, threshold."""
    return record_dtype(window or group.window, group.features, group.judge.threshold.dtype)


def record_dtype(w: int, f: int, threshold: np.dtype[Any]) -> np.dtype[np.void]:
    """Return the packed record of a series of W cells and F features, with a threshold of this layout."""
    return np.dtype(
        [
            ("interval_ms", "<i8"),
            ("phase_ms", "<i8"),
            ("misfit", "<u2"),  # as `filled` and `steps` wider in memory than it need be
            ("backoff", "u1"),
            ("probing", "u1"),
            ("heard_ms", "<i8"),
            ("arrived_ms", "<i8"),
            ("silent", "u1"),
            ("first_score_ms", "<i8"),
            ("shift", "<f8", (f,)),
            ("newest", "<i8"),
            ("filled", "<u2" if w < 2**16 else "<u4"),
            ("origin", "<f8", (f,)),
            ("seen", "<f4", (w, f)),
            ("learned_bits", "u1", (f, (w + 7) // 8)),
            ("step_mean", "<f8", (f,)),
            ("steps", "<u2", (f,)),
            *((name, getattr(_INCIDENTS, name).dtype.newbyteorder("<")) for name in Incidents.ARRAYS),
            ("threshold", threshold),
        ]
    )


_sizes: dict[tuple[int, int, int], int] = {}


def _row_size(group: Group, window: int) -> int:
    """Return the bytes of a record; a dtype takes longer to make than a blob to open."""
    key = (window, group.features, group.judge.threshold.dtype.itemsize)
    if key not in _sizes:
        _sizes[key] = row_dtype(group, window).itemsize
    return _sizes[key]


# -- to bytes ---------------------------------------------------------------------------------------------------------


def pack(detector: Detector, slots: Int32Array) -> dict[bytes, bytes]:
    """Return the blobs of these series by name; a series that has sent nothing yet has none."""
    blobs: dict[bytes, bytes] = {}
    slots = slots[detector.watched(slots)]
    slots = slots[detector.silence.last_ms[slots] != NEVER]
    for places, suffix in ((detector.places, b""), (detector.shadows, SHADOW)):
        for number, group in enumerate(places.groups):
            own = slots[places.group_of[slots] == number]
            if len(own):
                fields = [name.encode() + suffix for name in detector.names(own.tolist())]
                blobs |= _blobs(detector, group, own, places.row_of[own], fields)
    return blobs


def _blobs(
    detector: Detector, group: Group, slots: Int32Array, at: Int32Array, fields: list[bytes]
) -> dict[bytes, bytes]:
    """Return the blobs of series of one group, by the fields that they are kept under."""
    blobs: dict[bytes, bytes] = {}
    rows = _records(group, at)
    for name, array in _SILENCE_FIELDS:
        rows[name] = getattr(detector.silence, array)[slots]
    tails = _tails(group, at)
    header = Header(group.window, group.features, model_id(group.served.ref))
    packed, size = rows.tobytes(), rows.dtype.itemsize
    for i, (field, row) in enumerate(zip(fields, at.tolist(), strict=True)):
        body = packed[i * size : (i + 1) * size] + tails.get(row, b"")
        blobs[field] = header.sealed(field, body)
    return blobs


def _records(group: Group, at: Int32Array) -> AnyArray:
    """Return the records of these rows, without what the detector knows of them."""
    rows = np.zeros(len(at), row_dtype(group))
    for part, fields in (
        (group.placing, Placing.ARRAYS),
        (group, ("shift",)),
        (group.judge, ("first_score_ms",)),
        (group.windows, _WINDOW_FIELDS),
        (group.judge.incidents, Incidents.ARRAYS),
    ):
        for name in fields:
            rows[name] = getattr(part, name)[at]
    rows["threshold"] = group.judge.threshold.pack(at)
    return rows


def _tails(group: Group, at: Int32Array) -> dict[int, bytes]:
    """Return what only some of these rows have, by row."""
    held: dict[int, list[_Point]] = defaultdict(list)
    points = group.placing.held.take(np.isin(group.placing.held.slot, at))
    for slot, *point in zip(*(a.tolist() for a in _triple(points)), strict=True):
        held[slot].append((point[0], point[1], point[2]))
    wait = at[group.placing.waiting[at]]
    waiting = wait[(group.waiting.cell[wait] != NO_CELL).any(axis=1)]
    corrects = at[group.past.corrects[at]]
    withheld = _withheld(group, np.concatenate([at, corrects + 1, corrects + 2]))
    tails = {}
    for slot in {*held, *waiting.tolist(), *corrects.tolist(), *withheld.keys() & set(at.tolist())}:
        open_points = group.waiting.open_points(slot) if group.placing.waiting[slot] else Columns.empty()
        opened = [(t, v, f) for _, t, v, f in zip(*(a.tolist() for a in _triple(open_points)), strict=True)]
        revisable = _revisable(group, slot, withheld) if group.past.corrects[slot] else None
        tails[slot] = _encode_tail(_Tail(held.get(slot, []), opened, revisable, withheld.get(slot, b"")))
    return tails


def _withheld(group: Group, at: Int32Array) -> dict[int, bytes]:
    """Return what is withheld of those of these rows that have any, by row."""
    withheld = group.windows.withheld
    some = at[withheld.row[at] > 0]
    return dict(zip(some.tolist(), to_bytes(withheld.rings(some)), strict=True))


def _triple(points: Columns) -> tuple[AnyArray, ...]:
    return points.slot, points.timestamp_ms, points.value, points.feature


def _revisable(group: Group, slot: int, withheld: Mapping[int, bytes]) -> _Revisable:
    copies = _records(group, np.array([slot + 1, slot + 2], np.int32))
    published = [
        (one.cell, one.plain, one.published, events.encode(one.event), one.live, one.versions)
        for one in group.past.statements.get(slot, [])
    ]
    latest, oldest = group.past.copied[slot].tolist()
    return _Revisable(
        (latest, oldest),
        copies.tobytes(),
        group.past.raw[slot].astype("<f8").tobytes(),
        group.past.stamp[slot].astype("<i8").tobytes(),
        published,
        group.past.fills.get(slot, []),
        (withheld.get(slot + 1, b""), withheld.get(slot + 2, b"")),
    )


# -- and back ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Restored:
    """What became of a partition's blobs."""

    series: int
    recalibrating: int  # of them those whose threshold was another model's: window kept, threshold begun anew
    refused: list[StateError]  # each names its series; such a series starts anew


@dataclass(frozen=True, slots=True)
class _Blob:
    name: str
    slot: int
    model: int
    record: bytes
    tail: _Tail | None


def unpack(detector: Detector, blobs: Mapping[bytes, bytes]) -> Restored:
    """Restore series into a detector that has none of them yet.

    A series whose window had another length keeps the newest part of it, one whose rule asks for another interval
    begins a new window, one that no rule watches any more is left out.
    """
    refused: list[StateError] = []
    sorts: dict[tuple[bool, int, int], list[_Blob]] = defaultdict(list)  # by shadow, group and window
    found: list[tuple[str, bool, int, Header, bytes]] = []
    threshold = threshold_dtype(detector.config.pot)
    for field, blob in blobs.items():
        shadow = field.endswith(SHADOW)
        name = field.removesuffix(SHADOW).decode("utf-8", "replace")
        try:
            header, body = opened(field, blob, threshold)
            slot = detector.index[name] if header.features == 1 else _entity(detector, name)
            if slot < 0 and (problem := name_problem(name)):
                raise StateError(f"state of {name!r}: {problem}")
            found.append((name, shadow, slot, header, body))
        except StateError as e:
            refused.append(e)
    detector.admit()
    rule_of = detector.rule_of.tolist()
    for name, shadow, slot, header, body in found:
        rule, features = rule_of[slot] if slot >= 0 else detector.rule_for(name, entity=True), header.features
        if rule < 0 or detector.served[rule] is None:
            continue
        places = detector.shadows if shadow else detector.places
        number = places.number_of(slot) if slot >= 0 else -1
        if shadow and (number < 0 or places.groups[number].features != features):
            continue  # nothing judges it in the shadow any more
        try:
            if number < 0 or places.groups[number].features != features:
                raise StateError(f"state of {name!r}: it has {features} features; the model of its rule takes others")
            blob_ = _cut(name, slot, places.groups[number], header, body)
            sorts[shadow, number, header.window].append(blob_)
        except StateError as e:
            refused.append(e)
    series = recalibrating = 0
    for (shadow, number, window), some in sorts.items():
        places = detector.shadows if shadow else detector.places
        restored = _restore(detector, places, places.groups[number], window, some)
        series += 0 if shadow else restored.series
        recalibrating += 0 if shadow else restored.recalibrating
        refused += restored.refused
    return Restored(series, recalibrating, refused)


def _entity(detector: Detector, name: str) -> int:
    """Return the slot of an entity, -1 of what cannot be one, or is watched metric by metric."""
    entity = None if name_problem(name) else detector.index.entity(name)
    return -1 if entity is None else entity.slot


def threshold_dtype(pot: PotConfig) -> np.dtype[Any]:
    """Return the layout of a threshold, which depends on the size of its ring."""
    return Spot(pot).dtype


def _unsound(name: str) -> StateError:
    return StateError(f"state of {name!r}: damaged (its checksum is right, its content cannot be that of a series)")


def _cut(name: str, slot: int, group: Group, header: Header, body: bytes) -> _Blob:
    """Tell the record from what stands behind it."""
    if not 0 < header.window <= _WINDOW_MAX:
        raise StateError(f"state of {name!r}: a window of {header.window}; one has 1 to {_WINDOW_MAX} cells")
    size = _row_size(group, header.window)
    if len(body) < size:
        raise StateError(
            f"state of {name!r}: {len(body)} bytes, but a window of {header.window} needs {size}; "
            "the threshold's ring was changed"
        )
    tail = None
    if len(body) > size:
        try:
            tail = _decode_tail(body[size:])
        except (msgspec.MsgspecError, UnicodeDecodeError):
            raise StateError(
                f"state of {name!r}: {len(body) - size} bytes too many for a window of {header.window}; "
                "the threshold's ring was changed"
            ) from None
        if not _sound_tail(group, tail, header.window, body[:size]):
            raise _unsound(name)
    return _Blob(name, slot, header.model, body[:size], tail)


def _sound_tail(group: Group, tail: _Tail, window: int, record: bytes) -> bool:
    """Say whether what stands behind a record can be of its series; what is withheld is looked at of all at once."""
    if not sound_points([*tail.held, *tail.open], group.features):
        return False
    past = tail.revisable
    if past is None:
        return True
    row = np.frombuffer(record, row_dtype(group, window))
    if len(past.copies) != 2 * row.dtype.itemsize or len(past.stamp) * group.features != len(past.raw):
        return False
    copies = np.frombuffer(past.copies, row.dtype).copy()
    for field in (*Placing.ARRAYS, *(name for name, _ in _SILENCE_FIELDS)):  # a copy is of the same series
        copies[field] = row[field]
    raw, stamp = np.frombuffer(past.raw, "<f8"), np.frombuffer(past.stamp, "<i8")
    cells = [*past.copied, *(cell for cell, *_ in past.published), *(cell for fill in past.fills for cell in fill[:2])]
    try:
        for *_, event, _, _ in past.published:
            events.decode(event)
    except msgspec.DecodeError:
        return False
    return (
        len(stamp) == window
        and sound_points(zip(stamp.tolist(), np.nan_to_num(raw[:window]).tolist(), (0,) * window, strict=True), 1)
        and bool(sound(copies, window).all())
        and bool(_rings(copies, past.withheld, window)[2].all())
        and sound_cells(cells, row[0])
        and sound_points(((0, value, 0) for *_, value in past.fills), 1)
    )


def _restore(detector: Detector, places: Places, group: Group, window: int, blobs: list[_Blob]) -> Restored:
    """Restore series of one group and one length of window."""
    slots = np.array([one.slot for one in blobs], np.int32)
    at = places.row_of[slots]
    rows = np.frombuffer(b"".join(one.record for one in blobs), row_dtype(group, window))
    which, rings, fits = _rings(rows, [b"" if one.tail is None else one.tail.withheld for one in blobs], window)
    good = sound(rows, window) & fits
    which, rings = which[good[which]], rings[good[which]]
    withheld_at, rings = at[which], _newest_of(rings, rows["newest"][which], group.window, np.nan)
    refused = [_unsound(one.name) for one, fine in zip(blobs, good.tolist(), strict=True) if not fine]
    blobs = [one for one, fine in zip(blobs, good.tolist(), strict=True) if fine]
    slots, at, rows = slots[good], at[good], rows[good]
    same = np.array([one.model for one in blobs], np.uint64) == np.uint64(model_id(group.served.ref))
    if places is detector.places:
        for name, array in _SILENCE_FIELDS:
            getattr(detector.silence, array)[slots] = rows[name]
    for name in Placing.ARRAYS:
        getattr(group.placing, name)[at] = rows[name]
    refused += _put(group, at, _fitted(group, rows, window), same, [one.name for one in blobs])
    group.windows.withheld.restore(withheld_at, rings)
    group.judge.first_score_ms[at[~same]] = NEVER

    regrid = _set_grids(group, at, detector.table.interval_ms[detector.rule_of[slots]])
    group.resume(at)
    for i, one in enumerate(blobs):
        if one.tail is not None and not regrid[i]:
            _put_tail(group, int(at[i]), one.tail, revisable=bool(same[i]) and window == group.window)
    if places is detector.places:
        interval = np.where(group.placing.probing[at], 0, group.placing.interval_ms[at])
        detector.silence.span_ms[slots] = detector.table.silent_after[detector.rule_of[slots]] * interval
    return Restored(len(blobs), int((~same).sum()), refused)


def _set_grids(group: Group, at: Int32Array, asked: Int64Array) -> BoolArray:
    """Bring restored grids in line with the intervals that are asked for now; return which begin anew, (K,)."""
    placing, windows = group.placing, group.windows
    regrid: BoolArray = (asked > 0) & (asked != placing.interval_ms[at])
    placing.phase_ms[at[regrid]] = NO_PHASE
    windows.empty(at[regrid])
    windows.forget_steps(at[regrid])
    # Without a phase an interval was that of a rule. With one, only immediate series that infer it probe again.
    unknown = placing.phase_ms[at] == NO_PHASE
    placing.interval_ms[at[unknown]] = asked[unknown]
    waiting = placing.waiting[at]
    placing.probing[at] = np.where(unknown, waiting | (asked == 0), placing.probing[at] & ~waiting & (asked == 0))
    return regrid


def _put(group: Group, at: Int32Array, rows: AnyArray, same_model: BoolArray, names: list[str]) -> list[StateError]:
    """Write records into the arrays; return the complaints about single thresholds, which stay as new ones."""
    refused = []
    try:
        group.judge.threshold.unpack(at[same_model], rows["threshold"][same_model])
    except StateError:  # find out whose it is
        for i in np.flatnonzero(same_model).tolist():
            try:
                group.judge.threshold.unpack(at[i : i + 1], rows["threshold"][i : i + 1])
            except StateError as e:
                refused.append(StateError(f"state of {names[i]!r}: {e}"))
    group.judge.first_score_ms[at], group.shift[at] = rows["first_score_ms"], rows["shift"]
    for part, fields in ((group.windows, _WINDOW_FIELDS), (group.judge.incidents, Incidents.ARRAYS)):
        for name in fields:
            getattr(part, name)[at] = rows[name]
    return refused


def _rings(rows: AnyArray, parts: Sequence[bytes], window: int) -> tuple[Int64Array, Float32Array, BoolArray]:
    """Return which records have something withheld, (M,), that, (M, W, F), and which can be sound with it, (K,)."""
    some = np.flatnonzero(np.array([bool(part) for part in parts], np.bool_))
    rings, fits = from_bytes([parts[i] for i in some.tolist()], window, rows.dtype["seen"].shape[1])
    good = np.ones(len(rows), np.bool_)
    good[some] = fits & sound_withheld(rows[some], rings, window)
    return some, rings, good


def _fitted(group: Group, rows: AnyArray, window: int) -> AnyArray:
    """Return records as those of the group's window: the newest cells of another one."""
    if window == group.window:
        return rows
    fitted = np.zeros(len(rows), row_dtype(group))
    for name in rows.dtype.names or ():
        if name not in ("seen", "learned_bits"):
            fitted[name] = rows[name]
    fitted["filled"] = np.minimum(rows["filled"], group.window)
    learned = unpacked(rows["learned_bits"], window).swapaxes(1, 2)
    fitted["seen"] = _newest_of(rows["seen"], rows["newest"], group.window, 0)
    learned = _newest_of(learned, rows["newest"], group.window, 0)
    fitted["learned_bits"] = np.packbits(learned.swapaxes(1, 2), axis=2)
    return fitted


def _newest_of(rings: AnyArray, newest: Int64Array, window: int, fresh: float) -> AnyArray:
    """Return the newest cells of rings, (K, W, F), in rings of another window."""
    if window == rings.shape[1]:
        return rings
    moved = np.full((len(rings), window, rings.shape[2]), fresh, rings.dtype)
    cell = newest[:, None] - np.arange(min(window, rings.shape[1]))  # (K, count)
    series = np.arange(len(rings))[:, None]
    moved[series, cell % window] = rings[series, cell % rings.shape[1]]
    return moved


def _put_tail(group: Group, slot: int, tail: _Tail, *, revisable: bool) -> None:
    if tail.held and group.placing.probing[slot]:
        group.placing.held = Columns.concatenate([group.placing.held, _points(slot, tail.held)])
    if tail.open and group.placing.waiting[slot]:
        points = _points(slot, tail.open)
        cell: Int64Array = group.placing.cell(points.slot, points.timestamp_ms)
        room = cell > cell.max() - group.waiting.room  # of a narrower window there is less
        points, cell = points.take(room), cell[room]
        group.waiting.restore(slot, int(group.waiting.closed[slot]), points, cell)
    past = tail.revisable
    if past is None or not revisable or not group.past.corrects[slot]:
        return
    at, copies = np.array([slot + 1, slot + 2], np.int32), np.frombuffer(past.copies, row_dtype(group))
    _put(group, at, copies, np.ones(2, np.bool_), ["", ""])
    which, rings, _ = _rings(copies, past.withheld, group.window)
    group.windows.withheld.restore(at[which], rings)
    group.past.copied[slot] = past.copied
    at = at[group.past.copied[slot] != NO_CELL]
    # What the rule asks for now, as of the series itself.
    group.judge.threshold.set_risk(at, group.judge.threshold.risk(np.array([slot], np.int32)))
    group.judge.threshold.set_drift(at, int(group.table.drift[group.rule[slot]]))
    group.past.raw[slot] = np.frombuffer(past.raw, "<f8").reshape(group.past.raw.shape[1:])
    group.past.stamp[slot] = np.frombuffer(past.stamp, "<i8")
    group.past.fills[slot] = list(past.fills)
    group.past.statements[slot] = [
        Statement(cell, plain, published, events.decode(event), live, versions)
        for cell, plain, published, event, live, versions in past.published
    ]


def _points(slot: int, points: list[_Point]) -> Columns:
    time, value, feature = zip(*points, strict=True)
    return Columns.of(np.full(len(points), slot), time, value, np.full(len(points), -1), feature)
