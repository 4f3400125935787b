"""PostgreSQL killed and started again, or cutting connections: requests are put off, what was acknowledged stays."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from chaos_federation import COORDINATORS, LEASE_S, Federation
from chaos_templates import PROCESSES, Templates
from coordinator_world import TOKENS
from fedmkt.signing import new_key, public_hex
from real_servers import PostgresProcess

pytestmark = [pytest.mark.services, pytest.mark.timeout(240)]
Opened = Callable[[Federation], Federation]
DATABASE = "postgresql to kill"

# The coordinator is halted there, most often in the middle of a transaction, and goes on when the deed is done.
POINTS = [
    "rounds.requested.uncommitted 1",
    "round.collecting.committed 1",
    "upload.announced.uncommitted 1",
    "upload.chunk.uncommitted 2",
    "knowledge.accepted.uncommitted 1",
    "knowledge.accepted.committed 1",
    "round.distilling.uncommitted 1",
    "round.distilling.committed 1",
    "job.distill.running.uncommitted 1",
    "job.distill.done.uncommitted 1",
    "job.distill.done.committed 1",
    "site.applied.uncommitted 1",
    "round.completed.uncommitted 1",
    "keeper.looked 3",
]
DEEDS = ["killed", "cut"]
CUT = {"killed knowledge.accepted.uncommitted 1", "cut job.distill.done.uncommitted 1"}


@pytest.fixture
def postgres(chaos_postgres: PostgresProcess) -> Iterator[PostgresProcess]:
    yield chaos_postgres
    chaos_postgres.kill()
    chaos_postgres.start()  # whatever became of this test, the next one finds it


def cases() -> list[object]:
    return [
        pytest.param(deed, point, marks=() if f"{deed} {point}" in CUT else pytest.mark.chaos)
        for point in POINTS
        for deed in DEEDS
    ]


def asked(federation: Federation, url: str) -> list[httpx.Response]:
    """Something of every kind: reads, polls, writes, tokens; as somebody, and as nobody."""
    here = f"/v1/federations/{federation.federation_id}"
    operator = {"Authorization": f"Bearer {TOKENS['operator']}"}
    with httpx.Client(base_url=url, timeout=30) as client:
        return [
            client.get("/v1/federations", headers=operator),
            client.get(here, headers={**operator, "If-None-Match": '"something"'}),
            client.get(f"{here}/events", headers=operator),
            client.get(f"{here}/events/stream", headers=operator),
            client.post(f"{here}/rounds", headers=operator, json={"count": 1}),
            client.post("/v1/federations", headers=operator, json=federation.config().model_dump(mode="json")),
            client.post("/v1/enrol", json={"token": "t" * 43, "public_key": public_hex(new_key())}),
            client.get("/metrics", headers=operator),
        ]


def assert_put_off(federation: Federation, url: str) -> None:
    """Everything that needs the database says so, and when to come again; what does not is answered."""
    for answer in asked(federation, url):
        about = f"{answer.request.method} {answer.request.url.path}: {answer.status_code} {answer.text[:300]}"
        assert (answer.status_code, answer.json()["code"]) == (503, "database.unavailable"), about
        assert answer.headers["Retry-After"] == "2", about
        assert "nothing is lost" in answer.json()["detail"]
    ready = httpx.get(f"{url}/readyz", timeout=30)
    assert (ready.status_code, ready.json()["status"]) == (503, "unavailable")
    assert "see that PostgreSQL runs" in ready.json()["checks"]["database"]
    assert [name for name, said in ready.json()["checks"].items() if said != "ok"] == ["database"]
    assert httpx.get(f"{url}/healthz").status_code == 200


def audit(federation: Federation, rounds: int) -> None:
    federation.audit(rounds)
    logs = {log.name: log.read_text() for log in (federation.folder / "logs").iterdir()}
    assert [name for name, log in logs.items() if "request.failed" in log or " 500 " in log] == []


def own_url(federation: Federation, name: str) -> str:
    return f"http://127.0.0.1:{federation.ports[name]}"


@pytest.mark.parametrize(("deed", "point"), cases())
def test_postgresql_while_the_coordinator_is_at(
    templates: Templates, opened: Opened, postgres: PostgresProcess, deed: str, point: str
) -> None:
    federation = opened(templates.ready(DATABASE))
    for name in PROCESSES:
        federation.start(name, f"stop {point}" if name == "coordinator" else "")
    with ThreadPoolExecutor(1) as pool:
        request = pool.submit(federation.operator.request_rounds, federation.federation_id, 2)
        federation.until_halted("coordinator")
        if deed == "killed":
            postgres.kill()
            federation.go_on("coordinator")
            assert_put_off(federation, federation.url)
            postgres.start()
        else:
            assert postgres.break_connections() > 0
            federation.go_on("coordinator")
        assert request.result().rounds_requested == 2
    federation.until_finished(2)
    audit(federation, 2)


def test_postgresql_is_killed_under_two_replicas(
    templates: Templates, opened: Opened, postgres: PostgresProcess
) -> None:
    """Both put off whoever asks, and both serve again; the job that was running is not taken for abandoned."""
    pair = opened(templates.ready(DATABASE, replicas=2))
    for name in (*COORDINATORS, *PROCESSES[1:]):
        pair.start(name, "stop worker.training 1" if name == "worker" else "")
    for name in COORDINATORS:
        pair.until_answers(name)
    pair.operator.request_rounds(pair.federation_id, 2)
    pair.until_halted("worker")
    postgres.kill()
    ends = time.monotonic() + LEASE_S
    pair.go_on("worker")
    while time.monotonic() < ends:  # longer than any lease: nobody could say that the job goes on
        for name in COORDINATORS:
            assert_put_off(pair, own_url(pair, name))
    postgres.start()
    pair.until_finished(2)
    audit(pair, 2)
    attempts = [event.data["attempt"] for event in pair.events() if event.data.get("state") == "running"]
    assert attempts == [1, 1, 1], "the map's job, then each round's"


@pytest.mark.chaos
def test_postgresql_is_killed_again_and_again(templates: Templates, opened: Opened, postgres: PostgresProcess) -> None:
    pair = opened(templates.ready(DATABASE, replicas=2))
    for name in (*COORDINATORS, *PROCESSES[1:]):
        pair.start(name)
    for name in COORDINATORS:
        pair.until_answers(name)
    pair.operator.request_rounds(pair.federation_id, 5)
    for number in range(1, 6):
        pair.until(lambda number=number: len(pair.rounds()) >= number, f"round {number} has begun")  # type: ignore[misc]  # bound now
        postgres.kill()
        postgres.start()
    pair.until_finished(5)
    audit(pair, 5)
