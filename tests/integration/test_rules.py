"""Rules on real servers: routing, reloads by content that lose no state, and live runs that are their back-tests."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from stream.events import TYPE_OPENED, Event, EventData, iso_time
from stream.points import Points
from stream.replay import replay
from stream.worker import Worker
from tests.e2e.program import tocsin
from tests.live import (
    backtested,
    digest,
    environment_for,
    published,
    read_all,
    sample_points,
    settings_for,
    until,
    until_committed,
    working,
)

POINTS = sample_points(8)
SOON = {"TOCSIN_RULES_POLL_S": "0.1", "TOCSIN_KAFKA__MAX_POLL_RECORDS": "500"}

ALL_KINDS = """
rules:
  - match: "*requests*"
    name: traffic
    interval: 5m
    false_alarms: 1 per day
    direction: low
    silent_after: 4
    open_after: 2
    warmup: 12h
    topic: [{further}, {further}.too]
    labels: {{team: payments}}
  - match: "*cpu*"
    name: machines
    drift: 20
    lateness: 30m
    least_deviation: 1 %
    recover_after: 5
    recover_ratio: 0.8
    cooldown: 2h
    maintenance: [weekend]
    silent_after: 6
  - match: "*"
    name: rest
    lateness: 30m
    late_points: wait
    silent_after: 3
maintenance:
  weekend: {{days: [sat, sun], from: "00:00", to: "24:00"}}
