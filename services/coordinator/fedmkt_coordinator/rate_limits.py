"""How many requests one credential, or one address without a credential, may send.

Each replica counts for itself, in memory: the limit protects the replica's own processor and database connections, and
costs a request one look into a table instead of a way to Redis. So n replicas admit n times as much, and nothing
changes while Redis is away.
"""

import ipaddress
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from fedmkt.errors import Refusal
from fedmkt_coordinator.settings import Settings

BURST_S = 10.0  # how many seconds' worth may come at once
MAX_KEYS = 50_000


class TooManyRequests(Refusal):
    status = 429
    code = "rate.limited"
    title = "Too many requests"

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        # Refusal declares headers per class; these say when this one may come again.
        vars(self).update(headers={"Retry-After": str(retry_after_s)})


class Buckets:
    """One bucket a key: it holds `burst` requests and is refilled at `rate_per_s`."""

    def __init__(self, rate_per_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.rate_per_s = rate_per_s
        self.burst = max(1, int(rate_per_s * BURST_S))
        self._clock = clock
        self._full_at: dict[str, float] = {}  # when the key's bucket will be full again; absent: it is

    def __len__(self) -> int:
        return len(self._full_at)

    def spend(self, key: str, who: str) -> None:
        """Take one request out of the key's bucket. Raises TooManyRequests where it is empty."""
        now = self._clock()
        full_at = max(self._full_at.get(key, now), now)
        taken = (full_at - now) * self.rate_per_s
        if taken + 1 > self.burst + 1e-6:
            wait_s = max(1, math.ceil((taken + 1 - self.burst) / self.rate_per_s))
            raise TooManyRequests(
                f"{who} has sent {taken:.0f} requests more than it was due, {self.burst} are allowed at once and "
                f"{self.rate_per_s:g} a second after that; ask again in {wait_s} s",
                wait_s,
            )
        self._full_at[key] = full_at + 1 / self.rate_per_s
        if len(self._full_at) > MAX_KEYS:
            self._forget(now)

    def grants(self, key: str) -> bool:
        """The same without a refusal: False where the bucket is empty."""
        try:
            self.spend(key, key)
        except TooManyRequests:
            return False
        return True

    def _forget(self, now: float) -> None:
        """Full buckets first; in a flood of addresses the oldest half too, so that memory stays bounded."""
        kept = [(key, full_at) for key, full_at in self._full_at.items() if full_at > now]
        self._full_at = dict(kept if len(kept) <= MAX_KEYS // 2 else kept[-(MAX_KEYS // 2) :])


@dataclass(frozen=True, slots=True)
class Rates:
    sites: Buckets  # by site id, whichever access token
    staff: Buckets  # by token
    addresses: Buckets  # calls that need no credential and cost something, and failed attempts with one

    @classmethod
    def of(cls, settings: Settings) -> "Rates":
        return cls(
            Buckets(settings.site_rate_per_s), Buckets(settings.staff_rate_per_s), Buckets(settings.address_rate_per_s)
        )


def network(address: str) -> str:
    """The address, or of an IPv6 address its /64: a host has 2^64 of those to itself."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:  # a socket of this machine, or a test
        return address
    if parsed.version == 4:
        return address
    return str(ipaddress.ip_network((parsed, 64), strict=False))
