"""The artifact store's contract, over a folder and over S3: what it takes, gives, refuses and forgets."""

import hashlib
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import httpx
import pytest
from obstore.store import from_url

from coordinator_servers import Worlds, settings_for
from coordinator_world import TOKENS, SiteUnderTest, World, config
from fedmkt.protocol import CHUNK_BYTES, Health, RoundView, UploadReceipt, UploadState
from fedmkt.signing import verify_receipt
from fedmkt_coordinator.artifacts import ArtifactDigest, ArtifactStore, ArtifactUnknown, _Disk
from fedmkt_coordinator.dependencies import DependencyDown
from fedmkt_coordinator.objects import FETCH_BYTES
from real_servers import S3_VARIABLES, Line, RedisProcess, S3Process, free_port, until_answers

pytestmark = [pytest.mark.anyio, pytest.mark.services]

DATA = bytes(range(256)) * 5000
DIGEST = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def s3_line(s3_server: S3Process, monkeypatch: pytest.MonkeyPatch) -> Iterator[Line]:
    """The way to the S3 server, with the variables that the coordinator finds it by."""
    line = Line(s3_server.port)
    line.mend()
    for name, value in {**S3_VARIABLES, "AWS_ENDPOINT_URL": line.url}.items():
        monkeypatch.setenv(name, value)
    yield line
    line.cut()


@pytest.fixture
def s3_url(s3_line: Line, request: pytest.FixtureRequest) -> str:
    return f"s3://fedmkt/{hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:16]}"


@pytest.fixture(params=["folder", "s3"])
def artifacts(request: pytest.FixtureRequest, state_dir: Path) -> ArtifactStore:
    url = request.getfixturevalue("s3_url") if request.param == "s3" else None
    return ArtifactStore.open(url, state_dir)


async def stream_of(pieces: Iterable[bytes]) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


async def read(store: ArtifactStore, digest: str, start: int, stop: int) -> bytes:
    return b"".join([piece async for piece in await store.stream(digest, start, stop)])


async def everything(store: ArtifactStore) -> list[str]:
    return await store._objects.paths("")


# ------------------------------------------------------------------------------------------------ artifacts


async def test_what_was_put_is_read_whole_in_ranges_and_measured(artifacts: ArtifactStore) -> None:
    assert await artifacts.put(DATA) == DIGEST
    assert await artifacts.put(DATA) == DIGEST
    assert await artifacts.size(DIGEST) == 1_280_000
    assert await artifacts.get(DIGEST) == DATA
    for start, stop in ((0, 1_280_000), (0, 1), (100, 1000), (1_279_999, 1_280_000), (5, 5)):
        assert await read(artifacts, DIGEST, start, stop) == DATA[start:stop]
    assert await everything(artifacts) == [f"artifacts/{DIGEST[:2]}/{DIGEST}"]


async def test_an_artifact_of_several_requests_to_the_store_is_read_as_it_was_put(artifacts: ArtifactStore) -> None:
    data = random.Random(1).randbytes(2 * FETCH_BYTES + 1000)
    pieces = [data[at : at + 700_000] for at in range(0, len(data), 700_000)]
    digest = hashlib.sha256(data).hexdigest()
    assert await artifacts.put_stream(digest, stream_of(pieces)) == len(data)
    assert await read(artifacts, digest, 0, len(data)) == data
    assert (
        await read(artifacts, digest, FETCH_BYTES - 1, 2 * FETCH_BYTES + 1)
        == data[FETCH_BYTES - 1 : 2 * FETCH_BYTES + 1]
    )


async def test_an_empty_artifact_is_one(artifacts: ArtifactStore) -> None:
    empty = hashlib.sha256(b"").hexdigest()
    assert await artifacts.put_stream(empty, stream_of([])) == 0
    assert await artifacts.size(empty) == 0
    assert await artifacts.get(empty) == b""
    assert await read(artifacts, empty, 0, 0) == b""


async def test_other_bytes_than_the_digest_names_leave_nothing(artifacts: ArtifactStore) -> None:
    with pytest.raises(ArtifactDigest, match="7 bytes came with SHA-256"):
        await artifacts.put_stream(DIGEST, stream_of([b"another"]))
    assert await everything(artifacts) == []


async def test_a_stream_that_breaks_raises_its_own_error_and_leaves_nothing(artifacts: ArtifactStore) -> None:
    async def breaking() -> AsyncIterator[bytes]:
        yield bytes(6 << 20)
        raise LookupError("the line broke")

    with pytest.raises(LookupError, match="the line broke"):
        await artifacts.put_stream(DIGEST, breaking())
    assert await everything(artifacts) == []


