"""A federation as people see it."""

from datetime import datetime

from pydantic import Field

from fedmkt.protocol.configuration import FederationConfig
from fedmkt.protocol.messages import Count, Digest, Id, Message
from fedmkt.protocol.parties import ModelCard, SiteView
from fedmkt.protocol.rounds import RoundView


class ScheduleView(Message):
    """A grid of times. At each a round is asked for, unless one runs or waits; a time that was missed counts once."""

    every_s: float
    next_round_at: datetime
    rounds_left: Count | None = Field(description="null: no end")


class FederationView(Message):
    federation_id: Id
    config: FederationConfig
    created_at: datetime
    public_set: Digest | None
    public_samples: Count
    llm: ModelCard | None
    llm_vocabulary: Digest | None
    sites: tuple[SiteView, ...]
    rounds_requested: Count
    rounds_finished: Count
    current_round: RoundView | None
    waits_for: tuple[str, ...] = Field(
        description="why the next round has not begun; empty when one runs or none is due"
    )
    schedule: ScheduleView | None = Field(default=None, description="null: rounds begin on demand")
    paused_at: datetime | None = Field(default=None, description="since when no round begins; null: not paused")


class FederationPage(Message):
    items: tuple[FederationView, ...]
    next_cursor: str | None
