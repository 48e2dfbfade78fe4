"""`tocsin demo`: works at once, tells the truth, and leaves nothing behind, however it ends."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from tests.e2e.program import Running, lines_of, tocsin, wait_until


def test_it_shows_the_whole_path_and_leaves_nothing_behind(tmp_path: Path) -> None:
    began = time.monotonic()
    with Running(tmp_path, "demo", "--json") as demo:
        demo.until_it_says("replaying")
        wait_until(lambda: demo.remember_children() >= 4, "two servers, each with its guardian")
        assert demo.wait() == 0
        assert time.monotonic() - began < 60
        *events, last = lines_of(demo.rest)
        assert demo.stderr.count("\n") == 1, demo.stderr
        assert demo.data_dirs and demo.leaves_nothing_behind()
    assert sorted(path.name for path in tmp_path.iterdir()) == [demo.errors.name]
    summary = last["summary"]
    assert summary["caught"] >= 7 and len(summary["segments"]) == 10
    assert summary["false_alarms"] <= 3
    assert summary["events"] == len(events) >= 14
    assert summary["missing_completed"] > 0 and summary["rejected"] == 0
    assert {event["type"].rpartition(".")[2] for event in events} >= {"opened", "resolved"}
    assert len({event["id"] for event in events}) == len(events)


def test_its_events_are_those_of_a_backtest_of_the_same_file(tmp_path: Path) -> None:
    files = []
    for seed, kind in enumerate(("cpu", "requests")):
        files.append(tmp_path / f"{kind}.csv")
        tocsin(tmp_path, "sample", "-o", files[-1], "--seed", str(seed), "--kind", kind, "--days", "10")
    *live, live_summary = tocsin(tmp_path, "demo", *files, "--json").stdout.splitlines()
    *tested, summary = tocsin(tmp_path, "backtest", *files, "--json").stdout.splitlines()
    assert len(live) >= 4
    for kpi in ("cpu", "requests"):  # two KPIs may lie in two partitions, between which there is no order
        mine = f'"subject":"{kpi}"'
        assert [line for line in live if mine in line] == [line for line in tested if mine in line]
    first, second = (lines_of(line)[0]["summary"] for line in (live_summary, summary))
    for timing in ("elapsed_s", "points_per_s"):
        del first[timing], second[timing]
    assert first == second


def test_for_people_it_prints_a_line_an_event_and_a_table(tmp_path: Path) -> None:
    done = tocsin(tmp_path, "demo")
    events, _, table = done.stdout.partition("\n\n")
    assert all(line.startswith("2026-") and "checkout.requests_per_s" in line for line in events.splitlines())
    assert "labelled segments caught" in table and "points per second" in table
    assert max(map(len, table.splitlines())) <= 80
    assert "\x1b" not in done.stdout, "no colours where nobody sees them"


@pytest.mark.parametrize("moment", ["imports", "start", "replay", "replay, SIGTERM", "late"])
def test_ctrl_c_leaves_nothing_behind(tmp_path: Path, moment: str) -> None:
    with Running(tmp_path, "demo", "--json") as demo:
        if moment == "imports":
            demo.until_it_has("libtorch")
        else:
            demo.until_it_says("replaying")
            wait_until(lambda: demo.remember_children() >= (1 if moment == "start" else 4), "servers")
        lines = {"replay": 1, "replay, SIGTERM": 1, "late": 15}.get(moment, 0)
        assert all(demo.line() for _ in range(lines))
        code = demo.end(signal.SIGTERM if "SIGTERM" in moment else signal.SIGINT)
        if "SIGTERM" in moment:
            assert code != 0
        elif moment == "late" and code == 0:  # it was done before the signal came
            assert '"summary"' in demo.rest
        else:
            assert code == 130
            said = [line for line in demo.stderr.splitlines() if not line.startswith("replaying")]
            assert said == ["tocsin: interrupted"]
        wait_until(demo.leaves_nothing_behind, "processes and files are gone")


def test_an_impatient_second_ctrl_c_leaves_nothing_behind_either(tmp_path: Path) -> None:
    with Running(tmp_path, "demo", "--json") as demo:
        demo.until_it_says("replaying")
        wait_until(lambda: demo.remember_children() >= 4, "servers")
        assert demo.line()
        demo.process.send_signal(signal.SIGINT)
        assert demo.end(signal.SIGINT) == 130
        wait_until(demo.leaves_nothing_behind, "processes and files are gone")


def test_a_reader_that_goes_away_ends_it_quietly(tmp_path: Path) -> None:
    with Running(tmp_path, "demo", "--json") as demo:
        assert demo.line()
        demo.remember_children()
        assert demo.process.stdout is not None
        demo.process.stdout.close()
        demo.process.stdout = None
        assert demo.wait() == 0
        assert demo.stderr.count("\n") == 1, demo.stderr
        wait_until(demo.leaves_nothing_behind, "processes and files are gone")
