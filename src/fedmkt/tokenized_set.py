"""What the rows of any party must look like on given public samples: sender and receiver derive it from the text alone.

**Row convention.** Row r of a sample predicts the realised (gold) token at sequence position j from tokens 0..j-1. The
response rows of a sample are all positions j >= 1 whose token begins (where the one before it ends) at or after the
response's first byte. S samples, R rows, T tokens of one text.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedmkt.public_set import PublicSet
from fedmkt.vocabulary import Encoding, Vocabulary

Ints = NDArray[np.int32]
BATCH_TEXTS = 1024  # texts in one call to the tokenizer: bounds memory, large enough to use every core


@dataclass(frozen=True, slots=True)
class TokenizedSet:
    """Response rows of some samples in one vocabulary.

    samples int32 [S] indices into the public set; row_splits int32 [S+1]; per row, int32 [R]: context_ends (byte at
    which the context ends), gold_ids, gold_ends (byte at which the realised token ends); response_bytes int32 [S], the
    bytes from the first row's context end to the last row's gold end. A sample cut before its response has no rows
    and 0 response bytes.
    """

    samples: Ints
    row_splits: Ints
    context_ends: Ints
    gold_ids: Ints
    gold_ends: Ints
    response_bytes: Ints

    @property
    def rows(self) -> int:
        return len(self.context_ends)

    def take(self, positions: NDArray[np.integer]) -> "TokenizedSet":
        """The samples at `positions` (int [n], indices into `samples`, ascending), with their rows."""
        rows, _ = take_rows(self.row_splits, positions)
        counts = np.diff(self.row_splits)[positions]
        return TokenizedSet(
            samples=self.samples[positions],
            row_splits=np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
            context_ends=self.context_ends[rows],
            gold_ids=self.gold_ids[rows],
            gold_ends=self.gold_ends[rows],
            response_bytes=self.response_bytes[positions],
        )


def take_rows(splits: NDArray[np.integer], groups: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Members of CSR groups, one group after the other, and for each member the position in `groups` it came from.

    splits int [G+1] ascending; groups int [n], repeats allowed. Returns two int64 [sum of the groups' sizes].
    """
    starts = splits[groups].astype(np.int64)
    counts = splits[groups + 1] - starts
    owners = np.repeat(np.arange(len(groups)), counts)
    members = np.repeat(starts - (np.cumsum(counts) - counts), counts)
    members += np.arange(len(members))
    return members, owners


def runs(splits: NDArray[np.integer], most: int) -> Iterator[slice]:
    """Cuts CSR groups into runs of at most `most` members, each as long as it can be, of one group at least."""
    start, groups = 0, len(splits) - 1
    while start < groups:
        full = int(np.searchsorted(splits, int(splits[start]) + most, side="right")) - 1
        stop = max(start + 1, full)
        yield slice(start, stop)
        start = stop


def response_rows(encoding: Encoding, response_start: int) -> Ints:
    """int32 positions j of the response rows: j >= 1 and ends[j-1] >= response_start. Ascending, without gaps."""
    first = int(np.searchsorted(encoding.ends[:-1], response_start, side="left")) + 1
    return np.arange(first, len(encoding.ids), dtype=np.int32)


def tokenize_set(
    vocabulary: Vocabulary, public_set: PublicSet, samples: Sequence[int] | NDArray[np.integer], max_tokens: int
) -> TokenizedSet:
    """Rows that any party with this vocabulary has on `samples` (indices, strictly ascending), cut at `max_tokens`.

    Each text is cut with a leading bos, and a trailing eos where the sample `ends`. Raises ValueError when samples are
    not ascending indices into the set.
    """
    chosen = np.asarray(samples, dtype=np.int32)
    if len(chosen) and (chosen[0] < 0 or chosen[-1] >= len(public_set) or (np.diff(chosen) <= 0).any()):
        raise ValueError(f"samples must be strictly ascending indices into a public set of {len(public_set)}")
    pieces: list[tuple[Ints, Ints, Ints]] = []
    for start in range(0, len(chosen), BATCH_TEXTS):
        batch = [public_set.samples[index] for index in chosen[start : start + BATCH_TEXTS]]
        encodings = vocabulary.encode_batch(
            [sample.text for sample in batch], add_eos=[sample.ends for sample in batch], max_tokens=max_tokens
        )
        for sample, encoding in zip(batch, encodings, strict=True):
            rows = response_rows(encoding, sample.response_start)
            pieces.append((encoding.ends[rows - 1], encoding.ids[rows], encoding.ends[rows]))
    return _joined(chosen, pieces)


def _joined(samples: Ints, pieces: list[tuple[Ints, Ints, Ints]]) -> TokenizedSet:
    none = [np.zeros(0, dtype=np.int32)]
    counts = np.array([len(context_ends) for context_ends, _, _ in pieces], dtype=np.int64)
    covered = [int(gold_ends[-1] - context[0]) if len(context) else 0 for context, _, gold_ends in pieces]
    return TokenizedSet(
        samples=samples,
        row_splits=np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
        context_ends=np.concatenate([piece[0] for piece in pieces] or none),
        gold_ids=np.concatenate([piece[1] for piece in pieces] or none),
        gold_ends=np.concatenate([piece[2] for piece in pieces] or none),
        response_bytes=np.array(covered, dtype=np.int32),
    )
