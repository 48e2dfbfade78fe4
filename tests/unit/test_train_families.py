"""Every family, on data that breaks trainings: it ends in a model whose every number is one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from models.base import Float64, score
from models.checkpoint import Bundle
from models.errors import ConfigError
from models.families import NAMES, family
from models.serving import ServedModel
from models.train import TrainConfig, TrainSeries, train
from tests.contexts import context

NAN = math.nan
N = 420
METRICS = ("a", "b", "c")
# One configuration a family, and one more for each mode of MTAD-GAT; 30 is a window that all of them take.
SMALL: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in NAMES]
SMALL += [("mtad_gat", {"mode": mode}) for mode in ("forecasting", "reconstructing")]
EVERY = [(one, features) for one in SMALL for features in (1, 3)]
EVERY = [(one, f) for one, f in EVERY if f == 1 or one[0] != "bagel"]  # it is of one KPI
EVERY = [(one, f) for one, f in EVERY if f == 3 or not one[1]]  # the modes differ for entities as for KPIs
CASES = ("plain", "constant", "predictable", "huge", "missing", "step", "spike")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small networks are slower on several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def values(case: str, features: int, seed: int = 0) -> Float64:
    random = np.random.default_rng(seed)
    time = np.arange(N)[:, None]
    made: Float64 = 50.0 + 10.0 * np.sin(time / (3 + np.arange(features))) + random.normal(size=(N, features))
    if case == "constant":
        made[:, 0] = 7.0
    elif case == "predictable":
        made = np.remainder(time + np.arange(features), 8).astype(np.float64)
    elif case == "huge":
        made = 1e9 * made
    elif case == "missing":
        made[random.random(made.shape) < 0.4] = NAN
    elif case == "step":
        made[: N // 2] *= 1e-6
    elif case == "spike":
        made[100] = 1e12
    return made


def series(case: str, features: int, seed: int = 0) -> TrainSeries:
    metrics = METRICS[:features] if features > 1 else ()
    labels = np.zeros(N, np.bool_)
    return TrainSeries(f"{case}{seed}", values(case, features, seed), labels, 60_000, metrics=metrics)


def config(name: str, shape: dict[str, Any], features: int, scaling: str, **more: Any) -> TrainConfig:
    kind = family(name)
    model = kind.config(window=30, features=features, scaling=scaling, **shape)
    return TrainConfig.of(kind, model, **{"epochs": 2, "batch": 64, **more})


def assert_sound(bundle: Bundle) -> None:
    """Weights, constants, losses and scores are numbers."""
    for tensor in bundle.model.raw.values():
        assert bool(torch.isfinite(tensor).all())
    for constant in bundle.model.constants.values():
        assert np.isfinite(constant).all()
    training = bundle.training
    assert training.epochs and np.isfinite(training.train_losses + training.held_out_losses).all()
    for scores in bundle.calibrations:
        assert len(scores) and np.isfinite(scores).all() and (scores >= 0).all()


def ids(one: Any) -> str:
    return "-".join([one[0], *one[1].values()]) if isinstance(one, tuple) else str(one)


@pytest.mark.parametrize("scaling", ["train", "window"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("small", "features"), EVERY, ids=ids)
def test_training_never_ends_in_numbers_that_are_none(
    small: tuple[str, dict[str, Any]], case: str, features: int, scaling: str
) -> None:
    name, shape = small
    bundle = train([series(case, features)], config(name, shape, features, scaling))
    assert_sound(bundle)
    # It serves: finite for what it was trained on, for a value that is missing, and for one beyond all measure.
    model = bundle.model
    raw = np.nan_to_num(values(case, features), nan=50.0)
    history = np.stack([raw[at : at + model.history] for at in (100, 200, 300)])
    value = raw[[100 + model.history, 200 + model.history, 300 + model.history]]
    value[1] = NAN
    value[2] = 1e30
    found = model.assess(context(history, value=value))
    for part in (found.expected, found.spread, found.error, found.completion):
        assert np.isfinite(part).all()
    assert (found.spread > 0).all()
    scores = score(value, found)
    assert np.isnan(scores[1]) and scores[2] > scores[0]


@pytest.mark.parametrize("small", SMALL, ids=ids)
def test_the_trainer_and_the_model_agree_on_the_window(small: tuple[str, dict[str, Any]]) -> None:
    name, shape = small
    setting = config(name, shape, 1, "train", epochs=1)
    bundle = train([series("plain", 1)], setting)
    assert setting.layout.history == bundle.model.history
    assert bundle.model.family == name and set(bundle.model.raw) == set(setting.family.shapes(setting.model))


@pytest.mark.parametrize("small", SMALL, ids=ids)
def test_the_same_seed_gives_the_same_bits(small: tuple[str, dict[str, Any]]) -> None:
    name, shape = small
    first, second, other = (
        train([series("missing", 1)], config(name, shape, 1, "train", epochs=1, seed=seed)) for seed in (3, 3, 4)
    )
    assert bits(first) == bits(second) != bits(other)
    np.testing.assert_array_equal(first.calibrations[0], second.calibrations[0])


def bits(bundle: Bundle) -> list[bytes]:
    return [tensor.numpy().tobytes() for tensor in bundle.model.raw.values()]


@pytest.mark.parametrize(("small", "features"), EVERY, ids=ids)
def test_a_stack_is_its_members(small: tuple[str, dict[str, Any]], features: int) -> None:
    """As far as they are trained on the same numbers: a network that draws noise draws other noise in a stack."""
    name, shape = small
    if not family(name).stackable:
        with pytest.raises(ConfigError, match=f"family '{name}' cannot be trained per KPI"):
            config(name, shape, features, "train", per_kpi=True)
        return
    many = [series(case, features, seed) for seed, case in enumerate(("plain", "huge", "missing", "constant"))]
    setting = config(name, shape, features, "train", per_kpi=True)
    stack = train(many, setting)
    assert_sound(stack)
    assert stack.members == tuple(one.name for one in many) and stack.model.members == 4
    for k, one in enumerate(many):
        own = train([one], replace(setting, per_kpi=False))
        middle, alone = np.median(stack.calibrations[k]), np.median(own.calibrations[0])
        assert middle <= 2 * alone + 1e-3 and alone <= 2 * middle + 1e-3
        assert_member(stack.model, own.model, k, one)


def assert_member(stack: ServedModel[Any], own: ServedModel[Any], k: int, one: TrainSeries) -> None:
    """The stack says of a member's points what a plain model of that member's weights and constants says."""
    weights = {name: tensor[k] for name, tensor in stack.raw.items()}
    constants = {name: value[k] for name, value in stack.constants.items()}
    alone = type(own)(own.config, weights, constants)
    raw = np.nan_to_num(one.values, nan=50.0)
    history, value = raw[None, 200 : 200 + stack.history], raw[None, 200 + stack.history]
    found = stack.assess(context(history, value=value, member=np.array([k])))
    expected = alone.assess(context(history, value=value))
    np.testing.assert_allclose(found.expected, expected.expected, rtol=1e-4)
    np.testing.assert_allclose(found.error, expected.error, rtol=1e-3, atol=1e-4)
