"""Rows that supervise each other, and where the teacher's mass lands: by hand, against a slow twin, at the edges."""

import gzip
import itertools
import json
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import small_tokenizers as small
from fedmkt.alignment import (
    RowsDiffer,
    SparseTargets,
    TokenizedSet,
    align_rows,
    align_set,
    gold_transfer,
    project,
    response_rows,
    tokenize_set,
)
from fedmkt.knowledge import Knowledge, KnowledgeHeader
from fedmkt.projection import Table, largest, sorted_rows, summed, through_buckets
from fedmkt.public_set import PublicSample, PublicSet
from fedmkt.tokenized_set import _Remembered, runs, take_rows, tokenize
from fedmkt.vocab_map import PrefixRelation, VocabMap, build_vocab_map, prefix_relation
from fedmkt.vocabulary import Vocabulary

Row = dict[int, float]


def ints(values: Sequence[int]) -> NDArray[np.int32]:
    return np.array(values, dtype=np.int32)


def splits(groups: Sequence[Sequence[object]]) -> NDArray[np.int32]:
    return ints(np.cumsum([0, *map(len, groups)]).tolist())


def knowledge(
    rows: TokenizedSet, entries: Sequence[Row], gold: Sequence[float], vocabulary_size: int = 100
) -> Knowledge:
    """Knowledge on `rows`: per row its kept probabilities and the probability of the realised token."""
    header = KnowledgeHeader(
        federation_id="fed_" + "0" * 16,
        round_number=0,
        slice_index=0,
        public_set_digest="0" * 64,
        vocabulary_fingerprint="0" * 64,
        vocabulary_size=vocabulary_size,
        model_id="test",
        adapter_version=0,
        top_k=max(64, *map(len, entries)),
        top_p=1.0,
        max_tokens=512,
    )
    ordered = [sorted(row.items()) for row in entries]
    return Knowledge(
        header=header,
        samples=rows.samples,
        row_splits=rows.row_splits,
        context_ends=rows.context_ends,
        gold_logprobs=np.log(np.array(gold)).astype(np.float32),
        entry_splits=splits(ordered),
        token_ids=ints([token for row in ordered for token, _ in row]),
        logprobs=np.log(np.array([mass for row in ordered for _, mass in row])).astype(np.float32),
    )


def table(rows: Sequence[Row]) -> VocabMap:
    """A vocabulary map written by hand: per teacher id its student ids and weights."""
    ordered = [sorted(row.items()) for row in rows]
    return VocabMap(
        teacher_fingerprint="0" * 64,
        student_fingerprint="1" * 64,
        method="retokenized",
        indptr=splits(ordered),
        ids=ints([token for row in ordered for token, _ in row]),
        weights=np.array([weight for row in ordered for _, weight in row], dtype=np.float32),
        distances=np.zeros(len(rows), dtype=np.int32),
    )


def rows_of(tokens: Sequence[tuple[int, int]], start: int = 0, sample: int = 0) -> TokenizedSet:
    """One sample whose realised tokens are (id, byte end), beginning at byte `start`."""
    ends = [end for _, end in tokens]
    return TokenizedSet(
        samples=ints([sample]),
        row_splits=ints([0, len(tokens)]),
        context_ends=ints([start, *ends[:-1]]),
        gold_ids=ints([token for token, _ in tokens]),
        gold_ends=ints(ends),
        response_bytes=ints([ends[-1] - start]),
    )


def as_rows(targets: SparseTargets) -> list[Row]:
    bounds = targets.splits.tolist()
    return [
        dict(zip(targets.ids[a:b].tolist(), targets.probs[a:b].tolist(), strict=True))
        for a, b in itertools.pairwise(bounds)
    ]


def close(row: Row) -> object:
    return pytest.approx(row, abs=1e-6)


# ------------------------------------------------------------------------------------------------ rows


@pytest.mark.parametrize(
    ("teacher", "student", "expected"),
    [
        ([0, 3, 5, 9], [0, 2, 5, 7, 9], [0, -1, 2, -1, 3]),
        ([0, 2, 4], [0, 2, 4], [0, 1, 2]),
        ([], [1, 2], [-1, -1]),
        ([1, 2], [], []),
        ([5], [4, 5, 6], [-1, 0, -1]),
        # several contexts at one byte: the first is the whole context ...
        ([0, 0, 4], [0, 4], [0, 2]),
        ([0, 4], [0, 0, 0, 4], [0, -1, -1, 1]),
        ([0, 0, 4, 4, 4], [0, 0, 0, 4, 4], [0, -1, -1, 2, -1]),
        # ... unless both sides have equally many
        ([0, 0, 4, 4], [0, 0, 4], [0, 1, 2]),
        ([3, 3, 3], [3, 3, 3], [0, 1, 2]),
    ],
)
def test_rows_pair_where_contexts_end_at_the_same_byte(
    teacher: list[int], student: list[int], expected: list[int]
) -> None:
    found = align_rows(ints(teacher), ints(student))
    assert found.tolist() == expected
    assert found.dtype == np.int32


def slow_pairs(teacher: Sequence[int], student: Sequence[int]) -> list[int]:
    found = []
    for index, end in enumerate(student):
        there = [row for row, other in enumerate(teacher) if other == end]
        here = [row for row, other in enumerate(student) if other == end]
        rank = here.index(index)
        found.append(there[rank] if there and (rank == 0 or len(here) == len(there)) else -1)
    return found


offsets = st.lists(st.integers(0, 12), max_size=14).map(sorted)


