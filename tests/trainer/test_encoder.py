"""The shared encoder: visible patches alone, and what timm alone makes of the exported file."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from trainer_cases import tiny_config, tiny_model

from hsv.export import build_encoder, export_encoder, load_encoder
from hsv.models import Encoder
from hsv_kernels import random_masking

NAME = "vit_tiny_patch16_224"


def encoder_for(channels: int = 3, pool: str = "mean", **arguments: object) -> Encoder:
    torch.manual_seed(0)
    model = tiny_model(in_chans=channels, **arguments)
    encoder = Encoder(NAME, model, mean=(0.5,) * channels, std=(0.25,) * channels, pool=pool).eval()
    with torch.no_grad():
        encoder.vit.cls_token.normal_()
    return encoder


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize(("size", "patch"), [((16, 16), (4, 4)), ((12, 20), (3, 5)), ((8, 24), (4, 2))])
@pytest.mark.parametrize("no_embed_class", [False, True])
def test_visible_patches_are_the_full_embedding_indexed(
    channels: int, size: tuple[int, int], patch: tuple[int, int], no_embed_class: bool
) -> None:
    encoder = encoder_for(channels, img_size=size, patch_size=patch, no_embed_class=no_embed_class, reg_tokens=2)
    images = torch.randn(3, channels, *size)
    ids_keep, _, _ = random_masking(3, encoder.num_patches, mask_ratio=0.5, seed=1)

    full = encoder.vit._pos_embed(encoder.vit.patch_embed(images))
    prefix, patches = full[:, :3], full[:, 3:]
    expected = torch.cat([prefix, patches.gather(1, ids_keep[..., None].expand(-1, -1, 32))], 1)
    torch.testing.assert_close(encoder.with_prefix(*encoder.embed(images, ids_keep)), expected, rtol=1e-5, atol=1e-5)


def test_all_patches_visible_give_the_whole_encoding() -> None:
    encoder, images = encoder_for(), torch.randn(2, 3, 16, 16)
    every = torch.arange(16).expand(2, -1)
    whole, visible = encoder.encode(images), encoder.encode(images, every)
    torch.testing.assert_close(visible.patches, whole.patches, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(visible.cls, whole.cls, rtol=1e-4, atol=1e-5)


def test_removed_patches_are_not_read() -> None:
    encoder, images = encoder_for(), torch.randn(1, 3, 16, 16)
    ids_keep = torch.tensor([[5, 2]])
    poisoned = torch.full_like(images, torch.nan)
    for index in ids_keep[0].tolist():
        rows, columns = slice(index // 4 * 4, index // 4 * 4 + 4), slice(index % 4 * 4, index % 4 * 4 + 4)
        poisoned[:, :, rows, columns] = images[:, :, rows, columns]
    assert torch.equal(encoder.encode(poisoned, ids_keep).patches, encoder.encode(images, ids_keep).patches)


def test_pooling_and_shapes() -> None:
    encoder, images = encoder_for(), torch.randn(2, 3, 16, 16)
    tokens = encoder.vit.forward_features(images)
    assert torch.equal(encoder.features(images), tokens[:, 1:].mean(1))
    assert torch.equal(encoder.features(images, "cls"), tokens[:, 0])
    assert (encoder.image_size, encoder.patch_size, encoder.channels, encoder.dim) == ((16, 16), (4, 4), 3, 32)


def test_other_architectures_are_refused() -> None:
    with pytest.raises(ValueError, match="encoder: got 'vit_small_patch16_18x2_224'"):  # blocks side by side
        Encoder("vit_small_patch16_18x2_224", tiny_model(), mean=(0.5,) * 3, std=(0.25,) * 3)
    for name in ("resnet10t", "vit_of_nobody", "vit_medium_patch16_gap_256"):
        with pytest.raises(ValueError, match=f"encoder: got '{name}'"):
            Encoder(name, {"in_chans": 3}, mean=(0.5,), std=(0.5,))
    with pytest.raises(ValueError, match="num_heads"):
        Encoder(NAME, tiny_model(num_heads=5), mean=(0.5,), std=(0.5,))


def test_bfloat16_training_attention_matches_fused() -> None:
    encoder, images = encoder_for(), torch.randn(4, 3, 16, 16)
    fused = encoder.features(images)
    encoder.train()
    with torch.autocast("cpu", torch.bfloat16):
        plain = encoder.features(images)
    assert not encoder.vit.blocks[0].attn.fused_attn
    torch.testing.assert_close(plain.float(), fused, rtol=0.05, atol=0.05)
    encoder.eval().features(images)
    assert encoder.vit.blocks[0].attn.fused_attn


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_timm_alone_computes_the_same_bits(tmp_path: Path, pool: str) -> None:
    """A process that imports timm and not hsv evaluates the call of encoder.json."""
    encoder = encoder_for(pool=pool, img_size=(16, 24), reg_tokens=2)
    export_encoder(encoder, tmp_path)
    images = torch.randn(3, 3, 16, 24)
    torch.save(images, tmp_path / "images.pt")
    script = """
