"""Jobs of the LLM server: claimed under a lease, renewed by heartbeats, tried a bounded number of times."""

from datetime import datetime
from typing import Any

from sqlalchemy import func, select, update

from fedmkt.errors import Refusal
from fedmkt.protocol import DistillJob, DistillResult, LlmProgress, MapJob, MapResult
from fedmkt.tracing import current_header
from fedmkt_coordinator.ids import new_id
from fedmkt_coordinator.store.events import Events
from fedmkt_coordinator.store.records import JobRow
from fedmkt_coordinator.store.tables import jobs


class JobUnknown(Refusal):
    status = 404
    code = "job.unknown"
    title = "No such job"


class Jobs(Events):
    async def add_job(self, payload: DistillJob | MapJob, job_id: str | None = None) -> JobRow:
        payload = payload.model_copy(update={"traceparent": current_header()})
        row = JobRow(
            id=job_id or new_id("job"),
            federation_id=payload.federation_id,
            round_id=payload.round_id if isinstance(payload, DistillJob) else None,
            payload=payload,
            state="queued",
            attempt=0,
            claim_key=None,
            created_at=self.now,
            due_at=self.now,
            lease_expires_at=None,
            progress=None,
            reason=None,
            result=None,
            finished_at=None,
        )
        await self._insert(jobs, row)
        await self._tell_job(row)
        self.outbox.jobs = True
        return row

    async def job(self, job_id: str, *, lock: bool = False) -> JobRow:
        statement = select(jobs).where(jobs.c.id == job_id)
        found = await self._first(JobRow, statement.with_for_update() if lock else statement)
        if found is None:
            raise JobUnknown(f"there is no job {job_id}; acknowledge and forget it")
        return found

    async def jobs(self, job_ids: list[str]) -> list[JobRow]:
        return await self._all(JobRow, select(jobs).where(jobs.c.id.in_(job_ids)))

    async def claim_job(self, row: JobRow, lease_expires_at: datetime, claim_key: str | None) -> JobRow:
        return await self._move_job(
            row,
            state="running",
            attempt=row.attempt + 1,
            lease_expires_at=lease_expires_at,
            claim_key=claim_key,
            progress=None,
            reason=None,
        )

    async def renew_job(self, row: JobRow, lease_expires_at: datetime, progress: LlmProgress | None) -> JobRow:
        kept = row.progress if progress is None else progress
        return await self._move_job(row, state="running", lease_expires_at=lease_expires_at, progress=kept)

    async def requeue_job(self, row: JobRow, due_at: datetime, reason: str) -> JobRow:
        self.outbox.jobs = True
        return await self._move_job(row, state="queued", due_at=due_at, lease_expires_at=None, reason=reason)

    async def fail_job(self, row: JobRow, reason: str) -> JobRow:
        return await self._move_job(row, state="failed", lease_expires_at=None, reason=reason, finished_at=self.now)

    async def finish_job(self, row: JobRow, result: DistillResult | MapResult) -> JobRow:
        return await self._move_job(row, state="done", lease_expires_at=None, result=result, finished_at=self.now)

    async def _move_job(self, row: JobRow, **values: Any) -> JobRow:
        """Change the job as it was read, or StateChanged."""
        await self._change(
            update(jobs)
            .where(jobs.c.id == row.id, jobs.c.state == row.state, jobs.c.attempt == row.attempt)
            .values(values),
            f"job {row.id} is no longer {row.state} in attempt {row.attempt}",
        )
        moved = await self.job(row.id)
        if moved.state != row.state:
            await self._tell_job(moved)
        return moved

    async def _tell_job(self, row: JobRow) -> None:
        await self.append(
            row.federation_id,
            "job.state",
            round_id=row.round_id,
            job_id=row.id,
            job=row.payload.kind,
            state=row.state,
            attempt=row.attempt,
            reason=row.reason,
        )

    async def expired_jobs(self, now: datetime) -> list[JobRow]:
        statement = select(jobs).where(jobs.c.state == "running", jobs.c.lease_expires_at < now)
        return await self._all(JobRow, statement.order_by(jobs.c.created_at))

    async def due_jobs(self, now: datetime) -> list[tuple[str, int]]:
        """(id, claims so far) of every job that waits for a worker, oldest first."""
        statement = select(jobs.c.id, jobs.c.attempt).where(jobs.c.state == "queued", jobs.c.due_at <= now)
        rows = await self._connection.execute(statement.order_by(jobs.c.created_at, jobs.c.id))
        return [(str(row[0]), int(row[1])) for row in rows]

    async def queued_jobs(self) -> int:
        return int(await self._scalar(select(func.count()).select_from(jobs).where(jobs.c.state == "queued")))
