"""State blobs of earlier versions go on; those of later ones are refused, each by itself."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.pot import PotConfig, Spot
from stream import snapshot, versions
from stream.blobs import SHADOW, VERSION
from stream.columns import Columns
from stream.detector import Detector, Result, Served
from stream.errors import StateError
from stream.group import Group
from stream.incidents import State
from stream.policy import Policy, Rule
from tests.helpers import MINUTE, SMALL_POT, T0, Halfway, Persistence, columns, config, detector, normal_points

DATA = Path(__file__).parent / "data"
WROTE = json.loads((DATA / "state_version_1.json").read_text())
WROTE_2 = json.loads((DATA / "state_version_2.json").read_text())
BLOBS_2 = {name.encode(): bytes.fromhex(blob) for name, blob in WROTE_2["blobs"].items()}
HEADER_2 = 28
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
            (group.judge.incidents, ("id", "opened_ms", "anomalies", "peak_value")),
        ):
            for field in fields:
                assert getattr(part, field)[row] == then[field], (name, field)
        assert group.windows.step_mean[row, 0] == then["step_mean"]
        assert group.windows.steps[row, 0] == then["steps"]
        values, learned = history(fresh, name)
        np.testing.assert_array_equal(values, then["history"][0])
        np.testing.assert_array_equal(learned, then["history"][1])
        assert group.judge.incidents.state[row] == (State.OPEN if then["open"] else State.CLEAR)
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
    assert {versions.version_of(blob) for blob in again.values()} == {VERSION}
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


# -- version 2 --------------------------------------------------------------------------------------------------------


def made_2() -> Detector:
    """A detector of the rules and models that the state of version 2 is of."""
    one, three = (
        Served("persistence@1", Persistence()),
        Served("three@1", Persistence(features=3), ("cpu", "mem", "io")),
    )

    def rule(match: str, model: str = "", **policy: Any) -> Rule:
        return Rule(
            match=(match,), model=model, policy=Policy(q=0.05, warmup_ms=0, accept_after_ms=30 * MINUTE, **policy)
        )

    rules = (
        rule("entity", "three", lateness_ms=3 * MINUTE),
        rule("correcting", lateness_ms=3 * MINUTE),
        rule("shadowed"),
        rule("*", interval_ms=MINUTE),
    )
    shadows = (None, None, Served("halfway@2", Halfway()), None)
    return Detector(config().config, rules, (three, one, one, one), shadows=shadows)


def sealed_2(blob: bytes, field: bytes) -> bytes:
    """A blob of version 2 or 3 whose length and checksum are right."""
    body = blob[HEADER_2:]
    header = blob[:12] + len(body).to_bytes(4, "little") + blob[16:24]
    return header + zlib.crc32(body, zlib.crc32(header, zlib.crc32(field))).to_bytes(4, "little") + body


def restored_2(blobs: Mapping[bytes, bytes] = BLOBS_2) -> tuple[Detector, snapshot.Restored]:
    fresh = made_2()
    return fresh, snapshot.unpack(fresh, blobs)


def after_2(to: Detector) -> Columns:
    """What came after the state of version 2."""
    return columns(
        to,
        [
            (name, T0 + at * MINUTE, {int(f): x for f, x in value.items()} if isinstance(value, dict) else value)
            for name, at, value in WROTE_2["after"]
        ],
    )


def assert_window(group: Group, row: int, then: Mapping[str, Any]) -> None:
    """A window holds what it held then."""
    windows, at = group.windows, np.array([row], np.int32)
    cells = then["newest"] + 1 - len(then["seen"]) + np.arange(len(then["seen"]))
    assert (windows.newest[row], windows.filled[row]) == (then["newest"], len(cells))
    for field in ("origin", "step_mean", "steps"):
        assert getattr(windows, field)[row].tolist() == then[field]
    positions = cells % windows.window
    np.testing.assert_array_equal(windows.seen[row][positions], np.array(then["seen"], np.float32))
    np.testing.assert_array_equal(windows.learned(at)[0][positions], then["learned"])
    np.testing.assert_array_equal(windows.actual(at)[0][positions], np.array(then["actual"], np.float32))


def test_a_state_of_version_2_is_restored_whole() -> None:
    fresh, outcome = restored_2()
    assert (outcome.series, outcome.recalibrating, outcome.refused) == (6, 0, [])
    assert {versions.version_of(blob) for blob in BLOBS_2.values()} == {2}
    lent = []
    for name, then in WROTE_2["windows"].items():
        series, _, shadow = name.partition("\0")
        places, slot = fresh.shadows if shadow else fresh.places, fresh.index[series]
        group, row = places.groups[places.group_of[slot]], int(places.row_of[slot])
        assert_window(group, row, then)
        flagged = np.array(then["actual"], np.float64).T[~np.array(then["learned"]).T]
        flagged = ~np.isnan(flagged)
        assert (group.windows.withheld.row[row] > 0) == flagged.any()
        lent.append(bool(flagged.any()))
        for i, copy in enumerate(WROTE_2["copies"].get(name, ()), 1):
            assert_window(group, row + i, copy)
    assert sorted(lent) == [False] * 2 + [True] * 5


def test_a_state_of_version_2_goes_on_with_the_same_events() -> None:
    def told(result: Result) -> tuple[list[list[str]], list[list[str]]]:
        return tuple(  # type: ignore[return-value]
            [[one.type.removeprefix("tocsin."), one.subject, one.id, one.time] for one in some]
            for some in (result.events, result.shadow)
        )

    fresh, _ = restored_2()
    again, _ = restored_2(packed(fresh))
    expected = (WROTE_2["events"], WROTE_2["shadow"])
    assert told(fresh.accept(after_2(fresh))) == expected
    assert told(again.accept(after_2(again))) == expected
    assert packed(again) == packed(fresh)
    assert fresh.counts.revised == 2 and fresh.counts.late == 7


def test_what_is_written_of_version_2_is_smaller_and_of_the_version_of_now() -> None:
    fresh, _ = restored_2()
    again = packed(fresh)
    assert {versions.version_of(blob) for blob in again.values()} == {VERSION}
    assert packed(restored_2(again)[0]) == again
    assert again == {field: versions.brought_to(VERSION, field, blob, LAYOUT) for field, blob in BLOBS_2.items()}
    assert all(len(again[field]) < len(blob) for field, blob in BLOBS_2.items())


OPEN_2 = BLOBS_2[b"open"]
# Of a correcting series: a statement whose word is no UTF-8.
NO_TEXT = b"\x93\x90\x90\x96\x92\x00\x00\xc4\x00\xc4\x00\xc4\x00\x91\x96\x00\xa1\xba\xa0"


@pytest.mark.parametrize(
    ("blob", "why"),
    [
        (OPEN_2[:-1] + b"\x55", "version 2: damaged"),
        (BLOBS_2[b"short"], "version 2: damaged"),  # another series' state under this name
        (OPEN_2[:10], "version 2: 10 bytes are too few"),
        (sealed_2(OPEN_2[:3] + b"P" + OPEN_2[4:], b"open"), "kind b'P'"),
        (sealed_2(OPEN_2[:-1], b"open"), "too few for a window of 9 cells of 1 features"),
        (sealed_2(OPEN_2[:4] + b"\xff" * 8 + OPEN_2[12:], b"open"), "too few for a window of 4294967295"),
        (sealed_2(OPEN_2 + b"\x93\x90\x90", b"open"), "3 bytes too many for a window of 9"),
        (sealed_2(OPEN_2 + b"\0", b"open"), "1 bytes too many"),
        (sealed_2(OPEN_2 + NO_TEXT, b"open"), "19 bytes too many"),
    ],
)
def test_what_is_no_state_of_version_2_is_refused_by_name(blob: bytes, why: str) -> None:
    fresh, outcome = restored_2({b"open": blob, b"again": BLOBS_2[b"again"]})
    assert outcome.series == 1, "the other goes on"
    (problem,) = outcome.refused
    assert str(problem).startswith("state of 'open': ") and why in str(problem)
    assert group_of(fresh, "again")[0].windows.filled.any()


def test_copies_of_another_length_are_refused() -> None:
    blob = BLOBS_2[b"correcting"]
    body = HEADER_2 + versions._row_2(9, LAYOUT).itemsize
    held, opened, past = msgspec.msgpack.decode(blob[body:])
    tail = msgspec.msgpack.encode((held, opened, [past[0], past[1][:-1], *past[2:]]))
    (problem,) = restored_2({b"correcting": sealed_2(blob[:body] + tail, b"correcting")})[1].refused
    assert "copies" in str(problem)


@given(
    name=st.sampled_from(sorted(BLOBS_2)),
    changes=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4),
)
def test_any_content_of_version_2_under_a_right_checksum_is_taken_or_refused(
    name: bytes, changes: list[tuple[int, int]]
) -> None:
    blob = bytearray(BLOBS_2[name])
    for at, value in changes:
        blob[HEADER_2 + at % (len(blob) - HEADER_2)] = value
    fresh, outcome = restored_2({name: sealed_2(bytes(blob), name)})
    if not name.endswith(SHADOW):  # that alone is no series
        assert outcome.series == 1 or len(outcome.refused) == 1
    assert len({field.removesuffix(SHADOW) for field in packed(fresh)}) == outcome.series


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
    later[2] = VERSION + 1
    fresh, outcome = restored(now | {b"short": bytes(later)})
    assert outcome.series == 2
    assert [str(problem) for problem in outcome.refused] == [
        "state of 'short': version 4 is unknown, this program reads 1 to 3; a later program wrote it"
    ]
    assert "short" not in fresh.index


def test_a_step_that_leads_nowhere_is_a_mistake_of_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(versions.MIGRATIONS, 0, lambda field, blob, threshold: blob)
    with pytest.raises(AssertionError, match="from version 0 led to 0"):
        restored({b"short": b"TK\x00"})


def test_the_layout_of_the_last_step_is_that_of_now() -> None:
    for window in (1, 9, 65_536):
        for features in (1, 3):
            assert versions._rows_2_and_3(window, features, LAYOUT)[1] == snapshot.record_dtype(
                window, features, LAYOUT
            )
    assert max(versions.MIGRATIONS) == VERSION - 1


def test_every_step_refuses_noise() -> None:
    rng = np.random.default_rng(0)
    for version in versions.MIGRATIONS:
        for size in range(0, 400, 7):
            noise = versions.MAGIC + bytes([version]) + rng.bytes(size)
            with pytest.raises(StateError, match="'x'"):
                versions.brought_to(VERSION, b"x", noise, LAYOUT)


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
