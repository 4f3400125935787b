"""How well a party does on samples that it does not train on: bits per byte, accuracy, questions answered."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from fedmkt.errors import Refusal
from fedmkt.ml.batches import TokenSample, tokenize
from fedmkt.ml.inference import BATCH_TOKENS, Columns, Progress, run_batches
from fedmkt.ml.party import Party
from fedmkt.ml.questions import chosen_answers, free_answers, rouge_l
from fedmkt.protocol import Evaluation, EvaluationConfig
from fedmkt.public_set import PublicSample

ALL = "all"
NO_FREE_ANSWERS = EvaluationConfig()


class NothingToEvaluate(Refusal):
    code: ClassVar[str] = "evaluation.empty"
    title: ClassVar[str] = "No sample has a response to evaluate"


class EvaluationNotFinite(Refusal):
    code: ClassVar[str] = "evaluation.nan"
    title: ClassVar[str] = "The model's loss is not finite"


@dataclass
class _Sums:
    """Over the samples of one domain."""

    nats: float = 0.0
    hits: float = 0.0
    rows: int = 0
    bytes: int = 0
    samples: int = 0
    chosen_right: int = 0
    chosen_right_per_byte: int = 0
    choice_samples: int = 0
    rouge_l: float = 0.0
    rouge_samples: int = 0

    def add(self, other: "_Sums") -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def evaluation(self) -> Evaluation:
        return Evaluation(
            bits_per_byte=self.nats / math.log(2) / self.bytes,
            accuracy=self.hits / self.rows,
            samples=self.samples,
            bytes=self.bytes,
            choice_accuracy=_mean(self.chosen_right, self.choice_samples),
            choice_accuracy_per_byte=_mean(self.chosen_right_per_byte, self.choice_samples),
            choice_samples=self.choice_samples,
            rouge_l=_mean(self.rouge_l, self.rouge_samples),
            rouge_samples=self.rouge_samples,
        )


def _mean(total: float, count: int) -> float | None:
    return total / count if count else None


def evaluate(
    party: Party,
    samples: Sequence[PublicSample],
    *,
    max_tokens: int = 512,
    questions: EvaluationConfig = NO_FREE_ANSWERS,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress | None = None,
) -> dict[str, Evaluation]:
    """Held-out quality by `sample.domain`, and of all samples together under "all".

    bits_per_byte: nats over the response rows (a final eos included) / ln 2 / bytes of the responses, so that parties
    with different tokenizers compare. accuracy: share of response rows whose token is the model's first choice, every
    token given those before it. Samples with choices are also asked as questions, and `questions.rouge_samples`
    prompts, spread evenly over those that have one, are answered freely (`fedmkt.ml.questions`). Texts are cut at
    `max_tokens` or the model's positions; samples without a response left are not counted. Raises NothingToEvaluate
    when none is, EvaluationNotFinite with the sample's id.
    """
    tokens = tokenize(party.vocabulary, samples, party.usable_tokens(max_tokens))
    usable = [index for index, sample in enumerate(tokens) if sample.response_bytes > 0]
    if not usable:
        raise NothingToEvaluate(
            f"none of {len(tokens)} samples has a response within {party.usable_tokens(max_tokens)} tokens; give "
            "samples, or raise max_tokens"
        )
    kept = [samples[index] for index in usable]
    found = _losses(party, [tokens[index] for index in usable], batch_tokens, progress)
    _ask(party, kept, found, party.usable_tokens(max_tokens), batch_tokens, progress)
    _answer_freely(party, kept, found, questions, progress)
    sums: defaultdict[str, _Sums] = defaultdict(_Sums)
    for sample, of_sample in zip(kept, found, strict=True):
        for name in {sample.domain or ALL, ALL}:
            sums[name].add(of_sample)
    return {name: sums[name].evaluation() for name in sorted(sums)}


def _losses(party: Party, tokens: Sequence[TokenSample], batch_tokens: int, progress: Progress | None) -> list[_Sums]:
    found: dict[int, _Sums] = {}
    for indices, (nats, hits) in run_batches(party, tokens, _score, batch_tokens, progress):
        start = 0
        for index in indices:
            stop = start + len(tokens[index].rows)
            loss = float(nats[start:stop].sum(dtype=np.float64))
            if not math.isfinite(loss):
                raise EvaluationNotFinite(f"sample {tokens[index].id!r} has loss {loss}; go back to a good adapter")
            found[index] = _Sums(
                nats=loss,
                hits=float(hits[start:stop].sum()),
                rows=stop - start,
                bytes=tokens[index].response_bytes,
                samples=1,
            )
            start = stop
    return [found[index] for index in range(len(tokens))]


def _ask(
    party: Party,
    samples: Sequence[PublicSample],
    found: list[_Sums],
    max_tokens: int,
    batch_tokens: int,
    progress: Progress | None,
) -> None:
    chosen = chosen_answers(party, samples, max_tokens=max_tokens, batch_tokens=batch_tokens, progress=progress)
    for index, (likeliest, likeliest_per_byte) in chosen.items():
        found[index].add(_Sums(chosen_right=likeliest, chosen_right_per_byte=likeliest_per_byte, choice_samples=1))


def _answer_freely(
    party: Party,
    samples: Sequence[PublicSample],
    found: list[_Sums],
    questions: EvaluationConfig,
    progress: Progress | None,
) -> None:
    with_prompt = [index for index, sample in enumerate(samples) if sample.response_start and sample.ends]
    count = min(questions.rouge_samples, len(with_prompt))
    asked = [with_prompt[place * len(with_prompt) // count] for place in range(count)]
    answers = free_answers(
        party, [samples[index] for index in asked], answer_tokens=questions.answer_tokens, progress=progress
    )
    for index, answer in zip(asked, answers, strict=True):
        found[index].add(_Sums(rouge_l=rouge_l(answer, samples[index].response), rouge_samples=1))


def _score(logits: Tensor, gold: Tensor) -> Columns:
    """logits (n, V) -> nats of the gold token float32 (n,), whether it is the first choice bool (n,)."""
    nats = F.cross_entropy(logits, gold, reduction="none")
    hits = logits.argmax(dim=-1) == gold
    return nats.cpu().numpy(), hits.cpu().numpy()
