"""One step loop for everything that trains: private text, and public text with soft targets and private replay.

Server and sites run this same code. DESIGN.md 5.6; the loss is FedMKT's lambda * CE + (1 - lambda) * KD (arXiv
2406.02224, section 3.3), a mean over response rows.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import ClassVar

import numpy as np
import torch
from accelerate import Accelerator  # type: ignore[import-untyped]  # ships no annotations
from torch import Tensor, nn

from fedmkt.errors import Refusal
from fedmkt.lesson import Lesson
from fedmkt.ml.batches import by_length, check_positions, collate, tokenize
from fedmkt.ml.head import row_hidden, row_logits
from fedmkt.ml.losses import CHUNK_LOGITS, chunked_losses, gold_and_sparse_losses
from fedmkt.ml.party import Party
from fedmkt.ml.plan import Item, Part, batches, row_targets, step_count
from fedmkt.protocol import OptimizerConfig, TrainingReport
from fedmkt.public_set import PublicSample, PublicSet

MICRO_BATCH_TOKENS = 16384  # padded tokens in one forward and backward pass; more of them accumulate in one step
Progress = Callable[[int, int, float], None]  # steps done, steps in all, loss in nats


class TrainingDiverged(Refusal):
    code: ClassVar[str] = "training.nan"
    title: ClassVar[str] = "Training met a loss that is not finite"


def train_private(
    party: Party,
    samples: Sequence[PublicSample],
    *,
    optimizer: OptimizerConfig,
    epochs: float,
    seed: int,
    max_tokens: int = 512,
    micro_batch_tokens: int = MICRO_BATCH_TOKENS,
    steps_done: int = 0,
    progress: Progress | None = None,
) -> TrainingReport:
    """Supervised training on a site's own samples: the mean loss of a batch's response rows.

    Takes `step_count(len(samples), optimizer.batch_size, epochs)` steps. Order and dropout follow from `seed` and the
    steps that the party had taken before this call. `steps_done` resumes: a party that was saved after that many steps
    of this very call ends bit for bit where an unbroken run ends. Raises NothingToLearn, TrainingDiverged.
    """
    part = Part(tokenize(party.vocabulary, samples, party.usable_tokens(max_tokens)))
    loop = _Loop(party, optimizer, temperature=1.0, residual_bucket=True, micro_batch_tokens=micro_batch_tokens)
    return loop.run([part], epochs, seed, steps_done, progress)


def train_on_lesson(
    party: Party,
    public_set: PublicSet,
    lesson: Lesson,
    *,
    gold_weight: float,
    temperature: float,
    residual_bucket: bool,
    optimizer: OptimizerConfig,
    epochs: float,
    seed: int,
    max_tokens: int,
    replay: Sequence[PublicSample] | None = None,
    public_weight: float = 0.2,
    micro_batch_tokens: int = MICRO_BATCH_TOKENS,
    steps_done: int = 0,
    progress: Progress | None = None,
) -> TrainingReport:
    """Learn from a lesson: gold_weight * CE on every response row, (1 - gold_weight) * KD on supervised rows.

    Both are divided by the batch's response rows, so samples that nobody teaches keep their supervised term alone. With
    `replay`, as many private samples join every batch: public_weight * public + (1 - public_weight) * private; without
    it, the public part has weight 1. `max_tokens` as in `prepare_lesson`. Takes
    `step_count(len(lesson.samples), optimizer.batch_size, epochs)` steps; the rest as in `train_private`. Raises
    NothingToLearn, LessonRowsDiffer, SampleTooLong, TrainingDiverged.
    """
    chosen = [public_set.samples[index] for index in lesson.samples.tolist()]
    public = tokenize(party.vocabulary, chosen, max_tokens)
    check_positions(public, party.positions)
    weight = 1.0 if replay is None else public_weight
    parts = [Part(public, weight, gold_weight, lesson.targets)]
    if replay is not None:
        parts.append(Part(tokenize(party.vocabulary, replay, party.usable_tokens(max_tokens)), 1 - public_weight))
    loop = _Loop(party, optimizer, temperature, residual_bucket, micro_batch_tokens)
    return loop.run(parts, epochs, seed, steps_done, progress)


class _Loop:
    """Steps of one call. Under `accelerate launch` every process takes its share of each batch."""

    def __init__(
        self,
        party: Party,
        config: OptimizerConfig,
        temperature: float,
        residual_bucket: bool,
        micro_batch_tokens: int,
    ) -> None:
        self.party, self.config = party, config
        self.temperature, self.residual_bucket = temperature, residual_bucket
        self.micro_batch_tokens = micro_batch_tokens
        on_cuda = party.device.type == "cuda"
        self.accelerator = Accelerator(mixed_precision="bf16" if on_cuda else "no", cpu=party.device.type == "cpu")
        self.model: nn.Module = party.model

    def run(
        self, parts: list[Part], epochs: float, seed: int, steps_done: int, progress: Progress | None
    ) -> TrainingReport:
        began, losses, drawn = time.monotonic(), [], 0
        first_step = self.party.steps - steps_done
        size = self.config.batch_size
        total = step_count(len(parts[0].samples), size, epochs)
        rng = np.random.default_rng([seed, first_step])
        with self._training():
            for number, items in enumerate(batches(parts, size, epochs, rng)):
                if number < steps_done:
                    continue
                torch.manual_seed(_dropout_seed(seed, first_step + number))
                losses.append(self._step(items))
                drawn += len(items)
                if progress is not None:
                    progress(number + 1, total, losses[-1])
        return TrainingReport(
            steps=len(losses),
            samples=drawn,
            seconds=time.monotonic() - began,
            first_loss_nats=losses[0] if losses else None,
            last_loss_nats=losses[-1] if losses else None,
        )

    @contextmanager
    def _training(self) -> Iterator[None]:
        """The model in training mode and spread over processes; random state and mode are put back after."""
        model, devices = self.party.model, [self.party.device] if self.party.device.type == "cuda" else []
        _ = self.party.plain_head
        try:
            with torch.random.fork_rng(devices):
                model.train(True)
                if self.accelerator.num_processes > 1:
                    self.model = self.accelerator.prepare_model(model)
                yield
        finally:
            self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
            self.party.optimizer.zero_grad(set_to_none=True)
            model.train(False)

    def _step(self, items: list[Item]) -> float:
        """One optimizer step on a batch; returns its loss. A batch without any response row only counts."""
        if not items:
            self.party.steps += 1
            return 0.0
        mine = self._share(items)
        micro = by_length([item.sample for item in mine], self.micro_batch_tokens)
        loss = torch.zeros((), device=self.party.device)
        for number, indices in enumerate(micro):
            last = number == len(micro) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                part = self._loss([mine[index] for index in indices])
                # data parallel training averages gradients over processes; ours are shares of one sum
                self.accelerator.backward(part * self.accelerator.num_processes)
            loss += part.detach()
        if self.accelerator.num_processes > 1:
            loss = self.accelerator.reduce(loss, "sum")
        self._update(items)
        return float(loss)

    def _share(self, items: list[Item]) -> list[Item]:
        """This process's items; one of weight 0 where there are fewer items than processes: all must take part."""
        accelerator = self.accelerator
        mine = items[accelerator.process_index :: accelerator.num_processes]
        return mine or [replace(items[0], row_weight=0.0)]

    def _loss(self, items: list[Item]) -> Tensor:
        batch = collate([item.sample for item in items], self.party.device)
        targets = row_targets(items, self.party.device)
        residual = targets.residual if self.residual_bucket else None
        soft = (batch.gold, targets.ids, targets.probs, residual, self.temperature)
        size, head, plain = self.party.vocabulary.size, self.party.head, self.party.plain_head
        with self.accelerator.autocast():
            if plain is not None and len(batch.places) * size > CHUNK_LOGITS:
                hidden, cut = row_hidden(self.model, head, batch), plain.cut(size)
                nll, distilled = chunked_losses(hidden, cut.weight, cut.bias, *soft)
            else:
                nll, distilled = gold_and_sparse_losses(row_logits(self.model, head, batch)[:, :size], *soft)
        rows = targets.gold_weight * nll + targets.soft_weight * distilled
        if not rows.isfinite().all():
            raise self._diverged(items, rows)
        return rows.sum()

    def _diverged(self, items: list[Item], rows: Tensor) -> TrainingDiverged:
        owners = np.repeat(np.arange(len(items)), [len(item.sample.rows) for item in items])
        bad = sorted({items[owner].sample.id for owner in owners[(~rows.isfinite()).cpu().numpy()]})
        return TrainingDiverged(
            f"step {self.party.steps + 1}: the loss is not finite on {_named(bad)}; go back to the last good adapter "
            "and lower the learning rate, or leave these samples out"
        )

    def _update(self, items: list[Item]) -> None:
        party, config = self.party, self.config
        norm = self.accelerator.clip_grad_norm_(list(party.weights.values()), config.max_grad_norm)
        if not math.isfinite(float(norm)):
            raise TrainingDiverged(
                f"step {party.steps + 1}: the gradient is not finite on a batch of "
                f"{_named(sorted({item.sample.id for item in items}))}; lower the learning rate"
            )
        warmed = min(1.0, (party.steps + 1) / max(1, config.warmup_steps))
        for group in party.optimizer.param_groups:
            group["lr"] = config.learning_rate * warmed
            group["weight_decay"] = config.weight_decay if group["decay"] else 0.0
        party.optimizer.step()
        party.optimizer.zero_grad(set_to_none=True)
        party.steps += 1


def _dropout_seed(seed: int, step: int) -> int:
    """One dropout seed for each step, so that a resumed run draws what an unbroken one draws."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> 1)


def _named(ids: Sequence[str]) -> str:
    shown = ", ".join(repr(sample_id) for sample_id in ids[:5])
    return f"samples {shown}" + (f" and {len(ids) - 5} more" if len(ids) > 5 else "")
