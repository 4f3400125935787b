"""Supervised and distillation losses on sparse targets, without ever building a dense [.., V] target.

Legend: N rows, V vocabulary, K kept entries (padded), D hidden width. Every loss is in nats, one value a row, computed
in float32 (in float64 for float64 logits) whatever the dtype of the logits.

For a row with logits z, kept ids k with target masses p_k (M = sum p_k <= 1) and residual mass r outside of them, with
q = softmax(z) and the student's own residual Q = 1 - sum q_k:

    KD   = - sum_k p_k log q_k - r log Q
    gold = - log q_gold

The gradient of KD by z is (M + r) q - p on the kept ids and (M + r) q - r q / Q elsewhere.
This is the cross-entropy of FedMKT (arXiv 2406.02224, section 3.3) with one more event, "any other token", so that a
truncated target does not teach that the tail is impossible. Q is summed over the tokens that are not kept, never as
1 - sum, so it keeps its relative precision down to underflow.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

NO_TOKEN = -1  # padding in `ids` and `gold`
SMALLEST_TAIL = 1e-12  # clamp of Q: a student this sure of the kept ids pays r * 27.6 nats at most
CACHE_BLOCK = 1 << 18  # logits per block on a CPU: 1 MiB stays in cache between the passes over it
DEVICE_BLOCK = 1 << 26  # elsewhere: 256 MiB, few kernel launches
CHUNK_LOGITS = 1 << 24  # logits that the chunked form keeps at a time: 64 MiB
HEAD_PIECE = 1 << 20  # weights of the head that are multiplied at a time on a CPU: 4 MiB stay in cache
DEVICE_PIECE = 1 << 26  # elsewhere: 256 MiB, few kernel launches


class _Targets(NamedTuple):
    gold: Tensor  # (N,) int64, NO_TOKEN where a row has no gold term
    ids: Tensor  # (N, K) int64, NO_TOKEN pads
    probs: Tensor  # (N, K), 0 where padded
    residual: Tensor  # (N,)


class _Scan(NamedTuple):
    """What one pass over a block of logits leaves behind; `soft` is at temperature T, `plain` at 1."""

    gold_logits: Tensor  # (N,)
    kept_logits: Tensor  # (N, K)
    plain_lse: Tensor  # (N,)
    soft_lse: Tensor  # (N,)
    tail: Tensor  # (N,) probability outside the kept ids at T, at least SMALLEST_TAIL


class _RowGradient(NamedTuple):
    """By a row's logits: gold * q, -gold at the gold id; and for KD `kept` at the kept ids, off_kept * q elsewhere.

    Neither KD case is derived from the other: where the student is sure of the kept ids they are 1e10 apart.
    """

    gold: Tensor  # (N,)
    off_kept: Tensor  # (N,)
    kept: Tensor  # (N, K)


def sparse_distillation_loss(
    logits: Tensor, ids: Tensor, probs: Tensor, residual: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    """Cross-entropy in nats of each student row against a sparse target; see the formula at the head of this file.

    logits (N, V) any float dtype; ids (N, K) int64 without duplicates in a row, padded with -1; probs (N, K) >= 0,
    ignored where padded. residual (N,) >= 0 is the target's mass outside ids, taught to the student's whole remaining
    tail; zeros take `probs` as they are; None renormalises each row over its kept ids (the paper's profile).
    temperature T: the student's rows become softmax(z / T), kept masses p^(1/T) and the residual r^(1/T) as if the tail
    were one token (exact at T = 1 only), rescaled to their former total; the loss is multiplied by T^2 so that the
    gradient keeps its size (Hinton et al. 2015, section 2). Returns (N,): 0 for rows without target, shape (0,) with
    a graph when there are no rows. Where every id of the vocabulary is kept there is no tail and residual is ignored.
    """
    gold = ids.new_full((logits.shape[0],), NO_TOKEN)
    return gold_and_sparse_losses(logits, gold, ids, probs, residual, temperature)[1]


def gold_and_sparse_losses(
    logits: Tensor,
    gold: Tensor,
    ids: Tensor,
    probs: Tensor,
    residual: Tensor | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """(gold, KD) losses of each row in one pass over the logits; at T = 1 both share one normaliser.

    gold (N,) int64, -1 where a row has no gold term (loss 0). The rest as in `sparse_distillation_loss`. Only first
    derivatives exist.
    """
    targets = _prepared(logits, gold, ids, probs, residual, temperature)
    return _apply(_Losses, logits, *targets, float(temperature))


def chunked_losses(
    hidden: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    gold: Tensor,
    ids: Tensor,
    probs: Tensor,
    residual: Tensor | None = None,
    temperature: float = 1.0,
    *,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`gold_and_sparse_losses(hidden @ head_weight.T + head_bias, ...)` with only `chunk_rows` rows of logits alive.

    hidden (N, D), head_weight (V, D), head_bias (V,) or None. Logits are made again in the backward pass, so memory is
    independent of N x V at the price of one more product with the head. The default keeps 64 MiB of float32 logits.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):  # as the model's own head would
        hidden = hidden.to(torch.get_autocast_dtype(device))
    vocabulary = head_weight.shape[0]
    rows = chunk_rows or max(1, CHUNK_LOGITS // max(1, vocabulary))
    shape = hidden.new_empty((hidden.shape[0], vocabulary), device="meta")  # logits that never exist
    targets = _prepared(shape, gold, ids, probs, residual, temperature)
    return _apply(_ChunkedLosses, hidden, head_weight, head_bias, *targets, float(temperature), rows)


def _apply(function: type[torch.autograd.Function], *arguments: object) -> tuple[Tensor, Tensor]:
    nll, distilled = function.apply(*arguments)  # type: ignore[no-untyped-call]  # torch leaves apply unannotated
    return nll, distilled


def _prepared(
    logits: Tensor, gold: Tensor, ids: Tensor, probs: Tensor, residual: Tensor | None, temperature: float
) -> _Targets:
    """Targets in the dtype of the computation, padding zeroed, renormalised or tempered as asked."""
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, it must be above 0")
    rows, vocabulary = logits.shape
    if ids.shape != probs.shape or ids.shape[0] != rows or gold.shape != (rows,):
        raise ValueError(
            f"{rows} rows of logits need gold ({rows},) and ids and probs of one shape ({rows}, K), "
            f"got gold {tuple(gold.shape)}, ids {tuple(ids.shape)}, probs {tuple(probs.shape)}"
        )
    dtype = torch.promote_types(logits.dtype, torch.float32)
    probs = torch.where(ids >= 0, probs, 0).to(dtype)  # (N, K)
    if residual is None:
        probs = probs / probs.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(dtype).tiny)
        residual = probs.new_zeros(rows)
    else:
        no_tail = (ids >= 0).sum(dim=-1) >= vocabulary
        residual = residual.to(dtype).masked_fill(no_tail, 0)
    if temperature != 1.0:
        probs, residual = _tempered(probs, residual, temperature)
    return _Targets(gold, ids, probs, residual)


def _tempered(probs: Tensor, residual: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """p^(1/T) with the residual as one more token, rescaled to the mass that the row had."""
    mass = probs.sum(dim=-1) + residual
    probs, residual = probs ** (1 / temperature), residual ** (1 / temperature)
    scale = mass / (probs.sum(dim=-1) + residual).clamp(min=torch.finfo(probs.dtype).tiny)
    return probs * scale[:, None], residual * scale


def _scan(logits: Tensor, gold: Tensor, ids: Tensor, temperature: float, dtype: torch.dtype) -> _Scan:
    """One block (n, V) of logits. Allocates one more block in `dtype`, and a copy of the block if it has another."""
    logits = logits.to(dtype)
    kept = ids.clamp(min=0)
    soft_lse, tail = _normalise(logits, kept, ids < 0, temperature)
    plain_lse = soft_lse if temperature == 1.0 else torch.logsumexp(logits, dim=-1)
    gold_logits = logits.gather(1, gold.clamp(min=0)[:, None])[:, 0]
    return _Scan(gold_logits, logits.gather(1, kept), plain_lse, soft_lse, tail)


def _normalise(logits: Tensor, kept: Tensor, padding: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log of the sum of exp(z / T), and the share of that sum that lies outside the kept ids; each (n,)."""
    peak = logits.amax(dim=-1)
    powers = logits - peak[:, None]
    if temperature != 1.0:
        powers.div_(temperature)
    powers.exp_()
    kept_powers = powers.gather(1, kept).masked_fill_(padding, 0)
    # taken off by adding the exact opposite, not by writing 0: padding shares index 0 with a real token
    rest = powers.scatter_add_(1, kept, -kept_powers).sum(dim=-1)
    total = rest + kept_powers.sum(dim=-1)
    return peak / temperature + total.log(), (rest / total).clamp(min=SMALLEST_TAIL)


def _losses(scan: _Scan, targets: _Targets, temperature: float) -> tuple[Tensor, Tensor]:
    nll = (scan.plain_lse - scan.gold_logits).masked_fill(targets.gold < 0, 0)  # (N,)
    kept = targets.probs * (scan.soft_lse[:, None] - scan.kept_logits / temperature)  # (N, K)
    kept = torch.where(targets.probs > 0, kept, 0).sum(dim=-1)  # 0 * inf where a model forbids a token
    return nll, (kept - targets.residual * scan.tail.log()) * temperature**2


def _row_gradient(
    scan: _Scan, targets: _Targets, grad_nll: Tensor, grad_kd: Tensor, temperature: float
) -> _RowGradient:
    grad_nll = grad_nll.masked_fill(targets.gold < 0, 0)
    grad_kd = grad_kd * temperature  # T^2 of the loss, 1 / T of the logits
    mass = targets.probs.sum(dim=-1) + targets.residual
    kept_q = (scan.kept_logits / temperature - scan.soft_lse[:, None]).exp()  # (N, K)
    kept = (kept_q * mass[:, None] - targets.probs) * grad_kd[:, None]
    return _RowGradient(grad_nll, grad_kd * (mass - targets.residual / scan.tail), kept)


def _write_gradient(logits: Tensor, scan: _Scan, targets: _Targets, row: _RowGradient, temperature: float) -> None:
    """Turn a block (n, V) of logits into its gradient, in place; the rows of all arguments are the block's."""
    kept_ids, padding = targets.ids.clamp(min=0), targets.ids < 0
    off_kept, kept, supervised = row.off_kept, row.kept, None
    if temperature != 1.0:  # the gold term has a softmax of its own
        supervised = (logits - scan.plain_lse[:, None]).exp_().mul_(row.gold[:, None])
        logits.div_(temperature)
    logits.sub_(scan.soft_lse[:, None]).exp_()
    kept_q = logits.gather(1, kept_ids).masked_fill_(padding, 0)
    logits.scatter_add_(1, kept_ids, -kept_q)  # exactly 0 at the kept ids
    if supervised is None:
        off_kept, kept = off_kept + row.gold, kept + kept_q * row.gold[:, None]
    logits.mul_(off_kept[:, None]).scatter_add_(1, kept_ids, kept.masked_fill(padding, 0))
    if supervised is not None:
        logits.add_(supervised)
    logits.scatter_add_(1, targets.gold.clamp(min=0)[:, None], -row.gold[:, None])


class _Losses(torch.autograd.Function):
    """Losses of existing logits. Saves the logits themselves and a few numbers a row, so nothing of size N x V."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, gold: Tensor, ids: Tensor, probs: Tensor, residual: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        scans = (
            _scan(logits[rows], gold[rows], ids[rows], temperature, probs.dtype)
            for rows in row_blocks(len(logits), cached_rows(logits.shape[1], logits.device))
        )
        scan, targets = _joined(scans, probs), _Targets(gold, ids, probs, residual)
        ctx.save_for_backward(logits, *targets, *scan)
        ctx.temperature = temperature
        return _losses(scan, targets, temperature)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_nll: Tensor, grad_kd: Tensor) -> tuple[Tensor | None, ...]:
        logits, *saved = ctx.saved_tensors
        targets, scan = _Targets(*saved[:4]), _Scan(*saved[4:])
        row = _row_gradient(scan, targets, grad_nll, grad_kd, ctx.temperature)
        grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
        for rows in row_blocks(len(logits), cached_rows(logits.shape[1], logits.device)):
            same = logits.dtype == targets.probs.dtype  # then the gradient's own memory is the work buffer
            work = grad[rows].copy_(logits[rows]) if same else logits[rows].to(targets.probs.dtype)
            _write_gradient(work, *_take(rows, scan, targets, row), ctx.temperature)
            if not same:
                grad[rows] = work
        return grad, None, None, None, None, None


class _ChunkedLosses(torch.autograd.Function):
    """Losses through the LM head; a chunk of logits lives only while it is used, and is made again for the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gold: Tensor,
        ids: Tensor,
        probs: Tensor,
        residual: Tensor,
        temperature: float,
        chunk_rows: int,
    ) -> tuple[Tensor, Tensor]:
        scans = (
            _scan(logits[rows], gold[chunk][rows], ids[chunk][rows], temperature, probs.dtype)
            for chunk, logits in _chunks(hidden, weight, bias, chunk_rows)
            for rows in row_blocks(len(logits), cached_rows(logits.shape[1], logits.device))
        )
        scan, targets = _joined(scans, probs), _Targets(gold, ids, probs, residual)
        ctx.save_for_backward(hidden, weight, bias, *targets, *scan)
        ctx.temperature, ctx.chunk_rows = temperature, chunk_rows
        return _losses(scan, targets, temperature)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_nll: Tensor, grad_kd: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, *saved = ctx.saved_tensors
        targets, scan = _Targets(*saved[:4]), _Scan(*saved[4:])
        row = _row_gradient(scan, targets, grad_nll, grad_kd, ctx.temperature)
        dtype, head = targets.probs.dtype, weight.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=dtype) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias, dtype=dtype) if ctx.needs_input_grad[2] else None
        for chunk, logits in _chunks(hidden, weight, bias, ctx.chunk_rows):
            grad = logits.to(dtype)
            for rows in row_blocks(len(grad), cached_rows(grad.shape[1], grad.device)):
                outer = slice(chunk.start + rows.start, chunk.start + rows.stop)
                _write_gradient(grad[rows], *_take(outer, scan, targets, row), ctx.temperature)
            if grad_bias is not None:
                grad_bias += grad.sum(dim=0)
            grad = grad.to(hidden.dtype)
            grad_hidden[chunk] = grad @ head
            if grad_weight is not None and grad_weight.dtype == grad.dtype:
                grad_weight.addmm_(grad.T, hidden[chunk])
            elif grad_weight is not None:
                grad_weight += grad.T @ hidden[chunk]
        of_head = (None if g is None else g.to(weight.dtype) for g in (grad_weight, grad_bias))
        return grad_hidden, *of_head, *(None,) * 6


