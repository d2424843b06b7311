from pathlib import Path

import numpy as np
import pytest
import torch

from hsv import load_encoder
from hsv.data import FolderSource, digits
from hsv.evaluate import extract_features, pixel_features
from hsv.evaluate.subset import Subset


@pytest.mark.parametrize("pool", ["mean", "cls"])
@pytest.mark.parametrize("batch_size", [7, 256])
def test_features_are_the_encoders_on_normalised_images(run_dir: Path, pool: str, batch_size: int) -> None:
    encoder = load_encoder(run_dir)
    source = Subset(digits("test"), range(5, 25))
    found = extract_features(encoder, source, pool=pool, batch_size=batch_size)
    pixels = torch.from_numpy(digits("test").images[5:25]).permute(0, 3, 1, 2).double() / 255
    images = (pixels - encoder.mean[0]) / encoder.std[0]
    with torch.no_grad():
        tokens = encoder.double().vit.forward_features(images)
    truth = tokens[:, 1:].mean(1) if pool == "mean" else tokens[:, 0]
    torch.testing.assert_close(found.x.double(), truth, atol=1e-5, rtol=1e-5)
    assert found.x.dtype == torch.float32 and not found.x.requires_grad
    assert found.labels.tolist() == digits("test").labels[5:25].tolist()
    assert found.names == [digits("test").name(i) for i in range(5, 25)]


def test_the_encoder_comes_back_in_its_mode_and_dropout_is_off(run_dir: Path) -> None:
    encoder = load_encoder(run_dir).train()
    for module in encoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    source = Subset(digits(), range(8))
    first, again = (extract_features(encoder, source) for _ in range(2))
    assert encoder.training and torch.equal(first.x, again.x)
    with pytest.raises(ValueError, match="pool: got 'max'"):
        extract_features(encoder, source, pool="max")


def test_a_broken_file_is_named_and_left_out(run_dir: Path, photos: Path) -> None:
    found = extract_features(load_encoder(run_dir), FolderSource(photos))
    assert len(found) == len(found.names) == len(found.labels) == 12
    assert [name for name, _ in found.failures] == ["dark/broken.png"]
    assert "dark/broken.png" not in found.names
    assert found.labels.tolist() == [int(name.startswith("dark")) for name in found.names]  # bright is class 0


def test_nothing_to_decode_is_an_error_that_names_the_file(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"none of 1 images could be decoded; the first: a\.png"):
        extract_features(load_encoder(run_dir), FolderSource(tmp_path))


def test_pixels_are_the_images_themselves_or_their_averages(photos: Path) -> None:
    found = pixel_features(Subset(digits("test"), range(9)), image_size=8, mean=[0.3], std=[0.5])
    np.testing.assert_allclose(found.x, (digits("test").images[:9].reshape(9, 64) / 255 - 0.3) / 0.5, atol=1e-6)
    scale = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    small = pixel_features(FolderSource(photos), image_size=16, max_side=4, **scale)
    whole = pixel_features(FolderSource(photos), image_size=16, **scale)
    assert small.x.shape == (12, 48) and whole.x.shape == (12, 768)
    torch.testing.assert_close(small.x.mean(1), whole.x.mean(1), atol=0.12, rtol=0)


def test_rows_can_be_taken() -> None:
    source = Subset(digits(), [3, 1, 4])
    found = pixel_features(source, image_size=8, mean=[0], std=[1]).take(torch.tensor([2, 0]))
    assert found.names == [digits().name(4), digits().name(3)]
    assert found.labels.tolist() == digits().labels[[4, 3]].tolist() and found.indices.tolist() == [2, 0]
