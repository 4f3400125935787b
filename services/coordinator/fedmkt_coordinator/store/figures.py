"""How many of everything there are: what a scrape of the metrics asks, in a handful of statements."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import get_args

from sqlalchemy import case, func, select

from fedmkt.protocol import RoundState
from fedmkt_coordinator.store.records import JobState
from fedmkt_coordinator.store.statements import Statements
from fedmkt_coordinator.store.tables import ACTIVE_STATES, federations, jobs, round_sites, rounds, sites

SEEN_WITHIN_S = (60, 300, 3600, 86400)
NAMED_SITES = 100  # up to so many sites have a series of their own
NAMED_FEDERATIONS = 100  # the rounds of so many federations at most, the longest in their state first


@dataclass(frozen=True, slots=True)
class Sighting:
    federation: str
    site: str
    at: datetime


@dataclass(frozen=True, slots=True)
class ActiveRound:
    """`missing`: in 'collecting' who has not uploaded, in 'applying' who uploaded and has not reported."""

    federation: str
    state: str
    since: datetime
    deadline: datetime | None
    expected: int
    missing: int


@dataclass(frozen=True, slots=True)
class Figures:
    now: datetime
    federations: int
    rounds: dict[str, int]
    jobs: dict[tuple[str, str], int]
    due_jobs: int
    oldest_due: datetime | None
    sites: dict[str, int]
    seen: tuple[int, ...]
    sightings: tuple[Sighting, ...]
    active_rounds: tuple[ActiveRound, ...]


class Counts(Statements):
    async def figures(self) -> Figures:
        active, seen = await self._sites()
        due, oldest = await self._due()
        return Figures(
            now=self.now,
            federations=int(await self._scalar(select(func.count()).select_from(federations))),
            rounds=await self._rounds(),
            jobs=await self._jobs(),
            due_jobs=due,
            oldest_due=oldest,
            sites=active,
            seen=seen,
            sightings=await self._sightings() if sum(active.values()) - active["revoked"] <= NAMED_SITES else (),
            active_rounds=await self._active_rounds(),
        )

    async def _rounds(self) -> dict[str, int]:
        rows = await self._connection.execute(select(rounds.c.state, func.count()).group_by(rounds.c.state))
        found = {str(row[0]): int(row[1]) for row in rows}
        return {state: found.get(state, 0) for state in get_args(RoundState)}

    async def _jobs(self) -> dict[tuple[str, str], int]:
        kind = case((jobs.c.round_id.is_(None), "vocabulary_map"), else_="distill")
        rows = await self._connection.execute(select(kind, jobs.c.state, func.count()).group_by(kind, jobs.c.state))
        found = {(str(row[0]), str(row[1])): int(row[2]) for row in rows}
        keys = [(kind, state) for kind in ("distill", "vocabulary_map") for state in get_args(JobState)]
        return {key: found.get(key, 0) for key in keys}

    async def _due(self) -> tuple[int, datetime | None]:
        waits = (jobs.c.state == "queued") & (jobs.c.due_at <= self.now)
        row = (await self._connection.execute(select(func.count(), func.min(jobs.c.due_at)).where(waits))).one()
        return int(row[0]), row[1]

    async def _sites(self) -> tuple[dict[str, int], tuple[int, ...]]:
        active = sites.c.revoked_at.is_(None)
        ready = active & sites.c.model.is_not(None) & sites.c.vocabulary.is_not(None)
        recent = [
            func.count().filter(active & (sites.c.last_seen_at >= self.now - timedelta(seconds=within_s)))
            for within_s in SEEN_WITHIN_S
        ]
        row = (
            await self._connection.execute(
                select(func.count(), func.count().filter(active), func.count().filter(ready), *recent).select_from(
                    sites
                )
            )
        ).one()
        every, enrolled, complete, *seen = (int(each) for each in row)
        states = {"ready": complete, "enrolled": enrolled - complete, "revoked": every - enrolled}
        return states, tuple(seen)

    async def _sightings(self) -> tuple[Sighting, ...]:
        statement = (
            select(federations.c.name, sites.c.name, sites.c.last_seen_at)
            .join(federations, federations.c.id == sites.c.federation_id)
            .where(sites.c.revoked_at.is_(None), sites.c.last_seen_at.is_not(None))
            .limit(NAMED_SITES)
        )
        return tuple([Sighting(*row) for row in await self._connection.execute(statement)])

    async def _active_rounds(self) -> tuple[ActiveRound, ...]:
        part = round_sites.c
        uploaded = part.uploaded_at.is_not(None)
        missing = case(
            (rounds.c.state == "applying", func.count().filter(uploaded & part.applied_at.is_(None))),
            (rounds.c.state == "collecting", func.count().filter(part.expected.is_(True) & part.uploaded_at.is_(None))),
            else_=0,
        )
        expected = func.count().filter(part.expected.is_(True))
        statement = (
            select(federations.c.name, rounds.c.state, rounds.c.state_since, rounds.c.deadline, expected, missing)
            .join(federations, federations.c.id == rounds.c.federation_id)
            .join(round_sites, part.round_id == rounds.c.id, isouter=True)
            .where(rounds.c.state.in_(ACTIVE_STATES))
            .group_by(federations.c.name, rounds.c.state, rounds.c.state_since, rounds.c.deadline)
            .order_by(rounds.c.state_since)
            .limit(NAMED_FEDERATIONS)
        )
        return tuple([ActiveRound(*row) for row in await self._connection.execute(statement)])
