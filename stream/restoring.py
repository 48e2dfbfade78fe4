"""Where a partition begins: what its group has committed, what its log still holds, what the store has kept of it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import dataclass

from aiokafka import AIOKafkaConsumer, TopicPartition

from stream.errors import StoreError
from stream.kafka import Clock, committed_offset, named
from stream.settings import Settings
from stream.store import CLOCK_FIELD, PartitionState, Store
from stream.tasks import pause
from stream.trouble import Trouble

log = logging.getLogger(__name__)

_AGAIN_S = (0.5, 5.0)  # between two attempts to read the state: at first, at last


@dataclass(frozen=True, slots=True)
class Beginning:
    """Where a partition begins.

    Attributes:
        committed: the group's offset and its clock, as they are.
        settled: the offset before which everything is published; 0 where the log is not the one that was read.
        clock: up to which silence was judged by then.
        position: the offset that the state belongs to, or the first one that the log still holds.
        state: what the store has kept, None where it is to be rebuilt.
        known: the clock that the state knows of.
    """

    committed: tuple[int | None, Clock]
    settled: int
    clock: Clock
    position: int
    state: PartitionState | None
    known: Clock

    @property
    def repeat(self) -> Clock | None:
        """The clock that is to be judged again: that of the group, where the state does not know it.

        A state of a later clock knows it; and one of a later offset does, as it was judged at an earlier one.
        """
        behind = self.known.ms < self.clock.ms and self.known.offset <= self.clock.offset
        return self.clock if behind else None


async def find_beginning(
    consumer: AIOKafkaConsumer, at: TopicPartition, settings: Settings, store: Store, trouble: Trouble
) -> Beginning:
    """Return where a partition begins, and say what was lost of it.

    Args:
        consumer: of the group that the partition is read by.
        at: the partition, of which no other worker may publish any more.
        settings: how long the store is waited for.
        store: may keep a state of it.
        trouble: of the store.

    Raises:
        KafkaError: the broker cannot be reached, or refuses.
    """
    committed = offset, clock = await committed_offset(consumer, at)
    begin = (await consumer.beginning_offsets([at]))[at]
    end = (await consumer.end_offsets([at]))[at]
    if offset is not None and offset > end:
        log.error("%s: the group had read up to %d and the log ends at %d: it is another one", named(at), offset, end)
        offset, clock = None, Clock()
    state = await _load(at, offset or 0, settings, store, trouble)
    wanted, known = begin, Clock()
    if state is not None:
        wanted, known = state.offset, Clock(_number(state.blobs.pop(CLOCK_FIELD, b"")), state.offset)
    elif offset:
        log.warning("%s: no state in the store; rebuilding it from offset %d on, muted", named(at), begin)
    position = max(wanted, begin)
    if position > wanted:
        log.warning("%s: the log begins at %d, the state ends at %d: points are missing", named(at), begin, wanted)
    return Beginning(committed, offset or 0, clock, position, state, known)


async def _load(
    at: TopicPartition, committed: int, settings: Settings, store: Store, trouble: Trouble
) -> PartitionState | None:
    """Return the stored state; None where there is none that is of use: it is rebuilt from the log then."""
    group, limit_s = settings.kafka.group, settings.redis.connect_timeout_s
    try:
        async with asyncio.timeout(limit_s):
            state = await _loaded(at, group, store, trouble)
    except TimeoutError:
        log.error("%s: the store gave no state within %g s; going on without", named(at), limit_s)
        return None
    if state is None or state.offset <= committed:
        return state
    log.error(
        "%s: the state is as of offset %d, the group has read up to %d: dropped", named(at), state.offset, committed
    )
    with contextlib.suppress(StoreError):
        await store.drop(group, at.topic, at.partition)
    return None


async def _loaded(at: TopicPartition, group: str, store: Store, trouble: Trouble) -> PartitionState | None:
    failures = 0
    while True:
        try:
            return await store.load(group, at.topic, at.partition)
        except StoreError as e:
            trouble.say(f"cannot read the state of {named(at)}: {e}")
        failures += 1
        await asyncio.sleep(pause(failures, *_AGAIN_S))


def _number(text: bytes) -> int:
    return int(text) if text.isdigit() else 0
