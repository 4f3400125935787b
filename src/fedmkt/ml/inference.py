"""The model as it is, over many samples: logits of response rows, batch by batch. R response rows of a batch."""

import logging
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmkt.ml.batches import Batch, TokenSample, by_length, collate
from fedmkt.ml.following import lead
from fedmkt.ml.head import logit_blocks
from fedmkt.ml.party import Party

log = logging.getLogger(__name__)

BATCH_TOKENS = 8192  # padded tokens in one forward pass
CPU_BATCH_TOKENS = 2048  # at most on a CPU: what passes between layers stays in cache, a fifth faster
LANES = 2  # batches in work at a time on a CPU
BATCHES_A_LANE = 4  # at least, or one lane ends long before the other
Progress = Callable[[int, int], None]  # samples done, samples in all
Columns = tuple[NDArray[Any], ...]
Look = Callable[[Tensor, Tensor], Columns]


@contextmanager
def evaluating(party: Party) -> Iterator[None]:
    """No dropout, no graph; the model's mode is put back after."""
    # what a sharded model fetches meanwhile may be used again in a backward pass
    with _without_dropout(party), torch.no_grad() if party.team.sharded else torch.inference_mode():
        yield


@contextmanager
def _without_dropout(party: Party) -> Iterator[None]:
    was_training = party.model.training
    if was_training:  # setting the mode walks over all modules, which small batches feel
        party.model.train(False)
    try:
        yield
    finally:
        if was_training:
            party.model.train(True)


def run_batches(
    party: Party,
    samples: Sequence[TokenSample],
    look: Look,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress | None = None,
) -> Iterator[tuple[list[int], Columns]]:
    """Calls `look(logits float32 (n, V), gold int64 (n,))` on blocks of response rows, samples longest first.

    Yields, a batch at a time, which samples it holds (indices, in the order of its rows) and `look`'s columns, block
    after block. V is `vocabulary.size`. `look` keeps nothing of the logits, whose memory the next block takes; where
    several processes share the batches, it travels to the others.
    """
    if party.device.type == "cpu":
        batch_tokens = min(batch_tokens, CPU_BATCH_TOKENS)
    if party.team.size > 1:
        yield from lead(party, _SharedBatches(tuple(samples), look, batch_tokens), progress)
        return
    _ = party.plain_head  # found out before any graph-free mode begins, because it is remembered
    done, cut = 0, by_length(samples, batch_tokens)
    batches = [[samples[index] for index in indices] for indices in cut]
    with closing(_in_lanes(party, batches, look)) as found:
        for indices, columns in zip(cut, found, strict=True):
            if columns:
                yield indices, columns
            done += len(indices)
            if progress is not None:
                progress(done, len(samples))


def _in_lanes(party: Party, batches: Sequence[Sequence[TokenSample]], look: Look) -> Generator[Columns, None, None]:
    """`look`'s columns of each batch, in order. On a CPU with LANES batches in work at a time, its threads shared out:
    one lane's Python and numpy run beside another's passes, where a single one would leave the other cores idle.
    """
    threads = torch.get_num_threads()
    if party.device.type != "cpu" or threads < LANES or len(batches) < BATCHES_A_LANE * LANES:
        for batch in batches:
            yield _looked_at(party, batch, look)
        return
    waiting: deque[Future[Columns]] = deque()
    try:
        with (
            _without_dropout(party),
            ThreadPoolExecutor(LANES, "lane", torch.set_num_threads, (threads // LANES,)) as lanes,
        ):
            try:
                for batch in batches:
                    waiting.append(lanes.submit(_looked_at, party, batch, look))
                    if len(waiting) > LANES:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()
    finally:
        torch.set_num_threads(threads)  # setting it in a lane set it for threads to come


def _looked_at(party: Party, samples: Sequence[TokenSample], look: Look) -> Columns:
    """`look`'s columns of one batch, or of its halves where it takes too much memory; none without a response row."""
    try:
        with evaluating(party):
            batch = collate(samples, party.device)
            blocks = [look(logits, batch.gold[rows]) for rows, logits in _blocks(party, batch)]
    except torch.OutOfMemoryError:
        if len(samples) == 1 or party.team.sharded:
            raise
        blocks = None
    if blocks is None:  # outside of the handler, which holds on to what did not fit
        log.warning("inference.out_of_memory", extra={"samples": len(samples)})
        middle = len(samples) // 2
        halves = (_looked_at(party, half, look) for half in (samples[:middle], samples[middle:]))
        blocks = [half for half in halves if half]
    return tuple(np.concatenate(column) for column in zip(*blocks, strict=True))


@dataclass(frozen=True)
class _SharedBatches:
    """`run_batches` on every process of a team, a batch each at a time; the leader gets what all of them found."""

    samples: tuple[TokenSample, ...]
    look: Look
    batch_tokens: int
    trains: ClassVar[bool] = False

    def run(self, party: Party, told: Progress | None) -> list[tuple[list[int], Columns]]:
        _ = party.plain_head
        team, done = party.team, 0
        cut = by_length(self.samples, self.batch_tokens)
        found: list[tuple[list[int], Columns]] = []
        for first in range(0, len(cut), team.size):
            with team.together():
                mine = self._mine(party, cut, first + team.rank)
            now = cut[first : first + team.size]
            found += [(indices, columns) for indices, columns in zip(now, team.gathered(mine), strict=False) if columns]
            done += sum(len(indices) for indices in now)
            with team.together():
                if told is not None:
                    told(done, len(self.samples))
        return found

    def _mine(self, party: Party, cut: list[list[int]], place: int) -> Columns:
        if place < len(cut):
            return _looked_at(party, [self.samples[index] for index in cut[place]], self.look)
        if party.team.sharded:  # all have to pass something through the model
            _looked_at(party, [self.samples[index] for index in cut[-1]], self.look)
        return ()


def _blocks(party: Party, batch: Batch) -> Iterator[tuple[slice, Tensor]]:
    return logit_blocks(party.model, party.head, party.plain_head, batch, party.vocabulary.size)
