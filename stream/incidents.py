r"""The life of an incident: consecutive anomalous points of a series are one.

State \ input   QUIET   RECOVERED         HELD            ANOMALOUS       WORSE           LASTING
CLEAR           -       -                 PENDING         OPEN: opened    OPEN: opened    OPEN: opened
  muted         -       -                 PENDING         MUTED           MUTED           MUTED
PENDING         CLEAR   CLEAR             -               OPEN: opened    OPEN: opened    OPEN: opened
  muted         CLEAR   CLEAR             -               MUTED           MUTED           MUTED
MUTED           -       CLEAR             OPEN: opened    OPEN: opened    OPEN: opened    CLEAR: accepted_muted
  muted         -       CLEAR             -               -               -               CLEAR: accepted_muted
OPEN            -       CLEAR: resolved   -               -               -: updated      CLEAR: accepted
  muted         -       CLEAR: resolved   -               -               -: updated      CLEAR: accepted

CLEAR      nothing goes on
PENDING    the last points are anomalous, but fewer than `open_after`
MUTED      an incident goes on that nobody was told of
OPEN       an incident goes on

QUIET      a normal point that does not end an incident
RECOVERED  the `recover_after`-th calm point since the last anomalous one
HELD       an anomalous point, fewer than `open_after` in a row, while no incident goes on
ANOMALOUS  an anomalous point, no graver than those before
WORSE      an anomalous point of a higher severity
LASTING    an anomalous point at least `accept_after` after the first one: the shift is the new normal

A normal point is calm if its score/threshold lies below `recover_ratio`; otherwise it is grey and is not counted: what
hovers at the edge has not recovered.

A point is muted in a maintenance window, or within the cooldown after an end that was published. Only the opening is
muted: an incident begins, grows and ends at the same points either way. If it outlasts the mute it is told late, with
its real beginning; what was told is told to its end. ACCEPTED_MUTED publishes nothing, but the caller must take the
shift for normal as after any other.

Points that were not judged (missing, or without a threshold) are no input: they neither prolong nor resolve. All arrays
hold one row a series.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Self

import numpy as np
import numpy.typing as npt

from models.arrays import grown
from stream.columns import BoolArray, Float64Array, Int8Array, Int32Array, Int64Array, UInt64Array

NEVER = -1


class State(IntEnum):
    """Whether a series has an incident; from MUTED on it has one."""

    CLEAR = 0
    PENDING = 1
    MUTED = 2
    OPEN = 3


class Input(IntEnum):
    """What a scored point means to the incident of its series; from HELD on it is anomalous."""

    QUIET = 0
    RECOVERED = 1
    HELD = 2
    ANOMALOUS = 3
    WORSE = 4
    LASTING = 5


class Action(IntEnum):
    """What is to be published; of ACCEPTED_MUTED nothing is, but the shift is accepted."""

    NONE = 0
    OPENED = 1
    UPDATED = 2
    RESOLVED = 3
    ACCEPTED = 4
    ACCEPTED_MUTED = 5


class Severity(IntEnum):
    """How improbable the gravest point of an incident is, held against the risk q; equal across KPIs and models."""

    NONE = 0
    WARNING = 1
    MAJOR = 2
    CRITICAL = 3


_S, _A = State, Action
# (state, input, muted); each cell reads (not muted, muted)
NEXT_STATE = np.array(
    [
        [(_S.CLEAR,) * 2, (_S.CLEAR,) * 2, (_S.PENDING,) * 2, *[(_S.OPEN, _S.MUTED)] * 3],
        [(_S.CLEAR,) * 2, (_S.CLEAR,) * 2, (_S.PENDING,) * 2, *[(_S.OPEN, _S.MUTED)] * 3],
        [(_S.MUTED,) * 2, (_S.CLEAR,) * 2, *[(_S.OPEN, _S.MUTED)] * 3, (_S.CLEAR,) * 2],
        [(_S.OPEN,) * 2, (_S.CLEAR,) * 2, *[(_S.OPEN,) * 2] * 3, (_S.CLEAR,) * 2],
    ],
    np.uint8,
)
_NOTHING, _OPENS = (_A.NONE,) * 2, (_A.OPENED, _A.NONE)
ACTION = np.array(
    [
        [_NOTHING, _NOTHING, _NOTHING, _OPENS, _OPENS, _OPENS],
        [_NOTHING, _NOTHING, _NOTHING, _OPENS, _OPENS, _OPENS],
        [_NOTHING, _NOTHING, _OPENS, _OPENS, _OPENS, (_A.ACCEPTED_MUTED,) * 2],
        [_NOTHING, (_A.RESOLVED,) * 2, _NOTHING, _NOTHING, (_A.UPDATED,) * 2, (_A.ACCEPTED,) * 2],
    ],
    np.uint8,
)


def severity_of(probability: Float64Array, q: Float64Array | float) -> Int8Array:
    """Return the severity of anomalous points: p <= q/100 critical, <= q/10 major, else warning. (K,) uint8."""
    return np.select(
        [probability <= q / 100, probability <= q / 10], [Severity.CRITICAL, Severity.MAJOR], Severity.WARNING
    ).astype(np.uint8)


@dataclass(frozen=True, slots=True)
class IncidentPolicy:
    """When an incident begins and ends: a row for each of K points, as its series has it.

    Attributes:
        open_after: anomalous points in a row that open an incident, (K,) integer >= 1.
        recover_after: calm points that resolve it, (K,) integer >= 1.
        recover_ratio: a normal point is calm below this score/threshold, (K,) float64; infinite: always.
        accept_after_ms: an incident that lasts this long is the new normal, (K,) int64.
        cooldown_ms: after an end that was told of no opening is published for so long, (K,) int64; 0: none.
    """

    open_after: npt.NDArray[np.integer]
    recover_after: npt.NDArray[np.integer]
    recover_ratio: Float64Array
    accept_after_ms: Int64Array
    cooldown_ms: Int64Array

    def take(self, which: npt.NDArray[np.integer] | BoolArray) -> Self:
        """Return the rows that `which` (indices or a mask) names, in its order."""
        return type(self)(*(getattr(self, f.name)[which] for f in fields(self)))


class Incidents:
    """The incident of each of S series, structure of arrays.

    Attributes:
        state: `State`, (S,) uint8.
        id: of the newest incident that was told of, (S,) uint64; kept, for the model that it is derived from may change
            before the end.
        opened_ms: event time of the first anomalous point, (S,) int64; `last_ms` of the latest one.
        severity: the gravest `Severity` so far, (S,) uint8.
        normal_run: calm points since the last anomalous one, (S,) int32.
        anomalous_run: anomalous points in a row up to the last one, (S,) int32.
        anomalies: anomalous points so far, (S,) int32.
        peak_ratio: the largest score/threshold so far, (S,) float64; `peak_ms` and `peak_value` say where. The value is
            NaN where the points have no single one.
        resolved_ms: event time of the newest end that was told of, (S,) int64; NEVER without one.
    """

    ARRAYS = (
        "state",
        "id",
        "opened_ms",
        "severity",
        "last_ms",
        "normal_run",
        "anomalous_run",
        "anomalies",
        "peak_ratio",
        "peak_ms",
        "peak_value",
        "resolved_ms",
    )

    def __init__(self, capacity: int = 0) -> None:
        self.state: Int8Array = np.zeros(0, np.uint8)
        self.id: UInt64Array = np.zeros(0, np.uint64)
        self.opened_ms: Int64Array = np.zeros(0, np.int64)
        self.last_ms: Int64Array = np.zeros(0, np.int64)
        self.severity: Int8Array = np.zeros(0, np.uint8)
        self.normal_run: Int32Array = np.zeros(0, np.int32)
        self.anomalous_run: Int32Array = np.zeros(0, np.int32)
        self.anomalies: Int32Array = np.zeros(0, np.int32)
        self.peak_ratio: Float64Array = np.zeros(0)
        self.peak_ms: Int64Array = np.zeros(0, np.int64)
        self.peak_value: Float64Array = np.zeros(0)
        self.resolved_ms: Int64Array = np.zeros(0, np.int64)
        self.resize(capacity)

    def resize(self, capacity: int) -> None:
        """Give room to `capacity` series; those that are there keep their rows."""
        for name in self.ARRAYS:
            setattr(self, name, grown(getattr(self, name), capacity, NEVER if name == "resolved_ms" else 0))

    def reset(self, slot: Int64Array) -> None:
        """Make these rows those of series on which nothing has gone on yet."""
        for name in self.ARRAYS:
            getattr(self, name)[slot] = NEVER if name == "resolved_ms" else 0

    def copy_rows(self, source: npt.NDArray[np.integer], target: npt.NDArray[np.integer]) -> None:
        """Make the rows `target` what the rows `source` are."""
        for name in self.ARRAYS:
            array = getattr(self, name)
            array[target] = array[source]

    def step(
        self,
        slot: Int32Array,
        timestamp_ms: Int64Array,
        anomalous: BoolArray,
        severity: Int8Array,
        ratio: Float64Array,
        value: Float64Array,
        muted: BoolArray,
        lasting: BoolArray,
        *,
        policy: IncidentPolicy,
    ) -> Int8Array:
        """Feed one judged point of each of K series (each once); return what to publish of each, (K,) `Action`.

        The `id` of an incident that opens is the caller's to set, from `opened_ms`, which lies before this point if the
        incident was held or muted. The fields of one that has just ended stay readable until the next anomalous point.

        Args:
            slot: the series, (K,), no two alike.
            timestamp_ms: event time, (K,).
            anomalous: (K,).
            severity: `Severity`, (K,); read where anomalous.
            ratio: score/threshold, (K,).
            value: (K,); NaN where there is no single one.
            muted: the series is in a maintenance window, (K,).
            lasting: the point is LASTING whenever the incident began, (K,): the threshold has given it up.
            policy: of each point, (K,).
        """
        actions = np.zeros(len(slot), np.uint8)
        concerned = np.flatnonzero(anomalous | (self.state[slot] != State.CLEAR))
        if not len(concerned):
            return actions
        slot, timestamp_ms, anomalous = slot[concerned], timestamp_ms[concerned], anomalous[concerned]
        severity, ratio, value = severity[concerned], ratio[concerned], value[concerned]
        policy, state = policy.take(concerned), self.state[slot]

        begins = state == State.CLEAR  # anomalous, then, or it were of no concern
        self.opened_ms[slot[begins]] = timestamp_ms[begins]
        for counter in (self.severity, self.anomalous_run, self.anomalies, self.peak_ratio):
            counter[slot[begins]] = 0
        calm = ~anomalous & (ratio < policy.recover_ratio)
        self.normal_run[slot] = np.where(anomalous, 0, self.normal_run[slot] + calm)
        self.anomalous_run[slot] = np.where(anomalous, self.anomalous_run[slot] + 1, 0)

        held = (state < State.MUTED) & (self.anomalous_run[slot] < policy.open_after)
        lasts = lasting[concerned] | (timestamp_ms - self.opened_ms[slot] >= policy.accept_after_ms)
        recovered = calm & (self.normal_run[slot] >= policy.recover_after)
        inputs = np.select(
            [recovered, ~anomalous, held, lasts, severity > self.severity[slot]],
            [Input.RECOVERED, Input.QUIET, Input.HELD, Input.LASTING, Input.WORSE],
            Input.ANOMALOUS,
        )
        resolved_ms = self.resolved_ms[slot]
        cooling = (resolved_ms != NEVER) & (timestamp_ms - resolved_ms < policy.cooldown_ms)
        cell = (state, inputs, (muted[concerned] | cooling).astype(np.intp))
        action = ACTION[cell]
        self.state[slot] = NEXT_STATE[cell]
        ended = (action == Action.RESOLVED) | (action == Action.ACCEPTED)
        self.resolved_ms[slot[ended]] = timestamp_ms[ended]

        hit = slot[anomalous]
        self.anomalies[hit] += 1
        self.last_ms[hit] = timestamp_ms[anomalous]
        self.severity[hit] = np.maximum(self.severity[hit], severity[anomalous])
        peak = anomalous & (ratio > self.peak_ratio[slot])
        self.peak_ratio[slot[peak]] = ratio[peak]
        self.peak_ms[slot[peak]] = timestamp_ms[peak]
        self.peak_value[slot[peak]] = value[peak]
        actions[concerned] = action
        return actions
