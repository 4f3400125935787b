"""Several processes with one model, started by `accelerate launch`: the first leads, the others follow (`following`).

Everything a process says to the others, it says to all of them at once, and waits until they have said as much. So a
failure of one must reach the others before the next such moment: that is what `Team.together` is for. A process that
ends unasked breaks the team for good; whoever started the processes starts all of them again.
"""

import datetime
import logging
import os
import pickle
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.fsdp import fully_shard
from torch.distributed.rendezvous import rendezvous

from fedmkt.errors import Refusal

log = logging.getLogger(__name__)

T = TypeVar("T")
# Inside a call nobody waits longer than a step takes, and the leader's checkpoint. Between calls followers wait for
# years; when the leader ends, however it does, their connection to it says so.
CALL_TIMEOUT, IDLE_TIMEOUT = datetime.timedelta(minutes=30), datetime.timedelta(days=3650)


class TeamBroken(Refusal):
    status: ClassVar[int] = 503
    code: ClassVar[str] = "team.broken"
    title: ClassVar[str] = "Another process of this LLM server has ended"


class TeamMisused(Refusal):
    code: ClassVar[str] = "team.unusable"
    title: ClassVar[str] = "The processes cannot work together like this"


class CallEnded(Exception):
    """At a follower: the leader's call has ended early on every process, for a reason that the leader deals with."""


class Team:
    """One process alone, unless made by `form`. `sharded`: the base model's blocks are spread over the processes."""

    rank, size, sharded = 0, 1, False
    device: torch.device | None = None  # where `form` put this process

    @classmethod
    def form(cls, device: str = "auto", *, sharded: bool = False) -> "Team":
        """The team of this launch, as RANK, WORLD_SIZE, LOCAL_RANK and MASTER_ADDR describe it. Waits for everybody."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size > 1:
            return _Launched(device, sharded)
        if sharded:
            raise TeamMisused(
                "a model can be sharded over 2 processes or more, this is the only one; start the LLM server with "
                "`accelerate launch --num_processes N`, or leave shard out"
            )
        return cls()

    @property
    def leads(self) -> bool:
        return self.rank == 0

    @contextmanager
    def together(self) -> Iterator[None]:
        """What any process raises inside ends the call on all: the leader raises it, followers raise CallEnded."""
        yield

    def announce(self, call: object) -> None:
        """From the leader to all followers; None ends them."""

    def next_call(self) -> Any:
        """At a follower: what the leader announced, however long that takes."""
        raise AssertionError("a process alone follows nobody")

    def gathered(self, value: T) -> list[T]:
        """At the leader: every process's value by rank. At a follower: nothing."""
        return [value]

    def least(self, number: int) -> int:
        """On every process, the smallest of all processes' numbers."""
        return number

    def add_up(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor, on every process, by the sum over all of them."""

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """The block runs on one process after the other."""
        yield

    def shard(self, model: nn.Module, whole: Iterable[Tensor]) -> None:
        """Spread the blocks' parameters, but those in `whole`, over the processes; what is outside stays whole."""
        raise AssertionError("a process alone shards nothing")

    def end(self) -> None:
        """The leader's last word; a follower's last act."""


ALONE = Team()


class _Launched(Team):
    def __init__(self, device: str, sharded: bool) -> None:
        on_cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
        if on_cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        with _breaking():
            store, rank, size = next(rendezvous("env://"))
            # a launcher that starts the processes again may keep the store, with the addresses of those that are gone
            attempt = PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
            backend = "nccl" if on_cuda else "gloo"
            dist.init_process_group(backend, store=attempt, rank=rank, world_size=size, timeout=CALL_TIMEOUT)
            self._calls = dist.new_group(backend="gloo", timeout=IDLE_TIMEOUT)
            self._words = dist.new_group(backend="gloo", timeout=CALL_TIMEOUT)  # beside a GPU's queue, not in it
        self.rank, self.size, self.sharded = rank, size, sharded
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu")
        log.info("team.formed", extra={"rank": self.rank, "processes": self.size, "sharded": sharded})

    @contextmanager
    def together(self) -> Iterator[None]:
        mine: BaseException | None = None
        try:
            yield
        except BaseException as error:  # noqa: BLE001 - raised again below, once the others know
            mine = error
        found = self._exchanged(_portable(mine))
        theirs = next((error for error in found if error is not None), None)
        if theirs is not None and not self.leads:
            raise CallEnded(f"{type(theirs).__name__}: {theirs}") from mine
        if mine is not None:
            raise mine
        if theirs is not None:
            raise theirs

    def _exchanged(self, word: T) -> list[T]:
        """Every process's word by rank."""
        found = [word] * self.size
        with _breaking():
            dist.all_gather_object(found, word, group=self._words)
        return found

    def announce(self, call: object) -> None:
        with _breaking():
            dist.broadcast_object_list([call], src=0, group=self._calls)

    def next_call(self) -> Any:
        found: list[Any] = [None]
        with _breaking():
            dist.broadcast_object_list(found, src=0, group=self._calls)
        return found[0]

    def gathered(self, value: T) -> list[T]:
        found: list[Any] | None = [None] * self.size if self.leads else None
        with _breaking():
            dist.gather_object(value, found, dst=0, group=self._words)
        return found or []

    def least(self, number: int) -> int:
        return min(self._exchanged(number))

    def add_up(self, tensors: Iterable[Tensor]) -> None:
        with _breaking():
            running = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
            for work in running:
                assert work is not None
                work.wait()

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        for _ in range(self.rank):
            self._exchanged(None)
        yield
        for _ in range(self.rank, self.size):
            self._exchanged(None)

    def shard(self, model: nn.Module, whole: Iterable[Tensor]) -> None:
        assert self.device is not None
        mesh = init_device_mesh(self.device.type, (self.size,))
        kept, blocks = set(whole), _blocks(model)
        ignored = {parameter for parameter in model.parameters() if parameter in kept}
        sharded = {parameter for block in blocks for parameter in block.parameters()} - ignored
        for block in blocks:
            fully_shard(block, mesh=mesh, ignored_params=ignored)
        # no parameter of its own: only so that all blocks fetch theirs in one order, ahead of time
        fully_shard(model, mesh=mesh, ignored_params=set(model.parameters()) - sharded)
        nn.Module.to(model, self.device)

    def end(self) -> None:
        if self.leads:
            try:
                self.announce(None)
            except TeamBroken as error:
                log.warning("team.broken", extra={"reason": error.detail})
                return
        dist.destroy_process_group()


@contextmanager
def _breaking() -> Iterator[None]:
    """Whatever torch.distributed raises means that somebody is missing."""
    try:
        yield
    except RuntimeError as error:
        raise TeamBroken(
            f"the processes lost each other: {error}; start all of them again, the job goes on from its checkpoint"
        ) from error


def _portable(error: BaseException | None) -> BaseException | None:
    """The error, or where it does not travel one that says the same."""
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
    except Exception:  # noqa: BLE001 - an exception's class may do anything
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer's blocks: members of a list of modules that lies in no other such list."""
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    outer = [module for name, module in lists.items() if not any(name.startswith(f"{other}.") for other in lists)]
    return [block for each in outer for block in each]
