"""Checking a whole upload and counting it: what is refused leaves nothing behind, what is accepted gets a receipt."""

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fedmkt import fault_points
from fedmkt.errors import Refusal
from fedmkt.knowledge import check_header, check_rows, decode, limits_for, read_index
from fedmkt.protocol import CHUNK_BYTES, FederationConfig, Manifest, UploadReceipt
from fedmkt.public_set import PublicSet
from fedmkt_coordinator import rounds
from fedmkt_coordinator.artifacts import ArtifactUnknown
from fedmkt_coordinator.enrolment import check_active
from fedmkt_coordinator.store import Transaction
from fedmkt_coordinator.store.records import FederationRow, SiteRow, UploadRow
from fedmkt_coordinator.uploads import (
    Desk,
    UploadIncomplete,
    drop_chunks,
    listed,
    missing_chunks,
    own_upload,
    still_open,
)


class UploadDigest(Refusal):
    code = "upload.digest"
    title = "The chunks do not make the announced whole"


async def complete(desk: Desk, site: SiteRow, upload_id: str) -> UploadReceipt:
    """Check the whole and count it; asked again, the same receipt. What is refused leaves nothing behind."""
    async with desk.store.read() as tx:
        upload = await own_upload(tx, site, upload_id)
        if upload.state == "accepted":
            return _receipt(desk, upload)
        expected = await _expected(tx, upload, site)
    public_set = await desk.public_sets.get(expected.public_set)
    try:
        async with desk.checking:
            blob = await _whole(desk, upload)
            if blob is not None and upload.kind == "knowledge":
                await asyncio.to_thread(check_knowledge, blob, expected, public_set)
    except UploadIncomplete:
        now = await _reread(desk, upload_id)
        if now.state == "accepted":  # the same request, sent twice, was faster and has cleared the chunks away
            return _receipt(desk, now)
        raise
    except Refusal as refusal:
        await _refuse(desk, upload, refusal)
        raise
    await desk.artifacts.keep_upload(upload_id, upload.manifest.digest, blob)
    fault_points.reach("upload.artifact.stored")
    accepted = await _accept(desk, upload, site)
    await drop_chunks(desk, upload_id)
    fault_points.reach("upload.chunks.dropped")
    return _receipt(desk, accepted)


async def _reread(desk: Desk, upload_id: str) -> UploadRow:
    async with desk.store.read() as tx:
        return await tx.upload(upload_id)


@dataclass(frozen=True, slots=True)
class Expected:
    """What the knowledge must be about."""

    federation_id: str
    config: FederationConfig
    public_set: str
    round_number: int
    slice_index: int
    fingerprint: str
    size: int


async def _expected(tx: Transaction, upload: UploadRow, site: SiteRow) -> Expected:
    federation = await tx.federation(upload.federation_id)
    row = await still_open(tx, upload)
    missing = missing_chunks(upload, await tx.chunks(upload.id))
    if missing:
        raise UploadIncomplete(
            f"{len(missing)} of {len(upload.manifest.chunks)} chunks are missing: {listed(missing)}; send them first"
        )
    now = await tx.site(site.id)
    assert federation.public_set is not None, "a round begins with a public set"
    assert now.vocabulary is not None, "only ready sites are expected, and vocabularies never go away"
    vocabulary = await tx.vocabulary(now.vocabulary)
    return Expected(
        federation_id=federation.id,
        config=federation.config,
        public_set=federation.public_set,
        round_number=row.number,
        slice_index=row.slice_index,
        fingerprint=vocabulary.fingerprint,
        size=vocabulary.size,
    )


async def _whole(desk: Desk, upload: UploadRow) -> bytes | None:
    """All of it, checked against its digest; None for an adapter that is good where it lies.

    Adapters are opaque here, the LLM server opens them: nobody needs them in memory.
    """
    manifest = upload.manifest
    if upload.kind == "adapter" and await desk.artifacts.digest_of_upload(upload.id) == manifest.digest:
        return None
    try:
        blob = await _assembled(desk, upload)
    except FileNotFoundError as error:
        raise await _chunks_lost(desk, upload) from error
    digest = await asyncio.to_thread(lambda: hashlib.sha256(blob).hexdigest())
    if digest != manifest.digest:
        if not await asyncio.to_thread(_chunks_hold, blob, manifest):  # a power cut has taken what was not on the disk
            raise await _chunks_lost(desk, upload)
        raise UploadDigest(
            f"the chunks make {len(blob)} bytes with SHA-256 {digest}, {manifest.size_bytes} with {manifest.digest} "
            "were announced; announce it anew"
        )
    return blob


