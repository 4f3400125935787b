"""What happened, by cursor and live."""

import logging
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.sse import EventSourceResponse, ServerSentEvent

from fedmkt.protocol import EventPage
from fedmkt_coordinator.context import Context, Ctx
from fedmkt_coordinator.dependencies import DependencyDown
from fedmkt_coordinator.routes.conditional import polled
from fedmkt_coordinator.routes.paging import MAX_NUMBER, Cursor, Limit, cursor_after, number_before
from fedmkt_coordinator.security import Principal, Reader, still_valid
from fedmkt_coordinator.store import Transaction
from fedmkt_coordinator.views import event_view

log = logging.getLogger(__name__)

router = APIRouter(prefix="/v1/federations/{federation_id}/events", tags=["events"])

EVENTS = "events"
BATCH = 200
WAIT_S = 60.0

After = Annotated[int, Query(ge=0, le=MAX_NUMBER, description="sequence of the last event seen; 0: from the first on")]


@router.get("", dependencies=[Reader], response_model=EventPage, summary="Read events, oldest first")
async def read(
    context: Ctx, request: Request, federation_id: str, after: After = 0, cursor: Cursor = None, limit: Limit = 100
) -> Response:
    """Page by page with `cursor`; later, for what has happened since, with `after`."""
    begin = max(after, number_before(EVENTS, cursor) or 0)

    async def page(tx: Transaction) -> EventPage:
        await tx.federation(federation_id)
        found = await tx.events_after(federation_id, begin, limit + 1)
        more = cursor_after(EVENTS, found[limit - 1].sequence) if len(found) > limit else None
        return EventPage(items=tuple(event_view(each) for each in found[:limit]), next_cursor=more)

    return await polled(context, request, "federation", federation_id, page)


async def _beginning(
    context: Ctx,
    federation_id: str,
    after: After = 0,
    last_event_id: Annotated[
        int | None, Header(ge=0, le=MAX_NUMBER, description="`id` of the last event seen; counts more than `after`")
    ] = None,
) -> int:
    """Where the stream begins. Refused here, as a dependency, because a stream that has begun can only break."""
    async with context.store.read() as tx:
        await tx.federation(federation_id)
    return after if last_event_id is None else last_event_id


@router.get("/stream", response_class=EventSourceResponse, summary="Follow events as they happen")
async def stream(
    context: Ctx,
    federation_id: str,
    principal: Annotated[Principal, Reader],
    after: Annotated[int, Depends(_beginning)],
) -> AsyncIterator[ServerSentEvent]:
    """Server-sent events with `id` = sequence; a client that reconnects sends it back as Last-Event-ID.

    Every event comes once and in order, over restarts and whichever replica answers. A comment keeps an idle line open.
    """
    with context.metrics.listeners.labels("sse").track_inprogress():
        async for event in follow(context, principal, federation_id, after):
            yield event


async def follow(
    context: Context, principal: Principal, federation_id: str, after: int
) -> AsyncIterator[ServerSentEvent]:
    while not context.wakeups.stopping:
        bell = context.wakeups.bell(federation_id)
        try:
            async with context.store.read() as tx:
                if not await still_valid(tx, principal):  # the token was replaced since the stream began
                    return
                found = await tx.events_after(federation_id, after, BATCH)
        except DependencyDown as error:  # whoever connects again is told, and goes on after the last event
            log.warning("events.stream_ended", extra={"reason": str(error)})
            return
        for row in found:
            after = row.sequence
            yield ServerSentEvent(id=str(row.sequence), event=row.kind, data=event_view(row))
        if not found:
            await context.wakeups.wait(bell, WAIT_S)
