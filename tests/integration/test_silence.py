"""Silence on real servers: by the clock alone, through restarts, kills and moves, told once and never lost."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from confluent_kafka import Consumer, TopicPartition

from stream import worker
from stream.events import Event, SilenceData, iso_time
from stream.settings import Settings
from stream.verify import partition_of
from tests.live import (
    digest,
    environment_for,
    make_topics,
    published,
    send,
    settings_for,
    until,
    until_committed,
    working,
)
from tests.servers import EmbeddedBroker

MINUTE = 60_000
SPAN_MS = 5 * MINUTE
RULES = {"TOCSIN_INTERVAL_S": "60", "TOCSIN_SILENT_AFTER": "5", "TOCSIN_REDIS__FLUSH_INTERVAL_S": "0.1"}
# A static member is back at once; the dead self of another must run out first.
SERVE = {**RULES, "TOCSIN_KAFKA__INSTANCE": "one", "TOCSIN_KAFKA__PARTITIONS": "1"}


def now_ms() -> int:
    return int(time.time() * 1000)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the tests the seconds that are left to records under way."""
    monkeypatch.setattr(worker, "_UNDER_WAY_MS", 0)


async def said(settings: Settings) -> list[Event]:
    return await published(settings.kafka)


def kinds(some: list[Event]) -> list[str]:
    return sorted(f"{one.subject} {one.type.rpartition('.')[2]}" for one in some)


def committed_clocks(settings: Settings) -> list[tuple[int, int, int]]:
    """Return (offset, clock, offset of the clock) of each partition, as another client reads them.

    confluent-kafka takes metadata for a C string: what lies behind it in memory may follow, readable or not.
    """
    found = []
    for partition in range(settings.kafka.partitions):
        for attempt in range(50):
            consumer = Consumer(
                {"bootstrap.servers": settings.kafka.bootstrap_servers, "group.id": settings.kafka.group}
            )
            try:
                (one,) = consumer.committed([TopicPartition(settings.kafka.points_topic, partition)], timeout=20)
                if one.offset >= 0:
                    match = re.match(r"clock_ms=(\d+);offset=(\d+);", one.metadata or "")
                    assert match, one.metadata
                    found.append((one.offset, int(match[1]), int(match[2])))
                break
            except UnicodeDecodeError:
                assert attempt < 49
            finally:
                consumer.close()
    return found


async def test_without_any_traffic_the_clock_tells(broker: str, redis_url: str, unique: str, at_once: None) -> None:
    settings = settings_for(broker, redis_url, unique, **RULES)
    arrived_ms = now_ms() - SPAN_MS - 1_000
    event_ms = arrived_ms // MINUTE * MINUTE
    async with working(settings):
        await send(settings.kafka, [("a", event_ms, 1.0), ("b", event_ms, 1.0)], arrived_ms=arrived_ms)
        await send(settings.kafka, [("fresh", event_ms, 1.0)])
        await until(lambda: _has(settings, 2), "two are silent")
        first, second = await said(settings)
        await send(settings.kafka, [("a", event_ms + MINUTE, 1.0)])
        await until(lambda: _has(settings, 3), "one is back")
        await asyncio.sleep(1)
    assert {first.subject, second.subject} == {"a", "b"}
    for event in (first, second):
        assert isinstance(event.data, SilenceData)
        assert event.data.basis == "wall_clock" and event.data.last_seen == iso_time(event_ms)
        assert event.time == iso_time(arrived_ms + SPAN_MS), "the deadline, not when it was looked at"
    found = await said(settings)
    assert kinds(found) == ["a resumed", "a silent", "b silent"]
    assert {one.id.rpartition("-")[0] for one in found if one.subject == "a"} == {
        one.id.rpartition("-")[0] for one in (first, second) if one.subject == "a"
    }


async def _has(settings: Settings, count: int) -> bool:
    return len(await said(settings)) >= count


async def test_a_broker_that_gives_no_answer_silences_nobody(redis_url: str, unique: str, at_once: None) -> None:
    async with EmbeddedBroker() as broker:
        settings = settings_for(broker.bootstrap, redis_url, unique, **RULES | {"TOCSIN_INTERVAL_S": "0.5"})
        async with working(settings) as one:
            await send(settings.kafka, [("a", now_ms(), 1.0)])
            await until_committed(settings.kafka, 1)
            (partition,) = [p for p in one.partitions.values() if p.position]
            await until(lambda: partition.clock.ms > 0, "it is judged")
            os.kill(broker.pid, signal.SIGSTOP)
            try:
                stopped_ms = now_ms()
                await asyncio.sleep(4)  # longer than it may send nothing; perhaps it does, and we cannot know
                assert partition.clock.ms < stopped_ms + 500
                assert not partition._pending.events and not partition.detector.silence.silent.any()
            finally:
                os.kill(broker.pid, signal.SIGCONT)
            await until(lambda: _has(settings, 1), "now it is known")


