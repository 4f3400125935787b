"""The nearest string under Levenshtein distance: literals, a slow twin, every way through the search, and its edges."""

import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist

from fedmkt import edit_bags, edit_distance, edit_index, edit_patterns
from fedmkt.edit_distance import nearest, token_text
from fedmkt.vocabulary import Vocabulary

Setter = Callable[..., None]


def textbook_distance(first: str, second: str) -> int:
    """Wagner and Fischer's table, cell by cell."""
    row = list(range(len(second) + 1))
    for i, left in enumerate(first, 1):
        above, row = row, [i]
        for j, right in enumerate(second, 1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (left != right)))
    return row[-1]


def slow_nearest(queries: Sequence[str], candidates: Sequence[str]) -> tuple[list[int], list[int]]:
    winners, distances = [], []
    for query in queries:
        found = [(Levenshtein.distance(query, other), other, index) for index, other in enumerate(candidates)]
        best = min(found)
        winners.append(best[2])
        distances.append(best[0])
    return winners, distances


def lists(found: tuple[NDArray[np.int32], NDArray[np.int32]]) -> tuple[list[int], list[int]]:
    assert found[0].dtype == found[1].dtype == np.int32
    return found[0].tolist(), found[1].tolist()


def random_texts(seed: int, count: int, alphabet: str, longest: int) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices(alphabet, k=rng.randint(0, longest))) for _ in range(count)]


