"""Webhooks of a federation: make, list, try out, delete."""

from fastapi import APIRouter, Request, Response

from fedmkt.protocol import WebhookCreated, WebhookPage, WebhookRequest, WebhookTrial
from fedmkt_coordinator import webhooks
from fedmkt_coordinator.context import Ctx
from fedmkt_coordinator.routes.conditional import conditional
from fedmkt_coordinator.routes.paging import Cursor, Limit, cursor_after, item_before
from fedmkt_coordinator.security import Operator
from fedmkt_coordinator.views import webhook_view

router = APIRouter(prefix="/v1/federations/{federation_id}/webhooks", tags=["webhooks"])

WEBHOOKS = "webhooks"


@router.post(
    "",
    status_code=201,
    dependencies=[Operator],
    summary="Send this federation's events to an address",
    responses={200: {"model": WebhookCreated, "description": "It was there, with these kinds"}},
)
async def create(context: Ctx, federation_id: str, wanted: WebhookRequest, response: Response) -> WebhookCreated:
    """Messages are signed as Standard Webhooks says. They begin with what happens next, come in order, and are repeated
    until the receiver answers 2xx; one that fails for days is disabled, with an event.

    201 when it is new; 200 when a webhook with this address and these kinds is there.
    """
    created, new = await webhooks.create(context.store, context.outbound, federation_id, wanted)
    response.status_code = 201 if new else 200
    response.headers["Cache-Control"] = "no-store"
    return created


@router.get("", dependencies=[Operator], response_model=WebhookPage, summary="List webhooks, without their secrets")
async def list_all(
    context: Ctx, request: Request, federation_id: str, cursor: Cursor = None, limit: Limit = 50
) -> Response:
    """How far each has come, and what failed last."""
    after = "" if cursor is None else item_before(WEBHOOKS, cursor)
    async with context.store.read() as tx:
        await tx.federation(federation_id)
        found = await tx.webhooks_after(federation_id, after, limit + 1)
    more = cursor_after(WEBHOOKS, found[limit - 1].id) if len(found) > limit else None
    page = WebhookPage(items=tuple(webhook_view(each) for each in found[:limit]), next_cursor=more)
    return conditional(request, page)


@router.delete("/{webhook_id}", status_code=204, dependencies=[Operator], summary="Delete a webhook")
async def delete(context: Ctx, federation_id: str, webhook_id: str) -> None:
    """A message that is on its way may still arrive."""
    await webhooks.delete(context.store, federation_id, webhook_id)


@router.post("/{webhook_id}/test", dependencies=[Operator], summary="Send a test message now")
async def send_test(context: Ctx, federation_id: str, webhook_id: str) -> WebhookTrial:
    """One message of type `webhook.test`; the answer says what came of it. Works for a disabled webhook, too."""
    return await webhooks.send_test(context.store, context.outbound, federation_id, webhook_id)
