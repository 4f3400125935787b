"""From a party's own wide knowledge to what it shares: the same rows, fewer entries. R rows, N entries."""

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from fedmkt.knowledge import Knowledge, KnowledgeHeader
from fedmkt.protocol import KnowledgeConfig

BLOCK_ROWS = 1024  # looked at together: a few megabytes at most


def shared_knowledge(own: Knowledge, config: KnowledgeConfig) -> Knowledge:
    """What a party sends of its own knowledge: in each row the fewest of the `top_k` most probable tokens that reach
    `top_p`, one at least. The same rows and log-probabilities; ties go to the smaller id.
    """
    splits = own.entry_splits
    bounds = [*range(0, own.rows, BLOCK_ROWS), own.rows]
    kept = np.concatenate(
        [
            nucleus(own.logprobs[splits[a] : splits[b]], np.diff(splits[a : b + 1]), config.top_k, config.top_p)
            for a, b in pairwise(bounds)
        ]
    )
    counts = np.add.reduceat(kept, splits[:-1], dtype=np.int64)
    settings = {"top_k": config.top_k, "top_p": config.top_p, "max_tokens": config.max_tokens}
    return Knowledge(
        header=KnowledgeHeader(**{**vars(own.header), **settings}),
        samples=own.samples,
        row_splits=own.row_splits,
        context_ends=own.context_ends,
        gold_logprobs=own.gold_logprobs,
        entry_splits=np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
        token_ids=own.token_ids[kept],
        logprobs=own.logprobs[kept],
    )


def nucleus(logprobs: NDArray[np.float32], counts: NDArray[np.integer], top_k: int, top_p: float) -> NDArray[np.bool_]:
    """Which entries are kept, bool [N]: in each row the fewest of its `top_k` largest that reach `top_p`, one at least.

    logprobs float32 [N], row after row; counts int [R], entries of each row. Entries of probability 0 are never kept;
    of equal entries those that come first in the row are. Memory grows with rows x the widest row.
    """
    rows, width = len(counts), max(top_k, int(counts.max(initial=0)))
    stops = np.cumsum(counts)
    starts = stops - counts
    table = np.full((rows, width), -np.inf, dtype=np.float32)
    table.reshape(-1)[np.arange(len(logprobs)) + np.repeat(np.arange(rows) * width - starts, counts)] = logprobs
    table.sort(axis=1)
    top = np.ascontiguousarray(table.T[: -top_k - 1 : -1])  # (K, R) largest first
    probs = np.exp(top)
    enough = (np.cumsum(probs, axis=0, dtype=np.float64) - probs < top_p) & (top > -np.inf)
    wanted = np.maximum(np.count_nonzero(enough, axis=0), 1)
    smallest = np.repeat(top[wanted - 1, np.arange(rows)], counts)  # of what is kept, by entry
    kept: NDArray[np.bool_] = (logprobs >= smallest) & (logprobs > -np.inf)
    so_far = np.append(0, np.cumsum(kept))
    surplus = so_far[stops] - so_far[starts] - wanted
    if (surplus > 0).any():  # the last of those that are equal to the smallest
        owners = np.repeat(np.arange(rows), counts)
        tied = np.flatnonzero(kept & (logprobs == smallest))
        ties = np.bincount(owners[tied], minlength=rows)
        left = np.cumsum(ties)[owners[tied]] - np.arange(len(tied))  # of this row's ties, from here on
        kept[tied[left <= surplus[owners[tied]]]] = False
    return kept
