"""Durations and alarm budgets in words: `90s`, `12h`; `1 per week`, `two a day`."""

from __future__ import annotations

import re
from typing import Final

UNITS_MS: Final = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000, "w": 604_800_000}
_YEAR_MS: Final = 365.25 * UNITS_MS["d"]
PERIODS_MS: Final = {
    "minute": float(UNITS_MS["m"]),
    "hour": float(UNITS_MS["h"]),
    "day": float(UNITS_MS["d"]),
    "week": float(UNITS_MS["w"]),
    "month": _YEAR_MS / 12,
    "year": _YEAR_MS,
}
_COUNTS: Final = {
    **{"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8},
    **{"nine": 9, "ten": 10, "eleven": 11, "twelve": 12, "once": 1, "twice": 2},
}
LEAST_BUDGET: Final = 1 / (100 * _YEAR_MS)  # alarms per ms

_DURATION = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,15})?) ?([a-zA-Z]*)")
_BUDGET = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,15})?|[a-z]+)(?: times)?(?: ?/ ?| per | an? | every | each )([a-z]+)")


def parse_duration(text: str) -> int:
    """Return a duration in ms.

    Raises:
        ValueError: it has no unit or no known one, or is no whole number of milliseconds.
    """
    found = _DURATION.fullmatch(text.strip())
    if found is None:
        raise ValueError("is no duration; write a number and its unit, such as 500ms, 30s, 5m, 1h, 2d or 1w")
    number, unit = found.groups()
    if not unit:
        raise ValueError(f"has no unit; write {number}s, {number}m, {number}h or another of {', '.join(UNITS_MS)}")
    if unit not in UNITS_MS:
        raise ValueError(f"has no unit that is known; write one of {', '.join(UNITS_MS)}, such as {number}s")
    ms = float(number) * UNITS_MS[unit]
    if ms != round(ms):
        raise ValueError("is no whole number of milliseconds")
    return round(ms)


def say_duration(ms: int) -> str:
    """Return a duration as `parse_duration` reads it, in its largest unit; a single week is 7d."""
    for unit in ("w", "d", "h", "m", "s"):
        size = UNITS_MS[unit]
        if ms and ms % size == 0 and (unit != "w" or ms > size):
            return f"{ms // size}{unit}"
    return f"{ms}ms" if ms else "0s"


def parse_budget(text: str) -> float:
    """Return an alarm budget as alarms per ms.

    Raises:
        ValueError: it is not a count and a period, or below 1 in a hundred years.
    """
    words = " ".join(text.lower().split())
    if words in ("none", "no", "never", "zero", "0") or words.startswith(("0 ", "0/", "none ", "no ", "zero ")):
        raise ValueError("cannot be: every threshold has its risk; write a small one, such as 1 per year")
    found = _BUDGET.fullmatch(words)
    period = PERIODS_MS.get(found[2].removesuffix("s") if found[2] != "s" else "") if found else None
    count = (float(_COUNTS.get(found[1], 0)) if found[1].isalpha() else float(found[1])) if found else 0.0
    if period is None or not found or (found[1].isalpha() and not count):
        raise ValueError(f"is no budget; write N per {', '.join(list(PERIODS_MS)[:-1])} or year, such as 1 per week")
    budget = count / period
    if budget < LEAST_BUDGET * (1 - 1e-9):
        raise ValueError("is too small a budget, at least 1 per 100 years can be told from none: write 0.01 per year")
    return budget


def say_budget(alarms_per_ms: float) -> str:
    """Return a budget in words: of all periods the shortest that makes it a whole number, or else one of 1 or more."""
    counts = {period: alarms_per_ms * size for period, size in PERIODS_MS.items()}
    for period, count in counts.items():
        if count >= 0.999 and abs(count - round(count)) <= 1e-6 * count:
            return f"{round(count)} per {period}"
    for period, count in counts.items():
        if count >= 1:
            return f"{count:.3g} per {period}"
    return f"{counts['year']:.3g} per year"