@given(offsets, offsets)
def test_pairing_agrees_with_looking_at_every_pair(teacher: list[int], student: list[int]) -> None:
    assert align_rows(ints(teacher), ints(student)).tolist() == slow_pairs(teacher, student)


def texts_of(*texts: str) -> PublicSet:
    return PublicSet(tuple(PublicSample(str(index), text, 0, index % 2 == 0) for index, text in enumerate(texts)))


@pytest.mark.parametrize("block_rows", [1, 90, 1 << 14])
@pytest.mark.parametrize("names", [("byte_level", "sentencepiece"), ("unigram", "word_piece"), ("unigram", "unigram")])
def test_a_whole_set_pairs_as_its_samples_do(
    names: tuple[str, str], block_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedmkt.alignment.BLOCK_ROWS", block_rows)  # one: every sample is larger than a block
    prose = small.prose(3000)
    found = texts_of(prose[:500], "Où? 日本", prose[500:1200], "x", prose[1200:1500])
    teacher = tokenize_set(small.vocabulary(names[0]), found, [0, 1, 2, 4], 400)
    student = tokenize_set(small.vocabulary(names[1]), found, [1, 2, 3, 4], 60)
    pairs = align_set(teacher, student)
    expected: list[int] = []
    for position, sample in enumerate(student.samples.tolist()):
        own = student.context_ends[slice(*student.row_splits[position : position + 2])]
        if sample not in teacher.samples:
            expected += [-1] * len(own)
            continue
        first, last = teacher.row_splits[teacher.samples.tolist().index(sample) :][:2].tolist()
        expected += [
            first + row if row >= 0 else -1
            for row in slow_pairs(teacher.context_ends[first:last].tolist(), own.tolist())
        ]
    assert pairs.tolist() == expected
    assert (pairs >= 0).sum() > 50


@pytest.mark.parametrize(
    ("splits", "most", "expected"),
    [
        ([0], 4, []),
        ([0, 2, 4, 5], 4, [(0, 2), (2, 3)]),
        ([0, 9, 10, 10, 11], 4, [(0, 1), (1, 4)]),
        ([0, 0, 0], 1, [(0, 2)]),
        ([0, 3, 3, 6], 3, [(0, 2), (2, 3)]),
    ],
)
def test_runs_hold_whole_groups_and_as_many_as_fit(
    splits: list[int], most: int, expected: list[tuple[int, int]]
) -> None:
    assert [(run.start, run.stop) for run in runs(ints(splits), most)] == expected


def test_members_of_groups_come_with_the_position_of_their_group() -> None:
    members, owners = take_rows(ints([0, 2, 2, 5]), np.array([2, 1, 0, 2]))
    assert members.tolist() == [2, 3, 4, 0, 1, 2, 3, 4]
    assert owners.tolist() == [0, 0, 0, 2, 2, 3, 3, 3]
    assert [len(part) for part in take_rows(ints([0, 2]), np.zeros(0, np.int64))] == [0, 0]


# ------------------------------------------------------------------------------------------------ tokenised sets


def test_response_rows_are_the_tokens_that_begin_at_or_after_the_response() -> None:
    found = Vocabulary.from_tokenizer(small.word_table({"ab": 0, "Ġcd": 1, "Ġef": 2, "<s>": 3, "</s>": 4}))
    encoded = found.encode("ab cd ef", add_eos=True)  # bos 0, ab 2, cd 5, ef 8, eos 8
    assert response_rows(encoded, 0).tolist() == [1, 2, 3, 4]
    assert response_rows(encoded, 2).tolist() == [2, 3, 4]
    assert response_rows(encoded, 3).tolist() == [3, 4]  # " cd" began in the prompt
    assert response_rows(encoded, 8).tolist() == [4]
    assert response_rows(encoded, 9).tolist() == []
    assert response_rows(encoded, 0).dtype == np.int32


def test_a_tokenised_set_worked_by_hand() -> None:
    vocabulary = Vocabulary.from_tokenizer(small.word_table({"ab": 0, "Ġcd": 1, "Ġef": 2, "<s>": 3, "</s>": 4}))
    found = PublicSet(
        (
            PublicSample("a", "ab cd ef", 2, True),
            PublicSample("b", "ab", 0, False),
            PublicSample("c", "ab cd cd cd ef", 11, True),
            PublicSample("d", "ab cd ef ef", 3, True),
        )
    )
    rows = tokenize_set(vocabulary, found, [0, 1, 2, 3], 4)  # four tokens with bos: "c" is cut before its response
    assert rows.row_splits.tolist() == [0, 2, 3, 3, 4]
    assert rows.context_ends.tolist() == [2, 5, 0, 5]
    assert rows.gold_ids.tolist() == [1, 2, 0, 2]
    assert rows.gold_ends.tolist() == [5, 8, 2, 8]
    assert rows.response_bytes.tolist() == [6, 2, 0, 3]
    whole = tokenize_set(vocabulary, found, [0, 3], 100)
    assert whole.gold_ids.tolist() == [1, 2, 4, 2, 2, 4]
    assert whole.gold_ends.tolist() == [5, 8, 8, 8, 11, 11]
    assert whole.response_bytes.tolist() == [6, 6]
    taken = rows.take(ints([0, 2, 3]))
    assert taken.samples.tolist() == [0, 2, 3]
    assert taken.row_splits.tolist() == [0, 2, 2, 3]
    assert taken.gold_ids.tolist() == [1, 2, 2]


def test_no_samples_are_no_rows_and_wrong_indices_are_errors() -> None:
    vocabulary, found = small.vocabulary("byte_level"), texts_of("a", "b")
    assert tokenize_set(vocabulary, found, [], 10).rows == 0
    for wrong in ([1, 0], [0, 0], [-1], [2]):
        with pytest.raises(ValueError, match="strictly ascending indices into a public set of 2"):
            tokenize_set(vocabulary, found, wrong, 10)


def test_what_is_remembered_is_bounded_and_never_another_text_or_vocabulary() -> None:
    vocabulary, other = small.vocabulary("byte_level"), small.vocabulary("unigram")
    memory = _Remembered(6000)
    first, second = (PublicSample("same id", text, 0, False) for text in ("a" * 4000, "b" * 100))
    cuts = {sample: tokenize(vocabulary, [sample], 8)[0] for sample in (first, second)}
    memory.put(vocabulary, 8, first, cuts[first])  # 4000 of text, 1000 of objects, 3 arrays of at most 32 bytes
    memory.put(vocabulary, 8, second, cuts[second])  # together above 6000: the older one goes
    assert memory.get(vocabulary, 8, [first, second]) == [None, cuts[second]]
    assert memory.get(vocabulary, 9, [second]) == memory.get(other, 8, [second]) == [None]
    for _ in range(5):  # the same again weighs nothing
        memory.put(vocabulary, 8, second, cuts[second])
    memory.put(vocabulary, 8, replace(first, text="c"), cuts[first])
    assert memory.get(vocabulary, 8, [second]) == [cuts[second]]
    memory.clear()
    assert memory.get(vocabulary, 8, [second]) == [None]
    again, short = tokenize(vocabulary, [second], 100)[0], tokenize(vocabulary, [second], 8)[0]
    assert len(again.ids) > len(short.ids) == 8


# ------------------------------------------------------------------------------------------------ projection by hand

IDENTITY = [{index: 1.0} for index in range(10)]


def test_colliding_mass_is_summed_and_unmapped_mass_is_residual() -> None:
    rows = rows_of([(0, 1)])
    given_rows = [{0: 0.4, 1: 0.3, 2: 0.2}]
    targets = project(
        knowledge(rows, given_rows, [0.4]), rows, rows, table([{5: 1.0}, {5: 0.5, 7: 0.5}, {}]), chain_rule=False
    )
    assert as_rows(targets) == [close({5: 0.55, 7: 0.15})]
    assert targets.residual.tolist() == [pytest.approx(0.3)]
    assert targets.supervised.tolist() == [True]
    assert targets.probs.dtype == targets.residual.dtype == np.float32
    assert targets.ids.dtype == targets.splits.dtype == np.int32


def test_rows_inside_a_teacher_token_have_no_soft_target() -> None:
    teacher = rows_of([(0, 4), (1, 6)])
    student = rows_of([(0, 2), (1, 4), (2, 6)])
    targets = project(knowledge(teacher, [{0: 0.9}, {1: 0.8}], [0.9, 0.8]), teacher, student, table(IDENTITY))
    assert targets.supervised.tolist() == [True, False, True]
    assert targets.residual[1] == 0
    assert as_rows(targets)[1] == {}


def test_a_student_token_over_two_teacher_tokens_gets_their_joint_probability() -> None:
    # the worked example of fedmkt.projection: ids 0 "th", 1 "e", 2 "x" at the teacher; 0 "th", 2 "x", 3 "the" here
    teacher, student = rows_of([(0, 2), (1, 3)]), rows_of([(3, 3)])
    sent = knowledge(teacher, [{0: 0.5, 2: 0.3}, {1: 0.8}], [0.5, 0.8])
    targets = project(sent, teacher, student, table(IDENTITY))
    assert as_rows(targets) == [close({0: 0.1, 2: 0.3, 3: 0.4})]
    assert targets.residual.tolist() == [pytest.approx(0.2)]
    plain = project(sent, teacher, student, table(IDENTITY), chain_rule=False)
    assert as_rows(plain) == [close({0: 0.5, 2: 0.3})]


def test_the_joint_probability_runs_over_every_token_of_the_span() -> None:
    teacher, student = rows_of([(0, 1), (1, 2), (2, 3), (4, 4)]), rows_of([(3, 3), (4, 4)])
    sent = knowledge(teacher, [{0: 0.5}, {1: 0.5}, {2: 0.5}, {4: 1.0}], [0.5, 0.5, 0.5, 1.0])
    targets = project(sent, teacher, student, table(IDENTITY))
    assert as_rows(targets) == [close({0: 0.375, 3: 0.125}), close({4: 1.0})]


def test_a_teacher_token_over_several_student_tokens_lands_on_the_first_of_them() -> None:
    teacher, student = rows_of([(0, 3)]), rows_of([(5, 2), (6, 3)])
    sent = knowledge(teacher, [{0: 0.6, 1: 0.3}], [0.6])
    # a map that sends it elsewhere, e.g. because the student cuts "the" alone in another way than here
    targets = project(sent, teacher, student, table([{7: 0.5, 8: 0.5}, {5: 1.0}]))
    assert as_rows(targets)[0] == close({5: 0.9})
    assert targets.supervised.tolist() == [True, False]


def test_tokens_of_the_same_bytes_pair_whatever_the_map_says() -> None:
    teacher, student = rows_of([(0, 3)]), rows_of([(5, 3)])
    targets = project(knowledge(teacher, [{0: 0.6, 1: 0.3}], [0.6]), teacher, student, table([{7: 1.0}, {8: 1.0}]))
    assert as_rows(targets) == [close({5: 0.6, 8: 0.3})]


def test_a_cut_realised_token_still_gives_its_mass_out_of_the_tail() -> None:
    teacher, student = rows_of([(0, 3)]), rows_of([(5, 3)])
    targets = project(knowledge(teacher, [{1: 0.9}], [0.04]), teacher, student, table([{7: 1.0}, {8: 1.0}]))
    assert as_rows(targets) == [close({5: 0.04, 8: 0.9})]
    assert targets.residual.tolist() == [pytest.approx(0.06)]
    # a sender that claims more than its tail holds gets the tail
    targets = project(knowledge(teacher, [{1: 0.9}], [0.8]), teacher, student, table([{7: 1.0}, {8: 1.0}]))
    assert as_rows(targets) == [close({5: 0.1, 8: 0.9})]


def test_where_boundaries_cross_the_joint_probability_is_a_lower_bound() -> None:
    # teacher "th" "ere", student "the" "re": P(th) P(ere) = 0.25 is at most the mass of "the"
    teacher, student = rows_of([(0, 2), (1, 5)]), rows_of([(3, 3), (4, 5)])
    sent = knowledge(teacher, [{0: 0.5, 2: 0.3}, {1: 0.5}], [0.5, 0.5])
    targets = project(sent, teacher, student, table([{0: 1.0}, {1: 1.0}, {2: 1.0}]))
    assert as_rows(targets)[0] == close({0: 0.25, 2: 0.3, 3: 0.25})
    targets = project(sent, teacher, student, table([{0: 0.2, 3: 0.8}, {1: 1.0}, {2: 1.0}]))
    assert as_rows(targets)[0] == close({0: 0.1, 2: 0.3, 3: 0.4})  # the map already gave more


def test_no_target_but_the_realised_token_is_raised_by_the_chain_rule() -> None:
    # the map gives "the" 0.45 of "th", the text says 0.05: what is left over is residual, not more for "that"
    teacher, student = rows_of([(0, 2), (1, 3)]), rows_of([(3, 3)])
    sent = knowledge(teacher, [{0: 0.5}, {1: 0.1}], [0.5, 0.1])
    targets = project(sent, teacher, student, table([{3: 0.9, 4: 0.1}, {}]))
    assert as_rows(targets) == [close({3: 0.05, 4: 0.05})]
    assert targets.residual.tolist() == [pytest.approx(0.9)]


def test_a_teacher_that_was_cut_before_the_tokens_end_leaves_the_map_as_it_is() -> None:
    teacher, student = rows_of([(0, 2)]), rows_of([(3, 3)])
    targets = project(knowledge(teacher, [{0: 0.5}], [0.5]), teacher, student, table(IDENTITY))
    assert as_rows(targets) == [close({0: 0.5})]


def test_the_end_of_text_pairs_with_the_end_of_text() -> None:
    teacher, student = rows_of([(0, 2), (9, 2)]), rows_of([(1, 2), (8, 2)])
    sent = knowledge(teacher, [{0: 0.7}, {9: 0.6, 0: 0.1}], [0.7, 0.6])
    mapping = table([{1: 1.0}, *[{}] * 8, {8: 1.0}])
    for chain_rule in (True, False):
        targets = project(sent, teacher, student, mapping, chain_rule=chain_rule)
        assert as_rows(targets) == [close({1: 0.7}), close({1: 0.1, 8: 0.6})]


def test_a_row_whose_mass_all_got_lost_is_not_supervised() -> None:
    rows = rows_of([(0, 1)])
    targets = project(knowledge(rows, [{1: 0.9}], [0.1]), rows, rows, table([{}, {}]), chain_rule=False)
    assert targets.supervised.tolist() == [False]
    assert targets.residual.tolist() == [0]


def test_only_the_largest_entries_stay_and_the_realised_token_always() -> None:
    rows = rows_of([(3, 1)])
    sent = knowledge(rows, [{0: 0.4, 1: 0.3, 2: 0.2, 3: 0.05}], [0.05])
    targets = project(sent, rows, rows, table(IDENTITY), max_entries=2)
    assert as_rows(targets) == [close({0: 0.4, 3: 0.05})]
    assert targets.residual.tolist() == [pytest.approx(0.55)]


def test_of_equally_large_entries_the_smaller_ids_stay() -> None:
    given = Table(
        ints([1, 4, 4, 6, 9, 2, 3, 5, 7, 8]).reshape(2, 5),
        np.array([[0.2, 0.3, 0.0, 0.2, 0.2], [0.1, 0.4, 0.2, 0.0, 0.0]]),
    )
    assert largest(given, 4, ints([0, 0])).mass.tolist() == given.mass.tolist()  # four entries a row, the rest is none
    assert largest(given, 3, ints([0, 7])).mass.tolist() == [[0.2, 0.3, 0, 0.2, 0], [0.1, 0.4, 0.2, 0, 0]]
    assert largest(given, 2, ints([9, 2])).mass.tolist() == [[0, 0.3, 0, 0, 0.2], [0.1, 0.4, 0, 0, 0]]
    assert largest(given, 1, ints([4, 5])).mass.tolist() == [[0, 0.3, 0, 0, 0], [0, 0, 0.2, 0, 0]]


@given(st.integers(1, 12), st.integers(1, 6), st.integers(0, 2**32))
def test_largest_agrees_with_sorting_each_row(width: int, limit: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    mass = random.integers(0, 4, (3, width)) / 8  # many ties, and cells without mass
    table, always = Table(np.tile(np.arange(width, dtype=np.int32), (3, 1)), mass), random.integers(0, 12, 3)
    found = largest(table, limit, always.astype(np.int32)).mass
    for row, kept in enumerate(found.tolist()):
        entries = [(id_ != always[row], -share, id_) for id_, share in enumerate(mass[row].tolist()) if share > 0]
        expected = {id_: -share for _, share, id_ in sorted(entries)[:limit]}
        assert {id_: share for id_, share in enumerate(kept) if share > 0} == expected


@pytest.mark.parametrize("below", [9, 1 << 20, 1 << 31])  # the last leaves no room for columns in 32 bits
def test_rows_are_sorted_with_the_columns_they_come_from(below: int) -> None:
    values = np.array([[5, below - 1, 5, 0], [2, 2, 1, 2]])
    ordered, columns = sorted_rows(values, below)
    assert ordered.tolist() == [[0, 5, 5, below - 1], [1, 2, 2, 2]]
    assert columns.tolist() == [[3, 0, 2, 1], [2, 0, 1, 3]]
    random = np.random.default_rng(below).integers(0, below, (40, 300))
    ordered, columns = sorted_rows(random, below)
    assert columns.tolist() == np.argsort(random, axis=1, kind="stable").tolist()
    assert ordered.tolist() == np.sort(random, axis=1).tolist()


def test_sums_reach_the_first_of_equal_tokens_and_no_other_row() -> None:
    given = Table(
        ints([7, 3, 7, 7, 9, 9, 9, 1]).reshape(2, 4), np.array([[0.1, 0.2, 0.3, 0.05], [0.25, 0.25, 0.125, 0.5]])
    )
    found = summed(given, 10)
    assert found.token.tolist() == [[3, 7, 7, 7], [1, 9, 9, 9]]
    assert found.mass == pytest.approx(np.array([[0.2, 0.45, 0, 0], [0.5, 0.625, 0, 0]]))


def prefixes(student: Sequence[bytes], teacher: Sequence[bytes]) -> PrefixRelation:
    """A relation of plain byte-level tokens, through the real builder."""
    words = {token.decode(): index for index, token in enumerate(teacher)}
    own = {token.decode(): index for index, token in enumerate(student)}
    return prefix_relation(
        Vocabulary.from_tokenizer(small.word_table(words, specials=())),
        Vocabulary.from_tokenizer(small.word_table(own, specials=())),
    )


def test_prefix_buckets_spread_by_the_students_own_probabilities() -> None:
    teacher_tokens, student_tokens = [b"th", b"x", b"q"], [b"th", b"the", b"that", b"x", b"q"]
    teacher, student = rows_of([(1, 1)]), rows_of([(3, 1)])
    sent = knowledge(teacher, [{0: 0.5, 1: 0.2, 2: 0.1}], [0.2])
    own = knowledge(student, [{1: 0.3, 2: 0.1, 3: 0.4}], [0.4])
    targets = project(
        sent,
        teacher,
        student,
        table([{0: 1.0}, {3: 1.0}, {4: 1.0}]),
        relation=prefixes(student_tokens, teacher_tokens),
        student_knowledge=own,
    )
    # "th" is spread over "the" and "that" 3:1; no kept token starts with "q", so the map takes it
    assert as_rows(targets) == [close({1: 0.375, 2: 0.125, 3: 0.2, 4: 0.1})]
    assert targets.residual.tolist() == [pytest.approx(0.2)]


def test_a_bucket_is_shared_by_what_the_row_keeps_of_it() -> None:
    # student tokens in byte order: 2 "a", 0 "ab", 3 "abc", 1 "b"; teacher tokens: 0 "a", 1 "ab", 2 "b", 3 "x"
    relation = prefixes([b"ab", b"b", b"a", b"abc"], [b"a", b"ab", b"b", b"x"])
    entries = Table(ints([0, 1, 2, 0, 2, 3]).reshape(2, 3), np.array([[0.4, 0.2, 0.1], [0.5, 0.3, 0.2]]))
    own = Table(ints([0, 2, 3, 2, 1, 1]).reshape(2, 3), np.array([[0.1, 0.4, 0.3], [0.2, 0.6, 0.0]]))
    gained, filled = through_buckets(entries, own, relation)
    # row 0: "a" over "ab", "a", "abc" as 1 : 4 : 3, "ab" over "ab" and "abc" as 1 : 3, and no token starts with "b"
    assert gained == pytest.approx(np.array([[0.05 + 0.05, 0.2, 0.15 + 0.15], [0.5, 0.3, 0.0]]))
    assert filled.tolist() == [[True, True, False], [True, True, False]]


def test_the_chain_rule_holds_under_prefix_buckets() -> None:
    teacher_tokens, student_tokens = [b"th", b"e", b"x"], [b"th", b"the", b"that", b"x"]
    teacher, student = rows_of([(0, 2), (1, 3)]), rows_of([(1, 3)])
    sent = knowledge(teacher, [{0: 0.5, 2: 0.3}, {1: 0.9}], [0.5, 0.9])
    own = knowledge(student, [{1: 0.3, 2: 0.1, 3: 0.4}], [0.3])
    relation = prefixes(student_tokens, teacher_tokens)
    mapping = table([{0: 1.0}, {}, {3: 1.0}])
    targets = project(sent, teacher, student, mapping, relation=relation, student_knowledge=own)
    assert as_rows(targets) == [close({1: 0.45, 2: 0.05, 3: 0.3})]


# ------------------------------------------------------------------------------------------------ projection, slow twin


def random_row(random: np.random.Generator, size: int, gold: int) -> tuple[Row, float]:
    """Some kept probabilities, and that of the realised token: kept, or somewhere in the tail."""
    tokens = random.choice(size, random.integers(1, 12), replace=False).tolist()
    if random.random() < 0.7 and gold not in tokens:
        tokens[0] = gold
    mass = random.dirichlet(np.ones(len(tokens) + 1))[:-1]
    row = dict(zip(tokens, mass.tolist(), strict=True))
    tail = min(1 - float(mass.sum()), float(mass.min()))
    return row, row[gold] if gold in row else float(random.random()) * tail


def random_knowledge(random: np.random.Generator, rows: TokenizedSet, size: int) -> Knowledge:
    drawn = [random_row(random, size, int(gold)) for gold in rows.gold_ids]
    return knowledge(rows, [row for row, _ in drawn], [max(gold, 1e-9) for _, gold in drawn], size)


def random_map(random: np.random.Generator, teacher_size: int, student_size: int) -> list[Row]:
    rows: list[Row] = []
    for _ in range(teacher_size):
        ids = random.choice(student_size, random.integers(0, 4), replace=False)
        rows.append(
            dict(zip(ids.tolist(), random.dirichlet(np.ones(len(ids))).tolist() if len(ids) else [], strict=True))
        )
    return rows


def slow_projection(
    sent: Knowledge,
    teacher: TokenizedSet,
    student: TokenizedSet,
    mapping: list[Row],
    tokens: tuple[Vocabulary, Vocabulary] | None,
    own: Knowledge | None,
    chain_rule: bool,
) -> list[Row]:
    """One row after the other, with dictionaries and byte strings."""
    targets: list[Row] = []
    for position, sample in enumerate(student.samples.tolist()):
        rows = range(*student.row_splits[position : position + 2].tolist())
        if sample not in teacher.samples:
            targets += [{} for _ in rows]
            continue
        first, stop = teacher.row_splits[teacher.samples.tolist().index(sample) :][:2].tolist()
        partners = slow_pairs(
            teacher.context_ends[first:stop].tolist(), student.context_ends[rows.start : rows.stop].tolist()
        )
        for row, partner in zip(rows, partners, strict=True):
            targets.append(
                {}
                if partner < 0
                else slow_row(sent, teacher, student, mapping, tokens, own, chain_rule, row, first + partner, stop)
            )
    return targets


def kept(source: Knowledge, row: int) -> Row:
    a, b = source.entry_splits[row : row + 2]
    masses = np.exp(source.logprobs[a:b].astype(float))
    return dict(zip(source.token_ids[a:b].tolist(), masses.tolist(), strict=True))


def slow_row(
    sent: Knowledge,
    teacher: TokenizedSet,
    student: TokenizedSet,
    mapping: list[Row],
    tokens: tuple[Vocabulary, Vocabulary] | None,
    own: Knowledge | None,
    chain_rule: bool,
    row: int,
    partner: int,
    stop: int,
) -> Row:
    entries, lands = kept(sent, partner), {}
    for token, mass in entries.items():
        shares = dict(mapping[token])
        if tokens is not None and own is not None and tokens[0].tokens[token]:
            begins = tokens[0].tokens[token]
            bucket = {id_: q for id_, q in kept(own, row).items() if tokens[1].tokens[id_].startswith(begins)}
            if bucket:
                shares = {id_: q / sum(bucket.values()) for id_, q in bucket.items()}
        lands[token] = {id_: mass * share for id_, share in shares.items()}
    if chain_rule:
        u0, g, b = int(teacher.gold_ids[partner]), int(student.gold_ids[row]), int(student.gold_ends[row])
        last = partner
        while last < stop and teacher.gold_ends[last] < b:
            last += 1
        if last < stop:
            p0 = entries.get(u0, min(float(np.exp(sent.gold_logprobs[partner])), max(0.0, 1 - sum(entries.values()))))
            joint = p0 * float(np.exp(sent.gold_logprobs[partner + 1 : last + 1].astype(float).sum()))
            given = lands.get(u0, {})
            crossing = teacher.gold_ends[last] != b and last != partner
            share = max(joint, given.get(g, 0.0)) if crossing else joint
            others = {id_: mass for id_, mass in given.items() if id_ != g}
            factor = min(1.0, (p0 - share) / sum(others.values())) if others else 1.0
            lands[u0] = {g: share} | {id_: mass * factor for id_, mass in others.items()}
    found: Row = {}
    for shares in lands.values():
        for id_, mass in shares.items():
            found[id_] = found.get(id_, 0.0) + mass
    return {id_: mass for id_, mass in sorted(found.items()) if mass > 0}


PAIRS = [
    ("byte_level", "sentencepiece"),
    ("sentencepiece", "byte_level_small"),
    ("byte_level_small", "byte_level"),
    ("unigram", "byte_level"),
    ("byte_level", "word_piece"),
    ("word_piece", "unigram"),
    ("sentencepiece", "sentencepiece"),
]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("buckets", [True, False])
@pytest.mark.parametrize("chain_rule", [True, False])
@pytest.mark.parametrize("names", PAIRS)
def test_projection_agrees_with_the_slow_twin(
    names: tuple[str, str], chain_rule: bool, buckets: bool, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedmkt.alignment.BLOCK_ROWS", 60)
    monkeypatch.setattr("fedmkt.alignment.PROJECTED_ROWS", 37)  # several blocks, one of them short
    if seed == 1:
        monkeypatch.setattr("fedmkt.alignment.PROJECTED_CELLS", 20)  # and most of a few rows, some of one
    random = np.random.default_rng(seed)
    teacher_vocabulary, student_vocabulary = map(small.vocabulary, names)
    prose = small.prose()
    starts = random.integers(0, 6000, 4)
    found = texts_of(*(prose[start : start + 150] for start in starts), "Où? 日本 1234 ", "THE Name", "end")
    teacher = tokenize_set(teacher_vocabulary, found, [0, 1, 2, 4, 5, 6], 60)
    student = tokenize_set(student_vocabulary, found, [0, 1, 3, 4, 5, 6], 50)
    sent = random_knowledge(random, teacher, teacher_vocabulary.size)
    own_rows = tokenize_set(student_vocabulary, found, range(7), 50)
    own = random_knowledge(random, own_rows, student_vocabulary.size)
    mapping = random_map(random, teacher_vocabulary.size, student_vocabulary.size)
    targets = project(
        sent,
        teacher,
        student,
        table(mapping),
        relation=prefix_relation(teacher_vocabulary, student_vocabulary) if buckets else None,
        student_knowledge=own if buckets else None,
        chain_rule=chain_rule,
    )
    places = np.searchsorted(own_rows.samples, student.samples)
    own_here = own.take(places)
    tokens = (teacher_vocabulary, student_vocabulary) if buckets else None
    expected = slow_projection(sent, teacher, student, mapping, tokens, own_here if buckets else None, chain_rule)
    assert sum(map(bool, expected)) > 30
    for row, (mine, twin) in enumerate(zip(as_rows(targets), expected, strict=True)):
        assert list(mine) == list(twin), row
        assert mine == close(twin)
        assert targets.supervised[row] == bool(twin)
        assert targets.residual[row] == pytest.approx(max(0.0, 1 - sum(twin.values())) if twin else 0.0, abs=1e-6)
        assert sum(mine.values()) <= 1 + 1e-6


def test_equal_tokenizers_hand_over_every_row_unchanged() -> None:
    for name in small.NAMES:
        vocabulary = small.vocabulary(name)
        found = texts_of(small.prose(400), "Où? 日本 ▁ 1234 ", " ")
        rows = tokenize_set(vocabulary, found, range(3), 300)
        sent = random_knowledge(np.random.default_rng(1), rows, vocabulary.size)
        targets = project(sent, rows, rows, table([{index: 1.0} for index in range(vocabulary.size)]), chain_rule=False)
        assert targets.supervised.all()
        assert targets.ids.tolist() == sent.token_ids.tolist()
        assert targets.probs == pytest.approx(np.exp(sent.logprobs), abs=1e-6)


# ------------------------------------------------------------------------------------------------ refusals and edges


def test_knowledge_on_other_rows_than_the_texts_is_refused() -> None:
    rows, student = rows_of([(0, 2), (1, 3)]), rows_of([(0, 3)])
    sent = knowledge(rows, [{0: 0.5}, {1: 0.5}], [0.5, 0.5])
    for other in (rows_of([(0, 2)]), rows_of([(0, 1), (1, 3)]), rows_of([(0, 2), (1, 3)], sample=1)):
        with pytest.raises(RowsDiffer, match="knowledge has 1 samples with 2 rows"):
            project(sent, other, student, table(IDENTITY))
    relation = prefixes([b"a"], [b"a"])
    for wrong in (rows_of([(0, 3)], start=1), rows_of([(0, 3)], sample=4)):
        own = knowledge(wrong, [{0: 0.5}], [0.5])
        with pytest.raises(RowsDiffer, match="the student's own knowledge"):
            project(sent, rows, student, table(IDENTITY), relation=relation, student_knowledge=own)
    with pytest.raises(ValueError, match="both the relation and the student's own knowledge"):
        project(sent, rows, student, table(IDENTITY), relation=relation)


def test_nothing_to_align_is_nothing_aligned() -> None:
    vocabulary, found = small.vocabulary("byte_level"), texts_of("a b", "c d")
    nothing, something = (tokenize_set(vocabulary, found, samples, 10) for samples in ([], [0]))
    other = tokenize_set(vocabulary, found, [1], 10)
    sent = random_knowledge(np.random.default_rng(0), something, vocabulary.size)
    mapping = table([{index: 1.0} for index in range(vocabulary.size)])
    targets = project(sent, something, other, mapping)
    assert not targets.supervised.any()
    assert targets.splits.tolist() == [0] * (other.rows + 1)
    assert project(sent, something, nothing, mapping).splits.tolist() == [0]
    assert gold_transfer(nothing, something, mapping) == 0
    relation = prefix_relation(vocabulary, vocabulary)
    targets = project(sent, something, nothing, mapping, relation=relation, student_knowledge=sent)
    assert targets.splits.tolist() == [0]


def test_a_sample_cut_before_its_response_needs_no_knowledge() -> None:
    vocabulary = small.vocabulary("byte_level")
    found = PublicSet((PublicSample("a", "x " * 50 + "y", 100, True), PublicSample("b", "x y", 0, True)))
    student = tokenize_set(vocabulary, found, [0, 1], 20)
    teacher = tokenize_set(vocabulary, found, [1], 20)
    sent = random_knowledge(np.random.default_rng(0), teacher, vocabulary.size)
    mapping = table([{index: 1.0} for index in range(vocabulary.size)])
    relation = prefix_relation(vocabulary, vocabulary)
    targets = project(sent, teacher, student, mapping, relation=relation, student_knowledge=sent)
    assert targets.row_splits.tolist() == [0, 0, student.rows]
    assert targets.supervised.all()


def test_mass_too_small_for_the_targets_is_left_out() -> None:
    rows = rows_of([(0, 1)])
    sent = knowledge(rows, [{0: 0.5, 1: 1e-30, 2: 1e-30}], [0.5])
    tiny = replace(sent, logprobs=np.array([np.log(0.5), -110, -1e4], np.float32))  # exp(-110) is 0 in float32
    for chain_rule in (True, False):
        targets = project(tiny, rows, rows, table(IDENTITY), chain_rule=chain_rule)
        assert as_rows(targets) == [close({0: 0.5})]


def test_a_sender_whose_every_token_begins_every_own_one_needs_no_more_memory() -> None:
    size, rows = 400, rows_of([(index % 400, index + 1) for index in range(120)])
    row = dict.fromkeys(range(size), 1 / 500)
    sent = knowledge(rows, [row] * rows.rows, [1 / 500] * rows.rows, size)
    relation = PrefixRelation(
        "0" * 64, "1" * 64, np.arange(size, dtype=np.int32), np.zeros(size, np.int32), np.full(size, size, np.int32)
    )
    tracemalloc.start()
    try:
        targets = project(
            sent,
            rows,
            rows,
            table([{}] * size),
            relation=relation,
            student_knowledge=sent,
            chain_rule=False,
            max_entries=size,
        )
        peak_mib = tracemalloc.get_traced_memory()[1] / 2**20
    finally:
        tracemalloc.stop()
    assert targets.probs == pytest.approx(np.full(size * rows.rows, 1 / 500), rel=1e-5)
    assert peak_mib < 200  # 19 million pairs of entries would be 600 at once


# ------------------------------------------------------------------------------------------------ gold transfer


def test_gold_transfer_counts_what_lands_by_map_and_by_chain() -> None:
    # same token; one student token over two teacher tokens; crossing; one teacher token over two student tokens
    teacher = rows_of([(0, 1), (1, 2), (2, 3), (3, 5), (4, 7), (5, 9)])
    student = rows_of([(0, 1), (6, 3), (7, 6), (8, 7), (9, 8), (9, 9)])
    pairs = align_set(teacher, student).tolist()
    assert pairs == [0, 1, 3, -1, 5, -1]
    assert gold_transfer(teacher, student, table(IDENTITY), chain_rule=False) == pytest.approx(1 / 4)
    assert gold_transfer(teacher, student, table(IDENTITY)) == pytest.approx(3 / 4)
    mapped = [*IDENTITY[:3], {7: 0.6, 3: 0.4}, *IDENTITY[4:]]
    assert gold_transfer(teacher, student, table(mapped)) == 1
    narrowed = np.array([False, True, True, False, False, False])
    assert gold_transfer(teacher, student, table(IDENTITY), supervised=narrowed) == pytest.approx(1 / 2)


def test_counted_rows_keep_their_realised_mass_in_the_targets() -> None:
    teacher_vocabulary, student_vocabulary = small.vocabulary("byte_level_small"), small.vocabulary("sentencepiece")
    found = texts_of(small.prose(3000))
    teacher, student = (tokenize_set(each, found, [0], 4000) for each in (teacher_vocabulary, student_vocabulary))
    sent = random_knowledge(np.random.default_rng(3), teacher, teacher_vocabulary.size)
    mapping = build_vocab_map(teacher_vocabulary, student_vocabulary, "retokenized")
    rows = as_rows(project(sent, teacher, student, mapping))
    expected = slow_projection(sent, teacher, student, dictionaries(mapping), None, None, True)
    gold = student.gold_ids.tolist()
    kept_mass = [row.get(token, 0.0) for row, token in zip(rows, gold, strict=True)]
    assert kept_mass == pytest.approx(
        [row.get(token, 0.0) for row, token in zip(expected, gold, strict=True)], abs=1e-6
    )
    assert gold_transfer(teacher, student, mapping) > 0.97


def dictionaries(mapping: VocabMap) -> list[Row]:
    bounds = mapping.indptr.tolist()
    return [
        dict(zip(mapping.ids[a:b].tolist(), mapping.weights[a:b].tolist(), strict=True))
        for a, b in itertools.pairwise(bounds)
    ]


REAL_PAIRS = [
    ("gpt2", "llama2"),
    ("llama2", "gpt2"),
    ("gpt-neox-20b", "llama2"),
    ("mistral-v3", "opt"),
    ("llama2", "stories260K"),
    ("stories260K", "minimind"),
    ("minimind", "mistral-v3"),
]


@pytest.mark.data
@pytest.mark.parametrize("names", REAL_PAIRS)
def test_real_tokenizers_transfer_the_realised_mass(names: tuple[str, str], data_dir: Path) -> None:
    teacher, student = (small.real(data_dir / "tokenizers" / name) for name in names)
    with gzip.open(data_dir / "datasets/gsm8k/test.jsonl.gz", "rt") as file:
        words = [json.loads(next(file)) for _ in range(20)]
    with gzip.open(data_dir / "datasets/text/grimms_fairy_tales.txt.gz", "rt") as file:
        texts = [file.read(600) for _ in range(20)]
    texts += [row["question"] + "\n" + row["answer"] for row in words] + [small.FOREIGN]
    found = texts_of(*texts)
    rows = [tokenize_set(each, found, range(len(found)), 4096) for each in (teacher, student)]
    mapping = build_vocab_map(teacher, student, "retokenized")
    plain = gold_transfer(rows[0], rows[1], mapping, chain_rule=False)
    chained = gold_transfer(rows[0], rows[1], mapping)
    shared = float((align_set(rows[0], rows[1]) >= 0).mean())
    print(f"{names[0]} > {names[1]}: shared {shared:.3f}, retokenized {plain:.3f}, with the chain rule {chained:.3f}")
    assert chained >= 0.97
    assert chained >= plain
