"""Several processes that share every batch take the same steps as one process. Real processes, on the CPU (gloo)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fedmkt.ml import training
from fedmkt.ml.models import load_base
from fedmkt.ml.party import Party
from fedmkt.ml.training import train_private
from fedmkt.protocol import LoraConfig, OptimizerConfig
from fedmkt.public_set import PublicSample
from tiny_models import save_tiny, story

SAMPLES = [PublicSample(f"s{number}", story(number)[: 30 + 4 * number], 0, True) for number in range(7)]
CONFIG = OptimizerConfig(batch_size=3, learning_rate=1e-3)  # the last batch has fewer samples than there are processes


def run(folder: Path, lora: LoraConfig | None, *, chunked: bool) -> tuple[list[float], torch.Tensor]:
    """Losses of all steps and the trained weights."""
    losses: list[float] = []
    party = Party(load_base(folder, device="cpu"), lora, seed=0)
    if chunked:
        training.CHUNK_LOGITS = 0  # the LM head outside of the model's own forward pass
    train_private(
        party,
        SAMPLES,
        optimizer=CONFIG,
        epochs=2,
        seed=0,
        micro_batch_tokens=60,
        progress=lambda done, total, loss: losses.append(loss),
    )
    return losses, torch.cat([parameter.detach().flatten() for parameter in party.weights.values()])


def _worker(folder: Path, out: Path) -> None:
    """What each process runs."""
    results = {}
    for name, lora, chunked in (("lora", LoraConfig(rank=2), False), ("full", None, True)):
        losses, weights = run(folder, lora, chunked=chunked)
        results[name] = [losses, weights.tolist()]
    (out / f"{os.environ['RANK']}.json").write_text(json.dumps(results))


def test_two_processes_take_the_steps_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny(tmp_path / "llama", "llama")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run(
        [*launch, __file__, str(folder), str(tmp_path)],
        check=True,
        timeout=110,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )
    monkeypatch.setattr(training, "CHUNK_LOGITS", training.CHUNK_LOGITS)  # put back whatever run() sets
    for name, lora, chunked in (("lora", LoraConfig(rank=2), False), ("full", None, True)):
        losses, weights = run(folder, lora, chunked=chunked)
        for rank in ("0", "1"):
            theirs = json.loads((tmp_path / f"{rank}.json").read_text())[name]
            assert theirs[0] == pytest.approx(losses, rel=1e-5)
            torch.testing.assert_close(torch.tensor(theirs[1]), weights, rtol=1e-3, atol=2e-5)


if __name__ == "__main__":
    _worker(Path(sys.argv[1]), Path(sys.argv[2]))
