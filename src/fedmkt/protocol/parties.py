"""Sites and the LLM: who they are, how they enrol, what they hand in about themselves."""

from datetime import datetime
from typing import Annotated, Literal

from pydantic import Field

from fedmkt.protocol.configuration import FederationConfig
from fedmkt.protocol.messages import PROTOCOL_VERSION, Count, Digest, Id, Line, Message, Name


class ModelCard(Message):
    """What a party says of its model. Shown, never trusted."""

    model_id: Line = Field(min_length=1, max_length=200)
    architecture: Line = Field(max_length=100)
    parameters: Count
    trainable_parameters: Count = 0
    device: Line = Field(default="cpu", max_length=100)


class EnrolmentTokenRequest(Message):
    site: Name = Field(description="one of the federation's named sites")


class EnrolmentToken(Message):
    site: Name
    token: str
    expires_at: datetime


class Enrolment(Message):
    token: str = Field(max_length=200)
    public_key: str = Field(pattern=r"^[0-9a-f]{64}$", description="raw Ed25519 public key, hexadecimal")
    protocol_version: int = PROTOCOL_VERSION


class Enrolled(Message):
    site_id: Id
    federation_id: Id
    site: Name


class TokenRequest(Message):
    """RFC 7523 assertion: a JWT (EdDSA) with iss = sub = site id, aud = 'fedmkt', exp, iat and a single-use jti."""

    assertion: str = Field(max_length=4000)


class AccessToken(Message):
    access_token: str
    token_type: Literal["Bearer"] = "Bearer"  # noqa: S105 - the scheme's name, not a secret
    expires_in_s: int


class KeysView(Message):
    """The coordinator's raw Ed25519 public keys, hexadecimal, that sign receipts; the present one first."""

    public_keys: tuple[Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")], ...] = Field(min_length=1)


class VocabularyReceipt(Message):
    fingerprint: Digest
    size: int
    artifact: Digest


class LlmRegistration(Message):
    """The LLM server's side of a federation: its model and, uploaded before as an artifact, its vocabulary."""

    vocabulary: Digest = Field(description="artifact: fedmkt.vocabulary.Vocabulary.to_bytes()")
    model: ModelCard


class SiteModel(Message):
    model: ModelCard
    private_samples: Count | None = Field(description="null: the site keeps it to itself")


class SiteView(Message):
    site_id: Id | None
    name: Name
    state: Literal["awaited", "enrolled", "ready", "revoked"]
    model: ModelCard | None = None
    vocabulary: Digest | None = Field(default=None, description="fingerprint")
    private_samples: Count | None = None
    last_seen_at: datetime | None = None


class SiteSelf(Message):
    """What a site may know of itself and its federation (`GET /v1/me`)."""

    federation_id: Id
    site: SiteView
    config: FederationConfig
    public_set: Digest | None = Field(description="artifact: the public set in canonical form")
    public_samples: Count


class PublicSetReceipt(Message):
    digest: Digest = Field(description="of the canonical form, which is also the artifact")
    samples: Count


class ArtifactReceipt(Message):
    digest: Digest
    size_bytes: Count
    arrived_bytes: Count = Field(description="less than size_bytes while parts are missing")
