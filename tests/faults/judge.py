"""What was published, read by another client than ours, against the unbroken run."""

from __future__ import annotations

import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, Message, TopicPartition

from stream import events
from stream.events import Event

_READ_S = 90.0  # a transaction that nobody ends is aborted by the broker after 60 s


@dataclass(slots=True)
class Verdict:
    """Counts of what should be there and what is; ids (or places in the log) of what is wrong."""

    expected: int = 0
    found: int = 0
    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    disordered: list[str] = field(default_factory=list)  # after another one of its series that it should precede
    different: list[str] = field(default_factory=list)  # other bytes, or never expected

    def __bool__(self) -> bool:
        """Say whether all is as it should be."""
        return not (self.lost or self.doubled or self.disordered or self.different)

    def counts(self) -> str:
        """Return the counts in a line."""
        return (
            f"{self.expected} expected, {self.found} published: {len(self.lost)} lost, {len(self.doubled)} doubled, "
            f"{len(self.disordered)} out of order, {len(self.different)} different"
        )


def judge_events(published: Sequence[bytes], should: Sequence[Event]) -> Verdict:
    """Compare events, byte by byte, and their order within each series."""
    verdict = Verdict(len(should), len(published))
    wanted = {event.id: events.encode(event) for event in should}
    order: dict[str, list[str]] = defaultdict(list)
    for event in should:
        order[event.subject].append(event.id)
    seen: dict[str, list[str]] = defaultdict(list)
    count: Counter[str] = Counter()
    for value in published:
        event = events.decode(value)
        count[event.id] += 1
        if count[event.id] > 1:
            verdict.doubled.append(event.id)
        elif wanted.get(event.id) != value:
            verdict.different.append(event.id)
        else:
            seen[event.subject].append(event.id)
    verdict.lost = [one for one in wanted if not count[one]]
    for name, ids in order.items():
        there = set(seen[name])
        kept = [one for one in ids if one in there]
        verdict.disordered += [a for a, b in zip(seen[name], kept, strict=True) if a != b]
    return verdict


@dataclass(frozen=True, slots=True)
class Refused:
    """A record of the rejects topic: where it stands, and of which record it tells what."""

    stands_in: int
    partition: int
    offset: int
    reason: str

    @classmethod
    def of(cls, stands_in: int, headers: Any) -> Self:
        """Return it from its partition and headers (of either client)."""
        said = {name: value.decode() for name, value in headers}
        return cls(stands_in, int(said["tocsin-partition"]), int(said["tocsin-offset"]), said["tocsin-reason"])


def refusals(messages: Sequence[Message]) -> list[Refused]:
    """Return what records of the rejects topic tell."""
    return [Refused.of(one.partition() or 0, one.headers() or []) for one in messages]


def judge_rejects(published: Sequence[Refused], should: Mapping[tuple[int, int], str]) -> Verdict:
    """Compare refused records by where they stand in the points topic, (partition, offset) -> reason."""
    verdict = Verdict(len(should), len(published))
    count: Counter[tuple[int, int]] = Counter()
    last: dict[tuple[int, int], int] = {}
    for one in published:  # each partition's in their order
        at = one.partition, one.offset
        count[at] += 1
        if count[at] > 1:
            verdict.doubled.append(str(at))
        elif should.get(at) != one.reason:
            verdict.different.append(str(at))
        between = one.partition, one.stands_in
        if one.offset < last.get(between, -1):
            verdict.disordered.append(str(at))
        last[between] = one.offset
    verdict.lost = [str(at) for at in should if not count[at]]
    return verdict


def read_committed(bootstrap: str, topic: str) -> list[Message]:
    """Return all committed records of a topic, those of a partition in their order, as librdkafka reads them.

    Raises:
        RuntimeError: it cannot be read to its end: a transaction stays open.
    """
    ends = end_offsets(bootstrap, topic)
    consumer = _consumer(bootstrap, "read_committed")
    try:
        consumer.assign([TopicPartition(topic, partition, OFFSET_BEGINNING) for partition in ends])
        read: list[Message] = []
        waited_for = {partition for partition, end in ends.items() if end}
        deadline = time.monotonic() + _READ_S
        while waited_for:
            for message in consumer.consume(1000, 0.2):
                error = message.error()
                if error is None:
                    read.append(message)
                elif error.code() != KafkaError._PARTITION_EOF:
                    raise KafkaException(error)
                elif (message.offset() or 0) >= ends[message.partition() or 0]:  # behind all markers too
                    waited_for.discard(message.partition())
            if time.monotonic() > deadline:
                raise RuntimeError(f"{topic}: partitions {waited_for} cannot be read to their end in {_READ_S:g} s")
        return read
    finally:
        consumer.close()


def end_offsets(bootstrap: str, topic: str) -> dict[int, int]:
    """Return where each partition ends, open transactions included."""
    consumer = _consumer(bootstrap, "read_uncommitted")
    try:
        partitions = consumer.list_topics(topic, timeout=10).topics[topic].partitions
        return {
            number: consumer.get_watermark_offsets(TopicPartition(topic, number), timeout=10)[1]
            for number in partitions
        }
    finally:
        consumer.close()


def _consumer(bootstrap: str, isolation: str) -> Consumer:
    return Consumer(
        {
            "bootstrap.servers": bootstrap,
            "group.id": f"judge-{uuid.uuid4().hex[:8]}",
            "enable.auto.commit": False,
            "enable.partition.eof": True,
            "isolation.level": isolation,
            "log_level": 0,
        }
    )
