"""The command `tocsin`. Data goes to stdout, logs and progress to stderr.

Exit codes: 0 fine; 2 a setting or an argument is wrong, or what it names is not there or not fit (a CSV file, a
checkpoint); 1 anything else (a server that cannot be reached, a damaged checkpoint); 130 interrupted (Ctrl-C).
"""

from __future__ import annotations

import os
import signal
import sys

from stream.errors import TocsinError

INTERRUPTED = 130  # as a shell says it: 128 + SIGINT


def main() -> None:
    """Run the command; turn what went wrong into one line on stderr and an exit code."""
    try:
        from stream.commands import app  # within the try: a Ctrl-C during the imports is a Ctrl-C too

        app(prog_name="tocsin")
    except TocsinError as e:
        if str(e):
            sys.stderr.write(f"tocsin: {e}\n")
        _end(e.exit_code)
    except SystemExit as e:  # typer ends every command so, and makes 130 of a KeyboardInterrupt
        _end(e.code if isinstance(e.code, int) else int(e.code is not None))
    except KeyboardInterrupt:
        _end(INTERRUPTED)


def _end(code: int) -> None:
    # All is done: a Ctrl-C from here on must not leave a traceback of the interpreter's own shutdown.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if code == INTERRUPTED:
        sys.stderr.write("tocsin: interrupted\n")
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # `tocsin … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


__all__ = ["main"]
