"""The receiver's own cross-entropy, the lies it catches, and the rules that choose a teacher."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedmkt.knowledge import Knowledge, decode, encode
from fedmkt.protocol import DistillationConfig
from fedmkt.selection import (
    NOBODY,
    SELF,
    best_always,
    best_or_self,
    dual_min_ce,
    recompute_cross_entropy,
    select,
)
from fedmkt.tokenized_set import TokenizedSet
from random_knowledge import random_header, random_knowledge

INF, NAN = np.inf, np.nan


def text_of(gold: list[list[int]], samples: list[int], bytes_each: int = 2) -> TokenizedSet:
    """Rows whose tokens all take `bytes_each` bytes; the response begins at byte 10."""
    counts = [len(ids) for ids in gold]
    ends = np.concatenate([10 + bytes_each * np.arange(count) for count in counts]).astype(np.int32)
    return TokenizedSet(
        samples=np.array(samples, np.int32),
        row_splits=np.cumsum([0, *counts]).astype(np.int32),
        context_ends=ends,
        gold_ids=np.concatenate([np.array(ids, np.int32) for ids in gold]),
        gold_ends=ends + bytes_each,
        response_bytes=np.array([bytes_each * count for count in counts], np.int32),
    )


Row = tuple[dict[int, float], float]  # kept probabilities by token id, and the stated one of the realised token


def said(samples: list[list[Row]], indices: list[int], **header: Any) -> Knowledge:
    rows = [row for sample in samples for row in sample]
    counts = [len(sample) for sample in samples]
    return Knowledge(
        header=random_header(vocabulary_size=100, **{"top_k": 3, "top_p": 0.9, **header}),
        samples=np.array(indices, np.int32),
        row_splits=np.cumsum([0, *counts]).astype(np.int32),
        context_ends=np.concatenate([10 + 2 * np.arange(count) for count in counts]).astype(np.int32),
        gold_logprobs=np.log([stated for _, stated in rows]).astype(np.float32),
        entry_splits=np.cumsum([0, *(len(kept) for kept, _ in rows)]).astype(np.int32),
        token_ids=np.array([token for kept, _ in rows for token in sorted(kept)], np.int32),
        logprobs=np.log([kept[token] for kept, _ in rows for token in sorted(kept)]).astype(np.float32),
    )


# ------------------------------------------------------------------------------------------------ cross-entropy


def test_cross_entropy_is_per_byte_of_the_response_or_per_token() -> None:
    """Two tokens of two bytes each, probabilities 1/2 and 1/8: ln 16 nats over 4 bytes or 2 tokens."""
    knowledge = said([[({5: 0.5, 6: 0.4}, 0.5), ({1: 0.6, 2: 0.2, 7: 0.125}, 0.125)]], [4])
    text = text_of([[5, 7]], [4])
    per_byte = recompute_cross_entropy(knowledge, text, unit="nats_per_byte")
    assert per_byte.values == pytest.approx([np.log(16) / 4])
    assert per_byte.refused == {}
    assert recompute_cross_entropy(knowledge, text, unit="nats_per_token").values == pytest.approx([np.log(16) / 2])


def test_a_realised_token_that_was_cut_counts_with_its_stated_log_probability() -> None:
    knowledge = said([[({5: 0.5, 6: 0.2, 8: 0.1}, 0.05)]], [4])
    assert recompute_cross_entropy(knowledge, text_of([[30]], [4])).values == pytest.approx([-np.log(0.05) / 2])


def test_samples_that_were_not_sent_are_infinite_and_not_refused() -> None:
    row: Row = ({5: 0.95}, 0.95)
    knowledge = said([[row], [row], [row]], [2, 4, 9])
    result = recompute_cross_entropy(knowledge, text_of([[5], [5], [5], [5]], [3, 4, 5, 9]))
    loss = -np.log(0.95) / 2
    assert result.values == pytest.approx([INF, loss, INF, loss])
    assert result.refused == {}


def test_a_response_without_bytes_has_no_loss_per_byte() -> None:
    """Only an end-of-text token was left of it."""
    text = text_of([[5]], [4], bytes_each=0)
    knowledge = said([[({5: 0.95}, 0.95)]], [4])
    assert recompute_cross_entropy(knowledge, text).values == [INF]
    assert recompute_cross_entropy(knowledge, text, unit="nats_per_token").values == pytest.approx([-np.log(0.95)])


HONEST: Row = ({5: 0.5, 6: 0.3, 7: 0.1}, 0.3)


@pytest.mark.parametrize(
    ("lie", "realised", "reason"),
    [
        (({5: 0.5, 6: 0.3, 7: 0.1}, 0.5), 6, "kept with another log-probability than the -0.693 nats stated"),
        (({5: 0.5, 6: 0.3, 7: 0.1}, 0.1), 6, "kept with another log-probability"),
        (({5: 0.5, 6: 0.2, 7: 0.02}, 0.1), 50, "above the smallest kept entry"),
        (({5: 0.5, 6: 0.3, 7: 0.15}, 0.1), 50, "more than the whole tail"),
        (({5: 0.4}, 0.4), 50, "fewer than 3 tokens that do not reach 0.9"),
    ],
)
@pytest.mark.parametrize("block_rows", [1, 3, 8192])  # one: every sample alone, also the one of two rows
def test_a_lie_about_the_realised_token_refuses_the_sample_and_no_other(
    lie: Row, realised: int, reason: str, block_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedmkt.selection.VERIFIED_ROWS", block_rows)
    knowledge = said([[HONEST], [HONEST, lie], [HONEST]], [0, 1, 2])
    result = recompute_cross_entropy(knowledge, text_of([[6], [6, realised], [6]], [0, 1, 2]))
    loss = -np.log(0.3) / 2
    assert result.values == pytest.approx([loss, INF, loss])
    assert list(result.refused) == [1]
    assert result.refused[1].startswith("row 1 of public sample 1: ")
    assert reason in result.refused[1]


def test_rows_that_the_text_does_not_give_refuse_the_sample() -> None:
    knowledge = said([[HONEST, HONEST], [HONEST, HONEST], [HONEST]], [0, 1, 2])
    text = text_of([[6, 6], [6], [6]], [0, 1, 2])
    moved = dataclasses.replace(text, context_ends=text.context_ends + np.array([0, 1, 0, 0], np.int32))
    result = recompute_cross_entropy(knowledge, moved)
    assert result.values == pytest.approx([INF, INF, -np.log(0.3) / 2])
    assert set(result.refused) == {0, 1}
    assert "not those that the text gives" in result.refused[0]


def test_a_row_that_keeps_the_whole_vocabulary_needs_no_mass_rule() -> None:
    knowledge = said([[({0: 0.4, 1: 0.3}, 0.3)]], [0])
    small = dataclasses.replace(knowledge, header=dataclasses.replace(knowledge.header, vocabulary_size=2))
    assert recompute_cross_entropy(small, text_of([[1]], [0])).values == pytest.approx([-np.log(0.3) / 2])


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    vocabulary_size=st.integers(2, 40_000),
    top_k=st.integers(1, 100),
    top_p=st.sampled_from([0.5, 0.9, 0.98, 0.999, 1.0]),
    sent=st.booleans(),
)
def test_honest_knowledge_is_never_refused(
    seed: int, vocabulary_size: int, top_k: int, top_p: float, sent: bool
) -> None:
    """Before and after the wire's rounding. The realised token is one whose probability is the stated one."""
    knowledge = random_knowledge(seed, vocabulary_size=vocabulary_size, top_k=top_k, top_p=top_p)
    text = realised_in(knowledge)
    if sent:
        knowledge = decode(encode(knowledge))
    result = recompute_cross_entropy(knowledge, text, unit="nats_per_token")
    assert result.refused == {}
    assert result.values == pytest.approx(slow_cross_entropy(knowledge, text), rel=1e-5)


