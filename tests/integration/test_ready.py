"""What a worker says of itself."""

from __future__ import annotations

from stream.service import make_worker
from tests.live import settings_for, working


async def test_it_is_ready_once_it_has_partitions_and_not_before(broker: str, redis_url: str, unique: str) -> None:
    settings = settings_for(broker, redis_url, unique)
    worker = make_worker(settings)
    assert worker.not_ready() == ["no partitions are assigned yet"] and worker.lag() == 0
    await worker.store.close()
    async with working(settings) as worker:
        assert worker.not_ready() == [], "also before the broker has answered for the first time"
