"""The reject topic, for people: what lies there and why, and sending it in again.

A retry sends the bytes of rejects back to the points topic, to the partition that they came from, and commits in the
same transaction which rejects it has gone through. So each is sent once, however often a retry is run, killed or run
twice at a time. What is rejected again is a new reject, whose header says the how manyth attempt it was; after some of
them it is left alone. Progress is the offset of a group of its own, `<group>-rejects-retry`: all before it is done.
What a filter passed over stays to be retried later: spans of single reasons that are done beyond it are its metadata.
"""

from __future__ import annotations

import asyncio
import heapq
import re
from collections import Counter
from collections.abc import Awaitable, Iterable, Sequence
from dataclasses import dataclass, field

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRecord, OffsetAndMetadata, TopicPartition
from aiokafka.errors import KafkaError, ProducerFenced, TransactionalIdAuthorizationFailed

from stream.embedded import patch_aborted_transactions
from stream.errors import BrokerError, TocsinError
from stream.kafka import client_options, committed, explained, user
from stream.settings import KafkaSettings
from stream.tail import NoRecords, open_topic, read_between, read_tail
from stream.topics import ensure_topics

ATTEMPT = "tocsin-attempt"  # of a point that was sent in again, and of its reject
RETRY_OF = "tocsin-retry-of"  # partition:offset of the reject that a point was
ATTEMPTS_MAX = 3
_REASON = re.compile(r"[a-z][a-z0-9_]{0,40}")
_ALL = "*"  # a span of all reasons
_SPAN = re.compile(r"(\d+)-(\d+)")
_METADATA_MAX = 4_000  # of a committed offset; the broker takes 4,096 bytes
_TRANSACTION_RECORDS, _TRANSACTION_BYTES = 1_000, 4 << 20
_FETCH_MS = 50  # what waits for records keeps all else on its connection waiting


@dataclass(frozen=True, slots=True)
class Rejected:
    """A record of the reject topic."""

    partition: int
    offset: int
    rejected_ms: int
    reason: str
    detail: str
    topic: str  # where it came from
    source_partition: int
    source_offset: int
    attempt: int  # how often it had been sent in again before
    truncated_from: int | None  # its bytes, if not all of them were kept
    key: bytes | None
    value: bytes

    @classmethod
    def of(cls, record: ConsumerRecord) -> Rejected | None:
        """Return what a record says; None of one that no worker of ours has put there."""
        said = {name: value.decode("utf-8", "replace") for name, value in record.headers if value is not None}
        numbers = [_number(said.get(name)) for name in ("tocsin-partition", "tocsin-offset")]
        reason, topic = said.get("tocsin-reason", ""), said.get("tocsin-topic", "")
        if not _REASON.fullmatch(reason) or not topic or None in numbers:
            return None
        return cls(
            record.partition,
            record.offset,
            record.timestamp,
            reason,
            said.get("tocsin-detail", ""),
            topic,
            numbers[0] or 0,
            numbers[1] or 0,
            _number(said.get(ATTEMPT)) or 0,
            _number(said.get("tocsin-truncated-from")),
            record.key,
            record.value or b"",
        )

    @property
    def place(self) -> str:
        """Where it came from."""
        return f"{self.topic} {self.source_partition}:{self.source_offset}"


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isascii() and text.isdigit() and len(text) < 19 else None


# -- list -------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Listing:
    """The newest rejects that were asked for, and how many there are."""

    limit: int
    reasons: frozenset[str]  # empty: all
    counts: Counter[str] = field(default_factory=Counter)  # of those asked for, by reason
    foreign: int = 0  # records that are no rejects
    left_out: bool = False  # older ones than were read
    _newest: list[tuple[int, int, int, Rejected]] = field(default_factory=list)

    def add(self, records: Iterable[ConsumerRecord]) -> None:
        """Take records in."""
        for record in records:
            if (one := Rejected.of(record)) is None:
                self.foreign += 1
            elif not self.reasons or one.reason in self.reasons:
                self.counts[one.reason] += 1
                heapq.heappush(self._newest, (one.rejected_ms, one.partition, one.offset, one))
                if len(self._newest) > self.limit:
                    heapq.heappop(self._newest)

    @property
    def newest(self) -> list[Rejected]:
        """Return the newest of those asked for, oldest first."""
        return [one for *_, one in sorted(self._newest, key=lambda entry: entry[:3])]


async def list_rejects(
    settings: KafkaSettings,
    *,
    reasons: Iterable[str] = (),
    since_ms: int | None = None,
    limit: int,
    records: int,
) -> Listing:
    """Return what lies on the reject topic.

    Args:
        settings: where it is.
        reasons: only these; none: all.
        since_ms: none that was rejected earlier, ms since 1970.
        limit: how many of the newest are kept; all are counted.
        records: how many are read from the end of each partition, at most.

    Raises:
        TocsinError: there is no such topic.
        BrokerError: the broker cannot be reached, or refuses.
    """
    listing = Listing(limit, frozenset(reasons))
    try:
        extent = await read_tail(
            settings, settings.rejects_topic, records=records, since_ms=since_ms, on_records=listing.add
        )
    except NoRecords:
        return listing
    listing.left_out = any(end - extent.begin[at] >= records for at, end in extent.end.items())
    return listing


