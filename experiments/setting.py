"""One experiment as its TOML file declares it, checked as a whole before anything runs."""

import hashlib
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from experiments.arms import ARMS, Arm
from fedmkt.demo.models import ModelRecipe
from fedmkt.demo.vocabularies import TokenizerKind
from fedmkt.ml.plan import step_count
from fedmkt.protocol import (
    DistillationConfig,
    EvaluationConfig,
    FederationConfig,
    GateConfig,
    KnowledgeConfig,
    LoraConfig,
    OptimizerConfig,
    PrivateConfig,
)

FORMAT = 1  # grows when the same setting would give other results by intent
SKIPPED = {"name", "question", "arms", "seeds"}  # other arms and seeds leave finished results valid


class Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Model(Part):
    """A pre-training recipe without what a seed and a site's domain add to it."""

    architecture: str
    settings: dict[str, int | float | bool]
    tokenizer: TokenizerKind
    vocabulary: int = Field(ge=300)
    steps: int = Field(ge=1)
    domain_chunks: int = Field(ge=0, description="of each domain that it has seen, beside the general text")

    def recipe(self, name: str, domains: tuple[str, ...], seed: int) -> ModelRecipe:
        return ModelRecipe(
            name,
            self.architecture,
            dict(self.settings),
            self.tokenizer,
            self.vocabulary,
            self.steps,
            domains,
            self.domain_chunks,
            seed=seed,
        )


class Texts(Part):
    """Chunks of about 256 bytes; all counts but those of `general` and `private` are per domain."""

    source: Literal["installed", "real"] = Field(
        default="installed", description="the documentation in the installed packages, or data sets in FEDMKT_DATA_DIR"
    )
    domains: int = Field(default=4, ge=1)
    general: int = Field(default=6000, ge=1, description="of pre-training, without a domain")
    private: int = Field(ge=1, description="of each site")
    private_holdout: int = Field(ge=1, description="of each site, for its gate")
    public: Literal["in_domain", "off_domain", "unlabelled"] = "in_domain"
    slice: int = Field(ge=1, description="public ones in a round's slice")
    public_holdout: int = Field(ge=1, description="public ones for the gates")
    test: int = Field(ge=1, description="measured on and nothing else")


class Federation(Part):
    """What the product is set to, where it differs from its defaults; arms change this further."""

    knowledge: KnowledgeConfig = KnowledgeConfig()
    distillation: DistillationConfig = DistillationConfig()
    private: PrivateConfig = PrivateConfig()
    lora: LoraConfig | None = None
    llm_optimizer: OptimizerConfig = OptimizerConfig()
    site_optimizer: OptimizerConfig = OptimizerConfig()
    gate: GateConfig = GateConfig()
    evaluation: EvaluationConfig = EvaluationConfig()


