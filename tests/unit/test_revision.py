from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream import events
from stream.detector import Detector
from stream.events import SEVERITIES, Event, EventData, Peak, SeverityName, WindowInfo, iso_time, make_event
from stream.revision import Said, Standing, Statement, forget, mend, say
from tests.helpers import MINUTE, T0, Record, columns, config, detector, normal_points, run

A, B = "a" * 16, "b" * 16


def said(
    cell: int,
    kind: str,
    incident: str = A,
    *,
    severity: SeverityName = "warning",
    opened: int = 0,
    anomalies: int = 1,
    after_ms: int = 0,
    reason: str = "",
    row: int = 0,
) -> Said:
    """What a cell says: `kind` is the end of the id."""
    time = cell * MINUTE + after_ms
    ends = kind == "resolved"
    data = EventData(
        kpi="kpi",
        incident=incident,
        severity=severity,
        model="m@1",
        opened=iso_time(opened * MINUTE),
        anomalies=anomalies,
        score=9.0,
        threshold=3.0,
        ratio=3.0,
        probability=1e-5,
        window=WindowInfo(9, 0),
        value=5.0,
        reason=reason or ("recovered" if ends else ""),
    )
    if ends:
        data = msgspec.structs.replace(data, last_anomaly="x", duration_s=60.0, peak=Peak("x", 3.0, 5.0))
    event_type = f"tocsin.anomaly.{kind.partition('-')[0]}"
    return Said(cell, make_event(event_type, f"{incident}-{kind}", time, data), row)


def published(*told: Said) -> list[Statement]:
    statements: list[Statement] = []
    for one in told:
        assert say(statements, one) is one.event
    return statements


def gone(incident: str) -> None:
    """No incident is the newest of the series."""
    return None


class Shown(NamedTuple):
    """An event as a reader sees it."""

    kind: str
    id: str
    supersedes: str = ""


def shown(found: Sequence[Event]) -> list[Shown]:
    return [Shown(one.type.rpartition(".")[2], one.id, data_of(one).supersedes) for one in found]


def data_of(event: Event) -> EventData:
    assert isinstance(event.data, EventData)
    return event.data


# -- case by case -----------------------------------------------------------------------------------------------------

OPENED = said(5, "opened", opened=5)
UPDATED = said(6, "updated-major", opened=5, severity="major", anomalies=2)
RESOLVED = said(9, "resolved", opened=5, severity="major", anomalies=2)


def test_what_is_said_for_the_first_time_is_published_as_it_is() -> None:
    told = published(OPENED)
    found = mend(told, 6, [UPDATED, RESOLVED], gone)
    assert found == [UPDATED.event, RESOLVED.event]
    assert [one.plain for one in told if one.live] == [one.event.id for one in (OPENED, UPDATED, RESOLVED)]


def test_what_is_said_as_before_is_not_published_again() -> None:
    told = published(OPENED, UPDATED, RESOLVED)
    assert mend(told, 5, [OPENED, UPDATED, RESOLVED], gone) == []
    assert mend(told, 10, [], gone) == []
    assert all(one.live and one.versions == 1 for one in told)


@pytest.mark.parametrize("cell", [5, 6, 8])
def test_what_is_told_of_cells_before_the_late_point_stands(cell: int) -> None:
    told = published(OPENED, UPDATED, RESOLVED)
    found = mend(told, cell, [one for one in (OPENED, UPDATED, RESOLVED) if one.cell >= cell], gone)
    assert found == []


@pytest.mark.parametrize("other", [{"anomalies": 7}, {"row": 3}])
def test_numbers_alone_are_no_correction(other: dict[str, Any]) -> None:
    told = published(said(5, "opened"))
    assert mend(told, 4, [said(5, "opened", **other)], gone) == []


