"""The sentences: each has the value, what it does, and the next step."""

from __future__ import annotations

import numpy as np
import pytest

from stream.findings import LEVELS, Finding, find, named
from stream.proposal import propose
from tests.unit.test_doctor import MINUTE, T0, Sent, entity, examined, point, regular


def findings(*records: Sent, partitions: int = 1) -> list[Finding]:
    found = examined(*records)
    return find(found, propose(found), partitions=partitions)


def the_only(*records: Sent, partitions: int = 1) -> tuple[str, str]:
    (finding,) = findings(*records, partitions=partitions)
    return finding.level, finding.text


def arriving(name: str, n: int, behind_ms: int, *, zone: str = "Z", interval_ms: int = MINUTE) -> list[Sent]:
    """Return records with ISO times that arrive so much later."""
    moments = np.datetime64(T0, "ms") + np.arange(n) * np.timedelta64(interval_ms, "ms")
    return [
        point(name, f"{moment}{zone}", i, timestamp=T0 + i * interval_ms + behind_ms)
        for i, moment in enumerate(moments.astype("datetime64[s]").tolist())
    ]


def test_a_good_topic_has_none() -> None:
    assert findings(*regular("a", 50), *regular("b", 50), partitions=6) == []
    assert findings(*arriving("a", 50, 500)) == []


def test_lateness_names_the_setting() -> None:
    records = regular("checkout.latency", 400, 10_000)
    for i in (100, 200, 300):
        records.insert(i, point("checkout.latency", T0 + i * 10_000 - 52_000))
    level, text = the_only(*records)
    assert level == "warning"
    assert text == "3 of 403 records of checkout.latency come up to 42 s late: lateness: 45s"


def test_a_topic_that_was_filled_twice() -> None:
    twice = findings(*regular("a", 100), *regular("a", 100))
    assert [finding.level for finding in twice] == ["warning", "note"]
    assert "come up to 1.65 h late: lateness: 14m is all that a window allows for" in twice[0].text
    assert twice[0].text.endswith("was the topic filled twice?")
    assert twice[1].text == "100 records repeat a time of their series (a) with the same value: no matter"


def test_repeated_times_with_another_value() -> None:
    level, text = the_only(*regular("a", 50), point("a", T0 + 49 * MINUTE, -1))
    assert (level, text) == (
        "warning", "1 record repeat a time of their series (a), 1 with another value: the last one counts",
    )  # fmt: skip


def test_a_series_in_several_partitions_is_a_problem() -> None:
    level, text = the_only(*(point("a", T0 + i * MINUTE, i, partition=i % 2) for i in range(50)), partitions=2)
    assert level == "problem"
    assert text.startswith("1 series is seen in more than one partition (a in 0, 1): each is judged on a part")


def test_a_missing_key_matters_where_there_are_partitions() -> None:
    records = regular("a", 50, key=None)
    assert the_only(*records, partitions=1)[0] == "note"
    level, text = the_only(*records, partitions=6)
    assert level == "warning" and text.startswith("the key of 50 records of 1 series is not the series (a)")


def test_refused_records_come_first_with_an_example_and_the_next_step() -> None:
    bad = Sent(b'{"kpi": "a", "timestamp": "yesterday", "value": 1}', offset=17, partition=2)
    records = [*regular("a", 50, key=None), bad, bad, Sent(b"{")]
    texts = [finding.text for finding in findings(*records)]
    assert texts[0] == (
        "2 records would be refused as bad_timestamp, the first at offset 17 of partition 2: the timestamp 'yesterday' "
        "is not ISO 8601; send seconds, milliseconds or ISO 8601"
    )
    assert texts[1].startswith("1 record would be refused as not_json")


