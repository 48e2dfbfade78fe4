"""Records that the broker refuses: nothing is committed without them, and what can be published is, in the end."""

from __future__ import annotations

from pathlib import Path

import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

from stream.errors import BrokerError
from stream.outbox import TransactionalOutbox
from stream.replay import replay
from stream.service import make_worker
from tests.faults.dying import short_lived
from tests.live import backtested, digest, published, read_all, sample_points, settings_for, until_committed, working

POINTS = sample_points(3)


async def narrow_topic(bootstrap: str, topic: str, most_bytes: int) -> None:
    """Make a topic that takes no batch of records larger than this, or set the bound of one that is there."""
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    try:
        config = {"max.message.bytes": str(most_bytes)}
        if topic in await admin.list_topics():
            await admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, topic, configs=config)])
        else:
            await admin.create_topics([NewTopic(topic, 1, 1, topic_configs=config)])
    finally:
        await admin.close()


@pytest.fixture
def further(unique: str, tmp_path: Path) -> tuple[str, Path]:
    topic, rules = f"further.{unique}", tmp_path / "rules.yaml"
    rules.write_text(f"rules:\n  - match: '*'\n    topic: {topic}\n")
    return topic, rules


async def test_a_refused_event_holds_its_transaction_back_and_ends_the_worker(
    kafka: str, redis_url: str, unique: str, further: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # What it leaves open the broker aborts, after a minute by default: nobody reads further before.
    monkeypatch.setattr(TransactionalOutbox, "_made", short_lived)
    topic, rules = further
    await narrow_topic(kafka, topic, 100)
    settings = settings_for(kafka, redis_url, unique, TOCSIN_RULES=str(rules))
    await replay(POINTS, settings.kafka)
    worker = make_worker(settings)
    try:
        with pytest.raises(BrokerError, match="cannot publish"):
            await worker.run()
    finally:
        await worker.store.close()
    assert await read_all(settings.kafka, topic) == []
    before = {event.id for event in await published(settings.kafka)}

    await narrow_topic(kafka, topic, 1_000_000)  # somebody mends it, and the worker is started again
    async with working(settings):
        await until_committed(settings.kafka, len(POINTS.value))
    events = await published(settings.kafka)
    assert len({event.id for event in events}) == len(events)
    assert digest(events) == digest(backtested(POINTS, settings))
    assert len(await read_all(settings.kafka, topic)) == len(events) > len(before)
