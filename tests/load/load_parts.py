"""The parts of the load. Each plays one thing on a real coordinator, and says what it found as plain figures."""

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis

from fedmkt.protocol import CHUNK_BYTES
from load_http import Connection
from load_world import TOKENS, Coordinator, Federation, Refused, Site, ask, contender, coordinator, load_config, spread

Figures = dict[str, Any]
BARE_ETAG = '"0123456789abcdef"'
UPLOADERS = 64
KEPT_FILES = 40  # connections to the database that are kept for later (three files each), and to Redis
# The load speaks from one address and with one token for each role: the coordinator's own limits are not what is
# measured here (tests/coordinator/test_coordinator_rate_limits.py does that).
UNLIMITED = {"site_rate_per_s": 100_000, "staff_rate_per_s": 100_000, "address_rate_per_s": 100_000}
QUIET = {"log_level": "WARNING"}


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def milliseconds(values: Sequence[float]) -> Figures:
    return {"p50_ms": round(1e3 * percentile(values, 0.5), 1), "p99_ms": round(1e3 * percentile(values, 0.99), 1)}


async def timed(call: Awaitable[object], into: list[float]) -> None:
    began = time.perf_counter()
    await call
    into.append(time.perf_counter() - began)


def homogeneous(sites: Sequence[str]) -> Any:
    """Sites of this federation may send adapters: bytes that the coordinator hashes and keeps and does not open."""
    return load_config(sites).model_copy(update={"scenario": "homogeneous", "average_adapters": True})


# ------------------------------------------------------------------------------------------------ status polls


async def polls(folder: Path, *, requests: int = 4000, connections: int = 32, turns: int = 5) -> Figures:
    """Conditional reads of a federation, beside a bare FastAPI endpoint that compares a constant; turn by turn."""
    with coordinator(folder / "coordinator", **UNLIMITED, **QUIET) as server, contender("endpoint") as bare:
        await server.started()
        federation = Federation.of(server.url, load_config(["north", "south"]))
        await federation.set_up()
        path = f"/v1/federations/{federation.federation_id}"
        ours, theirs, waits = [], [], list[float]()
        for _ in range(turns):
            theirs.append(await _rate(bare.url, "/status", "", BARE_ETAG, requests, connections, []))
            ours.append(await _polled(server.url, path, requests, connections, waits))
        await federation.close()
    best = max(mine / other for mine, other in zip(ours, theirs, strict=True))
    middle = percentile([mine / other for mine, other in zip(ours, theirs, strict=True)], 0.5)
    return {
        "requests_per_s": round(max(ours)),
        "bare_requests_per_s": round(max(theirs)),
        "share_of_bare": round(middle, 2),
        "best_share_of_bare": round(best, 2),
        **milliseconds(waits),
    }


async def _polled(url: str, path: str, requests: int, connections: int, waits: list[float]) -> float:
    viewer = Connection(url, TOKENS["viewer"])
    etag = (await ask(viewer, "GET", path)).etag
    await viewer.close()
    return await _rate(url, path, TOKENS["viewer"], etag, requests, connections, waits)