async def test_what_is_not_there_is_unknown(artifacts: ArtifactStore) -> None:
    for ask in (artifacts.size, artifacts.get):
        with pytest.raises(ArtifactUnknown, match=DIGEST):
            await ask(DIGEST)


# ------------------------------------------------------------------------------------------------ chunks


def whatever(chunk: bytes) -> None:
    """A check that lets everything pass."""


async def test_chunks_come_in_any_order_any_number_of_times_and_become_an_artifact(artifacts: ArtifactStore) -> None:
    data = random.Random(2).randbytes(2 * CHUNK_BYTES + 77)
    chunks = [data[at : at + CHUNK_BYTES] for at in range(0, len(data), CHUNK_BYTES)]
    digest = hashlib.sha256(data).hexdigest()
    for number in (2, 0, 2, 1):
        half = len(chunks[number]) // 2
        await artifacts.put_chunk("upload_1", number, [chunks[number][:half], chunks[number][half:]], whatever)
    assert await artifacts.assemble("upload_1", 3) == data
    await artifacts.keep_upload("upload_1", digest, data)
    await artifacts.keep_upload("upload_1", digest, data)  # an attempt that was answered to nobody comes again
    await artifacts.drop_chunks("upload_1")
    await artifacts.drop_chunks("upload_1")
    assert await artifacts.get(digest) == data
    assert await everything(artifacts) == [f"artifacts/{digest[:2]}/{digest}"]


async def test_an_upload_of_which_something_is_gone_cannot_be_put_together(artifacts: ArtifactStore) -> None:
    with pytest.raises(FileNotFoundError):
        await artifacts.assemble("upload_1", 2)


async def test_a_chunk_that_does_not_pass_its_check_is_not_kept(artifacts: ArtifactStore) -> None:
    def refuse(chunk: bytes) -> None:
        raise ArtifactDigest("another one was announced")

    with pytest.raises(ArtifactDigest):
        await artifacts.put_chunk("upload_1", 0, [b"bytes"], refuse)
    assert await everything(artifacts) == []


async def test_what_broken_streams_left_is_swept_by_its_age_and_nothing_else(artifacts: ArtifactStore) -> None:
    await artifacts.put(DATA)
    for number in range(60):
        await artifacts._objects.put(f"incoming/parts/{number}", b"left")
    await artifacts.put_chunk("upload_1", 0, [b"bytes"], whatever)
    now = datetime.now(UTC)
    assert await artifacts.sweep_incoming(now - timedelta(hours=1)) == 0
    assert await artifacts.sweep_incoming(now + timedelta(hours=1)) == 60
    assert await artifacts.get(DIGEST) == DATA
    assert await artifacts.assemble("upload_1", 1) == b"bytes"


# ------------------------------------------------------------------------------------------------ away


async def test_a_store_that_is_away_says_so_soon_and_serves_when_it_is_back(
    s3_line: Line, s3_url: str, state_dir: Path
) -> None:
    store = ArtifactStore.open(s3_url, state_dir)
    await store.put(DATA)
    await store.put_chunk("upload_1", 0, [b"bytes"], whatever)
    s3_line.cut()
    for ask in (
        lambda: store.put(DATA),
        lambda: store.put_stream(DIGEST, stream_of([DATA])),
        lambda: store.size(DIGEST),
        lambda: store.get(DIGEST),
        lambda: store.stream(DIGEST, 0, 10),
        lambda: store.put_chunk("upload_1", 1, [b"bytes"], whatever),
        lambda: store.assemble("upload_1", 1),
        lambda: store.keep_upload("upload_1", DIGEST, DATA),
        lambda: store.drop_chunks("upload_1"),
        lambda: store.sweep_incoming(datetime.now(UTC)),
        store.ping,
    ):
        with pytest.raises(DependencyDown, match=r"^artifacts: "):
            await ask()
    s3_line.mend()
    await store.ping()
    assert await store.get(DIGEST) == DATA
    assert await store.assemble("upload_1", 1) == b"bytes"


