"""`tocsin doctor` on real brokers: what it says of a topic, and that it leaves no trace."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient

from stream.errors import BrokerError, TocsinError
from stream.policy import Policy
from stream.settings import KafkaSettings
from stream.tail import Extent, read_tail
from stream.topics import ensure_topics
from tests.e2e.program import tocsin
from tests.unit.test_doctor import MINUTE, T0, Sent, entity, point, regular

HOUR_MS = 3_600_000


async def send(broker: str, topic: str, records: Sequence[Sent], *, partitions: int = 3) -> None:
    await ensure_topics(broker, {topic: partitions})
    producer = AIOKafkaProducer(bootstrap_servers=broker, linger_ms=20)
    await producer.start()
    try:
        for one in records:
            arrival_ms = one.timestamp if one.timestamp > 0 else None
            await producer.send(topic, one.value, key=one.key, partition=one.partition, timestamp_ms=arrival_ms)
        await producer.flush()
    finally:
        await producer.stop()


async def read(broker: str, topic: str, **options: Any) -> tuple[Extent, list[Any]]:
    got: list[Any] = []
    settings = KafkaSettings(bootstrap_servers=broker, connect_timeout_s=20)
    extent = await read_tail(settings, topic, on_records=got.extend, **{"records": 1000} | options)
    return extent, got


def now_ms() -> int:
    return int(time.time() * 1000)


def poorly() -> list[Sent]:
    """Return a topic with something of each kind."""
    records = regular("checkout.latency", 200, 10_000)
    for i in (100, 150):
        records.insert(i, point("checkout.latency", T0 + i * 10_000 - 52_000))
    records += regular("checkout.errors", 200, 10_000)
    records += [point("db.qps", T0 + i * MINUTE, i, partition=i % 2, key=None) for i in range(100)]
    records += [
        entity("web-1", f"2026-01-05T0{i // 60}:{i % 60:02}:00Z", {"cpu": i, "up": 1}, partition=2) for i in range(100)
    ]
    return [*records, Sent(b"{", partition=2), point("db.qps", "yesterday")]


async def test_the_report_the_rules_and_the_document(broker: str, topic: str, tmp_path: Path) -> None:
    await send(broker, topic, poorly())
    more = {"TOCSIN_KAFKA__BOOTSTRAP_SERVERS": broker}
    done = await asyncio.to_thread(tocsin, tmp_path, "doctor", topic, more=more)
    said = done.stderr
    assert f"{topic} at {broker}: 604 records of 3 partitions" in said
    assert "3 KPIs and 1 entity, 702 values" in said
    assert "1 record would be refused as bad_timestamp, the first at offset" in said
    assert "1 series is seen in more than one partition (db.qps in 0, 1)" in said
    assert "2 of 402 records of checkout.latency come up to 42 s late: lateness: 45s" not in said
    assert "2 of 202 records of checkout.latency come up to 42 s late: lateness: 45s" in said
    assert "1 series never changes (web-1 (up))" in said
    assert "  - match: 'checkout.*'\n    name: checkout\n    interval: 10s\n" in done.stdout
    assert "    lateness: 45s\n" in done.stdout

    answer = await asyncio.to_thread(tocsin, tmp_path, "doctor", topic, "--json", more=more)
    document = json.loads(answer.stdout)
    assert answer.stderr == said
    assert document["records"] == 604 and document["refused"] == 2
    series = {one["name"]: one for one in document["series"]}
    assert series["checkout.latency"]["interval_ms"] == 10_000 and series["checkout.latency"]["late"] == 2
    assert series["web-1"]["kind"] == "entity" and series["web-1"]["metrics"] == {"cpu": 1.0, "up": 1.0}
    assert {one["reason"] for one in document["rejects"]} == {"bad_timestamp", "not_json"}
    assert {one["level"] for one in document["findings"]} == {"problem", "warning", "note"}
    assert [rule["name"] for rule in document["rules"]] == ["db.qps", "web-1", "checkout", "others"]

    module = pytest.importorskip("stream.rules")
    for text in (done.stdout, json.dumps({"rules": document["rules"]})):
        ruleset = module.parse_rules(text, source="proposed.yaml", base=tmp_path, defaults=Policy())
        assert [rule.policy.lateness_ms for rule in ruleset.rules] == [0, 0, 45_000, 0]


async def test_it_leaves_no_trace(broker: str, topic: str, tmp_path: Path) -> None:
    await send(broker, topic, regular("a", 20))

    async def groups_and_topics() -> tuple[list[Any], list[str]]:
        admin = AIOKafkaAdminClient(bootstrap_servers=broker)
        await admin.start()
        try:
            return sorted(await admin.list_consumer_groups()), sorted(await admin.list_topics())
        finally:
            await admin.close()

    before = await groups_and_topics()
    more = {"TOCSIN_KAFKA__BOOTSTRAP_SERVERS": broker}
    await asyncio.to_thread(tocsin, tmp_path, "doctor", topic, more=more)
    done = await asyncio.to_thread(tocsin, tmp_path, "doctor", f"{topic}s", more=more, code=1)
    assert done.stderr == (
        f"tocsin: there is no topic {topic}s at {broker}, or you may not see it; did you mean {topic}?\n"
    )
    assert done.stdout == ""
    assert await groups_and_topics() == before


async def test_an_empty_topic_is_said(broker: str, topic: str, tmp_path: Path) -> None:
    await ensure_topics(broker, {topic: 2})
    more = {"TOCSIN_KAFKA__BOOTSTRAP_SERVERS": broker, "TOCSIN_KAFKA__POINTS_TOPIC": topic}
    done = await asyncio.to_thread(tocsin, tmp_path, "doctor", more=more, code=1)
    assert f"topic {topic} at {broker} holds no records" in done.stderr


async def test_a_topic_without_a_single_point_has_findings_and_no_rules(
    embedded_broker: str, topic: str, tmp_path: Path
) -> None:
    await send(embedded_broker, topic, [Sent(b"{"), Sent(b"hello")])
    more = {"TOCSIN_KAFKA__BOOTSTRAP_SERVERS": embedded_broker}
    done = await asyncio.to_thread(tocsin, tmp_path, "doctor", topic, more=more)
    assert done.stdout == "" and "2 records would be refused as not_json" in done.stderr
    done = await asyncio.to_thread(tocsin, tmp_path, "doctor", topic, "--json", more=more)
    assert json.loads(done.stdout)["series"] == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["t", "--records", "0"], "--records 0: must be at least 1"),
        (["t", "--records", "many"], "--records"),
        (["t", "--since", "5"], "--since 5: has no unit"),
        (["t", "--since", "yesterday"], "--since yesterday"),
        (["t", "--bogus"], "No such option"),
        (["t"], "no `tocsin up` is running"),
    ],
)
def test_wrong_arguments(tmp_path: Path, arguments: list[str], said: str) -> None:
    done = tocsin(tmp_path, "doctor", *arguments, code=2)
    assert said in done.stderr.splitlines()[-1] and done.stdout == ""


async def test_the_last_records_of_each_partition(broker: str, topic: str) -> None:
    records = [point("a", T0 + i * MINUTE, i, partition=i % 2) for i in range(100)]
    await send(broker, topic, [*records, *regular("b", 3, partition=2)], partitions=4)
    extent, got = await read(broker, topic, records=20)
    assert (extent.partitions, extent.offsets, extent.left_out) == (4, 43, 0)
    by_partition = {p: [one.offset for one in got if one.partition == p] for p in range(4)}
    assert by_partition == {0: [*range(30, 50)], 1: [*range(30, 50)], 2: [0, 1, 2], 3: []}


async def test_what_came_in_the_last_hour(broker: str, topic: str) -> None:
    begin = now_ms() - 100 * MINUTE
    records = [point("a", begin + i * MINUTE, i, timestamp=begin + i * MINUTE) for i in range(100)]
    await send(broker, topic, records, partitions=2)
    extent, got = await read(broker, topic, since_ms=begin + 40 * MINUTE)
    assert [one.offset for one in got] == [*range(40, 100)] and extent.left_out == 0
    extent, got = await read(broker, topic, since_ms=begin + 40 * MINUTE, records=10)
    assert [one.offset for one in got] == [*range(90, 100)] and extent.left_out == 50
    with pytest.raises(TocsinError, match="no records in that time: try a longer --since"):
        await read(broker, topic, since_ms=now_ms() + HOUR_MS)


async def test_what_a_transaction_gave_up_is_not_read(broker: str, topic: str, unique: str) -> None:
    await ensure_topics(broker, {topic: 1})
    producer = AIOKafkaProducer(bootstrap_servers=broker, transactional_id=unique)
    await producer.start()
    try:
        for commit in (True, False, True, False):  # the last offsets hold no record that could be read
            await producer.begin_transaction()
            await producer.send_and_wait(topic, b"yes" if commit else b"no")
            await (producer.commit_transaction if commit else producer.abort_transaction)()
    finally:
        await producer.stop()
    _, got = await read(broker, topic)
    assert [one.value for one in got] == [b"yes", b"yes"]


async def test_a_topic_that_grows_meanwhile_comes_to_an_end(embedded_broker: str, topic: str) -> None:
    await send(embedded_broker, topic, regular("a", 50))
    extent, got = await read(embedded_broker, topic)
    growing = asyncio.create_task(send(embedded_broker, topic, regular("a", 5000)))
    again, more = await read(embedded_broker, topic, records=100_000)
    await growing
    assert len(got) == extent.offsets == 50
    assert [one.offset for one in more] == [*range(again.offsets)]


async def test_an_absent_broker_is_said(unused_port: int) -> None:
    settings = KafkaSettings(bootstrap_servers=f"127.0.0.1:{unused_port}", connect_timeout_s=0.5)
    with pytest.raises(BrokerError, match="TOCSIN_KAFKA__BOOTSTRAP_SERVERS"):
        await read_tail(settings, "t", records=1, on_records=lambda records: None)
