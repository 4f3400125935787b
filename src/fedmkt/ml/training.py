"""One step loop for everything that trains: private text, and public text with soft targets and private replay.

Server and sites run this same code. DESIGN.md 5.6; the loss is FedMKT's lambda * CE + (1 - lambda) * KD (arXiv
2406.02224, section 3.3), a mean over response rows.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from accelerate import Accelerator  # type: ignore[import-untyped]  # ships no annotations
from torch import Tensor

from fedmkt.errors import Refusal
from fedmkt.lesson import Lesson
from fedmkt.ml.batches import by_length, check_positions, collate, tokenize
from fedmkt.ml.following import lead
from fedmkt.ml.head import row_hidden, row_logits
from fedmkt.ml.losses import CHUNK_LOGITS, chunked_losses, gold_and_sparse_losses
from fedmkt.ml.memory import MOST_TOKENS, tokens_at_once
from fedmkt.ml.party import Party
from fedmkt.ml.plan import Item, Part, batches, row_targets, step_count
from fedmkt.ml.schedule import set_rates
from fedmkt.protocol import OptimizerConfig, TrainingReport
from fedmkt.public_set import PublicSample, PublicSet

log = logging.getLogger(__name__)

MICRO_BATCH_TOKENS = MOST_TOKENS  # padded tokens in one forward and backward pass; more of them accumulate in one step
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
    micro_batch_tokens: int | None = None,
    steps_done: int = 0,
    progress: Progress | None = None,
) -> TrainingReport:
    """Supervised training on a site's own samples: the mean loss of a batch's response rows.

    Takes `step_count(len(samples), optimizer.batch_size, epochs)` steps. Order and dropout follow from `seed` and the
    steps that the party had taken before this call. `steps_done` resumes: a party that was saved after that many steps
    of this very call ends bit for bit where an unbroken run ends. `micro_batch_tokens` pass the model at once; None for
    as many as memory holds, which the party's first training measures. Raises NothingToLearn, TrainingDiverged.
    """
    part = Part(tokenize(party.vocabulary, samples, party.usable_tokens(max_tokens)))
    tokens = micro_batch_tokens or party.pass_tokens
    return lead(party, _Training((part,), optimizer, epochs, seed, steps_done, tokens), progress)


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
    micro_batch_tokens: int | None = None,
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
    training = _Training(
        tuple(parts),
        optimizer,
        epochs,
        seed,
        steps_done,
        micro_batch_tokens or party.pass_tokens,
        temperature,
        residual_bucket,
    )
    return lead(party, training, progress)


@dataclass(frozen=True)
class _Training:
    """What is trained, by every process of the party's team alike."""

    parts: tuple[Part, ...]
    config: OptimizerConfig
    epochs: float
    seed: int
    steps_done: int
    micro_batch_tokens: int | None
    temperature: float = 1.0
    residual_bucket: bool = True
    trains: ClassVar[bool] = True

    def run(self, party: Party, told: Progress | None) -> TrainingReport:
        return _Loop(party, self).run(told)


