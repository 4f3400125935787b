"""Which teacher row supervises which student row, and the sparse target it gives. DESIGN.md 5.4.

Teacher row j supervises student row i iff both contexts end at the same byte of the same sample. Everything is done on
whole public sets with array operations. S samples, R rows, N entries, V vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedmkt.errors import Refusal
from fedmkt.knowledge import Knowledge
from fedmkt.projection import Realised, Table, landed, largest, map_table, summed, take_table
from fedmkt.tokenized_set import TokenizedSet, response_rows, runs, take_rows, tokenize_set
from fedmkt.vocab_map import PrefixRelation, VocabMap

__all__ = [
    "Part",
    "RowsDiffer",
    "SparseTargets",
    "TokenizedSet",
    "align_rows",
    "align_set",
    "assemble_targets",
    "check_same_rows",
    "gold_transfer",
    "project",
    "response_rows",
    "take_rows",
    "tokenize_set",
]

MAX_ENTRIES = 128
BLOCK_ROWS = 1 << 14  # aligned at once, one sample at least: everything stays in cache, so time grows with the rows
PROJECTED_ROWS = 512  # projected at once: the same, for rows of some hundred columns
PROJECTED_CELLS = 1 << 21  # pairs of a teacher's and an own entry in them, tens of megabytes at worst
_STRIDE = np.int64(1) << 32  # larger than any byte offset: one key orders (sample, offset)


class RowsDiffer(Refusal):
    code: ClassVar[str] = "alignment.rows_differ"
    title: ClassVar[str] = "Knowledge does not have the rows that the text gives"


@dataclass(frozen=True, slots=True)
class SparseTargets:
    """Soft targets on the student's response rows.

    row_splits int32 [S+1] samples -> rows; splits int32 [R+1] rows -> entries; ids int32 [N] strictly ascending within
    a row; probs float32 [N] > 0; residual float32 [R] >= 0, teacher mass outside the ids (0 for unsupervised rows);
    supervised bool [R]: rows without a soft target have no entries.
    """

    row_splits: NDArray[np.int32]
    splits: NDArray[np.int32]
    ids: NDArray[np.int32]
    probs: NDArray[np.float32]
    residual: NDArray[np.float32]
    supervised: NDArray[np.bool_]


# ------------------------------------------------------------------------------------------------ rows


def align_rows(teacher_ends: NDArray[np.integer], student_ends: NDArray[np.integer]) -> NDArray[np.int32]:
    """For each student row the teacher row whose context ends at the same byte, or -1. int32 [student rows].

    Both inputs are context ends of one sample (or any sorted keys), never decreasing. A byte at which several contexts
    end occurs only after tokens without bytes of their own (a lone dummy space, part of a character in a lossy text):
    the first of them is the context that holds the text up to there and no more, so the first pairs with the first;
    the k-th pairs with the k-th only when both sides have equally many, as two equal tokenizers do.
    """
    teacher, student = np.asarray(teacher_ends), np.asarray(student_ends)
    if not len(teacher):
        return np.full(len(student), -1, dtype=np.int32)
    first = np.searchsorted(teacher, student, side="left")
    equal = teacher[np.minimum(first, len(teacher) - 1)] == student
    pairs = np.where(equal, first, -1).astype(np.int32)
    repeats = np.flatnonzero(student[1:] == student[:-1]) + 1
    if len(repeats):
        values = student[repeats]
        start = np.searchsorted(student, values, side="left")
        here = np.searchsorted(student, values, side="right") - start
        there = np.searchsorted(teacher, values, side="right") - first[repeats]
        pairs[repeats] = np.where(here == there, first[repeats] + repeats - start, -1)
    return pairs


def align_set(teacher: TokenizedSet, student: TokenizedSet) -> NDArray[np.int32]:
    """`align_rows` for every sample at once: int32 [R_student], row numbers of the teacher's set, -1 none."""
    partners = np.empty(student.rows, dtype=np.int32)
    for theirs, ours in _blocks(teacher, student):
        found = align_rows(theirs.keys(teacher.context_ends), ours.keys(student.context_ends))
        partners[ours.rows] = np.where(found >= 0, found + theirs.rows.start, -1)
    return partners


