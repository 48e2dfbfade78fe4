"""Commands of the model repository: tocsin models import, list, show, promote, rollback, verify, compare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stream.commands.shared import EPILOG, Entity, Json, points_of, say, settings_with
from stream.errors import CheckpointError, ConfigError, InputError

if TYPE_CHECKING:
    from stream.compare import ModelDifference

app = typer.Typer(help="The model repository: yours (TOCSIN_CHECKPOINTS), then the bundled one.", no_args_is_help=True)

REF = "NAME[@V|@LABEL]"
Ref = Annotated[
    str, typer.Argument(help="NAME (what is stable, else the highest version), NAME@1, NAME@canary.", metavar=REF)
]
Label = Annotated[str, typer.Option(help="Label to move.")]


@app.command("import", epilog=EPILOG)
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
    from models import repository
    from models.deepant import DeepAnTConfig
    from models.importing import import_state_dict
    from models.refs import check_name

    settings = settings_with()
    if (center is None) != (scale is None):
        raise ConfigError("--center and --scale: give both or neither")
    config = DeepAnTConfig(window=window, scaling="window" if center is None else "train")
    try:
        check_name(name)
        bundle = import_state_dict(
            file, config, None if center is None else [center], None if scale is None else [scale]
        )
    except CheckpointError as e:  # what the arguments name is not fit
        raise InputError(str(e)) from None
    typer.echo(str(repository.save(settings.checkpoints, name, bundle)))


@app.command("list", epilog=EPILOG)
def list_models(as_json: Json = False) -> None:
    """List the checkpoints, their versions and labels."""
    from models import repository

    where = settings_with().roots()
    for name in repository.names(where):
        versions = repository.versions(where, name)
        labels = {label: found[0] for label, found in repository.labels(where, name).items() if found}
        if as_json:
            typer.echo(json.dumps({"name": name, "versions": versions, "labels": labels}))
            continue
        of = {version: [label for label, at in labels.items() if at == version] for version in versions}
        said = [f"{version} ({', '.join(of[version])})" if of[version] else str(version) for version in versions]
        typer.echo(f"{name}  {', '.join(said)}")


@app.command("show", epilog=EPILOG)
def show_model(ref: Ref, as_json: Json = False) -> None:
    """Show a checkpoint's card: what it was trained on and how well; --json prints its config.json as one line."""
    from models import checkpoint
    from stream.service import load_checkpoint

    chosen = load_checkpoint(settings_with(), ref)
    if as_json:
        config = json.loads((chosen.path / checkpoint.CONFIG).read_text())
        typer.echo(json.dumps({"name": chosen.name, "version": chosen.version} | config))
    else:
        typer.echo(f"{chosen.path}\n\n{(chosen.path / checkpoint.CARD).read_text().strip()}")


@app.command("verify", epilog=EPILOG)
def verify_models(
    refs: Annotated[list[str] | None, typer.Argument(help="Some only; none: all versions.", metavar=REF)] = None,
) -> None:
    """Read checkpoints whole, hold every digest, shape and number; exit code 1 if one cannot be used."""
    from models import repository

    where = settings_with().roots()
    if refs:
        paths = [repository.resolve(where, ref) for ref in refs]
    else:
        homes = [home for name in repository.names(where) if (home := repository.home(where, name)) is not None]
        paths = [home / str(version) for home in homes for version in repository.versions(home.parent, home.name)]
    broken = 0
    for path in paths:
        try:
            typer.echo(f"{repository.read(path).ref}: fine")
        except CheckpointError as e:
            broken += 1
            say(str(e))
    if broken:
        raise CheckpointError(f"{broken} of {len(paths)} checkpoints cannot be used")


@app.command("promote", epilog=EPILOG)
def promote_model(ref: Ref, label: Label = "stable") -> None:
    """Give a version a label; a running service takes it up. What cannot be used is not promoted."""
    from models import repository
    from models.refs import parse_ref

    root = settings_with().checkpoints
    before = repository.promote(root, ref, label)
    name, _ = parse_ref(ref)
    version = repository.labels(root, name)[label][0]
    typer.echo(f"{name}@{label} is {name}@{version}" + (f", was {name}@{before}" if before else ""))


@app.command("rollback", epilog=EPILOG)
def roll_back_model(name: Annotated[str, typer.Argument(help="Name of the model.")], label: Label = "stable") -> None:
    """Take a label back to the version that had it before; a running service takes it up."""
    from models import repository

    left, back = repository.rollback(settings_with().checkpoints, name, label)
    typer.echo(f"{name}@{label} is {name}@{back}, was {name}@{left}")


@app.command("compare", epilog=EPILOG)
def compare_models(
    models: Annotated[
        list[str] | None,
        typer.Argument(help="Two references, to be run over --on; none: the one in force and its shadow.", metavar=REF),
    ] = None,
    files: Annotated[list[Path] | None, typer.Option("--on", help="CSV file for both; several: repeat.")] = None,
    as_json: Json = False,
    entity: Entity = False,
) -> None:
    """Show in which incidents two models differ, over files or as published.

    With --on, both judge the points of files, as `tocsin backtest` does. Without, what the service has published is
    held against what the models in the shadow have said of the same series.
    """
    from stream import compare, render

    if bool(files) != bool(models) or (models and len(models) != 2):
        raise ConfigError("give two models and the files to run them over, A B --on FILE, or neither")
    found = _over_files(models, files, entity) if models and files else _as_published()
    if as_json:
        render.write_line(json.dumps(compare.as_json(found)))
    else:
        render.print_models(found)


def _over_files(models: list[str], files: list[Path], entity: bool) -> ModelDifference:
    from stream import backtest, compare
    from stream.ruleset import RuleSet
    from stream.service import detector_factory, load_checkpoint, use_one_thread

    settings, points = settings_with(), points_of(files, entity=entity)
    use_one_thread()
    said = []
    for ref in models:
        detector = detector_factory(settings, RuleSet.default(settings.policy()), load_checkpoint(settings, ref))()
        said.append([event for _, result in backtest.run(detector, points) for event in result.events])
    return compare.compare_models(models[0], models[1], *said)


def _as_published() -> ModelDifference:
    import asyncio

    from stream import compare, verify
    from stream.discovery import find_servers
    from stream.events import EventData

    kafka = find_servers(settings_with(), store=False).kafka
    said, beside = (
        asyncio.run(verify.published(kafka, topic=topic)) for topic in (kafka.anomalies_topic, kafka.shadow_topic)
    )
    refs = sorted({event.data.model for event in beside if isinstance(event.data, EventData)})
    names = ", ".join(refs) or "nothing"
    return compare.compare_models("in force", f"in the shadow ({names})", compare.in_shadow(said, beside), beside)
