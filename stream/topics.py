"""Makes sure that topics exist, on a broker that may not be up yet; says why when it cannot be reached."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
import time
from collections.abc import Iterator, Mapping

from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.conn import collect_hosts, create_conn
from aiokafka.errors import (
    KafkaConnectionError,
    KafkaError,
    SaslAuthenticationFailed,
    TopicAlreadyExistsError,
    UnknownTopicOrPartitionError,
    UnsupportedSaslMechanismError,
    for_code,
)
from aiokafka.protocol.metadata import MetadataRequest

from stream.embedded import CLUSTER_ID
from stream.errors import BrokerError, ConfigError
from stream.kafka import client_options, explained
from stream.security import KAFKA
from stream.settings import KafkaSettings
from stream.tasks import pause

_SETTING = "TOCSIN_KAFKA__BOOTSTRAP_SERVERS"
_REQUEST_MS = 10_000
_AGAIN_S = (0.05, 1.0)  # between two attempts: at first, at last
_SEEN_AGAIN_S = 0.05
_PROBE_S = 5.0
_EMBEDDED_CONFIGS = {"retention.ms": "-1"}  # the embedded broker takes a week-old record away within a second


async def ensure_topics(
    settings: KafkaSettings | str,
    topics: Mapping[str, int],
    *,
    replication_factor: int | None = None,
    configs: Mapping[str, str] | None = None,
    deadline_s: float | None = None,
) -> dict[str, int]:
    """Create the topics that do not exist; returns the number of partitions that each has.

    A topic that exists is left as it is, with the partitions that it has, and needs no right to create. Without topics
    it tells whether the broker can be reached.

    Args:
        settings: where the broker is and how it lets us in; a host:port,… alone for one that lets everyone in.
        topics: name -> partitions of a topic to be created.
        replication_factor: replicas of each; -1: the broker's default; None: as the settings say.
        configs: topic settings of those created, e.g. {"retention.ms": "604800000"}.
        deadline_s: how long to try, in seconds, while the broker cannot be reached or is not ready; None: as the
            settings say.

    Raises:
        BrokerError: the broker cannot be reached in time or refuses; the message says why and names the setting.
        ConfigError: the bootstrap servers are no list of hosts and ports.
    """
    settings = _settings(settings)
    bootstrap_servers = settings.bootstrap_servers
    replication_factor = settings.replication if replication_factor is None else replication_factor
    deadline_s = settings.connect_timeout_s if deadline_s is None else deadline_s
    options = client_options(settings)
    try:
        collect_hosts(bootstrap_servers)
    except ValueError as e:
        raise ConfigError(f"{_SETTING}={bootstrap_servers!r} is no list of host:port,…: {e}") from e
    started = time.monotonic()
    failures = 0
    while True:
        # Anew each time: it does not find its way round a node that died.
        admin = AIOKafkaAdminClient(**options | {"request_timeout_ms": _REQUEST_MS})
        try:
            remaining_s = max(deadline_s - (time.monotonic() - started), 0.1)
            with _unsaid():
                async with asyncio.timeout(remaining_s):
                    await admin.start()
            async with asyncio.timeout(remaining_s):
                return await _ensure(admin, topics, replication_factor, configs or {})
        except (_Refused, KafkaError, OSError, TimeoutError, AssertionError, AttributeError) as e:
            # The last two come from aiokafka on a broker that knows no controller or no node yet.
            problem: Exception = e
        finally:
            with contextlib.suppress(KafkaError, OSError, TimeoutError):
                await admin.close()
        failures += 1
        tried_s, pause_s = time.monotonic() - started, pause(failures, *_AGAIN_S)
        if isinstance(problem, _Refused):
            raise BrokerError(f"the broker at {bootstrap_servers} refuses {problem}") from problem.__cause__
        if isinstance(problem, KafkaError) and not problem.retriable:
            why = explained(problem, settings, wish="Describe")
            raise BrokerError(f"the broker at {bootstrap_servers} refuses: {why}") from problem
        in_vain, reason = await why_unreachable(settings)
        if in_vain:
            raise BrokerError(f"the broker at {bootstrap_servers} lets us not in: {reason}") from problem
        if tried_s + pause_s >= deadline_s:
            raise BrokerError(
                f"cannot reach the broker at {bootstrap_servers} (tried for {tried_s:.1f} s): "
                f"{reason or str(problem) or type(problem).__name__}; set {_SETTING} to the host:port of your Kafka"
            ) from problem
        await asyncio.sleep(pause_s)


def _settings(settings: KafkaSettings | str) -> KafkaSettings:
    return KafkaSettings(bootstrap_servers=settings) if isinstance(settings, str) else settings


@contextlib.contextmanager
def _unsaid() -> Iterator[None]:
    """Keep aiokafka from logging each attempt to connect: the error that we raise, if any, says it once."""
    log = logging.getLogger("aiokafka")
    level = log.level
    if log.getEffectiveLevel() > logging.DEBUG:
        log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


class _Refused(Exception):
    """The broker understood, and will not."""


async def _ensure(
    admin: AIOKafkaAdminClient, topics: Mapping[str, int], replication_factor: int, configs: Mapping[str, str]
) -> dict[str, int]:
    cluster = await admin.describe_cluster()
    if cluster["cluster_id"] == CLUSTER_ID:
        replication_factor = max(replication_factor, 1)  # it knows no default
        configs = {**_EMBEDDED_CONFIGS, **configs}
    present = await _partitions(admin, topics)
    missing = [
        NewTopic(name, count, 1, topic_configs=dict(configs)) for name, count in topics.items() if name not in present
    ]
    for topic in missing:
        topic.replication_factor = replication_factor  # aiokafka's constructor takes no -1, the broker does
    if missing:
        answer = await admin.create_topics(missing)
        for name, code, message in answer.topic_errors:
            error = for_code(code)
            if not code or error is TopicAlreadyExistsError:  # another worker was first
                continue
            if error.retriable:
                raise error(message)
            raise _Refused(f"to create topic {name}: {message or error.description or error.__name__}") from error()
    # A created topic is ready once each partition has a leader that answers for it.
    while len(present) < len(topics):
        await asyncio.sleep(_SEEN_AGAIN_S)
        present = await _partitions(admin, topics)
    return present


async def _partitions(admin: AIOKafkaAdminClient, topics: Mapping[str, int]) -> dict[str, int]:
    """Return the partitions of the topics that exist and are ready."""
    if not topics:
        return {}
    present: dict[str, int] = {}
    # Not `describe_topics`: it lets a broker that creates topics of itself do so, with one partition.
    metadata = await admin._send_request(MetadataRequest(list(topics), allow_auto_topic_creation=False))
    for topic in metadata.to_object()["topics"]:
        error = for_code(topic["error_code"])
        if topic["error_code"] == 0:
            if all(partition["leader"] >= 0 for partition in topic["partitions"]):
                present[topic["topic"]] = len(topic["partitions"])
        elif error is not UnknownTopicOrPartitionError and not error.retriable:
            raise error(topic["topic"])
    return present


async def why_unreachable(settings: KafkaSettings | str) -> tuple[bool, str]:
    """Return whether trying again is in vain, and the reason that aiokafka's clients only log.

    Args:
        settings: where the broker is and how it lets us in; a host:port,… alone for one that lets everyone in.

    Returns:
        (False, "") if a server of the list lets us in.
    """
    settings = _settings(settings)
    options = {
        name: value
        for name, value in client_options(settings).items()
        if name.startswith(("sasl_", "ssl_", "security_"))
    }
    reasons: list[str] = []
    in_vain = False
    for host, port, _ in collect_hosts(settings.bootstrap_servers):
        try:
            async with asyncio.timeout(_PROBE_S):
                connection = await create_conn(host, port, request_timeout_ms=int(_PROBE_S * 1000), **options)
                try:
                    # A listener with SASL tells its versions to everyone, and goes at the first question after that.
                    await connection.send(MetadataRequest([]))
                finally:
                    connection.close()
        except Exception as e:  # whatever it is, it is what the user has to know
            # Credentials, a mechanism or a certificate that is not accepted: a person has to change something.
            refused = isinstance(e, KafkaError) and not e.retriable
            in_vain = in_vain or refused or isinstance(e, ssl.SSLCertVerificationError)
            reasons.append(f"{host}:{port}: {_plain(e, settings)}")
        else:
            return False, ""
    return in_vain, "; ".join(reasons)


def _plain(error: Exception, settings: KafkaSettings) -> str:
    """Return what went wrong, with the setting to look at if it is not the address."""
    if isinstance(error, TimeoutError):
        return f"no answer within {_PROBE_S:g} s"
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not accepted, {error.verify_message}; see {KAFKA}SSL_CAFILE"
    if isinstance(error, UnsupportedSaslMechanismError):
        return f"it does not take {settings.sasl_mechanism}; see {KAFKA}SASL_MECHANISM"
    if isinstance(error, SaslAuthenticationFailed):
        token = settings.sasl_mechanism == "OAUTHBEARER"
        names = ("SASL_TOKEN_FILE",) if token else ("SASL_USERNAME", "SASL_PASSWORD")
        return f"{' '.join(map(str, error.args))}; see {' and '.join(f'{KAFKA}{name}' for name in names)}"
    if isinstance(error, KafkaConnectionError | ConnectionResetError | ssl.SSLError):
        protocol = settings.security_protocol
        certificate = f", or ask for a certificate ({KAFKA}SSL_CERTFILE)" if protocol == "SSL" else ""
        return f"it ends the connection: does it not speak {protocol} ({KAFKA}SECURITY_PROTOCOL){certificate}?"
    return str(error) or type(error).__name__
