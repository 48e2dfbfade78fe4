from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from models.base import Assessment, Float64, Model, contributions, residual, score
from models.deepant import DeepAnT, DeepAnTConfig, Network, nearest_windows
from models.errors import ConfigError
from models.scaling import INPUT_LIMIT, local_spread, normalise
from tests.contexts import context

VALID = list(range(10, 131, 4))


def model(window: int = 10, features: int = 1, scaling: str = "window", **constants: Float64) -> DeepAnT:
    config = DeepAnTConfig(window=window, features=features, scaling=scaling)  # type: ignore[arg-type]
    return DeepAnT(config, network(config).state_dict(), constants)


def network(config: DeepAnTConfig) -> Network:
    torch.manual_seed(config.window + config.features)
    return Network(config).eval()


def plain(network: Network, pooled: int) -> nn.Sequential:
    """The published layers, written independently; takes (B, F, W)."""
    c1, c2, dense, out = network.conv1, network.conv2, network.dense, network.out
    layers = nn.Sequential(
        nn.Conv1d(c1.in_channels, 32, kernel_size=3, padding="valid"),
        nn.ReLU(),
        nn.MaxPool1d(kernel_size=2),
        nn.Conv1d(32, 32, kernel_size=3, padding="valid"),
        nn.ReLU(),
        nn.MaxPool1d(kernel_size=2),
        nn.Flatten(),
        nn.Linear(32 * pooled, 40),
        nn.ReLU(),
        nn.Dropout(0.25),
        nn.Linear(40, out.out_features),
    ).eval()
    for index, layer in ((0, c1), (3, c2), (7, dense), (10, out)):
        layers[index].load_state_dict(layer.state_dict())
    return layers


def test_the_published_size_has_4593_parameters() -> None:
    served = model(window=10)
    assert served.parameters == 4593
    assert {name: tuple(weight.shape) for name, weight in served.raw.items()} == served.config.shapes


@pytest.mark.parametrize("features", [1, 3])
@pytest.mark.parametrize("window", [10, 14, 30, 46, 118])
def test_served_network_equals_the_published_layers(window: int, features: int) -> None:
    served = model(window, features, scaling="train", center=np.zeros(features), scale=np.ones(features))
    x = np.random.default_rng(0).normal(size=(50, window, features))
    with torch.inference_mode():
        layers = plain(network(served.config), served.config.pooled)
        expected = layers(torch.tensor(x, dtype=torch.float32).transpose(1, 2)).numpy()
        trained = network(served.config)(torch.tensor(x, dtype=torch.float32)).numpy()
    assert expected.std() > 0.01
    np.testing.assert_allclose(served.assess(context(x)).expected, expected, atol=1e-6)
    np.testing.assert_allclose(trained, expected, atol=1e-6)


@pytest.mark.parametrize("window", VALID)
def test_the_newest_points_reach_the_forecast(window: int) -> None:
    # models.md, acceptance check 7: floor pooling would give the newest points a gradient of exactly 0.
    x = torch.randn(64, window, 1, requires_grad=True)
    network(DeepAnTConfig(window))(x).sum().backward()
    assert x.grad is not None
    reach = x.grad.abs().sum(dim=(0, 2))  # (W,)
    assert bool((reach > 0).all()), f"no influence: {torch.nonzero(reach == 0).flatten().tolist()}"


@pytest.mark.parametrize("window", [w for w in range(11, 130) if w % 4 != 2] + [-3, 0, 2, 6, 9])
def test_windows_that_lose_points_are_refused_with_the_nearest(window: int) -> None:
    below, above = nearest_windows(window)
    assert below in VALID and above in (below, below + 4) and (window < 10 or below < window < above)
    with pytest.raises(ConfigError, match=f"window={window} .* use {below}"):
        DeepAnTConfig(window=window)


@pytest.mark.parametrize(
    "wrong",
    [
        {"features": 0},
        {"filters": 0},
        {"hidden": 0},
        {"kernel": 2},
        {"dropout": 1.0},
        {"dropout": float("nan")},
        {"scaling": "minmax"},
    ],
)
def test_other_configs_are_refused_by_name(wrong: dict[str, float]) -> None:
    ((name, _),) = wrong.items()
    with pytest.raises(ConfigError, match=f"^{name}="):
        DeepAnTConfig(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("center", "scale"), [([0.0, 0.0], [1.0]), ([0.0], [0.0]), ([0.0], [-1.0]), ([float("nan")], [1.0])]
)
def test_scaling_constants_are_checked(center: list[float], scale: list[float]) -> None:
    with pytest.raises(ConfigError, match=r"^center|^scale="):
        model(scaling="train", center=np.array(center), scale=np.array(scale))


