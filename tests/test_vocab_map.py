"""Vocabulary maps: worked by hand, against slow twins, as hostile bytes, and in the cache."""

import json
import random
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import safetensors.numpy
from numpy.typing import NDArray
from rapidfuzz.distance import Levenshtein
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import small_tokenizers as small
from fedmkt.coverage import CLASSES, Coverage, audit_coverage, token_class, token_classes
from fedmkt.edit_distance import nearest, token_text
from fedmkt.errors import Refusal
from fedmkt.first_piece import ids_by_bytes
from fedmkt.map_artifact import MAX_MAP_BYTES, Header, pack
from fedmkt.protocol import MapMethod
from fedmkt.vocab_map import (
    CorruptMap,
    MalformedMap,
    MapOutOfRange,
    MapTooLarge,
    MapTooSlow,
    UnsupportedMapVersion,
    VocabMap,
    WrongPair,
    build_vocab_map,
    cached_vocab_map,
    prefix_relation,
)
from fedmkt.vocabulary import Vocabulary

METHODS: tuple[MapMethod, ...] = get_args(MapMethod)
PAIRS = [(teacher, student) for teacher in small.NAMES for student in small.NAMES if teacher != student]


def words(*tokens: str, specials: tuple[str, ...] = ()) -> Vocabulary:
    """Ids in the order given; `Ġ` is a space. Special tokens follow."""
    table = {token: index for index, token in enumerate(tokens)}
    return Vocabulary.from_tokenizer(small.word_table(table, specials=specials))


def best_tokens(found: VocabMap, teacher: Vocabulary, student: Vocabulary) -> dict[bytes, bytes | None]:
    pairs = zip(teacher.tokens, found.best_ids.tolist(), strict=True)
    return {token: student.tokens[best] if best >= 0 else None for token, best in pairs if token}


# ------------------------------------------------------------------------------------------------ mined


def test_mined_takes_equal_bytes_then_the_nearest_then_the_smallest() -> None:
    teacher = words("the", "Ġcats", "colour", "xyz")
    student = words("Ġcat", "color", "bat", "the", "a", "Ġcots")
    found = build_vocab_map(teacher, student, "mined")
    assert best_tokens(found, teacher, student) == {
        b"the": b"the",
        b" cats": b" cat",  # distance 1, as " cots" is; " cat" is the smaller text
        b"colour": b"color",
        b"xyz": b"a",  # nothing in common: "a", "bat" and "the" are all 3 away
    }
    assert found.distances.tolist() == [0, 1, 1, 3]
    assert found.distances.dtype == found.best_ids.dtype == found.ids.dtype == found.indptr.dtype == np.int32
    assert found.weights.tolist() == [1, 1, 1, 1]
    assert found.indptr.tolist() == [0, 1, 2, 3, 4]
    assert found.method == "mined"
    assert (found.teacher_fingerprint, found.student_fingerprint) == (teacher.fingerprint, student.fingerprint)


def test_mined_compares_characters_not_bytes() -> None:
    teacher = words("Ã©t", "q")  # the byte alphabet's spelling of "ét"
    student = words("et", "Ãt", "qq")  # "Ãt" is the byte C3 and a "t"
    found = build_vocab_map(teacher, student)
    assert found.distances.tolist() == [1, 1]
    assert best_tokens(found, teacher, student) == {"ét".encode(): b"et", b"q": b"qq"}


@pytest.mark.parametrize(("teacher_name", "student_name"), PAIRS)
def test_mined_maps_of_small_tokenizers_agree_with_brute_force(teacher_name: str, student_name: str) -> None:
    teacher, student = small.vocabulary(teacher_name), small.vocabulary(student_name)
    found = build_vocab_map(teacher, student, "mined")
    known = {token_text(token): token for token in student.tokens if token}
    for index, token in enumerate(teacher.tokens):
        if not token:
            continue
        text = token_text(token)
        distance, nearest = min((Levenshtein.distance(text, other), other) for other in known)
        best = int(found.best_ids[index])
        assert (int(found.distances[index]), student.tokens[best]) == (distance, known[nearest])


# ------------------------------------------------------------------------------------------------ special tokens


def test_special_tokens_go_by_role_and_never_by_spelling() -> None:
    teacher = words("<s>", "endoftext", specials=("<|endoftext|>", "<unk>", "<pad>", "<|user|>"))
    student = words("<|endoftext|>", "<unk", "<|use", specials=("<pad>", "</s>", "<unk>", "<s>", "<|user|>"))
    assert [teacher.roles[index] for index in (2, 3, 4, 5)] == ["eos", "unk", "pad", "turn"]
    for method in METHODS:
        found = build_vocab_map(teacher, student, method)
        assert found.best_ids[2:].tolist() == [4, 5, 3, -1]  # eos, unk, pad; a control token has no counterpart
        assert found.distances[2:].tolist() == [0, 0, 0, -1]
        assert found.best_ids[0] != 6  # "<s>" is plain text of the teacher, the student's begin of text is not


