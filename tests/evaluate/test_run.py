import json
from pathlib import Path

import numpy as np
import pytest
import torch

from hsv import load_encoder
from hsv.cli import main
from hsv.data import digits
from hsv.evaluate import (
    embed,
    evaluate,
    evaluation_file,
    extract_features,
    format_table,
    knn_accuracy,
    read_evaluation,
)
from hsv.evaluate.run import _open_test, untrained_encoder


@pytest.fixture(scope="module")
def result(run_dir: Path) -> dict:
    return evaluate(run_dir, "digits", limit=300, draws=2)


def test_evaluation_has_a_row_for_pixels_untrained_and_trained(result: dict, run_dir: Path) -> None:
    assert [row["name"] for row in result["rows"]] == ["raw pixels", "untrained encoder", "trained encoder"]
    assert (result["train_images"], result["test_images"]) == (300, 360)
    pixels, untrained, trained = result["rows"]
    assert pixels["knn"] > 0.85 > untrained["knn"]
    assert untrained["knn"] != trained["knn"]
    assert json.loads((run_dir / "evaluation.json").read_text()) == result


def test_the_trained_row_is_the_checkpoint_on_the_test_part(result: dict, run_dir: Path) -> None:
    encoder = load_encoder(run_dir)
    bank, queries = extract_features(encoder, digits()), extract_features(encoder, digits("test"))
    expected = knn_accuracy(bank.x[:300], bank.labels[:300], queries.x, queries.labels)
    assert result["rows"][2]["knn"] == expected
    assert result["rows"][2]["pool"] == encoder.pool


def test_every_form_of_checkpoint_gives_the_same(result: dict, run_dir: Path, tmp_path: Path) -> None:
    for form in [*(run_dir / "checkpoints").glob("*.pt"), run_dir / "encoder.safetensors"]:
        again = evaluate(form, "digits", limit=300, draws=2, baselines=False, output=tmp_path / "e.json")
        assert again["rows"] == result["rows"][2:]


