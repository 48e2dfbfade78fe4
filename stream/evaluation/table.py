"""Figures as people and as programs read them: columns, a table of text, JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import msgspec

from stream.evaluation.metrics import DELAY
from stream.evaluation.runs import Figures


class Column(NamedTuple):
    """One figure: how it is headed, told and explained."""

    head: str
    cell: Callable[[Figures], str]
    note: str


def _number(x: float, digits: int = 3) -> str:
    return "–" if math.isnan(x) else f"{x:.{digits}f}"


COLUMNS: Final = (
    Column("AUC-PR", lambda f: _number(f.auc_pr), "average precision of the scores"),
    Column("VUS-PR", lambda f: _number(f.vus_pr), "the same with soft edges of the labels, as TSB-AD has it"),
    Column("F1", lambda f: _number(f.points.f1), f"of points, each segment to be flagged within {DELAY} points"),
    Column("precision", lambda f: _number(f.precision, 2), "share of incidents that touch a labelled segment"),
    Column("recall", lambda f: _number(f.recall, 2), "share of labelled segments in which an incident was open"),
    Column("delay", lambda f: _number(f.delay, 1), "points from a segment's beginning to its incident, the median"),
    Column("false/week", lambda f: _number(f.false_per_week, 2), "incidents that touch no labelled segment"),
    Column(
        "best PA-F1 (random)",
        lambda f: f"{_number(f.best_pa_f1)} ({_number(f.random_pa_f1)})",
        "point-adjusted, the threshold chosen by the labels; what random scores get on the same labels",
    ),
)
NAB_COLUMN: Final = Column("NAB", lambda f: _number(f.nab_score, 1), "Numenta's own score, standard profile")


def columns(rows: Sequence[Figures]) -> tuple[Column, ...]:
    """Return the columns that the rows fill."""
    return (*COLUMNS, *((NAB_COLUMN,) if any(not math.isnan(one.nab_score) for one in rows) else ()))


def lines(title: str, rows: Sequence[Figures]) -> list[str]:
    """Return a table of text."""
    shown = columns(rows)
    cells = [[title, *(one.head for one in shown)]]
    cells += [[f"  {row.model}", *(one.cell(row) for one in shown)] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]).rstrip()
        for line in cells
    ]


def notes(rows: Sequence[Figures]) -> list[str]:
    """Return what the columns mean, a line each."""
    shown = columns(rows)
    width = max(len(one.head) for one in shown)
    return [f"{one.head.ljust(width)}  {one.note}" for one in shown]


def as_json(figures: Figures) -> dict[str, Any]:
    """Return figures as JSON takes them; what does not apply is null."""
    told: dict[str, Any] = msgspec.to_builtins(figures, builtin_types=())
    del told["delays"]
    return {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in told.items()}
