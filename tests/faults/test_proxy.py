"""The proxy does to a link what it says, and nothing while it is asked for nothing."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

import pytest

from stream.embedded import LOOPBACK, free_port
from tests.faults.proxy import Proxy

LARGE = bytes(range(256)) * 4_000  # about a MB


class Echo:
    """A server that sends back what it gets, and remembers it."""

    def __init__(self) -> None:
        self.port = free_port()
        self.got = bytearray()
        self.resets = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65_536):
                self.got += data
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            self.resets += 1
        finally:
            writer.close()


@pytest.fixture
async def echo() -> AsyncIterator[Echo]:
    one = Echo()
    async with await asyncio.start_server(one.serve, LOOPBACK, one.port):
        yield one


@pytest.fixture
async def proxy(echo: Echo) -> AsyncIterator[Proxy]:
    async with Proxy(echo.port) as one:
        yield one


@contextlib.asynccontextmanager
async def client(proxy: Proxy) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection(LOOPBACK, proxy.port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def echoed(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, data: bytes) -> float:
    """Send data and wait for all of it; returns the seconds it took."""
    began = time.monotonic()
    writer.write(data)
    async with asyncio.timeout(10):
        assert await reader.readexactly(len(data)) == data
    return time.monotonic() - began


async def test_asked_for_nothing_it_passes_everything(proxy: Proxy) -> None:
    async with client(proxy) as (reader, writer):
        await echoed(reader, writer, LARGE)
        assert proxy.links == 1
        writer.write_eof()
        assert await reader.read() == b"", "the end of the stream passes too, both ways"
    async with asyncio.timeout(5):
        while proxy.links:
            await asyncio.sleep(0.01)


async def test_a_cut_resets_both_ends(proxy: Proxy, echo: Echo) -> None:
    async with client(proxy) as (reader, writer), client(proxy) as (other, to_other):
        await echoed(reader, writer, b"a")
        await echoed(other, to_other, b"b")
        assert proxy.cut() == 2
        for one in (reader, other):
            with pytest.raises(ConnectionError):
                await one.readexactly(1)
        async with client(proxy) as (again, to_again):
            await echoed(again, to_again, b"c")
    assert echo.resets == 2


async def test_refused_until_accepted_while_links_go_on(proxy: Proxy) -> None:
    async with client(proxy) as (reader, writer):
        await echoed(reader, writer, b"a")
        await proxy.refuse()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(LOOPBACK, proxy.port)
        await echoed(reader, writer, b"b")
        await proxy.accept()
        async with client(proxy) as (again, to_again):
            await echoed(again, to_again, b"c")


async def test_a_delay_is_one_of_time_not_of_pace(proxy: Proxy) -> None:
    async with client(proxy) as (reader, writer):
        usual_s = await echoed(reader, writer, LARGE)
        proxy.delay_ms = 150
        assert 0.3 <= await echoed(reader, writer, b"a") < 2
        # Sixteen chunks one after the other, each delayed both ways, would take five seconds.
        assert 0.3 <= await echoed(reader, writer, LARGE) < usual_s + 3
        await proxy.heal()
        assert await echoed(reader, writer, b"a") < 0.3


async def test_throttled_to_its_rate(proxy: Proxy) -> None:
    async with client(proxy) as (reader, writer):
        proxy.bytes_per_s = 100_000
        assert 0.2 <= await echoed(reader, writer, LARGE[:30_000]) < 3
        await proxy.heal()
        await echoed(reader, writer, LARGE)


async def test_nothing_leaves_a_hole_before_it_is_healed(proxy: Proxy, echo: Echo) -> None:
    async with client(proxy) as (reader, writer):
        await echoed(reader, writer, b"a")
        proxy.hole()
        writer.write(b"lost?")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await reader.read(1)
        assert echo.got == b"a" and not writer.is_closing()
        await proxy.heal()
        async with asyncio.timeout(5):
            assert await reader.readexactly(5) == b"lost?"


async def test_half_closed_clients_read_the_end_and_are_still_heard(proxy: Proxy, echo: Echo) -> None:
    async with client(proxy) as (reader, writer):
        await echoed(reader, writer, b"a")
        assert proxy.half_close() == 1
        assert await reader.read() == b""
        writer.write(b"b")
        async with asyncio.timeout(5):
            while echo.got != b"ab":
                await asyncio.sleep(0.01)


async def test_a_server_that_is_down_looks_so() -> None:
    async with Proxy(free_port()) as proxy, client(proxy) as (reader, _):
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
