"""The command `tocsin`. Data goes to stdout, logs and progress to stderr.

Exit codes: 0 fine, 2 a wrong setting or argument, 1 anything else, 130 interrupted.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
import time
from datetime import UTC, datetime
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from stream.errors import ConfigError, InputError, TocsinError

app = typer.Typer(
    name="tocsin",
    help="Streaming KPI anomaly detector: Kafka in, anomaly events out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
models_app = typer.Typer(help="The model repository.", no_args_is_help=True)
app.add_typer(models_app, name="models")

_EPILOG = "Exit codes: 0 fine, 2 wrong setting or argument, 1 anything else."

Files = Annotated[
    list[Path],
    typer.Argument(help="CSV files, plain or .gz: timestamp,value[,label], or a column per KPI.", metavar="FILE…"),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON lines.")]


class Severity(StrEnum):
    """Severities, rising."""

    WARNING = "warning"
    MAJOR = "major"
    CRITICAL = "critical"


class Start(StrEnum):
    """Where a subscription begins."""

    LATEST = "latest"
    EARLIEST = "earliest"


class Family(StrEnum):
    """The families of models."""

    DEEPANT = "deepant"


class Scaling(StrEnum):
    """How a model scales its input."""

    AUTO = "auto"
    TRAIN = "train"
    WINDOW = "window"


def main() -> None:
    """Run the command; turn what went wrong into one line on stderr and an exit code."""
    try:
        app()
    except TocsinError as e:
        sys.stderr.write(f"tocsin: {e}\n")
        sys.exit(e.exit_code)
    except KeyboardInterrupt:
        sys.stderr.write("tocsin: interrupted\n")
        sys.exit(130)
    except BrokenPipeError:  # `tocsin … | head`
        sys.stderr.close()
        sys.exit(0)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"tocsin {version('tocsin')}")
        raise typer.Exit


@app.callback(epilog=_EPILOG)
def _common(
    _: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    pass


# -- running ------------------------------------------------------------------------------------------------------


@app.command(epilog=_EPILOG)
def demo(
    files: Annotated[
        list[Path] | None, typer.Argument(help="CSV files; none: a generated, labelled sample.", metavar="[FILE…]")
    ] = None,
    as_json: Json = False,
    checkpoint: Annotated[str | None, typer.Option(help="Checkpoint, NAME or NAME@VERSION.")] = None,
) -> None:
    """Show the whole path at work: embedded servers, a replay, anomaly events, a table. Leaves nothing behind."""
    from stream import backtest as core
    from stream import render, sample
    from stream.demo import demo as run_demo
    from stream.events import Event
    from stream.service import set_up_logging

    settings = _settings(checkpoint)
    set_up_logging("ERROR" if settings.log_level == "INFO" else settings.log_level)
    if files:
        points = _points(files)
    else:
        points = core.sample_points([sample.generate(28, 300, 7, _SAMPLE_START_MS)])
    _say(f"replaying {len(points.value):,} points of {len(points.names)} KPIs through an embedded broker and store")
    with render.progress("replay", len(points.value)) as (bar, task):
        console = render.event_console(bar)

        def on_event(event: Event) -> None:
            render.print_event(event, as_json=as_json, console=console)

        def on_progress(sent: int, settled: int) -> None:
            bar.update(task, completed=settled, note=f"{sent:,} sent")

        summary = asyncio.run(run_demo(settings, points, on_event=on_event, on_progress=on_progress))
    _print_summary(summary, as_json)


@app.command(epilog=_EPILOG)
def up(
    data_dir: Annotated[Path | None, typer.Option(help="Keep the servers' data here; none: gone at the end.")] = None,
    kafka_port: Annotated[int | None, typer.Option(help="Port of the broker; none: a free one.")] = None,
    redis_port: Annotated[int | None, typer.Option(help="Port of the store; none: a free one.")] = None,
) -> None:
    """Run the embedded broker and store and the detector, until Ctrl-C."""
    from stream.embedded import announce, embedded_servers
    from stream.service import serve as run_service
    from stream.service import set_up_logging, with_servers

    settings = _settings()
    set_up_logging(settings.log_level)

    async def run() -> None:
        async with embedded_servers(data_dir=data_dir, kafka_port=kafka_port, redis_port=redis_port) as servers:
            with announce(servers):
                _say(f"TOCSIN_KAFKA__BOOTSTRAP_SERVERS={servers.bootstrap_servers}")
                _say(f"TOCSIN_REDIS__URL={servers.redis_url}")
                _say("in another terminal: tocsin subscribe; tocsin replay FILE")
                await run_service(with_servers(settings, servers))

    asyncio.run(run())


@app.command(epilog=_EPILOG)
def serve() -> None:
    """Run the detector against your Kafka and Redis (TOCSIN_KAFKA__BOOTSTRAP_SERVERS, TOCSIN_REDIS__URL)."""
    from stream.service import find_servers, set_up_logging
    from stream.service import serve as run_service

    settings = _settings()
    set_up_logging(settings.log_level)
    asyncio.run(run_service(find_servers(settings)))


@app.command(epilog=_EPILOG)
def replay(
    files: Files,
    speed: Annotated[str, typer.Option(help="Event seconds per second, or max.")] = "max",
    topic: Annotated[str | None, typer.Option(help="Topic to send to; none: the points topic.")] = None,
    shift_to_now: Annotated[bool, typer.Option("--shift-to-now", help="Move the last point to now.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where a stopped replay of these files ended.")
    ] = False,
) -> None:
    """Send the points of CSV files to the points topic; several files are merged by time."""
    from stream import render
    from stream.replay import Position
    from stream.replay import replay as run_replay
    from stream.service import find_servers, set_up_logging

    pace = _speed(speed)
    points = _points(files)
    settings = find_servers(_settings(), store=False)
    set_up_logging(settings.log_level)
    target = topic or settings.kafka.points_topic
    position = Position.of(_state_dir(), files, target, settings.kafka.bootstrap_servers)
    first = position.read() if resume else 0
    total = len(points.value)
    shift_ms = int(time.time() * 1000) - int(points.timestamp_ms.max()) if shift_to_now else 0
    sent = first
    with render.progress(f"replay to {target}", total) as (bar, task):

        def on_sent(n: int) -> None:
            nonlocal sent
            sent = n
            position.write(n)
            bar.update(task, completed=n)

        bar.update(task, completed=first)
        try:
            asyncio.run(
                run_replay(
                    points, settings.kafka, topic=target, speed=pace, shift_ms=shift_ms, first=first, on_sent=on_sent
                )
            )
        except KeyboardInterrupt:
            _say(f"stopped after {sent:,} of {total:,} points; the same command with --resume goes on")
            raise
    position.forget()
    _say(f"sent {total - first:,} points of {len(points.names)} KPIs to {target}")


@app.command(epilog=_EPILOG)
def subscribe(
    kpi: Annotated[str, typer.Option(help="Glob that the KPI's name must match.")] = "*",
    min_severity: Annotated[Severity, typer.Option(help="Least severity.")] = Severity.WARNING,
    start: Annotated[
        Start, typer.Option("--from", help="Begin with new events or with all that are kept.")
    ] = Start.LATEST,
    as_json: Json = False,
) -> None:
    """Follow the anomaly topic."""
    from stream import render
    from stream.service import find_servers, set_up_logging
    from stream.subscribe import subscribe as follow

    settings = find_servers(_settings(), store=False)
    set_up_logging(settings.log_level)

    async def run() -> None:
        async for event in follow(settings.kafka, kpi=kpi, min_severity=min_severity.value, start=start.value):
            render.print_event(event, as_json=as_json)

    asyncio.run(run())


# -- files --------------------------------------------------------------------------------------------------------


@app.command(epilog=_EPILOG)
def backtest(
    files: Files,
    as_json: Json = False,
    scores: Annotated[Path | None, typer.Option(help="Write every score to this CSV file.")] = None,
    train_fraction: Annotated[
        float | None, typer.Option(help="Train on this first part of the points, test on the rest.")
    ] = None,
    model: Annotated[Family, typer.Option(help="Family to train with --train-fraction.")] = Family.DEEPANT,
    window: Annotated[int, typer.Option(help="Window of the model to train, points.")] = 30,
    seed: Annotated[int, typer.Option(help="Seed of the training.")] = 0,
    checkpoint: Annotated[str | None, typer.Option(help="Checkpoint to use, NAME or NAME@VERSION.")] = None,
) -> None:
    """Run the very same core over CSV files, without any server, and print the same events."""
    from stream import backtest as core
    from stream import render
    from stream.report import summarise
    from stream.service import detector_factory, load_checkpoint, use_one_thread

    if train_fraction is not None and not 0 < train_fraction < 1:
        raise ConfigError(f"--train-fraction {train_fraction}: must lie between 0 and 1")
    if train_fraction is not None and checkpoint is not None:
        raise ConfigError("--train-fraction and --checkpoint: give one of them, the model is either trained or loaded")
    settings = _settings(checkpoint)
    points = _points(files)
    use_one_thread()
    first = 0
    if train_fraction is None:
        chosen = load_checkpoint(settings)
    else:
        begin, first = core.head(points, train_fraction)
        chosen = core.trained_checkpoint(_train(core.training_series(begin), model, window, seed, Scaling.AUTO, 30, ""))
    detector = detector_factory(settings.detector(), chosen)()
    started = time.monotonic()
    events = []
    with (
        core.ScoreWriter.to(scores, detector, many=len(points.names) > 1) as writer,
        render.progress("backtest", len(points.value)) as (bar, task),
    ):
        console = render.event_console(bar)
        for done, result in core.run(detector, points, want_scores=scores is not None, first=first):
            for event in result.events:
                events.append(event)
                render.print_event(event, as_json=as_json, console=console)
            for reject in result.rejects:
                _say(f"not used: {reject.detail}")
            if writer is not None:
                writer.write(result.scores)
            bar.update(task, completed=done)
    elapsed = time.monotonic() - started
    rejected = detector.counts.too_late
    _print_summary(
        summarise(points, events, detector.counts, elapsed_s=elapsed, rejected=rejected, first=first), as_json
    )


@app.command(epilog=_EPILOG)
def train(
    files: Annotated[list[Path] | None, typer.Argument(help="CSV files to learn from.", metavar="[FILE…]")] = None,
    name: Annotated[str, typer.Option(help="Name of the checkpoint; each run adds a version.")] = ...,  # type: ignore[assignment]
    model: Annotated[Family, typer.Option(help="Family.")] = Family.DEEPANT,
    window: Annotated[int, typer.Option(help="Points of history: 10, 14, 18, …")] = 30,
    scaling: Annotated[
        Scaling,
        typer.Option(help="train: one KPI's own scale; window: for KPIs never seen; auto: by the number of KPIs."),
    ] = Scaling.AUTO,
    generated: Annotated[int, typer.Option(help="Learn from so many generated KPIs as well.")] = 0,
    epochs: Annotated[int, typer.Option(help="At most so many epochs.")] = 30,
    seed: Annotated[int, typer.Option(help="The same seed gives the same weights.")] = 0,
) -> None:
    """Train a model and add it to the model repository."""
    from models import checkpoint as repository
    from stream import backtest as core
    from stream import sample
    from stream.service import use_one_thread

    settings = _settings()
    use_one_thread()
    if not files and not generated:
        raise ConfigError("nothing to learn from: give CSV files, or --generated N")
    series = []
    if files:
        series += core.training_series(_points(files), round(settings.interval_s * 1000), _digests(files))
    for k in range(generated):
        series += core.training_series(core.sample_points([sample.random_kpi(seed * 100_000 + k)]))
    repository.check_name(name)
    bundle = _train(series, model, window, seed, scaling, epochs, "tocsin " + " ".join(sys.argv[1:]))
    path = repository.save(settings.checkpoints, name, bundle)
    typer.echo(str(path))


@app.command("sample", epilog=_EPILOG)
def write_sample(
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File; none: stdout.")] = None,
    days: Annotated[float, typer.Option(help="Length, days.")] = 28.0,
    interval_s: Annotated[int, typer.Option(help="Grid step, seconds.")] = 300,
    kind: Annotated[str, typer.Option(help="requests, latency, cpu, errors, memory or queue.")] = "requests",
    seed: Annotated[int, typer.Option(help="The same seed gives the same bytes.")] = 7,
    clean: Annotated[bool, typer.Option("--clean", help="Without anomalies.")] = False,
) -> None:
    """Write a realistic labelled KPI: seasons, noise, missing points, spikes, shifts, dips, a silence."""
    from stream import sample

    made = sample.generate(days, interval_s, seed, _SAMPLE_START_MS, kind=kind, clean=clean)
    if output is None:
        sample.write_csv(made, sys.stdout)
        return
    with output.open("w", newline="") as file:
        sample.write_csv(made, file)
    for segment in (*made.segments, *made.silences):
        times = (
            datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%d %H:%M")
            for ms in (segment.start_ms, segment.end_ms)
        )
        _say("{}  {}  {}".format(*times, segment.kind))


# -- models -------------------------------------------------------------------------------------------------------


@models_app.command("import", epilog=_EPILOG)
def import_model(
    file: Annotated[Path, typer.Argument(help="State dict: .safetensors, or one that torch loads with weights_only.")],
    name: Annotated[str, typer.Option(help="Name of the checkpoint.")] = ...,  # type: ignore[assignment]
    window: Annotated[int, typer.Option(help="Points of history that it was trained with.")] = ...,  # type: ignore[assignment]
    center: Annotated[
        float | None, typer.Option(help="Subtracted from a value (the minimum, or the mean); none: window scaling.")
    ] = None,
    scale: Annotated[
        float | None, typer.Option(help="What it is then divided by (the range, or the deviation).")
    ] = None,
) -> None:
    """Bring a DeepAnT that was trained elsewhere into the repository."""
    from models import checkpoint as repository
    from models.deepant import DeepAnTConfig

    settings = _settings()
    if (center is None) != (scale is None):
        raise ConfigError("--center and --scale: give both or neither")
    config = DeepAnTConfig(window=window, scaling="window" if center is None else "train")
    constants = {} if center is None or scale is None else {"center": [center], "scale": [scale]}
    bundle = repository.import_state_dict(file, config, **constants)
    typer.echo(str(repository.save(settings.checkpoints, name, bundle)))


@models_app.command("list", epilog=_EPILOG)
def list_models(as_json: Json = False) -> None:
    """List the checkpoints and their versions."""
    from models import checkpoint as repository
    from stream.service import roots

    where = roots(_settings())
    rows = {name: repository.versions(where, name) for name in repository.names(where)}
    for name, versions in rows.items():
        typer.echo(
            json.dumps({"name": name, "versions": versions}) if as_json else f"{name}  {', '.join(map(str, versions))}"
        )


@app.command(epilog=_EPILOG)
def check(
    settings_only: Annotated[bool, typer.Option("--settings", help="List the settings and try no server.")] = False,
) -> None:
    """Check the settings, the checkpoint, the broker and the store."""
    from stream.service import check_servers, find_servers, load_checkpoint
    from stream.settings import known_names

    settings = _settings()
    if settings_only:
        for variable, description, default in known_names():
            typer.echo(f"{variable}={default}\n    {description}")
        return
    typer.echo(f"checkpoint {load_checkpoint(settings).ref}: fine")
    for line in asyncio.run(check_servers(find_servers(settings))):
        typer.echo(line)


# -- shared -------------------------------------------------------------------------------------------------------

_SAMPLE_START_MS = 1_767_571_200_000  # 2026-01-05, a Monday


def _say(text: str) -> None:
    """Tell people something that is no data."""
    typer.echo(text, err=True)


def _settings(checkpoint: str | None = None) -> Any:
    from stream.settings import load_settings

    settings = load_settings()
    return settings if checkpoint is None else settings.model_copy(update={"checkpoint": checkpoint})


def _points(files: list[Path]) -> Any:
    from stream import csvfile

    tables = []
    for file in files:
        table = csvfile.read_table(file)
        for line in table.refused[:5]:
            _say(f"{file}:{line.line}: not used: {line.reason}: {line.text}")
        if table.n_refused > 5:
            _say(f"{file}: {table.n_refused - 5} more lines not used")
        tables.append(table)
    return csvfile.merge(tables)


def _digests(files: list[Path]) -> dict[str, str]:
    from stream import csvfile

    return {name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files for name in csvfile.read_table(f).names}


def _train(
    series: list[Any], family: Family, window: int, seed: int, scaling: Scaling, epochs: int, command: str
) -> Any:
    from models.deepant import DeepAnTConfig
    from models.train import EpochReport, TrainConfig
    from models.train import train as run_training
    from stream import render

    assert family is Family.DEEPANT
    kind = scaling.value if scaling is not Scaling.AUTO else ("train" if len(series) == 1 else "window")
    config = TrainConfig(
        model=DeepAnTConfig(window=window, scaling=kind),  # type: ignore[arg-type]  # a Literal of the same words
        seed=seed,
        epochs=epochs,
        command=command,
        created=datetime.now(UTC).isoformat(timespec="seconds") if command else "",
    )
    with render.progress("train", epochs) as (bar, task):

        def on_epoch(report: EpochReport) -> None:
            bar.update(task, completed=report.epoch, note=f"error {report.held_out_loss:.4f}")

        return run_training(series, config, on_epoch)


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


def _print_summary(summary: Any, as_json: bool) -> None:
    from stream import render
    from stream.report import as_json as to_json

    if as_json:
        typer.echo(json.dumps(to_json(summary)))
    else:
        render.print_summary(summary)


__all__ = ["InputError", "app", "main"]