@pytest.mark.parametrize(
    "other",
    [{"severity": "critical"}, {"opened": 4}, {"after_ms": 1000}, {"cell": 6}],
    ids=lambda other: next(iter(other)),
)
def test_another_time_severity_or_beginning_is_corrected(other: dict[str, Any]) -> None:
    told = published(said(5, "opened"))
    new = said(**{"cell": 5, "kind": "opened", **other})
    (found,) = mend(told, 5, [new], gone)
    assert shown([found]) == [Shown("corrected", f"{A}-opened-r2", f"{A}-opened")]
    assert found.time == new.event.time
    assert data_of(found) == msgspec.structs.replace(data_of(new.event), supersedes=f"{A}-opened")
    assert (found.subject, found.partitionkey, found.source) == ("kpi", "kpi", "tocsin")
    assert mend(told, 5, [new], gone) == [], "it stands now"


def test_another_reason_is_corrected() -> None:
    told = published(OPENED, RESOLVED)
    (found,) = mend(told, 6, [said(9, "resolved", opened=5, severity="major", reason="accepted")], gone)
    assert shown([found]) == [Shown("corrected", f"{A}-resolved-r2", f"{A}-resolved")]
    assert data_of(found).reason == "accepted"


def test_what_is_corrected_twice_supersedes_the_correction() -> None:
    told = published(said(5, "opened"))
    chain = []
    for severity in ("major", "critical", "warning"):
        chain += mend(told, 5, [said(5, "opened", severity=severity)], gone)
    assert shown(chain) == [
        Shown("corrected", f"{A}-opened-r2", f"{A}-opened"),
        Shown("corrected", f"{A}-opened-r3", f"{A}-opened-r2"),
        Shown("corrected", f"{A}-opened-r4", f"{A}-opened-r3"),
    ]
    assert len(told) == 1


def test_an_incident_that_never_was_is_retracted_once() -> None:
    told = published(OPENED, UPDATED, RESOLVED)
    (found,) = mend(told, 5, [], gone)
    assert shown([found]) == [Shown("retracted", f"{A}-retracted", f"{A}-opened")]
    assert found.time == OPENED.event.time
    assert data_of(found) == msgspec.structs.replace(data_of(OPENED.event), supersedes=f"{A}-opened")
    assert not any(one.live for one in told)
    assert mend(told, 5, [], gone) == []


def test_a_retraction_takes_back_the_opening_that_stands() -> None:
    told = published(OPENED)
    mend(told, 5, [said(5, "opened", opened=5, severity="major")], gone)
    (found,) = mend(told, 5, [], gone)
    assert shown([found]) == [Shown("retracted", f"{A}-retracted", f"{A}-opened-r2")]


def test_what_was_retracted_may_be_said_again_and_retracted_again() -> None:
    told = published(OPENED, UPDATED)
    history = mend(told, 5, [], gone)
    history += mend(told, 4, [OPENED, UPDATED], gone)
    history += mend(told, 4, [], gone)
    history += mend(told, 4, [OPENED], gone)
    assert shown(history) == [
        Shown("retracted", f"{A}-retracted", f"{A}-opened"),
        Shown("opened", f"{A}-opened-r2"),
        Shown("updated", f"{A}-updated-major-r2"),
        Shown("retracted", f"{A}-retracted-r2", f"{A}-opened-r2"),
        Shown("opened", f"{A}-opened-r3"),
    ]
    assert history[1] == msgspec.structs.replace(OPENED.event, id=f"{A}-opened-r2"), "else as at the first time"


def test_an_end_that_was_none_is_corrected() -> None:
    """The incident goes on: the event says what it is now, and names no end."""
    told = published(OPENED, UPDATED, RESOLVED)
    standing: Standing = lambda incident: ("critical", 8) if incident == A else None  # noqa: E731
    (found,) = mend(told, 7, [], standing)
    assert shown([found]) == [Shown("corrected", f"{A}-resolved-r2", f"{A}-resolved")]
    data = data_of(found)
    assert (data.severity, data.anomalies, found.time) == ("critical", 8, RESOLVED.event.time)
    assert (data.reason, data.last_anomaly, data.peak) == ("", "", None)
    for field in (b"reason", b"last_anomaly", b"duration_s", b"peak"):
        assert field not in events.encode(found)
    again = said(12, "resolved", opened=5, severity="critical")
    assert shown(mend(told, 12, [again], gone)) == [Shown("resolved", f"{A}-resolved-r3")]


