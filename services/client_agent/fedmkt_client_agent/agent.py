"""The agent's loop: ask for the task, do it, ask again; for ever, whatever the coordinator and the network do."""

import logging
import time
from collections.abc import Callable

from fedmkt.client import CoordinatorProblem, CoordinatorUnreachable
from fedmkt.errors import Refusal
from fedmkt.logs import binding
from fedmkt.protocol import Apply, Finished, TrainAndUpload, Wait
from fedmkt.stopping import Stopped
from fedmkt.tracing import traced
from fedmkt_client_agent import tasks
from fedmkt_client_agent.site import Site

log = logging.getLogger(__name__)

FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0
SHORTEST_POLL_S = 1.0  # a coordinator that answers 'wait' at once is not asked more often than this
FINISHED_PAUSE_S = 30.0
FATAL = frozenset({"site.revoked"})
TOO_LATE = frozenset({"round.closed", "round.not_applying"})


class Agent:
    def __init__(self, site: Site, poll_s: float) -> None:
        self._site = site
        self._poll_s = poll_s

    def run(self) -> None:
        """Until the stop flag is set. Raises the Refusal when the site was revoked."""
        pause_s = FIRST_PAUSE_S
        while not self._site.stop.is_set:
            try:
                self.step()
            except Stopped:
                break
            except CoordinatorUnreachable as error:
                self._trouble("unreachable", error, pause_s)
            except Refusal as error:
                code = error.code if isinstance(error, CoordinatorProblem) else ""
                if code in FATAL:
                    raise
                if code in TOO_LATE:
                    self._too_late(error)
                else:
                    self._trouble("failed", error, pause_s)
            except Exception as error:
                log.exception("task.failed", extra={"pause_s": pause_s})
                self._site.status.update(state="failed", reason=type(error).__name__)
            else:
                pause_s = FIRST_PAUSE_S
                continue
            self._site.stop.pause(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        self._site.status.update(state="stopped")
        log.info("agent.stopped", extra={"site": self._site.state.site})

    def step(self) -> None:
        """One task."""
        site, asked = self._site, time.monotonic()
        with site.stop.interruptible():
            task = site.client.next_task(self._poll_s).task
        match task:
            case Wait(reason=reason):
                self._idle("waiting", reason)
                site.stop.wait(max(0.0, SHORTEST_POLL_S - (time.monotonic() - asked)))
            case Finished(reason=reason):
                self._idle("finished", reason)
                site.stop.wait(FINISHED_PAUSE_S)
            case TrainAndUpload():
                self._work(task, lambda: tasks.train_and_upload(site, task))
            case Apply():
                self._work(task, lambda: tasks.apply(site, task))
                site.status.update(rounds_applied=site.status.view.rounds_applied + 1)

    def _work(self, task: TrainAndUpload | Apply, do: Callable[[], None]) -> None:
        site = self._site
        site.status.update(state="working", round_id=task.round_id, round_number=task.round_number, step="")
        about = {"federation_id": site.state.federation_id, "site": site.state.site, "round_id": task.round_id}
        with traced(f"task {task.kind}"), binding(**about, round_number=task.round_number):
            log.info("task.begun", extra={"task": task.kind})
            began = time.monotonic()
            with site.status.metrics.work(task.kind):
                do()
            log.info("task.done", extra={"task": task.kind, "seconds": round(time.monotonic() - began, 3)})

    def _idle(self, state: str, reason: str) -> None:
        view = self._site.status.view
        if (view.state, view.reason) != (state, reason):
            log.info(f"agent.{state}", extra={"reason": reason})
        self._site.status.update(state=state, step="", done=0, total=0)
        self._site.status.update(reason=reason)

    def _too_late(self, error: Refusal) -> None:
        """The round went on without this site, which may still apply; the next task says what to do now."""
        log.warning("task.too_late", extra={"code": error.code, "reason": error.detail})
        self._site.status.update(state="waiting", step="", done=0, total=0)
        self._site.status.update(reason=error.detail)

    def _trouble(self, state: str, error: Refusal, pause_s: float) -> None:
        log.warning("task.failed", extra={"code": error.code, "reason": error.detail, "pause_s": pause_s})
        self._site.status.update(state=state, step="")
        self._site.status.update(reason=f"{error.code}: {error.detail}")
