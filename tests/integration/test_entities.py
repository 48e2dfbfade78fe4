"""Entities from files to events: live equals back-test, train to back-test by the commands, and real machines."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner

from models import repository
from models.deepant import FAMILY, DeepAnTConfig
from models.train import TrainConfig, train
from models.windows import TrainSeries
from stream import backtest
from stream.commands import app
from stream.events import TYPE_OPENED, Event, EventData
from stream.points import Points
from stream.replay import replay
from stream.report import Summary, summarise
from stream.service import detector_factory, use_one_thread
from stream.settings import load_settings
from tests.live import START_MS, backtested, digest, published, read_all, settings_for, until_committed, working

MINUTE = 60_000
METRICS = ("cpu", "mem", "net", "errors")


def machine(n: int, seed: int, *, anomalies: bool) -> tuple[NDArray[np.float64], list[int]]:
    """Return (n, 4) values of a machine, and where it is anomalous: every 150 points for five, one metric by turns."""
    rng = np.random.default_rng(seed)
    day = np.sin(2 * np.pi * np.arange(n) / 240)
    cpu = 40 + 15 * day + rng.normal(0, 1.5, n)
    values = np.stack([cpu, 60 + 0.2 * cpu + rng.normal(0, 0.3, n), 1e6 * (3 + day + rng.normal(0, 0.1, n))], axis=1)
    values = np.column_stack([values, np.zeros(n)])
    begins = list(range(400, n - 10, 150)) if anomalies else []
    for k, begin in enumerate(begins):
        values[begin : begin + 5, k % 4] += (60, 12, 4e6, 50)[k % 4]
    return values, begins


def stream(n: int = 1500) -> Points:
    """Return three machines that send parts of their metrics, some of them late; merged by arrival."""
    rng = np.random.default_rng(1)
    parts = []
    for k in range(3):
        values, begins = machine(n, 10 + k, anomalies=True)
        minute, feature = (axis.reshape(-1) for axis in np.indices(values.shape))
        there = rng.random(len(minute)) > 0.08  # left out of its record
        empty = rng.random(len(minute)) < 0.03  # there, and null
        value = np.where(empty, np.nan, values.reshape(-1))
        label = np.isin(minute[:, None], np.add.outer(begins, np.arange(5)).reshape(1, -1)).any(axis=1)
        # Of some minutes all comes late, of others a half: two records then.
        late = np.repeat(np.where(rng.random(n) < 0.1, rng.uniform(0, 3.0, n), 0.0), 4)
        half = np.repeat(rng.random(n) < 0.1, 4) & (feature >= 2)
        arrival = minute + late + np.where(half, 1.4, 0.0)
        parts.append((arrival, minute, np.full(len(minute), k), value, label, feature, there))
    arrival, minute, kpi, value, label, feature, there = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(arrival, kind="stable")
    order = order[there[order]]
    return Points(
        ("m1", "m2", "m3"),
        (START_MS + minute * MINUTE)[order].astype(np.int64),
        kpi[order].astype(np.int32),
        value[order],
        label[order].astype(np.int8),
        (METRICS,) * 3,
        feature[order].astype(np.int32),
    )


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a repository with `servers`, a model of four metrics."""
    use_one_thread()
    root = tmp_path_factory.mktemp("checkpoints")
    values, _ = machine(2500, 0, anomalies=False)
    config = TrainConfig.of(FAMILY, DeepAnTConfig(window=10, features=4), epochs=3)
    series = TrainSeries("m0", values, np.zeros(len(values), np.bool_), MINUTE, metrics=METRICS)
    repository.save(root, "servers", train([series], config))
    return root


