"""Values and gradients in float64, in chunks: nothing of the size of a similarity matrix is ever whole.

Each function takes the inputs as they are, rounded to their types, and the gradient of the value.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.bench_distillation import STUDENT, TEACHER
from bench.bench_masking import PATCH, K, L
from bench.providers import TEMPERATURE
from hsv_kernels import random_masking
from hsv_kernels.ops.masking import reference as masking
from hsv_kernels.ops.reconstruction import reference as reconstruction

CHUNK = 1 << 27  # float64 numbers of one piece of a similarity matrix
SAMPLES = 128  # images of one piece of a batch

Truth = Callable[[tuple[Tensor, ...], Tensor], list[Tensor]]


def nt_xent(inputs: tuple[Tensor, Tensor], upstream: Tensor) -> list[Tensor]:
    """NT-Xent's mean over the anchors of two views [N, D], and both gradients."""
    views = [z.detach().double().requires_grad_() for z in inputs]
    z = F.normalize(torch.cat(views))
    rows = z.detach().requires_grad_()
    m = len(rows)
    loss = rows.new_zeros(())
    for i in torch.arange(m, device=z.device).split(max(1, CHUNK // m)):
        logits = (rows[i] @ rows.T / TEMPERATURE).scatter(1, i[:, None], -torch.inf)
        part = F.cross_entropy(logits, (i + m // 2) % m, reduction="sum") / m
        part.backward(upstream.double())
        loss += part.detach()
    return [loss, *torch.autograd.grad(z, views, rows.grad)]


def queue(inputs: tuple[Tensor, Tensor, Tensor], upstream: Tensor) -> list[Tensor]:
    """MoCo's mean loss of normalised queries [n, D], their positives and a queue, and the queries' gradient."""
    q, positive, keys = (x.detach().double() for x in inputs)
    q.requires_grad_()
    loss = q.new_zeros(())
    for i in torch.arange(len(q), device=q.device).split(max(1, CHUNK // len(keys))):
        logits = torch.cat([(q[i] * positive[i]).sum(1, keepdim=True), q[i] @ keys.T], 1) / TEMPERATURE
        part = F.cross_entropy(logits, torch.zeros_like(i), reduction="sum") / len(q)
        part.backward(upstream.double())
        loss += part.detach()
    return [loss, q.grad]


def gather_patches(inputs: tuple[Tensor], upstream: Tensor) -> list[Tensor]:
    """The quarter of the patches [B, K, values] that the first draw of seed 0 keeps, and the images' gradient."""
    (images,) = inputs
    ids, _, _ = random_masking(len(images), L, num_keep=K, seed=0, device=images.device, backend="reference")
    kept = masking.gather_patches(images.detach(), ids, PATCH, PATCH)
    return [kept, masking.scatter_patches(upstream, ids, *images.shape[1:], PATCH, PATCH)]


def restore_tokens(inputs: tuple[Tensor, Tensor, Tensor], upstream: Tensor) -> list[Tensor]:
    """Tokens [B, L, D] in their places, and the gradients of the visible ones and of the mask token."""
    tokens, ids, mask_token = (x.detach() for x in inputs)
    visible = masking.visible_tokens(upstream, ids, tokens.shape[1], tokens.dtype)
    masked = masking.masked_sum(upstream.double(), ids, tokens.shape[1])
    return [masking.restore_tokens(tokens, ids, mask_token), visible, masked]


def masked_mse(inputs: tuple[Tensor, Tensor, Tensor], upstream: Tensor) -> list[Tensor]:
    """The mean over masked patches, targets normalised, and the gradient of the predictions [B, L, values]."""
    pred, images, mask = (x.detach() for x in inputs)
    loss, gradient = mask.new_zeros((), dtype=torch.float64), torch.empty_like(pred, dtype=torch.float64)
    for part in range(0, len(pred), SAMPLES):
        some = slice(part, part + SAMPLES)
        given = pred[some].double().requires_grad_()
        total = reconstruction.masked_mse(given, images[some], mask[some], PATCH, PATCH, True, "sum") / mask.sum()
        (gradient[some],) = torch.autograd.grad(total, given, upstream.double())
        loss += total.detach()
    return [loss, gradient]


def distillation_loss(inputs: tuple[Tensor, ...], upstream: Tensor) -> list[Tensor]:
    """The mean over pairs t ≠ s of a centre [K], a teacher [T, N, K] and students [S, N, K], and S gradients as one."""
    centre, teacher, student = (x.detach() for x in inputs)
    q = ((teacher.double() - centre) / TEACHER).softmax(-1)
    pairs = sum(t != s for t in range(len(q)) for s in range(len(student)))
    loss, gradient = q.new_zeros(()), torch.empty_like(student, dtype=torch.float64)
    for s, view in enumerate(student):
        x = view.double().requires_grad_()
        targets = sum(q[t] for t in range(len(q)) if t != s)
        part = -(targets * (x / STUDENT).log_softmax(-1)).sum(-1).mean() / pairs
        (gradient[s],) = torch.autograd.grad(part, x, upstream.double())
        loss += part.detach()
    return [loss, gradient]


def negative_cosine(inputs: tuple[Tensor, Tensor], upstream: Tensor) -> list[Tensor]:
    """The mean of −cos of rows [N, D], and the gradients of those that require one."""
    rows = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    loss = -(F.normalize(rows[0], eps=1e-8) * F.normalize(rows[1], eps=1e-8)).sum(1).mean()
    return [loss.detach(), *torch.autograd.grad(loss, [x for x in rows if x.requires_grad], upstream.double())]
