"""The last cut before knowledge leaves: the federation's, then the site's own. R rows, N entries.

Neither a smaller k nor coarser log-probabilities is a guarantee of anything: they make less of the model visible, and
what stays visible can still be learned from. docs/security.md says what is known of that.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fedmkt.knowledge import Knowledge, encode
from fedmkt.knowledge_cut import shared_knowledge
from fedmkt.protocol import KnowledgeConfig
from fedmkt_client_agent.policy import Policy

Floats = NDArray[np.float64]
SMALLEST_TAIL = 1e-6


def made_with(policy: Policy) -> str:
    """The part of a policy that decides what knowledge looks like."""
    return f"max_top_k={policy.max_top_k} round_logprobs_nats={policy.round_logprobs_nats:g}"


def disclosed(own: Knowledge, config: KnowledgeConfig, policy: Policy) -> bytes:
    """The blob that leaves: at most `max_top_k` tokens a row, on the policy's scale."""
    top_k = config.top_k if policy.max_top_k is None else min(config.top_k, policy.max_top_k)
    return encode(
        coarser(shared_knowledge(own, config.model_copy(update={"top_k": top_k})), policy.round_logprobs_nats)
    )


def coarser(knowledge: Knowledge, step_nats: float) -> Knowledge:
    """Each row's log-probabilities as whole steps below its largest, and all of the row moved so that its kept mass
    stays: receivers hold the tail against it. The realised token's moves with its entry; where it was cut, it stays at
    or below the smallest entry and within the tail. 0 changes nothing.
    """
    if step_nats == 0:
        return knowledge
    starts, counts = knowledge.entry_splits[:-1], np.diff(knowledge.entry_splits)
    exact, exact_gold = knowledge.logprobs.astype(np.float64), knowledge.gold_logprobs.astype(np.float64)
    largest = np.maximum.reduceat(exact, starts)  # (R,)
    below = _whole_steps(exact - np.repeat(largest, counts), step_nats)  # (N,) <= 0
    mass = np.minimum(np.add.reduceat(np.exp(exact), starts), 1.0)
    tops = np.log(mass) - np.log(np.add.reduceat(np.exp(below), starts))
    logprobs = below + np.repeat(tops, counts)
    gold = _whole_steps(exact_gold - largest, step_nats) + tops
    most = np.minimum(np.minimum.reduceat(logprobs, starts), np.log(np.maximum(1.0 - mass, SMALLEST_TAIL)))
    cut = exact_gold < np.minimum.reduceat(exact, starts)
    return replace(
        knowledge,
        gold_logprobs=np.where(cut, np.minimum(gold, most), gold).astype(np.float32),
        logprobs=logprobs.astype(np.float32),
    )


def _whole_steps(distances: Floats, step_nats: float) -> Floats:
    rounded: Floats = np.rint(distances / step_nats) * step_nats
    return rounded
