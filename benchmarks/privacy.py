"""What DP-SGD costs and hides: loss on unseen private text, and membership read from shared knowledge, by epsilon.

    .venv/bin/python -m benchmarks.privacy MODEL PRIVATE.jsonl [BATCH_SIZE ...]

Half of the private samples, chosen by the hash of their text, train the site's model for ROUNDS rounds, the other half
never does; then the other way round, and the figures are means of both, since halves differ by chance. The attack is
that of an operator who puts texts into the public set and reads from the site's knowledge, as it came over the wire,
how likely each is: by itself, or against what the bare base model says. An area of 0.5 is guessing. One run: noise is
drawn anew each time. Prints the table of docs/privacy.md.
"""

import hashlib
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers.utils.logging import disable_progress_bar

from fedmkt.knowledge import decode, encode
from fedmkt.knowledge_cut import shared_knowledge
from fedmkt.ml.evaluation import ALL, evaluate
from fedmkt.ml.extraction import WIDE_TOP_K, WIDE_TOP_P, extract
from fedmkt.ml.models import load_base
from fedmkt.ml.party import Party
from fedmkt.ml.phases import private_epochs, private_phase
from fedmkt.ml.private_budget import PrivacyBudget
from fedmkt.privacy import PrivacyGoal, PrivacyLedger
from fedmkt.protocol import FederationConfig, OptimizerConfig
from fedmkt.public_set import PublicSample, PublicSet

ROUNDS = 10
EPSILONS = (math.inf, 8.0, 3.0, 1.0)
BATCH_SIZES = (16, 64)
FEDERATION = "fed_0123456789abcdef"

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Halves:
    trained: tuple[PublicSample, ...]
    unseen: tuple[PublicSample, ...]

    @property
    def swapped(self) -> "Halves":
        return Halves(self.unseen, self.trained)


@dataclass(frozen=True)
class Outcome:
    noise_multiplier: float  # 0 where there is no noise
    epsilon: float
    unseen_bits: float  # per byte
    trained_bits: float
    area_alone: float  # of the attack on single likelihoods
    area_against_base: float


def halves(path: Path) -> Halves:
    samples = PublicSet.from_jsonl(path.read_bytes()).samples
    ranked = sorted(samples, key=lambda sample: hashlib.sha256(sample.text.encode()).digest())
    middle = len(ranked) // 2
    return Halves(tuple(ranked[:middle]), tuple(ranked[middle:]))


def run(model: Path, texts: Halves, epsilon: float, batch_size: int) -> Outcome:
    """One site over ROUNDS rounds of private training alone."""
    config = FederationConfig(name="privacy", sites=("site",), site_optimizer=OptimizerConfig(batch_size=batch_size))
    party = Party(load_base(model, device="cpu"), config.lora, seed=0)
    base = likelihoods(party, texts, config)
    budget = None
    if math.isfinite(epsilon):
        goal = PrivacyGoal(epsilon=epsilon, rounds=ROUNDS)
        budget = PrivacyBudget(goal, len(texts.trained), PrivacyLedger(), lambda ledger: None)
    for number in range(ROUNDS):
        private_phase(party, texts.trained, config, epochs=private_epochs(config, number), budget=budget)
        if budget is not None:
            budget.round_done()
    after = likelihoods(party, texts, config)
    max_tokens = config.knowledge.max_tokens
    return Outcome(
        noise_multiplier=0.0 if budget is None else budget.ledger.steps[-1][0],
        epsilon=math.inf if budget is None else budget.view.epsilon,
        unseen_bits=evaluate(party, texts.unseen, max_tokens=max_tokens)[ALL].bits_per_byte,
        trained_bits=evaluate(party, texts.trained, max_tokens=max_tokens)[ALL].bits_per_byte,
        area_alone=area(after, len(texts.trained)),
        area_against_base=area(after - base, len(texts.trained)),
    )


def likelihoods(party: Party, texts: Halves, config: FederationConfig) -> Floats:
    """Mean log-probability of every sample's tokens, trained half first, out of knowledge that went over the wire."""
    bait = PublicSet((*texts.trained, *texts.unseen))
    wide = extract(
        party,
        bait,
        tuple(range(len(bait))),
        federation_id=FEDERATION,
        round_number=1,
        slice_index=0,
        adapter_version=0,
        top_k=WIDE_TOP_K,
        top_p=WIDE_TOP_P,
        max_tokens=config.knowledge.max_tokens,
    )
    received = decode(encode(shared_knowledge(wide, config.knowledge)))
    return np.array(
        [
            float(received.gold_logprobs[a:b].mean())
            for a, b in zip(received.row_splits, received.row_splits[1:], strict=False)
        ]
    )


def area(scores: Floats, trained: int) -> float:
    """Probability that a sample of the trained half scores above one of the other; ties count half."""
    above = scores[:trained, None] - scores[None, trained:]
    return float((above > 0).mean() + 0.5 * (above == 0).mean())


def main(arguments: Sequence[str]) -> None:
    disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers's own gap
    model, texts = Path(arguments[0]), halves(Path(arguments[1]))
    config = FederationConfig(name="privacy", sites=("site",))
    bare = Party(load_base(model, device="cpu"), config.lora, seed=0)
    everything = (*texts.trained, *texts.unseen)
    bits = evaluate(bare, everything, max_tokens=config.knowledge.max_tokens)[ALL].bits_per_byte
    print(f"{len(texts.trained)} samples, {ROUNDS} rounds; before: {bits:.4f} bits per byte\n")
    print("| batch | epsilon | noise | unseen bits/byte | trained bits/byte | attack | against base |\n|" + "---|" * 7)
    for batch_size in [int(given) for given in arguments[2:]] or BATCH_SIZES:
        for epsilon in EPSILONS:
            pair = [run(model, each, epsilon, batch_size) for each in (texts, texts.swapped)]
            mean = {key: sum(asdict(one)[key] for one in pair) / 2 for key in asdict(pair[0])}
            print(
                f"| {batch_size} | {mean['epsilon']:.2f} | {mean['noise_multiplier']:.2f} | {mean['unseen_bits']:.4f} "
                f"| {mean['trained_bits']:.4f} | {mean['area_alone']:.3f} | {mean['area_against_base']:.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main(sys.argv[1:])
