"""Knowledge: one party's top-k next-token log-probabilities on the public set, to bytes and back, and what a receiver
asks of it. The table itself is `fedmkt.knowledge_data`, the bytes are `fedmkt.codec` and docs/protocol.md.

Legend: S samples, R rows, N kept entries, V vocabulary.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedmkt import id_columns
from fedmkt.codec import (
    DEFAULT_LIMITS,
    MAGIC,
    VERSION,
    Columns,
    KnowledgeBomb,
    KnowledgeTooLarge,
    Limits,
    MalformedKnowledge,
    Octets,
    TruncatedKnowledge,
    UnsupportedKnowledge,
    from_grid,
    from_plane,
    from_planes,
    read_frame,
    refuse_unknown,
    split_frames,
    stated_bytes,
    to_grid,
    to_planes,
    write_frame,
)
from fedmkt.knowledge_checks import (
    SampleOutsideSlice,
    WrongFederation,
    WrongPublicSet,
    WrongRound,
    WrongSettings,
    WrongVocabulary,
    check,
    check_fields,
    check_header,
    check_rows,
    limits_for,
)
from fedmkt.knowledge_data import (
    BLOCK_ENTRIES,
    BLOCK_ROWS,
    MAX_TOP_K,
    EmptyKnowledge,
    Ints,
    Knowledge,
    KnowledgeHeader,
    KnowledgeNotFinite,
    NotNormalised,
    OffsetOutOfRange,
    TokenOutOfRange,
    row_blocks,
)

__all__ = [
    "DEFAULT_LIMITS",
    "MAX_TOP_K",
    "EmptyKnowledge",
    "Index",
    "Knowledge",
    "KnowledgeBomb",
    "KnowledgeHeader",
    "KnowledgeNotFinite",
    "KnowledgeTooLarge",
    "Limits",
    "MalformedKnowledge",
    "NotNormalised",
    "OffsetOutOfRange",
    "SampleOutsideSlice",
    "TokenOutOfRange",
    "TruncatedKnowledge",
    "UnsupportedKnowledge",
    "WrongFederation",
    "WrongPublicSet",
    "WrongRound",
    "WrongSettings",
    "WrongVocabulary",
    "check",
    "check_fields",
    "check_header",
    "check_rows",
    "decode",
    "encode",
    "encode_frames",
    "limits_for",
    "quantised",
    "read_index",
]

ROW_BYTES = 6  # at least: offset step, entries, reference, floor, gold level, tail
MAX_BLOCK_BYTES = BLOCK_ROWS * 11 + BLOCK_ENTRIES * 17 // 4 + (1 << 16)
INDEX_BYTES = 1 << 16  # of the index frame, samples aside
MAX_INT32 = int(np.iinfo(np.int32).max)


# ------------------------------------------------------------------------------------------------ encoding


def encode(knowledge: Knowledge) -> bytes:
    """The blob of a knowledge. `decode` gives `quantised(knowledge)` back, which encodes to the same bytes again."""
    return b"".join(encode_frames(knowledge))


def encode_frames(knowledge: Knowledge) -> Iterator[bytes]:
    """The blob piece by piece, so that a sender holds one block of rows at a time."""
    yield MAGIC + bytes([VERSION])
    yield write_frame(_pack_index(knowledge))
    steps = np.diff(knowledge.context_ends, prepend=np.int32(0))
    firsts = knowledge.row_splits[:-1]
    steps[firsts] = knowledge.context_ends[firsts]
    for rows in row_blocks(knowledge.entry_splits):
        yield write_frame(_pack_rows(knowledge, rows, steps[rows]))


def quantised(knowledge: Knowledge) -> Knowledge:
    """What a receiver will decode: the same rows with their log-probabilities on the wire's grid."""
    size = knowledge.header.vocabulary_size
    gold, logprobs = np.empty_like(knowledge.gold_logprobs), np.empty_like(knowledge.logprobs)
    for rows in row_blocks(knowledge.entry_splits):
        splits, entries = _block(knowledge, rows)
        codes = to_grid(knowledge.logprobs[entries], knowledge.gold_logprobs[rows], splits, size)
        logprobs[entries], gold[rows] = from_grid(*codes, splits, size)
    return Knowledge(
        header=knowledge.header,
        samples=knowledge.samples,
        row_splits=knowledge.row_splits,
        context_ends=knowledge.context_ends,
        gold_logprobs=gold,
        entry_splits=knowledge.entry_splits,
        token_ids=knowledge.token_ids,
        logprobs=logprobs,
    )


