"""What a checkpoint holds, and its files as bytes; where they lie is told by `models.repository`.

    config.json               format, family, shape, names of the features and members, what it was trained on, SHA-256
                              of the other files
    model.safetensors         the weights, float32, and, as `constants.NAME`, what else the model is made of, float64
    calibration.safetensors   scores of held-out windows, float32
    card.md                   the same for people

A stack holds the models of many KPIs, its members: each tensor has one more axis in front, and `counts` in the
calibration says how many of the scores are those of each.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as dump_safetensors
from torch import Tensor

from models.errors import CheckpointError, ConfigError
from models.families import family as family_of
from models.family import Family
from models.serving import ServedModel

FORMAT = 2
CONFIG, WEIGHTS, CALIBRATION, CARD = "config.json", "model.safetensors", "calibration.safetensors", "card.md"
FILES = (WEIGHTS, CALIBRATION, CARD)  # those that config.json holds the digests of
LARGEST_HEADER = 2**20  # bytes of a safetensors header; ours is below 2 kB
CONSTANT = "constants."

Scores = NDArray[np.float32]


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One series that a model was trained on."""

    name: str
    rows: int
    sha256: str = ""  # of its file; empty when it did not come from one


class Training(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a model came to be, for the record: nothing here changes what it says."""

    sources: tuple[Source, ...] = ()
    seed: int = 0
    epochs: int = 0  # run
    best_epoch: int = 0  # whose weights were kept; 0 when it was not trained here
    windows: int = 0  # trained on
    held_out_windows: int = 0
    train_losses: tuple[float, ...] = ()  # per epoch
    held_out_losses: tuple[float, ...] = ()
    persistence_loss: float | None = None  # of the last value as the forecast, held out
    command: str = ""  # that made it
    created: str = ""  # ISO 8601, by the caller's clock
    notes: str = ""


@dataclass(frozen=True, slots=True)
class Bundle:
    """A model with what belongs to it, not yet in a repository."""

    model: ServedModel[Any]
    calibrations: tuple[Scores, ...]  # scores of held-out windows, oldest first, or empty; one a member
    interval_ms: int | None  # grid step of the training data; None when it was mixed or unknown
    training: Training = field(default_factory=Training)
    metrics: tuple[str, ...] = ()  # names of the features of an entity's model, in order; empty for a KPI's
    members: tuple[str, ...] = ()  # of a stack: the series that each of its models is for


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model as read from a repository."""

    name: str
    version: int
    path: Path
    model: ServedModel[Any]
    calibrations: tuple[Scores, ...]
    interval_ms: int | None
    training: Training
    metrics: tuple[str, ...] = ()
    members: tuple[str, ...] = ()

    @property
    def ref(self) -> str:
        """What names it in settings, logs and events: NAME@VERSION."""
        return f"{self.name}@{self.version}"

    @property
    def calibrated(self) -> bool:
        """Whether `calibrations` hold scores of the very KPIs or entity that the model was trained for.

        Entities can share their scaling where their metrics have the same range; their scores are then nobody's own.
        """
        alone = not self.metrics or len(self.training.sources) <= 1
        some = any(len(scores) for scores in self.calibrations)
        return self.model.config.scaling == "train" and some and (alone or bool(self.members))


class _Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """config.json."""

    format: int
    family: str
    model: dict[str, int | float | str | bool]
    interval_ms: int | None
    training: Training
    sha256: dict[str, str]
    metrics: tuple[str, ...] = ()  # absent for a KPI's model
    members: tuple[str, ...] = ()  # absent for a plain model


class _Kind(msgspec.Struct):
    """What has to be known of a config.json before the rest of it can be judged."""

    format: int
    family: str


def metrics_problem(metrics: Sequence[str], features: int) -> str | None:
    """Say why these cannot be the names of a model's features, or None when they can; no names can."""
    if not metrics:
        return None
    if features == 1:
        return f"metrics {list(metrics)} of a model of one feature; a KPI has a name and no metrics"
    if len(metrics) != features:
        return f"{len(metrics)} metrics for {features} features; each feature needs its name"
    return _names_problem(metrics, "metric", "every feature needs its own name")


def _names_problem(names: Sequence[str], what: str, rule: str) -> str | None:
    seen = set[str]()
    for name in names:
        if not name or name.isspace() or not name.isprintable():
            return f"{name!r} cannot be the name of a {what}: it is empty or cannot be shown"
        if name in seen:
            return f"{what} {name!r} is there twice; {rule}"
        seen.add(name)
    return None


# --- to bytes --------------------------------------------------------------------------------------------------------


def encode(name: str, bundle: Bundle, card: str) -> dict[str, bytes]:
    """Content of every file of a version, config.json last.

    Raises:
        CheckpointError: a weight or score is not finite, or names do not fit.
    """
    model = bundle.model
    count = max(model.members, 1)
    for tensor_name, tensor in model.raw.items():
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{name}: {tensor_name} holds numbers that are not finite; train again")
    if len(bundle.calibrations) != count or not all(_are_scores(scores) for scores in bundle.calibrations):
        raise CheckpointError(
            f"{name}: the calibration must be one vector of finite scores >= 0 of each model; train again"
        )
    if problem := metrics_problem(bundle.metrics, model.features) or _members_problem(bundle.members, model.members):
        raise CheckpointError(f"{name}: {problem}")
    scores = {"scores": torch.from_numpy(np.concatenate(bundle.calibrations).astype(np.float32))}
    if model.members:
        scores["counts"] = torch.tensor([len(one) for one in bundle.calibrations])
    constants = {CONSTANT + key: torch.from_numpy(np.ascontiguousarray(one)) for key, one in model.constants.items()}
    content = {
        WEIGHTS: dump_safetensors({key: one.contiguous() for key, one in (*model.raw.items(), *constants.items())}),
        CALIBRATION: dump_safetensors(scores),
        CARD: card.encode(),
    }
    config = _Config(
        format=FORMAT,
        family=model.family,
        model=msgspec.to_builtins(model.config),
        interval_ms=bundle.interval_ms,
        training=bundle.training,
        sha256={file: hashlib.sha256(content[file]).hexdigest() for file in FILES},
        metrics=bundle.metrics,
        members=bundle.members,
    )
    content[CONFIG] = msgspec.json.format(msgspec.json.encode(config), indent=2) + b"\n"
    return content


def _are_scores(scores: Scores) -> bool:
    return scores.ndim == 1 and bool((np.isfinite(scores) & (scores >= 0)).all())


def _members_problem(members: Sequence[str], count: int) -> str | None:
    if len(members) != count:
        return f"{len(members)} members of a stack of {count}"
    return _names_problem(members, "member", "every model of a stack needs its own series")


# --- and back --------------------------------------------------------------------------------------------------------


def decode(path: Path, name: str, version: int, read: Callable[[Path], bytes]) -> Checkpoint:
    """Return the checkpoint that files hold; every part of it is checked.

    Args:
        path: of its directory, for messages.
        name: of the model.
        version: of the model.
        read: returns the content of one of its files.

    Raises:
        CheckpointError: they are damaged, of another format or family, or inconsistent. The message begins with the
            file.
    """
    config = _parse_config(path / CONFIG, read(path / CONFIG))
    content = {}
    for file in FILES:
        content[file] = read(path / file)
        digest = hashlib.sha256(content[file]).hexdigest()
        if digest != config.sha256.get(file):
            raise CheckpointError(
                f"{path / file}: its SHA-256 is {digest} and {CONFIG} says {config.sha256.get(file)}; "
                "the file was changed or damaged: restore it or train again"
            )
    family = _family(path / CONFIG, config.family)
    shape = _shape(path / CONFIG, family, config.model)
    tensors = tensors_of(path / WEIGHTS, content[WEIGHTS])
    constants = {
        key.removeprefix(CONSTANT): _float64(path / WEIGHTS, key, tensors.pop(key))
        for key in sorted(tensors)
        if key.startswith(CONSTANT)
    }
    count = len(config.members)
    check_weights(path / WEIGHTS, tensors, family.shapes(shape), members=count)
    try:
        model = family.serve(shape, tensors, constants, stacked=bool(count))
    except (ConfigError, KeyError) as error:
        raise CheckpointError(f"{path / WEIGHTS}: {error}; restore it or train again") from error
    assert isinstance(model, ServedModel)
    scores = _scores(path / CALIBRATION, content[CALIBRATION], count)
    if problem := metrics_problem(config.metrics, shape.features) or _members_problem(config.members, count):
        raise CheckpointError(f"{path / CONFIG}: {problem}; restore it or train again")
    return Checkpoint(
        name, version, path, model, scores, config.interval_ms, config.training, config.metrics, config.members
    )


def _parse_config(path: Path, content: bytes) -> _Config:
    try:
        kind = msgspec.json.decode(content, type=_Kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: {error}; restore it or train again") from error
    if kind.format != FORMAT:
        raise CheckpointError(
            f"{path}: format {kind.format}, and this program reads format {FORMAT}; train it again, "
            "or use the tocsin that wrote it"
        )
    try:
        config = msgspec.json.decode(content, type=_Config)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: {error}; restore it or train again") from error
    if config.interval_ms is not None and config.interval_ms < 1:
        raise CheckpointError(f"{path}: interval_ms={config.interval_ms} must be at least 1")
    return config


def _family(path: Path, name: str) -> Family:
    try:
        return family_of(name)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _shape(path: Path, family: Family, values: Mapping[str, Any]) -> Any:
    try:
        return msgspec.convert(values, family.config, strict=True)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{path}: model: {error}; restore it or train again") from error


def check_weights(
    path: Path, weights: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], *, members: int = 0
) -> None:
    """Hold tensors against the names and shapes that a config asks for.

    Raises:
        CheckpointError: one is missing, unknown, of another shape or type, or not finite.
    """
    missing, extra = sorted(shapes.keys() - weights.keys()), sorted(weights.keys() - shapes.keys())
    if missing or extra:
        raise CheckpointError(f"{path}: tensors missing: {missing}, unknown: {extra}; it belongs to another model")
    for name, shape in shapes.items():
        tensor, wanted = weights[name], ((members,) if members else ()) + shape
        if tuple(tensor.shape) != wanted:
            raise CheckpointError(f"{path}: {name} is {tuple(tensor.shape)} and the config asks for {wanted}")
        if tensor.dtype != torch.float32:
            raise CheckpointError(f"{path}: {name} is {tensor.dtype} and must be torch.float32")
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{path}: {name} holds numbers that are not finite; train again")


def _float64(path: Path, name: str, tensor: Tensor) -> NDArray[np.float64]:
    if tensor.dtype != torch.float64:
        raise CheckpointError(f"{path}: {name} is {tensor.dtype} and must be torch.float64")
    array: NDArray[np.float64] = tensor.numpy().copy()
    return array


def _scores(path: Path, content: bytes, members: int) -> tuple[Scores, ...]:
    tensors = tensors_of(path, content)
    scores, counts = tensors.get("scores"), tensors.get("counts")
    wanted = {"scores", "counts"} if members else {"scores"}
    if scores is None or tensors.keys() != wanted or scores.ndim != 1 or scores.dtype != torch.float32:
        found = {name: (tuple(tensor.shape), str(tensor.dtype)) for name, tensor in tensors.items()}
        raise CheckpointError(f"{path}: holds {found}, and one float32 vector named 'scores' is needed")
    if not bool((torch.isfinite(scores) & (scores >= 0)).all()):
        raise CheckpointError(f"{path}: a score is negative or not finite; train again")
    if counts is None:
        return (scores.numpy().copy(),)
    fits = counts.dtype == torch.int64 and counts.shape == (members,) and int(counts.sum()) == len(scores)
    if not fits or bool((counts < 0).any()):
        raise CheckpointError(f"{path}: counts of {members} members must add up to its {len(scores)} scores")
    return tuple(np.split(scores.numpy().copy(), np.cumsum(counts.numpy())[:-1]))


def tensors_of(path: Path, content: bytes) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file.

    Raises:
        CheckpointError: it is none, or its header claims too much.
    """
    header = int.from_bytes(content[:8], "little")
    if len(content) < 8 or header > min(LARGEST_HEADER, len(content) - 8):
        raise CheckpointError(
            f"{path}: its header claims {header} bytes of a file of {len(content)} (at most {LARGEST_HEADER}); "
            "it is not a safetensors file, or damaged"
        )
    try:
        return dict(parse_safetensors(content))
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{path}: not a safetensors file: {error}") from error
