"""Events: every transition leaves one, in the order of commits."""

from sqlalchemy import bindparam, select, update

from fedmkt_coordinator.store.audit import Audit, is_act
from fedmkt_coordinator.store.records import EventRow
from fedmkt_coordinator.store.tables import events, federations

_COUNT = (
    update(federations)
    .where(federations.c.id == bindparam("key"))
    .values(events=federations.c.events + 1)
    .returning(federations.c.events)
)


class Events(Audit):
    async def append(
        self,
        federation_id: str,
        kind: str,
        *,
        round_id: str | None = None,
        site: str | None = None,
        **data: str | int | float | bool | None,
    ) -> None:
        """Add a fact to the transaction; it is told to others when the transaction commits.

        The sequence is counted in the federation's row, whose lock is kept until the commit: whoever reads event n can
        be sure that no smaller number is still to come. A database sequence would not promise that.
        """
        sequence = (await self._connection.execute(_COUNT, {"key": federation_id})).scalar_one()
        row = EventRow(federation_id, int(sequence), self.now, kind, round_id, site, data)
        await self._insert(events, row)
        if is_act(kind, data):
            told = data if site is None else {"site": site, **data}
            self.audit(kind, round_id or federation_id, told, federation_id=federation_id)
        self.outbox.events.append(row)
        self.outbox.federations.add(federation_id)

    async def events_after(self, federation_id: str, sequence: int, limit: int) -> list[EventRow]:
        statement = select(events).where(events.c.federation_id == federation_id, events.c.sequence > sequence)
        return await self._all(EventRow, statement.order_by(events.c.sequence).limit(limit))
