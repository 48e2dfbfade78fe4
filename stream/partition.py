"""One input partition: its detector, its transactions, its state in the store.

The order that makes the output exactly-once, whatever is killed when:
1. `accept` takes records in; memory runs ahead of everything.
2. `_settle` commits events, rejects and the offset behind them in one Kafka transaction.
3. `_flush` writes the state as of an offset to the store, once that offset is settled, never before.
4. `start`, after a crash or a move, restores the state, seeks to its offset, and goes through the records up to the
   committed offset with outputs muted: they were published before. The clock up to which silence had been judged by
   then is the metadata of that offset, with the offset at which it was; there it is judged once more, muted.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRecord, OffsetAndMetadata, TopicPartition
from aiokafka.errors import KafkaError, ProducerFenced

from stream import events, records, snapshot
from stream.columns import BoolArray, Int32Array
from stream.detector import Detector
from stream.errors import BrokerError, StoreError
from stream.events import Event
from stream.kafka import REJECT_BYTES_MAX, Clock, clock_metadata, committed_offset, transactional_producer
from stream.records import Reject
from stream.settings import Settings
from stream.store import Saved, Store

log = logging.getLogger(__name__)

_SETTLE_ATTEMPTS = 3
_SETTLE_AGAIN_S = 0.5  # between two of them, longer each time
NOTHING = -1  # no offset: the store has no state of the partition
_NO_SLOTS = np.zeros(0, np.int32)
CLOCK_FIELD = b"\x00clock_ms"  # of the stored state; a series' name holds no control characters


@dataclass(slots=True)
class _Pending:
    """What has been computed and not settled."""

    events: list[tuple[Event, tuple[str, ...]]] = field(default_factory=list)  # with the further topics of each
    rejects: list[tuple[Reject, ConsumerRecord]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Settlement:
    """What one transaction commits."""

    position: int
    clock: Clock
    said: int
    pending: _Pending


class Partition:
    """A partition that this worker owns, from `start` to `stop`."""

    def __init__(
        self, at: TopicPartition, settings: Settings, make_detector: Callable[[], Detector], store: Store
    ) -> None:
        self.at = at
        self.settings = settings
        self.detector = make_detector()
        self.store = store
        self.position = 0  # the next offset to be taken in
        self.muted_until = 0  # what came of records before this offset is already published
        self.settled = 0  # the committed offset
        self.flushed = NOTHING  # the offset that the store's state belongs to
        self.clock = Clock()  # up to which silence has been judged, and where in the log
        self.published = 0
        self.rejected = 0
        self._producer: AIOKafkaProducer | None = None
        self._consumer: AIOKafkaConsumer | None = None
        self._pending = _Pending()
        self._trying: _Settlement | None = None  # the transaction that was begun last
        self._said = 0  # events and rejects so far, pending or not
        self._told = 0  # of them in a committed transaction
        self._repeat: Clock | None = None  # to be judged again, muted
        self._judged_ms = 0  # what of the clock is in the state: behind `clock` while it is to be judged again
        self._dirty: BoolArray = np.zeros(0, np.bool_)
        self._work = asyncio.Event()
        self._settlement = asyncio.Condition()
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = False
        self._settling = False
        self._on_general = 0

    @property
    def unsettled(self) -> int:
        """Records taken in and not settled yet."""
        return max(self.position - max(self.settled, self.muted_until), 0)

    @property
    def busy(self) -> bool:
        """Whether outputs wait for their transaction, or are in it."""
        return self._settling or bool(self._pending.events or self._pending.rejects)

    # -- life -----------------------------------------------------------------------------------------------------

    async def start(self, consumer: AIOKafkaConsumer) -> None:
        """Fence a former owner, restore the state and seek to where it belongs."""
        # The producer first: its start ends a transaction that a killed owner left open, so that the committed offset
        # read after it is final.
        self._consumer = consumer
        self._producer = transactional_producer(self.settings.kafka, self.at)
        try:
            await self._producer.start()
            await self._restore(consumer)
        except BaseException:
            await self._producer.stop()
            raise
        self._tasks = [
            asyncio.create_task(self._settle_loop(), name=f"settle {self.at}"),
            asyncio.create_task(self._flush_loop(), name=f"flush {self.at}"),
        ]

    async def _restore(self, consumer: AIOKafkaConsumer) -> None:
        committed, self.clock = await committed_offset(consumer, self.at)
        state = await self.store.load(self.settings.kafka.group, self.at.topic, self.at.partition)
        begin = (await consumer.beginning_offsets([self.at]))[self.at]
        wanted, known = begin, Clock()
        if state is not None:
            known = Clock(_number(state.blobs.pop(CLOCK_FIELD, b"")), state.offset)
            series = self._unpack(self.detector, state.blobs)
            wanted = self.flushed = state.offset
            log.info("%s: restored %d series as of offset %d", self.at, series, state.offset)
        elif committed:
            log.warning("%s: no state in the store; rebuilding it from offset %d on, muted", self.at, begin)
        self.muted_until = self.settled = committed or 0
        self.position = max(wanted, begin)
        if self.position > wanted:
            log.warning("%s: the log begins at %d, the state ends at %d: points are missing", self.at, begin, wanted)
        consumer.seek(self.at, self.position)
        # A state of a later clock knows it; and one of a later offset does, as it was judged at an earlier one.
        if known.ms < self.clock.ms and known.offset <= self.clock.offset:
            self._judged_ms, self._repeat = known.ms, self.clock
            self._judge_again()
        else:
            self.clock = max(self.clock, known)
            self._judged_ms = self.clock.ms

    def _unpack(self, detector: Detector, blobs: Mapping[bytes, bytes]) -> int:
        """Restore series; return how many."""
        restored = snapshot.unpack(detector, blobs)
        for problem in restored.refused:
            log.error("%s: %s; the series starts anew", self.at, problem)
        if restored.recalibrating:
            log.warning("%s: %d series calibrate anew: other model", self.at, restored.recalibrating)
        return restored.series

    async def stop(self) -> None:
        """Settle and flush what has been taken in, then let go."""
        self._stopping = True
        self._work.set()
        settle, flush = self._tasks
        try:
            await settle
            await _end(flush)
            await self._flush()
        except (KafkaError, BrokerError, StoreError) as e:
            log.error("%s: not everything was settled (%s); the next owner repeats it", self.at, e)
        finally:
            flush.cancel()
            if self._producer is not None:
                await self._producer.stop()

    def failure(self) -> BaseException | None:
        """Return why a background task of this partition has ended, or None while all is well."""
        for task in self._tasks:
            if task.done() and not task.cancelled() and (problem := task.exception()) is not None:
                return problem
        return None

    # -- points in ------------------------------------------------------------------------------------------------

    def accept(self, batch: Sequence[ConsumerRecord]) -> None:
        """Take a batch in; what comes of it waits for the next transaction."""
        muted = bisect.bisect_left(batch, self.muted_until, key=_offset)
        if self._repeat is not None:
            before = bisect.bisect_left(batch, self._repeat.offset, key=_offset, hi=muted)
            self._accept(batch[:before], muted=True)
            if before < len(batch):  # whether or not its records are all there still
                self.position = max(self.position, self._repeat.offset)
            self._judge_again()
            self._accept(batch[before:muted], muted=True)
        else:
            self._accept(batch[:muted], muted=True)
        if muted < len(batch):
            self._accept(batch[muted:], muted=False)
            self._work.set()

    def _accept(self, batch: Sequence[ConsumerRecord], *, muted: bool) -> None:
        if not batch:
            return
        arrival_ms = np.array([record.timestamp for record in batch], np.int64)
        columns, rejects = records.decode(
            [record.value for record in batch],
            self.detector.index,
            arrival_ms=arrival_ms.tolist(),
            future_limit_ms=round(self.settings.future_limit_s * 1000),
        )
        result = self.detector.accept(columns, arrival_ms[columns.row])
        self._touch(columns.slot, result.events + result.shadow)
        if self.detector.places.on_general > self._on_general:
            self._on_general = self.detector.places.on_general
            log.warning(
                "%s: %d series have no weights of their own in the stack of their rule: the general model judges them",
                self.at,
                self._on_general,
            )
        self.position = batch[-1].offset + 1
        if muted:
            return
        self._say(result.events)
        self._pending.events += [(event, ()) for event in result.shadow]
        self._said += len(result.shadow)
        refused = [(reject, batch[reject.row]) for reject in rejects + result.rejects]
        self._pending.rejects += refused
        self._said += len(refused)

    def _say(self, said: Sequence[Event]) -> None:
        self._pending.events += [(event, self.detector.topics_of(event)) for event in said]
        self._said += len(said)

    def _touch(self, slots: Int32Array, said: Sequence[Event]) -> None:
        """Note that the state of these series has changed, and of those that something is said of.

        A series falls silent by a point of another.
        """
        told = np.array([self.detector.index[event.subject] for event in said], np.int32)
        if len(self._dirty) < self.detector.capacity:
            self._dirty = np.concatenate([self._dirty, np.zeros(self.detector.capacity - len(self._dirty), np.bool_)])
        self._dirty[slots] = True
        self._dirty[told] = True

    def judge_silence(self, now_ms: int) -> None:
        """Find out who is silent by the clock; all records that had arrived by then have been taken in."""
        if self.position < self.muted_until or self._repeat is not None or now_ms <= self.clock.ms:
            return
        self.clock, self._judged_ms = Clock(now_ms, self.position), now_ms
        if said := self.detector.clock(now_ms):
            self._touch(_NO_SLOTS, said)
            self._say(said)
            self._work.set()

    def _judge_again(self) -> None:
        """Judge once more, muted, what was judged by the clock before the last commit, once its place is reached.

        Exactly there: what came later may bear an earlier time, and was not judged yet when the owner was killed.
        """
        if self._repeat is None or self.position < self._repeat.offset:
            return
        self._touch(_NO_SLOTS, self.detector.clock(self._repeat.ms))
        self._judged_ms, self._repeat = self._repeat.ms, None

    def change_detector(self, detector: Detector) -> None:
        """Go on with another detector, one without series: those of this one keep their state as far as it fits."""
        slots = np.arange(len(self.detector.index.names), dtype=np.int32)
        self._unpack(detector, snapshot.pack(self.detector, slots))
        detector.counts.add(self.detector.counts)
        self.detector = detector
        self._dirty = np.ones(detector.capacity, np.bool_)

    # -- outputs --------------------------------------------------------------------------------------------------

    async def _settle_loop(self) -> None:
        """Commit one transaction at a time, some time apart, while the next batches are computed."""
        while not (self._stopping and self.position <= self.settled and not self._pending.events):
            await self._work.wait()
            self._work.clear()  # here, and not in `_settle`: what a muted stretch takes in is never settled
            if self.position > self.settled or self._pending.events:
                self._settling = True
                await self._settle_at_last()
                self._settling = False
                await asyncio.sleep(self.settings.kafka.settle_interval_ms / 1000)

    async def _settle_at_last(self) -> None:
        """Settle; if the broker refuses, do it again with another producer, unless it was done after all."""
        for attempt in range(1, _SETTLE_ATTEMPTS + 1):
            try:
                await self._settle()
                return
            except ProducerFenced:  # another worker has the partition
                raise
            except KafkaError as e:
                if attempt == _SETTLE_ATTEMPTS:
                    raise
                log.warning("%s: a transaction failed (%r), trying again", self.at, e)
                await asyncio.sleep(attempt * _SETTLE_AGAIN_S)
                await self._renew_producer()

    async def _renew_producer(self) -> None:
        """Take another producer; its start ends the transaction of the old one, whatever had become of it."""
        assert self._producer is not None and self._consumer is not None
        with contextlib.suppress(KafkaError):
            await self._producer.stop()
        self._producer = transactional_producer(self.settings.kafka, self.at)
        await self._producer.start()
        committed = await committed_offset(self._consumer, self.at)
        if self._trying is not None and committed == (self._trying.position, self._trying.clock):
            await self._settled(self._trying)
            self._pending = _Pending(
                self._pending.events[len(self._trying.pending.events) :],
                self._pending.rejects[len(self._trying.pending.rejects) :],
            )
        self._trying = None

    async def _settle(self) -> None:
        """Commit all that is pending, and the offset behind it, in one transaction."""
        assert self._producer is not None
        kafka = self.settings.kafka
        this = self._trying = _Settlement(self.position, self.clock, self._said, self._pending)
        self._pending = _Pending()
        sent = []
        try:
            async with self._producer.transaction():
                for event, further in this.pending.events:
                    key, value = event.subject.encode(), events.encode(event)
                    headers = [("content-type", events.CONTENT_TYPE.encode())]
                    shadow = isinstance(event.data, events.EventData) and event.data.shadow
                    first = kafka.shadow_topic if shadow else kafka.anomalies_topic
                    for topic in dict.fromkeys((first, *further)):
                        sent.append(await self._producer.send(topic, value, key=key, headers=headers))
                for reject, record in this.pending.rejects:
                    value = (record.value or b"")[:REJECT_BYTES_MAX]
                    headers = _reject_headers(reject, record)
                    sent.append(await self._producer.send(kafka.rejects_topic, value, key=record.key, headers=headers))
                # aiokafka commits a transaction of which the broker has refused records: each has to be asked for.
                for failure in await asyncio.gather(*sent, return_exceptions=True):
                    if isinstance(failure, BaseException):
                        raise failure
                offset = OffsetAndMetadata(this.position, clock_metadata(this.clock))
                await self._producer.send_offsets_to_transaction({self.at: offset}, kafka.group)
        except BaseException:
            self._pending = _Pending(
                this.pending.events + self._pending.events, this.pending.rejects + self._pending.rejects
            )
            raise
        await self._settled(this)

    async def _settled(self, this: _Settlement) -> None:
        """Note that a transaction is committed."""
        self.published += len(this.pending.events)
        self.rejected += len(this.pending.rejects)
        async with self._settlement:
            self.settled, self._told = this.position, this.said
            self._settlement.notify_all()

    # -- state ----------------------------------------------------------------------------------------------------

    async def _flush_loop(self) -> None:
        while True:
            await asyncio.sleep(self.settings.redis.flush_interval_s)
            try:
                await self._flush()
            except StoreError as e:
                # The store is a cache of the log: behind, it costs a longer muted stretch after a restart, no event.
                log.error("%s: state not written (%s); trying again", self.at, e)

    async def _flush(self) -> None:
        """Write the series that changed since the last flush, and the offset that they belong to, in one step.

        What the store has lost in the meantime is written whole: memory has all of it.
        """
        offset, said, detector, whole = self.position, self._said, self.detector, self.flushed == NOTHING
        names = len(detector.index.names)
        if offset == self.flushed and not self._dirty[:names].any():
            return
        changed = np.arange(names) if whole else np.flatnonzero(self._dirty[:names])
        slots = changed.astype(np.int32)
        blobs = snapshot.pack(detector, slots) | {CLOCK_FIELD: b"%d" % self._judged_ms}
        self._dirty[:] = False
        try:
            # State must not run ahead of what is published, also where it changed without a record: by the clock.
            async with self._settlement:
                await self._settlement.wait_for(lambda: self.settled >= offset and self._told >= said)
            kafka = self.settings.kafka
            saved = await self.store.save(
                kafka.group,
                self.at.topic,
                self.at.partition,
                offset,
                blobs,
                base=None if whole else self.flushed,
                whole=whole,
            )
        except BaseException:
            if self.detector is detector:  # of another one all is to be written anyway
                self._dirty[slots] = True
            raise
        if saved is Saved.OUTDATED:
            raise StoreError(f"a later state of {self.at} is stored: another worker has the partition")
        if saved is Saved.LOST:
            log.warning("%s: the store has lost its state; writing all of it", self.at)
            self.flushed = NOTHING
            await self._flush()
        else:
            self.flushed = offset


async def _end(task: asyncio.Task[None]) -> None:
    """Cancel a task until it has ended: once may not be enough.

    redis-py sends within `asyncio.wait_for`, and that of Python 3.11 forgets a cancellation that comes just as the
    sending is done: seen as a worker that never stopped.
    """
    while not task.done():
        task.cancel()
        await asyncio.wait({task}, timeout=0.1)


def _offset(record: ConsumerRecord) -> int:
    return int(record.offset)


def _number(text: bytes) -> int:
    return int(text) if text.isdigit() else 0


def _reject_headers(reject: Reject, record: ConsumerRecord) -> list[tuple[str, bytes]]:
    """Say why a record was refused and where it stands, so that it can be found, mended and sent again."""
    headers = {
        "tocsin-reason": reject.reason,
        "tocsin-detail": reject.detail[:1000],
        "tocsin-topic": record.topic,
        "tocsin-partition": str(record.partition),
        "tocsin-offset": str(record.offset),
    }
    if record.value is not None and len(record.value) > REJECT_BYTES_MAX:
        headers["tocsin-truncated-from"] = str(len(record.value))
    return [(name, value.encode("utf-8", "replace")) for name, value in headers.items()]
