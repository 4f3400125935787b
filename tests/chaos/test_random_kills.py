"""Whatever dies whenever: real processes killed at random for some minutes, while round after round is asked for.

FEDMKT_CHAOS_MINUTES says for how long (both databases together), FEDMKT_CHAOS_SEED which victims and pauses are drawn.
The seed fixes the draw, not the clock: a repeated run kills the same processes at about the same moments.
"""

import os
import random
import secrets
import time
from collections import Counter
from collections.abc import Callable

import pytest

from chaos_federation import COORDINATORS, Federation
from chaos_templates import PROCESSES, Templates

pytestmark = [pytest.mark.services, pytest.mark.chaos]
Opened = Callable[[Federation], Federation]

MINUTES = float(os.environ.get("FEDMKT_CHAOS_MINUTES") or 2)
SEED = int(os.environ.get("FEDMKT_CHAOS_SEED") or secrets.randbelow(10**6))
LONGEST_PEACE_S = 2.5  # from one death to the next
LONGEST_ABSENCE_S = 1.5
PATIENCE_S = 120.0  # until the last rounds have ended, once nobody is killed any more


class Reaper:
    """Kills and brings back, one after the other, as `chance` says."""

    def __init__(self, federation: Federation, chance: random.Random) -> None:
        self._federation = federation
        self._chance = chance
        self._victims = [*federation.running, "redis", "flush"]
        self.killed: Counter[str] = Counter()

    def strike(self) -> None:
        time.sleep(self._chance.uniform(0.05, LONGEST_PEACE_S))
        victim = self._chance.choice(self._victims)
        absence_s = self._chance.uniform(0, LONGEST_ABSENCE_S)
        self.killed[victim] += 1
        redis = self._federation.redis
        if victim == "flush":
            redis.flush()
        elif victim == "redis":
            redis.stop()
            time.sleep(absence_s)
            redis.start()
        else:
            self._federation.kill(victim)
            time.sleep(absence_s)
            self._federation.start(victim)


def ask_for_more(federation: Federation) -> int:
    """One round more than have ended, if a coordinator answers now; returns how many are asked for."""
    view = federation.operator.federation(federation.federation_id)
    if view.rounds_requested == view.rounds_finished:
        view = federation.operator.request_rounds(federation.federation_id, 1)
    return view.rounds_requested


@pytest.mark.timeout(60 * MINUTES + 600)
@pytest.mark.parametrize(("database", "replicas"), [("sqlite", 1), ("postgresql", 2)])
def test_random_kills_lose_nothing(
    templates: Templates,
    opened: Opened,
    database: str,
    replicas: int,
    record_property: Callable[[str, object], None],
) -> None:
    print(f"FEDMKT_CHAOS_SEED={SEED} FEDMKT_CHAOS_MINUTES={MINUTES:g}")
    record_property("seed", SEED)
    federation = opened(templates.ready(database, replicas=replicas))
    federation.settings["MAX_ATTEMPTS"] = "100"  # bad luck is no reason to fail a round here
    for name in (*COORDINATORS[:replicas], *PROCESSES[1:]):
        federation.start(name)
    reaper = Reaper(federation, random.Random(SEED))
    ends = time.monotonic() + 60 * MINUTES / 2
    while time.monotonic() < ends:
        asked = ask_for_more(federation)
        reaper.strike()
    federation.until_finished(asked, PATIENCE_S)
    federation.audit(asked, sites_killed=True)
    record_property("rounds", asked)
    record_property("kills", sum(reaper.killed.values()))
    record_property("receipts", federation.audited)
    assert {site.state for one in federation.rounds() for site in one.sites} == {"applied"}
