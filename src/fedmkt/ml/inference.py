"""The model as it is, over many samples: logits of response rows, batch by batch. R response rows of a batch."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmkt.ml.batches import Batch, TokenSample, by_length, collate
from fedmkt.ml.head import logit_blocks
from fedmkt.ml.party import Party

BATCH_TOKENS = 8192  # padded tokens in one forward pass
Progress = Callable[[int, int], None]  # samples done, samples in all
Columns = tuple[NDArray[Any], ...]


@contextmanager
def _evaluating(party: Party) -> Iterator[None]:
    """No dropout, no graph; the model's mode is put back after."""
    was_training = party.model.training
    party.model.train(False)
    try:
        with torch.inference_mode():
            yield
    finally:
        party.model.train(was_training)


def run_batches(
    party: Party,
    samples: Sequence[TokenSample],
    look: Callable[[Tensor, Tensor], Columns],
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress | None = None,
) -> Iterator[tuple[list[int], Columns]]:
    """Calls `look(logits float32 (n, V), gold int64 (n,))` on blocks of response rows, samples longest first.

    Yields, a batch at a time, which samples it holds (indices, in the order of its rows) and `look`'s columns, block
    after block. V is `vocabulary.size`. `look` keeps nothing of the logits, whose memory the next block takes.
    """
    _ = party.plain_head  # found out before any graph-free mode begins, because it is remembered
    done = 0
    for indices in by_length(samples, batch_tokens):
        with _evaluating(party):
            batch = collate([samples[index] for index in indices], party.device)
            blocks = [look(logits, batch.gold[rows]) for rows, logits in _blocks(party, batch)]
        if blocks:
            yield indices, tuple(np.concatenate(column) for column in zip(*blocks, strict=True))
        done += len(indices)
        if progress is not None:
            progress(done, len(samples))


def _blocks(party: Party, batch: Batch) -> Iterator[tuple[slice, Tensor]]:
    return logit_blocks(party.model, party.head, party.plain_head, batch, party.vocabulary.size)
