"""Is it alive, is it ready, what is it."""

import asyncio
from collections.abc import Awaitable

from fastapi import APIRouter, Response

from fedmkt import __version__
from fedmkt.protocol import PROTOCOL_VERSION, Health, KeysView, Version
from fedmkt_coordinator.context import Ctx
from fedmkt_coordinator.security import Anyone

router = APIRouter(tags=["operations"])

CHECK_S = 5.0


@router.get("/healthz", dependencies=[Anyone], summary="The process answers")
async def health() -> Health:
    return Health(status="ok")


@router.get("/readyz", dependencies=[Anyone], summary="What it needs answers, too", responses={503: {"model": Health}})
async def ready(context: Ctx, response: Response) -> Health:
    """503 when the database or the artifact store fails. Without Redis requests still work, and jobs wait."""
    database, artifacts, redis = await asyncio.gather(
        _check(context.store.ping()), _check(context.artifacts.ping()), _check(context.queue.ping())
    )
    down = [each for each in (database, artifacts) if each != "ok"]
    if down:
        response.status_code = 503
    checks = {"database": database, "artifacts": artifacts, "redis": redis}
    return Health(status="unavailable" if down else "ok", checks=checks)


@router.get("/version", dependencies=[Anyone], summary="Versions of the program and of the protocol")
async def version() -> Version:
    return Version(version=__version__, protocol_version=PROTOCOL_VERSION)


@router.get("/v1/keys", dependencies=[Anyone], summary="Keys that sign receipts")
async def keys(context: Ctx) -> KeysView:
    return KeysView(public_keys=(context.key.public_hex,))


async def _check(dependency: Awaitable[None]) -> str:
    try:
        async with asyncio.timeout(CHECK_S):
            await dependency
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the answer: this dependency fails, and why
        return f"{type(error).__name__}: {error}"[:300]
    return "ok"
