"""Training data as people keep it: CSV, npz and Parquet files, and the history of a topic, all read into points.

Whether a file is what it says is told by its content, not its name. In all of them a file with one column of values is
a KPI named by the file's stem, and of several each is a KPI, `<stem>.<column>`; or all of them are the metrics of one
entity, where that is asked for.

- CSV: by the rules of `stream.csvfile`.
- npz: `values`, (N, F) or (N,), or `train` as the public benchmarks have it; besides `values` there may be `timestamp`
  (N,), epoch seconds or milliseconds, and `label` (N,), 0 or 1; and `metrics` (F,), names, in either. Without
  `timestamp` the rows are one interval apart, which has to be given. A `label` beside `train` is that of the test part.
- Parquet: columns named as in a CSV; times may be of Parquet's own type.

Arrays are never unpickled. What a header claims is checked against the file before anything is allocated.
"""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from tokenize import TokenError
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pandas as pd

from stream import csvfile
from stream.columns import BoolArray, Columns, Entity, Float64Array, Int64Array, SeriesIndex, name_problem
from stream.csvfile import LABEL_COLUMNS, MISSING_COLUMNS, SERIES_COLUMNS, TIME_COLUMNS, VALUE_COLUMNS, Table
from stream.errors import InputError
from stream.grid import PROBE_POINTS
from stream.maintenance import Weekly
from stream.points import Points
from stream.records import SECONDS_BELOW, TIMESTAMP_MAX_MS, VALUE_MAX, decode
from stream.settings import KafkaSettings
from stream.tail import read_tail

CELLS_MAX: Final = 50_000_000  # values of a file or a topic: 400 MB of them, and as much again while they are sorted
BYTES_MAX: Final = 2 << 30  # of a file, unpacked
_HEADER_MAX: Final = 65_536  # bytes of the header of an array

# What numpy raises for a header that is none: it evaluates it as Python's literals, and before that may tokenize it.
_NO_HEADER = (ValueError, SyntaxError, TypeError, KeyError, TokenError, RecursionError, MemoryError)
_ZIP, _PARQUET = b"PK\x03\x04", b"PAR1"


def read_table(path: Path, *, entity: bool = False, interval_ms: int = 0) -> Table:
    """Read one file.

    Args:
        path: of a CSV, npz or Parquet file.
        entity: the file is one entity, and its columns are the metrics.
        interval_ms: time from one row to the next of an npz without times; 0: not known.

    Raises:
        InputError: the file cannot be read as one of them; the message says what is wrong with it.
    """
    try:
        with path.open("rb") as file:
            head = file.read(4)
    except OSError:
        head = b""  # the reader of CSV files says why
    if head == _ZIP:
        return _read_npz(path, entity=entity, interval_ms=interval_ms)
    if head == _PARQUET:
        return _read_parquet(path, entity=entity)
    return csvfile.read_table(path, entity=entity)


# -- npz ------------------------------------------------------------------------------------------------------------


def _read_npz(path: Path, *, entity: bool, interval_ms: int) -> Table:
    arrays = _arrays(path)
    key = next((name for name in ("values", "train") if name in arrays), None)
    if key is None:
        raise InputError(f"{path}: holds the arrays {_few(list(arrays))}; name one of them values, (N, F) or (N,)")
    values = _numbers(path, key, arrays[key])
    if values.ndim == 1:
        values = values[:, None]
    if values.ndim != 2 or not values.size:
        raise InputError(f"{path}: {key} is {arrays[key].shape}, and (N, F) or (N,) is needed")
    n, width = values.shape
    label = np.full(n, -1, np.int8)
    if key == "values" and "label" in arrays:
        label = _label(path, arrays["label"], n)
    if "timestamp" in arrays and (key == "values" or arrays["timestamp"].shape == (n,)):
        stamp = _stamps(path, _numbers(path, "timestamp", arrays["timestamp"]), n)
    elif interval_ms:
        stamp = interval_ms * np.arange(n, dtype=np.int64)
    else:
        raise InputError(
            f"{path}: has no `timestamp`; give the time from one row to the next with --interval, such as 1m"
        )
    names = _metric_names(path, arrays.get("metrics"), width)
    return _table(path, _Columns(stamp, values, label, names), entity=entity)


