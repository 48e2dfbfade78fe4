"""What series that correct their events keep of the recent past, so that a late point can send them back to it.

Two copies of their state, in the rows behind their own, from before cells that lie the lateness apart: the newest two
are enough. And all that came since: what a cell holds, what only filled one in, and what was said.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from models.arrays import grown
from stream.columns import BoolArray, Float64Array, Int32Array, Int64Array
from stream.events import Event
from stream.grid import NO_CELL
from stream.revision import Said, Statement, forget, say

COPIES = 2  # rows that a series needs besides its own


class Past:
    """The recent past of S series, of which those in `corrects` have one.

    Attributes:
        corrects: whether a series corrects its events, (S,) bool.
        copied: the cells that the copies were taken before, the later one first, (S, 2) int64; NO_CELL for no copy.
        raw: what came for each cell of the window, a ring, (S, W, F) float64.
        stamp: its event time, (S, W) int64.
        statements: by series, what was said of cells that can still be revised.
        fills: by series, (newest cell then, cell, value) of what only filled in.
    """

    def __init__(self, window: int, features: int) -> None:
        self.window = window
        self.corrects: BoolArray = np.zeros(0, np.bool_)
        self.copied: Int64Array = np.zeros((0, COPIES), np.int64)
        self.raw: Float64Array = np.zeros((0, window, features))
        self.stamp: Int64Array = np.zeros((0, window), np.int64)
        self.statements: dict[int, list[Statement]] = {}
        self.fills: dict[int, list[tuple[int, int, float]]] = {}

    def resize(self, rows: int, *, some: bool) -> None:
        """Give room to so many series; of what only those that correct need, if there are `some`."""
        self.corrects = grown(self.corrects, rows)
        if some:
            self.copied = grown(self.copied, rows, NO_CELL)
            self.raw, self.stamp = grown(self.raw, rows, np.nan), grown(self.stamp, rows)

    def reset(self, slot: Int64Array) -> None:
        """Make these rows those of series that have no past."""
        for one in slot.tolist():
            self.statements.pop(one, None)
            self.fills.pop(one, None)
        self.corrects[slot] = False
        self.forget_copies(slot)
        if len(self.copied):
            self.raw[slot], self.stamp[slot] = np.nan, 0

    def forget_copies(self, slot: Int32Array | Int64Array) -> None:
        """Let series, (K,), not go back to before now; where none corrects its events there are no copies."""
        if len(self.copied):
            self.copied[slot] = NO_CELL

    def forget_grid(self, slot: int, ongoing: str) -> None:
        """What was said of another grid stands; `ongoing` is the incident that goes on."""
        if slot in self.statements:
            for statement in self.statements[slot]:
                statement.cell = NO_CELL
            self.statements[slot] = forget(self.statements[slot], NO_CELL + 1, ongoing)
        self.fills.pop(slot, None)

    def note(self, slot: Int32Array, cell: Int64Array, value: Float64Array, stamp: Int64Array) -> None:
        """Keep what came for cells, (K, F), and its event times, (K,)."""
        self.raw[slot, cell % self.window] = value
        self.stamp[slot, cell % self.window] = stamp

    def note_fill(self, slot: int, newest: int, cell: int, value: float) -> None:
        """Keep a value that filled a cell in, to be filled in again should the series go back."""
        self.fills.setdefault(slot, []).append((newest, cell, value))

    def reaches(self, slot: Int32Array, cell: Int64Array) -> BoolArray:
        """Say of each series whether a copy of it is from before a cell, (K,)."""
        copied = self.copied[slot]
        back: BoolArray = cell >= np.where(copied == NO_CELL, -NO_CELL, copied).min(axis=1)
        return back

    def due(self, slot: Int32Array, cell: Int64Array, apart: Int64Array) -> BoolArray:
        """Say of each series whether a copy has to be taken before a cell, as many apart as given, (K,)."""
        latest = self.copied[slot, 0]
        due: BoolArray = (latest == NO_CELL) | ((cell % apart == 0) & (cell != latest))
        return due

    def copy_taken(self, slot: Int32Array, cell: Int64Array, ongoing: Sequence[str]) -> None:
        """Note that copies were taken before cells; what lies before the older ones can no longer be revised."""
        self.copied[slot, 1] = self.copied[slot, 0]
        self.copied[slot, 0] = cell
        for one, oldest, incident in zip(slot.tolist(), self.copied[slot, 1].tolist(), ongoing, strict=True):
            if oldest != NO_CELL:
                if one in self.statements:
                    self.statements[one] = forget(self.statements[one], oldest, incident)
                if one in self.fills:
                    self.fills[one] = [fill for fill in self.fills[one] if fill[0] >= oldest]

    def say(self, slot: int, said: Said) -> Event:
        """Return the event that says something of a series, and keep it if it may have to be corrected."""
        return say(self.statements.setdefault(slot, []), said) if self.corrects[slot] else said.event
