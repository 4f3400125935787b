"""Public or private samples as token batches. B samples, T tokens (padded on the right), R response rows of a batch."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmkt.errors import Refusal
from fedmkt.public_set import PublicSample
from fedmkt.tokenized_set import response_rows
from fedmkt.vocabulary import Vocabulary

Ints = NDArray[np.int32]
TEXTS_PER_CALL = 1024  # to the tokenizer: bounds memory, large enough to use every core
REMEMBERED_SETS, REMEMBERED_SAMPLES = 6, 4096  # 25 MB a set at 512 tokens a sample


class SampleTooLong(Refusal):
    code: ClassVar[str] = "model.sample_too_long"
    title: ClassVar[str] = "A sample has more tokens than the model has positions"


@dataclass(frozen=True, slots=True)
class TokenSample:
    """One sample in tokens: bos, text, eos where it ends, cut at `max_tokens`.

    ids int32 [T]; ends int32 [T] bytes; rows int32 [R], the positions j >= 1 of the response rows, each predicted from
    tokens 0..j-1. A sample that is cut before its response has no rows.
    """

    id: str
    ids: Ints
    ends: Ints
    rows: Ints

    @property
    def response_bytes(self) -> int:
        """Bytes from the first row's context end to the last row's token end."""
        return int(self.ends[-1] - self.ends[self.rows[0] - 1]) if len(self.rows) else 0


@dataclass(frozen=True, slots=True)
class Batch:
    """Right-padded tokens. input_ids, attention_mask int64 (B, T); places int64 (R,): flat b * T + j - 1, the position
    whose output predicts each response row, sample after sample; gold int64 (R,).
    """

    input_ids: Tensor
    attention_mask: Tensor
    places: Tensor
    gold: Tensor


def tokenize(vocabulary: Vocabulary, samples: Iterable[PublicSample], max_tokens: int) -> list[TokenSample]:
    """The rows are those of `fedmkt.tokenized_set.tokenize_set`, with the tokens around them.

    The sets that were asked for last are remembered, if they are small: a round asks for the same ones several times.
    """
    everything = tuple(samples)
    make = _tokenized if len(everything) <= REMEMBERED_SAMPLES else _tokenized.__wrapped__
    return list(make(vocabulary, everything, max_tokens))


@lru_cache(maxsize=REMEMBERED_SETS)
def _tokenized(
    vocabulary: Vocabulary, everything: tuple[PublicSample, ...], max_tokens: int
) -> tuple[TokenSample, ...]:
    found: list[TokenSample] = []
    for start in range(0, len(everything), TEXTS_PER_CALL):
        part = everything[start : start + TEXTS_PER_CALL]
        encodings = vocabulary.encode_batch(
            [sample.text for sample in part], add_eos=[sample.ends for sample in part], max_tokens=max_tokens
        )
        for sample, encoding in zip(part, encodings, strict=True):
            rows = response_rows(encoding, sample.response_start)
            found.append(TokenSample(sample.id, encoding.ids, encoding.ends, rows))
    return tuple(found)


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
    longest = max(len(sample.ids) for sample in samples)
    ids, mask = (np.zeros((len(samples), longest), dtype=np.int64) for _ in range(2))
    for index, sample in enumerate(samples):
        ids[index, : len(sample.ids)] = sample.ids
        mask[index, : len(sample.ids)] = 1
    places = np.concatenate([index * longest + sample.rows - 1 for index, sample in enumerate(samples)])
    gold = np.concatenate([sample.ids[sample.rows] for sample in samples])
    return Batch(
        input_ids=torch.from_numpy(ids).to(device),
        attention_mask=torch.from_numpy(mask).to(device),
        places=torch.from_numpy(places.astype(np.int64)).to(device),
        gold=torch.from_numpy(gold.astype(np.int64)).to(device),
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
