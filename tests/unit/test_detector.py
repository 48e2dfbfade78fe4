"""What an operator is promised, one small story each; that batches change nothing is in tests/property."""

import itertools
import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from models.base import Context, Float64, Model
from models.deepant import DeepAnT, DeepAnTConfig, Network
from models.pot import PotConfig
from stream import events, snapshot
from stream.columns import Columns
from stream.detector import Detector
from stream.policy import Policy, Rule
from tests import helpers
from tests.helpers import MINUTE, MODEL, T0, Arrival, Persistence, Setup, columns, iso, run

W = Persistence().window
NAN = float("nan")
CALM = PotConfig(q=1e-4, level=0.9, min_scores=40, min_excess=20, max_excess=64)


def config(**changes: Any) -> Setup:
    """A policy under which none of these steady series alarms by itself."""
    return helpers.config(pot=CALM, **changes)


def detector(setup: Setup | None = None, model: Model | None = None, *, model_ref: str = MODEL) -> Detector:
    return helpers.detector(setup or config(), model, model_ref=model_ref)


def normal_points(n: int, *, name: str = "a", start: int = T0, interval: int = MINUTE, seed: int = 0) -> list[Arrival]:
    values = np.random.default_rng(seed).uniform(9, 11, n)
    return [(name, start + i * interval, float(v)) for i, v in enumerate(values)]


def with_values(points: list[Arrival], values: dict[int, float]) -> list[Arrival]:
    return [(name, time, values.get(i, value)) for i, (name, time, value) in enumerate(points)]


def window_of(live: Detector, name: str = "a") -> tuple[list[float], list[bool]]:
    """The window of a series as the model sees it, oldest cell first."""
    slot = np.array([live.index[name]], np.int32)
    values, learned = live.groups[0].windows.history(slot, live.groups[0].windows.newest[slot] + 1)
    return values[0, :, 0].tolist(), learned[0, :, 0].tolist()


def packed(live: Detector) -> dict[bytes, bytes]:
    return snapshot.pack(live, np.arange(len(live.index.names), dtype=np.int32))


