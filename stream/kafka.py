"""Kafka clients as the service uses them, made from the settings; aiokafka's errors become ours."""

from __future__ import annotations

import asyncio
import functools
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition, client
from aiokafka.abc import AbstractTokenProvider, ConsumerRebalanceListener
from aiokafka.conn import OAuthAuthenticator
from aiokafka.errors import (
    ClusterAuthorizationFailedError,
    GroupAuthorizationFailedError,
    SaslAuthenticationFailed,
    TopicAuthorizationFailedError,
    TransactionalIdAuthorizationFailed,
)

from stream.batches import bound_batches
from stream.security import KAFKA, Certificates, read_secret, tls_context
from stream.settings import KafkaSettings

log = logging.getLogger(__name__)

# A transaction that follows another within some 20 ms is told to try again later (the broker still writes the last
# one's markers); aiokafka waits this long before it does, 100 ms by default.
_RETRY_BACKOFF_MS = 20
_FETCH_BYTES = 8 << 20  # of one partition; 1 MiB, the default, halves the throughput of small records
_SESSION_TIMEOUT_MS = 10_000
_REBALANCE_TIMEOUT_MS = 30_000  # for the others to settle what they have taken in
_METADATA_MS = 30_000  # a new partition is found after so long; aiokafka's own pace is five minutes
_REQUEST_TIMEOUT_MS = 20_000  # a broker that does not answer is given up after it
_REFUSED_S = (0.5, 5.0)  # between two logins that are refused: at first, at last
_CLOCK = re.compile(r"clock_ms=(\d+);offset=(\d+);")


def client_options(settings: KafkaSettings) -> dict[str, Any]:
    """Return what every client needs to reach the broker and to be let in.

    Raises:
        ConfigError: a file is no longer what it was when the settings were read; the message names the setting.
    """
    return {
        "bootstrap_servers": settings.bootstrap_servers,
        "retry_backoff_ms": _RETRY_BACKOFF_MS,
        **_login(settings),
    }


def named(partition: TopicPartition) -> str:
    """Return the name of a partition as Kafka's own logs have it, TOPIC-NUMBER."""
    return f"{partition.topic}-{partition.partition}"


def transactional_id(settings: KafkaSettings, partition: TopicPartition) -> str:
    """Return the id under which a partition's outputs are committed; it fences a worker that had it before."""
    return f"{settings.group}-{named(partition)}"


def points_consumer(settings: KafkaSettings) -> AIOKafkaConsumer:
    """Return a consumer of the group, not started and not subscribed; offsets are committed by the producers."""
    bound_batches()
    return AIOKafkaConsumer(
        **client_options(settings),
        group_id=settings.group,
        group_instance_id=settings.instance or None,
        client_id=f"tocsin-{settings.instance or 'worker'}",
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        isolation_level="read_committed",
        max_partition_fetch_bytes=_FETCH_BYTES,
        session_timeout_ms=_SESSION_TIMEOUT_MS,
        heartbeat_interval_ms=_SESSION_TIMEOUT_MS // 4,
        rebalance_timeout_ms=_REBALANCE_TIMEOUT_MS,
        metadata_max_age_ms=_METADATA_MS,
        request_timeout_ms=_REQUEST_TIMEOUT_MS,
    )


def reader(settings: KafkaSettings, offset_reset: str = "earliest") -> AIOKafkaConsumer:
    """Return a consumer without a group that sees committed records only."""
    return AIOKafkaConsumer(
        **client_options(settings),
        enable_auto_commit=False,
        auto_offset_reset=offset_reset,
        isolation_level="read_committed",
    )


def transactional_producer(settings: KafkaSettings, partition: TopicPartition) -> AIOKafkaProducer:
    """Return the producer of a partition's outputs, not started."""
    return AIOKafkaProducer(
        **client_options(settings),
        transactional_id=transactional_id(settings, partition),
        linger_ms=0,
        request_timeout_ms=_REQUEST_TIMEOUT_MS,
    )


def plain_producer(settings: KafkaSettings) -> AIOKafkaProducer:
    """Return a producer of outputs for a broker without transactions, not started."""
    return AIOKafkaProducer(**client_options(settings), acks="all", linger_ms=0, request_timeout_ms=_REQUEST_TIMEOUT_MS)


