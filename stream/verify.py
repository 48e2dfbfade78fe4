"""Holds what the live service published for the points of a file against what a back-test of it says.

Both must be the same, byte by byte. What only the live service can know is left out, and counted: silence by the clock
on the wall; and silence by event time where the file's KPIs share a partition with others, whose points move its time.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import msgspec
import numpy as np
from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition
from aiokafka.errors import KafkaError
from aiokafka.partitioner import DefaultPartitioner

from stream import backtest, events, records
from stream.columns import Columns, SeriesIndex
from stream.detector import Detector
from stream.errors import BrokerError, ConfigError
from stream.events import Event, EventData, SilenceData
from stream.kafka import client_options, explained, reader
from stream.points import Points
from stream.settings import KafkaSettings
from stream.topics import ensure_topics

_LOOK_S = 0.1
_POLL_MS = 200
_NAMED = 3  # of many KPIs of which the same is to be said

Offsets = Mapping[int, int]  # by partition


# -- the back-test ------------------------------------------------------------------------------------------------


def partition_of(name: str, partitions: int) -> int:
    """Return the partition that the records of a series go to, keyed by its name, as Kafka's clients place them."""
    return int(DefaultPartitioner()(name.encode(), list(range(partitions)), []))


def split(points: Points, partition: Mapping[str, int]) -> dict[int, Points]:
    """Return the points of each partition that has any."""
    of_kpi = np.array([partition[name] for name in points.names], np.int64)
    return {number: points.take(of_kpi[points.kpi] == number) for number in np.unique(of_kpi[points.kpi]).tolist()}


def expected(points: Points, partition: Mapping[str, int], make_detector: Callable[[], Detector]) -> list[Event]:
    """Return the events of a back-test, each partition by itself: a series is silent by the time of its partition."""
    said = []
    for part in split(points, partition).values():
        for _, result in backtest.run(make_detector(), part):
            said += result.events
    return said


# -- the live service -----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Sent:
    """What a points topic holds of some KPIs, and of others."""

    partitions: dict[str, set[int]]
    ends: dict[int, int]  # the offset behind the last one of theirs, by partition
    shared: set[int]  # partitions that hold points of others too
    trimmed: bool  # the log of a partition does not begin at its beginning
    _columns: dict[str, list[Columns]]

    def has(self, name: str) -> bool:
        """Say whether there are points of a KPI or entity."""
        return name in self._columns

    def holds(self, points: Points) -> bool:
        """Say whether its points of the KPIs are just these, in their order."""
        for k, name in enumerate(points.names):
            own, found = points.kpi == k, Columns.concatenate(self._columns[name])
            if not (
                np.array_equal(found.timestamp_ms, points.timestamp_ms[own])
                and np.array_equal(found.value, points.value[own], equal_nan=True)
                and np.array_equal(found.feature, points.feature[own])
            ):
                return False
        return True


async def survey(
    settings: KafkaSettings, points: Points, begin: Offsets | None = None, *, timeout_s: float = math.inf
) -> Sent:
    """Read what the points topic holds of the KPIs of a file, from `begin` on, None: from its beginning, until now.

    Raises:
        BrokerError: it cannot be read, or does not go on for `timeout_s`.
    """
    metrics = dict(zip(points.names, points.metrics, strict=True))
    index = SeriesIndex((name for name in points.names if not metrics[name]), lambda name: metrics.get(name) or None)
    for name in points.names:
        if metrics[name]:
            index.entity(name)
    known = len(index.names)
    sent = Sent(defaultdict(set), {}, set(), False, defaultdict(list))
    seen: set[int] = set()
    async for at, batch in _read(settings, settings.points_topic, begin, timeout_s):
        if at.partition not in seen:
            seen.add(at.partition)
            sent.trimmed |= begin is None and batch[0].offset > 0
        columns, _ = records.decode([record.value for record in batch], index)
        ours = columns.slot < known
        if not ours.all():
            sent.shared.add(at.partition)
        own = columns.take(ours)
        for slot in np.unique(own.slot).tolist():
            name = index.names[slot]
            sent._columns[name].append(own.take(own.slot == slot))
            sent.partitions[name].add(at.partition)
        if len(own):
            sent.ends[at.partition] = batch[int(own.row[-1])].offset + 1
    return sent


