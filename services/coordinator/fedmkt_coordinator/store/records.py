"""Rows as the rest of the coordinator sees them: frozen, typed, in the column order of `tables.py`."""

from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from fedmkt.protocol import (
    ApplyReport,
    DistillJob,
    DistillResult,
    Evaluation,
    FederationConfig,
    LlmProgress,
    Manifest,
    MapJob,
    MapMethod,
    MapResult,
    ModelCard,
    RoundState,
)

UploadRowState = Literal["open", "accepted", "refused", "abandoned"]
JobState = Literal["queued", "running", "done", "failed"]
EventData = dict[str, str | int | float | bool | None]


@dataclass(frozen=True, slots=True)
class CredentialRow:
    token_hash: str
    role: str
    origin: str
    created_at: datetime


@dataclass(frozen=True, slots=True)
class EnrolmentTokenRow:
    token_hash: str
    federation_id: str
    site: str
    created_at: datetime
    expires_at: datetime
    used_by: str | None


@dataclass(frozen=True, slots=True)
class AuditRow:
    sequence: int
    at: datetime
    federation_id: str | None
    role: str
    actor: str
    action: str
    target: str
    data: EventData
    previous: str
    digest: str


@dataclass(frozen=True, slots=True)
class FederationRow:
    id: str
    name: str
    config: FederationConfig
    created_at: datetime
    public_set: str | None
    public_samples: int
    llm: ModelCard | None
    llm_vocabulary: str | None
    rounds_requested: int
    events: int
    every_s: float | None = None
    rounds_left: int | None = None
    next_round_at: datetime | None = None
    paused_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class SiteRow:
    id: str
    federation_id: str
    name: str
    public_key: str
    enrolled_at: datetime
    revoked_at: datetime | None
    model: ModelCard | None
    private_samples: int | None
    vocabulary: str | None
    last_seen_at: datetime | None

    @property
    def ready(self) -> bool:
        return self.revoked_at is None and self.model is not None and self.vocabulary is not None


@dataclass(frozen=True, slots=True)
class VocabularyRow:
    fingerprint: str
    artifact: str
    size: int
    created_at: datetime


@dataclass(frozen=True, slots=True)
class MapRow:
    teacher: str
    student: str
    method: MapMethod
    job_id: str
    artifact: str | None


@dataclass(frozen=True, slots=True)
class EventRow:
    federation_id: str
    sequence: int
    at: datetime
    kind: str
    round_id: str | None
    site: str | None
    data: EventData


@dataclass(frozen=True, slots=True)
class WebhookRow:
    id: str
    federation_id: str
    url: str
    kinds: tuple[str, ...]
    secret: str
    state: Literal["active", "disabled"]
    reason: str | None
    created_at: datetime
    delivered: int
    delivered_at: datetime | None
    failures: int
    failing_since: datetime | None
    due_at: datetime
    claim: str | None
    claimed_until: datetime | None


@dataclass(frozen=True, slots=True)
class AdapterRow:
    federation_id: str
    version: int
    parent: int | None
    round_id: str | None
    artifact: str | None
    created_at: datetime
    promoted: bool
    evaluations: dict[str, Evaluation]
    knowledge: dict[str, str]


@dataclass(frozen=True, slots=True)
class RoundRow:
    id: str
    federation_id: str
    number: int
    slice_index: int
    state: RoundState
    state_since: datetime
    reason: str | None
    started_at: datetime
    finished_at: datetime | None
    deadline: datetime | None
    seconds: dict[str, float]
    job_id: str | None
    result: DistillResult | None
    knowledge: str | None
    averaged_adapter: str | None

    @property
    def active(self) -> bool:
        return self.state in ("collecting", "distilling", "applying")


@dataclass(frozen=True, slots=True)
class RoundSiteRow:
    round_id: str
    site: str
    expected: bool
    vocabulary: str | None
    private_samples: int
    knowledge: str | None
    adapter: str | None
    upload_bytes: int
    uploaded_at: datetime | None
    applied_at: datetime | None
    report: ApplyReport | None


@dataclass(frozen=True, slots=True)
class UploadRow:
    id: str
    federation_id: str
    round_id: str
    site: str
    manifest: Manifest
    kind: Literal["knowledge", "adapter"]
    state: UploadRowState
    created_at: datetime
    accepted_at: datetime | None


@dataclass(frozen=True, slots=True)
class JobRow:
    id: str
    federation_id: str
    round_id: str | None
    payload: DistillJob | MapJob
    state: JobState
    attempt: int
    claim_key: str | None
    created_at: datetime
    due_at: datetime
    lease_expires_at: datetime | None
    progress: LlmProgress | None
    reason: str | None
    result: DistillResult | MapResult | None
    finished_at: datetime | None
