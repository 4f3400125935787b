"""Who teaches which sample: the receiver's own cross-entropy of what it received, and the rules that choose by it.

Legend: S samples of the receiver, R rows, N teachers. A sender is never believed: what its rows claim is held against
the tokens that the text itself gives in the sender's vocabulary. DESIGN.md 5.5; the paper's section 3.3, algorithm 2.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedmkt.knowledge import Knowledge
from fedmkt.protocol import SelectionRule
from fedmkt.tokenized_set import TokenizedSet, runs, take_rows

Unit = Literal["nats_per_byte", "nats_per_token"]
NOBODY = -1  # no soft targets for this sample
SELF = -2  # the receiver's own fresh soft targets

# A realised token and its entry are rounded alike, but a sender may have computed the two apart and fallen on either
# side of a rounding boundary: one level of the wire's grid, sqrt(1 + d) / 11 nats at d nats below the row's largest, is
# no lie. It gains nothing either: of a kept token the entry counts.
LEVEL_TOLERANCE = 0.1
TAIL_TOLERANCE = 1.25  # tail mass and cut token are rounded apart, together by up to a fifth where they weigh anything
SMALLEST_TAIL = 1e-4  # tails below this are not told apart
VERIFIED_ROWS = 8192  # verified at once, one sample at least: some megabytes, nearly in cache

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class CrossEntropy:
    """Per sample of the receiver, float64 [S]: nats a byte or a token; inf where nothing usable was sent.

    `refused`: public sample index -> why what was sent for it failed verification. Samples not sent are not in it.
    """

    values: Floats
    refused: Mapping[int, str]


# ------------------------------------------------------------------------------------------------ verification


def recompute_cross_entropy(knowledge: Knowledge, rows: TokenizedSet, *, unit: Unit = "nats_per_byte") -> CrossEntropy:
    """Cross-entropy of the response under the received rows, after checking them against the text.

    rows: `tokenize_set` of the *sender's* vocabulary on the receiver's samples; the result is in their order. A sample
    is refused when its context ends differ from the text's, or in any row: fewer entries than top_k that do not reach
    top_p; a realised token that is kept with another log-probability than stated; or one that was cut with a
    log-probability above the smallest kept entry or above the tail mass. So a sender can lower its loss only by putting
    mass on the right tokens. nats_per_byte divides by the bytes that the rows cover (comparable across tokenizers);
    nats_per_token, the paper's unit, by the rows.
    """
    values = np.full(rows.samples.size, np.inf)
    shared, ours, theirs = np.intersect1d(rows.samples, knowledge.samples, assume_unique=True, return_indices=True)
    same, gold_ids = _same_contexts(knowledge, theirs, rows, ours)
    refused = dict.fromkeys(shared[~same].tolist(), OTHER_ROWS)
    nats, sound = np.empty(len(knowledge.samples)), np.zeros(len(knowledge.samples), np.bool_)
    for run in runs(knowledge.row_splits, VERIFIED_ROWS):
        splits = knowledge.row_splits[run.start : run.stop + 1]
        gold_logprobs, faults = _verify(knowledge, slice(int(splits[0]), int(splits[-1])), gold_ids)
        nats[run] = -np.add.reduceat(gold_logprobs, splits[:-1] - splits[0])
        sound[run] = ~np.logical_or.reduceat(faults > 0, splits[:-1] - splits[0])
        refused |= _reasons(knowledge, faults, run, theirs[same])
    ours, theirs = ours[same], theirs[same]
    size = rows.response_bytes[ours] if unit == "nats_per_byte" else np.diff(knowledge.row_splits)[theirs]
    values[ours] = np.where(sound[theirs] & (size > 0), nats[theirs] / np.maximum(size, 1), np.inf)
    return CrossEntropy(values, refused)


def _same_contexts(
    knowledge: Knowledge, theirs: NDArray[np.intp], rows: TokenizedSet, ours: NDArray[np.intp]
) -> tuple[NDArray[np.bool_], NDArray[np.int32]]:
    """Which of the paired samples have the same context ends on both sides, bool [P]; and the realised token of each
    row of the knowledge, int32 [R], -1 on other samples.
    """
    counts = np.diff(knowledge.row_splits)[theirs]
    same = counts == np.diff(rows.row_splits)[ours]
    sent, _ = take_rows(knowledge.row_splits, theirs[same])
    text, owners = take_rows(rows.row_splits, ours[same])
    differing = np.bincount(owners, knowledge.context_ends[sent] != rows.context_ends[text], int(same.sum())) > 0
    gold_ids = np.full(knowledge.rows, -1, np.int32)
    gold_ids[sent] = np.where(differing[owners], -1, rows.gold_ids[text])
    same[same] = ~differing
    return np.asarray(same, dtype=np.bool_), gold_ids


OTHER_ROWS = "its rows are not those that the text gives in the sender's vocabulary"
FAULTS = (
    "",
    "it keeps fewer than {top_k} tokens that do not reach {top_p} of the mass",
    "the realised token is kept with another log-probability than the {gold:.3f} nats stated",
    "the realised token was cut, yet its stated {gold:.3f} nats are above the smallest kept entry",
    "the realised token was cut, yet its stated {gold:.3f} nats are more than the whole tail holds",
)


def _verify(knowledge: Knowledge, rows: slice, gold_ids: NDArray[np.int32]) -> tuple[Floats, NDArray[np.uint8]]:
    """Realised tokens' log-probabilities as the entries of these rows have them, float64 [R], and the rule broken
    (FAULTS), [R]. gold_ids: of all rows.
    """
    sent, splits = knowledge, knowledge.entry_splits[rows.start : rows.stop + 1]
    starts, counts = splits[:-1] - splits[0], np.diff(splits)
    kept_logprobs, stated = sent.logprobs[splits[0] : splits[-1]], sent.gold_logprobs[rows].astype(np.float64)
    largest = np.maximum.reduceat(kept_logprobs, starts).astype(np.float64)
    smallest = np.minimum.reduceat(kept_logprobs, starts).astype(np.float64)
    tail = np.maximum(1.0 - np.add.reduceat(np.exp(kept_logprobs.astype(np.float64)), starts), 0.0)

    gold = np.flatnonzero(sent.token_ids[splits[0] : splits[-1]] == np.repeat(gold_ids[rows], counts))
    owners = np.searchsorted(starts, gold, side="right") - 1
    kept, entry = np.zeros(len(starts), np.bool_), stated.copy()
    kept[owners], entry[owners] = True, kept_logprobs[gold]

    full = np.minimum(sent.header.top_k, sent.header.vocabulary_size)
    too_few = (counts < full) & (tail > (1.0 - sent.header.top_p) * TAIL_TOLERANCE + SMALLEST_TAIL)
    another = kept & (np.abs(stated - entry) > LEVEL_TOLERANCE * np.sqrt(1.0 + np.maximum(largest - entry, 0.0)))
    too_high = ~kept & (stated - smallest > LEVEL_TOLERANCE * np.sqrt(1.0 + largest - smallest))
    too_much = ~kept & (np.exp(stated) > tail * TAIL_TOLERANCE + SMALLEST_TAIL)
    return entry, np.select([too_few, another, too_high, too_much], [1, 2, 3, 4], 0).astype(np.uint8)


def _reasons(
    sent: Knowledge, faults: NDArray[np.uint8], samples: slice, comparable: NDArray[np.intp]
) -> dict[int, str]:
    """Public sample index -> the first broken rule of each comparable sample with a fault; faults [R]: of `samples`."""
    first_row = sent.row_splits[samples.start]
    broken = np.searchsorted(sent.row_splits, np.flatnonzero(faults) + first_row, side="right") - 1
    reasons: dict[int, str] = {}
    for position in np.intersect1d(broken, comparable):
        start, stop = sent.row_splits[position : position + 2]
        row = int(start + np.argmax(faults[start - first_row : stop - first_row] > 0))
        what = FAULTS[faults[row - first_row]].format(
            top_k=sent.header.top_k, top_p=sent.header.top_p, gold=sent.gold_logprobs[row]
        )
        reasons[int(sent.samples[position])] = f"{sent.place(row)}: {what}"
    return reasons


# ------------------------------------------------------------------------------------------------ rules


def select(rule: SelectionRule, own: Floats, teachers: Floats, *, margin: float) -> NDArray[np.int32]:
    """Who teaches each sample by the named rule: a row of `teachers`, SELF or NOBODY. int32 [S]."""
    match rule:
        case "best_or_self":
            return best_or_self(own, teachers, margin=margin)
        case "dual_min_ce":
            return dual_min_ce(own, teachers, margin=margin)
        case "best_always":
            return best_always(own, teachers)


def dual_min_ce(own: Floats, teachers: Floats, *, margin: float = 0.0) -> NDArray[np.int32]:
    """The paper's rule: the best teacher, iff its loss is lower than the receiver's own by more than `margin`.

    own float64 [S], teachers float64 [N, S], one unit for both; inf and NaN mean not offered. Returns int32 [S]: the
    row of `teachers`, ties to the lowest, or NOBODY. A sample on which the receiver has no loss takes the best teacher.
    Paper section 3.3, algorithm 2, where margin = 0.
    """
    winners, losses = _best(own, teachers)
    return np.where(losses < _known(own) - margin, winners, NOBODY).astype(np.int32)


def best_or_self(own: Floats, teachers: Floats, *, margin: float = 0.05) -> NDArray[np.int32]:
    """The default rule: as `dual_min_ce`, but where nobody is better the receiver's own fresh soft targets teach.

    Distilling from oneself rather than from nothing is what made the mutual exchange better than its controls in the
    prototype (DESIGN.md 5.5). Returns int32 [S] with SELF there; NOBODY only where the receiver itself has no loss.
    """
    chosen = dual_min_ce(own, teachers, margin=margin)
    chosen[(chosen == NOBODY) & np.isfinite(_known(own))] = SELF
    return chosen


def best_always(own: Floats, teachers: Floats, *, margin: float = 0.0) -> NDArray[np.int32]:
    """The best teacher on every sample that anybody offers, however good the receiver is; `margin` changes nothing."""
    return _best(own, teachers)[0]


def _known(losses: Floats) -> Floats:
    values = np.asarray(losses, dtype=np.float64)
    return np.where(np.isnan(values), np.inf, values)


def _best(own: Floats, teachers: Floats) -> tuple[NDArray[np.int32], Floats]:
    """Lowest row of `teachers` with the smallest loss, or NOBODY, and that loss, or inf. Each [S]."""
    losses, samples = _known(teachers), np.asarray(own).shape
    if losses.ndim != 2 or losses.shape[1:] != samples:
        raise ValueError(
            f"teachers' losses have shape {losses.shape}, (teachers, {', '.join(map(str, samples))}) expected"
        )
    losses = np.vstack([losses, np.full((1, *samples), np.inf)])
    winners, best = np.argmin(losses, axis=0), np.min(losses, axis=0)
    return np.where(np.isfinite(best), winners, NOBODY).astype(np.int32), best
