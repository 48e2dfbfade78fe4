"""Where the faults take place: servers behind proxies, worker processes, a paced sender, and the committed offsets."""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import re
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from confluent_kafka import Consumer, KafkaException, Message, Producer, TopicPartition

from stream.embedded import Child
from stream.points import Points
from stream.settings import KafkaSettings
from stream.verify import partition_of

_LOOK_S = 0.02
_LONG_S = 15.0
_BAD_EVERY = 23  # points to one record that nobody can read: each is an output that can be lost or doubled
_ASSIGNED = re.compile(r"assigned [1-9]\d* partitions")
_SPARE = b'{"kpi":"a","timestamp":1,'


def _bad(number: int, now_ms: int) -> tuple[bytes | None, str]:
    """Return a record that has to be refused, and the reason."""
    late = json.dumps({"kpi": "a", "timestamp": now_ms + 86_400_000, "value": 1}).encode()
    return (
        (_SPARE, "not_json"),
        (_SPARE + b'"value":"high"}', "wrong_type"),
        (b'{"kpi":"a","timestamp":"noon","value":1}', "bad_timestamp"),
        (None, "empty"),
        (late, "in_the_future"),
        (b'{"kpi":"a","timestamp":1,"value":1e300}', "bad_value"),
    )[number % 6]


class Progress:
    """The committed offsets of the group, looked at all the time in a thread of its own."""

    def __init__(self, bootstrap: str, settings: KafkaSettings, note: Callable[[str], None] = lambda _: None) -> None:
        self._note = note
        self.committed = [0] * settings.partitions
        self.total = 0
        self.changed = time.monotonic()
        self._at = [TopicPartition(settings.points_topic, number) for number in range(settings.partitions)]
        self._consumer = Consumer(
            {
                "bootstrap.servers": bootstrap,
                "group.id": settings.group,
                "enable.auto.commit": False,
                "reconnect.backoff.max.ms": 300,
                "log_level": 0,
            }
        )
        self._waiting: list[tuple[str, float, dict[int, int]]] = []
        # By kind of member: from a kill to the next committed offset of each partition in which records waited.
        self.recovered_s: dict[str, list[float]] = defaultdict(list)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def note_kill(self, sent: Sequence[int], member: str) -> None:
        """Measure from now how long it takes until each partition in which records wait has gone on."""
        behind = {p: now for p, now in enumerate(self.committed) if sent[p] > now}
        self._waiting.append((member, time.monotonic(), behind))

    def close(self) -> None:
        self._ended.set()
        self._thread.join()
        self._consumer.close()

    def _run(self) -> None:
        while not self._ended.wait(_LOOK_S):
            try:
                found = self._consumer.committed(self._at, timeout=2)
            except KafkaException:  # the broker is down
                continue
            if any(one.error for one in found):
                continue
            self.committed = [max(one.offset, 0) for one in found]
            if (total := sum(self.committed)) != self.total:
                self.total, self.changed = total, time.monotonic()
            for member, since, behind in self._waiting:
                for partition in [p for p, was in behind.items() if self.committed[p] > was]:
                    del behind[partition]
                    took_s = time.monotonic() - since
                    self.recovered_s[member].append(took_s)
                    if took_s > _LONG_S:
                        self._note(f"partition {partition} goes on {took_s:.1f} s after the kill of a {member} member")
            self._waiting = [one for one in self._waiting if one[2]]


