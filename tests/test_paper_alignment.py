"""The paper's alignment: dynamic programming over token strings, unique matches, one-hot rows otherwise."""

import itertools
import json
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rapidfuzz.distance import Levenshtein

import small_tokenizers as small
from fedmkt.alignment import RowsDiffer, tokenize_set
from fedmkt.paper_alignment import _cheapest_path, _distances, match_tokens, project_paper
from fedmkt.public_set import PublicSample, PublicSet
from fedmkt.vocabulary import Vocabulary
from test_alignment import as_rows, close, knowledge, random_knowledge, table


def test_tokens_with_one_partner_match_and_split_words_do_not() -> None:
    teacher = ["token", "ization", " is", " hard"]
    student = ["tokenization", " is", " hard"]
    assert match_tokens(teacher, student).tolist() == [-1, 2, 3]
    assert match_tokens(student, teacher).tolist() == [-1, -1, 1, 2]


@pytest.mark.parametrize(
    ("teacher", "student", "expected"),
    [
        ([], ["a"], [-1]),
        (["a"], [], []),
        (["a"], ["a"], [0]),
        (["a", "b"], ["a", "b"], [0, 1]),
        (["a"], ["a", "a"], [-1, -1]),
        (["cat"], ["dog"], [0]),  # a path always exists: whether the pair may be used is the map's question
        (["", "ab", "c"], ["", "a", "bc"], [0, 1, 2]),
    ],
)
def test_small_matches_worked_by_hand(teacher: list[str], student: list[str], expected: list[int]) -> None:
    assert match_tokens(teacher, student).tolist() == expected


words = st.lists(st.text("ab", max_size=3), min_size=1, max_size=6)


@given(words, words)
def test_the_path_is_the_cheapest_one(teacher: list[str], student: list[str]) -> None:
    @cache
    def cheapest(i: int, j: int) -> float:
        if i < 0 or j < 0:
            return 0 if i == j == -1 else float("inf")
        before = min(cheapest(i - 1, j - 1), cheapest(i - 1, j), cheapest(i, j - 1))
        return before + Levenshtein.distance(teacher[i], student[j])

    path = [tuple(step) for step in _cheapest_path(_distances(teacher, student)).tolist()]
    assert path[0] == (len(teacher) - 1, len(student) - 1)
    assert path[-1] == (0, 0)
    assert all((a - c, b - d) in ((1, 1), (1, 0), (0, 1)) for (a, b), (c, d) in itertools.pairwise(path))
    assert sum(Levenshtein.distance(teacher[i], student[j]) for i, j in path) == cheapest(
        len(teacher) - 1, len(student) - 1
    )


TEACHER = Vocabulary.from_tokenizer(small.word_table({"token": 0, "ization": 1, "Ġis": 2, "Ġhard": 3, "Ġit": 4}))
STUDENT = Vocabulary.from_tokenizer(small.word_table({"tokenization": 0, "Ġis": 1, "Ġhard": 2, "Ġwas": 3}))
MINED = table([{0: 1.0}, {0: 1.0}, {1: 1.0}, {2: 1.0}, {1: 1.0}, {4: 1.0}, {5: 1.0}])


def words_of(text: str, *, start: int = 0, ends: bool = False) -> PublicSet:
    return PublicSet((PublicSample("a", text, start, ends),))


def test_rows_worked_by_hand() -> None:
    found = words_of("tokenization is hard hard")
    student = tokenize_set(STUDENT, found, [0], 100)
    assert student.gold_ids.tolist() == [0, 1, 2, 2]
    teacher_words = Vocabulary.from_tokenizer(
        small.word_table({"tokenization": 0, "Ġis": 2, "Ġhard": 3, "Ġit": 4, "Ġwas": 1})
    )
    teacher = tokenize_set(teacher_words, found, [0], 100)
    sent = knowledge(
        teacher, [{0: 0.5, 3: 0.1}, {2: 0.2, 4: 0.5, 3: 0.1}, {3: 0.9}, {1: 0.4, 5: 0.1}], [0.5, 0.2, 0.9, 0.05]
    )
    mapping = table([{0: 1.0}, {}, {1: 1.0}, {2: 1.0}, {1: 1.0}, {}, {}])
    targets = project_paper(sent, teacher, student, mapping, teacher_words, STUDENT)
    assert as_rows(targets) == [
        close({0: 0.5 / 0.6, 2: 0.1 / 0.6}),  # contexts both begin here: copied and renormalised
        close({1: 0.5 / 0.6, 2: 0.1 / 0.6}),  # " it" and " is" collide on 1: the first, larger one wins, not the sum
        close({2: 1.0}),
        close({2: 1.0}),  # nothing that was kept maps: one-hot on the realised token
    ]
    assert targets.supervised.all()
    assert not targets.residual.any()


def test_an_unmatched_row_is_one_hot_on_the_next_token_never_on_the_current_one() -> None:
    # the reference implementation's example: " is" follows a word that the two tokenizers cut differently
    found = words_of("tokenization is hard")
    split = Vocabulary.from_tokenizer(
        small.word_table({"token": 0, "Ġis": 2, "Ġhard": 3, "ization": 1}, specials=("<s>", "</s>"))
    )
    split = Vocabulary.from_bytes(cut_into(split, [("token", "ization")]))
    teacher = tokenize_set(split, found, [0], 100)
    assert teacher.gold_ids.tolist() == [0, 1, 2, 3]
    student = tokenize_set(STUDENT, found, [0], 100)
    sent = knowledge(teacher, [{0: 0.5}, {1: 0.5}, {2: 0.6, 3: 0.2}, {3: 0.7, 2: 0.1}], [0.5, 0.5, 0.6, 0.7])
    targets = project_paper(sent, teacher, student, MINED, split, STUDENT)
    rows = as_rows(targets)
    assert student.gold_ids.tolist() == [0, 1, 2]
    assert rows[1] == close({1: 1.0}), "the context ends in a token with two partners: one-hot on ' is'"
    assert rows[2] == close({2: 0.7 / 0.8, 1: 0.1 / 0.8}), "the context ends in ' is' on both sides: copied"


