"""What happened, by cursor and live."""

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Request, Response
from fastapi.sse import EventSourceResponse, ServerSentEvent

from fedmkt.protocol import EventPage
from fedmkt_coordinator.context import Context, Ctx
from fedmkt_coordinator.routes.conditional import conditional
from fedmkt_coordinator.routes.paging import Cursor, Limit, number
from fedmkt_coordinator.security import Reader
from fedmkt_coordinator.views import event_view

router = APIRouter(prefix="/v1/federations/{federation_id}/events", tags=["events"])

BATCH = 200
WAIT_S = 60.0


@router.get("", dependencies=[Reader], response_model=EventPage, summary="Read events, oldest first")
async def read(
    context: Ctx, request: Request, federation_id: str, cursor: Cursor = None, limit: Limit = 100
) -> Response:
    """Events after `cursor`, which is the sequence of the last one seen; later, ask again with the newest you have."""
    async with context.store.read() as tx:
        await tx.federation(federation_id)
        found = await tx.events_after(federation_id, number(cursor) or 0, limit + 1)
    more = str(found[limit - 1].sequence) if len(found) > limit else None
    return conditional(request, EventPage(items=tuple(event_view(each) for each in found[:limit]), next_cursor=more))


async def _beginning(
    context: Ctx,
    federation_id: str,
    cursor: Cursor = None,
    last_event_id: Annotated[str | None, Header(max_length=40)] = None,
) -> int:
    """Where the stream begins. Refused here, as a dependency, because a stream that has begun can only break."""
    async with context.store.read() as tx:
        await tx.federation(federation_id)
    return number(last_event_id or cursor) or 0


@router.get(
    "/stream", dependencies=[Reader], response_class=EventSourceResponse, summary="Follow events as they happen"
)
async def stream(
    context: Ctx, federation_id: str, after: Annotated[int, Depends(_beginning)]
) -> AsyncIterator[ServerSentEvent]:
    """Server-sent events with `id` = sequence; a client that reconnects sends it back as Last-Event-ID."""
    async for event in follow(context, federation_id, after):
        yield event


async def follow(context: Context, federation_id: str, after: int) -> AsyncIterator[ServerSentEvent]:
    while not context.wakeups.stopping:
        bell = context.wakeups.bell(federation_id)
        async with context.store.read() as tx:
            found = await tx.events_after(federation_id, after, BATCH)
        for row in found:
            after = row.sequence
            yield ServerSentEvent(id=str(row.sequence), event=row.kind, data=event_view(row))
        if not found:
            await context.wakeups.wait(bell, WAIT_S)
