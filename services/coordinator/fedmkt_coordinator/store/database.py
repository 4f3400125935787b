"""Opening the database, and the two kinds of transaction: one that reads, one that writes."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from datetime import datetime
from pathlib import Path

from sqlalchemy import make_url, text
from sqlalchemy.engine import URL
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from fedmkt import fault_points
from fedmkt.tracing import span
from fedmkt_coordinator.dependencies import DependencyDown
from fedmkt_coordinator.store.adapters import Adapters
from fedmkt_coordinator.store.chunks import Chunks
from fedmkt_coordinator.store.credentials import Credentials
from fedmkt_coordinator.store.direct_sqlite import UNSYNCED, WRITES, sqlite_engine
from fedmkt_coordinator.store.federations import Federations
from fedmkt_coordinator.store.figures import Counts
from fedmkt_coordinator.store.jobs import Jobs
from fedmkt_coordinator.store.outages import FAILURES, is_away
from fedmkt_coordinator.store.rounds import Rounds
from fedmkt_coordinator.store.sites import Sites
from fedmkt_coordinator.store.statements import Outbox
from fedmkt_coordinator.store.uploads import Uploads
from fedmkt_coordinator.store.versions import Versions, open_glance
from fedmkt_coordinator.store.vocabularies import Vocabularies
from fedmkt_coordinator.store.webhooks import Webhooks

Clock = Callable[[], datetime]
CONNECT_S = 5


class Transaction(
    Counts, Credentials, Federations, Sites, Vocabularies, Rounds, Uploads, Jobs, Adapters, Webhooks, Versions
):
    """Everything that can be asked of the database, inside one transaction."""


class Store:
    """The truth. `after_commit` learns of every committed change; it must neither wait nor fail."""

    def __init__(self, engine: AsyncEngine, clock: Clock) -> None:
        self.engine = engine
        self.after_commit: Callable[[Outbox], None] = lambda outbox: None
        self.glance = open_glance(engine.url)
        self._clock = clock
        self._sqlite = engine.dialect.name == "sqlite"
        # SQLite has one writer; queueing here is fair, its own busy-waiting between connections is not.
        self._turn: AbstractAsyncContextManager[None] = asyncio.Lock() if self._sqlite else nullcontext()
        self.chunks = Chunks(lambda: self.write(unsynced=True))
        self._sighted: set[str] = set()
        self._sighting = asyncio.Lock()

    @asynccontextmanager
    async def read(self) -> AsyncIterator[Transaction]:
        """One consistent snapshot."""
        with span("database.read"):
            async with self._connected() as connection:
                if not self._sqlite:
                    await connection.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
                async with connection.begin():
                    yield Transaction(connection, self._clock())

    @asynccontextmanager
    async def write(self, *, unsynced: bool = False) -> AsyncIterator[Transaction]:
        """All or nothing. Transactions of one federation run one after the other once they lock its row.

        `unsynced` is for what can be told again (a chunk has come, a site was seen): the commit does not wait for the
        disk, so that a power cut may undo it. A killed process loses nothing, and later commits never overtake it.
        """
        with span("database.write"):
            async with self._turn, self._connected() as connection:
                await connection.execution_options(**{WRITES: True, UNSYNCED: unsynced})
                async with connection.begin():
                    if unsynced and not self._sqlite:
                        await connection.execute(text("SET LOCAL synchronous_commit = off"))
                    tx = Transaction(connection, self._clock())
                    yield tx
                    await tx.seal()
                    _reach(tx.outbox, "uncommitted")
        _reach(tx.outbox, "committed")
        if tx.outbox.federations or tx.outbox.jobs:
            self.after_commit(tx.outbox)

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[AsyncConnection]:
        """Raises DependencyDown when the database cannot be reached, or goes away before the block's end.

        Whether a commit that was on its way then counts is not known: every transition may be repeated.
        """
        reached = False
        try:
            async with self._opened() as connection:
                reached = True
                yield connection
        except FAILURES as error:
            if reached and not is_away(error):
                raise
            raise DependencyDown("database", error) from error

    @asynccontextmanager
    async def _opened(self) -> AsyncIterator[AsyncConnection]:
        if not self._sqlite:
            async with self.engine.connect() as connection:
                yield connection
            return
        # SQLAlchemy leaves the closing to a task, since it may wait. Here nothing waits, and of a thousand readers at
        # once each would hold its connection until the last has begun.
        connection = await self.engine.connect()
        try:
            yield connection
        finally:
            await connection.close()

    async def saw_site(self, site_id: str) -> None:
        """The site asked for its task. A thousand that ask at once are written in a few transactions."""
        self._sighted.add(site_id)
        async with self._sighting:
            if site_id not in self._sighted:  # written with others, while this one waited
                return
            sighted, self._sighted = self._sighted, set()
            async with self.write(unsynced=True) as tx:
                await tx.saw_sites(sighted)

    async def ping(self) -> None:
        async with self.engine.connect() as connection:
            await connection.execute(text("SELECT 1"))

    async def close(self) -> None:
        await self.glance.close()
        await self.engine.dispose()


def _reach(outbox: Outbox, moment: str) -> None:
    """A fault point before and after the commit of every transition, named for what it wrote: round.applying, ..."""
    if fault_points.is_armed():
        for event in outbox.events:
            subject = [event.kind.removesuffix(".state"), event.data.get("job"), event.data.get("state")]
            fault_points.reach(".".join([*(str(part) for part in subject if part), moment]))


def open_engine(database_url: str | None, state_dir: Path) -> AsyncEngine:
    """PostgreSQL by URL through asyncpg, else the SQLite file of the state folder."""
    if database_url is None:
        return sqlite_engine(state_dir / "fedmkt.sqlite")
    url = make_url(database_url)
    if url.get_backend_name() == "sqlite":
        return sqlite_engine(Path(url.database or "fedmkt.sqlite"))
    return create_async_engine(
        _asyncpg(url), pool_size=10, max_overflow=20, pool_pre_ping=True, connect_args={"timeout": CONNECT_S}
    )


def _asyncpg(url: URL) -> URL:
    """What operators paste (postgres://, ?sslmode=) in the words of asyncpg."""
    query = dict(url.query)
    if "sslmode" in query:
        query["ssl"] = query.pop("sslmode")
    return url.set(drivername="postgresql+asyncpg", query=query)
