"""Commands of the model repository: tocsin models import, list, show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from stream.commands.shared import EPILOG, Json, settings_with
from stream.errors import CheckpointError, ConfigError, InputError

app = typer.Typer(help="The model repository: yours (TOCSIN_CHECKPOINTS), then the bundled one.", no_args_is_help=True)


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

    settings = settings_with()
    if (center is None) != (scale is None):
        raise ConfigError("--center and --scale: give both or neither")
    config = DeepAnTConfig(window=window, scaling="window" if center is None else "train")
    try:
        repository.check_name(name)
        bundle = import_state_dict(
            file, config, None if center is None else [center], None if scale is None else [scale]
        )
    except CheckpointError as e:  # what the arguments name is not fit
        raise InputError(str(e)) from None
    typer.echo(str(repository.save(settings.checkpoints, name, bundle)))


@app.command("list", epilog=EPILOG)
def list_models(as_json: Json = False) -> None:
    """List the checkpoints and their versions."""
    from models import repository
    from stream.service import roots

    where = roots(settings_with())
    for name in repository.names(where):
        versions = repository.versions(where, name)
        line = json.dumps({"name": name, "versions": versions})
        typer.echo(line if as_json else f"{name}  {', '.join(map(str, versions))}")


@app.command("show", epilog=EPILOG)
def show_model(
    ref: Annotated[str, typer.Argument(help="NAME, for its highest version, or NAME@VERSION.", metavar="NAME[@V]")],
    as_json: Json = False,
) -> None:
    """Show a checkpoint's card: what it was trained on and how well; --json prints its config.json as one line."""
    from models import checkpoint
    from stream.service import load_checkpoint

    chosen = load_checkpoint(settings_with(), ref)
    if as_json:
        config = json.loads((chosen.path / checkpoint.CONFIG).read_text())
        typer.echo(json.dumps({"name": chosen.name, "version": chosen.version} | config))
    else:
        typer.echo(f"{chosen.path}\n\n{(chosen.path / checkpoint.CARD).read_text().strip()}")
