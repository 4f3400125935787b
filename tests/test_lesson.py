"""A receiver's lesson: who teaches what, what liars and poisoners get, and that rows end up where they belong.

Vocabularies are small real tokenizers; knowledge is made by hand on the rows that the texts really give.
"""

import dataclasses
import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

import small_tokenizers as small
from fedmkt.alignment import project
from fedmkt.errors import Refusal
from fedmkt.knowledge import EmptyKnowledge, Knowledge, KnowledgeHeader, decode, encode
from fedmkt.lesson import Lesson, OwnKnowledgeDiffers, Teacher, TeacherSource, prepare_lesson
from fedmkt.protocol import DistillationConfig
from fedmkt.public_set import PublicSet
from fedmkt.tokenized_set import REMEMBERED, tokenize_set
from fedmkt.vocab_map import build_vocab_map, prefix_relation
from fedmkt.vocabulary import Vocabulary
from fedmkt.vocabulary_process import VocabularyProcess

MAX_TOKENS = 128
SAMPLES = (1, 2, 4, 5, 7, 8)
DEFAULT = DistillationConfig()
PAPER = DistillationConfig(profile="paper", rule="dual_min_ce", projection="mined")


def public() -> PublicSet:
    words = small.prose(3000).split()
    cuts = [(f"{words[i]} ", " ".join(words[i + 1 : i + 9])) for i in range(0, 100, 10)]
    lines = [json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in cuts]
    return PublicSet.from_jsonl("\n".join(lines).encode())


PUBLIC = public()
STUDENT = small.vocabulary("byte_level")
TEACHER = small.vocabulary("byte_level_small")


def header(vocabulary: Vocabulary, top_k: int) -> KnowledgeHeader:
    return KnowledgeHeader(
        federation_id="fed_0123456789abcdef",
        round_number=1,
        slice_index=0,
        public_set_digest=PUBLIC.digest,
        vocabulary_fingerprint=vocabulary.fingerprint,
        vocabulary_size=vocabulary.size,
        model_id="tests/by-hand",
        adapter_version=0,
        top_k=top_k,
        top_p=0.98,
        max_tokens=MAX_TOKENS,
    )


def knows(
    vocabulary: Vocabulary, gold: Sequence[float], samples: Sequence[int] = SAMPLES, top_k: int = 12, seed: int = 0
) -> Knowledge:
    """Rows that give each sample's realised tokens the probability `gold` and share 0.985 among top_k - 1 others."""
    rng = np.random.default_rng(seed)
    rows = tokenize_set(vocabulary, PUBLIC, samples, MAX_TOKENS)
    chance = np.repeat(np.array(gold), np.diff(rows.row_splits))
    ids = np.argsort(rng.random((rows.rows, vocabulary.size)), axis=1)[:, :top_k]
    ids[:, 0] = np.where((ids == rows.gold_ids[:, None]).any(axis=1), ids[:, 0], rows.gold_ids)
    is_gold = ids == rows.gold_ids[:, None]
    others = rng.dirichlet(np.full(top_k - 1, 50.0), rows.rows) * (0.985 - chance)[:, None]
    probs = np.zeros(ids.shape)
    probs[is_gold] = chance
    probs[~is_gold] = others.reshape(-1)
    order = np.argsort(ids, axis=1)
    return Knowledge(
        header=header(vocabulary, top_k),
        samples=rows.samples,
        row_splits=rows.row_splits,
        context_ends=rows.context_ends,
        gold_logprobs=np.log(chance).astype(np.float32),
        entry_splits=np.arange(0, top_k * rows.rows + 1, top_k, dtype=np.int32),
        token_ids=np.take_along_axis(ids, order, axis=1).reshape(-1).astype(np.int32),
        logprobs=np.log(np.take_along_axis(probs, order, axis=1)).reshape(-1).astype(np.float32),
    )


def teacher(name: str, knowledge: Knowledge, vocabulary: Vocabulary = TEACHER, **fields: Any) -> Teacher:
    sent = decode(encode(knowledge))
    vocab_map = build_vocab_map(vocabulary, STUDENT, "retokenized")
    return dataclasses.replace(Teacher(name, sent, vocabulary, vocab_map), **fields)


def mined(name: str, knowledge: Knowledge) -> Teacher:
    return teacher(name, knowledge, vocab_map=build_vocab_map(TEACHER, STUDENT, "mined"))


