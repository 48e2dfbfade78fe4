"""What is fuzzed: each decoder with valid inputs, its words, and how it is told that an input is refused."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import tempfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cramjam
import msgspec
import numpy as np
import torch
from aiokafka import codec

from models.checkpoint import CONFIG, FILES, Bundle, Source, Training, decode, encode
from models.deepant import DeepAnT, DeepAnTConfig, Network
from models.errors import CheckpointError
from stream import events, records, snapshot
from stream.batches import CODECS, UNPACKED_BYTES_MAX, BatchError
from stream.columns import SeriesIndex
from stream.csvfile import read_table
from stream.detector import Detector, Served
from stream.errors import InputError
from tests.fuzz.mutate import mutated
from tests.helpers import MINUTE, T0, Persistence, Setup, columns, config

METRICS = ("cpu", "mem")
_VERSION_2 = Path(__file__).parents[1] / "unit" / "data" / "state_version_2.json"
_FED = ("w", "c", "new", "open", "correcting")  # series that go on after they were restored


@dataclass(frozen=True)
class Target:
    """A decoder.

    Attributes:
        name: of it.
        corpus: valid inputs.
        read: takes an input; returns "" if it was read, or the reason why it was not. What it raises is a crash.
        words: of its language.
        repair: makes checksums right again, so that what lies behind them is reached; applied to half of the inputs.
    """

    name: str
    corpus: tuple[bytes, ...]
    read: Callable[[bytes], str]
    words: tuple[bytes, ...] = ()
    repair: Callable[[bytes], bytes] | None = None

    def draw(self, rng: random.Random) -> bytes:
        """Return a mutated input."""
        data = mutated(rng, self.corpus, self.words)
        return self.repair(data) if self.repair is not None and rng.random() < 0.7 else data


# -- points -----------------------------------------------------------------------------------------------------------


def point() -> Target:
    """Return the decoder of points."""
    good: list[object] = [
        {"kpi": "checkout.latency_p99", "timestamp": 1469376000, "value": 0.84},
        {"kpi": "a", "timestamp": 1469376000000.5, "value": None},
        {"kpi": "ä€😀", "timestamp": "2016-07-24T16:00:00Z", "value": -1e30},
        {"kpi": "a", "timestamp": "2016-07-24 18:00:00+02:00", "value": 1, "more": [{"a": [1, 2, {}]}]},
        {"entity": "m", "timestamp": 1469376000, "values": {"cpu": 0.3, "mem": None, "net": 3}},
        {"entity": "n", "timestamp": 1469376000, "values": {"cpu": 0.3, "disk": 1e-300}},
        {"entity": "m", "timestamp": 1469376000, "metric": "cpu", "value": 0.3},
    ]
    corpus = (*(json.dumps(one).encode() for one in good), b'{"kpi":"a","timestamp":1469376000,"value":NaN}')
    state = {"index": SeriesIndex()}

    def fresh() -> SeriesIndex:
        return SeriesIndex(metrics_of=lambda name: METRICS if name.startswith("m") else None)

    state["index"] = fresh()

    def read(data: bytes) -> str:
        if len(state["index"]) > 5_000:
            state["index"] = fresh()
        # Beside others, as in a batch; one without a time of arrival.
        got, rejects = records.decode(
            [corpus[0], data, corpus[4]], state["index"], arrival_ms=[1_469_376_000_000, -1, 1_469_376_000_000]
        )
        assert {0, 2} <= set(got.row.tolist()), "its neighbours are read whatever it is"
        assert [one.row for one in rejects] in ([], [1])
        assert bool(rejects) != bool((got.row == 1).any()), "either read or refused, never both and never neither"
        assert not np.isinf(got.value).any()
        assert (got.slot >= 0).all()
        assert ((got.timestamp_ms >= 0) & (got.timestamp_ms <= records.TIMESTAMP_MAX_MS)).all()
        if rejects:
            assert rejects[0].detail
            rejects[0].detail.encode("utf-8", "replace")
            return rejects[0].reason
        return ""

    words = (b'"kpi":', b'"entity":', b'"values":{', b'"metric":', b'"timestamp":', b'"value":', b"2016-07-24T16:00")
    return Target("point", corpus, read, (*words, b"[" * 3000, b'{"a":' * 2000, b"}" * 2000))


# -- events -----------------------------------------------------------------------------------------------------------


def _spikes(length: int, seed: int) -> list[tuple[str, int, float]]:
    values = np.random.default_rng(seed).normal(10.0, 1.0, length)
    values[60::25] += 40
    values[-12:] += 90
    return [("a", T0 + i * MINUTE, float(value)) for i, value in enumerate(values)]


def event() -> Target:
    """Return the decoder of events."""
    live = config(silent_after=2).detector()
    stream = [*_spikes(150, 1), ("b", T0 + 400 * MINUTE, 1.0), ("a", T0 + 401 * MINUTE, 1.0)]
    told = live.accept(columns(live, stream)).events
    corpus = tuple({one.type: events.encode(one) for one in told}.values())
    assert len(corpus) >= 4

    def read(data: bytes) -> str:
        try:
            one = events.decode(data)
        except msgspec.ValidationError:
            return "wrong_type"
        except msgspec.DecodeError:
            return "not_json"
        again = events.decode(events.encode(one))
        assert events.encode(again) == events.encode(one)
        return ""

    words = (b'"type":"tocsin.kpi.silent"', b'"type":"tocsin.anomaly.opened"', b'"data":{', b'"features":[', b'"peak":')
    return Target("event", corpus, read, (*words, b"[" * 3000, b'{"a":' * 2000))


# -- state ------------------------------------------------------------------------------------------------------------


def _watching() -> Setup:
    """Return what makes a detector with a KPI that corrects, one that waits, and entities."""
    one = config(lateness_ms=3 * MINUTE, silent_after=3)
    (rule,) = one.rules
    waits = replace(rule, match=("w*",), policy=replace(rule.policy, wait=True))
    entities = replace(rule, match=("m*",), policy=replace(rule.policy, interval_ms=MINUTE))
    served = one.served[0]
    pair = Served("pair@1", Persistence(features=2), METRICS)
    return Setup(one.config, (waits, entities, rule), (served, pair, served))


def blob() -> Target:
    """Return the decoder of state."""
    setup = _watching()
    live = setup.detector()
    stream: list[tuple[str, int, object]] = []
    for i, (_, time, value) in enumerate(_spikes(140, 2)):
        shifted = time - 2 * MINUTE if i % 10 == 3 else time
        stream += [("a", shifted, value), ("w", shifted, value), ("m", time, {i % 2: value}), ("c", time, value)]
    stream += [("new", T0, 1.0)]
    live.accept(columns(live, stream))  # type: ignore[arg-type]
    blobs = snapshot.pack(live, np.arange(len(live.index.names), dtype=np.int32))
    earlier = json.loads(_VERSION_2.read_text())["blobs"]
    blobs |= {name.encode(): bytes.fromhex(earlier[name]) for name in ("open", "correcting", "short")}
    corpus = tuple(bytes([len(field)]) + field + blob for field, blob in blobs.items())
    points = [*_spikes(40, 3), *((name, time, x) for name in _FED for _, time, x in _spikes(20, 4))]
    after = [(name, time + 150 * MINUTE, value) for name, time, value in points]

    def read(data: bytes) -> str:
        size = data[0] if data else 0
        field, blob = data[1 : 1 + size], data[1 + size :]
        other = Detector(setup.config, setup.rules, setup.served)
        restored = snapshot.unpack(other, {field: blob})
        if restored.refused:
            (problem,) = restored.refused
            assert str(problem)
            return "refused"
        # What was taken for whole has to be whole: points, silence and another snapshot go by it.
        with np.errstate(all="ignore"):  # a forged threshold may be as large as it likes
            other.accept(columns(other, after))
        other.clock(T0 + 10**10)
        snapshot.pack(other, np.arange(len(other.index.names), dtype=np.int32))
        return ""

    def repair(data: bytes) -> bytes:
        size = data[0] if data else 0
        field, blob = data[1 : 1 + size], data[1 + size :]
        header, body = blob[:28], blob[28:]
        if len(header) < 28:
            return data
        header = header[:12] + len(body).to_bytes(4, "little") + header[16:]
        crc = zlib.crc32(body, zlib.crc32(header[:-4], zlib.crc32(field)))
        return data[: 1 + size] + header[:-4] + crc.to_bytes(4, "little") + body

    for whole in corpus:
        assert repair(whole) == whole
        assert read(whole) == ""
    return Target(
        "blob", corpus, read, (b"TK\x03S", b"TK\x02S", b"TK\x01S", b"\x00shadow", b"\xdd\xff\xff\xff\xff"), repair
    )


# -- batches ----------------------------------------------------------------------------------------------------------


def batch() -> Target:
    """Return what unpacks batches; the first byte of an input says by which codec."""
    plain = [b"", b"abc", bytes(200_000), b"".join(b'{"kpi":"a","timestamp":%d,"value":1}' % t for t in range(500))]
    packers = (gzip.compress, codec.snappy_encode, cramjam.snappy.compress_raw, codec.lz4_encode, codec.zstd_encode)
    names = ("gzip", "snappy", "snappy", "lz4", "zstd")
    corpus = tuple(bytes([i]) + bytes(pack(one)) for i, pack in enumerate(packers) for one in plain)

    def read(data: bytes) -> str:
        try:
            content = CODECS[names[data[0] % len(names) if data else 0]](data[1:])
        except BatchError as e:
            assert str(e)
            return "too_large" if "more than" in str(e) else "damaged"
        assert len(content) <= UNPACKED_BYTES_MAX
        return ""

    return Target("batch", corpus, read, (b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18", b"\xff\xff\xff\x7f", b"\0\0\0\0"))


# -- files ------------------------------------------------------------------------------------------------------------


def csv() -> Target:
    """Return the reader of CSV files, plain and gzip."""
    texts = [
        "timestamp,value,label\n" + "".join(f"{1469376000 + 60 * i},{i / 7:.3f},{i % 2}\n" for i in range(30)),
        "".join(f"2016-07-24 16:{i:02}:00;{i}\n" for i in range(20)),
        "time,cpu,mem,net\n" + "".join(f"{1469376000000 + 60_000 * i},{i},,{-i}e3\n" for i in range(20)),
        "KPI ID\ttimestamp\tvalue\n" + "".join(f"k{i % 3}\t{1469376000 + i}\t{i}\n" for i in range(20)),
        'sep=;\n# a comment\n"time";"a ""b"" c"\n' + "".join(f'"{1469376000 + i}";"{i}"\n' for i in range(10)),
    ]
    plain = tuple(text.encode() for text in texts)
    corpus = plain + tuple(gzip.compress(one, mtime=0) for one in plain[:2])
    path = Path(tempfile.mkdtemp(prefix="tocsin-fuzz-")) / "a.csv"

    def read(data: bytes) -> str:
        path.write_bytes(data)
        reason = ""
        for entity in (False, True):
            try:
                table = read_table(path, entity=entity)
            except InputError as e:
                assert str(e)
                reason = "refused"
                continue
            assert len(table.value) == len(table.timestamp_ms) == len(table.label) == len(table.line)
            assert not np.isinf(table.value).any()
            assert len(table.refused) == min(table.n_refused, 100)
        return reason

    def repair(data: bytes) -> bytes:
        return gzip.compress(data, 1, mtime=0) if data[:2] != b"\x1f\x8b" else data

    return Target("csv", corpus, read, (b"\n", b",", b";", b'"', b"#", b"\r\n", b"nan", b"timestamp", b"sep=,"), repair)


_NAMES = (CONFIG, *FILES)


def checkpoint() -> Target:
    """Return the reader of checkpoints; an input is the number of a file and its content, the others are whole."""
    shape = DeepAnTConfig(window=10, filters=4, hidden=8, scaling="train")
    torch.manual_seed(1)
    constants = {name: np.full(1, 0.5) for name in ("center", "scale", "usual_step")}
    model = DeepAnT(shape, dict(Network(shape).state_dict()), constants)
    training = Training(
        sources=(Source("a.csv", 100, "ab" * 32),),
        seed=1,
        epochs=2,
        best_epoch=1,
        train_losses=(0.5, 0.4),
        held_out_losses=(0.1, 0.2),
    )
    scores = np.random.default_rng(1).exponential(size=50).astype(np.float32)
    whole = encode("a", Bundle(model, (scores,), MINUTE, training), "")
    files = {name: whole[name] for name in _NAMES}
    corpus = tuple(bytes([i]) + files[name] for i, name in enumerate(_NAMES))

    def read(data: bytes) -> str:
        number = data[0] % len(_NAMES) if data else 0
        mine = files | {_NAMES[number]: data[1:]}
        if number:  # the digest of what is read is that of what is there: what lies behind it is reached
            digests = json.loads(mine[CONFIG])
            digests["sha256"][_NAMES[number]] = hashlib.sha256(data[1:]).hexdigest()
            mine[CONFIG] = json.dumps(digests).encode()
        try:
            decode(Path("/a/1"), "a", 1, lambda path: mine[path.name])
        except CheckpointError as e:
            assert str(e)
            return "refused"
        return ""

    assert [read(one) for one in corpus] == [""] * len(corpus)
    words = (b'"shape":[', b'"dtype":"F64"', b'"data_offsets":[0,', b'"window":', b'"family":', b'"features":')
    return Target("checkpoint", corpus, read, (*words, b"[" * 3000))


TARGETS: dict[str, Callable[[], Target]] = {
    "point": point,
    "event": event,
    "blob": blob,
    "batch": batch,
    "csv": csv,
    "checkpoint": checkpoint,
}


def chosen(names: Sequence[str]) -> list[Target]:
    """Return the targets of these names, all where none is named."""
    return [TARGETS[name]() for name in names or TARGETS]
