"""The streaming threshold: SPOT (peaks over threshold) for many series at a time, one a row.

A row goes through these phases:

                                              +---- excesses 4x too often ---+
                                              v                              |
    CALIBRATING --n >= min_scores, may_start--> GROWING --n_full scores seen--> RING
                                                                             ^  |
                                         RELEARNING --n_full scores more-----+  |
                                              ^                                 |
                                              +---- excesses 4x too rarely -----+

- Calibrating: the row keeps its `max_excess` highest scores in order of arrival, and counts them all. It is judged by
  the prior, if there is one, until that is plainly wrong for it; anomalies are learnt from too, for the prior may err.
- Growing: t is the exact (k+1)-th highest score, k = max(min_excess, n (1 - level)), set at the start and again at
  each doubling of n. Every excess is still held, so shape, scale and counts are exact after each such change.
- Ring: t is final; a new excess replaces the oldest one. If excesses come four times as often as the level says, the
  ring holds the highest scores of the recent past, and the row grows again from those.
- Relearning: if excesses come four times as rarely, the scores have fallen, and the ring is of another time. The row
  is judged by the fit that it has, and collects as in calibration.

A score is judged by the threshold in force before it. An anomaly changes nothing but the counts of alarms, so a
burst cannot raise the threshold; what that truncates is put right in the fit (`models.gpd.refit_gpd`). z_q is the
predictive quantile: the fit is uncertain, and the expected alarm rate, not the likeliest, is to be q. Outliers of
calibration are left out, if fewer than 1 - level of all, or if they come in one or two clusters, as incidents do.

Realised alarm rate / q with the defaults (128 excesses, start after 250 scores) on clean scores: 64 series of 40,000
each, median of 5 seeds; of gross anomalies at 0.5 % contamination, calibration included, 0.99 or more are found:

    q      |normal|      normal        exponential   GPD 0.2       Student t4
    1e-3   0.75          0.72          0.97          1.48          1.49
    1e-4   0.86          0.98          1.03          1.61          1.88

Autocorrelated scores alarm in clusters, |AR(1)| of 0.9 at 0.9 and 1.7 q. A step of one of 10,000 rows at 2 % excesses
costs 1 to 2 of libspot's. `python -m tests.bench.pot` prints all of it, libspot and the published SPOT beside.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from models.gpd import Float64Array, IntArray, fit_gpd, tail_probability, tail_quantile
from models.phases import CALIBRATING, GROWING, RING
from models.prior import Prior
from models.risk import FEW, PotConfig, tail_mass
from models.tail import WARM_ITERATIONS, AnyArray, BoolArray, Float32Array, Tails

__all__ = ["Health", "Outcome", "PotConfig", "Prior", "Spot", "Step", "fit_gpd", "tail_probability", "tail_quantile"]

_ALARMS_MAX = 2**30
_LEAK = 8  # points without an alarm that outweigh one alarm
_MISTRUST_ONSETS = 3  # runs of alarms at which the prior is wrong for a row: so many incidents in a first day are not
_MISTRUST_ALARMS, _MISTRUST_SHARE = 10, 0.1  # ... or alarms, and a share of all scores besides: it is no incident
_MEAN_MIN = 30  # scores in a moving mean before scores relative to it are learnt from
_IMPROBABLE = 1e-3  # chance of a count so far from the promised one


class Outcome(IntEnum):
    """What a score is; stored as uint8."""

    WARMING = 0
    NORMAL = 1
    EXCESS = 2
    ANOMALY = 3


class Health(IntEnum):
    """What a row's threshold is worth; stored as uint8."""

    WARMING = 0  # there is none
    PRIOR = 1  # it is that of other series
    OK = 2
    DEGENERATE = 3  # fewer than ten excesses of different height: z_q rests on next to nothing
    DRIFTING = 4  # excesses or alarms come far more often, or more rarely, than promised