@pytest.mark.parametrize("lateness_s", ["0", "240"])
async def test_live_equals_backtest(
    embedded_broker: str, redis_url: str, unique: str, checkpoints: Path, lateness_s: str
) -> None:
    settings = settings_for(
        embedded_broker,
        redis_url,
        unique,
        TOCSIN_CHECKPOINTS=str(checkpoints),
        TOCSIN_CHECKPOINT="servers",
        TOCSIN_LATENESS_S=lateness_s,
        TOCSIN_KAFKA__MAX_POLL_RECORDS="300",
    )
    points = stream()
    half = points.n_records // 2
    async with working(settings):
        await replay(points.take(points.record < half), settings.kafka)
        await until_committed(settings.kafka, half)
    async with working(settings) as worker:  # from its state
        await replay(points, settings.kafka, first=half)
        await until_committed(settings.kafka, points.n_records)
        assert sum(len(partition.detector.index.entities) for partition in worker.partitions.values()) == 3
    events = await published(settings.kafka)
    expected = backtested(points, settings)
    assert len({event.data.kpi for event in expected}) == 3 and len(expected) > 20
    assert all(event.data.features for event in expected if isinstance(event.data, EventData))
    assert digest(events) == digest(expected)
    assert all(record.value for record in await read_all(settings.kafka, settings.kafka.rejects_topic))
    summary = summarise(points, expected, detector_factory(settings)().counts, elapsed_s=1.0)
    if lateness_s != "0":
        assert summary.caught >= 0.8 * len(summary.segments)
        named = [METRICS.index(s.metrics[0]) for s in summary.segments if s.metrics]
        meant = [k % 4 for _ in range(3) for k in range(len(summary.segments) // 3)]
        assert len(named) > 10 and set(named) == set(meant), "each metric was anomalous once, and named"


# -- the commands -----------------------------------------------------------------------------------------------------


def write(path: Path, columns: tuple[str, ...], *, anomalies: bool, seed: int, n: int) -> Path:
    values, begins = machine(n, seed, anomalies=anomalies)
    label = np.isin(np.arange(n), np.add.outer(begins, np.arange(5)).reshape(-1)).astype(int)
    order = [METRICS.index(name) for name in columns if name in METRICS]
    lines = ["timestamp," + ",".join(columns) + ",label"]
    for i in range(n):
        lines.append(f"{START_MS // 1000 + 60 * i}," + ",".join(f"{values[i, f]:.6g}" for f in order) + f",{label[i]}")
    path.write_text("\n".join(lines) + "\n")
    return path


def tocsin(*arguments: str | Path, root: Path) -> str:
    result = CliRunner().invoke(app, [str(one) for one in arguments], env={"TOCSIN_CHECKPOINTS": str(root)})
    assert result.exit_code == 0, result.output
    return result.stdout


def test_train_and_backtest_by_the_commands(tmp_path: Path) -> None:
    learn = write(tmp_path / "m0.csv", METRICS, anomalies=False, seed=0, n=2000)
    judge = write(tmp_path / "m9.csv", METRICS[::-1], anomalies=True, seed=5, n=1500)
    made = tocsin("train", learn, "--entity", "--name", "servers", "--epochs", "2", "--window", "10", root=tmp_path)
    assert Path(made.strip()) == tmp_path / "servers" / "1"
    shown = json.loads(tocsin("models", "show", "servers", "--json", root=tmp_path))
    assert shown["metrics"] == list(METRICS)
    assert "features: 4: cpu, mem, net, errors" in tocsin("models", "show", "servers", root=tmp_path)
    scores = tmp_path / "scores.csv"
    printed = tocsin(
        "backtest", judge, "--entity", "--checkpoint", "servers", "--json", "--scores", scores, root=tmp_path
    )
    *_, last = printed.splitlines()
    summary = json.loads(last)["summary"]
    assert (summary["kpis"], summary["entities"]) == (0, 1)
    assert len(summary["segments"]) == 8 and summary["caught"] >= 6
    first = json.loads(printed.splitlines()[0])
    assert first["subject"] == "m9" and first["data"]["features"][0]["metric"] in METRICS
    header, row, *_ = scores.read_text().splitlines()
    assert header.startswith("timestamp,value,expected,lower,upper,score") and row.split(",")[1:3] == ["", ""]
    # The same by a model of one feature: each metric is a KPI.
    other = write(tmp_path / "m8.csv", METRICS[:3], anomalies=True, seed=6, n=1500)
    printed = tocsin("backtest", other, "--entity", "--json", "--scores", scores, root=tmp_path)
    by_metric = json.loads(printed.splitlines()[-1])["summary"]
    assert by_metric["entities"] == 1 and by_metric["counts"]["points"] == 4500
    assert json.loads(printed.splitlines()[0])["subject"] in ("m8.cpu", "m8.mem", "m8.net")
    assert by_metric["segments"][-3]["metrics"] in (["cpu"], ["mem"], ["net"], [])
    assert scores.read_text().splitlines()[0].startswith("kpi,timestamp")


def test_train_fraction_of_an_entity(tmp_path: Path) -> None:
    path = write(tmp_path / "m0.csv", METRICS, anomalies=True, seed=3, n=3000)
    printed = tocsin("backtest", path, "--entity", "--train-fraction", "0.5", "--window", "10", "--json", root=tmp_path)
    summary = json.loads(printed.splitlines()[-1])["summary"]
    assert summary["scored"] == 1500 and summary["counts"]["points"] == 6000
    assert summary["caught"] >= 0.7 * len(summary["segments"])


# -- real machines ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Judged:
    """What a machine's test half gave."""

    summary: Summary
    agreeing: int  # caught segments whose incident first named a metric that its experts name
    named: int  # the same of any metric named


def judge_machine(path: Path, epochs: int) -> Judged:
    """Train on the first half of a machine of SMD, back-test the second."""
    use_one_thread()
    data = np.load(path)
    metrics = tuple(f"m{i + 1}" for i in range(data["train"].shape[1]))
    halves = data["train"].astype(np.float64), data["test"].astype(np.float64)
    series = TrainSeries(path.stem, halves[0], np.zeros(len(halves[0]), np.bool_), MINUTE, metrics=metrics)
    bundle = train([series], TrainConfig.of(FAMILY, DeepAnTConfig(features=len(metrics)), epochs=epochs))
    detector = detector_factory(load_settings({}), checkpoint=backtest.trained_checkpoint(bundle))()
    n, width = halves[1].shape
    minute, feature = (axis.reshape(-1) for axis in np.indices((n, width)))
    points = Points(
        (path.stem,),
        START_MS + minute.astype(np.int64) * MINUTE,
        np.zeros(n * width, np.int32),
        halves[1].reshape(-1),
        np.repeat(data["label"], width).astype(np.int8),
        (metrics,),
        feature.astype(np.int32),
    )
    events: list[Event] = [event for _, result in backtest.run(detector, points) for event in result.events]
    openings = [event.data for event in events if event.type == TYPE_OPENED and isinstance(event.data, EventData)]
    assert openings and all(data.features for data in openings)
    summary = summarise(points, events, detector.counts, elapsed_s=1.0)
    experts = []  # "start-end:metric,metric,...", from 0 and from 1
    for line in str(data["interpretation"]).split():
        span, names = line.split(":")
        begin, end = (START_MS + int(edge) * MINUTE for edge in span.split("-"))
        experts.append((begin, end, {f"m{name}" for name in names.split(",")}))
    agreeing = named = 0
    for segment in summary.segments:
        if not segment.metrics:
            continue
        start, last = (np.datetime64(edge.rstrip("Z"), "ms").astype(np.int64) for edge in (segment.start, segment.end))
        meant = set().union(*(names for begin, end, names in experts if begin <= last and end >= start))
        agreeing += segment.metrics[0] in meant
        named += bool(meant & set(segment.metrics))
    return Judged(summary, agreeing, named)


@pytest.mark.data
def test_a_real_machine(data_dir: Path) -> None:
    path = data_dir / "smd" / "machine-2-1.npz"
    if not path.exists():
        pytest.skip(f"no {path}")
    found = judge_machine(path, epochs=3)
    summary = found.summary
    assert len(summary.segments) == 13
    assert summary.caught >= 6
    assert summary.false_alarms is not None and summary.false_alarms <= 40, "of 16 days of 38 metrics"
    assert found.named >= summary.caught // 2
