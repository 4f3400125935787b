"""The worker against a real coordinator and a real Redis: leases, failures, and everything that restarts."""

import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretStr
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fedmkt.client import CoordinatorClient, RetryPolicy, SiteKey, StaticToken
from fedmkt.errors import Refusal
from fedmkt.local_server import serve_in_thread
from fedmkt.protocol import (
    DistillResult,
    Event,
    JobFailure,
    JobView,
    LlmRegistration,
    MapJob,
    MapResult,
    ModelCard,
    SiteModel,
)
from fedmkt.signing import new_key
from fedmkt.stopping import StopFlag
from fedmkt.work_metrics import WorkMetrics
from fedmkt_llm_server.lease import JobAbandoned, Lease
from fedmkt_llm_server.maps import build_map
from fedmkt_llm_server.registration import Registrar
from fedmkt_llm_server.settings import Settings
from fedmkt_llm_server.status import Status, build_app
from fedmkt_llm_server.worker import Report, Worker
from live_coordinator import TOKENS, LiveCoordinator, stories, tiny_config, until
from real_servers import RedisProcess
from small_tokenizers import vocabulary

pytestmark = [pytest.mark.services, pytest.mark.timeout(60)]
CARD = ModelCard(model_id="tiny", architecture="llama", parameters=1000)
LLM, SITE = "byte_level", "sentencepiece"
Run = Callable[[JobView, Report], DistillResult | MapResult]


@dataclass
class Plant:
    """A coordinator on a Redis of its own, and workers that a test starts and stops."""

    coordinator: LiveCoordinator
    folder: Path
    workers: list[tuple[StopFlag, threading.Thread]] = field(default_factory=list)
    leases: list[Lease | None] = field(default_factory=list)
    opened: list[CoordinatorClient] = field(default_factory=list)

    def client(self, **more: Any) -> CoordinatorClient:
        retry = RetryPolicy(first_wait_s=0.02, max_wait_s=0.2, patience_s=more.pop("patience_s", 20.0))
        return CoordinatorClient(self.coordinator.url, StaticToken(TOKENS["worker"]), retry=retry, **more)

    def start(self, run: Run, name: str = "one") -> StopFlag:
        stop = StopFlag()
        client, heartbeats = self.client(wait=stop.wait), self.client(patience_s=0.3, timeout_s=2)
        self.opened += [client, heartbeats]
        worker = Worker(client, heartbeats, client.queue, run, name=name, stop=stop, on_job=self.leases.append)
        thread = threading.Thread(target=worker.run, daemon=True)
        thread.start()
        self.workers.append((stop, thread))
        return stop

    def end(self) -> None:
        for stop, _ in self.workers:
            stop.set()
        for _, thread in self.workers:
            thread.join(20)
            assert not thread.is_alive()
        for client in self.opened:
            client.close()

    def map_jobs(self, name: str = "tiny", site_vocabulary: str = SITE) -> str:
        """A federation with an LLM and one site, whose two vocabulary maps are to be built."""
        federation_id = self.coordinator.create(tiny_config(("north",), name=name), stories(0, 20))
        with self.client() as worker:
            artifact = worker.put_artifact(vocabulary(LLM).to_bytes())
            worker.register_llm(federation_id, LlmRegistration(vocabulary=artifact, model=CARD))
        key = new_key()
        token = self.coordinator.enrolment_token(federation_id, "north")
        with CoordinatorClient(self.coordinator.url) as anyone:
            site_id = anyone.enrol(token, key).site_id
        with CoordinatorClient(self.coordinator.url, SiteKey(site_id, key)) as site:
            site.put_vocabulary(vocabulary(site_vocabulary).to_bytes())
            site.put_model(SiteModel(model=CARD, private_samples=5))
        return federation_id

    def build(self, job: JobView, report: Report) -> MapResult:
        """A run that does map jobs as the LLM server does."""
        assert isinstance(job.payload, MapJob)
        folder = self.folder / f"artifacts of {threading.get_ident()}"  # each server has its own
        with self.client() as client:
            return build_map(
                job.payload,
                lambda digest: client.fetch_artifact(digest, folder).read_bytes(),
                client.put_artifact,
                report,
            )

    def job_events(self, federation_id: str, state: str | None = None) -> list[Event]:
        with self.coordinator.client() as operator:
            events = operator.events(federation_id).items
        return [e for e in events if e.kind == "job.state" and state in (None, e.data["state"])]

    def until_built(self, federation_id: str, timeout_s: float = 30) -> None:
        until(lambda: len(self.job_events(federation_id, "done")) == 2, timeout_s)


