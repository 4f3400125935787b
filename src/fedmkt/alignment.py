"""Which teacher row supervises which student row, and the sparse target it gives. DESIGN.md 5.4.

Teacher row j supervises student row i iff both contexts end at the same byte of the same sample. Everything is done on
whole public sets with array operations. S samples, R rows, N entries, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedmkt.errors import Refusal
from fedmkt.knowledge import Knowledge
from fedmkt.projection import (
    Contributions,
    Entries,
    Realised,
    apply_chain_rule,
    joined,
    largest,
    summed,
    take_entries,
    through_buckets,
    through_map,
)
from fedmkt.tokenized_set import TokenizedSet, response_rows, take_rows, tokenize_set
from fedmkt.vocab_map import PrefixRelation, VocabMap

__all__ = [
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
CHUNK_ROWS = 1024  # paired rows projected at once: at 64 entries a row most arrays stay in cache
FLOOR_LOGPROB = -1000.0  # exp is 0 there; keeps running sums of log-probabilities exact enough
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
    return align_rows(_keys(teacher, teacher.context_ends), _keys(student, student.context_ends))


def _keys(rows: TokenizedSet, offsets: NDArray[np.int32]) -> NDArray[np.int64]:
    return np.repeat(rows.samples.astype(np.int64), np.diff(rows.row_splits)) * _STRIDE + offsets


@dataclass(frozen=True, slots=True)
class _Pairs:
    """M supervised rows: teacher and student row numbers, and the shortest run of teacher rows that covers g."""

    teacher: NDArray[np.int64]
    student: NDArray[np.int64]
    last: NDArray[np.int64]  # last row of the cover
    reached: NDArray[np.bool_]
    determined: NDArray[np.bool_]


def _pair(teacher: TokenizedSet, student: TokenizedSet) -> _Pairs:
    partners = align_set(teacher, student).astype(np.int64)
    rows = np.flatnonzero(partners >= 0)
    first = partners[rows]
    gold = _keys(student, student.gold_ends)[rows]
    ends = _keys(teacher, teacher.gold_ends)
    last = np.maximum(np.searchsorted(ends, gold, side="left"), first)
    reached = last < len(ends)
    last = np.minimum(last, max(len(ends) - 1, 0))
    reached &= ends[last] // _STRIDE == gold // _STRIDE
    determined = reached & ((ends[last] == gold) | (last == first))
    return _Pairs(first, rows, np.where(reached, last, first), reached, determined)


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
    size = _student_size(vocab_map, student_rows, relation)
    parts = []
    for chunk in _chunks(len(pairs.student)):
        rows, at = pairs.teacher[chunk], pairs.student[chunk]
        entries = take_entries(teacher.entry_splits, teacher.token_ids, teacher.logprobs, rows)
        own = None
        if student_knowledge is not None and own_rows is not None:
            own = take_entries(
                student_knowledge.entry_splits, student_knowledge.token_ids, student_knowledge.logprobs, own_rows[at]
            )
        given = _spread(entries, own, vocab_map, relation)
        gold = student_rows.gold_ids[at].astype(np.int64)
        if chain_rule:
            given = apply_chain_rule(given, entries, _realised(teacher, teacher_rows, pairs, chunk, gold))
        parts.append(largest(*summed(given, len(rows), size), max_entries, gold))
    return assemble_targets(student_rows, pairs.student, parts)


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


def _chunks(rows: int) -> Iterator[slice]:
    for start in range(0, rows, CHUNK_ROWS):
        yield slice(start, min(start + CHUNK_ROWS, rows))


def _spread(
    entries: Entries, own: Entries | None, vocab_map: VocabMap, relation: PrefixRelation | None
) -> Contributions:
    if own is None or relation is None:
        everything = np.arange(len(entries.token))
        return through_map(entries, everything, vocab_map.indptr, vocab_map.ids, vocab_map.weights)
    teacher_size = len(vocab_map.indptr) - 1
    spread, filled = through_buckets(entries, own, relation.indptr, relation.ids, teacher_size)
    mapped = through_map(entries, np.flatnonzero(~filled), vocab_map.indptr, vocab_map.ids, vocab_map.weights)
    return joined(spread, mapped)


def _realised(
    teacher: Knowledge, rows: TokenizedSet, pairs: _Pairs, chunk: slice, student_ids: NDArray[np.int64]
) -> Realised:
    first, last = pairs.teacher[chunk], pairs.last[chunk]
    low, high = int(first.min()), int(last.max()) + 1
    logprobs = np.maximum(teacher.gold_logprobs[low:high].astype(np.float64), FLOOR_LOGPROB)
    running = np.cumsum(logprobs)
    return Realised(
        teacher_ids=rows.gold_ids[first].astype(np.int64),
        student_ids=student_ids,
        first_mass=np.exp(logprobs[first - low]),
        later_mass=np.exp(np.minimum(running[last - low] - running[first - low], 0.0)),
        reached=pairs.reached[chunk],
        determined=pairs.determined[chunk],
    )


def assemble_targets(
    student_rows: TokenizedSet,
    rows: NDArray[np.int64],
    parts: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]],
) -> SparseTargets:
    """Targets from parts of (entry counts [m], ids, mass) for the row numbers `rows` [sum of m], in that order."""
    counts = np.zeros(student_rows.rows, dtype=np.int64)
    residual = np.zeros(student_rows.rows, dtype=np.float64)
    position = 0
    for row_counts, _, mass in parts:
        at = rows[position : position + len(row_counts)]
        counts[at] = row_counts
        total = np.bincount(np.repeat(np.arange(len(row_counts)), row_counts), mass, len(row_counts))
        residual[at] = np.maximum(1.0 - total, 0.0)
        position += len(row_counts)
    supervised = counts > 0
    return SparseTargets(
        row_splits=student_rows.row_splits,
        splits=np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
        ids=np.concatenate([ids for _, ids, _ in parts] or [np.zeros(0, np.int64)]).astype(np.int32),
        probs=np.concatenate([mass for _, _, mass in parts] or [np.zeros(0)]).astype(np.float32),
        residual=np.where(supervised, residual, 0.0).astype(np.float32),
        supervised=supervised,
    )


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
    return max([*sizes, 0 if relation is None else len(relation.indptr) - 1]) + 1
