from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from models import bagel
from models.bagel import FAMILY, Bagel, BagelConfig, Network, Noise
from models.base import Assessment, Context, Float64
from models.errors import ConfigError
from models.family import Batch, Weights
from models.scaling import clock
from tests.bench import bagel_table
from tests.helpers import MINUTE, T0

SMALL = BagelConfig(window=24, hidden=16, latent=3, samples=16, iterations=4)
HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Passes this small lose more by waiting for a second thread than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def network(config: BagelConfig, seed: int = 0) -> Network:
    """Weights with larger deviations than new ones: what a trained network has, and none of them is near 0."""
    torch.manual_seed(seed)
    made = Network(config).eval()
    with torch.no_grad():
        for weight in made.parameters():
            weight.mul_(1.5)
    return made


def weights(made: Network, dtype: torch.dtype = torch.float32) -> Weights:
    return {name: tensor.detach().to(dtype) for name, tensor in made.state_dict().items()}


def model(config: BagelConfig, seed: int = 0, **constants: float) -> Bagel:
    return Bagel(config, weights(network(config, seed)), {name: np.array([one]) for name, one in constants.items()})


def context(config: BagelConfig, rows: int, missing: float = 0.0, seed: int = 0) -> Context:
    draws = np.random.default_rng(seed)
    shape = (rows, config.window - 1, 1)
    return Context(
        history=draws.normal(size=shape).cumsum(axis=1) / 4,
        learned=draws.random(shape) >= missing,
        value=draws.normal(size=(rows, 1)),
        time_ms=T0 + draws.integers(0, 20_000, rows) * MINUTE,
        usual_step=np.ones((rows, 1)),
    )


def windows(config: BagelConfig, rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Windows (rows, W) and time codes (rows, 3), float64 and int64."""
    given = context(config, rows, seed=seed)
    x = np.concatenate([given.history[..., 0], given.value], axis=1)
    return torch.from_numpy(x), torch.from_numpy(clock(given.time_ms))


def naive_nll(made: Network, x: Tensor, code: Tensor, noise: Tensor) -> Tensor:
    """The paper's score: every point of the window decoded, for every draw, from the dense one-hot time code."""
    y = bagel.one_hot(code).to(x.dtype)
    z_mean, z_std = made.encode(x, y)
    z = z_mean + z_std * noise[:, None]  # (S, n, Z)
    mean, std = made.decode(z, y.expand(len(noise), -1, -1))  # (S, n, W)
    log_p = -0.5 * ((x - mean) / std) ** 2 - std.log() - HALF_LOG_2PI
    return -log_p.mean(dim=0)[:, -1]


def naive_completed(made: Network, x: Tensor, missing: Tensor, code: Tensor, noise: Noise) -> Tensor:
    """The paper's MCMC: whole windows encoded and decoded, and the missing points replaced."""
    y = bagel.one_hot(code).to(x.dtype)
    for z_noise, x_noise in zip(noise.latent.to(x.dtype), noise.point.to(x.dtype), strict=True):
        z_mean, z_std = made.encode(x, y)
        mean, std = made.decode(z_mean + z_std * z_noise, y)
        x = torch.where(missing, (mean + std * x_noise).clamp(-20, 20), x)
    return x


def log_prob(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Of torch's own normal distribution."""
    made: Tensor = torch.distributions.Normal(mean, std).log_prob(x)  # type: ignore[no-untyped-call]
    return made


def nll(config: BagelConfig, assessment: Assessment) -> Float64:
    """What the errors of a model without the constant `floor` say, (B,)."""
    return 0.5 * assessment.error[:, 0] ** 2 + math.log(config.std_floor) + HALF_LOG_2PI


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("features", 2),
        ("window", 2),
        ("latent", 0),
        ("hidden", 0),
        ("samples", 0),
        ("iterations", 0),
        ("seed", -1),
        ("injection", 1.0),
        ("condition_dropout", -0.1),
        ("std_floor", 0.0),
        ("std_floor", math.nan),
        ("weight_decay", math.inf),
        ("scaling", "none"),
    ],
)
def test_a_wrong_config_is_refused_by_name_and_value(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name}={value!r}"):
        BagelConfig(**{name: value})


