"""What the tests of the live path share: settings, a worker on a real broker and store, and what it published."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping

from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition

from stream import backtest, events
from stream.events import Event
from stream.kafka import client_options, points_producer
from stream.points import Points
from stream.sample import generate
from stream.service import detector_factory, make_worker, use_one_thread
from stream.settings import KafkaSettings, Settings, load_settings
from stream.topics import ensure_topics
from stream.verify import end_offsets, expected, partition_of
from stream.worker import Worker

START_MS = 1_767_571_200_000  # a Monday
DEADLINE_S = 180.0  # a machine may be slow


def settings_for(bootstrap: str, redis_url: str, unique: str, **more: str) -> Settings:
    """Return settings with topics, group and keys of one test's own."""
    return load_settings(environment_for(bootstrap, redis_url, unique, **more))


def environment_for(bootstrap: str, redis_url: str, unique: str, **more: str) -> Mapping[str, str]:
    """Return the same as environment variables, for a process of its own."""
    return {
        "TOCSIN_KAFKA__BOOTSTRAP_SERVERS": bootstrap,
        "TOCSIN_KAFKA__GROUP": f"g.{unique}",
        "TOCSIN_KAFKA__POINTS_TOPIC": f"points.{unique}",
        "TOCSIN_KAFKA__ANOMALIES_TOPIC": f"anomalies.{unique}",
        "TOCSIN_KAFKA__REJECTS_TOPIC": f"rejects.{unique}",
        "TOCSIN_KAFKA__PARTITIONS": "3",
        "TOCSIN_REDIS__URL": redis_url,
        "TOCSIN_REDIS__PREFIX": f"tocsin-test-{unique}",
    } | more


@functools.cache
def sample_points(days: int = 14) -> Points:
    """Return some days of three KPIs, merged by time; of two weeks some 12,000 points with incidents in each.

    Three days have 2,400 points, an incident or two of each KPI, and one time when it is silent.
    """
    kinds = ("requests", "cpu", "memory")
    return backtest.sample_points([generate(days, 300, seed, START_MS, kind=kind) for seed, kind in enumerate(kinds)])


def backtested(points: Points, settings: Settings) -> list[Event]:
    """Return the events of a back-test, partition by partition: silence goes by what the others of one send.

    That of the same points and settings is computed once a process; names of topics and the like do not matter.
    """
    if settings.rules:  # a file, which may change
        return _backtested(points, settings)
    said_by = settings.model_dump_json(exclude={"kafka", "redis"}), settings.kafka.partitions, id(points)
    if said_by not in _KNOWN:
        _KNOWN[said_by] = points, _backtested(points, settings)  # the points too: another's must not get their id
    return [*_KNOWN[said_by][1]]


_KNOWN: dict[tuple[str, int, int], tuple[Points, list[Event]]] = {}


def _backtested(points: Points, settings: Settings) -> list[Event]:
    use_one_thread()
    partition = {name: partition_of(name, settings.kafka.partitions) for name in points.names}
    return expected(points, partition, detector_factory(settings))


def digest(published: Iterable[Event]) -> str:
    """Return the SHA-256 of events, those of one KPI in their order; between KPIs (partitions) there is none."""
    lines = sorted(published, key=lambda event: event.subject)
    return hashlib.sha256(b"\n".join(events.encode(event) for event in lines)).hexdigest()


@contextlib.asynccontextmanager
async def working(settings: Settings) -> AsyncIterator[Worker]:
    """Run a worker for the length of the block; it ends as on SIGTERM."""
    worker = make_worker(settings)
    task = asyncio.create_task(worker.run())
    try:
        assigned = asyncio.create_task(worker.assigned.wait())
        await asyncio.wait((task, assigned), return_when=asyncio.FIRST_COMPLETED, timeout=DEADLINE_S)
        assigned.cancel()
        if task.done():
            task.result()
        yield worker
    finally:
        worker.stop()
        try:
            await task
        finally:
            await worker.store.close()


async def make_topics(kafka: KafkaSettings) -> None:
    """Make the topics of a service that is not there yet."""
    topics = (kafka.points_topic, kafka.anomalies_topic, kafka.rejects_topic, kafka.shadow_topic)
    await ensure_topics(kafka, dict.fromkeys(topics, kafka.partitions))


async def send(
    settings: KafkaSettings, points: Iterable[tuple[str, int, float]], *, arrived_ms: int | None = None
) -> None:
    """Send points (KPI, event time in ms, value), with another time of arrival than now if need be."""
    producer = points_producer(settings)
    await producer.start()
    try:
        for kpi, timestamp_ms, value in points:
            record = json.dumps({"kpi": kpi, "timestamp": timestamp_ms, "value": value}).encode()
            await producer.send_and_wait(settings.points_topic, record, key=kpi.encode(), timestamp_ms=arrived_ms)
    finally:
        await producer.stop()


async def until(condition: Callable[[], bool] | Callable[[], Awaitable[bool]], what: str) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        found = condition()
        if await found if isinstance(found, Awaitable) else found:
            return
        assert time.monotonic() < deadline, f"not within {DEADLINE_S:g} s: {what}"
        await asyncio.sleep(0.05)


async def until_committed(settings: KafkaSettings, total: int) -> int:
    """Return how many points the group has committed, once it is so many, whoever the worker is."""
    consumer = AIOKafkaConsumer(**client_options(settings), group_id=settings.group, enable_auto_commit=False)
    await consumer.start()
    try:
        at = [TopicPartition(settings.points_topic, p) for p in range(settings.partitions)]
        async with asyncio.timeout(DEADLINE_S):
            while (committed := sum([await consumer.committed(one) or 0 for one in at])) < total:
                await asyncio.sleep(0.02)
        return committed
    finally:
        await consumer.stop()


async def read_all(settings: KafkaSettings, topic: str) -> list[ConsumerRecord]:
    """Return all committed records of a topic."""
    consumer = AIOKafkaConsumer(
        **client_options(settings),
        enable_auto_commit=False,
        isolation_level="read_committed",
        auto_offset_reset="earliest",
    )
    await consumer.start()
    try:
        at = [
            TopicPartition(topic, p)
            for p in sorted(consumer.partitions_for_topic(topic) or await _wait(consumer, topic))
        ]
        consumer.assign(at)
        await consumer.seek_to_beginning(*at)
        ends = await end_offsets(settings, topic)
        records: list[ConsumerRecord] = []
        async with asyncio.timeout(DEADLINE_S):
            while any([await consumer.position(one) < ends[one.partition] for one in at]):
                for batch in (await consumer.getmany(timeout_ms=100)).values():
                    records += batch
        return records
    finally:
        await consumer.stop()


async def _wait(consumer: AIOKafkaConsumer, topic: str) -> set[int]:
    consumer.subscribe([topic])
    async with asyncio.timeout(DEADLINE_S):
        while not (partitions := consumer.partitions_for_topic(topic)):
            await asyncio.sleep(0.05)
    consumer.unsubscribe()
    return set(partitions)


async def published(settings: KafkaSettings) -> list[Event]:
    """Return all committed events."""
    return [events.decode(record.value) for record in await read_all(settings, settings.anomalies_topic)]
