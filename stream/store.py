"""The state store: one Redis hash a partition, a field a series, and the offset that the state belongs to.

Key `<prefix>:<group>:<topic>:<partition>` (a topic has no colon, so that no two partitions share a key); field: the
series' name; value: its state as bytes. The offset is a field of the same hash, under a name that no series can have,
so that state and offset move together and all of a partition lies on one node of a Redis Cluster.

Redis is a cache of the log: what is not there is computed again. So nothing here tries to keep data through a failure,
but everything makes sure that what `load` returns is whole: the state of one partition as of one offset.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import ssl
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, cast
from urllib.parse import unquote, urlsplit

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import AuthenticationError, NoPermissionError, RedisError

from stream import steps
from stream.errors import ConfigError, StoreError
from stream.security import REDIS, redis_options
from stream.settings import RedisSettings
from stream.tasks import pause

OFFSET_FIELD = b"\x00offset"  # a series' name holds no control characters
CLOCK_FIELD = b"\x00clock_ms"  # up to when silence has been judged: two states of one offset differ by it

_SETTING = "TOCSIN_REDIS__URL"
_SOCKET_TIMEOUT_S = 30.0  # redis-py's 5 s is less than a slow link needs for a chunk and a save behind it
_CHUNK_BYTES = 4 << 20  # of a command or an answer: long enough to be cheap, short enough to let others have their turn
_FIRST_SCAN = 500  # fields; the sizes seen set what follows
_MAX_SCAN = 10_000
_RETRIES = 3
_AGAIN_S = (0.05, 1.0)  # between two attempts to connect: at first, at last
_ATTEMPTS = 5  # at a read or a write that another client's write came between


@dataclass(frozen=True)
class PartitionState:
    """A partition's state: what came of all its records before `offset`."""

    offset: int
    blobs: dict[bytes, bytes]  # series -> its state


class Saved(enum.Enum):
    """What came of a save; true if the state is stored."""

    DONE = "done"
    OUTDATED = "outdated"  # a later state is there: another worker owns the partition now
    LOST = "lost"  # the state that this is a change of is gone (FLUSHALL, a failover): save the whole

    def __bool__(self) -> bool:
        return self is Saved.DONE


class _Retry(Retry):
    """Tries no login and no certificate again that were refused: redis-py takes that for a broken connection."""

    async def call_with_retry(
        self, do: Any, fail: Any, is_retryable: Any = None, with_failure_count: bool = False
    ) -> Any:
        def worth_it(error: Exception) -> bool:
            refused = isinstance(error, AuthenticationError) or _untrusted(error) is not None
            return not refused and (is_retryable is None or is_retryable(error))

        return await super().call_with_retry(do, fail, worth_it, with_failure_count)


