"""A whole distil job by the LLM server's own code, beside bare forward and backward passes of the same model."""

import hashlib
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks import data
from benchmarks.models import Shape, random_base
from fedmkt.knowledge import encode
from fedmkt.knowledge_cut import shared_knowledge
from fedmkt.ml.batches import by_length, collate, tokenize
from fedmkt.ml.models import load_base
from fedmkt.ml.party import Party
from fedmkt.ml.phases import own_knowledge
from fedmkt.protocol import DistillJob, FederationConfig, KnowledgeConfig, PublicSetConfig, UploadedKnowledge
from fedmkt.public_set import PublicSample, PublicSet
from fedmkt.round_plan import RoundPlan
from fedmkt.vocab_map import build_vocab_map
from fedmkt.vocabulary import Vocabulary
from fedmkt_llm_server.distil import Desk, distil
from fedmkt_llm_server.llm import Llm
from fedmkt_llm_server.state import LlmState

FEDERATION, SITES = "fed_0123456789abcdef", ("north", "south")
CHARACTERS_A_TOKEN = 8  # more than any text has: every sample is cut at its tokens
MIB = 1 << 20


@dataclass(frozen=True)
class JobShape:
    samples: int
    tokens: int


@dataclass(frozen=True)
class JobFigures:
    """One job. peak_mib, busy (share of the time that the device worked, while training): None on a CPU."""

    samples: int
    tokens: int  # that were trained on
    job_seconds: float
    train_seconds: float
    bare_seconds: float  # of forward and backward passes over the same tokens, and nothing else
    peak_mib: float | None
    busy: float | None