def _chunks(hidden: Tensor, weight: Tensor, bias: Tensor | None, chunk_rows: int) -> Iterable[tuple[slice, Tensor]]:
    """(rows, logits (n, V)) through the head, in the dtype of `hidden` even under autocast.

    A chunk is good until the next is asked for, which takes its memory: two of them never exist.
    """
    head, shift = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
    work = hidden.new_empty(min(chunk_rows, len(hidden)), len(head))
    for rows in row_blocks(len(hidden), chunk_rows):
        logits = multiplied(hidden[rows], head, work[: rows.stop - rows.start])
        yield rows, logits if shift is None else logits.add_(shift)


def multiplied(hidden: Tensor, weight: Tensor, work: Tensor) -> Tensor:
    """hidden @ weight.T (n, V) in the dtype of `hidden`, written into `work`.

    A piece of the head at a time, which on a CPU stays in cache while it is used; so a head of another dtype is never
    converted whole.
    """
    piece = HEAD_PIECE if weight.device.type == "cpu" else DEVICE_PIECE
    with torch.autocast(weight.device.type, enabled=False):
        for part in row_blocks(len(weight), max(1, piece // max(1, weight.shape[1]))):
            torch.mm(hidden, weight[part].to(hidden.dtype).T, out=work[:, part])
    return work


def row_blocks(rows: int, block_rows: int) -> list[slice]:
    """Cuts `rows` into runs of `block_rows`, the last one shorter."""
    return [slice(start, min(start + block_rows, rows)) for start in range(0, rows, block_rows)]


def cached_rows(vocabulary: int, device: torch.device) -> int:
    """Rows of float32 logits over which several passes are best made at once."""
    block = CACHE_BLOCK if device.type == "cpu" else DEVICE_BLOCK
    return max(1, block // max(1, vocabulary))


def _take(rows: slice, scan: _Scan, targets: _Targets, row: _RowGradient) -> tuple[_Scan, _Targets, _RowGradient]:
    return _Scan(*(x[rows] for x in scan)), _Targets(*(x[rows] for x in targets)), _RowGradient(*(x[rows] for x in row))


def _joined(scans: Iterable[_Scan], like: Tensor) -> _Scan:
    """The blocks' scans as one; `like` (N, K) gives width and dtype when there is no row."""
    none, no_rows = like.new_empty(0), like.new_empty(0, like.shape[1])
    blocks = list(scans) or [_Scan(none, no_rows, none, none, none)]
    return _Scan(*(torch.cat(columns) for columns in zip(*blocks, strict=True)))
