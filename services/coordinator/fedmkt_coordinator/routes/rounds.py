"""Rounds: ask for them, watch them, cancel them, report on them."""

from typing import Annotated

from fastapi import APIRouter, Header, Request, Response

from fedmkt.protocol import ApplyReport, FederationView, RoundPage, RoundRequest, RoundView, SiteProgress
from fedmkt_coordinator import rounds
from fedmkt_coordinator.context import Context, Ctx
from fedmkt_coordinator.routes.conditional import conditional
from fedmkt_coordinator.routes.paging import Cursor, Limit, number
from fedmkt_coordinator.security import Operator, Reader, Site
from fedmkt_coordinator.views import federation_view, round_views, site_progress

router = APIRouter(prefix="/v1", tags=["rounds"])

IdempotencyKey = Annotated[
    str | None, Header(min_length=1, max_length=200, description="the same key has its effect once")
]


@router.post(
    "/federations/{federation_id}/rounds", status_code=202, dependencies=[Operator], summary="Ask for more rounds"
)
async def request_rounds(
    context: Ctx, federation_id: str, wanted: RoundRequest, idempotency_key: IdempotencyKey = None
) -> FederationView:
    """They run one after the other, each as soon as it can: `waits_for` says what is missing."""
    await rounds.request_rounds(context.store, federation_id, wanted.count, idempotency_key)
    async with context.store.read() as tx:
        return await federation_view(tx, await tx.federation(federation_id))


@router.get(
    "/federations/{federation_id}/rounds",
    dependencies=[Reader],
    response_model=RoundPage,
    summary="List rounds, newest first",
)
async def list_rounds(
    context: Ctx, request: Request, federation_id: str, cursor: Cursor = None, limit: Limit = 20
) -> Response:
    async with context.store.read() as tx:
        federation = await tx.federation(federation_id)
        found = await tx.rounds_before(federation_id, number(cursor), limit + 1)
        views = await round_views(tx, federation, found[:limit])
    more = str(found[limit - 1].number) if len(found) > limit else None
    return conditional(request, RoundPage(items=tuple(views), next_cursor=more))


@router.get("/rounds/{round_id}", dependencies=[Reader], response_model=RoundView, summary="Read a round")
async def read(context: Ctx, request: Request, round_id: str) -> Response:
    return conditional(request, await _view(context, round_id))


@router.post("/rounds/{round_id}/cancel", dependencies=[Operator], summary="Cancel a round and those that follow")
async def cancel(context: Ctx, round_id: str) -> RoundView:
    """Rounds that were asked for and have not begun are withdrawn; ask for rounds again to go on."""
    await rounds.cancel(context.store, round_id)
    return await _view(context, round_id)


@router.post("/rounds/{round_id}/report", summary="Report what applying the LLM's knowledge did")
async def report(context: Ctx, site: Site, round_id: str, given: ApplyReport) -> SiteProgress:
    part = await rounds.report(context.store, site, round_id, given)
    async with context.store.read() as tx:
        return site_progress(await tx.round(round_id), part)


async def _view(context: Context, round_id: str) -> RoundView:
    async with context.store.read() as tx:
        row = await tx.round(round_id)
        return (await round_views(tx, await tx.federation(row.federation_id), [row]))[0]