def _pack_index(k: Knowledge) -> Columns:
    counts = {"samples": int(k.samples.size), "rows": k.rows, "entries": k.entries}
    text = json.dumps({**counts, "header": asdict(k.header)}, sort_keys=True, separators=(",", ":"))
    return {
        "index": np.frombuffer(text.encode(), dtype=np.uint8),
        **dict(to_planes("samples", np.diff(k.samples, prepend=-1) - 1)),
        **dict(to_planes("rows", np.diff(k.row_splits) - 1)),
    }


def _block(k: Knowledge, rows: slice) -> tuple[Ints, slice]:
    """Entry splits within a run of rows [r+1], and the entries it has in the whole."""
    splits = k.entry_splits[rows.start : rows.stop + 1]
    return splits - splits[0], slice(int(splits[0]), int(splits[-1]))


def _pack_rows(k: Knowledge, rows: slice, steps: Ints) -> Columns:
    splits, entries = _block(k, rows)
    levels, gold_levels, tails = to_grid(k.logprobs[entries], k.gold_logprobs[rows], splits, k.header.vocabulary_size)
    floors = np.maximum.reduceat(levels, splits[:-1])
    return {
        **dict(to_planes("offset_steps", steps)),
        **dict(to_planes("entries", np.diff(splits) - 1)),
        **id_columns.to_columns(k.token_ids[entries], splits),
        # Where a row is cut, most of its entries lie just above the cut, so heights above it vary less than depths.
        "heights.0": np.repeat(floors, np.diff(splits)) - levels,
        "floors.0": floors,
        "gold_levels.0": gold_levels,
        "tails.0": tails,
    }


# ------------------------------------------------------------------------------------------------ decoding


