"""Webhooks: where a federation's events go, how far they have gone, and which replica is sending just now."""

from datetime import datetime

from sqlalchemy import delete, func, literal, or_, select, update

from fedmkt.errors import Refusal
from fedmkt_coordinator.store.columns import UtcTime
from fedmkt_coordinator.store.records import EventRow, WebhookRow
from fedmkt_coordinator.store.statements import Statements
from fedmkt_coordinator.store.tables import events, federations, webhooks


class WebhookUnknown(Refusal):
    status = 404
    code = "webhook.unknown"
    title = "No such webhook"


class Webhooks(Statements):
    async def add_webhook(self, row: WebhookRow) -> None:
        await self._insert(webhooks, row)

    async def webhook(self, federation_id: str, webhook_id: str) -> WebhookRow:
        statement = select(webhooks).where(webhooks.c.id == webhook_id, webhooks.c.federation_id == federation_id)
        found = await self._first(WebhookRow, statement)
        if found is None:
            raise WebhookUnknown(
                f"federation {federation_id} has no webhook {webhook_id}; GET /v1/federations/{federation_id}/webhooks "
                "lists them"
            )
        return found

    async def webhooks_after(self, federation_id: str, webhook_id: str, limit: int) -> list[WebhookRow]:
        statement = select(webhooks).where(webhooks.c.federation_id == federation_id, webhooks.c.id > webhook_id)
        return await self._all(WebhookRow, statement.order_by(webhooks.c.id).limit(limit))

    async def drop_webhook(self, webhook_id: str) -> None:
        await self._count(delete(webhooks).where(webhooks.c.id == webhook_id))

    # -------------------------------------------------------------------------------------------- delivery

    async def webhooks_due(self, limit: int) -> list[WebhookRow]:
        """Active ones that have not delivered every event, whose time has come and that nobody is sending for."""
        unclaimed = or_(webhooks.c.claimed_until.is_(None), webhooks.c.claimed_until <= self.now)
        statement = (
            select(webhooks)
            .join(federations, federations.c.id == webhooks.c.federation_id)
            .where(webhooks.c.state == "active", webhooks.c.due_at <= self.now, unclaimed)
            .where(federations.c.events > webhooks.c.delivered)
        )
        return await self._all(WebhookRow, statement.order_by(webhooks.c.due_at).limit(limit))

    async def claim_webhook(self, row: WebhookRow, claim: str, until: datetime) -> WebhookRow | None:
        """The webhook as it is, for the holder of `claim` alone until then; None if another was faster."""
        unclaimed = or_(webhooks.c.claimed_until.is_(None), webhooks.c.claimed_until <= self.now)
        statement = (
            update(webhooks)
            .where(webhooks.c.id == row.id, webhooks.c.state == "active", webhooks.c.due_at <= self.now, unclaimed)
            .values(claim=claim, claimed_until=until)
        )
        return await self._first(WebhookRow, statement.returning(webhooks))

    async def events_to_send(self, row: WebhookRow, limit: int) -> tuple[list[EventRow], int]:
        """The next events of the wanted kinds, and the sequence up to which there are no others."""
        last = await self._scalar(select(federations.c.events).where(federations.c.id == row.federation_id))
        statement = select(events).where(
            events.c.federation_id == row.federation_id, events.c.sequence > row.delivered, events.c.sequence <= last
        )
        if row.kinds:
            statement = statement.where(events.c.kind.in_(row.kinds))
        found = await self._all(EventRow, statement.order_by(events.c.sequence).limit(limit))
        return found, found[-1].sequence if len(found) == limit else int(last)

    async def webhook_delivered(self, webhook_id: str, claim: str, sequence: int, until: datetime) -> bool:
        """Events up to `sequence` are out; False if the claim was lost meanwhile."""
        values = {
            "delivered": sequence,
            "delivered_at": self.now,
            "failures": 0,
            "failing_since": None,
            "reason": None,
            "claimed_until": until,
        }
        return await self._own(webhook_id, claim, values)

    async def webhook_failed(self, webhook_id: str, claim: str, reason: str, due_at: datetime) -> bool:
        """Nobody sends before `due_at`."""
        values = {
            "failures": webhooks.c.failures + 1,
            "failing_since": func.coalesce(webhooks.c.failing_since, literal(self.now, UtcTime)),
            "reason": reason,
            "due_at": due_at,
        }
        return await self._own(webhook_id, claim, values)

    async def webhook_disabled(self, webhook_id: str, claim: str, reason: str) -> bool:
        return await self._own(webhook_id, claim, {"state": "disabled", "reason": reason})

    async def release_webhook(self, webhook_id: str, claim: str, passed_over: int | None) -> None:
        """`passed_over`: the sequence up to which no event of the wanted kinds is left."""
        values: dict[str, object] = {"claim": None, "claimed_until": None}
        if passed_over is not None:
            values["delivered"] = passed_over
        await self._own(webhook_id, claim, values)

    async def _own(self, webhook_id: str, claim: str, values: dict[str, object]) -> bool:
        mine = (webhooks.c.id == webhook_id) & (webhooks.c.claim == claim)
        return await self._count(update(webhooks).where(mine).values(values)) == 1
