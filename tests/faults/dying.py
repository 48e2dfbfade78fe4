"""`python -m tests.faults.dying STEP N`: the service, killed (SIGKILL) at a step of `stream.steps`, the N-th time."""

from __future__ import annotations

import os
import signal
import sys

from stream import steps
from stream.cli import main


def die_at(at: str, number: int) -> None:
    """Have this process killed at a step."""
    left = number

    def reached(step: steps.Step) -> None:
        nonlocal left
        left -= step == at
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)

    steps.reached = reached


if __name__ == "__main__":
    die_at(sys.argv[1], int(sys.argv[2]))
    sys.argv[1:] = ["serve"]
    main()
