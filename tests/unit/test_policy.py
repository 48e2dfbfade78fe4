from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream.columns import BoolArray, Int64Array
from stream.policy import HOUR_MS, Policy, PolicyTable, Rule

finite = st.floats(0, 1e12)
spans = st.integers(0, 2**40)
any_policy = st.builds(
    Policy,
    interval_ms=spans,
    q=st.floats(1e-9, 0.25),
    alarms_per_ms=st.floats(0, 1),
    direction=st.sampled_from([-1, 0, 1]),
    least_deviation=finite,
    least_share=finite,
    drift=st.integers(0, 65_535),
    lateness_ms=spans,
    wait=st.booleans(),
    silent_after=st.integers(0, 10**6),
    warmup_ms=spans,
    open_after=st.integers(1, 1000),
    recover_after=st.integers(1, 1000),
    recover_ratio=st.floats(0, 1) | st.just(float("inf")),
    accept_after_ms=spans,
    cooldown_ms=spans,
)


@given(st.lists(any_policy, max_size=5))
def test_a_table_holds_every_field_of_every_policy(policies: list[Policy]) -> None:
    table = PolicyTable.of(policies)
    assert [field.name for field in fields(PolicyTable)] == [field.name for field in fields(Policy)]
    for field in fields(Policy):
        column = getattr(table, field.name)
        assert column.shape == (len(policies),)
        assert column.tolist() == [getattr(policy, field.name) for policy in policies]
        assert column.dtype == {"int": np.int64, "float": np.float64, "bool": np.bool_}[str(field.type)]


@pytest.mark.parametrize("value", [1, 10**13])
def test_a_whole_number_is_as_good_as_a_float(value: int) -> None:
    table = PolicyTable.of([Policy(least_deviation=value), Policy(least_deviation=0.5)])
    assert table.least_deviation.dtype == np.float64
    assert table.least_deviation.tolist() == [value, 0.5]


@pytest.mark.parametrize(
    ("asked", "interval_ms", "q"),
    [
        ({"q": 1e-3}, 60_000, 1e-3),
        ({"q": 1e-3}, 0, 1e-3),
        ({"q": 0.9}, 60_000, 0.9),  # what is asked for outright is not capped here: rules that ask it are refused
        ({"q": 1e-3, "alarms_per_ms": 1 / (24 * HOUR_MS)}, 60_000, 1 / 1440),
        ({"q": 1e-3, "alarms_per_ms": 1 / (24 * HOUR_MS)}, HOUR_MS, 0.04),  # a 24th is too much
        ({"alarms_per_ms": 1.0}, 1000, 0.04),
        ({"alarms_per_ms": 1e-9}, 0, 0.0),  # no interval yet, no budget
    ],
)
def test_risk(asked: dict[str, Any], interval_ms: int, q: float) -> None:
    table = PolicyTable.of([Policy(q=0.5), Policy(**asked)])
    risk = table.risk(np.array([1, 0, 1]), np.array([interval_ms, 5, interval_ms]), most=0.04)
    assert risk == pytest.approx([q, 0.5, q])


@given(
    policy=any_policy,
    interval_ms=st.integers(1, 2**40),
    most=st.floats(1e-6, 0.25),
)
def test_a_budget_is_kept_at_any_interval(policy: Policy, interval_ms: int, most: float) -> None:
    (q,) = PolicyTable.of([policy]).risk(np.array([0]), np.array([interval_ms]), most)
    if policy.alarms_per_ms > 0:
        assert q <= most
        assert q <= policy.alarms_per_ms * interval_ms, "alarms a point times points a ms is at most alarms a ms"
        assert q in (most, policy.alarms_per_ms * interval_ms)
    else:
        assert q == policy.q


class Hours:
    """Muted in these hours of the day."""

    def __init__(self, *hours: int) -> None:
        self.hours = hours

    def active(self, timestamp_ms: Int64Array) -> BoolArray:
        return np.isin(timestamp_ms // HOUR_MS % 24, self.hours)


def test_a_rule_is_muted_while_any_of_its_windows_is_open() -> None:
    times = np.arange(26) * HOUR_MS
    assert not Rule().muted(times).any()
    one = Rule(maintenance=(Hours(3), Hours(0, 3, 5)))
    assert np.flatnonzero(one.muted(times)).tolist() == [0, 3, 5, 24]
    assert one.muted(times[:0]).shape == (0,)
    assert not replace(one, maintenance=()).muted(times).any()