@pytest.fixture
def plant(redis_server: RedisProcess, tmp_path: Path) -> Iterator[Plant]:
    coordinator = LiveCoordinator(tmp_path / "coordinator", redis_url=redis_server.url, lease_s=2.0)
    coordinator.start()
    made = Plant(coordinator, tmp_path)
    yield made
    made.end()
    coordinator.stop()


def attempts(events: list[Event]) -> list[Any]:
    return [event.data["attempt"] for event in events]


# ------------------------------------------------------------------------------------------------------ jobs go well


def test_two_workers_share_the_jobs_and_every_job_is_done_once(plant: Plant) -> None:
    for name in ("one", "two"):
        plant.start(plant.build, name)
    federation_id = plant.map_jobs()
    plant.until_built(federation_id)
    assert [event.data["reason"] for event in plant.job_events(federation_id, "queued")] == [None, None]
    assert attempts(plant.job_events(federation_id, "running")) == [1, 1]
    assert plant.leases.count(None) == 2


def test_jobs_queued_before_any_worker_came_are_done(plant: Plant) -> None:
    federation_id = plant.map_jobs()
    plant.start(plant.build)
    plant.until_built(federation_id)


def test_a_job_longer_than_its_lease_keeps_it_and_tells_how_far_it_is(plant: Plant) -> None:
    began = threading.Event()

    def slow(job: JobView, report: Report) -> MapResult:
        if not began.is_set():
            began.set()
            for second in range(30):
                report("thinking", second, 30)
                time.sleep(0.1)
        return plant.build(job, report)

    federation_id = plant.map_jobs()
    plant.start(slow)
    plant.until_built(federation_id)
    assert attempts(plant.job_events(federation_id, "running")) == [1, 1]


# ------------------------------------------------------------------------------------------------------ jobs go wrong


class Broken(Refusal):
    status = 422
    code = "test.broken"


def failing(errors: list[Exception], plant: Plant) -> Run:
    """Raises the given errors first, then does the work."""

    def run(job: JobView, report: Report) -> MapResult:
        if errors:
            raise errors.pop(0)
        return plant.build(job, report)

    return run


def test_an_attempt_that_fails_is_tried_again(plant: Plant) -> None:
    federation_id = plant.map_jobs()
    plant.start(failing([ValueError("out of luck")], plant))
    plant.until_built(federation_id)
    queued = plant.job_events(federation_id, "queued")
    assert [event.data["reason"] for event in queued] == [None, None, "ValueError: out of luck"]


def test_a_refusal_is_not_tried_again_and_its_reason_is_told(plant: Plant) -> None:
    federation_id = plant.map_jobs()
    plant.start(failing([Broken("5 is not 6, send 6")], plant))
    until(lambda: len(plant.job_events(federation_id, "failed")) == 1)
    (failed,) = plant.job_events(federation_id, "failed")
    assert (failed.data["attempt"], failed.data["reason"]) == (1, "test.broken: 5 is not 6, send 6")


def test_a_worker_that_is_stopped_gives_its_job_back_at_once(plant: Plant) -> None:
    began = threading.Event()

    def endless(job: JobView, report: Report) -> MapResult:
        began.set()
        while True:
            report("waiting", 0, 0)
            time.sleep(0.02)

    federation_id = plant.map_jobs()
    stop = plant.start(endless, "one")
    assert began.wait(20)
    stop.set()
    plant.start(plant.build, "two")
    plant.until_built(federation_id)
    reasons = [event.data["reason"] for event in plant.job_events(federation_id, "queued")]
    assert "the LLM server is shutting down" in reasons


def test_a_worker_that_lost_its_lease_stops_within_a_step(plant: Plant) -> None:
    """It could not be heard for longer than the lease, as behind a broken line; meanwhile another one had the job."""
    federation_id = plant.map_jobs()
    with plant.client() as client:
        until(lambda: len(plant.job_events(federation_id, "queued")) == 2)
        job_id = str(plant.job_events(federation_id, "queued")[0].data["job_id"])
        job = client.claim(job_id)
        until(lambda: client_sees_requeue(plant, federation_id))
        second = client.claim(job_id)
        assert second.attempt == 2
        with Lease(client, job, StopFlag()) as lease, pytest.raises(JobAbandoned, match=r"attempt 1 of job .* is over"):
            work_until_stopped(lease)
        assert lease.progress.done < 400


