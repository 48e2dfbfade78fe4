from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from models.base import Assessment, Context, Float64, contributions, score
from models.batching import SIZES
from models.errors import ConfigError
from models.family import Batch
from models.mtad_gat import (
    FAMILY,
    LEAST_UNIT,
    MTADGAT,
    Attention,
    Both,
    MTADGATConfig,
    MTADGATNetwork,
    serve,
    shapes,
)
from models.scaling import INPUT_LIMIT, local_spread
from tests.contexts import context

Mode = Literal["forecasting", "reconstructing", "both"]
MODES: list[Mode] = ["forecasting", "reconstructing", "both"]
SMALL = MTADGATConfig(window=12, features=4, embed=6, hidden=10, dense=9, latent=3, dropout=0.0)


@pytest.fixture(scope="module", autouse=True)
def _one_thread_as_in_the_service() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def network(config: MTADGATConfig) -> MTADGATNetwork:
    """Random weights in all of them: the biases begin as zeros."""
    torch.manual_seed(config.window + config.features)
    made = MTADGATNetwork(config).eval()
    for weight in made.parameters():
        if not weight.any():
            torch.nn.init.normal_(weight, std=0.5)
    return made


def model(config: MTADGATConfig, **constants: Float64) -> MTADGAT:
    return serve(config, network(config).state_dict(), constants)


def points(config: MTADGATConfig, rows: int, seed: int = 0) -> Context:
    """Random walks with a point after each, some values of which did not arrive."""
    rng = np.random.default_rng(seed)
    walk = rng.normal(size=(rows, config.window + 1, config.features)).cumsum(axis=1) * 0.3
    value = walk[:, -1].copy()
    value[rng.random(value.shape) < 0.1] = np.nan
    step = rng.uniform(0.1, 0.5, value.shape)
    return context(walk[:, :-1], step, rng.random(walk[:, :-1].shape) < 0.9, value=value)


def naive_weights(layer: Attention, v: Tensor) -> Tensor:
    """α as the paper has it: every pair of nodes end to end, one product with all of them."""
    nodes = v.shape[1]
    left, right = v[:, :, None, :].expand(-1, -1, nodes, -1), v[:, None, :, :].expand(-1, nodes, -1, -1)
    pairs = torch.cat([left, right], dim=3) @ torch.cat([layer.left, layer.right], dim=1).t() + layer.offset
    e = torch.nn.functional.leaky_relu(pairs, layer.slope) @ layer.attention
    return torch.softmax(e + layer.bias, dim=2)


