"""The loop: against torch's own optimiser, many networks at once against each alone, and taken up again."""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models import family
from models.base import Assessment, Context, Float64, residual
from models.checkpoint import Bundle
from models.corpus import gather
from models.deepant import FAMILY as DEEPANT
from models.deepant import DeepAnTConfig
from models.errors import CheckpointError, ConfigError
from models.family import Batch, Family
from models.fit import Fit, robust_mean
from models.resume import Store
from models.scaling import INPUT_LIMIT, standardise
from models.serving import ServedModel
from models.train import EpochReport, TrainConfig, TrainSeries, train

NAN = math.nan


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small networks are slower on several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# -- the smallest family: a line through the window -----------------------------------------------------------------


@dataclass(frozen=True)
class LineConfig:
    window: int = 6
    features: int = 1
    scaling: str = "train"
    noise: float = 0.0  # on the input, in training
    breaks_at: float = math.inf  # an input of this size makes the loss no number

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"line.weight": (1, self.window), "line.bias": (1,)}


class LineNetwork(family.Network):
    def __init__(self, config: LineConfig) -> None:
        super().__init__()
        self.config = config
        self.line = nn.Linear(config.window, 1)

    def loss(self, batch: Batch) -> Tensor:
        x = batch.x[:, :-1, 0]
        if self.training and self.config.noise:
            x = x + self.config.noise * torch.randn_like(x)
        error = (self.line(x)[:, 0] - batch.x[:, -1, 0]).square()
        return torch.where(batch.x.abs().amax(dim=(1, 2)) >= self.config.breaks_at, NAN, error)

    def measure(self, batch: Batch) -> dict[str, Float64]:
        return {"level": self.loss(batch).mean().double().numpy()}


class Line(ServedModel[LineConfig]):
    family: ClassVar[str] = "line"
    reads_point: ClassVar[bool] = False
    history = property(lambda self: self.config.window)

    def assess(self, context: Context) -> Assessment:
        center, scale = self.constant("center", context), self.constant("scale", context)
        x = standardise(context.history, center[:, None], scale[:, None])[..., 0]
        (y,) = self.run(lambda w, x: (x @ w["line.weight"].mT + w["line.bias"],), self.raw, [x], context)
        expected = center + scale * y
        return Assessment(expected, scale, residual(context.value, expected, scale), expected)


LINE = Family("line", "Line", "draws a line", LineConfig, lambda config: config.shapes, LineNetwork, Line)


def series(name: str, n: int = 700, seed: int = 0, scale: float = 1.0) -> TrainSeries:
    random = np.random.default_rng(seed)
    values = scale * (np.sin(np.arange(n) / (4 + seed)) + 0.1 * random.normal(size=n) + 5)
    return TrainSeries(name, values[:, None], np.zeros(n, np.bool_), 60_000)


def config(model: LineConfig | None = None, **settings: Any) -> TrainConfig:
    plain = {"epochs": 4, "batch": 32, "learning_rate": 1e-2}
    return TrainConfig(LINE, model or LineConfig(), **{**plain, **settings})


def weights(bundle: Bundle) -> str:
    return hashlib.sha256(b"".join(one.numpy().tobytes() for one in bundle.model.raw.values())).hexdigest()


# -- one network ----------------------------------------------------------------------------------------------------


