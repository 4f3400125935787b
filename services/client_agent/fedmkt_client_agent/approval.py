"""A person's consent to the round that waits."""

from pathlib import Path

from fedmkt.errors import Refusal
from fedmkt.outbox import Approval, Outbox


class OtherRound(Refusal):
    status = 409
    code = "approval.other_round"
    title = "Another round waits"
    remedy = "Look at the round that waits (`fedmkt knowledge inspect --pending`), then approve that one."


def approve_pending(state_dir: Path, round_number: int | None) -> Approval:
    """Approve what lies in the outbox now. Raises NothingPending, OtherRound."""
    outbox = Outbox(state_dir)
    about = outbox.pending()
    if round_number not in (None, about.round_number):
        raise OtherRound(f"round {about.round_number} waits, not {round_number}: look at it before you approve it")
    return outbox.approve(about)
