"""The tokens of operators, viewers and workers, and where settings come from."""

import json
import os
import re
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from fastapi import FastAPI
from pydantic import SecretStr

from coordinator_servers import Worlds, settings_for
from coordinator_world import PUBLIC_SET, TOKENS, Clock, SiteUnderTest, World, config
from fedmkt.protocol import Enrolment, EnrolmentTokenRequest, TokenRequest
from fedmkt.public_set import PublicSet
from fedmkt.signing import public_hex, site_assertion
from fedmkt_coordinator.credentials import FILE, install, read_or_make
from fedmkt_coordinator.settings import Settings, read_settings
from fedmkt_coordinator.store import Store
from real_servers import RedisProcess

pytestmark = pytest.mark.anyio
services = pytest.mark.services


async def accepted(store: Store, *tokens: str) -> list[str | None]:
    from fedmkt_coordinator.ids import secret_hash

    async with store.read() as tx:
        found = [await tx.credential(secret_hash(token)) for token in tokens]
    return [row.role if row else None for row in found]


async def test_tokens_are_made_once_and_only_their_hashes_are_stored(store: Store, state_dir: Path) -> None:
    settings = Settings(state_dir=state_dir)
    await install(store, settings)
    made = read_or_make(state_dir)
    await install(store, settings)
    assert read_or_make(state_dir) == made
    assert await accepted(store, made.operator, made.viewer, made.worker) == ["operator", "viewer", "worker"]
    assert stat.S_IMODE((state_dir / FILE).stat().st_mode) == 0o600
    assert not any(made.operator.encode() in content for content in database_files(state_dir))


def database_files(state_dir: Path) -> list[bytes]:
    return [path.read_bytes() for path in state_dir.glob("*.sqlite*")]


async def test_a_token_that_was_replaced_stops_working(store: Store, state_dir: Path) -> None:
    await install(store, Settings(state_dir=state_dir))
    made = read_or_make(state_dir)
    replaced = made.model_copy(update={"viewer": "f" * 64})
    (state_dir / FILE).write_text(json.dumps(replaced.model_dump()))
    await install(store, Settings(state_dir=state_dir, operator_token=SecretStr("e" * 64)))
    assert await accepted(store, made.operator, made.viewer, made.worker) == [None, None, "worker"]
    assert await accepted(store, "e" * 64, "f" * 64) == ["operator", "viewer"]
    await install(store, Settings(state_dir=state_dir))
    assert await accepted(store, "e" * 64, made.operator) == [None, "operator"]


async def test_installations_on_one_database_keep_their_own_tokens(store: Store, state_dir: Path) -> None:
    folders = [state_dir / "one", state_dir / "two"]
    for folder in folders:
        await install(store, Settings(state_dir=folder))
    tokens = [read_or_make(folder).operator for folder in folders]
    assert tokens[0] != tokens[1]
    assert await accepted(store, *tokens) == ["operator", "operator"]


def test_settings_come_from_variables_and_from_a_folder_of_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fedmkt_worker_token").write_text("w" * 64)
    monkeypatch.setenv("FEDMKT_SECRETS_DIR", str(tmp_path))
    monkeypatch.setenv("FEDMKT_LEASE_S", "7")
    settings = read_settings(port=9000)
    assert (settings.port, settings.lease_s) == (9000, 7)
    assert settings.worker_token is not None
    assert settings.worker_token.get_secret_value() == "w" * 64
    assert "w" * 64 not in repr(settings)


