from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from models.autoencoder import FAMILY, AutoEncoder, AutoEncoderConfig, Network, forward, pack
from models.base import Assessment, Constants, Context, Float64, norm
from models.errors import ConfigError
from models.family import Batch, hide_newest
from models.train import TrainConfig, train
from models.windows import TrainSeries

COUNTS = (1, 2, 3, 7, 8, 9, 31, 63, 64, 65, 100, 255, 256, 257, 299)


@pytest.fixture(scope="module", autouse=True)
def _one_thread_as_in_the_service() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def network(config: AutoEncoderConfig, seed: int = 0) -> Network:
    torch.manual_seed(seed)
    return Network(config).eval()


def constants(config: AutoEncoderConfig, seed: int = 0) -> Constants:
    rng = np.random.default_rng(seed)
    shape = (config.features,)
    some = {"reach": rng.uniform(1, 3, shape), "still": np.zeros(shape)}
    if config.scaling == "train":
        some |= {"center": rng.normal(3, 1, shape), "scale": rng.uniform(1, 2, shape), "usual_step": np.ones(shape)}
    return some


def model(config: AutoEncoderConfig, seed: int = 0) -> AutoEncoder:
    return AutoEncoder(config, network(config, seed).state_dict(), constants(config, seed))


def context(config: AutoEncoderConfig, count: int, seed: int = 0, values: Float64 | None = None) -> Context:
    rng = np.random.default_rng(seed)
    shape = (count, config.window, config.features)
    x = rng.normal(3, 2, shape) if values is None else np.broadcast_to(values, shape)
    return Context(
        history=x[:, :-1].copy(),
        learned=rng.random((count, config.window - 1, config.features)) > 0.1,
        value=x[:, -1].copy(),
        time_ms=60_000 * np.arange(count, dtype=np.int64),
        usual_step=rng.uniform(0.5, 2, (count, config.features)),
    )


def same(a: Assessment, b: Assessment, message: str = "") -> None:
    for name in ("expected", "spread", "error", "completion"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=f"{name} {message}")


def shape_of(window: int = 12, features: int = 1, **more: Any) -> AutoEncoderConfig:
    return AutoEncoderConfig(window=window, features=features, **{"bottleneck": 3, "hidden": 20, **more})