def test_a_role_that_the_student_lacks_is_unmapped() -> None:
    teacher = words("a", specials=("<s>", "</s>", "<unk>", "<pad>"))
    student = words("a", specials=("<|endoftext|>",))
    for method in METHODS:
        found = build_vocab_map(teacher, student, method)
        assert found.best_ids.tolist() == [0, -1, 1, -1, -1]
        assert found.distances.tolist() == [0, -1, 0, -1, -1]
        assert found.indptr.tolist() == [0, 1, 1, 2, 2, 2]
        assert found.audit is not None
        assert found.audit.classes["special"] == Coverage(4, 1, 3)


def test_of_several_ids_with_one_role_the_students_own_is_taken() -> None:
    student = replace(words("a", specials=("<x>", "</s>", "<y>")), roles={1: "eos", 2: "eos", 3: "bos"}, bos_id=3)
    assert student.eos_id == 2
    teacher = words("a", specials=("</s>", "<s>"))
    assert build_vocab_map(teacher, student).best_ids.tolist() == [0, 2, 3]


@pytest.mark.parametrize("method", METHODS)
def test_a_vocabulary_maps_to_itself_by_identity(method: MapMethod) -> None:
    vocabulary = small.vocabulary("sentencepiece")  # it has several ids for some bytes
    found = build_vocab_map(vocabulary, vocabulary, method)
    assert found.best_ids.tolist() == list(range(vocabulary.size))
    turns = words("a", specials=("<|user|>", "</s>"))
    assert build_vocab_map(turns, turns, method).best_ids.tolist() == [0, 1, 2]


def test_holes_are_unmapped_and_never_chosen() -> None:
    def with_hole(*tokens: str) -> Vocabulary:
        table = {token: 2 * index for index, token in enumerate(tokens)}
        tokenizer = Tokenizer(models.BPE(table, [], ignore_merges=True))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        return Vocabulary.from_tokenizer(tokenizer)

    teacher, student = with_hole("a", "bcd", "e"), with_hole("bcx", "a")
    assert teacher.tokens == (b"a", b"", b"bcd", b"", b"e")
    found = build_vocab_map(teacher, student, "mined")
    assert found.best_ids.tolist() == [2, -1, 0, -1, 2]
    assert found.distances.tolist() == [0, -1, 1, -1, 1]
    assert found.audit is not None
    assert found.audit.total == Coverage(3, 1, 0)  # holes do not count
    itself = build_vocab_map(teacher, teacher)
    assert itself.best_ids.tolist() == [0, -1, 2, -1, 4]


def test_a_student_without_ordinary_tokens_leaves_everything_unmapped() -> None:
    teacher = words("a", "b", specials=("</s>",))
    student = replace(words("x", specials=("</s>",)), tokens=(b"", b""))
    for method in METHODS:
        found = build_vocab_map(teacher, student, method)
        assert found.best_ids.tolist() == [-1, -1, 1]


# ------------------------------------------------------------------------------------------------ equal bytes


def test_of_ids_with_equal_bytes_the_one_that_the_tokenizer_produces_is_taken() -> None:
    student = small.vocabulary("sentencepiece")
    repeated = {token for token in student.tokens if token and student.tokens.count(token) > 1}
    assert len(repeated) > 20  # <0x61> and "a", ...
    chosen = ids_by_bytes(student)
    for token in repeated:
        text = token.decode()
        produced = student.encode("\n" + text, add_bos=False).ids.tolist()
        assert chosen[token] == produced[-1] or text.isspace()
        assert student.tokens[chosen[token]] == token
    letter = chosen[b"a"]
    assert letter != student.tokens.index(b"a")  # the smallest id is the byte token <0x61>, which "a" never becomes


def test_of_equal_bytes_that_are_no_text_the_smallest_id_is_taken() -> None:
    student = replace(words("a", "b", "c"), tokens=(b"a", b"\xc3", b"\xc3"))
    assert ids_by_bytes(student) == {b"a": 0, b"\xc3": 1}


# ------------------------------------------------------------------------------------------------ retokenized


def merging(*tokens: str, merges: list[tuple[str, str]], split: bool = True) -> Vocabulary:
    """A byte-level BPE with these merges; without `split` they reach over spaces and line ends."""
    table = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(table, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split)
    tokenizer.decoder = decoders.ByteLevel()
    return Vocabulary.from_tokenizer(tokenizer)


LETTERS = ("a", "b", "c", "e", "h", "t", "s", "Ġ", "Ċ", ")", "0", "Ã", "©")


