"""What a site asks: enrolment, its task, uploads, its report. One method a call."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

import httpx
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedmkt.answers import CoordinatorProblem
from fedmkt.calls import Calls
from fedmkt.errors import Refusal
from fedmkt.protocol import (
    CHUNK_BYTES,
    ApplyReport,
    Enrolled,
    Enrolment,
    SiteModel,
    SiteSelf,
    TaskEnvelope,
    UploadReceipt,
    UploadState,
    VocabularyReceipt,
)
from fedmkt.signing import UploadKind, public_hex, sign_manifest, verify_receipt

CHUNKS_IN_FLIGHT = 3
SEND_AGAIN = frozenset({"upload.incomplete", "upload.chunk_digest"})  # lost by the coordinator, spoiled by the line
UPLOAD_TURNS = 5  # announce, send what is missing, complete; again if the coordinator lost chunks meanwhile


class UploadStuck(Refusal):
    status = 502
    code = "upload.stuck"
    title = "The upload does not become complete"
    remedy = "The operator looks at the coordinator's artifact store: its disk or bucket loses what it acknowledged."


class SiteCalls(Calls):
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
