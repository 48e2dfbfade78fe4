"""A partition without its servers: what it judges when, and what it keeps."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping

import numpy as np
import pytest
from aiokafka import ConsumerRecord, TopicPartition

from stream.detector import Detector
from stream.kafka import Clock, clock_metadata
from stream.partition import Partition
from stream.policy import Policy, Rule
from stream.results import DetectorConfig, Served
from stream.settings import load_settings
from stream.store import CLOCK_FIELD, Saved, Store
from tests.helpers import MINUTE, Persistence
from tests.live import until

AT = TopicPartition("kpi.points", 0)
HOUR = 60 * MINUTE
NOW = 1_767_571_200_000


def make(*rules: Rule) -> Detector:
    given = rules or (Rule(policy=Policy(interval_ms=MINUTE, silent_after=5)),)
    return Detector(
        DetectorConfig(), given, [Served("persistence@1", Persistence(4)) if rule.watch else None for rule in given]
    )


def partition(*rules: Rule, **state: object) -> Partition:
    one = Partition(AT, load_settings({}), lambda: make(*rules), Store("redis://127.0.0.1:1/0"))
    for name, value in state.items():
        setattr(one, name, value)
    return one


def record(offset: int, kpi: str, minute: int, arrived_ms: int) -> ConsumerRecord:
    value = json.dumps({"kpi": kpi, "timestamp": NOW + minute * MINUTE, "value": 1.0}).encode()
    return ConsumerRecord(AT.topic, 0, offset, arrived_ms, 0, kpi.encode(), value, None, len(kpi), len(value), ())


def said(one: Partition) -> list[str]:
    return [f"{event.subject} {event.type.rsplit('.')[-1]}" for event, _ in one._pending.events]


def silent(one: Partition) -> list[str]:
    index = one.detector.index
    return [index.names[slot] for slot in np.flatnonzero(one.detector.silence.silent[: len(index.names)])]


async def test_it_judges_by_the_clock_and_says_it_once() -> None:
    one = partition()
    await one.accept([record(0, "a", 0, NOW), record(1, "b", 0, NOW + 4 * MINUTE)])
    one.judge_silence(NOW + 6 * MINUTE)
    one.judge_silence(NOW + 6 * MINUTE + 1)
    assert said(one) == ["a silent"] and one.clock == Clock(NOW + 6 * MINUTE + 1, 2)
    one.judge_silence(NOW)
    assert one.clock.ms == NOW + 6 * MINUTE + 1, "it never goes back"


async def test_a_muted_stretch_is_judged_at_its_place_and_no_later() -> None:
    """Before the kill: `a` was silent at offset 1; `b` came behind, bearing an old time, and was not judged yet."""
    clock = Clock(NOW + 6 * MINUTE, 1)
    log = [record(0, "a", 0, NOW), record(1, "b", 0, NOW), record(2, "c", 0, NOW + 6 * MINUTE)]
    for cuts in ([log], [log[:1], log[1:]], [log[:2], log[2:]], [[one] for one in log]):
        one = partition(muted_until=2, settled=2, clock=clock, _repeat=clock)
        one.judge_silence(NOW + HOUR)
        assert one.clock == clock, "not before its place is reached"
        for batch in cuts:
            await one.accept(batch)
        assert silent(one) == ["a"] and said(one) == []
        one.judge_silence(NOW + 6 * MINUTE + 1)
        assert said(one) == ["b silent"], "what was said is not said again, what was not is not lost"


async def test_a_place_between_two_records_is_reached_with_the_next() -> None:
    """Markers of transactions lie there, and are never handed out."""
    clock = Clock(NOW + 6 * MINUTE, 2)
    one = partition(muted_until=4, settled=4, clock=clock, _repeat=clock)
    await one.accept([record(0, "a", 0, NOW)])
    assert silent(one) == []
    await one.accept([record(3, "b", 0, NOW + 6 * MINUTE)])
    assert silent(one) == ["a"] and said(one) == []


async def test_who_falls_silent_by_the_point_of_another_is_saved() -> None:
    one = partition()
    await one.accept([record(0, "a", 0, NOW + HOUR)])
    one._dirty[:] = False
    await one.accept([record(1, "b", 9, NOW + HOUR)])
    assert said(one) == ["a silent"] and one._dirty[one.detector.index["a"]]


class Saves(Store):
    """Keeps what would be saved."""

    def __init__(self) -> None:
        super().__init__("redis://127.0.0.1:1/0")
        self.saved: list[tuple[int, Mapping[bytes, bytes]]] = []

    async def save(
        self, group: str, topic: str, partition: int, offset: int, blobs: Mapping[bytes, bytes], **_: object
    ) -> Saved:
        self.saved.append((offset, blobs))
        return Saved.DONE


async def test_a_state_of_the_muted_stretch_claims_no_clock_that_is_not_in_it() -> None:
    clock, store = Clock(NOW + 6 * MINUTE, 2), Saves()
    one = partition(muted_until=3, settled=3, clock=clock, _repeat=clock, store=store)
    await one.accept([record(0, "a", 0, NOW)])
    await one._flush()
    await one.accept([record(1, "b", 0, NOW)])
    await one._flush()
    await one._flush()
    assert [(offset, blobs[CLOCK_FIELD]) for offset, blobs in store.saved] == [(1, b"0"), (2, b"%d" % clock.ms)]
    await one.accept([record(2, "b", 1, NOW + MINUTE)])
    one.judge_silence(NOW + HOUR)
    assert said(one) == ["b silent"]
    one._told, one.settled = one._said, one.position
    await one._flush()
    assert store.saved[-1][1][CLOCK_FIELD] == b"%d" % (NOW + HOUR)


def test_the_clock_is_written_as_it_is_read() -> None:
    assert clock_metadata(Clock(17, 4)) == "clock_ms=17;offset=4;"


# -- another detector ---------------------------------------------------------------------------------------------


async def test_another_detector_keeps_what_fits() -> None:
    one = partition()
    await one.accept([record(n, name, n // 3, NOW + HOUR) for n, name in enumerate(["a", "b", "x.c"] * 20)])
    before = one.detector
    assert before.counts.points == 60
    await one.change_detector(
        make(Rule(("x.*",), watch=False), Rule(policy=Policy(interval_ms=MINUTE, silent_after=9)))
    )
    assert one.detector is not before and one.detector.counts.points == 60
    assert one.detector.watched(np.arange(3, dtype=np.int32)).tolist() == [True, True, False]
    row, old = one.detector.row_of[one.detector.index["a"]], before.row_of[before.index["a"]]
    assert one.detector.groups[0].windows.newest[row] == before.groups[0].windows.newest[old]
    assert one.detector.silence.span_ms[one.detector.index["a"]] == 9 * MINUTE
    assert one._dirty.all(), "all of it is written"
    await one.accept([record(60, "x.c", 20, NOW + HOUR), record(61, "a", 20, NOW + HOUR)])
    assert one.detector.counts.unwatched == 1


async def test_a_flush_that_fails_after_the_detector_has_changed_breaks_nothing() -> None:
    one = partition(Rule(("x.*",), watch=False), Rule(policy=Policy(interval_ms=MINUTE)))
    await one.accept([record(n, name, 0, NOW) for n, name in enumerate([*(f"x.{n}" for n in range(200)), "a"])])
    flushing = asyncio.create_task(one._flush())
    await until(lambda: not one._dirty.any(), "packed, and waiting for what was taken in to be settled")
    await one.change_detector(make())
    assert len(one._dirty) < 200, "who was not watched has no place any more"
    flushing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await flushing
    assert one._dirty.all()


async def test_a_flush_waits_for_what_the_clock_has_said() -> None:
    one = partition(settled=1, flushed=0)
    await one.accept([record(0, "a", 0, NOW)])
    one.judge_silence(NOW + HOUR)
    flushing = asyncio.create_task(one._flush())
    await until(lambda: not one._dirty.any(), "packed")
    for _ in range(20):
        await asyncio.sleep(0.005)
    assert not flushing.done(), "the record is settled, the silence behind it is not"
    flushing.cancel()
    await asyncio.wait({flushing})
    assert one._dirty[one.detector.index["a"]], "it is written with the next"
