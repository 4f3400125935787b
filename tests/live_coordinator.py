"""A real coordinator on loopback inside the test's process: SQLite, embedded Redis, real HTTP; stops and restarts."""

import json
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from fedmkt.client import CoordinatorClient, RetryPolicy, StaticToken
from fedmkt.local_server import serve_in_thread
from fedmkt.protocol import (
    DistillationConfig,
    FederationConfig,
    KnowledgeConfig,
    LoraConfig,
    OptimizerConfig,
    PrivateConfig,
    PublicSetConfig,
    RoundView,
    Schedule,
)
from fedmkt.stopping import StopFlag
from fedmkt_coordinator.app import create_app
from fedmkt_coordinator.settings import Settings
from tiny_models import POSITIONS, story

TOKENS = {role: f"{role}-token-of-the-tests-0123456789abcdef" for role in ("operator", "viewer", "worker")}
QUICK = RetryPolicy(first_wait_s=0.02, max_wait_s=0.2, patience_s=30)


class LiveCoordinator:
    """`url` stays the same over restarts."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._settings = Settings(
            **{
                "state_dir": folder,
                "keeper_interval_s": 0.1,
                "poll_recheck_s": 0.1,
                "retry_delay_s": 0.1,
                **{f"{role}_token": token for role, token in TOKENS.items()},
                **changes,
            }
        )
        self._running = ExitStack()
        self.middleware: Callable[[FastAPI], None] = lambda app: None
        self.clock_ahead_s = 0.0  # of everybody else's; a test may turn it at any time

    def start(self) -> None:
        app = create_app(self._settings, clock=lambda: datetime.now(UTC) + timedelta(seconds=self.clock_ahead_s))
        self.middleware(app)
        self._running.enter_context(serve_in_thread(app, port=self.port))
        self.app = app

    def stop(self) -> None:
        context = getattr(self.app.state, "context", None)
        if context is not None:
            context.wakeups.stop()  # as its own server does on SIGTERM: long polls answer at once
        self._running.close()

    def client(self, role: str = "operator", **more: Any) -> CoordinatorClient:
        return CoordinatorClient(self.url, StaticToken(TOKENS[role]), retry=QUICK, **more)

    def create(self, config: FederationConfig, public_set: bytes) -> str:
        with self.client() as operator:
            federation_id = operator.create_federation(config).federation_id
            operator.put_public_set(federation_id, public_set)
        return federation_id

    def enrolment_token(self, federation_id: str, site: str) -> str:
        with self.client() as operator:
            return operator.issue_enrolment_token(federation_id, site).token

    def rounds(self, federation_id: str) -> list[RoundView]:
        """Oldest first."""
        with self.client() as operator:
            return sorted(operator.rounds(federation_id).items, key=lambda one: one.number)

    def wait_for_rounds(self, federation_id: str, count: int, timeout_s: float = 60) -> list[RoundView]:
        """Until `count` rounds have ended; they are returned, oldest first."""
        with self.client() as operator:
            until(lambda: operator.federation(federation_id).rounds_finished >= count, timeout_s)
        return self.rounds(federation_id)


class Background:
    """A service's `serve(settings, stop)` in a thread; what it raises is raised again by `end`."""

    def __init__(self, serve: Callable[[Any, StopFlag], None], settings: Any) -> None:
        self.stop = StopFlag()
        self._serve, self._settings = serve, settings
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._serve(self._settings, self.stop)
        except BaseException as error:  # noqa: BLE001 - handed to the test's thread
            self._error = error

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def end(self, timeout_s: float = 30) -> BaseException | None:
        """Set the stop flag and wait; returns what ended the service early, if something did."""
        self.stop.set()
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), "the service did not stop"
        return self._error


def until(holds: Callable[[], bool], timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, f"not within {timeout_s} s"
        time.sleep(0.05)


def stories(start: int, count: int, **more: str) -> bytes:
    """JSONL of `count` short texts."""
    return b"".join(
        json.dumps({"id": f"s{number}", "text": story(number), **more}).encode() + b"\n"
        for number in range(start, start + count)
    )


def tiny_config(sites: tuple[str, ...], **changes: Any) -> FederationConfig:
    """A federation whose rounds take a second; `changes` replace whole fields."""
    values: dict[str, Any] = {
        "name": "tiny",
        "sites": sites,
        "public_set": PublicSetConfig(slices=2, holdout_share=0.2),
        "schedule": Schedule(quorum=len(sites), collect_timeout_s=60, distill_timeout_s=60, apply_timeout_s=60),
        "knowledge": KnowledgeConfig(max_tokens=POSITIONS, top_k=16),
        "private": PrivateConfig(first_epochs=1, epochs=1),
        "lora": LoraConfig(rank=4, alpha=8),
        "llm_optimizer": OptimizerConfig(batch_size=8, warmup_steps=0, learning_rate=1e-3),
        "site_optimizer": OptimizerConfig(batch_size=8, warmup_steps=0, learning_rate=1e-3),
        "distillation": DistillationConfig(margin_nats_per_byte=0.0),
    }
    return FederationConfig(**{**values, **changes})
