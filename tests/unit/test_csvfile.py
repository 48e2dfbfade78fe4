"""Every form of CSV that is read, every line and file that is refused, and the real files."""

import gzip
import json
import math
import os
import zlib
from pathlib import Path

import numpy as np
import pytest

from stream.csvfile import MAX_REFUSED, Table, merge, read_table
from stream.errors import InputError

T = 1_469_376_000  # 2016-07-24T16:00:00Z
MS = T * 1000
ROWS = [(MS, 0.5, 0), (MS + 60_000, -1.25, 1), (MS + 120_000, math.nan, 0)]


def write(folder: Path, text: str | bytes, name: str = "kpi.csv") -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def rows(table: Table) -> list[tuple[int, float, int]]:
    return list(zip(table.timestamp_ms.tolist(), table.value.tolist(), table.label.tolist(), strict=True))


def same(found: list[tuple[int, float, int]], expected: list[tuple[int, float, int]]) -> bool:
    return repr(found) == repr(expected)  # nan equals nan in print


HEADER = "timestamp,value,label\n"
LINES = f"{T},0.5,0\n{T + 60},-1.25,1\n{T + 120},,0\n"

ACCEPTED = {
    "header": HEADER + LINES,
    "no header": LINES,
    "no newline at the end": HEADER + LINES.rstrip("\n"),
    "CRLF": (HEADER + LINES).replace("\n", "\r\n"),
    "CR": (HEADER + LINES).replace("\n", "\r"),
    "BOM": "\ufeff" + HEADER + LINES,
    "BOM, no header": "\ufeff" + LINES,
    "blanks after commas, Bagel": f"timestamp,   value, label\n{T},  0.5, 0\n{T + 60}, -1.25, 1\n{T + 120}, , 0\n",
    "blanks around all": f" timestamp , value , label \n {T} , 0.5 , 0 \n {T + 60} , -1.25 , 1 \n {T + 120} ,  , 0 \n",
    "semicolons": (HEADER + LINES).replace(",", ";"),
    "tabs": (HEADER + LINES).replace(",", "\t"),
    "tabs, no header": LINES.replace(",", "\t"),
    "sep= line": "sep=;\n" + (HEADER + LINES).replace(",", ";"),
    "blank lines": "\n" + HEADER + LINES.replace("\n", "\n\n   \n"),
    "comments": "# exported\n" + HEADER + "  # here it begins\n" + LINES + "#end",
    "quoted": f'"timestamp","value","label"\n"{T}","0.5","0"\n"{T + 60}", "-1.25","1"\n"{T + 120}","","0"\n',
    "milliseconds": f"{MS},0.5,0\n{MS + 60_000},-1.25,1\n{MS + 120_000},,0\n",
    "float seconds": f"{T}.0,0.5,0\n{T + 60}.000,-1.25,1\n{T + 120}.,,0\n",
    "exponents": f"{T:.9e},5.0e-1,0\n{T + 60:.9e},-1.25e+0,1.000e+00\n{T + 120:.9e},nan,0.0\n",
    "NAB": "timestamp,value,label\n2016-07-24 16:00:00,0.5,0\n2016-07-24 16:01:00,-1.25,1\n2016-07-24 16:02:00,,0\n",
    "ISO, no header": "2016-07-24T16:00:00,0.5,0\n2016-07-24T16:01:00,-1.25,1\n2016-07-24T16:02:00,,0\n",
    "ISO Z": "2016-07-24T16:00:00Z,0.5,0\n2016-07-24T16:01:00.000Z,-1.25,1\n2016-07-24T16:02Z,,0\n",
    "mixed zones": f"2016-07-24T18:00:00+02:00,0.5,0\n2016-07-24 16:01,-1.25,1\n{T + 120},,0\n",
    "zone behind UTC": "2016-07-24T10:30:00-05:30,0.5,0\n2016-07-24T16:01:00+0000,-1.25,1\n2016-07-25 00:02+08,,0\n",
    "other order and case": f"Label,Value,Timestamp\n0,0.5,{T}\n1,-1.25,{T + 60}\n0,,{T + 120}\n",
    "time, is_anomaly": f"Time,KPI value,Is Anomaly\n{T},0.5,false\n{T + 60},-1.25,True\n{T + 120},NULL,no\n",
    "@timestamp, anomaly": f"@timestamp,v,anomaly\n{T},0.5,0\n{T + 60},-1.25,1\n{T + 120},NA,0\n",
    "ts": f"ts,v,labels\n{T},0.5,0\n{T + 60},-1.25,yes\n{T + 120},n/a,0\n",
    "Bagel's missing": f"timestamp,value,label,missing\n{T},0.5,0,0\n{T + 60},-1.25,1,0\n{T + 120},0,0,1\n",
    "nan": LINES.replace(",,", ",nan,"),
    "null": LINES.replace(",,", ",null,"),
    "NaN": LINES.replace(",,", ",NaN,"),
    "None": LINES.replace(",,", ",None,"),
    "data frame's row numbers": f",timestamp,value,label\n0,{T},0.5,0\n1,{T + 60},-1.25,1\n2,{T + 120},,0\n",
    "Unnamed: 0": f"Unnamed: 0,timestamp,value,label\n0,{T},0.5,0\n1,{T + 60},-1.25,1\n2,{T + 120},,0\n",
    "data frame's time index": f",value,label\n{T},0.5,0\n{T + 60},-1.25,1\n{T + 120},,0\n",
    "time twice": f"ts,date,value,label\n{T},2016-07-24,0.5,0\n{T + 60},2016-07-24,-1.25,1\n{T + 120},2016-07-24,,0\n",
    "gzip": gzip.compress((HEADER + LINES).encode()),
    "gzip, two members": gzip.compress(HEADER.encode()) + gzip.compress(LINES.encode()),
}


