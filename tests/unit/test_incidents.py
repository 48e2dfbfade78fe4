from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream.incidents import (
    ACTION,
    NEXT_STATE,
    Action,
    IncidentPolicy,
    Incidents,
    Input,
    Severity,
    State,
    severity_of,
)

HOUR = 3_600_000
QUIET, WARNING, MAJOR, CRITICAL = Severity
A = Action

TABLE = {
    (State.CLEAR, Input.QUIET): (State.CLEAR, A.NONE),
    (State.CLEAR, Input.RECOVERED): (State.CLEAR, A.NONE),
    (State.CLEAR, Input.ANOMALOUS): (State.OPEN, A.OPENED),
    (State.CLEAR, Input.WORSE): (State.OPEN, A.OPENED),
    (State.CLEAR, Input.LASTING): (State.OPEN, A.OPENED),
    (State.OPEN, Input.QUIET): (State.OPEN, A.NONE),
    (State.OPEN, Input.RECOVERED): (State.CLEAR, A.RESOLVED),
    (State.OPEN, Input.ANOMALOUS): (State.OPEN, A.NONE),
    (State.OPEN, Input.WORSE): (State.OPEN, A.UPDATED),
    (State.OPEN, Input.LASTING): (State.CLEAR, A.ACCEPTED),
}


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("event", Input)
def test_every_pair_of_state_and_input(state: State, event: Input) -> None:
    assert (NEXT_STATE[state, event], ACTION[state, event]) == TABLE[state, event]


def test_the_table_has_no_other_pairs() -> None:
    assert NEXT_STATE.shape == ACTION.shape == (len(State), len(Input))


@given(st.lists(st.sampled_from(Input)))
def test_any_walk_through_the_table_stays_in_known_states(walk: list[Input]) -> None:
    state, opened, ended = State.CLEAR, 0, 0
    for event in walk:
        action = Action(ACTION[state, event])
        state = State(NEXT_STATE[state, event])
        opened += action == Action.OPENED
        ended += action in (Action.RESOLVED, Action.ACCEPTED)
        assert opened - ended == (state == State.OPEN)
        assert action != Action.OPENED or event in (Input.ANOMALOUS, Input.WORSE, Input.LASTING)


def life(*points: int, step_ms: int = 60_000, policy: IncidentPolicy | None = None) -> tuple[list[Action], Incidents]:
    """Feed one series: the severity of each point, 0 a normal one."""
    incidents = Incidents(policy or IncidentPolicy(3, HOUR), capacity=1)
    actions = []
    for i, severity in enumerate(points):
        (action,) = feed(incidents, [0], (i + 1) * step_ms, [severity])
        actions.append(action)
    return actions, incidents


def feed(incidents: Incidents, slot: list[int], time: int, severity: list[int], ratio: float = 2.0) -> list[Action]:
    n = len(slot)
    grave: Any = np.array(severity, np.uint8)
    actions = incidents.step(
        np.array(slot, np.int32), np.full(n, time), grave > 0, grave, np.full(n, ratio), np.arange(n, dtype=np.float64)
    )
    return [Action(action) for action in actions]


@pytest.mark.parametrize(
    ("points", "actions"),
    [
        ((QUIET,) * 5, (A.NONE,) * 5),
        ((WARNING, QUIET, QUIET, QUIET, QUIET), (A.OPENED, A.NONE, A.NONE, A.RESOLVED, A.NONE)),
        ((WARNING, QUIET, QUIET, WARNING, QUIET, QUIET, QUIET), (A.OPENED, *(A.NONE,) * 5, A.RESOLVED)),
        ((WARNING, WARNING, MAJOR, MAJOR, CRITICAL, WARNING), (A.OPENED, A.NONE, A.UPDATED, A.NONE, A.UPDATED, A.NONE)),
        ((WARNING, CRITICAL, MAJOR), (A.OPENED, A.UPDATED, A.NONE)),
        ((MAJOR, QUIET, QUIET, QUIET, WARNING), (A.OPENED, A.NONE, A.NONE, A.RESOLVED, A.OPENED)),
        ((CRITICAL, QUIET, QUIET, QUIET, WARNING, MAJOR), (A.OPENED, A.NONE, A.NONE, A.RESOLVED, A.OPENED, A.UPDATED)),
    ],
)
def test_lives(points: tuple[int, ...], actions: tuple[Action, ...]) -> None:
    assert tuple(life(*points)[0]) == actions


@pytest.mark.parametrize("recover_after", [1, 2, 5])
def test_it_takes_recover_after_normal_points_in_a_row(recover_after: int) -> None:
    actions, _ = life(WARNING, *(QUIET,) * 7, policy=IncidentPolicy(recover_after, HOUR))
    assert actions.index(A.RESOLVED) == recover_after
    assert actions.count(A.RESOLVED) == 1


