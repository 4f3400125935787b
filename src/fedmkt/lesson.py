"""A lesson: what a receiver learns from its teachers in one round. The LLM and the sites prepare theirs alike.

Two passes over the teachers, so that memory does not grow with their number: first everybody's cross-entropies, then
the projection of the samples each one won. S samples of the receiver, R rows, N teachers.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedmkt.alignment import SparseTargets, gold_transfer, project
from fedmkt.errors import Refusal
from fedmkt.knowledge import Knowledge, check_fields
from fedmkt.paper_alignment import project_paper
from fedmkt.protocol import DistillationConfig, SelectionReport
from fedmkt.public_set import PublicSet
from fedmkt.selection import NOBODY, SELF, CrossEntropy, Unit, recompute_cross_entropy, select
from fedmkt.tokenized_set import TokenizedSet, take_rows, tokenize_set
from fedmkt.vocab_map import VocabMap, prefix_relation
from fedmkt.vocabulary import Vocabulary

RESERVED_NAMES = ("self", "none")  # in the order of SELF and NOBODY, -2 and -1

Positions = NDArray[np.intp]
Progress = Callable[[int, int], None]


class OwnKnowledgeDiffers(Refusal):
    code: ClassVar[str] = "lesson.own_knowledge"
    title: ClassVar[str] = "The receiver's own knowledge does not belong to its vocabulary and texts"
    remedy: ClassVar[str] = "The site's model or tokenizer changed within a round: leave both alone until it has ended."


class WrongMapMethod(Refusal):
    code: ClassVar[str] = "lesson.wrong_map_method"
    title: ClassVar[str] = "The vocabulary map was built by another method than the configuration needs"
    remedy: ClassVar[str] = "Coordinator and LLM server need one version; maps are built again with the next round."


@dataclass(frozen=True, slots=True)
class Teacher:
    """What one sender sent, and how its tokens become the receiver's. The caller has run `knowledge.check` on it."""

    name: str
    knowledge: Knowledge
    vocabulary: Vocabulary
    vocab_map: VocabMap


@dataclass(frozen=True, slots=True)
class TeacherSource:
    """A teacher that is loaded when it is needed, up to twice, and let go afterwards."""

    name: str
    load: Callable[[], Teacher]


@dataclass(frozen=True, slots=True)
class Lesson:
    """samples int32 [S], indices into the public set; taught_by [S]: a teacher's name, "self" or "none"; targets over
    all rows of these samples, in order; refused_teachers: name -> why nothing of what it sent was looked at.
    """

    samples: NDArray[np.int32]
    taught_by: tuple[str, ...]
    targets: SparseTargets
    report: SelectionReport
    refused_teachers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Part:
    """Targets of the samples at `positions` (ascending, into the receiver's samples)."""

    positions: Positions
    targets: SparseTargets
    gold_transfer: float = 0.0

    @property
    def supervised_rows(self) -> int:
        return int(np.count_nonzero(self.targets.supervised))


def prepare_lesson(
    public_set: PublicSet,
    own: Knowledge,
    own_vocabulary: Vocabulary,
    teachers: Sequence[Teacher | TeacherSource],
    config: DistillationConfig,
    max_tokens: int,
    *,
    progress: Progress | None = None,
) -> Lesson:
    """Verify what the teachers sent, choose who teaches each sample, and put it on the receiver's own rows.

    own: the receiver's fresh knowledge on the samples to learn, of any width, never sent: its loss is what a teacher
    has to beat, its distribution what `best_or_self` falls back to and what prefix buckets spread by. The default
    profile compares nats per byte with the configured margin, the paper's nats per token without one. A teacher whose
    knowledge, vocabulary or map is refused as a whole, or whose source raises a Refusal, is left out and named in
    `refused_teachers`; a sample that fails verification is only not offered. `progress(done, total)` counts teachers,
    twice each. Raises OwnKnowledgeDiffers; ValueError for names used twice or reserved.
    """
    _check_names(teachers)
    receiver = _Receiver(public_set, own, own_vocabulary, config, max_tokens)
    own_loss = receiver.own_loss()
    heard: dict[str, CrossEntropy] = {}
    refused: dict[str, str] = {}
    for done, source in enumerate(teachers, start=1):
        try:
            heard[source.name] = receiver.hear(_opened(source))
        except Refusal as refusal:
            refused[source.name] = refusal.detail
        _tell(progress, done, 2 * len(teachers))
    losses = np.array([entropy.values for entropy in heard.values()]).reshape(len(heard), own_loss.size)
    margin = 0.0 if config.profile == "paper" else config.margin_nats_per_byte
    chosen = select(config.rule, own_loss, losses, margin=margin)
    unaided = [receiver.from_self(np.flatnonzero(chosen == SELF)), receiver.untaught(np.flatnonzero(chosen == NOBODY))]
    winners = {name: np.flatnonzero(chosen == index) for index, name in enumerate(heard)}
    taught: list[_Part] = []
    for done, source in enumerate(teachers, start=1):
        if source.name in heard and winners[source.name].size:
            taught.append(receiver.learn(_opened(source), winners[source.name]))
        _tell(progress, len(teachers) + done, 2 * len(teachers))
    targets = _joined([*unaided, *taught])
    taught_by = np.array([*heard, *RESERVED_NAMES])[chosen]  # SELF and NOBODY count from the end
    return Lesson(
        samples=own.samples,
        taught_by=tuple(taught_by.tolist()),
        targets=targets,
        report=_report(own_loss, heard, taught_by, taught, targets),
        refused_teachers=refused,
    )


