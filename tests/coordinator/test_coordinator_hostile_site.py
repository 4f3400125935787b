"""A site that has enrolled and means harm: everything it may send, and that nothing comes of it.

What it may teach the LLM is in tests/test_poisoned_site.py.
"""

import asyncio
import base64
import hashlib
import json
import resource
from datetime import timedelta
from pathlib import Path
from typing import Any

import jwt
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from coordinator_servers import Worlds, settings_for
from coordinator_world import CARD, TOKENS, SiteUnderTest, World, config, make_knowledge
from fedmkt.codec import MAGIC, VERSION, write_frame
from fedmkt.knowledge import Knowledge, encode, limits_for
from fedmkt.protocol import (
    CHUNK_BYTES,
    Enrolment,
    EnrolmentTokenRequest,
    KnowledgeConfig,
    Manifest,
    SiteModel,
    TokenRequest,
)
from fedmkt.signing import SMALL_ORDER, new_key, public_hex, sign_manifest, site_assertion
from fedmkt_coordinator.keys import AUDIENCE, ISSUER
from fedmkt_coordinator.store import Store
from real_servers import RedisProcess

pytestmark = [pytest.mark.anyio, pytest.mark.services]


async def refused_upload(world: World, site: SiteUnderTest, blob: bytes) -> str:
    """The code with which a whole upload of these bytes is refused."""
    manifest = world.manifest(site, await world.round(), blob)
    state = await world.send_chunks(site, manifest, blob)
    answer = await world.send("POST", f"/v1/uploads/{state.upload_id}/complete", site)
    assert answer.status_code >= 400, "it was accepted"
    return str(answer.json()["code"])


async def counts_nothing(world: World) -> None:
    """No upload was counted, and what was refused left no chunk behind."""
    await world.tick()
    assert {part.state for part in (await world.round()).sites} <= {"expected", "uploading"}
    assert not list((world.context.settings.state_dir / "objects" / "uploads").rglob("0*"))


# ------------------------------------------------------------------------------------------------ manifests


async def test_a_manifest_replayed_by_another_site_is_refused(collecting: World) -> None:
    world, north, south = collecting, collecting.sites["north"], collecting.sites["south"]
    view = await world.round()
    theirs = world.manifest(north, view, world.blob(north, view))
    await world.refused("signature.invalid", "POST", "/v1/uploads", south, theirs)


async def test_a_manifest_signed_by_another_key_is_refused(collecting: World) -> None:
    world, north = collecting, collecting.sites["north"]
    view = await world.round()
    forged = sign_manifest(new_key(), "knowledge", view.round_id, world.blob(north, view))
    await world.refused("signature.invalid", "POST", "/v1/uploads", north, forged)


@pytest.mark.parametrize("field", ["digest", "size_bytes", "round_id", "kind"])
async def test_a_manifest_that_was_changed_after_signing_is_refused(collecting: World, field: str) -> None:
    world, north = collecting, collecting.sites["north"]
    view = await world.round()
    signed = world.manifest(north, view, world.blob(north, view))
    other = {
        "digest": "ab" * 32,
        "size_bytes": signed.size_bytes - 1,
        "round_id": "round_" + "0" * 20,
        "kind": "adapter",
    }
    changed = signed.model_copy(update={field: other[field]})
    await world.refused("signature.invalid", "POST", "/v1/uploads", north, changed)


async def test_a_stolen_access_token_is_no_use_without_the_key(collecting: World) -> None:
    """Who has a site's token for ten minutes can ask what it may ask, and can upload nothing in its name."""
    world, north, south = collecting, collecting.sites["north"], collecting.sites["south"]
    view = await world.round()
    thief = SiteUnderTest("north", south.words, south.key, north.site_id, north.token)
    for site in (thief, south):  # signed with the thief's own key, and the victim's blob
        manifest = sign_manifest(site.key, "knowledge", view.round_id, world.blob(north, view))
        await world.refused("signature.invalid", "POST", "/v1/uploads", north.token, manifest)
    body = TokenRequest(assertion=site_assertion(south.key, north.site_id, world.clock()))
    await world.refused("assertion.refused", "POST", "/v1/token", None, body)


