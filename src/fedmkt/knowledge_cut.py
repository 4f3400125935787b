"""From a party's own wide knowledge to what it shares: the same rows, fewer entries. R rows, N entries."""

import numpy as np
from numpy.typing import NDArray

from fedmkt.knowledge import Knowledge, KnowledgeHeader
from fedmkt.knowledge_data import row_blocks
from fedmkt.protocol import KnowledgeConfig


def shared_knowledge(own: Knowledge, config: KnowledgeConfig) -> Knowledge:
    """What a party sends of its own knowledge: in each row the fewest of the `top_k` most probable tokens that reach
    `top_p`, one at least. The same rows and log-probabilities; ties go to the smaller id.
    """
    kept = np.concatenate([_cut(own, rows, config.top_k, config.top_p) for rows in row_blocks(own.entry_splits)])
    counts = np.add.reduceat(kept, own.entry_splits[:-1], dtype=np.int64)
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


def _cut(own: Knowledge, rows: slice, top_k: int, top_p: float) -> NDArray[np.bool_]:
    """Which entries of a run of rows are shared, bool [entries of these rows]."""
    splits = own.entry_splits[rows.start : rows.stop + 1].astype(np.int64)
    entries, starts = slice(int(splits[0]), int(splits[-1])), splits[:-1] - splits[0]
    counts = np.diff(splits)
    row = np.repeat(np.arange(len(counts)), counts)
    order = np.lexsort((own.token_ids[entries], -own.logprobs[entries], row))  # rows in place, largest first in each
    rank = np.arange(len(row)) - np.repeat(starts, counts)
    probs = np.exp(own.logprobs[entries][order].astype(np.float64))
    above = np.cumsum(probs) - probs  # mass of everything before, from which the rows before are taken off
    above -= np.repeat(above[starts], counts)
    kept = np.zeros(len(row), dtype=bool)
    kept[order] = (rank < top_k) & ((above < top_p) | (rank == 0))
    return kept
