"""The commands, each as a process of its own, on files and real servers."""

from __future__ import annotations

import csv
import gzip
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from stream.settings import known_names, load_settings
from tests.e2e.program import Running, lines_of, tocsin, wait_until
from tests.live import environment_for, read_all


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample file of the demo."""
    directory = tmp_path_factory.mktemp("sample")
    tocsin(directory, "sample", "-o", "checkout.csv")
    return directory / "checkout.csv"


def rows_of(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(file.read_text().splitlines()))


# -- help and exit codes --------------------------------------------------------------------------------------------


def test_help_comes_at_once() -> None:
    began = time.monotonic()
    subprocess.run([sys.executable, "-m", "stream", "--help"], check=True, capture_output=True)
    assert time.monotonic() - began < 3  # 0.2 s on an idle machine; with torch it would be seconds more
    slow = (
        "import sys, stream.commands; sys.exit(any(m in sys.modules for m in ('torch', 'aiokafka', 'numpy', 'rich')))"
    )
    assert subprocess.run([sys.executable, "-c", slow]).returncode == 0, "imports are lazy"


COMMANDS = ("demo", "up", "serve", "replay", "subscribe", "backtest", "train", "evaluate", "sample", "check", "models")


def test_each_help_names_its_options_and_the_exit_codes(tmp_path: Path) -> None:
    overview = tocsin(tmp_path, "--help").stdout
    for command in COMMANDS:
        assert f"\n  {command} " in overview
        text = tocsin(tmp_path, command, "--help").stdout
        assert "Usage: tocsin" in text
        assert command == "models" or "Exit codes" in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nonsense"], "No such command"),
        (["backtest"], "Missing argument"),
        (["backtest", "absent.csv"], "absent.csv: no such file"),
        (["backtest", "binary.csv"], "binary.csv"),
        (["backtest", "SAMPLE", "--bogus"], "No such option"),
        (["backtest", "SAMPLE", "--checkpoint", "nope"], "no checkpoint 'nope'"),
        (["backtest", "SAMPLE", "--checkpoint", "deepant@77"], "no checkpoint 'deepant@77'"),
        (["backtest", "SAMPLE", "--checkpoint", "../x"], "is not the name of a model"),
        (["backtest", "SAMPLE", "--train-fraction", "1.5"], "--train-fraction"),
        (["backtest", "SAMPLE", "--train-fraction", "0.4", "--checkpoint", "deepant"], "give one of them"),
        (["backtest", "SAMPLE", "--scores", "absent/x.csv"], "absent/x.csv"),
        (["train", "--name", "x"], "nothing to learn from"),
        (["train", "SAMPLE", "--name", "A/B"], "--name"),
        (["models", "show", "nope"], "no checkpoint 'nope'"),
        (["models", "import", "binary.csv", "--name", "x", "--window", "30"], "binary.csv"),
        (["replay", "SAMPLE"], "no `tocsin up` is running"),
        (["replay", "SAMPLE", "--speed", "-3"], "--speed -3"),
        (["subscribe", "--min-severity", "loud"], "--min-severity"),
        (["check"], "no `tocsin up` is running"),
    ],
)
def test_what_is_wrong_with_an_argument_is_said_in_one_line(
    tmp_path: Path, sample: Path, arguments: list[str], said: str
) -> None:
    (tmp_path / "binary.csv").write_bytes(bytes(range(256)) * 100)
    done = tocsin(tmp_path, *(sample if a == "SAMPLE" else a for a in arguments), code=2)
    assert said in done.stderr.splitlines()[-1]
    assert done.stdout == ""


def test_a_damaged_checkpoint_is_no_fault_of_the_arguments(tmp_path: Path, sample: Path) -> None:
    (tmp_path / "checkpoints" / "broken" / "1").mkdir(parents=True)
    (tmp_path / "checkpoints" / "broken" / "1" / "config.json").write_text("{")
    done = tocsin(tmp_path, "backtest", sample, "--checkpoint", "broken", code=1)
    assert "config.json" in done.stderr


def test_every_setting_is_listed(tmp_path: Path) -> None:
    text = tocsin(tmp_path, "check", "--settings").stdout
    for name, description, _ in known_names():
        assert f"{name}=" in text and description in text
    done = tocsin(tmp_path, "check", "--settings", more={"TOCSIN_INTERVALS": "60"}, code=2)
    assert "did you mean TOCSIN_INTERVAL_S?" in done.stderr


# -- rules ----------------------------------------------------------------------------------------------------------

RULES = """
rules:
  - match: checkout*
    name: shop
    direction: high
    interval: 5m
    false_alarms: 1 per month
    labels: {team: payments}
  - match: noise.*
    watch: false
