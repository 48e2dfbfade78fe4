import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.pot import Health, PotConfig
from stream import events, snapshot
from stream.blobs import model_id
from stream.columns import Columns
from stream.detector import Detector, Served
from stream.grid import NO_CELL
from stream.group import Group
from stream.incidents import State
from stream.placing import NO_PHASE
from stream.policy import Policy, Rule
from stream.results import Shared
from stream.windows import STEPS_MAX
from stream.withheld import to_bytes
from tests.helpers import (
    MINUTE,
    T0,
    Persistence,
    Record,
    Setup,
    columns,
    config,
    detector,
    normal_points,
    reborn,
    records,
    run,
    setups,
    streams,
)

HEADER = 28
LATENESS = 3 * MINUTE
ONE, THREE = Served("persistence@1", Persistence()), Served("three@1", Persistence(features=3), ("cpu", "mem", "io"))


def rule(*match: str, model: str = "", watch: bool = True, **policy: Any) -> Rule:
    asked = {"q": 0.05, "warmup_ms": 0, "accept_after_ms": 30 * MINUTE, **policy}
    return Rule(match=match, model=model, watch=watch, policy=Policy(**asked))


def entity_points(n: int, name: str = "entity", *, seed: int = 0, start: int = T0) -> list[Record]:
    values = np.random.default_rng(seed).normal(10.0, 1.0, (n, 3))
    return [(name, start + i * MINUTE, dict(enumerate(map(float, row)))) for i, row in enumerate(values)]


# Series of all kinds, by name.
SETUP = Setup(
    config().config,
    (
        rule("entity*", model="three", lateness_ms=LATENESS),
        rule("waiting", wait=True, lateness_ms=LATENESS),
        rule("correcting", lateness_ms=LATENESS),
        rule("silent", silent_after=2),
        rule("*"),
    ),
    (THREE, ONE, ONE, ONE, ONE),
)


def packed(of: Detector) -> dict[bytes, bytes]:
    return snapshot.pack(of, np.arange(len(of.index.names), dtype=np.int32))


def fed(arrivals: Sequence[Record], setup: Setup | None = None) -> Detector:
    live = (setup or config()).detector()
    live.accept(columns(live, arrivals))
    return live


def other_rules(*rules: Rule, served: Served = ONE) -> Setup:
    return Setup(SETUP.config, rules, tuple(served if one.watch else None for one in rules))


def group_of(of: Detector, name: str) -> tuple[Group, int]:
    """The group of a series, and its row."""
    slot = of.index[name]
    return of.groups[int(of.group_of[slot])], int(of.row_of[slot])


def history(of: Detector, name: str, cells: int) -> tuple[Any, Any]:
    """The newest cells of a series as its model sees them, oldest first."""
    group, row = group_of(of, name)
    at = np.array([row], np.int32)
    values, learned = group.windows.history(at, group.windows.newest[at] + 1)
    return values[0, -cells:], learned[0, -cells:]


def actual(group: Group, row: int) -> Any:
    """What arrived in the window of a series, in the order of its ring."""
    return group.windows.actual(np.array([row], np.int32))


def open_incident(name: str = "open") -> list[Record]:
    points = normal_points(120, name=name)
    return [*points[:-1], (name, points[-1][1], 500.0)]


def correcting(n: int = 200, name: str = "correcting") -> list[Record]:
    """Incidents, and late points that change them; others that come too late to change anything."""
    points: list[Record] = list(normal_points(n, name=name, seed=3))
    for at in range(60, n, 20):
        points[at : at + 2] = [(name, T0 + i * MINUTE, 60.0 + i % 7) for i in (at, at + 1)]
    for at in range(61, n - 4, 4):
        points.insert(at + 2, points.pop(at))
    for at in range(70, n - 12, 20):
        points.insert(at + 6, points.pop(at))
    return points


def regridding(name: str = "regridding") -> list[Record]:
    """From 5 minutes to one."""
    slow = normal_points(40, name=name, interval=5 * MINUTE, seed=4)
    return [*slow, *normal_points(60, name=name, start=slow[-1][1] + MINUTE, seed=5)]


def all_kinds() -> Detector:
    """Series in all states that there are."""
    live = fed(
        [
            *open_incident(),
            *normal_points(5, name="probing", seed=1),
            *entity_points(80, "entity"),
            ("entity", T0 + 80 * MINUTE, {0: 9.0}),
            ("entity", T0 + 82 * MINUTE + 1000, {2: 9.5, 1: 10.5}),
            ("entity", T0 + 82 * MINUTE, {2: 11.5}),
            *entity_points(3, "entity probing", seed=2),
            ("entity probing", T0, {1: 7.0}),
            *normal_points(80, name="waiting", seed=3),
            ("waiting", T0 + 82 * MINUTE, 8.0),
            *correcting()[:184],
            *normal_points(60, name="silent", seed=6),
            *regridding()[:55],
        ],
        SETUP,
    )
    group, row = group_of(live, "open")
    assert group.judge.incidents.state[row] == State.OPEN
    one, three = live.groups[1], live.groups[0]
    assert sorted(np.unique(one.placing.held.slot).tolist()) == sorted(
        group_of(live, name)[1] for name in ("probing", "regridding")
    )
    assert len(three.placing.held) == 9
    assert (three.waiting.cell[group_of(live, "entity")[1]] != NO_CELL).sum() == 2
    assert (one.waiting.cell[group_of(live, "waiting")[1]] != NO_CELL).sum() == 1
    assert live.silence.silent[live.index["silent"]]
    row = group_of(live, "correcting")[1]
    assert one.past.statements[row]
    assert one.past.fills[row]
    assert (one.past.copied[row] != NO_CELL).all()
    return live


LIVE = all_kinds()
BLOBS = packed(LIVE)
NAMES = sorted(BLOBS)


def restored(blobs: Mapping[bytes, bytes], setup: Setup = SETUP) -> tuple[Detector, snapshot.Restored]:
    fresh = setup.detector()
    return fresh, snapshot.unpack(fresh, blobs)


