"""The loop: resuming to the last bit, signals, accumulation, length, failures, starting weights."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from trainer_cases import tiny_config

import hsv
from hsv.checkpoint import find_checkpoint, read_checkpoint
from hsv.config import Config
from hsv.data import normalise
from hsv.data.loader import Batch
from hsv.export import build_encoder, export_encoder, load_model
from hsv.initialise import initialise
from hsv.monitor import read_metrics
from hsv.train import Trainer
from hsv_kernels import random_masking


def metrics_of(run: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in read_metrics(run / "metrics.jsonl")]


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(run)["model"]


def same_weights(a: Path, b: Path) -> bool:
    one, other = weights_of(a), weights_of(b)
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def crash_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Make the run lose its process, so to speak, before `step`."""
    original = Trainer.step

    def crashing(self: Trainer, number: int, batches: Sequence[Batch]) -> dict[str, torch.Tensor]:
        if number == step:
            raise ConnectionError("power cut")
        return original(self, number, batches)

    monkeypatch.setattr(Trainer, "step", crashing)


def test_ten_steps_are_five_and_five_to_the_last_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Epochs of 3 steps, so step 5 lies within one; two workers, augmentation and drop-path on."""

    def config(name: str) -> Config:
        config = tiny_config(tmp_path / name, steps=10, checkpoint_every=5)
        config.input.workers = 2
        return config

    hsv.pretrain(config("whole"))
    with monkeypatch.context() as patch, pytest.raises(ConnectionError):
        crash_at(patch, 7)  # two steps after the checkpoint, whose lines of metrics must go
        hsv.pretrain(config("parts"))
    assert len(metrics_of(tmp_path / "parts")) == 7
    torch.manual_seed(12345)  # of no consequence
    summary = hsv.pretrain(config("parts"), resume=True)

    assert summary.step == summary.steps == 10
    assert metrics_of(tmp_path / "parts") == metrics_of(tmp_path / "whole")
    assert [row["step"] for row in metrics_of(tmp_path / "whole")] == list(range(1, 11))
    assert same_weights(tmp_path / "parts", tmp_path / "whole")
    exported = [(tmp_path / name / "encoder.safetensors").read_bytes() for name in ("parts", "whole")]
    assert exported[0] == exported[1]


def test_what_a_run_leaves_behind(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", steps=5, checkpoint_every=1, keep=2)
    summary = hsv.pretrain(config)
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == [
        "step-00000004.pt",
        "step-00000005.pt",
    ]
    assert summary.checkpoint == find_checkpoint(tmp_path / "run")
    assert summary.encoder_call.startswith("timm.create_model('vit_tiny_patch16_224'")
    names = {
        *("loss/total", "loss/simclr", "loss/mae", "weight/simclr", "weight/mae"),
        *("learning_rate", "gradient_norm", "feature_spread", "effective_rank", "images_per_second"),
    }
    assert set(read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]) == names | {"step"} == {*summary.metrics, "step"}
    saved = hsv.load_config(tmp_path / "run" / "config.yaml")
    assert saved.input.mean is not None and saved.run.steps == 5
    images = torch.randn(2, 1, 8, 8)
    encoder = hsv.load_encoder(tmp_path / "run")
    _, hybrid = load_model(summary.checkpoint)
    exported = hsv.load_encoder(tmp_path / "run" / "encoder.safetensors")
    assert encoder.mean == exported.mean == tuple(saved.input.mean)
    assert torch.equal(encoder.features(images), exported.features(images))
    assert torch.equal(encoder.features(images), hybrid.encoder.features(images))


def test_folders_are_claimed_and_resumed_with_care(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has one"):
        hsv.pretrain(tiny_config(tmp_path / "run"), resume=True)
    hsv.pretrain(tiny_config(tmp_path / "run", steps=1))
    with pytest.raises(ValueError, match="holds a run"):
        hsv.pretrain(tiny_config(tmp_path / "run", steps=1))
    with pytest.raises(ValueError, match=r"run\.batch_size: got 500"):
        hsv.pretrain(tiny_config(tmp_path / "other", batch_size=500))
    (tmp_path / "foreign.pt").write_bytes(b"")
    torch.save({"format": 99}, tmp_path / "foreign.pt")
    with pytest.raises(ValueError, match="format"):
        read_checkpoint(tmp_path / "foreign.pt")


def test_a_damaged_checkpoint_is_named_and_an_older_one_offered(tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("not a checkpoint")
    for call in (read_checkpoint, hsv.load_encoder):
        with pytest.raises(
            ValueError, match=r"checkpoint: got '.*/text\.pt', which cannot be read; allowed: a file [^,]*$"
        ):
            call(tmp_path / "text.pt")
    newest = hsv.pretrain(tiny_config(tmp_path / "run", steps=2, checkpoint_every=1)).checkpoint
    newest.write_bytes(newest.read_bytes()[:1000])
    message = (
        r"step-00000002\.pt', which cannot .*/step-00000001\.pt: the run goes on from it once step-00000002\.pt is"
    )
    with pytest.raises(ValueError, match=message):
        hsv.pretrain(tiny_config(tmp_path / "run", steps=2), resume=True)
    newest.unlink()
    assert hsv.pretrain(tiny_config(tmp_path / "run", steps=2), resume=True).step == 2


def test_a_damaged_encoder_is_named(tmp_path: Path) -> None:
    hsv.pretrain(tiny_config(tmp_path, steps=1))
    weights = tmp_path / "encoder.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"path: got '.*/encoder\.safetensors'; allowed: the weights"):
        hsv.load_encoder(weights)


def test_what_a_run_leaves_can_be_read_by_whom_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        summary = hsv.pretrain(tiny_config(tmp_path, steps=1))
    finally:
        os.umask(before)
    for path in (summary.checkpoint, tmp_path / "encoder.safetensors", tmp_path / "encoder.json"):
        assert path.stat().st_mode & 0o777 == 0o640, path


def test_a_resumed_run_takes_new_settings(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", steps=2)
    hsv.pretrain(config)
    config.run.steps, config.optimiser.base_lr, config.optimiser.weight_decay = 3, 1e-6, 0.5
    last = hsv.pretrain(config, resume=True).metrics["learning_rate"]
    assert 0 < last <= 1e-6
    groups = read_checkpoint(tmp_path / "run")["optimiser"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.5, 0, 0]
    config.run.steps = 1
    with pytest.raises(ValueError, match=r"run\.steps: got 1; allowed: at least 3"):
        hsv.pretrain(config, resume=True)


def test_the_length_of_a_run_in_epochs_is_not_measured_again(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", steps=None, epochs=0.5)
    hsv.pretrain(config)
    config.minutes = 1.0
    with pytest.raises(ValueError, match=r"minutes: got 1\.0"):
        hsv.pretrain(config, resume=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_absent_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"run\.device: got 'cuda'"):
        hsv.pretrain(tiny_config(tmp_path / "run", device="cuda"))


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path / "run", steps=6, checkpoint_every=2, log_every=5)
    original = Trainer.images

    def poisoned(self: Trainer, batch: Batch, draw: int) -> list[torch.Tensor]:
        images = original(self, batch, draw)
        return [image * float("nan") for image in images] if draw >= 3 else images

    monkeypatch.setattr(Trainer, "images", poisoned)
    with pytest.raises(FloatingPointError, match="step 4: the loss is nan"):
        hsv.pretrain(config)
    assert find_checkpoint(tmp_path / "run").name == "step-00000002.pt"
    assert all(value.isfinite().all() for value in weights_of(tmp_path / "run").values())


def masks_of_position(batch: int, num_patches: int, **others: object) -> tuple[torch.Tensor, ...]:
    """The same mask for every image, whichever micro-batch it is in."""
    ids_keep, ids_restore, mask = random_masking(1, num_patches, mask_ratio=others["mask_ratio"], seed=0)
    return ids_keep.expand(batch, -1), ids_restore.expand(batch, -1), mask.expand(batch, -1)


def test_accumulated_micro_batches_average_their_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With MAE alone, whose loss is a mean over images, two micro-batches equal one batch of both."""
    monkeypatch.setattr("hsv.objectives.encode.random_masking", masks_of_position)
    monkeypatch.setattr("hsv.train.photometric", lambda views, spec, key, mean, std: normalise(views, mean, std))
    for name, accumulate in (("one", 1), ("two", 2)):
        config = tiny_config(tmp_path / name, steps=3, accumulate=accumulate, precision="fp32")
        config.objectives, config.encoder.drop_path = ["mae"], 0.0
        hsv.pretrain(config)
    one, two = weights_of(tmp_path / "one"), weights_of(tmp_path / "two")
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-3, atol=1e-5)