@pytest.mark.parametrize("text", ACCEPTED.values(), ids=ACCEPTED)
def test_accepted(tmp_path: Path, text: str | bytes) -> None:
    table = read_table(write(tmp_path, text))
    assert same(rows(table), ROWS)
    assert (table.refused, table.n_refused, table.names) == ((), 0, ("kpi",))
    assert table.timestamp_ms.dtype == np.int64
    assert table.kpi.dtype == np.int32
    assert table.label.dtype == np.int8


def test_line_numbers_are_those_of_an_editor(tmp_path: Path) -> None:
    table = read_table(write(tmp_path, f"# a\n\ntimestamp,value\r\n{T},1\n\n# b\n{T + 60},2\n"))
    assert table.line.tolist() == [4, 7]


def test_without_a_label(tmp_path: Path) -> None:
    table = read_table(write(tmp_path, f"{T},1\n{T + 60},2\n"))
    assert table.label.tolist() == [-1, -1]
    assert not table.labelled


def test_an_empty_label_is_unknown(tmp_path: Path) -> None:
    table = read_table(write(tmp_path, f"timestamp,value,label\n{T},1,\n{T + 60},2,1\n"))
    assert table.label.tolist() == [-1, 1]
    assert table.labelled


def test_half_seconds_and_milliseconds_are_kept(tmp_path: Path) -> None:
    text = f"{T}.5,1\n{T + 60}.0014,2\n2016-07-24T16:02:00.123456Z,3\n"
    assert (read_table(write(tmp_path, text)).timestamp_ms - MS).tolist() == [500, 60_001, 120_123]


def test_late_and_repeated_rows_stay_where_they_are(tmp_path: Path) -> None:
    table = read_table(write(tmp_path, f"{T + 60},1\n{T},2\n{T},3\n"))
    assert ((table.timestamp_ms - MS) // 1000).tolist() == [60, 0, 0]
    assert table.value.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("last", "unit"), [(99_999_999_999 // 1000, 1000), (100_000_000_000, 1)], ids=["seconds", "milliseconds"]
)
def test_the_unit_is_seconds_below_1e11(tmp_path: Path, last: int, unit: int) -> None:
    assert read_table(write(tmp_path, f"{last},1\n{last},1\n")).timestamp_ms.tolist() == [last * unit] * 2


def test_made_up_time_from_zero(tmp_path: Path) -> None:
    table = read_table(write(tmp_path, "".join(f"{60 * i},{i}\n" for i in range(100))))
    assert table.timestamp_ms.tolist() == [60_000 * i for i in range(100)]
    assert table.n_refused == 0


# --- names, wide and long files ---


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("cpu4.csv", "cpu4"),
        ("cpu4.csv.gz", "cpu4"),
        ("a.b.CSV", "a.b"),
        ("cpu4.gz", "cpu4"),
        ("cpu4", "cpu4"),
        ("x.tsv", "x"),
        (".csv", ".csv"),
    ],
)
def test_a_kpi_is_named_after_its_file(tmp_path: Path, file: str, name: str) -> None:
    assert read_table(write(tmp_path, LINES, file)).names == (name,)


