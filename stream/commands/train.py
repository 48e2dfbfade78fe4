"""The command that makes a model: train."""

from __future__ import annotations

import asyncio
import hashlib
import re
import sys
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields, replace
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from zoneinfo import ZoneInfoNotFoundError

import typer

from stream.commands.doctor import since_ms_of
from stream.commands.shared import Entity, FewOnly, say, settings_with
from stream.errors import ConfigError

if TYPE_CHECKING:
    from models.base import Config
    from models.checkpoint import Bundle
    from models.family import Family as ModelFamily
    from models.resume import Store
    from models.windows import TrainSeries
    from stream.points import Points
    from stream.settings import Settings

_DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_HOURS = re.compile(r"([0-9]{1,2})(?::([0-9]{2}))?-([0-9]{1,2})(?::([0-9]{2}))?")
_SHOWN = 5  # refused lines of a file


class Scaling(StrEnum):
    """How a model scales its input."""

    AUTO = "auto"
    TRAIN = "train"
    WINDOW = "window"


@dataclass(frozen=True, slots=True)
class Choice:
    """What to train. None: as the family has it."""

    model: str = "deepant"
    window: int | None = None
    scaling: Scaling = Scaling.AUTO
    seed: int = 0
    per_kpi: bool = False
    shape: Sequence[str] = ()  # NAME=VALUE, of the family's config
    epochs: int | None = None
    batch: int | None = None
    learning_rate: float | None = None
    trim: float | None = None


def train(
    files: Annotated[
        list[Path] | None, typer.Argument(help="CSV, npz and Parquet files to learn from.", metavar="FILE")
    ] = None,
    name: Annotated[str, typer.Option(help="Name of the checkpoint; each run adds a version.")] = ...,  # type: ignore[assignment]
    model: Annotated[str, typer.Option(help="Family: deepant, bagel, mtad_gat, autoencoder or vae.")] = "deepant",
    window: Annotated[int | None, typer.Option(help="Points that the network reads; none: the family's own.")] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option("--set", help="A setting of the family's, such as hidden=64; repeatable.", metavar="NAME=VALUE"),
    ] = None,
    scaling: Annotated[
        Scaling,
        typer.Option(help="train: one KPI's own scale; window: for KPIs never seen; auto: by the number of KPIs."),
    ] = Scaling.AUTO,
    per_kpi: Annotated[
        bool, typer.Option("--per-kpi", help="A small model for each KPI, all trained together, in one checkpoint.")
    ] = False,
    entity: Entity = False,
    from_topic: Annotated[str | None, typer.Option(help="Learn from the history of this topic.")] = None,
    since: Annotated[
        str | None, typer.Option(help="Of a topic only what the broker received in this time: 12h, 14d, 8w.")
    ] = None,
    match: Annotated[
        list[str] | None, typer.Option(help="Of a topic only KPIs of such names, as checkout.*; repeatable.")
    ] = None,
    generated: Annotated[int, typer.Option(help="Learn from so many generated KPIs as well.")] = 0,
    interval: Annotated[
        str | None, typer.Option(help="Time from point to point, 30s, 1m, 5m; none: TOCSIN_INTERVAL_S, or found out.")
    ] = None,
    hours: Annotated[str | None, typer.Option(help="Learn what is normal in these hours only: 8-18, 22:30-6.")] = None,
    days: Annotated[str | None, typer.Option(help="Learn what is normal on these days only: mon-fri; sat,sun.")] = None,
    time_zone: Annotated[str, typer.Option(help="Of --hours and --days, as Europe/Berlin.")] = "UTC",
    epochs: Annotated[int | None, typer.Option(help="At most so many epochs; none: the family's own.")] = None,
    batch: Annotated[int | None, typer.Option(help="Windows per step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of Adam, in the first epoch.")] = None,
    trim: Annotated[
        float | None,
        typer.Option(help="Share of windows, of the largest losses, that teach nothing where no point is labelled."),
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same weights.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a training of this name that was interrupted.")
    ] = False,
) -> None:
    """Train a model and add it to the model repository.

    Prints where it lies: TOCSIN_CHECKPOINTS/NAME/VERSION. One model learns from all KPIs, or with --per-kpi each gets
    its own. With --entity, one model takes all metrics of an entity; all need the same ones. An npz has the array
    `values` or `train`, (N, F) or (N,), and may have `timestamp`, `label` and `metrics`. The state is kept after every
    epoch: --resume ends with the weights of a training without a break.
    """
    from models import repository
    from models.errors import CheckpointError
    from models.refs import check_name
    from models.resume import Store
    from stream.service import use_one_thread

    settings = settings_with()
    if not files and not generated and not from_topic:
        raise ConfigError("nothing to learn from: give files, --from-topic TOPIC, or --generated N")
    if entity and generated:
        raise ConfigError("--entity and --generated: a generated series is one KPI; give one of them")
    if not from_topic and (since or match):
        raise ConfigError("--since and --match choose from a topic: give --from-topic with them")
    try:
        check_name(name)
    except CheckpointError as e:
        raise ConfigError(f"--name: {e}") from None
    choice = Choice(model, window, scaling, seed, per_kpi, shape or (), epochs, batch, learning_rate, trim)
    family_named(choice.model)
    hours_, days_ = hours_of(hours), days_of(days)
    _check_zone(time_zone)
    interval_ms = _interval_ms(interval) or round(settings.interval_s * 1000)
    use_one_thread()
    series = _from_files(files or (), interval_ms, entity=entity)
    if from_topic:
        series += _from_topic(settings, from_topic, since_ms_of(since), match or (), interval_ms, entity=entity)
    series += _generated(generated, seed)
    if hours_ or days_:
        series = [_within(one, hours_, days_, time_zone) for one in series]
    store = Store(settings.checkpoints / name / ".resume")
    if resume and not store.exists:
        say(f"no training of {name} was interrupted: beginning anew")
    if store.exists and not resume:
        say(f"a training of {name} was interrupted, and --resume would go on with it: beginning anew")
    bundle = fit(series, choice, "tocsin " + " ".join(sys.argv[1:]), store, resume=resume)
    path = repository.save(settings.checkpoints, name, bundle)
    store.remove()
    typer.echo(str(path))