def lesson(
    teachers: Sequence[Teacher | TeacherSource], own: Knowledge | None = None, config: DistillationConfig = DEFAULT
) -> Lesson:
    return prepare_lesson(PUBLIC, own or knows(STUDENT, [0.3] * 6), STUDENT, teachers, config, MAX_TOKENS)


def rows_of(found: Lesson, position: int) -> list[dict[int, float]]:
    """The targets of one sample's rows: student id -> probability."""
    first, stop = found.targets.row_splits[position : position + 2]
    bounds = found.targets.splits[first : stop + 1].tolist()
    ids, probs = found.targets.ids.tolist(), found.targets.probs.tolist()
    return [dict(zip(ids[a:b], probs[a:b], strict=True)) for a, b in itertools.pairwise(bounds)]


# ------------------------------------------------------------------------------------------------ who teaches


def test_each_sample_is_taught_by_whoever_knows_it_best() -> None:
    ants = teacher("ants", knows(TEACHER, [0.9, 0.1, 0.9, 0.1, 0.1, 0.8]))
    bees = teacher("bees", knows(TEACHER, [0.1, 0.9, 0.8, 0.1, 0.1, 0.9]))
    found = lesson([ants, bees])
    assert found.taught_by == ("ants", "bees", "ants", "self", "self", "bees")
    assert found.samples.tolist() == list(SAMPLES)
    report = found.report
    assert report.taught == {"ants": 2, "bees": 2, "self": 2, "none": 0}
    assert report.offered == {"ants": 6, "bees": 6}
    assert report.better == {"ants": 3, "bees": 3}
    assert report.refused == {"ants": 0, "bees": 0}
    assert report.rows == found.targets.supervised.size == tokenize_set(STUDENT, PUBLIC, SAMPLES, MAX_TOKENS).rows
    assert report.supervised_rows == found.targets.supervised.sum() < report.rows
    assert 0.9 < report.transferred_gold <= 1
    assert found.refused_teachers == {}


def test_a_taught_sample_gets_the_teachers_rows_and_the_others_the_receivers_own() -> None:
    """Against the projection of that one sample alone, and against the receiver's own distribution."""
    own = knows(STUDENT, [0.3] * 6)
    expert = teacher("expert", knows(TEACHER, [0.1, 0.9, 0.1, 0.1, 0.1, 0.1]))
    found = lesson([expert], own)
    assert found.taught_by == ("self", "expert", "self", "self", "self", "self")
    one = np.array([1])
    alone = project(
        expert.knowledge.take(one),
        tokenize_set(TEACHER, PUBLIC, [SAMPLES[1]], MAX_TOKENS),
        tokenize_set(STUDENT, PUBLIC, [SAMPLES[1]], MAX_TOKENS),
        expert.vocab_map,
        relation=prefix_relation(TEACHER, STUDENT),
        student_knowledge=own,
    )
    rows = slice(*found.targets.row_splits[1:3])
    assert found.targets.supervised[rows].tolist() == alone.supervised.tolist()
    assert found.targets.residual[rows] == pytest.approx(alone.residual)
    assert [p for row in rows_of(found, 1) for p in row.values()] == pytest.approx(alone.probs.tolist())
    for position in (0, 2, 5):
        mine = own.take(np.array([position]))
        got = rows_of(found, position)
        assert [token for row in got for token in row] == mine.token_ids.tolist()
        assert [p for row in got for p in row.values()] == pytest.approx(np.exp(mine.logprobs).tolist())
        own_rows = slice(*found.targets.row_splits[position : position + 2])
        assert found.targets.residual[own_rows] == pytest.approx(np.full(len(got), 0.015), abs=1e-6)
        assert found.targets.supervised[own_rows].all()


def test_the_realised_token_of_a_taught_row_has_the_teachers_confidence() -> None:
    """Where one student token is one teacher token, it keeps the 0.9 that the teacher gave it."""
    found = lesson([teacher("expert", knows(TEACHER, [0.9] * 6))])
    text = tokenize_set(STUDENT, PUBLIC, SAMPLES, MAX_TOKENS)
    rows = [row for position in range(6) for row in rows_of(found, position)]
    gold = [row.get(token, 0.0) for row, token in zip(rows, text.gold_ids.tolist(), strict=True) if row]
    assert np.isclose(gold, 0.9, atol=0.02).mean() > 0.5
    assert max(gold) < 0.92


