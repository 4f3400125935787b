"""Sparse-target losses: worked values, agreement with the dense formula, gradients, edges and memory."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fedmkt.ml import losses
from fedmkt.ml.losses import chunked_losses, gold_and_sparse_losses, multiplied, sparse_distillation_loss


def dense_twin(logits: Tensor, ids: Tensor, probs: Tensor, residual: Tensor | None, temperature: float = 1.0) -> Tensor:
    """The formula row by row over the whole vocabulary, with every event's probability spelled out."""
    losses = []
    for row in range(len(logits)):
        log_q = (logits[row] / temperature).log_softmax(dim=-1)
        kept = [int(i) for i in ids[row] if i >= 0]
        p = [float(probs[row, k]) for k in range(ids.shape[1]) if ids[row, k] >= 0]
        rest = float(residual[row]) if residual is not None else 0.0
        mass = sum(p) + rest
        if residual is None and mass > 0:
            p, mass = [x / mass for x in p], 1.0
        p, rest = [x ** (1 / temperature) for x in p], rest ** (1 / temperature) if rest > 0 else 0.0
        scale = mass / (sum(p) + rest) if sum(p) + rest > 0 else 0.0
        loss = logits[row].sum() * 0
        for token, share in zip(kept, p, strict=True):
            loss = loss - scale * share * log_q[token]
        others = [v for v in range(logits.shape[1]) if v not in kept]
        if rest > 0 and others:
            loss = loss - scale * rest * log_q[others].logsumexp(dim=0)
        losses.append(loss * temperature**2)
    return torch.stack(losses)


def ragged_targets(rows: int, vocabulary: int, width: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random ids without duplicates, 0 to `width` of them a row, masses below one, the residual the rest."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(vocabulary, generator=generator)[:width] for _ in range(rows)])
    kept = torch.randint(0, width + 1, (rows, 1), generator=generator)
    ids = ids.masked_fill(torch.arange(width) >= kept, -1)
    probs = torch.rand(rows, width, generator=generator, dtype=torch.float64) * (ids >= 0)
    probs = probs / (probs.sum(dim=-1, keepdim=True) + torch.rand(rows, 1, generator=generator, dtype=torch.float64))
    return ids, probs, 1 - probs.sum(dim=-1)


def test_a_row_worked_by_hand_with_its_residual() -> None:
    # q = (1, 2, 3, 4) / 10; the target keeps token 1 with 1/2 and token 3 with 1/4, and leaves 1/4 to tokens 0 and 2
    logits = torch.tensor([[1.0, 2.0, 3.0, 4.0]]).log().requires_grad_()
    ids, probs, residual = torch.tensor([[1, 3]]), torch.tensor([[0.5, 0.25]]), torch.tensor([0.25])
    loss = sparse_distillation_loss(logits, ids, probs, residual)
    expected = -0.5 * math.log(0.2) - 0.25 * math.log(0.4) - 0.25 * math.log(0.4)
    assert loss.item() == pytest.approx(expected, abs=1e-6)  # 1.2629 nats
    loss.sum().backward()
    # kept: q - p; off them q * (1 - 0.25 / 0.4)
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, torch.tensor([[0.0375, -0.3, 0.1125, 0.15]]))


def test_a_row_worked_by_hand_without_residual_is_renormalised_and_zero_residual_takes_it_as_it_is() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0, 4.0]]).log()
    ids, probs = torch.tensor([[1, 3, -1]]), torch.tensor([[0.5, 0.25, 9.0]])
    renormalised = sparse_distillation_loss(logits, ids, probs)
    as_it_is = sparse_distillation_loss(logits, ids, probs, torch.zeros(1))
    assert renormalised.item() == pytest.approx(-2 / 3 * math.log(0.2) - 1 / 3 * math.log(0.4), abs=1e-6)
    assert as_it_is.item() == pytest.approx(-0.5 * math.log(0.2) - 0.25 * math.log(0.4), abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.5, 0.5])