async def test_a_bucket_that_is_none_is_named_by_the_readiness_and_not_to_anybody(
    worlds: Worlds, redis_server: RedisProcess, state_dir: Path, s3_line: Line
) -> None:
    world = await worlds.open(settings_for(state_dir, redis_server.url, artifacts_url="s3://no-such-bucket/there"))
    answer = await world.send("GET", "/readyz", None)
    assert (answer.status_code, answer.json()["checks"]["database"]) == (503, "ok")
    assert "FEDMKT_ARTIFACTS_URL" in answer.json()["checks"]["artifacts"]
    assert "no-such-bucket" not in answer.text


# ------------------------------------------------------------------------------------------------ the coordinator


async def kept_adapter(world: World, site: SiteUnderTest, view: RoundView) -> tuple[bytes, UploadReceipt]:
    """An adapter of three chunks, uploaded to its receipt."""
    blob = random.Random(site.name).randbytes(2 * CHUNK_BYTES + 4321)
    manifest = world.manifest(site, view, blob, "adapter")
    state = await world.send_chunks(site, manifest, blob)
    receipt = await world.ask(UploadReceipt, "POST", f"/v1/uploads/{state.upload_id}/complete", site)
    verify_receipt(receipt, manifest, [world.context.key.public_hex])
    return blob, receipt


async def test_a_whole_round_of_a_coordinator_with_s3(
    worlds: Worlds, redis_server: RedisProcess, state_dir: Path, s3_url: str
) -> None:
    world = await worlds.open(settings_for(state_dir, redis_server.url, artifacts_url=s3_url))
    await world.ready(config(average_adapters=True, scenario="homogeneous"))
    await world.request_rounds()
    view = await world.round()
    sent = {}
    for site in world.sites.values():
        await world.upload(site, view)
        blob, receipt = await kept_adapter(world, site, view)
        sent[receipt.digest] = blob
    await world.distill(averaged_adapter=await world.store_artifact(b"their average"))
    for site in world.sites.values():
        await world.report(site, view)
    assert (await world.round()).state == "completed"
    for digest, blob in sent.items():
        part = await world.send("GET", f"/v1/artifacts/{digest}", "worker", headers={"Range": "bytes=1048570-1048580"})
        assert (part.status_code, part.content) == (206, blob[1048570:1048581])
        whole = await world.send("GET", f"/v1/artifacts/{digest}", "worker")
        assert whole.content == blob
    left = await everything(world.context.artifacts)
    assert [path for path in left if not path.startswith(("artifacts/", "incoming/ping"))] == []
    assert not (state_dir / "objects").exists()


async def test_a_broken_line_to_the_coordinator_costs_the_rest_of_the_chunk_with_s3_too(
    worlds: Worlds, redis_server: RedisProcess, state_dir: Path, s3_url: str
) -> None:
    """The parts of a chunk lie in the bucket until the chunk is whole."""
    world = await worlds.open(settings_for(state_dir, redis_server.url, artifacts_url=s3_url))
    await world.ready(config(average_adapters=True, scenario="homogeneous"))
    await world.request_rounds()
    site, view = world.sites["north"], await world.round()
    blob = random.Random(3).randbytes(CHUNK_BYTES)
    state = await world.ask(UploadState, "POST", "/v1/uploads", site, world.manifest(site, view, blob, "adapter"))
    path = f"/v1/uploads/{state.upload_id}/chunks/0"
    for start, stop in ((0, 100_000), (100_000, 700_000)):
        span = {"Content-Range": f"bytes {start}-{stop - 1}/{CHUNK_BYTES}"}
        state = await world.ask(UploadState, "PUT", path, site, blob[start:stop], headers=span)
        assert state.arrived == {"0": stop}
    span = {"Content-Range": f"bytes 700000-{CHUNK_BYTES - 1}/{CHUNK_BYTES}"}
    state = await world.ask(UploadState, "PUT", path, site, blob[700_000:], headers=span)
    assert state.missing == ()
    receipt = await world.ask(UploadReceipt, "POST", f"/v1/uploads/{state.upload_id}/complete", site)
    assert receipt.digest == hashlib.sha256(blob).hexdigest()


