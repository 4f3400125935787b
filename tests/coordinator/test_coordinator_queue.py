"""The queue over a real Redis, with the client options of production."""

import asyncio

import pytest
import redis

from fedmkt_coordinator.queue import GROUP, JOBS, JobQueue, Unavailable, without_password
from real_servers import RedisProcess

pytestmark = [pytest.mark.anyio, pytest.mark.services]


@pytest.fixture
async def queue(redis_server: RedisProcess) -> JobQueue:
    return JobQueue.connect(redis_server.url)


def entries(server: RedisProcess) -> list[str]:
    with redis.Redis.from_url(server.url, decode_responses=True) as client:
        return [fields["job_id"] for _, fields in client.xrange(JOBS)]


async def test_a_job_is_in_the_stream_once_for_each_number_of_claims(
    queue: JobQueue, redis_server: RedisProcess
) -> None:
    assert await queue.add([("job_a", 0), ("job_b", 0)]) == 2
    assert await queue.add([("job_a", 0), ("job_b", 0)]) == 0
    assert await queue.add([("job_a", 1)]) == 1
    assert entries(redis_server) == ["job_a", "job_b", "job_a"]
    await queue.close()


async def test_workers_of_the_group_share_the_entries(queue: JobQueue, redis_server: RedisProcess) -> None:
    await queue.add([("job_a", 0), ("job_b", 0)])
    await queue.close()
    with redis.Redis.from_url(redis_server.url, decode_responses=True, protocol=2) as client:
        taken = [client.xreadgroup(GROUP, worker, {JOBS: ">"}, count=1) for worker in ("one", "two", "three")]
    assert [each[0][1][0][1]["job_id"] for each in taken if each] == ["job_a", "job_b"]


async def test_after_a_flush_everything_is_added_again(queue: JobQueue, redis_server: RedisProcess) -> None:
    await queue.add([("job_a", 0)])
    redis_server.flush()
    assert await queue.add([("job_a", 0)]) == 1
    assert entries(redis_server) == ["job_a"]
    await queue.close()


async def test_what_one_wakes_another_hears(queue: JobQueue, redis_server: RedisProcess) -> None:
    other = JobQueue.connect(redis_server.url)
    heard = other.heard()
    assert await anext(heard) == ("", "")
    await other.wake("fed_0", "tasks")  # its own voice it does not hear
    await queue.wake("fed_1", "tasks")
    await queue.wake("fed_2", "events")
    assert [await anext(heard), await anext(heard)] == [("fed_1", "tasks"), ("fed_2", "events")]
    await heard.aclose()
    await other.close()
    await queue.close()


async def test_a_redis_that_is_gone_raises_soon(own_redis: RedisProcess) -> None:
    queue = JobQueue.connect(own_redis.url)
    await queue.ping()
    own_redis.stop()
    async with asyncio.timeout(5):
        with pytest.raises(Unavailable):
            await queue.add([("job_a", 0)])
        with pytest.raises(Unavailable):
            await anext(queue.heard())
    await queue.close()


def test_passwords_stay_out_of_logs() -> None:
    assert without_password("redis://:secret@example.org:6380/0") == "redis://example.org:6380"
    assert without_password("redis://example.org") == "redis://example.org:6379"