def points_producer(settings: KafkaSettings) -> AIOKafkaProducer:
    """Return a producer of points, not started: large batches, idempotent, so that a retry repeats nothing."""
    return AIOKafkaProducer(**client_options(settings), enable_idempotence=True, linger_ms=20, max_batch_size=256 << 10)


class Rebalance(ConsumerRebalanceListener):  # type: ignore[misc]
    """Calls two coroutine functions when partitions come and go."""

    def __init__(self, assigned: Any, revoked: Any) -> None:
        self._assigned = assigned
        self._revoked = revoked

    async def on_partitions_assigned(self, assigned: Sequence[TopicPartition]) -> None:
        """Take the partitions on."""
        await self._assigned(sorted(assigned))

    async def on_partitions_revoked(self, revoked: Sequence[TopicPartition]) -> None:
        """Let the partitions go."""
        await self._revoked(sorted(revoked))


class Clock(NamedTuple):
    """A time up to which silence was judged, and the offset before which all records had been taken in by then."""

    ms: int = 0
    offset: int = 0


def clock_metadata(clock: Clock) -> str:
    """Return a clock as it is committed with an offset."""
    return f"clock_ms={clock.ms};offset={clock.offset};"


async def committed(
    consumer: AIOKafkaConsumer, partitions: Sequence[TopicPartition]
) -> dict[TopicPartition, tuple[int | None, str]]:
    """Return the committed offset of each partition, None without one, and the metadata committed with it."""
    # The public `committed` returns the offset alone, and the admin client would be one more connection a partition.
    found = await consumer._coordinator.fetch_committed_offsets(partitions)
    there = {at: found[at] for at in partitions if at in found and found[at].offset >= 0}
    return {at: (there[at].offset, there[at].metadata or "") if at in there else (None, "") for at in partitions}


async def committed_offset(consumer: AIOKafkaConsumer, at: TopicPartition) -> tuple[int | None, Clock]:
    """Return the committed offset of a partition, None without one, and the clock that was committed with it."""
    offset, metadata = (await committed(consumer, [at]))[at]
    clock = _CLOCK.fullmatch(metadata)
    return offset, Clock(int(clock[1]), int(clock[2])) if clock else Clock()


def read_up_to(consumer: AIOKafkaConsumer, at: TopicPartition) -> int | None:
    """Return when the broker last said that a partition holds nothing but what the consumer has handed out.

    In ms since 1970; None while something waits, or where nothing is known. It stands still while the broker cannot be
    reached, and does not wait for the markers of transactions, which are never handed out.
    """
    state = _state(consumer, at)  # `position` in public waits, and the two must be of one answer of the broker
    if state is None or state.timestamp is None:
        return None
    if not state.has_valid_position or state.position < state.highwater:
        return None
    return int(state.timestamp)


def answered_ms(consumer: AIOKafkaConsumer, at: TopicPartition) -> int:
    """Return when the broker last said anything of a partition, ms since 1970, 0 for not yet."""
    state = _state(consumer, at)
    return 0 if state is None or state.timestamp is None else int(state.timestamp)


def lag(consumer: AIOKafkaConsumer, at: TopicPartition) -> int:
    """Return how many offsets of a partition the consumer has not handed out, as far as the broker has said."""
    state = _state(consumer, at)
    if state is None or state.highwater is None or not state.has_valid_position:
        return 0
    return max(int(state.highwater) - int(state.position), 0)


def _state(consumer: AIOKafkaConsumer, at: TopicPartition) -> Any:
    """Return what aiokafka knows of a partition that is assigned; it tells nobody in public."""
    assigned = consumer._subscription.subscription
    if assigned is None or assigned.assignment is None or at not in assigned.assignment.tps:
        return None
    return assigned.assignment.state_value(at)


# -- security ---------------------------------------------------------------------------------------------------------


def _login(settings: KafkaSettings) -> dict[str, Any]:
    """Return what aiokafka's clients need to be let in."""
    options: dict[str, Any] = {"security_protocol": settings.security_protocol}
    if settings.security_protocol.endswith("SSL"):
        options["ssl_context"] = tls_context(Certificates.of(KAFKA, settings))
    if settings.security_protocol.startswith("SASL"):
        _mend_and_hush()
        options["sasl_mechanism"] = settings.sasl_mechanism
        if settings.sasl_mechanism == "OAUTHBEARER":
            options["sasl_oauth_token_provider"] = TokenFile(settings.sasl_token_file)
        else:
            options["sasl_plain_username"] = settings.sasl_username
            options["sasl_plain_password"] = settings.sasl_password.get_secret_value()
    return options


