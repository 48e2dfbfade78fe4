"""The promise that everything else rests on: the same points give the same events, however they come in."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.base import Forecaster
from models.deepant import DeepAnT, DeepAnTConfig, Network
from stream.detector import DetectorConfig
from tests.helpers import (
    MINUTE,
    SMALL_POT,
    Arrival,
    Persistence,
    Reference,
    columns,
    config,
    detector,
    run,
    series,
    streams,
)

policies = st.builds(
    config,
    interval_ms=st.sampled_from([0, 0, 0, MINUTE, 1000]),
    recover_after=st.integers(1, 4),
    accept_after_ms=st.sampled_from([10_000, 5 * MINUTE, 40 * MINUTE]),
    warmup_ms=st.sampled_from([0, 0, 40_000]),
    min_observed=st.sampled_from([0.0, 0.2, 0.5]),
    max_alarms=st.sampled_from([0, 5, 1000]),
    follow_ratio=st.sampled_from([1.0, 3.0]),
)
places = st.sets(st.integers(1, 400), max_size=12)


def tiny_network() -> DeepAnT:
    torch.manual_seed(1)
    shape = DeepAnTConfig(window=10, filters=4, hidden=8, scaling="window")
    return DeepAnT(shape, Network(shape))


PERSISTENCE, DEEPANT = Persistence(), tiny_network()
models = st.sampled_from([PERSISTENCE, PERSISTENCE, DEEPANT])
quick = settings(max_examples=60, deadline=None)


@settings(max_examples=150, deadline=None)
@given(policy=policies, stream=streams())
def test_one_batch_equals_the_point_by_point_reference(policy: DetectorConfig, stream: list[Arrival]) -> None:
    out = run(detector(policy), stream)
    reference = Reference(policy, PERSISTENCE)
    reference.take(stream)
    assert list(zip([row for row, _ in out.events], out.data, strict=True)) == reference.events
    assert [(row, reason) for row, reason, _ in out.rejects] == [(row, "too_late") for row in reference.too_late]
    assert out.counts == reference.counts


@quick
@given(policy=policies, model=models, stream=streams(), cuts=places, deaths=places)
def test_cuts_and_restarts_change_no_byte(
    policy: DetectorConfig, model: Forecaster, stream: list[Arrival], cuts: set[int], deaths: set[int]
) -> None:
    whole = run(detector(policy, model), stream)
    within = range(1, len(stream))
    cut = run(detector(policy, model), stream, cuts.intersection(within), deaths.intersection(within))
    assert cut == whole  # events with their rows, rejects with their reasons, counts


@settings(max_examples=30, deadline=None)
@given(policy=policies, model=models, stream=streams(most=60), restart=st.booleans())
def test_one_point_at_a_time_changes_no_byte(
    policy: DetectorConfig, model: Forecaster, stream: list[Arrival], restart: bool
) -> None:
    every = range(1, len(stream))
    assert run(detector(policy, model), stream, every, every if restart else ()) == run(detector(policy, model), stream)


@quick
@given(policy=policies, model=models, stream=streams())
def test_other_series_change_nothing(policy: DetectorConfig, model: Forecaster, stream: list[Arrival]) -> None:
    together = run(detector(policy, model), stream)
    for name in sorted({name for name, _, _ in stream}):
        rows = [row for row, arrival in enumerate(stream) if arrival[0] == name]
        alone = run(detector(policy, model), [stream[row] for row in rows])
        assert [(rows[row], event) for row, event in alone.events] == [
            (row, event) for row, event in together.events if stream[row][0] == name
        ]
        assert [(rows[row], *why) for row, *why in alone.rejects] == [
            tuple(reject) for reject in together.rejects if stream[reject[0]][0] == name
        ]


@quick
@given(policy=policies, model=models, stream=streams(), absent=places)
def test_a_null_says_no_more_than_its_absence(
    policy: DetectorConfig, model: Forecaster, stream: list[Arrival], absent: set[int]
) -> None:
    nulls = [(name, time, math.nan if i in absent else value) for i, (name, time, value) in enumerate(stream)]
    present = [arrival for arrival in nulls if not math.isnan(arrival[2])]
    with_nulls, without = run(detector(policy, model), nulls), run(detector(policy, model), present)
    assert [event for _, event in with_nulls.events] == [event for _, event in without.events]
    assert [why for _, *why in with_nulls.rejects] == [why for _, *why in without.rejects]
    assert with_nulls.counts.missing == len(nulls) - len(present)


@quick
@given(policy=policies, model=models, stream=streams(), factor=st.sampled_from([2.0**-20, 0.5, 1024.0]))
def test_the_unit_changes_no_decision(
    policy: DetectorConfig, model: Forecaster, stream: list[Arrival], factor: float
) -> None:
    # A power of two changes no digit of any value, so that even the scores have to be the same.
    as_is = run(detector(policy, model), stream)
    scaled = run(detector(policy, model), [(name, time, value * factor) for name, time, value in stream])
    unitless = ("incident", "severity", "anomalies", "score", "threshold", "ratio", "probability", "window")
    assert [(e["id"], e["time"], *(e["data"][k] for k in unitless)) for e in scaled.data] == [
        (e["id"], e["time"], *(e["data"][k] for k in unitless)) for e in as_is.data
    ]


@quick
@given(policy=policies, stream=streams(), cuts=places)
def test_every_point_is_counted_once(policy: DetectorConfig, stream: list[Arrival], cuts: set[int]) -> None:
    live, rows, placed = detector(policy), 0, 0
    bounds = [0, *sorted(cuts.intersection(range(1, len(stream)))), len(stream)]
    for begin, end in pairwise(bounds):
        result = live.accept(columns(live, stream[begin:end]), want_scores=True)
        rows += sum(len(part.slot) for part in result.scores)
        placed += sum(int((~np.isnan(part.value)).sum()) for part in result.scores)
    counts = live.counts
    assert counts.points == len(stream)
    assert counts.points == (
        counts.missing + counts.duplicates + counts.late + counts.too_late + len(live.held) + placed
    )
    assert counts.flagged <= counts.scored <= placed
    assert counts.completed <= rows - placed  # cells without a value; before the first full window none is completed


@quick
@given(policy=policies, stream=streams())
def test_the_life_of_every_incident_is_whole(policy: DetectorConfig, stream: list[Arrival]) -> None:
    out = run(detector(policy), stream)
    ids = [event["id"] for event in out.data]
    assert len(set(ids)) == len(ids)
    latest: dict[str, dict[str, object]] = {}  # by series: the data of its newest event
    for event, kind in zip(out.data, out.kinds, strict=True):
        data = event["data"]
        before = latest.get(data["kpi"])
        if kind == "opened":
            assert before is None or "reason" in before
            assert event["time"] == data["opened"]
        else:
            assert before is not None
            assert "reason" not in before
            assert before["incident"] == data["incident"]
            assert before["opened"] == data["opened"] < event["time"]
        if kind != "resolved" or data["reason"] == "accepted":
            assert data["ratio"] >= 1
            assert data["probability"] <= SMALL_POT.q
            assert data["score"] >= data["threshold"]
        latest[data["kpi"]] = data


@settings(max_examples=40, deadline=None)
@given(one=series(), calibrated=st.integers(20, 400))
def test_a_calibrated_series_has_a_threshold_from_its_first_full_window(one: list[Arrival], calibrated: int) -> None:
    calibration = np.random.default_rng(calibrated).exponential(size=calibrated)
    live = detector(config(warmup_ms=10**12, max_alarms=0), calibration=calibration)
    result = live.accept(columns(live, one), want_scores=True)
    for part in result.scores:
        assert (np.isnan(part.score) == np.isnan(part.threshold)).all()
        assert (np.isnan(part.score) == np.isnan(part.probability)).all()


@pytest.mark.parametrize("model", [PERSISTENCE, DEEPANT], ids=["persistence", "deepant"])
def test_the_streams_of_these_tests_do_alarm(model: Forecaster) -> None:
    kinds: set[str] = set()
    hit: dict[str, int] = {"missing": 0, "duplicates": 0, "late": 0, "too_late": 0, "gaps": 0, "completed": 0}

    @settings(max_examples=100, deadline=None, derandomize=True, database=None)
    @given(policy=policies, stream=streams())
    def collect(policy: DetectorConfig, stream: list[Arrival]) -> None:
        out = run(detector(policy, model), stream)
        kinds.update(kind + event["data"].get("reason", "") for kind, event in zip(out.kinds, out.data, strict=True))
        for name in hit:
            hit[name] += getattr(out.counts, name)

    collect()
    assert kinds == {"opened", "updated", "resolvedrecovered", "resolvedaccepted"}
    assert min(hit.values()) > 20, hit
