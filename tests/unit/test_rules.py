"""The rules file: what is read of it, what is refused and how that is said, and which rule a series falls under."""

import re
from pathlib import Path

import pytest
import yaml

from models.pot import PotConfig
from stream import nodes
from stream.calendars import Calendar
from stream.duration import parse_budget, parse_duration, say_budget, say_duration
from stream.errors import ConfigError
from stream.maintenance import Once, Weekly
from stream.policy import Policy, Rule
from stream.reload import RulesFile
from stream.rules import Q_MAX, RuleSet, load_rules, parse_rules

ICS = b"""BEGIN:VCALENDAR\r
VERSION:2.0\r
PRODID:-//test//\r
BEGIN:VEVENT\r
UID:1\r
DTSTART;VALUE=DATE:20260101\r
RRULE:FREQ=YEARLY\r
END:VEVENT\r
END:VCALENDAR\r
"""
DAY = 86_400_000
HOUR = 3_600_000
MINUTE = 60_000


def parse(text: str, base: Path = Path(), defaults: Policy | None = None, **options: object) -> RuleSet:
    return parse_rules(text, source="rules.yaml", base=base, defaults=defaults or Policy(), **options)  # type: ignore[arg-type]


def one(*lines: str, defaults: Policy | None = None) -> Rule:
    """Return the rule that has these fields."""
    return parse("\n".join(["rules:", "  - match: a", *(f"    {line}" for line in lines)]), defaults=defaults).rules[0]


def refusal(text: str, base: Path = Path(), **options: object) -> list[str]:
    """Return what is said of a bad file, a line each, without its name."""
    with pytest.raises(ConfigError) as caught:
        parse(text, base, **options)  # type: ignore[arg-type]
    lines = str(caught.value).split("\n")
    assert all(line.startswith("rules.yaml:") for line in lines)
    return [line.removeprefix("rules.yaml:").strip() for line in lines]


# -- what is read -----------------------------------------------------------------------------------------------------

FULL = """\
rules:
  - match: 'checkout.*'
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
    warmup: 12h
    open_after: 2
    recover_after: 4
    recover_ratio: 0.8
    accept_after: 6h
    cooldown: 1h
    maintenance: [nightly, release, holidays]
    topic: [alerts.payments, alerts.all]
    labels: {team: payments, tier: '1'}
    watch: true
  - match:
      - tmp.*
      - 'scratch-[0-9]'
    name: junk
    watch: false
  - {match: '*'}   # all others
maintenance:
  nightly: {days: [mon, Tuesday, WED], from: 22:00, to: '02:00', time_zone: Europe/Berlin}
  release: {start: 2026-11-22T20:00, end: 2026-11-22 22:30:00+02:00, time_zone: Europe/Berlin}
  holidays: {ics: holidays.ics, time_zone: Europe/Berlin}
"""


def test_a_file_with_all_there_is(tmp_path: Path) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text(FULL)
    (tmp_path / "holidays.ics").write_bytes(ICS)
    rules = load_rules(path, Policy())
    first, second, third = rules.rules
    assert first == Rule(
        match=("checkout.*",),
        name="checkout",
        model="deepant@1",
        policy=Policy(
            interval_ms=MINUTE,
            alarms_per_ms=1 / DAY,
            direction=1,
            least_deviation=5.0,
            least_share=0.1,
            drift=100,
            lateness_ms=5 * MINUTE,
            wait=True,
            silent_after=10,
            warmup_ms=12 * HOUR,
            open_after=2,
            recover_after=4,
            recover_ratio=0.8,
            accept_after_ms=6 * HOUR,
            cooldown_ms=HOUR,
        ),
        maintenance=(
            Weekly((0, 1, 2), 22 * 60, 2 * 60, "Europe/Berlin"),
            Once(1_795_374_000_000, 1_795_379_400_000),
            Calendar(ICS, "Europe/Berlin"),
        ),
        topics=("alerts.payments", "alerts.all"),
        labels={"team": "payments", "tier": "1"},
        line=2,
    )
    assert second == Rule(("tmp.*", "scratch-[0-9]"), "junk", watch=False, line=23)
    assert third == Rule(("*",), "*", line=28)
    assert rules.files == (path, tmp_path / "holidays.ics")
    assert rules.windows == (("nightly", "release", "holidays"), (), ())


def test_what_is_not_there_is_taken_from_the_settings() -> None:
    defaults = Policy(interval_ms=1_000, q=1e-3, recover_after=7, least_deviation=2.0, lateness_ms=5)
    assert one(defaults=defaults).policy == defaults
    assert one("recover_after: 1", defaults=defaults).policy.interval_ms == 1_000
    assert one("least_deviation: '5%'", defaults=defaults).policy.least_deviation == 0, "a field as a whole"
    assert one("late_points: wait", defaults=defaults).policy.wait


def test_q_takes_the_place_of_the_settings_budget() -> None:
    policy = one("q: 1e-3", defaults=Policy(alarms_per_ms=1e-9)).policy
    assert (policy.q, policy.alarms_per_ms) == (1e-3, 0.0)


@pytest.mark.parametrize(
    ("line", "field", "value"),
    [
        ("interval: 500ms", "interval_ms", 500),
        ("interval: '1.5 h'", "interval_ms", 90 * MINUTE),
        ("warmup: 0s", "warmup_ms", 0),
        ("warmup: 1w", "warmup_ms", 7 * DAY),
        ("direction: low", "direction", -1),
        ("direction: 'both'", "direction", 0),
        ("q: 0.005", "q", 0.005),
        ("q: 1E-6", "q", 1e-6),
        ("q: .001", "q", 1e-3),
        ("least_deviation: 0", "least_deviation", 0.0),
        ("least_deviation: 1e3", "least_deviation", 1e3),
        ("least_deviation: 12.5%", "least_share", 0.125),
        ("least_deviation: ['10%']", "least_share", 0.1),
        ("drift: 0", "drift", 0),
        ("silent_after: never", "silent_after", 0),
        ("silent_after: 1", "silent_after", 1),
        ("recover_ratio: 1", "recover_ratio", 1.0),
        ("false_alarms: none at all", "", None),
        ("false_alarms: 2 a week", "alarms_per_ms", 2 / (7 * DAY)),
    ],
)
def test_a_field_and_what_it_means(line: str, field: str, value: object) -> None:
    if not field:
        with pytest.raises(ConfigError, match="every threshold has its risk"):
            one(line)
        return
    assert getattr(one(line).policy, field) == value


