"""Where series are: groups of them by model, and the row that each has in its group."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from models.arrays import grown
from stream.columns import BoolArray, Columns, Int32Array, Int64Array
from stream.group import Group
from stream.incidents import State
from stream.results import Result, Served, Shared

NOWHERE = -1


class Places:
    """The groups of a detector, or those of the models that judge beside them.

    Attributes:
        groups: series by model.
        group_of: of each slot, the number of its group; NOWHERE of a series that none of them watches.
        row_of: of each slot, its row there.
        taken: how many series have a row.
        on_general: how many series the general model watches because the stack of their rule has none for them.
    """

    def __init__(self, shared: Shared, served: Sequence[Served | None], general: Served | None = None) -> None:
        """Make groups without series.

        Args:
            shared: what the groups have in common.
            served: the model of each rule; None of one that has none here. Equal ones share a group.
            general: watches the KPIs that a stack has no model for; None: nothing does.
        """
        self.groups: list[Group] = []
        self.group_of: Int32Array = np.zeros(0, np.int32)
        self.row_of: Int32Array = np.zeros(0, np.int32)
        self.taken = self.on_general = 0
        refs: dict[str, int] = {}

        def number_of(one: Served | None) -> int:
            if one is None:
                return NOWHERE
            if one.ref not in refs:
                refs[one.ref] = len(self.groups)
                self.groups.append(Group(shared, one))
            return refs[one.ref]

        self._of_rule = [number_of(one) for one in served]
        self._general = number_of(general if any(one is not None and one.members for one in served) else None)

    def resize(self, room: int) -> None:
        """Give room to so many slots."""
        self.group_of, self.row_of = grown(self.group_of, room, NOWHERE), grown(self.row_of, room, NOWHERE)

    def number_of(self, slot: int) -> int:
        """Return the number of the group of a slot, NOWHERE of a series that none of them watches."""
        return int(self.group_of[slot]) if self.groups else NOWHERE  # without groups it has no room

    def assign(self, slots: Int64Array, names: Sequence[str], rules: Int32Array) -> None:
        """Say of slots which group each belongs to; they have no rows yet."""
        at = zip(names, rules.tolist(), strict=True)
        self.group_of[slots] = [self._number_for(rule, name) for name, rule in at]
        self.row_of[slots] = NOWHERE

    def _number_for(self, rule: int, name: str) -> int:
        """Return the group that a series of a rule belongs to."""
        number = self._of_rule[rule] if rule >= 0 else NOWHERE
        return self._general if number >= 0 and self.groups[number].lacks(name) else number

    def add(self, slots: Int64Array, names: Sequence[str], rules: Int32Array) -> None:
        """Give series of groups their rows, all at once: each may have to be calibrated."""
        for number, group in enumerate(self.groups):
            own = np.flatnonzero(self.group_of[slots] == number)
            if len(own):
                some, of = slots[own].tolist(), rules[own].tolist()
                self.row_of[some] = group.add([names[i] for i in own.tolist()], of, some)
                self.taken += len(some)
                self.on_general += sum(self._of_rule[rule] != number for rule in of)

    def remove(self, slots: Int64Array) -> None:
        """Forget series that have rows; their slots stay in their groups."""
        for number, group in enumerate(self.groups):
            own = slots[(self.group_of[slots] == number) & (self.row_of[slots] >= 0)]
            if len(own):
                group.remove(self.row_of[own])
                self.row_of[own] = NOWHERE
                self.taken -= len(own)

    def opened(self, slots: Int64Array) -> BoolArray:
        """Say of each slot whether its series has an incident that was told and has not ended, (K,)."""
        opened = np.zeros(len(slots), np.bool_)
        for number, group in enumerate(self.groups):
            own = np.flatnonzero((self.group_of[slots] == number) & (self.row_of[slots] >= 0))
            opened[own] = group.judge.incidents.state[self.row_of[slots[own]]] == State.OPEN
        return opened

    def accept(self, points: Columns, result: Result, *, want_scores: bool = False) -> None:
        """Give every group its points; those of series that are nowhere are left out."""
        if not self.groups:
            return
        group_of = self.group_of[points.slot]
        for number, group in enumerate(self.groups):
            mine = group_of == number
            own = points if len(self.groups) == 1 and mine.all() else points.take(mine)
            if len(own):
                own = Columns(self.row_of[own.slot], own.timestamp_ms, own.value, own.row, own.feature)
                group.accept(own, result, want_scores=want_scores)
