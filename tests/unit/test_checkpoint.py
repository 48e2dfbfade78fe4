import dataclasses
import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.checkpoint import CALIBRATION, CARD, CONFIG, WEIGHTS, Bundle, Checkpoint, Source, Training
from models.deepant import DeepAnT, DeepAnTConfig, Network
from models.errors import CheckpointError
from models.repository import load, names, save
from tests.contexts import context


def network(config: DeepAnTConfig, seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return dict(Network(config).state_dict())


def bundle(seed: int = 0, window: int = 10, features: int = 1, scaling: str = "train") -> Bundle:
    config = DeepAnTConfig(window=window, features=features, scaling=scaling)  # type: ignore[arg-type]
    constants = (
        {"center": np.full(features, 0.1), "scale": np.full(features, 1 / 3), "usual_step": np.full(features, 0.7)}
        if scaling == "train"
        else {}
    )
    training = Training(
        sources=(Source("a.csv", 100, "ab" * 32),),
        seed=seed,
        epochs=2,
        best_epoch=1,
        train_losses=(0.5, 0.4),
        held_out_losses=(0.1, 0.2),
    )
    scores = np.random.default_rng(seed).exponential(size=50).astype(np.float32)
    return Bundle(DeepAnT(config, network(config, seed), constants), (scores,), 60_000, training)


def history(window: int, features: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    return np.random.default_rng(9).normal(size=(20, window, features))


@pytest.mark.parametrize("scaling", ["train", "window"])
@pytest.mark.parametrize("features", [1, 3])
def test_what_is_saved_is_loaded_to_the_last_bit(tmp_path: Path, features: int, scaling: str) -> None:
    saved = bundle(window=14, features=features, scaling=scaling)
    path = save(tmp_path, "checkout.latency", saved)
    assert path == tmp_path / "checkout.latency" / "1"
    assert sorted(file.name for file in path.iterdir()) == sorted([CONFIG, WEIGHTS, CALIBRATION, CARD])
    loaded = load(tmp_path, "checkout.latency")
    assert (loaded.name, loaded.version, loaded.ref, loaded.path) == (
        "checkout.latency",
        1,
        "checkout.latency@1",
        path,
    )
    assert loaded.calibrated is (scaling == "train")
    assert (loaded.interval_ms, loaded.training) == (60_000, saved.training)
    assert loaded.model.config == saved.model.config
    assert loaded.model.constants.keys() == saved.model.constants.keys()
    for name, constant in saved.model.constants.items():
        np.testing.assert_array_equal(loaded.model.constants[name], constant)
    np.testing.assert_array_equal(loaded.calibrations, saved.calibrations)
    assert loaded.calibrations[0].dtype == np.float32
    x = context(history(14, features))
    np.testing.assert_array_equal(loaded.model.assess(x).expected, saved.model.assess(x).expected)
    np.testing.assert_array_equal(loaded.model.assess(x).spread, saved.model.assess(x).spread)


def test_the_card_and_config_are_for_people_too(tmp_path: Path) -> None:
    path = save(tmp_path, "m", bundle())
    card = (path / CARD).read_text()
    assert "4,593 parameters" in card and "a.csv" in card and "ab" * 32 in card and "epoch 1 kept" in card
    config = json.loads((path / CONFIG).read_text())
    assert config["model"]["window"] == 10 and config["family"] == "deepant"
    assert config["sha256"][WEIGHTS] == hashlib.sha256((path / WEIGHTS).read_bytes()).hexdigest()


def rewrite(path: Path, change: Callable[[dict[str, object]], None]) -> None:
    """Change config.json, and make its digests true again."""
    config = json.loads((path / CONFIG).read_text())
    config["sha256"] = {
        file: hashlib.sha256((path / file).read_bytes()).hexdigest() for file in (WEIGHTS, CALIBRATION, CARD)
    }
    change(config)
    (path / CONFIG).write_text(json.dumps(config))


@pytest.mark.parametrize("file", [WEIGHTS, CALIBRATION, CARD])
def test_a_changed_byte_is_noticed(tmp_path: Path, file: str) -> None:
    path = save(tmp_path, "m", bundle()) / file
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{file}: its SHA-256 is"):
        load(tmp_path, "m")


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS, CALIBRATION, CARD])
def test_a_missing_file_is_named(tmp_path: Path, file: str) -> None:
    (save(tmp_path, "m", bundle()) / file).unlink()
    with pytest.raises(CheckpointError, match=f"{file}: cannot be read"):
        load(tmp_path, "m")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format", 1, "format 1, and this program reads format 2"),
        ("format", "2", "Expected `int`"),
        ("family", "lstm", "family 'lstm' is not known; known: deepant"),
        ("surprise", 1, "unknown field `surprise`"),
        ("model", {"window": 10.5}, "model: Expected `int`"),
        ("members", ["a"], "conv1.weight is .* the config asks for"),
        ("interval_ms", 0, "interval_ms=0"),
        ("sha256", {}, "config.json says None"),
    ],
)
def test_another_config_is_refused(tmp_path: Path, key: str, value: object, message: str) -> None:
    path = save(tmp_path, "m", bundle())
    rewrite(path, lambda config: config.update({key: value}))
    with pytest.raises(CheckpointError, match=message) as caught:
        load(tmp_path, "m")
    assert str(caught.value).startswith(str(path / CONFIG)) or key in ("sha256", "members")


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[]", b"{}", b'{"format": 1}', b'{"format": 1, "family"'])
def test_a_config_that_is_none_is_refused(tmp_path: Path, content: bytes) -> None:
    path = save(tmp_path, "m", bundle())
    (path / CONFIG).write_bytes(content)
    with pytest.raises(CheckpointError, match=CONFIG):
        load(tmp_path, "m")


