"""A coordinator under test with all around it: an operator, a worker, sites with keys, texts and vocabularies."""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import httpx
import numpy as np
import uvicorn
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from fastapi import FastAPI
from pydantic import BaseModel

from fedmkt.knowledge import Knowledge, KnowledgeHeader, encode
from fedmkt.protocol import (
    CHUNK_BYTES,
    ApplyReport,
    DistillJob,
    DistillResult,
    Evaluation,
    FederationConfig,
    FederationView,
    GateReport,
    JobCompletion,
    JobView,
    LlmRegistration,
    Manifest,
    MapResult,
    ModelCard,
    PublicSetConfig,
    RoundView,
    Schedule,
    SelectionReport,
    SiteModel,
    UploadReceipt,
    UploadState,
)
from fedmkt.public_set import PublicSet
from fedmkt.signing import new_key, public_hex, sign_manifest, site_assertion
from fedmkt.tokenized_set import tokenize_set
from fedmkt.vocabulary import Vocabulary
from fedmkt_coordinator.context import Context
from fedmkt_coordinator.keeper import Keeper
from small_tokenizers import vocabulary

View = TypeVar("View", bound=BaseModel)

TOKENS = {role: f"{role}-token-of-the-tests-0123456789abcdef" for role in ("operator", "viewer", "worker")}
CARD = ModelCard(model_id="tiny", architecture="llama", parameters=1000)
LLM_VOCABULARY = "byte_level"
SITE_VOCABULARIES = {"north": "byte_level_small", "south": "sentencepiece"}
PUBLIC_SET = b"".join(
    json.dumps({"id": f"p{n}", "prompt": f"What is {n} plus {n}?", "completion": f" It is {2 * n}, I think."}).encode()
    + b"\n"
    for n in range(12)
)


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now = datetime(2031, 5, 4, 3, 2, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now

    def move(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


def config(name: str = "hospitals", **changes: Any) -> FederationConfig:
    values: dict[str, Any] = {
        "name": name,
        "sites": ("north", "south"),
        "public_set": PublicSetConfig(slices=2, holdout_share=0.2),
        "schedule": Schedule(quorum=2, collect_timeout_s=100, distill_timeout_s=100, apply_timeout_s=100),
    }
    return FederationConfig(**{**values, **changes})


def make_knowledge(
    public_set: PublicSet, samples: Sequence[int], words: Vocabulary, config: FederationConfig, **header: Any
) -> Knowledge:
    """Half of the mass on the token that the text realises, the rest unknown; `header` replaces single fields."""
    rows = tokenize_set(words, public_set, sorted(samples), config.knowledge.max_tokens)
    fields: dict[str, Any] = {
        "federation_id": "fed_00000000000000000000",
        "round_number": 1,
        "slice_index": 0,
        "public_set_digest": public_set.digest,
        "vocabulary_fingerprint": words.fingerprint,
        "vocabulary_size": words.size,
        "model_id": "tiny",
        "adapter_version": 0,
        "top_k": config.knowledge.top_k,
        "top_p": config.knowledge.top_p,
        "max_tokens": config.knowledge.max_tokens,
    }
    half = np.full(rows.rows, np.log(0.5), dtype=np.float32)
    return Knowledge(
        header=KnowledgeHeader(**{**fields, **header}),
        samples=rows.samples,
        row_splits=rows.row_splits,
        context_ends=rows.context_ends,
        gold_logprobs=half,
        entry_splits=np.arange(rows.rows + 1, dtype=np.int32),
        token_ids=rows.gold_ids,
        logprobs=half,
    )


def a_report(**changes: Any) -> ApplyReport:
    values: dict[str, Any] = {
        "selection": SelectionReport(taught={"llm": 4, "self": 1}),
        "gate": GateReport(decision="kept", before_bits_per_byte=2.0, after_bits_per_byte=1.9),
        "before": {"all": Evaluation(bits_per_byte=2.0, accuracy=0.3, samples=2)},
        "after": {"all": Evaluation(bits_per_byte=1.9, accuracy=0.4, samples=2)},
        "bytes_up": 1000,
        "bytes_down": 2000,
    }
    return ApplyReport(**{**values, **changes})


@dataclass
class SiteUnderTest:
    name: str
    words: Vocabulary
    key: Ed25519PrivateKey
    site_id: str
    token: str


@dataclass
class World:
    """`http` speaks to the application in process; `clock` and `keeper` move time."""

    app: FastAPI
    http: httpx.AsyncClient
    clock: Clock
    federation_id: str = ""
    config: FederationConfig = field(default_factory=config)
    sites: dict[str, SiteUnderTest] = field(default_factory=dict)
    public_set: PublicSet = field(default_factory=lambda: PublicSet.from_jsonl(PUBLIC_SET))

    @property
    def context(self) -> Context:
        context = self.app.state.context
        assert isinstance(context, Context)
        return context

    async def tick(self) -> None:
        keeper = self.app.state.keeper
        assert isinstance(keeper, Keeper)
        await keeper.tick()

    # ---------------------------------------------------------------------------------------------- calls

    async def send(
        self,
        method: str,
        path: str,
        who: str | SiteUnderTest | None = "operator",
        body: BaseModel | bytes | None = None,
        **more: Any,
    ) -> httpx.Response:
        headers = dict(more.pop("headers", {}))
        token = who.token if isinstance(who, SiteUnderTest) else TOKENS.get(who or "", who)
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        if isinstance(body, BaseModel):
            headers["Content-Type"] = "application/json"
            body = body.model_dump_json().encode()
        return await self.http.request(method, path, content=body, headers=headers, **more)

    async def ask(self, model: type[View], method: str, path: str, *arguments: Any, **more: Any) -> View:
        response = await self.send(method, path, *arguments, **more)
        assert response.status_code < 300, response.text
        return model.model_validate_json(response.content)

    async def refused(self, code: str, method: str, path: str, *arguments: Any, **more: Any) -> str:
        """The call is refused with this code; returns the detail."""
        response = await self.send(method, path, *arguments, **more)
        assert response.status_code >= 400, response.text
        assert response.headers["content-type"] == "application/problem+json"
        problem = response.json()
        assert (problem["code"], problem["status"]) == (code, response.status_code), problem
        return str(problem["detail"])

    # ---------------------------------------------------------------------------------------------- setting up

    async def create(self, made: FederationConfig | None = None) -> None:
        self.config = made or self.config
        view = await self.ask(FederationView, "POST", "/v1/federations", "operator", self.config)
        self.federation_id = view.federation_id

    async def store_artifact(self, data: bytes) -> str:
        digest = hashlib.sha256(data).hexdigest()
        response = await self.send("PUT", f"/v1/artifacts/{digest}", "worker", data)
        assert response.status_code == 200, response.text
        return digest

    async def register_llm(self) -> None:
        digest = await self.store_artifact(vocabulary(LLM_VOCABULARY).to_bytes())
        registration = LlmRegistration(vocabulary=digest, model=CARD)
        await self.ask(FederationView, "PUT", f"/v1/federations/{self.federation_id}/llm", "worker", registration)

    async def enrol(self, name: str) -> SiteUnderTest:
        path = f"/v1/federations/{self.federation_id}/enrolment-tokens"
        issued = (await self.http.post(path, json={"site": name}, headers=_bearer("operator"))).json()
        key = new_key()
        body = {"token": issued["token"], "public_key": public_hex(key)}
        enrolled = (await self.http.post("/v1/enrol", json=body)).json()
        words = vocabulary(SITE_VOCABULARIES.get(name, "byte_level_small"))
        site = SiteUnderTest(name, words, key, enrolled["site_id"], "")
        await self.renew(site)
        self.sites[name] = site
        return site

    async def as_site(self, name: str, key: Ed25519PrivateKey) -> SiteUnderTest:
        """A site that enrolled by other ways than `enrol`."""
        (view,) = [each for each in (await self.view()).sites if each.name == name]
        assert view.site_id is not None
        site = SiteUnderTest(name, vocabulary(SITE_VOCABULARIES[name]), key, view.site_id, "")
        await self.renew(site)
        return site

    async def renew(self, site: SiteUnderTest) -> None:
        assertion = site_assertion(site.key, site.site_id, self.clock())
        answer = await self.http.post("/v1/token", json={"assertion": assertion})
        assert answer.status_code == 200, answer.text
        site.token = answer.json()["access_token"]

    async def describe(self, site: SiteUnderTest) -> None:
        sent = await self.send("PUT", "/v1/me/vocabulary", site, site.words.to_bytes())
        assert sent.status_code == 200, sent.text
        model = SiteModel(model=CARD, private_samples=100)
        sent = await self.send("PUT", "/v1/me/model", site, model)
        assert sent.status_code == 204, sent.text

    async def put_public_set(self) -> None:
        sent = await self.send("PUT", f"/v1/federations/{self.federation_id}/public-set", "operator", PUBLIC_SET)
        assert sent.status_code == 200, sent.text

    async def ready(self, made: FederationConfig | None = None) -> None:
        """A federation whose public set, LLM, sites and maps are all there."""
        await self.create(made)
        await self.put_public_set()
        await self.register_llm()
        for name in self.config.sites:
            await self.describe(await self.enrol(name))
        await self.build_maps()

    async def request_rounds(self, count: int = 1, **headers: str) -> FederationView:
        path = f"/v1/federations/{self.federation_id}/rounds"
        answer = await self.http.post(path, json={"count": count}, headers={**_bearer("operator"), **headers})
        assert answer.status_code == 202, answer.text
        return FederationView.model_validate_json(answer.content)

    # ---------------------------------------------------------------------------------------------- looking

    async def view(self) -> FederationView:
        return await self.ask(FederationView, "GET", f"/v1/federations/{self.federation_id}", "viewer")

    async def round(self, number: int = 1) -> RoundView:
        answer = await self.send("GET", f"/v1/federations/{self.federation_id}/rounds", "viewer")
        items = answer.json()["items"]
        return next(RoundView.model_validate(each) for each in items if each["number"] == number)

    async def task(self, site: SiteUnderTest, wait_s: float = 0) -> dict[str, Any]:
        answer = await self.send("GET", f"/v1/me/task?wait_s={wait_s}", site)
        assert answer.status_code == 200, answer.text
        task: dict[str, Any] = answer.json()["task"]
        return task

    async def event_kinds(self) -> list[str]:
        answer = await self.send("GET", f"/v1/federations/{self.federation_id}/events?limit=200", "viewer")
        return [each["kind"] for each in answer.json()["items"]]

    # ---------------------------------------------------------------------------------------------- the worker's part

    async def queued(self) -> list[str]:
        async with self.context.store.read() as tx:
            return [job_id for job_id, _ in await tx.due_jobs(tx.now)]

    async def claim(self, job_id: str) -> JobView:
        return await self.ask(JobView, "POST", f"/v1/jobs/{job_id}/claim", "worker")

    async def build_maps(self) -> int:
        """Do every map job that waits; the maps' content is no business of the coordinator's."""
        built = 0
        for job_id in await self.queued():
            job = await self.claim(job_id)
            if job.payload.kind == "vocabulary_map":
                names = f"{job.payload.teacher}-{job.payload.student}-{job.payload.method}"
                result = MapResult(artifact=await self.store_artifact(names.encode()))
                await self.complete(job, result)
                built += 1
        return built

    async def complete(self, job: JobView, result: DistillResult | MapResult) -> JobView:
        done = JobCompletion(attempt=job.attempt, result=result)
        return await self.ask(JobView, "POST", f"/v1/jobs/{job.job_id}/complete", "worker", done)

    async def take_distill(self) -> tuple[JobView, DistillJob]:
        (job_id,) = await self.queued()
        job = await self.claim(job_id)
        assert isinstance(job.payload, DistillJob)
        return job, job.payload

    async def distill(self, **changes: Any) -> DistillResult:
        """Do the round's job as an LLM server would."""
        job, payload = await self.take_distill()
        result = await self.result(payload.round_number, **changes)
        await self.complete(job, result)
        return result

    async def result(self, round_number: int, **changes: Any) -> DistillResult:
        values: dict[str, Any] = {
            "knowledge": await self.store_artifact(f"knowledge of round {round_number}".encode()),
            "adapter": await self.store_artifact(f"adapter of round {round_number}".encode()),
            "selection": SelectionReport(taught={"north": 3, "self": 2}),
            "gate": GateReport(decision="kept", before_bits_per_byte=1.5, after_bits_per_byte=1.4),
            "before": {"all": Evaluation(bits_per_byte=1.5, accuracy=0.5, samples=2)},
            "after": {"all": Evaluation(bits_per_byte=1.4, accuracy=0.6, samples=2)},
            "training": None,
        }
        return DistillResult(**{**values, **changes})

    # ---------------------------------------------------------------------------------------------- a site's part

    def slice_of(self, number: int) -> tuple[int, ...]:
        cut = self.config.public_set
        return self.public_set.parts(cut.slices, cut.holdout_share).slices[number]

    def blob(self, site: SiteUnderTest, view: RoundView, **header: Any) -> bytes:
        """What an honest site would send for this round."""
        truth = {
            "federation_id": self.federation_id,
            "round_number": view.number,
            "slice_index": view.slice_index,
        }
        samples = self.slice_of(view.slice_index)
        return encode(make_knowledge(self.public_set, samples, site.words, self.config, **{**truth, **header}))

    def manifest(self, site: SiteUnderTest, view: RoundView, blob: bytes, kind: Any = "knowledge") -> Manifest:
        return sign_manifest(site.key, kind, view.round_id, blob)

    async def send_chunks(self, site: SiteUnderTest, manifest: Manifest, blob: bytes) -> UploadState:
        state = await self.ask(UploadState, "POST", "/v1/uploads", site, manifest)
        for index in state.missing:
            chunk = blob[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]
            path = f"/v1/uploads/{state.upload_id}/chunks/{index}"
            state = await self.ask(UploadState, "PUT", path, site, chunk)
        return state

    async def upload(self, site: SiteUnderTest, view: RoundView, blob: bytes | None = None) -> UploadReceipt:
        blob = self.blob(site, view) if blob is None else blob
        state = await self.send_chunks(site, self.manifest(site, view, blob), blob)
        return await self.ask(UploadReceipt, "POST", f"/v1/uploads/{state.upload_id}/complete", site)

    async def play_round(self, number: int = 1) -> None:
        """Every site does what it should, and so does the LLM server."""
        view = await self.round(number)
        for site in self.sites.values():
            await self.upload(site, view)
        await self.distill()
        for site in self.sites.values():
            await self.report(site, view)

    async def report(self, site: SiteUnderTest, view: RoundView) -> None:
        sent = await self.send("POST", f"/v1/rounds/{view.round_id}/report", site, a_report())
        assert sent.status_code == 200, sent.text


def _bearer(role: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {TOKENS[role]}"}


@asynccontextmanager
async def served(world: World) -> AsyncIterator[str]:
    """The address of the same application behind a real socket, for answers that stream and clients that block."""
    server = uvicorn.Server(
        uvicorn.Config(world.app, port=0, log_config=None, lifespan="off", timeout_graceful_shutdown=1)
    )
    serving = asyncio.create_task(server.serve())
    for _ in range(500):
        if server.started:
            break
        await asyncio.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        await serving
