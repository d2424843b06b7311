"""Models built of lightly's modules train the same with lightly's losses and helpers and with ours in their place."""

import copy
import warnings
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hsv_kernels.compat import lightly as ours
from hsv_kernels.compat import mae

timm = pytest.importorskip("timm")
lightly_losses = pytest.importorskip("lightly.loss")
modules = pytest.importorskip("lightly.models.modules")
utils = pytest.importorskip("lightly.models.utils")

SIZE, PATCH, WIDTH, BATCH, STEPS = 32, 8, 32, 4, 4
LIBRARIES = SimpleNamespace(losses=lightly_losses, utils=utils), SimpleNamespace(losses=ours, utils=ours)
Step = Callable[[list[Tensor], int], Tensor]


def vit(**options: object) -> nn.Module:
    sizes = {"img_size": SIZE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": 2, "num_heads": 2}
    return timm.models.VisionTransformer(**sizes, num_classes=0, **options)


class Siamese(nn.Module):
    """An encoder and a head; with a predictor where there is one."""

    def __init__(self, encoder: nn.Module, head: nn.Module, predictor: nn.Module | None = None) -> None:
        super().__init__()
        self.encoder, self.head, self.predictor = encoder, head, predictor

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(images))

    def averaged(self) -> "Siamese":
        twin = copy.deepcopy(self)
        utils.deactivate_requires_grad(twin)
        return twin


def simclr(library: SimpleNamespace) -> tuple[nn.Module, Step]:
    model = Siamese(vit(), modules.SimCLRProjectionHead(WIDTH, WIDTH, 16))
    criterion = library.losses.NTXentLoss(temperature=0.2)
    return model, lambda views, step: criterion(model(views[0]), model(views[1]))


def simsiam(library: SimpleNamespace) -> tuple[nn.Module, Step]:
    model = Siamese(vit(), modules.SimSiamProjectionHead(WIDTH, WIDTH, 16), modules.SimSiamPredictionHead(16, 8, 16))
    criterion = library.losses.NegativeCosineSimilarity()

    def loss(views: list[Tensor], step: int) -> Tensor:
        z = [model(view) for view in views[:2]]
        p = [model.predictor(x) for x in z]
        return (criterion(p[0], z[1].detach()) + criterion(p[1], z[0].detach())) / 2

    return model, loss


def moco(library: SimpleNamespace) -> tuple[nn.Module, Step]:
    model = Siamese(vit(), modules.MoCoProjectionHead(WIDTH, WIDTH, 16))
    teacher = model.averaged()
    criterion = library.losses.NTXentLoss(temperature=0.2, memory_bank_size=(3 * BATCH, 16))

    def loss(views: list[Tensor], step: int) -> Tensor:
        utils.update_momentum(model, teacher, 0.9)
        return criterion(model(views[0]), teacher(views[1]).detach())

    return model, loss


def dino(library: SimpleNamespace) -> tuple[nn.Module, Step]:
    with warnings.catch_warnings(action="ignore"):
        model, teacher = (
            Siamese(vit(dynamic_img_size=True), modules.DINOProjectionHead(WIDTH, WIDTH, 16, 64)) for _ in range(2)
        )
    teacher.load_state_dict(model.state_dict())
    utils.deactivate_requires_grad(teacher)
    criterion = library.losses.DINOLoss(output_dim=64, warmup_teacher_temp=0.03, warmup_teacher_temp_epochs=3)

    def loss(views: list[Tensor], step: int) -> Tensor:
        utils.update_momentum(model, teacher, 0.9)
        crops = views[:2] + [view[..., :16, :16] for view in views]
        return criterion([teacher(view) for view in views[:2]], [model(crop) for crop in crops], epoch=step)

    return model, loss


class MaskedAutoencoder(nn.Module):
    def __init__(self, library: SimpleNamespace) -> None:
        super().__init__()
        self.utils = library.utils
        encoder = vit()
        self.backbone = modules.MaskedVisionTransformerTIMM(vit=encoder)
        with warnings.catch_warnings(action="ignore"):
            self.decoder = modules.MAEDecoderTIMM(
                encoder.patch_embed.num_patches,
                PATCH,
                embed_dim=WIDTH,
                decoder_embed_dim=16,
                decoder_depth=1,
                decoder_num_heads=2,
            )

    def forward(self, images: Tensor, keep: Tensor) -> Tensor:
        """Decoded tokens [B, 1 + L, D]."""
        encoded = self.decoder.embed(self.backbone.encode(images, idx_keep=keep))
        tokens = self.utils.repeat_token(self.decoder.mask_token, (len(images), self.backbone.sequence_length))
        return self.decoder.decode(self.utils.set_at_index(tokens, keep, encoded))


def masks(utilities: ModuleType) -> tuple[Tensor, Tensor]:
    return utilities.random_token_mask((BATCH, 1 + (SIZE // PATCH) ** 2), mask_ratio=0.75)


def masked(library: SimpleNamespace) -> tuple[nn.Module, Step]:
    """The mask is ours for both, since no two generators draw alike."""
    model, helpers = MaskedAutoencoder(library), library.utils

    def loss(views: list[Tensor], step: int) -> Tensor:
        keep, removed = masks(ours)
        decoded = model(views[0], keep)
        if library.losses is ours:
            mask = torch.ones(decoded.shape[:2]).scatter(1, keep, 0)[:, 1:]
            return mae.forward_loss(views[0], model.decoder.predict(decoded[:, 1:]), mask, PATCH)
        pred = model.decoder.predict(helpers.get_at_index(decoded, removed))
        return F.mse_loss(pred, helpers.get_at_index(helpers.patchify(views[0], PATCH), removed - 1))

    return model, loss


def train(method: Callable[[SimpleNamespace], tuple[nn.Module, Step]], library: SimpleNamespace) -> Tensor:
    """The losses of a few steps, and the norm of all parameters after them."""
    torch.manual_seed(0)
    model, loss = method(library)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    images = torch.rand(BATCH, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    losses = []
    for step in range(STEPS):
        torch.manual_seed(step)  # a loss may draw numbers when it is made
        value = loss([images + 0.1 * torch.randn_like(images) for _ in range(4)], step)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.detach())
    return torch.stack([*losses, torch.nn.utils.get_total_norm(model.parameters()).detach()])


@pytest.mark.parametrize("method", [simclr, simsiam, moco, dino, masked], ids=lambda method: method.__name__)
def test_losses_are_those_of_lightly(method: Callable) -> None:
    theirs, found = (train(method, library) for library in LIBRARIES)
    assert found[:STEPS].unique().numel() == STEPS
    torch.testing.assert_close(found, theirs, rtol=1e-4, atol=1e-5)
