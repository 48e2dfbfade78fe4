import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.base import Float64, Model, score
from models.checkpoint import Bundle
from models.deepant import FAMILY, DeepAnTConfig, Network
from models.errors import ConfigError
from models.family import Batch
from models.train import EpochReport, TrainConfig, TrainSeries, train
from models.windows import complete
from tests.contexts import context

NAN = math.nan


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small networks are slower on several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def wave(n: int = 1500, features: int = 1, seed: int = 0) -> Float64:
    """A daily wave with noise of a tenth of its deviation, (n, features)."""
    random = np.random.default_rng(seed)
    phase = np.arange(features)
    wave = np.sin(2 * np.pi * (np.arange(n)[:, None] + 7 * phase) / 48)
    return 100 + 20 * (wave + 0.07 * random.normal(size=(n, features)))


def series(values: Float64, anomalous: NDArray[np.bool_] | None = None, interval_ms: int = 60_000) -> TrainSeries:
    labels = np.zeros(len(values), dtype=np.bool_) if anomalous is None else anomalous
    return TrainSeries("wave.csv", values, labels, interval_ms)


def config(scaling: str = "train", features: int = 1, epochs: int = 6, seed: int = 0) -> TrainConfig:
    model = DeepAnTConfig(window=10, features=features, scaling=scaling)  # type: ignore[arg-type]
    return TrainConfig(FAMILY, model, epochs=epochs, batch=64, seed=seed)


def weights(bundle: Bundle) -> bytes:
    return b"".join(tensor.numpy().tobytes() for tensor in bundle.model.raw.values())


def expected(bundle: Bundle, history: Float64) -> Float64:
    return expected_of(bundle.model, history)


def expected_of(model: Model, history: Float64) -> Float64:
    return model.assess(context(history)).expected


def windows(values: Float64, history: int = 10) -> Float64:
    """The points before each point from the `history`-th on."""
    return np.lib.stride_tricks.sliding_window_view(values[:-1], history, axis=0).transpose(0, 2, 1)


@pytest.mark.parametrize("features", [1, 3])
@pytest.mark.parametrize("scaling", ["train", "window"])
def test_it_learns_more_than_the_last_value(scaling: str, features: int) -> None:
    values = wave(3000, features)
    bundle = train([series(values)], replace(config(scaling, features, epochs=5), trim=0.0))
    report = bundle.training
    assert report.persistence_loss is not None
    assert min(report.held_out_losses) < 0.85 * report.persistence_loss
    # The model that is handed over is that of the best epoch: its own scores say the same as the report.
    unseen = wave(1000, features, seed=9)
    error = np.abs(expected(bundle, windows(unseen)) - unseen[10:]).mean()
    assert error < 0.9 * np.abs(np.diff(unseen[9:], axis=0)).mean()
    if scaling == "train":
        best = report.held_out_losses[report.best_epoch - 1]
        assert best == min(report.held_out_losses)
        errors = np.abs(expected(bundle, windows(values[2390:])) - values[2400:]) / bundle.model.constants["scale"]
        assert errors.mean() == pytest.approx(best, rel=1e-4)
        steps = np.abs(np.diff(values[2399:], axis=0)) / bundle.model.constants["scale"]
        assert steps.mean() == pytest.approx(report.persistence_loss, rel=1e-4)


def test_the_same_seed_gives_the_same_weights() -> None:
    state = torch.get_rng_state()
    first, second, other = (train([series(wave(600))], config(epochs=2, seed=seed)) for seed in (7, 7, 8))
    assert weights(first) == weights(second) != weights(other)
    assert first.training == second.training
    np.testing.assert_array_equal(first.calibrations[0], second.calibrations[0])
    assert torch.equal(torch.get_rng_state(), state)  # the caller's random numbers are his own


def test_the_constants_come_from_the_training_part_only() -> None:
    values = wave(1000)
    values[800:] += 1e6  # held out: must not be seen by the scaling
    values[100] = NAN
    labels = np.zeros(1000, dtype=np.bool_)
    values[200:210], labels[200:210] = 1e9, True  # labelled: neither
    bundle = train([series(values, labels)], config(epochs=1))
    usable = np.delete(values[:800, 0], [100, *range(200, 210)])
    np.testing.assert_allclose(bundle.model.constants["center"], [usable.mean()], rtol=1e-12)
    np.testing.assert_allclose(bundle.model.constants["scale"], [usable.std()], rtol=1e-12)
    normal = values[:800].copy()
    normal[200:210] = NAN
    step = np.nanmean(np.abs(np.diff(normal, axis=0)))
    np.testing.assert_allclose(bundle.model.constants["usual_step"], [step], rtol=1e-12)