def fit(
    series: Sequence[TrainSeries],
    choice: Choice,
    command: str = "",
    store: Store | None = None,
    *,
    resume: bool = False,
) -> Bundle:
    """Train what was chosen, with a bar on stderr.

    Raises:
        ConfigError: there is no such family or setting, or the series cannot be trained on.
    """
    from models.train import EpochReport, TrainConfig
    from models.train import train as run_training
    from stream import render

    family = family_named(choice.model)
    alone = choice.per_kpi or len(series) == 1
    kind = choice.scaling.value if choice.scaling is not Scaling.AUTO else "train" if alone else "window"
    given = {one: getattr(choice, one) for one in ("epochs", "batch", "learning_rate", "trim")}
    config = TrainConfig.of(
        family,
        _shape(family, choice, series[0].values.shape[1], kind),
        **{one: value for one, value in given.items() if value is not None},
        seed=choice.seed,
        per_kpi=choice.per_kpi,
        command=command,
        created=datetime.now(UTC).isoformat(timespec="seconds") if command else "",
    )
    trouble = FewOnly("troubles, noted in the checkpoint")
    with render.progress("train", config.epochs) as (bar, task):

        def on_epoch(report: EpochReport) -> None:
            if report.models > 1:
                note = f"models, pass {report.epoch}, loss {report.held_out_loss:.4g}"
                bar.update(task, completed=report.done, total=report.models, note=note)
            else:
                bar.update(task, completed=report.epoch, note=f"loss {report.held_out_loss:.4g}")
            if report.note:
                trouble.say(report.note)

        try:
            bundle = run_training(series, config, on_epoch, store, resume=resume)
        except KeyboardInterrupt:
            if store is not None and store.exists:
                say("the training was interrupted; --resume goes on with it")
            raise
    trouble.end()
    return bundle


def family_named(name: str) -> ModelFamily:
    """Return a family of models.

    Raises:
        ConfigError: there is none of that name.
    """
    from models.families import family

    return family(name)


def hours_of(text: str | None) -> tuple[int, int] | None:
    """Return the minutes of the day from and to of `8-18` or `22:30-6`; None for no choice.

    Raises:
        ConfigError: it is neither.
    """
    if text is None:
        return None
    found = _HOURS.fullmatch(text.strip())
    if found:
        start, end = (60 * int(hour) + int(minute or 0) for hour, minute in (found.groups()[:2], found.groups()[2:]))
        whole = all(int(minute or 0) < 60 for minute in found.groups()[1::2])
        if whole and start < 1440 and 0 <= end <= 1440 and start != end:
            return start, end or 1440
    raise ConfigError(f"--hours {text}: write the hours from and to, such as 8-18, 22-6 or 8:30-12")


def days_of(text: str | None) -> tuple[int, ...] | None:
    """Return the weekdays, 0 = Monday, of `mon-fri` or `sat,sun`; None for no choice.

    Raises:
        ConfigError: a word is no day.
    """
    if text is None:
        return None
    days: set[int] = set()
    for part in text.lower().replace(" ", "").split(","):
        ends = [
            next((k for k, day in enumerate(_DAYS) if len(word) > 2 and word.startswith(day)), None)
            for word in part.split("-")
        ]
        first, last = ends[0], ends[-1]
        if first is None or last is None or len(ends) > 2:
            raise ConfigError(f"--days {text}: {part!r} is no day; write some of {','.join(_DAYS)}, or mon-fri")
        days.update((first + k) % 7 for k in range((last - first) % 7 + 1))
    return tuple(sorted(days))


