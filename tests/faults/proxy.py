"""A TCP proxy that breaks links on purpose: between a client and a server, both on loopback.

async with Proxy(server_port) as proxy:   # clients connect to proxy.port
    proxy.cut()                           # every link is reset
    await proxy.refuse()                  # nobody listens, until `accept`
    proxy.delay_ms = 200                  # each byte comes so much later, both ways
    proxy.bytes_per_s = 50_000            # of each link and direction
    proxy.hole()                          # nothing passes and nothing is closed, until `heal`
    proxy.half_close()                    # clients see the end of the stream; what they send still passes
    await proxy.heal()                    # as at the start; links that were cut stay so
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import time
from types import TracebackType
from typing import Self

from stream.embedded import LOOPBACK, free_port

_CHUNK_BYTES = 64 << 10
_QUEUED = 64  # chunks on their way, each direction; behind them the sender waits, as with a full socket
_SLICES_PER_S = 20  # a throttled link passes so many small portions a second, no large ones
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER 0: a close is a reset


class _Link:
    """A client's connection and the one to the server that belongs to it."""

    def __init__(self, proxy: Proxy, client: asyncio.StreamWriter, server: asyncio.StreamWriter) -> None:
        self._proxy = proxy
        self.client = client
        self.server = server

    def reset(self) -> None:
        for writer in (self.client, self.server):
            with contextlib.suppress(OSError):
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            writer.transport.abort()

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry one direction to its end, and say the end on."""
        on_way: asyncio.Queue[tuple[float, bytes | None]] = asyncio.Queue(_QUEUED)

        async def fetch() -> None:
            data: bytes | None = None
            while data != b"":
                with contextlib.suppress(ConnectionError):
                    data = await reader.read(_CHUNK_BYTES)
                    await on_way.put((time.monotonic(), data))
                    continue
                await on_way.put((time.monotonic(), None))
                return

        fetching = asyncio.create_task(fetch())
        try:
            while True:
                came, data = await on_way.get()
                if data is None:
                    raise ConnectionResetError
                await self._pass(came, data, writer)
                if not data:
                    with contextlib.suppress(OSError):
                        writer.write_eof()
                    return
        finally:
            fetching.cancel()

    async def _pass(self, came: float, data: bytes, writer: asyncio.StreamWriter) -> None:
        proxy = self._proxy
        while (wait_s := came + proxy.delay_ms / 1000 - time.monotonic()) > 0:
            await asyncio.sleep(min(wait_s, 0.05))  # it may be healed meanwhile
        while data:
            await proxy.passing.wait()
            rate = proxy.bytes_per_s
            portion = max(rate // _SLICES_PER_S, 1) if rate else len(data)
            if not writer.is_closing():
                writer.write(data[:portion])
                await writer.drain()
            data = data[portion:]
            if rate:
                await asyncio.sleep(min(portion / rate, 1.0))


class Proxy:
    """Stands between clients and a server; see the module.

    Args:
        target_port: of the server; it need not run yet.
        port: to listen on; None: a free one.
    """

    def __init__(self, target_port: int, port: int | None = None) -> None:
        self.target_port = target_port
        self.port = port or free_port()
        self.delay_ms = 0
        self.bytes_per_s = 0  # 0: no limit
        self.passing = asyncio.Event()
        self.passing.set()
        self._links: set[_Link] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._listening: asyncio.Server | None = None

    @property
    def links(self) -> int:
        """Connections that pass through now."""
        return len(self._links)

    def cut(self) -> int:
        """Reset all links; returns how many."""
        links = list(self._links)
        for link in links:
            link.reset()
        return len(links)

    async def refuse(self) -> None:
        """Refuse new connections, as where nobody listens; those that are there go on."""
        if self._listening is not None:
            self._listening.close()
            self._listening = None
            await asyncio.sleep(0)

    async def accept(self) -> None:
        """Accept connections (again)."""
        if self._listening is None:
            self._listening = await asyncio.start_server(self._connected, LOOPBACK, self.port)

    def hole(self) -> None:
        """Pass nothing and close nothing; what is sent meanwhile arrives after `heal`."""
        self.passing.clear()

    def half_close(self) -> int:
        """Tell every client that the server has sent all; what the clients send still passes. Returns how many."""
        links = [link for link in self._links if not link.client.is_closing()]
        for link in links:
            with contextlib.suppress(OSError):
                link.client.write_eof()
        return len(links)

    async def heal(self) -> None:
        """Let everything pass again."""
        self.delay_ms = self.bytes_per_s = 0
        self.passing.set()
        await self.accept()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._carry(reader, writer)
        except OSError:  # the server is down
            writer.transport.abort()
        except asyncio.CancelledError:  # by `close` alone; asyncio would log it
            writer.transport.abort()
        finally:
            self._tasks.discard(task)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_server, to_server = await asyncio.open_connection(LOOPBACK, self.target_port)
        link = _Link(self, writer, to_server)
        self._links.add(link)
        ways = [
            asyncio.create_task(link.carry(reader, to_server)),
            asyncio.create_task(link.carry(from_server, writer)),
        ]
        try:
            done, _ = await asyncio.wait(ways, return_when=asyncio.FIRST_EXCEPTION)
            if any(way.exception() for way in done):  # one side has reset its connection: so does the other
                link.reset()
        finally:
            self._links.discard(link)
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            for one in (writer, to_server):
                one.close()

    async def close(self) -> None:
        """Stop listening and cut all links."""
        await self.refuse()
        self.cut()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def __aenter__(self) -> Self:
        await self.accept()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