@dataclass(frozen=True, slots=True)
class _Block:
    """Some neighbouring samples of one side: their rows, and each row's sample times _STRIDE, int64 [rows]."""

    rows: slice
    base: NDArray[np.int64]

    def keys(self, offsets: NDArray[np.int32]) -> NDArray[np.int64]:
        """Byte offsets of all rows of the side as keys that order by sample, then offset: those of these rows."""
        return self.base + offsets[self.rows]


def _blocks(teacher: TokenizedSet, student: TokenizedSet) -> Iterator[tuple[_Block, _Block]]:
    """Both sides' rows of the same samples, of few enough for the cache; the student's cover all its rows in order."""
    for ours in runs(student.row_splits, BLOCK_ROWS):
        start = np.searchsorted(teacher.samples, student.samples[ours.start], side="left")
        stop = np.searchsorted(teacher.samples, student.samples[ours.stop - 1], side="right")
        yield _block(teacher, slice(int(start), int(stop))), _block(student, ours)


def _block(rows: TokenizedSet, samples: slice) -> _Block:
    splits = rows.row_splits[samples.start : samples.stop + 1]
    base = np.repeat(rows.samples[samples] * _STRIDE, np.diff(splits))
    return _Block(slice(int(splits[0]), int(splits[-1])), base)


@dataclass(frozen=True, slots=True)
class _Pairs:
    """M supervised rows: teacher and student row numbers, and the shortest run of teacher rows that covers g."""

    teacher: NDArray[np.int64]
    student: NDArray[np.int64]
    last: NDArray[np.int64]  # last row of the cover
    reached: NDArray[np.bool_]
    determined: NDArray[np.bool_]


def _pair(teacher: TokenizedSet, student: TokenizedSet) -> _Pairs:
    none = np.zeros(0, np.int64)
    found = [_Pairs(none, none, none, none > 0, none > 0)]
    found += [_pair_block(teacher, student, *blocks) for blocks in _blocks(teacher, student)]
    return _Pairs(*(np.concatenate([getattr(part, name) for part in found]) for name in _Pairs.__slots__))


def _pair_block(teacher: TokenizedSet, student: TokenizedSet, theirs: _Block, ours: _Block) -> _Pairs:
    partners = align_rows(theirs.keys(teacher.context_ends), ours.keys(student.context_ends)).astype(np.int64)
    rows = np.flatnonzero(partners >= 0)
    first = partners[rows]
    gold, ends = ours.keys(student.gold_ends)[rows], theirs.keys(teacher.gold_ends)
    last = np.maximum(np.searchsorted(ends, gold, side="left"), first)
    reached = last < len(ends)
    last = np.minimum(last, max(len(ends) - 1, 0))
    reached &= ends[last] // _STRIDE == gold // _STRIDE
    determined = reached & ((ends[last] == gold) | (last == first))
    start = theirs.rows.start
    return _Pairs(start + first, ours.rows.start + rows, start + np.where(reached, last, first), reached, determined)


# ------------------------------------------------------------------------------------------------ targets


