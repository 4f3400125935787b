"""When rounds are wanted: on demand, on a grid of times, or not while the operator pauses them.

A schedule only ever asks for a round (`take_tick`), as an operator would; `rounds` decides whether one may begin.
"""

from datetime import datetime, timedelta

from fedmkt.errors import Refusal
from fedmkt.protocol import RoundRequest
from fedmkt_coordinator.store import Transaction
from fedmkt_coordinator.store.records import FederationRow, RoundRow


class KeyUsed(Refusal):
    status = 422
    code = "idempotency_key.used"
    title = "The Idempotency-Key belongs to another request"


async def take_tick(tx: Transaction, federation: FederationRow) -> bool:
    """Ask for the scheduled round if its time has come, and set the time of the one after.

    Called while no round runs or waits, so times that passed meanwhile, however many, ask for one round.
    """
    due, every_s = federation.next_round_at, federation.every_s
    if due is None or every_s is None or due > tx.now:
        return False
    total = federation.rounds_requested + 1
    left = None if federation.rounds_left is None else federation.rounds_left - 1
    following = following_tick(due, every_s, tx.now)
    await tx.set_rounds_requested(federation, total)
    if left == 0:
        await end_schedule(tx, federation, "its last round was asked for")
    else:
        await tx.set_schedule(federation, every_s, left, following)
    next_at = None if left == 0 else following.isoformat()
    await tx.append(federation.id, "rounds.scheduled", total=total, rounds_left=left, next_round_at=next_at)
    return True


def following_tick(due: datetime, every_s: float, now: datetime) -> datetime:
    """The first time after `now` on the grid of `due` and whole numbers of `every_s`."""
    passed = int((now - due).total_seconds() // every_s)
    return due + timedelta(seconds=(passed + 1) * every_s)


async def asked_before(tx: Transaction, federation: FederationRow, wanted: RoundRequest, key: str | None) -> bool:
    """Whether this Idempotency-Key has had its effect. Raises KeyUsed when that was another one."""
    if key is None:
        return False
    count = wanted.count or 1 if wanted.every_s is None else wanted.count
    request = str(count) if wanted.every_s is None else f"{count} every {wanted.every_s:g} s"
    before = await tx.idempotent(f"rounds:{federation.id}", key, request)
    if before is not None and before != request:
        raise KeyUsed(f"the key came with count {before} before and with {request} now; use a key once")
    return before is not None


async def set_schedule(tx: Transaction, federation: FederationRow, every_s: float, count: int | None) -> None:
    """The first round is due now; the schedule before, if there was one, is forgotten."""
    await tx.set_schedule(federation, every_s, count, tx.now)
    await tx.append(federation.id, "schedule.set", every_s=every_s, rounds=count)


async def end_schedule(tx: Transaction, federation: FederationRow, reason: str) -> None:
    if federation.every_s is not None:
        await tx.set_schedule(federation, None, None, None)
        await tx.append(federation.id, "schedule.ended", reason=reason)


def next_opening(federation: FederationRow, begun: int, row: RoundRow) -> str:
    """When uploads are taken again, for a site that comes late to `row`."""
    if begun > row.number:
        return f"round {begun} has begun since"
    if federation.paused_at is not None:
        return f"rounds are paused since {_at(federation.paused_at)}: the next one opens when the operator resumes"
    latest = f", at the latest at {_at(row.deadline)} unless it moves on" if row.deadline else ""
    if federation.rounds_requested > begun:
        return f"round {row.number + 1} opens when this one has ended{latest}"
    if federation.next_round_at is not None:
        after = " and this one has ended" if row.active else ""
        return f"round {row.number + 1} opens at {_at(federation.next_round_at)}, once a quorum is ready{after}"
    return "no further round is asked for yet"


def _at(time: datetime) -> str:
    return time.isoformat(timespec="seconds")
