"""`python -m tests.bench.delivery [restart heal memory soak]`: what the delivery guarantee costs. JSON lines.

restart   seconds from a worker's start to its first scored point with the state of 100,000 KPIs in the store, and the
          ratio to a bare read of the same bytes from it
heal      seconds until a worker whose store was flushed has gone through the log of 10,000 KPIs again, muted
memory    bytes of a KPI at W = 120, in the store and in the process: what 80,000 more make resident there, known from
          the beginning as after a restart, or new to it one batch after the other
soak      resident memory of a service at full speed, after the first minute and at the end (--minutes, 10)

The broker is the Apache Kafka that TOCSIN_TEST_KAFKA_HOME names, the store the embedded one.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import logging
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import confluent_kafka
import numpy as np
import psutil
from redis.asyncio import Redis

from stream import snapshot
from stream.columns import Columns
from stream.detector import Detector, DetectorConfig, Served
from stream.policy import Policy, Rule
from stream.service import make_worker, use_one_thread
from stream.settings import Settings
from stream.store import CLOCK_FIELD, Store
from stream.topics import ensure_topics
from stream.verify import partition_of
from tests.bench.load import Load
from tests.helpers import Persistence
from tests.live import environment_for, settings_for
from tests.servers import KafkaServer, StoreServer

PARTITIONS = 6
WARM = 42  # minutes until windows are full, and the usual step known
KEPT_BYTES = 64 << 20  # of a partition's log, in a soak


def say(name: str, value: float, unit: str, **more: object) -> None:
    sys.stdout.write(json.dumps({"name": name, "value": round(value, 3), "unit": unit} | more) + "\n")
    sys.stdout.flush()


def send(bootstrap: str, topic: str, records: Sequence[tuple[bytes, bytes]]) -> None:
    producer = confluent_kafka.Producer(
        {"bootstrap.servers": bootstrap, "linger.ms": 20, "queue.buffering.max.messages": 2_000_000}
        | {"partitioner": "murmur2"}
    )
    for key, value in records:
        producer.produce(topic, value, key)
    producer.flush()


async def restart(broker: KafkaServer, store: StoreServer, kpis: int) -> None:
    settings = settings_for(broker.bootstrap, store.url, "restart", TOCSIN_KAFKA__PARTITIONS=str(PARTITIONS))
    await ensure_topics(settings.kafka, {settings.kafka.points_topic: PARTITIONS})
    load = Load.make(kpis, WARM + 1)
    names = [load.name(kpi) for kpi in range(kpis)]
    worker = make_worker(settings)
    made = worker.make_detector()
    slot = np.array([made.index[name] for name in names], np.int32)
    for step in range(WARM):
        made.accept(load.columns(slot, step))
    blobs = snapshot.pack(made, slot)
    of = np.array([partition_of(name, PARTITIONS) for name in names])
    async with Store.of(settings.redis) as keeper:
        for partition in range(PARTITIONS):
            own = {names[k].encode(): blobs[names[k].encode()] for k in np.flatnonzero(of == partition).tolist()}
            await keeper.save(
                settings.kafka.group, settings.kafka.points_topic, partition, 0, own | {CLOCK_FIELD: b"0"}, whole=True
            )
        size = sum(map(len, blobs.values()))
        del blobs, made
        client = Redis.from_url(store.url)
        began = time.perf_counter()
        keys = [f"{settings.redis.prefix}:{settings.kafka.group}:{settings.kafka.points_topic}:{p}" for p in range(6)]
        read = 0
        for key in keys:
            read += sum(map(len, (await client.hgetall(key)).values()))
        bare_s = time.perf_counter() - began
        await client.aclose()
        assert read >= size
    send(broker.bootstrap, settings.kafka.points_topic, load.records(WARM, WARM + 1))
    began = time.perf_counter()
    task = asyncio.create_task(worker.run())
    while not worker.counts().scored:
        if task.done():
            task.result()
        await asyncio.sleep(0.005)
    ready_s = time.perf_counter() - began
    while sum(one.settled for one in worker.partitions.values()) < kpis:
        await asyncio.sleep(0.01)
    all_s = time.perf_counter() - began
    assert worker.counts().scored == kpis, "every point was scored: no window was lost"
    worker.stop()
    await task
    await worker.store.close()
    say("restart", ready_s, "s", kpis=kpis, bytes=size, bare_read_s=round(bare_s, 3), ratio=round(ready_s / bare_s, 1))
    say("restart, all points", all_s, "s", kpis=kpis)


async def heal(broker: KafkaServer, store: StoreServer, kpis: int) -> None:
    settings = settings_for(broker.bootstrap, store.url, "heal", TOCSIN_KAFKA__PARTITIONS=str(PARTITIONS))
    await ensure_topics(settings.kafka, {settings.kafka.points_topic: PARTITIONS})
    load = Load.make(kpis, WARM)
    send(broker.bootstrap, settings.kafka.points_topic, load.records(0, WARM))
    await _work(settings, kpis * WARM)
    client = Redis.from_url(store.url)
    await client.flushall()
    await client.aclose()
    say("heal", await _work(settings, kpis * WARM), "s", kpis=kpis, points=kpis * WARM)


async def _work(settings: Settings, points: int) -> float:
    worker = make_worker(settings)
    began = time.perf_counter()
    task = asyncio.create_task(worker.run())
    while worker.counts().points < points:
        if task.done():
            task.result()
        await asyncio.sleep(0.01)
    seconds = time.perf_counter() - began
    worker.stop()
    await task
    await worker.store.close()
    return seconds


async def memory(store: StoreServer, window: int = 120) -> None:
    kpis = _RESIDENT[0]
    made = _made(kpis, kpis, window, known=True)
    blobs = snapshot.pack(made, np.arange(kpis, dtype=np.int32))
    async with Store(store.url, prefix="memory") as keeper:
        await keeper.save("g", "t", 0, 0, blobs, whole=True)
        client = Redis.from_url(store.url)
        used = await client.memory_usage("memory:g:t:0", samples=0)
        await client.aclose()
    say("memory, store", (used or 0) / kpis, "B/KPI", window=window, blob=len(next(iter(blobs.values()))))
    del made, blobs
    for known, kind in ((True, "restored"), (False, "new")):
        few, many = (_in_a_process(kpis, window, known) for kpis in _RESIDENT)
        each = (many[0] - few[0]) / (_RESIDENT[1] - _RESIDENT[0])
        say(f"memory, process, {kind} KPIs", each, "B/KPI", window=window, kpis=_RESIDENT, counted=round(many[1]))


_RESIDENT = (20_000, 100_000)  # KPIs; what a process needs anyway, temporaries of a batch too, is in both
_POLL = 20_000  # points in a batch, as the service has them at most


def _in_a_process(kpis: int, window: int, known: bool) -> tuple[int, float]:
    """Return resident bytes of a fresh process with so many KPIs, and the bytes of a KPI in arrays, lists and names."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_resident, kpis, window, known).result()


