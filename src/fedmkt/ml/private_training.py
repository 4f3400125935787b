"""DP-SGD on a site's own samples: Poisson batches, clipped gradients of single samples, Gaussian noise.

Abadi et al. 2016 (arXiv 1607.00133) with Opacus (`fedmkt[privacy]`); the step that follows the noise is AdamW's. The
unit of privacy is one private sample: what is published after training is (epsilon, delta)-close to what it would be
had any one sample not been there. A text that occurs k times, or a document cut into k samples, is k units; what of a
sample is beyond `max_tokens` is not used. The number of samples is taken as known.
"""

import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from opacus.optimizers import DPOptimizer
from opacus.utils.uniform_sampler import UniformWithReplacementSampler

from fedmkt.ml.batches import TokenSample, by_length, tokenize
from fedmkt.ml.party import Party
from fedmkt.ml.plan import Part, step_count
from fedmkt.ml.private_budget import PrivacyBudget
from fedmkt.ml.sample_gradients import SampleHooks, backward, check_samples_apart, drop_unusable, sample_hooks
from fedmkt.ml.schedule import set_rates
from fedmkt.ml.training import Progress, TrainingDiverged
from fedmkt.protocol import OptimizerConfig, TrainingReport
from fedmkt.public_set import PublicSample

MICRO_BATCH_TOKENS = 16384  # padded tokens in one forward and backward pass
MICRO_BATCH_GRADIENTS = 1 << 28  # values of single samples' gradients in memory at a time: 1 GiB


def train_with_noise(
    party: Party,
    samples: Sequence[PublicSample],
    budget: PrivacyBudget,
    *,
    optimizer: OptimizerConfig,
    epochs: float,
    later_epochs: float,
    max_tokens: int = 512,
    micro_batch_tokens: int = MICRO_BATCH_TOKENS,
    steps_done: int = 0,
    progress: Progress | None = None,
) -> TrainingReport:
    """As many steps as `train_private` takes; each draws every sample with probability batch_size / samples.

    later_epochs: of every round after this one, for which the budget has to last too. `steps_done` resumes, with fresh
    noise and fresh draws for the steps that are left: seeds come from the operating system, never from the federation,
    so no two runs are alike. Each step is committed to the budget before it is taken. The report has the expected
    number of samples, and no loss, since none is noised. Raises BudgetSpent before the first step, NothingToLearn,
    TrainingDiverged, PrivacyRefused.
    """
    part = Part(tokenize(party.vocabulary, samples, party.usable_tokens(max_tokens)))
    size = min(optimizer.batch_size, len(samples))
    sample_rate = size / len(samples)
    steps = step_count(len(samples), optimizer.batch_size, epochs) - steps_done
    later = step_count(len(samples), optimizer.batch_size, later_epochs)
    noise_multiplier = budget.noise_for(sample_rate, steps, later)
    check_samples_apart(party)
    began = time.monotonic()
    draws = UniformWithReplacementSampler(
        num_samples=len(samples), sample_rate=sample_rate, generator=_unpredictable(torch.device("cpu")), steps=steps
    )
    with _training(party) as hooks:
        stepper = NoisySteps(party, hooks, noise_multiplier, budget.goal.max_grad_norm, size, micro_batch_tokens)
        for number, places in enumerate(draws, start=steps_done + 1):
            budget.spend(noise_multiplier, sample_rate)
            set_rates(party.optimizer, optimizer, party.steps)
            stepper.step([part.samples[place] for place in places if len(part.samples[place].rows)])
            party.steps += 1
            if progress is not None:
                progress(number, steps_done + steps, float("nan"))
    if not all(weight.isfinite().all() for weight in party.weights.values()):
        raise TrainingDiverged(f"after {party.steps} steps the weights are not finite; lower the learning rate")
    return TrainingReport(steps=steps, samples=steps * size, seconds=time.monotonic() - began)


class NoisySteps:
    """Optimizer steps of one training: sum of clipped gradients, plus noise, over the expected batch size."""

    def __init__(
        self,
        party: Party,
        hooks: SampleHooks,
        noise_multiplier: float,
        max_grad_norm: float,
        expected_batch_size: int,
        micro_batch_tokens: int = MICRO_BATCH_TOKENS,
    ) -> None:
        self._party, self._hooks, self._tokens = party, hooks, micro_batch_tokens
        self._weights = list(party.weights.values())
        self._most = max(1, MICRO_BATCH_GRADIENTS // sum(weight.numel() for weight in self._weights))
        self._optimizer = DPOptimizer(
            party.optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            expected_batch_size=expected_batch_size,
            generator=_unpredictable(party.device),
            secure_mode=True,  # noise whose last bits say nothing of the sum it was added to
        )

    def step(self, samples: Sequence[TokenSample]) -> None:
        """One step on the samples drawn, each with response rows; none is a step of noise alone."""
        micro = [[samples[place] for place in places] for places in self._micro_batches(samples)]
        for number, part in enumerate(micro or [[]]):
            if part:
                backward(self._party, self._hooks, part)
                drop_unusable(self._weights)
            else:
                for weight in self._weights:
                    weight.grad_sample = weight.new_zeros((0, *weight.shape))  # type: ignore[attr-defined]  # Opacus's
            self._optimizer.signal_skip_step(number + 1 < len(micro))
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)

    def _micro_batches(self, samples: Sequence[TokenSample]) -> Iterator[list[int]]:
        for places in by_length(samples, self._tokens):
            for start in range(0, len(places), self._most):
                yield places[start : start + self._most]


@contextmanager
def _training(party: Party) -> Iterator[SampleHooks]:
    """The model in training mode, its samples kept apart; random state and mode are put back after."""
    _ = party.plain_head
    with torch.random.fork_rng([party.device] if party.device.type == "cuda" else []), sample_hooks(party) as hooks:
        torch.manual_seed(secrets.randbits(63))  # dropout
        party.model.train(True)
        try:
            yield hooks
        finally:
            party.model.train(False)
            party.optimizer.zero_grad(set_to_none=True)


def _unpredictable(device: torch.device) -> torch.Generator:
    """Noise that somebody can make again hides nothing, and the federation's seed is everybody's."""
    return torch.Generator(device).manual_seed(secrets.randbits(63))
