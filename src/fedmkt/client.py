"""The coordinator's API, typed: one method a call. Used by sites, the LLM server, operators' commands and tests.

    with CoordinatorClient("https://fedmkt.example.org", SiteKey(site_id, key)) as client:
        client.check_version()
        task = client.next_task(wait_s=30)

Refusals arrive as `CoordinatorProblem`, lost connections as `CoordinatorUnreachable` once patience has ended.
"""

import hashlib
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedmkt import __version__
from fedmkt.errors import Refusal
from fedmkt.protocol import (
    CHUNK_BYTES,
    PROTOCOL_VERSION,
    AdapterPage,
    ApplyReport,
    Enrolled,
    Enrolment,
    EnrolmentToken,
    EnrolmentTokenRequest,
    EventPage,
    FederationConfig,
    FederationPage,
    FederationView,
    Health,
    Heartbeat,
    HeartbeatReply,
    JobCompletion,
    JobFailure,
    JobView,
    KeysView,
    LlmRegistration,
    PublicSetReceipt,
    QueueView,
    RoundPage,
    RoundRequest,
    RoundView,
    SiteModel,
    SiteSelf,
    TaskEnvelope,
    UploadReceipt,
    UploadState,
    Version,
    VocabularyReceipt,
)
from fedmkt.session import (
    CoordinatorProblem,
    CoordinatorUnreachable,
    Credentials,
    RetryPolicy,
    Session,
    SiteKey,
    StaticToken,
    Traffic,
    UnexpectedAnswer,
)
from fedmkt.signing import UploadKind, public_hex, sign_manifest, verify_receipt

__all__ = [
    "CoordinatorClient",
    "CoordinatorProblem",
    "CoordinatorUnreachable",
    "Credentials",
    "RetryPolicy",
    "SiteKey",
    "StaticToken",
    "Traffic",
    "UnexpectedAnswer",
]

MAX_ARTIFACT_BYTES = 2 << 30
UPLOAD_TURNS = 5  # announce, send what is missing, complete; again if the coordinator lost chunks meanwhile


class ProtocolMismatch(Refusal):
    status = 426
    code = "protocol.mismatch"
    title = "Coordinator and client speak different protocols"


class ArtifactCorrupt(Refusal):
    status = 502
    code = "artifact.corrupt"
    title = "The artifact is not what its name says"


class ArtifactTooLarge(Refusal):
    status = 413
    code = "artifact.too_large"
    title = "The artifact is too large"


class UploadStuck(Refusal):
    status = 502
    code = "upload.stuck"
    title = "The upload does not become complete"