def _resident(kpis: int, window: int, known: bool) -> tuple[int, float]:
    use_one_thread()
    made = _made(kpis, _POLL, window, known=known)
    counted = sum(sys.getsizeof(part) for part in (made.index, made.index.names))
    counted += sum(sys.getsizeof(name) + sys.getsizeof(slot) for name, slot in made.index.items())
    for array in _arrays(made, set()):
        counted += array.nbytes
        array.reshape(-1).view(np.uint8)[::4096] |= 0  # a page that nothing was written to is not resident
    gc.collect()
    return psutil.Process().memory_info().rss, counted / kpis


def _made(kpis: int, batch: int, window: int, *, known: bool) -> Detector:
    """Return a detector of KPIs with full windows: all known from the beginning, or new with their first points."""
    rules = (Rule(policy=Policy(interval_ms=60_000)),)
    made = Detector(DetectorConfig(), rules, [Served("persistence@1", Persistence(window=window))])
    load = Load.make(batch, 2)
    if known:
        for kpi in range(kpis):
            made.index[load.name(kpi)]
        made.admit()
    for step in range(window + 2):
        for begin in range(0, kpis, batch):
            end = min(begin + batch, kpis)
            slot = np.array([made.index[load.name(k)] for k in range(begin, end)], np.int32)
            made.accept(Columns.of(slot, np.full(len(slot), 60_000 * step), load.value[step % 2][: len(slot)]))
    return made


def _arrays(part: object, seen: set[int]) -> Iterator[np.ndarray[Any, np.dtype[Any]]]:
    """Yield the arrays of an object and of all that it is made of."""
    if id(part) in seen:
        return
    seen.add(id(part))
    if isinstance(part, np.ndarray):
        yield part
    elif isinstance(part, dict | list | tuple) and len(part) < 1_000:  # names are counted apart
        for inner in part.values() if isinstance(part, dict) else part:
            yield from _arrays(inner, seen)
    if hasattr(part, "__dict__"):
        yield from _arrays(vars(part), seen)


