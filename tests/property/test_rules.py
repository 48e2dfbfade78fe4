import contextlib
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from pathlib import Path
from zoneinfo import ZoneInfo

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from stream.calendars import Calendar
from stream.duration import parse_budget, parse_duration, say_budget, say_duration
from stream.errors import ConfigError
from stream.maintenance import Weekly, instant_ms
from stream.policy import Policy, Rule
from stream.rules import RuleSet, parse_rules

ZONES = (
    *("UTC", "Europe/Berlin", "America/New_York", "America/Havana", "America/St_Johns", "Australia/Lord_Howe"),
    *("Africa/Casablanca", "Africa/Cairo", "Africa/Monrovia", "Pacific/Apia", "Asia/Kathmandu", "Antarctica/Troll"),
)
LAST_MS = 7_258_118_400_000  # 2200
zones = st.sampled_from(ZONES)
# Half of all times lie within a day of where clocks are set in Europe or America.
times = st.integers(0, LAST_MS) | st.builds(
    lambda day, offset: round(day.timestamp() * 1000) + offset,
    st.sampled_from(
        [datetime(*day, tzinfo=UTC) for day in ((2026, 3, 29), (2026, 10, 25), (2027, 3, 14), (2027, 11, 7))]
    ),
    st.integers(-86_400_000, 2 * 86_400_000),
)


def shown(ms: int, zone: str) -> datetime:
    """Return what a clock on the wall shows."""
    return (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=ms)).astimezone(ZoneInfo(zone))


@settings(max_examples=300, deadline=None)
@given(st.sets(st.integers(0, 6), min_size=1), st.integers(0, 1439), st.integers(0, 1440), zones, st.lists(times))
def test_a_weekly_window_is_what_the_clock_on_the_wall_says(
    days: set[int], start: int, end: int, zone: str, at: list[int]
) -> None:
    def naive(ms: int) -> bool:
        clock = shown(ms, zone)
        time = (clock.hour * 60 + clock.minute) * 60_000 + clock.second * 1000 + clock.microsecond // 1000
        today, yesterday = clock.weekday() in days, (clock.weekday() - 1) % 7 in days
        if start < end:
            return today and start * 60_000 <= time < end * 60_000
        return (today and time >= start * 60_000) or (yesterday and time < end * 60_000)

    window = Weekly(tuple(sorted(days)), start, end, zone)
    assert window.active(np.array(at, np.int64)).tolist() == [naive(ms) for ms in at]


@settings(deadline=None)
@given(times, zones)
def test_an_instant_is_found_again_unless_the_clock_shows_it_twice(ms: int, zone: str) -> None:
    local = shown(ms, zone).replace(tzinfo=None, fold=0)
    try:
        assert instant_ms(local, zone) == ms
    except ValueError as e:
        assert "shows twice" in str(e)


# -- the file ---------------------------------------------------------------------------------------------------------

FULL = """\
rules:
  - match: ['checkout.*', "a[bc]?"]
    name: checkout
    model: deepant@1
    interval: 60s
    false_alarms: 1 per day
    direction: high
    least_deviation: [5, '10%']
    drift: 100
    lateness: 5m
    late_points: wait
    silent_after: 10
    recover_ratio: 0.8
    maintenance: [nightly, release]
    topic: alerts.payments
    labels: {team: payments}
  - {match: 'x', watch: false}
maintenance:
  nightly: {days: [mon, tue], from: '22:00', to: '02:00', time_zone: Europe/Berlin}
  release: {start: 2026-11-22T20:00, end: 2026-11-22T22:00}
"""
ICS = b"""BEGIN:VCALENDAR\r
VERSION:2.0\r
BEGIN:VTIMEZONE\r
TZID:Ours\r
BEGIN:STANDARD\r
DTSTART:19701025T030000\r
TZOFFSETFROM:+0200\r
TZOFFSETTO:+0100\r
RRULE:FREQ=YEARLY;BYMONTH=10;BYDAY=-1SU\r
END:STANDARD\r
END:VTIMEZONE\r
BEGIN:VEVENT\r
UID:1\r
DTSTART;TZID=Ours:20260105T220000\r
DURATION:PT4H\r
RRULE:FREQ=WEEKLY;BYDAY=MO,WE;UNTIL=20271231T000000Z\r
EXDATE;TZID=Ours:20260112T220000\r
END:VEVENT\r
BEGIN:VEVENT\r
UID:2\r
DTSTART;VALUE=DATE:20260101\r
DTEND;VALUE=DATE:20260103\r
RRULE:FREQ=YEARLY\r
END:VEVENT\r
END:VCALENDAR\r
"""
words = st.sampled_from([
    *("match: ", "- ", "\n", "\n  ", "\n    ", "''", "[]", "{}", "null", "~", "*", "&a ", "*a", "!!str ", "<<: ", "\t"),
    *("60", "60s", "1e999", ".inf", "-1", "9" * 20, "true", "24:00", "2026-13-45T10:00", "---\n", "? ", "'", "[", "{"),
    *("\0", "\x85", "\u2028", "\ud800", '"\\x00"', "|", ">", "%", "@", "`", "#", ": ", "]", "}"),
])  # fmt: skip


