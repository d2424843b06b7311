"""`hsv evaluate` and `hsv embed`: from a checkpoint and images to accuracies, or to a file of features."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from hsv.checkpoint import find_checkpoint
from hsv.data import FolderSource, MissingSplit, Source, default_workers, open_source
from hsv.data.sources import find_shards
from hsv.evaluate.features import Features, extract_features, pixel_features
from hsv.evaluate.knn import knn_accuracy
from hsv.evaluate.linear import few_label_accuracy, linear_accuracy
from hsv.evaluate.saved import evaluation_file, save_evaluation
from hsv.export import load_encoder
from hsv.models import Encoder

__all__ = ["embed", "evaluate", "format_table", "labelled_parts", "untrained_encoder"]

HELD_OUT = 5  # without a test part, every fifth labelled image is one


def evaluate(
    checkpoint: str | Path,
    data: str | Path,
    *,
    pool: Literal["mean", "cls"] | None = None,
    limit: int | None = None,
    test_limit: int | None = None,
    k: int = 20,
    per_class: int = 10,
    draws: int = 10,
    seed: int = 0,
    batch_size: int = 256,
    workers: int | None = None,
    device: str = "auto",
    baselines: bool = True,
    output: str | Path | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Accuracy of frozen features on labelled images: k-NN, linear probe, linear probe with a few labels.

    Bank and probes see the training part alone; the test part is read once. Data without a test part gives up a
    seeded fifth of its images for it.

    Args:
        checkpoint: a run folder, a checkpoint, or an encoder.safetensors.
        data: `digits`, a folder with one sub-folder per class (or train/ and test/ of such), or labelled tar shards.
        pool: `mean` of the patch tokens or `cls`; unset = the encoder's own.
        limit: use at most so many training images.
        test_limit: use at most so many test images.
        k: neighbours that vote.
        per_class: labels per class of the few-label probe.
        draws: how often these labels are drawn.
        seed: of draws, splits and of the untrained encoder.
        batch_size: images encoded at a time.
        workers: processes that decode images; unset = chosen from the number of cores.
        device: `cpu`, `cuda` or `auto`.
        baselines: add rows for raw pixels and for the same encoder untrained.
        output: JSON file for the result; unset = evaluation.json in the run folder, if there is one.
        progress: show bars on stderr.

    Returns:
        checkpoint, data, pool, seed, k, per_class, draws, train_images, test_images, note, failures, and rows: one dict
        each with name, pool, knn, few_label, few_label_std, linear, as fractions of 1.
    """
    encoder = load_encoder(checkpoint)
    pool = pool or encoder.pool
    workers = default_workers() if workers is None else workers
    train, test = _labelled(open_source(data, limit=limit), data), _open_test(data, test_limit)
    _check_neighbours(k, len(train), held_out=test is None)
    extraction = {"batch_size": batch_size, "workers": workers}
    network = {**extraction, "pool": pool, "device": _device(device), "progress": progress}

    def trained(source: Source) -> Features:
        return extract_features(encoder, source, **network)

    def untrained(source: Source) -> Features:
        return extract_features(untrained_encoder(encoder, seed), source, **network)

    def pixels(source: Source) -> Features:
        return pixel_features(source, image_size=encoder.image_size, mean=encoder.mean, std=encoder.std, **extraction)

    rows: list[tuple[str, str | None, Callable[[Source], Features]]] = [("trained encoder", pool, trained)]
    if baselines:
        rows = [("raw pixels", None, pixels), ("untrained encoder", pool, untrained), *rows]
    table = []
    for name, row_pool, features in rows:
        bank, queries = labelled_parts(features, train, test, seed)
        accuracies = _accuracies(bank, queries, k=k, per_class=per_class, draws=draws, seed=seed)
        table.append({"name": name, "pool": row_pool} | accuracies)
    result = {
        "checkpoint": str(find_checkpoint(checkpoint) or checkpoint),
        "data": str(data),
        "pool": pool,
        "seed": seed,
        "k": k,
        "per_class": per_class,
        "draws": draws,
        "train_images": len(bank),
        "test_images": len(queries),
        "rows": table,
        "note": _note(data, len(bank), len(queries), held_out=test is None, per_class=per_class, draws=draws),
        "failures": bank.failures + queries.failures,
    }
    file = evaluation_file(checkpoint, output)
    if file is not None:
        save_evaluation(file, result)
    return result


def _accuracies(
    bank: Features, queries: Features, *, k: int, per_class: int, draws: int, seed: int
) -> dict[str, float]:
    """Of `queries`, by what `bank` and its labels teach."""
    parts = (bank.x, bank.labels, queries.x, queries.labels)
    few = few_label_accuracy(*parts, per_class=per_class, draws=draws, seed=seed)
    return {
        "knn": knn_accuracy(*parts, k=k),
        "few_label": few.mean,
        "few_label_std": few.std,
        "linear": linear_accuracy(*parts, seed=seed),
    }


