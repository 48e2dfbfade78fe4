"""The command that looks at a topic before it is watched: doctor."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stream.commands.shared import settings_with
from stream.errors import ConfigError, TocsinError

if TYPE_CHECKING:
    from stream.doctor import Examined
    from stream.findings import Finding
    from stream.proposal import Group
    from stream.tail import Extent

_COLOUR = {"problem": "bold red", "warning": "yellow", "note": "dim"}


def doctor(
    topic: Annotated[str | None, typer.Argument(help="Topic to look at; none: the points topic.")] = None,
    records: Annotated[int, typer.Option(help="Records from the end of each partition, at most.")] = 20_000,
    since: Annotated[str | None, typer.Option(help="Only what the broker received in this time: 30m, 1h, 2d.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document in place of the rules.")] = False,
) -> None:
    """Look at a topic of points: what is in it, what is wrong, which rules fit.

    Reads the end of each partition without joining a group and without committing. Prints a report on stderr and a
    proposal for a rules file, YAML, on stdout.
    """
    if records < 1:
        raise ConfigError(f"--records {records}: must be at least 1")
    since_ms = since_ms_of(since)
    from stream import render
    from stream.discovery import find_servers
    from stream.doctor import Sampler, examine
    from stream.findings import find
    from stream.logs import set_up_logging
    from stream.proposal import propose
    from stream.tail import read_tail

    settings = find_servers(settings_with(), store=False)
    set_up_logging("ERROR")
    name = topic or settings.kafka.points_topic
    sampler = Sampler(future_limit_ms=round(settings.future_limit_s * 1000))
    with render.progress("sample", records) as (bar, task):
        extent = asyncio.run(
            read_tail(
                settings.kafka,
                name,
                records=records,
                since_ms=since_ms,
                on_records=sampler.add,
                on_progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
        )
    examined = examine(sampler.sample())
    if not len(examined.sample.size):  # offsets of transactions only
        raise TocsinError(f"topic {name} at {settings.kafka.bootstrap_servers} holds no records: send points first")
    groups = propose(examined)
    findings = find(examined, groups, partitions=extent.partitions)
    about = _about(name, settings.kafka.bootstrap_servers, extent, examined)
    _report(about, examined, groups, findings)
    if as_json:
        render.write_line(json.dumps(_document(about, examined, groups, findings), ensure_ascii=False))
    elif groups:
        from stream.proposal import as_yaml

        head = [f"Proposed by `tocsin doctor {name}` from {about['records']:,} records,", f"{_time_span(about)}."]
        render.write_line(as_yaml(examined, groups, head).rstrip("\n"))


def since_ms_of(since: str | None) -> int | None:
    """Return the time that lies `--since` ago, ms since 1970; None for no choice."""
    from stream.duration import parse_duration

    if since is None:
        return None
    try:
        length_ms = parse_duration(since)
    except ValueError as e:
        raise ConfigError(f"--since {since}: {e}") from None
    return max(int(time.time() * 1000) - length_ms, 0)


def _about(topic: str, servers: str, extent: Extent, examined: Examined) -> dict[str, Any]:
    """Return what the sample is, as the JSON document has it."""
    import numpy as np

    from stream.events import iso_time
    from stream.findings import formats_of, keys_of

    sample = examined.sample
    arrived = sample.arrival_ms[sample.arrival_ms >= 0]
    times = {
        key: [iso_time(int(column.min())), iso_time(int(column.max()))] if len(column) else []
        for key, column in (("event_time", sample.timestamp_ms), ("received", arrived))
    }
    span_s = (int(arrived.max()) - int(arrived.min())) / 1000 if len(arrived) else 0.0
    return {
        "topic": topic,
        "bootstrap_servers": servers,
        "partitions": extent.partitions,
        "records": len(sample.size),
        "left_out": extent.left_out,
        "points": len(sample.value),
        "refused": sum(one.count for one in sample.refused.values()),
        "records_per_s": round(len(sample.size) / span_s, 1) if span_s > 0 else None,
        "record_bytes": {"median": int(np.median(sample.size)), "max": int(sample.size.max())},
        "keys": keys_of(sample),
        "timestamps": formats_of(sample),
        **times,
    }


def _document(
    about: dict[str, Any], examined: Examined, groups: Sequence[Group], findings: Sequence[Finding]
) -> dict[str, Any]:
    import msgspec

    from stream.proposal import rules

    return {
        **about,
        "series": msgspec.to_builtins(examined.series),
        "rejects": msgspec.to_builtins(list(examined.sample.refused.values())),
        "findings": msgspec.to_builtins(findings),
        "rules": rules(groups),
    }


# -- for people ------------------------------------------------------------------------------------------------------


def _time_span(about: dict[str, Any]) -> str:
    begin, end = (text.replace("T", " ") for text in about["event_time"])
    return f"event time {begin} to {end}"


def _report(about: dict[str, Any], examined: Examined, groups: Sequence[Group], findings: Sequence[Finding]) -> None:
    from rich.text import Text

    from stream import render
    from stream.proposal import counted

    size, rate = about["record_bytes"], about["records_per_s"]
    entities = sum(one.kind == "entity" for one in examined.series)
    lines = [
        f"{about['topic']} at {about['bootstrap_servers']}: {counted(about['records'], 'record')} of "
        f"{counted(about['partitions'], 'partition')}"
        + (f", {about['left_out']:,} older ones left out: a larger --records reads them" if about["left_out"] else ""),
        f"{counted(len(examined.series) - entities, 'KPI')} and {counted(entities, 'entity', 'entities')}, "
        f"{counted(about['points'], 'value')}; {size['median']:,} bytes a record, at most {size['max']:,}"
        + (f"; {rate:,g} records/s" if rate else ""),
    ]
    if examined.series:
        formats = ", ".join(f"{count:,} in {form}" for form, count in about["timestamps"].items())
        lines.append(f"{_time_span(about)}; timestamps: {formats}")
    for line in lines:
        render.err.print(Text(line), soft_wrap=True)
    if groups:
        render.err.print()
        for row in _table(examined, groups):
            render.err.print(Text(row), soft_wrap=True)
    render.err.print()
    for finding in findings:
        sentence = Text(f"{finding.level:8} ", _COLOUR[finding.level]).append(finding.text, "default")
        render.err.print(sentence, soft_wrap=True)
    if not findings:
        render.err.print(Text("nothing to find fault with"))
    render.err.print()


def _table(examined: Examined, groups: Sequence[Group]) -> list[str]:
    from stream.duration import say_duration
    from stream.proposal import about, look, percent

    rows = [["match", "series", "interval", "on grid", "jitter", "missing", "longest gap", "late", "by up to"]]
    for group in groups:
        seen = look(examined.series, group)
        match = group.match[0] + (f" +{len(group.match) - 1}" if len(group.match) > 1 else "")
        interval = say_duration(group.interval_ms) if group.interval_ms else "various" if seen.known else "unclear"
        rows.append([match, f"{len(group.members):,}", interval, *[""] * 6])
        if seen.known:
            rows[-1][3:6] = [percent(seen.on_grid), about(seen.jitter_ms), percent(seen.missing)]
            rows[-1][6] = about(seen.longest_gap_ms) if seen.longest_gap_ms else ""
        if group.late:
            rows[-1][7:] = [percent(group.late / group.records), about(group.late_ms)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