# -- the layers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("nodes", "size"), [(38, 30), (30, 38), (1, 12), (7, 1)])
def test_decomposed_attention_is_the_naive_one_and_its_rows_sum_to_1(nodes: int, size: int) -> None:
    torch.manual_seed(0)
    layer = Attention(nodes, size, embed=16, slope=0.2).double()
    for weight in (layer.bias, layer.offset, layer.attention):
        torch.nn.init.normal_(weight)
    v = torch.randn(5, nodes, size, dtype=torch.float64)
    alpha = layer.weights(v).detach()
    torch.testing.assert_close(alpha, naive_weights(layer, v).detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(alpha.sum(dim=2), torch.ones(5, nodes, dtype=torch.float64))
    if nodes > 1:
        assert float(alpha.std(dim=1).max()) > 1e-3  # rows differ: GATv2 looks at the node that asks
    torch.testing.assert_close(layer(v), torch.sigmoid(naive_weights(layer, v) @ v), rtol=1e-6, atol=0)


def test_gradients_of_the_decomposed_attention_are_those_of_the_naive_one() -> None:
    torch.manual_seed(1)
    layer = Attention(6, 5, embed=8, slope=0.2).double()
    v = torch.randn(3, 6, 5, dtype=torch.float64, requires_grad=True)
    towards = torch.randn(3, 6, 6, dtype=torch.float64)
    wanted = [v, layer.left, layer.offset, layer.right, layer.attention, layer.bias]
    ours = torch.autograd.grad((layer.weights(v) * towards).sum(), wanted)
    naive = torch.autograd.grad((naive_weights(layer, v) * towards).sum(), wanted)
    for one, other in zip(ours, naive, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-12)


def test_the_decoder_reads_the_same_whole_code_at_every_step() -> None:
    net = network(SMALL)
    seen: list[Tensor] = []
    net.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    z = torch.randn(5, SMALL.latent)
    net.decode(z)
    assert seen[0].shape == (5, SMALL.window, SMALL.latent)
    assert torch.equal(seen[0], z[:, None].expand(-1, SMALL.window, -1))
    # And all of it matters at every step of every feature.
    for step in range(SMALL.window):
        code = z[:1].clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(net.decode(code)[0, step].sum(), [code])
        assert bool((gradient != 0).all()), f"step {step}"


def test_the_convolution_learns_and_matters() -> None:
    net = network(SMALL)
    x = torch.randn(8, SMALL.window, SMALL.features)
    loss = net.loss(batch_of(torch.randn(8, SMALL.window + 1, SMALL.features))).sum()
    gradient, bias = torch.autograd.grad(loss, [net.conv.weight, net.get_parameter("conv.bias")])
    assert bool((gradient.abs().sum(dim=(0, 1)) > 0).all()) and bool((bias != 0).any())  # each of the 7 points
    with torch.no_grad():
        before = net.encode(x)
        net.conv.weight[:, :, 3] += 0.5
        assert float((net.encode(x) - before).abs().max()) > 1e-3


@pytest.mark.parametrize("scaling", ["train", "window"])
@pytest.mark.parametrize("mode", MODES)
def test_weights_have_the_shapes_of_the_config_and_what_is_served_is_the_layers(mode: Mode, scaling: str) -> None:
    config = replace(SMALL, mode=mode, scaling=scaling)  # type: ignore[arg-type]
    net = network(config)
    assert [(name, tuple(one.shape)) for name, one in net.state_dict().items()] == list(shapes(config).items())
    served = serve(config, net.state_dict())
    assert served.parameters == sum(one.numel() for one in net.parameters())
    x = torch.randn(40, config.window, config.features)
    found = served.look(x.double().numpy(), points(config, 40))
    with torch.no_grad():
        own, center, scale = net._own(x)
        state = net.encode(own)
        expected = [net.ahead(own, state)] if config.forecasts else []
        if config.reconstructs:
            expected.append(net.decode(net.code(state)[:, : config.latent])[:, -1])
    assert len(found) == len(expected) == (2 if mode == "both" else 1)
    for ours, layers in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, center + scale * layers, atol=2e-6)


