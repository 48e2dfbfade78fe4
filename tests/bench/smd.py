"""`python -m tests.bench.smd [MACHINE ...]`: VUS-PR on machines of the Server Machine Dataset (38 metrics, a minute).

A model is trained on a machine's first half, without labels, and scores each point of its second half from the raw
values before it: no threshold, and no completion of what was strange. The scores are those of the served model. The
width of VUS is that of TSB-AD, the period of the first metric; the second table has width 100. Beside the models stand
scores that need no training: random numbers, the change from the last value, the distance from the mean of the first
half, and what its first three principal components leave of it, both in deviations within the same limit as the models
see. CNN (a forecaster like DeepAnT) and PCA are published figures of TSB-AD, which trains on the second half itself.

Other series of the same kind: any .npz with `train` (N, F), `test` (M, F) and `label` (M,) under TOCSIN_TEST_DATA, such
as `asd/omi-1`.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models import families
from models.base import Bool, Context, Float64, Model, norm
from models.scaling import INPUT_LIMIT
from models.train import TrainConfig, TrainSeries, train
from stream.evaluation.vus import period, vus_pr

MACHINES = ("smd/machine-2-1", "smd/machine-2-3", "smd/machine-3-10")
PUBLISHED = {"CNN, published": (0.335, 0.300, 0.787), "PCA, published": (0.253, 0.409, 0.676)}
MODES = ("forecasting", "reconstructing", "both")
TICKS = 1024  # assessed at once
COMPONENTS = 3


def scores(model: Model, before: Float64, test: Float64) -> Float64:
    """Return the score of each point of `test`, (M,), after the last points of `before`; all values as they came."""
    length = model.history
    whole = np.concatenate([before[-length:], test])
    windows = np.lib.stride_tricks.sliding_window_view(whole, length, axis=0).transpose(0, 2, 1)[: len(test)]
    found = []
    for start in range(0, len(test), TICKS):
        history, value = np.ascontiguousarray(windows[start : start + TICKS]), test[start : start + TICKS]
        unknown, seen = np.full(value.shape, np.nan), np.ones(history.shape, np.bool_)
        point = Context(history, seen, value, np.zeros(len(value), np.int64), unknown)
        found.append(norm(model.assess(point).error))
    return np.concatenate(found)


def trained(name: str, first: Float64, seed: int, **config: Any) -> Model:
    """Train a model of a family as the family suggests, on a part without labels."""
    family = families.family(name)
    metrics = tuple(f"metric_{index}" for index in range(first.shape[1]))
    series = TrainSeries("train", first, np.zeros(len(first), np.bool_), 60_000, metrics=metrics)
    shape = family.config(features=first.shape[1], scaling="train", **config)
    return train([series], TrainConfig.of(family, shape, seed=seed)).model


def plain(first: Float64, test: Float64, seed: int) -> dict[str, Float64]:
    """Return scores that need no training, (M,) each."""
    moves = np.ptp(first, axis=0) > 0
    center, scale = first[:, moves].mean(axis=0), first[:, moves].std(axis=0)
    z, fitted = (np.clip((x[:, moves] - center) / scale, -INPUT_LIMIT, INPUT_LIMIT) for x in (test, first))
    _, axes = np.linalg.eigh(np.cov(fitted.T))  # ascending
    main = axes[:, -COMPONENTS:]
    return {
        "random": np.random.default_rng(seed).random(len(test)),
        "change from the last value": norm(np.diff(z, axis=0, prepend=fitted[-1:])),
        "distance from the mean": norm(z),
        f"beside {COMPONENTS} components": norm(z - z @ main @ main.T),
    }


def rows(given: argparse.Namespace) -> dict[str, Callable[[Float64, int], Model]]:
    """The models to train, by the name of their row."""
    made: dict[str, Callable[[Float64, int], Model]] = {}
    for family in given.families:
        for mode in given.modes if family == "mtad_gat" else ("",):
            config = {"mode": mode} if mode else {}

            def one(first: Float64, seed: int, family: str = family, config: dict[str, str] = config) -> Model:
                return trained(family, first, seed, **config)

            made[f"{family}, {mode}" if mode else family] = one
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("machines", nargs="*", default=list(MACHINES), metavar="MACHINE", help=f"{' '.join(MACHINES)}")
    parser.add_argument("--families", nargs="*", default=["deepant", "mtad_gat"], help="deepant mtad_gat")
    parser.add_argument("--modes", nargs="*", default=list(MODES), choices=MODES, help="of mtad_gat")
    parser.add_argument("--seeds", type=int, default=1, help="how many; the mean of their figures is printed")
    parser.add_argument("--seed", type=int, default=0, help="the first")
    given = parser.parse_args()
    torch.set_num_threads(1)
    data = Path(os.environ.get("TOCSIN_TEST_DATA", ""))
    tables: list[dict[str, list[float]]] = [{}, {}]  # of the period's width, and of 100
    for machine in given.machines:
        with np.load(data / f"{machine}.npz", allow_pickle=False) as arrays:
            first, test = arrays["train"].astype(np.float64), arrays["test"].astype(np.float64)
            label: Bool = arrays["label"] > 0
        widths = (period(test[:, 0]), 100)
        found = {name: [value] for name, value in plain(first, test, 0).items()}
        for name, make in rows(given).items():
            began = time.process_time()
            models = [make(first, given.seed + index) for index in range(given.seeds)]
            middle = time.process_time()
            found[name] = [scores(model, first, test) for model in models]
            cost = 1e6 * (time.process_time() - middle) / len(test) / given.seeds
            say(f"{machine} {name}: trained in {(middle - began) / given.seeds:.0f} s, scored in {cost:.0f} us a point")
        for table, width in zip(tables, widths, strict=True):
            for name, every in found.items():
                table.setdefault(name, []).append(float(np.mean([vus_pr(label, one, width) for one in every])))
        say(f"{machine}: {len(label)} points, {label.mean():.1%} anomalous, period {widths[0]}")
    for title, table in zip(("the period", "100"), tables, strict=True):
        say(
            f"\nVUS-PR, width {title}",
            *(machine.rsplit("/")[-1].removeprefix("machine-") for machine in given.machines),
        )
        published = PUBLISHED if tuple(given.machines) == MACHINES else {}
        for name, figures in (table | {name: list(one) for name, one in published.items()}).items():
            say(f"{name:<28}", *(f"{figure:.3f}" for figure in figures), f"mean {np.mean(figures):.3f}")
    best = max((np.mean(one) for name, one in tables[0].items() if name in rows(given)), default=-np.inf)
    return 0 if tuple(given.machines) != MACHINES or best > np.mean(PUBLISHED["CNN, published"]) else 1


def say(*words: str) -> None:
    sys.stdout.write("  ".join(words) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