@pytest.mark.parametrize(
    ("interval", "after", "cells"), [("60s", "15m", 15), ("60s", "90s", 2), ("60s", "1s", 1), ("7s", "1h", 515)]
)
def test_a_silence_in_time_is_counted_in_whole_intervals(interval: str, after: str, cells: int) -> None:
    assert one(f"interval: {interval}", f"silent_after: {after}").policy.silent_after == cells
    assert one(f"silent_after: {after}", defaults=Policy(interval_ms=parse_duration(interval))).policy.silent_after == (
        cells
    )


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        ("{from: '22:00', to: '6:00'}", Weekly(tuple(range(7)), 1320, 360)),
        ("{from: 08:30, to: 24:00, days: sat}", Weekly((5,), 510, 1440)),
        ("{from: 0:00, to: 00:00, days: [sunday, mon]}", Weekly((0, 6), 0, 0)),
        ("{start: 2026-11-22T20:00, end: 2026-11-22T21:00:30}", Once(1_795_377_600_000, 1_795_381_230_000)),
        ("{start: '2026-11-22 20:00Z', end: 2026-11-23 00:00 +01:00}", Once(1_795_377_600_000, 1_795_388_400_000)),
        (  # the second 02:30 of that night
            "{start: 2026-10-25T02:30+01:00, end: 2026-10-25T03:00, time_zone: Europe/Berlin}",
            Once(1_792_891_800_000, 1_792_893_600_000),
        ),
    ],
)
def test_a_maintenance_window(window: str, expected: object) -> None:
    rules = parse(f"rules: [{{match: a, maintenance: w}}]\nmaintenance: {{w: {window}}}")
    assert rules.rules[0].maintenance == (expected,)


def test_a_rule_without_a_name_is_called_by_its_first_glob() -> None:
    assert parse("rules: [{match: [b, c]}]").rules[0].name == "b"


def test_a_byte_order_mark_and_other_line_ends_are_no_matter(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xef\xbb\xbfrules:\r\n  - match: 'caf\xc3\xa9.*'\r\n")
    assert load_rules(path, Policy()).rules == (Rule(("café.*",), "café.*", line=2),)


def test_the_reader_without_libyaml_reads_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "holidays.ics").write_bytes(ICS)
    expected = parse(FULL, tmp_path)
    monkeypatch.setattr(nodes, "_LOADER", yaml.SafeLoader)
    assert parse(FULL, tmp_path) == expected
    assert refusal("rules:\n  - match: a: b") == ["2: is no YAML: mapping values are not allowed here"]


def test_the_settings_interval_bounds_the_budget() -> None:
    with pytest.raises(ConfigError, match="is every point at an interval of 60 s"):
        one("false_alarms: 1 per minute", defaults=Policy(interval_ms=MINUTE))
    assert one("false_alarms: 1 per minute").policy.alarms_per_ms == 1 / MINUTE, "left to the core"


