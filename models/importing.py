"""Models that were trained elsewhere: a foreign state dict, by the order of its layers."""

import hashlib
import io
import pickle
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.base import Float64
from models.checkpoint import CONSTANT, Bundle, Source, Training, check_weights, tensors_of
from models.deepant import DeepAnT, DeepAnTConfig
from models.errors import CheckpointError
from models.repository import read_bytes


def import_state_dict(
    path: Path,
    config: DeepAnTConfig,
    center: Float64 | Sequence[float] | None = None,
    scale: Float64 | Sequence[float] | None = None,
    *,
    interval_ms: int | None = None,
    command: str = "",
    created: str = "",
) -> Bundle:
    """Read a DeepAnT that was trained elsewhere: a .safetensors file, or one that torch.save wrote.

    Tensors are recognised by the order of the layers and by shape, whatever their names; a Lightning file's
    "state_dict" is looked into. For a model trained on min-max scaled values, center is the minimum and scale the
    maximum less the minimum. The result has no calibration.

    Raises:
        CheckpointError: the file cannot be read, holds anything but tensors and plain values, or its tensors are not
            those of `config`.
        ConfigError: center or scale do not fit `config`.
    """
    content = read_bytes(path)
    state = _match(path, _foreign_tensors(path, content), config)
    check_weights(path, state, config.shapes)
    constants = {
        name: np.array(one, np.float64) for name, one in (("center", center), ("scale", scale)) if one is not None
    }
    model = DeepAnT(config, state, constants)
    digest = hashlib.sha256(content).hexdigest()
    training = Training(
        sources=(Source(path.name, rows=0, sha256=digest),), command=command, created=created, notes="imported weights"
    )
    return Bundle(model, (np.empty(0, dtype=np.float32),), interval_ms, training)


def _foreign_tensors(path: Path, content: bytes) -> dict[str, Tensor]:
    """The tensors of a foreign file by name, in an order that follows the layers."""
    if path.suffix == ".safetensors":
        found = tensors_of(path, content)
        tensors = {name: one for name, one in found.items() if not name.startswith(CONSTANT)}  # of a checkpoint of ours
        # The format keeps no order; names that count or spell the layers (conv1, conv2, dense, out; 0, 3, 7, 10) do.
        return {name: tensors[name] for name in sorted(tensors, key=_natural)}
    try:
        with warnings.catch_warnings(action="ignore"):  # torch warns of pickle protocols, and refuses what it must
            loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        first = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{path}: holds more than tensors, and is not run: {first}; save its state dict alone, "
            "or as .safetensors, with the program that made it"
        ) from error
    except Exception as error:  # torch raises many kinds for a damaged file
        raise CheckpointError(f"{path}: torch cannot read it: {error}") from error
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise CheckpointError(f"{path}: holds no state dict (names and their tensors)")
    return {str(name): value.detach() for name, value in loaded.items()}


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sorting key by which layer2 comes before layer10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"([0-9]+)", name) if part]


def _match(path: Path, tensors: Mapping[str, Tensor], config: DeepAnTConfig) -> dict[str, Tensor]:
    """Our names for foreign tensors: layers in their order, each with its weight and its bias."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        layer, _, kind = name.rpartition(".")
        layers.setdefault(layer, {})[kind] = tensor
    ours = ("conv1", "conv2", "dense", "out")
    if len(layers) != len(ours) or any(set(layer) != {"weight", "bias"} for layer in layers.values()):
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        raise CheckpointError(f"{path}: holds {found}, and a DeepAnT has a weight and a bias of 4 layers")
    state = {}
    for our, (layer, parts) in zip(ours, layers.items(), strict=True):
        for kind, tensor in parts.items():
            shape = config.shapes[f"{our}.{kind}"]
            if tuple(tensor.shape) != shape:
                raise CheckpointError(
                    f"{path}: {layer}.{kind} is {tuple(tensor.shape)} and the {our} layer of window={config.window}, "
                    f"features={config.features} has {shape}; name the window and features it was trained with"
                )
            state[f"{our}.{kind}"] = tensor.to(torch.float32) if tensor.is_floating_point() else tensor
    return state
