"""A model in the shadow of another says what it would say alone, and changes nothing of what the first one says."""

from typing import Any

import msgspec
import numpy as np
import pytest

from models.base import Context, Float64
from stream import events, snapshot
from stream.detector import Detector, Result, Served
from stream.events import EventData
from tests.helpers import MINUTE, Halfway, Persistence, Setup, columns, config
from tests.helpers import normal_points as points_of

FIRST, SECOND = Served("persistence@1", Persistence()), Served("halfway@2", Halfway())
LENGTH = 400
FAR = (60, 61, 150, 290, 291, 292)
POINTS = [(name, t, 1000.0 + k if k in FAR else v) for k, (name, t, v) in enumerate(points_of(LENGTH))]


def made(first: Served = FIRST, shadow: Served | None = SECOND, **policy: Any) -> Detector:
    setup: Setup = config(**policy)
    return Detector(setup.config, setup.rules, [first], shadows=[shadow])


def fed(detector: Detector, cuts: int = 1) -> Result:
    """All points in so many batches."""
    whole = Result()
    for part in np.array_split(np.arange(len(POINTS)), cuts):
        some = detector.accept(columns(detector, [POINTS[i] for i in part], int(part[0])))
        whole.events += some.events
        whole.shadow += some.shadow
    return whole


def plain(said: list[events.Event]) -> list[bytes]:
    return [events.encode(msgspec.structs.replace(e, data=msgspec.structs.replace(e.data, shadow=False))) for e in said]


@pytest.mark.parametrize("policy", [{}, {"lateness_ms": 3 * MINUTE}, {"lateness_ms": 3 * MINUTE, "wait": True}])
def test_each_says_what_it_would_say_alone(policy: dict[str, Any]) -> None:
    both = made(**policy)
    result = fed(both)
    assert plain(result.events) == plain(fed(made(shadow=None, **policy)).events)
    assert plain(result.shadow) == plain(fed(made(SECOND, None, **policy)).events)
    assert result.events and result.shadow and plain(result.events) != plain(result.shadow)
    assert all(isinstance(e.data, EventData) and e.data.shadow for e in result.shadow)
    assert not any(isinstance(e.data, EventData) and e.data.shadow for e in result.events)
    assert (both.counts.events, both.counts.shadow_events) == (len(result.events), len(result.shadow))
    assert both.counts.points == LENGTH, "points count once"
    assert events.decode(events.encode(result.shadow[0])) == result.shadow[0]


def test_batches_and_restores_change_nothing() -> None:
    expected, live, said = fed(made()), made(), Result()
    for part in np.array_split(np.arange(len(POINTS)), 23):
        some = live.accept(columns(live, [POINTS[i] for i in part], int(part[0])))
        said.events += some.events
        said.shadow += some.shadow
        blobs = snapshot.pack(live, np.arange(len(live.index.names), dtype=np.int32))
        assert len(blobs) == 2 or part[0] == 0
        live = made()
        assert snapshot.unpack(live, blobs).refused == []
    assert plain(said.shadow) == plain(expected.shadow)
    assert plain(said.events) == plain(expected.events)


def test_a_shadow_that_comes_later_begins_and_one_that_goes_is_forgotten() -> None:
    alone, half = made(shadow=None), LENGTH // 2
    alone.accept(columns(alone, POINTS[:half]))
    both = made()
    blobs = snapshot.pack(alone, np.zeros(1, np.int32))
    assert snapshot.unpack(both, blobs).series == 1
    later = both.accept(columns(both, POINTS[half:], half))
    assert later.shadow, "it has warmed up and judges"
    blobs = snapshot.pack(both, np.zeros(1, np.int32))
    again = made(shadow=None)
    outcome = snapshot.unpack(again, blobs)
    assert (outcome.series, outcome.refused) == (1, [])
    assert snapshot.pack(again, np.zeros(1, np.int32)).keys() == {b"a"}


# -- stacks ------------------------------------------------------------------------------------------------------------


class Offsets(Persistence):
    """A stack of two: expects the last value, and so much more."""

    @property
    def neutral(self) -> Float64:
        return np.zeros((2, 1))

    def expected(self, context: Context) -> Float64:
        assert context.member is not None
        expected: Float64 = super().expected(context) + np.array([0.0, 100.0])[context.member][:, None]
        return expected


def test_a_kpi_without_weights_of_its_own_is_judged_by_the_general_model() -> None:
    setup = config()
    stack = Served("stack@1", Offsets(), members={"a": 0, "b": 1})
    live = Detector(setup.config, setup.rules, [stack], general=FIRST)
    scores = {}
    for name in ("a", "b", "c"):
        part = live.accept(columns(live, [(name, t, v) for _, t, v in POINTS[:40]]), want_scores=True).scores
        expected = np.concatenate([one.expected for one in part])
        values = np.concatenate([one.value for one in part])
        scores[name] = float(np.nanmedian(expected[1:] - values[:-1]))  # but for what was flagged
    assert scores == pytest.approx({"a": 0.0, "b": 100.0, "c": 0.0}, abs=1e-3)
    refs = {name: live.groups[live.group_of[live.index[name]]].served.ref for name in ("a", "b", "c")}
    assert refs == {"a": "stack@1", "b": "stack@1", "c": FIRST.ref}


def test_each_member_has_its_own_calibration() -> None:
    setup = config()
    loose, strict = 1e6 + np.arange(200.0), 1e-6 * np.arange(1.0, 201.0)
    stack = Served("stack@1", Offsets(), calibrations=(loose, strict), members={"a": 0, "c": 1})
    live = Detector(setup.config, setup.rules, [stack], general=FIRST)
    told = {}
    for name in ("a", "c"):
        result = live.accept(columns(live, [(name, t, v) for _, t, v in POINTS[:30]]), want_scores=True)
        told[name] = np.concatenate([one.threshold for one in result.scores])
    assert np.nanmin(told["a"]) > 1e6 and np.nanmin(told["c"]) < 1.0


def test_entities_have_shadows_too() -> None:
    setup = config()
    metrics = ("x", "y")
    first = Served("p@1", Persistence(features=2), metrics)
    second = Served("h@1", Halfway(features=2), metrics)
    live = Detector(setup.config, setup.rules, [first], shadows=[second])
    rng = np.random.default_rng(0)
    values = rng.normal(size=(200, 2)) + 50 * (np.arange(200) % 70 == 69)[:, None]
    arrivals = [("m", k * MINUTE, {0: float(v[0]), 1: float(v[1])}) for k, v in enumerate(values)]
    result = live.accept(columns(live, arrivals))
    assert {e.subject for e in result.shadow} == {"m"} and result.shadow