async def until_committed(
    settings: KafkaSettings,
    ends: Offsets,
    *,
    timeout_s: float,
    on_progress: Callable[[int], None] | None = None,
) -> None:
    """Wait until the service has committed all records before these offsets.

    Args:
        settings: where the broker is, and what the service's group is called.
        ends: of the points topic.
        timeout_s: how long to wait while nothing goes on.
        on_progress: told how many records are still to come.

    Raises:
        BrokerError: nothing went on for so long.
    """
    consumer = AIOKafkaConsumer(**client_options(settings), group_id=settings.group, enable_auto_commit=False)
    try:
        await consumer.start()
        least, since = math.inf, time.monotonic()
        while True:
            left = 0
            for partition, end in ends.items():
                committed = await consumer.committed(TopicPartition(settings.points_topic, partition))
                left += max(end - (committed or 0), 0)
            if on_progress is not None:
                on_progress(left)
            if not left:
                return
            if left < least:
                least, since = left, time.monotonic()
            if time.monotonic() - since > timeout_s:
                raise BrokerError(
                    f"group {settings.group} has not committed the last {left:,} records of {settings.points_topic}, "
                    f"and nothing went on for {timeout_s:g} s: is `tocsin serve` or `tocsin up` running, in this group?"
                )
            await asyncio.sleep(_LOOK_S)
    except KafkaError as e:
        raise BrokerError(f"cannot read the offsets of group {settings.group}: {explained(e, settings)}") from e
    finally:
        await consumer.stop()


async def published(
    settings: KafkaSettings, begin: Offsets | None = None, *, topic: str | None = None, timeout_s: float = 30.0
) -> list[Event]:
    """Return the committed events from `begin` on, None: all that the topic (None: that of all events) holds.

    Raises:
        BrokerError: it cannot be read, or does not go on for `timeout_s`.
    """
    found = []
    async for _, batch in _read(settings, topic or settings.anomalies_topic, begin, timeout_s):
        for record in batch:
            with suppress(msgspec.DecodeError):  # of another program
                found.append(events.decode(record.value or b""))
    return found


async def end_offsets(settings: KafkaSettings, topic: str) -> dict[int, int]:
    """Return where the partitions of a topic end, transactions that are not over yet included.

    A commit is known to its producer, and its offsets to their readers, a moment before the marker is written that
    makes its records visible: the end that a reader of committed records is told of may lie before them.
    """
    whole = AIOKafkaConsumer(**client_options(settings), enable_auto_commit=False, isolation_level="read_uncommitted")
    async with _reading(settings, topic, whole) as at:
        return {one.partition: end for one, end in (await whole.end_offsets(at)).items()}


@asynccontextmanager
async def _reading(
    settings: KafkaSettings, topic: str, consumer: AIOKafkaConsumer
) -> AsyncIterator[list[TopicPartition]]:
    try:
        count = await ensure_topics(settings, {topic: settings.partitions})
        await consumer.start()
        at = [TopicPartition(topic, number) for number in range(count[topic])]
        consumer.assign(at)
        yield at
    except KafkaError as e:
        raise BrokerError(f"cannot read {topic} at {settings.bootstrap_servers}: {explained(e, settings)}") from e
    finally:
        await consumer.stop()