def test_it_steps_as_torch_s_own_optimiser_does() -> None:
    setting = config(epochs=3, trim=0.0, clip_norm=0.05, patience=9)
    bundle = train([series("a")], setting)
    corpus = gather([[series("a")]], setting.layout)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = LineNetwork(LineConfig())
    optimiser = torch.optim.Adam(network.parameters(), lr=setting.learning_rate)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimiser, setting.decay)
    found = []
    for epoch in range(3):
        order = np.random.default_rng([0, epoch, 0]).permutation(corpus.train[0])
        for begin in range(0, len(order), 32):
            optimiser.zero_grad()
            torch.autograd.backward(network.loss(corpus.batch(order[begin : begin + 32])).mean())
            nn.utils.clip_grad_norm_(network.parameters(), setting.clip_norm)
            optimiser.step()
        schedule.step()
        with torch.no_grad():
            found.append(float(network.loss(corpus.batch(corpus.held_out[0])).mean()))
    np.testing.assert_allclose(bundle.training.held_out_losses, found, rtol=1e-5)
    for name, parameter in network.named_parameters():
        np.testing.assert_allclose(bundle.model.raw[name], parameter.detach(), rtol=1e-4, atol=1e-6)


def test_the_mean_without_the_largest_against_a_loop() -> None:
    random = np.random.default_rng(0)
    losses = random.exponential(size=(5, 40)).astype(np.float32)
    valid = random.random((5, 40)) < 0.7
    valid[3] = False
    valid[3, 7] = True
    trim = np.array([0.0, 0.1, 0.3, 0.4, 0.01])
    expected = []
    for row, there, share in zip(losses, valid, trim, strict=True):
        own = np.sort(row[there])
        expected.append(own[: max(len(own) - math.ceil(share * len(own)), 1)].mean())
    found = robust_mean(torch.from_numpy(losses), torch.from_numpy(valid), trim)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_constants_that_a_network_measures_come_with_the_best_weights() -> None:
    bundle = train([series("a")], config())
    corpus = gather([[series("a")]], config().layout)
    network = LineNetwork(LineConfig())
    network.load_state_dict(bundle.model.raw)
    with torch.no_grad():
        windows = np.concatenate([corpus.train[0], corpus.held_out[0]])  # what was held out, too
        level = network.loss(corpus.batch(windows)).mean()
    assert bundle.model.constants["level"] == pytest.approx(float(level), rel=1e-5)


def test_noise_comes_from_the_seed_alone() -> None:
    noisy = LineConfig(noise=0.3)
    torch.manual_seed(1)
    one = train([series("a")], config(noisy))
    torch.manual_seed(2)
    assert weights(one) == weights(train([series("a")], config(noisy)))
    assert weights(one) != weights(train([series("a")], config(noisy, seed=1)))


# -- many networks --------------------------------------------------------------------------------------------------

MANY = [series("a"), series("b", 1100, 1, 1e6), series("c", 500, 2, 1e-3), series("d", 700, 3)]


def alone(one: TrainSeries, setting: TrainConfig) -> Bundle:
    return train([one], replace(setting, per_kpi=False))


def same(stack: Bundle, names: tuple[str, ...], setting: TrainConfig) -> list[Bundle]:
    """Hold a stack against its members, each trained alone."""
    every = []
    assert stack.members == names and stack.model.members == len(names) == len(stack.calibrations)
    for k, name in enumerate(names):
        one = alone(next(one for one in MANY if one.name == name), setting)
        for tensor, own in one.model.raw.items():
            np.testing.assert_allclose(stack.model.raw[tensor][k], own, rtol=1e-3, atol=1e-4)
        for constant, value in one.model.constants.items():
            np.testing.assert_allclose(stack.model.constants[constant][k], value, rtol=1e-3)
        np.testing.assert_allclose(stack.calibrations[k], one.calibrations[0], rtol=1e-2, atol=1e-3)
        every.append(one)
    return every


def test_many_that_are_trained_together_are_those_that_are_trained_alone() -> None:
    """Of other lengths, so of other numbers of steps an epoch; they stop early, each at its own time."""
    setting = config(epochs=14, patience=2, per_kpi=True)
    reports: list[EpochReport] = []
    stack = train(MANY, setting, reports.append)
    every = [one.training for one in same(stack, ("a", "b", "c", "d"), setting)]
    done = [report.done for report in reports]
    assert done == [sum(one.epochs <= n for one in every) for n in range(1, len(done) + 1)] and len(set(done)) > 2
    assert stack.training.windows == sum(one.windows for one in every)
    best = [min(one.held_out_losses) for one in every]
    assert stack.training.held_out_losses[-1] == pytest.approx(np.mean(best), rel=1e-3)


