"""What a run says before its first step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hsv.objectives import Objective

if TYPE_CHECKING:
    from accelerate import Accelerator

    from hsv.config import Config
    from hsv.train import Trainer

__all__ = ["describe", "say"]


def say(line: str, config: Config, accelerator: Accelerator) -> None:
    """Print a line at once, in the main process of a run that shows its progress."""
    if config.run.progress and accelerator.is_main_process:
        print(line, flush=True)


def describe(trainer: Trainer, start: int) -> str:
    """Images, model, length, optimiser, and each objective's own schedules, a line each, everything resolved."""
    config, hybrid, accelerator = trainer.config, trainer.hybrid, trainer.accelerator
    run, decay = config.run, config.optimiser.weight_decay
    images, end = len(trainer.source), config.optimiser.weight_decay_end
    weights = sum(parameter.numel() for parameter in hybrid.encoder.parameters()) / 1e6
    lines = [
        f"{trainer.run_dir}: {' + '.join(hybrid.objectives)} on {images:,} images, "
        f"{hybrid.encoder.name} with {weights:.1f} M weights",
        f"{trainer.steps:,} steps of {run.batch_size} images ({trainer.steps * run.batch_size / images:.1f} epochs), "
        f"warm-up {trainer.warmup:,}, learning rate {_rate(trainer):g}, {'bf16' if trainer.bf16 else 'fp32'} on "
        f"{accelerator.num_processes} × {accelerator.device.type}",
        f"weight decay {decay:g}" + ("" if end is None else f" → {end:g} along a cosine"),
    ]
    if 0 < start < trainer.steps:
        lines.append(f"resumed: goes on after step {start:,}")
    if len(hybrid.objectives) > 1:
        lines.append(f"loss weights: {hybrid.weighting.describe()}")
    width = max(map(len, hybrid.objectives))
    for name, objective in hybrid.objectives.items():
        lines += [f"  {name:{width}}  {line}" for line in _schedules(trainer, objective)]
    if run.accumulate > 1:
        lines.append(
            f"a micro-batch contrasts its own {run.batch_size // run.accumulate} images, not those of the step; "
            "run.contrastive_chunks saves memory without that"
        )
    return "\n".join(lines)


def _schedules(trainer: Trainer, objective: Objective) -> list[str]:
    """What an objective's own schedules come to in this run."""
    lines = objective.schedule(trainer.steps, trainer.epoch)
    if objective.momentum is not None:
        rise = " → 1" if objective.momentum_rises else ""
        lines = [f"teacher's momentum {objective.momentum:g}{rise}", *lines]
    named = {id(module): name for name, module in objective.named_modules()}
    return lines + [
        f"{named[id(module)]}'s learning rate {scale * _rate(trainer):g}"
        for module, scale in objective.lr_scales()
        if scale != 1
    ]


def _rate(trainer: Trainer) -> float:
    return trainer.optimiser.param_groups[0]["base_lr"]
