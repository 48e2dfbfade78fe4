"""The model repository, and the only module that touches disk.

<root>/<name>/<version>/
    config.json               format, family, shape, names of the features, scaling, what it was trained on, SHA-256 of
                              the other files
    model.safetensors         the weights, float32
    calibration.safetensors   scores of held-out windows, float32
    card.md                   the same for people

A version is written into a hidden directory beside its place and renamed there, so a reader sees all of it or none.
No file is ever unpickled, except that `import_state_dict` may read a foreign state dict, by torch's `weights_only`
loader, which builds tensors and plain containers and runs no code.
"""

import hashlib
import io
import os
import pickle
import re
import shutil
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as dump_safetensors
from torch import Tensor

from models.base import Float64
from models.deepant import DeepAnT, DeepAnTConfig, Network
from models.errors import CheckpointError, ConfigError

FORMAT = 1
CONFIG, WEIGHTS, CALIBRATION, CARD = "config.json", "model.safetensors", "calibration.safetensors", "card.md"
FILES = (WEIGHTS, CALIBRATION, CARD)  # those that config.json holds the digests of
LARGEST_FILE = 512 * 2**20  # bytes; a KPI's model is far below 1 MB
LARGEST_HEADER = 2**20  # bytes of a safetensors header; ours is below 1 kB
_NAME = re.compile(r"[a-z0-9_][a-z0-9_.-]{0,99}")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One series that a model was trained on."""

    name: str
    rows: int
    sha256: str = ""  # of its file; empty when it did not come from one


class Training(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a model came to be, for the record: nothing here changes a forecast."""

    sources: tuple[Source, ...] = ()
    seed: int = 0
    epochs: int = 0  # run
    best_epoch: int = 0  # whose weights were kept; 0 when it was not trained here
    windows: int = 0  # trained on
    held_out_windows: int = 0
    train_losses: tuple[float, ...] = ()  # per epoch, mean absolute standardised error
    held_out_losses: tuple[float, ...] = ()
    persistence_loss: float | None = None  # the same of the last value as the forecast, held out
    command: str = ""  # that made it
    created: str = ""  # ISO 8601, by the caller's clock
    notes: str = ""


@dataclass(frozen=True, slots=True)
class Bundle:
    """A model with what belongs to it, not yet in a repository."""

    model: DeepAnT
    calibration: NDArray[np.float32]  # scores of held-out windows, oldest first, or empty
    interval_ms: int | None  # grid step of the training data; None when it was mixed or unknown
    training: Training = field(default_factory=Training)
    metrics: tuple[str, ...] = ()  # names of the features of an entity's model, in order; empty for a KPI's


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model as read from a repository."""

    name: str
    version: int
    path: Path
    model: DeepAnT
    calibration: NDArray[np.float32]
    interval_ms: int | None
    training: Training
    metrics: tuple[str, ...] = ()  # names of the features of an entity's model, in order; empty for a KPI's

    @property
    def ref(self) -> str:
        """What names it in settings, logs and events: NAME@VERSION."""
        return f"{self.name}@{self.version}"

    @property
    def calibrated(self) -> bool:
        """Whether `calibration` holds scores of the very KPI or entity that the model was trained for.

        Entities can share their scaling where their metrics have the same range; their scores are then nobody's own.
        """
        alone = not self.metrics or len(self.training.sources) <= 1
        return self.model.config.scaling == "train" and len(self.calibration) > 0 and alone


class _Shape(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    window: int
    features: int
    filters: int
    kernel: int
    hidden: int
    dropout: float
    scaling: str


class _Scaling(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    center: list[float]
    scale: list[float]
    usual_step: list[float] | None = None


class _Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """config.json. JSON numbers are written as the shortest text that reads back as the same float64."""

    format: int
    family: str
    model: _Shape
    scaling: _Scaling
    interval_ms: int | None
    training: Training
    sha256: dict[str, str]
    metrics: tuple[str, ...] = ()  # absent for a KPI's model


class _Kind(msgspec.Struct):
    """What has to be known of a config.json before the rest of it can be judged."""

    format: int
    family: str


def bundled_root() -> Path:
    """The repository that comes with the program, in an installed wheel or in a source checkout.

    Raises:
        CheckpointError: neither place exists.
    """
    package = Path(__file__).resolve().parent
    places = (package / "checkpoints", package.parent / "checkpoints")
    for place in places:
        if place.is_dir():
            return place
    raise CheckpointError(f"no bundled checkpoints at {places[0]} or {places[1]}; reinstall tocsin, or name a root")


def check_name(name: str) -> str:
    """Return the name of a model if it is one.

    Raises:
        CheckpointError: it is not; above all when it would leave its root.
    """
    if not _NAME.fullmatch(name):
        raise CheckpointError(
            f"{name!r} is not the name of a model: 1 to 100 of a-z 0-9 _ . - are, without a leading dot or dash"
        )
    return name


def metrics_problem(metrics: Sequence[str], features: int) -> str | None:
    """Say why these cannot be the names of a model's features, or None when they can; no names can."""
    if not metrics:
        return None
    if features == 1:
        return f"metrics {list(metrics)} of a model of one feature; a KPI has a name and no metrics"
    if len(metrics) != features:
        return f"{len(metrics)} metrics for {features} features; each feature needs its name"
    for name in metrics:
        if not name or name.isspace() or not name.isprintable():
            return f"{name!r} cannot be the name of a metric: it is empty or cannot be shown"
    if twice := next((name for at, name in enumerate(metrics) if name in metrics[:at]), None):
        return f"metric {twice!r} is there twice; every feature needs its own name"
    return None


