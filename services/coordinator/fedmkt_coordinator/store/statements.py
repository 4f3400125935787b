"""What every part of a transaction is built from: typed reads, and writes that say whether they changed a row."""

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import Executable, Select, Table, Update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import CursorResult
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.sql.compiler import SQLCompiler

from fedmkt.errors import Refusal
from fedmkt_coordinator.store.direct_sqlite import DirectSqlite
from fedmkt_coordinator.store.records import EventRow

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Record = TypeVar("Record")


class StateChanged(Refusal):
    """A conditional update found another state than the one the decision was made on."""

    status = 409
    code = "state.changed"
    title = "Something else happened first"


@dataclass(slots=True)
class Outbox:
    """What to tell others once the transaction is committed: what happened, in which federations, jobs that wait."""

    events: list[EventRow] = field(default_factory=list)
    federations: set[str] = field(default_factory=set)
    jobs: bool = False


class Statements:
    """One transaction. `now` is one instant for all of it."""

    def __init__(self, connection: AsyncConnection, now: datetime) -> None:
        self.now = now
        self.outbox = Outbox()
        self._connection = connection

    async def _all(self, record: type[Record], statement: Executable) -> list[Record]:
        result = await self._connection.execute(statement)
        return [record(*row) for row in result]

    async def _first(self, record: type[Record], statement: Executable, **values: object) -> Record | None:
        """`values` are for the bound parameters of a statement that was built once, because it is asked often.

        On SQLite such a statement goes to the driver as it was compiled: what SQLAlchemy does around it takes ten times
        as long as the statement.
        """
        if values and isinstance(statement, Select) and isinstance(self._connection.dialect, DirectSqlite):
            found = list(_prepared(statement, self._connection.dialect).rows(self._connection, values))
            return record(*found[0]) if found else None
        row = (await self._connection.execute(statement, values)).first()
        return None if row is None else record(*row)

    async def _column(self, statement: Select[Any], **values: object) -> list[Any]:
        """The first column of all rows; in the same way."""
        if isinstance(self._connection.dialect, DirectSqlite):
            return [row[0] for row in _prepared(statement, self._connection.dialect).rows(self._connection, values)]
        return list((await self._connection.execute(statement, values)).scalars())

    async def _scalar(self, statement: Executable) -> Any:
        return (await self._connection.execute(statement)).scalar()

    async def _count(self, statement: Executable) -> int:
        """Rows that a write changed."""
        result = await self._connection.execute(statement)
        assert isinstance(result, CursorResult)
        return result.rowcount

    async def _change(self, statement: Update, expectation: str) -> None:
        """A conditional update of exactly one row."""
        changed = await self._count(statement)
        if changed != 1:
            raise StateChanged(f"{expectation}: {changed} rows were changed, 1 was expected; read it again and retry")

    async def _insert(self, table: Table, row: "DataclassInstance") -> None:
        await self._connection.execute(table.insert(), _values(row))

    async def _insert_all(self, table: Table, rows: "Sequence[DataclassInstance]") -> None:
        if rows:
            await self._connection.execute(table.insert(), [_values(row) for row in rows])

    async def _insert_new(self, table: Table, row: "DataclassInstance | Mapping[str, Any]") -> bool:
        """Insert unless a row with the same unique key stands there; True when the row is new."""
        values = dict(row) if isinstance(row, Mapping) else _values(row)
        dialect = sqlite if self._connection.dialect.name == "sqlite" else postgresql
        return await self._count(dialect.insert(table).values(values).on_conflict_do_nothing()) == 1


class _Prepared:
    """A statement in SQLite's words, the order of its parameters, and what turns its columns into what they mean."""

    def __init__(self, statement: Select[Any], dialect: DirectSqlite) -> None:
        compiled = statement.compile(dialect=dialect)
        assert isinstance(compiled, SQLCompiler)
        self._sql, self._names = str(compiled), tuple(compiled.positiontup or ())
        self._fixed = dict(compiled.params)  # what the statement itself says, such as 'open'
        kinds = [column.type.dialect_impl(dialect) for column in statement.selected_columns]
        self._read = [kind.result_processor(dialect, None) or _as_it_is for kind in kinds]

    def rows(self, connection: AsyncConnection, values: Mapping[str, object]) -> Iterator[list[Any]]:
        assert connection.sync_connection is not None
        driver = connection.sync_connection.connection.dbapi_connection
        assert isinstance(driver, sqlite3.Connection)
        given = {**self._fixed, **values}
        for row in driver.execute(self._sql, [given[name] for name in self._names]).fetchall():
            yield [read(value) for read, value in zip(self._read, row, strict=True)]


@lru_cache(64)
def _prepared(statement: Select[Any], dialect: DirectSqlite) -> _Prepared:
    return _Prepared(statement, dialect)


def _as_it_is(value: Any) -> Any:
    return value


def _values(row: "DataclassInstance") -> dict[str, Any]:
    return {each.name: getattr(row, each.name) for each in fields(row)}
