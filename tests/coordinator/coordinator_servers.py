"""Coordinators in process, and the stages to which they have come."""

import json
import re
import shutil
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI

from coordinator_world import TOKENS, Clock, World
from fedmkt_coordinator.app import create_app
from fedmkt_coordinator.settings import Settings


def settings_for(state_dir: Path, redis_url: str | None, **changes: Any) -> Settings:
    values: dict[str, Any] = {
        "state_dir": state_dir,
        "redis_url": redis_url,
        "poll_recheck_s": 0.05,
        "retry_delay_s": 0,
        **{f"{role}_token": token for role, token in TOKENS.items()},
    }
    return Settings(**{**values, **changes})


_DESCRIPTIONS: list[dict[str, Any]] = []  # one for all worlds: they differ in nothing that it says


def undocumented(app: FastAPI, request: httpx.Request, problem: dict[str, Any]) -> str | None:
    """What is wrong if this call's description does not name this problem; None for calls that are none."""
    path = request.url.path
    if not _DESCRIPTIONS:
        _DESCRIPTIONS.append(app.openapi())
    for template, methods in _DESCRIPTIONS[0]["paths"].items():
        if not re.fullmatch(re.sub(r"\\\{\w+\\\}", "[^/]+", re.escape(template)), path):
            continue
        operation = methods.get(request.method.lower())
        if operation is None:
            continue
        answer = operation["responses"].get(str(problem["status"]), {})
        if problem["code"] in answer.get("content", {}).get("application/problem+json", {}).get("examples", {}):
            return None
        wrong = f"{problem['status']} {problem['code']}, which its description does not name"
        return f"{request.method} {template} answers {wrong}"
    return None


class Worlds:
    """Opens coordinators, several on one database if need be, and closes them after the test."""

    def __init__(self, stack: AsyncExitStack, clock: Clock) -> None:
        self._stack = stack
        self._clock = clock

    async def open(self, settings: Settings) -> World:
        app = create_app(settings, clock=self._clock, keep_time=False)
        await self._stack.enter_async_context(app.router.lifespan_context(app))
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)

        async def described(response: httpx.Response) -> None:
            if response.headers.get("content-type") == "application/problem+json":
                problem = json.loads(await response.aread())
                wrong = undocumented(app, response.request, problem)
                assert wrong is None, wrong

        http = await self._stack.enter_async_context(
            httpx.AsyncClient(transport=transport, base_url="http://coordinator", event_hooks={"response": [described]})
        )
        return World(app, http, self._clock)


async def until_ready(world: World) -> None:
    """Public set, LLM, sites and maps of the usual federation are there."""
    await world.ready()


async def until_collecting(world: World) -> None:
    await world.ready()
    await world.request_rounds()


async def until_distilling(world: World) -> None:
    await until_collecting(world)
    for site in world.sites.values():
        await world.upload(site, await world.round())


Stage = Callable[[World], Awaitable[None]]


class Stages:
    """Worlds that have come to a stage. Each stage is played once, and its folder copied for every test after."""

    def __init__(self, templates: Path) -> None:
        self._templates = templates
        self._played: dict[str, World] = {}

    async def open(self, stage: Stage, worlds: Worlds, state_dir: Path, redis_url: str) -> World:
        template = self._templates / stage.__name__
        if stage.__name__ not in self._played:
            async with AsyncExitStack() as stack:
                played = await Worlds(stack, Clock()).open(settings_for(template, redis_url))
                await stage(played)
            self._played[stage.__name__] = played
        played = self._played[stage.__name__]
        shutil.copytree(template, state_dir, dirs_exist_ok=True)
        world = await worlds.open(settings_for(state_dir, redis_url))
        world.federation_id, world.sites = played.federation_id, dict(played.sites)
        return world