async def test_a_manifest_of_an_earlier_round_opens_nothing_in_a_later_one(collecting: World) -> None:
    world, north = collecting, collecting.sites["north"]
    first = await world.round()
    blob = world.blob(north, first)
    manifest = world.manifest(north, first, blob)
    await world.play_round()
    await world.request_rounds()
    second = await world.round(2)
    assert second.state == "collecting"
    state = (await world.send("POST", "/v1/uploads", north, manifest)).json()
    assert state["complete"], "the same announcement is answered with what became of it, and changes nothing"
    assert {part.state for part in (await world.round(2)).sites} == {"expected"}
    moved = manifest.model_copy(update={"round_id": second.round_id})
    await world.refused("signature.invalid", "POST", "/v1/uploads", north, moved)


async def test_knowledge_of_an_earlier_round_is_refused_in_a_later_one(collecting: World) -> None:
    world, north = collecting, collecting.sites["north"]
    first = await world.round()
    blob = world.blob(north, first)
    await world.play_round()
    await world.request_rounds()
    again = world.manifest(north, await world.round(2), blob)
    state = await world.send_chunks(north, again, blob)
    await world.refused("knowledge.wrong_round", "POST", f"/v1/uploads/{state.upload_id}/complete", north)
    assert {part.state for part in (await world.round(2)).sites} == {"expected"}


@pytest.mark.parametrize("method_and_path", [("GET", ""), ("PUT", "/chunks/0"), ("DELETE", ""), ("POST", "/complete")])
async def test_another_sites_upload_does_not_exist(collecting: World, method_and_path: tuple[str, str]) -> None:
    """Also within one federation, with the very bytes that were announced."""
    world, north, south = collecting, collecting.sites["north"], collecting.sites["south"]
    view = await world.round()
    blob = world.blob(north, view)
    state = (await world.send("POST", "/v1/uploads", north, world.manifest(north, view, blob))).json()
    method, rest = method_and_path
    body = blob[:CHUNK_BYTES] if method == "PUT" else None
    await world.refused("upload.unknown", method, f"/v1/uploads/{state['upload_id']}{rest}", south, body)
    assert (await world.send("GET", f"/v1/uploads/{state['upload_id']}", north)).json()["missing"] == [0]


# ------------------------------------------------------------------------------------------------ bombs


def framed(*frames: bytes) -> bytes:
    return MAGIC + bytes([VERSION]) + b"".join(len(frame).to_bytes(4, "little") + frame for frame in frames)


def zstd_that_states(size: int) -> bytes:
    """A zstd frame of one empty block whose header promises `size` bytes."""
    return b"\x28\xb5\x2f\xfd\xe0" + size.to_bytes(8, "little") + b"\x01\x00\x00"


def zeros(size: int) -> bytes:
    """A frame of our own form with one column of zeros: a ten-thousandth of its size."""
    return write_frame({"levels.0": np.zeros(size, np.uint8)})[4:]


def index_that_announces(knowledge: Knowledge, **counts: int) -> bytes:
    """The honest index with other counts, and no rows behind it."""
    packed = encode(knowledge)
    start = len(MAGIC) + 1
    length = int.from_bytes(packed[start : start + 4], "little")
    import safetensors.numpy
    import zstandard

    columns = safetensors.numpy.load(zstandard.ZstdDecompressor().decompress(packed[start + 4 : start + 4 + length]))
    index = json.loads(columns["index"].tobytes()) | counts
    columns["index"] = np.frombuffer(json.dumps(index).encode(), np.uint8)
    return write_frame(columns)[4:]


