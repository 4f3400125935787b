"""The client against a real HTTP server on loopback: retries, credentials, resumed uploads and downloads."""

import hashlib
import random
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse

from fedmkt import __version__, signing
from fedmkt.client import (
    ArtifactCorrupt,
    ArtifactTooLarge,
    CoordinatorClient,
    CoordinatorProblem,
    CoordinatorUnreachable,
    ProtocolMismatch,
    RetryPolicy,
    SiteKey,
    StaticToken,
    UnexpectedAnswer,
    UploadStuck,
)
from fedmkt.local_server import serve_in_thread
from fedmkt.protocol import CHUNK_BYTES, PROTOCOL_VERSION, Manifest, UploadReceipt
from fedmkt.session import Credentials

SITE_ID = "site_0123456789abcdef"
ROUND_ID = "round_0123456789abcdef"
UPLOAD_ID = "upload_0123456789abcdef"
PATIENT = RetryPolicy(first_wait_s=0.001, max_wait_s=0.002, patience_s=20)


@dataclass
class Server:
    """What the little coordinator below was asked, and how it shall misbehave."""

    url: str = ""
    key: Ed25519PrivateKey = field(default_factory=signing.new_key)
    site_key: Ed25519PrivateKey = field(default_factory=signing.new_key)
    seen: list[Request] = field(default_factory=list)
    answers: list[Response] = field(default_factory=list)  # given, first to last, before the real ones
    token_life_s: int = 3600
    tokens: list[str] = field(default_factory=list)
    valid_tokens: set[str] = field(default_factory=set)
    jtis: set[str] = field(default_factory=set)
    manifest: Manifest | None = None
    chunks: dict[int, bytes] = field(default_factory=dict)
    parts: dict[int, bytes] = field(default_factory=dict)
    chunk_puts: list[int] = field(default_factory=list)  # chunks that became whole
    spans: list[str] = field(default_factory=list)
    spoil: int = 0  # chunks that the line spoils
    lose_chunk_at_complete: list[int] = field(default_factory=list)
    receipt_changes: dict[str, object] = field(default_factory=dict)
    artifact: bytes = b""
    break_after: list[int] = field(default_factory=list)  # bytes after which each next download breaks off
    ranges: list[str | None] = field(default_factory=list)
    ignore_range: bool = False

    def count(self, path: str) -> int:
        return sum(request.url.path == path for request in self.seen)


def problem(status: int, code: str, detail: str, headers: dict[str, str] | None = None) -> Response:
    body = {"type": f"urn:{code}", "title": "No", "status": status, "code": code, "detail": detail}
    return JSONResponse(body, status, headers, media_type="application/problem+json")


