"""The audit log: who did what, each row chained to the one before it by SHA-256.

What a transaction does is noted as it goes along and written just before the commit (`seal`): the lock on the head of
the chain is taken last of all locks and held for a moment, so that writers of all replicas queue for it and never wait
in a circle. What is not committed is not in the log; what is committed is.
"""

from contextvars import ContextVar
from dataclasses import dataclass, replace
from datetime import datetime

from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from fedmkt.protocol import FIRST_DIGEST, AuditEntry, audit_digest
from fedmkt_coordinator.store.records import AuditRow, EventData
from fedmkt_coordinator.store.statements import Statements
from fedmkt_coordinator.store.tables import audit_head, audit_log


@dataclass(frozen=True, slots=True)
class Actor:
    """Who acts: `name` is a site's id, the beginning of a token's hash, or an address; never a token."""

    role: str
    name: str


SYSTEM = Actor("system", "coordinator")
# Set for the time of a request by `security.Allow`; a rule five calls deep need not carry who asked for it.
acting: ContextVar[Actor] = ContextVar("acting", default=SYSTEM)

# Events are acts, and every act is audited, a new kind too, but for those that only say how far something is.
PROGRESS_ONLY = frozenset({"llm.progress", "upload.announced"})
JOB_BEGINS = frozenset({"queued", "running"})


def is_act(kind: str, data: EventData) -> bool:
    return kind not in PROGRESS_ONLY and not (kind == "job.state" and data.get("state") in JOB_BEGINS)


@dataclass(frozen=True, slots=True)
class _Fact:
    federation_id: str | None
    actor: Actor
    action: str
    target: str
    data: EventData


class Audit(Statements):
    def __init__(self, connection: AsyncConnection, now: datetime) -> None:
        super().__init__(connection, now)
        self._facts: list[_Fact] = []

    def audit(
        self,
        action: str,
        target: str,
        data: EventData,
        *,
        federation_id: str | None = None,
        actor: Actor | None = None,
    ) -> None:
        """Note an act of `actor`, or of whoever this request belongs to; `seal` writes it."""
        self._facts.append(_Fact(federation_id, actor or acting.get(), action, target, data))

    async def seal(self) -> None:
        """Write what was noted, at the end of the chain. The last statements of a transaction."""
        if not self._facts:
            return
        head = select(audit_head.c.sequence, audit_head.c.digest).where(audit_head.c.id == 1).with_for_update()
        sequence, digest = (await self._connection.execute(head)).one()
        rows: list[AuditRow] = []
        for fact in self._facts:
            sequence += 1
            rows.append(_row(fact, sequence, self.now, digest))
            digest = rows[-1].digest
        self._facts = []
        await self._insert_all(audit_log, rows)
        await self._change(
            update(audit_head).where(audit_head.c.id == 1).values(sequence=sequence, digest=digest),
            "the head of the audit log is gone",
        )

    async def audit_entries(self, after: int, federation_id: str | None, limit: int) -> list[AuditEntry]:
        """Oldest first."""
        statement = select(audit_log).where(audit_log.c.sequence > after)
        if federation_id is not None:
            statement = statement.where(audit_log.c.federation_id == federation_id)
        rows = await self._all(AuditRow, statement.order_by(audit_log.c.sequence).limit(limit))
        return [entry(row) for row in rows]

    async def audit_end(self) -> tuple[int, str]:
        """Sequence and digest of the last row; 0 and zeros of an empty log."""
        row = (await self._connection.execute(select(audit_head.c.sequence, audit_head.c.digest))).one()
        return int(row[0]), str(row[1])


def entry(row: AuditRow) -> AuditEntry:
    """As it stands there: whether it fits its digest is for `fedmkt.audit_chain` to find out."""
    return AuditEntry(
        sequence=row.sequence,
        at=row.at,
        federation_id=row.federation_id,
        role=row.role,
        actor=row.actor,
        action=row.action,
        target=row.target,
        data=row.data,
        previous=row.previous,
        digest=row.digest,
    )


def _row(fact: _Fact, sequence: int, at: datetime, previous: str) -> AuditRow:
    row = AuditRow(
        sequence=sequence,
        at=at,
        federation_id=fact.federation_id,
        role=fact.actor.role,
        actor=fact.actor.name,
        action=fact.action,
        target=fact.target,
        data=fact.data,
        previous=previous,
        digest=FIRST_DIGEST,
    )
    return replace(row, digest=audit_digest(entry(row)))