def test_retokenized_gives_all_to_the_first_piece_of_the_students_own_cut() -> None:
    student = merging(*LETTERS, "th", "the", "Ġt", merges=[("t", "h"), ("th", "e"), ("Ġ", "t")])
    teacher = words("the", "these", "Ġthe", "at", "Ã©", "ÃŁ", "zz", "bc")
    found = build_vocab_map(teacher, student, "retokenized")
    assert best_tokens(found, teacher, student) == {
        b"the": b"the",
        b"these": b"the",  # the + s + e
        b" the": b" ",  # "th" merges before " t" can
        b"at": b"a",
        "é".encode(): b"\xc3",  # the first of the two bytes that the student writes
        "ß".encode(): b"\xc3",
        b"zz": None,
        b"bc": b"b",
    }
    assert found.distances.tolist() == [0, 2, 3, 1, 1, 1, -1, 1]  # bytes beyond the first piece


def test_a_context_that_the_student_merges_with_the_piece_is_not_used() -> None:
    student = merging(*LETTERS, "Ċa", "aa", merges=[("Ċ", "a"), ("a", "a")], split=False)
    assert [student.tokens[index] for index in student.encode("\naab", add_bos=False).ids] == [b"\na", b"a", b"b"]
    teacher = words("aab")
    found = build_vocab_map(teacher, student, "retokenized")
    assert best_tokens(found, teacher, student) == {b"aab": b"aa"}
    assert found.distances.tolist() == [1]


def test_bytes_that_are_no_text_take_the_longest_token_that_begins_them() -> None:
    teacher = words("æĹ", "ĠæĹ", "Ĺ", "aæ")  # the first two bytes of "日", with a space, its second byte, "a" + one
    student = words("æ", "Ġæ", "Ġ", "a", "é")
    found = build_vocab_map(teacher, student, "retokenized")
    assert best_tokens(found, teacher, student) == {
        b"\xe6\x97": b"\xe6",
        b" \xe6\x97": b" \xe6",
        b"\x97": None,
        b"a\xe6": b"a",
    }
    assert found.distances.tolist() == [1, 1, -1, 1]


def test_a_piece_within_a_word_never_gets_the_dummy_space() -> None:
    student = small.vocabulary("sentencepiece")
    teacher = words("thequick", "Ġthequick", "ing")
    found = build_vocab_map(teacher, student, "retokenized")
    inside, begun, _ = (student.tokens[best] for best in found.best_ids.tolist())
    assert b"thequick".startswith(inside)
    assert b" thequick".startswith(begun)
    assert begun.startswith(b" t")


def test_text_that_the_student_lower_cases_goes_where_its_tokenizer_sends_it() -> None:
    student = small.vocabulary("word_piece")
    teacher = words("ĠString", "日")
    found = build_vocab_map(teacher, student, "retokenized")
    assert b" string".startswith(student.tokens[int(found.best_ids[0])])
    assert words("æĹ¥").tokens == ("日".encode(),)
    foreign = build_vocab_map(words("æĹ¥"), student, "retokenized")
    assert foreign.best_ids.tolist() == [-1]  # unknown to it: to the tail, never to a random token


@pytest.mark.parametrize(("teacher_name", "student_name"), PAIRS)
def test_retokenized_maps_of_small_tokenizers_begin_the_teachers_bytes(teacher_name: str, student_name: str) -> None:
    teacher, student = small.vocabulary(teacher_name), small.vocabulary(student_name)
    found = build_vocab_map(teacher, student, "retokenized")
    everything = {token for token in student.tokens if token}
    for index, token in enumerate(teacher.tokens):
        best = int(found.best_ids[index])
        if not token or (best < 0 and student_name not in small.BYTE_EXACT):
            continue
        if token in everything:
            assert (student.tokens[best], int(found.distances[index])) == (token, 0)
        elif student_name in small.BYTE_EXACT:
            assert token.startswith(student.tokens[best])
            assert int(found.distances[index]) == len(token) - len(student.tokens[best])
        assert best not in student.roles


@pytest.mark.parametrize("student_name", ["byte_level", "sentencepiece"])
def test_first_pieces_are_what_the_student_writes_in_running_text(student_name: str) -> None:
    """The twin: cut a long word in the middle of a line, and look at what follows the cut."""
    student = small.vocabulary(student_name)
    teacher = words("Ġassignments", "Ġtargeting", "Ġclassroom", "Ġnamespaces")
    found = build_vocab_map(teacher, student, "retokenized")
    for token, best in zip(teacher.tokens, found.best_ids.tolist(), strict=True):
        encoding = student.encode("See:" + token.decode() + " there", add_bos=False)
        place = int(np.flatnonzero(encoding.ends == len("See:"))[0]) + 1
        assert best == encoding.ids[place]


# ------------------------------------------------------------------------------------------------ best ids


def weighted(rows: list[list[tuple[int, float]]], **changes: Any) -> VocabMap:
    counts = [len(row) for row in rows]
    fields: dict[str, Any] = {
        "teacher_fingerprint": "0" * 64,
        "student_fingerprint": "1" * 64,
        "method": "mined",
        "indptr": np.cumsum([0, *counts]).astype(np.int32),
        "ids": np.array([index for row in rows for index, _ in row], np.int32),
        "weights": np.array([weight for row in rows for _, weight in row], np.float32),
        "distances": np.array([0 if row else -1 for row in rows], np.int32),
    }
    return VocabMap(**(fields | changes))


