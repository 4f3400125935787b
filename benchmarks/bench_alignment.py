"""Which row supervises which, where its mass lands, and what a sender's loss is worth: against Python loops."""

import functools
import itertools
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from rapidfuzz.distance import Levenshtein

from benchmarks import data
from benchmarks.contenders import bucket_loop, cross_entropy_loop, dynamic_programme, project_loop
from benchmarks.harness import Growth, Paired, Results, at_least, at_most, seconds
from benchmarks.random_rows import knowledge_on
from fedmkt.alignment import TokenizedSet, align_rows, align_set, project, tokenize_set
from fedmkt.edit_distance import token_text
from fedmkt.knowledge import Knowledge
from fedmkt.selection import recompute_cross_entropy
from fedmkt.vocab_map import PrefixRelation, build_vocab_map, prefix_relation

TEACHER, STUDENT = "gpt2", "llama2"
PAIR = f"{TEACHER} -> {STUDENT}"
MAX_TOKENS = 1 << 20  # nothing is cut
SET_CHARACTERS = (100_000, 400_000, 1_600_000)
LENGTHS = (64, 128, 256, 512)
PROJECTED_CHARACTERS = (30_000, 120_000, 480_000)
REPEATS = 50  # of a call that takes microseconds
LOOP_ROWS = 2_000  # that a loop is timed on; each costs the same
TOP_K = 64


@functools.cache
def _rows(name: str, characters: int) -> TokenizedSet:
    found = data.public_set(characters)
    return tokenize_set(data.vocabulary(name), found, range(len(found)), MAX_TOKENS)


def _strings(name: str, characters: int, length: int) -> list[str]:
    """The first tokens of the text, as strings."""
    tokens = data.vocabulary(name).tokens
    return [token_text(tokens[index]) for index in _rows(name, characters).gold_ids[:length].tolist()]


# ------------------------------------------------------------------------------------------------ rows


@pytest.mark.parametrize("characters", SET_CHARACTERS)
def bench_row_alignment(paired: Paired, characters: int) -> None:
    teacher, student = _rows(TEACHER, characters), _rows(STUDENT, characters)
    length = 128
    strings = [_strings(name, characters, length) for name in (TEACHER, STUDENT)]
    paired(
        f"row alignment {PAIR}, {student.rows:,} tokens, against a dynamic programme at {length} tokens a sample",
        lambda: align_set(teacher, student),
        lambda: dynamic_programme(strings[0], strings[1], Levenshtein.distance),
        share=length / student.rows,
        size=f"{student.rows:,} tokens in {len(student.samples):,} samples",
        unit="tokens/s",
        amount=student.rows,
        goal=at_least(2e6),
    )


@pytest.mark.parametrize("characters", SET_CHARACTERS)
def bench_row_alignment_growth(results: Results, characters: int) -> None:
    """Every measurement aligns as many tokens in all: a call of less than a millisecond would slip in between whatever
    else the machine does, a longer one would not, and that would pass for growth."""
    teacher, student = _rows(TEACHER, characters), _rows(STUDENT, characters)
    calls = SET_CHARACTERS[-1] // characters

    def ours() -> None:
        for _ in range(calls):
            align_set(teacher, student)

    ours()
    cost, size = statistics.median(seconds(ours) for _ in range(9)) / calls, f"{student.rows:,} tokens"
    results.add(f"row alignment of a set of {student.rows:,} tokens", "s", cost, None, size=size)
    results.grew(Growth("row alignment, seconds over tokens of a set", student.rows, at_most(1.1)), cost, None, size)


@pytest.mark.parametrize("length", LENGTHS)
def bench_alignment_of_one_sample(paired: Paired, length: int) -> None:
    characters = SET_CHARACTERS[0]
    teacher, student = (_rows(name, characters) for name in (TEACHER, STUDENT))
    strings = [_strings(name, characters, length) for name in (TEACHER, STUDENT)]
    ends = [rows.gold_ends[:length] for rows in (teacher, student)]

    def ours() -> None:
        for _ in range(REPEATS):
            align_rows(*ends)

    paired(
        f"alignment of one sample of {length} tokens, against a dynamic programme",
        ours,
        lambda: dynamic_programme(strings[0], strings[1], Levenshtein.distance),
        share=1 / REPEATS,
        size=f"{length} tokens",
        unit="tokens/s",
        amount=length * REPEATS,
        growth=Growth("alignment of one sample, seconds over its tokens", length),
    )


# ------------------------------------------------------------------------------------------------ mass


@dataclass(frozen=True)
class Exchange:
    """Knowledge of both sides on the rows of one text."""

    teacher: Knowledge
    student: Knowledge
    teacher_rows: TokenizedSet
    student_rows: TokenizedSet


