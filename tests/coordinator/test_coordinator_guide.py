"""docs/api.md, block by block: bash, curl and openssl against a coordinator process, which never hears of Python."""

import asyncio
import hashlib
import json
import os
import re
import secrets
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from coordinator_world import PUBLIC_SET, TOKENS, SiteUnderTest, World, config
from fedmkt.protocol import (
    Apply,
    AuditHead,
    Enrolled,
    FederationView,
    Problem,
    Schedule,
    TaskEnvelope,
    TrainAndUpload,
    UploadReceipt,
    UploadState,
    Version,
    manifest_bytes,
)
from fedmkt.signing import new_key
from live_coordinator import LiveCoordinator
from small_tokenizers import vocabulary
from test_coordinator_webhooks import Receiver, running

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.services,
    pytest.mark.skipif(
        not (shutil.which("curl") and shutil.which("openssl") and shutil.which("bash")),
        reason="the guide needs bash, curl and openssl",
    ),
]
PAGE = Path(__file__).resolve().parents[2] / "docs" / "api.md"
END = "-- end of the block --"


def blocks() -> list[tuple[str, str]]:
    """(heading above it, bash) of every fenced block of the page."""
    found: list[tuple[str, str]] = []
    heading = ""
    for title, block in re.findall(r"^#+ ([^\n]*)$|^```bash\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL):
        heading = title or heading
        if block:
            found.append((heading, block))
    return found


class Shell:
    """One bash that runs all blocks, so that what one sets the next one has."""

    def __init__(self, folder: Path, **variables: str) -> None:
        environment = {"PATH": os.environ["PATH"], "LC_ALL": "C", "NO_PROXY": "*", **variables}
        self._bash = subprocess.Popen(
            ["bash", "--noprofile", "--norc", "-euo", "pipefail"],
            cwd=folder,
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def run(self, block: str) -> str:
        """What the block prints. Fails with it when a command of the block fails."""
        assert self._bash.stdin is not None
        assert self._bash.stdout is not None
        self._bash.stdin.write(f"{block}\nprintf '\\n{END}\\n'\n")
        self._bash.stdin.flush()
        said: list[str] = []
        for line in self._bash.stdout:
            if line.rstrip("\n") == END:
                return "".join(said)
            said.append(line)
        raise AssertionError(f"the block failed:\n{block}\nIt said:\n{''.join(said)}")

    def close(self) -> None:
        self._bash.kill()
        self._bash.communicate()


class Others:
    """What the operator and the LLM server do meanwhile, by the same HTTP."""

    def __init__(self, world: World, folder: Path, receiver: Receiver) -> None:
        self.world, self.folder, self.receiver = world, folder, receiver

    async def before(self) -> str:
        """A federation for one site; returns the enrolment token."""
        world = self.world
        await world.create(config(sites=("north",), schedule=Schedule(quorum=1)))
        await world.put_public_set()
        await world.register_llm()
        (self.folder / "vocabulary.json").write_bytes(vocabulary("byte_level_small").to_bytes())
        (self.folder / "public.jsonl").write_bytes(PUBLIC_SET)
        path = f"/v1/federations/{world.federation_id}/enrolment-tokens"
        answer = await world.send(
            "POST", path, "operator", b'{"site": "north"}', headers={"Content-Type": "application/json"}
        )
        return str(answer.json()["token"])

    async def ask_for_a_round(self) -> None:
        await self.world.build_maps()
        await self.world.request_rounds()

    async def make_knowledge(self) -> None:
        site = SiteUnderTest("north", vocabulary("byte_level_small"), new_key(), "", "")
        (self.folder / "knowledge.bin").write_bytes(self.world.blob(site, await self.world.round()))

    async def distil(self) -> None:
        await self.world.distill()

    async def keep_what_came(self) -> None:
        headers, body = self.receiver.messages[-1]
        (self.folder / "received_headers.txt").write_text("".join(f"{n}: {v}\n" for n, v in headers.items()))
        (self.folder / "received_body.json").write_bytes(body)


@pytest.fixture
async def others(tmp_path: Path) -> AsyncIterator[Others]:
    live = LiveCoordinator(tmp_path / "state", webhook_allow_private=True)
    live.start()
    (tmp_path / "site").mkdir()
    async with AsyncExitStack() as stack:
        http = await stack.enter_async_context(httpx.AsyncClient(base_url=live.url, timeout=60))
        receiver = stack.enter_context(running(Receiver()))
        yield Others(World(live.app, http, _Now()), tmp_path / "site", receiver)  # type: ignore[arg-type] # real time
    live.stop()


class _Now:
    def __call__(self) -> datetime:
        return datetime.now(UTC)


async def test_every_block_of_the_guide_works_as_printed(others: Others) -> None:
    token = await others.before()
    url = str(others.world.http.base_url)
    shell = Shell(
        others.folder,
        COORDINATOR_URL=url,
        ENROLMENT_TOKEN=token,
        OPERATOR_TOKEN=TOKENS["operator"],
        WEBHOOK_URL=others.receiver.url + "/hook",
    )
    before: dict[str, Callable[[], object]] = {
        "Ask what to do": others.ask_for_a_round,
        "Upload knowledge": others.make_knowledge,
        "Learn from the LLM": others.distil,
    }
    said: dict[str, str] = {}
    try:
        for heading, block in blocks():
            step = before.pop(heading, None)
            if step is not None:
                await step()  # type: ignore[misc] # they are coroutine functions
            if "received_headers.txt" in block:
                await others.keep_what_came()
            said[heading] = said.get(heading, "") + await asyncio.to_thread(shell.run, block)
    finally:
        shell.close()
    assert before == {}
    check(said, others.folder)
    state = (await others.world.round()).state
    assert state == "completed"


def objects(said: str) -> list[dict[str, Any]]:
    """Every JSON object that stands in what was printed."""
    found, at = [], said.find("{")
    while at >= 0:
        try:
            each, at = json.JSONDecoder().raw_decode(said, at)
            found.append(each)
        except ValueError:
            at += 1
        at = said.find("{", at)
    return found


def times(said: str) -> list[datetime]:
    return [datetime.fromisoformat(line) for line in said.split() if line.endswith("Z")]


def check(said: dict[str, str], folder: Path) -> None:
    """What the blocks print and leave is what the page says of them; nothing printed is left out."""
    silent = {"The operator", "Sites that leave"}
    assert {heading for heading, text in said.items() if not text.strip()} == silent
    version, problem = objects(said["The API with curl"])
    assert Version.model_validate(version).protocol_version == 1
    assert Problem.model_validate(problem).code == "token.missing"
    check_site(said, folder)
    check_operator(said, folder)


def check_site(said: dict[str, str], folder: Path) -> None:
    words, blob = vocabulary("byte_level_small"), (folder / "knowledge.bin").read_bytes()
    enrolled = Enrolled.model_validate(objects(said["Enrol, once"])[0])
    assert enrolled.site == "north"
    token = said["An access token, every few minutes"]
    assert token.split()[0] == enrolled.site_id
    assert objects(token)[0]["code"] == "protocol.mismatch"
    assert "update the coordinator" in token
    (introduced,) = objects(said["Introduce the model"])
    assert (introduced["fingerprint"], introduced["size"]) == (words.fingerprint, words.size)
    (asked,) = objects(said["Ask what to do"])
    task = TaskEnvelope.model_validate(asked).task
    assert isinstance(task, TrainAndUpload)
    announced, resumed, complete = objects(said["Upload knowledge"])
    assert UploadState.model_validate(announced) == UploadState.model_validate(resumed)
    assert (announced["missing"], announced["complete"]) == ([0], False)
    receipt = UploadReceipt.model_validate(complete)
    assert (receipt.round_id, receipt.site, receipt.kind) == (task.round_id, "north", "knowledge")
    assert (receipt.digest, receipt.size_bytes) == (hashlib.sha256(blob).hexdigest(), len(blob))
    assert said["Verify the receipt"].strip() == "Signature Verified Successfully"
    learned = objects(said["Learn from the LLM"])
    learn, progress = learned[0], learned[-1]
    apply = TaskEnvelope.model_validate(learn).task
    assert isinstance(apply, Apply)
    assert apply.round_id == task.round_id
    assert "304\n" in said["Learn from the LLM"]
    assert (progress["site"], progress["state"], progress["upload_bytes"]) == ("north", "applied", len(blob))


def check_operator(said: dict[str, str], folder: Path) -> None:
    now = datetime.now(UTC)
    federation = said["A federation"]
    assert objects(federation)[0]["samples"] == len(PUBLIC_SET.splitlines())
    clinics = FederationView.model_validate_json((folder / "clinics.json").read_bytes())
    assert timedelta(days=6) < datetime.fromisoformat(federation.split("}")[1].strip()) - now < timedelta(days=8)
    assert said["Rounds"].split()[:2] == ["5", "5"]
    following, paused = times(said["Rounds"])
    assert abs(following - now) < timedelta(days=1, minutes=10)
    assert abs(paused - now) < timedelta(minutes=10)
    assert said["Adapters"].split() == ["0", "true"]
    assert (folder / "adapter.tar").read_bytes() == b"adapter of round 1"
    watching = said["Watching"]
    second = json.loads((folder / "page.json").read_text())
    assert watching.split()[0] == "304"
    assert clinics.federation_id in (watching.split()[1], second["items"][0]["federation_id"])
    assert "site.invited" in watching.split()
    assert "id: 2\n" in watching
    assert objects(watching)[0] == {"status": "ok", "checks": dict.fromkeys(("database", "artifacts", "redis"), "ok")}
    assert 'fedmkt_rounds{state="completed"} 1.0' in watching.splitlines()
    assert said["Webhooks"].split() == ["true"]
    assert said["The audit log"].split() == ['"action":"site.invited"']
    head = AuditHead.model_validate_json((folder / "audit-head.json").read_bytes())
    assert head.sequence >= len(json.loads((folder / "audit.json").read_text())["items"]) > 5


async def test_the_guide_works_for_an_upload_of_several_chunks(tmp_path: Path) -> None:
    """The page's lines for chunks and manifest, over three chunks, give what the library gives."""
    blob = secrets.token_bytes((2 << 20) + 5)
    (tmp_path / "knowledge.bin").write_bytes(blob)
    shell = Shell(tmp_path)
    try:
        shell.run(
            "openssl genpkey -algorithm ed25519 -out site.pem; round_id=round_1; coordinator=none; "
            "api() { :; }; field() { :; }"
        )
        block = next(block for heading, block in blocks() if heading == "Upload knowledge")
        await asyncio.to_thread(shell.run, block)
    finally:
        shell.close()
    digests = tuple(hashlib.sha256(blob[n : n + (1 << 20)]).hexdigest() for n in range(0, len(blob), 1 << 20))
    whole = hashlib.sha256(blob).hexdigest()
    made = (tmp_path / "manifest.txt").read_bytes()
    assert made == manifest_bytes("knowledge", "round_1", whole, len(blob), digests)
