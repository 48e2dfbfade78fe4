"""What late points prove wrong: statements that were published are corrected or retracted, by id.

A series that corrects keeps two copies of its state, from before cells that lie the lateness apart, and what came
since. A late point sends it back to the copy before its cell; the cells from there on are gone through again as if the
point had come in its time, and what they now say is held against what was published.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from stream.events import NO_DURATION, TYPE_CORRECTED, TYPE_RETRACTED, Event, EventData, SeverityName

Standing = Callable[[str], tuple[SeverityName, int] | None]


class Statement(msgspec.Struct):
    """An event that a cell of a series has caused; part of its state while its cell can still be revised."""

    cell: int
    plain: str  # the id that the event has where nothing is revised
    published: str  # the id under which it was published last
    event: Event
    live: bool = True  # False: retracted, or no longer said
    versions: int = 1  # publications of this plain id


@dataclass(frozen=True, slots=True)
class Said:
    """An event that a cell causes, by its plain id; not published yet."""

    cell: int
    event: Event
    row: int


def mend(published: list[Statement], cell: int, said: Sequence[Said], standing: Standing) -> list[Event]:
    """Return what has to be published so that what stands is what is `said` of the cells from `cell` on.

    Args:
        published: the statements of the series; brought up to date.
        cell: the cell of the late point; what was published of cells before it stands.
        said: what the cells from there on say now, oldest first.
        standing: severity and anomalous points that an incident has now, by its id; None for one that is not the
            newest of the series.
    """
    now = {one.event.id for one in said}
    latest = {_data(one.event).incident: _data(one.event) for one in said}
    wrong = [one for one in published if one.live and one.cell >= cell and one.plain not in now]
    begun = {_data(one.event).incident for one in wrong if _opens(one)}
    retracted = begun - latest.keys()
    events: list[tuple[int, Event]] = []
    for one in wrong:
        data, one.live = _data(one.event), False
        if data.incident not in retracted:
            end = latest.get(data.incident)
            if end is None or not end.reason:  # it goes on; else what does is another one, perhaps one that is muted
                severity, anomalies = standing(data.incident) or (data.severity, data.anomalies)
            else:
                severity, anomalies = end.severity, end.anomalies
            still = msgspec.structs.replace(
                data,
                severity=severity,
                anomalies=anomalies,
                reason="",
                last_anomaly="",
                duration_s=NO_DURATION,
                peak=None,
            )
            events.append((one.cell, _superseding(published, one, TYPE_CORRECTED, still, one.event.time)))
        elif _opens(one):
            events.append((one.cell, _superseding(published, one, TYPE_RETRACTED, data, one.event.time)))
    for new in said:
        old = next((one for one in published if one.live and one.plain == new.event.id), None)
        if old is None:
            events.append((new.cell, say(published, new)))
        elif _gist(old.event) == _gist(new.event):
            old.cell = new.cell
        else:
            event = _superseding(published, old, TYPE_CORRECTED, _data(new.event), new.event.time)
            old.cell, old.event = new.cell, new.event
            events.append((new.cell, event))
    events.sort(key=lambda one: one[0])
    return [event for _, event in events]


def say(published: list[Statement], new: Said) -> Event:
    """Return the event that says something for the first time, or again: then it has an id of its own."""
    event = new.event
    old = next((one for one in published if one.plain == event.id), None)
    if old is None:
        published.append(Statement(new.cell, event.id, event.id, event))
        return event
    old.cell, old.live, old.event = new.cell, True, event
    return msgspec.structs.replace(event, id=_next_id(published, old.plain))


def forget(published: list[Statement], oldest: int, ongoing: str) -> list[Statement]:
    """Return the statements without those of cells before the oldest that can still be revised.

    What is no longer said, but could be said again, stays, lest its ids be used twice: statements of the incident that
    goes on, or that a revision may let go on.
    """
    alive = {_data(one.event).incident for one in published if one.cell >= oldest} | {ongoing}
    return [one for one in published if one.cell >= oldest or (not one.live and _data(one.event).incident in alive)]


def _superseding(published: list[Statement], old: Statement, event_type: str, data: EventData, time: str) -> Event:
    """Return an event that takes the place of a statement."""
    before = old.published
    plain = f"{data.incident}-retracted" if event_type == TYPE_RETRACTED else old.plain
    event_id = _next_id(published, plain)
    event = msgspec.structs.replace(
        old.event, id=event_id, type=event_type, time=time, data=msgspec.structs.replace(data, supersedes=before)
    )
    if event_type == TYPE_RETRACTED and not any(one.plain == plain for one in published):
        published.append(Statement(old.cell, plain, event_id, event, live=False))
    return event


def _next_id(published: list[Statement], plain: str) -> str:
    """Return the id under which something is published (again), and note it."""
    for one in published:
        if one.plain == plain:
            one.versions += 1
            one.published = f"{plain}-r{one.versions}"
            return one.published
    return plain


def _opens(statement: Statement) -> bool:
    return statement.plain.endswith("-opened")


def _gist(event: Event) -> tuple[str, ...]:
    """Return what a reader of the event goes by."""
    data = _data(event)
    return event.time, data.severity, data.opened, data.reason


def _data(event: Event) -> EventData:
    assert isinstance(event.data, EventData)
    return event.data
