import dataclasses
import hashlib
import json
import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models import checkpoint
from models.checkpoint import (
    CALIBRATION,
    CARD,
    CONFIG,
    WEIGHTS,
    Bundle,
    Checkpoint,
    Source,
    Training,
    bundled_root,
    import_state_dict,
    load,
    names,
    parse_ref,
    save,
    versions,
)
from models.deepant import DeepAnT, DeepAnTConfig, Network
from models.errors import CheckpointError, ConfigError


def bundle(seed: int = 0, window: int = 10, features: int = 1, scaling: str = "train") -> Bundle:
    torch.manual_seed(seed)
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
    return Bundle(DeepAnT(config, Network(config), **constants), scores, 60_000, training)


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
    np.testing.assert_array_equal(loaded.model.center, saved.model.center)
    np.testing.assert_array_equal(loaded.model.scale, saved.model.scale)
    np.testing.assert_array_equal(loaded.calibration, saved.calibration)
    assert loaded.calibration.dtype == np.float32
    x = history(14, features)
    np.testing.assert_array_equal(loaded.model.forecast(x).expected, saved.model.forecast(x).expected)
    np.testing.assert_array_equal(loaded.model.forecast(x).spread, saved.model.forecast(x).spread)


def test_the_card_and_config_are_for_people_too(tmp_path: Path) -> None:
    path = save(tmp_path, "m", bundle())
    card = (path / CARD).read_text()
    assert "4,593 parameters" in card and "a.csv" in card and "ab" * 32 in card and "epoch 1 kept" in card
    config = json.loads((path / CONFIG).read_text())
    assert config["scaling"] == {"center": [0.1], "scale": [1 / 3], "usual_step": [0.7]}
    assert config["sha256"][WEIGHTS] == hashlib.sha256((path / WEIGHTS).read_bytes()).hexdigest()


def test_versions_are_numbers_and_the_highest_is_taken(tmp_path: Path) -> None:
    for seed in range(11):
        save(tmp_path, "m", bundle(seed))
    assert versions(tmp_path, "m") == list(range(1, 12))  # as text, 9 would come after 10 and 11
    assert load(tmp_path, "m").ref == "m@11"
    assert load(tmp_path, "m@9").training.seed == 8
    (tmp_path / "m" / "3").rename(tmp_path / "elsewhere")
    assert save(tmp_path, "m", bundle()).name == "12"  # a number is not used twice
    with pytest.raises(CheckpointError, match=r"no checkpoint 'm@3' .* it has versions \[1, 2, 4"):
        load(tmp_path, "m@3")


def test_roots_are_searched_in_order(tmp_path: Path) -> None:
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    save(theirs, "both", bundle(1))
    save(theirs, "both", bundle(2))
    save(theirs, "other", bundle(3))
    save(mine, "both", bundle(4))
    roots = [mine, theirs, tmp_path / "absent"]
    assert names(roots) == ["both", "other"]
    assert load(roots, "both").training.seed == 4
    assert load(roots, "both@2").training.seed == 2
    assert load(roots, "other").training.seed == 3
    assert versions(roots, "both") == [1]
    with pytest.raises(CheckpointError, match="models here: both, other"):
        load(roots, "third")


def test_what_is_no_version_is_not_seen(tmp_path: Path) -> None:
    save(tmp_path, "m", bundle())
    for name in (".draft-7", "07", "v8", "9.old", "0"):
        (tmp_path / "m" / name).mkdir()
    (tmp_path / "m" / "10").write_text("a file")
    (tmp_path / "empty").mkdir()
    (tmp_path / "README.md").write_text("a file")
    assert versions(tmp_path, "m") == [1]
    assert names(tmp_path) == ["m"]
    assert names(tmp_path / "absent") == [] and versions(tmp_path / "absent", "m") == []


def test_a_failed_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: bytes) -> None:
        path.write_bytes(content[:10])
        if path.name == CONFIG:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write", full)
    with pytest.raises(CheckpointError, match="No space left"):
        save(tmp_path, "m", bundle())
    assert list((tmp_path / "m").iterdir()) == []


def test_a_version_taken_meanwhile_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = checkpoint._versions_in
    first = save(tmp_path, "m", bundle(1))
    answers = [list[int]()]  # once, the other writer's version is not seen yet
    monkeypatch.setattr(checkpoint, "_versions_in", lambda home: answers.pop() if answers else real(home))
    assert save(tmp_path, "m", bundle(2)).name == "2"
    assert load(tmp_path, "m@1").path == first and load(tmp_path, "m@1").training.seed == 1


