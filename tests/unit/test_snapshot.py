import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.pot import PotConfig
from stream import events, snapshot
from stream.columns import Columns
from stream.detector import Detector, DetectorConfig
from stream.incidents import State
from tests.helpers import MINUTE, T0, Arrival, Persistence, columns, config, detector, normal_points, run, streams


def packed(of: Detector) -> dict[bytes, bytes]:
    return snapshot.pack(of, np.arange(len(of.index.names), dtype=np.int32))


def fed(arrivals: list[Arrival], policy: DetectorConfig | None = None) -> Detector:
    live = detector(policy)
    live.accept(columns(live, arrivals))
    return live


def two_series() -> Detector:
    """One that has an open incident, and one that is still being probed."""
    points = normal_points(120)
    points[-1] = ("a", points[-1][1], 500.0)
    live = fed([*points, *normal_points(5, name="b", seed=1)])
    assert live.incidents.state[0] == State.OPEN
    assert len(live.held) == 5
    return live


LIVE = two_series()
BLOBS = packed(LIVE)


def restored(blobs: Mapping[bytes, bytes], like: Detector = LIVE) -> tuple[Detector, snapshot.Restored]:
    fresh = Detector(like.config, like.model, like.model_ref)
    return fresh, snapshot.unpack(fresh, blobs)


def test_all_comes_back() -> None:
    fresh, outcome = restored(BLOBS)
    assert (outcome.series, outcome.recalibrating, outcome.refused) == (2, 0, [])
    assert packed(fresh) == BLOBS
    assert fresh.held.timestamp_ms.tolist() == LIVE.held.timestamp_ms.tolist()
    assert fresh.held.value.tolist() == LIVE.held.value.tolist()
    here = fresh.index["a"]
    for mine, theirs in ((fresh.windows, LIVE.windows), (fresh.incidents, LIVE.incidents)):
        for name in mine.ARRAYS:
            np.testing.assert_array_equal(getattr(mine, name)[here], getattr(theirs, name)[0], err_msg=name)
    for name in ("interval_ms", "phase_ms", "first_score_ms"):
        assert getattr(fresh, name)[here] == getattr(LIVE, name)[0] > 0
    assert fresh.threshold.pack(np.array([here])) == LIVE.threshold.pack(np.array([0]))


def test_nothing_is_packed_of_nothing() -> None:
    assert packed(detector()) == {}
    named = detector()
    named.index["never seen"]
    named.make_room(1)
    assert packed(named) == {}
    assert restored({})[1] == snapshot.Restored(0, 0, [])


def test_only_the_series_asked_for_are_packed() -> None:
    assert list(snapshot.pack(LIVE, np.array([0], np.int32))) == [b"a"]
    assert list(snapshot.pack(LIVE, np.array([1], np.int32))) == [b"b"]
    assert snapshot.pack(LIVE, np.array([], np.int32)) == {}


def test_a_probing_series_goes_on_where_it_was() -> None:
    points = normal_points(40, name="b", seed=1)
    fresh, _ = restored({b"b": BLOBS[b"b"]})
    rest = fresh.accept(columns(fresh, points[5:]), want_scores=True)
    whole = detector()
    expected = whole.accept(columns(whole, points), want_scores=True)
    assert packed(fresh) == packed(whole)
    assert sum(len(part.slot) for part in rest.scores) == sum(len(part.slot) for part in expected.scores) == 40


@settings(max_examples=40, deadline=None)
@given(stream=streams(most=60), interval=st.sampled_from([0, MINUTE]))
def test_what_is_restored_packs_to_the_same_bytes(stream: list[Arrival], interval: int) -> None:
    live = fed(stream, config(interval_ms=interval))
    blobs = packed(live)
    assert packed(restored(blobs, live)[0]) == blobs
    assert {name.decode() for name in blobs} == {name for name, _, value in stream if not np.isnan(value)}


@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from(sorted(BLOBS)), at=st.floats(0, 1, exclude_max=True), mask=st.integers(1, 255))
def test_a_flipped_byte_is_refused(name: bytes, at: float, mask: int) -> None:
    blob = bytearray(BLOBS[name])
    blob[int(at * len(blob))] ^= mask
    assert_refused(name, bytes(blob))


