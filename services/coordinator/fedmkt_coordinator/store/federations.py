"""Federations: what was configured, what has been handed in, how many rounds are asked for."""

from datetime import datetime

from sqlalchemy import bindparam, exists, func, or_, select, update

from fedmkt.errors import Refusal
from fedmkt.protocol import FederationConfig, ModelCard
from fedmkt_coordinator.ids import new_id
from fedmkt_coordinator.store.records import FederationRow
from fedmkt_coordinator.store.statements import Statements
from fedmkt_coordinator.store.tables import ACTIVE_STATES, federations, rounds

_BY_ID = select(federations).where(federations.c.id == bindparam("key"))
_LOCKED = _BY_ID.with_for_update()


class FederationUnknown(Refusal):
    status = 404
    code = "federation.unknown"
    title = "No such federation"


class Federations(Statements):
    async def add_federation(self, config: FederationConfig) -> tuple[FederationRow, bool]:
        """The federation of that name, and whether it is new."""
        schedule = config.schedule
        row = FederationRow(
            id=new_id("fed"),
            name=config.name,
            config=config,
            created_at=self.now,
            public_set=None,
            public_samples=0,
            llm=None,
            llm_vocabulary=None,
            rounds_requested=0,
            events=0,
            every_s=schedule.every_s,
            rounds_left=schedule.rounds,
            next_round_at=None if schedule.every_s is None else self.now,
        )
        new = await self._insert_new(federations, row)
        found = await self._first(FederationRow, select(federations).where(federations.c.name == config.name))
        assert found is not None
        return found, new

    async def federation(self, federation_id: str, *, lock: bool = False) -> FederationRow:
        """`lock` makes every other writer of this federation wait until the transaction ends."""
        found = await self._first(FederationRow, _LOCKED if lock else _BY_ID, key=federation_id)
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

    async def set_schedule(
        self, federation: FederationRow, every_s: float | None, rounds_left: int | None, next_round_at: datetime | None
    ) -> None:
        await self._change(
            update(federations)
            .where(federations.c.id == federation.id)
            .values(every_s=every_s, rounds_left=rounds_left, next_round_at=next_round_at),
            f"federation {federation.id} is gone",
        )

    async def set_paused(self, federation: FederationRow, paused_at: datetime | None) -> None:
        await self._change(
            update(federations).where(federations.c.id == federation.id).values(paused_at=paused_at),
            f"federation {federation.id} is gone",
        )

    async def federations_due(self, now: datetime) -> list[str]:
        """Federations that time may move: an active round past its deadline, or none active and one wanted."""
        active = rounds.c.state.in_(ACTIVE_STATES)
        of_this = rounds.c.federation_id == federations.c.id
        late = exists().where(of_this, active, rounds.c.deadline <= now)
        begun = select(func.count()).select_from(rounds).where(of_this).scalar_subquery()
        wanted = or_(federations.c.rounds_requested > begun, federations.c.next_round_at <= now)
        idle = ~exists().where(of_this, active) & federations.c.paused_at.is_(None) & wanted
        rows = await self._connection.execute(select(federations.c.id).where(or_(late, idle)))
        return [str(row[0]) for row in rows]
