"""Producers that the broker has shut out: by another one with their id, or for a transaction that lasted too long.

The worker takes another producer and goes on with what it has: nobody else has committed anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from typing import Any

import psutil
import pytest
from aiokafka import AIOKafkaProducer, OffsetAndMetadata, TopicPartition
from aiokafka.errors import ProducerFenced

from stream import kafka as clients
from stream.embedded import LOOPBACK, free_port
from stream.outbox import Outgoing, TransactionalOutbox
from stream.partition import Partition
from stream.replay import replay
from stream.settings import KafkaSettings, Settings
from stream.verify import end_offsets
from tests.faults.dying import SESSION_TIMEOUT_MS, short_lived
from tests.faults.judge import judge_events, judge_rejects, read_committed, refusals
from tests.faults.proxy import Proxy
from tests.faults.stage import Progress, Sender
from tests.live import (
    DEADLINE_S,
    backtested,
    digest,
    environment_for,
    make_topics,
    published,
    read_all,
    sample_points,
    settings_for,
    until,
    until_committed,
    working,
)
from tests.servers import KafkaServer, why_no_kafka

POINTS = sample_points(days=3)
MORE = {"TOCSIN_KAFKA__MAX_POLL_RECORDS": "100", "TOCSIN_REDIS__FLUSH_INTERVAL_S": "0.1"}  # many small steps
pytestmark = pytest.mark.kafka


@pytest.mark.parametrize("call", ["begin_transaction", "send", "send_offsets_to_transaction", "commit_transaction"])
async def test_another_producer_with_its_id_that_commits_nothing(
    kafka: str,
    redis_url: str,
    unique: str,
    call: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Another one takes its id just before a call, twice: between two transactions, and at each place in one."""
    caplog.set_level("WARNING")
    settings = settings_for(kafka, redis_url, unique, **MORE)
    real, times, partitions = getattr(AIOKafkaProducer, call), Counter[str](), dict[str, Partition]()

    async def too_late(self: AIOKafkaProducer, *given: Any, **named: Any) -> Any:
        one = partitions.get(self._txn_manager.transactional_id or "") if self._txn_manager is not None else None
        if one is not None and one._trying is not None and one._trying.pending.events:  # else nothing could be lost
            times[name := self._txn_manager.transactional_id] += 1
            if times[name] <= 2:
                async with clients.transactional_producer(settings.kafka, one.at):
                    pass
        return await real(self, *given, **named)

    monkeypatch.setattr(AIOKafkaProducer, call, too_late)
    async with working(settings) as worker:
        before = dict(worker.partitions)
        partitions |= {clients.transactional_id(settings.kafka, at): one for at, one in before.items()}

        async def room(sent: int) -> None:
            await until(lambda: sum(one.settled for one in before.values()) >= sent - 300, "it goes on")

        await replay(POINTS, settings.kafka, chunk=100, room=room)
        await until_committed(settings.kafka, len(POINTS))
        assert worker.partitions == before, "none was taken anew: memory has it all"
        assert worker.counts().points == len(POINTS)
    assert len(times) > 1 and min(times.values()) > 1, times
    assert "ProducerFenced" in caplog.text and "publishes again" in caplog.text and "Traceback" not in caplog.text
    assert digest(await published(settings.kafka)) == digest(backtested(POINTS, settings))


