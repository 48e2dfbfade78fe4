"""A crash at each step between a record and the state that is kept of it: nothing is lost, nothing is there twice."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from pathlib import Path
from typing import get_args

import pytest

from stream import steps
from stream.events import decode
from stream.replay import replay
from stream.settings import Settings
from stream.subscribe import subscribe
from tests import forked
from tests.faults import dying
from tests.live import (
    DEADLINE_S,
    backtested,
    digest,
    environment_for,
    make_topics,
    published,
    read_all,
    sample_points,
    settings_for,
    until_committed,
    working,
)

POINTS = sample_points(days=3)
MORE = {
    "TOCSIN_REDIS__FLUSH_INTERVAL_S": "0.1",
    "TOCSIN_KAFKA__MAX_POLL_RECORDS": "100",  # many small steps
    "TOCSIN_KAFKA__INSTANCE": "one",  # a static member is back at once
}


async def crash(settings: Settings, environment: dict[str, str], directory: Path, step: str, number: int) -> None:
    """Run the service until it dies at a step."""
    log = directory / "log"
    process = forked.start(
        dying.run, [step, str(number)], directory=directory, environment=os.environ | environment, out=log, err=log
    )
    await asyncio.to_thread(process.join, DEADLINE_S)
    process.kill()
    assert process.exitcode == -signal.SIGKILL, log.read_text()
    assert await until_committed(settings.kafka, 0) < len(POINTS.value), "it died too late to prove anything"


@pytest.mark.parametrize("number", [1, 4])
@pytest.mark.parametrize("step", get_args(steps.Step))
async def test_a_crash_at_a_step_changes_no_byte(
    broker: str, redis_url: str, unique: str, tmp_path: Path, step: str, number: int
) -> None:
    environment = environment_for(broker, redis_url, unique, **MORE)
    settings = settings_for(broker, redis_url, unique, **MORE)
    await make_topics(settings.kafka)
    await replay(POINTS, settings.kafka)
    await crash(settings, dict(environment), tmp_path, step, number)
    async with working(settings):
        await until_committed(settings.kafka, len(POINTS.value))
    events = await published(settings.kafka)
    assert len({event.id for event in events}) == len(events), "an event was published twice"
    assert digest(events) == digest(backtested(POINTS, settings))
    assert await read_all(settings.kafka, settings.kafka.rejects_topic) == []


async def test_at_least_once_repeats_what_bears_the_same_id_and_a_subscriber_drops_it(
    broker: str, redis_url: str, unique: str, tmp_path: Path
) -> None:
    more = MORE | {"TOCSIN_KAFKA__DELIVERY": "at_least_once"}
    environment, settings = (
        environment_for(broker, redis_url, unique, **more),
        settings_for(broker, redis_url, unique, **more),
    )
    await make_topics(settings.kafka)
    await replay(POINTS, settings.kafka)
    for _ in range(3):
        await crash(settings, dict(environment), tmp_path, "produced", 4)  # outputs are there, the offset is not
    async with working(settings):
        await until_committed(settings.kafka, len(POINTS.value))
    expected = backtested(POINTS, settings)
    every = [decode(record.value) for record in await read_all(settings.kafka, settings.kafka.anomalies_topic)]
    ids = [event.id for event in every]
    assert set(ids) == {event.id for event in expected}, "none is lost"
    assert len(ids) > len(set(ids)), "else the crashes proved nothing"
    once = []
    async with asyncio.timeout(DEADLINE_S), contextlib.aclosing(subscribe(settings.kafka, start="earliest")) as events:
        async for event in events:
            once.append(event)
            if len(once) == len(expected):
                break
    assert {event.id for event in once} == set(ids)