async def _rate(
    url: str, path: str, token: str, etag: str, requests: int, connections: int, waits: list[float]
) -> float:
    """Answers a second; every one a 304, but for the few that a view's age makes fresh (FRESH_S)."""

    async def one(connection: Connection) -> None:
        head = connection.head("GET", path, None, {"If-None-Match": etag})
        for _ in range(requests // connections):
            began = time.perf_counter()
            answer = await connection.exchange(head)
            waits.append(time.perf_counter() - began)
            if answer.status == 200:
                head = connection.head("GET", path, None, {"If-None-Match": answer.etag})
            elif answer.status != 304:
                raise Refused(f"GET {path}: {answer.status} {answer.body[:300]!r}")

    callers = [Connection(url, token or None) for _ in range(connections)]
    began = time.perf_counter()
    await asyncio.gather(*(one(each) for each in callers))
    spent_s = time.perf_counter() - began
    for each in callers:
        await each.close()
    return requests // connections * connections / spent_s


# ------------------------------------------------------------------------------------------------ ingest


async def ingest(folder: Path, *, uploads: int = UPLOADERS, mib: int = 8, turns: int = 3) -> Figures:
    """Whole uploads (announce, chunks, complete, receipt), all at once, beside a bare server of the same bytes."""
    (folder / "bare").mkdir(parents=True)
    with (
        coordinator(folder / "coordinator", **UNLIMITED, **QUIET) as server,
        contender("ingest", str(folder / "bare")) as bare,
    ):
        await server.started()
        ours, theirs, waits = [], [], list[float]()
        our_cpu, their_cpu = [], list[float]()
        for turn in range(turns):
            names = [f"t{turn}s{number:03d}" for number in range(uploads)]
            config = homogeneous(names).model_copy(update={"name": f"ingest{turn}"})
            federation = Federation.of(server.url, config, first=turn == 0)
            await federation.set_up()
            await federation.request_rounds(1)
            round_id = (await federation.task(federation.sites[0]))["round_id"]
            blobs = [os.urandom(mib * CHUNK_BYTES) for _ in names]
            began = server.cpu_s, bare.cpu_s
            theirs.append(await _bare_uploads(bare.url, turn, blobs))
            ours.append(await _uploads(federation, round_id, blobs, waits))
            our_cpu.append(server.cpu_s - began[0])
            their_cpu.append(bare.cpu_s - began[1])
            await federation.close()
        rss_bytes = server.rss_bytes
    amount = uploads * mib
    shares = [other / mine for mine, other in zip(ours, theirs, strict=True)]
    return {
        "uploads_at_once": uploads,
        "upload_mib": mib,
        "mib_per_s": round(amount / min(ours), 1),
        "bare_mib_per_s": round(amount / min(theirs), 1),
        "share_of_bare": round(percentile(shares, 0.5), 2),
        "best_share_of_bare": round(max(shares), 2),
        "cpu_ms_per_mib": round(1e3 * min(our_cpu) / amount, 2),
        "bare_cpu_ms_per_mib": round(1e3 * min(their_cpu) / amount, 2),
        "rss_mib": round(rss_bytes / 2**20),
        **{f"upload_{name}": value for name, value in milliseconds(waits).items()},
    }


async def _uploads(federation: Federation, round_id: str, blobs: Sequence[bytes], waits: list[float]) -> float:
    async def one(pair: tuple[Site, bytes]) -> None:
        await timed(federation.upload(pair[0], round_id, pair[1], "adapter"), waits)

    began = time.perf_counter()
    await spread(zip(federation.sites, blobs, strict=True), one, len(blobs))
    return time.perf_counter() - began


async def _bare_uploads(url: str, turn: int, blobs: Sequence[bytes]) -> float:
    async def one(pair: tuple[int, bytes]) -> None:
        number, blob = pair
        connection, name = Connection(url), f"{turn}-{number}"
        for at in range(0, len(blob), CHUNK_BYTES):
            await ask(connection, "PUT", f"/{name}/{at // CHUNK_BYTES}", blob[at : at + CHUNK_BYTES])
        await ask(connection, "POST", f"/{name}")
        await connection.close()

    began = time.perf_counter()
    await spread(enumerate(blobs), one, len(blobs))
    return time.perf_counter() - began


# ------------------------------------------------------------------------------------------------ a crowd


async def crowd(
    folder: Path, *, agents: int = 1000, uploaders: int = UPLOADERS, mib: int = 1, hold_s: float = 10
) -> Figures:
    """`agents` sites hold a long poll while `uploaders` of another federation upload; then a round wakes the agents."""
    with coordinator(folder / "coordinator", **UNLIMITED, **QUIET) as server:
        await server.started()
        waiting = Federation.of(server.url, load_config([f"a{number:05d}" for number in range(agents)]))
        busy = Federation.of(
            server.url,
            homogeneous([f"u{number:03d}" for number in range(uploaders)]).model_copy(update={"name": "busy"}),
            first=False,
        )
        began = time.perf_counter()
        await waiting.set_up()
        await busy.set_up()
        set_up_s = time.perf_counter() - began
        await busy.request_rounds(1)
        round_id = (await busy.task(busy.sites[0]))["round_id"]
        files_before = server.files
        polls = [asyncio.create_task(_until_work(waiting, site, hold_s)) for site in waiting.sites]
        await _listening(server, agents)
        waits: list[float] = []
        uploaded_s = await _uploads(busy, round_id, [os.urandom(mib * CHUNK_BYTES) for _ in busy.sites], waits)
        woken_at = time.perf_counter()
        await waiting.request_rounds(1)
        told = await asyncio.gather(*polls)
        woken = [at - woken_at for at in told]
        figures = {
            "agents": agents,
            "uploads_at_once": uploaders,
            "errors": 0,  # any other answer ends the run
            "set_up_s": round(set_up_s, 1),
            "uploads_s": round(uploaded_s, 2),
            **{f"upload_{name}": value for name, value in milliseconds(waits).items()},
            **{f"woken_{name}": value for name, value in milliseconds(woken).items()},
            "rss_mib": round(server.rss_bytes / 2**20),
            "files_open": server.files,
        }
        await waiting.close()
        await busy.close()
        figures["files_left"] = await _settled(lambda: server.files - files_before, KEPT_FILES)
    return figures


async def _until_work(federation: Federation, site: Site, hold_s: float) -> float:
    """When the site was given something to do."""
    while True:
        task = await federation.task(site, hold_s)
        if task["kind"] != "wait":
            return time.perf_counter()


async def _listening(server: Coordinator, wanted: int, patience_s: float = 60) -> None:
    """Until the coordinator says that so many long polls are held."""
    viewer = Connection(server.url, TOKENS["viewer"])
    deadline = time.monotonic() + patience_s
    while await gauge(viewer, 'fedmkt_listeners{kind="long_poll"}') < wanted:
        assert time.monotonic() < deadline, f"{wanted} long polls were not held within {patience_s:g} s"
        await asyncio.sleep(0.1)
    await viewer.close()


async def gauge(connection: Connection, series: str) -> float:
    """One sample of /metrics."""
    page = (await ask(connection, "GET", "/metrics")).body.decode()
    found = next(line for line in page.splitlines() if line.startswith(f"{series} "))
    return float(found.rpartition(" ")[2])


async def _settled(measure: Callable[[], int], wanted: int, patience_s: float = 20) -> int:
    """The value once connections that were just closed are gone: as soon as it is `wanted` or less, else the last."""
    deadline = time.monotonic() + patience_s
    while (value := measure()) > wanted and time.monotonic() < deadline:  # noqa: ASYNC110 - another process's files
        await asyncio.sleep(0.2)
    return max(0, value)


# ------------------------------------------------------------------------------------------------ soak


@dataclass(frozen=True)
class Sample:
    rounds: int
    rss_bytes: int
    files: int
    tasks: float
    database_bytes: int
    redis_bytes: int


async def soak(folder: Path, *, rounds: int = 300, warm_up: int = 60, samples: int = 12) -> Figures:
    """Rounds of two sites with tiny payloads, one after the other: what grows with them, and what does not."""
    with coordinator(folder / "coordinator", **UNLIMITED, **QUIET) as server:
        await server.started()
        federation = Federation.of(server.url, load_config(["north", "south"]))
        await federation.set_up()
        taken, spent = [], list[float]()
        every = max(1, (rounds - warm_up) // samples)
        for number in range(1, rounds + 1):
            await timed(play_round(federation), spent)
            if number >= warm_up and (number - warm_up) % every == 0:
                taken.append(await sample(server, federation.redis_url, number))
        await federation.close()
    first, last = taken[0], taken[-1]
    played = last.rounds - first.rounds
    rss = [each.rss_bytes for each in taken]
    middle = percentile(rss, 0.5)
    return {
        "rounds": rounds,
        "round_p50_ms": milliseconds(spent)["p50_ms"],
        "rss_mib": round(last.rss_bytes / 2**20, 1),
        "rss_change": round(last.rss_bytes / first.rss_bytes - 1, 3),
        "rss_spread": round(max(abs(each / middle - 1) for each in rss), 3),
        "files_change": last.files - first.files,
        "tasks_change": int(last.tasks - first.tasks),
        "database_bytes_per_round": round((last.database_bytes - first.database_bytes) / played),
        "redis_bytes_per_round": round((last.redis_bytes - first.redis_bytes) / played),
    }


async def play_round(federation: Federation) -> None:
    await federation.request_rounds(1)
    tasks = [await federation.task(site, 10) for site in federation.sites]
    assert all(task["kind"] == "train_and_upload" for task in tasks), tasks
    blob = federation.blob(tasks[0])
    for site in federation.sites:
        await federation.upload(site, tasks[0]["round_id"], blob)
    await federation.distill(await federation.next_job("distill"))
    for site in federation.sites:
        task = await federation.task(site, 10)
        assert task["kind"] == "apply", task
        await federation.report(site, task["round_id"])


async def sample(server: Coordinator, redis_url: str, rounds: int) -> Sample:
    viewer = Connection(server.url, TOKENS["viewer"])
    tasks = await gauge(viewer, "fedmkt_event_loop_tasks")
    await viewer.close()
    with redis.Redis.from_url(redis_url) as client:
        used = int(client.info("memory")["used_memory_dataset"])
    return Sample(rounds, server.rss_bytes, server.files, tasks, server.database_bytes, used)