def test_the_digest_is_of_the_content(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rules.yaml").write_text(FULL)
        (tmp_path / name / "holidays.ics").write_bytes(ICS)
    first, second = (load_rules(tmp_path / name / "rules.yaml", Policy()) for name in ("a", "b"))
    assert first.digest == second.digest
    (tmp_path / "b" / "holidays.ics").write_bytes(ICS.replace(b"0101", b"0102"))
    assert load_rules(tmp_path / "b" / "rules.yaml", Policy()).digest != first.digest
    assert parse("rules: [{match: a}]").digest != parse("rules: [{match: a}] # x").digest


def test_without_a_file_one_rule_watches_all() -> None:
    policy = Policy(q=1e-3)
    rules = RuleSet.default(policy)
    assert rules.rules == (Rule(policy=policy),)
    assert (rules.rules[0].name, rules.files) == ("", ())
    assert rules.find("anything", entity=False, features={}) == 0
    assert rules.explain("x", entity=False, features={})[1] == "  the settings: yes, by '*'"


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty; write `rules:` and below it a list, each item with a `match:`"),
        ("# nothing\n---\n", "is empty"),
        ("{}", "is empty"),
        ("- match: a", "1: is a list; it begins with `rules:`"),
        ("hello", "1: is text; it begins with `rules:`"),
        ("maintenance: {}", "1: has no `rules`; write"),
        ("rule:\n  - match: a", "1: rule: is no field of the rules file; did you mean rules?"),
        ("rules:", "1: rules: is empty, so that nothing would be watched"),
        ("rules: []", "1: rules: is empty"),
        ("rules: a", "1: rules: must be a list (each item begins with `-`), and is text"),
        ("rules:\n  match: a", "2: rules: must be a list (each item begins with `-`), and is a mapping"),
        ("rules:\n  - a", "2: rules[0]: must be fields (`match: …`), and is text"),
        ("rules:\n  - match: a\n  -\n", "3: rules[1]: is empty; give it a `match:`, or remove it"),
        ("rules:\n  - {}", "2: rules[0]: is empty"),
        ("rules: [{match: a}]\nrules: [{match: b}]", "2: rules: is there twice, first in line 1; remove one"),
        ("rules:\n  - match: a\n    q: 1e-3\n    q: 1e-4", "4: rules[0].q: is there twice, first in line 3"),
        ("rules:\n\t- match: a", "2: is indented by a tab; YAML wants blanks"),
        ("rules:\n  - match: a\n  \t interval: 60s", "3: is indented by a tab"),
        ("rules:\n  - match: 'a\n", "is no YAML: found unexpected end of stream"),
        ("rules:\n  - match: a: b", "2: is no YAML: mapping values are not allowed"),
        ("rules:\n  - match: a\n   name: b", "3: is no YAML: "),
        ("rules:\n  - match: *", "2: is no YAML: "),
        ("rules: [{match: a}]\n---\nrules: [{match: b}]", "2: begins a second document (---); one file holds one"),
        ("rules:\n  - &a {match: a}\n  - *a", "2: has an anchor (&a); those are not read here, write the value out"),
        ("rules:\n  - match: a\n    name: *a", "3: refers to an anchor (*a)"),
        ("rules:\n  - <<: {match: a}", "2: merges another mapping (<<); write its fields out"),
        ("rules: !!python/object/apply:os.system ['true']", "1: has a tag (tag:yaml.org,2002:python/object/apply:os"),
        ("rules:\n  - match: !!str a", "2: has a tag (tag:yaml.org,2002:str); those are not read here, remove it"),
        ("rules:\n  - ? [a]\n    : b", "2: has a list for a key; a key is a word"),
        ("rules: " + "[" * 50, "1: is nested more than 12 levels deep"),
        ("rules:\n  - match: a\x07", "2: holds the character U+0007, which YAML does not allow; remove it"),
        ("rules:\n  - match: \ud800", "2: is not Unicode text"),
        ("#" * (2**20 + 1), "is larger than 1,048,576 bytes"),
    ],
)
def test_a_bad_file_is_refused(text: str, message: str) -> None:
    assert any(message in line for line in refusal(text))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        # empty never stands for all
        (
            "match:",
            "match: is empty, which never stands for all; write a glob, such as 'checkout.*'; '*' is every series",
        ),
        ("match: ''", "match: is empty, which never stands for all"),
        ("match: '  '", "match: is empty, which never stands for all"),
        ("match: []", "match: is empty, which never stands for all"),
        ("match: null", "match: is empty, which never stands for all"),
        ("match: ~", "match: is empty, which never stands for all"),
        ("match: {}", "match: is empty, which never stands for all"),
        ("match: [a, '']", "match[1]: '': is empty"),
        ("match: [a, ]\n    interval:", "interval: is empty; give it a value, or remove it for the default"),
        ("name: ''", "name: is empty"),
        ("labels: {}", "labels: is empty"),
        ("topic: []", "topic: is empty"),
        ("maintenance: []", "maintenance: is empty"),
        ("topic: ['', a]", "topic[0]: '': is empty"),
        ("labels: {team: }", "labels: 'team': is a label without a value"),
        ("", "has no `match`; write a glob"),
        # globs
        ("match: 5", "match: '5': is a number in YAML, and must be text; write '5' with its quotes"),
        ("match: yes", "match: 'yes': is true or false in YAML, and must be text"),
        ("match: {a: b}", "match: must be text, and is a mapping"),
        ("match: [[a]]", "match[0]: must be text, and is a list"),
        ("match: [a, b, a]", "match[2]: 'a': is there twice; remove one"),
        ("match: 'a[bc'", "match: 'a[bc': has a [ that is not closed; for the character itself write [[]"),
        ("match: 'a[]'", "has a [ that is not closed"),
        ("match: 'a[z-a]'", "match: 'a[z-a]': has a range in [ ] that holds nothing"),
        ("match: ' a'", "match: ' a': begins or ends with a blank; remove that"),
        ('match: "a\\tb"', "match: 'a\\tb': holds a control character"),
        (f"match: '{'é' * 300}'", "is longer than 512 bytes"),
        # names of fields
        ("intervall: 60s", "intervall: is no field of a rule; did you mean interval?"),
        ("False-Alarms: 1 per day", "False-Alarms: is no field of a rule; did you mean false_alarms?"),
        ("colour: red", "colour: is no field of a rule; there are match, name, model, shadow, watch, interval,"),
        ("? ''\n    : a", "'': is no field of a rule"),
        # durations
        ("interval: 60", "interval: '60': has no unit; write 60s, 60m, 60h or another of ms, s, m, h, d, w"),
        (
            "interval: 60sec",
            "interval: '60sec': has no unit that is known; write one of ms, s, m, h, d, w, such as 60s",
        ),
        ("interval: 5M", "interval: '5M': has no unit that is known"),
        ("interval: soon", "interval: 'soon': is no duration; write a number and its unit, such as 500ms"),
        ("interval: -5m", "interval: '-5m': is no duration"),
        ("interval: 1h30m", "interval: '1h30m': is no duration"),
        ("interval: 0s", "interval: '0s': must be at least 1ms and at most 366d"),
        ("interval: 60w", "interval: '60w': must be at least 1ms and at most 366d"),
        ("interval: 0.5ms", "interval: '0.5ms': is no whole number of milliseconds"),
        ("interval: [60s]", "interval: must be a duration, such as 5m, and is a list"),
        ("lateness: 8d", "lateness: '8d': must be at most 7d"),
        ("accept_after: 0s", "accept_after: '0s': must be at least 1ms"),
        ("cooldown: 400d", "cooldown: '400d': must be at most 366d"),
        ("warmup: 24", "warmup: '24': has no unit"),
        # the alarm budget
        ("false_alarms: 3", "false_alarms: '3': is a number in YAML, and must be text"),
        (
            "false_alarms: few",
            "false_alarms: 'few': is no budget; write N per minute, hour, day, week, month or year, such as",
        ),
        ("false_alarms: 1 per fortnight", "false_alarms: '1 per fortnight': is no budget"),
        (
            "false_alarms: none",
            "false_alarms: 'none': cannot be: every threshold has its risk; write a small one, such as 1 per year",
        ),
        ("false_alarms: 0 per day", "false_alarms: '0 per day': cannot be"),
        ("false_alarms: 0.001 per year", "false_alarms: '0.001 per year': is too small a budget"),
        ("false_alarms: -1 per day", "false_alarms: '-1 per day': is no budget"),
        ("false_alarms: 1 per day\n    q: 1e-3", "q: and `false_alarms` say the same; remove one of them"),
        (
            "false_alarms: 1 per minute\n    interval: 60s",
            "false_alarms: '1 per minute': is every point at an interval of 60 s; at most 7.2 per day (q 0.005)",
        ),
        (
            "false_alarms: 1 per hour\n    interval: 1m",
            "false_alarms: '1 per hour': is one point in 60 at an interval of 60 s; at most 7.2 per day",
        ),
        ("q: 0", "q: '0': must lie in 1e-09 ... 0.005, as the share of normal points that may alarm"),
        ("q: 0.01", "q: '0.01': must lie in 1e-09 ... 0.005"),
        ("q: '1e-4'", "q: '1e-4': is text, and must be a number; remove the quotes"),
        ("q: .nan", "q: '.nan': must be a number"),
        ("q: [1e-4]", "q: must be a number, and is a list"),
        # the rest
        ("direction: up", "direction: 'up': is none of high, low, both; write high or low or both"),
        ("direction: High", "direction: 'High': is none of high, low, both; did you mean high?"),
        ("least_deviation: -5", "least_deviation: '-5': must lie in 0 ... 1e+30"),
        ("least_deviation: '5'", "least_deviation: '5': must be a number, 5, or a share of the expected value, '10%'"),
        ("least_deviation: 5 %%", "least_deviation: '5 %%': must be a number"),
        ("least_deviation: .inf", "least_deviation: '.inf': must be a number"),
        ("least_deviation: [1, 2]", "least_deviation[1]: '2': is the second of its kind"),
        ("least_deviation: [1, ]\n    drift: -1", "drift: '-1': must lie in 0 ... 10,000"),
        ("least_deviation: ['1%', ~]", "least_deviation[1]: '~': is empty"),
        ("least_deviation: 20000%", "least_deviation: '20000%': must lie in 0 ... 10000%"),
        ("drift: 1", "drift: '1': must be 0 (off) or 2 ... 10,000 scores"),
        ("drift: 1.5", "drift: '1.5': must be a whole number, 0 ... 10,000"),
        ("late_points: drop\n    lateness: 5m", "late_points: 'drop': is none of correct, wait"),
        ("late_points: wait", "late_points: has no effect without `lateness`, how late they may be; add one"),
        ("silent_after: 0", "silent_after: '0': must lie in 1 ... 1,000,000"),
        ("silent_after: 2.5", "silent_after: '2.5': must be a number of intervals, 10, a duration, 15m, or never"),
        ("silent_after: off", "silent_after: 'off': must be a number of intervals"),
        ("silent_after: 15m", "silent_after: '15m': is a duration, and needs an `interval` to count it in"),
        ("silent_after: 0s\n    interval: 5s", "silent_after: '0s': must be above 0 and at most 366d, or never"),
        ("open_after: 0", "open_after: '0': must lie in 1 ... 1,000"),
        ("open_after: '2'", "open_after: '2': is text, and must be a whole number; remove the quotes"),
        ("recover_after: three", "recover_after: 'three': must be a whole number, 1 ... 10,000"),
        ("recover_after: true", "recover_after: 'true': must be a whole number"),
        ("recover_ratio: 1.1", "recover_ratio: '1.1': must lie in 0.01 ... 1, as a share of the threshold"),
        ("recover_ratio: 0", "recover_ratio: '0': must lie in 0.01 ... 1"),
        ("model: DeepAnT", "model: 'DeepAnT': is no model; 'DeepAnT' is not the name of a model: 1 to 100 of a-z"),
        ("model: ../x", "model: '../x': is no model"),
        ("model: deepant@0", "model: 'deepant@0': is no model; '0' in 'deepant@0' is no version and no label"),
        ("topic: a b", "topic: 'a b': is no name of a Kafka topic; 1 to 249 of a-z A-Z 0-9 . _ - are"),
        ("topic: ..", "topic: '..': is no name of a Kafka topic"),
        (f"topic: {'a' * 250}", "is no name of a Kafka topic"),
        ("topic: __consumer_offsets", "topic: '__consumer_offsets': is a name that Kafka keeps for itself"),
        (
            "topic: kpi.points",
            "topic: 'kpi.points': is a topic that this service itself reads or writes; choose another",
        ),
        ("topic: [a, kpi.points]", "topic[1]: 'kpi.points': is a topic that"),
        ("topic: no", "topic: 'no': is true or false in YAML, and must be text; write 'no' with its quotes"),
        ("labels: [a]", "labels: must be a mapping, such as {team: payments}, and is a list"),
        ("labels: {team: 42}", "labels.team: '42': is a number in YAML, and must be text; write '42' with its quotes"),
        ("labels: {1: a}", "labels: '1': is a number in YAML, and must be text"),
        ("labels: {team: [a]}", "labels.team: must be text, and is a list"),
        ("labels: {team: a, team: b}", "labels.team: is there twice"),
        (f"labels: {{{', '.join(f'k{i}: v' for i in range(33))}}}", "labels: holds 33 labels, at most 32"),
        ("watch: no", "watch: 'no': must be true or false"),
        ("watch: 'false'", "watch: 'false': is text, and must be true or false; remove the quotes"),
        ("watch: false\n    q: 1e-3", "q: says how to watch, but `watch: false` says not to"),
        ("maintenance: nigthly", "maintenance: 'nigthly': there is no such maintenance window; did you mean nightly?"),
        ("maintenance: [nightly, weekly]", "maintenance[1]: 'weekly': there is no such maintenance window"),
        ("maintenance: xyz", "there is no such maintenance window; define it below `maintenance:` at the top level"),
        ("maintenance: [nightly, nightly]", "maintenance[1]: 'nightly': is there twice; remove one"),
    ],
)
def test_a_bad_rule_is_refused(line: str, message: str) -> None:
    fields = [] if line.startswith(("match", "? ")) or not line else ["match: a"]
    text = "\n    ".join([*fields, line or "name: b"])
    windows = "maintenance: {nightly: {from: '22:00', to: '23:00'}}"
    user = "  - {match: user, maintenance: nightly}"
    said = refusal(f"# rules\nrules:\n  - {text}\n{user}\n{windows}", reserved_topics=["kpi.points", "kpi.rejects"])
    at = next(iter(said))
    assert re.match(r"\d+: rules\[0\]", at), at
    assert message in at
    last = 3 + text.count("\n")
    assert int(at.split(":")[0]) in range(3, last + 1)


