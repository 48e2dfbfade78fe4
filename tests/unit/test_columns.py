import numpy as np
import pytest

from stream.columns import NAME_BYTES_MAX, Columns, SeriesIndex, name_problem


@pytest.mark.parametrize("name", ["a", " a ", "checkout.latency_p99", "延迟", "a b", "/var:90%", "x" * NAME_BYTES_MAX])
def test_names_that_can_be(name: str) -> None:
    assert name_problem(name) is None


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        (None, "the record needs `kpi`"),
        (7, "the record needs `kpi`"),
        (b"a", "the record needs `kpi`"),
        ("", "is empty"),
        ("  ", "is empty"),
        ("a\x00", "control character"),
        ("a\x7f", "control character"),
        ("a\u200b", "cannot be shown"),
        ("\ud800", "cannot be shown"),
        ("x" * (NAME_BYTES_MAX + 1), "longer than 512 bytes"),
        ("é" * (NAME_BYTES_MAX // 2 + 1), "longer than 512 bytes"),
    ],
)
def test_names_that_cannot_be(name: object, problem: str) -> None:
    assert problem in (name_problem(name) or "")


def test_index_gives_slots_in_the_order_of_first_sight() -> None:
    index = SeriesIndex(["b", "a", "b"])
    assert index.names == ["b", "a"]
    assert (index["a"], index["c"], index["b"], index["c"]) == (1, 2, 0, 2)
    assert index.names == ["b", "a", "c"]


def test_index_keeps_no_junk() -> None:
    index = SeriesIndex(["a"])
    assert [index[name] for name in ("", "\n", "x" * 9999)] == [-1, -1, -1]
    assert index[None] == -1  # type: ignore[index]
    assert (dict(index), index.names) == ({"a": 0}, ["a"])


def test_columns_have_the_types_that_arithmetic_relies_on() -> None:
    for columns in (Columns.of([1, 0], [5, 6], [1, 2], [3, 4]), Columns.empty(), Columns.of((), (), ())):
        assert columns.slot.dtype == np.int32
        assert columns.timestamp_ms.dtype == columns.row.dtype == np.int64
        assert columns.value.dtype == np.float64
    assert len(Columns.empty()) == 0
    assert Columns.of([0, 0, 0], [1, 2, 3], [1, 2, 3]).row.tolist() == [0, 1, 2]


def test_take_and_concatenate() -> None:
    columns = Columns.of([5, 6, 7], [50, 60, 70], [0.5, 0.6, 0.7])
    picked = columns.take(np.array([2, 0]))
    assert (picked.slot.tolist(), picked.timestamp_ms.tolist()) == ([7, 5], [70, 50])
    assert (picked.value.tolist(), picked.row.tolist()) == ([0.7, 0.5], [2, 0])
    masked = columns.take(np.array([False, True, False]))
    both = Columns.concatenate([masked, Columns.empty(), picked])
    assert (both.slot.tolist(), both.row.tolist()) == ([6, 7, 5], [1, 2, 0])
    picked.value[:] = np.nan
    assert columns.value.tolist() == [0.5, 0.6, 0.7], "take gives a copy"