def build(server: Server) -> FastAPI:
    app = FastAPI()

    @app.middleware("http")
    async def note(request: Request, call: Callable[[Request], object]) -> Response:
        server.seen.append(request)
        if server.answers and request.url.path != "/v1/token":
            return server.answers.pop(0)
        return await call(request)  # type: ignore[misc, no-any-return]  # Starlette's own, awkward, type

    @app.get("/version")
    async def version() -> dict[str, object]:
        return {"version": "9.9.9", "protocol_version": PROTOCOL_VERSION}

    @app.post("/v1/token")
    async def token(request: Request) -> dict[str, object]:
        assertion = (await request.json())["assertion"]
        claims = jwt.decode(assertion, server.site_key.public_key(), algorithms=["EdDSA"], audience="fedmkt")
        assert claims["iss"] == claims["sub"] == SITE_ID
        assert claims["exp"] - claims["iat"] == 60
        assert claims["jti"] not in server.jtis
        server.jtis.add(claims["jti"])
        server.tokens.append(f"token-{len(server.tokens)}")
        server.valid_tokens = {server.tokens[-1]}
        return {"access_token": server.tokens[-1], "expires_in_s": server.token_life_s}

    @app.put("/v1/me/model")
    async def model(request: Request) -> dict[str, str]:
        if request.headers.get("authorization", "").removeprefix("Bearer ") not in server.valid_tokens:
            raise HTTPException(401)
        return {}

    @app.post("/v1/uploads")
    async def announce(manifest: Manifest) -> dict[str, object]:
        signing.verify_manifest(manifest, signing.public_hex(server.site_key))
        server.manifest = manifest
        return upload_state()

    def upload_state() -> dict[str, object]:
        assert server.manifest is not None
        missing = [index for index in range(len(server.manifest.chunks)) if index not in server.chunks]
        arrived = {index: len(part) for index, part in server.parts.items() if part}
        return {"upload_id": UPLOAD_ID, "missing": missing, "complete": False, "arrived": arrived}

    @app.put("/v1/uploads/{upload_id}/chunks/{index}")
    async def chunk(upload_id: str, index: int, request: Request) -> Response:
        span, _, total = request.headers["content-range"].removeprefix("bytes ").partition("/")
        server.spans.append(f"{index}: {span}")
        if span != "*":
            have = server.parts.pop(index, b"")
            assert int(span.partition("-")[0]) == len(have)
            server.parts[index] = have + await request.body()
            if len(server.parts[index]) == int(total):
                if server.spoil:
                    server.spoil -= 1
                    del server.parts[index]
                    return problem(422, "upload.chunk_digest", "not the one that was announced")
                server.chunks[index] = server.parts.pop(index)
                server.chunk_puts.append(index)
        return JSONResponse(upload_state())

    @app.post("/v1/uploads/{upload_id}/complete")
    async def complete(upload_id: str) -> Response:
        assert server.manifest is not None
        for index in server.lose_chunk_at_complete:
            del server.chunks[index]
        server.lose_chunk_at_complete = []
        if len(server.chunks) < len(server.manifest.chunks):
            return problem(409, "upload.incomplete", "chunks are missing")
        blob = b"".join(server.chunks[index] for index in sorted(server.chunks))
        receipt = UploadReceipt(
            upload_id=upload_id,
            round_id=ROUND_ID,
            site="north",
            kind="knowledge",
            digest=hashlib.sha256(blob).hexdigest(),
            size_bytes=len(blob),
            accepted_at=datetime(2026, 1, 2, tzinfo=UTC),
            signature="",
        )
        signed = signing.sign_receipt(server.key, receipt)
        return JSONResponse(signed.model_copy(update=server.receipt_changes).model_dump(mode="json"))

    @app.get("/v1/artifacts/{digest}")
    async def artifact(digest: str, request: Request) -> Response:
        asked = request.headers.get("range")
        server.ranges.append(asked)
        start = 0 if asked is None or server.ignore_range else int(asked.removeprefix("bytes=").removesuffix("-"))
        if start >= len(server.artifact) > 0:
            return problem(416, "artifact.range", "nothing there")
        rest = server.artifact[start:]
        stop = server.break_after.pop(0) if server.break_after else None

        async def body() -> object:
            yield rest[:stop]
            if stop is not None:
                raise ConnectionResetError("the line broke")

        headers = {"Content-Length": str(len(rest))}
        return StreamingResponse(body(), 206 if start else 200, headers)  # type: ignore[arg-type]  # async generator

    return app


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()
    with serve_in_thread(build(state)) as port:
        state.url = f"http://127.0.0.1:{port}"
        yield state


@pytest.fixture
def open_client(server: Server) -> Iterator[Callable[..., CoordinatorClient]]:
    opened: list[CoordinatorClient] = []

    def make(credentials: Credentials = None, *, retry: RetryPolicy = PATIENT, **more: object) -> CoordinatorClient:
        opened.append(CoordinatorClient(server.url, credentials, retry=retry, **more))  # type: ignore[arg-type]
        return opened[-1]

    yield make
    for client in opened:
        client.close()


Open = Callable[..., CoordinatorClient]


# --------------------------------------------------------------------------------------------- retries and problems


def test_a_busy_coordinator_is_asked_again_and_not_before_it_said(server: Server, open_client: Open) -> None:
    waits: list[float] = []
    server.answers = [problem(503, "busy", "later", {"Retry-After": "7"}), problem(429, "slow", "later")]
    assert open_client(wait=waits.append).version().version == "9.9.9"
    assert waits[0] == 7.0
    assert 0 < waits[1] <= 0.002
    assert server.count("/version") == 3


def test_retry_after_may_be_a_date(server: Server, open_client: Open) -> None:
    waits: list[float] = []
    at = format_datetime(datetime.now(UTC) + timedelta(seconds=12), usegmt=True)
    server.answers = [problem(502, "busy", "later", {"Retry-After": at})]
    open_client(wait=waits.append).version()
    assert 10 < waits[0] <= 12


