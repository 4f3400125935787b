"""The LLM server in whole rounds: as two processes under `accelerate launch`, and with a model that gives NaN."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil  # type: ignore[import-untyped] # its stubs are another package
import pytest
import torch

from fedmkt.ml.models import load_base
from fedmkt.protocol import DistillationConfig, DistillResult, FederationConfig, OptimizerConfig, RoundView, Schedule
from fedmkt_client_agent.main import serve as serve_agent
from fedmkt_client_agent.settings import Settings as AgentSettings
from fedmkt_llm_server.main import serve as serve_llm
from fedmkt_llm_server.settings import Settings as LlmSettings
from live_coordinator import TOKENS, Background, LiveCoordinator, stories, tiny_config, until
from tiny_models import save_tiny

pytestmark = [pytest.mark.services, pytest.mark.e2e, pytest.mark.timeout(420)]
SOON_S = 120.0  # two processes that import torch, on a machine that does other things too
PUBLIC = stories(0, 20, domain="first") + stories(20, 20, domain="second")
LAUNCH = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
TRAINING = "worker.learning from the others"


def config(name: str, epochs: int) -> FederationConfig:
    """Rounds of `8 * epochs` steps."""
    return tiny_config(
        ("north",),
        name=name,
        schedule=Schedule(quorum=1, collect_timeout_s=300, distill_timeout_s=300, apply_timeout_s=300),
        llm_optimizer=OptimizerConfig(batch_size=2, warmup_steps=0, learning_rate=1e-3),
        distillation=DistillationConfig(margin_nats_per_byte=0.0, epochs=epochs),
    )


@dataclass
class Launched:
    """`accelerate launch` with the LLM server below it."""

    coordinator: LiveCoordinator
    folder: Path
    options: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir()
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "FEDMKT_COORDINATOR_URL": self.coordinator.url,
            "FEDMKT_WORKER_TOKEN": TOKENS["worker"],
            "FEDMKT_MODEL": str(self.folder.parent / "llm"),
            "FEDMKT_STATE_DIR": str(self.folder / "state"),
            "FEDMKT_DEVICE": "cpu",
            "FEDMKT_STATUS_PORT": "0",
            "FEDMKT_REGISTRATION_INTERVAL_S": "0.1",
            **self.options,
        }
        launch = [sys.executable, "-m", "accelerate.commands.launch", *LAUNCH, "--dynamo_backend", "no"]
        command = [*launch, "--main_process_port", "0", "--max_restarts", "1", "-m", "fedmkt_llm_server"]
        with self._output.open("wb") as output:
            self.launcher = psutil.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)

    @property
    def _output(self) -> Path:
        return self.folder / "output"

    def process(self, rank: int) -> psutil.Process:
        (found,) = [each for each in self.launcher.children() if each.environ().get("RANK") == str(rank)]
        return found

    def log(self, event: str) -> list[dict[str, Any]]:
        lines = self._output.read_text(errors="replace").splitlines()
        read = [json.loads(line) for line in lines if line.startswith("{")]
        return [line for line in read if line["event"] == event]

    def status(self) -> Any:
        address = json.loads((self.folder / "state" / "status.json").read_text())
        url = f"http://127.0.0.1:{address['port']}"
        return {page: httpx.get(f"{url}/{page}").json() for page in ("healthz", "readyz", "status")}

    def until_halted(self) -> psutil.Process:
        leader = self.process(0)
        until(lambda: bool(leader.status() == psutil.STATUS_STOPPED), SOON_S)
        return leader

    def end(self) -> bool:
        """As an orchestrator stops it: a signal to the launcher alone. Says whether the server ended in good order."""
        self.launcher.send_signal(signal.SIGTERM)
        self.launcher.wait(60)
        return len(self.log("llm_server.stopped")) == 1


@dataclass
class Play:
    coordinator: LiveCoordinator
    folder: Path

    def begin(self, federation: FederationConfig, public_set: bytes = PUBLIC) -> tuple[str, Background]:
        """The federation, once the LLM server has joined it, and its one site's agent."""
        federation_id = self.coordinator.create(federation, public_set)
        with self.coordinator.client() as operator:
            until(lambda: operator.federation(federation_id).llm is not None, SOON_S)
        values: dict[str, Any] = {
            "coordinator_url": self.coordinator.url,
            "model": str(self.folder / "site"),
            "private_file": self.folder / "site.jsonl",
            "state_dir": self.folder / federation_id,
            "enrolment_token": self.coordinator.enrolment_token(federation_id, "north"),
            "poll_s": 1,
        }
        return federation_id, Background(serve_agent, AgentSettings(**values))

    def ask(self, federation_id: str, rounds: int) -> None:
        with self.coordinator.client() as operator:
            operator.request_rounds(federation_id, rounds)

    def results(self, federation_id: str, count: int) -> list[DistillResult]:
        ended = self.coordinator.wait_for_rounds(federation_id, count, timeout_s=SOON_S)
        assert [(each.state, each.reason) for each in ended] == [("completed", None)] * count
        return [each.llm_result for each in ended if each.llm_result is not None]

    def current(self, federation_id: str) -> RoundView:
        with self.coordinator.client() as operator:
            found = operator.federation(federation_id).current_round
        assert found is not None
        return found

    def server(self, model: str = "llm") -> Background:
        """An LLM server of one process, this one."""
        options: dict[str, Any] = {
            "coordinator_url": self.coordinator.url,
            "worker_token": TOKENS["worker"],
            "model": str(self.folder / model),
            "state_dir": self.folder / "alone",
            "torch_threads": 1,
            "registration_interval_s": 0.1,
        }
        return Background(serve_llm, LlmSettings(**options))

    def alone(self, federation: FederationConfig, rounds: int) -> list[DistillResult]:
        """The same rounds with a server of one process."""
        llm = self.server()
        federation_id, agent = self.begin(federation)
        self.ask(federation_id, rounds)
        found = self.results(federation_id, rounds)
        assert agent.end() is None
        assert llm.end() is None
        return found


