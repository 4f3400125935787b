"""How well a party predicts samples that it does not train on: bits per byte and next-token accuracy."""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from fedmkt.errors import Refusal
from fedmkt.ml.batches import tokenize
from fedmkt.ml.inference import BATCH_TOKENS, Columns, Progress, run_batches
from fedmkt.ml.party import Party
from fedmkt.protocol import Evaluation
from fedmkt.public_set import PublicSample

ALL = "all"


class NothingToEvaluate(Refusal):
    code: ClassVar[str] = "evaluation.empty"
    title: ClassVar[str] = "No sample has a response to evaluate"


class EvaluationNotFinite(Refusal):
    code: ClassVar[str] = "evaluation.nan"
    title: ClassVar[str] = "The model's loss is not finite"


def evaluate(
    party: Party,
    samples: Sequence[PublicSample],
    *,
    max_tokens: int = 512,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress | None = None,
) -> dict[str, Evaluation]:
    """Held-out quality by `sample.domain`, and of all samples together under "all".

    bits_per_byte: nats over the response rows (a final eos included) / ln 2 / bytes of the responses, so that parties
    with different tokenizers compare. accuracy: share of response rows whose token is the model's first choice, every
    token given those before it. Texts are cut at `max_tokens` or the model's positions; samples without a response
    left are not counted. Raises NothingToEvaluate when none is, EvaluationNotFinite with the sample's id.
    """
    tokens = tokenize(party.vocabulary, samples, party.usable_tokens(max_tokens))
    usable = [index for index, sample in enumerate(tokens) if sample.response_bytes > 0]
    if not usable:
        raise NothingToEvaluate(
            f"none of {len(tokens)} samples has a response within {party.usable_tokens(max_tokens)} tokens; give "
            "samples, or raise max_tokens"
        )
    sums: defaultdict[str, list[float]] = defaultdict(lambda: [0.0] * 5)  # nats, hits, rows, bytes, samples
    chosen = [tokens[index] for index in usable]
    for indices, (nats, hits) in run_batches(party, chosen, _score, batch_tokens, progress):
        start = 0
        for index in indices:
            stop = start + len(chosen[index].rows)
            loss = float(nats[start:stop].sum(dtype=np.float64))
            if not math.isfinite(loss):
                raise EvaluationNotFinite(f"sample {chosen[index].id!r} has loss {loss}; go back to a good adapter")
            of_sample = (loss, float(hits[start:stop].sum()), stop - start, chosen[index].response_bytes, 1)
            for name in {samples[usable[index]].domain or ALL, ALL}:
                sums[name] = [total + value for total, value in zip(sums[name], of_sample, strict=True)]
            start = stop
    return {name: _evaluation(*sums[name]) for name in sorted(sums)}


def _score(logits: Tensor, gold: Tensor) -> Columns:
    """logits (n, V) -> nats of the gold token float32 (n,), whether it is the first choice bool (n,)."""
    nats = F.cross_entropy(logits, gold, reduction="none")
    hits = logits.argmax(dim=-1) == gold
    return nats.cpu().numpy(), hits.cpu().numpy()


def _evaluation(nats: float, hits: float, rows: float, response_bytes: float, samples: float) -> Evaluation:
    return Evaluation(
        bits_per_byte=nats / math.log(2) / response_bytes,
        accuracy=hits / rows,
        samples=int(samples),
        bytes=int(response_bytes),
    )
