"""Vocabulary maps: for every teacher id the student ids that stand for it, as an artifact (DESIGN.md 5.3).

`mined` is the paper's MinED (FedMKT, section 3.2 and appendix B): equal bytes, else the nearest token by Levenshtein
distance. `retokenized`: equal bytes, else the first token of the student's own tokenisation of the teacher token's
bytes. Special tokens go by role, never by spelling. What has no counterpart is unmapped; its mass is the tail's.
V vocabulary, N mapped pairs.
"""

import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedmkt.coverage import Coverage, CoverageAudit, audit_coverage
from fedmkt.edit_distance import nearest, token_text
from fedmkt.errors import Refusal
from fedmkt.first_piece import first_pieces, ids_by_bytes
from fedmkt.map_artifact import (
    COLUMNS,
    CorruptMap,
    Header,
    MalformedMap,
    MapOutOfRange,
    MapTooLarge,
    UnsupportedMapVersion,
    pack,
    unpack,
)
from fedmkt.prefixes import PrefixRelation, prefix_relation
from fedmkt.protocol import MapMethod
from fedmkt.vocabulary import Role, Vocabulary

__all__ = [
    "CorruptMap",
    "Coverage",
    "CoverageAudit",
    "MalformedMap",
    "MapOutOfRange",
    "MapTooLarge",
    "MapTooSlow",
    "PrefixRelation",
    "UnsupportedMapVersion",
    "VocabMap",
    "WrongPair",
    "build_vocab_map",
    "cached_vocab_map",
    "prefix_relation",
]

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]

# The largest real vocabularies (128,000 to 260,000 tokens) need 1 to 6 s; only made-up ones reach this.
MAP_LIMIT_S = 60.0


class MapTooSlow(Refusal):
    code: ClassVar[str] = "vocab_map.too_slow"
    title: ClassVar[str] = "The vocabulary map would take too long"


class WrongPair(Refusal):
    status: ClassVar[int] = 409
    code: ClassVar[str] = "vocab_map.wrong_pair"
    title: ClassVar[str] = "The vocabulary map belongs to other vocabularies"


@dataclass(frozen=True, eq=False)
class VocabMap:
    """Teacher id -> weighted student ids, CSR.

    indptr int32 [V_teacher + 1]; ids int32 [N], different within a row; weights float32 [N] in (0, 1], sum 1 in a row
    that is not empty, at most 4 a row; distances int32 [V_teacher]: -1 unmapped (empty row), 0 for equal bytes or
    roles, otherwise how far the row is from the token: `mined` code points of edit distance, `retokenized` bytes of the
    token beyond the first piece.
    """

    teacher_fingerprint: str
    student_fingerprint: str
    method: MapMethod
    indptr: NDArray[np.int32]
    ids: NDArray[np.int32]
    weights: NDArray[np.float32]
    distances: NDArray[np.int32]
    audit: CoverageAudit | None = None

    @cached_property
    def best_ids(self) -> NDArray[np.int32]:
        """The student id of the largest weight (the first of equal ones) of each teacher id, -1 unmapped. int32 [V]."""
        rows = np.repeat(np.arange(len(self.indptr) - 1), np.diff(self.indptr))
        order = np.lexsort((-self.weights, rows))[self.indptr[:-1][np.diff(self.indptr) > 0]]
        best = np.full(len(self.indptr) - 1, -1, np.int32)
        best[rows[order]] = self.ids[order]
        best.flags.writeable = False
        return best

    def check_pair(self, teacher: Vocabulary, student: Vocabulary) -> None:
        """Raise WrongPair or MapOutOfRange unless the map leads from `teacher` to `student`."""
        found = self.teacher_fingerprint, self.student_fingerprint
        expected = teacher.fingerprint, student.fingerprint
        if found != expected:
            raise WrongPair(
                f"the map leads from {found[0][:12]}... to {found[1][:12]}..., needed is one from "
                f"{expected[0][:12]}... to {expected[1][:12]}...; build it again for these two"
            )
        if len(self.indptr) != teacher.size + 1:
            raise MapOutOfRange(f"the map has {len(self.indptr) - 1} rows for a teacher of {teacher.size} ids")
        if self.ids.size and int(self.ids.max()) >= student.size:
            raise MapOutOfRange(f"the map holds student id {int(self.ids.max())}, the largest is {student.size - 1}")

    def to_bytes(self) -> bytes:
        """The artifact: safetensors with JSON metadata. The same bytes in every process."""
        header = Header(
            teacher_fingerprint=self.teacher_fingerprint,
            student_fingerprint=self.student_fingerprint,
            method=self.method,
            audit=self.audit,
        )
        return pack(header, {name: getattr(self, name) for name in COLUMNS})

    @classmethod
    def from_bytes(
        cls, data: bytes, *, teacher: Vocabulary | None = None, student: Vocabulary | None = None
    ) -> "VocabMap":
        """Read an artifact from another party. Nothing in it is trusted; raises the Refusals of `fedmkt.map_artifact`.

        With both vocabularies the map must also be theirs (`check_pair`), which every user of its ids has to know.
        """
        header, columns = unpack(data)
        found = cls(
            header.teacher_fingerprint, header.student_fingerprint, header.method, **columns, audit=header.audit
        )
        if teacher is not None and student is not None:
            found.check_pair(teacher, student)
        return found