@pytest.mark.parametrize(
    ("window", "message"),
    [
        ("", "w: is empty; write `from` and `to` (weekly), `start` and `end` (once), or `ics` (a calendar)"),
        ("{}", "w: is empty"),
        ("nightly", "w: must be fields, and is text"),
        ("[a]", "w: must be fields, and is a list"),
        ("{time_zone: UTC}", "w: says no time; write `from` and `to` (weekly)"),
        ("{form: '22:00', to: '23:00'}", "w.form: is no field of a window; did you mean from?"),
        ("{from: '22:00', end: 2026-11-22T20:00}", "w: mixes weekly with once"),
        ("{ics: a.ics, from: '22:00', to: '23:00'}", "w: mixes weekly with calendar"),
        ("{from: '22:00'}", "w: has no `to`; write a time of the day, such as '22:00'"),
        ("{days: [mon]}", "w: has no `from`"),
        ("{from: , to: '23:00'}", "w.from: is empty, which never stands for all; write a time of the day"),
        ("{from: '22:00', to: ''}", "w.to: is empty"),
        ("{from: '24:00', to: '23:00'}", "w.from: '24:00': is no time of the day; write '00:00' ... '23:59'"),
        ("{from: '22:00', to: '24:01'}", "w.to: '24:01': is no time of the day; write '00:00' ... '24:00'"),
        ("{from: '22:60', to: '23:00'}", "w.from: '22:60': is no time of the day"),
        ("{from: 22, to: '23:00'}", "w.from: '22': is no time of the day"),
        ("{from: 10pm, to: '23:00'}", "w.from: '10pm': is no time of the day"),
        ("{from: ['22:00'], to: '23:00'}", "w.from: must be a time of the day, such as '22:00', and is a list"),
        ("{from: '22:00', to: '23:00', days: []}", "w.days: is empty"),
        ("{from: '22:00', to: '23:00', days: [mo]}", "w.days[0]: 'mo': is no day of the week; did you mean mon?"),
        ("{from: '22:00', to: '23:00', days: [1]}", "w.days[0]: '1': is a number in YAML, and must be text"),
        (
            "{from: '22:00', to: '23:00', days: [xx]}",
            "w.days[0]: 'xx': is no day of the week; write some of [mon, tue,",
        ),
        ("{from: '22:00', to: '23:00', days: [mon, Monday]}", "w.days[1]: 'Monday': is there twice"),
        ("{from: '22:00', to: '23:00', from: '21:00'}", "w.from: is there twice"),
        (
            "{from: '22:00', to: '23:00', time_zone: Europe/Berln}",
            "w.time_zone: 'Europe/Berln': is no time zone that is known here; did you mean Europe/Berlin?",
        ),
        ("{from: '22:00', to: '23:00', time_zone: Europe}", "w.time_zone: 'Europe': is no time zone"),
        ("{from: '22:00', to: '23:00', time_zone: /etc/passwd}", "w.time_zone: '/etc/passwd': is no time zone"),
        ("{from: '22:00', to: '23:00', time_zone: ../UTC}", "w.time_zone: '../UTC': is no time zone"),
        ("{from: '22:00', to: '23:00', time_zone: localtime}", "w.time_zone: 'localtime': is no time zone"),
        ("{from: '22:00', to: '23:00', time_zone: '+01:00'}", "w.time_zone: '+01:00': is no time zone"),
        ("{from: '22:00', to: '23:00', time_zone: ''}", "w.time_zone: is empty"),
        ("{start: 2026-11-22T20:00}", "w: has no `end`; write a time, such as 2026-11-22T20:00"),
        ("{start: , end: 2026-11-22T20:00}", "w.start: is empty"),
        (
            "{start: 2026-11-22, end: 2026-11-23}",
            "w.start: '2026-11-22': is no date with its time; write it as 2026-11-22T20:00, or with +01:00",
        ),
        ("{start: tomorrow, end: 2026-11-23T00:00}", "w.start: 'tomorrow': is no date with its time"),
        ("{start: 2026-02-29T00:00, end: 2026-11-23T00:00}", "w.start: '2026-02-29T00:00': is no date with its time: "),
        ("{start: 2026-11-22T25:00, end: 2026-11-23T00:00}", "w.start: '2026-11-22T25:00': is no date with its time: "),
        ("{start: 0001-01-01T00:00, end: 2026-11-23T00:00}", "w.start: '0001-01-01T00:00': must lie in 1971 ... 2199"),
        ("{start: 2026-11-22T20:00, end: 2026-11-22T20:00}", "w.end: '2026-11-22T20:00': is not after `start`"),
        (
            "{start: 2026-11-22T20:00, end: 2026-11-22T20:30+01:00}",
            "w.end: '2026-11-22T20:30+01:00': is not after `start`",
        ),
        (
            "{start: 2026-11-22T20:00, end: 2028-11-22T20:00}",
            "w.end: '2028-11-22T20:00': is more than 366 days after `start`",
        ),
        (
            "{start: 2026-03-29T02:30, end: 2026-03-29T04:00, time_zone: Europe/Berlin}",
            "w.start: '2026-03-29T02:30': never shows on a clock in Europe/Berlin",
        ),
        (
            "{start: 2026-10-25T02:30, end: 2026-10-25T04:00, time_zone: Europe/Berlin}",
            "w.start: '2026-10-25T02:30': shows twice on a clock in Europe/Berlin, as they are set back; write 2026",
        ),
        ("{ics: }", "w.ics: is empty"),
        ("{ics: 5}", "w.ics: '5': is a number in YAML, and must be text"),
        ("{ics: none.ics}", "w.ics: 'none.ics': does not exist"),
        ("{ics: .}", "w.ics: '.': is not a file"),
        ('{ics: "a\\0b"}', "w.ics: 'a\\x00b': holds a control character"),
        (f"{{ics: {'a' * 300}}}", "cannot be read: File name too long"),
        ("{ics: a/b/../../none.ics}", "w.ics: 'a/b/../../none.ics': does not exist"),
        ("{ics: empty.ics}", "w.ics: 'empty.ics': is empty: an iCalendar file begins with BEGIN:VCALENDAR"),
        ("{ics: large.ics}", "w.ics: 'large.ics': is larger than 1,048,576 bytes"),
        ("{ics: text.ics}", "w.ics: 'text.ics': is no iCalendar file: "),
        ("{ics: minutely.ics}", "w.ics: 'minutely.ics': line 7: 'FREQ=MINUTELY' repeats minutely: no maintenance does"),
        ("{ics: none.ics, time_zone: Nowhere}", "w.time_zone: 'Nowhere': is no time zone"),
    ],
)
def test_a_bad_maintenance_window_is_refused(window: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "empty.ics").touch()
    (tmp_path / "large.ics").write_bytes(b" " * 2**20 + b"x")
    (tmp_path / "text.ics").write_text("hello")
    (tmp_path / "minutely.ics").write_bytes(ICS.replace(b"YEARLY", b"MINUTELY"))
    said = refusal(f"rules:\n  - match: a\n    maintenance: w\nmaintenance:\n  w: {window}", tmp_path)
    assert said[0].startswith("5: maintenance.w")
    assert message in said[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("maintenance:", "2: maintenance: is empty; define a window, or remove it"),
        ("maintenance: [a]", "2: maintenance: must be windows by name (`nightly: …`), and is a list"),
        ("maintenance: {1: {from: '1:00', to: '2:00'}}", "2: maintenance.1: is no name of a window; write a word"),
        ("maintenance: {'': {from: '1:00', to: '2:00'}}", "2: maintenance.'': is no name of a window"),
        (
            "maintenance: {w: {from: '1:00', to: '2:00'}}",
            "2: maintenance.w: no rule uses it; add `maintenance: [w]` to one, or remove it",
        ),
        ("maintenance: {w: {ics: a}, w: {ics: b}}", "2: maintenance.w: is there twice, first in line 2"),
        ("maintainance: {}", "2: maintainance: is no field of the rules file; did you mean maintenance?"),
    ],
)
def test_bad_maintenance_is_refused(text: str, message: str) -> None:
    assert message in "\n".join(refusal(f"rules: [{{match: a}}]\n{text}"))


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rules.yaml"
    for content, message in [
        (None, f"{path}: does not exist"),
        (b"rules:\n  - match: caf\xe9", rf"{path}:2: is not UTF-8 \(byte 0xe9\); save it as UTF-8"),
        ("rules: []".encode("utf-16"), f"{path}:1: is not UTF-8"),
        (b"#" * (2**20 + 1), f"{path}: is larger than 1,048,576 bytes"),
        (b"", f"{path}: is empty"),
    ]:
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ConfigError, match=message):
            load_rules(path, Policy())
    with pytest.raises(ConfigError, match="is not a file"):
        load_rules(tmp_path, Policy())
    with pytest.raises(ConfigError, match="cannot be read: File name too long"):
        load_rules(tmp_path / ("a" * 300), Policy())


