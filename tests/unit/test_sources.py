"""npz and Parquet files as training data: equal to the same data as CSV, or refused with a reason."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from stream import sources
from stream.backtest import training_series
from stream.columns import SeriesIndex
from stream.commands.train import days_of, hours_of
from stream.csvfile import merge
from stream.errors import ConfigError, InputError
from stream.points import Points
from stream.records import decode
from stream.sources import choose, read_table, wanted_times

NAN = math.nan
START_S = 1_767_571_200  # a Monday
STAMP = START_S + 60 * np.arange(300)


def data(features: int = 2, seed: int = 0) -> Any:
    values = np.random.default_rng(seed).normal(size=(300, features)).round(6)
    values[50:55, 0] = NAN
    return values


LABEL = (np.arange(300) % 100 == 7).astype(np.int64)


def npz(path: Path, **arrays: Any) -> Path:
    np.savez_compressed(path, **arrays)
    return path


def csv(path: Path, values: Any, columns: list[str], label: Any = None) -> Path:
    frame = pd.DataFrame(values, columns=columns)
    frame.insert(0, "timestamp", STAMP)
    if label is not None:
        frame["label"] = label
    frame.to_csv(path, index=False)
    return path


def series(path: Path, *, entity: bool = False, interval_ms: int = 0) -> list[Any]:
    return training_series(merge([read_table(path, entity=entity, interval_ms=interval_ms)]), interval_ms)


def assert_same(found: list[Any], expected: list[Any]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert (one.name, one.metrics, one.interval_ms, one.start_ms) == (
            other.name,
            other.metrics,
            other.interval_ms,
            other.start_ms,
        )
        np.testing.assert_array_equal(one.values, other.values)
        np.testing.assert_array_equal(one.anomalous, other.anomalous)


@pytest.mark.parametrize("entity", [False, True])
@pytest.mark.parametrize("kind", ["npz", "npz_ms", "parquet", "parquet_times", "parquet_index"])
def test_the_same_data_are_the_same_series_in_every_format(tmp_path: Path, kind: str, entity: bool) -> None:
    expected = series(csv(tmp_path / "m.csv", data(), ["cpu", "ram"], LABEL), entity=entity)
    assert expected[0].start_ms == START_S * 1000 and expected[0].anomalous.sum() == 3
    path = tmp_path / "m.data"  # told by its content
    if kind.startswith("npz"):
        stamp = STAMP * 1000.0 if kind == "npz_ms" else STAMP
        arrays = {"values": data(), "timestamp": stamp, "label": LABEL, "metrics": np.array(["cpu", "ram"])}
        npz(tmp_path / "m.npz", **arrays).rename(path)
    else:
        frame = pd.DataFrame(data(), columns=["cpu", "ram"])
        time = pd.to_datetime(STAMP, unit="s", utc=kind == "parquet_times")
        if kind == "parquet_index":
            frame.index = pd.DatetimeIndex(time, name=None)
        else:
            frame.insert(0, "Time", STAMP if kind == "parquet" else time)
        frame["label"] = LABEL
        frame.to_parquet(path)
    assert_same(series(path, entity=entity), expected)


def test_one_column_is_the_kpi_of_the_file(tmp_path: Path) -> None:
    expected = series(csv(tmp_path / "cpu.csv", data(1), ["value"]))
    assert expected[0].name == "cpu"
    for values in (data(1), data(1)[:, 0]):
        assert_same(series(npz(tmp_path / "cpu.npz", values=values, timestamp=STAMP)), expected)


def test_a_benchmark_file_gives_its_training_part_without_the_labels_of_the_other(tmp_path: Path) -> None:
    values = data(3).astype(np.float32)
    path = npz(tmp_path / "machine-1.npz", train=values, test=values + 1, label=np.ones(300, np.int64))
    with pytest.raises(InputError, match=r"has no `timestamp`; give .* --interval"):
        read_table(path, entity=True)
    (one,) = series(path, entity=True, interval_ms=60_000)
    assert (one.name, one.metrics, one.interval_ms) == ("machine-1", ("0", "1", "2"), 60_000)
    np.testing.assert_array_equal(one.values, values.astype(np.float64))
    assert not one.anomalous.any()


def test_a_long_parquet_file_names_the_kpi_of_each_row(tmp_path: Path) -> None:
    frame = pd.DataFrame({"time": np.repeat(STAMP, 2), "kpi": ["a", "b"] * 300, "value": np.arange(600.0), "x": "text"})
    frame.to_parquet(tmp_path / "long.parquet")
    found = series(tmp_path / "long.parquet")
    assert [one.name for one in found] == ["a", "b"]
    np.testing.assert_array_equal(found[1].values[:, 0], np.arange(1.0, 600.0, 2))


def test_what_a_column_says_is_missing_is(tmp_path: Path) -> None:
    frame = pd.DataFrame({"timestamp": STAMP, "v": pd.array([1] * 299 + [None], dtype="Int64"), "missing": LABEL})
    frame.to_parquet(tmp_path / "m.parquet")
    table = read_table(tmp_path / "m.parquet")
    np.testing.assert_array_equal(np.isnan(table.value), (LABEL == 1) | (np.arange(300) == 299))


# -- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros(3)}, "holds the arrays x; name one of them values"),
        ({"values": np.zeros((3, 2, 2))}, r"values is \(3, 2, 2\), and \(N, F\)"),
        ({"values": np.zeros((0, 2))}, r"values is \(0, 2\)"),
        ({"values": np.array(["a", "b"])}, "values holds <U1, and numbers are needed"),
        ({"values": np.array([1, "a", None], object)}, "values holds object.* never loaded"),
        ({"values": np.zeros(3, [("a", "f8")])}, "numbers are needed"),
        ({"values": np.zeros(3), "timestamp": np.zeros(2)}, r"timestamp is \(2,\), and \(3,\)"),
        ({"values": np.zeros(3), "timestamp": np.array([1, NAN, 3])}, "row 1: timestamp nan is before 1970"),
        ({"values": np.zeros(3), "timestamp": np.array([1e9, 2e9, -1])}, "row 2: timestamp -1 "),
        ({"values": np.zeros(3), "timestamp": np.arange(3), "label": np.zeros(2)}, r"label is \(2,\)"),
        ({"values": np.zeros(3), "timestamp": np.arange(3), "label": np.array([0, 1, 2])}, "of 0 and 1"),
        ({"values": np.zeros(3), "timestamp": np.arange(3), "metrics": np.array(["a", "b"])}, "2 names for 1 col"),
        ({"values": np.array([1, np.inf, 2]), "timestamp": np.arange(3)}, "row 1: a value is infinite"),
        ({"values": np.array([1, 2, 1e31]), "timestamp": np.arange(3)}, "row 2: a value is infinite or beyond"),
        ({"values": np.zeros((3, 2)), "timestamp": np.arange(3), "metrics": np.array(["a", "b\n"])}, "control char"),
    ],
)
def test_an_npz_that_is_no_data_is_refused_with_a_reason(tmp_path: Path, arrays: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_table(npz(tmp_path / "x.npz", **arrays))


class Evil:
    """What a pickle would do when it is loaded."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (exec, ("raise SystemExit('the pickle ran')",))