def test_window_scaling_has_no_constants_of_the_data() -> None:
    model = train([series(wave(600))], config("window", epochs=1)).model
    assert model.constants["center"] == 0 and model.constants["scale"] == 1 and "usual_step" not in model.constants


@pytest.mark.parametrize("scaling", ["train", "window"])
@pytest.mark.parametrize("constant", [0.0, 5.0, -1e12])
def test_a_flat_series_can_be_learned(constant: float, scaling: str) -> None:
    bundle = train([series(np.full((600, 1), constant))], config(scaling, epochs=2))
    values = np.array([[constant], [constant * 1.5 + 7]])
    points = context(np.full((2, 10, 1), constant), value=values)
    assessment = bundle.model.assess(points)
    assert np.isfinite(bundle.calibrations[0]).all()
    np.testing.assert_allclose(assessment.expected, constant, rtol=1e-4, atol=0.5)
    same, other = score(values, assessment)
    assert other > 10 * same


def test_unlabelled_spikes_do_not_spoil_the_model() -> None:
    clean, spiked = wave(2000), wave(2000)
    spiked[np.random.default_rng(1).integers(0, 1500, 15)] = 1e7
    test = wave(500, seed=5)

    def error(values: Float64) -> float:
        bundle = train([series(values)], config("window", epochs=6))
        return float(np.abs(expected(bundle, windows(test)) - test[10:]).mean())

    assert error(spiked) < 1.5 * error(clean)


@pytest.mark.parametrize("labels", [False, True])
def test_labels_or_else_the_largest_losses_leave_points_out(labels: bool) -> None:
    """Spikes that come on the hour could be forecast; labels, or their size, say that they should not be."""
    values = wave(3000)
    anomalous = np.zeros(3000, np.bool_)
    anomalous[::60] = True
    values[anomalous] += 400

    def at_a_spike(trim: float) -> float:
        setting = replace(config("window", epochs=8), trim=trim)
        bundle = train([series(values, anomalous if labels else None)], setting)
        return float(np.median(expected(bundle, windows(values))[50::60] - values[60::60]))

    assert at_a_spike(trim=0.01 if labels else 0.05) < -300


def test_calibration_is_the_served_score_of_the_held_out_points() -> None:
    values = wave(1000)
    labels = np.zeros(1000, dtype=np.bool_)
    labels[900:903] = True
    values[950] = NAN
    bundle = train([series(values, labels)], config(epochs=1))
    filled = complete(values, 2)
    # held out from 800; 900..902 labelled, 903..912 have them in their history; 950 was not observed
    targets = [t for t in range(800, 1000) if not (900 <= t <= 912 or t == 950)]
    history = np.stack([filled[t - 10 : t] for t in targets])
    learned = np.stack([~np.isnan(values[t - 10 : t]) for t in targets])
    own = score(values[targets], bundle.model.assess(context(history, learned=learned, value=values[targets])))
    np.testing.assert_array_equal(bundle.calibrations[0], own.astype(np.float32))
    assert bundle.training.held_out_windows == len(targets)


def test_pooled_calibration_has_no_unit() -> None:
    small, large = series(wave(800)), series(wave(800) * 1e6)
    (alone,) = train([small, small], config("window", epochs=2)).calibrations
    (mixed,) = train([small, large], config("window", epochs=2)).calibrations
    np.testing.assert_allclose(mixed, alone, rtol=1e-2, atol=1e-3)


def test_progress_and_record() -> None:
    reports: list[EpochReport] = []
    setting = replace(config(epochs=3, seed=3), command="tocsin train", created="2024-01-01T00:00:00Z")
    source = TrainSeries("a.csv", wave(700), np.zeros(700, dtype=np.bool_), 300_000, sha256="cd" * 32)
    bundle = train([source], setting, reports.append)
    assert [report.epoch for report in reports] == [1, 2, 3] and reports[0].best
    training = bundle.training
    assert training.held_out_losses == tuple(report.held_out_loss for report in reports)
    assert (training.epochs, training.seed, training.command) == (3, 3, "tocsin train")
    assert (training.sources[0].name, training.sources[0].rows, training.sources[0].sha256) == (
        "a.csv",
        700,
        "cd" * 32,
    )
    assert training.windows == 560 - 10 and bundle.interval_ms == 300_000


def test_it_stops_when_the_held_out_error_does_not_fall() -> None:
    noise = np.random.default_rng(0).normal(size=(800, 1))
    setting = replace(config(epochs=60), patience=2, learning_rate=0.01)
    training = train([series(noise)], setting).training
    assert training.epochs < 60
    assert training.best_epoch == training.epochs - 2
    assert min(training.held_out_losses) == training.held_out_losses[training.best_epoch - 1]


class Fragile(Network):
    """A network whose loss is not a number when training begins, as often as it is told."""

    failures = 0

    def loss(self, batch: Batch) -> Tensor:
        losses = super().loss(batch)
        if self.training and Fragile.failures:
            Fragile.failures -= 1
            return losses * NAN
        return losses


