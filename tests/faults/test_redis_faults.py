"""Redis fails in every way there is: the worker goes on, says so, heals, and its events are those of the back-test."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import cache

import pytest
from redis.asyncio import Redis
from redis.exceptions import RedisError

from stream.csvfile import Points
from stream.embedded import LOOPBACK, free_port
from stream.replay import replay
from stream.settings import Settings
from stream.store import OFFSET_FIELD
from stream.verify import partition_of
from tests.faults.proxy import Proxy
from tests.live import backtested, digest, published, sample_points, settings_for, until, until_committed, working
from tests.servers import StoreServer

POINTS = sample_points(days=3)
NOT_WRITTEN = "state not written"
LOST = "lost its state"

Backup = dict[bytes, bytes]


@dataclass
class Bench:
    """A store of the test's own behind a proxy, and settings that lead to it."""

    store: StoreServer
    proxy: Proxy
    redis: Redis
    settings: Settings

    async def until_stored(self, records: int) -> None:
        """Wait until the state of all partitions in the store is that of so many records."""
        kafka, prefix = self.settings.kafka, self.settings.redis.prefix

        async def stored() -> bool:
            total = 0
            for partition in range(kafka.partitions):
                key = f"{prefix}:{kafka.group}:{kafka.points_topic}:{partition}"
                with contextlib.suppress(RedisError):
                    total += int(await self.redis.hget(key, OFFSET_FIELD.decode()) or 0)
            return total == records

        await until(stored, f"the state of {records} records in the store")

    async def backup(self) -> Backup:
        saved: Backup = {}
        async for key in self.redis.scan_iter():
            blob = await self.redis.dump(key)
            assert blob is not None
            saved[bytes(key)] = blob
        assert saved
        return saved

    async def restore(self, backup: Backup) -> None:
        for key, blob in backup.items():
            await self.redis.restore(key, 0, blob, replace=True)


@pytest.fixture
async def bench(embedded_broker: str, unique: str, caplog: pytest.LogCaptureFixture) -> AsyncIterator[Bench]:
    caplog.set_level("WARNING")
    async with StoreServer(durable=True) as store, Proxy(store.port) as proxy:
        redis = Redis(port=store.port)
        more = {"TOCSIN_REDIS__FLUSH_INTERVAL_S": "0.1"}
        settings = settings_for(embedded_broker, f"redis://{LOOPBACK}:{proxy.port}/0", unique, **more)
        try:
            yield Bench(store, proxy, redis, settings)
        finally:
            await redis.aclose()


@cache
def expected() -> str:
    """Return the digest of the back-test; the same for all tests."""
    return digest(backtested(POINTS, settings_for("none:1", "redis://none", "back-test")))


def part(number: int) -> Points:
    """Return a third of the points."""
    size = len(POINTS) // 3 + 1
    cut = slice(number * size, (number + 1) * size)
    return POINTS.take(cut)


async def through(bench: Bench, number: int) -> int:
    """Send a third of the points and wait until they are settled; returns how many there are by then."""
    await replay(part(number), bench.settings.kafka)
    total = sum(len(part(n)) for n in range(number + 1))
    await until_committed(bench.settings.kafka, total)
    return total


async def survives(
    bench: Bench,
    caplog: pytest.LogCaptureFixture,
    break_it: Callable[[], Awaitable[object]],
    mend_it: Callable[[], Awaitable[object]] | None,
    says: str,
) -> None:
    """Break the store after a third of the points and mend it after another one, and see what came of it."""
    async with working(bench.settings) as worker:
        await bench.until_stored(await through(bench, 0))
        await break_it()
        await through(bench, 1)
        await until(lambda: says in caplog.text, f"{says!r} in the log")
        if mend_it is not None:
            await mend_it()
        await bench.until_stored(await through(bench, 2))
        assert worker.counts().points == len(POINTS), "nothing was gone through twice: memory has it all"
    assert digest(await published(bench.settings.kafka)) == expected()


def test_the_points_are_enough_to_fail_by() -> None:
    events = backtested(POINTS, settings_for("none:1", "redis://none", "back-test"))
    assert len(events) > 10 and len({partition_of(name, 3) for name in POINTS.names}) > 1


