"""Running `tocsin` as its users do: a process of its own, with files, pipes and signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import psutil

from stream import cli
from tests import forked

DEADLINE_S = 180.0  # a machine may be slow


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {DEADLINE_S:g} s: {what}"
        time.sleep(0.01)


def home(directory: Path) -> dict[str, str]:
    """Return an environment in which everything that a user's own files would do is done in a directory."""
    return os.environ | {
        "XDG_RUNTIME_DIR": str(directory / "run"),
        "XDG_STATE_HOME": str(directory / "state"),
        "TOCSIN_CHECKPOINTS": str(directory / "checkpoints"),
    }


def tocsin(
    directory: Path, *arguments: str | Path, more: Mapping[str, str] | None = None, code: int = 0
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end in a directory of the test's own; it must end with `code`."""
    given = list(map(str, arguments))
    with tempfile.TemporaryDirectory() as said:
        out, err = Path(said, "stdout"), Path(said, "stderr")
        environment = home(directory) | dict(more or {})
        process = forked.start(cli.main, given, directory=directory, environment=environment, out=out, err=err)
        process.join(DEADLINE_S)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise AssertionError(f"{given} did not end within {DEADLINE_S:g} s; it said {err.read_text()!r}")
        done = subprocess.CompletedProcess(given, process.exitcode, out.read_text(), err.read_text())
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == code, done.stderr
    return done


def lines_of(text: str) -> list[dict[str, Any]]:
    """Return JSON lines; each must be one."""
    return [json.loads(line) for line in text.splitlines()]


class Running:
    """A command that runs for the length of the block, or until it is ended."""

    def __init__(self, directory: Path, *arguments: str | Path, more: Mapping[str, str] | None = None) -> None:
        self.errors = directory / f"stderr-{time.monotonic_ns()}"
        with self.errors.open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "stream", *map(str, arguments)],
                cwd=directory,
                env=home(directory) | dict(more or {}),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                start_new_session=True,
            )
        self._descendants: dict[int, psutil.Process] = {}
        self.data_dirs: set[Path] = set()

    @property
    def stderr(self) -> str:
        return self.errors.read_text()

    def until_it_says(self, word: str) -> None:
        """Wait until stderr holds a word."""
        wait_until(lambda: word in self.stderr or self.process.poll() is not None, word)
        assert word in self.stderr, self.stderr

    def until_it_has(self, library: str) -> None:
        """Wait until the process has mapped a library: it is in the middle of its imports."""
        maps = Path(f"/proc/{self.process.pid}/maps")
        wait_until(lambda: library in maps.read_text(), library)

    def line(self) -> str:
        """Return the next line of stdout, "" at its end."""
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def remember_children(self) -> int:
        """Note the servers that the process has started and where they keep their data; returns how many."""
        for child in psutil.Process(self.process.pid).children(recursive=True):
            try:
                command = child.cmdline()
            except psutil.NoSuchProcess:
                continue
            self._descendants[child.pid] = child
            self.data_dirs |= {Path(after) for name, after in pairwise(command) if name in DIRS}
        return len(self._descendants)

    def end(self, number: signal.Signals) -> int:
        """Send a signal; return the exit code once all is over."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        self.rest, _ = self.process.communicate(timeout=DEADLINE_S)
        return self.process.returncode

    def leaves_nothing_behind(self) -> bool:
        alive = [p for p in self._descendants.values() if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        return not alive and not [directory for directory in self.data_dirs if directory.exists()]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()
        elif self.process.stdout is not None:
            self.process.stdout.close()


DIRS = ("--data-dir", "--dir")
