"""What the worker relies on, of every broker: the embedded one and a real Kafka."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.errors import ProducerFenced
from aiokafka.structs import ConsumerRecord, OffsetAndMetadata

from stream.embedded import is_embedded_broker
from stream.errors import BrokerError, ConfigError
from stream.settings import KafkaSettings
from stream.topics import ensure_topics, why_unreachable
from tests.servers import KafkaServer, why_no_kafka

# A transaction right behind another is told to come again; by default aiokafka then waits 100 ms.
OPTIONS = {"retry_backoff_ms": 20}
END_S = 20.0


@asynccontextmanager
async def producing(broker: str, transactional_id: str | None = None) -> AsyncIterator[AIOKafkaProducer]:
    producer = AIOKafkaProducer(bootstrap_servers=broker, transactional_id=transactional_id, **OPTIONS)
    await producer.start()
    try:
        yield producer
    finally:
        await producer.stop()


@asynccontextmanager
async def consuming(broker: str, *at: TopicPartition, group: str | None = None) -> AsyncIterator[AIOKafkaConsumer]:
    consumer = AIOKafkaConsumer(
        bootstrap_servers=broker,
        group_id=group,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        isolation_level="read_committed",
        **OPTIONS,
    )
    await consumer.start()
    try:
        consumer.assign(at)
        yield consumer
    finally:
        await consumer.stop()


async def read(consumer: AIOKafkaConsumer, count: int) -> list[bytes]:
    """Return the values of the next records, `count` of them and whatever comes with them."""
    values: list[bytes] = []
    async with asyncio.timeout(END_S):
        while len(values) < count:
            for records in (await consumer.getmany(timeout_ms=50)).values():
                values += [record.value for record in records]
    return values


async def nothing_more(consumer: AIOKafkaConsumer) -> bool:
    return not await consumer.getmany(timeout_ms=300)


async def crash(producer: AIOKafkaProducer) -> None:
    """End a producer as kill -9 does: its connections close, and the broker hears nothing of its transaction."""
    producer._closed = True
    await producer._sender.close()
    await producer.client.close()
    waiter = producer._txn_manager._transaction_waiter
    if waiter.done():
        waiter.exception()  # of a fenced producer: nobody waits for it, and asyncio says so when it is collected


async def test_topics_are_created_once(broker: str, topic: str) -> None:
    other = f"{topic}.other"
    assert await ensure_topics(broker, {topic: 3, other: 1}) == {topic: 3, other: 1}
    assert await ensure_topics(broker, {topic: 6}) == {topic: 3}, "a topic that exists keeps its partitions"
    assert await ensure_topics(broker, {}) == {}


async def test_workers_that_start_together_may_all_create_the_topics(broker: str, topic: str) -> None:
    made = await asyncio.gather(*(ensure_topics(broker, {topic: 4}) for _ in range(5)))
    assert made == [{topic: 4}] * 5


async def test_a_refused_topic_is_explained_at_once(broker: str, topic: str) -> None:
    started = time.monotonic()
    with pytest.raises(BrokerError, match=f"refuses to create topic {topic}: .*[Rr]eplica"):
        await ensure_topics(broker, {topic: 1}, replication_factor=7)
    assert time.monotonic() - started < 5


async def test_why_unreachable_has_nothing_to_say_of_a_broker_that_answers(broker: str) -> None:
    assert await why_unreachable(broker) == (False, "")


async def test_records_keep_key_headers_and_order(broker: str, topic: str) -> None:
    await ensure_topics(broker, {topic: 1})
    headers = [("content-type", b"application/json"), ("empty", b"")]
    async with producing(broker) as producer:
        for n in range(100):
            await producer.send(topic, b"%d" % n, key=b"kpi \xc3\xa9", headers=headers)
        await producer.flush()
    async with consuming(broker, TopicPartition(topic, 0)) as consumer:
        records: list[ConsumerRecord] = []
        async with asyncio.timeout(END_S):
            while len(records) < 100:
                records += [r for batch in (await consumer.getmany(timeout_ms=50)).values() for r in batch]
    assert [int(record.value) for record in records] == list(range(100))
    assert [record.offset for record in records] == list(range(100))
    assert records[0].key == b"kpi \xc3\xa9"
    assert records[0].headers == tuple(headers)


async def test_records_with_old_timestamps_stay(broker: str, topic: str) -> None:
    await ensure_topics(broker, {topic: 1}, configs={"retention.ms": "-1"})
    async with producing(broker) as producer:
        await producer.send_and_wait(topic, b"1970", timestamp_ms=1)
        await asyncio.sleep(1.5)  # the embedded broker looks once a second
    async with consuming(broker, TopicPartition(topic, 0)) as consumer:
        assert await read(consumer, 1) == [b"1970"]


async def test_seek_to_an_offset_and_to_both_ends(broker: str, topic: str) -> None:
    await ensure_topics(broker, {topic: 1})
    at = TopicPartition(topic, 0)
    async with producing(broker) as producer:
        for n in range(10):
            await producer.send_and_wait(topic, b"%d" % n)
    async with consuming(broker, at) as consumer:
        assert await consumer.beginning_offsets([at]) == {at: 0}
        assert await consumer.end_offsets([at]) == {at: 10}
        assert await read(consumer, 10) == [b"%d" % n for n in range(10)]
        consumer.seek(at, 7)
        assert await read(consumer, 3) == [b"7", b"8", b"9"]
        await consumer.seek_to_beginning(at)
        assert (await read(consumer, 10))[0] == b"0"
        consumer.seek(at, 99)  # beyond the end: back to the earliest
        assert (await read(consumer, 10))[0] == b"0"


async def test_commit_makes_records_and_offsets_visible_together(broker: str, topic: str, group: str) -> None:
    await ensure_topics(broker, {topic: 1})
    at = TopicPartition(topic, 0)
    async with (
        producing(broker, f"{group}-0") as producer,
        consuming(broker, at) as reader,
        consuming(broker, at, group=group) as member,
    ):
        await producer.begin_transaction()
        await producer.send_and_wait(topic, b"one")
        await producer.send_offsets_to_transaction({at: OffsetAndMetadata(5, "clock=17")}, group)
        assert await nothing_more(reader)
        await producer.commit_transaction()
        assert await read(reader, 1) == [b"one"]
        assert await committed(member, at, 5) == 5


async def committed(consumer: AIOKafkaConsumer, at: TopicPartition, expected: int | None) -> int | None:
    """Return the committed offset, `expected` if it becomes so: a broker may apply a commit after it has answered."""
    deadline = time.monotonic() + 5
    while True:
        offset: int | None = await consumer.committed(at)
        if offset == expected or time.monotonic() > deadline:
            return offset
        await asyncio.sleep(0.02)


async def test_abort_makes_neither_visible(broker: str, topic: str, group: str) -> None:
    await ensure_topics(broker, {topic: 1})
    at = TopicPartition(topic, 0)
    async with (
        producing(broker, f"{group}-0") as producer,
        consuming(broker, at) as reader,
        consuming(broker, at, group=group) as member,
    ):
        await producer.begin_transaction()
        await producer.send_and_wait(topic, b"one")
        await producer.send_offsets_to_transaction({at: 5}, group)
        await producer.abort_transaction()
        assert await nothing_more(reader)
        assert await member.committed(at) is None


async def test_a_second_producer_of_an_id_fences_the_first(broker: str, topic: str, group: str) -> None:
    await ensure_topics(broker, {topic: 1})
    at = TopicPartition(topic, 0)
    zombie = AIOKafkaProducer(bootstrap_servers=broker, transactional_id=group, **OPTIONS)
    await zombie.start()
    try:
        await zombie.begin_transaction()
        await zombie.send_and_wait(topic, b"zombie")
        async with producing(broker, group) as successor:
            async with successor.transaction():
                await successor.send_and_wait(topic, b"successor")
            with pytest.raises(ProducerFenced):
                await zombie.send_offsets_to_transaction({at: 1}, group)
                await zombie.commit_transaction()
    finally:
        await crash(zombie)
    async with consuming(broker, at) as consumer:
        assert await read(consumer, 1) == [b"successor"]
        assert await nothing_more(consumer)


async def test_a_transaction_that_a_crash_left_open_ends_when_its_id_starts_again(
    broker: str, topic: str, group: str
) -> None:
    await ensure_topics(broker, {topic: 1})
    at = TopicPartition(topic, 0)
    crashed = AIOKafkaProducer(bootstrap_servers=broker, transactional_id=group, **OPTIONS)
    await crashed.start()
    await crashed.begin_transaction()
    await crashed.send_and_wait(topic, b"lost")
    await crashed.send_offsets_to_transaction({at: 1}, group)
    await crash(crashed)
    async with consuming(broker, at) as reader, consuming(broker, at, group=group) as member:
        async with producing(broker) as other:
            await other.send_and_wait(topic, b"behind it")
        assert await nothing_more(reader), "an open transaction hides what comes after it"
        async with producing(broker, group):
            assert await read(reader, 1) == [b"behind it"]
            assert await member.committed(at) is None


async def test_commits_after_an_abort_are_seen_one_by_one(broker: str, topic: str, group: str) -> None:
    """The bug that `patch_aborted_transactions` mends, and that it hides nothing of other brokers' aborts."""
    await ensure_topics(broker, {topic: 1})
    async with producing(broker, group) as producer, consuming(broker, TopicPartition(topic, 0)) as reader:
        seen: list[bytes] = []
        expected: list[bytes] = []
        for n in range(12):
            await producer.begin_transaction()
            await producer.send_and_wait(topic, b"%d" % n)
            if n % 3 == 1:
                await producer.abort_transaction()
                continue
            await producer.commit_transaction()
            expected.append(b"%d" % n)
            seen += await read(reader, 1)
        assert seen == expected
    async with consuming(broker, TopicPartition(topic, 0)) as late:
        assert await read(late, len(expected)) == expected


