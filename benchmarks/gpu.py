"""Extraction, the KD step and its peak memory, a whole distil job, on one accelerator: `python -m benchmarks.gpu`.

See docs/benchmarks.md. bfloat16 on CUDA, a randomly initialised Llama with V = 128,256. `--shape tiny --device cpu`
runs the same code in seconds; there is no memory to report there.
"""

import argparse
import datetime
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import data
from benchmarks.contenders import dense_loss, dense_targets
from benchmarks.gpu_job import JobFigures, JobShape, job_figures, job_table
from benchmarks.harness import generated_part
from benchmarks.models import ONE_BILLION, TINY, Shape, random_party
from benchmarks.steps import StepShape, lesson_items, random_gold, random_teachings
from fedmkt.ml.batches import Batch, by_length, collate, tokenize
from fedmkt.ml.extraction import extract
from fedmkt.ml.head import row_hidden, row_logits
from fedmkt.ml.losses import chunked_losses, gold_and_sparse_losses
from fedmkt.ml.party import Party
from fedmkt.ml.plan import row_targets
from fedmkt.public_set import PublicSet
from fedmkt.vocabulary import Vocabulary

SHAPES = {"1b": ONE_BILLION, "tiny": TINY}
MIB = 1 << 20
Step = Callable[[], object]


@dataclass(frozen=True)
class Setting:
    """How much is measured, and the size of the vocabulary."""

    shape: Shape
    vocabulary: int
    samples: int
    tokens: int
    kept: int
    characters: int
    rounds: int
    job: JobShape


SETTINGS = {
    "1b": Setting(
        ONE_BILLION,
        128_256,
        samples=8,
        tokens=512,
        kept=128,
        characters=400_000,
        rounds=10,
        job=JobShape(samples=500, tokens=256),
    ),
    "tiny": Setting(
        TINY, 1_000, samples=2, tokens=24, kept=8, characters=2_000, rounds=2, job=JobShape(samples=12, tokens=32)
    ),
}


@dataclass(frozen=True)
class Figure:
    """One line: seconds by median, and the peak of allocated memory above what was allocated before; None on a CPU."""

    what: str
    size: str
    seconds: float
    peak_mib: float | None


