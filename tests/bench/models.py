"""`python -m tests.bench.models`: what a scored point costs each family, the plain way and as served. JSON lines.

All in one process, on one thread, in turns; processor time, so that a busy machine changes little. `naive` is the
formula as it is usually coded, `shipped` the served pass, standardising and all, `ratio` naive / shipped:

deepant   256 KPIs with weights of their own: a call each, against one call of the stack
bagel     every output decoded, a dense time code, iterations of MCMC whether or not a point is missing
mtad_gat  two forward passes a point, attention over pairs of nodes laid end to end (window 100, 38 metrics)
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable

from tests.bench import cost_bagel, cost_deepant, cost_mtad_gat

FAMILIES: dict[str, Callable[[int], dict[str, float]]] = {
    "deepant": cost_deepant.measure,
    "bagel": cost_bagel.measure,
    "mtad_gat": cost_mtad_gat.measure,
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.models")
    parser.add_argument("--family", choices=FAMILIES, action="append", help="one family; several: repeat")
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args(argv)
    for name in asked.family or FAMILIES:
        found = FAMILIES[name](asked.rounds)
        rounded = {key: round(value, 2) for key, value in found.items()}
        line = {"name": name, "unit": "us", **rounded, "ratio": round(found["naive"] / found["shipped"], 2)}
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