def test_under_the_papers_rule_a_sample_that_nobody_knows_better_has_no_soft_targets() -> None:
    expert = teacher("expert", knows(TEACHER, [0.1, 0.9, 0.1, 0.1, 0.1, 0.1]))
    found = lesson([expert], config=DistillationConfig(rule="dual_min_ce"))
    assert found.taught_by == ("none", "expert", "none", "none", "none", "none")
    taught = slice(*found.targets.row_splits[1:3])
    assert not found.targets.supervised[: taught.start].any()
    assert not found.targets.supervised[taught.stop :].any()
    assert found.targets.residual[taught.stop :].max() == 0
    assert rows_of(found, 3) == [{}] * len(rows_of(found, 3))


@pytest.mark.parametrize(("better_by", "teaches"), [(0.03, False), (0.07, True)])
def test_a_teacher_has_to_be_better_by_the_configured_margin(better_by: float, teaches: bool) -> None:
    """0.05 nats per byte. Under the paper's rule any advantage per token is enough."""
    theirs, mine = (tokenize_set(vocabulary, PUBLIC, SAMPLES, MAX_TOKENS) for vocabulary in (TEACHER, STUDENT))
    nats_per_byte = np.diff(theirs.row_splits) * -np.log(0.4) / theirs.response_bytes + better_by
    own = knows(STUDENT, np.exp(-nats_per_byte * mine.response_bytes / np.diff(mine.row_splits)).tolist())
    knowledge = knows(TEACHER, [0.4] * 6)
    assert set(lesson([teacher("x", knowledge)], own).taught_by) == {"x" if teaches else "self"}
    assert set(lesson([mined("x", knowledge)], own, PAPER).taught_by) == {"x"}


def test_without_teachers_the_receiver_learns_from_itself() -> None:
    found = lesson([])
    assert set(found.taught_by) == {"self"}
    assert found.report.taught == {"self": 6, "none": 0}
    assert found.report.transferred_gold == 0


def test_a_teacher_that_sent_some_samples_teaches_only_those() -> None:
    part = teacher("part", knows(TEACHER, [0.9, 0.9], samples=[2, 7]))
    found = lesson([part])
    assert found.taught_by == ("self", "part", "self", "self", "part", "self")
    assert found.report.offered == {"part": 2}


def test_a_teacher_with_the_receivers_own_vocabulary_is_copied_token_for_token() -> None:
    peer = teacher("peer", knows(STUDENT, [0.9] * 6, seed=5), STUDENT)
    found = lesson([peer])
    assert set(found.taught_by) == {"peer"}
    assert found.targets.ids.tolist() == peer.knowledge.token_ids.tolist()
    assert found.targets.probs == pytest.approx(np.exp(peer.knowledge.logprobs))
    assert found.report.transferred_gold == 1


def test_the_llm_teaches_a_site_with_the_same_function() -> None:
    """The other direction: the finer vocabulary receives."""
    own = knows(TEACHER, [0.3] * 6)
    llm = Teacher("llm", knows(STUDENT, [0.9] * 6), STUDENT, build_vocab_map(STUDENT, TEACHER, "retokenized"))
    found = prepare_lesson(PUBLIC, own, TEACHER, [llm], DEFAULT, MAX_TOKENS)
    assert set(found.taught_by) == {"llm"}
    assert found.targets.supervised.size == own.rows


# ------------------------------------------------------------------------------------------------ liars and poisoners


def test_a_teacher_that_lies_about_its_log_probabilities_teaches_nothing() -> None:
    """The realised tokens are kept at 0.02 and stated as high as each row's largest, the most that a row may state."""
    honest = knows(TEACHER, [0.02] * 6)
    largest = np.maximum.reduceat(honest.logprobs, honest.entry_splits[:-1])
    bold = dataclasses.replace(honest, gold_logprobs=largest)
    found = lesson([teacher("honest", honest), teacher("bold", bold)], knows(STUDENT, [0.03] * 6))
    assert found.report.refused == {"honest": 0, "bold": 6}
    assert found.report.offered == {"honest": 6, "bold": 0}
    assert "bold" not in found.taught_by


def test_stating_a_little_more_than_what_is_kept_gains_nothing() -> None:
    """0.05 nats a row are within the tolerance, and would beat a receiver that is 0.02 nats a row better."""
    honest = knows(TEACHER, [0.05] * 6)
    liar = dataclasses.replace(honest, gold_logprobs=honest.gold_logprobs + np.float32(0.05))
    theirs, mine = (tokenize_set(vocabulary, PUBLIC, SAMPLES, MAX_TOKENS) for vocabulary in (TEACHER, STUDENT))
    nats_per_byte = np.diff(theirs.row_splits) * (np.log(0.05) + 0.02) / theirs.response_bytes
    own = knows(STUDENT, np.exp(nats_per_byte * mine.response_bytes / np.diff(mine.row_splits)).tolist())
    unrounded = dataclasses.replace(teacher("liar", liar), knowledge=liar)
    found = lesson([unrounded], own, DistillationConfig(margin_nats_per_byte=0))
    assert found.report.offered == {"liar": 6}
    assert found.report.better == {"liar": 0}