async def _assembled(desk: Desk, upload: UploadRow) -> bytes:
    try:
        return await desk.artifacts.assemble(upload.id, len(upload.manifest.chunks))
    except FileNotFoundError:
        try:  # an attempt that got no further has made it an artifact
            return await desk.artifacts.get(upload.manifest.digest)
        except ArtifactUnknown as error:
            raise FileNotFoundError(upload.id) from error


async def _chunks_lost(desk: Desk, upload: UploadRow) -> UploadIncomplete:
    async with desk.store.write() as tx:
        await tx.forget_chunks(upload.id)
    return UploadIncomplete("the artifact store has lost a chunk; send all of them again")


def _chunks_hold(blob: bytes, manifest: Manifest) -> bool:
    pieces = (blob[at : at + CHUNK_BYTES] for at in range(0, manifest.size_bytes, CHUNK_BYTES))
    return [hashlib.sha256(piece).hexdigest() for piece in pieces] == list(manifest.chunks)


def check_knowledge(blob: bytes, expected: Expected, public_set: PublicSet) -> None:
    """The header first: it is cheap, and says the most. Raises the Refusals of `fedmkt.knowledge`."""
    config = expected.config
    limits = limits_for(public_set, config.knowledge)
    header = read_index(blob, limits=limits).header
    check_header(
        header,
        federation_id=expected.federation_id,
        round_number=expected.round_number,
        slice_index=expected.slice_index,
        public_set_digest=public_set.digest,
        vocabulary_fingerprint=expected.fingerprint,
        vocabulary_size=expected.size,
        settings=config.knowledge,
    )
    check_rows(decode(blob, limits=limits), public_set, _samples(public_set, config, expected.slice_index))


def _samples(public_set: PublicSet, config: FederationConfig, slice_index: int) -> Sequence[int]:
    """The paper's profile makes knowledge on the whole public set, the default one on a slice a round."""
    if config.distillation.profile == "paper":
        return range(len(public_set))
    return public_set.parts(config.public_set.slices, config.public_set.holdout_share).slices[slice_index]


async def _refuse(desk: Desk, upload: UploadRow, refusal: Refusal) -> None:
    async with desk.store.write() as tx:
        await tx.federation(upload.federation_id, lock=True)
        now = await tx.upload(upload.id)
        if now.state == "open":
            await tx.move_upload(now, "refused")
            await tx.append(
                upload.federation_id, "upload.refused", round_id=upload.round_id, site=upload.site, code=refusal.code
            )
    await drop_chunks(desk, upload.id)


async def _accept(desk: Desk, upload: UploadRow, site: SiteRow) -> UploadRow:
    """Upload, the site's part in the round, and what follows for the round, in one transaction."""
    async with desk.store.write() as tx:
        federation = await tx.federation(upload.federation_id, lock=True)
        check_active(await tx.site(site.id))
        now = await tx.upload(upload.id)
        if now.state == "accepted":
            return now
        await still_open(tx, now)
        accepted = await tx.move_upload(now, "accepted")
        await _count(tx, federation, accepted, site)
        await tx.append(
            federation.id,
            f"{upload.kind}.accepted",
            round_id=upload.round_id,
            site=upload.site,
            bytes=upload.manifest.size_bytes,
            digest=upload.manifest.digest,
            seconds=round((tx.now - upload.created_at).total_seconds(), 3),
        )
        await rounds.advance(tx, federation.id)
    return accepted


async def _count(tx: Transaction, federation: FederationRow, upload: UploadRow, site: SiteRow) -> None:
    part = await tx.part(upload.round_id, upload.site)
    assert part is not None, "only expected sites may announce"
    now = await tx.site(site.id)
    manifest = upload.manifest
    part = replace(part, upload_bytes=part.upload_bytes + manifest.size_bytes)
    if upload.kind == "knowledge":
        part = replace(
            part, knowledge=manifest.digest, vocabulary=now.vocabulary, private_samples=now.private_samples or 0
        )
    else:
        part = replace(part, adapter=manifest.digest)
    if part.knowledge is not None and (part.adapter is not None or not federation.config.average_adapters):
        part = replace(part, uploaded_at=tx.now)
    await tx.set_uploaded(part)


def _receipt(desk: Desk, upload: UploadRow) -> UploadReceipt:
    assert upload.accepted_at is not None
    return desk.key.sign(
        UploadReceipt(
            upload_id=upload.id,
            round_id=upload.round_id,
            site=upload.site,
            kind=upload.kind,
            digest=upload.manifest.digest,
            size_bytes=upload.manifest.size_bytes,
            accepted_at=upload.accepted_at,
            signature="",
        )
    )
