"""What `python -m tests.bench.pot` shows, in small: promised rates, recall, hard scores, cost; libspot beside it."""

from __future__ import annotations

import numpy as np
import pytest

from models.pot import Outcome, PotConfig, Spot
from tests.bench.pot import (
    BATTERY,
    CLEAN,
    INDEPENDENT,
    MOVING,
    PEER_BEGIN,
    Peers,
    Plain,
    contaminated,
    cost,
    libspot_of,
    our_rate,
    outcomes_of,
    peer_rate,
)


@pytest.mark.parametrize("name", CLEAN)
def test_the_alarm_rate_is_as_promised(name: str) -> None:
    rates = our_rate(CLEAN[name], 8000, 64, seed=0)
    highest = 2.0 if name in INDEPENDENT else 4.0  # alarms of autocorrelated scores come in clusters
    assert 0.4 < rates[1e-3] < highest, rates
    assert rates[1e-4] < 1.5 * highest, rates  # 51 alarms are promised: the estimate itself has an error


def test_the_published_spot_alarms_thrice_as_often() -> None:
    rates = [peer_rate(make, CLEAN["normal"], 8000, 4, 4, seed=1)[1e-3] for make in (Plain, libspot_of)]
    assert min(rates) > 2.0


def test_gross_anomalies_are_found() -> None:
    scores, gross = contaminated(np.random.default_rng(1), (3000, 64))
    outcome = outcomes_of(Spot(PotConfig(), 64), scores)
    assert (outcome[gross & (outcome > 0)] == Outcome.ANOMALY).mean() >= 0.99


@pytest.mark.parametrize("name", BATTERY)
def test_hard_scores_neither_flood_nor_put_the_threshold_to_sleep(name: str) -> None:
    scores = BATTERY[name](np.random.default_rng(0), (8000, 32))
    spot, rows = Spot(PotConfig(q=1e-3), 32), np.arange(32)
    alarm = outcomes_of(spot, scores) == Outcome.ANOMALY
    assert name in MOVING or alarm.mean() <= 3e-3
    assert alarm[-500:].mean() <= 5e-3
    Spot(spot.config, 32).unpack(rows, spot.pack(rows))
    spike = np.full(32, np.nanmax(scores) + max(3 * np.nanmax(np.abs(scores)), 1e-6))
    assert (spot.step(rows, spike, np.ones(32, np.bool_)).outcome == Outcome.ANOMALY).all()


@pytest.mark.parametrize("level", [0.0, 1e-9, 5.0, -3.0, 3e9])
def test_the_least_step_from_a_constant_alarms_and_is_learnt_if_it_stays(level: float) -> None:
    spot, row, may_start = Spot(PotConfig(), 1), np.zeros(1, np.int64), np.ones(1, np.bool_)
    constant = np.array([level])
    for _ in range(400):
        assert spot.step(row, constant, may_start).outcome[0] != Outcome.ANOMALY
    moved = np.array([level + max(abs(level) / 500, 1e-30)])
    alarms = [spot.step(row, moved, may_start).outcome[0] == Outcome.ANOMALY for _ in range(1500)]
    assert all(alarms[:1000])
    assert not any(alarms[1000:])


def test_libspot_raises_on_a_constant_and_floods_on_two_values() -> None:
    with pytest.raises(RuntimeError):
        libspot_of(1e-3, np.full(PEER_BEGIN, 5.0))
    scores = BATTERY["0/1"](np.random.default_rng(0), (3000, 1))
    assert Peers(libspot_of, 1e-3, scores).alarms(scores[PEER_BEGIN:]).mean() > 0.3


@pytest.mark.slow
def test_a_step_costs_about_what_libspots_does() -> None:
    """The bench holds it to twice as much: 1.3 on one machine, 2.0 on another, and more beside other tests."""
    assert cost(10_000, steps=40) <= 3.0