def of_kpi(name: str, setup: Setup) -> tuple[Detector, snapshot.Restored]:
    """One of the series of all kinds, under other rules."""
    return restored({name.encode(): BLOBS[name.encode()]}, setup)


# -- all comes back ---------------------------------------------------------------------------------------------------


def test_all_comes_back() -> None:
    fresh, outcome = restored(dict(reversed(BLOBS.items())))
    assert (outcome.series, outcome.recalibrating, outcome.refused) == (8, 0, [])
    assert packed(fresh) == BLOBS
    for name in map(bytes.decode, NAMES):
        (mine, here), (theirs, there) = group_of(fresh, name), group_of(LIVE, name)
        assert mine.served.ref == theirs.served.ref
        for part in ("placing", "windows", "judge.incidents", "waiting"):
            one, other = attrgetter(part)(mine), attrgetter(part)(theirs)
            if part == "waiting" and not theirs.placing.waiting[there]:
                continue
            for field in getattr(other, "ARRAYS", ("closed", "newest", "cell")):
                is_, was = getattr(one, field)[here], getattr(other, field)[there]
                np.testing.assert_array_equal(is_, was, err_msg=f"{name} {part}.{field}")
        np.testing.assert_array_equal(actual(mine, here), actual(theirs, there))
        for is_, was in zip(
            snapshot._triple(mine.waiting.open_points(here))[1:],
            snapshot._triple(theirs.waiting.open_points(there))[1:],
            strict=True,
        ):
            np.testing.assert_array_equal(is_, was)
        assert mine.rule[here] == theirs.rule[there]
        assert mine.past.copied[here].tolist() == theirs.past.copied[there].tolist()
        assert mine.past.corrects[here] == theirs.past.corrects[there]
        assert mine.judge.first_score_ms[here] == theirs.judge.first_score_ms[there]
        assert mine.judge.threshold.pack(np.array([here])) == theirs.judge.threshold.pack(np.array([there]))
        assert mine.past.statements.get(here) == theirs.past.statements.get(there)
        assert mine.past.fills.get(here) == theirs.past.fills.get(there)
        slots = fresh.index[name], LIVE.index[name]
        for field in LIVE.silence.ARRAYS:
            assert getattr(fresh.silence, field)[slots[0]] == getattr(LIVE.silence, field)[slots[1]], (name, field)
    assert fresh.silence.watermark_ms == LIVE.silence.watermark_ms
    for mine, theirs in zip(fresh.groups, LIVE.groups, strict=True):
        for field in ("timestamp_ms", "value", "feature"):
            assert sorted(getattr(mine.placing.held, field)) == sorted(getattr(theirs.placing.held, field))


def test_nothing_is_packed_of_nothing() -> None:
    assert packed(detector()) == {}
    named = detector()
    named.index["never seen"]
    named.admit()
    assert packed(named) == {}
    assert restored({})[1] == snapshot.Restored(0, 0, [])


def test_of_what_is_not_watched_nothing_is_packed() -> None:
    setup = other_rules(rule("a", watch=False), rule("*"))
    live = fed([*normal_points(20), *normal_points(20, name="b")], setup)
    assert list(packed(live)) == [b"b"]


def test_only_the_series_asked_for_are_packed() -> None:
    for name in NAMES:
        slot = LIVE.index[name.decode()]
        assert snapshot.pack(LIVE, np.array([slot], np.int32)) == {name: BLOBS[name]}
    assert snapshot.pack(LIVE, np.array([], np.int32)) == {}


@settings(max_examples=40, deadline=None)
@given(
    stream=streams(most=80),
    interval=st.sampled_from([0, MINUTE]),
    lateness=st.sampled_from([0, LATENESS]),
    wait=st.booleans(),
)
def test_what_is_restored_packs_to_the_same_bytes(
    stream: list[Record], interval: int, lateness: int, wait: bool
) -> None:
    setup = config(interval_ms=interval, lateness_ms=lateness, wait=wait, silent_after=3)
    blobs = packed(fed(stream, setup))
    assert packed(restored(blobs, setup)[0]) == blobs
    assert {name.decode() for name in blobs} == {name for name, _, value in stream if not np.isnan(value)}  # type: ignore[arg-type]


@settings(max_examples=25, deadline=None)
@given(stream=records("entity", 3, most=80), interval=st.sampled_from([0, MINUTE]))
def test_an_entity_that_is_restored_packs_to_the_same_bytes(stream: list[Record], interval: int) -> None:
    setup = other_rules(rule("*", interval_ms=interval, lateness_ms=LATENESS), served=THREE)
    blobs = packed(fed(stream, setup))
    assert packed(restored(blobs, setup)[0]) == blobs


# -- and goes on ------------------------------------------------------------------------------------------------------

GOING_ON: dict[str, list[Record]] = {
    "probing": list(normal_points(40, name="probing", seed=1)),
    "open": [*open_incident(), *normal_points(60, name="open", start=T0 + 120 * MINUTE, seed=9)],
    "correcting": correcting(),
    "regridding": regridding(),
}


def shuffled(arrivals: Sequence[Record], seed: int = 0, reach: int = 3) -> list[Record]:
    rng = np.random.default_rng(seed)
    return [arrivals[i] for i in np.argsort(np.arange(len(arrivals)) + rng.uniform(0, reach, len(arrivals)))]