def parse_ref(ref: str) -> tuple[str, int | None]:
    """Split NAME or NAME@VERSION; the version is None when it is not given.

    Raises:
        CheckpointError: it is neither.
    """
    name, at, version = ref.partition("@")
    check_name(name)
    if not at:
        return name, None
    if not _VERSION.fullmatch(version):
        raise CheckpointError(f"{version!r} in {ref!r} is not a version; write NAME@1, or NAME for the highest")
    return name, int(version)


def names(roots: Path | Sequence[Path]) -> list[str]:
    """Names of the models in the roots, sorted; those with a version only."""
    found = {
        entry.name
        for root in _roots(roots)
        for entry in _entries(root)
        if _NAME.fullmatch(entry.name) and _versions_in(entry)
    }
    return sorted(found)


def versions(roots: Path | Sequence[Path], name: str) -> list[int]:
    """Versions of a model in the first root that has it, ascending; empty when none has.

    Raises:
        CheckpointError: the name is not one.
    """
    check_name(name)
    return next((found for root in _roots(roots) if (found := _versions_in(root / name))), [])


def load(roots: Path | Sequence[Path], ref: str) -> Checkpoint:
    """Read a model and check every part of it.

    Args:
        roots: repositories, searched in order; the first that has the name (and version, if given) is taken.
        ref: NAME, for its highest version, or NAME@VERSION.

    Raises:
        CheckpointError: there is none, or it is damaged, of another format or family, or inconsistent. The message
            begins with the directory or file concerned.
    """
    name, version = parse_ref(ref)
    searched = _roots(roots)
    for root in searched:
        found = _versions_in(root / name)
        if found and version is None:
            return _read(root / name / str(found[-1]), name, found[-1])
        if version in found:
            return _read(root / name / str(version), name, int(version or 0))
    known = ", ".join(names(searched)) or "none"
    here = versions(searched, name)
    what = f"it has versions {here}" if here else f"models here: {known}"
    raise CheckpointError(f"no checkpoint {ref!r} in {', '.join(map(str, searched))}; {what}")


def save(root: Path, name: str, bundle: Bundle) -> Path:
    """Write a bundle as the next version of a model and return its directory.

    The files are written and synced in a hidden directory, which is then renamed: a version is never half there.

    Raises:
        CheckpointError: the name is not one, a weight or score is not finite, or the disk refuses.
    """
    check_name(name)
    home = root / name
    try:
        home.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=home))
        try:
            draft.chmod(0o755)  # mkdtemp's 0700 would hide it from the service's own user
            for file, content in _files(name, bundle).items():
                _write(draft / file, content)
            _sync_directory(draft)
            path = _publish(draft, home)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        _sync_directory(home)
    except OSError as error:
        raise CheckpointError(f"{home}: cannot write the checkpoint: {error}; check space and permissions") from error
    return path


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
    content = _bytes(path)
    tensors = _foreign_tensors(path, content)
    state = _match(path, tensors, config)
    network = _network(path, config, state)
    model = DeepAnT(config, network, _constants(center), _constants(scale))
    digest = hashlib.sha256(content).hexdigest()
    training = Training(
        sources=(Source(path.name, rows=0, sha256=digest),), command=command, created=created, notes="imported weights"
    )
    return Bundle(model, np.empty(0, dtype=np.float32), interval_ms, training)


# --- reading ---------------------------------------------------------------------------------------------------------