def test_a_shift_is_accepted_at_the_first_anomalous_point_that_is_late_enough() -> None:
    actions, incidents = life(*(WARNING,) * 61, QUIET, QUIET, step_ms=60_000)
    assert actions == [A.OPENED, *[A.NONE] * 59, A.ACCEPTED, A.NONE, A.NONE]
    assert incidents.state[0] == State.CLEAR
    assert incidents.anomalies[0] == 61


def test_a_normal_point_accepts_nothing() -> None:
    actions, _ = life(WARNING, QUIET, QUIET, WARNING, step_ms=2 * HOUR)
    assert actions == [A.OPENED, A.NONE, A.NONE, A.ACCEPTED]


def test_accepting_comes_before_a_higher_severity() -> None:
    actions, incidents = life(WARNING, CRITICAL, step_ms=HOUR)
    assert actions == [A.OPENED, A.ACCEPTED]
    assert incidents.severity[0] == CRITICAL


def test_the_state_of_an_incident_is_told_after_its_end_and_forgotten_at_the_next() -> None:
    incidents = Incidents(IncidentPolicy(1, HOUR), capacity=1)
    feed(incidents, [0], 1_000, [WARNING], ratio=1.5)
    feed(incidents, [0], 2_000, [CRITICAL], ratio=9.0)
    feed(incidents, [0], 3_000, [MAJOR], ratio=4.0)
    assert feed(incidents, [0], 4_000, [QUIET], ratio=0.5) == [A.RESOLVED]
    told = (incidents.opened_ms[0], incidents.last_ms[0], incidents.anomalies[0], incidents.severity[0])
    assert told == (1_000, 3_000, 3, CRITICAL)
    assert (incidents.peak_ms[0], incidents.peak_ratio[0]) == (2_000, 9.0)
    feed(incidents, [0], 5_000, [WARNING], ratio=1.1)
    told = (incidents.opened_ms[0], incidents.last_ms[0], incidents.anomalies[0], incidents.severity[0])
    assert told == (5_000, 5_000, 1, WARNING)
    assert (incidents.peak_ms[0], incidents.peak_ratio[0]) == (5_000, 1.1)


def test_series_do_not_touch_each_other() -> None:
    incidents = Incidents(IncidentPolicy(2, HOUR), capacity=5)
    assert feed(incidents, [4, 0, 2], 1_000, [WARNING, QUIET, CRITICAL]) == [A.OPENED, A.NONE, A.OPENED]
    assert feed(incidents, [2, 4], 2_000, [QUIET, MAJOR]) == [A.NONE, A.UPDATED]
    assert feed(incidents, [0, 2, 4], 3_000, [WARNING, QUIET, QUIET]) == [A.OPENED, A.RESOLVED, A.NONE]
    assert incidents.state.tolist() == [State.OPEN, State.CLEAR, State.CLEAR, State.CLEAR, State.OPEN]
    assert feed(incidents, [], 4_000, []) == []


def test_resize_keeps_open_incidents() -> None:
    _, incidents = life(MAJOR)
    incidents.resize(10)
    assert feed(incidents, [9, 0], 120_000, [QUIET, CRITICAL]) == [A.NONE, A.UPDATED]


@pytest.mark.parametrize(
    ("probability", "severity"),
    [(1e-4, WARNING), (1.01e-5, WARNING), (1e-5, MAJOR), (1.01e-6, MAJOR), (1e-6, CRITICAL), (0.0, CRITICAL)],
)
def test_severity_is_the_improbability(probability: float, severity: Severity) -> None:
    assert severity_of(np.array([probability]), 1e-4).tolist() == [severity]


class Plain:
    """One incident as `if`s."""

    def __init__(self, recover_after: int, accept_after_ms: int) -> None:
        self.recover_after, self.accept_after_ms = recover_after, accept_after_ms
        self.opened: int | None = None
        self.severity = self.run = 0

    def step(self, time: int, severity: int) -> Action:
        if self.opened is None:
            if not severity:
                return A.NONE
            self.opened, self.severity, self.run = time, severity, 0
            return A.OPENED
        if not severity:
            self.run += 1
            if self.run < self.recover_after:
                return A.NONE
            self.opened = None
            return A.RESOLVED
        self.run = 0
        if time - self.opened >= self.accept_after_ms:
            self.opened = None
            return A.ACCEPTED
        worse = severity > self.severity
        self.severity = max(self.severity, severity)
        return A.UPDATED if worse else A.NONE


@given(
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0, 0, 1, 1, 2, 3]), st.integers(1, 20))),
    st.integers(1, 4),
    st.integers(1, 60),
)
def test_incidents_equal_plain_ones(points: list[tuple[int, int, int]], recover_after: int, accept_after: int) -> None:
    incidents = Incidents(IncidentPolicy(recover_after, accept_after), capacity=4)
    plain = [Plain(recover_after, accept_after) for _ in range(4)]
    time = 0
    for slot, severity, later in points:
        time += later
        assert feed(incidents, [slot], time, [severity]) == [plain[slot].step(time, severity)]
        assert [incident.opened is not None for incident in plain] == (incidents.state == State.OPEN).tolist()
