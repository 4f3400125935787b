"""The LLM server's end of the job stream, against a real Redis 6.2."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from fedmkt.protocol import QueueView
from fedmkt_llm_server import queue as queue_module
from fedmkt_llm_server.queue import JobQueue, lasting_name
from real_servers import RedisProcess

pytestmark = pytest.mark.services
STREAM, GROUP = "fedmkt:jobs", "llm-servers"
Open = Callable[[str], JobQueue]


@pytest.fixture
def open_queue(redis_server: RedisProcess) -> Iterator[Open]:
    opened: list[JobQueue] = []

    def make(consumer: str) -> JobQueue:
        opened.append(JobQueue(QueueView(redis_url=redis_server.url, stream=STREAM, group=GROUP), consumer))
        return opened[-1]

    yield make
    for queue in opened:
        queue.close()


@pytest.fixture
def client(redis_server: RedisProcess) -> Iterator["redis.Redis"]:
    with redis.Redis.from_url(redis_server.url, decode_responses=True) as made:
        yield made


def pending(client: "redis.Redis") -> int:
    return int(client.xpending(STREAM, GROUP)["pending"])


def test_jobs_added_before_the_group_exists_are_delivered(open_queue: Open, client: "redis.Redis") -> None:
    client.xadd(STREAM, {"job_id": "job_a"})
    queue = open_queue("one")
    assert queue.take(0.05) is None, "the first look makes the group"
    delivery = queue.take(0.05)
    assert delivery is not None
    assert delivery.job_id == "job_a"


def test_an_empty_queue_answers_none_after_the_wait(open_queue: Open) -> None:
    queue = open_queue("one")
    queue.take(0.01)
    assert queue.take(0.05) is None


def test_every_job_goes_to_one_worker(open_queue: Open, client: "redis.Redis") -> None:
    one, two = open_queue("one"), open_queue("two")
    one.take(0.01)
    for job_id in ("job_a", "job_b"):
        client.xadd(STREAM, {"job_id": job_id})
    first, second = one.take(0.05), two.take(0.05)
    assert first is not None
    assert second is not None
    assert (first.job_id, second.job_id) == ("job_a", "job_b")
    assert one.take(0.01) is None


def test_an_acknowledged_job_is_pending_no_longer(open_queue: Open, client: "redis.Redis") -> None:
    queue = open_queue("one")
    queue.take(0.01)
    client.xadd(STREAM, {"job_id": "job_a"})
    delivery = queue.take(0.05)
    assert delivery is not None
    assert pending(client) == 1
    queue.acknowledge(delivery)
    assert pending(client) == 0


def test_jobs_of_a_dead_worker_are_taken_over_all_of_them(
    open_queue: Open, client: "redis.Redis", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue_module, "ORPHANED_AFTER_S", 0.0)
    dead, alive = open_queue("dead"), open_queue("alive")
    dead.take(0.01)
    for job_id in ("job_a", "job_b", "job_c"):
        client.xadd(STREAM, {"job_id": job_id})
    client.xreadgroup(GROUP, "dead", {STREAM: ">"}, count=3)
    taken = [alive.take(0.01) for _ in range(3)]
    assert [delivery and delivery.job_id for delivery in taken] == ["job_a", "job_b", "job_c"]


def test_a_worker_that_starts_again_takes_up_what_it_left_and_nobody_elses(
    open_queue: Open, client: "redis.Redis"
) -> None:
    one, two = open_queue("one"), open_queue("two")
    one.take(0.01)
    for job_id in ("job_a", "job_b"):
        client.xadd(STREAM, {"job_id": job_id})
    left, other = one.take(0.05), two.take(0.05)
    assert left is not None
    assert other is not None
    again = open_queue("one")
    assert again.take(0.01) == left
    assert again.take(0.01) is None
    again.acknowledge(left)
    assert open_queue("one").take(0.01) is None
    assert open_queue("two").take(0.01) == other


def test_a_name_lasts_as_long_as_the_folder_and_is_its_own(tmp_path: Path) -> None:
    name = lasting_name(tmp_path / "one")
    assert lasting_name(tmp_path / "one") == name
    assert lasting_name(tmp_path / "two") != name


def test_a_job_that_another_worker_just_took_is_left_alone(open_queue: Open, client: "redis.Redis") -> None:
    one, two = open_queue("one"), open_queue("two")
    one.take(0.01)
    client.xadd(STREAM, {"job_id": "job_a"})
    assert one.take(0.05) is not None
    assert two.take(0.01) is None


def test_trimmed_entries_do_not_hide_the_ones_behind_them(
    open_queue: Open, client: "redis.Redis", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue_module, "ORPHANED_AFTER_S", 0.0)
    queue = open_queue("alive")
    queue.take(0.01)
    entries = [client.xadd(STREAM, {"job_id": f"job_{n}"}) for n in range(3)]
    client.xreadgroup(GROUP, "dead", {STREAM: ">"}, count=3)
    client.xdel(STREAM, *entries[:2])
    delivery = queue.take(0.01)
    assert delivery is not None
    assert delivery.job_id == "job_2"


def test_an_entry_that_names_no_job_is_dropped(open_queue: Open, client: "redis.Redis") -> None:
    queue = open_queue("one")
    queue.take(0.01)
    client.xadd(STREAM, {"something": "else"})
    assert queue.take(0.05) is None
    assert pending(client) == 0


def test_a_flushed_redis_gets_its_group_again(open_queue: Open, client: "redis.Redis") -> None:
    queue = open_queue("one")
    queue.take(0.01)
    client.flushall()
    client.xadd(STREAM, {"job_id": "job_a"})
    assert queue.take(0.01) is None
    delivery = queue.take(0.05)
    assert delivery is not None
    assert delivery.job_id == "job_a"


def test_a_redis_that_is_away_raises_and_one_that_is_back_serves(open_queue: Open, redis_server: RedisProcess) -> None:
    queue = open_queue("one")
    queue.take(0.01)
    redis_server.stop()
    with pytest.raises(redis.RedisError):
        queue.take(0.01)
    redis_server.start()
    with redis.Redis.from_url(redis_server.url) as client:
        client.xadd(STREAM, {"job_id": "job_a"})
    assert queue.take(0.01) is None
    assert queue.take(0.05) is not None
