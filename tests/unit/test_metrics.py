"""Figures of scores and alarms, each against the plain way to say it, and VUS-PR against TSB-AD's own values."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from stream.evaluation.metrics import Confusion, auc_pr, best_f1, delayed, random_best_f1
from stream.evaluation.vus import PERIOD_ELSE, period, segments, vus_pr

Label = NDArray[np.bool_]
Score = NDArray[np.float64]

SEGMENTS = (
    (300, ((50, 60), (200, 200))),
    (300, ((0, 5), (290, 299))),
    (400, ((20, 30), (38, 45), (350, 351))),
    (1000, ((100, 180), (500, 503), (520, 520), (900, 950))),
)
# `generate_curve(label, score, width, "opt", 250)[-1]` of TSB_AD/evaluation/basic_metrics.py in the wheel of
# TSB-AD 1.5, for the cases below in the same order, run with numpy 2.3 and scikit-learn 1.9.
TSB_AD = (
    0.424592696121,
    0.204387959907,
    0.327029573425,
    0.367407099127,
    0.266198570542,
    0.180003141863,
    0.410685424103,
    0.481711865986,
    0.183691669170,
    0.720905160649,
    0.542636836127,
    0.448747220378,
    0.435906349892,
    0.547315701473,
    0.219658756397,
    0.790802025901,
    0.739258967613,
    0.405450596468,
    0.562383948962,
    0.160341158114,
    0.327061826667,
    0.690793627433,
    0.238482828847,
    0.335511392522,
    0.664912385285,
    0.594316925360,
    0.314008333839,
    0.716178087275,
    0.589691590155,
    0.445218050555,
    0.653720563892,
    0.637284812352,
    0.365053772469,
    0.799166146908,
    0.789466411204,
    0.496746647288,
)


def cases() -> list[tuple[Label, Score, int]]:
    rng = np.random.default_rng(5)
    made = []
    for n, spans in SEGMENTS:
        label = np.zeros(n, np.bool_)
        for first, last in spans:
            label[first : last + 1] = True
        for width in (0, 7, 20):
            for kind in ("good", "late", "ties"):
                score: Score = np.round(rng.random(n), 3)
                if kind == "good":
                    score = score + 0.6 * label.astype(np.float64)
                elif kind == "late":
                    score = score + 0.8 * np.roll(label, 5).astype(np.float64)
                else:
                    score = np.round(score + 0.3 * label.astype(np.float64), 1)
                made.append((label, score, width))
    return made


def test_vus_pr_is_that_of_tsb_ad() -> None:
    for (label, score, width), value in zip(cases(), TSB_AD, strict=True):
        assert vus_pr(label, score, width) == pytest.approx(value, abs=1e-9)


def test_vus_pr_forgives_what_is_beside_a_segment_and_not_what_is_far_off() -> None:
    label = np.zeros(1000, np.bool_)
    label[500:510] = True
    beside, far = np.zeros(1000), np.zeros(1000)
    beside[510:520], far[800:810] = 1.0, 1.0
    assert vus_pr(label, beside, 0) == pytest.approx(vus_pr(label, far, 0))
    assert vus_pr(label, beside, 40) > 5 * vus_pr(label, far, 40)
    assert math.isnan(vus_pr(np.zeros(50, np.bool_), np.zeros(50), 10))


def test_the_period_is_that_of_the_series() -> None:
    time = np.arange(5000)
    noise = np.random.default_rng(0).normal(0, 0.3, 5000)
    assert abs(period(np.sin(time * 2 * np.pi / 48) + noise) % 48) in (0, 1, 47)
    assert period(np.ones(500)) == PERIOD_ELSE
    assert period(np.arange(4.0)) == PERIOD_ELSE


def test_segments_reach_the_ends() -> None:
    first, last = segments(np.array([1, 1, 0, 1, 0, 1], np.bool_))
    assert (first.tolist(), last.tolist()) == ([0, 3, 5], [1, 3, 5])
    assert len(segments(np.zeros(3, np.bool_))[0]) == 0


def adjusted(label: Label, flagged: Label, delay: int | None) -> Label:
    """The rule as its authors write it: point by point."""
    out = flagged.copy()
    first, last = segments(label)
    for a, b in zip(first.tolist(), last.tolist(), strict=True):
        end = b if delay is None else min(a + delay, b)
        out[a : b + 1] = flagged[a : end + 1].any()
    return out


def f1_of(label: Label, flagged: Label) -> float:
    tp, fp, fn = (label & flagged).sum(), (~label & flagged).sum(), (label & ~flagged).sum()
    return float(2 * tp / (2 * tp + fp + fn)) if tp + fp + fn else float("nan")


@pytest.mark.parametrize("delay", [0, 1, 7])
def test_delayed_f1_is_the_rule_point_by_point(delay: int) -> None:
    rng = np.random.default_rng(delay)
    for label, score, _ in cases():
        flagged = score > rng.random()
        assert delayed(label, flagged, delay).f1 == pytest.approx(f1_of(label, adjusted(label, flagged, delay)))


@pytest.mark.parametrize("delay", [None, 0, 7])
def test_the_best_f1_is_the_best_of_all_thresholds(delay: int | None) -> None:
    for label, score, _ in cases()[:12]:
        every = [f1_of(label, adjusted(label, score >= at, delay)) for at in np.unique(score)]
        assert best_f1(label, score, delay) == pytest.approx(max(every))


def test_point_adjusted_f1_of_chance_is_no_small_number() -> None:
    label = np.zeros(5000, np.bool_)
    label[1000:1400] = label[3000:3600] = True
    assert random_best_f1(label) > 0.9
    assert random_best_f1(label, 7) < random_best_f1(label)
    assert random_best_f1(label) == random_best_f1(label)
    assert math.isnan(best_f1(np.zeros(10, np.bool_), np.zeros(10)))


def test_auc_pr_is_the_average_precision() -> None:
    label, score = np.array([0, 1, 0, 1], np.bool_), np.array([0.1, 0.9, 0.8, 0.7])
    assert auc_pr(label, score) == pytest.approx((1 / 1 + 2 / 3) / 2)
    assert math.isnan(auc_pr(np.zeros(4, np.bool_), score))


def test_confusions_add_up() -> None:
    both = Confusion(1, 2, 3) + Confusion(4, 0, 1)
    assert both == Confusion(5, 2, 4)
    assert both.f1 == pytest.approx(10 / 16)
    assert math.isnan(Confusion().f1)
