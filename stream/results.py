"""What goes into the core besides points, and what comes out of it: models, the common settings, counts, results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

from models.base import Model
from models.pot import PotConfig, Prior
from stream.columns import BoolArray, Float64Array, Int32Array, Int64Array
from stream.events import Event
from stream.policy import PolicyTable, Rule
from stream.records import Reject


@dataclass(frozen=True, slots=True)
class DetectorConfig:
    """What is the same for all series of a detector."""

    pot: PotConfig = field(default_factory=PotConfig)
    min_observed: float = 0.2  # share of a window that must have arrived; below it the forecast rests on itself
    # A flagged value enters the window as missing, completed by the forecast. One that lies less than this many times
    # its threshold from the forecast enters at the edge of the band: replaced, it would leave the forecast to itself,
    # and a single false alarm on a slope would last for hours (Hampel's rule: follow the near, ignore the far).
    follow_ratio: float = 2.0
    source: str = "tocsin"
    series_max: int = (
        1_000_000  # series of one detector; 0: no bound. Beyond it a new one takes the place of an idle one …
    )
    idle_ms: int = 7 * 86_400_000  # … whose newest point lies further than this behind the newest one of all


@dataclass(frozen=True, slots=True)
class Served:
    """A model as the core uses it."""

    ref: str  # NAME@VERSION, said in events
    model: Model
    metrics: tuple[str, ...] = ()  # names of its features, in order; empty for a model of one
    # Scores of held-out normal points of the very series that it is for, or of each member of a stack; or none.
    calibrations: tuple[Float64Array, ...] = ()
    prior: Prior | None = None  # tail of the scores of series like those it is for, until a series has its own
    members: Mapping[str, int] = field(default_factory=dict)  # of a stack: which weights are those of a series


@dataclass(slots=True)
class Counts:
    """What a detector has done, for people; not part of its state."""

    points: int = 0  # decoded points that came in
    missing: int = 0  # of them without a value
    unwatched: int = 0  # of series that no rule watches
    scored: int = 0  # cells that got a score
    completed: int = 0  # missing cells that the model completed
    flagged: int = 0  # anomalous cells
    duplicates: int = 0  # points that fell into a cell that was taken
    late: int = 0  # points older than the newest of their series, still inside its window
    too_late: int = 0  # points older than the window: rejected
    revised: int = 0  # late points that made cells be scored again
    gaps: int = 0  # gaps longer than the window: it began anew
    regridded: int = 0  # series that got another interval
    refused: int = 0  # points of new series that there was no room for: rejected
    evicted: int = 0  # idle series that gave their places to new ones
    events: int = 0
    shadow_events: int = 0  # of models that judge beside the first

    def add(self, other: Counts) -> None:
        """Add another's counts to these."""
        for f in fields(self):
            setattr(self, f.name, getattr(self, f.name) + getattr(other, f.name))

    def as_dict(self) -> dict[str, int]:
        """Return the counts by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True, slots=True)
class Shared:
    """What all groups of a detector have in common.

    Attributes:
        config: what is the same for all series.
        rules: of the detector.
        table: the policies of the rules.
        counts: where it is counted.
        names: of all series, by slot; they may become more.
    """

    config: DetectorConfig
    rules: Sequence[Rule]
    table: PolicyTable
    counts: Counts
    names: Sequence[str]


@dataclass(frozen=True, slots=True)
class Scores:
    """One row a cell that was passed: what came, what was expected, how it was judged. NaN is "none".

    An entity has no single value, expected value and band: they are NaN.
    """

    slot: Int32Array
    timestamp_ms: Int64Array
    value: Float64Array
    expected: Float64Array
    lower: Float64Array  # the band that is normal
    upper: Float64Array
    score: Float64Array
    threshold: Float64Array
    probability: Float64Array
    anomaly: BoolArray


@dataclass(slots=True)
class Result:
    """What a batch gave: events in the order of the points that caused them, and points that were refused."""

    events: list[Event] = field(default_factory=list)
    event_rows: list[int] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    shadow: list[Event] = field(default_factory=list)  # in order; what models say that judge beside the first
    scores: list[Scores] = field(default_factory=list)
    evicted: list[str] = field(default_factory=list)  # names of series that are forgotten; one may be back already

    def in_order(self) -> Result:
        """Put events and rejects into the order of their records, however the points were cut into batches.

        A record of an entity that is watched metric by metric can cause one of each: its events go by the name of the
        series, and of its rejects one stays, for it is one record that is refused.
        """
        order = sorted(range(len(self.events)), key=lambda i: (self.event_rows[i], self.events[i].subject))
        self.events = [self.events[i] for i in order]
        self.event_rows = [self.event_rows[i] for i in order]
        first: dict[int, Reject] = {}
        for reject in sorted(self.rejects, key=lambda reject: (reject.row, reject.detail)):
            first.setdefault(reject.row, reject)
        self.rejects = list(first.values())
        return self