def test_a_teacher_that_puts_its_mass_on_wrong_tokens_loses_to_everybody() -> None:
    """It keeps its rows consistent, so it is not refused; it just has a bad loss."""
    poison = teacher("poison", knows(TEACHER, [0.001] * 6))
    found = lesson([poison, teacher("good", knows(TEACHER, [0.8] * 6))])
    assert set(found.taught_by) == {"good"}
    assert found.report.refused == {"poison": 0, "good": 0}
    assert found.report.better == {"poison": 0, "good": 6}


def test_a_poisoner_that_hides_the_realised_token_in_the_tail_wins_nothing() -> None:
    """All kept mass on wrong tokens, the realised token cut and stated as high as the rows let it be."""
    honest = knows(TEACHER, [0.001] * 6)
    rows = tokenize_set(TEACHER, PUBLIC, SAMPLES, MAX_TOKENS)
    owners = np.repeat(np.arange(honest.rows), 12)
    wrong = honest.token_ids != rows.gold_ids[owners]
    splits = np.concatenate([[0], np.cumsum(np.bincount(owners[wrong]))]).astype(np.int32)
    for stated, refused in ((0.015, 0), (0.3, 6)):
        hidden = dataclasses.replace(
            honest,
            entry_splits=splits,
            token_ids=honest.token_ids[wrong],
            logprobs=np.full(int(wrong.sum()), np.log(0.98 / 11), np.float32),
            gold_logprobs=np.full(honest.rows, np.log(min(stated, 0.98 / 11)), np.float32),
        )
        found = lesson([teacher("poison", hidden)])
        assert set(found.taught_by) == {"self"}
        assert found.report.refused == {"poison": refused}


# ------------------------------------------------------------------------------------------------ refused as a whole


GOOD = knows(TEACHER, [0.9] * 6)


def _with_header(**fields: Any) -> Teacher:
    return teacher("odd", dataclasses.replace(GOOD, header=dataclasses.replace(GOOD.header, **fields)))


@pytest.mark.parametrize(
    ("odd", "reason"),
    [
        (lambda: _with_header(round_number=2), "round_number is 2, expected 1"),
        (lambda: _with_header(slice_index=3), "slice_index is 3, expected 0"),
        (lambda: _with_header(federation_id="fed_other"), "federation_id"),
        (lambda: _with_header(public_set_digest="0" * 64), "public_set_digest"),
        (lambda: _with_header(vocabulary_fingerprint="0" * 64), "vocabulary_fingerprint"),
        (lambda: _with_header(max_tokens=99), "max_tokens is 99, expected 128"),
        (lambda: teacher("odd", GOOD, STUDENT), "vocabulary_fingerprint"),
        (lambda: teacher("odd", GOOD, vocab_map=build_vocab_map(STUDENT, TEACHER)), "the map leads from"),
        (lambda: teacher("odd", GOOD, vocab_map=build_vocab_map(TEACHER, STUDENT, "mined")), "needs 'retokenized'"),
    ],
)
def test_a_teacher_that_does_not_fit_is_left_out_and_named(odd: Callable[[], Teacher], reason: str) -> None:
    found = lesson([odd(), teacher("good", GOOD)])
    assert set(found.taught_by) == {"good"}
    assert list(found.refused_teachers) == ["odd"]
    assert reason in found.refused_teachers["odd"]
    assert "odd" not in found.report.offered


def test_a_source_that_is_refused_while_loading_is_left_out_and_named() -> None:
    def broken() -> Teacher:
        raise EmptyKnowledge("the blob holds no sample")

    found = lesson([TeacherSource("broken", broken), teacher("good", GOOD)])
    assert found.refused_teachers == {"broken": "the blob holds no sample"}
    assert set(found.taught_by) == {"good"}


def test_a_teacher_whose_vocabulary_ends_the_process_that_cuts_with_it_is_left_out_and_named() -> None:
    with VocabularyProcess() as process:
        odd = teacher("odd", GOOD, process.read(TEACHER.to_bytes()))
        assert process._child is not None
        process._child.kill()
        REMEMBERED.clear()  # the texts were cut to make the knowledge
        found = lesson([odd, teacher("good", GOOD)])
    assert "the process that worked on it was ended" in found.refused_teachers["odd"]
    assert set(found.taught_by) == {"good"}


