"""What a field of the rules file may hold: functions from a node to its value, with words for what is wrong."""

from __future__ import annotations

import difflib
import math
import re
import zoneinfo
from collections.abc import Callable, Collection, Mapping
from datetime import datetime
from fnmatch import translate
from typing import Final, TypeVar

from models.refs import parse_ref
from stream.columns import NAME_BYTES_MAX
from stream.duration import PERIODS_MS, UNITS_MS, parse_budget, parse_duration, say_budget, say_duration
from stream.errors import CheckpointError
from stream.maintenance import YEARS, instant_ms, zone_of
from stream.nodes import List, Node, Scalar

LONGEST_MS: Final = 366 * UNITS_MS["d"]  # of an interval, a warm-up, …
DAYS: Final = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_DAY_NAMES: Final = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
_TOPIC = re.compile(r"[a-zA-Z0-9._-]{1,249}")
_WHOLE = re.compile(r"[+-]?[0-9]{1,18}")
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?")
_CLOCK = re.compile(r"([01]?[0-9]|2[0-4]):([0-5][0-9])")
_INSTANT = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[T ][0-9]{2}:[0-9]{2}(?::[0-9]{2})?(?: ?(?:Z|[+-][0-9]{2}:[0-9]{2}))?"
)

T = TypeVar("T")


class WrongError(Exception):
    """A field has a wrong value."""

    def __init__(self, node: Node, message: str, at: str = "") -> None:
        super().__init__(message)
        self.node = node
        self.message = message
        self.at = at  # where in the field


def shown(text: str, *, quoted: bool = False) -> str:
    """Return a text as messages show it: short, and in quotes where they are asked for or needed."""
    short = text if len(text) <= 60 else f"{text[:59]}…"
    return repr(short) if quoted or not short.isprintable() or not short.strip() else short


def text_of(node: Node, most: int = 256) -> str:
    """Return a text of at most so many bytes, with nothing in it that cannot be seen."""
    if not isinstance(node, Scalar):
        raise WrongError(node, f"must be text, and is {node.kind}")
    if node.kind != "text":
        raise WrongError(node, f"is {node.kind} in YAML, and must be text; write {node.text!r} with its quotes")
    if not node.text.strip():
        raise WrongError(node, "is empty; give it a value, or remove it")
    if node.text != node.text.strip():
        raise WrongError(node, "begins or ends with a blank; remove that")
    if not node.text.isprintable():
        raise WrongError(node, "holds a control character, or one that cannot be shown; remove it")
    if len(node.text.encode()) > most:
        raise WrongError(node, f"is longer than {most} bytes")
    return node.text


def written(node: Node, what: str) -> str:
    """Return a value as it was written, in quotes or not."""
    if not isinstance(node, Scalar):
        raise WrongError(node, f"must be {what}, and is {node.kind}")
    return node.text.strip()


def bare(node: Node, what: str) -> str:
    """Return a value as it was written, without quotes."""
    text = written(node, what)
    if isinstance(node, Scalar) and not node.plain:
        raise WrongError(node, f"is text, and must be {what}; remove the quotes")
    return text


def each(node: Node, convert: Callable[[Node], T]) -> list[T]:
    """Return the one value, or all of a list; none of them twice."""
    if not isinstance(node, List):
        return [convert(node)]
    found: list[T] = []
    for index, item in enumerate(node.items):
        at = f"[{index}]"
        if item.empty:
            raise WrongError(item, "is empty; give it a value, or remove it", at)
        try:
            value = convert(item)
        except WrongError as e:
            raise WrongError(e.node, e.message, at) from None
        if value in found:
            raise WrongError(item, "is there twice; remove one", at)
        found.append(value)
    return found


def glob(node: Node) -> str:
    """Return a glob on series names."""
    glob = text_of(node, NAME_BYTES_MAX)
    at = 0
    while (at := glob.find("[", at)) >= 0:
        begin = at + 1 + (glob[at + 1 : at + 2] == "!")
        end = glob.find("]", begin + 1)  # a ] that comes first is one of the characters
        if end < 0:
            raise WrongError(node, "has a [ that is not closed; for the character itself write [[]")
        at = end
    if "(?!)" in translate(glob):
        raise WrongError(node, "has a range in [ ] that holds nothing, and so matches nothing; turn its ends round")
    return glob


def label(node: Node) -> str:
    """Return the name of a rule."""
    return text_of(node, NAME_BYTES_MAX)


def model(node: Node) -> str:
    """Return a reference to a checkpoint."""
    ref = text_of(node)
    try:
        parse_ref(ref)
    except CheckpointError as e:
        raise WrongError(node, f"is no model; {e}") from None
    return ref


