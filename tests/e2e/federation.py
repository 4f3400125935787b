"""A federation of real processes on loopback, which a test starts, kills, restarts and watches over HTTP."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from fedmkt.client import CoordinatorClient, RetryPolicy, StaticToken
from fedmkt.protocol import (
    DistillationConfig,
    FederationConfig,
    FederationView,
    KnowledgeConfig,
    LoraConfig,
    OptimizerConfig,
    PrivateConfig,
    PublicSetConfig,
    RoundView,
    Schedule,
)
from tiny_models import POSITIONS, story

TERMINAL = ("completed", "failed", "cancelled")
# As a demo on one machine would set them: short leases and sweeps, so that faults are noticed within a test's patience.
QUICK = {"FEDMKT_LEASE_S": "5", "FEDMKT_KEEPER_INTERVAL_S": "0.2", "FEDMKT_POLL_RECHECK_S": "0.3"}


@dataclass(frozen=True)
class SiteFiles:
    """What one site has: a model folder and its private text."""

    model: Path
    private: Path


@dataclass
class Processes:
    """Coordinator (SQLite, embedded Redis), one LLM server and agents, each a process of its own under `folder`."""

    folder: Path
    llm: Path
    sites: Mapping[str, SiteFiles]
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    federation_id: str = ""

    def __post_init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        (self.folder / "logs").mkdir(parents=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for process in self.running.values():
            process.terminate()
        for process in self.running.values():
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    # ---------------------------------------------------------------------------------------------- processes

    def start(self, name: str) -> None:
        """Start `coordinator`, `llm-server` or a site's agent; again after it was killed, with the same folder."""
        state = ["--state-dir", str(self.folder / name), "--log-style", "text"]
        if name == "coordinator":
            arguments = ["fedmkt_coordinator", "run", "--port", str(self.port), *state]
        elif name == "llm-server":
            token = self.secret("worker", self.token("worker"))
            common = ["--coordinator", self.url, "--threads", "1", "--token-file", str(token)]
            arguments = ["fedmkt_llm_server", *common, "--model", str(self.llm), *state]
        else:
            site = self.sites[name]
            token = ["--enrolment-token-file", str(self.folder / "secrets" / name)]
            files = ["--model", str(site.model), "--private", str(site.private)]
            arguments = ["fedmkt_client_agent", "--coordinator", self.url, *token, *files, *state]
        log = (self.folder / "logs" / f"{name}.log").open("ab")
        environment = {**os.environ, **QUICK, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, "-m", *arguments]
        with log:
            self.running[name] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)

    def kill(self, name: str) -> None:
        """SIGKILL: the process gets no chance to tidy up."""
        process = self.running.pop(name)
        process.send_signal(signal.SIGKILL)
        process.wait()

    def freeze(self, *names: str) -> None:
        """SIGSTOP: alive and silent, so that a round stays in the state that waits for these."""
        for name in names:
            self.running[name].send_signal(signal.SIGSTOP)

    def thaw(self, *names: str) -> None:
        for name in names:
            self.running[name].send_signal(signal.SIGCONT)

    def begin(self, config: FederationConfig, public_set: bytes, rounds: int) -> None:
        """Coordinator up, federation created, everybody enrolled and started, rounds requested."""
        self.prepare(config, public_set)
        self.request(rounds)

    def request(self, rounds: int) -> None:
        with self.client() as operator:
            operator.request_rounds(self.federation_id, rounds)

    def prepare(self, config: FederationConfig, public_set: bytes) -> None:
        """Everything but the request for rounds."""
        self.start("coordinator")
        with self.client() as operator:
            self.federation_id = operator.create_federation(config).federation_id
            operator.put_public_set(self.federation_id, public_set)
            for name in self.sites:
                self.secret(name, operator.issue_enrolment_token(self.federation_id, name).token)
        for name in ("llm-server", *self.sites):
            self.start(name)

    def gather(self, config: FederationConfig, public_set: bytes) -> None:
        """`prepare`, and wait until every site is ready: rounds that are asked for then begin with all of them."""
        self.prepare(config, public_set)
        self.until(
            lambda: all(site.state == "ready" for site in self.view().sites), "all sites are ready", timeout_s=90
        )

    # ---------------------------------------------------------------------------------------------- secrets, views

    def secret(self, name: str, value: str) -> Path:
        path = self.folder / "secrets" / name
        path.parent.mkdir(exist_ok=True, mode=0o700)
        path.write_text(value)
        return path

    def token(self, role: str) -> str:
        path = self.folder / "coordinator" / "credentials.json"
        self.until(path.exists, "the coordinator wrote its credentials", timeout_s=60)
        return str(json.loads(path.read_text())[role])

    def client(self) -> CoordinatorClient:
        """The operator's client; waits for a coordinator that is starting."""
        return CoordinatorClient(self.url, StaticToken(self.token("operator")), retry=RetryPolicy(max_wait_s=0.5))

    def view(self) -> FederationView:
        with self.client() as operator:
            return operator.federation(self.federation_id)

    def rounds(self) -> list[RoundView]:
        """All rounds so far, oldest first."""
        with self.client() as operator:
            return sorted(operator.rounds(self.federation_id).items, key=lambda one: one.number)

    def wait_for_rounds(self, count: int, *, timeout_s: float) -> list[RoundView]:
        """Until `count` rounds have ended; they are returned, oldest first."""
        self.until(lambda: self.view().rounds_finished >= count, f"{count} rounds ended", timeout_s=timeout_s)
        return self.rounds()

    def wait_for_state(self, number: int, state: str, *, timeout_s: float) -> None:
        """Until round `number` is in `state`; fails at once when it ended otherwise."""

        def reached() -> bool:
            current = self.view().current_round
            past = {one.number: one for one in self.rounds()}.get(number)
            if past is not None and past.state in TERMINAL and past.state != state:
                raise AssertionError(f"round {number} is {past.state} ({past.reason}) and was never seen {state}")
            return current is not None and current.number == number and current.state == state

        self.until(reached, f"round {number} is {state}", timeout_s=timeout_s)

    def until(self, holds: Callable[[], bool], what: str, *, timeout_s: float) -> None:
        """Wait; on time-out, or when a process ends by itself, fail with the ends of all logs."""
        deadline = time.monotonic() + timeout_s
        while not holds():
            ended = [name for name, process in self.running.items() if process.poll() is not None]
            if ended or time.monotonic() > deadline:
                why = f"{ended} ended" if ended else f"not within {timeout_s:.0f} s"
                raise AssertionError(f"waiting until {what}: {why}\n{self.log_ends()}")
            time.sleep(0.2)

    def log_ends(self) -> str:
        logs = sorted((self.folder / "logs").iterdir())
        return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-2500:]}" for log in logs)


def jsonl(records: list[dict[str, str]]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def stories(start: int, count: int, **more: str) -> list[dict[str, str]]:
    return [{"id": f"s{number}", "text": story(number), **more} for number in range(start, start + count)]


def small_config(sites: list[str], **changes: object) -> FederationConfig:
    """A federation whose rounds take seconds; `changes` replace whole fields."""
    values: dict[str, object] = {
        "name": "small",
        "sites": tuple(sites),
        "public_set": PublicSetConfig(slices=3, holdout_share=0.2),
        "schedule": Schedule(quorum=len(sites), collect_timeout_s=120, distill_timeout_s=120, apply_timeout_s=120),
        "knowledge": KnowledgeConfig(max_tokens=POSITIONS),
        "private": PrivateConfig(first_epochs=1, epochs=1),
        "lora": LoraConfig(rank=4, alpha=8),
        "llm_optimizer": OptimizerConfig(batch_size=8, warmup_steps=0),
        "site_optimizer": OptimizerConfig(batch_size=8, warmup_steps=0),
        "distillation": DistillationConfig(margin_nats_per_byte=0.0),
    }
    return FederationConfig.model_validate({**values, **changes})
