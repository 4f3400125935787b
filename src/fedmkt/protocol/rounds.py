"""A round and each site's part in it."""

from datetime import datetime
from typing import Literal

from pydantic import Field, model_validator

from fedmkt.protocol.measurements import ApplyReport, Evaluations, GateReport, SelectionReport, TrainingReport
from fedmkt.protocol.messages import MAX_ROUNDS_AT_ONCE, Count, Digest, Id, Message, Name, Seconds

RoundState = Literal["collecting", "distilling", "applying", "completed", "failed", "cancelled"]
SiteRoundState = Literal["expected", "uploading", "uploaded", "applied", "missed"]


class SiteProgress(Message):
    site: Name
    state: SiteRoundState
    upload_bytes: Count = 0
    uploaded_at: datetime | None = None
    applied_at: datetime | None = None
    report: ApplyReport | None = None


class LlmProgress(Message):
    step: str = Field(default="", max_length=100, description="what the job does now, in words")
    done: Count = 0
    total: Count = 0
    seconds_left: Seconds | None = Field(default=None, description="of this step, going on as it does; null: unknown")


class DistillResult(Message):
    """What the LLM server hands in when a distil job is finished."""

    knowledge: Digest = Field(description="artifact: the LLM's own knowledge on the slice")
    adapter: Digest | None = Field(
        default=None, description="artifact: tar of the new PEFT folder; null when nothing was trained"
    )
    averaged_adapter: Digest | None = None
    selection: SelectionReport
    gate: GateReport | None
    before: Evaluations
    after: Evaluations
    training: TrainingReport | None
    phase_seconds: dict[str, Seconds] = Field(default={}, max_length=50)
    refused_sites: dict[str, str] = Field(default={}, description="site -> why its knowledge was left out")


class RoundView(Message):
    round_id: Id
    federation_id: Id
    number: int
    slice_index: int
    state: RoundState
    reason: str | None
    started_at: datetime
    finished_at: datetime | None
    deadline: datetime | None = Field(description="of the present state")
    missing: tuple[Name, ...] = Field(description="sites the present state still waits for")
    sites: tuple[SiteProgress, ...]
    llm_progress: LlmProgress | None
    llm_result: DistillResult | None
    state_seconds: dict[str, Seconds] = Field(
        description="time spent in each state that has ended; the present one began at started_at plus their sum"
    )


class RoundRequest(Message):
    """Rounds on demand, or with `every_s` a schedule, which takes the place of the one before."""

    count: int | None = Field(
        default=None,
        ge=1,
        le=1_000_000,
        description="on demand: rounds to run, one after the other (null: 1); scheduled: when to stop (null: no end)",
    )
    every_s: float | None = Field(
        default=None, ge=1, le=366 * 86400, description="begin a round every so many seconds; the first one now"
    )

    @model_validator(mode="after")
    def _bounded(self) -> "RoundRequest":
        if self.every_s is None and self.count is not None and self.count > MAX_ROUNDS_AT_ONCE:
            raise ValueError(f"{self.count} rounds are asked for at once, at most {MAX_ROUNDS_AT_ONCE}; set every_s")
        return self


class RoundPage(Message):
    items: tuple[RoundView, ...]
    next_cursor: str | None
