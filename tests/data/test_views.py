"""Geometry of views: boxes, flips, shifts, and the random numbers behind them."""

import numpy as np
import pytest
import torch
import torchvision.transforms.v2 as tv
from PIL import Image

from hsv.data import MAE, SIMCLR_224, ViewSpec
from hsv.data.hashing import permutation, uniform
from hsv.data.views import centre_view, crop_box, make_views, shift

SHIFTED = ViewSpec(crop_scale=(0.5, 1.0), flip=0.0, shift=1)
WHOLE = ViewSpec(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=0.0)


def photo(size: tuple[int, int] = (40, 30), seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def test_uniform_numbers() -> None:
    numbers = uniform((1, 2), np.arange(20000), 4)
    assert numbers.shape == (20000, 4)
    assert 0 <= numbers.min() < numbers.max() < 1
    counts = np.stack([np.histogram(column, 20, (0, 1))[0] for column in numbers.T])
    assert (np.abs(counts - 1000) < 160).all()  # five standard deviations
    assert np.abs(np.corrcoef(numbers.T) - np.eye(4)).max() < 0.04
    assert np.abs(np.corrcoef(numbers[1:, 0], numbers[:-1, 0])[0, 1]) < 0.04
    assert np.array_equal(numbers[7:9, :2], uniform((1, 2), np.array([7, 8]), 2))
    others = [uniform(key, np.arange(2000), 1)[:, 0] for key in ((1, 2), (2, 1), (1, 3), (1,), (1, 2, 0), (-1, 2))]
    assert np.abs(np.corrcoef(others) - np.eye(len(others))).max() < 0.12


def test_permutation() -> None:
    found = permutation((3, 4), 1000)
    assert np.array_equal(np.sort(found), np.arange(1000))
    assert np.abs(np.corrcoef(found, np.arange(1000))[0, 1]) < 0.15
    assert not np.array_equal(found, permutation((3, 5), 1000))


@pytest.mark.parametrize("size", [(400, 300), (8, 8), (1000, 10), (1, 1), (3, 700)])
@pytest.mark.parametrize("spec", [SIMCLR_224, SHIFTED])
def test_boxes_lie_inside_and_have_the_stated_area(size: tuple[int, int], spec: ViewSpec) -> None:
    width, height = size
    numbers = uniform((0,), np.arange(500), 22)
    boxes = np.array([crop_box(width, height, spec, row) for row in numbers.tolist()])
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2] <= width).all() and (boxes[:, 3] <= height).all()
    assert (w > 0).all() and (h > 0).all()
    assert (w / h >= 3 / 4 - 1e-6).all() and (w / h <= 4 / 3 + 1e-6).all()
    if max(size) / min(size) < 2:
        area = w * h / (width * height)
        assert area.min() >= spec.crop_scale[0] - 1e-9
        assert area.max() > 0.9
        assert area.min() < spec.crop_scale[0] + 0.05


def test_area_and_place_are_distributed_as_torchvisions() -> None:
    torch.manual_seed(0)
    numbers = uniform((5,), np.arange(4000), 22).tolist()
    ours = np.array([crop_box(400, 300, MAE, row) for row in numbers])
    theirs = tv.RandomResizedCrop(32, scale=(0.2, 1.0))
    image = photo((400, 300))
    rows = [theirs.make_params([image]) for _ in range(1500)]
    theirs = np.array([(p["left"], p["top"], p["left"] + p["width"], p["top"] + p["height"]) for p in rows])
    for a, b in zip(ours.T, theirs.T, strict=True):
        assert np.abs(np.quantile(a, [0.2, 0.5, 0.8]) - np.quantile(b, [0.2, 0.5, 0.8])).max() < 20