def test_a_job_that_nobody_waits_for_any_more_is_dropped(plant: Plant) -> None:
    """As when an operator cancels the round: the coordinator ends the job, and the next heartbeat says so."""
    federation_id = plant.map_jobs()
    until(lambda: len(plant.job_events(federation_id, "queued")) == 2)
    with plant.client() as client:
        job = client.claim(str(plant.job_events(federation_id, "queued")[0].data["job_id"]))
        client.fail_job(job.job_id, JobFailure(attempt=1, reason="the round was ended", retry=False))
        with Lease(client, job, StopFlag()) as lease, pytest.raises(JobAbandoned, match="cancelled"):
            work_until_stopped(lease)


def work_until_stopped(lease: Lease) -> None:
    for step in range(500):
        lease.report("working", step, 500)
        time.sleep(0.01)


def client_sees_requeue(plant: Plant, federation_id: str) -> bool:
    return any("silent" in str(event.data["reason"]) for event in plant.job_events(federation_id, "queued"))


# ------------------------------------------------------------------------------------------------- others go and come


def test_a_redis_that_restarts_empty_loses_no_job(plant: Plant, redis_server: RedisProcess) -> None:
    federation_id = plant.map_jobs()
    until(lambda: len(plant.job_events(federation_id, "queued")) == 2)
    redis_server.stop()
    redis_server.start()
    plant.start(plant.build)
    plant.until_built(federation_id)


def test_a_worker_finds_a_redis_that_restarted_under_it(plant: Plant, redis_server: RedisProcess) -> None:
    plant.start(plant.build)
    plant.until_built(plant.map_jobs("before"))
    redis_server.stop()
    redis_server.start()
    plant.until_built(plant.map_jobs("after", "byte_level_small"))


def test_jobs_wait_for_a_redis_that_is_away(plant: Plant, redis_server: RedisProcess) -> None:
    redis_server.stop()
    federation_id = plant.map_jobs()
    plant.start(plant.build)
    time.sleep(0.5)
    redis_server.start()
    plant.until_built(federation_id)


def test_a_coordinator_that_restarts_during_a_job_gets_the_result(plant: Plant) -> None:
    restarted = threading.Event()

    def run(job: JobView, report: Report) -> MapResult:
        result = plant.build(job, report)
        if not restarted.is_set():
            restarted.set()
            plant.coordinator.stop()
            threading.Timer(0.5, plant.coordinator.start).start()
        return result

    federation_id = plant.map_jobs()
    plant.start(run)
    assert restarted.wait(20)
    time.sleep(0.6)
    plant.until_built(federation_id)


class AtFirstClaim:
    """ASGI middleware: what a test wants to happen around the first claim that comes, instead of the plain answer."""

    def __init__(self, app: ASGIApp, around: Callable[[ASGIApp, Scope, Receive, Send], Awaitable[None]]) -> None:
        self._app, self._around = app, around
        self._done = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if str(scope.get("path")).endswith("/claim") and not self._done:
            self._done = True
            await self._around(self._app, scope, receive, send)
        else:
            await self._app(scope, receive, send)


def around_first_claim(plant: Plant, around: Callable[[ASGIApp, Scope, Receive, Send], Awaitable[None]]) -> None:
    plant.coordinator.stop()
    plant.coordinator.middleware = lambda app: app.add_middleware(AtFirstClaim, around=around)
    plant.coordinator.start()


