"""Vocabulary maps against the double loop over all pairs, and how both grow with the vocabularies."""

from collections.abc import Callable

import pytest
from rapidfuzz.distance import Levenshtein

from benchmarks import data
from benchmarks.contenders import Distance, double_loop, prefix_loop
from benchmarks.harness import Growth, Paired, at_most, ratio_at_most
from fedmkt.edit_distance import token_text
from fedmkt.vocab_map import build_vocab_map, prefix_relation
from fedmkt.vocabulary import Vocabulary

SAMPLE = 32  # teacher tokens that the loops are timed on; each costs about the same, so the time is scaled to all
GROWTH_SIZES = (12_500, 25_000, 50_000)


def _loop(teacher: Vocabulary, student: Vocabulary, distance: Distance) -> tuple[Callable[[], object], float]:
    """The double loop on an even sample of the tokens that have no equal, and the share of all that it is."""
    known = set(student.tokens)
    unmatched = [token_text(token) for token in teacher.tokens if token and token not in known]
    sample = unmatched[:: max(1, len(unmatched) // SAMPLE)]
    others = [token_text(token) for token in student.tokens if token]
    return lambda: double_loop(sample, others, distance), len(sample) / len(unmatched)


@pytest.mark.parametrize(
    ("teacher", "student", "goal"),
    [("gpt2", "llama2", 1.2), ("llama3", "gpt-neox-20b", 4.0), ("gpt-neox-20b", "llama3", 4.0)],
)
def bench_mined_map(paired: Paired, teacher: str, student: str, goal: float) -> None:
    pair = data.vocabulary(teacher), data.vocabulary(student)
    loop, share = _loop(*pair, Levenshtein.distance)
    paired(
        f"mined map {teacher} -> {student}, against a double loop with rapidfuzz ({SAMPLE} tokens, scaled)",
        lambda: build_vocab_map(*pair, "mined"),
        loop,
        share=share,
        size=f"{data.shown(teacher)} -> {data.shown(student)}",
        goal=at_most(goal),
    )


def bench_mined_map_against_the_reference_distance(paired: Paired) -> None:
    editdistance = pytest.importorskip("editdistance", reason="no editdistance here: the row stays as it was")
    pair = data.vocabulary("gpt2"), data.vocabulary("llama2")
    loop, share = _loop(*pair, editdistance.eval)
    paired(
        f"mined map gpt2 -> llama2, against a double loop with editdistance ({SAMPLE} tokens, scaled)",
        lambda: build_vocab_map(*pair, "mined"),
        loop,
        share=share,
        size=f"{data.shown('gpt2')} -> {data.shown('llama2')}",
        rounds=3,
        goal=ratio_at_most(1e-3),
    )


@pytest.mark.parametrize("size", GROWTH_SIZES)
def bench_mined_map_growth(paired: Paired, size: int) -> None:
    pair = data.cut_vocabulary("llama3", size), data.cut_vocabulary("gpt-neox-20b", size)
    loop, share = _loop(*pair, Levenshtein.distance)
    kind = "Llama-3 -> GPT-NeoX, both cut" if data.data_folder() else "generated"
    paired(
        f"mined map, both sides {size:,}",
        lambda: build_vocab_map(*pair, "mined"),
        loop,
        share=share,
        size=f"V {size:,} ({kind})",
        growth=Growth("mined map, seconds over V of both sides", size, at_most(1.3)),
    )


def bench_prefix_relation(paired: Paired) -> None:
    teacher, student = data.vocabulary("llama3"), data.vocabulary("gpt-neox-20b")
    sample = [token for token in student.tokens if token][:: student.size // SAMPLE]
    prefixes = [token for token in teacher.tokens if token]
    paired(
        f"prefix relation llama3 -> gpt-neox-20b, against a double loop ({SAMPLE} tokens, scaled)",
        lambda: prefix_relation.__wrapped__(teacher, student),
        lambda: prefix_loop(sample, prefixes),
        share=len(sample) / student.size,
        size=f"{data.shown('llama3')} -> {data.shown('gpt-neox-20b')}",
    )
