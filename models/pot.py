"""The streaming threshold: SPOT (peaks over threshold) for many series at a time, one a row.

A row goes through three phases:

    CALIBRATING --n >= min_scores and may_start--> GROWING --n_full scores seen--> RING
                                                     ^                              |
                                                     +---- excesses 4x too often ---+

- Calibrating: the row keeps its `max_excess` highest scores in order of arrival, and counts them all.
- Growing: t is the exact (k+1)-th highest score, k = max(min_excess, n (1 - level)), set at the start and again at
  each doubling of n. Every excess is still held, so shape, scale and counts are exact after each such change.
- Ring: t is final; a new excess replaces the oldest one. If excesses come four times as often as the level says, the
  ring holds the highest scores of the recent past, and the row grows again from those.

A score is judged by the threshold in force before it. An anomaly changes nothing but the count of alarms, so a
burst cannot raise the threshold; what that truncates is put right in the fit (`models.gpd.refit_gpd`). z_q is the
predictive quantile: the fit is uncertain, and the expected alarm rate, not the likeliest, is to be q. Outliers of
calibration are left out, if fewer than 1 - level of all.

Realised alarm rate / q with the defaults (128 excesses, start after 250 scores): median [5 %, 95 %] of 64 series of
40,000 clean scores; and the share of gross anomalies found at 0.5 % contamination, calibration included:

    q      |normal|         normal           exponential      GPD, shape 0.2   found
    1e-3   0.69 [0.4, 1.2]  0.73 [0.4, 1.2]  0.93 [0.6, 1.4]  1.48 [1.0, 2.1]  0.9997 or more
    1e-4   0.75 [0.0, 2.0]  0.75 [0.0, 2.3]  0.75 [0.3, 2.0]  1.26 [0.5, 3.0]  0.996 or more

Measured on one core of a shared machine with 10,000 rows, per row and step: 0.015 us when nothing is above t, 0.15 to
0.25 us at 2 % excesses, 1 us over the first 400 scores of a row; a row starts in 10 us.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from models.errors import ConfigError, StateError
from models.gpd import (
    SHAPE_MAX,
    SHAPE_MIN,
    Float64Array,
    IntArray,
    TailFit,
    fit_gpd,
    outlier_limit,
    refit_gpd,
    tail_probability,
    tail_quantile,
)

__all__ = ["Outcome", "PotConfig", "Spot", "Step", "fit_gpd", "tail_probability", "tail_quantile"]

BoolArray: TypeAlias = npt.NDArray[np.bool_]
AnyArray: TypeAlias = npt.NDArray[Any]

_CALIBRATING, _GROWING, _RING = 0, 1, 2
_NEVER: Final = 2**62
_SHAPE_MEAN, _SHAPE_SPREAD = 0.05, 0.2  # normal prior of the shape
_FEW = 10  # excesses below which the fit is not believed alone: z_q also lies above all that was seen
_MIN_MASS_RATIO = 4.0  # tail mass is taken as at least 4 q, so that z_q lies above t even with no excess at all
_CLEAN, _CLEAN_SHAPE = 0.01, 0.05  # chance that a clean tail loses a calibration score as an outlier, and its shape
_DRIFT = 4.0  # excesses this many times as often as the level says: t is out of date
_COLD_ITERATIONS, _MOVED_ITERATIONS, _WARM_ITERATIONS = 8, 4, 2  # Newton steps: first fit, new t, one new excess
_CHUNK = 256  # rows fitted at once: what they need stays in the processor's cache


class Outcome(IntEnum):
    """What a score is; stored as uint8."""

    WARMING = 0
    NORMAL = 1
    EXCESS = 2
    ANOMALY = 3


@dataclass(frozen=True)
class PotConfig:
    """Settings of the threshold, the same for every series.

    Raises:
        ConfigError: a value is out of its bounds, or the values do not fit together.
    """

    q: float = 1e-4  # risk: share of normal points flagged; lower trades detection for fewer false alarms
    level: float = 0.98  # share of scores below t; higher trades bias of the tail fit for variance
    min_scores: int = 250  # scores a series must have seen before it may be judged
    min_excess: int = 20  # excesses kept at least while calibration grows
    max_excess: int = 128  # size of the ring: memory (8 bytes each) against variance of z_q
    max_alarms: int = 1000  # alarms, less points that were none, after which a row starts anew; 0: never

    def __post_init__(self) -> None:
        """Refuse what cannot work, naming field, value and bound."""
        if not 0 < self.q < 1:
            raise ConfigError(f"q={self.q} must lie in (0, 1)")
        if not 0 < self.level < 1:
            raise ConfigError(f"level={self.level} must lie in (0, 1)")
        if not self.q <= self.q_max:
            raise ConfigError(
                f"q={self.q} must be at most (1 - level) / {_MIN_MASS_RATIO:g} = {self.q_max:.12g}: "
                "z_q has to lie well above t; lower q or the level"
            )
        if self.min_excess < _FEW:
            raise ConfigError(f"min_excess={self.min_excess} must be at least {_FEW}: fewer do not carry a fit")
        if not self.min_excess < self.max_excess <= 32_767:
            raise ConfigError(
                f"max_excess={self.max_excess} must be above min_excess={self.min_excess} and at most 32767"
            )
        if not self.min_scores >= 2 * self.min_excess:
            raise ConfigError(
                f"min_scores={self.min_scores} must be at least 2 min_excess = {2 * self.min_excess}: "
                "the excesses are to be the upper tail, not the bulk"
            )
        if not 0 <= self.max_alarms <= 65_535:
            raise ConfigError(f"max_alarms={self.max_alarms} must lie in 0 ... 65535")

    @property
    def q_max(self) -> float:
        """Return the highest risk that a row may have, (1 - level) / 4 without what binary fractions add or take."""
        return round((1 - self.level) / _MIN_MASS_RATIO, 15)

    @property
    def n_full(self) -> int:
        """Scores at which the excesses of the level fill the ring, and t becomes final."""
        return int(np.ceil((self.max_excess - 1) / (1 - self.level) - 1e-6))


@dataclass(frozen=True, slots=True)
class Step:
    """What one call of `Spot.step` found, an entry a row of the call, (K,)."""

    outcome: npt.NDArray[np.uint8]  # an Outcome
    threshold: Float64Array  # z_q in force when the score was judged; NaN while warming
    probability: Float64Array  # tail probability of the score, <= q exactly for an anomaly; 1.0 up to t; NaN warming
    restarted: BoolArray  # this score was one alarm too many: the row calibrates anew from its next score


class Spot:
    """The thresholds of many series: a structure of arrays, a row a series.

    A row's results have the same bits whichever rows share its call. Memory is 8 max_excess + 119 bytes a row.
    """

    def __init__(self, config: PotConfig, capacity: int = 0) -> None:
        self.config = config
        size = config.max_excess
        self._fields: dict[str, tuple[Any, Any]] = {  # name: type in a packed row, value of a fresh row
            "phase": ("u1", _CALIBRATING),
            "held": ("<u2", 0),  # slots in use
            "cursor": ("<u2", 0),  # ring: the next slot to overwrite, the oldest
            "alarms": ("<u2", 0),  # a leaky count: +1 an anomaly, -1 any other point
            "n": ("<i8", 0),  # scores that are not anomalies
            "n_excess": ("<i8", 0),
            "due": ("<i8", config.min_scores),  # n at which t is set again
            "mark": ("<i8", 0),  # ring: n when slot 0 was last reached
            "t": ("<f8", np.inf),
            "shape": ("<f8", 0.0),
            "scale": ("<f8", 0.0),
            "var_shape": ("<f8", 0.0),
            "covariance": ("<f8", 0.0),
            "var_log_scale": ("<f8", 0.0),
            "share": ("<f8", 1.0),  # of excesses among the scores that are not anomalies, at the fit
            "q": ("<f8", config.q),
            "z": ("<f8", np.inf),
            "low": ("<f4", np.inf),  # the lowest score until t is final: gives a width when the highest are all equal
            "peaks": (("<f4", (size,)), -np.inf),  # scores; in order of arrival until t is final
            "ceilings": (("<f4", (size,)), np.inf),  # z_q in force when the peak came; inf while calibrating
        }
        self._dtype = np.dtype([(name, kind) for name, (kind, _) in self._fields.items()])
        self._state: dict[str, AnyArray] = {name: np.empty((0, *self._dtype[name].shape), self._dtype[name].base)
                                            for name in self._fields}  # fmt: skip
        self._bar = np.empty(0, np.float32)  # derived: the score a row has to exceed to be stored
        self.resize(capacity)

    @property
    def capacity(self) -> int:
        """Return the number of rows."""
        return len(self._bar)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Return the packed, little-endian layout of one row's whole state; it depends on max_excess only."""
        return self._dtype

    def resize(self, capacity: int) -> None:
        """Grow to `capacity` rows; the present ones keep their state, the new ones are fresh.

        Raises:
            ValueError: fewer rows than there are.
        """
        old = self.capacity
        if capacity < old:
            raise ValueError(f"capacity={capacity} is below the {old} rows in use; rows are never taken away")
        for name, (_, fresh) in self._fields.items():
            array = self._state[name]
            grown = np.full((capacity, *array.shape[1:]), fresh, array.dtype)
            grown[:old] = array
            self._state[name] = grown
        bar = np.full(capacity, -np.inf, np.float32)
        bar[:old] = self._bar
        self._bar = bar

    def reset(self, rows: IntArray) -> None:
        """Make the rows fresh: they calibrate from nothing, at the risk of the config."""
        for name, (_, fresh) in self._fields.items():
            self._state[name][rows] = fresh
        self._bar[rows] = -np.inf

    def copy_rows(self, source: IntArray, target: IntArray) -> None:
        """Give the target rows the whole state of the source rows, (K,) each; no row is both."""
        for array in self._state.values():
            array[target] = array[source]
        self._bar[target] = self._bar[source]

    def set_risk(self, rows: IntArray, q: float | Float64Array) -> None:
        """Give rows a risk of their own; the tail that they have fitted stays, z_q moves along it.

        Args:
            rows: without repeats, (K,).
            q: one for all rows or one each, (K,).

        Raises:
            ValueError: a q lies outside (0, q_max]; no row has changed.
        """
        risk = np.broadcast_to(np.asarray(q, np.float64), np.shape(rows))
        if not ((risk > 0) & (risk <= self.config.q_max)).all():
            bad = risk[~((risk > 0) & (risk <= self.config.q_max))][0]
            raise ValueError(f"risk q={bad} must lie in (0, {self.config.q_max:.12g}], which is (1 - level) / 4")
        moved = risk != self._state["q"][rows]
        rows = rows[moved]
        self._state["q"][rows] = risk[moved]
        self._set_z(rows[self._state["phase"][rows] > _CALIBRATING])

    def calibrate(self, row: int | IntArray, scores: npt.ArrayLike) -> None:
        """Give rows a threshold made of calibration scores; they judge from their next score on.

        Fewer than `min_scores` are a beginning: the rows go on calibrating from there.

        Up to n_full scores this equals stepping through them. Of more, t is the exact quantile of all, and their
        excesses are thinned to max_excess of even rank with the counts to match: a prior as strong as one full ring,
        which the row's own excesses replace.

        Args:
            row: one row or several; each gets the same state.
            scores: of normal points, in order of arrival, (N,), N >= 1.

        Raises:
            ValueError: no scores, not one dimension, or one is not finite as float32.
        """
        config, size = self.config, self.config.max_excess
        with np.errstate(over="ignore"):
            x = np.asarray(scores).astype(np.float32)
        if x.ndim != 1 or not len(x):
            raise ValueError(f"calibration scores of shape {x.shape}: need one axis of at least one score")
        if not np.isfinite(x).all():
            raise ValueError(f"{np.count_nonzero(~np.isfinite(x))} of {len(x)} calibration scores are not finite")
        rows = np.atleast_1d(np.asarray(row))
        one, state = Spot(config, 1), {}
        n, n_excess = len(x), size
        if n > config.n_full:
            k = int(np.floor(n * (1 - config.level) + 1e-6))
            t = np.partition(x, n - 1 - k)[n - 1 - k]
            over = np.sort(x[x > t])
            if len(over) > size:
                n = round(n * size / len(over))
                over = over[((np.arange(size) + 0.5) * (len(over) / size)).astype(np.int64)]
                over = over[_scrambled(size)]  # the ring forgets in this order
            n_excess = len(over)
            state = {"phase": _RING, "held": n_excess, "due": _NEVER, "t": t}
            state |= {"n": n, "low": x.min()}
            one._state["peaks"][0, :n_excess] = over
        else:
            kept = np.sort(np.argsort(-x, kind="stable")[:size])
            state = {"held": len(kept), "n": n, "low": x.min()}
            one._state["peaks"][0, : len(kept)] = x[kept]
        for name, value in state.items():
            one._state[name][0] = value
        only = np.zeros(1, np.int64)
        if one._state["phase"][0] == _RING:
            one._drop_outliers(only, one._state["t"][only])
            held = one._state["held"][only]
            one._state["n_excess"][only] = held
            one._state["cursor"][only] = held % size
            one._state["mark"][only] = np.where(held == size, one._state["n"][only], 0)
            one._set_bar(only)
            one._fit(only, _COLD_ITERATIONS)
        elif n >= config.min_scores:
            one._set_peak_threshold(only)
        else:
            one._set_bar(only)
        for name in self._fields:
            if name != "q":
                self._state[name][rows] = one._state[name][0]
        self._bar[rows] = one._bar[0]
        self._set_z(rows[self._state["phase"][rows] > _CALIBRATING])

    def step(self, rows: IntArray, scores: Float64Array, may_start: BoolArray) -> Step:
        """Judge one score of each row and learn from it.

        Args:
            rows: without repeats, (K,).
            scores: higher is more anomalous, (K,); rounded to float32 first, as the networks give them.
            may_start: False keeps a calibrating row calibrating, (K,).

        Raises:
            ValueError: a score is not finite as float32; no row has changed.
        """
        s = self._state
        with np.errstate(over="ignore"):
            x32 = np.asarray(scores).astype(np.float32)
        if not np.isfinite(x32).all():
            bad = int(np.flatnonzero(~np.isfinite(x32))[0])
            raise ValueError(f"score {scores[bad]} of row {rows[bad]} is not finite as float32; reject it before this")
        x = x32.astype(np.float64)
        z = s["z"][rows]  # inf while calibrating, as t
        excess = x > s["t"][rows]
        anomaly = x > z
        judged = z < np.inf
        outcome = judged.view(np.uint8) + excess.view(np.uint8)
        outcome += anomaly.view(np.uint8)

        probability = np.where(judged, 1.0, np.nan)
        over = np.flatnonzero(excess)
        if len(over):
            probability[over] = self._probability(rows[over], x[over], anomaly[over])

        n = s["n"][rows] + ~anomaly
        s["n"][rows] = n
        phase = s["phase"][rows]
        if phase.min(initial=_RING) < _RING:
            early = np.flatnonzero((phase < _RING) & ~anomaly)
            s["low"][rows[early]] = np.minimum(s["low"][rows[early]], x32[early])
        kept = np.flatnonzero((x32 > self._bar[rows]) & ~anomaly)
        if len(kept):
            ring = phase[kept] == _RING
            self._store_in_ring(rows[kept[ring]], x32[kept[ring]])
            self._store_in_order(rows[kept[~ring]], x32[kept[~ring]])

        # t again: at the start, at each doubling of n, and before an excess would be lost to a full buffer
        full = (s["n_excess"][rows] >= self.config.max_excess) & (s["phase"][rows] == _GROWING)
        due = (n >= s["due"][rows]) & (judged | may_start) & ~anomaly
        again = due | full
        if again.any():
            self._set_peak_threshold(rows[again])
        refit = excess & ~anomaly & ~again
        if refit.any():
            self._fit(rows[refit], _WARM_ITERATIONS)
        restarted = self._count_alarms(rows, anomaly)
        return Step(outcome, np.where(judged, z, np.nan), probability, restarted)

    def pack(self, rows: IntArray) -> AnyArray:
        """Return the whole state of the rows, (K,) of `dtype`."""
        packed = np.empty(len(rows), self._dtype)
        for name in self._fields:
            packed[name] = self._state[name][rows]
        return packed

    def unpack(self, rows: IntArray, packed: AnyArray) -> None:
        """Set the state of the rows to what `pack` gave.

        Raises:
            StateError: another layout, or a field is out of its bounds; no row has changed.
        """
        if packed.dtype != self._dtype or packed.shape != (len(rows),):
            raise StateError(
                f"packed threshold state is {packed.shape} of {packed.dtype.itemsize} bytes; expected {(len(rows),)} "
                f"of {self._dtype.itemsize} (max_excess={self.config.max_excess}); rebuild from the log"
            )
        _validate(packed, self.config.max_excess, self.config.q_max)
        for name in self._fields:
            self._state[name][rows] = packed[name]
        self._set_bar(rows)

    def _probability(self, rows: IntArray, x: Float64Array, anomaly: BoolArray) -> Float64Array:
        """Return the tail probability of scores above t, <= q exactly for the anomalies in spite of rounding."""
        s = self._state
        t, shape, q = s["t"][rows], s["shape"][rows], s["q"][rows]
        mass = _tail_mass(s["share"][rows], q)
        unit = tail_quantile(q, peak_threshold=0.0, shape=shape, scale=1.0, mass=mass)
        # the scale at which the fitted tail meets z_q at q: z_q lies above the plain quantile, for doubt in the fit
        p = tail_probability(x, peak_threshold=t, shape=shape, scale=(s["z"][rows] - t) / unit, mass=mass)
        return np.where(anomaly, np.minimum(p, q), np.maximum(p, np.nextafter(q, 1.0)))

    def _store_in_ring(self, rows: IntArray, x32: npt.NDArray[np.float32]) -> None:
        """Put an excess in the place of the oldest one."""
        if not len(rows):
            return
        s, size = self._state, self.config.max_excess
        cursor = s["cursor"][rows].astype(np.int64)
        s["peaks"][rows, cursor] = x32
        s["ceilings"][rows, cursor] = s["z"][rows]
        cursor = (cursor + 1) % size
        s["cursor"][rows] = cursor
        s["held"][rows] = np.minimum(s["held"][rows] + 1, size)
        s["n_excess"][rows] += 1
        turned = rows[cursor == 0]
        if len(turned):
            self._turn(turned)

    def _turn(self, rows: IntArray) -> None:
        """Close a turn of the ring: forget old counts; grow again where excesses come far too often."""
        s, size = self._state, self.config.max_excess
        n = s["n"][rows]
        recent = n - s["mark"][rows]  # the scores whose excesses the ring holds
        drifted = size > _DRIFT * (1 - self.config.level) * recent
        old = ~drifted & (s["n_excess"][rows] >= 4 * size)
        n = np.where(old, n // 2, n)
        s["n_excess"][rows] = np.where(old, s["n_excess"][rows] // 2, s["n_excess"][rows])
        s["n"][rows] = np.where(drifted, recent, n)
        s["mark"][rows] = np.where(drifted, 0, n)
        again = rows[drifted]
        if len(again):
            s["phase"][again] = _GROWING
            s["low"][again] = s["peaks"][again].min(axis=-1)
            s["n_excess"][again] = size  # so `step` sets t again
            self._set_bar(again)

    def _store_in_order(self, rows: IntArray, x32: npt.NDArray[np.float32]) -> None:
        """Append a score to the highest ones; of a full buffer the lowest leaves, the latest among equals."""
        if not len(rows):
            return
        s, size = self._state, self.config.max_excess
        held = s["held"][rows].astype(np.int64)
        full = held == size
        if full.any():
            crowded = rows[full]
            lowest = size - 1 - s["peaks"][crowded][:, ::-1].argmin(axis=-1)
            order = np.arange(size - 1)
            order = order + (order >= lowest[:, None])
            for name in ("peaks", "ceilings"):
                s[name][crowded, :-1] = np.take_along_axis(s[name][crowded], order, axis=-1)
        slot = np.where(full, size - 1, held)
        s["peaks"][rows, slot] = x32
        s["ceilings"][rows, slot] = s["z"][rows]
        s["held"][rows] = slot + 1
        s["n_excess"][rows] += x32 > s["t"][rows]
        self._set_bar(rows[slot == size - 1])

    def _set_bar(self, rows: IntArray) -> None:
        """Derive what a score has to exceed to be stored: t in the ring, else the lowest of a full buffer."""
        s = self._state
        lowest = s["peaks"][rows].min(axis=-1)  # -inf until the buffer is full
        self._bar[rows] = np.where(s["phase"][rows] == _RING, s["t"][rows], lowest)

    def _set_peak_threshold(self, rows: IntArray) -> None:
        """Set t to the exact quantile of all scores so far, and fit anew; final once n is full."""
        for start in range(0, len(rows), _CHUNK):
            self._set_peak_threshold_chunk(rows[start : start + _CHUNK])

    def _set_peak_threshold_chunk(self, rows: IntArray) -> None:
        s, size, config = self._state, self.config.max_excess, self.config
        first = s["t"][rows] == np.inf
        if first.any():
            self._drop_outliers(rows[first], self._exact_quantile(rows[first]))
        n = s["n"][rows]
        t = self._exact_quantile(rows)[:, None]
        final = n >= config.n_full
        peaks = s["peaks"][rows]
        excess = peaks > t
        count = excess.sum(axis=-1)
        # a tail over t is one over a higher t too, of the same shape and a scale that moves with it
        moved = s["scale"][rows] + s["shape"][rows] * (t[:, 0] - np.where(first, 0.0, s["t"][rows]))
        s["scale"][rows] = np.where(first, 0.0, np.maximum(moved, 0.0))
        s["t"][rows] = t[:, 0]
        s["n_excess"][rows] = count
        s["phase"][rows] = np.where(final, _RING, _GROWING)
        s["due"][rows] = np.where(final, _NEVER, np.minimum(2 * n, np.maximum(config.n_full, n + 1)))
        if final.any():  # close the ranks: excesses first, in order of arrival
            ready = rows[final]
            order = np.argsort(~excess[final], axis=-1, kind="stable")
            unused = np.arange(size) >= count[final][:, None]
            for name, empty in (("peaks", -np.inf), ("ceilings", np.inf)):
                s[name][ready] = np.where(unused, empty, np.take_along_axis(s[name][ready], order, axis=-1))
            s["held"][ready] = count[final]
            s["cursor"][ready] = count[final]  # below size, for k is
            s["mark"][ready] = 0
        self._set_bar(rows)
        self._fit(rows[first], _COLD_ITERATIONS)
        self._fit(rows[~first], _MOVED_ITERATIONS)

    def _exact_quantile(self, rows: IntArray) -> npt.NDArray[np.float32]:
        """Return the (k+1)-th highest score, k the excesses that n scores should have."""
        s, size, config = self._state, self.config.max_excess, self.config
        k = np.floor(s["n"][rows] * (1 - config.level) + 1e-6).astype(np.int64)
        k = np.minimum(np.clip(k, config.min_excess, size - 1), s["held"][rows].astype(np.int64) - 1)
        ascending = np.sort(s["peaks"][rows], axis=-1)
        return np.asarray(np.take_along_axis(ascending, (size - 1 - k)[:, None], axis=-1)[:, 0], np.float32)

    def _drop_outliers(self, rows: IntArray, t: npt.NDArray[np.float32]) -> None:
        """Take gross outliers out of calibration, as alarms would be later, and note the ceiling that this makes.

        If more scores stand out than share 1 - level of all, they are a habit of the series, and stay.
        """
        s, size = self._state, self.config.max_excess
        peaks = s["peaks"][rows]
        excess = np.where(peaks > t[:, None], peaks.astype(np.float64) - t[:, None], 0.0)
        count = np.count_nonzero(excess, axis=-1)
        enough = count >= _FEW
        rows, t, excess, count = rows[enough], t[enough], excess[enough], count[enough]
        allowed = np.floor(s["n"][rows] * (1 - self.config.level) + 1e-6).astype(np.int64)
        trim = np.minimum(allowed + 1, count // 2)
        limit = outlier_limit(excess, trim, _CLEAN, shape=_CLEAN_SHAPE)
        cap = (t + limit).astype(np.float32)
        out = s["peaks"][rows] > cap[:, None]
        dropped = out.sum(axis=-1)
        some = (dropped > 0) & (dropped <= allowed)
        rows, out, dropped, cap = rows[some], out[some], dropped[some], cap[some]
        if not len(rows):
            return
        order = np.argsort(out | (s["peaks"][rows] == -np.inf), axis=-1, kind="stable")
        held = s["held"][rows] - dropped
        unused = np.arange(size) >= held[:, None]
        s["peaks"][rows] = np.where(unused, -np.inf, np.take_along_axis(s["peaks"][rows], order, axis=-1))
        s["ceilings"][rows] = np.where(unused, np.inf, cap[:, None])
        s["held"][rows] = held
        s["n"][rows] -= dropped

    def _fit(self, rows: IntArray, iterations: int) -> None:
        """Set shape, scale, tail mass and z_q from the excesses held; start from the present fit, if any."""
        for start in range(0, len(rows), _CHUNK):
            self._fit_chunk(rows[start : start + _CHUNK], iterations)

    def _fit_chunk(self, rows: IntArray, iterations: int) -> None:
        s = self._state
        excess, count, width = self._excesses(rows)
        t = s["t"][rows]
        ceiling = np.where(excess > 0, s["ceilings"][rows].astype(np.float64) - t[:, None], np.inf)
        none = count == 0
        excess[none, 0] = np.where(width > 0, width, 1.0)[none]  # a stand-in, so that the fit is defined
        mean = excess.sum(axis=-1) / np.maximum(count, 1)
        fit = refit_gpd(
            excess,
            ceiling,
            np.maximum(count, 1),
            s["shape"][rows],
            np.where(s["scale"][rows] > 0, s["scale"][rows], mean),
            iterations=iterations,
            shape_mean=_SHAPE_MEAN,
            shape_spread=_SHAPE_SPREAD,
        )
        for name, value in fit._asdict().items():
            s[name][rows] = value
        s["share"][rows] = s["n_excess"][rows] / s["n"][rows]
        s["z"][rows] = self._quantile(rows, count, width)

    def _set_z(self, rows: IntArray) -> None:
        """Set z_q anew from the tail fitted last."""
        for start in range(0, len(rows), _CHUNK):
            part = rows[start : start + _CHUNK]
            _, count, width = self._excesses(part)
            self._state["z"][part] = self._quantile(part, count, width)

    def _excesses(self, rows: IntArray) -> tuple[Float64Array, IntArray, Float64Array]:
        """Return the excesses held, 0 where there is none, (K, M), their number and how far the scores reach, (K,)."""
        s = self._state
        t = s["t"][rows]
        peaks = s["peaks"][rows].astype(np.float64)
        excess = np.where(peaks > t[:, None], peaks - t[:, None], 0.0)
        count = np.count_nonzero(excess, axis=-1)
        width = np.where(count > 0, excess.max(axis=-1), t - s["low"][rows])
        return excess, count, np.where(width > 0, width, np.abs(t) / 1024)  # all equal: their size is the only unit

    def _quantile(self, rows: IntArray, count: IntArray, width: Float64Array) -> Float64Array:
        """Return z_q, the predictive quantile of the tail fitted last."""
        s = self._state
        fit = TailFit(*(s[name][rows] for name in TailFit._fields))
        q = s["q"][rows]
        hazard = np.log(_tail_mass(s["share"][rows], q) / q)
        doubt = fit.hazard_variance(hazard) + 1.0 / np.maximum(s["n_excess"][rows], 1)
        hazard = hazard + np.minimum(doubt / 2.0, hazard)
        reach = tail_quantile(np.exp(-hazard), peak_threshold=0.0, shape=fit.shape, scale=fit.scale, mass=1.0)
        reach = np.where(count < _FEW, np.maximum(reach, 2.0 * width), reach)
        return np.asarray(s["t"][rows] + np.where(count > 0, reach, width), np.float64)

    def _count_alarms(self, rows: IntArray, anomaly: BoolArray) -> BoolArray:
        """Start a row anew when it has alarmed for so long that what alarms is the new normal; tell which."""
        restarted = np.zeros(len(rows), np.bool_)
        if not self.config.max_alarms:
            return restarted
        s = self._state
        alarms = s["alarms"][rows]
        if not (anomaly.any() or alarms.any()):
            return restarted
        alarms = np.where(anomaly, alarms + 1, alarms - (alarms > 0)).astype(np.uint16)
        s["alarms"][rows] = alarms
        restarted = alarms >= self.config.max_alarms
        if restarted.any():
            again = rows[restarted]
            risk = s["q"][again]
            self.reset(again)
            s["q"][again] = risk
        return restarted


def _tail_mass(share: Float64Array, q: Float64Array) -> Float64Array:
    """Return P(score > t): alarms are not in the share, and they are q of all."""
    return np.asarray(np.minimum(np.maximum(share * (1 - q) + q, _MIN_MASS_RATIO * q), 1.0), np.float64)


def _scrambled(size: int) -> IntArray:
    """Return 0 ... size-1 in an order in which any stretch is spread evenly: by the golden ratio."""
    return np.argsort((np.arange(size) * 0.6180339887498949) % 1.0, kind="stable")


def _validate(packed: AnyArray, size: int, q_max: float) -> None:
    """Raise StateError, naming field and value, unless every row is one that `Spot` could have made."""
    f = {name: packed[name] for name in packed.dtype.names or ()}
    phase, held, n, n_excess, t, z = (f[name] for name in ("phase", "held", "n", "n_excess", "t", "z"))
    fresh, ring = phase == _CALIBRATING, phase == _RING
    used = np.arange(size) < held[:, None]
    peaks, ceilings = f["peaks"], f["ceilings"]
    above = (used & (peaks > t[:, None])).sum(axis=-1)
    finite = np.isfinite
    checks: tuple[tuple[str, Any], ...] = (
        ("phase", phase <= _RING),
        ("n", (n >= 0) & (n < _NEVER)),
        ("held", (held <= size) & (held <= n) & (ring | (held >= np.minimum(n, size // 2)))),
        ("cursor", np.where(ring, f["cursor"] < size, f["cursor"] == 0)),
        ("n_excess", (n_excess <= n) & np.where(ring, (n_excess >= held) & (held == above), n_excess == above)),
        ("due", (f["due"] > 0) & (f["due"] <= _NEVER)),
        ("mark", (f["mark"] >= 0) & (f["mark"] <= n)),
        ("t", np.where(fresh, t == np.inf, finite(t))),
        ("z", np.where(fresh, z == np.inf, finite(z) & (z >= t))),
        ("shape", (f["shape"] >= SHAPE_MIN) & (f["shape"] <= SHAPE_MAX)),
        ("scale", finite(f["scale"]) & (f["scale"] >= 0)),
        ("var_shape", finite(f["var_shape"]) & (f["var_shape"] >= 0)),
        ("covariance", finite(f["covariance"])),
        ("var_log_scale", finite(f["var_log_scale"]) & (f["var_log_scale"] >= 0)),
        ("share", (f["share"] >= 0) & (f["share"] <= 1)),
        ("q", (f["q"] > 0) & (f["q"] <= q_max)),
        ("low", np.where(n == 0, f["low"] == np.inf, finite(f["low"]))),
        ("peaks", np.where(used, finite(peaks), peaks == -np.inf).all(axis=-1)),
        ("ceilings", np.where(used, ceilings >= peaks, ceilings == np.inf).all(axis=-1)),
    )
    for name, good in checks:
        if not good.all():
            row = int(np.flatnonzero(~good)[0])
            raise StateError(
                f"threshold state {row} of {len(packed)} is damaged: {name}={f[name][row]!r} does not fit the rest; "
                "drop it and rebuild from the log"
            )