def test_a_pickle_in_an_npz_is_never_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="objects are never loaded"):
        read_table(npz(tmp_path / "x.npz", values=np.array([Evil()], object)))


def member(header: bytes, content: bytes = b"", *, length: int | None = None) -> bytes:
    length = len(header) if length is None else length
    return b"\x93NUMPY\x01\x00" + length.to_bytes(2, "little") + header + content


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x93NUMPY",
        b"not an array at all",
        member(b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,), }\n"),
        member(b"{'descr': '<f8', 'fortran_order': False, 'shape': (-1,), }\n"),
        member(b"{'descr': '<f8', 'fortran_order': False, 'shape': (10,), }\n", b"\0" * 8),
        member(b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }\n", b"cos\nsystem\n"),
        member(b"__import__('os').abort()\n"),
        member(b"[" * 60_000),
        member(b"{}", length=65_535),
        b"\x93NUMPY\x09\x00" + b"\xff" * 100,
    ],
)
def test_an_array_that_lies_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("values.npy", content)
    with pytest.raises(InputError, match=r"x\.npz: "):
        read_table(path, interval_ms=60_000)


def test_a_file_that_unpacks_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = npz(tmp_path / "x.npz", values=np.zeros((1000, 20)), timestamp=np.arange(1000))
    monkeypatch.setattr(sources, "CELLS_MAX", 10_000)
    with pytest.raises(InputError, match="20,000 values, and at most 10,000"):
        read_table(path)
    monkeypatch.setattr(sources, "BYTES_MAX", 10_000)
    with pytest.raises(InputError, match="bytes when unpacked, and at most 10,000"):
        read_table(path)
    pd.DataFrame(np.zeros((1000, 20)), columns=[f"c{i}" for i in range(20)]).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(InputError, match="20,000 values, and at most 10,000"):
        read_table(tmp_path / "x.parquet")


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    good = npz(tmp_path / "good.npz", values=data(), timestamp=STAMP).read_bytes()
    pd.DataFrame({"timestamp": STAMP, "v": 1.0}).to_parquet(tmp_path / "good.parquet")
    other = (tmp_path / "good.parquet").read_bytes()
    random = np.random.default_rng(0)
    for content in (good, other):
        for _ in range(60):
            broken = bytearray(content[: int(random.integers(5, len(content) + 1))])
            for at in random.integers(4, len(broken), 3):
                broken[at] ^= int(random.integers(1, 256))
            path = tmp_path / "broken"
            path.write_bytes(bytes(broken))
            try:
                table = read_table(path)
            except InputError as error:
                assert str(error).startswith(str(path))
            else:
                assert np.isfinite(table.timestamp_ms).all()


