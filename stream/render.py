"""What people read: one line an event, a table at the end, and progress bars. Data goes to stdout, all else to stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from stream import events
from stream.events import Event
from stream.report import Summary

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False)

_COLOUR = {"warning": "yellow", "major": "dark_orange", "critical": "bold red"}
_SEGMENTS_SHOWN = 40


def event_line(event: Event) -> Text:
    """Return an event as one readable line."""
    data, what = event.data, event.type.rsplit(".", 1)[-1]
    line = Text()
    line.append(event.time.replace("T", " ").replace("Z", "  "))
    line.append(f"{what:9}", "green" if what == "resolved" else "")
    line.append(f"{data.severity:9}", _COLOUR[data.severity])
    line.append(f"{data.kpi}  ")
    if what == "resolved":
        why = "back to normal" if data.reason == "recovered" else "accepted as the new normal"
        points = "1 point" if data.anomalies == 1 else f"{data.anomalies} points"
        line.append(f"{why} after {_duration(data.duration_s)}, {points} anomalous")
        if data.peak is not None:
            line.append(f", worst {data.peak.value:g} ({data.peak.ratio:.3g} × threshold)")
    else:
        line.append(f"{data.value:g}, expected {data.expected:g} ({data.lower:g} … {data.upper:g})")
        line.append(
            f", {data.ratio:.3g} × threshold, p {'<' if data.probability <= 1e-12 else '='} {data.probability:.2g}"
        )
        if data.window.completed:
            line.append(f", {data.window.completed} of {data.window.cells} points completed")
    return line


def print_event(event: Event, *, as_json: bool, console: Console | None = None) -> None:
    """Put an event on stdout; `console` is where a live progress bar stands, so that the line goes above it."""
    if as_json:
        sys.stdout.write(events.encode(event).decode() + "\n")
        sys.stdout.flush()
    else:
        (console or out).print(event_line(event))


def _duration(seconds: float) -> str:
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} d"


def summary_table(summary: Summary) -> Iterator[Table]:
    """Yield the tables that end a run."""
    figures = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    figures.add_row("points", f"{summary.points:,} of {summary.kpis} KPIs, {summary.scored:,} scored")
    figures.add_row("missing points completed", f"{summary.missing_completed:,}")
    if summary.rejected:
        figures.add_row("records rejected", f"{summary.rejected:,}")
    figures.add_row("events", f"{summary.events:,} of {summary.incidents:,} incidents")
    if summary.false_alarms is not None:
        figures.add_row("labelled segments caught", f"{summary.caught} of {len(summary.segments)}")
        figures.add_row("false alarms", f"{summary.false_alarms}")
    figures.add_row("points per second", f"{summary.points_per_s:,.0f}  ({summary.elapsed_s:.1f} s)")
    if summary.segments:
        table = Table(title="labelled segments", title_justify="left", box=None, padding=(0, 2, 0, 0))
        for header in ("KPI", "from", "to", "points", "caught"):
            table.add_column(header, justify="right" if header == "points" else "left")
        for segment in summary.segments[:_SEGMENTS_SHOWN]:
            caught = "[red]missed[/red]"
            if segment.incident is not None:
                caught = "at its first point" if not segment.delay_points else f"after {segment.delay_points} points"
            times = (text.replace("T", " ").replace("Z", "") for text in (segment.start, segment.end))
            table.add_row(segment.kpi, *times, str(segment.points), caught)
        yield table
        if len(summary.segments) > _SEGMENTS_SHOWN:
            yield Table(title=f"… and {len(summary.segments) - _SEGMENTS_SHOWN} more", box=None)
    yield figures


def print_summary(summary: Summary) -> None:
    """Put the tables on stdout."""
    for table in summary_table(summary):
        out.print()
        out.print(table)


@contextmanager
def progress(description: str, total: int) -> Iterator[tuple[Progress, int]]:
    """Show a bar on stderr where that is a terminal, and nothing where it is not."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=err,
        transient=True,
        disable=not err.is_terminal,
        # Without it a line on stdout would be printed into the bar; with it, it would be lost where stdout is a file.
        redirect_stdout=sys.stdout.isatty(),
    )
    with bar:
        yield bar, bar.add_task(description, total=total, note="")


def event_console(bar: Progress) -> Console | None:
    """Return where events are printed while the bar is shown: through it on a terminal, else straight to stdout."""
    return bar.console if sys.stdout.isatty() and err.is_terminal else None