@dataclass(frozen=True, slots=True)
class Step:
    """What one call of `Spot.step` found, an entry a row of the call, (K,)."""

    outcome: npt.NDArray[np.uint8]  # an Outcome
    threshold: Float64Array  # z_q in force when the score was judged; NaN while warming
    probability: Float64Array  # tail probability of the score, <= q exactly for an anomaly; 1.0 up to t; NaN warming
    restarted: BoolArray  # this score was one alarm too many: the row calibrates anew from its next score


class Spot:
    """The thresholds of many series: a structure of arrays, a row a series.

    A row's results have the same bits whichever rows share its call. Memory is 8 max_excess + 157 bytes a row.
    """

    def __init__(self, config: PotConfig, capacity: int = 0, prior: Prior | None = None) -> None:
        """Make fresh rows.

        Args:
            config: the settings of every row.
            capacity: how many rows.
            prior: judges a row that calibrates; None: such a row is warming.
        """
        self.config = config
        self._tails = Tails(config, capacity, prior)

    @property
    def capacity(self) -> int:
        """Return the number of rows."""
        return self._tails.capacity

    @property
    def dtype(self) -> np.dtype[Any]:
        """Return the packed, little-endian layout of one row's whole state; it depends on max_excess only."""
        return self._tails.dtype

    def resize(self, capacity: int) -> None:
        """Grow to `capacity` rows; the present ones keep their state, the new ones are fresh.

        Raises:
            ValueError: fewer rows than there are.
        """
        self._tails.resize(capacity)

    def reset(self, rows: IntArray) -> None:
        """Make the rows fresh: they calibrate from nothing, at the risk of the config and without drift."""
        self._tails.reset(rows)

    def copy_rows(self, source: IntArray, target: IntArray) -> None:
        """Give the target rows the whole state of the source rows, (K,) each; no row is both."""
        self._tails.copy_rows(source, target)

    def pack(self, rows: IntArray) -> AnyArray:
        """Return the whole state of the rows, (K,) of `dtype`."""
        return self._tails.pack(rows)

    def unpack(self, rows: IntArray, packed: AnyArray) -> None:
        """Set the state of the rows to what `pack` gave; a row that a prior judged is judged by the prior of now.

        Raises:
            StateError: another layout, or a field is out of its bounds; no row has changed.
        """
        self._tails.unpack(rows, packed)

    def set_risk(self, rows: IntArray, q: float | Float64Array) -> None:
        """Give rows a risk of their own; the tail that they have fitted stays, z_q moves along it.

        Args:
            rows: without repeats, (K,).
            q: one for all rows or one each, (K,).

        Raises:
            ValueError: a q lies outside (0, q_max]; no row has changed.
        """
        s, q_max = self._tails.state, self.config.q_max
        risk = np.broadcast_to(np.asarray(q, np.float64), np.shape(rows))
        good = (risk > 0) & (risk <= q_max)
        if not good.all():
            raise ValueError(f"risk q={risk[~good][0]} must lie in (0, {q_max:.12g}], which is (1 - level) / 4")
        moved = risk != s["q"][rows]
        rows, risk = rows[moved], risk[moved]
        s["promised"][rows] += (s["q"][rows] - risk) * s["judged"][rows]
        s["q"][rows] = risk
        self._tails.set_quantile(rows)

    def risk(self, rows: IntArray) -> Float64Array:
        """Return the risk of each row, (K,)."""
        q: Float64Array = self._tails.state["q"][rows]
        return q

    def set_drift(self, rows: IntArray, depth: int | IntArray) -> None:
        """Judge rows relative to a moving mean of their last `depth` scores that were no anomalies (DSPOT).

        The mean is an exponential one of the same mean age, alpha = 2 / (depth + 1): it needs one number of state, not
        the last `depth` scores, and no score leaves it with a jump. It starts as the plain mean, until `depth` scores
        are in; scores are learnt from once it holds 30, or `depth`. It stands still while a row alarms.

        A row with another depth than before starts anew, at the risk that it has: its excesses were over another mean.

        Args:
            rows: without repeats, (K,).
            depth: one for all rows or one each, (K,); 0: none.

        Raises:
            ValueError: a depth lies outside 0 ... 65535; no row has changed.
        """
        wanted = np.broadcast_to(np.asarray(depth), np.shape(rows))
        good = (wanted >= 0) & (wanted <= 65_535)
        if not good.all():
            raise ValueError(f"drift depth={wanted[~good][0]} must lie in 0 ... 65535")
        s = self._tails.state
        moved = wanted != s["depth"][rows]
        rows = rows[moved]
        risk = s["q"][rows]
        self._tails.reset(rows)
        s["depth"][rows] = wanted[moved]
        s["q"][rows] = risk
        self._tails.set_quantile(rows)
        self._tails.any_depth = bool(s["depth"].any())

    def calibrate(self, row: int | IntArray, scores: npt.ArrayLike) -> None:
        """Give rows a threshold made of calibration scores; they judge by it from their next score on.

        Fewer than `min_scores` are a beginning: the rows go on calibrating from there. Each row keeps its risk and
        its drift depth, which have to be set before.

        Up to n_full scores this equals stepping through them. Of more, t is the exact quantile of all, and their
        excesses are thinned to max_excess of even rank with the counts to match: as strong as one full ring, which
        the row's own excesses replace.

        Args:
            row: one row or several; rows of the same risk and depth get the same state.
            scores: of normal points, in order of arrival, (N,), N >= 1.

        Raises:
            ValueError: no scores, not one dimension, or one is not finite as float32.
        """
        with np.errstate(over="ignore"):
            x = np.asarray(scores).astype(np.float32)
        if x.ndim != 1 or not len(x):
            raise ValueError(f"calibration scores of shape {x.shape}: need one axis of at least one score")
        if not np.isfinite(x).all():
            raise ValueError(f"{np.count_nonzero(~np.isfinite(x))} of {len(x)} calibration scores are not finite")
        rows = np.atleast_1d(np.asarray(row))
        depths = self._tails.state["depth"][rows]
        for depth in np.unique(depths).tolist():
            same = rows[depths == depth]
            mean, relative = _relative(x, depth)
            self._tails.set_from(self._tails.calibrated(relative), same)
            self._tails.state["mean"][same] = mean
            self._tails.state["settled"][same] = min(len(x), depth)

    def step(self, rows: IntArray, scores: Float64Array, may_start: BoolArray) -> Step:
        """Judge one score of each row and learn from it.

        Args:
            rows: without repeats, (K,).
            scores: higher is more anomalous, (K,); rounded to float32 first, as the networks give them.
            may_start: False keeps a calibrating row calibrating, (K,).

        Raises:
            ValueError: a score is not finite as float32; no row has changed.
        """
        tails = self._tails
        s = tails.state
        with np.errstate(over="ignore"):
            x32 = np.asarray(scores).astype(np.float32)
        if not np.isfinite(x32).all():
            bad = int(np.flatnonzero(~np.isfinite(x32))[0])
            raise ValueError(f"score {scores[bad]} of row {rows[bad]} is not finite as float32; reject it before this")
        x = x32.astype(np.float64)
        mean: Float64Array | float = 0.0
        if tails.any_depth:
            raw, mean = x, s["mean"][rows]
            x32 = (x - mean).astype(np.float32)
            x = x32.astype(np.float64)
        z = s["z"][rows]  # inf while warming, as t
        excess = x > s["t"][rows]
        anomaly = x > z
        judged = z < np.inf
        outcome = judged.view(np.uint8) + excess.view(np.uint8)
        outcome += anomaly.view(np.uint8)

        probability = np.where(judged, 1.0, np.nan)
        over = np.flatnonzero(excess)
        if len(over):
            probability[over] = self._probability(rows[over], x[over], anomaly[over])

        phase = s["phase"][rows]
        early = phase.min(initial=RING) < RING
        learns = ~anomaly
        if early:
            learns |= phase == CALIBRATING  # the prior may err
        if tails.any_depth:
            learns &= self._follow(rows, raw, anomaly)
        n = s["n"][rows] + learns
        s["n"][rows] = n
        if early:
            some = np.flatnonzero((phase < RING) & learns)
            s["low"][rows[some]] = np.minimum(s["low"][rows[some]], x32[some])
            s["n_excess"][rows[excess & learns & ~anomaly & (phase == CALIBRATING)]] += 1  # over the t of the prior
        again = n >= s["due"][rows]
        if again.any():
            again &= learns & ((phase > CALIBRATING) | may_start)
        kept = np.flatnonzero((x32 > tails.bar[rows]) & learns)
        if len(kept):
            ring, there = phase[kept] == RING, rows[kept]
            tails.store_in_ring(there[ring], x32[kept[ring]])
            tails.store_in_order(there[~ring], x32[kept[~ring]])
            # before an excess would be lost to a full buffer
            again[kept] |= (s["n_excess"][there] >= self.config.max_excess) & (s["phase"][there] == GROWING)
        looks: IntArray | None = None
        if again.any():  # t again: at the start, at each doubling of n, and when the scores have moved
            looks = rows[again & (s["phase"][rows] == RING)]
            again &= s["phase"][rows] < RING
            tails.set_peak_threshold(rows[again])
        if len(over):
            tails.fit(rows[excess & learns & ~again & (phase >= GROWING)], WARM_ITERATIONS)
        if looks is not None:
            tails.look_for_fall(looks)
        restarted = self._count(rows, judged, anomaly)
        if early and len(over):
            self._check_prior(rows[excess & (s["phase"][rows] == CALIBRATING)])
        return Step(outcome, np.where(judged, z + mean, np.nan), probability, restarted)

    def observed(self, rows: IntArray) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return how many alarms there were among how many scores judged since the threshold's start, (K,) each."""
        s = self._tails.state
        return s["n_alarms"][rows].astype(np.int64), s["judged"][rows]

    def health(self, rows: IntArray) -> npt.NDArray[np.uint8]:
        """Return a Health each, (K,).

        A row is drifting if a Poisson test at 1e-3 refuses that excesses come at most twice, and runs of alarms thrice,
        as often or as rarely as promised: the error of a fit from few scores, and a few true incidents, are no drift.
        """
        s = self._tails.state
        phase, z = s["phase"][rows], s["z"][rows]
        peaks = np.sort(s["peaks"][rows], axis=-1)
        excess = peaks > s["t"][rows][:, None]
        distinct = (excess[:, 1:] & (peaks[:, 1:] > peaks[:, :-1])).sum(axis=-1) + excess[:, 0]
        rate, judged = 1 - self.config.level, s["judged"][rows]
        recent = np.where(phase == RING, s["n"][rows] - s["mark"][rows], 0)
        drifting = _far(s["cursor"][rows] * (recent > 0), rate * recent, 2.0)
        drifting |= _far(s["onsets"][rows], s["promised"][rows] + s["q"][rows] * judged, 3.0)
        health = np.where(drifting, Health.DRIFTING, Health.OK)
        health = np.where((phase >= GROWING) & (distinct < FEW), Health.DEGENERATE, health)
        health = np.where(phase == CALIBRATING, Health.PRIOR, health)
        return np.where(z == np.inf, Health.WARMING, health).astype(np.uint8)

    def _probability(self, rows: IntArray, x: Float64Array, anomaly: BoolArray) -> Float64Array:
        """Return the tail probability of scores above t, <= q exactly for the anomalies in spite of rounding."""
        s = self._tails.state
        t, shape, q = s["t"][rows], s["shape"][rows], s["q"][rows]
        mass = tail_mass(s["share"][rows], q)
        unit = tail_quantile(q, peak_threshold=0.0, shape=shape, scale=1.0, mass=mass)
        # the scale at which the fitted tail meets z_q at q: z_q lies above the plain quantile, for doubt in the fit
        p = tail_probability(x, peak_threshold=t, shape=shape, scale=(s["z"][rows] - t) / unit, mass=mass)
        return np.where(anomaly, np.minimum(p, q), np.maximum(p, np.nextafter(q, 1.0)))

    def _follow(self, rows: IntArray, score: Float64Array, anomaly: BoolArray) -> BoolArray:
        """Move the means that scores are taken relative to; tell where the mean before was one to learn from."""
        s = self._tails.state
        depth, settled = s["depth"][rows], s["settled"][rows]
        ready = settled >= np.minimum(depth, _MEAN_MIN)
        some = np.flatnonzero((depth > 0) & ~anomaly)
        where, depth, settled = rows[some], depth[some].astype(np.float64), settled[some].astype(np.float64)
        weight = np.where(settled < depth, 1.0 / (settled + 1.0), 2.0 / (depth + 1.0))
        mean = s["mean"][where]
        s["mean"][where] = mean + weight * (score[some] - mean)
        s["settled"][where] = np.minimum(settled + 1.0, depth)
        return np.asarray(ready)

    def _check_prior(self, rows: IntArray) -> None:
        """Let the prior judge calibrating rows no longer for which it is plainly wrong."""
        s = self._tails.state
        n, share = s["n"][rows], s["share"][rows]
        wrong = _improbable(s["n_excess"][rows], share * n, 1.0) & (s["n_excess"][rows] > 2.0 * share * n)
        wrong |= s["n_alarms"][rows] > _MISTRUST_ALARMS + _MISTRUST_SHARE * n
        wrong |= s["onsets"][rows] >= _MISTRUST_ONSETS
        self._tails.leave_prior(rows[wrong])

    def _count(self, rows: IntArray, judged: BoolArray, anomaly: BoolArray) -> BoolArray:
        """Count scores and alarms; start rows anew for which what alarms is the new normal, and tell which."""
        s, config = self._tails.state, self.config
        s["judged"][rows] += judged
        alarms = s["alarms"][rows]
        restarted = np.zeros(len(rows), np.bool_)
        if not (anomaly.any() or alarms.any()):
            return restarted
        where = rows[anomaly]
        s["n_alarms"][where] += 1
        s["onsets"][where] += alarms[anomaly] == 0
        alarms = np.where(anomaly, alarms + _LEAK, alarms - (alarms > 0)).astype(np.uint32)
        s["alarms"][rows] = np.minimum(alarms, _ALARMS_MAX)
        if config.max_alarms:
            restarted = alarms >= _LEAK * config.max_alarms
            if restarted.any():
                self._tails.restart(rows[restarted])
        return restarted