def test_the_best_id_has_the_largest_weight_and_is_the_first_of_equal_ones() -> None:
    found = weighted([[(7, 0.2), (3, 0.8)], [], [(9, 0.5), (4, 0.5)], [(1, 1.0)], []])
    assert found.best_ids.tolist() == [3, -1, 9, 1, -1]
    assert weighted([]).best_ids.tolist() == []
    assert weighted([[]]).best_ids.tolist() == [-1]


def test_a_built_map_cannot_be_changed() -> None:
    found = build_vocab_map(words("a", "b"), words("a"))
    for column in (found.ids, found.indptr, found.weights, found.distances, found.best_ids):
        with pytest.raises(ValueError, match="read-only"):
            column[0] = 1


# ------------------------------------------------------------------------------------------------ hostile vocabularies


def long_and_alike(seed: int, tokens: int, length: int) -> Vocabulary:
    """Tokens of four letters in random order: every bound lets all of them through."""
    rng = random.Random(seed)
    return words(*("".join(rng.choices("abcd", k=length)) for _ in range(tokens)))


def test_vocabularies_that_would_take_hours_are_refused_with_both_numbers() -> None:
    teacher, student = (long_and_alike(seed, 2000, 600) for seed in (1, 2))  # half an hour of edit distances
    with pytest.raises(
        MapTooSlow, match=r"\d+ of 2000 tokens are mapped after \d+\.\d s, a map may take 0.5 s"
    ) as found:
        build_vocab_map(teacher, student, "mined", limit_s=0.5)
    assert (found.value.code, found.value.status) == ("vocab_map.too_slow", 422)


@pytest.mark.parametrize("method", METHODS)
def test_the_limit_holds_in_every_step_of_every_method(method: MapMethod) -> None:
    for teacher, student in (("byte_level", "sentencepiece"), ("sentencepiece", "byte_level")):
        with pytest.raises(MapTooSlow, match="may take 0 s"):
            build_vocab_map(small.vocabulary(teacher), small.vocabulary(student), method, limit_s=0)


def test_a_search_is_interrupted_in_the_middle_of_its_patterns_and_of_its_comparisons() -> None:
    short, long = (random_words(length) for length in (12, 200))
    for texts in (short, long):
        calls = 0

        def stop_at_the_fifth(done: int, total: int) -> None:
            nonlocal calls
            calls += 1
            if calls == 5:
                raise InterruptedError

        with pytest.raises(InterruptedError):
            nearest(texts[:1000], texts[1000:], progress=stop_at_the_fifth)


def random_words(length: int) -> list[str]:
    rng = random.Random(length)
    return ["".join(rng.choices("abcdefgh", k=length)) for _ in range(2000)]


# ------------------------------------------------------------------------------------------------ prefixes


def test_student_tokens_that_begin_alike_stand_side_by_side() -> None:
    teacher = words("t", "the", "th", "Ġ", "hen", "z", specials=("</s>",))
    student = words("then", "Ġthe", "hen", "x", "t", "tz", specials=("</s>",))
    relation = prefix_relation(teacher, student)
    assert relation.places.tolist() == [3, 0, 1, 5, 2, 4, 6]  # " the", "hen", "t", "then", "tz", "x", </s>
    assert list(zip(relation.starts.tolist(), relation.stops.tolist(), strict=True)) == [
        (2, 5),
        (3, 4),
        (3, 4),
        (0, 1),
        (1, 2),
        (6, 6),
        (0, 0),
    ]
    assert {column.dtype for column in (relation.places, relation.starts, relation.stops)} == {np.dtype(np.int32)}
    assert (relation.teacher_fingerprint, relation.student_fingerprint) == (teacher.fingerprint, student.fingerprint)


@pytest.mark.parametrize(("teacher_name", "student_name"), [*PAIRS, ("sentencepiece", "sentencepiece")])
def test_prefix_relations_of_small_tokenizers_agree_with_brute_force(teacher_name: str, student_name: str) -> None:
    teacher, student = small.vocabulary(teacher_name), small.vocabulary(student_name)
    relation = prefix_relation(teacher, student)
    by_place = np.argsort(relation.places)
    assert sorted(relation.places.tolist()) == list(range(student.size))
    for index, prefix in enumerate(teacher.tokens):
        run = by_place[relation.starts[index] : relation.stops[index]].tolist()
        expected = [other for other, token in enumerate(student.tokens) if prefix and token.startswith(prefix)]
        assert sorted(run) == expected


def test_the_relation_of_a_pair_is_computed_once() -> None:
    teacher, student = small.vocabulary("byte_level"), small.vocabulary("word_piece")
    again = Vocabulary.from_bytes(student.to_bytes())
    assert prefix_relation(teacher, student) is prefix_relation(teacher, again)
    assert prefix_relation(teacher, student) is not prefix_relation(student, teacher)


