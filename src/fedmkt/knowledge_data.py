"""The knowledge table: its columns, and the rules that every one obeys wherever it comes from.

Legend: S samples, R rows, N kept entries, V vocabulary. Row r of a sample predicts the token that the text realises
after the first `context_ends[r]` bytes. Log-probabilities are natural and normalised over the whole vocabulary, so what
a row does not keep is its known tail mass (DESIGN.md, sections 5.1 and 5.2). Import from `fedmkt.knowledge`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as checked_dataclass

from fedmkt.codec import VERSION, MalformedKnowledge
from fedmkt.errors import Refusal
from fedmkt.protocol import Digest
from fedmkt.token_bytes import MAX_VOCABULARY_SIZE
from fedmkt.tokenized_set import take_rows

MAX_TOP_K = 1024
SUM_TOLERANCE = 1e-3  # of a row's probabilities: float32 sums over 1024 entries, log-softmax in lower precision
BLOCK_ROWS = 1 << 16
BLOCK_ENTRIES = 1 << 20  # 8 MB of arrays: what is worked on at once stays small, and nearly in cache

Ints = NDArray[np.int32]
Floats = NDArray[np.float32]


class KnowledgeNotFinite(Refusal):
    code: ClassVar[str] = "knowledge.nan"
    title: ClassVar[str] = "The knowledge holds values that are not finite"


class EmptyKnowledge(Refusal):
    code: ClassVar[str] = "knowledge.empty"
    title: ClassVar[str] = "The knowledge has nothing to say"


class NotNormalised(Refusal):
    code: ClassVar[str] = "knowledge.not_normalised"
    title: ClassVar[str] = "Log-probabilities do not belong to a distribution"
    remedy: ClassVar[str] = (
        "The maker's log-probabilities do not sum to 1 or less: take log_softmax in float32 before the top k."
    )


class TokenOutOfRange(Refusal):
    code: ClassVar[str] = "knowledge.token_out_of_range"
    title: ClassVar[str] = "A token id lies outside the vocabulary"
    remedy: ClassVar[str] = "Enrol with the vocabulary of the model that made the knowledge."


class OffsetOutOfRange(Refusal):
    code: ClassVar[str] = "knowledge.offset_out_of_range"
    title: ClassVar[str] = "A context ends outside its sample"
    remedy: ClassVar[str] = "Make the knowledge again on the federation's public set, with its text as UTF-8 bytes."


@checked_dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", strict=True))
class KnowledgeHeader:
    """What the knowledge is about and who made it. `model_id` and `adapter_version` are shown, never trusted."""

    format_version: Annotated[int, Field(ge=VERSION, le=VERSION)] = VERSION
    federation_id: Annotated[str, Field(min_length=1, max_length=100)]
    round_number: Annotated[int, Field(ge=0, lt=2**31)]
    slice_index: Annotated[int, Field(ge=0, lt=2**31)]
    public_set_digest: Digest
    vocabulary_fingerprint: Digest
    vocabulary_size: Annotated[int, Field(ge=1, le=MAX_VOCABULARY_SIZE)]
    model_id: Annotated[str, Field(min_length=1, max_length=200)]
    adapter_version: Annotated[int, Field(ge=0, lt=2**31)]
    top_k: Annotated[int, Field(ge=1, le=MAX_TOP_K)]
    top_p: Annotated[float, Field(gt=0, le=1)]
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)]


@dataclass(frozen=True, slots=True, eq=False)
class Knowledge:
    """Checked when it is made, by whoever makes it: a `Knowledge` that exists is structurally sound.

    samples int32 [S] indices into the public set, strictly ascending; row_splits int32 [S+1], every sample has rows;
    context_ends int32 [R] bytes, non-decreasing within a sample; gold_logprobs float32 [R] nats, of the token that the
    text realises; entry_splits int32 [R+1], 1 to min(top_k, V) entries a row; token_ids int32 [N], strictly ascending
    within a row; logprobs float32 [N] nats. Raises MalformedKnowledge, EmptyKnowledge, KnowledgeNotFinite,
    NotNormalised, TokenOutOfRange or OffsetOutOfRange, naming the public sample by its index.
    """

    header: KnowledgeHeader
    samples: Ints
    row_splits: Ints
    context_ends: Ints
    gold_logprobs: Floats
    entry_splits: Ints
    token_ids: Ints
    logprobs: Floats

    def __post_init__(self) -> None:
        _check_shapes(self)
        _check_samples(self)
        _check_rows(self)
        for rows in row_blocks(self.entry_splits):
            _check_entries(self, rows)

    @property
    def rows(self) -> int:
        return int(self.context_ends.size)

    @property
    def entries(self) -> int:
        return int(self.token_ids.size)

    def place(self, row: int) -> str:
        """Where a row lies, in words, for messages."""
        position = int(np.searchsorted(self.row_splits, row, side="right")) - 1
        return f"row {row - int(self.row_splits[position])} of public sample {int(self.samples[position])}"

    def take(self, positions: NDArray[np.integer]) -> "Knowledge":
        """The samples at ascending `positions` (int [P], into `samples`), as knowledge of their own."""
        rows, _ = take_rows(self.row_splits, positions)
        entries, _ = take_rows(self.entry_splits, rows)
        return Knowledge(
            header=self.header,
            samples=self.samples[positions],
            row_splits=_taken(self.row_splits, positions),
            context_ends=self.context_ends[rows],
            gold_logprobs=self.gold_logprobs[rows],
            entry_splits=_taken(self.entry_splits, rows),
            token_ids=self.token_ids[entries],
            logprobs=self.logprobs[entries],
        )

    def equals(self, other: "Knowledge") -> bool:
        """Same header and the same values, bit for bit."""
        return self.header == other.header and all(
            np.array_equal(getattr(self, name), getattr(other, name)) for name in _ARRAYS
        )


_ARRAYS = {
    "samples": np.int32,
    "row_splits": np.int32,
    "context_ends": np.int32,
    "gold_logprobs": np.float32,
    "entry_splits": np.int32,
    "token_ids": np.int32,
    "logprobs": np.float32,
}


def _taken(splits: Ints, groups: NDArray[np.integer]) -> Ints:
    return np.concatenate([[0], np.cumsum(np.diff(splits)[groups])]).astype(np.int32)


def row_blocks(entry_splits: Ints) -> Iterator[slice]:
    """Cuts rows into runs of at most BLOCK_ROWS rows and BLOCK_ENTRIES entries, each as long as it can be."""
    start, rows = 0, entry_splits.size - 1
    while start < rows:
        full = int(np.searchsorted(entry_splits, int(entry_splits[start]) + BLOCK_ENTRIES, side="right")) - 1
        stop = max(start + 1, min(start + BLOCK_ROWS, full, rows))
        yield slice(start, stop)
        start = stop


# ------------------------------------------------------------------------------------------------ what every one obeys


def _check_shapes(k: Knowledge) -> None:
    for name, dtype in _ARRAYS.items():
        array = getattr(k, name)
        if array.dtype != dtype or array.ndim != 1:
            raise MalformedKnowledge(f"{name} is {array.dtype} {array.shape}, a vector of {np.dtype(dtype)} expected")
    sizes = (k.samples.size + 1, k.rows, k.rows + 1, k.entries)
    found = (k.row_splits.size, k.gold_logprobs.size, k.entry_splits.size, k.logprobs.size)
    if found != sizes:
        raise MalformedKnowledge(f"row_splits, gold_logprobs, entry_splits, logprobs have sizes {found}, not {sizes}")
    for name, splits, total in (("row_splits", k.row_splits, k.rows), ("entry_splits", k.entry_splits, k.entries)):
        if splits[0] != 0 or splits[-1] != total or (np.diff(splits) < 0).any():
            raise MalformedKnowledge(f"{name} must rise from 0 to {total}; it goes from {splits[0]} to {splits[-1]}")


def _check_samples(k: Knowledge) -> None:
    if k.samples.size == 0:
        raise EmptyKnowledge("no public sample at all; leave out what has no response, but share at least one sample")
    if k.samples[0] < 0 or (np.diff(k.samples) <= 0).any():
        raise MalformedKnowledge("public samples must be listed once each, in ascending order")
    empty = np.flatnonzero(np.diff(k.row_splits) == 0)
    if empty.size:
        raise EmptyKnowledge(
            f"public sample {k.samples[empty[0]]} has no response rows ({empty.size} such samples); leave it out"
        )


def _check_rows(k: Knowledge) -> None:
    falls = np.diff(k.context_ends) < 0
    falls[k.row_splits[1:-1] - 1] = False
    _refuse_first(k, np.append(False, falls), OffsetOutOfRange, "its context ends before the context of the row above")
    _refuse_first(k, k.context_ends < 0, OffsetOutOfRange, "its context ends before byte 0")
    counts, most = np.diff(k.entry_splits), min(k.header.top_k, k.header.vocabulary_size)
    _refuse_first(k, counts == 0, EmptyKnowledge, "it keeps no token; every row keeps at least the most probable one")
    _refuse_first(k, counts > most, MalformedKnowledge, f"more than {most} entries, the header's top_k and vocabulary")
    _refuse_first(
        k, ~np.isfinite(k.gold_logprobs), KnowledgeNotFinite, "the realised token's log-probability is not finite"
    )


def _check_entries(k: Knowledge, rows: slice) -> None:
    splits = k.entry_splits[rows.start : rows.stop + 1]
    entries = slice(int(splits[0]), int(splits[-1]))
    starts, lasts = splits[:-1] - splits[0], splits[1:] - splits[0] - 1
    ids, logprobs, gold = k.token_ids[entries], k.logprobs[entries], k.gold_logprobs[rows]
    rising = np.append(ids[1:] > ids[:-1], True)
    rising[lasts] = True
    bad_order = ~np.logical_and.reduceat(rising, starts)
    _refuse_first(k, bad_order, MalformedKnowledge, "its token ids do not rise strictly", rows.start)
    outside = (ids[starts] < 0) | (ids[lasts] >= k.header.vocabulary_size)
    _refuse_first(
        k, outside, TokenOutOfRange, f"a token id outside the {k.header.vocabulary_size} of its vocabulary", rows.start
    )
    unfit = ~np.logical_and.reduceat(np.isfinite(logprobs), starts)
    _refuse_first(k, unfit, KnowledgeNotFinite, "a kept log-probability is not finite", rows.start)
    largest = np.maximum.reduceat(logprobs, starts)
    _refuse_first(k, largest > SUM_TOLERANCE, NotNormalised, "a log-probability above 0", rows.start)
    mass = np.add.reduceat(np.exp(logprobs), starts)
    _refuse_first(k, mass > 1 + SUM_TOLERANCE, NotNormalised, "its kept probabilities sum to more than 1", rows.start)
    above = gold > largest + SUM_TOLERANCE
    _refuse_first(k, above, NotNormalised, "the realised token is more probable than every kept one", rows.start)


def _refuse_first(
    k: Knowledge, broken: NDArray[np.bool_], refusal: type[Refusal], what: str, first_row: int = 0
) -> None:
    if broken.any():
        row = int(np.argmax(broken)) + first_row
        raise refusal(f"{k.place(row)}: {what} ({int(np.count_nonzero(broken))} such rows)")
