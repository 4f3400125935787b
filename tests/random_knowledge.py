"""Random knowledge that looks like a language model's: Zipf-like token frequencies, some rows sure and some not."""

import numpy as np
from numpy.typing import NDArray

from fedmkt.knowledge import Knowledge, KnowledgeHeader

BATCH = 4096


def random_header(*, vocabulary_size: int = 512, top_k: int = 64, top_p: float = 0.98) -> KnowledgeHeader:
    return KnowledgeHeader(
        federation_id="fed_0123456789abcdef",
        round_number=3,
        slice_index=2,
        public_set_digest="ab" * 32,
        vocabulary_fingerprint="cd" * 32,
        vocabulary_size=vocabulary_size,
        model_id="tests/random",
        adapter_version=2,
        top_k=top_k,
        top_p=top_p,
        max_tokens=512,
    )


def random_knowledge(
    seed: int,
    *,
    samples: int = 5,
    rows_per_sample: int = 20,
    vocabulary_size: int = 512,
    top_k: int = 64,
    top_p: float = 0.98,
) -> Knowledge:
    """Softmax of Gaussian logits, of varied temperature, over Zipf-drawn candidates; the fewest that reach top_p."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 2 * rows_per_sample, size=samples)
    rows = int(counts.sum())
    parts = [
        _random_rows(rng, min(BATCH, rows - start), vocabulary_size, top_k, top_p) for start in range(0, rows, BATCH)
    ]
    row_splits = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    steps = rng.integers(0, 9, size=rows)
    ends = np.cumsum(steps)
    ends = ends - np.repeat(ends[row_splits[:-1]] - rng.integers(0, 400, size=samples), counts)
    kept = np.concatenate([part[0] for part in parts])
    return Knowledge(
        header=random_header(vocabulary_size=vocabulary_size, top_k=top_k, top_p=top_p),
        samples=np.cumsum(rng.integers(1, 4, size=samples)).astype(np.int32),
        row_splits=row_splits,
        context_ends=ends.astype(np.int32),
        gold_logprobs=np.concatenate([part[3] for part in parts]),
        entry_splits=np.concatenate([[0], np.cumsum(kept)]).astype(np.int32),
        token_ids=np.concatenate([part[1] for part in parts]),
        logprobs=np.concatenate([part[2] for part in parts]),
    )


Rows = tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.float32], NDArray[np.float32]]


def _random_rows(rng: np.random.Generator, rows: int, vocabulary_size: int, top_k: int, top_p: float) -> Rows:
    """Entries a row, token ids, their log-probabilities, and the log-probability of a token drawn from each row."""
    candidates = min(vocabulary_size, 2 * top_k + 16)
    if candidates == vocabulary_size:
        ids = np.tile(np.arange(vocabulary_size), (rows, 1))
    else:
        ids = np.sort(_zipf(rng, vocabulary_size, (rows, candidates)), axis=1)
    logits = rng.uniform(0.5, 4.0, (rows, 1)) * rng.standard_normal(ids.shape) - 0.5 * np.log(ids + 10.0)
    logits[:, 1:][ids[:, 1:] == ids[:, :-1]] = -np.inf
    rest = 0.0 if candidates == vocabulary_size else rng.uniform(0, 0.03, (rows, 1))
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)) + np.log1p(-rest)
    order = np.argsort(-logprobs, axis=1, kind="stable")[:, :top_k]
    ranked = np.take_along_axis(logprobs, order, axis=1)
    before = np.cumsum(np.exp(ranked), axis=1) - np.exp(ranked)
    keep = np.zeros(ids.shape, dtype=bool)
    np.put_along_axis(keep, order, (before < top_p) & np.isfinite(ranked), axis=1)
    drawn = np.argmax(logprobs + rng.gumbel(size=ids.shape), axis=1)
    gold = np.minimum(logprobs[np.arange(rows), drawn], 0).astype(np.float32)
    return keep.sum(axis=1), ids[keep].astype(np.int32), np.minimum(logprobs[keep], 0).astype(np.float32), gold


def _zipf(rng: np.random.Generator, vocabulary_size: int, shape: tuple[int, int]) -> NDArray[np.int64]:
    """Half of the ids from a log-uniform law, half uniform: common tokens come often, and rare ones come too."""
    uniform = rng.integers(0, vocabulary_size, size=shape)
    common = np.minimum(np.exp(rng.uniform(0, np.log(vocabulary_size), size=shape)), vocabulary_size - 1).astype(int)
    return np.where(rng.random(shape) < 0.5, uniform, common)
