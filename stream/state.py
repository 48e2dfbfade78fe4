"""The stored state, for people: show, export, import, drop. The service's own way to it is `partition`.

State is as of an offset of the points topic; that the two move together is what makes the output exactly-once. So
whatever is put into the store has to be of the offset that it is put there for, and no worker may be at it meanwhile:
what it has in memory would overwrite it, or be overwritten. `Refusal` names every reason against a change.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from models import repository
from stream import snapshot
from stream.blobs import SHADOW, labelled, model_id
from stream.detector import Detector
from stream.errors import CheckpointError, ConfigError, StateError, TocsinError
from stream.inspection import SeriesState, inspected
from stream.pointslog import Log, LogPart
from stream.settings import KafkaSettings, Settings
from stream.statefile import Origin, Section
from stream.store import OFFSET_FIELD, Saved, Store
from stream.verify import partition_of

_NAMED = 3  # of many of which the same is to be said
_TAKEN = (
    "it is taken for the state of what the group has committed here: points between what it knows and that are missed, "
    "or counted twice"
)
_OWN = b"\x00"  # begins the names of fields that are no series

Forced = Callable[[str], None] | None


class Refusal(TocsinError):
    """Something speaks against a change of the state; nothing was changed."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join([*problems, "nothing was changed; --force does it all the same"]))
        self.problems = tuple(problems)


# -- show -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FoundSeries:
    """A series in one partition; it is in several if its records had several keys."""

    partition: int
    offset: int
    log: LogPart
    states: list[SeriesState]  # its own, and that of the model in its shadow
    refused: list[str]  # why a state cannot be read


@dataclass(slots=True)
class FoundPartition:
    """What is stored of a partition."""

    partition: int
    offset: int | None  # None: nothing
    log: LogPart
    series: int = 0
    bytes: int = 0
    models: Counter[int] = field(default_factory=Counter)  # `blobs.model_id` -> blobs
    versions: Counter[int] = field(default_factory=Counter)
    largest: tuple[str, int] | None = None
    refused: list[str] = field(default_factory=list)


async def find_series(store: Store, settings: Settings, log: Log, name: str) -> list[FoundSeries]:
    """Return where a KPI's or an entity's state is: in all partitions, as the keys of its records are the producers'.

    Raises:
        StoreError: the store fails.
        ConfigError: it has none.
    """
    kafka, found = settings.kafka, []
    fields = _fields(name)
    for number, part in log.parts.items():
        stored = await store.fields(kafka.group, kafka.points_topic, number, fields)
        if stored is None or not stored[1]:
            continue
        states, refused = [], []
        for key, blob in stored[1].items():
            try:
                states.append(inspected(key, blob, settings.pot.config()))
            except StateError as e:
                refused.append(str(e))
        found.append(FoundSeries(number, stored[0], part, states, refused))
    if not found:
        raise ConfigError(_absent(name, kafka, log))
    return found


async def find_partition(store: Store, settings: Settings, log: Log, number: int) -> FoundPartition:
    """Return what is stored of a partition, counted.

    Raises:
        StoreError: the store fails.
        ConfigError: there is no such partition.
    """
    kafka = settings.kafka
    at = (kafka.group, kafka.points_topic, check_partition(log, kafka, number))
    stored = await store.fields(*at, ())
    found = FoundPartition(number, None if stored is None else stored[0], log.parts[number])
    if stored is None:
        return found
    seen, layout = set[bytes](), snapshot.threshold_dtype(settings.pot.config())
    async for piece in store.pieces(*at):
        for key, blob in piece.items():
            if key in seen or key == OFFSET_FIELD:
                continue
            seen.add(key)
            _count(found, key, blob, layout)
    return found


def _count(found: FoundPartition, key: bytes, blob: bytes, layout: np.dtype[Any]) -> None:
    found.bytes += len(key) + len(blob)
    if key.startswith(_OWN):
        return
    name = key.removesuffix(SHADOW).decode("utf-8", "replace")
    found.series += not key.endswith(SHADOW)
    if found.largest is None or len(blob) > found.largest[1]:
        found.largest = (name, len(blob))
    try:
        version, model = labelled(key, blob, layout)
    except StateError as e:
        found.refused.append(str(e))
        return
    found.versions[version] += 1
    found.models[model] += 1


def model_names(settings: Settings) -> dict[int, str]:
    """Return the references of all models at hand, by the number that blobs keep of them."""
    names: dict[int, str] = {}
    where = settings.roots()
    for name in repository.names(where):
        try:
            refs = [f"{name}@{version}" for version in repository.versions(where, name)]
        except CheckpointError:  # whatever is wrong with it, its states can be shown
            continue
        names |= {model_id(ref): ref for ref in refs}
    return names


# -- export and import ------------------------------------------------------------------------------------------------


