"""What a federation is set to do, checked as a whole."""

from typing import Literal

from pydantic import Field, model_validator

from fedmkt.protocol.messages import Message, Name

MapMethod = Literal["mined", "retokenized"]
SelectionRule = Literal["best_or_self", "dual_min_ce", "best_always"]
AverageRule = Literal["mean", "median", "trimmed_mean"]


class LoraConfig(Message):
    """LoRA adapters on every linear layer of the blocks (`targets` empty) or on the named modules."""

    rank: int = Field(default=16, ge=1, le=1024)
    alpha: float = Field(default=32.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: tuple[str, ...] = Field(default=(), max_length=64)


class OptimizerConfig(Message):
    """AdamW with a linear warm-up; state continues over rounds."""

    learning_rate: float = Field(default=2e-3, gt=0, le=1)
    batch_size: int = Field(default=16, ge=1, le=4096, description="samples per step")
    weight_decay: float = Field(default=0.01, ge=0, le=1)
    warmup_steps: int = Field(default=10, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)


class KnowledgeConfig(Message):
    """What a party shares for each response row: at most `top_k` tokens, the fewest that reach `top_p`."""

    top_k: int = Field(default=64, ge=1, le=1024)
    top_p: float = Field(default=0.98, gt=0, le=1)
    max_tokens: int = Field(default=512, ge=8, le=131072, description="longest sample in tokens; longer ones are cut")


class DistillationConfig(Message):
    """How a receiver learns from knowledge: paper sections 3.3 and 3.4, and the project's own default rule."""

    profile: Literal["default", "paper"] = Field(
        default="default",
        description="'paper' recomputes knowledge on the whole public set after training and aligns token strings; "
        "'default' works on fresh slices with byte-offset alignment",
    )
    rule: SelectionRule = "best_or_self"
    projection: Literal["prefix_buckets", "retokenized", "mined"] = "prefix_buckets"
    margin_nats_per_byte: float = Field(default=0.05, ge=0, le=10, description="how much better a teacher has to be")
    gold_weight: float = Field(default=0.5, ge=0, le=1, description="lambda: weight of the supervised term")
    temperature: float = Field(default=1.0, gt=0, le=100)
    residual_bucket: bool = True
    epochs: int = Field(default=1, ge=1, le=100, description="passes over the round's slice, per side")

    @model_validator(mode="after")
    def _as_printed(self) -> "DistillationConfig":
        if self.profile == "paper" and (self.rule, self.projection) != ("dual_min_ce", "mined"):
            raise ValueError(
                f"profile 'paper' means rule 'dual_min_ce' and projection 'mined', "
                f"here they are '{self.rule}' and '{self.projection}': set all three, or leave the profile at 'default'"
            )
        return self

    @property
    def map_method(self) -> MapMethod:
        """The vocabulary map this reads; prefix buckets fall back on re-tokenised tokens."""
        return "mined" if self.projection == "mined" else "retokenized"


class PrivateConfig(Message):
    """A site's training on its own text."""

    first_epochs: float = Field(default=2.0, ge=0, le=100, description="passes before the first upload")
    epochs: float = Field(default=1.0, ge=0, le=100, description="passes before every later upload")
    public_weight: float = Field(
        default=0.2, ge=0, le=1, description="weight of the public rows in a batch that also replays private rows"
    )


class GateConfig(Message):
    """After training, a party whose held-out loss grew by more than this goes back to where it was."""

    max_regression_bits_per_byte: float = Field(default=0.02, ge=0, le=100)


class PublicSetConfig(Message):
    """How the public set is cut: a held-out part for evaluation and gates, then slices, one a round."""

    slices: int = Field(default=4, ge=1, le=10_000)
    holdout_share: float = Field(default=0.1, ge=0, lt=1)
    chat_template: str = Field(default="{role}: {content}\n", max_length=2000)


class EvaluationConfig(Message):
    """What is measured on held-out samples beside the loss; samples with choices are always asked as questions."""

    rouge_samples: int = Field(
        default=0, ge=0, le=10_000, description="held-out prompts to answer freely and score by Rouge-L; takes long"
    )
    answer_tokens: int = Field(default=64, ge=1, le=4096, description="longest free answer")


class Schedule(Message):
    """Quorum and patience. A round never waits for ever.

    `every_s` and `rounds` are what a federation begins with; `POST .../rounds` asks for others later.
    """

    every_s: float | None = Field(
        default=None, ge=1, le=366 * 86400, description="a round every so many seconds, on one grid; null: on demand"
    )
    rounds: int | None = Field(default=None, ge=1, le=1_000_000, description="the schedule's rounds; null: no end")
    quorum: int = Field(default=1, ge=1, le=10_000)
    gather_timeout_s: float = Field(
        default=60, ge=0, le=30 * 86400, description="once a quorum is ready, how long a round waits for the others"
    )
    collect_timeout_s: float = Field(default=3600, gt=0, le=30 * 86400)
    distill_timeout_s: float = Field(default=3600, gt=0, le=30 * 86400)
    apply_timeout_s: float = Field(default=3600, gt=0, le=30 * 86400)

    @model_validator(mode="after")
    def _counts_something(self) -> "Schedule":
        if self.rounds is not None and self.every_s is None:
            raise ValueError(f"rounds is {self.rounds} but every_s is not set; set both, or ask for rounds on demand")
        return self


class FederationConfig(Message):
    """One LLM, one public set, one configuration, many sites; checked as a whole."""

    name: Name
    scenario: Literal["heterogeneous", "homogeneous", "one_to_one"] = "heterogeneous"
    sites: tuple[Name, ...] = Field(min_length=1, max_length=10_000, description="every site that may enrol")
    llm_training: bool = Field(default=True, description="false: the LLM only teaches")
    average_adapters: bool = Field(default=False, description="homogeneous only: sites go on from their adapters' mean")
    average_rule: AverageRule = Field(
        default="mean",
        description="'mean' is FedAvg by private sample count; 'median' and 'trimmed_mean' bear some sites that lie",
    )
    seed: int = Field(default=0, ge=0, lt=2**32)
    public_set: PublicSetConfig = PublicSetConfig()
    schedule: Schedule = Schedule()
    knowledge: KnowledgeConfig = KnowledgeConfig()
    distillation: DistillationConfig = DistillationConfig()
    private: PrivateConfig = PrivateConfig()
    lora: LoraConfig | None = Field(default=LoraConfig(), description="null trains every weight")
    llm_optimizer: OptimizerConfig = OptimizerConfig()
    site_optimizer: OptimizerConfig = OptimizerConfig()
    gate: GateConfig = GateConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _consistent(self) -> "FederationConfig":
        if len(set(self.sites)) != len(self.sites):
            raise ValueError("a site is named twice in sites; name each once")
        if self.schedule.quorum > len(self.sites):
            raise ValueError(
                f"quorum is {self.schedule.quorum} but only {len(self.sites)} sites are named; 1 <= quorum <= sites"
            )
        if self.scenario == "one_to_one" and len(self.sites) != 1:
            raise ValueError(f"one_to_one has exactly one site, {len(self.sites)} are named")
        if self.average_adapters and self.scenario != "homogeneous":
            raise ValueError(f"average_adapters needs scenario 'homogeneous', it is '{self.scenario}'")
        if self.average_adapters and self.lora is None:
            raise ValueError("average_adapters needs lora: only adapters travel, never whole models")
        if self.average_rule != "mean" and not self.average_adapters:
            raise ValueError(f"average_rule is '{self.average_rule}' but average_adapters is off; switch it on")
        return self