class CoordinatorClient:
    """Synchronous client of one coordinator; safe to use from several threads."""

    def __init__(
        self,
        base_url: str,
        credentials: Credentials = None,
        *,
        retry: RetryPolicy | None = None,
        timeout_s: float = 60.0,
        transport: httpx.BaseTransport | None = None,
        wait: Callable[[float], object] = time.sleep,
    ) -> None:
        """As for `Session`: `wait` may raise to stop early, `transport` replaces the network."""
        self.session = Session(base_url, credentials, retry=retry, timeout_s=timeout_s, transport=transport, wait=wait)
        self._read = self.session.read
        self._send = self.session.request

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self.session.close()

    @property
    def traffic(self) -> Traffic:
        return self.session.traffic

    # ------------------------------------------------------------------------------------------ operations

    def version(self) -> Version:
        return self._read(Version, self._send("GET", "/version", public=True))

    def check_version(self) -> Version:
        """The handshake before anything else. Raises ProtocolMismatch with both versions and the remedy."""
        there = self.version()
        if there.protocol_version == PROTOCOL_VERSION:
            return there
        older = "this program" if there.protocol_version > PROTOCOL_VERSION else "the coordinator"
        raise ProtocolMismatch(
            f"the coordinator (fedmkt {there.version}) speaks protocol {there.protocol_version}, "
            f"this program (fedmkt {__version__}) speaks {PROTOCOL_VERSION}: upgrade {older}"
        )

    def health(self) -> Health:
        return self._read(Health, self._send("GET", "/healthz", public=True))

    def ready(self) -> Health:
        return self._read(Health, self._send("GET", "/readyz", public=True))

    def keys(self) -> KeysView:
        return self._read(KeysView, self._send("GET", "/v1/keys", public=True))

    # ------------------------------------------------------------------------------------------ federations

    def create_federation(self, config: FederationConfig) -> FederationView:
        return self._read(FederationView, self._send("POST", "/v1/federations", body=config, headers=_once()))

    def federation(self, federation_id: str) -> FederationView:
        return self._read(FederationView, self._send("GET", f"/v1/federations/{federation_id}"))

    def federations(self) -> Iterator[FederationView]:
        """All that this credential may see, page by page."""
        cursor: str | None = None
        while True:
            answer = self._send("GET", "/v1/federations", params=_cursor(cursor))
            page = self._read(FederationPage, answer)
            yield from page.items
            if (cursor := page.next_cursor) is None:
                return

    def put_public_set(self, federation_id: str, jsonl: bytes) -> PublicSetReceipt:
        headers = {"Content-Type": "application/jsonl"}
        answer = self._send("PUT", f"/v1/federations/{federation_id}/public-set", body=jsonl, headers=headers)
        return self._read(PublicSetReceipt, answer)

    def issue_enrolment_token(self, federation_id: str, site: str) -> EnrolmentToken:
        path = f"/v1/federations/{federation_id}/enrolment-tokens"
        return self._read(EnrolmentToken, self._send("POST", path, body=EnrolmentTokenRequest(site=site)))

    def revoke_site(self, federation_id: str, site: str) -> None:
        """From now on none of the site's credentials works."""
        self._send("POST", f"/v1/federations/{federation_id}/sites/{site}/revoke")

    def register_llm(self, federation_id: str, registration: LlmRegistration) -> FederationView:
        answer = self._send("PUT", f"/v1/federations/{federation_id}/llm", body=registration)
        return self._read(FederationView, answer)

    def adapters(self, federation_id: str, cursor: str | None = None) -> AdapterPage:
        answer = self._send("GET", f"/v1/federations/{federation_id}/adapters", params=_cursor(cursor))
        return self._read(AdapterPage, answer)

    # ------------------------------------------------------------------------------------------ rounds

    def request_rounds(self, federation_id: str, count: int = 1) -> FederationView:
        path = f"/v1/federations/{federation_id}/rounds"
        return self._read(FederationView, self._send("POST", path, body=RoundRequest(count=count), headers=_once()))

    def rounds(self, federation_id: str, cursor: str | None = None) -> RoundPage:
        answer = self._send("GET", f"/v1/federations/{federation_id}/rounds", params=_cursor(cursor))
        return self._read(RoundPage, answer)

    def round(self, round_id: str) -> RoundView:
        return self._read(RoundView, self._send("GET", f"/v1/rounds/{round_id}"))

    def cancel_round(self, round_id: str) -> RoundView:
        return self._read(RoundView, self._send("POST", f"/v1/rounds/{round_id}/cancel"))

    def events(self, federation_id: str, cursor: str | None = None) -> EventPage:
        answer = self._send("GET", f"/v1/federations/{federation_id}/events", params=_cursor(cursor))
        return self._read(EventPage, answer)

    # ------------------------------------------------------------------------------------------ sites

    def enrol(self, token: str, key: Ed25519PrivateKey) -> Enrolled:
        enrolment = Enrolment(token=token, public_key=public_hex(key))
        return self._read(Enrolled, self._send("POST", "/v1/enrol", body=enrolment, public=True))

    def me(self) -> SiteSelf:
        return self._read(SiteSelf, self._send("GET", "/v1/me"))

    def put_vocabulary(self, vocabulary: bytes) -> VocabularyReceipt:
        return self._read(VocabularyReceipt, self._send("PUT", "/v1/me/vocabulary", body=vocabulary))

    def put_model(self, model: SiteModel) -> None:
        self._send("PUT", "/v1/me/model", body=model)

    def next_task(self, wait_s: float = 30.0) -> TaskEnvelope:
        """The one thing this site should do now; the coordinator holds the answer back for up to `wait_s`."""
        answer = self._send("GET", "/v1/me/task", params={"wait_s": wait_s}, timeout_s=wait_s + self.session.timeout_s)
        return self._read(TaskEnvelope, answer)

    def report(self, round_id: str, report: ApplyReport) -> None:
        self._send("POST", f"/v1/rounds/{round_id}/report", body=report)

    # ------------------------------------------------------------------------------------------ uploads

    def upload(
        self, kind: UploadKind, round_id: str, blob: bytes, key: Ed25519PrivateKey, receipt_keys: Sequence[str]
    ) -> UploadReceipt:
        """Announce, send the chunks the coordinator lacks, complete; returns the verified receipt.

        Safe to repeat and to take up again after any interruption: chunks already there are not sent twice. Raises
        BadReceipt when the receipt was signed with none of `receipt_keys` (hex) or speaks of another upload.
        """
        manifest = sign_manifest(key, kind, round_id, blob)
        for _ in range(UPLOAD_TURNS):
            state = self._read(UploadState, self._send("POST", "/v1/uploads", body=manifest))
            for index in state.missing:
                chunk = blob[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]
                self._send("PUT", f"/v1/uploads/{state.upload_id}/chunks/{index}", body=chunk)
            try:
                answer = self._send("POST", f"/v1/uploads/{state.upload_id}/complete")
            except CoordinatorProblem as problem:
                if problem.code != "upload.incomplete":
                    raise
                continue
            receipt = self._read(UploadReceipt, answer)
            verify_receipt(receipt, manifest, receipt_keys)
            return receipt
        raise UploadStuck(
            f"{len(manifest.chunks)} chunks were sent {UPLOAD_TURNS} times and some are still missing: "
            "look at the coordinator's artifact store"
        )

    # ------------------------------------------------------------------------------------------ artifacts

    def put_artifact(self, data: bytes) -> str:
        """Store bytes under their SHA-256, which is returned. Worker and operator only."""
        digest = hashlib.sha256(data).hexdigest()
        self._send("PUT", f"/v1/artifacts/{digest}", body=data, timeout_s=10 * self.session.timeout_s)
        return digest

    def fetch_artifact(self, digest: str, folder: Path, *, max_bytes: int = MAX_ARTIFACT_BYTES) -> Path:
        """The artifact as a file in `folder`, named by its digest; taken from there when it lies there already.

        An interrupted download is continued where it stopped, in this call or a later one. The folder belongs to one
        process, which fetches an artifact once at a time.
        """
        target = folder / digest
        if target.exists():
            return target
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"{digest}.part"
        while not self.session.persist(f"GET artifact {digest}", lambda: self._download(digest, part, max_bytes)):
            pass  # the line broke, but bytes came: patience starts anew
        found = _sha256(part)
        if found != digest:
            part.unlink()
            raise ArtifactCorrupt(f"artifact {digest} came with SHA-256 {found}: fetch it again")
        part.replace(target)
        return target

    def _download(self, digest: str, part: Path, max_bytes: int) -> bool:
        """Append to `part` what is missing. True when it is whole; False when the line broke after some bytes."""
        have = part.stat().st_size if part.exists() else 0
        headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
        try:
            with (
                self.session.stream("GET", f"/v1/artifacts/{digest}", headers=headers) as response,
                part.open("ab" if response.status_code == 206 else "wb") as file,
            ):
                for piece in response.iter_bytes():  # as it arrives: nothing waits in a buffer when the line breaks
                    if file.tell() + len(piece) > max_bytes:
                        raise ArtifactTooLarge(f"artifact {digest} is longer than {max_bytes} bytes")
                    file.write(piece)
        except httpx.TransportError:
            if not part.exists() or part.stat().st_size <= have:  # no progress: this counts against patience
                raise
            return False
        except CoordinatorProblem as problem:
            if problem.problem.status != 416 or have == 0:
                raise
            # The part is as long as the artifact or longer. Its digest decides; if wrong, it is fetched anew.
            if _sha256(part) != digest:
                part.unlink()
                return False
        return True

    # ------------------------------------------------------------------------------------------ jobs

    def queue(self) -> QueueView:
        return self._read(QueueView, self._send("GET", "/v1/jobs/queue"))

    def claim(self, job_id: str) -> JobView:
        return self._read(JobView, self._send("POST", f"/v1/jobs/{job_id}/claim", headers=_once()))

    def heartbeat(self, job_id: str, heartbeat: Heartbeat) -> HeartbeatReply:
        return self._read(HeartbeatReply, self._send("POST", f"/v1/jobs/{job_id}/heartbeat", body=heartbeat))

    def complete_job(self, job_id: str, completion: JobCompletion) -> None:
        self._send("POST", f"/v1/jobs/{job_id}/complete", body=completion)

    def fail_job(self, job_id: str, failure: JobFailure) -> None:
        self._send("POST", f"/v1/jobs/{job_id}/fail", body=failure)


def _once() -> dict[str, str]:
    """A key under which the coordinator does this once, however often the request arrives."""
    return {"Idempotency-Key": secrets.token_hex(16)}


def _cursor(cursor: str | None) -> dict[str, str]:
    return {} if cursor is None else {"cursor": cursor}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
