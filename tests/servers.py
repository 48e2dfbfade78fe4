"""Servers for tests and benches: a real Kafka, the embedded broker, a store. They end with the process that made them.

async with KafkaServer() as kafka:   # needs TOCSIN_TEST_KAFKA_HOME and Java
    kafka.bootstrap                  # 127.0.0.1:port, the same after a restart
    kafka.kill()                     # as kill -9 does
    await kafka.start()              # with the data it had
"""

from __future__ import annotations

import abc
import asyncio
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from stream.embedded import LOOPBACK, Child, broker_command, broker_ready, free_port, store_command, store_ready

KAFKA_HOME = "TOCSIN_TEST_KAFKA_HOME"

# One broker of its own controller, small and quick; `config` of KafkaServer adds to it or overrides.
_KAFKA_CONFIG = {
    "process.roles": "broker,controller",
    "controller.listener.names": "CONTROLLER",
    "inter.broker.listener.name": "PLAINTEXT",
    "auto.create.topics.enable": "false",
    "offsets.topic.replication.factor": "1",
    "offsets.topic.num.partitions": "4",
    "transaction.state.log.replication.factor": "1",
    "transaction.state.log.min.isr": "1",
    "transaction.state.log.num.partitions": "4",
    "share.coordinator.state.topic.replication.factor": "1",
    "share.coordinator.state.topic.min.isr": "1",
    "group.initial.rebalance.delay.ms": "0",
    "group.min.session.timeout.ms": "1000",
    "transaction.abort.timed.out.transaction.cleanup.interval.ms": "500",
    # A broker killed with -9 may come back once its old registration has run out: 9 s by default.
    "broker.session.timeout.ms": "2000",
    "broker.heartbeat.interval.ms": "400",
    "num.network.threads": "2",
    "num.io.threads": "4",
    "log.cleaner.dedupe.buffer.size": "4194304",
}
_CLUSTER_ID = "dG9jc2luLXRlc3QtY2x1c3Q"
_JVM = ["-Xms128m", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-XX:+ExitOnOutOfMemoryError"]
_LOG4J = """status = error
appender.out.type = Console
appender.out.name = out
appender.out.layout.type = PatternLayout
appender.out.layout.pattern = %d{HH:mm:ss.SSS} %-5p %c{1} %m%n
rootLogger.level = WARN
rootLogger.appenderRef.out.ref = out
"""
_KAFKA_START_S = 60.0  # seen: 4 s on an idle machine, formatting included


def why_no_kafka() -> str | None:
    """Return why a real Kafka cannot be started here, or None if it can."""
    home = os.environ.get(KAFKA_HOME)
    if not home:
        return f"{KAFKA_HOME} is not set: it names a directory whose libs/ holds Apache Kafka's jars"
    if not any(Path(home, "libs").glob("kafka_*.jar")):
        return f"{KAFKA_HOME}={home}: no libs/kafka_*.jar there"
    if shutil.which("java") is None:
        return "Java is not installed"
    return None


def memory_dir(prefix: str) -> Path:
    """Return a new directory, in memory if the machine has such a place."""
    memory = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix=prefix, dir=memory if os.access(memory, os.W_OK) else None)).resolve()


class Startable(abc.ABC):
    """What runs for the length of an `async with`."""

    @abc.abstractmethod
    async def start(self) -> None: ...

    @abc.abstractmethod
    def close(self) -> None: ...

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Server(Startable):
    """A server on a port of its own that keeps both port and data from `start` to `start`; `close` throws them away."""

    start_s = 20.0
    stop_s = 30.0

    def __init__(self) -> None:
        self.port = free_port()
        self.dir = memory_dir("tocsin-test-")
        self.child: Child | None = None

    @abc.abstractmethod
    def command(self) -> list[str]: ...

    @abc.abstractmethod
    async def ready(self) -> bool: ...

    def environment(self) -> dict[str, str] | None:
        return None

    async def prepare(self) -> None:
        """Do what has to be done once before the first start."""
        return

    @property
    def pid(self) -> int:
        """Process id of the server, to stop and continue it (SIGSTOP, SIGCONT) or to measure it."""
        assert self.child is not None
        return self.child.pid

    @property
    def log(self) -> str:
        return (self.dir / "server.log").read_text(errors="replace")

    async def start(self) -> None:
        """Start it, again or for the first time, and wait until it answers."""
        if not (self.dir / "data").is_dir():
            (self.dir / "data").mkdir()
            await self.prepare()
        self.child = Child(self.command(), log=self.dir / "server.log", doomed=self.dir, env=self.environment())
        deadline = time.monotonic() + self.start_s
        while not await self.ready():
            if self.child.exit_code() is not None or time.monotonic() > deadline:
                self.child.kill()
                raise RuntimeError(f"{type(self).__name__} does not start:\n{self.child.last_words(20)}")
            await asyncio.sleep(0.02)

    def kill(self) -> None:
        """End it as a crash does (SIGKILL)."""
        assert self.child is not None
        self.child.kill()

    async def stop(self) -> None:
        """End it in order (SIGTERM)."""
        assert self.child is not None
        await asyncio.to_thread(self.child.stop, self.stop_s)

    def close(self) -> None:
        """End it and remove its data."""
        if self.child is not None:
            self.child.kill()
        shutil.rmtree(self.dir, ignore_errors=True)


class Broker(Server):
    """What all brokers have."""

    @property
    def bootstrap(self) -> str:
        return f"{LOOPBACK}:{self.port}"


