"""One chunk: what a large upload asks hundreds of times, and so what goes past the framework where it can."""

import re
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import APIRouter, Request
from fastapi.routing import APIRoute
from starlette.responses import Response

from fedmkt.protocol import UploadState
from fedmkt_coordinator import uploads
from fedmkt_coordinator.context import Context, Ctx, context_of
from fedmkt_coordinator.keys import TokenExpired, TokenInvalid
from fedmkt_coordinator.routes.raw import ContentRange, raw_body
from fedmkt_coordinator.security import Principal, Site, admit
from fedmkt_coordinator.store.records import SiteRow, UploadRow

PLAIN = re.compile(r"^[0-9]{1,6}$", re.ASCII)
Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class ChunkRoute(APIRoute):
    """Whole chunks of an upload that this replica has just seen open; all else takes the usual way, and says why.

    Resolving dependencies, looking the site and its upload up and checking what we have made ourselves take longer than
    the chunk's digest. Who sends it is known by the signature of its token; that the site was not revoked meanwhile,
    and that its upload is open, is asked in the transaction that takes the chunk.
    """

    def get_route_handler(self) -> Handler:
        usual = super().get_route_handler()

        async def handle(request: Request) -> Response:
            context = context_of(request)
            known, number = _known(context, request), request.path_params["index"]
            if known is None or "content-range" in request.headers or not PLAIN.match(number):
                return await usual(request)
            upload, site = known
            admit(context, request, Principal("site", site.id, site=site))
            state = await uploads.put_next_chunk(context.desk, upload, site, int(number), request)
            return Response(state.model_dump_json(), media_type="application/json")

        return handle


def _known(context: Context, request: Request) -> tuple[UploadRow, SiteRow] | None:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or token.count(".") != 2:
        return None
    try:
        site_id = context.key.site_id(token, context.clock())
    except (TokenInvalid, TokenExpired):
        return None
    return context.store.chunks.known(request.path_params["upload_id"], site_id)


router = APIRouter(prefix="/v1/uploads", tags=["knowledge"], route_class=ChunkRoute)


@router.put(
    "/{upload_id}/chunks/{index}",
    summary="Send one chunk",
    openapi_extra=raw_body("application/octet-stream", "the bytes that the manifest announced"),
)
async def put_chunk(
    context: Ctx, site: Site, upload_id: str, index: int, request: Request, content_range: ContentRange = None
) -> UploadState:
    """In any order, any number of times, whole or in parts. What came before a line broke is kept: `arrived`."""
    return await uploads.put_chunk(context.desk, site, upload_id, index, content_range, request)
