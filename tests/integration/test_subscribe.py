"""A subscription on real brokers: each event once, as asked for, from partitions old and new; and README's example."""

from __future__ import annotations

import asyncio
import contextlib
import re
import sys
from asyncio.subprocess import PIPE
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewPartitions

from stream import events
from stream import subscribe as module
from stream.errors import BrokerError
from stream.events import TYPE_CORRECTED, TYPE_OPENED, TYPE_RESOLVED, TYPE_RESUMED, TYPE_RETRACTED, Event
from stream.settings import KafkaSettings
from stream.subscribe import subscribe
from stream.topics import ensure_topics
from tests.e2e.program import Running, lines_of
from tests.unit.test_report import event
from tests.unit.test_subscribe import silence

DEADLINE_S = 30.0


async def publish(
    broker: str, topic: str, published: Sequence[Event | bytes | None], partition: int | None = None
) -> None:
    await ensure_topics(broker, {topic: 6})
    producer = AIOKafkaProducer(bootstrap_servers=broker)
    await producer.start()
    try:
        for one in published:
            value = events.encode(one) if isinstance(one, Event) else one
            await producer.send_and_wait(topic, value, key=b"k", partition=partition)
    finally:
        await producer.stop()


def opened(number: int, kpi: str = "a") -> Event:
    return event(TYPE_OPENED, f"{kpi}{number}", number, kpi=kpi)


class Follower:
    """A subscription that runs for the length of the block and keeps what it was given."""

    def __init__(self, settings: KafkaSettings | str, **options: object) -> None:
        self.got: list[Event] = []
        self._arrived = asyncio.Event()
        self._ready = asyncio.Event()
        self._events = subscribe(settings, on_ready=self._ready.set, **options)  # type: ignore[arg-type]

    async def _run(self) -> None:
        async for one in self._events:
            self.got.append(one)
            self._arrived.set()

    async def has(self, wanted: Sequence[Event]) -> None:
        """Wait until it was given so many events; they must be these."""
        async with asyncio.timeout(DEADLINE_S):
            while len(self.got) < len(wanted):
                self._arrived.clear()
                await self._arrived.wait()
        assert self.got == list(wanted)

    async def __aenter__(self) -> Follower:
        self._task = asyncio.create_task(self._run())
        ready = asyncio.create_task(self._ready.wait())
        await asyncio.wait({ready, self._task}, timeout=DEADLINE_S, return_when=asyncio.FIRST_COMPLETED)
        ready.cancel()
        if self._task.done():
            self._task.result()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task


async def test_each_event_comes_once_from_now_on_or_from_the_beginning(broker: str, topic: str) -> None:
    settings = KafkaSettings(bootstrap_servers=broker, anomalies_topic=topic, partitions=2)
    old, new = [opened(1), opened(2)], [opened(3), event(TYPE_RESOLVED, "a3", 4), opened(5)]
    await ensure_topics(broker, {topic: 2})
    await publish(broker, topic, [*old, old[0]])
    async with Follower(settings) as latest, Follower(settings, start="earliest") as earliest:
        await publish(broker, topic, [new[0], new[0], b"no event", None, b"{}", new[1], old[1], new[2]])
        await earliest.has(old + new)
        # An id that it has not seen is new to it, however old the event.
        await latest.has([new[0], new[1], old[1], new[2]])


async def test_filters_and_a_topic_by_a_bare_address(broker: str, topic: str) -> None:
    published = [opened(1, "checkout.latency"), opened(2, "db.latency"), event(TYPE_RESOLVED, "x", 9, kpi="db.errors")]
    async with (
        Follower(broker, topic=topic, kpi="checkout.*") as checkout,
        Follower(broker, topic=topic, kpi=["db.*"], types=["resolved"]) as resolved,
        Follower(broker, topic=topic, model="m@1") as model,
        Follower(broker, topic=topic, model="other") as other,
        Follower(broker, topic=topic, min_severity="major") as major,
    ):
        await publish(broker, topic, published)
        await checkout.has(published[:1])
        await resolved.has(published[2:])
        await model.has(published)
        assert other.got == major.got == []


async def test_silence_passes_and_so_does_what_mends_an_event_that_passed(broker: str, topic: str) -> None:
    first = opened(1)
    mended = event(TYPE_CORRECTED, "a1-r1", 1)
    mended = msgspec.structs.replace(mended, data=msgspec.structs.replace(mended.data, supersedes=graver(first).id))
    again = msgspec.structs.replace(mended, type=TYPE_RETRACTED, id="a1-retracted")
    again = msgspec.structs.replace(again, data=msgspec.structs.replace(again.data, supersedes=mended.id))
    async with (
        Follower(broker, topic=topic, min_severity="critical") as critical,
        Follower(broker, topic=topic, min_severity="critical", types=["opened", "silent"]) as few,
    ):
        await publish(broker, topic, [opened(9), graver(first), mended, silence(), silence(TYPE_RESUMED), again])
        await critical.has([graver(first), mended, silence(), silence(TYPE_RESUMED), again])
        await few.has([graver(first), silence()])


