"""How a site's knowledge arrives: announced and signed, then chunk by chunk. `acceptance` checks and counts it."""

import asyncio
import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial

from starlette.requests import Request

from fedmkt import fault_points
from fedmkt.errors import Refusal
from fedmkt.protocol import CHUNK_BYTES, Manifest, UploadState
from fedmkt.signing import verify_manifest
from fedmkt_coordinator.arrivals import Pieces, Span, read_span
from fedmkt_coordinator.artifacts import ArtifactStore
from fedmkt_coordinator.enrolment import check_active
from fedmkt_coordinator.keys import CoordinatorKey
from fedmkt_coordinator.public_sets import PublicSets
from fedmkt_coordinator.readiness import named
from fedmkt_coordinator.schedule import next_opening
from fedmkt_coordinator.store import Store, Transaction
from fedmkt_coordinator.store.records import FederationRow, RoundRow, SiteRow, UploadRow
from fedmkt_coordinator.store.uploads import UploadUnknown


class RoundClosed(Refusal):
    status = 409
    code = "round.closed"
    title = "The round takes no more uploads"


class NotExpected(Refusal):
    status = 409
    code = "upload.not_expected"
    title = "The round does not expect this site"


class KindNotWanted(Refusal):
    code = "upload.kind"
    title = "The federation does not want this kind of upload"
    remedy = "Send knowledge alone; adapters are averaged only where the federation's configuration says so."


class UploadTooLarge(Refusal):
    status = 413
    code = "upload.too_large"
    title = "The upload is too large"
    remedy = "Lower knowledge.top_k or knowledge.max_tokens; the coordinator's own limit is FEDMKT_MAX_UPLOAD_BYTES."


class UploadDiffers(Refusal):
    status = 409
    code = "upload.differs"
    title = "The site has announced other bytes"


class UploadSettled(Refusal):
    status = 409
    code = "upload.settled"
    title = "The upload is settled"


class UploadIncomplete(Refusal):
    status = 409
    code = "upload.incomplete"
    title = "Chunks are missing"


class NoSuchChunk(Refusal):
    code = "upload.no_such_chunk"
    title = "The manifest has no such chunk"


class ChunkDiffers(Refusal):
    code = "upload.chunk_digest"
    title = "The chunk is not the one that was announced"


@dataclass(frozen=True, slots=True)
class Desk:
    """What checking an upload needs."""

    store: Store
    artifacts: ArtifactStore
    public_sets: PublicSets
    key: CoordinatorKey
    checking: asyncio.Semaphore  # decoding is memory- and processor-bound
    max_bytes: int


# ------------------------------------------------------------------------------------------------ announce, send


async def announce(desk: Desk, site: SiteRow, manifest: Manifest) -> UploadState:
    """Begin an upload, or take one up again: one upload a round, site and kind."""
    verify_manifest(manifest, site.public_key)
    if manifest.size_bytes > desk.max_bytes:
        raise UploadTooLarge(f"{manifest.size_bytes} bytes are announced, at most {desk.max_bytes} are accepted")
    async with desk.store.write() as tx:
        federation = await tx.federation(site.federation_id, lock=True)
        check_active(await tx.site(site.id))
        row = await tx.round(manifest.round_id, of=federation.id)
        known = await tx.live_upload(row.id, site.name, manifest.kind)
        if known is not None:
            _check_same(known, manifest, row)
        upload = known or await _begun(tx, federation, row, site, manifest)
        now = await state_of(tx, upload)
    if known is not None:
        return await _with_parts(desk, now)
    desk.store.chunks.remember(upload, site)
    return now


async def _begun(
    tx: Transaction, federation: FederationRow, row: RoundRow, site: SiteRow, manifest: Manifest
) -> UploadRow:
    await _check_open(tx, row, site)
    if manifest.kind == "adapter" and not federation.config.average_adapters:
        raise KindNotWanted("average_adapters is off in this federation: adapters stay at their sites")
    upload = await tx.add_upload(federation.id, site.name, manifest)
    await tx.append(federation.id, "upload.announced", round_id=row.id, site=site.name, bytes=manifest.size_bytes)
    return upload