class Store:
    """State of partitions in Redis or Valkey. Not connected until first used; `close` it, or use it in `async with`.

    Args:
        url: redis://, rediss:// or unix://, with user and password if need be.
        prefix: first part of every key.
        socket_timeout_s: how long a command may take.
        options: of redis-py, what the URL does not say of user and TLS.

    Raises:
        ConfigError: the URL is none.
    """

    def __init__(
        self, url: str, *, prefix: str = "tocsin", socket_timeout_s: float = _SOCKET_TIMEOUT_S, **options: Any
    ) -> None:
        self.address = redacted(url)
        self._login = f"{REDIS}USERNAME and {REDIS}PASSWORD" if "password" in options else _SETTING
        self._prefix = prefix
        try:
            self._redis: Redis = Redis.from_url(
                url,
                socket_timeout=socket_timeout_s,
                retry=_Retry(ExponentialWithJitterBackoff(cap=1.0, base=0.05), _RETRIES),
                **options,
            )
        except (ValueError, TypeError):
            # Without its cause: a malformed URL's error may quote the password.
            raise ConfigError(
                f"{_SETTING} ({self.address}) is no Redis URL: redis://[user:password@]host:port/db, rediss:// for TLS"
            ) from None

    @classmethod
    def of(cls, settings: RedisSettings) -> Self:
        """Return the store that the settings name, with what they say of user and TLS.

        Raises:
            ConfigError: they are wrong; the message names the setting.
        """
        return cls(settings.url.get_secret_value(), prefix=settings.prefix, **redis_options(settings))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def connect(self, deadline_s: float) -> None:
        """Wait until the store answers, for at most `deadline_s` seconds, and make sure that it allows what is needed.

        Raises:
            StoreError: it does not, lets us not in or allows too little (at once); the message names its address and
                the setting, or what is not allowed.
        """
        started = time.monotonic()
        failures, reason = 0, ""
        while True:
            remaining_s = deadline_s - (time.monotonic() - started)
            try:
                async with asyncio.timeout(max(remaining_s, 0.1)):
                    await cast(Awaitable[Any], self._redis.ping())
                _end_if_cancelled()
                break
            except (AuthenticationError, NoPermissionError) as e:
                raise StoreError(f"the store at {self.address} lets us not in: {e}; see {self._login}") from e
            except (RedisError, OSError) as e:  # a TimeoutError is an OSError
                if (untrusted := _untrusted(e)) is not None:
                    raise StoreError(
                        f"the store at {self.address} lets us not in: its certificate is not accepted, "
                        f"{untrusted.verify_message}; see {REDIS}SSL_CAFILE"
                    ) from e
                if not reason or not isinstance(e, TimeoutError):  # the last attempt may have had no time to fail
                    reason = f"{_reason(e)}{self._tls_or_not(e)}"
                failures += 1
                pause_s = pause(failures, *_AGAIN_S)
                tried_s = time.monotonic() - started
                if tried_s + pause_s >= deadline_s:
                    raise StoreError(
                        f"cannot reach the store at {self.address} (tried for {tried_s:.1f} s): "
                        f"{reason}; set {_SETTING} to your Redis"
                    ) from e
            await asyncio.sleep(pause_s)
        try:
            await self.check()
        except StoreError as e:
            # Anything else, such as a store that is full, passes: it is a cache, and the worker goes on without.
            if _not_allowed(e.__cause__):
                raise

    async def check(self) -> None:
        """Do what a worker does, with a key of no partition, to see whether all of it is allowed.

        Raises:
            StoreError: something is not, or the store fails; the message says what.
        """
        group, topic = "check", uuid.uuid4().hex
        try:
            await self.save(group, topic, 0, 1, {b"a": b"", b"b": b""}, whole=True)
            await self.save(group, topic, 0, 2, {b"a": b""}, deleted=[b"b"], base=1)
            await self.save(group, topic, 0, 0, {})  # refused, as it is older: ends with UNWATCH
            await self.load(group, topic, 0)
            await self.fields(group, topic, 0, [b"a"])
        except StoreError as e:
            if _not_allowed(e.__cause__):
                raise StoreError(
                    f"the store at {self.address} allows us too little: {e.__cause__} (deploy/acl/users.acl gives it)"
                ) from e.__cause__
            raise
        finally:
            with contextlib.suppress(StoreError):
                await self.drop(group, topic, 0)

    def _tls_or_not(self, error: Exception) -> str:
        """Return a hint, if a server seems to be there that does not speak as the URL says."""
        if self.address.startswith("rediss:"):
            strange = isinstance(error, TimeoutError) or any(isinstance(one, ssl.SSLError) for one in _causes(error))
            return " (is it a TLS port?)" if strange else ""
        closed = any("closed by server" in str(one) or isinstance(one, ConnectionResetError) for one in _causes(error))
        return " (is it a TLS port? then rediss://)" if closed else ""

    async def ping(self) -> None:
        """Return if the store answers.

        Raises:
            StoreError: it does not.
        """
        with self._wrapped("ping"):
            await cast(Awaitable[Any], self._redis.ping())

    async def load(self, group: str, topic: str, partition: int) -> PartitionState | None:
        """Return a partition's state, or None if there is none.

        It is read in chunks, so that a large one stalls neither the server nor this process; a save that comes between
        them starts it anew.

        Raises:
            StoreError: the store fails, or another client keeps writing.
        """
        key = self._key(group, topic, partition)
        with self._wrapped(f"load {key}"):
            for _ in range(_ATTEMPTS):
                offset = await self._offset(key)
                if offset is None:
                    return None
                blobs = await self._scan(key)
                if blobs.pop(OFFSET_FIELD, None) is not None and await self._offset(key) == offset:
                    return PartitionState(offset, blobs)
        raise StoreError(f"{key} at {self.address} changes while it is read: does another worker own this partition?")

    async def save(
        self,
        group: str,
        topic: str,
        partition: int,
        offset: int,
        blobs: Mapping[bytes, bytes],
        *,
        deleted: Collection[bytes] = (),
        base: int | None = None,
        base_clock_ms: int = 0,
        whole: bool = False,
        back: bool = False,
    ) -> Saved:
        """Store a partition's changed series and the offset that they belong to, all or nothing.

        Saving the same again is harmless: after an error, when it is not known whether the state was stored, just save
        again, with all that has changed since `base`.

        Args:
            group: consumer group.
            topic: its topic.
            partition: the partition of it.
            offset: the state is what came of all records before it.
            blobs: series -> its state.
            deleted: series to forget.
            base: offset of the stored state that this is a change of, the last one saved or loaded; None: not checked.
            base_clock_ms: the clock of that state, ms since 1970: a replica that has taken the store's place may have
                one of the same offset that lacks what came of a later clock.
            whole: `blobs` is all there is: whatever is stored is replaced.
            back: even if it is a later state. For people only, who put an old one back: a worker must not.

        Returns:
            DONE; OUTDATED, nothing done: the stored offset is a later one, this worker was evicted; LOST, nothing done:
            the state of `base` is not there, `blobs` alone would be a state with holes.

        Raises:
            StoreError: the store fails, or another client keeps writing.
        """
        if OFFSET_FIELD in blobs or OFFSET_FIELD in deleted:
            raise ValueError(f"{OFFSET_FIELD!r} is no series' name")
        key = self._key(group, topic, partition)
        with self._wrapped(f"save {key}"):
            for _ in range(_ATTEMPTS):
                async with self._session() as call:
                    # An evicted worker must not overwrite its successor: the watched key makes the check and the write
                    # one step. A script would do too, at the price of copying all blobs through Lua.
                    await call("WATCH", key)
                    stored, clock = map(_parsed, await call("HMGET", key, OFFSET_FIELD, CLOCK_FIELD))
                    refused = _refused(stored, offset, None if whole else base, (clock or 0) < base_clock_ms)
                    if refused is not None and not (back and refused is Saved.OUTDATED):
                        await call("UNWATCH")
                        return refused
                    await call("MULTI")
                    if whole:
                        await call("UNLINK", key)
                    elif deleted:
                        await call("HDEL", key, *deleted)
                    for chunk in _chunks(blobs):
                        await call("HSET", key, *chunk)
                    await call("HSET", key, OFFSET_FIELD, b"%d" % offset)
                    steps.reached("flushing")
                    if await call("EXEC") is not None:
                        return Saved.DONE
        raise StoreError(f"{key} at {self.address} changes while it is written: does another worker own it too?")

    async def drop(self, group: str, topic: str, partition: int) -> None:
        """Forget a partition's state.

        Raises:
            StoreError: the store fails.
        """
        key = self._key(group, topic, partition)
        with self._wrapped(f"drop {key}"):
            await cast(Awaitable[Any], self._redis.unlink(key))

    async def fields(
        self, group: str, topic: str, partition: int, names: Sequence[bytes]
    ) -> tuple[int, dict[bytes, bytes]] | None:
        """Return the offset of a partition's state and what it has of these fields, of one time; None without a state.

        Raises:
            StoreError: the store fails.
        """
        key = self._key(group, topic, partition)
        with self._wrapped(f"read {key}"):
            offset, *found = await cast(Awaitable[list[Any]], self._redis.hmget(key, [OFFSET_FIELD, *names]))
        known = _parsed(offset)
        if known is None:
            return None
        return known, {name: value for name, value in zip(names, found, strict=True) if value is not None}

    async def pieces(self, group: str, topic: str, partition: int) -> AsyncIterator[dict[bytes, bytes]]:
        """Yield the fields of a partition's state, the offset among them, in pieces of a few MB.

        Unlike what `load` returns it may be of several times, and a field may come twice: to count by, not to keep.

        Raises:
            StoreError: the store fails.
        """
        key = self._key(group, topic, partition)
        with self._wrapped(f"read {key}"):
            async for piece in self._pieces(key):
                yield piece

    async def close(self) -> None:
        """Let go of all connections; never fails."""
        with contextlib.suppress(RedisError, OSError):
            await self._redis.aclose()

    @contextlib.asynccontextmanager
    async def _session(self) -> AsyncIterator[Callable[..., Awaitable[Any]]]:
        """Yield a function that sends commands over one connection and never again over another.

        redis-py's pipeline packs a transaction in one go: one of 200 MB stopped the event loop for 4 s. Here each
        chunk waits for its answer, and others have their turn meanwhile.
        """
        pool = self._redis.connection_pool
        connection = await pool.get_connection()  # type: ignore[no-untyped-call]

        async def call(*command: Any) -> Any:
            await connection.send_command(*command)
            return await connection.read_response()

        try:
            yield call
        except BaseException:
            await connection.disconnect(nowait=True)  # and with it the watch, and a transaction that was begun
            raise
        finally:
            await pool.release(connection)

    def _key(self, group: str, topic: str, partition: int) -> str:
        return f"{self._prefix}:{group}:{topic}:{partition}"

    async def _offset(self, key: str) -> int | None:
        return _parsed(await cast(Awaitable[bytes | None], self._redis.hget(key, cast(Any, OFFSET_FIELD))))

    async def _scan(self, key: str) -> dict[bytes, bytes]:
        fields: dict[bytes, bytes] = {}
        async for piece in self._pieces(key):
            fields.update(piece)
        return fields

    async def _pieces(self, key: str) -> AsyncIterator[dict[bytes, bytes]]:
        cursor, count, size, seen = 0, _FIRST_SCAN, 0, 0
        while True:
            answer = await self._redis.hscan(key, cursor, count=count)
            cursor, part = answer[0], cast(dict[bytes, bytes], answer[1])
            yield part
            if not cursor:
                return
            size, seen = size + sum(map(len, part.values())), seen + len(part)
            mean = size / max(seen, 1) + 1
            count = min(max(int(_CHUNK_BYTES / mean), 1), _MAX_SCAN)

    @contextlib.contextmanager
    def _wrapped(self, doing: str) -> Iterator[None]:
        try:
            yield
        except (RedisError, OSError) as e:
            raise StoreError(f"the store at {self.address} failed to {doing}: {_reason(e)}") from e