"""


def late(points: Points) -> Points:
    """Return the points with some a little later than they belong."""
    random = np.random.default_rng(1)
    order = np.argsort(np.arange(len(points.value)) + random.integers(0, 12, len(points.value)), kind="stable")
    return part(points, order)


def part(points: Points, which: slice | np.ndarray[tuple[int], np.dtype[np.int64]]) -> Points:
    columns = (points.timestamp_ms[which], points.kpi[which], points.value[which], points.label[which])
    return Points(points.names, *columns)


async def test_live_equals_backtest_under_rules_of_all_kinds(
    broker: str, redis_url: str, unique: str, tmp_path: Path
) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text(ALL_KINDS.format(further=f"further.{unique}"))
    settings = settings_for(broker, redis_url, unique, TOCSIN_RULES=str(rules), TOCSIN_KAFKA__PARTITIONS="2")
    points = late(sample_points(5))
    half = len(points.value) // 2
    async with working(settings):
        await replay(part(points, slice(half)), settings.kafka)
        await until_committed(settings.kafka, half)
    async with working(settings):
        await replay(part(points, slice(half, None)), settings.kafka)
        await until_committed(settings.kafka, len(points.value))
    events, expected = await published(settings.kafka), backtested(points, settings)
    kinds = {event.type.rpartition(".")[2] for event in expected}
    assert {"opened", "resolved", "silent", "resumed"} <= kinds and kinds & {"corrected", "retracted"}
    assert {event.data.rule for event in expected} == {"traffic", "machines", "rest"}
    assert digest(events) == digest(expected)

    routed = [event for event in expected if event.data.rule == "traffic"]
    assert routed and all(event.data.labels == {"team": "payments"} for event in routed)
    for topic in (f"further.{unique}", f"further.{unique}.too"):
        records = await read_all(settings.kafka, topic)
        own = [record for record in await read_all(settings.kafka, settings.kafka.anomalies_topic)]
        assert [record.value for record in records] == [
            record.value for record in own if b'"rule":"traffic"' in record.value
        ]
        assert {record.key for record in records} == {event.subject.encode() for event in routed}
        assert all(("content-type", b"application/cloudevents+json; charset=UTF-8") in r.headers for r in records)


# -- reloads --------------------------------------------------------------------------------------------------------


def rules_with(**fields: str) -> str:
    return "rules:\n  - match: '*'\n" + "".join(f"    {name}: {value}\n" for name, value in fields.items())


def split_in_an_incident(events: list[Event], points: Points) -> tuple[int, str]:
    """Return the index of a point in the middle of an incident in the second half, and the incident."""
    half = iso_time(int(points.timestamp_ms[len(points.value) // 2]))
    for event in events:
        data = event.data
        if isinstance(data, EventData) and data.reason and data.opened > half and data.duration_s > 1000:
            opened = next(e for e in events if e.type == TYPE_OPENED and e.id == f"{data.incident}-opened")
            times = [iso_time(int(t)) for t in points.timestamp_ms.tolist()]
            return max(i for i, time in enumerate(times) if time <= opened.time) + 1, data.incident
    raise AssertionError("no incident is long enough")


def thresholds(worker: Worker) -> dict[str, tuple[float, int]]:
    found = {}
    for partition in worker.partitions.values():
        detector = partition.detector
        for slot, name in enumerate(detector.index.names):
            group = detector.groups[int(detector.group_of[slot])]
            packed = group.judge.threshold.pack(np.array([int(detector.row_of[slot])]))
            found[name] = (float(packed["t"][0]), int(packed["n"][0]))
    return found


async def taken_over(worker: Worker, caplog: pytest.LogCaptureFixture, times: int) -> None:
    await until(lambda: caplog.text.count("new rules are in force") == times, "the rules are taken over")


async def test_a_reload_takes_effect_and_loses_no_state(
    broker: str, redis_url: str, unique: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    rules, further = tmp_path / "rules.yaml", f"further.{unique}"
    rules.write_text(rules_with(name="before"))
    settings = settings_for(broker, redis_url, unique, TOCSIN_RULES=str(rules), **SOON)
    before = backtested(POINTS, settings)
    cut, incident = split_in_an_incident(before, POINTS)
    total = len(POINTS.value)
    async with working(settings) as worker:
        await replay(part(POINTS, slice(cut)), settings.kafka)
        await until_committed(settings.kafka, cut)
        kept, scored = thresholds(worker), worker.counts().scored
        first = await published(settings.kafka)
        assert digest(first) == digest(backtested(part(POINTS, slice(cut)), settings))
        assert any(e.id == f"{incident}-opened" for e in first) and not any(
            e.id == f"{incident}-resolved" for e in first
        )

        rules.write_text(rules_with(name="after", q="1e-3", topic=further, labels="{team: payments}"))
        await taken_over(worker, caplog, 1)
        assert thresholds(worker) == kept and len(kept) == len(POINTS.names)
        await replay(part(POINTS, slice(cut, None)), settings.kafka)
        await until_committed(settings.kafka, total)
        counts = worker.counts()
    events = await published(settings.kafka)
    after = [event for event in events if event.data.rule == "after"]
    assert {event.data.rule for event in events} == {"before", "after"}
    assert any(event.id == f"{incident}-resolved" for event in after), "what was open stays open, and ends"
    assert counts.points == total and counts.scored - scored > (total - cut) * 0.97, "no warm-up"
    assert all(event.data.labels == {"team": "payments"} for event in after)
    again = [record.value for record in await read_all(settings.kafka, further)]
    assert len(again) == len(after) > 0
    under_old = {event.id: event.data for event in before if isinstance(event.data, EventData)}
    both = [
        (event.data.threshold, under_old[event.id].threshold)
        for event in after
        if isinstance(event.data, EventData) and event.id in under_old
    ]
    assert len(both) > 5 and all(now < then for now, then in both), "ten times the risk: lower thresholds"
    assert len({event.id for event in events}) == len(events)


async def test_wrong_rules_change_nothing_and_are_told_of_once(
    embedded_broker: str, redis_url: str, unique: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    rules = tmp_path / "rules.yaml"
    rules.write_text(rules_with(name="first"))
    settings = settings_for(embedded_broker, redis_url, unique, TOCSIN_RULES=str(rules), **SOON)

    def problems() -> list[str]:
        return [record.getMessage() for record in caplog.records if "the rules that were in force stay" in record.msg]

    async with working(settings) as worker:
        made = worker.make_detector
        for wrong, said in (
            ("rules:\n  - match: '*'\n    fals_alarms: 1 per week\n", "rules.yaml:3: rules[0].fals_alarms"),
            (rules_with(name="x", topic=settings.kafka.points_topic), "rules.yaml:4: rules[0].topic"),
        ):
            count = len(problems())
            rules.write_text(wrong)
            await until(partial(more_than, problems, count), said)
            await asyncio.sleep(0.5)
            assert len(problems()) == count + 1 and said in problems()[-1]
            assert worker.make_detector is made
        rules.touch()
        rules.write_text(rules_with(name="first"))
        await asyncio.sleep(0.5)
        rules.write_text(rules_with(name="second"))
        await until(lambda: [rule.name for rule in worker.make_detector().rules] == ["second"], "good ones are taken")
        assert len(problems()) == 2


def more_than(problems: Callable[[], list[str]], count: int) -> bool:
    return len(problems()) > count


async def test_a_maintenance_window_and_ignored_series_come_with_a_reload(
    embedded_broker: str, redis_url: str, unique: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    rules = tmp_path / "rules.yaml"
    rules.write_text(rules_with(name="all"))
    settings = settings_for(embedded_broker, redis_url, unique, TOCSIN_RULES=str(rules), **SOON)
    cut, incident = split_in_an_incident(backtested(POINTS, settings), POINTS)
    begin, end = (iso_time(int(POINTS.timestamp_ms[at])) for at in (cut, -1))
    async with working(settings) as worker:
        await replay(part(POINTS, slice(cut)), settings.kafka)
        await until_committed(settings.kafka, cut)
        works = f"maintenance:\n  works: {{start: {begin}, end: {end[:4]}-12-31T00:00Z}}\n"
        rules.write_text(rules_with(maintenance="[works]") + works)
        await taken_over(worker, caplog, 1)
        await replay(part(POINTS, slice(cut, None)), settings.kafka)
        await until_committed(settings.kafka, len(POINTS.value))
        after = [event for event in await published(settings.kafka) if event.time >= begin]
        assert not [event for event in after if event.type == TYPE_OPENED]
        assert [event for event in after if event.id == f"{incident}-resolved"], "what was told is told to its end"

        rules.write_text("rules:\n  - match: '*'\n    watch: false\n")
        await taken_over(worker, caplog, 2)
        await replay(part(POINTS, slice(50)), settings.kafka)
        await until_committed(settings.kafka, len(POINTS.value) + 50)
        assert worker.counts().unwatched >= 45


# -- at start -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [["check"], ["check", "a"], ["backtest", "a.csv"]])
def test_a_checkpoint_that_is_not_there_is_told_with_its_line(tmp_path: Path, command: list[str]) -> None:
    """By what looks and ends; a service goes on with the general one, and says the same (test_models)."""
    rules = tmp_path / "rules.yaml"
    rules.write_text("rules:\n  - match: '*'\n    model: nope\n")
    (tmp_path / "a.csv").write_text("timestamp,value\n" + "".join(f"{60 * k},{k % 7}\n" for k in range(100)))
    more = environment_for("127.0.0.1:1", "redis://127.0.0.1:1/0", "x")
    done = tocsin(tmp_path, *command, "--rules", rules, more=more, code=2)
    assert f"{rules}:2: rule '*': model: no checkpoint 'nope'" in done.stderr


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "does not exist"),
        (
            "rules:\n  - match: '*'\n    warmupp: 1d\n",
            ":3: rules[0].warmupp: is no field of a rule; did you mean w",
        ),
        ("rules:\n  - match: '*'\n    topic: kpi.points\n", ":3: rules[0].topic"),
    ],
)
def test_wrong_rules_at_start_are_told_with_their_line(tmp_path: Path, text: str | None, said: str) -> None:
    rules = tmp_path / "rules.yaml"
    if text is not None:
        rules.write_text(text)
    more = environment_for("127.0.0.1:1", "redis://127.0.0.1:1/0", "x", TOCSIN_KAFKA__POINTS_TOPIC="kpi.points")
    for command in (["serve"], ["check"], ["check", "a"]):
        done = tocsin(tmp_path, *command, "--rules", rules, more=more, code=2)
        assert done.stdout == ""
        assert f"tocsin: {rules}{said}" in done.stderr or f"tocsin: {rules}: {said}" in done.stderr


@pytest.fixture(autouse=True)
def _quiet_logs(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("WARNING")
