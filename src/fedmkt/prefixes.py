"""Which student tokens begin with which teacher tokens: what a teacher token says of the next bytes (DESIGN.md 5.3)."""

from bisect import bisect_left
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fedmkt.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True, eq=False)
class PrefixRelation:
    """The student's tokens in byte order, in which those that begin with a teacher token stand side by side.

    places int32 [V_student]: a student id's place in that order, equal tokens by id; special tokens and holes have no
    bytes and stand behind all others. starts, stops int32 [V_teacher]: the first place whose token begins with the
    teacher's token, and the first one after those; equal where there is none, and for teacher ids without bytes.
    """

    teacher_fingerprint: str
    student_fingerprint: str
    places: NDArray[np.int32]
    starts: NDArray[np.int32]
    stops: NDArray[np.int32]


@lru_cache(maxsize=8)
def prefix_relation(teacher: Vocabulary, student: Vocabulary) -> PrefixRelation:
    """The relation of two vocabularies; kept in memory for the last few pairs (by fingerprint).

    Time: one sort of the student's tokens and two binary searches for each of the teacher's. Space: a place for each
    token, however many are equal or begin alike.
    """
    order = sorted(range(student.size), key=lambda index: (not student.tokens[index], student.tokens[index]))
    ordered = [student.tokens[index] for index in order if student.tokens[index]]
    places = np.empty(student.size, np.int32)
    places[order] = np.arange(student.size)
    beyond = b"\xff" * (1 + max(map(len, ordered), default=0))  # after it no token that begins with what stands before
    starts = [bisect_left(ordered, token) if token else 0 for token in teacher.tokens]
    stops = [bisect_left(ordered, token + beyond) if token else 0 for token in teacher.tokens]
    columns = (places, np.array(starts, np.int32), np.array(stops, np.int32))
    for column in columns:
        column.flags.writeable = False
    return PrefixRelation(teacher.fingerprint, student.fingerprint, *columns)
