"""What the rows of any party must look like on given public samples: sender and receiver derive it from the text alone.

**Row convention.** Row r of a sample predicts the realised (gold) token at sequence position j from tokens 0..j-1. The
response rows of a sample are all positions j >= 1 whose token begins (where the one before it ends) at or after the
response's first byte. S samples, R rows, T tokens of one text.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from fedmkt.public_set import PublicSample, PublicSet
from fedmkt.vocabulary import Encoding, Vocabulary

Ints = NDArray[np.int32]
BATCH_TEXTS = 1024  # texts in one call to the tokenizer: bounds memory, large enough to use every core
REMEMBERED_BYTES = 1 << 27  # of cut samples and their texts: ten thousand of 512 tokens, in two vocabularies


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


class _Remembered:
    """Samples as they were cut, so that a text that is asked for again, in this round or a later one, is not cut again.

    Those that were asked for last, of `most_bytes` together. A key says all that the cut depends on.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes, self._bytes = most_bytes, 0
        self._found: OrderedDict[tuple[Vocabulary, int, PublicSample], TokenSample] = OrderedDict()
        self._lock = Lock()

    def clear(self) -> None:
        with self._lock:
            self._found.clear()
            self._bytes = 0

    def get(self, vocabulary: Vocabulary, max_tokens: int, samples: Iterable[PublicSample]) -> list[TokenSample | None]:
        with self._lock:
            keys = [(vocabulary, max_tokens, sample) for sample in samples]
            for key in keys:
                if key in self._found:
                    self._found.move_to_end(key)
            return [self._found.get(key) for key in keys]

    def put(self, vocabulary: Vocabulary, max_tokens: int, sample: PublicSample, cut: TokenSample) -> None:
        with self._lock:
            key = (vocabulary, max_tokens, sample)
            if key not in self._found:
                self._bytes += _weight(sample, cut)
            self._found[key] = cut
            while self._bytes > self._most_bytes:
                (_, _, sample), cut = self._found.popitem(last=False)
                self._bytes -= _weight(sample, cut)


def _weight(sample: PublicSample, cut: TokenSample) -> int:
    return len(sample.text) + cut.ids.nbytes + cut.ends.nbytes + cut.rows.nbytes + 1000  # of Python's objects


REMEMBERED = _Remembered(REMEMBERED_BYTES)


def tokenize(vocabulary: Vocabulary, samples: Iterable[PublicSample], max_tokens: int) -> list[TokenSample]:
    """Samples with a leading bos, and a trailing eos where they end, cut at `max_tokens`."""
    everything = list(samples)
    found = REMEMBERED.get(vocabulary, max_tokens, everything)
    missing = [index for index, cut in enumerate(found) if cut is None]
    for start in range(0, len(missing), BATCH_TEXTS):
        part = missing[start : start + BATCH_TEXTS]
        encodings = vocabulary.encode_batch(
            [everything[index].text for index in part],
            add_eos=[everything[index].ends for index in part],
            max_tokens=max_tokens,
        )
        for index, encoding in zip(part, encodings, strict=True):
            sample = everything[index]
            rows = response_rows(encoding, sample.response_start)
            found[index] = cut = TokenSample(sample.id, encoding.ids, encoding.ends, rows)
            REMEMBERED.put(vocabulary, max_tokens, sample, cut)
    return [cut for cut in found if cut is not None]


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
    cut = tokenize(vocabulary, (public_set.samples[index] for index in chosen), max_tokens)
    counts = np.array([len(sample.rows) for sample in cut], dtype=np.int64)
    columns = [[sample.ends[sample.rows - 1], sample.ids[sample.rows], sample.ends[sample.rows]] for sample in cut]
    none = np.zeros((3, 0), dtype=np.int32)
    context_ends, gold_ids, gold_ends = (np.concatenate(column) for column in zip(none, *columns, strict=True))
    return TokenizedSet(
        samples=chosen,
        row_splits=np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
        context_ends=context_ends,
        gold_ids=gold_ids,
        gold_ends=gold_ends,
        response_bytes=np.array([sample.response_bytes for sample in cut], dtype=np.int32),
    )