def test_a_claim_whose_answer_was_lost_is_repeated_and_costs_no_attempt(plant: Plant) -> None:
    async def lose(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        async def nowhere(message: Message) -> None:
            pass

        await app(scope, receive, nowhere)  # claimed and committed; the connection breaks before the answer

    around_first_claim(plant, lose)
    plant.start(plant.build)
    federation_id = plant.map_jobs()
    plant.until_built(federation_id)
    assert attempts(plant.job_events(federation_id, "running")) == [1, 1]


def test_a_claimed_job_is_done_although_redis_goes_before_it_is_acknowledged(
    plant: Plant, redis_server: RedisProcess
) -> None:
    async def claim_and_stop(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        async def then_stop(message: Message) -> None:
            redis_server.stop()
            await send(message)

        await app(scope, receive, then_stop)

    around_first_claim(plant, claim_and_stop)
    plant.start(plant.build)
    federation_id = plant.map_jobs()
    until(lambda: len(plant.job_events(federation_id, "done")) == 1)
    redis_server.start()
    plant.until_built(federation_id, timeout_s=40)
    assert attempts(plant.job_events(federation_id, "running")) == [1, 1]


def test_a_claim_that_is_refused_for_another_reason_keeps_its_entry(plant: Plant) -> None:
    """As when a credential is being replaced: an entry that is acknowledged then would be missed for ten minutes."""

    async def refuse(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        problem = {"type": "about:blank", "title": "no", "status": 403, "code": "access.refused", "detail": "not now"}
        await JSONResponse(problem, 403, media_type="application/problem+json")(scope, receive, send)

    around_first_claim(plant, refuse)
    plant.start(plant.build)
    plant.until_built(plant.map_jobs())


# ------------------------------------------------------------------------------------------------------- registration


def test_every_federation_without_an_llm_gets_this_one_and_no_other_is_touched(
    plant: Plant, caplog: pytest.LogCaptureFixture
) -> None:
    taken = plant.map_jobs("taken")
    free = plant.coordinator.create(tiny_config(("north",), name="free"), stories(0, 20))
    with plant.client() as client:
        registrar = Registrar(client, vocabulary(SITE), CARD.model_copy(update={"model_id": "mine"}), StopFlag())
        registrar.register_new()
        registrar.register_new()
    with plant.coordinator.client() as operator:
        views = {name: operator.federation(each) for name, each in (("taken", taken), ("free", free))}
    assert views["taken"].llm == CARD
    assert views["free"].llm is not None
    assert views["free"].llm.model_id == "mine"
    assert views["free"].llm_vocabulary == vocabulary(SITE).fingerprint
    assert [record.message for record in caplog.records].count("llm.another_is_registered") == 1


def test_registration_goes_on_when_a_coordinator_comes_back(plant: Plant) -> None:
    plant.coordinator.stop()
    stop = StopFlag()
    with plant.client(patience_s=0.1) as client:
        thread = threading.Thread(target=Registrar(client, vocabulary(LLM), CARD, stop).run, args=(0.05,))
        thread.start()
        time.sleep(0.5)
        plant.coordinator.start()
        federation_id = plant.coordinator.create(tiny_config(("north",), name="late"), stories(0, 20))
        with plant.coordinator.client() as operator:
            until(lambda: operator.federation(federation_id).llm == CARD)
        stop.set()
        thread.join(20)
        assert not thread.is_alive()


# -------------------------------------------------------------------------------------------------- settings, status


def test_the_worker_credential_is_given_once_and_not_shown(tmp_path: Path) -> None:
    common: dict[str, Any] = {"coordinator_url": "http://c", "model": "m"}
    (tmp_path / "token").write_text(" s3cret\n")
    assert Settings(**common, worker_token_file=tmp_path / "token").token() == "s3cret"
    direct = Settings(**common, worker_token=SecretStr("s3cret"))
    assert direct.token() == "s3cret"
    assert "s3cret" not in repr(direct)
    for both in ({}, {"worker_token": "a", "worker_token_file": tmp_path / "token"}):
        with pytest.raises(ValueError, match="give the worker credential once"):
            Settings(**common, **both)  # type: ignore[arg-type]  # none, or both


def test_the_status_pages_show_the_model_and_the_job(plant: Plant) -> None:
    federation_id = plant.map_jobs()
    until(lambda: len(plant.job_events(federation_id, "queued")) == 2)
    status = Status(CARD)
    loaded: list[Status] = []
    app = build_app(lambda: loaded[0].view if loaded else None, WorkMetrics("llm-server"))
    with serve_in_thread(app) as port, plant.client() as client:
        url = f"http://127.0.0.1:{port}"
        assert httpx.get(f"{url}/healthz").json() == {"status": "ok"}
        assert httpx.get(f"{url}/readyz").status_code == 503
        loaded.append(status)
        assert httpx.get(f"{url}/readyz").json() == {"status": "ok", "model": "tiny", "device": "cpu"}
        job = client.claim(str(plant.job_events(federation_id, "queued")[0].data["job_id"]))
        with Lease(client, job, StopFlag()) as lease:
            status.on_job(lease)
            lease.report("mapping", 0, 9)
            time.sleep(0.05)
            lease.report("mapping", 3, 9)
            shown = httpx.get(f"{url}/status").json()
            assert shown["job"]["job_id"] == job.job_id
            assert shown["job"]["kind"] == "vocabulary_map"
            seconds_left = shown["job"]["progress"].pop("seconds_left")
            assert 0.1 <= seconds_left < 60, "six are left, and three took 0.05 s or more"
            assert shown["job"]["progress"] == {"step": "mapping", "done": 3, "total": 9}
            status.on_job(None)
        assert httpx.get(f"{url}/status").json()["jobs_ended"] == 1