async def test_flushed(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    await survives(bench, caplog, bench.redis.flushall, None, LOST)


async def test_lost_and_started_empty(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    async def lose() -> None:
        await asyncio.to_thread(bench.store.kill)
        shutil.rmtree(bench.store.dir / "data")

    await survives(bench, caplog, lose, bench.store.start, NOT_WRITTEN)
    assert LOST in caplog.text


async def test_killed_and_started_again(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    await survives(bench, caplog, lambda: asyncio.to_thread(bench.store.kill), bench.store.start, NOT_WRITTEN)


async def test_stopped_and_started_again(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    await survives(bench, caplog, bench.store.stop, bench.store.start, NOT_WRITTEN)
    assert LOST not in caplog.text, "it had written everything before it ended"


async def test_out_of_memory(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    async def fill() -> None:
        await bench.redis.config_set("maxmemory-policy", "noeviction")
        await bench.redis.config_set("maxmemory", 1)

    await survives(bench, caplog, fill, lambda: bench.redis.config_set("maxmemory", 0), NOT_WRITTEN)
    assert "maxmemory" in caplog.text, "the reason is said"


async def test_read_only_as_a_replica(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """A failover has made the server that we write to a replica; the next one makes it the primary again."""
    nobody = str(free_port())
    await survives(
        bench,
        caplog,
        lambda: bench.redis.replicaof(LOOPBACK, nobody),
        lambda: bench.redis.replicaof("NO", "ONE"),
        NOT_WRITTEN,
    )


async def test_read_only_for_want_of_replicas(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    await survives(
        bench,
        caplog,
        lambda: bench.redis.config_set("min-replicas-to-write", 1),
        lambda: bench.redis.config_set("min-replicas-to-write", 0),
        NOT_WRITTEN,
    )


async def test_unreachable(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    async def unplug() -> None:
        await bench.proxy.refuse()
        bench.proxy.cut()

    await survives(bench, caplog, unplug, bench.proxy.heal, NOT_WRITTEN)


async def test_slow(bench: Bench) -> None:
    """A flush that takes a second holds nothing up but the next flush."""
    async with working(bench.settings):
        await bench.until_stored(await through(bench, 0))
        bench.proxy.delay_ms = 150
        bench.proxy.bytes_per_s = 200_000
        total = await through(bench, 1)
        await bench.until_stored(total)
        await bench.proxy.heal()
        await bench.until_stored(await through(bench, 2))
    assert digest(await published(bench.settings.kafka)) == expected()


async def test_set_back_to_an_older_backup_under_a_worker(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    async with working(bench.settings):
        await bench.until_stored(await through(bench, 0))
        older = await bench.backup()
        await bench.until_stored(await through(bench, 1))
        await bench.restore(older)
        await bench.until_stored(await through(bench, 2))
    assert LOST in caplog.text
    assert digest(await published(bench.settings.kafka)) == expected()


async def test_set_back_to_an_older_backup_between_two_workers(bench: Bench) -> None:
    async with working(bench.settings):
        first = await through(bench, 0)
        await bench.until_stored(first)
        older = await bench.backup()
        await through(bench, 1)
    await bench.restore(older)
    async with working(bench.settings) as second:
        await bench.until_stored(await through(bench, 2))
        assert second.counts().points == len(POINTS) - first, "the second third was gone through again, muted"
    assert digest(await published(bench.settings.kafka)) == expected()


async def test_flushed_between_two_workers(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    async with working(bench.settings):
        await bench.until_stored(await through(bench, 0))
    await bench.redis.flushall()
    async with working(bench.settings) as second:
        await through(bench, 1)
        await bench.until_stored(await through(bench, 2))
        assert second.counts().points == len(POINTS), "the first third was gone through again, muted"
    assert "no state in the store" in caplog.text
    assert digest(await published(bench.settings.kafka)) == expected()


async def test_away_while_a_worker_starts(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """It waits for the store; what was stored before is what it goes on from."""
    async with working(bench.settings):
        first = await through(bench, 0)
        await bench.until_stored(first)
    await bench.store.stop()
    back = asyncio.create_task(_started_once_asked_for(bench))
    async with working(bench.settings) as second:
        await back
        await through(bench, 1)
        await bench.until_stored(await through(bench, 2))
        assert second.counts().points == len(POINTS) - first
    assert digest(await published(bench.settings.kafka)) == expected()


async def _started_once_asked_for(bench: Bench) -> None:
    """Start the store once a client has tried to reach it in vain."""
    tried = asyncio.Event()
    target, bench.proxy.target_port = bench.proxy.target_port, free_port()

    async def refuse(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()
        tried.set()

    async with await asyncio.start_server(refuse, LOOPBACK, bench.proxy.target_port):
        await tried.wait()
    await bench.store.start()
    bench.proxy.target_port = target
