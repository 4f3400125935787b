"""Peak memory of one step: `python -m benchmarks.memory FORM B T V K D CHUNK` in a process of its own.

The kernel counts: after a small step of the same form has loaded every library and thread, the process resets its
high-water mark (VmHWM in /proc/self/status, by writing 5 to /proc/self/clear_refs), notes what it holds, builds the
logits (or hidden states) and the batch's targets, runs the step, and reports how far the mark rose. So everything that
the step needs counts, in torch, numpy or C alike, and nothing that was there before: libraries, the head's weights, and
the lesson or the teachers' top-k rows. glibc is told to give every block of 256 KiB or more back at once: how much it
would keep differs from run to run by more than what is measured. `ru_maxrss` would not do: a child inherits its
parent's.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.contenders import dense_step, plain_cross_entropy
from benchmarks.steps import (
    StepShape,
    chunked_step,
    cross_entropy_head_step,
    dense_head_step,
    lesson_items,
    random_gold,
    random_logits,
    random_teachings,
    sparse_step,
)

REPOSITORY = Path(__file__).resolve().parent.parent
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
MIB = 1 << 20
STEADY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 18), "OMP_NUM_THREADS": "1"}


def peak_mib(form: str, shape: StepShape, chunk_rows: int = 0) -> float:
    """MiB that a step of the form needs at most, measured in a fresh process. Needs Linux."""
    numbers = shape.samples, shape.tokens, shape.vocabulary, shape.kept, shape.width, chunk_rows
    command = [sys.executable, "-m", "benchmarks.memory", form, *map(str, numbers)]
    environment = os.environ | STEADY
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, check=True, capture_output=True, text=True, timeout=120
    )
    return float(done.stdout)


def measurable() -> bool:
    return CLEAR.exists()


def _main(form: str, *numbers: str) -> None:
    samples, tokens, vocabulary, kept, width, chunk_rows = map(int, numbers)
    shape = StepShape(samples, tokens, vocabulary, kept, width=width)
    head = torch.randn(vocabulary, width) if width else torch.empty(0)
    FORMS[form](StepShape(1, 8, vocabulary, kept, width=width), head, chunk_rows)()
    step = FORMS[form](shape, head, chunk_rows)
    CLEAR.write_text("5")
    before = _status("VmRSS")
    step()
    print((_status("VmHWM") - before) / MIB)


def _status(name: str) -> int:
    """Bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


# ------------------------------------------------------------------------------------------------ forms


Form = Callable[[StepShape, Tensor, int], Callable[[], None]]  # prepares what is not counted, returns the step


def _hidden(shape: StepShape) -> Tensor:
    return torch.randn(shape.rows, shape.width).requires_grad_()


def _sparse(shape: StepShape, _: Tensor, __: int) -> Callable[[], None]:
    gold, items = random_gold(shape), lesson_items(shape, random_teachings(shape))
    return lambda: sparse_step(random_logits(shape), gold, items)


def _cross_entropy(shape: StepShape, _: Tensor, __: int) -> Callable[[], None]:
    gold = random_gold(shape)
    return lambda: plain_cross_entropy(random_logits(shape), gold)


def _dense(shape: StepShape, _: Tensor, __: int) -> Callable[[], None]:
    gold, taught = random_gold(shape), random_teachings(shape)
    return lambda: dense_step(random_logits(shape), gold, taught.ids, taught.probs, taught.losses)


def _chunked(shape: StepShape, head: Tensor, chunk_rows: int) -> Callable[[], None]:
    gold, items = random_gold(shape), lesson_items(shape, random_teachings(shape))
    return lambda: chunked_step(_hidden(shape), head, gold, items, chunk_rows or None)


def _dense_head(shape: StepShape, head: Tensor, _: int) -> Callable[[], None]:
    gold, taught = random_gold(shape), random_teachings(shape)
    return lambda: dense_head_step(_hidden(shape), head, gold, taught)


def _cross_entropy_head(shape: StepShape, head: Tensor, _: int) -> Callable[[], None]:
    gold = random_gold(shape)
    return lambda: cross_entropy_head_step(_hidden(shape), head, gold)


FORMS: dict[str, Form] = {
    "sparse": _sparse,
    "cross_entropy": _cross_entropy,
    "dense": _dense,
    "chunked": _chunked,
    "dense_head": _dense_head,
    "cross_entropy_head": _cross_entropy_head,
}

if __name__ == "__main__":
    _main(*sys.argv[1:])
