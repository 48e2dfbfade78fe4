"""Replay equals live: the back-test, the live path and the live path with restarts give the same bytes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from pathlib import Path

import pytest

from stream.events import TYPE_RESUMED, TYPE_SILENT, decode
from stream.points import Points
from stream.replay import replay
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
    until_committed,
    working,
)

POINTS = sample_points(5)


async def test_live_equals_backtest(broker: str, redis_url: str, unique: str) -> None:
    settings = settings_for(broker, redis_url, unique)
    async with working(settings):
        await replay(POINTS, settings.kafka)
        await until_committed(settings.kafka, len(POINTS.value))
    events = await published(settings.kafka)
    expected = backtested(POINTS, settings)
    assert len(expected) > 10
    assert {event.type for event in expected} >= {TYPE_SILENT, TYPE_RESUMED}
    assert digest(events) == digest(expected)
    assert await read_all(settings.kafka, settings.kafka.rejects_topic) == []


async def test_a_restart_in_the_middle_changes_no_byte(broker: str, redis_url: str, unique: str) -> None:
    settings = settings_for(broker, redis_url, unique)
    half = len(POINTS.value) // 2
    async with working(settings) as first:
        await replay(_part(0, half), settings.kafka)
        await until_committed(settings.kafka, half)
        before = first.counts().scored
    async with working(settings) as second:
        restored = sum(len(partition.detector.index.names) for partition in second.partitions.values())
        await replay(_part(half, len(POINTS.value)), settings.kafka)
        await until_committed(settings.kafka, len(POINTS.value))
        after = second.counts()
    assert digest(await published(settings.kafka)) == digest(backtested(POINTS, settings))
    assert restored == len(POINTS.names)
    assert before > 0 and after.points == len(POINTS.value) - half, "nothing was gone through a second time"
    assert after.scored > after.points - 150, "the restarted worker needed no warm-up"


async def test_kill_9_in_the_middle_changes_no_byte(broker: str, redis_url: str, unique: str, tmp_path: Path) -> None:
    rules, further = tmp_path / "rules.yaml", f"further.{unique}"
    rules.write_text(f"rules:\n  - match: '*'\n    topic: {further}\n")
    settings = settings_for(broker, redis_url, unique, TOCSIN_RULES=str(rules))
    kafka, total = settings.kafka, len(POINTS.value)
    await make_topics(kafka)
    await replay(POINTS, kafka)
    more = {
        "TOCSIN_RULES": str(rules),
        "TOCSIN_REDIS__FLUSH_INTERVAL_S": "0.2",
        "TOCSIN_KAFKA__MAX_POLL_RECORDS": "100",  # many small steps, for the kills to fall between
        "TOCSIN_KAFKA__INSTANCE": "one",  # a static member is back at once; the dead self of another must run out first
    }
    environment = os.environ | environment_for(broker, redis_url, unique, **more)
    restored: list[bool] = []
    committed = 0
    for kill in (True, True, True, False):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "stream", "serve", env=environment, stderr=asyncio.subprocess.PIPE
        )
        try:
            restored.append(await _until_assigned(process))
            committed = await until_committed(kafka, committed + 300 if kill else total)
            if kill:
                assert committed < total, "the kill came too late to prove anything"
            else:
                process.terminate()
                assert await asyncio.wait_for(process.wait(), 20) == 0
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.communicate()
    # A kill that comes before the first flush leaves nothing to restore: the log is gone through once more.
    assert not restored[0] and any(restored[1:])
    events = await published(kafka)
    assert len({event.id for event in events}) == len(events), "an event was published twice"
    assert digest(events) == digest(backtested(POINTS, settings))
    again = [decode(record.value) for record in await read_all(kafka, further)]
    assert digest(again) == digest(events), "what goes to further topics goes in the same transactions"


async def _until_assigned(process: asyncio.subprocess.Process) -> bool:
    """Wait until a service has its partitions; return whether it restored state."""
    assert process.stderr is not None
    restored = False
    async with asyncio.timeout(DEADLINE_S):
        while line := await process.stderr.readline():
            restored |= b"restored" in line
            if b"assigned" in line:
                return restored
    raise AssertionError("the service ended before it had partitions")


async def test_without_its_state_a_worker_rebuilds_from_the_log(broker: str, redis_url: str, unique: str) -> None:
    settings = settings_for(broker, redis_url, unique)
    half = len(POINTS.value) // 2
    async with working(settings) as first:
        await replay(_part(0, half), settings.kafka)
        await until_committed(settings.kafka, half)
        at = list(first.partitions)
    async with working(settings) as second:
        for one in at:
            await second.store.drop(settings.kafka.group, one.topic, one.partition)
    async with working(settings) as third:
        async with asyncio.timeout(DEADLINE_S):
            while third.counts().points < half:
                await asyncio.sleep(0.05)
        began = time.process_time()
        await asyncio.sleep(1)  # measured over it: a worker that has nothing to settle went round without end
        assert time.process_time() - began < 0.5
        await replay(_part(half, len(POINTS.value)), settings.kafka)
        await until_committed(settings.kafka, len(POINTS.value))
        assert third.counts().points == len(POINTS.value), "the first half was gone through again, muted"
    assert digest(await published(settings.kafka)) == digest(backtested(POINTS, settings))


async def test_state_lost_under_a_running_worker_is_written_again(
    embedded_broker: str, redis_url: str, unique: str
) -> None:
    settings = settings_for(embedded_broker, redis_url, unique, TOCSIN_REDIS__FLUSH_INTERVAL_S="0.1")
    third = len(POINTS.value) // 3
    async with working(settings) as first:
        await replay(_part(0, third), settings.kafka)
        await until_committed(settings.kafka, third)
        for at in first.partitions:
            await first.store.drop(settings.kafka.group, at.topic, at.partition)
        await replay(_part(third, 2 * third), settings.kafka)
        await until_committed(settings.kafka, 2 * third)
    async with working(settings) as second:
        await replay(_part(2 * third, len(POINTS.value)), settings.kafka)
        await until_committed(settings.kafka, len(POINTS.value))
        assert second.counts().points == len(POINTS.value) - 2 * third
    assert digest(await published(settings.kafka)) == digest(backtested(POINTS, settings))


def _part(begin: int, end: int) -> Points:
    cut = slice(begin, end)
    return Points(POINTS.names, POINTS.timestamp_ms[cut], POINTS.kpi[cut], POINTS.value[cut], POINTS.label[cut])


@pytest.fixture(autouse=True)
def _quiet_logs(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("WARNING")
