"""The privacy account: Opacus's own figures, noise for what is left, and nothing forgotten."""

from collections.abc import Callable

import pytest
from opacus.accountants import PRVAccountant
from opacus.accountants.utils import get_noise_multiplier

from fedmkt.ml.private_budget import TOLERANCE, PrivacyBudget, epsilon_of
from fedmkt.privacy import BudgetSpent, PrivacyGoal, PrivacyLedger, PrivacyRefused

RATE, SAMPLES = 0.1, 80


def budget(
    epsilon: float = 2.0,
    rounds: int = 3,
    ledger: PrivacyLedger | None = None,
    commit: Callable[[PrivacyLedger], None] = lambda ledger: None,
    delta: float | None = 1e-3,
) -> PrivacyBudget:
    goal = PrivacyGoal(epsilon=epsilon, rounds=rounds, delta=delta)
    return PrivacyBudget(goal, SAMPLES, ledger or PrivacyLedger(), commit)


@pytest.mark.parametrize(
    ("noise", "rate", "steps", "delta"), [(1.0, 0.1, 30, 1e-3), (0.8, 0.02, 200, 1e-5), (3.0, 1.0, 5, 1e-3)]
)
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_epsilon_is_what_opacus_says_of_the_same_steps(noise: float, rate: float, steps: int, delta: float) -> None:
    accountant, ledger = PRVAccountant(), PrivacyLedger()
    for _ in range(steps):
        accountant.step(noise_multiplier=noise, sample_rate=rate)
        ledger = ledger.spend(noise, rate)
    assert ledger.steps == ((noise, rate, steps),)
    assert epsilon_of(ledger, delta) == accountant.get_epsilon(delta=delta)


def test_steps_of_different_noise_add_up_as_opacus_composes_them() -> None:
    ledger = PrivacyLedger().spend(1.0, 0.1, 10).spend(1.5, 0.1, 20).spend(1.5, 0.2, 5).spend(1.0, 0.1)
    assert ledger.steps == ((1.0, 0.1, 10), (1.5, 0.1, 20), (1.5, 0.2, 5), (1.0, 0.1, 1))
    accountant = PRVAccountant()
    accountant.history = list(ledger.steps)
    assert epsilon_of(ledger, 1e-3) == accountant.get_epsilon(delta=1e-3)


def test_nothing_spent_is_an_epsilon_of_zero() -> None:
    assert epsilon_of(PrivacyLedger(), 1e-5) == 0.0


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
@pytest.mark.filterwarnings("ignore:Optimal order")
def test_the_noise_of_an_untouched_budget_is_the_one_that_opacus_finds(epsilon: float) -> None:
    found = budget(epsilon).noise_for(RATE, 20, 10)  # 20 steps now, 10 in each of two later rounds
    theirs = get_noise_multiplier(
        target_epsilon=epsilon, target_delta=1e-3, sample_rate=RATE, steps=40, accountant="prv"
    )
    assert found == pytest.approx(theirs, rel=0.02)
    assert epsilon - TOLERANCE <= epsilon_of(PrivacyLedger().spend(found, RATE, 40), 1e-3) <= epsilon


def test_rounds_as_planned_keep_their_noise_and_end_at_the_target() -> None:
    plan = budget()
    noises = []
    for number in range(3):
        steps = 20 if number == 0 else 10
        noises.append(plan.noise_for(RATE, steps, 10))
        for _ in range(steps):
            plan.spend(noises[-1], RATE)
        plan.round_done()
    assert len(set(noises)) == 1
    assert plan.view.state == "used_up"
    assert 2.0 - TOLERANCE <= plan.view.epsilon <= 2.0
    assert (plan.view.rounds, plan.view.steps, plan.view.noise_multiplier) == (3, 40, noises[0])
    with pytest.raises(BudgetSpent, match="3 private trainings are done, 3 were planned for an epsilon of 2"):
        plan.noise_for(RATE, 10, 10)


def test_steps_that_a_kill_wasted_are_made_good_by_more_noise_later() -> None:
    plan = budget()
    first = plan.noise_for(RATE, 20, 10)
    for _ in range(15):  # of which nothing was kept
        plan.spend(first, RATE)
    second = plan.noise_for(RATE, 20, 10)
    assert second > first
    assert epsilon_of(plan.ledger.spend(second, RATE, 40), 1e-3) <= 2.0


def test_another_sample_rate_is_planned_anew() -> None:
    plan = budget(ledger=PrivacyLedger(steps=((2.0, RATE, 10),), rounds=1))
    noise = plan.noise_for(2 * RATE, 10, 10)
    assert epsilon_of(plan.ledger.spend(noise, 2 * RATE, 20), 1e-3) <= 2.0


def test_a_budget_that_kills_have_eaten_up_ends_private_training() -> None:
    plan = budget(epsilon=1.0, ledger=PrivacyLedger(steps=((0.9, RATE, 10),), rounds=1))
    assert plan.view.state == "used_up"
    with pytest.raises(BudgetSpent, match=r"epsilon \d\.\d+ of 1 is spent"):
        plan.noise_for(RATE, 10, 10)


def test_a_step_that_cannot_be_committed_is_not_counted_as_known() -> None:
    def full_disk(ledger: PrivacyLedger) -> None:
        raise OSError("no space left on device")

    plan = budget(commit=full_disk)
    with pytest.raises(OSError, match="no space"):
        plan.spend(1.0, RATE)
    assert plan.ledger == PrivacyLedger()


def test_delta_is_by_default_well_below_one_in_the_number_of_samples() -> None:
    assert budget(delta=None).delta == pytest.approx(80**-1.1)
    with pytest.raises(PrivacyRefused, match=r"delta is 0\.0125 with 80 private samples"):
        budget(delta=1 / 80)


def test_a_ledger_survives_its_file() -> None:
    ledger = PrivacyLedger(rounds=2).spend(1.0, 0.1, 10).spend(0.123456789012345, 0.2)
    assert PrivacyLedger.model_validate_json(ledger.model_dump_json()) == ledger