def test_other_files_are_read_as_csv(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_table(tmp_path / "none.npz")
    with pytest.raises(InputError, match="a directory"):
        read_table(tmp_path)
    (tmp_path / "x.npz").write_bytes(b"SQLite format 3\0" + bytes(range(256)))
    with pytest.raises(InputError, match="binary file"):
        read_table(tmp_path / "x.npz")


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        ({"a": [1.0]}, "no timestamp column: columns are a"),
        ({"timestamp": [1]}, "a value column is needed"),
        ({"timestamp": [1], "v": ["x"]}, r"column 'v' holds (str|object), and numbers"),
        ({"timestamp": ["yesterday"], "v": [1.0]}, "'yesterday' is no time"),
        ({"timestamp": [NAN], "v": [1.0]}, "row 0: timestamp nan"),
        ({"timestamp": [1], "v": [np.inf]}, "row 0: a value is infinite"),
        ({"timestamp": [1], "v": [1.0], "label": [7]}, "of 0 and 1"),
        ({"timestamp": [], "v": []}, "holds no rows"),
    ],
)
def test_a_parquet_file_that_is_no_data_is_refused(tmp_path: Path, frame: dict[str, Any], message: str) -> None:
    pd.DataFrame(frame).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(InputError, match=message):
        read_table(tmp_path / "x.parquet")


# -- a choice ---------------------------------------------------------------------------------------------------------


def test_entities_of_a_topic_are_series_of_all_metrics_that_they_send() -> None:
    index = sources._EntityIndex()
    raw = [
        b'{"entity": "m", "timestamp": 1000000000, "values": {"cpu": 1, "ram": 2}}',
        b'{"entity": "m", "timestamp": 1000000060, "metric": "disk", "value": 3}',
        b'{"kpi": "m2", "timestamp": 1000000060, "value": 4}',
        b'{"entity": "m2", "timestamp": 1000000060, "values": {"cpu": 5}}',
    ]
    columns, rejects = decode(raw, index)
    assert not rejects and index.names == ["m", "m2", "m2.cpu"]
    assert list(index.entities[0].features) == ["cpu", "ram", "disk"]
    assert columns.slot.tolist() == [0, 0, 0, 1, 2] and columns.feature.tolist() == [0, 1, 2, 0, 0]
    plain, _ = decode(raw, SeriesIndex())
    assert plain.slot.tolist() == [0, 1, 2, 3, 4]


def points(names: tuple[str, ...], counts: list[int], metrics: tuple[tuple[str, ...], ...] = ()) -> Points:
    kpi = np.repeat(np.arange(len(names), dtype=np.int32), counts)
    time = np.concatenate([np.arange(count) for count in counts]) * 60_000
    return Points(names, time, kpi, np.ones(len(kpi)), np.full(len(kpi), -1, np.int8), metrics)


def test_series_are_chosen_by_name_and_by_what_there_is_of_them() -> None:
    all_of = points(("a.z", "b.x", "a.y", "a.x"), [200, 200, 3, 201])
    chosen, left = choose(all_of, ["a.*"])
    assert chosen.names == ("a.x", "a.z") and len(chosen) == 401, "by name, however the partitions answered"
    assert np.bincount(chosen.kpi).tolist() == [201, 200]
    assert set(left) == {"a.y"} and "values of 3 times" in left["a.y"]
    twice = all_of.take(np.repeat(np.flatnonzero(all_of.kpi == 2), 50))
    with pytest.raises(InputError, match=r"no series to learn from: b\.x has values of 0 times"):
        choose(twice, ["b.x"])
    with pytest.raises(InputError, match=r"none of a\.z, b\.x, a\.y, a\.x matches q or r"):
        choose(all_of, ["q", "r"])
    mixed = points(("m", "k"), [200, 200], (("cpu",), ()))
    assert choose(mixed, entity=True)[1] == {"k": "is a KPI, and entities are asked for"}
    assert choose(mixed, entity=True)[0].metrics == (("cpu",),)


def test_hours_and_days() -> None:
    hour = START_S * 1000 + 3_600_000 * np.arange(7 * 24)
    on = np.flatnonzero(wanted_times(hour, hours_of("8-18"), days_of("mon-fri"), "UTC"))
    assert on.tolist() == [24 * day + h for day in range(5) for h in range(8, 18)]
    night = np.flatnonzero(wanted_times(hour, hours_of("22-6"), days_of("sat"), "UTC"))
    assert night.tolist() == [142, 143, 144, 145, 146, 147, 148, 149], "it belongs to the day on which it begins"
    berlin = np.flatnonzero(wanted_times(hour, hours_of("0-1"), None, "Europe/Berlin"))
    assert berlin.tolist() == [23 + 24 * day for day in range(7)]
    assert hours_of("8:30-12") == (510, 720) and hours_of("0-24") == (0, 1440) and hours_of("22-0") == (1320, 1440)
    assert days_of("fri-mon") == (0, 4, 5, 6) and days_of("Sunday, wed") == (2, 6) and days_of(None) is None


@pytest.mark.parametrize("text", ["8", "8-", "25-26", "8-8", "8:70-9", "a-b", "-1-5", "8-25"])
def test_other_hours_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--hours"):
        hours_of(text)


@pytest.mark.parametrize("text", ["", "mo", "mon-", "mon-tue-wed", "someday", "1-5"])
def test_other_days_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--days"):
        days_of(text)