async def test_a_group_shares_partitions_and_goes_on_where_it_was(broker: str, topic: str, group: str) -> None:
    await ensure_topics(broker, {topic: 2})
    async with producing(broker) as producer:
        for partition in (0, 1):
            await producer.send_and_wait(topic, b"%d" % partition, partition=partition)

    def member(name: str) -> AIOKafkaConsumer:
        return AIOKafkaConsumer(
            topic,
            bootstrap_servers=broker,
            group_id=group,
            group_instance_id=name,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            session_timeout_ms=6000,
            heartbeat_interval_ms=500,
            **OPTIONS,
        )

    first, second = member("a"), member("b")
    await asyncio.gather(first.start(), second.start())
    try:
        async with asyncio.timeout(END_S):
            while not (len(first.assignment()) == len(second.assignment()) == 1):
                await asyncio.gather(first.getmany(timeout_ms=50), second.getmany(timeout_ms=50))
        for consumer in (first, second):
            await consumer.commit({at: 1 for at in consumer.assignment()})
    finally:
        await asyncio.gather(first.stop(), second.stop())
    async with producing(broker) as producer:
        await producer.send_and_wait(topic, b"new", partition=0)
    again = member("a")
    await again.start()
    try:
        if not again.assignment():
            await again.getmany(timeout_ms=2000)
        ours = again.assignment()
        assert [await again.committed(at) for at in ours] == [1] * len(ours)
    finally:
        await again.stop()