def test_of_an_older_incident_what_is_no_longer_said_keeps_its_severity() -> None:
    told = published(OPENED, UPDATED)
    (found,) = mend(told, 6, [said(7, "opened", B, opened=7)], gone)[:1]
    assert shown([found]) == [Shown("corrected", f"{A}-updated-major-r2", f"{A}-updated-major")]
    assert (data_of(found).severity, data_of(found).anomalies) == ("major", 2)


def test_of_an_older_incident_what_is_no_longer_said_has_the_severity_of_its_end() -> None:
    told = published(OPENED, UPDATED)
    news = [said(7, "resolved", opened=5, anomalies=1), said(8, "opened", B, opened=8)]
    found = mend(told, 6, news, lambda incident: ("warning", 1) if incident == B else None)
    assert shown(found[:1]) == [Shown("corrected", f"{A}-updated-major-r2", f"{A}-updated-major")]
    assert (data_of(found[0]).severity, data_of(found[0]).anomalies) == ("warning", 1)


def test_the_end_that_is_said_counts_and_not_a_muted_incident_behind_it() -> None:
    told = published(OPENED, UPDATED)
    news = [said(6, "resolved", opened=5, anomalies=1)]
    found = mend(told, 6, news, lambda incident: ("critical", 1))  # of the incident that a cooldown keeps quiet
    assert sorted(one.type.rpartition(".")[2] for one in found) == ["corrected", "resolved"]
    assert {data_of(one).severity for one in found} == {"warning"}


def test_another_severity_of_an_update_is_another_statement() -> None:
    told = published(OPENED, UPDATED)
    critical = said(6, "updated-critical", opened=5, severity="critical")
    found = mend(told, 6, [critical], lambda incident: ("critical", 3))
    assert shown(found) == [
        Shown("corrected", f"{A}-updated-major-r2", f"{A}-updated-major"),
        Shown("updated", f"{A}-updated-critical"),
    ]
    assert data_of(found[0]).severity == "critical"


def test_an_incident_that_began_elsewhere_takes_the_place_of_the_one_retracted() -> None:
    told = published(OPENED, UPDATED)
    earlier = [said(4, "opened", B, opened=4), said(6, "updated-major", B, opened=4, severity="major")]
    assert shown(mend(told, 4, earlier, gone)) == [
        Shown("opened", f"{B}-opened"),
        Shown("retracted", f"{A}-retracted", f"{A}-opened"),
        Shown("updated", f"{B}-updated-major"),
    ]


def test_by_cell_and_of_one_cell_first_what_is_said_no_longer() -> None:
    told = published(OPENED, UPDATED, said(8, "resolved", opened=5), said(8, "opened", B, opened=8))
    new = [
        said(5, "opened", opened=5, severity="critical"),
        said(7, "updated-critical", opened=5, severity="critical"),
        said(8, "updated-major", opened=5, severity="major"),
    ]
    assert shown(mend(told, 5, new, gone)) == [
        Shown("corrected", f"{A}-opened-r2", f"{A}-opened"),
        Shown("updated", f"{A}-updated-critical"),
        Shown("corrected", f"{A}-resolved-r2", f"{A}-resolved"),
        Shown("retracted", f"{B}-retracted", f"{B}-opened"),
        Shown("corrected", f"{A}-updated-major-r2", f"{A}-updated-major"),
    ]


def test_what_may_still_be_said_again_is_not_forgotten() -> None:
    newest = said(20, "opened", B, opened=20)
    told = published(OPENED, UPDATED, said(7, "resolved", opened=5), newest)
    mend(told, 6, [newest], lambda incident: ("warning", 1))  # neither update nor end were any
    assert [one.plain for one in forget(told, 20, ongoing=A)] == [f"{A}-updated-major", f"{A}-resolved", f"{B}-opened"]
    assert [one.plain for one in forget(told, 20, ongoing=B)] == [f"{B}-opened"]
    assert forget(told, 5, ongoing="") == told
    assert forget(told, 21, ongoing="") == []


# -- any course of things ---------------------------------------------------------------------------------------------


