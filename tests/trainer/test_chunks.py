"""`run.contrastive_chunks`: the gradient of the whole batch, the same paths dropped, less memory."""

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from trainer_cases import tiny_config

from hsv.export import build_encoder
from hsv.objectives import Hybrid, build_hybrid

BATCH = 12
SETS = (["simclr", "mae"], ["dino"], ["simclr", "cpc", "byol", "mae"])


def chunked(objectives: list[str], chunks: int, drop_path: float = 0.0) -> tuple[Hybrid, list[Tensor]]:
    config = tiny_config("unused")
    config.objectives, config.encoder.drop_path, config.run.contrastive_chunks = objectives, drop_path, chunks
    config.input.mean, config.input.std = [0.5], [0.25]
    config.dino.hidden_dim, config.dino.bottleneck_dim, config.dino.out_dim, config.dino.num_locals = 24, 12, 16, 2
    torch.manual_seed(0)
    hybrid = build_hybrid(config, build_encoder(config))
    sides = [view.spec.size or 8 for view in hybrid.views]
    return hybrid, [torch.randn(BATCH, 1, side, side) for side in sides]


def loss_and_gradients(
    objectives: list[str], chunks: int, drop_path: float = 0.0, *, bf16: bool = False
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    hybrid, images = chunked(objectives, chunks, drop_path)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss, _ = hybrid(images, draw=0)
    return loss, torch.autograd.grad(loss, [p for p in hybrid.parameters() if p.requires_grad])


@pytest.mark.parametrize("chunks", [3, 100])
@pytest.mark.parametrize("objectives", SETS, ids="+".join)
def test_the_gradient_is_that_of_the_whole_batch(objectives: list[str], chunks: int) -> None:
    found, expected = loss_and_gradients(objectives, chunks), loss_and_gradients(objectives, 1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("objectives", SETS[:2], ids="+".join)
def test_in_bfloat16_the_gradient_is_that_of_the_whole_batch(objectives: list[str]) -> None:
    (found, parts), (expected, whole) = (loss_and_gradients(objectives, chunks, bf16=True) for chunks in (3, 1))
    parts, whole = (torch.cat([gradient.flatten() for gradient in some]) for some in (parts, whole))
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=0)
    assert (parts - whole).norm() < 0.05 * whole.norm()


def test_sequences_that_choose_other_attention_are_encoded_again_with_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Crops of 17 and of 5 tokens, on both sides of where plain attention ends."""
    monkeypatch.setattr("hsv.models.attention.FEW_TOKENS", 10)
    (found, parts), (expected, whole) = (loss_and_gradients(["dino"], chunks, bf16=True) for chunks in (3, 1))
    parts, whole = (torch.cat([gradient.flatten() for gradient in some]) for some in (parts, whole))
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=0)
    assert (parts - whole).norm() < 0.05 * whole.norm()


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("objectives", SETS[:2], ids="+".join)
def test_encoding_again_drops_the_same_paths(
    objectives: list[str], bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, other = (loss_and_gradients(objectives, 3, drop, bf16=bf16) for drop in (0.5, 0.0))
    monkeypatch.setattr("hsv.models.encoder.checkpoint", lambda function, *args, use_reentrant: function(*args))
    torch.testing.assert_close(found, loss_and_gradients(objectives, 3, 0.5, bf16=bf16), rtol=1e-4, atol=1e-6)
    assert not torch.equal(found[0], other[0])


def saved_bytes(chunks: int) -> int:
    """Memory that a forward pass keeps for backward, each storage once, weights left out."""
    hybrid, images = chunked(["simclr"], chunks)
    weights = {parameter.untyped_storage().data_ptr() for parameter in hybrid.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        hybrid(images, draw=0)
    return sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in weights)


def test_chunks_keep_little_for_backward() -> None:
    """What is left is of patches, heads and loss; the blocks' activations come again, a part at a time."""
    assert saved_bytes(3) < 0.25 * saved_bytes(1)
