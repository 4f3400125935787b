"""Redis holds nothing that the database does not: emptied or gone at any moment, it delays and loses nothing."""

import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import psutil  # type: ignore[import-untyped] # its stubs are another package
import pytest
import redis

from chaos_federation import SITES, Federation
from chaos_templates import PROCESSES, Templates
from fedmkt_coordinator.queue import GROUP, JOBS
from real_servers import RedisProcess

pytestmark = [pytest.mark.services, pytest.mark.timeout(240)]
Opened = Callable[[Federation], Federation]

# The coordinator is halted there, and goes on when the deed is done.
POINTS = [
    "round.collecting.committed 1",
    "knowledge.accepted.committed 1",
    "round.distilling.committed 1",
    "jobs.published 1",
    "job.distill.running.committed 1",
    "round.applying.committed 1",
    "round.completed.committed 1",
]
WORKER_POINTS = ["worker.taken 1", "worker.claimed 1", "worker.training 1"]
DEEDS = ["flushed", "killed"]
GONE_S = 60.0


def do(deed: str, server: RedisProcess) -> None:
    """Both leave an empty Redis: this one keeps no file."""
    if deed == "flushed":
        server.flush()
    else:
        server.stop()
        server.start()


def cases(points: list[str], *shown: str) -> list[object]:
    return [
        pytest.param(deed, point, marks=() if f"{deed} {point}" in shown else pytest.mark.chaos)
        for point in points
        for deed in DEEDS
    ]


def play(federation: Federation, halted: str, fault: str, deed: Callable[[], None]) -> None:
    for name in PROCESSES:
        federation.start(name, f"stop {fault}" if name == halted else "")
    with ThreadPoolExecutor(1) as pool:
        request = pool.submit(federation.operator.request_rounds, federation.federation_id, 2)
        federation.until_halted(halted)
        deed()
        federation.go_on(halted)
        request.result()
    federation.until_finished(2, timeout_s=120)
    federation.audit(2)


@pytest.mark.parametrize(("deed", "point"), cases(POINTS, "flushed jobs.published 1"))
def test_redis_while_the_coordinator_is_at(templates: Templates, opened: Opened, deed: str, point: str) -> None:
    federation = opened(templates.ready("sqlite"))
    play(federation, "coordinator", point, lambda: do(deed, federation.redis))


@pytest.mark.parametrize(("deed", "point"), cases(WORKER_POINTS, "killed worker.claimed 1"))
def test_redis_while_the_llm_server_is_at(templates: Templates, opened: Opened, deed: str, point: str) -> None:
    federation = opened(templates.ready("sqlite"))
    play(federation, "worker", point, lambda: do(deed, federation.redis))


@pytest.mark.chaos
def test_a_claimed_job_is_done_although_redis_stays_away(templates: Templates, opened: Opened) -> None:
    """The claim counts, not the acknowledgement: nobody waits for Redis, or for the lease to lapse."""
    federation = opened(templates.ready("sqlite"))
    for name in PROCESSES:
        federation.start(name, "stop worker.claimed 1" if name == "worker" else "")
    federation.operator.request_rounds(federation.federation_id, 1)
    federation.until_halted("worker")
    federation.redis.stop()
    try:
        federation.go_on("worker")
        federation.until_finished(1)
        federation.audit(1)
    finally:
        federation.redis.start()
    attempts = [event.data["attempt"] for event in federation.events() if event.data.get("state") == "running"]
    assert attempts == [1, 1], "the map's job, then the round's"


@pytest.mark.chaos
def test_redis_gone_for_a_minute_delays_a_round(templates: Templates, opened: Opened) -> None:
    federation = opened(templates.ready("sqlite"))
    for name in PROCESSES:
        federation.start(name)
    federation.redis.stop()
    try:
        federation.operator.request_rounds(federation.federation_id, 2)
        federation.until(lambda: federation.rounds()[-1].state == "distilling", "the LLM server alone is awaited")
        time.sleep(GONE_S)
        assert [one.state for one in federation.rounds()] == ["distilling"]
    finally:
        federation.redis.start()
    federation.until_finished(2)
    federation.audit(2)


@pytest.mark.chaos
def test_entries_that_come_again_and_again_change_nothing(templates: Templates, opened: Opened) -> None:
    """Whatever the stream says twenty times, each job is claimed once."""
    federation = opened(templates.ready("sqlite"))
    for name in PROCESSES:
        federation.start(name, "stop round.distilling.committed 1" if name == "coordinator" else "")
    with ThreadPoolExecutor(1) as pool:
        request = pool.submit(federation.operator.request_rounds, federation.federation_id, 2)
        federation.until_halted("coordinator")
        federation.go_on("coordinator")
        request.result()
    jobs = {str(event.data["job_id"]) for event in federation.events() if event.kind == "job.state"}
    with redis.Redis.from_url(federation.redis.url) as client:
        for job_id in [*jobs, "job_of_nobody"] * 20:
            client.xadd(JOBS, {"job_id": job_id})
        client.xadd(JOBS, {"something": "else"})
        federation.until_finished(2)
        federation.audit(2)
        federation.until(lambda: client.xpending(JOBS, GROUP)["pending"] == 0, "all entries are acknowledged")
    claims = [event.data["attempt"] for event in federation.events() if event.data.get("state") == "running"]
    assert claims == [1, 1, 1]


@pytest.mark.chaos
@pytest.mark.parametrize("point", ["round.distilling.committed 1", "job.distill.running.committed 1"])
def test_the_embedded_redis_is_killed_while_the_coordinator_is_at(
    templates: Templates, opened: Opened, point: str
) -> None:
    federation = opened(templates.ready("sqlite"))
    federation.settings["REDIS_URL"] = None

    def kill() -> None:
        (server,) = psutil.Process(federation.running["coordinator"].pid).children()
        server.send_signal(signal.SIGKILL)

    play(federation, "coordinator", point, kill)


@pytest.mark.chaos
@pytest.mark.parametrize("point", ["round.distilling.committed 1", "jobs.published 1"])
def test_a_coordinator_with_an_embedded_redis_is_killed_with_it(
    templates: Templates, opened: Opened, point: str
) -> None:
    federation = opened(templates.ready("sqlite"))
    federation.settings["REDIS_URL"] = None
    for name in PROCESSES:
        federation.start(name, f"kill {point}" if name == "coordinator" else "")
    with ThreadPoolExecutor(1) as pool:
        request = pool.submit(federation.operator.request_rounds, federation.federation_id, 2)
        federation.until_killed("coordinator")
        federation.start("coordinator")
        request.result()
    federation.until_finished(2)
    federation.audit(2)
    assert {site.site for site in federation.rounds()[0].sites} == set(SITES)
