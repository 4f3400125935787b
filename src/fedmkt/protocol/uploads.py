"""What a site announces, what is missing of it, and the receipt."""

from datetime import datetime
from typing import Literal

from pydantic import Field, model_validator

from fedmkt.protocol.messages import CHUNK_BYTES, MAX_KNOWLEDGE_BYTES, Count, Digest, Id, Message, Name


class Manifest(Message):
    """What a site is about to send for a round, signed with the key it enrolled with."""

    kind: Literal["knowledge", "adapter"] = "knowledge"
    round_id: Id
    digest: Digest
    size_bytes: int = Field(gt=0, le=MAX_KNOWLEDGE_BYTES)
    chunks: tuple[Digest, ...] = Field(min_length=1, max_length=MAX_KNOWLEDGE_BYTES // CHUNK_BYTES)
    signature: str = Field(pattern=r"^[0-9a-f]{128}$", description="Ed25519 over signed_bytes()")

    def signed_bytes(self) -> bytes:
        """Canonical bytes under the signature: everything but the signature itself."""
        return manifest_bytes(self.kind, self.round_id, self.digest, self.size_bytes, self.chunks)

    @model_validator(mode="after")
    def _chunk_count(self) -> "Manifest":
        expected = -(-self.size_bytes // CHUNK_BYTES)
        if len(self.chunks) != expected:
            raise ValueError(
                f"{self.size_bytes} bytes are {expected} chunks of {CHUNK_BYTES}, the manifest lists {len(self.chunks)}"
            )
        return self


def manifest_bytes(kind: str, round_id: str, digest: str, size_bytes: int, chunks: tuple[str, ...]) -> bytes:
    """The signed form of a manifest: one field a line, chunk digests last."""
    return "\n".join(["fedmkt-manifest-1", kind, round_id, digest, str(size_bytes), *chunks]).encode()


class UploadState(Message):
    upload_id: Id
    missing: tuple[int, ...]
    complete: bool
    arrived: dict[str, Count] = Field(
        default={},
        max_length=MAX_KNOWLEDGE_BYTES // CHUNK_BYTES,
        description="missing chunk, its number as text -> how many of its first bytes are there; go on from these",
    )


class UploadReceipt(Message):
    """Proof that an upload counts, signed by the coordinator (`GET /v1/keys` serves its public key)."""

    upload_id: Id
    round_id: Id
    site: Name
    kind: Literal["knowledge", "adapter"]
    digest: Digest
    size_bytes: int
    accepted_at: datetime
    signature: str

    def signed_bytes(self) -> bytes:
        lines = [
            "fedmkt-receipt-1",
            self.upload_id,
            self.round_id,
            self.site,
            self.kind,
            self.digest,
            str(self.size_bytes),
        ]
        return "\n".join([*lines, self.accepted_at.isoformat()]).encode()
