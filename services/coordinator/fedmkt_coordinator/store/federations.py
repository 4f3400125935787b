"""Federations: what was configured, what has been handed in, how many rounds are asked for."""

from datetime import datetime

from sqlalchemy import exists, func, or_, select, update

from fedmkt.errors import Refusal
from fedmkt.protocol import FederationConfig, ModelCard
from fedmkt_coordinator.ids import new_id
from fedmkt_coordinator.store.records import FederationRow
from fedmkt_coordinator.store.statements import Statements
from fedmkt_coordinator.store.tables import ACTIVE_STATES, federations, rounds


class FederationUnknown(Refusal):
    status = 404
    code = "federation.unknown"
    title = "No such federation"


class Federations(Statements):
    async def add_federation(self, config: FederationConfig) -> tuple[FederationRow, bool]:
        """The federation of that name, and whether it is new."""
        row = FederationRow(new_id("fed"), config.name, config, self.now, None, 0, None, None, 0, 0)
        new = await self._insert_new(federations, row)
        found = await self._first(FederationRow, select(federations).where(federations.c.name == config.name))
        assert found is not None
        return found, new

    async def federation(self, federation_id: str, *, lock: bool = False) -> FederationRow:
        """`lock` makes every other writer of this federation wait until the transaction ends."""
        statement = select(federations).where(federations.c.id == federation_id)
        found = await self._first(FederationRow, statement.with_for_update() if lock else statement)
        if found is None:
            raise FederationUnknown(f"there is no federation {federation_id}; GET /v1/federations lists them")
        return found

    async def federations_after(self, name: str, limit: int) -> list[FederationRow]:
        statement = select(federations).where(federations.c.name > name).order_by(federations.c.name)
        return await self._all(FederationRow, statement.limit(limit))

    async def set_public_set(self, federation: FederationRow, digest: str, samples: int) -> None:
        await self._change(
            update(federations)
            .where(federations.c.id == federation.id)
            .values(public_set=digest, public_samples=samples),
            f"federation {federation.id} is gone",
        )

    async def set_llm(self, federation: FederationRow, model: ModelCard, fingerprint: str) -> None:
        await self._change(
            update(federations).where(federations.c.id == federation.id).values(llm=model, llm_vocabulary=fingerprint),
            f"federation {federation.id} is gone",
        )

    async def set_rounds_requested(self, federation: FederationRow, count: int) -> None:
        await self._change(
            update(federations)
            .where(federations.c.id == federation.id, federations.c.rounds_requested == federation.rounds_requested)
            .values(rounds_requested=count),
            f"rounds requested of federation {federation.id} are no longer {federation.rounds_requested}",
        )

    async def federations_due(self, now: datetime) -> list[str]:
        """Federations that time may move: an active round past its deadline, or none active and more asked for."""
        active = rounds.c.state.in_(ACTIVE_STATES)
        of_this = rounds.c.federation_id == federations.c.id
        late = exists().where(of_this, active, rounds.c.deadline <= now)
        begun = select(func.count()).select_from(rounds).where(of_this).scalar_subquery()
        idle = ~exists().where(of_this, active) & (federations.c.rounds_requested > begun)
        rows = await self._connection.execute(select(federations.c.id).where(or_(late, idle)))
        return [str(row[0]) for row in rows]
