"""A real coordinator process, and a federation in it whose sites, LLM and operator are played over HTTP."""

import asyncio
import hashlib
import json
import os
import resource
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import psutil
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from redis.asyncio import Redis

from coordinator_world import CARD, PUBLIC_SET, a_report, make_knowledge
from fedmkt.knowledge import encode
from fedmkt.protocol import (
    CHUNK_BYTES,
    DistillResult,
    FederationConfig,
    GateReport,
    KnowledgeConfig,
    PublicSetConfig,
    Schedule,
    SelectionReport,
)
from fedmkt.public_set import PublicSet
from fedmkt.signing import new_key, public_hex, sign_manifest, site_assertion
from fedmkt.vocabulary import Vocabulary
from load_http import Answer, Connection
from small_tokenizers import vocabulary

LOAD_FOLDER = Path(__file__).resolve().parent
TOKENS = {role: f"{role}-token-of-the-load-0123456789abcdef" for role in ("operator", "viewer", "worker")}
START_S = 60.0
AT_ONCE = 32  # requests in flight while a federation is set up

Item = TypeVar("Item")
Result = TypeVar("Result")


class Refused(AssertionError):
    """An answer that the load does not expect: every one of these is an error of the run."""


def many_files(wanted: int) -> None:
    """A thousand agents are a thousand sockets on either side; children inherit the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted <= hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    assert hard >= wanted, f"{wanted} files are needed, the limit is {hard}: raise it (ulimit -n)"


async def spread(
    items: Iterable[Item], work: Callable[[Item], Awaitable[Result]], at_once: int = AT_ONCE
) -> list[Result]:
    """`work` on every item, at most `at_once` at a time; results in order, the first failure raised."""
    turns = asyncio.Semaphore(at_once)

    async def one(item: Item) -> Result:
        async with turns:
            return await work(item)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(item)) for item in items]
    return [task.result() for task in tasks]


# ------------------------------------------------------------------------------------------------ processes


@contextmanager
def coordinator(state_dir: Path, **settings: object) -> Iterator["Coordinator"]:
    """`fedmkt coordinator run` on a free port: SQLite and the embedded Redis in `state_dir`, unless set otherwise."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    state_dir.mkdir(parents=True, exist_ok=True)
    chosen = {
        "state_dir": state_dir,
        "port": port,
        **{f"{role}_token": token for role, token in TOKENS.items()},
        **settings,
    }
    environment = {**os.environ, **{f"FEDMKT_{name.upper()}": str(value) for name, value in chosen.items()}}
    log = (state_dir / "coordinator.log").open("ab")
    with log:
        process = subprocess.Popen(
            [sys.executable, "-m", "fedmkt_coordinator", "run"], stdout=log, stderr=log, env=environment
        )
    try:
        yield Coordinator(f"http://127.0.0.1:{port}", psutil.Process(process.pid), state_dir, process)
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def contender(*arguments: str) -> Iterator["Server"]:
    """One of `load_contenders`, as a process of its own."""
    command = [sys.executable, str(LOAD_FOLDER / "load_contenders.py"), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        yield Server(f"http://127.0.0.1:{int(process.stdout.readline())}", psutil.Process(process.pid))
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


@dataclass(frozen=True)
class Server:
    url: str
    process: psutil.Process

    @property
    def cpu_s(self) -> float:
        """Processor time of all its threads, the kernel's for it included."""
        times = self.process.cpu_times()
        return float(times.user + times.system)


@dataclass(frozen=True)
class Coordinator(Server):
    state_dir: Path
    child: subprocess.Popen[bytes]

    async def started(self) -> None:
        probe = Connection(self.url)
        async with asyncio.timeout(START_S):
            while True:
                assert self.child.poll() is None, (self.state_dir / "coordinator.log").read_text()[-4000:]
                try:
                    if (await probe.send("GET", "/readyz")).status == 200:
                        break
                except OSError:
                    await asyncio.sleep(0.05)
        await probe.close()

    @property
    def rss_bytes(self) -> int:
        return int(self.process.memory_info().rss)

    @property
    def files(self) -> int:
        return int(self.process.num_fds())

    @property
    def database_bytes(self) -> int:
        """Pages in use, whether they stand in the file or still in the write-ahead log."""
        with closing(sqlite3.connect(f"file:{self.state_dir / 'fedmkt.sqlite'}?mode=ro", uri=True)) as connection:
            pages, free, size = (
                int(connection.execute(f"PRAGMA {name}").fetchone()[0])
                for name in ("page_count", "freelist_count", "page_size")
            )
        return (pages - free) * size


# ------------------------------------------------------------------------------------------------ the federation


@dataclass
class Site:
    name: str
    key: Ed25519PrivateKey
    connection: Connection
    site_id: str = ""


def load_config(sites: Sequence[str], **schedule: Any) -> FederationConfig:
    patience = {"collect_timeout_s": 3600, "distill_timeout_s": 3600, "apply_timeout_s": 3600}
    return FederationConfig(
        name="load",
        sites=tuple(sites),
        public_set=PublicSetConfig(slices=2, holdout_share=0.2),
        schedule=Schedule(**{"quorum": len(sites), **patience, **schedule}),
        knowledge=KnowledgeConfig(max_tokens=64),
    )


@dataclass
class Federation:
    """Everybody who speaks to one coordinator about one federation."""

    url: str
    config: FederationConfig
    operator: Connection
    worker: Connection
    sites: list[Site]
    federation_id: str = ""
    first: bool = True  # on this coordinator: maps are built once for all federations
    redis_url: str = ""
    stream: str = ""
    group: str = ""
    words: Vocabulary = field(default_factory=lambda: vocabulary("byte_level_small"))
    public_set: PublicSet = field(default_factory=lambda: PublicSet.from_jsonl(PUBLIC_SET))

    @classmethod
    def of(cls, url: str, config: FederationConfig, *, first: bool = True) -> "Federation":
        operator, worker = (Connection(url, TOKENS[role]) for role in ("operator", "worker"))
        sites = [Site(name, new_key(), Connection(url)) for name in config.sites]
        return cls(url, config, operator, worker, sites, first=first)

    async def close(self) -> None:
        for connection in (self.operator, self.worker, *(site.connection for site in self.sites)):
            await connection.close()

    # ---------------------------------------------------------------------------------------------- setting up

    async def set_up(self) -> None:
        """Everything that the first round needs."""
        created = await ask(self.operator, "POST", "/v1/federations", self.config.model_dump_json().encode())
        self.federation_id = created.json()["federation_id"]
        await ask(self.operator, "PUT", f"/v1/federations/{self.federation_id}/public-set", PUBLIC_SET)
        digest = await self.store(self.words.to_bytes())
        registration = json.dumps({"vocabulary": digest, "model": CARD.model_dump()}).encode()
        await ask(self.worker, "PUT", f"/v1/federations/{self.federation_id}/llm", registration)
        await spread(self.sites, self._enrol)
        await self.build_maps()

    async def _enrol(self, site: Site) -> None:
        operator = Connection(self.url, TOKENS["operator"])
        path = f"/v1/federations/{self.federation_id}/enrolment-tokens"
        issued = await ask(operator, "POST", path, json.dumps({"site": site.name}).encode())
        await operator.close()
        body = {"token": issued.json()["token"], "public_key": public_hex(site.key)}
        enrolled = await ask(site.connection, "POST", "/v1/enrol", json.dumps(body).encode())
        site.site_id = enrolled.json()["site_id"]
        await self.renew(site)
        await ask(site.connection, "PUT", "/v1/me/vocabulary", self.words.to_bytes())
        model = json.dumps({"model": CARD.model_dump(), "private_samples": 100}).encode()
        await ask(site.connection, "PUT", "/v1/me/model", model)

    async def renew(self, site: Site) -> None:
        site.connection.token = None
        assertion = site_assertion(site.key, site.site_id, datetime.now(UTC))
        answer = await ask(site.connection, "POST", "/v1/token", json.dumps({"assertion": assertion}).encode())
        site.connection.token = answer.json()["access_token"]

    async def store(self, data: bytes) -> str:
        digest = hashlib.sha256(data).hexdigest()
        await ask(self.worker, "PUT", f"/v1/artifacts/{digest}", data)
        return digest

    async def build_maps(self) -> None:
        """The maps' content is no business of the coordinator's. One vocabulary everywhere makes one map."""
        queue = (await ask(self.worker, "GET", "/v1/jobs/queue")).json()
        self.redis_url, self.stream, self.group = queue["redis_url"], queue["stream"], queue["group"]
        artifact = await self.store(b"a map")
        if self.first:
            await self.complete(await self.next_job("vocabulary_map"), {"artifact": artifact})

    # ---------------------------------------------------------------------------------------------- the LLM server

    async def next_job(self, kind: str) -> dict[str, Any]:
        """Claim the next job of that kind, found where an LLM server finds it: in the Redis stream."""
        async with Redis.from_url(self.redis_url, decode_responses=True, protocol=2) as redis, asyncio.timeout(30):
            while True:
                answer = await redis.xreadgroup(self.group, "load", {self.stream: ">"}, count=1, block=1000)
                for entry_id, fields in answer[0][1] if answer else ():
                    await redis.xack(self.stream, self.group, entry_id)
                    claimed = await self.worker.send("POST", f"/v1/jobs/{fields['job_id']}/claim")
                    if claimed.status == 200 and claimed.json()["payload"]["kind"] == kind:
                        job: dict[str, Any] = claimed.json()
                        return job

    async def complete(self, job: dict[str, Any], result: dict[str, Any]) -> None:
        body = json.dumps({"attempt": job["attempt"], "result": result}).encode()
        await ask(self.worker, "POST", f"/v1/jobs/{job['job_id']}/complete", body)

    async def distill(self, job: dict[str, Any]) -> None:
        """Do a round's job as an LLM server would, without learning anything."""
        number = job["payload"]["round_number"]
        result = DistillResult(
            knowledge=await self.store(f"knowledge of round {number}".encode()),
            adapter=await self.store(f"adapter of round {number}".encode()),
            selection=SelectionReport(taught={"self": 5}),
            gate=GateReport(decision="kept", before_bits_per_byte=1.5, after_bits_per_byte=1.4),
            before={},
            after={},
            training=None,
        )
        await self.complete(job, result.model_dump(mode="json"))

    # ---------------------------------------------------------------------------------------------- rounds

    async def request_rounds(self, count: int) -> None:
        body = json.dumps({"count": count}).encode()
        await ask(self.operator, "POST", f"/v1/federations/{self.federation_id}/rounds", body)

    async def view(self) -> dict[str, Any]:
        found: dict[str, Any] = (await ask(self.operator, "GET", f"/v1/federations/{self.federation_id}")).json()
        return found

    async def task(self, site: Site, wait_s: float = 0) -> dict[str, Any]:
        found: dict[str, Any] = (await ask(site.connection, "GET", f"/v1/me/task?wait_s={wait_s}")).json()["task"]
        return found

    def blob(self, task: dict[str, Any]) -> bytes:
        """Honest knowledge of this federation's sites for the round of the task: all have one vocabulary."""
        cut = self.config.public_set
        samples = self.public_set.parts(cut.slices, cut.holdout_share).slices[task["slice_index"]]
        about = {
            "federation_id": self.federation_id,
            "round_number": task["round_number"],
            "slice_index": task["slice_index"],
        }
        return encode(make_knowledge(self.public_set, samples, self.words, self.config, **about))

    async def announce(self, site: Site, round_id: str, blob: bytes, kind: Any = "knowledge") -> dict[str, Any]:
        manifest = sign_manifest(site.key, kind, round_id, blob).model_dump_json().encode()
        state: dict[str, Any] = (await ask(site.connection, "POST", "/v1/uploads", manifest)).json()
        return state

    async def upload(self, site: Site, round_id: str, blob: bytes, kind: Any = "knowledge") -> None:
        state = await self.announce(site, round_id, blob, kind)
        for index in state["missing"]:
            chunk = blob[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]
            await ask(site.connection, "PUT", f"/v1/uploads/{state['upload_id']}/chunks/{index}", chunk)
        await ask(site.connection, "POST", f"/v1/uploads/{state['upload_id']}/complete")

    async def report(self, site: Site, round_id: str) -> None:
        await ask(site.connection, "POST", f"/v1/rounds/{round_id}/report", a_report().model_dump_json().encode())


async def ask(
    connection: Connection, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
) -> Answer:
    """An answer below 400, or Refused."""
    answer = await connection.send(method, path, body, headers)
    if answer.status >= 400:
        raise Refused(f"{method} {path}: {answer.status} {answer.body[:500]!r}")
    return answer
