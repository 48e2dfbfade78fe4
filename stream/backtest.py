"""The same core without any server: points of files in, events out, and training series cut from them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from models.windows import TrainSeries
from stream import grid
from stream.columns import Columns, Int64Array
from stream.csvfile import Points
from stream.detector import Detector, Result
from stream.errors import InputError

BATCH_POINTS = 10_000


def run(detector: Detector, points: Points, *, want_scores: bool = False, first: int = 0) -> Iterator[tuple[int, Result]]:
    """Feed points to a detector, a batch at a time; yields how many have gone in, and what came of the batch.

    Args:
        detector: takes the points as one partition would.
        points: in the order of replay.
        want_scores: ask for the score of every cell.
        first: index of the first point to feed.
    """
    slots = np.array([detector.index[name] for name in points.names], np.int32)
    if (slots < 0).any():
        raise InputError(f"{points.names[int(np.argmin(slots))]!r} cannot be the name of a KPI")
    for begin in range(first, len(points.value), BATCH_POINTS):
        part = slice(begin, begin + BATCH_POINTS)
        columns = Columns.of(slots[points.kpi[part]], points.timestamp_ms[part], points.value[part])
        yield min(begin + BATCH_POINTS, len(points.value)), detector.accept(columns, want_scores=want_scores)


def training_series(points: Points, interval_ms: int = 0, digests: dict[str, str] | None = None) -> list[TrainSeries]:
    """Lay each KPI of the points out on its regular grid.

    Args:
        points: unsorted and repeated ones are welcome; of a cell's points the last one wins.
        interval_ms: grid step; 0 infers it as the detector does.
        digests: SHA-256 of the file of each KPI, for the record.

    Raises:
        InputError: a KPI has too few points to have a grid.
    """
    series = []
    for k, name in enumerate(points.names):
        own = np.flatnonzero((points.kpi == k) & ~np.isnan(points.value))
        own = own[np.argsort(points.timestamp_ms[own], kind="stable")]
        time, value, label = points.timestamp_ms[own], points.value[own], points.label[own]
        distinct = np.unique(time)
        if len(distinct) < grid.PROBE_POINTS:
            raise InputError(f"{name}: {len(distinct)} points with a value; training needs at least {grid.PROBE_POINTS}")
        inferred, phase = grid.infer_interval(distinct[None, : grid.PROBE_POINTS])
        interval = interval_ms or int(inferred[0])
        origin = int(time[0]) if interval_ms else int(phase[0])
        cell: Int64Array = (time - origin + interval // 2) // interval
        cell -= cell[0]
        values = np.full((int(cell[-1]) + 1, 1), np.nan)
        values[cell, 0] = value
        anomalous = np.zeros(len(values), np.bool_)
        anomalous[cell[label == 1]] = True
        series.append(TrainSeries(name, values, anomalous, interval, (digests or {}).get(name, "")))
    return series


def head(points: Points, fraction: float) -> tuple[Points, int]:
    """Return the first part of the points, and the index of the first point behind it."""
    end = int(len(points.value) * fraction)
    columns = (points.timestamp_ms[:end], points.kpi[:end], points.value[:end], points.label[:end])
    return Points(points.names, *columns), end
