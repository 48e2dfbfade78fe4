"""What each series keeps of its scores, and the tail fitted to it: a structure of arrays, a row a series.

The highest scores are what a tail is fitted to. Until t is final a row keeps its `max_excess` highest in order of
arrival; then they are a ring of the excesses over t, the newest in the place of the oldest.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from models.arrays import grown
from models.errors import StateError
from models.gpd import Float64Array, IntArray, TailFit, refit_gpd
from models.outliers import find_incidents, find_outliers
from models.phases import CALIBRATING, GROWING, RELEARNING, RING, validate
from models.prior import Prior
from models.risk import FEW, SHAPE_MEAN, SHAPE_SPREAD, PotConfig, predictive_reach

Float32Array: TypeAlias = npt.NDArray[np.float32]
BoolArray: TypeAlias = npt.NDArray[np.bool_]
AnyArray: TypeAlias = npt.NDArray[Any]

COLD_ITERATIONS, MOVED_ITERATIONS, WARM_ITERATIONS = 8, 4, 2  # Newton steps: first fit, new t, one new excess
_PATIENCE = 2  # times the scores that should fill a ring, between looks whether excesses come far too rarely
_DRIFT = 4.0  # excesses this many times as often, or as rarely, as the level says: t is out of date
_CHUNK = 64  # rows fitted at once: what they need stays in the processor's cache


class Tails:
    """The state of the rows, and all of the threshold that does not happen at every score."""

    def __init__(self, config: PotConfig, capacity: int, prior: Prior | None) -> None:
        self.config = config
        self.prior = prior
        size = config.max_excess
        self._fields: dict[str, tuple[Any, Any]] = {  # name: type in a packed row, value of a fresh row
            "phase": ("u1", CALIBRATING),
            "held": ("<u2", 0),  # slots in use
            "cursor": ("<u2", 0),  # ring: the next slot to overwrite, the oldest
            "n": ("<i8", 0),  # scores that were learnt from
            "n_excess": ("<i8", 0),
            "due": ("<i8", config.min_scores),  # n at which t is set again, or looked at
            "mark": ("<i8", 0),  # ring: n when slot 0 was last reached
            "t": ("<f8", np.inf),
            "shape": ("<f8", 0.0),
            "scale": ("<f8", 0.0),
            "var_shape": ("<f8", 0.0),
            "covariance": ("<f8", 0.0),
            "var_log_scale": ("<f8", 0.0),
            "share": ("<f8", 1.0),  # of excesses among the scores that are not anomalies, at the fit
            "q": ("<f8", config.q),
            "z": ("<f8", np.inf),  # of a calibrating row that of the prior; inf while there is none
            "low": ("<f4", np.inf),  # the lowest score until t is final: gives a width when the highest are all equal
            "peaks": (("<f4", (size,)), -np.inf),  # scores; in order of arrival until t is final
            "ceilings": (
                ("<f4", (size,)),
                np.inf,
            ),  # z_q in force when the peak came; below GROWING n, its place in time
            "depth": ("<u2", 0),  # of the moving mean that scores are taken relative to; 0: none
            "settled": ("<u2", 0),  # scores in that mean, at most depth
            "mean": ("<f8", 0.0),
            "alarms": ("<u4", 0),  # a leaky count: +8 an anomaly, -1 any other point
            "judged": ("<i8", 0),  # scores, since the threshold's start
            "n_alarms": ("<u4", 0),
            "onsets": ("<u4", 0),  # alarms that came when the leaky count was 0: of a run only the first
            "promised": ("<f8", 0.0),  # alarms, beyond q judged: what other risks than the present one add
        }
        self.dtype = np.dtype([(name, kind) for name, (kind, _) in self._fields.items()])
        self.state: dict[str, AnyArray] = {name: np.empty((0, *self.dtype[name].shape), self.dtype[name].base)
                                            for name in self._fields}  # fmt: skip
        self.bar = np.empty(0, np.float32)  # derived: the score a row has to exceed to be stored
        self.any_depth = False  # derived: whether any row may have a depth
        self.resize(capacity)

    @property
    def capacity(self) -> int:
        """Return the number of rows."""
        return len(self.bar)

    # -- state ----------------------------------------------------------------------------------------------------

    def resize(self, capacity: int) -> None:
        """Grow to `capacity` rows; the present ones keep their state, the new ones are fresh."""
        old = self.capacity
        if capacity < old:
            raise ValueError(f"capacity={capacity} is below the {old} rows in use; rows are never taken away")
        for name, (_, fresh) in self._fields.items():
            self.state[name] = grown(self.state[name], capacity, fresh)
        self.bar = grown(self.bar, capacity, -np.inf)
        self.follow_prior(np.arange(old, capacity))

    def reset(self, rows: IntArray) -> None:
        """Make the rows fresh."""
        for name, (_, fresh) in self._fields.items():
            self.state[name][rows] = fresh
        self.bar[rows] = -np.inf
        self.follow_prior(rows)

    def restart(self, rows: IntArray) -> None:
        """Make the rows calibrate from nothing at the risk and depth that they have, and without the prior."""
        kept = {name: self.state[name][rows] for name in ("q", "depth")}
        self.reset(rows)
        for name, value in kept.items():
            self.state[name][rows] = value
        self.leave_prior(rows)

    def copy_rows(self, source: IntArray, target: IntArray) -> None:
        """Give the target rows the whole state of the source rows."""
        for array in self.state.values():
            array[target] = array[source]
        self.bar[target] = self.bar[source]

    def pack(self, rows: IntArray) -> AnyArray:
        """Return the whole state of the rows, (K,) of `dtype`."""
        packed = np.empty(len(rows), self.dtype)
        for name in self._fields:
            packed[name] = self.state[name][rows]
        return packed

    def unpack(self, rows: IntArray, packed: AnyArray) -> None:
        """Set the state of the rows to what `pack` gave; those that a prior judges have that of this object."""
        if packed.dtype != self.dtype or packed.shape != (len(rows),):
            raise StateError(
                f"packed threshold state is {packed.shape} of {packed.dtype.itemsize} bytes; expected {(len(rows),)} "
                f"of {self.dtype.itemsize} (max_excess={self.config.max_excess}); rebuild from the log"
            )
        validate(packed, self.config)
        for name in self._fields:
            self.state[name][rows] = packed[name]
        self.any_depth |= bool(packed["depth"].any())
        by_prior = rows[(packed["phase"] == CALIBRATING) & (packed["z"] < np.inf)]
        self.leave_prior(by_prior)
        self.follow_prior(by_prior)
        self.set_bar(rows)

    # -- calibration ------------------------------------------------------------------------------------------------

    def calibrated(self, x: Float32Array) -> Tails:
        """Return one row that has learnt from calibration scores, (N,)."""
        config, size = self.config, self.config.max_excess
        one, only, n = Tails(config, 1, self.prior), np.zeros(1, np.int64), len(x)
        s = one.state
        if n == 0:
            return one
        s["low"][0] = x.min()
        if n > config.n_full:
            k = int(np.floor(n * (1 - config.level) + 1e-6))
            t = np.partition(x, n - 1 - k)[n - 1 - k]
            over = np.sort(x[x > t])
            if len(over) > size:
                n = round(n * size / len(over))
                over = over[((np.arange(size) + 0.5) * (len(over) / size)).astype(np.int64)]
                over = over[_scrambled(size)]  # the ring forgets in this order
            for name, value in {"phase": RING, "held": len(over), "t": t, "n": n}.items():
                s[name][0] = value
            s["peaks"][0, : len(over)] = over
            for name in TailFit._fields:
                s[name][0] = 0.0  # no prior
            one.drop_outliers(only, s["t"])
            held, n = int(s["held"][0]), int(s["n"][0])
            s["n_excess"][0], s["cursor"][0] = held, held % size
            s["mark"][0] = n if held == size else 0
            s["due"][0] = n + _PATIENCE * config.n_full
            one.set_bar(only)
            one.fit(only, COLD_ITERATIONS)
            return one
        kept = np.sort(np.argsort(-x, kind="stable")[:size])
        s["held"][0], s["n"][0] = len(kept), n
        s["peaks"][0, : len(kept)], s["ceilings"][0, : len(kept)] = x[kept], kept + 1
        if n >= config.min_scores:
            one.set_peak_threshold(only)
        else:
            one.set_bar(only)
        return one

    def set_from(self, one: Tails, rows: IntArray) -> None:
        """Give rows the state of a single one; each keeps its risk and depth."""
        for name in self._fields:
            if name not in ("q", "depth"):
                self.state[name][rows] = one.state[name][0]
        self.bar[rows] = one.bar[0]
        self.set_quantile(rows)

    # -- the prior --------------------------------------------------------------------------------------------------

    def follow_prior(self, rows: IntArray) -> None:
        """Judge calibrating rows by the prior, if there is one."""
        if self.prior is None or not len(rows):
            return
        s = self.state
        for name, value in self.prior.tail._asdict().items():
            s[name][rows] = value
        s["t"][rows], s["share"][rows] = self.prior.t, self.prior.share
        s["z"][rows] = self.prior.quantile(s["q"][rows])

    def leave_prior(self, rows: IntArray) -> None:
        """Judge calibrating rows no longer."""
        for name in ("t", "z", "share", *TailFit._fields):
            self.state[name][rows] = self._fields[name][1]

    # -- the highest scores -----------------------------------------------------------------------------------------

    def store_in_ring(self, rows: IntArray, x: Float32Array) -> None:
        """Put an excess in the place of the oldest one."""
        if not len(rows):
            return
        s, size = self.state, self.config.max_excess
        cursor = s["cursor"][rows].astype(np.int64)
        s["peaks"][rows, cursor] = x
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
        s, size = self.state, self.config.max_excess
        n = s["n"][rows]
        recent = n - s["mark"][rows]  # the scores whose excesses the ring holds
        drifted = size > _DRIFT * (1 - self.config.level) * recent
        old = ~drifted & (s["n_excess"][rows] >= 4 * size)
        n = np.where(old, n // 2, n)
        s["n_excess"][rows] = np.where(old, s["n_excess"][rows] // 2, s["n_excess"][rows])
        s["n"][rows] = np.where(drifted, recent, n)
        s["mark"][rows] = np.where(drifted, 0, n)
        s["due"][rows] = n + _PATIENCE * self.config.n_full
        again = rows[drifted]
        if len(again):
            s["phase"][again] = GROWING
            s["low"][again] = s["peaks"][again].min(axis=-1)
            s["n_excess"][again] = size  # so `Spot.step` sets t again
            self.set_bar(again)

    def look_for_fall(self, rows: IntArray) -> None:
        """Let rows learn a new t whose excesses have come far too rarely since the ring last turned.

        Until they have they are judged by the fit that they have; the ring begins anew as the buffer of calibration.
        """
        s = self.state
        n = s["n"][rows]
        fallen = _DRIFT * s["cursor"][rows] < (1 - self.config.level) * (n - s["mark"][rows])
        s["due"][rows] = n + _PATIENCE * self.config.n_full
        again = rows[fallen]
        if len(again):
            for name in ("held", "cursor", "n", "mark", "low", "peaks", "ceilings"):
                s[name][again] = self._fields[name][1]
            s["phase"][again] = RELEARNING
            s["due"][again] = self.config.n_full  # not less: a quiet stretch is not to be taken for a fall
            self.set_bar(again)

    def store_in_order(self, rows: IntArray, x: Float32Array) -> None:
        """Append a score to the highest ones; of a full buffer the lowest leaves, the latest among equals."""
        if not len(rows):
            return
        s, size = self.state, self.config.max_excess
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
        grows = s["phase"][rows] == GROWING
        s["peaks"][rows, slot] = x
        s["ceilings"][rows, slot] = np.where(grows, s["z"][rows], s["n"][rows])
        s["held"][rows] = slot + 1
        s["n_excess"][rows] += grows & (x > s["t"][rows])
        self.set_bar(rows[slot == size - 1])

    def set_bar(self, rows: IntArray) -> None:
        """Derive what a score has to exceed to be stored: t in the ring, else the lowest of a full buffer."""
        s = self.state
        lowest = s["peaks"][rows].min(axis=-1)  # -inf until the buffer is full
        self.bar[rows] = np.where(s["phase"][rows] == RING, s["t"][rows], lowest)

    # -- t ----------------------------------------------------------------------------------------------------------

    def set_peak_threshold(self, rows: IntArray) -> None:
        """Set t to the exact quantile of all scores so far, and fit anew; final once n is full."""
        for start in range(0, len(rows), _CHUNK):
            self._set_peak_threshold_chunk(rows[start : start + _CHUNK])

    def _set_peak_threshold_chunk(self, rows: IntArray) -> None:
        s, size, config = self.state, self.config.max_excess, self.config
        first = s["phase"][rows] < GROWING
        if first.any():
            self._begin(rows[first])
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
        s["phase"][rows] = np.where(final, RING, GROWING)
        doubled = np.minimum(2 * n, np.maximum(config.n_full, n + 1))
        s["due"][rows] = np.where(final, n + _PATIENCE * config.n_full, doubled)
        if final.any():  # close the ranks: excesses first, in order of arrival
            ready = rows[final]
            order = np.argsort(~excess[final], axis=-1, kind="stable")
            unused = np.arange(size) >= count[final][:, None]
            for name, empty in (("peaks", -np.inf), ("ceilings", np.inf)):
                s[name][ready] = np.where(unused, empty, np.take_along_axis(s[name][ready], order, axis=-1))
            s["held"][ready] = count[final]
            s["cursor"][ready] = count[final]  # below size, for k is
            s["mark"][ready] = 0
        self.set_bar(rows)
        self.fit(rows[first], COLD_ITERATIONS)
        self.fit(rows[~first], MOVED_ITERATIONS)

    def _begin(self, rows: IntArray) -> None:
        """Turn what was collected into the beginning of a tail: without outliers, with a fit and counts of its own."""
        s = self.state
        place = s["ceilings"][rows]
        s["ceilings"][rows] = np.inf
        s["shape"][rows] = 0.0
        for name in ("judged", "n_alarms", "onsets", "promised"):
            s[name][rows] = 0
        again = ~self.drop_outliers(rows, self._exact_quantile(rows))
        if again.any():
            self._drop_incidents(rows[again], place[again])

    def _exact_quantile(self, rows: IntArray) -> Float32Array:
        """Return the (k+1)-th highest score, k the excesses that n scores should have."""
        s, size, config = self.state, self.config.max_excess, self.config
        k = np.minimum(
            np.clip(self._usual_excesses(rows), config.min_excess, size - 1), s["held"][rows].astype(np.int64) - 1
        )
        ascending = np.sort(s["peaks"][rows], axis=-1)
        return np.asarray(np.take_along_axis(ascending, (size - 1 - k)[:, None], axis=-1)[:, 0], np.float32)

    def drop_outliers(self, rows: IntArray, t: Float32Array) -> BoolArray:
        """Take gross outliers out of calibration; tell for which rows there were any."""
        out, cap = find_outliers(self.state["peaks"][rows], t, self._usual_excesses(rows))
        some = out.any(axis=-1)
        self._drop(rows[some], out[some], cap[some])
        return np.asarray(some)

    def _drop_incidents(self, rows: IntArray, place: Float32Array) -> None:
        """Take whole incidents out of calibration; place is n at each peak, (K, M)."""
        s = self.state
        out, cap = find_incidents(s["peaks"][rows], place, s["held"][rows].astype(np.int64), self._usual_excesses(rows))
        some = out.any(axis=-1)
        self._drop(rows[some], out[some], cap[some])

    def _usual_excesses(self, rows: IntArray) -> IntArray:
        return np.floor(self.state["n"][rows] * (1 - self.config.level) + 1e-6).astype(np.int64)

    def _drop(self, rows: IntArray, out: BoolArray, cap: Float32Array) -> None:
        """Forget peaks, and note the ceiling that this makes for the others."""
        if not len(rows):
            return
        s = self.state
        order = np.argsort(out | (s["peaks"][rows] == -np.inf), axis=-1, kind="stable")
        dropped = out.sum(axis=-1)
        held = s["held"][rows] - dropped
        unused = np.arange(self.config.max_excess) >= held[:, None]
        s["peaks"][rows] = np.where(unused, -np.inf, np.take_along_axis(s["peaks"][rows], order, axis=-1))
        s["ceilings"][rows] = np.where(unused, np.inf, cap[:, None])
        s["held"][rows] = held
        s["n"][rows] -= dropped

    # -- the fit ----------------------------------------------------------------------------------------------------

    def fit(self, rows: IntArray, iterations: int) -> None:
        """Set shape, scale, share and z_q from the excesses held; start from the present fit, if any."""
        for start in range(0, len(rows), _CHUNK):
            self._fit_chunk(rows[start : start + _CHUNK], iterations)

    def _fit_chunk(self, rows: IntArray, iterations: int) -> None:
        s = self.state
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
            shape_mean=SHAPE_MEAN,
            shape_spread=SHAPE_SPREAD,
        )
        for name, value in fit._asdict().items():
            s[name][rows] = value
        s["share"][rows] = s["n_excess"][rows] / s["n"][rows]
        s["z"][rows] = self._quantile(rows, count, width)

    def set_quantile(self, rows: IntArray) -> None:
        """Set z_q anew from the tail fitted last, or from the prior."""
        s = self.state
        calibrating = s["phase"][rows] == CALIBRATING
        by_prior = rows[calibrating & (s["z"][rows] < np.inf)]
        if self.prior is not None and len(by_prior):
            s["z"][by_prior] = self.prior.quantile(s["q"][by_prior])
        rows = rows[~calibrating]
        for start in range(0, len(rows), _CHUNK):
            part = rows[start : start + _CHUNK]
            _, count, width = self._excesses(part)
            s["z"][part] = self._quantile(part, count, width)

    def _excesses(self, rows: IntArray) -> tuple[Float64Array, IntArray, Float64Array]:
        """Return the excesses held, 0 where there is none, (K, M), their number and how far the scores reach, (K,)."""
        s = self.state
        t = s["t"][rows]
        peaks = s["peaks"][rows].astype(np.float64)
        excess = np.where(peaks > t[:, None], peaks - t[:, None], 0.0)
        count = np.count_nonzero(excess, axis=-1)
        width = np.where(count > 0, excess.max(axis=-1), t - s["low"][rows])
        return excess, count, np.where(width > 0, width, np.abs(t) / 1024)  # all equal: their size is the only unit

    def _quantile(self, rows: IntArray, count: IntArray, width: Float64Array) -> Float64Array:
        """Return z_q, the predictive quantile of the tail fitted last."""
        s = self.state
        count = np.where(s["phase"][rows] == RELEARNING, s["n_excess"][rows], count)  # those of the fit are gone
        fit = TailFit(*(s[name][rows] for name in TailFit._fields))
        reach = predictive_reach(fit, s["share"][rows], s["n_excess"][rows], s["q"][rows])
        reach = np.where(count < FEW, np.maximum(reach, 2.0 * width), reach)
        z = s["t"][rows] + np.where(count > 0, reach, width)
        # Relative to a mean that falls, z_q may lie far below it; no score below the mean is an alarm.
        return np.asarray(np.where(s["depth"][rows] > 0, np.maximum(z, 0.0), z), np.float64)


def _scrambled(size: int) -> IntArray:
    """Return 0 ... size-1 in an order in which any stretch is spread evenly: by the golden ratio."""
    return np.argsort((np.arange(size) * 0.6180339887498949) % 1.0, kind="stable")
