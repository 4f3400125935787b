"""Takes job ids from the queue, claims them over HTTP, runs them, hands the result in.

The coordinator's database owns every job. The queue only says where to look, so an entry is acknowledged as soon as
the claim is answered: from then on the lease, not Redis, decides who works on it. A worker that was killed before that
finds the entry again under its own name, and claims with the same key: the attempt is the same one, not the next.
"""

import hashlib
import logging
import time
from collections.abc import Callable

import redis

from fedmkt import fault_points
from fedmkt.client import CoordinatorClient, CoordinatorProblem
from fedmkt.errors import Refusal
from fedmkt.logs import binding
from fedmkt.ml.team import TeamBroken
from fedmkt.protocol import DistillResult, JobCompletion, JobFailure, JobView, MapResult, QueueView
from fedmkt.session import RETRIED, CoordinatorUnreachable
from fedmkt.stopping import StopFlag, Stopped
from fedmkt.tracing import traced
from fedmkt_llm_server.lease import JobAbandoned, Lease
from fedmkt_llm_server.queue import Delivery, JobQueue

log = logging.getLogger(__name__)

BLOCK_S = 2.0  # longest wait for a new entry, so that a stop is noticed
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 15.0
MAX_REASON = 2000
NOTHING_TO_DO = frozenset({"job.not_free", "job.unknown"})  # answers to a claim after which the entry is of no use

Report = Callable[[str, int, int], None]
Run = Callable[[JobView, Report], DistillResult | MapResult]


class Worker:
    """One job at a time, for ever. `run` does the work of a job and has to be repeatable."""

    def __init__(
        self,
        client: CoordinatorClient,
        heartbeats: CoordinatorClient,
        find_queue: Callable[[], QueueView],
        run: Run,
        *,
        name: str,
        stop: StopFlag,
        on_job: Callable[[Lease | None], None],
    ) -> None:
        self._client = client
        self._heartbeats = heartbeats
        self._find_queue = find_queue
        self._run_job = run
        self._name = name
        self._stop = stop
        self._on_job = on_job

    def run(self) -> None:
        """Until the stop flag is set. Redis and the coordinator may go and come as they like. Raises TeamBroken."""
        pause_s = FIRST_PAUSE_S
        while True:
            began = time.monotonic()
            try:
                self._serve()
            except Stopped:
                return
            except TeamBroken:  # for good: whoever started the processes starts them again
                raise
            except (redis.RedisError, Refusal) as error:
                log.warning("queue.lost", extra={"reason": str(error), "pause_s": pause_s})
            except Exception:
                log.exception("worker.failed", extra={"pause_s": pause_s})
            if time.monotonic() - began > LONGEST_PAUSE_S:  # it worked for a while: a new trouble, not the same one
                pause_s = FIRST_PAUSE_S
            if self._stop.pause(pause_s):
                return
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _serve(self) -> None:
        queue = JobQueue(self._find_queue(), self._name)
        try:
            log.info("queue.connected", extra={"worker": self._name})
            while True:
                self._stop.check()
                delivery = queue.take(BLOCK_S)
                if delivery is not None:
                    self._handle(queue, delivery)
        finally:
            queue.close()

    def _handle(self, queue: JobQueue, delivery: Delivery) -> None:
        fault_points.reach("worker.taken")
        try:
            job = self._client.claim(delivery.job_id, self._claim_key(delivery))
        except CoordinatorProblem as problem:
            if problem.code not in NOTHING_TO_DO:
                raise
            log.info("job.not_claimed", extra={"job_id": delivery.job_id, "code": problem.code})
            queue.acknowledge(delivery)
            return
        fault_points.reach("worker.claimed")
        try:
            queue.acknowledge(delivery)
        except redis.RedisError as error:  # the job is ours all the same; the entry comes again and is dropped then
            log.warning("queue.not_acknowledged", extra={"job_id": job.job_id, "reason": str(error)})
        self.work(job)

    def _claim_key(self, delivery: Delivery) -> str:
        """One a delivery: a claim whose answer was lost is answered again, also to this worker's next process."""
        return hashlib.sha256(f"{self._name} {delivery.entry_id} {delivery.job_id}".encode()).hexdigest()

    def work(self, job: JobView) -> None:
        """Do a claimed job and hand in its result, or its failure. Raises Stopped when asked to end meanwhile."""
        payload = job.payload
        about = {"federation_id": payload.federation_id, "round_id": getattr(payload, "round_id", None)}
        with (
            traced(f"job {payload.kind}", parent=payload.traceparent, kind="consumer"),
            binding(job_id=job.job_id, attempt=job.attempt, **about),
        ):
            self._work(job)

    def _work(self, job: JobView) -> None:
        fields = {"job_id": job.job_id, "attempt": job.attempt, "kind": job.payload.kind}
        log.info("job.claimed", extra=fields)
        began = time.monotonic()
        try:
            with Lease(self._heartbeats, job, self._stop) as lease:
                self._on_job(lease)
                result = self._run_job(job, lease.report)
                fault_points.reach("worker.finished")
                lease.handing_in()
                # Inside the lease: heartbeats go on while a coordinator that is just restarting cannot take it.
                self._client.complete_job(job.job_id, JobCompletion(attempt=job.attempt, result=result))
                fault_points.reach("worker.completed")
        except JobAbandoned as event:
            log.info("job.abandoned", extra={**fields, "reason": str(event)})
        except Stopped:
            self._fail(job, "the LLM server is shutting down", retry=True)
            raise
        except TeamBroken as error:
            self._fail(job, f"{error.code}: {error.detail}", retry=True)
            raise
        except CoordinatorUnreachable as error:
            log.warning("job.result_lost", extra={**fields, "reason": error.detail})
        except Refusal as error:
            log.warning("job.refused", extra={**fields, "code": error.code, "reason": error.detail})
            self._fail(job, f"{error.code}: {error.detail}", retry=error.status in RETRIED)
        except Exception as error:
            log.exception("job.failed", extra=fields)
            self._fail(job, f"{type(error).__name__}: {error}", retry=True)
        else:
            log.info("job.done", extra={**fields, "seconds": round(time.monotonic() - began, 3)})
        finally:
            self._on_job(None)

    def _fail(self, job: JobView, reason: str, *, retry: bool) -> None:
        """Tell the coordinator; when it cannot be told, the lease lapses and says the same later."""
        try:
            self._heartbeats.fail_job(
                job.job_id, JobFailure(attempt=job.attempt, reason=reason[:MAX_REASON], retry=retry)
            )
        except Refusal as error:
            log.warning("job.failure_not_told", extra={"job_id": job.job_id, "reason": error.detail})
