"""Two models on the same points: which incidents both report, and which only one of them does."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from stream.events import Event, EventData, iso_time
from stream.report import Incident, incidents_of

OPEN = 2**62  # the end of an incident that goes on


class Only(msgspec.Struct, frozen=True):
    """An incident that one model reports and the other does not."""

    kpi: str
    opened: str
    ended: str | None
    metrics: tuple[str, ...] = ()


class ModelDifference(msgspec.Struct, frozen=True):
    """What two models say of the same points.

    Attributes:
        first: its reference.
        second: its reference.
        kpis: series with an event of either.
        both: incidents of the first that overlap with one of the second.
        earlier: of them those that the second opened first.
        later: of them those that it opened after the first.
        only_first: incidents of the first alone, oldest first.
        only_second: incidents of the second alone.
    """

    first: str
    second: str
    kpis: int
    both: int
    earlier: int
    later: int
    only_first: tuple[Only, ...]
    only_second: tuple[Only, ...]


def compare_models(
    first: str, second: str, said_by_first: Iterable[Event], said_by_second: Iterable[Event]
) -> ModelDifference:
    """Hold the incidents of two models against each other; silences are nobody's."""
    ours, theirs = (_by_kpi(incidents_of(said, {})) for said in (said_by_first, said_by_second))
    both = earlier = later = 0
    only_first: list[Only] = []
    only_second: list[Only] = []
    for kpi in sorted(ours.keys() | theirs.keys()):
        met: set[str] = set()
        for one in ours.get(kpi, ()):
            others = [o for o in theirs.get(kpi, ()) if o.opened_ms <= one.ended_ms and o.ended_ms >= one.opened_ms]
            if not others:
                only_first.append(_only(one))
                continue
            met.update(other.id for other in others)
            both += 1
            begins = min(other.opened_ms for other in others)
            earlier += begins < one.opened_ms
            later += begins > one.opened_ms
        only_second += [_only(other) for other in theirs.get(kpi, ()) if other.id not in met]
    return ModelDifference(
        first,
        second,
        kpis=len(ours.keys() | theirs.keys()),
        both=both,
        earlier=earlier,
        later=later,
        only_first=tuple(sorted(only_first, key=lambda one: (one.opened, one.kpi))),
        only_second=tuple(sorted(only_second, key=lambda one: (one.opened, one.kpi))),
    )


def in_shadow(said: Sequence[Event], shadow: Sequence[Event]) -> list[Event]:
    """Return of what was published the events of series that something judges in the shadow, since it has done so."""
    begins: dict[str, str] = {}
    for event in shadow:
        begins[event.subject] = min(event.time, begins.get(event.subject, event.time))
    first = min(begins.values(), default="")
    return [event for event in said if isinstance(event.data, EventData) and event.time >= first]


def as_json(found: ModelDifference) -> dict[str, Any]:
    """Return the line of a `--json` run."""
    return {"comparison": msgspec.to_builtins(found)}


def _by_kpi(found: Iterable[Incident]) -> dict[str, list[Incident]]:
    by_kpi: dict[str, list[Incident]] = defaultdict(list)
    for one in found:
        by_kpi[one.kpi].append(one)
    return by_kpi


def _only(one: Incident) -> Only:
    return Only(one.kpi, iso_time(one.opened_ms), iso_time(one.ended_ms) if one.ended_ms < OPEN else None, one.metrics)