def realised_in(knowledge: Knowledge) -> TokenizedSet:
    """The text that would give this knowledge: realised ids by their stated log-probability, unkept ones elsewhere."""
    gold_ids = np.full(knowledge.rows, -1)
    for row in range(knowledge.rows):
        entries = slice(*knowledge.entry_splits[row : row + 2])
        ids, logprobs = knowledge.token_ids[entries], knowledge.logprobs[entries]
        hits = np.flatnonzero(logprobs == knowledge.gold_logprobs[row])
        gold_ids[row] = ids[hits[0]] if hits.size else next(i for i in range(10**6) if i not in ids)
    splits = knowledge.row_splits
    return TokenizedSet(
        samples=knowledge.samples,
        row_splits=splits,
        context_ends=knowledge.context_ends,
        gold_ids=gold_ids.astype(np.int32),
        gold_ends=knowledge.context_ends + 1,
        response_bytes=np.diff(splits).astype(np.int32),
    )


def slow_cross_entropy(knowledge: Knowledge, text: TokenizedSet) -> list[float]:
    losses = []
    for sample in range(len(knowledge.samples)):
        total = 0.0
        for row in range(knowledge.row_splits[sample], knowledge.row_splits[sample + 1]):
            first, stop = knowledge.entry_splits[row : row + 2]
            kept = dict(zip(knowledge.token_ids[first:stop], knowledge.logprobs[first:stop], strict=True))
            total -= float(kept.get(text.gold_ids[row], knowledge.gold_logprobs[row]))
        losses.append(total / int(knowledge.row_splits[sample + 1] - knowledge.row_splits[sample]))
    return losses