class KafkaServer(Broker):
    """Apache Kafka.

    Args:
        config: broker settings beside and over `_KAFKA_CONFIG`; a node of a cluster gets its `node.id`,
            `controller.quorum.voters` and replication factors here, a secure one its listeners and certificates.
        format_options: of `kafka-storage format`, e.g. ["--add-scram", "SCRAM-SHA-512=[name=…,password=…]"].
        jvm_options: of the broker, e.g. ["-Dorg.apache.kafka.sasl.oauthbearer.allowed.urls=…"].
        heap: of the broker.
        outside: port of a proxy: clients that come by it are told to stay with it. It must lead to `outside_port`;
            `bootstrap` is the way in without it.
    """

    start_s = _KAFKA_START_S

    def __init__(
        self,
        config: Mapping[str, str] | None = None,
        *,
        format_options: Sequence[str] = (),
        jvm_options: Sequence[str] = (),
        heap: str = "512m",
        outside: int | None = None,
    ) -> None:
        super().__init__()
        self.controller_port = free_port()
        self.outside_port = free_port()
        self.config = {
            **_KAFKA_CONFIG,
            "node.id": "1",
            "listeners": f"PLAINTEXT://{LOOPBACK}:{self.port},CONTROLLER://{LOOPBACK}:{self.controller_port}",
            "log.dirs": str(self.dir / "data"),
        }
        if outside is not None:
            self.config |= {
                "listeners": f"{self.config['listeners']},OUTSIDE://{LOOPBACK}:{self.outside_port}",
                "advertised.listeners": f"PLAINTEXT://{LOOPBACK}:{self.port},OUTSIDE://{LOOPBACK}:{outside}",
                "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,OUTSIDE:PLAINTEXT",
            }
        self.config |= config or {}
        if "controller.quorum.voters" in self.config:
            self.format_options = [*format_options]
        else:
            self.config.setdefault("controller.quorum.bootstrap.servers", f"{LOOPBACK}:{self.controller_port}")
            self.format_options = ["--standalone", *format_options]
        self.jvm_options = [*_JVM, f"-Xmx{heap}", *jvm_options]

    @property
    def properties(self) -> Path:
        return self.dir / "server.properties"

    def java(self, *arguments: str) -> list[str]:
        program = shutil.which("java")
        home = os.environ.get(KAFKA_HOME)
        assert program and home, why_no_kafka()
        logging = f"-Dlog4j2.configurationFile=file:{self.dir / 'log4j2.properties'}"
        return [program, *self.jvm_options, logging, "-cp", f"{home}/libs/*", *arguments]

    def command(self) -> list[str]:
        return self.java("kafka.Kafka", str(self.properties))

    async def prepare(self) -> None:
        self.properties.write_text("".join(f"{name}={value}\n" for name, value in self.config.items()))
        (self.dir / "log4j2.properties").write_text(_LOG4J)
        tool = self.java(
            "kafka.tools.StorageTool", "format", "-t", _CLUSTER_ID, "-c", str(self.properties), *self.format_options
        )
        done = await asyncio.to_thread(subprocess.run, tool, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"formatting failed:\n{done.stdout}{done.stderr}")

    async def ready(self) -> bool:
        return await is_listening(self.port)


# Of three nodes: each record on all of them, one of which may be down.
_CLUSTER_CONFIG = {
    "default.replication.factor": "3",
    "min.insync.replicas": "2",
    "offsets.topic.replication.factor": "3",
    "transaction.state.log.replication.factor": "3",
    "transaction.state.log.min.isr": "2",
    "share.coordinator.state.topic.replication.factor": "3",
    "share.coordinator.state.topic.min.isr": "2",
    "broker.session.timeout.ms": "3000",
    "broker.heartbeat.interval.ms": "500",
    "controller.quorum.election.timeout.ms": "500",
    "controller.quorum.fetch.timeout.ms": "1000",
}


class KafkaCluster(Startable):
    """Three nodes of Apache Kafka, each broker and controller; one may be down.

    async with KafkaCluster() as cluster:
        cluster.nodes[2].kill()           # node.id is the index here
        await cluster.nodes[2].start()
    """

    def __init__(self) -> None:
        self.nodes = [
            KafkaServer({**_CLUSTER_CONFIG, "node.id": str(number), "controller.quorum.voters": ""}, heap="256m")
            for number in range(3)
        ]
        voters = ",".join(f"{n}@{LOOPBACK}:{node.controller_port}" for n, node in enumerate(self.nodes))
        for node in self.nodes:
            node.config["controller.quorum.voters"] = voters

    @property
    def bootstrap(self) -> str:
        return ",".join(node.bootstrap for node in self.nodes)

    async def start(self) -> None:
        """Start all nodes, together."""
        await asyncio.gather(*(node.start() for node in self.nodes))

    def close(self) -> None:
        """End all nodes and remove their data."""
        for node in self.nodes:
            node.close()


class EmbeddedBroker(Broker):
    """The broker of `tocsin up`, alone."""

    def command(self) -> list[str]:
        return broker_command(self.dir / "data", self.port)

    async def ready(self) -> bool:
        return await broker_ready(self.port)


class StoreServer(Server):
    """The store of `tocsin up`, alone.

    Args:
        durable: data survives a kill -9, but for the last second.
    """

    def __init__(self, *, durable: bool = False) -> None:
        super().__init__()
        self.durable = durable

    @property
    def url(self) -> str:
        return f"redis://{LOOPBACK}:{self.port}/0"

    def command(self) -> list[str]:
        return store_command(self.dir / "data", self.port, durable=self.durable)

    async def ready(self) -> bool:
        return await store_ready(self.port, self.dir / "data")


async def is_listening(port: int) -> bool:
    """Tell whether a broker lets clients in at a loopback port."""
    try:
        _, writer = await asyncio.open_connection(LOOPBACK, port)
    except OSError:
        return False
    writer.close()
    await writer.wait_closed()
    return True
