"""What can be said of stored state without any server: blobs in plain words, and files of them."""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Sequence
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.pot import PotConfig, Spot
from stream import snapshot, versions
from stream.blobs import SHADOW, Header, model_id
from stream.columns import NAME_BYTES_MAX
from stream.detector import Detector
from stream.errors import InputError, StateError
from stream.events import iso_time
from stream.inspection import SeriesState, inspected
from stream.statefile import FORMAT, Origin, Section, read, write
from tests.helpers import MINUTE, SMALL_POT, T0, Record, columns, config, detector, normal_points


def fed(arrivals: Sequence[Record], of: Detector | None = None) -> Detector:
    live = of or detector()
    live.accept(columns(live, arrivals))
    return live


def blobs_of(live: Detector) -> dict[bytes, bytes]:
    return snapshot.pack(live, np.arange(len(live.index.names), dtype=np.int32))


def known(live: Detector, name: str, pot: PotConfig = SMALL_POT) -> SeriesState:
    return inspected(name.encode(), blobs_of(live)[name.encode()], pot)


# -- in plain words ---------------------------------------------------------------------------------------------------


def test_a_series_that_probes() -> None:
    said = known(fed(normal_points(3)), "a")
    assert (said.name, said.shadow, said.version, said.window, said.features) == ("a", False, 3, 9, 1)
    assert said.interval_s is None and said.probing
    assert said.last_point == iso_time(T0 + 2 * MINUTE)
    assert said.last_arrival is None and not said.silent
    assert (said.filled, said.learned, said.incident) == (0.0, 0.0, None)
    assert (said.threshold.health, said.threshold.z_q, said.threshold.n) == ("warming", None, 0)
    assert said.model == model_id("persistence@1")


def test_a_series_with_all_that_there_is() -> None:
    points = normal_points(120)
    live = fed([*points[:-1], ("a", points[-1][1], 500.0)])
    said, spot = known(live, "a"), live.groups[0].judge.threshold
    assert said.interval_s == 60.0 and not said.probing
    assert said.filled == 1.0 and 0.5 < said.learned < 1.0
    assert said.threshold.health in ("ok", "degenerate", "drifting")
    state = spot.pack(np.zeros(1, np.int64))[0]
    assert said.threshold.z_q == pytest.approx(float(state["z"]), rel=1e-5)
    assert said.threshold.t == pytest.approx(float(state["t"]), rel=1e-5)
    assert (said.threshold.n, said.threshold.n_excess) == (int(state["n"]), int(state["n_excess"]))
    assert said.threshold.q == 0.05 and said.threshold.alarms >= 1 and said.threshold.judged > 80
    assert said.incident is not None and said.incident.state == "open"
    assert said.incident.severity in ("warning", "major", "critical")
    assert said.incident.last == iso_time(points[-1][1])
    assert said.incident.peak_ratio > 1
    assert said.bytes == len(blobs_of(live)[b"a"])


def test_arrival_and_the_shadow() -> None:
    live = detector()
    live.accept(columns(live, normal_points(5)), np.full(5, T0 + 1234))
    assert known(live, "a").last_arrival == iso_time(T0 + 1234)
    blob, name = blobs_of(live)[b"a"], b"a" + SHADOW
    with pytest.raises(StateError, match="damaged"):
        inspected(name, blob, SMALL_POT)  # that of the first model under the name of the second


def test_what_cannot_be_read_is_refused_by_name() -> None:
    blob = blobs_of(fed(normal_points(40)))[b"a"]
    for wrong, why in ((blob[:-1], "damaged"), (blob[:2] + b"\x09" + blob[3:], "version 9"), (b"", "0 bytes")):
        with pytest.raises(StateError, match=f"'a'.*{why}"):
            inspected(b"a", wrong, SMALL_POT)
    with pytest.raises(StateError, match=r"'a'.*ring was changed"):
        inspected(b"a", blob, replace(SMALL_POT, max_excess=400))


@pytest.mark.parametrize("version", [2, 3])
def test_a_header_of_gigabytes_is_refused_before_anything_is_made_of_it(version: int) -> None:
    body = b"\0" * 100
    header = np.zeros((), versions._HEADER_2)
    header["magic"], header["version"], header["kind"] = b"TK", version, b"S"
    header["length"] = len(body)
    for window, features in ((2**32 - 1, 2**32 - 1), (0, 1), (1, 0), (2**31, 1)):
        header["window"], header["features"], header["crc32"] = window, features, 0
        header["crc32"] = versions.checksum(b"a", header.tobytes(), body)
        with pytest.raises(StateError, match="too few"):
            inspected(b"a", header.tobytes() + body, SMALL_POT)


def test_a_threshold_that_none_can_have_is_refused_by_name() -> None:
    live = fed(normal_points(60))
    blob = blobs_of(live)[b"a"]
    layout = snapshot.record_dtype(9, 1, Spot(SMALL_POT).dtype)
    row = np.frombuffer(blob[28:], layout).copy()
    row["threshold"]["q"] = 7.0
    with pytest.raises(StateError, match=r"'a'.*q"):
        inspected(b"a", Header(9, 1, model_id("persistence@1")).sealed(b"a", row.tobytes()), SMALL_POT)


