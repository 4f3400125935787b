"""Several processes that share every batch do the work of one process. Real processes, on the CPU (gloo)."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch

from fedmkt.ml import training
from fedmkt.ml.evaluation import evaluate
from fedmkt.ml.extraction import extract
from fedmkt.ml.following import follow
from fedmkt.ml.models import load_base
from fedmkt.ml.party import Party
from fedmkt.ml.quantization import NoQuantization
from fedmkt.ml.team import ALONE, Team, TeamMisused
from fedmkt.ml.training import TrainingDiverged, train_private
from fedmkt.protocol import LoraConfig, OptimizerConfig
from fedmkt.public_set import PublicSample, PublicSet
from tiny_models import save_tiny, story

SAMPLES = [PublicSample(f"s{number}", story(number)[: 30 + 4 * number], 0, True) for number in range(7)]
EURO = PublicSample("euro", "12 € or 20", 0, False)
CONFIG = OptimizerConfig(batch_size=3, learning_rate=1e-3)  # the last batch has fewer samples than there are processes
LORA = LoraConfig(rank=2)
CHUNK_LOGITS = training.CHUNK_LOGITS


class Cancelled(Exception):
    """What a leader's progress may raise."""


@dataclass
class Found:
    """What a leader saw."""

    losses: list[float]
    weights: list[float]
    gold_logprobs: list[float]
    bits_per_byte: list[float]
    steps_after_cancel: int
    refusal: str
    numbers_held: int


def party(folder: Path, lora: LoraConfig | None, team: Team, *, checkpointing: bool = False) -> Party:
    loaded = load_base(folder, device="cpu", team=team)
    return Party(loaded, lora, seed=0, gradient_checkpointing=checkpointing)


def lead(led: Party) -> Found:
    """Knowledge, quality, training, quality again; a training that is cancelled, and one that meets a NaN."""
    gold = knowledge(led)
    bits = [evaluate(led, SAMPLES, batch_tokens=60)["all"].bits_per_byte]
    losses: list[float] = []
    train(led, lambda done, total, loss: losses.append(loss))
    bits.append(evaluate(led, SAMPLES, batch_tokens=60)["all"].bits_per_byte)
    weights = torch.cat([parameter.detach().flatten() for parameter in led.weights.values()]).tolist()
    steps = led.steps

    def cancel(done: int, total: int, loss: float) -> None:
        if done == 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        train(led, cancel)
    after = led.steps - steps
    return Found(losses, weights, gold, bits, after, refusal(led), sum(_local(p) for p in led.model.parameters()))


def _local(parameter: torch.Tensor) -> int:
    held = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return int(held.numel())


def knowledge(led: Party) -> list[float]:
    found = extract(
        led,
        PublicSet(tuple(SAMPLES)),
        range(len(SAMPLES)),
        federation_id="fed_0123456789abcdef",
        round_number=1,
        slice_index=0,
        adapter_version=0,
        top_k=8,
        top_p=1.0,
        max_tokens=96,
        batch_tokens=60,  # several batches, of which the last round has fewer than processes
    )
    values: list[float] = found.gold_logprobs.tolist() + found.logprobs.tolist()
    return values


def train(led: Party, progress: Callable[[int, int, float], None] | None, extra: tuple[PublicSample, ...] = ()) -> None:
    train_private(led, [*SAMPLES, *extra], optimizer=CONFIG, epochs=2, seed=0, micro_batch_tokens=60, progress=progress)


def refusal(led: Party) -> str:
    """The text of every process has a sample on which the model fails: whoever gets it, the leader names it."""
    if tied(led):
        return ""
    poison(led)
    with pytest.raises(TrainingDiverged, match="the loss is not finite on samples 'euro';") as refused:
        train(led, None, (EURO,))
    return str(refused.value)


def poison(led: Party) -> None:
    """A token that the other samples lack gives NaN."""
    with torch.no_grad():
        led.model.get_input_embeddings().weight[int(led.vocabulary.encode("€").ids[-1])] = math.nan


def tied(led: Party) -> bool:
    """Then a NaN in one embedding is one in every row of logits."""
    return bool(led.model.config.tie_word_embeddings)


@dataclass(frozen=True)
class Arm:
    architecture: str = "llama"
    lora: LoraConfig | None = LORA
    sharded: bool = False
    chunked: bool = False  # the LM head outside of the model's own forward pass
    checkpointing: bool = False


ARMS = {
    "lora": Arm(),
    "full": Arm(lora=None, chunked=True),
    "sharded": Arm("qwen2", sharded=True, chunked=True),  # head and embedding are one
    "sharded and checkpointing": Arm(sharded=True, checkpointing=True),
}


def _worker(root: Path) -> None:
    """What each process runs: every arm in turn."""
    team = Team.form("cpu")
    for name, arm in ARMS.items():
        team.sharded = arm.sharded
        training.CHUNK_LOGITS = 0 if arm.chunked else CHUNK_LOGITS
        made = party(root / arm.architecture, arm.lora, team, checkpointing=arm.checkpointing)
        if team.leads:
            (root / f"{name}.json").write_text(json.dumps(asdict(lead(made))))
            team.announce(None)
        else:
            if not tied(made):
                poison(made)
            follow(team, lambda lora, seed, made=made: made)  # type: ignore[misc]  # the arm's own
    team.end()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, and what two processes found in every arm."""
    root = tmp_path_factory.mktemp("team")
    for architecture in {arm.architecture for arm in ARMS.values()}:
        save_tiny(root / architecture, architecture)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    subprocess.run([*launch, __file__, str(root)], check=True, timeout=280, env=environment)
    return root


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ARMS)
def test_two_processes_do_the_work_of_one(root: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    arm = ARMS[name]
    monkeypatch.setattr(training, "CHUNK_LOGITS", 0 if arm.chunked else CHUNK_LOGITS)
    theirs = Found(**json.loads((root / f"{name}.json").read_text()))
    ours = lead(party(root / arm.architecture, arm.lora, ALONE))
    assert len(ours.losses) == 5
    assert theirs.losses == pytest.approx(ours.losses, rel=1e-5)
    torch.testing.assert_close(torch.tensor(theirs.weights), torch.tensor(ours.weights), rtol=1e-3, atol=2e-5)
    assert theirs.gold_logprobs == pytest.approx(ours.gold_logprobs, abs=1e-5)
    assert theirs.bits_per_byte == pytest.approx(ours.bits_per_byte, rel=1e-5)
    assert theirs.steps_after_cancel == ours.steps_after_cancel == 2
    assert theirs.refusal == ours.refusal
    assert (theirs.numbers_held < 0.9 * ours.numbers_held) is arm.sharded


def test_a_sharded_model_is_neither_trained_whole_nor_held_in_fewer_bits(root: Path) -> None:
    team = Team()
    team.sharded = True
    with pytest.raises(TeamMisused, match="trains LoRA layers alone, the federation has lora null"):
        party(root / "llama", None, team)
    with pytest.raises(NoQuantization, match="leave one of quantize and shard out"):
        load_base(root / "llama", device="cpu", quantize="4bit", team=team)


def test_a_process_alone_cannot_shard_its_model() -> None:
    with pytest.raises(TeamMisused, match="this is the only one"):
        Team.form("cpu", sharded=True)


if __name__ == "__main__":
    _worker(Path(sys.argv[1]))
