"""A training step of ViT-Tiny/16 at 224 px and of the small-32 preset: fused operations against their references.

A step is forward, backward, clipping and AdamW on views that are already there.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from bench.cases import DEVICE, HUGE_PAGES, QUICK, Case, Provider
from hsv_kernels import use_backend

BATCH = {"vit-tiny/16": 16, "small-32": 4 if QUICK else 128}


def training_step(
    model: str, backend: str, batch: int, objectives: tuple[str, ...] = ("simclr", "mae")
) -> Callable[[], Tensor]:
    """A function that trains on one batch and gives the loss before the update.

    `model` is a preset, or ViT-Tiny/16 or ViT-S/16 at 224 px.
    """
    from hsv.config import load_config
    from hsv.export import build_encoder
    from hsv.objectives import build_hybrid
    from hsv.optim import adamw, clipped_parameters

    config = load_config(preset="small-224" if model.startswith("vit") else model)
    config.objectives = list(objectives)
    config.input.mean, config.input.std = [0.5] * 3, [0.25] * 3
    config.run.batch_size = batch
    if model == "vit-tiny/16":
        config.encoder.name = "vit_tiny_patch16_224"
    torch.manual_seed(0)
    hybrid = build_hybrid(config, build_encoder(config)).to(DEVICE)
    optimiser = adamw(hybrid, config)
    side = config.input.image_size
    images = [torch.randn(config.run.batch_size, 3, side, side, device=DEVICE) for _ in hybrid.views]

    def step() -> Tensor:
        with use_backend(backend), torch.autocast(DEVICE, torch.bfloat16):
            loss, _ = hybrid(images, 0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(clipped_parameters(optimiser), config.optimiser.clip or math.inf)
        optimiser.step()
        optimiser.zero_grad()
        return loss

    return step


def step_case(model: str) -> Case:
    return Case(
        operation=f"training step, {model}",
        shape={"B": BATCH[model]},
        products="bfloat16",
        inputs=lambda dtype: (),
        providers={
            "hsv": Provider(lambda: training_step(model, "auto", BATCH[model]), compared=False),
            "eager": Provider(
                lambda: training_step(model, "reference", BATCH[model]), note="the operations' references"
            ),
        },
        kinds=("step",),
        seconds=20,
        rounds=(5, 9),
    )


MODELS = ["small-32"] if QUICK else [] if HUGE_PAGES else list(BATCH)
CASES = [step_case(model) for model in MODELS]


def test_speed(case: Case, mode: str, provider: str, record: Callable[[Case, str, str], None]) -> None:
    record(case, mode, provider)