BOMBS = {
    "an index that states a terabyte": lambda honest: framed(zstd_that_states(1 << 40)),
    "a block that states a terabyte": lambda honest: framed(
        index_that_announces(honest), zstd_that_states(1 << 40)
    ),
    "an index of zeros": lambda honest: framed(zeros(100 << 20)),
    "a block of zeros": lambda honest: framed(index_that_announces(honest), zeros(500 << 20)),
    "a thousand blocks of zeros": lambda honest: framed(index_that_announces(honest), *[zeros(30 << 20)] * 1000),
    "two hundred million entries": lambda honest: framed(
        index_that_announces(honest, entries=200_000_000), *[zeros(30 << 20)] * 1000
    ),
    "more rows than the texts have": lambda honest: framed(index_that_announces(honest, rows=10_000_000)),
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
async def test_a_decompression_bomb_is_refused_before_memory_is_asked_for(collecting: World, bomb: str) -> None:
    world, north = collecting, collecting.sites["north"]
    view = await world.round()
    header = {"federation_id": world.federation_id, "round_number": view.number, "slice_index": view.slice_index}
    honest = make_knowledge(world.public_set, world.slice_of(view.slice_index), north.words, world.config, **header)
    blob = BOMBS[bomb](honest)
    assert len(blob) < 8 << 20
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    code = await refused_upload(world, north, blob)
    assert code in ("knowledge.bomb", "knowledge.too_large", "knowledge.malformed"), code
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 200 << 10
    await counts_nothing(world)


async def test_a_receiver_accepts_no_more_rows_than_its_texts_can_have(world: World) -> None:
    limits = limits_for(world.public_set, KnowledgeConfig(max_tokens=100, top_k=8))
    assert (limits.samples, limits.rows, limits.entries) == (12, 1200, 9600)


# ------------------------------------------------------------------------------------------------ vocabularies


def tokenizer_with(**changes: Any) -> bytes:
    model = {"type": "BPE", "vocab": {"a": 0}, "merges": [], **changes.pop("model", {})}
    content = {"version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": None, "model": model}
    return json.dumps({"version": 1, "names": {}, "tokenizer": {**content, **changes}}).encode()


HARMFUL_VOCABULARIES = [
    (b"[" * 200_000, "nested too deeply"),
    (b'{"a":' * 100_000, "nested too deeply as objects"),
    (b"\x00" * 1000, "zeros"),
    (b"{}", "empty"),
    (tokenizer_with(model={"vocab": {"a": 2**31}}), "an id beyond any vocabulary"),
    (tokenizer_with(model={"vocab": {"a": -1}}), "a negative id"),
    (tokenizer_with(model={"vocab": {"a" * 10_000_000: 0}}), "one huge token"),
    (tokenizer_with(model={"vocab": {f"t{n}": n * 5000 for n in range(1000)}}), "a table full of holes"),
    (
        tokenizer_with(
            normalizer={
                "type": "Sequence",
                "normalizers": [
                    {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000} for _ in range(10)
                ],
            }
        ),
        "a normalizer that makes texts grow",
    ),
    (
        tokenizer_with(
            pre_tokenizer={
                "type": "Split",
                "pattern": {"Regex": "(a+)+" * 5000},
                "behavior": "Isolated",
                "invert": False,
            }
        ),
        "a pattern without end",
    ),
]


async def test_a_vocabulary_made_to_do_harm_is_refused(world: World) -> None:
    await world.create()
    site = await world.enrol("north")
    for data, what in HARMFUL_VOCABULARIES:
        answer = await world.send("PUT", "/v1/me/vocabulary", site, data)
        assert 400 <= answer.status_code < 500, (what, answer.text)
        assert answer.json()["code"].startswith("vocabulary."), (what, answer.text)
    assert (await world.view()).sites[0].vocabulary is None


async def test_a_vocabulary_over_which_the_library_aborts_ends_a_process_of_its_own(world: World) -> None:
    """The table of a compiled normalizer whose sizes are the largest that fit: the library ends its process."""
    await world.create()
    site = await world.enrol("north")
    table = base64.b64encode(b"\xff" * 13).decode()
    deadly = tokenizer_with(normalizer={"type": "Precompiled", "precompiled_charsmap": table})
    detail = await world.refused("vocabulary.fatal", "PUT", "/v1/me/vocabulary", site, deadly)
    assert "ended with SIGABRT" in detail
    await world.describe(site)
    assert (await world.view()).sites[0].vocabulary == site.words.fingerprint


async def test_bytes_that_were_read_before_are_not_read_again(world: World) -> None:
    await world.create()
    site = await world.enrol("north")
    await world.describe(site)
    world.context.vocabularies._turn = asyncio.Semaphore(0)  # nothing is read from here on
    another = await world.enrol("south")
    another.words = site.words
    async with asyncio.timeout(60):
        await world.describe(another)
    assert {each.vocabulary for each in (await world.view()).sites} == {site.words.fingerprint}


async def test_an_oversized_vocabulary_is_refused_before_it_is_read(world: World) -> None:
    await world.create()
    site = await world.enrol("north")
    headers = {"Content-Length": str((64 << 20) + 1)}
    await world.refused("body.too_large", "PUT", "/v1/me/vocabulary", site, b"", headers=headers)


# ------------------------------------------------------------------------------------------------ names


NAMES = ("north\x00", "no\x1b[31mrth", "north\n", "nörth", "north\u202e", "ｎorth", "../north", "North", " north", "")


async def test_names_are_plain(world: World) -> None:
    headers = {"Authorization": f"Bearer {TOKENS['operator']}"}
    for name in NAMES:
        made = {**config().model_dump(mode="json"), "sites": [name, "south"]}
        answer = await world.http.post("/v1/federations", json=made, headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (422, "request.malformed"), repr(name)


async def test_what_a_site_says_of_itself_steers_no_terminal(world: World) -> None:
    await world.create()
    site = await world.enrol("north")
    body = SiteModel(model=CARD, private_samples=1).model_dump(mode="json")
    headers = {"Authorization": f"Bearer {site.token}"}
    for model_id in ("a\x00b", "\x1b[2Jgone", "line\nbreak", "right\u202eleft", "bell\x07"):
        body["model"]["model_id"] = model_id
        answer = await world.http.put("/v1/me/model", json=body, headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (422, "request.malformed"), repr(model_id)
        assert "\x1b" not in answer.text


ADDRESSES = (
    "/v1/federations/%00",
    "/v1/federations/fed_%00/rounds",
    "/v1/federations?cursor=%00",
    "/v1/rounds/%1b%5b31m",
    "/v1/uploads/upload_%0d%0a",
)


async def test_control_characters_in_an_address_are_refused_before_any_database_sees_them(
    database_url: str | None, worlds: Worlds, state_dir: Path, redis_server: RedisProcess
) -> None:
    world = await worlds.open(settings_for(state_dir, redis_server.url, database_url=database_url))
    for path in ADDRESSES:
        detail = await world.refused("request.control_character", "GET", path)
        assert detail.startswith("the address holds the control character 0x")


async def test_half_a_character_in_a_body_is_malformed(world: World) -> None:
    await world.create()
    site = await world.enrol("north")
    body = SiteModel(model=CARD, private_samples=1).model_dump_json().replace("tiny", "\\ud800").encode()
    headers = {"Content-Type": "application/json"}
    await world.refused("request.malformed", "PUT", "/v1/me/model", site, body, headers=headers)


# ------------------------------------------------------------------------------------------------ tokens


def claims(world: World, site: SiteUnderTest, **changes: Any) -> dict[str, Any]:
    now = world.clock()
    made = {"iss": ISSUER, "aud": AUDIENCE, "sub": site.site_id, "iat": now, "exp": now + timedelta(minutes=5)}
    return {name: value for name, value in {**made, **changes}.items() if value is not None}


async def test_access_tokens_that_a_site_makes_itself_are_refused(world: World) -> None:
    """No algorithm, another algorithm, the coordinator's public key taken for a secret, another key, another kind."""
    await world.create()
    site = await world.enrol("north")
    coordinator = (await world.send("GET", "/v1/keys", None)).json()["public_keys"][0]
    header = jwt.api_jws.base64url_encode(json.dumps({"alg": "none", "typ": "JWT"}).encode()).decode()
    payload = site.token.split(".")[1]
    forged = [
        jwt.encode(claims(world, site), "", algorithm="none"),
        f"{header}.{payload}.",
        jwt.encode(claims(world, site), coordinator, algorithm="HS256"),
        jwt.encode(claims(world, site), bytes.fromhex(coordinator), algorithm="HS256"),
        jwt.encode(claims(world, site), site.key, algorithm="EdDSA"),
        site_assertion(site.key, site.site_id, world.clock()),
        site.token[:-8] + "AAAAAAAA",
        f"{site.token.split('.')[0]}.{payload}.",
        "..",
        "a.b.c",
    ]
    for token in forged:
        await world.refused("token.invalid", "GET", "/v1/me", token)


async def test_the_coordinators_own_signature_is_not_enough(world: World) -> None:
    """What the coordinator signed for another purpose is no access token."""
    await world.create()
    site = await world.enrol("north")
    private: Ed25519PrivateKey = world.context.key._private
    other_purposes: list[dict[str, Any]] = [
        *({"aud": "fedmkt"}, {"aud": None}, {"iss": "somebody"}, {"iss": None}, {"sub": None}, {"exp": None}),
        *({"exp": 10**400}, {"exp": "soon"}, {"sub": 7}),
    ]
    for changes in other_purposes:
        token = jwt.encode(claims(world, site, **changes), private, algorithm="EdDSA")
        await world.refused("token.invalid", "GET", "/v1/me", token)
    sound = jwt.encode(claims(world, site), private, algorithm="EdDSA")
    assert (await world.send("GET", "/v1/me", sound)).status_code == 200


HARMFUL_CLAIMS: list[tuple[dict[str, Any], str]] = [
    ({"exp": 10**11}, "assertion.refused"),
    ({"exp": 10**400}, "assertion.refused"),
    ({"iat": 10**400}, "assertion.refused"),
    ({"iat": 10**11, "exp": 10**11 + 60}, "assertion.clock"),
    ({"exp": float("inf")}, "assertion.refused"),
    ({"exp": float("nan")}, "assertion.refused"),
    ({"iat": "0", "exp": "9"}, "assertion.clock"),
    ({"iat": [1]}, "assertion.refused"),
    ({"aud": "fedmkt-api"}, "assertion.refused"),
    ({"aud": ["fedmkt-api", "other"]}, "assertion.refused"),
    ({"jti": "a" * 101}, "assertion.refused"),
    ({"jti": "a\x00b"}, "assertion.refused"),
    ({"jti": "a\ud800b"}, "assertion.refused"),
    ({"jti": {"a": 1}}, "assertion.refused"),
    ({"iss": "site_\x00", "sub": "site_\x00"}, "assertion.refused"),
    ({"iss": ["site"]}, "assertion.refused"),
]


async def test_assertions_made_to_do_harm_are_refused(world: World) -> None:
    await world.create()
    site = await world.enrol("north")
    now = int(world.clock().timestamp())
    made = {"iss": site.site_id, "sub": site.site_id, "aud": "fedmkt", "jti": "a", "iat": now, "exp": now + 60}
    for changes, code in HARMFUL_CLAIMS:
        body = TokenRequest(assertion=signed({**made, **changes}, site.key))
        await world.refused(code, "POST", "/v1/token", None, body)
    assert (await world.send("POST", "/v1/token", None, TokenRequest(assertion=signed(made, site.key)))).is_success


def signed(made: dict[str, Any], key: Ed25519PrivateKey) -> str:
    """Any claims as a JWT, also those that a library would not write."""
    parts = ({"alg": "EdDSA", "typ": "JWT"}, made)
    content = ".".join(jwt.api_jws.base64url_encode(json.dumps(part).encode()).decode() for part in parts)
    return f"{content}.{jwt.api_jws.base64url_encode(key.sign(content.encode())).decode()}"


async def test_a_public_key_for_which_anybody_can_sign_is_refused(world: World) -> None:
    await world.create()
    path = f"/v1/federations/{world.federation_id}/enrolment-tokens"
    issued = await world.send("POST", path, "operator", EnrolmentTokenRequest(site="north"))
    for public_key in (*sorted(SMALL_ORDER), "01" + "0" * 60 + "80"):
        body = Enrolment(token=issued.json()["token"], public_key=public_key)
        await world.refused("enrolment.weak_key", "POST", "/v1/enrol", None, body)
    assert (await world.view()).sites[0].state == "awaited"
    good = Enrolment(token=issued.json()["token"], public_key=public_hex(new_key()))
    assert (await world.send("POST", "/v1/enrol", None, good)).status_code == 201


async def test_an_assertion_works_once_on_all_replicas_together(
    store: Store, database_url: str | None, worlds: Worlds, state_dir: Path, redis_server: RedisProcess
) -> None:
    settings = [settings_for(state_dir, redis_server.url, database_url=database_url)] * 3
    replicas = [await worlds.open(each) for each in settings]
    await replicas[0].create()
    site = await replicas[0].enrol("north")
    for _ in range(5):
        replicas[0].clock.move(1)
        body = TokenRequest(assertion=site_assertion(site.key, site.site_id, replicas[0].clock()))
        answers = await asyncio.gather(
            *(replicas[number % 3].send("POST", "/v1/token", None, body) for number in range(9))
        )
        assert sorted(answer.status_code for answer in answers) == [200, *[401] * 8]
        assert {answer.json()["code"] for answer in answers if answer.status_code == 401} == {"assertion.used"}


PRIME = 2**255 - 19


def doubled(x: int, y: int) -> tuple[int, int]:
    """A point of edwards25519 added to itself."""
    d = -121665 * pow(121666, -1, PRIME)
    product = d * x * x * y * y
    return 2 * x * y * pow(1 + product, -1, PRIME) % PRIME, (y * y + x * x) * pow(1 - product, -1, PRIME) % PRIME


def abscissa(y: int) -> int | None:
    """An x for which (x, y) lies on edwards25519."""
    d = -121665 * pow(121666, -1, PRIME)
    square = (y * y - 1) * pow(d * y * y + 1, -1, PRIME) % PRIME
    root = pow(square, (PRIME + 3) // 8, PRIME)
    for x in (root, root * pow(2, (PRIME - 1) // 4, PRIME) % PRIME):
        if x * x % PRIME == square:
            return x
    return None


def order_divides_eight(encoded: str) -> bool:
    y = (int.from_bytes(bytes.fromhex(encoded), "little") & (2**255 - 1)) % PRIME
    x = abscissa(y)
    assert x is not None, "no point at all"
    point = (x, y)
    for _ in range(3):
        point = doubled(*point)
    return point == (0, 1)


async def test_the_refused_keys_are_the_points_of_low_order() -> None:
    """All eight of them: two by two they differ in the sign of x only, which is not looked at."""
    assert all(order_divides_eight(each) for each in SMALL_ORDER)
    assert not order_divides_eight(public_hex(new_key()))
    assert len({(int.from_bytes(bytes.fromhex(each), "little") & (2**255 - 1)) % PRIME for each in SMALL_ORDER}) == 5


async def test_a_digest_that_is_no_digest_is_malformed(collecting: World) -> None:
    world, north = collecting, collecting.sites["north"]
    view = await world.round()
    honest = world.manifest(north, view, world.blob(north, view))
    for digest in ("../../../etc/passwd", "AB" * 32, hashlib.md5(b"").hexdigest(), "ab" * 32 + "\n"):
        body = json.dumps({**honest.model_dump(mode="json"), "digest": digest}).encode()
        headers = {"Content-Type": "application/json"}
        await world.refused("request.malformed", "POST", "/v1/uploads", north, body, headers=headers)
    assert isinstance(honest, Manifest)