# -- what has been retried --------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Progress:
    """Which rejects of a partition are done: all before `floor`, and beyond it those of spans, by reason."""

    floor: int = 0
    spans: dict[str, list[tuple[int, int]]] = field(default_factory=dict)

    @classmethod
    def parsed(cls, floor: int, metadata: str) -> Progress:
        """Return what was committed; spans that cannot be read are none, so that nothing is passed over for good."""
        spans: dict[str, list[tuple[int, int]]] = {}
        for part in metadata.split(";"):
            reason, colon, text = part.partition(":")
            if colon and (reason == _ALL or _REASON.fullmatch(reason)):
                spans[reason] = [(int(begin), int(end)) for begin, end in _SPAN.findall(text)]
        return cls(floor, spans)

    def metadata(self) -> str:
        """Return the spans as they are committed with the floor."""
        parts = ((reason, ",".join(f"{a}-{b}" for a, b in spans)) for reason, spans in sorted(self.spans.items()))
        return ";".join(f"{reason}:{text}" for reason, text in parts)

    def has(self, reason: str, offset: int) -> bool:
        """Say whether a reject is done."""
        spans = [*self.spans.get(reason, ()), *self.spans.get(_ALL, ())]
        return offset < self.floor or any(begin <= offset < end for begin, end in spans)

    def add(self, reasons: Iterable[str], begin: int, end: int) -> None:
        """Note that those of some reasons (none: of all) in [begin, end) are done."""
        for reason in tuple(reasons) or (_ALL,):
            joined: list[tuple[int, int]] = []
            for a, b in sorted([*self.spans.get(reason, ()), (begin, end)]):
                if joined and a <= joined[-1][1]:
                    joined[-1] = (joined[-1][0], max(joined[-1][1], b))
                else:
                    joined.append((a, b))
            self.spans[reason] = joined
        self.raise_to(self.floor)

    def raise_to(self, floor: int) -> None:
        """Note that all before an offset are done."""
        self.floor = max(self.floor, floor)
        for begin, end in self.spans.get(_ALL, ()):
            if begin <= self.floor:
                self.floor = max(self.floor, end)
        kept = {name: [(a, b) for a, b in spans if b > self.floor] for name, spans in self.spans.items()}
        self.spans = {name: spans for name, spans in kept.items() if spans}