# ------------------------------------------------------------------------------------------------ coverage


@pytest.mark.parametrize(
    ("token", "kind"),
    [
        ("7", "digits"),
        (" 2024", "digits"),
        ("٣", "digits"),
        ("a1", "other"),
        (".", "punctuation"),
        (" ==", "punctuation"),
        ("__", "punctuation"),
        ("😀", "punctuation"),
        ("日本", "non_latin"),
        (" мир", "non_latin"),
        ("x日", "non_latin"),
        (" the", "words"),
        (" été", "words"),
        (" Việt", "words"),
        ("the", "other"),
        ("\n", "other"),
        ("   ", "other"),
    ],
)
def test_the_class_of_a_token_is_told_by_its_text(token: str, kind: str) -> None:
    assert token_class(token.encode()) == kind
    assert kind in CLASSES


def slow_class(token: bytes) -> str:
    try:
        text = token.decode()
    except UnicodeDecodeError:
        return "bytes"
    body = text[1:] if text[:1].isspace() else text
    if body.isdecimal():
        return "digits"
    if re.fullmatch(r"(?:[^\w\s]|_)+", body):
        return "punctuation"
    if any(each.isalpha() and ord(each) > 0x24F and not 0x1E00 <= ord(each) < 0x1F00 for each in body):
        return "non_latin"
    return "words" if body.isalpha() and len(body) < len(text) else "other"


def test_classes_of_many_tokens_agree_with_one_at_a_time() -> None:
    rng = random.Random(5)
    alphabet = [*" a1é日_.\n٣\u3000ß½ªⅣ'😀", *map(chr, range(0x80, 0xD800, 97))]
    tokens = ["".join(rng.choices(alphabet, k=rng.randint(0, 4))).encode() for _ in range(5000)]
    tokens += [b"", b" ", b"\xff", b" \xff", b"a\xff", b"\xff ", "日".encode()[:2]]
    assert [CLASSES[index] for index in token_classes(tokens)] == list(map(slow_class, tokens))
    assert token_classes([]).tolist() == []


def test_part_of_a_character_is_of_the_class_bytes() -> None:
    assert token_class(b"\xe6\x97") == token_class(b" \xff") == "bytes"


def test_the_audit_counts_ids_and_probability_mass() -> None:
    teacher = words("7", "12", ".", "Ġthe", "Ġzebra", "æĹ", specials=("</s>", "<unk>"))
    student = words("7", "1", ".", "Ġthe", "Ġz", specials=("</s>",))
    frequencies = np.array([1, 2, 3, 4, 0, 5, 4, 1], np.float64)
    audit = build_vocab_map(teacher, student, "retokenized", frequencies=frequencies).audit
    assert audit is not None
    assert audit.total == Coverage(8, 4, 2)
    assert dict(audit.classes) == {
        "digits": Coverage(2, 1, 0),
        "punctuation": Coverage(1, 1, 0),
        "non_latin": Coverage(0, 0, 0),
        "words": Coverage(2, 1, 0),
        "bytes": Coverage(1, 0, 1),
        "special": Coverage(2, 1, 1),
        "other": Coverage(0, 0, 0),
    }
    assert audit.exact_mass == pytest.approx((1 + 3 + 4 + 4) / 20)
    assert audit.unmapped_mass == pytest.approx((5 + 1) / 20)
    assert audit.total.exact_share == 0.5
    assert audit.total.unmapped_share == 0.25
    assert audit.classes["non_latin"].exact_share == audit.classes["non_latin"].unmapped_share == 0


def test_frequencies_without_any_mass_say_nothing() -> None:
    vocabulary = words("a", "b")
    nothing = audit_coverage(vocabulary, np.ones(2, bool), np.ones(2, bool), np.zeros(2))
    assert nothing.exact_mass is None
    assert nothing.unmapped_mass is None
    built = build_vocab_map(vocabulary, words("a"))
    assert built.audit is not None
    assert built.audit.exact_mass is None


# ------------------------------------------------------------------------------------------------ the artifact


def columns_of(found: VocabMap) -> dict[str, NDArray[Any]]:
    return {name: getattr(found, name) for name in ("indptr", "ids", "weights", "distances")}


def same(first: VocabMap, second: VocabMap) -> bool:
    return (
        (first.teacher_fingerprint, first.student_fingerprint, first.method, first.audit)
        == (second.teacher_fingerprint, second.student_fingerprint, second.method, second.audit)
        and all(np.array_equal(column, columns_of(second)[name]) for name, column in columns_of(first).items())
        and all(column.dtype == columns_of(second)[name].dtype for name, column in columns_of(first).items())
    )


