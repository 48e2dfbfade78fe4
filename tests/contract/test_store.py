"""What the worker relies on, of the store: a partition's state is whole, of one offset, and never goes back."""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from stream.errors import ConfigError, StoreError
from stream.store import CLOCK_FIELD, OFFSET_FIELD, PartitionState, Saved, Store, redacted
from tests.servers import StoreServer

AT = ("group", "topic", 3)


@pytest.fixture
async def store(redis_url: str, prefix: str) -> AsyncIterator[Store]:
    async with Store(redis_url, prefix=prefix) as store:
        await store.connect(5)
        yield store
        await store.drop(*AT)


def name(n: int) -> bytes:
    return f"kpi.é.{n}".encode()


# -- any sequence of calls does what it does to a dict ----------------------------------------------------------------


@dataclass(frozen=True)
class Save:
    step: int  # offset, from the stored one
    blobs: dict[bytes, bytes]
    deleted: set[bytes] = field(default_factory=set)
    behind: int | None = None  # base, behind the stored offset
    whole: bool = False


class Drop:
    pass


names = st.sampled_from([name(n) for n in range(3)])
saves = st.builds(
    Save,
    step=st.sampled_from([0, 1, 1, 5, -1]),
    blobs=st.dictionaries(names, st.binary(max_size=64)),
    deleted=st.sets(names, max_size=2),
    behind=st.none() | st.integers(-2, 2),
    whole=st.sampled_from([False, False, True]),
)


def expected(
    model: PartitionState | None, save: Save, offset: int, base: int | None
) -> tuple[Saved, PartitionState | None]:
    if model is not None and offset < model.offset:
        return Saved.OUTDATED, model
    if base is not None and not save.whole and (model is None or model.offset < base):
        return Saved.LOST, model
    before = {} if model is None or save.whole else model.blobs
    kept = {series: blob for series, blob in before.items() if series not in save.deleted}
    return Saved.DONE, PartitionState(offset, {**kept, **save.blobs})


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(calls=st.lists(saves | st.builds(Drop), max_size=8))
async def test_any_sequence_of_calls_does_what_it_does_to_a_dict(redis_url: str, calls: list[Save | Drop]) -> None:
    model: PartitionState | None = None
    async with Store(redis_url, prefix=f"tocsin-test-{uuid.uuid4().hex}") as store:
        for call in calls:
            if isinstance(call, Drop):
                await store.drop(*AT)
                model = None
            else:
                stored = 0 if model is None else model.offset
                offset = max(stored + call.step, 0)
                base = None if call.behind is None else stored - call.behind
                outcome, model = expected(model, call, offset, base)
                saved = await store.save(*AT, offset, call.blobs, deleted=call.deleted, base=base, whole=call.whole)
                assert saved is outcome
            assert await store.load(*AT) == model
        await store.drop(*AT)


# -- one by one -------------------------------------------------------------------------------------------------------


async def test_nothing_stored_is_none(store: Store) -> None:
    assert await store.load(*AT) is None


async def test_a_state_without_series_is_a_state(store: Store) -> None:
    assert await store.save(*AT, 7, {}) is Saved.DONE
    assert await store.load(*AT) == PartitionState(7, {})


async def test_a_hash_without_its_offset_is_no_state(store: Store, redis_url: str, prefix: str) -> None:
    await store.save(*AT, 7, {name(1): b"state"})
    async with Redis.from_url(redis_url) as redis:
        await redis.hdel(f"{prefix}:group:topic:3", OFFSET_FIELD.decode())
    assert await store.load(*AT) is None


async def test_partitions_groups_and_prefixes_are_kept_apart(store: Store, redis_url: str, prefix: str) -> None:
    await store.save(*AT, 7, {name(1): b"ours"})
    async with Store(redis_url, prefix=f"{prefix}-2") as other:
        for at in (("group", "topic", 4), ("group:topic", "topic", 3), ("group", "topic3", 3)):
            assert await store.load(*at) is None
        assert await other.load(*AT) is None


@pytest.mark.parametrize(("count", "size"), [(3_000, 50), (40, 300_000), (1, 9_000_000)])
async def test_states_of_several_chunks(store: Store, count: int, size: int) -> None:
    blobs = {name(n): os.urandom(size) for n in range(count)}
    assert await store.save(*AT, 1, blobs)
    assert await store.load(*AT) == PartitionState(1, blobs)


async def test_an_evicted_worker_does_not_overwrite_its_successor(store: Store) -> None:
    await store.save(*AT, 100, {name(1): b"successor"})
    assert await store.save(*AT, 99, {name(1): b"evicted"}, base=90) is Saved.OUTDATED
    assert await store.save(*AT, 99, {name(1): b"evicted"}, whole=True) is Saved.OUTDATED
    assert await store.load(*AT) == PartitionState(100, {name(1): b"successor"})