FRAGILE = replace(FAMILY, network=Fragile)


def test_a_training_that_diverged_is_taken_back_and_tried_again_at_a_lower_rate() -> None:
    reports: list[EpochReport] = []
    Fragile.failures = 2
    setting = replace(config(epochs=3), family=FRAGILE)
    training = train([series(wave(600))], setting, reports.append).training
    assert Fragile.failures == 0 and training.epochs == 3
    assert [(report.epoch, bool(report.note)) for report in reports] == [
        (1, True),
        (1, True),
        (1, False),
        (2, False),
        (3, False),
    ]
    assert "diverged in epoch 1" in reports[0].note and "learning rate now 0.0006" in reports[0].note
    assert training.notes.count("diverged in epoch 1") == 2 and "0.00018" in training.notes
    assert np.isfinite(training.train_losses).all()


def test_a_training_that_always_diverges_is_refused() -> None:
    Fragile.failures = 10**9
    try:
        with pytest.raises(ConfigError, match=r"diverged in its first epoch 5 times, .*loss nan.* given up"):
            train([series(wave(600))], replace(config(), family=FRAGILE))
    finally:
        Fragile.failures = 0


def test_a_rate_that_is_far_too_high_ends_in_a_model_all_the_same() -> None:
    values = wave(1000)
    bundle = train([series(values)], replace(config(epochs=4), learning_rate=30.0, decay=1.0))
    assert "diverged" in bundle.training.notes
    assert all(bool(torch.isfinite(tensor).all()) for tensor in bundle.model.raw.values())
    assert np.isfinite(bundle.calibrations[0]).all()


def test_series_of_several_intervals_are_for_window_scaling_only() -> None:
    mixed = [series(wave(600)), series(wave(600), interval_ms=300_000)]
    with pytest.raises(ConfigError, match=r"intervals_ms=\[60000, 300000\] differ"):
        train(mixed, config("train"))
    assert train(mixed, config("window", epochs=1)).interval_ms is None


@pytest.mark.parametrize("n", [0, 5, 11, 100])
def test_too_little_data_is_refused_with_the_minimum(n: int) -> None:
    with pytest.raises(ConfigError, match=rf"^{n} points give .* about 138 points of one series"):
        train([series(wave(n))], config())
    assert train([series(wave(138))], config(epochs=1)).training.windows == 100


def test_no_series_and_other_features_are_refused() -> None:
    with pytest.raises(ConfigError, match="no series"):
        train([], config())
    with pytest.raises(ConfigError, match=r"'wave.csv' has 2 features and the config 1"):
        train([series(wave(600, 2))], config())


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"batch": 0},
        {"patience": 0},
        {"learning_rate": 0.0},
        {"learning_rate": NAN},
        {"decay": -1.0},
        {"clip_norm": math.inf},
        {"held_out": 0.0},
        {"held_out": 1.0},
        {"longest_gap": -1},
        {"windows_per_epoch": 10},
        {"trim": 0.5},
        {"seed": -1},
    ],
)
def test_other_settings_are_refused_by_name(wrong: dict[str, float]) -> None:
    ((name, _),) = wrong.items()
    with pytest.raises(ConfigError, match=f"^{name}="):
        TrainConfig.of(FAMILY, DeepAnTConfig(), **wrong)


def test_a_family_has_its_own_defaults_and_configs() -> None:
    gentle = replace(FAMILY, training={"learning_rate": 1e-4, "epochs": 99})
    setting = TrainConfig.of(gentle, epochs=7)
    assert (setting.learning_rate, setting.epochs, setting.model) == (1e-4, 7, DeepAnTConfig())
    with pytest.raises(ConfigError, match="no config of deepant"):
        TrainConfig(FAMILY, Other())


@dataclass
class Other:
    window: int = 10
    features: int = 1
    scaling: str = "train"


