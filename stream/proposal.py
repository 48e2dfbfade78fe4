"""A rules file for what a topic was seen to hold: series grouped by name and interval, a rule for each group.

The first rule that matches a series is its rule, so that of two globs the narrower one stands first.
"""

from __future__ import annotations

import glob
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from stream.doctor import Examined, Series
from stream.duration import PERIODS_MS, say_duration

GROUPS_MAX = 20  # more rules than that nobody reads
_NAME_CHARS_MAX = 100
_NAMES_MAX = 50  # listed one by one in a rule
_LATE_QUANTILE = 0.999
_LATENESS_MAX_MS = 7 * 86_400_000  # that a rule may ask for
# What a late point can mend lies in the second half of the window (the bundled model's has 30 points) at most.
LATE_CELLS_MAX = 14
_SILENT_AFTER = 10  # intervals
_SILENT_AFTER_MAX = 1_000
_SILENT_SLACK = 1.5
_USUAL_GAP = 0.9  # quantile of the longest gaps of a group's series
_Q_MAX = 2e-3  # a tail that is to be exceeded more often is none
_SPORADIC = 0.5  # share of places without a point

_SECOND, _MINUTE, _HOUR = 1_000, 60_000, 3_600_000
_ROUND_MS = (
    *(100, 200, 500),
    *(s * _SECOND for s in (1, 2, 5, 10, 15, 20, 30, 45)),
    *(m * _MINUTE for m in (1, 2, 3, 5, 10, 15, 20, 30, 45)),
    *(h * _HOUR for h in (1, 2, 3, 6, 12, 24)),
)


@dataclass(frozen=True, slots=True)
class Group:
    """Series that one rule is proposed for.

    Attributes:
        match: globs of the rule.
        name: label of the rule.
        members: indices of the series.
        interval_ms: theirs; 0 if they have several, or none that is known.
        late: records of them that came late, of `records`; `late_ms` what all but one in a thousand of them are late by
            at most, 0 if none moves by a place on the grid.
        lateness_ms: what to wait for them, 0 for none.
        silent_after: intervals, 0 for never.
        false_alarms: budget of each series, "" for that of the settings.
    """

    match: tuple[str, ...]
    name: str
    members: tuple[int, ...]
    interval_ms: int = 0
    records: int = 0
    late: int = 0
    late_ms: int = 0
    lateness_ms: int = 0
    silent_after: int = 0
    false_alarms: str = ""

    @property
    def too_late(self) -> bool:
        """Whether more lateness was seen than a window can mend."""
        return self.interval_ms > 0 and 0 < self.lateness_ms < self.late_ms


Members = Sequence[int]


def propose(examined: Examined) -> list[Group]:
    """Return groups that hold each series once, in the order in which their rules must stand."""
    series = examined.series
    if not series:
        return []
    for scheme in (_by_prefix, _by_last_part):
        found = scheme(series)
        if len(found) <= GROUPS_MAX:
            break
    else:
        found = [(("*",), "all", tuple(range(len(series))))]
    taken: set[str] = set()
    return [_group(examined, match, _free(name, taken), members) for match, name, members in found]


_Found = tuple[tuple[str, ...], str, tuple[int, ...]]  # match, name, members


def _by_prefix(series: Sequence[Series]) -> list[_Found]:
    """Group by what stands before the first dot, or the last one where intervals differ, or by interval alone."""
    found: list[tuple[int, _Found]] = []  # with how many dots its glob has
    plain: list[int] = []
    for first, members in _split(range(len(series)), lambda i: series[i].name.partition(".")[0]).items():
        if len(members) == 1 and "." not in series[members[0]].name:
            plain += members
        elif len(members) == 1 or len(_intervals(series, members)) > 1:
            for prefix, some in _split(members, lambda i: series[i].name.rpartition(".")[0] or series[i].name).items():
                if len(some) > 1 and len(_intervals(series, some)) == 1:
                    found.append((prefix.count(".") + 1, (_below(prefix, series, some), prefix, tuple(some))))
                else:
                    found += [(99, one) for one in _one_by_one(series, some, prefix)]
        else:
            found.append((1, (_below(first, series, members), first, tuple(members))))
    if plain:
        if len(plain) <= _NAMES_MAX and (found or len(_intervals(series, plain)) > 1):
            found += [(98, one) for one in _one_by_one(series, plain, "")]
        else:
            found.append((0, (("*",), "all" if not found else "others", tuple(plain))))
    found.sort(key=lambda one: -one[0])  # stable; a narrower glob stands before a wider one
    return [one for _, one in found]


