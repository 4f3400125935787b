"""The worker's side: claim a job under a lease, keep it by heartbeats, hand in the result, or give up."""

from dataclasses import dataclass
from datetime import datetime, timedelta

from fedmkt import fault_points
from fedmkt.errors import Refusal
from fedmkt.protocol import (
    DistillJob,
    DistillResult,
    Heartbeat,
    HeartbeatReply,
    JobCompletion,
    JobFailure,
    MapJob,
    MapResult,
)
from fedmkt_coordinator import rounds
from fedmkt_coordinator.artifacts import ArtifactStore, ArtifactUnknown
from fedmkt_coordinator.store import Store, Transaction
from fedmkt_coordinator.store.records import AdapterRow, JobRow, RoundRow


class JobNotFree(Refusal):
    status = 409
    code = "job.not_free"
    title = "The job is not free"


class LeaseLost(Refusal):
    status = 409
    code = "job.lease_lost"
    title = "The job belongs to another attempt"


class WrongResult(Refusal):
    code = "job.wrong_result"
    title = "The result does not fit the job"
    remedy = "Run coordinator and LLM server in one version; the worker leaves the job to the next attempt."


class ResultMissing(Refusal):
    code = "job.artifact_missing"
    title = "The result names an artifact that was not uploaded"


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a silent worker keeps a job, and how often a job is tried."""

    lease_s: float
    max_attempts: int
    retry_delay_s: float

    def lease_end(self, now: datetime) -> datetime:
        return now + timedelta(seconds=self.lease_s)


async def claim(store: Store, patience: Patience, job_id: str, key: str | None) -> JobRow:
    """Take a queued job. A claim repeated with the same Idempotency-Key, because its answer was lost, is answered."""
    async with store.write() as tx:
        job = await _locked(tx, job_id)
        if job.state == "running" and key is not None and job.claim_key == key:
            return job
        if job.state != "queued":
            raise JobNotFree(f"job {job_id} is {job.state} in attempt {job.attempt}, queued is needed; leave it")
        return await tx.claim_job(job, patience.lease_end(tx.now), key)


async def heartbeat(store: Store, patience: Patience, job_id: str, beat: Heartbeat) -> HeartbeatReply:
    """Keep the job; `cancelled` tells the worker that nobody waits for it any more."""
    async with store.write() as tx:
        job = await _locked(tx, job_id)
        if job.state == "failed" and job.attempt == beat.attempt:
            return HeartbeatReply(lease_expires_at=tx.now, cancelled=True)
        _check_attempt(job, beat.attempt)
        renewed = await tx.renew_job(job, patience.lease_end(tx.now), beat.progress)
        if beat.progress is not None and beat.progress != job.progress and job.round_id is not None:
            step, done, total = beat.progress.step, beat.progress.done, beat.progress.total
            await tx.append(job.federation_id, "llm.progress", round_id=job.round_id, step=step, done=done, total=total)
    fault_points.reach("job.heartbeat.committed")
    assert renewed.lease_expires_at is not None
    return HeartbeatReply(lease_expires_at=renewed.lease_expires_at, cancelled=False)


async def complete(store: Store, artifacts: ArtifactStore, job_id: str, completion: JobCompletion) -> JobRow:
    """Hand in a result: job, round, adapter and events change together. The same result again changes nothing."""
    await _check_artifacts(artifacts, completion.result)
    async with store.write() as tx:
        job = await _locked(tx, job_id)
        if job.state == "done" and job.result == completion.result:
            return job
        _check_attempt(job, completion.attempt)
        result = completion.result
        match job.payload, result:
            case MapJob(), MapResult():
                await tx.set_map(job.id, result.artifact)
            case DistillJob(), DistillResult():
                await _commit_distilled(tx, job.payload, result)
            case _:
                raise WrongResult(f"job {job_id} is a {job.payload.kind}, the result is a {type(result).__name__}")
        done = await tx.finish_job(job, result)
        await rounds.advance(tx, job.federation_id)
        return done


async def fail(store: Store, patience: Patience, job_id: str, failure: JobFailure) -> JobRow:
    """Give an attempt up; the job is tried again until attempts are used up, then whatever needs it fails."""
    async with store.write() as tx:
        job = await _locked(tx, job_id)
        if job.state in ("queued", "failed") and job.attempt == failure.attempt and job.reason == failure.reason:
            return job  # told before
        _check_attempt(job, failure.attempt)
        return await _give_up(tx, patience, job, failure.reason, retry=failure.retry)


async def expire_leases(store: Store, patience: Patience) -> int:
    """Take jobs from workers that went silent; returns how many."""
    async with store.read() as tx:
        expired = await tx.expired_jobs(tx.now)
    for stale in expired:
        async with store.write() as tx:
            job = await _locked(tx, stale.id)
            if job.state == "running" and job.lease_expires_at is not None and job.lease_expires_at < tx.now:
                reason = (
                    f"the worker was silent for more than {patience.lease_s:g} s (lease_s): it was killed, perhaps for "
                    "want of memory, or lost its connection; the LLM server's log says how far it was"
                )
                await _give_up(tx, patience, job, reason, retry=True)
    return len(expired)


async def _give_up(tx: Transaction, patience: Patience, job: JobRow, reason: str, *, retry: bool) -> JobRow:
    if retry and job.attempt < patience.max_attempts:
        return await tx.requeue_job(job, tx.now + timedelta(seconds=patience.retry_delay_s * job.attempt), reason)
    failed = await tx.fail_job(job, reason)
    if isinstance(job.payload, DistillJob):
        row = await tx.round(job.payload.round_id)
        if row.state == "distilling":
            await tx.move_round(row, "failed", reason=f"the LLM server gave up after {job.attempt} attempts: {reason}")
    await rounds.advance(tx, job.federation_id)
    return failed


async def _locked(tx: Transaction, job_id: str) -> JobRow:
    """The federation first, then the job: the order that every transaction keeps, so that none wait in a circle."""
    await tx.federation((await tx.job(job_id)).federation_id, lock=True)
    return await tx.job(job_id, lock=True)


def _check_attempt(job: JobRow, attempt: int) -> None:
    if job.state != "running" or job.attempt != attempt:
        raise LeaseLost(f"attempt {attempt} of job {job.id} is over, the job is {job.state} in attempt {job.attempt}")


async def _check_artifacts(artifacts: ArtifactStore, result: DistillResult | MapResult) -> None:
    if isinstance(result, MapResult):
        digests = [result.artifact]
    else:
        digests = [each for each in (result.knowledge, result.adapter, result.averaged_adapter) if each is not None]
    for digest in digests:
        try:
            await artifacts.size(digest)
        except ArtifactUnknown as error:
            raise ResultMissing(f"artifact {digest} is not here; PUT /v1/artifacts/{digest} before") from error


async def _commit_distilled(tx: Transaction, payload: DistillJob, result: DistillResult) -> None:
    row = await tx.round(payload.round_id)
    if row.state != "distilling":
        raise LeaseLost(f"round {row.number} is {row.state}, distilling is needed; nobody waits for this result")
    if result.adapter is not None:
        await _add_adapter(tx, row, payload, result)
    config = payload.config
    deadline = tx.now + timedelta(seconds=config.schedule.apply_timeout_s)
    await tx.move_round(row, "applying", deadline=deadline, result=result)


async def _add_adapter(tx: Transaction, row: RoundRow, payload: DistillJob, result: DistillResult) -> None:
    parent = await tx.promoted_adapter(row.federation_id)
    promoted = result.gate is None or result.gate.decision == "kept"
    left_out = set(result.refused_sites)
    version = await tx.last_adapter_version(row.federation_id) + 1
    adapter = AdapterRow(
        federation_id=row.federation_id,
        version=version,
        parent=parent.version,
        round_id=row.id,
        artifact=result.adapter,
        created_at=tx.now,
        promoted=promoted,
        evaluations=dict(result.after),
        knowledge={each.site: each.knowledge for each in payload.uploads if each.site not in left_out},
    )
    await tx.add_adapter(adapter)
    kind = "adapter.promoted" if promoted else "adapter.kept_back"
    await tx.append(row.federation_id, kind, round_id=row.id, version=version, parent=parent.version)
