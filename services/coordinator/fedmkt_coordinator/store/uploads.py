"""Uploads and the chunks that have arrived."""

from collections.abc import Iterable

from sqlalchemy import bindparam, delete, exists, not_, or_, select, text, update

from fedmkt.errors import Refusal
from fedmkt.protocol import Manifest
from fedmkt_coordinator.ids import new_id
from fedmkt_coordinator.store.records import UploadRow, UploadRowState
from fedmkt_coordinator.store.statements import Statements
from fedmkt_coordinator.store.tables import ACTIVE_STATES, rounds, sites, upload_chunks, uploads

LIVE = ("open", "accepted")
_BY_ID = select(uploads).where(uploads.c.id == bindparam("key"))
_TAKES = (
    select(uploads.c.id)
    .join(rounds, (rounds.c.id == uploads.c.round_id) & (rounds.c.state == "collecting"))
    .join(sites, (sites.c.id == bindparam("site")) & sites.c.revoked_at.is_(None))
    .where(uploads.c.id == bindparam("key"), uploads.c.state == "open")
)
# In both databases' words, and made once: building an insert takes longer than the insert.
_ADD = text("INSERT INTO upload_chunks (upload_id, number) VALUES (:upload_id, :number) ON CONFLICT DO NOTHING")
_FORGET = delete(upload_chunks).where(upload_chunks.c.upload_id == bindparam("key"))
_CHUNKS = select(upload_chunks.c.number).where(upload_chunks.c.upload_id == bindparam("key"))


class UploadUnknown(Refusal):
    status = 404
    code = "upload.unknown"
    title = "No such upload"


class Uploads(Statements):
    async def add_upload(self, federation_id: str, site: str, manifest: Manifest) -> UploadRow:
        row = UploadRow(
            id=new_id("upload"),
            federation_id=federation_id,
            round_id=manifest.round_id,
            site=site,
            manifest=manifest,
            kind=manifest.kind,
            state="open",
            created_at=self.now,
            accepted_at=None,
        )
        await self._insert(uploads, row)
        return row

    async def live_upload(self, round_id: str, site: str, kind: str) -> UploadRow | None:
        """The one upload of this site, round and kind that is open or accepted."""
        statement = select(uploads).where(
            uploads.c.round_id == round_id, uploads.c.site == site, uploads.c.kind == kind, uploads.c.state.in_(LIVE)
        )
        return await self._first(UploadRow, statement)

    async def upload(self, upload_id: str) -> UploadRow:
        found = await self._first(UploadRow, _BY_ID, key=upload_id)
        if found is None:
            raise UploadUnknown(f"there is no upload {upload_id}; announce it with POST /v1/uploads")
        return found

    async def move_upload(self, row: UploadRow, state: UploadRowState) -> UploadRow:
        """From the state in `row` to another one, or StateChanged."""
        accepted_at = self.now if state == "accepted" else None
        await self._change(
            update(uploads)
            .where(uploads.c.id == row.id, uploads.c.state == row.state)
            .values(state=state, accepted_at=accepted_at),
            f"upload {row.id} is no longer {row.state}",
        )
        return await self.upload(row.id)

    async def abandon_uploads(self, round_id: str, site: str, *, only_open: bool = False) -> None:
        """Whatever the site has sent for this round no longer counts, or will not be completed."""
        states = ("open",) if only_open else LIVE
        mine = (uploads.c.round_id == round_id) & (uploads.c.site == site) & uploads.c.state.in_(states)
        await self._count(update(uploads).where(mine).values(state="abandoned"))

    async def takes_chunks(self, upload_id: str, site_id: str) -> bool:
        """The upload is open, its round collects and its site is enrolled: one statement for what is asked most."""
        return await self._first(str, _TAKES, key=upload_id, site=site_id) is not None

    async def add_chunks(self, chunks: list[tuple[str, int]]) -> None:
        """(upload id, number) of each; those that are there already stay."""
        if chunks:
            await self._connection.execute(_ADD, [{"upload_id": each, "number": number} for each, number in chunks])

    async def chunks(self, upload_id: str) -> set[int]:
        return {int(number) for number in await self._column(_CHUNKS, key=upload_id)}

    async def forget_chunks(self, upload_id: str) -> None:
        """Call it when the chunks themselves are gone: the rows say what there is to delete."""
        await self._connection.execute(_FORGET, {"key": upload_id})

    async def uploading_sites(self, round_ids: Iterable[str]) -> set[tuple[str, str]]:
        """(round id, site) of every upload that is announced and not complete."""
        statement = select(uploads.c.round_id, uploads.c.site).where(
            uploads.c.state == "open", uploads.c.round_id.in_(list(round_ids))
        )
        return {(str(row[0]), str(row[1])) for row in await self._connection.execute(statement)}

    async def leftover_uploads(self, limit: int) -> list[UploadRow]:
        """Uploads that take no more bytes and still have chunks, or are open although their round has ended."""
        over = uploads.c.round_id.in_(select(rounds.c.id).where(rounds.c.state.not_in(ACTIVE_STATES)))
        chunks = exists().where(upload_chunks.c.upload_id == uploads.c.id)
        is_open = uploads.c.state == "open"
        statement = select(uploads).where(or_(is_open & over, not_(is_open) & chunks))
        return await self._all(UploadRow, statement.limit(limit))
