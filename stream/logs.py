"""What the service and its commands log: on stderr, a line a message, and no flood of a library's."""

from __future__ import annotations

import logging
import sys


def set_up_logging(level: str) -> None:
    """Log to stderr, one line a message."""
    logging.basicConfig(
        stream=sys.stderr, level=level, format="%(asctime)s %(levelname)-7s %(name)s: %(message)s", force=True
    )
    # aiokafka says each attempt of a retry; what comes of it we say ourselves. asyncio's are those of its tasks' ends.
    quiet = {"INFO": "ERROR", "WARNING": "ERROR"}.get(level, level)
    logging.getLogger("aiokafka").setLevel(quiet)
    for handler in logging.getLogger().handlers:
        handler.addFilter(Seldom("aiokafka"))


class Seldom(logging.Filter):
    """Lets a message of a library through once in a while: of a broker that is away it has thousands a second.

    Args:
        library: whose loggers.
        every_s: how often the same message may come, whatever it is filled with.
    """

    def __init__(self, library: str, every_s: float = 10.0) -> None:
        super().__init__(library)
        self._every_s = every_s
        self._last: dict[str, float] = {}  # when a message was let through, by its text

    def filter(self, record: logging.LogRecord) -> bool:
        """Say whether a record is let through."""
        if not super().filter(record) or record.levelno < logging.INFO:  # another's, or asked for
            return True
        text = str(record.msg)
        if record.created - self._last.get(text, -self._every_s) < self._every_s:
            return False
        self._last[text] = record.created
        return True
