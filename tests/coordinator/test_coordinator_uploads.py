"""Uploads: every bad one is refused with a code of its own and leaves nothing; the right one is then accepted."""

import asyncio
import hashlib
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import zstandard

from coordinator_world import SiteUnderTest, World, config, make_knowledge
from fedmkt.codec import MAGIC, read_frame, split_frames, write_frame
from fedmkt.knowledge import DEFAULT_LIMITS, encode
from fedmkt.protocol import (
    CHUNK_BYTES,
    DistillationConfig,
    KeysView,
    Manifest,
    RoundView,
    UploadReceipt,
    UploadState,
    manifest_bytes,
)
from fedmkt.signing import new_key, sign_manifest, verify_receipt
from fedmkt_coordinator import uploads

pytestmark = [pytest.mark.anyio, pytest.mark.services]


async def stored(world: World) -> set[str]:
    """Digests of all artifacts, and everything that chunks left."""
    folder = world.context.settings.state_dir / "objects"
    kept = [*(folder / "artifacts").rglob("*"), *(folder / "uploads").rglob("*")]
    return {path.name for path in kept if path.is_file()}


# ------------------------------------------------------------------------------------------------ bad content

Forger = Callable[[World, SiteUnderTest, RoundView], bytes]


def honest(world: World, site: SiteUnderTest, view: RoundView) -> bytes:
    return world.blob(site, view)


def reindexed(blob: bytes, **fields: Any) -> bytes:
    """The blob with other values in its index's header, whatever they claim."""
    frames = split_frames(blob, DEFAULT_LIMITS)
    columns = dict(read_frame(frames[0], 1 << 20))
    index = json.loads(columns["index"].tobytes())
    index["header"] |= fields
    columns["index"] = np.frombuffer(json.dumps(index).encode(), dtype=np.uint8)
    rows = [len(frame).to_bytes(4, "little") + bytes(frame) for frame in frames[1:]]
    return b"".join([blob[: len(MAGIC) + 1], write_frame(columns), *rows])


def header(**fields: Any) -> Forger:
    return lambda world, site, view: world.blob(site, view, **fields)


def truth(world: World) -> dict[str, Any]:
    return {"federation_id": world.federation_id, "round_number": 1, "slice_index": 0}


def beyond_the_vocabulary(world: World, site: SiteUnderTest, view: RoundView) -> bytes:
    """Ids made with a larger vocabulary, announced as of the right one."""
    samples = world.slice_of(0)
    about = {**truth(world), "vocabulary_size": 100_000}
    knowledge = make_knowledge(world.public_set, samples, site.words, world.config, **about)
    knowledge.token_ids[-1] = 99_999
    return reindexed(encode(knowledge), vocabulary_size=site.words.size)


def not_a_number(world: World, site: SiteUnderTest, view: RoundView) -> bytes:
    """Levels on the wire are integers, so the header is the one place where a NaN can stand."""
    return reindexed(honest(world, site, view), top_p=float("nan"))


def bomb(world: World, site: SiteUnderTest, view: RoundView) -> bytes:
    """A few kilobytes that would unpack to gigabytes."""
    blob = honest(world, site, view)
    frame = zstandard.ZstdCompressor().compress(bytes(1 << 28))
    return blob[: len(MAGIC) + 1] + len(frame).to_bytes(4, "little") + frame


def other_slice(world: World, site: SiteUnderTest, view: RoundView) -> bytes:
    samples = world.slice_of(1)
    return encode(make_knowledge(world.public_set, samples, site.words, world.config, **truth(world)))


def outside_the_response(world: World, site: SiteUnderTest, view: RoundView) -> bytes:
    knowledge = make_knowledge(world.public_set, world.slice_of(0), site.words, world.config, **truth(world))
    knowledge.context_ends[:] += 1000
    return encode(knowledge)