"""


def test_check_says_which_rule_a_kpi_falls_under(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(RULES)
    text = tocsin(tmp_path, "check", "checkout", "noise.a", "other", "--rules", "rules.yaml").stdout
    shop, noise, other = text.split("KPI ")[1:]
    assert "yes, by 'checkout*'" in shop and "1 per month at 300 s" in shop and "team=payments" in shop
    assert "ignored (watch: false)" in noise
    assert "no rule matches: it is not watched" in other
    more = {"TOCSIN_RULES": "rules.yaml"}
    assert tocsin(tmp_path, "check", "checkout", more=more).stdout in text
    assert tocsin(tmp_path, "check", "m-1", "--entity").stdout.startswith("entity m-1\n  the settings: yes")
    assert "--entity" in tocsin(tmp_path, "check", "--entity", code=2).stderr
    (tmp_path / "rules.yaml").write_text(
        RULES.replace("watch: false", "wach: no").replace("1 per month", "one per moon")
    )
    done = tocsin(tmp_path, "check", "--rules", "rules.yaml", code=2)
    assert done.stdout == "" and "rules.yaml:7: " in done.stderr and "rules.yaml:10: " in done.stderr


def test_rules_that_no_series_reaches_are_told_of(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(
        "rules:\n  - match: '*'\n    model: deepant\n  - match: a\n    model: deepant@1\n"
    )
    assert "never reached" in tocsin(tmp_path, "check", "--rules", "rules.yaml", code=2).stderr


def test_a_backtest_goes_by_rules(tmp_path: Path, sample: Path) -> None:
    (tmp_path / "rules.yaml").write_text(RULES)
    *plain, _ = lines_of(tocsin(tmp_path, "backtest", sample, "--json").stdout)
    *ruled, _ = lines_of(tocsin(tmp_path, "backtest", sample, "--json", "--rules", "rules.yaml").stdout)
    assert ruled and {event["data"]["rule"] for event in ruled} == {"shop"}
    assert all(event["data"]["labels"] == {"team": "payments"} for event in ruled)
    opened = [[e for e in some if e["type"].endswith("opened")] for some in (plain, ruled)]
    below = [[e for e in some if e["data"]["value"] < e["data"]["expected"]] for some in opened]
    assert below[0] and not below[1], "high values only"


# -- files ----------------------------------------------------------------------------------------------------------


def test_the_sample_is_the_same_each_time(tmp_path: Path, sample: Path) -> None:
    assert tocsin(tmp_path, "sample").stdout == sample.read_text()
    assert tocsin(tmp_path, "sample", "--seed", "8").stdout != sample.read_text()
    rows = rows_of(sample)
    assert len(rows) > 7000 and {row["label"] for row in rows} == {"0", "1"}
    assert {row["label"] for row in csv.DictReader(tocsin(tmp_path, "sample", "--clean").stdout.splitlines())} == {"0"}


def test_backtest(tmp_path: Path, sample: Path) -> None:
    packed = tmp_path / "checkout.csv.gz"
    packed.write_bytes(gzip.compress(sample.read_bytes()))
    done = tocsin(tmp_path, "backtest", packed, "--json", "--scores", "out.csv")
    *events, last = lines_of(done.stdout)
    summary = last["summary"]
    assert summary["caught"] >= 7 and summary["false_alarms"] <= 3 and summary["events"] == len(events)
    assert done.stderr == ""
    rows = rows_of(tmp_path / "out.csv")
    band = ["value", "expected", "lower", "upper"]
    assert list(rows[0]) == ["timestamp", *band, "score", "threshold", "probability", "anomaly"]
    inside = [row for row in rows if row["lower"] and row["value"] and row["anomaly"] == "0"]
    assert inside and all(float(r["lower"]) <= float(r["value"]) * 1.001 for r in inside)
    assert sum(row["score"] != "" for row in rows) == summary["scored"]
    assert sum(row["anomaly"] == "1" for row in rows) == summary["counts"]["flagged"]
    text = tocsin(tmp_path, "backtest", sample).stdout
    assert len(text.partition("\n\n")[0].splitlines()) == len(events)


def test_training_on_the_head_scores_from_the_very_split_on(tmp_path: Path) -> None:
    for days, kpis in ((8, ["requests"]), (8, ["cpu", "latency"])):
        files = [tmp_path / f"{kind}.csv" for kind in kpis]
        for file in files:
            tocsin(tmp_path, "sample", "-o", file, "--kind", file.stem, "--days", str(days))
        done = tocsin(
            tmp_path, "backtest", *files, "--train-fraction", "0.5", "--json", "--scores", "out.csv",
            more={"TOCSIN_POT__MIN_SCORES": "300"},
        )  # fmt: skip
        *events, last = lines_of(done.stdout)
        rows = rows_of(tmp_path / "out.csv")
        times = sorted(int(row["timestamp"]) for file in files for row in rows_of(file))
        split = times[len(times) // 2]
        assert {row["kpi"] for row in rows if "kpi" in row} == (set(kpis) if len(kpis) > 1 else set())
        for kpi in kpis:
            first = next(row for row in rows if row.get("kpi", kpi) == kpi and row["value"])
            assert int(first["timestamp"]) - split <= 600, "nothing of the head, and no gap behind it"
            assert first["score"] != "" and first["threshold"] != "", "window and threshold are there"
        assert all(event["time"] >= time.strftime("%Y-%m-%dT%H:%M", time.gmtime(split)) for event in events)
        assert last["summary"]["points"] == len(times) - len(times) // 2


def test_a_trained_checkpoint_is_listed_shown_and_used(tmp_path: Path) -> None:
    tocsin(tmp_path, "sample", "-o", "clean.csv", "--days", "6", "--clean")
    done = tocsin(tmp_path, "train", "clean.csv", "--name", "mine", "--epochs", "2", "--window", "14")
    assert done.stdout.strip() == str(tmp_path / "checkpoints" / "mine" / "1")
    weights = tmp_path / "checkpoints" / "mine" / "1" / "model.safetensors"
    options = ("--window", "14", "--center", "100", "--scale", "50")
    done = tocsin(tmp_path, "models", "import", weights, "--name", "mine", *options)
    assert done.stdout.strip() == str(tmp_path / "checkpoints" / "mine" / "2")
    tocsin(tmp_path, "models", "import", weights, "--name", "mine", "--window", "30", code=2)
    listed = lines_of(tocsin(tmp_path, "models", "list", "--json").stdout)
    assert {"name": "mine", "versions": [1, 2], "labels": {}} in listed
    assert "mine  1, 2" in tocsin(tmp_path, "models", "list").stdout
    assert "mine@stable is mine@1" in tocsin(tmp_path, "models", "promote", "mine@1").stdout
    assert "mine@stable is mine@2, was mine@1" in tocsin(tmp_path, "models", "promote", "mine@2").stdout
    assert "mine  1, 2 (stable)" in tocsin(tmp_path, "models", "list").stdout
    assert "mine@stable is mine@1, was mine@2" in tocsin(tmp_path, "models", "rollback", "mine").stdout
    assert "no version had 'stable' before" in tocsin(tmp_path, "models", "rollback", "mine", code=1).stderr
    assert "mine@2: fine" in tocsin(tmp_path, "models", "verify").stdout
    damaged = tmp_path / "checkpoints" / "mine" / "2" / "model.safetensors"
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1] + b"x")
    broken = tocsin(tmp_path, "models", "verify", "mine@1", "mine@2", code=1)
    assert "mine@1: fine" in broken.stdout and "its SHA-256 is" in broken.stderr
    damaged.write_bytes(content)
    assert json.loads(tocsin(tmp_path, "models", "show", "mine@1", "--json").stdout)["model"]["window"] == 14
    assert "clean" in tocsin(tmp_path, "models", "show", "mine@1").stdout
    tocsin(tmp_path, "sample", "-o", "test.csv", "--days", "6", "--seed", "3")
    *events, _ = lines_of(tocsin(tmp_path, "backtest", "test.csv", "--checkpoint", "mine@1", "--json").stdout)
    models = {event["data"]["model"] for event in events if "anomaly" in event["type"]}  # silence has none
    assert models == {"mine@1"}
    assert tocsin(tmp_path, "backtest", "test.csv", "--checkpoint", "mine").stdout, "the stable version"


# -- servers ----------------------------------------------------------------------------------------------------------


async def test_a_stopped_replay_is_resumed_without_loss_or_repetition(
    broker: str, unique: str, tmp_path: Path, sample: Path
) -> None:
    more = environment_for(broker, "", unique)
    kafka = load_settings(more).kafka
    command = ("replay", sample, "--topic", f"t.{unique}")
    moments = (signal.SIGINT, signal.SIGTERM, signal.SIGINT)
    positions = [0]
    for number in moments:
        # 28 days at 3 days a second
        with Running(tmp_path, *command, "--speed", "260000", "--shift-to-now", "--resume", more=more) as replay:
            wait_until(lambda: position(tmp_path) > positions[-1], "it goes on")
            assert replay.end(number) == 130
            positions.append(position(tmp_path))
            assert f"stopped after {positions[-1]:,} of" in replay.stderr
            assert replay.stderr.endswith("tocsin: interrupted\n")
    tocsin(tmp_path, *command, "--shift-to-now", "--resume", more=more)
    records = [json.loads(record.value) for record in await read_all(kafka, f"t.{unique}")]
    rows = rows_of(sample)
    assert positions[-1] < len(rows), "the stops came too late to prove anything"
    assert len(records) == len(rows)
    shift_s = {record["timestamp"] // 1000 - int(row["timestamp"]) for record, row in zip(records, rows, strict=True)}
    assert len(shift_s) == 1, "each point once, in order, on one grid"
    assert abs(records[-1]["timestamp"] / 1000 - time.time()) < 120
    assert "already" in tocsin(tmp_path, *command, "--resume", more=more).stderr
    assert len(await read_all(kafka, f"t.{unique}")) == len(rows)


def position(directory: Path) -> int:
    for file in (directory / "state" / "tocsin").glob("replay-*.json"):
        return int(json.loads(file.read_text())["sent"])
    return 0


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Running]:
    with Running(tmp_path, "up") as running:
        running.until_it_says("assigned")
        running.remember_children()
        yield running


def test_up_replay_and_subscribe_find_each_other(tmp_path: Path, sample: Path, up: Running) -> None:
    expected = tocsin(tmp_path, "backtest", sample, "--json").stdout.splitlines()[:-1]
    other = tmp_path / "db.latency.csv"
    tocsin(tmp_path, "sample", "-o", other, "--days", "12", "--kind", "latency")
    followers = {
        "all": ["--json"],
        "one": ["--json", "--kpi", "checkout*"],
        "critical": ["--json", "--kpi", "checkout*", "--min-severity", "critical"],
        "text": ["--kpi", "checkout"],
    }
    running = {name: Running(tmp_path, "subscribe", *options) for name, options in followers.items()}
    try:
        for follower in running.values():
            follower.until_it_says("following")
        assert "checkpoint" in tocsin(tmp_path, "check").stdout
        tocsin(tmp_path, "replay", sample, other)
        assert [running["one"].line().rstrip("\n") for _ in expected] == expected
        critical = [line for line in expected if '"severity":"critical"' in line or '"tocsin.kpi.' in line]
        assert critical and [running["critical"].line().rstrip("\n") for _ in critical] == critical
        seen = {json.loads(running["all"].line())["subject"] for _ in expected}
        assert seen <= {"checkout", "db.latency"}
        assert "checkout" in running["text"].line()
        with Running(tmp_path, "subscribe", "--from", "earliest", "--kpi", "checkout", "--json") as late:
            assert [late.line().rstrip("\n") for _ in expected] == expected
            assert late.end(signal.SIGINT) == 130
        for follower in running.values():
            assert follower.end(signal.SIGINT) == 130
            assert follower.stderr.splitlines()[-1] == "tocsin: interrupted" and "Traceback" not in follower.stderr
    finally:
        for follower in running.values():
            follower.__exit__()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_up_ends_in_order(up: Running, number: signal.Signals) -> None:
    assert up.end(number) == 0
    assert "Traceback" not in up.stderr and "ERROR" not in up.stderr
    wait_until(up.leaves_nothing_behind, "processes and files are gone")


def test_up_keeps_data_where_it_is_told_to(tmp_path: Path) -> None:
    for _ in range(2):
        with Running(tmp_path, "up", "--data-dir", tmp_path / "data") as running:
            running.until_it_says("assigned")
            assert running.end(signal.SIGTERM) == 0
    assert (tmp_path / "data" / "broker").is_dir()
