"""The same core without any server: points of files in, events out, and training series cut from them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TextIO

import numpy as np
import pandas as pd

from models.checkpoint import Bundle, Checkpoint
from models.windows import TrainSeries
from stream import grid
from stream.columns import Columns, Int32Array, Int64Array
from stream.detector import Counts, Detector, Result
from stream.errors import ConfigError, InputError
from stream.points import Points
from stream.results import Scores
from stream.sample import Sample

BATCH_POINTS = 10_000
CELLS_MAX = 50_000_000  # of one KPI in training: 95 years of minutes, and 400 MB; one stray timestamp asks for more


def run(
    detector: Detector, points: Points, *, want_scores: bool = False, first: int = 0
) -> Iterator[tuple[int, Result]]:
    """Feed points to a detector, a batch at a time; yields how many have gone in, and what came of the batch.

    What a model does not know of an entity is left out, as the decoder does with it.

    Args:
        detector: takes the points as one partition would.
        points: in the order of replay.
        want_scores: ask for the score of every cell.
        first: index of the first point to feed.

    Raises:
        InputError: a name cannot be one, or a model knows none of an entity's metrics.
    """
    offset, slots, features = _seats(detector, points)
    record = points.record
    edges = np.append(np.flatnonzero(points.begins), len(points))  # a record is never cut
    begin = first
    while begin < len(points):
        at = max(
            np.searchsorted(edges, begin + BATCH_POINTS, side="right") - 1, np.searchsorted(edges, begin, side="right")
        )
        end = int(edges[at])
        seat = offset[points.kpi[begin:end]] + points.feature[begin:end]
        columns = Columns.of(
            slots[seat],
            points.timestamp_ms[begin:end],
            points.value[begin:end],
            record[begin:end] - record[begin],
            features[seat],
        )
        known = columns.slot >= 0
        yield end, detector.accept(columns if known.all() else columns.take(known), want_scores=want_scores)
        begin = end


def count_series(detector: Detector, points: Points) -> int:
    """Return how many series a detector makes of the points: an entity may be one, or one a metric."""
    slots = _seats(detector, points)[1]
    return len(np.unique(slots[slots >= 0]))


def _seats(detector: Detector, points: Points) -> tuple[Int64Array, Int32Array, Int32Array]:
    """Return where the points go: slot and feature of each (name, metric), and where each name's begin; -1 nowhere."""
    offset, slots, features = [], list[int](), list[int]()
    for name, metrics in zip(points.names, points.metrics, strict=True):
        offset.append(len(slots))
        entity = detector.index.entity(name) if metrics else None
        if entity is None:
            own = [f"{name}.{metric}" for metric in metrics] or [name]
            slots += [detector.index[one] for one in own]
            features += [0] * len(own)
            entities = detector.index.entities
            if wrong := next((one for one in own if (slot := detector.index[one]) < 0 or slot in entities), None):
                raise InputError(f"{wrong!r} cannot be the name of a KPI")
            continue
        places = [entity.features.get(metric, -1) for metric in metrics]
        if max(places) < 0:
            raise InputError(
                f"none of the metrics of {name} ({_few(metrics)}) is known to its model, which knows "
                f"{_few(list(entity.features))}"
            )
        slots += [entity.slot if place >= 0 else -1 for place in places]
        features += [max(place, 0) for place in places]
    return np.array(offset, np.int64), np.array(slots, np.int32), np.array(features, np.int32)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + ", …" * (len(names) > 5)