def _read(path: Path, name: str, version: int) -> Checkpoint:
    config = _parse_config(path / CONFIG)
    content = {}
    for file in FILES:
        content[file] = _bytes(path / file)
        digest = hashlib.sha256(content[file]).hexdigest()
        if digest != config.sha256.get(file):
            raise CheckpointError(
                f"{path / file}: its SHA-256 is {digest} and {CONFIG} says {config.sha256.get(file)}; "
                "the file was changed or damaged: restore it or train again"
            )
    shape = _deepant_config(path / CONFIG, config.model)
    weights = _safetensors(path / WEIGHTS, content[WEIGHTS])
    network = _network(path / WEIGHTS, shape, weights)
    try:
        scaling = config.scaling
        model = DeepAnT(
            shape, network, np.array(scaling.center), np.array(scaling.scale), _constants(scaling.usual_step)
        )
    except ConfigError as error:
        raise CheckpointError(f"{path / CONFIG}: {error}; restore it or train again") from error
    scores = _scores(path / CALIBRATION, content[CALIBRATION])
    if problem := metrics_problem(config.metrics, shape.features):
        raise CheckpointError(f"{path / CONFIG}: {problem}; restore it or train again")
    return Checkpoint(name, version, path, model, scores, config.interval_ms, config.training, config.metrics)


