"""The end of a topic, read once: without a group, without a commit, and without making what is not there."""

from __future__ import annotations

import asyncio
import difflib
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass

from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition
from aiokafka.errors import KafkaError

from stream.embedded import patch_aborted_transactions
from stream.errors import BrokerError, TocsinError
from stream.kafka import explained, reader
from stream.settings import KafkaSettings
from stream.topics import ensure_topics

_POLL_MS = 200
_LOOK_S = 0.05
_STALLED_S = 30.0  # without a record


class NoRecords(TocsinError):
    """The topic is there and holds nothing, or nothing of that time."""


@dataclass(frozen=True, slots=True)
class Extent:
    """What is read of a topic: offsets of each partition, from the first to the one behind the last."""

    partitions: int
    begin: dict[TopicPartition, int]
    end: dict[TopicPartition, int]
    left_out: int  # offsets that were asked for by time and are too many

    @property
    def offsets(self) -> int:
        """How many there are; not each of them holds a record."""
        return sum(self.end[at] - self.begin[at] for at in self.end)


async def read_tail(
    settings: KafkaSettings,
    topic: str,
    *,
    records: int,
    since_ms: int | None = None,
    on_records: Callable[[Sequence[ConsumerRecord]], None],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Extent:
    """Read the last committed records of each partition of a topic; returns what was read.

    Args:
        settings: where the broker is.
        topic: its name.
        records: how many of each partition, at most.
        since_ms: none that the broker received earlier than this, ms since 1970; None for no such bound.
        on_records: takes the records, those of a partition in the order of their offsets.
        on_progress: told how many of how many offsets are done.

    Raises:
        NoRecords: the topic is empty.
        TocsinError: there is no such topic, or it stopped giving records half way.
        BrokerError: the broker cannot be reached, or refuses.
    """
    patch_aborted_transactions()
    await ensure_topics(settings, {})  # says why, if not
    consumer = reader(settings)
    try:
        await consumer.start()
        extent = await _extent(consumer, settings, topic, records, since_ms)
        async for batches, position in read_between(consumer, extent.begin, extent.end):
            for batch in batches.values():
                on_records(batch)
            on_progress(sum(position.values()) - sum(extent.begin.values()), extent.offsets)
        return extent
    except KafkaError as e:
        raise BrokerError(f"cannot read {topic} at {settings.bootstrap_servers}: {explained(e, settings)}") from e
    finally:
        await consumer.stop()


async def open_topic(consumer: AIOKafkaConsumer, settings: KafkaSettings, topic: str) -> list[TopicPartition]:
    """Return the partitions of a topic, of which the consumer has the first now.

    Raises:
        TocsinError: there is no such topic.
        KafkaError: the broker refuses.
    """
    topics = await consumer.topics()
    if topic not in topics:
        near = difflib.get_close_matches(topic, sorted(topics), n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(topics)[:10]) or 'none'}"
        raise TocsinError(f"there is no topic {topic} at {settings.bootstrap_servers}, or you may not see it; {hint}")
    consumer.assign([TopicPartition(topic, 0)])  # now its partitions are asked for
    async with asyncio.timeout(settings.connect_timeout_s):
        while not (known := consumer.partitions_for_topic(topic)):  # noqa: ASYNC110  # no event tells
            await asyncio.sleep(_LOOK_S)
    return [TopicPartition(topic, partition) for partition in sorted(known)]


async def _extent(
    consumer: AIOKafkaConsumer, settings: KafkaSettings, topic: str, records: int, since_ms: int | None
) -> Extent:
    where = f"at {settings.bootstrap_servers}"
    at = await open_topic(consumer, settings, topic)
    first, end = await consumer.beginning_offsets(at), await consumer.end_offsets(at)
    if not any(end[one] > first[one] for one in at):
        raise NoRecords(f"topic {topic} {where} holds no records: send points first, e.g. tocsin replay FILE")
    wanted = dict(first)
    if since_ms is not None:
        found = await consumer.offsets_for_times(dict.fromkeys(at, since_ms))
        wanted = {one: found[one].offset if found.get(one) is not None else end[one] for one in at}
        if not any(end[one] > wanted[one] for one in at):
            raise NoRecords(f"topic {topic} {where} has received no records in that time: try a longer --since")
    begin = {one: max(wanted[one], end[one] - records) for one in at}
    left_out = sum(begin[one] - wanted[one] for one in at) if since_ms is not None else 0
    return Extent(len(at), begin, end, left_out)


async def read_between(
    consumer: AIOKafkaConsumer,
    begin: Mapping[TopicPartition, int],
    end: Mapping[TopicPartition, int],
    records_max: int | None = None,
) -> AsyncIterator[tuple[dict[TopicPartition, list[ConsumerRecord]], dict[TopicPartition, int]]]:
    """Read partitions from some offsets to others, and yield what comes, with the offsets that this reaches.

    Args:
        consumer: without a subscription.
        begin: the first offset of each partition.
        end: the one behind the last; what comes later is left.
        records_max: how many records come at once, at most; None: as many as there are.

    Raises:
        TocsinError: no record comes any more.
        KafkaError: the broker refuses.
    """
    consumer.assign([at for at in begin if begin[at] < end[at]])
    for at in consumer.assignment():
        consumer.seek(at, begin[at])
    position, moved = dict(begin), time.monotonic()
    while left := [at for at in end if position[at] < end[at]]:
        batches = await consumer.getmany(timeout_ms=_POLL_MS, max_records=records_max)
        before = sum(position.values())
        # The last offsets may hold marks of transactions, and no record that would say so.
        position |= {at: min(await consumer.position(at), end[at]) for at in left}
        if done := [at for at in left if position[at] >= end[at]]:
            consumer.pause(*done)
        yield {at: [one for one in batch if one.offset < end[at]] for at, batch in batches.items()}, dict(position)
        if sum(position.values()) > before:
            moved = time.monotonic()
        elif time.monotonic() - moved > _STALLED_S:
            raise TocsinError(f"{left[0].topic} gave no record for {_STALLED_S:g} s at offset {position[left[0]]}")