def project(
    teacher: Knowledge,
    teacher_rows: TokenizedSet,
    student_rows: TokenizedSet,
    vocab_map: VocabMap,
    *,
    relation: PrefixRelation | None = None,
    student_knowledge: Knowledge | None = None,
    chain_rule: bool = True,
    max_entries: int = MAX_ENTRIES,
) -> SparseTargets:
    """The teacher's knowledge as sparse targets on the student's rows; collisions are summed.

    teacher_rows: `tokenize_set` of the teacher's vocabulary on the knowledge's samples. With `relation` and
    `student_knowledge` (the student's own, fresh) a teacher token is spread over the student's kept tokens that start
    with it, in proportion to the student's own probabilities; the map takes what no kept token starts with. A row is
    supervised when a teacher row has its context and some of that row's mass lands. At most `max_entries` a row, the
    largest and always the realised token; the rest joins the residual. Raises RowsDiffer when knowledge and rows
    disagree, ValueError when only one of relation and student_knowledge is given.
    """
    if (relation is None) != (student_knowledge is None):
        raise ValueError("prefix buckets need both the relation and the student's own knowledge")
    check_same_rows(teacher, teacher_rows)
    own_rows = None if student_knowledge is None else _own_rows(student_knowledge, student_rows)
    pairs = _pair(teacher_rows, student_rows)
    realised = _realised(teacher, teacher_rows, student_rows, pairs)
    table = map_table(vocab_map.indptr, vocab_map.ids, vocab_map.weights)
    size = _student_size(vocab_map, student_rows, relation)
    widths = [np.diff(teacher.entry_splits)[pairs.teacher]]
    if student_knowledge is not None and own_rows is not None:
        widths.append(np.diff(student_knowledge.entry_splits)[own_rows[pairs.student]])
    parts = []
    for rows in _like_rows(*widths):
        at, entries, own = pairs.student[rows], _entries(teacher, pairs.teacher[rows]), None
        if student_knowledge is not None and own_rows is not None:
            own = _entries(student_knowledge, own_rows[at])
        given = landed(entries, table, realised.take(rows) if chain_rule else None, own, relation)
        parts.append(_part(at, largest(summed(given, size), max_entries, student_rows.gold_ids[at])))
    return assemble_targets(student_rows, parts)


def gold_transfer(
    teacher_rows: TokenizedSet,
    student_rows: TokenizedSet,
    vocab_map: VocabMap,
    *,
    chain_rule: bool = True,
    supervised: NDArray[np.bool_] | None = None,
) -> float:
    """Share of supervised rows in which the teacher's realised mass lands on the student's realised token.

    It depends on tokenizers, text and map alone. A row counts when the map's best id for the teacher's realised token
    is the student's realised token or, with the chain rule, when the student's realised token ends where a teacher
    token ends or lies within one. Where it ends inside a later teacher token no exact mass is known, and only the map
    counts. `supervised` bool [R_student] narrows the rows, e.g. to `SparseTargets.supervised`. Returns 0 without rows.
    """
    pairs = _pair(teacher_rows, student_rows)
    chosen = np.ones(len(pairs.student), bool) if supervised is None else supervised[pairs.student]
    best = vocab_map.best_ids[teacher_rows.gold_ids[pairs.teacher]]
    lands = best == student_rows.gold_ids[pairs.student]
    if chain_rule:
        lands |= pairs.determined
    return float(lands[chosen].mean()) if chosen.any() else 0.0