async def export(
    store: Store, settings: KafkaSettings, log: Log, *, name: str | None = None, partition: int | None = None
) -> list[Section]:
    """Return the state of a series, of a partition, or of all partitions.

    Raises:
        StoreError: the store fails.
        ConfigError: there is no state of it.
    """
    numbers = list(log.parts) if partition is None else [check_partition(log, settings, partition)]
    sections = []
    for number in numbers:
        at = (settings.group, settings.points_topic, number)
        if name is not None:
            stored = await store.fields(*at, _fields(name))
            if stored is not None and stored[1]:
                sections.append(Section.of(number, *stored, whole=False))
        elif (state := await store.load(*at)) is not None:
            sections.append(Section.of(number, state.offset, state.blobs, whole=True))
    if not sections:
        what = f"partition {partition}" if partition is not None else "any partition"
        raise ConfigError(_absent(name, settings, log) if name is not None else _nothing(settings, what))
    return sections


@dataclass(frozen=True, slots=True)
class Planned:
    """What an import writes into a partition."""

    section: Section
    stored: int | None  # offset of what is there
    offset: int  # that the state will belong to


@dataclass(frozen=True, slots=True)
class Plan:
    """What an import does, and what speaks against it."""

    parts: list[Planned]
    problems: list[str]


async def plan_import(
    store: Store,
    settings: KafkaSettings,
    log: Log,
    origin: Origin,
    sections: Sequence[Section],
    make_detector: Callable[[], Detector],
) -> Plan:
    """Return what importing a file would do.

    The state of a partition may be put back as of any offset that the log still has and the group has committed: the
    worker goes through the records between the two with its outputs muted. That of a single series has to be of the
    very offset that the others of its partition are at. An offset of another log means nothing: such a state would be
    taken for that of the committed offset, or of the log's beginning where nothing is committed.

    Raises:
        ConfigError: it can never fit: keys lead to other partitions here.
    """
    if origin.partitions != len(log.parts):
        raise ConfigError(
            f"the state is of a topic with {origin.partitions} partitions, {settings.points_topic} has "
            f"{len(log.parts)}: the points of its series come in other partitions; import it where there are as many"
        )
    problems = active(log, settings.group)
    same = (origin.cluster, origin.topic) == (log.cluster, settings.points_topic)
    if not same:
        problems.append(
            f"the state is of topic {origin.topic} of cluster {origin.cluster}, this is {settings.points_topic} of "
            f"{log.cluster}: its offsets mean nothing here. Forced, {_TAKEN}"
        )
    parts = []
    for section in sections:
        stored = await store.fields(settings.group, settings.points_topic, section.partition, ())
        known, part = None if stored is None else stored[0], log.parts[section.partition]
        ours = same and section.offset <= part.end
        if same and not ours:
            problems.append(
                f"partition {section.partition}: the state is of offset {section.offset}, the log ends at {part.end}: "
                f"the topic was made anew. Forced, {_TAKEN}"
            )
        offset = section.offset if ours else part.begin if part.committed is None else part.committed
        if section.whole:
            problems += _against_partition(section, part) if ours else []
        elif ours or known is None:
            problems += _against_series(section, known)
        if not section.whole and known is not None:
            offset = known
        problems += _against_blobs(section, make_detector())
        parts.append(Planned(section, known, offset))
    return Plan(parts, problems)


def _against_partition(section: Section, part: LogPart) -> list[str]:
    where, committed = f"partition {section.partition}", part.committed
    if section.offset > (committed or 0):
        what = "has committed nothing" if committed is None else f"has committed {committed}"
        return [
            f"{where}: the state is of offset {section.offset}, the group {what}: forced, nothing is published of the "
            "records between"
        ]
    if section.offset < part.begin:
        return [
            f"{where}: the state is of offset {section.offset}, the log begins at {part.begin}: forced, the points "
            "between are missed"
        ]
    return []


def _against_series(section: Section, known: int | None) -> list[str]:
    where, names = f"partition {section.partition}", _some(_names(section.blobs))
    if known is None:
        return [
            f"{where}: nothing is stored of it, and a worker would take {names} for all of its series: forced, the "
            "others begin anew there; import the whole partition, or let a worker rebuild it first"
        ]
    if known == section.offset:
        return []
    between, what = sorted((known, section.offset)), "missed" if section.offset < known else "counted twice"
    return [
        f"{where}: the state of {names} is of offset {section.offset}, that of the partition of {known}: forced, its "
        f"points of the records {between[0]} to {between[1] - 1} are {what}"
    ]


def _against_blobs(section: Section, detector: Detector) -> list[str]:
    """Try the blobs with the rules and models of here."""
    restored = snapshot.unpack(detector, section.blobs)
    problems = []
    if restored.refused:
        more = len(restored.refused) - 1
        problems.append(
            f"partition {section.partition}: {restored.refused[0]}{f'; so {more} more' if more else ''}: forced, such "
            "series begin anew"
        )
    if restored.recalibrating:
        problems.append(
            f"partition {section.partition}: {_counted(restored.recalibrating, 'threshold')} of another model than "
            "that of the rules here: forced, they keep their windows and calibrate anew"
        )
    return problems