def truth(node: Node) -> bool:
    """Return true or false."""
    words = {"true": True, "false": False}
    text = bare(node, "true or false")
    if text.lower() not in words:
        raise WrongError(node, "must be true or false")
    return words[text.lower()]


def choice(words: Mapping[str, T]) -> Callable[[Node], T]:
    """Read one of some words, and return what it stands for."""

    def convert(node: Node) -> T:
        text = written(node, " or ".join(words))
        if text not in words:
            near = difflib.get_close_matches(text[:100].lower(), words, n=1)
            hint = f"did you mean {near[0]}?" if near else f"write {' or '.join(words)}"
            raise WrongError(node, f"is none of {', '.join(words)}; {hint}")
        return words[text]

    return convert


def window_name(windows: Mapping[str, object]) -> Callable[[Node], str]:
    """Read the name of a maintenance window that is defined."""

    def convert(node: Node) -> str:
        name = text_of(node)
        if name not in windows:
            near = difflib.get_close_matches(name, windows, n=1)
            hint = f"did you mean {shown(near[0])}?" if near else "define it below `maintenance:` at the top level"
            raise WrongError(node, f"there is no such maintenance window; {hint}")
        return name

    return convert


def duration(least: int, most: int) -> Callable[[Node], int]:
    """Read a duration within bounds, in ms."""

    def convert(node: Node) -> int:
        try:
            ms = parse_duration(written(node, "a duration, such as 5m"))
        except ValueError as e:
            raise WrongError(node, str(e)) from None
        if not least <= ms <= most:
            low = f"at least {say_duration(least)} and " if least else ""
            raise WrongError(node, f"must be {low}at most {say_duration(most)}")
        return ms

    return convert


def whole(least: int, most: int) -> Callable[[Node], int]:
    """Read a whole number within bounds."""

    def convert(node: Node) -> int:
        text = bare(node, "a whole number")
        if not _WHOLE.fullmatch(text):
            raise WrongError(node, f"must be a whole number, {least} ... {most:,}")
        if not least <= int(text) <= most:
            raise WrongError(node, f"must lie in {least} ... {most:,}")
        return int(text)

    return convert


def number(least: float, most: float, *, what: str) -> Callable[[Node], float]:
    """Read a number within bounds; `what` says what it is."""

    def convert(node: Node) -> float:
        text = bare(node, "a number")
        if not _NUMBER.fullmatch(text):
            raise WrongError(node, f"must be a number, {what}: {least:g} ... {most:.3g}")
        if not least <= float(text) <= most:
            raise WrongError(node, f"must lie in {least:g} ... {most:.3g}, as {what}")
        return float(text)

    return convert


def drift(node: Node) -> int:
    """Return the depth of the drift correction in scores, 0 for none."""
    depth = whole(0, 10_000)(node)
    if depth == 1:
        raise WrongError(node, "must be 0 (off) or 2 ... 10,000 scores: the mean of one is that one")
    return depth


def least_deviation(node: Node) -> tuple[float, float]:
    """Return the least deviation: its absolute part, and its share of the expected value; 0 for one not given."""
    parts = [(f"[{index}]", item) for index, item in enumerate(node.items)] if isinstance(node, List) else [("", node)]
    found: dict[str, float] = {}
    for at, item in parts:
        if item.empty:
            raise WrongError(item, "is empty; give it a value, or remove it", at)
        text = written(item, "a number or a share, such as '10%'")
        number = text.removesuffix("%").rstrip()
        if not _NUMBER.fullmatch(number) or (number == text and isinstance(item, Scalar) and not item.plain):
            raise WrongError(item, "must be a number, 5, or a share of the expected value, '10%'", at)
        kind, most = ("share", 1e4) if text.endswith("%") else ("absolute", 1e30)
        if not 0 <= float(number) <= most:
            raise WrongError(item, f"must lie in 0 ... {most:g}{'%' if kind == 'share' else ''}", at)
        if kind in found:
            raise WrongError(item, "is the second of its kind; write one number, one share, or one of each", at)
        found[kind] = float(number)
    return found.get("absolute", 0.0), found.get("share", 0.0) / 100


