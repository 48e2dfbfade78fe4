"""The rules file: which series are watched, how, and when not. One YAML file; README says what each field means.

Every mistake that is found is told at once, one a line, with the line of the file, the field, what is wrong and what to
write instead. An empty field is a mistake: empty never stands for all. A field that is not there takes its default from
the settings. The first rule that matches a series is the one that counts.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, TypeVar

from stream import fields
from stream.calendars import Calendar
from stream.duration import UNITS_MS
from stream.errors import ConfigError
from stream.fields import LONGEST_MS, shown
from stream.maintenance import Once, Weekly
from stream.nodes import List, Map, Node, NodeError, Scalar, compose
from stream.policy import Policy, Rule, Schedule
from stream.ruleset import Q_MAX, RuleSet, hidden_rules

__all__ = ["Q_MAX", "RuleSet", "load_rules", "parse_rules", "read_file"]

BYTES_MAX: Final = 2**20
ERRORS_MAX: Final = 50  # told at once
Q_MIN: Final = 1e-9
LATENESS_MAX_MS: Final = 7 * UNITS_MS["d"]  # the core allows for half a window at most, whatever is asked
RULE_FIELDS: Final = (
    *("match", "name", "model", "shadow", "watch", "interval", "false_alarms", "q", "direction"),
    "least_deviation",
    "drift",
    *("lateness", "late_points", "silent_after", "warmup", "open_after", "recover_after", "recover_ratio"),
    *("accept_after", "cooldown", "series_max", "maintenance", "topic", "labels"),
)
_WINDOW_KINDS: Final = {
    "weekly": {"days", "from", "to"},
    "once": {"start", "end"},
    "calendar": {"ics"},
}
_WINDOW_HINT: Final = "write `from` and `to` (weekly), `start` and `end` (once), or `ics` (a calendar)"

T = TypeVar("T")
Reader = Callable[[Path], bytes]


def load_rules(
    path: Path,
    defaults: Policy,
    *,
    q_max: float = Q_MAX,
    reserved_topics: Collection[str] = (),
    read: Reader | None = None,
) -> RuleSet:
    """Read a rules file.

    Args:
        path: of the file; calendars that it names are looked for beside it.
        defaults: what a field that is not there is taken for.
        q_max: the highest risk that the threshold allows, `PotConfig.q_max`.
        reserved_topics: topics that no rule may publish to, such as that of the points.
        read: takes the place of `read_file`, for a caller that has to know what was read.

    Raises:
        ConfigError: it cannot be read, or is wrong; every mistake has a line of the message.
    """
    read = read or read_file
    try:
        data = read(path)
    except ConfigError as e:
        raise ConfigError(f"{path}: {e}") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = data.count(b"\n", 0, e.start) + 1
        raise ConfigError(f"{path}:{line}: is not UTF-8 (byte 0x{data[e.start]:02x}); save it as UTF-8") from None
    base = path.parent
    rules = _File(str(path), base, defaults, q_max, frozenset(reserved_topics), read).rule_set(text)
    return replace(rules, files=(path, *rules.files))


def parse_rules(
    text: str,
    *,
    source: str,
    base: Path,
    defaults: Policy,
    q_max: float = Q_MAX,
    reserved_topics: Collection[str] = (),
    read: Reader | None = None,
) -> RuleSet:
    """Read the text of a rules file; `source` names it in messages, `base` is where its calendars lie.

    Raises:
        ConfigError: it is wrong; every mistake has a line of the message.
    """
    return _File(source, base, defaults, q_max, frozenset(reserved_topics), read or read_file).rule_set(text)


def read_file(path: Path) -> bytes:
    """Return what a file holds.

    Raises:
        ConfigError: it is no file, larger than a mebibyte, or cannot be read.
    """
    try:
        if not path.is_file():
            raise ConfigError("is not a file" if path.exists() else "does not exist")
        with path.open("rb") as file:
            data = file.read(BYTES_MAX + 1)
    except (OSError, ValueError) as e:
        reason = getattr(e, "strerror", None) or str(e)
        raise ConfigError(f"cannot be read: {reason}") from None
    if len(data) > BYTES_MAX:
        raise ConfigError(f"is larger than {BYTES_MAX:,} bytes")
    return data


class _File:
    """One reading of a rules file: collects what is wrong with it."""

    def __init__(
        self, source: str, base: Path, defaults: Policy, q_max: float, reserved: frozenset[str], read: Reader
    ) -> None:
        self.source = source
        self.base = base
        self.defaults = defaults
        self.q_max = q_max
        self.reserved = reserved
        self.read = read
        self.problems: list[tuple[int, str]] = []
        self.calendars: dict[Path, bytes] = {}

    def rule_set(self, text: str) -> RuleSet:
        """Return the rules, or raise all that is wrong with them."""
        try:
            data = text.encode()
        except UnicodeEncodeError as e:
            raise ConfigError(f"{self.source}:{text.count(chr(10), 0, e.start) + 1}: is not Unicode text") from None
        if len(data) > BYTES_MAX:
            raise ConfigError(f"{self.source}: is larger than {BYTES_MAX:,} bytes")
        try:
            top = compose(text)
        except NodeError as e:
            raise ConfigError(f"{self.source}:{e.line}: {e}") from None
        if top is None or top.empty:
            raise ConfigError(f"{self.source}: is empty; write `rules:` and below it a list, each item with a `match:`")
        if not isinstance(top, Map):
            raise ConfigError(f"{self.source}:{top.line}: is {top.kind}; it begins with `rules:`")
        self._known(top, "", ("rules", "maintenance"), "the rules file")
        windows = self._windows(top)
        rules, nodes, named = self._rules(top, windows)
        self._across(rules, nodes, named, top)
        self._raise()
        return RuleSet(
            tuple(rules),
            _digest([data, *self.calendars.values()]),
            tuple(self.calendars),
            tuple(tuple(names or ()) for names in named),
        )

    # -- what is wrong ---------------------------------------------------------------------------------------------

    def _problem(self, line: int, path: str, message: str) -> None:
        self.problems.append((line, f"{path}: {message}" if path else message))

    def _raise(self) -> None:
        if not self.problems:
            return
        self.problems.sort(key=lambda problem: problem[0])
        lines = [f"{self.source}:{line}: {message}" for line, message in self.problems[:ERRORS_MAX]]
        if more := len(self.problems) - ERRORS_MAX:
            lines += [f"{self.source}: and {more} more"] if more > 0 else []
        raise ConfigError("\n".join(lines))

    def _known(self, node: Map, path: str, names: Sequence[str], what: str) -> None:
        """Report fields that do not exist, and those that are there twice."""
        dot = f"{path}." if path else ""
        for name, key in node.keys.items():
            if name not in names:
                plain = name[:100].strip().lower().replace("-", "_").replace(" ", "_")
                near = difflib.get_close_matches(plain, names, n=1, cutoff=0.6)
                hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
                self._problem(key.line, f"{dot}{shown(name)}", f"is no field of {what}; {hint}")
        self._once(node, path)

    def _once(self, node: Map, path: str) -> None:
        for key, line in node.twice:
            where = f"{path}.{shown(key.text)}" if path else shown(key.text)
            self._problem(key.line, where, f"is there twice, first in line {line}; remove one")

    def _take(self, node: Map, path: str, name: str, convert: Callable[[Node], T]) -> T | None:
        """Return the value of a field, None when it is not there or wrong, which is then reported."""
        value = node.fields.get(name)
        if value is None:
            return None
        where = f"{path}.{name}" if path else name
        if value.empty:
            self._problem(node.keys[name].line, where, "is empty; give it a value, or remove it for the default")
            return None
        try:
            return convert(value)
        except fields.WrongError as e:
            value_shown = f"{shown(e.node.text, quoted=True)}: " if isinstance(e.node, Scalar) else ""
            self._problem(e.node.line, where + e.at, value_shown + e.message)
            return None

    def _required(self, node: Map, path: str, name: str, hint: str) -> bool:
        """Say whether a field is there, and not empty; report it otherwise."""
        value = node.fields.get(name)
        if value is None:
            self._problem(node.line, path, f"has no `{name}`; {hint}")
        elif value.empty:
            self._problem(node.keys[name].line, f"{path}.{name}", f"is empty, which never stands for all; {hint}")
        return value is not None and not value.empty

    # -- rules -----------------------------------------------------------------------------------------------------

    def _rules(
        self, top: Map, windows: Mapping[str, Schedule | None]
    ) -> tuple[list[Rule], list[Map], list[list[str] | None]]:
        rules: list[Rule] = []
        nodes: list[Map] = []
        named: list[list[str] | None] = []
        found = top.fields.get("rules")
        hint = "write `rules:` and below it a list, each item with a `match:`"
        if found is None:
            self._problem(top.line, "", f"has no `rules`; {hint}")
        elif found.empty:
            self._problem(top.keys["rules"].line, "rules", f"is empty, so that nothing would be watched; {hint}")
        elif not isinstance(found, List):
            self._problem(found.line, "rules", f"must be a list (each item begins with `-`), and is {found.kind}")
        else:
            for index, item in enumerate(found.items):
                path = f"rules[{index}]"
                if item.empty:
                    self._problem(item.line, path, "is empty; give it a `match:`, or remove it")
                elif not isinstance(item, Map):
                    self._problem(item.line, path, f"must be fields (`match: …`), and is {item.kind}")
                else:
                    rule, names = self._rule(item, path, windows)
                    rules.append(rule)
                    nodes.append(item)
                    named.append(names)
        return rules, nodes, named

    def _rule(self, node: Map, path: str, windows: Mapping[str, Schedule | None]) -> tuple[Rule, list[str] | None]:
        """Return a rule and the names of its maintenance windows, None if they are wrong.

        What is wrong in it has its default; without globs it is too wrong to be held against others.
        """

        def take(name: str, convert: Callable[[Node], T]) -> T | None:
            return self._take(node, path, name, convert)

        def several(name: str, convert: Callable[[Node], T]) -> list[T] | None:
            return self._take(node, path, name, lambda value: fields.each(value, convert))

        self._known(node, path, RULE_FIELDS, "a rule")
        match: list[str] | None = None
        if self._required(node, path, "match", "write a glob, such as 'checkout.*'; '*' is every series"):
            match = several("match", fields.glob)
        name = take("name", fields.label) or (match[0] if match and "name" not in node.fields else path)
        watch = take("watch", fields.truth)
        if watch is False:
            for other, key in node.keys.items():
                if other in RULE_FIELDS and other not in ("match", "name", "watch"):
                    self._problem(key.line, f"{path}.{other}", "says how to watch, but `watch: false` says not to")
            return Rule(tuple(match or ()), name, watch=False, policy=self.defaults, line=node.line), []
        model = take("model", fields.model)
        shadow = take("shadow", fields.model)
        if ("model" in node.fields and not model) or ("watch" in node.fields and watch is None):
            match = None
        names = several("maintenance", fields.window_name(windows))
        rule = Rule(
            match=tuple(match or ()),
            name=name,
            model=model or "",
            shadow=shadow or "",
            policy=self._policy(node, path),
            maintenance=tuple(window for name in names or () if (window := windows[name]) is not None),
            topics=tuple(several("topic", fields.topic(self.reserved)) or ()),
            labels=take("labels", lambda value: self._labels(value, f"{path}.labels")) or {},
            line=node.line,
        )
        return rule, names if "maintenance" in node.fields else []

    def _policy(self, node: Map, path: str) -> Policy:
        def take(name: str, convert: Callable[[Node], T]) -> T | None:
            return self._take(node, path, name, convert)

        interval = take("interval", fields.duration(1, LONGEST_MS))
        # 0 when it is not known; and when it is wrong, as what is held against it may be right.
        interval_ms = (interval or 0) if "interval" in node.fields else self.defaults.interval_ms
        budget = take("false_alarms", fields.budget(interval_ms, self.q_max))
        q = take("q", fields.number(Q_MIN, self.q_max, what="the share of normal points that may alarm"))
        if "q" in node.fields and "false_alarms" in node.fields:
            self._problem(node.keys["q"].line, f"{path}.q", "and `false_alarms` say the same; remove one of them")
        lateness = take("lateness", fields.duration(0, LATENESS_MAX_MS))
        late_points = take("late_points", fields.choice({"correct": False, "wait": True}))
        if late_points is not None and "lateness" not in node.fields and not self.defaults.lateness_ms:
            line, where = node.keys["late_points"].line, f"{path}.late_points"
            self._problem(line, where, "has no effect without `lateness`, how late they may be; add one")
        unknown = "interval" in node.fields and interval is None
        least = take("least_deviation", fields.least_deviation)
        given: dict[str, Any] = {
            "interval_ms": interval,
            "alarms_per_ms": budget if budget is not None else 0.0 if q is not None else None,
            "q": q,
            "direction": take("direction", fields.choice({"high": 1, "low": -1, "both": 0})),
            "least_deviation": least[0] if least else None,
            "least_share": least[1] if least else None,
            "drift": take("drift", fields.drift),
            "lateness_ms": lateness,
            "wait": late_points,
            "silent_after": take("silent_after", fields.silent_after(interval_ms, unknown)),
            "warmup_ms": take("warmup", fields.duration(0, LONGEST_MS)),
            "open_after": take("open_after", fields.whole(1, 1_000)),
            "recover_after": take("recover_after", fields.whole(1, 10_000)),
            "recover_ratio": take("recover_ratio", fields.number(0.01, 1.0, what="a share of the threshold")),
            "accept_after_ms": take("accept_after", fields.duration(1, LONGEST_MS)),
            "cooldown_ms": take("cooldown", fields.duration(0, LONGEST_MS)),
            "series_max": take("series_max", fields.whole(1, 1_000_000_000)),
        }
        return replace(self.defaults, **{key: value for key, value in given.items() if value is not None})

    def _labels(self, node: Node, path: str) -> dict[str, str]:
        if not isinstance(node, Map):
            raise fields.WrongError(node, f"must be a mapping, such as {{team: payments}}, and is {node.kind}")
        self._once(node, path)
        labels: dict[str, str] = {}
        for name, value in node.fields.items():
            key = node.keys[name]
            fields.text_of(key, 100)
            if value.empty:
                raise fields.WrongError(key, "is a label without a value; give it one, or remove it")
            try:
                labels[name] = fields.text_of(value)
            except fields.WrongError as e:
                raise fields.WrongError(e.node, e.message, f".{shown(name)}") from None
        if len(labels) > 32:
            raise fields.WrongError(node, f"holds {len(labels)} labels, at most 32: every event carries them")
        return labels

    def _across(self, rules: list[Rule], nodes: list[Map], named: list[list[str] | None], top: Map) -> None:
        """Check what no rule shows alone: rules that others hide, names that two have, windows that none uses."""
        hidden = dict(hidden_rules(rules))
        for index, message in hidden.items():
            self._problem(nodes[index].keys["match"].line, f"rules[{index}].match", message)
        first: dict[str, int] = {}
        for index, rule in enumerate(rules):
            if not rule.match:
                continue
            other = first.setdefault(rule.name, index)
            if other != index and index not in hidden:
                key = nodes[index].keys.get("name", nodes[index].keys["match"])
                message = f"{rule.name!r} is the name of rules[{other}] (line {rules[other].line}) too; "
                message += "give it another" if "name" in nodes[index].keys else "give it a `name`"
                self._problem(key.line, f"rules[{index}].name", message)
        windows = top.fields.get("maintenance")
        if isinstance(windows, Map) and None not in named:
            used = {name for names in named for name in names or ()}
            for name, key in windows.keys.items():
                if name not in used:
                    message = f"no rule uses it; add `maintenance: [{shown(name)}]` to one, or remove it"
                    self._problem(key.line, f"maintenance.{shown(name)}", message)

    # -- maintenance -----------------------------------------------------------------------------------------------

    def _windows(self, top: Map) -> dict[str, Schedule | None]:
        """Return the maintenance windows by name; None is one that is wrong, and reported."""
        node = top.fields.get("maintenance")
        if node is None:
            return {}
        if node.empty:
            self._problem(top.keys["maintenance"].line, "maintenance", "is empty; define a window, or remove it")
            return {}
        if not isinstance(node, Map):
            self._problem(node.line, "maintenance", f"must be windows by name (`nightly: …`), and is {node.kind}")
            return {}
        self._once(node, "maintenance")
        windows: dict[str, Schedule | None] = {}
        for name, value in node.fields.items():
            path, key = f"maintenance.{shown(name)}", node.keys[name]
            windows[name] = None
            if key.empty or not name.isprintable() or key.kind != "text":
                self._problem(key.line, path, "is no name of a window; write a word")
            elif value.empty:
                self._problem(key.line, path, f"is empty; {_WINDOW_HINT}")
            elif not isinstance(value, Map):
                self._problem(value.line, path, f"must be fields, and is {value.kind}; {_WINDOW_HINT}")
            else:
                windows[name] = self._window(value, path)
        return windows

    def _window(self, node: Map, path: str) -> Schedule | None:
        self._known(node, path, ("days", "from", "to", "start", "end", "ics", "time_zone"), "a window")
        kinds = [kind for kind, names in _WINDOW_KINDS.items() if not names.isdisjoint(node.fields)]
        if len(kinds) != 1:
            mixed = f"mixes {' with '.join(kinds)}" if kinds else "says no time"
            self._problem(node.line, path, f"{mixed}; {_WINDOW_HINT}")
            return None
        zone = self._take(node, path, "time_zone", fields.time_zone)
        zone = zone if "time_zone" in node.fields else "UTC"
        return {"weekly": self._weekly, "once": self._once_only, "calendar": self._calendar}[kinds[0]](node, path, zone)

    def _weekly(self, node: Map, path: str, zone: str | None) -> Schedule | None:
        both = [self._required(node, path, name, "write a time of the day, such as '22:00'") for name in ("from", "to")]
        days = self._take(node, path, "days", lambda value: fields.each(value, fields.day))
        start = self._take(node, path, "from", fields.clock(1439)) if both[0] else None
        end = self._take(node, path, "to", fields.clock(1440)) if both[1] else None
        if start is None or end is None or zone is None or ("days" in node.fields and days is None):
            return None
        return Weekly(tuple(sorted(days)) if days else tuple(range(7)), start, end, zone)

    def _once_only(self, node: Map, path: str, zone: str | None) -> Schedule | None:
        hint = "write a time, such as 2026-11-22T20:00"
        both = [self._required(node, path, name, hint) for name in ("start", "end")]
        if zone is None or not all(both):
            return None
        start = self._take(node, path, "start", fields.instant(zone))
        end = self._take(node, path, "end", fields.end_instant(zone, start))
        return None if start is None or end is None else Once(start, end)

    def _calendar(self, node: Map, path: str, zone: str | None) -> Schedule | None:
        def convert(value: Node) -> Schedule | None:
            file = self.base / fields.text_of(value, 4096)
            try:
                if file not in self.calendars:
                    self.calendars[file] = self.read(file)
                return Calendar.parse(self.calendars[file], zone or "UTC")
            except ConfigError as e:
                raise fields.WrongError(value, str(e)) from None

        found = self._take(node, path, "ics", convert)
        return found if zone is not None else None


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.hexdigest()
