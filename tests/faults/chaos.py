"""A replay of known data while everything is being broken, and the judgement of what came of it."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import statistics
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from redis.asyncio import Redis
from redis.exceptions import RedisError

from stream import backtest, events
from stream.embedded import LOOPBACK, free_port
from stream.events import Event
from stream.points import Points
from stream.sample import KINDS, generate
from stream.settings import Settings, load_settings
from stream.topics import ensure_topics
from tests.faults.judge import Refused, Verdict, end_offsets, judge_events, judge_rejects, read_committed, refusals
from tests.faults.proxy import Proxy
from tests.faults.schedule import BROKER, KILL, LINK, STORE, Fault, Plan, schedule
from tests.faults.stage import Progress, Sender, Worker
from tests.live import START_MS, backtested, environment_for, published, read_all
from tests.servers import Broker, EmbeddedBroker, KafkaServer, StoreServer

STALLED_S = 120.0  # without a fault and without a committed offset: nothing recovers by itself any more
_LOOK_S = 0.02
_WATCH_S = 0.25
_STOP_S = 40.0
_READY_S = 45.0  # a kill waits so long for its worker to have partitions
_INTERVAL_S = 300  # of the points: with 30 intervals of silence, no clock on the wall can find one within 2.5 hours
_LAST = 0.97  # share of the points that is sent while faults are still to come
_KEPT_BACKUPS = 3
# Many small steps, for faults to fall between, and many events, for faults to lose.
_DETECTION = {
    "TOCSIN_KAFKA__MAX_POLL_RECORDS": "500",
    "TOCSIN_REDIS__FLUSH_INTERVAL_S": "0.3",
    "TOCSIN_POT__Q": "5e-3",
    "TOCSIN_WARMUP_H": "6",
    "TOCSIN_RECOVER_AFTER": "2",
}


@dataclass
class Report:
    """What was done and what came of it."""

    plan: Plan
    faults: Counter[str] = field(default_factory=Counter)
    records: int = 0
    events: Verdict = field(default_factory=Verdict)
    rejects: Verdict = field(default_factory=Verdict)
    recovered_s: dict[str, list[float]] = field(default_factory=dict)  # static, dynamic: from kill to next commit
    exits: list[str] = field(default_factory=list)  # of workers, that nobody asked for
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0
    logs: str = ""

    def __bool__(self) -> bool:
        """Say whether nothing was lost, doubled, out of order or different, and nothing else went wrong."""
        return bool(self.events) and bool(self.rejects) and not self.problems

    def table(self) -> str:
        """Return it as a table, one thing a line, and how to repeat it."""
        plan = self.plan
        rows = [(kind, str(count)) for kind, count in sorted(self.faults.items())]
        rows += [
            ("faults in all", str(self.faults.total())),
            ("records (with unreadable ones)", f"{self.records:,}"),
            ("events", self.events.counts()),
            ("rejects", self.rejects.counts()),
            *(
                (
                    f"kill of a {what} member to next commit of a partition",
                    f"median {statistics.median(some):.1f} s, longest {max(some):.1f} s",
                )
                for what, some in sorted(self.recovered_s.items())
            ),
            ("workers that ended by themselves", str(len(self.exits))),
            ("seconds", f"{self.seconds:.0f}"),
            ("seed", str(plan.seed)),
        ]
        width = max(len(name) for name, _ in rows)
        lines = [f"{name:<{width}}  {value}" for name, value in rows]
        lines += [f"  ended: {line}" for line in self.exits[:10]]
        lines += [f"PROBLEM: {line}" for line in self.problems]
        lines.append("clean" if self else f"NOT clean; what happened when, and the logs of the workers: {self.logs}")
        lines.append(
            f"again: python -m tests.faults --seed {plan.seed} --kills {plan.kills} --server-faults "
            f"{plan.server_faults} --link-faults {plan.link_faults} --points {plan.points} --series {plan.series} "
            f"--workers {plan.workers} --static {plan.static} --partitions {plan.partitions}"
            + (f" --outage-s {plan.outage_s:g}" if plan.outage_s else "")
            + ("" if plan.real else " --embedded")
        )
        return "\n".join(lines) + "\n"


def data(plan: Plan) -> Points:
    """Return KPIs of all kinds with incidents and hours of silence, merged by time."""
    days = 1.1 * plan.points / plan.series * _INTERVAL_S / 86_400  # some are missing
    samples = [
        generate(days, _INTERVAL_S, plan.seed * 1000 + n, START_MS, kind=KINDS[n % len(KINDS)], name=f"kpi-{n:03d}")
        for n in range(plan.series)
    ]
    return backtest.sample_points(samples).take(slice(0, plan.points))


class Chaos:
    """A run; `run` it once."""

    def __init__(self, plan: Plan, directory: Path) -> None:
        self.report = Report(plan, logs=str(directory))
        self.plan = plan
        self.directory = directory
        self.left = schedule(plan)
        self.store = StoreServer(durable=True)
        outside = free_port()
        self.broker: Broker = KafkaServer(outside=outside) if plan.real else EmbeddedBroker()
        behind = self.broker.outside_port if isinstance(self.broker, KafkaServer) else self.broker.port
        self.to_broker = Proxy(behind, outside)
        self.to_store = Proxy(self.store.port)
        self._busy = {"broker": asyncio.Lock(), "store": asyncio.Lock()}
        self._links = {"broker": asyncio.Lock(), "store": asyncio.Lock()}
        self._going_on: set[asyncio.Task[None]] = set()
        self._backups: list[dict[bytes, bytes]] = []

    def environment(self) -> dict[str, str]:
        # noida-db tells its clients its own port: no way round it.
        bootstrap = f"{LOOPBACK}:{self.to_broker.port}" if self.plan.real else self.broker.bootstrap
        url = f"redis://{LOOPBACK}:{self.to_store.port}/0"
        more = {"TOCSIN_KAFKA__PARTITIONS": str(self.plan.partitions), **_DETECTION}
        return dict(environment_for(bootstrap, url, f"chaos-{uuid.uuid4().hex[:8]}", **more))

    async def run(self) -> Report:
        """Break things until all points are through, then compare."""
        environment = self.environment()
        settings = load_settings(environment)
        points = data(self.plan)
        should = await asyncio.to_thread(backtested, points, settings)
        began = time.monotonic()
        async with self.broker, self.store, self.to_broker, self.to_store:
            kafka = settings.kafka
            topics = (kafka.points_topic, kafka.anomalies_topic, kafka.rejects_topic, kafka.shadow_topic)
            await ensure_topics(self.broker.bootstrap, dict.fromkeys(topics, kafka.partitions))
            async with self._working(environment) as workers:
                sender = await self._break_all(settings, points, workers)
                if not self.report.problems:
                    await self._end(workers)
            if not self.report.problems:
                await self._judge(settings, should, sender)
        self.report.seconds = time.monotonic() - began
        return self.report

    @contextlib.asynccontextmanager
    async def _working(self, environment: dict[str, str]) -> AsyncIterator[list[Worker]]:
        workers = []
        try:
            for number in range(self.plan.workers):
                instance = f"slot-{number}" if number < self.plan.static else ""
                more = {"TOCSIN_KAFKA__INSTANCE": instance}
                worker = Worker(f"worker-{number}", environment | more, self.directory)
                worker.start()
                workers.append(worker)
            yield workers
        finally:
            for worker in workers:
                worker.close()
                self.report.exits += worker.exits

    async def _break_all(self, settings: Settings, points: Points, workers: list[Worker]) -> Sender:
        progress = Progress(self.broker.bootstrap, settings.kafka, self._note)
        # A little more than from one fault to the next: a partition that stands still holds the others back, so that
        # the next fault finds all of them at work.
        ahead = max(2 * len(points) // (len(self.left) + 1), 600)
        sender = Sender(
            self.broker.bootstrap,
            settings.kafka,
            points,
            progress,
            ahead,
            self.plan.seed,
            lambda: _LAST if self.left else 1,
        )
        watching = asyncio.create_task(self._watch(workers))
        sending = asyncio.create_task(sender.run())
        breaking = asyncio.create_task(self._break(workers, progress, sender, len(points)))
        try:
            while not (
                breaking.done() and sending.done() and not self._going_on and progress.total >= sum(sender.sent)
            ):
                for task in (watching, sending, breaking, *self._going_on):
                    if task.done() and not task.cancelled():
                        task.result()
                if time.monotonic() - progress.changed > STALLED_S and not self._going_on:
                    self.report.problems.append(
                        f"nothing was committed for {STALLED_S:g} s: {progress.committed} of {sender.sent}"
                    )
                    break
                await asyncio.sleep(_LOOK_S)
        finally:
            for task in (watching, sending, breaking, *self._going_on):
                task.cancel()
            await asyncio.gather(watching, sending, breaking, *self._going_on, return_exceptions=True)
            progress.close()
        self.report.recovered_s = progress.recovered_s
        self.report.records = sum(sender.sent)
        self.report.problems += sender.problems
        return sender

    async def _watch(self, workers: list[Worker]) -> None:
        while True:
            for worker in workers:
                await worker.look()
            await asyncio.sleep(_WATCH_S)

    # -- breaking -------------------------------------------------------------------------------------------------

    async def _break(self, workers: list[Worker], progress: Progress, sender: Sender, total: int) -> None:
        while self.left:
            fault = self.left[0]
            while progress.total < fault.place * total:
                await asyncio.sleep(_LOOK_S)
            if fault.kind == KILL:
                worker = workers[fault.worker]
                deadline = time.monotonic() + (0 if fault.starting else _READY_S)
                while not worker.has_partitions() and time.monotonic() < deadline:
                    await asyncio.sleep(_LOOK_S)
                await asyncio.sleep(fault.later_s)
                self._note(f"{fault.kind}: {worker.log.name}")
                progress.note_kill(sender.sent, "static" if fault.worker < self.plan.static else "dynamic")
                await worker.kill()
            else:
                task = asyncio.create_task(self._later(fault))
                self._going_on.add(task)
                task.add_done_callback(self._over)
            self.report.faults[fault.kind] += 1
            self.left.pop(0)

    def _over(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (problem := task.exception()) is not None:
            self.report.problems.append(f"a fault could not be made: {problem!r}")
        self._going_on.discard(task)

    @contextlib.asynccontextmanager
    async def _noted(self, fault: Fault) -> AsyncIterator[None]:
        self._note(f"{fault.kind} (strength {fault.strength})")
        yield
        self._note(f"over: {fault.kind}")

    def _note(self, what: str) -> None:
        with (self.directory / "timeline.log").open("a") as file:
            file.write(f"{datetime.now(UTC):%H:%M:%S.%f} {what}\n")

    async def _later(self, fault: Fault) -> None:
        await asyncio.sleep(fault.later_s)
        whose = fault.kind.split()[0]
        if fault.kind in BROKER:
            async with self._busy["broker"], self._noted(fault):
                await self._break_broker(fault)
        elif fault.kind in STORE:
            async with self._busy["store"], self._noted(fault):
                await self._break_store(fault)
        else:
            async with self._links[whose], self._noted(fault):
                await self._break_link(fault, self.to_broker if whose == "broker" else self.to_store)

    async def _break_broker(self, fault: Fault) -> None:
        if fault.kind == BROKER[0]:
            await self.broker.stop()
        else:
            await asyncio.to_thread(self.broker.kill)
        await asyncio.sleep(fault.lasts_s)
        await self.broker.start()

    async def _break_store(self, fault: Fault) -> None:
        redis = Redis(port=self.store.port)
        try:
            match STORE.index(fault.kind):
                case 0:
                    await self._back_up(redis)
                    await redis.flushall()
                case 1:
                    await self.store.stop()
                    await self.store.start()
                case 2:
                    await asyncio.to_thread(self.store.kill)
                    await self.store.start()
                case 3:
                    await asyncio.to_thread(self.store.kill)
                    shutil.rmtree(self.store.dir / "data")
                    await self.store.start()
                case 4:
                    await self._set_back(redis)
                case 5:
                    await self._configured(redis, "maxmemory", "1", "0", fault.lasts_s)
                case 6:
                    await self._configured(redis, "min-replicas-to-write", "1", "0", fault.lasts_s)
                case _:
                    await redis.client_pause(round(fault.lasts_s * 1000))
            if fault.kind not in STORE[3:5]:
                await self._back_up(redis)
        finally:
            await redis.aclose()

    async def _configured(self, redis: Redis, name: str, broken: str, usual: str, lasts_s: float) -> None:
        await redis.config_set("maxmemory-policy", "noeviction")
        await redis.config_set(name, broken)
        await asyncio.sleep(lasts_s)
        await redis.config_set(name, usual)

    async def _back_up(self, redis: Redis) -> None:
        with contextlib.suppress(RedisError):  # it is broken otherwise just now
            backup: dict[bytes, bytes] = {}
            async for key in redis.scan_iter():
                if blob := await redis.dump(key):
                    backup[bytes(key)] = blob
            self._backups = [*self._backups, backup][-_KEPT_BACKUPS:]

    async def _set_back(self, redis: Redis) -> None:
        """Set every partition's state back to what it was some faults ago."""
        if not self._backups:
            await self._back_up(redis)
        for key, blob in self._backups[0].items():
            await redis.restore(key, 0, blob, replace=True)

    async def _break_link(self, fault: Fault, proxy: Proxy) -> None:
        match LINK.index(fault.kind.split(" link ")[1]):
            case 0:
                proxy.cut()
            case 1:
                await proxy.refuse()
                proxy.cut()
            case 2:
                proxy.delay_ms = fault.strength
            case 3:
                proxy.bytes_per_s = fault.strength
            case 4:
                proxy.hole()
            case _:
                proxy.half_close()
        await asyncio.sleep(fault.lasts_s)
        await proxy.heal()

    # -- judging --------------------------------------------------------------------------------------------------

    async def _end(self, workers: list[Worker]) -> None:
        codes = await asyncio.gather(*(worker.stop(_STOP_S) for worker in workers))
        for worker, code in zip(workers, codes, strict=True):
            if code:
                self.report.problems.append(f"{worker.log.name} ended with exit code {code} after a SIGTERM")

    async def _judge(self, settings: Settings, should: list[Event], sender: Sender) -> None:
        kafka, bootstrap = settings.kafka, self.broker.bootstrap
        direct = kafka.model_copy(update={"bootstrap_servers": bootstrap})
        ends = await asyncio.to_thread(end_offsets, bootstrap, kafka.points_topic)
        if [ends[number] for number in range(kafka.partitions)] != sender.sent:
            self.report.problems.append(f"the points topic itself holds {ends}, sent were {sender.sent}")
        if self.plan.real:
            said = await asyncio.to_thread(read_committed, bootstrap, kafka.anomalies_topic)
            self.report.events = judge_events([message.value() or b"" for message in said], should)
            refused = await asyncio.to_thread(read_committed, bootstrap, kafka.rejects_topic)
            self.report.rejects = judge_rejects(refusals(refused), sender.rejects)
        else:  # librdkafka misses committed records of noida-db behind aborted ones
            self.report.events = judge_events([events.encode(one) for one in await published(direct)], should)
            again = await read_all(direct, kafka.rejects_topic)
            self.report.rejects = judge_rejects(
                [Refused.of(one.partition, one.headers) for one in again], sender.rejects
            )