@pytest.mark.parametrize("wrong", [{"window": 45}, {"window": 14}, {"features": 2}, {"filters": 16}, {"hidden": 41}])
def test_a_shape_that_the_weights_do_not_have_is_refused(tmp_path: Path, wrong: dict[str, int]) -> None:
    path = save(tmp_path, "m", bundle())
    rewrite(path, lambda config: config["model"].update(wrong))  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match=r"window=45 is not|and the config asks for"):
        load(tmp_path, "m")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("out.bias"), r"tensors missing: \['out.bias'\], unknown: \[\]"),
        (lambda w: w.update(extra=torch.zeros(1)), r"unknown: \['extra'\]"),
        (lambda w: w.update({"out.bias": torch.zeros(2)}), r"out.bias is \(2,\) and the config asks for \(1,\)"),
        (lambda w: w.update({"out.bias": w["out.bias"].double()}), "out.bias is torch.float64 and must be"),
        (lambda w: w["dense.bias"].__setitem__(3, float("nan")), "dense.bias holds numbers that are not finite"),
        (lambda w: w["conv1.weight"].__setitem__(3, float("inf")), "conv1.weight holds numbers that are not finite"),
        (lambda w: w.update({"constants.center": torch.zeros(2).double()}), r"center is \(2,\), and 1 numbers"),
        (lambda w: w.update({"constants.center": torch.zeros(1)}), r"constants.center is torch.float32 and must be"),
        (lambda w: w["constants.center"].fill_(float("nan")), r"center=\[nan\] must be finite"),
        (lambda w: w["constants.scale"].fill_(0), r"scale=\[0.0\] must be above 0"),
        (lambda w: w["constants.usual_step"].fill_(-1), r"usual_step=\[-1.0\] must be at least 0"),
    ],
)
def test_other_tensors_are_refused(tmp_path: Path, change: Callable[[dict[str, Tensor]], None], message: str) -> None:
    path = save(tmp_path, "m", bundle())
    weights = load_file(path / WEIGHTS)
    change(weights)
    save_file(weights, path / WEIGHTS)
    rewrite(path, lambda config: None)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path, "m")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234567",
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2**21) + b" " * 2**21,
        struct.pack("<Q", 100) + b"{}",
        struct.pack("<Q", 2) + b"{}" + b"rest",
        struct.pack("<Q", 4) + b"null",
        struct.pack("<Q", 66) + b'{"x":{"dtype":"F32","shape":[4294967296],"data_offsets":[0,4]}}   ' + bytes(4),
    ],
    ids=["empty", "short", "huge", "large", "longer than the file", "rest", "null", "shape"],
)
def test_absurd_safetensors_are_refused(tmp_path: Path, content: bytes) -> None:
    path = save(tmp_path, "m", bundle())
    (path / WEIGHTS).write_bytes(content)
    rewrite(path, lambda config: None)
    with pytest.raises(CheckpointError, match=r"not a safetensors file"):
        load(tmp_path, "m")


