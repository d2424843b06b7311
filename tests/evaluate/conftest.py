from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="package")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps on the digits."""
    from hsv import load_config, pretrain

    config = load_config(preset="digits")
    config.output = str(tmp_path_factory.mktemp("runs") / "small <run>")
    config.encoder.embed_dim, config.encoder.depth, config.encoder.num_heads = 32, 1, 1
    config.mae.decoder_dim, config.mae.decoder_depth = 32, 1
    config.run.steps, config.run.batch_size, config.run.log_every, config.run.progress = 4, 64, 1, False
    return pretrain(config).run_dir


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twelve images of two classes, of several sizes and modes, and a broken file."""
    from PIL import Image

    generator = np.random.default_rng(0)
    for i in range(12):
        folder = tmp_path / "photos" / ("bright" if i % 2 else "dark")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 100, (20 + i, 31, 3)) + 150 * (i % 2)
        Image.fromarray(pixels.astype(np.uint8)).convert("L" if i % 3 == 0 else "RGB").save(folder / f"{i:02}.png")
    (tmp_path / "photos" / "dark" / "broken.png").write_bytes(b"not a picture")
    return tmp_path / "photos"
