"""`tocsin train`: from files of every kind, from a topic's history, one model a KPI, and after an interruption."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from models import repository
from models.checkpoint import Checkpoint
from stream import sample
from stream.errors import InputError
from stream.settings import KafkaSettings
from stream.sources import read_topic
from tests.e2e.program import home, tocsin
from tests.integration.test_doctor import send
from tests.live import START_MS
from tests.unit.test_doctor import Sent

MINUTE = 60_000
QUICK = ("--epochs", "1", "--window", "10")


def wave(n: int = 400, seed: int = 0) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    random = np.random.default_rng(seed)
    return (50 + 10 * np.sin(np.arange(n) / 9) + random.normal(size=n)).round(3)


def record(fields: dict[str, object], *, key: str, arrival_ms: int = 0, partition: int = 0) -> Sent:
    return Sent(json.dumps(fields).encode(), key.encode(), partition=partition, timestamp=arrival_ms)


def kpi(name: str, n: int = 400, *, seed: int = 0, arrival_ms: int = 0, partition: int = 0) -> list[Sent]:
    return [
        record(
            {"kpi": name, "timestamp": START_MS + i * MINUTE, "value": value},
            key=name,
            arrival_ms=arrival_ms,
            partition=partition,
        )
        for i, value in enumerate(wave(n, seed).tolist())
    ]


def trained(out: str) -> Checkpoint:
    return repository.read(Path(out.strip()))


async def run(directory: Path, broker: str, *arguments: str, code: int = 0) -> tuple[str, str]:
    environment = {"TOCSIN_KAFKA__BOOTSTRAP_SERVERS": broker}
    done = await asyncio.to_thread(tocsin, directory, "train", *arguments, more=environment, code=code)
    return done.stdout, done.stderr


async def test_a_model_learns_from_the_history_of_a_topic(broker: str, topic: str, tmp_path: Path) -> None:
    now = int(time.time() * 1000)
    old = kpi("web.old", arrival_ms=now - 20 * 86_400_000)
    records = [*old, *kpi("web.a", seed=1), *kpi("web.b", seed=2, partition=1), *kpi("db.c", seed=3, partition=2)]
    records += [*kpi("web.short", 5), Sent(b"not json", b"x", partition=1, timestamp=0)]
    await send(broker, topic, records)
    chosen = ("--from-topic", topic, "--since", "14d", "--match", "web.*")
    out, err = await run(tmp_path, broker, *chosen, "--name", "web", *QUICK)
    assert [one.name for one in trained(out).training.sources] == ["web.a", "web.b"]
    assert "1 records of" in err and "web.short left out: has values of 5 times" in err
    out, _ = await run(tmp_path, broker, *chosen, "--name", "web", "--per-kpi", *QUICK)
    found = trained(out)
    assert found.version == 2 and found.members == ("web.a", "web.b") and len(found.calibrations) == 2

    # It is what the same points in a file give.
    path = tmp_path / "web.a.csv"
    lines = [f"{START_MS // 1000 + 60 * i},{value}" for i, value in enumerate(wave(seed=1).tolist())]
    path.write_text("\n".join(["timestamp,value", *lines]) + "\n")
    from_file = trained(tocsin(tmp_path, "train", path, "--name", "file", *QUICK).stdout)
    out, _ = await run(tmp_path, broker, "--from-topic", topic, "--match", "web.a", "--name", "one", *QUICK)
    for name, tensor in trained(out).model.raw.items():
        np.testing.assert_array_equal(tensor, from_file.model.raw[name])

    for wrong, message in (
        (("--from-topic", topic, "--since", "14"), "--since 14: has no unit"),
        (("--from-topic", topic, "--match", "nothing.*"), "matches nothing.*"),
        (("--since", "1d", "--generated", "1"), "give --from-topic"),
    ):
        _, err = await run(tmp_path, broker, *wrong, "--name", "x", code=2)
        assert message in err
    _, err = await run(tmp_path, broker, "--from-topic", f"{topic}x", "--name", "x", code=1)
    assert f"there is no topic {topic}x" in err and f"did you mean {topic}?" in err


async def test_an_entity_of_a_topic_is_one_series(embedded_broker: str, topic: str, tmp_path: Path) -> None:
    both = np.stack([wave(seed=1), wave(seed=2)], axis=1).tolist()
    records = [
        record({"entity": "m1", "timestamp": START_MS + i * MINUTE, "values": {"cpu": cpu, "ram": ram}}, key="m1")
        for i, (cpu, ram) in enumerate(both)
    ]
    await send(embedded_broker, topic, [*records, *kpi("a")])
    arguments = ("--from-topic", topic, "--entity", "--name", "servers", *QUICK)
    out, err = await run(tmp_path, embedded_broker, *arguments)
    found = trained(out)
    assert found.metrics == ("cpu", "ram") and found.model.features == 2 and "a left out: is a KPI" in err
    settings = KafkaSettings(bootstrap_servers=embedded_broker)
    history = await read_topic(settings, topic, since_ms=None)
    assert set(history.points.names) == {"m1.cpu", "m1.ram", "a"} and len(history.points) == 1200


async def test_a_topic_that_holds_too_much_is_refused(
    embedded_broker: str, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await send(embedded_broker, topic, kpi("a"))
    monkeypatch.setattr("stream.sources.CELLS_MAX", 300)
    settings = KafkaSettings(bootstrap_servers=embedded_broker)
    with pytest.raises(InputError, match="more than 300 points in that time; try a shorter --since"):
        await read_topic(settings, topic, since_ms=None, records_max=1000)
    assert (await read_topic(settings, topic, since_ms=None, records_max=100)).left_out == 0
    now = int(time.time() * 1000)
    found = await read_topic(settings, topic, since_ms=now - 3_600_000, records_max=100)
    assert found.left_out == 300 and len(found.points) == 100


# -- files, and how it ends -----------------------------------------------------------------------------------------


def test_it_learns_from_a_benchmark_file_and_a_choice_of_hours(tmp_path: Path) -> None:
    values = np.stack([wave(3000, seed) for seed in range(3)], axis=1)
    np.savez(tmp_path / "m.npz", train=values, test=values, label=np.zeros(3000))
    done = tocsin(tmp_path, "train", "m.npz", "--entity", "--interval", "1m", "--name", "m", *QUICK)
    found = trained(done.stdout)
    assert (found.metrics, found.interval_ms, found.model.config.scaling) == (("0", "1", "2"), MINUTE, "train")
    assert found.training.sources[0].sha256 and "--interval 1m" in found.training.command
    windows = found.training.windows
    stamps = START_MS // 1000 + 60 * np.arange(3000)
    np.savez(tmp_path / "t.npz", values=values, timestamp=stamps)
    own = ("--entity", "--name", "t", "--set", "filters=8", "--hours", "0-12", "--days", "mon", *QUICK)
    some = trained(tocsin(tmp_path, "train", "t.npz", *own).stdout)
    # The file ends on a Wednesday: what is held out is a fifth of the chosen time.
    assert some.training.windows + some.training.held_out_windows == 12 * 60 - 10 and windows == 2400 - 10
    assert some.training.held_out_windows == 144
    assert some.model.config.filters == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("m.npz",), "has no `timestamp`"),
        (("m.npz", "--interval", "1"), "--interval 1: has no unit"),
        (("m.npz", "--interval", "1m", "--hours", "8-18"), "m has no times of day"),
        (("m.npz", "--interval", "1m", "--hours", "8"), "--hours 8: write"),
        (("m.npz", "--interval", "1m", "--days", "x"), "--days x"),
        (("m.npz", "--interval", "1m", "--time-zone", "Mars/Base"), "--time-zone Mars/Base"),
        (("m.npz", "--interval", "1m", "--model", "magic"), "family 'magic' is not known"),
        (("m.npz", "--interval", "1m", "--window", "11"), "window=11"),
        (("m.npz", "--interval", "1m", "--set", "size=3"), "--set size=3: write NAME=VALUE with a setting of deepant"),
        (("m.npz", "--interval", "1m", "--set", "filters=x"), "'x' is not a number such as 32"),
        (("m.npz", "--interval", "1m", "--trim", "0.9"), "trim=0.9"),
        (("m.npz", "--interval", "1m", "--batch", "0"), "batch=0"),
        ((), "nothing to learn from"),
        (("m.npz", "--match", "a"), "give --from-topic"),
    ],
)
def test_wrong_arguments_end_with_2(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    np.savez(tmp_path / "m.npz", train=wave())
    done = tocsin(tmp_path, "train", *arguments, "--name", "x", code=2)
    assert message in done.stderr and done.stderr.count("\n") == 1 and not done.stdout
    assert not (tmp_path / "checkpoints").exists()


def test_an_interrupted_training_is_taken_up_again(tmp_path: Path) -> None:
    with (tmp_path / "a.csv").open("w") as file:
        sample.write_csv(sample.generate(25, 300, 1, START_MS), file)
    arguments = ("train", "a.csv", "--name", "a", "--epochs", "8", "--window", "10")
    whole = trained(tocsin(tmp_path, *arguments, more={"TOCSIN_CHECKPOINTS": str(tmp_path / "other")}).stdout)
    command = [sys.executable, "-m", "stream", *arguments]
    state = tmp_path / "checkpoints" / "a" / ".resume" / "state.json"
    with subprocess.Popen(command, cwd=tmp_path, env=home(tmp_path), stderr=subprocess.PIPE, text=True) as running:
        deadline = time.monotonic() + 60
        while not state.exists():
            assert time.monotonic() < deadline and running.poll() is None
            time.sleep(0.01)
        running.send_signal(signal.SIGINT)
        _, err = running.communicate(timeout=60)
    assert running.returncode == 130 and "--resume goes on with it" in err
    assert state.exists() and not repository.names(tmp_path / "checkpoints")
    other = tocsin(tmp_path, *arguments, "--resume", "--learning-rate", "0.01", code=2)
    assert "learning_rate was 0.002 and is 0.01" in other.stderr
    done = tocsin(tmp_path, *arguments, "--resume")
    found = trained(done.stdout)
    assert found.training.held_out_losses == whole.training.held_out_losses
    for name, tensor in found.model.raw.items():
        np.testing.assert_array_equal(tensor, whole.model.raw[name])
    assert not state.parent.exists(), "its model is in the repository"
    assert "no training of a was interrupted" in tocsin(tmp_path, *arguments, "--resume").stderr
