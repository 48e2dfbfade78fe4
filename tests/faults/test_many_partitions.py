"""More partitions than a worker has in the other tests: they are taken, moved and taken over, each point once."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import sys
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from stream import backtest
from stream.embedded import Child
from stream.points import Points
from stream.sample import generate
from stream.settings import KafkaSettings
from tests.faults.judge import judge_events, judge_rejects, read_committed, refusals
from tests.faults.stage import Progress, Sender
from tests.live import START_MS, backtested, environment_for, make_topics, settings_for, until

# `tocsin serve`, of a member that the group gives up after 3 s and not after 10
_SERVE = "from stream import kafka; kafka._SESSION_TIMEOUT_MS = 3_000; from stream.cli import main; main()"
_ASSIGNED = re.compile(r"assigned (\d+) partitions")
_MORE = {"TOCSIN_WARMUP_H": "1", "TOCSIN_REDIS__FLUSH_INTERVAL_S": "2"}


@dataclass(frozen=True)
class Figures:
    """Seconds until one worker had all partitions, until another had its half, and until that had all after a kill.

    The first two begin with the start of a process, of which some 3 s are Python's; the last one with the kill, of
    which 3 s are the group's patience. And the memory and the TCP connections of a worker with all of them.
    """

    first_s: float
    join_s: float
    kill_s: float
    rss_mb: float
    connections: int
    verdict: str


class Serving:
    """A worker in a process of its own."""

    def __init__(self, name: str, environment: Mapping[str, str], directory: Path) -> None:
        self.log = directory / f"{name}.log"
        self.began = time.monotonic()
        self.child = Child(
            [sys.executable, "-c", _SERVE, "serve"], log=self.log, doomed=directory, env={**os.environ, **environment}
        )

    async def until_it_has(self, fewest: int, most: int) -> None:
        """Wait until it has so many partitions, all of them restored."""

        def has() -> bool:
            found = _ASSIGNED.findall(self.log.read_text())
            return bool(found) and fewest <= int(found[-1]) <= most

        await until(has, f"it has {fewest} to {most} partitions")


def data(series: int, points: int) -> Points:
    """Return KPIs with incidents, merged by time."""
    days = points / series * 300 / 86_400
    return backtest.sample_points(
        [generate(days, 300, number, START_MS, kind="cpu", name=f"kpi-{number}") for number in range(series)]
    )


async def moved(
    bootstrap: str, redis_url: str, unique: str, directory: Path, partitions: int, points: Points
) -> Figures:
    """Let a worker take all partitions, another one join it, and kill the first, while points come."""
    more = {**_MORE, "TOCSIN_KAFKA__PARTITIONS": str(partitions)}
    settings = settings_for(bootstrap, redis_url, unique, **more)
    environment = environment_for(bootstrap, redis_url, unique, **more)
    await make_topics(settings.kafka)
    limit, total = 0.4, len(points)
    async with _progress(bootstrap, settings.kafka) as progress:
        sender = Sender(bootstrap, settings.kafka, points, progress, total, 1, lambda: limit)
        sending = asyncio.create_task(sender.run())
        first = Serving("first", environment, directory)
        second = None
        try:
            await first.until_it_has(partitions, partitions)
            first_s = time.monotonic() - first.began
            await until(lambda: progress.total > 0.35 * total, "the first third is settled")
            process = psutil.Process(first.child.pid)
            rss_mb, connections = process.memory_info().rss / 2**20, len(process.net_connections("tcp"))
            second = Serving("second", environment, directory)
            limit = 0.7  # what is under way while they share
            await second.until_it_has(1, partitions - 1)
            join_s = time.monotonic() - second.began
            await until(lambda: progress.total > 0.65 * total, "the second third is settled")
            limit = 1.0
            await until(lambda: progress.total > 0.75 * total, "it is at work, and ahead of what it has stored")
            first.child.kill()
            killed = time.monotonic()
            await second.until_it_has(partitions, partitions)
            kill_s = time.monotonic() - killed
            await sending
            await until(lambda: progress.total == sum(sender.sent), "everything is settled")
        finally:
            sending.cancel()
            for one in (first, second):
                if one is not None:
                    one.child.kill()
    assert not sender.problems
    said = await asyncio.to_thread(read_committed, bootstrap, settings.kafka.anomalies_topic)
    should = await asyncio.to_thread(backtested, points, settings)
    events = judge_events([message.value() or b"" for message in said], should)
    refused = judge_rejects(
        refusals(await asyncio.to_thread(read_committed, bootstrap, settings.kafka.rejects_topic)), sender.rejects
    )
    assert events and refused, (events, refused)
    verdict = f"events {events.counts()}; rejects {refused.counts()}"
    return Figures(first_s, join_s, kill_s, rss_mb, connections, verdict)


@contextlib.asynccontextmanager
async def _progress(bootstrap: str, kafka: KafkaSettings) -> AsyncIterator[Progress]:
    progress = Progress(bootstrap, kafka)
    try:
        yield progress
    finally:
        await asyncio.to_thread(progress.close)


@pytest.mark.kafka
async def test_sixty_partitions_are_taken_shared_and_taken_over(
    kafka: str, redis_url: str, unique: str, tmp_path: Path
) -> None:
    figures = await moved(kafka, redis_url, unique, tmp_path, 60, data(series=60, points=5_000))
    assert not figures.verdict.startswith("events 0 expected"), figures