async def test_partitions_that_come_later_are_followed(
    broker: str, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LOOK_FOR_PARTITIONS_S", 0.2)
    monkeypatch.setattr(module, "_POLL_MS", 50)
    await ensure_topics(broker, {topic: 1})
    await publish(broker, topic, [opened(0)])
    async with Follower(broker, topic=topic) as follower:
        await publish(broker, topic, [opened(1)], 0)
        await follower.has([opened(1)])
        admin = AIOKafkaAdminClient(bootstrap_servers=broker)
        await admin.start()
        try:
            await admin.create_partitions({topic: NewPartitions(3)})
        finally:
            await admin.close()
        # Published before the subscription can know of the partition: to be seen all the same.
        await publish(broker, topic, [opened(2)], 2)
        await follower.has([opened(1), opened(2)])
        for number, partition in ((3, 0), (4, 2), (5, 1)):
            await publish(broker, topic, [opened(number)], partition)
            await follower.has([opened(n) for n in range(1, number + 1)])


async def test_what_a_transaction_gives_up_is_never_seen(broker: str, topic: str, unique: str) -> None:
    await ensure_topics(broker, {topic: 1})
    producer = AIOKafkaProducer(bootstrap_servers=broker, transactional_id=unique)
    async with Follower(broker, topic=topic) as follower:
        await producer.start()
        try:
            for number in range(4):
                await producer.begin_transaction()
                await producer.send_and_wait(topic, events.encode(opened(number)))
                await (producer.abort_transaction if number % 2 else producer.commit_transaction)()
        finally:
            await producer.stop()
        await follower.has([opened(0), opened(2)])


async def test_a_caller_may_break_off(embedded_broker: str, topic: str) -> None:
    await ensure_topics(embedded_broker, {topic: 1})
    await publish(embedded_broker, topic, [opened(n) for n in range(3)])
    async with contextlib.aclosing(subscribe(embedded_broker, topic=topic, start="earliest")) as followed:
        async for one in followed:
            assert one == opened(0)
            break


async def test_an_absent_broker_is_said(unused_port: int) -> None:
    settings = KafkaSettings(bootstrap_servers=f"127.0.0.1:{unused_port}", connect_timeout_s=0.5)
    with pytest.raises(BrokerError, match="TOCSIN_KAFKA__BOOTSTRAP_SERVERS"):
        async for _ in subscribe(settings):
            pass


async def test_the_command_passes_every_filter_on(embedded_broker: str, topic: str, tmp_path: Path) -> None:
    more = {"TOCSIN_KAFKA__BOOTSTRAP_SERVERS": embedded_broker}
    options = ("--kpi", "checkout.*", "--kpi", "db.*", "--type", "opened", "--model", "m", "--rule", "*")
    wanted = [opened(1, "checkout.latency"), opened(4, "db.errors")]
    await ensure_topics(embedded_broker, {topic: 2})
    await publish(
        embedded_broker,
        topic,
        [wanted[0], event(TYPE_RESOLVED, "r", 2, kpi="checkout.latency"), opened(3, "cart.latency"), wanted[1]],
    )
    with Running(tmp_path, "subscribe", "--topic", topic, "--from", "earliest", "--json", *options, more=more) as shown:
        lines = [await asyncio.to_thread(shown.line) for _ in wanted]
        assert [line["id"] for line in lines_of("".join(lines))] == [one.id for one in wanted]
        assert f"following {topic} at {embedded_broker}" in shown.stderr


async def test_the_example_of_readme_runs(embedded_broker: str) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (example,) = re.findall(r"^```python\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)
    assert "kafka:9092" in example
    program = example.replace("kafka:9092", embedded_broker)
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stdout=PIPE)
    assert process.stdout is not None
    try:
        line = asyncio.create_task(process.stdout.readline())
        async with asyncio.timeout(DEADLINE_S):
            number = 0
            while not line.done():  # it does not say when it has begun to follow
                number += 1
                passing = graver(opened(number, "checkout.latency"))
                others = [graver(opened(number, "db.latency")), opened(number, "checkout.errors")]
                await publish(embedded_broker, "kpi.anomalies", [*others, passing])
                await asyncio.wait({line}, timeout=0.2)
        assert re.fullmatch(rb"2016-07-24T1\d:\d\d:00Z checkout\.latency 1\.0 expected 0\.0\n", await line)
    finally:
        process.kill()
        await process.communicate()


def graver(one: Event) -> Event:
    return msgspec.structs.replace(one, data=msgspec.structs.replace(one.data, severity="critical"))
