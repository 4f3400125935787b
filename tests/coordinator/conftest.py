"""Real PostgreSQL, real Redis, and a coordinator in process that speaks to them."""

import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from sqlalchemy import make_url, text
from sqlalchemy.ext.asyncio import create_async_engine

from coordinator_servers import (
    Stages,
    Worlds,
    settings_for,
    until_collecting,
    until_distilling,
    until_ready,
)
from coordinator_world import Clock, World
from fedmkt_coordinator.store import Store, open_engine
from fedmkt_coordinator.store.migrate import migrate
from real_servers import RedisProcess, folder_in_memory


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def state_dir() -> Iterator[Path]:
    with folder_in_memory() as folder:
        yield folder


# ------------------------------------------------------------------------------------------------ servers


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


@pytest.fixture
async def worlds(clock: Clock) -> AsyncIterator[Worlds]:
    async with AsyncExitStack() as stack:
        yield Worlds(stack, clock)


@pytest.fixture
async def world(worlds: Worlds, state_dir: Path, redis_server: RedisProcess) -> World:
    """A coordinator on SQLite and a real Redis, whose time stands still."""
    return await worlds.open(settings_for(state_dir, redis_server.url))


# ------------------------------------------------------------------------------------------------ stages


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