def test_the_argument_names_a_single_kpi(tmp_path: Path) -> None:
    assert read_table(write(tmp_path, LINES), kpi="checkout.rps").names == ("checkout.rps",)


WIDE = f"time,cpu,mem,label\n{T},1,2,0\n{T + 60},3,,1\n"


def test_wide(tmp_path: Path) -> None:
    table = read_table(write(tmp_path, WIDE, "host.csv"))
    assert table.names == ("host.cpu", "host.mem")
    assert table.kpi.tolist() == [0, 1, 0, 1]
    assert same(rows(table), [(MS, 1.0, 0), (MS, 2.0, 0), (MS + 60_000, 3.0, 1), (MS + 60_000, math.nan, 1)])
    assert table.line.tolist() == [2, 2, 3, 3]


@pytest.mark.parametrize("kpi", ["mem", "host.mem"])
def test_pick_one_of_a_wide_file(tmp_path: Path, kpi: str) -> None:
    table = read_table(write(tmp_path, WIDE, "host.csv"), kpi=kpi)
    assert (table.names, table.kpi.tolist()) == (("host.mem",), [0, 0])
    assert same(rows(table), [(MS, 2.0, 0), (MS + 60_000, math.nan, 1)])


def test_unprintable_column_names_are_made_printable(tmp_path: Path) -> None:
    text = b"time,a\x1b,b\xff\n%d,1,2\n%d,3,4\n" % (T, T + 60)
    assert read_table(write(tmp_path, text)).names == ("kpi.a\ufffd", "kpi.b\ufffd")


LONG = f"KPI ID,timestamp,value,label\nb,{T},1,0\na,{T},2,0\nb,{T + 60},3,1\nc,torn,4,0\n"


def test_long_aiops(tmp_path: Path) -> None:
    table = read_table(write(tmp_path, LONG))
    assert table.names == ("b", "a")  # c has no line that can be read
    assert table.kpi.tolist() == [0, 1, 0]
    assert [line.line for line in table.refused] == [5]


def test_pick_one_of_a_long_file(tmp_path: Path) -> None:
    table = read_table(write(tmp_path, LONG), kpi="b")
    assert (table.names, table.value.tolist(), table.n_refused) == (("b",), [1, 3], 1)


@pytest.mark.parametrize("column", ["kpi", "KPI_ID", "name", "Series", "metric"])
def test_series_columns(tmp_path: Path, column: str) -> None:
    text = f'timestamp,"{column}",value\n{T},"a, or b",1\n{T}, c ,2\n{T},é,3\n'
    assert read_table(write(tmp_path, text)).names == ("a, or b", "c", "é")


def test_a_long_file_takes_the_column_named_value(tmp_path: Path) -> None:
    table = read_table(write(tmp_path, f"name,timestamp,count,value\na,{T},9,1\n"))
    assert (table.names, table.value.tolist()) == (("a",), [1])


# --- lines that are refused ---

