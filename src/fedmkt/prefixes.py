"""Which teacher tokens begin which student tokens: what a teacher token says of the next bytes (DESIGN.md 5.3)."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fedmkt.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True, eq=False)
class PrefixRelation:
    """CSR student id -> the teacher ids whose bytes are a non-empty prefix of the student token's bytes.

    indptr int32 [V_student + 1]; ids int32 [nnz], in a row by prefix length, then by id. Special tokens and holes have
    no bytes, so no row and no entry.
    """

    teacher_fingerprint: str
    student_fingerprint: str
    indptr: NDArray[np.int32]
    ids: NDArray[np.int32]


@lru_cache(maxsize=8)
def prefix_relation(teacher: Vocabulary, student: Vocabulary) -> PrefixRelation:
    """The relation of two vocabularies; kept in memory for the last few pairs (by fingerprint).

    Time: one look-up for each student token and each length that teacher tokens have.
    """
    teacher_ids: dict[bytes, list[int]] = {}
    for index, token in enumerate(teacher.tokens):
        if token:
            teacher_ids.setdefault(token, []).append(index)
    lengths = sorted({len(token) for token in teacher_ids})
    ids: list[int] = []
    indptr = [0]
    for token in student.tokens:
        for length in lengths:
            if length > len(token):
                break
            ids.extend(teacher_ids.get(token[:length], ()))
        indptr.append(len(ids))
    splits, members = np.array(indptr, np.int32), np.array(ids, np.int32)
    splits.flags.writeable = members.flags.writeable = False
    return PrefixRelation(teacher.fingerprint, student.fingerprint, splits, members)
