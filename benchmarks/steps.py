"""One distillation step in its several forms, on random tensors: what bench_loss.py times and memory.py weighs.

B samples, T tokens, N = B x T rows, V vocabulary, K kept entries, D width.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.contenders import dense_loss, dense_targets
from fedmkt.alignment import SparseTargets
from fedmkt.ml.batches import TokenSample
from fedmkt.ml.losses import chunked_losses, gold_and_sparse_losses
from fedmkt.ml.plan import Item, Part, row_targets

CPU = torch.device("cpu")


@dataclass(frozen=True)
class StepShape:
    samples: int = 4
    tokens: int = 256
    vocabulary: int = 32_000
    kept: int = 128
    teachers: int = 4
    width: int = 0  # of the hidden states, for the forms that go through a head

    @property
    def rows(self) -> int:
        return self.samples * self.tokens

    def __str__(self) -> str:
        return f"B {self.samples}, T {self.tokens}, V {self.vocabulary:,}, k {self.kept}, {self.teachers} teachers"


@dataclass(frozen=True)
class Teachings:
    """What all teachers offer: ids int64, probs float32, each (B, T, K) a teacher; losses (teachers, B)."""

    ids: list[Tensor]
    probs: list[Tensor]
    losses: Tensor


def random_logits(shape: StepShape) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(shape.rows, shape.vocabulary).requires_grad_()


def random_gold(shape: StepShape) -> Tensor:
    return torch.randint(shape.vocabulary, (shape.rows,), generator=torch.Generator().manual_seed(1))


def random_teachings(shape: StepShape) -> Teachings:
    """Ascending ids without repeats; 97 % of each row's mass is kept."""
    rng = np.random.default_rng(2)
    steps = rng.integers(1, shape.vocabulary // shape.kept, (shape.teachers, shape.samples, shape.tokens, shape.kept))
    ids = np.cumsum(steps, axis=-1) - 1
    weights = rng.exponential(size=ids.shape)
    probs = (0.97 * weights / weights.sum(axis=-1, keepdims=True)).astype(np.float32)
    losses = torch.from_numpy(rng.random((shape.teachers, shape.samples)))
    return Teachings(list(torch.from_numpy(ids)), list(torch.from_numpy(probs)), losses)


def lesson_items(shape: StepShape, teachings: Teachings) -> list[Item]:
    """The same step as a lesson holds it: the selected teacher's sparse rows, and nothing of the others."""
    best = teachings.losses.argmin(dim=0).tolist()
    ids = np.concatenate([teachings.ids[teacher][sample].numpy() for sample, teacher in enumerate(best)])
    probs = np.concatenate([teachings.probs[teacher][sample].numpy() for sample, teacher in enumerate(best)])
    targets = SparseTargets(
        row_splits=np.arange(0, shape.rows + 1, shape.tokens, dtype=np.int32),
        splits=np.arange(0, ids.size + 1, shape.kept, dtype=np.int32),
        ids=ids.ravel().astype(np.int32),
        probs=probs.ravel(),
        residual=(1 - probs.sum(axis=1)).astype(np.float32),
        supervised=np.ones(shape.rows, dtype=bool),
    )
    tokens = np.zeros(shape.tokens + 1, dtype=np.int32)
    rows = np.arange(1, shape.tokens + 1, dtype=np.int32)
    samples = [TokenSample(str(index), tokens, tokens, rows) for index in range(shape.samples)]
    part = Part(samples, gold_weight=0.5, targets=targets)
    return [Item(part, index, 1 / shape.rows) for index in range(shape.samples)]


# ------------------------------------------------------------------------------------------------ the forms


def sparse_step(logits: Tensor, gold: Tensor, items: list[Item]) -> None:
    """Ours on existing logits: targets of the batch from the lesson, loss, gradient."""
    logits.grad = None
    targets = row_targets(items, CPU)
    nll, distilled = gold_and_sparse_losses(logits, gold, targets.ids, targets.probs, targets.residual)
    torch.autograd.backward((targets.gold_weight * nll + targets.soft_weight * distilled).sum())


def chunked_step(hidden: Tensor, head: Tensor, gold: Tensor, items: list[Item], chunk_rows: int | None = None) -> None:
    """Ours through the head: hidden (N, D) gets a gradient, head (V, D) is frozen, as under LoRA."""
    hidden.grad = None
    targets = row_targets(items, CPU)
    soft = targets.ids, targets.probs, targets.residual
    nll, distilled = chunked_losses(hidden, head, None, gold, *soft, chunk_rows=chunk_rows)
    torch.autograd.backward((targets.gold_weight * nll + targets.soft_weight * distilled).sum())


def dense_head_step(hidden: Tensor, head: Tensor, gold: Tensor, teachings: Teachings) -> None:
    """The dense form through the head: all logits, and dense targets of the one chosen teacher of each sample."""
    hidden.grad = None
    best = teachings.losses.argmin(dim=0).tolist()
    ids = torch.stack([teachings.ids[teacher][sample] for sample, teacher in enumerate(best)])
    probs = torch.stack([teachings.probs[teacher][sample] for sample, teacher in enumerate(best)])
    chosen = teachings.losses.min(dim=0, keepdim=True).values
    logits = F.linear(hidden, head)
    targets = dense_targets([ids], [probs], chosen, head.shape[0]).flatten(0, 1)
    torch.autograd.backward(dense_loss(logits, gold, targets))


def cross_entropy_head_step(hidden: Tensor, head: Tensor, gold: Tensor) -> None:
    """Plain supervised training through the head."""
    hidden.grad = None
    torch.autograd.backward(F.cross_entropy(F.linear(hidden, head), gold))
