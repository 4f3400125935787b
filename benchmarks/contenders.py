"""What ours is measured against: the plain ways that others take, written plainly and not slowed down.

Each gets its input in the form that suits it (Python lists for Python loops, tensors for torch); turning our arrays
into that form is not timed unless it is part of the job.
"""

import pickle
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fedmkt.knowledge import Knowledge

Distance = Callable[[str, str], int]


# ------------------------------------------------------------------------------------------------ maps


def double_loop(teacher: Sequence[str], student: Sequence[str], distance: Distance) -> list[int]:
    """The nearest student token of each teacher token, every pair compared by a C function."""
    found = []
    for token in teacher:
        best, nearest = 1 << 30, -1
        for index, other in enumerate(student):
            edits = distance(token, other)
            if edits < best:
                best, nearest = edits, index
        found.append(nearest)
    return found


def prefix_loop(students: Sequence[bytes], teachers: Sequence[bytes]) -> list[list[int]]:
    """For each student token the teacher tokens it begins with, every pair compared."""
    return [[index for index, prefix in enumerate(teachers) if token.startswith(prefix)] for token in students]


# ------------------------------------------------------------------------------------------------ alignment


def dynamic_programme(teacher: Sequence[str], student: Sequence[str], distance: Distance) -> list[tuple[int, int]]:
    """Dynamic time warping of two token sequences by edit distance, in Python lists; the path, last step first."""
    costs = [[0.0] + [float("inf")] * len(student)]
    for token in teacher:
        above, row = costs[-1], [float("inf")]
        for column, other in enumerate(student):
            row.append(distance(token, other) + min(above[column], above[column + 1], row[column]))
        costs.append(row)
    path, i, j = [], len(teacher), len(student)
    while i and j:
        path.append((i - 1, j - 1))
        _, i, j = min((costs[i - 1][j - 1], i - 1, j - 1), (costs[i - 1][j], i - 1, j), (costs[i][j - 1], i, j - 1))
    return path


def project_loop(
    rows: Sequence[tuple[Sequence[int], Sequence[float]]], best_ids: Sequence[int]
) -> list[dict[int, float]]:
    """Each row's mass through a one-to-one map into a dictionary, collisions summed."""
    found = []
    for ids, probs in rows:
        row: dict[int, float] = {}
        for token, mass in zip(ids, probs, strict=True):
            target = best_ids[token]
            if target >= 0:
                row[target] = row.get(target, 0.0) + mass
        found.append(row)
    return found


def bucket_loop(
    rows: Sequence[tuple[Sequence[int], Sequence[float]]],
    own: Sequence[tuple[Sequence[int], Sequence[float]]],
    prefixes: Sequence[Sequence[int]],
    best_ids: Sequence[int],
) -> list[dict[int, float]]:
    """Each row's mass spread over the student's own kept tokens that start with the teacher's, in dictionaries."""
    found = []
    for (ids, probs), (own_ids, own_probs) in zip(rows, own, strict=True):
        buckets: dict[int, list[tuple[int, float]]] = {token: [] for token in ids}
        for student, mass in zip(own_ids, own_probs, strict=True):
            for token in prefixes[student]:
                if token in buckets:
                    buckets[token].append((student, mass))
        row: dict[int, float] = {}
        for token, mass in zip(ids, probs, strict=True):
            bucket = buckets[token] or ([(best_ids[token], 1.0)] if best_ids[token] >= 0 else [])
            total = sum(weight for _, weight in bucket)
            for student, weight in bucket:
                row[student] = row.get(student, 0.0) + mass * weight / total
        found.append(row)
    return found


def cross_entropy_loop(
    rows: Sequence[tuple[Sequence[int], Sequence[float]]], gold_ids: Sequence[int], stated: Sequence[float]
) -> list[bool]:
    """Whether each row's stated realised log-probability is the one that its entries hold."""
    found = []
    for (ids, logprobs), gold, claim in zip(rows, gold_ids, stated, strict=True):
        kept = dict(zip(ids, logprobs, strict=True)).get(gold)
        found.append(claim <= min(logprobs) if kept is None else abs(kept - claim) < 0.1)
    return found


# ------------------------------------------------------------------------------------------------ knowledge


def as_lists(knowledge: Knowledge) -> dict[str, list[Any]]:
    """Nested lists by row, as a table of Python objects holds them."""
    bounds = knowledge.entry_splits.tolist()
    ids, logprobs = knowledge.token_ids.tolist(), knowledge.logprobs.tolist()
    return {
        "token_ids": [ids[a:b] for a, b in pairwise(bounds)],
        "logprobs": [logprobs[a:b] for a, b in pairwise(bounds)],
        "gold_logprobs": knowledge.gold_logprobs.tolist(),
        "context_ends": knowledge.context_ends.tolist(),
    }


def pickle_lists(knowledge: Knowledge) -> bytes:
    return pickle.dumps(as_lists(knowledge), protocol=pickle.HIGHEST_PROTOCOL)


# ------------------------------------------------------------------------------------------------ losses


def plain_cross_entropy(logits: Tensor, gold: Tensor) -> None:
    """One supervised step on existing logits: forward and backward."""
    logits.grad = None
    torch.autograd.backward(F.cross_entropy(logits, gold))


def dense_targets(ids: Sequence[Tensor], probs: Sequence[Tensor], losses: Tensor, vocabulary: int) -> Tensor:
    """Every teacher's targets as dense [B, T, V], stacked; the best teacher of each sample taken by a gather.

    ids int64, probs float32: a (B, T, K) tensor for each teacher; losses (teachers, B).
    """
    shape = (*ids[0].shape[:2], vocabulary)
    dense = [probs[0].new_zeros(shape).scatter_add_(2, i, p) for i, p in zip(ids, probs, strict=True)]
    stacked = torch.stack(dense)  # (teachers, B, T, V)
    best = losses.argmin(dim=0)[None, :, None, None].expand(1, *shape)
    return stacked.gather(0, best)[0]


def dense_loss(logits: Tensor, gold: Tensor, targets: Tensor) -> Tensor:
    """Half supervised, half distilled from dense targets, mean over rows. logits, targets (N, V); gold (N,)."""
    distilled = -(targets * logits.log_softmax(dim=-1)).sum(dim=-1)
    return 0.5 * F.cross_entropy(logits, gold) + 0.5 * distilled.mean()


def dense_step(logits: Tensor, gold: Tensor, ids: Sequence[Tensor], probs: Sequence[Tensor], losses: Tensor) -> None:
    """One distillation step on existing logits (N, V) with dense targets of all teachers."""
    logits.grad = None
    targets = dense_targets(ids, probs, losses, logits.shape[1])
    torch.autograd.backward(dense_loss(logits, gold, targets.flatten(0, 1)))
