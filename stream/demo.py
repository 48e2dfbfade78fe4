"""`tocsin demo`: the whole path on embedded servers, from a CSV file to anomaly events, and nothing left behind."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from stream.discovery import with_servers
from stream.embedded import embedded_servers
from stream.errors import TocsinError
from stream.events import Event
from stream.points import Points
from stream.replay import CHUNK, replay
from stream.report import Summary, summarise
from stream.service import make_worker
from stream.settings import Settings
from stream.subscribe import subscribe
from stream.worker import Worker

_LAST_EVENTS_S = 10.0  # how long published events may take to reach the subscription
_LOOK_S = 0.02
_CHUNKS = 60  # that a replay is cut into


async def demo(
    settings: Settings,
    points: Points,
    *,
    on_event: Callable[[Event], None],
    on_progress: Callable[[int, int], None],
) -> Summary:
    """Replay points through embedded servers and a worker; returns what it was worth.

    Args:
        settings: broker and store in them are replaced.
        points: what to replay.
        on_event: told each event as it is published.
        on_progress: told how many records were sent and how many are settled.
    """
    async with embedded_servers() as servers:
        settings = with_servers(settings, servers)
        worker = make_worker(settings)
        try:
            return await _drive(settings, worker, points, on_event, on_progress)
        except BaseExceptionGroup as group:
            raise _innermost(group) from None
        finally:
            await worker.store.close()


async def _drive(
    settings: Settings,
    worker: Worker,
    points: Points,
    on_event: Callable[[Event], None],
    on_progress: Callable[[int, int], None],
) -> Summary:
    events: list[Event] = []
    sent = 0

    async def follow() -> None:
        async for event in subscribe(settings.kafka, start="earliest"):
            events.append(event)
            on_event(event)

    def on_sent(n: int) -> None:
        nonlocal sent
        sent = n
        on_progress(sent, settled(worker))

    async def until_settled(n: int) -> None:
        while settled(worker) < n:
            await asyncio.sleep(_LOOK_S)
            on_progress(sent, settled(worker))

    # Sent as fast as the broker takes them, all points would be one batch: a second of silence, then all events at
    # once. So that they come one by one, as they do in life, the replay stays just ahead of the worker.
    total = points.n_records
    chunk = min(max(total // _CHUNKS, 1), CHUNK)

    async def room(begin: int) -> None:
        await until_settled(begin - chunk)

    async with asyncio.TaskGroup() as group:  # whichever part fails, the others end with it
        running = group.create_task(worker.run())
        await worker.assigned.wait()
        following = group.create_task(follow())
        started = time.monotonic()
        await replay(points, settings.kafka, on_sent=on_sent, chunk=chunk, room=room)
        await until_settled(total)
        elapsed_s = time.monotonic() - started
        published = sum(partition.published for partition in worker.partitions.values())
        rejected = sum(partition.rejected for partition in worker.partitions.values())
        counts = worker.counts()
        deadline = time.monotonic() + _LAST_EVENTS_S
        while len(events) < published and time.monotonic() < deadline:  # noqa: ASYNC110  # they come from elsewhere
            await asyncio.sleep(_LOOK_S)
        worker.stop()
        await running
        following.cancel()
    if len(events) < published:
        raise TocsinError(f"{published} events were published, {len(events)} came through within {_LAST_EVENTS_S:g} s")
    return summarise(points, events, counts, elapsed_s=elapsed_s, rejected=rejected)


def settled(worker: Worker) -> int:
    """Return how many records a worker has settled; the demo's topic is its own, so that offsets count points."""
    return sum(partition.settled for partition in worker.partitions.values())


def _innermost(group: BaseExceptionGroup[BaseException]) -> BaseException:
    first = group.exceptions[0]
    return _innermost(first) if isinstance(first, BaseExceptionGroup) else first
