"""From token batches to logits on response rows only. B samples, T tokens, R response rows, D width, V vocabulary.

The model's own forward pass runs unchanged; a hook on its LM head hands the head the R wanted hidden states instead of
all B x T, so scaling, soft caps and anything else that a model does around its head still happens, for every
architecture. Where the head is known to be a plain linear layer and nothing more, the hidden states can be taken
instead, and logits made in pieces.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from fedmkt.ml.batches import Batch
from fedmkt.ml.losses import CHUNK_LOGITS
from fedmkt.ml.models import output_head

HEAD_PIECE = 1 << 24  # weights of a half-precision head that are widened at a time: 64 MiB in float32


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
    """Inside, the head is given `replace(hidden)`; yields the list of what it would have been given."""
    seen: list[Tensor] = []

    def before(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
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
    block_logits: int = CHUNK_LOGITS,
) -> Iterator[tuple[slice, Tensor]]:
    """(rows, float32 logits (n, vocabulary_size)) of a batch's response rows, at most `block_logits` at a time.

    A plain head is multiplied in float32 whatever the model's dtype: bfloat16 logits are wrong by up to 0.06 nats. A
    model that does more around its head is asked for all rows at once, in its own dtype.
    """
    rows = len(batch.places)
    step = max(1, block_logits // vocabulary_size)
    if plain is None:
        logits = row_logits(model, head, batch)[:, :vocabulary_size]
        for start in range(0, rows, step):
            yield slice(start, min(start + step, rows)), logits[start : start + step].float()
        return
    hidden = row_hidden(model, head, batch)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows)), _wide(hidden[start : start + step], plain.cut(vocabulary_size))


def _wide(hidden: Tensor, head: PlainHead) -> Tensor:
    """hidden @ weight.T + bias in float32; a half-precision weight is widened piece by piece."""
    hidden = hidden.float()
    bias = None if head.bias is None else head.bias.float()
    if head.weight.dtype == torch.float32:
        return F.linear(hidden, head.weight, bias)
    size, width = head.weight.shape
    step = max(1, HEAD_PIECE // width)
    logits = hidden.new_empty(len(hidden), size)
    for start in range(0, size, step):
        logits[:, start : start + step] = hidden @ head.weight[start : start + step].float().T
    return logits if bias is None else logits + bias
