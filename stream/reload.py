"""The rules file while the service runs: read again when its content changes, kept as it was when the new one is wrong.

The content decides, not the time of the file: a mounted ConfigMap is swapped by a link, an editor renames, and `touch`
changes nothing. A content counts once two looks in a row have found the same, so that a file half written is harmless
even where its first half is a correct file of fewer rules.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from functools import partial
from pathlib import Path

from stream.errors import ConfigError
from stream.policy import Policy
from stream.rules import Q_MAX, RuleSet, load_rules, read_file

Seen = dict[Path, str]  # digest of what a file held; or why it could not be read


class RulesFile:
    """A rules file, and the rules that are in force.

    Not for several threads at a time; `current` may be read from any.
    """

    def __init__(
        self, path: Path, defaults: Policy, *, q_max: float = Q_MAX, reserved_topics: Collection[str] = ()
    ) -> None:
        """Read the file for the first time.

        Raises:
            ConfigError: it is wrong; there is nothing to go on with.
        """
        self.path = path
        self._load_rules = partial(load_rules, path, defaults, q_max=q_max, reserved_topics=reserved_topics)
        rules, self._tried = self._load()
        if isinstance(rules, ConfigError):
            raise rules
        self.current: RuleSet = rules
        self._last = self._tried

    def changed(self) -> RuleSet | None:
        """Look at the files; return the new rules, once, when they have changed and held still since the last look.

        Raises:
            ConfigError: the new content is wrong, told once; `current` stays in force.
        """
        seen = {path: _look(path) for path in self._tried}
        held_still, self._last = seen == self._last, seen
        if seen == self._tried or not held_still:
            return None
        rules, tried = self._load()
        if any(tried.get(path, state) != state for path, state in seen.items()):
            return None  # written to between the look and the reading
        self._tried = self._last = tried
        if isinstance(rules, ConfigError):
            raise rules
        if rules.digest == self.current.digest:  # back to what is in force, after something wrong
            return None
        self.current = rules
        return rules

    def _load(self) -> tuple[RuleSet | ConfigError, Seen]:
        """Return the rules, or what is wrong with them, and what was read for it."""
        seen: Seen = {}

        def read(path: Path) -> bytes:
            try:
                data = read_file(path)
            except ConfigError as e:
                seen[path] = str(e)
                raise
            seen[path] = hashlib.sha256(data).hexdigest()
            return data

        try:
            return self._load_rules(read=read), seen
        except ConfigError as e:
            return e, seen


def _look(path: Path) -> str:
    try:
        return hashlib.sha256(read_file(path)).hexdigest()
    except ConfigError as e:
        return str(e)