def _check_names(teachers: Sequence[Teacher | TeacherSource]) -> None:
    names = [teacher.name for teacher in teachers]
    if len(set(names)) != len(names) or set(names) & set(RESERVED_NAMES):
        raise ValueError(f"teachers need names of their own, not {RESERVED_NAMES}: {names}")


def _opened(source: Teacher | TeacherSource) -> Teacher:
    return source if isinstance(source, Teacher) else source.load()


def _tell(progress: Progress | None, done: int, total: int) -> None:
    if progress is not None:
        progress(done, total)


# ------------------------------------------------------------------------------------------------ one receiver


class _Receiver:
    """The receiver's side of one lesson: its texts, rows and own knowledge, and what is shared between teachers."""

    def __init__(
        self, public_set: PublicSet, own: Knowledge, vocabulary: Vocabulary, config: DistillationConfig, max_tokens: int
    ) -> None:
        self.public_set, self.own, self.vocabulary = public_set, own, vocabulary
        self.config, self.max_tokens = config, max_tokens
        self.unit: Unit = "nats_per_token" if config.profile == "paper" else "nats_per_byte"
        self._rows: dict[str, TokenizedSet] = {}
        self._check_header(own, vocabulary)
        self.rows = self._rows_of(vocabulary)

    def own_loss(self) -> NDArray[np.float64]:
        """The receiver's own cross-entropy, float64 [S]; inf only where a response has no bytes."""
        loss = recompute_cross_entropy(self.own, self.rows, unit=self.unit)
        if loss.refused:
            sample, reason = next(iter(loss.refused.items()))
            raise OwnKnowledgeDiffers(f"public sample {sample} ({len(loss.refused)} such samples): {reason}")
        return loss.values

    def hear(self, teacher: Teacher) -> CrossEntropy:
        self._check_header(teacher.knowledge, teacher.vocabulary)
        self._check_map(teacher)
        return recompute_cross_entropy(teacher.knowledge, self._rows_of(teacher.vocabulary), unit=self.unit)

    def learn(self, teacher: Teacher, positions: Positions) -> _Part:
        """The teacher's knowledge on the samples that it won, on the receiver's rows."""
        sent_positions = np.searchsorted(teacher.knowledge.samples, self.own.samples[positions])
        if self._same_tokens(teacher.vocabulary) and self.config.profile != "paper":
            return _Part(positions, _as_targets(teacher.knowledge, sent_positions), gold_transfer=1.0)
        student_rows = self.rows.take(positions)
        teacher_rows = self._rows_of(teacher.vocabulary).take(positions)
        sent = teacher.knowledge.take(sent_positions)
        if self.config.profile == "paper":
            targets = project_paper(
                sent, teacher_rows, student_rows, teacher.vocab_map, teacher.vocabulary, self.vocabulary
            )
        else:
            buckets = self.config.projection == "prefix_buckets"
            targets = project(
                sent,
                teacher_rows,
                student_rows,
                teacher.vocab_map,
                relation=prefix_relation(teacher.vocabulary, self.vocabulary) if buckets else None,
                student_knowledge=self.own if buckets else None,
            )
        kept = gold_transfer(
            teacher_rows,
            student_rows,
            teacher.vocab_map,
            chain_rule=self.config.profile != "paper",
            supervised=targets.supervised,
        )
        return _Part(positions, targets, kept)

    def from_self(self, positions: Positions) -> _Part:
        """The receiver's own fresh distribution on these samples, every row of it."""
        return _Part(positions, _as_targets(self.own, positions))

    def untaught(self, positions: Positions) -> _Part:
        """No soft targets on these samples."""
        rows = self.rows.take(positions)
        targets = SparseTargets(
            row_splits=rows.row_splits,
            splits=np.zeros(rows.rows + 1, np.int32),
            ids=np.zeros(0, np.int32),
            probs=np.zeros(0, np.float32),
            residual=np.zeros(rows.rows, np.float32),
            supervised=np.zeros(rows.rows, np.bool_),
        )
        return _Part(positions, targets)

    def _rows_of(self, vocabulary: Vocabulary) -> TokenizedSet:
        """The rows that any party with this vocabulary has on the receiver's samples."""
        if vocabulary.fingerprint not in self._rows:
            self._rows[vocabulary.fingerprint] = tokenize_set(
                vocabulary, self.public_set, self.own.samples, self.max_tokens
            )
        return self._rows[vocabulary.fingerprint]

    def _same_tokens(self, vocabulary: Vocabulary) -> bool:
        return vocabulary.fingerprint == self.vocabulary.fingerprint

    def _check_header(self, knowledge: Knowledge, vocabulary: Vocabulary) -> None:
        header = self.own.header
        check_fields(
            knowledge.header,
            federation_id=header.federation_id,
            round_number=header.round_number,
            slice_index=header.slice_index,
            public_set_digest=self.public_set.digest,
            vocabulary_fingerprint=vocabulary.fingerprint,
            vocabulary_size=vocabulary.size,
            max_tokens=self.max_tokens,
        )

    def _check_map(self, teacher: Teacher) -> None:
        teacher.vocab_map.check_pair(teacher.vocabulary, self.vocabulary)
        found, needed = teacher.vocab_map.method, self.config.map_method
        if found != needed and not self._same_tokens(teacher.vocabulary):
            raise WrongMapMethod(
                f"the map was built by {found!r}, projection {self.config.projection!r} in the profile "
                f"{self.config.profile!r} needs {needed!r}"
            )