def test_views_depend_on_key_and_index_alone() -> None:
    images = [photo(seed=i) for i in range(6)]
    indices = np.array([5, 9, 2, 7, 0, 4])
    views = make_views(images, indices, SIMCLR_224, (16, 12), (0, 1, 0))
    assert views.shape == (6, 16, 12, 3)
    assert views.dtype == np.uint8
    turned = make_views(images[::-1], indices[::-1], SIMCLR_224, (16, 12), (0, 1, 0))
    assert np.array_equal(views, turned[::-1])
    assert not np.array_equal(views, make_views(images, indices, SIMCLR_224, (16, 12), (0, 1, 1)))


def test_crops_are_antialiased() -> None:
    board = Image.fromarray((np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8))
    view = make_views([board], np.array([0]), WHOLE, (16, 16), (0,))
    assert np.abs(view.astype(int) - 128).max() < 8


def test_flip() -> None:
    image = photo((16, 16))
    plain = np.asarray(image)
    views = make_views([image] * 400, np.arange(400), ViewSpec((1.0, 1.0), (1.0, 1.0), flip=0.3), (16, 16), (0,))
    flipped = (views == plain[:, ::-1]).all((1, 2, 3))
    assert np.array_equal(~flipped, (views == plain).all((1, 2, 3)))
    assert 0.22 < flipped.mean() < 0.38


def test_shift_moves_and_repeats_the_border() -> None:
    image = np.random.default_rng(0).integers(0, 256, (5, 6, 1), dtype=np.uint8)
    numbers = np.array([[0.0, 0.5], [0.99, 0.5], [0.5, 0.0], [0.5, 0.5]])
    up, down, left, none = shift(np.stack([image] * 4), 2, numbers)
    assert np.array_equal(up[:3], image[2:]) and np.array_equal(up[3], image[4]) and np.array_equal(up[4], image[4])
    assert np.array_equal(down[2:], image[:3]) and np.array_equal(down[0], image[0])
    assert np.array_equal(left[:, :4], image[:, 2:])
    assert np.array_equal(none, image)


def test_shift_is_uniform() -> None:
    image = np.zeros((9, 9), dtype=np.uint8)
    image[4, 4] = 255
    spec = ViewSpec((1.0, 1.0), (1.0, 1.0), flip=0.0, shift=1)
    views = make_views([Image.fromarray(image)] * 900, np.arange(900), spec, (9, 9), (0,))[..., 0]
    counts = (views > 0).sum(0)
    assert counts.sum() == 900
    assert (counts[3:6, 3:6] > 60).all()


@pytest.mark.parametrize("size", [(18, 20), (11, 20), (60, 72), (3, 4)])  # whole margins, so no half pixels
def test_centre_view_is_resize_and_centre_crop(size: tuple[int, int]) -> None:
    image = photo((40, 30))
    view = centre_view(image, size)
    assert view.shape == (*size, 3)
    scale = max(size[0] / 30, size[1] / 40)
    resized = image.resize((round(40 * scale), round(30 * scale)), Image.Resampling.BICUBIC)
    theirs = np.asarray(tv.CenterCrop(size)(resized)).astype(int)
    assert np.abs(view - theirs).max() <= 1


def test_centre_view_leaves_a_fitting_image_alone() -> None:
    image = photo((12, 7))
    assert np.array_equal(centre_view(image, (7, 12)), np.asarray(image))


def test_specifications_are_values() -> None:
    assert ViewSpec(crop_scale=[0.2, 1.0]) == MAE
    assert hash(ViewSpec(crop_scale=[0.2, 1.0])) == hash(MAE)
    assert MAE != SIMCLR_224


@pytest.mark.parametrize(
    "changes",
    [
        {"crop_scale": (0.0, 1.0)},
        {"crop_scale": (0.5, 1.5)},
        {"crop_scale": (0.9, 0.2)},
        {"crop_ratio": (1.0,)},
        {"flip": 1.5},
        {"shift": -1},
        {"shift": 0.5},
        {"hue": 0.6},
        {"contrast": -0.1},
        {"blur_sigma": (0.0, 1.0)},
        {"solarize": float("nan")},
    ],
)
def test_bad_specifications_are_named(changes: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        ViewSpec(**changes)