def silent_after(interval_ms: int, wrong: bool) -> Callable[[Node], int]:
    """Read after how many intervals a series is silent, 0 for never; `wrong`: its interval is there, but wrong."""

    def convert(node: Node) -> int:
        text = written(node, "a number of intervals, a duration or never")
        if text.lower() == "never":
            return 0
        if isinstance(node, Scalar) and node.plain and _WHOLE.fullmatch(text):
            return whole(1, 1_000_000)(node)
        try:
            ms = parse_duration(text)
        except ValueError:
            raise WrongError(node, "must be a number of intervals, 10, a duration, 15m, or never") from None
        if not 0 < ms <= LONGEST_MS:
            raise WrongError(node, f"must be above 0 and at most {say_duration(LONGEST_MS)}, or never")
        if not interval_ms:
            if wrong:
                return 1
            raise WrongError(node, "is a duration, and needs an `interval` to count it in; add one, or write a number")
        return -(-ms // interval_ms)

    return convert


def clock(latest: int) -> Callable[[Node], int]:
    """Read a time of the day as its minute, at most `latest`."""

    def convert(node: Node) -> int:
        found = _CLOCK.fullmatch(written(node, "a time of the day, such as '22:00'"))
        minute = int(found[1]) * 60 + int(found[2]) if found else latest + 1
        if minute > latest:
            raise WrongError(node, f"is no time of the day; write '00:00' ... '{latest // 60}:{latest % 60:02}'")
        return minute

    return convert


def day(node: Node) -> int:
    """Return a day of the week, 0 is Monday."""
    text = text_of(node).lower()
    for names in (DAYS, _DAY_NAMES):
        if text in names:
            return names.index(text)
    near = difflib.get_close_matches(text, (*DAYS, *_DAY_NAMES), n=1)
    hint = f"did you mean {near[0]}?" if near else f"write some of [{', '.join(DAYS)}]"
    raise WrongError(node, f"is no day of the week; {hint}")


def time_zone(node: Node) -> str:
    """Return the name of a time zone that is known here."""
    name = text_of(node)
    try:
        if name.lower() != "localtime":  # another one on each machine
            zone_of(name)
            return name
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        pass
    near = difflib.get_close_matches(name, zoneinfo.available_timezones(), n=1)
    hint = f"did you mean {near[0]}?" if near else "write one of IANA's, such as Europe/Berlin"
    raise WrongError(node, f"is no time zone that is known here; {hint}")


def instant(zone: str) -> Callable[[Node], int]:
    """Read a date with its time, in a time zone unless it names its offset; ms since 1970 UTC."""

    def convert(node: Node) -> int:
        text = written(node, "a time, such as 2026-11-22T20:00")
        if not _INSTANT.fullmatch(text):
            raise WrongError(
                node, "is no date with its time; write it as 2026-11-22T20:00, or with +01:00 or Z behind it"
            )
        try:
            when = datetime.fromisoformat(text[:11] + text[11:].replace(" ", ""))
        except ValueError as e:
            raise WrongError(node, f"is no date with its time: {e}") from None
        if not 1970 < when.year < YEARS[1]:
            raise WrongError(node, f"must lie in 1971 ... {YEARS[1] - 1}")
        if when.tzinfo is not None:
            return round(when.timestamp() * 1000)
        try:
            return instant_ms(when, zone)
        except ValueError as e:
            raise WrongError(node, str(e)) from None

    return convert


def end_instant(zone: str, start_ms: int | None) -> Callable[[Node], int]:
    """Read when a window ends that starts then; None: nobody knows."""

    def convert(node: Node) -> int:
        end = instant(zone)(node)
        if start_ms is not None and end <= start_ms:
            raise WrongError(node, "is not after `start`")
        if start_ms is not None and end - start_ms > LONGEST_MS:
            raise WrongError(node, f"is more than {LONGEST_MS // UNITS_MS['d']} days after `start`")
        return end

    return convert


def budget(interval_ms: int, q_max: float) -> Callable[[Node], float]:
    """Read an alarm budget, as alarms per ms; 0 is an interval that is not known."""

    def convert(node: Node) -> float:
        try:
            found = parse_budget(text_of(node))
        except ValueError as e:
            raise WrongError(node, str(e)) from None
        q = found * interval_ms
        if q > q_max:
            share = "every point" if q >= 1 else f"one point in {1 / q:.3g}"
            most = f"at most {_at_most(q_max / interval_ms)} (q {q_max:.2g})"
            raise WrongError(node, f"is {share} at an interval of {interval_ms / 1000:g} s; {most}")
        return found

    return convert


def topic(reserved: Collection[str]) -> Callable[[Node], str]:
    """Read the name of a Kafka topic that is not one of those reserved."""

    def convert(node: Node) -> str:
        name = text_of(node)
        if not _TOPIC.fullmatch(name) or name in (".", ".."):
            raise WrongError(node, "is no name of a Kafka topic; 1 to 249 of a-z A-Z 0-9 . _ - are")
        if name.startswith("__"):
            raise WrongError(node, "is a name that Kafka keeps for itself; choose one without the underscores")
        if name in reserved:
            raise WrongError(node, "is a topic that this service itself reads or writes; choose another")
        return name

    return convert


def _at_most(alarms_per_ms: float) -> str:
    """Return a bound in words, rounded down."""
    for period, size in PERIODS_MS.items():
        count = alarms_per_ms * size
        if count >= 1:
            return f"{math.floor(count * 10 + 1e-6) / 10:g} per {period}"
    return say_budget(alarms_per_ms)
