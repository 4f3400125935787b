"""Rounds, and each site's part in them."""

from collections.abc import Collection, Iterable
from datetime import datetime

from sqlalchemy import Integer, bindparam, func, or_, select, update

from fedmkt.errors import Refusal
from fedmkt.protocol import ApplyReport, DistillResult, RoundState
from fedmkt_coordinator.ids import new_id
from fedmkt_coordinator.store.events import Events
from fedmkt_coordinator.store.records import RoundRow, RoundSiteRow, SiteRow
from fedmkt_coordinator.store.tables import ACTIVE_STATES, round_sites, rounds, sites

_BY_ID = select(rounds).where(rounds.c.id == bindparam("key"))
_ACTIVE = select(rounds).where(
    rounds.c.federation_id == bindparam("key"), or_(*(rounds.c.state == state for state in ACTIVE_STATES))
)
_PART = select(round_sites).where(round_sites.c.round_id == bindparam("key"), round_sites.c.site == bindparam("name"))
_AWAITED = (
    select(round_sites.c.site)
    .where(round_sites.c.round_id == bindparam("key"), round_sites.c.expected.is_(True))
    .where(round_sites.c.uploaded_at.is_(None))
    .order_by(round_sites.c.site)
    .limit(bindparam("most", type_=Integer))
)


class RoundUnknown(Refusal):
    status = 404
    code = "round.unknown"
    title = "No such round"


