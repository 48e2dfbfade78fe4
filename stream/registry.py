"""The checkpoints in use: read once, looked for again while the service runs, and never missed.

What a reference means can change: another version is labelled `stable`, or a higher one appears. A checkpoint that is
not there or cannot be used silences nobody: the version that was in use stays, else the general one takes its place.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from models import repository
from models.checkpoint import CONFIG, Checkpoint
from models.pot import PotConfig, Prior
from stream.errors import CheckpointError, ConfigError
from stream.policy import Rule
from stream.results import Served

log = logging.getLogger(__name__)

GENERAL = "deepant"  # of the bundled repository: for any KPI


@dataclass(frozen=True, slots=True)
class Chosen:
    """The models of rules, one a rule; None where it has none."""

    served: tuple[Served | None, ...]
    shadows: tuple[Served | None, ...]
    general: Served


@dataclass(frozen=True, slots=True)
class _Loaded:
    served: Served
    version: tuple[Path, int, int]  # where it lies, and what tells it from another that was put in its place


class Registry:
    """Reads checkpoints for rules, and keeps those in use."""

    def __init__(self, roots: Sequence[Path], default: str, pot: PotConfig, *, source: str = "") -> None:
        """Read nothing yet.

        Args:
            roots: repositories, searched in order.
            default: the reference of rules that name no model.
            pot: what priors are fitted for.
            source: where the rules stand, for messages.
        """
        self.source = source
        self.roots = tuple(roots)
        self.default = default
        self.pot = pot
        self._in_use: dict[str, _Loaded] = {}
        self._seen: dict[str, tuple[Path, int, int] | str] = {}  # where references led at the last choice, or why not
        self._last = self._seen
        self._given: Checkpoint | None = None
        self._general: Served | None = None

    def choose(self, rules: Sequence[Rule], given: Checkpoint | None = None, *, strict: bool = False) -> Chosen:
        """Return the models that rules ask for; what no rule asks for any more is let go.

        Args:
            rules: in their order.
            given: takes the place of the default.
            strict: raise where one is not there or cannot be used, instead of going on without it.

        Raises:
            ConfigError: strict: a rule names a checkpoint that is not there, or a shadow that its model's points do not
                fit. Else: the default is not there.
            CheckpointError: strict: one cannot be used.
        """
        self._given = given
        wanted = dict.fromkeys(one for rule in rules if rule.watch for one in (rule.model, rule.shadow or None))
        self._seen = self._last = {ref: self._look(ref or self.default) for ref in wanted if ref is not None}
        models: dict[str, Served] = {}
        for ref in self._seen:
            rule = next((rule for rule in rules if rule.watch and ref in (rule.model, rule.shadow)), Rule())
            field = "model" if rule.model == ref else "shadow"
            where = f"{self.source}:{rule.line}: rule {rule.name!r}: {field}: " if ref and rule.line else ""
            models[ref] = self._model(ref, where, strict=strict)
        served = tuple(models[rule.model] if rule.watch else None for rule in rules)
        shadows = tuple(
            _beside(rule, models[rule.shadow], one, strict=strict)
            if one is not None and rule.shadow and (rule.shadow in self._in_use or models[rule.shadow] is one)
            else None  # and the general one in place of a shadow would prove nothing
            for rule, one in zip(rules, served, strict=True)
        )
        self._in_use = {ref: loaded for ref, loaded in self._in_use.items() if ref in models}
        return Chosen(served, shadows, self.general())

    def changed(self) -> bool:
        """Look again; say, once, whether a reference in use leads elsewhere, and has done so at two looks in a row."""
        seen = {ref: self._look(ref or self.default) for ref in self._seen if ref or self._given is None}
        held_still, self._last = seen == self._last, seen
        return held_still and any(self._seen[ref] != now for ref, now in seen.items())

    def general(self) -> Served:
        """Return the model that any KPI can be watched by.

        Raises:
            CheckpointError: the program was not installed whole.
        """
        if self._general is None:
            self._general = served(repository.load(repository.bundled_root(), GENERAL), self.pot)
        return self._general

    def _look(self, ref: str) -> tuple[Path, int, int] | str:
        try:
            path = repository.resolve(self.roots, ref)
            state = (path / CONFIG).stat()
        except (CheckpointError, OSError) as e:
            return str(e)
        return path, state.st_ino, state.st_mtime_ns

    def _model(self, ref: str, where: str, *, strict: bool) -> Served:
        if not ref and self._given is not None:
            return served(self._given, self.pot)
        known, version = self._in_use.get(ref), self._seen[ref]
        if known is not None and known.version == version:
            return known.served
        asked = ref or self.default
        try:
            if isinstance(version, str):
                raise ConfigError(version) if repository.is_absent(self.roots, asked) else CheckpointError(version)
            loaded = _Loaded(served(repository.read(version[0]), self.pot), version)
        except (ConfigError, CheckpointError) as e:
            if strict or (not ref and known is None and isinstance(e, ConfigError)):
                raise type(e)(f"{where}{e}") from None
            instead = self.general() if known is None else known.served
            log.error("%smodel %s cannot be used, %s goes on in its place: %s", where, asked, instead.ref, e)
            return instead
        self._in_use[ref] = loaded
        return loaded.served


def served(checkpoint: Checkpoint, pot: PotConfig) -> Served:
    """Return a checkpoint as the core uses it.

    Raises:
        CheckpointError: it takes several features and does not name them.
    """
    features, metrics = checkpoint.model.features, checkpoint.metrics
    if features > 1 and len(metrics) != features:
        raise CheckpointError(
            f"{checkpoint.ref} takes {features} features and names {len(metrics)} metrics: train it anew with --entity"
        )
    scores = [np.asarray(one, np.float64) for one in checkpoint.calibrations]
    own, some = checkpoint.calibrated, sum(map(len, scores)) > 0
    return Served(
        checkpoint.ref,
        checkpoint.model,
        checkpoint.metrics,
        calibrations=tuple(scores) if own else (),
        prior=Prior.fit(np.concatenate(scores), pot) if some and not own else None,
        members={name: at for at, name in enumerate(checkpoint.members)},
    )


def features_of(rules: Sequence[Rule], chosen: Chosen) -> Mapping[str, int]:
    """Return how many features models take, by their references as rules write them."""
    pairs = zip(rules, chosen.served, strict=True)
    return {rule.model: one.model.features for rule, one in pairs if one is not None}


def _beside(rule: Rule, shadow: Served, first: Served, *, strict: bool) -> Served | None:
    """Return a shadow that can judge the points of a rule's model; of other features it cannot."""
    if shadow.metrics == first.metrics and not (shadow.members and not first.members):
        return shadow
    what = "is a stack" if shadow.members else f"takes other metrics than {first.ref}"
    problem = f"rule {rule.name!r}: shadow {shadow.ref} {what}; it cannot judge the same points"
    if strict:
        raise ConfigError(problem)
    log.error("%s: nothing judges beside %s", problem, first.ref)
    return None
