"""What happened, in the order of commits."""

from datetime import datetime

from pydantic import Field

from fedmkt.protocol.messages import Id, Message, Name


class Event(Message):
    """One committed fact, in order. `sequence` grows by commit and never repeats."""

    sequence: int
    at: datetime
    kind: str = Field(max_length=100, description="dotted, e.g. round.state")
    federation_id: Id
    round_id: Id | None = None
    site: Name | None = None
    data: dict[str, str | int | float | bool | None] = Field(default={})


class EventPage(Message):
    items: tuple[Event, ...]
    next_cursor: str | None
