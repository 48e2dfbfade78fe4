"""Rules in their order: which one a series falls under, and what that asks, in words."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase, translate
from typing import TYPE_CHECKING, Final

from models.pot import PotConfig
from stream.duration import say_budget, say_duration
from stream.policy import Policy, Rule

if TYPE_CHECKING:
    from pathlib import Path

Q_MAX: Final = PotConfig().q_max


@dataclass(frozen=True)
class RuleSet:
    """The rules of one file, in its order."""

    rules: tuple[Rule, ...]
    digest: str  # SHA-256 of the content of all files
    files: tuple[Path, ...] = ()  # the rules file and the calendars that it names
    windows: tuple[tuple[str, ...], ...] = ()  # of each rule, the names of its maintenance windows
    _patterns: tuple[re.Pattern[str], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Compile the globs, once."""
        patterns = tuple(re.compile("|".join(map(translate, rule.match))) for rule in self.rules)
        object.__setattr__(self, "_patterns", patterns)

    @classmethod
    def default(cls, policy: Policy) -> RuleSet:
        """Return what is in force without a file: one rule for every series."""
        return cls((Rule(policy=policy),), hashlib.sha256().hexdigest())

    def find(self, name: str, *, entity: bool, features: Mapping[str, int]) -> int | None:
        """Return the index of the rule that a series falls under; None: it is not watched.

        Args:
            name: of the KPI or entity.
            entity: whether it is an entity, which any model can watch; a KPI passes by models of several features.
            features: how many features a model has, by its reference as rules write it, "" that of the settings; 1 for
                one that is not there.
        """
        for index, (rule, pattern) in enumerate(zip(self.rules, self._patterns, strict=True)):
            if pattern.match(name) and (entity or not _passes_by(rule, features)):
                return index
        return None

    def hidden(self, features: Mapping[str, int]) -> list[str]:
        """Return what there is to say of rules that no series can reach, now that the models are known."""
        found = hidden_rules(self.rules, features)
        return [f"line {self.rules[index].line}: rules[{index}].match: {message}" for index, message in found]

    def explain(self, name: str, *, entity: bool, features: Mapping[str, int], q_max: float = Q_MAX) -> list[str]:
        """Return, line by line, which rules were tried for a series, which one it falls under, and what that asks."""
        found = self.find(name, entity=entity, features=features)
        lines = [f"{'entity' if entity else 'KPI'} {name}"]
        for index, rule in enumerate(self.rules):
            label = f"rules[{index}] {rule.name!r}" + (f" (line {rule.line})" if rule.line else "")
            if not rule.name:
                label = "the settings"
            hit = next((glob for glob in rule.match if fnmatchcase(name, glob)), None)
            if hit is None:
                lines.append(f"  {label}: no, {_either(rule.match)} does not match")
            elif index != found:
                count = features.get(rule.model, 1)
                lines.append(f"  {label}: passed by, its model {rule.model} takes {count} features and a KPI is one")
            else:
                lines.append(f"  {label}: yes, by {hit!r}")
                return lines + [f"  {line}" for line in self._say(index, q_max)]
        return [*lines, "  no rule matches: it is not watched"]

    def _say(self, index: int, q_max: float) -> list[str]:
        rule = self.rules[index]
        if not rule.watch:
            return ["ignored (watch: false)"]
        lines = [f"model          {rule.model or 'that of the settings'}"]
        if rule.shadow:
            lines.append(f"shadow         {rule.shadow}, whose events alert nobody")
        lines += say_policy(rule.policy, q_max)
        if rule.maintenance:
            lines.append(f"maintenance    {', '.join(self.windows[index]) if self.windows else len(rule.maintenance)}")
        if rule.topics:
            lines.append(f"topics         {', '.join(rule.topics)} besides that of all events")
        if rule.labels:
            lines.append(f"labels         {', '.join(f'{key}={value}' for key, value in rule.labels.items())}")
        return lines


