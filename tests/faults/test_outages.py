"""Times when something is away, slow or not as it was: the worker waits, says so, and goes on by itself."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
from aiokafka import ConsumerRecord, OffsetAndMetadata
from aiokafka.admin import AIOKafkaAdminClient, NewPartitions

from stream import kafka as clients
from stream.outbox import TransactionalOutbox
from stream.partition import Partition
from stream.replay import replay
from stream.topics import ensure_topics
from tests.live import (
    DEADLINE_S,
    backtested,
    digest,
    environment_for,
    published,
    sample_points,
    send,
    settings_for,
    until,
    until_committed,
    working,
)
from tests.servers import KafkaServer, why_no_kafka

POINTS = sample_points(days=3)


async def test_a_model_that_takes_longer_than_a_session_keeps_its_partitions(
    kafka: str, redis_url: str, unique: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clients, "_SESSION_TIMEOUT_MS", 2_000)
    settings, judge, slept = settings_for(kafka, redis_url, unique), Partition._judge, list[float]()

    def slow(self: Partition, batch: list[ConsumerRecord]) -> Any:
        if not slept:
            slept.append(5.0)
            time.sleep(slept[0])  # as a forward pass does: it holds its thread, and not the interpreter
        return judge(self, batch)

    monkeypatch.setattr(Partition, "_judge", slow)
    async with working(settings) as worker:
        member = worker._consumer._coordinator
        before = member.member_id, member.generation
        await replay(POINTS, settings.kafka)
        await until_committed(settings.kafka, len(POINTS.value))
        assert slept and (member.member_id, member.generation) == before
    assert digest(await published(settings.kafka)) == digest(backtested(POINTS, settings))


async def test_what_cannot_be_settled_is_not_read_either(
    broker: str, redis_url: str, unique: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, commit = asyncio.Event(), TransactionalOutbox.commit

    async def held(self: TransactionalOutbox, *given: Any) -> None:
        await gate.wait()
        await commit(self, *given)

    monkeypatch.setattr(TransactionalOutbox, "commit", held)
    more = {"TOCSIN_KAFKA__UNSETTLED_MAX": "300", "TOCSIN_KAFKA__MAX_POLL_RECORDS": "200"}
    settings = settings_for(broker, redis_url, unique, **more)
    async with working(settings) as worker:
        await replay(POINTS, settings.kafka)
        await until(lambda: bool(worker._consumer.paused()), "a partition pauses")
        await asyncio.sleep(1)  # measured over it: nothing more is read
        assert 300 < max(one.unsettled for one in worker.partitions.values()) <= 300 + 200
        await until(lambda: worker.lag() > 0, "it says how far behind it is")
        gate.set()
        await until_committed(settings.kafka, len(POINTS.value))
        await until(lambda: not worker._consumer.paused() and worker.lag() == 0, "all partitions go on")
    assert digest(await published(settings.kafka)) == digest(backtested(POINTS, settings))


async def test_a_stop_does_not_wait_for_a_broker_that_is_away(redis_url: str, unique: str) -> None:
    if reason := why_no_kafka():
        pytest.skip(reason)
    async with KafkaServer() as server:
        more = {"TOCSIN_SHUTDOWN_TIMEOUT_S": "2"}
        environment = os.environ | environment_for(server.bootstrap, redis_url, unique, **more)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "stream", "serve"), env=environment, stderr=asyncio.subprocess.PIPE
        )
        assert process.stderr is not None
        try:
            async with asyncio.timeout(DEADLINE_S):
                while b"assigned" not in await process.stderr.readline():
                    pass
            os.kill(server.pid, signal.SIGSTOP)  # it answers nothing any more, and closes no connection
            process.terminate()
            async with asyncio.timeout(30):
                log = (await process.stderr.read()).decode()
                assert await process.wait() == 0, log
            assert "Traceback" not in log
        finally:
            os.kill(server.pid, signal.SIGCONT)
            if process.returncode is None:
                process.kill()
                await process.wait()


async def test_whoever_finds_that_another_has_committed_begins_anew_from_there(
    kafka: str, redis_url: str, unique: str
) -> None:
    settings = settings_for(kafka, redis_url, unique, TOCSIN_KAFKA__PARTITIONS="1")
    topic = settings.kafka.points_topic
    async with working(settings) as worker:
        await send(settings.kafka, [("a", 1_767_571_200_000 + n * 60_000, 1.0) for n in range(10)])
        await until_committed(settings.kafka, 10)
        ((at, before),) = worker.partitions.items()
        other = clients.transactional_producer(settings.kafka, at)
        await other.start()  # the new owner, as this one does not know yet …
        async with other.transaction():  # … which has gone through some more
            await other.send_offsets_to_transaction({at: OffsetAndMetadata(5, "")}, settings.kafka.group)
        await other.stop()
        await send(settings.kafka, [("a", 1_767_571_200_000 + n * 60_000, 1.0) for n in range(10, 20)])
        await until(lambda: worker.partitions.get(at) not in (None, before), "it takes the partition anew")
        await until_committed(settings.kafka, 20)
        assert worker.partitions[at].position == 20, topic


async def test_a_partition_more_is_found_and_read(
    kafka: str, redis_url: str, unique: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clients, "_METADATA_MS", 500)
    settings = settings_for(kafka, redis_url, unique)
    async with working(settings) as worker:
        await send(settings.kafka, [(f"k{n}", 1_767_571_200_000, 1.0) for n in range(20)])
        await until_committed(settings.kafka, 20)
        await _with_admin(
            kafka, lambda admin: admin.create_partitions({settings.kafka.points_topic: NewPartitions(total_count=5)})
        )
        await until(lambda: len(worker.partitions) == 5, "its partitions are five")
        await send(settings.kafka, [(f"k{n}", 1_767_571_260_000, 1.0) for n in range(40)])
        await until(lambda: worker.counts().points >= 60, "all points are taken in")


async def test_a_topic_that_is_made_anew_is_read_from_its_beginning(
    kafka: str, redis_url: str, unique: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clients, "_METADATA_MS", 500)
    settings = settings_for(kafka, redis_url, unique)
    topic = settings.kafka.points_topic
    async with working(settings) as worker:
        await send(settings.kafka, [(f"k{n % 20}", 1_767_571_200_000 + n * 60_000, 1.0) for n in range(100)])
        await until_committed(settings.kafka, 100)
        await _with_admin(kafka, lambda admin: admin.delete_topics([topic]))
        await until(lambda: _absent(kafka, topic), "it is gone")
        await ensure_topics(settings.kafka, {topic: settings.kafka.partitions})
        await send(settings.kafka, [(f"k{n}", 1_767_571_260_000, 1.0) for n in range(20)])
        await until_committed(settings.kafka, 20)
        await until(lambda: len(worker.partitions) == settings.kafka.partitions, "it has its partitions")


async def _absent(bootstrap: str, topic: str) -> bool:
    return topic not in await _with_admin(bootstrap, lambda admin: admin.list_topics())


async def _with_admin(bootstrap: str, ask: Callable[[AIOKafkaAdminClient], Any]) -> Any:
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    try:
        return await ask(admin)
    finally:
        await admin.close()
