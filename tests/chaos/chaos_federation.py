"""A federation of real processes for one case of the matrix: what is killed is started again, then all is audited.

The coordinator is the product as it stands. Sites and LLM server are `participants`, so that a round takes a second.
"""

import hashlib
import json
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

from chaos_balancer import Balancer
from coordinator_world import PUBLIC_SET, TOKENS, config
from fedmkt.client import CoordinatorClient, RetryPolicy, SiteKey, StaticToken
from fedmkt.fault_points import VARIABLE
from fedmkt.protocol import AdapterView, Event, FederationConfig, RoundView, Schedule, UploadReceipt
from fedmkt.public_set import PublicSet
from fedmkt.signing import load_key
from nursery import Child, Nursery
from participants import adapter_blob, knowledge_blob, llm_adapter
from real_servers import RedisProcess

SITES = ("north", "south")
COORDINATORS = ("coordinator", "replica")
PATIENT = RetryPolicy(first_wait_s=0.02, max_wait_s=0.2, patience_s=20)
SOON_S = 60.0  # a loaded machine's patience; what is waited for comes within seconds on a quiet one
LEASE_S = 3.0
WAY = [("", "collecting"), ("collecting", "distilling"), ("distilling", "applying"), ("applying", "completed")]


def chaos_config() -> FederationConfig:
    """Adapters are averaged, so every site uploads several chunks too; deadlines are far away."""
    patience = Schedule(quorum=2, collect_timeout_s=600, distill_timeout_s=600, apply_timeout_s=600)
    return config(scenario="homogeneous", average_adapters=True, schedule=patience)