def cut_into(vocabulary: Vocabulary, words: list[tuple[str, str]]) -> bytes:
    """The artifact of a tokenizer that first cuts at the given places."""
    content = json.loads(vocabulary.to_bytes())
    pattern = "|".join(left + "(?=" + right + ")" for left, right in words)
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    inner = content["tokenizer"]["pre_tokenizer"]
    content["tokenizer"]["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, inner]}
    return json.dumps(content).encode()


def test_a_match_that_the_map_denies_is_one_hot() -> None:
    found = words_of("tokenization is hard")
    rows = tokenize_set(STUDENT, found, [0], 100)
    sent = knowledge(rows, [{0: 0.5}, {3: 0.5}, {3: 0.5}], [0.2, 0.2, 0.2])
    denied = table([{3: 1.0}, {1: 1.0}, {2: 1.0}, {3: 1.0}, {4: 1.0}, {5: 1.0}])
    targets = project_paper(sent, rows, rows, denied, STUDENT, STUDENT)
    assert as_rows(targets) == [close({3: 1.0}), close({1: 1.0}), close({3: 1.0})]


def test_first_rows_match_only_when_both_contexts_end_at_the_same_byte() -> None:
    found = words_of("tokenization is hard", start=13)  # " is" begins at 12: the first row of both is " hard"
    rows = tokenize_set(STUDENT, found, [0], 100)
    sent = knowledge(rows, [{3: 0.5}], [0.2])
    targets = project_paper(sent, rows, rows, table([{index: 1.0} for index in range(6)]), STUDENT, STUDENT)
    assert as_rows(targets) == [close({3: 1.0})]
    other = tokenize_set(STUDENT, words_of("tokenization is hard", start=12), [0], 100)
    targets = project_paper(sent, rows, other, table([{index: 1.0} for index in range(6)]), STUDENT, STUDENT)
    assert as_rows(targets)[0] == close({1: 1.0})


@pytest.mark.parametrize("name", small.NAMES)
def test_equal_tokenizers_copy_every_row_renormalised(name: str) -> None:
    vocabulary = small.vocabulary(name)
    found = PublicSet(
        (PublicSample("a", small.prose(300), 0, True), PublicSample("b", "x", 0, True), PublicSample("c", "y", 0, True))
    )
    rows = tokenize_set(vocabulary, found, [0, 1], 200)
    student = tokenize_set(vocabulary, found, [0, 2], 200)
    sent = random_knowledge(np.random.default_rng(0), rows, vocabulary.size)
    mapping = table([{index: 1.0} for index in range(vocabulary.size)])
    targets = project_paper(sent, rows, student, mapping, vocabulary, vocabulary)
    first = int(rows.row_splits[1])
    for row, found_row in enumerate(as_rows(targets)[:first]):
        bounds = slice(*sent.entry_splits[row : row + 2].tolist())
        mass = np.exp(sent.logprobs[bounds].astype(float))
        expected = dict(zip(sent.token_ids[bounds].tolist(), (mass / mass.sum()).tolist(), strict=True))
        assert found_row == close(expected)
    assert targets.supervised.tolist() == [True] * first + [False] * (student.rows - first)
    assert targets.probs.sum() == pytest.approx(first, rel=1e-5)


def test_different_tokenizers_supervise_every_row_with_a_whole_distribution() -> None:
    teacher_vocabulary, student_vocabulary = small.vocabulary("byte_level"), small.vocabulary("sentencepiece")
    found = PublicSet((PublicSample("a", small.prose(600), 0, True),))
    teacher, student = (tokenize_set(each, found, [0], 500) for each in (teacher_vocabulary, student_vocabulary))
    sent = random_knowledge(np.random.default_rng(0), teacher, teacher_vocabulary.size)
    random = np.random.default_rng(1)
    mapping = table([{int(random.integers(student_vocabulary.size)): 1.0} for _ in range(teacher_vocabulary.size)])
    targets = project_paper(sent, teacher, student, mapping, teacher_vocabulary, student_vocabulary)
    sums = np.add.reduceat(targets.probs, targets.splits[:-1])
    assert targets.supervised.all()
    assert sums == pytest.approx(np.ones(student.rows), abs=1e-5)
    assert all(np.diff(targets.ids[a:b]).min(initial=1) > 0 for a, b in itertools.pairwise(targets.splits))


def test_knowledge_on_other_rows_is_refused() -> None:
    found = words_of("tokenization is hard")
    rows, shorter = (tokenize_set(STUDENT, found, [0], length) for length in (100, 3))
    sent = knowledge(rows, [{0: 0.5}, {1: 0.5}, {2: 0.5}], [0.5, 0.5, 0.5])
    with pytest.raises(RowsDiffer):
        project_paper(sent, shorter, rows, MINED, STUDENT, STUDENT)
