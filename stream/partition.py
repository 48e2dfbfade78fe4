"""One input partition: its detector, its transactions, its state in the store.

The order that makes the output exactly-once, whatever is killed when:
1. `accept` takes records in; memory runs ahead of everything.
2. `_settle` commits events, rejects and the offset behind them in one Kafka transaction.
3. `_flush` writes the state as of an offset to the store, once that offset is settled, never before.
4. `start`, after a crash or a move, restores the state, seeks to its offset, and goes through the records up to the
   committed offset with outputs muted: they were published before. The clock up to which silence had been judged by
   then is the metadata of that offset, with the offset at which it was; there it is judged once more, muted.

What is judged is judged in a thread, so that a slow model keeps neither the group's heartbeats nor transactions
waiting; what came of it is taken over in the event loop, whole.
"""

from __future__ import annotations

import asyncio
import bisect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from aiokafka import AIOKafkaConsumer, ConsumerRecord, OffsetAndMetadata, TopicPartition
from aiokafka.errors import KafkaError, ProducerFenced

from models.arrays import grown
from stream import records, snapshot, steps
from stream.blobs import SHADOW
from stream.columns import BoolArray, Int32Array
from stream.detector import Detector
from stream.errors import BrokerError, StoreError
from stream.events import Event
from stream.kafka import Clock, clock_metadata, committed_offset, named
from stream.outbox import Outbox, Outgoing, PlainOutbox, TransactionalOutbox, in_vain
from stream.outputs import event_records, reject_record
from stream.records import Reject
from stream.restoring import find_beginning
from stream.results import Result
from stream.settings import Settings
from stream.store import CLOCK_FIELD, Saved, Store
from stream.tasks import ended, in_thread, pause
from stream.trouble import Trouble

log = logging.getLogger(__name__)

_ATTEMPTS = 3  # at what the broker refuses for a reason that trying again does not change
_AGAIN_S = (0.5, 5.0)  # between two attempts: at first, at last
_FENCED_S = 1.0  # at least: whoever has shut us out may be the owner, and the group is about to say so
_LARGE = 1_000  # records: there is a backlog, and pace matters more than the time of a transaction
NOTHING = -1  # no offset: the store has no state of the partition
_NO_SLOTS = np.zeros(0, np.int32)


class Overtaken(Exception):
    """What this worker has in memory is not what is so: another has committed in the partition, or the log is new."""


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

    @property
    def committed(self) -> tuple[int, Clock]:
        """What the group's offset is once it is done."""
        return self.position, self.clock


