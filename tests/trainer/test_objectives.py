"""Objectives, their combination and their weights."""

import dataclasses
import math

import pytest
import torch
from torch.nn import functional as F
from trainer_cases import narrow_config, tiny_config

from hsv.config import CMAEConfig
from hsv.data import ViewSpec
from hsv.export import build_encoder
from hsv.objectives import Hybrid, build_hybrid


def hybrid_for(objectives: list[str], **mae: object) -> Hybrid:
    config = tiny_config("unused")
    config.objectives, config.encoder.drop_path = objectives, 0.0
    config.input.mean, config.input.std = [0.5], [0.25]
    config.mae = dataclasses.replace(config.mae, **mae)
    torch.manual_seed(0)
    return build_hybrid(config, build_encoder(config))


def views(hybrid: Hybrid, batch: int = 6) -> list[torch.Tensor]:
    return [torch.randn(batch, 1, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(len(hybrid.views))]


@pytest.mark.parametrize(
    ("objectives", "mae_view", "expected_views", "expected_requests"),
    [
        (["simclr", "mae"], "shared", 2, 3),
        (["simclr", "mae"], "own", 3, 3),
        (["mae"], "shared", 1, 1),
        (["simclr"], "shared", 2, 2),
    ],
)
def test_distinct_views_and_requests(
    objectives: list[str], mae_view: str, expected_views: int, expected_requests: int
) -> None:
    hybrid = hybrid_for(objectives, view=mae_view)
    assert (len(hybrid.views), len(hybrid.requests)) == (expected_views, expected_requests)
    loss, logs = hybrid(views(hybrid), draw=0)
    loss.backward()
    each = {f"{kind}/{name}" for kind in ("loss", "weight") for name in objectives}
    measured = {f"gradient/{name}" for name in objectives} | {"gradient_cosine/simclr·mae"}
    assert set(logs) == {"loss/total", "feature_spread", "effective_rank"} | each | (
        measured if len(objectives) > 1 else set()
    )
    assert all(p.grad is not None and p.grad.isfinite().all() for p in hybrid.parameters())


def test_own_view_equal_to_a_contrastive_one_is_shared() -> None:
    spec = hybrid_for(["simclr"]).views[0].spec
    assert len(hybrid_for(["simclr", "mae"], view="own", own_view=spec).views) == 2
    assert len(hybrid_for(["simclr", "mae"], view="own", own_view=ViewSpec()).views) == 3


def test_each_distinct_request_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    hybrid, sizes = hybrid_for(["simclr", "mae"]), []
    transform = hybrid.encoder.transform
    monkeypatch.setattr(
        hybrid.encoder, "transform", lambda x, *args, **more: sizes.append(len(x)) or transform(x, *args, **more)
    )
    hybrid(views(hybrid), draw=0)
    assert sizes == [12, 6]  # both whole views in one batch, and the masked one


def test_simclr_is_the_formula() -> None:
    hybrid = hybrid_for(["simclr"]).eval()
    loss, _ = hybrid(images := views(hybrid), draw=0)
    head = hybrid.objectives["simclr"]
    z = F.normalize(head.projector(hybrid.encoder.features(torch.cat(images))), dim=1).double()
    logits = (z @ z.T / head.config.temperature).fill_diagonal_(-math.inf)
    expected = F.cross_entropy(logits, torch.arange(12).roll(6)) / math.log(11)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)


def test_mae_is_the_formula() -> None:
    hybrid = hybrid_for(["mae"]).eval()
    (images,) = views(hybrid)
    loss, _ = hybrid([images], draw=7)
    mae = hybrid.objectives["mae"]
    visible = hybrid.encode(dict(zip(hybrid.views, [images], strict=True)), 7)[mae.requests[0]]
    pred = mae.decoder(visible.patches, visible.ids_restore).double()
    target = images.double().unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 4, 5, 1).reshape(6, 16, 4)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    errors = (pred - target).square().mean(-1)
    expected = (errors * visible.mask).sum() / visible.mask.sum()
    assert visible.patches.shape == (6, 4, 32) and visible.mask.sum() == 6 * 12
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)


