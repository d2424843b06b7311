"""Pre-training: the set-up, the loop, and what a run leaves behind."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list, gather_object
from torch import Tensor

from hsv.bar import progress_bar
from hsv.checkpoint import check_resumed, find_checkpoint, restore, save_checkpoint
from hsv.config import Config
from hsv.data import (
    Batch,
    Source,
    ViewLoader,
    default_workers,
    normalise,
    open_source,
    photometric,
    sample_images,
    statistics,
)
from hsv.describe import describe, say
from hsv.export import build_encoder, export_encoder
from hsv.initialise import initialise
from hsv.monitor import MetricLog, verdicts
from hsv.objectives import Hybrid, build_hybrid
from hsv.optim import adamw, clipped_parameters, learning_rate_factor, set_learning_rate, set_weight_decay
from hsv.run_folder import claim_run_folder, name_failures
from hsv.schedules import Progress, capped
from hsv.signals import StopSignals
from hsv_kernels import use_backend

__all__ = ["RunSummary", "Trainer", "pretrain"]

REHEARSAL_WARMUP = 2  # steps before the clock starts
REHEARSAL_STEPS = 4  # at least
REHEARSAL_SECONDS = 1.8  # for each minute of the run: 3 % of it
ENDLESS = 10**6  # steps, of which a rehearsal takes the first few


@dataclass
class RunSummary:
    """What `pretrain` returns."""

    run_dir: Path
    """Folder of the run."""
    checkpoint: Path
    """The last checkpoint."""
    step: int
    """Optimiser steps done, of `steps`."""
    steps: int
    """Length of the run, in optimiser steps."""
    images_per_second: float
    """Images seen a second while this process trained; 0 if nothing was left to do."""
    encoder_call: str
    """The Python call that loads the exported encoder with timm."""
    metrics: dict[str, float] = field(default_factory=dict)
    """What was logged last."""
    warnings: list[str] = field(default_factory=list)
    """Plain sentences about features that collapsed and losses that are no better than chance."""
    failures: dict[str, str] = field(default_factory=dict)
    """Files that could not be decoded, with the reason."""
    stopped_by: int | None = None
    """Number of the signal that ended the training early."""


def pretrain(config: Config, *, resume: bool = False) -> RunSummary:
    """Train as `config` says, or go on with the run in `config.output`.

    Leaves in the run folder: config.yaml, metrics.jsonl and TensorBoard events, checkpoints, encoder.safetensors and
    encoder.json, and failures.jsonl if files could not be decoded.

    Raises:
        ValueError: a setting that cannot work, a folder that already holds a run, nothing to resume.
        FloatingPointError: loss or gradient are no longer finite; the last checkpoint stays.
    """
    if not isinstance(config, Config):
        raise ValueError(f"config: got {type(config).__name__}; allowed: a Config, such as load_config returns")
    config = copy.deepcopy(config)
    config.check()
    with use_backend(config.run.kernels):
        try:
            trainer, start = _set_up(config, resume)
        except KeyboardInterrupt as stop:
            raise KeyboardInterrupt("stopped before the first step; nothing was written") from stop
        return trainer.run(start)


def _set_up(config: Config, resume: bool) -> tuple[Trainer, int]:
    """Everything before the first step, of which nothing is written, and the step to go on from."""
    accelerator = _accelerator(config)
    state = claim_run_folder(config, resume)
    if state and config.minutes:
        config.run.steps, config.minutes = _measured_steps(state, config.minutes), None
    source = open_source(config.data, split="train", limit=config.input.limit)
    say(f"{config.data}: {len(source):,} images", config, accelerator)
    if state:
        check_resumed(config, state)
    if config.input.mean is None:
        say("measuring the mean and deviation of at most 2,000 of them", config, accelerator)
        measured = statistics(source, config.input.channels, config.input.image_size, seed=config.run.seed)
        config.input.mean, config.input.std = (list(map(float, values)) for values in measured)

    torch.manual_seed(config.run.seed)
    encoder = build_encoder(config, pretrained=config.init == "timm" and state is None)
    if config.init not in (None, "timm") and state is None:
        initialise(encoder, config.init)
    hybrid = build_hybrid(config, encoder)
    optimiser = adamw(hybrid, config)
    if state is None:
        hybrid.prepare(lambda: _normalised_sample(source, config))
    start = restore(state, hybrid, optimiser) if state else 0
    return Trainer(config, accelerator, source, hybrid, optimiser), start


def _accelerator(config: Config) -> Accelerator:
    """The devices and ranks that the configuration asks for."""
    device = config.run.device
    accelerator = Accelerator(
        # Without a GPU accelerate must be told so, or it takes each of torchrun's ranks for the only one.
        cpu=device == "cpu" or (device == "auto" and not torch.accelerator.is_available()),
        mixed_precision="no",
        gradient_accumulation_steps=config.run.accumulate,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],  # queues and centres are equal anyway
    )
    if device == "cuda" and accelerator.device.type != "cuda":
        raise ValueError("run.device: got 'cuda', and torch sees no CUDA device; allowed: 'auto' or 'cpu'")
    return accelerator


class Trainer:
    """A run in this process: `run` is the loop, `step` one step of it.

    Args:
        config: complete but for the length of the run, which is settled here.
        accelerator: devices and ranks.
        source: training images.
        hybrid, optimiser: what is trained and how, as of the step that `run` starts from.
    """

    def __init__(
        self, config: Config, accelerator: Accelerator, source: Source, hybrid: Hybrid, optimiser: torch.optim.Optimizer
    ) -> None:
        self.config, self.accelerator, self.source, self.hybrid = config, accelerator, source, hybrid
        self.model, self.optimiser = accelerator.prepare(hybrid, optimiser)
        self.run_dir = Path(config.output)
        self.bf16 = _use_bf16(config.run.precision, accelerator.device)
        self.hosts = dist.new_group(backend="gloo") if accelerator.num_processes > 1 else None
        self.steps, self.warmup = self.settle_length()

    def run(self, start: int) -> RunSummary:
        """Train from step `start` to the end, or to a signal; leave a checkpoint and the exported encoder."""
        run, main = self.config.run, self.accelerator.is_main_process
        step, metrics, failures = start, {}, {}
        if start > self.steps:
            raise ValueError(f"run.steps: got {self.steps}; allowed: at least {start}, which are done already")
        if main:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            self.config.save(self.run_dir / "config.yaml")
        say(describe(self, start), self.config, self.accelerator)
        bar = progress_bar(
            total=self.steps * run.batch_size,
            initial=start * run.batch_size,
            unit=" images",
            disable=not (main and run.progress),
        )
        clock = time.perf_counter()
        with (
            MetricLog(self.run_dir, start or None) if main else nullcontext() as log,
            bar,
            StopSignals() as stop,
            closing(self.batches(start, self.steps)) as every_batch,
        ):
            for batches in every_batch:
                logs = self.step(step, batches)
                step += 1
                failures |= {name: reason for batch in batches for name, reason in batch.failures}
                bar.update(run.batch_size)

                due = self.is_logged(step) or any(n.startswith("gradient/") for n in logs)
                stopping = stop.agreed(self.accelerator, due)
                saving = stopping or step % run.checkpoint_every == 0 or step == self.steps
                if due or saving:
                    metrics = self.read(logs, step)
                    metrics["images_per_second"] = (step - start) * run.batch_size / (time.perf_counter() - clock)
                    bar.set_postfix_str(f"loss {metrics['loss/total']:.3f}", refresh=False)
                    if log:
                        log.log(step, metrics)
                if saving and main:
                    save_checkpoint(self.run_dir, step, self.hybrid, self.optimiser, self.config, keep=run.keep)
                if stopping:
                    break
        return self.finish(step, metrics, failures, stop.number)

    def step(self, step: int, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """One optimiser step over its micro-batches; everything random in it is a function of (seed, step, rank)."""
        torch.manual_seed(_step_seed(self.config.run.seed, step, self.accelerator.process_index))
        progress = Progress(step, self.steps, self.epoch)
        set_learning_rate(self.optimiser, learning_rate_factor(step, self.steps, self.warmup))
        set_weight_decay(self.optimiser, self.config, progress)
        self.hybrid.start_step(progress, watched=self.is_logged(step + 1))
        counts = [self.counts(batch) for batch in batches]
        mean_count = sum(map(sum, counts)) / len(counts)
        logs = []
        for micro, (batch, count) in enumerate(zip(batches, counts, strict=True)):
            draw = step * len(batches) + micro
            images = self.images(batch, draw)
            with self.accelerator.accumulate(self.model):
                with torch.autocast(images[0].device.type, torch.bfloat16, enabled=self.bf16):
                    loss, log = self.model(images, draw, count)
                self.accelerator.backward(loss * (sum(count) / mean_count))  # images weigh alike, not micro-batches
                if self.accelerator.sync_gradients:
                    self.hybrid.before_update()
                    largest = self.config.optimiser.clip or math.inf
                    norm = self.accelerator.clip_grad_norm_(clipped_parameters(self.optimiser), largest)
                self.optimiser.step()
                self.optimiser.zero_grad()
            logs.append(log)
        self.hybrid.after_update()
        mean = {name: torch.stack([log[name] for log in logs if name in log]).mean() for name in logs[0]}
        return mean | {"gradient_norm": norm}

    def counts(self, batch: Batch) -> list[int]:
        """Images of each rank, of which broken files may leave one fewer; exchanged without waiting for a GPU."""
        counts = torch.zeros(self.accelerator.num_processes, dtype=torch.int64)
        counts[self.accelerator.process_index] = len(batch.indices)
        if self.hosts:
            dist.all_reduce(counts, group=self.hosts)
        return counts.tolist()

    def is_logged(self, done: int) -> bool:
        """Whether a line of metrics is due after so many steps."""
        run = self.config.run
        return done % run.log_every == 0 or done % run.checkpoint_every == 0 or done == self.steps

    def images(self, batch: Batch, draw: int) -> list[Tensor]:
        """The views of a micro-batch on the device, recoloured and normalised, [B, C, H, W] float32 each."""
        settings, device = self.config.input, self.accelerator.device
        return [
            photometric(
                pixels.to(device, non_blocking=True),
                view.spec,
                (self.config.run.seed, draw, slot, self.accelerator.process_index),
                settings.mean,
                settings.std,
            )
            for slot, (view, pixels) in enumerate(zip(self.hybrid.views, batch.views, strict=True))
        ]

    def batches(self, start: int, stop: int) -> Generator[tuple[Batch, ...], None, None]:
        """The micro-batches of each step from `start` up to `stop`."""
        settings, run, ranks = self.config.input, self.config.run, self.accelerator.num_processes
        loader = ViewLoader(
            self.source,
            [view.spec for view in self.hybrid.views],
            slots=[view.slot for view in self.hybrid.views],
            image_size=settings.image_size,
            channels=settings.channels,
            batch_size=run.batch_size // (run.accumulate * ranks),
            seed=run.seed,
            start_step=start * run.accumulate,
            num_steps=(stop - start) * run.accumulate,
            workers=default_workers(ranks) if settings.workers is None else settings.workers,
            parts=run.accumulate,
            rank=self.accelerator.process_index,
            world_size=ranks,
            pin_memory=self.accelerator.device.type == "cuda",
        )
        with closing(iter(loader)) as batches:  # ends the workers, whatever ends the loop
            yield from zip(*[batches] * run.accumulate, strict=True)

    def read(self, logs: dict[str, Tensor], step: int) -> dict[str, float]:
        """The logs of a step on the host, averaged over ranks. Raises FloatingPointError if training broke down."""
        values = self.accelerator.reduce(torch.stack([value.float() for value in logs.values()]), "mean").tolist()
        metrics = dict(zip(logs, values, strict=True))
        if not all(math.isfinite(metrics[name]) for name in ("loss/total", "gradient_norm")):
            raise FloatingPointError(
                f"step {step}: the loss is {metrics['loss/total']}, the gradient's norm {metrics['gradient_norm']}; "
                f"the last checkpoint under {self.run_dir} is from before. A lower optimiser.base_lr or fp32 may help."
            )
        return metrics | {"learning_rate": self.optimiser.param_groups[0]["lr"]}

    def finish(self, step: int, metrics: dict[str, float], failures: dict[str, str], signal: int | None) -> RunSummary:
        """Export the encoder, note what could not be read, and sum up."""
        everyones = dict(gather_object(list(failures.items())))
        call = ""
        if self.accelerator.is_main_process:
            call = export_encoder(self.hybrid.exported(self.config.run.export), self.run_dir)
            name_failures(self.run_dir, everyones)
        self.accelerator.wait_for_everyone()
        speed = metrics.get("images_per_second", 0.0)
        chances = self.hybrid.chances(self.config.run.batch_size // self.config.run.accumulate)
        return RunSummary(
            run_dir=self.run_dir,
            checkpoint=find_checkpoint(self.run_dir),
            step=step,
            steps=self.steps,
            images_per_second=speed,
            encoder_call=call,
            metrics=metrics,
            warnings=verdicts(metrics, chances),
            failures=everyones,
            stopped_by=signal,
        )

    def settle_length(self) -> tuple[int, int]:
        """Steps of the run and of its warm-up."""
        run = self.config.run
        if len(self.source) < run.batch_size:
            raise ValueError(
                f"run.batch_size: got {run.batch_size}; allowed: at most the number of images, {len(self.source)}"
            )
        parts = run.accumulate * self.accelerator.num_processes
        if run.batch_size % parts:
            raise ValueError(
                f"run.batch_size: got {run.batch_size}; allowed: multiples of {parts}, the ranks times run.accumulate"
            )
        if run.negatives == "local":
            self.config.check_negatives(run.batch_size // parts)
        if self.config.minutes:
            line = f"measuring the speed, to see how many steps {self.config.minutes:g} minutes are"
            say(line, self.config, self.accelerator)
            run.steps, self.config.minutes = self.measure(self.config.minutes), None
        steps = run.steps or math.ceil(run.epochs * self.epoch)
        return steps, capped(self.config.optimiser.warmup_epochs, steps, self.epoch)

    @property
    def epoch(self) -> int:
        """Steps of a pass over the data."""
        return len(self.source) // self.config.run.batch_size

    def measure(self, minutes: float) -> int:
        """Steps that take `minutes`, from a rehearsal of about 3 % of that time, after which nothing has changed."""
        model, optimiser = copy.deepcopy(self.hybrid.state_dict()), copy.deepcopy(self.optimiser.state_dict())
        self.steps, self.warmup = ENDLESS, 0
        clock, measured, seconds = 0.0, 0, 0.0
        with closing(self.batches(0, ENDLESS)) as every_batch:
            for number, batches in enumerate(every_batch):
                if number == REHEARSAL_WARMUP:
                    clock = time.perf_counter()
                self.step(1, batches)["loss/total"].item()  # waits for the device; step 1 measures as little as most
                if number >= REHEARSAL_WARMUP:
                    measured, seconds = measured + 1, time.perf_counter() - clock
                if broadcast_object_list([measured >= REHEARSAL_STEPS and seconds > REHEARSAL_SECONDS * minutes])[0]:
                    break
        self.hybrid.load_state_dict(model)
        self.optimiser.load_state_dict(optimiser)
        return broadcast_object_list([max(1, round(minutes * 60 * measured / seconds))])[0]


def _measured_steps(state: dict, minutes: float) -> int:
    """Steps that the minutes of the run to resume became when it began."""
    steps = state["config"]["run"]["steps"]
    if steps is None:
        raise ValueError(f"minutes: got {minutes}; allowed: None, for the run to resume has its length in epochs")
    return steps


def _normalised_sample(source: Source, config: Config) -> Iterator[Tensor]:
    """Training images [C, H, W], the same on every rank."""
    settings = config.input
    for image in sample_images(source, settings.channels, settings.image_size, seed=config.run.seed):
        pixels = torch.tensor(image).permute(2, 0, 1)[None]
        yield normalise(pixels, settings.mean, settings.std)[0]


def _step_seed(seed: int, step: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0])


def _use_bf16(precision: str, device: torch.device) -> bool:
    """Whether to autocast to bfloat16: as asked for, or where the device multiplies it natively."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