async def carry_out(store: Store, settings: KafkaSettings, plan: Plan, *, forced: Forced = None) -> None:
    """Import what was planned.

    Args:
        store: of the state.
        settings: where the topic is.
        plan: of `plan_import`.
        forced: is told each reason against it, and it is done; None: a reason refuses it.

    Raises:
        Refusal: something speaks against it; nothing was changed.
        StoreError: the store fails; partitions before that were imported.
    """
    _hold(plan.problems, forced)
    for one in plan.parts:
        at = (settings.group, settings.points_topic, one.section.partition)
        if one.section.whole or one.stored is None:
            stored = {**one.section.blobs, **one.section.fields}
            saved = await store.save(*at, one.offset, stored, whole=True, back=True)
        else:
            # What the file does not have of a series, its shadow, must not stay behind as of another model.
            gone = {key for name in _names(one.section.blobs) for key in _fields(name)} - one.section.blobs.keys()
            saved = await store.save(*at, one.offset, one.section.blobs, deleted=gone, base=one.stored)
        if saved is not Saved.DONE:
            raise StateError(f"partition {at[2]}: its state was changed meanwhile ({saved.value}); try again")


# -- drop -------------------------------------------------------------------------------------------------------------


async def drop_series(
    store: Store, settings: KafkaSettings, log: Log, name: str, *, forced: Forced = None
) -> list[int]:
    """Forget a series in all partitions; it begins anew with its next point. Returns the partitions that had it.

    `forced` as of `carry_out`.

    Raises:
        Refusal: workers run.
        ConfigError: there is no state of it.
        StoreError: the store fails.
    """
    found = await export(store, settings, log, name=name)
    _hold(active(log, settings.group), forced)
    for one in found:
        at = (settings.group, settings.points_topic, one.partition)
        saved = await store.save(*at, one.offset, {}, deleted=_fields(name), base=one.offset)
        if saved is not Saved.DONE:
            raise StateError(f"partition {one.partition}: its state was changed meanwhile ({saved.value}); try again")
    return [one.partition for one in found]


async def drop_partition(
    store: Store, settings: KafkaSettings, log: Log, number: int, *, forced: Forced = None
) -> LogPart:
    """Forget a partition; the worker rebuilds it from the log, muted. Returns the log that is left for that.

    `forced` as of `carry_out`.

    Raises:
        Refusal: workers run, or the log has lost its beginning.
        ConfigError: there is no such partition, or no state of it.
        StoreError: the store fails.
    """
    at = (settings.group, settings.points_topic, check_partition(log, settings, number))
    if await store.fields(*at, ()) is None:
        raise ConfigError(_nothing(settings, f"partition {number}"))
    part, problems = log.parts[number], active(log, settings.group)
    if part.begin > 0:
        problems.append(
            f"partition {number}: its log begins at {part.begin}, not at 0: forced, windows and thresholds are rebuilt "
            "from what it still holds, and series that sent nothing since are forgotten"
        )
    _hold(problems, forced)
    await store.drop(*at)
    return part


def active(log: Log, group: str) -> list[str]:
    """Return what speaks against a change while workers run."""
    if not log.members:
        return []
    return [
        f"group {group} has {_counted(len(log.members), 'member')} ({_some(log.members)}): a worker keeps the state in "
        "memory and writes it back; stop them all, or wait for the session of one that was killed to run out"
    ]


# -- shared -----------------------------------------------------------------------------------------------------------


def _hold(problems: Sequence[str], forced: Forced) -> None:
    """Refuse, or say what speaks against it."""
    if problems and forced is None:
        raise Refusal(problems)
    for problem in problems:
        assert forced is not None
        forced(problem)


def check_partition(log: Log, settings: KafkaSettings, number: int) -> int:
    """Return the number of a partition that there is.

    Raises:
        ConfigError: there is none.
    """
    if number not in log.parts:
        raise ConfigError(f"--partition {number}: {settings.points_topic} has {len(log.parts)}, from 0")
    return number


def _fields(name: str) -> tuple[bytes, bytes]:
    return name.encode(), name.encode() + SHADOW


def _names(blobs: Collection[bytes] | Mapping[bytes, bytes]) -> list[str]:
    return sorted({key.removesuffix(SHADOW).decode("utf-8", "replace") for key in blobs})


def _nothing(settings: KafkaSettings, what: str) -> str:
    return f"nothing is stored of {what} of {settings.points_topic}, group {settings.group}"


def _absent(name: str, settings: KafkaSettings, log: Log) -> str:
    own = partition_of(name, len(log.parts)) if log.parts else 0
    what = f"{name!r} in any partition"
    return f"{_nothing(settings, what)}; keyed by its name its points would be in partition {own}"


def _counted(n: int, what: str) -> str:
    return f"{n:,} {what}" if n == 1 else f"{n:,} {what}s"


def _some(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more:,} more" if more > 0 else "")
