"""Training series, and which windows of them a model is trained on."""

import math

import numpy as np
import pytest

from models.base import Bool
from models.corpus import Layout, gather, tamed
from models.scaling import INPUT_LIMIT, clock
from models.windows import TrainSeries, complete, usable_targets, usual_step

NAN = math.nan
DAY_MS = 86_400_000


def layout(**settings: object) -> Layout:
    plain = {"history": 10, "features": 1, "scaling": "train", "reads_point": False, "gap": 10, "held_out": 0.2}
    return Layout(**{**plain, **settings})  # type: ignore[arg-type]


def test_a_gap_repeats_the_last_value_for_a_while() -> None:
    values = np.array([[NAN, 1, NAN, NAN, 4, NAN, NAN, NAN, 8, NAN], [0, NAN, 2, 3, 4, 5, 6, 7, 8, 9]]).T
    filled = complete(values, 2)
    np.testing.assert_array_equal(filled[:, 0], [NAN, 1, 1, 1, 4, 4, 4, NAN, 8, 8])
    np.testing.assert_array_equal(filled[:, 1], [0, 0, 2, 3, 4, 5, 6, 7, 8, 9])
    assert np.isnan(values[2, 0])  # the caller's array is his own
    assert np.isnan(complete(np.full((4, 1), NAN), 9)).all()


def test_usual_step_skips_what_is_missing() -> None:
    values = np.array([[0.0, NAN], [1.0, 5.0], [NAN, NAN], [7.0, 1.0], [4.0, NAN]])
    np.testing.assert_array_equal(usual_step(values), [2.0, NAN])
    assert np.isnan(usual_step(values[:1])).all()


def test_usable_targets_against_a_plain_loop() -> None:
    random = np.random.default_rng(4)
    values = random.normal(size=(400, 2))
    values[random.random((400, 2)) < 0.05] = NAN
    one = TrainSeries("a", values, random.random(400) < 0.02, 60_000)
    filled = complete(one.normal, 1)
    window = 10
    expected = [
        t
        for t in range(window, 400)
        if not np.isnan(filled[t - window : t]).any()
        and (~np.isnan(one.normal[t - window : t])).mean() >= 0.2
        and not one.anomalous[t - window : t + 1].any()
        and not np.isnan(values[t]).all()
    ]
    assert 20 < len(expected) < 380
    assert usable_targets(one, filled, window).tolist() == expected
    short = TrainSeries("a", values[:10], one.anomalous[:10], 60_000)
    assert usable_targets(short, filled[:10], window).tolist() == []


def one_with_holes(anomalous: Bool, wanted: Bool | None = None) -> TrainSeries:
    values = np.random.default_rng(1).normal(size=(400, 1))
    values[100:115] = NAN
    return TrainSeries("a", values, anomalous, 60_000, start_ms=DAY_MS, wanted=wanted)


def test_a_network_that_reads_the_point_learns_from_windows_with_holes() -> None:
    anomalous = np.zeros(400, np.bool_)
    anomalous[50:53] = True
    one = one_with_holes(anomalous)
    forecaster = gather([[one]], layout(gap=10))
    other = gather([[one]], layout(reads_point=True, gap=None))
    targets = np.concatenate([*forecaster.train, *forecaster.held_out])
    assert not set(range(50, 63)) & set(targets.tolist()), "labelled, and those that would go on from it"
    assert not set(range(110, 116)) & set(targets.tolist()), "too little is known before them"
    more = np.concatenate([*other.train, *other.held_out])
    assert set(range(53, 63)) < set(more.tolist()) and not {50, 51, 52, 110} & set(more.tolist())
    batch = other.batch(np.array([55]))
    assert batch.counts[0, :, 0].tolist() == [True] * 5 + [False] * 3 + [True] * 3
    assert (batch.x[0, 5:8] == batch.x[0, 4]).all(), "what is labelled is completed, as in a live window"


def test_only_wanted_points_are_targets() -> None:
    wanted = np.zeros(400, np.bool_)
    wanted[20:380] = True
    corpus = gather([[one_with_holes(np.zeros(400, np.bool_), wanted)]], layout(history=5))
    targets = np.concatenate([*corpus.train, *corpus.held_out])
    assert targets.min() == 20 and targets.max() == 379
    assert len(corpus.held_out[0]) == 72, "a fifth of the 360"


