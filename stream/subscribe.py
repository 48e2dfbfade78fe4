"""Following the anomaly topic: `async for event in subscribe("kafka:9092", kpi="checkout.*")`."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, Self, get_args

import msgspec
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError

from stream import events
from stream.embedded import patch_aborted_transactions
from stream.errors import BrokerError, ConfigError
from stream.events import SEVERITIES, Event, EventData, SeverityName, SilenceData
from stream.kafka import client_options, explained
from stream.settings import KafkaSettings
from stream.topics import ensure_topics

log = logging.getLogger(__name__)

EventType = Literal["opened", "updated", "resolved", "corrected", "retracted", "silent", "resumed"]
EVENT_TYPES: tuple[EventType, ...] = get_args(EventType)
Start = Literal["latest", "earliest"]

_REMEMBERED = 10_000  # event ids; what an at-least-once producer repeats, it repeats soon
_LOOK_FOR_PARTITIONS_S = 30.0  # aiokafka's own pace, five minutes, would keep an alarm of a new partition as long
_POLL_MS = 1_000


@dataclass(frozen=True, slots=True)
class Filter:
    """Which events are wanted; of several globs one has to match, case and all.

    Silence has no model, which only `*` matches, and no severity: it passes whatever the least one is.

    Attributes:
        kpi: globs on the name of the series.
        min_severity: the least severity.
        model: globs on NAME@VERSION; one without an @ is for all versions.
        rule: globs on the label of the rule that the series falls under, "" for that of the settings.
        types: last words of the event types.
    """

    kpi: tuple[str, ...] = ("*",)
    min_severity: SeverityName = "warning"
    model: tuple[str, ...] = ("*",)
    rule: tuple[str, ...] = ("*",)
    types: frozenset[str] = frozenset(EVENT_TYPES)

    @classmethod
    def of(
        cls,
        *,
        kpi: str | Sequence[str] = "*",
        min_severity: SeverityName = "warning",
        model: str | Sequence[str] = "*",
        rule: str | Sequence[str] = "*",
        types: Iterable[str] | None = None,
    ) -> Self:
        """Return a filter from what a caller says: one glob or several; types by their last word or in full.

        Raises:
            ConfigError: there is no such severity or type.
        """
        if min_severity not in SEVERITIES:
            raise ConfigError(f"min_severity={min_severity!r}: must be one of {', '.join(SEVERITIES)}")
        if types is None:
            wanted = frozenset[str](EVENT_TYPES)
        else:
            wanted = frozenset(_last_word(one) for one in ([types] if isinstance(types, str) else types))
        if unknown := sorted(wanted - set(EVENT_TYPES)):
            raise ConfigError(f"types: there is no {unknown[0]!r}; there are {', '.join(EVENT_TYPES)}")
        return cls(_globs(kpi), min_severity, _globs(model), _globs(rule), wanted)

    def matches(self, event: Event, *, mends: bool = False) -> bool:
        """Say whether an event is wanted.

        Args:
            event: of any type.
            mends: it corrects or retracts one that was wanted. Then it is so too, though its severity is lower now.
        """
        data = event.data
        if isinstance(data, SilenceData):
            model, grave = "", True
        else:
            model, grave = data.model, SEVERITIES.index(data.severity) >= SEVERITIES.index(self.min_severity)
        return (
            (grave or mends)
            and _last_word(event.type) in self.types
            and any(fnmatchcase(event.subject, glob) for glob in self.kpi)
            and any(fnmatchcase(model if "@" in glob else model.partition("@")[0], glob) for glob in self.model)
            and any(fnmatchcase(data.rule, glob) for glob in self.rule)
        )


def _globs(given: str | Sequence[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def _last_word(event_type: str) -> str:
    return event_type.rsplit(".", 1)[-1]


def subscribe(
    settings: KafkaSettings | str,
    *,
    kpi: str | Sequence[str] = "*",
    min_severity: SeverityName = "warning",
    model: str | Sequence[str] = "*",
    rule: str | Sequence[str] = "*",
    types: Iterable[EventType] | None = None,
    topic: str | None = None,
    start: Start = "latest",
    on_ready: Callable[[], None] | None = None,
) -> AsyncGenerator[Event, None]:
    """Yield events as they are committed, each id once, until the caller stops.

    Partitions that the topic gets meanwhile are followed too. An absent topic is created and waited at. What a
    partition loses to retention before it could be read is passed over.

    Args:
        settings: where the broker is and what the topic is called; or just host:port,…
        kpi: glob, or several, that the name of the KPI must match, case and all.
        min_severity: the least severity; silence has none and passes, and so does what mends an event that passed.
        model: glob, or several, on NAME or NAME@VERSION.
        rule: glob, or several, on the label of the rule.
        types: such as ["opened", "resolved"]; None for all.
        topic: None for that of the settings.
        start: "latest" for what comes from now on, "earliest" for all that the topic holds.
        on_ready: told once no later event can be missed.

    Raises:
        ConfigError: at once, where an argument is wrong.
        BrokerError: with the first event, where the broker cannot be reached or refuses.
    """
    if isinstance(settings, str):
        settings = KafkaSettings(bootstrap_servers=settings)
    if start not in get_args(Start):
        raise ConfigError(f"start={start!r}: must be one of {', '.join(get_args(Start))}")
    wanted = Filter.of(kpi=kpi, min_severity=min_severity, model=model, rule=rule, types=types)
    return _follow(settings, wanted, topic or settings.anomalies_topic, start, on_ready)


async def _follow(
    settings: KafkaSettings, wanted: Filter, topic: str, start: Start, on_ready: Callable[[], None] | None
) -> AsyncGenerator[Event, None]:
    patch_aborted_transactions()  # of `tocsin up`: whoever was given its address reads from it too
    # A consumer of a topic that does not exist yet would look for it again after minutes only.
    partitions = await ensure_topics(settings, {topic: settings.partitions})
    consumer = AIOKafkaConsumer(
        **client_options(settings),
        enable_auto_commit=False,
        auto_offset_reset="earliest",  # also in a partition that comes later: all that it holds came since
        isolation_level="read_committed",
        metadata_max_age_ms=round(_LOOK_FOR_PARTITIONS_S * 1000),
    )
    seen: OrderedDict[str, bool] = OrderedDict()  # id of an event -> whether it was wanted
    try:
        await consumer.start()
        at = [TopicPartition(topic, p) for p in range(partitions[topic])]
        begin = await (consumer.end_offsets if start == "latest" else consumer.beginning_offsets)(at)
        _assign(consumer, begin)
        if on_ready is not None:
            on_ready()
        while True:
            batches = await consumer.getmany(timeout_ms=_POLL_MS)
            for record in (record for batch in batches.values() for record in batch):
                try:
                    event = events.decode(record.value or b"")
                except msgspec.DecodeError as e:
                    log.warning("%s offset %d holds no event: %s", record.topic, record.offset, e)
                    continue
                if event.id in seen:
                    continue
                superseded = event.data.supersedes if isinstance(event.data, EventData) else ""
                passes = seen[event.id] = wanted.matches(event, mends=seen.get(superseded, False))
                if len(seen) > _REMEMBERED:
                    seen.popitem(last=False)
                if passes:
                    yield event
            await _take_new_partitions(consumer, topic)
    except KafkaError as e:
        raise BrokerError(f"cannot follow {topic} at {settings.bootstrap_servers}: {explained(e, settings)}") from e
    finally:
        await consumer.stop()


async def _take_new_partitions(consumer: AIOKafkaConsumer, topic: str) -> None:
    known = consumer.assignment()
    new = {TopicPartition(topic, p) for p in consumer.partitions_for_topic(topic) or ()} - known
    if not new:
        return
    begin = dict.fromkeys(new, 0) | {at: await consumer.position(at) for at in known}
    _assign(consumer, begin)
    log.info("%s has %d more partitions, %d in all", topic, len(new), len(known) + len(new))


def _assign(consumer: AIOKafkaConsumer, begin: Mapping[TopicPartition, int]) -> None:
    """Read from these offsets on; nothing is awaited in between, where aiokafka would look for offsets of its own."""
    consumer.assign(list(begin))
    for at, offset in begin.items():
        consumer.seek(at, offset)
