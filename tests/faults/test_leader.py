"""A cluster of three brokers loses the leader of a partition in the middle of a replay."""

from __future__ import annotations

import asyncio

import pytest
from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from tests.faults.judge import judge_events, judge_rejects, read_committed, refusals
from tests.faults.stage import Progress, Sender
from tests.live import backtested, make_topics, sample_points, settings_for, until, working
from tests.servers import KafkaCluster, KafkaServer, StoreServer, why_no_kafka

POINTS = sample_points(days=7)
_AHEAD = 60  # records sent and not settled: few, so that the replay takes as long as a leader needs to end


@pytest.mark.kafka
async def test_a_leader_stopped_and_one_killed_change_no_event(unique: str, caplog: pytest.LogCaptureFixture) -> None:
    if reason := why_no_kafka():
        pytest.skip(reason)
    caplog.set_level("ERROR")
    async with KafkaCluster() as cluster, StoreServer() as store:
        settings = settings_for(cluster.bootstrap, store.url, unique)
        kafka = settings.kafka
        await make_topics(kafka)
        progress = Progress(cluster.bootstrap, kafka)
        limit = 0.2
        sender = Sender(cluster.bootstrap, kafka, POINTS, progress, _AHEAD, 1, lambda: limit)
        try:
            async with working(settings):
                sending = asyncio.create_task(sender.run())
                leader = await _leader(cluster, kafka.anomalies_topic)
                limit = 0.5
                await leader.stop()
                await until(lambda: progress.total > 0.45 * len(POINTS), "progress without the stopped leader")
                await leader.start()
                leader = await _leader(cluster, kafka.points_topic)
                limit = 0.8
                await asyncio.to_thread(leader.kill)
                await until(lambda: progress.total > 0.75 * len(POINTS), "progress without the killed leader")
                limit = 1.0
                await sending
                await until(lambda: progress.total == sum(sender.sent), "everything settled")
        finally:
            progress.close()
        assert not sender.problems
        said = await asyncio.to_thread(read_committed, cluster.bootstrap, kafka.anomalies_topic)
        verdict = judge_events([message.value() or b"" for message in said], backtested(POINTS, settings))
        assert verdict and verdict.expected > 10, verdict
        refused = await asyncio.to_thread(read_committed, cluster.bootstrap, kafka.rejects_topic)
        assert judge_rejects(refusals(refused), sender.rejects)


async def _leader(cluster: KafkaCluster, topic: str) -> KafkaServer:
    """Return the leader of a topic's first partition, once all replicas of all partitions are in sync."""
    found: list[int] = []

    def whole() -> bool:
        try:
            metadata = AdminClient({"bootstrap.servers": cluster.bootstrap}).list_topics(timeout=5)
        except KafkaException:
            return False
        if any(len(one.isrs) < 3 for each in metadata.topics.values() for one in each.partitions.values()):
            return False
        found.append(metadata.topics[topic].partitions[0].leader)
        return True

    await until(lambda: asyncio.to_thread(whole), "all replicas in sync")
    return cluster.nodes[found[-1]]
