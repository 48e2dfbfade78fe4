"""Following the anomaly topic: `async for event in subscribe(settings)`."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from fnmatch import fnmatchcase
from typing import Literal

import msgspec
from aiokafka import TopicPartition
from aiokafka.errors import KafkaError

from stream import events
from stream.errors import BrokerError
from stream.events import SEVERITIES, Event, SeverityName
from stream.kafka import reader
from stream.settings import KafkaSettings
from stream.topics import ensure_topics

log = logging.getLogger(__name__)

_REMEMBERED = 10_000  # event ids; what an at-least-once producer repeats, it repeats soon


async def subscribe(
    settings: KafkaSettings,
    *,
    kpi: str = "*",
    min_severity: SeverityName = "warning",
    start: Literal["latest", "earliest"] = "latest",
    on_ready: Callable[[], None] | None = None,
) -> AsyncIterator[Event]:
    """Yield anomaly events as they are committed, each id once, until the caller stops.

    Args:
        settings: where the broker is and what the topic is called.
        kpi: glob that the name of the KPI must match, case and all.
        min_severity: the least severity.
        start: "latest" for what comes from now on, "earliest" for all that the topic holds.
        on_ready: told once no later event can be missed.

    Raises:
        BrokerError: the broker cannot be reached.
    """
    # A consumer of a topic that does not exist yet would look for it again after minutes only.
    partitions = await ensure_topics(
        settings.bootstrap_servers,
        {settings.anomalies_topic: settings.partitions},
        replication_factor=settings.replication,
        deadline_s=settings.connect_timeout_s,
    )
    consumer = reader(settings, start)
    consumer.assign([TopicPartition(settings.anomalies_topic, p) for p in range(partitions[settings.anomalies_topic])])
    seen: OrderedDict[str, None] = OrderedDict()
    least = SEVERITIES.index(min_severity)
    try:
        try:
            await consumer.start()
            for at in consumer.assignment():
                await consumer.position(at)  # "latest" is settled here and now, not with the first fetch
        except KafkaError as e:
            raise BrokerError(
                f"cannot reach Kafka at {settings.bootstrap_servers} ({e}); set TOCSIN_KAFKA__BOOTSTRAP_SERVERS"
            ) from e
        if on_ready is not None:
            on_ready()
        async for record in consumer:
            try:
                event = events.decode(record.value or b"")
            except msgspec.DecodeError as e:
                log.warning("%s offset %d holds no event: %s", record.topic, record.offset, e)
                continue
            if event.id in seen:
                continue
            seen[event.id] = None
            if len(seen) > _REMEMBERED:
                seen.popitem(last=False)
            if fnmatchcase(event.subject, kpi) and SEVERITIES.index(event.data.severity) >= least:
                yield event
    finally:
        await consumer.stop()
