"""What has been retried is kept in an offset and some text: nothing is passed over, nothing taken for done."""

from __future__ import annotations

from collections.abc import Mapping

from aiokafka import ConsumerRecord
from hypothesis import given
from hypothesis import strategies as st

from stream.rejects import ATTEMPT, Listing, Progress, Rejected

REASONS = ("too_late", "bad_value", "empty")
HEADERS = {
    "tocsin-reason": b"too_late",
    "tocsin-detail": b"a sentence",
    "tocsin-topic": b"kpi.points",
    "tocsin-partition": b"2",
    "tocsin-offset": b"17",
}


def record(
    offset: int = 5, headers: Mapping[str, bytes | None] | None = None, ms: int = 1000, partition: int = 1
) -> ConsumerRecord:
    made = HEADERS if headers is None else headers
    return ConsumerRecord("kpi.rejects", partition, offset, ms, 0, b"k", b"v", None, 1, 1, tuple(made.items()))


def test_a_reject_says_where_it_came_from() -> None:
    one = Rejected.of(record())
    assert one == Rejected(1, 5, 1000, "too_late", "a sentence", "kpi.points", 2, 17, 0, None, b"k", b"v")
    assert one.place == "kpi.points 2:17"
    more = Rejected.of(record(headers={**HEADERS, ATTEMPT: b"2", "tocsin-truncated-from": b"300000"}))
    assert more is not None and (more.attempt, more.truncated_from) == (2, 300_000)


def test_what_no_worker_has_written_is_none() -> None:
    for name, value in (
        ("tocsin-reason", b"Robert'); DROP TABLE"),
        ("tocsin-reason", None),
        ("tocsin-topic", b""),
        ("tocsin-partition", b"-1"),
        ("tocsin-offset", "٣".encode()),
        ("tocsin-offset", b"9" * 30),
    ):
        assert Rejected.of(record(headers={**HEADERS, name: value})) is None, (name, value)
    assert Rejected.of(record(headers={})) is None
    odd = Rejected.of(record(headers={**HEADERS, ATTEMPT: b"many"}))
    assert odd is not None and odd.attempt == 0


def test_a_listing_keeps_the_newest_and_counts_all() -> None:
    listing = Listing(2, frozenset({"too_late"}))
    others = {**HEADERS, "tocsin-reason": b"empty"}
    listing.add([record(1, ms=30), record(2, ms=10), record(3, ms=20), record(4, others, ms=40), record(5, {})])
    assert [one.offset for one in listing.newest] == [3, 1]
    assert (listing.counts, listing.foreign) == ({"too_late": 3}, 1)
    listing = Listing(0, frozenset())
    listing.add([record(1)])
    assert (listing.newest, listing.counts.total()) == ([], 1)


# -- progress ---------------------------------------------------------------------------------------------------------

spans = st.tuples(st.integers(0, 60), st.integers(1, 30)).map(lambda pair: (pair[0], pair[0] + pair[1]))
steps = st.lists(st.tuples(st.sets(st.sampled_from(REASONS), max_size=2), spans) | st.integers(0, 60), max_size=12)


@given(steps)
def test_progress_is_what_a_set_would_be(taken: list[tuple[set[str], tuple[int, int]] | int]) -> None:
    progress, done = Progress(), set[tuple[str, int]]()
    for one in taken:
        if isinstance(one, int):
            progress.raise_to(one)
            done |= {(reason, offset) for reason in REASONS for offset in range(one)}
        else:
            reasons, (begin, end) = one
            progress.add(sorted(reasons), begin, end)
            done |= {(reason, offset) for reason in reasons or REASONS for offset in range(begin, end)}
        progress = Progress.parsed(progress.floor, progress.metadata())
        assert {(reason, offset) for reason in REASONS for offset in range(100) if progress.has(reason, offset)} == done
        assert all(begin < end and end > progress.floor for some in progress.spans.values() for begin, end in some)


def test_what_was_done_from_the_floor_on_needs_no_text() -> None:
    progress = Progress(10)
    progress.add((), 20, 30)
    assert progress.metadata() == "*:20-30"
    progress.raise_to(20)
    assert (progress.floor, progress.metadata()) == (30, "")


def test_text_that_cannot_be_read_is_no_progress() -> None:
    for text in ("", "nonsense", "Too Late:1-5", "too_late", "too_late:5", ";;:", "too_late:x-9"):
        progress = Progress.parsed(3, text)
        assert progress.floor == 3
        assert not any(progress.has(reason, offset) for reason in REASONS for offset in range(3, 20)), text
