from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from models.base import Assessment, Constants, Context, Float64, norm
from models.errors import ConfigError
from models.family import Batch, hide_newest
from models.train import TrainConfig, train
from models.vae import (
    FAMILY,
    LATENT_BOUNDS,
    VAE,
    Network,
    VAEConfig,
    complete,
    compressed,
    last_point,
    pack,
)
from models.windows import TrainSeries

COUNTS = (1, 2, 3, 7, 8, 9, 31, 63, 64, 65, 100, 255, 256, 257, 299)


@pytest.fixture(scope="module", autouse=True)
def _one_thread_as_in_the_service() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def network(config: VAEConfig, seed: int = 0) -> Network:
    torch.manual_seed(seed)
    return Network(config).eval()


def constants(config: VAEConfig, seed: int = 0) -> Constants:
    rng = np.random.default_rng(seed)
    shape = (config.features,)
    some = {"floor": rng.uniform(-1, 0.5, shape), "still": np.zeros(shape)}
    if config.scaling == "train":
        some |= {"center": rng.normal(3, 1, shape), "scale": rng.uniform(1, 2, shape), "usual_step": np.ones(shape)}
    return some


def model(config: VAEConfig, seed: int = 0) -> VAE:
    return VAE(config, network(config, seed).state_dict(), constants(config, seed))


def context(config: VAEConfig, count: int, *, gaps: float = 0.05, values: Float64 | None = None) -> Context:
    rng = np.random.default_rng(0)
    shape = (count, config.window, config.features)
    x = rng.normal(3, 2, shape) if values is None else np.broadcast_to(values, shape)
    value = np.where(rng.random(x[:, -1].shape) < gaps, np.nan, x[:, -1])
    return Context(
        history=x[:, :-1].copy(),
        learned=rng.random((count, config.window - 1, config.features)) >= gaps,
        value=value,
        time_ms=60_000 * np.arange(count, dtype=np.int64),
        usual_step=rng.uniform(0.5, 2, (count, config.features)),
    )


def same(a: Assessment, b: Assessment, message: str = "") -> None:
    for name in ("expected", "spread", "error", "completion", "slack"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=f"{name} {message}")


def shape_of(window: int = 12, features: int = 1, **more: Any) -> VAEConfig:
    return VAEConfig(window=window, features=features, **{"latent": 3, "hidden": 20, "iterations": 3, **more})


# --- the network ---


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_weights_are_those_of_the_config(layers: int) -> None:
    config = VAEConfig(window=19, features=2, latent=5, hidden=30, layers=layers)
    own = network(config)
    assert {name: tuple(weight.shape) for name, weight in own.state_dict().items()} == config.shapes
    assert list(config.shapes) == list(own.state_dict())
    mean, lgvar = own.encoder(torch.randn(4, 38))
    assert mean.shape == lgvar.shape == (4, 5)
    assert [one.shape for one in own.decoder(mean)] == [(4, 38), (4, 38)]
    assert model(config).parameters == sum(weight.numel() for weight in own.parameters())


def test_variances_stay_in_their_bounds() -> None:
    own = network(shape_of())
    wild = torch.randn(50, 12) * 1e6
    for net, x, (least, most) in (
        (own.encoder, wild, LATENT_BOUNDS),
        (own.decoder, torch.randn(50, 3) * 1e6, shape_of().value_bounds),
    ):
        net.lgvar.weight.data.mul_(1e6)
        lgvar = net(x)[1].detach()
        assert (float(lgvar.min()), float(lgvar.max())) == pytest.approx((least, most))


def test_several_features_are_never_as_sure_as_one() -> None:
    one, several = (shape_of(12, features).value_bounds for features in (1, 2))
    assert np.exp(np.array(one) / 2) == pytest.approx([0.02, 20])
    assert np.exp(np.array(several) / 2) == pytest.approx([0.5, 20])


