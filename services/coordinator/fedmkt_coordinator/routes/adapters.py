"""Versions of the LLM's adapter: which one counts, and its bytes."""

from typing import Annotated

from fastapi import APIRouter, Path, Request, Response

from fedmkt.protocol import AdapterRollback, AdapterView
from fedmkt_coordinator import adapters
from fedmkt_coordinator.context import Ctx
from fedmkt_coordinator.routes.artifacts import send_artifact
from fedmkt_coordinator.routes.conditional import conditional
from fedmkt_coordinator.security import Operator, Reader, Uploader
from fedmkt_coordinator.views import adapter_view

router = APIRouter(prefix="/v1/federations/{federation_id}/adapters/{version}", tags=["adapters"])

Number = Annotated[int, Path(ge=0, le=2**31 - 1, description="version; 0 is the bare base model")]


@router.get("", dependencies=[Reader], response_model=AdapterView, summary="Read one version")
async def read(context: Ctx, request: Request, federation_id: str, version: Number) -> Response:
    """Its parent, the round that made it, the knowledge it learned from and its held-out losses."""
    async with context.store.read() as tx:
        await tx.federation(federation_id)
        return conditional(request, adapter_view(await tx.adapter(federation_id, version)))


@router.post("/promote", dependencies=[Operator], summary="Start the next round from this version")
async def promote(context: Ctx, federation_id: str, version: Number) -> AdapterView:
    """409 while a round distils: it would put its own result in this place. Promoted again, nothing changes."""
    return adapter_view(await adapters.promote(context.store, federation_id, version))


@router.post("/rollback", dependencies=[Operator], summary="Go back from this version, which is promoted")
async def roll_back(context: Ctx, federation_id: str, version: Number, wanted: AdapterRollback) -> AdapterView:
    """To its parent, or to the version that is named. Answers with the version that is promoted now."""
    return adapter_view(await adapters.roll_back(context.store, federation_id, version, wanted.to_version))


@router.get(
    "/folder",
    dependencies=[Uploader],
    summary="Download this version as a PEFT folder",
    response_class=Response,
    responses={
        200: {
            "content": {"application/x-tar": {"schema": {"type": "string", "format": "binary"}}},
            "description": "tar of the folder, with ranges and 304",
        }
    },
)
async def folder(context: Ctx, request: Request, federation_id: str, version: Number) -> Response:
    """A tar of adapter_config.json and adapter_model.safetensors, as `peft` reads it."""
    async with context.store.read() as tx:
        federation = await tx.federation(federation_id)
        row = await tx.adapter(federation_id, version)
    if row.artifact is None:
        raise adapters.AdapterWithoutBytes(f"version {version} is the bare base model: there is nothing to download")
    lora = federation.config.lora is not None  # else the weights that differ from the base model's
    name = f"{federation.name}-adapter-{version}.{'tar' if lora else 'safetensors'}"
    headers = {"Content-Disposition": f'attachment; filename="{name}"'}
    media_type = "application/x-tar" if lora else "application/octet-stream"
    return await send_artifact(context, row.artifact, request, headers, media_type)
