"""Uploads: announce, ask, take back, complete. Sending is in `chunks`."""

from fastapi import APIRouter

from fedmkt.protocol import Manifest, UploadReceipt, UploadState
from fedmkt_coordinator import acceptance, uploads
from fedmkt_coordinator.context import Ctx
from fedmkt_coordinator.security import Site

router = APIRouter(prefix="/v1/uploads", tags=["knowledge"])


@router.post("", summary="Announce an upload, or take it up again")
async def announce(context: Ctx, site: Site, manifest: Manifest) -> UploadState:
    """One upload a round, site and kind: the same manifest again says what is still missing."""
    return await uploads.announce(context.desk, site, manifest)


@router.get("/{upload_id}", summary="What is still missing")
async def read(context: Ctx, site: Site, upload_id: str) -> UploadState:
    """The numbers of the chunks to send, counted from 0."""
    return await uploads.state(context.desk, site, upload_id)


@router.delete("/{upload_id}", status_code=204, summary="Take back an upload that is not complete")
async def abandon(context: Ctx, site: Site, upload_id: str) -> None:
    """To announce other bytes for the same round."""
    await uploads.abandon(context.desk, site, upload_id)


@router.post("/{upload_id}/complete", summary="Check the whole and get a receipt")
async def complete(context: Ctx, site: Site, upload_id: str) -> UploadReceipt:
    """Asked again, the same receipt. What is refused leaves nothing behind, and may be announced anew."""
    return await acceptance.complete(context.desk, site, upload_id)
