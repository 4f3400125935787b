"""Random knowledge of stated sizes, made by the generator that the tests use."""

from dataclasses import replace

import numpy as np

from fedmkt.alignment import TokenizedSet
from fedmkt.knowledge import Knowledge
from random_knowledge import random_knowledge


def knowledge_on(
    rows: TokenizedSet, vocabulary_size: int, *, top_k: int, top_p: float = 1.0, seed: int = 0
) -> Knowledge:
    """Random knowledge whose rows are those of a text; `rows` must have no empty sample."""
    drawn = random_knowledge(
        seed, samples=1 + rows.rows // 60, rows_per_sample=80, vocabulary_size=vocabulary_size, top_k=top_k, top_p=top_p
    )
    if drawn.rows < rows.rows:
        raise ValueError(f"{drawn.rows} random rows were drawn for {rows.rows} rows of text; draw more")
    entries = int(drawn.entry_splits[rows.rows])
    return replace(
        drawn,
        samples=rows.samples,
        row_splits=rows.row_splits,
        context_ends=rows.context_ends,
        gold_logprobs=drawn.gold_logprobs[: rows.rows],
        entry_splits=drawn.entry_splits[: rows.rows + 1],
        token_ids=drawn.token_ids[:entries],
        logprobs=drawn.logprobs[:entries],
    )


def random_rows(rows: int, vocabulary_size: int, *, top_k: int, top_p: float = 1.0, seed: int = 0) -> Knowledge:
    """About `rows` rows in samples of about 100."""
    return random_knowledge(
        seed,
        samples=max(1, rows // 100),
        rows_per_sample=100,
        vocabulary_size=vocabulary_size,
        top_k=top_k,
        top_p=top_p,
    )


def uniform_ids(knowledge: Knowledge, seed: int = 0) -> Knowledge:
    """The same probabilities on ids that are all equally likely."""
    rng = np.random.default_rng(seed)
    size = knowledge.header.vocabulary_size
    counts = np.diff(knowledge.entry_splits).tolist()
    drawn = [np.sort(rng.choice(size, count, replace=False)) for count in counts]
    return replace(knowledge, token_ids=np.concatenate(drawn).astype(np.int32))
