"""The command line and the configuration that it shares with files and checkpoints."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Never

import pytest
import yaml
from trainer_cases import tiny_config

import hsv
from hsv.__main__ import main as entry_point
from hsv.cli import main
from hsv.config import METHODS, Config, load_config, preset_names
from hsv.data import ViewSpec
from hsv.train import Trainer

NEEDS_JSONARGPARSE = (
    "the trainer needs jsonargparse, which is not installed; pip install '.[train]' in hsv's sources brings it"
)


def test_the_tree_survives_yaml(tmp_path: Path) -> None:
    config = load_config(preset="small-32")
    config.input.image_size, config.weighting.fixed = (24, 32), {"mae": 0.5}
    config.save(tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert Config.from_dict(config.to_dict()) == config
    hash(load_config(tmp_path / "config.yaml").simclr.view)


def test_presets_are_whole_and_fit_their_data() -> None:
    general = {"base-224", "digits", "small-224", "small-32"}
    assert set(preset_names()) == general | {f"{method}-{size}" for method in METHODS for size in (32, 224)}
    for name in preset_names():
        config = load_config(preset=name)
        config.data = config.data or "photos"
        config.check()
    digits, small = load_config(preset="digits"), load_config(preset="small-32")
    same_digit = ViewSpec(crop_scale=(0.5, 1.0), flip=0.0, shift=1, jitter_prob=1.0, brightness=0.4, contrast=0.4)
    assert digits.simclr.view == same_digit
    view = small.simclr.view
    assert (view.jitter_prob, view.saturation, view.hue, view.grayscale, view.blur) == (0.8, 0.4, 0.1, 0.2, 0.0)
    assert (small.input.image_size, small.encoder.embed_dim, small.encoder.depth) == (32, 192, 6)


def test_a_file_goes_over_a_preset(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("encoder: {depth: 3}\nsimclr: {view: {flip: 0.1}}\n")
    config = load_config(tmp_path / "mine.yaml", preset="small-32")
    assert (config.encoder.depth, config.encoder.embed_dim) == (3, 192)
    assert (config.simclr.view.flip, config.simclr.view.hue) == (0.1, 0.1)


def test_files_mean_what_they_say(tmp_path: Path) -> None:
    """YAML 1.1 reads 2e-3 as text, and knows no tuples."""
    text = "data: photos\noptimiser: {base_lr: 2e-3, clip: 1}\n"
    text += "input: {image_size: [24, 32], mean: [1e-1, 0, 0.5], std: [1, 1, 1]}\n"
    (tmp_path / "mine.yaml").write_text(
        text + "mae: {own_view: {crop_scale: [0.3, 1]}}\nweighting: {kind: fixed, fixed: {mae: 5e-1}}\n"
    )
    config = load_config(tmp_path / "mine.yaml")
    assert (config.optimiser.base_lr, config.optimiser.clip) == (0.002, 1.0)
    assert (config.input.image_size, config.input.mean) == ((24, 32), [0.1, 0.0, 0.5])
    assert (config.mae.own_view.crop_scale, config.mae.own_view.flip) == ((0.3, 1.0), 0.5)
    assert config.weighting.fixed == {"mae": 0.5}
    config.check()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"encoder": {"width": 3}}, r"config\.encoder: got \['width'\]"),
        ({"objectives": ["simclr", "simclr"]}, "objectives: got"),
        ({"optimiser": {"base_lr": "fast"}}, r"config\.optimiser\.base_lr: got 'fast'; allowed: float"),
        ({"run": {"batch_size": 2.5}}, r"config\.run\.batch_size: got 2\.5; allowed: int"),
        ({"run": {"progress": "maybe"}}, r"config\.run\.progress: got 'maybe'; allowed: bool"),
        ({"run": {"precision": "fp8"}}, r"config\.run\.precision: got 'fp8'"),
        ({"encoder": 3}, r"config\.encoder: got 3; allowed: EncoderConfig"),
        ({"simclr": {"view": {"crop_scale": [0.1]}}}, r"config\.simclr\.view\.crop_scale: got \[0\.1\]"),
        ({"objectives": []}, "objectives: got"),
        ({"objectives": ["jigsaw"]}, "objectives: got"),
        ({"run": {"batch_size": 0}}, r"run\.batch_size: got 0"),
        ({"run": {"accumulate": 3}}, r"run\.accumulate: got 3"),
        ({"run": {"steps": 3}, "minutes": 1.0}, "minutes and run.steps"),
        ({"mae": {"mask_ratio": 1.0}}, r"mae\.mask_ratio: got 1\.0"),
        ({"mae": {"mask_ratio": 0.0}}, r"mae\.mask_ratio: got 0\.0"),
        ({"weighting": {"kind": "fixed", "fixed": {"mae": -1}}}, r"weighting\.fixed\.mae: got -1\.0"),
        ({"simclr": {"temperature": -0.1}}, r"simclr\.temperature: got -0\.1"),
        ({"weighting": {"fixed": {"jigsaw": 1.0}}}, r"weighting\.fixed: got \['jigsaw'\]"),
        ({"weighting": {"fixed": {"mae": 1.0}}}, r"weighting\.fixed: got \{'mae': 1\.0\}; allowed: .*kind = 'fixed'"),
        ({"input": {"mean": [0.5]}}, r"input\.mean and input\.std"),
        ({"input": {"mean": [0.5], "std": [0.2]}}, r"input\.mean: got \[0.5\]; allowed: 3 numbers"),
        ({"input": {"mean": [0.5] * 3, "std": [0.2, 0, 0.2]}}, r"input\.std: got .*; allowed: 3 numbers > 0"),
        ({"mae": {"decoder_dim": 100}}, r"mae\.decoder_heads: got 3; allowed: a divisor of mae\.decoder_dim = 100"),
        ({"encoder": {"drop_path": 1.0}}, r"encoder\.drop_path: got 1\.0"),
        ({"optimiser": {"warmup_epochs": -1}}, r"optimiser\.warmup_epochs: got -1\.0"),
        ({"run": {"seed": -1}}, r"run\.seed: got -1"),
        ({"run": {"batch_size": 1}}, r"run\.batch_size: got 1; allowed: two images .* in simclr the others"),
        (
            {"run": {"batch_size": 4, "accumulate": 4}, "objectives": ["can", "mae", "cmae"]},
            r"got 4.* in can, cmae the others",
        ),
        ({"run": {"batch_size": 1}, "objectives": ["moco"]}, r"run\.batch_size: got 1"),
        ({}, r"data: got None; allowed: digits"),
    ],
)
def test_settings_that_cannot_work(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config.from_dict(values).check()


def test_one_image_at_a_time_is_enough_without_negatives() -> None:
    values = {"data": "digits", "run": {"batch_size": 1}, "moco": {"version": "v2"}}
    Config.from_dict(values | {"objectives": ["moco", "mae", "byol", "dino"]}).check()


@pytest.mark.parametrize(
    ("text", "reason"),
    [("run: {steps: 3", "line 1, column 15"), ("- a\n- b\n", "list"), ("hello", "str"), (None, "No such file")],
)
def test_files_that_hold_no_settings(
    text: str | None, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "mine.yaml"
    if text is not None:
        path.write_text(text)
    message = rf"config: got '{re.escape(str(path))}'.*{reason}"
    with pytest.raises(ValueError, match=message):
        load_config(path)
    assert main(["pretrain", "--config", str(path), "--data", "digits"]) == 2
    assert re.fullmatch(f"hsv pretrain: {message}.*\n", capsys.readouterr().err)


def test_pretrain_resume_and_their_errors(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tiny_config("unused", steps=2).save(tmp_path / "config.yaml")
    run = tmp_path / "run"
    common = ["pretrain", "--preset", "digits", "--config", str(tmp_path / "config.yaml")]
    assert main([*common, "--output", str(run), "--objectives", "[mae]", "--run.seed", "3"]) == 0
    out = capsys.readouterr().out
    assert "2 of 2 steps" in out and "timm.create_model(" in out and str(run / "checkpoints") in out
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["objectives"] == ["mae"] and saved["run"]["seed"] == 3 and saved["encoder"]["embed_dim"] == 32

    assert main([*common, "--output", str(run)]) == 2
    assert "holds a run" in capsys.readouterr().err
    moved = run.rename(tmp_path / "moved")
    assert main(["pretrain", "--resume", str(moved), "--run.steps", "3"]) == 0
    assert "3 of 3 steps" in capsys.readouterr().out and not run.exists()
    assert main(["pretrain", "--resume", str(tmp_path / "nowhere")]) == 2
    assert "resume: got" in capsys.readouterr().err
    assert main(["pretrain", "--preset", "huge"]) == 2
    assert "small-32" in capsys.readouterr().err
    assert main(["pretrain", "--data", str(tmp_path / "nowhere"), "--output", str(run)]) == 2
    assert "nowhere" in capsys.readouterr().err and not run.exists()


def test_a_resumed_run_says_where_it_goes_on_or_that_it_is_done(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = tmp_path / "a run"
    config = tiny_config(run, steps=2, progress=True)
    config.input.mean = config.input.std = None
    config.save(tmp_path / "config.yaml")
    assert main(["pretrain", "--config", str(tmp_path / "config.yaml")]) == 0
    first = capsys.readouterr().out.splitlines()
    assert first[0] == "digits: 200 images" and first[1].startswith("measuring the mean")
    assert not [line for line in first if "goes on after" in line]
    assert f"next        hsv evaluate '{run}' --data LABELLED; hsv report '{run}'" in first
    assert main(["pretrain", "--resume", str(run)]) == 0
    again = capsys.readouterr().out
    assert "nothing left to do: 2 of 2 steps are done" in again and "images/s" not in again and "measuring" not in again
    assert main(["pretrain", "--resume", str(run), "--run.steps", "3"]) == 0
    assert "goes on after step 2" in capsys.readouterr().out
    assert main(["pretrain", "--resume", str(run), "--preset", "digits"]) == 2
    assert "preset: got 'digits' with --resume" in capsys.readouterr().err


def test_folders_without_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder, file = tmp_path / "a run", tmp_path / "file"
    folder.mkdir()
    file.touch()
    tiny_config(folder, steps=1).save(folder / "config.yaml")
    assert main(["pretrain", "--resume", str(folder)]) == 2
    message = capsys.readouterr().err
    assert "before it saved anything" in message
    anew = shlex.split(message.partition("begins anew with: hsv ")[2])
    assert main(anew) == 0 and "1 of 1 steps" in capsys.readouterr().out
    assert main(["pretrain", "--preset", "digits", "--output", str(file)]) == 2
    assert "which is a file; allowed: a folder" in capsys.readouterr().err


def test_a_run_that_is_stopped_before_its_first_step_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: Trainer, minutes: float) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "measure", interrupted)
    config = tiny_config(tmp_path / "run", steps=None, progress=True)
    config.minutes = 2.0
    config.save(tmp_path / "config.yaml")
    assert main(["pretrain", "--config", str(tmp_path / "config.yaml")]) == 130
    captured = capsys.readouterr()
    assert captured.err == "hsv pretrain: stopped before the first step; nothing was written\n"
    assert captured.out.splitlines()[-1] == "measuring the speed, to see how many steps 2 minutes are"
    assert not (tmp_path / "run").exists()


def test_a_dictionary_is_no_configuration() -> None:
    with pytest.raises(ValueError, match="config: got dict; allowed: a Config, such as load_config returns"):
        hsv.pretrain({"data": "digits"})


@pytest.mark.parametrize("command", [["pretrain", "--pres", "digits"], ["embed", "run", "digits", "--out", "x.npz"]])
def test_options_are_not_abbreviated(command: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 2 and f"{command[-2]} {command[-1]}" in capsys.readouterr().err


def test_options_of_methods_that_are_not_trained_are_refused_and_in_files_allowed(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hsv.train.pretrain", lambda config, resume: pytest.fail("enough", pytrace=False))
    for option in (["--dino.out_dim", "7"], ["--dino.out_dim=7"]):
        assert main(["pretrain", "--preset", "small-32", *option]) == 2
        assert "dino.out_dim: got an option of dino, which is not trained" in capsys.readouterr().err
    (tmp_path / "mine.yaml").write_text("preset: small-32\ndino: {out_dim: 7}\n")
    for words in (["--config", str(tmp_path / "mine.yaml")], ["--objectives", "dino", "mae", "--dino.out_dim", "7"]):
        with pytest.raises(pytest.fail.Exception, match="enough"):
            main(["pretrain", *words])


def test_a_file_may_name_its_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("preset: digits\nrun: {batch_size: 32}\n")
    ran = []

    def remember(config: Config, *, resume: bool) -> Never:
        ran.append(config)
        raise ValueError("enough")

    monkeypatch.setattr("hsv.train.pretrain", remember)
    assert main(["pretrain", "--config", str(file)]) == 2
    for config in (*ran, load_config(file)):
        assert (config.data, config.input.image_size, config.run.batch_size) == ("digits", 8, 32)
    assert load_config(file, preset="small-32").input.image_size == 32


def test_presets_and_version(capsys: pytest.CaptureFixture) -> None:
    assert main(["presets"]) == 0
    listed = capsys.readouterr().out.splitlines()
    titles = [line for line in listed if not line.startswith(" ")]
    assert titles == ["any objectives:", "one method over small-224:", "one method over small-32:"]
    described = [line.split() for line in listed if line.startswith(" ")]
    assert {words[0] for words in described} == set(preset_names()) and all(len(words) > 4 for words in described)
    assert main(["presets", "small-32"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["encoder"]["patch_size"] == 8
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0 and hsv.__version__ in capsys.readouterr().out


def test_help_explains_units_and_defaults(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["pretrain", "--help"])
    text = " ".join(capsys.readouterr().out.split()).replace("- ", "-")  # words are broken at hyphens
    assert "--run.batch_size" in text and "over all ranks and micro-batches" in text and "default: 256" in text
    assert "--simclr.temperature" not in text and "hsv pretrain --objectives dino --help" in text
    with pytest.raises(SystemExit):
        main(["pretrain", "--help", "--objectives", "dino,mae"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--dino.local_view.blur_sigma" in text and "pixels" in text and "--mae.mask_ratio" in text
    assert "--simclr.temperature" not in text
    with pytest.raises(SystemExit):
        main(["pretrain", "--preset", "dino-32", "--help"])
    text = capsys.readouterr().out
    assert "--dino.centring" in text and "--mae.mask_ratio" not in text
    for words in (["--run.batchsize", "3"], ["--objectives"], ["--objectives", "--preset", "dino-32"]):
        with pytest.raises(SystemExit) as stop:
            main(["pretrain", *words])
        assert stop.value.code == 2


@pytest.mark.parametrize(
    "words",
    [
        ["--objectives", "mae,simclr"],
        ["--objectives=[mae, simclr]"],
        ["--objectives", "mae", "simclr", "--preset", "digits"],
        ["--objectives=mae", "simclr"],
        ["--objectives", "[mae,", "simclr]"],
    ],
)
def test_objectives_are_named_with_or_without_brackets(words: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["pretrain", *words, "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["objectives"] == ["mae", "simclr"]


def test_without_the_trainers_dependencies_one_sentence_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    monkeypatch.delitem(sys.modules, "hsv.cli")
    assert entry_point() == 1
    assert capsys.readouterr().err == f"hsv: {NEEDS_JSONARGPARSE}\n"
    monkeypatch.setitem(hsv._HOMES, "pretrain", "hsv.cli")
    with pytest.raises(ModuleNotFoundError, match=re.escape(NEEDS_JSONARGPARSE)):
        _ = hsv.pretrain


def test_import_is_light() -> None:
    script = "import sys, hsv; assert hsv.__version__ and 'torch' not in sys.modules; hsv.pretrain, hsv.load_encoder"
    subprocess.run([sys.executable, "-c", script], check=True)
    with pytest.raises(AttributeError):
        _ = hsv.nothing


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
def test_threads_that_wait_do_not_keep_the_processors(given: dict[str, str], spins: str) -> None:
    script = "import os, sys; from hsv.__main__ import main; sys.argv = ['hsv', 'presets']; main(); "
    script += "print(os.environ.get('GOMP_SPINCOUNT'), file=sys.stderr)"
    others = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-c", script], env=others | given, capture_output=True, text=True, check=True
    )
    assert done.stderr.strip() == spins


def test_a_command_that_is_stopped_says_so(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(**options: object) -> Never:
        raise KeyboardInterrupt

    monkeypatch.setattr("hsv.evaluate.evaluate", interrupted)
    assert main(["evaluate", "anything", "--data", "digits"]) == 130
    assert capsys.readouterr().err == "hsv evaluate: stopped\n"
