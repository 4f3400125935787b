"""Rounds, and each site's part in them."""

from collections.abc import Iterable
from datetime import datetime

from sqlalchemy import func, select, update

from fedmkt.errors import Refusal
from fedmkt.protocol import ApplyReport, DistillResult, RoundState
from fedmkt_coordinator.ids import new_id
from fedmkt_coordinator.store.events import Events
from fedmkt_coordinator.store.records import RoundRow, RoundSiteRow, SiteRow
from fedmkt_coordinator.store.tables import ACTIVE_STATES, round_sites, rounds


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

    async def round(self, round_id: str) -> RoundRow:
        found = await self._first(RoundRow, select(rounds).where(rounds.c.id == round_id))
        if found is None:
            raise RoundUnknown(f"there is no round {round_id}; GET /v1/federations/.../rounds lists them")
        return found

    async def active_round(self, federation_id: str) -> RoundRow | None:
        statement = select(rounds).where(rounds.c.federation_id == federation_id, rounds.c.state.in_(ACTIVE_STATES))
        return await self._first(RoundRow, statement)

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
        await self._tell_round(moved, row.state)
        return moved

    async def _tell_round(self, row: RoundRow, before: str) -> None:
        await self.append(
            row.federation_id,
            "round.state",
            round_id=row.id,
            number=row.number,
            before=before,
            state=row.state,
            reason=row.reason,
        )

    # -------------------------------------------------------------------------------------------- parts of sites

    async def parts(self, round_ids: Iterable[str]) -> list[RoundSiteRow]:
        """Each site's part in these rounds, by name."""
        statement = select(round_sites).where(round_sites.c.round_id.in_(list(round_ids)))
        return await self._all(RoundSiteRow, statement.order_by(round_sites.c.site))

    async def part(self, round_id: str, site: str) -> RoundSiteRow | None:
        statement = select(round_sites).where(round_sites.c.round_id == round_id, round_sites.c.site == site)
        return await self._first(RoundSiteRow, statement)

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
