"""The kept tokens' ids of a frame's rows as columns and back. docs/protocol.md lays them out.

Rows of like contexts keep like tokens. So a row either stands alone, its ids told as gaps, or refers to one of the
frame's rows that stand alone: a bit for each of that row's ids (kept here too or not), then gaps for its own other ids.
No row refers to one that refers, so a reader needs one step, whatever the bytes say.

Legend: r rows and n entries of a frame, V vocabulary.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmkt.codec import Columns, MalformedKnowledge, Octets, from_plane, from_planes, to_planes
from fedmkt.knowledge_data import Ints, TokenOutOfRange
from fedmkt.tokenized_set import take_rows

CANDIDATE_EVERY = 12  # rows: one in so many stands alone so that the others may refer to it
MOST_CANDIDATES = 1024  # of a frame: each is compared with every row
CHUNK_ROWS = 1024  # 4 MiB of similarities
# Two rows' sketches have about as many ids in common as the rows: ids share places, with signs that cancel on average.
SKETCH_BITS = 7
HASH_FACTOR = np.uint32(2654435761)  # 2^32 / golden ratio: neighbouring ids go to places far apart

FLAGS_PER_ENTRY = 2  # at most, in a frame: what a reader unpacks stays in proportion

Longs = NDArray[np.int64]
Bits = NDArray[np.bool_]


# ------------------------------------------------------------------------------------------------ writing


def to_columns(ids: Ints, splits: NDArray[Any]) -> Columns:
    """Columns `references`, `shared`, `id_gaps` of rows with ascending ids [n]; splits int [r+1], no row empty."""
    references, own, flags = _shared_with_others(ids, splits)
    alone = references < 0
    numbers = np.where(alone, 0, np.cumsum(alone)[references])
    own_splits = _splits(np.add.reduceat(own, splits[:-1], dtype=np.int64))
    ours = ids[own].astype(np.int64)
    gaps = np.diff(ours, prepend=-1) - 1
    firsts = own_splits[:-1][np.diff(own_splits) > 0]
    gaps[firsts] = ours[firsts]
    return {
        **dict(to_planes("references", numbers)),
        "shared.0": np.packbits(flags, bitorder="little"),
        **dict(to_planes("id_gaps", gaps)),
    }


def _shared_with_others(ids: Ints, splits: NDArray[Any]) -> tuple[Longs, Bits, Bits]:
    """The row that each row refers to or -1 [r], which entries are not shared with it [n], a flag for each of its ids.

    A row refers to another when it keeps half of that one's ids or more: fewer save less than the flags cost.
    """
    rows = splits.size - 1
    references = np.full(rows, -1, dtype=np.int64)
    own = np.ones(ids.size, dtype=bool)
    flags = [np.zeros(0, dtype=bool)]
    for start, likest in _likest(ids, splits):
        stop = start + likest.size
        entries = slice(int(splits[start]), int(splits[stop]))
        kept, found, splits_of_likest = _compared(ids, splits, start, likest)
        good = 2 * np.add.reduceat(found, splits_of_likest[:-1], dtype=np.int64) >= np.diff(splits_of_likest)
        good &= likest != np.arange(start, stop)
        if start == 0 and not good.any():
            break  # rows without likeness (a random model, a wide vocabulary): do not look further
        references[start:stop] = np.where(good, likest, -1)
        own[entries] = ~(kept & np.repeat(good, np.diff(splits[start : stop + 1])))
        flags.append(found[np.repeat(good, np.diff(splits_of_likest))])
    return references, own, np.concatenate(flags)


def _likest(ids: Ints, splits: NDArray[Any]) -> Iterator[tuple[int, Longs]]:
    """For chunks of rows: the first row, and the candidate likest to each row; a candidate is likest to itself."""
    rows = splits.size - 1
    step = max(CANDIDATE_EVERY, -(-rows // MOST_CANDIDATES))
    candidates = np.arange(0, rows, step)
    theirs = _sketches(ids[take_rows(splits, candidates)[0]], np.diff(splits)[candidates]).T
    for start in range(0, rows, CHUNK_ROWS):
        stop = min(start + CHUNK_ROWS, rows)
        ours = _sketches(ids[splits[start] : splits[stop]], np.diff(splits[start : stop + 1]))
        likest = candidates[np.argmax(ours @ theirs, axis=1)]
        chosen = candidates[(candidates >= start) & (candidates < stop)]
        likest[chosen - start] = chosen
        yield start, likest


def _sketches(ids: Ints, counts: NDArray[Any]) -> NDArray[np.float32]:
    """Signed counts of the rows' ids by hash, [r, 128]: small whole numbers, so their products are exact everywhere."""
    hashed = ids.astype(np.uint32) * HASH_FACTOR
    places = np.repeat(np.arange(counts.size) << SKETCH_BITS, counts) + (hashed >> np.uint32(32 - SKETCH_BITS))
    signs = ((hashed >> np.uint32(31 - SKETCH_BITS)) & np.uint32(1)) * 2.0 - 1.0
    found = np.bincount(places, signs, minlength=counts.size << SKETCH_BITS)
    return found.astype(np.float32).reshape(counts.size, -1)


