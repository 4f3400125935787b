"""The tables. One row class each in `records.py`, with the same fields in the same order."""

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    Text,
    UniqueConstraint,
)

from fedmkt.protocol import (
    ApplyReport,
    DistillJob,
    DistillResult,
    Evaluations,
    FederationConfig,
    LlmProgress,
    Manifest,
    MapJob,
    MapResult,
    ModelCard,
)
from fedmkt_coordinator.store.columns import DigestText, Identifier, NameText, StateText, UtcTime, Wire

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# ------------------------------------------------------------------------------------------------ who

secrets = Table(
    "secrets",  # what replicas share: the coordinator's own signing key
    metadata,
    Column("name", String(40), primary_key=True),
    Column("value", Text, nullable=False),
)

credentials = Table(
    "credentials",  # operator, viewer and worker tokens, hashed
    metadata,
    Column("token_hash", DigestText, primary_key=True),
    Column("role", StateText, nullable=False),
    Column("origin", String(64), nullable=False),  # 'settings', or the installation whose file holds the token
    Column("created_at", UtcTime, nullable=False),
)

enrolment_tokens = Table(
    "enrolment_tokens",
    metadata,
    Column("token_hash", DigestText, primary_key=True),
    Column("federation_id", Identifier, ForeignKey("federations.id"), nullable=False),
    Column("site", NameText, nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("expires_at", UtcTime, nullable=False),
    Column("used_by", Identifier, nullable=True),  # the site row that it made
)

assertions = Table(
    "assertions",  # every jti until it expires: an assertion works once
    metadata,
    Column("site_id", Identifier, nullable=False),
    Column("jti", String(100), nullable=False),
    Column("expires_at", UtcTime, nullable=False, index=True),
    PrimaryKeyConstraint("site_id", "jti"),
)

idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    Column("scope", String(200), nullable=False),
    Column("key", String(200), nullable=False),
    Column("request_digest", DigestText, nullable=False),
    Column("created_at", UtcTime, nullable=False, index=True),
    PrimaryKeyConstraint("scope", "key"),
)

audit_log = Table(
    "audit_log",  # every act; `digest` is over the row and the `previous` digest
    metadata,
    Column("sequence", BigInteger, primary_key=True, autoincrement=False),
    Column("at", UtcTime, nullable=False),
    Column("federation_id", Identifier, nullable=True, index=True),
    Column("role", StateText, nullable=False),
    Column("actor", String(64), nullable=False),
    Column("action", String(100), nullable=False),
    Column("target", String(200), nullable=False),
    Column("data", Wire(dict[str, str | int | float | bool | None]), nullable=False),
    Column("previous", DigestText, nullable=False),
    Column("digest", DigestText, nullable=False),
)

audit_head = Table(
    "audit_head",  # one row, the end of the log: whoever writes to the log locks it first
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("sequence", BigInteger, nullable=False),
    Column("digest", DigestText, nullable=False),
)

# ------------------------------------------------------------------------------------------------ federations

