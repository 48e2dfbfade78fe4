"""The promise that everything else rests on: the same points give the same events, however they come in."""

import dataclasses
import math
from collections import Counter
from itertools import pairwise

import numpy as np
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from models.base import Model
from models.deepant import DeepAnT, DeepAnTConfig, Network
from stream.detector import Counts, Served
from stream.policy import Policy
from tests.helpers import (
    MINUTE,
    SMALL_POT,
    T0,
    Arrival,
    Halfway,
    Persistence,
    Setup,
    columns,
    config,
    detector,
    policies,
    run,
    series,
    setups,
    streams,
    until_reached,
)
from tests.reference import Reference

places = st.sets(st.integers(1, 400), max_size=12)
deaths = st.sets(st.integers(1, 400), max_size=6)
quick = settings(max_examples=25, deadline=None, derandomize=True)


def tiny_network() -> DeepAnT:
    torch.manual_seed(1)
    shape = DeepAnTConfig(window=10, filters=4, hidden=8, scaling="window")
    return DeepAnT(shape, Network(shape).state_dict())


PERSISTENCE, HALFWAY, DEEPANT = Persistence(), Halfway(), tiny_network()
SERVED = (
    Served("persistence@1", PERSISTENCE),
    Served("persistence@2", Persistence(window=14)),
    Served("halfway@1", HALFWAY),
    Served("calibrated@1", PERSISTENCE, calibrations=(np.random.default_rng(0).exponential(0.3, 300),)),
)
cheap = setups(st.sampled_from(SERVED))
any_setup = setups(st.sampled_from([*SERVED, Served("deepant@1", DEEPANT)]))
models = st.sampled_from([PERSISTENCE, HALFWAY, DEEPANT])


def changed(setup: Setup, **policy: object) -> Setup:
    """The same with some fields of every policy changed."""
    rules = tuple(
        dataclasses.replace(rule, policy=dataclasses.replace(rule.policy, **policy))  # type: ignore[arg-type]
        for rule in setup.rules
    )
    return dataclasses.replace(setup, rules=rules)


WANTED = {"opened", "updated", "resolvedrecovered", "resolvedaccepted", "late opening"}
WANTED |= {"kpi.silent", "kpi.resumed", "rule", "labels", "health"}


def test_one_batch_equals_the_point_by_point_reference() -> None:
    told: Counter[str] = Counter()
    total = Counts()

    @settings(max_examples=120, deadline=None, database=None)
    @given(setup=cheap, stream=streams())
    def compare(setup: Setup, stream: list[Arrival]) -> None:
        out = run(setup.detector(), stream)
        reference = Reference(setup.config, setup.rules, setup.served)
        reference.take(stream)
        assert out.events == reference.events
        assert [(row, reason) for row, reason, _ in out.rejects] == [(row, "too_late") for row in reference.too_late]
        assert out.counts == reference.counts
        total.add(out.counts)
        for event, kind in zip(out.data, out.kinds, strict=True):
            data = event["data"]
            told.update([kind + data.get("reason", ""), *data])
            told.update(["late opening"] * (kind == "opened" and event["time"] > data["opened"]))

    def unreached() -> set[str]:
        """What no stream has reached yet; no rule here has a shadow or a bound."""
        counted = {name for name, count in total.as_dict().items() if not count} - {
            "shadow_events",
            "refused",
            "evicted",
        }
        return counted | (WANTED - set(told))

    until_reached(compare, unreached)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(setup=any_setup, stream=streams(), cuts=places, deaths=deaths)
def test_cuts_and_restarts_change_no_byte(
    setup: Setup, stream: list[Arrival], cuts: set[int], deaths: set[int]
) -> None:
    whole = run(setup.detector(), stream)
    within = range(1, len(stream))
    cut = run(setup.detector(), stream, cuts.intersection(within), deaths.intersection(within))
    assert cut == whole  # events with their rows, rejects with their reasons, counts