class Partition:
    """A partition that this worker owns, from `start` to `stop`."""

    def __init__(
        self,
        at: TopicPartition,
        settings: Settings,
        make_detector: Callable[[], Detector],
        store: Store,
        restoring: asyncio.Lock | None = None,
    ) -> None:
        """Make a partition that has not begun.

        Args:
            at: which one.
            settings: of the service.
            make_detector: makes its detector.
            store: keeps its state.
            restoring: of all partitions of a worker: restored one after the other the first of them judges points
                while the last one waits, and none later than if they shared the processor.
        """
        self.at = at
        self._name = named(at)
        self.settings = settings
        self.detector = make_detector()
        self.store = store
        self.position = 0  # the next offset to be taken in
        self.muted_until = 0  # what came of records before this offset is already published
        self.settled = 0  # the committed offset
        self.flushed = NOTHING  # the offset that the store's state belongs to
        self._flushed_ms = 0  # and its clock
        self.clock = Clock()  # up to which silence has been judged, and where in the log
        self.published = 0
        self.rejected = 0
        self._outbox: Outbox | None = None
        self._consumer: AIOKafkaConsumer | None = None
        self._restoring = restoring or asyncio.Lock()
        self._judging = asyncio.Lock()  # held while the detector is at work in a thread
        self._pending = _Pending()
        self._trying: _Settlement | None = None  # the transaction that was begun last
        self._committed: tuple[int | None, Clock] = (None, Clock())  # as the group has it
        self._said = 0  # events and rejects so far, pending or not
        self._told = 0  # of them in a committed transaction
        self._repeat: Clock | None = None  # to be judged again, muted
        self._judged_ms = 0  # what of the clock is in the state: behind `clock` while it is to be judged again
        self._dirty: BoolArray = np.zeros(0, np.bool_)
        self._gone: set[bytes] = set()  # fields of the store whose series have given their places to others
        self._work = asyncio.Event()
        self._settlement = asyncio.Condition()
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = False
        self._problem: Overtaken | None = None
        self._on_general = 0
        self._broker_trouble = Trouble(log)
        self._store_trouble = Trouble(log)

    @property
    def unsettled(self) -> int:
        """Records taken in and not settled yet."""
        return max(self.position - max(self.settled, self.muted_until), 0)

    @property
    def trouble(self) -> str:
        """What keeps the partition from publishing or from keeping its state, "" for nothing."""
        return "; ".join(one.what for one in (self._broker_trouble, self._store_trouble) if one.what)

    # -- life -----------------------------------------------------------------------------------------------------

    async def start(self, consumer: AIOKafkaConsumer) -> None:
        """Shut a former owner out, restore the state and seek to where it belongs; until then nothing may be fetched.

        Raises:
            KafkaError: the broker cannot be reached, or refuses; to be tried again with another partition object.
        """
        self._consumer = consumer
        kafka = self.settings.kafka
        if kafka.delivery == "exactly_once":
            self._outbox = TransactionalOutbox(self.at, kafka)
        else:
            self._outbox = PlainOutbox(self.at, kafka, consumer)
        try:
            # First: it ends a transaction that a killed owner left open, so that the offset read after it is final.
            await self._outbox.open()
            await self._restore(consumer)
        except BaseException:
            await self._outbox.close()
            raise
        self._tasks = [
            asyncio.create_task(self._settle_loop(), name=f"settle {self._name}"),
            asyncio.create_task(self._flush_loop(), name=f"flush {self._name}"),
        ]

    async def _restore(self, consumer: AIOKafkaConsumer) -> None:
        begun = await find_beginning(consumer, self.at, self.settings, self.store, self._store_trouble)
        if begun.state is not None:
            async with self._restoring:
                series = await asyncio.to_thread(self._unpack, self.detector, begun.state.blobs)
            self.flushed, self._flushed_ms = begun.state.offset, begun.known.ms
            log.info("%s: restored %d series as of offset %d", self._name, series, begun.state.offset)
        self._committed = begun.committed
        self.muted_until = self.settled = begun.settled
        self.position, self._repeat = begun.position, begun.repeat
        self.clock = begun.clock if begun.repeat else max(begun.clock, begun.known)
        self._judged_ms = begun.known.ms if begun.repeat else self.clock.ms
        consumer.seek(self.at, self.position)
        self._judge_again()

    def _unpack(self, detector: Detector, blobs: Mapping[bytes, bytes]) -> int:
        """Restore series; return how many."""
        restored = snapshot.unpack(detector, blobs)
        for problem in restored.refused:
            log.error("%s: %s; the series starts anew", self._name, problem)
        if restored.recalibrating:
            log.warning("%s: %d series calibrate anew: other model", self._name, restored.recalibrating)
        return restored.series

    async def stop(self, limit_s: float) -> None:
        """Settle and flush what has been taken in, then let go; give up what takes longer than `limit_s` seconds."""
        self._stopping = True
        settle, flush = self._tasks
        try:
            async with asyncio.timeout(limit_s):
                async with self._judging:  # the batch in hand
                    self._work.set()
                await asyncio.wait({settle})
                settle.result()
                await ended(flush)
                await self._flush()
        except StoreError as e:
            log.error("%s: all is settled, its state is not written: %s; the next owner rebuilds it", self._name, e)
        except (KafkaError, BrokerError, Overtaken) as e:
            log.error("%s: not everything was settled (%r); the next owner repeats it", self._name, e)
        except TimeoutError:
            log.error("%s: not everything was settled within %g s; the next owner repeats it", self._name, limit_s)
        finally:
            await self.abandon()

    async def abandon(self) -> None:
        """Let go of the partition as it is; the next owner repeats what was not settled."""
        self._stopping = True
        for task in self._tasks:
            await ended(task)
        if self._outbox is not None:
            await self._outbox.close()

    def failure(self) -> BaseException | None:
        """Return why this partition cannot go on, or None while all is well."""
        if self._problem is not None:
            return self._problem
        for task in self._tasks:
            if task.done() and not task.cancelled() and (problem := task.exception()) is not None:
                return problem
        return None

    # -- points in ------------------------------------------------------------------------------------------------

    async def accept(self, batch: Sequence[ConsumerRecord]) -> None:
        """Take a batch in; what comes of it waits for the next transaction. Nothing is done once it is stopping."""
        async with self._judging:
            if self._stopping or not batch or not await self._goes_on(batch[0].offset):
                return
            muted = bisect.bisect_left(batch, self.muted_until, key=_offset)
            if self._repeat is not None:
                before = bisect.bisect_left(batch, self._repeat.offset, key=_offset, hi=muted)
                await self._accept(batch[:before], muted=True)
                if before < len(batch):  # whether or not its records are all there still
                    self.position = max(self.position, self._repeat.offset)
                self._judge_again()
                await self._accept(batch[before:muted], muted=True)
            else:
                await self._accept(batch[:muted], muted=True)
            if muted < len(batch):
                await self._accept(batch[muted:], muted=False)
                self._work.set()

    async def _goes_on(self, offset: int) -> bool:
        """Say whether a batch that begins at an offset follows what has been taken in; tell of what is gone between."""
        if offset < self.position:
            self._problem = Overtaken(f"{self._name} goes back from {self.position} to {offset}: it is another log")
            return False
        if offset > self.position + 1 and self._consumer is not None:  # not only the mark of a transaction
            begin = (await self._consumer.beginning_offsets([self.at]))[self.at]
            if begin > self.position:
                gone = begin - self.position
                log.error(
                    "%s: %d offsets from %d on were deleted before they were read", self._name, gone, self.position
                )
        return True

    async def _accept(self, batch: Sequence[ConsumerRecord], *, muted: bool) -> None:
        if not batch:
            return
        # A small one leaves the event loop its turns: settlements and flushes go on with every step.
        run = in_thread if len(batch) >= _LARGE else asyncio.to_thread
        slots, result, rejects = await run(self._judge, batch)
        # From here on in one go: a settlement that comes between sees all of the batch or nothing.
        self._touch(slots, result.events + result.shadow)
        self._gone.update(name.encode() + kind for name in result.evicted for kind in (b"", SHADOW))
        if self.detector.places.on_general > self._on_general:
            self._on_general = self.detector.places.on_general
            log.warning(
                "%s: %d series have no weights of their own in the stack of their rule: the general model judges them",
                self._name,
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

    def _judge(self, batch: Sequence[ConsumerRecord]) -> tuple[Int32Array, Result, list[Reject]]:
        """Return what comes of a batch: the series it is of, events, and records that hold no point. In a thread."""
        arrival_ms = np.array([record.timestamp for record in batch], np.int64)
        columns, rejects = records.decode(
            [record.value for record in batch],
            self.detector.index,
            arrival_ms=arrival_ms.tolist(),
            future_limit_ms=round(self.settings.future_limit_s * 1000),
        )
        return columns.slot, self.detector.accept(columns, arrival_ms[columns.row]), rejects

    def _say(self, said: Sequence[Event]) -> None:
        self._pending.events += [(event, self.detector.topics_of(event)) for event in said]
        self._said += len(said)

    def _touch(self, slots: Int32Array, said: Sequence[Event]) -> None:
        """Note that the state of these series has changed, and of those that something is said of.

        A series falls silent by a point of another.
        """
        told = np.array([self.detector.index[event.subject] for event in said], np.int32)
        if len(self._dirty) < self.detector.capacity:
            self._dirty = grown(self._dirty, self.detector.capacity)
        self._dirty[slots] = True
        self._dirty[told] = True

    def judge_silence(self, now_ms: int) -> None:
        """Find out who is silent by the clock; all records that had arrived by then have been taken in."""
        if self.position < self.muted_until or self._repeat is not None or now_ms <= self.clock.ms:
            return
        if self._judging.locked() or self._stopping:  # the next time will do
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

    async def change_detector(self, detector: Detector) -> None:
        """Go on with another detector, one without series: those of this one keep their state as far as it fits."""
        async with self._judging:
            slots = np.arange(len(self.detector.index.names), dtype=np.int32)
            await asyncio.to_thread(lambda: self._unpack(detector, snapshot.pack(self.detector, slots)))
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
                await self._settle_at_last()
                await asyncio.sleep(self.settings.kafka.settle_interval_ms / 1000)

    async def _settle_at_last(self) -> None:
        """Settle, however long the broker is away.

        Raises:
            KafkaError: the broker refuses for a reason that a person has to change.
            Overtaken: another worker has the partition.
        """
        attempt = 0
        while True:
            attempt += 1
            pause_s = pause(attempt, *_AGAIN_S)
            try:
                if attempt == 1 or not await self._reopened():
                    await self._settle()
                self._broker_trouble.over(f"{self._name}: publishes again")
                return
            except (KafkaError, OSError) as e:
                if in_vain(e) and attempt >= _ATTEMPTS:
                    raise
                self._broker_trouble.say(f"cannot publish of {self._name}: {e!r}; trying again")
                if isinstance(e, ProducerFenced):
                    pause_s = max(pause_s, _FENCED_S)
            await asyncio.sleep(pause_s)

    async def _reopened(self) -> bool:
        """Take another producer, which ends the transaction of the old one; return whether that had committed it.

        Raises:
            Overtaken: what is committed is neither what was, nor what was tried.
        """
        assert self._outbox is not None and self._consumer is not None
        await self._outbox.open()
        committed, trying = await committed_offset(self._consumer, self.at), self._trying
        if trying is not None and committed == trying.committed:
            await self._settled(trying)
            self._pending = _Pending(
                self._pending.events[len(trying.pending.events) :],
                self._pending.rejects[len(trying.pending.rejects) :],
            )
            return True
        if committed != self._committed:
            raise Overtaken(f"{self._name} was at {self._committed[0]}, and is at {committed[0]}")
        return False

    async def _settle(self) -> None:
        """Commit all that is pending, and the offset behind it, together."""
        assert self._outbox is not None
        this = self._trying = _Settlement(self.position, self.clock, self._said, self._pending)
        self._pending = _Pending()
        try:
            await self._outbox.commit(
                self._outgoing(this.pending), OffsetAndMetadata(this.position, clock_metadata(this.clock))
            )
        except BaseException:
            self._pending = _Pending(
                this.pending.events + self._pending.events, this.pending.rejects + self._pending.rejects
            )
            raise
        steps.reached("committed")
        await self._settled(this)

    def _outgoing(self, pending: _Pending) -> list[Outgoing]:
        kafka = self.settings.kafka
        said = [one for event, further in pending.events for one in event_records(event, further, kafka)]
        return said + [reject_record(reject, record, kafka) for reject, record in pending.rejects]

    async def _settled(self, this: _Settlement) -> None:
        """Note that a transaction is committed."""
        self.published += len(this.pending.events)
        self.rejected += len(this.pending.rejects)
        self._committed, self._trying = this.committed, None
        async with self._settlement:
            self.settled, self._told = this.position, this.said
            self._settlement.notify_all()

    # -- state ----------------------------------------------------------------------------------------------------

    async def _flush_loop(self) -> None:
        while True:
            await asyncio.sleep(self.settings.redis.flush_interval_s)
            try:
                await self._flush()
                self._store_trouble.over(f"{self._name}: state is written again")
            except StoreError as e:
                # The store is a cache of the log: behind, it costs a longer muted stretch after a restart, no event.
                self._store_trouble.say(f"state not written ({e}); trying again")

    async def _flush(self) -> None:
        """Write the series that changed since the last flush, and the offset that they belong to, in one step.

        What the store has lost in the meantime is written whole: memory has all of it.
        """
        async with self._judging:
            offset, said, detector, whole = self.position, self._said, self.detector, self.flushed == NOTHING
            names = len(detector.index.names)
            if offset == self.flushed and not self._dirty[:names].any():
                return
            changed = np.arange(names) if whole else np.flatnonzero(self._dirty[:names])
            slots = changed.astype(np.int32)
            blobs = await asyncio.to_thread(snapshot.pack, detector, slots)
            clock_ms = self._judged_ms
            blobs[CLOCK_FIELD] = b"%d" % clock_ms
            self._dirty[:] = False
            gone, self._gone = self._gone, set()
        try:
            # State must not run ahead of what is published, also where it changed without a record: by the clock.
            async with self._settlement:
                await self._settlement.wait_for(lambda: self.settled >= offset and self._told >= said)
            saved = await self.store.save(
                self.settings.kafka.group,
                self.at.topic,
                self.at.partition,
                offset,
                blobs,
                deleted=gone - blobs.keys(),  # some are back
                base=None if whole else self.flushed,
                base_clock_ms=self._flushed_ms,
                whole=whole,
            )
        except BaseException:
            self._gone |= gone
            if self.detector is detector:  # of another one all is to be written anyway
                self._dirty[slots] = True
            raise
        if saved is Saved.OUTDATED:
            self._gone |= gone
            self._dirty[slots] = True
            if offset >= self.muted_until:
                raise StoreError(f"a later state of {self._name} is stored: another worker has the partition")
            # It could not be read at the start, and is as good as what will come of the muted stretch.
        elif saved is Saved.LOST:
            log.warning("%s: the store has lost its state; writing all of it", self._name)
            self.flushed = NOTHING
            await self._flush()
        else:
            self.flushed, self._flushed_ms = offset, clock_ms
            steps.reached("flushed")


def _offset(record: ConsumerRecord) -> int:
    return int(record.offset)