@pytest.mark.parametrize(
    ("records", "level", "said"),
    [
        (regular("a", 3), "note", "1 series has fewer than 8 times in the sample (a)"),
        ([point("a", T0 + i * MINUTE, 7) for i in range(50)], "note", "1 series never changes (a)"),
        ([point("a", T0 + i * MINUTE, None) for i in range(50)], "warning", "1 series has null or NaN only (a)"),
        (
            [point("a", T0 + i * MINUTE, None if i % 2 else i) for i in range(50)],
            "warning",
            "many values of 1 series are null or NaN (a: 50 %)",
        ),
        (
            [r for i, r in enumerate(regular("a", 100)) if i % 5 or i < 20],
            None,
            "",
        ),
        (
            [r for i, r in enumerate(regular("a", 100)) if i % 3 or i < 20],
            "warning",
            "1 series has large gaps (a: 26.3 % missing)",
        ),
        (
            [r for i, r in enumerate(regular("a", 400)) if not 100 <= i < 140],
            "note",
            "1 series misses more than 30 points in a row (a: 40 min)",
        ),
        (
            [*regular("a", 100), *regular("b", 20)],
            "warning",
            "1 series has stopped (b since 2026-01-05T00:19:00Z): `silent_after:` tells",
        ),
        (
            [*regular("a", 100), *regular("a", 35, 2 * MINUTE, begin_ms=T0 + 100 * MINUTE)],
            "warning",
            "eight points at different places of 1 series give different intervals (a: 1m by",
        ),
        (
            [entity("e", T0 + i * MINUTE, {"x": i} | ({"y": i} if i % 4 == 0 else {})) for i in range(40)],
            "warning",
            "the metrics of 1 entity vary (e: y in 25 % of its times)",
        ),
        (
            [*regular("e.x", 20), *(entity("e", T0 + i * MINUTE, {"x": i}) for i in range(20))],
            "problem",
            "e.x is both KPI and metric of an entity",
        ),
        (
            [*regular("e", 20), *(entity("e", T0 + i * MINUTE, {"x": i}) for i in range(20))],
            "problem",
            "e come as KPI and as entity",
        ),
        (
            [point("a", (T0 + i * MINUTE) // (1000 if i % 2 else 1), i) for i in range(50)],
            "note",
            "1 series mixes formats of timestamps (a: seconds, milliseconds)",
        ),
        (arriving("a", 50, 3_600_000 * 2 + 700, zone="Z"), "note", "half of the records are more than 2 h old"),
        (arriving("a", 50, -5000), "warning", "50 records lie up to 5 s ahead of their arrival"),
        (arriving("a", 50, 700, zone=""), "note", "50 timestamps have no zone and are read as UTC: ISO 8601 with"),
    ],
)  # fmt: skip
def test_findings(records: list[Sent], level: str | None, said: str) -> None:
    found = [finding for finding in findings(*records) if said and said in finding.text]
    assert [finding.level for finding in found] == ([level] if level else [])
    if level is None:
        assert [f for f in findings(*records) if "gaps" in f.text] == []


def test_local_time_without_a_zone_is_recognised() -> None:
    found = findings(*arriving("a", 50, 2 * 3_600_000 + 800, zone=""))
    assert found[0].level == "problem"
    assert found[0].text == (
        "50 timestamps have no zone and are read as UTC; they lie 2 h behind their arrival: local time? "
        "send a zone, or UTC"
    )


def test_irregular_times() -> None:
    rng = np.random.default_rng(1)
    records = [point("a", T0 + int(ms), i) for i, ms in enumerate(np.cumsum(rng.exponential(MINUTE, 300)))]
    (found,) = [finding for finding in findings(*records) if "irregular" in finding.text]
    assert found.level == "warning" and "give them an `interval:` by a rule" in found.text


def test_the_gravest_stand_first() -> None:
    records = [*regular("a", 3, key=None), Sent(b"{"), *(point("b", T0 + i * MINUTE, 7) for i in range(50))]
    levels = [LEVELS.index(finding.level) for finding in findings(*records, partitions=6)]
    assert levels == sorted(levels) and set(levels) == {0, 1, 2}


def test_a_long_list_of_names_is_cut() -> None:
    series = examined(*(point(name, T0) for name in "abcde")).series
    assert named(series) == "a, b, c and 2 more"
    assert named(series[:2], lambda one: f" {one.times}") == "a 1, b 1"


def test_an_empty_sample() -> None:
    assert findings() == []