# ------------------------------------------------------------------------------------------------ building


def build_vocab_map(
    teacher: Vocabulary,
    student: Vocabulary,
    method: MapMethod = "mined",
    *,
    frequencies: NDArray[np.floating] | None = None,
    progress: Progress | None = None,
    limit_s: float = MAP_LIMIT_S,
) -> VocabMap:
    """Map every teacher id to the student. Exact, and the same in every process.

    `frequencies` [V_teacher] >= 0, how often each teacher id occurs in some text, adds probability mass to the audit.
    `progress(done, total)` counts teacher ids.

    Vocabularies come from other parties, and tokens that are long and alike cost a search as much as their maker
    likes: after `limit_s` seconds, looked at several times a second, it raises MapTooSlow.
    """
    watch = _Watch(teacher.size, limit_s, progress)
    known = ids_by_bytes(student, watch.tick)
    best = _equal(teacher, student, known)
    exact = best >= 0
    distances = np.where(exact, 0, -1).astype(np.int32)
    open_ = [index for index, token in enumerate(teacher.tokens) if token and not exact[index]]
    tokens = [teacher.tokens[index] for index in open_]
    watch.settled = teacher.size - len(open_)
    find = _mined if method == "mined" else _retokenized
    best[open_], distances[open_] = find(student, tokens, known, watch.report)
    watch.report(len(open_), len(open_))
    audit = audit_coverage(teacher, exact, best >= 0, frequencies)
    return _one_to_one(teacher, student, method, best, distances, audit)


class _Watch:
    """Passes progress on, counted in teacher ids, and ends what takes longer than `limit_s`."""

    def __init__(self, total: int, limit_s: float, progress: Progress | None) -> None:
        self.settled = 0  # ids that needed no search
        self._total, self._limit_s, self._progress = total, limit_s, progress
        self._began, self._shown = time.monotonic(), -1

    def report(self, done: int, _: int) -> None:
        """`done` of the tokens that have to be searched."""
        done += self.settled
        if (elapsed := time.monotonic() - self._began) > self._limit_s:
            raise MapTooSlow(
                f"{done} of {self._total} tokens are mapped after {elapsed:.1f} s, a map may take {self._limit_s:g} "
                "s: the vocabularies have too many long or similar tokens; a real tokenizer's map takes seconds"
            )
        if self._progress and done != self._shown:
            self._shown = done
            self._progress(done, self._total)

    def tick(self) -> None:
        self.report(0, 0)


_Found = tuple[NDArray[np.int32], NDArray[np.int32]]