def test_train_scaling_uses_the_constants() -> None:
    unit = model(scaling="train", center=np.zeros(1), scale=np.ones(1))
    scaled = model(scaling="train", center=np.array([100.0]), scale=np.array([5.0]))
    x = np.random.default_rng(1).normal(size=(20, 10, 1))
    a, b = unit.assess(context(x)), scaled.assess(context(100 + 5 * x))
    np.testing.assert_allclose(b.expected, 100 + 5 * a.expected, rtol=1e-6)
    np.testing.assert_array_equal(b.spread, np.full((20, 1), 5.0))


def test_far_values_are_limited_under_train_scaling() -> None:
    served = model(scaling="train", center=np.zeros(1), scale=np.ones(1))
    x = np.zeros((2, 10, 1))
    x[0, 4], x[1, 4] = INPUT_LIMIT, 1e30
    first, second = served.assess(context(x)).expected
    assert first == second and np.isfinite(first)


@pytest.mark.parametrize("features", [1, 4])
@pytest.mark.parametrize("scaling", ["train", "window"])
def test_a_forecast_does_not_depend_on_the_batch(scaling: str, features: int) -> None:
    constants = {"center": np.full(features, 3.0), "scale": np.full(features, 2.0)} if scaling == "train" else {}
    served = model(30, features, scaling, **constants)
    x = np.random.default_rng(2).normal(3, 2, size=(600, 30, features))
    steps = np.random.default_rng(3).exponential(size=(600, features))
    whole = served.assess(context(x, steps))
    for n in (1, 2, 3, 7, 8, 9, 31, 63, 64, 100, 255, 257, 599):
        for part in (slice(0, n), slice(600 - n, 600)):
            some = served.assess(context(x[part], steps[part]))
            np.testing.assert_array_equal(some.expected, whole.expected[part])
            np.testing.assert_array_equal(some.spread, whole.spread[part])
    strided = np.asfortranarray(x)[::2]  # another memory layout
    np.testing.assert_array_equal(served.assess(context(strided, steps[::2])).expected, whole.expected[::2])
    np.testing.assert_array_equal(served.assess(context(strided, steps[::2])).spread, whole.spread[::2])


@given(
    unit=st.sampled_from([1e-12, 1e-3, 1.0, 1e9]),
    shift=st.sampled_from([0.0, -7.0, 1e3]),
    seed=st.integers(0, 100),
)
@settings(max_examples=25, deadline=None)
def test_window_scaling_knows_no_unit(unit: float, shift: float, seed: int) -> None:
    served = model(30)
    x = np.random.default_rng(seed).normal(size=(4, 30, 1))
    steps = np.array([[0.3], [2.0], [1e-2], [np.nan]])
    a, b = served.assess(context(x, steps)), served.assess(context((x + shift) * unit, steps * unit))
    np.testing.assert_allclose(b.expected / unit - shift, a.expected, atol=2e-5 * max(1, abs(shift) / 1e2))
    np.testing.assert_allclose(b.spread / unit, a.spread, rtol=1e-6)


def test_local_spread_is_the_root_of_window_and_usual_step() -> None:
    x = np.zeros((4, 10, 2))
    x[:, ::2, 1] = 8.0  # steps of 8 in the second feature
    usual = np.array([[2.0, 2.0], [0.0, 0.0], [np.nan, np.nan], [8.0, 1.0]])
    spread = local_spread(x, usual)
    np.testing.assert_allclose(spread[0], [2.0, np.sqrt(20.0)])
    np.testing.assert_allclose(spread[2, 1], 8 * np.sqrt(2))
    np.testing.assert_allclose(spread[3], [8.0, 3.0])
    assert (spread > 0).all() and spread[1, 1] < 0.01


@pytest.mark.parametrize("constant", [0.0, 1.0, -273.15, 1e-30, 1e30, -1e30, 0.1, 3e38])
def test_a_flat_window_forecasts_its_value(constant: float) -> None:
    served = model(30)
    point = np.full((3, 1), constant)
    forecast = served.assess(context(np.full((3, 30, 1), constant), np.array([[0.0], [np.nan], [1.0]]), value=point))
    np.testing.assert_allclose(forecast.expected, constant, rtol=1e-5, atol=1e-90)
    assert np.isfinite(forecast.spread).all() and (forecast.spread > 0).all()
    assert np.isfinite(score(point, forecast)).all()


