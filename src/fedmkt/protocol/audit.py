"""The hash-chained log of who did what."""

import hashlib
import json
from datetime import UTC, datetime

from pydantic import Field

from fedmkt.protocol.messages import Count, Digest, Id, Message

FIRST_DIGEST = "0" * 64  # what the first row of an audit log follows


class AuditEntry(Message):
    """One act. `digest` is SHA-256 over `chained_bytes()`, which name the digest of the row before."""

    sequence: int = Field(ge=1, description="1, 2, 3, ... without a gap")
    at: datetime
    federation_id: Id | None = None
    role: str = Field(max_length=16, description="operator, viewer, worker, site, anyone, or system")
    actor: str = Field(max_length=64, description="a site's id, the beginning of a token's SHA-256, or an address")
    action: str = Field(max_length=100, description="dotted, e.g. site.revoked")
    target: str = Field(max_length=200, description="what it was done to: an id or a name")
    data: dict[str, str | int | float | bool | None] = Field(default={})
    previous: Digest
    digest: Digest

    def chained_bytes(self) -> bytes:
        """Canonical bytes under the digest: JSON with sorted keys, no spaces, ASCII, everything but the digest."""
        fields = self.model_dump(exclude={"digest"}) | {
            "at": self.at.astimezone(UTC).isoformat(timespec="microseconds")
        }
        return json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def audit_digest(entry: AuditEntry) -> str:
    return hashlib.sha256(entry.chained_bytes()).hexdigest()


class AuditPage(Message):
    items: tuple[AuditEntry, ...]
    next_cursor: str | None


class AuditHead(Message):
    """The signed end of the audit log: who keeps one sees later whether the rows up to it are still there."""

    sequence: Count = Field(description="of the last row; 0 when there is none")
    digest: Digest
    at: datetime
    public_key: str = Field(pattern=r"^[0-9a-f]{64}$", description="one of GET /v1/keys")
    signature: str = Field(pattern=r"^[0-9a-f]{128}$", description="Ed25519 over signed_bytes()")

    def signed_bytes(self) -> bytes:
        at = self.at.astimezone(UTC).isoformat(timespec="microseconds")
        return "\n".join(["fedmkt-audit-head-1", str(self.sequence), self.digest, at]).encode()
