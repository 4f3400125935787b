"""One distillation step: time and peak memory, on existing logits and through the LM head."""

import pytest
import torch

from benchmarks.contenders import dense_step, plain_cross_entropy
from benchmarks.harness import Growth, Paired, Results, at_most, ratio_at_most
from benchmarks.memory import measurable, peak_mib
from benchmarks.steps import (
    StepShape,
    chunked_step,
    dense_head_step,
    lesson_items,
    random_gold,
    random_logits,
    random_teachings,
    sparse_step,
)

STEP = StepShape()
VOCABULARIES = (8_000, 16_000, 32_000)
WIDE = 128_256
HEAD_WIDTH = 256
LENGTHS = (64, 128, 256)
CHUNKS = (64, 128, 256)

needs_linux = pytest.mark.skipif(not measurable(), reason="peak memory is read from Linux's /proc")


# ------------------------------------------------------------------------------------------------ on existing logits


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def bench_step_against_cross_entropy(paired: Paired, vocabulary: int) -> None:
    shape = StepShape(vocabulary=vocabulary)
    logits, gold = random_logits(shape), random_gold(shape)
    items = lesson_items(shape, random_teachings(shape))
    paired(
        f"KD step at V {vocabulary:,}, against plain cross-entropy on the same logits",
        lambda: sparse_step(logits, gold, items),
        lambda: plain_cross_entropy(logits, gold),
        size=str(shape),
        rounds=15,
        goal=ratio_at_most(1.2),
        growth=Growth("KD step, seconds over V", vocabulary),
    )


def bench_step_against_dense_targets(paired: Paired) -> None:
    logits, gold, teachings = random_logits(STEP), random_gold(STEP), random_teachings(STEP)
    items = lesson_items(STEP, teachings)
    paired(
        "KD step, against dense [B, T, V] targets of every teacher, stacked and gathered",
        lambda: sparse_step(logits, gold, items),
        lambda: dense_step(logits, gold, teachings.ids, teachings.probs, teachings.losses),
        size=str(STEP),
    )


@needs_linux
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def bench_peak_of_a_step(results: Results, vocabulary: int) -> None:
    shape = StepShape(vocabulary=vocabulary)
    ours, theirs = peak_mib("sparse", shape), peak_mib("cross_entropy", shape)
    name = f"peak memory of a KD step at V {vocabulary:,}, against plain cross-entropy"
    results.add(name, "MiB", ours, theirs, size=str(shape), goal=ratio_at_most(1.1))
    results.grew(Growth("peak memory of a KD step over V", vocabulary), ours, theirs, f"V {vocabulary:,}")


@needs_linux
def bench_peak_of_a_step_against_dense_targets(results: Results) -> None:
    name = "peak memory of a KD step, against dense [B, T, V] targets, stacked and gathered"
    results.add(name, "MiB", peak_mib("sparse", STEP), peak_mib("dense", STEP), size=str(STEP))


# ------------------------------------------------------------------------------------------------ through the head


def _wide(tokens: int) -> StepShape:
    return StepShape(tokens=tokens, vocabulary=WIDE, width=HEAD_WIDTH)


@needs_linux
@pytest.mark.parametrize("tokens", LENGTHS)
def bench_peak_through_the_head_over_length(results: Results, tokens: int) -> None:
    shape = _wide(tokens)
    size = f"{shape.rows:,} rows, V {WIDE:,}, D {HEAD_WIDTH}"
    ours, theirs = peak_mib("chunked", shape), peak_mib("dense_head", shape)
    results.add(
        f"peak memory through the head, {shape.rows:,} rows, against dense logits and targets",
        "MiB",
        ours,
        theirs,
        size=size,
        goal=ratio_at_most(0.25),
    )
    growth = Growth("peak memory through the head over rows, chunk fixed", shape.rows, at_most(0.5))
    results.grew(growth, ours, theirs, size)


@needs_linux
@pytest.mark.parametrize("chunk_rows", CHUNKS)
def bench_peak_through_the_head_over_chunk(results: Results, chunk_rows: int) -> None:
    shape = _wide(LENGTHS[1])
    ours = peak_mib("chunked", shape, chunk_rows)
    size = f"chunk {chunk_rows}, {shape.rows:,} rows, V {WIDE:,}"
    results.add(f"peak memory through the head in chunks of {chunk_rows} rows", "MiB", ours, None, size=size)
    results.grew(Growth("peak memory through the head over chunk", chunk_rows), ours, None, size)


def bench_step_through_the_head(paired: Paired) -> None:
    shape = _wide(LENGTHS[0])
    hidden, head, gold = torch.randn(shape.rows, HEAD_WIDTH), torch.randn(WIDE, HEAD_WIDTH), random_gold(shape)
    hidden.requires_grad_()
    teachings = random_teachings(shape)
    items = lesson_items(shape, teachings)
    paired(
        "KD step in chunks through the head, against dense logits and targets",
        lambda: chunked_step(hidden, head, gold, items),
        lambda: dense_head_step(hidden, head, gold, teachings),
        size=f"{shape.rows:,} rows, V {WIDE:,}, D {HEAD_WIDTH}",
        rounds=3,
    )


@needs_linux
def bench_peak_through_the_head_against_cross_entropy(results: Results) -> None:
    shape = _wide(LENGTHS[1])
    results.add(
        "peak memory through the head, against plain cross-entropy through the head",
        "MiB",
        peak_mib("chunked", shape),
        peak_mib("cross_entropy_head", shape),
        size=f"{shape.rows:,} rows, V {WIDE:,}, D {HEAD_WIDTH}",
    )