@settings(max_examples=12, deadline=None, derandomize=True)
@given(setup=any_setup, stream=streams(most=60), restart=st.booleans())
def test_one_point_at_a_time_changes_no_byte(setup: Setup, stream: list[Arrival], restart: bool) -> None:
    every = range(1, len(stream))
    assert run(setup.detector(), stream, every, every if restart else ()) == run(setup.detector(), stream)


@quick
@given(setup=any_setup, stream=streams())
def test_other_series_change_nothing_but_silence(setup: Setup, stream: list[Arrival]) -> None:
    setup = changed(setup, silent_after=0)
    together = run(setup.detector(), stream)
    for name in sorted({name for name, _, _ in stream}):
        rows = [row for row, arrival in enumerate(stream) if arrival[0] == name]
        alone = run(setup.detector(), [stream[row] for row in rows])
        assert [(rows[row], event) for row, event in alone.events] == [
            (row, event) for row, event in together.events if stream[row][0] == name
        ]
        assert [(rows[row], *why) for row, *why in alone.rejects] == [
            tuple(reject) for reject in together.rejects if stream[reject[0]][0] == name
        ]


@quick
@given(setup=any_setup, stream=streams(), absent=places)
def test_a_null_says_no_more_than_its_absence(setup: Setup, stream: list[Arrival], absent: set[int]) -> None:
    nulls = [(name, time, math.nan if i in absent else value) for i, (name, time, value) in enumerate(stream)]
    present = [arrival for arrival in nulls if not math.isnan(arrival[2])]
    with_nulls, without = run(setup.detector(), nulls), run(setup.detector(), present)
    assert [event for _, event in with_nulls.events] == [event for _, event in without.events]
    assert [why for _, *why in with_nulls.rejects] == [why for _, *why in without.rejects]
    assert with_nulls.counts.missing == len(nulls) - len(present)


UNITLESS = ("incident", "severity", "anomalies", "score", "threshold", "ratio", "probability", "window", "supersedes")


@quick
@given(setup=any_setup, stream=streams(), factor=st.sampled_from([2.0**-20, 0.5, 1024.0]))
def test_the_unit_changes_no_decision(setup: Setup, stream: list[Arrival], factor: float) -> None:
    # A power of two changes no digit of any value, so that even the scores have to be the same.
    other = dataclasses.replace(
        setup,
        rules=tuple(
            dataclasses.replace(
                rule,
                policy=dataclasses.replace(rule.policy, least_deviation=rule.policy.least_deviation * factor),
            )
            for rule in setup.rules
        ),
    )
    as_is = run(setup.detector(), stream)
    scaled = run(other.detector(), [(name, time, value * factor) for name, time, value in stream])
    assert [(e["id"], e["time"], *(e["data"].get(k) for k in UNITLESS)) for e in scaled.data] == [
        (e["id"], e["time"], *(e["data"].get(k) for k in UNITLESS)) for e in as_is.data
    ]


@quick
@given(policy=policies, model=models, stream=streams(), cuts=places)
def test_every_point_is_counted_once(policy: Policy, model: Model, stream: list[Arrival], cuts: set[int]) -> None:
    # A correction goes through cells once more, and what waits is nowhere yet: without either all adds up.
    asked = dataclasses.asdict(dataclasses.replace(policy, lateness_ms=0, wait=False))
    live, rows, placed = config(model=model, **asked).detector(), 0, 0
    bounds = [0, *sorted(cuts.intersection(range(1, len(stream)))), len(stream)]
    for begin, end in pairwise(bounds):
        result = live.accept(columns(live, stream[begin:end]), want_scores=True)
        rows += sum(len(part.slot) for part in result.scores)
        placed += sum(int((~np.isnan(part.value)).sum()) for part in result.scores)
    counts = live.counts
    held = sum(len(group.placing.held) for group in live.groups)
    assert counts.points == len(stream)
    assert counts.points == counts.missing + counts.duplicates + counts.late + counts.too_late + held + placed
    assert counts.flagged <= counts.scored <= placed
    assert counts.completed <= rows - placed  # cells without a value; before the first full window none is completed


