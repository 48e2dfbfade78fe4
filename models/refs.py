"""How models are named: NAME, NAME@VERSION or NAME@LABEL."""

from __future__ import annotations

import re

from models.errors import CheckpointError

_NAME = re.compile(r"[a-z0-9_][a-z0-9_.-]{0,99}")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")
_LABEL = re.compile(r"[a-z][a-z0-9_-]{0,30}")


def is_name(text: str) -> bool:
    """Say whether a model can have this name."""
    return _NAME.fullmatch(text) is not None


def is_version(text: str) -> bool:
    """Say whether this is the number of a version."""
    return _VERSION.fullmatch(text) is not None


def check_name(name: str) -> str:
    """Return the name of a model if it is one.

    Raises:
        CheckpointError: it is not; above all when it would leave its root.
    """
    if not is_name(name):
        raise CheckpointError(
            f"{name!r} is not the name of a model: 1 to 100 of a-z 0-9 _ . - are, without a leading dot or dash"
        )
    return name


def check_label(label: str) -> str:
    """Return a label if it is one.

    Raises:
        CheckpointError: it is not.
    """
    if not _LABEL.fullmatch(label):
        raise CheckpointError(f"{label!r} is not a label: up to 31 of a-z 0-9 _ - are, beginning with a letter")
    return label


def parse_ref(ref: str) -> tuple[str, int | str | None]:
    """Split NAME, NAME@VERSION or NAME@LABEL; what stands behind is a number, a label or None.

    Raises:
        CheckpointError: it is none of them.
    """
    name, at, behind = ref.partition("@")
    check_name(name)
    if not at:
        return name, None
    if is_version(behind):
        return name, int(behind)
    if _LABEL.fullmatch(behind):
        return name, behind
    raise CheckpointError(f"{behind!r} in {ref!r} is no version and no label; write NAME@1, NAME@stable, or NAME")
