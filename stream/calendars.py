"""Maintenance windows from iCalendar files: the events of an .ics file (RFC 5545) are the windows.

Events that are cancelled or have no length count for nothing. A local time that the clocks skip is taken by the offset
before, one that they show twice is the first, as the standard has it; a repeated event ends when the clocks show its
end. Reading and repeating is done by `icalendar` and `recurring_ical_events`, the extra `calendar`; what is here
refuses what would keep them busy for too long.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from itertools import islice
from typing import Any, Final, Self

import numpy as np

from stream.columns import BoolArray, Int64Array
from stream.errors import ConfigError
from stream.maintenance import YEARS, zone_of

BYTES_MAX: Final = 2**20
EVENTS_MAX: Final = 5_000
REPEATING_MAX: Final = 500  # events with a rule: each is tried out, and expanded month by month
PER_DAY_MAX: Final = 200.0  # occurrences of all rules together: a month of them takes some 0.2 s
_TRIAL_YEARS: Final = 40  # no rule that happens at all pauses longer: Sunday, 29 February came in 1880, then in 1920
_TRIAL: Final = 100  # occurrences that tell how many a rule has
_TRIED_MONTHS: Final = 24
_NONE: Final = (np.zeros(0, np.int64), np.zeros(0, np.int64))
_EXTRA: Final = "pip install 'tocsin[calendar]'"


@dataclass(frozen=True, slots=True)
class Calendar:
    """The events of an iCalendar file, expanded a month at a time as points come to it."""

    data: bytes = field(repr=False)
    time_zone: str = "UTC"  # of whole days, and of times that name no zone
    _query: Any = field(default=None, repr=False, compare=False)
    _months: dict[int, tuple[Int64Array, Int64Array]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @classmethod
    def parse(cls, data: bytes, time_zone: str = "UTC") -> Self:
        """Read and check an iCalendar file.

        Raises:
            ConfigError: the extra `calendar` is not installed; or the file is empty, too large, damaged, without an
                event, or has a rule that repeats every minute or never; the message says which event.
        """
        try:
            import recurring_ical_events
            from icalendar import Calendar as Parser
        except ImportError:
            raise ConfigError(f"an iCalendar file needs the extra `calendar`: {_EXTRA}") from None
        _check_text(data)
        try:
            parsed: Any = Parser.from_ical(data)
        except Exception as e:  # the parser lets errors of many kinds through
            raise ConfigError(f"is no iCalendar file: {_one_line(e)}") from None
        events: list[Any] = list(parsed.walk("VEVENT"))
        _check_events(events)
        starts = [event["DTSTART"].dt for event in events]
        try:
            calendar = cls(data, time_zone, recurring_ical_events.of(parsed))
            # A defect that no check knew shows here, and not when points come.
            for index in sorted({(start.year - 1970) * 12 + start.month - 1 for start in starts})[-_TRIED_MONTHS:]:
                calendar._expand(index)
        except Exception as e:
            raise ConfigError(f"has events that cannot be told: {_one_line(e)}") from None
        return calendar

    def active(self, timestamp_ms: Int64Array) -> BoolArray:
        """Say of each time, (N,) int64 ms, whether an event is on."""
        active = np.zeros(len(timestamp_ms), np.bool_)
        month = timestamp_ms.astype("datetime64[ms]").astype("datetime64[M]").astype(np.int64)
        for index in np.unique(month).tolist():
            starts, ends = self._month(index)
            if not len(starts):
                continue
            here = month == index
            at = np.searchsorted(starts, timestamp_ms[here], side="right") - 1
            active[here] = (at >= 0) & (timestamp_ms[here] < ends[at])
        return active

    def _month(self, index: int) -> tuple[Int64Array, Int64Array]:
        known = self._months.get(index)
        if known is None:
            try:
                known = self._expand(index)
            except Exception:  # the library's; `parse` has tried the months in which events begin
                known = _NONE  # an alarm too many, where the other way would be a detector that stops
            self._months[index] = known
        return known

    def _expand(self, index: int) -> tuple[Int64Array, Int64Array]:
        """Return start and end, ms, of the events that touch a month (UTC, 0 = January 1970); sorted, disjoint."""
        year, month = 1970 + index // 12, index % 12 + 1
        if not YEARS[0] <= year < YEARS[1]:
            return _NONE
        # Asked without a zone, as each event has its own; so a margin that no offset from UTC exceeds.
        first = datetime(year, month, 1) - timedelta(days=2)  # noqa: DTZ001
        spans: list[tuple[int, int]] = []
        for event in self._query.between(first, first + timedelta(days=31 + 4)):
            first_shown, last_shown = event["DTSTART"].dt, event["DTEND"].dt
            start, end = self._instant(first_shown), self._instant(last_shown)
            if end <= start:  # clocks are set forward over the start: it keeps its length
                end = start + round((last_shown - first_shown) / timedelta(milliseconds=1))
            if start < end and str(event.get("STATUS", "")).upper() != "CANCELLED":
                spans.append((start, end))
        merged: list[tuple[int, int]] = []
        for start, end in sorted(spans):
            if merged and start <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(merged[-1][1], end))
            else:
                merged.append((start, end))
        table = np.array(merged, np.int64).reshape(-1, 2)
        return table[:, 0].copy(), table[:, 1].copy()

    def _instant(self, when: date | datetime) -> int:
        if not isinstance(when, datetime):
            when = datetime(when.year, when.month, when.day)  # noqa: DTZ001
        if when.tzinfo is None:
            when = when.replace(tzinfo=zone_of(self.time_zone))
        return round(when.timestamp() * 1000)


_OFTEN = re.compile(r"(?:^|;)FREQ=(SECONDLY|MINUTELY|HOURLY)(?:;|$)", re.IGNORECASE)
_YEARLY = re.compile(r"(?:^|;)FREQ=YEARLY(?:;|$)", re.IGNORECASE)


def _check_text(data: bytes) -> None:
    """Refuse what must not even reach the parser, which expands the rules of a VTIMEZONE at once and in full."""
    if not data.strip():
        raise ConfigError("is empty: an iCalendar file begins with BEGIN:VCALENDAR")
    if len(data) > BYTES_MAX:
        raise ConfigError(f"is larger than {BYTES_MAX:,} bytes; export the maintenance calendar alone")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise ConfigError(f"line {data.count(10, 0, e.start) + 1}: is not UTF-8") from None
    in_zone = False
    for number, line in _unfolded(text):
        name, _, value = line.partition(":")
        name, value = name.partition(";")[0].strip().upper(), value.strip()
        if name in ("BEGIN", "END") and value.upper() == "VTIMEZONE":
            in_zone = name == "BEGIN"
        if name != "RRULE":
            continue
        if often := _OFTEN.search(value):
            raise ConfigError(
                f"line {number}: {value[:80]!r} repeats {often[1].lower()}: no maintenance does; the most frequent "
                "rule is FREQ=DAILY, with BYHOUR for several times a day"
            )
        if in_zone and not _YEARLY.search(value):
            raise ConfigError(f"line {number}: {value[:80]!r} in a VTIMEZONE: clocks change by FREQ=YEARLY")


def _unfolded(text: str) -> Iterator[tuple[int, str]]:
    """Yield (number of its first line, content line): a line that begins with a blank goes on the one before."""
    number, parts = 0, [""]
    for at, line in enumerate(text.splitlines(), 1):
        if line[:1] in (" ", "\t"):
            parts.append(line[1:])
        else:
            yield number, "".join(parts)
            number, parts = at, [line]
    yield number, "".join(parts)


def _check_events(events: list[Any]) -> None:
    if not events:
        raise ConfigError("holds no event (VEVENT): it would never mute anything")
    if len(events) > EVENTS_MAX:
        raise ConfigError(
            f"holds {len(events):,} events, at most {EVENTS_MAX:,}; export the maintenance calendar alone"
        )
    repeating, per_day, lasting = 0, 0.0, 0
    for number, event in enumerate(events, 1):
        label = f"event {number}"
        if summary := str(event.get("SUMMARY", "")).strip():
            label += f" ({summary[:40]!r})"
        try:
            lasting += _check_event(event)
            for rule in _listed(event, "RRULE"):
                repeating += 1
                if repeating > REPEATING_MAX:
                    raise ValueError(f"is the {repeating}th that repeats, at most {REPEATING_MAX} may")
                per_day += _per_day(rule.to_ical().decode(), event["DTSTART"].dt)
                if per_day > PER_DAY_MAX:
                    raise ValueError(
                        f"makes it more than {PER_DAY_MAX:g} occurrences a day; write longer, fewer windows"
                    )
        except Exception as e:
            raise ConfigError(f"{label} {_one_line(e)}") from None
    if not lasting:
        raise ConfigError(f"mutes nothing: each of its {len(events)} events is cancelled or has no length")


def _check_event(event: Any) -> bool:
    """Say whether the event mutes anything.

    Raises:
        ValueError: it cannot be understood.
    """
    if event.errors:
        name, reason = event.errors[0]
        raise ValueError(f"has a damaged {name}: {reason}")
    if "DTSTART" not in event:
        raise ValueError("has no DTSTART")
    for name in ("DTSTART", "DTEND", "RECURRENCE-ID", "EXDATE", "RDATE"):
        for one in _listed(event, name):
            for value in getattr(one, "dts", [one]):
                when, zone = value.dt, one.params.get("TZID")
                when = when[0] if isinstance(when, tuple) else when
                if zone and isinstance(when, datetime) and when.tzinfo is None:
                    raise ValueError(
                        f"has a {name} in time zone {zone!r}, which neither the file (VTIMEZONE) nor IANA knows"
                    )
                if not YEARS[0] <= when.year < YEARS[1]:
                    raise ValueError(f"has a {name} in {when.year}, outside {YEARS[0]} ... {YEARS[1] - 1}")
    start = event["DTSTART"].dt
    end = event["DTEND"].dt if "DTEND" in event else None
    length = event["DURATION"].dt if "DURATION" in event else None
    if end is not None and isinstance(end, datetime) != isinstance(start, datetime):
        raise ValueError("starts at a time and ends on a day, or the other way; give both as the same")
    if end is not None and isinstance(end, datetime) and (end.tzinfo is None) != (start.tzinfo is None):
        raise ValueError("has a zone at one of its ends only")
    if (end is not None and end < start) or (length is not None and length < timedelta(0)):
        raise ValueError(f"ends before it starts, {start:%Y-%m-%d}")
    whole_day = end is None and length is None and not isinstance(start, datetime)
    lasts = whole_day or (end is not None and end > start) or (length is not None and length > timedelta(0))
    return lasts and str(event.get("STATUS", "")).upper() != "CANCELLED"


def _per_day(rule: str, start: date | datetime) -> float:
    """Return how many occurrences a day a rule has, roughly.

    Raises:
        ValueError: it has none within decades, and would be searched for up to the year 9999; or it is no rule.
    """
    from dateutil.rrule import rrulestr

    parts = [part for part in rule.split(";") if not part.upper().startswith(("UNTIL=", "COUNT="))]
    naive = datetime(start.year, start.month, start.day)  # noqa: DTZ001
    found: Any = rrulestr(";".join(parts), dtstart=naive)
    times: list[datetime] = list(islice(found.replace(until=naive + timedelta(days=366 * _TRIAL_YEARS)), _TRIAL))
    if not times:
        raise ValueError(f"has a rule that never happens: {rule[:80]!r}")
    days = (times[-1] - times[0]) / timedelta(days=1)
    return (len(times) - 1) / max(days, 1e-3)


def _listed(event: Any, name: str) -> list[Any]:
    value = event.get(name)
    return value if isinstance(value, list) else [] if value is None else [value]


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:199]}…"