def short(kinds: list[str], data: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    return [(kind, one["time"], one["data"].get("reason", "")) for kind, one in zip(kinds, data, strict=True)]


def at(i: int) -> str:
    return iso(T0 + i * MINUTE)


# -- a spike ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interval_ms", [0, MINUTE])
@pytest.mark.parametrize("recover_after", [1, 3])
def test_a_spike_is_one_incident_and_no_echo(interval_ms: int, recover_after: int) -> None:
    points = with_values(normal_points(200), {120: 500.0})
    out = run(detector(config(interval_ms=interval_ms, recover_after=recover_after)), points)
    assert short(out.kinds, out.data) == [
        ("opened", at(120), ""),
        ("resolved", at(120 + recover_after), "recovered"),
    ]
    assert [row for row, _ in out.events] == [120, 120 + recover_after]
    opened, resolved = (one["data"] for one in out.data)
    assert (opened["value"], opened["anomalies"], opened["severity"]) == (500.0, 1, "critical")
    assert opened["upper"] < 500
    assert resolved["peak"] == {"time": at(120), "value": 500.0, "ratio": opened["ratio"]}
    assert (resolved["opened"], resolved["last_anomaly"]) == (at(120), at(120))
    assert resolved["duration_s"] == 60.0 * recover_after
    assert out.counts.flagged == 1


def test_a_flagged_value_is_not_learned() -> None:
    points = with_values(normal_points(121), {120: 500.0})
    live = detector()
    run(live, points)
    values, learned = window_of(live)
    assert values == pytest.approx([value for _, _, value in points[120 - W + 1 : 120]] + [points[119][2]], abs=1e-5)
    assert learned == [True] * (W - 1) + [False]


@pytest.mark.parametrize("follow_ratio", [1.0, 3.0])
def test_a_flagged_value_near_its_threshold_enters_at_the_edge_of_the_band(follow_ratio: float) -> None:
    points = normal_points(120)
    live = detector(config(follow_ratio=follow_ratio))
    run(live, points)
    probe = detector(config(follow_ratio=follow_ratio))
    (first,) = run(probe, [*points, ("a", T0 + 120 * MINUTE, 500.0)]).data[-1:]
    edge = first["data"]["upper"]
    width = edge - first["data"]["expected"]
    (event,) = run(live, [("a", T0 + 120 * MINUTE, edge + width)]).data
    assert event["data"]["ratio"] == pytest.approx(2.0, abs=1e-3)
    entered = window_of(live)[0][-1]
    assert entered == pytest.approx(edge if follow_ratio == 3.0 else first["data"]["expected"], abs=1e-3)


def test_events_say_how_much_of_the_window_was_completed() -> None:
    points = with_values(normal_points(140), {111: 500.0, 114: NAN, 116: NAN, 120: -500.0})
    opened = [one for one in run(detector(config(recover_after=2)), points).data if one["type"].endswith("opened")]
    assert [one["time"] for one in opened] == [at(111), at(120)]
    assert opened[0]["data"]["window"] == {"cells": W, "completed": 0}
    assert opened[1]["data"]["window"] == {"cells": W, "completed": 3}  # one flagged, two missing


@pytest.mark.parametrize("level", [0.0, 5.0, -3e9, 1e-9])
def test_a_constant_series_alarms_on_a_spike(level: float) -> None:
    points = [("a", T0 + i * MINUTE, level) for i in range(120)]
    out = run(detector(), with_values(points, {100: level + 1.0}))
    assert short(out.kinds, out.data) == [("opened", at(100), ""), ("resolved", at(103), "recovered")]
    assert math.isfinite(out.data[0]["data"]["ratio"])


@pytest.mark.parametrize("sd", [1e6, 1e3, 1.0])
def test_large_values_with_small_changes_have_a_band(sd: float) -> None:
    points = [(name, time, 3e9 + sd * (value - 10)) for name, time, value in normal_points(200)]
    out = run(detector(), with_values(points, {150: 3e9 + 500 * sd}))
    assert short(out.kinds, out.data) == [("opened", at(150), ""), ("resolved", at(153), "recovered")]
    data = out.data[0]["data"]
    assert data["lower"] < data["expected"] < data["upper"] < data["value"]
    assert abs(data["expected"] - 3e9) < 10 * sd


def test_normal_points_open_nothing() -> None:
    points = [("a", T0 + i * MINUTE, 10 + math.sin(i / 20)) for i in range(2000)]
    assert run(detector(config(interval_ms=MINUTE)), points).events == []


# -- a lasting shift --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accept_after", [5, W, 4 * W, 20 * W])
def test_a_level_shift_is_accepted_after_its_time_and_then_quiet(accept_after: int) -> None:
    points = normal_points(120 + 25 * W)
    points = [(name, time, value + 500 * (i >= 120)) for i, (name, time, value) in enumerate(points)]
    out = run(detector(config(accept_after_ms=accept_after * MINUTE)), points)
    assert short(out.kinds, out.data) == [("opened", at(120), ""), ("resolved", at(120 + accept_after), "accepted")]
    data = out.data[1]["data"]
    assert data["anomalies"] == accept_after + 1
    assert data["duration_s"] == 60 * accept_after
    assert data["last_anomaly"] == at(120 + accept_after)
    assert out.counts.flagged == accept_after
    assert out.counts.scored == len(points) - W


def test_after_the_shift_the_old_level_is_the_anomaly() -> None:
    points = normal_points(300)
    points = [(name, time, value + 500 * (120 <= i < 240)) for i, (name, time, value) in enumerate(points)]
    out = run(detector(config(accept_after_ms=30 * MINUTE)), points)
    assert short(out.kinds, out.data) == [
        ("opened", at(120), ""),
        ("resolved", at(150), "accepted"),
        ("opened", at(240), ""),
        ("resolved", at(270), "accepted"),
    ]


def test_a_threshold_that_starts_anew_takes_the_shift_for_the_new_normal() -> None:
    # max_alarms points in a row and the threshold is reset: what alarms for so long is no anomaly any more.
    points = [(name, time, value + 500 * (i >= 120)) for i, (name, time, value) in enumerate(normal_points(220))]
    out = run(detector(config(max_alarms=10, accept_after_ms=10**9)), points)
    assert short(out.kinds, out.data) == [("opened", at(120), ""), ("resolved", at(129), "accepted")]
    assert "null" not in json.dumps(out.data)
    assert out.data[1]["data"]["last_anomaly"] == at(129)


# -- the beginning ----------------------------------------------------------------------------------------------------


def test_nothing_is_judged_before_there_is_a_threshold() -> None:
    points = with_values(normal_points(60), {W + 8: 500.0, W + 15: -500.0})
    out = run(detector(config(warmup_ms=10**9)), points)
    assert out.events == []
    assert out.counts.flagged == 0
    assert out.counts.scored == 60 - W


def test_the_warm_up_is_event_time() -> None:
    live = detector(config(warmup_ms=100 * MINUTE))
    result = live.accept(columns(live, normal_points(300)), want_scores=True)
    judged = [int(part.timestamp_ms[0]) for part in result.scores if not np.isnan(part.threshold[0])]
    assert judged[0] == T0 + (W + 101) * MINUTE  # the first score is of point W, 100 minutes later it may start


def test_the_grid_of_a_series_is_found_from_its_first_eight_points() -> None:
    live = detector()
    points = normal_points(12, interval=5 * MINUTE)
    for i, point in enumerate(points):
        live.accept(columns(live, [point]))
        assert live.groups[0].placing.interval_ms[0] == (0 if i < 7 else 5 * MINUTE)
        assert len(live.groups[0].placing.held) == (i + 1 if i < 7 else 0)
    assert live.groups[0].windows.filled[0] == W


def test_the_first_points_may_come_in_any_order() -> None:
    points = with_values(normal_points(150), {120: 500.0})
    shuffled = [*np.random.default_rng(0).permutation(8).tolist(), *range(8, 150)]
    assert [event for _, event in run(detector(), [points[i] for i in shuffled]).events] == [
        event for _, event in run(detector(), points).events
    ]


def test_a_repeated_first_point_is_the_later_one() -> None:
    live = detector()
    points = normal_points(8)
    run(live, [points[0], ("a", T0, 77.0), ("a", T0, 78.0), *points[1:]])
    assert live.counts.duplicates == 2
    windows = live.groups[0].windows
    assert np.nanmax(windows.actual(np.zeros(1, np.int32))) + windows.origin[0, 0] == pytest.approx(78.0)


@pytest.mark.parametrize("again", [0, 3, 7])
@pytest.mark.parametrize("between", [0, 1])
def test_a_first_point_that_comes_once_more_after_the_eighth_is_a_duplicate_in_any_batches(
    again: int, between: int
) -> None:
    points = normal_points(40)
    stream = [*points[: 8 + between], ("a", points[again][1], 77.0), *points[8 + between :]]
    whole, single = detector(), detector()
    expected = run(whole, stream)
    assert run(single, stream, cuts=range(1, len(stream))) == expected
    assert expected.counts.duplicates + expected.counts.late == 1
    assert packed(single) == packed(whole)


@pytest.mark.parametrize("cut", range(1, 8))
def test_what_the_first_points_cause_is_caused_by_the_one_that_completed_them(cut: int) -> None:
    # With a window shorter than the probe and a threshold from the start, a held point can be an anomaly.
    points = with_values(normal_points(8), {5: 500.0})
    live = helpers.detector(config(), Persistence(window=3), calibration=np.linspace(0, 2, 200))
    others = normal_points(100, name="b")
    out = run(live, [*others, *points[:cut], *points[cut:]], cuts=[100 + cut])
    caused = [row for (row, _), one in zip(out.events, out.data, strict=True) if one["subject"] == "a"]
    assert caused[:1] == [107]


def test_a_series_may_appear_in_the_middle_of_a_batch() -> None:
    a, b = with_values(normal_points(300), {250: 500.0}), with_values(normal_points(100, name="b"), {90: 500.0})
    out = run(detector(), [*a[:200], *itertools.chain(*zip(a[200:], b, strict=True))])
    assert [(one["subject"], kind) for one, kind in zip(out.data, out.kinds, strict=True)] == [
        ("a", "opened"),
        ("a", "resolved"),
        ("b", "opened"),
        ("b", "resolved"),
    ]


def test_more_series_than_there_was_room_for() -> None:
    names = [f"kpi{i}" for i in range(150)]
    live = detector(config(interval_ms=MINUTE))
    for i in range(40):
        known = names[: 5 + 4 * i]
        out = run(live, [(name, T0 + i * MINUTE, float(hash((name, i)) % 7)) for name in known])
        assert out.counts.too_late == 0
    assert len(live.index.names) == 150
    assert live.groups[0].windows.filled[:150].tolist() == [min(40 - max(0, -(-(k - 4) // 4)), W) for k in range(150)]


def test_a_kpi_passes_by_a_model_of_several_features() -> None:
    wide = helpers.config(pot=CALM, model=Persistence(features=2), model_ref="wide@3", metrics=("x", "y"))
    out = run(detector(wide, model_ref="wide@3"), normal_points(50))
    assert (out.counts.points, out.counts.unwatched, out.counts.scored) == (50, 50, 0)


def test_the_first_rule_that_matches_is_the_one() -> None:
    one, policy = config().served[0], Policy(warmup_ms=0, q=1e-4)
    rules = (
        Rule(("quiet.*",), watch=False),
        Rule(("web.*", "*.web"), name="web", policy=policy, labels={"team": "shop"}),
        Rule(("*.db",), name="db", policy=replace(policy, open_after=2)),
    )
    names = ("quiet.web", "a.web", "a.db", "a.other", "A.DB")
    points = [point for name in names for point in with_values(normal_points(200, name=name), {150: 500.0})]
    out = run(Setup(config().config, rules, (None, one, one)).detector(), points)
    told = [(one["subject"], kind, one["data"]["rule"]) for one, kind in zip(out.data, out.kinds, strict=True)]
    assert told == [("a.web", "opened", "web"), ("a.web", "resolved", "web")]
    assert [one["data"]["labels"] for one in out.data] == [{"team": "shop"}] * 2
    assert out.counts.unwatched == 3 * 200
    assert out.counts.flagged == 2  # one point is not yet an incident of a.db, and no normal point either


def test_no_points_give_nothing() -> None:
    live = detector()
    for _ in range(2):
        result = live.accept(Columns.empty(), want_scores=True)
        assert (result.events, result.event_rows, result.rejects, result.scores) == ([], [], [], [])
    assert run(detector(), [("a", T0, NAN)] * 3).counts.missing == 3


# -- gaps, late and repeated points -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("missing", "restarts"), [(W - 1, False), (W, False), (W + 1, True), (10**6, True)])
def test_a_gap_longer_than_the_window_begins_it_anew(missing: int, restarts: bool) -> None:
    live = detector()
    points = [
        (name, time + missing * MINUTE * (i >= 50), value) for i, (name, time, value) in enumerate(normal_points(51))
    ]
    out = run(live, points)
    assert out.counts.gaps == restarts
    assert live.groups[0].windows.filled[0] == (1 if restarts else W)
    assert out.counts.completed == (0 if restarts else missing)


def test_the_threshold_survives_a_restart_of_the_window() -> None:
    before, after = normal_points(100), normal_points(W + 1, start=T0 + 10_000 * MINUTE, seed=1)
    live = detector()
    run(live, before)
    result = live.accept(columns(live, after), want_scores=True)
    assert [np.isnan(part.threshold[0]) for part in result.scores] == [True] * W + [False]


@pytest.mark.parametrize("min_observed", [0.0, 0.2, 0.5])
def test_a_window_that_is_mostly_completed_is_not_scored(min_observed: float) -> None:
    live = detector(config(min_observed=min_observed))
    run(live, normal_points(60))
    after = normal_points(20, start=T0 + (60 + W) * MINUTE, seed=1)  # W cells are missing
    result = live.accept(columns(live, after), want_scores=True)
    scored = [not np.isnan(part.score[0]) for part in result.scores if not np.isnan(part.value[0])]
    assert scored.index(True) == math.ceil(min_observed * W)
    assert all(scored[scored.index(True) :])


def test_missing_cells_are_completed_by_the_forecast() -> None:
    live = detector()
    run(live, with_values(normal_points(60), {55: NAN, 56: NAN}))
    values, learned = window_of(live)
    assert values[4] == values[5] == pytest.approx(normal_points(60)[54][2], abs=1e-5)  # it expects the last value
    assert learned == [True] * 4 + [False] * 2 + [True] * 3
    assert live.counts.completed == 2


class Runaway(Persistence):
    """Expects the last step once more, and more of it."""

    def expected(self, context: Context) -> Float64:
        history = context.history
        last: Float64 = history[:, -1] + 2 * (history[:, -1] - history[:, -2])
        return last


def test_what_completes_a_gap_stays_within_the_window() -> None:
    live = detector(model=Runaway())
    points = normal_points(30)
    run(live, [*points[:20], points[20 + W]])
    values, learned = window_of(live)
    assert learned == [False] * (W - 1) + [True]
    assert min(value for _, _, value in points[:20]) <= min(values)
    assert max(values) <= max(value for _, _, value in points)


def test_a_late_point_fills_its_cell() -> None:
    live = detector()
    points = normal_points(60)
    out = run(live, [*points[:55], *points[56:], points[55]])
    assert (out.counts.late, out.counts.too_late, out.rejects) == (1, 0, [])
    values, learned = window_of(live)
    assert values == pytest.approx([value for _, _, value in points[-W:]], abs=1e-5)
    assert learned == [True] * W


def test_a_point_older_than_the_window_is_refused() -> None:
    points = normal_points(60)
    old = points[60 - W - 1]
    out = run(detector(), [*points, old, points[60 - W]], cuts=[30])
    detail = f"the point of 'a' at {at(60 - W - 1)} is older than the window, which begins at {at(60 - W)}"
    assert out.rejects == [(60, "too_late", detail)]
    assert (out.counts.too_late, out.counts.late) == (1, 1)


def test_a_point_older_than_the_first_is_refused_where_the_grid_is_set() -> None:
    points = normal_points(3)
    out = run(detector(config(interval_ms=MINUTE)), [points[1], points[0], points[2]])
    assert [(row, reason) for row, reason, _ in out.rejects] == [(1, "too_late")]


def test_of_points_in_one_cell_the_last_wins() -> None:
    live = detector(config(interval_ms=MINUTE))
    points = normal_points(30)
    out = run(live, [*points, ("a", points[-1][1] + 20_000, 11.0), ("a", points[-1][1] - 20_000, 12.0)])
    assert out.counts.duplicates == 2
    assert window_of(live)[0][-1] == pytest.approx(12.0, abs=1e-5)


def test_jitter_within_half_an_interval_changes_no_cell() -> None:
    jitter = np.random.default_rng(0).integers(-29_000, 29_000, 200)
    points = normal_points(200)
    live = detector(config(interval_ms=MINUTE))
    live.accept(columns(live, [points[0]]))
    out = run(live, [(name, time + int(jitter[i]), value) for i, (name, time, value) in enumerate(points)][1:])
    assert (out.counts.duplicates, out.counts.late, out.counts.completed) == (0, 0, 0)


# -- ids and order ----------------------------------------------------------------------------------------------------


def test_ids_are_the_same_in_every_run_and_different_in_every_incident() -> None:
    points = with_values(normal_points(400), {i: 500.0 for i in range(100, 400, 20)})
    first, second = run(detector(), points), run(detector(), points)
    assert first.events == second.events
    ids = [one["id"] for one in first.data]
    assert len(set(ids)) == len(ids) == 30
    other = run(detector(model_ref="persistence@2"), points)
    assert set(ids).isdisjoint(one["id"] for one in other.data)
    renamed = run(detector(), [("b", time, value) for _, time, value in points])
    assert set(ids).isdisjoint(one["id"] for one in renamed.data)


def test_an_incident_that_grows_graver_is_updated_once_a_severity() -> None:
    live = detector(config(follow_ratio=1.0))
    run(live, normal_points(120))
    edge = run(detector(config(follow_ratio=1.0)), [*normal_points(120), ("a", T0 + 120 * MINUTE, 500.0)]).data[-1][
        "data"
    ]
    width = edge["upper"] - edge["expected"]
    values = [edge["expected"] + width * ratio for ratio in (1.01, 1.02, 100.0, 100.0, 1.01)]
    out = run(live, [("a", T0 + (120 + i) * MINUTE, value) for i, value in enumerate(values)])
    severities = [one["data"]["severity"] for one in out.data]
    assert severities[0] == "warning"
    assert severities[-1] == "critical"
    assert severities == sorted(set(severities), key=("warning", "major", "critical").index), "each once, and rising"
    assert out.kinds == ["opened"] + ["updated"] * (len(severities) - 1)
    incident = out.data[0]["data"]["incident"]
    assert [one["id"] for one in out.data[1:]] == [f"{incident}-updated-{severity}" for severity in severities[1:]]
    assert out.counts.flagged == len(values)


def entity(i: int, values: dict[str, float]) -> list[Arrival]:
    return [(f"m.{metric}", T0 + i * MINUTE, value) for metric, value in values.items()]


def feed_records(records: list[list[Arrival]], cuts: set[int]) -> tuple[list[tuple[int, bytes]], list[Any]]:
    """Feed records of several points each, cut at records."""
    live, found, rejects = detector(config(recover_after=1, interval_ms=MINUTE)), [], []
    for begin, end in itertools.pairwise(sorted({0, len(records), *cuts})):
        flat = [point for record in records[begin:end] for point in record]
        rows = [row for row, record in enumerate(records[begin:end]) for _ in record]
        batch = columns(live, flat)
        result = live.accept(Columns.of(batch.slot, batch.timestamp_ms, batch.value, rows))
        found += [(begin + row, events.encode(e)) for row, e in zip(result.event_rows, result.events, strict=True)]
        rejects += [(begin + reject.row, reject.reason, reject.detail) for reject in result.rejects]
    return found, rejects


def test_the_metrics_of_one_record_have_one_order_in_any_batches() -> None:
    rng = np.random.default_rng(0)
    records = [entity(i, {m: float(v) for m, v in zip("zyx", rng.normal(10, 1, 3), strict=True)}) for i in range(150)]
    records[120] = entity(120, {"z": 500.0, "y": 500.0, "x": 500.0})
    records[118] = records[118][1:]  # z is missing there: its cells come one wave later than the others'
    records[130] = entity(100, {"z": 1.0, "y": 1.0, "x": 1.0})  # too late, all of them
    whole, whole_rejects = feed_records(records, set())
    assert [(row, json.loads(raw)["subject"]) for row, raw in whole if row == 120] == [
        (120, "m.x"),
        (120, "m.y"),
        (120, "m.z"),
    ]
    assert [(row, reason) for row, reason, _ in whole_rejects] == [(130, "too_late")], "one record, one reject"
    for cuts in ({119}, {120}, {120, 121}, set(range(150)), set(range(100, 140, 7))):
        assert feed_records(records, cuts) == (whole, whole_rejects)


def test_events_come_in_the_order_of_their_records() -> None:
    a, b = normal_points(150), normal_points(150, name="b", seed=1)
    points = [*with_values(b, {140: 500.0}), *with_values(a, {100: 500.0, 120: 500.0})]
    out = run(detector(), points)
    assert [row for row, _ in out.events] == sorted(row for row, _ in out.events)
    assert [one["subject"] for one in out.data] == ["b", "b", "a", "a", "a", "a"]


# -- with the real network --------------------------------------------------------------------------------------------


def test_the_real_network_tells_the_same_stories() -> None:
    import torch

    torch.manual_seed(0)
    shape = DeepAnTConfig(window=10, filters=4, hidden=8, scaling="window")
    model = DeepAnT(shape, Network(shape).state_dict())
    points = [
        ("a", T0 + i * MINUTE, 3e9 + 1e6 * (math.sin(i / 30) + v / 10))
        for i, (_, _, v) in enumerate(normal_points(900))
    ]
    points = with_values(points, {400: 3.2e9})
    points = [(name, time, value + 5e8 * (i >= 600)) for i, (name, time, value) in enumerate(points)]
    out = run(detector(config(accept_after_ms=100 * MINUTE), model, model_ref="deepant@0"), points)
    told = short(out.kinds, out.data)
    assert ("opened", at(400), "") in told
    assert ("opened", at(600), "") in told
    assert ("resolved", at(700), "accepted") in told
    assert out.data[-1]["time"] <= at(760), "it comes to rest on the new level"
    opened = next(one["data"] for one in out.data if one["time"] == at(400))
    assert opened["lower"] < opened["expected"] < opened["upper"] < opened["value"] == 3.2e9
