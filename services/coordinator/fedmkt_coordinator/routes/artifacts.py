"""Artifacts by their SHA-256: streamed both ways, with ranges and 304."""

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated

from fastapi import APIRouter, Path, Request
from starlette.responses import Response, StreamingResponse

from fedmkt.errors import Refusal
from fedmkt.protocol import ArtifactReceipt
from fedmkt_coordinator.artifacts import ArtifactUnknown
from fedmkt_coordinator.context import Context, Ctx
from fedmkt_coordinator.problems import problem_response
from fedmkt_coordinator.routes.conditional import matches
from fedmkt_coordinator.routes.raw import ContentRange, raw_body
from fedmkt_coordinator.security import Downloader, Principal, Uploader

router = APIRouter(prefix="/v1/artifacts", tags=["artifacts"])

Sha256 = Annotated[str, Path(pattern=r"^[0-9a-f]{64}$")]
ONE_RANGE = re.compile(r"^bytes=(\d{0,18})-(\d{0,18})$")


class RangeOutside(Refusal):
    status = 416
    code = "artifact.range"
    title = "The range lies outside the artifact"
    remedy = "Content-Range of the answer says how many bytes there are: ask for a range within them."


@router.get("/{digest}", summary="Fetch an artifact", response_class=StreamingResponse)
async def read(context: Ctx, principal: Downloader, digest: Sha256, request: Request) -> Response:
    """Sites get what was made for them: public set, LLM's knowledge and vocabulary, maps, averaged adapter."""
    await _check_reader(context, principal, digest)
    return await send_artifact(context, digest, request)


async def send_artifact(
    context: Context,
    digest: str,
    request: Request,
    more: Mapping[str, str] = MappingProxyType({}),
    media_type: str = "application/octet-stream",
) -> Response:
    """The bytes, the range of them that was asked for, or 304; `more` are headers to add."""
    size = await context.artifacts.size(digest)
    headers = {
        **more,
        "ETag": f'"{digest}"',
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, max-age=31536000, immutable",
    }
    if matches(request.headers.get("if-none-match"), headers["ETag"]):
        return Response(status_code=304, headers=headers)
    try:
        asked = _range(request, headers["ETag"], size)
    except RangeOutside as refusal:
        return problem_response(
            416, refusal.code, refusal.title, refusal.detail, request.url.path, {"Content-Range": f"bytes */{size}"}
        )
    start, stop = asked or (0, size)
    headers["Content-Length"] = str(stop - start)
    if asked is not None:
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
    return StreamingResponse(
        await context.artifacts.stream(digest, start, stop),
        206 if asked else 200,
        headers=headers,
        media_type=media_type,
    )


@router.put(
    "/{digest}",
    dependencies=[Uploader],
    summary="Store an artifact",
    openapi_extra=raw_body("application/octet-stream", "bytes with that SHA-256"),
)
async def write(context: Ctx, digest: Sha256, request: Request, content_range: ContentRange = None) -> ArtifactReceipt:
    """The bytes must have the SHA-256 that the address names. With Content-Range, in parts and after broken lines."""
    if content_range is not None:
        return await context.artifacts.put_part(digest, content_range, request)
    size = await context.artifacts.put_stream(digest, request.stream())
    return ArtifactReceipt(digest=digest, size_bytes=size, arrived_bytes=size)


async def _check_reader(context: Context, principal: Principal, digest: str) -> None:
    """For a site, what is not meant for it does not exist."""
    if principal.site is None:
        return
    async with context.store.read() as tx:
        federation = await tx.federation(principal.site.federation_id)
        if not await tx.site_may_read(principal.site, federation, digest):
            raise ArtifactUnknown(f"there is no artifact {digest} for site {principal.site.name}")


def _range(request: Request, etag: str, size: int) -> tuple[int, int] | None:
    """One range [start, stop) of bytes; None for the whole, also when several are asked for, as RFC 9110 allows."""
    found = ONE_RANGE.match(request.headers.get("range", ""))
    if found is None or found[0] == "bytes=-" or request.headers.get("if-range", etag) != etag:
        return None
    first, last = found.groups()
    if first == "":
        start, stop = max(0, size - int(last)), size
    else:
        start, stop = int(first), min(size, int(last) + 1) if last else size
        if last and int(last) < int(first):
            return None
    if start >= stop:
        raise RangeOutside(f"{found[0]} of an artifact of {size} bytes")
    return start, stop
