"""Public or private samples as token batches. B samples, T tokens (padded on the right), R response rows of a batch."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fedmkt.errors import Refusal
from fedmkt.tokenized_set import TokenSample, tokenize

__all__ = ["Batch", "SampleTooLong", "TokenSample", "by_length", "check_positions", "collate", "tokenize"]


class SampleTooLong(Refusal):
    code: ClassVar[str] = "model.sample_too_long"
    title: ClassVar[str] = "A sample has more tokens than the model has positions"


@dataclass(frozen=True, slots=True)
class Batch:
    """Right-padded tokens. input_ids, attention_mask int64 (B, T); places int64 (R,): flat b * T + j - 1, the position
    whose output predicts each response row, sample after sample; gold int64 (R,).
    """

    input_ids: Tensor
    attention_mask: Tensor
    places: Tensor
    gold: Tensor


def check_positions(samples: Iterable[TokenSample], positions: int | None) -> None:
    """Raises SampleTooLong for a sample with more tokens than `positions`; None means no bound."""
    for sample in samples:
        if positions is not None and len(sample.ids) > positions:
            raise SampleTooLong(
                f"sample {sample.id!r} has {len(sample.ids)} tokens, the model has {positions} positions; set "
                f"knowledge.max_tokens of the federation to at most {positions}, or use a model with longer context"
            )


def collate(samples: Sequence[TokenSample], device: torch.device) -> Batch:
    """Pad on the right whatever the tokenizer's own side is: with causal attention no real token sees the padding, so
    default positions are right for every architecture and no position ids are needed.
    """
    lengths = np.array([len(sample.ids) for sample in samples])
    longest = int(lengths.max())
    mask = np.arange(longest) < lengths[:, None]
    ids = np.zeros(mask.shape, dtype=np.int64)
    ids[mask] = np.concatenate([sample.ids for sample in samples])
    rows = np.concatenate([sample.rows for sample in samples]).astype(np.int64)
    places = rows + np.repeat(np.arange(len(samples)) * longest - 1, [len(sample.rows) for sample in samples])
    return Batch(
        input_ids=torch.from_numpy(ids).to(device),
        attention_mask=torch.from_numpy(mask.astype(np.int64)).to(device),
        places=torch.from_numpy(places).to(device),
        gold=torch.from_numpy(ids.reshape(-1)[places + 1]).to(device),
    )


def by_length(samples: Sequence[TokenSample], batch_tokens: int) -> list[list[int]]:
    """Cut into batches of at most `batch_tokens` padded tokens (one sample at least), longest first.

    Neighbours in length share a batch, so little is padding; and a batch too large for the device fails at once.
    """
    order = sorted(range(len(samples)), key=lambda index: (-len(samples[index].ids), index))
    batches: list[list[int]] = []
    for index in order:
        full = not batches or (len(batches[-1]) + 1) * len(samples[batches[-1][0]].ids) > batch_tokens
        if full:
            batches.append([])
        batches[-1].append(index)
    return batches