def test_all_that_is_wrong_is_said_at_once_in_the_order_of_the_file() -> None:
    said = refusal("""\
maintenance:
  nightly: {from: '25:00', to: '02:00'}
rules:
  - match:
    interval: 60
  - match: '*'
    direction: up
    topic: [a b, c]
  - match: b
    watch: false
  - match: '*'
    name: late
""")
    assert [line.split(":")[:2] for line in said] == [
        ["2", " maintenance.nightly.from"],
        ["2", " maintenance.nightly"],
        ["4", " rules[0].match"],
        ["5", " rules[0].interval"],
        ["7", " rules[1].direction"],
        ["8", " rules[1].topic[0]"],
        ["9", " rules[2].match"],
        ["11", " rules[3].match"],
    ]


def test_of_very_many_mistakes_the_first_are_said() -> None:
    said = refusal("rules:\n" + "  - match:\n" * 80)
    assert len(said) == 51
    assert said[-1] == "and 30 more"


# -- rules among themselves -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            "[{match: '*'}, {match: a}]",
            "1: rules[1].match: 'a' is never reached: rules[0] ('*', line 1) takes those series first; move this",
        ),
        ("[{match: '**'}, {match: [a, b*]}]", "rules[1].match: 'a' or 'b*' is never reached: rules[0]"),
        ("[{match: [a, b]}, {match: b, name: x}]", "rules[1].match: 'b' is never reached: rules[0] ('a', line 1)"),
        (
            "[{match: a}, {match: b}, {match: [a, b], name: x}]",
            "rules[2].match: 'a' or 'b' is never reached: rules[0] ('a', line 1) and rules[1] ('b', line 1) take",
        ),
        ("[{match: a, watch: false}, {match: a, model: m, name: x}]", "rules[1].match: 'a' is never reached"),
        ("[{match: a, model: m}, {match: a, model: m, name: x}]", "rules[1].match: 'a' is never reached"),
        ("[{match: '*'}, {match: a, watch: false}]", "rules[1].match: 'a' is never reached"),
        (
            "[{match: a, name: x}, {match: b, name: x}]",
            "rules[1].name: 'x' is the name of rules[0] (line 1) too; give it another",
        ),
        (
            "[{match: a, model: m}, {match: a}]",
            "rules[1].name: 'a' is the name of rules[0] (line 1) too; give it a `name`",
        ),
    ],
)
def test_a_rule_that_is_never_reached_or_has_the_name_of_another(rules: str, message: str) -> None:
    assert any(message in line for line in refusal(f"rules: {rules}"))


