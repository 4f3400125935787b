"""Migrations up and down, from an empty database and from one that an older coordinator filled."""

import base64
import json
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import Boolean, Connection, DateTime, MetaData, Table, inspect
from sqlalchemy.ext.asyncio import AsyncEngine

from coordinator_servers import Worlds, settings_for
from coordinator_world import Clock, SiteUnderTest, World, config
from fedmkt.protocol import UploadReceipt
from fedmkt.vocabulary import Vocabulary
from fedmkt_coordinator.store import Store, open_engine
from fedmkt_coordinator.store.migrate import SCRIPTS, alembic_config, migrate
from fedmkt_coordinator.store.tables import metadata
from real_servers import RedisProcess

pytestmark = [pytest.mark.anyio, pytest.mark.services]

OLDER = json.loads(Path(__file__).with_name("first_schema.json").read_text())
REVISIONS = [script.revision for script in reversed(list(ScriptDirectory(str(SCRIPTS)).walk_revisions()))]
Rows = dict[str, list[dict[str, Any]]]


@pytest.fixture
async def engine(database_url: str | None, state_dir: Path) -> AsyncIterator[AsyncEngine]:
    opened = open_engine(database_url, state_dir)
    yield opened
    await opened.dispose()


@pytest.fixture
async def older(engine: AsyncEngine, state_dir: Path) -> AsyncEngine:
    """The database of the first schema, with its artifacts beside it."""
    await run(engine, command.upgrade, "0001")
    async with engine.begin() as connection:
        await connection.run_sync(fill)
    for name, content in OLDER["objects"].items():
        path = state_dir / "objects" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(content))
    return engine


async def run(engine: AsyncEngine, what: Callable[[Config, str], None], revision: str) -> None:
    async with engine.begin() as connection:
        await connection.run_sync(lambda each: what(alembic_config(each), revision))


def tables_of(connection: Connection) -> dict[str, Table]:
    """As the database itself describes them, in an order in which rows can be inserted."""
    found = MetaData()
    found.reflect(connection)
    return {table.name: table for table in found.sorted_tables if table.name != "alembic_version"}


def fill(connection: Connection) -> None:
    tables = tables_of(connection)
    assert set(tables) == set(OLDER["rows"])
    for name, table in tables.items():
        for row in OLDER["rows"][name]:
            connection.execute(table.insert().values({key: typed(table, key, row[key]) for key in row}))


def typed(table: Table, column: str, value: Any) -> Any:
    """What SQLite kept as text and numbers, as both databases take it."""
    kind = table.c[column].type
    if value is not None and isinstance(kind, DateTime):
        time = datetime.fromisoformat(value)
        return time.replace(tzinfo=UTC) if kind.timezone else time
    return bool(value) if value is not None and isinstance(kind, Boolean) else value


def rows_of(connection: Connection) -> Rows:
    return {
        name: sorted((dict(row._mapping) for row in connection.execute(table.select())), key=str)
        for name, table in tables_of(connection).items()
    }


async def look(engine: AsyncEngine) -> Rows:
    async with engine.connect() as connection:
        return await connection.run_sync(rows_of)


async def differences(engine: AsyncEngine) -> list[Any]:
    async with engine.connect() as connection:
        return await connection.run_sync(
            lambda each: list(compare_metadata(MigrationContext.configure(each), metadata))
        )


async def names(engine: AsyncEngine) -> set[str]:
    async with engine.connect() as connection:
        return set(await connection.run_sync(lambda each: inspect(each).get_table_names()))


# ------------------------------------------------------------------------------------------------ up and down


def test_revisions_are_one_chain() -> None:
    assert [f"{number:04d}" for number in range(1, len(REVISIONS) + 1)] == REVISIONS


async def test_every_migration_goes_up_down_and_up_again(engine: AsyncEngine) -> None:
    for number, revision in enumerate(REVISIONS):
        await run(engine, command.upgrade, revision)
        there = await names(engine)
        await run(engine, command.downgrade, REVISIONS[number - 1] if number else "base")
        await run(engine, command.upgrade, revision)
        assert await names(engine) == there
    assert await differences(engine) == []
    await run(engine, command.downgrade, "base")
    assert await names(engine) == {"alembic_version"}
    await migrate(engine)
    assert await differences(engine) == []


