"""What every family has to keep, whatever it computes."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.base import Assessment, Context, Float64, norm
from models.checkpoint import Bundle
from models.errors import ConfigError
from models.families import NAMES, family
from models.family import Batch
from models.repository import load, save
from models.serving import ServedModel
from stream import snapshot
from stream.detector import Detector, Result, Served
from stream.events import encode
from tests.helpers import MINUTE, T0, columns, config, normal_points

SMALL: dict[str, dict[str, Any]] = {
    "deepant": {"window": 14, "filters": 8, "hidden": 16},
    "bagel": {"window": 14, "hidden": 16, "latent": 4, "samples": 8, "iterations": 3},
    "mtad_gat": {"window": 14, "hidden": 16},
    "autoencoder": {"window": 14, "hidden": 16, "bottleneck": 4},
    "vae": {"window": 14, "hidden": 16, "latent": 4},
}
COUNTS = [1, 2, 3, 5, 7, 8, 9, 15, 31, 33, 64, 65, 100, 129, 255, 257, 299]
KPIS_ONLY = ("bagel",)
CASES = [
    (name, scaling, features)
    for name in NAMES
    for scaling in ("train", "window")
    for features in ((1,) if name in KPIS_ONLY else (1, 5))
]
cases = pytest.mark.parametrize(("name", "scaling", "features"), CASES)


def made(name: str, scaling: str, features: int, seed: int = 0) -> ServedModel[Any]:
    """A model of random weights, its constants as training makes them."""
    kind = family(name)
    known = {one.name for one in fields(kind.config)}
    shape = {key: value for key, value in SMALL[name].items() if key in known}
    shape_ = kind.config(**shape, features=features, scaling=scaling)
    torch.manual_seed(seed)
    network = kind.network(shape_)
    rng = np.random.default_rng(seed)
    length = kind.history(shape_) + 1
    x = torch.from_numpy(rng.normal(size=(300, length, features)).astype(np.float32))
    batch = Batch(x, torch.ones(x.shape, dtype=torch.bool), torch.zeros((300, 3), dtype=torch.int64))
    network.eval()
    with torch.no_grad():
        constants = dict(network.measure(batch))
    if scaling == "train":
        constants |= {"center": np.full(features, 10.0), "scale": np.full(features, 2.0)}
        constants |= {"usual_step": np.full(features, 1.5)}
    model = kind.serve(shape_, network.state_dict(), constants)
    assert isinstance(model, ServedModel)
    assert model.history == length - 1 and model.window == shape_.window
    return model


def some(model: ServedModel[Any], count: int = 300, *, seed: int = 1) -> Context:
    """Points of which some miss some of what there could be."""
    rng = np.random.default_rng(seed)
    features = model.features
    history = 10 + 2 * rng.normal(size=(count, model.history, features))
    holes = np.repeat([0.0, 0.3, 0.0], count // 3)[:count]
    learned = rng.random(history.shape) >= holes[:, None, None]
    value = 10 + 4 * rng.normal(size=(count, features))
    value[rng.random(value.shape) < 0.2] = np.nan
    steps = rng.exponential(2.0, size=(count, features))
    steps[::7] = np.nan
    return Context(history, learned, value, T0 + MINUTE * np.arange(count), steps)


def equal(a: Assessment, b: Assessment) -> None:
    for one in fields(Assessment):
        left, right = getattr(a, one.name), getattr(b, one.name)
        assert (left is None) == (right is None), one.name
        if left is not None:
            np.testing.assert_array_equal(left, right, err_msg=one.name)


@cases
def test_a_point_is_assessed_alike_in_any_batch_at_any_position(name: str, scaling: str, features: int) -> None:
    model = made(name, scaling, features)
    context = some(model)
    whole = model.assess(context)
    assert len(np.unique(whole.expected[:, 0])) > 250  # rows differ, so the comparison below can fail
    for count in COUNTS:
        for part in (slice(0, count), slice(300 - count, 300)):
            equal(model.assess(context.take(part)), whole.take(part))
    order = np.random.default_rng(0).permutation(300)
    equal(model.assess(context.take(order)), whole.take(order))
    equal(model.assess(context), whole)


@cases
def test_what_is_said_is_finite_and_fits_together(name: str, scaling: str, features: int) -> None:
    model = made(name, scaling, features)
    context = some(model)
    said = model.assess(context)
    missing = np.isnan(context.value)
    for array in (said.expected, said.spread, said.error, said.completion):
        assert array.shape == missing.shape and array.dtype == np.float64 and np.isfinite(array).all()
    assert (said.spread > 0).all()
    assert (said.error[missing] == 0).all() and (norm(said.error) >= 0).all()
    assert (said.error[~missing] * (context.value - said.expected)[~missing] >= 0).all(), "the sign is the side"
    if features == 1:  # the band is where the error is below the threshold
        threshold = np.full((len(context), 1), 3.0)
        half = said.half_width(threshold)
        for side in (-1, 1):
            for share, above in ((0.98, False), (1.02, True)):
                value = said.expected + side * share * half
                again = model.assess(replace(context, value=value))
                fixed = np.isclose(again.expected, said.expected, rtol=1e-9, atol=1e-9) & (half > 0)
                assert ((np.abs(again.error) > 3.0) == above)[fixed].all()


@pytest.mark.parametrize("level", [0.0, 1.0, -273.15, 1e-30, 3e9, 1e30, -1e30])
@cases
def test_no_window_however_flat_or_far_breaks_it(name: str, scaling: str, features: int, level: float) -> None:
    model = made(name, scaling, features)
    for size in (0.0, 1e-9, 1e6):
        rng = np.random.default_rng(3)
        history = level + size * rng.normal(size=(9, model.history, features))
        value = level + size * rng.normal(size=(9, features))
        value[3:6] = np.nan
        value[8] = 1e300
        steps = np.full((9, features), size)
        context = Context(history, np.ones(history.shape, np.bool_), value, np.full(9, T0), steps)
        said = model.assess(context)
        for array in (said.expected, said.spread, said.error, said.completion, norm(said.error)):
            assert np.isfinite(array).all()
        assert (said.spread > 0).all()


@cases
def test_a_stack_says_what_its_members_say(name: str, scaling: str, features: int) -> None:
    kind = family(name)
    if not kind.stackable:
        one = made(name, scaling, features)
        with pytest.raises(ConfigError, match="stack"):
            kind.serve(one.config, {key: tensor[None] for key, tensor in one.raw.items()}, {}, stacked=True)
        return
    ones = [made(name, scaling, features, seed) for seed in range(3)]
    weights = {key: torch.stack([one.raw[key] for one in ones]) for key in ones[0].raw}
    constants = {key: np.stack([one.constants[key] for one in ones]) for key in ones[0].constants}
    stack = kind.serve(ones[0].config, weights, constants, stacked=True)
    context = some(ones[0])
    member = np.random.default_rng(5).integers(0, 3, 300)
    whole = stack.assess(replace(context, member=member))
    for k, one in enumerate(ones):
        own, alone = whole.take(member == k), one.assess(context.take(member == k))
        for array in ("expected", "spread", "error", "completion"):
            np.testing.assert_allclose(getattr(own, array), getattr(alone, array), rtol=2e-4, atol=2e-4, err_msg=array)
    for count in (1, 3, 8, 9, 100, 257):
        equal(stack.assess(replace(context, member=member).take(slice(0, count))), whole.take(slice(0, count)))


@cases
def test_what_is_saved_says_the_same(name: str, scaling: str, features: int, tmp_path: Path) -> None:
    model = made(name, scaling, features)
    metrics = tuple(f"m{f}" for f in range(features)) if features > 1 else ()
    save(tmp_path, "m", Bundle(model, (np.empty(0, np.float32),), None, metrics=metrics))
    loaded = load(tmp_path, "m")
    assert (loaded.model.family, loaded.model.config) == (name, model.config)
    equal(loaded.model.assess(some(model)), model.assess(some(model)))
    assert f"{model.parameters:,} parameters" in (loaded.path / "card.md").read_text()


def stream(count: int = 260) -> list[tuple[str, int, float]]:
    """Points with gaps, spikes and a shift."""
    points = [
        (name, t, 300.0 if k in (90, 150) else v + 40 * (k > 200))
        for k, (name, t, v) in enumerate(normal_points(count))
    ]
    return [point for k, point in enumerate(points) if k % 17 not in (3, 4) or k < 60]


@pytest.mark.parametrize("name", NAMES)
def test_batches_and_restores_change_no_event(name: str) -> None:
    setup = config(accept_after_ms=40 * MINUTE)
    served = Served(f"{name}@1", made(name, "window", 1))
    points = stream()

    def detector() -> Detector:
        return Detector(setup.config, setup.rules, [served])

    def fed(cuts: int) -> tuple[list[bytes], list[Float64]]:
        live, said, scores = detector(), list[bytes](), list[Float64]()
        for part in np.array_split(np.arange(len(points)), cuts):
            result: Result = live.accept(columns(live, [points[i] for i in part], int(part[0])), want_scores=True)
            said += [encode(event) for event in result.events]
            scores += [one.score for one in result.scores]
            if cuts > 1:
                blobs = snapshot.pack(live, np.arange(len(live.index.names), dtype=np.int32))
                live = detector()
                assert not snapshot.unpack(live, blobs).refused
        return said, scores

    whole, scores = fed(1)
    assert np.isfinite(np.concatenate(scores)).sum() > 100
    assert whole, "something is reported"
    again, other = fed(31)
    assert again == whole
    np.testing.assert_array_equal(np.concatenate(other), np.concatenate(scores))


@pytest.mark.parametrize("name", KPIS_ONLY)
def test_a_family_for_kpis_refuses_entities(name: str) -> None:
    with pytest.raises(ConfigError, match="features=2"):
        family(name).config(features=2)


def test_all_families_have_names_of_their_own() -> None:
    assert [family(name).name for name in NAMES] == list(NAMES)
    with pytest.raises(ConfigError, match="family 'lstm' is not known; known: deepant"):
        family("lstm")
