"""From token batches to logits on response rows only. B samples, T tokens, R response rows, D width, V vocabulary.

The model's own forward pass runs unchanged; a hook on its LM head hands the head the R wanted hidden states instead of
all B x T, so scaling, soft caps and anything else that a model does around its head still happens, for every
architecture. Where the head is known to be a plain linear layer and nothing more, the hidden states can be taken
instead, and logits made in pieces.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from fedmkt.ml.batches import Batch
from fedmkt.ml.losses import DEVICE_BLOCK, multiplied, row_blocks
from fedmkt.ml.models import output_head

FEWEST_ROWS = 256  # in one product with the head on a CPU, where the logits allow it: fewer, and reading it costs more
MOST_LOGITS = 1 << 25  # in one product on a CPU: 128 MiB
BLOCK_LOGITS = 1 << 19  # looked at together on a CPU: 2 MiB, in cache, and few calls


@dataclass(frozen=True)
class PlainHead:
    """A head that is logits = hidden @ weight.T + bias and nothing else; weight (V, D), bias (V,) or None."""

    weight: Tensor
    bias: Tensor | None

    def cut(self, vocabulary_size: int) -> "PlainHead":
        """The rows of the tokenizer's ids; padded rows of the head are never looked at."""
        return PlainHead(self.weight[:vocabulary_size], None if self.bias is None else self.bias[:vocabulary_size])


def row_logits(model: nn.Module, head: nn.Module, batch: Batch) -> Tensor:
    """(R, V) logits of the response rows in the model's dtype, equal to those of the plain forward pass."""
    with _head_input(head, lambda hidden: hidden.flatten(0, 1)[batch.places][None]) as seen:
        logits = _forward(model, batch)
    if seen and logits.shape[:2] == (1, len(batch.places)):
        return logits[0]
    # the head was not called as a module: what came back are the logits of every position
    return logits.flatten(0, 1)[batch.places]


def row_hidden(model: nn.Module, head: nn.Module, batch: Batch) -> Tensor:
    """(R, D): what the LM head is given on the response rows. Only for models that `find_plain_head` accepts."""
    with _head_input(head, lambda hidden: hidden[:, :0]) as seen:  # the head itself then costs nothing
        _forward(model, batch)
    return seen[0].flatten(0, 1)[batch.places]


def _forward(model: nn.Module, batch: Batch) -> Tensor:
    logits: Tensor = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    return logits


@contextmanager
def _head_input(head: nn.Module, replace: Callable[[Tensor], Tensor]) -> Iterator[list[Tensor]]:
    """Inside, the head is given `replace(hidden)`; yields the list of what it would have been given.

    Passes of other threads through the same model are none of its business.
    """
    seen: list[Tensor] = []
    mine = get_ident()

    def before(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if get_ident() != mine:
            return None
        seen.append(inputs[0])
        return (replace(inputs[0]), *inputs[1:])

    handle = head.register_forward_pre_hook(before)
    try:
        yield seen
    finally:
        handle.remove()


def find_plain_head(model: PreTrainedModel) -> PlainHead | None:
    """The head, if everything between its input and the logits is its linear layer; None otherwise.

    Decided by experiment: the head is given large random hidden states, and the model's logits must be the linear
    layer's. Large, because a soft cap is invisible near zero.
    """
    head = output_head(model)
    if type(head) is not nn.Linear:  # a LoRA layer or a subclass does more
        return None
    generator = torch.Generator().manual_seed(0)
    made = torch.randn(1, 3, head.in_features, generator=generator).to(head.weight)
    made = made * (50 / F.linear(made, head.weight).std().clamp(min=1e-3))
    ids = torch.zeros((1, 3), dtype=torch.int64, device=head.weight.device)
    was_training = model.training
    try:
        model.train(False)
        with torch.no_grad(), _head_input(head, lambda hidden: made.to(hidden.dtype)) as seen:
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
            expected = F.linear(made, head.weight, head.bias)
    finally:
        model.train(was_training)
    if len(seen) != 1 or logits.shape != expected.shape:
        return None
    tolerance = 1e-4 if expected.dtype == torch.float32 else 2e-2
    close = torch.allclose(logits.float(), expected.float(), rtol=tolerance, atol=tolerance)
    return PlainHead(head.weight, head.bias) if close else None


def logit_blocks(
    model: nn.Module,
    head: nn.Module,
    plain: PlainHead | None,
    batch: Batch,
    vocabulary_size: int,
    most_rows: int | None = None,
) -> Iterator[tuple[slice, Tensor]]:
    """(rows, float32 logits (n, vocabulary_size)) of a batch's response rows; a block is good until the next is asked.

    Blocks are small enough for several passes over them in cache, and of at most `most_rows`. A plain head is
    multiplied in float32 whatever the model's dtype: bfloat16 logits are wrong by up to 0.06 nats. A model that does
    more around its head is asked for all rows at once, in its own dtype. Inside `no_grad` or inference mode only.
    """
    rows, device = len(batch.places), batch.places.device
    block_rows = min(most_rows or rows, _block_rows(vocabulary_size, device))
    if plain is None:
        logits = row_logits(model, head, batch)[:, :vocabulary_size]
        for block in row_blocks(rows, block_rows):
            yield block, logits[block].float()
        return
    hidden, cut = row_hidden(model, head, batch), plain.cut(vocabulary_size)
    chunk_rows = _chunk_rows(vocabulary_size, device)
    # filled again and again: fresh memory costs more than what is written into it
    work = torch.empty(min(rows, chunk_rows), vocabulary_size, device=device)
    for chunk in row_blocks(rows, chunk_rows):
        logits = _wide_logits(hidden[chunk], cut, work[: chunk.stop - chunk.start])
        for block in row_blocks(len(logits), block_rows):
            yield slice(chunk.start + block.start, chunk.start + block.stop), logits[block]


def _block_rows(vocabulary_size: int, device: torch.device) -> int:
    """Rows that are looked at together."""
    return max(1, (BLOCK_LOGITS if device.type == "cpu" else DEVICE_BLOCK) // vocabulary_size)


def _chunk_rows(vocabulary_size: int, device: torch.device) -> int:
    """Rows that are multiplied with the head at once: enough of them, within a bound on memory."""
    most = MOST_LOGITS if device.type == "cpu" else DEVICE_BLOCK
    wanted = max(FEWEST_ROWS, _block_rows(vocabulary_size, device))
    return max(1, min(wanted, most // vocabulary_size))


def _wide_logits(hidden: Tensor, head: PlainHead, work: Tensor) -> Tensor:
    """hidden @ weight.T + bias (n, V) in float32, written into `work`."""
    if hidden.is_cuda and hidden.dtype == head.weight.dtype != torch.float32:
        # the same sums: products of half-precision numbers are exact in float32, only a result would be rounded
        torch.mm(hidden, head.weight.T, out_dtype=torch.float32, out=work)
    else:
        multiplied(hidden.float(), head.weight, work)
    return work if head.bias is None else work.add_(head.bias.float())
