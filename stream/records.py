"""Point records on the wire: JSON bytes -> columns; what cannot be read becomes a `Reject`, never an exception.

A point is ``{"kpi": "checkout.latency_p99", "timestamp": 1469376000, "value": 0.84}``: the timestamp in seconds or
milliseconds since 1970 or as ISO 8601 (no zone means UTC), the value a number or null (missing). An entity,
``{"entity": "machine-1-6", "timestamp": …, "values": {"cpu": 0.3, …}}``, sends its metrics together, in parts, or one
by one (``"metric": "cpu", "value": 0.3``). Where a model of several features watches it, it is one series; metrics that
the model does not know are left out. Else it is watched metric by metric, as the series ``machine-1-6.cpu`` and so on.
A record that has a `kpi` is a point, whatever else it holds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

import msgspec
import numpy as np

from stream.columns import Columns, Int64Array, SeriesIndex, name_problem
from stream.errors import RecordError

VALUE_MAX = 1e30  # squares and window sums of larger values leave the range of float32
SECONDS_BELOW = 100_000_000_000  # a smaller number is in seconds: as ms it would lie before March 1973
TIMESTAMP_MAX_MS = 7_258_118_400_000  # 2200-01-01: beyond it the unit is wrong (µs, ns), not the clock
RECORD_BYTES_MAX = 65_536
METRICS_MAX = 1_024  # of one record of an entity: watched metric by metric, each is a series
UNREADABLE = b"\0tocsin cannot read this batch: "  # begins the record that stands for one, see `batches`

Reason = Literal["empty", "too_large", "not_utf8", "not_json", "wrong_type", "bad_name", "bad_timestamp", "bad_value",
                 "in_the_future", "too_late", "wrong_shape", "too_many_series", "quota", "bad_batch"]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Reject:
    """A record that was not used: its row in the batch, a reason to count by, and a sentence for a person."""

    row: int
    reason: Reason
    detail: str


class Point(msgspec.Struct, gc=False):
    """One record of the points topic; UNSET tells an absent field from a null."""

    timestamp: int | float | str
    kpi: str | None = None
    value: float | msgspec.UnsetType | None = msgspec.UNSET
    entity: str | None = None
    values: dict[str, float | None] | None = None
    metric: str | None = None


_decode = msgspec.json.Decoder(Point).decode


def decode(
    raw: Sequence[bytes | None],
    index: SeriesIndex,
    *,
    arrival_ms: Sequence[int] | None = None,
    future_limit_ms: int = 600_000,
) -> tuple[Columns, list[Reject]]:
    """Return the points of a batch of records as columns, and the records that hold none.

    Args:
        raw: the records' values.
        index: gives each series its slot; grows with new names.
        arrival_ms: when the broker received each record. A point that lies further than `future_limit_ms` ahead of
            it is refused. It is the record's own time and not this machine's clock, so that reading the log a second
            time decides the same. None (a file) asks for no such check.
        future_limit_ms: see `arrival_ms`.
    """
    index.begin_batch()
    rejects: list[Reject] = []
    rows: list[int] | range = range(len(raw))
    try:
        points = [_decode(value) for value in raw]  # type: ignore[arg-type]  # a None raises, as it should
        oversize = max(map(len, raw), default=0) > RECORD_BYTES_MAX  # type: ignore[arg-type]
    except (msgspec.MsgspecError, TypeError, UnicodeDecodeError, RecursionError):
        oversize = True
    if oversize:  # at least one bad record: read one by one, so that each gets its own reason
        points, rows = [], []
        for row, value in enumerate(raw):
            try:
                points.append(_decode_one(value))
                rows.append(row)
            except _Refusal as refusal:
                rejects.append(Reject(row, refusal.reason, str(refusal)))
    arrival = np.full(len(raw), -1) if arrival_ms is None else np.asarray(arrival_ms, np.int64)
    columns = _columns(points, np.asarray(rows, np.int64), index, rejects, _Arrivals(arrival, future_limit_ms))
    rejects.sort(key=lambda reject: reject.row)
    return columns, rejects


@dataclass(frozen=True, slots=True)
class _Arrivals:
    """When the records of a batch came, (N,) int64 ms, -1 for one without a time, and how far ahead is too far."""

    ms: Int64Array
    limit_ms: int

    def ahead(self, timestamp_ms: Int64Array | np.int64, row: Int64Array | int) -> Int64Array:
        """Return by how much points of these rows lie ahead, 0 where that is allowed."""
        ahead = timestamp_ms - self.ms[row]
        return np.where((self.ms[row] >= 0) & (ahead > self.limit_ms), ahead, 0)


class _Refusal(RecordError):
    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason: Reason = reason


def _decode_one(value: bytes | None) -> Point:
    if not value:
        raise _Refusal("empty", "the record has no value (a tombstone?)")
    if value.startswith(UNREADABLE):
        raise _Refusal("bad_batch", value.removeprefix(UNREADABLE).decode("utf-8", "replace"))
    if len(value) > RECORD_BYTES_MAX:
        raise _Refusal("too_large", f"the record has {len(value)} bytes, the limit is {RECORD_BYTES_MAX}")
    try:
        return _decode(value)
    except msgspec.ValidationError as e:
        raise _Refusal("wrong_type", str(e)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        return _decode_lenient(value, str(e))


def _decode_lenient(value: bytes, problem: str) -> Point:
    """Read what Python's json writes and JSON forbids, NaN and Infinity: many exporters send a NaN for "missing"."""
    try:
        text = value.decode("utf-8")
    except UnicodeDecodeError as e:
        raise _Refusal("not_utf8", f"the record is not UTF-8: {e.reason} at byte {e.start}") from None
    try:
        loose = json.loads(text)
    except (ValueError, RecursionError):
        raise _Refusal("not_json", f"the record is not JSON: {problem}") from None
    try:
        return msgspec.convert(loose, Point)
    except (msgspec.ValidationError, UnicodeEncodeError) as e:  # the latter of half a surrogate pair in a string
        raise _Refusal("wrong_type", str(e)) from None


