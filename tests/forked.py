"""Processes of their own, without the seconds that Python takes to import what they need.

They are forked from one that has imported all libraries and done nothing else. What is about the start of a process
itself, as a user starts it, is not to be tested so.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkServerProcess
from pathlib import Path

_FORKED = multiprocessing.get_context("forkserver")
_FORKED.set_forkserver_preload(
    [
        *("stream.commands", "stream.backtest", "stream.demo", "stream.replay", "stream.render", "stream.verify"),
        *("stream.worker", "tests.faults.dying", "rich.progress"),
    ]
)
_WRITE = os.O_WRONLY | os.O_CREAT


def start(
    main: Callable[[], None],
    arguments: list[str],
    *,
    directory: Path,
    environment: Mapping[str, str],
    out: Path,
    err: Path,
) -> ForkServerProcess:
    """Start a program.

    Args:
        main: the program.
        arguments: that it is given.
        directory: that it works in.
        environment: all of it.
        out: file that takes its stdout.
        err: file that takes its stderr.
    """
    process = _FORKED.Process(target=_run, args=(main, arguments, directory, dict(environment), out, err))
    process.start()
    return process


def _run(
    main: Callable[[], None], arguments: list[str], directory: Path, environment: dict[str, str], out: Path, err: Path
) -> None:
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    for number, (path, how) in enumerate(((Path(os.devnull), os.O_RDONLY), (out, _WRITE), (err, _WRITE))):
        opened = os.open(path, how)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115  # as long as it lives
    sys.argv = ["tocsin", *arguments]
    main()
