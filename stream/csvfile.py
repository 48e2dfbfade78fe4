"""CSV streams on disk: KPIs as people keep them, read into columns.

Rules, decided once per file:

- Lines: gzip or plain (by content, not by name), UTF-8, any newline. Blank lines and `#` lines are skipped. A record is
  one line: no number holds a newline, and so a stray quote spoils its own line only.
- Separator: of tab, `;` and `,` the one on which most lines agree (a first line `sep=;` settles it). Blanks around
  fields are dropped, quotes are those of csv.
- Header: there is one if the first line names a time column, or holds no number and no time. Without one, two or three
  columns are timestamp, value, label.
- Columns, by name in any case and order: time, label, `missing` (1 = the point is missing), series (`KPI ID`, `name`,
  …: the file is long, each row names its KPI). Every other column is a KPI; with more than one the file is wide.
- Names: a file with one KPI takes the `kpi` argument, or its own stem; a wide one `<stem>.<column>`; a long one its own
  names. In a wide or long file the `kpi` argument picks one KPI.
- Entities, where they are asked for: a file is one entity, named by its stem; its KPIs are the metrics.
- Time: 1970 to 2200. Epoch numbers, whole or not, or ISO 8601 (`YYYY-MM-DD`, then optionally the time and the zone; no
  zone is UTC). Numbers are seconds if their median is below 1e11, else milliseconds. Where that median lies after
  September 2001, a number ten times smaller or larger is a torn one and refused. Rounded to the millisecond.
- Value: a number up to 1e30 in size; empty, nan, null, none, NA and n/a are missing (NaN).
- Label: 0, 1, true, false, yes, no; empty is unknown.

A line that cannot be read is refused and reported, and the rest goes on; a file that cannot is an `InputError`.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from stream.columns import SeriesIndex, name_problem
from stream.csvcells import (
    BAD_LABEL,
    LABELS,
    floats,
    in_range,
    is_number,
    looks_iso,
    number_of,
    short,
    times,
    unit_ms_of,
)
from stream.csvlines import DAMAGED, EXPECTED, content, decode, read_bytes, split
from stream.errors import InputError
from stream.points import Points
from stream.records import VALUE_MAX

MAX_REFUSED: Final = 100  # refused lines kept with their text; all of them are counted
_CHUNK: Final = 2_048  # lines split at once: short-lived lists, else the garbage collector costs half the time
_SNIFFED: Final = 100  # lines that settle the separator and the number of columns

TIME_COLUMNS: Final = (
    "timestamp",
    "timestamp_ms",
    "ts",
    "datetime",
    "time",
    "date",
    "epoch",
    "unix_time",
    "time_stamp",
)
LABEL_COLUMNS: Final = ("label", "labels", "is_anomaly", "anomaly")
MISSING_COLUMNS: Final = ("missing", "is_missing")
SERIES_COLUMNS: Final = ("kpi", "kpi_id", "kpiid", "kpi_name", "name", "series", "series_id", "metric")
VALUE_COLUMNS: Final = ("value", "values", "val")

_T = TypeVar("_T", bound=np.generic)


@dataclass(frozen=True, slots=True)
class RefusedLine:
    """A line that could not be read, and was left out.

    Attributes:
        line: its number in the file, from 1.
        reason: what is wrong with it.
        text: its beginning, quoted and escaped for a message.
    """

    line: int
    reason: str
    text: str


@dataclass(frozen=True, slots=True)
class Table:
    """One file: a row a point, in the file's own order (a wide line gives a row a column, left to right).

    Attributes:
        path: the file.
        names: its KPIs, in order of appearance; or the one entity.
        timestamp_ms: (N,) int64, milliseconds since 1970 UTC; unsorted and repeated if the file is.
        kpi: (N,) int32, index into names.
        value: (N,) float64; NaN = missing, never infinite.
        label: (N,) int8: 1 anomalous, 0 normal, -1 unknown.
        line: (N,) int64, the line number in the file, from 1.
        refused: the first `MAX_REFUSED` lines that were left out.
        n_refused: how many were left out in all.
        metrics: of the entity, in order of its columns; empty in a file of KPIs.
        feature: (N,) int32, index into metrics; 0 of a KPI.
    """

    path: Path
    names: tuple[str, ...]
    timestamp_ms: npt.NDArray[np.int64]
    kpi: npt.NDArray[np.int32]
    value: npt.NDArray[np.float64]
    label: npt.NDArray[np.int8]
    line: npt.NDArray[np.int64]
    refused: tuple[RefusedLine, ...]
    n_refused: int
    metrics: tuple[str, ...]
    feature: npt.NDArray[np.int32]

    @property
    def labelled(self) -> bool:
        """True if at least one point has a label."""
        return bool((self.label >= 0).any())


@dataclass(frozen=True, slots=True)
class _Layout:
    """Which field of a line is what; None = the file has no such column."""

    separator: str
    width: int  # fields a line
    header: tuple[str, ...] | None
    time: int
    values: tuple[int, ...]  # one column, or the columns of a wide file
    label: int | None
    missing: int | None
    series: int | None


def read_table(path: Path, *, kpi: str | None = None, entity: bool = False) -> Table:
    """Read one CSV file by the rules at the top of this module.

    Args:
        path: the file, plain or gzip.
        kpi: name of the KPI of a file with one; the KPI to pick of a wide file (`<stem>.<column>` or `<column>`) or
            of a long one; the name of the entity.
        entity: the file is one entity, and its columns are the metrics.

    Raises:
        InputError: the file does not exist or cannot be read, is damaged or binary, has no rows, no time or no value
            column, no KPI of that name, or more than half of its lines are refused. As an entity it is long, or its
            name or a metric's cannot be one.
    """
    numbers, texts, separator = content(path, decode(path, read_bytes(path)))
    layout = _layout(path, texts, separator)
    if layout.header is not None:
        numbers, texts = numbers[1:], texts[1:]
    if not texts:
        raise InputError(f"{path}: a header and no rows; {EXPECTED}")
    metrics = _metrics(path, kpi, layout) if entity else ()

    series = SeriesIndex()
    parts = [_parse(texts[i : i + _CHUNK], layout, series) for i in range(0, len(texts), _CHUNK)]
    stamp, numeric, values, label, kpi_index, good = (np.concatenate(column) for column in zip(*parts, strict=True))
    unit_ms = unit_ms_of(stamp[numeric])
    stamp[numeric] = np.rint(stamp[numeric] * unit_ms)
    good &= in_range(stamp, numeric)

    bad = np.flatnonzero(~good)
    refused = tuple(
        RefusedLine(int(numbers[i]), _reason(texts[i], layout, unit_ms), short(texts[i])) for i in bad[:MAX_REFUSED]
    )
    if 2 * len(bad) > len(texts):
        raise InputError(
            f"{path}: does not look like a CSV of KPI points: {len(bad)} of {len(texts)} lines refused, "
            f"the first is line {refused[0].line}: {refused[0].reason}; {EXPECTED}"
        )

    # Melt: a line with F values gives F rows.
    n, width = int(good.sum()), values.shape[1]
    feature = np.tile(np.arange(width, dtype=np.int32), n) if entity else np.zeros(n * width, np.int32)
    names: tuple[str, ...]
    if entity:
        names, row_kpi = (kpi or _stem(path),), np.zeros(n * width, np.int32)
    elif layout.series is None:
        names = _names(path, kpi, layout)
        row_kpi = np.tile(np.arange(width, dtype=np.int32), n)
    else:
        # names of refused lines are nobody's
        used, inverse = np.unique(kpi_index[good], return_inverse=True)
        names, row_kpi = tuple(series.names[i] for i in used), inverse.astype(np.int32)
    table = Table(
        path=path,
        names=names,
        timestamp_ms=np.repeat(stamp[good].astype(np.int64), width),
        kpi=row_kpi,
        value=values[good].reshape(-1),
        label=np.repeat(label[good], width),
        line=np.repeat(numbers[good], width),
        refused=refused,
        n_refused=len(bad),
        metrics=metrics,
        feature=feature,
    )
    return table if kpi is None or table.names == (kpi,) else _pick(table, kpi)


def merge(tables: Sequence[Table]) -> Points:
    """Merge files into one stream.

    One file keeps its own order: late and repeated rows are a real thing to replay. Several are merged as their lines
    would have arrived: each keeps its own order, a late row comes where its file had it (just after the newest row
    before it), and equal times go by the order of the files.
    """
    names: dict[str, int] = {}
    metrics: dict[str, dict[str, int]] = {}  # of each name, and their places
    for table in tables:
        for name in table.names:
            names.setdefault(name, len(names))
            known = metrics.setdefault(name, {})
            for metric in table.metrics:
                known.setdefault(metric, len(known))
    # The arrival time of a row is the newest timestamp that its file had reached.
    arrival = _join([np.maximum.accumulate(table.timestamp_ms) for table in tables], np.int64)
    order = np.argsort(arrival, kind="stable") if len(tables) > 1 else slice(None)
    index = [np.array([names[name] for name in table.names], np.int32)[table.kpi] for table in tables]
    feature = [
        np.array([metrics[table.names[0]][metric] for metric in table.metrics], np.int32)[table.feature]
        if table.metrics
        else table.feature
        for table in tables
    ]
    return Points(
        names=tuple(names),
        timestamp_ms=_join([table.timestamp_ms for table in tables], np.int64)[order],
        kpi=_join(index, np.int32)[order],
        value=_join([table.value for table in tables], np.float64)[order],
        label=_join([table.label for table in tables], np.int8)[order],
        metrics=tuple(tuple(known) for known in metrics.values()),
        feature=_join(feature, np.int32)[order],
    )


def _join(columns: Sequence[npt.NDArray[_T]], dtype: type[_T]) -> npt.NDArray[_T]:
    """Concatenate; no columns give an empty one."""
    return np.concatenate(columns) if columns else np.empty(0, dtype)


# --- what the columns are ---


def _layout(path: Path, texts: Sequence[str], separator: str | None) -> _Layout:
    """Decide separator, header and columns.

    Raises:
        InputError: one column only, no time column, no value column, a name twice, no header for four or more columns.
    """
    separator, width = _sniff(texts[:_SNIFFED], separator)
    if width < 2:
        raise InputError(
            f"{path}: no lines of several fields between commas, semicolons or tabs; the first is {short(texts[0])}; "
            f"{EXPECTED}"
        )
    readable = DAMAGED.sub("\ufffd", texts[0])  # a header in Latin-1 names its columns well enough
    first, *others = (
        [field.strip() for field in fields] for fields in split([readable, *texts[1:_SNIFFED]], separator)
    )
    keys = [re.sub(r"^unnamed.*|^[@_]+", "", re.sub(r"[\s-]+", "_", field.lower())) for field in first]
    if not _is_header(first, keys, width):
        if width > 3:
            raise InputError(
                f"{path}: {width} columns and no header; a file with more than timestamp, value and label "
                "needs a first line that names its columns"
            )
        label = 2 if width == 3 else None
        return _Layout(separator, width, None, time=0, values=(1,), label=label, missing=None, series=None)

    found = f"columns are {short(', '.join(first), 200)}"
    time = _find(keys, TIME_COLUMNS)
    if time is None and keys[0] == "":
        time = 0  # a data frame's index has no name; where there is a time column, it is a row number and left out
    if time is None:
        raise InputError(f"{path}: no timestamp column: {found}; name one of them {', '.join(TIME_COLUMNS[:6])}")
    label, missing, series = _find(keys, LABEL_COLUMNS), _find(keys, MISSING_COLUMNS), _find(keys, SERIES_COLUMNS)
    sample = next((fields for fields in others if len(fields) == len(first)), first)
    values = [
        i
        for i, key in enumerate(keys)
        if key
        and i not in (time, label, missing, series)
        # `timestamp,datetime,value`: the same time once more, for the human reader
        and not (key in TIME_COLUMNS and looks_iso(sample[i]))
    ]
    if not values:
        raise InputError(f"{path}: no value column: {found}; name one of them value")
    if series is not None and len(values) > 1:
        named = [i for i in values if keys[i] in VALUE_COLUMNS]
        if len(named) != 1:
            raise InputError(
                f"{path}: column {first[series]!r} names the KPI of each row, and {len(values)} columns could be its "
                f"value: {found}; name one of them value"
            )
        values = named
    twice = [name for name, count in Counter(first[i] for i in values).items() if count > 1]
    if twice:
        raise InputError(f"{path}: column {twice[0]!r} is there twice: {found}; every KPI needs its own name")
    return _Layout(separator, len(first), tuple(first), time, tuple(values), label, missing, series)


def _sniff(lines: Sequence[str], separator: str | None) -> tuple[str, int]:
    """Return the separator on which most lines agree, and the commonest number of fields."""
    best, agreed = (separator or ",", 1), 0
    for candidate in (separator,) if separator else ("\t", ";", ","):
        counts = Counter(len(fields) for fields in split(lines, candidate) if len(fields) > 1)
        for width, count in counts.most_common(1):
            if count > agreed:
                best, agreed = (candidate, width), count
    return best


def _is_header(first: Sequence[str], keys: Sequence[str], width: int) -> bool:
    """Tell a header from a first line of data, torn ones included."""
    if any(key in TIME_COLUMNS for key in keys):
        return True
    stamp, _ = times(first)
    return len(first) == width and bool(np.isnan(stamp).all())


def _find(keys: Sequence[str], words: Sequence[str]) -> int | None:
    """Return the column with the first of these names that there is."""
    return next((keys.index(word) for word in words if word in keys), None)


def _stem(path: Path) -> str:
    return re.sub(r"(?<=.)(\.(csv|tsv|txt))?(\.gz)?$", "", path.name, count=1, flags=re.IGNORECASE)


def _names(path: Path, kpi: str | None, layout: _Layout) -> tuple[str, ...]:
    """Return the KPI names of a file that has no series column."""
    if len(layout.values) == 1 or layout.header is None:
        return (kpi or _stem(path),)
    return tuple(f"{_stem(path)}.{_printable(layout.header[i])}" for i in layout.values)


def _metrics(path: Path, name: str | None, layout: _Layout) -> tuple[str, ...]:
    """Return the metrics of a file that is an entity.

    Raises:
        InputError: it is long, or a name cannot be one.
    """
    if layout.header is None:
        metrics = ["value"]
    elif layout.series is not None:
        raise InputError(
            f"{path}: column {layout.header[layout.series]!r} names the KPI of each row; an entity needs a line a "
            "time, with a column for each of its metrics"
        )
    else:
        metrics = [_printable(layout.header[i]) for i in layout.values]
    for metric in metrics:
        if problem := name_problem(f"{name or _stem(path)}.{metric}"):
            raise InputError(f"{path}: metric {short(metric)}: {problem}")
    return tuple(metrics)


def _pick(table: Table, kpi: str) -> Table:
    """Return the rows of one KPI.

    Raises:
        InputError: the file has no KPI of that name.
    """
    wanted = [i for i, name in enumerate(table.names) if kpi in (name, name.removeprefix(f"{_stem(table.path)}."))]
    if not wanted:
        raise InputError(f"{table.path}: no KPI {kpi!r}; it has {short(', '.join(table.names), 200)}")
    rows = table.kpi == wanted[0]
    return replace(
        table,
        names=(table.names[wanted[0]],),
        timestamp_ms=table.timestamp_ms[rows],
        kpi=np.zeros(int(rows.sum()), np.int32),
        value=table.value[rows],
        label=table.label[rows],
        line=table.line[rows],
        feature=table.feature[rows],
    )


# --- from lines to numbers ---


_Parsed: TypeAlias = tuple[
    npt.NDArray[np.float64],  # (N,) timestamp as written, or ms if ISO; NaN where unreadable
    npt.NDArray[np.bool_],  # (N,) True: the timestamp is a number and waits for its unit
    npt.NDArray[np.float64],  # (N, F) values
    npt.NDArray[np.int8],  # (N,) label
    npt.NDArray[np.int64],  # (N,) series index
    npt.NDArray[np.bool_],  # (N,) the line can be read
]


def _parse(lines: Sequence[str], layout: _Layout, series: SeriesIndex) -> _Parsed:
    """Parse lines into columns, a row a line, unreadable ones included."""
    rows = split(lines, layout.separator)
    n = len(rows)
    whole = np.fromiter(map(len, rows), np.int64, n) == layout.width
    if not whole.all():
        rows = [row if ok else [""] * layout.width for row, ok in zip(rows, whole.tolist(), strict=True)]
    columns = list(zip(*rows, strict=True))
    del rows

    stamp, numeric = times(columns[layout.time])
    values = np.stack([floats(columns[i]) for i in layout.values], axis=1)  # (N, F)
    good = whole & ~np.isnan(stamp) & ~(np.abs(values) > VALUE_MAX).any(axis=1)
    label = np.full(n, -1, np.int8)
    if layout.label is not None:
        label = np.fromiter(map(LABELS.__getitem__, columns[layout.label]), np.int8, n)
        good &= label != BAD_LABEL
    if layout.missing is not None:
        missing = np.fromiter(map(LABELS.__getitem__, columns[layout.missing]), np.int8, n)
        good &= missing != BAD_LABEL
        values[missing == 1] = np.nan
    kpi = np.zeros(n, np.int64)
    if layout.series is not None:
        kpi = np.fromiter(map(series.__getitem__, map(str.strip, columns[layout.series])), np.int64, n)
        good &= kpi >= 0
    return stamp, numeric, values, label, kpi, good


# --- what to tell the operator ---


def _reason(line: str, layout: _Layout, unit_ms: float) -> str:
    """Say why a line was refused: the checks of `_parse` and `in_range` once more, in words."""
    if "\0" in line:
        return "holds NUL bytes"
    if DAMAGED.search(line):
        return "is not UTF-8"
    fields = [field.strip() for field in split([line], layout.separator)[0]]
    if not fields:
        return "has an unbalanced quote"
    if layout.header is not None and tuple(fields) == layout.header:
        return "is the header once more"
    if len(fields) != layout.width:
        return f"has {len(fields)} fields, expected {layout.width}"
    time = fields[layout.time]
    stamp, numeric = times([time])
    if np.isnan(stamp[0]):
        return f"timestamp {short(time)} is neither epoch seconds, milliseconds nor ISO 8601"
    for i in layout.values:
        if abs(number_of(fields[i])) > VALUE_MAX:
            wrong = f"infinite or beyond {VALUE_MAX:g}" if is_number(fields[i]) else "not a number"
            column = f"column {short(layout.header[i])}:" if layout.header and len(layout.values) > 1 else "value"
            return f"{column} {short(fields[i])} is {wrong}"
    for flag in (layout.label, layout.missing):
        if flag is not None and LABELS[fields[flag]] == BAD_LABEL:
            return f"label {short(fields[flag])} is neither 0 nor 1"
    if layout.series is not None and (problem := name_problem(fields[layout.series])):
        return problem
    unit = "" if not numeric[0] else " seconds" if unit_ms == 1000 else " milliseconds"
    return f"timestamp {short(time)}{unit} is before 1970, after 2200, or ten times off the others of the file"


def _printable(name: str) -> str:
    """Return a name that `name_problem` takes, but for its length."""
    return "".join(c if c.isprintable() else "\ufffd" for c in name)