def _columns(
    points: list[Point], row: Int64Array, index: SeriesIndex, rejects: list[Reject], arrivals: _Arrivals
) -> Columns:
    try:
        stamps = [p.timestamp for p in points]
        if set(map(type, stamps)) - {int}:  # np.array would cut a float off in silence
            raise TypeError
        timestamps = np.array(stamps, np.int64)
        values = np.array([p.value for p in points], np.float64)  # None -> NaN, UNSET raises
    except (TypeError, OverflowError, ValueError):
        return _columns_one_by_one(points, row, index, rejects, arrivals)
    bad = (timestamps < 0) | (np.abs(values) > VALUE_MAX)
    timestamps = np.where(timestamps < SECONDS_BELOW, timestamps * 1000, timestamps)
    if (bad | (timestamps > TIMESTAMP_MAX_MS) | (arrivals.ahead(timestamps, row) > 0)).any():
        return _columns_one_by_one(points, row, index, rejects, arrivals)
    # Last: a record that is refused must not make a series.
    slots = np.array([index[p.kpi] for p in points], np.int32)  # type: ignore[index]  # None -> -1
    if (slots < 0).any() or (index.entities and any(slot in index.entities for slot in np.unique(slots).tolist())):
        return _columns_one_by_one(points, row, index, rejects, arrivals)
    return Columns(slots, timestamps, values, row, np.zeros(len(row), np.int32))