def prime(detector: Detector, points: Points, first: int) -> None:
    """Feed the points just before `first`, muted, so that scoring begins with that very point.

    A calibrated detector needs a full window. One that calibrates itself needs its warm-up as well; these are the last
    points of a head that a model was trained on, which training holds out. What they cause is nobody's: the counts
    begin anew.

    Args:
        detector: a new one.
        points: all of them.
        first: index of the first point that counts.
    """
    config, cells = detector.config, 2 * max(group.window for group in detector.groups)  # missing points, late ones
    calibrated = all(
        group.served.calibrations and min(map(len, group.served.calibrations)) >= config.pot.min_scores
        for group in detector.groups
    )
    warmup_ms = int(detector.table.warmup_ms.max())
    taken = np.zeros(len(points), np.bool_)
    record = points.record
    for k in range(len(points.names)):
        own = np.flatnonzero((points.kpi[:first] == k) & ~np.isnan(points.value[:first]))
        if not len(own):
            continue
        place = own[np.unique(record[own], return_index=True)[1]]  # of each record, its first value
        begin = len(place) - cells
        if not calibrated:
            time = points.timestamp_ms[place]
            begin = min(begin, int(np.searchsorted(time, time[-1] - warmup_ms)) - cells)
            begin = min(begin, len(place) - cells - config.pot.min_scores)
        taken[own[own >= place[max(begin, 0)]]] = True
    if not taken.any():
        return
    for _ in run(detector, points.take(taken)):
        pass
    for one in fields(Counts):  # in place: the groups count into the same
        setattr(detector.counts, one.name, 0)


