"""How well a party answers questions: the likeliest of several answers, and free answers beside the right ones."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from transformers import LogitsProcessor, LogitsProcessorList

from fedmkt.errors import Refusal
from fedmkt.ml.batches import TokenSample, tokenize
from fedmkt.ml.inference import BATCH_TOKENS, Columns, Progress, evaluating, run_batches
from fedmkt.ml.party import Party
from fedmkt.public_set import PublicSample


class AnswerTooLong(Refusal):
    code: ClassVar[str] = "evaluation.answer_too_long"
    title: ClassVar[str] = "A free answer would leave no room for the question"


# ------------------------------------------------------------------------------------------------ one of several


def chosen_answers(
    party: Party,
    samples: Sequence[PublicSample],
    *,
    max_tokens: int,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress | None = None,
) -> dict[int, tuple[bool, bool]]:
    """Of each sample with choices (index into `samples`): is the right answer the likeliest, and is it so per byte?

    An answer's log-likelihood is that of every token that ends inside it, given the prompt and without an end of text;
    a token that reaches from the prompt into the answer counts, so that no answer loses its first word. Of equal ones
    the first is chosen. A question of which one answer is cut at `max_tokens` is left out.
    """
    asked = [(index, choice) for index, sample in enumerate(samples) for choice in samples[index].choices]
    variants = [
        replace(samples[index], text=samples[index].prompt + choice, ends=False, choices=()) for index, choice in asked
    ]
    tokens = [
        _with_answer_rows(found, variant)
        for found, variant in zip(tokenize(party.vocabulary, variants, max_tokens), variants, strict=True)
    ]
    nats = np.zeros(len(tokens))
    for indices, (losses,) in run_batches(party, tokens, _nats, batch_tokens, progress):
        owners = np.repeat(indices, [len(tokens[index].rows) for index in indices])
        nats += np.bincount(owners, losses, minlength=len(tokens))
    found: dict[int, tuple[bool, bool]] = {}
    for index in dict.fromkeys(index for index, _ in asked):
        places = [place for place, (owner, _) in enumerate(asked) if owner == index]
        if all(len(tokens[place].rows) for place in places):
            found[index] = _judged(samples[index], nats[places])
    return found


def _with_answer_rows(sample: TokenSample, variant: PublicSample) -> TokenSample:
    """Every token that ends inside the answer; none where the answer is cut."""
    whole = len(sample.ends) > 0 and int(sample.ends[-1]) >= len(variant.text.encode())
    first = max(1, int(np.searchsorted(sample.ends, variant.response_start, side="right")))
    rows = np.arange(first, len(sample.ids), dtype=np.int32)
    return replace(sample, rows=rows if whole else rows[:0])


def _nats(logits: Tensor, gold: Tensor) -> Columns:
    return (F.cross_entropy(logits, gold, reduction="none").cpu().numpy(),)


def _judged(sample: PublicSample, nats: NDArray[np.float64]) -> tuple[bool, bool]:
    right = sample.choices.index(sample.response)
    sizes = np.array([len(choice.encode()) for choice in sample.choices])
    return bool(nats.argmin() == right), bool((nats / sizes).argmin() == right)


# ------------------------------------------------------------------------------------------------ free answers


class _OwnIdsOnly(LogitsProcessor):
    """Ids beyond the tokenizer (padded heads) have no text."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        scores[:, self.size :] = -torch.inf
        return scores


class _Words:
    """Lower-case words of any script; on English text they are those of rouge-score's own tokenizer."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[^\W_]+", text.lower())


def free_answers(
    party: Party,
    samples: Sequence[PublicSample],
    *,
    answer_tokens: int,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress | None = None,
) -> list[str]:
    """The party's greedy continuation of each prompt, at most `answer_tokens` or until the end of text.

    A prompt that leaves too few positions loses its beginning. Raises AnswerTooLong where none would be left.
    """
    room = party.usable_tokens(batch_tokens) - answer_tokens
    if room < 1:
        raise AnswerTooLong(
            f"answers of {answer_tokens} tokens leave none of {party.usable_tokens(batch_tokens)} positions for the "
            "question; set evaluation.answer_tokens lower"
        )
    encodings = party.vocabulary.encode_batch([sample.prompt for sample in samples])
    prompts = [encoding.ids[-room:] for encoding in encodings]
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    found = [""] * len(prompts)
    start = 0
    while start < len(order):
        count = max(1, batch_tokens // (len(prompts[order[start]]) + answer_tokens))
        indices = order[start : start + count]
        for index, answer in zip(indices, _continued(party, [prompts[i] for i in indices], answer_tokens), strict=True):
            found[index] = answer
        start += len(indices)
        if progress is not None:
            progress(start, len(order))
    return found


def _continued(party: Party, prompts: Sequence[NDArray[np.int32]], tokens: int) -> list[str]:
    """One batch, padded on the left as `generate` needs it."""
    vocabulary, longest = party.vocabulary, max(1, *(len(prompt) for prompt in prompts))
    ids, mask = (np.zeros((len(prompts), longest), dtype=np.int64) for _ in range(2))
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    with evaluating(party):
        made = cast(Any, party.model).generate(
            input_ids=torch.from_numpy(ids).to(party.device),
            attention_mask=torch.from_numpy(mask).to(party.device),
            max_new_tokens=tokens,
            do_sample=False,
            num_beams=1,
            eos_token_id=vocabulary.eos_id,
            pad_token_id=vocabulary.eos_id if vocabulary.eos_id is not None else 0,
            logits_processor=LogitsProcessorList([_OwnIdsOnly(vocabulary.size)]),
        )
    answers = made[:, longest:].cpu().tolist()
    return [_text(party, answer) for answer in answers]


def _text(party: Party, ids: list[int]) -> str:
    """Special tokens have no bytes."""
    if party.vocabulary.eos_id in ids:
        ids = ids[: ids.index(party.vocabulary.eos_id)]
    return b"".join(party.vocabulary.tokens[index] for index in ids).decode(errors="replace")


def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of words (Lin 2004), without stemming."""
    # Here, because it loads NLTK, which takes a second and which a federation without free answers does not need.
    from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-untyped]  # ships no annotations

    score = RougeScorer(["rougeL"], tokenizer=_Words()).score(reference, answer)
    return float(score["rougeL"].fmeasure)