def test_a_rule_for_entities_hides_none_for_kpis() -> None:
    rules = parse("""\
rules:
  - {match: 'machine-*', model: mtad, name: machines}
  - {match: 'machine-*.tmp', watch: false}
  - {match: 'machine-*', watch: false, name: metrics}
  - {match: '*'}
  - {match: 'db-*', model: small}
""")
    features = {"mtad": 38, "": 1, "small": 1}
    assert rules.hidden(features) == [
        "line 6: rules[4].match: 'db-*' is never reached: rules[3] ('*', line 5) takes those series first; "
        "move this rule up"
    ]
    assert rules.hidden({"mtad": 38, "": 7}) == []
    assert len(rules.hidden({"mtad": 1, "": 1})) == 2

    def found(name: str, entity: bool) -> int | None:
        return rules.find(name, entity=entity, features=features)

    assert [found(name, True) for name in ("machine-1", "web-1")] == [0, 3]
    assert [found(name, False) for name in ("machine-1", "machine-1.tmp", "web-1.cpu")] == [2, 1, 3]


def test_case_counts_and_the_first_match_wins() -> None:
    rules = parse("rules: [{match: 'Check*'}, {match: ['check*', 'x?[!0-9]']}]")
    names = ["Checkout", "checkout", "CHECK", "xy1", "xyz", "a.check", "check\nx"]
    assert [rules.find(name, entity=False, features={}) for name in names] == [0, 1, None, None, 1, None, 1]


