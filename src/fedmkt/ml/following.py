"""What all processes of a team do with the model together: the leader says what, and with which weights."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeVar

from fedmkt.ml.party import Party, Snapshot
from fedmkt.ml.team import CallEnded, Team
from fedmkt.protocol import LoraConfig

log = logging.getLogger(__name__)

T_co = TypeVar("T_co", covariant=True)
Told = Callable[..., None]  # how far the work is; the leader's alone, may raise to end it on every process


class Work(Protocol[T_co]):
    """A part of a job that every process runs at the same time. It travels by pickle between them."""

    trains: ClassVar[bool]  # whether it needs the optimizer's state

    def run(self, party: Party, told: Told | None, /) -> T_co: ...


@dataclass(frozen=True)
class Call:
    lora: LoraConfig | None
    seed: int
    state: Snapshot
    work: Work[object]


def lead(party: Party, work: Work[T_co], told: Told | None) -> T_co:
    """Run `work` on every process of the party's team, all from the weights that the party has here."""
    team = party.team
    if team.size > 1:
        team.announce(Call(party.lora, party.seed, party.snapshot(moments=work.trains), work))
        with team.in_turn():
            pass
    return work.run(party, told)


def follow(team: Team, party_for: Callable[[LoraConfig | None, int], Party]) -> None:
    """Do what the leader announces, until it says that this was all. `party_for`: a party of that shape."""
    while (call := team.next_call()) is not None:
        with team.in_turn():  # a model that is loaded and then sharded is whole in memory for a while
            party = party_for(call.lora, call.seed)
        party.restore(call.state)
        try:
            call.work.run(party, None)
        except CallEnded as event:
            log.info("team.call_ended", extra={"reason": str(event)})
