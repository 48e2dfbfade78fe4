"""Commands of the reject topic: tocsin rejects list, retry."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from stream.commands.doctor import since_ms_of
from stream.commands.shared import EPILOG, Json, say, settings_with
from stream.errors import ConfigError

if TYPE_CHECKING:
    from stream.rejects import Listing, Rejected, Retried

app = typer.Typer(help="Records that could not be used, and sending them in again.", no_args_is_help=True)

_VALUE_SHOWN = 80  # bytes of a value
_DETAIL_SHOWN = 120
_LEFT_SHOWN = 5

Reasons = Annotated[
    list[str] | None, typer.Option("--reason", help="Only those rejected for this reason; may be repeated.")
]
Since = Annotated[str | None, typer.Option(help="Only those rejected in this time: 30m, 1h, 2d.")]


@app.command("list", epilog=EPILOG)
def list_rejects(
    reason: Reasons = None,
    since: Since = None,
    limit: Annotated[int, typer.Option(help="The newest so many are shown; all are counted.")] = 20,
    records: Annotated[int, typer.Option(help="Records read from the end of each partition, at most.")] = 100_000,
    as_json: Json = False,
) -> None:
    """List what lies on the reject topic, why, and where it came from; how many of each reason at the end."""
    for option, value, least in (("--limit", limit, 0), ("--records", records, 1)):
        if value < least:
            raise ConfigError(f"{option} {value}: must be at least {least}")
    reasons, since_ms = _checked(reason), since_ms_of(since)
    from stream import rejects
    from stream.discovery import find_servers
    from stream.logs import set_up_logging

    kafka = find_servers(settings_with(), store=False).kafka
    set_up_logging("ERROR")
    listing = asyncio.run(rejects.list_rejects(kafka, reasons=reasons, since_ms=since_ms, limit=limit, records=records))
    if listing.left_out:
        say(f"only the last {records:,} records of each partition were read; a larger --records reads more")
    if listing.foreign:
        say(f"{listing.foreign:,} records of {kafka.rejects_topic} are no rejects of tocsin")
    _print_listing(listing, as_json=as_json)


@app.command("retry", epilog=EPILOG)
def retry_rejects(
    reason: Reasons = None,
    since: Since = None,
    limit: Annotated[int | None, typer.Option(help="Send so many, at most; none: all.")] = None,
    max_attempts: Annotated[int, typer.Option(help="Leave those alone for good that have come back so often.")] = 3,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be sent, and send nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Send rejects back to the points topic as they came, each once, however often this is run or killed.

    Worth it once the reason is gone: a clock was set right, a limit raised, a program mended. A record that is rejected
    again is a new reject, one attempt further. What a filter leaves out stays to be retried. Records of which not all
    bytes were kept cannot be sent.
    """
    for option, value in (("--limit", limit), ("--max-attempts", max_attempts)):
        if value is not None and value < 1:
            raise ConfigError(f"{option} {value}: must be at least 1")
    reasons, since_ms = _checked(reason), since_ms_of(since)
    from stream import rejects
    from stream.discovery import find_servers
    from stream.logs import set_up_logging

    kafka = find_servers(settings_with(), store=False).kafka
    set_up_logging("ERROR")
    wanted = rejects.Wanted(frozenset(reasons), since_ms, limit, max_attempts)
    _print_retried(asyncio.run(rejects.retry(kafka, wanted, dry_run=dry_run)), kafka.points_topic, dry_run, as_json)


def _checked(reasons: list[str] | None) -> list[str]:
    from stream.records import Reason

    known = get_args(Reason)
    for one in reasons or ():
        if one not in known:
            raise ConfigError(f"--reason {one}: there is none; there are {', '.join(known)}")
    return list(reasons or ())


# -- output -----------------------------------------------------------------------------------------------------------


def _shown(text: str, most: int) -> str:
    """Return text that cannot change the terminal, cut."""
    plain = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return plain if len(plain) <= most else f"{plain[: most - 1]}…"


def _document(one: Rejected) -> dict[str, Any]:
    from stream.events import iso_time

    return {
        "partition": one.partition,
        "offset": one.offset,
        "rejected": iso_time(one.rejected_ms),
        "reason": one.reason,
        "detail": one.detail,
        "topic": one.topic,
        "source_partition": one.source_partition,
        "source_offset": one.source_offset,
        "attempt": one.attempt,
        "bytes": len(one.value) if one.truncated_from is None else one.truncated_from,
        "truncated": one.truncated_from is not None,
        "key": None if one.key is None else one.key.decode("utf-8", "backslashreplace"),
        "value": one.value[:_VALUE_SHOWN].decode("utf-8", "backslashreplace"),
    }


def _print_listing(listing: Listing, *, as_json: bool) -> None:
    from rich.text import Text

    from stream import render

    for one in listing.newest:
        said = _document(one)
        if as_json:
            render.write_line(json.dumps(said, ensure_ascii=False))
            continue
        line = Text(f"{said['rejected'].replace('T', ' ').replace('Z', '')}  ")
        line.append(f"{one.reason:14}", "yellow").append(f"{one.place}  ")
        line.append(f"attempt {one.attempt}  " if one.attempt else "").append(_shown(one.detail, _DETAIL_SHOWN))
        line.append(f"  {_shown(said['value'], _VALUE_SHOWN)}", "dim")
        render.out.print(line)
    if as_json:
        render.write_line(json.dumps({"counts": dict(listing.counts.most_common()), "foreign": listing.foreign}))
        return
    total = listing.counts.total()
    if not total:
        render.out.print("no rejects")
        return
    if listing.newest:
        render.out.print()
    rows = [[reason, f"{count:,}"] for reason, count in listing.counts.most_common()] + [["all", f"{total:,}"]]
    for line in render.table(rows, right=(1,)):
        render.out.print(line)


def _print_retried(found: Retried, topic: str, dry_run: bool, as_json: bool) -> None:
    from stream import render

    if as_json:
        figures = {
            "sent": dict(found.sent.most_common()),
            "truncated": len(found.truncated),
            "given_up": len(found.given_up),
            "elsewhere": found.elsewhere,
            "foreign": found.foreign,
            "dry_run": dry_run,
        }
        render.write_line(json.dumps(figures))
        return
    for some, why in (
        (found.truncated, "too large to be kept whole: its sender has to send it again"),
        (found.given_up, "came back too often and is left alone from now on"),
    ):
        for one in some[:_LEFT_SHOWN]:
            say(f"{one.place}: {one.reason}, {why}")
        if len(some) > _LEFT_SHOWN:
            say(f"{len(some) - _LEFT_SHOWN:,} more, {why}")
    for count, what in ((found.elsewhere, "of another points topic"), (found.foreign, "no rejects of tocsin")):
        if count:
            say(f"{render.counted(count, 'record')} left alone: {what}")
    if not found.sent:
        render.out.print("nothing to send")
        return
    rows = [[reason, f"{count:,}"] for reason, count in found.sent.most_common()]
    rows.append([f"would be sent to {topic}" if dry_run else f"sent to {topic}", f"{found.sent.total():,}"])
    for line in render.table(rows, right=(1,)):
        render.out.print(line)