def _end_if_cancelled() -> None:
    """Be cancelled, if that was asked for and forgotten.

    redis-py may forget it, see `tasks.ended`; for whoever is cancelled once only, as a command by Ctrl-C.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


def redacted(url: str) -> str:
    """Return a Redis URL without user, password and query, for messages; what cannot be parsed is left out."""
    scheme, separator, _ = url.partition("://")
    if not separator:
        return "…"
    with contextlib.suppress(ValueError):
        parts = urlsplit(url)
        if parts.hostname or scheme == "unix":
            port = f":{parts.port}" if parts.port else ""
            return f"{scheme}://{parts.hostname or ''}{port}{unquote(parts.path)}"
    return f"{scheme}://…"


def _parsed(offset: bytes | None) -> int | None:
    """Return a stored offset; what is none (another program's hash) counts as absent, and is overwritten."""
    try:
        return None if offset is None else int(offset)
    except ValueError:
        return None


def _refused(stored: int | None, offset: int, base: int | None, earlier: bool) -> Saved | None:
    """Return why a state may not be written over the stored one, or None if it may."""
    if stored is not None and stored > offset:
        return Saved.OUTDATED
    if base is not None and (stored is None or stored < base or (stored == base and earlier)):
        return Saved.LOST
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    one: BaseException | None = error
    while one is not None:
        yield one
        one = one.__cause__ or one.__context__


def _untrusted(error: Exception) -> ssl.SSLCertVerificationError | None:
    """Return why the server's certificate is not accepted, if that is it."""
    return next((one for one in _causes(error) if isinstance(one, ssl.SSLCertVerificationError)), None)


def _not_allowed(error: BaseException | None) -> bool:
    # Without the right to EXEC, the answer is that the transaction was discarded because of that.
    return isinstance(error, NoPermissionError) or "NOPERM" in str(error)


def _reason(error: Exception) -> str:
    return str(error) or ("no answer" if isinstance(error, TimeoutError) else type(error).__name__)


def _chunks(blobs: Mapping[bytes, bytes]) -> Iterator[list[bytes]]:
    """Cut fields and values, one after the other, into commands of a few MB: one is 4 times as fast as many small."""
    chunk: list[bytes] = []
    size = 0
    for field, blob in blobs.items():
        chunk += (field, blob)
        size += len(field) + len(blob)
        if size >= _CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