class Index(BaseModel):
    """What a blob says about itself before any row is unpacked."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    samples: Annotated[int, Field(ge=1)]
    rows: Annotated[int, Field(ge=1)]
    entries: Annotated[int, Field(ge=1)]
    header: KnowledgeHeader


def read_index(blob: bytes, *, limits: Limits = DEFAULT_LIMITS) -> Index:
    """Header and sizes of a blob, without unpacking its rows. Raises MalformedKnowledge or KnowledgeTooLarge."""
    return _read_index(split_frames(blob, limits)[0], limits)[0]


def decode(blob: bytes, *, limits: Limits = DEFAULT_LIMITS) -> Knowledge:
    """The knowledge in a blob from anywhere: every size is bounded before memory is asked for, every value checked.

    Raises only Refusals: those of `fedmkt.codec` for bytes that are no blob or too large a one, those of `Knowledge`
    for columns that are no knowledge.
    """
    frames = split_frames(blob, limits)
    index, samples, row_counts = _read_index(frames[0], limits)
    stated = sum(stated_bytes(frame, MAX_BLOCK_BYTES) for frame in frames[1:])
    if ROW_BYTES * index.rows + index.entries > stated:
        raise MalformedKnowledge(
            f"{index.rows} rows and {index.entries} entries are announced, {stated} bytes cannot hold them"
        )
    table = _Rows(index)
    for frame in frames[1:]:
        table.add(read_frame(frame, MAX_BLOCK_BYTES))
    return table.finish(samples, row_counts)


def _read_index(frame: memoryview, limits: Limits) -> tuple[Index, NDArray[np.int64], NDArray[np.int64]]:
    """The index frame: header and sizes, public samples [S], rows of each sample [S]."""
    columns = read_frame(frame, INDEX_BYTES + 8 * limits.samples)
    index = _parse_index(columns.pop("index", np.empty(0, dtype=np.uint8)).tobytes())
    for name in ("samples", "rows", "entries"):
        count, most = getattr(index, name), getattr(limits, name)
        if count > most:
            raise KnowledgeTooLarge(f"the blob announces {count} {name}, at most {most} are accepted")
    samples = np.cumsum(from_planes(columns, "samples", index.samples).astype(np.int64) + 1) - 1
    row_counts = from_planes(columns, "rows", index.samples).astype(np.int64) + 1
    refuse_unknown(columns)
    if row_counts.sum() != index.rows:
        raise MalformedKnowledge(f"{index.rows} rows are announced, the samples have {row_counts.sum()}")
    if samples[-1] > MAX_INT32:
        raise MalformedKnowledge(f"public sample {samples[-1]} is beyond the largest index {MAX_INT32}")
    return index, samples, row_counts


def _parse_index(text: bytes) -> Index:
    try:
        return Index.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "its text"
        raise MalformedKnowledge(f"the blob's index is wrong at {where}: {first['msg']}") from error


class _Rows:
    """The decoded columns, filled block by block."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self.rows = self.entries = 0
        self.steps = np.empty(index.rows, np.uint32)
        self.gold_logprobs = np.empty(index.rows, np.float32)
        self.entry_splits = np.zeros(index.rows + 1, np.int32)
        self.token_ids = np.empty(index.entries, np.int32)
        self.logprobs = np.empty(index.entries, np.float32)

    def add(self, columns: dict[str, Octets]) -> None:
        """Checks and appends one block of rows."""
        splits, rows, entries = self._place(columns)
        size = self.index.header.vocabulary_size
        levels = _levels(columns, splits)
        gold_levels, tails = (from_plane(columns, name, splits.size - 1) for name in ("gold_levels", "tails"))
        self.logprobs[entries], self.gold_logprobs[rows] = from_grid(levels, gold_levels, tails, splits, size)
        self.token_ids[entries] = id_columns.from_columns(columns, splits, size)
        self.steps[rows] = from_planes(columns, "offset_steps", splits.size - 1)
        self.entry_splits[rows.start + 1 : rows.stop + 1] = splits[1:] + entries.start
        refuse_unknown(columns)
        self.rows, self.entries = rows.stop, entries.stop

    def _place(self, columns: dict[str, Octets]) -> tuple[NDArray[np.int64], slice, slice]:
        """Where a block goes: entry splits within it [r+1], its rows and its entries in the whole."""
        count = columns["entries.0"].size if "entries.0" in columns else 0
        counts = from_planes(columns, "entries", count, planes=2).astype(np.int64) + 1
        splits = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
        rows, entries = self.rows + count, self.entries + int(splits[-1])
        if count == 0 or rows > self.index.rows or entries > self.index.entries or counts.max() > MAX_TOP_K:
            raise MalformedKnowledge(
                f"a block of {count} rows and {splits[-1]} entries does not fit the {self.index.rows} rows and "
                f"{self.index.entries} entries announced, or a row has more than {MAX_TOP_K} entries"
            )
        return splits, slice(self.rows, rows), slice(self.entries, entries)

    def finish(self, samples: NDArray[np.int64], row_counts: NDArray[np.int64]) -> Knowledge:
        if (self.rows, self.entries) != (self.index.rows, self.index.entries):
            raise TruncatedKnowledge(
                f"{self.index.rows} rows and {self.index.entries} entries are announced, "
                f"the blob holds {self.rows} and {self.entries}"
            )
        row_splits = np.concatenate([np.zeros(1, np.int64), np.cumsum(row_counts)])
        ends = np.cumsum(self.steps, dtype=np.int64)
        ends -= np.repeat(ends[row_splits[:-1]] - self.steps[row_splits[:-1]], row_counts)
        if ends.max() > MAX_INT32:
            raise OffsetOutOfRange(f"a context ends at byte {ends.max()}, beyond the largest offset {MAX_INT32}")
        return Knowledge(
            header=self.index.header,
            samples=samples.astype(np.int32),
            row_splits=row_splits.astype(np.int32),
            context_ends=ends.astype(np.int32),
            gold_logprobs=self.gold_logprobs,
            entry_splits=self.entry_splits,
            token_ids=self.token_ids,
            logprobs=self.logprobs,
        )


def _levels(columns: dict[str, Octets], splits: NDArray[np.int64]) -> Octets:
    """Levels of a block's entries [n] from the floors of its rows and the heights above them."""
    floors = from_plane(columns, "floors", splits.size - 1)
    heights = from_plane(columns, "heights", int(splits[-1]))
    lowest, highest = (extreme.reduceat(heights, splits[:-1]) for extreme in (np.minimum, np.maximum))
    if (lowest > 0).any() or (highest != floors).any():
        raise MalformedKnowledge(
            "a row's heights do not reach from 0 to its floor; its most probable token has level 0, its least the floor"
        )
    return np.repeat(floors, np.diff(splits)) - heights
