"""Points of files, in the order of replay."""

from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Points:
    """The points of several files as one stream, in the order of replay.

    Attributes:
        names: the KPIs and entities; the same name in two files is the same one.
        timestamp_ms: (N,) int64, milliseconds since 1970 UTC.
        kpi: (N,) int32, index into names.
        value: (N,) float64; NaN = missing.
        label: (N,) int8: 1 anomalous, 0 normal, -1 unknown. The points of an entity's record share its label.
        metrics: of each name; those of a KPI are empty. None at all: they are all KPIs.
        feature: (N,) int32, index into the metrics of its entity; 0 of a KPI. None at all: they are all KPIs.
    """

    names: tuple[str, ...]
    timestamp_ms: npt.NDArray[np.int64]
    kpi: npt.NDArray[np.int32]
    value: npt.NDArray[np.float64]
    label: npt.NDArray[np.int8]
    metrics: tuple[tuple[str, ...], ...] = ()
    feature: npt.NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))

    def __post_init__(self) -> None:
        """Give KPIs what only entities have."""
        if not self.metrics:
            object.__setattr__(self, "metrics", ((),) * len(self.names))
        if not len(self.feature):
            object.__setattr__(self, "feature", np.zeros(len(self.value), np.int32))

    def __len__(self) -> int:
        return len(self.value)

    def take(self, which: slice | npt.NDArray[np.integer] | npt.NDArray[np.bool_]) -> Self:
        """Return the points that `which` names, in its order."""
        columns = ("timestamp_ms", "kpi", "value", "label", "feature")
        return replace(self, **{name: getattr(self, name)[which] for name in columns})

    @property
    def begins(self) -> npt.NDArray[np.bool_]:
        """Which points begin a record, (N,): each of a KPI; of an entity those of one line are one record."""
        begins = np.ones(len(self), np.bool_)
        begins[1:] = (
            (np.diff(self.kpi) != 0) | (np.diff(self.timestamp_ms) != 0) | (self.feature[1:] <= self.feature[:-1])
        )
        return begins

    @property
    def n_records(self) -> int:
        """How many records they are."""
        return int(self.begins.sum())

    @property
    def n_entities(self) -> int:
        """How many of the names are entities; the others are KPIs."""
        return sum(map(bool, self.metrics))

    @property
    def record(self) -> npt.NDArray[np.int64]:
        """The record of each point, (N,), counted from 0."""
        record: npt.NDArray[np.int64] = np.cumsum(self.begins, dtype=np.int64) - 1
        return record

    def series(self, k: int) -> tuple[str, ...]:
        """Return what the k-th KPI or entity may be watched as: its own name, and those of its metrics as KPIs."""
        return (self.names[k], *(f"{self.names[k]}.{metric}" for metric in self.metrics[k]))