@pytest.fixture(params=["as chosen", "by patterns", "by bags"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both methods must give the same answers, so each is made to do all the work in turn."""
    if request.param == "by patterns":
        monkeypatch.setattr(edit_distance, "PATTERN_NS", 0.0)
    if request.param == "by bags":
        monkeypatch.setattr(edit_distance, "PATTERN_NS", float("inf"))
    return str(request.param)


# ------------------------------------------------------------------------------------------------ literals


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(
    ("query", "candidates", "winner", "distance"),
    [
        ("cat", ["dog", "cat", "cut"], 1, 0),
        ("cat", ["dog", "cut", "cot"], 2, 1),  # two at distance 1: "cot" < "cut"
        ("cat", ["dog", "chat"], 1, 1),
        ("cat", ["dog", "at"], 1, 1),
        ("ab", ["ba", "xyz"], 0, 2),  # a transposition is two edits
        ("kitten", ["sitting", "mittens and gloves"], 0, 3),
        ("saturday", ["sunday", "wednesday"], 0, 3),
        ("intention", ["execution", "intermediate"], 0, 5),
        ("abc", ["xyz", "x", "wxyz"], 1, 3),  # nothing in common: every candidate of up to 3 is at 3, "x" is first
        ("é", ["e", "ê", "xx"], 0, 1),  # code points, not bytes
        ("日本語", ["日本", "本語", "x"], 0, 1),
        ("a", ["", "bb"], 0, 1),
        ("", ["bb", "c", "a"], 2, 1),
        ("", ["", "a"], 0, 0),
        ("flaw", ["lawn", "flaws and more"], 0, 2),
        ("aaaaaaaa", ["aaaa", "aaaaaaaaaaaaa"], 0, 4),
        ("12345678901234567890", ["1234567890", "x"], 0, 10),
    ],
)
def test_the_nearest_candidate_is_found(query: str, candidates: list[str], winner: int, distance: int) -> None:
    assert lists(nearest([query], candidates)) == ([winner], [distance])


def test_equal_candidates_count_by_their_smallest_index() -> None:
    assert lists(nearest(["b", "bx"], ["c", "b", "a", "b", "b"])) == ([1, 1], [0, 1])


def test_ties_go_by_code_point_even_beyond_the_basic_plane() -> None:
    candidates = ["x😀", "x￿", "xz"]  # UTF-16 would put the emoji first
    assert lists(nearest(["x"], candidates)) == ([2], [1])
    assert lists(nearest(["x"], candidates[:2])) == ([1], [1])


def test_no_queries_need_no_candidates() -> None:
    assert lists(nearest([], [])) == ([], [])
    assert lists(nearest([], ["a"])) == ([], [])


def test_queries_without_candidates_are_refused() -> None:
    with pytest.raises(ValueError, match="2 strings to look up, but no candidates"):
        nearest(["a", "b"], [])


def test_different_bytes_are_always_different_texts() -> None:
    tokens = [bytes([value]) for value in range(256)]
    tokens += ["é".encode(), b"\xed\xb3\xa9", "日".encode(), "日".encode()[:2], b"\xff\xfe", b"ab\xc3", b""]
    texts = [token_text(token) for token in tokens]
    assert len(set(texts)) == len(tokens)
    assert token_text("日本".encode()) == "日本"
    assert token_text(b"a\xc3") == "a\udcc3"
    assert [text.encode("utf-8", "surrogateescape") for text in texts] == tokens


# ------------------------------------------------------------------------------------------------ the slow twin


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(
    ("seed", "alphabet", "longest"), [(1, "ab", 9), (2, "abc", 7), (3, "abcdefgh", 12), (4, "aé日😀\udcff", 6)]
)
def test_random_strings_agree_with_brute_force(seed: int, alphabet: str, longest: int) -> None:
    queries = random_texts(seed, 300, alphabet + "xy", longest)
    candidates = random_texts(seed + 100, 400, alphabet, longest)
    assert lists(nearest(queries, candidates)) == slow_nearest(queries, candidates)


@pytest.mark.usefixtures("way")
def test_few_candidates_far_away_agree_with_brute_force() -> None:
    queries = random_texts(5, 150, "abcdefghijklmnopqrstuvwxyz", 20)
    candidates = random_texts(6, 7, "abcdefghijklmnopqrstuvwxyz0", 30)
    assert lists(nearest(queries, candidates)) == slow_nearest(queries, candidates)


@pytest.mark.usefixtures("way")
def test_long_strings_agree_with_brute_force() -> None:
    rng = random.Random(7)
    candidates = [" " * length for length in (1, 2, 4, 39, 40, 41, 64, 65, 254, 255, 256, 300)]
    candidates += [*random_texts(8, 60, "abc ", 80), "=" * 128, "ab" * 150]
    queries = [" " * length for length in (3, 38, 42, 60, 100, 257, 290, 400)] + ["-" * 70, "-" * 300, "=-" * 40]
    queries += random_texts(9, 40, "abc -", 90)
    for text in candidates[-20:]:
        place = rng.randrange(len(text) + 1)
        queries.append(text[:place] + "z" + text[place + 2 :])
    assert lists(nearest(queries, candidates)) == slow_nearest(queries, candidates)


def test_a_long_query_is_compared_with_short_candidates_only() -> None:
    assert lists(nearest(["q" * 500], ["b", "a", "ccc"])) == ([1], [500])


@pytest.mark.parametrize("table_rows", [0, 6, 1000])
@pytest.mark.parametrize("seed", range(3))
def test_small_buffers_do_not_change_the_answer(seed: int, table_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edit_distance, "PATTERN_NS", 0.0)
    monkeypatch.setattr(edit_patterns, "_HELD_PATTERNS", 50)
    monkeypatch.setattr(edit_patterns, "_CHUNK_PATTERNS", 64)
    for module, name, value in (
        (edit_bags, "GROUP_QUERIES", 3),
        (edit_bags, "PAIRS_AT_ONCE", 16),
        (edit_bags, "MANY_PAIRS", 8),
        (edit_index, "SPARSE_SHARE", 3),
        (edit_index, "ROWS_BYTES", 900),
        (edit_index, "TABLE_BYTES", 130 * table_rows),
    ):
        monkeypatch.setattr(module, name, value)
    queries = random_texts(seed, 120, "abcdxyz", 11)
    candidates = random_texts(seed + 50, 130, "abcde", 10)
    assert lists(nearest(queries, candidates)) == slow_nearest(queries, candidates)


@pytest.mark.parametrize("values", [1, 2, 3])
def test_colliding_hashes_cost_time_but_never_the_answer(values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one, two or three different character values almost every pattern collides with a stranger's."""

    def weak(codes: NDArray[np.uint32]) -> NDArray[np.uint64]:
        return (codes % values + 1).astype(np.uint64)

    monkeypatch.setattr(edit_distance, "PATTERN_NS", 0.0)
    monkeypatch.setattr(edit_distance, "character_values", weak)
    queries = random_texts(11, 200, "abcdefgh", 8)
    candidates = random_texts(12, 200, "abcdefgh", 8)
    assert lists(nearest(queries, candidates)) == slow_nearest(queries, candidates)


def test_the_table_of_many_pairs_is_the_textbook_table() -> None:
    rng = random.Random(13)
    pairs = [("".join(rng.choices("abc", k=9)), "".join(rng.choices("abc", k=rng.randint(0, 12)))) for _ in range(200)]
    queries = np.array([[ord(character) for character in query] for query, _ in pairs], np.uint16).T
    candidates = np.zeros((12, len(pairs)), np.uint16)
    for column, (_, other) in enumerate(pairs):
        candidates[: len(other), column] = [ord(character) for character in other]
    lengths = np.array([len(other) for _, other in pairs])
    expected = [textbook_distance(*pair) for pair in pairs]
    assert edit_bags.levenshtein(queries, candidates, lengths).tolist() == expected
    assert [Levenshtein.distance(*pair) for pair in pairs] == expected  # the twin's own yardstick


@pytest.mark.parametrize(("deleted", "inserted", "masked"), [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1), (2, 0, 1)])
def test_patterns_meet_exactly_when_the_edits_lead_from_one_to_the_other(
    deleted: int, inserted: int, masked: int
) -> None:
    def patterns(text: str, gone: int) -> set[str]:
        found = {text}
        for kind in [""] * gone + ["*"] * masked:
            found = {t[:i] + kind + t[i + 1 :] for t in found for i in range(len(t)) if kind == "" or t[i] != "*"}
        return {text for text in found if text.count("*") == masked}

    def block(texts: list[str]) -> edit_patterns.Block:
        codes = np.array([[ord(character) for character in text] for text in texts], np.uint32).T
        return edit_patterns.Block(np.arange(len(texts)), edit_patterns.character_values(codes))

    rng = random.Random(deleted * 9 + inserted * 3 + masked)
    queries = ["".join(rng.choices("abcd", k=5)) for _ in range(60)]
    candidates = sorted("".join(rng.choices("abcd", k=5 - deleted + inserted)) for _ in range(60))
    best = np.full(len(queries), edit_patterns.NOBODY)
    edit_patterns.join(block(queries), block(candidates), (deleted, inserted), masked, best, lambda: None)
    for query, winner in zip(queries, best.tolist(), strict=True):
        own = patterns(query, deleted)
        meeting = [rank for rank, other in enumerate(candidates) if own & patterns(other, inserted)]
        assert winner == min(meeting, default=edit_patterns.NOBODY)


# ------------------------------------------------------------------------------------------------ behaviour


def test_progress_grows_to_the_number_of_queries() -> None:
    queries, candidates = random_texts(21, 400, "abcdef", 10), random_texts(22, 300, "abcdef", 10)
    calls: list[tuple[int, int]] = []
    nearest(queries, candidates, progress=lambda done, total: calls.append((done, total)))
    assert len(calls) > 3
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert {total for _, total in calls} == {400}
    assert calls[-1] == (400, 400)


def test_an_error_in_progress_stops_the_search() -> None:
    def cancel(done: int, total: int) -> None:
        raise InterruptedError(f"{done} of {total}")

    with pytest.raises(InterruptedError):
        nearest(["abc"], ["xyz"], progress=cancel)


def test_every_process_finds_the_same() -> None:
    script = (
        "import random, hashlib; from fedmkt.edit_distance import nearest; rng = random.Random(3);"
        "texts = [''.join(rng.choices('abcdé日', k=rng.randint(1, 9))) for _ in range(1500)];"
        "found = nearest(texts[:700], texts[700:]);"
        "print(hashlib.sha256(b''.join(column.tobytes() for column in found)).hexdigest())"
    )
    outputs = set()
    for seed in ("0", "1"):
        ran = subprocess.run(
            [sys.executable, "-c", script], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        )
        outputs.add(ran.stdout)
    assert len(outputs) == 1


# ------------------------------------------------------------------------------------------------ real vocabularies


@pytest.mark.data
@pytest.mark.parametrize(("teacher", "student"), [("llama3", "gpt-neox-20b"), ("gpt2", "llama2"), ("llama2", "gpt2")])
def test_real_tokens_agree_with_brute_force(teacher: str, student: str, data_dir: Path) -> None:
    queries, candidates = (
        [token_text(token) for token in Vocabulary.from_tokenizer(data_dir / "tokenizers" / name).tokens if token]
        for name in (teacher, student)
    )
    known = set(candidates)
    rng = random.Random(f"{teacher} {student}")
    unequal = rng.sample([text for text in queries if text not in known], 12_000)
    sample = unequal[:150]
    winners, distances = nearest(unequal, candidates)
    order = sorted(range(len(candidates)), key=lambda index: (candidates[index], index))
    table = cdist(sample, [candidates[index] for index in order], scorer=Levenshtein.distance, dtype=np.uint16)
    assert distances[:150].tolist() == table.min(axis=1).tolist()
    assert winners[:150].tolist() == [order[place] for place in table.argmin(axis=1).tolist()]
    assert len(set(distances.tolist())) > 8  # every way through the search was taken
