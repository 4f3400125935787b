"""What the tasks of one site work with, built once at the start."""

from dataclasses import dataclass, field
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedmkt import fault_points
from fedmkt.client import CoordinatorClient, Traffic
from fedmkt.ml.checkpoints import Checkpoints
from fedmkt.ml.party import Party
from fedmkt.private_set import PrivateSet
from fedmkt.protocol import FederationConfig
from fedmkt.public_set import PublicSet
from fedmkt.round_plan import RoundPlan
from fedmkt.stopping import StopFlag
from fedmkt_client_agent.status import Status
from fedmkt_client_agent.store import AgentState, AgentStore, RoundWork


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
    checkpoint_s: float
    _counted: Traffic = field(default_factory=Traffic)

    def plan(self, round_number: int, slice_index: int) -> RoundPlan:
        assert self.state.federation_id is not None, "enrolled"
        return RoundPlan(self.state.federation_id, round_number, slice_index, self.config, self.public_set)

    @property
    def work(self) -> RoundWork:
        assert self.state.work is not None, "begin_round comes first"
        return self.state.work

    def begin_round(self, round_id: str) -> None:
        """Start a new page for this round, unless it is the one at hand."""
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
        self.state = self.store.commit(self.state)
        for done in work:
            fault_points.reach(f"agent.{done}.committed")

    def commit_party(self, *, state: dict[str, Any] | None = None, **changes: Any) -> None:
        """`commit`, together with the party as it is in memory now."""
        saved = self.store.save_party(self.state, self.party.save)
        self.state = saved.model_copy(update=state or {})
        self.commit(**changes)

    def progress(self, step: str, done: int, total: int, /) -> None:
        """The progress of every phase: shown, logged now and again, and the place where a stop is noticed."""
        self.status.progress(step, done, total)
        fault_points.reach(f"agent.{step}")
        self.stop.check()

    def checkpoints(self, phase: str) -> Checkpoints:
        """Of one training of this round."""
        return Checkpoints(
            self.store.checkpoint, f"{self.work.round_id} {phase}", interval_s=self.checkpoint_s, stop=self.stop
        )