@pytest.mark.parametrize("scaling", ["train", "window"])
def test_a_batch_is_what_a_live_window_would_be(scaling: str) -> None:
    values = 50 + np.random.default_rng(1).normal(size=(400, 2)).cumsum(axis=0)
    values[:, 1] = 7.0
    values[350, 0] = 1e9  # held out
    one = TrainSeries("a", values, np.zeros(400, np.bool_), 60_000, start_ms=DAY_MS, metrics=("a", "b"))
    corpus = gather([[one]], layout(features=2, scaling=scaling))
    targets = np.array([[57, 350]])
    batch = corpus.batch(targets)
    assert batch.x.shape == batch.counts.shape == (1, 2, 11, 2)
    assert bool((batch.x[..., 1] == 0).all()) and not bool(batch.counts[..., 1].any()), "it never moved"
    history, point = values[47:57, 0], values[57, 0]
    if scaling == "train":
        center, scale = values[:320, 0].mean(), values[:320, 0].std()
    else:
        center, scale = history[-1], history.std()
    shown = np.clip((np.append(history, point) - center) / scale, -INPUT_LIMIT, INPUT_LIMIT)
    np.testing.assert_allclose(batch.x[0, 0, :, 0], shown, rtol=1e-5, atol=1e-6)
    if scaling == "window":
        assert batch.x[0, 1, -1, 0] == INPUT_LIMIT
    assert batch.code[0].tolist() == [[57, 0, 5], [50, 5, 5]], "2 January 1970 was a Friday"
    context = corpus.context(targets[0])
    np.testing.assert_array_equal(context.value, values[[57, 350]])
    np.testing.assert_array_equal(context.history[0], values[47:57])
    assert context.time_ms.tolist() == [DAY_MS + 57 * 60_000, DAY_MS + 350 * 60_000]


def test_the_clock_counts_weekdays_from_sunday() -> None:
    sunday = 1_767_484_800_000  # 2026-01-04 00:00 UTC
    assert clock(np.array([sunday, sunday + 25 * 3_600_000 + 90_000])).tolist() == [[0, 0, 0], [1, 1, 1]]


def test_members_keep_to_their_own_data() -> None:
    random = np.random.default_rng(3)
    many = [
        TrainSeries(
            f"k{k}", 10.0**k * (1 + random.normal(size=(300 + 50 * k, 1))), np.zeros(300 + 50 * k, np.bool_), 60_000
        )
        for k in range(3)
    ]
    corpus = gather([[one] for one in many], layout())
    assert corpus.members == 3
    for k, one in enumerate(many):
        alone = gather([[one]], layout())
        begin = corpus.starts[k]
        np.testing.assert_array_equal(corpus.train[k] - begin, alone.train[0])
        np.testing.assert_array_equal(corpus.batch(corpus.train[k]).x, alone.batch(alone.train[0]).x)
        for name, value in alone.constants()[0].items():
            np.testing.assert_array_equal(corpus.constants()[k][name], value)


def test_a_wrong_value_that_nobody_labelled_is_not_the_unit_of_the_others() -> None:
    values = np.random.default_rng(5).normal(size=(1000, 3))
    values[:, 2] = 0.0
    values[700:703, 2] = 1.0  # it hardly ever moves, and these are no mistakes
    clean = TrainSeries("a", values, np.zeros(1000, np.bool_), 60_000, metrics=("a", "b", "c"))
    wrong = values.copy()
    wrong[100, 0], wrong[300, 1] = 1e12, -1e6
    other = TrainSeries("a", wrong, np.zeros(1000, np.bool_), 60_000, metrics=("a", "b", "c"))
    for scaling in ("train", "window"):
        plain, spoiled = (gather([[one]], layout(features=3, scaling=scaling)) for one in (clean, other))
        np.testing.assert_allclose(spoiled.usual_step, plain.usual_step, rtol=0.05)
        np.testing.assert_allclose(spoiled.scale, plain.scale, rtol=0.2)
        np.testing.assert_allclose(spoiled.center, plain.center, atol=0.05)
    plain = gather([[clean]], layout(features=3))
    np.testing.assert_allclose(plain.scale[0], values[:800].std(axis=0), err_msg="clean data are as they are")
    assert np.isnan(tamed(np.full((3, 1), NAN))).all() and tamed(np.empty((0, 2))).shape == (0, 2)


def test_a_burst_of_minutes_a_day_is_the_habit_of_one_metric_among_several() -> None:
    values = np.random.default_rng(6).normal(size=(10_000, 2))
    values[::300, 1] = 100.0  # a third of a percent
    assert (tamed(values) == values).all()
    alone = tamed(values[:, 1:])
    assert alone.max() < 25 and (alone[1:300] == values[1:300, 1:]).all(), "of a single KPI it may be a mistake"
