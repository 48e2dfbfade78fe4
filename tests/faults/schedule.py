"""What is broken when: a seeded schedule of faults, placed by how many points the service has committed."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

BROKER = ("broker SIGTERM, restart", "broker kill -9, restart")
STORE = (
    "store FLUSHALL",
    "store SIGTERM, restart",
    "store kill -9, restart",
    "store lost, started empty",
    "store set back to an older backup",
    "store out of memory",
    "store read-only",
    "store silent (CLIENT PAUSE)",
)
LINK = ("cut", "refused and cut", "delayed", "throttled", "black hole", "half-closed")
KILL = "worker kill -9"

_FIRST, _LAST = 0.03, 0.95  # share of the points between which faults fall
_LATER_S = 0.4  # a fault falls up to so long after its place: anywhere in a settlement, a flush, a muted stretch
_STARTING = 0.25  # share of kills that do not wait until the worker has partitions
# Share of losses of state, and of outages of the broker, into which a worker is killed too: it must then start from
# what is left; and what it had taken in and could not settle must not have reached the store.
_WITH_KILL = 0.6


@dataclass(frozen=True, slots=True, order=True)
class Fault:
    """One thing to break.

    Attributes:
        place: share of the points that are committed when it falls.
        later_s: how long after that.
        kind: one of the words above; a link's is prefixed with whose it is.
        worker: whose, of a kill.
        starting: a kill that may come before the worker has partitions.
        lasts_s: of a fault that is healed.
        strength: ms of a delay, bytes a second of a throttle.
    """

    place: float
    later_s: float
    kind: str
    worker: int = 0
    starting: bool = False
    lasts_s: float = 0.0
    strength: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run is to be."""

    seed: int = 1
    kills: int = 20
    server_faults: int = 6
    link_faults: int = 6
    points: int = 200_000
    series: int = 100
    workers: int = 3
    static: int = 2  # of the workers, those that are static members of the group
    partitions: int = 6
    outage_s: float = 0.0  # how long the broker stays away; 0: half a second to four
    real: bool = True  # Apache Kafka; else the embedded broker, which is not broken itself


def schedule(plan: Plan) -> list[Fault]:
    """Return the faults of a plan in their order; the same plan gives the same."""
    rng = random.Random(plan.seed)
    faults = [_server(rng, number, plan) for number in range(plan.server_faults)]
    faults += [_link(rng, plan) for _ in range(plan.link_faults)]
    kills = plan.kills
    for fault in list(faults):
        if kills and fault.kind in (*BROKER, STORE[0], *STORE[3:5]) and rng.random() < _WITH_KILL:
            kill = _kill(rng, plan, fault.place)
            faults.append(replace(kill, later_s=rng.uniform(0.5, 2.5)) if fault.kind in BROKER else kill)
            kills -= 1
    # One in each stretch of the points: no two runs of kills on top of each other, none without any.
    width = (_LAST - _FIRST) / max(kills, 1)
    faults += [_kill(rng, plan, _FIRST + (n + rng.random()) * width) for n in range(kills)]
    return sorted(faults)


def _kill(rng: random.Random, plan: Plan, place: float) -> Fault:
    # A dynamic member's dead self has to run out before its partitions move, 10 s: fewer of those.
    weights = [3 if number < plan.static else 1 for number in range(plan.workers)]
    worker = rng.choices(range(plan.workers), weights)[0]
    return Fault(place, rng.uniform(0, _LATER_S), KILL, worker, rng.random() < _STARTING)


def _server(rng: random.Random, number: int, plan: Plan) -> Fault:
    # Every kind in turn, so that a short run has some of each.
    kinds = (*STORE[:2], BROKER[0], *STORE[2:4], BROKER[1], *STORE[4:]) if plan.real else STORE
    kind = kinds[number % len(kinds)]
    fault = Fault(rng.uniform(_FIRST, _LAST), rng.uniform(0, _LATER_S), kind, lasts_s=rng.uniform(0.5, 4.0))
    return replace(fault, lasts_s=plan.outage_s) if plan.outage_s and kind in BROKER else fault


def _link(rng: random.Random, plan: Plan) -> Fault:
    kind = rng.choice(LINK)
    whose = rng.choice(("broker", "store")) if plan.real else "store"
    lasts_s = rng.uniform(0.5, 8.0) if kind == "black hole" else rng.uniform(0.5, 3.0)
    strength = rng.choice((20, 100, 400)) if kind == "delayed" else rng.choice((30_000, 200_000))
    return Fault(
        rng.uniform(_FIRST, _LAST), rng.uniform(0, _LATER_S), f"{whose} link {kind}", lasts_s=lasts_s, strength=strength
    )
