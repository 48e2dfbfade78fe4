"""What a run over labelled points was worth: which labelled segments were caught, how soon, and what was false."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import msgspec
import numpy as np

from stream.detector import Counts
from stream.events import TYPE_CORRECTED, TYPE_RETRACTED, TYPE_SILENT, Event, EventData, iso_time
from stream.points import Points


class Segment(msgspec.Struct, frozen=True):
    """A run of points (records of an entity) labelled anomalous, and the incident that caught it."""

    kpi: str
    start: str
    end: str
    points: int
    incident: str | None  # the first one that was open in it
    delay_points: int | None  # points of the segment before it opened; 0: at the first one, or open already
    metrics: tuple[str, ...] = ()  # of an entity, those that its incident's opening named, the largest share first


class Summary(msgspec.Struct, frozen=True):
    """A run in figures."""

    kpis: int
    points: int
    scored: int
    missing_completed: int
    events: int
    incidents: int
    silences: int  # series that fell silent, each time
    segments: tuple[Segment, ...]
    caught: int
    false_alarms: int | None  # incidents outside all segments; None where nothing is labelled
    rejected: int
    elapsed_s: float
    points_per_s: float
    counts: dict[str, int]
    entities: int = 0


@dataclass(frozen=True, slots=True)
class Incident:
    """What the events of one incident say of it; one that goes on ends at the end of time."""

    id: str
    kpi: str
    opened_ms: int
    ended_ms: int
    metrics: tuple[str, ...]


def summarise(
    points: Points, events: Iterable[Event], counts: Counts, *, elapsed_s: float, rejected: int = 0, first: int = 0
) -> Summary:
    """Hold a run's events against the labels of its points.

    A segment is caught when an incident was open at one of its points: from its opening to its last anomalous point,
    for the normal ones after it only prove its end. An incident is a false alarm when it was open
    at no labelled point; it is none, and none is counted, where the points have no labels at all.

    Args:
        points: what was replayed.
        events: what was published.
        counts: what the detector did.
        elapsed_s: how long it took.
        rejected: records that could not be used.
        first: index of the first point that counts (those before it were trained on).
    """
    events = list(events)
    begin_ms = int(points.timestamp_ms[first]) if first < len(points.value) else 0
    # One that had ended before the first point that counts belongs to what came before it.
    metric_of = {
        f"{name}.{metric}": metric
        for name, of_name in zip(points.names, points.metrics, strict=True)
        for metric in of_name
    }
    incidents = [incident for incident in incidents_of(events, metric_of) if not first or incident.ended_ms >= begin_ms]
    labelled = bool((points.label[first:] >= 0).any())
    begins = points.begins  # the points of a record share its label
    segments: list[Segment] = []
    true_alarms: set[str] = set()
    for k, name in enumerate(points.names):
        own = np.flatnonzero((points.kpi[first:] == k) & begins[first:]) + first
        own = own[np.argsort(points.timestamp_ms[own], kind="stable")]
        time, label = points.timestamp_ms[own], points.label[own] == 1
        watched_as = set(points.series(k))
        of_kpi = [incident for incident in incidents if incident.kpi in watched_as]
        edges = np.flatnonzero(np.diff(np.r_[False, label, False]))
        for start, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            open_in = [i for i in of_kpi if i.opened_ms <= time[end - 1] and i.ended_ms >= time[start]]
            true_alarms.update(incident.id for incident in open_in)
            first_in = min(open_in, key=lambda incident: incident.opened_ms, default=None)
            segments.append(
                Segment(
                    kpi=name,
                    start=iso_time(int(time[start])),
                    end=iso_time(int(time[end - 1])),
                    points=end - start,
                    incident=first_in.id if first_in else None,
                    delay_points=int(np.searchsorted(time[start:end], first_in.opened_ms)) if first_in else None,
                    metrics=first_in.metrics if first_in else (),
                )
            )
    segments.sort(key=lambda segment: segment.start)
    return Summary(
        kpis=len(points.names) - points.n_entities,
        entities=points.n_entities,
        points=counts.points,
        scored=counts.scored,
        missing_completed=counts.completed,
        events=len(events),
        incidents=len(incidents),
        silences=sum(event.type == TYPE_SILENT for event in events),
        segments=tuple(segments),
        caught=sum(segment.incident is not None for segment in segments),
        false_alarms=len(incidents) - len(true_alarms) if labelled else None,
        rejected=rejected,
        elapsed_s=round(elapsed_s, 3),
        points_per_s=round(counts.points / elapsed_s, 1) if elapsed_s > 0 else 0.0,
        counts=counts.as_dict(),
    )


def incidents_of(events: Iterable[Event], metric_of: Mapping[str, str]) -> list[Incident]:
    """Return the incidents that events tell of.

    Args:
        events: in the order of their publication.
        metric_of: of a series that is a metric of an entity, its name there.
    """
    opened: dict[str, tuple[str, int, tuple[str, ...]]] = {}
    ended: dict[str, int] = {}
    for event in events:
        if not isinstance(event.data, EventData):
            continue
        metrics = tuple(feature.metric for feature in event.data.features)
        if not metrics and event.data.kpi in metric_of:  # watched by itself
            metrics = (metric_of[event.data.kpi],)
        # Its opening may be muted.
        opened.setdefault(event.data.incident, (event.data.kpi, _ms(event.data.opened), metrics))
        if event.type == TYPE_RETRACTED:
            del opened[event.data.incident]
        elif event.data.reason:
            # The incident itself ended with its last anomalous point; what follows are the normal ones that prove it.
            ended[event.data.incident] = _ms(event.data.last_anomaly or event.time)
        elif event.type == TYPE_CORRECTED:  # perhaps of an end that was none
            ended.pop(event.data.incident, None)
    forever = np.iinfo(np.int64).max
    return [Incident(i, kpi, at, ended.get(i, int(forever)), metrics) for i, (kpi, at, metrics) in opened.items()]


def _ms(text: str) -> int:
    return round(datetime.fromisoformat(text).timestamp() * 1000)


def as_json(summary: Summary) -> dict[str, Any]:
    """Return the last line of a `--json` run."""
    return {"summary": msgspec.to_builtins(summary)}
