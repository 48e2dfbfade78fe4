"""Maintenance windows: times at which no incident is opened, by the week or once. Those of a calendar: `calendars`.

- Weekly: a time lies in the window if a clock on the wall of that time zone shows one of the window's times. So a
  window inside the hour that spring skips does not open that day, one that reaches beyond it opens for the rest, and
  the hour that autumn repeats is in the window both times. One over midnight belongs to the day on which it starts.
- Once: from one instant up to another. A local time that the clocks skip, or show twice, is refused: `instant_ms`.

The end is never part of a window.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Final
from zoneinfo import ZoneInfo

import numpy as np

from stream.columns import BoolArray, Int64Array

DAY_MS: Final = 86_400_000
YEARS: Final = (1900, 2200)  # local time is known from the first up to the second; points lie within


@dataclass(frozen=True, slots=True)
class Weekly:
    """A window of the local clock on some days of each week."""

    days: tuple[int, ...]  # on which it starts, 0 = Monday
    start_minute: int  # of the day, 0 ... 1439
    end_minute: int  # 1 ... 1440, exclusive; not above the start: on the day after (equal: 24 hours)
    time_zone: str = "UTC"

    def active(self, timestamp_ms: Int64Array) -> BoolArray:
        """Say of each time, (N,) int64 ms, whether it lies in the window."""
        local = local_ms(timestamp_ms, self.time_zone)
        day, time = local // DAY_MS, local % DAY_MS
        weekday = (day + 3) % 7  # 1970-01-01 was a Thursday
        starts = np.zeros(7, np.bool_)
        starts[list(self.days)] = True
        begun, ended = time >= self.start_minute * 60_000, time >= self.end_minute * 60_000
        if self.start_minute < self.end_minute:
            return starts[weekday] & begun & ~ended
        return (starts[weekday] & begun) | (starts[weekday - 1] & ~ended)


@dataclass(frozen=True, slots=True)
class Once:
    """A window from one instant up to another."""

    start_ms: int
    end_ms: int

    def active(self, timestamp_ms: Int64Array) -> BoolArray:
        """Say of each time, (N,) int64 ms, whether it lies in the window."""
        return (timestamp_ms >= self.start_ms) & (timestamp_ms < self.end_ms)


def instant_ms(local: datetime, time_zone: str) -> int:
    """Return when, in ms since 1970 UTC, the clocks of a time zone show a local time.

    Raises:
        ValueError: they never do, or they do twice; the message says so and what to write instead.
    """
    zone = zone_of(time_zone)
    first, second = (local.replace(tzinfo=zone, fold=fold) for fold in (0, 1))
    if first.utcoffset() != second.utcoffset():
        if first.astimezone(UTC).astimezone(zone).replace(tzinfo=None) != local:
            raise ValueError(f"never shows on a clock in {time_zone}: that day they are set forward over it")
        offsets = " or ".join(f"{local:%Y-%m-%dT%H:%M}{_offset(one)}" for one in (first, second))
        raise ValueError(f"shows twice on a clock in {time_zone}, as they are set back; write {offsets}")
    return round(first.timestamp() * 1000)


def _offset(when: datetime) -> str:
    text = f"{when:%z}"
    return f"{text[:3]}:{text[3:5]}"


@lru_cache(maxsize=256)
def zone_of(time_zone: str) -> ZoneInfo:
    """Return a time zone by its IANA name."""
    return ZoneInfo(time_zone)


def local_ms(timestamp_ms: Int64Array, time_zone: str) -> Int64Array:
    """Return what the clocks of a time zone show, as ms since they showed 1970-01-01 00:00, (N,) int64."""
    if not len(timestamp_ms):
        return timestamp_ms
    year = timestamp_ms.astype("datetime64[ms]").astype("datetime64[Y]").astype(np.int64) + 1970
    years = np.unique(np.clip(year, YEARS[0], YEARS[1] - 1)).tolist()
    tables = [_offsets(time_zone, year) for year in years]
    since = np.concatenate([since for since, _ in tables])
    offset = np.concatenate([offset for _, offset in tables])
    in_force = np.maximum(np.searchsorted(since, timestamp_ms, side="right") - 1, 0)
    local: Int64Array = timestamp_ms + offset[in_force]
    return local


@lru_cache(maxsize=4096)
def _offsets(time_zone: str, year: int) -> tuple[Int64Array, Int64Array]:
    """Return the offsets from UTC in force in a year: since when, and how much; ms, (T,) each.

    zoneinfo does not tell its transitions: each day is looked at, and where the offset has changed the second of it is
    found by bisection.
    """
    zone = zone_of(time_zone)

    def offset_s(second: int) -> int:
        offset = datetime.fromtimestamp(second, zone).utcoffset()
        return round(offset.total_seconds()) if offset is not None else 0

    begin, end = (int(datetime(y, 1, 1, tzinfo=UTC).timestamp()) for y in (year, year + 1))
    found = [(begin, offset_s(begin))]
    for day in range(begin, end, 86_400):
        before, after = day, day + 86_400
        if offset_s(after) == found[-1][1]:
            continue
        while after - before > 1:
            middle = (before + after) // 2
            if offset_s(middle) == found[-1][1]:
                before = middle
            else:
                after = middle
        found.append((after, offset_s(after)))
    table = np.array(found, np.int64) * 1000
    return table[:, 0].copy(), table[:, 1].copy()
