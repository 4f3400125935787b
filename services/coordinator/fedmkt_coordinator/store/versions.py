"""How far a federation is, as one short text: what a poll asks first, and mostly all that it asks.

Every transition appends an event and so moves the federation's sequence. A view that was made at the same sequence is
the same view, but for what no event tells: when a site was last seen, and what only the passing of time changes.
"""

import sqlite3
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import asyncpg
from sqlalchemy import Select, String, bindparam, cast, func, literal_column, select
from sqlalchemy.engine import URL
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.elements import ColumnElement

from fedmkt_coordinator.store.statements import Statements
from fedmkt_coordinator.store.tables import credentials, federations, rounds

Subject = Literal["federations", "federation", "round"]

_KEY: ColumnElement[str] = bindparam("key", type_=String)
_EVENTS = func.coalesce(func.sum(federations.c.events), literal_column("0"))
_VERSIONS: dict[Subject, Select[Any]] = {
    "federations": select(cast(func.count(), String) + literal_column("'.'") + cast(_EVENTS, String)),
    "federation": select(cast(federations.c.events, String)).where(federations.c.id == _KEY),
    "round": select(cast(federations.c.events, String))
    .join(rounds, rounds.c.federation_id == federations.c.id)
    .where(rounds.c.id == _KEY),
}


class Versions(Statements):
    async def version(self, subject: Subject, key: str = "") -> str:
        """As this transaction sees it; the subject exists."""
        return str(await self._scalar(_VERSIONS[subject].params(key=key)))


# ------------------------------------------------------------------------------------------------ a glance


@dataclass(frozen=True, slots=True)
class Seen:
    """The role of a token and the version of a subject; None for one that does not exist."""

    role: str | None
    version: str | None


# What a database raises that is gone, busy or restarting.
Failed = (sqlite3.Error, asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError)
GIVE_UP_S = 5


class Glance(Protocol):
    """One statement outside of any transaction: a poll that finds nothing new costs no more than this."""

    async def look(self, token_hash: str, subject: Subject, key: str) -> Seen:
        """Raises one of `Failed` when the database does not answer."""

    async def close(self) -> None: ...


def open_glance(url: URL) -> Glance:
    return _SqliteGlance(url) if url.get_backend_name() == "sqlite" else _PostgresGlance(url)


class _SqliteGlance:
    """A connection of its own, asked on the event loop: in WAL mode a reader waits for nobody, and takes 20 us."""

    def __init__(self, url: URL) -> None:
        self._path = url.database
        self._connection: sqlite3.Connection | None = None
        self._statements = _compiled(url)

    async def look(self, token_hash: str, subject: Subject, key: str) -> Seen:
        if self._connection is None:
            self._connection = sqlite3.connect(f"file:{self._path}?mode=ro", uri=True, timeout=0)
        sql, names = self._statements[subject]
        given = {"token": token_hash, "key": key}
        return Seen(*self._connection.execute(sql, [given[name] for name in names]).fetchone())

    async def close(self) -> None:
        if self._connection is not None:
            self._connection.close()


class _PostgresGlance:
    """The driver's own pool: what the engine does around a statement costs more than the statement."""

    def __init__(self, url: URL) -> None:
        self._url = url
        self._pool: asyncpg.Pool | None = None
        self._statements = _compiled(url)

    async def look(self, token_hash: str, subject: Subject, key: str) -> Seen:
        if self._pool is None:
            self._pool = asyncpg.create_pool(_dsn(self._url), min_size=0, max_size=4, command_timeout=GIVE_UP_S)
        pool = await self._pool  # the first time, this sets it up
        sql, names = self._statements[subject]
        given = {"token": token_hash, "key": key}
        return Seen(*await pool.fetchrow(sql, *(given[name] for name in names)))

    async def close(self) -> None:
        if self._pool is not None:
            self._pool.terminate()


def _dsn(url: URL) -> str:
    """The engine's address in the words of the bare driver."""
    query = dict(url.query)
    if "ssl" in query:
        query["sslmode"] = query.pop("ssl")
    return url.set(drivername="postgresql", query=query).render_as_string(hide_password=False)


def _compiled(url: URL) -> dict[Subject, tuple[str, tuple[str, ...]]]:
    """Each subject's statement in a database's own words, and which value stands in which place."""
    role = select(credentials.c.role).where(credentials.c.token_hash == bindparam("token", type_=String))
    dialect = url.get_dialect()()
    made: dict[Subject, tuple[str, tuple[str, ...]]] = {}
    for subject, version in _VERSIONS.items():
        compiled = select(role.scalar_subquery(), version.scalar_subquery()).compile(dialect=dialect)
        assert isinstance(compiled, SQLCompiler)
        made[subject] = str(compiled), tuple(compiled.positiontup or ())
    return made
