"""What the commands share: options, settings, points of files, the summary at the end. Imports nothing heavy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from stream.csvfile import Table
    from stream.points import Points
    from stream.report import Summary
    from stream.settings import Settings

EPILOG = "Exit codes: 0 fine, 2 wrong setting or argument, 1 anything else, 130 interrupted."
SAMPLE_START_MS = 1_767_571_200_000  # 2026-01-05, a Monday
_SHOWN = 5  # of many problems of one kind

Files = Annotated[
    list[Path],
    typer.Argument(help="CSV files, plain or .gz: timestamp,value[,label], or a column per KPI.", metavar="FILE"),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON lines.")]
CheckpointRef = Annotated[
    str | None, typer.Option(help="Checkpoint that scores, NAME or NAME@VERSION; none: that of the settings.")
]
RulesRef = Annotated[
    Path | None, typer.Option("--rules", help="Rules file; none: that of the settings.", metavar="FILE")
]


Entity = Annotated[
    bool, typer.Option("--entity", help="Each file is one entity, named by its stem; its columns are the metrics.")
]


def say(text: str) -> None:
    """Tell people something that is no data."""
    typer.echo(text, err=True)


def settings_with(checkpoint: str | None = None, rules: Path | None = None) -> Settings:
    """Return the settings; what is given takes the place of theirs."""
    from stream.settings import load_settings

    given = {"checkpoint": checkpoint, "rules": None if rules is None else str(rules)}
    return load_settings().model_copy(update={name: value for name, value in given.items() if value is not None})


def tables_of(files: Sequence[Path], *, entity: bool = False) -> list[Table]:
    """Read CSV files, as KPIs or as an entity each; say which lines could not be used."""
    from stream import csvfile

    tables = []
    for file in files:
        table = csvfile.read_table(file, entity=entity)
        for line in table.refused[:_SHOWN]:
            say(f"{file}:{line.line}: not used: {line.reason}: {line.text}")
        if table.n_refused > _SHOWN:
            say(f"{file}: {table.n_refused - _SHOWN} more lines not used")
        tables.append(table)
    return tables


def points_of(files: Sequence[Path], *, entity: bool = False) -> Points:
    """Read CSV files as one stream, merged by time."""
    from stream import csvfile

    return csvfile.merge(tables_of(files, entity=entity))


def print_summary(summary: Summary, as_json: bool) -> None:
    """End a run: tables for people, or one last line of JSON."""
    from stream import render
    from stream.report import as_json as to_json

    if as_json:
        render.write_line(json.dumps(to_json(summary)))
    else:
        render.print_summary(summary)


class FewOnly:
    """Says the first few problems of one kind, and at the end how many more there were."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.count = 0

    def say(self, text: str) -> None:
        """Say this one, if it is among the first."""
        self.count += 1
        if self.count <= _SHOWN:
            say(text)

    def end(self) -> None:
        """Say how many were left out."""
        if self.count > _SHOWN:
            say(f"{self.count - _SHOWN} more {self.what}")