def test_any_other_failure_of_a_source_is_not_hidden() -> None:
    def broken() -> Teacher:
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        lesson([TeacherSource("broken", broken)])


def test_sources_are_opened_one_at_a_time_and_again_only_if_they_teach() -> None:
    opened: list[str] = []

    def source(name: str, gold: float) -> TeacherSource:
        def load() -> Teacher:
            opened.append(name)
            return teacher(name, knows(TEACHER, [gold] * 6))

        return TeacherSource(name, load)

    told: list[tuple[int, int]] = []
    lazy = prepare_lesson(
        PUBLIC,
        knows(STUDENT, [0.3] * 6),
        STUDENT,
        [source("weak", 0.1), source("strong", 0.9), source("fair", 0.5)],
        DEFAULT,
        MAX_TOKENS,
        progress=lambda done, total: told.append((done, total)),
    )
    assert opened == ["weak", "strong", "fair", "strong"]
    assert told == [(done, 6) for done in range(1, 7)]
    eager = lesson([teacher(name, knows(TEACHER, [gold] * 6)) for name, gold in (("weak", 0.1), ("strong", 0.9))])
    assert lazy.targets.probs.tolist() == eager.targets.probs.tolist()


def test_own_knowledge_of_other_texts_is_an_error() -> None:
    own = knows(STUDENT, [0.3] * 6)
    moved = dataclasses.replace(own, context_ends=own.context_ends + np.int32(1))
    with pytest.raises(OwnKnowledgeDiffers, match=r"public sample 1 \(6 such samples\): its rows are not those"):
        lesson([], moved)
    with pytest.raises(Refusal, match="vocabulary_fingerprint"):
        lesson([], knows(TEACHER, [0.3] * 6))


@pytest.mark.parametrize("names", [("a", "a"), ("self",), ("none", "b")])
def test_teachers_need_names_of_their_own(names: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="names of their own"):
        lesson([teacher(name, GOOD) for name in names])


# ------------------------------------------------------------------------------------------------ the paper's profile


def test_the_papers_profile_compares_nats_per_token_which_flatters_short_tokens() -> None:
    """The teacher's tokens are shorter: at 0.35 against 0.3 it is better per token and worse per byte."""
    teacher_rows = tokenize_set(TEACHER, PUBLIC, SAMPLES, MAX_TOKENS)
    student_rows = tokenize_set(STUDENT, PUBLIC, SAMPLES, MAX_TOKENS)
    assert teacher_rows.rows * -np.log(0.35) > student_rows.rows * -np.log(0.3)
    knowledge = knows(TEACHER, [0.35] * 6)
    assert set(lesson([mined("fine", knowledge)], config=PAPER).taught_by) == {"fine"}
    assert set(lesson([teacher("fine", knowledge)]).taught_by) == {"self"}


def test_the_papers_profile_supervises_every_row_of_a_taught_sample_and_keeps_no_residual() -> None:
    found = lesson([mined("site", knows(TEACHER, [0.9, 0.1, 0.1, 0.1, 0.1, 0.1]))], config=PAPER)
    assert found.taught_by == ("site", "none", "none", "none", "none", "none")
    first = found.targets.row_splits[1]
    assert found.targets.supervised[:first].all()
    assert not found.targets.supervised[first:].any()
    assert found.targets.residual.max() == 0
    assert [sum(row.values()) for row in rows_of(found, 0)] == pytest.approx([1.0] * first)


@pytest.mark.parametrize(
    ("config", "method"),
    [
        (DEFAULT, "retokenized"),
        (DistillationConfig(projection="retokenized"), "retokenized"),
        (DistillationConfig(projection="mined"), "mined"),
        (PAPER, "mined"),
    ],
)
def test_the_configuration_says_which_map_is_needed(config: DistillationConfig, method: str) -> None:
    assert config.map_method == method


@pytest.mark.parametrize("projection", ["retokenized", "mined"])
def test_maps_alone_project_too(projection: Any) -> None:
    expert = teacher("expert", GOOD, vocab_map=build_vocab_map(TEACHER, STUDENT, projection))
    found = lesson([expert], config=DistillationConfig(projection=projection))
    assert set(found.taught_by) == {"expert"}
    assert found.report.supervised_rows > 0
