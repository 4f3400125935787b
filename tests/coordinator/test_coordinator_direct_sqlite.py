"""SQLite on the event loop: what of SQLAlchemy it leans on, and how many files it keeps open."""

import asyncio
from pathlib import Path

import pytest
from sqlalchemy import text

from fedmkt_coordinator.store.direct_sqlite import CONNECTIONS, sqlite_engine

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def open_files(database: Path) -> int:
    """How often this process has the database's file open."""
    links = [each for each in Path("/proc/self/fd").iterdir() if each.is_symlink()]  # the listing's own is gone by now
    return sum(str(each.readlink()) == str(database.resolve()) for each in links)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are counted in /proc")
async def test_readers_beyond_the_connections_wait_and_leave_no_file_open(tmp_path: Path) -> None:
    """SQLite keeps the file of a closed connection open for as long as another connection has the database open."""
    database = tmp_path / "fedmkt.sqlite"
    engine = sqlite_engine(database)
    reading, most = 0, 0

    async def read() -> int:
        nonlocal reading, most
        async with engine.connect() as connection:
            reading += 1
            most = max(most, reading)
            await asyncio.sleep(0)
            found = (await connection.execute(text("SELECT 7"))).scalar_one()
            reading -= 1
            return int(found)

    assert await asyncio.gather(*(read() for _ in range(100))) == [7] * 100
    assert most == CONNECTIONS
    assert 1 <= open_files(database) <= CONNECTIONS
    await engine.dispose()
    assert open_files(database) == 0


async def test_rows_can_be_read_after_the_cursor_was_let_go(tmp_path: Path) -> None:
    """SQLAlchemy 2.0.44 and later call `_async_soft_close`, which is not public, on the cursor of a result with rows.

    When this fails after an update, look at `sqlalchemy.ext.asyncio.result._ensure_sync_result`: what it calls now is
    what `direct_sqlite._Cursor` must have.
    """
    engine = sqlite_engine(tmp_path / "fedmkt.sqlite")
    async with engine.connect() as connection:
        result = await connection.execute(text("VALUES (1), (2), (3)"))
        assert [row[0] for row in result] == [1, 2, 3]
        assert (await connection.execute(text("CREATE TABLE t (a INTEGER)"))).returns_rows is False
    await engine.dispose()
