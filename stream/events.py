"""Anomaly events as they are published: CloudEvents 1.0, JSON format, the same bytes for the same points.

An incident's id is derived from its series, its opening time and the model, and an event's id from the incident's, so
that a replay, a back-test and a restarted service give the same ids and a consumer can drop what it has seen. Computed
numbers are rounded to six significant digits: float32 carries no more. What is in the units of the KPI has as many
digits of the width of its band instead: that of 3e9 ± 1e3 would otherwise be empty.
"""

from __future__ import annotations

import hashlib
import math
from datetime import UTC, datetime, timedelta
from typing import Literal

import msgspec

SeverityName = Literal["warning", "major", "critical"]
SEVERITIES: tuple[SeverityName, ...] = ("warning", "major", "critical")  # rising; index 0 is Severity.WARNING

TYPE_OPENED = "tocsin.anomaly.opened"
TYPE_UPDATED = "tocsin.anomaly.updated"
TYPE_RESOLVED = "tocsin.anomaly.resolved"
TYPE_CORRECTED = "tocsin.anomaly.corrected"
TYPE_RETRACTED = "tocsin.anomaly.retracted"
TYPE_SILENT = "tocsin.kpi.silent"
TYPE_RESUMED = "tocsin.kpi.resumed"

NO_DURATION = 0.0  # this very object: it is by identity that a default is known, and left out of the JSON
CONTENT_TYPE = "application/cloudevents+json; charset=UTF-8"


class WindowInfo(msgspec.Struct, frozen=True):
    """How much the model had to go by."""

    cells: int
    completed: int  # cells of it that were missing or flagged, and completed by the model


class Peak(msgspec.Struct, frozen=True, omit_defaults=True):
    """The point of an incident that lay furthest beyond its threshold."""

    time: str
    ratio: float
    value: float | None = None  # an entity has no single one


class Feature(msgspec.Struct, frozen=True):
    """One metric of an entity that took part in an anomaly, and its share in the squared score."""

    metric: str
    share: float
    value: float
    expected: float
    lower: float
    upper: float


