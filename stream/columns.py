"""Columns: what a batch of points is, once decoded. Everything behind the decoder works on these arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import numpy.typing as npt

BoolArray = npt.NDArray[np.bool_]
Int8Array = npt.NDArray[np.uint8]
Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
UInt64Array = npt.NDArray[np.uint64]
Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
AnyArray = npt.NDArray[Any]

NAME_BYTES_MAX = 512


@dataclass(frozen=True, slots=True)
class Entity:
    """An entity that is watched as one series: its slot, and the place of each of its metrics."""

    slot: int
    features: Mapping[str, int]


class SeriesIndex(dict[str, int]):
    """Series name -> slot, the row that the series has in every array of a detector.

    Looking a new name up gives it a slot. A name that cannot be a series name gives -1 and is
    not kept, so that junk cannot fill the memory.

    Attributes:
        names: the name of each slot; "" of one that is free.
        entities: those that are watched as one series, by slot.
        new: slots that were given since somebody last emptied this list.
    """

    def __init__(
        self, names: Iterable[str] = (), metrics_of: Callable[[str], Sequence[str] | None] = lambda name: None
    ) -> None:
        """Make an index of these names.

        Args:
            names: of KPIs, in the order of their slots.
            metrics_of: the metrics of an entity in the order of its model's features; None for an entity that is
                watched metric by metric.
        """
        super().__init__()
        self.names: list[str] = []
        self.new: list[int] = []
        self.entities: dict[int, Entity] = {}
        self._metrics_of = metrics_of
        self._by_metric: set[str] = set()  # entities that are watched metric by metric
        self._released: list[int] = []  # slots to be freed before the next batch
        self._free: list[int] = []
        for name in names:
            self[name]

    def __missing__(self, name: str) -> int:
        if name_problem(name) is not None:
            return -1
        if self._free:
            slot = self._free.pop()
            self.names[slot] = name
        else:
            slot = len(self.names)
            self.names.append(name)
        self[name] = slot
        self.new.append(slot)
        return slot

    def release(self, slots: Iterable[int]) -> None:
        """Let the names of slots be forgotten once nothing of the batch in hand speaks of them any more."""
        self._released = [slot for slot in slots if self.names[slot]]

    def begin_batch(self) -> None:
        """Forget what was released; those slots go to the next new names."""
        if not self._released:
            return
        for slot in self._released:
            del self[self.names[slot]]
            self.names[slot] = ""
            self.entities.pop(slot, None)
        self._free += self._released
        self._released = []
        self._by_metric.clear()

    def entity(self, name: str) -> Entity | None:
        """Return the entity of a name that can be one; None if it is watched metric by metric."""
        slot = self.get(name, -1)
        if (known := self.entities.get(slot)) is not None:
            return known
        if name in self._by_metric:
            return None
        metrics = self._metrics_of(name) if slot < 0 else None  # a KPI of that name was first
        if metrics is None:
            self._by_metric.add(name)
            return None
        entity = Entity(self[name], {metric: i for i, metric in enumerate(metrics)})
        self.entities[entity.slot] = entity
        return entity


def name_problem(name: object) -> str | None:
    """Say why something cannot be a series name, or None when it can.

    Unprintable characters are refused because nobody could type them, and because the store keeps its own fields
    under names that hold a control character.
    """
    if not isinstance(name, str):
        return "no series name: the record needs `kpi` (a string)"
    if not name or name.isspace():
        return "the series name is empty"
    if not name.isprintable():
        return f"the series name {name[:40]!r} holds a control character or one that cannot be shown"
    if len(name.encode("utf-8", "surrogatepass")) > NAME_BYTES_MAX:
        return f"the series name {name[:40]!r}… is longer than {NAME_BYTES_MAX} bytes"
    return None


@dataclass(frozen=True, slots=True)
class Columns:
    """N points in the order of their arrival.

    Attributes:
        slot: the series of each point, (N,) int32.
        timestamp_ms: event time, ms since 1970 UTC, (N,) int64.
        value: (N,) float64; NaN says that the value is missing.
        row: the record of the batch that the point came in, (N,) int64, never falling.
        feature: which metric of an entity the value is, (N,) int32; 0 for a KPI.
    """

    slot: Int32Array
    timestamp_ms: Int64Array
    value: Float64Array
    row: Int64Array
    feature: Int32Array

    def __len__(self) -> int:
        return len(self.slot)

    def take(self, which: npt.NDArray[np.integer] | BoolArray | slice) -> Self:
        """Return the points that `which` (indices, a mask or a slice) names, in its order."""
        return type(self)(*(getattr(self, f.name)[which] for f in fields(self)))

    @classmethod
    def concatenate(cls, parts: Iterable[Columns]) -> Self:
        """Return the points of all parts, one part after the other."""
        parts = list(parts)
        return cls(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(cls)))

    @classmethod
    def empty(cls) -> Self:
        """Return no points."""
        return cls.of([], [], [], [])

    @classmethod
    def of(
        cls,
        slot: npt.ArrayLike,
        timestamp_ms: npt.ArrayLike,
        value: npt.ArrayLike,
        row: npt.ArrayLike | None = None,
        feature: npt.ArrayLike | None = None,
    ) -> Self:
        """Return columns from anything array-like; `row` counts from 0 and `feature` is 0 where they are not given."""
        slots = np.asarray(slot, np.int32)
        rows = np.arange(len(slots), dtype=np.int64) if row is None else np.asarray(row, np.int64)
        features = np.zeros(len(slots), np.int32) if feature is None else np.asarray(feature, np.int32)
        return cls(slots, np.asarray(timestamp_ms, np.int64), np.asarray(value, np.float64), rows, features)
