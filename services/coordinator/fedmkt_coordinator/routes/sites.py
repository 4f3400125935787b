"""Enrolment, and what a site says and asks about itself."""

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from fedmkt.protocol import (
    AccessToken,
    Enrolled,
    Enrolment,
    EnrolmentToken,
    EnrolmentTokenRequest,
    Name,
    SiteModel,
    SiteSelf,
    TaskEnvelope,
    TokenRequest,
    VocabularyReceipt,
)
from fedmkt_coordinator import enrolment, federations, tasks
from fedmkt_coordinator.context import Ctx
from fedmkt_coordinator.routes.conditional import conditional
from fedmkt_coordinator.routes.raw import raw_body
from fedmkt_coordinator.security import Operator, Site, Stranger
from fedmkt_coordinator.views import site_self

router = APIRouter(prefix="/v1", tags=["sites"])


@router.post(
    "/federations/{federation_id}/enrolment-tokens",
    status_code=201,
    dependencies=[Operator],
    summary="Issue a one-time enrolment token",
)
async def issue_token(context: Ctx, federation_id: str, wanted: EnrolmentTokenRequest) -> EnrolmentToken:
    """Shown this once. An earlier unused token of the same site stops working."""
    life_s = context.settings.enrolment_token_s
    return await enrolment.issue_token(context.store, federation_id, wanted.site, life_s)


@router.post(
    "/federations/{federation_id}/sites/{name}/revoke",
    status_code=204,
    dependencies=[Operator],
    summary="Revoke a site at once",
)
async def revoke(context: Ctx, federation_id: str, name: Name) -> None:
    """From now on none of its credentials works, and its upload no longer counts. A site that is none stays none."""
    await enrolment.revoke(context.store, federation_id, name)


@router.post("/enrol", status_code=201, dependencies=[Stranger], summary="Enrol with a token and a public key")
async def enrol(context: Ctx, wanted: Enrolment) -> Enrolled:
    """The token works once; the same token with the same key gives the same answer, in case it was lost."""
    return await enrolment.enrol(context.store, wanted)


@router.post("/token", dependencies=[Stranger], summary="Exchange a signed assertion for an access token")
async def access_token(context: Ctx, wanted: TokenRequest, response: Response) -> AccessToken:
    """The assertion is a JWT (EdDSA): iss = sub = the site's id, aud fedmkt, iat, exp at most 300 s on, a new jti."""
    response.headers["Cache-Control"] = "no-store"
    site = await enrolment.accept_assertion(context.store, wanted.assertion, context.settings.clock_skew_s)
    life_s = context.settings.access_token_s
    return AccessToken(access_token=context.key.access_token(site.id, context.clock(), life_s), expires_in_s=life_s)


@router.get("/me", response_model=SiteSelf, summary="This site and its federation")
async def me(context: Ctx, site: Site, request: Request) -> Response:
    """With the federation's configuration and the digest of its public set."""
    async with context.store.read() as tx:
        return conditional(request, await site_self(tx, site))


@router.put(
    "/me/vocabulary", summary="Send the vocabulary", openapi_extra=raw_body("application/json", "Vocabulary.to_bytes()")
)
async def put_vocabulary(context: Ctx, site: Site, request: Request) -> VocabularyReceipt:
    """The bytes of `Vocabulary.to_bytes()`. Maps to and from the LLM's vocabulary are built next."""
    data = await request.body()
    return await federations.put_vocabulary(context.store, context.artifacts, context.vocabularies, site, data)


@router.put("/me/model", status_code=204, summary="Describe the model")
async def put_model(context: Ctx, site: Site, model: SiteModel) -> None:
    """Shown to the operator, and never trusted."""
    await federations.put_model(context.store, site, model)


@router.get("/me/task", summary="The one thing to do now")
async def next_task(
    context: Ctx,
    site: Site,
    wait_s: Annotated[float, Query(ge=0, le=600, description="hold 'wait' back for so long, if nothing changes")] = 0,
) -> TaskEnvelope:
    """`wait` may be held back for `wait_s` seconds; it is answered as soon as there is something to do."""
    longest_s = min(wait_s, context.settings.poll_max_s)
    with context.metrics.listeners.labels("long_poll").track_inprogress():
        task = await tasks.next_task(context.store, context.wakeups, context.waits_for, site, longest_s)
    return TaskEnvelope(task=task)
