"""Fuzz of the decoders: `python -m tests.fuzz [--seconds N] [--seed S] [point event blob batch csv checkpoint]`.

Each target gets mutated inputs for so many seconds; each input has to be read or refused with a reason, in less than a
second and within 2 GB of memory. What is not ends the run with exit code 1: the input in hex, the seed and the number
of the input are printed, and `--input HEX` runs that one again.
"""

from __future__ import annotations

import argparse
import faulthandler
import random
import resource
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from types import FrameType

from tests.fuzz.targets import TARGETS, Target, chosen

INPUT_S = 1.0  # of processor time that an input may take: others may be busy on this machine, too
STUCK_S = 30  # after which Python itself is taken to hang: no signal gets through
MEMORY_BYTES = 2 << 30  # beyond what the program has at its start


class HangError(Exception):
    """An input takes too long."""


def _hang(signum: int, frame: FrameType | None) -> None:
    raise HangError(f"more than {INPUT_S:g} s")


def read(target: Target, data: bytes) -> str:
    """Let a target read an input, under a watchdog."""
    signal.setitimer(signal.ITIMER_PROF, INPUT_S)
    try:
        return target.read(data)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def run(target: Target, seconds: float, seed: int) -> bool:
    """Fuzz one target; print what came of it, and return whether all is well."""
    rng, outcome, number = random.Random(f"{seed} {target.name}"), Counter[str](), 0
    slowest, begin = 0.0, time.monotonic()
    while (now := time.monotonic()) - begin < seconds:
        data = target.draw(rng)
        if number % 1000 == 0:
            faulthandler.dump_traceback_later(STUCK_S + 1000 * INPUT_S, exit=True)
        try:
            outcome[read(target, data) or "read"] += 1
        except BaseException as e:
            traceback.print_exc()
            sys.stdout.write(f"{target.name}: input {number} of seed {seed}: {type(e).__name__}: {e}\n{data.hex()}\n")
            return False
        slowest = max(slowest, time.monotonic() - now)
        number += 1
    faulthandler.cancel_dump_traceback_later()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    told = ", ".join(f"{name} {count:,}" for name, count in outcome.most_common())
    sys.stdout.write(f"{target.name}: {number:,} inputs in {seconds:g} s, seed {seed}: {told}; ")
    sys.stdout.write(f"slowest {1000 * slowest:.0f} ms, {peak:.0f} MiB\n")
    sys.stdout.flush()
    return True


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("targets", nargs="*", choices=[*TARGETS, []], metavar="|".join(TARGETS))
    parser.add_argument("--seconds", type=float, default=60.0, help="for each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--input", metavar="HEX", help="run this input of the one target, and nothing else")
    args = parser.parse_args()
    warnings.simplefilter("error")
    targets = chosen(args.targets)
    signal.signal(signal.SIGPROF, _hang)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY_BYTES, now + MEMORY_BYTES))
    if args.input is not None:
        (target,) = targets
        sys.stdout.write(f"{target.name}: {read(target, bytes.fromhex(args.input)) or 'read'}\n")
        return 0
    return 0 if all([run(target, args.seconds, args.seed) for target in targets]) else 1


if __name__ == "__main__":
    sys.exit(main())