class EventData(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """What an anomaly event says.

    Attributes:
        kpi: the series, a KPI or an entity.
        incident: id shared by all events of one incident.
        severity: the gravest so far.
        value: the point that caused the event, `expected`, `lower` and `upper` what the model expected of it; an entity
            has `features` instead: the metrics that make up the score, the largest share first.
        score: how far the point is from what was expected; `threshold` the score above which a point is anomalous,
            `ratio` score / threshold, `probability` how probable so high a score is at a normal point.
        anomalies: anomalous points of the incident so far.
        opened: event time of the first one.
        last_anomaly: event time of the latest anomalous point, on resolution.
        reason: why it was resolved: "recovered" (normal again) or "accepted" (it has lasted so long that it is
            taken for the new normal).
        supersedes: id of the event that this one corrects or retracts, late points having proved it wrong.
        health: of the threshold, when it is not in full health: "prior" (that of other KPIs, until the series has its
            own), "degenerate" (its scores have no tail to fit) or "drifting" (it alarms far more often than it should).
        rule: the rule that the series falls under, `labels` those of the rule.
        shadow: said by a model that only judges beside the one that alerts.
    """

    kpi: str
    incident: str
    severity: SeverityName
    model: str
    opened: str
    anomalies: int
    score: float
    threshold: float
    ratio: float
    probability: float
    window: WindowInfo
    value: float | None = None
    expected: float | None = None
    lower: float | None = None
    upper: float | None = None
    features: list[Feature] = []
    reason: str = ""
    last_anomaly: str = ""
    duration_s: float = NO_DURATION
    peak: Peak | None = None
    supersedes: str = ""
    health: str = ""
    rule: str = ""
    labels: dict[str, str] = {}
    shadow: bool = False


class SilenceData(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """What an event about a series that sends nothing says.

    Attributes:
        kpi: the series.
        last_seen: event time of its newest point.
        interval_s: its interval, `silent_after_s` how long it may send nothing.
        basis: what showed the silence: "event_time" (newer points, of others or its own) or "wall_clock" (no points at
            all have come; a replay of the same points cannot know of it).
        silent_s: event time from the last point before the silence to the first one after it, on resumption.
        rule: the rule that the series falls under, `labels` those of the rule.
    """

    kpi: str
    last_seen: str
    interval_s: float
    silent_after_s: float
    basis: Literal["event_time", "wall_clock"]
    silent_s: float = 0.0
    rule: str = ""
    labels: dict[str, str] = {}


class Event(msgspec.Struct, frozen=True):
    """A CloudEvent; `time` is the event time of the point that caused it, never the time of the machine."""

    specversion: str
    id: str
    source: str
    type: str
    subject: str
    time: str
    datacontenttype: str
    partitionkey: str
    data: EventData | SilenceData


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

encode = msgspec.json.Encoder().encode


class _Envelope(Event, frozen=True):
    data: msgspec.Raw  # type: ignore[assignment]


_decode_envelope = msgspec.json.Decoder(_Envelope).decode
_decode_anomaly = msgspec.json.Decoder(EventData).decode
_decode_silence = msgspec.json.Decoder(SilenceData).decode


def decode(encoded: bytes | str) -> Event:
    """Return the event that was encoded.

    Raises:
        msgspec.DecodeError: it is none.
    """
    try:
        envelope = _decode_envelope(encoded)
        decode_data = _decode_silence if envelope.type in (TYPE_SILENT, TYPE_RESUMED) else _decode_anomaly
        data: EventData | SilenceData = decode_data(envelope.data)
    except UnicodeDecodeError as e:
        raise msgspec.DecodeError(f"not UTF-8: {e.reason} at byte {e.start}") from None
    except RecursionError:
        raise msgspec.DecodeError("nested too deeply") from None
    return Event(**{name: getattr(envelope, name) for name in Event.__struct_fields__ if name != "data"}, data=data)


def make_event(
    event_type: str, event_id: str, timestamp_ms: int, data: EventData | SilenceData, *, source: str = "tocsin"
) -> Event:
    """Wrap the data of an event into its envelope."""
    return Event(
        specversion="1.0",
        id=event_id,
        source=source,
        type=event_type,
        subject=data.kpi,
        time=iso_time(timestamp_ms),
        datacontenttype="application/json",
        partitionkey=data.kpi,
        data=data,
    )


def shadowed(event: Event) -> Event:
    """Return an anomaly event as said by a model in the shadow of another."""
    assert isinstance(event.data, EventData)
    return msgspec.structs.replace(event, data=msgspec.structs.replace(event.data, shadow=True))


def incident_id(series: str, opened_ms: int, model: str) -> int:
    """Return the id of the incident that opened in a series at a time under a model: 64 bits."""
    return int.from_bytes(hashlib.blake2b(f"{series}\0{opened_ms}\0{model}".encode(), digest_size=8).digest())


def silence_id(series: str, last_seen_ms: int) -> str:
    """Return the id of the silence of a series after a point: 64 bits, in hexadecimal."""
    return hashlib.blake2b(f"{series}\0{last_seen_ms}\0silence".encode(), digest_size=8).hexdigest()


def iso_time(timestamp_ms: int) -> str:
    """Return RFC 3339 in UTC, with milliseconds only where there are any."""
    moment = _EPOCH + timedelta(milliseconds=timestamp_ms)
    return moment.isoformat(timespec="milliseconds" if timestamp_ms % 1000 else "seconds").replace("+00:00", "Z")


def significant(x: float) -> float:
    """Round to six significant digits."""
    return float(f"{x:.6g}")


def rounded_to(width: float, x: float) -> float:
    """Round to six significant digits of a width that tells what differences in x mean something; 0: of x itself."""
    return round(x, 5 - math.floor(math.log10(width))) if width else significant(x)