# -- retry ------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Retried:
    """What came of a retry."""

    sent: Counter[str] = field(default_factory=Counter)  # by reason
    truncated: list[Rejected] = field(default_factory=list)  # cannot be sent: not all of their bytes are there
    given_up: list[Rejected] = field(default_factory=list)  # came back too often
    elsewhere: int = 0  # of another points topic
    foreign: int = 0  # records that are no rejects


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which rejects are to be retried.

    Attributes:
        reasons: only these; none: all.
        since_ms: none that was rejected earlier.
        limit: so many, at most; None: all.
        attempts_max: those that have come back so often are given up.
    """

    reasons: frozenset[str] = frozenset()
    since_ms: int | None = None
    limit: int | None = None
    attempts_max: int = ATTEMPTS_MAX


def retry_group(settings: KafkaSettings) -> str:
    """Return the group, and the transactional id, of retries."""
    return f"{settings.group}-rejects-retry"


async def retry(settings: KafkaSettings, wanted: Wanted, *, dry_run: bool = False) -> Retried:
    """Send rejects in again, each once; those that come while it runs are left for the next time.

    Args:
        settings: where the topics are.
        wanted: which of them.
        dry_run: send nothing and commit nothing; say what would be.

    Raises:
        TocsinError: there is no reject topic, or the progress is too scattered to be kept.
        BrokerError: the broker cannot be reached or refuses, or another retry has taken over; what was committed before
            is done, and the next retry goes on behind it.
    """
    patch_aborted_transactions()
    await ensure_topics(settings, {})  # says why, if the broker cannot be reached
    name = retry_group(settings)
    producer = None
    if not dry_run:
        producer = AIOKafkaProducer(**client_options(settings), transactional_id=name, linger_ms=0)
    consumer = AIOKafkaConsumer(
        **client_options(settings),
        group_id=name,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        isolation_level="read_committed",
        fetch_max_wait_ms=_FETCH_MS,
    )
    try:
        if producer is not None:
            # The producer first: its start ends the transaction of a retry that was killed, and fences one that runs,
            # so that the progress read after it is final.
            await producer.start()
        await consumer.start()
        return await _Retry(settings, wanted, consumer, producer).run()
    except ProducerFenced:
        raise BrokerError(f"another `tocsin rejects retry` of group {settings.group} has taken over") from None
    except (KafkaError, TimeoutError) as e:
        raise BrokerError(f"rejects cannot be retried at {settings.bootstrap_servers}: {_why(e, settings)}") from e
    finally:
        await consumer.stop()
        if producer is not None:
            await producer.stop()


def _why(error: Exception, settings: KafkaSettings) -> str:
    """Return an error in words: a missing right by its name."""
    if isinstance(error, TransactionalIdAuthorizationFailed):
        return f"{user(settings)} lacks the right to Write transactional id {retry_group(settings)} (deploy/acl)"
    own = settings.model_copy(update={"group": retry_group(settings)})
    return explained(error, own, wish="Write" if settings.points_topic in str(error) else "Read")


class _Retry:
    """One run."""

    def __init__(
        self, settings: KafkaSettings, wanted: Wanted, consumer: AIOKafkaConsumer, producer: AIOKafkaProducer | None
    ) -> None:
        self._settings = settings
        self._wanted = wanted
        self._consumer = consumer
        self._producer = producer
        self._result = Retried()
        self._progress: dict[TopicPartition, Progress] = {}
        self._begin: dict[TopicPartition, int] = {}
        self._gapless: dict[TopicPartition, bool] = {}  # all from the floor on were gone through
        self._outgoing: list[Rejected] = []
        self._moved: set[TopicPartition] = set()  # progress that is not committed

    async def run(self) -> Retried:
        end = await self._find()
        async for batches, _ in read_between(self._consumer, self._begin, end, _TRANSACTION_RECORDS):
            for at, batch in batches.items():
                for record in batch:
                    if self._full:
                        break
                    self._take(at, record)
                    if sum(len(one.value) for one in self._outgoing) >= _TRANSACTION_BYTES:
                        await self._commit()
            await self._commit()
            if self._full:
                break
        return self._result

    @property
    def _full(self) -> bool:
        return self._wanted.limit is not None and self._result.sent.total() >= self._wanted.limit

    async def _find(self) -> dict[TopicPartition, int]:
        """Find out where the last retry ended, or the time that was asked for is; return the ends."""
        at = await open_topic(self._consumer, self._settings, self._settings.rejects_topic)
        first = await self._consumer.beginning_offsets(at)
        end: dict[TopicPartition, int] = await self._consumer.end_offsets(at)
        known = await committed(self._consumer, at)
        since = self._wanted.since_ms
        found = {} if since is None else await self._consumer.offsets_for_times(dict.fromkeys(at, since))
        for one in at:
            offset, metadata = known[one]
            done = Progress() if offset is None else Progress.parsed(offset, metadata)
            done.raise_to(first[one])
            self._progress[one], begin = done, done.floor
            if since is not None:
                begin = max(begin, end[one] if found.get(one) is None else found[one].offset)
            self._begin[one], self._gapless[one] = begin, begin <= done.floor
        return end

    def _take(self, at: TopicPartition, record: ConsumerRecord) -> None:
        progress, one = self._progress[at], Rejected.of(record)
        if one is None:
            self._result.foreign += 1
        elif one.topic != self._settings.points_topic:
            self._result.elsewhere += 1
        elif not progress.has(one.reason, one.offset):
            if self._wanted.reasons and one.reason not in self._wanted.reasons:
                self._gapless[at] = False
                return
            self._judge(one)
        self._moved.add(at)
        if self._gapless[at]:
            progress.raise_to(record.offset + 1)
        else:
            progress.add(self._wanted.reasons, self._begin[at], record.offset + 1)

    def _judge(self, one: Rejected) -> None:
        if one.truncated_from is not None:
            self._result.truncated.append(one)
        elif one.attempt >= self._wanted.attempts_max:
            self._result.given_up.append(one)
        else:
            self._result.sent[one.reason] += 1
            self._outgoing.append(one)

    async def _commit(self) -> None:
        """Send what was taken and commit how far that is, in one transaction."""
        outgoing, moved = self._outgoing, self._moved
        self._outgoing, self._moved = [], set()
        if self._producer is None or not (outgoing or moved):
            return
        offsets = {at: OffsetAndMetadata(self._progress[at].floor, self._progress[at].metadata()) for at in moved}
        if any(len(one.metadata) > _METADATA_MAX for one in offsets.values()):
            raise TocsinError(
                "what was retried lies too scattered to be kept: run `tocsin rejects retry` once without filters"
            )
        async with self._producer.transaction():
            sent = await _send(self._producer, self._settings, outgoing)
            for failure in await asyncio.gather(*sent, return_exceptions=True):
                if isinstance(failure, BaseException):
                    raise failure
            await self._producer.send_offsets_to_transaction(offsets, retry_group(self._settings))
        await asyncio.sleep(self._settings.settle_interval_ms / 1000)


async def _send(
    producer: AIOKafkaProducer, settings: KafkaSettings, outgoing: Sequence[Rejected]
) -> list[Awaitable[object]]:
    if not outgoing:
        return []
    partitions = await producer.partitions_for(settings.points_topic)
    sent = []
    for one in outgoing:
        headers = [(ATTEMPT, b"%d" % (one.attempt + 1)), (RETRY_OF, b"%d:%d" % (one.partition, one.offset))]
        # Where the other points of its series are and their state, whatever partitioner they were sent by.
        partition = one.source_partition if one.source_partition in partitions else None
        sent.append(
            await producer.send(settings.points_topic, one.value, key=one.key, partition=partition, headers=headers)
        )
    return sent