def test_float32_dust_on_a_flat_window_is_not_blown_up() -> None:
    dust = np.random.default_rng(0).choice([-1, 0, 1], size=(1, 30, 1)) * 2.0**-24
    x, _, _ = normalise(1000 * (1 + dust))
    assert np.abs(x).max() < 0.2  # two of the smallest steps of float32, in units of 2**-20
    signal, _, _ = normalise(1000 * (1 + 1e4 * dust))
    assert np.abs(signal).max() > 1  # a real deviation is


@pytest.mark.parametrize("shape", [(4, 30), (4, 26, 1), (4, 30, 2)])
def test_other_histories_are_refused(shape: tuple[int, ...]) -> None:
    plain = context(np.zeros((4, 30, 1)))
    with pytest.raises(ValueError, match=r"reads \(B, 30, 1\)"):
        model(30).assess(replace(plain, history=np.zeros(shape)))


def test_no_windows_give_no_forecasts() -> None:
    forecast = model(10, 2).assess(context(np.zeros((0, 10, 2))))
    assert forecast.expected.shape == forecast.spread.shape == (0, 2)


def assessed(value: Float64, expected: Float64, spread: Float64) -> Assessment:
    return Assessment(expected, spread, residual(value, expected, spread), expected)


def test_score_is_the_norm_of_the_error_in_spreads() -> None:
    value = np.array([[2.5, 10.0], [1.0, 2.0], [np.nan, 10.0], [np.nan, np.nan]])
    forecast = assessed(value, np.array([[1.0, 2.0]] * 4), np.array([[0.5, 2.0]] * 4))
    np.testing.assert_array_equal(score(value, forecast), [5.0, 0.0, 4.0, np.nan])
    shares = np.array([[9 / 25, 16 / 25], [0.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    np.testing.assert_allclose(contributions(forecast.error), shares)


@pytest.mark.parametrize("error", [1e-200, 1e-5, 1e200, 1e308])
def test_score_and_shares_stay_finite(error: float) -> None:
    value = np.array([[error, -error]])
    forecast = assessed(value, np.zeros((1, 2)), np.full((1, 2), 1e-100))
    assert np.isfinite(score(value, forecast)).all()
    np.testing.assert_allclose(contributions(forecast.error), [[0.5, 0.5]])


def test_the_band_is_where_the_error_is_below_the_threshold() -> None:
    slack = np.array([[0.0, 5.0], [-20.0, -1.0]])
    said = Assessment(np.zeros((2, 2)), np.full((2, 2), 2.0), np.zeros((2, 2)), np.zeros((2, 2)), slack)
    half = said.half_width(np.full((2, 1), 4.0))
    np.testing.assert_allclose(half, [[8.0, 2 * np.sqrt(21)], [0.0, 2 * np.sqrt(15)]])
    inside = half[half > 0]
    np.testing.assert_allclose(np.sqrt(np.square(inside / 2) - slack[half > 0]), 4.0)


def test_the_model_is_one() -> None:
    served: Model = model(14, 2)
    assert (served.family, served.window, served.history, served.features) == ("deepant", 14, 14, 2)
    assert not served.reads_point and not served.looks_ahead


@pytest.mark.parametrize("features", [1, 3])
def test_a_stack_says_what_its_members_say(features: int) -> None:
    ones = [
        model(14, features, "train", center=np.full(features, k), scale=np.full(features, k + 1.0)) for k in range(3)
    ]
    for k, one in enumerate(ones):
        one.raw["out.bias"] = one.raw["out.bias"] + k
    ones = [DeepAnT(one.config, one.raw, one.constants) for one in ones]
    weights = {name: torch.stack([one.raw[name] for one in ones]) for name in ones[0].raw}
    constants = {name: np.stack([one.constants[name] for one in ones]) for name in ones[0].constants}
    stack = DeepAnT(ones[0].config, weights, constants, stacked=True)
    x = np.random.default_rng(0).normal(size=(500, 14, features))
    member = np.random.default_rng(1).integers(0, 3, 500)
    whole = stack.assess(context(x, member=member))
    for k, one in enumerate(ones):
        alone = one.assess(context(x[member == k]))
        np.testing.assert_allclose(whole.expected[member == k], alone.expected, rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(whole.spread[member == k], alone.spread)
    assert stack.parameters == ones[0].parameters
    for n in (1, 2, 3, 7, 8, 9, 31, 64, 100, 255, 257, 499):  # the same bits in any batch
        for part in (slice(0, n), slice(500 - n, 500)):
            some = stack.assess(context(x[part], member=member[part]))
            np.testing.assert_array_equal(some.expected, whole.expected[part])
