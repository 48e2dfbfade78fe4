"""Publishing what came of records together with the offset behind them.

Exactly once: both are in one Kafka transaction, under an id that belongs to the partition, so that whoever takes the
partition over ends what the last owner left open, and shuts it out. At least once, for brokers without transactions:
outputs first, then the offset; what a crash repeats bears the same event ids.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, OffsetAndMetadata, TopicPartition
from aiokafka.errors import (
    AuthenticationFailedError,
    ClusterAuthorizationFailedError,
    GroupAuthorizationFailedError,
    IllegalOperation,
    IllegalStateError,
    InvalidMessageError,
    InvalidTopicError,
    KafkaError,
    MessageSizeTooLargeError,
    RecordListTooLargeError,
    TopicAuthorizationFailedError,
    TransactionalIdAuthorizationFailed,
    UnsupportedVersionError,
)

from stream import steps
from stream.kafka import plain_producer, transactional_producer
from stream.settings import KafkaSettings

_CLOSE_S = 5.0  # a producer whose broker is gone would flush for longer

# What a person has to change: trying again is in vain.
_IN_VAIN: tuple[type[KafkaError], ...] = (
    AuthenticationFailedError,
    ClusterAuthorizationFailedError,
    GroupAuthorizationFailedError,
    InvalidMessageError,
    InvalidTopicError,
    MessageSizeTooLargeError,
    RecordListTooLargeError,
    TopicAuthorizationFailedError,
    TransactionalIdAuthorizationFailed,
    UnsupportedVersionError,
)


def in_vain(error: BaseException) -> bool:
    """Say whether the broker will refuse the same again: a right, a size or a name is wrong."""
    return isinstance(error, _IN_VAIN)


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A record to be published."""

    topic: str
    key: bytes | None
    value: bytes
    headers: list[tuple[str, bytes]]


class Outbox(ABC):
    """The producer of a partition's outputs. After an error it has to be opened anew."""

    def __init__(self, at: TopicPartition, settings: KafkaSettings) -> None:
        self.at = at
        self.settings = settings
        self._producer: AIOKafkaProducer | None = None

    @abstractmethod
    def _made(self) -> AIOKafkaProducer:
        """Return a producer, not started."""

    @abstractmethod
    async def commit(self, outgoing: Sequence[Outgoing], offset: OffsetAndMetadata) -> None:
        """Publish records and commit the offset behind what they came of.

        Raises:
            KafkaError: it is not known whether anything of it was done: open the outbox, and look what is committed.
        """

    async def open(self) -> None:
        """Take a producer, another one if there was one before.

        Its start ends the transaction that an earlier producer of the partition left open, in this process or another,
        and shuts that producer out: an offset that is read afterwards is final.

        Raises:
            KafkaError: the broker cannot be reached, or refuses.
        """
        await self.close()
        self._producer = producer = self._made()
        try:
            await producer.start()
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Let go of the producer; never fails."""
        producer, self._producer = self._producer, None
        if producer is not None:
            await _ended(producer)

    async def _send(self, outgoing: Sequence[Outgoing]) -> None:
        """Send records, and wait until the broker has each of them.

        aiokafka commits a transaction of which the broker has refused records: each has to be asked for.
        """
        producer = self._open()
        sent: list[Any] = []
        try:
            for one in outgoing:
                sent.append(await producer.send(one.topic, one.value, key=one.key, headers=one.headers))
        finally:
            answers = await asyncio.gather(*sent, return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer

    def _open(self) -> AIOKafkaProducer:
        assert self._producer is not None, "the outbox is closed"
        return self._producer


class TransactionalOutbox(Outbox):
    """Exactly once."""

    def _made(self) -> AIOKafkaProducer:
        return transactional_producer(self.settings, self.at)

    async def commit(self, outgoing: Sequence[Outgoing], offset: OffsetAndMetadata) -> None:
        """See `Outbox.commit`."""
        producer = self._open()
        steps.reached("settling")
        try:
            await self._transact(producer, outgoing, offset)
        except (IllegalOperation, AssertionError) as e:  # no KafkaError: the producer has failed between two calls
            raise _failure(producer) or IllegalStateError(*e.args) from e

    async def _transact(
        self, producer: AIOKafkaProducer, outgoing: Sequence[Outgoing], offset: OffsetAndMetadata
    ) -> None:
        # Not `async with producer.transaction()`: it would abort after an error, with a broker that may be gone. The
        # next producer's start does that.
        await producer.begin_transaction()
        await self._send(outgoing)
        steps.reached("produced")
        await producer.send_offsets_to_transaction({self.at: offset}, self.settings.group)
        await producer.commit_transaction()


class PlainOutbox(Outbox):
    """At least once; the offset is committed by the consumer, whose generation the broker checks."""

    def __init__(self, at: TopicPartition, settings: KafkaSettings, consumer: AIOKafkaConsumer) -> None:
        super().__init__(at, settings)
        self._consumer = consumer

    def _made(self) -> AIOKafkaProducer:
        return plain_producer(self.settings)

    async def commit(self, outgoing: Sequence[Outgoing], offset: OffsetAndMetadata) -> None:
        """See `Outbox.commit`."""
        steps.reached("settling")
        await self._send(outgoing)
        steps.reached("produced")
        await self._consumer.commit({self.at: offset})


async def _ended(producer: AIOKafkaProducer) -> None:
    """Stop a producer, whatever has become of it and of its broker."""
    stopping = asyncio.ensure_future(producer.stop())
    try:
        await asyncio.wait({stopping}, timeout=_CLOSE_S)
        if not stopping.done():  # it flushes, to a broker that does not answer
            await producer.client.close()
    finally:
        stopping.cancel()
        with contextlib.suppress(asyncio.CancelledError, KafkaError, OSError):
            await stopping
        # Its `stop` leaves its connections open where a request that was under way has failed.
        await producer.client.close()
        # Why its transaction has failed was said where it failed; asyncio would say it again, with a traceback.
        _failure(producer)
        for batch in itertools.chain(*producer._message_accumulator._batches.values()):
            _error(batch._drain_waiter)


def _failure(producer: AIOKafkaProducer) -> BaseException | None:
    """Return why the transaction of a producer has failed; None if it has not."""
    return _error(getattr(producer._txn_manager, "_transaction_waiter", None))


def _error(waiter: asyncio.Future[Any] | None) -> BaseException | None:
    return waiter.exception() if waiter is not None and waiter.done() and not waiter.cancelled() else None


__all__ = ["Outbox", "Outgoing", "PlainOutbox", "TransactionalOutbox", "in_vain"]