def test_members_that_wait_for_their_turn_are_trained_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.fit.TOGETHER", 2)
    setting = config(epochs=3, per_kpi=True)
    reports: list[EpochReport] = []
    same(train(MANY, setting, reports.append), ("a", "b", "c", "d"), setting)
    assert [report.done for report in reports] == [0, 0, 2, 2, 2, 4]


def test_one_that_diverges_costs_the_others_nothing() -> None:
    """The first has a value that breaks it whatever the rate; what one of the others gets in its place is its own."""
    broken = series("broken")
    broken.values[100] = 1e6
    setting = config(LineConfig(breaks_at=INPUT_LIMIT), per_kpi=True)
    stack = train([broken, *MANY], setting)
    same(stack, ("a", "b", "c", "d"), setting)
    assert stack.training.notes.count("broken: diverged in epoch 1") == 5
    assert "broken left out: its training diverged at any rate" in stack.training.notes
    with pytest.raises(ConfigError, match="diverged in its first epoch"):
        train([broken], setting)


def test_a_series_that_is_too_short_is_left_out() -> None:
    setting = config(per_kpi=True)
    stack = train([MANY[0], series("short", 90), MANY[2]], setting)
    same(stack, ("a", "c"), setting)
    assert "short left out: 90 points give" in stack.training.notes
    with pytest.raises(ConfigError, match="short left out: 90 points give"):
        train([series("short", 90)], setting)


def test_each_member_has_noise_of_its_own() -> None:
    twins = [replace(MANY[0], name="a"), replace(MANY[0], name="b")]
    quiet = train(twins, config(per_kpi=True)).model.raw["line.weight"]
    np.testing.assert_allclose(quiet[0], quiet[1], rtol=1e-5)
    noisy = train(twins, config(LineConfig(noise=0.5), per_kpi=True)).model.raw["line.weight"]
    assert float((noisy[0] - noisy[1]).abs().max()) > 1e-3


def test_a_real_family_can_be_stacked() -> None:
    setting = TrainConfig(DEEPANT, DeepAnTConfig(window=10), epochs=2, per_kpi=True)
    stack = train(MANY, setting)
    for k, one in enumerate(MANY):
        own = alone(one, setting)
        np.testing.assert_allclose(np.median(stack.calibrations[k]), np.median(own.calibrations[0]), rtol=0.1)


def test_what_cannot_be_stacked_is_refused() -> None:
    with pytest.raises(ConfigError, match="family 'line' cannot be trained per KPI"):
        replace(config(per_kpi=True), family=replace(LINE, stackable=False))
    with pytest.raises(ConfigError, match="'a' is there twice"):
        train([MANY[0], MANY[0]], config(per_kpi=True))


# -- taken up again -------------------------------------------------------------------------------------------------


class Interrupt(Exception):
    pass


def interrupted(setting: TrainConfig, store: Store, after: int, some: list[TrainSeries] = MANY) -> None:
    passes = 0

    def progress(report: EpochReport) -> None:
        nonlocal passes
        passes += 1
        if passes == after:
            raise Interrupt

    with pytest.raises(Interrupt):
        train(some, setting, progress, store)