async def put_chunk(
    desk: Desk, site: SiteRow, upload_id: str, number: int, content_range: str | None, request: Request
) -> UploadState:
    """Keep one chunk, or some bytes of it; in any order, any number of times."""
    async with desk.store.read() as tx:
        upload = await own_upload(tx, site, upload_id)
        _check_number(upload, number)
        if upload.state == "accepted":
            return await state_of(tx, upload)
        await still_open(tx, upload)
    span = read_span(content_range, chunk_size(upload.manifest, number))
    if span.start == span.stop:
        return await state(desk, site, upload_id)
    arrived = await desk.artifacts.arrivals.receive(chunk_key(upload_id, number), span, request)
    chunk = await _whole_chunk(desk, upload, number, span, arrived)
    if chunk is None:
        return await state(desk, site, upload_id)
    return await _keep_chunk(desk, site, upload, number, chunk)


async def put_next_chunk(desk: Desk, upload: UploadRow, site: SiteRow, number: int, request: Request) -> UploadState:
    """Keep a whole chunk of an upload that was open a moment ago, and ask the database once, when the bytes are there.

    An upload that takes no more by then, a round that is over, a site that was revoked: all is refused, nothing kept.
    """
    _check_number(upload, number)
    span = read_span(None, chunk_size(upload.manifest, number))
    with desk.store.chunks.coming():
        arrived = await desk.artifacts.arrivals.receive(chunk_key(upload.id, number), span, request)
        return await _keep_chunk(desk, site, upload, number, arrived)


def _check_number(upload: UploadRow, number: int) -> None:
    if not 0 <= number < len(upload.manifest.chunks):
        raise NoSuchChunk(f"chunk {number} of {len(upload.manifest.chunks)}; they are counted from 0")


async def _whole_chunk(desk: Desk, upload: UploadRow, number: int, span: Span, arrived: Pieces) -> Pieces | None:
    """The chunk with the bytes that came before, which are forgotten; None while some are missing."""
    arrivals, key = desk.artifacts.arrivals, chunk_key(upload.id, number)
    if span.whole:
        return arrived
    await arrivals.keep(key, span, b"".join(arrived))
    if await arrivals.there(key) < span.total:
        return None
    chunk = [piece async for piece in arrivals.stream(key, span.total)]
    await arrivals.drop(key)
    return chunk


async def _keep_chunk(desk: Desk, site: SiteRow, upload: UploadRow, number: int, data: Pieces) -> UploadState:
    """First the bytes, then the row that says they are there."""
    check = partial(_check_chunk, upload.manifest, number)
    await desk.artifacts.put_chunk(upload.id, number, data, check)
    fault_points.reach("upload.chunk.uncommitted")
    there = await desk.store.chunks.add(upload.id, site.id, number)
    if there is None:
        return await _not_taken(desk, site, upload.id)
    fault_points.reach("upload.chunk.committed")
    desk.store.chunks.remember(upload, site)
    return UploadState(upload_id=upload.id, missing=missing_chunks(upload, there), complete=False)


async def _not_taken(desk: Desk, site: SiteRow, upload_id: str) -> UploadState:
    """A chunk has come that nobody wants any more: its bytes go again. Raises what is the matter."""
    try:
        async with desk.store.read() as tx:
            upload = await own_upload(tx, site, upload_id)
            if upload.state != "accepted":  # by another request with the same bytes
                await still_open(tx, upload)
            now = await state_of(tx, upload)
    except Refusal:
        await drop_chunks(desk, upload_id)
        raise
    if now.complete:
        await drop_chunks(desk, upload_id)
    return now


async def state(desk: Desk, site: SiteRow, upload_id: str) -> UploadState:
    """What is still missing, and what of it has arrived in part."""
    async with desk.store.read() as tx:
        now = await state_of(tx, await own_upload(tx, site, upload_id))
    return await _with_parts(desk, now)


async def _with_parts(desk: Desk, now: UploadState) -> UploadState:
    if now.complete:
        return now
    await desk.artifacts.arrivals.settle(f"chunks/{now.upload_id}")
    parts = await desk.artifacts.arrivals.all_there(f"chunks/{now.upload_id}")
    arrived = {name: count for name, count in parts.items() if int(name) in now.missing and count}
    return now.model_copy(update={"arrived": arrived})


async def abandon(desk: Desk, site: SiteRow, upload_id: str) -> None:
    """Take back an upload that is not complete, to announce other bytes for the same round."""
    async with desk.store.write() as tx:
        await tx.federation(site.federation_id, lock=True)
        upload = await own_upload(tx, site, upload_id)
        if upload.state == "accepted":
            raise UploadSettled(f"upload {upload_id} was accepted, it can no longer be taken back")
        if upload.state == "open":
            await tx.move_upload(upload, "abandoned")
            await tx.append(site.federation_id, "upload.abandoned", round_id=upload.round_id, site=site.name)
    await drop_chunks(desk, upload_id)


