"""Opening the database, and the two kinds of transaction: one that reads, one that writes."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, event, make_url, text
from sqlalchemy.engine import URL
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from fedmkt_coordinator.store.adapters import Adapters
from fedmkt_coordinator.store.credentials import Credentials
from fedmkt_coordinator.store.federations import Federations
from fedmkt_coordinator.store.jobs import Jobs
from fedmkt_coordinator.store.rounds import Rounds
from fedmkt_coordinator.store.sites import Sites
from fedmkt_coordinator.store.statements import Outbox
from fedmkt_coordinator.store.uploads import Uploads
from fedmkt_coordinator.store.vocabularies import Vocabularies

Clock = Callable[[], datetime]
BUSY_TIMEOUT_MS = 10_000  # how long SQLite waits for another process's write


class Transaction(Credentials, Federations, Sites, Vocabularies, Rounds, Uploads, Jobs, Adapters):
    """Everything that can be asked of the database, inside one transaction."""


class Store:
    """The truth. `after_commit` learns of every committed change; it must neither wait nor fail."""

    def __init__(self, engine: AsyncEngine, clock: Clock) -> None:
        self.engine = engine
        self.after_commit: Callable[[Outbox], None] = lambda outbox: None
        self._clock = clock
        self._sqlite = engine.dialect.name == "sqlite"
        # SQLite has one writer; queueing here is fair, its own busy-waiting between connections is not.
        self._turn: AbstractAsyncContextManager[None] = asyncio.Lock() if self._sqlite else nullcontext()

    @asynccontextmanager
    async def read(self) -> AsyncIterator[Transaction]:
        """One consistent snapshot."""
        async with self.engine.connect() as connection:
            if not self._sqlite:
                await connection.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
            async with connection.begin():
                yield Transaction(connection, self._clock())

    @asynccontextmanager
    async def write(self) -> AsyncIterator[Transaction]:
        """All or nothing. Transactions of one federation run one after the other once they lock its row."""
        async with self._turn, self.engine.connect() as connection:
            await connection.execution_options(fedmkt_write=True)
            async with connection.begin():
                tx = Transaction(connection, self._clock())
                yield tx
        if tx.outbox.federations or tx.outbox.jobs:
            self.after_commit(tx.outbox)

    async def ping(self) -> None:
        async with self.engine.connect() as connection:
            await connection.execute(text("SELECT 1"))

    async def close(self) -> None:
        await self.engine.dispose()


def open_engine(database_url: str | None, state_dir: Path) -> AsyncEngine:
    """PostgreSQL by URL through asyncpg, else the SQLite file of the state folder."""
    if database_url is None:
        return _sqlite_engine(state_dir / "fedmkt.sqlite")
    url = make_url(database_url)
    if url.get_backend_name() == "sqlite":
        return _sqlite_engine(Path(url.database or "fedmkt.sqlite"))
    return create_async_engine(_asyncpg(url), pool_size=10, max_overflow=20, pool_pre_ping=True)


def _asyncpg(url: URL) -> URL:
    """What operators paste (postgres://, ?sslmode=) in the words of asyncpg."""
    query = dict(url.query)
    if "sslmode" in query:
        query["ssl"] = query.pop("sslmode")
    return url.set(drivername="postgresql+asyncpg", query=query)


def _sqlite_engine(path: Path) -> AsyncEngine:
    path.touch(mode=0o600)  # it holds the signing key; SQLite gives its other files the same mode
    engine = create_async_engine(URL.create("sqlite+aiosqlite", database=str(path)), pool_size=10, max_overflow=20)
    event.listen(engine.sync_engine, "connect", _prepare_sqlite)
    event.listen(engine.sync_engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: Any, record: object) -> None:
    connection.isolation_level = None  # transactions are begun below, not by the driver's guess
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", f"busy_timeout={BUSY_TIMEOUT_MS}", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    """A writer takes the lock at its first statement; a lock taken half-way could not wait for another writer."""
    writes = connection.get_execution_options().get("fedmkt_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
