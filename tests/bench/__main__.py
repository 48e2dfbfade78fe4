"""`make bench`: what a point costs, beside what it must cost. JSON lines: name, value, unit, ratio, against.

forward   the bare forward pass of the checkpoint's network, on as many windows
bare      a bare aiokafka loop that consumes, decodes and sends one point in a hundred on, transactionally, and does
          not detect; the same client settings, batches and pace of transactions as the service
limit     forward + bare: what a point must cost on one core
core      the detector without servers
live      the worker on a real broker and store: restarted with all windows stored, from the first point to the last

The ratio of `live` is limit / live: 1.0 would be nothing but the network and the loop. The broker is the Apache Kafka
that TOCSIN_TEST_KAFKA_HOME names, else the embedded one. All figures come from one run, in turns, as medians of rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import statistics
import sys
import time
import uuid
from collections.abc import AsyncIterator
from functools import partial

import confluent_kafka
import numpy as np
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, OffsetAndMetadata, TopicPartition

from models import repository
from models.batching import run_padded
from models.checkpoint import Checkpoint
from models.deepant import DeepAnT, forward
from stream.columns import Columns, Int64Array
from stream.detector import Detector, Result, Served
from stream.kafka import client_options, points_consumer, transactional_producer
from stream.policy import Rule
from stream.records import _decode as decode
from stream.service import use_one_thread
from stream.settings import Settings, load_settings
from stream.store import Store
from stream.topics import ensure_topics
from stream.worker import Worker
from tests.bench.load import Load
from tests.servers import Broker, EmbeddedBroker, KafkaServer, StoreServer, why_no_kafka

PARTITIONS = 6


def say(
    name: str, value: float, unit: str, ratio: float | None = None, against: str | None = None, **more: object
) -> None:
    line = {"name": name, "value": round(value, 3), "unit": unit}
    line |= {"ratio": None if ratio is None else round(ratio, 3), "against": against} | more
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


class TimedDetector(Detector):
    """Knows when the first of all detectors since `began` was cleared took points in."""

    began: float | None = None

    def accept(self, points: Columns, arrived_ms: Int64Array | None = None, *, want_scores: bool = False) -> Result:
        if TimedDetector.began is None:
            TimedDetector.began = time.perf_counter()
        return super().accept(points, arrived_ms, want_scores=want_scores)


class Bench:
    def __init__(self, kpis: int, points: int) -> None:
        self.checkpoint: Checkpoint = repository.load([repository.bundled_root()], "deepant")
        self.window = self.checkpoint.model.window
        self.warm = self.window + 12  # minutes until every window is full, and the usual step known
        self.load = Load.make(kpis, self.warm + points // kpis)
        self.steps = len(self.load.value)
        self.points = (self.steps - self.warm) * kpis

    def detector(self) -> Detector:
        # The scores of the checkpoint's own held-out windows stand in for those of each KPI: thresholds are at work.
        calibrations = tuple(np.asarray(one, np.float64) for one in self.checkpoint.calibrations)
        settings = load_settings({})
        one = Served(self.checkpoint.ref, self.checkpoint.model, calibrations=calibrations)
        return TimedDetector(settings.detector(), [Rule(policy=settings.policy())], [one])

    # -- without servers ------------------------------------------------------------------------------------------

    def forward(self) -> float:
        """Return seconds per point of the network alone."""
        model = self.checkpoint.model
        rng = np.random.default_rng(1)
        x = rng.normal(0, 1, (self.load.kpis, self.window, 1)).astype(np.float32)
        assert isinstance(model, DeepAnT)
        run_padded(partial(forward, model.packed), [x], chunk=model.chunk)
        began = time.perf_counter()
        for _ in range(self.steps - self.warm):
            run_padded(partial(forward, model.packed), [x], chunk=model.chunk)
        return (time.perf_counter() - began) / self.points

    def core(self) -> tuple[float, int]:
        """Return seconds per point of the detector alone, and its events."""
        detector = self.detector()
        slot = np.array([detector.index[self.load.name(k)] for k in range(self.load.kpis)], np.int32)
        for step in range(self.warm):
            detector.accept(self.load.columns(slot, step))
        scored = detector.counts.scored
        minutes = [self.load.columns(slot, step) for step in range(self.warm, self.steps)]
        began = time.perf_counter()
        for columns in minutes:
            detector.accept(columns)
        seconds = time.perf_counter() - began
        assert detector.counts.scored - scored == self.points
        return seconds / self.points, detector.counts.events

    # -- with servers ---------------------------------------------------------------------------------------------

    async def bare(
        self, settings: Settings, first: dict[TopicPartition, int], last: dict[TopicPartition, int]
    ) -> float:
        """Return seconds per point of a loop that detects nothing."""
        consumer = points_consumer(settings.kafka)
        await consumer.start()
        consumer.assign(list(first))
        producers = {at: transactional_producer(settings.kafka, at) for at in first}
        for producer in producers.values():
            await producer.start()
        for at, offset in first.items():
            consumer.seek(at, offset)
        position = dict(first)
        pending: dict[TopicPartition, list[bytes]] = {at: [] for at in first}
        settled = dict(first)

        async def settle(at: TopicPartition, producer: AIOKafkaProducer) -> None:
            while settled[at] < last[at]:
                offset, values = position[at], pending[at]
                if offset > settled[at]:
                    pending[at] = []
                    async with producer.transaction():
                        for value in values:
                            await producer.send(settings.kafka.anomalies_topic, value, key=b"k")
                        offsets = {at: OffsetAndMetadata(offset, "")}
                        await producer.send_offsets_to_transaction(offsets, settings.kafka.group)
                    settled[at] = offset
                await asyncio.sleep(settings.kafka.settle_interval_ms / 1000)

        began = time.perf_counter()
        tasks = [asyncio.create_task(settle(at, producer)) for at, producer in producers.items()]
        while any(position[at] < last[at] for at in last):
            batches = await consumer.getmany(timeout_ms=200, max_records=settings.kafka.max_poll_records)
            for at, records in batches.items():
                points = [decode(record.value) for record in records]
                pending[at] += [record.value for record in records[::100]]
                assert len(points) == len(records)
                position[at] = records[-1].offset + 1
                await asyncio.sleep(0)
        await asyncio.gather(*tasks)
        seconds = time.perf_counter() - began
        for producer in producers.values():
            await producer.stop()
        await consumer.stop()
        return seconds / self.points

    async def live(self, settings: Settings) -> tuple[float, int, float]:
        """Return seconds per point of the worker, its events, and the seconds from its start to its first point."""
        warm, total = self.warm * self.load.kpis, self.steps * self.load.kpis
        await self._work(settings, 0, warm)  # fills the windows, and leaves them in the store
        self.send(settings, self.warm, self.steps)
        return await self._work(settings, warm, total)

    async def _work(self, settings: Settings, first: int, last: int) -> tuple[float, int, float]:
        store = Store(settings.redis.url.get_secret_value(), prefix=settings.redis.prefix)
        worker = Worker(settings, lambda _: self.detector, store)
        started, TimedDetector.began = time.perf_counter(), None
        task = asyncio.create_task(worker.run())
        while sum(partition.settled for partition in worker.partitions.values()) < last:
            if task.done():
                task.result()
            await asyncio.sleep(0.005)
        assert TimedDetector.began is not None
        seconds, ready = time.perf_counter() - TimedDetector.began, TimedDetector.began - started
        published = sum(partition.published for partition in worker.partitions.values())
        counts = worker.counts()
        worker.stop()
        await task
        await store.close()
        assert counts.points == last - first, "no point came twice"
        assert first == 0 or counts.scored == last - first, "every point was scored"
        return seconds / (last - first), published, ready

    def send(self, settings: Settings, begin: int, end: int) -> None:
        """Put minutes into the points topic, spread over the partitions by key."""
        producer = confluent_kafka.Producer(
            {
                "bootstrap.servers": settings.kafka.bootstrap_servers,
                "linger.ms": 20,
                "batch.size": 1 << 20,
                "queue.buffering.max.messages": 2_000_000,
                "partitioner": "murmur2",
            }
        )
        for key, value in self.load.records(begin, end):
            producer.produce(settings.kafka.points_topic, value, key)
        producer.flush()


async def ends(settings: Settings) -> dict[TopicPartition, int]:
    consumer = AIOKafkaConsumer(**client_options(settings.kafka))
    await consumer.start()
    try:
        at = [TopicPartition(settings.kafka.points_topic, p) for p in range(PARTITIONS)]
        offsets: dict[TopicPartition, int] = await consumer.end_offsets(at)
        return offsets
    finally:
        await consumer.stop()


@contextlib.asynccontextmanager
async def servers(kind: str) -> AsyncIterator[tuple[Broker, StoreServer]]:
    broker: Broker = KafkaServer() if kind == "kafka" else EmbeddedBroker()
    async with broker, StoreServer() as store:
        yield broker, store


async def run(kpis: int, points: int, rounds: int, kind: str) -> None:
    bench = Bench(kpis, points)
    times: dict[str, list[float]] = {name: [] for name in ("forward", "core", "bare", "live", "ready")}
    events = {"core": 0, "live": 0}
    async with servers(kind) as (broker, store):
        for _ in range(rounds):
            unique = uuid.uuid4().hex[:8]
            settings = load_settings(
                {
                    "TOCSIN_KAFKA__BOOTSTRAP_SERVERS": broker.bootstrap,
                    "TOCSIN_KAFKA__GROUP": f"bench-{unique}",
                    "TOCSIN_KAFKA__POINTS_TOPIC": f"points-{unique}",
                    "TOCSIN_KAFKA__ANOMALIES_TOPIC": f"anomalies-{unique}",
                    "TOCSIN_KAFKA__REJECTS_TOPIC": f"rejects-{unique}",
                    "TOCSIN_KAFKA__PARTITIONS": str(PARTITIONS),
                    "TOCSIN_REDIS__URL": store.url,
                    "TOCSIN_REDIS__PREFIX": f"bench-{unique}",
                }
            )
            kafka = settings.kafka
            topics = (kafka.points_topic, kafka.anomalies_topic, kafka.rejects_topic)
            await ensure_topics(broker.bootstrap, dict.fromkeys(topics, PARTITIONS))
            times["forward"].append(bench.forward())
            seconds, events["core"] = bench.core()
            times["core"].append(seconds)
            bench.send(settings, 0, bench.warm)
            first = await ends(settings)
            seconds, events["live"], ready = await bench.live(settings)
            times["live"].append(seconds)
            times["ready"].append(ready)
            other = settings.model_copy(update={"kafka": kafka.model_copy(update={"group": f"bare-{unique}"})})
            times["bare"].append(await bench.bare(other, first, await ends(settings)))
    forward, core, bare, live = (statistics.median(times[name]) for name in ("forward", "core", "bare", "live"))
    limit = forward + bare
    say("forward", forward * 1e6, "us/point", points=bench.points, kpis=kpis, window=bench.window, rounds=rounds)
    say("bare", bare * 1e6, "us/point", broker=kind)
    say("limit", limit * 1e6, "us/point")
    say("core", core * 1e6, "us/point", forward / core, "forward", events=events["core"], points_per_s=round(1 / core))
    say("live", live * 1e6, "us/point", limit / live, "limit", events=events["live"], points_per_s=round(1 / live))
    say("restore", statistics.median(times["ready"]), "s", against=f"start to first point, {kpis} KPIs of state")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench")
    parser.add_argument("--points", type=int, default=1_000_000)
    parser.add_argument("--kpis", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--broker", choices=("kafka", "embedded"), default="embedded" if why_no_kafka() else "kafka")
    asked = parser.parse_args()
    use_one_thread()
    logging.getLogger("aiokafka").setLevel("CRITICAL")  # it speaks of every retry
    asyncio.run(run(asked.kpis, asked.points, asked.rounds, asked.broker))


main()