@pytest.mark.parametrize("name", sorted(BLOBS))
def test_every_flipped_bit_of_the_header_is_refused(name: bytes) -> None:
    for bit in range(8 * 20):
        blob = bytearray(BLOBS[name])
        blob[bit // 8] ^= 1 << bit % 8
        assert_refused(name, bytes(blob))


@pytest.mark.parametrize("name", sorted(BLOBS))
def test_a_blob_of_another_length_is_refused(name: bytes) -> None:
    blob = BLOBS[name]
    for cut in (*range(40), len(blob) // 2, len(blob) - 1):
        assert_refused(name, blob[:cut])
    assert_refused(name, blob + b"\0")
    assert_refused(name, blob + blob)


def assert_refused(name: bytes, blob: bytes) -> None:
    """Refused by its name, and the other series comes back whole."""
    other = next(other for other in BLOBS if other != name)
    fresh, outcome = restored({name: blob, other: BLOBS[other]})
    assert (outcome.series, len(outcome.refused)) == (1, 1)
    assert str(outcome.refused[0]).startswith(f"state of {name.decode()!r}: ")
    assert packed(fresh) == {other: BLOBS[other]}


@pytest.mark.parametrize(
    ("name", "blob", "why"),
    [
        (b"a", b"", "0 bytes are too few for a header"),
        (b"a", b"{}" + BLOBS[b"a"][2:], r"this is no state of Tocsin \(it starts with b'\{\}'\)"),
        (b"a", BLOBS[b"a"][:2] + b"\x63" + BLOBS[b"a"][3:], "version 99 is unknown, this program reads 1"),
        (b"a", BLOBS[b"a"][:3] + b"X" + BLOBS[b"a"][4:], "kind b'X' is unknown"),
        (b"b", BLOBS[b"b"][:3] + b"S" + BLOBS[b"b"][4:], "damaged"),
        (b"a", BLOBS[b"a"][:-1] + b"\x55", "damaged"),
        (b"b", BLOBS[b"a"], "damaged"),  # another series' state under this name
        (b"\xff\n", BLOBS[b"a"], "damaged"),
    ],
)
def test_what_is_no_state_of_this_series_is_refused_with_the_reason(name: bytes, blob: bytes, why: str) -> None:
    _, outcome = restored({name: blob})
    assert outcome.series == 0
    with pytest.raises(type(outcome.refused[0]), match=why):
        raise outcome.refused[0]


def sealed(name: bytes, blob: bytes, body: bytes | None = None) -> bytes:
    """Give a blob another body, and a name, with the right checksum."""
    head, body = bytearray(blob[:20]), blob[20:] if body is None else body
    head[4:8] = len(body).to_bytes(4, "little")
    head[16:20] = zlib.crc32(body, zlib.crc32(bytes(head[:16]), zlib.crc32(name))).to_bytes(4, "little")
    return bytes(head) + body


def test_the_checksum_is_crc32_of_name_header_and_body() -> None:
    for name, blob in BLOBS.items():
        assert sealed(name, blob) == blob


@pytest.mark.parametrize("name", [b"", b"\n", b"x" * 600, b"\xff\x00"])
def test_a_name_that_cannot_be_one_takes_no_slot(name: bytes) -> None:
    for blob in BLOBS.values():
        fresh, outcome = restored({name: sealed(name, blob)})
        assert (outcome.series, len(outcome.refused), fresh.index.names) == (0, 1, [])
        assert packed(fresh) == {}


@pytest.mark.parametrize("length", [1, 15, 17])
def test_points_that_are_not_whole_are_refused(length: int) -> None:
    _, outcome = restored({b"b": sealed(b"b", BLOBS[b"b"], bytes(length))})
    assert "are no whole number of points" in str(outcome.refused[0])


@pytest.mark.parametrize("model", [Persistence(window=10), Persistence(window=8)])
def test_another_window_is_refused(model: Persistence) -> None:
    fresh = Detector(LIVE.config, model, "persistence@1")
    outcome = snapshot.unpack(fresh, BLOBS)
    assert outcome.series == 1, "points that are still probed fit any window"
    assert f"a window of {model.window} needs" in str(outcome.refused[0])
    assert "the model's window or the threshold's ring was changed" in str(outcome.refused[0])


def test_another_ring_of_the_threshold_is_refused() -> None:
    other = config(pot=PotConfig(q=0.05, level=0.75, min_scores=20, min_excess=10, max_excess=17))
    outcome = snapshot.unpack(Detector(other, LIVE.model, LIVE.model_ref), BLOBS)
    assert (outcome.series, len(outcome.refused)) == (1, 1)


def test_another_model_keeps_the_window_and_begins_the_threshold_anew() -> None:
    fresh = Detector(LIVE.config, LIVE.model, "persistence@2")
    outcome = snapshot.unpack(fresh, BLOBS)
    assert (outcome.series, outcome.recalibrating, outcome.refused) == (2, 1, [])
    slot = np.array([fresh.index["a"]], np.int32)
    cell = LIVE.windows.newest[:1] + 1
    for mine, theirs in zip(
        fresh.windows.history(slot, cell), LIVE.windows.history(np.array([0], np.int32), cell), strict=True
    ):
        np.testing.assert_array_equal(mine, theirs)
    result = fresh.accept(Columns.of(slot, [T0 + 121 * MINUTE], [9.0]), want_scores=True)
    score, threshold = result.scores[-1].score, result.scores[-1].threshold
    assert np.isfinite(score).all()
    assert np.isnan(threshold).all()


def test_another_model_warms_up_from_its_own_first_score() -> None:
    policy = config(warmup_ms=100 * MINUTE)
    live = fed(normal_points(200), policy)
    fresh = Detector(policy, live.model, "persistence@2")
    snapshot.unpack(fresh, packed(live))
    more = normal_points(150, start=T0 + 200 * MINUTE, seed=1)
    result = fresh.accept(columns(fresh, more), want_scores=True)
    judged = [int(part.timestamp_ms[0]) for part in result.scores if not np.isnan(part.threshold[0])]
    assert judged[0] == T0 + (200 + 101) * MINUTE


def test_another_model_with_a_calibration_judges_at_once() -> None:
    calibration = np.random.default_rng(0).exponential(size=100)
    fresh = Detector(LIVE.config, LIVE.model, "persistence@2", calibration=calibration)
    snapshot.unpack(fresh, BLOBS)
    slot = fresh.index["a"]
    result = fresh.accept(Columns.of([slot], [T0 + 121 * MINUTE], [9.0]), want_scores=True)
    assert np.isfinite(result.scores[-1].threshold).all()


def test_an_incident_keeps_its_id_when_the_model_changes() -> None:
    points = normal_points(400)
    points[200] = ("a", points[200][1], 500.0)
    before = detector()
    (opened,) = run(before, points[:201]).data[-1:]
    after = Detector(before.config, before.model, "persistence@2")
    snapshot.unpack(after, packed(before))
    result = after.accept(columns(after, points[201:]))
    resolved = result.events[0]
    assert (opened["type"], resolved.type) == ("tocsin.anomaly.opened", "tocsin.anomaly.resolved")
    assert resolved.data.incident == opened["data"]["incident"]
    assert resolved.data.model == "persistence@2"
    assert b"null" not in events.encode(resolved)
    assert np.isfinite(resolved.data.threshold)


def test_a_threshold_that_nothing_could_have_made_begins_anew() -> None:
    body = np.frombuffer(BLOBS[b"a"][20:], snapshot.row_dtype(LIVE)).copy()
    body["threshold"]["scale"] = -1.0
    blobs = {b"a": sealed(b"a", BLOBS[b"a"], body.tobytes()), b"b": BLOBS[b"b"]}
    fresh, outcome = restored(blobs)
    assert outcome.series == 2
    assert [str(problem)[:13] for problem in outcome.refused] == ["state of 'a':"]
    assert "scale" in str(outcome.refused[0])
    slot = fresh.index["a"]
    result = fresh.accept(Columns.of([slot], [T0 + 120 * MINUTE], [9.0]), want_scores=True)
    assert np.isfinite(result.scores[-1].score).all(), "the window was kept"
    assert np.isnan(result.scores[-1].threshold).all()


def test_a_grid_that_was_set_meanwhile_ends_the_probe() -> None:
    points = normal_points(30, name="b", seed=1)
    fresh = Detector(config(interval_ms=MINUTE), LIVE.model, LIVE.model_ref)
    snapshot.unpack(fresh, {b"b": BLOBS[b"b"]})
    assert len(fresh.held) == 0
    fresh.accept(columns(fresh, points[5:]))
    assert len(packed(fresh)[b"b"]) == 20 + snapshot.row_dtype(fresh).itemsize


@pytest.mark.parametrize(("interval_ms", "refused"), [(0, False), (MINUTE, False), (59_000, True), (2 * MINUTE, True)])
def test_a_series_on_another_grid_than_the_configured_one_starts_anew(interval_ms: int, refused: bool) -> None:
    fresh = Detector(config(interval_ms=interval_ms), LIVE.model, LIVE.model_ref)
    outcome = snapshot.unpack(fresh, {b"a": BLOBS[b"a"]})
    assert outcome.series == (not refused)
    if refused:
        problem = f"state of 'a': its grid of 60 s is not the configured one of {interval_ms // 1000} s"
        assert [str(one) for one in outcome.refused] == [problem]
        fresh.accept(columns(fresh, normal_points(3)))
        assert fresh.interval_ms[0] == interval_ms


def test_ten_thousand_series() -> None:
    names = [f"kpi-{i}" for i in range(10_000)]
    live = detector(config(interval_ms=MINUTE))
    for minute in range(3):
        live.accept(columns(live, [(name, T0 + minute * MINUTE, float(i)) for i, name in enumerate(names)]))
    blobs = packed(live)
    fresh, outcome = restored(blobs, live)
    assert outcome.series == len(blobs) == 10_000
    assert packed(fresh) == blobs


@pytest.mark.parametrize(("window", "limit"), [(30, 1_500), (120, 2_500)])
def test_bytes_of_one_kpi(window: int, limit: int, record_property: Any) -> None:
    live = Detector(DetectorConfig(interval_ms=MINUTE), Persistence(window=window), "persistence@1")
    live.accept(columns(live, normal_points(5)))
    (blob,) = packed(live).values()
    record_property("bytes", len(blob))
    print(f"W={window} F=1 max_excess={live.config.pot.max_excess}: {len(blob)} bytes")  # noqa: T201
    assert len(blob) <= limit