def test_the_published_size() -> None:
    assert sum(math.prod(shape) for shape in BagelConfig().shapes.values()) == 77_256
    assert {n: tuple(t.shape) for n, t in Network(SMALL).state_dict().items()} == FAMILY.shapes(SMALL)
    assert list(Network(SMALL).state_dict()) == list(SMALL.shapes)
    assert FAMILY.history(SMALL) == model(SMALL).history == 23
    assert FAMILY.reads_point(SMALL) and model(SMALL).reads_point


def test_time_code_is_minute_hour_and_weekday_in_utc() -> None:
    time_ms = np.array([T0, T0 + 8 * 60 * MINUTE, T0 + 61 * MINUTE + 59_999])  # T0 is a Sunday, 16:00
    assert clock(time_ms).tolist() == [[0, 16, 0], [0, 0, 1], [1, 17, 0]]
    y = bagel.one_hot(torch.tensor([[59, 23, 6]]))
    assert y.nonzero()[:, 1].tolist() == [59, 60 + 23, 60 + 24 + 6] and y.shape == (1, 91)


def test_last_step_decode_and_column_sums_are_the_naive_formula() -> None:
    made = network(SMALL).double()
    x, code = windows(SMALL, 200)
    noise = Noise.of(SMALL).score.double()
    packed, _ = bagel.pack(weights(made, torch.float64), SMALL)
    m, a, c = bagel.last_point(packed, x, code, noise=noise, std_floor=SMALL.std_floor)
    for shift in (0.0, -3.0, 100.0):  # the likelihood is a quadratic function of the point, not read anew
        point = x[:, -1] + shift
        y = bagel.one_hot(code).double()
        z_mean, z_std = made.encode(x, y)
        mean, std = made.decode(z_mean + z_std * noise[:, None], y.expand(len(noise), -1, -1))
        direct = -log_prob(point, mean[..., -1], std[..., -1]).mean(dim=0)
        torch.testing.assert_close(0.5 * a * (point - m) ** 2 + c, direct, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(0.5 * a * (x[:, -1] - m) ** 2 + c, naive_nll(made, x, code, noise), rtol=1e-10, atol=0)


@pytest.mark.parametrize("missing", [0.0, 0.2])
def test_the_served_score_is_the_naive_one(missing: float) -> None:
    config = BagelConfig()
    made, given = network(config), context(config, 64, missing)
    assessment = model(config).assess(given)
    noise = Noise.of(config)
    x = torch.from_numpy(np.concatenate([given.history[..., 0], given.value], axis=1)).double()
    hole = torch.from_numpy(np.concatenate([~given.learned[..., 0], np.zeros((64, 1), np.bool_)], axis=1))
    code = torch.from_numpy(clock(given.time_ms))
    made = made.double()
    with torch.no_grad():
        expected = naive_nll(made, naive_completed(made, x, hole, code, noise), code, noise.score.double())
    # Against float64: the float32 of both ways, and of ten iterations, is within it.
    np.testing.assert_allclose(nll(config, assessment), expected.numpy(), rtol=1e-6 if not missing else 1e-5)


@pytest.mark.parametrize("holes", [1, 4, 5, 16, 17, 24])
def test_mcmc_that_decodes_missing_points_only_is_the_naive_one(holes: int) -> None:
    made, noise = network(SMALL).double(), Noise.of(SMALL)
    x, code = windows(SMALL, 40)
    missing = torch.zeros(x.shape, dtype=torch.bool)
    for row in range(40):
        missing[row, torch.randperm(24, generator=torch.Generator().manual_seed(row))[:holes]] = True
    at = torch.argsort((~missing).int(), dim=1, stable=True)[:, :holes]
    _, packed = bagel.pack(weights(made, torch.float64), SMALL)
    double = Noise(noise.score.double(), noise.latent.double(), noise.point.double())
    (filled,) = bagel.complete(
        packed,
        torch.where(missing, 0.0, x),
        x.gather(1, at),
        at,
        torch.ones_like(at, dtype=torch.bool),
        code,
        noise=double,
        std_floor=SMALL.std_floor,
    )
    with torch.no_grad():
        naive = naive_completed(made, x, missing, code, noise)
    torch.testing.assert_close(filled, naive.gather(1, at), rtol=1e-9, atol=1e-9)
    # And the passes of the model, which pad to the next of a few sizes.
    served = model(SMALL).completed(x.float().numpy(), missing.numpy(), code.numpy(), context(SMALL, 40))
    np.testing.assert_allclose(served, naive.float().numpy(), rtol=1e-4, atol=1e-5)


def test_mcmc_is_not_entered_when_nothing_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    real = bagel.complete

    def spy(w: Weights, known: Tensor, *rest: Tensor, **kw: Any) -> tuple[Tensor]:
        seen.append(len(known))
        return real(w, known, *rest, **kw)

    monkeypatch.setattr(bagel, "complete", spy)
    served, given = model(SMALL), context(SMALL, 20)
    served.assess(given)
    assert seen == []
    given.learned[3, 7] = False
    served.assess(given)
    assert seen == [8]  # the one row, padded: the other 19 do not go through it
    given.learned[:] = True
    given.value[5] = np.nan
    served.assess(given)
    assert seen == [8, 8]


def test_mcmc_changes_missing_points_and_no_others() -> None:
    served, given = model(SMALL), context(SMALL, 100, missing=0.3)
    draws = np.random.default_rng(5)
    x = draws.normal(size=(100, 24)).astype(np.float32)
    missing = np.asarray(draws.random((100, 24)) < draws.choice([0.0, 0.05, 0.3, 1.0], (100, 1)), np.bool_)
    before = x.copy()
    after = served.completed(x, missing, clock(given.time_ms), given)
    np.testing.assert_array_equal(x, before)
    np.testing.assert_array_equal(after[~missing], before[~missing])
    assert (after[missing] != before[missing]).all()
    # What was observed tells them what to be.
    other = served.completed((x + 1).astype(np.float32), missing, clock(given.time_ms), given)
    some = missing & ~missing.all(axis=1, keepdims=True)
    assert (other[some] != after[some]).all()


@pytest.mark.parametrize("scaling", ["train", "window"])
def test_a_row_is_the_same_bits_in_any_batch_at_any_position(scaling: Any) -> None:
    config = BagelConfig(scaling=scaling)
    served, given = model(config), context(config, 300)
    given.learned[::2] = np.random.default_rng(1).random((150, 119, 1)) >= 0.2
    given.learned[::10] = False
    given.value[::7] = np.nan
    expected = served.assess(given)
    assert len(np.unique(expected.expected)) == 300  # rows differ, so the comparison below can fail

    def same(rows: Any) -> None:
        again, picked = served.assess(given.take(rows)), expected.take(rows)
        for name in ("expected", "spread", "error", "completion", "slack"):
            np.testing.assert_array_equal(getattr(again, name), getattr(picked, name), err_msg=f"{name} of {rows}")

    for count in (1, 2, 3, 7, 8, 9, 31, 64, 100, 129, 257):
        same(slice(0, count))
        same(slice(300 - count, 300))
    same(np.random.default_rng(0).permutation(300))


def test_noise_is_of_the_seed() -> None:
    given = context(SMALL, 30, missing=0.1)
    first, again = model(SMALL).assess(given), model(SMALL).assess(given)
    np.testing.assert_array_equal(first.error, again.error)
    other = model(replace(SMALL, seed=1)).assess(given)  # the same weights
    assert (other.error != first.error).all()
    # A frozen stream: replays of today's checkpoints must agree with tomorrow's.
    np.testing.assert_allclose(Noise.of(SMALL).score[0], [1.7640524, 0.4001572, 0.978738], rtol=1e-6)


@pytest.mark.parametrize("scaling", ["train", "window"])
def test_a_stack_is_its_members_one_by_one(scaling: Any) -> None:
    config = replace(SMALL, scaling=scaling)
    constants = [{"center": 0.1 * k, "scale": 1.0 + k, "floor": -k - 1.0} for k in range(3)]
    members = [model(config, k, **constants[k]) for k in range(3)]
    stack = Bagel(
        config,
        {name: torch.stack([weights(network(config, k))[name] for k in range(3)]) for name in config.shapes},
        {name: np.array([[one[name]] for one in constants]) for name in constants[0]},
        stacked=True,
    )
    given = context(config, 50, missing=0.1)
    given.value[::9] = np.nan
    which = np.arange(50) % 3
    together = stack.assess(replace(given, member=which))
    for k in range(3):
        alone, picked = members[k].assess(given.take(which == k)), together.take(which == k)
        for name in ("expected", "spread", "error", "completion", "slack"):
            a, b = getattr(picked, name), getattr(alone, name)
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6 * np.abs(b).max(), err_msg=name)
    one = replace(given, member=which).take(slice(4, 5))
    np.testing.assert_array_equal(stack.assess(one).error, together.error[4:5])


