"""Points that librdkafka has packed with each of Kafka's codecs."""

from __future__ import annotations

import json

import confluent_kafka

from stream.topics import ensure_topics
from tests.live import (
    backtested,
    digest,
    published,
    read_all,
    sample_points,
    settings_for,
    until_committed,
    working,
)

CODECS = ("none", "gzip", "snappy", "lz4", "zstd")
POINTS = sample_points(3)
CHUNK = 200  # points of one codec, after which the next takes its turn


def send_packed(bootstrap: str, topic: str) -> None:
    producers = [
        confluent_kafka.Producer(
            {"bootstrap.servers": bootstrap, "compression.type": codec, "linger.ms": 20, "partitioner": "murmur2"}
        )
        for codec in CODECS
    ]
    for number, begin in enumerate(range(0, len(POINTS.value), CHUNK)):
        producer, chunk = producers[number % len(CODECS)], slice(begin, begin + CHUNK)
        columns = (POINTS.kpi[chunk], POINTS.timestamp_ms[chunk], POINTS.value[chunk])
        for kpi, timestamp_ms, value in zip(*(column.tolist() for column in columns), strict=True):
            name = POINTS.names[kpi]
            producer.produce(topic, json.dumps({"kpi": name, "timestamp": timestamp_ms, "value": value}), name)
        assert producer.flush(30) == 0


async def test_points_packed_by_any_codec_give_the_events_of_plain_ones(
    broker: str, redis_url: str, unique: str
) -> None:
    settings = settings_for(broker, redis_url, unique)
    kafka = settings.kafka
    await ensure_topics(kafka, {kafka.points_topic: kafka.partitions})
    async with working(settings):
        send_packed(broker, kafka.points_topic)
        await until_committed(kafka, len(POINTS.value))
    assert not await read_all(kafka, kafka.rejects_topic)
    assert digest(await published(kafka)) == digest(backtested(POINTS, settings))