async def test_an_older_database_loses_no_row_on_the_way_up_and_down(older: AsyncEngine) -> None:
    before = await look(older)
    assert {name: len(rows) for name, rows in before.items()} == {
        name: len(rows) for name, rows in OLDER["rows"].items()
    }
    await migrate(older)
    assert await differences(older) == []
    above = await look(older)
    for name, rows in before.items():
        kept = [{key: row[key] for key in rows[0]} for row in above[name]]
        assert sorted(kept, key=str) == rows, name
    await run(older, command.downgrade, "0001")
    assert await look(older) == before


# ------------------------------------------------------------------------------------------------ and then


async def test_every_older_row_is_read_by_the_store(older: AsyncEngine) -> None:
    await migrate(older)
    store, federation_id = Store(older, Clock()), OLDER["federation_id"]
    count = {name: len(rows) for name, rows in OLDER["rows"].items()}
    async with store.read() as tx:
        federation = await tx.federation(federation_id)
        assert (federation.config, federation.rounds_requested) == (config(), 3)
        rounds = await tx.rounds_before(federation_id, None, 10)
        assert [(row.number, row.state) for row in rounds] == [(2, "collecting"), (1, "completed")]
        assert rounds[1].result is not None
        assert len(await tx.parts([row.id for row in rounds])) == count["round_sites"]
        assert len(await tx.sites(federation_id)) == count["sites"]
        assert len(await tx.events_after(federation_id, 0, 1000)) == count["events"]
        jobs = await tx.jobs([row["id"] for row in OLDER["rows"]["jobs"]])
        assert {job.state for job in jobs} == {"done"}
        assert len(jobs) == count["jobs"]
        uploads = [await tx.upload(row["id"]) for row in OLDER["rows"]["uploads"]]
        assert sorted(upload.state for upload in uploads) == ["accepted", "accepted", "accepted", "open"]
        versions = await tx.adapters_before(federation_id, None, 10)
        assert [(row.version, row.parent, row.promoted) for row in versions] == [(1, 0, True), (0, None, False)]
        pairs = [(row["teacher"], row["student"]) for row in OLDER["rows"]["vocabulary_maps"]]
        assert len(await tx.maps(pairs)) == count["vocabulary_maps"]


def older_blob(name: str) -> bytes:
    return base64.b64decode(OLDER["objects"][name])


async def test_a_round_in_flight_goes_on_after_the_upgrade(
    older: AsyncEngine,
    worlds: Worlds,
    clock: Clock,
    state_dir: Path,
    database_url: str | None,
    redis_server: RedisProcess,
) -> None:
    """North's receipt is honoured; south, half sent in an older format of knowledge, sends anew; rounds go on."""
    clock.now = datetime.fromisoformat(OLDER["now"])
    world = await worlds.open(settings_for(state_dir, redis_server.url, database_url=database_url))
    world.federation_id = OLDER["federation_id"]
    for name in ("north", "south"):
        world.sites[name] = await older_site(world, name)
    view = await world.round(2)
    receipt = UploadReceipt.model_validate(OLDER["receipt"])
    assert await world.upload(world.sites["north"], view, older_blob(f"artifacts/17/{receipt.digest}")) == receipt
    south = world.sites["south"]
    half_sent = older_blob("uploads/upload_7d806025191c3ca4002e/00000")
    state = await world.send_chunks(south, world.manifest(south, view, half_sent), half_sent)
    assert state.upload_id == "upload_7d806025191c3ca4002e"
    complete = f"/v1/uploads/{state.upload_id}/complete"
    first_answer = (await world.send("POST", complete, south)).json()["code"]
    if first_answer == "upload.incomplete":
        await world.send_chunks(south, world.manifest(south, view, half_sent), half_sent)
        await world.refused("knowledge.unsupported_version", "POST", complete, south)
    else:
        assert first_answer == "knowledge.unsupported_version"
    await world.upload(south, view)
    await world.distill()
    for site in world.sites.values():
        await world.report(site, view)
    await world.play_round(3)
    assert [(await world.round(number)).state for number in (1, 2, 3)] == ["completed"] * 3
    answer = await world.send("GET", f"/v1/federations/{world.federation_id}/adapters", "viewer")
    assert [(each["version"], each["parent"]) for each in answer.json()["items"]] == [(3, 2), (2, 1), (1, 0), (0, None)]


async def older_site(world: World, name: str) -> SiteUnderTest:
    about = OLDER["sites"][name]
    async with world.context.store.read() as tx:
        artifact = (await tx.vocabulary(about["vocabulary"])).artifact
    words = Vocabulary.from_bytes(await world.context.artifacts.get(artifact))
    key = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(about["key"]))
    site = SiteUnderTest(name, words, key, about["site_id"], "")
    await world.renew(site)
    return site