REFUSED = {
    "too few fields": (f"{T + 60},1", "has 2 fields, expected 3"),
    "too many fields": (f"{T + 60},1,0,9", "has 4 fields, expected 3"),
    "no number": (f"{T + 60},0.84x,0", "value '0.84x' is not a number"),
    "underscore": (f"{T + 60},1_000,0", "value '1_000' is not a number"),
    "other digits": (f"{T + 60},١٢,0", "value '١٢' is not a number"),
    "inf": (f"{T + 60},inf,0", "value 'inf' is infinite or beyond 1e+30"),
    "-inf": (f"{T + 60},-Infinity,0", "value '-Infinity' is infinite or beyond 1e+30"),
    "too large": (f"{T + 60},1.1e30,0", "value '1.1e30' is infinite or beyond 1e+30"),
    "far too large": (f"{T + 60},-1e999,0", "value '-1e999' is infinite or beyond 1e+30"),
    "no timestamp": (",1,0", "timestamp '' is neither epoch"),
    "torn timestamp": ("x9376060,1,0", "timestamp 'x9376060' is neither epoch"),
    "no such day": ("2016-02-31 16:00:00,1,0", "timestamp '2016-02-31 16:00:00' is neither epoch"),
    "word for now": ("now,1,0", "timestamp 'now' is neither epoch"),
    "nan": ("nan,1,0", "timestamp 'nan' is neither epoch"),
    "digits lost": (f"{T // 100},1,0", "ten times off the others of the file"),
    "digit gained": (f"{T}0,1,0", "ten times off the others of the file"),
    "milliseconds among seconds": (f"{MS},1,0", "ten times off the others of the file"),
    "before 1970": ("1969-12-31T23:59:59Z,1,0", "is before 1970"),
    "negative": ("-5,1,0", "is before 1970"),
    "after 2200": ("2200-01-02,1,0", "after 2200"),
    "label": (f"{T + 60},1,2", "label '2' is neither 0 nor 1"),
    "NUL": (f"{T + 60},1,0\0\0", "holds NUL bytes"),
    "not UTF-8": (f"{T + 60},1,\udcff", "is not UTF-8"),
    "open quote": (f'{T + 60},"1,0', "has an unbalanced quote"),
    "header again": ("timestamp, value,label", "is the header once more"),
    "long": ("x" * 200, "has 1 fields"),
}


