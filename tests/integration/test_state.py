"""tocsin state, on real servers: what people change of the state changes no event, or is refused with the reason."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from stream import state, statefile
from stream.blobs import VERSION
from stream.commands import app
from stream.errors import ConfigError
from stream.pointslog import Log, read_log
from stream.replay import replay
from stream.service import detector_factory
from stream.settings import Settings
from stream.state import Refusal
from stream.statefile import Origin, Section
from stream.store import PartitionState, Store
from stream.topics import ensure_topics
from tests.e2e.program import lines_of
from tests.live import (
    backtested,
    digest,
    environment_for,
    published,
    sample_points,
    settings_for,
    until_committed,
    working,
)

POINTS = sample_points(3)
pytestmark = pytest.mark.usefixtures("logs_as_before")  # of commands that run in this process
HALF = len(POINTS) // 2


@dataclass
class Site:
    """An installation whose service has stopped half way."""

    settings: Settings
    store: Store

    async def log(self) -> Log:
        return await read_log(self.settings.kafka)

    def at(self, partition: int) -> tuple[str, str, int]:
        return self.settings.kafka.group, self.settings.kafka.points_topic, partition

    async def partition_of(self, name: str) -> int:
        (found,) = await state.find_series(self.store, self.settings, await self.log(), name)
        return found.partition

    async def blobs(self, partition: int) -> PartitionState | None:
        return await self.store.load(*self.at(partition))

    async def exported(self, name: str | None = None, partition: int | None = None) -> tuple[Origin, list[Section]]:
        """What a file holds, written and read."""
        kafka, log, file = self.settings.kafka, await self.log(), io.BytesIO()
        sections = await state.export(self.store, kafka, log, name=name, partition=partition)
        statefile.write(
            file, Origin(1, log.cluster, kafka.group, kafka.points_topic, len(log.parts), "2026-01-05"), sections
        )
        file.seek(0)
        return statefile.read(file, "f")

    async def imported(self, origin: Origin, sections: list[Section], forced: list[str] | None = None) -> state.Plan:
        """Import; what it was done in spite of goes to `forced`."""
        kafka, make = self.settings.kafka, detector_factory(self.settings)
        plan = await state.plan_import(self.store, kafka, await self.log(), origin, sections, make)
        await state.carry_out(self.store, kafka, plan, forced=None if forced is None else forced.append)
        return plan


async def stopped(broker: str, redis_url: str, unique: str) -> Site:
    """Return an installation that has worked half way."""
    settings = settings_for(broker, redis_url, unique, TOCSIN_WARMUP_H="6")
    await ensure_topics(settings.kafka, {settings.kafka.points_topic: settings.kafka.partitions})
    await send(settings, 0, HALF)
    await serve(settings, HALF)
    return Site(settings, Store.of(settings.redis))


async def send(settings: Settings, first: int, last: int = len(POINTS)) -> None:
    await replay(POINTS.take(np.arange(len(POINTS)) < last), settings.kafka, first=first)


async def serve(settings: Settings, until_offset: int) -> None:
    """Work until so much is committed, then stop."""
    async with working(settings):
        await until_committed(settings.kafka, until_offset)


@pytest.fixture
async def site(embedded_broker: str, redis_url: str, unique: str) -> AsyncIterator[Site]:
    made = await stopped(embedded_broker, redis_url, unique)
    async with made.store:
        yield made


async def ends_as_if_nothing_had_been(site: Site) -> None:
    await send(site.settings, HALF)
    await serve(site.settings, len(POINTS))
    assert digest(await published(site.settings.kafka)) == digest(backtested(POINTS, site.settings))


class Commands:
    """tocsin state, in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    async def __call__(self, *arguments: str) -> str:
        await asyncio.to_thread(app, ["state", *arguments], standalone_mode=False)
        return self._capsys.readouterr().out