BAD = {
    "no blob at all": (lambda *_: b"this is no knowledge", "knowledge.malformed"),
    "the last bytes missing": (lambda *a: honest(*a)[:-7], "knowledge.truncated"),
    "another federation's": (header(federation_id="fed_ffffffffffffffffffff"), "knowledge.wrong_federation"),
    "another round's": (header(round_number=2), "knowledge.wrong_round"),
    "another slice's": (header(slice_index=1), "knowledge.wrong_round"),
    "another public set's": (header(public_set_digest="0" * 64), "knowledge.wrong_public_set"),
    "another vocabulary's": (header(vocabulary_fingerprint="0" * 64), "knowledge.wrong_vocabulary"),
    "a larger vocabulary": (header(vocabulary_size=100_000), "knowledge.wrong_vocabulary"),
    "other settings": (header(max_tokens=9), "knowledge.wrong_settings"),
    "ids beyond the vocabulary": (beyond_the_vocabulary, "knowledge.token_out_of_range"),
    "not a number": (not_a_number, "knowledge.malformed"),
    "a bomb": (bomb, "knowledge.bomb"),
    "samples of another slice": (other_slice, "knowledge.sample_outside_slice"),
    "offsets behind the text": (outside_the_response, "knowledge.offset_out_of_range"),
}


@pytest.mark.parametrize("what", BAD)
async def test_bad_knowledge_is_refused_by_its_own_code_and_the_right_one_is_accepted_after(
    collecting: World, what: str
) -> None:
    forge, code = BAD[what]
    world, site, view = collecting, collecting.sites["north"], await collecting.round()
    before = await stored(world)
    blob = forge(world, site, view)
    state = await world.send_chunks(site, world.manifest(site, view, blob), blob)
    await world.refused(code, "POST", f"/v1/uploads/{state.upload_id}/complete", site)
    assert await stored(world) == before
    (part,) = [each for each in (await world.round()).sites if each.site == "north"]
    assert (part.state, part.upload_bytes) == ("expected", 0)
    await world.refused("upload.settled", "POST", f"/v1/uploads/{state.upload_id}/complete", site)
    await world.upload(site, view)
    assert (await world.round()).missing == ("south",)
    assert (await world.event_kinds()).count("upload.refused") == 1


async def test_an_oversized_upload_is_refused_when_it_is_announced(collecting: World) -> None:
    world, site, view = collecting, collecting.sites["north"], await collecting.round()
    limited = 3 * CHUNK_BYTES
    size = limited + 1
    chunks = ("ab" * 32,) * 4
    signature = site.key.sign(manifest_bytes("knowledge", view.round_id, "cd" * 32, size, chunks)).hex()
    manifest = Manifest(round_id=view.round_id, digest="cd" * 32, size_bytes=size, chunks=chunks, signature=signature)
    desk = world.context.desk
    small = uploads.Desk(desk.store, desk.artifacts, desk.public_sets, desk.key, desk.checking, limited)
    async with desk.store.read() as tx:
        row = await tx.site(site.site_id)
    with pytest.raises(uploads.UploadTooLarge, match=f"{size} bytes are announced, at most {limited}"):
        await uploads.announce(small, row, manifest)


# ------------------------------------------------------------------------------------------------ manifests, chunks


