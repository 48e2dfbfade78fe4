"""Files of entities: how they are read, cut, fed to the core, replayed and learned from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from models.windows import TrainSeries
from stream import backtest
from stream.backtest import head, training_series
from stream.columns import SeriesIndex
from stream.csvfile import merge, read_table
from stream.detector import Detector
from stream.errors import ConfigError, InputError
from stream.points import Points
from stream.records import decode
from stream.replay import _records
from tests.helpers import MINUTE, T0, Persistence, config, detector

NAN = float("nan")
T = T0 // 1000


def write(folder: Path, name: str, *lines: str) -> Path:
    path = folder / name
    path.write_text("\n".join(lines) + "\n")
    return path


def entity_detector(metrics: tuple[str, ...] = ("cpu", "mem", "net")) -> Detector:
    return detector(config(model=Persistence(features=len(metrics)), metrics=metrics, interval_ms=MINUTE))


def servers(
    n: int = 200, names: tuple[str, ...] = ("a", "b"), metrics: tuple[str, ...] = ("cpu", "mem", "net")
) -> Points:
    """Return entities that send all metrics each minute, but for some values."""
    rng = np.random.default_rng(0)
    width, count = len(metrics), n * len(names)
    value = rng.normal(10, 1, (count, width))
    value[rng.random((count, width)) < 0.1] = NAN
    value[rng.random(count) < 0.05] += 300
    minute, kpi = np.repeat(np.arange(n), len(names)), np.tile(np.arange(len(names), dtype=np.int32), n)
    return Points(
        names,
        np.repeat(T0 + minute * MINUTE, width),
        np.repeat(kpi, width),
        value.reshape(-1),
        np.repeat((minute % 50 == 0).astype(np.int8), width),
        (metrics,) * len(names),
        np.tile(np.arange(width, dtype=np.int32), count),
    )


# -- reading ----------------------------------------------------------------------------------------------------------


def test_a_wide_file_is_one_entity(tmp_path: Path) -> None:
    path = write(tmp_path, "web-1.csv", "cpu,timestamp,label,mem", f"1,{T},0,10", f",{T + 60},1,20", f"3,{T + 120},0,")
    table = read_table(path, entity=True)
    assert (table.names, table.metrics) == (("web-1",), ("cpu", "mem"))
    assert table.feature.tolist() == [0, 1] * 3
    assert table.kpi.tolist() == [0] * 6
    assert table.label.tolist() == [0, 0, 1, 1, 0, 0]
    np.testing.assert_array_equal(table.value, [1, 10, NAN, 20, 3, NAN])
    points = merge([table])
    assert points.metrics == (("cpu", "mem"),)
    assert points.n_records == 3 and points.n_entities == 1
    assert points.record.tolist() == [0, 0, 1, 1, 2, 2]


def test_without_asking_its_columns_are_kpis(tmp_path: Path) -> None:
    points = merge([read_table(write(tmp_path, "web.csv", "timestamp,cpu,mem", f"{T},1,10"))])
    assert points.names == ("web.cpu", "web.mem") and points.metrics == ((), ())
    assert points.n_records == 2 and points.n_entities == 0


@pytest.mark.parametrize(("first", "metric"), [("timestamp,cpu", "cpu"), (f"{T - 60},1", "value")])
def test_one_column_is_one_metric(tmp_path: Path, first: str, metric: str) -> None:
    assert read_table(write(tmp_path, "a.csv", first, f"{T},2"), entity=True).metrics == (metric,)


def test_a_long_file_is_no_entity(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", "timestamp,kpi,value", f"{T},cpu,1")
    with pytest.raises(InputError, match="column 'kpi' names the KPI of each row; an entity needs a line a time"):
        read_table(path, entity=True)


def test_files_are_merged_by_time_and_a_line_stays_together(tmp_path: Path) -> None:
    a = read_table(write(tmp_path, "a.csv", "timestamp,x,y", f"{T},1,2", f"{T + 60},3,4"), entity=True)
    b = read_table(write(tmp_path, "b.csv", "timestamp,y,x", f"{T},5,6", f"{T + 30},7,8"), entity=True)
    points = merge([a, b])
    assert points.metrics == (("x", "y"), ("y", "x"))
    assert points.value.tolist() == [1, 2, 5, 6, 7, 8, 3, 4]
    assert points.record.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_an_entity_in_two_files_has_the_metrics_of_both(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    a = read_table(write(tmp_path, "a.csv", "timestamp,x,y", f"{T},1,2"), entity=True)
    b = read_table(write(tmp_path / "more", "a.csv", "timestamp,z,x", f"{T + 60},3,4"), entity=True)
    points = merge([a, b])
    assert points.names == ("a",) and points.metrics == (("x", "y", "z"),)
    assert points.feature.tolist() == [0, 1, 2, 0]


def test_a_line_that_is_there_twice_is_two_records(tmp_path: Path) -> None:
    points = merge([read_table(write(tmp_path, "a.csv", "timestamp,x,y", *[f"{T},1,2"] * 3), entity=True)])
    assert points.n_records == 3


# -- the core ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 7, 50, 100_000])
def test_the_events_are_those_of_the_records_on_the_wire(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backtest, "BATCH_POINTS", batch)
    points = servers()
    edges = np.append(np.flatnonzero(points.begins), len(points))
    live = entity_detector()
    columns, rejects = decode([record for _, record in _records(points, edges, 0)], live.index)
    expected = live.accept(columns)
    assert len(expected.events) > 10 and not rejects
    again = entity_detector()
    found = [event for _, result in backtest.run(again, points) for event in result.events]
    assert found == expected.events
    assert again.counts == live.counts


def test_metrics_go_to_the_features_by_name() -> None:
    points = servers(metrics=("net", "disk", "cpu"))
    live = entity_detector()
    done = list(backtest.run(live, points))
    assert done[-1][0] == len(points)
    assert live.counts.points == len(points) * 2 // 3, "the model knows no disk"
    (group,) = live.groups
    came = group.windows.arrived(np.array([0, 1], np.int32))
    assert (came[:, 1] == 0).all() and (came[:, [0, 2]] > 0).all()
    assert backtest.count_series(entity_detector(), points) == 2


def test_a_model_that_knows_none_of_the_metrics_is_told() -> None:
    with pytest.raises(InputError, match=r"none of the metrics of a \(x, y\) is known to its model, .* cpu, mem, net"):
        next(backtest.run(entity_detector(), servers(metrics=("x", "y"))))


def test_a_model_of_one_feature_watches_metric_by_metric() -> None:
    points, live = servers(), detector(config(interval_ms=MINUTE))
    events = [event for _, result in backtest.run(live, points) for event in result.events]
    assert {event.subject for event in events} <= {
        f"{name}.{metric}" for name in "ab" for metric in ("cpu", "mem", "net")
    }
    assert backtest.count_series(live, points) == 6
    assert live.index.names[:2] == ["a.cpu", "a.mem"]


def test_priming_takes_whole_records_and_leaves_no_count() -> None:
    points = servers()
    first = int(np.flatnonzero(points.begins)[300])
    live = detector(config(model=Persistence(features=3), metrics=("cpu", "mem", "net"), interval_ms=MINUTE))
    backtest.prime(live, points, first)
    assert live.counts.points == live.counts.scored == 0
    list(backtest.run(live, points, first=first))
    assert live.counts.points == len(points) - first
    assert live.counts.scored >= 98, "the groups count into the detector's own counts, and the window was full"


def test_head_does_not_cut_a_record() -> None:
    points = servers(20)
    for fraction in (0.0, 0.334, 0.5, 0.999, 1.0):
        first, end = head(points, fraction)
        assert len(first) == end and end % 3 == 0 and abs(end - fraction * len(points)) < 3


# -- replay -----------------------------------------------------------------------------------------------------------


def test_a_line_is_one_record_and_a_missing_value_is_null() -> None:
    points = servers(2)
    edges = np.append(np.flatnonzero(points.begins), len(points))
    sent = list(_records(points, edges[1:3], 1000))
    assert [kpi for kpi, _ in sent] == [1]
    record = json.loads(sent[0][1])
    values = [None if np.isnan(x) else x for x in points.value[3:6]]
    assert record == {
        "entity": "b",
        "timestamp": T0 + 1000,
        "values": dict(zip(("cpu", "mem", "net"), values, strict=True)),
    }
    columns, rejects = decode([sent[0][1]], SeriesIndex(metrics_of=lambda name: ("cpu", "mem", "net")))
    assert not rejects and columns.feature.tolist() == [0, 1, 2]


# -- training ---------------------------------------------------------------------------------------------------------


def test_an_entity_is_laid_out_with_a_column_a_metric() -> None:
    points = servers(60)
    one, two = training_series(points, 0, {"a": "digest"})
    assert (one.name, one.metrics, one.sha256, two.sha256) == ("a", ("cpu", "mem", "net"), "digest", "")
    own = points.kpi == 1
    np.testing.assert_array_equal(two.values, points.value[own].reshape(60, 3))
    assert np.flatnonzero(two.anomalous).tolist() == [0, 50]


def test_the_order_of_the_metrics_is_that_of_the_first(tmp_path: Path) -> None:
    def table(name: str, header: str, *, swap: bool = False) -> Points:
        lines = [f"{T + 60 * i},{2 * i},{i}" if swap else f"{T + 60 * i},{i},{2 * i}" for i in range(20)]
        return merge([read_table(write(tmp_path, name, header, *lines), entity=True)])

    a, b = table("a.csv", "timestamp,x,y"), table("b.csv", "timestamp,y,x", swap=True)
    both = merge([read_table(tmp_path / f"{name}.csv", entity=True) for name in "ab"])
    found = training_series(both)
    alone: list[TrainSeries] = training_series(a)
    for one in found:
        assert one.metrics == ("x", "y")
        np.testing.assert_array_equal(one.values, alone[0].values)
    assert training_series(b)[0].metrics == ("y", "x")


@pytest.mark.parametrize(
    ("header", "differs"),
    [
        ("timestamp,x", "b has no y, other than a"),
        ("timestamp,x,y,z", "b has z, other than a"),
        ("timestamp,x,z", "b has no y and has z, other than a"),
    ],
)
def test_other_metrics_are_named(tmp_path: Path, header: str, differs: str) -> None:
    rows = [f"{T + 60 * i},{','.join(['1'] * 3)}" for i in range(20)]
    a = read_table(write(tmp_path, "a.csv", "timestamp,x,y", *[row[:-2] for row in rows]), entity=True)
    width = header.count(",")
    cut = [",".join(row.split(",")[: width + 1]) for row in rows]
    b = read_table(write(tmp_path, "b.csv", header, *cut), entity=True)
    with pytest.raises(ConfigError, match=f"^{differs}; a model of entities needs the same metrics of all"):
        training_series(merge([a, b]))