def test_a_series_is_explained() -> None:
    rules = parse("""\
rules:
  - match: 'machine-*'
    model: mtad
  - match: [tmp.*, old.*]
    watch: false
  - match: 'machine-*'
    name: metrics
    interval: 60s
    false_alarms: 1 per week
    direction: high
    least_deviation: [5, 10%]
    lateness: 5m
    late_points: wait
    silent_after: 15m
    recover_ratio: 0.8
    topic: alerts
    labels: {team: infra}
    maintenance: nightly
maintenance:
  nightly: {from: '22:00', to: '23:00'}
""")
    assert rules.explain("machine-1.cpu", entity=False, features={"mtad": 38}) == [
        "KPI machine-1.cpu",
        "  rules[0] 'machine-*' (line 2): passed by, its model mtad takes 38 features and a KPI is one",
        "  rules[1] 'tmp.*' (line 4): no, 'tmp.*' or 'old.*' does not match",
        "  rules[2] 'metrics' (line 6): yes, by 'machine-*'",
        "  model          that of the settings",
        "  interval       1m",
        "  false alarms   1 per week at 60 s = q 9.9e-05",
        "  alarms         above what is expected, by at least 5 and by 10 % of it",
        "  lateness       5m, waits for late points",
        "  silent after   15 intervals without a point",
        "  warm-up        1d",
        "  opens with     the first anomalous point",
        "  recovers with  3 normal points in a row, scores below 0.8 of the threshold",
        "  accepted after 12h, as the new normal",
        "  maintenance    nightly",
        "  topics         alerts besides that of all events",
        "  labels         team=infra",
    ]
    assert rules.explain("old.a", entity=False, features={})[-1] == "  ignored (watch: false)"
    assert rules.explain("web", entity=False, features={})[-1] == "  no rule matches: it is not watched"
    entity = rules.explain("machine-1", entity=True, features={"mtad": 38})
    assert entity[:4] == [
        "entity machine-1",
        "  rules[0] 'machine-*' (line 2): yes, by 'machine-*'",
        "  model          mtad",
        "  interval       inferred from the first points",
    ]


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        (Policy(), "q 0.0001"),
        (Policy(interval_ms=60_000), "q 0.0001 at 60 s = 1.01 per week"),
        (Policy(alarms_per_ms=1 / DAY), "1 per day; its q follows from the interval once that is known, at most 0.005"),
        (
            Policy(alarms_per_ms=1 / DAY, interval_ms=DAY),
            "1 per day at 86400 s = q 1, taken as the highest there is, 0.005",
        ),
    ],
)
def test_a_risk_in_words(policy: Policy, said: str) -> None:
    assert f"  false alarms   {said}" in RuleSet.default(policy).explain("x", entity=False, features={})


def test_the_highest_risk_is_that_of_the_threshold() -> None:
    PotConfig(q=Q_MAX)
    with pytest.raises(ConfigError):
        PotConfig(q=Q_MAX * 1.01)
    assert parse("rules: [{match: a, q: 0.02}]", q_max=0.025).rules[0].policy.q == 0.02


# -- words ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "count", "period_ms"),
    [
        ("1 per minute", 1, MINUTE),
        ("3 per hour", 3, HOUR),
        ("2 a week", 2, 7 * DAY),
        ("one per month", 1, 365.25 / 12 * DAY),
        ("1/week", 1, 7 * DAY),
        ("1 / year", 1, 365.25 * DAY),
        ("Once a Day", 1, DAY),
        ("twice an hour", 2, HOUR),
        ("three times a week", 3, 7 * DAY),
        ("0.5 per day", 0.5, DAY),
        ("10 every  day", 10, DAY),
        ("a day", 0, 0),
        ("1 per s", 0, 0),
        ("per day", 0, 0),
        ("1 per day per week", 0, 0),
        ("some per day", 0, 0),
    ],
)
def test_a_budget_in_words(text: str, count: float, period_ms: float) -> None:
    if not count:
        with pytest.raises(ValueError, match="is no budget"):
            parse_budget(text)
        return
    assert parse_budget(text) == pytest.approx(count / period_ms, rel=1e-12)


