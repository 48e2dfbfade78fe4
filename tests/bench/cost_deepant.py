"""What a point costs with a DeepAnT of its own: one call a KPI, against all KPIs of a stack in one call."""

from __future__ import annotations

import time

import numpy as np
import torch

from models.base import Context
from models.deepant import DeepAnT, DeepAnTConfig, Network
from tests.contexts import context

KPIS = 256


def measure(rounds: int = 5) -> dict[str, float]:
    """Return processor time per point, µs, of the loop (`naive`) and the stack (`shipped`), the least of some rounds.

    One thread; the two take turns.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _measure(rounds)
    finally:
        torch.set_num_threads(threads)


def _measure(rounds: int) -> dict[str, float]:
    config = DeepAnTConfig(window=30, scaling="train")
    constants = {"center": np.zeros(1), "scale": np.ones(1), "usual_step": np.ones(1)}
    states = []
    for seed in range(KPIS):
        torch.manual_seed(seed)
        states.append(Network(config).state_dict())
    ones = [DeepAnT(config, state, constants) for state in states]
    weights = {name: torch.stack([state[name] for state in states]) for name in states[0]}
    stacked = {name: np.repeat(one[None], KPIS, axis=0) for name, one in constants.items()}
    stack = DeepAnT(config, weights, stacked, stacked=True)
    x = np.random.default_rng(0).normal(size=(KPIS, 30, 1))
    steps = np.ones((KPIS, 1))
    singly = [context(x[k : k + 1], steps[:1]) for k in range(KPIS)]
    whole = context(x, steps, member=np.arange(KPIS))
    expected = np.concatenate([one.assess(row).expected for one, row in zip(ones, singly, strict=True)])
    np.testing.assert_allclose(stack.assess(whole).expected, expected, atol=1e-5)
    naive, shipped = [], []
    for _ in range(rounds):
        naive.append(_timed_loop(ones, singly))
        began = time.process_time()
        stack.assess(whole)
        shipped.append(time.process_time() - began)
    return {"naive": min(naive) / KPIS * 1e6, "shipped": min(shipped) / KPIS * 1e6}


def _timed_loop(ones: list[DeepAnT], singly: list[Context]) -> float:
    began = time.process_time()
    for one, row in zip(ones, singly, strict=True):
        one.assess(row)
    return time.process_time() - began
