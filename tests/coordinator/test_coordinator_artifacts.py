"""What is handed in and fetched: artifacts, public sets, vocabularies, models."""

import json
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from coordinator_world import CARD, PUBLIC_SET, World
from fedmkt.protocol import (
    LlmRegistration,
    ModelCard,
    PublicSetReceipt,
    SiteModel,
)
from fedmkt_coordinator.artifacts import ArtifactStore

pytestmark = [pytest.mark.anyio, pytest.mark.services]

DATA = bytes(range(256)) * 5000


async def test_an_artifact_comes_whole_in_parts_or_not_again(world: World) -> None:
    path = f"/v1/artifacts/{await world.store_artifact(DATA)}"
    whole = await world.send("GET", path, "worker")
    assert (whole.status_code, whole.content) == (200, DATA)
    assert whole.headers["etag"] == f'"{path.rsplit("/", 1)[1]}"'
    again = await world.send("GET", path, "worker", headers={"If-None-Match": whole.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize(
    ("asked", "start", "stop"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=100-199", 100, 200),
        ("bytes=1279000-", 1279000, 1280000),
        ("bytes=1279999-9999999", 1279999, 1280000),
        ("bytes=-10", 1279990, 1280000),
        ("bytes=-9999999", 0, 1280000),
    ],
)
async def test_a_range_is_answered_with_its_bytes(world: World, asked: str, start: int, stop: int) -> None:
    path = f"/v1/artifacts/{await world.store_artifact(DATA)}"
    part = await world.send("GET", path, "worker", headers={"Range": asked})
    assert (part.status_code, part.content) == (206, DATA[start:stop])
    assert part.headers["content-range"] == f"bytes {start}-{stop - 1}/1280000"


async def test_an_artifact_that_is_too_large_is_refused_with_its_first_part(world: World) -> None:
    path, part = f"/v1/artifacts/{'0' * 64}", {"Content-Range": f"bytes 0-1279999/{2**32 + 1}"}
    detail = await world.refused("artifact.too_large", "PUT", path, "worker", DATA, headers=part)
    assert detail == "4294967297 bytes are announced, at most 4294967296 are accepted"


async def test_an_artifact_too_large_for_a_vocabulary_is_refused_before_it_is_read(world: World) -> None:
    await world.create()
    digest = await world.store_artifact(bytes((64 << 20) + 1))
    registration = LlmRegistration(vocabulary=digest, model=CARD)
    path = f"/v1/federations/{world.federation_id}/llm"
    detail = await world.refused("vocabulary.malformed", "PUT", path, "worker", registration)
    assert detail == "the vocabulary has 67108865 bytes, at most 67108864 expected"


@pytest.mark.parametrize("asked", ["bytes=1280000-", "bytes=-0", "bytes=5000000-6000000"])
async def test_a_range_outside_is_refused_with_the_length(world: World, asked: str) -> None:
    path = f"/v1/artifacts/{await world.store_artifact(DATA)}"
    answer = await world.send("GET", path, "worker", headers={"Range": asked})
    assert (answer.status_code, answer.json()["code"]) == (416, "artifact.range")
    assert answer.headers["content-range"] == "bytes */1280000"


@pytest.mark.parametrize("asked", ["bytes=5-3", "bytes=0-1,5-6", "lines=1-2", "bytes=-", "bytes=a-b"])
async def test_ranges_that_are_none_give_the_whole(world: World, asked: str) -> None:
    path = f"/v1/artifacts/{await world.store_artifact(DATA)}"
    answer = await world.send("GET", path, "worker", headers={"Range": asked})
    assert (answer.status_code, answer.content) == (200, DATA)


async def test_bytes_under_a_wrong_address_are_not_kept(world: World) -> None:
    wrong = "0" * 64
    detail = await world.refused("artifact.digest", "PUT", f"/v1/artifacts/{wrong}", "worker", b"data")
    assert "4 bytes came with SHA-256" in detail
    await world.refused("artifact.unknown", "GET", f"/v1/artifacts/{wrong}", "worker")
    await world.refused("request.malformed", "GET", "/v1/artifacts/not-a-digest", "worker")
    kept = (world.context.settings.state_dir / "objects").rglob("*")
    assert [path for path in kept if path.is_file()] == []


# ------------------------------------------------------------------------------------------------ what is handed in


async def test_the_public_set_is_stored_in_its_canonical_form(world: World) -> None:
    await world.create()
    path = f"/v1/federations/{world.federation_id}/public-set"
    loose = b"\n".join(json.dumps(json.loads(line), indent=None).encode() for line in PUBLIC_SET.splitlines()) + b"\n\n"
    first = await world.ask(PublicSetReceipt, "PUT", path, "operator", PUBLIC_SET)
    assert (first.digest, first.samples) == (world.public_set.digest, 12)
    assert await world.ask(PublicSetReceipt, "PUT", path, "operator", loose) == first
    assert (await world.event_kinds()).count("public_set.stored") == 1
    await world.refused("public_set.malformed", "PUT", path, "operator", b"{}\n")
    await world.refused("public_set.empty", "PUT", path, "operator", b"")
    await world.refused("public_set.too_few_samples", "PUT", path, "operator", b'{"text": "one"}\n')


async def test_a_vocabulary_that_is_none_is_refused(world: World) -> None:
    await world.create()
    site = await world.enrol("north")
    answer = await world.send("PUT", "/v1/me/vocabulary", site, b"{}")
    assert answer.status_code == 422
    assert answer.json()["code"].startswith("vocabulary.")
    assert (await world.view()).sites[0].vocabulary is None


async def test_a_model_may_be_described_anew(world: World) -> None:
    await world.create()
    site = await world.enrol("north")
    for samples in (10, 10, 20):
        card = ModelCard(model_id="tiny", architecture="gpt2", parameters=samples)
        sent = await world.send("PUT", "/v1/me/model", site, SiteModel(model=card, private_samples=samples))
        assert sent.status_code == 204
    assert (await world.view()).sites[0].private_samples == 20
    assert (await world.event_kinds()).count("site.model") == 2


async def test_an_artifact_is_on_the_disk_before_it_is_acknowledged(
    state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First all its bytes, then its name, then the folders above: a power cut never leaves a name without bytes."""
    root = state_dir / "objects"
    store = ArtifactStore.open(None, state_dir)
    synced: list[tuple[str, int]] = []

    def record(handle: int) -> None:
        where = Path(f"/proc/self/fd/{handle}").resolve()
        size = os.fstat(handle).st_size if where.is_file() else 0
        synced.append((str(where.relative_to(root)), size))

    async def pieces() -> AsyncIterator[bytes]:
        yield DATA

    monkeypatch.setattr(os, "fsync", record)
    digest = await store.put(DATA)
    draft, *folders = synced
    assert draft[0].startswith("incoming/")
    assert draft[1] == len(DATA)
    assert [name for name, _ in folders] == [f"artifacts/{digest[:2]}", ".", "artifacts"]
    synced.clear()
    assert await store.put_stream(digest, pieces()) == len(DATA)
    assert [(name.split("/")[0], size) for name, size in synced] == [("incoming", len(DATA)), ("artifacts", 0)]
    assert await store.get(digest) == DATA