@pytest.mark.parametrize("after", [1, 3])
@pytest.mark.parametrize("per_kpi", [False, True])
def test_a_training_that_was_interrupted_ends_as_one_that_was_not(tmp_path: Path, per_kpi: bool, after: int) -> None:
    some = MANY if per_kpi else MANY[:1]
    setting = config(LineConfig(noise=0.3), epochs=6, patience=2, per_kpi=per_kpi)
    whole = train(some, setting)
    store = Store(tmp_path / "state")
    interrupted(setting, store, after, some)
    assert store.exists and len(list(store.directory.iterdir())) == 2
    reports: list[EpochReport] = []
    resumed = train(some, setting, reports.append, store, resume=True)
    assert reports[0].epoch == after + 1
    assert weights(resumed) == weights(whole)
    assert resumed.training == whole.training
    for own, other in zip(resumed.calibrations, whole.calibrations, strict=True):
        np.testing.assert_array_equal(own, other)
    reports.clear()
    assert weights(train(some, setting, reports.append, store, resume=True)) == weights(whole) and not reports
    store.remove()
    assert not store.directory.exists()


def test_a_training_with_a_break_in_its_troubles_ends_the_same(tmp_path: Path) -> None:
    broken = series("broken")
    broken.values[100] = 1e6
    setting = config(LineConfig(breaks_at=INPUT_LIMIT, noise=0.1), per_kpi=True)
    whole, store = train([broken, *MANY], setting), Store(tmp_path)
    interrupted(setting, store, 2, [broken, *MANY])
    resumed = train([broken, *MANY], setting, None, store, resume=True)
    assert weights(resumed) == weights(whole) and resumed.training == whole.training


def test_it_goes_on_with_the_same_training_only(tmp_path: Path) -> None:
    setting, store = config(epochs=6), Store(tmp_path / "state")
    interrupted(setting, store, 2, MANY[:1])
    for other, words in (
        (replace(setting, learning_rate=0.5), "learning_rate was 0.01 and is 0.5"),
        (replace(setting, model=LineConfig(window=8)), "window was 6 and is 8"),
        (replace(setting, seed=1), "seed was 0 and is 1"),
    ):
        with pytest.raises(ConfigError, match=words):
            train(MANY[:1], other, None, store, resume=True)
    with pytest.raises(ConfigError, match=r"series was 1 and is 2; order was .* series b was absent"):
        train(MANY[:2], setting, None, store, resume=True)
    changed = series("a")
    changed.values[3] += 1
    with pytest.raises(ConfigError, match=r"series a was [0-9a-f]{16} and is"):
        train([changed], setting, None, store, resume=True)
    assert store.exists
    train(MANY[:1], replace(setting, command="another"), None, store, resume=True)


def test_a_damaged_state_is_refused(tmp_path: Path) -> None:
    setting, store = config(epochs=6), Store(tmp_path / "state")
    interrupted(setting, store, 2, MANY[:1])
    (tensors,) = store.directory.glob("*.safetensors")
    content = tensors.read_bytes()
    for damage in (content[:-4], b"", content[:-1] + bytes([content[-1] ^ 1])):
        tensors.write_bytes(damage)
        with pytest.raises(CheckpointError, match="changed or damaged; train again without --resume"):
            train(MANY[:1], setting, None, store, resume=True)
    tensors.unlink()
    with pytest.raises(CheckpointError, match="no state of a training"):
        train(MANY[:1], setting, None, store, resume=True)
    state = store.directory / "state.json"
    for text in ("{}", "", "[]", '{"format": 9}'):
        state.write_text(text)
        with pytest.raises(CheckpointError, match="without --resume"):
            train(MANY[:1], setting, None, store, resume=True)
    assert train(MANY[:1], setting, None, store).training.epochs, "without it, it begins anew"


def test_without_a_state_it_begins_anew(tmp_path: Path) -> None:
    store = Store(tmp_path / "state")
    assert weights(train(MANY[:1], config(), None, store, resume=True)) == weights(train(MANY[:1], config()))


def test_the_fit_starts_every_member_from_the_same_weights() -> None:
    setting = config(per_kpi=True)
    corpus = gather([[one] for one in MANY], setting.layout)
    fit = Fit(LineNetwork(LineConfig()), corpus, setting.recipe, tuple(one.name for one in MANY))
    state = fit.start()
    assert bool((state.weights == state.weights[0]).all()) and np.isfinite(state.reference).all()
