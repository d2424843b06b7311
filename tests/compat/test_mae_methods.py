"""hsv_kernels.compat.mae against the paper's definitions in plain PyTorch: the original is no package."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from parity import assert_same, error_of, leaves
from torch import Tensor, nn

from hsv_kernels.compat import mae


def patches(images: Tensor, p: int) -> Tensor:
    """[N, L, p·p·C] by unfolding; a channel's pixels become every C-th value."""
    columns = F.unfold(images, p, stride=p).transpose(1, 2)
    return columns.unflatten(2, (images.shape[1], p * p)).transpose(2, 3).flatten(2)


def loss(images: Tensor, pred: Tensor, mask: Tensor, p: int, normalised: bool) -> Tensor:
    target = patches(images, p)
    if normalised:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    return (((pred - target) ** 2).mean(-1) * mask).sum() / mask.sum()


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (3, 3, 16, 16), (2, 4, 8, 12)])
def test_forward_loss(shape: tuple[int, ...], normalised: bool) -> None:
    images = torch.rand(shape)
    rows = shape[2] * shape[3] // 16
    (pred,) = leaves((shape[0], rows, 16 * shape[1]))
    mask = (torch.arange(rows) % 4 > 0).float().expand(shape[0], -1)
    for p in (pred, pred.detach().half().requires_grad_()):
        tolerance = {"rtol": 1e-3, "atol": 1e-3} if p.dtype == torch.float16 else {}
        assert_same(loss, mae.forward_loss, images, p, mask, 4, normalised, inputs=[p], **tolerance)
    assert mae.forward_loss(images.requires_grad_(), pred, mask * 0, 4) == 0
    for wrong in (pred[:, 1:], pred[..., 1:], pred[None]):
        assert error_of(lambda p=wrong: mae.forward_loss(images, p, mask, 4)) is RuntimeError
    assert error_of(lambda: mae.forward_loss(images, pred, mask[:, 1:], 4)) is RuntimeError


@pytest.mark.parametrize("mask", [(1, 4), (4,), (3, 1)])
@pytest.mark.parametrize("pred", [(1, 4, 48), (4, 48), (3, 4, 48)])
def test_forward_loss_broadcasts(pred: tuple[int, ...], mask: tuple[int, ...]) -> None:
    weights = (torch.arange(4) > 0).float().expand(mask) if mask[-1] == 4 else torch.tensor([[1.0], [0], [1]])
    assert_same(loss, mae.forward_loss, torch.rand(3, 3, 8, 8), *leaves(pred), weights, 4, False)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_forward_loss_of_integer_images(dtype: torch.dtype) -> None:
    images, mask = (torch.rand(3, 3, 8, 8) * 255).to(dtype), torch.ones(3, 4)
    (pred,) = leaves((3, 4, 48))
    assert_same(lambda i, *a: loss(i.float(), *a), mae.forward_loss, images, pred, mask, 4, False)
    assert error_of(lambda: mae.forward_loss(images, pred, mask, 4, True)) is RuntimeError


def test_forward_loss_of_images_made_in_inference_mode() -> None:
    with torch.inference_mode():
        images = torch.rand(3, 3, 8, 8)
    assert_same(loss, mae.forward_loss, images, *leaves((3, 4, 48)), torch.ones(3, 4), 4, True)


def test_patchify_and_back() -> None:
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(mae.patchify(images), patches(images, 16))
    assert torch.equal(mae.unpatchify(mae.patchify(images)), images)
    assert torch.equal(mae.patchify(images[:, :, :8], 4), patches(images[:, :, :8], 4))
    for call in (lambda: mae.patchify(images, 5), lambda: mae.unpatchify(torch.zeros(2, 5, 12), 2)):
        assert error_of(call) is AssertionError


@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.75, 0.9, 1.0])
@pytest.mark.parametrize("tokens", [10, 196])
def test_random_masking(tokens: int, ratio: float) -> None:
    (x,) = leaves((3, tokens, 8))
    kept, mask, ids_restore = mae.random_masking(x, ratio)
    keep = int(tokens * (1 - ratio))
    assert kept.shape == (3, keep, 8) and mask.shape == ids_restore.shape == (3, tokens)
    assert torch.equal(mask, (ids_restore >= keep).float()) and (mask.sum(1) == tokens - keep).all()
    restored = torch.cat([kept, x.new_zeros(3, tokens - keep, 8)], 1).gather(1, ids_restore[..., None].expand_as(x))
    assert torch.equal(restored, x * (1 - mask[..., None]))
    if keep:
        (gradient,) = torch.autograd.grad(kept.sum(), x)
        assert torch.equal(gradient, (1 - mask[..., None]).expand_as(x))


@pytest.mark.parametrize("ratio", [-0.5, 1.2, 2.5])
def test_random_masking_at_ratios_out_of_range(ratio: float) -> None:
    """As many tokens as the slice [: int(L · (1 − ratio))] takes."""
    kept, mask, _ = mae.random_masking(torch.rand(3, 10, 8), ratio)
    keep = len(range(10)[: int(10 * (1 - ratio))])
    assert kept.shape == (3, keep, 8) and (mask.sum(1) == 10 - keep).all()


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_random_masking_of_any_dtype(dtype: torch.dtype) -> None:
    x = torch.arange(30).reshape(3, 10, 1).expand(-1, -1, 2).to(dtype)
    kept, mask, ids_restore = mae.random_masking(x, 0.5)
    restored = torch.cat([kept, torch.zeros_like(x[:, 5:])], 1).gather(1, ids_restore[..., None].expand_as(x))
    assert torch.equal(restored, torch.where(mask[..., None] > 0, torch.zeros_like(x), x))


def test_random_masking_follows_the_seed() -> None:
    x = torch.rand(4, 16, 8)
    torch.manual_seed(0)
    first, again = mae.random_masking(x, 0.75)[1], mae.random_masking(x, 0.75)[1]
    torch.manual_seed(0)
    assert torch.equal(mae.random_masking(x, 0.75)[1], first)
    assert not torch.equal(first, again)


class Model(nn.Module):
    """What the mixin meets: a model whose own four methods it takes the place of."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed, self.norm_pix_loss = SimpleNamespace(patch_size=(4, 4)), True
        self.head = nn.Linear(48, 48)

    def random_masking(self, x: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError

    patchify = unpatchify = forward_loss = random_masking

    def forward(self, images: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
        x = self.patchify(images)
        kept, mask, ids_restore = self.random_masking(self.head(x), mask_ratio)
        every = torch.cat([kept, kept.new_zeros(len(x), x.shape[1] - kept.shape[1], 48)], 1)
        pred = every.gather(1, ids_restore[..., None].expand_as(x))
        assert torch.equal(self.unpatchify(x), images)
        return self.forward_loss(images, pred, mask), pred, mask


class Swapped(mae.MaskedAutoencoderMixin, Model):
    pass


def test_mixin() -> None:
    model, images = Swapped(), torch.rand(2, 3, 8, 8)
    value, pred, mask = model(images, 0.5)
    torch.testing.assert_close(value, loss(images, pred, mask, 4, True))
    assert set(model.state_dict()) == set(Model().state_dict())
