"""`tocsin replay --verify`: equal where the service does what a back-test does; each difference where it does not."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
from confluent_kafka import Producer

from stream import render, sample, verify
from stream.errors import BrokerError, ConfigError
from stream.events import TYPE_OPENED, Event, iso_time
from stream.points import Points
from stream.service import detector_factory
from stream.settings import KafkaSettings, Settings
from stream.topics import ensure_topics
from stream.verify import Comparison, compare, partition_of, split, survey
from tests.e2e.program import lines_of, tocsin
from tests.live import START_MS, backtested, environment_for, sample_points, send, settings_for, working

POINTS = sample_points(5)
KINDS = ("cpu", "memory")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    directory = tmp_path_factory.mktemp("files")
    made = []
    for seed, kind in enumerate(("requests", "cpu", "memory")):
        made.append(directory / f"{kind}.csv")
        with made[-1].open("w") as file:
            sample.write_csv(sample.generate(5, 300, seed, START_MS, kind=kind), file)
    return made


async def run(directory: Path, environment: dict[str, str], *arguments: str | Path, code: int = 0) -> tuple[str, str]:
    """Run a command while the loop of the test goes on: the worker is in it."""
    done = await asyncio.to_thread(tocsin, directory, *arguments, more=environment, code=code)
    return done.stdout, done.stderr


async def test_what_was_replayed_is_verified(
    broker: str, redis_url: str, unique: str, tmp_path: Path, files: list[Path]
) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text("rules:\n  - match: cpu\n    silent_after: 4\n    direction: high\n  - match: '*'\n")
    more = {"TOCSIN_RULES": str(rules)}
    settings = settings_for(broker, redis_url, unique, **more)
    shown = dict(environment_for(broker, redis_url, unique, **more))
    async with working(settings):
        out, _ = await run(tmp_path, shown, "replay", *files, "--verify")
        assert "events equal, 0 missing, 0 unexpected, 0 different" in out and len(out.splitlines()) == 1
        out, _ = await run(tmp_path, shown, "replay", *files, "--verify", "--no-send", "--json")
        (found,) = lines_of(out)
        assert found["verify"]["equal"] > 10
        assert not sum(found["verify"][name] for name in ("missing", "unexpected", "different"))

        # Other rules than the service's: each difference is shown.
        other = tmp_path / "other.yaml"
        other.write_text("rules:\n  - match: '*'\n    recover_after: 9\n")
        out, _ = await run(
            tmp_path, shown, "replay", *files, "--verify", "--no-send", "--json", "--rules", other, code=1
        )
        *lines, last = lines_of(out)
        assert len(lines) == sum(last["verify"][name] for name in ("missing", "unexpected", "different"))
        fields = [name for line in lines if "different" in line for name in line["different"]["fields"]]
        assert {"time", "data.duration_s"} <= set(fields)
        out, _ = await run(tmp_path, shown, "replay", *files, "--verify", "--no-send", "--rules", other, code=1)
        assert "\n           time: " in out and "published" in out and out.splitlines()[-1].count(" different") == 1

        # The service knows these KPIs by now.
        out, err = await run(tmp_path, shown, "replay", *files, "--verify", code=2)
        assert out == "" and "points" in err and "--no-send" in err
        await run(tmp_path, shown, "replay", files[0])
        _, err = await run(tmp_path, shown, "replay", *files, "--verify", "--no-send", code=2)
        assert "other points" in err


async def test_an_entity_that_was_replayed_is_verified(
    embedded_broker: str, redis_url: str, unique: str, tmp_path: Path
) -> None:
    made = [sample.generate(5, 300, seed, START_MS, kind=kind, clean=seed == 0) for seed, kind in enumerate(KINDS)]
    file = tmp_path / "machine-1.csv"
    values = [dict(zip((one.timestamp_ms // 1000).tolist(), one.value.tolist(), strict=True)) for one in made]
    lines = [f"{time},{values[0].get(time, '')},{values[1].get(time, '')}" for time in sorted({*values[0], *values[1]})]
    file.write_text("\n".join(["timestamp,cpu,memory", *lines]) + "\n")
    environment = dict(environment_for(embedded_broker, redis_url, unique))
    async with working(settings_for(embedded_broker, redis_url, unique)):
        out, _ = await run(tmp_path, environment, "replay", file, "--entity", "--verify", "--json")
    (found,) = lines_of(out)
    assert found["verify"]["equal"] > 4


async def test_others_in_the_same_partition_are_no_reason_to_cry(
    embedded_broker: str, redis_url: str, unique: str, tmp_path: Path, files: list[Path]
) -> None:
    """A newer KPI makes those of an old file silent for good: no back-test of the file alone knows of that."""
    more = {"TOCSIN_KAFKA__PARTITIONS": "1"}
    settings = settings_for(embedded_broker, redis_url, unique, **more)
    environment = dict(environment_for(embedded_broker, redis_url, unique, **more))
    async with working(settings):
        await send(settings.kafka, [("newer", START_MS + 90 * 86_400_000 + n * 60_000, 1.0) for n in range(9)])
        out, err = await run(tmp_path, environment, "replay", files[1], "--verify")
        assert "0 missing, 0 unexpected, 0 different" in out and "left out: " in out
        assert "others send into the same partitions" in err


async def test_a_service_that_does_nothing_is_told_of(
    embedded_broker: str, redis_url: str, unique: str, tmp_path: Path, files: list[Path]
) -> None:
    environment = dict(environment_for(embedded_broker, redis_url, unique))
    out, err = await run(tmp_path, environment, "replay", files[1], "--verify", "--timeout", "1", code=1)
    assert out == "" and f"group g.{unique} has not committed the last" in err and "tocsin serve" in err
    _, err = await run(tmp_path, environment, "replay", files[0], "--verify", "--no-send", code=2)
    assert "nothing to compare" in err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--verify", "--topic", "x"], "--topic and --verify"),
        (["--verify", "--resume"], "--resume and --verify"),
        (["--no-send"], "--no-send without --verify"),
        (["--verify", "--no-send", "--shift-to-now"], "--shift-to-now"),
    ],
)
async def test_options_that_say_nothing_together(
    tmp_path: Path, files: list[Path], options: list[str], said: str
) -> None:
    out, err = await run(tmp_path, {}, "replay", files[0], *options, code=2)
    assert out == "" and said in err


async def test_the_partitions_are_those_of_kafka_s_own_clients(embedded_broker: str, unique: str) -> None:
    kafka = KafkaSettings(bootstrap_servers=embedded_broker, points_topic=f"t.{unique}", partitions=5)
    await ensure_topics(embedded_broker, {kafka.points_topic: 5})
    names = ["a", "checkout.requests_per_s", "ü", *(f"kpi-{n}" * (n % 7) for n in range(1, 40) if n % 7)]
    producer = Producer({"bootstrap.servers": embedded_broker, "partitioner": "murmur2_random"})
    for name in names:
        value = json.dumps({"kpi": name, "timestamp": START_MS, "value": 1}).encode()
        producer.produce(kafka.points_topic, value, key=name.encode())
    producer.flush(20)
    one = POINTS.timestamp_ms[:1], POINTS.kpi[:0], POINTS.value[:0], POINTS.label[:0]
    found = await survey(kafka, Points(tuple(names), one[0][:0], *one[1:]), timeout_s=20)
    assert found.partitions == {name: {partition_of(name, 5)} for name in names}


# -- the comparison -------------------------------------------------------------------------------------------------


def said(settings: Settings) -> list[Event]:
    return backtested(POINTS, settings)


EVENTS = said(settings_for("x:1", "redis://x", "x"))
SILENT = [event for event in EVENTS if event.type.startswith("tocsin.kpi")]
A = next(event for event in EVENTS if event.type == TYPE_OPENED)


def with_data(event: Event, **fields: object) -> Event:
    return msgspec.structs.replace(event, data=msgspec.structs.replace(event.data, **fields))


def test_equal_whatever_the_order_between_series() -> None:
    found = compare(sorted(EVENTS, key=lambda event: event.subject), EVENTS)
    assert found and found.equal == len(EVENTS) and len(SILENT) > 1


def test_what_is_missing_unexpected_twice_or_different_is_found() -> None:
    found = compare([event for event in EVENTS if event is not A], EVENTS)
    assert not found and found.missing == [A] and found.equal == len(EVENTS) - 1
    found = compare(EVENTS, [event for event in EVENTS if event is not A])
    assert not found and found.unexpected == [A]
    found = compare([*EVENTS, A], EVENTS)
    assert not found and found.unexpected == [A], "published twice"
    other = with_data(A, score=1.0, window=msgspec.structs.replace(A.data.window, completed=29), rule="x")  # type: ignore[union-attr]
    found = compare([other if event is A else event for event in EVENTS], EVENTS)
    (one,) = found.different
    assert set(one.fields) == {"data.score", "data.window.completed", "data.rule"} and one.expected is A
    own = [event for event in EVENTS if event.subject == A.subject]
    found = compare(own[::-1], own)
    assert not found and {one.fields for one in found.different} == {("order",)}


def test_silence_by_the_clock_is_left_out_with_its_end() -> None:
    at = SILENT[0]
    by_clock = [with_data(e, basis="wall_clock") if e is at else e for e in EVENTS]
    found = compare(by_clock, EVENTS)
    assert found and found.by_clock == 2, "and the end of it"
    assert compare(by_clock, [e for e in EVENTS if e.id.rpartition("-")[0] != at.id.rpartition("-")[0]])
    found = compare([e for e in EVENTS if e not in SILENT], EVENTS, shared={e.subject for e in EVENTS})
    assert found and found.left_out == len(SILENT)


def test_events_of_other_times_and_series_are_not_compared() -> None:
    half = len(POINTS.value) // 2
    part = Points(
        POINTS.names[:1], POINTS.timestamp_ms[:half], POINTS.kpi[:half], POINTS.value[:half], POINTS.label[:half]
    )
    kept = verify.within(EVENTS, part)
    assert kept and len(kept) < len(EVENTS)
    assert {event.subject for event in kept} == {POINTS.names[0]}
    last = POINTS.timestamp_ms[:half][POINTS.kpi[:half] == 0].max()
    assert max(event.time for event in kept) <= iso_time(int(last))


def test_each_partition_is_back_tested_by_itself() -> None:
    parts = split(POINTS, {name: k % 2 for k, name in enumerate(POINTS.names)})
    assert sorted(parts) == [0, 1] and sum(len(part.value) for part in parts.values()) == len(POINTS.value)
    assert set(parts[0].kpi.tolist()) == {0, 2} and set(parts[1].kpi.tolist()) == {1}


def test_a_difference_is_shown_with_both_values(capsys: pytest.CaptureFixture[str]) -> None:
    other = with_data(A, health="drifting", rule="x")
    found = compare([other], [A])
    render.print_comparison(found, as_json=False)
    out = capsys.readouterr().out
    assert 'data.rule: "x" published, nothing expected' in out
    assert out.splitlines()[-1] == "0 events equal, 0 missing, 0 unexpected, 1 different"
    render.print_comparison(Comparison(missing=[A], by_clock=1), as_json=True)
    first, last = lines_of(capsys.readouterr().out)
    assert first["missing"]["id"] == A.id and last["verify"]["by_clock"] == 1


async def test_it_says_which_broker_it_cannot_read(unused_port: int) -> None:
    kafka = KafkaSettings(bootstrap_servers=f"127.0.0.1:{unused_port}", connect_timeout_s=1)
    with pytest.raises(BrokerError, match=str(unused_port)):
        await verify.published(kafka)


async def test_points_in_two_partitions_mean_nothing(embedded_broker: str, redis_url: str, unique: str) -> None:
    settings = settings_for(embedded_broker, redis_url, unique)
    await ensure_topics(embedded_broker, {settings.kafka.points_topic: 2})
    producer = Producer({"bootstrap.servers": embedded_broker})
    for n in range(2):
        value = json.dumps({"kpi": "a", "timestamp": START_MS + n, "value": 1}).encode()
        producer.produce(settings.kafka.points_topic, value, partition=n)
    producer.flush(20)
    times = np.array([START_MS, START_MS + 1])
    points = Points(("a",), times, np.zeros(2, np.int32), np.ones(2), np.zeros(2, np.int8))
    with pytest.raises(ConfigError, match="in several partitions"):
        await verify.verify(points, settings.kafka, detector_factory(settings), send=None, timeout_s=5)
