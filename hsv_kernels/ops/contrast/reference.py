"""The definition of the contrast operations in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from hsv_kernels.ops.tensors import computed_type

__all__ = ["masked_logsumexp", "nt_xent", "similarity_logsumexp"]


def nt_xent(z0: Tensor, z1: Tensor, temperature: float | Tensor, bfloat16: bool = False) -> Tensor:
    """Per-anchor losses [2N]: log Σ_{j≠i} exp S_ij − S_i,pos(i), as softplus(lse over the negatives − S_i,pos(i)).

    NaN for a temperature that is not positive and finite. With `bfloat16` the negatives' products take rounded rows.
    """
    n = z0.shape[0]
    if isinstance(temperature, Tensor):
        temperature = temperature.where((temperature > 0) & (temperature < torch.inf), torch.nan)
    z = torch.cat([z0, z1]).to(computed_type(z0.dtype))
    z = z / z.norm(dim=1, keepdim=True).clamp_min(1e-12)
    rounded = z.to(torch.bfloat16).to(z.dtype) if bfloat16 else z
    logits = rounded @ rounded.T / temperature

    column = torch.arange(2 * n, device=z.device)
    positive = (column + n) % (2 * n)
    negatives = (column != column[:, None]) & (column != positive[:, None])
    difference = masked_logsumexp(logits, negatives) - (z * z.roll(n, 0)).sum(1) / temperature
    return -F.logsigmoid(-difference)  # softplus, without the threshold that F.softplus has


def similarity_logsumexp(
    q: Tensor,
    k: Tensor | None,
    scale: float | Tensor,
    exclude_self: bool,
    self_offset: int,
    positive: Tensor | None,
    q_labels: Tensor | None,
    k_labels: Tensor | None,
    bfloat16: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """lse [n] over the candidates of each row, or (lse − positive_logit, positive_logit).

    With `bfloat16` the products of all but the positives take rounded rows.
    """
    q = q.to(computed_type(q.dtype))
    k = q if k is None else k.to(q.dtype)
    rounded = [x.to(torch.bfloat16).to(x.dtype) if bfloat16 else x for x in (q, k)]
    logits = scale * (rounded[0] @ rounded[1].T)

    row = torch.arange(q.shape[0], device=q.device)
    column = torch.arange(k.shape[0], device=q.device)
    candidates = torch.ones_like(logits, dtype=torch.bool)
    if exclude_self:
        candidates &= column != row[:, None] + self_offset
    if q_labels is not None:
        candidates &= q_labels[:, None] != k_labels
    if positive is None:
        return masked_logsumexp(logits, candidates)

    if positive.dim() == 1:
        candidates &= column != positive[:, None]
        positive = k[positive]
    positive_logit = scale * (q * positive.to(q.dtype)).sum(1)
    return masked_logsumexp(logits, candidates) - positive_logit, positive_logit


def masked_logsumexp(logits: Tensor, candidates: Tensor) -> Tensor:
    """log Σ exp over the candidates of each row; −inf with a zero gradient where there are none."""
    logits = logits.masked_fill(~candidates, -torch.inf)
    shift = logits.detach().amax(1)
    shift = shift.where(shift != -torch.inf, 0)
    total = (logits - shift[:, None]).exp().sum(1)
    some = candidates.any(1)
    return (shift + total.where(some, 1).log()).where(some, -torch.inf)
