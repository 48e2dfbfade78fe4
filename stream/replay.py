"""Replaying points of files into the points topic, at their own pace or as fast as the broker takes them."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
from aiokafka.errors import KafkaError

from stream.columns import Int64Array
from stream.errors import BrokerError, ConfigError
from stream.events import iso_time
from stream.kafka import explained, points_producer
from stream.points import Points
from stream.records import SECONDS_BELOW
from stream.settings import KafkaSettings
from stream.topics import ensure_topics

CHUNK = 5_000  # records between two acknowledgements at full speed
_TICK_S = 0.05  # a paced replay sends what is due this often
_LAST_CHUNK_S = 10.0  # how long a stopped replay waits for the broker to acknowledge what it was given


class _Point(msgspec.Struct):
    kpi: str
    timestamp: int | str
    value: float | None


class _Entity(msgspec.Struct):
    entity: str
    timestamp: int | str
    values: dict[str, float | None]


_encode = msgspec.json.Encoder().encode


async def replay(
    points: Points,
    settings: KafkaSettings,
    *,
    topic: str | None = None,
    speed: float | None = None,
    shift_ms: int = 0,
    first: int = 0,
    on_sent: Callable[[int], None] | None = None,
    chunk: int = CHUNK,
    room: Callable[[int], Awaitable[None]] | None = None,
) -> None:
    """Send points to the points topic, in their order, keyed by KPI or entity; returns when the broker has all of them.

    Each point of a KPI is a record; of an entity those of one line are one.

    The topic is created if it does not exist. Cancelled, it still waits for the broker to acknowledge what it was
    given, so that `on_sent` knows for certain where to go on.

    Kafka's own timestamps are those of the sending: the event time is in the payload alone, or the topic's
    retention would delete an old stream at once.

    Args:
        points: what to send.
        settings: where the broker is.
        topic: another topic than that of the settings.
        speed: event seconds per second; None is as fast as possible.
        shift_ms: added to every timestamp.
        first: number of the first record to send.
        on_sent: told after each acknowledgement how many records the broker has, those before `first` included.
        chunk: records between two acknowledgements, at most.
        room: asked before each chunk, with the number of records sent so far; it returns when more may be sent.

    Raises:
        BrokerError: the broker cannot be reached or refuses.
    """
    topic = topic or settings.points_topic
    await ensure_topics(settings, {topic: settings.partitions})
    producer = points_producer(settings)
    keys = [name.encode() for name in points.names]
    edges = np.append(np.flatnonzero(points.begins), len(points))  # of the records
    total = len(edges) - 1
    # A late point comes when its file had it: just after the newest one before it.
    arrival_s = np.maximum.accumulate(points.timestamp_ms[edges[:-1]]) / 1000

    async def send(begin: int, end: int) -> None:
        delivered = []
        for kpi, record in _records(points, edges[begin : end + 1], shift_ms):
            delivered.append(await producer.send(topic, record, key=keys[kpi]))
        await asyncio.gather(*delivered)  # flush() alone would not tell of a record that the broker refused

    try:
        await producer.start()
        started, begin = time.monotonic(), first
        while begin < total:
            if room is not None:
                await room(begin)
            if speed is None:
                end = min(begin + chunk, total)
            else:
                due = arrival_s[first] + (time.monotonic() - started) * speed
                end = min(int(np.searchsorted(arrival_s, due, side="right")), begin + chunk)
                if end <= begin:
                    await asyncio.sleep(min(max((arrival_s[begin] - due) / speed, 0.001), _TICK_S))
                    continue
            sending = asyncio.ensure_future(send(begin, end))
            try:
                await asyncio.shield(sending)
            except asyncio.CancelledError:
                await asyncio.wait({sending}, timeout=_LAST_CHUNK_S)
                if sending.done() and sending.exception() is None and on_sent is not None:
                    on_sent(end)
                sending.cancel()
                raise
            begin = end
            if on_sent is not None:
                on_sent(begin)
    except KafkaError as e:
        raise BrokerError(
            f"cannot send to {topic} at {settings.bootstrap_servers}: {explained(e, settings, wish='Write')}"
        ) from e
    finally:
        await producer.stop()


def _records(points: Points, edges: Int64Array, shift_ms: int) -> Iterator[tuple[int, bytes]]:
    """Yield each of the records between these edges, with whose it is."""
    begin, end = int(edges[0]), int(edges[-1])
    times, values = (points.timestamp_ms[begin:end] + shift_ms).tolist(), points.value[begin:end].tolist()
    features, kpis = points.feature[begin:end].tolist(), points.kpi[begin:end].tolist()
    for at, after in pairwise((edges - begin).tolist()):
        kpi, timestamp_ms = kpis[at], times[at]
        # A small number would be read as seconds.
        stamp = timestamp_ms if timestamp_ms >= SECONDS_BELOW else iso_time(timestamp_ms)
        if metrics := points.metrics[kpi]:
            sent = {metrics[feature]: x for feature, x in zip(features[at:after], values[at:after], strict=True)}
            yield kpi, _encode(_Entity(points.names[kpi], stamp, sent))  # a NaN is written as null
        else:
            yield kpi, _encode(_Point(points.names[kpi], stamp, values[at]))


@dataclass(frozen=True, slots=True)
class Position:
    """How far a replay has come, kept in a file, so that a stopped one can be resumed."""

    path: Path

    @classmethod
    def of(
        cls, directory: Path, files: Sequence[Path], topic: str, bootstrap_servers: str, *, entity: bool = False
    ) -> Position:
        """Return the position of the replay of these files, as they are now (and as entities), into this topic."""
        digest = hashlib.sha256(f"{topic}\0{bootstrap_servers}".encode())
        if entity:
            digest.update(b"\0entity")
        for file in files:
            stat = file.stat()
            digest.update(f"\0{file.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}".encode())
        return cls(directory / f"replay-{digest.hexdigest()[:16]}.json")

    def read(self) -> tuple[int, int]:
        """Return how many records were sent and by how many ms they were shifted; (0, 0) where nothing is known."""
        try:
            fields = json.loads(self.path.read_text())
            return int(fields["sent"]), int(fields["shift_ms"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0, 0

    def write(self, sent: int, shift_ms: int = 0) -> None:
        """Note that so many records were sent, shifted by so much: a resumed replay must keep to the same grid.

        Raises:
            ConfigError: the directory cannot be written to.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            draft = self.path.with_suffix(".tmp")
            draft.write_text(json.dumps({"sent": sent, "shift_ms": shift_ms}))
            draft.replace(self.path)
        except OSError as e:
            raise ConfigError(f"{self.path}: cannot be written ({e.strerror}); set XDG_STATE_HOME") from None
