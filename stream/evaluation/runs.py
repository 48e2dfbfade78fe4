"""A series through the very same detector that the service runs, and what its scores and alarms were worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Final

import msgspec
import numpy as np

from stream import backtest
from stream.columns import BoolArray, Float64Array, Int64Array
from stream.detector import Detector, Served
from stream.evaluation import nab
from stream.evaluation.data import Series
from stream.evaluation.metrics import Confusion, auc_pr, best_f1, delayed, random_best_f1
from stream.evaluation.vus import period, vus_pr
from stream.events import TYPE_OPENED, Event
from stream.policy import Rule
from stream.report import summarise
from stream.results import DetectorConfig, Scores

_WEEK_MS: Final = 7 * 24 * 3_600_000


@dataclass(frozen=True, slots=True)
class Run:
    """What a detector made of one series.

    Attributes:
        events: as they would have been published.
        score: of each judged record, (R,); NaN of one without. Of an entity that is watched metric by metric, the
            highest ratio of score and threshold.
        flagged: which of them lay above their thresholds, (R,).
        cells: every cell of a KPI, oldest first; None of an entity that is watched metric by metric.
    """

    events: tuple[Event, ...]
    score: Float64Array
    flagged: BoolArray
    cells: Scores | None
    detector: Detector


class Figures(msgspec.Struct, frozen=True):
    """What a run was worth. NaN is "does not apply"."""

    model: str
    auc_pr: float
    vus_pr: float
    f1: float  # delay-limited, at the threshold in force
    precision: float  # of incidents: share that touch a labelled segment
    recall: float  # of labelled segments: share that an incident was open in
    delay: float  # points from a segment's beginning to the incident, the median
    false_per_week: float
    best_pa_f1: float  # point-adjusted, at the best threshold for these labels
    random_pa_f1: float  # the same of random scores
    best_delay_f1: float  # delay-limited, at the best threshold for these labels
    nab_score: float  # standard profile, 0 … 100
    # What sums of several series are made of.
    points: Confusion
    incidents: int
    false_incidents: int
    segments: int
    caught: int
    delays: tuple[int, ...]
    weeks: float
    nab_file: nab.FileScore | None


def run(series: Series, served: Served, config: DetectorConfig, rules: Sequence[Rule]) -> Run:
    """Feed a series to a new detector, as a back-test does it: what is learned from is fed muted, as far as needed.

    Args:
        series: what to judge.
        served: the model that takes the place of those that the rules name.
        config: what is the same for all series.
        rules: as a user has them.
    """
    detector = Detector(config, rules, [served if rule.watch else None for rule in rules])
    backtest.prime(detector, series.points, series.first)
    events, parts = list[Event](), list[Scores]()
    for _, result in backtest.run(detector, series.points, want_scores=True, first=series.first):
        events += result.events
        parts += result.scores
    cells = _joined(parts)
    score, flagged = _of_records(series, cells)
    many = cells is not None and len(np.unique(cells.slot)) > 1
    return Run(tuple(events), score, flagged, None if many else cells, detector)


def _joined(parts: Sequence[Scores]) -> Scores | None:
    if not parts:
        return None
    columns = {one.name: np.concatenate([getattr(part, one.name) for part in parts]) for one in fields(Scores)}
    order = np.argsort(columns["timestamp_ms"], kind="stable")
    return Scores(**{name: column[order] for name, column in columns.items()})


def _of_records(series: Series, cells: Scores | None) -> tuple[Float64Array, BoolArray]:
    """Return score and decision of each judged record, by their times."""
    time = series.time_ms[series.first_record :]
    score, flagged = np.full(len(time), np.nan), np.zeros(len(time), np.bool_)
    if cells is None:
        return score, flagged
    scored = np.isfinite(cells.score)
    own, size, alarm = cells.timestamp_ms[scored], cells.score[scored], cells.anomaly[scored]
    if len(np.unique(cells.slot)) > 1:
        with np.errstate(invalid="ignore", divide="ignore"):
            size = np.nan_to_num(size / np.maximum(cells.threshold[scored], 1e-300), nan=0.0, posinf=1e300)
    distinct, place = np.unique(own, return_inverse=True)
    if not len(distinct):
        return score, flagged
    highest, any_alarm = np.full(len(distinct), -np.inf), np.zeros(len(distinct), np.bool_)
    np.maximum.at(highest, place, size)
    np.logical_or.at(any_alarm, place, alarm)
    at = np.minimum(np.searchsorted(distinct, time), len(distinct) - 1)
    there = distinct[at] == time
    score[there], flagged[there] = highest[at[there]], any_alarm[at[there]]
    return score, flagged


def judge(model: str, series: Series, made: Run) -> Figures:
    """Return what a run was worth.

    Points without a score (missing, or before the first full window) are left out of the figures of points.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    label = series.label[series.first_record :]
    scored = np.isfinite(made.score)
    label, score, flagged = label[scored], made.score[scored], made.flagged[scored]
    summary = summarise(series.points, made.events, made.detector.counts, elapsed_s=0.0, first=series.first)
    false = summary.false_alarms or 0
    # A segment that begins in the part that is learned from is cut by `summarise`, which begins with `first`.
    delays = tuple(one.delay_points for one in summary.segments if one.delay_points is not None)
    time = series.time_ms[series.first_record :]
    weeks = float(time[-1] - time[0]) / _WEEK_MS if len(time) else 0.0
    file = None if series.windows is None else _nab(series, made.events)
    return _figures(
        model,
        auc_pr=auc_pr(label, score) if len(score) else float("nan"),
        vus_pr=vus_pr(label, score, _width(series)) if len(score) else float("nan"),
        best_pa_f1=best_f1(label, score),
        random_pa_f1=random_best_f1(label) if label.any() else float("nan"),
        best_delay_f1=best_f1(label, score, 7),
        points=delayed(label, flagged),
        incidents=summary.incidents,
        false_incidents=false,
        segments=len(summary.segments),
        caught=summary.caught,
        delays=delays,
        weeks=weeks,
        nab_file=file,
        nab_score=float("nan") if file is None else nab.normalised([file]),
    )


