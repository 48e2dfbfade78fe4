"""What runs beside the event loop, and how long it waits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, ParamSpec, TypeVar

from redis.backoff import EqualJitterBackoff

_P = ParamSpec("_P")
_T = TypeVar("_T")

_SHORT_S = 0.25  # heartbeats are seconds apart
_CANCEL_AGAIN_S = 0.5
_threads = ThreadPoolExecutor(thread_name_prefix="judge")


async def in_thread(function: Callable[_P, _T], *args: _P.args, **options: _P.kwargs) -> _T:
    """Return what a function returns that may take a while; it runs in a thread.

    For the first quarter of a second the event loop stands still, and has a turn then. Would it wake up meanwhile, for
    each answer of the broker, the two threads would hand Python's lock to and fro, for up to a millisecond each time: a
    third of the pace of the service, measured with batches of 0.1 s. What takes longer runs beside the event loop.
    """
    future = _threads.submit(function, *args, **options)
    wait({future}, timeout=_SHORT_S)
    await asyncio.sleep(0)
    return await asyncio.wrap_future(future) if not future.done() else future.result()


def pause(failures: int, first_s: float, last_s: float) -> float:
    """Return how long to wait after so many failed attempts, seconds: twice as long each time, up to `last_s`.

    By chance it is up to half less: what failed for many partitions at once is not tried again by all of them at once.
    """
    # 2 ** 1024 is no float any more: an outage of an hour would end in an OverflowError.
    return EqualJitterBackoff(cap=last_s, base=first_s / 2).compute(min(failures, 64))


async def ended(task: asyncio.Task[Any]) -> None:
    """Cancel a task until it has ended: once may not be enough.

    redis-py sends within `asyncio.wait_for`, and that of Python 3.11 forgets a cancellation that comes just as the
    sending is done: seen as a worker that never stopped. In between, the task has time to close what it holds.
    """
    while not task.done():
        task.cancel()
        await asyncio.wait({task}, timeout=_CANCEL_AGAIN_S)


async def done_before(stop: asyncio.Event, work: Coroutine[object, object, None]) -> bool:
    """Do what may wait for long, and leave it as soon as an event is set; return whether it is done.

    Raises:
        Exception: what the work raises.
    """
    doing, stopped = asyncio.create_task(work), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({doing, stopped}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopped.cancel()
        await ended(doing)
    if doing.cancelled():
        return False
    doing.result()
    return True
