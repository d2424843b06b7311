"""Every method goes on to the same bits, and leaves the encoder that was asked for."""

from pathlib import Path

import pytest
import torch
from trainer_cases import narrow_config

import hsv
from hsv.checkpoint import read_checkpoint
from hsv.config import METHODS, Config
from hsv.export import load_model

SETS = (*([name] for name in METHODS), ["moco", "dino", "mae"])


def config_for(folder: Path, objectives: list[str]) -> Config:
    """Four steps with a checkpoint after two, a queue beside other objectives, and teachers that move."""
    config = narrow_config(folder, objectives, steps=4, checkpoint_every=2, batch_size=16)
    config.moco.version = "v2" if len(objectives) > 1 else "v3"
    config.weighting.measure_every = 2
    return config


@pytest.mark.parametrize("objectives", SETS, ids="+".join)
def test_two_steps_and_two_are_four_to_the_last_bit(objectives: list[str], tmp_path: Path) -> None:
    summary = hsv.pretrain(config_for(tmp_path, objectives))
    whole, half = (read_checkpoint(summary.checkpoint.with_name(f"step-0000000{step}.pt")) for step in (4, 2))
    summary.checkpoint.unlink()
    torch.manual_seed(99)  # of no consequence
    again = read_checkpoint(hsv.pretrain(config_for(tmp_path, objectives), resume=True).checkpoint)
    assert whole["step"] == again["step"] == 4 and whole["model"].keys() == again["model"].keys()
    for key, value in whole["model"].items():
        assert torch.equal(value, again["model"][key]), key
    for number, moments in whole["optimiser"]["state"].items():
        assert all(torch.equal(value, again["optimiser"]["state"][number][key]) for key, value in moments.items())
    if len(objectives) > 1:
        kept = ("queue.keys", "queue.cursor", "centre", "weighting.log_norm_", "teachers.", "teacher_head.")
        for name in kept:  # each is state, and has moved since the checkpoint
            keys = [key for key in whole["model"] if name in key]
            assert any(not torch.equal(whole["model"][key], half["model"][key]) for key in keys), name


@pytest.mark.parametrize("which", ["teacher", "student"])
def test_the_teacher_is_exported_unless_the_student_is_asked_for(which: str, tmp_path: Path) -> None:
    config = narrow_config(tmp_path, ["dino"], steps=3, batch_size=16)
    assert config.run.export == "teacher"
    config.run.export, config.dino.momentum = which, 0.5
    hsv.pretrain(config)
    _, hybrid = load_model(tmp_path)
    (teacher,) = hybrid.teachers.values()
    chosen, other = (teacher, hybrid.encoder) if which == "teacher" else (hybrid.encoder, teacher)
    images = torch.randn(2, 1, 8, 8)
    assert not torch.equal(chosen.features(images), other.features(images))
    for path in (tmp_path, tmp_path / "encoder.safetensors"):
        assert torch.equal(hsv.load_encoder(path).features(images), chosen.features(images))
