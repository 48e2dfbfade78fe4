r"""The life of an incident: consecutive anomalous points of a series are one.

State \ input   QUIET   RECOVERED          ANOMALOUS        WORSE              LASTING
CLEAR           -       -                  OPEN: opened     OPEN: opened       OPEN: opened
OPEN            -       CLEAR: resolved    -                -: updated         CLEAR: accepted

QUIET      a normal point, fewer than `recover_after` in a row
RECOVERED  the `recover_after`-th normal point in a row
ANOMALOUS  an anomalous point, no graver than the incident is already
WORSE      an anomalous point of a higher severity
LASTING    an anomalous point at least `accept_after` after the opening: the shift is the new normal

Points that were not judged (missing, or without a threshold) are no input: they neither prolong nor resolve. All arrays
hold one row a series.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from stream.columns import BoolArray, Float64Array, Int8Array, Int32Array, Int64Array, UInt64Array


class State(IntEnum):
    """Whether a series has an incident."""

    CLEAR = 0
    OPEN = 1


class Input(IntEnum):
    """What a scored point means to the incident of its series."""

    QUIET = 0
    RECOVERED = 1
    ANOMALOUS = 2
    WORSE = 3
    LASTING = 4


class Action(IntEnum):
    """What is to be published."""

    NONE = 0
    OPENED = 1
    UPDATED = 2
    RESOLVED = 3
    ACCEPTED = 4


class Severity(IntEnum):
    """How improbable the gravest point of an incident is, held against the risk q; equal across KPIs and models."""

    NONE = 0
    WARNING = 1
    MAJOR = 2
    CRITICAL = 3


_S, _A = State, Action
NEXT_STATE = np.array(
    [[_S.CLEAR, _S.CLEAR, _S.OPEN, _S.OPEN, _S.OPEN], [_S.OPEN, _S.CLEAR, _S.OPEN, _S.OPEN, _S.CLEAR]], np.uint8
)
ACTION = np.array(
    [
        [_A.NONE, _A.NONE, _A.OPENED, _A.OPENED, _A.OPENED],
        [_A.NONE, _A.RESOLVED, _A.NONE, _A.UPDATED, _A.ACCEPTED],
    ],
    np.uint8,
)


def severity_of(probability: Float64Array, q: float) -> Int8Array:
    """Return the severity of anomalous points: p <= q/100 critical, <= q/10 major, else warning. (K,) uint8."""
    return np.select(
        [probability <= q / 100, probability <= q / 10], [Severity.CRITICAL, Severity.MAJOR], Severity.WARNING
    ).astype(np.uint8)


@dataclass(frozen=True, slots=True)
class IncidentPolicy:
    """When an incident ends."""

    recover_after: int = 3  # normal points in a row
    accept_after_ms: int = 12 * 3_600_000  # an incident that lasts this long is the new normal


class Incidents:
    """The incident of each of S series, structure of arrays.

    Attributes:
        state: `State`, (S,) uint8.
        id: of the newest incident, (S,) uint64; kept, for the model that it is derived from may change before the end.
        opened_ms: event time of the first anomalous point, (S,) int64; `last_ms` of the latest one.
        severity: the gravest `Severity` so far, (S,) uint8.
        normal_run: normal points in a row since the last anomalous one, (S,) int32.
        anomalies: anomalous points so far, (S,) int32.
        peak_ratio: the largest score/threshold so far, (S,) float64; `peak_ms` and `peak_value` say where.
    """

    ARRAYS = (
        "state",
        "id",
        "opened_ms",
        "severity",
        "last_ms",
        "normal_run",
        "anomalies",
        "peak_ratio",
        "peak_ms",
        "peak_value",
    )

    def __init__(self, policy: IncidentPolicy, capacity: int = 0) -> None:
        self.policy = policy
        self.state: Int8Array = np.zeros(0, np.uint8)
        self.id: UInt64Array = np.zeros(0, np.uint64)
        self.opened_ms: Int64Array = np.zeros(0, np.int64)
        self.last_ms: Int64Array = np.zeros(0, np.int64)
        self.severity: Int8Array = np.zeros(0, np.uint8)
        self.normal_run: Int32Array = np.zeros(0, np.int32)
        self.anomalies: Int32Array = np.zeros(0, np.int32)
        self.peak_ratio: Float64Array = np.zeros(0)
        self.peak_ms: Int64Array = np.zeros(0, np.int64)
        self.peak_value: Float64Array = np.zeros(0)
        self.resize(capacity)

    def resize(self, capacity: int) -> None:
        """Give room to `capacity` series; those that are there keep their rows."""
        for name in self.ARRAYS:
            old = getattr(self, name)
            new = np.zeros(capacity, old.dtype)
            new[: len(old)] = old
            setattr(self, name, new)

    def step(
        self,
        slot: Int32Array,
        timestamp_ms: Int64Array,
        anomalous: BoolArray,
        severity: Int8Array,
        ratio: Float64Array,
        value: Float64Array,
    ) -> Int8Array:
        """Feed one judged point of each of K series (each once); return what to publish of each, (K,) `Action`.

        The `id` of an incident that opens is the caller's to set. The fields of an incident that has just been resolved
        stay readable until the next one opens.
        """
        actions = np.zeros(len(slot), np.uint8)
        concerned = np.flatnonzero(anomalous | (self.state[slot] == State.OPEN))
        if not len(concerned):
            return actions
        slot, timestamp_ms, anomalous = slot[concerned], timestamp_ms[concerned], anomalous[concerned]
        severity, ratio, value = severity[concerned], ratio[concerned], value[concerned]

        self.normal_run[slot] = np.where(anomalous, 0, self.normal_run[slot] + 1)
        recovered = self.normal_run[slot] >= self.policy.recover_after
        lasting = timestamp_ms - self.opened_ms[slot] >= self.policy.accept_after_ms
        inputs = np.select(
            [~anomalous & ~recovered, ~anomalous, lasting, severity > self.severity[slot]],
            [Input.QUIET, Input.RECOVERED, Input.LASTING, Input.WORSE],
            Input.ANOMALOUS,
        )
        state = self.state[slot]
        action = ACTION[state, inputs]
        self.state[slot] = NEXT_STATE[state, inputs]

        opening = slot[action == Action.OPENED]
        self.opened_ms[opening] = timestamp_ms[action == Action.OPENED]
        for counter in (self.severity, self.anomalies, self.peak_ratio):
            counter[opening] = 0
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
