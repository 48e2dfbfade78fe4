"""Kafka clients as the service uses them, made from the settings; aiokafka's errors become ours."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.abc import ConsumerRebalanceListener

from stream.settings import KafkaSettings

# A transaction that follows another within some 20 ms is told to try again later (the broker still writes the last
# one's markers); aiokafka waits this long before it does, 100 ms by default.
_RETRY_BACKOFF_MS = 20
_FETCH_BYTES = 8 << 20  # of one partition; 1 MiB, the default, halves the throughput of small records
_SESSION_TIMEOUT_MS = 10_000
_CLOCK = re.compile(r"clock_ms=(\d+);offset=(\d+);")
REJECT_BYTES_MAX = 256 << 10  # of a refused record that are kept: with its headers it must fit the broker's 1 MiB


def client_options(settings: KafkaSettings) -> dict[str, Any]:
    """Return what every client needs to reach the broker."""
    return {"bootstrap_servers": settings.bootstrap_servers, "retry_backoff_ms": _RETRY_BACKOFF_MS}


def transactional_id(settings: KafkaSettings, partition: TopicPartition) -> str:
    """Return the id under which a partition's outputs are committed; it fences a worker that had it before."""
    return f"{settings.group}-{partition.topic}-{partition.partition}"


def points_consumer(settings: KafkaSettings) -> AIOKafkaConsumer:
    """Return a consumer of the group, not started and not subscribed; offsets are committed by the producers."""
    return AIOKafkaConsumer(
        **client_options(settings),
        group_id=settings.group,
        group_instance_id=settings.instance or None,
        client_id=f"tocsin-{settings.instance or 'worker'}",
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        isolation_level="read_committed",
        max_partition_fetch_bytes=_FETCH_BYTES,
        session_timeout_ms=_SESSION_TIMEOUT_MS,
        heartbeat_interval_ms=_SESSION_TIMEOUT_MS // 4,
    )


def reader(settings: KafkaSettings, offset_reset: str = "earliest") -> AIOKafkaConsumer:
    """Return a consumer without a group that sees committed records only."""
    return AIOKafkaConsumer(
        **client_options(settings),
        enable_auto_commit=False,
        auto_offset_reset=offset_reset,
        isolation_level="read_committed",
    )


def transactional_producer(settings: KafkaSettings, partition: TopicPartition) -> AIOKafkaProducer:
    """Return the producer of a partition's outputs, not started."""
    return AIOKafkaProducer(
        **client_options(settings), transactional_id=transactional_id(settings, partition), linger_ms=0
    )


def points_producer(settings: KafkaSettings) -> AIOKafkaProducer:
    """Return a producer of points, not started: large batches, idempotent, so that a retry repeats nothing."""
    return AIOKafkaProducer(**client_options(settings), enable_idempotence=True, linger_ms=20, max_batch_size=256 << 10)


class Rebalance(ConsumerRebalanceListener):  # type: ignore[misc]
    """Calls two coroutine functions when partitions come and go."""

    def __init__(self, assigned: Any, revoked: Any) -> None:
        self._assigned = assigned
        self._revoked = revoked

    async def on_partitions_assigned(self, assigned: Sequence[TopicPartition]) -> None:
        """Take the partitions on."""
        await self._assigned(sorted(assigned))

    async def on_partitions_revoked(self, revoked: Sequence[TopicPartition]) -> None:
        """Let the partitions go."""
        await self._revoked(sorted(revoked))


class Clock(NamedTuple):
    """A time up to which silence was judged, and the offset before which all records had been taken in by then."""

    ms: int = 0
    offset: int = 0


def clock_metadata(clock: Clock) -> str:
    """Return a clock as it is committed with an offset."""
    return f"clock_ms={clock.ms};offset={clock.offset};"


async def committed_offset(consumer: AIOKafkaConsumer, at: TopicPartition) -> tuple[int | None, Clock]:
    """Return the committed offset of a partition, None without one, and the clock that was committed with it."""
    # The public `committed` returns the offset alone, and the admin client would be one more connection a partition.
    found = (await consumer._coordinator.fetch_committed_offsets([at])).get(at)
    if found is None or found.offset < 0:
        return None, Clock()
    clock = _CLOCK.fullmatch(found.metadata or "")
    return found.offset, Clock(int(clock[1]), int(clock[2])) if clock else Clock()


def read_up_to(consumer: AIOKafkaConsumer, at: TopicPartition) -> int | None:
    """Return when the broker last said that a partition holds nothing but what the consumer has handed out.

    In ms since 1970; None while something waits, or where nothing is known. It stands still while the broker cannot be
    reached, and does not wait for the markers of transactions, which are never handed out.
    """
    # Neither is there in public: `position` waits, and the two must be of one answer of the broker.
    assigned = consumer._subscription.subscription
    if assigned is None or assigned.assignment is None or at not in assigned.assignment.tps:
        return None
    state = assigned.assignment.state_value(at)
    if state.timestamp is None or not state.has_valid_position or state.position < state.highwater:
        return None
    return int(state.timestamp)