def test_a_mode_has_no_weights_of_the_other() -> None:
    forecasting, reconstructing = (set(shapes(replace(SMALL, mode=mode))) for mode in ("forecasting", "reconstructing"))
    assert not [name for name in forecasting if name.startswith(("decoder", "code", "out"))]
    assert not [name for name in reconstructing if name.startswith("forecast")]
    assert set(shapes(SMALL)) == forecasting | reconstructing


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"window": 11}, "window=11"),
        ({"kernel": 4}, "kernel=4 must be odd"),
        ({"mode": "prediction"}, "mode='prediction'"),
        ({"gamma": -1.0}, "gamma=-1"),
        ({"gamma": float("nan")}, "gamma=nan"),
        ({"features": 0}, "features=0"),
        ({"dropout": 1.0}, "dropout=1"),
        ({"scaling": "test"}, "scaling='test'"),
    ],
)
def test_wrong_configs_are_refused(change: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        MTADGATConfig(**change)  # type: ignore[arg-type]


def test_wrong_units_and_stacks_are_refused() -> None:
    with pytest.raises(ConfigError, match="forecast_unit"):
        model(SMALL, forecast_unit=np.array([1.0, 2.0, 3.0, -1.0]))
    with pytest.raises(ConfigError, match="stacked"):
        serve(SMALL, network(SMALL).state_dict(), stacked=True)


# -- assessments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", ["train", "window"])
@pytest.mark.parametrize("mode", MODES)
def test_a_row_is_the_same_bits_in_any_batch(mode: Mode, scaling: str) -> None:
    config = replace(SMALL, mode=mode, scaling=scaling)  # type: ignore[arg-type]
    served, every = model(config), points(config, 300)
    whole = served.assess(every)
    assert len(np.unique(whole.expected[:, 0])) > 200  # rows differ, so the comparison below can fail
    for count in [*range(1, 18), 31, 33, 64, 65, 127, 129, 200, 257]:
        for rows in (slice(0, count), slice(300 - count, 300)):
            _same(served.assess(every.take(rows)), whole.take(rows))
    order = np.random.default_rng(0).permutation(300)
    _same(served.assess(every.take(order)), whole.take(order))


@pytest.mark.parametrize("features", [38, *range(1, 14)])
def test_a_row_is_the_same_bits_at_served_sizes(features: int) -> None:
    config = MTADGATConfig(window=30, features=features, embed=features + 3, dense=features, latent=features)
    served, every = model(config), points(config, 140)
    whole = served.assess(every)
    for count in [*SIZES[:-1], 1, 9, 100]:
        rows = np.random.default_rng(count).permutation(140)[:count]
        _same(served.assess(every.take(rows)), whole.take(rows))


@pytest.mark.parametrize("scaling", ["train", "window"])
def test_a_kept_forecast_is_the_same_bits_as_one_from_history(scaling: str) -> None:
    config = replace(SMALL, scaling=scaling)  # type: ignore[arg-type]
    served = model(config, still=np.array([0.0, 1.0, 0.0, 0.0]))
    rng = np.random.default_rng(3)
    rows, steps, window = 21, 30, config.window
    series = rng.normal(size=(rows, window + steps, config.features)).cumsum(axis=1)
    series[rng.random(series.shape) < 0.15] = np.nan
    history = np.nan_to_num(series[:, :window])
    step, ahead = np.full((rows, config.features), 0.5), np.full((rows, config.features), np.nan)
    for at in range(window, window + steps):
        point = context(history, step, value=series[:, at])
        anew, kept = served.assess(point), served.assess(replace(point, ahead=ahead))
        _same(anew, kept)
        assert anew.ahead is not None and np.isfinite(anew.ahead).all()
        value = np.where(np.isnan(point.value), anew.completion, point.value)
        history = np.concatenate([history[:, 1:], value[:, None]], axis=1)
        ahead = anew.ahead.copy()
        ahead[at % 3 :: 5] = np.nan  # these rows have none: a mixed batch


def test_with_kept_forecasts_there_is_one_pass_a_tick(monkeypatch: pytest.MonkeyPatch) -> None:
    served, every = model(SMALL), points(SMALL, 20)
    passed: list[int] = []
    look = Both.look

    def counted(self: Both, window: Float64, some: Context) -> list[Float64]:
        passed.append(len(window))
        return look(self, window, some)

    monkeypatch.setattr(Both, "look", counted)
    first = served.assess(every)
    assert passed == [20, 20]
    passed.clear()
    ahead = first.expected.copy()
    served.assess(replace(every, ahead=ahead))
    assert passed == [20]
    passed.clear()
    ahead[[3, 7], 1] = np.nan
    served.assess(replace(every, ahead=ahead))
    assert passed == [2, 20]


def test_scores_are_the_published_sum_in_units_of_the_training_data() -> None:
    units = {"forecast_unit": np.array([0.5, 1.0, 2.0, 0.01]), "reconstruction_unit": np.array([1.0, 0.7, 0.4, 3.0])}
    scale, center = np.array([2.0, 1.0, 0.5, 4.0]), np.array([1.0, 0.0, -1.0, 3.0])
    served = model(SMALL, scale=scale, center=center, **units)
    every = points(SMALL, 50)
    value = np.nan_to_num(every.value, nan=0.3)
    every = replace(every, value=value)
    (forecast, _), (_, point) = (
        served.look(every.history, every),
        served.look(np.concatenate([every.history[:, 1:], value[:, None]], axis=1), every),
    )
    f = np.square((value - forecast) / (scale * np.maximum(units["forecast_unit"], LEAST_UNIT)))
    r = np.square((value - point) / (scale * np.maximum(units["reconstruction_unit"], LEAST_UNIT)))
    s = (f + 0.8 * r) / 1.8
    found = served.assess(every)
    np.testing.assert_allclose(np.square(found.error), s, rtol=1e-9)
    np.testing.assert_allclose(score(value, found), np.sqrt(s.sum(axis=1)), rtol=1e-9)
    np.testing.assert_allclose(contributions(found.error), s / s.sum(axis=1, keepdims=True), rtol=1e-9)
    np.testing.assert_array_equal(found.completion, forecast)
    assert (np.sign(found.error) == np.sign(value - found.expected)).all()
    # The band that `expected`, `spread` and `slack` draw is where the score of the feature is the threshold.
    assert found.slack is not None
    away = np.square((value - found.expected) / found.spread) - found.slack
    np.testing.assert_allclose(away, s, rtol=1e-9)


def test_missing_values_are_filled_by_the_forecast_and_add_nothing() -> None:
    served, every = model(SMALL), points(SMALL, 30)
    some = np.isnan(every.value)
    assert some.any()
    found = served.assess(every)
    assert (found.error[some] == 0).all() and (found.error[~some] != 0).all()
    filled = served.assess(replace(every, value=np.where(some, found.completion, every.value)))
    assert found.ahead is not None and filled.ahead is not None
    np.testing.assert_array_equal(found.ahead, filled.ahead)
    np.testing.assert_array_equal(found.expected, filled.expected)
    nothing = served.assess(replace(every, value=np.full_like(every.value, np.nan)))
    assert (nothing.error == 0).all() and np.isfinite(nothing.completion).all()
    assert np.isnan(score(np.full_like(every.value, np.nan), nothing)).all()


@pytest.mark.parametrize("mode", MODES)
def test_only_the_modes_that_reconstruct_read_the_point(mode: Mode) -> None:
    config = replace(SMALL, mode=mode)
    served, every = model(config), points(config, 30)
    every = replace(every, value=np.nan_to_num(every.value))
    before, after = served.assess(every), served.assess(replace(every, value=every.value + 1))
    assert (before.expected != after.expected).any() == served.reads_point == (mode != "forecasting")
    assert served.reads_point == FAMILY.reads_point(config)
    assert served.looks_ahead == (mode == "both") == (before.ahead is not None)
    assert served.history == FAMILY.history(config) == config.window


@pytest.mark.parametrize("mode", MODES)
def test_windows_measured_by_themselves_have_no_unit(mode: Mode) -> None:
    config = replace(SMALL, mode=mode, scaling="window")
    served, every = model(config), points(config, 40)
    found = served.assess(every)
    moved = replace(
        every, history=every.history * 1e6 + 3e9, value=every.value * 1e6 + 3e9, usual_step=every.usual_step * 1e6
    )
    again = served.assess(moved)
    np.testing.assert_allclose(again.error, found.error, rtol=1e-3, atol=1e-4)
    spread = local_spread(every.history, every.usual_step, every.learned)
    np.testing.assert_allclose(found.spread, spread)


@pytest.mark.parametrize("scaling", ["train", "window"])
@pytest.mark.parametrize("mode", MODES)
def test_everything_is_finite_for_any_finite_input(mode: Mode, scaling: str) -> None:
    config = replace(SMALL, mode=mode, scaling=scaling)  # type: ignore[arg-type]
    rng, shape = np.random.default_rng(0), (9, config.window, config.features)
    served = model(config, still=np.array([0.0, 0.0, 1.0, 0.0]))
    for history in (
        np.zeros(shape),
        np.full(shape, 7.0),
        3e9 + 1e6 * rng.normal(size=shape),
        1e-9 * rng.normal(size=shape),
        np.where(rng.random(shape) < 0.5, 1e12, -1e12),
    ):
        for value in (0.0, 1e-9, -3e9, 1e30, 1e300):
            for step in (np.nan, 0.0, 1e-12, 1e9):
                every = context(history, np.full(shape[::2], step), value=np.full(shape[::2], value))
                found = served.assess(every)
                parts = [found.expected, found.spread, found.error, found.completion]
                parts += [part for part in (found.slack, found.ahead) if part is not None]
                for part in parts:
                    assert np.isfinite(part).all(), (history[0, 0], value, step)
                assert (found.spread > 0).all()
                assert np.isfinite(score(every.value, found)).all()


def test_a_feature_that_never_moved_is_expected_where_it_was() -> None:
    served = model(SMALL, still=np.array([0.0, 1.0, 0.0, 0.0]))
    every = replace(points(SMALL, 20), value=np.full((20, 4), 0.5))
    found = served.assess(every)
    np.testing.assert_array_equal(found.expected[:, 1], every.history[:, -1, 1])
    assert found.ahead is not None and (found.ahead[:, 1] == 0.5).all()
    moved = every.history.copy()
    moved[:, :, 1] *= 100  # not read either
    np.testing.assert_array_equal(served.assess(replace(every, history=moved)).expected[:, 0], found.expected[:, 0])


def test_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"reads \(B, 12, 4\)"):
        model(SMALL).assess(context(np.zeros((3, 11, 4))))