@pytest.mark.parametrize("bucket", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_loss_and_gradient_equal_the_dense_formula(seed: int, bucket: bool, temperature: float) -> None:
    ids, probs, residual = ragged_targets(rows=9, vocabulary=23, width=6, seed=seed)
    tail = residual if bucket else None
    logits = (
        3 * torch.randn(9, 23, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    ).requires_grad_()
    weights = torch.linspace(-1, 2, 9, dtype=torch.float64)
    ours = sparse_distillation_loss(logits, ids, probs, tail, temperature)
    twin = dense_twin(logits, ids, probs, tail, temperature)
    torch.testing.assert_close(ours, twin, rtol=1e-10, atol=1e-10)
    (grad,) = torch.autograd.grad((ours * weights).sum(), logits)
    (expected,) = torch.autograd.grad((twin * weights).sum(), logits)
    torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_gradients_pass_gradcheck_in_float64(temperature: float) -> None:
    ids, probs, residual = ragged_targets(rows=5, vocabulary=11, width=4, seed=5)
    gold = torch.tensor([0, 10, -1, 3, 3])
    logits = torch.randn(5, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    hidden = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2), requires_grad=True)
    weight = torch.randn(11, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3), requires_grad=True)
    bias = torch.randn(11, dtype=torch.float64, generator=torch.Generator().manual_seed(4), requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda z: gold_and_sparse_losses(z, gold, ids, probs, residual, temperature), (logits,)
    )
    assert torch.autograd.gradcheck(
        lambda h, w, b: chunked_losses(h, w, b, gold, ids, probs, residual, temperature, chunk_rows=2),
        (hidden, weight, bias),
    )


@pytest.mark.parametrize("chunk_rows", [1, 4, 100, None])
@pytest.mark.parametrize("bias", [True, False])
def test_the_chunked_form_equals_the_loss_on_full_logits(bias: bool, chunk_rows: int | None) -> None:
    ids, probs, residual = ragged_targets(rows=13, vocabulary=31, width=5, seed=7)
    probs, residual = probs.float(), residual.float()
    gold = torch.arange(13)
    generator = torch.Generator().manual_seed(8)
    hidden = torch.randn(13, 6, generator=generator, requires_grad=True)
    weight = torch.randn(31, 6, generator=generator, requires_grad=True)
    shift = torch.randn(31, generator=generator, requires_grad=True) if bias else None
    inputs = [hidden, weight, *([shift] if shift is not None else [])]
    chunked = chunked_losses(hidden, weight, shift, gold, ids, probs, residual, chunk_rows=chunk_rows)
    full = gold_and_sparse_losses(F.linear(hidden, weight, shift), gold, ids, probs, residual)
    for ours, theirs in zip(chunked, full, strict=True):
        torch.testing.assert_close(ours, theirs)
    grads = torch.autograd.grad(0.3 * chunked[0].sum() + 0.7 * chunked[1].mean(), inputs)
    expected = torch.autograd.grad(0.3 * full[0].sum() + 0.7 * full[1].mean(), inputs)
    for grad, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-6)


def test_the_gold_loss_is_the_cross_entropy_and_skips_rows_without_gold() -> None:
    logits = torch.randn(6, 9, generator=torch.Generator().manual_seed(0), requires_grad=True)
    gold = torch.tensor([0, 8, -1, 4, -1, 2])
    no_ids = torch.empty(6, 0, dtype=torch.int64)
    nll, distilled = gold_and_sparse_losses(logits, gold, no_ids, no_ids.float(), torch.zeros(6))
    expected = F.cross_entropy(logits, gold, ignore_index=-1, reduction="none")
    torch.testing.assert_close(nll, expected)
    assert distilled.tolist() == [0.0] * 6
    (grad,) = torch.autograd.grad(nll.sum(), logits)
    torch.testing.assert_close(grad, torch.autograd.grad(expected.sum(), logits)[0])