def test_m_elbo_by_hand() -> None:
    log_p = torch.tensor([[-1.0, -2.0, -4.0, -8.0], [-1.0, -2.0, -4.0, -8.0]])
    normal = torch.tensor([[True, True, True, True], [True, False, True, False]])
    z, z_std, noise = torch.tensor([[2.0], [2.0]]), torch.tensor([[0.5], [0.5]]), torch.tensor([[1.0], [1.0]])
    log_prior = -0.5 * 4 - HALF_LOG_2PI
    log_q = -0.5 * 1 - math.log(0.5) - HALF_LOG_2PI
    expected = [-15 + log_prior - log_q, -5 + 0.5 * log_prior - log_q]  # β = 1/2: of the prior, not of log q
    torch.testing.assert_close(bagel.m_elbo(log_p, normal, z, z_std, noise), torch.tensor(expected))


def batch(config: BagelConfig, rows: int, seed: int = 0) -> Batch:
    x, code = windows(config, rows, seed)
    return Batch(x.float()[..., None], torch.ones(rows, config.window, 1, dtype=torch.bool), code)


def test_values_that_do_not_count_are_neither_read_nor_in_the_loss() -> None:
    made, given = network(SMALL), batch(SMALL, 10)
    given.counts[:, 5] = False
    changed = given._replace(x=given.x.clone())
    changed.x[:, 5] += 7
    losses = []
    for one in (given, changed):
        torch.manual_seed(1)
        losses.append(made.loss(one))
    torch.testing.assert_close(*losses, rtol=0, atol=0)
    changed.x[:, 6] += 7
    torch.manual_seed(1)
    assert (made.loss(changed) != losses[0]).all()