async def _read(
    settings: KafkaSettings, topic: str, begin: Offsets | None, timeout_s: float
) -> AsyncIterator[tuple[TopicPartition, list[ConsumerRecord]]]:
    """Yield the committed records up to the end of now, a batch of one partition at a time."""
    ends = await end_offsets(settings, topic)
    consumer = reader(settings)
    async with _reading(settings, topic, consumer) as at:
        first = await consumer.beginning_offsets(at)
        for one in at:
            consumer.seek(one, first[one] if begin is None else begin.get(one.partition, first[one]))
        since = time.monotonic()
        while any([await consumer.position(one) < ends.get(one.partition, 0) for one in at]):
            batches = await consumer.getmany(timeout_ms=_POLL_MS)
            for one, batch in batches.items():
                yield one, batch
            if batches:
                since = time.monotonic()
            elif time.monotonic() - since > timeout_s:
                raise BrokerError(f"{topic} could not be read to its end for {timeout_s:g} s: an open transaction?")


# -- the two against each other ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Difference:
    """An event that both have and that is not the same."""

    published: Event
    expected: Event
    fields: tuple[str, ...]  # dotted; "order" where it comes before another one that it should follow


@dataclass(slots=True)
class Comparison:
    """What was published for some KPIs, against what should have been."""

    equal: int = 0
    missing: list[Event] = field(default_factory=list)  # not published
    unexpected: list[Event] = field(default_factory=list)  # published, and not of the back-test, or published twice
    different: list[Difference] = field(default_factory=list)
    by_clock: int = 0  # published silences and resumptions that rest on the clock on the wall, left out
    left_out: int = 0  # events of silence by event time, of either side, of KPIs whose partitions others share
    notes: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        """Say whether both are the same."""
        return not (self.missing or self.unexpected or self.different)


def within(said: Iterable[Event], points: Points) -> list[Event]:
    """Return the events about the KPIs of a file within the event times of their points."""
    first, last = {}, {}
    for k in range(len(points.names)):
        own = points.timestamp_ms[points.kpi == k]
        for series in points.series(k) if len(own) else ():
            first[series], last[series] = int(own.min()), int(own.max())
    return [one for one in said if one.subject in first and first[one.subject] <= _about(one) <= last[one.subject]]


def _about(event: Event) -> int:
    """Return the event time that an event is about: a series is silent by the clock when it is, whatever its points."""
    text = event.data.last_seen if isinstance(event.data, SilenceData) else event.time
    return round(datetime.fromisoformat(text).timestamp() * 1000)


def compare(said: Sequence[Event], should: Sequence[Event], *, shared: Collection[str] = ()) -> Comparison:
    """Compare events by their ids, and within each series by their order.

    Args:
        said: what was published.
        should: what the back-test says.
        shared: series whose silence by event time is not judged.
    """
    found = Comparison()
    by_clock = {_silence(one) for one in said if isinstance(one.data, SilenceData) and one.data.basis == "wall_clock"}
    sides: list[dict[str, list[Event]]] = []
    for side, some in enumerate((said, should)):
        kept: dict[str, list[Event]] = defaultdict(list)
        for one in some:
            if isinstance(one.data, SilenceData):
                if _silence(one) in by_clock:
                    found.by_clock += side == 0
                    continue
                if one.subject in shared:
                    found.left_out += 1
                    continue
            kept[one.subject].append(one)
        sides.append(kept)
    for name in sorted({*sides[0], *sides[1]}):
        _compare_series(sides[0][name], sides[1][name], found)
    return found


def _compare_series(said: Sequence[Event], should: Sequence[Event], found: Comparison) -> None:
    wanted = {one.id: one for one in should}
    taken: dict[str, Event] = {}
    for one in said:
        if one.id in taken or one.id not in wanted:
            found.unexpected.append(one)
        else:
            taken[one.id] = one
    found.missing += [one for one in should if one.id not in taken]
    order = [one.id for one in should if one.id in taken]
    for place, one in enumerate(taken.values()):
        fields = _fields(one, wanted[one.id]) + (("order",) if order[place] != one.id else ())
        if fields:
            found.different.append(Difference(one, wanted[one.id], fields))
        else:
            found.equal += 1