async def test_exported_lost_and_imported_again_changes_no_event(
    broker: str,
    redis_url: str,
    unique: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    site, tocsin = await stopped(broker, redis_url, unique), Commands(capsys)
    for variable, value in environment_for(broker, redis_url, unique, TOCSIN_WARMUP_H="6").items():
        monkeypatch.setenv(variable, value)
    async with site.store:
        await _export_lose_import(site, tocsin, tmp_path / "state.jsonl")
        await ends_as_if_nothing_had_been(site)


async def _export_lose_import(site: Site, tocsin: Commands, file: Path) -> None:
    name, offsets = POINTS.names[0], await site.log()
    number = await site.partition_of(name)
    committed = offsets.parts[number].committed
    text = await tocsin("show", name)
    assert f"as of offset    {committed}\n" in text and "model           deepant@1" in text
    (known,) = lines_of(await tocsin("show", name, "--json"))
    assert (known["kpi"], known["partition"], known["offset"], known["interval_s"]) == (name, number, committed, 300.0)
    partitions = lines_of(await tocsin("show", "--json"))
    assert [one["offset"] for one in partitions] == [part.committed or 0 for part in offsets.parts.values()]
    assert sum(one["series"] for one in partitions) == len(POINTS.names)
    assert {one["to_rebuild"] for one in partitions} == {one["lag"] for one in partitions} == {0}
    assert f"{known['bytes']:,}" in await tocsin("show")

    before = [await site.blobs(one) for one in offsets.parts]
    await tocsin("export", "-o", str(file))
    async with working(site.settings):
        assert len((await site.log()).members) == 1
        for change in (["drop", name], ["drop", "--partition", str(number)], ["import", str(file)]):
            with pytest.raises(Refusal, match=r"has 1 member \(tocsin-worker.*stop them all"):
                await tocsin(*change)
    assert [await site.blobs(one) for one in offsets.parts] == before
    for one in (await site.exported())[1]:
        await tocsin("drop", "--partition", str(one.partition))
    assert [await site.blobs(one) for one in offsets.parts] == [None] * 3
    await tocsin("import", str(file), "--dry-run")
    assert [await site.blobs(one) for one in offsets.parts] == [None] * 3
    await tocsin("import", str(file))
    assert [await site.blobs(one) for one in offsets.parts] == before
    for wrong, why in (
        (["show", "no.such"], r"'no\.such' in any partition"),
        (["show", name, "--partition", "1"], "not both"),
        (["show", "--partition", "3"], "--partition 3"),
        (["drop"], "name a KPI"),
        (["import", str(file.parent / "absent")], "absent: No such file"),
    ):
        with pytest.raises(ConfigError, match=why):
            await tocsin(*wrong)


async def test_a_state_goes_back_only_where_it_fits(site: Site) -> None:
    kafka, name = site.settings.kafka, POINTS.names[0]
    number = await site.partition_of(name)
    origin, older = await site.exported()
    later = HALF + (len(POINTS) - HALF) // 2
    await send(site.settings, HALF, later)
    await serve(site.settings, later)
    before = await site.blobs(number)
    assert before is not None

    # A series: at the very offset of the others.
    single, sections = await site.exported(name)
    assert [(one.partition, one.whole, sorted(one.blobs)) for one in sections] == [(number, False, [name.encode()])]
    assert await state.drop_series(site.store, kafka, await site.log(), name) == [number]
    after = await site.blobs(number)
    assert after is not None and after.offset == before.offset
    assert before.blobs.keys() - after.blobs.keys() == {name.encode()}
    with pytest.raises(Refusal, match=rf"records {before.offset - 5} to {before.offset - 1} are missed.*nothing was"):
        await site.imported(single, [replace(one, offset=one.offset - 5) for one in sections])
    with pytest.raises(Refusal, match=rf"records {before.offset - 5} to {before.offset - 1} are counted twice"):
        await site.store.save(*site.at(number), before.offset - 5, {}, back=True)
        await site.imported(single, sections)
    await site.store.save(*site.at(number), before.offset, {})
    assert await site.blobs(number) == after
    assert (await site.imported(single, sections)).problems == []
    assert await site.blobs(number) == before

    # Of another log: its offset means nothing.
    elsewhere = msgspec.structs.replace(origin, cluster="elsewhere")
    _, whole = await site.exported()
    moved = [replace(one, offset=one.offset + 1_000_000) for one in whole]
    with pytest.raises(Refusal, match=r"of cluster elsewhere.*its offsets mean nothing here"):
        await site.imported(elsewhere, moved)
    with pytest.raises(Refusal, match="the topic was made anew"):
        await site.imported(origin, moved)
    with pytest.raises(ConfigError, match="a topic with 6 partitions"):
        await site.imported(msgspec.structs.replace(origin, partitions=6), whole)
    said: list[str] = []
    await site.imported(elsewhere, moved, said)
    assert len(said) == 1 and await site.blobs(number) == before, "taken for that of what is committed"

    # Ahead of what is committed, or damaged.
    log = await site.log()
    less = {at: replace(part, committed=max((part.committed or 0) - 1, 0)) for at, part in log.parts.items()}
    behind = replace(log, parts=less)
    plan = await state.plan_import(site.store, kafka, behind, origin, whole, detector_factory(site.settings))
    assert len(plan.problems) == 2 and "nothing is published of the records between" in plan.problems[0]
    broken = [replace(one, blobs={key: blob[:-1] for key, blob in one.blobs.items()}) for one in whole]
    with pytest.raises(Refusal, match="damaged"):
        await site.imported(origin, broken)

    # A whole partition: of any offset before.
    assert (await site.imported(origin, older)).problems == []
    stored = await site.blobs(number)
    assert stored is not None and stored.offset < before.offset
    await send(site.settings, later)
    await serve(site.settings, len(POINTS))
    assert digest(await published(kafka)) == digest(backtested(POINTS, site.settings))


async def test_a_partition_dropped_is_rebuilt_and_a_state_of_a_later_version_stops_no_other(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING")
    kafka, log = site.settings.kafka, await site.log()
    of = {name: await site.partition_of(name) for name in POINTS.names}
    (shared,) = {number for number in of.values() if list(of.values()).count(number) == 2}
    later, beside = (name for name in of if of[name] == shared)
    (alone,) = set(of) - {later, beside}
    assert await state.drop_partition(site.store, kafka, log, of[alone]) == log.parts[of[alone]]
    assert await site.blobs(of[alone]) is None
    with pytest.raises(ConfigError, match=f"nothing is stored of partition {of[alone]}"):
        await state.drop_partition(site.store, kafka, log, of[alone])
    stored = await site.blobs(shared)
    assert stored is not None
    blob = bytearray(stored.blobs[later.encode()])
    blob[2] = VERSION + 1
    await site.store.save(*site.at(shared), stored.offset, {later.encode(): bytes(blob)})
    found = await state.find_partition(site.store, site.settings, log, shared)
    assert (found.series, len(found.refused)) == (2, 1)
    (series,) = await state.find_series(site.store, site.settings, log, later)
    assert series.states == [] and "version 4 is unknown" in series.refused[0]

    await send(site.settings, HALF)
    await serve(site.settings, len(POINTS))
    said = [one.getMessage() for one in caplog.records if one.name.startswith("stream.")]
    assert any(f"state of {later!r}: version 4 is unknown" in one and "starts anew" in one for one in said)
    assert any("rebuilding it from offset 0 on, muted" in one for one in said)
    live, expected = await published(kafka), backtested(POINTS, site.settings)
    for name in (alone, beside):
        # Silence goes by what the others of a partition send, and one of them has forgotten what it sent.
        own, should = ([one for one in some if one.subject == name] for some in (live, expected))
        if name == beside:
            own, should = ([one for one in some if "anomaly" in one.type] for some in (own, should))
        assert len(own) >= 2 and digest(own) == digest(should), name
    now = await site.blobs(shared)
    assert now is not None and now.blobs[later.encode()][2] == VERSION