@pytest.mark.parametrize(
    "name", ["../m", "a/b", "", ".", "..", ".m", "-m", "M", "m\n", "é", "a" * 101, "m\x00", "/etc/passwd"]
)
def test_names_that_could_leave_the_root_are_refused(tmp_path: Path, name: str) -> None:
    for act in (lambda: load(tmp_path, name), lambda: versions(tmp_path, name), lambda: save(tmp_path, name, bundle())):
        with pytest.raises(CheckpointError, match="is not the name of a model"):
            act()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ref", ["m@", "m@0", "m@01", "m@-1", "m@1.0", "m@latest", "m@1@2", "m@../2"])
def test_references_that_are_none_are_refused(ref: str) -> None:
    with pytest.raises(CheckpointError, match="is not a version"):
        parse_ref(ref)


def test_references() -> None:
    assert parse_ref("a_b.c-9") == ("a_b.c-9", None)
    assert parse_ref("m@12") == ("m", 12)


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
        ("format", 2, "format 2, and this program reads format 1"),
        ("format", "1", "Expected `int`"),
        ("family", "lstm", "family 'lstm' is not known; known: deepant"),
        ("surprise", 1, "unknown field `surprise`"),
        ("scaling", {"center": [0.0, 1.0], "scale": [1.0], "usual_step": None}, "center=.* must be 1 finite numbers"),
        ("scaling", {"center": [0.0], "scale": [0.0], "usual_step": None}, "scale=.* must be above 0"),
        ("scaling", {"center": [None], "scale": [1.0], "usual_step": None}, "Expected `float`"),
        ("scaling", {"center": [0.0], "scale": [1.0], "usual_step": [-1.0]}, "usual_step=.* must be at least 0"),
        ("interval_ms", 0, "interval_ms=0"),
        ("sha256", {}, "config.json says None"),
    ],
)
def test_another_config_is_refused(tmp_path: Path, key: str, value: object, message: str) -> None:
    path = save(tmp_path, "m", bundle())
    rewrite(path, lambda config: config.update({key: value}))
    with pytest.raises(CheckpointError, match=message) as caught:
        load(tmp_path, "m")
    assert str(caught.value).startswith(str(path / CONFIG)) or key == "sha256"


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
    with pytest.raises(CheckpointError, match=r"window=45 is not|and the config asks for|must be 2 finite"):
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
    ],
)
def test_other_weights_are_refused(tmp_path: Path, change: Callable[[dict[str, Tensor]], None], message: str) -> None:
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
    save(tmp_path, "m", Bundle(full.model, np.empty(0, dtype=np.float32), None))
    loaded = load(tmp_path, "m")
    assert loaded.calibration.shape == (0,) and not loaded.calibrated and loaded.interval_ms is None


def test_what_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    whole = bundle()
    with pytest.raises(CheckpointError, match="calibration"):
        save(tmp_path, "m", Bundle(whole.model, np.array([np.inf], dtype=np.float32), None))
    whole.model.network.get_parameter("out.bias").fill_(float("nan"))
    with pytest.raises(CheckpointError, match=r"m: out.bias holds numbers that are not finite"):
        save(tmp_path, "m", whole)
    assert names(tmp_path) == []


def test_the_bundled_root_is_this_checkout() -> None:
    assert bundled_root().name == "checkpoints" and bundled_root().is_dir()


# --- import ----------------------------------------------------------------------------------------------------------