def _columns_one_by_one(
    points: list[Point], rows: Int64Array, index: SeriesIndex, rejects: list[Reject], arrivals: _Arrivals
) -> Columns:
    """Do what the column path does for a batch that holds something unusual: entities, ISO times, bad points."""
    good: list[tuple[int, int, float, int, int]] = []
    for point, row in zip(points, rows.tolist(), strict=True):
        try:
            timestamp = _timestamp_ms(point.timestamp)
            if ahead_ms := int(arrivals.ahead(np.int64(timestamp), row)):
                limit = f"the limit is {arrivals.limit_ms / 1000:g} s"
                raise _Refusal(
                    "in_the_future", f"the timestamp lies {ahead_ms / 1000:,.12g} s ahead of its arrival, {limit}"
                )
            # An entity is taken whole or not at all.
            taken = _kpi(point, index) if point.kpi is not None or point.entity is None else _entity(point, index)
        except _Refusal as refusal:
            rejects.append(Reject(row, refusal.reason, str(refusal)))
        else:
            good += [(slot, timestamp, value, row, feature) for slot, value, feature in taken]
    slot, timestamp_ms, value_, row_, feature = zip(*good, strict=True) if good else ((), (), (), (), ())
    return Columns.of(slot, timestamp_ms, value_, row_, feature)


def _kpi(point: Point, index: SeriesIndex) -> list[tuple[int, float, int]]:
    if point.value is msgspec.UNSET:
        raise _Refusal("wrong_type", "Object missing required field `value` (null says that it is missing)")
    if problem := name_problem(point.kpi):
        raise _Refusal("bad_name", problem)
    value, slot = _value(point.value), index[str(point.kpi)]
    if slot in index.entities:
        raise _Refusal("wrong_shape", f"{point.kpi!r} is an entity: its points need `entity` and `values`, not `kpi`")
    return [(slot, value, 0)]


def _entity(point: Point, index: SeriesIndex) -> list[tuple[int, float, int]]:
    """Return the values of an entity record: (slot, value, feature) each."""
    name, values = str(point.entity), point.values
    if point.metric is not None and values is None and point.value is not msgspec.UNSET:
        values = {point.metric: point.value}
    if not values:
        raise _Refusal("wrong_type", "an entity record needs `values` (metric -> number), or `metric` and `value`")
    if len(values) > METRICS_MAX:
        raise _Refusal("too_large", f"the record has {len(values)} metrics, the limit is {METRICS_MAX}")
    if problem := name_problem(name):
        raise _Refusal("bad_name", problem)
    numbers = {metric: _value(value) for metric, value in values.items()}
    if (entity := index.entity(name)) is not None:
        known = [
            (entity.slot, x, entity.features[metric]) for metric, x in numbers.items() if metric in entity.features
        ]
        if not known:
            raise _Refusal(
                "wrong_shape",
                f"none of the metrics {', '.join(list(numbers)[:5])} of entity {name!r} is known to its model, "
                f"which knows {', '.join(list(entity.features)[:5])}, …",
            )
        return known
    names = [f"{name}.{metric}" for metric in numbers]
    for one in names:
        if problem := name_problem(one):
            raise _Refusal("bad_name", problem)
        if index.get(one, -1) in index.entities:
            raise _Refusal("wrong_shape", f"{one!r} is an entity of its own")
    return [(index[one], x, 0) for one, x in zip(names, numbers.values(), strict=True)]


def _value(value: float | msgspec.UnsetType | None) -> float:
    if value is None or value is msgspec.UNSET:
        return math.nan
    if abs(value) > VALUE_MAX:
        raise _Refusal("bad_value", f"the value {value} is beyond ±{VALUE_MAX:g}")
    return value


def _timestamp_ms(timestamp: int | float | str) -> int:
    if isinstance(timestamp, str):
        try:
            moment = datetime.fromisoformat(timestamp.strip())
        except ValueError:
            raise _Refusal("bad_timestamp", f"the timestamp {timestamp[:40]!r} is not ISO 8601") from None
        ms = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1000
    else:
        ms = timestamp * 1000 if timestamp < SECONDS_BELOW else timestamp
    if 0 <= ms <= TIMESTAMP_MAX_MS:  # False for NaN too
        return round(ms)
    where = "before 1970" if ms < 0 else "beyond the year 2200 (seconds or ms expected)"
    raise _Refusal("bad_timestamp", f"the timestamp {str(timestamp)[:40]} lies {where if ms == ms else 'nowhere'}")