async def test_the_embedded_broker_is_recognised(embedded_broker: str) -> None:
    assert await is_embedded_broker(embedded_broker)


@pytest.mark.kafka
async def test_a_real_kafka_is_not_taken_for_the_embedded_broker(kafka: str) -> None:
    assert not await is_embedded_broker(kafka)


async def test_an_absent_broker_is_named_with_its_setting(unused_port: int) -> None:
    with pytest.raises(BrokerError) as caught:
        await ensure_topics(f"127.0.0.1:{unused_port}", {"t": 1}, deadline_s=0.5)
    message = str(caught.value)
    for part in (f"127.0.0.1:{unused_port}", "tried for", "connection refused", "TOCSIN_KAFKA__BOOTSTRAP_SERVERS"):
        assert part in message
    with pytest.raises(BrokerError, match="no answer from the broker"):
        await is_embedded_broker(f"127.0.0.1:{unused_port}")


async def test_what_is_no_address_is_refused() -> None:
    with pytest.raises(ConfigError, match="TOCSIN_KAFKA__BOOTSTRAP_SERVERS='kafka:port'"):
        await ensure_topics("kafka:port", {})


@pytest.mark.kafka
async def test_a_refused_password_is_said_at_once_and_not_shown(topic: str) -> None:
    if reason := why_no_kafka():
        pytest.skip(reason)
    server = KafkaServer()
    users = "org.apache.kafka.common.security.plain.PlainLoginModule required"
    users += ' username="admin" password="admin" user_admin="admin" user_tocsin="right";'
    server.config |= {
        "listeners": server.config["listeners"].replace("PLAINTEXT://", "SASL_PLAINTEXT://", 1),
        "listener.security.protocol.map": "SASL_PLAINTEXT:SASL_PLAINTEXT,CONTROLLER:PLAINTEXT",
        "inter.broker.listener.name": "SASL_PLAINTEXT",
        "sasl.mechanism.inter.broker.protocol": "PLAIN",
        "sasl.enabled.mechanisms": "PLAIN",
        "listener.name.sasl_plaintext.plain.sasl.jaas.config": users,
    }
    login = {"security_protocol": "SASL_PLAINTEXT", "sasl_mechanism": "PLAIN", "sasl_username": "tocsin"}

    def client(password: str) -> KafkaSettings:
        return KafkaSettings.model_validate({"bootstrap_servers": server.bootstrap, "sasl_password": password, **login})

    async with server:
        made = await ensure_topics(client("right"), {topic: 1})
        assert made == {topic: 1}
        started = time.monotonic()
        with pytest.raises(BrokerError, match="Invalid username or password") as caught:
            await ensure_topics(client("s3cret"), {topic: 1})
        assert time.monotonic() - started < 10
        assert "s3cret" not in str(caught.value)