def test_test_labels_do_not_reach_bank_or_probes(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = digits("test")
    monkeypatch.setattr("hsv.evaluate.run._open_test", lambda *_: source)
    options = {"limit": 200, "draws": 2, "baselines": False, "output": "/dev/null"}
    right = evaluate(run_dir, "digits", **options)["rows"][0]
    source.labels = (source.labels + 1) % 10
    wrong = evaluate(run_dir, "digits", **options)["rows"][0]
    for key in ("knn", "few_label", "linear"):
        assert right[key] + wrong[key] <= 1


def test_without_a_test_part_a_seeded_fifth_is_held_out(run_dir: Path, photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "e.json"
    first, again = (evaluate(run_dir, photos, k=3, draws=2, output=output) for _ in range(2))
    assert first == again and json.loads(output.read_text())["k"] == 3
    assert (first["train_images"], first["test_images"]) == (10, 2)
    assert "held out" in first["note"]
    assert [name for name, _ in first["failures"]] == ["dark/broken.png"]


def test_unlabelled_images_are_refused(run_dir: Path, photos: Path) -> None:
    with pytest.raises(ValueError, match="have no labels"):
        evaluate(run_dir, photos / "dark")
    with pytest.raises(ValueError, match="test_limit: got 0"):
        evaluate(run_dir, "digits", test_limit=0)


def test_a_damaged_test_part_is_not_taken_for_none(tmp_path: Path) -> None:
    for name in ("train", "test"):
        (tmp_path / f"{name}-0.tar").write_bytes(b"no archive" * 100)
    with pytest.raises(ValueError, match=r"test-0\.tar.* is damaged"):
        _open_test(tmp_path, None)
    (tmp_path / "test-0.tar").unlink()
    assert _open_test(tmp_path, None) is None


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_embed_writes_names_and_features(run_dir: Path, photos: Path, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "new" / f"features{suffix}"
    features = embed(run_dir, photos, path)
    if suffix == ".npz":
        with np.load(path) as file:
            names, x = file["names"].tolist(), file["features"]
    else:
        from pyarrow import parquet

        table = parquet.read_table(path)
        names, x = table["name"].to_pylist(), np.array(table["feature"].to_pylist(), dtype=np.float32)
    assert names == features.names and len(names) == 12
    assert x.dtype == np.float32 and np.array_equal(x, features.x.numpy())


def test_embed_takes_a_folder_whole_and_checks_the_output_first(run_dir: Path, photos: Path, tmp_path: Path) -> None:
    (photos / "dark").rename(photos / "test")
    (photos / "bright").rename(photos / "train")
    assert len(embed(run_dir, photos, tmp_path / "f.npz")) == 12
    assert len(embed(run_dir, photos, tmp_path / "f.npz", limit=5)) == 5
    assert len(embed(run_dir, photos, tmp_path / "f.npz", split="test")) == 6
    assert len(embed(run_dir, "digits", tmp_path / "f.npz", split="test", limit=400)) == 360
    with pytest.raises(ValueError, match=r"output: .* allowed: a file that ends in \.npz or \.parquet"):
        embed(tmp_path / "nothing", photos, tmp_path / "f.csv")


def test_the_command_line_prints_the_table_and_writes_the_features(
    run_dir: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    options = ["--k", "3", "--draws", "2", "--baselines", "false", "--output", str(tmp_path / "e.json")]
    assert main(["evaluate", str(run_dir), "--data", str(photos), *options]) == 0
    assert "3-NN" in (out := capsys.readouterr().out) and "broken.png" in out
    assert main(["embed", str(run_dir), str(photos), "-o", str(tmp_path / "f.npz")]) == 0
    assert "12 images" in capsys.readouterr().out
    assert main(["report", str(run_dir), "-o", str(tmp_path / "new" / "r.html")]) == 0
    assert (tmp_path / "new" / "r.html").stat().st_size > 10_000


def test_the_command_line_says_where_a_result_is_saved_and_what_it_replaces(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "new" / "e.json"
    command = ["evaluate", str(run_dir), "--data", "digits", "--draws", "2", "--baselines", "false"]
    for limit, others in (("60", ""), ("60", ""), ("50", ", in place of an earlier one with train_images 60")):
        assert main([*command, "--limit", limit, "--output", str(path)]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == f"saved       {path}{others}"
    path.write_text("nothing of ours")
    assert read_evaluation(path) is None and read_evaluation(tmp_path / "absent") is None
    assert evaluation_file(run_dir / "checkpoints", None) == run_dir / "evaluation.json"
    assert evaluation_file(tmp_path) is None


def test_more_neighbours_than_the_bank_has_are_refused_before_anything_is_computed(
    run_dir: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hsv.evaluate.run.pixel_features", lambda *_, **__: pytest.fail("computed"))
    for data, k, most in (("digits", 501, 500), ("digits", 0, 500), (photos, 12, 11)):
        with pytest.raises(ValueError, match=f"k: got {k}; allowed: 1 to {most}"):
            evaluate(run_dir, data, limit=500, k=k)


def test_the_table_is_aligned() -> None:
    row = {"name": "trained", "pool": "cls", "knn": 0.9, "few_label": 0.8, "few_label_std": 0.0123, "linear": 1.0}
    lines = format_table({"k": 20, "per_class": 5, "rows": [row]}).splitlines()
    assert lines[1].split("  ")[0] == "trained (cls pooling)" and "80.0 ± 1.2" in lines[1] and "100.0" in lines[1]
    assert len({len(line) for line in lines}) == 1


def test_the_untrained_encoder_is_seeded_and_leaves_the_global_generator_alone(run_dir: Path) -> None:
    encoder, state = load_encoder(run_dir), torch.get_rng_state()
    first, again, other = (untrained_encoder(encoder, seed).vit.patch_embed.proj.weight for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.equal(first, encoder.vit.patch_embed.proj.weight)