def _by_last_part(series: Sequence[Series]) -> list[_Found]:
    """Group by what stands behind the last dot: hosts without number, each with the same few metrics."""
    found: list[_Found] = []
    rest: list[int] = []
    for last, members in _split(range(len(series)), lambda i: series[i].name.rpartition(".")[2]).items():
        members, bare = ([i for i in members if ("." in series[i].name) is dotted] for dotted in (True, False))
        rest += bare
        if len(members) > 1 and len(_intervals(series, members)) == 1:
            found.append((("*." + _escaped(last),), last, tuple(members)))
        else:
            rest += members
    return found + ([(("*",), "others" if found else "all", tuple(rest))] if rest else [])


def _one_by_one(series: Sequence[Series], members: Members, prefix: str) -> list[_Found]:
    """Name series one by one, those of one interval together; too many of them keep their intervals to themselves."""
    if len(members) > _NAMES_MAX:
        return [(_below(prefix, series, members), prefix, tuple(members))]
    by_interval = _split(members, lambda i: series[i].interval_ms if series[i].known else 0)
    found = []
    for interval_ms, some in sorted(by_interval.items()):
        match = [one for i in some for one in _named(series[i])]
        label = f"{prefix or 'series'} every {say_duration(interval_ms)}" if interval_ms else prefix or "unclear"
        found.append((tuple(match), series[some[0]].name if len(some) == 1 else label, tuple(some)))
    return found


def _named(one: Series) -> list[str]:
    """Return the globs of a series alone; the metrics of an entity are series of their own to some models."""
    name = _escaped(one.name)
    return [name, f"{name}.*"] if one.kind == "entity" else [name]


def _below(prefix: str, series: Sequence[Series], members: Members) -> tuple[str, ...]:
    """Return the globs of what stands below a prefix, and of the prefix where that is a series itself."""
    itself = [_escaped(prefix)] * any(series[i].name == prefix for i in members)
    return (*itself, _escaped(prefix) + ".*")


def _escaped(name: str) -> str:
    """Return a glob for a name: rules know no blanks at an end, and no more than 512 bytes."""
    if len(name) > _NAME_CHARS_MAX:
        return _escaped(name[:_NAME_CHARS_MAX]) + "*"
    escaped = glob.escape(name)
    escaped = f"[ ]{escaped[1:]}" if escaped.startswith(" ") else escaped
    return f"{escaped[:-1]}[ ]" if escaped.endswith(" ") else escaped


K = TypeVar("K")


def _split(members: Iterable[int], key: Callable[[int], K]) -> dict[K, list[int]]:
    groups: dict[K, list[int]] = defaultdict(list)
    for i in members:
        groups[key(i)].append(i)
    return groups


def _intervals(series: Sequence[Series], members: Members) -> set[int]:
    """Return the intervals of those that are sure of theirs; {0} if none is."""
    return {series[i].interval_ms for i in members if series[i].known} or {0}


def _free(name: str, taken: set[str]) -> str:
    name = name[:_NAME_CHARS_MAX].strip() or "series"
    free, k = name, 2
    while free in taken:
        free, k = f"{name} {k}", k + 1
    taken.add(free)
    return free