def test_the_loss_is_the_formula_of_the_paper() -> None:
    config = replace(SMALL, injection=0.0, condition_dropout=0.0, weight_decay=0.01)
    made, given = network(config).train(), batch(config, 6)
    torch.manual_seed(3)
    loss = made.loss(given)
    torch.manual_seed(3)
    torch.rand(6, 24)  # what the injection draws
    noise = torch.randn(6, 3)
    x, y = given.x[..., 0], bagel.one_hot(given.code)
    z_mean, z_std = made.encode(x, y)
    z = z_mean + z_std * noise
    log_p = log_prob(x, *made.decode(z, y)).sum(dim=1)
    log_q = log_prob(z, z_mean, z_std).sum(dim=1)
    log_prior = log_prob(z, torch.zeros(3), torch.ones(3)).sum(dim=1)
    hidden = ("encoder1", "encoder2", "decoder1", "decoder2")
    squares = sum((w**2).sum() for name in hidden for w in made.get_submodule(name).parameters())
    torch.testing.assert_close(loss, -(log_p + log_prior - log_q) + 0.01 * squares, rtol=1e-5, atol=1e-4)


def test_points_go_missing_anew_in_each_pass_and_in_training_only(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(SMALL, injection=0.2)
    made, seen = network(config), list[Tensor]()
    real = made.encode

    def spy(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(torch.cat([x, y], dim=1))
        return real(x, y)

    monkeypatch.setattr(made, "encode", spy)
    given = batch(config, 500)
    for mode in (True, True, False):
        made.train(mode).loss(given)
    first, second, held_out = ((one[:, :24] == 0) for one in seen)
    assert first.float().mean() == pytest.approx(0.2, abs=0.02) and (first != second).float().mean() > 0.25
    assert not held_out.any()
    codes = [one[:, 24:].count_nonzero() / 500 for one in seen]
    assert codes[0] == pytest.approx(2.7, abs=0.1) and codes[2] == 3  # a tenth of the columns is dropped


def test_held_out_windows_are_judged_without_weights_and_by_a_loss_that_outliers_hardly_move() -> None:
    off = torch.tensor([0.5, 1.0, 3.0, -40.0])
    expected = torch.tensor([0.125, 0.5, 2.5, 39.5]) + math.log(2) + HALF_LOG_2PI
    torch.testing.assert_close(-bagel.huber_log_density(2 * off + 7, torch.tensor(7.0), torch.tensor(2.0)), expected)
    heavy, light, given = network(replace(SMALL, weight_decay=100.0)), network(SMALL), batch(SMALL, 8)
    torch.manual_seed(0)
    loss = heavy.loss(given)
    torch.manual_seed(0)
    torch.testing.assert_close(loss, light.loss(given), rtol=0, atol=0)


def wave(rows: int, seed: int) -> Batch:
    """Windows of one noisy wave of two hours, by the minute."""
    draws = np.random.default_rng(seed)
    minute = draws.integers(0, 20_000, rows)
    phase = (minute[:, None] + np.arange(-SMALL.window + 1, 1)) * (2 * np.pi / 120)
    x = np.sin(phase) + 0.05 * draws.normal(size=phase.shape)
    code = torch.from_numpy(clock(minute * MINUTE))
    return Batch(torch.from_numpy(x.astype(np.float32))[..., None], torch.ones(rows, SMALL.window, 1).bool(), code)


@pytest.fixture(scope="module")
def trained(_one_thread: None) -> Network:
    torch.manual_seed(0)
    made = Network(SMALL).train()
    optimiser = torch.optim.Adam(made.parameters(), lr=3e-3)
    for step in range(300):
        loss = made.loss(wave(64, step)).mean()
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(made.parameters(), 10.0)
        optimiser.step()
    return made.eval()


def test_training_learns_a_wave_and_completes_it(trained: Network) -> None:
    given = wave(400, 10_000)
    with torch.no_grad():
        torch.manual_seed(0)
        new, loss = Network(SMALL).eval().loss(given).mean(), trained.loss(given).mean()
    assert loss < new - 20
    served = Bagel(SMALL, weights(trained), trained.measure(wave(3000, 1)))
    x = given.x.numpy().astype(np.float64)
    minutes = given.code.numpy().astype(np.int64) @ np.array([1, 60, 1440])
    contexts = Context(
        x[:, :-1], np.ones((400, 23, 1), np.bool_), x[:, -1], minutes * MINUTE, np.full((400, 1), np.nan)
    )
    contexts.time_ms[:] += 3 * 1440 * MINUTE  # a Sunday; the epoch began on a Thursday
    normal = served.assess(contexts)
    assert np.abs(normal.error).mean() < 3
    assert np.abs(normal.expected - contexts.value).mean() < 0.1
    spiked = served.assess(replace(contexts, value=contexts.value + 1.0))
    assert (spiked.error > np.quantile(np.abs(normal.error), 0.99)).mean() > 0.95
    # Five points and the newest one lost, and 0 in their place: the completion is near what was there.
    holed = replace(contexts, history=x[:, :-1].copy(), learned=contexts.learned.copy(), value=contexts.value * np.nan)
    holed.history[:, 15:20], holed.learned[:, 15:20] = 0, False
    completed = served.assess(holed).completion
    assert np.abs(completed - contexts.value).mean() < 0.15


def test_the_floor_is_below_nearly_all_training_windows(trained: Network) -> None:
    given = wave(3000, 1)
    given.counts[:1000, -1] = False
    given.x[:1000, -1] = 15.0  # they do not count: the floor must not know of them
    floor = trained.measure(given)["floor"]
    assert floor.shape == (1,) and floor.dtype == np.float64
    x, code = given.x[1000:, :, 0], given.code[1000:]
    with torch.no_grad():
        below = (naive_nll(trained, x, code, Noise.of(SMALL).score).numpy() < floor).mean()
    assert below == pytest.approx(0.01, abs=0.001)
    given.counts[:] = False
    assert trained.measure(given) == {}


def test_many_networks_train_at_once() -> None:
    networks = [network(SMALL, k).train() for k in range(3)]
    base = copy.deepcopy(networks[0]).to("meta")
    parameters, _ = torch.func.stack_module_state(networks)

    class Loss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = base

        def forward(self, *one: Tensor) -> Tensor:
            return self.inner.loss(Batch(*one)).mean()

    def loss(one: dict[str, Tensor], given: tuple[Tensor, ...]) -> Tensor:
        called: Tensor = torch.func.functional_call(Loss(), {f"inner.{n}": t for n, t in one.items()}, given)
        return called

    batches = [batch(SMALL, 8, seed=k) for k in range(3)]
    stacked = tuple(torch.stack(parts) for parts in zip(*batches, strict=True))
    together = torch.func.vmap(torch.func.grad(loss), randomness="different")(parameters, stacked)
    assert all(torch.isfinite(one).all() and one.shape[0] == 3 for one in together.values())
    assert (together["x_mean.weight"][0] != together["x_mean.weight"][1]).any()


@pytest.mark.parametrize("scaling", ["train", "window"])
def test_a_point_that_did_not_arrive_has_no_error_and_a_completion(scaling: Any) -> None:
    config = replace(SMALL, scaling=scaling)
    given = context(config, 12)
    given.value[:6] = np.nan
    given.learned[3] = False  # and nothing before it
    assessment = model(config).assess(given)
    assert (assessment.error[:6] == 0).all() and (assessment.error[6:] != 0).all()
    for name in ("expected", "spread", "error", "completion", "slack"):
        one = getattr(assessment, name)
        assert one.shape == (12, 1) and one.dtype == np.float64 and np.isfinite(one).all(), name
    assert (assessment.spread > 0).all()


@pytest.mark.parametrize("scaling", ["train", "window"])
def test_everything_is_finite_for_any_finite_input(scaling: Any) -> None:
    config = replace(SMALL, scaling=scaling)
    made = network(config)
    with torch.no_grad():
        made.x_std.bias[-1] = -200  # a dead deviation: softplus underflows
    levels = np.array([0.0, 1.0, -5.0, 3e9, 1e-9, 1e-300, 1e100, -1e100])
    flat = np.tile(levels[:, None, None], (1, 23, 1))
    wild = flat * np.random.default_rng(0).normal(size=flat.shape)
    for history in (flat, wild):
        for value in (levels, levels + 1, -levels * 1e6, np.full(8, 1e140), np.full(8, -1e140)):
            given = replace(context(config, 8), history=history, value=value[:, None])
            served = Bagel(config, weights(made), {"center": np.array([2.0]), "scale": np.array([1e-6])})
            assessment = served.assess(given)
            for name in ("expected", "spread", "error", "completion", "slack"):
                assert np.isfinite(getattr(assessment, name)).all(), (name, value)
            assert (assessment.spread > 0).all()
            assert np.isfinite(assessment.half_width(np.full((8, 1), 5.0))).all()


@pytest.mark.parametrize("scaling", ["train", "window"])
def test_errors_are_of_the_distance_and_the_band_is_where_they_reach_the_threshold(scaling: Any) -> None:
    config = replace(SMALL, scaling=scaling)
    given = context(config, 200)
    assessment = model(config, floor=-0.5).assess(given)
    assert assessment.slack is not None
    away = given.value - assessment.expected
    square = (away / assessment.spread) ** 2 - assessment.slack
    np.testing.assert_allclose(assessment.error, np.sign(away) * np.sqrt(np.maximum(square, 0)), rtol=1e-9)
    threshold = np.full((200, 1), np.median(np.abs(assessment.error)))
    inside = np.abs(away) < assessment.half_width(threshold)
    np.testing.assert_array_equal(inside, np.abs(assessment.error) < threshold)
    assert 50 < inside.sum() < 150


def test_a_general_model_has_the_usual_step_in_its_variance_and_counts_from_it() -> None:
    config = replace(SMALL, scaling="window")
    given = context(config, 60)
    given.usual_step[:20], given.usual_step[20:40] = 0.01, 3.0
    given.usual_step[40:] = np.nan  # not known: the mean step of the window
    assessment, sure = model(config).assess(given), model(config).assess(replace(given, usual_step=0 * given.value))
    steps = np.abs(np.diff(given.history, axis=1)).mean(axis=1)
    usual = np.where(np.isnan(given.usual_step), steps, given.usual_step)
    std = np.sqrt(sure.spread**2 + usual**2)  # an unknown floor of the usual step is far below the spread
    off = given.value - assessment.expected
    nll = 0.5 * (off / std) ** 2 + np.log(std) - np.log(usual)
    np.testing.assert_allclose(assessment.spread, std, rtol=1e-6)
    np.testing.assert_allclose(0.5 * assessment.error**2, nll, rtol=1e-6)


@pytest.mark.parametrize("scaling", ["train", "window"])
def test_units_do_not_matter(scaling: Any) -> None:
    config = replace(SMALL, scaling=scaling)
    given = context(config, 50, missing=0.1)
    one = model(config, center=0.25, scale=2.0).assess(given)
    moved = replace(
        given, history=1000 * given.history - 64, value=1000 * given.value - 64, usual_step=1000 * given.usual_step
    )
    other = model(config, center=250.0 - 64, scale=2000.0).assess(moved)
    np.testing.assert_allclose(other.error, one.error, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(other.expected, 1000 * one.expected - 64, rtol=1e-4, atol=1e-2)
    np.testing.assert_allclose(other.spread, 1000 * one.spread, rtol=1e-4)


def test_the_time_is_read() -> None:
    given = context(SMALL, 50)
    for later in (MINUTE, 60 * MINUTE, 24 * 60 * MINUTE):
        moved = replace(given, time_ms=given.time_ms + later)
        assert (model(SMALL).assess(moved).error != model(SMALL).assess(given).error).all()
    week = replace(given, time_ms=given.time_ms + 7 * 24 * 60 * MINUTE)
    np.testing.assert_array_equal(model(SMALL).assess(week).error, model(SMALL).assess(given).error)


def test_a_kpi_that_never_moved_is_expected_to_stay() -> None:
    given = context(SMALL, 10)
    assessment = model(SMALL, center=3.0, still=1.0).assess(given)
    np.testing.assert_array_equal(assessment.expected, given.history[:, -1])


def test_a_long_gap_does_not_feed_upon_itself() -> None:
    config = replace(SMALL, scaling="window")
    served, given = model(config), context(config, 20)
    low, high = given.history.min(axis=1), given.history.max(axis=1)
    history, learned = given.history.copy(), given.learned.copy()
    for minute in range(60):
        now = replace(
            given,
            history=history,
            learned=learned,
            value=np.full((20, 1), np.nan),
            time_ms=given.time_ms + minute * MINUTE,
        )
        completion = served.assess(now).completion
        assert (completion >= low).all() and (completion <= high).all()
        history = np.concatenate([history[:, 1:], completion[:, None]], axis=1)
        learned = np.concatenate([learned[:, 1:], np.zeros((20, 1, 1), np.bool_)], axis=1)


def test_other_shapes_are_refused() -> None:
    given = context(SMALL, 3)
    with pytest.raises(ValueError, match=r"reads \(B, 23, 1\)"):
        model(SMALL).assess(replace(given, history=given.history[:, 1:], learned=given.learned[:, 1:]))


@pytest.mark.data
@pytest.mark.slow
def test_anomalies_of_a_labelled_kpi_stand_out_with_and_without_gaps(data_dir: Path) -> None:
    # One seed and half the epochs of `python -m tests.bench.bagel_table`, which holds the authors' figures.
    series, time_ms = bagel_table.read(data_dir / "kpi" / "c02607e8.csv.gz")
    trained = bagel_table.fit(series, seed=0, epochs=20)
    assert bagel_table.removed(trained, series, time_ms, 0.0, 0)[0] >= 0.95
    got, kept = bagel_table.removed(trained, series, time_ms, 0.3, 0)
    assert got >= 0.9 * kept


def test_best_f1_by_hand() -> None:
    label = np.array([0, 1, 1, 1, 0, 0, 1, 0], np.bool_)
    score = np.array([1, 2, 3, 9, 4, 0, 5, 0], np.float64)
    assert bagel_table.best_f1(score, label, delay=7) == 1.0
    # Within two points the first segment reaches 3, above which there is the 4 of a normal point.
    assert bagel_table.best_f1(score, label, delay=1) == pytest.approx(2 * 4 / (4 + 1 + 4))
