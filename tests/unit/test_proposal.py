"""Which series go together, and the rules file that is proposed for them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream.doctor import Series
from stream.policy import Policy
from stream.proposal import GROUPS_MAX, Group, about, as_yaml, described, percent, propose, rules
from tests.unit.test_doctor import MINUTE, T0, Sent, entity, examined, point, regular


def proposed(*records: Sent) -> list[dict[str, object]]:
    return rules(propose(examined(*records)))


def of(names: Sequence[str], interval_ms: int = MINUTE, n: int = 20) -> list[Sent]:
    return [record for name in names for record in regular(name, n, interval_ms)]


def summary(*records: Sent) -> list[tuple[object, object, object]]:
    return [(rule["match"], rule["name"], rule.get("interval")) for rule in proposed(*records)]


REST = ("*", "others", None)


def test_series_of_one_first_word_and_interval_go_together() -> None:
    found = summary(*of(["checkout.latency", "checkout.errors.rate", "checkout.x"]), *of(["db.a", "db.b"], 10_000))
    assert found == [("checkout.*", "checkout", "1m"), ("db.*", "db", "10s"), REST]


def test_where_intervals_differ_the_narrower_prefix_decides_and_stands_first() -> None:
    found = summary(
        *of(["a.fast.x", "a.fast.y"], 10_000), *of(["a.slow.x", "a.slow.y"]), *of(["a.p", "a.q"], 300_000), *of(["b.c"])
    )
    assert found == [
        ("b.c", "b.c", "1m"),
        ("a.fast.*", "a.fast", "10s"),
        ("a.slow.*", "a.slow", "1m"),
        ("a.*", "a", "5m"),
        REST,
    ]


def test_at_last_they_are_named_one_by_one() -> None:
    found = summary(*of(["a.p", "a.q"], 10_000), *of(["a.r"]))
    assert found == [(["a.p", "a.q"], "a every 10s", "10s"), ("a.r", "a.r", "1m"), REST]
    names = [f"a.{i}" for i in range(60)]
    assert summary(*of(names[:30], 10_000), *of(names[30:])) == [("a.*", "a", None), REST]


def test_names_without_dots() -> None:
    assert summary(*of(["x", "y"])) == [("*", "all", "1m")]
    assert summary(*of(["x"]), *of(["y"], 10_000)) == [("y", "y", "10s"), ("x", "x", "1m"), REST]
    many = [f"k{i}" for i in range(100)]
    assert summary(*of(many), *of(["a.b", "a.c"], 10_000)) == [("a.*", "a", "10s"), ("*", "others", "1m")]
    assert summary(*of(many), *of(["k"], 10_000)) == [("*", "all", None)]


def test_hosts_without_number_are_grouped_by_metric() -> None:
    hosts = [f"host-{i}" for i in range(30)]
    found = summary(*of([f"{h}.cpu" for h in hosts], 10_000), *of([f"{h}.disk" for h in hosts]), *of(["x.y"]))
    assert found == [("*.cpu", "cpu", "10s"), ("*.disk", "disk", "1m"), ("*", "others", "1m")]


def test_too_many_groups_are_one() -> None:
    names = [f"{word}{i}.{word}{i}{j}" for i in range(30) for word in ("a", "b") for j in (1, 2)]
    assert summary(*of(names[:60]), *of(names[60:], 10_000)) == [("*", "all", None)]


def test_too_few_points_go_with_the_others() -> None:
    assert summary(*of(["a.x", "a.y"]), *regular("a.z", 3, 7000)) == [("a.*", "a", "1m"), REST]
    assert summary(*regular("a.z", 3)) == [("a.z", "a.z", None), REST]


def test_an_entity_is_matched_with_its_metrics() -> None:
    one = [entity("web-1", T0 + i * MINUTE, {"cpu": i}) for i in range(20)]
    two = [entity("fleet.web-2", T0 + i * MINUTE, {"cpu": i}) for i in range(20)]
    three = [entity("fleet.web-3", T0 + i * MINUTE, {"cpu": i}) for i in range(20)]
    assert summary(*one, *of(["a.x", "a.y"])) == [(["web-1", "web-1.*"], "web-1", "1m"), ("a.*", "a", "1m"), REST]
    assert summary(*two, *three) == [("fleet.*", "fleet", "1m"), REST]


def test_no_series_no_rules() -> None:
    assert propose(examined()) == []


# -- fields ----------------------------------------------------------------------------------------------------------


def late(by_ms: Sequence[int], interval_ms: int = MINUTE) -> Group:
    """Return the group of a series of which each hundredth record is late by one of these."""
    records = []
    delays = list(by_ms)
    for i in range(100 * len(delays)):
        records.append(point("a.b", T0 + i * interval_ms, i))
        if i % 100 == 99:
            records.append(point("a.b", T0 + i * interval_ms - delays.pop(), i))
    (group,) = propose(examined(*records))
    assert group.interval_ms == interval_ms
    return group


@pytest.mark.parametrize(
    ("late_ms", "interval_ms", "lateness_ms"),
    [
        (42_000, 10_000, 45_000),
        (42_000, MINUTE, MINUTE),  # a whole place on the grid, or it would not be waited for
        (MINUTE, MINUTE, MINUTE),
        (2 * MINUTE + 1, MINUTE, 3 * MINUTE),
        (20_000, MINUTE, 0),  # the same place
        (14 * MINUTE, MINUTE, 14 * MINUTE),
        (50 * MINUTE, MINUTE, 14 * MINUTE),
    ],
)
def test_lateness(late_ms: int, interval_ms: int, lateness_ms: int) -> None:
    group = late([late_ms] * 3, interval_ms)
    assert (group.late, group.late_ms, group.lateness_ms) == (3, late_ms, lateness_ms)
    assert group.too_late is (late_ms > lateness_ms and lateness_ms > 0)


def test_one_in_a_thousand_late_records_does_not_count() -> None:
    records = []
    for i in range(1500):
        records += [point("a", T0 + i * MINUTE), point("a", T0 + (i - 1) * MINUTE if i != 700 else T0 + 500 * MINUTE)]
    (group,) = propose(examined(*records))
    assert (group.late_ms, group.lateness_ms) == (MINUTE, MINUTE)


def test_silent_after_follows_the_gaps() -> None:
    there = [i for i in range(400) if not 50 <= i < 70]
    assert proposed(*(point("a", T0 + i * MINUTE) for i in there))[0]["silent_after"] == 30
    assert proposed(*regular("a", 100))[0]["silent_after"] == 10
    outage = [point("a.0", T0 + i * MINUTE) for i in there]
    assert proposed(*outage, *of([f"a.{k}" for k in range(1, 12)], n=50))[0]["silent_after"] == 10
    rare = [i for i in range(3000) if i % 1500 < 40]
    assert proposed(*(point("a", T0 + i * MINUTE) for i in rare))[0]["silent_after"] == "never"


@pytest.mark.parametrize(
    ("interval_ms", "budget"),
    [
        (1000, "1 per week"),
        (MINUTE, "1 per week"),
        (20 * MINUTE, "1 per week"),
        (60 * MINUTE, "1 per month"),
        (6 * 60 * MINUTE, "1 per year"),
        (30 * 24 * 60 * MINUTE, None),
    ],
)
def test_a_budget_leaves_a_risk_that_a_threshold_can_have(interval_ms: int, budget: str | None) -> None:
    assert proposed(*regular("a", 20, interval_ms))[0].get("false_alarms") == budget


# -- the file --------------------------------------------------------------------------------------------------------


def text_of(*records: Sent) -> str:
    found = examined(*records)
    return as_yaml(found, propose(found), ["Seen on a Monday."])


def test_the_file_says_what_was_seen() -> None:
    records = [r for i, r in enumerate(regular("checkout.x", 200)) if i not in (7, 8)]
    records.insert(100, point("checkout.x", T0 + 80 * MINUTE, 1))
    assert text_of(*records, *of(["checkout.y"])) == (
        "# Seen on a Monday.\n"
        "# The first rule that matches a series is its rule. false_alarms is what each series may make.\n"
        "rules:\n"
        "  # 2 KPIs, such as checkout.x\n"
        "  # every 1m: 100 % of the times on the grid\n"
        "  # 0.9 % of the points missing, for up to 2 min in a row\n"
        "  # 1 of 219 records late, by up to 21 min: more than 14 intervals are not waited for\n"
        "  - match: 'checkout.*'\n"
        "    name: checkout\n"
        "    interval: 1m\n"
        "    false_alarms: 1 per week\n"
        "    lateness: 14m\n"
        "    silent_after: 10\n"
        "  # whatever else comes\n"
        "  - match: '*'\n"
        "    name: others\n"
    )


def test_comments_on_what_is_unclear() -> None:
    found = examined(*of([f"a.{i}" for i in range(60)], 10_000), *of(["a.z"]), *regular("b", 3))
    mixed, unclear = (described(found.series, group) for group in sorted(propose(found), key=lambda g: g.name))
    assert mixed[1] == "intervals differ, each is inferred: 60 every 10s, 1 every 1m"
    assert unclear[1] == "no interval that the sample is sure of: each is inferred"


NAMES = st.lists(
    st.text(st.sampled_from("ab.-*?[]!'\"#:&{ß🙂 "), min_size=1, max_size=12).filter(lambda name: not name.isspace())
    | st.sampled_from(
        ["true", "no", "null", "1", "1.5", "a.b", "a.c", "b.b", "~", "x" * 512, "- x", "@a", "%a", "5m", "x: y"]
    ),
    unique=True,
    min_size=1,
    max_size=30,
)


def first_match(name: str, matches: Sequence[Sequence[str]]) -> int:
    return next(i for i, globs in enumerate(matches) if any(fnmatchcase(name, glob) for glob in globs))


@settings(max_examples=60, deadline=None)
@given(
    names=NAMES, intervals=st.lists(st.sampled_from([10_000, MINUTE]), min_size=30, max_size=30), n=st.integers(1, 9)
)
def test_each_series_falls_under_the_rule_that_was_made_for_it(names: list[str], intervals: list[int], n: int) -> None:
    found = examined(*(record for name, ms in zip(names, intervals, strict=False) for record in regular(name, n, ms)))
    groups = propose(found)
    assert len(groups) <= GROUPS_MAX
    assert sorted(i for group in groups for i in group.members) == list(range(len(found.series)))
    for i, one in enumerate(found.series):
        assert i in groups[first_match(one.name, [group.match for group in groups])].members
    for group in groups:
        if group.interval_ms:
            assert {found.series[i].interval_ms for i in group.members if found.series[i].known} <= {group.interval_ms}


@settings(max_examples=60, deadline=None)
@given(
    names=NAMES, intervals=st.lists(st.sampled_from([10_000, MINUTE, 3_600_000, 604_800_000]), min_size=30, max_size=30)
)
def test_the_file_is_one_that_serve_takes(names: list[str], intervals: list[int]) -> None:
    module = pytest.importorskip("stream.rules")
    records = [record for name, ms in zip(names, intervals, strict=False) for record in regular(name, 9, ms)]
    found = examined(*records, *records[:1])  # late, too
    groups = propose(found)
    ruleset = module.parse_rules(
        as_yaml(found, groups, ["From a test."]), source="proposed.yaml", base=Path(), defaults=Policy()
    )
    assert [rule.name for rule in ruleset.rules][: len(groups)] == [group.name for group in groups]
    for rule, group in zip(ruleset.rules, groups, strict=False):
        assert rule.match == group.match
        assert rule.policy.interval_ms == group.interval_ms
        assert rule.policy.lateness_ms == group.lateness_ms
        assert rule.policy.silent_after == group.silent_after
    assert ruleset.rules[-1].match == ("*",)


# -- words -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ms", "said"),
    [(0, "0 ms"), (999, "999 ms"), (1500, "1.5 s"), (42_000, "42 s"), (90_000, "1.5 min"), (5_400_000, "1.5 h"),
     (172_800_000, "2 d"), (86_400_000 * 4270, "4,270 d")],
)  # fmt: skip
def test_times_for_people(ms: int, said: str) -> None:
    assert about(ms) == said


@pytest.mark.parametrize(
    ("share", "said"),
    [(0.0, "0 %"), (1.0, "100 %"), (0.5, "50 %"), (0.123, "12.3 %"), (0.9996, "99.9 %"), (0.0004, "0.04 %")],
)
def test_shares(share: float, said: str) -> None:
    assert percent(share) == said


def test_a_plain_word_needs_no_quotes() -> None:
    made: Any = re.findall(r"name: (.*)", text_of(*of(["plain-word.a", "plain-word.b", "true.a", "true.b"])))
    assert made == ["plain-word", "'true'", "others"]


def test_an_unsure_series_alone_is_not_given_an_interval() -> None:
    series: Series = examined(*regular("a", 5)).series[0]
    assert series.interval_ms == MINUTE and not series.known