def _group(examined: Examined, match: tuple[str, ...], name: str, members: tuple[int, ...]) -> Group:
    series = [examined.series[i] for i in members]
    intervals = _intervals(examined.series, members)
    interval_ms = intervals.pop() if len(intervals) == 1 else 0
    late_ms = examined.late_ms[np.isin(examined.sample.slot, members)]
    late_ms = late_ms[late_ms > 0]
    most_ms = int(np.quantile(late_ms, _LATE_QUANTILE, method="higher")) if len(late_ms) else 0
    # What one series of ten alone lacks for so long is an outage that somebody wants to be told of.
    gaps = [one.longest_gap for one in series if one.known]
    longest = float(np.quantile(gaps, _USUAL_GAP, method="lower")) if gaps else 0.0
    silent_after = max(_SILENT_AFTER, int(np.ceil(_SILENT_SLACK * longest)))
    sporadic = not any(one.known and one.missing < _SPORADIC for one in series)
    return Group(
        match,
        name,
        members,
        interval_ms,
        records=sum(one.records for one in series),
        late=len(late_ms),
        late_ms=most_ms,
        lateness_ms=_lateness(most_ms, interval_ms) if most_ms else 0,
        silent_after=0 if sporadic or silent_after > _SILENT_AFTER_MAX else silent_after,
        false_alarms=_budget(max((one.interval_ms for one in series if one.known), default=0)),
    )


def _budget(interval_ms: int) -> str:
    """Return an alarm budget that leaves a risk which a point of this interval can have."""
    for period in ("week", "month", "year"):
        if interval_ms <= _Q_MAX * PERIODS_MS[period]:
            return f"1 per {period}"
    return ""