def spiky(arrivals: Sequence[Record], every: int = 17) -> list[Record]:
    """The same with anomalies, in one metric after the other."""
    spiked: list[Record] = []
    for i, (name, time, value) in enumerate(arrivals):
        if i > 50 and i % every == 0:
            value = {**value, i // every % 3: 90.0} if isinstance(value, Mapping) else 90.0
        spiked.append((name, time, value))
    return spiked


GOING_ON["waiting"] = shuffled(spiky(normal_points(150, name="waiting", seed=7)))
GOING_ON["entity"] = shuffled(
    [
        (name, time, {f: x})
        for name, time, values in spiky(entity_points(120))
        if isinstance(values, Mapping)
        for f, x in values.items()
    ],
    reach=8,
)


@pytest.mark.parametrize("name", GOING_ON)
def test_a_series_goes_on_as_if_it_had_never_been_away(name: str) -> None:
    stream = GOING_ON[name]
    whole = run(SETUP.detector(), stream)
    unbroken = fed(stream, SETUP)
    for cuts in (range(1, len(stream), 3), [len(stream) // 3], [len(stream) - 1]):
        again = run(SETUP.detector(), stream, restore=cuts)
        assert (again.events, again.rejects) == (whole.events, whole.rejects)
        assert again.counts == whole.counts
        broken = fed(stream[: cuts[-1]], SETUP)
        broken = reborn(broken)
        broken.accept(columns(broken, stream[cuts[-1] :]))
        assert packed(broken) == packed(unbroken)
    assert whole.events or name == "probing"


def test_a_correcting_series_still_corrects_what_was_published_before() -> None:
    """Late points after the restore prove wrong what was said before it."""
    out = run(SETUP.detector(), GOING_ON["correcting"], restore=range(1, len(GOING_ON["correcting"])))
    assert {"corrected", "retracted"} & set(out.kinds)
    assert out.counts.revised > 10
    ids = [event["id"] for event in out.data]
    for i, event in enumerate(out.data):
        assert event["data"].get("supersedes", ids[0]) in ids[: max(i, 1)]
    assert len(set(ids)) == len(ids)


def test_a_probing_series_goes_on_where_it_was() -> None:
    points = normal_points(40, name="probing", seed=1)
    fresh, _ = of_kpi("probing", SETUP)
    rest = fresh.accept(columns(fresh, points[5:]), want_scores=True)
    whole = SETUP.detector()
    expected = whole.accept(columns(whole, points), want_scores=True)
    assert packed(fresh) == packed(whole)
    assert sum(len(part.slot) for part in rest.scores) == sum(len(part.slot) for part in expected.scores) == 40


def test_what_was_silent_resumes_and_is_not_told_again() -> None:
    fresh, _ = restored({name: BLOBS[name] for name in (b"silent", b"open")})
    assert fresh.clock(T0 * 2) == []
    now = T0 + 120 * MINUTE
    assert fresh.accept(columns(fresh, [("open", now, 10.0)])).events == []
    (resumed,) = fresh.accept(columns(fresh, [("silent", now, 10.0)])).events
    assert resumed.type == "tocsin.kpi.resumed"
    assert resumed.id.removesuffix("-resumed") == events.silence_id("silent", T0 + 59 * MINUTE)


def test_the_clock_goes_by_the_arrivals_from_before() -> None:
    setup = config(silent_after=3)
    live = setup.detector()
    points = columns(live, normal_points(20))
    live.accept(points, np.full(20, T0 + 100 * MINUTE))
    fresh, _ = restored(packed(live), setup)
    assert fresh.clock(T0 + 103 * MINUTE) == []
    (silent,) = fresh.clock(T0 + 103 * MINUTE + 1)
    assert (silent.type, silent.subject) == ("tocsin.kpi.silent", "a")
    assert live.clock(T0 + 103 * MINUTE + 1) == [silent]


# -- what is refused --------------------------------------------------------------------------------------------------


@settings(max_examples=400, deadline=None)
@given(name=st.sampled_from(NAMES), at=st.floats(0, 1, exclude_max=True), mask=st.integers(1, 255))
def test_a_flipped_byte_is_refused(name: bytes, at: float, mask: int) -> None:
    blob = bytearray(BLOBS[name])
    blob[int(at * len(blob))] ^= mask
    assert_refused(name, bytes(blob))


@pytest.mark.parametrize("name", [b"open", b"probing", b"entity"])
def test_every_flipped_bit_of_the_header_is_refused(name: bytes) -> None:
    for bit in range(8 * HEADER):
        blob = bytearray(BLOBS[name])
        blob[bit // 8] ^= 1 << bit % 8
        assert_refused(name, bytes(blob))


def test_every_flipped_bit_of_a_whole_blob_is_refused() -> None:
    name = b"probing"
    for bit in range(8 * len(BLOBS[name])):
        blob = bytearray(BLOBS[name])
        blob[bit // 8] ^= 1 << bit % 8
        fresh = SETUP.detector()
        assert len(snapshot.unpack(fresh, {name: bytes(blob)}).refused) == 1
        assert fresh.index.names == []


@pytest.mark.parametrize("name", NAMES)
def test_a_blob_of_another_length_is_refused(name: bytes) -> None:
    blob = BLOBS[name]
    for cut in (*range(0, 48, 3), len(blob) // 2, len(blob) - 1):
        assert_refused(name, blob[:cut])
    assert_refused(name, blob + b"\0")
    assert_refused(name, blob + blob)


def assert_refused(name: bytes, blob: bytes) -> None:
    """Refused by its name, and the other series comes back whole."""
    other = next(other for other in NAMES if other != name)
    fresh, outcome = restored({name: blob, other: BLOBS[other]})
    assert (outcome.series, len(outcome.refused)) == (1, 1)
    assert str(outcome.refused[0]).startswith(f"state of {name.decode()!r}: ")
    assert packed(fresh) == {other: BLOBS[other]}


@pytest.mark.parametrize(
    ("name", "blob", "why"),
    [
        (b"open", b"", "0 bytes are too few for a header"),
        (b"open", BLOBS[b"open"][:27], "27 bytes are too few for a header"),
        (b"open", b"{}" + BLOBS[b"open"][2:], r"this is no state of Tocsin \(it starts with b'\{\}'\)"),
        (
            b"open",
            BLOBS[b"open"][:2] + b"\x63" + BLOBS[b"open"][3:],
            "version 99 is unknown, this program reads 1 to 3; a later",
        ),
        (b"open", b"TK\x00", "version 0 is unknown, this program reads 1 to 3; nothing leads from it"),
        (b"open", b"TK\x01", "version 1: 3 bytes are too few for a header"),
        (b"open", BLOBS[b"open"][:3] + b"P" + BLOBS[b"open"][4:], "kind b'P' is unknown"),
        (b"open", BLOBS[b"open"][:-1] + b"\x55", "damaged"),
        (b"waiting", BLOBS[b"open"], "damaged"),  # another series' state under this name
        (b"\xff\n", BLOBS[b"open"], "damaged"),
    ],
)
def test_what_is_no_state_of_this_series_is_refused_with_the_reason(name: bytes, blob: bytes, why: str) -> None:
    _, outcome = restored({name: blob})
    assert outcome.series == 0
    with pytest.raises(type(outcome.refused[0]), match=why):
        raise outcome.refused[0]


def sealed(name: bytes, blob: bytes, body: bytes | None = None) -> bytes:
    """Give a blob another body, and a name, with the right checksum."""
    head, body = bytearray(blob[:HEADER]), blob[HEADER:] if body is None else body
    head[12:16] = len(body).to_bytes(4, "little")
    head[24:28] = zlib.crc32(body, zlib.crc32(bytes(head[:24]), zlib.crc32(name))).to_bytes(4, "little")
    return bytes(head) + body


def test_the_header_says_the_shape_and_ends_with_the_crc32_of_name_header_and_body() -> None:
    for name, blob in BLOBS.items():
        assert sealed(name, blob) == blob
        features = 3 if name.startswith(b"entity") else 1
        assert blob[:12] == b"TK\x03S" + (9).to_bytes(4, "little") + features.to_bytes(4, "little")
        ref = "three@1" if features == 3 else "persistence@1"
        assert blob[16:24] == model_id(ref).to_bytes(8, "little")


@pytest.mark.parametrize("name", [b"", b"\n", b"x" * 600, b"\xff\x00"])
def test_a_name_that_cannot_be_one_takes_no_slot(name: bytes) -> None:
    for blob in BLOBS.values():
        fresh, outcome = restored({name: sealed(name, blob)})
        assert (outcome.series, len(outcome.refused), fresh.index.names) == (0, 1, [])
        assert packed(fresh) == {}


@pytest.mark.parametrize("body", [b"", b"\0", bytes(100)])
def test_a_record_that_is_too_short_is_refused(body: bytes) -> None:
    for name in (b"open", b"entity"):
        _, outcome = restored({name: sealed(name, BLOBS[name], body)})
        assert outcome.series == 0
        assert f"{len(body)} bytes, but a window of 9 needs" in str(outcome.refused[0])


NO_TEXT = b"\x94\x90\x90\x97\x92\0\0\xc4\0\xc4\0\xc4\0\x91\x96\0\xa1\xba"  # a statement whose word is no UTF-8


@pytest.mark.parametrize(
    "tail",
    [b"\0", b"\x93\x90\x90\xc0", b"\x93\x90\x90", b"\x92\x90\x90", b"\x94\x91\x90\x90\xc0\xc4\0", bytes(64), NO_TEXT],
)
def test_what_stands_behind_the_record_and_is_no_tail_is_refused(tail: bytes) -> None:
    size = snapshot.row_dtype(group_of(LIVE, "open")[0]).itemsize
    body = BLOBS[b"open"][HEADER:][:size] + tail
    _, outcome = restored({b"open": sealed(b"open", BLOBS[b"open"], body)})
    assert outcome.series == 0
    assert f"{len(tail)} bytes too many" in str(outcome.refused[0])


def withheld(**cells: float) -> bytes:
    """What is withheld of a window of nine cells: values by position."""
    ring = np.full((1, 9, 1), np.nan, np.float32)
    for position, value in cells.items():
        ring[0, int(position[1:]), 0] = value
    return to_bytes(ring)[0]


def test_withheld_values_that_the_window_cannot_have_are_refused() -> None:
    group, row = group_of(LIVE, "open")
    body, layout = BLOBS[b"open"][HEADER:], snapshot.row_dtype(group)
    held, opened, past, own = msgspec.msgpack.decode(body[layout.itemsize :])
    flagged = int(group.windows.newest[row]) % 9
    assert own == withheld(**{f"c{flagged}": float(actual(group, row)[0, flagged, 0])})
    fine = withheld(**{f"c{flagged}": 1.0})
    learned = (flagged + 1) % 9
    for part, good in (
        (b"", True),
        (fine, True),
        (withheld(**{f"c{learned}": 1.0}), False),
        (withheld(**{f"c{flagged}": 1e38}), False),
        (withheld(**{f"c{flagged}": float("inf")}), False),
        (withheld(), False),
        (fine[:-1], False),
        (fine + bytes(4), False),
    ):
        forged = body[: layout.itemsize] + msgspec.msgpack.encode((held, opened, past, part))
        _, outcome = restored({**BLOBS, b"open": sealed(b"open", BLOBS[b"open"], forged)})
        assert (outcome.series, len(outcome.refused)) == ((8, 0) if good else (7, 1)), part
        assert good or "its content cannot be that of a series" in str(outcome.refused[0])


def test_withheld_values_of_cells_that_the_window_does_not_hold_are_refused() -> None:
    name, live = b"a", fed(normal_points(3), config(interval_ms=MINUTE))
    (blob,) = packed(live).values()
    newest = int(live.groups[0].windows.newest[0])
    for cell in (newest, newest - 3):  # learned, and before the first point
        tail = msgspec.msgpack.encode(((), (), None, withheld(**{f"c{cell % 9}": 1.0})))
        _, outcome = restored({name: sealed(name, blob, blob[HEADER:] + tail)}, config(interval_ms=MINUTE))
        assert len(outcome.refused) == 1


def test_what_is_withheld_of_a_copy_is_looked_at_too() -> None:
    size = snapshot.row_dtype(group_of(LIVE, "correcting")[0]).itemsize
    name, body = b"correcting", BLOBS[b"correcting"][HEADER:]
    held, opened, past, own = msgspec.msgpack.decode(body[size:])
    for parts, good in ((past[-1], True), ([past[-1][0], b"\0"], False), ([withheld(c0=1e38), b""], False)):
        forged = body[:size] + msgspec.msgpack.encode((held, opened, [*past[:-1], parts], own))
        assert restored({name: sealed(name, BLOBS[name], forged)})[1].series == good


def test_bits_behind_the_last_cell_are_refused() -> None:
    group, _ = group_of(LIVE, "open")
    body, layout = BLOBS[b"open"][HEADER:], snapshot.row_dtype(group)
    row = np.frombuffer(body, layout, 1).copy()
    row["learned_bits"][0, 0, 1] |= 1
    forged = sealed(b"open", BLOBS[b"open"], row.tobytes() + body[layout.itemsize :])
    assert len(restored({b"open": forged})[1].refused) == 1


@pytest.mark.parametrize("ring", [15, 17, 64])
def test_another_ring_of_the_threshold_is_refused(ring: int) -> None:
    pot = PotConfig(q=0.05, level=0.75, min_scores=20, min_excess=10, max_excess=ring)
    fresh, outcome = restored(BLOBS, replace(SETUP, config=replace(SETUP.config, pot=pot)))
    assert (outcome.series, len(outcome.refused)) == (0, 8)
    assert packed(fresh) == {}
    assert all("the threshold's ring was changed" in str(problem) for problem in outcome.refused)


def test_a_threshold_that_nothing_could_have_made_begins_anew() -> None:
    group, _ = group_of(LIVE, "open")
    body, layout = BLOBS[b"open"][HEADER:], snapshot.row_dtype(group)
    row = np.frombuffer(body, layout, 1).copy()
    row["threshold"]["scale"] = -1.0
    forged = sealed(b"open", BLOBS[b"open"], row.tobytes() + body[layout.itemsize :])
    fresh, outcome = restored({**BLOBS, b"open": forged})
    assert outcome.series == 8
    assert [str(problem)[:16] for problem in outcome.refused] == ["state of 'open':"]
    assert "scale" in str(outcome.refused[0])
    result = fresh.accept(columns(fresh, [("open", T0 + 120 * MINUTE, 9.0)]), want_scores=True)
    assert np.isfinite(result.scores[-1].score).all(), "the window was kept"
    assert np.isnan(result.scores[-1].threshold).all()
    whole = packed(restored(BLOBS)[0])
    assert {name: blob for name, blob in packed(fresh).items() if name != b"open"} == {
        name: blob for name, blob in whole.items() if name != b"open"
    }


# -- other models -----------------------------------------------------------------------------------------------------


def with_model(ref: str, **model: Any) -> Setup:
    """The setup with another model for KPIs."""
    served = replace(ONE, ref=ref, model=Persistence(**model))
    return replace(SETUP, served=tuple(served if one == ONE else one for one in SETUP.served))


def test_another_model_keeps_the_window_and_begins_the_threshold_anew() -> None:
    fresh, outcome = restored(BLOBS, with_model("persistence@2"))
    assert (outcome.series, outcome.recalibrating, outcome.refused) == (8, 6, [])
    for name in ("open", "correcting", "waiting", "silent"):
        for mine, theirs in zip(history(fresh, name, 9), history(LIVE, name, 9), strict=True):
            np.testing.assert_array_equal(mine, theirs)
    result = fresh.accept(columns(fresh, [("open", T0 + 121 * MINUTE, 9.0)]), want_scores=True)
    score, threshold = result.scores[-1].score, result.scores[-1].threshold
    assert np.isfinite(score).all()
    assert np.isnan(threshold).all()


def test_another_model_warms_up_from_its_own_first_score() -> None:
    setup = config(warmup_ms=100 * MINUTE)
    fresh, _ = restored(packed(fed(normal_points(200), setup)), config(warmup_ms=100 * MINUTE, model_ref="other@1"))
    more = normal_points(150, start=T0 + 200 * MINUTE, seed=1)
    result = fresh.accept(columns(fresh, more), want_scores=True)
    judged = [int(part.timestamp_ms[0]) for part in result.scores if not np.isnan(part.threshold[0])]
    assert judged[0] == T0 + (200 + 101) * MINUTE


def test_another_model_with_a_calibration_judges_at_once() -> None:
    calibration = np.random.default_rng(0).exponential(size=100)
    fresh, _ = of_kpi("open", config(model_ref="persistence@2", calibration=calibration))
    result = fresh.accept(columns(fresh, [("open", T0 + 121 * MINUTE, 9.0)]), want_scores=True)
    assert np.isfinite(result.scores[-1].threshold).all()


def test_an_incident_keeps_its_id_when_the_model_changes() -> None:
    points = normal_points(400)
    points[200] = ("a", points[200][1], 500.0)
    before = detector()
    (opened,) = run(before, points[:201]).data[-1:]
    after, _ = restored(packed(before), config(model_ref="persistence@2"))
    resolved = after.accept(columns(after, points[201:])).events[0]
    assert (opened["type"], resolved.type) == ("tocsin.anomaly.opened", "tocsin.anomaly.resolved")
    assert isinstance(resolved.data, events.EventData)
    assert resolved.data.incident == opened["data"]["incident"]
    assert resolved.data.model == "persistence@2"
    assert b"null" not in events.encode(resolved)
    assert np.isfinite(resolved.data.threshold)


@pytest.mark.parametrize("window", [4, 6, 8, 10, 14, 30])
def test_of_another_window_the_newest_cells_are_kept(window: int) -> None:
    """A wider one fills up from there, a narrower one goes on judging; the threshold is that of the same model."""
    setup = replace(
        with_model("persistence@1", window=window),
        served=tuple(
            replace(one, model=Persistence(window, one.model.features)) for one in (THREE, ONE, ONE, ONE, ONE)
        ),
    )
    fresh, outcome = restored(BLOBS, setup)
    assert (outcome.series, outcome.recalibrating, outcome.refused) == (8, 0, [])
    for name in ("open", "entity", "waiting", "correcting", "silent", "regridding"):
        cells = min(window, 9)
        for mine, theirs in zip(history(fresh, name, cells), history(LIVE, name, cells), strict=True):
            np.testing.assert_array_equal(mine, theirs)
        group, row = group_of(fresh, name)
        was, before = group_of(LIVE, name)
        assert group.windows.filled[row] == cells
        np.testing.assert_array_equal(group.windows.usual_step([row]), was.windows.usual_step([before]))  # type: ignore[arg-type]
        assert group.judge.threshold.pack(np.array([row])) == was.judge.threshold.pack(np.array([before]))
    missing = max(window - 9, 0)
    more = normal_points(missing + 1, name="open", start=T0 + 120 * MINUTE)
    scores = fresh.accept(columns(fresh, more), want_scores=True).scores
    scored = [bool(np.isfinite(part.score[0])) for part in scores]
    assert scored == [False] * missing + [True]


@pytest.mark.parametrize("window", [4, 5, 7])
def test_a_narrower_window_has_room_for_the_newest_open_cells(window: int) -> None:
    live = fed(
        [
            *entity_points(40),
            *[("entity", T0 + (40 + i) * MINUTE, {f: 100.0 * f + i}) for i, f in enumerate((0, 1, 2, 1))],
        ],
        SETUP,
    )
    assert (live.groups[0].waiting.cell[0] != NO_CELL).sum() == 4
    other = replace(THREE, model=Persistence(window, 3))
    fresh, outcome = restored(packed(live), other_rules(SETUP.rules[0], served=other))
    assert (outcome.series, outcome.refused) == (1, [])
    waiting, was = fresh.groups[0].waiting, live.groups[0].waiting
    kept = np.sort(waiting.cell[0][waiting.cell[0] != NO_CELL])
    open_before = np.sort(was.cell[0][was.cell[0] != NO_CELL])
    assert kept.tolist() == open_before[-min(4, window // 2 + 1) :].tolist()
    for cell in kept.tolist():
        np.testing.assert_array_equal(waiting.value[0, cell % waiting.room], was.value[0, cell % was.room])


# -- other rules ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("q", [0.01, 0.0625])
def test_another_risk_moves_the_quantile_along_the_tail_that_is_kept(q: float) -> None:
    fresh, outcome = of_kpi("open", config(q=q))
    assert (outcome.series, outcome.refused) == (1, [])
    (group, row), (was, before) = group_of(fresh, "open"), group_of(LIVE, "open")
    mine, theirs = (of.judge.threshold.pack(np.array([at]))[0] for of, at in ((group, row), (was, before)))
    assert mine["q"] == q
    for field in ("phase", "n", "n_excess", "t", "shape", "scale", "peaks"):
        np.testing.assert_array_equal(mine[field], theirs[field])
    assert (mine["z"] > theirs["z"]) == (q < 0.05)
    assert mine["z"] != theirs["z"]
    moved = restored({b"open": BLOBS[b"open"]})[0].groups[1].judge.threshold
    moved.set_risk(np.array([0]), q)
    assert moved.pack(np.array([0]))["z"] == mine["z"]


def test_a_budget_is_a_risk_at_the_interval_that_is_known_already() -> None:
    fresh, _ = of_kpi("open", config(alarms_per_ms=0.02 / MINUTE))
    group, row = group_of(fresh, "open")
    assert group.judge.threshold.risk(np.array([row])) == pytest.approx(0.02)


def test_another_risk_holds_for_the_past_that_can_still_be_revised() -> None:
    fresh, _ = of_kpi("correcting", config(q=0.01, lateness_ms=LATENESS))
    group, row = group_of(fresh, "correcting")
    newest = int(group.placing.time_ms(np.array([row], np.int32), group.windows.newest[row : row + 1])[0])
    fresh.accept(columns(fresh, [("correcting", newest - MINUTE, 12.25)]))
    assert fresh.counts.revised == 1
    assert group.judge.threshold.pack(np.array([row]))["q"] == 0.01


@pytest.mark.parametrize("lateness", [0, 1, 2])
def test_another_lateness_goes_on_from_here(lateness: int) -> None:
    """Correcting or waiting, or no longer; nothing that is in the window is lost."""
    for name in ("correcting", "waiting", "open"):
        for wait in (False, True):
            fresh, outcome = of_kpi(name, config(lateness_ms=lateness * MINUTE, wait=wait))
            assert (outcome.series, outcome.refused) == (1, [])
            for mine, theirs in zip(history(fresh, name, 9), history(LIVE, name, 9), strict=True):
                np.testing.assert_array_equal(mine, theirs)
            more = normal_points(60, name=name, start=T0 + 200 * MINUTE, seed=8)
            more = [(name, time, 99.0 if i == 30 else value) for i, (_, time, value) in enumerate(more)]
            out = run(fresh, [*more[:29], more[30], more[29], *more[31:]])
            assert "opened" in out.kinds
            assert (out.counts.revised > 0) == (lateness > 0 and not wait)
            assert (out.counts.late > 0) == (not wait)


def test_of_a_shorter_lateness_what_is_overdue_is_closed_by_the_next_point() -> None:
    fresh, _ = of_kpi("waiting", config(lateness_ms=0, wait=True))
    group, row = group_of(fresh, "waiting")
    assert (group.waiting.cell[row] != NO_CELL).any()
    fresh.accept(columns(fresh, [("waiting", T0 + 83 * MINUTE, 10.0)]))
    fresh.accept(columns(fresh, [("waiting", T0 + 84 * MINUTE, 10.0)]))
    assert actual(group, row)[0, 82 % 9, 0] + group.windows.origin[row, 0] == pytest.approx(8.0)
    assert group.waiting.closed[row] == group.windows.newest[row] >= 83


def test_a_longer_lateness_corrects_from_here_on() -> None:
    fresh, _ = of_kpi("open", config(lateness_ms=LATENESS))
    end = T0 + 119 * MINUTE
    fresh.accept(columns(fresh, [("open", end, 10.0)]))
    assert fresh.counts.revised == 0, "what was before is not known any more"
    fresh.accept(columns(fresh, [("open", end + MINUTE, 500.0), ("open", end + MINUTE, 10.0)]))
    assert fresh.counts.revised == 1


@pytest.mark.parametrize("name", ["open", "probing", "waiting", "correcting", "entity", "entity probing"])
def test_what_is_no_longer_watched_is_left_out(name: str) -> None:
    setup = Setup(SETUP.config, (rule(name, watch=False), *SETUP.rules), (None, *SETUP.served))
    fresh, outcome = restored(BLOBS, setup)
    assert (outcome.series, outcome.refused) == (7, [])
    assert packed(fresh) == {other: blob for other, blob in BLOBS.items() if other != name.encode()}


@pytest.mark.parametrize("rules", [(), (rule("*", watch=False),), (rule("nothing"),)])
def test_nothing_is_watched_any_more(rules: tuple[Rule, ...]) -> None:
    fresh, outcome = restored(BLOBS, other_rules(*rules))
    assert (outcome.series, outcome.refused) == (0, [])
    assert packed(fresh) == {}


def test_an_entity_that_is_now_watched_metric_by_metric_is_refused() -> None:
    fresh, outcome = restored(BLOBS, other_rules(rule("*")))
    assert outcome.series == 6
    assert {str(problem) for problem in outcome.refused} == {
        f"state of {name!r}: it has 3 features; the model of its rule takes others"
        for name in ("entity", "entity probing")
    }
    assert "entity" not in fresh.index


def test_an_entity_whose_model_takes_another_number_of_metrics_is_refused() -> None:
    two = Served("two@1", Persistence(features=2), ("cpu", "mem"))
    setup = replace(SETUP, served=(two, *SETUP.served[1:]))
    fresh, outcome = restored(BLOBS, setup)
    assert (outcome.series, len(outcome.refused)) == (6, 2)
    assert all("it has 3 features; the model of its rule takes others" in str(one) for one in outcome.refused)
    assert packed(fresh) == {name: blob for name, blob in BLOBS.items() if not name.startswith(b"entity")}


@pytest.mark.parametrize("interval_ms", [59_000, 2 * MINUTE])
@pytest.mark.parametrize("wait", [False, True])
def test_of_another_interval_the_window_begins_anew_and_threshold_and_incident_stay(
    interval_ms: int, wait: bool
) -> None:
    fresh, outcome = of_kpi("open", config(interval_ms=interval_ms, wait=wait))
    assert (outcome.series, outcome.recalibrating, outcome.refused) == (1, 0, [])
    (group, row), (was, before) = group_of(fresh, "open"), group_of(LIVE, "open")
    assert group.placing.interval_ms[row] == interval_ms
    assert group.windows.filled[row] == 0
    assert np.isnan(group.windows.usual_step(np.array([row], np.int32))).all()
    assert group.judge.threshold.pack(np.array([row])) == was.judge.threshold.pack(np.array([before]))
    for field in group.judge.incidents.ARRAYS:
        assert getattr(group.judge.incidents, field)[row] == getattr(was.judge.incidents, field)[before]
    more = normal_points(40, name="open", start=T0 + 120 * MINUTE + 7, interval=interval_ms)
    out = run(fresh, more)
    assert out.kinds[0] == "resolved"
    assert group.placing.phase_ms[row] == (T0 + 120 * MINUTE + 7) % interval_ms
    assert group.windows.filled[row] == 9


def test_the_interval_that_it_had_inferred_may_be_configured() -> None:
    fresh, _ = of_kpi("open", config(interval_ms=MINUTE))
    group, row = group_of(fresh, "open")
    assert group.windows.filled[row] == 9
    assert (group.placing.interval_ms[row], group.placing.phase_ms[row]) == (MINUTE, T0)


@pytest.mark.parametrize("wait", [False, True])
def test_a_grid_that_was_set_meanwhile_ends_the_probe(wait: bool) -> None:
    points = normal_points(30, name="probing", seed=1)
    setup = config(interval_ms=MINUTE, wait=wait)
    fresh, _ = of_kpi("probing", setup)
    assert len(fresh.groups[0].placing.held) == 0
    fresh.accept(columns(fresh, points[5:]))
    assert len(packed(fresh)[b"probing"]) == HEADER + snapshot.row_dtype(fresh.groups[0]).itemsize
    assert fresh.groups[0].windows.filled[0] == 9


@pytest.mark.parametrize(
    "policy",
    [{"interval_ms": 5 * MINUTE}, {"wait": True}, {"wait": True, "interval_ms": 5 * MINUTE}],
    ids=lambda policy: " ".join(policy),
)
def test_a_series_that_may_not_probe_again_any_more_keeps_its_grid(policy: dict[str, Any]) -> None:
    fresh, outcome = of_kpi("regridding", config(**policy))
    assert (outcome.series, outcome.refused) == (1, [])
    (group, row), (was, before) = group_of(fresh, "regridding"), group_of(LIVE, "regridding")
    fresh.accept(columns(fresh, regridding()[55:]))
    assert not group.placing.probing[row]
    assert len(group.placing.held) == 0
    assert group.placing.interval_ms[row] == 5 * MINUTE
    assert group.placing.phase_ms[row] == was.placing.phase_ms[before]
    assert group.windows.newest[row] == was.windows.newest[before] + 10


def test_a_series_that_had_not_waited_long_enough_for_its_first_cell_need_not() -> None:
    """Its interval is configured, and it no longer waits: the next point decides on the grid."""
    waits = config(interval_ms=MINUTE, lateness_ms=LATENESS, wait=True)
    live = fed(normal_points(2), waits)
    assert live.groups[0].placing.phase_ms[0] == NO_PHASE
    fresh, _ = restored(packed(live), config(interval_ms=MINUTE))
    points = normal_points(30, start=T0 + 2 * MINUTE + 500)
    fresh.accept(columns(fresh, points))
    placing = fresh.groups[0].placing
    assert (placing.interval_ms[0], placing.phase_ms[0]) == (MINUTE, points[0][1] % MINUTE)
    assert fresh.groups[0].windows.filled[0] == 9


def test_another_drift_begins_the_threshold_anew() -> None:
    fresh, outcome = of_kpi("open", config(drift=50))
    assert (outcome.series, outcome.refused) == (1, [])
    group, row = group_of(fresh, "open")
    assert group.judge.threshold.health(np.array([row])).tolist() == [Health.WARMING]
    assert group.judge.threshold.pack(np.array([row]))["depth"] == 50


SERVED = (
    *(Served(f"one-{window}@1", Persistence(window)) for window in (4, 9, 16)),
    Served("other@1", Persistence(), calibrations=(np.random.default_rng(1).exponential(size=200),)),
    *(Served(f"three-{window}@1", Persistence(window, 3), ("cpu", "mem", "io")) for window in (4, 9, 16)),
)
any_setup = setups(st.sampled_from(SERVED))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    before=any_setup, after=any_setup, kpis=streams(most=80), entity=records("m", 3, most=80), seed=st.integers(0, 99)
)
def test_any_state_goes_on_under_any_rules(
    before: Setup, after: Setup, kpis: list[Record], entity: list[Record], seed: int
) -> None:
    """Blobs come back, are left out, or are refused by name; what came back goes on, and is packed like any other."""
    after = replace(after, config=before.config)  # another ring of the threshold is another matter
    order = np.random.default_rng(seed).permutation(np.repeat([0, 1], [len(kpis), len(entity)])).tolist()
    queues = iter(kpis), iter(entity)
    arrivals = [next(queues[i]) for i in order]
    live, fresh = before.detector(), after.detector()
    live.accept(batch(live, arrivals[: len(arrivals) // 2]))
    blobs = packed(live)
    outcome = snapshot.unpack(fresh, blobs)
    back = packed(fresh)
    assert outcome.series == len(back)
    assert back.keys() <= blobs.keys()
    gone = blobs.keys() - back.keys()
    refused = {str(problem).split("'")[1].encode() for problem in outcome.refused}
    assert refused <= gone
    for name in gone - refused:
        rule_ = fresh.rule_for(name.decode(), entity=name == b"m")
        assert rule_ < 0 or fresh.served[rule_] is None
    again = after.detector()
    assert snapshot.unpack(again, back).series == len(back)
    assert packed(again) == back, "of the same rules nothing changes"

    rest = arrivals[len(arrivals) // 2 :]
    result, other = fresh.accept(batch(fresh, rest)), again.accept(batch(again, rest))
    assert [events.encode(event) for event in result.events] == [events.encode(event) for event in other.events]
    assert packed(again) == packed(fresh)
    for group in fresh.groups:
        used = np.flatnonzero(group.series >= 0).astype(np.int32)
        full = used[group.windows.filled[used] == group.window]
        values, _ = group.windows.history(full, group.windows.newest[full] + 1)
        assert np.isfinite(values).all()
        assert (group.placing.probing[used] | (group.placing.interval_ms[used] > 0)).all()
        asked = after.rules[0].policy.interval_ms if len(after.rules) == 1 else 0
        assert not asked or (group.placing.interval_ms[used] == asked).all()


def batch(to: Detector, arrivals: Sequence[Record]) -> Columns:
    """The arrivals, of which an entity's go to its metrics where it is watched metric by metric."""
    flat: list[Record] = []
    for name, time, value in arrivals:
        if isinstance(value, Mapping) and to.index.entity(name) is None:
            flat += [(f"{name}.{feature}", time, x) for feature, x in value.items()]
        else:
            flat.append((name, time, value))
    return columns(to, flat)


def test_another_span_of_silence_holds_at_once() -> None:
    fresh, _ = of_kpi("open", config(silent_after=7))
    assert fresh.silence.span_ms[fresh.index["open"]] == 7 * MINUTE
    assert of_kpi("probing", config(silent_after=7))[0].silence.span_ms[0] == 0


def test_what_is_kept_in_two_bytes_fits() -> None:
    group, row = group_of(fed(normal_points(30)), "a")
    assert STEPS_MAX < 2**16
    group.placing.misfit[row] = 17 * 2**8  # a series probes again before
    group.windows.steps[row] = STEPS_MAX
    rows = snapshot._records(group, np.array([row], np.int32))
    assert (rows["misfit"][0], rows["steps"][0, 0], rows["filled"][0]) == (17 * 2**8, STEPS_MAX, 9)
    assert snapshot.row_dtype(group, 2**16 - 1)["filled"] == np.uint16
    assert snapshot.row_dtype(group, 2**16)["filled"] == np.uint32


# -- size -------------------------------------------------------------------------------------------------------------


def test_ten_thousand_series() -> None:
    names = [f"kpi-{i}" for i in range(10_000)]
    setup = config(interval_ms=MINUTE)
    live = setup.detector()
    for minute in range(3):
        live.accept(columns(live, [(name, T0 + minute * MINUTE, float(i)) for i, name in enumerate(names)]))
    blobs = packed(live)
    fresh, outcome = restored(blobs, setup)
    assert outcome.series == len(blobs) == 10_000
    assert packed(fresh) == blobs


@pytest.mark.parametrize(("window", "limit"), [(30, 1_500), (120, 1_900)])
def test_bytes_of_one_kpi(window: int, limit: int, record_property: Any) -> None:
    sizes = {}
    for kind in ("plain", "waiting", "correcting"):
        asked: dict[str, Any] = {
            "interval_ms": MINUTE,
            "lateness_ms": 0 if kind == "plain" else LATENESS,
            "wait": kind == "waiting",
        }
        setup = config(pot=PotConfig(), model=Persistence(window), **asked)
        (blob,) = packed(fed(normal_points(400), setup)).values()
        sizes[kind] = len(blob)
    record_property("bytes", sizes)
    print(f"W={window} F=1 max_excess={PotConfig().max_excess}: bytes {sizes}")  # noqa: T201
    assert sizes["plain"] <= limit
    assert sizes["waiting"] <= limit + 64
    assert sizes["correcting"] <= 4 * limit


def test_bytes_of_one_entity() -> None:
    live = fed(entity_points(400), replace(SETUP, config=replace(SETUP.config, pot=PotConfig())))
    group = live.groups[0]
    (blob,) = packed(live).values()
    one = snapshot.row_dtype(Group(Shared(live.config, SETUP.rules, live.table, live.counts, []), ONE)).itemsize
    # 4 bytes and a bit a value of the window, and a few numbers a feature; the threshold is one for all.
    assert snapshot.row_dtype(group).itemsize <= one + 2 * (9 * 4 + 2 + 30)
    print(f"W=9 F=3: {len(blob)} bytes")  # noqa: T201