async def soak(broker: KafkaServer, store: StoreServer, kpis: int, minutes: float) -> None:
    more = {"TOCSIN_KAFKA__PARTITIONS": str(PARTITIONS), "TOCSIN_INTERVAL_S": "60"}
    settings = settings_for(broker.bootstrap, store.url, "soak", **more)
    small = {"retention.bytes": str(KEPT_BYTES), "segment.bytes": str(KEPT_BYTES // 4)}
    await ensure_topics(settings.kafka, {settings.kafka.points_topic: PARTITIONS}, configs=small)
    environment = os.environ | environment_for(broker.bootstrap, store.url, "soak", **more)
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "stream", "serve", env=environment)
    feeder = _Feeder(settings, kpis)
    feeder.start()
    began, seen = time.monotonic(), list[tuple[float, float]]()
    try:
        while (elapsed := time.monotonic() - began) < 60 * minutes:
            await asyncio.sleep(1)
            assert process.returncode is None, "the service ended"
            seen.append((elapsed, psutil.Process(process.pid).memory_info().rss / 2**20))
    finally:
        feeder.ended.set()
        feeder.join()
        if process.returncode is None:
            process.terminate()
        code = await process.wait()
    first = next(rss for at, rss in seen if at >= min(60.0, 30 * minutes))
    done = feeder.committed()
    say("soak", seen[-1][1], "MiB", first=round(first, 1), most=round(max(rss for _, rss in seen), 1), minutes=minutes)
    say("soak, points", done, "points", per_s=round(done / seen[-1][0]), exit_code=code)


class _Feeder(threading.Thread):
    """Sends minute after minute of all KPIs, never far ahead of what is committed."""

    def __init__(self, settings: Settings, kpis: int) -> None:
        super().__init__(daemon=True)
        self.ended = threading.Event()
        self._settings, self._kpis = settings, kpis
        self._at = [confluent_kafka.TopicPartition(settings.kafka.points_topic, p) for p in range(PARTITIONS)]
        self._consumer = confluent_kafka.Consumer(
            {"bootstrap.servers": settings.kafka.bootstrap_servers, "group.id": settings.kafka.group, "log_level": 0}
        )

    def committed(self) -> int:
        return sum(max(one.offset, 0) for one in self._consumer.committed(self._at, timeout=10))

    def run(self) -> None:
        load, sent = Load.make(self._kpis, 1000), 0
        producer = confluent_kafka.Producer(
            {"bootstrap.servers": self._settings.kafka.bootstrap_servers, "linger.ms": 20, "partitioner": "murmur2"}
            | {"queue.buffering.max.messages": 2_000_000}
        )
        step = 0
        while not self.ended.is_set():
            if sent - self.committed() > 40 * self._kpis:
                self.ended.wait(0.05)
                continue
            stamp, values = 1_767_571_200 + 60 * step, load.value[step % 1000].tolist()
            for kpi, value in enumerate(values):
                name = load.name(kpi).encode()
                producer.produce(
                    self._settings.kafka.points_topic,
                    b'{"kpi":"%b","timestamp":%d,"value":%b}' % (name, stamp, repr(value).encode()),
                    name,
                )
            producer.flush()
            sent, step = sent + self._kpis, step + 1


async def run(given: argparse.Namespace) -> None:
    for part in given.parts:  # servers of its own each
        async with StoreServer() as store:
            if part == "memory":
                await memory(store)
                continue
            async with KafkaServer({"log.retention.check.interval.ms": "5000"}) as broker:
                if part == "restart":
                    await restart(broker, store, given.kpis)
                elif part == "heal":
                    await heal(broker, store, 10_000)
                else:
                    await soak(broker, store, 5_000, given.minutes)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.delivery", description=__doc__)
    parts = ["restart", "heal", "memory", "soak"]
    parser.add_argument("parts", nargs="*", default=parts, choices=parts)
    parser.add_argument("--kpis", type=int, default=100_000, help="of restart")
    parser.add_argument("--minutes", type=float, default=10.0, help="of soak")
    use_one_thread()
    logging.basicConfig(level="ERROR")
    logging.getLogger("aiokafka").setLevel("CRITICAL")
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