def _lateness(late_ms: int, interval_ms: int) -> int:
    """Return a round time that covers points late by so much, as far as a window can mend them."""
    enough = next((one for one in _ROUND_MS if one >= late_ms), -(-late_ms // (24 * _HOUR)) * 24 * _HOUR)
    if interval_ms == 0:
        return min(enough, _LATENESS_MAX_MS)
    cells = round(late_ms / interval_ms)
    if cells == 0:  # jitter: the points share a place
        return 0
    return min(max(enough, cells * interval_ms), LATE_CELLS_MAX * interval_ms, _LATENESS_MAX_MS)


# -- as a file ------------------------------------------------------------------------------------------------------


def rules(groups: Sequence[Group]) -> list[dict[str, object]]:
    """Return the rules as the values that their file has."""
    found: list[dict[str, object]] = []
    for group in groups:
        rule: dict[str, object] = {"match": list(group.match) if len(group.match) > 1 else group.match[0]}
        rule["name"] = group.name
        if group.interval_ms:
            rule["interval"] = say_duration(group.interval_ms)
        if group.false_alarms:
            rule["false_alarms"] = group.false_alarms
        if group.lateness_ms:
            rule["lateness"] = say_duration(group.lateness_ms)
        rule["silent_after"] = group.silent_after or "never"
        found.append(rule)
    if not any("*" in group.match for group in groups):
        found.append({"match": "*", "name": _free("others", {group.name for group in groups})})
    return found


def as_yaml(examined: Examined, groups: Sequence[Group], head: Sequence[str]) -> str:
    """Return the rules file, with comments that say what was seen.

    Args:
        examined: what the groups were made from.
        groups: of `propose`.
        head: lines about the sample.
    """
    lines = [f"# {line}" for line in head]
    lines += ["# The first rule that matches a series is its rule. false_alarms is what each series may make."]
    lines += ["rules:"]
    for rule, group in zip(rules(groups), [*groups, None], strict=False):
        comments = ["whatever else comes"] if group is None else described(examined.series, group)
        lines += [f"  # {comment}" for comment in comments]
        for i, (field, value) in enumerate(rule.items()):
            lines.append(f"  {'- ' if i == 0 else '  '}{field}: {_scalar(value)}")
    return "\n".join(lines) + "\n"


def _scalar(value: object) -> str:
    if isinstance(value, list):
        return f"[{', '.join(_scalar(one) for one in value)}]"
    if isinstance(value, str) and not _PLAIN.fullmatch(value):
        return "'" + value.replace("'", "''") + "'"  # names and what is made of them hold printable characters only
    return str(value)


_PLAIN = re.compile(
    r"(?!(?i:true|false|yes|no|on|off|null|y|n|nan|inf)$)[a-zA-Z_][\w-]*|\d+(ms|[smhdw])|1 per \w+", re.ASCII
)


@dataclass(frozen=True, slots=True)
class Look:
    """What the series of a group show together, those whose interval is known."""

    known: int = 0
    on_grid: float = 0.0  # share of their times
    jitter_ms: int = 0  # the largest
    missing: float = 0.0  # share of their places
    longest_gap_ms: int = 0


def look(series: Sequence[Series], group: Group) -> Look:
    """Return what the series of a group show together."""
    known = [one for one in (series[i] for i in group.members) if one.known]
    if not known:
        return Look()
    times = sum(one.times for one in known)
    return Look(
        len(known),
        sum(one.on_grid * one.times for one in known) / times,
        max(one.jitter_ms for one in known),
        1 - times / sum(one.times / (1 - one.missing) for one in known),
        max(one.longest_gap * one.interval_ms for one in known),
    )


def described(series: Sequence[Series], group: Group) -> list[str]:
    """Return comments on a group: what was seen, of which the rule is made."""
    mine, seen = [series[i] for i in group.members], look(series, group)
    entities = sum(one.kind == "entity" for one in mine)
    kinds = [counted(len(mine) - entities, "KPI")] * (entities < len(mine))
    kinds += [counted(entities, "entity", "entities")] * (entities > 0)
    example = f", such as {mine[0].name}" if len(mine) > 1 else f": {mine[0].name}"
    lines = [" and ".join(kinds) + example]
    if group.interval_ms:
        text = f"every {say_duration(group.interval_ms)}: {percent(seen.on_grid)} of the times on the grid"
        text += f", jitter up to {about(seen.jitter_ms)}" if seen.jitter_ms else ""
        text += f"; {len(mine) - seen.known:,} with too few points to tell" if seen.known < len(mine) else ""
        lines.append(text)
    elif seen.known:
        counts = Counter(one.interval_ms for one in mine if one.known)
        shares = ", ".join(f"{n:,} every {say_duration(ms)}" for ms, n in counts.most_common(4))
        lines.append(f"intervals differ, each is inferred: {shares}{', …' if len(counts) > 4 else ''}")
    else:
        lines.append("no interval that the sample is sure of: each is inferred")
    if seen.missing:
        lines.append(f"{percent(seen.missing)} of the points missing, for up to {about(seen.longest_gap_ms)} in a row")
    if group.late:
        text = f"{group.late:,} of {counted(group.records, 'record')} late, by up to {about(group.late_ms)}"
        if group.too_late:
            text += f": more than {LATE_CELLS_MAX} intervals are not waited for"
        elif not group.lateness_ms:
            text += ": less than half an interval, no matter"
        lines.append(text)
    if not group.silent_after:
        lines.append("gaps are too long and too common for a silence to mean something")
    return lines


def about(ms: float) -> str:
    """Return a time for people: 42 s, 1.5 min."""
    for unit, length, below in (("ms", 1, 1_000), ("s", 1_000, 90_000), ("min", 60_000, 5_400_000)):
        if ms < below:
            return f"{ms / length:.3g} {unit}"
    days = ms / (24 * _HOUR)
    return f"{ms / _HOUR:.3g} h" if days < 2 else f"{days:.3g} d" if days < 1_000 else f"{days:,.0f} d"


def percent(share: float) -> str:
    """Return a share with the digits that mean something; never 100 % of what is not all."""
    if share in (0.0, 1.0):
        return f"{share:.0%}".replace("%", " %")
    text = f"{100 * share:.1f}" if 0.001 <= share <= 0.999 else f"{100 * share:.2g}" if share < 0.001 else "99.9"
    return f"{text.removesuffix('.0')} %"


def counted(n: int, what: str, plural: str = "") -> str:
    """Return a number of things in words."""
    return f"{n:,} {what if n == 1 else plural or what + 's'}"