def embed(
    checkpoint: str | Path,
    data: str | Path,
    output: str | Path,
    *,
    split: Literal["train", "test"] | None = None,
    limit: int | None = None,
    pool: Literal["mean", "cls"] | None = None,
    batch_size: int = 256,
    workers: int | None = None,
    device: str = "auto",
    progress: bool = False,
) -> Features:
    """Write names and features of images to a file.

    Args:
        checkpoint: a run folder, a checkpoint, or an encoder.safetensors.
        data: a folder, tar shards or `digits`; no labels are needed.
        output: `.npz` with arrays `names` [n] and `features` [n, D] float32, or `.parquet` with columns `name` and
            `feature`.
        split: the `train` or the `test` part; unset = all images below a folder, the training part of anything else.
        limit: use at most so many images.
        pool: `mean` of the patch tokens or `cls`; unset = the encoder's own.
        batch_size: images encoded at a time.
        workers: processes that decode images; unset = chosen from the number of cores.
        device: `cpu`, `cuda` or `auto`.
        progress: show a bar on stderr.

    Returns:
        The features that were written; their `failures` name the files that could not be decoded.
    """
    output = Path(output)
    if output.suffix not in _WRITERS:
        raise ValueError(f"output: got {str(output)!r}; allowed: a file that ends in {' or '.join(_WRITERS)}")
    encoder = load_encoder(checkpoint)
    workers = default_workers() if workers is None else workers
    whole = split is None and Path(data).is_dir() and not find_shards(data)
    source = FolderSource(data, limit) if whole else open_source(data, split=split or "train", limit=limit)
    features = extract_features(
        encoder,
        source,
        pool=pool,
        batch_size=batch_size,
        workers=workers,
        device=_device(device),
        progress=progress,
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    _WRITERS[output.suffix](output, features)
    return features


def format_table(result: dict[str, Any]) -> str:
    """The rows of an evaluation as aligned text, in per cent."""
    head = ["", f"{result['k']}-NN", f"{result['per_class']} labels a class", "linear"]
    lines = [head]
    for row in result["rows"]:
        name = row["name"] + (f" ({row['pool']} pooling)" if row["pool"] else "")
        few = f"{100 * row['few_label']:.1f} ± {100 * row['few_label_std']:.1f}"
        lines.append([name, f"{100 * row['knn']:.1f}", few, f"{100 * row['linear']:.1f}"])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        line[0].ljust(widths[0]) + "".join("  " + cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))
        for line in lines
    )


def labelled_parts(
    features: Callable[[Source], Features], train: Source, test: Source | None, seed: int
) -> tuple[Features, Features]:
    """Features of the training and the test part; without a test part, a seeded fifth of the training part is it."""
    bank = features(train)
    if test is not None:
        return bank, features(test)
    order = torch.randperm(len(bank), generator=torch.Generator().manual_seed(seed))
    held = len(bank) // HELD_OUT
    if held == 0:
        raise ValueError(f"data: got {len(bank)} images and no test part; allowed: at least {HELD_OUT}")
    kept = bank.take(order[held:].sort().values)
    kept.failures.extend(bank.failures)
    return kept, bank.take(order[:held].sort().values)


def _labelled(source: Source, data: str | Path) -> Source:
    if source.labels is None:
        raise ValueError(
            f"data: got {str(data)!r}, whose images have no labels; allowed: a folder with one sub-folder per class, "
            "or tar shards with .cls records"
        )
    return source


def _check_neighbours(k: int, images: int, *, held_out: bool) -> None:
    bank = images - images // HELD_OUT if held_out else images
    if not 1 <= k <= bank:
        raise ValueError(f"k: got {k}; allowed: 1 to {bank}, the images of the bank")


def _open_test(data: str | Path, limit: int | None) -> Source | None:
    if limit is not None and limit < 1:
        raise ValueError(f"test_limit: got {limit}; allowed: whole numbers from 1")
    try:
        test = open_source(data, split="test", limit=limit)
    except MissingSplit:
        return None
    return _labelled(test, data)


def untrained_encoder(encoder: Encoder, seed: int) -> Encoder:
    """An encoder of the same shape with fresh weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Encoder(encoder.name, encoder.arguments, mean=encoder.mean, std=encoder.std, pool=encoder.pool)


def _device(device: str) -> str:
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def _note(data: str | Path, bank: int, queries: int, *, held_out: bool, per_class: int, draws: int) -> str:
    origin = "a seeded fifth of the images, held out from bank and probes" if held_out else "read once"
    note = (
        f"{data}: bank and probes from {bank:,} training images, accuracy on {queries:,} test images ({origin}). "
        f"{per_class} labels a class: mean ± standard deviation of {draws} draws."
    )
    if str(data) == "digits":
        note += (
            " Digits of 8 × 8 pixels are so simple that raw pixels are nearly perfect: they show that training works, "
            "and photographs show what it is worth."
        )
    return note


def _write_npz(path: Path, features: Features) -> None:
    np.savez(path, names=np.array(features.names), features=features.x.numpy())


def _write_parquet(path: Path, features: Features) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    values = pa.FixedSizeListArray.from_arrays(pa.array(features.x.numpy().ravel()), features.x.shape[1])
    parquet.write_table(pa.table({"name": features.names, "feature": values}), path)


_WRITERS = {".npz": _write_npz, ".parquet": _write_parquet}
