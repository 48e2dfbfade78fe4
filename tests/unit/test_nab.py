"""NAB's score: its bounds, its parts, and the published results of a detector that anybody can write down."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from stream.csvfile import read_table
from stream.errors import InputError
from stream.evaluation import nab

WINDOWS = np.array([[200, 249], [400, 449]])
NOTHING = np.zeros(0, np.int64)


def rows(*at: int) -> NDArray[np.int64]:
    return np.array(at, np.int64)


def test_a_detector_that_says_nothing_gets_0_and_a_perfect_one_100() -> None:
    silent, perfect = (nab.score_file(found, 1000, WINDOWS) for found in (NOTHING, WINDOWS[:, 0]))
    assert nab.normalised([silent]) == 0
    assert nab.normalised([perfect]) == pytest.approx(100, abs=1e-9)
    assert (silent.caught, perfect.caught, perfect.false) == (0, 2, 0)


@pytest.mark.parametrize("profile", nab.PROFILES.values(), ids=nab.PROFILES)
def test_every_profile_has_the_same_ends(profile: nab.Profile) -> None:
    assert nab.normalised([nab.score_file(NOTHING, 1000, WINDOWS, profile)], profile) == 0
    assert nab.normalised([nab.score_file(WINDOWS[:, 0], 1000, WINDOWS, profile)], profile) == pytest.approx(100)


def test_of_a_window_only_the_earliest_detection_counts_and_it_is_worth_less_the_later_it_is() -> None:
    early, late = (nab.score_file(rows(at), 1000, WINDOWS[:1]).raw for at in (205, 245))
    assert 1 > early > late > 0
    assert nab.score_file(rows(205, 230, 245), 1000, WINDOWS[:1]).raw == pytest.approx(early)
    # 2 sigmoid(5 (50 - 5) / 50) - 1, as a share of what the first row is worth, 2 sigmoid(5) - 1
    worth = [2 / (1 + math.exp(-x)) - 1 for x in (5 * 45 / 50, 5)]
    assert early == pytest.approx(worth[0] / worth[1])


def test_a_false_detection_costs_less_just_behind_a_window() -> None:
    base = nab.score_file(rows(200), 1000, WINDOWS[:1]).raw
    before, near, far = (nab.score_file(rows(200, at), 1000, WINDOWS[:1]).raw - base for at in (160, 255, 900))
    assert before == pytest.approx(-0.11)
    assert far == pytest.approx(-0.11)
    assert -0.11 < near < 0


def test_nothing_counts_in_the_probationary_period() -> None:
    assert (nab.probation(1000), nab.probation(4999), nab.probation(22_000)) == (150, 749, 750)
    assert nab.score_file(rows(10, 149), 1000, WINDOWS).false == 0
    assert nab.score_file(rows(150), 1000, WINDOWS).false == 1
    assert nab.score_file(NOTHING, 1000, np.array([[20, 60]])).windows == 0
    assert math.isnan(nab.normalised([nab.score_file(NOTHING, 1000, np.zeros((0, 2), np.int64))]))


def test_labels_are_found_above_a_file(tmp_path: Path) -> None:
    file = tmp_path / "data" / "cat" / "a.csv"
    file.parent.mkdir(parents=True)
    file.write_text("timestamp,value\n" + "".join(f"2020-01-01 00:{m:02d}:00,{m}\n" for m in range(30)))
    assert nab.Labels.beside(file) is None
    (tmp_path / "labels").mkdir()
    windows = {"cat/a.csv": [["2020-01-01 00:10:00.000000", "2020-01-01 00:12:00.000000"]], "cat/b.csv": []}
    (tmp_path / "labels" / "combined_windows.json").write_text(json.dumps(windows))
    labels = nab.Labels.beside(file)
    assert labels is not None
    assert labels.name_of(file) == "cat/a.csv"
    assert labels.name_of(file.with_name("c.csv")) is None
    found = labels.rows("cat/a.csv", read_table(file).timestamp_ms)
    assert found.tolist() == [[10, 12]]
    assert nab.inside(30, found).nonzero()[0].tolist() == [10, 11, 12]
    with pytest.raises(InputError, match="no row"):
        labels.rows("cat/a.csv", read_table(file).timestamp_ms[:11])


@pytest.mark.parametrize("content", ["{", "[]", '{"a/b.csv": [["2020-01-01"]]}', '{"a/b.csv": 3}'])
def test_labels_that_are_none_are_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "combined_windows.json"
    path.write_text(content)
    with pytest.raises(InputError, match=r"combined_windows\.json: not the windows of NAB"):
        nab.Labels.read(path)


# Scores of NAB's windowed Gaussian in numenta/NAB, results/windowedGaussian/windowedGaussian_standard_scores.csv at
# 487c0f9: files on which its definition, 6,400 points that move on by 100 and a tail probability that rounds to 0,
# still gives the detections behind that table.
PUBLISHED = {
    "artificialNoAnomaly/art_daily_small_noise.csv": 0.0,
    "artificialWithAnomaly/art_daily_jumpsup.csv": -1.0,
    "realAWSCloudwatch/ec2_cpu_utilization_24ae8d.csv": -1.266678759349383,
    "realAWSCloudwatch/ec2_cpu_utilization_c6585a.csv": -1.32,
    "realAWSCloudwatch/ec2_network_in_257a54.csv": 0.8606718242697022,
    "realAWSCloudwatch/elb_request_count_8c0756.csv": -0.13844919792440225,
    "realAWSCloudwatch/rds_cpu_utilization_cc0c53.csv": -0.13844919792440225,
    "realAdExchange/exchange-4_cpc_results.csv": 0.2922884634276035,
    "realAdExchange/exchange-4_cpm_results.csv": 1.274710362684976,
    "realKnownCause/cpu_utilization_asg_misconfiguration.csv": -1.11,
    "realKnownCause/ec2_request_latency_system_failure.csv": -0.06591011872780705,
    "realKnownCause/nyc_taxi.csv": -5.0,
}


def windowed_gaussian(values: NDArray[np.float64]) -> NDArray[np.int64]:
    window, found = list[float](), list[int]()
    mean, deviation = 0.0, 1.0
    buffer = list[float]()
    for row, value in enumerate(values.tolist()):
        z = (value - mean) / deviation
        tail = 0.5 * math.erfc(z / math.sqrt(2)) if z >= 0 else 1 - 0.5 * math.erfc(-z / math.sqrt(2))
        if row and 1 - tail >= 1.0:
            found.append(row)
        if len(window) < 6400:
            window.append(value)
        elif len(buffer) < 99:
            buffer.append(value)
            continue
        else:
            window, buffer = [*window[100:], *buffer, value], []
        mean, deviation = float(np.mean(window)), float(np.std(window)) or 1e-6
    return np.array(found, np.int64)


@pytest.mark.data
def test_the_published_scores_of_the_windowed_gaussian_come_out(data_dir: Path) -> None:
    labels = nab.Labels.read(data_dir / "nab/labels/combined_windows.json")
    for name, published in PUBLISHED.items():
        content = read_table(data_dir / "nab/data" / f"{name}.gz")
        windows = labels.rows(name, content.timestamp_ms)
        found = nab.score_file(windowed_gaussian(content.value), len(content.value), windows)
        assert found.raw == pytest.approx(published, abs=1e-9), name


@pytest.mark.data
def test_the_36_files_have_61_windows(data_dir: Path) -> None:
    """With 61, the published raw scores of ARTime in these files, 32.917 in all, are its 77.0."""
    labels = nab.Labels.read(data_dir / "nab/labels/combined_windows.json")
    files = list((data_dir / "nab/data").rglob("*.csv.gz"))
    scored = 0
    for file in files:
        name = labels.name_of(file)
        assert name is not None
        time = read_table(file).timestamp_ms
        scored += nab.score_file(NOTHING, len(time), labels.rows(name, time)).windows
    assert (len(files), scored) == (36, 61)
    artime = nab.FileScore(32.917, scored, caught=0, false=0)
    assert nab.normalised([artime]) == pytest.approx(77.0, abs=0.05)
