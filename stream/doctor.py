"""What a topic of points is like, from a sample of its records: series, intervals, gaps, lateness and what is wrong.

Records go in as Kafka has them, numbers about each series come out. Nothing here reads a clock or a socket. What a
record holds, and whether it would be refused, is asked of `stream.records`, as the service does; the names, the
entities and the formats that it forgets are looked at here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol, TypeVar

import msgspec
import numpy as np

from stream.columns import BoolArray, Float64Array, Int64Array, SeriesIndex
from stream.events import iso_time
from stream.grid import PROBE_POINTS, infer_interval
from stream.records import SECONDS_BELOW, Point, Reason, decode

_PROBES = 16  # of a series, spread over its sample
_PROBES_AT_ONCE = 16_384
_PROBE_LEAST = 3  # distinct times
_ON_GRID = 0.1  # of an interval
_JITTER_QUANTILE = 0.95
_CONSTANT_LEAST = 20  # values
_EXAMPLE_CHARS = 200

K = TypeVar("K", str, tuple[str, bool])


class Record(Protocol):
    """A record as the broker has it; `timestamp` is when it came, -1 if that is not known."""

    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None


class Format(IntEnum):
    """How a timestamp is written."""

    SECONDS = 0
    MILLISECONDS = 1
    ISO_ZONE = 2
    ISO_NO_ZONE = 3

    @property
    def words(self) -> str:
        """What people call it."""
        return ("seconds", "milliseconds", "ISO 8601 with a zone", "ISO 8601 without a zone")[self]


class Key(IntEnum):
    """What the key of a record is."""

    ABSENT = 0
    SERIES = 1
    OTHER = 2


class Refused(msgspec.Struct):
    """Records that the service would send to the reject topic for one reason, and the first of them."""

    reason: Reason
    count: int
    detail: str
    partition: int
    offset: int
    example: str


@dataclass(frozen=True, slots=True)
class Sample:
    """R records that hold points, in the order of their offsets within each partition, and their V values.

    Attributes:
        names: of the S series.
        is_entity: (S,), for KPIs False.
        metrics: names of the metrics of all entities; a KPI's value belongs to metric 0, "".
        slot: series of each record, (R,).
        partition: (R,).
        timestamp_ms: event time, (R,).
        arrival_ms: when the broker received it, -1 if that is not known, (R,).
        format: a `Format`, (R,).
        key: a `Key`, (R,).
        row: record of each value, (V,), rising.
        metric: (V,).
        value: NaN for a missing one, (V,).
        size: bytes of each record, refused ones included.
        refused: by reason.
    """

    names: list[str]
    is_entity: BoolArray
    metrics: list[str]
    slot: Int64Array
    partition: Int64Array
    timestamp_ms: Int64Array
    arrival_ms: Int64Array
    format: Int64Array
    key: Int64Array
    row: Int64Array
    metric: Int64Array
    value: Float64Array
    size: Int64Array
    refused: dict[Reason, Refused]


class Sampler:
    """Takes records in, batch by batch, and gives the sample."""

    def __init__(self, *, future_limit_ms: int = 600_000) -> None:
        self.future_limit_ms = future_limit_ms
        self._slots: dict[tuple[str, bool], int] = {}
        self._metrics: dict[str, int] = {"": 0}
        self._index = SeriesIndex()
        self._records: list[Int64Array] = []  # (6, R): the columns of a sample, row by row
        self._values: list[tuple[Int64Array, Int64Array, Float64Array]] = []  # row, metric, value
        self._sizes: list[Int64Array] = []
        self._refused: dict[Reason, Refused] = {}
        self._count = 0

    def add(self, records: Sequence[Record]) -> None:
        """Take records in; those of a partition must come in the order of their offsets."""
        raw = [record.value for record in records]
        self._sizes.append(np.array([len(value or b"") for value in raw], np.int64))
        arrival = [record.timestamp for record in records]
        columns, rejects = decode(raw, self._index, arrival_ms=arrival, future_limit_ms=self.future_limit_ms)
        for reject in rejects:
            self._refuse(records[reject.row], reject.reason, reject.detail)
        good = np.ones(len(raw), np.bool_)
        good[[reject.row for reject in rejects]] = False
        rows = np.flatnonzero(good)
        slot, form, key, metrics, held = [], [], [], [], []
        for row in rows.tolist():
            point, record = _point(raw[row] or b""), records[row]
            name = point.kpi if point.kpi is not None else str(point.entity)
            slot.append(self._slots.setdefault((name, point.kpi is None), len(self._slots)))
            form.append(format_of(point.timestamp))
            key.append(Key.ABSENT if record.key is None else Key.SERIES if _is(record.key, name) else Key.OTHER)
            mine = _metrics_of(point)
            metrics += [self._metrics.setdefault(metric, len(self._metrics)) for metric in mine]
            held.append(len(mine))
        # The decoder has made the values of each record, in its order.
        first = np.searchsorted(columns.row, rows)
        self._records.append(
            np.array(
                [
                    slot,
                    [records[row].partition for row in rows.tolist()],
                    columns.timestamp_ms[first],
                    np.asarray(arrival, np.int64)[rows],
                    form,
                    key,
                ],
                np.int64,
            ).reshape(6, len(rows))
        )
        row_of_value = np.repeat(np.arange(self._count, self._count + len(rows)), np.asarray(held, np.int64))
        self._values.append((row_of_value, np.asarray(metrics, np.int64), columns.value))
        self._count += len(rows)

    def _refuse(self, record: Record, reason: Reason, detail: str) -> None:
        known = self._refused.get(reason)
        count = 1 if known is None else known.count + 1
        if known is not None and (known.partition, known.offset) <= (record.partition, record.offset):
            known.count = count
            return
        shown = (record.value or b"")[:_EXAMPLE_CHARS].decode("utf-8", "backslashreplace")
        self._refused[reason] = Refused(reason, count, detail, record.partition, record.offset, shown)

    def sample(self) -> Sample:
        """Return all that was taken in; in which order the partitions were read shows nowhere."""
        slot, partition, timestamp_ms, arrival_ms, form, key = np.concatenate(
            [np.zeros((6, 0), np.int64), *self._records], axis=1
        )
        row, metric, value = (
            np.concatenate([np.zeros(0, kind), *(part[i] for part in self._values)])
            for i, kind in enumerate((np.int64, np.int64, np.float64))
        )
        names, slot_of = _sorted(self._slots)
        metrics, metric_of = _sorted(self._metrics)  # "" stays the first
        return Sample(
            [name for name, _ in names],
            np.array([is_entity for _, is_entity in names], np.bool_),
            metrics,
            slot_of[slot],
            partition,
            timestamp_ms,
            arrival_ms,
            form,
            key,
            row,
            metric_of[metric],
            value,
            np.concatenate([np.zeros(0, np.int64), *self._sizes]),
            self._refused,
        )


def _sorted(numbers: dict[K, int]) -> tuple[list[K], Int64Array]:
    """Return the keys in their order, and the new number of each old one."""
    keys = sorted(numbers)
    number = np.zeros(len(keys), np.int64)
    number[[numbers[key] for key in keys]] = np.arange(len(keys))
    return keys, number


_decode_point = msgspec.json.Decoder(Point).decode


def _point(value: bytes) -> Point:
    try:
        return _decode_point(value)
    except msgspec.MsgspecError:  # holds a NaN
        return msgspec.convert(json.loads(value), Point)


def _metrics_of(point: Point) -> list[str]:
    if point.kpi is not None:
        return [""]
    return [*point.values] if point.values is not None else [str(point.metric)]


def _is(key: bytes, name: str) -> bool:
    return key == name.encode("utf-8", "surrogatepass")


_ZONE = re.compile(r"(Z|[+-]\d\d(:?\d\d)?(:?\d\d)?)$", re.IGNORECASE)


def format_of(timestamp: int | float | str) -> Format:
    """Return how a timestamp is written that the service accepts."""
    if isinstance(timestamp, str):
        _, _, clock = timestamp.strip().partition(timestamp.strip()[10:11] or " ")
        return Format.ISO_ZONE if _ZONE.search(clock) else Format.ISO_NO_ZONE
    return Format.SECONDS if timestamp < SECONDS_BELOW else Format.MILLISECONDS


# -- numbers of each series -----------------------------------------------------------------------------------------


class Series(msgspec.Struct, frozen=True, kw_only=True):
    """What the sample shows of a series.

    Attributes:
        name: of the KPI or entity.
        kind: "kpi" or "entity".
        records: that hold a point of it.
        times: distinct timestamps.
        first: the earliest of them, `last` the latest.
        interval_ms: 0 if there are too few times to tell.
        sure: share of the probes, as the service makes one of a series' first points, that give this interval.
        on_grid: share of the times within a tenth of an interval of their place.
        jitter_ms: 19 of 20 times lie no further from their place.
        crowded: times that share their place on the grid with an earlier one.
        missing: share of the places between first and last that no point came for; `longest_gap` the most in a row.
        late: records older than one that the partition had before, `late_ms` by how much at most.
        duplicates: records with a time that they had already sent; `conflicts` those with another value.
        nulls: share of the values that are null or NaN.
        constant: metrics that never change ([""] for a KPI).
        metrics: of an entity, with the share of the times that each has a value for.
        partitions: that it was seen in.
        formats: of its timestamps.
        unkeyed: records whose key is not the series.
        stopped_ms: how much event time the newest point of its partitions is ahead of its last one.
    """

    name: str
    kind: str
    records: int
    times: int
    first: str
    last: str
    interval_ms: int = 0
    sure: float = 0.0
    on_grid: float = 0.0
    jitter_ms: int = 0
    crowded: int = 0
    missing: float = 0.0
    longest_gap: int = 0
    late: int = 0
    late_ms: int = 0
    duplicates: int = 0
    conflicts: int = 0
    nulls: float = 0.0
    constant: list[str] = []
    metrics: dict[str, float] = {}
    partitions: list[int] = []
    formats: list[str] = []
    unkeyed: int = 0
    stopped_ms: int = 0

    @property
    def known(self) -> bool:
        """Whether its interval can be relied upon."""
        return self.interval_ms > 0 and self.times >= PROBE_POINTS and self.sure >= 0.5 and self.on_grid >= 0.5


@dataclass(frozen=True, slots=True)
class Examined:
    """A sample and what was found in it.

    Attributes:
        sample: what was examined.
        series: in the order of `sample.names`.
        late_ms: by how much each record is late, (R,); 0 for one that is not.
    """

    sample: Sample
    series: list[Series]
    late_ms: Int64Array


def examine(sample: Sample) -> Examined:
    """Return what the sample shows of each series."""
    count, slot = len(sample.names), sample.slot
    order = np.lexsort((sample.timestamp_ms, slot))
    distinct = np.ones(len(order), np.bool_)
    distinct[1:] = (np.diff(slot[order]) != 0) | (np.diff(sample.timestamp_ms[order]) != 0)
    of, time_ms = slot[order][distinct], sample.timestamp_ms[order][distinct]  # (U,), sorted by series, then time
    whole = time_ms >= _begin(sample, count)[of]
    grid = _on_grid(of[whole], time_ms[whole], count)
    late_ms = lateness(sample)
    late = late_ms > 0
    repeated, conflicting = _duplicates(sample)
    value_slot = slot[sample.row]
    times = np.bincount(of, minlength=count)
    first, last = _quantile(of, time_ms, 0.0, count), _quantile(of, time_ms, 1.0, count)
    newest = np.full(int(sample.partition.max(initial=-1)) + 1, -1)
    np.maximum.at(newest, sample.partition, sample.timestamp_ms)
    ahead = np.full(count, 0)
    np.maximum.at(ahead, slot, newest[sample.partition])
    columns = {
        "records": np.bincount(slot, minlength=count),
        "times": times,
        **grid,
        "late": np.bincount(slot[late], minlength=count),
        "late_ms": _quantile(slot, late_ms, 1.0, count),
        "duplicates": np.bincount(slot[repeated], minlength=count),
        "conflicts": np.bincount(slot[conflicting], minlength=count),
        "nulls": _share(value_slot, np.isnan(sample.value), count),
        "unkeyed": np.bincount(slot[sample.key != Key.SERIES], minlength=count),
        "stopped_ms": ahead - last,
    }
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*(c.tolist() for c in columns.values()), strict=True)]
    constant, metrics = _metrics(sample, times)
    partitions = _sets(slot, sample.partition, count)
    formats = _sets(slot, sample.format, count)
    series = [
        Series(
            name=name,
            kind="entity" if sample.is_entity[i] else "kpi",
            first=iso_time(int(first[i])),
            last=iso_time(int(last[i])),
            constant=constant[i],
            metrics=metrics[i],
            partitions=partitions[i],
            formats=[Format(one).words for one in formats[i]],
            **rows[i],
        )
        for i, name in enumerate(sample.names)
    ]
    return Examined(sample, series, late_ms)


def lateness(sample: Sample) -> Int64Array:
    """Return by how much each record is older than the newest of its series that its partition had before it, (R,).

    The worker of a partition sees no other one: a series that is split over two has a clock in each.
    """
    _, group = np.unique(np.stack([sample.slot, sample.partition]), axis=1, return_inverse=True)
    order = np.argsort(group, kind="stable")
    since = sample.timestamp_ms - sample.timestamp_ms.min(initial=0)
    lift = group[order] * (since.max(initial=0) + 1)  # each group above the one before it: one accumulate serves all
    running = np.maximum.accumulate(since[order] + lift) - lift
    late = np.zeros(len(order), np.int64)
    late[order] = running - since[order]
    return late


def _begin(sample: Sample, count: int) -> Int64Array:
    """Return the time from which on the sample holds all of each series, (S,).

    As many records of each partition are not as long a time of each: before that, a series that is split over several
    would seem to have gaps.
    """
    partitions = int(sample.partition.max(initial=-1)) + 1
    first = np.full(partitions, np.iinfo(np.int64).max)
    np.minimum.at(first, sample.partition, sample.timestamp_ms)
    begin = np.zeros(count, np.int64)
    np.maximum.at(begin, sample.slot, first[sample.partition])
    return begin


def _on_grid(of: Int64Array, time_ms: Int64Array, count: int) -> dict[str, Int64Array | Float64Array]:
    """Return what the grid of each series is like, (S,) each, from its distinct times, sorted by series and time."""
    interval, phase, sure = _intervals(of, time_ms, count)
    step = np.maximum(interval, 1)[of]
    known = interval[of] > 0
    for _ in range(2):  # the phase is that of one probe: the offsets of all points from it give a better one
        offset = (time_ms - phase[of] + step // 2) % step - step // 2
        phase = phase + _quantile(of, offset, 0.5, count)
    offset = (time_ms - phase[of] + step // 2) % step - step // 2
    cell = (time_ms - phase[of] + step // 2) // step
    same = np.zeros(len(of), np.bool_)  # series as that of the time before
    same[1:] = of[1:] == of[:-1]
    lead = np.diff(cell, prepend=cell[:1])
    gap = np.where(same & known, np.maximum(lead - 1, 0), 0)
    places = np.bincount(of[same], weights=lead[same], minlength=count) + 1
    return {
        "interval_ms": interval,
        "sure": sure,
        "on_grid": np.where(interval > 0, _share(of, np.abs(offset) <= _ON_GRID * step, count), 0.0),
        "jitter_ms": np.where(interval > 0, _quantile(of, np.abs(offset), _JITTER_QUANTILE, count), 0),
        "crowded": np.bincount(of[same & known & (lead == 0)], minlength=count),
        "missing": np.bincount(of, weights=gap, minlength=count) / places,
        "longest_gap": _quantile(of, gap, 1.0, count),
    }


def _intervals(of: Int64Array, time_ms: Int64Array, count: int) -> tuple[Int64Array, Int64Array, Float64Array]:
    """Return interval, phase and the share of probes that agree, (S,) each; 0 where there are too few times.

    A probe is what the service does with the first points of a series. Here many of them, spread over the sample, vote.
    """
    times = np.bincount(of, minlength=count)
    base = np.cumsum(times) - times
    length = np.minimum(times, PROBE_POINTS)
    probes = np.where(length >= _PROBE_LEAST, np.minimum(times - length + 1, _PROBES), 0)
    voter = np.repeat(np.arange(count), probes)  # series of each probe, (K,)
    nth = np.arange(len(voter)) - np.repeat(np.cumsum(probes) - probes, probes)
    begin = base[voter] + nth * (times - length)[voter] // np.maximum(probes[voter] - 1, 1)
    interval, phase = np.zeros(len(voter), np.int64), np.zeros(len(voter), np.int64)
    for points in range(_PROBE_LEAST, PROBE_POINTS + 1):
        of_length = np.flatnonzero(length[voter] == points)
        for some in np.split(of_length, range(_PROBES_AT_ONCE, len(of_length), _PROBES_AT_ONCE)):
            if len(some):
                interval[some], phase[some] = infer_interval(time_ms[begin[some, None] + np.arange(points)])
    found, example, votes = np.unique(np.stack([voter, interval]), axis=1, return_index=True, return_counts=True)
    best = np.lexsort((found[1], -votes, found[0]))  # of equally many votes the smallest interval
    best = best[np.unique(found[0][best], return_index=True)[1]]
    chosen, at, sure = np.zeros(count, np.int64), np.zeros(count, np.int64), np.zeros(count)
    chosen[found[0][best]] = found[1][best]
    at[found[0][best]] = phase[example[best]]
    sure[found[0][best]] = votes[best] / probes[found[0][best]]
    return chosen, at, sure


def _duplicates(sample: Sample) -> tuple[BoolArray, BoolArray]:
    """Return the records with a time that their series (an entity: the same metric of it) had sent before, (R,).

    And those of them that say another value.
    """
    slot, time_ms = sample.slot[sample.row], sample.timestamp_ms[sample.row]
    order = np.lexsort((sample.metric, time_ms, slot))  # stable: the later one stays behind
    again = np.zeros(len(order), np.bool_)
    again[1:] = ~np.logical_or.reduce([np.diff(column[order]) != 0 for column in (slot, time_ms, sample.metric)])
    value = sample.value[order]
    other = again.copy()
    other[1:] &= ~((value[1:] == value[:-1]) | (np.isnan(value[1:]) & np.isnan(value[:-1])))
    repeated, conflicting = np.zeros(len(sample.slot), np.bool_), np.zeros(len(sample.slot), np.bool_)
    repeated[sample.row[order[again]]] = True
    conflicting[sample.row[order[other]]] = True
    return repeated, conflicting


def _metrics(sample: Sample, times: Int64Array) -> tuple[list[list[str]], list[dict[str, float]]]:
    """Return of each series the metrics that never change, and of each entity the share of its times that each has."""
    constant: list[list[str]] = [[] for _ in sample.names]
    shares: list[dict[str, float]] = [{} for _ in sample.names]
    slot, time_ms = sample.slot[sample.row], sample.timestamp_ms[sample.row]
    pairs, pair = np.unique(np.stack([slot, sample.metric]), axis=1, return_inverse=True)
    count = pairs.shape[1]
    there = ~np.isnan(sample.value)
    low, high = (_quantile(pair[there], sample.value[there], q, count) for q in (0.0, 1.0))
    flat = (np.bincount(pair[there], minlength=count) >= _CONSTANT_LEAST) & (low == high)
    timed = np.unique(np.stack([pair[there], time_ms[there]]), axis=1)
    seen = np.bincount(timed[0], minlength=count)
    for i, metric, is_flat, n in zip(*pairs.tolist(), flat.tolist(), seen.tolist(), strict=True):
        if is_flat:
            constant[i].append(sample.metrics[metric])
        if sample.is_entity[i]:
            shares[i][sample.metrics[metric]] = n / int(times[i])
    return constant, shares


def _quantile(of: Int64Array, value: Int64Array | Float64Array, q: float, count: int) -> Int64Array:
    """Return the quantile of each group's values, one of them, (count,); 0 for a group without any."""
    order = np.lexsort((value, of))
    size = np.bincount(of, minlength=count)
    result = np.zeros(count, value.dtype)
    some = size > 0
    rank = np.ceil(q * (size - 1)).astype(np.int64)
    result[some] = value[order[(np.cumsum(size) - size + rank)[some]]]
    return result  # type: ignore[return-value]  # of the type of the values


def _share(of: Int64Array, holds: BoolArray, count: int) -> Float64Array:
    return np.bincount(of[holds], minlength=count) / np.maximum(np.bincount(of, minlength=count), 1)


def _sets(of: Int64Array, value: Int64Array, count: int) -> list[list[int]]:
    """Return the distinct values of each group, rising."""
    sets: list[list[int]] = [[] for _ in range(count)]
    for group, one in np.unique(np.stack([of, value]), axis=1).T.tolist():
        sets[group].append(one)
    return sets