class _Loop:
    """Steps of one call. In a team every process takes its share of each batch."""

    def __init__(self, party: Party, training: _Training) -> None:
        self.party, self.training, self.team = party, training, party.team
        on_cuda = party.device.type == "cuda"
        self.accelerator = Accelerator(mixed_precision="bf16" if on_cuda else "no", cpu=party.device.type == "cpu")
        self.refused: TrainingDiverged | None = None
        self.tokens = training.micro_batch_tokens or 0  # in one pass; 0: to be measured

    def run(self, told: Progress | None) -> TrainingReport:
        began, losses, drawn = time.monotonic(), [], 0
        what, first_step = self.training, self.party.steps - self.training.steps_done
        size = what.config.batch_size
        total = step_count(len(what.parts[0].samples), size, what.epochs)
        rng = np.random.default_rng([what.seed, first_step])
        with self._training():
            self.tokens = self.tokens or self._measured()
            for number, items in enumerate(batches(what.parts, size, what.epochs, rng)):
                if number < what.steps_done:
                    continue
                _seed(self.party.device, _dropout_seed(what.seed, first_step + number, self.team.rank))
                loss = self._gradients(items)
                with self.team.together():
                    self._update(items)
                    losses.append(float(loss))
                    drawn += len(items)
                    if told is not None:
                        told(number + 1, total, losses[-1])
        return TrainingReport(
            steps=len(losses),
            samples=drawn,
            seconds=time.monotonic() - began,
            first_loss_nats=losses[0] if losses else None,
            last_loss_nats=losses[-1] if losses else None,
        )

    @contextmanager
    def _training(self) -> Iterator[None]:
        """The model in training mode; random state and mode are put back after."""
        model, devices = self.party.model, [self.party.device] if self.party.device.type == "cuda" else []
        _ = self.party.plain_head
        try:
            with torch.random.fork_rng(devices):
                model.train(True)
                yield
        finally:
            self.party.optimizer.zero_grad(set_to_none=True)
            model.train(False)

    def _gradients(self, items: list[Item]) -> Tensor:
        """The batch's loss, its gradients in the parameters; of the whole batch, however many processes share it."""
        loss = torch.zeros((), device=self.party.device)
        if not items:
            return loss
        with self.team.together():
            while not self._passed(items, loss):
                self._take_less(items)
                loss.zero_()
            if self.refused is not None:  # not before: a pass through a sharded model takes every process
                raise self.refused
        grads = [weight.grad for weight in self.party.weights.values() if weight.grad is not None]
        self.team.add_up([loss, *grads])
        return loss

    def _passed(self, items: list[Item], loss: Tensor) -> bool:
        """Add up loss and gradients of this process's share; False where that takes more memory than there is."""
        try:
            for micro in self._micro_batches(items):
                part = self._loss(micro)
                self.accelerator.backward(part)
                loss += part.detach()
        except torch.OutOfMemoryError:
            if self.team.sharded or self.tokens <= max(len(item.sample.ids) for item in items):
                raise
            return False
        return True

    def _take_less(self, items: list[Item]) -> None:
        """Half as much at once, from here on."""
        self.party.optimizer.zero_grad(set_to_none=True)
        self.tokens //= 2
        self.party.pass_tokens = self.tokens
        log.warning("training.out_of_memory", extra={"samples": len(items), "micro_batch_tokens": self.tokens})

    def _measured(self) -> int:
        """Tokens that fit into one pass on every process, by the longest sample; the party remembers them."""
        weightless = (Item(part, place, 0.0) for part in self.training.parts for place in range(len(part.samples)))
        longest = max(weightless, key=lambda item: (bool(len(item.sample.rows)), len(item.sample.ids)))

        def work(samples: int) -> None:
            self.party.optimizer.zero_grad(set_to_none=True)
            self.accelerator.backward(self._loss([longest] * samples))

        with self.team.together():
            tokens = tokens_at_once(self.party.device, self.team.size, len(longest.sample.ids), work)
        self.party.optimizer.zero_grad(set_to_none=True)
        self.refused = None  # it is for the sample's own step to say
        self.party.pass_tokens = self.team.least(tokens)
        log.info("training.measured", extra={"micro_batch_tokens": self.party.pass_tokens})
        return self.party.pass_tokens

    def _micro_batches(self, items: list[Item]) -> list[list[Item]]:
        """This process's; where a model is sharded, as many as every other's."""
        cuts = [self._cut(items[rank :: self.team.size] or _weightless(items)) for rank in range(self.team.size)]
        mine = cuts[self.team.rank]
        if self.team.sharded:
            mine += [_weightless(items)] * (max(map(len, cuts)) - len(mine))
        return mine

    def _cut(self, items: list[Item]) -> list[list[Item]]:
        cut = by_length([item.sample for item in items], self.tokens)
        return [[items[index] for index in indices] for indices in cut]

    def _loss(self, items: list[Item]) -> Tensor:
        batch = collate([item.sample for item in items], self.party.device)
        targets = row_targets(items, self.party.device)
        residual = targets.residual if self.training.residual_bucket else None
        soft = (batch.gold, targets.ids, targets.probs, residual, self.training.temperature)
        size, head, plain = self.party.vocabulary.size, self.party.head, self.party.plain_head
        with self.accelerator.autocast():
            if plain is not None and len(batch.places) * size > CHUNK_LOGITS:
                hidden, cut = row_hidden(self.party.model, head, batch), plain.cut(size)
                nll, distilled = chunked_losses(hidden, cut.weight, cut.bias, *soft)
            else:
                nll, distilled = gold_and_sparse_losses(row_logits(self.party.model, head, batch)[:, :size], *soft)
        rows = targets.gold_weight * nll + targets.soft_weight * distilled
        if self.refused is None and not rows.isfinite().all():
            self.refused = self._diverged(items, rows)
        return rows.sum()

    def _diverged(self, items: list[Item], rows: Tensor) -> TrainingDiverged:
        owners = np.repeat(np.arange(len(items)), [len(item.sample.rows) for item in items])
        bad = sorted({items[owner].sample.id for owner in owners[(~rows.isfinite()).cpu().numpy()]})
        return TrainingDiverged(
            f"step {self.party.steps + 1}: the loss is not finite on {_named(bad)}; go back to the last good adapter "
            "and lower the learning rate, or leave these samples out"
        )

    def _update(self, items: list[Item]) -> None:
        """One optimizer step on a batch; one without any response row only counts."""
        party, config = self.party, self.training.config
        if not items:
            party.steps += 1
            return
        norm = self.accelerator.clip_grad_norm_(list(party.weights.values()), config.max_grad_norm)
        if not math.isfinite(float(norm)):
            raise TrainingDiverged(
                f"step {party.steps + 1}: the gradient is not finite on a batch of "
                f"{_named(sorted({item.sample.id for item in items}))}; lower the learning rate"
            )
        set_rates(party.optimizer, config, party.steps)
        party.optimizer.step()
        party.optimizer.zero_grad(set_to_none=True)
        party.steps += 1


def _weightless(items: list[Item]) -> list[Item]:
    """For a process that has no item of its own: all must take part."""
    return [replace(items[0], row_weight=0.0)]


def _seed(device: torch.device, seed: int) -> None:
    """`torch.manual_seed` for the devices in use: it also queues work for those that are not there, more every step."""
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


def _dropout_seed(seed: int, step: int, rank: int) -> int:
    """One dropout seed for each step, so that a resumed run draws what an unbroken one draws."""
    mixed = [seed, step, rank] if rank else [seed, step]
    return int(np.random.SeedSequence(mixed).generate_state(1, np.uint64)[0] >> 1)


def _named(ids: Sequence[str]) -> str:
    shown = ", ".join(repr(sample_id) for sample_id in ids[:5])
    return f"samples {shown}" + (f" and {len(ids) - 5} more" if len(ids) > 5 else "")
