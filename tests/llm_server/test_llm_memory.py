"""Peak memory of a distil job, counted by the kernel in processes of its own: it grows neither with the number of sites
nor with rows times vocabulary.
"""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from fedmkt.knowledge import encode
from fedmkt.knowledge_cut import shared_knowledge
from fedmkt.ml.models import load_base
from fedmkt.ml.party import Party
from fedmkt.ml.phases import own_knowledge
from fedmkt.protocol import DistillJob, FederationConfig, KnowledgeConfig, PublicSetConfig, UploadedKnowledge
from fedmkt.public_set import PublicSet
from fedmkt.round_plan import RoundPlan
from fedmkt.vocab_map import build_vocab_map
from fedmkt_llm_server.distil import Desk, distil
from fedmkt_llm_server.llm import Llm
from fedmkt_llm_server.state import LlmState
from live_coordinator import stories, tiny_config
from tiny_models import POSITIONS, save_tiny

CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
MIB = 1 << 20
FEDERATION = "fed_0123456789abcdef"
SAMPLES, TEACHERS, LARGE = 240, 16, 32_000
# glibc gives every block of 256 KiB or more back at once: what it would keep differs from run to run
STEADY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 18), "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(not CLEAR.exists(), reason="only Linux counts the peak of a process anew"),
]


def save_large(small: Path, folder: Path) -> Path:
    """The small model with a vocabulary of LARGE tokens, of which the texts use the same few."""
    AutoTokenizer.from_pretrained(small).save_pretrained(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    table = content["model"]["vocab"]
    first = max(table.values()) + 1
    table |= {f"filler{index}": index for index in range(first, LARGE)}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    config = AutoConfig.from_pretrained(small)
    config.vocab_size = LARGE
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    assert len(PreTrainedTokenizerFast.from_pretrained(folder)) == LARGE
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory")
    save_tiny(folder / "site", "gpt2", seed=1)
    save_large(save_tiny(folder / "small", "llama"), folder / "large")
    return folder


def peak_mib(folder: Path, llm: str, teachers: int) -> dict[str, float]:
    """Of one job, above what its process held before; and what one site's knowledge takes."""
    command = [sys.executable, __file__, str(folder), llm, str(teachers)]
    path = os.pathsep.join(str(Path(__file__).resolve().parents[depth]) for depth in (0, 1))
    done = subprocess.run(
        command, env={**os.environ, **STEADY, "PYTHONPATH": path}, check=True, capture_output=True, text=True
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_sixteen_teachers_take_the_memory_of_two(folder: Path) -> None:
    two, sixteen = (peak_mib(folder, "small", teachers) for teachers in (2, TEACHERS))
    others = 14 * two["knowledge"]
    assert others > 20, "or nothing could be seen"
    assert sixteen["peak"] - two["peak"] < 0.25 * others


def test_rows_times_a_large_vocabulary_are_never_held(folder: Path) -> None:
    found = peak_mib(folder, "large", 2)
    assert found["logits"] > 500, "or nothing could be seen"
    assert found["peak"] < 0.5 * found["logits"]


# ------------------------------------------------------------------------------------------------ the child


class Job:
    """Everything that a job needs, in files."""

    def __init__(self, folder: Path, llm: str, teachers: int) -> None:
        self.folder = folder / f"{llm} {teachers}"
        self.folder.mkdir(exist_ok=True)
        self.sites = tuple(f"site{number}" for number in range(teachers))
        self.public = PublicSet.from_jsonl(stories(0, SAMPLES))
        self.config = config(self.sites)
        state = LlmState(self.folder / "state")
        self.llm = Llm(lambda: load_base(folder / llm, device="cpu"), state, gradient_checkpointing=False)
        self.desk = Desk(self.llm, state, self.fetch, self.store)
        self.site = Party(load_base(folder / "site", device="cpu"), self.config.lora, seed=0)
        vocab_map = build_vocab_map(self.site.vocabulary, self.llm.vocabulary, self.config.distillation.map_method)
        self.vocabulary_map = self.store(vocab_map.to_bytes())
        self.knowledge_mib = self.rows = 0.0

    def fetch(self, digest: str) -> Path:
        """A copy for the job, which may delete it."""
        copy = self.folder / f"copy {digest}"
        copy.write_bytes((self.folder / digest).read_bytes())
        return copy

    def store(self, data: bytes) -> str:
        digest = hashlib.sha256(data).hexdigest()
        (self.folder / digest).write_bytes(data)
        return digest

    def payload(self, number: int) -> DistillJob:
        plan = RoundPlan(FEDERATION, number, (number - 1) % 2, self.config, self.public)
        known = shared_knowledge(own_knowledge(self.site, plan, adapter_version=1), self.config.knowledge)
        self.knowledge_mib = sum(column.nbytes for column in (known.token_ids, known.logprobs)) / MIB
        self.rows = known.rows
        vocabulary = self.site.vocabulary
        shared: dict[str, Any] = {
            "knowledge": self.store(encode(known)),
            "vocabulary": vocabulary.fingerprint,
            "vocabulary_artifact": self.store(vocabulary.to_bytes()),
            "vocabulary_maps": {self.config.distillation.map_method: self.vocabulary_map},
            "private_samples": 5,
        }
        return DistillJob(
            federation_id=FEDERATION,
            round_id=f"round_{number:020x}",
            round_number=number,
            slice_index=plan.slice_index,
            config=self.config,
            public_set=self.store(self.public.to_jsonl()),
            adapter=None,
            uploads=tuple(UploadedKnowledge(site=site, **shared) for site in self.sites),
        )


def config(sites: tuple[str, ...]) -> FederationConfig:
    return tiny_config(
        sites,
        public_set=PublicSetConfig(slices=2, holdout_share=0.1),
        knowledge=KnowledgeConfig(max_tokens=POSITIONS, top_k=64, top_p=1.0),
    )


def _status(name: str) -> int:
    """Bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def _silent(step: str, done: int, total: int) -> None:
    """Nobody reads it."""


def _main(folder: str, llm: str, teachers: str) -> None:
    job = Job(Path(folder), llm, int(teachers))
    distil(job.payload(1), job.desk, _silent)  # libraries, threads, caches
    second = job.payload(2)
    CLEAR.write_text("5")
    before = _status("VmRSS")
    distil(second, job.desk, _silent)
    peak = (_status("VmHWM") - before) / MIB
    logits = job.rows * job.llm.vocabulary.size * 4 / MIB
    print(json.dumps({"peak": peak, "knowledge": job.knowledge_mib, "logits": logits}))


if __name__ == "__main__":
    _main(*sys.argv[1:])
