"""Fixtures for all tests: servers, one of each a session, and names that no other test uses.

TOCSIN_TEST_KAFKA_HOME         directory with the libs/ of Apache Kafka; tests against a real Kafka run
TOCSIN_TEST_DATA               directory with labelled data; tests marked `data` run
TOCSIN_TEST_BOOTSTRAP_SERVERS  a Kafka of yours; takes the place of the real one
TOCSIN_TEST_REDIS_URL          a Redis of yours; takes the place of the embedded store. Keys `tocsin-test…` are written.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from stream.embedded import free_port, patch_aborted_transactions
from tests.servers import EmbeddedBroker, KafkaServer, Server, StoreServer, why_no_kafka

# As a worker does it at start; touches consumers of the embedded broker only.
patch_aborted_transactions()


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the developer's own TOCSIN_… variables away from the code under test."""
    for name in os.environ:
        if name.startswith("TOCSIN_") and not name.startswith("TOCSIN_TEST_"):
            monkeypatch.delenv(name)


S = TypeVar("S", bound=Server)


def pytest_configure() -> None:
    """Take signals as a terminal would have them.

    Under nohup, or in the background of a script, SIGINT and SIGHUP are ignored, and so they are by every process that
    a test starts: a Ctrl-C would go unheard.
    """
    if threading.current_thread() is threading.main_thread():
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
            signal.signal(signal.SIGHUP, signal.SIG_DFL)


def _running(server: S) -> Iterator[S]:
    # A loop of its own: a session's fixture outlives the loops of the tests.
    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
        try:
            runner.run(server.start())
            yield server
        finally:
            server.close()


@pytest.fixture(scope="session")
def embedded_broker() -> Iterator[str]:
    """Bootstrap servers of the embedded broker."""
    for server in _running(EmbeddedBroker()):
        yield server.bootstrap


@pytest.fixture(scope="session")
def kafka() -> Iterator[str]:
    """Bootstrap servers of a real Kafka; skips without one."""
    if given := os.environ.get("TOCSIN_TEST_BOOTSTRAP_SERVERS"):
        yield given
        return
    if reason := why_no_kafka():
        pytest.skip(reason)
    for server in _running(KafkaServer()):
        yield server.bootstrap


@pytest.fixture(params=["embedded", pytest.param("kafka", marks=pytest.mark.kafka)])
def broker(request: pytest.FixtureRequest) -> str:
    """Bootstrap servers: the test runs on the embedded broker and on a real Kafka."""
    bootstrap = request.getfixturevalue("embedded_broker" if request.param == "embedded" else "kafka")
    assert isinstance(bootstrap, str)
    return bootstrap


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """URL of a store; keep to your own prefix (fixture `prefix`)."""
    if given := os.environ.get("TOCSIN_TEST_REDIS_URL"):
        yield given
        return
    for server in _running(StoreServer()):
        yield server.url


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Directory of the labelled data; skips without it."""
    given = os.environ.get("TOCSIN_TEST_DATA")
    if not given:
        pytest.skip("TOCSIN_TEST_DATA is not set: it names a directory with labelled data")
    if not Path(given).is_dir():
        pytest.skip(f"TOCSIN_TEST_DATA={given}: no such directory")
    return Path(given)


@pytest.fixture
def logs_as_before() -> Iterator[None]:
    """Undo what a command does to the logs of its process."""
    root, kafka = logging.getLogger(), logging.getLogger("aiokafka")
    handlers, levels = list(root.handlers), (root.level, kafka.level)
    yield
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    kafka.setLevel(levels[1])


@pytest.fixture
def unique(request: pytest.FixtureRequest) -> str:
    """A name that no other test and no other run uses, fit for topics, groups and keys."""
    test = re.sub(r"[^a-zA-Z0-9._-]+", "-", request.node.name).strip("-")[:60]
    return f"{test}-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def topic(unique: str) -> str:
    """A topic name of this test's own; the topic is not created."""
    return f"t.{unique}"


@pytest.fixture
def group(unique: str) -> str:
    """A consumer group of this test's own."""
    return f"g.{unique}"


@pytest.fixture
def prefix(unique: str) -> str:
    """A key prefix of this test's own."""
    return f"tocsin-test-{unique}"


@pytest.fixture
def unused_port() -> int:
    """A loopback port that nobody listens on."""
    return free_port()
