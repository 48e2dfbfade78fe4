"""Commands of the stored state: tocsin state show, export, import, drop."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from stream.commands.shared import EPILOG, Json, say, settings_with
from stream.errors import ConfigError, InputError, StateError

if TYPE_CHECKING:
    from stream.inspection import SeriesState
    from stream.pointslog import Log
    from stream.settings import Settings
    from stream.state import FoundPartition, FoundSeries, Plan
    from stream.statefile import Origin, Section
    from stream.store import Store

app = typer.Typer(
    help="The state of KPIs in the store, of the group and the points topic in the settings.", no_args_is_help=True
)
_T = TypeVar("_T")
_REFUSED_SHOWN = 5

Kpi = Annotated[str | None, typer.Argument(help="A KPI or an entity; none: the partition, or all.", metavar="KPI")]
Number = Annotated[int | None, typer.Option("--partition", help="A partition of the points topic.", metavar="N")]
Force = Annotated[bool, typer.Option("--force", help="Do it in spite of what speaks against it, which is said.")]


@app.command("show", epilog=EPILOG)
def show_state(kpi: Kpi = None, partition: Number = None, as_json: Json = False) -> None:
    """Show what is known of a KPI, of a partition, or of all partitions.

    What the worker has taken in since its last write to the store (TOCSIN_REDIS__FLUSH_INTERVAL_S) is not in it.
    """
    _one_of(kpi, partition)
    from stream import state

    async def work(settings: Settings, store: Store, log: Log) -> tuple[list[FoundSeries], list[FoundPartition]]:
        if kpi is not None:
            return await state.find_series(store, settings, log, kpi), []
        numbers = list(log.parts) if partition is None else [partition]
        return [], [await state.find_partition(store, settings, log, number) for number in numbers]

    settings, (series, partitions) = _with_servers(work)
    models = state.model_names(settings)
    for one in series:
        _print_series(one, models, as_json=as_json)
    if partitions:
        _print_partitions(partitions, models, as_json=as_json)
    refused = [problem for one in series for problem in one.refused]
    refused += [problem for found in partitions for problem in found.refused]
    for problem in refused[:_REFUSED_SHOWN]:
        say(problem)
    if refused:
        raise StateError(f"{len(refused)} states cannot be read; a worker begins such series anew")


@app.command("export", epilog=EPILOG)
def export_state(
    kpi: Kpi = None,
    partition: Number = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="File to write; none: stdout.")] = None,
) -> None:
    """Write state as JSON lines with digests: that of a KPI, of a partition, or of all.

    Each partition is of one offset, also while workers run.
    """
    _one_of(kpi, partition)
    from stream import state, statefile
    from stream.events import iso_time

    async def work(settings: Settings, store: Store, log: Log) -> tuple[Origin, list[Section]]:
        kafka, now = settings.kafka, iso_time(int(time.time()) * 1000)
        origin = statefile.Origin(
            statefile.FORMAT, log.cluster, kafka.group, kafka.points_topic, len(log.parts), exported=now
        )
        return origin, await state.export(store, kafka, log, name=kpi, partition=partition)

    _, (origin, sections) = _with_servers(work)
    if output is None:
        try:
            statefile.write(sys.stdout.buffer, origin, sections)
        except BrokenPipeError:
            from stream.render import OutputClosed

            raise OutputClosed from None
        return
    _write_whole(output, origin, sections)
    say(f"{output}: {_what(sections)}")


@app.command("import", epilog=EPILOG)
def import_state(
    file: Annotated[Path, typer.Argument(help="What export has written.", metavar="FILE")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check all and change nothing.")] = False,
    force: Force = False,
) -> None:
    """Put exported state back, here or on another installation; all of the file or nothing.

    Refused while workers run, and where the state is of another offset than it is put back for: a worker would miss
    points, or count them twice. A whole partition may be of any offset that is committed and still in the log.
    """
    from stream import state, statefile
    from stream.service import detector_factory, use_one_thread

    try:
        with file.open("rb") as source:
            origin, sections = statefile.read(source, str(file))
    except OSError as e:
        raise InputError(f"{file}: {e.strerror or e}") from None
    use_one_thread()
    make_detector = detector_factory(settings_with())

    async def work(settings: Settings, store: Store, log: Log) -> Plan:
        plan = await state.plan_import(store, settings.kafka, log, origin, sections, make_detector)
        if not dry_run:
            await state.carry_out(store, settings.kafka, plan, forced=_forced(force))
        elif plan.problems:
            raise state.Refusal(plan.problems)
        return plan

    _, plan = _with_servers(work)
    for one in plan.parts:
        before = "nothing" if one.stored is None else f"what was there as of offset {one.stored}"
        over = f"in place of {before}" if one.section.whole else "beside the others"
        say(f"partition {one.section.partition}: {_series(one.section.blobs)} as of offset {one.offset}, {over}")
    say("nothing was changed" if dry_run else "imported")


@app.command("drop", epilog=EPILOG)
def drop_state(
    kpi: Kpi = None,
    partition: Number = None,
    force: Force = False,
) -> None:
    """Forget a KPI, which begins anew with its next point, or a partition, which is rebuilt from the log, muted.

    An incident of a forgotten KPI is never resolved. Refused while workers run: they would write the state back.
    """
    _one_of(kpi, partition)
    if kpi is None and partition is None:
        raise ConfigError("name a KPI, or give --partition N")
    from stream import state

    async def work(settings: Settings, store: Store, log: Log) -> str:
        if kpi is not None:
            numbers = await state.drop_series(store, settings.kafka, log, kpi, forced=_forced(force))
            return f"{kpi}: dropped from {_listed('partition', numbers)}; it begins anew"
        assert partition is not None
        part = await state.drop_partition(store, settings.kafka, log, partition, forced=_forced(force))
        until = part.begin if part.committed is None else part.committed
        return (
            f"partition {partition}: dropped; the next worker rebuilds it from {max(until - part.begin, 0):,} records"
        )

    _, done = _with_servers(work)
    say(done)


# -- shared -----------------------------------------------------------------------------------------------------------


def _one_of(kpi: str | None, partition: int | None) -> None:
    if kpi is not None and partition is not None:
        raise ConfigError("name a KPI or give --partition, not both")


def _forced(force: bool) -> Callable[[str], None] | None:
    return (lambda problem: say(f"forced: {problem}")) if force else None


def _with_servers(work: Callable[[Settings, Store, Log], Awaitable[_T]]) -> tuple[Settings, _T]:
    """Do something with the store and what the broker knows of the points topic."""
    from stream.discovery import find_servers
    from stream.logs import set_up_logging
    from stream.pointslog import read_log
    from stream.store import Store

    settings = find_servers(settings_with())
    set_up_logging("ERROR")

    async def run() -> _T:
        async with Store.of(settings.redis) as store:
            await store.connect(settings.redis.connect_timeout_s)
            return await work(settings, store, await read_log(settings.kafka))

    return settings, asyncio.run(run())


def _write_whole(output: Path, origin: Origin, sections: Sequence[Section]) -> None:
    """Write a file beside its place and move it there: all of it or nothing."""
    from stream import statefile

    temporary = ""
    try:
        with tempfile.NamedTemporaryFile("wb", dir=output.parent, prefix=f".{output.name}.", delete=False) as to:
            temporary = to.name
            statefile.write(to, origin, sections)
        Path(temporary).replace(output)
    except OSError as e:
        raise ConfigError(f"{output}: {e.strerror or e}") from None
    finally:
        if temporary and Path(temporary).exists():
            os.unlink(temporary)  # noqa: PTH108


def _series(blobs: Any) -> str:
    from stream.blobs import SHADOW
    from stream.render import counted

    names = {key.removesuffix(SHADOW) for key in blobs}
    return names.pop().decode() if len(names) == 1 else counted(len(names), "KPI")


def _what(sections: Sequence[Section]) -> str:
    from stream.blobs import SHADOW
    from stream.render import counted

    series = sum(not key.endswith(SHADOW) for one in sections for key in one.blobs)
    return f"{counted(series, 'KPI')} of {_listed('partition', [one.partition for one in sections])}"


def _listed(what: str, numbers: Sequence[int]) -> str:
    return f"{what}{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


# -- output -----------------------------------------------------------------------------------------------------------


def _model(number: int, names: dict[int, str]) -> str:
    return names.get(number, f"unknown ({number:016x})")


def _print_series(found: FoundSeries, models: dict[int, str], *, as_json: bool) -> None:
    import msgspec

    from stream import render

    about = {"partition": found.partition, "offset": found.offset, "committed": found.log.committed}
    for one in found.states:
        if as_json:
            said = msgspec.to_builtins(one) | {"model": _model(one.model, models)}
            render.write_line(json.dumps({"kpi": said.pop("name"), **about, **said}, ensure_ascii=False))
            continue
        behind = "" if found.log.committed in (None, found.offset) else f" (committed: {found.log.committed})"
        rows = [
            [one.name + (", in the shadow" if one.shadow else ""), ""],
            ["  partition", str(found.partition)],
            ["  as of offset", f"{found.offset}{behind}"],
            ["  model", _model(one.model, models)],
            ["  state", f"{one.bytes:,} bytes, version {one.version}"],
            *_known(one),
        ]
        for name, text in rows:
            render.out.print(f"{name:18}{text}".rstrip(), markup=False)


def _known(one: SeriesState) -> list[list[str]]:
    from stream import render

    spot, incident = one.threshold, one.incident
    width = f"{one.window} cells" + (f" of {one.features} metrics" if one.features > 1 else "")
    interval = "not known yet" if one.interval_s is None else f"{one.interval_s:g} s"
    z_q = "none yet" if spot.z_q is None else f"z_q {spot.z_q:g}"
    rows = [
        ["  interval", interval + (", being looked for anew" if one.probing and one.interval_s is not None else "")],
        ["  last point", one.last_point or "none"],
        ["  last arrival", one.last_arrival or "unknown"],
        ["  window", f"{width}, {one.filled:.0%} filled, {one.learned:.0%} as it came"],
        ["  threshold", f"{z_q} at risk {spot.q:g}: {spot.health}"],
        [
            "",
            f"{render.counted(spot.n, 'score')}, {spot.n_excess:,} above t {'–' if spot.t is None else f'{spot.t:g}'}",
        ],
        ["", f"{render.counted(spot.alarms, 'alarm')} in {spot.judged:,} judged"],
        ["  silent", "yes" if one.silent else "no"],
        ["  incident", "none"],
    ]
    if incident is not None:
        rows[-1][1] = (
            f"{incident.state}, {incident.severity}, since {incident.opened}: "
            f"{render.counted(incident.anomalies, 'anomalous point')}, worst {incident.peak_ratio:g} × threshold"
        )
    return rows


def _print_partitions(found: Sequence[FoundPartition], models: dict[int, str], *, as_json: bool) -> None:
    from stream import render

    if as_json:
        for one in found:
            render.write_line(json.dumps(_partition_document(one, models), ensure_ascii=False))
        return
    rows = [["partition", "offset", "committed", "to rebuild", "lag", "KPIs", "bytes", "largest", "models"]]
    for one in found:
        document = _partition_document(one, models)
        number = [document[name] for name in ("offset", "committed", "to_rebuild", "lag", "series", "bytes")]
        largest = "" if one.largest is None else f"{one.largest[0]} {one.largest[1]:,}"
        names = ", ".join(f"{name} {count:,}" for name, count in document["models"].items())
        cells = ["–" if n is None else f"{n:,}" for n in number]
        rows.append([str(one.partition), *cells, largest, names])
    for line in render.table(rows, right=(1, 2, 3, 4, 5, 6)):
        render.out.print(line)


def _partition_document(one: FoundPartition, models: dict[int, str]) -> dict[str, Any]:
    log = one.log
    settled = log.begin if log.committed is None else log.committed
    state = log.begin if one.offset is None else one.offset
    return {
        "partition": one.partition,
        "offset": one.offset,
        "committed": log.committed,
        "to_rebuild": max(settled - state, 0),
        "lag": max(log.end - settled, 0),
        "series": one.series,
        "bytes": one.bytes,
        "largest": None if one.largest is None else {"kpi": one.largest[0], "bytes": one.largest[1]},
        "models": {_model(number, models): count for number, count in one.models.most_common()},
        "versions": {str(version): count for version, count in sorted(one.versions.items())},
        "refused": len(one.refused),
    }