def test_no_rows_give_a_zero_with_a_graph() -> None:
    logits = torch.randn(0, 7, requires_grad=True)
    hidden = torch.randn(0, 3, requires_grad=True)
    gold, ids, probs = torch.empty(0, dtype=torch.int64), torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2)
    plain = sparse_distillation_loss(logits, ids, probs, torch.empty(0))
    chunked = chunked_losses(hidden, torch.randn(7, 3), None, gold, ids, probs, torch.empty(0))
    loss = plain.sum() + chunked[0].sum() + chunked[1].sum()
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert logits.grad.shape == (0, 7)
    assert hidden.grad is not None
    assert hidden.grad.shape == (0, 3)


def test_rows_without_a_target_cost_nothing_and_move_nothing() -> None:
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    ids, probs = torch.full((3, 2), -1), torch.rand(3, 2)
    for residual in (None, torch.zeros(3), torch.ones(3)):  # all mass in a bucket that holds every token
        loss = sparse_distillation_loss(logits, ids, probs, residual)
        (grad,) = torch.autograd.grad(loss.sum(), logits)
        assert loss.abs().max().item() == pytest.approx(0, abs=1e-6)
        assert grad.abs().max().item() == pytest.approx(0, abs=1e-6)


def test_keeping_the_whole_vocabulary_is_the_dense_cross_entropy_whatever_the_residual() -> None:
    logits = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    target = torch.rand(4, 6, generator=torch.Generator().manual_seed(1)).softmax(dim=-1)
    ids = torch.arange(6).flip(0).expand(4, 6)
    loss = sparse_distillation_loss(logits, ids, target.flip(1), torch.full((4,), 0.1))
    expected = F.cross_entropy(logits, target, reduction="none")
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss.sum(), logits)[0], torch.autograd.grad(expected.sum(), logits)[0]
    )


def test_a_student_that_is_sure_of_the_kept_ids_still_gets_the_exact_tail() -> None:
    # 1 - sum(q) is 0 in float32 here; the tail is 3 * exp(-25) and its log must not be log(0)
    logits = torch.tensor([[25.0, 0.0, 0.0, 0.0]], requires_grad=True)
    loss = sparse_distillation_loss(logits, torch.tensor([[0]]), torch.tensor([[0.9]]), torch.tensor([0.1]))
    assert loss.item() == pytest.approx(0.1 * (25 - math.log(3)), rel=1e-5)
    loss.sum().backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, torch.tensor([[0.1, -1 / 30, -1 / 30, -1 / 30]]))


def test_an_underflowing_tail_is_clamped_and_stays_finite() -> None:
    logits = torch.tensor([[500.0, 0.0, 0.0]], requires_grad=True)
    loss = sparse_distillation_loss(logits, torch.tensor([[0]]), torch.tensor([[0.5]]), torch.tensor([0.5]))
    assert loss.item() == pytest.approx(-0.5 * math.log(1e-12), rel=1e-5)
    loss.sum().backward()
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())


def test_tokens_that_the_model_forbids_do_not_poison_padding() -> None:
    logits = torch.tensor([[-math.inf, 1.0, 2.0]], requires_grad=True)
    loss = sparse_distillation_loss(logits, torch.tensor([[2, -1]]), torch.tensor([[0.6, 0.0]]), torch.tensor([0.4]))
    expected = -0.6 * math.log(math.e / (1 + math.e)) - 0.4 * math.log(1 / (1 + math.e))
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    assert grad[0, 0].item() == 0
    assert bool(grad.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_computed_in_float32(dtype: torch.dtype) -> None:
    ids, probs, residual = ragged_targets(rows=8, vocabulary=40, width=6, seed=3)
    half = (4 * torch.randn(8, 40, generator=torch.Generator().manual_seed(0))).to(dtype).requires_grad_()
    full = half.detach().float().requires_grad_()
    loss = sparse_distillation_loss(half, ids, probs, residual)
    expected = sparse_distillation_loss(full, ids, probs, residual)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)
    (grad,) = torch.autograd.grad(loss.sum(), half)
    (exact,) = torch.autograd.grad(expected.sum(), full)
    assert grad.dtype == dtype
    torch.testing.assert_close(grad, exact.to(dtype))