@quick
@given(setup=cheap, stream=streams())
def test_the_life_of_every_incident_is_whole(setup: Setup, stream: list[Arrival]) -> None:
    out = run(changed(setup, lateness_ms=0, silent_after=0).detector(), stream)
    ids = [event["id"] for event in out.data]
    assert len(set(ids)) == len(ids)
    latest: dict[str, dict[str, object]] = {}  # by series: the data of its newest event
    for event, kind in zip(out.data, out.kinds, strict=True):
        data = event["data"]
        before = latest.get(data["kpi"])
        if kind == "opened":
            assert before is None or "reason" in before
            assert event["time"] >= data["opened"]
        else:
            assert before is not None
            assert "reason" not in before
            assert before["incident"] == data["incident"]
            assert before["opened"] == data["opened"] < event["time"]
        if kind != "resolved" or data["reason"] == "accepted":
            assert data["ratio"] >= 1
            assert data["probability"] <= SMALL_POT.q_max
            assert data["score"] >= data["threshold"]
        latest[data["kpi"]] = data


@quick
@given(setup=cheap, stream=streams())
def test_a_series_falls_silent_and_resumes_in_turn(setup: Setup, stream: list[Arrival]) -> None:
    out = run(changed(setup, silent_after=2).detector(), stream)
    state: Counter[str] = Counter()
    for event, kind in zip(out.data, out.kinds, strict=True):
        if kind.startswith("kpi."):
            series_ = event["subject"]
            assert state[series_] == (kind == "kpi.resumed")
            state[series_] = kind == "kpi.silent"
            assert event["data"]["last_seen"] < event["time"]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(one=series(), calibrated=st.integers(20, 400))
def test_a_calibrated_series_has_a_threshold_from_its_first_full_window(one: list[Arrival], calibrated: int) -> None:
    calibration = np.random.default_rng(calibrated).exponential(size=calibrated)
    live = detector(config(warmup_ms=10**12, max_alarms=0), calibration=calibration)
    result = live.accept(columns(live, one), want_scores=True)
    for part in result.scores:
        assert (np.isnan(part.score) == np.isnan(part.threshold)).all()
        assert (np.isnan(part.score) == np.isnan(part.probability)).all()


def trained(factor: float, shift: float) -> DeepAnT:
    """A model for one KPI, as training on its values times a factor plus a shift makes it: only its constants move."""
    torch.manual_seed(2)
    shape = DeepAnTConfig(window=10, filters=4, hidden=8, scaling="train")
    constants = (np.array([10.0 * factor + shift]), np.array([factor]), np.array([factor]))
    return DeepAnT(
        shape, Network(shape).state_dict(), dict(zip(("center", "scale", "usual_step"), constants, strict=True))
    )


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    factor=st.floats(1e-6, 1e6),
    shift=st.floats(-1e3, 1e3),
    family=st.sampled_from(["persistence", "window", "train"]),
)
def test_another_unit_and_zero_change_no_decision(seed: int, factor: float, shift: float, family: str) -> None:
    rng = np.random.default_rng(seed)
    values = rng.normal(10.0, 1.0, 200)
    values[rng.integers(60, 200, 5)] += 40
    values[150:170] -= 80
    shift *= factor  # what is shifted further than its digits reach is another series
    pairs: dict[str, tuple[Model, Model]] = {
        "persistence": (PERSISTENCE, PERSISTENCE),
        "window": (DEEPANT, DEEPANT),
        "train": (trained(1.0, 0.0), trained(factor, shift)),
    }
    as_is, other = pairs[family]
    told, edges = [], []
    for model, series_ in ((as_is, values), (other, values * factor + shift)):
        live = config(model=model, interval_ms=MINUTE).detector()
        stream = [("a", T0 + i * MINUTE, float(value)) for i, value in enumerate(series_)]
        result = live.accept(columns(live, stream), want_scores=True)
        edges += [float(np.nanmin(np.abs(p.score / p.threshold - 1), initial=1.0)) for p in result.scores]
        told.append([(e.id, e.type, e.time, getattr(e.data, "severity", "")) for e in result.events])
    assume(min(edges) > 1e-3)  # a score at the edge may fall on either side of it
    assert told[0] == told[1]
    assert told[0]
