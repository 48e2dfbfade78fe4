"""Ending what runs in the background."""

from __future__ import annotations

import asyncio


async def ended(task: asyncio.Task[None]) -> None:
    """Cancel a task until it has ended: once may not be enough.

    redis-py sends within `asyncio.wait_for`, and that of Python 3.11 forgets a cancellation that comes just as the
    sending is done: seen as a worker that never stopped.
    """
    while not task.done():
        task.cancel()
        await asyncio.wait({task}, timeout=0.1)