def test_blocks_do_not_change_the_result_on_a_vocabulary_larger_than_one_block() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 140_000, generator=generator, requires_grad=True)  # one row a block
    ids = torch.randint(0, 140_000, (5, 1), generator=generator)
    probs = torch.full((5, 1), 0.7)
    loss = sparse_distillation_loss(logits, ids, probs, 1 - probs[:, 0])
    q = logits.softmax(dim=-1).gather(1, ids)[:, 0]
    torch.testing.assert_close(loss, -0.7 * q.log() - 0.3 * torch.log1p(-q), rtol=1e-4, atol=1e-4)
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    assert grad.sum(dim=-1).abs().max().item() < 1e-4  # a gradient by logits sums to zero in every row


def test_the_chunked_form_multiplies_in_the_dtype_of_autocast_and_sums_in_float32() -> None:
    ids, probs, residual = ragged_targets(rows=6, vocabulary=50, width=5, seed=1)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 16, generator=generator, requires_grad=True)
    weight = torch.randn(50, 16, generator=generator, requires_grad=True)
    gold = torch.arange(6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        chunked = chunked_losses(hidden, weight, None, gold, ids, probs, residual, chunk_rows=4)
        full = gold_and_sparse_losses(F.linear(hidden, weight), gold, ids, probs, residual)
    assert chunked[0].dtype == torch.float32
    for ours, theirs in zip(chunked, full, strict=True):
        torch.testing.assert_close(ours, theirs)
    grads = torch.autograd.grad(chunked[0].sum() + chunked[1].sum(), [hidden, weight])
    expected = torch.autograd.grad(full[0].sum() + full[1].sum(), [hidden, weight])
    for grad, other in zip(grads, expected, strict=True):
        assert grad.dtype == torch.float32
        torch.testing.assert_close(grad, other, rtol=3e-2, atol=3e-2)


def test_shapes_and_temperature_are_checked() -> None:
    logits, ids = torch.randn(2, 5), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"ids \(2, 3\), probs \(2, 2\)"):
        sparse_distillation_loss(logits, ids, torch.rand(2, 2))
    with pytest.raises(ValueError, match="temperature is 0"):
        sparse_distillation_loss(logits, ids, torch.rand(2, 3), None, 0.0)


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                self.elements = max(self.elements, tensor.numel())
        return result


def test_the_chunked_form_never_holds_more_than_one_chunk_of_logits() -> None:
    rows, vocabulary, width, chunk = 64, 5000, 8, 4
    ids, probs, residual = ragged_targets(rows, vocabulary, 6, seed=0)
    hidden = torch.randn(rows, width, requires_grad=True)
    weight = torch.randn(vocabulary, width, requires_grad=True)
    with LargestTensor() as largest:
        nll, kd = chunked_losses(
            hidden, weight, None, torch.zeros(rows, dtype=torch.int64), ids, probs, residual, chunk_rows=chunk
        )
        (nll.sum() + kd.sum()).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert largest.elements == max(chunk, width) * vocabulary  # one chunk, or the head's own weight


def test_all_chunks_of_logits_take_the_same_memory() -> None:
    hidden, weight = torch.randn(22, 3), torch.randn(50, 3)
    chunks = losses._chunks(hidden, weight, torch.ones(50), 5)
    found = [(rows, logits.data_ptr(), logits.clone()) for rows, logits in chunks]
    assert len({place for _, place, _ in found}) == 1
    assert [(rows.start, rows.stop) for rows, _, _ in found] == [(0, 5), (5, 10), (10, 15), (15, 20), (20, 22)]
    torch.testing.assert_close(torch.cat([logits for _, _, logits in found]), F.linear(hidden, weight, torch.ones(50)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_in_pieces_gives_the_same_logits(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 4, generator=generator)
    weight = torch.randn(33, 4, generator=generator).to(dtype)
    monkeypatch.setattr(losses, "HEAD_PIECE", 4 * 10)  # three pieces of 10 tokens, one of 3
    work = torch.full((7, 40), math.nan)[:, :33]
    with torch.autocast("cpu", dtype=torch.bfloat16):  # does not reach the product
        found = multiplied(hidden, weight, work)
    assert found.data_ptr() == work.data_ptr()
    torch.testing.assert_close(found, hidden @ weight.float().T)
