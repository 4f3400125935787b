"""Bringing the database to the present schema. Safe to run from several replicas at once."""

from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, text
from sqlalchemy.ext.asyncio import AsyncEngine

MIGRATION_LOCK = 0x4645_444D  # 'FEDM'
SCRIPTS = Path(__file__).resolve().parent.parent / "migrations"


async def migrate(engine: AsyncEngine) -> None:
    """One transaction under a lock that all replicas share: all of a migration happens, or nothing."""
    async with engine.connect() as connection:
        await connection.execution_options(fedmkt_write=True)
        async with connection.begin():
            if connection.dialect.name == "postgresql":  # SQLite's write lock does the same by itself
                await connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": MIGRATION_LOCK})
            await connection.run_sync(_upgrade)


def _upgrade(connection: Connection) -> None:
    command.upgrade(alembic_config(connection), "head")


def alembic_config(connection: Connection) -> Config:
    """For Alembic's commands, inside the transaction of this connection."""
    config = Config()
    config.set_main_option("script_location", str(SCRIPTS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config