async def test_chunks_come_in_any_order_any_number_of_times(collecting: World) -> None:
    world, site, view = collecting, collecting.sites["north"], await collecting.round()
    blob = bytes(range(256)) * (CHUNK_BYTES // 256) + b"second" + bytes(CHUNK_BYTES)
    manifest = world.manifest(site, view, blob)
    state = await world.ask(UploadState, "POST", "/v1/uploads", site, manifest)
    assert state.missing == (0, 1, 2)
    base = f"/v1/uploads/{state.upload_id}"
    pieces = [blob[at : at + CHUNK_BYTES] for at in range(0, len(blob), CHUNK_BYTES)]
    for index, missing in ((2, (0, 1)), (2, (0, 1)), (0, (1,))):
        state = await world.ask(UploadState, "PUT", f"{base}/chunks/{index}", site, pieces[index])
        assert (state.missing, state.complete) == (missing, False)
    assert await world.ask(UploadState, "GET", base, site) == state
    assert await world.ask(UploadState, "POST", "/v1/uploads", site, manifest) == state
    detail = await world.refused("upload.incomplete", "POST", f"{base}/complete", site)
    assert "1 of 3 chunks are missing: 1" in detail
    await world.refused("upload.chunk_digest", "PUT", f"{base}/chunks/1", site, pieces[0])
    await world.refused("upload.no_such_chunk", "PUT", f"{base}/chunks/3", site, pieces[0])
    await world.refused("upload.no_such_chunk", "PUT", f"{base}/chunks/-1", site, pieces[0])
    await world.refused("body.too_large", "PUT", f"{base}/chunks/1", site, bytes(CHUNK_BYTES + 4097))
    await world.ask(UploadState, "PUT", f"{base}/chunks/1", site, pieces[1])
    await world.refused("knowledge.malformed", "POST", f"{base}/complete", site)


async def test_the_same_upload_twice_yields_the_same_receipt(collecting: World) -> None:
    world, site, view = collecting, collecting.sites["north"], await collecting.round()
    receipt = await world.upload(site, view)
    manifest = world.manifest(site, view, world.blob(site, view))
    keys = await world.ask(KeysView, "GET", "/v1/keys", None)
    verify_receipt(receipt, manifest, keys.public_keys)
    state = await world.ask(UploadState, "POST", "/v1/uploads", site, manifest)
    assert (state.upload_id, state.missing, state.complete) == (receipt.upload_id, (), True)
    path = f"/v1/uploads/{receipt.upload_id}"
    assert await world.ask(UploadReceipt, "POST", f"{path}/complete", site) == receipt
    blob = world.blob(site, view)
    state = await world.ask(UploadState, "PUT", f"{path}/chunks/0", site, blob)
    assert state.complete
    await world.upload(world.sites["south"], view)
    assert (await world.round()).state == "distilling"
    assert await world.ask(UploadReceipt, "POST", f"{path}/complete", site) == receipt
    assert (await world.event_kinds()).count("knowledge.accepted") == 2
    await world.tick()
    assert not list((world.context.settings.state_dir / "objects" / "uploads").rglob("*[0-9]"))


async def test_other_bytes_for_the_same_round_are_refused_until_the_first_are_taken_back(collecting: World) -> None:
    world, site, view = collecting, collecting.sites["north"], await collecting.round()
    first, second = world.blob(site, view), world.blob(site, view, model_id="retrained")
    state = await world.send_chunks(site, world.manifest(site, view, first), first)
    other = world.manifest(site, view, second)
    detail = await world.refused("upload.differs", "POST", "/v1/uploads", site, other)
    assert f"DELETE /v1/uploads/{state.upload_id}" in detail
    assert (await world.send("DELETE", f"/v1/uploads/{state.upload_id}", site)).status_code == 204
    assert (await world.send("DELETE", f"/v1/uploads/{state.upload_id}", site)).status_code == 204
    receipt = await world.upload(site, view, second)
    assert receipt.digest == hashlib.sha256(second).hexdigest()
    assert "stays" in await world.refused(
        "upload.differs", "POST", "/v1/uploads", site, world.manifest(site, view, first)
    )
    await world.refused("upload.settled", "DELETE", f"/v1/uploads/{receipt.upload_id}", site)


async def test_a_manifest_signed_with_another_key_is_refused(collecting: World) -> None:
    site, view = collecting.sites["north"], await collecting.round()
    manifest = sign_manifest(new_key(), "knowledge", view.round_id, b"bytes")
    await collecting.refused("signature.invalid", "POST", "/v1/uploads", site, manifest)


async def test_a_site_that_is_revoked_between_two_chunks_hears_it_at_the_second_and_nothing_stays(
    collecting: World,
) -> None:
    world, site, view = collecting, collecting.sites["north"], await collecting.round()
    blob = bytes(CHUNK_BYTES) + b"second"
    state = await world.ask(UploadState, "POST", "/v1/uploads", site, world.manifest(site, view, blob))
    base = f"/v1/uploads/{state.upload_id}/chunks"
    await world.ask(UploadState, "PUT", f"{base}/0", site, blob[:CHUNK_BYTES])
    await world.send("POST", f"/v1/federations/{world.federation_id}/sites/north/revoke")
    await world.refused("site.revoked", "PUT", f"{base}/1", site, blob[CHUNK_BYTES:])
    async with world.context.store.read() as tx:
        assert await tx.chunks(state.upload_id) == set()
    with pytest.raises(FileNotFoundError):
        await world.context.artifacts.assemble(state.upload_id, 2)


async def test_a_chunk_of_an_upload_taken_back_a_moment_ago_is_refused(collecting: World) -> None:
    world, site, view = collecting, collecting.sites["north"], await collecting.round()
    blob = bytes(CHUNK_BYTES) + b"second"
    state = await world.ask(UploadState, "POST", "/v1/uploads", site, world.manifest(site, view, blob))
    base = f"/v1/uploads/{state.upload_id}"
    await world.ask(UploadState, "PUT", f"{base}/chunks/0", site, blob[:CHUNK_BYTES])
    await world.send("DELETE", base, site)
    await world.refused("upload.settled", "PUT", f"{base}/chunks/1", site, blob[CHUNK_BYTES:])
    await world.refused("upload.unknown", "PUT", f"{base}/chunks/1", world.sites["south"], blob[CHUNK_BYTES:])


async def test_chunks_that_do_not_make_the_announced_whole_are_refused(collecting: World) -> None:
    site, view = collecting.sites["north"], await collecting.round()
    blob = b"these bytes"
    chunk, digest = hashlib.sha256(blob).hexdigest(), hashlib.sha256(b"other").hexdigest()
    signature = site.key.sign(manifest_bytes("knowledge", view.round_id, digest, len(blob), (chunk,))).hex()
    manifest = Manifest(
        round_id=view.round_id, digest=digest, size_bytes=len(blob), chunks=(chunk,), signature=signature
    )
    state = await collecting.send_chunks(site, manifest, blob)
    await collecting.refused("upload.digest", "POST", f"/v1/uploads/{state.upload_id}/complete", site)


async def test_a_manifest_that_contradicts_itself_is_malformed(collecting: World) -> None:
    site, view = collecting.sites["north"], await collecting.round()
    body = collecting.manifest(site, view, b"bytes").model_dump() | {"size_bytes": CHUNK_BYTES + 1}
    answer = await collecting.http.post("/v1/uploads", json=body, headers={"Authorization": f"Bearer {site.token}"})
    assert (answer.status_code, answer.json()["code"]) == (422, "request.malformed")
    assert "2 chunks of 1048576, the manifest lists 1" in answer.json()["detail"]


async def test_a_site_does_not_see_another_sites_upload(collecting: World) -> None:
    world, north, south = collecting, collecting.sites["north"], collecting.sites["south"]
    receipt = await world.upload(north, await world.round())
    for method, path in (("GET", ""), ("POST", "/complete"), ("DELETE", ""), ("PUT", "/chunks/0")):
        await world.refused("upload.unknown", method, f"/v1/uploads/{receipt.upload_id}{path}", south)
    await world.refused("artifact.unknown", "GET", f"/v1/artifacts/{receipt.digest}", south)
    await world.refused("artifact.unknown", "GET", f"/v1/artifacts/{receipt.digest}", north)
    assert (await world.send("GET", f"/v1/artifacts/{receipt.digest}", "worker")).status_code == 200


async def test_a_round_of_another_federation_does_not_exist_for_a_site(collecting: World) -> None:
    view, stranger_world = await collecting.round(), collecting
    await stranger_world.create(config("banks"))
    stranger = await stranger_world.enrol("north")
    manifest = sign_manifest(stranger.key, "knowledge", view.round_id, b"bytes")
    await stranger_world.refused("round.unknown", "POST", "/v1/uploads", stranger, manifest)


async def test_chunks_that_the_artifact_store_has_lost_are_asked_for_again(collecting: World) -> None:
    world, site, view = collecting, collecting.sites["north"], await collecting.round()
    blob = world.blob(site, view)
    state = await world.send_chunks(site, world.manifest(site, view, blob), blob)
    assert state.missing == ()
    await world.context.artifacts.drop_chunks(state.upload_id)
    await world.refused("upload.incomplete", "POST", f"/v1/uploads/{state.upload_id}/complete", site)
    await world.upload(site, view)


async def test_leftovers_of_a_round_that_ended_are_thrown_away(collecting: World) -> None:
    world, site, view = collecting, collecting.sites["north"], await collecting.round()
    blob = world.blob(site, view)
    state = await world.send_chunks(site, world.manifest(site, view, blob), blob)
    await world.send("POST", f"/v1/rounds/{view.round_id}/cancel")
    before = await stored(world)
    assert await uploads.clear_leftovers(world.context.desk) == 1
    assert len(await stored(world)) == len(before) - 1
    assert await uploads.clear_leftovers(world.context.desk) == 0
    await world.refused("upload.settled", "POST", f"/v1/uploads/{state.upload_id}/complete", site)


PAPER = DistillationConfig(profile="paper", rule="dual_min_ce", projection="mined")


async def test_the_papers_profile_takes_knowledge_on_the_whole_public_set(world: World) -> None:
    await world.ready(config(distillation=PAPER))
    await world.request_rounds()
    view = await world.round()
    everything = range(len(world.public_set))
    for site in world.sites.values():
        knowledge = make_knowledge(world.public_set, everything, site.words, world.config, **truth(world))
        await world.upload(site, view, encode(knowledge))
    _, payload = await world.take_distill()
    assert list(payload.uploads[0].vocabulary_maps) == ["mined"]


async def test_completing_twice_at_the_same_time_gives_one_receipt(collecting: World) -> None:
    world, site, view = collecting, collecting.sites["north"], await collecting.round()
    blob = world.blob(site, view)
    state = await world.send_chunks(site, world.manifest(site, view, blob), blob)
    path = f"/v1/uploads/{state.upload_id}/complete"
    receipts = await asyncio.gather(*(world.ask(UploadReceipt, "POST", path, site) for _ in range(4)))
    assert len(set(receipts)) == 1
    assert (await world.event_kinds()).count("knowledge.accepted") == 1


# ------------------------------------------------------------------------------------------------ chunks in parts


async def put_part(world: World, upload_id: str, blob: bytes, start: int, stop: int) -> UploadState:
    headers = {"Content-Range": f"bytes {start}-{stop - 1}/{len(blob)}"}
    path = f"/v1/uploads/{upload_id}/chunks/0"
    return await world.ask(UploadState, "PUT", path, world.sites["north"], blob[start:stop], headers=headers)


async def parts_kept(world: World) -> list[str]:
    folder = world.context.settings.state_dir / "objects" / "incoming" / "chunks"
    return [path.name for path in folder.rglob("*") if path.is_file()]


async def announced(world: World, blob: bytes) -> UploadState:
    site = world.sites["north"]
    manifest = world.manifest(site, await world.round(), blob)
    return await world.ask(UploadState, "POST", "/v1/uploads", site, manifest)


async def test_what_arrived_of_a_chunk_is_told_to_who_announces_or_asks(collecting: World) -> None:
    world, blob = collecting, bytes(10_000)
    upload_id = (await announced(world, blob)).upload_id
    assert (await put_part(world, upload_id, blob, 0, 4000)).arrived == {"0": 4000}
    assert (await announced(world, blob)).arrived == {"0": 4000}
    state = await world.ask(UploadState, "GET", f"/v1/uploads/{upload_id}", world.sites["north"])
    assert (state.missing, state.arrived) == ((0,), {"0": 4000})
    state = await put_part(world, upload_id, blob, 4000, 10_000)
    assert (state.missing, state.arrived) == ((), {})
    assert await parts_kept(world) == []


async def test_parts_are_swept_with_their_upload(collecting: World) -> None:
    world, blob = collecting, bytes(10_000)
    upload_id = (await announced(world, blob)).upload_id
    await put_part(world, upload_id, blob, 0, 4000)
    assert len(await parts_kept(world)) == 1
    await world.send("DELETE", f"/v1/uploads/{upload_id}", world.sites["north"])
    assert await parts_kept(world) == []
    upload_id = (await announced(world, blob)).upload_id
    await put_part(world, upload_id, blob, 0, 4000)
    await world.send("POST", f"/v1/rounds/{(await world.round()).round_id}/cancel")
    assert await uploads.clear_leftovers(world.context.desk) == 1
    assert await parts_kept(world) == []


@pytest.mark.parametrize(
    ("header", "complaint"),
    [
        ("bytes 0-4999/20000", "for a body of 10000 bytes; announce another one"),
        ("bytes 5000-4999/10000", "ends before it begins"),
        ("bytes 0-10000/10000", "beyond the body"),
        ("bytes 0-9/10000", "10 bytes; at least 1024"),
        ("bytes 0-4999/10000", "3 bytes came, 5000 were announced"),
        ("octets 0-4999/10000", "write 'bytes FIRST-LAST/TOTAL'"),
        ("bytes 0-4999/*", "write 'bytes FIRST-LAST/TOTAL'"),
    ],
)
async def test_a_content_range_that_does_not_fit_is_refused(collecting: World, header: str, complaint: str) -> None:
    world, blob = collecting, bytes(10_000)
    path = f"/v1/uploads/{(await announced(world, blob)).upload_id}/chunks/0"
    more = {"headers": {"Content-Range": header}}
    detail = await world.refused("body.content_range", "PUT", path, world.sites["north"], b"abc", **more)
    assert complaint in detail
    assert await parts_kept(world) == []
