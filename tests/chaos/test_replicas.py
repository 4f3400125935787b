"""Two coordinators at once on one PostgreSQL, Redis and folder of artifacts, behind a balancer; one is killed."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from chaos_federation import COORDINATORS, Federation
from chaos_templates import PROCESSES, Templates

pytestmark = [pytest.mark.services, pytest.mark.timeout(180)]
Opened = Callable[[Federation], Federation]

POINTS = [
    "upload.chunk.uncommitted 1",
    "knowledge.accepted.committed 1",
    "round.distilling.committed 1",
    "job.distill.running.committed 1",
    "job.distill.done.uncommitted 1",
    "round.applying.committed 1",
    "site.applied.uncommitted 1",
    "round.completed.committed 1",
]
CUT = {"round.distilling.committed 1"}


@pytest.fixture
def pair(templates: Templates, opened: Opened) -> Federation:
    return opened(templates.ready("postgresql", replicas=2))


@pytest.mark.parametrize(
    "point", [pytest.param(point, marks=() if point in CUT else pytest.mark.chaos) for point in POINTS]
)
def test_one_replica_is_killed_at_a_point_and_the_other_takes_over(pair: Federation, point: str) -> None:
    """All requests go to the one that dies; then to the other, which finishes what it finds; at last both serve."""
    assert pair.balancer is not None
    first, second = COORDINATORS
    pair.balancer.prefer = pair.ports[first]
    pair.start(first, f"kill {point}")
    pair.until_answers(first)
    for name in (second, *PROCESSES[1:]):
        pair.start(name)
    with ThreadPoolExecutor(1) as pool:
        request = pool.submit(pair.operator.request_rounds, pair.federation_id, 2)
        pair.until_killed(first)
        request.result()
    pair.until_finished(2)
    pair.balancer.prefer = None
    pair.start(first)
    pair.until_answers(first)
    pair.operator.request_rounds(pair.federation_id, 1)
    pair.until_finished(3)
    pair.audit(3)
    assert all(count > 0 for count in pair.balancer.served.values())


@pytest.mark.chaos
def test_requests_go_to_either_while_both_are_killed_in_turn(pair: Federation) -> None:
    assert pair.balancer is not None
    for name in (*COORDINATORS, *PROCESSES[1:]):
        pair.start(name)
        if name in COORDINATORS:
            pair.until_answers(name)
    pair.operator.request_rounds(pair.federation_id, 4)
    for number, name in enumerate((*COORDINATORS, *COORDINATORS), start=1):
        pair.until(lambda number=number: len(pair.rounds()) >= number, f"round {number} has begun")  # type: ignore[misc]  # bound now
        pair.kill(name)
        pair.start(name)
        pair.until_answers(name)
    pair.until_finished(4)
    pair.audit(4)
    assert all(count > 0 for count in pair.balancer.served.values())
