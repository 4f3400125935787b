"""The coordinator's API, typed: one method a call. Used by sites, the LLM server, operators' commands and tests.

    with CoordinatorClient("https://fedmkt.example.org", SiteKey(site_id, key)) as client:
        client.check_version()
        task = client.next_task(wait_s=30)

Refusals arrive as `CoordinatorProblem`, lost connections as `CoordinatorUnreachable` once patience has ended.
"""

import hashlib
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

from fedmkt import __version__
from fedmkt.answers import CoordinatorProblem, UnexpectedAnswer
from fedmkt.calls import once
from fedmkt.errors import Refusal
from fedmkt.operator_calls import OperatorCalls
from fedmkt.protocol import (
    PROTOCOL_VERSION,
    ArtifactReceipt,
    Health,
    Heartbeat,
    HeartbeatReply,
    JobCompletion,
    JobFailure,
    JobView,
    KeysView,
    ProblemList,
    QueueView,
    Version,
)
from fedmkt.session import (
    CoordinatorUnreachable,
    Credentials,
    RetryPolicy,
    Session,
    SiteKey,
    StaticToken,
    Traffic,
    utc_now,
)
from fedmkt.site_calls import SiteCalls, UploadStuck
from fedmkt.transfers import MAX_ARTIFACT_BYTES, ArtifactCorrupt, ArtifactTooLarge

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
    "UploadStuck",
]


class ProtocolMismatch(Refusal):
    status = 426
    code = "protocol.mismatch"
    title = "Coordinator and client speak different protocols"
    remedy = "Upgrade the older side: `pip install --upgrade fedmkt`, or the newer image."


class CoordinatorClient(OperatorCalls, SiteCalls):
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
        session = Session(
            base_url, credentials, retry=retry, timeout_s=timeout_s, transport=transport, wait=wait, clock=clock
        )
        super().__init__(session)

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
        headers = once() if key is None else {"Idempotency-Key": key}
        return self._read(JobView, self._send("POST", f"/v1/jobs/{job_id}/claim", headers=headers))

    def heartbeat(self, job_id: str, heartbeat: Heartbeat) -> HeartbeatReply:
        return self._read(HeartbeatReply, self._send("POST", f"/v1/jobs/{job_id}/heartbeat", body=heartbeat))

    def complete_job(self, job_id: str, completion: JobCompletion) -> None:
        self._send("POST", f"/v1/jobs/{job_id}/complete", body=completion)

    def fail_job(self, job_id: str, failure: JobFailure) -> None:
        self._send("POST", f"/v1/jobs/{job_id}/fail", body=failure)
