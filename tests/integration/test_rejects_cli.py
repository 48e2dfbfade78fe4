"""tocsin rejects on real brokers: what was refused is listed, and sent in again once, whatever happens meanwhile."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from aiokafka import AIOKafkaProducer, ConsumerRecord

from stream import rejects
from stream.commands import app
from stream.errors import BrokerError, ConfigError, TocsinError
from stream.kafka import client_options
from stream.rejects import ATTEMPT, Retried, Wanted, list_rejects, retry
from stream.settings import KafkaSettings, Settings
from stream.topics import ensure_topics
from stream.verify import end_offsets
from tests.e2e.program import Running, lines_of
from tests.live import DEADLINE_S, environment_for, read_all, settings_for, until, working

KEY = b"the key"
HUGE = b'{"kpi": "' + b"x" * 900_000 + b'"}'


def one_partition(broker: str, redis_url: str, unique: str, **more: str) -> Settings:
    return settings_for(broker, redis_url, unique, TOCSIN_KAFKA__PARTITIONS="1", **more)


async def send(kafka: KafkaSettings, values: Sequence[bytes]) -> None:
    producer = AIOKafkaProducer(**client_options(kafka))
    await producer.start()
    try:
        for value in values:
            await producer.send(kafka.points_topic, value, key=KEY, partition=0)
        await producer.flush()
    finally:
        await producer.stop()


async def reject(kafka: KafkaSettings, count: int, *, reasons: Sequence[str] = ("bad_value",)) -> None:
    """Put rejects on their topic as a worker does."""
    await ensure_topics(kafka, {kafka.rejects_topic: 2, kafka.points_topic: 3})
    producer = AIOKafkaProducer(**client_options(kafka))
    await producer.start()
    try:
        for i in range(count):
            said = {"reason": reasons[i % len(reasons)], "topic": kafka.points_topic, "partition": i % 3, "offset": i}
            headers = [(f"tocsin-{name}", str(value).encode()) for name, value in said.items()]
            await producer.send(kafka.rejects_topic, b"%d" % i, key=b"k%d" % i, headers=headers, partition=i % 2)
        await producer.flush()
    finally:
        await producer.stop()


async def served(settings: Settings) -> None:
    """Let a worker take in all that there is."""
    kafka = settings.kafka
    async with working(settings) as worker:
        end = await end_offsets(kafka, kafka.points_topic)
        read = await read_all(kafka, kafka.points_topic)
        last = {record.partition: record.offset for record in read}
        assert last.keys() <= end.keys()
        await until(
            lambda: all(one.settled > last.get(at.partition, -1) for at, one in worker.partitions.items()), "settled"
        )


async def points(kafka: KafkaSettings) -> list[ConsumerRecord]:
    return await read_all(kafka, kafka.points_topic)


def header(record: ConsumerRecord, name: str) -> bytes | None:
    return dict(record.headers).get(name)


async def counts(kafka: KafkaSettings) -> Mapping[str, int]:
    return (await list_rejects(kafka, limit=0, records=1000)).counts


async def test_what_was_refused_goes_in_again_once_its_reason_is_gone(broker: str, redis_url: str, unique: str) -> None:
    narrow, wide = (one_partition(broker, redis_url, unique, TOCSIN_FUTURE_LIMIT_S=limit) for limit in ("60", "10000"))
    kafka, now_ms = narrow.kafka, int(time.time() * 1000)
    future = [json.dumps({"kpi": "a", "timestamp": now_ms + 3_600_000 + i, "value": i}).encode() for i in range(3)]
    await ensure_topics(kafka, {kafka.points_topic: 1})
    await send(kafka, [*future, b"hello", HUGE, b"{"])
    await served(narrow)
    assert await counts(kafka) == {"in_the_future": 3, "not_json": 2, "too_large": 1}
    listing = await list_rejects(kafka, reasons=["not_json"], limit=1, records=1000)
    assert [(one.source_offset, one.value, one.key, one.attempt) for one in listing.newest] == [(5, b"{", KEY, 0)]

    dry = await retry(kafka, Wanted(), dry_run=True)
    assert (dry.sent, len(dry.truncated)) == ({"in_the_future": 3, "not_json": 2}, 1)
    assert len(await points(kafka)) == 6, "nothing was sent"
    only = Wanted(reasons=frozenset({"in_the_future"}))
    assert (await retry(kafka, only)).sent == {"in_the_future": 3}
    assert not (await retry(kafka, only)).sent, "each once"
    rest = await retry(kafka, Wanted())
    assert (rest.sent, [one.source_offset for one in rest.truncated]) == ({"not_json": 2}, [4])
    assert (await retry(kafka, Wanted())) == Retried()

    again = (await points(kafka))[6:]
    assert [one.value for one in again] == [*future, b"hello", b"{"]
    assert {one.key for one in again} == {KEY} and {header(one, ATTEMPT) for one in again} == {b"1"}
    await served(wide)
    assert await counts(kafka) == {"in_the_future": 3, "not_json": 4, "too_large": 1}, "the points were taken in"
    second = await list_rejects(kafka, limit=2, records=1000)
    assert [(one.reason, one.attempt) for one in second.newest] == [("not_json", 1)] * 2
    given_up = await retry(kafka, Wanted(attempts_max=1))
    assert (given_up.sent, len(given_up.given_up)) == ({}, 2)
    assert await retry(kafka, Wanted()) == Retried(), "left alone from then on"


async def test_what_filters_pass_over_stays_to_be_retried(embedded_broker: str, redis_url: str, unique: str) -> None:
    kafka = one_partition(embedded_broker, redis_url, unique).kafka
    reasons = ("bad_value", "too_late", "empty")
    await reject(kafka, 30, reasons=reasons)
    middle_ms = int(time.time() * 1000) + 1
    await until(lambda: time.time() * 1000 > middle_ms, "the next millisecond")
    await reject(kafka, 30, reasons=reasons)
    late = frozenset({"too_late"})
    assert (await retry(kafka, Wanted(late, since_ms=middle_ms))).sent == {"too_late": 10}
    assert (await retry(kafka, Wanted(since_ms=middle_ms, limit=7))).sent.total() == 7
    assert (await retry(kafka, Wanted(late, limit=4))).sent == {"too_late": 4}
    assert (await retry(kafka, Wanted(late))).sent == {"too_late": 6}
    assert (await retry(kafka, Wanted())).sent.total() == 60 - 10 - 7 - 10
    assert await retry(kafka, Wanted()) == Retried()
    sent = Counter(record.key for record in await points(kafka))
    assert sent == {b"k%d" % i: 2 for i in range(30)}
    assert all(int(record.value) % 3 == record.partition for record in await points(kafka)), "where it came from"


async def test_two_retries_at_a_time_send_each_once(
    broker: str, redis_url: str, unique: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rejects, "_TRANSACTION_RECORDS", 7)
    kafka = one_partition(broker, redis_url, unique).kafka
    await reject(kafka, 100)
    first = asyncio.create_task(retry(kafka, Wanted()))
    async with asyncio.timeout(DEADLINE_S):
        while not any((await end_offsets(kafka, kafka.points_topic)).values()) and not first.done():
            pass
    second = await retry(kafka, Wanted())
    (fenced,) = await asyncio.gather(first, return_exceptions=True)
    assert isinstance(fenced, BrokerError | Retried)
    if isinstance(fenced, BrokerError):
        assert "taken over" in str(fenced) and 0 < second.sent.total() < 100
    assert Counter(record.key for record in await points(kafka)) == {b"k%d" % i: 1 for i in range(100)}


async def test_there_may_be_none(embedded_broker: str, redis_url: str, unique: str) -> None:
    kafka = one_partition(embedded_broker, redis_url, unique).kafka
    with pytest.raises(TocsinError, match="there is no topic"):
        await retry(kafka, Wanted())
    await ensure_topics(kafka, {kafka.rejects_topic: 1, kafka.points_topic: 1})
    assert await retry(kafka, Wanted()) == Retried()
    assert not await counts(kafka)
    producer = AIOKafkaProducer(**client_options(kafka))
    await producer.start()
    await producer.send_and_wait(kafka.rejects_topic, b"from elsewhere")
    await producer.stop()
    assert (await retry(kafka, Wanted())).foreign == 1
    assert (await list_rejects(kafka, limit=5, records=10)).foreign == 1


async def test_a_retry_killed_in_the_middle_is_gone_on_with(
    kafka: str, redis_url: str, unique: str, tmp_path: Path
) -> None:
    environment = environment_for(kafka, redis_url, unique, TOCSIN_KAFKA__SETTLE_INTERVAL_MS="300")
    settings = settings_for(kafka, redis_url, unique).kafka
    await reject(settings, 8000)
    with Running(tmp_path, "rejects", "retry", more=environment) as running:
        async with asyncio.timeout(DEADLINE_S):
            while sum((await end_offsets(settings, settings.points_topic)).values()) < 1500:
                assert running.process.poll() is None, running.stderr
        assert running.end(signal.SIGKILL) == -signal.SIGKILL
    # The first transaction was committed, and one is perhaps open: it hides all behind it until the next retry starts.
    assert 0 < (await retry(settings, Wanted())).sent.total() <= 7000
    assert Counter(record.key for record in await points(settings)) == {b"k%d" % i: 1 for i in range(8000)}


@pytest.mark.usefixtures("logs_as_before")
async def test_what_people_see(
    embedded_broker: str,
    redis_url: str,
    unique: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in environment_for(embedded_broker, redis_url, unique).items():
        monkeypatch.setenv(name, value)
    await reject(settings_for(embedded_broker, redis_url, unique).kafka, 3, reasons=("bad_value", "too_late"))

    async def said(*arguments: str) -> str:
        await asyncio.to_thread(app, ["rejects", *arguments], standalone_mode=False)
        return capsys.readouterr().out

    text = await said("list", "--since", "1h", "--limit", "1")
    assert text.count("too_late") + text.count("bad_value") == 3, "the newest, and both in the counts"
    *lines, last = lines_of(await said("list", "--json", "--reason", "too_late"))
    assert [(one["reason"], one["value"], one["source_partition"]) for one in lines] == [("too_late", "1", 1)]
    assert last == {"counts": {"too_late": 1}, "foreign": 0}
    assert "would be sent" in await said("retry", "--dry-run")
    (done,) = lines_of(await said("retry", "--json"))
    assert done["sent"] == {"bad_value": 2, "too_late": 1}
    assert await said("retry") == "nothing to send\n"
    for wrong, why in (
        (("list", "--reason", "x"), "--reason x: there is none; there are empty"),
        (("list", "--records", "0"), "--records 0"),
        (("retry", "--limit", "0"), "--limit 0"),
        (("retry", "--since", "1"), "--since 1"),
    ):
        with pytest.raises(ConfigError, match=why):
            await said(*wrong)