def _like_rows(*widths: NDArray[np.integer[Any]]) -> Iterator[NDArray[np.int64]]:
    """Blocks of row numbers [n]; rows with about as many entries come together, so that tables have few empty cells.

    widths: each row's entries on each side, [M]. Everything a block needs is bounded by PROJECTED_CELLS, whatever a
    sender sends: each of its entries may begin every one of the student's own.
    """
    order, start = np.argsort(np.sum(widths, axis=0), kind="stable"), 0
    while start < len(order):
        rows = order[start : start + PROJECTED_ROWS]
        cells = math.prod(int(width[rows].max()) for width in widths)
        rows = rows[: max(1, PROJECTED_CELLS // cells)]
        yield rows
        start += len(rows)


def _entries(knowledge: Knowledge, rows: NDArray[np.int64]) -> Table:
    return take_table(knowledge.entry_splits, knowledge.token_ids, knowledge.logprobs, rows)


def _realised(knowledge: Knowledge, teacher: TokenizedSet, student: TokenizedSet, pairs: _Pairs) -> Realised:
    logprobs = knowledge.gold_logprobs.astype(np.float64)
    longer = pairs.last > pairs.teacher
    bounds = np.stack([pairs.teacher[longer], pairs.last[longer]], axis=1).reshape(-1) + 1
    later = np.zeros(len(pairs.teacher))
    later[longer] = np.add.reduceat(np.append(logprobs, 0.0), bounds)[::2]
    return Realised(
        teacher_ids=teacher.gold_ids[pairs.teacher],
        student_ids=student.gold_ids[pairs.student],
        first_mass=np.exp(logprobs[pairs.teacher]),
        later_mass=np.exp(np.minimum(later, 0.0)),
        reached=pairs.reached,
        determined=pairs.determined,
    )


@dataclass(frozen=True, slots=True)
class Part:
    """Targets of m rows: their numbers, how many entries each has and their mass, [m]; ids and probs row after row."""

    rows: NDArray[np.int64]
    counts: NDArray[np.int64]
    total: NDArray[np.float64]
    ids: NDArray[np.int32]
    probs: NDArray[np.float32]


def _part(rows: NDArray[np.int64], kept: Table) -> Part:
    """The cells of a table that have mass, unless it is too small for the targets' float32."""
    probs = kept.mass.astype(np.float32)
    cells = np.flatnonzero(probs > 0)
    counts = np.diff(np.searchsorted(cells, np.arange(0, probs.size + 1, probs.shape[1])))
    return Part(rows, counts, kept.mass.sum(axis=1), kept.token.reshape(-1).take(cells), probs.reshape(-1).take(cells))


def assemble_targets(student_rows: TokenizedSet, parts: Sequence[Part]) -> SparseTargets:
    """Targets from parts that have each row once at most; a row without entries is not supervised."""
    counts = np.zeros(student_rows.rows, dtype=np.int64)
    residual = np.zeros(student_rows.rows, dtype=np.float32)
    for part in parts:
        counts[part.rows] = part.counts
        residual[part.rows] = np.maximum(1.0 - part.total, 0.0)
    supervised = counts > 0
    residual[~supervised] = 0.0
    splits = np.concatenate([[0], np.cumsum(counts)])
    ids, probs = np.empty(splits[-1], dtype=np.int32), np.empty(splits[-1], dtype=np.float32)
    for part in parts:
        places, _ = take_rows(splits, part.rows)
        ids[places], probs[places] = part.ids, part.probs
    return SparseTargets(student_rows.row_splits, splits.astype(np.int32), ids, probs, residual, supervised)


# ------------------------------------------------------------------------------------------------ checks


def check_same_rows(knowledge: Knowledge, rows: TokenizedSet) -> None:
    same = np.array_equal(knowledge.samples, rows.samples) and np.array_equal(knowledge.row_splits, rows.row_splits)
    if not same or not np.array_equal(knowledge.context_ends, rows.context_ends):
        raise RowsDiffer(
            f"knowledge has {len(knowledge.samples)} samples with {len(knowledge.context_ends)} rows, the text gives "
            f"{len(rows.samples)} samples with {rows.rows} rows, or their offsets differ; make it again with the "
            "registered tokenizer and max_tokens"
        )


def _own_rows(knowledge: Knowledge, rows: TokenizedSet) -> NDArray[np.int64]:
    """Row numbers of the student's own knowledge for its rows; it may hold more samples than the rows do."""
    needed = rows.samples[np.diff(rows.row_splits) > 0]
    places = np.minimum(np.searchsorted(knowledge.samples, needed), len(knowledge.samples) - 1)
    if not np.array_equal(knowledge.samples[places], needed):
        raise RowsDiffer("the student's own knowledge lacks samples that are to be taught; make it for the whole slice")
    own, _ = take_rows(knowledge.row_splits, places)
    if not np.array_equal(knowledge.context_ends[own], rows.context_ends):
        raise RowsDiffer(f"the student's own knowledge has {len(own)} rows there, its text gives {rows.rows}")
    return own


def _student_size(vocab_map: VocabMap, rows: TokenizedSet, relation: PrefixRelation | None) -> int:
    sizes = [int(vocab_map.ids.max(initial=0)), int(rows.gold_ids.max(initial=0))]
    return max([*sizes, 0 if relation is None else len(relation.places)]) + 1
