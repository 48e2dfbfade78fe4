"""Models that change while points are judged: swaps, shadows, and checkpoints that cannot be used."""

from __future__ import annotations

import asyncio
import logging
import shutil
from pathlib import Path

import psutil
import pytest

from models import repository
from models.checkpoint import CONFIG, WEIGHTS, Bundle
from stream import events
from stream.backtest import run
from stream.events import EventData
from stream.replay import replay
from stream.service import detector_factory
from stream.worker import Worker
from tests.live import (
    backtested,
    digest,
    published,
    read_all,
    sample_points,
    settings_for,
    until,
    until_committed,
    working,
)

DAYS = 8
POINTS = sample_points(DAYS)
SWAPS = 100


def versions(root: Path, count: int = 2) -> None:
    """Make versions of a model `m`: the bundled one, each a little less sure of itself than the one before."""
    general = repository.load(repository.bundled_root(), "deepant")
    for k in range(count):
        model = type(general.model)(
            general.model.config,
            general.model.raw | {"out.bias": general.model.raw["out.bias"] + 0.01 * k},
            general.model.constants,
        )
        repository.save(root, "m", Bundle(model, general.calibrations, None, general.training))
    repository.promote(root, "m@1")


def refs(worker: Worker) -> set[str]:
    return {group.served.ref for partition in worker.partitions.values() for group in partition.detector.groups}


async def test_a_hundred_swaps_under_load_miss_no_score(
    broker: str, redis_url: str, unique: str, tmp_path: Path
) -> None:
    versions(tmp_path)
    settings = settings_for(
        broker,
        redis_url,
        unique,
        TOCSIN_CHECKPOINTS=str(tmp_path),
        TOCSIN_CHECKPOINT="m",
        TOCSIN_MODELS_POLL_S="0.02",
        TOCSIN_KAFKA__MAX_POLL_RECORDS="500",
    )
    alone = detector_factory(settings)()
    for _ in run(alone, POINTS):
        pass
    process, rss = psutil.Process(), list[int]()
    async with working(settings) as worker:
        sending = asyncio.create_task(replay(POINTS, settings.kafka, speed=DAYS * 86_400 / 20))
        for swap in range(SWAPS):
            wanted = f"m@{2 - swap % 2}"
            await asyncio.to_thread(repository.promote, tmp_path, wanted)
            await until(lambda wanted=wanted: refs(worker) == {wanted}, f"{wanted} in force")
            rss.append(process.memory_info().rss)
        await sending
        await until_committed(settings.kafka, len(POINTS.value))
        counts = worker.counts()
    assert (counts.points, counts.scored) == (alone.counts.points, alone.counts.scored)
    assert counts.too_late == counts.late == 0
    assert rss[-1] < 1.05 * rss[SWAPS // 10], f"from {rss[SWAPS // 10]:,} to {rss[-1]:,} bytes"
    said = await published(settings.kafka)
    assert {e.data.model for e in said if isinstance(e.data, EventData)} == {"m@1", "m@2"}
    assert len({e.id for e in said}) == len(said)


async def test_what_a_shadow_says_alerts_nobody(broker: str, redis_url: str, unique: str, tmp_path: Path) -> None:
    versions(tmp_path)
    rules = tmp_path / "rules.yaml"
    rules.write_text(f"rules:\n  - match: '*'\n    model: m@1\n    shadow: m@2\n    topic: further.{unique}\n")
    settings = settings_for(
        broker,
        redis_url,
        unique,
        TOCSIN_CHECKPOINTS=str(tmp_path),
        TOCSIN_RULES=str(rules),
        TOCSIN_KAFKA__SHADOW_TOPIC=f"shadow.{unique}",
    )
    half = len(POINTS.value) // 2
    for part in (slice(half), slice(half, None)):  # with a restart between them
        async with working(settings):
            await replay(POINTS.take(part), settings.kafka)
            await until_committed(settings.kafka, len(POINTS.value) if part.start else half)
    said = await published(settings.kafka)
    assert digest(said) == digest(backtested(POINTS, settings))
    assert not any(isinstance(e.data, EventData) and e.data.shadow for e in said)
    beside = [events.decode(record.value) for record in await read_all(settings.kafka, f"shadow.{unique}")]
    assert beside and all(isinstance(e.data, EventData) and e.data.shadow for e in beside)
    assert {e.data.model for e in beside if isinstance(e.data, EventData)} == {"m@2"}
    further = await read_all(settings.kafka, f"further.{unique}")
    assert len(further) == len(said)


async def test_a_damaged_version_changes_nothing_and_a_whole_one_is_taken(
    broker: str, redis_url: str, unique: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    versions(tmp_path, 1)
    settings = settings_for(
        broker,
        redis_url,
        unique,
        TOCSIN_CHECKPOINTS=str(tmp_path),
        TOCSIN_CHECKPOINT="m@canary",
        TOCSIN_MODELS_POLL_S="0.05",
    )
    repository.promote(tmp_path, "m@1", "canary")
    with caplog.at_level(logging.INFO):
        async with working(settings) as worker:
            shutil.copytree(tmp_path / "m" / "1", tmp_path / "m" / "2")
            (tmp_path / "m" / "2" / WEIGHTS).write_bytes(b"\x80\x04pickled")
            (tmp_path / "m" / repository.LABELS).write_text('{"canary": [2, 1]}')
            await until(lambda: "cannot be used" in caplog.text, "the damage is told of")
            assert refs(worker) == {"m@1"}
            assert f"{tmp_path / 'm' / '2' / WEIGHTS}: its SHA-256" in caplog.text
            shutil.copytree(tmp_path / "m" / "1", tmp_path / "m" / "3")
            repository.promote(tmp_path, "m@3", "canary")
            await until(lambda: refs(worker) == {"m@3"}, "the whole version in force")
    assert caplog.text.count("cannot be used") == 1, "it is told once"


async def test_a_rule_whose_checkpoint_is_gone_is_watched_by_the_general_one(
    broker: str, redis_url: str, unique: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    versions(tmp_path, 1)
    (tmp_path / "m" / "1" / CONFIG).write_text("{}")
    rules = tmp_path / "rules.yaml"
    rules.write_text("rules:\n  - {match: '*cpu*', model: gone}\n  - {match: '*', model: m}\n")
    settings = settings_for(
        broker,
        redis_url,
        unique,
        TOCSIN_CHECKPOINTS=str(tmp_path),
        TOCSIN_RULES=str(rules),
        TOCSIN_KAFKA__PARTITIONS="1",
    )
    with caplog.at_level(logging.INFO):
        async with working(settings) as worker:
            await replay(POINTS, settings.kafka)
            await until_committed(settings.kafka, len(POINTS.value))
            assert worker.counts().scored > 0.9 * len(POINTS.value)
            assert refs(worker) == {"deepant@1"}
    where = f"{rules}:2: rule '*cpu*': model: "
    assert f"{where}model gone cannot be used, deepant@1 goes on in its place: no checkpoint 'gone'" in caplog.text
    assert "model m cannot be used, deepant@1 goes on in its place" in caplog.text