@functools.cache
def _exchange(characters: int) -> Exchange:
    rows = [_rows(name, characters) for name in (TEACHER, STUDENT)]
    sizes = [data.vocabulary(name).size for name in (TEACHER, STUDENT)]
    sent, own = (knowledge_on(r, size, top_k=TOP_K, seed=size) for r, size in zip(rows, sizes, strict=True))
    return Exchange(sent, own, *rows)


def _lists(knowledge: Knowledge, *, probabilities: bool) -> list[tuple[list[int], list[float]]]:
    values = np.exp(knowledge.logprobs) if probabilities else knowledge.logprobs
    splits = knowledge.entry_splits[: LOOP_ROWS + 1].tolist()
    return [(knowledge.token_ids[a:b].tolist(), values[a:b].tolist()) for a, b in itertools.pairwise(splits)]


@pytest.mark.parametrize("characters", PROJECTED_CHARACTERS)
def bench_projection_through_a_map(paired: Paired, characters: int) -> None:
    exchange = _exchange(characters)
    vocab_map = build_vocab_map(data.vocabulary(TEACHER), data.vocabulary(STUDENT), "retokenized")
    ours = _projection(exchange, vocab_map_only=True)
    lists, best = _lists(exchange.teacher, probabilities=True), vocab_map.best_ids.tolist()
    rows = exchange.student_rows.rows
    paired(
        f"projection of top-{TOP_K} rows through a map, {rows:,} rows, against dictionaries",
        ours,
        lambda: project_loop(lists, best),
        share=len(lists) / rows,
        size=f"{PAIR}, {rows:,} rows",
        unit="rows/s",
        amount=rows,
        goal=at_least(1e5),
        growth=Growth("projection through a map, seconds over rows", rows, at_most(1.1)),
    )


def bench_projection_through_buckets(paired: Paired) -> None:
    exchange = _exchange(PROJECTED_CHARACTERS[1])
    teacher, student = data.vocabulary(TEACHER), data.vocabulary(STUDENT)
    vocab_map, relation = build_vocab_map(teacher, student, "retokenized"), prefix_relation(teacher, student)
    prefixes = _prefixes(relation)
    lists = [_lists(side, probabilities=True) for side in (exchange.teacher, exchange.student)]
    rows = exchange.student_rows.rows
    paired(
        f"projection of top-{TOP_K} rows through prefix buckets, against dictionaries",
        _projection(exchange, vocab_map_only=False),
        lambda: bucket_loop(lists[0], lists[1], prefixes, vocab_map.best_ids.tolist()),
        share=LOOP_ROWS / rows,
        size=f"{PAIR}, {rows:,} rows",
        unit="rows/s",
        amount=rows,
        goal=at_least(1e5),
    )


def _prefixes(relation: PrefixRelation) -> list[list[int]]:
    """The teacher ids that begin each student token."""
    by_place = np.argsort(relation.places).tolist()
    found: list[list[int]] = [[] for _ in by_place]
    for teacher, run in enumerate(zip(relation.starts.tolist(), relation.stops.tolist(), strict=True)):
        for place in range(*run):
            found[by_place[place]].append(teacher)
    return found


def _projection(exchange: Exchange, *, vocab_map_only: bool) -> Callable[[], object]:
    teacher, student = data.vocabulary(TEACHER), data.vocabulary(STUDENT)
    vocab_map = build_vocab_map(teacher, student, "retokenized")
    relation = None if vocab_map_only else prefix_relation(teacher, student)
    own = None if vocab_map_only else exchange.student
    sides = exchange.teacher, exchange.teacher_rows, exchange.student_rows, vocab_map
    return lambda: project(*sides, relation=relation, student_knowledge=own)


# ------------------------------------------------------------------------------------------------ selection


def bench_recomputed_cross_entropy(paired: Paired) -> None:
    exchange = _exchange(PROJECTED_CHARACTERS[1])
    sent, rows = exchange.teacher, exchange.teacher_rows
    lists = _lists(sent, probabilities=False)
    gold, stated = rows.gold_ids[:LOOP_ROWS].tolist(), sent.gold_logprobs[:LOOP_ROWS].tolist()
    paired(
        f"cross-entropy recomputed from top-{TOP_K} rows and checked, against dictionaries",
        lambda: recompute_cross_entropy(sent, rows),
        lambda: cross_entropy_loop(lists, gold, stated),
        share=LOOP_ROWS / rows.rows,
        size=f"{TEACHER}, {rows.rows:,} rows",
        unit="rows/s",
        amount=rows.rows,
    )
