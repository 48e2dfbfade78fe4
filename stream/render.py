"""What people read: a line for each event, a table at the end, progress bars. Data to stdout, all else to stderr."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import msgspec
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from stream import events
from stream.errors import TocsinError
from stream.events import Event, EventData, SilenceData
from stream.report import Segment, Summary

if TYPE_CHECKING:
    from stream.compare import ModelDifference
    from stream.verify import Comparison


class OutputClosed(TocsinError):
    """Whoever read our output has gone (`tocsin … | head`): nothing is wrong, and nobody is left to tell."""

    exit_code = 0


class _Out(Console):
    def on_broken_pipe(self) -> None:
        raise OutputClosed


out = _Out(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False)

_COLOUR = {"warning": "yellow", "major": "dark_orange", "critical": "bold red"}
_SEGMENTS_SHOWN = 40
_MISSED = "missed"


def event_line(event: Event) -> Text:
    """Return an event as one readable line."""
    data, what = event.data, event.type.rsplit(".", 1)[-1]
    line = Text()
    line.append(event.time.replace("T", " ").replace("Z", "  "))
    line.append(f"{what:10}", {"resolved": "green", "resumed": "green", "silent": "magenta"}.get(what, ""))
    if isinstance(data, SilenceData):
        line.append(f"{'':9}{data.kpi}  ")
        last = data.last_seen.replace("T", " ").replace("Z", "")
        if what == "resumed":
            line.append(f"sends points again after {_duration(data.silent_s)}")
        else:
            line.append(f"no point for {_duration(data.silent_after_s)}, the last one at {last}")
            line.append(", by the clock" if data.basis == "wall_clock" else "")
        return line
    line.append(f"{data.severity:9}", _COLOUR[data.severity])
    line.append(f"{data.kpi}  ")
    if what == "retracted":
        line.append("late points show that nothing was wrong")
    elif data.reason:
        why = "back to normal" if data.reason == "recovered" else "accepted as the new normal"
        line.append(f"{why} after {_duration(data.duration_s)}, {counted(data.anomalies, 'anomalous point')}")
        if data.peak is not None:
            worst = "" if data.peak.value is None else f"{number(data.peak.value, _width(data))} "
            line.append(f", worst {worst}({_ratio(data.peak.ratio)} × threshold)")
    else:
        line.append(_found(data))
    if data.supersedes and what == "corrected":
        line.append(f", in place of {data.supersedes}")
    return line


def _width(data: EventData) -> float:
    return 0.0 if data.upper is None or data.lower is None else data.upper - data.lower


def _found(data: EventData) -> str:
    """Return what was found and what had been expected."""
    if data.value is None or data.expected is None or data.lower is None or data.upper is None:
        found = ", ".join(f"{one.metric} {one.share:.0%}" for one in data.features)
    else:
        lower, expected, upper = (number(x, _width(data)) for x in (data.lower, data.expected, data.upper))
        found = f"{number(data.value, _width(data))}, expected {expected} ({lower} … {upper})"
    found += f", {_ratio(data.ratio)} × threshold, p {'<' if data.probability <= 1e-12 else '='} {data.probability:.2g}"
    if data.window.completed:
        found += f", {data.window.completed} of {data.window.cells} points completed"
    return found


def print_event(event: Event, *, as_json: bool, console: Console | None = None) -> None:
    """Put an event on stdout; `console` is where a live progress bar stands, so that the line goes above it."""
    if as_json:
        write_line(events.encode(event).decode())
    elif console is not None:
        console.print(event_line(event), soft_wrap=True)
    else:
        out.print(event_line(event))


def print_comparison(found: Comparison, *, as_json: bool) -> None:
    """Put on stdout what differs between what was published and a back-test, and how much does not."""
    if as_json:
        for word, some in (("missing", found.missing), ("unexpected", found.unexpected)):
            for event in some:
                write_line(json.dumps({word: msgspec.to_builtins(event)}))
        for one in found.different:
            sides = {"published": msgspec.to_builtins(one.published), "expected": msgspec.to_builtins(one.expected)}
            write_line(json.dumps({"different": {"fields": one.fields, **sides}}))
        figures = {name: len(getattr(found, name)) for name in ("missing", "unexpected", "different")}
        figures = {"equal": found.equal, **figures, "by_clock": found.by_clock, "left_out": found.left_out}
        write_line(json.dumps({"verify": figures}))
        return
    lines: list[Text] = []
    for word, some in (("missing", found.missing), ("unexpected", found.unexpected)):
        lines += [Text.assemble((f"{word:11}", "red"), event_line(event)) for event in some]
    for one in found.different:
        lines.append(Text.assemble((f"{'different':11}", "red"), event_line(one.published)))
        for name in one.fields:
            if name == "order":
                lines.append(Text(f"{'':11}comes in another order"))
            else:
                published, expected = (_field(event, name) for event in (one.published, one.expected))
                lines.append(Text(f"{'':11}{name}: {published} published, {expected} expected"))
    said = f"{counted(found.equal, 'event')} equal, {len(found.missing):,} missing, "
    lines.append(Text(f"{said}{len(found.unexpected):,} unexpected, {len(found.different):,} different"))
    for count, what in ((found.by_clock, "by the clock"), (found.left_out, "in partitions that others share")):
        if count:
            lines.append(Text(f"left out: {counted(count, 'event')} of silence {what}, which no back-test knows"))
    for line in lines:
        out.print(line)


def print_models(found: ModelDifference) -> None:
    """Print how the incidents of two models differ."""
    rows = [
        ["reported by both", str(found.both)],
        [f"  of them earlier by {found.second}", str(found.earlier)],
        ["  of them later", str(found.later)],
        [f"by {found.first} only", str(len(found.only_first))],
        [f"by {found.second} only", str(len(found.only_second))],
    ]
    for line in table(rows, right=(1,)):
        out.print(line)
    for name, only in ((found.first, found.only_first), (found.second, found.only_second)):
        for one in only[:_SEGMENTS_SHOWN]:
            out.print(f"only {name}: {one.opened} – {one.ended or 'goes on'}  {one.kpi}")
        if len(only) > _SEGMENTS_SHOWN:
            out.print(f"only {name}: {len(only) - _SEGMENTS_SHOWN} more")


def _field(event: Event, path: str) -> str:
    value = msgspec.to_builtins(event)
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return "nothing" if value is None else json.dumps(value, ensure_ascii=False)


def write_line(text: str) -> None:
    """Put a line on stdout, at once.

    Raises:
        OutputClosed: nobody reads it.
    """
    try:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        raise OutputClosed from None


def counted(n: int, what: str) -> str:
    """Return a number of things in words: 1 point, 7,954 points."""
    return f"{n:,} {what}" if n == 1 else f"{n:,} {what}s"


def counted_series(kpis: int, entities: int) -> str:
    """Return numbers of KPIs and entities in words."""
    said = [counted(kpis, "KPI")] * (kpis > 0 or not entities)
    return " and ".join(said + [f"{entities:,} {'entity' if entities == 1 else 'entities'}"] * (entities > 0))


def number(x: float, width: float) -> str:
    """Return a value with three digits of the width of its band; more mean nothing to people."""
    if not 1e-4 <= max(abs(x), width) < 1e12 or not 0 < width < math.inf:
        return f"{x:.4g}"
    return f"{x:,.{min(max(2 - math.floor(math.log10(width)), 0), 9)}f}"


def _ratio(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 100 else f"{ratio:.3g}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} d"


def summary_lines(summary: Summary) -> list[Text]:
    """Return the tables that end a run, line by line, none wider than its cells."""
    lines: list[Text] = []
    if summary.segments:
        several = summary.kpis + summary.entities > 1
        what = "entity" if summary.entities and not summary.kpis else "KPI"
        rows = [["labelled segment", "", "points", "", *[what] * several]]
        for segment in summary.segments[:_SEGMENTS_SHOWN]:
            rows.append([*_span(summary.segments, segment), f"{segment.points:,}", _caught(segment)])
            rows[-1] += [segment.kpi] * several
        lines += table(rows, right=(2,))
        if len(summary.segments) > _SEGMENTS_SHOWN:
            lines.append(Text(f"… and {len(summary.segments) - _SEGMENTS_SHOWN:,} more"))
        lines.append(Text())
    silences = f" and {counted(summary.silences, 'silence')}" if summary.silences else ""
    figures = [
        [
            "points",
            f"{summary.points:,} of {counted_series(summary.kpis, summary.entities)}, {summary.scored:,} scored",
        ],
        ["missing points completed", f"{summary.missing_completed:,}"],
        ["events", f"{summary.events:,} of {counted(summary.incidents, 'incident')}" + silences],
    ]
    if summary.rejected:
        figures.insert(1, ["points rejected", f"{summary.rejected:,}"])
    if summary.false_alarms is not None:
        figures.append(["labelled segments caught", f"{summary.caught} of {len(summary.segments)}"])
        figures.append(["false alarms", f"{summary.false_alarms:,}"])
    figures.append(["points per second", f"{summary.points_per_s:,.0f} ({summary.elapsed_s:.1f} s)"])
    return lines + table(figures)


def _caught(segment: Segment) -> str:
    if segment.incident is None:
        return _MISSED
    return f"after {counted(segment.delay_points, 'point')}" if segment.delay_points else "at its first point"


def _span(segments: Sequence[Segment], segment: Segment) -> tuple[str, str]:
    """Return begin and end of a segment as short as they are clear: no year where all are of one, no day twice."""
    times = [time for one in segments for time in (one.start, one.end)]
    cut_year = len({time[:4] for time in times}) == 1
    length = 16 if all(time[17:] == "00Z" for time in times) else 19  # to the minute, or to the second
    start, end = (time[:length].replace("T", " ") for time in (segment.start, segment.end))
    skipped = 11 if start[:10] == end[:10] else 5 * cut_year
    return start[5 * cut_year :], f"– {end[skipped:]}" if end != start else ""


def table(rows: list[list[str]], *, right: tuple[int, ...] = ()) -> list[Text]:
    """Return rows as lines, each column as wide as its widest cell; those of `right` stand on the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        line = Text("  ".join(cells).rstrip())
        line.highlight_words([_MISSED], "red")
        lines.append(line)
    return lines


def print_summary(summary: Summary) -> None:
    """Put the tables on stdout."""
    for line in [Text(), *summary_lines(summary)]:
        out.print(line)


@contextmanager
def progress(description: str, total: int) -> Iterator[tuple[Progress, TaskID]]:
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