def _arrays(path: Path) -> dict[str, Any]:
    """The arrays that matter, by name; each fits its file, and none is unpickled."""
    wanted = ("values", "train", "timestamp", "label", "metrics")
    found: dict[str, Any] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            members = {one.filename.removesuffix(".npy"): one for one in archive.infolist()}
            size = sum(members[name].file_size for name in wanted if name in members)
            if size > BYTES_MAX:
                raise InputError(f"{path}: {size:,} bytes when unpacked, and at most {BYTES_MAX:,} are read")
            for name in wanted:
                if name in members:
                    found[name] = _array(path, name, archive, members[name])
            return found or dict.fromkeys(members)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError) as error:
        raise InputError(f"{path}: damaged npz file ({error}); fetch it again") from None


def _array(path: Path, name: str, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Any:
    """One array. Its header is read first: what it claims is allocated before a byte of it is there."""
    try:
        with archive.open(member) as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(file, max_header_size=_HEADER_MAX)
    except _NO_HEADER as error:
        raise InputError(f"{path}: {name} is no array: {_line(error)}") from None
    if dtype.hasobject or dtype.kind not in "biufU":
        raise InputError(f"{path}: {name} holds {dtype}, and numbers are needed; objects are never loaded")
    claimed = dtype.itemsize
    for length in shape:
        claimed *= length
    if claimed > member.file_size:
        raise InputError(f"{path}: {name} claims {claimed:,} bytes of the {member.file_size:,} that are there")
    try:
        with archive.open(member) as file:
            return np.lib.format.read_array(file, allow_pickle=False, max_header_size=_HEADER_MAX)
    except _NO_HEADER as error:
        raise InputError(f"{path}: {name} is no array: {_line(error)}") from None


def _numbers(path: Path, name: str, array: Any) -> Float64Array:
    if array.dtype.kind not in "biuf":
        raise InputError(f"{path}: {name} holds {array.dtype}, and numbers are needed")
    return np.asarray(array, np.float64)


def _label(path: Path, array: Any, n: int) -> Any:
    label = _numbers(path, "label", array)
    if label.shape != (n,) or not np.isin(label, (0, 1)).all():
        raise InputError(f"{path}: label is {label.shape}, and ({n},) of 0 and 1 is needed")
    return label.astype(np.int8)


def _metric_names(path: Path, array: Any, width: int) -> tuple[str, ...]:
    """Names of the columns: those of the file, or their numbers from 0."""
    if array is None:
        return tuple(map(str, range(width)))
    names = tuple(map(str, array.reshape(-1).tolist()))
    if len(names) != width or len(set(names)) < width:
        raise InputError(f"{path}: metrics holds {len(set(names))} names for {width} columns; each needs its own")
    return names


# -- Parquet --------------------------------------------------------------------------------------------------------


def _read_parquet(path: Path, *, entity: bool) -> Table:
    frame = _frame(path)
    keys = [re.sub(r"^[@_]+", "", re.sub(r"[\s-]+", "_", str(name).strip().lower())) for name in frame.columns]

    def find(words: Sequence[str]) -> int | None:
        return next((keys.index(word) for word in words if word in keys), None)

    found = f"columns are {_few([str(name) for name in frame.columns])}"
    times = [i for i in range(len(keys)) if pd.api.types.is_datetime64_any_dtype(frame.dtypes.iloc[i])]
    time = find(TIME_COLUMNS)
    time = time if time is not None else (times[0] if len(times) == 1 else None)
    if time is None:
        raise InputError(f"{path}: no timestamp column: {found}; name one of them {', '.join(TIME_COLUMNS[:6])}")
    label, missing, series = find(LABEL_COLUMNS), find(MISSING_COLUMNS), find(SERIES_COLUMNS)
    columns = [i for i in range(len(keys)) if i not in (time, label, missing, series) and i not in times]
    if series is not None and len(columns) > 1:
        columns = [i for i in columns if keys[i] in VALUE_COLUMNS]
    if not columns or (series is not None and (entity or len(columns) != 1)):
        need = "a line a time, with a column for each metric" if entity and series is not None else "a value column"
        raise InputError(f"{path}: {need} is needed: {found}")
    values = np.stack([_column(path, frame, i) for i in columns], axis=1)
    n = len(frame)
    if missing is not None:
        values[_column(path, frame, missing) == 1] = np.nan
    flags = np.full(n, -1, np.int8)
    if label is not None:
        given = _column(path, frame, label)
        flags = np.where(np.isnan(given), -1, _label(path, np.nan_to_num(given), n)).astype(np.int8)
    stamp = _times(path, frame.iloc[:, time])
    names = tuple(str(frame.columns[i]) for i in columns)
    owner = None if series is None else frame.iloc[:, series].astype(str)
    return _table(path, _Columns(stamp, values, flags, names), entity=entity, owner=owner)


def _frame(path: Path) -> pd.DataFrame:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise InputError(f"{path}: a Parquet file, which needs pyarrow: pip install 'tocsin[parquet]'") from None
    try:
        with ParquetFile(path) as file:
            told = file.metadata
            size = sum(told.row_group(i).total_byte_size for i in range(told.num_row_groups))
            _check_size(path, told.num_rows * told.num_columns)
            if size > BYTES_MAX:
                raise InputError(f"{path}: {size:,} bytes when unpacked, and at most {BYTES_MAX:,} are read")
            frame: pd.DataFrame = file.read().to_pandas()
    except (ArrowException, OSError, ValueError, TypeError, NotImplementedError) as error:
        raise InputError(f"{path}: damaged Parquet file ({_line(error)}); fetch it again") from None
    if not isinstance(frame.index, pd.RangeIndex):
        frame = frame.reset_index(names=[name or "timestamp" for name in frame.index.names])
    if frame.empty:
        raise InputError(f"{path}: holds no rows")
    return frame


def _column(path: Path, frame: pd.DataFrame, i: int) -> Float64Array:
    """A column as numbers; NaN where there is none."""
    column = frame.iloc[:, i]
    if not (pd.api.types.is_numeric_dtype(column) or pd.api.types.is_bool_dtype(column)):
        with suppress(ValueError, TypeError):  # decimals, or all of them null
            return np.asarray(pd.to_numeric(column), np.float64)
        raise InputError(f"{path}: column {frame.columns[i]!r} holds {column.dtype}, and numbers are needed")
    return column.to_numpy(dtype=np.float64, na_value=np.nan)


def _times(path: Path, column: pd.Series[Any]) -> Int64Array:
    """A column of times as ms since 1970; a time without a zone is UTC."""
    if pd.api.types.is_numeric_dtype(column):
        return _stamps(path, column.to_numpy(dtype=np.float64, na_value=np.nan), len(column))
    parsed = pd.to_datetime(column, utc=True, errors="coerce", format="ISO8601")
    if parsed.isna().any():
        raise InputError(f"{path}: column {column.name!r}: {_short(column[parsed.isna()].iloc[0])} is no time")
    moments = parsed.dt.tz_localize(None).to_numpy("datetime64[us]").astype(np.int64)
    return _stamps(path, moments / 1000, len(column), unit_ms=1.0)


# -- what all files share -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Columns:
    """Rows of a file: times (N,), values (N, F), labels (N,) and the names of the F columns."""

    stamp: Int64Array
    values: Float64Array
    label: npt.NDArray[np.int8]
    names: tuple[str, ...]


def _table(path: Path, columns: _Columns, *, entity: bool, owner: pd.Series[Any] | None = None) -> Table:
    """The rows as points; `owner` names the KPI of each row, where a column does."""
    n, width = columns.values.shape
    _check_size(path, n * width)
    if (np.abs(columns.values) > VALUE_MAX).any():
        row = int(np.flatnonzero((np.abs(columns.values) > VALUE_MAX).any(axis=1))[0])
        raise InputError(
            f"{path}: row {row}: a value is infinite or beyond {VALUE_MAX:g}; write NaN where it is missing"
        )
    names: tuple[str, ...]
    metrics: tuple[str, ...] = ()
    feature = np.zeros(n * width, np.int32)
    kpi = np.tile(np.arange(width, dtype=np.int32), n)
    if entity:
        names, metrics, feature, kpi = (path.stem,), columns.names, kpi, feature
    elif owner is not None:
        codes, found = pd.factorize(owner)
        names, kpi = tuple(map(str, found)), codes.astype(np.int32)
    else:
        names = (path.stem,) if width == 1 else tuple(f"{path.stem}.{name}" for name in columns.names)
    for name in (*names, *(f"{path.stem}.{metric}" for metric in metrics)):
        if problem := name_problem(name):
            raise InputError(f"{path}: {problem}")
    return Table(
        path=path,
        names=names,
        timestamp_ms=np.repeat(columns.stamp, width),
        kpi=kpi,
        value=columns.values.reshape(-1),
        label=np.repeat(columns.label, width),
        line=np.repeat(np.arange(n, dtype=np.int64), width),
        refused=(),
        n_refused=0,
        metrics=metrics,
        feature=feature,
    )


def _check_size(path: Path, cells: int) -> None:
    if cells > CELLS_MAX:
        raise InputError(f"{path}: {cells:,} values, and at most {CELLS_MAX:,} are read; cut it")


def _stamps(path: Path, numbers: Float64Array, n: int, unit_ms: float = 0.0) -> Int64Array:
    """Times as ms since 1970, (N,), of numbers in seconds or milliseconds, told apart as in a CSV."""
    if numbers.shape != (n,):
        raise InputError(f"{path}: timestamp is {numbers.shape}, and ({n},) is needed")
    if not unit_ms:
        unit_ms = 1000.0 if np.median(numbers) < SECONDS_BELOW else 1.0
    with np.errstate(over="ignore"):
        stamp = np.rint(numbers * unit_ms)
    wrong = ~((stamp >= 0) & (stamp <= TIMESTAMP_MAX_MS))  # NaN too
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise InputError(f"{path}: row {row}: timestamp {numbers[row]:.15g} is before 1970 or after 2200, or none")
    return stamp.astype(np.int64)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + ", …" * (len(names) > 8) if names else "none"


def _line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _short(value: object) -> str:
    return repr(str(value)[:60])


# -- a topic --------------------------------------------------------------------------------------------------------


class _EveryMetric(dict[str, int]):
    """Metric -> place; one that is asked for and not there gets the next."""

    def __contains__(self, metric: object) -> bool:
        return True

    def __missing__(self, metric: str) -> int:
        self[metric] = place = len(self)
        return place


class _EntityIndex(SeriesIndex):
    """An index in which every entity is one series, of all metrics that it sends."""

    def entity(self, name: str) -> Entity | None:
        slot = self.get(name, -1)
        if slot < 0:
            slot = self[name]
            self.entities[slot] = Entity(slot, _EveryMetric())
        return self.entities.get(slot)  # None: a KPI of that name was first


@dataclass(frozen=True, slots=True)
class History:
    """What a topic held.

    Attributes:
        points: in the order of their partitions.
        rejected: records that could not be read.
        left_out: offsets that were asked for and are too many.
    """

    points: Points
    rejected: int
    left_out: int


async def read_topic(
    settings: KafkaSettings,
    topic: str,
    *,
    since_ms: int | None,
    entity: bool = False,
    records_max: int = CELLS_MAX,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> History:
    """Read the points of a topic, from when the broker received them up to where it ends at the start.

    Args:
        settings: where the broker is.
        topic: its name.
        since_ms: none that the broker received earlier, ms since 1970; None: from the beginning.
        entity: records of entities are one series each; else each metric is a KPI, `<entity>.<metric>`.
        records_max: the last of each partition, at most.
        on_progress: told how many of how many offsets are done.

    Raises:
        TocsinError: there is no such topic, it is empty, or it stopped giving records half way.
        BrokerError: the broker cannot be reached, or refuses.
        InputError: it holds too many points.
    """
    index = _EntityIndex() if entity else SeriesIndex()
    parts: list[Columns] = []
    rejected = points = 0

    def take(records: Sequence[Any]) -> None:
        nonlocal rejected, points
        columns, refused = decode([record.value for record in records], index)
        rejected += len(refused)
        points += len(columns)
        if points > CELLS_MAX:
            raise InputError(f"topic {topic} holds more than {CELLS_MAX:,} points in that time; try a shorter --since")
        parts.append(columns)

    extent = await read_tail(
        settings, topic, records=records_max, since_ms=since_ms, on_records=take, on_progress=on_progress
    )
    columns = Columns.concatenate(parts) if parts else Columns.empty()
    metrics = tuple(
        tuple(index.entities[slot].features) if slot in index.entities else () for slot in range(len(index.names))
    )
    found = Points(
        names=tuple(index.names),
        timestamp_ms=columns.timestamp_ms,
        kpi=columns.slot,
        value=columns.value,
        label=np.full(len(columns), -1, np.int8),
        metrics=metrics,
        feature=columns.feature,
    )
    return History(found, rejected, extent.left_out)


# -- a choice of them -----------------------------------------------------------------------------------------------


def choose(points: Points, match: Sequence[str] = (), *, entity: bool = False) -> tuple[Points, dict[str, str]]:
    """Return the series of a topic that can be learned from, by name, and why each of the others cannot.

    Args:
        points: of a topic.
        match: patterns of names, `*` and `?` as in a shell; none: all.
        entity: entities only.
    """
    left: dict[str, str] = {}
    kept = []
    times = _distinct_times(points)
    for k, name in enumerate(points.names):
        if match and not any(fnmatchcase(name, pattern) for pattern in match):
            continue
        wrong = next(filter(None, (name_problem(one) for one in points.series(k))), None)
        if wrong is None and entity and not points.metrics[k]:
            wrong = "is a KPI, and entities are asked for"
        if wrong is None and times[k] < PROBE_POINTS:
            wrong = f"has values of {times[k]} times, and {PROBE_POINTS} are needed at least"
        if wrong is None:
            kept.append(k)
        else:
            left[name] = wrong
    if not kept:
        if left:
            name, why = next(iter(left.items()))
            raise InputError(f"no series to learn from: {name} {why}")
        raise InputError(f"no series to learn from: none of {_few(points.names)} matches {' or '.join(match)}")
    kept.sort(key=lambda k: points.names[k])  # not as the partitions happened to answer: a training depends on it
    place = np.full(len(points.names), -1, np.int32)
    place[kept] = np.arange(len(kept))
    chosen = points.take(place[points.kpi] >= 0)
    return (
        Points(
            names=tuple(points.names[k] for k in kept),
            timestamp_ms=chosen.timestamp_ms,
            kpi=place[chosen.kpi],
            value=chosen.value,
            label=chosen.label,
            metrics=tuple(points.metrics[k] for k in kept),
            feature=chosen.feature,
        ),
        left,
    )


def _distinct_times(points: Points) -> Int64Array:
    """Of how many times each name has a value, (names,)."""
    known = ~np.isnan(points.value)
    kpi, time = points.kpi[known], points.timestamp_ms[known]
    order = np.lexsort((time, kpi))
    new = np.ones(len(order), np.bool_)
    new[1:] = (np.diff(kpi[order]) != 0) | (np.diff(time[order]) != 0)
    counts: Int64Array = np.bincount(kpi[order][new], minlength=len(points.names))
    return counts


def wanted_times(
    times: Int64Array, hours: tuple[int, int] | None, days: tuple[int, ...] | None, zone: str
) -> BoolArray:
    """Which times, (N,) ms, lie in some hours (minutes of the day from and to) of some days (0 = Monday) of a zone."""
    start, end = hours or (0, 1440)
    return Weekly(tuple(range(7)) if days is None else days, start, end, zone).active(times)
