"""Versions of the LLM's adapter."""

from datetime import datetime

from pydantic import Field

from fedmkt.protocol.measurements import Evaluations
from fedmkt.protocol.messages import Digest, Id, Message


class AdapterView(Message):
    """One committed version of the LLM's adapter. Version 0 is the bare base model."""

    version: int = Field(ge=0)
    parent: int | None
    round_id: Id | None
    artifact: Digest | None
    created_at: datetime
    promoted: bool
    evaluations: Evaluations
    knowledge: dict[str, Digest] = Field(default={}, description="site -> knowledge it learned from")


class AdapterRollback(Message):
    to_version: int | None = Field(default=None, ge=0, le=2**31 - 1, description="null: the parent")


class AdapterPage(Message):
    items: tuple[AdapterView, ...]
    next_cursor: str | None
