"""A short fuzz of every decoder; `python -m tests.fuzz` is the long one."""

import subprocess
import sys

from tests.fuzz.targets import TARGETS


def test_mutated_inputs_are_read_or_refused() -> None:
    # In a process of its own: it bounds its memory, and its timer is for the main thread.
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", "--seconds", "2", "--seed", "1"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == list(TARGETS)
    assert all("read " in line for line in lines), "some of the inputs are good"