async def test_uploads_wait_for_a_store_that_is_away_and_lose_nothing(
    worlds: Worlds, redis_server: RedisProcess, state_dir: Path, s3_line: Line, s3_url: str
) -> None:
    """A problem that names the store and says when to come again; the upload is not refused, its chunks stay."""
    world = await worlds.open(settings_for(state_dir, redis_server.url, artifacts_url=s3_url))
    await world.ready()
    await world.request_rounds()
    site, view = world.sites["north"], await world.round()
    public_set = f"/v1/artifacts/{world.public_set.digest}"
    blob = world.blob(site, view)
    state = await world.send_chunks(site, world.manifest(site, view, blob), blob)
    s3_line.cut()
    complete = f"/v1/uploads/{state.upload_id}/complete"
    for method, path, who, body in (
        ("POST", complete, site, None),
        ("PUT", f"/v1/uploads/{state.upload_id}/chunks/0", site, blob[:CHUNK_BYTES]),
        ("GET", public_set, site, None),
        ("PUT", f"/v1/artifacts/{DIGEST}", "worker", DATA),
        ("PUT", "/v1/me/vocabulary", site, site.words.to_bytes()),
    ):
        answer = await world.send(method, path, who, body)
        assert (answer.status_code, answer.json()["code"]) == (503, "artifacts.unavailable"), path
        assert answer.headers["retry-after"] == "2"
        assert "FEDMKT_ARTIFACTS_URL" in answer.json()["detail"]
    ready = await world.send("GET", "/readyz", None)
    assert (ready.status_code, ready.json()["checks"]["database"]) == (503, "ok")
    assert "uploads and downloads fail until then" in ready.json()["checks"]["artifacts"]
    s3_line.mend()
    receipt = await world.ask(UploadReceipt, "POST", complete, site)
    assert receipt.digest == hashlib.sha256(blob).hexdigest()
    assert "upload.refused" not in await world.event_kinds()
    world.context.dependencies._looked_at = float("-inf")
    assert (await world.ask(Health, "GET", "/readyz", None)).checks["artifacts"] == "ok"


def test_the_commands_of_the_page_on_operation_start_a_coordinator_with_s3(
    s3_server: S3Process, tmp_path: Path
) -> None:
    """As printed there, but for the store's address, the bucket's prefix and a free port."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "operations.md").read_text()
    (block,) = re.findall(r"^```bash\n(export AWS_ENDPOINT_URL.*?)^```$", page, re.MULTILINE | re.DOTALL)
    port = free_port()
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "AWS_ENDPOINT_URL": s3_server.url,
        "FEDMKT_PORT": str(port),
        "FEDMKT_OPERATOR_TOKEN": TOKENS["operator"],
        "FEDMKT_WORKER_TOKEN": TOKENS["worker"],
    }
    log = tmp_path / "log"
    with log.open("wb") as file:
        shell = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", block],
            cwd=tmp_path,
            env=environment,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        until_answers(log.read_text, shell, lambda: httpx.get(f"{url}/healthz"), httpx.TransportError)
        assert "s3://fedmkt/production can be written" in log.read_text()
        headers = {"Authorization": f"Bearer {TOKENS['worker']}"}
        with httpx.Client(base_url=url, headers=headers, timeout=30) as client:
            assert client.get("/readyz").json()["checks"]["artifacts"] == "ok"
            assert client.put(f"/v1/artifacts/{DIGEST}", content=DATA).status_code == 200
            assert client.get(f"/v1/artifacts/{DIGEST}").content == DATA
    finally:
        with suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGTERM)
        shell.wait(timeout=60)
    known = {name.removeprefix("AWS_").lower(): value for name, value in S3_VARIABLES.items()}
    bucket = from_url("s3://fedmkt", endpoint=s3_server.url, client_options={"allow_http": True}, **known)
    there = bucket.get(f"production/artifacts/{DIGEST[:2]}/{DIGEST}")
    assert bytes(there.bytes()) == DATA, "and nowhere else"
    assert not (tmp_path / "coordinator" / "objects").exists()


# ------------------------------------------------------------------------------------------------ races on a disk


def test_a_folder_that_is_written_to_and_cleared_at_once_troubles_nobody(
    state_dir: Path, request: pytest.FixtureRequest
) -> None:
    """One request drops an upload's chunks while another one keeps some: neither fails."""
    request.addfinalizer(partial(sys.setswitchinterval, sys.getswitchinterval()))
    sys.setswitchinterval(1e-6)  # threads meet in every place
    disk = _Disk(state_dir / "objects")
    path = "uploads/upload_1/whole"

    def write(number: int) -> None:
        for _ in range(1500):
            disk.write_at(path, number, b"x")

    def remove() -> None:
        for _ in range(1500):
            disk.remove(path)

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(write, 0), pool.submit(write, 1), pool.submit(remove), pool.submit(remove)]:
            done.result()
    disk.remove(path)
    assert list((state_dir / "objects" / "uploads").iterdir()) == []