def job_figures(shape: Shape, vocabulary: Vocabulary, job: JobShape, device: torch.device) -> JobFigures:
    """Play the job twice: the first time warms kernels and measures what fits, the second one counts."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        base = random_base(shape, vocabulary, device="cpu", dtype=dtype)
        base.model.save_pretrained(folder / "llm")
        base.tokenizer.save_pretrained(folder / "llm")
        del base
        server = _Server(folder, job, device)
        first, second = (server.payload(number) for number in (1, 2))
        distil(first, server.desk, _silent)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        began = time.perf_counter()
        with _busy(device) as seen:
            result = distil(second, server.desk, _silent)
        seconds = time.perf_counter() - began
        assert result.training is not None
        peak = torch.cuda.max_memory_allocated(device) / MIB if device.type == "cuda" else None
        tokens, bare_seconds = server.bare_pass()
    return JobFigures(
        samples=result.training.samples,
        tokens=tokens,
        job_seconds=seconds,
        train_seconds=result.phase_seconds["train"],
        bare_seconds=bare_seconds,
        peak_mib=peak,
        busy=sum(seen) / len(seen) / 100 if seen else None,
    )


def job_table(job: JobFigures) -> list[str]:
    """Markdown lines."""
    peak = "" if job.peak_mib is None else f"{job.peak_mib:,.0f}"
    busy = "" if job.busy is None else f"{job.busy:.0%}"
    rows = [
        ("bare forward and backward passes", job.bare_seconds, "", ""),
        ("the job's training", job.train_seconds, "", ""),
        ("the whole job", job.job_seconds, peak, busy),
    ]
    lines = [
        f"| {what} | {seconds:.4g} | {job.tokens / seconds:,.0f} | {job.bare_seconds / seconds:.2f} | {peak} | {busy} |"
        for what, seconds, peak, busy in rows
    ]
    size = f"{job.samples} samples, {job.tokens:,} tokens"
    return [
        f"| {size} | seconds | tokens/s | of bare rate | peak MiB | GPU busy |",
        "|---|--:|--:|--:|--:|--:|",
        *lines,
    ]


@contextmanager
def _busy(device: torch.device) -> Iterator[list[float]]:
    """Percent of the time that the device computed, once a second while inside."""
    seen: list[float] = []
    if device.type != "cuda":
        yield seen
        return
    query = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-l", "1", "-i"]
    process = subprocess.Popen([*query, str(device.index or 0)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = process.stdout
    reader = threading.Thread(target=lambda: seen.extend(float(line) for line in lines), daemon=True)
    reader.start()
    try:
        yield seen
    finally:
        process.terminate()
        process.wait()
        reader.join()


def _silent(step: str, done: int, total: int) -> None:
    """Nobody reads it."""


def _public_set(job: JobShape) -> PublicSet:
    """`samples` texts for each of two rounds, each longer than the tokens at which it is cut."""
    texts = [sample.text for sample in data.public_set(200_000).samples]
    length, pool = job.tokens * CHARACTERS_A_TOKEN, cycle(texts)
    made = []
    for number in range(2 * job.samples):
        text = " ".join(islice(pool, 1 + length // min(map(len, texts))))[:length]
        made.append(PublicSample(f"s{number}", f"{number} {text}", 0, True))
    return PublicSet(tuple(made))


@dataclass
class _Server:
    """A desk over two folders, and jobs for it: two sites whose models are the LLM as it was."""

    folder: Path
    job: JobShape
    device: torch.device
    config: FederationConfig = field(init=False)

    def __post_init__(self) -> None:
        self.config = FederationConfig(
            name="gpu",
            sites=SITES,
            public_set=PublicSetConfig(slices=2, holdout_share=0),
            knowledge=KnowledgeConfig(max_tokens=self.job.tokens),
        )
        self.public = _public_set(self.job)
        state = LlmState(self.folder / "state")
        self.llm = Llm(
            lambda: load_base(self.folder / "llm", device=str(self.device)), state, gradient_checkpointing=False
        )
        self.desk = Desk(self.llm, state, self._fetch, self._store)

    def payload(self, number: int) -> DistillJob:
        plan = RoundPlan(FEDERATION, number, number - 1, self.config, self.public)
        known = shared_knowledge(own_knowledge(self._party(), plan, adapter_version=0), self.config.knowledge)
        vocabulary, method = self.llm.vocabulary, self.config.distillation.map_method
        site: dict[str, Any] = {
            "knowledge": self._store(encode(known)),
            "vocabulary": vocabulary.fingerprint,
            "vocabulary_artifact": self._store(vocabulary.to_bytes()),
            "vocabulary_maps": {method: self._store(build_vocab_map(vocabulary, vocabulary, method).to_bytes())},
            "private_samples": 1,
        }
        return DistillJob(
            federation_id=FEDERATION,
            round_id=f"round_{number:020x}",
            round_number=number,
            slice_index=plan.slice_index,
            config=self.config,
            public_set=self._store(self.public.to_jsonl()),
            adapter=None,
            uploads=tuple(UploadedKnowledge(site=name, **site) for name in SITES),
        )

    def bare_pass(self) -> tuple[int, float]:
        """Tokens of the second round, and seconds of nothing but the model's passes over them, in the job's batches."""
        party = self._party()
        plan = RoundPlan(FEDERATION, 2, 1, self.config, self.public)
        chosen = [self.public.samples[index] for index in plan.samples]
        samples = tokenize(party.vocabulary, chosen, self.job.tokens)
        size = self.config.llm_optimizer.batch_size
        steps = [samples[start : start + size] for start in range(0, len(samples), size)]
        batches = [
            collate([step[index] for index in indices], party.device)
            for step in steps
            for indices in by_length(step, party.pass_tokens or size * self.job.tokens)
        ]
        party.model.train(True)
        began = time.perf_counter()
        for batch in batches:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                logits = party.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
            loss = F.cross_entropy(logits.logits.flatten(0, 1)[batch.places].float(), batch.gold)
            torch.autograd.backward(loss)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        party.optimizer.zero_grad(set_to_none=True)
        party.model.train(False)
        return sum(len(sample.ids) for sample in samples), time.perf_counter() - began

    def _party(self) -> Party:
        return self.llm.party(self.config, None, lambda: b"")

    def _fetch(self, digest: str) -> Path:
        """A copy for the job, which may delete it."""
        copy = self.folder / f"copy {digest}"
        copy.write_bytes((self.folder / digest).read_bytes())
        return copy

    def _store(self, content: bytes) -> str:
        digest = hashlib.sha256(content).hexdigest()
        (self.folder / digest).write_bytes(content)
        return digest