def test_waits_double_up_to_the_longest_and_are_never_shorter_than_half() -> None:
    random.seed(5)
    policy = RetryPolicy(first_wait_s=1.0, max_wait_s=10.0)
    for attempt, longest in [(0, 1.0), (1, 2.0), (2, 4.0), (3, 8.0), (4, 10.0), (400, 10.0)]:
        pauses = [policy.pause_s(attempt, None) for _ in range(50)]
        assert longest / 2 <= min(pauses)
        assert max(pauses) <= longest
        assert len(set(pauses)) > 1


def test_a_refusal_is_not_retried_and_carries_its_code_and_detail(server: Server, open_client: Open) -> None:
    server.answers = [problem(409, "round.closed", "round 3 closed at 12:00; round 4 opens at 13:00")]
    with pytest.raises(CoordinatorProblem, match="round 4 opens at 13:00") as caught:
        open_client().version()
    assert (caught.value.code, caught.value.status, caught.value.title) == ("round.closed", 409, "No")
    assert caught.value.detail == "round 3 closed at 12:00; round 4 opens at 13:00"
    assert server.count("/version") == 1


def test_when_patience_ends_the_last_problem_is_raised(server: Server, open_client: Open) -> None:
    server.answers = [problem(503, "busy", f"answer {n}") for n in range(1000)]
    with pytest.raises(CoordinatorProblem, match="answer") as caught:
        open_client(retry=RetryPolicy(first_wait_s=0.001, max_wait_s=0.01, patience_s=0.5)).version()
    assert caught.value.code == "busy"
    assert 1 < server.count("/version") < 1000


def test_an_unreachable_coordinator_is_named_with_the_number_of_attempts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    client = CoordinatorClient(
        f"http://127.0.0.1:{port}/", retry=RetryPolicy(first_wait_s=0.01, max_wait_s=0.01, patience_s=0.1)
    )
    with client, pytest.raises(CoordinatorUnreachable, match=rf"127\.0\.0\.1:{port} failed \d\d? times") as caught:
        client.version()
    assert isinstance(caught.value.__cause__, httpx.ConnectError)


def test_a_coordinator_that_comes_up_late_is_found() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    stop, state = threading.Event(), Server()

    def serve_later() -> None:
        stop.wait(0.3)
        with serve_in_thread(build(state), port=port):
            stop.wait(20)

    later = threading.Thread(target=serve_later)
    later.start()
    with CoordinatorClient(f"http://127.0.0.1:{port}", retry=RetryPolicy(0.01, 0.05, 15)) as client:
        assert client.version().version == "9.9.9"
    stop.set()
    later.join()


def test_waiting_can_be_interrupted(server: Server, open_client: Open) -> None:
    def stopped(seconds: float) -> None:
        raise KeyboardInterrupt

    server.answers = [problem(503, "busy", "later")]
    with pytest.raises(KeyboardInterrupt):
        open_client(wait=stopped).version()
    assert server.count("/version") == 1


def test_a_page_of_a_proxy_becomes_a_problem_that_quotes_it(server: Server, open_client: Open) -> None:
    server.answers = [HTMLResponse("<h1>Blocked by policy 17</h1>", 403)]
    with pytest.raises(CoordinatorProblem, match="answered 403: <h1>Blocked by policy 17</h1>") as caught:
        open_client().version()
    assert caught.value.code == "http.403"


def test_a_redirect_is_refused_so_that_no_credential_follows_it(server: Server, open_client: Open) -> None:
    server.answers = [Response(status_code=307, headers={"Location": "https://elsewhere.example/"})]
    with pytest.raises(CoordinatorProblem, match=r"redirects to https://elsewhere\.example/: configure that address"):
        open_client(StaticToken("secret")).version()
    assert server.count("/version") == 1


def test_an_answer_of_another_program_is_named(server: Server, open_client: Open) -> None:
    server.answers = [JSONResponse({"hello": "world"})]
    with pytest.raises(UnexpectedAnswer, match="GET /version did not answer with a Version"):
        open_client().version()


