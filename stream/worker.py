"""The live worker: polls the points topic and drives one `Partition` for each partition it is assigned."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence

from aiokafka import TopicPartition
from aiokafka.errors import KafkaError

from stream.detector import Counts, Detector
from stream.errors import BrokerError, TocsinError
from stream.kafka import Rebalance, answered_ms, explained, lag, named, points_consumer, read_up_to
from stream.outbox import in_vain
from stream.partition import Overtaken, Partition
from stream.registry import Registry
from stream.reload import RulesFile
from stream.rights import require_rights
from stream.ruleset import RuleSet
from stream.settings import Settings
from stream.store import Store
from stream.tasks import done_before, ended, pause
from stream.topics import ensure_topics
from stream.trouble import Behind, Trouble

log = logging.getLogger(__name__)

_POLL_MS = 200
_SLICE_S = 0.1  # what is taken in at once should take no longer
_SLICE_MIN = 100  # records
_REVOKE_S = 20.0  # for a partition that goes to another worker: less than the group waits, see kafka.py
_LEAVE_S = 5.0  # to tell the group
_AGAIN_S = (1.0, 10.0)  # between two attempts to take a partition: at first, at last
_LOOK_S = 1.0  # between two looks at how the worker does
_SILENT_MS = 10_000  # without an answer of the broker
_UNDER_WAY_MS = 5_000  # a record may reach the broker so long after the time that it bears


class Worker:
    """Consumes points, publishes events; `run` returns after `stop` was called, everything settled and flushed."""

    def __init__(
        self,
        settings: Settings,
        detectors: Callable[[RuleSet | None], Callable[[], Detector]],
        store: Store,
        rules_file: RulesFile | None = None,
        models: Registry | None = None,
    ) -> None:
        """Make a worker that owns no partition yet.

        Args:
            settings: where its topics are.
            detectors: returns, for rules (None: those of the settings), a function that makes a detector.
            store: keeps the state of its partitions.
            rules_file: is watched; its rules are taken over when they change.
            models: is watched; detectors are made anew when other versions are in force.
        """
        self.settings = settings
        self.store = store
        self._detectors = detectors
        self._rules_file = rules_file
        self._models = models
        self.make_detector = detectors(None if rules_file is None else rules_file.current)
        self._next_detector: Callable[[], Detector] | None = None
        self._making = asyncio.Lock()
        self._restoring = asyncio.Lock()
        self.partitions: dict[TopicPartition, Partition] = {}
        self.assigned = asyncio.Event()  # set once the first assignment is complete
        self._stop = asyncio.Event()
        self._problem: Exception | None = None
        self._taking: dict[TopicPartition, asyncio.Task[None]] = {}  # partitions that are on their way
        self._slice = 1_000  # records taken in at once; follows how long they take
        self._gone = Counts()

    def stop(self) -> None:
        """Ask `run` to finish the batch in hand and return."""
        self._stop.set()

    def counts(self) -> Counts:
        """Return what has been done so far, in all partitions."""
        total = Counts()
        total.add(self._gone)
        for partition in self.partitions.values():
            total.add(partition.detector.counts)
        return total

    def not_ready(self) -> list[str]:
        """Return why points do not become events at present, nothing if they do."""
        reasons = [] if self.assigned.is_set() else ["no partitions are assigned yet"]
        if self._taking:
            reasons.append(f"{len(self._taking)} partitions are being restored")
        reasons += [partition.trouble for partition in self.partitions.values() if partition.trouble]
        now_ms = time.time() * 1000
        reading = self.partitions.keys() - self._consumer.paused() if self.partitions else set()  # none before `run`
        heard = [heard_ms for at in reading if (heard_ms := answered_ms(self._consumer, at))]
        if heard and now_ms - max(heard) > _SILENT_MS:
            reasons.append(f"the broker has not answered for {(now_ms - max(heard)) / 1000:.0f} s")
        return reasons

    def lag(self) -> int:
        """Return how many points wait in the partitions of this worker, as far as the broker has said."""
        return sum(lag(self._consumer, at) for at in self.partitions)

    async def run(self) -> None:
        """Work until `stop` is called.

        Raises:
            StoreError: the store cannot be reached within its time.
            BrokerError: the broker cannot be reached, or a partition's transactions failed for good.
        """
        if not await done_before(self._stop, self._connect()):
            return
        consumer = self._consumer
        consumer.subscribe([self.settings.kafka.points_topic], listener=Rebalance(self._assign, self._revoke))
        beside = (self._watch_rules(), self._watch_models(), self._watch_itself())
        watching = [asyncio.create_task(one) for one in beside]
        limit_s = _REVOKE_S
        try:
            while not self._stop.is_set():
                await self._poll()
                for task in watching:
                    if task.done():
                        task.result()
            limit_s = self.settings.shutdown_timeout_s
        finally:
            for task in watching:
                task.cancel()
            try:
                # aiokafka does not say "revoked" before stop
                await asyncio.shield(self._let_go(list(self.partitions), limit_s))
            finally:
                with contextlib.suppress(TimeoutError):  # of a broker that is away: it finds out by itself
                    async with asyncio.timeout(_LEAVE_S):
                        await consumer.stop()
                await asyncio.shield(self._let_go(list(self.partitions), limit_s))

    async def _connect(self) -> None:
        """Wait for the store and the broker; make sure that both allow what is needed."""
        kafka = self.settings.kafka
        await self.store.connect(self.settings.redis.connect_timeout_s)
        rules = None if self._rules_file is None else self._rules_file.current
        topics = (kafka.points_topic, kafka.anomalies_topic, kafka.rejects_topic, kafka.shadow_topic)
        await self._ensure_topics(topics, rules)
        self._consumer = points_consumer(kafka)
        try:
            await self._consumer.start()
        except BaseException as e:
            await self._consumer.stop()
            if isinstance(e, KafkaError):
                raise BrokerError(f"cannot read from {kafka.bootstrap_servers}: {explained(e, kafka)}") from e
            raise

    async def _ensure_topics(self, topics: Sequence[str], rules: RuleSet | None) -> None:
        """Make sure that topics are there, and those that rules publish to."""
        kafka = self.settings.kafka
        further = [topic for rule in rules.rules for topic in rule.topics] if rules is not None else []
        all_topics = dict.fromkeys((*topics, *further), kafka.partitions)
        reads = [topic for topic in all_topics if topic == kafka.points_topic]
        writes = [topic for topic in all_topics if topic not in reads]
        await require_rights(kafka, reads=reads, writes=writes, transactions=kafka.delivery == "exactly_once")
        await ensure_topics(kafka, all_topics)

    async def _watch_rules(self) -> None:
        """Take new rules over when their file changes; wrong ones are told of, once, and what is in force stays."""
        waiting: RuleSet | None = None  # for the broker, to have their topics
        while self._rules_file is not None:
            await asyncio.sleep(self.settings.rules_poll_s)
            try:
                waiting = await asyncio.to_thread(self._rules_file.changed) or waiting
                if waiting is not None:
                    rules, waiting = waiting, None
                    detectors = await self._made(rules)
                    try:
                        await self._ensure_topics((), rules)
                    except BrokerError:
                        waiting = rules
                        raise
                    self._next_detector = detectors
            except TocsinError as e:
                log.error("the rules that were in force stay: %s", e)

    async def _watch_models(self) -> None:
        """Make detectors anew when references lead to other versions; what cannot be used changes nothing."""
        while self._models is not None:
            await asyncio.sleep(self.settings.models_poll_s)
            try:
                async with self._making:
                    changed = await asyncio.to_thread(self._models.changed)
                if changed:
                    rules = None if self._rules_file is None else self._rules_file.current
                    self._next_detector = await self._made(rules)
            except TocsinError as e:
                log.error("the models that were in force stay: %s", e)

    async def _made(self, rules: RuleSet | None) -> Callable[[], Detector]:
        """Return what makes detectors, read in a thread of its own, one at a time."""
        async with self._making:
            return await asyncio.to_thread(self._detectors, rules)

    async def _watch_itself(self) -> None:
        """Say when points do not become events, why, and when they do again; and while they come too fast."""
        was: list[str] = []
        behind = Behind()
        while True:
            await asyncio.sleep(_LOOK_S)
            reasons = self.not_ready() if self.assigned.is_set() else []
            if bool(reasons) != bool(was):
                if reasons:
                    log.error("not ready: %s", "; ".join(reasons))
                else:
                    log.warning("ready again")
            was = reasons
            if said := behind.look(time.monotonic(), self.lag(), self.counts().points):
                log.info("%s", said)

    async def _take_over(self) -> None:
        """Between two batches, give every partition detectors of what is in force; their series keep their state."""
        if self._next_detector is None:
            return
        self.make_detector, self._next_detector = self._next_detector, None
        for partition in list(self.partitions.values()):
            await partition.change_detector(self.make_detector())
        log.info("new rules are in force (%s)", self.settings.rules or "models")

    def _judge_silence(self) -> None:
        """Let partitions of which everything has been read up to a time judge by it who is silent."""
        if self._stop.is_set():  # perhaps in the middle of a batch
            return
        for at, partition in self.partitions.items():
            if (read_ms := read_up_to(self._consumer, at)) is not None:
                partition.judge_silence(read_ms - _UNDER_WAY_MS)

    async def _poll(self) -> None:
        await self._take_over()
        kafka = self.settings.kafka
        try:
            batches = await self._consumer.getmany(timeout_ms=_POLL_MS, max_records=kafka.max_poll_records)
        except KafkaError as e:
            raise BrokerError(f"cannot read {kafka.points_topic}: {explained(e, kafka)}") from e
        # A partition that comes or goes from here on must not see these records: a new one seeks to its own offset.
        owned = {at: self.partitions[at] for at in batches if at in self.partitions}
        for at, partition in owned.items():
            batch = batches[at]
            while batch and self.partitions.get(at) is partition and not self._stop.is_set():
                began, part = time.monotonic(), batch[: self._slice]
                await partition.accept(part)
                # Points of one series go in one after the other: a batch of them may take a hundred times longer
                # than one of as many series.
                per_record_s = (time.monotonic() - began) / len(part)
                batch = batch[len(part) :]
                self._slice = max(int(_SLICE_S / max(per_record_s, 1e-6)), _SLICE_MIN)
        self._judge_silence()
        if self._problem is not None:
            if isinstance(self._problem, TocsinError):
                raise self._problem
            raise BrokerError(f"cannot take on partitions of {kafka.points_topic}") from self._problem
        for at, partition in list(self.partitions.items()):
            if (problem := partition.failure()) is not None:
                await self._after_failure(at, problem)
                continue
            full = partition.unsettled > kafka.unsettled_max
            if full != (at in self._consumer.paused()):
                (self._consumer.pause if full else self._consumer.resume)(at)

    async def _after_failure(self, at: TopicPartition, problem: BaseException) -> None:
        """Take a partition anew from what is committed, if another worker has had it; else give up."""
        kafka = self.settings.kafka
        if not isinstance(problem, Overtaken):
            why = explained(problem, kafka, wish="Write")
            raise BrokerError(f"partition {at.partition} of {at.topic} cannot publish: {why}") from problem
        log.warning("%s; taking it anew, if the group leaves it to us", problem)
        self._consumer.pause(at)
        partition = self.partitions.pop(at)
        await partition.abandon()
        self._gone.add(partition.detector.counts)
        self._taking[at] = asyncio.create_task(self._take(at, failures=1))

    async def _assign(self, assigned: Sequence[TopicPartition]) -> None:
        """Begin to take partitions; aiokafka sends no heartbeat until this returns, so it must not last."""
        self._consumer.pause(*assigned)  # until their state is there
        for at in assigned:
            self._taking[at] = asyncio.create_task(self._take(at))
        if not assigned:
            log.info(
                "assigned no partition of %s: there are more workers than partitions", self.settings.kafka.points_topic
            )
            self.assigned.set()

    async def _take(self, at: TopicPartition, failures: int = 0) -> None:
        """Restore a partition and let its points come, however long the broker is away; at once, or after failures."""
        trouble = Trouble(log)
        while True:
            await asyncio.sleep(pause(failures, *_AGAIN_S) if failures else 0)
            made_by = self.make_detector
            partition = Partition(at, self.settings, made_by, self.store, self._restoring)
            try:
                await partition.start(self._consumer)
                break
            except (KafkaError, OSError) as e:
                if in_vain(e):
                    why = explained(e, self.settings.kafka, wish="Write")
                    self._problem = BrokerError(f"cannot take partition {at.partition} of {at.topic}: {why}")
                    return
                trouble.say(f"cannot take {named(at)}: {e!r}; trying again")
            except Exception as e:
                self._problem = e
                return
            failures += 1
        if self.make_detector is not made_by:  # the rules have changed meanwhile
            try:
                await partition.change_detector(self.make_detector())
            except BaseException:
                await partition.abandon()
                raise
        # In one go: what is fetched behind the seek must find the partition.
        self.partitions[at] = partition
        del self._taking[at]
        self._consumer.resume(at)
        if not self._taking:
            log.info("assigned %d partitions of %s", len(self.partitions), self.settings.kafka.points_topic)
            self.assigned.set()

    async def _revoke(self, revoked: Sequence[TopicPartition]) -> None:
        await self._let_go(revoked, _REVOKE_S)

    async def _let_go(self, leaving: Sequence[TopicPartition], limit_s: float) -> None:
        """Settle and flush partitions and let go of them; of those that are still on their way, too."""
        for task in [self._taking.pop(at) for at in list(self._taking)]:
            await ended(task)
        stopping = [self.partitions.pop(at) for at in leaving if at in self.partitions]
        await asyncio.gather(*(partition.stop(limit_s) for partition in stopping))
        for partition in stopping:
            self._gone.add(partition.detector.counts)
