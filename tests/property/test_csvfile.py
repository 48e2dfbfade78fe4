"""Whatever dialect numbers are written in, the same numbers come back; whatever bytes come, only InputError goes."""

import gzip
import math
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from stream.csvfile import merge, read_table
from stream.errors import InputError

stamps_ms = st.integers(1_000_000_000_000, 7_000_000_000_000)
values = st.floats(-1e30, 1e30) | st.just(math.nan)
labels = st.sampled_from([-1, 0, 1])
points = st.lists(st.tuples(stamps_ms, values, labels), min_size=1, max_size=40)


def read(data: bytes) -> tuple[list[int], list[float], list[int]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kpi.csv"
        path.write_bytes(data)
        table = read_table(path)
    assert (table.n_refused, table.names) == (0, ("kpi",))
    return table.timestamp_ms.tolist(), table.value.tolist(), table.label.tolist()


@settings(max_examples=300, deadline=None)
@given(points, st.data())
def test_round_trip_in_any_dialect(rows: list[tuple[int, float, int]], data: st.DataObject) -> None:
    def pick(*choices: str) -> str:
        return data.draw(st.sampled_from(choices))

    separator, form = pick(",", ";", "\t"), pick("s", "ms", "iso", "zones")
    if form == "s":
        rows = [(ms // 1000 * 1000, value, label) for ms, value, label in rows]
    has_label = data.draw(st.booleans())

    def stamp(ms: int) -> str:
        if form in ("s", "ms"):
            return str(ms // 1000) if form == "s" else str(ms)
        moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=ms)
        if form == "zones":
            moment = moment.replace(tzinfo=UTC) + timedelta(hours=2)
            return moment.replace(tzinfo=None).isoformat(pick("T", " "), "milliseconds") + "+02:00"
        return moment.replace(tzinfo=None).isoformat(pick("T", " "), "milliseconds") + pick("", "Z")

    def number(value: float) -> str:
        return pick("", "nan", "NaN", "null", "NA") if math.isnan(value) else repr(value)

    def flag(label: int) -> str:
        return {-1: pick("", "nan"), 0: pick("0", "false", "0.0"), 1: pick("1", "True", "1.0")}[label]

    lines = [[stamp(ms), number(value), flag(label)] for ms, value, label in rows]
    order = data.draw(st.permutations(range(3 if has_label else 2)))
    header = [pick("timestamp", "Time", "ts"), pick("value", "requests"), pick("label", "Is_Anomaly")]
    if data.draw(st.booleans()) or order != sorted(order):
        lines = [header, *lines]
    else:
        order = sorted(order)
    quote, blank = pick("", '"'), pick("", " ")
    text = [(separator + blank).join(f"{quote}{line[i]}{quote}" for i in order) for line in lines]
    for place in data.draw(st.lists(st.integers(0, len(text)), max_size=3)):
        text.insert(place, pick("", "  ", "# note"))
    newline = pick("\n", "\r\n", "\r")
    raw = (pick("", "\ufeff") + newline.join(text) + pick("", newline)).encode()

    stamp_ms, value_, label_ = read(gzip.compress(raw) if data.draw(st.booleans()) else raw)
    assert stamp_ms == [ms for ms, _, _ in rows]
    np.testing.assert_array_equal(value_, [value for _, value, _ in rows])
    assert label_ == [label if has_label else -1 for _, _, label in rows]


def read_anything(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kpi.csv"
        path.write_bytes(data)
        try:
            table = read_table(path)
        except InputError as error:
            assert str(path) in str(error)
            assert str(error).isprintable()
            return
    n = len(table.value)
    assert n == len(table.timestamp_ms) == len(table.kpi) == len(table.label) == len(table.line) > 0
    assert table.timestamp_ms.min() >= 0
    assert not np.isinf(table.value).any()
    assert set(table.kpi.tolist()) <= set(range(len(table.names)))
    assert all(line.reason.isprintable() and line.text.isprintable() for line in table.refused)
    assert not set(table.line.tolist()) & {line.line for line in table.refused}
    assert len(merge([table, table]).value) == 2 * n


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes(data: bytes) -> None:
    read_anything(data)


WORDS = (
    "timestamp value label kpi missing time nan inf 1e400 1469376000 1469376060000 0 1 x -1 1_0 ٣ é sep=; "
    "2016-07-24 2016-07-24T16:00Z 9999-12-31 0001-01-01 2016-"
)
MARKS = [",", ";", "\t", "\n", "\r\n", "\r", '"', "#", "\0", "\x1b", "\udcff", "\ufeff", "\u2028", "", " "]
words = st.sampled_from(WORDS.split()) | st.sampled_from(MARKS) | st.sampled_from(",\n")


@settings(max_examples=600, deadline=None)
@given(st.lists(words, max_size=60).map("".join), st.booleans())
def test_any_text_that_is_nearly_a_csv(text: str, header: bool) -> None:
    start = "timestamp,value,label\n1469376000,1,0\n" if header else ""
    read_anything((start + text).encode("utf-8", "surrogateescape"))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_damaged_gzip(data: st.DataObject) -> None:
    whole = bytearray(gzip.compress(b"".join(b"%d,%d,0\n" % (1_469_376_000 + 60 * i, i) for i in range(200)), mtime=0))
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(2, len(whole) - 1))] = data.draw(st.integers(0, 255))
    read_anything(bytes(whole[: data.draw(st.integers(2, len(whole)))]))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=30), min_size=2, max_size=4))
def test_merge_keeps_the_order_of_every_file(files: list[list[int]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        tables = []
        for i, minutes in enumerate(files):
            path = Path(folder) / f"{i}.csv"
            path.write_text("".join(f"{1_469_376_000 + 60 * m},{1000 * i + n}\n" for n, m in enumerate(minutes)))
            tables.append(read_table(path))
    merged = merge(tables)
    for i, table in enumerate(tables):
        own = merged.kpi == i
        np.testing.assert_array_equal(merged.value[own], table.value)
        np.testing.assert_array_equal(merged.timestamp_ms[own], table.timestamp_ms)
    # No row waits for one that its file has already overtaken: new maxima come in order of time.
    newest = np.concatenate([np.maximum.accumulate(table.timestamp_ms) for table in tables])
    arrival = dict(zip(np.concatenate([t.value for t in tables]).tolist(), newest.tolist(), strict=True))
    assert np.all(np.diff([arrival[value] for value in merged.value.tolist()]) >= 0)
