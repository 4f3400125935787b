"""The audit log and its signed end."""

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from fedmkt.protocol import AuditHead, AuditPage
from fedmkt_coordinator.context import Ctx
from fedmkt_coordinator.routes.conditional import conditional
from fedmkt_coordinator.routes.paging import Cursor, cursor_after, number_before
from fedmkt_coordinator.security import Operator

router = APIRouter(prefix="/v1/audit", tags=["audit"])

AUDIT = "audit"

Rows = Annotated[int, Query(ge=1, le=1000, description="rows on a page")]
Federation = Annotated[str | None, Query(pattern=r"^[a-z]+_[0-9a-f]{16,32}$", description="rows about this one only")]


@router.get("", dependencies=[Operator], response_model=AuditPage, summary="Read the audit log, oldest first")
async def read(
    context: Ctx, request: Request, cursor: Cursor = None, federation_id: Federation = None, limit: Rows = 200
) -> Response:
    """Page by page with `cursor`. Only the log of all federations is without gaps."""
    async with context.store.read() as tx:
        found = await tx.audit_entries(number_before(AUDIT, cursor) or 0, federation_id, limit + 1)
    more = cursor_after(AUDIT, found[limit - 1].sequence) if len(found) > limit else None
    return conditional(request, AuditPage(items=tuple(found[:limit]), next_cursor=more))


@router.get("/head", dependencies=[Operator], summary="The end of the audit log, signed")
async def head(context: Ctx) -> AuditHead:
    """Keep it elsewhere: `fedmkt audit verify --head` finds out whether anything up to it was cut off or rewritten."""
    async with context.store.read() as tx:
        sequence, digest = await tx.audit_end()
    return context.key.audit_head(sequence, digest, context.clock())
