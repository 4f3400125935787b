"""Rounds: ask for them, watch them, cancel them, report on them."""

from fastapi import APIRouter, Request, Response

from fedmkt.protocol import ApplyReport, FederationView, RoundPage, RoundRequest, RoundView, SiteProgress
from fedmkt_coordinator import rounds
from fedmkt_coordinator.context import Context, Ctx
from fedmkt_coordinator.routes.conditional import polled
from fedmkt_coordinator.routes.paging import Cursor, Limit, cursor_after, number_before
from fedmkt_coordinator.routes.raw import IdempotencyKey
from fedmkt_coordinator.security import Operator, Reader, Site
from fedmkt_coordinator.store import Transaction
from fedmkt_coordinator.views import present_federation, round_views, site_progress

router = APIRouter(prefix="/v1", tags=["rounds"])

ROUNDS = "rounds"


@router.post(
    "/federations/{federation_id}/rounds", status_code=202, dependencies=[Operator], summary="Ask for more rounds"
)
async def request_rounds(
    context: Ctx, federation_id: str, wanted: RoundRequest, idempotency_key: IdempotencyKey = None
) -> FederationView:
    """They run one after the other, each as soon as it can: `waits_for` says what is missing.

    With `every_s` a schedule begins instead: a round now and then every so many seconds, as soon as a quorum is ready,
    never two at once. A time that passed while a round ran, or the coordinator was away, is made up once.
    """
    await rounds.request_rounds(context.store, federation_id, wanted, idempotency_key)
    return await present_federation(context.store, federation_id)


@router.post(
    "/federations/{federation_id}/rounds/pause", dependencies=[Operator], summary="Begin no more rounds for now"
)
async def pause(context: Ctx, federation_id: str) -> FederationView:
    """The running round ends as it would. Sites, status and `waits_for` say that rounds are paused."""
    await rounds.pause(context.store, federation_id)
    return await present_federation(context.store, federation_id)


@router.post("/federations/{federation_id}/rounds/resume", dependencies=[Operator], summary="Begin rounds again")
async def resume(context: Ctx, federation_id: str) -> FederationView:
    """What was asked for goes on; scheduled times that passed meanwhile ask for one round together."""
    await rounds.resume(context.store, federation_id)
    return await present_federation(context.store, federation_id)


@router.post(
    "/federations/{federation_id}/rounds/cancel",
    dependencies=[Operator],
    summary="Cancel the running round, those that follow and the schedule",
)
async def cancel_all(context: Ctx, federation_id: str) -> FederationView:
    """Ask for rounds again to go on. With nothing to cancel, nothing changes."""
    await rounds.cancel_all(context.store, federation_id)
    return await present_federation(context.store, federation_id)


@router.get(
    "/federations/{federation_id}/rounds",
    dependencies=[Reader],
    response_model=RoundPage,
    summary="List rounds, newest first",
)
async def list_rounds(
    context: Ctx, request: Request, federation_id: str, cursor: Cursor = None, limit: Limit = 20
) -> Response:
    """With each site's progress, and the LLM's."""
    before = number_before(ROUNDS, cursor)

    async def page(tx: Transaction) -> RoundPage:
        federation = await tx.federation(federation_id)
        found = await tx.rounds_before(federation_id, before, limit + 1)
        views = await round_views(tx, {federation.id: federation}, found[:limit])
        more = cursor_after(ROUNDS, found[limit - 1].number) if len(found) > limit else None
        return RoundPage(items=tuple(views), next_cursor=more)

    return await polled(context, request, "federation", federation_id, page)


@router.get("/rounds/{round_id}", dependencies=[Reader], response_model=RoundView, summary="Read a round")
async def read(context: Ctx, request: Request, round_id: str) -> Response:
    """States, deadlines, who is missing, losses, bytes and seconds."""
    return await polled(context, request, "round", round_id, lambda tx: _view_of(tx, round_id))


@router.post("/rounds/{round_id}/cancel", dependencies=[Operator], summary="Cancel a round and those that follow")
async def cancel(context: Ctx, round_id: str) -> RoundView:
    """Rounds that were asked for and have not begun are withdrawn, and the schedule ends; ask again to go on."""
    await rounds.cancel(context.store, round_id)
    return await _view(context, round_id)


@router.post("/rounds/{round_id}/report", summary="Report what applying the LLM's knowledge did")
async def report(context: Ctx, site: Site, round_id: str, given: ApplyReport) -> SiteProgress:
    """The same report again changes nothing; another one is refused."""
    part = await rounds.report(context.store, site, round_id, given)
    async with context.store.read() as tx:
        return site_progress(await tx.round(round_id), part)


async def _view(context: Context, round_id: str) -> RoundView:
    async with context.store.read() as tx:
        return await _view_of(tx, round_id)


async def _view_of(tx: Transaction, round_id: str) -> RoundView:
    row = await tx.round(round_id)
    return (await round_views(tx, {row.federation_id: await tx.federation(row.federation_id)}, [row]))[0]