async def clear_leftovers(desk: Desk, limit: int = 100) -> int:
    """Delete chunks that nobody will ask for; returns how many uploads had any."""
    async with desk.store.read() as tx:
        leftovers = await tx.leftover_uploads(limit)
    for upload in leftovers:
        if upload.state == "open":
            async with desk.store.write() as tx:
                await tx.federation(upload.federation_id, lock=True)
                await tx.abandon_uploads(upload.round_id, upload.site, only_open=True)
        await drop_chunks(desk, upload.id)
    return len(leftovers)


async def drop_chunks(desk: Desk, upload_id: str) -> None:
    await desk.artifacts.drop_chunks(upload_id)
    await desk.artifacts.arrivals.drop(f"chunks/{upload_id}")
    await desk.store.chunks.forget(upload_id)


# ------------------------------------------------------------------------------------------------ the rules


async def own_upload(tx: Transaction, site: SiteRow, upload_id: str) -> UploadRow:
    """A site sees its own uploads; another's does not exist for it. One that was revoked meanwhile sees none."""
    check_active(await tx.site(site.id))
    upload = await tx.upload(upload_id)
    if (upload.federation_id, upload.site) != (site.federation_id, site.name):
        raise UploadUnknown(f"there is no upload {upload_id}; announce it with POST /v1/uploads")
    return upload


async def state_of(tx: Transaction, upload: UploadRow) -> UploadState:
    complete = upload.state == "accepted"
    missing = () if complete else missing_chunks(upload, await tx.chunks(upload.id))
    return UploadState(upload_id=upload.id, missing=missing, complete=complete)


def missing_chunks(upload: UploadRow, there: Collection[int]) -> tuple[int, ...]:
    return tuple(number for number in range(len(upload.manifest.chunks)) if number not in there)


async def still_open(tx: Transaction, upload: UploadRow) -> RoundRow:
    """The upload's round, if both still take bytes."""
    if upload.state != "open":
        raise UploadSettled(f"upload {upload.id} is {upload.state}; announce the bytes anew with POST /v1/uploads")
    row = await tx.round(upload.round_id)
    await _check_collecting(tx, row)
    return row


async def _check_open(tx: Transaction, row: RoundRow, site: SiteRow) -> None:
    await _check_collecting(tx, row)
    part = await tx.part(row.id, site.name)
    if part is None or not part.expected:
        raise NotExpected(
            f"round {row.number} began at {row.started_at.isoformat()} without site {site.name}, which was not ready "
            "then; it may still apply, and joins the next round"
        )


async def _check_collecting(tx: Transaction, row: RoundRow) -> None:
    if row.state == "collecting":
        return
    federation = await tx.federation(row.federation_id)
    following = next_opening(federation, await tx.rounds_begun(row.federation_id), row)
    raise RoundClosed(
        f"round {row.number} is {row.state} since {row.state_since.isoformat()}, uploads are taken while it is "
        f"collecting; {following}"
    )


def _check_same(known: UploadRow, manifest: Manifest, row: RoundRow) -> None:
    if known.manifest.signed_bytes() == manifest.signed_bytes():
        return
    remedy = (
        f"DELETE /v1/uploads/{known.id} first to send these instead"
        if known.state == "open"
        else f"it was accepted for round {row.number} and stays"
    )
    raise UploadDiffers(
        f"upload {known.id} announced {known.manifest.size_bytes} bytes with SHA-256 {known.manifest.digest}, this is "
        f"{manifest.size_bytes} bytes with {manifest.digest}; {remedy}"
    )


def chunk_key(upload_id: str, number: int) -> str:
    return f"chunks/{upload_id}/{number}"


def chunk_size(manifest: Manifest, number: int) -> int:
    return min(CHUNK_BYTES, manifest.size_bytes - number * CHUNK_BYTES)


def _check_chunk(manifest: Manifest, number: int, data: bytes) -> None:
    found = hashlib.sha256(data).hexdigest()
    if found != manifest.chunks[number]:
        raise ChunkDiffers(
            f"chunk {number} came as {len(data)} bytes with SHA-256 {found}, {manifest.chunks[number]} "
            f"was announced ({CHUNK_BYTES} bytes, the last one fewer); send it again"
        )


def listed(chunks: Collection[int]) -> str:
    return named(str(number) for number in chunks)