async def test_a_deadline_survives_restarts_and_is_told_once(
    broker: str, redis_url: str, unique: str, at_once: None
) -> None:
    settings = settings_for(broker, redis_url, unique, **RULES)
    arrived_ms = now_ms() - SPAN_MS + 15_000  # a busy machine needs seconds to take them in
    deadline_ms = arrived_ms + SPAN_MS
    names = [f"kpi-{n}" for n in range(6)]
    async with working(settings):
        await send(settings.kafka, [(name, now_ms(), 1.0) for name in names], arrived_ms=arrived_ms)
        await until_committed(settings.kafka, len(names))
    assert await said(settings) == [] and now_ms() < deadline_ms, "it began too slowly to prove anything"
    async with working(settings):
        await until(lambda: _has(settings, len(names)), "all are silent")
    first = await said(settings)
    for _ in range(2):
        async with working(settings) as last:
            await until(lambda: all(p.clock.ms > deadline_ms for p in last.partitions.values()), "judged again")
    assert digest(await said(settings)) == digest(first), "told once"
    assert {event.time for event in first} == {iso_time(deadline_ms)}
    clocks = committed_clocks(settings)
    assert len(clocks) == len({partition_of(name, settings.kafka.partitions) for name in names})
    assert all(clock > deadline_ms and at == offset for offset, clock, at in clocks)


async def test_a_deadline_moves_with_its_partition(broker: str, redis_url: str, unique: str, at_once: None) -> None:
    settings = settings_for(broker, redis_url, unique, **RULES)
    names = [f"kpi-{n}" for n in range(8)]
    async with contextlib.AsyncExitStack() as stack:
        first = await stack.enter_async_context(working(settings))
        await send(settings.kafka, [(name, now_ms(), 1.0) for name in names], arrived_ms=now_ms() - SPAN_MS + 15_000)
        await until_committed(settings.kafka, len(names))
        deadline_ms = now_ms() + 15_000
        second = await stack.enter_async_context(working(settings))
        await until(lambda: bool(first.partitions and second.partitions), "both have partitions")
        assert now_ms() < deadline_ms - 2_000 and await said(settings) == []
        await until(lambda: _has(settings, len(names)), "all are silent")
        moved = {at.partition for at in second.partitions}
        await asyncio.sleep(1)
    found = await said(settings)
    assert kinds(found) == [f"{name} silent" for name in sorted(names)]
    assert moved & {partition_of(name, settings.kafka.partitions) for name in names}, "none has moved"


# -- kill -9 --------------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def serving(environment: dict[str, str], log: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run a service for the length of the block; it ends by kill -9."""
    with log.open("a") as stderr:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "stream", "serve", env=os.environ | environment, stderr=stderr
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def test_kill_9_right_after_it_was_told_tells_it_no_second_time(
    broker: str, redis_url: str, unique: str, tmp_path: Path
) -> None:
    settings = settings_for(broker, redis_url, unique, **SERVE)
    environment = dict(environment_for(broker, redis_url, unique, **SERVE))
    await make_topics(settings.kafka)
    await send(settings.kafka, [("a", now_ms(), 1.0), ("b", now_ms(), 1.0)], arrived_ms=now_ms() - SPAN_MS - 60_000)
    async with serving(environment, tmp_path / "log"):
        await until(lambda: _has(settings, 2), "both are silent")
    ((_, clock, _),) = committed_clocks(settings)
    async with serving(environment, tmp_path / "log"):
        await send(settings.kafka, [("c", now_ms(), 1.0)], arrived_ms=now_ms() - SPAN_MS - 60_000)
        await until(lambda: _has(settings, 3), "the third is silent")
    ((_, later, _),) = committed_clocks(settings)
    assert later > clock
    assert kinds(await said(settings)) == ["a silent", "b silent", "c silent"]


async def test_kill_9_before_it_was_told_loses_nothing(
    broker: str, redis_url: str, unique: str, tmp_path: Path
) -> None:
    """The state is flushed all the time, a transaction comes seconds after the one before it."""
    more = {**SERVE, "TOCSIN_KAFKA__SETTLE_INTERVAL_MS": "10000", "TOCSIN_REDIS__FLUSH_INTERVAL_S": "0.05"}
    settings = settings_for(broker, redis_url, unique, **more)
    environment = dict(environment_for(broker, redis_url, unique, **more))
    await make_topics(settings.kafka)
    async with serving(environment, tmp_path / "log"):
        await until(lambda: "assigned" in (tmp_path / "log").read_text(), "it has its partition")
        due_ms = 3_000  # from now: its point is committed by then, and the next transaction ten seconds later
        await send(
            settings.kafka, [("a", now_ms(), 1.0)], arrived_ms=now_ms() - SPAN_MS - worker._UNDER_WAY_MS + due_ms
        )
        await until_committed(settings.kafka, 1)
        await asyncio.sleep(5)  # found out, and waiting for its transaction
        assert await said(settings) == []
    async with serving(environment, tmp_path / "log"):
        await until(lambda: _has(settings, 1), "it is silent")
        await asyncio.sleep(1)
    assert kinds(await said(settings)) == ["a silent"]