@services
async def test_tokens_are_never_logged(
    worlds: Worlds, state_dir: Path, redis_server: RedisProcess, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    world = await worlds.open(settings_for(state_dir, redis_server.url))
    await world.create()
    site = await world.enrol("north")
    await world.refused("role.forbidden", "GET", "/v1/federations", site)
    await world.refused("token.invalid", "GET", "/v1/me", "0" * 64)
    text = " ".join(str(vars(record)) for record in caplog.records if record.name.startswith("fedmkt"))
    assert "request.refused" in text
    for secret in (*TOKENS.values(), site.token, "0" * 64, "secret-of-tests"):
        assert secret not in text


# ------------------------------------------------------------------------------------------------ a real process's log


class RealClock(Clock):
    def __call__(self) -> datetime:
        return datetime.now(UTC)


class RemoteWorld(World):
    """The same helpers against a process, of which only the API is seen."""

    async def queued(self) -> list[str]:
        answer = await self.send("GET", f"/v1/federations/{self.federation_id}/events?limit=200", "viewer")
        states = {
            each["data"]["job_id"]: each["data"]["state"]
            for each in answer.json()["items"]
            if each["kind"] == "job.state"
        }
        return [job_id for job_id, state in states.items() if state == "queued"]


@contextmanager
def a_process(folder: Path, style: str) -> Iterator[tuple[str, Path]]:
    """Address and log of `fedmkt coordinator run` at the level that tells most."""
    log = folder / "log"
    command = [sys.executable, "-m", "fedmkt_coordinator", "run", "--state-dir", str(folder / "state"), "--port", "0"]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FEDMKT_")}
    tokens = {f"FEDMKT_{role.upper()}_TOKEN": token for role, token in TOKENS.items()}
    with log.open("wb") as file:
        options = ["--log-level", "DEBUG", "--log-style", style]
        process = subprocess.Popen([*command, *options], stdout=file, stderr=file, env={**kept, **tokens})
    try:
        yield _address(process, log), log
    finally:
        process.terminate()
        process.wait(30)


def _address(process: "subprocess.Popen[bytes]", log: Path) -> str:
    for _ in range(1200):
        found = re.search(r"running on (http://[0-9.:]+)", log.read_text())
        if found:
            return found[1]
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)
    raise AssertionError(log.read_text())


async def everything(url: str) -> list[str]:
    """A whole round, and every way to be refused that has a secret in it; returns the secrets."""
    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        world = RemoteWorld(FastAPI(), http, RealClock(), config=config())
        world.public_set = PublicSet.from_jsonl(PUBLIC_SET)
        await world.create()
        await world.put_public_set()
        await world.register_llm()
        invited = await world.send("POST", f"/v1/federations/{world.federation_id}/enrolment-tokens", "operator", NORTH)
        for name in world.config.sites:
            await world.describe(await world.enrol(name))
        await world.build_maps()
        await world.request_rounds()
        await world.play_round()
        north = world.sites["north"]
        assertion = site_assertion(north.key, north.site_id, datetime.now(UTC))
        once = TokenRequest(assertion=assertion)
        assert (await world.send("POST", "/v1/token", None, once)).status_code == 200
        await world.refused("assertion.used", "POST", "/v1/token", None, once)
        await world.refused("role.forbidden", "GET", "/v1/federations", north)
        await world.refused("token.invalid", "GET", "/v1/me", "c0ffee" * 10)
        await world.refused("enrolment.refused", "POST", "/v1/enrol", None, enrolment(invited.json()["token"], north))
        wrong = b'{"token": "f00d1234f00d1234f00d1234f00d1234", "public_key": 7}'
        typed = {"headers": {"Content-Type": "application/json"}}
        await world.refused("request.malformed", "POST", "/v1/enrol", None, wrong, **typed)
        queue = (await world.send("GET", "/v1/jobs/queue", "worker")).json()["redis_url"]
        await world.send("POST", f"/v1/federations/{world.federation_id}/sites/north/revoke")
        await world.refused("site.revoked", "GET", "/v1/me", north)
        private = [site.key.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption()).hex() for site in
                   world.sites.values()]  # fmt: skip
        password = urlsplit(queue).password
        return [
            *TOKENS.values(),
            *(site.token for site in world.sites.values()),
            *private,
            invited.json()["token"],
            assertion,
            "c0ffee" * 10,
            "f00d1234",
            *([password] if password else []),
            "What is 3 plus 3?",
            " It is 6, I think.",
        ]


NORTH = EnrolmentTokenRequest(site="north")


def enrolment(token: str, site: SiteUnderTest) -> Enrolment:
    return Enrolment(token=token, public_key=public_hex(site.key))


@services
@pytest.mark.parametrize("style", ["json", "text"])
async def test_the_log_of_a_whole_round_at_debug_holds_no_secret_and_no_text(state_dir: Path, style: str) -> None:
    with a_process(state_dir, style) as (url, log):
        secrets = await everything(url)
    lines = log.read_text().splitlines()
    with sqlite3.connect(state_dir / "state" / "fedmkt.sqlite") as database:
        secrets += [row[0] for row in database.execute("SELECT value FROM secrets")]
    assert len(secrets) >= 15
    for happened in ("round.state", "site.revoked", "request.refused", "coordinator.stopped"):
        assert any(happened in line for line in lines), happened
    leaks = [(secret[:12], line[:300]) for line in lines for secret in secrets if secret in line]
    assert not leaks
