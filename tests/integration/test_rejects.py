"""Bad records between good ones: each comes out on the reject topic, once, and changes nothing else."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from aiokafka import AIOKafkaProducer, ConsumerRecord

from stream.kafka import client_options
from stream.outputs import REJECT_BYTES_MAX
from stream.points import Points
from stream.sample import generate
from stream.settings import KafkaSettings, Settings
from stream.topics import ensure_topics
from tests.live import (
    START_MS,
    backtested,
    digest,
    published,
    read_all,
    settings_for,
    until_committed,
    working,
)

KPI = "checkout.requests"
DAY_MS = 86_400_000
HUGE = b'{"kpi": "' + b"x" * 900_000 + b'"}'


@dataclass(frozen=True)
class Bad:
    value: bytes | None
    reason: str


def point(timestamp: object, value: object, kpi: object = KPI) -> bytes:
    return json.dumps({"kpi": kpi, "timestamp": timestamp, "value": value}).encode()


def bad_records() -> list[Bad]:
    now_ms = int(time.time() * 1000)
    at = START_MS + DAY_MS  # inside of the good stream
    return [
        Bad(b"{", "not_json"),
        Bad(b'{"kpi": "a", "timestamp": 1', "not_json"),
        Bad(b"hello", "not_json"),
        Bad(b'{"kpi": "\xff\xfe", "timestamp": 1, "value": 1}', "not_utf8"),
        Bad(b"\x80\x81\x82", "not_utf8"),
        Bad(b"", "empty"),
        Bad(None, "empty"),
        Bad(b"[]", "wrong_type"),
        Bad(b"17", "wrong_type"),
        Bad(b'{"kpi": "a", "timestamp": 1469376000}', "wrong_type"),
        Bad(b'{"kpi": "a", "value": 1}', "wrong_type"),
        Bad(point(at, "0.84"), "wrong_type"),
        Bad(point(at, [1]), "wrong_type"),
        Bad(point(at, True), "wrong_type"),
        Bad(point({}, 1), "wrong_type"),
        Bad(b'{"entity": "e", "timestamp": 1469376000}', "wrong_type"),
        Bad(b'{"timestamp": 1469376000, "value": 1}', "bad_name"),
        Bad(point(at, 1, ""), "bad_name"),
        Bad(point(at, 1, "a\nb"), "bad_name"),
        Bad(point(at, 1, "x" * 1000), "bad_name"),
        Bad(point(-5, 1), "bad_timestamp"),
        Bad(point("yesterday", 1), "bad_timestamp"),
        Bad(point(10**15, 1), "bad_timestamp"),  # microseconds
        Bad(point(1e300, 1), "bad_timestamp"),
        Bad(b'{"kpi": "a", "timestamp": NaN, "value": 1}', "bad_timestamp"),
        Bad(point(at, 1e308), "bad_value"),
        Bad(b'{"kpi": "a", "timestamp": 1469376000, "value": Infinity}', "bad_value"),
        Bad(b'{"kpi": "a", "timestamp": 1469376000, "value": -Infinity}', "bad_value"),
        Bad(point(now_ms + DAY_MS, 1), "in_the_future"),
        Bad(HUGE, "too_large"),
        Bad(point(START_MS - 10 * DAY_MS, 1), "too_late"),
        Bad(point(0, 1), "too_late"),
    ]


def good_points() -> Points:
    """Return a week of one KPI, with a repeated point, a late one and a null in it."""
    made = generate(7, 300, 7, START_MS)
    order = np.arange(len(made.value))
    order = np.r_[order[:300], 298, order[300:]]  # a duplicate, late by two
    order[[700, 701]] = order[[701, 700]]  # unsorted
    value = made.value[order].copy()
    value[900] = np.nan
    return Points(
        (KPI,),
        made.timestamp_ms[order],
        np.zeros(len(order), np.int32),
        value,
        np.full(len(order), -1, np.int8),
    )


POINTS = good_points()


def mixed() -> list[Bad | bytes]:
    """Return the good points with the bad ones strewn in; those that are too late need a window before them."""
    records: list[Bad | bytes] = [
        point(t, None if np.isnan(x) else x)
        for t, x in zip(POINTS.timestamp_ms.tolist(), POINTS.value.tolist(), strict=True)
    ]
    bad = bad_records()
    places = np.sort(np.random.default_rng(0).integers(200, len(records), len(bad)))
    for place, record in reversed(list(zip(places.tolist(), bad, strict=True))):
        records.insert(place, record)
    return records


async def send(kafka: KafkaSettings, records: Sequence[Bad | bytes]) -> None:
    producer = AIOKafkaProducer(**client_options(kafka))
    await producer.start()
    try:
        for record in records:
            value = record.value if isinstance(record, Bad) else record
            await producer.send(kafka.points_topic, value, key=b"the key", partition=0)
        await producer.flush()
    finally:
        await producer.stop()


def said(record: ConsumerRecord, name: str) -> str:
    return str(next(value for header, value in record.headers if header == name), "utf-8")


def check_rejects(rejects: Sequence[ConsumerRecord], records: Sequence[Bad | bytes], topic: str) -> None:
    expected = [(offset, record) for offset, record in enumerate(records) if isinstance(record, Bad)]
    assert [(int(said(r, "tocsin-offset")), said(r, "tocsin-reason")) for r in rejects] == [
        (offset, bad.reason) for offset, bad in expected
    ]
    for reject, (_, bad) in zip(rejects, expected, strict=True):
        original = bad.value or b""
        assert reject.value == original[:REJECT_BYTES_MAX]
        assert reject.key == b"the key"
        assert (said(reject, "tocsin-topic"), said(reject, "tocsin-partition")) == (topic, "0")
        assert 5 < len(said(reject, "tocsin-detail")) <= 1000, "a sentence for a person"
        cut = [value for header, value in reject.headers if header == "tocsin-truncated-from"]
        assert cut == ([str(len(original)).encode()] if len(original) > REJECT_BYTES_MAX else [])


def one_partition(broker: str, redis_url: str, unique: str) -> Settings:
    more = {"TOCSIN_KAFKA__PARTITIONS": "1", "TOCSIN_WARMUP_H": "6"}
    return settings_for(broker, redis_url, unique, **more)


async def test_each_is_told_with_its_reason_and_the_events_stay_the_same(
    broker: str, redis_url: str, unique: str
) -> None:
    settings, records = one_partition(broker, redis_url, unique), mixed()
    kafka = settings.kafka
    async with working(settings) as worker:
        await send(kafka, records)
        await until_committed(kafka, len(records))
        (partition,) = worker.partitions.values()
        assert partition.rejected == len(bad_records())
    check_rejects(await read_all(kafka, kafka.rejects_topic), records, kafka.points_topic)
    expected = backtested(POINTS, settings)
    assert len(expected) >= 2
    assert digest(await published(kafka)) == digest(expected)


@pytest.mark.parametrize("state", ["kept", "lost"])
async def test_each_is_told_once_whatever_restarts(broker: str, redis_url: str, unique: str, state: str) -> None:
    settings, records = one_partition(broker, redis_url, unique), mixed()
    kafka, half = settings.kafka, len(records) // 2
    await ensure_topics(broker, {kafka.points_topic: 1})
    async with working(settings) as first:
        await send(kafka, records[:half])
        await until_committed(kafka, half)
        (at,) = first.partitions
    if state == "lost":
        async with working(settings) as between:
            await between.store.drop(kafka.group, at.topic, at.partition)
    async with working(settings):
        await send(kafka, records[half:])
        await until_committed(kafka, len(records))
    check_rejects(await read_all(kafka, kafka.rejects_topic), records, kafka.points_topic)
    assert digest(await published(kafka)) == digest(backtested(POINTS, settings))


@pytest.fixture(autouse=True)
def _quiet_logs(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("WARNING")