async def test_changes_are_not_taken_for_the_whole_when_the_state_is_lost(store: Store) -> None:
    await store.save(*AT, 10, {name(1): b"a", name(2): b"a"})
    await store.drop(*AT)  # as FLUSHALL does
    changed = {name(2): b"b"}
    assert not await store.save(*AT, 20, changed, base=10)
    assert await store.load(*AT) is None
    assert await store.save(*AT, 20, {name(1): b"a", **changed}, whole=True) is Saved.DONE
    assert await store.load(*AT) == PartitionState(20, {name(1): b"a", name(2): b"b"})


async def test_changes_do_not_go_on_top_of_an_older_state(store: Store) -> None:
    await store.save(*AT, 5, {name(1): b"old", name(2): b"old"})  # as a failover to a replica that lags leaves it
    assert await store.save(*AT, 20, {name(2): b"new"}, base=10) is Saved.LOST
    assert await store.load(*AT) == PartitionState(5, {name(1): b"old", name(2): b"old"})


async def test_nor_on_top_of_one_of_the_same_offset_that_lacks_what_the_clock_has_told(store: Store) -> None:
    def state(clock_ms: int, **blobs: bytes) -> dict[bytes, bytes]:
        return {CLOCK_FIELD: b"%d" % clock_ms} | {series.encode(): blob for series, blob in blobs.items()}

    await store.save(*AT, 10, state(500, a=b"heard"))
    assert await store.save(*AT, 11, state(700), base=10, base_clock_ms=600) is Saved.LOST
    assert await store.save(*AT, 10, state(600, a=b"silent"), base=10, base_clock_ms=500)
    assert await store.save(*AT, 10, state(650), base=10, base_clock_ms=500), "its answer was lost"
    assert await store.save(*AT, 11, state(700), base=10, base_clock_ms=650)
    assert await store.load(*AT) == PartitionState(11, state(700, a=b"silent"))


async def test_a_save_may_be_repeated_and_widened(store: Store) -> None:
    await store.save(*AT, 10, {name(1): b"a"})
    assert await store.save(*AT, 20, {name(1): b"b"}, base=10)
    assert await store.save(*AT, 20, {name(1): b"b"}, base=10), "its answer was lost"
    assert await store.save(*AT, 30, {name(1): b"c", name(2): b"c"}, base=10)
    assert await store.load(*AT) == PartitionState(30, {name(1): b"c", name(2): b"c"})


async def test_deleted_series_are_forgotten(store: Store) -> None:
    await store.save(*AT, 1, {name(1): b"a", name(2): b"a", name(3): b"a"})
    assert await store.save(*AT, 2, {name(3): b"b"}, deleted=[name(1), name(9)], base=1)
    assert await store.load(*AT) == PartitionState(2, {name(2): b"a", name(3): b"b"})


async def test_the_offset_is_no_series(store: Store) -> None:
    with pytest.raises(ValueError, match="no series' name"):
        await store.save(*AT, 1, {OFFSET_FIELD: b"9"})
    with pytest.raises(ValueError, match="no series' name"):
        await store.save(*AT, 1, {}, deleted=[OFFSET_FIELD])


async def test_readers_and_rivals_never_see_half_a_state(store: Store, redis_url: str, prefix: str) -> None:
    """Two owners write states of several chunks, each saying its offset in every series; a third reads."""
    padding = bytes(200_000)

    async def write(rival: Store, offsets: range) -> None:
        for offset in offsets:
            blob = b"%d " % offset + padding
            await rival.save(*AT, offset, {name(n): blob for n in range(30)})

    async def look() -> None:
        last = -1
        while not done.is_set():
            try:
                state = await store.load(*AT)
            except StoreError as e:  # on a slow machine each of its attempts is overtaken
                assert "changes while it is read" in str(e)
                continue
            if state is not None:
                assert {int(blob.split()[0]) for blob in state.blobs.values()} == {state.offset}
                assert state.offset >= last
                last = state.offset
            await asyncio.sleep(0.05)

    done = asyncio.Event()
    async with (
        Store(redis_url, prefix=prefix) as one,
        Store(redis_url, prefix=prefix) as two,
        asyncio.TaskGroup() as group,
    ):
        group.create_task(look())
        await asyncio.gather(write(one, range(0, 16, 2)), write(two, range(1, 17, 2)))
        done.set()
    state = await store.load(*AT)
    assert state is not None
    assert state.offset == 15


async def test_a_save_that_is_cancelled_leaves_nothing_half_done(store: Store) -> None:
    padding = bytes(1_000_000)
    for n in range(1, 16):
        task = asyncio.create_task(store.save(*AT, n, {name(i): b"%d " % n + padding for i in range(10)}))
        await asyncio.sleep(n * 0.002)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        state = await store.load(*AT)
        if state is not None:
            assert {int(blob.split()[0]) for blob in state.blobs.values()} == {state.offset}
    assert await store.save(*AT, 99, {}, whole=True)
    assert await store.load(*AT) == PartitionState(99, {})


# -- a store that fails -----------------------------------------------------------------------------------------------


