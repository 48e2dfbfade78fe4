"""A short fuzz of every decoder; `python -m tests.fuzz` is the long one."""

import subprocess
import sys

import pytest

from tests.fuzz.targets import TARGETS


@pytest.mark.parametrize("name", TARGETS)
def test_mutated_inputs_are_read_or_refused(name: str) -> None:
    # In a process of its own: it bounds its memory, and its timer is for the main thread.
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", "--seconds", "2", "--seed", "1", name],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "read " in done.stdout
    assert done.stdout.count("refused") or name in ("point", "event")
