"""One coordinator and one LLM server in the test's process, and what a test needs to start agents beside them."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from starlette.types import ASGIApp, Receive, Scope, Send

from fedmkt.protocol import FederationConfig
from fedmkt_client_agent.main import serve as serve_agent
from fedmkt_client_agent.settings import Settings
from live_coordinator import Background, LiveCoordinator, stories, until

PUBLIC = stories(0, 20, domain="first") + stories(20, 20, domain="second")
SITES = {"north": ("gpt2", 100), "south": ("qwen2", 200)}  # architecture, first private story


@dataclass
class World:
    """One coordinator and one LLM server for all tests of this file; a federation for each."""

    coordinator: LiveCoordinator
    folder: Path
    bodies: list[bytes] = field(default_factory=list)  # everything that anybody sent

    def begin(self, config: FederationConfig) -> str:
        federation_id = self.coordinator.create(config, PUBLIC)
        with self.coordinator.client() as operator:
            until(lambda: operator.federation(federation_id).llm is not None)
        return federation_id

    def settings(self, federation_id: str, site: str, **changes: Any) -> Settings:
        """For a first start: with an enrolment token."""
        token = self.coordinator.enrolment_token(federation_id, site)
        return self.again(federation_id, site, enrolment_token=token, **changes)

    def again(self, federation_id: str, site: str, **changes: Any) -> Settings:
        """For a later start, without one."""
        values: dict[str, Any] = {
            "coordinator_url": self.coordinator.url,
            "model": str(self.folder / site),
            "private_file": self.folder / f"{site}.jsonl",
            "state_dir": self.folder / federation_id / site,
            "poll_s": 1,
            **changes,
        }
        return Settings(**values)

    def start(self, settings: Settings, federation_id: str, site: str) -> Background:
        agent = Background(serve_agent, settings)
        self.until_ready(federation_id, site)  # models of one process are loaded one after the other
        return agent

    def until_ready(self, federation_id: str, site: str, timeout_s: float = 60) -> None:
        with self.coordinator.client() as operator:
            until(
                lambda: any(s.name == site and s.state == "ready" for s in operator.federation(federation_id).sites),
                timeout_s,
            )

    def request(self, federation_id: str, count: int = 1) -> None:
        with self.coordinator.client() as operator:
            operator.request_rounds(federation_id, count)


class Pages:
    """An agent's status pages, once its settings' folder says where they are."""

    def __init__(self, settings: Settings | None = None, port: int | None = None) -> None:
        self._settings, self._port = settings, port

    @classmethod
    def at(cls, port: int) -> "Pages":
        """Where they will be, whatever state the folder is in."""
        return cls(port=port)

    def __enter__(self) -> "Pages":
        if self._settings is not None:
            address = self._settings.state_dir / "status.json"
            until(lambda: address.exists() and address.stat().st_size > 0, 60)
            self._port = json.loads(address.read_bytes())["port"]
        self._http = httpx.Client(base_url=f"http://127.0.0.1:{self._port}", trust_env=False)
        return self

    def __exit__(self, *raised: object) -> None:
        self._http.close()

    def answers(self) -> bool:
        try:
            return self._http.get("/healthz").status_code == 200
        except httpx.TransportError:
            return False

    def status(self) -> dict[str, Any]:
        shown: dict[str, Any] = self._http.get("/status").json()
        return shown


class Recording:
    """ASGI middleware that keeps every request's path and body."""

    def __init__(self, app: ASGIApp, bodies: list[bytes]) -> None:
        self._app, self._bodies = app, bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def hear() -> Any:
            message = await receive()
            self._bodies.append(message.get("body", b""))
            return message

        self._bodies.append(str(scope.get("path")).encode() + scope.get("query_string", b""))
        await self._app(scope, hear, send)