@pytest.mark.parametrize(("teacher_name", "student_name"), PAIRS[::3])
@pytest.mark.parametrize("method", METHODS)
def test_a_map_survives_the_way_through_bytes(method: MapMethod, teacher_name: str, student_name: str) -> None:
    teacher, student = small.vocabulary(teacher_name), small.vocabulary(student_name)
    found = build_vocab_map(teacher, student, method)
    read = VocabMap.from_bytes(found.to_bytes(), teacher=teacher, student=student)
    assert same(found, read)
    assert np.array_equal(found.best_ids, read.best_ids)
    assert read.to_bytes() == found.to_bytes()


def test_weighted_rows_and_empty_maps_survive_too() -> None:
    for found in (weighted([[(7, 0.25), (3, 0.75)], [], [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4)]]), weighted([])):
        assert same(found, VocabMap.from_bytes(found.to_bytes()))


def test_every_process_writes_the_same_bytes() -> None:
    script = (
        "import sys, hashlib; sys.path.insert(0, sys.argv[1]); import small_tokenizers as small;"
        "from fedmkt.vocab_map import build_vocab_map;"
        "table = {token: index for index, token in enumerate(['the', 'Ġcat', 'Ã', 'zebra', '12'])};"
        "pair = small.word_table(table), small.byte_level();"
        "from fedmkt.vocabulary import Vocabulary; pair = tuple(map(Vocabulary.from_tokenizer, pair));"
        "digest = hashlib.sha256();"
        "[digest.update(build_vocab_map(a, b, m).to_bytes())"
        " for a, b in (pair, pair[::-1]) for m in ('mined', 'retokenized')];"
        "print(digest.hexdigest())"
    )
    outputs = set()
    for seed in ("1", "2"):
        command = [sys.executable, "-c", script, str(Path(__file__).parent)]
        ran = subprocess.run(command, env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True)
        outputs.add(ran.stdout)
    assert len(outputs) == 1


def test_a_map_of_another_pair_is_refused() -> None:
    teacher, student = words("a", "b"), words("a")
    found = build_vocab_map(teacher, student)
    data = found.to_bytes()
    VocabMap.from_bytes(data, teacher=teacher, student=student)
    with pytest.raises(WrongPair, match="build it again") as refusal:
        VocabMap.from_bytes(data, teacher=student, student=teacher)
    assert (refusal.value.code, refusal.value.status) == ("vocab_map.wrong_pair", 409)


def test_a_map_that_names_ids_beyond_the_vocabularies_is_refused() -> None:
    teacher, student = words("a", "b"), words("a")
    pair = {"teacher_fingerprint": teacher.fingerprint, "student_fingerprint": student.fingerprint}
    with pytest.raises(MapOutOfRange, match="student id 1, the largest is 0"):
        weighted([[(0, 1.0)], [(1, 1.0)]], **pair).check_pair(teacher, student)
    with pytest.raises(MapOutOfRange, match="1 rows for a teacher of 2"):
        weighted([[(0, 1.0)]], **pair).check_pair(teacher, student)
    weighted([[(0, 1.0)], []], **pair).check_pair(teacher, student)


def ints(*values: int) -> NDArray[np.int32]:
    return np.array(values, np.int32)


def floats(*values: float) -> NDArray[np.float32]:
    return np.array(values, np.float32)


@pytest.mark.parametrize(
    ("changes", "refusal", "reason"),
    [
        ({"indptr": ints(0, 2, 1)}, MapOutOfRange, "row boundaries"),
        ({"indptr": ints(1, 1, 2)}, MapOutOfRange, "row boundaries"),
        ({"indptr": ints(0, -(2**31), 2)}, MapOutOfRange, "row boundaries"),
        ({"indptr": ints(0, 1, 5), "ids": ints(*range(5))}, MalformedMap, "5 ids, 2 weights"),
        ({"indptr": ints(0, 1, 6)}, MapOutOfRange, "at most 4"),
        ({"indptr": ints(0, 1)}, MalformedMap, "1 rows end at 1"),
        ({"indptr": ints()}, MalformedMap, "shapes"),
        ({"indptr": np.zeros((3, 1), np.int32)}, MalformedMap, "shapes"),
        ({"ids": ints(0, -1)}, MapOutOfRange, "student ids from -1"),
        ({"ids": ints(0, 1 << 20)}, MapOutOfRange, "to 1048576"),
        ({"ids": ints(0)}, MalformedMap, "1 ids"),
        ({"weights": floats(1, float("nan"))}, MapOutOfRange, "between 0 and 1"),
        ({"weights": floats(1, float("inf"))}, MapOutOfRange, "between 0 and 1"),
        ({"weights": floats(-1, 1)}, MapOutOfRange, "between 0 and 1"),
        ({"weights": floats(1, 0.5)}, MapOutOfRange, "sum to 1"),
        ({"distances": ints(0, -1)}, MapOutOfRange, "-1 exactly"),
        ({"distances": ints(0, -2)}, MapOutOfRange, "-1 exactly"),
        ({"distances": ints(0)}, MalformedMap, "1 distances"),
        ({"distances": np.zeros(2, np.int64)}, MalformedMap, "types"),
        ({"weights": np.ones(2, np.float64)}, MalformedMap, "types"),
    ],
)
def test_impossible_values_are_refused_with_the_reason(
    changes: dict[str, Any], refusal: type[Refusal], reason: str
) -> None:
    honest = weighted([[(0, 1.0)], [(1, 1.0)]])
    assert same(honest, VocabMap.from_bytes(honest.to_bytes()))
    header = Header(teacher_fingerprint="0" * 64, student_fingerprint="1" * 64, method="mined", audit=None)
    with pytest.raises(refusal, match=reason):
        VocabMap.from_bytes(pack(header, columns_of(honest) | changes))


