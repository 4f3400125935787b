"""Making knowledge: the top of a party's next-token distributions on public samples. DESIGN.md 5.2.

S samples, R rows, N kept entries, V vocabulary, K = min(top_k, V).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedmkt.knowledge import EmptyKnowledge, Knowledge, KnowledgeHeader, KnowledgeNotFinite
from fedmkt.ml.batches import TokenSample, check_positions, tokenize
from fedmkt.ml.inference import BATCH_TOKENS, Progress, run_batches
from fedmkt.ml.party import Party
from fedmkt.public_set import PublicSet

# For a party's own use (prefix buckets, self-distillation), never sent: wide enough that the tail hardly matters, and
# narrow where the model is sure, which is what keeps lessons cheap.
WIDE_TOP_K, WIDE_TOP_P = 128, 0.999


class _Rows(NamedTuple):
    """What is kept of one sample: counts int32 [R], gold float32 [R], ids int32 [N], logprobs float32 [N]."""

    counts: NDArray[np.int32]
    gold: NDArray[np.float32]
    ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]


def extract(
    party: Party,
    public_set: PublicSet,
    samples: Sequence[int],
    *,
    federation_id: str,
    round_number: int,
    slice_index: int,
    adapter_version: int,
    top_k: int,
    top_p: float,
    max_tokens: int,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress | None = None,
) -> Knowledge:
    """The party's knowledge on `samples` (indices into the public set, strictly ascending) with its present weights.

    A row keeps the fewest of its `top_k` most probable tokens that reach `top_p`, one at least, with log-probabilities
    normalised in float32 over the tokenizer's V ids. A sample that is cut before its response is left out. Raises
    KnowledgeNotFinite and SampleTooLong, naming the sample, and EmptyKnowledge when no sample has a response row.
    """
    indices = np.asarray(samples, dtype=np.int32)
    tokens = tokenize(party.vocabulary, (public_set.samples[index] for index in indices), max_tokens)
    present = np.array([index for index, sample in enumerate(tokens) if len(sample.rows)], dtype=np.intp)
    if not len(present):
        raise EmptyKnowledge(
            f"none of {len(tokens)} public samples has a response within {max_tokens} tokens; raise max_tokens"
        )
    tokens = [tokens[index] for index in present]
    check_positions(tokens, party.positions)
    header = KnowledgeHeader(
        federation_id=federation_id,
        round_number=round_number,
        slice_index=slice_index,
        public_set_digest=public_set.digest,
        vocabulary_fingerprint=party.vocabulary.fingerprint,
        vocabulary_size=party.vocabulary.size,
        model_id=party.card.model_id,
        adapter_version=adapter_version,
        top_k=top_k,
        top_p=top_p,
        max_tokens=max_tokens,
    )
    rows = _rows(party, tokens, top_k, top_p, batch_tokens, progress)
    return _assembled(header, indices[present], tokens, rows)


def _rows(
    party: Party, tokens: list[TokenSample], top_k: int, top_p: float, batch_tokens: int, progress: Progress | None
) -> list[_Rows]:
    def look(logits: Tensor, gold: Tensor) -> tuple[Tensor, ...]:
        return cut_rows(logits, gold, top_k, top_p)

    found: dict[int, _Rows] = {}
    for indices, columns in run_batches(party, tokens, look, batch_tokens, progress):
        start = 0
        for index in indices:
            stop = start + len(tokens[index].rows)
            ids, logprobs, kept, gold, fine = (column[start:stop] for column in columns)
            if not fine.all():
                raise KnowledgeNotFinite(
                    f"sample {tokens[index].id!r}: {np.count_nonzero(~fine)} of {len(fine)} response rows have logits "
                    "that are NaN or infinite; go back to the last good adapter, or use float32"
                )
            counts = np.count_nonzero(kept, axis=1).astype(np.int32)
            found[index] = _Rows(counts, gold, ids[kept].astype(np.int32), logprobs[kept])
            start = stop
    return [found[index] for index in range(len(tokens))]


def cut_rows(logits: Tensor, gold: Tensor, top_k: int, top_p: float) -> tuple[Tensor, ...]:
    """The top of each row: one search for the K largest, one logsumexp; the cut at top_p looks at those K only.

    logits (n, V) float32, gold (n,) int64 -> ids (n, K) ascending, logprobs (n, K), kept (n, K) bool, gold
    log-probabilities (n,), fine (n,) bool: finite. What is not kept stands at the end of a row.
    """
    size = logits.shape[1]
    normaliser = logits.logsumexp(dim=-1)  # (n,)
    values, ids = logits.topk(min(top_k, size), dim=-1)  # largest first
    logprobs = (values - normaliser[:, None]).clamp_(max=0)
    probs = logprobs.exp()
    kept = (probs.cumsum(dim=-1) - probs < top_p) & logprobs.isfinite()  # a forbidden token has no probability
    kept[:, 0] = True
    ids, order = ids.masked_fill(~kept, size).sort(dim=-1)
    gold_logprobs = (logits.gather(1, gold[:, None])[:, 0] - normaliser).clamp_(max=0)
    fine = normaliser.isfinite() & gold_logprobs.isfinite()
    return ids, logprobs.gather(1, order), kept.gather(1, order), gold_logprobs, fine


def _assembled(
    header: KnowledgeHeader, samples: NDArray[np.int32], tokens: list[TokenSample], rows: list[_Rows]
) -> Knowledge:
    return Knowledge(
        header=header,
        samples=samples,
        row_splits=_splits([len(part.counts) for part in rows]),
        context_ends=np.concatenate([sample.ends[sample.rows - 1] for sample in tokens]),
        gold_logprobs=np.concatenate([part.gold for part in rows]),
        entry_splits=_splits(np.concatenate([part.counts for part in rows])),
        token_ids=np.concatenate([part.ids for part in rows]),
        logprobs=np.concatenate([part.logprobs for part in rows]),
    )


def _splits(counts: Sequence[int] | NDArray[np.int32]) -> NDArray[np.int32]:
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int32)