class World:
    """What a series says of its cells; from a cell on it can turn out otherwise."""

    def __init__(self, rng: Any, cells: int) -> None:
        self.rng, self.cells = rng, cells
        self.says: list[list[Said]] = []
        self.states: list[tuple[int, int]] = []  # before each cell: where the open incident began (-1: none), severity
        self.turn_from(0)

    def turn_from(self, start: int) -> None:
        begun, severity = self.states[start] if start else (-1, 0)
        self.says, self.states = self.says[:start], self.states[:start]
        for cell in range(start, self.cells):
            self.states.append((begun, severity))
            now: list[Said] = []
            if begun < 0 and self.rng.random() < 0.3:
                begun, severity = cell, int(self.rng.integers(2))
                now.append(self._said(cell, "opened", begun, severity))
            elif begun >= 0:
                if severity < 2 and self.rng.random() < 0.3:
                    severity = int(self.rng.integers(severity + 1, 3))
                    now.append(self._said(cell, f"updated-{SEVERITIES[severity]}", begun, severity))
                elif self.rng.random() < 0.3:
                    now.append(self._said(cell, "resolved", begun, severity))
                    begun = -1
            self.says.append(now)
        self.states.append((begun, severity))

    def _said(self, cell: int, kind: str, begun: int, severity: int) -> Said:
        after = int(self.rng.integers(2))  # the time is that of the point, not that of the cell
        return said(cell, kind, f"{begun:016x}", severity=SEVERITIES[severity], opened=begun, after_ms=after)

    def since(self, cell: int) -> list[Said]:
        return [one for now in self.says[cell:] for one in now]

    def standing(self, incident: str) -> tuple[SeverityName, int] | None:
        begun, severity = self.states[-1]
        return (SEVERITIES[severity], 1) if f"{begun:016x}" == incident else None


def gist(event: Event) -> tuple[str, ...]:
    data = data_of(event)
    return event.time, data.incident, data.severity, data.opened, data.reason


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), cells=st.integers(1, 12), turns=st.integers(1, 8))
def test_whatever_turns_out_a_reader_who_follows_the_ids_knows_what_is_so(seed: int, cells: int, turns: int) -> None:
    rng = np.random.default_rng(seed)
    world = World(rng, cells)
    told: list[Statement] = []
    stands: dict[str, Event] = {}  # by id, as a reader has it
    ids: set[str] = set()
    news = [say(told, one) for one in world.since(0)]
    for _ in range(turns):
        for event in news:
            data = data_of(event)
            assert event.id not in ids, "no id twice"
            ids.add(event.id)
            kind = event.type.rpartition(".")[2]
            assert bool(data.supersedes) == (kind in ("corrected", "retracted"))
            if data.supersedes:
                del stands[data.supersedes]  # it stood until now: nothing is superseded twice
            stands[event.id] = event
            if kind == "retracted":  # the whole incident is off
                stands = {key: one for key, one in stands.items() if data_of(one).incident != data.incident}
        # All that is so stands, and else only that something told of an incident was not so.
        true = {gist(one.event) for one in world.since(0)}
        assert true <= {gist(event) for event in stands.values()}
        for event in stands.values():
            if gist(event) not in true:
                assert event.type == events.TYPE_CORRECTED
                assert (data_of(event).reason, data_of(event).peak) == ("", None)
        assert {one.plain: gist(one.event) for one in told if one.live} == {
            one.event.id: gist(one.event) for one in world.since(0)
        }
        cell = int(rng.integers(cells))
        world.turn_from(cell)
        news = mend(told, cell, world.since(cell), world.standing)
        times = [event.time[:16] for event in news]  # minutes, that is cells
        assert times == sorted(times)
        assert mend(told, cell, world.since(cell), world.standing) == [], "it has been mended"


# -- through the detector ---------------------------------------------------------------------------------------------

START = T0 + 60 * MINUTE


def watched() -> Detector:
    """A KPI that corrects its events, with a threshold."""
    of = detector(config(lateness_ms=3 * MINUTE, q=1e-3))
    assert of.accept(columns(of, normal_points(60))).events == []
    return of


def sent(to: Detector, *points: tuple[int, float]) -> list[Event]:
    arrivals: list[Record] = [("a", START + minute * MINUTE, value) for minute, value in points]
    return to.accept(columns(to, arrivals)).events