def test_a_row_that_names_an_id_twice_is_refused() -> None:
    with pytest.raises(MapOutOfRange, match="twice"):
        VocabMap.from_bytes(weighted([[(5, 0.5), (5, 0.5)]]).to_bytes())


def rewritten(data: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    """The same columns under a changed header; `change` gets the header with our metadata parsed."""
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = {key: json.loads(text) for key, text in header["__metadata__"].items()}
    change(header)
    if isinstance(header.get("__metadata__"), dict):
        header["__metadata__"] = {key: json.dumps(value) for key, value in header["__metadata__"].items()}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def metadata(header: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = header["__metadata__"]["fedmkt.vocab_map"]
    return found


@pytest.mark.parametrize(
    ("change", "refusal", "reason"),
    [
        (lambda header: metadata(header).update(version=2), UnsupportedMapVersion, "version 2, expected 1"),
        (lambda header: metadata(header).pop("version"), UnsupportedMapVersion, "None"),
        (lambda header: metadata(header).pop("audit"), MalformedMap, "audit"),
        (lambda header: metadata(header).update(teacher_fingerprint="Z" * 64), MalformedMap, "teacher_fingerprint"),
        (lambda header: metadata(header).update(method="guessed"), MalformedMap, "method"),
        (lambda header: metadata(header).update(more=1), MalformedMap, "more"),
        (lambda header: metadata(header).update(audit=[]), MalformedMap, "audit"),
        (lambda header: metadata(header).update(sha256="0" * 64), CorruptMap, "SHA-256"),
        (lambda header: metadata(header).pop("sha256"), CorruptMap, "SHA-256"),
        (lambda header: header.pop("__metadata__"), MalformedMap, "metadata"),
        (lambda header: header.update(__metadata__={}), MalformedMap, "metadata"),
        (lambda header: header["__metadata__"].update(more=1), MalformedMap, "metadata"),
        (lambda header: header["__metadata__"].update({"fedmkt.vocab_map": []}), MalformedMap, "JSON object"),
        (lambda header: header.pop("ids"), MalformedMap, "columns"),
        (lambda header: header.update(ids=3), MalformedMap, "columns"),
        (lambda header: header["ids"].update(dtype="F32"), MalformedMap, "types"),
        (lambda header: header["ids"].update(shape=[3]), MalformedMap, "safetensors"),
        (lambda header: header["ids"].update(data_offsets=[0, 1 << 40]), MalformedMap, "safetensors"),
        (lambda header: header["ids"].update(data_offsets=None), MalformedMap, "safetensors"),
    ],
)
def test_a_changed_header_is_refused_with_the_reason(
    change: Callable[[dict[str, Any]], None], refusal: type[Refusal], reason: str
) -> None:
    data = weighted([[(0, 1.0)], [(1, 1.0)]]).to_bytes()
    VocabMap.from_bytes(rewritten(data, lambda header: None))
    with pytest.raises(refusal, match=reason):
        VocabMap.from_bytes(rewritten(data, change))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 7,
        b"\0" * 8,
        b"\xff" * 64,
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 4) + b"null",
        struct.pack("<Q", 60000) + b"[" * 60000,
        struct.pack("<Q", 3) + b"\xff\xfe\xfd",
        safetensors.numpy.save({"ids": np.zeros(1, np.int32)}, {"fedmkt.vocab_map": "{}"}),
    ],
)
def test_anything_else_is_malformed(data: bytes) -> None:
    with pytest.raises(MalformedMap):
        VocabMap.from_bytes(data)


def test_every_cut_and_every_damaged_byte_is_refused_or_harmless() -> None:
    honest = build_vocab_map(words("a", "bc", "d"), words("a", "b"))
    data = honest.to_bytes()
    for end in range(len(data)):
        with pytest.raises(Refusal):
            VocabMap.from_bytes(data[:end])
    for place in range(len(data)):
        damaged = data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :]
        try:
            read = VocabMap.from_bytes(damaged)
        except Refusal:
            continue
        assert all(np.array_equal(column, columns_of(honest)[name]) for name, column in columns_of(read).items())


def test_more_bytes_than_any_map_has_are_refused_unread() -> None:
    with pytest.raises(MapTooLarge, match=str(MAX_MAP_BYTES)):
        VocabMap.from_bytes(bytes(MAX_MAP_BYTES + 1))