async def test_a_producer_that_learns_of_it_between_two_records(
    kafka: str, unique: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """aiokafka says then that it is not in a transaction: an error of another kind than the broker's."""
    settings = settings_for(kafka, "redis://none", unique).kafka
    await make_topics(settings)
    at, real = TopicPartition(settings.points_topic, 0), AIOKafkaProducer.send
    outbox = TransactionalOutbox(at, settings)
    outgoing = [Outgoing(settings.anomalies_topic, b"a", b"%d" % number, []) for number in range(2)]
    refused = list[bool]()

    async def slow(self: AIOKafkaProducer, topic: str, value: bytes, **named: Any) -> Any:
        if value == b"1" and not refused:
            await until(self._txn_manager.is_fatal_error, "the broker has refused the first one")
            refused.append(True)
        return await real(self, topic, value, **named)

    monkeypatch.setattr(AIOKafkaProducer, "send", slow)
    try:
        await outbox.open()
        async with clients.transactional_producer(settings, at):
            pass
        with pytest.raises(ProducerFenced):
            await outbox.commit(outgoing, OffsetAndMetadata(1, ""))
        await outbox.open()
        await outbox.commit(outgoing, OffsetAndMetadata(1, ""))
    finally:
        await outbox.close()
    assert refused and [one.value for one in await read_all(settings, settings.anomalies_topic)] == [b"0", b"1"]


@pytest.mark.parametrize("taken_over", [False, True], ids=["alone", "taken-over"])
async def test_a_process_paused_in_a_transaction_for_longer_than_the_broker_waits(
    kafka: str, redis_url: str, unique: str, taken_over: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone it goes on with what it has; where another has its partitions by then, it leaves them to that one."""
    monkeypatch.setattr(clients, "_SESSION_TIMEOUT_MS", SESSION_TIMEOUT_MS)
    settings = settings_for(kafka, redis_url, unique, **MORE)
    async with sending(kafka, settings) as sent, contextlib.AsyncExitStack() as stack:
        process = await stack.enter_async_context(
            paused("produced", 2, environment_for(kafka, redis_url, unique, **MORE))
        )
        assert await open_transactions(settings.kafka), "else nothing is aborted"
        if taken_over:
            await stack.enter_async_context(working(settings))
            await until(sent.half, "another one settles what there is")
        await until(lambda: none_open(settings.kafka), "the broker has ended the transaction")
        process.send_signal(signal.SIGCONT)
        sent.limit = 1.0
        await until(sent.everything, "everything settled")
        process.terminate()
        async with asyncio.timeout(DEADLINE_S):
            _, log = await process.communicate()
        assert process.returncode == 0 and b"Traceback" not in log, log.decode()
        assert b"cannot publish" in log, "it was shut out"
    await judge(kafka, settings, sent.sender)


async def test_a_link_held_in_a_transaction_for_longer_than_the_broker_waits(
    redis_url: str, unique: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What it had sent arrives late, and is refused; the group has not noticed anything."""
    if reason := why_no_kafka():
        pytest.skip(reason)
    caplog.set_level("WARNING", "stream")
    monkeypatch.setattr(TransactionalOutbox, "_made", short_lived)
    proxy = Proxy(free_port())
    real, held = AIOKafkaProducer.commit_transaction, list[str]()
    async with KafkaServer(outside=proxy.port) as server, proxy:
        proxy.target_port = server.outside_port
        settings = settings_for(f"{LOOPBACK}:{proxy.port}", redis_url, unique, **MORE)
        direct = settings.kafka.model_copy(update={"bootstrap_servers": server.bootstrap})

        async def held_back(self: AIOKafkaProducer) -> None:
            if not held and await open_transactions(direct):
                held.append(self._txn_manager.transactional_id)
                proxy.hole()
            await real(self)

        monkeypatch.setattr(AIOKafkaProducer, "commit_transaction", held_back)
        async with sending(server.bootstrap, settings) as sent, working(settings) as worker:
            before = dict(worker.partitions)
            await until(lambda: bool(held), "a transaction is held")
            await until(lambda: none_open(direct), "the broker has ended the transaction")
            await proxy.heal()
            sent.limit = 1.0
            await until(sent.everything, "everything settled")
            assert worker.partitions == before, "none was taken anew: memory has it all"
        assert "cannot publish" in caplog.text and "publishes again" in caplog.text
        await judge(server.bootstrap, settings, sent.sender)


# -- the bench ------------------------------------------------------------------------------------------------------


class Sent:
    """What is sent: half of it at once, the rest when `limit` is 1.0."""

    def __init__(self, bootstrap: str, kafka: KafkaSettings) -> None:
        self.limit = 0.5
        self.progress = Progress(bootstrap, kafka)
        self.sender = Sender(bootstrap, kafka, POINTS, self.progress, len(POINTS), 1, lambda: self.limit)

    def half(self) -> bool:
        return self.progress.total >= 0.5 * len(POINTS)

    def everything(self) -> bool:
        return self.sender.done and self.progress.total == sum(self.sender.sent)


@contextlib.asynccontextmanager
async def sending(bootstrap: str, settings: Settings) -> AsyncIterator[Sent]:
    """Send points, some of them unreadable: each transaction holds a record, so that the broker knows of it."""
    kafka = settings.kafka.model_copy(update={"bootstrap_servers": bootstrap})
    await make_topics(kafka)
    sent = Sent(bootstrap, kafka)
    task = asyncio.create_task(sent.sender.run())
    try:
        yield sent
        await task
    finally:
        task.cancel()
        sent.progress.close()


@contextlib.asynccontextmanager
async def paused(step: str, number: int, environment: Mapping[str, str]) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run the service until it pauses itself at a step."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.faults.dying", step, str(number), "SIGSTOP"),
        env=os.environ | environment,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        await until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_STOPPED, "it is paused")
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def open_transactions(kafka: KafkaSettings) -> bool:
    """Tell whether a transaction with rejects is open: what readers may read ends before the topic does."""
    topic, consumer = kafka.rejects_topic, clients.reader(kafka)
    await consumer.start()
    try:
        at = [TopicPartition(topic, number) for number in range(kafka.partitions)]
        stable = await consumer.end_offsets(at)
    finally:
        await consumer.stop()
    whole = await end_offsets(kafka, topic)
    return any(stable[one] < whole[one.partition] for one in at)


async def none_open(kafka: KafkaSettings) -> bool:
    return not await open_transactions(kafka)


async def judge(bootstrap: str, settings: Settings, sender: Sender) -> None:
    """Hold what is published against the back-test, and the refused records against what was sent."""
    assert not sender.problems
    said = await asyncio.to_thread(read_committed, bootstrap, settings.kafka.anomalies_topic)
    verdict = judge_events([message.value() or b"" for message in said], backtested(POINTS, settings))
    assert verdict and verdict.expected > 10, verdict
    refused = await asyncio.to_thread(read_committed, bootstrap, settings.kafka.rejects_topic)
    verdict = judge_rejects(refusals(refused), sender.rejects)
    assert verdict and verdict.expected > 50, verdict