def test_the_bound_is_likelihood_and_divergence() -> None:
    # Another way to the same number: torch's own distributions.
    config = shape_of(12, 3)
    own, some = network(config), batch(config)
    z_mean, z_lgvar = own.encoder(hide_newest(some.x).flatten(1))
    divergence = kl_divergence(Normal(z_mean, torch.exp(z_lgvar / 2)), Normal(0.0, 1.0)).sum(dim=1)
    x_mean, x_lgvar = own.decoder(z_mean)
    p = Normal(x_mean, torch.exp(x_lgvar / 2))
    log_p = p.log_prob(some.x.flatten(1)) + 0.5 * np.log(2 * np.pi)  # type: ignore[no-untyped-call]
    counts = some.counts.flatten(1)
    bound = -(log_p * counts).sum(dim=1) + counts.float().mean(dim=1) * divergence
    torch.testing.assert_close(own.loss(some), bound / 36, rtol=1e-4, atol=1e-5)


def batch(config: VAEConfig, count: int = 40, seed: int = 0) -> Batch:
    torch.manual_seed(seed)
    x = torch.randn(count, config.window, config.features)
    return Batch(x, torch.rand(x.shape) > 0.2, torch.zeros(count, 3, dtype=torch.int64))


def test_what_does_not_count_is_no_part_of_the_likelihood() -> None:
    config = shape_of(12, 3)
    own, some = network(config), batch(config)
    counts = some.counts.clone()
    counts[:, :, 1] = False  # a feature that never counts
    loss = own.loss(some._replace(counts=counts))
    for head in ("mean", "lgvar"):
        (gradient,) = torch.autograd.grad(loss.sum(), own.get_parameter(f"decoder.{head}.weight"), retain_graph=True)
        gradient = gradient.view(12, 3, -1)
        assert (gradient[:, 1] == 0).all() and (gradient[:, [0, 2]] != 0).any()
    assert (own.loss(some._replace(counts=torch.zeros_like(counts))) == 0).all()


def test_only_training_draws() -> None:
    own, some = network(shape_of()), batch(shape_of())
    assert torch.equal(own.loss(some), own.loss(some))
    own.train()
    assert not torch.equal(own.loss(some), own.loss(some))


@pytest.mark.parametrize(("window", "features", "hidden"), [(3, 1, 7), (12, 1, 20), (30, 1, 100), (10, 5, 33)])
def test_the_served_pass_is_the_newest_point_of_the_network(window: int, features: int, hidden: int) -> None:
    config = shape_of(window, features, hidden=hidden)
    own = network(config)
    x = torch.randn(50, window, features)
    with torch.no_grad():
        mean, lgvar = own.decoder(own.encoder(x.flatten(1))[0])
        served = last_point(config.layers, config.value_bounds, pack(own.state_dict(), config), x)
    assert mean.std() > 1e-3
    for ours, one in zip(served, (mean, lgvar), strict=True):
        torch.testing.assert_close(ours, one[:, -features:], rtol=1e-5, atol=1e-6)


# --- completion ---


def test_the_chain_is_that_of_the_layers_and_moves_what_is_missing_only() -> None:
    config = shape_of(12, 2)
    own = network(config)
    x, missing, noise = torch.randn(9, 12, 2), torch.rand(9, 12, 2) < 0.3, torch.randn(4, 3)
    missing[0], missing[1] = False, True
    with torch.no_grad():
        (found,) = complete(config.layers, noise, pack(own.state_dict(), config), x, missing)
        flat = x.flatten(1)
        for step in range(4):
            mean, lgvar = own.encoder(flat)
            z = mean if step == 3 else mean + torch.exp(lgvar / 2) * noise[step]
            flat = torch.where(missing.flatten(1), own.decoder(z)[0], flat)
    torch.testing.assert_close(found.flatten(1), flat, rtol=1e-4, atol=1e-5)
    assert torch.equal(found[~missing], x[~missing]) and bool((found[missing] != x[missing]).all())