class Setting(Part):
    """One experiment. Sites take the models in turn, unless they shall be equal; site i works in domain i."""

    name: str = Field(pattern=r"^[a-z0-9_]+$")
    question: str
    scenario: Literal["heterogeneous", "homogeneous", "one_to_one"]
    arms: tuple[str, ...] = Field(min_length=1)
    seeds: tuple[int, ...] = Field(min_length=1)
    rounds: int = Field(ge=1)
    measured: Literal["last", "every"] = "last"
    sites: int = Field(ge=1)
    texts: Texts
    llm: Model
    site_models: tuple[Model, ...] = Field(min_length=1)
    federation: Federation = Federation()

    @classmethod
    def read(cls, path: Path) -> "Setting":
        return cls.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))

    @property
    def digest(self) -> str:
        """Names the results: what may not differ between units that are compared."""
        content = [FORMAT, self.model_dump(mode="json", exclude=SKIPPED)]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]

    @model_validator(mode="after")
    def _arms_play(self) -> Self:
        unknown = [name for name in self.arms if name not in ARMS]
        if unknown:
            raise ValueError(f"there are no arms {unknown}; known: {', '.join(ARMS)}")
        alone = [name for name in self.arms if ARMS[name].averages_only and self.scenario != "homogeneous"]
        if alone:
            raise ValueError(f"arms {alone} average adapters, which scenario {self.scenario!r} does not")
        if self.texts.public == "unlabelled" and (gold := [n for n in self.arms if ARMS[n].gold_alone]):
            raise ValueError(f"arms {gold} learn public labels, and the public set has none")
        return self

    @model_validator(mode="after")
    def _sites_fit(self) -> Self:
        if self.sites > self.texts.domains:
            raise ValueError(f"{self.sites} sites have {self.texts.domains} domains; give each its own")
        if self.scenario == "homogeneous" and len(self.site_models) != 1:
            raise ValueError(f"homogeneous sites have one model, {len(self.site_models)} are given")
        if self.scenario == "homogeneous" and self.federation.lora is None:
            raise ValueError("homogeneous sites average adapters, which need federation.lora")
        return self

    @model_validator(mode="after")
    def _steps_even(self) -> Self:
        """The paper's profile passes once over all slices where others pass often over one: as many steps."""
        distillation, size = self.federation.distillation, self.slice_samples
        for optimizer in (self.federation.llm_optimizer, self.federation.site_optimizer):
            if size * distillation.epochs % optimizer.batch_size:
                raise ValueError(
                    f"{distillation.epochs} epochs over {size} public samples are no whole batches of "
                    f"{optimizer.batch_size}; arms would differ in steps"
                )
            if size * self.rounds % optimizer.batch_size:
                raise ValueError(f"{size * self.rounds} public samples are no whole batches of {optimizer.batch_size}")
        if "paper" in self.arms and distillation.epochs < 2:
            raise ValueError("the arm 'paper' plays as many rounds as there are epochs, which must be 2 at least")
        return self

    # -------------------------------------------------------------------------------------------- what follows

    @property
    def slice_samples(self) -> int:
        return self.texts.slice * self.texts.domains

    @property
    def public_samples(self) -> int:
        return (self.texts.slice * self.rounds + self.texts.public_holdout) * self.texts.domains

    def model_of(self, site: int) -> Model:
        return self.site_models[site % len(self.site_models)]

    def public_steps(self, optimizer: OptimizerConfig) -> int:
        """Steps on the public set that a party takes in all its rounds, in every arm in which it takes any."""
        epochs = self.federation.distillation.epochs
        return self.rounds * step_count(self.slice_samples, optimizer.batch_size, epochs)

    def private_steps(self) -> int:
        """Steps that a site takes on its private text before its uploads."""
        private, size = self.federation.private, self.federation.site_optimizer.batch_size
        first, later = (step_count(self.texts.private, size, each) for each in (private.first_epochs, private.epochs))
        return first + (self.rounds - 1) * later

    def config(self, arm: Arm, sites: tuple[str, ...], seed: int) -> FederationConfig:
        """The federation as this arm plays it."""
        given = self.federation
        averages = arm.averages and self.scenario == "homogeneous"
        changes: dict[str, Mapping[str, Any]] = {part: dict(values) for part, values in arm.changes.items()}
        if self.texts.public == "unlabelled":
            changes["distillation"] = {**changes.get("distillation", {}), "gold_weight": 0.0}
        if arm.paper:
            changes["distillation"] = {**changes["distillation"], "epochs": 1}
            changes["private"] = {"epochs": self._paper_private_epochs}
        parts = {
            name: {**value, **changes.get(name, {})} if isinstance(value, dict) else value
            for name, value in given.model_dump().items()
        }
        held = self.texts.public_holdout * self.texts.domains
        content = {
            "name": self.name,
            "scenario": self.scenario,
            "sites": sites,
            "average_adapters": averages,
            "llm_training": arm.llm != "frozen",
            "seed": seed,
            "public_set": {"slices": self.rounds, "holdout_share": held / self.public_samples},
        }
        return FederationConfig.model_validate({**content, **parts})

    def arm_rounds(self, arm: Arm) -> int:
        return self.federation.distillation.epochs if arm.paper else self.rounds

    @property
    def _paper_private_epochs(self) -> float:
        """Fewer rounds with longer private training between them: as many steps in all."""
        private, size = self.federation.private, self.federation.site_optimizer.batch_size
        later = (self.rounds - 1) * step_count(self.texts.private, size, private.epochs)
        between = self.federation.distillation.epochs - 1
        if later % between:
            raise ValueError(f"{later} later private steps do not fall evenly between {between + 1} rounds")
        return later // between * size / self.texts.private
