"""Features of an entity that come late in its life, go, come back, or never move."""

import math
from typing import Any

import numpy as np
import pytest

from tests.helpers import MINUTE, T0, Outputs, Persistence, Record, config, detector, run

METRICS = ("cpu", "load", "disk")
ENTITY = config(model=Persistence(features=3), model_ref="three@1", metrics=METRICS, interval_ms=MINUTE, q=0.01)


def values(n: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.float64]]:
    rng = np.random.default_rng(seed)
    return rng.normal([10.0, 500.0, 0.3], [1.0, 20.0, 0.01], (n, 3))


def records(x: np.ndarray[Any, np.dtype[np.float64]]) -> list[Record]:
    """One record a minute; NaN where a feature does not come."""
    return [
        ("m", T0 + i * MINUTE, {f: float(v) for f, v in enumerate(row) if not math.isnan(v)})
        for i, row in enumerate(x)
        if not np.isnan(row).all()
    ]


def opened(out: Outputs) -> list[dict[str, Any]]:
    return [event for event in out.data if event["type"] == "tocsin.anomaly.opened"]


def minutes(out: Outputs) -> list[int]:
    times = [np.datetime64(event["time"].removesuffix("Z"), "ms").astype(np.int64) for event in opened(out)]
    return [int((time - T0) // MINUTE) for time in times]


def test_the_feature_that_leaves_its_normal_behaviour_is_named_with_its_share() -> None:
    x = values(300)
    x[250, 1] = 2_000.0
    (event,) = (event for event in opened(run(detector(ENTITY), records(x))) if "T20:10:00Z" in event["time"])
    data = event["data"]
    assert data["kpi"] == "m"
    assert data["features"][0]["metric"] == "load"
    assert data["features"][0]["share"] > 0.95
    assert data["features"][0]["value"] == 2_000.0
    assert data["features"][0]["upper"] < 2_000.0
    assert sum(feature["share"] for feature in data["features"]) <= 1.0 + 1e-5
    assert "value" not in data
    assert "expected" not in data


def test_shares_of_several_features_fall_and_sum_to_one() -> None:
    x = values(300)
    x[250] = [40.0, 900.0, 0.9]
    (event,) = (event for event in opened(run(detector(ENTITY), records(x))) if "T20:10:00Z" in event["time"])
    shares = [feature["share"] for feature in event["data"]["features"]]
    assert len(shares) == 3
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(1.0, abs=1e-4)


def test_a_feature_that_appears_is_no_anomaly_and_is_watched_once_it_is_known() -> None:
    x = values(400)
    x[:200, 2] = np.nan  # the model takes 2.0 for its middle, and 0.3 will come
    out = run(detector(ENTITY), records(x))
    plain = run(detector(ENTITY), records(values(400)))
    assert not {minute for minute in minutes(out) if 195 <= minute < 215} - set(minutes(plain))
    x[300, 2] = 5.0
    assert 300 in minutes(run(detector(ENTITY), records(x)))


def test_a_feature_that_goes_leaves_the_others_watched() -> None:
    x = values(400)
    x[200:, 2] = np.nan
    x[300, 0] = 40.0
    out = run(detector(ENTITY), records(x))
    (event,) = (event for event in opened(out) if "T21:00:00Z" in event["time"])
    assert event["data"]["features"][0]["metric"] == "cpu"
    assert {feature["metric"] for feature in event["data"]["features"]} <= {"cpu", "load"}
    assert event["data"]["window"]["completed"] >= 3, "a third of the window is the feature that is gone"


def test_a_feature_that_comes_back_changed_is_not_judged_before_it_is_known_again() -> None:
    x = values(400)
    x[200:300, 2] = np.nan
    x[300:, 2] += 50.0  # after a hundred minutes nobody knows what is normal for it
    minutes_of_return = [minute for minute in minutes(run(detector(ENTITY), records(x))) if minute in (300, 301)]
    assert minutes_of_return == []


def test_a_constant_feature_is_harmless_and_its_first_change_is_found() -> None:
    x = values(300)
    x[:, 2] = 7.0
    calm = run(detector(ENTITY), records(x))
    assert len(opened(calm)) <= 6
    x[250, 2] = 8.0
    (event,) = (event for event in opened(run(detector(ENTITY), records(x))) if "T20:10:00Z" in event["time"])
    assert event["data"]["features"] == [event["data"]["features"][0]]
    assert event["data"]["features"][0]["metric"] == "disk"


def test_a_feature_that_never_comes_changes_nothing_for_the_others() -> None:
    x = values(300)
    x[:, 1] = np.nan
    x[250, 0] = 60.0
    out = run(detector(ENTITY), records(x))
    assert 250 in minutes(out)
    assert all(feature["metric"] != "load" for event in opened(out) for feature in event["data"]["features"])


def test_only_the_deviating_features_of_a_flagged_cell_are_kept_from_being_learned() -> None:
    x = values(300)
    x[250, 1] = 2_000.0
    live = detector(ENTITY)
    run(live, records(x[:252]))
    windows = live.groups[0].windows
    at, position = np.zeros(1, np.int32), (windows.newest[0] - 1) % windows.window
    assert windows.learned(at)[0, position].tolist() in (
        [True, False, True],
        [False, False, True],
        [True, False, False],
    )
    assert windows.actual(at)[0, position, 1] + windows.origin[0, 1] == pytest.approx(2_000.0, rel=1e-6)
    assert abs(windows.seen[0, position, 1] + windows.origin[0, 1] - 500.0) < 100.0