@st.composite
def damaged(draw: st.DrawFn, text: str, pieces: st.SearchStrategy[str]) -> str:
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(text)))
        text = text[:at] + draw(pieces) + text[at + draw(st.integers(0, 12)) :]
    return text


@settings(max_examples=500, deadline=None)
@given(st.text() | st.lists(words).map("".join) | damaged(FULL, words | st.text(max_size=3)))
def test_any_text_is_read_or_refused_with_its_line(text: str) -> None:
    try:
        rules = parse_rules(text, source="r.yaml", base=Path("/nowhere"), defaults=Policy())
    except ConfigError as e:
        message = str(e).split("\n")
        assert all(line.startswith("r.yaml:") for line in message)
        str(e).encode()
        lines = text.count("\n") + text.count("\r") + text.count("\x85") + text.count("\u2028") + text.count("\u2029")
        numbers = [part for line in message if (part := line.split(":")[1]).isdigit()]
        assert all(1 <= int(number) <= lines + 2 for number in numbers)
    else:
        assert rules.rules
        assert all(rule.match and all(rule.match) and rule.name for rule in rules.rules)
        for entity in (False, True):
            rules.explain("checkout.a", entity=entity, features={})


@settings(max_examples=300, deadline=None)
@given(
    damaged(
        ICS.decode(),
        st.text(max_size=3)
        | st.sampled_from(
            ["\r\n", "99991231", "00000000T", "P1000000D", "INTERVAL=9999999;", "COUNT=0;", "BYDAY=9MO;", "-"]
        ),
    ).map(lambda text: text.encode("utf-8", "surrogatepass"))
    | st.binary(),
    zones,
    st.lists(times, max_size=5),
)
def test_any_calendar_is_read_or_refused(data: bytes, zone: str, at: list[int]) -> None:
    with contextlib.suppress(ConfigError):
        assert Calendar.parse(data, zone).active(np.array(at, np.int64)).shape == (len(at),)


# -- which rule -------------------------------------------------------------------------------------------------------

globs = st.text("ab*?.[]!-", min_size=1, max_size=5)
rules = st.builds(
    Rule,
    match=st.lists(globs, min_size=1, max_size=3).map(tuple),
    model=st.sampled_from(["", "one", "many"]),
    watch=st.booleans(),
)
FEATURES = {"": 1, "one": 1, "many": 3}


@given(st.lists(rules, max_size=6), st.text("ab.[]-\n", max_size=5), st.booleans())
def test_the_first_rule_that_matches_is_the_one(several: list[Rule], name: str, entity: bool) -> None:
    def naive() -> int | None:
        for index, rule in enumerate(several):
            passed_by = not entity and rule.watch and FEATURES[rule.model] > 1
            if not passed_by and any(fnmatchcase(name, glob) for glob in rule.match):
                return index
        return None

    rule_set = RuleSet(tuple(several), "")
    found = rule_set.find(name, entity=entity, features=FEATURES)
    assert found == naive()
    last = rule_set.explain(name, entity=entity, features=FEATURES)
    assert (found is None) == ("not watched" in last[-1])
    hidden = {int(line.split("rules[")[1].split("]")[0]) for line in rule_set.hidden(FEATURES)}
    assert found not in hidden


# -- words ------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 10**12))
def test_a_duration_is_read_as_it_is_said(ms: int) -> None:
    assert parse_duration(say_duration(ms)) == ms


@given(st.integers(1, 1000), st.sampled_from(["minute", "hour", "day", "week", "month", "year"]))
def test_a_budget_means_the_same_when_it_is_said_again(count: int, period: str) -> None:
    budget = parse_budget(f"{count} per {period}")
    assert abs(parse_budget(say_budget(budget)) / budget - 1) < 0.01
