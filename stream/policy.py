"""How series are watched: a policy and a rule are values; which rule a series falls under is decided once, by its name.

A `PolicyTable` holds the policies of all rules as columns, so that the core looks a field up for many series at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from stream.columns import BoolArray, Float64Array, Int32Array, Int64Array

HOUR_MS = 3_600_000


@dataclass(frozen=True, slots=True)
class Policy:
    """What is asked of a series and its incidents."""

    interval_ms: int = 0  # grid step; 0 infers each series' own from its first points
    q: float = 1e-4  # risk: share of normal points that may be flagged
    alarms_per_ms: float = 0.0  # alarm budget; above 0 it sets q, once the interval is known
    direction: int = 0  # 1: only values above what was expected alarm; -1: only those below; 0: both
    # An anomaly deviates from what was expected by at least this, in units of the KPI, and by this share of it.
    least_deviation: float = 0.0
    least_share: float = 0.0
    drift: int = 0  # scores over which the threshold follows a drift (DSPOT); 0: none
    lateness_ms: int = 0  # how long late points are waited for, or what they prove wrong is corrected
    wait: bool = False  # a KPI waits for late points, as entities always do, instead of correcting its events
    silent_after: int = 0  # intervals without a point after which a series is silent; 0: never
    # Scores that a series without its own calibration must have seen, in event time: a day holds its whole season.
    warmup_ms: int = 24 * HOUR_MS
    open_after: int = 1  # anomalous points in a row that open an incident
    recover_after: int = 3  # normal points in a row that resolve it
    recover_ratio: float = 1.0  # a normal point counts towards it if score / threshold lies below this
    accept_after_ms: int = 12 * HOUR_MS  # an incident that lasts this long is the new normal
    cooldown_ms: int = 0  # after a resolution no opening is published for so long
    series_max: int = 0  # series of the rule in one partition; 0: no bound of its own


class Schedule(Protocol):
    """Times at which no incident is opened, such as a maintenance window."""

    def active(self, timestamp_ms: Int64Array) -> BoolArray:
        """Say of each time, (N,) int64 ms, whether it lies in the window."""


@dataclass(frozen=True, slots=True)
class Rule:
    """Which series a policy is for, and where their events go."""

    match: tuple[str, ...] = ("*",)  # globs on the name of the KPI or entity, case and all
    name: str = ""  # said in events; "" for the rule that the settings make
    model: str = ""  # checkpoint as asked for, NAME or NAME@VERSION; "" is that of the settings
    shadow: str = ""  # checkpoint that judges beside it, without alerting; "" is none
    watch: bool = True  # False: such series are ignored
    policy: Policy = field(default_factory=Policy)
    maintenance: tuple[Schedule, ...] = ()
    topics: tuple[str, ...] = ()  # further topics that its events are published to
    labels: Mapping[str, str] = field(default_factory=dict)  # copied into its events
    line: int = 0  # where it stands in its file

    def muted(self, timestamp_ms: Int64Array) -> BoolArray:
        """Say of each time whether a maintenance window is open."""
        muted = np.zeros(len(timestamp_ms), np.bool_)
        for schedule in self.maintenance:
            muted |= schedule.active(timestamp_ms)
        return muted


@dataclass(frozen=True, slots=True)
class PolicyTable:
    """One row a policy, (R,) each."""

    interval_ms: Int64Array
    q: Float64Array
    alarms_per_ms: Float64Array
    direction: Int64Array
    least_deviation: Float64Array
    least_share: Float64Array
    drift: Int64Array
    lateness_ms: Int64Array
    wait: BoolArray
    silent_after: Int64Array
    warmup_ms: Int64Array
    open_after: Int64Array
    recover_after: Int64Array
    recover_ratio: Float64Array
    accept_after_ms: Int64Array
    cooldown_ms: Int64Array
    series_max: Int64Array

    @classmethod
    def of(cls, policies: Sequence[Policy]) -> PolicyTable:
        """Return the policies as columns."""
        kinds = {"int": np.int64, "float": np.float64, "bool": np.bool_}
        return cls(**{
            name: np.array([getattr(policy, name) for policy in policies], kinds[str(spec.type)])
            for name, spec in Policy.__dataclass_fields__.items()
        })  # fmt: skip

    def risk(self, rule: Int32Array, interval_ms: Int64Array, most: float) -> Float64Array:
        """Return q for series of these rules and intervals, (K,); a budget gives at most `most`."""
        budget = self.alarms_per_ms[rule] * interval_ms
        return np.where(self.alarms_per_ms[rule] > 0, np.minimum(budget, most), self.q[rule])
