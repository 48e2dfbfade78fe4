"""Where an interrupted training is kept, so that it can be taken up again.

<directory>/
    state.json            what is trained (settings, data), the numbers of the state, name and SHA-256 of the tensors
    <pass>.safetensors    weights, the best ones, and the optimiser's moments, of all members

`state.json` is replaced last and at once, so a reader finds a whole state: the old one or the new one.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as dump_safetensors

from models.errors import CheckpointError, ConfigError
from models.fit import STATE_NUMBERS, STATE_TENSORS, State

FORMAT = 1
STATE = "state.json"

Fingerprint = Mapping[str, Any]  # what the same training has: JSON values by name


class Store:
    """The state of one training on disk."""

    def __init__(self, directory: Path) -> None:
        """Keep it in this directory, which is this training's own; it is made when it is needed."""
        self.directory = directory

    @property
    def exists(self) -> bool:
        """Whether there is a state to go on from."""
        return (self.directory / STATE).is_file()

    def save(self, state: State, fingerprint: Fingerprint) -> None:
        """Replace what is kept.

        Raises:
            CheckpointError: it cannot be written.
        """
        tensors = dump_safetensors({name: getattr(state, name).contiguous() for name in STATE_TENSORS})
        name = f"{state.passes}.safetensors"
        content = {
            "format": FORMAT,
            "training": dict(fingerprint),
            "tensors": name,
            "sha256": hashlib.sha256(tensors).hexdigest(),
            "state": {one: _plain(getattr(state, one)) for one in STATE_NUMBERS},
        }
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            _write(self.directory / name, tensors)
            _write(self.directory / f"{STATE}.new", json.dumps(content, indent=1).encode())
            (self.directory / f"{STATE}.new").replace(self.directory / STATE)
            for old in self.directory.glob("*.safetensors"):
                if old.name != name:
                    old.unlink(missing_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"{self.directory}: the state of the training cannot be kept: {error.strerror}; free some space"
            ) from error

    def load(self, fresh: State, fingerprint: Fingerprint) -> State | None:
        """The state that is kept, or None when there is none.

        Args:
            fresh: a new state of the training that is to go on; the shapes are checked against it.
            fingerprint: of that training.

        Raises:
            ConfigError: what is kept is of other settings or data.
            CheckpointError: it is damaged, or of another program.
        """
        if not self.exists:
            return None
        again = "train again without --resume"
        try:
            content = json.loads((self.directory / STATE).read_bytes())
            if content["format"] != FORMAT:
                raise CheckpointError(f"{self.directory}: format {content['format']} is not {FORMAT}; {again}")
            _compare(self.directory, content["training"], json.loads(json.dumps(dict(fingerprint))))
            path = self.directory / Path(content["tensors"]).name
            raw = path.read_bytes()
            if hashlib.sha256(raw).hexdigest() != content["sha256"]:
                raise CheckpointError(f"{path}: the file was changed or damaged; {again}")
            tensors, numbers = parse_safetensors(raw), content["state"]
            return _state(tensors, numbers, fresh)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise CheckpointError(f"{self.directory}: no state of a training: {error}; {again}") from error

    def remove(self) -> None:
        """Forget what is kept: the training has ended, and its model is safe."""
        shutil.rmtree(self.directory, ignore_errors=True)


def _state(tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, Any], fresh: State) -> State:
    """The state that these tensors and numbers make, each of the kind and shape that a new one has."""
    made: dict[str, Any] = {}
    for name in STATE_TENSORS:
        ours = getattr(fresh, name)
        if tensors[name].shape != ours.shape or tensors[name].dtype != ours.dtype:
            raise ValueError(f"{name} is {tuple(tensors[name].shape)}, and {tuple(ours.shape)} float32 is needed")
        made[name] = tensors[name].clone()
    for name in STATE_NUMBERS:
        ours, value = getattr(fresh, name), numbers[name]
        if isinstance(ours, np.ndarray):
            value = np.array(value, ours.dtype)
            if value.shape != ours.shape:
                raise ValueError(f"{name} has {value.shape}, and {ours.shape} is needed")
        elif isinstance(ours, list):
            value = [tuple(one) if isinstance(one, list) else str(one) for one in value]
        else:
            value = int(value)
        made[name] = value
    return State(**made)


def _compare(directory: Path, kept: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Refuse to go on with another training, and say what is different."""
    differ = [
        f"{name} was {_short(kept.get(name))} and is {_short(asked.get(name))}"
        for name in [*kept, *(name for name in asked if name not in kept)]
        if kept.get(name) != asked.get(name)
    ]
    if differ:
        raise ConfigError(
            f"{directory}: the training that was interrupted is another one: {'; '.join(differ[:5])}"
            f"{'; …' if len(differ) > 5 else ''}; give what it was given, or train again without --resume"
        )


def _short(value: Any) -> str:
    text = "absent" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