# -- the data ---------------------------------------------------------------------------------------------------------


def _from_files(files: Sequence[Path], interval_ms: int, *, entity: bool) -> list[TrainSeries]:
    from stream import backtest, csvfile, sources

    if not files:
        return []
    tables = []
    for file in files:
        table = sources.read_table(file, entity=entity, interval_ms=interval_ms)
        for line in table.refused[:_SHOWN]:
            say(f"{file}:{line.line}: not used: {line.reason}: {line.text}")
        if table.n_refused > _SHOWN:
            say(f"{file}: {table.n_refused - _SHOWN} more lines not used")
        tables.append(table)
    digests = {kpi: hashlib.sha256(t.path.read_bytes()).hexdigest() for t in tables for kpi in t.names}
    return backtest.training_series(csvfile.merge(tables), interval_ms, digests)


def _from_topic(
    settings: Settings, topic: str, since_ms: int | None, match: Sequence[str], interval_ms: int, *, entity: bool
) -> list[TrainSeries]:
    from stream import backtest, render, sources
    from stream.discovery import find_servers
    from stream.logs import set_up_logging

    settings = find_servers(settings, store=False)
    set_up_logging("ERROR")
    with render.progress("read", 0) as (bar, task):
        found = asyncio.run(
            sources.read_topic(
                settings.kafka,
                topic,
                since_ms=since_ms,
                entity=entity,
                on_progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
        )
    if found.rejected:
        say(f"{found.rejected:,} records of {topic} could not be read, and are left out: tocsin doctor says why")
    if found.left_out:
        say(f"{found.left_out:,} older records of {topic} are left out: they are too many")
    points, left = sources.choose(found.points, match, entity=entity)
    few = FewOnly("series left out")
    for name, why in left.items():
        few.say(f"{name} left out: {why}")
    few.end()
    return backtest.training_series(points, interval_ms)


def _generated(count: int, seed: int) -> list[TrainSeries]:
    from stream import backtest
    from stream import sample as samples

    series: list[TrainSeries] = []
    for k in range(count):
        made: Points = backtest.sample_points([samples.random_kpi(seed * 100_000 + k)])
        series += backtest.training_series(made)
    return series


def _within(
    series: TrainSeries, hours: tuple[int, int] | None, days: tuple[int, ...] | None, time_zone: str
) -> TrainSeries:
    from stream.sources import wanted_times

    if not series.start_ms:
        raise ConfigError(f"--hours and --days: {series.name} has no times of day; give it a `timestamp`")
    return replace(series, wanted=wanted_times(series.time_ms, hours, days, time_zone))


# -- options ----------------------------------------------------------------------------------------------------------


def _shape(family: ModelFamily, choice: Choice, features: int, scaling: str) -> Config:
    """The family's config with what was chosen of it."""
    shape: dict[str, Any] = {"features": features, "scaling": scaling}
    if choice.window is not None:
        shape["window"] = choice.window
    known = {one.name: one.default for one in fields(family.config)}
    for text in choice.shape:
        name, equals, value = text.partition("=")
        if not equals or name not in known or name in ("features", "scaling"):
            free = ", ".join(one for one in known if one not in ("features", "scaling"))
            raise ConfigError(f"--set {text}: write NAME=VALUE with a setting of {family.name}: {free}")
        shape[name] = _value(text, value, known[name])
    config: Config = family.config(**shape)
    return config


def _value(text: str, value: str, default: Any) -> Any:
    """A value of the type that the default has."""
    try:
        if isinstance(default, bool):
            return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[value.lower()]
        return value if default is MISSING or default is None else type(default)(value)
    except (ValueError, KeyError):
        kind = "true or false" if isinstance(default, bool) else f"a number such as {default}"
        raise ConfigError(f"--set {text}: {value!r} is not {kind}") from None


def _interval_ms(text: str | None) -> int:
    from stream.duration import parse_duration

    if text is None:
        return 0
    try:
        interval_ms = parse_duration(text)
    except ValueError as e:
        raise ConfigError(f"--interval {text}: {e}") from None
    if not interval_ms:
        raise ConfigError(f"--interval {text}: must be above 0")
    return interval_ms


def _check_zone(name: str) -> None:
    from stream.maintenance import zone_of

    try:
        zone_of(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise ConfigError(
            f"--time-zone {name}: is no time zone that is known here; write UTC or Europe/Berlin"
        ) from None