# ------------------------------------------------------------------------------------------------ putting it together


def _splits(counts: NDArray[np.integer]) -> NDArray[np.int32]:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)


def _as_targets(knowledge: Knowledge, positions: Positions) -> SparseTargets:
    """Knowledge in the receiver's own tokens as it is, on the samples at `positions`; every row is supervised."""
    rows, _ = take_rows(knowledge.row_splits, positions)
    entries, owners = take_rows(knowledge.entry_splits, rows)
    ids, probs = knowledge.token_ids[entries], np.exp(knowledge.logprobs[entries])
    residual = np.maximum(1.0 - np.bincount(owners, probs, rows.size), 0.0)
    if not probs.all():  # the rarest underflowed
        some = probs > 0
        ids, owners, probs = ids[some], owners[some], probs[some]
    return SparseTargets(
        row_splits=_splits(np.diff(knowledge.row_splits)[positions]),
        splits=_splits(np.bincount(owners, minlength=rows.size)),
        ids=ids,
        probs=probs,
        residual=residual.astype(np.float32),
        supervised=np.ones(rows.size, np.bool_),
    )


def _joined(parts: Sequence[_Part]) -> SparseTargets:
    """The parts' samples in the receiver's order."""
    order = np.argsort(np.concatenate([part.positions for part in parts]))
    targets = [part.targets for part in parts]
    row_counts = np.concatenate([np.diff(part.row_splits) for part in targets])
    entry_counts = np.concatenate([np.diff(part.splits) for part in targets])
    rows, _ = take_rows(_splits(row_counts), order)
    entries, _ = take_rows(_splits(entry_counts), rows)
    return SparseTargets(
        row_splits=_splits(row_counts[order]),
        splits=_splits(entry_counts[rows]),
        ids=np.concatenate([part.ids for part in targets])[entries],
        probs=np.concatenate([part.probs for part in targets])[entries],
        residual=np.concatenate([part.residual for part in targets])[rows],
        supervised=np.concatenate([part.supervised for part in targets])[rows],
    )


def _report(
    own_loss: NDArray[np.float64],
    heard: Mapping[str, CrossEntropy],
    taught_by: NDArray[np.str_],
    taught: Sequence[_Part],
    targets: SparseTargets,
) -> SelectionReport:
    """Counts per teacher; gold transfer over the rows that others supervise, one's own need none."""
    supervised = sum(part.supervised_rows for part in taught)
    kept = sum(part.gold_transfer * part.supervised_rows for part in taught)
    return SelectionReport(
        taught={name: int(np.count_nonzero(taught_by == name)) for name in (*heard, *RESERVED_NAMES)},
        offered={name: int(np.isfinite(entropy.values).sum()) for name, entropy in heard.items()},
        better={name: int((entropy.values < own_loss).sum()) for name, entropy in heard.items()},
        refused={name: len(entropy.refused) for name, entropy in heard.items()},
        supervised_rows=int(np.count_nonzero(targets.supervised)),
        rows=int(targets.supervised.size),
        transferred_gold=kept / supervised if supervised else 0.0,
    )
