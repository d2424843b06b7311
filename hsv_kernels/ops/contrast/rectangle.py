"""The rectangle, queries against keys: what its backends share, and the gradients that need no kernel."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Form", "KeyGradient", "Saved", "check_columns", "logsumexp_backward"]

#: (g, h, q, k, scale, form, saved, besides) → the gradient of k [m, D] plus `besides`, of the dtype of k.
KeyGradient = Callable[..., Tensor]


class Form(NamedTuple):
    """Which keys each query sums over, and how products are computed; the fields of similarity_logsumexp."""

    exclude_self: bool
    self_offset: int
    positive: Tensor | None
    q_labels: Tensor | None
    k_labels: Tensor | None
    bfloat16: bool

    @property
    def columns(self) -> Tensor | None:
        """The positives where they are columns of k, int64 [n]."""
        return self.positive if self.positive is not None and self.positive.dim() == 1 else None

    @property
    def rows(self) -> Tensor | None:
        """The positives where they are rows [n, D]."""
        return self.positive if self.columns is None else None


class Saved(NamedTuple):
    """What forward gives to backward, each None where no gradient needs it."""

    mean_key: Tensor | None  # [n, D] Σ_j p_ij k_j
    positive_rows: Tensor | None  # [n, D] the rows of k that positive names
    log2_sum: Tensor | None  # [2, n] log2 Σ_j exp S_ij in two parts, each backend's own


def check_columns(positive: Tensor, m: int) -> None:
    """Raises IndexError unless `positive` holds columns of m keys; reads them on the host."""
    least, most = positive.aminmax()
    if least < 0 or most >= m:
        raise IndexError(f"positive must be columns of k, in [0, {m}); got {int(least)} … {int(most)}")


def logsumexp_backward(
    grad: Tensor | None,
    positive_grad: Tensor | None,
    q: Tensor,
    k: Tensor | None,
    square: bool,
    scale: Tensor,
    form: Form,
    saved: Saved,
    need_q: bool,
    need_k: bool,
    need_scale: bool,
    need_positive: bool,
    key_gradient: KeyGradient,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dq, dk, dscale and dpositive of Σ grad_i · (lse or d)_i + positive_grad_i · positive_logit_i.

    None where not needed. With g and h the gradients of lse and of the positive logits:

        dq_i = scale · (g_i · mean_key_i + h_i · positive_i),   dpositive_i = scale · h_i · q_i
        dscale = Σ_i q_i · (g_i · mean_key_i + h_i · positive_i)
        dk_j = scale · (Σ_i g_i p_ij q_i + Σ_{positive_i = j} h_i q_i)

    k, labels and columns of positives are read for dk alone, and may be None where that is not needed. Where k is q
    itself, `square`, dq is the sum of both, rounded once, and there is no dk.
    """
    zero = scale.new_zeros(q.shape[0])
    g = zero if grad is None else grad.to(scale.dtype)
    columns = form.columns is not None
    rows = saved.positive_rows if form.rows is None else form.rows
    h = None
    if rows is not None or columns:
        h = (zero if positive_grad is None else positive_grad.to(scale.dtype)) - g

    dq = dscale = dk = dpositive = None
    if need_q or need_scale:
        pull = saved.mean_key * g[:, None]
        if rows is not None:
            pull += rows * h[:, None]
        if need_scale:
            dscale = (q * pull).sum(dtype=torch.float64).to(scale.dtype)
        if need_q:
            dq = pull.mul_(scale)
    if need_positive:
        dpositive = (q * (scale * h)[:, None]).to(form.positive.dtype).contiguous()
    if square and need_q:
        dq = key_gradient(g, h if columns else None, q, q, scale, form, saved, besides=dq)
    elif need_k:
        dk = key_gradient(g, h if columns else None, q, k, scale, form, saved, besides=None)
    return None if dq is None else dq.to(q.dtype), dk, dscale, dpositive
