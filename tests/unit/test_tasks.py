"""What runs beside the event loop."""

from __future__ import annotations

import asyncio
import threading

import pytest

from stream.tasks import done_before, ended, in_thread, pause


async def test_a_short_function_keeps_the_event_loop_still() -> None:
    turns: list[str] = []
    asyncio.get_running_loop().call_soon(turns.append, "another")
    name, before = await in_thread(lambda: (threading.current_thread().name, list(turns)))
    assert name != threading.current_thread().name
    assert before == [], "nothing else had its turn meanwhile"
    assert turns == ["another"], "and then it had"


async def test_a_long_function_does_not() -> None:
    release, turns = threading.Event(), list[str]()

    def others() -> None:
        turns.append("another")
        release.set()

    asyncio.get_running_loop().call_soon(others)
    assert await in_thread(release.wait, 30.0), "the event loop has set it while the function waited"
    assert turns == ["another"]


@pytest.mark.parametrize("error", [TimeoutError("own"), ValueError("own")])
async def test_what_a_function_raises_comes_through(error: Exception) -> None:
    def fails() -> None:
        raise error

    with pytest.raises(type(error), match="own"):
        await in_thread(fails)


async def test_a_task_that_forgets_a_cancellation_is_cancelled_again() -> None:
    async def stubborn() -> None:
        with pytest.raises(asyncio.CancelledError):
            await asyncio.Event().wait()
        await asyncio.Event().wait()

    task = asyncio.create_task(stubborn())
    await asyncio.sleep(0)
    await ended(task)
    assert task.cancelled()


async def test_work_is_done_before_a_stop_or_left_at_once_even_if_it_forgets_that_it_was_cancelled() -> None:
    stop, done = asyncio.Event(), list[str]()

    async def short() -> None:
        done.append("short")

    async def stubborn() -> None:
        with pytest.raises(asyncio.CancelledError):
            await asyncio.Event().wait()
        done.append("has forgotten it")
        await asyncio.Event().wait()

    async def fails() -> None:
        raise ValueError("own")

    assert await done_before(stop, short())
    with pytest.raises(ValueError, match="own"):
        await done_before(stop, fails())
    asyncio.get_running_loop().call_soon(stop.set)
    assert not await done_before(stop, stubborn())
    assert done == ["short", "has forgotten it"]


async def test_work_before_a_stop_ends_with_the_task_that_waits_for_it() -> None:
    ended_too = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended_too.set()

    task = asyncio.create_task(done_before(asyncio.Event(), work()))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    await ended(task)
    assert task.cancelled() and ended_too.is_set()


def test_pauses_grow_up_to_a_bound_however_long_it_fails() -> None:
    for failures, most in ((1, 0.5), (2, 1.0), (3, 2.0), (4, 4.0), (5, 5.0), (100_000, 5.0)):
        drawn = [pause(failures, 0.5, 5.0) for _ in range(100)]
        assert most / 2 <= min(drawn) < max(drawn) <= most
