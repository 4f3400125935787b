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
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import datetime
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
    AdapterRollback,
    AdapterView,
    ApplyReport,
    ArtifactReceipt,
    AuditHead,
    AuditPage,
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
    ProblemList,
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
    WebhookCreated,
    WebhookPage,
    WebhookRequest,
    WebhookTrial,
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
    utc_now,
)
from fedmkt.signing import UploadKind, public_hex, sign_manifest, verify_receipt
from fedmkt.transfers import MAX_ARTIFACT_BYTES, ArtifactCorrupt, ArtifactTooLarge, Transfers

__all__ = [
    "MAX_ARTIFACT_BYTES",
    "ArtifactCorrupt",
    "ArtifactTooLarge",
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

CHUNKS_IN_FLIGHT = 3
SEND_AGAIN = frozenset({"upload.incomplete", "upload.chunk_digest"})  # lost by the coordinator, spoiled by the line
UPLOAD_TURNS = 5  # announce, send what is missing, complete; again if the coordinator lost chunks meanwhile


class ProtocolMismatch(Refusal):
    status = 426
    code = "protocol.mismatch"
    title = "Coordinator and client speak different protocols"


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
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        """As for `Session`: `wait` may raise to stop early, `transport` replaces the network."""
        self.session = Session(
            base_url, credentials, retry=retry, timeout_s=timeout_s, transport=transport, wait=wait, clock=clock
        )
        self._transfers = Transfers(self.session)
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

    def problems(self) -> ProblemList:
        """Every code that a CoordinatorProblem can have, and what to do."""
        return self._read(ProblemList, self._send("GET", "/v1/problems", public=True))

    # ------------------------------------------------------------------------------------------ audit log

    def audit(self, cursor: str | None = None) -> AuditPage:
        return self._read(AuditPage, self._send("GET", "/v1/audit", params={**_cursor(cursor), "limit": 1000}))

    def audit_head(self) -> AuditHead:
        return self._read(AuditHead, self._send("GET", "/v1/audit/head"))

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

    def adapter(self, federation_id: str, version: int) -> AdapterView:
        return self._read(AdapterView, self._send("GET", f"/v1/federations/{federation_id}/adapters/{version}"))

    def promote_adapter(self, federation_id: str, version: int) -> AdapterView:
        path = f"/v1/federations/{federation_id}/adapters/{version}/promote"
        return self._read(AdapterView, self._send("POST", path))

    def roll_back_adapter(self, federation_id: str, version: int, to_version: int | None = None) -> AdapterView:
        """From `version`, which is promoted, to its parent or `to_version`; the version that is promoted now."""
        path = f"/v1/federations/{federation_id}/adapters/{version}/rollback"
        return self._read(AdapterView, self._send("POST", path, body=AdapterRollback(to_version=to_version)))

    # ------------------------------------------------------------------------------------------ rounds

    def request_rounds(
        self, federation_id: str, count: int | None = None, every_s: float | None = None
    ) -> FederationView:
        """`count` rounds (one, if None) one after the other; with `every_s` a schedule, endless if `count` is None."""
        path = f"/v1/federations/{federation_id}/rounds"
        wanted = RoundRequest(count=count, every_s=every_s)
        return self._read(FederationView, self._send("POST", path, body=wanted, headers=_once()))

    def pause_rounds(self, federation_id: str) -> FederationView:
        return self._read(FederationView, self._send("POST", f"/v1/federations/{federation_id}/rounds/pause"))

    def resume_rounds(self, federation_id: str) -> FederationView:
        return self._read(FederationView, self._send("POST", f"/v1/federations/{federation_id}/rounds/resume"))

    def cancel_rounds(self, federation_id: str) -> FederationView:
        """The running round, those asked for and the schedule."""
        return self._read(FederationView, self._send("POST", f"/v1/federations/{federation_id}/rounds/cancel"))

    def rounds(self, federation_id: str, cursor: str | None = None) -> RoundPage:
        answer = self._send("GET", f"/v1/federations/{federation_id}/rounds", params=_cursor(cursor))
        return self._read(RoundPage, answer)

    def round(self, round_id: str) -> RoundView:
        return self._read(RoundView, self._send("GET", f"/v1/rounds/{round_id}"))

    def cancel_round(self, round_id: str) -> RoundView:
        return self._read(RoundView, self._send("POST", f"/v1/rounds/{round_id}/cancel"))

    def events(self, federation_id: str, cursor: str | None = None, *, after: int = 0) -> EventPage:
        """Page by page with `cursor`; what has happened since the event of sequence `after`. Live: `event_stream`."""
        params: dict[str, str | int] = {**_cursor(cursor), "after": after}
        return self._read(EventPage, self._send("GET", f"/v1/federations/{federation_id}/events", params=params))

    # ------------------------------------------------------------------------------------------ webhooks

    def create_webhook(self, federation_id: str, url: str, kinds: Sequence[str] = ()) -> WebhookCreated:
        """Send events (of these kinds, or all) to `url` from now on; the secret in the answer signs them."""
        wanted = WebhookRequest(url=url, kinds=tuple(kinds))
        return self._read(WebhookCreated, self._send("POST", f"/v1/federations/{federation_id}/webhooks", body=wanted))

    def webhooks(self, federation_id: str, cursor: str | None = None) -> WebhookPage:
        answer = self._send("GET", f"/v1/federations/{federation_id}/webhooks", params=_cursor(cursor))
        return self._read(WebhookPage, answer)

    def delete_webhook(self, federation_id: str, webhook_id: str) -> None:
        self._send("DELETE", f"/v1/federations/{federation_id}/webhooks/{webhook_id}")

    def test_webhook(self, federation_id: str, webhook_id: str) -> WebhookTrial:
        """Send one message now; whether it was delivered is in the answer."""
        answer = self._send("POST", f"/v1/federations/{federation_id}/webhooks/{webhook_id}/test")
        return self._read(WebhookTrial, answer)

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
            try:
                self._send_chunks(state, blob)
                answer = self._send("POST", f"/v1/uploads/{state.upload_id}/complete")
            except CoordinatorProblem as problem:
                if problem.code not in SEND_AGAIN:
                    raise
                continue
            receipt = self._read(UploadReceipt, answer)
            verify_receipt(receipt, manifest, receipt_keys)
            return receipt
        raise UploadStuck(
            f"{len(manifest.chunks)} chunks were sent {UPLOAD_TURNS} times and some are still missing: "
            "look at the coordinator's artifact store"
        )

    def upload_state(self, upload_id: str) -> UploadState:
        return self._read(UploadState, self._send("GET", f"/v1/uploads/{upload_id}"))

    def abandon_upload(self, upload_id: str) -> None:
        """Take back an upload that is not complete, to send other bytes for the same round."""
        self._send("DELETE", f"/v1/uploads/{upload_id}")

    def _send_chunks(self, state: UploadState, blob: bytes) -> None:
        """What is missing, a few chunks at the same time. The first failure ends it once the others have ended."""
        with ThreadPoolExecutor(CHUNKS_IN_FLIGHT, "upload") as pool:
            sending = [pool.submit(self._send_chunk, state, index, blob) for index in state.missing]
            try:
                for each in as_completed(sending):
                    each.result()
            except BaseException:
                for each in sending:
                    each.cancel()
                raise

    def _send_chunk(self, state: UploadState, index: int, blob: bytes) -> None:
        chunk = blob[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]

        def arrived(answer: httpx.Response) -> int:
            now = self._read(UploadState, answer)
            return now.arrived.get(str(index), 0) if index in now.missing else len(chunk)

        path = f"/v1/uploads/{state.upload_id}/chunks/{index}"
        self._transfers.send(path, chunk, arrived, state.arrived.get(str(index), 0))

    # ------------------------------------------------------------------------------------------ artifacts

    def put_artifact(self, data: bytes) -> str:
        """Store bytes under their SHA-256, which is returned. Worker and operator only. Safe to take up again."""
        digest = hashlib.sha256(data).hexdigest()
        if not data:
            self._send("PUT", f"/v1/artifacts/{digest}", body=data)
            return digest
        self._transfers.send(
            f"/v1/artifacts/{digest}", data, lambda answer: self._read(ArtifactReceipt, answer).arrived_bytes
        )
        return digest

    def fetch_artifact(self, digest: str, folder: Path, *, max_bytes: int = MAX_ARTIFACT_BYTES) -> Path:
        """The artifact as a file in `folder`, named by its digest; taken from there when it lies there already.

        An interrupted download is continued where it stopped, in this call or a later one. The folder belongs to one
        process, which fetches an artifact once at a time.
        """
        return self._transfers.fetch(digest, folder, max_bytes)

    # ------------------------------------------------------------------------------------------ jobs

    def queue(self) -> QueueView:
        return self._read(QueueView, self._send("GET", "/v1/jobs/queue"))

    def claim(self, job_id: str, key: str | None = None) -> JobView:
        """The same `key` (an Idempotency-Key, fresh if none is given) again gets the same attempt again."""
        headers = _once() if key is None else {"Idempotency-Key": key}
        return self._read(JobView, self._send("POST", f"/v1/jobs/{job_id}/claim", headers=headers))

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
