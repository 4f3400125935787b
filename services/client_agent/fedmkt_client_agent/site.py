"""What the tasks of one site work with, built once at the start."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedmkt import fault_points
from fedmkt.client import CoordinatorClient, Traffic
from fedmkt.ml.checkpoints import Checkpoints
from fedmkt.ml.party import Party
from fedmkt.privacy import PrivacyLedger
from fedmkt.private_set import PrivateSet
from fedmkt.protocol import FederationConfig
from fedmkt.public_set import PublicSet
from fedmkt.round_plan import RoundPlan
from fedmkt.stopping import StopFlag
from fedmkt_client_agent.consent import Consent, EndOfWork
from fedmkt_client_agent.patience import patiently
from fedmkt_client_agent.states import DISK_STATES, reason_of, state_of
from fedmkt_client_agent.status import Status
from fedmkt_client_agent.store import AgentState, AgentStore, RoundWork

if TYPE_CHECKING:
    from fedmkt.ml.private_budget import PrivacyBudget

Answer = TypeVar("Answer")
log = logging.getLogger(__name__)


@dataclass
class Site:
    """The party in memory is always the one that `state` names, but inside a phase, which undoes itself on errors."""

    client: CoordinatorClient
    store: AgentStore
    state: AgentState
    key: Ed25519PrivateKey
    party: Party
    private: PrivateSet
    config: FederationConfig
    public_set: PublicSet
    status: Status
    stop: StopFlag
    consent: Consent
    rejoin: Callable[["Site"], bool]  # after a revocation: True when a new token has let the site in again
    checkpoint_s: float
    budget: "PrivacyBudget | None" = None  # of differential privacy, where the site wants it
    _counted: Traffic = field(default_factory=Traffic)

    def came_in(self, client: CoordinatorClient, key: Ed25519PrivateKey, state: AgentState) -> None:
        """Again, after a revocation: under another id, with what it has learned."""
        self.client, self.key, self.state, self._counted = client, key, state, Traffic()

    def plan(self, round_number: int, slice_index: int) -> RoundPlan:
        assert self.state.federation_id is not None, "enrolled"
        return RoundPlan(self.state.federation_id, round_number, slice_index, self.config, self.public_set)

    @property
    def work(self) -> RoundWork:
        assert self.state.work is not None, "begin_round comes first"
        return self.state.work

    def begin_round(self, round_id: str, round_number: int) -> None:
        """Start a new page for this round, unless it is the one at hand."""
        self.consent.outbox.begin(round_id, round_number)
        if self.state.work is None or self.state.work.round_id != round_id:
            self.store.own_knowledge.unlink(missing_ok=True)
            last = self.state.work.report if self.state.work is not None else None
            # nothing changes a site between a report and the next round: it starts as it ended
            work = RoundWork(round_id=round_id, before=last.after if last is not None else None)
            self.state = self.store.commit(self.state.model_copy(update={"work": work}))

    def note(self, *, seconds: dict[str, float] | None = None, **work: Any) -> None:
        """Remember fields of the round's work, seconds by phase, and bytes since last time; `commit` writes them.

        What goes over the wire between two rounds counts for the second: the rounds' bytes add up to all there were.
        """
        now, old = self.client.traffic, self.work
        phase_seconds = {**old.phase_seconds}
        for phase, spent in (seconds or {}).items():
            phase_seconds[phase] = round(phase_seconds.get(phase, 0.0) + spent, 3)
        traffic = {
            "bytes_up": old.bytes_up + now.up - self._counted.up,
            "bytes_down": old.bytes_down + now.down - self._counted.down,
        }
        self._counted = now
        updated = old.model_copy(update={"phase_seconds": phase_seconds, **traffic, **work})
        self.state = self.state.model_copy(update={"work": updated})

    def commit(self, *, seconds: dict[str, float] | None = None, **work: Any) -> None:
        """`note`, and make it what the next process finds."""
        self.note(seconds=seconds, **work)
        for done in work:
            fault_points.reach(f"agent.{done}.uncommitted")
        self.state = self.kept(lambda: self.store.commit(self.state))
        for done in work:
            fault_points.reach(f"agent.{done}.committed")

    def commit_party(self, *, state: dict[str, Any] | None = None, **changes: Any) -> None:
        """`commit`, together with the party as it is in memory now."""
        saved = self.kept(lambda: self.store.save_party(self.state, self.party.save))
        self.state = saved.model_copy(update=state or {})
        self.commit(**changes)

    def charge(self, ledger: PrivacyLedger) -> None:
        """What has been spent of the privacy budget, before the step that it is for."""
        fault_points.reach("agent.privacy.uncommitted")
        spent = self.state.model_copy(update={"privacy": ledger})
        self.state = self.kept(lambda: self.store.commit(spent))
        fault_points.reach("agent.privacy.committed")

    def kept(self, write: Callable[[], Answer]) -> Answer:
        """Write what was worked for; a disk that is full or read-only is waited for, so that the work is not lost."""
        return patiently(write, self.status, self.stop, only=DISK_STATES)

    def progress(self, step: str, done: int, total: int, /) -> None:
        """The progress of every phase: shown, logged now and again, and the place where it is noticed that the program
        shall end or the hours have ended."""
        self.status.update(state="working")
        self.status.progress(step, done, total)
        fault_points.reach(f"agent.{step}")
        self.stop.check()
        self.consent.check_open()

    def checkpoints(self, phase: str) -> Checkpoints:
        """Of one training of this round."""
        end = EndOfWork(self.stop, self.consent)
        key = f"{self.work.round_id} {phase}" + ("" if self.budget is None else " with differential privacy")
        return CheckpointsWhileThereIsRoom(self.store.checkpoint, key, interval_s=self.checkpoint_s, stop=end)


class CheckpointsWhileThereIsRoom(Checkpoints):
    """A checkpoint that the disk does not take is missed, not the training."""

    def offer(self, party: Party, steps_done: int, total: int) -> None:
        try:
            super().offer(party, steps_done, total)
        except Exception as error:
            if state_of(error) not in DISK_STATES:
                raise
            log.warning("checkpoint.not_written", extra={"reason": reason_of(error)})
