"""From a run folder to its page: reads what the run wrote, and asks its model for pictures."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
import yaml
from torch import Tensor

import hsv
from hsv.checkpoint import find_checkpoint
from hsv.config import Config
from hsv.data import MissingSplit, Source, normalise, open_source, plain_batches
from hsv.evaluate.features import extract_features
from hsv.evaluate.knn import nearest_neighbours
from hsv.evaluate.saved import read_evaluation
from hsv.evaluate.subset import Subset
from hsv.export import load_model
from hsv.monitor import read_metrics, verdicts
from hsv.objectives import Hybrid, PixelObjective
from hsv.report.charts import Series
from hsv.report.page import Neighbour, Query, Reconstruction, Report, render

__all__ = ["write_report"]

RECONSTRUCTIONS, QUERIES, NEIGHBOURS = 8, 6, 5
NORM_PIX_NOTE = "Predicted patches are normalised: brightness and contrast of each are taken from the image."
BANK = 2000  # images among which neighbours are looked for


def write_report(run_dir: str | Path, *, output: str | Path | None = None, seed: int = 0) -> Path:
    """Write the page of a run: curves, accuracies if it was evaluated, reconstructions, neighbours, configuration.

    Pictures come from the test part of the run's data, or from its training part if there is no other; they are left
    out, with the reason, when the data is not there any more.

    Args:
        run_dir: folder of a run with at least one checkpoint.
        output: the HTML file; None = report.html in the run folder.
        seed: chooses the pictures and the masks.

    Returns:
        The path of the page.

    Raises:
        ValueError: no checkpoint in the folder.
    """
    run_dir = Path(run_dir)
    config, hybrid = load_model(run_dir)
    metrics = read_metrics(run_dir / "metrics.jsonl")
    evaluation = read_evaluation(run_dir / "evaluation.json")
    report = Report(
        title=run_dir.resolve().name,
        subtitle=_subtitle(config, hybrid),
        facts=_facts(config, metrics, evaluation),
        curves=_curves(metrics),
        warnings=_warnings(config, hybrid, metrics),
        evaluation=evaluation,
        failures=_failures(run_dir / "failures.jsonl"),
        config=yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True),
        footer=f"hsv {hsv.__version__} · {find_checkpoint(run_dir).name}",
    )
    try:
        train = open_source(config.data, split="train", limit=config.input.limit)
        shown = _test_part(config) or train
        for name, objective in hybrid.objectives.items():
            if isinstance(objective, PixelObjective):
                note = NORM_PIX_NOTE if getattr(config, name).norm_pix else ""
                report.reconstructions[name] = _reconstructions(objective, hybrid, shown, seed), note
        report.queries = _queries(hybrid, train, shown, seed)
    except (ValueError, OSError) as error:
        report.footer += f" · pictures left out: {error}"
    path = Path(output) if output is not None else run_dir / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(report), encoding="utf-8")
    return path


def _subtitle(config: Config, hybrid: Hybrid) -> str:
    encoder, (height, width), (p, q) = hybrid.encoder, hybrid.encoder.image_size, hybrid.encoder.patch_size
    model = f"{encoder.name}, width {encoder.dim}, depth {len(encoder.vit.blocks)}, patch {p} × {q}"
    return f"{model} · {height} × {width} pixels · {' + '.join(config.objectives)} · {Path(config.data).name}"


def _facts(config: Config, metrics: list[dict], evaluation: dict | None) -> list[tuple[str, str]]:
    facts = []
    if evaluation:
        rows = {row["name"]: row["knn"] for row in evaluation["rows"]}
        trained, untrained = rows["trained encoder"], rows.get("untrained encoder")
        facts.append((f"{evaluation['k']}-NN accuracy", f"{100 * trained:.1f} %"))
        if untrained is not None:
            facts.append(("points above untrained", f"{100 * (trained - untrained):+.1f}"))
    if metrics:
        last = metrics[-1]
        facts.append(("images seen", f"{last['step'] * config.run.batch_size:,}"))
        if last.get("images_per_second"):
            facts.append(("images a second", f"{last['images_per_second']:,.0f}"))
    return facts


def _curves(metrics: list[dict]) -> dict[str, dict[str, Series]]:
    """group → name → points; losses first, the others in the order in which they were logged."""
    curves: dict[str, dict[str, list]] = {"loss": {}}
    for row in metrics:
        for key, value in row.items():
            if key != "step":
                group, _, name = key.partition("/")
                curves.setdefault(group, {}).setdefault(name, []).append((row["step"], value))
    return curves


def _warnings(config: Config, hybrid: Hybrid, metrics: list[dict]) -> list[str]:
    """What is wrong at the end of the run, from the means of its last lines of metrics."""
    last = metrics[-max(1, len(metrics) // 10) :]
    keys = {key for row in last for key, value in row.items() if value is not None}
    means = {key: fmean(row[key] for row in last if row.get(key) is not None) for key in keys}
    return verdicts(means, hybrid.chances(config.run.batch_size // config.run.accumulate))


def _failures(path: Path) -> list[tuple[str, str]]:
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines()) if path.is_file() else ()
    return [(row["name"], row["reason"]) for row in rows]


def _test_part(config: Config) -> Source | None:
    try:
        return open_source(config.data, split="test", limit=BANK)
    except MissingSplit:
        return None


def _choose(source: Source, count: int, seed: int) -> Subset:
    order = np.random.default_rng(seed).permutation(len(source))
    return Subset(source, order[:count])


def _pixels(source: Source, hybrid: Hybrid) -> tuple[list[int], Tensor]:
    """Positions and uint8 images [n, C, H, W] of those that can be decoded."""
    encoder = hybrid.encoder
    batches = plain_batches(source, image_size=encoder.image_size, channels=encoder.channels, batch_size=64)
    indices, images = zip(*((index, pixels) for index, pixels, _ in batches if len(index)), strict=True)
    return torch.cat(indices).tolist(), torch.cat(images)


def _picture(image: Tensor) -> np.ndarray:
    """[C, H, W], uint8 or in [0, 1], to uint8 [H, W, C]."""
    if image.dtype != torch.uint8:
        image = (image.clamp(0, 1) * 255).round().to(torch.uint8)
    return image.permute(1, 2, 0).contiguous().numpy()


def _reconstructions(objective: PixelObjective, hybrid: Hybrid, source: Source, seed: int) -> list[Reconstruction]:
    encoder = hybrid.encoder
    _, images = _pixels(_choose(source, RECONSTRUCTIONS, seed), hybrid)
    seen, filled, mask = objective.reconstruct(encoder, normalise(images, encoder.mean, encoder.std), seed)
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (encoder.mean, encoder.std))
    (height, width), (p, q) = encoder.image_size, encoder.patch_size
    removed = mask.view(-1, 1, height // p, width // q).repeat_interleave(p, 2).repeat_interleave(q, 3)
    seen = torch.where(removed > 0, 0.5, seen * std + mean)
    triples = zip(images, seen, filled * std + mean, strict=True)
    return [Reconstruction(*map(_picture, triple)) for triple in triples]


def _queries(hybrid: Hybrid, train: Source, shown: Source, seed: int) -> list[Query]:
    bank_source = _choose(train, BANK, seed)
    bank = extract_features(hybrid.encoder, bank_source)
    query_source = _choose(shown, QUERIES, seed + 1)
    queries = extract_features(hybrid.encoder, query_source)
    near = nearest_neighbours(bank.x, queries.x, min(NEIGHBOURS + 1, len(bank)))
    shown_of = dict(zip(*_pixels(query_source, hybrid), strict=True))
    result = []
    for row, (similarity, index) in enumerate(zip(near.similarity.tolist(), near.index.tolist(), strict=True)):
        at = int(queries.indices[row])
        itself = query_source.name(at) if shown is train else None
        found = [(s, int(bank.indices[i])) for s, i in zip(similarity, index, strict=True)]
        found = [(s, i) for s, i in found if bank_source.name(i) != itself][:NEIGHBOURS]
        _, pictures = _pixels(Subset(bank_source, [i for _, i in found]), hybrid)
        neighbours = [
            Neighbour(_picture(picture), s, _label(bank_source, i))
            for picture, (s, i) in zip(pictures, found, strict=True)
        ]
        result.append(Query(_picture(shown_of[at]), _label(query_source, at), neighbours))
    return result


def _label(source: Source, index: int) -> str | None:
    if source.labels is None:
        return None
    label = int(source.labels[index])
    return source.classes[label] if source.classes else str(label)
