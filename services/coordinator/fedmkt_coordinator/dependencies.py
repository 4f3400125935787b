"""What the coordinator needs besides itself: whether each answers, and what to do about one that does not."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

log = logging.getLogger(__name__)

CHECK_S = 5.0
KEPT_S = 1.0  # many that ask at once get one look: a check writes to the artifact store, and anybody may ask

REMEDIES = {
    "database": "see that PostgreSQL runs and FEDMKT_DATABASE_URL leads there (SQLite: that the state folder's disk is "
    "not full); nothing is served until then, and nothing is lost",
    "artifacts": "see that the artifact folder is writable and its disk not full (or FEDMKT_ARTIFACTS_URL and its "
    "credentials right); uploads and downloads fail until then",
    "redis": "see that Redis runs and FEDMKT_REDIS_URL leads there; requests go on, and jobs wait until then",
}
NEEDED = frozenset({"database", "artifacts"})
ASK_AGAIN_S = 2  # told with Retry-After


class DependencyDown(Exception):
    """The database or the artifact store does not answer: no rule is broken, and the same request may work soon.

    `str` is for the log and may name addresses; what anybody may read is the remedy.
    """

    def __init__(self, dependency: str, cause: BaseException) -> None:
        super().__init__(f"{dependency}: {type(cause).__name__}: {str(cause)[:500]}")
        self.dependency = dependency


@dataclass(frozen=True, slots=True)
class Check:
    """`answer` is for anybody: the kind of failure and the remedy, never an address, a path or a message from below."""

    ok: bool
    answer: str
    seconds: float


class Dependencies:
    def __init__(self, pings: dict[str, Callable[[], Awaitable[None]]]) -> None:
        self._pings = pings
        self._look: asyncio.Task[dict[str, Check]] | None = None
        self._looked_at = float("-inf")
        self._down: frozenset[str] = frozenset()

    async def check(self) -> dict[str, Check]:
        """By name: database, artifacts, redis. Not older than KEPT_S when it was begun."""
        now = time.monotonic()
        if self._look is None or (self._look.done() and now - self._looked_at > KEPT_S):
            self._looked_at = now
            self._look = asyncio.create_task(self._check_all())
        return await asyncio.shield(self._look)

    async def _check_all(self) -> dict[str, Check]:
        found = await asyncio.gather(*(_check(name, ping) for name, ping in self._pings.items()))
        checks = dict(zip(self._pings, found, strict=True))
        down = frozenset(name for name, check in checks.items() if not check.ok)
        for name in self._down - down:
            log.info("dependency.back", extra={"dependency": name})
        self._down = down
        return checks


async def _check(name: str, ping: Callable[[], Awaitable[None]]) -> Check:
    began = time.monotonic()
    try:
        async with asyncio.timeout(CHECK_S):
            await ping()
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the answer: this dependency fails
        seconds = time.monotonic() - began
        log.warning("dependency.down", extra={"dependency": name, "reason": f"{type(error).__name__}: {error}"[:500]})
        return Check(False, f"{type(error).__name__}: {REMEDIES[name]}", seconds)
    return Check(True, "ok", time.monotonic() - began)
