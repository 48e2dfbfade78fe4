import json
import math
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from stream.columns import SeriesIndex
from stream.records import decode

TIME = 1_469_376_000

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(10**25), 10**25)
    | st.sampled_from([10**400, -(10**400), TIME, TIME * 1000, -(2**63), 2**63, 2**64])
    | st.floats()
    | st.text(st.characters(), max_size=8)
    | st.sampled_from(["2016-07-24", "2016-07-24T16:00:00+99:00", "0001-01-01T00:00:00+14:00", "a", "m"])
)
anything = st.recursive(
    scalars, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=4), x, max_size=3)
)
fields = st.sampled_from(["kpi", "timestamp", "value", "entity", "values", "x"])
likely = st.fixed_dictionaries(
    {"timestamp": st.just(TIME) | scalars},
    optional={
        "kpi": st.sampled_from(["a", "b"]) | scalars,
        "value": st.floats(-10, 10) | scalars,
        "entity": st.just("m") | scalars,
        "values": st.dictionaries(st.sampled_from(["cpu", "mem", "\n"]), st.floats(-10, 10) | scalars, max_size=3),
    },
)
objects = likely | st.dictionaries(fields, anything, max_size=6)
spelled = objects.map(lambda x: json.dumps(x).encode())


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """JSON with a few bytes cut, changed or put in."""
    raw = bytearray(draw(spelled))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(raw)))
        raw[at : at + draw(st.integers(0, 2))] = draw(st.binary(max_size=2))
    return bytes(raw)


records = st.none() | st.binary(max_size=40) | spelled | damaged()


@settings(max_examples=400, deadline=None)
@given(st.lists(records, max_size=6), st.booleans())
def test_every_record_ends_as_points_or_as_one_reject(raw: list[bytes | None], timed: bool) -> None:
    index = SeriesIndex()
    arrival = [TIME * 1000 + 100 * i for i in range(len(raw))] if timed else None
    columns, rejects = decode(raw, index, arrival_ms=arrival)
    used, refused = set(columns.row.tolist()), [reject.row for reject in rejects]
    assert refused == sorted(set(refused))
    assert used.isdisjoint(refused)
    assert used.union(refused) == set(range(len(raw)))
    assert columns.row.tolist() == sorted(columns.row.tolist())
    assert all(0 <= slot < len(index.names) for slot in columns.slot.tolist())
    assert all(name.isprintable() and name.strip() for name in index.names)
    assert all(0 <= time <= 7_258_118_400_000 for time in columns.timestamp_ms.tolist())
    assert all(math.isnan(value) or abs(value) <= 1e30 for value in columns.value.tolist())
    assert all(reject.detail for reject in rejects)


@settings(max_examples=300, deadline=None)
@given(st.lists(records, min_size=1, max_size=6))
def test_a_record_reads_the_same_alone(raw: list[bytes | None]) -> None:
    index = SeriesIndex()
    columns, rejects = decode(raw, index)
    together: dict[int, Any] = {reject.row: (reject.reason, reject.detail) for reject in rejects}
    for slot, time, value, row in zip(columns.slot, columns.timestamp_ms, columns.value, columns.row, strict=True):
        together.setdefault(int(row), []).append((index.names[slot], int(time), repr(float(value))))
    for row, one in enumerate(raw):
        index = SeriesIndex()
        columns, rejects = decode([one], index)
        alone: Any = [
            (index.names[slot], int(time), repr(float(value)))
            for slot, time, value in zip(columns.slot, columns.timestamp_ms, columns.value, strict=True)
        ] or (rejects[0].reason, rejects[0].detail)
        assert together[row] == alone


@given(
    st.text(st.characters(categories=["L", "N", "P", "S"]), min_size=1, max_size=20),
    st.integers(TIME, 2 * TIME),
    st.floats(-1e30, 1e30) | st.none(),
)
def test_what_is_written_is_read(kpi: str, timestamp: int, value: float | None) -> None:
    index = SeriesIndex()
    raw = json.dumps({"kpi": kpi, "timestamp": timestamp, "value": value}, ensure_ascii=False).encode()
    columns, rejects = decode([raw], index)
    assert rejects == []
    assert index.names == [kpi]
    assert columns.timestamp_ms.tolist() == [timestamp * 1000]
    assert math.isnan(columns.value[0]) if value is None else columns.value.tolist() == [value]