def overall(model: str, several: Sequence[Figures]) -> Figures:
    """Return the figures of several series together: means of areas and best F1, all else counted in one."""

    def mean(name: str) -> float:
        values = np.array([getattr(one, name) for one in several])
        return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")

    points = Confusion()
    for one in several:
        points += one.points
    files = [one.nab_file for one in several if one.nab_file is not None]
    return _figures(
        model,
        auc_pr=mean("auc_pr"),
        vus_pr=mean("vus_pr"),
        best_pa_f1=mean("best_pa_f1"),
        random_pa_f1=mean("random_pa_f1"),
        best_delay_f1=mean("best_delay_f1"),
        points=points,
        incidents=sum(one.incidents for one in several),
        false_incidents=sum(one.false_incidents for one in several),
        segments=sum(one.segments for one in several),
        caught=sum(one.caught for one in several),
        delays=tuple(delay for one in several for delay in one.delays),
        weeks=sum(one.weeks for one in several),
        nab_file=None,
        nab_score=nab.normalised(files),
    )


def _figures(
    model: str,
    *,
    auc_pr: float,
    vus_pr: float,
    best_pa_f1: float,
    random_pa_f1: float,
    best_delay_f1: float,
    points: Confusion,
    incidents: int,
    false_incidents: int,
    segments: int,
    caught: int,
    delays: tuple[int, ...],
    weeks: float,
    nab_file: nab.FileScore | None,
    nab_score: float,
) -> Figures:
    return Figures(
        model=model,
        auc_pr=auc_pr,
        vus_pr=vus_pr,
        f1=points.f1,
        precision=(incidents - false_incidents) / incidents if incidents else float("nan"),
        recall=caught / segments if segments else float("nan"),
        delay=float(np.median(delays)) if delays else float("nan"),
        false_per_week=false_incidents / weeks if weeks else float("nan"),
        best_pa_f1=best_pa_f1,
        random_pa_f1=random_pa_f1,
        best_delay_f1=best_delay_f1,
        nab_score=nab_score,
        points=points,
        incidents=incidents,
        false_incidents=false_incidents,
        segments=segments,
        caught=caught,
        delays=delays,
        weeks=weeks,
        nab_file=nab_file,
    )


def _width(series: Series) -> int:
    """Return how far VUS lets labels reach: the period of the series, of an entity that of its first metric."""
    value = series.points.value[series.points.begins]
    known = np.isfinite(value)
    return period(np.interp(np.arange(len(value)), np.flatnonzero(known), value[known]))


def detections(series: Series, events: Sequence[Event]) -> Int64Array:
    """Return the rows at which incidents opened, (D,); the first of rows of the same time."""
    opened = [round(datetime.fromisoformat(one.time).timestamp() * 1000) for one in events if one.type == TYPE_OPENED]
    distinct, first = np.unique(series.time_ms, return_index=True)
    rows = first[np.minimum(np.searchsorted(distinct, np.array(opened, np.int64)), len(distinct) - 1)]
    return rows.astype(np.int64)


def _nab(series: Series, events: Sequence[Event]) -> nab.FileScore:
    assert series.windows is not None
    return nab.score_file(detections(series, events), len(series.time_ms), series.windows)
