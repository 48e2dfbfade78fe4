"""What scores mean: the thresholds and incidents of the series of a group, and the events that come of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from models.arrays import grown
from models.base import Assessment, norm
from models.pot import Health, Outcome, Spot
from stream.columns import BoolArray, Float64Array, Int8Array, Int32Array, Int64Array
from stream.events import SEVERITIES, Event, SeverityName, incident_id
from stream.incidents import Action, IncidentPolicy, Incidents, State, severity_of
from stream.judged import Judged, anomaly_event, ratio_of
from stream.policy import Rule
from stream.results import Served, Shared

NEVER = -1  # no event time: those are not negative
_SCORE_MAX = 1e30  # a tail fitted to such scores still has its quantiles below the largest float32


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of points that were judged, (K,).

    Attributes:
        judged: the points.
        anomaly: which of them are to be kept from being learned, (K,).
        accepted: whose incident ends as the new normal, (K,).
        said: number of the point, and what is to be said of it.
    """

    judged: Judged
    anomaly: BoolArray
    accepted: BoolArray
    said: list[tuple[int, Event]]


class Judge:
    """Thresholds and incidents of S series, a row each.

    Attributes:
        threshold: of each series.
        incidents: of each series.
        first_score_ms: event time of the first score, (S,) int64; NEVER without one.
    """

    def __init__(self, shared: Shared, served: Served, name: Callable[[int], str]) -> None:
        """Make a judge of no series.

        Args:
            shared: what its group has in common with others.
            served: the model that their scores are of.
            name: returns the name of the series of a row.
        """
        self.config, self.rules, self.table, self.counts = shared.config, shared.rules, shared.table, shared.counts
        self.served = served
        self.threshold = Spot(self.config.pot, prior=served.prior)
        self.incidents = Incidents()
        self.first_score_ms: Int64Array = np.zeros(0, np.int64)
        self._name = name

    def resize(self, rows: int) -> None:
        """Give room to so many series; those that are there keep their rows."""
        self.threshold.resize(rows)
        self.incidents.resize(rows)
        self.first_score_ms = grown(self.first_score_ms, rows, NEVER)

    def reset(self, slot: Int64Array) -> None:
        """Make these rows those of series that have no score yet."""
        self.threshold.reset(slot)
        self.incidents.reset(slot)
        self.first_score_ms[slot] = NEVER

    def copy_rows(self, source: Int32Array, target: Int32Array) -> None:
        """Give the rows `target` what is known of `source`."""
        self.threshold.copy_rows(source, target)
        self.incidents.copy_rows(source, target)
        self.first_score_ms[target] = self.first_score_ms[source]

    def set_risk(self, slot: Int32Array | Int64Array, rule: Int32Array, interval_ms: Int64Array) -> None:
        """Give series the risk that their rules ask for at the intervals that they have; 0: none is known yet."""
        most = self.config.pot.q_max
        q = self.table.risk(rule, interval_ms, most)
        self.threshold.set_risk(slot, np.where(q > 0, np.minimum(q, most), self.config.pot.q))

    def set_drift(self, slot: Int32Array | Int64Array, rule: Int32Array) -> None:
        """Let the thresholds of series follow a drift as their rules ask for."""
        self.threshold.set_drift(slot, self.table.drift[rule])

    def judge(
        self,
        slot: Int32Array,
        timestamp_ms: Int64Array,
        value: Float64Array,
        assessment: Assessment,
        completed: Int64Array,
        rule: Int32Array,
        member: Int64Array | None,
    ) -> Verdict:
        """Say what points are: their score, held against the threshold, and what it does to the incident.

        Args:
            slot: rows of the series, (K,), each once.
            timestamp_ms: event times, (K,).
            value: (K, F), NaN where one is not scored.
            assessment: what the model says of them.
            completed: cells of the window that hold no value that arrived, (K,).
            rule: row of the policy table, (K,).
            member: which model of a stack each has, (K,); None of a model that is none.
        """
        table = self.table
        error = np.where(np.isnan(value), 0.0, assessment.error)  # (K, F)
        direction = table.direction[rule][:, None]
        error = np.where(direction == 0, np.abs(error), np.maximum(direction * error, 0.0))
        # No more digits than the network has.
        score = np.minimum(norm(error), _SCORE_MAX).astype(np.float32).astype(np.float64)
        first = self.first_score_ms[slot]
        if (unset := first == NEVER).any():
            self.first_score_ms[slot[unset]] = timestamp_ms[unset]
            first = self.first_score_ms[slot]
            # Not before: of ten thousand restored series none needs it.
            self._calibrate(slot[unset], None if member is None else member[unset])
        step = self.threshold.step(slot, score, timestamp_ms - first >= table.warmup_ms[rule])
        self.counts.scored += len(slot)
        judged = Judged(slot, timestamp_ms, value, assessment, error, score, step, completed)
        anomaly = step.outcome == Outcome.ANOMALY
        if anomaly.any():
            anomaly &= self._deviates(judged, direction, rule)
        # Without a threshold a point says nothing; a normal one matters where something goes on.
        concerned = anomaly | ((step.outcome != Outcome.WARMING) & (self.incidents.state[slot] != State.CLEAR))
        accepted = np.zeros(len(slot), np.bool_)
        if not concerned.any():
            return Verdict(judged, anomaly, accepted, [])
        action = np.full(len(slot), Action.NONE, np.uint8)
        action[concerned] = self._live_on(judged, anomaly, np.flatnonzero(concerned), rule)
        for i in np.flatnonzero(action == Action.OPENED).tolist():
            opened = int(self.incidents.opened_ms[slot[i]])
            self.incidents.id[slot[i]] = incident_id(self._name(slot[i]), opened, self.served.ref)
        accepted = (action == Action.ACCEPTED) | (action == Action.ACCEPTED_MUTED)
        anomaly = anomaly & ~accepted
        self.counts.flagged += int(anomaly.sum())
        told = np.flatnonzero((action != Action.NONE) & (action != Action.ACCEPTED_MUTED))
        said = [(i, self._event(judged, i, Action(action[i]), self.rules[int(rule[i])])) for i in told.tolist()]
        return Verdict(judged, anomaly, accepted, said)

    def ongoing(self, slot: int) -> str:
        """Return the incident that goes on in a series, "" for none, whether it has been told of or not."""
        if self.incidents.state[slot] == State.CLEAR:
            return ""
        return f"{incident_id(self._name(slot), int(self.incidents.opened_ms[slot]), self.served.ref):016x}"

    def standing(self, slot: int, incident: str) -> tuple[SeverityName, int] | None:
        """Return severity and anomalous points of an incident, if it is the newest one of a series."""
        if f"{int(self.incidents.id[slot]):016x}" != incident:
            return None
        return SEVERITIES[int(self.incidents.severity[slot]) - 1], int(self.incidents.anomalies[slot])

    def _calibrate(self, slot: Int32Array, member: Int64Array | None) -> None:
        """Give series the thresholds that their models bring."""
        if not self.served.calibrations:
            return
        member = np.zeros(len(slot), np.int64) if member is None else member
        for one in np.unique(member).tolist():
            if len(scores := self.served.calibrations[one]):
                self.threshold.calibrate(slot[member == one], scores)

    def _deviates(self, judged: Judged, direction: Int64Array, rule: Int32Array) -> BoolArray:
        """Say of each point whether one of its values lies as far from what was expected as the rule asks, (K,)."""
        expected, table = judged.assessment.expected, self.table
        with np.errstate(invalid="ignore"):
            deviation = judged.value - expected  # NaN compares as False: what was not scored does not deviate
            deviation = np.where(direction == 0, np.abs(deviation), direction * deviation)
            least = np.maximum(
                table.least_deviation[rule][:, None], table.least_share[rule][:, None] * np.abs(expected)
            )
            far: BoolArray = np.asarray((deviation >= least).any(axis=1))
        return far

    def _live_on(self, judged: Judged, anomaly: BoolArray, which: Int64Array, rule: Int32Array) -> Int8Array:
        """Feed the points `which` to the incidents of their series; return what to publish of each."""
        slot, time, step = judged.slot[which], judged.timestamp_ms[which], judged.step
        rule, table = rule[which], self.table
        muted = np.zeros(len(which), np.bool_)
        hit = anomaly[which]
        if hit.any():
            for one in np.unique(rule[hit]).tolist():
                if self.rules[one].maintenance:
                    of_rule = np.flatnonzero(hit & (rule == one))
                    muted[of_rule] = self.rules[one].muted(time[of_rule])
        single = judged.value.shape[1] == 1
        value = judged.value[which, 0] if single else np.full(len(which), np.nan)
        ratio = ratio_of(judged.score[which], step.threshold[which])
        ratio[(step.outcome[which] == Outcome.ANOMALY) & ~hit] = 0.0  # what deviates too little to matter is calm
        recover = table.recover_ratio[rule]
        return self.incidents.step(
            slot,
            time,
            hit,
            severity_of(step.probability[which], self.threshold.risk(slot)),
            ratio,
            value,
            muted,
            step.restarted[which] & hit,
            policy=IncidentPolicy(
                table.open_after[rule],
                table.recover_after[rule],
                np.where(recover < 1, recover, np.inf),
                table.accept_after_ms[rule],
                table.cooldown_ms[rule],
            ),
        )

    def _event(self, point: Judged, i: int, action: Action, rule: Rule) -> Event:
        return anomaly_event(
            point,
            i,
            action,
            self.incidents,
            name=self._name(int(point.slot[i])),
            served=self.served,
            rule=rule,
            health=Health(self.threshold.health(point.slot[i : i + 1])[0]),
            source=self.config.source,
        )
