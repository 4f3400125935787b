"""The worker's side of the queue."""

from fastapi import APIRouter

from fedmkt.protocol import Heartbeat, HeartbeatReply, JobCompletion, JobFailure, JobView, QueueView
from fedmkt_coordinator import jobs
from fedmkt_coordinator.context import Ctx
from fedmkt_coordinator.queue import GROUP, JOBS
from fedmkt_coordinator.routes.raw import IdempotencyKey
from fedmkt_coordinator.security import Worker
from fedmkt_coordinator.views import job_view

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])


@router.get("/queue", dependencies=[Worker], summary="Where job ids are read")
async def queue(context: Ctx) -> QueueView:
    """A Redis stream with a consumer group; entries have one field, `job_id`."""
    for_workers = context.settings.worker_redis_url
    url = for_workers.get_secret_value() if for_workers else context.redis_url
    return QueueView(redis_url=url, stream=JOBS, group=GROUP)


@router.post("/{job_id}/claim", dependencies=[Worker], summary="Take a job under a lease")
async def claim(context: Ctx, job_id: str, idempotency_key: IdempotencyKey = None) -> JobView:
    """409 when another worker has it or it is finished: acknowledge the entry and take the next one."""
    job = await jobs.claim(context.store, context.patience, job_id, idempotency_key)
    return job_view(job, context.settings.lease_s)


@router.post("/{job_id}/heartbeat", dependencies=[Worker], summary="Keep a job, and tell how far it is")
async def heartbeat(context: Ctx, job_id: str, beat: Heartbeat) -> HeartbeatReply:
    """Before the lease ends. `cancelled` says that nobody waits for the job any more."""
    return await jobs.heartbeat(context.store, context.patience, job_id, beat)


@router.post("/{job_id}/complete", dependencies=[Worker], summary="Hand in the result")
async def complete(context: Ctx, job_id: str, completion: JobCompletion) -> JobView:
    """The artifacts that it names must be there. The same result again changes nothing."""
    job = await jobs.complete(context.store, context.artifacts, job_id, completion)
    return job_view(job, context.settings.lease_s)


@router.post("/{job_id}/fail", dependencies=[Worker], summary="Give an attempt up")
async def fail(context: Ctx, job_id: str, failure: JobFailure) -> JobView:
    """It is tried again until the attempts are used up; then whatever needs it fails with this reason."""
    job = await jobs.fail(context.store, context.patience, job_id, failure)
    return job_view(job, context.settings.lease_s)
