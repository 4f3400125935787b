"""What a case begins from: a federation that is ready for rounds, copied with its database for every case."""

import asyncio
import shutil
import uuid
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import make_url, text
from sqlalchemy.ext.asyncio import create_async_engine

from chaos_federation import SITES, Federation
from nursery import Nursery
from real_servers import RedisProcess

PROCESSES = ("coordinator", "worker", *SITES)


class Databases:
    """Made empty or as copies of each other, on one PostgreSQL server."""

    def __init__(self, server: str) -> None:
        self._server = make_url(server)

    def make(self, template: str | None = None) -> str:
        name = f"chaos_{uuid.uuid4().hex[:12]}"
        asyncio.run(self._execute(f"CREATE DATABASE {name} TEMPLATE {template or 'template0'}"))
        return self._server.set(database=name).render_as_string(hide_password=False)

    def drop(self, url: str) -> None:
        asyncio.run(self._execute(f"DROP DATABASE {make_url(url).database} WITH (FORCE)"))

    async def _execute(self, statement: str) -> None:
        engine = create_async_engine(self._server.set(drivername="postgresql+asyncpg"), isolation_level="AUTOCOMMIT")
        async with engine.connect() as connection:
            await connection.execute(text(statement))
        await engine.dispose()


class Templates:
    """A federation that is ready for rounds, played once for each kind of database and copied for every case."""

    def __init__(self, folder: Path, nursery: Nursery, redis: RedisProcess, request: pytest.FixtureRequest) -> None:
        self._folder = folder
        self._nursery = nursery
        self._redis = redis
        self._request = request
        self._played: dict[str, Federation] = {}
        self._count = 0

    def databases(self, database: str) -> Databases:
        """`postgresql` is the server that all tests share; `postgresql to kill` is one of these tests' own."""
        if database == "postgresql":
            return Databases(self._request.getfixturevalue("postgres_server"))
        return Databases(self._request.getfixturevalue("chaos_postgres").url)

    def new(self, database: str, **more: Any) -> Federation:
        """Nothing is there but an empty database."""
        self._count += 1
        url = None if database == "sqlite" else self.databases(database).make()
        return Federation(self._folder / f"case-{self._count}", self._nursery, self._redis, url, **more)

    def ready(self, database: str, **more: Any) -> Federation:
        if database not in self._played:
            self._played[database] = self._play(database)
        played = self._played[database]
        self._count += 1
        folder = self._folder / f"case-{self._count}"
        shutil.copytree(played.folder, folder, ignore=shutil.ignore_patterns("logs", "lock"))
        url = None
        if played.database_url is not None:
            url = self.databases(database).make(make_url(played.database_url).database)
        copy = Federation(folder, self._nursery, self._redis, url, **more)
        copy.federation_id = played.federation_id
        return copy

    def _play(self, database: str) -> Federation:
        made = self.new(database)
        with made:
            made.start("coordinator")
            made.found()
            for name in PROCESSES[1:]:
                made.start(name)
            made.until_ready()
        return made
