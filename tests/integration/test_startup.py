"""`tocsin serve` without what it needs: one line that names address and setting, soon, and an exit code to act on."""

from __future__ import annotations

import functools
import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from redis.asyncio import Redis

from stream import cli, service
from stream.settings import Settings
from stream.worker import Worker
from tests import forked
from tests.live import environment_for
from tests.servers import StoreServer

SOON_S = 20.0  # torch alone takes seconds to import on a busy machine; the connect timeouts here are 1 s
SECRET = "hunter2"


def serve(environment: dict[str, str], tmp_path: Path) -> subprocess.CompletedProcess[str]:
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "stream", "serve"],
        env=os.environ | {"XDG_RUNTIME_DIR": str(tmp_path)} | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert time.monotonic() - began < SOON_S
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert SECRET not in done.stderr
    return done


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = done.stderr.splitlines()
    assert [line for line in lines if line.startswith("tocsin: ")] == lines[-1:], done.stderr
    assert not [line for line in lines if " ERROR " in line], "nothing is said twice"
    return lines[-1]


def impatient(bootstrap: str, redis_url: str, unique: str) -> dict[str, str]:
    more = {"TOCSIN_KAFKA__CONNECT_TIMEOUT_S": "1", "TOCSIN_REDIS__CONNECT_TIMEOUT_S": "1"}
    return dict(environment_for(bootstrap, redis_url, unique, **more))


def test_no_store(embedded_broker: str, unique: str, unused_port: int, tmp_path: Path) -> None:
    url = f"redis://user:{SECRET}@127.0.0.1:{unused_port}/0"
    done = serve(impatient(embedded_broker, url, unique), tmp_path)
    assert done.returncode == 1
    assert f"127.0.0.1:{unused_port}" in last_line(done) and "TOCSIN_REDIS__URL" in last_line(done)
    assert "Connect call failed" in last_line(done), "not that the last attempt had no time"


def test_no_broker(redis_url: str, unique: str, unused_port: int, tmp_path: Path) -> None:
    done = serve(impatient(f"127.0.0.1:{unused_port}", redis_url, unique), tmp_path)
    assert done.returncode == 1
    line = last_line(done)
    assert f"127.0.0.1:{unused_port}" in line and "TOCSIN_KAFKA__BOOTSTRAP_SERVERS" in line
    assert "connection refused" in line


@pytest.fixture
async def guarded_store() -> AsyncIterator[int]:
    """Port of a store that asks for a password."""
    async with StoreServer() as server:
        async with Redis.from_url(server.url) as redis:
            await redis.config_set("requirepass", "the right one")
        yield server.port


async def test_a_wrong_password(embedded_broker: str, unique: str, guarded_store: int, tmp_path: Path) -> None:
    for login in (f":{SECRET}@", f"default:{SECRET}@", ""):
        url = f"redis://{login}127.0.0.1:{guarded_store}/0"
        done = serve(impatient(embedded_broker, url, unique), tmp_path)
        assert done.returncode == 1
        assert f"127.0.0.1:{guarded_store}" in last_line(done) and "TOCSIN_REDIS__URL" in last_line(done)


async def test_the_right_password(embedded_broker: str, unique: str, guarded_store: int, tmp_path: Path) -> None:
    url = f"redis://:the%20right%20one@127.0.0.1:{guarded_store}/0"
    with started(impatient(embedded_broker, url, unique), tmp_path) as process:
        assert process.stderr is not None
        until(process, "assigned")
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("TOCSIN_KAFKA__BOOTSTRAP_SERVER", "a:1", "did you mean TOCSIN_KAFKA__BOOTSTRAP_SERVERS?"),
        ("TOCSIN_REDIS_URL", f"redis://:{SECRET}@a/0", "did you mean TOCSIN_REDIS__URL?"),
        ("TOCSIN_WARMUP", "3", "did you mean TOCSIN_WARMUP_H?"),
        ("TOCSIN_XYZZY", "3", "TOCSIN_XYZZY"),
        ("TOCSIN_POT__Q", "2", "TOCSIN_POT__Q='2'"),
        ("TOCSIN_KAFKA__PARTITIONS", "six", "TOCSIN_KAFKA__PARTITIONS='six'"),
        ("TOCSIN_KAFKA__BOOTSTRAP_SERVERS", "a:b:c", "TOCSIN_KAFKA__BOOTSTRAP_SERVERS='a:b:c'"),
        ("TOCSIN_REDIS__URL", f"postgres://:{SECRET}@a/0", "TOCSIN_REDIS__URL"),
        ("TOCSIN_REDIS__URL", f"redis://:{SECRET}@a:port/0", "TOCSIN_REDIS__URL"),
        ("TOCSIN_CHECKPOINT", "nope", "no checkpoint 'nope'"),
        ("TOCSIN_CHECKPOINT", "../../etc", "is not the name of a model"),
        ("TOCSIN_LOG_LEVEL", "LOUD", "TOCSIN_LOG_LEVEL='LOUD'"),
    ],
)
def test_a_wrong_setting(
    redis_url: str, unique: str, unused_port: int, tmp_path: Path, variable: str, value: str, said: str
) -> None:
    environment = impatient(f"127.0.0.1:{unused_port}", redis_url, unique) | {variable: value}
    done = serve(environment, tmp_path)
    assert done.returncode == 2
    assert said in last_line(done)


