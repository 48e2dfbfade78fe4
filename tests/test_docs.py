"""README.md says what there is, all of it, and its examples are true."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import get_args

import pytest
from typer.main import get_command

from stream import events
from stream.columns import SeriesIndex
from stream.commands import app
from stream.events import Event
from stream.policy import Policy
from stream.records import Reason, decode
from stream.rules import RULE_FIELDS, parse_rules
from stream.settings import known_names

README = (Path(__file__).parents[1] / "README.md").read_text()
CODE = re.findall(r"^```\w*\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize(("name", "description", "default"), list(known_names()), ids=lambda value: str(value)[:40])
def test_every_setting_is_there_with_its_default(name: str, description: str, default: object) -> None:
    row = next((line for line in README.splitlines() if line.startswith(f"| `{name}`")), "")
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    shown = str(default).removesuffix(".0")
    assert len(cells) == 3, f"{name} has no row in README.md"
    assert cells[1].strip("`").removesuffix(".0") == (shown or "–")
    assert cells[2] == description


def test_no_setting_is_there_that_does_not_exist() -> None:
    known = {name for name, _, _ in known_names()}
    mentioned = set(re.findall(r"\bTOCSIN_[A-Z0-9_]*[A-Z0-9]", README))
    assert {name for name in mentioned - known if not name.startswith("TOCSIN_TEST_")} == set()


def commands() -> list[str]:
    root = get_command(app)
    return sorted(getattr(root, "commands"))  # noqa: B009  # typer's own click has no types


@pytest.mark.parametrize("name", commands())
def test_every_command_is_there(name: str) -> None:
    assert f"tocsin {name}" in README


def test_every_command_and_option_that_is_shown_exists() -> None:
    root = get_command(app)
    shown = re.findall(r"`(tocsin [^`\n]+)`", README) + [
        line.split("#")[0].strip() for block in CODE for line in block.splitlines() if line.startswith("tocsin ")
    ]
    assert len(shown) >= len(commands())
    for text in shown:
        _, *words = shlex.split(text.replace("[", " ").replace("]", " ").replace("…", " "))
        command = root
        while words and hasattr(command, "commands"):
            name = words.pop(0)
            if name.startswith("-"):
                break
            for part in name.split("|"):
                assert part in command.commands, f"README.md: {text}"
            command = command.commands[name.split("|")[0]]
        known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        for word in words:
            assert not word.startswith("--") or word.split("=")[0] in known, f"README.md: {text}: {word}"


def test_the_rules_shown_are_read() -> None:
    (shown,) = [block for block in CODE if block.startswith("rules:")]
    rules = parse_rules(shown, source="README.md", base=Path(), defaults=Policy())
    assert len(rules.rules) > 3 and rules.hidden({"": 1}) == []


def test_every_field_of_a_rule_is_there_and_no_other() -> None:
    table = README.partition("| field | meaning |")[2].partition("\n\n")[0]
    shown = [re.findall(r"`(\w+)`", line.split("|")[1]) for line in table.splitlines() if line.startswith("| `")]
    assert sorted(name for row in shown for name in row) == sorted(RULE_FIELDS)


def test_every_reason_of_a_reject_is_there() -> None:
    assert [reason for reason in get_args(Reason) if f"`{reason}`" not in README] == []


def test_the_points_shown_are_read() -> None:
    lines = [line.encode() for block in CODE for line in block.splitlines() if re.match(r'\{"(kpi|entity)"', line)]
    columns, rejects = decode(lines, SeriesIndex())
    assert len(columns) >= len(lines) >= 1 and rejects == []


def test_the_event_shown_is_one() -> None:
    shown = [block for block in CODE if '"specversion"' in block]
    assert shown
    for block in shown:
        event = events.decode(block)
        assert isinstance(event, Event)
        assert json.loads(events.encode(event)) == json.loads(block)
