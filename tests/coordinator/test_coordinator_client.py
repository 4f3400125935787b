"""The project's own client and the coordinator understand each other: a whole round through `fedmkt.client`."""

import ast
import asyncio
import re
from datetime import UTC, datetime
from pathlib import Path

import pytest

import fedmkt.client
from coordinator_world import CARD, PUBLIC_SET, TOKENS, World, a_report, config, served
from fedmkt.client import CoordinatorClient, CoordinatorProblem, SiteKey, StaticToken
from fedmkt.protocol import (
    Apply,
    DistillJob,
    Heartbeat,
    JobCompletion,
    JobView,
    LlmProgress,
    LlmRegistration,
    MapResult,
    Schedule,
    SiteModel,
    TrainAndUpload,
    UploadReceipt,
)
from fedmkt.signing import new_key
from fedmkt_coordinator.app import create_app
from fedmkt_coordinator.settings import Settings
from small_tokenizers import vocabulary

pytestmark = [pytest.mark.anyio, pytest.mark.services]


ONE_SITE = config(sites=("north",), schedule=Schedule(quorum=1))


class Parties:
    """Operator, worker and one site, as their programs would act; everything here blocks."""

    def __init__(self, url: str, world: World, folder: Path) -> None:
        self.url, self.world, self.folder = url, world, folder
        self.operator = CoordinatorClient(url, StaticToken(TOKENS["operator"]))
        self.worker = CoordinatorClient(url, StaticToken(TOKENS["worker"]))
        self.key = new_key()

    def set_up(self) -> str:
        self.operator.check_version()
        federation_id = self.operator.create_federation(ONE_SITE).federation_id
        assert self.operator.put_public_set(federation_id, PUBLIC_SET).samples == 12
        assert [each.federation_id for each in self.operator.federations()] == [federation_id]
        artifact = self.worker.put_artifact(vocabulary("byte_level").to_bytes())
        view = self.worker.register_llm(federation_id, LlmRegistration(vocabulary=artifact, model=CARD))
        assert view.llm == CARD
        token = self.operator.issue_enrolment_token(federation_id, "north").token
        with CoordinatorClient(self.url) as stranger:
            enrolled = stranger.enrol(token, self.key)
        self.site = CoordinatorClient(self.url, SiteKey(enrolled.site_id, self.key))
        receipt = self.site.put_vocabulary(vocabulary("byte_level_small").to_bytes())
        assert receipt.fingerprint == vocabulary("byte_level_small").fingerprint
        self.site.put_model(SiteModel(model=CARD, private_samples=5))
        assert self.operator.request_rounds(federation_id).rounds_requested == 1
        return federation_id

    def build_maps(self, job_ids: list[str]) -> None:
        for job_id in job_ids:
            job = self.worker.claim(job_id)
            artifact = self.worker.put_artifact(f"map of {job_id}".encode())
            self.worker.complete_job(job_id, JobCompletion(attempt=job.attempt, result=MapResult(artifact=artifact)))

    def upload(self, blob: bytes, round_id: str) -> UploadReceipt:
        task = self.site.next_task(wait_s=5).task
        assert isinstance(task, TrainAndUpload)
        assert task.round_id == round_id
        return self.site.upload("knowledge", round_id, blob, self.key, self.site.keys().public_keys)

    def begin_distilling(self, job_id: str) -> JobView:
        assert self.worker.queue().stream == "fedmkt:jobs"
        job = self.worker.claim(job_id)
        assert isinstance(job.payload, DistillJob)
        progress = LlmProgress(step="training", done=1, total=2)
        assert not self.worker.heartbeat(job_id, Heartbeat(attempt=1, progress=progress)).cancelled
        return job

    def apply(self) -> None:
        task = self.site.next_task(wait_s=5).task
        assert isinstance(task, Apply)
        knowledge = self.site.fetch_artifact(task.knowledge, self.folder)
        assert knowledge.read_bytes() == b"knowledge of round 1"
        part = self.folder / f"{task.llm_vocabulary_artifact}.part"
        part.write_bytes(vocabulary("byte_level").to_bytes()[:1000])  # an earlier download broke off there
        whole = self.site.fetch_artifact(task.llm_vocabulary_artifact, self.folder)
        assert whole.read_bytes() == vocabulary("byte_level").to_bytes()
        self.site.report(task.round_id, a_report())
        self.site.report(task.round_id, a_report())

    def look(self, federation_id: str, round_id: str) -> None:
        assert self.operator.round(round_id).state == "completed"
        assert [each.number for each in self.operator.rounds(federation_id).items] == [1]
        assert [each.version for each in self.operator.adapters(federation_id).items] == [1, 0]
        assert self.operator.events(federation_id).items[0].kind == "federation.created"
        me = self.site.me()
        assert (me.site.state, me.federation_id) == ("ready", federation_id)
        with pytest.raises(CoordinatorProblem, match="is completed") as refusal:
            self.operator.cancel_round(round_id)
        assert refusal.value.problem.code == "round.over"

    def close(self) -> None:
        for client in (self.operator, self.worker, self.site):
            client.close()


