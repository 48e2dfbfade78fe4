"""What a user has to know of a topic, in sentences: the value, what it does, and the next step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import msgspec
import numpy as np

from stream.doctor import Examined, Format, Key, Sample, Series
from stream.duration import say_duration
from stream.grid import PROBE_POINTS
from stream.proposal import LATE_CELLS_MAX, Group, about, counted, percent
from stream.records import Reason

Level = Literal["problem", "warning", "note"]
LEVELS: tuple[Level, ...] = ("problem", "warning", "note")  # points are lost or judged wrongly; look at it; know it

_NAMED = 3
_SURE = 0.9  # share of the probes
_CROWDED, _CROWDED_LEAST = 0.02, 5  # of the times; a late point may share a place
_NULLS = 0.2  # of the values
_MISSING = 0.2  # of the places
_SOMETIMES = 0.99  # of an entity's times that a metric comes for
_AHEAD_MS = 1_000  # of its arrival
_BEHIND_MS = 3_600_000
_ZONE_MS = 1_800_000  # time zones differ by multiples of it
_ZONE_SLACK_MS = 120_000
_STOPPED_INTERVALS = 10
_WINDOW = 30  # points; that of the bundled model

_NEXT_STEP: dict[Reason, str] = {
    "empty": "a point needs a value; tombstones belong into another topic",
    "too_large": "send fewer metrics in one record",
    "not_utf8": "send JSON in UTF-8",
    "not_json": "send one JSON object in each record",
    "wrong_type": 'send {"kpi": …, "timestamp": …, "value": …} with a number or null as value',
    "bad_name": "give each record a printable `kpi` or `entity` of 512 bytes at most",
    "bad_timestamp": "send seconds, milliseconds or ISO 8601",
    "bad_value": "send null for what is missing, and no stand-in",
    "in_the_future": "set the producer's clock and time zone, or TOCSIN_FUTURE_LIMIT_S",
}


class Finding(msgspec.Struct, frozen=True):
    """A sentence and how much it matters."""

    level: Level
    text: str


def find(examined: Examined, groups: Sequence[Group], *, partitions: int) -> list[Finding]:
    """Return the findings, the gravest first.

    Args:
        examined: the sample.
        groups: that rules are proposed for.
        partitions: of the topic.
    """
    found = [
        *_refused(examined.sample),
        *_names(examined.series),
        *_keys(examined.series, partitions),
        *_late(examined.series, groups),
        *_grids(examined.series),
        *_gaps(examined.series),
        *_values(examined.series),
        *_formats(examined),
        *_clocks(examined.sample),
    ]
    return sorted(found, key=lambda finding: LEVELS.index(finding.level))  # stable


def named(series: Sequence[Series], of: Callable[[Series], str] = lambda one: "") -> str:
    """Return the first few names of a list, each with what `of` says of it."""
    shown = [f"{one.name}{of(one)}" for one in series[:_NAMED]]
    return ", ".join(shown) + (f" and {len(series) - _NAMED:,} more" if len(series) > _NAMED else "")


def _many(series: Sequence[Series], verb_of_one: str, verb: str) -> str:
    return f"{len(series):,} series {verb_of_one if len(series) == 1 else verb}"


def _refused(sample: Sample) -> Iterator[Finding]:
    for one in sorted(sample.refused.values(), key=lambda one: (-one.count, one.reason)):
        step = _NEXT_STEP.get(one.reason, "")
        yield Finding(
            "problem",
            f"{counted(one.count, 'record')} would be refused as {one.reason}, the first at offset {one.offset} of "
            f"partition {one.partition}: {one.detail}{'; ' + step if step else ''}",
        )


def _names(series: Sequence[Series]) -> Iterator[Finding]:
    kpis = {one.name for one in series if one.kind == "kpi"}
    both = [one for one in series if one.kind == "entity" and one.name in kpis]
    if both:
        yield Finding("problem", f"{named(both)} come as KPI and as entity: give one of them another name")
    metrics = [f"{one.name}.{metric}" for one in series for metric in one.metrics if f"{one.name}.{metric}" in kpis]
    if metrics:
        yield Finding(
            "problem",
            f"{', '.join(metrics[:_NAMED])} {'is' if len(metrics) == 1 else 'are'} both KPI and metric of an entity, "
            "and their points are taken for one series: rename one",
        )


def _keys(series: Sequence[Series], partitions: int) -> Iterator[Finding]:
    split = [one for one in series if len(one.partitions) > 1]
    if split:
        where = named(split, lambda one: f" in {', '.join(map(str, one.partitions))}")
        yield Finding(
            "problem",
            f"{_many(split, 'is', 'are')} seen in more than one partition ({where}): "
            "each is judged on a part of its points only; let the key of a record be its series",
        )
    unkeyed = [one for one in series if one.unkeyed and one not in split]
    if unkeyed:
        records = counted(sum(one.unkeyed for one in unkeyed), "record")
        text = f"the key of {records} of {len(unkeyed):,} series is not the series ({named(unkeyed)})"
        if partitions > 1:
            yield Finding(
                "warning", f"{text}; none of them is split in this sample, a key that is the series keeps it so"
            )
        else:
            yield Finding("note", f"{text}: no matter while the topic has one partition")


def _late(series: Sequence[Series], groups: Sequence[Group]) -> Iterator[Finding]:
    for group in groups:
        mine = sorted((series[i] for i in group.members if series[i].late), key=lambda one: -one.late)
        if not mine:
            continue
        whose = mine[0].name if len(mine) == 1 else f"{len(mine):,} series, such as {mine[0].name},"
        of = mine[0].records if len(mine) == 1 else group.records
        verb = "comes" if group.late == 1 else "come"
        text = f"{group.late:,} of {counted(of, 'record')} of {whose} {verb} up to {about(group.late_ms)} late: "
        if group.too_late:
            text += f"lateness: {say_duration(group.lateness_ms)} is all that a window allows for ({LATE_CELLS_MAX} "
            text += "intervals), what is older is filled in or refused as too_late; was the topic filled twice?"
            yield Finding("warning", text)
        elif group.lateness_ms:
            yield Finding("warning", f"{text}lateness: {say_duration(group.lateness_ms)}")
        else:
            yield Finding("note", f"{text}less than half an interval, they share a place with what came before")
    again = sorted((one for one in series if one.duplicates), key=lambda one: -one.duplicates)
    if again:
        conflicts = sum(one.conflicts for one in again)
        text = (
            f"{counted(sum(one.duplicates for one in again), 'record')} repeat a time of their series ({named(again)})"
        )
        if conflicts:
            yield Finding("warning", f"{text}, {conflicts:,} with another value: the last one counts")
        else:
            yield Finding("note", f"{text} with the same value: no matter")


def _grids(series: Sequence[Series]) -> Iterator[Finding]:
    few = [one for one in series if one.times < PROBE_POINTS]
    if few:
        yield Finding(
            "note",
            f"{_many(few, 'has', 'have')} fewer than {PROBE_POINTS} times in the sample ({named(few)}): a larger "
            "--records or --since tells their interval",
        )
    irregular = [one for one in series if one.times >= PROBE_POINTS and not one.known]
    if irregular:
        seen = named(irregular, lambda one: f": {percent(one.on_grid)} on a grid of {say_duration(one.interval_ms)}")
        yield Finding(
            "warning",
            f"{_many(irregular, 'comes', 'come')} at irregular times ({seen}): give them an `interval:` by a rule; "
            "points of one place on it replace one another",
        )
    unsure = sorted((one for one in series if one.known and one.sure < _SURE), key=lambda one: one.sure)
    if unsure:
        seen = named(unsure, lambda one: f": {say_duration(one.interval_ms)} by {percent(one.sure)}")
        yield Finding(
            "warning",
            f"eight points at different places of {len(unsure):,} series give different intervals ({seen}): "
            "`interval:` in their rule, or the first eight decide",
        )
    crowded = [one for one in series if one.known and one.crowded >= max(_CROWDED * one.times, _CROWDED_LEAST)]
    if crowded:
        seen = named(crowded, lambda one: f": {percent(one.crowded / one.times)} at {say_duration(one.interval_ms)}")
        yield Finding(
            "warning",
            f"times of {len(crowded):,} series share a place on the grid ({seen}): the last one of a place counts; "
            "does one name stand for two series?",
        )


def _gaps(series: Sequence[Series]) -> Iterator[Finding]:
    gappy = sorted((one for one in series if one.known and one.missing > _MISSING), key=lambda one: -one.missing)
    if gappy:
        seen = named(gappy, lambda one: f": {percent(one.missing)} missing")
        yield Finding(
            "warning",
            f"{_many(gappy, 'has', 'have')} large gaps ({seen}): the model completes them, and says so in "
            "its events; it is surer of what it sees",
        )
    long = sorted((one for one in series if one.known and one.longest_gap > _WINDOW), key=lambda one: -one.longest_gap)
    if long:
        seen = named(long, lambda one: f": {about(one.longest_gap * one.interval_ms)}")
        yield Finding(
            "note",
            f"{_many(long, 'misses', 'miss')} more than {_WINDOW} points in a row ({seen}): then the window begins "
            "anew",
        )
    stopped = [
        one
        for one in series
        if one.known and one.stopped_ms > max(_STOPPED_INTERVALS, 2 * one.longest_gap) * one.interval_ms
    ]
    if stopped:
        seen = named(stopped, lambda one: f" since {one.last}")
        yield Finding(
            "warning", f"{_many(stopped, 'has', 'have')} stopped ({seen}): `silent_after:` tells when one does"
        )


def _values(series: Sequence[Series]) -> Iterator[Finding]:
    void = [one for one in series if one.nulls == 1]
    if void:
        yield Finding("warning", f"{_many(void, 'has', 'have')} null or NaN only ({named(void)}): nothing to watch")
    nulls = sorted((one for one in series if _NULLS < one.nulls < 1), key=lambda one: -one.nulls)
    if nulls:
        seen = named(nulls, lambda one: f": {percent(one.nulls)}")
        yield Finding(
            "warning", f"many values of {len(nulls):,} series are null or NaN ({seen}): these count as missing"
        )
    constant = [one for one in series if one.constant]
    if constant:
        seen = named(constant, lambda one: f" ({', '.join(one.constant[:_NAMED])})" if one.constant != [""] else "")
        yield Finding(
            "note",
            f"{_many(constant, 'never changes', 'never change')} ({seen}): the first change will be an anomaly; "
            "`watch: false` in a rule leaves them out",
        )
    varying = [one for one in series if any(share < _SOMETIMES for share in one.metrics.values())]
    if varying:
        yield Finding(
            "warning",
            f"the metrics of {counted(len(varying), 'entity', 'entities')} vary ({named(varying, _rare)}): a model of "
            "several features waits for all and completes those that do not come",
        )


def _rare(one: Series) -> str:
    metric, share = min(one.metrics.items(), key=lambda item: item[1])
    return f": {metric} in {percent(share)} of its times"


def _formats(examined: Examined) -> Iterator[Finding]:
    zone, no_zone = Format.ISO_ZONE.words, Format.ISO_NO_ZONE.words
    mixed = [one for one in examined.series if len(one.formats) > 1]
    if mixed:
        seen = named(mixed, lambda one: f": {', '.join(one.formats)}")
        yield Finding(
            "warning" if any(no_zone in one.formats for one in mixed) else "note",
            f"{_many(mixed, 'mixes', 'mix')} formats of timestamps ({seen}): each is understood; have they one "
            "producer?",
        )
    sample = examined.sample
    arrived = (sample.format == Format.ISO_NO_ZONE) & (sample.arrival_ms >= 0)
    if arrived.any():
        behind = int(np.median((sample.arrival_ms - sample.timestamp_ms)[arrived]))
        zones = round(behind / _ZONE_MS)
        text = f"{counted(int(arrived.sum()), 'timestamp')} have no zone and are read as UTC"
        if zones and abs(behind - zones * _ZONE_MS) < _ZONE_SLACK_MS and abs(zones) <= 28:
            way = "behind" if behind > 0 else "ahead of"
            text += f"; they lie {about(abs(zones) * _ZONE_MS)} {way} their arrival: local time? send a zone, or UTC"
            yield Finding("problem", text)
        else:
            yield Finding("note", f"{text}: {zone} leaves no doubt")


def _clocks(sample: Sample) -> Iterator[Finding]:
    arrived = sample.arrival_ms >= 0
    behind = (sample.arrival_ms - sample.timestamp_ms)[arrived]
    if not len(behind):
        return
    ahead = -behind[behind < -_AHEAD_MS]
    if len(ahead):
        yield Finding(
            "warning",
            f"{counted(len(ahead), 'record')} lie up to {about(int(ahead.max()))} ahead of their arrival: "
            "set the clocks of their producers",
        )
    if (median := int(np.median(behind))) > _BEHIND_MS:
        yield Finding(
            "note",
            f"half of the records are more than {about(median)} old when they arrive: right for a replay, "
            "a backlog or a wrong zone otherwise",
        )


def formats_of(sample: Sample) -> dict[str, int]:
    """Return how many timestamps are written in each way."""
    counts = np.bincount(sample.format, minlength=len(Format))
    return {form.words: int(counts[form]) for form in Format if counts[form]}


def keys_of(sample: Sample) -> dict[str, int]:
    """Return how many records have no key, their series as key, or another one."""
    counts = np.bincount(sample.key, minlength=len(Key))
    return {key.name.lower(): int(counts[key]) for key in Key}
