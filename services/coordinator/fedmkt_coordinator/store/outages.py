"""Telling a database that is away from a mistake of ours, whichever driver says it."""

import sqlite3

import asyncpg
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

# What engines and drivers raise; OSError and its TimeoutError where a connection cannot be made.
FAILURES = (SQLAlchemyError, sqlite3.Error, asyncpg.PostgresError, asyncpg.InterfaceError, OSError)
# SQLSTATEs begin so: connection lost, given up for another transaction (two replicas that waited for each other), no
# resources, shut down or starting, a standby that only reads, disk failing.
AWAY = ("08", "40", "53", "57", "25006", "58")
SQLITE_AWAY = frozenset(
    {
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_CANTOPEN,
    }
)


def is_away(error: BaseException) -> bool:
    """Whether a statement or a commit failed because the database went away, and would work once it is back."""
    if isinstance(error, DBAPIError):
        return error.connection_invalidated or (error.orig is not None and is_away(error.orig))
    if isinstance(error, sqlite3.Error):
        return getattr(error, "sqlite_errorcode", 0) & 0xFF in SQLITE_AWAY  # the rest says what exactly
    if isinstance(error, asyncpg.InterfaceError):
        return "closed" in str(error)  # the connection or what it runs under; else the driver was used wrongly
    return (getattr(error, "sqlstate", None) or "").startswith(AWAY)
