"""Refused attempts, for the audit log: all are counted, and written as one row a code and minute.

So that whoever knocks a million times fills a counter, not the log. The keeper writes; a crash loses at most the
counts since its last look.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from fedmkt_coordinator.store import Store
from fedmkt_coordinator.store.audit import Actor
from fedmkt_coordinator.store.records import EventData

WRITE_EVERY_S = 60.0
MAX_PATH = 200

# Attempts to do what one may not. That a token has run out, or a round has closed, happens to honest sites every day.
ATTEMPTS = frozenset(
    {
        "assertion.clock",
        "assertion.refused",
        "assertion.used",
        "enrolment.refused",
        "rate.limited",
        "role.forbidden",
        "signature.invalid",
        "site.revoked",
        "token.invalid",
    }
)


@dataclass(frozen=True, slots=True)
class _Count:
    attempts: int
    latest: Actor
    path: str


class Refusals:
    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._counts: dict[str, _Count] = {}
        self._written_at: dict[str, float] = {}

    def note(self, code: str, actor: Actor, path: str) -> None:
        if code not in ATTEMPTS:
            return
        before = self._counts.get(code)
        self._counts[code] = _Count((before.attempts if before else 0) + 1, actor, path[:MAX_PATH])

    async def write(self, store: Store) -> None:
        """One row for each code with attempts that was not written within the last minute."""
        now = self._clock()
        due = [code for code in self._counts if now - self._written_at.get(code, float("-inf")) >= WRITE_EVERY_S]
        if not due:
            return
        counts = {code: self._counts[code] for code in due}
        async with store.write() as tx:
            for code, count in sorted(counts.items()):
                data: EventData = {"attempts": count.attempts, "latest_path": count.path}
                tx.audit("access.refused", code, data, actor=count.latest)
        for code, written in counts.items():
            self._written_at[code] = now
            latest = self._counts.pop(code)
            if latest is not written:  # more came while it was written
                self._counts[code] = replace(latest, attempts=latest.attempts - written.attempts)
