"""SQLite for one event loop: statements run where they are called; what waits for a lock or the disk leaves it.

A statement on a database in the page cache takes microseconds; handing it to a thread and back takes a hundred times as
long, for every statement. In WAL mode readers never wait. Writers wait twice: for the write lock and for the disk at
the commit, and those two calls go to a thread of the engine's own.
"""

import asyncio
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, event
from sqlalchemy.dialects import registry
from sqlalchemy.dialects.sqlite.pysqlite import SQLiteDialect_pysqlite
from sqlalchemy.engine import URL, Engine
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool, Pool
from sqlalchemy.util import await_only

BUSY_TIMEOUT_MS = 10_000  # how long SQLite waits for another process's write
WRITES = "fedmkt_write"  # execution option: the transaction will write
UNSYNCED = "fedmkt_unsynced"  # execution option: the commit need not wait for the disk
# All the connections there are; who wants one more waits for its turn. SQLite cannot close a database file while
# another connection of the process has it open (POSIX would drop that one's locks): each connection beyond these would
# leave one open file behind until all are closed.
CONNECTIONS = 8


class DirectSqlite(SQLiteDialect_pysqlite):
    """The standard library's driver, declared fit for an AsyncEngine: nothing in it waits but begin and commit."""

    driver = "direct"
    is_async = True
    supports_statement_cache = True

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._writing: set[Any] = set()  # connections in a transaction that writes: one at a time, as SQLite has it
        self._thread = _thread()

    @classmethod
    def get_pool_class(cls, url: URL) -> type[Pool]:
        return AsyncAdaptedQueuePool

    def begin(self, connection: sqlite3.Connection, *, writes: bool, unsynced: bool) -> None:
        """A writer takes the lock at once; a lock taken half-way could not wait for another writer."""
        if not writes:
            connection.execute("BEGIN")
            return
        connection.execute(f"PRAGMA synchronous={'NORMAL' if unsynced else 'FULL'}")
        self._writing.add(connection)
        connection.execute("PRAGMA busy_timeout=0")
        try:
            connection.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:  # another process writes: waiting for it is for the thread
            connection.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}")
            self._in_thread(lambda: connection.execute("BEGIN IMMEDIATE"))

    def do_execute(self, cursor: Any, statement: Any, parameters: Any, context: Any = None) -> None:
        cursor.execute(statement, parameters)
        await_only(_at_once())

    def do_executemany(self, cursor: Any, statement: Any, parameters: Any, context: Any = None) -> None:
        cursor.executemany(statement, parameters)
        await_only(_at_once())

    def do_execute_no_params(self, cursor: Any, statement: Any, context: Any = None) -> None:
        cursor.execute(statement)
        await_only(_at_once())

    def do_commit(self, dbapi_connection: Any) -> None:
        if dbapi_connection in self._writing:
            self._writing.discard(dbapi_connection)
            self._in_thread(dbapi_connection.commit)
        else:
            dbapi_connection.commit()

    def do_rollback(self, dbapi_connection: Any) -> None:
        self._writing.discard(dbapi_connection)
        dbapi_connection.rollback()

    def _in_thread(self, call: Callable[[], object]) -> None:
        await_only(_finished(asyncio.get_running_loop().run_in_executor(self._thread, call)))

    def disposed(self) -> None:
        """The engine's connections are closed; it may be used again."""
        self._thread.shutdown(wait=False)
        self._thread = _thread()


class _Cursor(sqlite3.Cursor):
    async def _async_soft_close(self) -> None:
        """What AsyncConnection calls on a cursor once its rows are fetched: nothing is held that another loop owns."""


class _Connection(sqlite3.Connection):
    def cursor(self, factory: Any = _Cursor) -> Any:
        return super().cursor(factory)


def _thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="sqlite-writer")


async def _at_once() -> None:
    """SQLAlchemy insists that every statement awaits something; this takes a microsecond."""


async def _finished(call: asyncio.Future[object]) -> None:
    """Also for a caller that is cancelled: what SQLite has begun is over before anybody touches the connection."""
    try:
        await asyncio.shield(call)
    except asyncio.CancelledError:
        await asyncio.wait([call])
        raise


registry.register("sqlite.direct", __name__, "DirectSqlite")


def sqlite_engine(path: Path) -> AsyncEngine:
    path.touch(mode=0o600)  # it holds the signing key; SQLite gives its other files the same mode
    engine = create_async_engine(
        URL.create("sqlite+direct", database=str(path)),
        pool_size=CONNECTIONS,
        max_overflow=0,
        connect_args={
            "factory": _Connection,
            "check_same_thread": False,  # the writer's thread commits what the loop's has written
        },
    )
    event.listen(engine.sync_engine, "connect", _prepare)
    event.listen(engine.sync_engine, "begin", _begin)
    event.listen(engine.sync_engine, "engine_disposed", _disposed)
    return engine


def _prepare(connection: sqlite3.Connection, record: object) -> None:
    connection.isolation_level = None  # transactions are begun below, not by the driver's guess
    for pragma in ("journal_mode=WAL", "synchronous=FULL", f"busy_timeout={BUSY_TIMEOUT_MS}", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin(connection: Connection) -> None:
    options, dialect = connection.get_execution_options(), connection.dialect
    assert isinstance(dialect, DirectSqlite)
    raw = connection.connection.dbapi_connection
    assert isinstance(raw, sqlite3.Connection)
    dialect.begin(raw, writes=options.get(WRITES, False), unsynced=options.get(UNSYNCED, False))


def _disposed(engine: Engine) -> None:
    assert isinstance(engine.dialect, DirectSqlite)
    engine.dialect.disposed()