async def test_an_absent_store_is_named_with_its_setting(unused_port: int) -> None:
    started = time.monotonic()
    async with Store(f"redis://user:s3cret@127.0.0.1:{unused_port}/2") as store:
        with pytest.raises(StoreError) as caught:
            await store.connect(0.5)
        with pytest.raises(StoreError, match="failed to load"):
            await store.load(*AT)
        with pytest.raises(StoreError, match="failed to save"):
            await store.save(*AT, 1, {})
        with pytest.raises(StoreError, match="failed to ping"):
            await store.ping()
    message = str(caught.value)
    for part in (f"redis://127.0.0.1:{unused_port}/2", "tried for", "TOCSIN_REDIS__URL"):
        assert part in message
    assert "s3cret" not in message
    assert caught.value.__cause__ is not None
    assert time.monotonic() - started < 8


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://:s3cret@db.example:6380/1?client_name=s3cret", "redis://db.example:6380/1"),
        ("rediss://user:s3cret@db.example", "rediss://db.example"),
        ("unix://:s3cret@/run/redis.sock", "unix:///run/redis.sock"),
        ("redis://user:s3/cret@db.example:6379", "redis://user"),
        ("s3cret", "…"),
    ],
)
def test_a_url_is_shown_without_its_secrets(url: str, shown: str) -> None:
    assert redacted(url) in (shown, f"{url.partition('://')[0]}://…")
    assert "s3cret" not in redacted(url)


@pytest.mark.parametrize("url", ["s3cret", "http://:s3cret@host", "redis://user:s3/cret@host:6379", "redis://h:s3cret"])
def test_what_is_no_url_is_refused_without_its_secrets(url: str) -> None:
    with pytest.raises(ConfigError, match="TOCSIN_REDIS__URL") as caught:
        Store(url)
    assert "s3" not in str(caught.value)
    assert caught.value.__cause__ is None


async def test_a_wrong_password_is_refused_at_once() -> None:
    async with StoreServer() as server, Redis.from_url(server.url) as redis:
        await redis.config_set("requirepass", "s3cret")
        async with Store(server.url.replace("redis://", "redis://:s3cret@")) as store:
            await store.connect(2)
        started = time.monotonic()
        for url in (server.url, server.url.replace("redis://", "redis://:wr0ng@")):
            async with Store(url) as store:
                with pytest.raises(StoreError, match="lets us not in") as caught:
                    await store.connect(10)
                assert "wr0ng" not in str(caught.value)
        assert time.monotonic() - started < 5


async def test_it_goes_on_after_a_crash_of_the_server() -> None:
    blobs = {name(n): b"state" for n in range(100)}
    async with StoreServer(durable=True) as server, Store(server.url) as store:
        await store.connect(5)
        await store.save(*AT, 1, blobs)
        async with Redis.from_url(server.url) as redis:
            await redis.waitaof(1, 0, 5000)
        server.kill()
        with pytest.raises(StoreError, match="failed to save"):
            await store.save(*AT, 2, {}, base=1)
        await server.start()
        await store.connect(5)
        assert await store.load(*AT) == PartitionState(1, blobs)
        assert await store.save(*AT, 2, {}, base=1)


async def test_it_waits_for_a_server_that_starts_late() -> None:
    server = StoreServer()
    try:
        async with Store(server.url) as store:
            waiting = asyncio.create_task(store.connect(20))
            await asyncio.sleep(0.3)
            await server.start()
            await waiting
            await store.ping()
    finally:
        server.close()


# -- for people -------------------------------------------------------------------------------------------------------


async def test_some_fields_are_of_one_offset(store: Store) -> None:
    assert await store.fields(*AT, (name(1),)) is None
    await store.save(*AT, 7, {name(1): b"a", name(2): b""})
    assert await store.fields(*AT, (name(2), name(3), name(1))) == (7, {name(1): b"a", name(2): b""})
    assert await store.fields(*AT, ()) == (7, {})


@pytest.mark.parametrize(("count", "size"), [(0, 0), (3_000, 50), (40, 300_000)])
async def test_the_pieces_are_all_of_it(store: Store, count: int, size: int) -> None:
    assert [piece async for piece in store.pieces(*AT)] == [{}]
    blobs = {name(n): os.urandom(size) for n in range(count)}
    await store.save(*AT, 3, blobs)
    read: dict[bytes, bytes] = {}
    async for piece in store.pieces(*AT):
        assert sum(map(len, piece.values())) < 20 << 20
        read |= piece
    assert read == {**blobs, OFFSET_FIELD: b"3"}


async def test_only_who_says_so_puts_an_older_state_back(store: Store) -> None:
    await store.save(*AT, 100, {name(1): b"later", name(2): b"later"})
    assert await store.save(*AT, 50, {name(1): b"earlier"}, whole=True) is Saved.OUTDATED
    assert await store.save(*AT, 50, {name(1): b"earlier"}, whole=True, back=True) is Saved.DONE
    assert await store.load(*AT) == PartitionState(50, {name(1): b"earlier"})
    assert await store.save(*AT, 120, {}, base=100) is Saved.LOST, "a worker that ran meanwhile writes all it has"
    assert await store.save(*AT, 120, {}, base=60, back=True) is Saved.LOST