def test_gaps_are_completed_and_windows_without_any_run_no_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    config = shape_of(12, 2)
    own, some = model(config), context(config, 6, gaps=0)
    whole = own.assess(some)
    np.testing.assert_array_equal(whole.completion, whole.expected)
    value = some.value.copy()
    value[0, 1], value[1] = np.nan, np.nan
    found = own.assess(replace(some, value=value))
    assert found.error[0, 1] == 0 and (found.error[1] == 0).all()
    assert (found.completion[:2] != whole.completion[:2]).all() and np.isfinite(found.completion).all()
    np.testing.assert_array_equal(found.expected, whole.expected)
    np.testing.assert_array_equal(found.error[2:], whole.error[2:])
    learned = some.learned.copy()
    learned[3, 4, 0] = False  # what stood for it is not taken for granted
    other = own.assess(replace(some, learned=learned))
    assert (other.expected[3] != whole.expected[3]).all()
    np.testing.assert_array_equal(np.delete(other.expected, 3, axis=0), np.delete(whole.expected, 3, axis=0))
    history = some.history.copy()
    history[3, 4, 0] += 3.0
    assert (own.assess(replace(some, history=history)).expected[3] != whole.expected[3]).all()

    def never(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(own, "complete", never)
    same(own.assess(some), whole)


def test_nothing_at_all_that_arrived_is_completed_too() -> None:
    config = shape_of(12, 3)
    own, some = model(config), context(config, 5)
    none = replace(some, learned=np.zeros_like(some.learned), value=np.full_like(some.value, np.nan))
    found = own.assess(none)
    assert np.isfinite(found.completion).all() and (found.error == 0).all()


def test_the_noise_of_the_chain_is_that_of_the_seed() -> None:
    some = context(shape_of(), 50, gaps=0.3)
    one, again, other = (model(shape_of(seed=seed)) for seed in (1, 1, 2))
    same(one.assess(some), again.assess(some))
    assert (one.assess(some).expected != other.assess(some).expected).any()


# --- the score ---


def test_the_error_is_the_root_of_the_likelihood_over_the_floor() -> None:
    config = shape_of(12, 3)
    own, some = model(config), context(config, 30, gaps=0)
    found = own.assess(some)
    center, scale = own.constants["center"], own.constants["scale"]
    x = torch.tensor((some.history - center) / scale, dtype=torch.float32)
    x = hide_newest(torch.cat([x, x[:, -1:]], dim=1))
    with torch.no_grad():
        mean, lgvar = (
            one[:, -3:].double().numpy() for one in network(config).decoder(network(config).encoder(x.flatten(1))[0])
        )
    value = (some.value - center) / scale
    p = Normal(torch.tensor(mean), torch.tensor(np.exp(lgvar / 2)))
    nll = -p.log_prob(torch.tensor(value)).numpy()  # type: ignore[no-untyped-call]
    over = np.maximum(nll - 0.5 * np.log(2 * np.pi) - own.constants["floor"], 0)
    np.testing.assert_allclose(np.square(found.error), over, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(np.sign(found.error)[over > 0.1], np.sign(value - mean)[over > 0.1])


@pytest.mark.parametrize("threshold", [0.5, 2.0, 6.0])
def test_the_band_is_exact(threshold: float) -> None:
    config = shape_of(12, 2)
    own, some = model(config), context(config, 20, gaps=0)
    found = own.assess(some)
    half = found.half_width(np.full((20, 1), threshold))
    assert (half > 0).any()
    for sign in (-1, 1):
        edge = own.assess(replace(some, value=found.expected + sign * half))
        np.testing.assert_allclose(edge.error[half > 0], sign * threshold, rtol=1e-6)


def test_the_floor_is_under_the_training_points() -> None:
    config = shape_of(12, 2)
    own, some = network(config), batch(config, 2000)
    some = some._replace(counts=torch.ones_like(some.counts))
    served = VAE(config, own.state_dict(), own.measure(some))
    x = some.x.double().numpy()
    found = served.assess(
        Context(x[:, :-1], x[:, :-1] < np.inf, x[:, -1], np.zeros(2000, np.int64), np.full((2000, 2), np.nan))
    )
    np.testing.assert_allclose((found.error == 0).mean(axis=0), 0.01, atol=0.001)
    none = own.measure(some._replace(counts=torch.zeros_like(some.counts)))
    assert (none["floor"] == config.value_bounds[0] / 2).all()


def test_compressed_errors_are_finite() -> None:
    value = np.array([[np.nan, 1e300, -1e300, 0.0, 2.0]])
    spread, slack = np.full((1, 5), 1e-200), np.array([[0.0, 1.0, -1.0, -4.0, 1e3]])
    error = compressed(value, np.zeros((1, 5)), spread, slack)
    assert np.isfinite(error).all() and error[0, 0] == 0 and error[0, 3] == 2
    assert error[0, 1] > 1e100 and error[0, 2] < -1e100 and np.isfinite(norm(error)).all()


def test_the_newest_point_is_hidden_and_every_other_one_is_read() -> None:
    config = shape_of(12, 2)
    own, some = model(config), context(config, 20, gaps=0)
    base = own.assess(some)
    other = own.assess(replace(some, value=some.value + 100))
    np.testing.assert_array_equal(other.expected, base.expected)
    np.testing.assert_array_equal(other.spread, base.spread)
    for at in range(11):
        moved = some.history.copy()
        moved[:, at] += 0.5
        assert (own.assess(replace(some, history=moved)).expected != base.expected).any(axis=1).all(), at


# --- serving ---


@pytest.mark.parametrize("features", [1, 4])
@pytest.mark.parametrize("scaling", ["train", "window"])
@pytest.mark.parametrize("hidden", [37, 100])
def test_an_assessment_does_not_depend_on_the_batch(hidden: int, scaling: str, features: int) -> None:
    config = shape_of(30, features, scaling=scaling, hidden=hidden, latent=5)
    served, some = model(config), context(config, 300, gaps=0.01)
    gaps = (~some.learned).any(axis=(1, 2))
    assert 20 < gaps.sum() < 280
    whole = served.assess(some)
    assert len(np.unique(whole.expected[:, 0])) == 300
    for count in COUNTS:
        for part in (slice(0, count), slice(300 - count, 300)):
            same(served.assess(some.take(part)), whole.take(part), f"{part}")
    order = np.random.default_rng(0).permutation(300)
    same(served.assess(some.take(order)), whole.take(order))
    same(served.assess(replace(some, history=np.asfortranarray(some.history))), whole)


@pytest.mark.parametrize("features", [1, 4])
@pytest.mark.parametrize("scaling", ["train", "window"])
def test_a_stack_is_its_members_one_by_one(scaling: str, features: int) -> None:
    config = shape_of(12, features, scaling=scaling, hidden=37)
    members = [model(config, seed) for seed in range(5)]
    stack = VAE(
        config,
        {name: torch.stack([one.raw[name] for one in members]) for name in config.shapes},
        {name: np.stack([one.constants[name] for one in members]) for name in members[0].constants},
        stacked=True,
    )
    assert stack.parameters == members[0].parameters and stack.neutral.shape == (5, features)
    some = replace(context(config, 200), member=np.random.default_rng(1).integers(0, 5, 200))
    whole = stack.assess(some)
    for k, one in enumerate(members):
        rows = np.flatnonzero(some.member == k)
        alone = one.assess(replace(some.take(rows), member=None))
        for name in ("expected", "spread", "completion", "slack"):
            np.testing.assert_allclose(
                getattr(whole.take(rows), name), getattr(alone, name), rtol=1e-4, atol=1e-5, err_msg=name
            )
        np.testing.assert_allclose(np.square(whole.take(rows).error), np.square(alone.error), rtol=1e-3, atol=1e-4)
    for count in COUNTS:
        if count < 200:
            for part in (slice(0, count), slice(200 - count, 200)):
                same(stack.assess(some.take(part)), whole.take(part), f"{part}")


def test_a_feature_that_never_moved_is_not_read_and_expected_to_stay() -> None:
    config = shape_of(12, 3)
    own = network(config)
    served = VAE(config, own.state_dict(), {**constants(config), "still": np.array([0.0, 1.0, 0.0])})
    some = context(config, 9)
    found = served.assess(some)
    np.testing.assert_array_equal(found.expected[:, 1], some.history[:, -1, 1])
    np.testing.assert_array_equal(found.completion[:, 1], some.history[:, -1, 1])
    moved = some.history.copy()
    moved[:, :, 1] += 7
    other = served.assess(replace(some, history=moved))
    np.testing.assert_array_equal(other.expected[:, [0, 2]], found.expected[:, [0, 2]])


@pytest.mark.parametrize("scaling", ["train", "window"])
@pytest.mark.parametrize("features", [1, 2])
@pytest.mark.parametrize("level", [0.0, 1.0, -273.15, 1e-9, 3e9, 1e30, -1e100])
def test_flat_windows_of_any_level_give_finite_numbers(level: float, features: int, scaling: str) -> None:
    config = shape_of(12, features, scaling=scaling)
    served, some = model(config), context(config, 4, gaps=0.2, values=np.full(1, level))
    for value in (some.value, some.value * 2, np.full_like(some.value, 1e300), np.full_like(some.value, np.nan)):
        found = served.assess(replace(some, value=value))
        for name in ("expected", "spread", "error", "completion", "slack"):
            assert np.isfinite(getattr(found, name)).all(), name
        assert (found.spread > 0).all() and np.isfinite(norm(found.error)).all()


# --- config ---


@pytest.mark.parametrize(
    "wrong",
    [
        {"window": 2},
        {"features": 0},
        {"latent": 0},
        {"hidden": 0},
        {"layers": 0},
        {"iterations": 0},
        {"seed": -1},
        {"scaling": "minmax"},
    ],
)
def test_other_configs_are_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"^{next(iter(wrong))}="):
        VAEConfig(**wrong)


def test_another_floor_is_refused() -> None:
    with pytest.raises(ConfigError, match="floor"):
        VAE(shape_of(), network(shape_of()).state_dict(), {"floor": np.zeros(2)})


def test_other_histories_are_refused() -> None:
    with pytest.raises(ValueError, match=r"reads \(B, 11, 1\)"):
        model(shape_of(12)).assess(context(shape_of(13), 2))


# --- training ---


def sine(count: int, features: int = 2) -> Float64:
    time = np.arange(count)[:, None]
    return np.asarray(np.sin(2 * np.pi * time / 24 + np.arange(features)), np.float64)


def test_a_trained_model_expects_what_comes_and_finds_what_does_not() -> None:
    rng = np.random.default_rng(0)
    values = sine(1500) + 0.05 * rng.normal(size=(1500, 2))
    series = TrainSeries("sine", values, np.zeros(1500, np.bool_), 60_000, metrics=("a", "b"))
    config = VAEConfig(window=24, features=2, latent=4, hidden=32)
    served = train([series], TrainConfig.of(FAMILY, config, epochs=20)).model
    new = sine(1600)[1500:] + 0.05 * rng.normal(size=(100, 2))
    place = np.arange(24, 100)[:, None] + np.arange(-23, 0)
    some = Context(new[place], np.ones((76, 23, 2)) > 0, new[24:], np.zeros(76, np.int64), np.full((76, 2), np.nan))
    normal = served.assess(some)
    persistence = np.abs(np.diff(new, axis=0)[23:]).mean()
    assert np.abs(normal.expected - new[24:]).mean() < 0.5 * persistence
    spike = some.value.copy()
    spike[:, 0] += 2.0
    found = served.assess(replace(some, value=spike))
    assert norm(found.error).min() > norm(normal.error).max()


def test_many_are_trained_at_once() -> None:
    every = [TrainSeries(f"kpi {k}", 10.0**k * sine(500)[:, :1], np.zeros(500, np.bool_), 60_000) for k in range(3)]
    bundle = train(every, TrainConfig.of(FAMILY, shape_of(12, 1), epochs=3, per_kpi=True))
    assert isinstance(bundle.model, VAE) and bundle.model.members == 3
    middle = [float(np.median(scores)) for scores in bundle.calibrations]
    assert max(middle) < 3 * min(middle)  # the same series in three units