# --- the network ---


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("bottleneck", [1, 2, 5, 10])
def test_the_bottleneck_is_exactly_as_wide_as_configured(bottleneck: int, layers: int) -> None:
    config = AutoEncoderConfig(window=19, features=2, bottleneck=bottleneck, hidden=30, layers=layers)
    own = network(config)
    assert own.encode(torch.randn(4, 19, 2)).shape == (4, bottleneck)
    assert min(config.widths) == config.widths[-1] == bottleneck and config.widths[:2] == (38, 30)
    assert len(config.widths) == layers + 2 and sorted(config.widths[1:], reverse=True) == list(config.widths[1:])
    assert {name: tuple(weight.shape) for name, weight in own.state_dict().items()} == config.shapes
    assert list(config.shapes) == list(own.state_dict())
    # What is rebuilt has no more directions than the bottleneck: a linear decoder shows them all.
    linear = Network(replace(config, layers=1))
    codes = linear.decoder[0](torch.randn(200, bottleneck)).detach()
    assert int(torch.linalg.matrix_rank(codes - codes.mean(dim=0), rtol=1e-4)) == min(bottleneck, 30)


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_no_affine_map_does_the_same(activation: str) -> None:
    config = shape_of(20, 2, activation=activation)
    x = torch.randn(2000, 20, 2, dtype=torch.float64)
    own = network(config).double()

    def residual(rebuilt: torch.Tensor) -> float:
        """Share of the variance that the best affine map of the windows leaves."""
        a = torch.cat([x.flatten(1), torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
        y = rebuilt.flatten(1)
        left = y - a @ torch.linalg.lstsq(a, y).solution
        return float(left.square().sum() / (y - y.mean(dim=0)).square().sum())

    with torch.no_grad():
        assert residual(own(x)) > 1e-3
        collapsed = x.flatten(1)
        for layer in [*own.encoder, *own.decoder]:
            collapsed = layer(collapsed)
        assert residual(collapsed) < 1e-12  # so the figure above can fail


@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize(("window", "features"), [(3, 1), (12, 1), (30, 1), (10, 5), (4, 38)])
def test_the_served_pass_is_the_newest_point_of_the_network(window: int, features: int, activation: str) -> None:
    config = AutoEncoderConfig(window, features, bottleneck=2, hidden=16, activation=activation)  # type: ignore[arg-type]
    own = network(config)
    x = torch.randn(50, window, features)
    with torch.no_grad():
        expected = own(hide_newest(x))[:, -1]
        (served,) = forward(activation, pack(own.state_dict(), config), x[:, :-1])
    assert expected.std() > 1e-3
    torch.testing.assert_close(served, expected, rtol=1e-5, atol=1e-6)


def test_the_newest_point_is_hidden_and_every_other_one_is_read() -> None:
    config = shape_of(12, 2, activation="tanh")
    own, some = model(config), context(config, 20)
    base = own.assess(some)
    other = own.assess(replace(some, value=some.value + 100))
    np.testing.assert_array_equal(other.expected, base.expected)
    np.testing.assert_array_equal(other.spread, base.spread)
    for at in range(11):
        moved = some.history.copy()
        moved[:, at] += 0.5
        assert (own.assess(replace(some, history=moved)).expected != base.expected).any(axis=1).all(), at


# --- the loss ---


def batch(config: AutoEncoderConfig, count: int = 40, seed: int = 0) -> Batch:
    torch.manual_seed(seed)
    x = torch.randn(count, config.window, config.features)
    return Batch(x, torch.rand(x.shape) > 0.2, torch.zeros(count, 3, dtype=torch.int64))


def test_the_loss_is_the_mean_error_of_what_counts() -> None:
    config = shape_of(12, 3)
    own, some = network(config), batch(config)
    rebuilt = own(hide_newest(some.x))
    for row, loss in enumerate(own.loss(some)):
        counted = (rebuilt[row] - some.x[row]).abs()[some.counts[row]]
        torch.testing.assert_close(loss, counted.mean())


def test_what_does_not_count_is_no_part_of_the_loss() -> None:
    config = shape_of(12, 3)
    some = batch(config)
    own = network(config)
    counts = some.counts.clone()
    counts[:, :, 1] = False  # a feature that never counts
    loss = own.loss(some._replace(counts=counts))
    (gradient,) = torch.autograd.grad(loss.sum(), own.get_parameter("decoder.2.weight"))
    gradient = gradient.view(12, 3, -1)
    assert (gradient[:, 1] == 0).all() and (gradient[:, [0, 2]] != 0).any()
    nothing = own.loss(some._replace(counts=torch.zeros_like(counts)))
    assert (nothing == 0).all()


def test_half_of_the_training_windows_are_hidden_and_all_when_it_is_judged() -> None:
    config = shape_of(12, 1)
    own = network(config)
    some = batch(config, 400)
    hidden, seen = own.loss(some), _loss_of(own, some, own(some.x))
    torch.testing.assert_close(own.loss(some), hidden, rtol=0, atol=0)
    trained = own.train().loss(some)
    is_hidden, is_seen = torch.isclose(trained, hidden), torch.isclose(trained, seen)
    assert bool((is_hidden | is_seen).all()) and 150 < int(is_hidden.sum()) < 250


def _loss_of(own: Network, some: Batch, rebuilt: torch.Tensor) -> torch.Tensor:
    error = torch.where(some.counts, (rebuilt - some.x).abs(), 0.0)
    return error.sum(dim=(1, 2)) / some.counts.sum(dim=(1, 2))


# --- the unit ---


@pytest.mark.parametrize(("scaling", "features"), [("train", 1), ("train", 3), ("window", 1), ("window", 3)])
def test_a_score_of_1_is_at_the_edge_of_the_training_errors(scaling: str, features: int) -> None:
    config = shape_of(12, features, scaling=scaling)
    own, rng = network(config), np.random.default_rng(0)
    x = rng.normal(size=(4000, 12, features))
    x[:, -1] *= 3
    if scaling == "window":
        x -= x[:, -2:-1]
        x /= x[:, :-1].std(axis=1, keepdims=True)
    measured = own.measure(Batch(torch.tensor(x, dtype=torch.float32), torch.ones(x.shape) > 0, torch.zeros(4000, 3)))
    usual = np.abs(np.diff(x[:, :-1], axis=1)).mean(axis=(0, 1))
    given: Constants = {**measured, "usual_step": usual} if scaling == "train" else measured
    served = AutoEncoder(config, own.state_dict(), given)
    unknown = np.full((4000, features), np.nan)
    found = served.assess(Context(x[:, :-1], x[:, :-1] < np.inf, x[:, -1], np.zeros(4000, np.int64), unknown))
    np.testing.assert_allclose((np.abs(found.error) > 1).mean(axis=0), 0.01, atol=0.002)


@pytest.mark.parametrize("scaling", ["train", "window"])
@pytest.mark.parametrize("error", [0.0, 0.25, 5.0])
def test_a_constant_training_error_gives_a_score(error: float, scaling: str) -> None:
    config = shape_of(12, 2, scaling=scaling)
    own = network(config)
    for weight in own.state_dict().values():
        weight.zero_()
    own.get_parameter("decoder.2.bias").data.fill_(error)  # always rebuilt as this, and it is always 0
    x = torch.zeros(100, 12, 2)
    reach = own.measure(Batch(x, torch.ones_like(x) > 0, torch.zeros(100, 3)))["reach"]
    assert np.isfinite(reach).all() and (reach >= 1).all()
    served = AutoEncoder(config, own.state_dict(), {"reach": reach})
    found = served.assess(context(config, 5, values=np.zeros(1)))
    assert np.isfinite(norm(found.error)).all() and (found.spread > 0).all()
    if scaling == "train":  # it still tells a far value from a near one
        near, far = (norm(served.assess(context(config, 1, values=np.full(1, v))).error) for v in (error, error + 50))
        assert far > near


def test_what_never_counts_has_the_least_reach() -> None:
    config = shape_of(12, 2)
    some = batch(config)
    counts = some.counts.clone()
    counts[:, -1, 0] = False
    reach = network(config).measure(some._replace(counts=counts, x=some.x * 10))["reach"]
    assert reach[0] == 1 and reach[1] > 1


def test_among_several_a_feature_that_is_rebuilt_to_a_hair_has_a_unit_of_a_deviation() -> None:
    config = shape_of(12, 2, scaling="train")
    own = network(config)
    for weight in own.state_dict().values():
        weight.zero_()
    x = 1e-3 * torch.randn(200, 12, 2, generator=torch.Generator().manual_seed(0))  # all is rebuilt as 0, almost
    reach = own.measure(Batch(x, torch.ones_like(x) > 0, torch.zeros(200, 3)))["reach"]
    np.testing.assert_array_equal(reach, 2.0)  # half a deviation is the least step of training data


def test_the_unit_of_one_feature_is_local_and_of_several_constant() -> None:
    calm = np.linspace(0, 0.1, 12)[:, None]
    wild = np.where(np.arange(12) % 2, 4.0, -4.0)[:, None]
    for features, local in ((1, True), (2, False)):
        config = shape_of(12, features)
        served = model(config)
        spreads = [served.assess(context(config, 1, values=values)).spread for values in (calm, wild)]
        assert (spreads[1] > 1.5 * spreads[0]).all() if local else (spreads[1] == spreads[0]).all()


# --- serving ---


@pytest.mark.parametrize("features", [1, 4])
@pytest.mark.parametrize("scaling", ["train", "window"])
@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("width", [77, 100, 128])  # also such as give layers of an odd width
def test_an_assessment_does_not_depend_on_the_batch(activation: str, scaling: str, features: int, width: int) -> None:
    config = shape_of(30, features, scaling=scaling, activation=activation, hidden=width, bottleneck=5)
    served, some = model(config), context(config, 300)
    whole = served.assess(some)
    assert len(np.unique(whole.expected[:, 0])) == 300
    for count in COUNTS:
        for part in (slice(0, count), slice(300 - count, 300)):
            same(served.assess(some.take(part)), whole.take(part), f"{part}")
    order = np.random.default_rng(0).permutation(300)
    same(served.assess(some.take(order)), whole.take(order))
    strided = replace(some, history=np.asfortranarray(some.history))
    same(served.assess(strided), whole)


@pytest.mark.parametrize("features", [1, 4])
@pytest.mark.parametrize("scaling", ["train", "window"])
def test_a_stack_is_its_members_one_by_one(scaling: str, features: int) -> None:
    config = shape_of(12, features, scaling=scaling, hidden=77)
    members = [model(config, seed) for seed in range(5)]
    stack = AutoEncoder(
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
        for name in ("expected", "spread", "error"):
            np.testing.assert_allclose(
                getattr(whole.take(rows), name), getattr(alone, name), rtol=1e-4, atol=1e-5, err_msg=name
            )
    for count in COUNTS:
        if count < 200:
            for part in (slice(0, count), slice(200 - count, 200)):
                same(stack.assess(some.take(part)), whole.take(part), f"{part}")


def test_missing_values_have_no_error_and_are_completed() -> None:
    config = shape_of(12, 3)
    served, some = model(config), context(config, 6)
    value = some.value.copy()
    value[0, 1], value[1] = np.nan, np.nan
    found, whole = served.assess(replace(some, value=value)), served.assess(some)
    assert found.error[0, 1] == 0 and (found.error[1] == 0).all()
    np.testing.assert_array_equal(found.completion, whole.completion)
    assert np.isfinite(found.completion).all()
    assert (found.error[2:] == whole.error[2:]).all() and (found.error[2:] != 0).all()


def test_the_error_is_signed_and_the_band_exact() -> None:
    config = shape_of(12, 2)
    served, some = model(config), context(config, 8)
    found = served.assess(some)
    half = found.half_width(np.full((8, 1), 2.5))
    for sign in (-1, 1):
        edge = served.assess(replace(some, value=found.expected + sign * half))
        np.testing.assert_allclose(edge.error, sign * 2.5)


def test_a_feature_that_never_moved_is_not_read_and_expected_to_stay() -> None:
    config = shape_of(12, 3)
    own = network(config)
    served = AutoEncoder(config, own.state_dict(), {**constants(config), "still": np.array([0.0, 1.0, 0.0])})
    some = context(config, 9)
    found = served.assess(some)
    np.testing.assert_array_equal(found.expected[:, 1], some.history[:, -1, 1])
    moved = some.history.copy()
    moved[:, :, 1] += 7
    other = served.assess(replace(some, history=moved))
    np.testing.assert_array_equal(other.expected[:, [0, 2]], found.expected[:, [0, 2]])


@pytest.mark.parametrize("scaling", ["train", "window"])
@pytest.mark.parametrize("features", [1, 2])
@pytest.mark.parametrize("level", [0.0, 1.0, -273.15, 1e-9, 3e9, 1e30, -1e100])
def test_flat_windows_of_any_level_give_finite_numbers(level: float, features: int, scaling: str) -> None:
    config = shape_of(12, features, scaling=scaling)
    served, some = model(config), context(config, 4, values=np.full(1, level))
    for value in (some.value, some.value * 2, np.full_like(some.value, 1e300), np.full_like(some.value, np.nan)):
        for step in (np.zeros_like(value), np.full_like(value, np.nan), np.full_like(value, 1e12)):
            found = served.assess(replace(some, value=value, usual_step=step))
            for name in ("expected", "spread", "error", "completion"):
                assert np.isfinite(getattr(found, name)).all(), name
            assert (found.spread > 0).all() and np.isfinite(norm(found.error)).all()


@pytest.mark.parametrize("unit", [1e-9, 1.0, 1e6, 1e9])
def test_window_scaling_knows_no_unit(unit: float) -> None:
    config = shape_of(12, 1, scaling="window")
    served, some = model(config), context(config, 30)
    a = served.assess(some)
    b = served.assess(
        replace(some, history=some.history * unit, value=some.value * unit, usual_step=some.usual_step * unit)
    )
    np.testing.assert_allclose(b.error, a.error, rtol=1e-3, atol=1e-4)


# --- config ---


@pytest.mark.parametrize(
    "wrong",
    [
        {"window": 2},
        {"features": 0},
        {"bottleneck": 0},
        {"bottleneck": 30},
        {"hidden": 7},
        {"layers": 0},
        {"activation": "sigmoid"},
        {"scaling": "minmax"},
    ],
)
def test_other_configs_are_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"^{next(iter(wrong))}="):
        AutoEncoderConfig(**wrong)


@pytest.mark.parametrize("reach", [[0.0], [-1.0], [np.nan], [1.0, 1.0]])
def test_other_reaches_are_refused(reach: list[float]) -> None:
    config = shape_of()
    with pytest.raises(ConfigError, match="reach"):
        AutoEncoder(config, network(config).state_dict(), {"reach": np.array(reach)})


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
    config = AutoEncoderConfig(window=24, features=2, bottleneck=4, hidden=32)
    served = train([series], TrainConfig.of(FAMILY, config, epochs=12)).model
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
    assert isinstance(bundle.model, AutoEncoder) and bundle.model.members == 3
    middle = [float(np.median(scores)) for scores in bundle.calibrations]
    assert max(middle) < 3 * min(middle)  # the same series in three units
