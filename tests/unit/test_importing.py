import hashlib
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from models.deepant import DeepAnTConfig
from models.errors import CheckpointError, ConfigError
from models.importing import import_state_dict
from models.repository import load, save
from tests.contexts import context


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
    forecast = imported.model.assess(context(x))
    np.testing.assert_allclose((forecast.expected - low) / (high - low), unit, atol=1e-6)
    assert (forecast.spread == high - low).all()
    save(tmp_path, "published", imported)
    loaded = load(tmp_path, "published")
    np.testing.assert_array_equal(loaded.model.assess(context(x)).expected, forecast.expected)
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
    with pytest.raises(ConfigError, match="center is"):
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