def _same(one: Assessment, other: Assessment) -> None:
    for name in ("expected", "spread", "error", "completion", "slack", "ahead"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


# -- training ---------------------------------------------------------------------------------------------------------


def batch_of(x: Tensor, counts: Tensor | None = None) -> Batch:
    counts = torch.ones(x.shape, dtype=torch.bool) if counts is None else counts
    return Batch(x, counts, torch.zeros(len(x), 3, dtype=torch.int64))


def test_what_does_not_count_is_not_in_the_loss() -> None:
    net = network(SMALL)
    x = torch.randn(6, SMALL.window + 1, SMALL.features)
    counts = torch.rand(x.shape) < 0.6
    counts[0] = False
    counts[1, -1] = False
    loss = net.loss(batch_of(x, counts))
    assert loss.shape == (6,) and bool(torch.isfinite(loss).all())
    state = net.encode(x[:, :-1])
    error = (net.ahead(x[:, :-1], state) - x[:, -1]).abs()
    huber = torch.where(error < 1, 0.5 * error.square(), error - 0.5)
    mu, log_variance = net.code(net.encode(x[:, 1:])).chunk(2, dim=1)
    variance = net.log_variance.exp().expand_as(x[:, 1:])
    nll = torch.nn.functional.gaussian_nll_loss(net.decode(mu), x[:, 1:], variance, full=True, reduction="none")
    latent = torch.distributions.Normal(mu, torch.exp(0.5 * log_variance))
    kl = torch.distributions.kl_divergence(latent, torch.distributions.Normal(0.0, 1.0)).sum(dim=1)
    for row in range(6):
        cells = counts[row, 1:]
        expected = (nll[row][cells].sum() + kl[row]) / max(int(cells.sum()), 1)
        if counts[row, -1].any():
            expected = expected + huber[row][counts[row, -1]].mean()
        torch.testing.assert_close(loss[row], expected, rtol=1e-4, atol=1e-5)


def test_the_modes_are_the_two_parts_of_their_sum() -> None:
    both = network(SMALL)
    x = batch_of(torch.randn(5, SMALL.window + 1, SMALL.features))
    parts = torch.zeros(5)
    for mode in ("forecasting", "reconstructing"):
        half = MTADGATNetwork(replace(SMALL, mode=mode)).eval()
        half.load_state_dict({name: both.state_dict()[name] for name in half.state_dict()})
        parts = parts + half.loss(x)
    torch.testing.assert_close(both.loss(x), parts)


def test_many_windows_without_a_gradient_are_taken_in_pieces() -> None:
    net, x = network(SMALL), batch_of(torch.randn(600, SMALL.window + 1, SMALL.features))
    with torch.no_grad():
        pieces = net.loss(x)
    assert pieces.shape == (600,)
    torch.testing.assert_close(pieces, net.loss(x).detach())


def test_the_latent_code_is_drawn_in_training_only() -> None:
    net, x = network(SMALL), batch_of(torch.randn(5, SMALL.window + 1, SMALL.features))
    assert torch.equal(net.loss(x), net.loss(x))
    net.train()
    assert not torch.equal(net.loss(x), net.loss(x))


def test_units_are_the_usual_errors_and_one_anomaly_does_not_make_them() -> None:
    net = network(SMALL)
    x = torch.randn(500, SMALL.window + 1, SMALL.features)
    counts = torch.ones(x.shape, dtype=torch.bool)
    counts[:, :, 2] = False
    units = net.measure(batch_of(x, counts))
    assert set(units) == {"forecast_unit", "reconstruction_unit"}
    for name, unit in units.items():
        assert unit.shape == (4,) and unit[2] == 1.0, name
        assert (unit[[0, 1, 3]] > 0.5).all() and (unit < 2.5).all(), name
    spoilt = x.clone()
    spoilt[:4, -1, 0] = INPUT_LIMIT
    again = net.measure(batch_of(spoilt, counts))["forecast_unit"]
    assert units["forecast_unit"][0] < again[0] < 1.2 * units["forecast_unit"][0]
    assert net.measure(batch_of(torch.zeros(9, SMALL.window + 1, 4), torch.zeros(9, SMALL.window + 1, 4).bool()))


def fit(config: MTADGATConfig, x: Tensor, counts: Tensor, steps: int) -> tuple[MTADGATNetwork, list[float]]:
    torch.manual_seed(0)
    net = MTADGATNetwork(config)
    optimiser = torch.optim.Adam(net.parameters(), lr=3e-3)
    losses = []
    for step in range(steps):
        rows = torch.arange(step * 32, step * 32 + 32) % len(x)
        loss = net.loss(batch_of(x[rows], counts[rows])).mean()
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        assert bool(torch.isfinite(loss)) and bool(torch.isfinite(norm)), f"step {step}"
        optimiser.step()
        losses.append(float(loss.detach()))
    return net.eval(), losses


def standardised(values: Float64, config: MTADGATConfig) -> tuple[Tensor, Tensor]:
    """Windows of (N, F) values as the trainer makes them, and which count."""
    known = ~np.isnan(values)
    scale = np.nanstd(values, axis=0)
    z = np.nan_to_num((values - np.nanmean(values, axis=0)) / np.where(scale > 0, scale, 1.0))
    at = np.arange(len(values) - config.window)[:, None] + np.arange(config.window + 1)
    order = np.random.default_rng(0).permutation(len(at))
    return torch.tensor(z[at][order], dtype=torch.float32), torch.from_numpy((known & (scale > 0))[at][order])


@pytest.mark.parametrize("scaling", ["train", "window"])
@pytest.mark.parametrize("kind", ["constant", "predictable", "huge", "missing", "spikes"])
def test_training_never_ends_in_nan(kind: str, scaling: str) -> None:
    config = replace(SMALL, scaling=scaling)  # type: ignore[arg-type]
    rng, t = np.random.default_rng(0), np.arange(700)
    values = np.sin(t[:, None] / np.array([5.0, 9.0, 13.0, 21.0])) + 0.1 * rng.normal(size=(700, 4))
    if kind == "constant":
        values[:] = 5.0
    elif kind == "predictable":
        values = np.tile((t % 2)[:, None], 4).astype(float)
    elif kind == "huge":
        values *= 1e9
    elif kind == "missing":
        values[rng.random(values.shape) < 0.4] = np.nan
    else:
        values[::97] = 1e6
    net, losses = fit(config, *standardised(values, config), steps=60)
    assert all(bool(torch.isfinite(weight).all()) for weight in net.parameters())
    if kind not in ("constant", "spikes"):
        assert np.mean(losses[-5:]) < 0.97 * np.mean(losses[:5])
    units = net.measure(batch_of(*standardised(values, config)))
    assert all(np.isfinite(unit).all() for unit in units.values())


def test_it_learns_to_forecast_and_to_tell_a_broken_relation() -> None:
    config = MTADGATConfig(window=16, features=3, embed=6, hidden=24, dense=24, latent=4, dropout=0.0)
    t = np.arange(1500)
    first = np.sin(t / 6) + 0.05 * np.random.default_rng(0).normal(size=1500)
    values = np.stack([first, -first, np.cos(t / 6)], axis=1)
    x, counts = standardised(values, config)
    net, losses = fit(config, x, counts, steps=250)
    assert losses[-1] < 0.5 * losses[0]
    constants = net.measure(batch_of(x[:400], counts[:400]))
    center, scale = values.mean(axis=0), values.std(axis=0)
    served = serve(config, net.state_dict(), {"center": center, "scale": scale, **constants})
    at = np.arange(200, 1200, 10)
    history = values[at[:, None] + np.arange(-16, 0)]
    normal = served.assess(context(history, value=values[at]))
    broken = values[at].copy()
    broken[:, 1] = -broken[:, 1]  # each value is usual; that both rise is not
    strange = served.assess(context(history, value=broken))
    clear = np.abs(values[at][:, 0]) > 0.5
    usual = np.median(score(values[at], normal))
    assert np.median(score(broken, strange)[clear]) > 4 * usual
    assert (contributions(strange.error)[clear].argmax(axis=1) == 1).mean() > 0.9