def training_series(points: Points, interval_ms: int = 0, digests: dict[str, str] | None = None) -> list[TrainSeries]:
    """Lay each KPI or entity of the points out on its regular grid.

    Args:
        points: unsorted and repeated ones are welcome; of a cell's points the last one wins.
        interval_ms: grid step; 0 infers it as the detector does.
        digests: SHA-256 of the file of each KPI or entity, for the record.

    Raises:
        InputError: a KPI has too few points to have a grid, or its grid is too long to lay out.
        ConfigError: entities have differing metrics, or there are KPIs besides entities.
    """
    metrics = _common_metrics(points)
    series = []
    known = np.flatnonzero(~np.isnan(points.value))
    known = known[np.argsort(points.kpi[known], kind="stable")]  # once: a topic may hold thousands of KPIs
    edges = np.searchsorted(points.kpi[known], np.arange(len(points.names) + 1))
    for k, name in enumerate(points.names):
        own = known[edges[k] : edges[k + 1]]
        own = own[np.argsort(points.timestamp_ms[own], kind="stable")]
        time, value, label = points.timestamp_ms[own], points.value[own], points.label[own]
        distinct = np.unique(time)
        if len(distinct) < grid.PROBE_POINTS:
            raise InputError(
                f"{name}: {len(distinct)} points with a value; training needs at least {grid.PROBE_POINTS}"
            )
        inferred, phase = grid.infer_interval(distinct[None, : grid.PROBE_POINTS])
        interval = interval_ms or int(inferred[0])
        origin = int(time[0]) if interval_ms else int(phase[0])
        cell: Int64Array = (time - origin + interval // 2) // interval
        start_ms = origin + int(cell[0]) * interval
        cell -= cell[0]
        width = max(len(metrics), 1)
        if cell[-1] >= CELLS_MAX // width:
            raise InputError(
                f"{name}: its {len(value)} points span {cell[-1] + 1} cells of {interval / 1000:g} s, the limit is "
                f"{CELLS_MAX // width}; mend its timestamps or set the interval"
            )
        place = np.array([metrics.index(metric) for metric in points.metrics[k]] or [0])
        values = np.full((int(cell[-1]) + 1, width), np.nan)
        values[cell, place[points.feature[own]]] = value
        anomalous = np.zeros(len(values), np.bool_)
        anomalous[cell[label == 1]] = True
        digest = (digests or {}).get(name, "")
        series.append(TrainSeries(name, values, anomalous, interval, digest, metrics, start_ms))
    return series


def _common_metrics(points: Points) -> tuple[str, ...]:
    """Return the metrics that all entities have, in the order of the first; none of KPIs."""
    first = points.metrics[0] if points.metrics else ()
    for name, metrics in zip(points.names, points.metrics, strict=True):
        missing, more = [m for m in first if m not in metrics], [m for m in metrics if m not in first]
        if missing or more:
            differs = [f"has no {_few(missing)}"] * bool(missing) + [f"has {_few(more)}"] * bool(more)
            raise ConfigError(
                f"{name} {' and '.join(differs)}, other than {points.names[0]}; a model of entities needs the same "
                "metrics of all: train them one by one, or cut the files to the metrics that they share"
            )
    return first


def head(points: Points, fraction: float) -> tuple[Points, int]:
    """Return the first part of the points, and the index of the first point behind it; a record is never cut."""
    edges = np.append(np.flatnonzero(points.begins), len(points))
    end = int(edges[np.searchsorted(edges, int(len(points) * fraction), side="right") - 1])
    return points.take(slice(end)), end


def sample_points(samples: Sequence[Sample]) -> Points:
    """Return generated KPIs as one stream, merged by time."""
    time = np.concatenate([one.timestamp_ms for one in samples])
    order = np.argsort(time, kind="stable")
    lengths = [len(one.value) for one in samples]
    return Points(
        names=tuple(one.name for one in samples),
        timestamp_ms=time[order],
        kpi=np.repeat(np.arange(len(samples), dtype=np.int32), lengths)[order],
        value=np.concatenate([one.value for one in samples])[order],
        label=np.concatenate([one.label for one in samples])[order].astype(np.int8),
    )


def trained_checkpoint(bundle: Bundle) -> Checkpoint:
    """Return what was just trained as a checkpoint that lies in no repository, `trained@0`."""
    return Checkpoint(
        name="trained",
        version=0,
        path=Path(),
        model=bundle.model,
        calibrations=bundle.calibrations,
        interval_ms=bundle.interval_ms,
        training=bundle.training,
        metrics=bundle.metrics,
        members=bundle.members,
    )


class ScoreWriter:
    """Writes the scores of a run to a CSV file, a row a cell; empty fields where there was no value or no score."""

    COLUMNS = ("timestamp", "value", "expected", "lower", "upper", "score", "threshold", "probability", "anomaly")

    def __init__(self, file: TextIO, detector: Detector, *, many: bool) -> None:
        self._file = file
        self._detector = detector
        self._many = many
        file.write(",".join(("kpi",) * many + self.COLUMNS) + "\n")

    @classmethod
    @contextmanager
    def to(cls, path: Path | None, detector: Detector, *, many: bool) -> Iterator[ScoreWriter | None]:
        """Open the file for the length of a run; None without a path. `many` KPIs get a column with their names."""
        if path is None:
            yield None
            return
        try:
            file = path.open("w", newline="", encoding="utf-8")
        except OSError as e:
            raise InputError(f"{path}: cannot be written: {e.strerror}") from None
        with file:
            yield cls(file, detector, many=many)

    def write(self, scores: Sequence[Scores]) -> None:
        """Append the scores of a batch, oldest first."""
        if not scores:
            return
        columns = {f.name: np.concatenate([getattr(part, f.name) for part in scores]) for f in fields(Scores)}
        table = pd.DataFrame(columns).sort_values("timestamp_ms", kind="stable")
        seconds, rest = table["timestamp_ms"] // 1000, table["timestamp_ms"] % 1000
        table["timestamp"] = seconds.astype(str).where(rest == 0, (table["timestamp_ms"] / 1000).map("{:.3f}".format))
        table["value"] = table["value"].map(lambda x: "" if np.isnan(x) else repr(float(x)))  # as it came, not rounded
        table["anomaly"] = table["anomaly"].astype(int)
        table["kpi"] = self._detector.names(table["slot"].tolist())
        shown = list(("kpi",) * self._many + self.COLUMNS)
        table[shown].to_csv(self._file, header=False, index=False, float_format="%.6g", lineterminator="\n")
