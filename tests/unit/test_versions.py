"""State blobs of earlier versions go on; those of later ones are refused, each by itself."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.pot import PotConfig, Spot
from stream import snapshot, versions
from stream.detector import Detector
from stream.errors import StateError
from stream.group import Group
from stream.incidents import State
from tests.helpers import MINUTE, SMALL_POT, T0, columns, config, detector, normal_points

WROTE = json.loads((Path(__file__).parent / "data" / "state_version_1.json").read_text())
THEN: Mapping[str, Any] = WROTE["series"]
BLOBS_1 = {name.encode(): bytes.fromhex(one["blob"]) for name, one in THEN.items()}
LAYOUT = Spot(SMALL_POT).dtype
HEADER_1 = 20


def packed(of: Detector) -> dict[bytes, bytes]:
    return snapshot.pack(of, np.arange(len(of.index.names), dtype=np.int32))


def group_of(of: Detector, name: str) -> tuple[Group, int]:
    slot = of.index[name]
    return of.groups[int(of.group_of[slot])], int(of.row_of[slot])


def history(of: Detector, name: str) -> tuple[Any, Any]:
    """The window of a series as its model sees it, oldest first."""
    group, row = group_of(of, name)
    at = np.array([row], np.int32)
    values, learned = group.windows.history(at, group.windows.newest[at] + 1)
    return values.ravel(), learned.ravel()


def restored(blobs: Mapping[bytes, bytes]) -> tuple[Detector, snapshot.Restored]:
    fresh = detector()
    return fresh, snapshot.unpack(fresh, blobs)


def sealed(blob: bytes, field: bytes = b"short") -> bytes:
    """A blob of version 1 whose checksum is right."""
    header, body = blob[: HEADER_1 - 4], blob[HEADER_1:]
    return header + zlib.crc32(body, zlib.crc32(header, zlib.crc32(field))).to_bytes(4, "little") + body


# -- version 1 --------------------------------------------------------------------------------------------------------


def test_a_state_of_version_1_goes_on_where_it_was() -> None:
    fresh, outcome = restored(BLOBS_1)
    assert (outcome.series, outcome.refused) == (3, [])
    assert outcome.recalibrating == 3, "no model of that time is there any more: thresholds begin anew"
    for name in ("open", "short"):
        then, (group, row) = THEN[name], group_of(fresh, name)
        for part, fields in (
            (group.placing, ("interval_ms", "phase_ms")),
            (group.windows, ("newest", "filled")),
            (group.incidents, ("id", "opened_ms", "anomalies", "peak_value")),
        ):
            for field in fields:
                assert getattr(part, field)[row] == then[field], (name, field)
        assert group.windows.step_mean[row, 0] == then["step_mean"]
        assert group.windows.steps[row, 0] == then["steps"]
        values, learned = history(fresh, name)
        np.testing.assert_array_equal(values, then["history"][0])
        np.testing.assert_array_equal(learned, then["history"][1])
        assert group.incidents.state[row] == (State.OPEN if then["open"] else State.CLEAR)
        assert fresh.silence.last_ms[fresh.index[name]] == then["phase_ms"] + then["newest"] * MINUTE
        assert not group.placing.probing[row]


def test_the_incident_of_version_1_is_resolved_under_its_id() -> None:
    fresh, _ = restored(BLOBS_1)
    known = fresh.accept(columns(fresh, normal_points(3, name="open", start=T0 + 120 * MINUTE)))
    assert known.events == []  # without a threshold nothing is judged; with one it ends
    more = fresh.accept(columns(fresh, normal_points(60, name="open", start=T0 + 123 * MINUTE, seed=2)))
    assert [event.type.rsplit(".", 1)[-1] for event in more.events][:1] == ["resolved"]
    assert format(THEN["open"]["id"], "016x") in more.events[0].id


def test_a_probing_series_of_version_1_finds_its_interval_with_the_points_that_it_held() -> None:
    fresh, _ = restored({b"probing": BLOBS_1[b"probing"]})
    group, row = group_of(fresh, "probing")
    assert group.placing.probing[row]
    held = [("probing", time, value) for time, value in THEN["probing"]["held"]]
    rest = [("probing", held[-1][1] + i * MINUTE, 10.0 + i) for i in range(1, 6)]
    unbroken = detector()
    unbroken.accept(columns(unbroken, [*held, *rest]))
    fresh.accept(columns(fresh, rest))
    assert not group.placing.probing[row]
    np.testing.assert_array_equal(history(fresh, "probing")[0], history(unbroken, "probing")[0])


def test_what_is_written_then_is_of_the_version_of_now() -> None:
    fresh, _ = restored(BLOBS_1)
    again = packed(fresh)
    assert {versions.version_of(blob) for blob in again.values()} == {snapshot.VERSION}
    assert packed(restored(again)[0]) == again


def test_windows_of_all_lengths_are_told_by_the_length_of_the_record() -> None:
    for ring in (32, 128):
        layout = Spot(PotConfig(max_excess=ring)).dtype
        for window in (*range(1, 130), 1000, 65_537):
            assert versions._window_1(versions._row_1(window, layout).itemsize, layout) == window
        sizes = {versions._row_1(window, layout).itemsize for window in range(1, 200)}
        strangers = set(range(max(sizes))) - sizes
        assert {versions._window_1(size, layout) for size in strangers} == {None}


@pytest.mark.parametrize(
    ("blob", "why"),
    [
        (BLOBS_1[b"short"][:-1] + b"\x55", "version 1: damaged"),
        (BLOBS_1[b"open"], "version 1: damaged"),  # another series' state under this name
        (BLOBS_1[b"short"][:10], "version 1: 10 bytes are too few"),
        (sealed(BLOBS_1[b"short"][:3] + b"X" + BLOBS_1[b"short"][4:]), "kind b'X'"),
        (sealed(BLOBS_1[b"short"][: HEADER_1 + 32] + b"\x63" + BLOBS_1[b"short"][HEADER_1 + 33 :]), "out of their"),
    ],
)
def test_what_is_no_state_of_version_1_is_refused_by_name(blob: bytes, why: str) -> None:
    fresh, outcome = restored({b"short": blob, b"probing": BLOBS_1[b"probing"]})
    assert outcome.series == 1, "the other goes on"
    (problem,) = outcome.refused
    assert str(problem).startswith("state of 'short': ") and why in str(problem)
    assert group_of(fresh, "probing")[0].placing.probing.any()


def test_another_ring_is_refused_by_name() -> None:
    other = config(pot=PotConfig(q=0.05, level=0.75, min_scores=20, min_excess=10, max_excess=32)).detector()
    (problem,) = snapshot.unpack(other, {b"short": BLOBS_1[b"short"]}).refused
    assert "ring" in str(problem)


# -- any version ------------------------------------------------------------------------------------------------------


def test_steps_are_taken_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[bytes] = []

    def from_0(field: bytes, blob: bytes, threshold: versions.Dtype) -> bytes:
        taken.append(field)
        assert blob == b"TK\x00" and threshold == LAYOUT
        return BLOBS_1[field]

    monkeypatch.setitem(versions.MIGRATIONS, 0, from_0)
    fresh, outcome = restored({b"short": b"TK\x00", b"open": BLOBS_1[b"open"]})
    assert (outcome.series, taken) == (2, [b"short"])
    assert packed(fresh) == packed(restored({name: BLOBS_1[name] for name in (b"short", b"open")})[0])


def test_a_later_version_is_refused_by_name_and_stops_no_other() -> None:
    now = packed(restored(BLOBS_1)[0])
    later = bytearray(now[b"short"])
    later[2] = snapshot.VERSION + 1
    fresh, outcome = restored(now | {b"short": bytes(later)})
    assert outcome.series == 2
    assert [str(problem) for problem in outcome.refused] == [
        "state of 'short': version 3 is unknown, this program reads 1 to 2; a later program wrote it"
    ]
    assert "short" not in fresh.index


def test_a_step_that_leads_nowhere_is_a_mistake_of_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(versions.MIGRATIONS, 0, lambda field, blob, threshold: blob)
    with pytest.raises(AssertionError, match="from version 0 led to 0"):
        restored({b"short": b"TK\x00"})


def test_the_layout_of_the_last_step_is_that_of_now() -> None:
    for window in (1, 9, 65_536):
        assert versions._row_2(window, LAYOUT) == snapshot.record_dtype(window, 1, LAYOUT)
    assert max(versions.MIGRATIONS) == snapshot.VERSION - 1


def test_every_step_refuses_noise() -> None:
    rng = np.random.default_rng(0)
    for version in versions.MIGRATIONS:
        for size in range(0, 400, 7):
            noise = versions.MAGIC + bytes([version]) + rng.bytes(size)
            with pytest.raises(StateError, match="'x'"):
                versions.brought_to(snapshot.VERSION, b"x", noise, LAYOUT)


@given(
    name=st.sampled_from([b"open", b"short", b"probing"]),
    changes=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4),
)
def test_any_content_of_version_1_under_a_right_checksum_is_taken_or_refused(
    name: bytes, changes: list[tuple[int, int]]
) -> None:
    blob = bytearray(BLOBS_1[name])
    for at, value in changes:
        blob[HEADER_1 + at % (len(blob) - HEADER_1)] = value
    fresh, outcome = restored({name: sealed(bytes(blob), name)})
    assert outcome.series + len(outcome.refused) == 1
    assert len(packed(fresh)) == outcome.series
