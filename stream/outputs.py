"""Events and rejects as the records that are published of them."""

from __future__ import annotations

from collections.abc import Iterator

from aiokafka import ConsumerRecord

from stream import events
from stream.events import Event
from stream.outbox import Outgoing
from stream.records import Reject
from stream.settings import KafkaSettings

REJECT_BYTES_MAX = 256 << 10  # of a refused record that are kept: with its headers it must fit the broker's 1 MiB
_EVENT_HEADERS = [("content-type", events.CONTENT_TYPE.encode())]


def event_records(event: Event, further: tuple[str, ...], settings: KafkaSettings) -> Iterator[Outgoing]:
    """Yield the records of an event, one for each topic that it goes to.

    Args:
        event: is published.
        further: topics that its rule names, besides that of all events of its kind.
        settings: name that one.
    """
    shadow = isinstance(event.data, events.EventData) and event.data.shadow
    first = settings.shadow_topic if shadow else settings.anomalies_topic
    key, value = event.subject.encode(), events.encode(event)
    for topic in dict.fromkeys((first, *further)):
        yield Outgoing(topic, key, value, _EVENT_HEADERS)


def reject_record(reject: Reject, record: ConsumerRecord, settings: KafkaSettings) -> Outgoing:
    """Return what is published of a record that was refused: its bytes, why, and where it stands."""
    value = (record.value or b"")[:REJECT_BYTES_MAX]
    return Outgoing(settings.rejects_topic, record.key, value, _reject_headers(reject, record))


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
    if (attempt := dict(record.headers).get("tocsin-attempt")) is not None:  # it was sent in again
        headers["tocsin-attempt"] = attempt.decode("utf-8", "replace")[:20]
    return [(name, value.encode("utf-8", "replace")) for name, value in headers.items()]