@dataclass
class Federation:
    """Coordinators `coordinator` and, on request, `replica`; `worker`; one process for each of SITES."""

    kinds: ClassVar[tuple[str, ...]] = ("knowledge", "adapter")  # of uploads
    folder: Path
    nursery: Nursery
    redis: RedisProcess
    database_url: str | None = None
    replicas: int = 1
    running: dict[str, Child] = field(default_factory=dict)
    settings: dict[str, str | None] = field(default_factory=dict)  # of the coordinators; None: the default
    federation_id: str = ""

    def __post_init__(self) -> None:
        self.folder.mkdir(exist_ok=True)
        (self.folder / "logs").mkdir(exist_ok=True)
        (self.folder / "objects").mkdir(exist_ok=True)
        names = COORDINATORS[: self.replicas]
        self.ports = dict(zip(names, _free_ports(len(names)), strict=True))
        self.balancer = Balancer(list(self.ports.values())) if self.replicas > 1 else None
        self.audited = 0  # receipts that were asked for again
        self.url = f"http://127.0.0.1:{self.balancer.port if self.balancer else self.ports['coordinator']}"
        self.operator = CoordinatorClient(self.url, StaticToken(TOKENS["operator"]), retry=PATIENT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for name in list(self.running):
            self.kill(name)
        self.operator.close()
        if self.balancer is not None:
            self.balancer.close()

    # ---------------------------------------------------------------------------------------------- processes

    def start(self, name: str, fault: str = "") -> None:
        """Start a process, or start it again in its own folder; `fault` is a FEDMKT_FAULT_POINT."""
        environment = {VARIABLE: fault}
        if name in self.ports:
            entry, arguments = "fedmkt_coordinator.command:app", ["run", "--port", str(self.ports[name])]
            environment |= self._settings(name)
        elif name == "worker":
            entry, arguments = "participants:worker", [str(self.folder / name), self.url, TOKENS["worker"]]
        else:
            token = self.folder / f"{name}.token"
            entry, arguments = "participants:site", [str(self.folder / name), self.url, token.read_text()]
        log = self.folder / "logs" / f"{name}.log"
        self.running[name] = self.nursery.start(entry, arguments, environment, log)

    def _settings(self, name: str) -> dict[str, str]:
        values: dict[str, str | None] = {
            "STATE_DIR": str(self.folder / name),
            "ARTIFACTS_URL": (self.folder / "objects").as_uri(),
            "REDIS_URL": self.redis.url,
            "LEASE_S": str(LEASE_S),
            "KEEPER_INTERVAL_S": "0.1",
            "POLL_RECHECK_S": "0.2",
            "RETRY_DELAY_S": "0.1",
            "MAX_ATTEMPTS": "10",
            "LOG_STYLE": "text",
            **{f"{role.upper()}_TOKEN": token for role, token in TOKENS.items()},
            "DATABASE_URL": self.database_url,
            **self.settings,
        }
        return {f"FEDMKT_{name}": value for name, value in values.items() if value is not None}

    def kill(self, name: str) -> None:
        child = self.running.pop(name)
        child.send(signal.SIGKILL)
        child.wait()

    def until_killed(self, name: str) -> None:
        """Until the process has come to its fault point."""
        child = self.running[name]
        self.until(lambda: child.poll() is not None, f"{name} reaches its fault point")
        assert self.running.pop(name).wait() == -signal.SIGKILL, f"{name} ended otherwise"

    def until_halted(self, name: str) -> None:
        child = self.running[name]
        self.until(lambda: child.is_halted, f"{name} halts at its fault point")

    def until_answers(self, name: str) -> None:
        """Until this coordinator, and not another one, accepts connections."""

        def accepts() -> bool:
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", self.ports[name])) == 0

        self.until(accepts, f"{name} answers")

    def go_on(self, name: str) -> None:
        self.running[name].send(signal.SIGCONT)

    def until(self, holds: Callable[[], bool], what: str, timeout_s: float = SOON_S) -> None:
        deadline = time.monotonic() + timeout_s
        while not holds():
            ended = [name for name, child in list(self.running.items()) if child.poll() not in (None, -signal.SIGKILL)]
            why = f"{ended} ended" if ended else f"not within {timeout_s:g} s"
            if ended or time.monotonic() > deadline:
                raise AssertionError(f"waiting until {what}: {why}\n{self.log_ends()}")
            time.sleep(0.03)

    def log_ends(self) -> str:
        logs = sorted((self.folder / "logs").iterdir())
        return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-3000:]}" for log in logs)

    # ---------------------------------------------------------------------------------------------- playing

    def config(self) -> FederationConfig:
        return chaos_config()

    def public_set(self) -> bytes:
        return PUBLIC_SET

    def found(self) -> None:
        """A federation with its public set and an enrolment token for every site; nobody has come yet."""
        self.federation_id = self.operator.create_federation(self.config()).federation_id
        self.operator.put_public_set(self.federation_id, self.public_set())
        for name in SITES:
            token = self.operator.issue_enrolment_token(self.federation_id, name).token
            (self.folder / f"{name}.token").write_text(token)

    def until_ready(self, timeout_s: float = SOON_S) -> None:
        def ready() -> bool:
            view = self.operator.federation(self.federation_id)
            return view.llm is not None and all(site.state == "ready" for site in view.sites) and self._maps_built()

        self.until(ready, "the federation is ready", timeout_s)

    def _maps_built(self) -> bool:
        """Each one that was ordered, and at least one was."""
        states = {event.data["job_id"]: event.data["state"] for event in self.events() if event.kind == "job.state"}
        return set(states.values()) == {"done"}

    def until_finished(self, count: int, timeout_s: float = SOON_S) -> None:
        def finished() -> bool:
            return self.operator.federation(self.federation_id).rounds_finished >= count

        self.until(finished, f"{count} rounds have ended", timeout_s)

    # ---------------------------------------------------------------------------------------------- auditing

    def rounds(self) -> list[RoundView]:
        """Oldest first."""
        return sorted(_pages(self.operator.rounds, self.federation_id), key=lambda one: one.number)

    def events(self) -> list[Event]:
        return list(_pages(self.operator.events, self.federation_id))

    def versions(self) -> list[AdapterView]:
        return list(_pages(self.operator.adapters, self.federation_id))

    def receipts(self, site: str) -> list[UploadReceipt]:
        """Every receipt that the site's process wrote down."""
        path = self.folder / site / "receipts.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [UploadReceipt.model_validate_json(line) for line in lines]

    def audit(self, rounds: int, *, sites_killed: bool = False) -> None:
        """Every round ended well, once; every receipt is honoured; the adapter's lineage is whole.

        `sites_killed`: a site may have died before it read a receipt, and had no reason to ask for it again.
        """
        views = self.rounds()
        assert [(one.number, one.state, one.reason) for one in views] == [
            (number, "completed", None) for number in range(1, rounds + 1)
        ]
        events = self.events()
        self._audit_transitions(views, events)
        self._audit_receipts(views, events, all_read=not sites_killed)
        self._audit_lineage(views, events)
        said = {log.name: log.read_text(errors="replace") for log in (self.folder / "logs").iterdir()}
        mistakes = {name: around(text, "Traceback") for name, text in said.items() if "Traceback" in text}
        assert mistakes == {}, self.log_ends()

    def _audit_transitions(self, rounds: list[RoundView], events: list[Event]) -> None:
        assert [event.sequence for event in events] == list(range(1, len(events) + 1))
        counts = Counter((event.kind, event.round_id, event.site) for event in events)
        for one in rounds:
            own = [event for event in events if event.round_id == one.round_id]
            moves = [(event.data["before"], event.data["state"]) for event in own if event.kind == "round.state"]
            assert moves == WAY, f"round {one.number} went {moves}"
            for site in SITES:
                for kind in (*(f"{kind}.accepted" for kind in self.kinds), "site.applied"):
                    assert counts[kind, one.round_id, site] == 1, f"{kind} of {site} in round {one.number}"
            assert sum(counts[kind, one.round_id, None] for kind in ("adapter.promoted", "adapter.kept_back")) == 1
            assert "upload.refused" not in {event.kind for event in own}
        done = Counter(event.data["job_id"] for event in events if event.data.get("state") == "done")
        assert set(done.values()) == {1}, "a job was done twice"
        kinds = Counter(event.data["job"] for event in events if event.data.get("state") == "done")
        assert kinds["distill"] == len(rounds)

    def _audit_receipts(self, rounds: list[RoundView], events: list[Event], *, all_read: bool) -> None:
        """Asked for again, a receipt is the same; its artifact is there with the bytes that the site sent."""
        accepted = {(event.round_id, event.site, event.data.get("digest")) for event in events}
        for site in SITES:
            given = {(one.round_id, one.kind): one for one in self.receipts(site)}
            expected = {(one.round_id, kind) for one in rounds for kind in self.kinds}
            assert given.keys() == expected if all_read else given.keys() <= expected
            key = load_key(self.folder / site / "key.pem")
            with self._site_client(site) as client:
                keys = client.keys().public_keys
                for receipt in self.receipts(site):
                    blob = self._blob(receipt, next(one for one in rounds if one.round_id == receipt.round_id))
                    assert (receipt.round_id, site, receipt.digest) in accepted
                    assert client.upload(receipt.kind, receipt.round_id, blob, key, keys) == receipt
                    assert self._artifact(receipt.digest) == blob
                    self.audited += 1

    def _blob(self, receipt: UploadReceipt, one: RoundView) -> bytes:
        """What the site sent."""
        if receipt.kind == "adapter":
            return adapter_blob(receipt.site, one.number)
        public_set = PublicSet.from_jsonl(PUBLIC_SET)
        where = (one.number, one.slice_index, chaos_config(), self.federation_id, public_set)
        return knowledge_blob(receipt.site, *where)

    def _audit_lineage(self, rounds: list[RoundView], events: list[Event]) -> None:
        """One version for each round, each made from the one before, of what the sites uploaded in that round."""
        versions = sorted(self.versions(), key=lambda one: one.version)
        uploaded = {
            (event.round_id, event.site): event.data["digest"] for event in events if event.kind == "knowledge.accepted"
        }
        assert [one.version for one in versions] == list(range(len(rounds) + 1))
        assert [one.parent for one in versions] == [None, *range(len(rounds))]
        assert [one.round_id for one in versions[1:]] == [one.round_id for one in rounds]
        assert [one.promoted for one in versions] == [False] * len(rounds) + [True]
        parent: AdapterView = versions[0]
        for number, version in enumerate(versions[1:], start=1):
            assert version.artifact is not None
            assert self._artifact(version.artifact) == llm_adapter(number, parent.artifact)
            assert version.knowledge == {site: uploaded[version.round_id, site] for site in SITES}
            parent = version

    def _artifact(self, digest: str) -> bytes:
        found = self.operator.fetch_artifact(digest, self.folder / "audit").read_bytes()
        assert hashlib.sha256(found).hexdigest() == digest
        return found

    def _site_client(self, site: str) -> CoordinatorClient:
        about = json.loads((self.folder / site / "site.json").read_text())
        key = load_key(self.folder / site / "key.pem")
        return CoordinatorClient(self.url, SiteKey(about["site_id"], key), retry=PATIENT)


def _pages(read: Callable[[str, str | None], Any], federation_id: str) -> Iterator[Any]:
    cursor: str | None = None
    while True:
        page = read(federation_id, cursor)
        yield from page.items
        if (cursor := page.next_cursor) is None:
            return


def _free_ports(count: int) -> list[int]:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


def around(text: str, word: str) -> str:
    """Where the word first stands, with what leads to it and what follows."""
    at = text.index(word)
    return text[max(0, at - 1000) : at + 5000]