@pytest.mark.parametrize(
    ("values", "anomalous", "interval_ms", "message"),
    [
        (np.zeros(5), np.zeros(5, dtype=np.bool_), 1, r"\(N, F\) is needed"),
        (np.zeros((5, 0)), np.zeros(5, dtype=np.bool_), 1, r"\(N, F\) is needed"),
        (np.zeros((5, 1)), np.zeros(4, dtype=np.bool_), 1, r"\(5,\) bool is needed"),
        (np.zeros((5, 1)), np.zeros(5), 1, "float64, and"),
        (np.full((5, 1), np.inf), np.zeros(5, dtype=np.bool_), 1, "infinite"),
        (np.zeros((5, 1)), np.zeros(5, dtype=np.bool_), 0, "interval_ms=0"),
    ],
)
def test_other_columns_are_refused(
    values: Float64, anomalous: NDArray[np.bool_], interval_ms: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainSeries("a", values, anomalous, interval_ms)
    with pytest.raises(ConfigError, match=r"wanted is \(2,\) bool"):
        TrainSeries("a", np.zeros((5, 1)), np.zeros(5, np.bool_), 1, wanted=np.ones(2, np.bool_))


# -- several features -------------------------------------------------------------------------------------------------

METRICS = ("a", "b", "c", "d")


def entity(values: Float64, metrics: tuple[str, ...] = METRICS) -> TrainSeries:
    return TrainSeries("server", values, np.zeros(len(values), dtype=np.bool_), 60_000, metrics=metrics)


def test_the_metrics_go_with_the_model_and_must_be_the_same() -> None:
    values = wave(700, 4)
    assert train([entity(values)], config(features=4, epochs=1)).metrics == METRICS
    assert train([series(values[:, :1])], config(epochs=1)).metrics == ()
    with pytest.raises(ConfigError, match=r"'server' has the metrics b, a, c, d and 'server' a, b, c, d; .* one order"):
        train([entity(values), entity(values, ("b", "a", "c", "d"))], config(features=4))


@pytest.mark.parametrize("level", [0.0, 5.0, -1e9])
@pytest.mark.parametrize("scaling", ["train", "window"])
def test_a_feature_that_never_moved_does_not_spoil_the_others_when_it_does(scaling: str, level: float) -> None:
    values = wave(1500, 3)
    still = np.column_stack([values, np.full(1500, level)])
    model = train([entity(still)], config(scaling, features=4, epochs=2)).model
    assert model.still.tolist() == [False, False, False, True]
    history = still[None, 900:910].copy()
    before = model.assess(context(history))
    history[:, 5:, 3] += 1e6
    after = model.assess(context(history))
    np.testing.assert_array_equal(after.expected[:, :3], before.expected[:, :3])
    np.testing.assert_array_equal(after.spread[:, :3], before.spread[:, :3])
    assert after.expected[0, 3] == level + 1e6, "its forecast follows it to another level"
    assert before.expected[0, 3] == level


def test_a_feature_that_never_moved_is_measured_by_its_level_or_by_the_others() -> None:
    values = wave(1000, 3)
    still = np.column_stack([values[:, :2], np.full(1000, 50.0), np.zeros(1000)])
    known = train([entity(still)], config(features=4, epochs=1)).model.constants
    assert known["scale"][2] == pytest.approx(5.0)
    assert known["scale"][3] == pytest.approx(np.median(known["scale"][:2]))
    assert (known["usual_step"] >= 0.5 * known["scale"]).all()
    alone = train([entity(np.zeros((700, 4)))], config(features=4, epochs=1)).model
    assert alone.constants["scale"].tolist() == [1.0] * 4


def test_a_feature_that_hardly_ever_moves_does_not_drown_the_others() -> None:
    values = wave(3000, 4)
    values[:, 3] = 0.0
    values[1000, 3] = 1.0
    model = train([entity(values)], config(features=4, epochs=1)).model
    history = values[None, 1990:2000]
    again = expected_of(model, history)
    again[0, 3] = 1.0
    found = model.assess(context(history, value=again))
    assert score(again, found)[0] < 200, "by its mean step of 0.0008 it would be 1,200"


def test_what_is_missing_of_some_features_costs_no_window() -> None:
    random = np.random.default_rng(2)
    values = wave(2000, 4)
    values[random.random((2000, 4)) < 0.3] = NAN
    report = train([entity(values)], config(features=4, epochs=3)).training
    assert report.windows > 1500, "a record of four is whole in a quarter of the cases"
    assert report.persistence_loss is not None and min(report.held_out_losses) < report.persistence_loss


def test_a_value_that_is_missing_is_not_scored() -> None:
    values = wave(1000, 4)
    values[900, 1:] = NAN
    bundle = train([entity(values)], config(features=4, epochs=1))
    history, value = complete(values, 10)[None, 890:900], values[900:901]
    own = score(value, bundle.model.assess(context(history, value=value)))
    assert bundle.calibrations[0][100] == own.astype(np.float32)[0]


def test_the_units_of_the_features_do_not_matter() -> None:
    values, units = wave(1200, 4), np.array([1e9, 1.0, 1e-6, 40.0])
    plain = train([entity(values)], config(features=4, epochs=2))
    other = train([entity(values * units)], config(features=4, epochs=2))
    np.testing.assert_allclose(other.calibrations[0], plain.calibrations[0], rtol=2e-2, atol=1e-3)


def test_a_feature_without_a_value_is_named() -> None:
    values = wave(700, 4)
    values[:600, 1] = NAN
    with pytest.raises(ConfigError, match=r"no value to train on, in the first 80% of the time: b$"):
        train([entity(values)], config(features=4))
