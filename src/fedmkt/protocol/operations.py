"""Versions, health, and what goes wrong."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from fedmkt.protocol.messages import Message


class Version(Message):
    version: str
    protocol_version: int


class Health(Message):
    status: Literal["ok", "unavailable"]
    checks: dict[str, str] = Field(default={})


class Problem(BaseModel):
    """RFC 9457 problem details with a stable code."""

    model_config = ConfigDict(frozen=True)

    type: str
    title: str
    status: int
    code: str
    detail: str
    instance: str | None = None
    request_id: str | None = Field(default=None, description="names the request in the coordinator's log")


class ProblemKind(Message):
    """One code that `Problem.code` can have."""

    code: str
    status: int = Field(ge=400, le=599)
    title: str
    details: tuple[str, ...] = Field(description="what the coordinator says and advises; '...' stands for the facts")


class ProblemList(Message):
    items: tuple[ProblemKind, ...]