def _fields(said: Event, should: Event) -> tuple[str, ...]:
    """Return the fields in which two events differ, dotted."""
    if events.encode(said) == events.encode(should):
        return ()
    return tuple(_unequal(msgspec.to_builtins(said), msgspec.to_builtins(should), ""))


def _unequal(a: Any, b: Any, path: str) -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        return [one for key in {**a, **b} for one in _unequal(a.get(key), b.get(key), f"{path}.{key}" if path else key)]
    return [path] if a != b else []


def _silence(event: Event) -> str:
    """Return what the ids of a silence and its end have in common."""
    return event.id.rsplit("-", 1)[0]


# -- all of it --------------------------------------------------------------------------------------------------------


async def verify(
    points: Points,
    settings: KafkaSettings,
    make_detector: Callable[[], Detector],
    *,
    send: Callable[[], Awaitable[None]] | None,
    timeout_s: float,
    on_waiting: Callable[[int], None] | None = None,
) -> Comparison:
    """Send the points of a file, or take them as sent, and compare what the service publishes with a back-test.

    Args:
        points: of the file, as they are sent.
        settings: where the service is.
        make_detector: with the service's settings and rules.
        send: sends the points; None: they have been sent.
        timeout_s: how long to wait for the service while it does not go on.
        on_waiting: told how many records it has still to commit.

    Raises:
        ConfigError: the service knows other points of these KPIs than those of the file.
        BrokerError: the broker or the service does not answer.
    """
    names = points.names
    events_begin: Offsets | None = None
    before = await survey(settings, points, timeout_s=timeout_s)
    sent = before
    if send is not None:
        if known := [name for name in names if before.has(name)]:
            raise ConfigError(
                f"{settings.points_topic} holds points of {_some(known)} already, so that the service knows more than "
                "the file; --no-send compares what was sent before, and another TOCSIN_KAFKA__POINTS_TOPIC with "
                "another TOCSIN_KAFKA__GROUP begins anew"
            )
        begin = await end_offsets(settings, settings.points_topic)
        events_begin = await end_offsets(settings, settings.anomalies_topic)
        await send()
        sent = await survey(settings, points, begin, timeout_s=timeout_s)
    if absent := [name for name in names if not sent.has(name)]:
        raise ConfigError(f"{settings.points_topic} holds no point of {_some(absent)}: nothing to compare")
    if split_up := [name for name in names if len(sent.partitions[name]) > 1]:
        raise ConfigError(
            f"{settings.points_topic} holds the points of {_some(split_up)} in several partitions: no worker has seen "
            "all of them; key the records by KPI"
        )
    if not sent.holds(points):
        raise ConfigError(
            f"{settings.points_topic} holds other points of {_some(names)} than the file (sent twice, in parts, "
            "shifted, or by others): a comparison means nothing"
        )
    await until_committed(settings, sent.ends, timeout_s=timeout_s, on_progress=on_waiting)
    partition = {name: min(sent.partitions[name]) for name in names}
    others = before.shared | sent.shared
    shared = [name for name in names if partition[name] in others]
    should = expected(points, partition, make_detector)
    said = within(await published(settings, events_begin, timeout_s=timeout_s), points)
    unsure = {series for k, name in enumerate(names) if name in shared for series in points.series(k)}
    found = compare(said, should, shared=unsure)
    if shared:
        found.notes.append(f"{_some(shared)}: others send into the same partitions; silence by event time is left out")
    if before.trimmed:
        found.notes.append(
            f"{settings.points_topic} no longer begins at its beginning: points that the service had of these KPIs "
            "before cannot be seen, and would make a difference"
        )
    models = [{one.data.model for one in side if isinstance(one.data, EventData)} for side in (said, should)]
    if models[0] - models[1]:
        found.notes.append(
            f"the service says {', '.join(sorted(models[0]))} and the back-test {', '.join(sorted(models[1]))}: "
            "give both the same TOCSIN_CHECKPOINT and rules"
        )
    return found


def _some(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more:,} more" if more > 0 else "")
