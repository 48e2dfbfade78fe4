"""Which rights the service has in Kafka, asked for before the first one is needed.

Without this, a service that may not write its events would run well until the first of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Collection, Iterable
from typing import Any

from aiokafka import TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import (
    GroupAuthorizationFailedError,
    IncompatibleBrokerVersion,
    KafkaError,
    TopicAuthorizationFailedError,
    TransactionalIdAuthorizationFailed,
    for_code,
)
from aiokafka.protocol.api import Request, RequestStruct, Response
from aiokafka.protocol.types import Array, Boolean, Bytes, Int16, Int32, Schema, String

from stream.errors import BrokerError
from stream.kafka import client_options, transactional_producer, user
from stream.settings import KafkaSettings
from stream.topics import ensure_topics

_READ, _WRITE = 3, 4  # Kafka's numbers of the operations: bits of what is allowed
_UNSAID = -(2**31)  # the broker does not say what is allowed
_REQUEST_MS = 10_000
_AGAIN_S = 0.1


async def require_rights(
    settings: KafkaSettings, *, reads: Collection[str] = (), writes: Collection[str] = (), transactions: bool = False
) -> None:
    """Make sure that topics may be read, by the group of the settings, and others written.

    A broker without ACLs allows everything; one that cannot say what is allowed (older than Kafka 2.3) is believed.

    Args:
        settings: of the client; its group is looked at if something is to be read.
        reads: topics to be read.
        writes: topics to be written.
        transactions: whether transactions are tried too; it leaves an id with the broker that runs out by itself.

    Raises:
        BrokerError: a right is missing; the message names all that are. Or the broker fails.
    """
    await ensure_topics(settings, {})  # says why, if the broker cannot be reached
    missing = await missing_rights(settings, reads=reads, writes=writes, transactions=transactions)
    if missing:
        raise BrokerError(
            f"the broker at {settings.bootstrap_servers} allows {user(settings)} too little: it lacks"
            f" {'; '.join(missing)} (deploy/acl gives that)"
        )


async def missing_rights(
    settings: KafkaSettings, *, reads: Collection[str], writes: Collection[str], transactions: bool
) -> list[str]:
    """Return the rights that are missing, such as "Write on topic kpi.anomalies"; as for `require_rights`."""
    started = time.monotonic()
    while True:
        try:
            missing = await _missing(settings, reads, writes)
            break
        except (IncompatibleBrokerVersion, NotImplementedError):  # which of them it is depends on the version
            return []
        except (KafkaError, OSError, TimeoutError) as e:
            # A broker that has just started has no coordinator yet.
            retriable = not isinstance(e, KafkaError) or e.retriable
            if not retriable or time.monotonic() - started > settings.connect_timeout_s:
                raise BrokerError(f"the broker at {settings.bootstrap_servers} fails: {e!r}") from e
        await asyncio.sleep(_AGAIN_S)
    if transactions:
        ids = [(topic, f"{settings.group}-{topic}-") for topic in reads]
        missing += [
            f"Write on transactional ids {prefix}…" for topic, prefix in ids if not await _may_begin(settings, topic)
        ]
    return missing


async def _missing(settings: KafkaSettings, reads: Collection[str], writes: Collection[str]) -> list[str]:
    async with _admin(settings) as admin:
        allowed = await _of_topics(admin, {*reads, *writes})
        missing = [
            f"{operation} on topic {name}"
            for operation, bit, names in (("Read", _READ, reads), ("Write", _WRITE, writes))
            for name in names
            if not _has(allowed.get(name), bit)
        ]
        if reads and not _has(await _of_group(admin, settings.group), _READ):
            missing.append(f"Read on group {settings.group}")
    return missing


def _has(allowed: int | None, bit: int) -> bool:
    return allowed is None or allowed == _UNSAID or bool(allowed >> bit & 1)


@contextlib.asynccontextmanager
async def _admin(settings: KafkaSettings) -> AsyncIterator[AIOKafkaAdminClient]:
    admin = AIOKafkaAdminClient(**client_options(settings) | {"request_timeout_ms": _REQUEST_MS})
    try:
        await admin.start()
        yield admin
    finally:
        await admin.close()


async def _of_topics(admin: AIOKafkaAdminClient, names: Iterable[str]) -> dict[str, int]:
    """Return what is allowed of each topic, bits; one that is not there is left out."""
    answer = await admin._send_request(_TopicsRequest(sorted(names)))
    allowed = {}
    for topic in answer.to_object()["topics"]:
        if for_code(topic["error_code"]) is TopicAuthorizationFailedError:
            allowed[topic["topic"]] = 0
        elif topic["error_code"] == 0:
            allowed[topic["topic"]] = topic["authorized_operations"]
    return allowed


async def _of_group(admin: AIOKafkaAdminClient, group: str) -> int:
    """Return what is allowed of a group, bits."""
    try:
        node = await admin.find_coordinator(group)
    except GroupAuthorizationFailedError:
        return 0
    answer = await admin._send_request(_GroupsRequest([group]), node)
    (found,) = answer.to_object()["groups"]
    if for_code(found["error_code"]) is GroupAuthorizationFailedError:
        return 0
    return _UNSAID if found["error_code"] else int(found["authorized_operations"])


async def _may_begin(settings: KafkaSettings, topic: str) -> bool:
    producer = transactional_producer(settings, TopicPartition(topic, -1))
    try:
        await producer.start()
    except TransactionalIdAuthorizationFailed:
        return False
    except KafkaError as e:
        raise BrokerError(f"the broker at {settings.bootstrap_servers} begins no transaction: {e!r}") from e
    finally:
        await producer.stop()
    return True


# -- requests in the versions that tell what is allowed; aiokafka has older ones --------------------------------------

_TEXT = String("utf-8")


class _TopicsResponse(Response):  # type: ignore[misc]
    API_KEY = 3
    API_VERSION = 8
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        ("brokers", Array(("node_id", Int32), ("host", _TEXT), ("port", Int32), ("rack", _TEXT))),
        ("cluster_id", _TEXT),
        ("controller_id", Int32),
        (
            "topics",
            Array(
                ("error_code", Int16),
                ("topic", _TEXT),
                ("is_internal", Boolean),
                (
                    "partitions",
                    Array(
                        ("error_code", Int16),
                        ("partition", Int32),
                        ("leader", Int32),
                        ("leader_epoch", Int32),
                        ("replicas", Array(Int32)),
                        ("isr", Array(Int32)),
                        ("offline_replicas", Array(Int32)),
                    ),
                ),
                ("authorized_operations", Int32),
            ),
        ),
        ("cluster_authorized_operations", Int32),
    )


class _TopicsRequestV8(RequestStruct):  # type: ignore[misc]
    API_KEY = 3
    API_VERSION = 8
    RESPONSE_TYPE = _TopicsResponse
    SCHEMA = Schema(
        ("topics", Array(_TEXT)),
        ("allow_auto_topic_creation", Boolean),
        ("include_cluster_authorized_operations", Boolean),
        ("include_topic_authorized_operations", Boolean),
    )


class _TopicsRequest(Request[_TopicsRequestV8]):  # type: ignore[misc]
    API_KEY = 3

    def __init__(self, topics: list[str]) -> None:
        self._topics = topics

    def build(self, request_struct_class: Any) -> RequestStruct:
        return request_struct_class(self._topics, False, False, True)


class _GroupsResponse(Response):  # type: ignore[misc]
    API_KEY = 15
    API_VERSION = 3
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        (
            "groups",
            Array(
                ("error_code", Int16),
                ("group", _TEXT),
                ("state", _TEXT),
                ("protocol_type", _TEXT),
                ("protocol", _TEXT),
                (
                    "members",
                    Array(
                        ("member_id", _TEXT),
                        ("client_id", _TEXT),
                        ("client_host", _TEXT),
                        ("member_metadata", Bytes),
                        ("member_assignment", Bytes),
                    ),
                ),
                ("authorized_operations", Int32),
            ),
        ),
    )


class _GroupsRequestV3(RequestStruct):  # type: ignore[misc]
    API_KEY = 15
    API_VERSION = 3
    RESPONSE_TYPE = _GroupsResponse
    SCHEMA = Schema(("groups", Array(_TEXT)), ("include_authorized_operations", Boolean))


class _GroupsRequest(Request[_GroupsRequestV3]):  # type: ignore[misc]
    API_KEY = 15

    def __init__(self, groups: list[str]) -> None:
        self._groups = groups

    def build(self, request_struct_class: Any) -> RequestStruct:
        return request_struct_class(self._groups, True)