@pytest.mark.parametrize(("there", "remedy"), [(PROTOCOL_VERSION + 1, "this program"), (0, "the coordinator")])
def test_the_handshake_names_both_versions_and_the_remedy(
    server: Server, open_client: Open, there: int, remedy: str
) -> None:
    server.answers = [JSONResponse({"version": "7.7.7", "protocol_version": there})]
    with pytest.raises(ProtocolMismatch) as caught:
        open_client().check_version()
    assert f"fedmkt 7.7.7) speaks protocol {there}" in caught.value.detail
    assert f"fedmkt {__version__}) speaks {PROTOCOL_VERSION}: upgrade {remedy}" in caught.value.detail


def test_the_user_agent_names_both_versions(server: Server, open_client: Open) -> None:
    open_client().check_version()
    assert server.seen[0].headers["user-agent"].startswith(f"fedmkt/{__version__} protocol/{PROTOCOL_VERSION} python/")


# ------------------------------------------------------------------------------------------------------ credentials


def put_model(client: CoordinatorClient) -> None:
    client.session.request("PUT", "/v1/me/model", body=b"{}")


def test_a_static_token_is_sent_and_not_shown(server: Server, open_client: Open) -> None:
    server.valid_tokens = {"s3cret"}
    put_model(open_client(StaticToken("s3cret")))
    assert "s3cret" not in repr(StaticToken("s3cret"))


def test_a_static_token_that_is_refused_is_not_tried_twice(server: Server, open_client: Open) -> None:
    with pytest.raises(CoordinatorProblem) as caught:
        put_model(open_client(StaticToken("wrong")))
    assert caught.value.status == 401
    assert server.count("/v1/me/model") == 1


def test_a_site_buys_one_access_token_for_many_calls(server: Server, open_client: Open) -> None:
    client = open_client(SiteKey(SITE_ID, server.site_key))
    for _ in range(3):
        put_model(client)
    assert server.tokens == ["token-0"]


def test_a_token_about_to_end_is_renewed_before_the_call(server: Server, open_client: Open) -> None:
    server.token_life_s = 0
    client = open_client(SiteKey(SITE_ID, server.site_key))
    put_model(client)
    put_model(client)
    assert server.tokens == ["token-0", "token-1"]
    assert server.count("/v1/me/model") == 2, "no call was refused on the way"


def test_a_token_that_the_coordinator_forgot_is_renewed_once(server: Server, open_client: Open) -> None:
    client = open_client(SiteKey(SITE_ID, server.site_key))
    put_model(client)
    server.valid_tokens = set()
    put_model(client)
    assert server.tokens == ["token-0", "token-1"]
    assert server.count("/v1/me/model") == 3


def test_a_site_that_stays_refused_gives_up_after_one_renewal(server: Server, open_client: Open) -> None:
    server.answers = [problem(401, "token.invalid", "no"), problem(401, "token.invalid", "site was revoked")]
    with pytest.raises(CoordinatorProblem, match="site was revoked"):
        put_model(open_client(SiteKey(SITE_ID, server.site_key)))
    assert server.count("/v1/me/model") == 2