LIVE = fed([*normal_points(120), *normal_points(3, name="b")])
BLOBS = blobs_of(LIVE)


@given(
    name=st.sampled_from([b"a", b"b"]),
    at=st.integers(0, 600),
    noise=st.binary(min_size=1, max_size=16),
    cut=st.booleans(),
)
def test_any_content_under_a_right_checksum_is_read_or_refused(name: bytes, at: int, noise: bytes, cut: bool) -> None:
    header, body = bytearray(BLOBS[name][:24]), BLOBS[name][28:]
    body = body[:at] + noise + (b"" if cut else body[at + len(noise) :])
    header[12:16] = len(body).to_bytes(4, "little")
    sum_ = zlib.crc32(body, zlib.crc32(bytes(header), zlib.crc32(name))).to_bytes(4, "little")
    try:
        said = inspected(name, bytes(header) + sum_ + body, SMALL_POT)
    except StateError as e:
        assert f"'{name.decode()}'" in str(e)
    else:
        json.dumps(msgspec.to_builtins(said), allow_nan=False)


# -- files ------------------------------------------------------------------------------------------------------------

ORIGIN = Origin(FORMAT, "cluster", "tocsin", "kpi.points", 3, "2026-01-05T00:00:00Z")
SECTIONS = [
    Section(
        2, 17, True, {b"b": b"\x00\xff" * 20, "a.é".encode(): b"", b"b" + SHADOW: b"beside"}, {b"\0clock_ms": b"5"}
    ),
    Section(0, 0, False, {}),
]


def written(origin: Origin = ORIGIN, sections: list[Section] = SECTIONS) -> bytes:
    to = io.BytesIO()
    write(to, origin, sections)
    return to.getvalue()


def test_what_is_written_is_read() -> None:
    origin, sections = read(io.BytesIO(written()), "f")
    assert origin == ORIGIN
    assert sections == SECTIONS


def test_each_line_is_json_and_the_same_state_gives_the_same_bytes() -> None:
    lines = [json.loads(line) for line in written().splitlines()]
    assert lines[0]["topic"] == "kpi.points"
    assert lines[1] == {"partition": 2, "offset": 17, "whole": True, "series": 3, "fields": {"clock_ms": "5"}}
    assert [(one["series"], one["shadow"]) for one in lines[2:5]] == [("a.é", False), ("b", False), ("b", True)]
    assert lines[-1]["lines"] == len(lines) - 1
    reordered = [replace(one, blobs=dict(sorted(one.blobs.items(), reverse=True))) for one in SECTIONS]
    assert written(sections=reordered) == written()


def test_fields_of_the_service_are_told_from_series() -> None:
    section = Section.of(1, 5, {b"a": b"1", b"a" + SHADOW: b"2", b"\0clock_ms": b"3"}, whole=True)
    assert section == Section(1, 5, True, {b"a": b"1", b"a" + SHADOW: b"2"}, {b"\0clock_ms": b"3"})


def test_a_file_cut_anywhere_is_refused() -> None:
    whole = written()
    for end in range(len(whole) - 1):  # the last byte is a line end
        with pytest.raises(InputError, match=r"^f"):
            read(io.BytesIO(whole[:end]), "f")


def test_a_file_changed_anywhere_is_refused() -> None:
    whole = written()
    for at in range(0, len(whole) - 1, 3):
        other = bytearray(whole)
        other[at] ^= 1
        with pytest.raises(InputError, match=r"^f"):
            read(io.BytesIO(bytes(other)), "f")


@pytest.mark.parametrize(
    ("sections", "why"),
    [
        ([Section(3, 0, True, {})], "partition 3 of 3"),
        ([Section(1, 0, True, {}), Section(1, 0, True, {})], "comes twice"),
        ([Section(1, -1, True, {})], "offset=-1"),
        ([Section(1, 0, True, {b"a\nb": b""})], "control character"),
        ([Section(1, 0, True, {b"x" * (NAME_BYTES_MAX + 1): b""})], "longer than"),
    ],
)
def test_what_no_export_writes_is_refused(sections: list[Section], why: str) -> None:
    with pytest.raises(InputError, match=why):
        read(io.BytesIO(written(sections=sections)), "f")


def test_another_format_more_lines_and_lines_without_end_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    later = Origin(2, *(getattr(ORIGIN, name) for name in ORIGIN.__struct_fields__[1:]))
    with pytest.raises(InputError, match="format 2 is unknown, this program reads 1"):
        read(io.BytesIO(written(later)), "f")
    with pytest.raises(InputError, match="more behind the end"):
        read(io.BytesIO(written() + b"{}\n"), "f")
    for text in (b"", b"\n", b"[]", b"\xff\xfe", b'{"tocsin_state": "1"}', b"[" * 100_000):
        with pytest.raises(InputError, match="f:1"):
            read(io.BytesIO(text), "f")
    monkeypatch.setattr("stream.statefile._LINE_BYTES_MAX", 1000)
    with pytest.raises(InputError, match="longer than 1000 bytes"):
        read(io.BytesIO(b"x" * 5000), "f")


def test_the_config_of_the_tests_is_that_of_the_blobs() -> None:
    assert config().config.pot == SMALL_POT
