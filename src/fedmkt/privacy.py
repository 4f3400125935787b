"""What a site wants of differential privacy, and what it has spent of it. No torch, no Opacus: settings and state.

The mechanism is in `fedmkt.ml.private_training`, the accountant in `fedmkt.ml.private_budget`; docs/privacy.md says
what is guaranteed and what is not.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from fedmkt.errors import Refusal

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class PrivacyRefused(Refusal):
    """A setting, model or state with which the guarantee could not be given."""

    code = "privacy.refused"
    title = "Differential privacy cannot be given"


class BudgetSpent(PrivacyRefused):
    code = "privacy.budget_spent"
    title = "The privacy budget is used up"


class PrivacyGoal(BaseModel):
    """A site's own choice, which no federation can change.

    epsilon, delta: the guarantee after all `rounds`; delta None means samples^-1.1. max_grad_norm: longest gradient
    that one sample may contribute, in the L2 norm over all trained weights.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    epsilon: float = Field(gt=0, le=100)
    rounds: int = Field(gt=0, le=100_000)
    delta: float | None = Field(default=None, gt=0, lt=1)
    max_grad_norm: Positive = 1.0


class PrivacyLedger(BaseModel):
    """Everything that was spent since the site's first training, whether or not its result was kept.

    steps: (noise multiplier, sample rate, steps), the form of Opacus's accountants; rounds: private trainings that
    came to their end.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: tuple[tuple[float, float, int], ...] = ()
    rounds: int = 0

    def spend(self, noise_multiplier: float, sample_rate: float, steps: int = 1) -> "PrivacyLedger":
        """With so many more steps; equal neighbours are one entry."""
        entries = list(self.steps)
        if entries and entries[-1][:2] == (noise_multiplier, sample_rate):
            steps += entries.pop()[2]
        return self.model_copy(update={"steps": (*entries, (noise_multiplier, sample_rate, steps))})


class PrivacyView(BaseModel):
    """Where the budget stands, for the status page and the log."""

    state: Literal["open", "used_up"]
    epsilon: float = Field(description="spent until now, with `delta`")
    delta: float
    target_epsilon: float
    rounds: int = Field(description="private trainings until now")
    planned_rounds: int
    steps: int
    noise_multiplier: float | None = Field(description="of the latest step")
