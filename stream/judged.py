"""Points that have been judged, and the events that tell of them."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import numpy as np

from models.base import Assessment
from models.pot import Health, Step
from stream.columns import Float64Array, Int32Array, Int64Array
from stream.events import (
    SEVERITIES,
    TYPE_OPENED,
    TYPE_RESOLVED,
    TYPE_UPDATED,
    Event,
    EventData,
    Feature,
    Peak,
    WindowInfo,
    iso_time,
    make_event,
    rounded_to,
    significant,
)
from stream.incidents import Action, Incidents
from stream.policy import Rule
from stream.results import Served

_PROBABILITY_MIN = 1e-12  # what a tail fitted to a hundred excesses says below it means no more than "never seen"
_RATIO_MAX = 1e9  # a threshold of 0 (a series that was always forecast exactly) has no ratio
_SHARE_MIN, _FEATURES_MAX = 0.05, 5  # of an entity's features an event names those that matter


@dataclass(frozen=True, slots=True)
class Judged:
    """Points of a wave, (K,), with what their model says of them and how they were judged."""

    slot: Int32Array
    timestamp_ms: Int64Array
    value: Float64Array  # (K, F), NaN where it was not scored
    assessment: Assessment
    error: Float64Array  # (K, F), >= 0, what counts of the model's
    score: Float64Array
    step: Step
    completed: Int64Array  # cells of the window that hold no value that arrived


def ratio_of(score: Float64Array | float, threshold: Float64Array | float) -> Float64Array:
    """Return score / threshold, 1.0 being the edge for every model."""
    with np.errstate(over="ignore"):
        return np.minimum(score / np.maximum(threshold, 1e-300), _RATIO_MAX)


def anomaly_event(
    point: Judged,
    i: int,
    action: Action,
    incidents: Incidents,
    *,
    name: str,
    served: Served,
    rule: Rule,
    health: Health,
    source: str,
) -> Event:
    """Return what is to be published of a point that opens, changes or ends an incident.

    Args:
        point: points of a wave, of which it is number `i`.
        i: see `point`.
        action: what became of the incident by it.
        incidents: of all series of the group.
        name: of the series.
        served: its model.
        rule: that the series falls under.
        health: of its threshold.
        source: CloudEvents source.
    """
    slot = int(point.slot[i])
    time, opened = int(point.timestamp_ms[i]), int(incidents.opened_ms[slot])
    threshold = float(point.step.threshold[i])
    data = EventData(
        kpi=name,
        incident=f"{int(incidents.id[slot]):016x}",
        severity=SEVERITIES[int(incidents.severity[slot]) - 1],
        model=served.ref,
        opened=iso_time(opened),
        anomalies=int(incidents.anomalies[slot]),
        score=significant(float(point.score[i])),
        threshold=significant(threshold),
        ratio=significant(float(ratio_of(point.score[i], threshold))),
        probability=significant(max(float(point.step.probability[i]), _PROBABILITY_MIN)),
        window=WindowInfo(served.model.window, int(point.completed[i])),
        health="" if health in (Health.OK, Health.WARMING) else health.name.lower(),
        rule=rule.name,
        labels=dict(rule.labels),
    )
    if served.model.features == 1:
        data = msgspec.structs.replace(data, value=float(point.value[i, 0]), **_band(point, i, 0))
    else:
        data = msgspec.structs.replace(data, features=_contributions(point, i, served.metrics))
    if action in (Action.RESOLVED, Action.ACCEPTED):
        peak = float(incidents.peak_value[slot])
        data = msgspec.structs.replace(
            data,
            reason="recovered" if action == Action.RESOLVED else "accepted",
            last_anomaly=iso_time(int(incidents.last_ms[slot])),
            duration_s=(time - opened) / 1000,
            peak=Peak(
                iso_time(int(incidents.peak_ms[slot])),
                significant(float(incidents.peak_ratio[slot])),
                None if np.isnan(peak) else peak,
            ),
        )
    event_type, suffix = {
        Action.OPENED: (TYPE_OPENED, "opened"),
        Action.UPDATED: (TYPE_UPDATED, f"updated-{data.severity}"),
        Action.RESOLVED: (TYPE_RESOLVED, "resolved"),
        Action.ACCEPTED: (TYPE_RESOLVED, "resolved"),
    }[action]
    return make_event(event_type, f"{data.incident}-{suffix}", time, data, source=source)


def _band(point: Judged, i: int, feature: int) -> dict[str, float]:
    """Return what was expected of a value, and the band around it that is normal."""
    one = point.assessment.take(slice(i, i + 1))
    expected = float(one.expected[0, feature])
    width = float(one.half_width(point.step.threshold[i : i + 1, None])[0, feature])
    return {
        "expected": rounded_to(width, expected),
        "lower": rounded_to(width, expected - width),
        "upper": rounded_to(width, expected + width),
    }


def _contributions(point: Judged, i: int, metrics: tuple[str, ...]) -> list[Feature]:
    """Return the features that make up the score of an entity's point, the largest share first."""
    square = np.square(point.error[i] / max(float(point.error[i].max()), 1e-300))
    share = square / max(float(square.sum()), 1e-300)
    largest = np.argsort(-share, kind="stable")[:_FEATURES_MAX]
    return [
        Feature(
            metric=metrics[f],
            share=significant(float(share[f])),
            value=float(point.value[i, f]),
            **_band(point, i, f),
        )
        for f in largest.tolist()
        if share[f] >= _SHARE_MIN
    ]
