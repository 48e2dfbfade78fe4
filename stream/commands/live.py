"""Commands that talk to servers: demo, up, serve, replay, subscribe, check."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stream.commands.shared import (
    SAMPLE_START_MS,
    CheckpointRef,
    Entity,
    Files,
    Json,
    RulesRef,
    points_of,
    print_summary,
    say,
    settings_with,
)
from stream.errors import ConfigError

if TYPE_CHECKING:
    from stream.events import Event
    from stream.points import Points
    from stream.settings import Settings
    from stream.verify import Comparison


class Severity(StrEnum):
    """Severities, rising."""

    WARNING = "warning"
    MAJOR = "major"
    CRITICAL = "critical"


class Kind(StrEnum):
    """Types of events, by their last word."""

    OPENED = "opened"
    UPDATED = "updated"
    RESOLVED = "resolved"
    CORRECTED = "corrected"
    RETRACTED = "retracted"
    SILENT = "silent"
    RESUMED = "resumed"


class Start(StrEnum):
    """Where a subscription begins."""

    LATEST = "latest"
    EARLIEST = "earliest"


def demo(
    files: Annotated[
        list[Path] | None, typer.Argument(help="CSV files; none: a generated, labelled sample.", metavar="FILE")
    ] = None,
    as_json: Json = False,
    checkpoint: CheckpointRef = None,
    rules: RulesRef = None,
    entity: Entity = False,
) -> None:
    """Show the whole path at work.

    Starts an embedded broker and store, replays CSV points through the detector, prints every anomaly event as it is
    published, and ends with a table of what was caught. Leaves nothing behind.
    """
    from stream import backtest, render, sample
    from stream.demo import demo as run_demo
    from stream.logs import set_up_logging

    settings = settings_with(checkpoint, rules)
    set_up_logging("CRITICAL" if settings.log_level == "INFO" else settings.log_level)
    points = (
        points_of(files, entity=entity)
        if files
        else backtest.sample_points([sample.generate(28, 300, 7, SAMPLE_START_MS)])
    )
    say(f"replaying {render.counted(len(points), 'point')} of {_series(points)} through an embedded broker and store")
    with render.progress("replay", points.n_records) as (bar, task):
        console = render.event_console(bar)

        def on_event(event: Event) -> None:
            render.print_event(event, as_json=as_json, console=console)

        def on_progress(sent: int, settled: int) -> None:
            bar.update(task, completed=settled, note=f"{sent:,} sent")

        summary = asyncio.run(run_demo(settings, points, on_event=on_event, on_progress=on_progress))
    print_summary(summary, as_json)


def up(
    data_dir: Annotated[Path | None, typer.Option(help="Keep the servers' data here; none: gone at the end.")] = None,
    kafka_port: Annotated[int | None, typer.Option(help="Port of the broker; none: a free one.")] = None,
    redis_port: Annotated[int | None, typer.Option(help="Port of the store; none: a free one.")] = None,
    rules: RulesRef = None,
) -> None:
    """Run the embedded servers and the detector until Ctrl-C.

    A broker and a store as child processes on loopback ports. Meanwhile `tocsin replay` and `tocsin subscribe` in other
    terminals find them by themselves.
    """
    _end_on_sigterm()
    from stream.discovery import announce, with_servers
    from stream.embedded import embedded_servers
    from stream.logs import set_up_logging
    from stream.service import serve as run_service

    settings = settings_with(rules=rules)
    set_up_logging(settings.log_level)

    async def run() -> None:
        async with embedded_servers(data_dir=data_dir, kafka_port=kafka_port, redis_port=redis_port) as servers:
            with announce(servers):
                say(f"TOCSIN_KAFKA__BOOTSTRAP_SERVERS={servers.bootstrap_servers}")
                say(f"TOCSIN_REDIS__URL={servers.redis_url}")
                say("in another terminal: tocsin subscribe; tocsin replay FILE; here: Ctrl-C ends all")
                await run_service(with_servers(settings, servers))

    with contextlib.suppress(_Terminated):
        asyncio.run(_until_sigterm(run))


def serve(rules: RulesRef = None) -> None:
    """Run the detector against your Kafka and Redis.

    They are named by TOCSIN_KAFKA__BOOTSTRAP_SERVERS and TOCSIN_REDIS__URL. SIGTERM or Ctrl-C settles what was taken
    in, writes the state, and ends with exit code 0.
    """
    _end_on_sigterm()
    from stream.discovery import find_servers
    from stream.logs import set_up_logging
    from stream.service import serve as run_service

    settings = settings_with(rules=rules)
    set_up_logging(settings.log_level)
    asyncio.run(run_service(find_servers(settings)))


def replay(
    files: Files,
    speed: Annotated[str, typer.Option(help="Event seconds per second, or max.")] = "max",
    topic: Annotated[str | None, typer.Option(help="Topic to send to; none: the points topic.")] = None,
    shift_to_now: Annotated[bool, typer.Option("--shift-to-now", help="Move the last point to now.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where the last replay of these files into this topic stopped.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare what the service publishes with a back-test, event by event.")
    ] = False,
    no_send: Annotated[
        bool, typer.Option("--no-send", help="With --verify: the points have been sent; send nothing.")
    ] = False,
    timeout_s: Annotated[
        float, typer.Option("--timeout", help="With --verify: wait so long, seconds, while the service does nothing.")
    ] = 60.0,
    rules: RulesRef = None,
    entity: Entity = False,
    as_json: Json = False,
) -> None:
    """Send the points of CSV files to the points topic.

    Several files are merged by time. A replay stopped by Ctrl-C or SIGTERM goes on with --resume: no point is lost or
    sent twice. After a kill -9 up to 5,000 points may be sent twice; the detector takes them for duplicates. With
    --entity each line is one record, of all metrics of its file's entity.

    With --verify, waits until the service has taken all of them in, back-tests the files with the settings and rules at
    hand, which should be the service's, and prints each event that is missing, unexpected or different; exit code 1 if
    there is one. KPIs that the service knew before cannot be compared.
    """
    pace = _speed(speed)
    _check_verify(
        verify, {"--topic": topic is not None, "--resume": resume}, {"--no-send": no_send, "--rules": rules is not None}
    )
    if no_send and shift_to_now:
        raise ConfigError("--no-send and --shift-to-now: what was sent is not moved any more")
    from stream import render
    from stream.discovery import find_servers
    from stream.logs import set_up_logging
    from stream.replay import Position
    from stream.replay import replay as run_replay

    points = points_of(files, entity=entity)
    settings = find_servers(settings_with(rules=rules), store=False)
    set_up_logging(settings.log_level)
    target = topic or settings.kafka.points_topic
    total, unit = points.n_records, "record" if entity else "point"
    position = Position.of(_state_dir(), files, target, settings.kafka.bootstrap_servers, entity=entity)
    first, shift_ms = position.read() if resume else (0, 0)
    if resume and first >= total:
        say(f"all {total:,} {unit}s are in {target} already; without --resume they are sent again")
        return
    if shift_to_now and not first:  # a resumed one keeps its grid
        shift_ms = int(time.time() * 1000) - int(points.timestamp_ms.max())
    sent = first

    async def send() -> None:
        def on_sent(n: int) -> None:
            nonlocal sent
            sent = n
            position.write(n, shift_ms)
            bar.update(task, completed=n)

        with render.progress(f"replay to {target}", total) as (bar, task):
            bar.update(task, completed=first)
            await run_replay(
                points, settings.kafka, topic=target, speed=pace, shift_ms=shift_ms, first=first, on_sent=on_sent
            )
        say(
            f"sent {render.counted(total - first, unit)} of {_series(points)} to {target}"
            f" at {settings.kafka.bootstrap_servers}"
        )

    found: Comparison | None = None

    async def work() -> None:
        nonlocal found
        if verify:
            found = await _verify(points, shift_ms, settings, None if no_send else send, timeout_s)
        else:
            await send()

    try:
        asyncio.run(_until_sigterm(work))
    except (KeyboardInterrupt, _Terminated):
        if sent < total and not no_send:
            say(f"stopped after {sent:,} of {total:,} {unit}s; the same command with --resume goes on")
        raise KeyboardInterrupt from None
    if found is not None:
        for note in found.notes:
            say(note)
        render.print_comparison(found, as_json=as_json)
        if not found:
            raise typer.Exit(1)


def _series(points: Points) -> str:
    from stream import render

    return render.counted_series(len(points.names) - points.n_entities, points.n_entities)


def _check_verify(verify: bool, never: dict[str, bool], only: dict[str, bool]) -> None:
    """Refuse options that say nothing together."""
    for option, given in (never if verify else only).items():
        if given:
            raise ConfigError(f"{option} {'and' if verify else 'without'} --verify: has no meaning")


async def _verify(
    points: Points,
    shift_ms: int,
    settings: Settings,
    send: Callable[[], Awaitable[None]] | None,
    timeout_s: float,
) -> Comparison:
    from stream import render, verify
    from stream.service import detector_factory, use_one_thread

    use_one_thread()
    make_detector = detector_factory(settings)
    moved = replace(points, timestamp_ms=points.timestamp_ms + shift_ms)
    with contextlib.ExitStack() as stack:
        shown: list[Callable[[int], None]] = []

        def on_waiting(left: int) -> None:
            if not shown:  # not before: the bar of the sending is gone by now
                bar, task = stack.enter_context(render.progress("the service takes them in", left))
                shown.append(lambda now: bar.update(task, completed=left - now))
            shown[0](left)

        return await verify.verify(
            moved, settings.kafka, make_detector, send=send, timeout_s=timeout_s, on_waiting=on_waiting
        )


def subscribe(
    kpi: Annotated[
        list[str] | None, typer.Option(help="Glob that the KPI's name must match, e.g. 'checkout.*'; may be repeated.")
    ] = None,
    min_severity: Annotated[
        Severity, typer.Option(help="Least severity; silent and resumed have none and pass.")
    ] = Severity.WARNING,
    model: Annotated[
        list[str] | None, typer.Option(help="Glob on the model, NAME or NAME@VERSION; may be repeated.")
    ] = None,
    rule: Annotated[list[str] | None, typer.Option(help="Glob on the rule's label; may be repeated.")] = None,
    kind: Annotated[list[Kind] | None, typer.Option("--type", help="Type of event; may be repeated.")] = None,
    topic: Annotated[str | None, typer.Option(help="Topic to follow; none: the anomaly topic.")] = None,
    start: Annotated[
        Start, typer.Option("--from", help="Begin with new events, or with all that the topic holds.")
    ] = Start.LATEST,
    as_json: Json = False,
) -> None:
    """Follow the anomaly topic, a line for each event.

    All filters have to pass; of one that is repeated, one value has to match.
    """
    from stream import render
    from stream.discovery import find_servers
    from stream.logs import set_up_logging
    from stream.subscribe import subscribe as follow

    settings = find_servers(settings_with(), store=False)
    set_up_logging(settings.log_level)

    def on_ready() -> None:
        say(f"following {topic or settings.kafka.anomalies_topic} at {settings.kafka.bootstrap_servers}")

    async def run() -> None:
        async for event in follow(
            settings.kafka,
            kpi=kpi or "*",
            min_severity=min_severity.value,
            model=model or "*",
            rule=rule or "*",
            types=[one.value for one in kind] if kind else None,
            topic=topic,
            start=start.value,
            on_ready=on_ready,
        ):
            render.print_event(event, as_json=as_json)

    asyncio.run(run())


def check(
    names: Annotated[
        list[str] | None, typer.Argument(help="KPIs: say which rule each falls under; no server.", metavar="KPI")
    ] = None,
    entity: Annotated[bool, typer.Option("--entity", help="The names are those of entities.")] = False,
    rules: RulesRef = None,
    settings_only: Annotated[
        bool, typer.Option("--settings", help="List the settings with their defaults and try no server.")
    ] = False,
) -> None:
    """Check settings, rules, checkpoints, broker and store; or say which rule KPIs fall under, and what it asks."""
    from stream.settings import known_names

    if entity and not names:
        raise ConfigError("--entity: name the entities")
    settings = settings_with(rules=rules)
    if settings_only:
        for variable, description, default in known_names():
            typer.echo(f"{variable}={default}\n    {description}")
        return
    from stream.discovery import find_servers
    from stream.logs import set_up_logging
    from stream.service import check_rules, check_servers, explain

    set_up_logging("ERROR")
    if names:
        for line in explain(settings, names, entity=entity):
            typer.echo(line)
        return
    lines = check_rules(settings)
    for line in lines + asyncio.run(check_servers(find_servers(settings))):
        typer.echo(line)


# -- shared -------------------------------------------------------------------------------------------------------


def _end_on_sigterm() -> None:
    """End with exit code 0 on SIGTERM while the program still loads; as process 1 of a container it would be deaf."""

    def end(*_: object) -> None:
        sys.exit(0)

    signal.signal(signal.SIGTERM, end)


class _Terminated(Exception):
    """SIGTERM has come."""


async def _until_sigterm(work: Callable[[], Awaitable[None]]) -> None:
    """Do the work; SIGTERM cancels it as Ctrl-C does, so that it can end in order, and then raises `_Terminated`."""
    current, terminated = asyncio.current_task(), False

    def terminate() -> None:
        nonlocal terminated
        terminated = True
        if current is not None:
            current.cancel()

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, terminate)
    try:
        await work()
    except asyncio.CancelledError:
        if not terminated:
            raise  # Ctrl-C
        raise _Terminated from None


def _speed(text: str) -> float | None:
    if text == "max":
        return None
    try:
        speed = float(text)
    except ValueError:
        speed = 0.0
    if not 0 < speed < float("inf"):
        raise ConfigError(f"--speed {text}: must be a number above 0, or max")
    return speed


def _state_dir() -> Path:
    import os

    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "tocsin"