federations = Table(
    "federations",
    metadata,
    Column("id", Identifier, primary_key=True),
    Column("name", NameText, nullable=False, unique=True),
    Column("config", Wire(FederationConfig, often=True), nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("public_set", DigestText, nullable=True),
    Column("public_samples", Integer, nullable=False, default=0),
    Column("llm", Wire(ModelCard, often=True), nullable=True),
    Column("llm_vocabulary", DigestText, nullable=True),  # fingerprint
    Column("rounds_requested", Integer, nullable=False, default=0),
    Column("events", BigInteger, nullable=False, default=0),  # sequence of the last event
    Column("every_s", Float, nullable=True),  # the schedule: none, if null
    Column("rounds_left", Integer, nullable=True),  # of the schedule; without end, if null
    Column("next_round_at", UtcTime, nullable=True, index=True),  # when the schedule asks for its next round
    Column("paused_at", UtcTime, nullable=True),
)

sites = Table(
    "sites",  # one row per enrolled key; a site that was revoked and enrols again gets another row
    metadata,
    Column("id", Identifier, primary_key=True),
    Column("federation_id", Identifier, ForeignKey("federations.id"), nullable=False),
    Column("name", NameText, nullable=False),
    Column("public_key", DigestText, nullable=False),
    Column("enrolled_at", UtcTime, nullable=False),
    Column("revoked_at", UtcTime, nullable=True),
    Column("model", Wire(ModelCard, often=True), nullable=True),
    Column("private_samples", BigInteger, nullable=True),
    Column("vocabulary", DigestText, nullable=True),  # fingerprint
    Column("last_seen_at", UtcTime, nullable=True),
)
Index(
    "one_active_site",
    sites.c.federation_id,
    sites.c.name,
    unique=True,
    sqlite_where=sites.c.revoked_at.is_(None),
    postgresql_where=sites.c.revoked_at.is_(None),
)

vocabularies = Table(
    "vocabularies",
    metadata,
    Column("fingerprint", DigestText, primary_key=True),
    Column("artifact", DigestText, nullable=False),
    Column("size", Integer, nullable=False),
    Column("created_at", UtcTime, nullable=False),
)

vocabulary_maps = Table(
    "vocabulary_maps",  # built once per pair and method, whichever federation asked first
    metadata,
    Column("teacher", DigestText, nullable=False),
    Column("student", DigestText, nullable=False),
    Column("method", StateText, nullable=False),
    Column("job_id", Identifier, nullable=False),
    Column("artifact", DigestText, nullable=True, index=True),
    PrimaryKeyConstraint("teacher", "student", "method"),
)

events = Table(
    "events",
    metadata,
    Column("federation_id", Identifier, ForeignKey("federations.id"), nullable=False),
    Column("sequence", BigInteger, nullable=False),
    Column("at", UtcTime, nullable=False),
    Column("kind", String(100), nullable=False),
    Column("round_id", Identifier, nullable=True),
    Column("site", NameText, nullable=True),
    Column("data", Wire(dict[str, str | int | float | bool | None]), nullable=False),
    PrimaryKeyConstraint("federation_id", "sequence"),
)

webhooks = Table(
    "webhooks",  # events of one federation go out in order: `delivered` is how far that is
    metadata,
    Column("id", Identifier, primary_key=True),
    Column("federation_id", Identifier, ForeignKey("federations.id"), nullable=False),
    Column("url", Text, nullable=False),
    Column("kinds", Wire(tuple[str, ...]), nullable=False),
    Column("secret", Text, nullable=False),
    Column("state", StateText, nullable=False),  # active, disabled
    Column("reason", Text, nullable=True),
    Column("created_at", UtcTime, nullable=False),
    Column("delivered", BigInteger, nullable=False),
    Column("delivered_at", UtcTime, nullable=True),
    Column("failures", Integer, nullable=False),
    Column("failing_since", UtcTime, nullable=True),
    Column("due_at", UtcTime, nullable=False, index=True),
    Column("claim", Identifier, nullable=True),  # the replica's present attempt, valid until claimed_until
    Column("claimed_until", UtcTime, nullable=True),
    UniqueConstraint("federation_id", "url"),
)

adapters = Table(
    "adapters",
    metadata,
    Column("federation_id", Identifier, ForeignKey("federations.id"), nullable=False),
    Column("version", Integer, nullable=False),
    Column("parent", Integer, nullable=True),
    Column("round_id", Identifier, nullable=True),
    Column("artifact", DigestText, nullable=True),
    Column("created_at", UtcTime, nullable=False),
    Column("promoted", Boolean, nullable=False),
    Column("evaluations", Wire(Evaluations), nullable=False),
    Column("knowledge", Wire(dict[str, str]), nullable=False),
    PrimaryKeyConstraint("federation_id", "version"),
)

# ------------------------------------------------------------------------------------------------ rounds

rounds = Table(
    "rounds",
    metadata,
    Column("id", Identifier, primary_key=True),
    Column("federation_id", Identifier, ForeignKey("federations.id"), nullable=False),
    Column("number", Integer, nullable=False),
    Column("slice_index", Integer, nullable=False),
    Column("state", StateText, nullable=False),
    Column("state_since", UtcTime, nullable=False),
    Column("reason", Text, nullable=True),
    Column("started_at", UtcTime, nullable=False),
    Column("finished_at", UtcTime, nullable=True),
    Column("deadline", UtcTime, nullable=True, index=True),
    Column("seconds", Wire(dict[str, float]), nullable=False),
    Column("job_id", Identifier, nullable=True),
    Column("result", Wire(DistillResult), nullable=True),
    Column(
        "knowledge", DigestText, nullable=True, index=True
    ),  # of `result`, so that sites' reading rights are a query
    Column("averaged_adapter", DigestText, nullable=True, index=True),
    UniqueConstraint("federation_id", "number"),
)
ACTIVE_STATES = ("collecting", "distilling", "applying")
Index(
    "one_active_round",
    rounds.c.federation_id,
    unique=True,
    sqlite_where=rounds.c.state.in_(ACTIVE_STATES),
    postgresql_where=rounds.c.state.in_(ACTIVE_STATES),
)

round_sites = Table(
    "round_sites",
    metadata,
    Column("round_id", Identifier, ForeignKey("rounds.id"), nullable=False),
    Column("site", NameText, nullable=False),
    Column("expected", Boolean, nullable=False),  # was ready when the round began
    Column("vocabulary", DigestText, nullable=True),  # fingerprint, as uploaded under
    Column("private_samples", BigInteger, nullable=False, default=0),
    Column("knowledge", DigestText, nullable=True),
    Column("adapter", DigestText, nullable=True),
    Column("upload_bytes", BigInteger, nullable=False, default=0),
    Column("uploaded_at", UtcTime, nullable=True),
    Column("applied_at", UtcTime, nullable=True),
    Column("report", Wire(ApplyReport), nullable=True),
    PrimaryKeyConstraint("round_id", "site"),
)

uploads = Table(
    "uploads",
    metadata,
    Column("id", Identifier, primary_key=True),
    Column("federation_id", Identifier, ForeignKey("federations.id"), nullable=False),
    Column("round_id", Identifier, ForeignKey("rounds.id"), nullable=False),
    Column("site", NameText, nullable=False),
    Column("manifest", Wire(Manifest, often=True), nullable=False),
    Column("kind", StateText, nullable=False),
    Column("state", StateText, nullable=False),  # open, accepted, refused, abandoned
    Column("created_at", UtcTime, nullable=False),
    Column("accepted_at", UtcTime, nullable=True),
)
Index(
    "one_upload",
    uploads.c.round_id,
    uploads.c.site,
    uploads.c.kind,
    unique=True,
    sqlite_where=uploads.c.state.in_(("open", "accepted")),
    postgresql_where=uploads.c.state.in_(("open", "accepted")),
)

upload_chunks = Table(
    "upload_chunks",
    metadata,
    Column("upload_id", Identifier, ForeignKey("uploads.id"), nullable=False),
    Column("number", Integer, nullable=False),
    PrimaryKeyConstraint("upload_id", "number"),
)

# ------------------------------------------------------------------------------------------------ jobs

jobs = Table(
    "jobs",
    metadata,
    Column("id", Identifier, primary_key=True),
    Column("federation_id", Identifier, ForeignKey("federations.id"), nullable=False),
    Column("round_id", Identifier, nullable=True),
    Column("payload", Wire(DistillJob | MapJob), nullable=False),
    Column("state", StateText, nullable=False, index=True),  # queued, running, done, failed
    Column("attempt", Integer, nullable=False),  # claims so far
    Column("claim_key", String(200), nullable=True),  # a claim whose answer was lost is answered again
    Column("created_at", UtcTime, nullable=False),
    Column("due_at", UtcTime, nullable=False),
    Column("lease_expires_at", UtcTime, nullable=True),
    Column("progress", Wire(LlmProgress), nullable=True),
    Column("reason", Text, nullable=True),
    Column("result", Wire(DistillResult | MapResult), nullable=True),
    Column("finished_at", UtcTime, nullable=True),
)
