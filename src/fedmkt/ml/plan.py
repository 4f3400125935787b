"""What is trained on and in which order: parts of a batch, and how much each of their rows weighs.

A batch holds samples of one or two parts (public; private replay). With w the weight of a part, n the response rows
that it has in the batch, and lambda its gold weight, a row weighs w * lambda / n in the gold loss and, where it has a
soft target, w * (1 - lambda) / n in the distillation loss.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmkt.alignment import SparseTargets
from fedmkt.errors import Refusal
from fedmkt.ml.batches import TokenSample


class NothingToLearn(Refusal):
    code: ClassVar[str] = "training.empty"
    title: ClassVar[str] = "No sample has a response to learn from"


class LessonRowsDiffer(Refusal):
    code: ClassVar[str] = "training.rows_differ"
    title: ClassVar[str] = "A lesson does not have the rows that the text gives"


@dataclass(frozen=True)
class Part:
    """Samples that share a weight. With `targets`, sample i of `samples` is sample i of the targets."""

    samples: Sequence[TokenSample]
    weight: float = 1.0
    gold_weight: float = 1.0
    targets: SparseTargets | None = None

    def __post_init__(self) -> None:
        if not any(len(sample.rows) for sample in self.samples):
            raise NothingToLearn(
                f"none of {len(self.samples)} samples has a response within the token limit; raise max_tokens"
            )
        if self.targets is not None:
            found = np.array([len(sample.rows) for sample in self.samples])
            if not np.array_equal(found, np.diff(self.targets.row_splits)):
                raise LessonRowsDiffer(
                    f"the texts give {found.sum()} rows in {len(found)} samples, the lesson has "
                    f"{self.targets.row_splits[-1]} in {len(self.targets.row_splits) - 1}; prepare it with the same "
                    "vocabulary and max_tokens"
                )


@dataclass(frozen=True, slots=True)
class Item:
    """A sample of a batch: its place in the part, and the weight of each of its rows."""

    part: Part
    place: int
    row_weight: float

    @property
    def sample(self) -> TokenSample:
        return self.part.samples[self.place]


class RowTargets(NamedTuple):
    """Per response row of a batch: weights (R,), ids int64 (R, K) padded with -1, probs (R, K), residual (R,)."""

    gold_weight: Tensor
    soft_weight: Tensor
    ids: Tensor
    probs: Tensor
    residual: Tensor


def step_count(samples: int, batch_size: int, epochs: float) -> int:
    """Steps that `epochs` passes over `samples` take; a fraction of a pass rounds up to whole samples, then steps."""
    return math.ceil(_drawn(samples, epochs) / batch_size)


def _drawn(samples: int, epochs: float) -> int:
    return math.ceil(samples * epochs - 1e-9)


def batches(parts: Sequence[Part], batch_size: int, epochs: float, rng: np.random.Generator) -> Iterator[list[Item]]:
    """Every step's items. The first part sets the number of steps; the others give `batch_size` samples to each.

    A part's samples come in a fresh random order on every pass.
    """
    drawn = _drawn(len(parts[0].samples), epochs)
    steps = step_count(len(parts[0].samples), batch_size, epochs)
    orders = [_order(len(parts[0].samples), drawn, rng)]
    orders += [_order(len(part.samples), steps * batch_size, rng) for part in parts[1:]]
    for step in range(steps):
        items: list[Item] = []
        for part, order in zip(parts, orders, strict=True):
            chosen = order[step * batch_size : (step + 1) * batch_size].tolist()
            rows = sum(len(part.samples[place].rows) for place in chosen)
            items += [Item(part, place, part.weight / rows) for place in chosen if len(part.samples[place].rows)]
        yield items


def _order(samples: int, drawn: int, rng: np.random.Generator) -> NDArray[np.int64]:
    passes = [rng.permutation(samples) for _ in range(-(-drawn // max(1, samples)))]
    return np.concatenate(passes or [np.zeros(0, dtype=np.int64)])[:drawn]


def row_targets(items: Sequence[Item], device: torch.device) -> RowTargets:
    """Weights and soft targets of the items' rows, one item after the other."""
    counts = [len(item.sample.rows) for item in items]
    gold = np.repeat([item.row_weight * item.part.gold_weight for item in items], counts)
    soft = np.repeat([item.row_weight * (1 - item.part.gold_weight) for item in items], counts)
    ids, probs, residual, supervised = _soft_rows(items, counts)
    columns = (gold, soft * supervised, ids, probs, residual)
    dtypes = (np.float32, np.float32, np.int64, np.float32, np.float32)
    return RowTargets(
        *(torch.from_numpy(np.asarray(column, dtype)).to(device) for column, dtype in zip(columns, dtypes, strict=True))
    )


def _soft_rows(items: Sequence[Item], counts: list[int]) -> tuple[NDArray[np.generic], ...]:
    """ids (R, K), probs (R, K), residual (R,), supervised (R,) with the widest row's K; 0 without soft targets."""
    starts, total = np.cumsum([0, *counts]), sum(counts)
    residual, supervised = np.zeros(total, dtype=np.float32), np.zeros(total, dtype=bool)
    widths = np.zeros(total, dtype=np.int64)
    found = [(np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.float32))]
    for item, start, count in zip(items, starts, counts, strict=False):
        if (targets := item.part.targets) is None:
            continue
        first, last = targets.row_splits[item.place : item.place + 2]
        splits = targets.splits[first : last + 1]
        residual[start : start + count] = targets.residual[first:last]
        supervised[start : start + count] = targets.supervised[first:last]
        widths[start : start + count] = np.diff(splits)
        found.append((targets.ids[splits[0] : splits[-1]], targets.probs[splits[0] : splits[-1]]))
    filled = np.arange(widths.max(initial=0)) < widths[:, None]
    ids, probs = np.full(filled.shape, -1, dtype=np.int64), np.zeros(filled.shape, dtype=np.float32)
    ids[filled], probs[filled] = (np.concatenate(column) for column in zip(*found, strict=True))
    return ids, probs, residual, supervised
