"""The command that says what a model is worth on labelled data: evaluate."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stream.commands.shared import Entity, Json, RulesRef, say, settings_with
from stream.errors import ConfigError

if TYPE_CHECKING:
    from stream.detector import Served
    from stream.evaluation.data import Series
    from stream.evaluation.runs import Figures, Run
    from stream.settings import Settings

_HALF = 0.5

Served_ = Callable[["Series"], "Served"]
Draw = Callable[[Sequence[tuple["Series", "Run", "list[Figures]"]], Sequence["Figures"]], None]


def evaluate(
    files: Annotated[
        list[Path],
        typer.Argument(help="Labelled files: CSV, Parquet or npz (train, test and label).", metavar="FILE"),
    ],
    model: Annotated[
        str,
        typer.Option(
            help="Checkpoint, NAME or NAME@VERSION; with --train-fraction, or for an npz with its own training part, a "
            "family, trained anew on each series; or `neighbours`."
        ),
    ] = "deepant",
    train_fraction: Annotated[
        float | None,
        typer.Option(
            help="First part of each series, to learn from; the rest is judged. Without: half, baselines only."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the training.")] = 0,
    shape: Annotated[
        list[str] | None,
        typer.Option("--set", help="A setting of the family's, such as hidden=64; repeatable.", metavar="NAME=VALUE"),
    ] = None,
    entity: Entity = False,
    nab: Annotated[
        bool | None,
        typer.Option("--nab/--no-nab", help="Labels are NAB's windows; without: where a file lies in NAB's folders."),
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Write charts and tables to this HTML file.")] = None,
    png: Annotated[Path | None, typer.Option(help="Write the chart of the first file to this PNG file.")] = None,
    rules: RulesRef = None,
    as_json: Json = False,
) -> None:
    """Say what a model is worth on labelled data, beside chance and three simple baselines.

    All go through the detector that the service runs, with your settings: alarms rest on the same threshold, which no
    label has touched. The first part of each series is learned from, its labels too are never seen; the rest is judged.
    """
    from stream import render
    from stream.evaluation import data, table
    from stream.evaluation.baselines import BASELINES
    from stream.evaluation.runs import judge, overall, run
    from stream.service import load_rules, use_one_thread

    if train_fraction is not None and not 0 < train_fraction < 1:
        raise ConfigError(f"--train-fraction {train_fraction}: must lie between 0 and 1")
    draw = _drawing(report, png)
    settings = settings_with(None, rules)
    use_one_thread()
    every = [
        one
        for path in files
        for one in data.read(
            path,
            fraction=train_fraction or _HALF,
            entity=entity,
            as_nab=nab,
            interval_ms=round(settings.interval_s * 1000),
        )
    ]
    contenders: dict[str, Served_] = {model: _served(settings, model, train_fraction is not None, seed, shape or ())}
    contenders |= {name: _baseline(settings, name) for name in BASELINES}
    config, watch = settings.detector(), load_rules(settings).rules
    found: dict[str, list[Figures]] = {name: [] for name in contenders}
    drawn: list[tuple[Series, Run, list[Figures]]] = []
    with render.progress("evaluate", len(every) * len(contenders)) as (bar, task):
        for series in every:
            rows: list[Figures] = []
            for name, served in contenders.items():
                bar.update(task, note=f"{series.name}: {name}")
                made = run(series, served(series), config, watch)
                rows.append(judge(name, series, made))
                found[name].append(rows[-1])
                if name == model and draw is not None:
                    drawn.append((series, made, rows))
                bar.advance(task)
            _tell(f"{series.category}/{series.name}", rows, as_json)
    together = [overall(name, several) for name, several in found.items()]
    if as_json:
        render.write_line(json.dumps({"evaluate": {"series": len(every), "models": [*map(table.as_json, together)]}}))
    else:
        if len(every) > 1:
            _tell(f"all {len(every)} series", together, as_json=False)
        for line in table.notes(together):
            render.write_line(line)
    if draw is not None:
        draw(drawn, together)


def _tell(title: str, rows: Sequence[Figures], as_json: bool) -> None:
    from stream import render
    from stream.evaluation import table

    if as_json:
        render.write_line(json.dumps({"series": title, "models": [table.as_json(one) for one in rows]}))
        return
    for line in [*table.lines(title, rows), ""]:
        render.write_line(line)


def _served(settings: Settings, model: str, train: bool, seed: int, shape: Sequence[str]) -> Served_:
    """Return what makes the model of a series: it is loaded once, or trained on the part to learn from.

    Raises:
        ConfigError: there is neither a checkpoint nor, where one is to be trained, a family of that name.
    """
    from models.families import NAMES
    from stream.evaluation.baselines import BASELINES, MAKERS

    if model in {**MAKERS, **BASELINES}:
        return _baseline(settings, model)

    def trained(series: Series) -> Served:
        from stream import backtest, registry
        from stream.commands.train import Choice, fit

        part = series.learned(round(settings.interval_s * 1000))
        bundle = fit([part], Choice(model, seed=seed, shape=shape))
        return registry.served(backtest.trained_checkpoint(bundle), settings.pot.config())

    if model in NAMES and train:
        return trained
    from stream import registry
    from stream.service import load_checkpoint

    loaded: list[Served] = []

    def general(series: Series) -> Served:
        if model in NAMES and series.own_part:
            return trained(series)
        if not loaded:
            loaded.append(registry.served(load_checkpoint(settings, model), settings.pot.config()))
        return loaded[0]

    if model not in NAMES:
        loaded.append(registry.served(load_checkpoint(settings, model), settings.pot.config()))
    return general


def _drawing(report: Path | None, png: Path | None) -> Draw | None:
    """Return what writes the charts; None where none are wanted. What is missing for it is said before the work."""
    if report is None and png is None:
        return None
    from stream.evaluation import charts

    charts.check(png=png is not None)

    def draw(drawn: Sequence[tuple[Series, Run, list[Figures]]], together: Sequence[Figures]) -> None:
        if report is not None:
            charts.write_html(report, drawn, together)
            say(f"{report}: written")
        if png is not None:
            charts.write_png(png, *drawn[0])
            say(f"{png}: written")

    return draw


def _baseline(settings: Settings, name: str) -> Served_:
    from stream.evaluation import baselines

    interval_ms = round(settings.interval_s * 1000)
    return lambda series: baselines.served(name, series.learned(interval_ms))
