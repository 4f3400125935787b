"""Nothing that was acknowledged is lost: not with Redis, not with the process, not between replicas."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil  # type: ignore[import-untyped] # its stubs are another package
import pytest
import redis

from coordinator_servers import Stages, Worlds, settings_for, until_distilling
from coordinator_world import TOKENS, World, config
from fedmkt.protocol import Health, Heartbeat, HeartbeatReply
from fedmkt_coordinator import rounds
from fedmkt_coordinator.embedded_redis import EmbeddedRedis, FolderInUse
from fedmkt_coordinator.queue import JOBS
from real_servers import RedisProcess

pytestmark = [pytest.mark.anyio, pytest.mark.services]


# ------------------------------------------------------------------------------------------------ Redis


def in_stream(server: RedisProcess) -> list[str]:
    with redis.Redis.from_url(server.url, decode_responses=True) as client:
        return [fields["job_id"] for _, fields in client.xrange(JOBS)]


async def test_after_a_flush_the_sweep_adds_what_waits_and_nothing_else(
    distilling: World, redis_server: RedisProcess
) -> None:
    world = distilling
    await world.tick()
    (waiting,) = await world.queued()
    assert in_stream(redis_server)[-1] == waiting
    redis_server.flush()
    assert in_stream(redis_server) == []
    await world.tick()
    await world.tick()
    assert in_stream(redis_server) == [waiting]
    await world.distill()
    redis_server.flush()
    await world.tick()
    assert in_stream(redis_server) == []


async def test_a_whole_round_without_redis(worlds: Worlds, own_redis: RedisProcess, state_dir: Path) -> None:
    world = await worlds.open(settings_for(state_dir, own_redis.url))
    own_redis.stop()
    await world.ready()
    north = world.sites["north"]
    waiting = asyncio.create_task(world.task(north, wait_s=20))
    await world.request_rounds()
    async with asyncio.timeout(10):
        assert (await waiting)["kind"] == "train_and_upload"
    await world.play_round()
    assert (await world.round()).state == "completed"
    ready = await world.ask(Health, "GET", "/readyz", None)
    assert ready.status == "ok"
    assert "Error" in ready.checks["redis"]
    await world.request_rounds()
    for site in world.sites.values():
        await world.upload(site, await world.round(2))
    own_redis.start()
    await world.tick()
    assert in_stream(own_redis) == await world.queued()


async def test_the_embedded_redis_keeps_its_address_and_comes_back(state_dir: Path) -> None:
    first = EmbeddedRedis(state_dir)
    await first.start()
    url = first.url
    with redis.Redis.from_url(url) as client:
        assert client.info()["redis_version"].startswith("6.2")
        client.set("kept", "yes")
    child = psutil.Process(first.pid)
    assert url.split(":")[2].split("@")[0] not in " ".join(child.cmdline())
    with pytest.raises(FolderInUse, match="FEDMKT_STATE_DIR"):
        await EmbeddedRedis(state_dir, patience_s=0.1).start()
    child.kill()
    for _ in range(100):
        if first.ended:
            break
        await asyncio.sleep(0.02)
    await first.revive()
    with redis.Redis.from_url(url) as client:
        assert client.get("kept") == b"yes"
    await first.stop()
    second = EmbeddedRedis(state_dir)
    await second.start()
    assert second.url == url
    await second.stop()
    assert {path.name: oct(path.stat().st_mode & 0o077) for path in secrets_of(state_dir)} == {
        "address.json": "0o0",
        "redis.conf": "0o0",
    }


async def test_the_embedded_redis_starts_in_a_folder_named_from_here(
    state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(state_dir)
    server = EmbeddedRedis(Path("fedmkt-state") / "redis")
    await server.start()
    with redis.Redis.from_url(server.url) as client:
        assert client.ping()
    await server.stop()
    assert (state_dir / "fedmkt-state" / "redis" / "redis.log").is_file()


def secrets_of(folder: Path) -> Iterator[Path]:
    return (path for path in folder.iterdir() if path.suffix in (".json", ".conf"))


# ------------------------------------------------------------------------------------------------ restarts, replicas


async def test_a_round_goes_on_in_a_coordinator_that_was_started_again(
    worlds: Worlds, redis_server: RedisProcess, state_dir: Path
) -> None:
    settings = settings_for(state_dir, redis_server.url)
    world = await worlds.open(settings)
    await world.ready()
    await world.request_rounds()
    view = await world.round()
    receipt = await world.upload(world.sites["north"], view)
    again = await worlds.open(settings)
    again.federation_id, again.sites = world.federation_id, world.sites
    assert await again.upload(world.sites["north"], view) == receipt
    await again.upload(world.sites["south"], view)
    await again.distill()
    for site in again.sites.values():
        await again.report(site, view)
    assert (await world.round()).state == "completed"


async def test_a_coordinator_that_was_away_does_not_call_a_worker_silent(distilling: World) -> None:
    """It heard no heartbeat because it was down: the worker gets a whole lease from its return to say something."""
    world = distilling
    job, _ = await world.take_distill()
    world.clock.move(60)
    keeper = world.app.state.keeper
    looking = asyncio.create_task(keeper.run())
    await asyncio.sleep(0)
    keeper.stop()
    await looking
    assert await world.queued() == []
    beat = Heartbeat(attempt=job.attempt)
    reply = await world.ask(HeartbeatReply, "POST", f"/v1/jobs/{job.job_id}/heartbeat", "worker", beat)
    assert (reply.lease_expires_at - world.clock.now).total_seconds() == 30


async def test_a_coordinator_that_looks_more_rarely_than_leases_last_still_ends_them(
    stages: Stages, worlds: Worlds, state_dir: Path, redis_server: RedisProcess
) -> None:
    await stages.open(until_distilling, worlds, state_dir, redis_server.url)
    rare = settings_for(state_dir, redis_server.url, lease_s=0.1, keeper_interval_s=0.3)
    world = await worlds.open(rare)
    (job_id,) = await world.queued()
    await world.claim(job_id)
    world.clock.move(1)
    looking = asyncio.create_task(world.app.state.keeper.run())
    for _ in range(400):
        if await world.queued() == [job_id]:
            break
        await asyncio.sleep(0.05)
    assert await world.queued() == [job_id]
    world.app.state.keeper.stop()
    await looking


async def test_replicas_on_postgresql_commit_each_step_once(
    worlds: Worlds, redis_server: RedisProcess, postgres_url: str, state_dir: Path
) -> None:
    shared = {"database_url": postgres_url, "artifacts_url": (state_dir / "shared").as_uri()}
    (state_dir / "shared").mkdir()
    replicas = [
        await worlds.open(settings_for(state_dir / name, redis_server.url, **shared)) for name in ("one", "two")
    ]
    one, two = replicas
    await one.ready()
    two.federation_id, two.sites = one.federation_id, one.sites
    await one.request_rounds(2)
    view = await one.round()
    blobs = {name: one.blob(site, view) for name, site in one.sites.items()}
    await asyncio.gather(
        *(each.upload(site, view, blobs[name]) for each in replicas for name, site in one.sites.items()),
        *(each.tick() for each in replicas for _ in range(3)),
    )
    assert (await two.round()).state == "distilling"
    job, _ = await two.take_distill()
    result = await one.result(1)
    await asyncio.gather(*(each.complete(job, result) for each in replicas for _ in range(2)))
    await asyncio.gather(*(each.report(site, view) for each in replicas for site in one.sites.values()))
    assert [(await one.round(number)).state for number in (1, 2)] == ["completed", "collecting"]
    states = [kind for kind in await two.event_kinds() if kind == "round.state"]
    assert len(states) == 5
    kinds = await one.event_kinds()
    assert [kinds.count(kind) for kind in ("knowledge.accepted", "site.applied", "adapter.promoted")] == [2, 2, 1]


async def test_many_at_once_begin_one_round(
    worlds: Worlds, redis_server: RedisProcess, postgres_url: str, state_dir: Path
) -> None:
    settings = settings_for(state_dir, redis_server.url, database_url=postgres_url)
    world = await worlds.open(settings)
    await world.ready(config(schedule={"quorum": 2, "collect_timeout_s": 100}))
    async with world.context.store.write() as tx:
        await tx.set_rounds_requested(await tx.federation(world.federation_id), 3)

    async def advance() -> None:
        async with world.context.store.write() as tx:
            await rounds.advance(tx, world.federation_id)

    await asyncio.gather(*(advance() for _ in range(8)))
    async with world.context.store.read() as tx:
        assert await tx.rounds_begun(world.federation_id) == 1


# ------------------------------------------------------------------------------------------------ the process


class Running:
    """`python -m fedmkt_coordinator` with all its defaults but the folder and the port."""

    def __init__(self, state_dir: Path) -> None:
        self.log = state_dir.with_suffix(".log")
        command = [sys.executable, "-m", "fedmkt_coordinator", "run", "--state-dir", str(state_dir), "--port", "0"]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("FEDMKT_")}
        tokens = {f"FEDMKT_{role.upper()}_TOKEN": token for role, token in TOKENS.items()}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env={**environment, **tokens})

    def url(self) -> str:
        for _ in range(400):
            for line in self.log.read_text().splitlines():
                event = json.loads(line)["event"]
                if "running on" in event:
                    return str(event.split("running on ")[1].split(" ")[0])
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)
        raise AssertionError(self.log.read_text())


def test_the_process_serves_ends_in_order_and_takes_its_redis_along(state_dir: Path) -> None:
    folder = state_dir / "state"
    running = Running(folder)
    try:
        url = running.url()
        with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {TOKENS['operator']}"}) as client:
            assert client.get("/readyz").json()["checks"]["redis"] == "ok"
            made = client.post("/v1/federations", json=config().model_dump(mode="json")).json()
            stream = client.stream("GET", f"/v1/federations/{made['federation_id']}/events/stream", timeout=20)
            (child,) = psutil.Process(running.process.pid).children()
            with stream as response:
                assert next(response.iter_lines()).startswith("event:")
                running.process.send_signal(signal.SIGTERM)
                assert running.process.wait(timeout=15) == 0
        assert not child.is_running()
        assert "coordinator.stopped" in running.log.read_text()
    finally:
        running.process.kill()
        running.process.wait()
    assert (folder.stat().st_mode & 0o777, (folder / "fedmkt.sqlite").stat().st_mode & 0o777) == (0o700, 0o600)


def test_a_killed_coordinator_leaves_no_redis_and_starts_again_with_its_federations(state_dir: Path) -> None:
    folder = state_dir / "state"
    first = Running(folder)
    try:
        with httpx.Client(base_url=first.url(), headers={"Authorization": f"Bearer {TOKENS['operator']}"}) as client:
            assert client.post("/v1/federations", json=config().model_dump(mode="json")).status_code == 201
        (child,) = psutil.Process(first.process.pid).children()
    finally:
        first.process.kill()
        first.process.wait()
    child.wait(timeout=10)
    first.log.unlink()
    second = Running(folder)
    try:
        with httpx.Client(base_url=second.url(), headers={"Authorization": f"Bearer {TOKENS['viewer']}"}) as client:
            assert [each["config"]["name"] for each in client.get("/v1/federations").json()["items"]] == ["hospitals"]
    finally:
        second.process.terminate()
        assert second.process.wait(timeout=15) == 0


WITHOUT_TORCH = """
import importlib, pkgutil, sys
HEAVY = ("torch", "transformers", "peft", "accelerate")
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in HEAVY:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
import fedmkt_coordinator
for module in pkgutil.walk_packages(fedmkt_coordinator.__path__, "fedmkt_coordinator."):
    if not module.name.startswith("fedmkt_coordinator.migrations.") and not module.name.endswith("__main__"):
        importlib.import_module(module.name)
from fedmkt_coordinator.app import create_app
from fedmkt_coordinator.settings import Settings
create_app(Settings()).openapi()
assert not set(HEAVY) & set(sys.modules)
print("imported")
"""


def test_the_coordinator_is_imported_and_built_with_torch_absent_and_opens_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", WITHOUT_TORCH], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.returncode) == ("imported\n", 0), done.stderr
    assert list(tmp_path.iterdir()) == []