def test_masks_are_a_function_of_the_draw() -> None:
    hybrid = hybrid_for(["mae"]).eval()
    losses = [hybrid(views(hybrid), draw=draw)[0].item() for draw in (0, 1, 0)]
    assert losses[0] == losses[2] != losses[1]


def test_reconstruction_keeps_visible_pixels_and_fills_the_others() -> None:
    hybrid = hybrid_for(["mae"]).eval()
    (images,) = views(hybrid)
    masked, filled, mask = hybrid.objectives["mae"].reconstruct(hybrid.encoder, images, seed=3)
    removed = mask.reshape(6, 1, 4, 4).repeat_interleave(2, 2).repeat_interleave(2, 3).bool()
    assert torch.equal(masked, images.masked_fill(removed, 0))
    assert torch.equal(filled[~removed], images[~removed])
    assert filled[removed].isfinite().all() and not torch.equal(filled, masked)


def test_decoder_learns_a_constant_texture() -> None:
    hybrid = hybrid_for(["mae"], norm_pix=False, mask_ratio=0.5)
    images = torch.linspace(-1, 1, 4).reshape(1, 1, 2, 2).repeat(8, 1, 4, 4)
    optimiser = torch.optim.Adam(hybrid.parameters(), lr=3e-3)
    for step in range(60):
        loss, _ = hybrid([images], draw=step)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.02
    _, filled, _ = hybrid.eval().objectives["mae"].reconstruct(hybrid.encoder, images)
    torch.testing.assert_close(filled, images, rtol=0, atol=0.5)


def test_what_leaves_nothing_of_an_image_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cmae: got views shifted by up to 15 pixels; allowed: less than a side"):
        shifted = narrow_config("unused", ["cmae"])
        shifted.cmae.target_view = CMAEConfig().target_view
        shifted.input.mean, shifted.input.std = [0.5], [0.25]
        build_hybrid(shifted, build_encoder(shifted))
    config = narrow_config("unused", ["mae"])
    config.encoder.patch_size, config.input.mean, config.input.std = 1, [0.5], [0.25]
    with pytest.raises(ValueError, match=r"norm_pix: got True for patches of 1 value"):
        build_hybrid(config, build_encoder(config))


@pytest.mark.parametrize(("momentum", "other"), [(0.9999991, 0.9999994), (1.0, 0.9999999)])
def test_teachers_of_different_momenta_are_different(momentum: float, other: float) -> None:
    config = narrow_config("unused", ["byol", "dino"])
    config.byol.momentum, config.dino.momentum = momentum, other
    config.input.mean, config.input.std = [0.5], [0.25]
    assert len(build_hybrid(config, build_encoder(config)).teachers) == 2


def test_chance_of_local_negatives(monkeypatch: pytest.MonkeyPatch) -> None:
    hybrid = hybrid_for(["simclr"])
    monkeypatch.setattr("hsv.objectives.hybrid.world_size", lambda: 4)
    hybrid.negatives = "local"
    assert hybrid.chances(256)["simclr"] == pytest.approx(math.log(127))


def test_chance_levels() -> None:
    hybrid = hybrid_for(["simclr", "mae"])
    assert hybrid.objectives["simclr"].chance(256) == pytest.approx(math.log(511))
    assert hybrid.objectives["simclr"].chance(1) == 0
    assert hybrid.objectives["mae"].chance(256) == 1
    assert hybrid.chances(256) == {"simclr": pytest.approx(math.log(511)), "mae": 1}
    untrained = hybrid(views(hybrid, 64), draw=0)[1]
    assert 0.5 < untrained["loss/simclr"] / math.log(127) < 1.5
    assert 0.5 < untrained["loss/mae"] < 3