def measure(what: str, size: str, step: Step, device: torch.device, rounds: int) -> Figure:
    """The first call warms (kernels, allocator) and does not count."""
    step()
    times = []
    before = _start_peak(device)
    for _ in range(rounds):
        _wait(device)
        start = time.perf_counter()
        step()
        _wait(device)
        times.append(time.perf_counter() - start)
    peak = None if before is None else (torch.cuda.max_memory_allocated(device) - before) / MIB
    return Figure(what, size, statistics.median(times), peak)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _start_peak(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


# ------------------------------------------------------------------------------------------------ what is measured


def extraction_figures(party: Party, setting: Setting) -> Iterator[Figure]:
    public_set = data.public_set(setting.characters)
    samples = tokenize(party.vocabulary, public_set.samples, setting.tokens)
    batch_tokens = setting.samples * setting.tokens
    chosen = [[samples[index] for index in indices] for indices in by_length(samples, batch_tokens)]
    batches = [collate(batch, party.device) for batch in chosen]
    size = f"{sum(len(sample.rows) for sample in samples):,} rows, k 64, top_p 0.98"

    def bare() -> None:
        with torch.inference_mode():
            for batch in batches:
                party.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)

    rounds = max(2, setting.rounds // 3)
    yield measure("bare forward pass", size, bare, party.device, rounds)
    yield measure("extraction", size, _extraction(party, public_set, setting, batch_tokens), party.device, rounds)


def _extraction(party: Party, public_set: PublicSet, setting: Setting, batch_tokens: int) -> Step:
    return lambda: extract(
        party,
        public_set,
        range(len(public_set)),
        federation_id="fed_" + "0" * 16,
        round_number=0,
        slice_index=0,
        adapter_version=0,
        top_k=64,
        top_p=0.98,
        max_tokens=setting.tokens,
        batch_tokens=batch_tokens,
    )


class Steps:
    """The forms of one step on the same model, batch and targets; each a forward and a backward pass with LoRA."""

    def __init__(self, party: Party, setting: Setting) -> None:
        self.party = party
        self.shape = StepShape(setting.samples, setting.tokens, party.vocabulary.size, setting.kept, teachers=1)
        self.items = lesson_items(self.shape, random_teachings(self.shape))
        self.taught = random_teachings(self.shape)
        self.batch = self._batch()

    def _batch(self) -> Batch:
        """Random tokens: T response rows of every sample, so T + 1 positions."""
        device, shape = self.party.device, self.shape
        ids = torch.randint(shape.vocabulary, (shape.samples, shape.tokens + 1), device=device)
        flat = torch.arange(shape.samples * (shape.tokens + 1), device=device).view(shape.samples, -1)
        gold = random_gold(shape).to(device)
        return Batch(ids, torch.ones_like(ids), flat[:, :-1].flatten(), gold)

    def forms(self) -> dict[str, Step]:
        return {
            "step, plain cross-entropy": self._whole(self._cross_entropy),
            "step, dense targets": self._whole(self._dense),
            "step, ours on logits": self._whole(self._sparse),
            "step, ours in chunks through the head": self._whole(self._chunked),
        }

    def _whole(self, loss: Callable[[], Tensor]) -> Step:
        def step() -> None:
            self.party.optimizer.zero_grad(set_to_none=True)
            with torch.autocast(self.party.device.type, torch.bfloat16, enabled=self.party.device.type == "cuda"):
                value = loss()
            torch.autograd.backward(value)

        return step

    def _logits(self) -> Tensor:
        return row_logits(self.party.model, self.party.head, self.batch)

    def _cross_entropy(self) -> Tensor:
        return torch.nn.functional.cross_entropy(self._logits().float(), self.batch.gold)

    def _dense(self) -> Tensor:
        device = self.party.device
        ids, probs = self.taught.ids[0].to(device), self.taught.probs[0].to(device)
        targets = dense_targets([ids], [probs], self.taught.losses.to(device), self.shape.vocabulary)
        return dense_loss(self._logits().float(), self.batch.gold, targets.flatten(0, 1))

    def _sparse(self) -> Tensor:
        soft = row_targets(self.items, self.party.device)
        nll, distilled = gold_and_sparse_losses(self._logits(), self.batch.gold, soft.ids, soft.probs, soft.residual)
        return (soft.gold_weight * nll + soft.soft_weight * distilled).sum()

    def _chunked(self) -> Tensor:
        plain, soft = self.party.plain_head, row_targets(self.items, self.party.device)
        assert plain is not None
        hidden = row_hidden(self.party.model, self.party.head, self.batch)
        nll, distilled = chunked_losses(
            hidden, plain.weight, plain.bias, self.batch.gold, soft.ids, soft.probs, soft.residual
        )
        return (soft.gold_weight * nll + soft.soft_weight * distilled).sum()


def _vocabulary(name: str) -> Vocabulary:
    return data.vocabulary("llama3") if name == "1b" else data.generated_vocabulary(SETTINGS[name].vocabulary, 0)


def run_job(name: str, device: torch.device) -> JobFigures:
    """A whole distil job of the setting, by the LLM server's own code."""
    setting = SETTINGS[name]
    return job_figures(setting.shape, _vocabulary(name), setting.job, device)


def run(name: str, device: torch.device) -> list[Figure]:
    """Every figure of a setting but those of the job."""
    setting, vocabulary = SETTINGS[name], _vocabulary(name)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    party = random_party(setting.shape, vocabulary, device=str(device), dtype=dtype, lora=True)
    _ = party.plain_head
    figures = list(extraction_figures(party, setting))
    party.model.train(True)
    steps = Steps(party, setting)
    for what, step in steps.forms().items():
        figures.append(measure(what, str(steps.shape), step, device, setting.rounds))
    return figures


# ------------------------------------------------------------------------------------------------ the report


def table(figures: Sequence[Figure]) -> list[str]:
    """Markdown lines; each figure also as a multiple of the plain one of its kind."""
    lines = ["| what | size | seconds | x plain | peak MiB | x plain |", "|---|---|--:|--:|--:|--:|"]
    plain: dict[str, Figure] = {}
    for figure in figures:
        base = plain.setdefault(figure.size, figure)  # the first of each size is the plain one
        peak = "" if figure.peak_mib is None else f"{figure.peak_mib:,.0f}"
        more = f"{figure.peak_mib / base.peak_mib:.2f}" if figure.peak_mib and base.peak_mib else ""
        times = f"{figure.seconds:.4g} | {figure.seconds / base.seconds:.2f}"
        lines.append(f"| {figure.what} | {figure.size} | {times} | {peak} | {more} |")
    return lines


def _machine(device: torch.device, name: str) -> str:
    what = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    today = datetime.datetime.now(datetime.UTC).date()
    return f"{today}, {what}, torch {torch.__version__}, {SHAPES[name].name}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", choices=sorted(SETTINGS), default="1b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--write-docs", action="store_true", help="put the table into docs/benchmarks.md")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    figures, job = run(arguments.shape, device), run_job(arguments.shape, device)
    lines = [_machine(device, arguments.shape), "", *table(figures), "", *job_table(job)]
    print("\n".join(lines))
    if arguments.out:
        content = {"figures": [asdict(figure) for figure in figures], "job": asdict(job)}
        arguments.out.write_text(json.dumps(content, indent=2) + "\n")
    if arguments.write_docs:
        with generated_part("gpu") as document:
            document += lines


if __name__ == "__main__":
    main()
