"""`tocsin evaluate`: what is read, what is kept from the models, what comes of a run, what is printed and drawn."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from choreographer.browsers.chromium import Chromium
from plotly.offline import get_plotlyjs
from typer.testing import CliRunner

from models.base import Float64
from stream.backtest import training_series
from stream.commands import app
from stream.detector import DetectorConfig, Served
from stream.errors import ConfigError, InputError
from stream.evaluation import charts, data, table
from stream.evaluation.baselines import BASELINES
from stream.evaluation.data import Series
from stream.evaluation.runs import Figures, Run, detections, judge, overall, run
from stream.policy import Policy, Rule

SEGMENTS = ((1500, 1513), (1900, 1901), (2200, 2231))
START_S = 1_767_571_200


def kpi(n: int = 2400, *, shift: float = 25.0, seed: int = 1) -> tuple[Float64, Float64]:
    """Values and labels: a season of a day with noise, and three segments that lie off."""
    rng = np.random.default_rng(seed)
    value = 100 + 20 * np.sin(np.arange(n) / 288 * 2 * np.pi) + rng.normal(0, 1, n)
    label = np.zeros(n)
    for first, last in SEGMENTS:
        value[first:last] += shift
        label[first:last] = 1
    return value, label


def write_csv(path: Path, value: Float64, label: Float64, gap: slice = slice(1700, 1712)) -> Path:
    keep = np.ones(len(value), np.bool_)
    keep[gap] = False
    lines = [f"{START_S + 300 * i},{value[i]:.5f},{label[i]:.0f}" for i in np.flatnonzero(keep).tolist()]
    path.write_text("timestamp,value,label\n" + "\n".join(lines) + "\n")
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_csv(tmp_path / "checkout.csv", *kpi())


def read(path: Path, fraction: float = 0.5, **options: bool) -> Series:
    (one,) = data.read(path, fraction=fraction, entity=options.get("entity", False))
    return one


def served(name: str, series: Series) -> Served:
    part = series.learned()
    return Served(f"{name}@0", BASELINES[name](part), part.metrics)


def run_of(name: str, series: Series, q: float = 1e-3) -> Run:
    return run(series, served(name, series), DetectorConfig(), [Rule(policy=Policy(q=q))])


# -- data -----------------------------------------------------------------------------------------------------------


def test_a_file_is_cut_into_what_is_learned_from_and_what_is_judged(file: Path) -> None:
    series = read(file, 0.4)
    assert series.first == int(0.4 * 2388) == series.first_record
    part = series.learned()
    assert len(part.values) == series.first
    assert series.label.sum() == 13 + 1 + 31


def test_no_label_reaches_a_model(tmp_path: Path) -> None:
    value, label = kpi()
    label[100:160] = 1  # in the part that is learned from
    told = read(write_csv(tmp_path / "a.csv", value, label))
    silent = read(write_csv(tmp_path / "b.csv", value, np.zeros(len(value))))
    assert not told.learned().anomalous.any()
    assert training_series(told.points.take(slice(told.first)))[0].anomalous.any(), "the file has them"
    assert told.learned().values.tobytes() == silent.learned().values.tobytes()
    first, second = (run_of("last value", one) for one in (told, silent))
    assert first.score.tobytes() == second.score.tobytes()
    assert [(e.time, e.type) for e in first.events] == [(e.time, e.type) for e in second.events]


def test_each_kpi_of_a_wide_file_is_a_series(tmp_path: Path) -> None:
    path = tmp_path / "wide.csv"
    path.write_text(
        "timestamp,a,b,label\n" + "".join(f"{START_S + 60 * i},{i},{-i},{i % 50 == 0:d}\n" for i in range(100))
    )
    a, b = data.read(path, fraction=0.5, entity=False)
    assert (a.name, b.name) == ("wide.a", "wide.b")
    assert (a.points.value[:3].tolist(), b.points.value[:3].tolist()) == ([0, 1, 2], [0, -1, -2])
    whole = read(path, entity=True)
    assert whole.points.metrics == (("a", "b"),)
    assert len(whole.label) == 100 and whole.label.sum() == 2


def test_an_npz_of_a_benchmark_brings_its_own_training_part(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    train, test, label = rng.normal(size=(300, 3)), rng.normal(size=(200, 3)), np.zeros(200, np.uint8)
    label[50:60] = 1
    np.savez(tmp_path / "machine.npz", train=train, test=test, label=label)
    series = read(tmp_path / "machine.npz")
    assert (series.first, series.first_record, series.own_part) == (900, 300, True)
    assert np.allclose(series.learned().values, train)
    assert series.label.nonzero()[0].tolist() == list(range(350, 360))
    np.savez(tmp_path / "one.npz", train=train[:, 0], test=test[:, 0], label=label)
    assert read(tmp_path / "one.npz").points.metrics == ((),)


def test_files_that_cannot_be_judged_are_refused(tmp_path: Path, file: Path) -> None:
    bare = tmp_path / "bare.csv"
    bare.write_text("timestamp,value\n" + "".join(f"{START_S + 60 * i},{i}\n" for i in range(50)))
    with pytest.raises(InputError, match="has no labels"):
        read(bare)
    with pytest.raises(InputError, match="--nab needs labels"):
        data.read(file, fraction=0.5, entity=False, as_nab=True)
    np.savez(tmp_path / "odd.npz", train=np.zeros((5, 2)), test=np.zeros((5, 3)), label=np.zeros(5))
    with pytest.raises(InputError, match="do not fit"):
        read(tmp_path / "odd.npz")
    np.savez(tmp_path / "pickled.npz", train=np.array([{}]), test=np.zeros(5), label=np.zeros(5))
    with pytest.raises(InputError, match="plain arrays"):
        read(tmp_path / "pickled.npz")
    with pytest.raises(InputError, match=r"gone\.csv"):
        read(tmp_path / "gone.csv")


# -- runs -----------------------------------------------------------------------------------------------------------


def test_the_figures_are_those_of_the_alarms_as_published(file: Path) -> None:
    series = read(file)
    made = run_of("last value", series)
    found = judge("last value", series, made)
    assert (found.segments, found.caught, found.recall) == (3, 3, 1.0)
    assert found.delays == (0, 0, 0) and found.delay == 0
    assert found.precision == (found.incidents - found.false_incidents) / found.incidents
    assert found.false_per_week == pytest.approx(found.false_incidents / found.weeks)
    assert found.weeks == pytest.approx((2388 - series.first + 12 - 1) * 300 / 604_800, rel=0.02)
    assert found.points.tp == 45 and found.points.fn == 0
    assert found.auc_pr > 0.3 and found.vus_pr > 0.3
    assert found.best_pa_f1 >= found.best_delay_f1 >= found.f1 > 0.9
    assert math.isnan(found.nab_score)
    assert np.isfinite(made.score).all(), "scoring begins with the very first point that is judged"


def test_chance_is_judged_by_the_same_threshold_and_finds_nothing(file: Path) -> None:
    series = read(file)
    found = judge("random", series, run_of("random", series))
    assert found.auc_pr < 0.15
    assert found.recall <= 1 / 3
    assert found.false_incidents <= 6, "q promises one in a thousand of 1,200"


def test_nab_counts_openings_in_its_windows(tmp_path: Path) -> None:
    corpus = tmp_path / "data" / "made" / "checkout.csv"
    corpus.parent.mkdir(parents=True)
    value, _ = kpi()
    lines = "".join(
        f"2026-01-{5 + i // 288:02d} {i % 288 // 12:02d}:{i % 12 * 5:02d}:00,{v:.5f}\n" for i, v in enumerate(value)
    )
    corpus.write_text("timestamp,value\n" + lines)
    stamps = [line.split(",")[0] for line in lines.splitlines()]
    windows = [[stamps[first - 20] + ".000000", stamps[last + 80] + ".000000"] for first, last in SEGMENTS]
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "combined_windows.json").write_text(json.dumps({"made/checkout.csv": windows}))
    series = read(corpus)
    assert series.first == 360 and series.windows is not None
    assert series.label.sum() == sum(last - first + 101 for first, last in SEGMENTS)
    made = run_of("last value", series)
    assert {1500, 1900, 2200} <= set(detections(series, made.events).tolist())
    found = judge("last value", series, made)
    assert found.nab_file is not None and found.nab_file.caught == 3
    assert 70 < found.nab_score < 100
    (plain,) = data.read(write_csv(tmp_path / "data" / "made" / "other.csv", *kpi()), fraction=0.5, entity=False)
    assert plain.windows is None, "the corpus does not know it"


def test_an_entity_and_its_metrics_one_by_one_are_judged_alike(tmp_path: Path) -> None:
    value, label = kpi()
    other = 5 + np.random.default_rng(4).normal(0, 1, len(value))
    values = np.column_stack((value, other))
    np.savez(tmp_path / "web.npz", train=values[:1200], test=values[1200:], label=label[1200:].astype(np.uint8))
    series = read(tmp_path / "web.npz")
    whole = run_of("last value", series)
    single = BASELINES["last value"](replace(series.learned(), values=series.learned().values[:, :1]))
    apart = run(series, Served("single@0", single), DetectorConfig(), [Rule(policy=Policy(q=1e-3))])
    assert whole.cells is not None and apart.cells is None
    for made in (whole, apart):
        found = judge("last value", series, made)
        assert (found.segments, found.caught) == (3, 3)
        assert np.isfinite(made.score).all()


def test_several_series_are_counted_in_one_and_areas_averaged(file: Path) -> None:
    series = read(file)
    one = judge("last value", series, run_of("last value", series))
    both = overall("last value", [one, one])
    assert (both.caught, both.incidents, both.weeks) == (2 * one.caught, 2 * one.incidents, 2 * one.weeks)
    assert both.auc_pr == pytest.approx(one.auc_pr)
    assert (both.f1, both.false_per_week, both.delay) == (one.f1, one.false_per_week, one.delay)


# -- what is told ---------------------------------------------------------------------------------------------------


def figures(**changed: float) -> Figures:
    empty = overall("m", [])
    return msgspec.structs.replace(empty, **changed)


def test_a_point_adjusted_figure_stands_beside_its_floor_only() -> None:
    row = figures(best_pa_f1=0.916, random_pa_f1=0.975)
    (line,) = table.lines("a", [row])[1:]
    assert "0.916 (0.975)" in line
    assert "NAB" not in table.lines("a", [row])[0]
    assert "NAB" in table.lines("a", [row, figures(nab_score=50.0)])[0]
    assert table.as_json(row)["auc_pr"] is None
    json.dumps(table.as_json(row), allow_nan=False)


def test_the_command_prints_a_row_for_each_and_json_says_the_same(file: Path) -> None:
    plain = CliRunner().invoke(app, ["evaluate", str(file), "--model", "neighbours", "--train-fraction", "0.5"])
    assert plain.exit_code == 0, plain.output
    names = [line.split("  ")[1] for line in plain.output.splitlines() if line.startswith("  ")]
    assert names == ["neighbours", "random", "last value", "moving z", "PCA"]
    told = CliRunner().invoke(app, ["evaluate", str(file), "--model", "neighbours", "--json"])
    lines = [json.loads(line) for line in told.stdout.splitlines()]
    assert [next(iter(line)) for line in lines] == ["series", "evaluate"]
    assert lines[0]["models"] == lines[1]["evaluate"]["models"]
    assert lines[0]["models"][0]["recall"] == 1.0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--train-fraction", "1.5"], "--train-fraction 1.5"),
        (["--model", "nothing"], "nothing"),
        (["--report", "{tmp}/gone/r.html"], "cannot be written"),
    ],
)
def test_what_is_wrong_is_said(file: Path, tmp_path: Path, arguments: list[str], said: str) -> None:
    given = [one.replace("{tmp}", str(tmp_path)) for one in arguments]
    model = [] if "--model" in given else ["--model", "random"]
    result = CliRunner().invoke(app, ["evaluate", str(file), *model, *given])
    assert isinstance(result.exception, ConfigError | InputError)
    assert said in str(result.exception)


def test_what_is_not_installed_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    series = read(file)
    made = run_of("last value", series)
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(ConfigError, match=r"pip install 'tocsin\[evaluate\]'"):
        judge("last value", series, made)
    monkeypatch.setattr(Chromium, "find_browser", lambda *_, **__: None)
    with pytest.raises(ConfigError, match="--png needs Chromium or Chrome: install one"):
        charts.check(png=True)
    monkeypatch.setitem(sys.modules, "kaleido", None)
    with pytest.raises(ConfigError, match=r"kaleido: pip install 'tocsin\[report\]'"):
        charts.check(png=True)
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    with pytest.raises(ConfigError, match=r"plotly: pip install 'tocsin\[report\]'"):
        charts.check(png=False)


# -- charts ---------------------------------------------------------------------------------------------------------


def test_thinning_loses_no_extreme_and_no_alarm() -> None:
    rng = np.random.default_rng(2)
    value, score = rng.normal(size=50_000), rng.random(50_000)
    value[777], value[30_001], score[44_444] = 50, -50, 99
    value[1000:1400] = np.nan
    alarm = np.zeros(50_000, np.bool_)
    alarm[[5, 25_000]] = True
    kept = charts.thinned(value, score, alarm)
    assert {0, 5, 777, 25_000, 30_001, 44_444, 49_999} <= set(kept.tolist())
    assert len(kept) <= charts.DRAWN_MAX + 4 and (np.diff(kept) > 0).all()
    assert charts.thinned(value[:900], score[:900], alarm[:900]).tolist() == list(range(900))


def test_the_chart_shows_all_there_is(file: Path) -> None:
    series = read(file)
    chart = charts.figure(series, run_of("last value", series))
    names = [trace.name for trace in chart.data]
    for name in (
        "value",
        "expected",
        "normal band",
        "completed",
        "above threshold",
        "incident opened",
        "score",
        "threshold",
    ):
        assert name in names
    assert len(chart.layout.shapes) == 3, "labelled segments"
    band = next(trace for trace in chart.data if trace.name == "normal band")
    assert list(band.y).count(None) == 2, "it stops at the gap"


def test_the_page_stands_by_itself(file: Path, tmp_path: Path) -> None:
    series = replace(read(file), name="</script><b>")
    made = run_of("last value", series)
    rows = [judge("last value", series, made)]
    charts.write_html(tmp_path / "r.html", [(series, made, rows)], rows)
    page = (tmp_path / "r.html").read_text()
    assert "</script><b>" not in page and "&lt;/script&gt;&lt;b&gt;" in page
    own = page.replace(get_plotlyjs(), "")
    assert len(own) < len(page) and "http" not in own and "src=" not in own, "it needs no network"
    assert "3 of 3 labelled segments caught" in page