@pytest.mark.parametrize(
    "tensors",
    [
        {"other": torch.zeros(3)},
        {"scores": torch.zeros(3, 1)},
        {"scores": torch.zeros(3).double()},
        {"scores": torch.tensor([1.0, float("nan")])},
        {"scores": torch.tensor([-1.0])},
        {"scores": torch.zeros(3), "more": torch.zeros(1)},
    ],
)
def test_other_calibrations_are_refused(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    path = save(tmp_path, "m", bundle())
    save_file(tensors, path / CALIBRATION)
    rewrite(path, lambda config: None)
    with pytest.raises(CheckpointError, match=CALIBRATION):
        load(tmp_path, "m")


def test_an_empty_calibration_is_not_calibrated(tmp_path: Path) -> None:
    full = bundle()
    save(tmp_path, "m", Bundle(full.model, (np.empty(0, dtype=np.float32),), None))
    loaded = load(tmp_path, "m")
    assert loaded.calibrations[0].shape == (0,) and not loaded.calibrated and loaded.interval_ms is None


def test_what_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    whole = bundle()
    with pytest.raises(CheckpointError, match="calibration"):
        save(tmp_path, "m", Bundle(whole.model, (np.array([np.inf], dtype=np.float32),), None))
    whole.model.raw["out.bias"].fill_(float("nan"))
    with pytest.raises(CheckpointError, match=r"m: out.bias holds numbers that are not finite"):
        save(tmp_path, "m", whole)
    assert names(tmp_path) == []


# -- names of the features ---------------------------------------------------------------------------------------------


def named(metrics: tuple[str, ...], features: int = 3, scaling: str = "train") -> Bundle:
    return dataclasses.replace(bundle(features=features, scaling=scaling), metrics=metrics)


def test_the_metrics_are_stored_in_the_order_of_the_features(tmp_path: Path) -> None:
    path = save(tmp_path, "servers", named(("cpu", "arbeitsspeicher größe", "net.in")))
    assert load(tmp_path, "servers").metrics == ("cpu", "arbeitsspeicher größe", "net.in")
    assert json.loads((path / CONFIG).read_text())["metrics"] == ["cpu", "arbeitsspeicher größe", "net.in"]
    card = (path / CARD).read_text()
    assert "- features: 3: cpu, arbeitsspeicher größe, net.in" in card and "the entity it was trained on" in card


def test_a_kpi_has_none_and_its_files_are_as_ever(tmp_path: Path) -> None:
    path = save(tmp_path, "kpi", bundle())
    assert "metrics" not in json.loads((path / CONFIG).read_text())
    assert load(tmp_path, "kpi").metrics == ()


def test_scores_of_several_entities_are_nobody_s_own(tmp_path: Path) -> None:
    one = named(("a", "b", "c"))
    assert load_back(tmp_path, one).calibrated
    sources = (Source("a", 100), Source("b", 100))
    several = dataclasses.replace(one, training=msgspec.structs.replace(one.training, sources=sources))
    assert not load_back(tmp_path, several).calibrated
    assert not load_back(tmp_path, named(("a", "b", "c"), scaling="window")).calibrated


def load_back(root: Path, saved: Bundle) -> Checkpoint:
    save(root, "m", saved)
    return load(root, "m")


@pytest.mark.parametrize(
    ("metrics", "problem"),
    [
        (("a", "b"), "2 metrics for 3 features"),
        (("a", "b", "a"), "metric 'a' is there twice"),
        (("a", "", "b"), "'' cannot be the name of a metric"),
        (("a", " ", "b"), "' ' cannot be the name of a metric"),
        (("a", "b\n", "c"), "cannot be the name of a metric"),
    ],
)
def test_metrics_that_cannot_be_are_refused_at_both_ends(
    tmp_path: Path, metrics: tuple[str, ...], problem: str
) -> None:
    with pytest.raises(CheckpointError, match=f"m: .*{problem}"):
        save(tmp_path, "m", named(metrics))
    path = save(tmp_path, "m", named(("a", "b", "c")))
    config = json.loads((path / CONFIG).read_text())
    config["metrics"] = list(metrics)
    (path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=rf"config.json: .*{problem}.*restore it or train again"):
        load(tmp_path, "m")


def test_a_kpi_s_model_has_no_metrics(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"metrics \['a'\] of a model of one feature"):
        save(tmp_path, "m", named(("a",), features=1))


# -- stacks ------------------------------------------------------------------------------------------------------------


def stack(names: tuple[str, ...] = ("checkout.p99", "Größe / m³")) -> Bundle:
    ones = [bundle(seed) for seed in range(2)]
    weights = {name: torch.stack([one.model.raw[name] for one in ones]) for name in ones[0].model.raw}
    constants = {name: np.stack([one.model.constants[name] for one in ones]) for name in ones[0].model.constants}
    model = DeepAnT(ones[0].model.config, weights, constants, stacked=True)
    scores = (ones[0].calibrations[0], ones[1].calibrations[0][:30])
    return dataclasses.replace(ones[0], model=model, calibrations=scores, members=names)


def test_a_stack_is_loaded_to_the_last_bit(tmp_path: Path) -> None:
    saved = stack()
    loaded = load_back(tmp_path, saved)
    assert loaded.members == ("checkout.p99", "Größe / m³") and loaded.calibrated and loaded.model.members == 2
    assert [len(scores) for scores in loaded.calibrations] == [50, 30]
    np.testing.assert_array_equal(loaded.calibrations[1], saved.calibrations[1])
    x = context(history(10, 1), member=np.arange(20) % 2)
    np.testing.assert_array_equal(loaded.model.assess(x).expected, saved.model.assess(x).expected)
    assert "4,593 parameters, for 2 KPIs, each by weights of its own" in (loaded.path / CARD).read_text()


def test_members_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="member 'a' is there twice"):
        save(tmp_path, "m", stack(("a", "a")))
    with pytest.raises(CheckpointError, match="3 members of a stack of 2"):
        save(tmp_path, "m", stack(("a", "b", "c")))
    with pytest.raises(CheckpointError, match="one vector of finite scores >= 0 of each model"):
        save(tmp_path, "m", dataclasses.replace(stack(), calibrations=stack().calibrations[:1]))


@pytest.mark.parametrize("counts", [[50, 31], [80], [-1, 81], [40, 40, 0]])
def test_counts_that_do_not_add_up_are_refused(tmp_path: Path, counts: list[int]) -> None:
    path = save(tmp_path, "m", stack())
    save_file({"scores": torch.zeros(80), "counts": torch.tensor(counts)}, path / CALIBRATION)
    rewrite(path, lambda config: None)
    with pytest.raises(CheckpointError, match="counts of 2 members must add up to its 80 scores"):
        load(tmp_path, "m")