@pytest.fixture
def play(tmp_path: Path) -> Iterator[Play]:
    save_tiny(tmp_path / "llm", "llama")
    save_tiny(tmp_path / "site", "gpt2", seed=1)
    (tmp_path / "site.jsonl").write_bytes(stories(100, 30))
    coordinator = LiveCoordinator(tmp_path / "coordinator", lease_s=5.0)
    coordinator.start()
    yield Play(coordinator, tmp_path)
    coordinator.stop()


@pytest.fixture
def launched(play: Play) -> Iterator[list[Launched]]:
    """What a test adds is gone after it."""
    made: list[Launched] = []
    yield made
    for each in made:
        family = [each.launcher, *each.launcher.children(recursive=True)] if each.launcher.is_running() else []
        for process in family:
            process.kill()
        psutil.wait_procs(family, timeout=30)


@pytest.mark.parametrize("killed", ["follower", "leader"])
def test_two_processes_are_one_server_and_a_killed_one_costs_no_more_than_a_checkpoint(
    play: Play, launched: list[Launched], killed: str
) -> None:
    """The leader halts after step 3 of round 2; there one of them is killed, and the launcher starts both again."""
    two = Launched(
        play.coordinator,
        play.folder / "two",
        {"FEDMKT_FAULT_POINT": f"stop {TRAINING} 11", "FEDMKT_CHECKPOINT_S": "0.000001"},
    )
    launched.append(two)
    federation_id, agent = play.begin(config("two", epochs=1))
    play.ask(federation_id, 2)
    leader = two.until_halted()
    if killed == "leader":
        leader.kill()
    else:
        two.process(1).kill()
        leader.resume()
    found = play.results(federation_id, 2)
    pages = two.status()
    assert agent.end() is None
    assert two.end()
    assert pages["readyz"] == {"status": "ok", "model": "llm", "device": "2 x cpu"}
    assert pages["status"]["job"] is None

    expected = play.alone(config("one", epochs=1), 2)
    assert [each["steps_done"] for each in two.log("checkpoint.resumed")] == [3]
    steps = [each.training.steps for each in found if each.training]
    assert steps == [8, 5], "five were left when the processes came back"
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.selection == theirs.selection
        assert ours.training is not None
        assert theirs.training is not None
        assert ours.training.last_loss_nats == pytest.approx(theirs.training.last_loss_nats, rel=1e-4)
        for domain, before in theirs.before.items():
            assert ours.before[domain].bits_per_byte == pytest.approx(before.bits_per_byte, rel=1e-4)
            assert ours.after[domain].bits_per_byte == pytest.approx(theirs.after[domain].bits_per_byte, rel=1e-4)


def test_a_cancelled_round_of_a_sharded_model_ends_the_step_on_both_and_the_next_goes_well(
    play: Play, launched: list[Launched]
) -> None:
    options = {"FEDMKT_FAULT_POINT": f"stop {TRAINING} 2", "FEDMKT_SHARD": "true"}
    two = Launched(play.coordinator, play.folder / "two", options)
    launched.append(two)
    federation_id, agent = play.begin(config("two", epochs=100))
    play.ask(federation_id, 1)
    leader = two.until_halted()
    headers = {"Authorization": f"Bearer {TOKENS['operator']}"}
    at = f"{play.coordinator.url}/v1/rounds/{play.current(federation_id).round_id}/cancel"
    assert httpx.post(at, headers=headers).json()["state"] == "cancelled"
    leader.resume()
    until(lambda: len(two.log("team.call_ended")) == 1, SOON_S)
    (ended,) = two.log("team.call_ended")
    assert ended["rank"] == 1
    assert ended["reason"].startswith("JobAbandoned: ")
    assert agent.end() is None
    short, second = play.begin(config("short", epochs=1))
    play.ask(short, 1)
    (result,) = play.results(short, 1)
    assert second.end() is None
    assert result.training is not None
    assert result.training.steps == 8
    assert two.end()


def test_a_model_that_gives_nan_fails_the_round_with_the_name_of_the_sample(play: Play) -> None:
    """One token of one public sample; every other sample is fine."""
    loaded = load_base(play.folder / "llm", device="cpu")
    with torch.no_grad():
        loaded.model.get_input_embeddings().weight[int(loaded.vocabulary.encode("€").ids[-1])] = torch.nan
    loaded.model.save_pretrained(play.folder / "broken")
    loaded.tokenizer.save_pretrained(play.folder / "broken")
    llm = play.server("broken")
    euros = b"".join(
        json.dumps({"id": f"euro{number}", "text": f"{number} \u20ac or more"}).encode() + b"\n" for number in range(3)
    )
    federation_id, agent = play.begin(config("broken", epochs=1), stories(0, 20) + euros)
    play.ask(federation_id, 1)
    (ended,) = play.coordinator.wait_for_rounds(federation_id, 1, timeout_s=SOON_S)
    assert agent.end() is None
    assert llm.end() is None
    assert ended.state == "failed"
    assert ended.reason is not None
    assert re.search(r"(knowledge|evaluation)\.\w+: sample 'euro\d'", ended.reason), ended.reason
