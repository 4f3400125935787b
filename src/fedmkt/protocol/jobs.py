"""The LLM server's work."""

from datetime import datetime
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from fedmkt.protocol.configuration import FederationConfig, MapMethod
from fedmkt.protocol.messages import Count, Digest, Id, Message, Name
from fedmkt.protocol.rounds import DistillResult, LlmProgress


def _storable(text: str) -> str:
    """PostgreSQL's text holds every character but one."""
    return text.replace("\x00", "\ufffd")


class UploadedKnowledge(Message):
    site: Name
    knowledge: Digest
    vocabulary: Digest = Field(description="fingerprint")
    vocabulary_artifact: Digest
    vocabulary_maps: dict[MapMethod, Digest] = Field(description="artifacts: site -> LLM")
    adapter: Digest | None = None
    private_samples: Count = 0


class DistillJob(Message):
    kind: Literal["distill"] = "distill"
    federation_id: Id
    round_id: Id
    round_number: int
    slice_index: int
    config: FederationConfig
    public_set: Digest
    adapter: Digest | None = Field(
        description="artifact: the promoted adapter to start from; null for the bare base model"
    )
    uploads: tuple[UploadedKnowledge, ...]
    traceparent: str | None = Field(default=None, description="W3C trace context of what ordered the job")


class MapJob(Message):
    kind: Literal["vocabulary_map"] = "vocabulary_map"
    federation_id: Id
    teacher: Digest
    student: Digest
    teacher_artifact: Digest
    student_artifact: Digest
    method: MapMethod
    traceparent: str | None = Field(default=None, description="W3C trace context of what ordered the job")


class MapResult(Message):
    artifact: Digest


class JobView(Message):
    job_id: Id
    state: Literal["queued", "running", "done", "failed"]
    attempt: int
    payload: Annotated[DistillJob | MapJob, Field(discriminator="kind")]
    lease_expires_at: datetime | None
    lease_s: float
    progress: LlmProgress | None = None
    reason: str | None = None


class Heartbeat(Message):
    attempt: int = Field(description="the attempt that was claimed; another one means that the lease was lost")
    progress: LlmProgress | None = None


class HeartbeatReply(Message):
    lease_expires_at: datetime
    cancelled: bool


class JobCompletion(Message):
    attempt: int
    result: DistillResult | MapResult


class JobFailure(Message):
    attempt: int
    reason: Annotated[str, AfterValidator(_storable)] = Field(min_length=1, max_length=2000)
    retry: bool = True


class QueueView(Message):
    """Where a worker finds the queue that carries job ids."""

    redis_url: str
    stream: str
    group: str
