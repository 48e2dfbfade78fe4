from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream.incidents import (
    ACTION,
    NEVER,
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
CLEAR, PENDING, MUTED, OPEN = State
A, IN = Action, Input
NONE = A.NONE

# Where a mute makes no difference there is one cell, otherwise (not muted, muted).
OPENS = ((OPEN, A.OPENED), (MUTED, NONE))
TABLE: dict[State, dict[Input, Any]] = {
    CLEAR: {
        IN.QUIET: (CLEAR, NONE),
        IN.RECOVERED: (CLEAR, NONE),
        IN.HELD: (PENDING, NONE),
        IN.ANOMALOUS: OPENS,
        IN.WORSE: OPENS,
        IN.LASTING: OPENS,
    },
    PENDING: {
        IN.QUIET: (CLEAR, NONE),
        IN.RECOVERED: (CLEAR, NONE),
        IN.HELD: (PENDING, NONE),
        IN.ANOMALOUS: OPENS,
        IN.WORSE: OPENS,
        IN.LASTING: OPENS,
    },
    MUTED: {
        IN.QUIET: (MUTED, NONE),
        IN.RECOVERED: (CLEAR, NONE),
        IN.HELD: OPENS,
        IN.ANOMALOUS: OPENS,
        IN.WORSE: OPENS,
        IN.LASTING: (CLEAR, A.ACCEPTED_MUTED),
    },
    OPEN: {
        IN.QUIET: (OPEN, NONE),
        IN.RECOVERED: (CLEAR, A.RESOLVED),
        IN.HELD: (OPEN, NONE),
        IN.ANOMALOUS: (OPEN, NONE),
        IN.WORSE: (OPEN, A.UPDATED),
        IN.LASTING: (CLEAR, A.ACCEPTED),
    },
}


@pytest.mark.parametrize("muted", [False, True])
@pytest.mark.parametrize("event", Input)
@pytest.mark.parametrize("state", State)
def test_every_cell_of_the_table(state: State, event: Input, muted: bool) -> None:
    expected = TABLE[state][event]
    if expected is OPENS:
        expected = expected[muted]
    assert (NEXT_STATE[state, event, int(muted)], ACTION[state, event, int(muted)]) == expected


def test_the_table_has_no_other_cells() -> None:
    assert NEXT_STATE.shape == ACTION.shape == (len(State), len(Input), 2)


@given(st.lists(st.tuples(st.sampled_from(Input), st.booleans())))
def test_any_walk_through_the_table_stays_in_known_states(walk: list[tuple[Input, bool]]) -> None:
    state, told = CLEAR, False
    for event, muted in walk:
        before = state
        action = Action(ACTION[state, event, int(muted)])
        state = State(NEXT_STATE[state, event, int(muted)])
        anomalous = event >= IN.HELD
        assert action != A.OPENED or (anomalous and not muted and not told)
        assert action not in (A.UPDATED, A.RESOLVED, A.ACCEPTED) or told
        assert (action == A.ACCEPTED_MUTED) == (before == MUTED and event == IN.LASTING)
        told = (told or action == A.OPENED) and action not in (A.RESOLVED, A.ACCEPTED)
        assert told == (state == OPEN)
        assert state != MUTED or muted or before == MUTED
        # Whether something goes on depends on the points, and never on the mute.
        other = State(NEXT_STATE[before, event, int(not muted)])
        assert min(state, MUTED) == min(other, MUTED)


def policy(
    size: int = 1,
    *,
    open_after: int = 1,
    recover_after: int = 3,
    recover_ratio: float = 1.0,
    accept_after_ms: int = HOUR,
    cooldown_ms: int = 0,
) -> IncidentPolicy:
    return IncidentPolicy(
        np.full(size, open_after),
        np.full(size, recover_after),
        np.full(size, recover_ratio),
        np.full(size, accept_after_ms),
        np.full(size, cooldown_ms),
    )


def feed(
    incidents: Incidents,
    slot: list[int],
    time: int,
    severity: list[int],
    ratio: float | None = None,
    *,
    muted: bool = False,
    lasting: bool = False,
    value: float | None = None,
    policy: IncidentPolicy,
) -> list[Action]:
    """Feed one point of each series: its severity, 0 a normal one."""
    n = len(slot)
    grave: Any = np.array(severity, np.uint8)
    actions = incidents.step(
        np.array(slot, np.int32),
        np.full(n, time),
        grave > 0,
        grave,
        np.where(grave > 0, 2.0, 0.5) if ratio is None else np.full(n, ratio),
        np.arange(n, dtype=np.float64) if value is None else np.full(n, value),
        np.full(n, muted),
        np.full(n, lasting),
        policy=policy.take(np.zeros(n, np.intp)),
    )
    return [Action(action) for action in actions]


def life(
    *points: int, step_ms: int = 60_000, muted: Sequence[int] = (), **settings: Any
) -> tuple[list[Action], Incidents]:
    """Feed one series, minute 1 being its first; `muted` says which minutes are."""
    incidents = Incidents(1)
    actions = []
    for i, severity in enumerate(points, 1):
        actions += feed(incidents, [0], i * step_ms, [severity], muted=i in muted, policy=policy(**settings))
    return actions, incidents


@pytest.mark.parametrize(
    ("points", "actions"),
    [
        ((QUIET,) * 5, (NONE,) * 5),
        ((WARNING, QUIET, QUIET, QUIET, QUIET), (A.OPENED, NONE, NONE, A.RESOLVED, NONE)),
        ((WARNING, QUIET, QUIET, WARNING, QUIET, QUIET, QUIET), (A.OPENED, *(NONE,) * 5, A.RESOLVED)),
        ((WARNING, WARNING, MAJOR, MAJOR, CRITICAL, WARNING), (A.OPENED, NONE, A.UPDATED, NONE, A.UPDATED, NONE)),
        ((WARNING, CRITICAL, MAJOR), (A.OPENED, A.UPDATED, NONE)),
        ((MAJOR, QUIET, QUIET, QUIET, WARNING), (A.OPENED, NONE, NONE, A.RESOLVED, A.OPENED)),
        ((CRITICAL, QUIET, QUIET, QUIET, WARNING, MAJOR), (A.OPENED, NONE, NONE, A.RESOLVED, A.OPENED, A.UPDATED)),
    ],
)
def test_lives(points: tuple[int, ...], actions: tuple[Action, ...]) -> None:
    assert tuple(life(*points)[0]) == actions


@pytest.mark.parametrize("recover_after", [1, 2, 5])
def test_one_spike_is_one_incident(recover_after: int) -> None:
    actions, _ = life(WARNING, *(QUIET,) * 7, recover_after=recover_after)
    assert actions[0] == A.OPENED
    assert actions.index(A.RESOLVED) == recover_after
    assert actions.count(NONE) == 6


# -- opening ----------------------------------------------------------------------------------------------------------


def test_open_after_counts_points_in_a_row() -> None:
    actions, incidents = life(WARNING, MAJOR, QUIET, WARNING, WARNING, WARNING, WARNING, open_after=3)
    assert actions == [*[NONE] * 5, A.OPENED, NONE]
    assert incidents.opened_ms[0] == 4 * 60_000, "the first of the run, not the third"
    assert incidents.anomalies[0] == 4
    assert incidents.severity[0] == WARNING, "the spike that was let go is forgotten"


def test_a_grey_point_ends_a_run_that_has_opened_nothing() -> None:
    incidents, rule = Incidents(1), policy(open_after=2, recover_ratio=0.5)
    feed(incidents, [0], 1, [WARNING], policy=rule)
    feed(incidents, [0], 2, [QUIET], ratio=0.9, policy=rule)
    assert incidents.state[0] == CLEAR
    assert feed(incidents, [0], 3, [WARNING], policy=rule) == [NONE]
    assert feed(incidents, [0], 4, [WARNING], policy=rule) == [A.OPENED]
    assert incidents.opened_ms[0] == 3


def test_what_opens_late_has_the_gravest_severity_and_peak_so_far() -> None:
    incidents, rule = Incidents(1), policy(open_after=3)
    feed(incidents, [0], 1, [MAJOR], ratio=4.0, policy=rule)
    feed(incidents, [0], 2, [CRITICAL], ratio=7.0, policy=rule)
    assert feed(incidents, [0], 3, [WARNING], ratio=2.0, policy=rule) == [A.OPENED]
    assert (incidents.severity[0], incidents.peak_ratio[0], incidents.peak_ms[0]) == (CRITICAL, 7.0, 2)
    assert feed(incidents, [0], 4, [CRITICAL], policy=rule) == [NONE]


def test_within_an_incident_one_anomalous_point_is_enough() -> None:
    actions, _ = life(WARNING, WARNING, QUIET, MAJOR, QUIET, QUIET, QUIET, open_after=2)
    assert actions == [NONE, A.OPENED, NONE, A.UPDATED, NONE, NONE, A.RESOLVED]


def test_after_an_accepted_shift_a_run_counts_from_one() -> None:
    actions, _ = life(*(WARNING,) * 5, open_after=2, accept_after_ms=2 * 60_000)
    assert actions == [NONE, A.OPENED, A.ACCEPTED, NONE, A.OPENED]


# -- recovery ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recover_after", [1, 2, 5])
def test_it_takes_recover_after_calm_points(recover_after: int) -> None:
    actions, _ = life(WARNING, *(QUIET,) * 7, recover_after=recover_after)
    assert actions.index(A.RESOLVED) == recover_after
    assert actions.count(A.RESOLVED) == 1


def test_grey_points_leave_the_run_of_calm_ones_as_it_is() -> None:
    incidents, rule = Incidents(1), policy(recover_after=2, recover_ratio=0.8)
    feed(incidents, [0], 0, [WARNING], policy=rule)
    ratios = [0.8, 0.9, 0.79, 0.99, 0.8, 0.1, 0.1]
    actions = [feed(incidents, [0], i, [QUIET], ratio=ratio, policy=rule)[0] for i, ratio in enumerate(ratios, 1)]
    assert actions == [*[NONE] * 5, A.RESOLVED, NONE]


def test_a_series_that_stays_grey_stays_open() -> None:
    incidents, rule = Incidents(1), policy(recover_after=1, recover_ratio=0.8)
    feed(incidents, [0], 0, [WARNING], policy=rule)
    for i in range(1, 50):
        assert feed(incidents, [0], i, [QUIET], ratio=0.9, policy=rule) == [NONE]
    assert incidents.state[0] == OPEN


def test_a_grey_point_does_not_resolve_though_the_rule_has_become_laxer() -> None:
    incidents = Incidents(1)
    for i, severity in enumerate((WARNING, QUIET, QUIET)):
        feed(incidents, [0], i, [severity], policy=policy(recover_after=9, recover_ratio=0.8))
    assert feed(incidents, [0], 3, [QUIET], ratio=0.9, policy=policy(recover_after=2, recover_ratio=0.8)) == [NONE]
    assert feed(incidents, [0], 4, [QUIET], policy=policy(recover_after=2, recover_ratio=0.8)) == [A.RESOLVED]


# -- acceptance -------------------------------------------------------------------------------------------------------


def test_a_shift_is_accepted_at_the_first_anomalous_point_that_is_late_enough() -> None:
    actions, incidents = life(*(WARNING,) * 61, QUIET, QUIET)
    assert actions == [A.OPENED, *[NONE] * 59, A.ACCEPTED, NONE, NONE]
    assert incidents.state[0] == CLEAR
    assert incidents.anomalies[0] == 61


def test_a_normal_point_accepts_nothing() -> None:
    actions, _ = life(WARNING, QUIET, QUIET, WARNING, step_ms=2 * HOUR)
    assert actions == [A.OPENED, NONE, NONE, A.ACCEPTED]


def test_accepting_comes_before_a_higher_severity() -> None:
    actions, incidents = life(WARNING, CRITICAL, step_ms=HOUR)
    assert actions == [A.OPENED, A.ACCEPTED]
    assert incidents.severity[0] == CRITICAL


def test_the_caller_can_force_acceptance() -> None:
    incidents, rule = Incidents(1), policy()
    assert feed(incidents, [0], 1, [WARNING], lasting=True, policy=rule) == [A.OPENED]
    assert feed(incidents, [0], 2, [QUIET], lasting=True, policy=rule) == [NONE]
    assert feed(incidents, [0], 3, [WARNING], lasting=True, policy=rule) == [A.ACCEPTED]
    feed(incidents, [0], 4, [WARNING], muted=True, policy=rule)
    assert feed(incidents, [0], 5, [WARNING], muted=True, lasting=True, policy=rule) == [A.ACCEPTED_MUTED]


# -- mutes ------------------------------------------------------------------------------------------------------------


def test_a_muted_incident_that_ends_in_time_is_never_told() -> None:
    actions, incidents = life(WARNING, CRITICAL, QUIET, QUIET, QUIET, QUIET, muted=range(1, 9))
    assert actions == [NONE] * 6
    assert incidents.state[0] == CLEAR
    assert incidents.resolved_ms[0] == NEVER, "no cooldown after what nobody was told of"


def test_one_that_outlasts_the_mute_is_told_late_with_its_real_beginning() -> None:
    points = (WARNING, CRITICAL, MAJOR, QUIET, WARNING, CRITICAL, QUIET, QUIET, QUIET)
    actions, incidents = life(*points, muted=(1, 2, 3))
    assert actions == [*[NONE] * 4, A.OPENED, *[NONE] * 3, A.RESOLVED], "a normal point tells nothing"
    assert incidents.opened_ms[0] == 60_000
    assert incidents.severity[0] == CRITICAL
    assert incidents.anomalies[0] == 5


def test_a_mute_that_begins_during_an_incident_changes_nothing() -> None:
    points = (WARNING, MAJOR, QUIET, QUIET, QUIET)
    assert life(*points, muted=range(2, 9))[0] == life(*points)[0]


def test_what_is_held_is_muted_only_when_it_would_open() -> None:
    assert life(*(WARNING,) * 3, open_after=2, muted=(1,))[0] == [NONE, A.OPENED, NONE]
    assert life(*(WARNING,) * 3, open_after=2, muted=(2,))[0] == [NONE, NONE, A.OPENED]
    assert life(WARNING, WARNING, QUIET, WARNING, open_after=2, muted=(2,))[0] == [NONE, NONE, NONE, A.OPENED]


@pytest.mark.parametrize("muted", [range(1, 99), range(1, 6)], ids=["still muted", "muted no longer"])
def test_a_muted_shift_is_accepted_in_silence(muted: Sequence[int]) -> None:
    actions, incidents = life(*(WARNING,) * 6, muted=muted, accept_after_ms=5 * 60_000)
    assert actions == [*[NONE] * 5, A.ACCEPTED_MUTED]
    assert incidents.state[0] == CLEAR
    assert incidents.resolved_ms[0] == NEVER


def test_after_a_resolution_nothing_opens_for_the_cooldown() -> None:
    spike = (WARNING, QUIET)
    actions, incidents = life(*spike * 4, recover_after=1, cooldown_ms=3 * 60_000)
    # resolved at 2, muted until 5, at 5 it opens, is resolved at 6, muted at 7
    assert actions == [A.OPENED, A.RESOLVED, NONE, NONE, A.OPENED, A.RESOLVED, NONE, NONE]
    assert incidents.resolved_ms[0] == 6 * 60_000


def test_the_cooldown_follows_acceptance_too_and_ends_during_an_incident() -> None:
    actions, incidents = life(*(WARNING,) * 7, accept_after_ms=2 * 60_000, cooldown_ms=90_000)
    # accepted at 3, muted at 4, told late at 5
    assert actions == [A.OPENED, NONE, A.ACCEPTED, NONE, A.OPENED, A.ACCEPTED, NONE]
    assert incidents.opened_ms[0] == 7 * 60_000


def test_without_a_resolution_there_is_no_cooldown() -> None:
    incidents = Incidents(1)
    assert feed(incidents, [0], 0, [WARNING], policy=policy(cooldown_ms=2**62)) == [A.OPENED]


# -- rows -------------------------------------------------------------------------------------------------------------


def test_the_state_of_an_incident_is_told_after_its_end_and_forgotten_at_the_next() -> None:
    incidents, rule = Incidents(1), policy(recover_after=1)
    feed(incidents, [0], 1_000, [WARNING], ratio=1.5, policy=rule)
    feed(incidents, [0], 2_000, [CRITICAL], ratio=9.0, policy=rule)
    feed(incidents, [0], 3_000, [MAJOR], ratio=4.0, policy=rule)
    assert feed(incidents, [0], 4_000, [QUIET], ratio=0.5, policy=rule) == [A.RESOLVED]
    told = (incidents.opened_ms[0], incidents.last_ms[0], incidents.anomalies[0], incidents.severity[0])
    assert told == (1_000, 3_000, 3, CRITICAL)
    assert (incidents.peak_ms[0], incidents.peak_ratio[0]) == (2_000, 9.0)
    feed(incidents, [0], 5_000, [WARNING], ratio=1.1, policy=rule)
    told = (incidents.opened_ms[0], incidents.last_ms[0], incidents.anomalies[0], incidents.severity[0])
    assert told == (5_000, 5_000, 1, WARNING)
    assert (incidents.peak_ms[0], incidents.peak_ratio[0]) == (5_000, 1.1)


def test_a_peak_without_a_single_value() -> None:
    incidents, rule = Incidents(1), policy()
    feed(incidents, [0], 1, [WARNING], value=3.0, policy=rule)
    feed(incidents, [0], 2, [WARNING], ratio=5.0, value=float("nan"), policy=rule)
    assert incidents.peak_ms[0] == 2
    assert np.isnan(incidents.peak_value[0])


def test_series_do_not_touch_each_other() -> None:
    incidents, rule = Incidents(5), policy(recover_after=2)
    assert feed(incidents, [4, 0, 2], 1_000, [WARNING, QUIET, CRITICAL], policy=rule) == [A.OPENED, NONE, A.OPENED]
    assert feed(incidents, [2, 4], 2_000, [QUIET, MAJOR], policy=rule) == [NONE, A.UPDATED]
    assert feed(incidents, [0, 2, 4], 3_000, [WARNING, QUIET, QUIET], policy=rule) == [A.OPENED, A.RESOLVED, NONE]
    assert incidents.state.tolist() == [OPEN, CLEAR, CLEAR, CLEAR, OPEN]
    assert feed(incidents, [], 4_000, [], policy=rule) == []


def test_each_row_has_its_own_policy_and_mute() -> None:
    incidents, n = Incidents(6), 6
    rule = IncidentPolicy(
        open_after=np.array([1, 2, 1, 1, 1, 1]),
        recover_after=np.array([1, 1, 1, 2, 1, 1]),
        recover_ratio=np.array([1.0, 1.0, 1.0, 1.0, 0.4, 1.0]),
        accept_after_ms=np.array([HOUR, HOUR, HOUR, HOUR, HOUR, 1]),
        cooldown_ms=np.zeros(n, np.int64),
    )

    def step(time: int, severity: Severity, muted: list[bool]) -> list[int]:
        grave = np.full(n, severity, np.uint8)
        ratio = np.where(grave > 0, 2.0, 0.5)
        no = np.zeros(n, np.bool_)
        slot = np.arange(n, dtype=np.int32)
        mute = np.array(muted)
        actions = incidents.step(slot, np.full(n, time), grave > 0, grave, ratio, ratio, mute, no, policy=rule)
        return [int(action) for action in actions]

    third = [False, False, True, False, False, False]
    assert step(1, WARNING, third) == [A.OPENED, NONE, NONE, A.OPENED, A.OPENED, A.OPENED]
    assert step(2, WARNING, third) == [NONE, A.OPENED, NONE, NONE, NONE, A.ACCEPTED]
    assert step(3, QUIET, third) == [A.RESOLVED, A.RESOLVED, NONE, NONE, NONE, NONE]
    assert step(4, QUIET, third) == [NONE, NONE, NONE, A.RESOLVED, NONE, NONE]
    assert incidents.state.tolist() == [CLEAR, CLEAR, CLEAR, CLEAR, OPEN, CLEAR]


def test_resize_keeps_open_incidents() -> None:
    _, incidents = life(MAJOR)
    incidents.resize(10)
    assert incidents.resolved_ms.tolist() == [NEVER] * 10
    assert feed(incidents, [9, 0], 120_000, [QUIET, CRITICAL], policy=policy()) == [NONE, A.UPDATED]


def test_a_copied_row_goes_on_as_its_source_does() -> None:
    incidents, rule = Incidents(4), policy(recover_after=2, cooldown_ms=9)
    for time, severity in ((1, CRITICAL), (2, QUIET), (3, QUIET), (4, WARNING)):
        feed(incidents, [1], time, [severity], policy=rule)
    feed(incidents, [3], 4, [MAJOR], policy=rule)
    incidents.id[1] = 77
    incidents.copy_rows(np.array([1]), np.array([3]))
    for name in Incidents.ARRAYS:
        array = getattr(incidents, name)
        assert array[3] == array[1]
    assert feed(incidents, [1, 3], 20, [MAJOR, MAJOR], policy=rule) == [A.OPENED] * 2
    assert incidents.opened_ms[3] == 4


@pytest.mark.parametrize(
    ("probability", "severity"),
    [(1e-4, WARNING), (1.01e-5, WARNING), (1e-5, MAJOR), (1.01e-6, MAJOR), (1e-6, CRITICAL), (0.0, CRITICAL)],
)
def test_severity_is_the_improbability(probability: float, severity: Severity) -> None:
    assert severity_of(np.array([probability]), 1e-4).tolist() == [severity]


def test_each_series_may_have_its_own_risk() -> None:
    assert severity_of(np.full(3, 1e-6), np.array([1e-4, 1e-5, 1e-6])).tolist() == [CRITICAL, MAJOR, WARNING]


# -- any sequence -----------------------------------------------------------------------------------------------------


class Plain:
    """One incident as `if`s."""

    def __init__(
        self, open_after: int, recover_after: int, recover_ratio: float, accept_after_ms: int, cooldown_ms: int
    ) -> None:
        self.open_after, self.recover_after, self.recover_ratio = open_after, recover_after, recover_ratio
        self.accept_after_ms, self.cooldown_ms = accept_after_ms, cooldown_ms
        self.run: list[tuple[int, int, float]] = []  # (time, severity, ratio) of its anomalous points
        self.goes_on = self.told = False
        self.calm = 0
        self.resolved: int | None = None

    def step(self, time: int, severity: int, ratio: float, muted: bool, lasting: bool) -> Action:
        if self.resolved is not None and time < self.resolved + self.cooldown_ms:
            muted = True
        return self.anomalous(time, severity, ratio, muted, lasting) if severity else self.normal(time, ratio)

    def normal(self, time: int, ratio: float) -> Action:
        if not self.goes_on:
            self.run = []
            return NONE
        if ratio >= self.recover_ratio:
            return NONE
        self.calm += 1
        return self.end(time, A.RESOLVED, NONE) if self.calm >= self.recover_after else NONE

    def anomalous(self, time: int, severity: int, ratio: float, muted: bool, lasting: bool) -> Action:
        self.calm = 0
        worse = severity > max((point[1] for point in self.run), default=0)
        self.run.append((time, severity, ratio))
        if not self.goes_on:
            if len(self.run) < self.open_after:
                return NONE
            self.goes_on, self.told = True, not muted
            return A.OPENED if self.told else NONE
        if lasting or time - self.run[0][0] >= self.accept_after_ms:
            return self.end(time, A.ACCEPTED, A.ACCEPTED_MUTED)
        if not self.told:
            self.told = not muted
            return A.OPENED if self.told else NONE
        return A.UPDATED if worse else NONE

    def end(self, time: int, told: Action, untold: Action) -> Action:
        if self.told:
            self.resolved = time
        action = told if self.told else untold
        self.run, self.goes_on, self.told = [], False, False
        return action


SERIES = 3
points = st.tuples(
    st.integers(0, SERIES - 1),
    st.sampled_from([0, 0, 1, 1, 2, 3]),
    st.sampled_from([0.2, 0.5, 0.9]),  # added to 1 if anomalous
    st.sampled_from([0, 0, 1]),  # muted
    st.sampled_from([0] * 9 + [1]),  # lasting
    st.integers(1, 20),  # ms since the point before
)
policies = st.tuples(
    st.integers(1, 4), st.integers(1, 4), st.sampled_from([0.5, 0.8, 1.0, float("inf")]), st.integers(1, 90),
    st.sampled_from([0, 0, 10, 60]),
)  # fmt: skip
Point = tuple[int, int, float, int, int, int]
Policy = tuple[int, int, float, int, int]


@given(st.lists(points, max_size=60), st.lists(policies, min_size=SERIES, max_size=SERIES))
def test_incidents_equal_plain_ones(sequence: list[Point], rules: list[Policy]) -> None:
    incidents, plain = Incidents(SERIES), [Plain(*rule) for rule in rules]
    time = 0
    for slot, severity, ratio, muted, lasting, later in sequence:
        time += later
        ratio += severity > 0
        (action,) = incidents.step(
            np.array([slot], np.int32), np.array([time]), np.array([severity > 0]), np.array([severity], np.uint8),
            np.array([ratio]), np.array([10.0 * ratio]), np.array([muted > 0]), np.array([lasting > 0]),
            policy=IncidentPolicy(*(np.array([field]) for field in rules[slot])),
        )  # fmt: skip
        reference = plain[slot]
        assert action == reference.step(time, severity, ratio, muted > 0, lasting > 0)
        expected = {(True, True): OPEN, (True, False): MUTED}.get(
            (reference.goes_on, reference.told), PENDING if reference.run else CLEAR
        )
        assert incidents.state[slot] == expected
        assert incidents.resolved_ms[slot] == (NEVER if reference.resolved is None else reference.resolved)
        if reference.run:
            peak = max(reference.run, key=lambda point: point[2])  # the first of equals
            assert incidents.opened_ms[slot] == reference.run[0][0]
            assert incidents.last_ms[slot] == reference.run[-1][0]
            assert incidents.anomalies[slot] == len(reference.run)
            assert incidents.severity[slot] == max(point[1] for point in reference.run)
            assert (incidents.peak_ms[slot], incidents.peak_ratio[slot]) == (peak[0], peak[2])
            assert incidents.peak_value[slot] == 10.0 * peak[2]


@given(st.lists(points, max_size=60), policies)
def test_a_mute_changes_only_what_is_told(sequence: list[Point], rule: Policy) -> None:
    """Row 0 is muted at times and has a cooldown, row 1 not: both live the same life."""
    incidents = Incidents(2)
    columns = [np.array([field] * 2) for field in rule]
    columns[-1][1] = 0
    told = False
    time = 0
    for _, severity, ratio, muted, lasting, later in sequence:
        time += later
        grave = np.full(2, severity, np.uint8)
        heard, truth = incidents.step(
            np.arange(2, dtype=np.int32), np.full(2, time), grave > 0, grave, np.full(2, ratio + (severity > 0)),
            np.full(2, 1.0), np.array([muted > 0, False]), np.full(2, lasting > 0), policy=IncidentPolicy(*columns),
        )  # fmt: skip
        for name in set(Incidents.ARRAYS) - {"state", "resolved_ms"}:
            array = getattr(incidents, name)
            assert array[0] == array[1], name
        state = incidents.state[0]
        assert (OPEN if state == MUTED else state) == incidents.state[1]
        if truth in (A.RESOLVED, A.ACCEPTED):
            untold = NONE if truth == A.RESOLVED else A.ACCEPTED_MUTED
            assert heard == (truth if told else untold)
            told = False
        elif heard == A.OPENED:
            assert not told
            told = True
        else:
            assert heard == (truth if told else NONE)
        assert told == (state == OPEN)


@given(st.lists(points, max_size=40), policies)
def test_all_series_at_once_equal_one_at_a_time(sequence: list[Point], rule: Policy) -> None:
    together, apart = Incidents(len(sequence)), Incidents(len(sequence))
    if not sequence:
        return
    for turn in range(6):
        rolled = sequence[turn:] + sequence[:turn]
        _, severity, ratio, muted, lasting, _ = (np.array(column) for column in zip(*rolled, strict=True))
        slot, grave = np.arange(len(rolled), dtype=np.int32), severity.astype(np.uint8)
        time = np.full(len(rolled), turn * 20)
        columns: Any = (slot, time, grave > 0, grave, ratio, ratio, muted > 0, lasting > 0)
        rules = IncidentPolicy(*(np.full(len(rolled), field) for field in rule))
        actions = together.step(*columns, policy=rules)
        one_by_one = []
        for i in slot:
            one_by_one += apart.step(*(column[[i]] for column in columns), policy=rules.take(np.array([i]))).tolist()
        assert actions.tolist() == one_by_one
    for name in Incidents.ARRAYS:
        np.testing.assert_array_equal(getattr(together, name), getattr(apart, name))
