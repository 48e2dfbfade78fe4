"""The places between which a worker may die: tests have it die at each of them.

What a process has done before it is killed is what the delivery guarantee rests on. `reached` marks the steps and does
nothing; a test puts a function in its place that kills the process.
"""

from __future__ import annotations

from typing import Literal

Step = Literal["settling", "produced", "committed", "flushing", "flushed"]


def reached(step: Step) -> None:
    """Do nothing.

    Args:
        step: settling: nothing of a settlement is sent yet; produced: its outputs are with the broker, the offset is
            not committed; committed: it is, and nothing of it is in the store yet; flushing: the store has begun to
            take the state, and would not keep it; flushed: it is stored.
    """
