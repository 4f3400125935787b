"""Whether the site's policy lets a round go on: asked before work begins, meanwhile, and before anything leaves."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from fedmkt.outbox import Outbox
from fedmkt.stopping import StopFlag
from fedmkt_client_agent.ledger import Ledger, Transfer
from fedmkt_client_agent.policy import Policy, PolicyFile, PolicyUnreadable
from fedmkt_client_agent.withheld import AdapterForbidden, NotApproved, OutsideHours, OverBudget


def utc_now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True)
class Consent:
    """Every `check_` raises a Withheld where the policy says no, and PolicyUnreadable where it cannot be read."""

    file: PolicyFile
    ledger: Ledger
    outbox: Outbox
    clock: Callable[[], datetime] = utc_now

    @property
    def policy(self) -> Policy:
        return self.file.now

    def is_open(self) -> bool:
        """Whether work may go on now."""
        try:
            return self.policy.open_at(self.clock())
        except PolicyUnreadable:
            return False

    def check_open(self) -> None:
        policy = self.policy
        if not policy.open_at(self.clock()):
            now = self.clock().strftime("%H:%M")
            raise OutsideHours(f"the site works and sends {policy.hours} {policy.time_zone}; it is {now} UTC")

    def check_rounds(self, round_id: str | None = None) -> None:
        """Whether there may be another round than those of the ledger."""
        policy, rounds = self.policy, self.ledger.rounds()
        if policy.max_rounds is not None and round_id not in rounds and len(rounds) >= policy.max_rounds:
            raise OverBudget(f"the site has taken part in {len(rounds)} rounds, max_rounds is {policy.max_rounds}")

    def check_round(self, round_id: str, *, adapter: bool, agreed: bool = True) -> None:
        """Before anything is done for a round. `adapter`: the coordinator asks for it; `agreed`: the configuration that
        the site joined averages adapters.
        """
        self.check_open()
        self.check_rounds(round_id)
        if adapter and not self.policy.send_adapter:
            raise AdapterForbidden("the federation asks for the site's adapter, send_adapter is false: nothing is sent")
        if adapter and not agreed:
            raise AdapterForbidden(
                "the coordinator asks for the site's adapter, and the federation's configuration does not average "
                "adapters: nothing is sent"
            )

    def check_sending(self, transfer: Transfer) -> datetime | None:
        """Before these bytes leave; when a person approved them, if that was needed."""
        self.check_open()
        policy, size = self.policy, transfer.bytes or 0
        if policy.max_upload_bytes is not None and size > policy.max_upload_bytes:
            raise OverBudget(f"{transfer.kind} has {size} bytes, max_upload_bytes is {policy.max_upload_bytes}")
        sent = self.ledger.bytes_sent()
        total = sent if self.ledger.knows(transfer) else sent + size
        if policy.max_total_bytes is not None and total > policy.max_total_bytes:
            raise OverBudget(
                f"{transfer.kind} has {size} bytes, {sent} were sent before, max_total_bytes is "
                f"{policy.max_total_bytes}"
            )
        return self._approved(transfer) if policy.require_approval else None

    def _approved(self, transfer: Transfer) -> datetime:
        """Knowledge and adapter as they are; a report by its round, since it is made after the approval."""
        approval = self.outbox.approval()
        if approval is None or approval.round_id != transfer.round_id:
            raise NotApproved(
                f"round {transfer.round_number}: {transfer.bytes} bytes of {transfer.kind} wait for approval"
            )
        if transfer.kind != "report" and transfer.digest not in approval.digests:
            raise NotApproved(
                f"round {transfer.round_number}: {transfer.kind} was made anew after the approval, "
                f"{transfer.bytes} bytes wait for another one"
            )
        return approval.at

    def signature(self) -> tuple[object, ...]:
        """Differs once something has changed that may let the round go on."""
        files = [path for path in (self.file.path, self.outbox.approval_file) if path is not None]
        return self.is_open(), *(_stamp(path) for path in files)


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_ino


class EndOfWork(StopFlag):
    """Set when the program shall stop or the hours have ended: a training then saves its checkpoint."""

    def __init__(self, stop: StopFlag, consent: Consent) -> None:
        super().__init__()
        self._stop, self._consent = stop, consent

    @property
    def is_set(self) -> bool:
        return self._stop.is_set or not self._consent.is_open()
