"""The agent's loop: ask for the task, do it, ask again; for ever, whatever the coordinator and the network do."""

import logging
import time
from collections.abc import Callable

from fedmkt.client import CoordinatorProblem
from fedmkt.errors import Refusal
from fedmkt.logs import binding
from fedmkt.protocol import Apply, Finished, TrainAndUpload, Wait
from fedmkt.stopping import Stopped
from fedmkt.tracing import traced
from fedmkt_client_agent import tasks
from fedmkt_client_agent.patience import FIRST_PAUSE_S, LONGEST_PAUSE_S
from fedmkt_client_agent.site import Site
from fedmkt_client_agent.states import State
from fedmkt_client_agent.withheld import Withheld

log = logging.getLogger(__name__)

SHORTEST_POLL_S = 1.0  # a coordinator that answers 'wait' at once is not asked more often than this
FINISHED_PAUSE_S = 30.0
WITHHELD_PAUSE_S = 30.0  # then the coordinator is asked whether the round still goes on
TOO_LATE = frozenset({"round.closed", "round.not_applying"})


class Agent:
    def __init__(self, site: Site, poll_s: float) -> None:
        self._site = site
        self._poll_s = poll_s
        self._withheld: tuple[str, str] | None = None  # round and kind of the task that the policy holds back

    def run(self) -> None:
        """Until the stop flag is set, through every trouble there may be."""
        pause_s = FIRST_PAUSE_S
        while not self._site.stop.is_set:
            try:
                self.step()
            except Stopped:
                break
            except Withheld as error:
                self._withhold(error)
                pause_s = FIRST_PAUSE_S
                continue
            except Exception as error:  # noqa: BLE001 - the top of the loop; `trouble` logs it
                if isinstance(error, CoordinatorProblem) and error.code in TOO_LATE:
                    self._too_late(error)
                elif self._site.status.trouble(error, pause_s) == "revoked" and self._rejoined():
                    pause_s = FIRST_PAUSE_S
                    continue
            else:
                pause_s = FIRST_PAUSE_S
                continue
            self._site.stop.pause(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        self._site.status.update(state="stopped")
        log.info("agent.stopped", extra={"site": self._site.state.site})

    def step(self) -> None:
        """One task. While the policy allows no round at all, the coordinator is not even asked, and awaits nothing."""
        site, asked = self._site, time.monotonic()
        site.consent.check_open()
        if site.state.work is None or site.state.work.reported:
            site.consent.check_rounds()
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
        site, again = self._site, self._withheld == (task.round_id, task.kind)
        self._withheld = (task.round_id, task.kind)
        site.status.update(round_id=task.round_id, round_number=task.round_number)
        about = {"federation_id": site.state.federation_id, "site": site.state.site, "round_id": task.round_id}
        with traced(f"task {task.kind}"), binding(**about, round_number=task.round_number):
            if not again:
                site.status.update(state="working", step="")
                log.info("task.begun", extra={"task": task.kind})
            began = time.monotonic()
            with site.status.metrics.work(task.kind):
                do()
            log.info("task.done", extra={"task": task.kind, "seconds": round(time.monotonic() - began, 3)})
        self._withheld = None

    def _withhold(self, error: Withheld) -> None:
        """Not taking part, for now: the coordinator goes on by its quorum. Until something changes, or for a while."""
        site = self._site
        if (site.status.view.state, site.status.view.reason) != (error.state, error.detail):
            log.info("round.withheld", extra={"state": error.state, "code": error.code, "reason": error.detail})
        site.status.show(error.state, error.detail)
        before, ends = site.consent.signature(), time.monotonic() + WITHHELD_PAUSE_S
        while site.consent.signature() == before and time.monotonic() < ends:
            if site.stop.pause(0.5):
                return

    def _rejoined(self) -> bool:
        try:
            return self._site.rejoin(self._site)
        except Refusal as error:
            log.warning("site.not_rejoined", extra={"code": error.code, "reason": error.detail})
            return False

    def _idle(self, state: State, reason: str) -> None:
        view = self._site.status.view
        if (view.state, view.reason) != (state, reason):
            log.info(f"agent.{state}", extra={"reason": reason})
        self._site.status.show(state, reason)

    def _too_late(self, error: Refusal) -> None:
        """The round went on without this site, which may still apply; the next task says what to do now."""
        log.warning("task.too_late", extra={"code": error.code, "reason": error.detail})
        self._site.status.show("waiting", error.detail)