def test_many_threads_share_one_token(server: Server, open_client: Open) -> None:
    client = open_client(SiteKey(SITE_ID, server.site_key))
    threads = [threading.Thread(target=put_model, args=[client]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.tokens == ["token-0"]
    assert server.count("/v1/me/model") == 8
    assert client.traffic.up == 8 * len(b"{}") + int(
        next(request for request in server.seen if request.url.path == "/v1/token").headers["content-length"]
    )


# ---------------------------------------------------------------------------------------------------------- uploads


def upload(
    client: CoordinatorClient, server: Server, blob: bytes, receipt_keys: list[str] | None = None
) -> UploadReceipt:
    keys = [signing.public_hex(server.key)] if receipt_keys is None else receipt_keys
    return client.upload("knowledge", ROUND_ID, blob, server.site_key, keys)


def test_an_upload_arrives_whole_and_its_bytes_are_counted(server: Server, open_client: Open) -> None:
    blob = random.Random(1).randbytes(2 * CHUNK_BYTES + 5)
    client = open_client()
    receipt = upload(client, server, blob)
    assert b"".join(server.chunks[index] for index in range(3)) == blob
    assert receipt.digest == hashlib.sha256(blob).hexdigest()
    assert 0 < client.traffic.up - len(blob) < 2000, "the manifest, nothing else"
    assert 0 < client.traffic.down < 4000


def test_only_missing_chunks_are_sent(server: Server, open_client: Open) -> None:
    blob = random.Random(2).randbytes(4 * CHUNK_BYTES)
    server.chunks = {0: blob[:CHUNK_BYTES], 2: blob[2 * CHUNK_BYTES : 3 * CHUNK_BYTES]}
    upload(open_client(), server, blob)
    assert sorted(server.chunk_puts) == [1, 3]


def test_a_chunk_lost_by_the_coordinator_is_sent_again(server: Server, open_client: Open) -> None:
    blob = random.Random(3).randbytes(CHUNK_BYTES + 1)
    server.lose_chunk_at_complete = [1]
    upload(open_client(), server, blob)
    assert sorted(server.chunk_puts) == [0, 1, 1]


def test_a_chunk_goes_on_where_an_earlier_process_left_it(server: Server, open_client: Open) -> None:
    blob = random.Random(13).randbytes(100_000)
    server.parts = {0: blob[:90_000]}
    client = open_client()
    upload(client, server, blob)
    assert server.spans == ["0: 90000-99999"]
    assert server.chunks[0] == blob
    assert client.traffic.up < 12_000


def test_parts_are_small_at_first_and_grow_on_a_quick_line(server: Server, open_client: Open) -> None:
    upload(open_client(), server, random.Random(14).randbytes(CHUNK_BYTES))
    assert server.spans == ["0: 0-262143", "0: 262144-786431", "0: 786432-1048575"]


def test_a_chunk_that_the_line_spoils_is_sent_again(server: Server, open_client: Open) -> None:
    blob = random.Random(15).randbytes(1000)
    server.spoil = 2
    assert upload(open_client(), server, blob).size_bytes == 1000
    assert server.spans == ["0: 0-999"] * 3
    server.chunks, server.spoil = {}, 100
    with pytest.raises(UploadStuck, match="sent 5 times"):
        upload(open_client(), server, blob)


def test_an_upload_survives_failures_in_the_middle(server: Server, open_client: Open) -> None:
    busy = problem(503, "busy", "later")
    server.answers = [busy, busy]
    upload(open_client(), server, b"abc")
    server.answers = [busy]
    assert upload(open_client(), server, b"abc").size_bytes == 3
    assert server.chunk_puts == [0]


def test_a_receipt_for_something_else_is_refused(server: Server, open_client: Open) -> None:
    server.receipt_changes = {"size_bytes": 4}
    with pytest.raises(signing.BadReceipt, match=r", 4\), the upload was .*, 3\)"):
        upload(open_client(), server, b"abc")


def test_a_receipt_signed_by_another_key_is_refused(server: Server, open_client: Open) -> None:
    stranger = signing.public_hex(signing.new_key())
    with pytest.raises(signing.BadReceipt, match=f"none of the coordinator's 1 known keys \\({stranger[:8]}"):
        upload(open_client(), server, b"abc", [stranger])


def test_a_receipt_signed_by_a_rotated_key_is_accepted(server: Server, open_client: Open) -> None:
    keys = [signing.public_hex(signing.new_key()), signing.public_hex(server.key)]
    assert upload(open_client(), server, b"abc", keys).site == "north"


# -------------------------------------------------------------------------------------------------------- artifacts


def serve_artifact(server: Server, size: int, seed: int) -> str:
    server.artifact = random.Random(seed).randbytes(size)
    return hashlib.sha256(server.artifact).hexdigest()


def test_a_broken_download_goes_on_where_it_stopped(server: Server, open_client: Open, tmp_path: Path) -> None:
    digest = serve_artifact(server, 300_000, 4)
    server.break_after = [100_000, 50_000]
    path = open_client().fetch_artifact(digest, tmp_path / "artifacts")
    assert path.read_bytes() == server.artifact
    assert server.ranges == [None, "bytes=100000-", "bytes=150000-"]
    assert [file.name for file in path.parent.iterdir()] == [digest]


def test_a_download_is_taken_up_by_the_next_process(server: Server, open_client: Open, tmp_path: Path) -> None:
    digest = serve_artifact(server, 1000, 5)
    (tmp_path / f"{digest}.part").write_bytes(server.artifact[:400])
    client = open_client()
    assert client.fetch_artifact(digest, tmp_path).read_bytes() == server.artifact
    assert server.ranges == ["bytes=400-"]
    assert client.traffic.down == 600


def test_a_whole_part_needs_no_more_bytes(server: Server, open_client: Open, tmp_path: Path) -> None:
    digest = serve_artifact(server, 1000, 6)
    (tmp_path / f"{digest}.part").write_bytes(server.artifact)
    assert open_client().fetch_artifact(digest, tmp_path).read_bytes() == server.artifact


def test_a_part_longer_than_the_artifact_is_fetched_anew(server: Server, open_client: Open, tmp_path: Path) -> None:
    digest = serve_artifact(server, 1000, 7)
    (tmp_path / f"{digest}.part").write_bytes(b"x" * 2000)
    assert open_client().fetch_artifact(digest, tmp_path).read_bytes() == server.artifact
    assert server.ranges == ["bytes=2000-", None]


def test_a_coordinator_without_ranges_sends_it_whole(server: Server, open_client: Open, tmp_path: Path) -> None:
    digest = serve_artifact(server, 300_000, 8)
    server.ignore_range = True
    server.break_after = [100_000]
    assert open_client().fetch_artifact(digest, tmp_path).read_bytes() == server.artifact


def test_a_download_that_never_gets_further_ends_with_patience(
    server: Server, open_client: Open, tmp_path: Path
) -> None:
    digest = serve_artifact(server, 300_000, 9)
    server.ignore_range = True
    server.break_after = [100_000] * 10_000
    with pytest.raises(CoordinatorUnreachable):
        open_client(retry=RetryPolicy(0.001, 0.01, 0.2)).fetch_artifact(digest, tmp_path)


def test_an_artifact_that_is_not_its_name_is_refused_and_removed(
    server: Server, open_client: Open, tmp_path: Path
) -> None:
    serve_artifact(server, 1000, 10)
    with pytest.raises(ArtifactCorrupt, match=f"artifact {'0' * 64} came with SHA-256"):
        open_client().fetch_artifact("0" * 64, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_artifact_over_the_limit_is_refused(server: Server, open_client: Open, tmp_path: Path) -> None:
    digest = serve_artifact(server, 1000, 11)
    with pytest.raises(ArtifactTooLarge, match="longer than 999 bytes"):
        open_client().fetch_artifact(digest, tmp_path, max_bytes=999)


def test_an_artifact_that_lies_there_is_not_fetched(server: Server, open_client: Open, tmp_path: Path) -> None:
    digest = serve_artifact(server, 10, 12)
    client = open_client()
    client.fetch_artifact(digest, tmp_path)
    client.fetch_artifact(digest, tmp_path)
    assert len(server.ranges) == 1


# ------------------------------------------------------------------------------------------------------------- keys


def test_a_key_file_is_private_and_never_overwritten(tmp_path: Path) -> None:
    key, path = signing.new_key(), tmp_path / "key.pem"
    signing.save_key(path, key)
    assert path.stat().st_mode & 0o777 == 0o600
    assert signing.public_hex(signing.load_key(path)) == signing.public_hex(key)
    with pytest.raises(FileExistsError):
        signing.save_key(path, signing.new_key())
    assert [file.name for file in tmp_path.iterdir()] == ["key.pem"]


def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    signing.save_key(tmp_path / "key.pem", signing.new_key())
    (tmp_path / "key.pem").chmod(0o644)
    with pytest.raises(signing.KeyUnreadable, match="mode 0644, at most 0600"):
        signing.load_key(tmp_path / "key.pem")


def test_a_file_that_is_no_key_is_refused(tmp_path: Path) -> None:
    (tmp_path / "key.pem").write_text("hello")
    (tmp_path / "key.pem").chmod(0o600)
    with pytest.raises(signing.KeyUnreadable, match=r"key\.pem is not an unencrypted PEM"):
        signing.load_key(tmp_path / "key.pem")


def test_a_changed_manifest_no_longer_fits_its_signature() -> None:
    key = signing.new_key()
    manifest = signing.sign_manifest(key, "knowledge", ROUND_ID, b"abc")
    signing.verify_manifest(manifest, signing.public_hex(key))
    for change in ({"kind": "adapter"}, {"round_id": "round_ffffffffffffffff"}, {"size_bytes": 4}):
        with pytest.raises(signing.BadSignature):
            signing.verify_manifest(manifest.model_copy(update=change), signing.public_hex(key))
    with pytest.raises(signing.BadSignature):
        signing.verify_manifest(manifest, signing.public_hex(signing.new_key()))
