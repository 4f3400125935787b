"""The paper's own token alignment (FedMKT, appendix B), behind `profile: paper`; for comparison, not the default.

Dynamic programming by edit distance over token strings finds which tokens of the two cuts belong together. Where the
last token of a student row's context has one partner, and that partner maps to it, the partner row's kept tokens are
copied through the vocabulary map; the first of two that collide wins; what is left is renormalised. Every other row of
a taught sample gets all its mass on one token.

The reference implementation puts that mass on the token the context already ends with, which trains a model to repeat
itself. Here it is the token that the text realises next. Its greedy variant and its other faults are left out.
"""

import numpy as np
from numpy.typing import NDArray
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist

from fedmkt.alignment import Part, SparseTargets, assemble_targets, check_same_rows
from fedmkt.knowledge import Knowledge
from fedmkt.tokenized_set import TokenizedSet, take_rows
from fedmkt.vocab_map import VocabMap
from fedmkt.vocabulary import Vocabulary


def project_paper(
    teacher: Knowledge,
    teacher_rows: TokenizedSet,
    student_rows: TokenizedSet,
    vocab_map: VocabMap,
    teacher_vocabulary: Vocabulary,
    student_vocabulary: Vocabulary,
) -> SparseTargets:
    """Targets by the paper's alignment; shapes as in `fedmkt.alignment.project`.

    Every row of a sample that the teacher knows is supervised, its probabilities sum to 1 and its residual is 0; rows
    of other samples are not supervised. Raises RowsDiffer when knowledge and rows disagree.
    """
    check_same_rows(teacher, teacher_rows)
    partners, taught = _partners(teacher_rows, student_rows, vocab_map, teacher_vocabulary, student_vocabulary)
    rows, ids, mass = _copied(teacher, partners, vocab_map.best_ids)
    bare = taught & ~np.isin(np.arange(len(taught)), rows)
    rows = np.concatenate([rows, np.flatnonzero(bare)])
    ids = np.concatenate([ids, student_rows.gold_ids[bare]])
    mass = np.concatenate([mass, np.ones(int(bare.sum()))])
    order = np.lexsort((ids, rows))
    counts = np.bincount(rows, minlength=len(taught))
    whole = np.ones(len(taught))
    part = Part(np.arange(len(taught)), counts, whole, ids[order], mass[order].astype(np.float32))
    return assemble_targets(student_rows, [part])


def _partners(
    teacher_rows: TokenizedSet,
    student_rows: TokenizedSet,
    vocab_map: VocabMap,
    teacher_vocabulary: Vocabulary,
    student_vocabulary: Vocabulary,
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Per student row the teacher row to copy, -1 none, and whether the teacher knows its sample at all."""
    partners = np.full(student_rows.rows, -1, dtype=np.int64)
    taught = np.zeros(student_rows.rows, dtype=bool)
    place = {sample: position for position, sample in enumerate(teacher_rows.samples.tolist())}
    best = vocab_map.best_ids
    for position, sample in enumerate(student_rows.samples.tolist()):
        if sample not in place:
            continue
        own = slice(*student_rows.row_splits[position : position + 2].tolist())
        theirs = slice(*teacher_rows.row_splits[place[sample] : place[sample] + 2].tolist())
        taught[own] = True
        if own.start == own.stop or theirs.start == theirs.stop:
            continue
        # a row's context ends in the realised token of the row before it; the first row's ends where the prompt does
        before = teacher_rows.gold_ids[theirs][:-1], student_rows.gold_ids[own][:-1]
        matched = match_tokens(_texts(before[0], teacher_vocabulary), _texts(before[1], student_vocabulary))
        found = np.flatnonzero(matched >= 0)
        found = found[best[before[0][matched[found]]] == before[1][found]]
        partners[own.start + 1 + found] = theirs.start + 1 + matched[found]
        if teacher_rows.context_ends[theirs.start] == student_rows.context_ends[own.start]:
            partners[own.start] = theirs.start
    return partners, taught


def _texts(ids: NDArray[np.int32], vocabulary: Vocabulary) -> list[str]:
    return [vocabulary.tokens[index].decode(errors="replace") for index in ids.tolist()]


def match_tokens(teacher: list[str], student: list[str]) -> NDArray[np.int64]:
    """For each student token the only teacher token that the cheapest path matches with it, or -1. int64 [student].

    The path runs from the first to the last token of both, in steps of one token on either side or both; its cost is
    the sum of edit distances of the tokens that meet. Ties go to the step on both sides, then to the teacher's. O(n m).
    """
    alone = np.full(len(student), -1, dtype=np.int64)
    if not teacher or not student:
        return alone
    path = _cheapest_path(_distances(teacher, student))
    of_teacher, of_student = path[:, 0], path[:, 1]
    unique = (np.bincount(of_student)[of_student] == 1) & (np.bincount(of_teacher)[of_teacher] == 1)
    alone[of_student[unique]] = of_teacher[unique]
    return alone


def _distances(teacher: list[str], student: list[str]) -> NDArray[np.int64]:
    """Edit distances int64 [teacher, student], each pair of different strings computed once."""
    rows, row_of = np.unique(teacher, return_inverse=True)
    columns, column_of = np.unique(student, return_inverse=True)
    table = cdist(rows.tolist(), columns.tolist(), scorer=Levenshtein.distance, dtype=np.int32)
    return np.asarray(table, dtype=np.int64)[np.ix_(row_of, column_of)]


def _cheapest_path(cost: NDArray[np.int64]) -> NDArray[np.int64]:
    """Dynamic time warping, one anti-diagonal at a time. Returns int64 [steps, 2], last step first."""
    height, width = cost.shape
    total = np.full((height + 1, width + 1), np.iinfo(np.int64).max // 2)
    total[0, 0] = 0
    for diagonal in range(height + width - 1):
        i = np.arange(max(0, diagonal - width + 1), min(height, diagonal + 1))
        j = diagonal - i
        before = np.minimum(np.minimum(total[i, j], total[i, j + 1]), total[i + 1, j])
        total[i + 1, j + 1] = cost[i, j] + before
    i, j = height - 1, width - 1
    path = [(i, j)]
    while i or j:
        step = int(np.argmin((total[i, j], total[i, j + 1], total[i + 1, j])))
        i, j = i - (step != 2), j - (step != 1)
        path.append((i, j))
    return np.array(path)


def _copied(
    teacher: Knowledge, partners: NDArray[np.int64], best_ids: NDArray[np.int32]
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.float64]]:
    """Row, id and renormalised mass of the entries copied from partner rows; the most probable of a collision wins."""
    rows = np.flatnonzero(partners >= 0)
    members, owners = take_rows(teacher.entry_splits, partners[rows])
    tokens, mass = teacher.token_ids[members], np.exp(teacher.logprobs[members].astype(np.float64))
    row, ids = rows[owners], best_ids[tokens]
    order = np.lexsort((tokens, -mass, row))
    order = order[ids[order] >= 0]
    keys = row[order] * (np.int64(1) << 32) + ids[order]
    _, first = np.unique(keys, return_index=True)
    chosen = order[first]
    total = np.bincount(row[chosen], mass[chosen], len(partners))
    return row[chosen], ids[chosen], mass[chosen] / total[row[chosen]]