def _relative(x: Float32Array, depth: int) -> tuple[float, Float32Array]:
    """Return the moving mean after all scores, and each score less the mean before it, as `Spot.step` has them."""
    if not depth:
        return 0.0, x
    mean, relative = 0.0, x.astype(np.float64)
    for i, score in enumerate(x.tolist()):  # a recursion; once a batch of new rows
        relative[i] -= mean
        mean += (1.0 / (i + 1.0) if i < depth else 2.0 / (depth + 1.0)) * (score - mean)
    return mean, relative[min(depth, _MEAN_MIN) :].astype(np.float32)


def _far(count: IntArray, promised: Float64Array, ratio: float) -> BoolArray:
    """Return where so high or low a count is improbable even if the promise is wrong by the ratio."""
    return np.asarray(_improbable(count, promised * ratio, 1.0) | _improbable(count, promised / ratio, -1.0))


def _improbable(count: IntArray, mean: Float64Array, side: float) -> BoolArray:
    """Return where a Poisson count lies so far above the mean (side 1), or below it (-1), by Chernoff's bound."""
    mean = np.maximum(mean, 1e-12)
    bound = count * np.log(np.maximum(count, 1) / mean) - count + mean
    return np.asarray((bound > -np.log(_IMPROBABLE)) & ((count - mean) * side > 0))
