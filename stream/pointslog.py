"""The points topic as the service's group sees it: where its log begins and ends, what is committed, who reads it."""

from __future__ import annotations

from dataclasses import dataclass

from aiokafka import AIOKafkaConsumer
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError, for_code

from stream.errors import BrokerError
from stream.kafka import client_options, committed, explained
from stream.settings import KafkaSettings
from stream.tail import open_topic
from stream.topics import ensure_topics


@dataclass(frozen=True, slots=True)
class LogPart:
    """A partition of the points topic as its group sees it."""

    begin: int
    end: int
    committed: int | None


@dataclass(frozen=True, slots=True)
class Log:
    """The points topic, and who reads it."""

    cluster: str
    parts: dict[int, LogPart]
    members: tuple[str, ...]  # of the group: workers that run, or whose session has not run out


async def read_log(settings: KafkaSettings) -> Log:
    """Return what the broker knows of the points topic and of the service's group. Joins no group.

    Raises:
        BrokerError: the broker cannot be reached, or refuses.
        TocsinError: there is no such topic.
    """
    cluster, members = await _group(settings)
    consumer = AIOKafkaConsumer(
        **client_options(settings),
        group_id=settings.group,
        enable_auto_commit=False,
        fetch_max_wait_ms=1,  # what waits for records keeps all else on its connection waiting
    )
    try:
        await consumer.start()
        at = await open_topic(consumer, settings, settings.points_topic)
        begin, end = await consumer.beginning_offsets(at), await consumer.end_offsets(at)
        read = await committed(consumer, at)
        parts = {one.partition: LogPart(begin[one], end[one], read[one][0]) for one in at}
    except (KafkaError, TimeoutError) as e:
        said = explained(e, settings, wish="Read")
        raise BrokerError(f"cannot read {settings.points_topic} at {settings.bootstrap_servers}: {said}") from e
    finally:
        await consumer.stop()
    return Log(cluster, parts, members)


async def _group(settings: KafkaSettings) -> tuple[str, tuple[str, ...]]:
    """Return the cluster's id and the members of the group."""
    await ensure_topics(settings, {})  # says why, if the broker cannot be reached
    admin = AIOKafkaAdminClient(**client_options(settings))
    try:
        await admin.start()
        cluster = await admin.describe_cluster()
        (answer,) = await admin.describe_consumer_groups([settings.group])
        code, *_, members = answer.groups[0][:6]
        if code:
            raise for_code(code)
        return str(cluster["cluster_id"]), tuple(f"{one[1]}{one[2]}" for one in members)
    except KafkaError as e:
        said = explained(e, settings, wish="Describe")
        raise BrokerError(f"cannot describe group {settings.group} at {settings.bootstrap_servers}: {said}") from e
    finally:
        await admin.close()
