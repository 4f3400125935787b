"""Making knowledge: the top of a party's next-token distributions on public samples. DESIGN.md 5.2.

S samples, R rows, N kept entries, V vocabulary, K = min(top_k, V).
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmkt.knowledge import EmptyKnowledge, Knowledge, KnowledgeHeader, KnowledgeNotFinite
from fedmkt.knowledge_cut import nucleus
from fedmkt.ml.batches import TokenSample, check_positions, tokenize
from fedmkt.ml.inference import BATCH_TOKENS, Progress, run_batches
from fedmkt.ml.party import Party
from fedmkt.public_set import PublicSet

# For a party's own use (prefix buckets, self-distillation), never sent: wide enough that the tail hardly matters, and
# narrow where the model is sure, which is what keeps lessons cheap.
WIDE_TOP_K, WIDE_TOP_P = 128, 0.999

COLUMNS_EACH = 4  # of a row that is searched, for each entry that may be kept
WORD = 8  # bytes, and so entries of a mask


class Kept(NamedTuple):
    """What is kept of some rows: counts int64 [R], gold float32 [R], ids int32 [N], logprobs float32 [N]."""

    counts: NDArray[np.int64]
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
) -> list[Kept]:
    """What is kept of each sample."""
    look = partial(cut_rows, top_k=top_k, top_p=top_p)
    found: dict[int, Kept] = {}
    for indices, columns in run_batches(party, tokens, look, batch_tokens, progress):
        kept = Kept(*columns)
        row_ends = np.cumsum([len(tokens[index].rows) for index in indices])
        entry_splits = np.append(0, np.cumsum(kept.counts))
        for index, stop in zip(indices, row_ends.tolist(), strict=True):
            rows = slice(stop - len(tokens[index].rows), stop)
            entries = slice(entry_splits[rows.start], entry_splits[rows.stop])
            _check_finite(tokens[index], kept.gold[rows])
            found[index] = Kept(kept.counts[rows], kept.gold[rows], kept.ids[entries], kept.logprobs[entries])
    return [found[index] for index in range(len(tokens))]


def _check_finite(sample: TokenSample, gold: NDArray[np.float32]) -> None:
    """One logit that is NaN or +inf makes the whole row's log-probabilities NaN."""
    fine = np.isfinite(gold)
    if not fine.all():
        raise KnowledgeNotFinite(
            f"sample {sample.id!r}: {np.count_nonzero(~fine)} of {len(fine)} response rows have logits that are NaN or "
            "infinite; go back to the last good adapter, or use float32"
        )


def _assembled(
    header: KnowledgeHeader, samples: NDArray[np.int32], tokens: list[TokenSample], rows: list[Kept]
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


def _splits(counts: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int32]:
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int32)


# ------------------------------------------------------------------------------------------------ the cut of a block


def cut_rows(logits: Tensor, gold: Tensor, top_k: int, top_p: float) -> Kept:
    """Of each row the fewest of the `top_k` largest entries that reach `top_p`, one at least, with ascending ids.

    logits (n, V) float32; gold (n,) int64. Among equal log-probabilities the smaller ids count as larger. Forbidden
    tokens (-inf) are never kept. A row with NaN or +inf has gold NaN and keeps nothing.
    """
    rows, size = logits.shape
    top_k = min(top_k, size)
    logprobs = logits.log_softmax(dim=-1)  # (n, V)
    gold_logprobs = logprobs.gather(1, gold[:, None])[:, 0].cpu().numpy()
    places = _reaching(logprobs, _lower_bounds(logprobs, top_k))  # (N,) of candidates
    values = logprobs.take(places).cpu().numpy()
    found = places.cpu().numpy()
    starts = np.arange(rows + 1) * size  # of each row among the places
    kept = np.flatnonzero(nucleus(values, np.diff(np.searchsorted(found, starts)), top_k, top_p))
    found = found[kept]
    counts = np.diff(np.searchsorted(found, starts))
    ids = found - np.repeat(starts[:-1], counts)
    return Kept(counts, gold_logprobs, ids.astype(np.int32), values[kept])


def _lower_bounds(logprobs: Tensor, top_k: int) -> Tensor:
    """(n, 1): what at least `top_k` entries of each row reach, and few more do.

    The row is laid out in columns; the largest entry of each is an entry of the row, so the k-th largest of these
    maxima is at most the k-th largest of all. Much cheaper than that one, which would need a search in the whole row.
    """
    rows, size = logprobs.shape
    height = -(-size // (COLUMNS_EACH * top_k))
    columns = size // height  # at least top_k; the last few entries of the row lie in none
    maxima = logprobs[:, : columns * height].view(rows, height, columns).amax(dim=1)
    if maxima.device.type != "cpu":
        return maxima.topk(top_k).values[:, -1:]
    place = columns - top_k  # numpy's selection is vectorised, ten times as fast as torch's
    return torch.from_numpy(np.partition(maxima.numpy(), place, axis=1)[:, place : place + 1])


def _reaching(logprobs: Tensor, bounds: Tensor) -> Tensor:
    """Flat indices int64 of the entries that reach their row's bound (n, 1), ascending."""
    if logprobs.device.type != "cpu":
        return (logprobs >= bounds).flatten().nonzero()[:, 0]
    return torch.from_numpy(_set_places(logprobs.numpy() >= bounds.numpy()))  # numpy's comparison is vectorised


def _set_places(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Flat indices of what is true, ascending. Nearly all is false: eight entries are looked at at once."""
    flat = mask.reshape(-1)
    if flat.size % WORD:
        return np.flatnonzero(flat)
    words = np.flatnonzero(flat.view(np.uint64) != 0)
    inside = np.flatnonzero(flat.reshape(-1, WORD)[words])
    return (words * WORD)[inside // WORD] + inside % WORD
