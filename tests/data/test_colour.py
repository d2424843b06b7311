"""Colour operations against torchvision's, and the batch around them."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv
from torch import Tensor

from hsv.data import MAE, SIMCLR_224, ViewSpec, normalise, photometric
from hsv.data.colour import blur, draw, recolour, uniform_order

MEAN, STD = (0.1, 0.2, 0.3), (0.5, 1.0, 2.0)
STRENGTHS = torch.tensor([0.0, 0.3, 0.9, 1.0, 1.1, 1.8, 0.5])
TURNS = torch.tensor([-0.5, -0.37, -0.01, 0.0, 0.13, 0.33, 0.5])


def colours(B: int = 7, C: int = 3, H: int = 9, W: int = 11) -> Tensor:
    """Random colours, with greys, black, white and pure ones among them, float32 [B, C, H, W] of k / 255."""
    x = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (B, C, H, W), dtype=np.uint8))
    x[:, :, 0] = x[:, :1, 0]
    x[:, :, 1, 0], x[:, :, 1, 1] = 0, 255
    if C == 3:
        x[:, :, 2, 0] = torch.tensor([255, 0, 0], dtype=torch.uint8)
        x[:, :, 2, 1] = torch.tensor([0, 255, 255], dtype=torch.uint8)
    return x.float() / 255


def ours(x: Tensor, name: str, values: Tensor) -> Tensor:
    return recolour(x.clone(), {name: values.numpy()}, [name])


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_jitter_is_torchvisions(name: str) -> None:
    x = colours()
    values = TURNS if name == "hue" else STRENGTHS
    theirs = torch.stack([getattr(tv, f"adjust_{name}")(i, float(v)) for i, v in zip(x, values, strict=True)])
    # Their weights of grey have four digits (0.2989); near a grey the hue hangs on the last bits.
    assert (ours(x, name, values) - theirs).abs().max() < (1e-5 if name in ("brightness", "hue") else 3e-4)


@pytest.mark.parametrize("name", ["brightness", "contrast"])
def test_one_channel(name: str) -> None:
    x = colours(C=1)
    theirs = torch.stack([getattr(tv, f"adjust_{name}")(i, float(v)) for i, v in zip(x, STRENGTHS, strict=True)])
    assert (ours(x, name, STRENGTHS) - theirs).abs().max() < 1e-6


def test_identity_strengths_change_nothing() -> None:
    x = colours()
    for name in ("brightness", "contrast", "saturation", "hue"):
        same = torch.full((7,), 0.0 if name == "hue" else 1.0)
        assert (ours(x, name, same) - x).abs().max() < 1e-6


def test_grey_and_solarise_are_torchvisions() -> None:
    x = colours()
    chosen = np.array([True, False, True, True, False, False, True])
    for name, theirs in (("grey", tv.rgb_to_grayscale(x, 3)), ("solarise", tv.solarize(x, 0.5))):
        found = recolour(x.clone(), {name: chosen}, [])
        assert (found[chosen] - theirs[chosen]).abs().max() < 2e-4
        assert torch.equal(found[~chosen], x[~chosen])


@pytest.mark.parametrize("sigma", [0.1, 0.7, 1.3, 2.0])
def test_blur_is_torchvisions(sigma: float) -> None:
    x = colours(2, 3, 24, 33)
    radius = 20
    theirs = tv.gaussian_blur(x, [2 * radius + 1] * 2, [sigma] * 2)
    found = blur(x, np.full(2, sigma))
    assert (found - theirs).abs().max() < 1e-4  # ours ends at four deviations


def test_blur_of_chosen_images_alone() -> None:
    x = colours()
    sigma = np.array([0, 1.0, 0, 0, 2.0, 0, 0])
    found = recolour(x.clone(), {"blur": sigma}, [])
    for i, s in enumerate(sigma):
        expected = blur(x[i : i + 1], np.array([s]))[0] if s else x[i]
        assert torch.allclose(found[i], expected, atol=1e-4)


def as_bytes(x: Tensor) -> Tensor:
    return (x * 255).round().to(torch.uint8)


def test_plain_views_are_only_normalised() -> None:
    views = as_bytes(colours())
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    expected = (views.double() / 255 - mean.double()) / std.double()
    for found in (photometric(views, MAE, (0, 1, 2), MEAN, STD), normalise(views, MEAN, STD)):
        assert found.dtype == torch.float32
        assert (found - expected).abs().max() < 1e-6


@pytest.mark.parametrize("spec", [replace(SIMCLR_224, blur=0.0), SIMCLR_224, ViewSpec(solarize=0.5, blur=1.0)])
def test_batch_is_a_function_of_key_and_row(spec: ViewSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    views = as_bytes(colours(B=64, H=8, W=8))
    whole = photometric(views, spec, (7, 3, 0), MEAN, STD)
    assert torch.equal(whole, photometric(views, spec, (7, 3, 0), MEAN, STD))
    monkeypatch.setattr("hsv.data.colour.CHUNK", 5 * 3 * 8 * 8)
    assert torch.allclose(whole, photometric(views, spec, (7, 3, 0), MEAN, STD), atol=3e-4)
    for other in ((7, 3, 1), (7, 4, 0), (8, 3, 0), (7, 3, 0, 1)):
        assert not torch.allclose(whole, photometric(views, spec, other, MEAN, STD))
    colour = whole * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    assert colour.min() > -1e-5
    assert colour.max() < 1 + 1e-5


def test_strengths_have_the_stated_distribution() -> None:
    spec = ViewSpec(jitter_prob=0.8, brightness=0.4, contrast=1.5, hue=0.1, grayscale=0.2, blur=0.5, solarize=0.1)
    draws = draw(spec, (0,), 20000, 3)
    assert "saturation" not in draws
    changed = draws["brightness"] != 1
    assert changed.mean() == pytest.approx(0.8, abs=0.02)
    assert np.array_equal(changed, draws["hue"] != 0)
    for name, low, high in (("brightness", 0.6, 1.4), ("contrast", 0.0, 2.5), ("hue", -0.1, 0.1)):
        values = draws[name][changed]
        assert low <= values.min() < values.max() <= high
        assert values.mean() == pytest.approx((low + high) / 2, abs=0.02 * (high - low))
        assert values.std() == pytest.approx((high - low) / math.sqrt(12), rel=0.03)
    assert draws["grey"].mean() == pytest.approx(0.2, abs=0.02)
    assert draws["solarise"].mean() == pytest.approx(0.1, abs=0.02)
    blurred = draws["blur"] > 0
    assert blurred.mean() == pytest.approx(0.5, abs=0.02)
    assert draws["blur"][blurred].min() >= 0.1
    firsts = [uniform_order((i,))[0] for i in range(400)]
    assert all(60 < firsts.count(name) < 140 for name in set(firsts))
    assert len(set(firsts)) == 4


def test_colour_is_left_out_without_three_channels() -> None:
    views = as_bytes(colours(C=1))
    spec = ViewSpec(jitter_prob=1.0, saturation=1.0, hue=0.5, grayscale=1.0)
    found = photometric(views, spec, (0,), (0.0,), (1.0,))
    assert (found - views / 255).abs().max() < 1e-6


def test_autocast_does_not_lower_the_precision() -> None:
    views = as_bytes(colours(H=32, W=32))
    plain = photometric(views, SIMCLR_224, (1,), MEAN, STD)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(plain, photometric(views, SIMCLR_224, (1,), MEAN, STD))


def test_bad_arguments_are_named() -> None:
    views = as_bytes(colours())
    with pytest.raises(ValueError, match="views: got"):
        photometric(views.float(), MAE, (0,), MEAN, STD)
    with pytest.raises(ValueError, match=r"mean, std: got .*; allowed: 3 values"):
        photometric(views, MAE, (0,), MEAN[:1], STD)
    with pytest.raises(ValueError, match="std > 0"):
        normalise(views, MEAN, (0.0, 1.0, 1.0))
