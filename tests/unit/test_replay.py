"""The position of a replay, kept in a file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stream.errors import ConfigError
from stream.replay import Position


@pytest.fixture
def csv(tmp_path: Path) -> Path:
    path = tmp_path / "a.csv"
    path.write_text("0,1\n60,2\n")
    return path


def test_it_is_read_as_written(tmp_path: Path, csv: Path) -> None:
    position = Position.of(tmp_path / "state" / "tocsin", [csv], "t", "b:1")
    assert position.read() == (0, 0)
    position.write(5, 123)
    assert Position.of(tmp_path / "state" / "tocsin", [csv], "t", "b:1").read() == (5, 123)


def test_another_replay_has_another(tmp_path: Path, csv: Path) -> None:
    other = tmp_path / "b.csv"
    other.write_text("0,1\n")
    one = Position.of(tmp_path, [csv], "t", "b:1")
    assert one != Position.of(tmp_path, [csv], "u", "b:1")
    assert one != Position.of(tmp_path, [csv], "t", "b:2")
    assert one != Position.of(tmp_path, [csv, other], "t", "b:1")
    assert Position.of(tmp_path, [csv, other], "t", "b:1") != Position.of(tmp_path, [other, csv], "t", "b:1")


def test_a_changed_file_is_another_replay(tmp_path: Path, csv: Path) -> None:
    before = Position.of(tmp_path, [csv], "t", "b:1")
    csv.write_text("0,1\n60,3\n")
    os.utime(csv, ns=(1, 1))
    assert Position.of(tmp_path, [csv], "t", "b:1") != before


@pytest.mark.parametrize("content", ["", "{", "[]", '{"sent": "x", "shift_ms": 0}', '{"sent": 4}', "null"])
def test_a_damaged_one_is_none(tmp_path: Path, csv: Path, content: str) -> None:
    position = Position.of(tmp_path, [csv], "t", "b:1")
    position.path.write_text(content)
    assert position.read() == (0, 0)


def test_where_it_cannot_be_written_the_message_says_what_to_set(tmp_path: Path, csv: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="XDG_STATE_HOME"):
        Position.of(tmp_path / "file", [csv], "t", "b:1").write(1)
