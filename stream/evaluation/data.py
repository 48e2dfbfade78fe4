"""Labelled files as series to judge, each with the part that may be learned from and the part that is judged.

Labels are kept apart from the points: a model sees none, neither of the part it learns from nor of the other.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np

from models.windows import TrainSeries
from stream import backtest, csvfile, sources
from stream.columns import BoolArray, Int64Array
from stream.errors import InputError
from stream.evaluation import nab
from stream.points import Points

_MINUTE_MS: Final = 60_000
_START_MS: Final = 1_767_571_200_000  # of files without times: 2026-01-05, a Monday
_ZIP: Final = b"PK\x03\x04"


@dataclass(frozen=True, slots=True)
class Series:
    """One KPI or entity to judge.

    Attributes:
        name: its own.
        category: the folder of its file.
        points: of it alone, in the order of the file, with labels.
        first: index of the first point that is judged.
        windows: rows of NAB's windows, (K, 2); None of other data.
        own_part: its file says itself what is to be learned from.
    """

    name: str
    category: str
    points: Points
    first: int
    windows: Int64Array | None = None
    own_part: bool = False

    @property
    def label(self) -> BoolArray:
        """Which records are anomalous, (R,)."""
        return np.asarray(self.points.label[self.points.begins] == 1)

    @property
    def time_ms(self) -> Int64Array:
        """Time of each record, (R,)."""
        return self.points.timestamp_ms[self.points.begins]

    @property
    def first_record(self) -> int:
        """The first record that is judged."""
        return int(self.points.begins[: self.first].sum())

    def learned(self, interval_ms: int = 0) -> TrainSeries:
        """Return the part that may be learned from, on its grid and without labels.

        Raises:
            InputError: it is too short to have a grid.
        """
        part = self.points.take(slice(self.first))
        return backtest.training_series(replace(part, label=np.full(len(part), -1, np.int8)), interval_ms)[0]


def read(
    path: Path, *, fraction: float, entity: bool, as_nab: bool | None = None, interval_ms: int = 0
) -> list[Series]:
    """Read the series of one file.

    Args:
        path: CSV or Parquet with labels, or npz: with `train`, `test` and `label` one entity (of one feature: a KPI),
            else with `values` and `label`.
        fraction: first part of the points that is learned from, where the file does not say.
        entity: a file is one entity, and its columns are the metrics.
        as_nab: the labels are NAB's windows; None: if the file lies in NAB's folders.
        interval_ms: time from row to row of an npz without times; 0: a minute.

    Raises:
        InputError: the file cannot be read, or nothing in it is labelled.
    """
    benchmark = _benchmark(path, interval_ms or _MINUTE_MS)
    if benchmark is not None:
        return [benchmark]
    labels = nab.Labels.beside(path) if as_nab is not False else None
    name = labels.name_of(path) if labels is not None else None
    if as_nab and name is None:
        raise InputError(
            f"{path}: --nab needs labels/combined_windows.json beside the data/ folder, with this file in it"
        )
    table = sources.read_table(path, entity=entity, interval_ms=interval_ms)
    points = csvfile.merge([table])
    if labels is not None and name is not None:
        windows = labels.rows(name, points.timestamp_ms)
        points = replace(points, label=nab.inside(len(points), windows).astype(np.int8))
        return [Series(points.names[0], path.resolve().parent.name, points, nab.probation(len(points)), windows)]
    if not (points.label >= 0).any():
        raise InputError(f"{path}: has no labels, and there is nothing to judge by; a column `label` holds 0 and 1")
    return [
        Series(one.names[0], path.resolve().parent.name, one, backtest.head(one, fraction)[1]) for one in apart(points)
    ]


def apart(points: Points) -> Sequence[Points]:
    """Return the points of each KPI or entity by themselves."""
    return [
        replace(
            points.take(points.kpi == k),
            names=(name,),
            metrics=(points.metrics[k],),
            kpi=np.zeros(int((points.kpi == k).sum()), np.int32),
        )
        for k, name in enumerate(points.names)
    ]


def _benchmark(path: Path, interval_ms: int) -> Series | None:
    """Read an npz of a public benchmark, with its own training and test parts; None for any other file."""
    try:
        with path.open("rb") as file:
            if file.read(4) != _ZIP:
                return None
        with np.load(path, allow_pickle=False) as archive:
            if not {"train", "test", "label"} <= set(archive.files):
                return None
            train, test, label = (np.asarray(archive[one], np.float64) for one in ("train", "test", "label"))
    except OSError as e:
        raise InputError(f"{path}: cannot be read: {e.strerror}") from None
    except (ValueError, zipfile.BadZipFile) as e:
        raise InputError(f"{path}: not an npz of plain arrays: {e}") from None
    train, test = (one[:, None] if one.ndim == 1 else one for one in (train, test))
    if train.ndim != 2 or test.ndim != 2 or train.shape[1] != test.shape[1] or label.shape != (len(test),):
        raise InputError(
            f"{path}: train {train.shape}, test {test.shape} and label {label.shape} do not fit: "
            "(N, F), (M, F) and (M,) are needed"
        )
    values = np.concatenate((train, test))
    n, features = values.shape
    name = path.name.removesuffix(".npz")
    points = Points(
        names=(name,),
        timestamp_ms=np.repeat(_START_MS + interval_ms * np.arange(n, dtype=np.int64), features),
        kpi=np.zeros(values.size, np.int32),
        value=values.reshape(-1),
        label=np.repeat(np.concatenate((np.zeros(len(train)), label)).astype(np.int8), features),
        metrics=(tuple(f"{k:02d}" for k in range(features)),) if features > 1 else (),
        feature=np.tile(np.arange(features, dtype=np.int32), n),
    )
    return Series(name, path.resolve().parent.name, points, len(train) * features, own_part=True)
