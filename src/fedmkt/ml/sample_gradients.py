"""The gradient of every single sample of a batch, by Opacus's hooks on the LoRA layers (`fedmkt[privacy]`).

B samples, T tokens, P trained values. Only `nn.Linear` layers of LoRA train, so a sample's gradient is the outer
product of what went into each and what came back, summed over its own tokens.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from opacus.grad_sample import GradSampleHooks
from torch import Tensor, nn

from fedmkt.ml.batches import TokenSample, collate
from fedmkt.ml.head import row_hidden, row_logits
from fedmkt.ml.losses import CHUNK_LOGITS, chunked_losses, gold_and_sparse_losses
from fedmkt.ml.party import Party
from fedmkt.privacy import PrivacyRefused

LEFT_ON_MODULES = ("activations", "max_batch_len")  # by Opacus, where a pass was broken off
LEFT_ON_PARAMETERS = ("summed_grad",)
PROBE_LENGTHS = (6, 9)
PROBE_TOLERANCE = 1e-3  # of the gradient's length
COARSE_TOLERANCE = 0.1  # where products are made in half precision


class SampleHooks(GradSampleHooks):  # type: ignore[misc]  # Opacus ships no annotations
    """Keeps samples apart where a model has merged them with their tokens (OPT's feed-forward sees B * T rows).

    Products are made in float32: a norm in bfloat16 is wrong by more than the clipping bound may be.
    """

    samples = 1  # of the batch that is passed now

    def rearrange_grad_samples(self, *, module: nn.Module, **settings: Any) -> tuple[list[Tensor], Tensor]:
        module.max_batch_len = self.samples  # type: ignore[assignment]  # where Opacus looks for it
        activations, backprops = super().rearrange_grad_samples(module=module, **settings)
        return [self._by_sample(tensor) for tensor in activations], self._by_sample(backprops)

    def _by_sample(self, tensor: Tensor) -> Tensor:
        if tensor.shape[0] % self.samples:
            raise PrivacyRefused(
                f"a layer of this model gets {tensor.shape[0]} rows for {self.samples} samples, so its gradient cannot "
                "be told apart by sample; use another model, or train without differential privacy"
            )
        return tensor.reshape(self.samples, -1, tensor.shape[-1]).float()


@contextmanager
def sample_hooks(party: Party) -> Iterator[SampleHooks]:
    """Inside, a backward pass in training mode leaves `grad_sample` (B, ...) at every trained weight.

    Raises PrivacyRefused for a party whose samples cannot be told apart; nothing of it stays on the model after.
    """
    check_possible(party)
    # without this, autograd takes the first layers for the graph's inputs and warns
    handle = party.model.get_input_embeddings().register_forward_hook(_require_grad)
    hooks = None
    try:
        try:
            hooks = SampleHooks(party.model, loss_reduction="sum", strict=True)
        except NotImplementedError as error:
            raise PrivacyRefused(f"Opacus cannot tell samples apart in this model: {error}") from error
        yield hooks
    finally:
        handle.remove()
        if hooks is not None:
            hooks.cleanup()
        for module in party.model.modules():
            for name in LEFT_ON_MODULES:
                module.__dict__.pop(name, None)
        for weight in party.weights.values():
            weight.grad = None
            for name in LEFT_ON_PARAMETERS:
                weight.__dict__.pop(name, None)


def check_possible(party: Party) -> None:
    """Raises PrivacyRefused for settings that no model can do."""
    if party.lora is None:
        raise PrivacyRefused(
            "differential privacy needs LoRA layers, and this federation trains every weight (lora is null); leave "
            "privacy out of the settings, or join a federation with LoRA"
        )
    if party.team.size > 1:
        raise PrivacyRefused(
            f"differential privacy trains in one process, {party.team.size} share the work; start one alone"
        )
    if any(getattr(module, "gradient_checkpointing", False) for module in party.model.modules()):
        raise PrivacyRefused(
            "differential privacy and gradient checkpointing do not go together: layers that run twice give two "
            "gradients; leave gradient_checkpointing out of the settings"
        )


def backward(party: Party, hooks: SampleHooks, samples: Sequence[TokenSample]) -> None:
    """Leave the gradient of each sample's own loss, the mean over its response rows in nats; every sample has one."""
    hooks.samples = len(samples)
    batch = collate(samples, party.device)
    empty = torch.zeros((len(batch.places), 0), device=party.device)
    soft = (batch.gold, empty.long(), empty, empty.new_zeros(len(empty)))
    size, head, plain = party.vocabulary.size, party.head, party.plain_head
    with torch.autocast(party.device.type, torch.bfloat16, enabled=party.device.type == "cuda"):
        if plain is not None and len(batch.places) * size > CHUNK_LOGITS:
            hidden, cut = row_hidden(party.model, head, batch), plain.cut(size)
            nll, _ = chunked_losses(hidden, cut.weight, cut.bias, *soft)
        else:
            nll, _ = gold_and_sparse_losses(row_logits(party.model, head, batch)[:, :size], *soft)
    counts = torch.tensor([len(sample.rows) for sample in samples], device=party.device)
    (nll / counts.repeat_interleave(counts)).sum().backward()  # type: ignore[no-untyped-call]  # torch's own gap


def drop_unusable(weights: Iterable[Tensor]) -> None:
    """A sample whose gradient is not finite contributes nothing: that is a rule on the sample alone, like clipping."""
    gradients: list[Tensor] = [weight.grad_sample for weight in weights]  # type: ignore[attr-defined]  # Opacus's
    usable = torch.stack([gradient.flatten(1).isfinite().all(1) for gradient in gradients]).all(0)
    for gradient in gradients:
        gradient[~usable] = 0


def check_samples_apart(party: Party) -> None:
    """Refuse a model in which the gradient of a sample depends on the batch around it: its noise would hide too little.

    By experiment, on two short made-up texts: together, each has to have the gradient that it has alone. Whatever mixes
    samples is found: experts that share a capacity, a base in gradient checkpointing, layers that Opacus misreads.
    """
    made = [_made_up(party, length) for length in PROBE_LENGTHS]
    exact = party.device.type == "cpu" and party.model.dtype == torch.float32
    allowed = PROBE_TOLERANCE if exact else COARSE_TOLERANCE
    with _probing(party), sample_hooks(party) as hooks:
        backward(party, hooks, made)
        together = [_flat(party, "grad_sample", place) for place in range(len(made))]
        for sample, gradient in zip(made, together, strict=True):
            party.optimizer.zero_grad(set_to_none=True)
            hooks.set_grad_sample_to_none()
            backward(party, hooks, [sample])
            alone = _flat(party, "grad")
            difference = float((gradient - alone).norm() / alone.norm().clamp(min=1e-12))
            if not difference <= allowed:
                raise PrivacyRefused(
                    f"in this model a sample's gradient differs by {difference:.3g} of its length when another sample "
                    f"is in the batch, at most {allowed:g} allowed; clipping it would not bound what it contributes"
                )


def _made_up(party: Party, length: int) -> TokenSample:
    ids = torch.randint(party.vocabulary.size, (length,), generator=torch.Generator().manual_seed(length))
    positions = torch.arange(length, dtype=torch.int32).numpy()
    return TokenSample("probe", ids.int().numpy(), positions, positions[1:])


@contextmanager
def _probing(party: Party) -> Iterator[None]:
    """No dropout, and B away from zero, where A has no gradient; weights and mode are put back after."""
    _ = party.plain_head  # looking for it resets the mode
    before = {name: weight.detach().clone() for name, weight in party.weights.items()}
    trained = [module for module in party.model.modules() if any(p.requires_grad for p in module.parameters(False))]
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for weight in party.weights.values():
                weight += 0.02 * torch.randn(weight.shape, generator=generator).to(weight.device)
        for module in trained:
            module.train(True)  # Opacus looks at these alone
        yield
    finally:
        for module in trained:
            module.train(False)
        with torch.no_grad():
            for name, weight in party.weights.items():
                weight.copy_(before[name])


def _flat(party: Party, attribute: str, place: int | None = None) -> Tensor:
    found = [getattr(weight, attribute) for weight in party.weights.values()]
    return torch.cat([(tensor if place is None else tensor[place]).flatten() for tensor in found])


def _require_grad(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output.requires_grad_(True)
