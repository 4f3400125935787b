"""Holding a claimed job: heartbeats in a thread, and the word that the job is not ours any more.

The job's own thread calls `report` between steps; that is where it learns that it shall stop.
"""

import contextvars
import logging
import threading
import time
from types import TracebackType
from typing import Self

from fedmkt import fault_points
from fedmkt.client import CoordinatorClient, CoordinatorProblem, CoordinatorUnreachable
from fedmkt.protocol import Heartbeat, JobView, LlmProgress
from fedmkt.stopping import StopFlag

log = logging.getLogger(__name__)

HEARTBEATS_PER_LEASE = 3
MIN_REPORT_INTERVAL_S = 0.2  # progress is sent earlier than the next heartbeat is due when a new step begins


class JobAbandoned(Exception):
    """The job was cancelled, or its lease went to somebody else: whatever comes out of it is of no use."""


class Lease:
    """One attempt at one job. Use as a context; heartbeats begin at once and end with the block."""

    def __init__(self, client: CoordinatorClient, job: JobView, stop: StopFlag) -> None:
        """`client`'s patience should be well under the lease, so that one lost answer costs one heartbeat."""
        self.job = job
        self._client = client
        self._stop = stop
        self._progress = LlmProgress()
        self._step_began, self._done_before = time.monotonic(), 0
        self._abandoned: str | None = None
        self._handing_in = False
        self._beat_now = threading.Event()
        self._ended = threading.Event()
        context = contextvars.copy_context()  # of the job: heartbeats are log lines and requests of its trace
        self._thread = threading.Thread(
            target=context.run, args=(self._beat,), name=f"heartbeat-{job.job_id}", daemon=True
        )

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ended.set()
        self._beat_now.set()
        self._thread.join()

    @property
    def progress(self) -> LlmProgress:
        return self._progress

    def report(self, step: str, done: int = 0, total: int = 0) -> None:
        """Note how far the job is. Raises JobAbandoned or Stopped when it shall end here."""
        self._stop.check()
        if self._abandoned is not None:
            raise JobAbandoned(self._abandoned)
        new_step = step != self._progress.step
        if new_step:
            self._step_began, self._done_before = time.monotonic(), done
        self._progress = LlmProgress(step=step, done=done, total=total, seconds_left=self._seconds_left(done, total))
        if new_step:
            self._beat_now.set()
        fault_points.reach(f"worker.{step}")

    def _seconds_left(self, done: int, total: int) -> float | None:
        if done <= self._done_before or total < done:
            return None
        each_s = (time.monotonic() - self._step_began) / (done - self._done_before)
        return round(each_s * (total - done), 1)

    def handing_in(self) -> None:
        """The result is on its way: that the job is no longer running is now the good answer to a heartbeat."""
        self._handing_in = True

    def _beat(self) -> None:
        while not self._ended.is_set() and self._abandoned is None:
            self._beat_once()
            self._ended.wait(MIN_REPORT_INTERVAL_S)
            self._beat_now.wait(self.job.lease_s / HEARTBEATS_PER_LEASE)
            self._beat_now.clear()

    def _beat_once(self) -> None:
        fields = {"job_id": self.job.job_id, "attempt": self.job.attempt}
        try:
            reply = self._client.heartbeat(
                self.job.job_id, Heartbeat(attempt=self.job.attempt, progress=self._progress)
            )
        except CoordinatorUnreachable as error:
            # Nobody else can get the job while the coordinator is away; whether it is still ours, it will say.
            log.warning("job.heartbeat_lost", extra={**fields, "reason": error.detail})
        except CoordinatorProblem as problem:
            level = logging.DEBUG if self._handing_in else logging.WARNING
            log.log(level, "job.lease_lost", extra={**fields, "code": problem.code, "reason": problem.detail})
            if 400 <= problem.problem.status < 500:
                self._abandoned = problem.detail
        else:
            if reply.cancelled:
                log.info("job.cancelled", extra=fields)
                self._abandoned = "the round was cancelled"