def test_nothing_set_and_nothing_running(tmp_path: Path) -> None:
    done = serve({}, tmp_path)
    assert done.returncode == 2
    assert "TOCSIN_KAFKA__BOOTSTRAP_SERVERS and TOCSIN_REDIS__URL" in last_line(done)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_while_it_waits_for_the_broker_ends_it_at_once(
    redis_url: str, unique: str, unused_port: int, tmp_path: Path, number: signal.Signals
) -> None:
    environment = impatient(f"127.0.0.1:{unused_port}", redis_url, unique) | {"TOCSIN_KAFKA__CONNECT_TIMEOUT_S": "300"}
    with started(environment, tmp_path) as process:
        until(process, "checkpoint")
        process.send_signal(number)
        _, rest = process.communicate(timeout=20)
        assert process.returncode in ((0,) if number == signal.SIGTERM else (0, 130))
        assert "Traceback" not in rest


@pytest.mark.parametrize("step", [*range(1, 90, 8), 150, 400, 1_000, 2_500])
def test_a_stop_at_any_step_of_its_start_ends_it_without_a_word(
    redis_url: str, unique: str, unused_port: int, tmp_path: Path, step: int
) -> None:
    environment = impatient(f"127.0.0.1:{unused_port}", redis_url, unique) | {"TOCSIN_KAFKA__CONNECT_TIMEOUT_S": "300"}
    out, err = tmp_path / "stdout", tmp_path / "stderr"
    process = forked.start(
        functools.partial(stopped_at, step),
        ["serve"],
        directory=tmp_path,
        environment=os.environ | environment,
        out=out,
        err=err,
    )
    process.join(120)
    process.kill()
    assert process.exitcode == 0
    assert [line for line in err.read_text().splitlines() if " INFO " not in line] == []


def stopped_at(step: int) -> None:
    """Run `tocsin`; SIGTERM comes so many steps of Python's after its worker is made."""
    make, steps = service.make_worker, 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == step:
            sys.settrace(None)
            os.kill(os.getpid(), signal.SIGTERM)
        return trace if steps < step else None

    def made(settings: Settings) -> Worker:
        worker = make(settings)
        sys.settrace(trace)
        sys._getframe(1).f_trace = trace  # of the caller, which runs already
        return worker

    service.make_worker = made
    try:
        cli.main()
    except SystemExit as e:
        code = e.code
    gc.collect()  # tells of tasks that nobody has ended, now that no traceback holds them
    sys.exit(code)


# -- processes ----------------------------------------------------------------------------------------------------


class started:
    """A service that runs for the length of the block."""

    def __init__(self, environment: dict[str, str], tmp_path: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "stream", "serve"],
            env=os.environ | {"XDG_RUNTIME_DIR": str(tmp_path)} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> subprocess.Popen[str]:
        return self.process

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def until(process: subprocess.Popen[str], word: str) -> None:
    """Wait for a line of the log that holds a word; the test's own time limit ends it."""
    assert process.stderr is not None
    while line := process.stderr.readline():
        if word in line:
            return
    raise AssertionError(f"it ended without saying {word!r}")


@pytest.fixture(autouse=True)
def _no_settings_of_other_tests(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    yield
