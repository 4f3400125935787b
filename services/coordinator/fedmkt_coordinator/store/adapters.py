"""Versions of the LLM's adapter."""

from sqlalchemy import func, select, update

from fedmkt.errors import Refusal
from fedmkt_coordinator.store.records import AdapterRow
from fedmkt_coordinator.store.statements import Statements
from fedmkt_coordinator.store.tables import adapters


class AdapterUnknown(Refusal):
    status = 404
    code = "adapter.unknown"
    title = "No such adapter"


class Adapters(Statements):
    async def add_adapter(self, row: AdapterRow) -> None:
        """A new promoted version takes the place of the one promoted before; a version that exists stays as it is."""
        if await self._insert_new(adapters, row) and row.promoted:
            others = (adapters.c.federation_id == row.federation_id) & (adapters.c.version != row.version)
            await self._count(update(adapters).where(others).values(promoted=False))

    async def adapter(self, federation_id: str, version: int) -> AdapterRow:
        statement = select(adapters).where(adapters.c.federation_id == federation_id, adapters.c.version == version)
        found = await self._first(AdapterRow, statement)
        if found is None:
            raise AdapterUnknown(
                f"federation {federation_id} has no adapter version {version}; GET /v1/federations/{federation_id}"
                "/adapters lists them"
            )
        return found

    async def promote_adapter(self, row: AdapterRow) -> AdapterRow:
        """This version, and no other, is what the next job starts from."""
        await self._count(
            update(adapters)
            .where(adapters.c.federation_id == row.federation_id)
            .values(promoted=adapters.c.version == row.version)
        )
        return await self.adapter(row.federation_id, row.version)

    async def last_adapter_version(self, federation_id: str) -> int:
        statement = select(func.max(adapters.c.version)).where(adapters.c.federation_id == federation_id)
        return int(await self._scalar(statement))

    async def promoted_adapter(self, federation_id: str) -> AdapterRow:
        statement = select(adapters).where(adapters.c.federation_id == federation_id, adapters.c.promoted)
        found = await self._first(AdapterRow, statement)
        assert found is not None, "version 0 is written when the LLM registers, and one version is always promoted"
        return found

    async def adapters_before(self, federation_id: str, version: int | None, limit: int) -> list[AdapterRow]:
        """Newest first."""
        statement = select(adapters).where(adapters.c.federation_id == federation_id)
        if version is not None:
            statement = statement.where(adapters.c.version < version)
        return await self._all(AdapterRow, statement.order_by(adapters.c.version.desc()).limit(limit))
