"""Events sent to an address."""

from datetime import datetime
from typing import Annotated, Literal

from pydantic import Field

from fedmkt.protocol.events import Event
from fedmkt.protocol.messages import Count, Id, Message, Seconds

EventKind = Annotated[
    str, Field(pattern=r"^[a-z_]{1,40}\.[a-z_]{1,40}$", description="kind of an event, e.g. round.state")
]


class WebhookRequest(Message):
    """Where to send a federation's events, and which."""

    url: str = Field(max_length=2000, pattern=r"^https?://[!-~]+$", description="absolute http or https address")
    kinds: tuple[EventKind, ...] = Field(default=(), max_length=50, description="events to send; all if empty")


class WebhookView(Message):
    webhook_id: Id
    federation_id: Id
    url: str
    kinds: tuple[EventKind, ...]
    state: Literal["active", "disabled"]
    reason: str | None = Field(description="why the last delivery failed, or why it is disabled")
    created_at: datetime
    delivered: Count = Field(description="sequence up to which events were delivered, or passed over by `kinds`")
    delivered_at: datetime | None = Field(description="last success")
    failures: Count = Field(description="attempts that failed since the last success")
    failing_since: datetime | None
    next_attempt_at: datetime | None = Field(description="null unless a failed delivery waits to be tried again")


class WebhookCreated(Message):
    webhook: WebhookView
    secret: str = Field(description="whsec_ and base64: the key of the HMAC-SHA256 in webhook-signature")


class WebhookPage(Message):
    items: tuple[WebhookView, ...]
    next_cursor: str | None


class WebhookTrial(Message):
    """What came of one test message."""

    delivered: bool
    status: int | None = Field(description="of the answer, if one came")
    reason: str | None = Field(description="why it counts as not delivered")
    seconds: Seconds


class WebhookMessage(Message):
    """What is sent: signed as Standard Webhooks asks, with `data` as GET .../events would show it."""

    type: str
    timestamp: datetime
    data: Event