# ------------------------------------------------------------------------------------------------ cache


def test_the_cache_builds_once_and_reads_after_that(tmp_path: Path) -> None:
    teacher, student = words("a", "bc"), words("a", "b")
    folder = tmp_path / "maps"
    calls: list[tuple[int, int]] = []
    built = cached_vocab_map(folder, teacher, student, "mined", progress=lambda *call: calls.append(call))
    assert calls[-1] == (2, 2)
    (file,) = folder.iterdir()
    assert file.name == f"{teacher.fingerprint}-{student.fingerprint}-mined.safetensors"
    calls.clear()
    assert same(built, cached_vocab_map(folder, teacher, student, "mined", progress=lambda *call: calls.append(call)))
    assert calls == []
    other = cached_vocab_map(folder, teacher, student, "retokenized")
    back = cached_vocab_map(folder, student, teacher, "mined")
    assert len(list(folder.iterdir())) == 3
    assert (other.method, back.teacher_fingerprint) == ("retokenized", student.fingerprint)


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "other pair", "other method"])
def test_a_broken_file_in_the_cache_is_replaced(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    teacher, student = words("a", "bc"), words("a", "b")
    built = cached_vocab_map(tmp_path, teacher, student, "mined")
    (file,) = tmp_path.iterdir()
    data = file.read_bytes()
    file.write_bytes(
        {
            "empty": b"",
            "cut": data[:-3],
            "flipped": data[:-1] + bytes([data[-1] ^ 1]),
            "other pair": build_vocab_map(student, teacher).to_bytes(),
            "other method": build_vocab_map(teacher, student, "retokenized").to_bytes(),
        }[damage]
    )
    assert same(built, cached_vocab_map(tmp_path, teacher, student, "mined"))
    assert file.read_bytes() == data
    assert [record.getMessage() for record in caplog.records] == ["vocab_map.cache_refused"]
    assert list(tmp_path.iterdir()) == [file]


def test_a_build_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    def cancel(done: int, total: int) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        cached_vocab_map(tmp_path, words("a", "bc"), words("a", "b"), "mined", progress=cancel)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", METHODS)
def test_progress_counts_teacher_ids(method: MapMethod) -> None:
    teacher, student = small.vocabulary("byte_level"), small.vocabulary("sentencepiece")
    calls: list[tuple[int, int]] = []
    build_vocab_map(teacher, student, method, progress=lambda *call: calls.append(call))
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert {total for _, total in calls} == {teacher.size}
    assert calls[-1] == (teacher.size, teacher.size)


# ------------------------------------------------------------------------------------------------ real vocabularies


@pytest.mark.data
@pytest.mark.parametrize("method", METHODS)
def test_real_maps_keep_their_promises(method: MapMethod, data_dir: Path) -> None:
    teacher, student = (Vocabulary.from_tokenizer(data_dir / "tokenizers" / name) for name in ("gpt2", "llama2"))
    found = build_vocab_map(teacher, student, method)
    assert same(found, VocabMap.from_bytes(found.to_bytes(), teacher=teacher, student=student))
    assert found.best_ids[teacher.eos_id or 0] == student.eos_id
    assert found.audit is not None
    exact = len(({*teacher.tokens} & {*student.tokens}) - {b""}) + 1  # and eos
    assert found.audit.total.exact == exact > 18_000
    assert found.audit.total.unmapped == 0  # Llama-2 has every byte
    produced = student.encode("\nA", add_bos=False).ids[-1]
    assert found.best_ids[teacher.tokens.index(b"A")] == produced != student.tokens.index(b"A")
    if method == "retokenized":
        mapped = np.flatnonzero(found.distances > 0).tolist()
        assert all(teacher.tokens[index].startswith(student.tokens[found.best_ids[index]]) for index in mapped)
        assert len(mapped) == teacher.size - exact


REAL = ("babyllama-105", "babyllama-361", "gpt-neox-20b", "gpt2", "llama2", "llama3", "minimind", "mistral-v3", "opt")


@pytest.mark.data
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", [*REAL, "stories260K"])
def test_a_real_vocabulary_maps_to_every_other(name: str, data_dir: Path) -> None:
    """Re-tokenised to all others and mined to the small one: what both have is carried to itself."""
    teacher = small.real(data_dir / "tokenizers" / name)
    for other in (*REAL, "stories260K"):
        student = small.real(data_dir / "tokenizers" / other)
        common = {*teacher.tokens} & {*student.tokens} - {b""}
        shared = [index for index, token in enumerate(teacher.tokens) if token in common]
        for method in METHODS if other == "stories260K" else METHODS[-1:]:
            found = build_vocab_map(teacher, student, method)
            assert found.best_ids.shape == (teacher.size,)
            assert found.best_ids.max() < student.size
            assert [student.tokens[found.best_ids[index]] for index in shared] == [teacher.tokens[at] for at in shared]
