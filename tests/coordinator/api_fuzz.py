"""Fuzzing the API: a coordinator process with a federation in the middle of a round, and schemathesis against it.

`python tests/coordinator/api_fuzz.py --minutes 10` is the long run (`make fuzz-api`); a test runs a short one.
"""

import argparse
import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from coordinator_servers import settings_for  # noqa: E402
from coordinator_world import TOKENS, World, config  # noqa: E402
from fedmkt_coordinator.app import create_app  # noqa: E402
from real_servers import RedisProcess  # noqa: E402

SCHEMATHESIS = Path(sys.executable).with_name("schemathesis")
HOOKS = HERE / "schemathesis_hooks.py"
ROLES = ("operator", "worker", "viewer", "site", "nobody")
# A long answer to a lawful request: nothing is wrong with it, and a run has no time for it.
STREAM = "/v1/federations/{federation_id}/events/stream"
# Statuses for what the schema allows and the rules do not, or the reverse.
LAWFUL = ["2xx", "304", "401", "403", "404", "409", "413", "416", "422", "426", "429"]
UNLAWFUL = ["400", "401", "403", "404", "405", "409", "413", "416", "422", "426", "429", "304"]


@dataclass(frozen=True)
class Fuzzed:
    """What became of one run: `cases` requests were sent, `failures` is what schemathesis says went wrong."""

    role: str
    cases: int
    passed: bool
    text: str


@dataclass(frozen=True)
class Target:
    url: str
    tokens: dict[str, str]
    known: dict[str, list[str]]  # parameter -> values that exist


async def furnish(folder: Path, redis_url: str) -> tuple[dict[str, str], dict[str, list[str]]]:
    """A federation that collects, with one upload announced; returns the sites' tokens and ids that exist."""
    app = create_app(settings_for(folder, redis_url), keep_time=False, clock=lambda: datetime.now(UTC))
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://coordinator") as http,
    ):
        world = World(app, http, _Now())  # type: ignore[arg-type] # a clock that cannot be moved
        await world.ready(config(schedule={"quorum": 2, "collect_timeout_s": 86400}))
        await world.request_rounds(3)
        view, north = await world.round(), world.sites["north"]
        manifest = world.manifest(north, view, world.blob(north, view))
        state = (await world.send("POST", "/v1/uploads", north, manifest)).json()
        artifact = await world.store_artifact(b"an artifact")
        known = {
            "federation_id": [world.federation_id],
            "round_id": [view.round_id],
            "upload_id": [state["upload_id"]],
            "job_id": [job_id async for job_id in _jobs(world)],
            "name": ["south"],
            "digest": [artifact, world.public_set.digest],
            "version": ["0"],
        }
        return {"site": north.token}, {name: values for name, values in known.items() if values}


async def _jobs(world: World) -> Any:
    async with world.context.store.read() as tx:
        for row in await tx._connection.exec_driver_sql("SELECT id FROM jobs"):  # any state will do
            yield row[0]


class _Now:
    def __call__(self) -> datetime:
        return datetime.now(UTC)


@contextmanager
def coordinator(log: Path) -> Iterator[Target]:
    """A real process; names do not resolve in it, so that webhooks made by chance go nowhere. `log` gets its errors."""
    with tempfile.TemporaryDirectory(prefix="fedmkt-fuzz-") as kept:
        folder = Path(kept)
        redis = RedisProcess(folder)
        redis.start()
        try:
            tokens, known = asyncio.run(furnish(folder / "state", redis.url))
            with socket.create_server(("127.0.0.1", 0)) as free:
                port = free.getsockname()[1]
            process = _start(folder, redis.url, port, log)
            try:
                yield Target(f"http://127.0.0.1:{port}", {**TOKENS, **tokens}, known)
            finally:
                process.send_signal(signal.SIGTERM)
                process.wait(30)
        finally:
            redis.stop()


def _start(folder: Path, redis_url: str, port: int, log: Path) -> "subprocess.Popen[bytes]":
    settings = {
        "STATE_DIR": str(folder / "state"),
        "REDIS_URL": redis_url,
        "PORT": str(port),
        "LOG_LEVEL": "ERROR",
        "ACCESS_TOKEN_S": "3600",
        "POLL_MAX_S": "0.05",  # a task is asked for, not waited for
        "SITE_RATE_PER_S": "1e9",
        "STAFF_RATE_PER_S": "1e9",
        "ADDRESS_RATE_PER_S": "1e9",
        **{f"{role.upper()}_TOKEN": token for role, token in TOKENS.items()},
    }
    environment = {**os.environ, **{f"FEDMKT_{name}": value for name, value in settings.items()}}
    command = [sys.executable, str(HERE / "coordinator_offline.py")]
    with log.open("wb") as errors:
        process = subprocess.Popen(command, env=environment, stderr=errors)
    for _ in range(600):
        try:
            httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=5).raise_for_status()
        except httpx.HTTPError:
            time.sleep(0.1)
            continue
        return process
    raise AssertionError(log.read_text())


def configuration(target: Target, role: str) -> str:
    """schemathesis.toml: who asks, ids that exist, which statuses mean accepted and refused."""
    lines = [f'hooks = "{HOOKS}"', "[generation]", "allow-x00 = true", "allow-extra-parameters = false"]
    lines += ["[checks.positive_data_acceptance]", f"expected-statuses = {LAWFUL}"]
    lines += ["[checks.negative_data_rejection]", f"expected-statuses = {[*UNLAWFUL]}"]
    if role != "nobody":
        # The token goes to whatever the role might call; where it may not, 403 is the answer to look for.
        for scheme in ("staff", "site"):
            lines += [f"[auth.openapi.{scheme}]", f'bearer = "{target.tokens[role]}"']
    for name, values in target.known.items():
        lines += [f"[dictionaries.{name}]", f"values = {json.dumps(values)}"]
    lines.append("[parameters]")
    lines += [f'"path.{name}" = {{ dictionary = "{name}", probability = 0.6 }}' for name in target.known]
    return "\n".join(lines) + "\n"


def fuzz(target: Target, role: str, folder: Path, options: Sequence[str]) -> Fuzzed:
    settings = folder / f"schemathesis-{role}.toml"
    settings.write_text(configuration(target, role))
    command = [str(SCHEMATHESIS), "--no-color", "--config-file", str(settings), "run", f"{target.url}/openapi.json"]
    command += ["--checks", "all", "--exclude-path", STREAM, "--request-timeout", "30", "--continue-on-failure"]
    command += ["--warnings", "off", *options]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    counted = re.search(r"([\d,]+) generated", done.stdout)
    cases = int(counted[1].replace(",", "")) if counted else 0
    return Fuzzed(role, cases, done.returncode == 0, done.stdout + done.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="for all roles together")
    parser.add_argument("--roles", nargs="*", default=ROLES, choices=ROLES)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--output", type=Path, default=Path("runs/fuzz-api"))
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    results = []
    for role in given.roles:
        options = ["--max-time", str(max(10, round(given.minutes * 60 / len(given.roles))))]
        options += ["--seed", str(given.seed)] if given.seed is not None else []
        # A fresh coordinator for each: what one role destroys, another needs.
        with coordinator(given.output / f"{role}.log") as target:
            result = fuzz(target, role, given.output, options)
        (given.output / f"{role}.txt").write_text(result.text)
        print(f"{role:9} {result.cases:7} cases  {'passed' if result.passed else 'FAILED'}", flush=True)
        results.append(result)
    print(f"together  {sum(each.cases for each in results):7} cases; reports in {given.output}")
    return 0 if all(each.passed for each in results) else 1


if __name__ == "__main__":
    sys.exit(main())