def _parse_config(path: Path) -> _Config:
    content = _bytes(path)
    try:
        kind = msgspec.json.decode(content, type=_Kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: {error}; restore it or train again") from error
    if kind.format != FORMAT:
        raise CheckpointError(
            f"{path}: format {kind.format}, and this program reads format {FORMAT}; use the tocsin that wrote it"
        )
    if kind.family != DeepAnT.family:
        raise CheckpointError(f"{path}: family {kind.family!r} is not known; known: {DeepAnT.family}")
    try:
        config = msgspec.json.decode(content, type=_Config)
    except msgspec.DecodeError as error:
        raise CheckpointError(f"{path}: {error}; restore it or train again") from error
    if config.interval_ms is not None and config.interval_ms < 1:
        raise CheckpointError(f"{path}: interval_ms={config.interval_ms} must be at least 1")
    return config


def _deepant_config(path: Path, shape: _Shape) -> DeepAnTConfig:
    try:
        return DeepAnTConfig(**msgspec.structs.asdict(shape))
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _network(path: Path, config: DeepAnTConfig, weights: Mapping[str, Tensor]) -> Network:
    """A network with these weights, each checked against the shape that the config asks for."""
    expected = config.shapes
    missing, extra = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    if missing or extra:
        raise CheckpointError(f"{path}: tensors missing: {missing}, unknown: {extra}; it belongs to another model")
    for name, shape in expected.items():
        tensor = weights[name]
        if tuple(tensor.shape) != shape:
            raise CheckpointError(f"{path}: {name} is {tuple(tensor.shape)} and the config asks for {shape}")
        if tensor.dtype != torch.float32:
            raise CheckpointError(f"{path}: {name} is {tensor.dtype} and must be torch.float32")
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{path}: {name} holds numbers that are not finite; train again")
    with torch.device("meta"):  # no random start values: the weights are all given
        network = Network(config)
    network.load_state_dict({name: weights[name].clone() for name in expected}, strict=True, assign=True)
    return network


def _scores(path: Path, content: bytes) -> NDArray[np.float32]:
    tensors = _safetensors(path, content)
    scores = tensors.get("scores")
    if scores is None or len(tensors) != 1 or scores.ndim != 1 or scores.dtype != torch.float32:
        found = {name: (tuple(tensor.shape), str(tensor.dtype)) for name, tensor in tensors.items()}
        raise CheckpointError(f"{path}: holds {found}, and one float32 vector named 'scores' is needed")
    if not bool((torch.isfinite(scores) & (scores >= 0)).all()):
        raise CheckpointError(f"{path}: a score is negative or not finite; train again")
    array: NDArray[np.float32] = scores.numpy().copy()
    return array


def _bytes(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > LARGEST_FILE:
            raise CheckpointError(f"{path}: {size} bytes, and at most {LARGEST_FILE} are read")
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}; restore it or train again") from error


def _safetensors(path: Path, content: bytes) -> dict[str, Tensor]:
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


def _roots(roots: Path | Sequence[Path]) -> tuple[Path, ...]:
    return (roots,) if isinstance(roots, Path) else tuple(roots)


def _entries(directory: Path) -> list[Path]:
    try:
        return list(directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be read: {error.strerror}; check its permissions") from error


def _versions_in(home: Path) -> list[int]:
    return sorted(int(entry.name) for entry in _entries(home) if _VERSION.fullmatch(entry.name) and entry.is_dir())


# --- writing ---------------------------------------------------------------------------------------------------------


def _files(name: str, bundle: Bundle) -> dict[str, bytes]:
    """Content of every file of a version, config.json last."""
    model = bundle.model
    for tensor_name, tensor in model.weights().items():
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{name}: {tensor_name} holds numbers that are not finite; train again")
    scores = torch.from_numpy(np.array(bundle.calibration, dtype=np.float32))
    if scores.ndim != 1 or not bool((torch.isfinite(scores) & (scores >= 0)).all()):
        raise CheckpointError(f"{name}: the calibration must be one vector of finite scores >= 0; train again")
    if problem := metrics_problem(bundle.metrics, model.features):
        raise CheckpointError(f"{name}: {problem}")
    content = {
        WEIGHTS: dump_safetensors(dict(model.weights())),
        CALIBRATION: dump_safetensors({"scores": scores}),
        CARD: _card(name, bundle).encode(),
    }
    config = _Config(
        format=FORMAT,
        family=model.family,
        model=_Shape(**{field: getattr(model.config, field) for field in _Shape.__struct_fields__}),
        scaling=_Scaling(
            model.center.tolist(),
            model.scale.tolist(),
            None if model.usual_step is None else model.usual_step.tolist(),
        ),
        interval_ms=bundle.interval_ms,
        training=bundle.training,
        sha256={file: hashlib.sha256(content[file]).hexdigest() for file in FILES},
        metrics=bundle.metrics,
    )
    content[CONFIG] = msgspec.json.format(msgspec.json.encode(config), indent=2) + b"\n"
    return content


def _card(name: str, bundle: Bundle) -> str:
    """The model for people, in Markdown."""
    model, training = bundle.model, bundle.training
    config = model.config
    one, several = ("KPI", "KPIs") if config.features == 1 else ("entity", "entities")
    use = f"the {one} it was trained on" if config.scaling == "train" else f"{several} it has never seen"
    if bundle.metrics and config.scaling == "train" and len(training.sources) > 1:
        use = f"{several} in the range of those it was trained on"
    interval = "mixed or unknown" if bundle.interval_ms is None else f"{bundle.interval_ms / 1000:g} s"
    lines = [
        f"# {name}",
        "",
        f"DeepAnT, {model.parameters:,} parameters: forecasts the next point of {use} from the {config.window} points "
        "before it. The error of the forecast is the anomaly score.",
        "",
        f"- features: {config.features}" + (f": {', '.join(bundle.metrics)}" if bundle.metrics else ""),
        f"- interval of the training data: {interval}",
        f"- scaling: {config.scaling}",
        f"- calibration: {len(bundle.calibration)} scores of held-out windows",
    ]
    if training.best_epoch:
        kept = training.held_out_losses[training.best_epoch - 1]
        lines.append(
            f"- trained on {training.windows:,} windows, seed {training.seed}, {training.epochs} epochs, the weights "
            f"of epoch {training.best_epoch} kept: held-out error {kept:.4g} of one standard deviation"
            + (
                ""
                if training.persistence_loss is None
                else f" (last value as forecast: {training.persistence_loss:.4g})"
            )
        )
    lines += [f"- {text}" for text in (training.notes, training.created) if text]
    if training.command:
        lines += ["", "    " + training.command.replace("\n", " ")]
    if training.sources:
        lines += ["", "| trained on | rows | SHA-256 |", "| --- | --- | --- |"]
        lines += [f"| {source.name} | {source.rows} | {source.sha256} |" for source in training.sources]
    return "\n".join(lines) + "\n"


def _write(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _publish(draft: Path, home: Path) -> Path:
    """Rename the draft to the next free version; another writer may take one at the same time."""
    while True:
        path = home / str(max(_versions_in(home), default=0) + 1)
        try:
            draft.rename(path)
            return path
        except OSError:
            if not path.exists():  # not taken by another writer: the disk refuses
                raise


# --- importing -------------------------------------------------------------------------------------------------------


def _foreign_tensors(path: Path, content: bytes) -> dict[str, Tensor]:
    """The tensors of a foreign file by name, in an order that follows the layers."""
    if path.suffix == ".safetensors":
        tensors = _safetensors(path, content)
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


def _constants(values: Float64 | Sequence[float] | None) -> Float64 | None:
    return None if values is None else np.array(values, dtype=np.float64)