def say_policy(policy: Policy, q_max: float = Q_MAX) -> list[str]:
    """Return a policy in words, a line a field; fields that ask for nothing are left out."""
    p, interval = policy, policy.interval_ms
    if p.alarms_per_ms > 0:
        budget = say_budget(p.alarms_per_ms)
        if interval:
            q = p.alarms_per_ms * interval
            most = f", taken as the highest there is, {q_max:.2g}" if q > q_max else ""
            budget += f" at {_seconds(interval)} = q {q:.2g}{most}"
        else:
            budget += f"; its q follows from the interval once that is known, at most {q_max:.2g}"
    else:
        budget = f"q {p.q:.2g}" + (f" at {_seconds(interval)} = {say_budget(p.q / interval)}" if interval else "")
    sides = {1: "above", -1: "below", 0: "above or below"}[p.direction]
    least = [f"{p.least_deviation:g}"] * (p.least_deviation > 0) + [f"{100 * p.least_share:.4g} % of it"] * (
        p.least_share > 0
    )
    sides += " what is expected" + (f", by at least {' and by '.join(least)}" if least else "")
    opening = "the first anomalous point" if p.open_after == 1 else f"{p.open_after} anomalous points in a row"
    ending = f"{p.recover_after} normal points in a row" if p.recover_after > 1 else "the first normal point"
    if p.recover_ratio < 1:
        ending += f", scores below {p.recover_ratio:g} of the threshold"
    late = {False: "for late points corrects its events", True: "waits for late points"}[p.wait]
    said = {
        "interval": say_duration(interval) if interval else "inferred from the first points",
        "false alarms": budget,
        "alarms": sides,
        "drift": f"the threshold follows the mean of {p.drift} scores" if p.drift else "",
        "lateness": f"{say_duration(p.lateness_ms)}, {late}" if p.lateness_ms else "",
        "silent after": f"{p.silent_after} intervals without a point" if p.silent_after else "",
        "warm-up": say_duration(p.warmup_ms) if p.warmup_ms else "none",
        "opens with": opening,
        "recovers with": ending,
        "accepted after": f"{say_duration(p.accept_after_ms)}, as the new normal",
        "cooldown": say_duration(p.cooldown_ms) if p.cooldown_ms else "",
        "series": f"at most {p.series_max:,} in a partition" if p.series_max else "",
    }
    return [f"{key:<15}{text}" for key, text in said.items() if text]


def hidden_rules(rules: Sequence[Rule], features: Mapping[str, int] | None = None) -> Iterator[tuple[int, str]]:
    """Yield (index, why) of each rule that no series can reach, as earlier ones have the same globs or '*'.

    KPIs pass by a rule whose model takes several features. So an earlier rule hides a later one only if it lets no KPI
    through, or if the later one takes none either. While the `features` of the models are not known, that is where both
    have the same model, or where the later one only says what to ignore and the earlier one has that of the settings.
    """
    holders: dict[str, list[int]] = {}

    def hides(earlier: Rule, later: Rule) -> bool:
        if not earlier.watch or earlier.model == later.model == "" or (later.watch and earlier.model == later.model):
            return True
        if features is None:
            return not later.watch and not earlier.model
        return not _passes_by(earlier, features) or _passes_by(later, features)

    for index, rule in enumerate(rules):
        if not rule.match:  # not understood
            continue
        by: list[int] = []
        for glob in rule.match:
            candidates = (other for key in dict.fromkeys(("*", glob)) for other in holders.get(key, ()))
            found = next((other for other in candidates if hides(rules[other], rule)), None)
            if found is None:
                break
            by.append(found)
        else:
            who = " and ".join(f"rules[{at}] ({rules[at].name!r}, line {rules[at].line})" for at in dict.fromkeys(by))
            take = "takes" if len(set(by)) == 1 else "take"
            yield index, f"{_either(rule.match)} is never reached: {who} {take} those series first; move this rule up"
        for glob in rule.match:
            holders.setdefault(glob if glob.strip("*") else "*", []).append(index)


def _passes_by(rule: Rule, features: Mapping[str, int]) -> bool:
    """Say whether KPIs pass by the rule."""
    return rule.watch and features.get(rule.model, 1) > 1


def _either(globs: Sequence[str]) -> str:
    shown = [repr(glob) for glob in globs[:3]] + (["…"] if len(globs) > 3 else [])
    return " or ".join(shown)


def _seconds(ms: int) -> str:
    return f"{ms / 1000:g} s"