class TokenFile(AbstractTokenProvider):  # type: ignore[misc]
    """Gives each new connection the token that a file holds at that time.

    A Kubernetes projected token, or what a side-car writes: it is renewed in place before it expires, and a broker
    that ends connections with their token is met again with the new one.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    async def token(self) -> str:
        """Return the token.

        Raises:
            OSError: the file cannot be read. aiokafka takes it for a connection that failed.
        """
        try:
            return read_secret(self.path)
        except ValueError as e:
            raise OSError(f"{self.path}: {e}") from None


class _NoCredentials(logging.Filter):
    """Drops the records of aiokafka's connections that hold a login: at DEBUG it logs each request as it is."""

    def filter(self, record: logging.LogRecord) -> bool:
        arguments = record.args if isinstance(record.args, tuple) else ()
        return not any(type(one).__name__.startswith("SaslAuthenticate") for one in arguments)


@functools.cache
def _mend_and_hush() -> None:
    """Keep logins out of aiokafka's log, hear when a broker refuses a token, and let refused logins wait.

    A broker answers a token that it does not accept with the reason, and waits for the client to give up (RFC 7628);
    aiokafka 0.14 takes any answer for a yes, and fails later, with an AssertionError.
    It also tries a refused login again at once, some forty times a second: a broker counts that as an attack, and a
    directory behind it locks the user.
    """
    logging.getLogger("aiokafka.conn").addFilter(_NoCredentials())
    step, create_conn = OAuthAuthenticator.step, client.create_conn
    refusals: dict[Any, int] = {}

    @functools.wraps(step)
    async def checked(self: Any, payload: bytes | None) -> Any:
        if self._token_sent and payload:
            raise SaslAuthenticationFailed(f"the token is refused: {payload.decode(errors='replace')}")
        return await step(self, payload)

    @functools.wraps(create_conn)
    async def patient(host: str, port: int, **options: Any) -> Any:
        provider = options.get("sasl_oauth_token_provider")
        login = provider.path if isinstance(provider, TokenFile) else options.get("sasl_plain_username")
        try:
            connection = await create_conn(host, port, **options)
        except SaslAuthenticationFailed as e:
            refusals[login] = count = refusals.get(login, 0) + 1
            if count == 2:  # the first one at start ends the service, with its reason
                log.error("the broker refuses the login of %s, which is tried again: %s", login, e.args[0])
            if count > 1:
                await asyncio.sleep(min(_REFUSED_S[0] * 2 ** (count - 2), _REFUSED_S[1]))
            raise
        if refusals.pop(login, 0) > 1:
            log.warning("the broker lets %s in again", login)
        return connection

    OAuthAuthenticator.step = checked
    client.create_conn = patient


def missing_right(error: BaseException, settings: KafkaSettings, *, wish: str) -> str | None:
    """Return which right an error of Kafka says is missing, or None if it says something else.

    Args:
        error: as aiokafka raised it.
        settings: of the client.
        wish: what it wanted of the topic, "Read" or "Write".
    """
    if isinstance(error, TopicAuthorizationFailedError):
        return f"the right to {wish} topic {', '.join(_topics(error)) or '(unnamed)'}"
    if isinstance(error, GroupAuthorizationFailedError):
        return f"the right to Read group {settings.group}"
    if isinstance(error, TransactionalIdAuthorizationFailed):
        return f"the right to Write transactional ids that begin with {settings.group}-"
    if isinstance(error, ClusterAuthorizationFailedError):
        return "the right to IdempotentWrite on the cluster"
    return None


def _topics(error: BaseException) -> Iterator[str]:
    for one in error.args:
        yield from [one] if isinstance(one, str) else sorted(one) if isinstance(one, Iterable) else []


def explained(error: BaseException, settings: KafkaSettings, *, wish: str = "Read") -> str:
    """Return an error of Kafka in words: a missing right by its name, anything else as it is."""
    right = missing_right(error, settings, wish=wish)
    return repr(error) if right is None else f"{user(settings)} lacks {right} (deploy/acl)"


def user(settings: KafkaSettings) -> str:
    """Return how a client is called in messages."""
    return f"user {settings.sasl_username}" if settings.sasl_username else "the user of this client"
