"""Redis fails in every way there is: the worker goes on, says so, heals, and its events are those of the back-test."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

import numpy as np
import pytest
from aiokafka import TopicPartition
from redis.asyncio import Redis
from redis.exceptions import RedisError

from stream import snapshot
from stream import worker as worker_module
from stream.embedded import LOOPBACK, free_port
from stream.partition import Partition
from stream.points import Points
from stream.replay import replay
from stream.settings import Settings
from stream.store import CLOCK_FIELD, OFFSET_FIELD, Store
from stream.verify import partition_of
from tests.faults.proxy import Proxy
from tests.live import backtested, digest, published, sample_points, send, settings_for, until, until_committed, working
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
        more = {"TOCSIN_REDIS__FLUSH_INTERVAL_S": "0.1"}
        settings = settings_for(embedded_broker, f"redis://{LOOPBACK}:{proxy.port}/0", unique, **more)
        one = Bench(store, proxy, Redis(port=store.port), settings)
        try:
            yield one
        finally:
            await one.redis.aclose()


def expected() -> str:
    """Return the digest of the back-test."""
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


# -- failing over ---------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def replica_of(bench: Bench) -> AsyncIterator[Replica]:
    """Run a replica of the bench's store."""
    async with StoreServer() as server:
        replica = Replica(server, Redis(port=server.port))
        try:
            await replica.follow(bench)
            yield replica
        finally:
            await replica.redis.aclose()


@dataclass
class Replica:
    """A second store that follows the first one until it stands in for it."""

    server: StoreServer
    redis: Redis

    async def follow(self, bench: Bench) -> None:
        await bench.redis.config_set("repl-diskless-sync-delay", 0)  # else it waits 5 s for further replicas
        await self.redis.replicaof(LOOPBACK, str(bench.store.port))
        await self.until_even(bench)

    async def until_even(self, bench: Bench) -> None:
        """Wait until it has all that the first store has."""

        async def even() -> bool:
            here, there = await self.redis.info("replication"), await bench.redis.info("replication")
            same = here.get("slave_repl_offset") == there["master_repl_offset"]
            return bool(same and here.get("master_link_status") == "up")

        await until(even, "the replica has everything")

    async def fall_behind(self, bench: Bench) -> None:
        """Get nothing more from now on, as over a link that is down."""
        await self.until_even(bench)
        await self.redis.replicaof(LOOPBACK, str(free_port()))

    async def take_over(self, bench: Bench) -> None:
        """Stand in for the first store, which is killed: its address leads here."""
        await asyncio.to_thread(bench.store.kill)
        await self.redis.replicaof("NO", "ONE")
        bench.proxy.target_port = self.server.port
        await bench.redis.aclose()
        bench.redis = Redis(port=self.server.port)


@pytest.mark.parametrize("behind", [False, True])
async def test_failed_over_to_a_replica(bench: Bench, caplog: pytest.LogCaptureFixture, behind: bool) -> None:
    """Its state may be older than the last one that was written: what is missing of it is written again."""
    async with replica_of(bench) as replica, working(bench.settings) as worker:
        await bench.until_stored(await through(bench, 0))
        if behind:
            await replica.fall_behind(bench)
        await bench.until_stored(await through(bench, 1))
        if not behind:
            await replica.until_even(bench)
        await replica.take_over(bench)
        await bench.until_stored(await through(bench, 2))
        assert worker.counts().points == len(POINTS), "nothing was gone through twice: memory has it all"
        assert (LOST in caplog.text) == behind
        for at, partition in worker.partitions.items():
            assert await stored(bench, at) == in_memory(partition), "the replica has a state without holes"
    assert digest(await published(bench.settings.kafka)) == expected()


@pytest.mark.parametrize("behind", [False, True])
async def test_failed_over_to_a_replica_between_two_workers(bench: Bench, behind: bool) -> None:
    async with replica_of(bench) as replica:
        async with working(bench.settings):
            first = await through(bench, 0)
            await bench.until_stored(first)
            if behind:
                await replica.fall_behind(bench)
            second = await through(bench, 1)
            await bench.until_stored(second)
        if not behind:
            await replica.until_even(bench)
        await replica.take_over(bench)
        async with working(bench.settings) as worker:
            await bench.until_stored(await through(bench, 2))
            assert worker.counts().points == len(POINTS) - (first if behind else second)
    assert digest(await published(bench.settings.kafka)) == expected()


async def test_a_silence_told_before_a_failover_is_told_once(
    bench: Bench, embedded_broker: str, unique: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It changed a state without a record: the replica that lacks it has the same offset as the store that had it."""
    monkeypatch.setattr(worker_module, "_UNDER_WAY_MS", 0)
    rules = {"TOCSIN_INTERVAL_S": "60", "TOCSIN_SILENT_AFTER": "5", "TOCSIN_REDIS__FLUSH_INTERVAL_S": "0.1"}
    url = bench.settings.redis.url.get_secret_value()
    bench.settings = settings_for(embedded_broker, url, unique, **rules, TOCSIN_KAFKA__PARTITIONS="1")
    kafka = bench.settings.kafka
    async with replica_of(bench) as replica:
        async with working(bench.settings) as first:
            ((at, partition),) = first.partitions.items()
            now_ms = int(time.time() * 1000)
            await send(kafka, [("a", now_ms, 1.0)], arrived_ms=now_ms - 295_000)
            await bench.until_stored(1)
            await replica.fall_behind(bench)
            assert not await published(kafka), "it began too slowly to prove anything"
            await until(lambda: bool(partition.detector.silence.silent.any()), "it is silent")
            await until(lambda: _stored_is(bench, at, in_memory(partition)), "this is stored")
            await replica.take_over(bench)
            await send(kafka, [("b", now_ms, 1.0)])
            await bench.until_stored(2)
            assert await stored(bench, at) == in_memory(partition), "the replica has a state without holes"
        (told,) = await published(kafka)
        async with working(bench.settings) as second:
            (partition,) = second.partitions.values()
            stopped_ms = partition.clock.ms
            await until(lambda: partition.clock.ms > stopped_ms, "it is judged again")
    assert await published(kafka) == [told]


async def stored(bench: Bench, at: TopicPartition) -> dict[bytes, bytes]:
    """Return the state of a partition in the store."""
    async with Store.of(bench.settings.redis) as store:
        state = await store.load(bench.settings.kafka.group, at.topic, at.partition)
    assert state is not None
    return {name: blob for name, blob in state.blobs.items() if name != CLOCK_FIELD}


async def _stored_is(bench: Bench, at: TopicPartition, blobs: dict[bytes, bytes]) -> bool:
    return await stored(bench, at) == blobs


def in_memory(partition: Partition) -> dict[bytes, bytes]:
    """Return the state of a partition in a worker."""
    names = len(partition.detector.index.names)
    return snapshot.pack(partition.detector, np.arange(names, dtype=np.int32))
