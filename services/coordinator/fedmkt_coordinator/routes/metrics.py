"""The page that Prometheus reads."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from fedmkt_coordinator.context import Ctx, context_of
from fedmkt_coordinator.security import Allow, Principal

router = APIRouter(tags=["operations"])


class AllowScrape(Allow):
    """The readers' roles, or anybody where `metrics_open` says so."""

    async def __call__(
        self,
        request: Request,
        bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))],
    ) -> Principal:
        if context_of(request).settings.metrics_open:
            return Principal("anyone", "scrape")
        return await super().__call__(request, bearer)


@router.get(
    "/metrics",
    dependencies=[Depends(AllowScrape("operator", "viewer"))],
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "Prometheus text"}},
    summary="Metrics",
)
async def metrics(context: Ctx, request: Request) -> Response:
    """Prometheus's text format, or OpenMetrics if the Accept header asks for it."""
    checks = await context.dependencies.check()
    figures = None
    if checks["database"].ok:
        async with context.store.read() as tx:
            figures = await tx.figures()
    accept, interval_s = request.headers.get("accept", ""), context.settings.keeper_interval_s
    page, media_type = context.metrics.page(accept, checks, figures, interval_s)
    return Response(page, headers={"Content-Type": media_type, "Cache-Control": "no-store"})