class Rounds(Events):
    async def begin_round(
        self, federation_id: str, number: int, slice_index: int, deadline: datetime, expected: Iterable[SiteRow]
    ) -> RoundRow:
        row = RoundRow(
            id=new_id("round"),
            federation_id=federation_id,
            number=number,
            slice_index=slice_index,
            state="collecting",
            state_since=self.now,
            reason=None,
            started_at=self.now,
            finished_at=None,
            deadline=deadline,
            seconds={},
            job_id=None,
            result=None,
            knowledge=None,
            averaged_adapter=None,
        )
        await self._insert(rounds, row)
        await self._insert_all(round_sites, [_part(row.id, site.name, expected=True) for site in expected])
        await self._tell_round(row, "")
        return row

    async def round(self, round_id: str, *, of: str | None = None) -> RoundRow:
        """For `of`, a federation, the rounds of others do not exist."""
        found = await self._first(RoundRow, _BY_ID, key=round_id)
        if found is None or of not in (None, found.federation_id):
            raise RoundUnknown(f"there is no round {round_id}; GET /v1/federations/.../rounds lists them")
        return found

    async def active_round(self, federation_id: str) -> RoundRow | None:
        return await self._first(RoundRow, _ACTIVE, key=federation_id)

    async def active_rounds(self, federation_ids: Collection[str]) -> list[RoundRow]:
        """At most one of each federation."""
        of_these = rounds.c.federation_id.in_(federation_ids)
        return await self._all(RoundRow, select(rounds).where(of_these, rounds.c.state.in_(ACTIVE_STATES)))

    async def rounds_begun_of(self, federation_ids: Collection[str]) -> dict[str, int]:
        """Federations without any round are left out."""
        statement = select(rounds.c.federation_id, func.count()).where(rounds.c.federation_id.in_(federation_ids))
        found = await self._connection.execute(statement.group_by(rounds.c.federation_id))
        return {str(row[0]): int(row[1]) for row in found}

    async def rounds_begun(self, federation_id: str) -> int:
        statement = select(func.count()).select_from(rounds).where(rounds.c.federation_id == federation_id)
        return int(await self._scalar(statement))

    async def rounds_before(self, federation_id: str, number: int | None, limit: int) -> list[RoundRow]:
        """Newest first."""
        statement = select(rounds).where(rounds.c.federation_id == federation_id)
        if number is not None:
            statement = statement.where(rounds.c.number < number)
        return await self._all(RoundRow, statement.order_by(rounds.c.number.desc()).limit(limit))

    async def move_round(
        self,
        row: RoundRow,
        state: RoundState,
        *,
        deadline: datetime | None = None,
        reason: str | None = None,
        job_id: str | None = None,
        result: DistillResult | None = None,
    ) -> RoundRow:
        """From the state in `row` to another one, or StateChanged; leaves an event."""
        ends = state not in ACTIVE_STATES
        spent = max(0.0, (self.now - row.state_since).total_seconds())
        values: dict[str, object] = {
            "state": state,
            "state_since": self.now,
            "seconds": {**row.seconds, row.state: round(spent, 3)},
            "deadline": deadline,
            "reason": reason,
            "finished_at": self.now if ends else None,
        }
        if job_id is not None:
            values["job_id"] = job_id
        if result is not None:
            values |= {"result": result, "knowledge": result.knowledge, "averaged_adapter": result.averaged_adapter}
        await self._change(
            update(rounds).where(rounds.c.id == row.id, rounds.c.state == row.state).values(values),
            f"round {row.number} is no longer {row.state}",
        )
        moved = await self.round(row.id)
        whole_s = round(sum(moved.seconds.values()), 3) if ends else None
        await self._tell_round(moved, row.state, round(spent, 3), whole_s)
        return moved

    async def _tell_round(
        self, row: RoundRow, before: str, spent_s: float | None = None, whole_s: float | None = None
    ) -> None:
        await self.append(
            row.federation_id,
            "round.state",
            round_id=row.id,
            number=row.number,
            before=before,
            state=row.state,
            reason=row.reason,
            seconds=spent_s,
            round_seconds=whole_s,
        )

    # -------------------------------------------------------------------------------------------- parts of sites

    async def parts(self, round_ids: Iterable[str]) -> list[RoundSiteRow]:
        """Each site's part in these rounds, by name."""
        statement = select(round_sites).where(round_sites.c.round_id.in_(list(round_ids)))
        return await self._all(RoundSiteRow, statement.order_by(round_sites.c.site))

    async def part(self, round_id: str, site: str) -> RoundSiteRow | None:
        return await self._first(RoundSiteRow, _PART, key=round_id, name=site)

    async def awaited_uploads(self, round_id: str, limit: int) -> list[str]:
        """Sites whose upload the round expects and has not got, by name; at most `limit` of them."""
        return [str(site) for site in await self._column(_AWAITED, key=round_id, most=limit)]

    async def awaited_reports(self, row: RoundRow, limit: int) -> list[str]:
        """Sites that uploaded, or asked for a task since the round began, and have not reported; by name, some of them.

        `rounds.awaited_appliers` without its look at every site's maps: one that lacks maps may be among these.
        """
        part, site = round_sites.c, sites.c
        described = site.revoked_at.is_(None) & site.model.is_not(None) & site.vocabulary.is_not(None)
        takes_part = part.uploaded_at.is_not(None) | (site.last_seen_at >= row.started_at)
        statement = (
            select(site.name)
            .join_from(sites, round_sites, (part.round_id == row.id) & (part.site == site.name), isouter=True)
            .where(site.federation_id == row.federation_id, described, takes_part, part.applied_at.is_(None))
        )
        rows = await self._connection.execute(statement.order_by(site.name).limit(limit))
        return [str(each[0]) for each in rows]

    async def awaits_uploader(self, row: RoundRow) -> bool:
        """Whether some site uploaded, is still enrolled and has not reported: then the round waits for it."""
        part = round_sites.c
        waits = (part.round_id == row.id) & part.uploaded_at.is_not(None) & part.applied_at.is_(None)
        enrolled = (sites.c.federation_id == row.federation_id) & sites.c.revoked_at.is_(None)
        statement = select(part.site).join(sites, (sites.c.name == part.site) & enrolled).where(waits).limit(1)
        return await self._scalar(statement) is not None

    async def join_round(self, round_id: str, site: str) -> None:
        """A site that was not expected takes part after all, as a learner."""
        await self._insert_new(round_sites, _part(round_id, site, expected=False))

    async def set_uploaded(self, part: RoundSiteRow) -> None:
        """Write what `part` says of the upload, and whether one is expected."""
        await self._change(
            update(round_sites)
            .where(round_sites.c.round_id == part.round_id, round_sites.c.site == part.site)
            .values(
                expected=part.expected,
                vocabulary=part.vocabulary,
                private_samples=part.private_samples,
                knowledge=part.knowledge,
                adapter=part.adapter,
                upload_bytes=part.upload_bytes,
                uploaded_at=part.uploaded_at,
            ),
            f"site {part.site} has no part in round {part.round_id}",
        )

    async def set_report(self, round_id: str, site: str, report: ApplyReport) -> None:
        await self._change(
            update(round_sites)
            .where(round_sites.c.round_id == round_id, round_sites.c.site == site, round_sites.c.applied_at.is_(None))
            .values(report=report, applied_at=self.now),
            f"site {site} has reported on round {round_id} before",
        )


def _part(round_id: str, site: str, *, expected: bool) -> RoundSiteRow:
    return RoundSiteRow(round_id, site, expected, None, 0, None, None, 0, None, None, None)
