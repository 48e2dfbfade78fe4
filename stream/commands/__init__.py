"""The commands of `tocsin`, each a thin function: options in, one call into the service, output."""

from __future__ import annotations

from typing import Annotated

import typer

from stream.commands import doctor, evaluate, files, live, rejects, repository, state, train
from stream.commands.shared import EPILOG

app = typer.Typer(
    name="tocsin",
    help="Streaming KPI anomaly detector: Kafka in, anomaly events out. `tocsin demo` shows it at work.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"tocsin {version('tocsin')}")
        raise typer.Exit


@app.callback(epilog=f"Settings are TOCSIN_… environment variables: tocsin check --settings. {EPILOG}")
def _common(
    _: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    pass


for command in (live.demo, live.up, live.serve, live.replay, live.subscribe, files.backtest, train.train, files.sample):
    app.command(epilog=EPILOG)(command)
app.command(epilog=EPILOG)(evaluate.evaluate)
app.add_typer(repository.app, name="models")
app.add_typer(state.app, name="state")
app.add_typer(rejects.app, name="rejects")
app.command(epilog=EPILOG)(doctor.doctor)
app.command(epilog=EPILOG)(live.check)

__all__ = ["app"]
