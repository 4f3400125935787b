"""SIGKILL at every fault point: what is started again finishes every round, once, and has lost nothing."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from _pytest.mark import ParameterSet

from chaos_federation import SITES, Federation
from chaos_templates import PROCESSES, Templates

pytestmark = [pytest.mark.services, pytest.mark.timeout(180)]
Opened = Callable[[Federation], Federation]

# Where a round can be when its coordinator dies: both sides of every commit, and the steps between. The number says
# which time counts: the first artifact is an upload's, the sixth one of the LLM server's.
COORDINATOR = [
    "rounds.requested.uncommitted 1",
    "rounds.requested.committed 1",
    "round.collecting.committed 2",
    "upload.announced.uncommitted 1",
    "upload.announced.committed 1",
    "upload.chunk.uncommitted 2",
    "upload.chunk.committed 2",
    "artifact.drafted 1",
    "upload.artifact.stored 1",
    "knowledge.accepted.uncommitted 1",
    "knowledge.accepted.committed 1",
    "upload.chunks.dropped 1",
    "adapter.accepted.uncommitted 1",
    "adapter.accepted.committed 1",
    "round.distilling.uncommitted 1",
    "round.distilling.committed 1",
    "jobs.published 1",
    "federations.woken 1",
    "job.distill.running.uncommitted 1",
    "job.distill.running.committed 1",
    "job.heartbeat.committed 1",
    "llm.progress.uncommitted 1",
    "artifact.drafted 6",
    "artifact.stored 6",
    "job.distill.done.uncommitted 1",
    "job.distill.done.committed 1",
    "site.applied.uncommitted 1",
    "site.applied.committed 1",
    "round.completed.uncommitted 1",
    "round.completed.committed 1",
    "keeper.looked 3",
]
# From an empty database on: founding, enrolling, registering, the first vocabulary map.
BEGINNINGS = [
    "federation.created.committed 1",
    "public_set.stored.uncommitted 1",
    "public_set.stored.committed 1",
    "site.enrolled.uncommitted 1",
    "site.enrolled.committed 1",
    "llm.registered.uncommitted 1",
    "llm.registered.committed 1",
    "job.vocabulary_map.queued.committed 1",
    "job.vocabulary_map.running.committed 1",
    "job.vocabulary_map.done.uncommitted 1",
    "job.vocabulary_map.done.committed 1",
]
WORKER = [
    "worker.taken 1",
    "worker.claimed 1",
    "worker.training 2",
    "worker.published 1",
    "worker.finished 1",
    "worker.completed 1",
]
# The coordinator is halted there, the sites are killed, and it goes on without them until they are back.
SITES_GONE = [
    "upload.announced.committed 1",
    "upload.chunk.committed 1",
    "knowledge.accepted.committed 1",
    "adapter.accepted.committed 2",
    "round.applying.committed 1",
    "site.applied.committed 1",
]
CUT = {
    "coordinator": {
        "upload.chunk.uncommitted 2",
        "knowledge.accepted.committed 1",
        "round.distilling.committed 1",
        "job.distill.running.committed 1",
        "job.distill.done.uncommitted 1",
        "site.applied.committed 1",
    },
    "postgresql": {"round.distilling.committed 1", "job.distill.done.committed 1"},
    "worker": {"worker.claimed 1", "worker.training 2"},
}


def cases(points: list[str], *cut: str) -> list[ParameterSet]:
    """`make test` plays the points that a cut of these names holds; the rest is for `make chaos`."""
    shown = set().union(*(CUT[name] for name in cut))
    return [pytest.param(point, marks=() if point in shown else pytest.mark.chaos) for point in points]


def play(federation: Federation, victim: str, fault: str, rounds: int = 2) -> None:
    """Ask for rounds with `fault` armed in `victim`; start it again when it is dead; wait for the rounds, and audit."""
    for name in PROCESSES:
        federation.start(name, f"kill {fault}" if name == victim else "")
    with ThreadPoolExecutor(1) as pool:
        request = pool.submit(federation.operator.request_rounds, federation.federation_id, rounds)
        federation.until_killed(victim)
        federation.start(victim)
        assert request.result().rounds_requested == rounds
    federation.until_finished(rounds)
    federation.audit(rounds)


@pytest.mark.parametrize("point", cases(COORDINATOR, "coordinator"))
def test_coordinator_on_sqlite_is_killed_at(templates: Templates, opened: Opened, point: str) -> None:
    play(opened(templates.ready("sqlite")), "coordinator", point)


@pytest.mark.parametrize("point", cases(COORDINATOR, "postgresql"))
def test_coordinator_on_postgresql_is_killed_at(templates: Templates, opened: Opened, point: str) -> None:
    play(opened(templates.ready("postgresql")), "coordinator", point)


@pytest.mark.parametrize("point", cases(BEGINNINGS))
def test_coordinator_of_a_new_federation_is_killed_at(templates: Templates, opened: Opened, point: str) -> None:
    federation = opened(templates.new("sqlite"))
    federation.start("coordinator", f"kill {point}")
    with ThreadPoolExecutor(1) as pool:
        founded = pool.submit(found_and_join, federation)
        federation.until_killed("coordinator")
        federation.start("coordinator")
        founded.result()
    federation.until_ready()
    federation.operator.request_rounds(federation.federation_id, 1)
    federation.until_finished(1)
    federation.audit(1)


def found_and_join(federation: Federation) -> None:
    federation.found()
    for name in PROCESSES[1:]:
        federation.start(name)


@pytest.mark.parametrize("point", cases(WORKER, "worker"))
def test_llm_server_is_killed_at(templates: Templates, opened: Opened, point: str) -> None:
    play(opened(templates.ready("sqlite")), "worker", point)


@pytest.mark.parametrize("point", cases(SITES_GONE))
def test_sites_are_killed_when_the_coordinator_is_at(templates: Templates, opened: Opened, point: str) -> None:
    federation = opened(templates.ready("sqlite"))
    for name in PROCESSES:
        federation.start(name, f"stop {point}" if name == "coordinator" else "")
    with ThreadPoolExecutor(1) as pool:
        request = pool.submit(federation.operator.request_rounds, federation.federation_id, 2)
        federation.until_halted("coordinator")
        for name in SITES:
            federation.kill(name)
        federation.go_on("coordinator")
        request.result()
    for name in SITES:
        federation.start(name)
    federation.until_finished(2)
    federation.audit(2, sites_killed=True)


def test_a_claim_that_was_answered_to_a_killed_worker_costs_no_attempt(templates: Templates, opened: Opened) -> None:
    """The next process of the same worker claims with the same key: the same attempt goes on, at once."""
    federation = opened(templates.ready("sqlite"))
    play(federation, "worker", "worker.claimed 1", rounds=1)
    attempts = [event.data["attempt"] for event in federation.events() if event.data.get("state") == "running"]
    assert attempts == [1, 1], "the map's job, then the round's"