@pytest.mark.parametrize(
    "words", ["1 per minute", "2 per hour", "1 per day", "3 per week", "1 per month", "5 per year", "1 per year"]
)
def test_a_budget_is_said_as_it_was_given(words: str) -> None:
    assert say_budget(parse_budget(words)) == words


def test_a_budget_that_is_no_whole_number() -> None:
    assert say_budget(2.5 / DAY) == "2.5 per day"
    assert say_budget(0.1 / (365.25 * DAY)) == "0.1 per year"


@pytest.mark.parametrize(
    ("text", "ms"), [("0s", 0), ("250ms", 250), ("90s", 90_000), ("36h", 36 * HOUR), ("7d", 7 * DAY), ("2w", 14 * DAY)]
)
def test_a_duration_is_said_as_it_was_given(text: str, ms: int) -> None:
    assert parse_duration(text) == ms
    assert say_duration(ms) == text


# -- while the service runs -------------------------------------------------------------------------------------------

A, B, BAD = "rules: [{match: a}]", "rules: [{match: b}]", "rules: [{match: }]"


@pytest.fixture
def rules_path(tmp_path: Path) -> Path:
    path = tmp_path / "rules.yaml"
    path.write_text(A)
    return path


def match_of(rules: RuleSet | None) -> str | None:
    return rules.rules[0].match[0] if rules else None


def test_a_new_content_counts_once_it_has_held_still(rules_path: Path) -> None:
    file = RulesFile(rules_path, Policy())
    assert match_of(file.current) == "a"
    assert file.changed() is None
    rules_path.write_text(B)
    assert file.changed() is None
    found = file.changed()
    assert match_of(found) == "b"
    assert file.current is found
    assert file.changed() is None


def test_a_file_that_is_only_touched_has_not_changed(rules_path: Path) -> None:
    file = RulesFile(rules_path, Policy())
    rules_path.touch()
    rules_path.write_text(A)
    assert [file.changed() for _ in range(3)] == [None] * 3


def test_a_bad_content_is_told_once_and_changes_nothing(rules_path: Path) -> None:
    file = RulesFile(rules_path, Policy())
    rules_path.write_text(BAD)
    assert file.changed() is None
    with pytest.raises(ConfigError, match=r"rules\[0\].match: is empty"):
        file.changed()
    assert [file.changed() for _ in range(3)] == [None] * 3
    assert match_of(file.current) == "a"
    rules_path.write_text(BAD + "  # still")
    file.changed()
    with pytest.raises(ConfigError):
        file.changed()
    rules_path.write_text(A)
    assert [file.changed() for _ in range(3)] == [None] * 3, "back to what is in force"
    rules_path.write_text(B)
    file.changed()
    assert match_of(file.changed()) == "b"


def test_a_file_half_written_is_harmless(rules_path: Path) -> None:
    file = RulesFile(rules_path, Policy())
    whole = "rules:\n  - match: x\n  - match: y\n"
    for end in range(0, len(whole) + 1, 3):  # some of the beginnings are correct files
        rules_path.write_text(whole[:end])
        assert file.changed() is None
    rules_path.write_text(whole)
    found = [file.changed(), file.changed()]
    assert [len(rules.rules) for rules in found if rules] == [2]


def test_a_file_swapped_by_a_link_or_a_rename_is_read(rules_path: Path, tmp_path: Path) -> None:
    file = RulesFile(rules_path, Policy())
    (tmp_path / "new").write_text(B)
    (tmp_path / "new").replace(rules_path)
    file.changed()
    assert match_of(file.changed()) == "b"
    (tmp_path / "other").write_text(A)
    rules_path.unlink()
    assert file.changed() is None, "gone between two writes"
    rules_path.symlink_to("other")
    file.changed()
    assert match_of(file.changed()) == "a"


def test_a_file_that_stays_away_is_told_once(rules_path: Path) -> None:
    file = RulesFile(rules_path, Policy())
    rules_path.unlink()
    file.changed()
    with pytest.raises(ConfigError, match="does not exist"):
        file.changed()
    assert file.changed() is None
    assert match_of(file.current) == "a"


def test_a_calendar_that_changes_is_read(rules_path: Path, tmp_path: Path) -> None:
    calendar = tmp_path / "h.ics"
    calendar.write_bytes(ICS)
    rules_path.write_text("rules: [{match: a, maintenance: h}]\nmaintenance: {h: {ics: h.ics}}")
    file = RulesFile(rules_path, Policy())
    assert file.changed() is None
    calendar.write_bytes(ICS.replace(b"0101", b"0202"))
    assert file.changed() is None
    found = file.changed()
    assert found is not None
    assert found.rules[0].maintenance == (Calendar(ICS.replace(b"0101", b"0202")),)
    calendar.write_bytes(b"BEGIN:VCALENDAR")
    file.changed()
    with pytest.raises(ConfigError, match=r"h\.ics"):
        file.changed()
    assert file.current is found
    calendar.write_bytes(ICS)
    file.changed()
    assert file.changed() is not None


def test_what_changes_while_it_is_read_waits(rules_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = RulesFile(rules_path, Policy())
    rules_path.write_text(B)
    file.changed()
    look = RulesFile.changed.__globals__["_look"]

    def look_then_write(path: Path) -> str:
        seen: str = look(path)
        rules_path.write_text("rules: [{match: c}]")
        return seen

    monkeypatch.setitem(RulesFile.changed.__globals__, "_look", look_then_write)
    assert file.changed() is None
    monkeypatch.undo()
    file.changed()
    assert match_of(file.changed()) == "c"


def test_a_bad_file_at_the_start_is_an_error(rules_path: Path) -> None:
    rules_path.write_text(BAD)
    with pytest.raises(ConfigError):
        RulesFile(rules_path, Policy())
