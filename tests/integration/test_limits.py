"""Bounds on what comes from Kafka: batches that unpack to more than is taken, and more series than there are places."""

from __future__ import annotations

import pytest
from aiokafka import AIOKafkaProducer

from stream.batches import UNPACKED_BYTES_MAX
from stream.kafka import client_options
from stream.settings import KafkaSettings, Settings
from stream.store import CLOCK_FIELD
from tests.live import START_MS, read_all, send, settings_for, until, until_committed, working

HOUR_MS = 3_600_000
RECORD_BYTES = 1 << 20


def settings_of(broker: str, redis_url: str, unique: str, **more: str) -> Settings:
    more = {"TOCSIN_KAFKA__PARTITIONS": "1", "TOCSIN_REDIS__FLUSH_INTERVAL_S": "0.1", **more}
    return settings_for(broker, redis_url, unique, **more)


async def send_bomb(kafka: KafkaSettings) -> int:
    """Send one batch that unpacks to more than is taken; return how many records it has."""
    count = UNPACKED_BYTES_MAX // RECORD_BYTES + 1
    producer = AIOKafkaProducer(
        **client_options(kafka), compression_type="gzip", max_batch_size=2 * UNPACKED_BYTES_MAX, linger_ms=0
    )
    await producer.start()
    try:
        batch = producer.create_batch()
        for _ in range(count):
            assert batch.append(key=None, value=bytes(RECORD_BYTES), timestamp=None) is not None
        batch.close()
        await (await producer.send_batch(batch, kafka.points_topic, partition=0))
    finally:
        await producer.stop()
    return count


async def test_a_batch_that_unpacks_to_too_much_is_one_reject(broker: str, redis_url: str, unique: str) -> None:
    settings = settings_of(broker, redis_url, unique)
    kafka = settings.kafka
    async with working(settings) as worker:
        await send(kafka, [("a", START_MS, 1.0)])
        count = await send_bomb(kafka)
        await send(kafka, [("a", START_MS + 60_000, 1.0)])
        await until_committed(kafka, count + 2)
        (partition,) = worker.partitions.values()
        assert partition.rejected == 1
        assert partition.detector.counts.points == 2, "what lies behind it is read"
    (reject,) = await read_all(kafka, kafka.rejects_topic)
    said = dict(reject.headers)
    assert (said["tocsin-reason"], said["tocsin-offset"]) == (b"bad_batch", b"1")
    assert f"offsets 1 to {count}".encode() in said["tocsin-detail"]
    assert b"unpacks to more than 67,108,864 bytes" in said["tocsin-detail"]


@pytest.mark.kafka
async def test_from_the_middle_of_such_a_batch_it_goes_on_behind_it(kafka: str, redis_url: str, unique: str) -> None:
    settings = settings_of(kafka, redis_url, unique)
    async with working(settings):
        count = await send_bomb(settings.kafka)
        await until_committed(settings.kafka, 1)  # its one reject: the next worker begins within the batch
    async with working(settings) as worker:
        await send(settings.kafka, [("a", START_MS, 1.0)])
        await until_committed(settings.kafka, count + 1)
        (partition,) = worker.partitions.values()
        assert partition.detector.counts.points == 1
    assert len(await read_all(settings.kafka, settings.kafka.rejects_topic)) == 1


async def test_a_series_without_a_place_is_refused_and_the_store_forgets_who_gave_theirs(
    embedded_broker: str, redis_url: str, unique: str
) -> None:
    settings = settings_of(embedded_broker, redis_url, unique, TOCSIN_SERIES_MAX="2", TOCSIN_SERIES_IDLE_H="1")
    kafka = settings.kafka

    async def stored() -> set[bytes]:
        state = await worker.store.load(kafka.group, kafka.points_topic, 0)
        return set(state.blobs) - {CLOCK_FIELD} if state is not None else set()

    async def holds(*names: bytes) -> bool:
        return await stored() == set(names)

    async with working(settings) as worker:
        await send(kafka, [("a", START_MS, 1.0), ("b", START_MS, 1.0), ("b", START_MS + 2 * HOUR_MS, 1.0)])
        await until(lambda: holds(b"a", b"b"), "both have their state stored")
        await send(kafka, [("c", START_MS + 2 * HOUR_MS, 1.0), ("d", START_MS + 2 * HOUR_MS, 1.0)])
        await until(lambda: holds(b"b", b"c"), "c has taken the place of a")
    async with working(settings) as worker:
        await send(kafka, [("a", START_MS + 2 * HOUR_MS, 1.0), ("c", START_MS + 4 * HOUR_MS, 1.0)])
        await send(kafka, [("a", START_MS + 4 * HOUR_MS, 1.0)])
        await until(lambda: holds(b"a", b"c"), "a has taken the place of b")
    refused = [dict(reject.headers) for reject in await read_all(kafka, kafka.rejects_topic)]
    assert [(said["tocsin-reason"], said["tocsin-offset"]) for said in refused] == [
        (b"too_many_series", b"4"),
        (b"too_many_series", b"5"),
    ]
    assert b"'d'" in refused[0]["tocsin-detail"]
