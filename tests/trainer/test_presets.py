"""The presets that come with the package: each is whole, can be built, and optimises as docs/methods.md says."""

import re
from pathlib import Path

import pytest
import torch

from hsv.config import METHODS, Config, load_config, preset_names
from hsv.export import build_encoder
from hsv.objectives import build_hybrid
from hsv.optim import adamw, set_weight_decay
from hsv.schedules import Progress

DOCS = Path(__file__).parents[2] / "docs" / "methods.md"
PRESETS = [f"{method}-{size}" for method in METHODS for size in (32, 224)]


def documented() -> dict[str, tuple[float, float, float | None, int]]:
    """Base learning rate, decay, decay at the end and batch of each preset in the table of docs/methods.md."""
    number = r"([\d.e-]+)"
    pattern = rf"^\| `([a-z]+-\d+)` \| {number} \| {number}(?: → {number})? \| (\d+) \|"
    rows = re.findall(pattern, DOCS.read_text(encoding="utf-8"), flags=re.M)
    return {n: (float(rate), float(wd), float(end) if end else None, int(b)) for n, rate, wd, end, b in rows}


def narrow(name: str) -> Config:
    """The preset with an encoder of one narrow block, as only the heads and the views are its own."""
    config = load_config(preset=name)
    config.data, config.input.mean, config.input.std = "photos", [0.5] * 3, [0.25] * 3
    config.encoder.embed_dim, config.encoder.depth, config.encoder.num_heads = 32, 1, 2
    return config


def test_every_method_has_its_presets() -> None:
    assert set(PRESETS) <= set(preset_names()) and set(documented()) == set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_whole_and_optimises_as_documented(name: str) -> None:
    config = narrow(name)
    config.check()
    method, size = name.rsplit("-", 1)
    assert (config.objectives, config.input.image_size) == ([method], int(size))
    settings = config.optimiser
    found = settings.base_lr, settings.weight_decay, settings.weight_decay_end, config.run.batch_size
    assert found == documented()[name]
    with torch.device("meta"):
        hybrid = build_hybrid(config, build_encoder(config))
    matrices = adamw(hybrid, config).param_groups[0]
    assert matrices["base_lr"] == pytest.approx(settings.base_lr * config.run.batch_size / 256)
    assert matrices["weight_decay"] == settings.weight_decay


@pytest.mark.parametrize("size", [32, 224])
def test_swav_has_few_prototypes_for_its_batch(size: int) -> None:
    """Sinkhorn–Knopp uses all of them alike, and there is no store of earlier projections."""
    config = load_config(preset=f"swav-{size}")
    assert config.swav.prototypes <= 4 * config.run.batch_size


def test_weight_decay_follows_its_cosine() -> None:
    """The published .04 → .4 of DINO, per step, on the matrices alone."""
    config = narrow("dino-224")
    hybrid = torch.nn.Sequential(torch.nn.Linear(2, 2))
    optimiser = adamw(hybrid, config)
    found = []
    for step in (0, 50, 100):
        set_weight_decay(optimiser, config, Progress(step, 100, 10))
        found.append([group["weight_decay"] for group in optimiser.param_groups])
    assert found == [[pytest.approx(decay), 0] for decay in (0.04, 0.22, 0.4)]


@pytest.mark.parametrize("together", [("moco", "mae"), ("simclr", "mae"), ("simclr", "moco", "dino"), METHODS])
def test_any_methods_combine_over_one_preset_and_share_views(together: tuple[str, ...]) -> None:
    config = narrow("small-32")
    config.objectives = list(together)
    config.check()
    torch.manual_seed(0)
    hybrid = build_hybrid(config, build_encoder(config))
    assert list(hybrid.objectives) == list(together)
    assert len(hybrid.views) < sum(len({r.view for r in o.requests}) for o in hybrid.objectives.values())
