"""`python -m tests.faults`: a replay while workers and servers are killed, and links cut; see README.md beside this.

Prints a table; the exit code is 1 unless nothing was lost, doubled or out of order.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from stream.embedded import patch_aborted_transactions
from tests.faults.chaos import Chaos, Report
from tests.faults.schedule import Plan
from tests.servers import why_no_kafka


def plan_of(arguments: argparse.Namespace) -> Plan:
    """Return the plan that the command line asks for."""
    given = dict(vars(arguments))
    for name in ("soak_minutes", "keep_logs"):
        given.pop(name)
    return Plan(**given | {"real": not given.pop("embedded")})


def run(plan: Plan, *, keep: bool) -> Report:
    """Run a plan in a directory of its own, which stays if something went wrong or `keep` is set."""
    directory = Path(tempfile.mkdtemp(prefix="tocsin-faults-"))
    report = asyncio.run(Chaos(plan, directory).run())
    if report and not keep:
        shutil.rmtree(directory)
    return report


def main() -> int:
    """Run until a run is not clean, or the time is over; returns the exit code."""
    usual = Plan()
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    for name in (
        "seed",
        "kills",
        "server_faults",
        "link_faults",
        "points",
        "series",
        "workers",
        "static",
        "partitions",
    ):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(usual, name))
    parser.add_argument(
        "--outage-s", type=float, default=0, help="how long the broker stays away; 0: up to four seconds"
    )
    parser.add_argument("--embedded", action="store_true", help="on the embedded broker, which is not broken itself")
    parser.add_argument("--soak-minutes", type=float, default=0, help="further runs, a seed each, until so long")
    parser.add_argument("--keep-logs", action="store_true", help="keep the workers' logs of a clean run too")
    arguments = parser.parse_args()
    until = time.monotonic() + 60 * arguments.soak_minutes
    plan = plan_of(arguments)
    if plan.real and (reason := why_no_kafka()):
        sys.stderr.write(f"{reason}; --embedded runs without it\n")
        return 2
    patch_aborted_transactions()
    while True:
        report = run(plan, keep=arguments.keep_logs)
        sys.stdout.write(report.table())
        sys.stdout.flush()
        if not report:
            return 1
        if time.monotonic() >= until:
            return 0
        plan = replace(plan, seed=plan.seed + 1)


if __name__ == "__main__":
    sys.exit(main())