def _equal(teacher: Vocabulary, student: Vocabulary, known: dict[bytes, int]) -> NDArray[np.int32]:
    """The student id with the same bytes or the same role, -1 none: int32 [V_teacher].

    A vocabulary to itself is the identity, so that ids that only it tells apart (control tokens, repeated bytes) stay.
    """
    if teacher == student:
        ids = [index if token or index in teacher.roles else -1 for index, token in enumerate(teacher.tokens)]
    else:
        roles = _by_role(teacher, student)
        ids = [known.get(token, -1) if token else roles.get(index, -1) for index, token in enumerate(teacher.tokens)]
    return np.array(ids, np.int32)


def _by_role(teacher: Vocabulary, student: Vocabulary) -> dict[int, int]:
    """Special ids of the teacher to the student's id of the same role; its own bos or eos where it has several."""
    ids: dict[Role, int] = {}
    for index, role in sorted(student.roles.items(), reverse=True):
        ids[role] = index
    for own in (student.bos_id, student.eos_id):
        if own is not None and own in student.roles:
            ids[student.roles[own]] = own
    return {index: ids[role] for index, role in teacher.roles.items() if role in ids and role != "turn"}


def _mined(student: Vocabulary, tokens: list[bytes], known: dict[bytes, int], progress: Progress) -> _Found:
    """MinED: nearest by Levenshtein distance over the texts."""
    if not known:
        return np.full(len(tokens), -1, np.int32), np.full(len(tokens), -1, np.int32)
    ids = np.fromiter(known.values(), np.int32, len(known))
    winners, distances = nearest([*map(token_text, tokens)], [*map(token_text, known)], progress=progress)
    return ids[winners], distances


def _retokenized(student: Vocabulary, tokens: list[bytes], known: dict[bytes, int], progress: Progress) -> _Found:
    """The first piece of the student's own tokenisation; the distance is what the piece leaves over, in bytes."""
    pieces = first_pieces(student, tokens, known, lambda done: progress(done, len(tokens)))
    ids = [-1 if piece is None else piece.id for piece in pieces]
    over = [
        -1 if piece is None else max(0, len(token) - piece.covered) for token, piece in zip(tokens, pieces, strict=True)
    ]
    return np.array(ids, np.int32), np.array(over, np.int32)


def _one_to_one(
    teacher: Vocabulary,
    student: Vocabulary,
    method: MapMethod,
    best: NDArray[np.int32],
    distances: NDArray[np.int32],
    audit: CoverageAudit,
) -> VocabMap:
    mapped = best >= 0
    indptr = np.concatenate([np.zeros(1, np.int64), np.cumsum(mapped)]).astype(np.int32)
    ids = best[mapped]
    found = VocabMap(
        teacher.fingerprint, student.fingerprint, method, indptr, ids, np.ones(ids.size, np.float32), distances, audit
    )
    for name in COLUMNS:
        getattr(found, name).flags.writeable = False
    return found


# ------------------------------------------------------------------------------------------------ cache


def cached_vocab_map(
    folder: Path, teacher: Vocabulary, student: Vocabulary, method: MapMethod, *, progress: Progress | None = None
) -> VocabMap:
    """The map from `folder`, built and stored there at the first call. A file that is no such map is replaced.

    Files are named by the two fingerprints and the method, and appear whole or not at all, so processes may share them.
    """
    file = folder / f"{teacher.fingerprint}-{student.fingerprint}-{method}.safetensors"
    try:
        found = VocabMap.from_bytes(file.read_bytes(), teacher=teacher, student=student)
        if found.method == method:
            return found
        log.warning("vocab_map.cache_refused", extra={"file": file.name, "reason": f"its method is {found.method}"})
    except FileNotFoundError:
        pass
    except Refusal as refusal:
        log.warning("vocab_map.cache_refused", extra={"file": file.name, "reason": refusal.detail})
    built = build_vocab_map(teacher, student, method, progress=progress)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{secrets.token_hex(8)}.partial"
    try:
        temporary.write_bytes(built.to_bytes())
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
    return built
