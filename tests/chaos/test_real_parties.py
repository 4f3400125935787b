"""A real LLM server and real agents, with tiny models, killed at every step of their work; one round a case."""

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from chaos_federation import COORDINATORS, SITES, Federation
from chaos_templates import PROCESSES, Templates
from coordinator_world import TOKENS
from fedmkt.fault_points import VARIABLE
from fedmkt.protocol import (
    DistillationConfig,
    Event,
    FederationConfig,
    KnowledgeConfig,
    LoraConfig,
    OptimizerConfig,
    PrivateConfig,
    PublicSetConfig,
    RoundView,
    Schedule,
)
from nursery import Nursery
from real_servers import RedisProcess

pytestmark = [pytest.mark.services, pytest.mark.chaos, pytest.mark.timeout(240)]
POSITIONS = 96  # of the tiny models
START_S = 90.0

LLM_SERVER = [
    "worker.taken 1",
    "worker.claimed 1",
    "worker.fetching the sites' knowledge 1",
    "worker.making knowledge 1",
    "worker.learning from the others 2",
    "worker.publishing the LLM's knowledge 1",
    "worker.finished 1",
    "worker.completed 1",
]
AGENT = [
    "agent.training on private text 2",
    "agent.trained.uncommitted 1",
    "agent.trained.committed 1",
    "agent.extracted.uncommitted 1",
    "agent.uploading knowledge 1",
    "agent.knowledge.begun 1",
    "agent.uploaded.uncommitted 1",
    "agent.uploaded.committed 1",
    "agent.fetching the LLM's knowledge 1",
    "agent.learning from the others 1",
    "agent.report.uncommitted 1",
    "agent.report.committed 1",
    "agent.report.begun 1",
    "agent.reported.uncommitted 1",
    "agent.reported.committed 1",
]


def tiny_config() -> FederationConfig:
    """Rounds of a second; the LLM always finds something to learn."""
    return FederationConfig(
        name="real",
        sites=SITES,
        public_set=PublicSetConfig(slices=2, holdout_share=0.2),
        schedule=Schedule(quorum=2, collect_timeout_s=600, distill_timeout_s=600, apply_timeout_s=600),
        knowledge=KnowledgeConfig(max_tokens=POSITIONS, top_k=16),
        private=PrivateConfig(first_epochs=1, epochs=1),
        lora=LoraConfig(rank=4, alpha=8),
        llm_optimizer=OptimizerConfig(batch_size=4, warmup_steps=0, learning_rate=1e-3),
        site_optimizer=OptimizerConfig(batch_size=4, warmup_steps=0, learning_rate=1e-3),
        distillation=DistillationConfig(margin_nats_per_byte=0.0),
    )


class RealFederation(Federation):
    """The coordinator from one nursery, the parties from another that knows torch."""

    kinds: ClassVar[tuple[str, ...]] = ("knowledge",)
    parties: Nursery
    models: Path

    def config(self) -> FederationConfig:
        return tiny_config()

    def public_set(self) -> bytes:
        return (self.models / "public.jsonl").read_bytes()

    def start(self, name: str, fault: str = "") -> None:
        if name in COORDINATORS:
            super().start(name, fault)
            return
        common = ["--coordinator", self.url, "--model", str(self.models / name), "--threads", "1"]
        common += ["--state-dir", str(self.folder / name), "--log-style", "text"]
        if name == "worker":
            entry, more = "fedmkt_llm_server.command:app", []
            environment = {"FEDMKT_WORKER_TOKEN": TOKENS["worker"], "FEDMKT_REGISTRATION_INTERVAL_S": "0.2"}
        else:
            entry = "fedmkt_client_agent.command:app"
            more = ["--enrolment-token-file", str(self.folder / f"{name}.token")]
            more += ["--private", str(self.models / f"{name}.jsonl")]
            environment = {"FEDMKT_POLL_S": "1"}
        log = self.folder / "logs" / f"{name}.log"
        self.running[name] = self.parties.start(entry, common + more, {**environment, VARIABLE: fault}, log)

    def _audit_receipts(self, rounds: list[RoundView], events: list[Event], *, all_read: bool) -> None:
        """What the coordinator acknowledged is there: each agent keeps its receipts to itself."""
        accepted = [event for event in events if event.kind == "knowledge.accepted"]
        assert len(accepted) == len(SITES) * len(rounds)
        for event in accepted:
            self._artifact(str(event.data["digest"]))

    def _audit_lineage(self, rounds: list[RoundView], events: list[Event]) -> None:
        """One version a round, made from the one that was promoted then; all bytes are there."""
        versions = sorted(self.versions(), key=lambda one: one.version)
        made = {event.data["version"]: event for event in events if event.kind.startswith("adapter.")}
        assert [one.version for one in versions] == list(range(len(rounds) + 1))
        assert [one.round_id for one in versions[1:]] == [one.round_id for one in rounds]
        promoted = 0
        for version in versions[1:]:
            assert version.parent == promoted
            assert version.artifact is not None
            self._artifact(version.artifact)
            if made[version.version].kind == "adapter.promoted":
                promoted = version.version
        assert [one.version for one in versions if one.promoted] == [promoted]


@pytest.fixture(scope="module")
def real(
    nursery: Nursery, templates: Templates, chaos_redis: RedisProcess, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RealFederation]:
    models = tmp_path_factory.mktemp("models")
    with Nursery("fedmkt_llm_server.main", "fedmkt_client_agent.main", "tiny_parties") as parties:
        assert parties.start("tiny_parties:save", [str(models)], {}, models / "log").wait(START_S) == 0
        federation = RealFederation(tmp_path_factory.mktemp("real"), nursery, chaos_redis)
        federation.parties, federation.models = parties, models
        with federation:
            federation.start("coordinator")
            federation.found()
            for name in PROCESSES[1:]:
                federation.start(name)
            federation.until_ready(START_S)
            yield federation


def play(federation: RealFederation, victim: str, point: str) -> None:
    """One more round, in which `victim` dies at `point` and is started again."""
    before = federation.operator.federation(federation.federation_id).rounds_requested
    federation.kill(victim)
    federation.start(victim, f"kill {point}")
    federation.operator.request_rounds(federation.federation_id, 1)
    federation.until_killed(victim)
    federation.start(victim)
    federation.until_finished(before + 1, START_S)
    federation.audit(before + 1)


@pytest.mark.parametrize("point", LLM_SERVER)
def test_real_llm_server_is_killed_at(real: RealFederation, point: str) -> None:
    play(real, "worker", point)


@pytest.mark.parametrize("point", AGENT)
def test_real_agent_is_killed_at(real: RealFederation, point: str) -> None:
    play(real, "north", point)
