"""Differential privacy at this site: on from the first training to the last, or off from the first to the last."""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from fedmkt.ml.party import Party
from fedmkt.privacy import PrivacyGoal, PrivacyLedger, PrivacyRefused

if TYPE_CHECKING:
    from fedmkt.ml.private_budget import PrivacyBudget

log = logging.getLogger(__name__)


def check_unbroken(goal: PrivacyGoal | None, ledger: PrivacyLedger | None, *, has_adapter: bool) -> None:
    """The guarantee covers all that a site ever learned from private text, or nothing. Raises PrivacyRefused."""
    if goal is not None and ledger is None and has_adapter:
        raise PrivacyRefused(
            "privacy_epsilon is set, but this state folder holds an adapter that was trained without noise; begin with "
            "a new state folder and enrolment, or leave privacy_epsilon out"
        )
    if goal is None and ledger is not None:
        raise PrivacyRefused(
            f"this state folder was trained with differential privacy in {ledger.rounds} rounds, and privacy_epsilon "
            "is not set now: one training without noise would end the guarantee; set it again, or begin with a new "
            "state folder and enrolment"
        )


def open_budget(
    goal: PrivacyGoal,
    party: Party,
    samples: int,
    ledger: PrivacyLedger | None,
    commit: Callable[[PrivacyLedger], None],
) -> "PrivacyBudget":
    """The account, in the state folder from now on.

    Raises PrivacyRefused, also for a party that cannot be trained so, and where Opacus is not installed.
    """
    try:
        from fedmkt.ml.private_budget import PrivacyBudget  # Opacus is in an extra of its own
        from fedmkt.ml.sample_gradients import check_samples_apart
    except ModuleNotFoundError as error:
        raise PrivacyRefused(
            f"privacy_epsilon is set, but {error.name} is not installed: pip install 'fedmkt[privacy]'"
        ) from error
    check_samples_apart(party)
    budget = PrivacyBudget(goal, samples, ledger or PrivacyLedger(), commit)
    if ledger is None:
        commit(budget.ledger)
    log.info("privacy.on", extra=budget.view.model_dump())
    return budget