def _compared(ids: Ints, splits: NDArray[Any], start: int, others: Longs) -> tuple[Bits, Bits, Longs]:
    """Rows from `start` against one other row each: which of ours the other has, which of its ids we have, splits."""
    rows = np.arange(start, start + others.size)
    (our_entries, our_rows), (their_entries, their_rows) = take_rows(splits, rows), take_rows(splits, others)
    ours, theirs = our_rows << 32 | ids[our_entries], their_rows << 32 | ids[their_entries]
    both = np.sort(np.concatenate([ours << 1, theirs << 1 | 1]), kind="stable")  # two sorted runs: one merge
    equal = both[:-1] ^ 1 == both[1:]
    is_theirs = (both & 1).astype(bool)
    return np.append(equal, False)[~is_theirs], np.append(False, equal)[is_theirs], _splits(np.diff(splits)[others])


# ------------------------------------------------------------------------------------------------ reading


def from_columns(columns: dict[str, Octets], splits: Longs, vocabulary_size: int) -> Ints:
    """Takes the id columns out of `columns`: ids int32 [n] by row, not yet checked for order and range.

    splits int64 [r+1], no row empty. Raises MalformedKnowledge and TokenOutOfRange.
    """
    counts = np.diff(splits)
    references = _references(columns, counts.size)
    referring = np.flatnonzero(references >= 0)
    others = references[referring]
    flag_splits = _splits(counts[others])
    flags = _flags(columns, int(flag_splits[-1]), int(splits[-1]))
    shared = np.zeros(counts.size, dtype=np.int64)
    if others.size:
        shared[referring] = np.add.reduceat(flags, flag_splits[:-1], dtype=np.int64)
    too_many = shared > counts
    if too_many.any():
        raise MalformedKnowledge(f"a row of {counts[too_many][0]} entries shares {shared[too_many][0]} of another's")
    own_splits = _splits(counts - shared)
    own = _own_ids(columns, own_splits, vocabulary_size)
    if not others.size:
        return own
    places = np.flatnonzero(flags) + np.repeat(own_splits[others] - flag_splits[:-1], shared[referring])
    return _merged(own, counts - shared, own[places], shared)


def _references(columns: dict[str, Octets], rows: int) -> Longs:
    """The row that each row refers to, -1 where it stands alone."""
    numbers = from_planes(columns, "references", rows, planes=2).astype(np.int64)
    alone = np.flatnonzero(numbers == 0)
    if numbers.max() > alone.size:
        raise MalformedKnowledge(f"a row refers to number {numbers.max()} of the {alone.size} rows that stand alone")
    return np.where(numbers == 0, -1, np.append(alone, -1)[numbers - 1])


def _flags(columns: dict[str, Octets], size: int, entries: int) -> Bits:
    """A bit for every id that a row might share."""
    if size > FLAGS_PER_ENTRY * entries:
        raise MalformedKnowledge(
            f"{size} flags for {entries} entries, at most {FLAGS_PER_ENTRY} an entry; a row shares half or stands alone"
        )
    packed = from_plane(columns, "shared", -(-size // 8))
    return np.unpackbits(packed, count=size, bitorder="little").astype(bool)


def _own_ids(columns: dict[str, Octets], splits: Longs, vocabulary_size: int) -> Ints:
    """Ids told as gaps, int32 [splits[-1]]; a row's first gap counts from -1, and a row may have none."""
    gaps = from_planes(columns, "id_gaps", int(splits[-1]), planes=3)
    if int(gaps.max()) >= vocabulary_size:
        raise TokenOutOfRange(f"a token id of at least {gaps.max()} for a vocabulary of {vocabulary_size}")
    gaps += np.uint32(1)  # at most MAX_TOP_K steps of at most MAX_VOCABULARY_SIZE: no row's sum reaches 2^31
    starts = splits[:-1][np.diff(splits) > 0]
    row_sums = np.add.reduceat(gaps, starts)
    gaps[starts[1:]] -= row_sums[:-1]  # the running sum starts anew at each row, modulo 2^32
    return (np.cumsum(gaps, dtype=np.uint32) - np.uint32(1)).view(np.int32)


def _merged(own: Ints, own_counts: Longs, others: Ints, other_counts: Longs) -> Ints:
    """Two sets of ids by row, each ascending in a row, as one."""
    rows = np.arange(own_counts.size)
    keys = [np.repeat(rows, own_counts) << 32 | own, np.repeat(rows, other_counts) << 32 | others]
    both = np.sort(np.concatenate(keys), kind="stable")  # two sorted runs: one merge
    return (both & 0xFFFFFFFF).astype(np.int32)


# ------------------------------------------------------------------------------------------------ both


def _splits(counts: NDArray[Any]) -> Longs:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])
