"""YAML text to nodes that know their line: the plain part of YAML, without what could surprise or grow.

PyYAML reads the text into events; a value stays the text that was written, so that `22:00`, `1e-4`, `no` and `60s` mean
to their reader what they say and not what YAML 1.1 makes of them. Anchors, aliases, merge keys and tags are refused (an
alias of an alias of an alias is how a kilobyte becomes a gigabyte), and so are duplicate keys, of which YAML silently
takes the last.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, TypeAlias

import yaml

DEPTH_MAX: Final = 12
_LOADER: Final = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's, ten times as fast, where the wheel has it
_TAB = re.compile(r"^[ ]*\t[ \t]*[^\s#]", re.MULTILINE)
_KINDS: Final = {"int": "a number", "float": "a number", "bool": "true or false", "null": "nothing"}


class NodeError(ValueError):
    """The text is no YAML, or not of the plain kind."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


@dataclass(frozen=True, slots=True)
class Scalar:
    """One value, as it was written."""

    line: int
    text: str
    plain: bool  # without quotes

    @property
    def kind(self) -> str:
        """What YAML takes it for: `text`, `a number`, `true or false`, `nothing`, `a date` or `a YAML sign`."""
        if not self.plain:
            return "text"
        resolvers = yaml.SafeLoader.yaml_implicit_resolvers
        for tag, pattern in resolvers.get(self.text[:1], []):
            if pattern.match(self.text):
                return _KINDS.get(tag.rpartition(":")[2], "a date" if "timestamp" in tag else "a YAML sign")
        return "text"

    @property
    def empty(self) -> bool:
        """Whether nothing is there, or only blanks."""
        return not self.text.strip() or self.kind == "nothing"


@dataclass(frozen=True, slots=True)
class List:
    """A list."""

    line: int
    items: list[Node] = field(default_factory=list)
    kind = "a list"

    @property
    def empty(self) -> bool:
        """Whether nothing is there."""
        return not self.items


@dataclass(frozen=True, slots=True)
class Map:
    """Fields by name, and where each name stands."""

    line: int
    fields: dict[str, Node] = field(default_factory=dict)
    keys: dict[str, Scalar] = field(default_factory=dict)
    twice: list[tuple[Scalar, int]] = field(default_factory=list)  # a key that was there before, and where
    kind = "a mapping"

    @property
    def empty(self) -> bool:
        """Whether nothing is there."""
        return not self.fields


Node: TypeAlias = Scalar | List | Map


def compose(text: str) -> Node | None:
    """Return the one document of a YAML text; None when it holds nothing.

    Raises:
        NodeError: it is no YAML, nested too deeply, or uses what is refused here.
    """
    if found := yaml.reader.Reader.NON_PRINTABLE.search(text):
        code = f"U+{ord(found[0]):04X}"
        raise NodeError(_line(text, found.start()), f"holds the character {code}, which YAML does not allow; remove it")
    if found := _TAB.search(text):
        raise NodeError(_line(text, found.start()), "is indented by a tab; YAML wants blanks")
    try:
        return _document(yaml.parse(text, Loader=_LOADER))
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        context = f" ({e.context})" if e.context else ""
        line = mark.line + 1 if mark is not None else 1
        raise NodeError(min(line, text.count("\n") + 1), f"is no YAML: {e.problem}{context}") from None
    except yaml.YAMLError as e:
        raise NodeError(1, f"is no YAML: {' '.join(str(e).split())}") from None


def _line(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1


def _document(events: Iterator[yaml.Event]) -> Node | None:
    node: Node | None = None
    documents = 0
    for event in events:
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise NodeError(_at(event), "begins a second document (---); one file holds one")
        elif isinstance(event, yaml.NodeEvent):
            node = _node(event, events, 1)
    return node


def _at(event: yaml.Event) -> int:
    return event.start_mark.line + 1 if event.start_mark is not None else 1


def _node(event: yaml.Event, events: Iterator[yaml.Event], depth: int) -> Node:
    line = _at(event)
    if isinstance(event, yaml.AliasEvent):
        raise NodeError(line, f"refers to an anchor (*{event.anchor}); those are not read here, write the value out")
    if anchor := getattr(event, "anchor", None):
        raise NodeError(line, f"has an anchor (&{anchor}); those are not read here, write the value out")
    if tag := getattr(event, "tag", None):
        raise NodeError(line, f"has a tag ({tag}); those are not read here, remove it")
    if depth > DEPTH_MAX:
        raise NodeError(line, f"is nested more than {DEPTH_MAX} levels deep")
    if isinstance(event, yaml.ScalarEvent):
        return Scalar(line, event.value, not event.style)
    if isinstance(event, yaml.SequenceStartEvent):
        items = List(line)
        while not isinstance(event := next(events), yaml.SequenceEndEvent):
            items.items.append(_node(event, events, depth + 1))
        return items
    found = Map(line)
    while not isinstance(event := next(events), yaml.MappingEndEvent):
        key = _node(event, events, depth + 1)
        if not isinstance(key, Scalar):
            raise NodeError(key.line, f"has {key.kind} for a key; a key is a word")
        if key.plain and key.text == "<<":
            raise NodeError(key.line, "merges another mapping (<<); write its fields out")
        value = _node(next(events), events, depth + 1)
        if key.text in found.fields:
            found.twice.append((key, found.keys[key.text].line))
            continue
        found.fields[key.text], found.keys[key.text] = value, key
    return found
