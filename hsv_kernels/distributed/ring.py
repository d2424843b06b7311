"""Queries against the keys of all ranks, which travel round a ring of ranks block by block.

At step s a rank holds the block of rank − s and passes it on to rank + 1 while it computes. With d the log-sum-exp over
the negatives less the positive's logit, blocks merge as

    d = logaddexp_s (lse_s − positive_logit),   ∂d / ∂lse_s = exp(lse_s − positive_logit − d) = w_s,

so that a block's backward is that of `similarity_logsumexp` with the incoming gradient g · w_s, and the positive
logit's gradient is −g · (1 − w_0) besides what the own block's d passes to it.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from hsv_kernels import functional
from hsv_kernels.backends import Backend
from hsv_kernels.distributed.collectives import rank, world_size
from hsv_kernels.ops.tensors import computed_type

__all__ = ["ring_difference"]


def ring_difference(
    q: Tensor,
    k: Tensor,
    positive: Tensor,
    scale: float | Tensor,
    exclude_self: bool,
    counts: list[int],
    dot_dtype: torch.dtype | None,
    backend: Backend | None,
) -> Tensor:
    """d [n] = log Σ exp(scale · q_i · k_j) over the keys of all ranks but the positive, less the positive's logit.

    Args:
        q: [n, D] this rank's queries.
        k: [n, D] this rank's keys; n may differ between ranks and may be 0.
        positive: int64 [n], rows of this rank's k.
        scale: number or 0-dim tensor.
        exclude_self: leave key i out of row i.
        counts: n of each rank.
        dot_dtype, backend: as in `hsv_kernels.similarity_logsumexp`.

    Returns:
        float64 for float64 rows, float32 otherwise; −inf where there is no negative.
    """
    dtype = computed_type(q.dtype)
    scale = torch.as_tensor(scale, dtype=dtype, device=q.device)
    options = {"dot_dtype": dot_dtype, "backend": backend}
    return _RingDifference.apply(q, k, positive, scale, exclude_self, counts, options)


class _Exchange:
    """Rows on their way to the next rank while the previous one's arrive."""

    def __init__(self, rows: Tensor, arriving: int) -> None:
        self.sent, self.received = rows.contiguous(), rows.new_empty(arriving, *rows.shape[1:])
        last, following = (rank() - 1) % world_size(), (rank() + 1) % world_size()
        transfers = [dist.P2POp(dist.isend, self.sent, following)] if len(rows) else []
        transfers += [dist.P2POp(dist.irecv, self.received, last)] if arriving else []
        self.works = dist.batch_isend_irecv(transfers) if transfers else []

    def wait(self) -> Tensor:
        """The rows that arrived."""
        for work in self.works:
            work.wait()
        return self.received


class _RingDifference(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        positive: Tensor,
        scale: Tensor,
        exclude_self: bool,
        counts: list[int],
        options: dict[str, Any],
    ) -> Tensor:
        ctx.exclude_self, ctx.counts, ctx.options = exclude_self, counts, options
        d, block = scale.new_empty(0), k
        for step in range(len(counts)):
            onward = _Exchange(block, _rows(counts, step + 1)) if step + 1 < len(counts) else None
            if len(q) and step == 0:
                d, logit = functional.similarity_logsumexp(
                    q, k, scale=scale, exclude_self=exclude_self, positive=positive, **options
                )
            elif len(q) and len(block):
                d = torch.logaddexp(d, functional.similarity_logsumexp(q, block, scale=scale, **options) - logit)
            block = onward.wait() if onward else block
        ctx.save_for_backward(q, k, positive, scale, d)
        return d

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, positive, scale, d = ctx.saved_tensors
        counts, need_k = ctx.counts, ctx.needs_input_grad[1]
        finite = d.where(d != -torch.inf, 0)  # a row without negatives has grad 0, which −inf − (−inf) would spoil

        dq, dk, dscale, logit = _own_gradients(ctx, q, k, positive, scale, grad, finite)
        onward = returning = None
        for step in range(1, len(counts)):
            block = (onward or _Exchange(k, _rows(counts, 1))).wait()
            onward = _Exchange(block, _rows(counts, step + 1)) if step + 1 < len(counts) else None
            block_dq, block_dk, block_dscale = _block_gradients(ctx, q, block, scale, grad, finite, logit)
            dq, dscale = dq + block_dq, dscale + block_dscale
            if need_k:
                total = block_dk if returning is None else block_dk + returning.wait()
                returning = _Exchange(total, _rows(counts, step + 1))  # with the block, so home after the last step
        if returning:
            dk = dk + returning.wait()
        return dq.to(q.dtype), dk.to(k.dtype) if need_k else None, None, dscale, None, None, None


def _rows(counts: list[int], step: int) -> int:
    """Rows of the block that this rank holds at `step`."""
    return counts[(rank() - step) % len(counts)]


def _own_gradients(
    ctx: Any, q: Tensor, k: Tensor, positive: Tensor, scale: Tensor, grad: Tensor, d: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dscale of this rank's own block in the type of `scale`, and its positive logits."""
    if not len(q):
        return *_no_gradients(q, k, scale), scale.new_empty(0)
    with torch.enable_grad():
        leaves = _leaves(ctx, q, k, scale)
        own, logit = functional.similarity_logsumexp(
            *leaves[:2], scale=leaves[2], exclude_self=ctx.exclude_self, positive=positive, **ctx.options
        )
    log_weight = own.detach() - d
    upstream = [grad * log_weight.exp(), grad * torch.expm1(log_weight)]
    return *_gradients([own, logit], leaves, upstream), logit.detach()


def _block_gradients(
    ctx: Any, q: Tensor, block: Tensor, scale: Tensor, grad: Tensor, d: Tensor, logit: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dblock, dscale of another rank's block in the type of `scale`."""
    if not len(q) or not len(block):
        return _no_gradients(q, block, scale)
    with torch.enable_grad():
        leaves = _leaves(ctx, q, block, scale)
        lse = functional.similarity_logsumexp(*leaves[:2], scale=leaves[2], **ctx.options)
    return _gradients([lse], leaves, [grad * (lse.detach() - logit - d).exp()])


def _leaves(ctx: Any, *tensors: Tensor) -> list[Tensor]:
    """q, k and scale as leaves of a graph of their own, requiring the gradients that backward owes."""
    needed = (ctx.needs_input_grad[i] for i in (0, 1, 3))
    return [x.detach().requires_grad_(need) for x, need in zip(tensors, needed, strict=True)]


def _gradients(outputs: list[Tensor], leaves: list[Tensor], upstream: list[Tensor]) -> tuple[Tensor, ...]:
    """The leaves' gradients in the type of the scale, 0 where none is required."""
    found = iter(torch.autograd.grad(outputs, [leaf for leaf in leaves if leaf.requires_grad], upstream))
    dtype = leaves[-1].dtype
    return tuple(next(found).to(dtype) if x.requires_grad else torch.zeros_like(x, dtype=dtype) for x in leaves)


def _no_gradients(*leaves: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.zeros_like(x, dtype=leaves[-1].dtype) for x in leaves)
