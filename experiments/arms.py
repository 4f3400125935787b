"""The arms: who teaches whom by which rule, and what is switched off. All are played by one function, `play.play`."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

LlmPart = Literal["sites", "expert", "worst", "mean", "nobody", "pooled", "frozen", "absent"]
SitePart = Literal["llm", "nobody", "private", "absent"]


@dataclass(frozen=True)
class Arm:
    """llm: its teachers. expert, worst: one site for each domain; mean: all sites' distributions in equal parts;
    pooled: nobody, it sees all private text itself; frozen: it teaches and does not learn; absent: nobody asks for it.

    sites: who teaches them on the public set. private: they train on private text in that place, too; absent: they do
    not learn there and are not measured. `changes` are made to the federation's configuration, part by part, and
    `llm_changes` to how the LLM alone distils.
    """

    about: str
    llm: LlmPart
    sites: SitePart
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    llm_changes: Mapping[str, Any] = field(default_factory=dict)
    private: bool = True  # sites train on their own text before each upload
    replay: bool = True  # and beside the public text
    averages: bool = False  # adapters, where the scenario is homogeneous
    averages_only: bool = False  # makes no sense where they are not
    plays: bool = True  # False: nothing is trained

    @property
    def digest(self) -> str:
        """Names its results: an arm that plays otherwise is another one."""
        content = {name: value for name, value in asdict(self).items() if name != "about"}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:6]

    @property
    def paper(self) -> bool:
        return self.changes.get("distillation", {}).get("profile") == "paper"

    @property
    def gold_alone(self) -> bool:
        return self.changes.get("distillation", {}).get("gold_weight") == 1.0


NO_GATE = {"gate": {"max_regression_bits_per_byte": 100.0}}  # which would hide what a bad teacher does
GOLD = {"distillation": {"rule": "dual_min_ce", "gold_weight": 1.0}}  # without a better teacher: labels alone
PAPER = {
    "distillation": {
        "profile": "paper",
        "rule": "dual_min_ce",
        "projection": "mined",
        "residual_bucket": False,
        "gold_weight": 0.9,
    }
}


def _without(about: str, **distillation: Any) -> Arm:
    """The default without one of its ingredients."""
    return Arm(about, "sites", "llm", {"distillation": distillation}, averages=True)


ARMS: Mapping[str, Arm] = {
    "zero_shot": Arm("the pre-trained models", "absent", "absent", plays=False),
    "private_only": Arm("Standalone: private text alone", "absent", "private"),
    "public_only": Arm("public labels alone", "nobody", "nobody", GOLD, private=False, replay=False),
    "private_public": Arm("private text and public labels", "absent", "nobody", GOLD),
    "self_distillation": Arm("labels and one's own soft targets", "nobody", "nobody", {}),
    "worst_teacher": Arm(
        "each domain taught by the site that knows it least",
        "worst",
        "llm",
        NO_GATE,
        llm_changes={"rule": "best_always"},
        averages=True,
    ),
    "oracle_teacher": Arm(
        "each domain taught by the site that works in it",
        "expert",
        "llm",
        NO_GATE,
        llm_changes={"rule": "best_always"},
        averages=True,
    ),
    "llm2slm": Arm("a frozen LLM teaches the sites", "frozen", "llm"),
    "fedavg": Arm(
        "private text, public labels, averaged adapters", "absent", "nobody", GOLD, averages=True, averages_only=True
    ),
    "paper": Arm("FedMKT as printed", "sites", "llm", PAPER, averages=True),
    "fedmkt": Arm("FedMKT, the default", "sites", "llm", averages=True),
    "without_margin": _without("any better teacher teaches", margin_nats_per_byte=0.0),
    "without_self": _without("nobody teaches where no teacher is better", rule="dual_min_ce"),
    "without_selection": _without("the best teacher, however good the receiver", rule="best_always"),
    "without_buckets": _without("re-tokenised tokens instead of prefix buckets", projection="retokenized"),
    "without_bytes": _without("the paper's nearest token by edits", projection="mined"),
    "without_residual": _without("cut distributions renormalised", residual_bucket=False),
    "without_labels": _without("soft targets alone", gold_weight=0.0),
    "without_replay": Arm("no private text beside the public", "sites", "llm", replay=False, averages=True),
    "without_gate": Arm("nothing is taken back", "sites", "llm", NO_GATE, averages=True),
    "without_averaging": Arm("every site keeps its adapter", "sites", "llm", averages_only=True),
    "centralized": Arm("the LLM sees everybody's private text", "pooled", "absent"),
    "mean_of_teachers": Arm(
        "FedMD's way: soft targets alone, the mean of all sites",
        "mean",
        "llm",
        NO_GATE,
        llm_changes={"rule": "best_always", "gold_weight": 0.0},
        averages=True,
    ),
}
