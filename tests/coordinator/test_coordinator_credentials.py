"""The tokens of operators, viewers and workers, and where settings come from."""

import json
import stat
from pathlib import Path

import pytest
from pydantic import SecretStr

from coordinator_servers import RedisProcess, Worlds, settings_for
from coordinator_world import TOKENS, Clock
from fedmkt_coordinator.credentials import FILE, install, read_or_make
from fedmkt_coordinator.settings import Settings, read_settings
from fedmkt_coordinator.store import Store

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