def test_images_weigh_alike_where_broken_files_make_micro_batches_unequal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hsv.objectives.encode.random_masking", masks_of_position)
    monkeypatch.setattr("hsv.train.photometric", lambda views, spec, key, mean, std: normalise(views, mean, std))
    for i in range(8):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8), dtype=np.uint8)
        (Image.fromarray(pixels).save if i > 2 else Path.touch)(tmp_path / f"{i}.png")
    for name, accumulate in (("one", 1), ("two", 2)):
        config = tiny_config(tmp_path / name, steps=3, batch_size=8, accumulate=accumulate, precision="fp32")
        config.objectives, config.encoder.drop_path, config.data, config.input.limit = ["mae"], 0.0, str(tmp_path), None
        assert len(hsv.pretrain(config).failures) == 3
    one, two = weights_of(tmp_path / "one"), weights_of(tmp_path / "two")
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-3, atol=1e-5)


def test_minutes_become_steps_once(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", steps=None)
    config.minutes = 0.05
    begun = time.monotonic()
    summary = hsv.pretrain(config)
    assert summary.step == summary.steps >= 1 and time.monotonic() - begun < 60
    saved = hsv.load_config(tmp_path / "run" / "config.yaml")
    assert (saved.minutes, saved.run.steps) == (None, summary.steps)
    assert hsv.pretrain(config, resume=True).steps == summary.steps


def test_the_rehearsal_for_minutes_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hsv.pretrain(tiny_config(tmp_path / "plain", steps=2))
    measured = Trainer.measure
    monkeypatch.setattr(Trainer, "measure", lambda self, minutes: min(2, measured(self, minutes)))
    config = tiny_config(tmp_path / "measured", steps=None)
    config.minutes = 0.02
    hsv.pretrain(config)
    assert same_weights(tmp_path / "plain", tmp_path / "measured")


def test_the_rehearsal_takes_steps_as_most_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither gradients of each objective nor features are measured, which would make the run too short."""
    step, rehearsed = Trainer.step, []

    def watched(self: Trainer, number: int, batches: object) -> dict:
        logs = step(self, number, batches)
        rehearsed.extend([sorted(logs)] if self.config.run.steps is None else [])
        return logs

    monkeypatch.setattr(Trainer, "step", watched)
    config = tiny_config(tmp_path / "run", steps=None)
    config.objectives, config.run.log_every, config.minutes = ["simclr", "mae"], 10, 0.02
    hsv.pretrain(config)
    assert len(rehearsed) >= 4
    assert not [name for names in rehearsed for name in names if name.startswith("gradient/")]
    assert not [names for names in rehearsed if "feature_spread" in names]


def test_broken_files_are_left_out_and_named(tmp_path: Path) -> None:
    for i in range(12):
        Image.new("RGB", (12, 10), (20 * i, 90, 200 - 10 * i)).save(tmp_path / f"{i}.png")
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    config = tiny_config(tmp_path / "run", batch_size=6, steps=4)
    config.data, config.input.channels = str(tmp_path), 3
    summary = hsv.pretrain(config)
    assert [Path(name).name for name in summary.failures] == ["broken.png"] and summary.step == 4
    (line,) = (tmp_path / "run" / "failures.jsonl").read_text().splitlines()
    assert Path(json.loads(line)["name"]).name == "broken.png" and json.loads(line)["reason"]


def test_a_run_with_a_teacher_is_resumed_as_itself_and_starts_others_with_its_teacher(tmp_path: Path) -> None:
    first = tiny_config(tmp_path / "first", steps=2)
    first.objectives, first.byol.hidden_dim, first.byol.out_dim = ["byol"], 16, 16
    hsv.pretrain(first)
    first.byol.momentum, first.run.steps = 0.5, 3
    with pytest.raises(ValueError, match="resume: got settings of another model") as refused:
        hsv.pretrain(first, resume=True)
    assert len(str(refused.value)) < 400 and "key(s)" in str(refused.value)
    found = []
    for path in (first.output, find_checkpoint(first.output)):
        encoder = build_encoder(load_model(first.output)[0])
        initialise(encoder, path)
        found.append(encoder.vit.state_dict())
    exported = hsv.load_encoder(first.output).vit.state_dict()
    for weights in found:
        assert all(torch.equal(weights[key], exported[key]) for key in exported)


def test_starting_weights(tmp_path: Path) -> None:
    hsv.pretrain(tiny_config(tmp_path / "first", steps=2))
    trained = hsv.load_encoder(tmp_path / "first")
    torch.save(trained.vit.state_dict(), tmp_path / "plain.pt")
    forms = (tmp_path / "first", find_checkpoint(tmp_path / "first"), tmp_path / "first" / "encoder.safetensors")
    for number, init in enumerate((*forms, tmp_path / "plain.pt")):
        config = tiny_config(tmp_path / f"second{number}", steps=1)
        config.init, config.optimiser.base_lr = str(init), 1e-30
        hsv.pretrain(config)
        images = torch.randn(2, 1, 8, 8)
        torch.testing.assert_close(
            hsv.load_encoder(config.output).features(images), trained.features(images), rtol=0, atol=1e-6
        )
    larger = tiny_config(tmp_path / "larger", steps=1)
    larger.init, larger.input.image_size = str(tmp_path / "first"), 12  # positions are resampled
    hsv.pretrain(larger)
    other = tiny_config(tmp_path / "other", steps=1)
    other.init, other.encoder.depth = str(tmp_path / "first"), 1
    with pytest.raises(ValueError, match="init: got"):
        hsv.pretrain(other)
    (tmp_path / "broken.pt").write_bytes(b"not weights")
    for absent in ("nowhere", "broken.pt"):
        other.init = str(tmp_path / absent)
        with pytest.raises(ValueError, match="init: got"):
            hsv.pretrain(other)


@pytest.mark.parametrize(
    ("before", "after"), [((4, 16), (8, 8)), ((6, 12), (12, 6)), ((6, 12), (8, 16)), ((8, 18), (8, 24))]
)
def test_positions_of_a_run_are_resampled_from_its_own_grid(
    tmp_path: Path, before: tuple[int, int], after: tuple[int, int]
) -> None:
    configs = [tiny_config(tmp_path, steps=1) for _ in range(2)]
    for config, size in zip(configs, (before, after), strict=True):
        config.input.image_size, config.input.mean, config.input.std = size, [0.5], [0.25]
    old, new = (build_encoder(config) for config in configs)
    export_encoder(old, tmp_path)
    initialise(new, tmp_path / "encoder.safetensors")
    grid = old.vit.pos_embed[:, 1:].unflatten(1, old.grid).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, new.grid, mode="bicubic", antialias=True).flatten(2).mT
    torch.testing.assert_close(new.vit.pos_embed[:, 1:], expected)


@pytest.mark.parametrize(("name", "value"), [("image_size", (4, 16)), ("mean", [0.9]), ("std", [0.9])])
def test_a_run_goes_on_with_the_images_that_it_began_with(tmp_path: Path, name: str, value: object) -> None:
    config = tiny_config(tmp_path, steps=1)
    hsv.pretrain(config)
    config.run.steps = 2
    assert hsv.pretrain(config, resume=True).step == 2  # mean and deviation are the run's
    began = hsv.load_config(tmp_path / "config.yaml")
    setattr(began.input, name, value)
    with pytest.raises(ValueError, match=rf"input\.{name}: got .*; allowed: .*, as when the run began"):
        hsv.pretrain(began, resume=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint(tmp_path: Path, number: signal.Signals) -> None:
    config = tiny_config(tmp_path / "run", steps=10**6, batch_size=16)
    config.input.workers = 1
    config.save(tmp_path / "config.yaml")
    command = [sys.executable, "-m", "hsv", "pretrain", "--config", str(tmp_path / "config.yaml")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not read_metrics(tmp_path / "run" / "metrics.jsonl") and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "--resume" in out, err
    state = read_checkpoint(tmp_path / "run")
    assert state["step"] >= 1 and (tmp_path / "run" / "encoder.safetensors").is_file()
    config.run.steps = state["step"] + 1
    assert hsv.pretrain(config, resume=True).step == state["step"] + 1
