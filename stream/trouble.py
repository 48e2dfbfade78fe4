"""What goes wrong for the time being, said without flooding the log."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

_LAG_MIN, _LAG_S, _LAG_AGAIN_S = 10_000, 10.0, 60.0  # so many points that wait so long are told of, and again
_SAID_AGAIN_S = 30.0  # between two lines of the log about the same trouble


class Trouble:
    """What goes wrong for the time being: said when it begins, now and then while it lasts, and when it is over."""

    def __init__(self, log: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self.what = ""
        self._log = log
        self._clock = clock
        self._next_s = 0.0

    def say(self, what: str) -> None:
        """Note what is wrong now."""
        now_s = self._clock()
        if not self.what or now_s >= self._next_s:
            self._log.error("%s", what)
            self._next_s = now_s + _SAID_AGAIN_S
        self.what = what

    def over(self, what: str) -> None:
        """Note that nothing is wrong any more; say it, if something was."""
        if self.what:
            self._log.warning("%s", what)
        self.what = ""


class Behind:
    """Says that points come faster than they are judged: while they do, now and then, and when they no longer do."""

    def __init__(self) -> None:
        self._since_s: float | None = None  # of the lag that lasts
        self._said: tuple[float, int] | None = None  # when, and how many points had been judged by then

    def look(self, now_s: float, lag: int, points: int) -> str:
        """Return what is to be said now, "" for nothing.

        Args:
            now_s: a time that never goes back.
            lag: points that wait.
            points: how many have been judged so far.
        """
        if lag < _LAG_MIN:
            over, self._since_s, self._said = self._said is not None, None, None
            return "caught up: no more points wait than come" if over else ""
        if self._since_s is None:
            self._since_s = now_s
        if self._said is None:
            if now_s - self._since_s < _LAG_S:
                return ""
            said = f"behind: {lag:,} points wait"
        else:
            then_s, judged = self._said
            if now_s - then_s < _LAG_AGAIN_S:
                return ""
            said = f"behind: {lag:,} points wait, {(points - judged) / (now_s - then_s):,.0f} a second are judged"
        self._said = now_s, points
        return said