@dataclass
class Sender:
    """Sends points in their order, some of them unreadable, never more than `ahead` before what is committed."""

    bootstrap: str
    settings: KafkaSettings
    points: Points
    progress: Progress
    ahead: int
    seed: int
    limit: Callable[[], float]  # share of the points that may be sent so far: faults are still to come
    sent: list[int] = field(init=False)  # acknowledged, by partition
    rejects: dict[tuple[int, int], str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sent = [0] * self.settings.partitions
        self.given = 0
        self.done = False  # the broker has all of it

    async def run(self) -> None:
        """Send all points; returns when the broker has them."""
        producer = Producer(
            {
                "bootstrap.servers": self.bootstrap,
                "enable.idempotence": True,
                "linger.ms": 5,
                "message.timeout.ms": 300_000,
                "reconnect.backoff.max.ms": 300,
                "log_level": 0,
            }
        )
        rng = random.Random(self.seed)
        partitions = [partition_of(name, self.settings.partitions) for name in self.points.names]
        rows = zip(self.points.kpi.tolist(), self.points.timestamp_ms.tolist(), self.points.value.tolist(), strict=True)
        total = len(self.points)
        for number, (kpi, timestamp_ms, value) in enumerate(rows):
            if number % 50 == 0:
                await self._room(producer, total)
            name = self.points.names[kpi]
            record = json.dumps({"kpi": name, "timestamp": timestamp_ms, "value": value}).encode()
            self._give(producer, record, name.encode(), partitions[kpi], "")
            if rng.randrange(_BAD_EVERY) == 0:
                bad, reason = _bad(rng.randrange(6), round(time.time() * 1000))
                self._give(producer, bad, name.encode(), partitions[kpi], reason)
        await asyncio.to_thread(producer.flush, 300)
        if sum(self.sent) != self.given:
            self.problems.append(f"{self.given - sum(self.sent)} records were never acknowledged")
        self.done = True

    async def _room(self, producer: Producer, total: int) -> None:
        while True:
            producer.poll(0)
            # Unreadable records come on top of the points: no limit must stop the last of those.
            most = self.limit() * total if self.limit() < 1 else math.inf
            if self.given < min(self.progress.total + self.ahead, most):
                return
            await asyncio.sleep(_LOOK_S)

    def _give(self, producer: Producer, record: bytes | None, key: bytes, partition: int, reason: str) -> None:
        def acknowledged(error: object, message: Message) -> None:
            if error is not None:
                self.problems.append(str(error))
                return
            self.sent[partition] += 1
            if reason:
                self.rejects[partition, message.offset() or 0] = reason

        self.given += 1
        producer.produce(self.settings.points_topic, record, key, partition, on_delivery=acknowledged)


class Worker:
    """A `tocsin serve` in a process of its own that is started again whenever it ends, as by a supervisor."""

    def __init__(self, name: str, environment: Mapping[str, str], directory: Path) -> None:
        self.name = name
        self.starts = 0
        self.exits: list[str] = []  # that nobody had asked for: code and last line
        self._environment = {**os.environ, **environment}
        self._directory = directory
        self._child: Child | None = None
        self._busy = asyncio.Lock()
        self._has_partitions = False

    @property
    def log(self) -> Path:
        return self._directory / f"{self.name}-{self.starts:03d}.log"

    def start(self) -> None:
        self.starts += 1
        self._has_partitions = False
        self._child = Child(
            [sys.executable, "-m", "stream", "serve"], log=self.log, doomed=self._directory, env=self._environment
        )

    async def kill(self) -> None:
        """End it as a crash does, and start it again at once."""
        assert self._child is not None
        async with self._busy:
            await asyncio.to_thread(self._child.kill)
            self.start()

    async def look(self) -> None:
        """Start it again if it has ended by itself."""
        assert self._child is not None
        async with self._busy:
            if (code := self._child.exit_code()) is not None:
                words = self._child.last_words(1)
                self.exits.append(f"{self.log.name}: exit code {code}: {words[:300]}")
                await asyncio.to_thread(self._child.kill)
                self.start()

    def has_partitions(self) -> bool:
        if not self._has_partitions:
            self._has_partitions = _ASSIGNED.search(self.log.read_text(errors="replace")) is not None
        return self._has_partitions

    async def stop(self, timeout_s: float) -> int:
        """Ask it to end (SIGTERM); returns its exit code."""
        assert self._child is not None
        await asyncio.to_thread(self._child.stop, timeout_s)
        code = self._child.exit_code()
        return -1 if code is None else code

    def close(self) -> None:
        if self._child is not None:
            self._child.kill()