async def test_a_whole_round_through_the_client(world: World, tmp_path: Path) -> None:
    world.clock.now = datetime.now(UTC)  # the client signs its assertions with the real time
    async with served(world) as url, asyncio.timeout(60):
        parties = Parties(url, world, tmp_path)
        world.federation_id = await asyncio.to_thread(parties.set_up)
        await asyncio.to_thread(parties.build_maps, await world.queued())
        view = await world.round()
        world.config = ONE_SITE
        site = await world.as_site("north", parties.key)
        receipt = await asyncio.to_thread(parties.upload, world.blob(site, view), view.round_id)
        assert receipt.site == "north"
        job = await asyncio.to_thread(parties.begin_distilling, (await world.queued())[0])
        await world.complete(job, await world.result(1))
        await asyncio.to_thread(parties.apply)
        await asyncio.to_thread(parties.look, world.federation_id, view.round_id)
        await asyncio.to_thread(parties.close)


# ------------------------------------------------------------------------------------------------ every call

# Calls that the client leaves to others, and why.
NOT_THE_CLIENTS = {
    "/metrics": "for Prometheus",
    "/v1/federations/{}/adapters/{}/folder": "for people: the same bytes as the artifact that `adapter` names",
}


def addresses_in(source: str) -> set[str]:
    """Every address that a source text spells, with {} for what is filled in."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        parts = node.values if isinstance(node, ast.JoinedStr) else [node]
        text = "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in parts)
        if text.startswith("/"):
            found.add(text)
    return found


def test_the_client_has_every_call_of_the_api(tmp_path: Path) -> None:
    library = Path(fedmkt.client.__file__).parent
    files = ("client", "operator_calls", "site_calls", "session", "transfers", "event_stream")
    spelled = set().union(*(addresses_in((library / f"{each}.py").read_text()) for each in files))
    paths = {re.sub(r"\{\w+\}", "{}", path) for path in create_app(Settings(state_dir=tmp_path)).openapi()["paths"]}
    assert paths - spelled == NOT_THE_CLIENTS.keys()


async def test_the_client_says_which_protocol_it_speaks_and_hears_what_to_do(world: World) -> None:
    def use(url: str) -> None:
        with CoordinatorClient(url, StaticToken(TOKENS["worker"])) as worker:
            assert worker.queue().stream == "fedmkt:jobs"
            worker.session._http.headers["FedMKT-Protocol"] = "2"  # as a later version of this program would
            with pytest.raises(CoordinatorProblem) as refusal:
                worker.queue()
        assert (refusal.value.status, refusal.value.code) == (426, "protocol.mismatch")
        assert refusal.value.detail == "the coordinator speaks protocol 1, the client 2; update the coordinator"

    async with served(world) as url, asyncio.timeout(60):
        await asyncio.to_thread(use, url)


async def test_webhooks_problems_and_uploads_through_the_client(collecting: World) -> None:
    world = collecting
    view, north = await world.round(), world.sites["north"]
    state = await world.send("POST", "/v1/uploads", north, world.manifest(north, view, world.blob(north, view)))
    upload_id = state.json()["upload_id"]

    def use(url: str) -> None:
        with CoordinatorClient(url, StaticToken(TOKENS["operator"])) as operator:
            with pytest.raises(CoordinatorProblem, match="private, local or reserved"):
                operator.create_webhook(world.federation_id, "http://127.0.0.1:9/", ["round.state"])
            assert operator.webhooks(world.federation_id).items == ()
            for call in (operator.delete_webhook, operator.test_webhook):
                with pytest.raises(CoordinatorProblem, match="has no webhook webhook_0"):
                    call(world.federation_id, "webhook_0")
            assert "webhook.address" in {each.code for each in operator.problems().items}
            newest = operator.events(world.federation_id).items[-1]
            assert operator.events(world.federation_id, after=newest.sequence - 1).items == (newest,)
        with CoordinatorClient(url, StaticToken(north.token)) as site:
            assert site.upload_state(upload_id).missing == (0,)
            site.abandon_upload(upload_id)
            with pytest.raises(CoordinatorProblem, match="is abandoned"):
                site.session.request("POST", f"/v1/uploads/{upload_id}/complete")

    async with served(world) as url, asyncio.timeout(60):
        await asyncio.to_thread(use, url)
