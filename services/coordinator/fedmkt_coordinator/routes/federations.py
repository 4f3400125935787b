"""Federations, their public set, LLM and adapters."""

from fastapi import APIRouter, Request, Response

from fedmkt.protocol import (
    AdapterPage,
    FederationConfig,
    FederationPage,
    FederationView,
    LlmRegistration,
    PublicSetReceipt,
)
from fedmkt_coordinator import federations
from fedmkt_coordinator.context import Ctx
from fedmkt_coordinator.routes.conditional import polled
from fedmkt_coordinator.routes.paging import Cursor, Limit, cursor_after, item_before, number_before
from fedmkt_coordinator.routes.raw import raw_body
from fedmkt_coordinator.security import Operator, Reader, Worker
from fedmkt_coordinator.store import Transaction
from fedmkt_coordinator.views import adapter_view, federation_view, federation_views, present_federation

router = APIRouter(prefix="/v1/federations", tags=["federations"])

FEDERATIONS, ADAPTERS = "federations", "adapters"


@router.post(
    "",
    status_code=201,
    dependencies=[Operator],
    summary="Create a federation",
    responses={200: {"model": FederationView, "description": "It was there, with this configuration"}},
)
async def create(context: Ctx, config: FederationConfig, response: Response) -> FederationView:
    """201 when it is new; 200 when a federation of that name has exactly this configuration."""
    federation, new = await federations.create(context.store, config)
    response.status_code = 201 if new else 200
    return await present_federation(context.store, federation.id)


@router.get("", dependencies=[Reader], response_model=FederationPage, summary="List federations by name")
async def list_all(context: Ctx, request: Request, cursor: Cursor = None, limit: Limit = 50) -> Response:
    """Each as it reads by itself. The ETag covers all of them."""
    after = "" if cursor is None else item_before(FEDERATIONS, cursor)

    async def page(tx: Transaction) -> FederationPage:
        found = await tx.federations_after(after, limit + 1)
        views = await federation_views(tx, found[:limit])
        more = cursor_after(FEDERATIONS, found[limit - 1].name) if len(found) > limit else None
        return FederationPage(items=tuple(views), next_cursor=more)

    return await polled(context, request, "federations", "", page)


@router.get("/{federation_id}", dependencies=[Reader], response_model=FederationView, summary="Read a federation")
async def read(context: Ctx, request: Request, federation_id: str) -> Response:
    """Sites, the round that runs with each site's progress, and what the next one waits for."""

    async def view(tx: Transaction) -> FederationView:
        return await federation_view(tx, await tx.federation(federation_id))

    return await polled(context, request, "federation", federation_id, view)


@router.put(
    "/{federation_id}/public-set",
    dependencies=[Operator],
    summary="Upload the public set as JSONL",
    openapi_extra=raw_body("application/jsonl", "one sample a line"),
)
async def put_public_set(context: Ctx, request: Request, federation_id: str) -> PublicSetReceipt:
    """Lines of `{id, prompt, completion}`, `{id, text}` or `{id, messages}`. Fixed once a round has begun."""
    source = await request.body()
    return await federations.put_public_set(
        context.store, context.artifacts, context.public_sets, federation_id, source
    )


@router.put("/{federation_id}/llm", dependencies=[Worker], summary="Register the LLM")
async def register_llm(context: Ctx, federation_id: str, registration: LlmRegistration) -> FederationView:
    """Its vocabulary must have been uploaded as an artifact before. Fixed once a round has begun."""
    await federations.register_llm(context.store, context.artifacts, context.vocabularies, federation_id, registration)
    return await present_federation(context.store, federation_id)


@router.get(
    "/{federation_id}/adapters",
    dependencies=[Reader],
    response_model=AdapterPage,
    summary="List the LLM's adapters, newest first",
)
async def adapters(
    context: Ctx, request: Request, federation_id: str, cursor: Cursor = None, limit: Limit = 50
) -> Response:
    """Version 0 is the bare base model; one version is promoted, and the next round starts from it."""
    before = number_before(ADAPTERS, cursor)

    async def page(tx: Transaction) -> AdapterPage:
        await tx.federation(federation_id)
        found = await tx.adapters_before(federation_id, before, limit + 1)
        more = cursor_after(ADAPTERS, found[limit - 1].version) if len(found) > limit else None
        return AdapterPage(items=tuple(adapter_view(each) for each in found[:limit]), next_cursor=more)

    return await polled(context, request, "federation", federation_id, page)
