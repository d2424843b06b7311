"""A training step of ViT-Tiny/16 at 224 px and of the small-32 preset: fused operations against their references.

    pytest bench/bench_step.py                     # HSV_BENCH_THREADS=2 by default

The step is forward, backward, clipping and AdamW on views that are already there.
"""

import os
from collections.abc import Callable
from functools import partial

import pytest
import torch

from bench.common import interleaved, ratio
from hsv.config import Config, load_config
from hsv.export import build_encoder
from hsv.objectives import Hybrid, build_hybrid
from hsv.optim import adamw, clipped_parameters
from hsv_kernels import use_backend

THREADS = int(os.environ.get("HSV_BENCH_THREADS", "2"))
ROUNDS = 9


def vit_tiny() -> Config:
    config = load_config(preset="small-224")
    config.encoder.name = "vit_tiny_patch16_224"
    config.run.batch_size = 16
    return config


STEPS = {"vit-tiny/16, 224 px, batch 16": vit_tiny, "small-32, batch 128": partial(load_config, preset="small-32")}


def step(hybrid: Hybrid, optimiser: torch.optim.Optimizer, images: list[torch.Tensor], backend: str) -> None:
    with use_backend(backend), torch.autocast("cpu", torch.bfloat16):
        loss, _ = hybrid(images, 0)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(clipped_parameters(optimiser), 3.0)
    optimiser.step()
    optimiser.zero_grad()


@pytest.mark.parametrize("name", STEPS)
def test_step(name: str, record: Callable[[dict[str, object]], None], benchmark: Callable) -> None:
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    config = STEPS[name]()
    config.input.mean, config.input.std = [0.5] * 3, [0.25] * 3
    size, batch = config.input.image_size, config.run.batch_size
    hybrid = build_hybrid(config, build_encoder(config))
    optimiser = adamw(hybrid, config)
    images = [torch.randn(batch, 3, size, size) for _ in hybrid.views]

    steps = {backend: partial(step, hybrid, optimiser, images, backend) for backend in ("auto", "reference")}
    seconds = interleaved(benchmark, steps, ROUNDS)
    for backend, times in seconds.items():
        record(
            {
                "step": name,
                "operations": {"auto": "fused", "reference": "reference"}[backend],
                "median ms": f"{1e3 * sorted(times)[len(times) // 2]:.0f}",
                "min ms": f"{1e3 * min(times):.0f}",
                "× fused": f"{ratio(times, seconds['auto']):.3f}",
            }
        )
    assert ratio(seconds["reference"], seconds["auto"]) >= 1
