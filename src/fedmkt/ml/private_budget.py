"""How much noise a site's privacy budget asks for, and what it has spent. Needs Opacus (`fedmkt[privacy]`).

Epsilon is Opacus's own: the upper bound of its PRV accountant (Gopi et al. 2021, arXiv 2106.02848) for Poisson-sampled
Gaussian steps, composed over every step that the site ever took.
"""

import math
import warnings
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from opacus.accountants import PRVAccountant

from fedmkt.privacy import BudgetSpent, PrivacyGoal, PrivacyLedger, PrivacyRefused, PrivacyView

TOLERANCE = 0.01  # of the target epsilon that is not worth a finer search; also the accountant's own error
MOST_NOISE = 100.0  # multiplier beyond which a step teaches nothing
LEAST_NOISE = 1e-4  # no finer search


@lru_cache(maxsize=256)
def epsilon_of(ledger: PrivacyLedger, delta: float) -> float:
    """What all these steps together cost; 0 for none."""
    if not ledger.steps:
        return 0.0
    accountant = PRVAccountant()
    accountant.history = list(ledger.steps)
    with np.errstate(divide="ignore"), warnings.catch_warnings():  # log 0 where every sample takes part is meant
        warnings.filterwarnings("ignore", "Optimal order is the")  # of a first guess that only has to be large enough
        return float(accountant.get_epsilon(delta=delta))


class PrivacyBudget:
    """One site's goal and ledger. `commit` makes a ledger what the next process finds, or raises."""

    def __init__(
        self, goal: PrivacyGoal, samples: int, ledger: PrivacyLedger, commit: Callable[[PrivacyLedger], None]
    ) -> None:
        """samples: private training samples, taken as known to everybody. Raises PrivacyRefused."""
        self.goal, self.samples, self.ledger = goal, samples, ledger
        self.delta = samples**-1.1 if goal.delta is None else goal.delta
        self._commit = commit
        if self.delta >= 1 / samples:
            raise PrivacyRefused(
                f"delta is {self.delta:g} with {samples} private samples, which would allow to publish one of them; "
                f"set it below {1 / samples:g}, or leave it out for {samples**-1.1:.3g}"
            )

    def noise_for(self, sample_rate: float, steps: int, steps_of_later_round: int) -> float:
        """The noise multiplier with which these steps and those of all later planned rounds stay within the target.

        The latest one where it still does, else the smallest. Raises BudgetSpent when no round is left, or nothing
        useful would be.
        """
        rounds_left = self.goal.rounds - self.ledger.rounds
        if rounds_left <= 0:
            raise BudgetSpent(
                f"{self.ledger.rounds} private trainings are done, {self.goal.rounds} were planned for an epsilon of "
                f"{self.goal.epsilon:g}; the site goes on with public text only"
            )
        total = steps + (rounds_left - 1) * steps_of_later_round
        if self.ledger.steps and self.ledger.steps[-1][1] == sample_rate:
            present = self.ledger.steps[-1][0]
            if self._epsilon(present, sample_rate, total) <= self.goal.epsilon:
                return present
        return self._smallest_noise(sample_rate, total)

    def spend(self, noise_multiplier: float, sample_rate: float) -> None:
        """One step, committed before it is taken: a kill can make it count for nothing, never be forgotten."""
        ledger = self.ledger.spend(noise_multiplier, sample_rate)
        self._commit(ledger)
        self.ledger = ledger

    def round_done(self) -> PrivacyLedger:
        """The ledger to commit together with what the training gave."""
        self.ledger = self.ledger.model_copy(update={"rounds": self.ledger.rounds + 1})
        return self.ledger

    @property
    def view(self) -> PrivacyView:
        spent = epsilon_of(self.ledger, self.delta)
        used_up = self.ledger.rounds >= self.goal.rounds or spent >= self.goal.epsilon
        return PrivacyView(
            state="used_up" if used_up else "open",
            epsilon=round(spent, 4),
            delta=self.delta,
            target_epsilon=self.goal.epsilon,
            rounds=self.ledger.rounds,
            planned_rounds=self.goal.rounds,
            steps=sum(steps for _, _, steps in self.ledger.steps),
            noise_multiplier=self.ledger.steps[-1][0] if self.ledger.steps else None,
        )

    def _epsilon(self, noise_multiplier: float, sample_rate: float, steps: int) -> float:
        return epsilon_of(self.ledger.spend(noise_multiplier, sample_rate, steps), self.delta)

    def _smallest_noise(self, sample_rate: float, steps: int) -> float:
        """Least noise within the target, to TOLERANCE in epsilon; log epsilon is nearly linear in log noise."""
        low, high, above, reached = 0.0, 1.0, math.inf, self._epsilon(1.0, sample_rate, steps)
        while reached > self.goal.epsilon:
            low, high, above = high, 2 * high, reached
            if high > MOST_NOISE:
                raise BudgetSpent(
                    f"epsilon {epsilon_of(self.ledger, self.delta):.3f} of {self.goal.epsilon:g} is spent; "
                    f"{steps} more steps would need noise above {MOST_NOISE:g} times the gradient; the site goes on "
                    "with public text only"
                )
            reached = self._epsilon(high, sample_rate, steps)
        while self.goal.epsilon - reached > TOLERANCE and high - low > LEAST_NOISE:
            middle = high / 2 if low == 0 else _between(low, high, above, reached, self.goal.epsilon)
            epsilon = self._epsilon(middle, sample_rate, steps)
            if epsilon <= self.goal.epsilon:
                high, reached = middle, epsilon
            else:
                low, above = middle, epsilon
        return high


def _between(low: float, high: float, above: float, reached: float, wanted: float) -> float:
    """Where a straight line in logarithms has `wanted`, a tenth of the way away from either end at least."""
    part = math.log(above / wanted) / math.log(above / reached) if above > reached > 0 else 0.5
    return float(low * (high / low) ** min(max(part + 0.01, 0.1), 0.9))