def test_the_most_a_sender_can_claim_for_a_cut_token_is_its_share_of_the_tail() -> None:
    """With the fewest tokens that reach 0.98 sent, a sender that keeps only wrong tokens cannot state a good loss."""
    for stated in (0.9, 0.5, 0.1, 0.03):
        knowledge = said([[({5: 1 - max(stated, 0.02)}, min(stated, 1 - stated))]], [0], top_k=64, top_p=0.98)
        assert recompute_cross_entropy(knowledge, text_of([[50]], [0])).values == [INF]


# ------------------------------------------------------------------------------------------------ rules


def losses(*rows: list[float]) -> NDArray[np.float64]:
    return np.array(rows)


def test_dual_min_ce_takes_the_best_teacher_only_where_it_beats_the_receiver() -> None:
    own = np.array([1.0, 1.0, 1.0, 1.0])
    teachers = losses([0.9, 1.1, 1.0, 0.2], [0.8, 1.2, 1.5, 0.2])
    assert dual_min_ce(own, teachers).tolist() == [1, NOBODY, NOBODY, 0]


def test_the_margin_says_how_much_better_a_teacher_has_to_be() -> None:
    own, teachers = np.array([1.0, 1.0]), losses([0.96, 0.94])
    assert dual_min_ce(own, teachers).tolist() == [0, 0]
    assert dual_min_ce(own, teachers, margin=0.05).tolist() == [NOBODY, 0]


def test_best_or_self_falls_back_to_the_receivers_own_targets() -> None:
    own = np.array([1.0, 1.0, 1.0, INF, INF])
    teachers = losses([0.96, 0.94, INF, 5.0, INF], [0.97, 0.90, INF, 4.0, NAN])
    assert best_or_self(own, teachers).tolist() == [SELF, 1, SELF, 1, NOBODY]
    assert best_or_self(own, teachers, margin=0.0).tolist() == [0, 1, SELF, 1, NOBODY]


def test_best_always_ignores_the_receivers_own_loss() -> None:
    teachers = losses([0.96, 3.0, INF], [0.97, 2.0, NAN])
    assert best_always(np.array([0.1, NAN, 0.1]), teachers).tolist() == [0, 1, NOBODY]


@pytest.mark.parametrize("rule", [dual_min_ce, best_or_self, best_always])
def test_ties_go_to_the_first_teacher(rule: Any) -> None:
    assert rule(np.array([1.0]), losses([0.5], [0.25], [0.25])).tolist() == [1]


@pytest.mark.parametrize(
    ("rule", "own", "expected"),
    [
        (dual_min_ce, [1.0, INF, NAN], [NOBODY, NOBODY, NOBODY]),
        (best_or_self, [1.0, INF, NAN], [SELF, NOBODY, NOBODY]),
        (best_always, [1.0, INF, NAN], [NOBODY, NOBODY, NOBODY]),
    ],
)
@pytest.mark.parametrize("offers", [np.zeros((0, 3)), np.full((2, 3), INF), np.full((1, 3), NAN)], ids=str)
def test_without_any_offer_nobody_teaches(rule: Any, own: list[float], expected: list[int], offers: Any) -> None:
    chosen = rule(np.array(own), offers)
    assert chosen.tolist() == expected
    assert chosen.dtype == np.int32


def test_no_samples_are_no_trouble() -> None:
    for rule in (dual_min_ce, best_or_self, best_always):
        assert rule(np.zeros(0), np.zeros((3, 0))).tolist() == []


def test_losses_of_another_number_of_samples_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"\(2, 4\)"):
        dual_min_ce(np.zeros(3), np.zeros((2, 4)))


@pytest.mark.parametrize(
    ("rule", "expected"), [("best_or_self", [SELF, 0]), ("dual_min_ce", [NOBODY, 0]), ("best_always", [0, 0])]
)
def test_the_configuration_names_the_rule(rule: Any, expected: list[int]) -> None:
    assert DistillationConfig(rule=rule).rule == rule
    assert select(rule, np.array([1.0, 1.0]), losses([0.96, 0.94]), margin=0.05).tolist() == expected


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**32 - 1), teachers=st.integers(0, 5), margin=st.sampled_from([0.0, 0.05]))
def test_the_rules_agree_with_a_slow_loop(seed: int, teachers: int, margin: float) -> None:
    rng = np.random.default_rng(seed)
    values = np.array([0.1, 0.15, 0.2, 0.5, INF, NAN])
    own, offers = rng.choice(values, 7), rng.choice(values, (teachers, 7))
    dual, always = [], []
    for sample in range(7):
        best, loss = NOBODY, INF
        for teacher in range(teachers):
            if offers[teacher, sample] < loss:
                best, loss = teacher, offers[teacher, sample]
        always.append(best)
        mine = INF if np.isnan(own[sample]) else own[sample]
        dual.append(best if loss < mine - margin else NOBODY)
    assert dual_min_ce(own, offers, margin=margin).tolist() == dual
    assert best_always(own, offers, margin=margin).tolist() == always
