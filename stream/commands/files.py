"""Commands that need files only: backtest, sample."""

from __future__ import annotations

import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stream.commands.shared import (
    SAMPLE_START_MS,
    CheckpointRef,
    Entity,
    FewOnly,
    Files,
    Json,
    RulesRef,
    print_summary,
    say,
    settings_with,
    tables_of,
)
from stream.errors import ConfigError, InputError

if TYPE_CHECKING:
    from stream.detector import Detector
    from stream.points import Points


def backtest(
    files: Files,
    as_json: Json = False,
    scores: Annotated[
        Path | None,
        typer.Option(
            help="Write every score to this CSV file: timestamp,value,expected,lower,upper,score,threshold,"
            "probability,anomaly; several KPIs: a first column with their names."
        ),
    ] = None,
    train_fraction: Annotated[
        float | None, typer.Option(help="Train on this first part of the points, test on the rest.")
    ] = None,
    model: Annotated[str, typer.Option(help="Family to train with --train-fraction.")] = "deepant",
    window: Annotated[
        int | None, typer.Option(help="Window of the model to train, points; none: the family's own.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the training.")] = 0,
    checkpoint: CheckpointRef = None,
    entity: Entity = False,
    rules: RulesRef = None,
) -> None:
    """Show what would have fired in CSV files, without servers.

    The very same core prints the events that the service would publish for these points. --json
    ends with one {"summary": …} line.
    """
    if train_fraction is not None and not 0 < train_fraction < 1:
        raise ConfigError(f"--train-fraction {train_fraction}: must lie between 0 and 1")
    if train_fraction is not None and checkpoint is not None:
        raise ConfigError("--train-fraction and --checkpoint: give one of them, the model is either trained or loaded")
    from stream import backtest as core
    from stream import csvfile, render
    from stream.commands.train import Choice, fit
    from stream.report import summarise
    from stream.service import detector_factory, load_checkpoint, use_one_thread

    settings = settings_with(checkpoint, rules)
    points = csvfile.merge(tables_of(files, entity=entity))
    use_one_thread()
    first = 0
    if train_fraction is None:
        chosen = load_checkpoint(settings)
    else:
        begin, first = core.head(points, train_fraction)
        series = core.training_series(begin, round(settings.interval_s * 1000))
        chosen = core.trained_checkpoint(fit(series, Choice(model, window, seed=seed)))
    detector = detector_factory(settings, checkpoint=chosen)()
    core.prime(detector, points, first)
    started = time.monotonic()
    events = []
    unused = FewOnly("points not used")
    with (
        core.ScoreWriter.to(scores, detector, many=core.count_series(detector, points) > 1) as writer,
        render.progress("backtest", len(points.value)) as (bar, task),
    ):
        console = render.event_console(bar)
        for done, result in core.run(detector, points, want_scores=scores is not None, first=first):
            for event in result.events:
                events.append(event)
                render.print_event(event, as_json=as_json, console=console)
            for reject in result.rejects:
                unused.say(f"not used: {reject.detail}")
            if writer is not None:
                writer.write(result.scores)
            bar.update(task, completed=done)
    unused.end()
    _say_unwatched(detector, points)
    elapsed_s = time.monotonic() - started
    print_summary(
        summarise(points, events, detector.counts, elapsed_s=elapsed_s, rejected=unused.count, first=first), as_json
    )


def sample(
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File; none: stdout.")] = None,
    days: Annotated[float, typer.Option(help="Length, days.")] = 28.0,
    interval_s: Annotated[int, typer.Option(help="Grid step, seconds.")] = 300,
    kind: Annotated[str, typer.Option(help="requests, latency, cpu, errors, memory or queue.")] = "requests",
    seed: Annotated[int, typer.Option(help="The same seed gives the same bytes.")] = 7,
    clean: Annotated[bool, typer.Option("--clean", help="Without anomalies.")] = False,
) -> None:
    """Write a realistic labelled KPI as CSV.

    With seasons, noise, missing points, spikes, shifts, dips and a silence. Without options it is the one that
    `tocsin demo` replays.
    """
    from stream import sample as samples
    from stream.render import OutputClosed

    made = samples.generate(days, interval_s, seed, SAMPLE_START_MS, kind=kind, clean=clean)
    if output is None:
        try:
            samples.write_csv(made, sys.stdout)
            sys.stdout.flush()
        except BrokenPipeError:
            raise OutputClosed from None
        return
    try:
        with output.open("w", newline="") as file:
            samples.write_csv(made, file)
    except OSError as e:
        raise InputError(f"--output {output}: cannot be written: {e.strerror}") from None
    for segment in (*made.segments, *made.silences):
        begin, end = (
            datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%d %H:%M")
            for ms in (segment.start_ms, segment.end_ms)
        )
        say(f"{begin}  {end}  {segment.kind}")


def _say_unwatched(detector: Detector, points: Points) -> None:
    """Say how many points no rule watches, and what may be the reason."""
    if not (count := detector.counts.unwatched):
        return
    wide = next((group.served for group in detector.groups if group.features > 1), None)
    hint = ""
    if wide is not None and not any(points.metrics):
        hint = f"; {wide.ref} watches entities of {len(wide.metrics)} metrics, which --entity makes of files"
    say(f"{count:,} points of KPIs that no rule watches{hint}")
