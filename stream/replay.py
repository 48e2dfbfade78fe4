"""Replaying points of files into the points topic, at their own pace or as fast as the broker takes them."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from aiokafka.errors import KafkaError

from stream.csvfile import Points
from stream.errors import BrokerError, ConfigError
from stream.events import iso_time
from stream.kafka import points_producer
from stream.records import SECONDS_BELOW
from stream.settings import KafkaSettings
from stream.topics import ensure_topics

CHUNK = 5_000  # points between two acknowledgements at full speed
_TICK_S = 0.05  # a paced replay sends what is due this often
_LAST_CHUNK_S = 10.0  # how long a stopped replay waits for the broker to acknowledge what it was given


class _Wire(msgspec.Struct):
    kpi: str
    timestamp: int | str
    value: float | None


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
    """Send points to the points topic, in their order, keyed by KPI; returns when the broker has all of them.

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
        first: index of the first point to send.
        on_sent: told after each acknowledgement how many points the broker has, those before `first` included.
        chunk: points between two acknowledgements, at most.
        room: asked before each chunk, with the number of points sent so far; it returns when more may be sent.

    Raises:
        BrokerError: the broker cannot be reached or refuses.
    """
    topic = topic or settings.points_topic
    await ensure_topics(
        settings.bootstrap_servers,
        {topic: settings.partitions},
        replication_factor=settings.replication,
        deadline_s=settings.connect_timeout_s,
    )
    producer = points_producer(settings)
    keys = [name.encode() for name in points.names]
    # A late point comes when its file had it: just after the newest one before it.
    arrival_s = np.maximum.accumulate(points.timestamp_ms) / 1000

    async def send(begin: int, end: int) -> None:
        delivered = []
        for kpi, timestamp_ms, value in zip(
            points.kpi[begin:end].tolist(),
            (points.timestamp_ms[begin:end] + shift_ms).tolist(),
            points.value[begin:end].tolist(),
            strict=True,
        ):
            # A small number would be read as seconds.
            stamp = timestamp_ms if timestamp_ms >= SECONDS_BELOW else iso_time(timestamp_ms)
            record = _Wire(points.names[kpi], stamp, value)  # a NaN is written as null
            delivered.append(await producer.send(topic, _encode(record), key=keys[kpi]))
        await asyncio.gather(*delivered)  # flush() alone would not tell of a record that the broker refused

    try:
        await producer.start()
        started, begin = time.monotonic(), first
        while begin < len(points.value):
            if room is not None:
                await room(begin)
            if speed is None:
                end = min(begin + chunk, len(points.value))
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
            f"cannot send to {topic} at {settings.bootstrap_servers}: {e!r}; set TOCSIN_KAFKA__BOOTSTRAP_SERVERS"
        ) from e
    finally:
        await producer.stop()


@dataclass(frozen=True, slots=True)
class Position:
    """How far a replay has come, kept in a file, so that a stopped one can be resumed."""

    path: Path

    @classmethod
    def of(cls, directory: Path, files: Sequence[Path], topic: str, bootstrap_servers: str) -> Position:
        """Return the position of the replay of these files, as they are now, into this topic."""
        digest = hashlib.sha256(f"{topic}\0{bootstrap_servers}".encode())
        for file in files:
            stat = file.stat()
            digest.update(f"\0{file.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}".encode())
        return cls(directory / f"replay-{digest.hexdigest()[:16]}.json")

    def read(self) -> tuple[int, int]:
        """Return how many points were sent and by how many ms they were shifted; (0, 0) where nothing is known."""
        try:
            fields = json.loads(self.path.read_text())
            return int(fields["sent"]), int(fields["shift_ms"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0, 0

    def write(self, sent: int, shift_ms: int = 0) -> None:
        """Note that so many points were sent, shifted by so much: a resumed replay must keep to the same grid.

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