@pytest.mark.parametrize(("line", "reason"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("place", ["middle", "end"])
def test_a_bad_line_is_refused_and_the_rest_goes_on(tmp_path: Path, line: str, reason: str, place: str) -> None:
    good = [f"{T},1,0", f"{T + 120},2,1", f"{T + 180},3,0"]
    lines = [good[0], line, *good[1:]] if place == "middle" else [*good, line]
    text = (HEADER + "\n".join(lines)).encode("utf-8", "surrogateescape")
    table = read_table(write(tmp_path, text))
    assert rows(table) == [(MS, 1, 0), (MS + 120_000, 2, 1), (MS + 180_000, 3, 0)]
    (refused,) = table.refused
    assert table.n_refused == 1
    assert refused.line == lines.index(line) + 2
    assert reason in refused.reason
    assert refused.text.isprintable()
    assert len(refused.text) < 80


@pytest.mark.parametrize("first", ["76000,0.84,x", "\0\0\0", '"', f"{T},", "~~~", f"x,{T},1"])
def test_a_torn_first_line_is_no_header(tmp_path: Path, first: str) -> None:
    table = read_table(write(tmp_path, first + "\n" + LINES))
    assert same(rows(table), ROWS)
    assert [line.line for line in table.refused] == [1]


def test_a_wide_line_is_taken_whole_or_not_at_all(tmp_path: Path) -> None:
    table = read_table(write(tmp_path, WIDE + f"{T + 120},5,x,0\n"))
    assert table.refused[0].reason == "column 'mem': 'x' is not a number"
    assert len(table.value) == 4


@pytest.mark.parametrize(
    ("name", "reason"), [(" ", "is empty"), ("a\x1bb", "control character"), ("n" * 600, "longer than")]
)
def test_a_kpi_name_that_cannot_be_one(tmp_path: Path, name: str, reason: str) -> None:
    table = read_table(write(tmp_path, LONG + f"{name},{T},1,0\n"))
    assert reason in table.refused[-1].reason


def test_bagels_missing_must_be_a_flag(tmp_path: Path) -> None:
    table = read_table(write(tmp_path, f"timestamp,value,missing\n{T},1,0\n{T + 60},1,7\n"))
    assert table.refused[0].reason == "label '7' is neither 0 nor 1"


def test_refused_lines_are_all_counted(tmp_path: Path) -> None:
    text = "".join(f"{T + i},{i}\n" for i in range(3000)) + "torn\n" * 2500
    table = read_table(write(tmp_path, text))
    assert (len(table.value), table.n_refused, len(table.refused)) == (3000, 2500, MAX_REFUSED)
    assert [line.line for line in table.refused[:2]] == [3001, 3002]


def test_a_crash_leaves_nul_behind(tmp_path: Path) -> None:
    table = read_table(write(tmp_path, (HEADER + LINES).encode() + b"\0" * 5000))
    assert same(rows(table), ROWS)
    assert table.refused[0].reason == "holds NUL bytes"


# --- files that are refused ---

UNREADABLE = {
    "empty": ("", "empty; expected lines such as"),
    "empty gzip": (gzip.compress(b""), "empty; expected lines such as"),
    "blank": (" \n\n\t\n", "only NUL bytes and blanks"),
    "NUL": ("\0" * 100, "only NUL bytes and blanks"),
    "comments": ("# a\n# b\n", "no lines but blank ones and comments"),
    "header only": (HEADER, "a header and no rows"),
    "one column": ("1.5\n2.5\n", "no lines of several fields between commas, semicolons or tabs; the first is '1.5'"),
    "no timestamp column": ("host,value\nweb,1\n", "no timestamp column: columns are 'host, value'"),
    "no value column": (f"timestamp,label\n{T},0\n", "no value column: columns are 'timestamp, label'"),
    "no header and many columns": (f"{T},1,2,3\n", "4 columns and no header"),
    "column twice": (f"timestamp,cpu,cpu\n{T},1,2\n", "column 'cpu' is there twice"),
    "long and wide": (f"kpi,timestamp,a,b\nx,{T},1,2\n", "column 'kpi' names the KPI of each row, and 2 columns"),
    "gzip damaged": (gzip.compress(LINES.encode())[:-9], "damaged or cut-off gzip"),
    "gzip cut off": (gzip.compress(bytes(range(256)) * 99)[:40], "damaged or cut-off gzip"),
    "gzip in name only": (b"\x1f\x8b\xff", "damaged or cut-off gzip"),
    "gzip checksum": (gzip.compress(LINES.encode())[:-8] + b"\1" * 8, "damaged or cut-off gzip"),
    "zip": (b"PK\x03\x04" + b"abc,def\n" * 9, "a binary file"),
    "parquet": (b"PAR1" + b"abc,def\n" * 9, "a binary file"),
    "binary": (bytes(range(256)) * 9, "a binary file"),
    "UTF-16": ((HEADER + LINES).encode("utf-16"), "UTF-16 text; save it as UTF-8"),
    "a text": ("To be, or not to be,\nthat is, perhaps, the question\n", "no timestamp column"),
    "JSON": ('{"timestamp": 1, "value": 2}\n', "no lines of several fields"),
    "text column": (
        f"timestamp,host,cpu\n{T},web,1\n{T},db,2\n",
        "2 of 2 lines refused, the first is line 2: column 'host': 'web' is not a number",
    ),
    "decimal commas": ("time;v\n2016-07-24;1,5\n", "does not look like a CSV of KPI points"),
    "microseconds": (f"{MS}000,1\n{MS}000,2\n", "does not look like a CSV of KPI points: 2 of 2 lines refused"),
    "mostly torn": (HEADER + LINES + "a,b,c\n" * 4, "4 of 7 lines refused, the first is line 5: timestamp 'a'"),
}


@pytest.mark.parametrize(("text", "message"), UNREADABLE.values(), ids=UNREADABLE)
def test_a_file_that_cannot_be_read(tmp_path: Path, text: str | bytes, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(InputError) as caught:
        read_table(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")
    assert caught.value.exit_code == 2


def test_half_of_the_lines_may_be_torn(tmp_path: Path) -> None:
    assert read_table(write(tmp_path, HEADER + LINES + "a,b,c\n" * 3)).n_refused == 3


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file; give the path"):
        read_table(tmp_path / "absent.csv")


def test_a_directory(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a directory, not a file"):
        read_table(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path: Path) -> None:
    path = write(tmp_path, LINES)
    path.chmod(0)
    with pytest.raises(InputError, match="cannot be read: Permission denied"):
        read_table(path)


def test_a_path_that_no_system_takes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_table(tmp_path / ("n" * 5000))
    with pytest.raises(InputError, match="cannot be read"):
        read_table(Path("a\0b"))


@pytest.mark.parametrize("text", [WIDE, LONG])
def test_no_such_kpi(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError, match=r"no KPI 'disk'; it has '(kpi\.cpu, kpi\.mem|b, a)'"):
        read_table(write(tmp_path, text), kpi="disk")


# --- several files ---


def table_of(folder: Path, name: str, *points: tuple[int, float]) -> Table:
    return read_table(write(folder, "".join(f"{T + t},{v}\n" for t, v in points), f"{name}.csv"))


def test_merge_of_one_file_keeps_its_order(tmp_path: Path) -> None:
    points = merge([table_of(tmp_path, "a", (60, 1), (0, 2), (60, 3))])
    assert points.value.tolist() == [1, 2, 3]
    assert points.names == ("a",)


def test_merge_goes_by_time_then_by_file(tmp_path: Path) -> None:
    a = table_of(tmp_path, "a", (0, 1), (60, 2), (120, 3))
    b = table_of(tmp_path, "b", (0, 10), (90, 20), (120, 30))
    points = merge([a, b])
    assert points.value.tolist() == [1, 10, 2, 20, 3, 30]
    assert points.kpi.tolist() == [0, 1, 0, 1, 0, 1]
    assert points.kpi.dtype == np.int32
    assert merge([b, a]).value.tolist() == [10, 1, 2, 20, 30, 3]


def test_merge_keeps_a_late_row_behind_the_row_before_it(tmp_path: Path) -> None:
    a = table_of(tmp_path, "a", (0, 1), (120, 2), (60, 3), (180, 4))
    b = table_of(tmp_path, "b", (60, 10), (120, 20), (150, 30))
    assert merge([a, b]).value.tolist() == [1, 10, 2, 3, 20, 30, 4]


def test_merge_joins_a_name_in_two_files(tmp_path: Path) -> None:
    train = read_table(write(tmp_path, f"{T},1,1\n", "train.csv"), kpi="x")
    test = read_table(write(tmp_path, f"{T + 60},2\n", "test.csv"), kpi="x")
    points = merge([test, train])
    assert points.names == ("x",)
    assert (points.kpi.tolist(), points.value.tolist(), points.label.tolist()) == ([0, 0], [1, 2], [1, -1])


def test_merge_of_nothing() -> None:
    points = merge([])
    assert points.names == ()
    assert len(points.timestamp_ms) == len(points.kpi) == len(points.value) == len(points.label) == 0


# --- real data ---

DATA = os.environ.get("TOCSIN_TEST_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="TOCSIN_TEST_DATA does not name the folder of labelled data")


@pytest.mark.data
@needs_data
def test_the_real_files_are_read_whole() -> None:
    folder = Path(DATA or "")
    manifest = {entry["path"]: entry for entry in json.loads((folder / "MANIFEST.json").read_text())}
    paths = [path for path in sorted(manifest) if path.endswith(".csv.gz")]
    assert len(paths) == 44
    for path in paths:
        facts, table = manifest[path], read_table(folder / path)
        assert (table.n_refused, table.refused, len(table.names)) == (0, (), 1), path
        if not path.startswith("kpi/"):
            assert not table.labelled
            assert len(table.value) == len(gzip.decompress((folder / path).read_bytes()).splitlines()) - 1, path
            continue
        steps = np.diff(table.timestamp_ms) // (facts["step"] * 1000)
        assert len(table.value) == facts["rows"], path
        assert int((table.label == 1).sum()) == facts["anom"], path
        assert int((steps - 1).sum()) == facts["missing"], path
        assert (int((steps > 1).sum()), int(steps.max()) - 1) == (facts["gaps"], facts["maxgap"]), path


def test_a_gzip_file_that_grows_too_much_is_refused_before_it_fills_the_memory(tmp_path: Path) -> None:
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    line = b"1469376000,0.84\n" * 65_536
    parts = [packer.compress(line) for _ in range(100)]
    path = tmp_path / "bomb.csv.gz"
    path.write_bytes(b"".join([*parts, packer.flush()]))
    with pytest.raises(InputError, match="unpacks to more than 200 times its size"):
        read_table(path)


def test_a_file_beyond_the_bound_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stream.csvlines.BYTES_MAX", 1_000)
    text = b"1469376000,0.84\n" * 63
    plain, packed = tmp_path / "a.csv", tmp_path / "a.csv.gz"
    plain.write_bytes(text)
    packed.write_bytes(gzip.compress(text))
    for path in (plain, packed):
        with pytest.raises(InputError, match="larger than 1,000 bytes; split it"):
            read_table(path)


def test_a_line_without_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"1469376000,0.84\n" + b"," * (2 << 20))
    with pytest.raises(InputError, match="line 2 has 2,097,152 characters, at most 1,048,576"):
        read_table(path)