def kinds(found: Sequence[Event]) -> list[tuple[str, str, str]]:
    """Type, id without the incident, and what it supersedes."""
    return [(kind, event_id[17:], supersedes[17:]) for kind, event_id, supersedes in shown(found)]


def test_a_value_that_is_sent_anew_takes_back_what_the_first_one_said() -> None:
    of = watched()
    assert kinds(sent(of, (0, 500.0))) == [("opened", "opened", "")]
    assert kinds(sent(of, (0, 500.0))) == [], "a producer that repeats itself"
    assert kinds(sent(of, (0, 10.0))) == [("retracted", "retracted", "opened")]
    assert kinds(sent(of, (0, 500.0))) == [("opened", "opened-r2", "")]
    assert kinds(sent(of, (0, 510.0))) == [], "no graver, at the same time"
    assert kinds(sent(of, (0, 10.0))) == [("retracted", "retracted-r2", "opened-r2")]
    assert (of.counts.revised, of.counts.duplicates) == (4, 5)


def test_a_late_anomaly_opens_the_incident_in_its_place() -> None:
    of = watched()
    assert kinds(sent(of, (0, 10.0), (2, 10.5))) == []
    (opened,) = sent(of, (1, 500.0))
    assert (opened.type, opened.time) == (events.TYPE_OPENED, iso_time(START + MINUTE))
    assert of.counts.late == of.counts.revised == 1
    assert kinds(sent(of, (3, 10.0), (4, 10.0))) == [("resolved", "resolved", "")], "the third normal one after it"


def test_an_end_that_a_late_anomaly_takes_back_comes_later() -> None:
    of = watched()
    assert kinds(sent(of, (0, 500.0), (1, 10.0), (3, 10.0), (4, 10.5))) == [
        ("opened", "opened", ""),
        ("resolved", "resolved", ""),
    ]
    (corrected,) = sent(of, (2, 500.0))
    assert kinds([corrected]) == [("corrected", "resolved-r2", "resolved")]
    assert (corrected.time, data_of(corrected).anomalies) == (iso_time(START + 4 * MINUTE), 2)
    assert kinds(sent(of, (5, 10.0))) == [("resolved", "resolved-r3", "")]


def test_beyond_the_lateness_nothing_is_corrected() -> None:
    of = watched()
    sent(of, (0, 500.0), (1, 10.0))
    assert kinds(sent(of, (4, 10.0), (0, 10.0))) == []
    assert (of.counts.revised, of.counts.late) == (0, 1)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_late_points_lead_to_what_those_in_time_say(seed: int) -> None:
    """What stands in the end is what the same points, each in its time, would have said."""
    rng = np.random.default_rng(seed)
    points: list[Record] = list(normal_points(200, seed=seed % 1000))
    for at in np.flatnonzero(rng.random(200) < 0.08).tolist():
        if at > 40:
            points[at] = ("a", T0 + at * MINUTE, float(rng.choice([60.0, 400.0, 5000.0])))
    keys = np.arange(200) + np.where(rng.random(200) < 0.2, rng.uniform(0, 4, 200), 0.0)
    keys[:30] = np.arange(30)
    keys[180:] = np.arange(180, 200)  # who looks at the interval again has found it by the end
    late = run(detector(config(lateness_ms=3 * MINUTE)), [points[i] for i in np.argsort(keys, kind="stable")])
    assert not late.counts.too_late
    in_time = run(detector(config(lateness_ms=3 * MINUTE)), points)
    stands: dict[str, dict[str, Any]] = {}
    for event in late.data:
        data = event["data"]
        if "supersedes" in data:
            del stands[data["supersedes"]]
        stands[event["id"]] = event
        if event["type"] == events.TYPE_RETRACTED:
            stands = {key: one for key, one in stands.items() if one["data"]["incident"] != data["incident"]}

    def of(event: dict[str, Any]) -> tuple[str, ...]:
        data = event["data"]
        return event["time"], data["incident"], data["severity"], data["opened"], data.get("reason", "")

    true = {of(event) for event in in_time.data}
    assert true <= {of(event) for event in stands.values()}
    assert all(event["type"] == events.TYPE_CORRECTED for event in stands.values() if of(event) not in true)