class Published(nn.Module):
    """The published module: its attribute names are the keys of its state dict."""

    def __init__(self, flat: int = 32) -> None:
        super().__init__()
        self.convblock1 = nn.Sequential(nn.Conv1d(1, 32, 3), nn.ReLU(), nn.MaxPool1d(2))
        self.convblock2 = nn.Sequential(nn.Conv1d(32, 32, 3), nn.ReLU(), nn.MaxPool1d(2))
        self.flatten = nn.Flatten()
        self.denseblock = nn.Sequential(nn.Linear(flat, 40), nn.ReLU(), nn.Dropout(0.25))
        self.out = nn.Linear(40, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.flatten(self.convblock2(self.convblock1(x)))
        forecast: Tensor = self.out(self.denseblock(h))
        return forecast


def published_file(tmp_path: Path, kind: str, network: nn.Module) -> Path:
    state = network.state_dict()
    lightning = OrderedDict((f"model.{name}", tensor) for name, tensor in state.items())
    path = tmp_path / {"safetensors": "w.safetensors", "plain": "w.pt", "lightning": "w.ckpt"}[kind]
    if kind == "safetensors":
        save_file(dict(lightning), path)
    else:
        torch.save(state if kind == "plain" else {"epoch": 29, "state_dict": lightning, "callbacks": {}}, path)
    return path


@pytest.mark.parametrize("kind", ["safetensors", "plain", "lightning"])
@pytest.mark.parametrize("window", [10, 30])
def test_a_published_state_dict_forecasts_as_it_did(tmp_path: Path, window: int, kind: str) -> None:
    torch.manual_seed(5)
    config = DeepAnTConfig(window=window)
    network = Published(32 * config.pooled).eval()
    path = published_file(tmp_path, kind, network)
    low, high = 3.0, 47.0  # it was trained on min-max scaled values
    imported = import_state_dict(path, config, [low], [high - low], interval_ms=300_000)
    assert imported.model.parameters == sum(p.numel() for p in network.parameters()) == {10: 4593, 30: 10993}[window]
    x = np.random.default_rng(0).uniform(low, high, size=(40, window, 1))
    with torch.inference_mode():
        unit = network(torch.tensor((x - low) / (high - low), dtype=torch.float32).transpose(1, 2)).numpy()
    assert unit.std() > 1e-3
    forecast = imported.model.forecast(x)
    np.testing.assert_allclose((forecast.expected - low) / (high - low), unit, atol=1e-6)
    assert (forecast.spread == high - low).all()
    save(tmp_path, "published", imported)
    loaded = load(tmp_path, "published")
    np.testing.assert_array_equal(loaded.model.forecast(x).expected, forecast.expected)
    assert loaded.training.sources[0].sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert not loaded.calibrated


def test_another_window_is_refused_with_both_shapes(tmp_path: Path) -> None:
    path = published_file(tmp_path, "lightning", Published())
    with pytest.raises(
        CheckpointError, match=r"model.denseblock.0.weight is \(40, 32\) and the dense layer of window=30.* \(40, 192\)"
    ):
        import_state_dict(path, DeepAnTConfig(window=30))


def test_scaling_of_another_size_is_refused(tmp_path: Path) -> None:
    path = published_file(tmp_path, "plain", Published())
    with pytest.raises(ConfigError, match="center="):
        import_state_dict(path, DeepAnTConfig(window=10), [1.0, 2.0], [1.0])


@pytest.mark.parametrize("layers", [[nn.Linear(3, 3)], [nn.Linear(1, 1)] * 4, [nn.BatchNorm1d(3)] * 4])
def test_another_network_is_refused(tmp_path: Path, layers: list[nn.Module]) -> None:
    torch.save(nn.Sequential(*layers).state_dict(), tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"a DeepAnT has|and the conv1 layer"):
        import_state_dict(tmp_path / "w.pt", DeepAnTConfig(window=10))


def test_weights_that_are_not_finite_are_not_imported(tmp_path: Path) -> None:
    network = Published()
    nn.init.constant_(network.out.bias, float("inf"))
    with pytest.raises(CheckpointError, match=r"out.bias holds numbers that are not finite"):
        import_state_dict(published_file(tmp_path, "plain", network), DeepAnTConfig(window=10))


class Code:
    """Unpickling it makes a directory."""

    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        import os

        return os.mkdir, (self.target,)


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    target = tmp_path / "ran"
    torch.save({"state_dict": Published().state_dict(), "extra": Code(str(target))}, tmp_path / "zip.ckpt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Code(str(target))))
    for name in ("zip.ckpt", "raw.pt"):
        with pytest.raises(CheckpointError, match="holds more than tensors, and is not run"):
            import_state_dict(tmp_path / name, DeepAnTConfig(window=10))
    assert not target.exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04broken"])
@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_files_that_are_no_checkpoint_are_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        import_state_dict(tmp_path / name, DeepAnTConfig(window=10))


def test_a_file_that_is_absent_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"absent.pt: cannot be read: No such file"):
        import_state_dict(tmp_path / "absent.pt", DeepAnTConfig(window=10))


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
