"""Everything breaks at once, briefly; `python -m tests.faults` does it for minutes."""

from __future__ import annotations

from pathlib import Path

import pytest

from stream.events import TYPE_SILENT, SilenceData, decode, encode, make_event
from tests.faults.chaos import Chaos
from tests.faults.judge import Refused, judge_events, judge_rejects
from tests.faults.schedule import BROKER, KILL, STORE, Plan, schedule
from tests.servers import why_no_kafka


@pytest.mark.kafka
async def test_kills_restarts_and_cut_links_change_no_event(tmp_path: Path) -> None:
    if reason := why_no_kafka():
        pytest.skip(reason)
    plan = Plan(seed=11, kills=2, server_faults=4, link_faults=2, points=8_000, series=16, workers=2, static=2)
    report = await Chaos(plan, tmp_path).run()
    assert report, report.table()
    assert report.events.expected > 50 and report.rejects.expected > 100
    assert report.faults[KILL] == 2 and report.faults.total() == 8
    assert sum(count for kind, count in report.faults.items() if kind in BROKER) == 1


async def test_kills_and_a_lost_store_change_no_event_on_the_embedded_broker(tmp_path: Path) -> None:
    plan = Plan(
        seed=12, kills=1, server_faults=2, link_faults=1, points=4_000, series=10, workers=2, static=2, real=False
    )
    report = await Chaos(plan, tmp_path).run()
    assert report, report.table()
    assert report.events.expected > 20 and report.rejects.expected > 50
    assert report.faults[KILL] == 1


def test_a_seed_gives_one_schedule_with_every_kind_in_it() -> None:
    plan = Plan(seed=5, kills=200, server_faults=50, link_faults=50)
    faults = schedule(plan)
    assert faults == schedule(plan) != schedule(Plan(seed=6, kills=200, server_faults=50, link_faults=50))
    kinds = {fault.kind for fault in faults}
    assert kinds >= {KILL, *BROKER, *STORE} and len(faults) == 300
    assert sum(fault.kind == KILL for fault in faults) == 200
    assert [fault.place for fault in faults] == sorted(fault.place for fault in faults)
    assert not {f.kind for f in schedule(Plan(server_faults=50, real=False))} & set(BROKER)


def test_the_judge_tells_what_is_wrong() -> None:
    def event(name: str, number: int, last_seen: str = "x") -> bytes:
        data = SilenceData(kpi=name, last_seen=last_seen, interval_s=1.0, silent_after_s=2.0, basis="event_time")
        return encode(make_event(TYPE_SILENT, f"{name}-{number}", number, data))

    a, b = [event("a", n) for n in range(3)], [event("b", n) for n in range(2)]
    should = [decode(one) for one in (*a, *b)]
    assert judge_events([b[0], *a, b[1]], should), "between two series there is no order"
    assert judge_events([*a, b[1]], should).lost == ["b-0"]
    assert judge_events([*a, *b, a[1]], should).doubled == ["a-1"]
    assert judge_events([a[0], a[2], a[1], *b], should).disordered == ["a-2", "a-1"]
    assert judge_events([*a, b[0], event("b", 1, "y")], should).different == ["b-1"]
    assert judge_events([*a, *b, event("c", 1)], should).different == ["c-1"]

    refused = {(0, 7): "empty", (0, 9): "not_json"}
    one, other = Refused(1, 0, 7, "empty"), Refused(1, 0, 9, "not_json")
    assert judge_rejects([one, other], refused)
    assert judge_rejects([one], refused).lost == ["(0, 9)"]
    assert judge_rejects([one, other, one], refused).doubled == ["(0, 7)"]
    assert judge_rejects([other, one], refused).disordered == ["(0, 7)"]
    assert judge_rejects([one, Refused(1, 0, 9, "empty")], refused).different == ["(0, 9)"]