import json, sys, timm, torch
model = eval(json.load(open("encoder.json"))["call"]).eval()
with torch.no_grad():
    torch.save(model(torch.load("images.pt")), "features.pt")
assert not any(name.split(".")[0] in ("hsv", "hsv_kernels") for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "features.pt"), encoder.features(images))
        assert torch.equal(load_encoder(tmp_path).features(images), encoder.features(images))
    described = json.loads((tmp_path / "encoder.json").read_text())
    assert described["pool"] == pool and described["channels"] == 3 and described["mean"] == [0.5] * 3


def test_a_description_with_another_pooling_than_the_encoders_loads(tmp_path: Path) -> None:
    encoder, images = encoder_for(), torch.randn(2, 3, 16, 16)
    export_encoder(encoder, tmp_path)
    described = json.loads((tmp_path / "encoder.json").read_text())
    described["arguments"] = tiny_model() | {"num_classes": 0, "global_pool": "token"}
    (tmp_path / "encoder.json").write_text(json.dumps(described))
    loaded = load_encoder(tmp_path)
    assert torch.equal(loaded.features(images), encoder.features(images))
    assert loaded.arguments == encoder.arguments


def test_the_reason_for_a_refused_encoder_comes_first() -> None:
    with pytest.raises(ValueError, match=r"^encoder: got 'nosuchvit': Unknown model \(nosuchvit\); allowed: "):
        Encoder("nosuchvit", tiny_model(), mean=(0.5,), std=(0.5,))


def test_nothing_to_load_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="allowed"):
        load_encoder(tmp_path)
    with pytest.raises(ValueError, match=r"encoder\.json"):
        load_encoder(tmp_path / "encoder.safetensors")


def test_unset_shapes_stay_as_timm_has_them(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    config.input.mean, config.input.std = [0.5], [0.25]
    config.encoder.depth = None
    encoder = build_encoder(config)
    assert len(encoder.vit.blocks) == 12 and encoder.arguments["num_classes"] == 0


@pytest.mark.parametrize(
    "arguments", [{}, {"no_embed_class": True}, {"reg_tokens": 2}, {"embed_dim": 36, "num_heads": 6}]
)
def test_weights_start_as_those_of_mae_and_moco_v3(arguments: dict) -> None:
    encoder = encoder_for(**arguments)
    vit, dim = encoder.vit, encoder.dim
    place = torch.arange(4.0)[:, None] / 10000 ** (torch.arange(dim // 4) / (dim // 4))  # [side, dim / 4]
    both = torch.cat([place.repeat_interleave(4, 0), place.repeat(4, 1)], 1)  # of patches, row by row
    prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
    torch.testing.assert_close(vit.pos_embed[0, prefix:], torch.cat([both.sin(), both.cos()], 1))
    assert not vit.pos_embed[0, :prefix].any()
    assert vit.pos_embed.requires_grad

    def bound(weight: torch.Tensor) -> float:  # of Xavier's uniform weights
        return (6 / sum(weight.shape)) ** 0.5

    block, patches = vit.blocks[0], vit.patch_embed.proj.weight.flatten(1)
    for weight in (*block.attn.qkv.weight.chunk(3), block.mlp.fc1.weight, patches):
        assert 0.9 * bound(weight) < weight.abs().max() <= bound(weight)
