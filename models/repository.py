"""The model repository: named models, each with numbered versions and labels; with `importing` all that touches disk.

<root>/<name>/
    <version>/      the files of `models.checkpoint`
    labels.json     versions by label: {"stable": [3, 2], "canary": [4]}, the one in force first, then those before it

A version is written into a hidden directory beside its place and renamed there, so a reader sees all of it or none; so
are labels. NAME alone means what is labelled `stable`, or the highest version where nothing is. No file is unpickled.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from models.errors import CheckpointError
from models.refs import check_label, check_name, is_name, is_version, parse_ref

if TYPE_CHECKING:  # what names and labels are there can be told without torch
    from models.checkpoint import Bundle, Checkpoint

LABELS = "labels.json"
STABLE = "stable"
LARGEST_FILE = 2**30  # bytes; a stack of 10,000 small models is below 500 MB
LARGEST_LABELS = 2**16
_HISTORY = 20  # versions that a label remembers


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


def names(roots: Path | Sequence[Path]) -> list[str]:
    """Names of the models in the roots, sorted; those with a version only."""
    found = {
        entry.name for root in _roots(roots) for entry in _entries(root) if is_name(entry.name) and _versions_in(entry)
    }
    return sorted(found)


def home(roots: Path | Sequence[Path], name: str) -> Path | None:
    """Directory of a model in the first root that has it; None when none has.

    Raises:
        CheckpointError: the name is not one.
    """
    check_name(name)
    return next((root / name for root in _roots(roots) if _versions_in(root / name)), None)


def versions(roots: Path | Sequence[Path], name: str) -> list[int]:
    """Versions of a model in the first root that has it, ascending; empty when none has.

    Raises:
        CheckpointError: the name is not one.
    """
    found = home(roots, name)
    return [] if found is None else _versions_in(found)


def labels(roots: Path | Sequence[Path], name: str) -> dict[str, list[int]]:
    """Versions by label in the first root that has a model: the one in force first, then those before it.

    Raises:
        CheckpointError: the name is not one, or the labels cannot be read.
    """
    found = home(roots, name)
    return {} if found is None else _labels_in(found)


def resolve(roots: Path | Sequence[Path], ref: str) -> Path:
    """Directory of the version that a reference means now.

    Args:
        roots: repositories, searched in order; the first that has the name (and version or label, if given) is taken.
        ref: NAME, NAME@VERSION or NAME@LABEL.

    Raises:
        CheckpointError: there is none.
    """
    name, behind = parse_ref(ref)
    searched = _roots(roots)
    for root in searched:
        found = _versions_in(root / name)
        if isinstance(behind, int):
            version: int | None = behind
        elif found:
            chosen = _labels_in(root / name).get(behind or STABLE, [])
            version = chosen[0] if chosen else (None if behind else found[-1])
        else:
            continue
        if version in found:
            return root / name / str(version)
        if version is not None and not isinstance(behind, int):
            raise CheckpointError(
                f"{root / name / LABELS}: {behind or STABLE!r} is version {version}, which is not there; "
                f"it has versions {found}: promote one of them"
            )
    known = ", ".join(names(searched)) or "none"
    here = versions(searched, name)
    what = f"it has versions {here}" + _said_labels(labels(searched, name)) if here else f"models here: {known}"
    raise CheckpointError(f"no checkpoint {ref!r} in {', '.join(map(str, searched))}; {what}")


def is_absent(roots: Path | Sequence[Path], ref: str) -> bool:
    """Say whether there is nothing of that name and version or label, as against something that cannot be read."""
    try:
        name, behind = parse_ref(ref)
    except CheckpointError:  # no reference at all
        return True
    try:
        found = {version for root in _roots(roots) for version in versions(root, name)}
        labelled = {label for root in _roots(roots) for label in labels(root, name)}
    except CheckpointError:
        return False
    if isinstance(behind, str):
        return behind not in labelled
    return behind not in found if behind is not None else not found


def load(roots: Path | Sequence[Path], ref: str) -> Checkpoint:
    """Read the model that a reference means now, and check every part of it.

    Raises:
        CheckpointError: there is none, or it is damaged, of another format or family, or inconsistent. The message
            begins with the directory or file concerned.
    """
    return read(resolve(roots, ref))


def read(path: Path) -> Checkpoint:
    """Read the version that lies in a directory.

    Raises:
        CheckpointError: it is damaged, of another format or family, or inconsistent.
    """
    from models.checkpoint import decode

    return decode(path, path.parent.name, int(path.name), read_bytes)


def save(root: Path, name: str, bundle: Bundle) -> Path:
    """Write a bundle as the next version of a model and return its directory.

    The files are written and synced in a hidden directory, which is then renamed: a version is never half there.

    Raises:
        CheckpointError: the name is not one, a weight or score is not finite, or the disk refuses.
    """
    from models.card import card
    from models.checkpoint import encode

    check_name(name)
    place = root / name
    try:
        place.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=place))
        try:
            draft.chmod(0o755)  # mkdtemp's 0700 would hide it from the service's own user
            for file, content in encode(name, bundle, card(name, bundle)).items():
                _write(draft / file, content)
            _sync_directory(draft)
            path = _publish(draft, place)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        _sync_directory(place)
    except OSError as error:
        raise CheckpointError(f"{place}: cannot write the checkpoint: {error}; check space and permissions") from error
    return path


def promote(root: Path, ref: str, label: str = STABLE) -> int | None:
    """Give a label to a version, which has been read and found sound; return the version that had it.

    Raises:
        CheckpointError: there is no such version in this root, it cannot be used, or the disk refuses.
    """
    check_label(label)
    path = resolve(root, ref)
    read(path)
    found = _labels_in(path.parent)
    before, version = found.get(label, []), int(path.name)
    if before[:1] != [version]:
        found[label] = [version, *before][:_HISTORY]
        _write_labels(path.parent, found)
    return before[0] if before else None


def rollback(root: Path, name: str, label: str = STABLE) -> tuple[int, int]:
    """Take a label back to the version that had it before; return the version that has it no more, and that one.

    Raises:
        CheckpointError: nothing had it before, that version cannot be used, or the disk refuses.
    """
    check_label(label)
    place = home(root, name)
    if place is None:
        raise CheckpointError(f"no model {name!r} in {root}; models here: {', '.join(names(root)) or 'none'}")
    found = _labels_in(place)
    history = found.get(label, [])
    if len(history) < 2:
        raise CheckpointError(f"{place / LABELS}: no version had {label!r} before; promote one: NAME@VERSION")
    read(place / str(history[1]))
    found[label] = history[1:]
    _write_labels(place, found)
    return history[0], history[1]


def read_bytes(path: Path) -> bytes:
    """Return the content of a file of sensible size.

    Raises:
        CheckpointError: it cannot be read, or is too large.
    """
    try:
        size = path.stat().st_size
        if size > LARGEST_FILE:
            raise CheckpointError(f"{path}: {size} bytes, and at most {LARGEST_FILE} are read")
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}; restore it or train again") from error


def _roots(roots: Path | Sequence[Path]) -> tuple[Path, ...]:
    return (roots,) if isinstance(roots, Path) else tuple(roots)


def _entries(directory: Path) -> list[Path]:
    try:
        return list(directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be read: {error.strerror}; check its permissions") from error


def _versions_in(place: Path) -> list[int]:
    return sorted(int(entry.name) for entry in _entries(place) if is_version(entry.name) and entry.is_dir())


def _labels_in(place: Path) -> dict[str, list[int]]:
    path = place / LABELS
    try:
        if path.stat().st_size > LARGEST_LABELS:
            raise CheckpointError(f"{path}: {path.stat().st_size} bytes, and at most {LARGEST_LABELS} are read")
        found = msgspec.json.decode(path.read_bytes(), type=dict[str, list[int]])
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}; check its permissions") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: {error}; write it again with `tocsin models promote`") from error
    return found


def _said_labels(found: dict[str, list[int]]) -> str:
    said = ", ".join(f"{label} {versions[0]}" for label, versions in sorted(found.items()) if versions)
    return f" and labels {said}" if said else ""


def _write_labels(place: Path, found: dict[str, list[int]]) -> None:
    path = place / LABELS
    try:
        descriptor, draft = tempfile.mkstemp(prefix=".labels-", dir=place)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(msgspec.json.encode(found) + b"\n")
                file.flush()
                os.fsync(file.fileno())
            Path(draft).chmod(0o644)
            Path(draft).replace(path)
        finally:
            Path(draft).unlink(missing_ok=True)
        _sync_directory(place)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error}; check space and permissions") from error


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


def _publish(draft: Path, place: Path) -> Path:
    """Rename the draft to the next free version; another writer may take one at the same time."""
    while True:
        path = place / str(max(_versions_in(place), default=0) + 1)
        try:
            draft.rename(path)
            return path
        except OSError:
            if not path.exists():  # not taken by another writer: the disk refuses
                raise
