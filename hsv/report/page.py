"""The report as one HTML file that asks for nothing outside itself: pictures, charts, style and script are inline."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib import resources
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from hsv.report.charts import COLOURS, Series, figure

__all__ = ["Neighbour", "Query", "Reconstruction", "Report", "render"]


LOGARITHMIC = {"gradient", "gradient_norm"}


class Reconstruction(NamedTuple):
    """Three uint8 pictures [H, W, C] of one size."""

    image: np.ndarray
    seen: np.ndarray
    reconstructed: np.ndarray


class Neighbour(NamedTuple):
    image: np.ndarray  # uint8 [H, W, C]
    similarity: float  # cosine
    label: str | None


class Query(NamedTuple):
    image: np.ndarray  # uint8 [H, W, C]
    label: str | None
    neighbours: list[Neighbour]


@dataclass
class Report:
    """What the page shows; a part that is empty is left out.

    facts: (name, value) tiles under the title. curves: group → series name → points. evaluation: the dict that
    `hsv.evaluate.evaluate` returns. warnings: sentences that stand before everything else. reconstructions: objective
    → pictures and a note. failures: (file, reason).
    """

    title: str
    subtitle: str = ""
    facts: Sequence[tuple[str, str]] = ()
    curves: Mapping[str, Mapping[str, Series]] = field(default_factory=dict)
    evaluation: Mapping[str, Any] | None = None
    warnings: Sequence[str] = ()
    reconstructions: dict[str, tuple[Sequence[Reconstruction], str]] = field(default_factory=dict)
    queries: Sequence[Query] = ()
    failures: Sequence[tuple[str, str]] = ()
    config: str = ""
    footer: str = ""


def render(report: Report) -> str:
    """The whole HTML document."""
    style, script = (
        resources.files("hsv.report").joinpath(name).read_text("utf-8") for name in ("style.css", "script.js")
    )
    charts = "".join(_charts(group, series) for group, series in report.curves.items())
    warnings = "".join(f"<p class='warning' role='alert'>{escape(text)}</p>" for text in report.warnings)
    sections = [
        _section("Accuracy", _accuracy(report.evaluation) if report.evaluation else ""),
        _section("Training", f"<div class='charts'>{charts}</div>" if charts else ""),
        *(
            _section(f"Reconstruction, {escape(name)}", _reconstructions(items, note))
            for name, (items, note) in report.reconstructions.items()
        ),
        _section("Nearest neighbours", _queries(report.queries)),
        _section("Files left out", _failures(report.failures)),
        _section("Configuration", f"<pre>{escape(report.config)}</pre>" if report.config else "", folded=True),
    ]
    facts = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in report.facts)
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        "<meta name='color-scheme' content='light dark'><link rel='icon' href='data:,'>"
        f"<title>{escape(report.title)}</title><style>{style}</style></head><body><main>"
        f"<header><h1>{escape(report.title)}</h1><p>{escape(report.subtitle)}</p></header>"
        + warnings
        + (f"<dl class='facts'>{facts}</dl>" if facts else "")
        + "".join(sections)
        + f"<footer>{escape(report.footer)}</footer></main><script>{script}</script></body></html>\n"
    )


def _charts(group: str, series: Mapping[str, Series]) -> str:
    """Charts of a group of curves, none with more of them than there are colours; many cosines are one table."""
    if group == "gradient_cosine" and len(series) > COLOURS:
        return _cosines(series)
    title, names = group.replace("_", " "), list(series)
    parts = [names[start : start + COLOURS] for start in range(0, len(names), COLOURS)]
    return "".join(figure(title, {name: series[name] for name in part}, log=group in LOGARITHMIC) for part in parts)


def _cosines(series: Mapping[str, Series]) -> str:
    """The last cosine between each pair of objectives, `a·b`, as a triangle."""
    last = {tuple(pair.split("·")): points[-1][1] for pair, points in series.items()}
    names = list(dict.fromkeys(name for pair in last for name in pair))
    rows = []
    for i, row in enumerate(names):
        cells = [last.get((column, row)) for column in names[:i]]
        shown = "".join(f"<td>{'–' if value is None else format(value, '+.2f')}</td>" for value in cells)
        rows.append(f"<tr><th scope='row'>{escape(row)}</th>{shown}</tr>")
    heads = "".join(f"<th scope='col'>{escape(name)}</th>" for name in names[:-1])
    return (
        "<figure class='chart'><figcaption>gradient cosine, last measured</figcaption><div class='scroll'>"
        f"<table class='cosines'><thead><tr><th></th>{heads}</tr></thead><tbody>{''.join(rows[1:])}</tbody></table>"
        "</div></figure>"
    )


def _section(title: str, body: str, *, folded: bool = False) -> str:
    if not body:
        return ""
    if folded:
        return f"<section><details><summary><h2>{title}</h2></summary>{body}</details></section>"
    return f"<section><h2>{title}</h2>{body}</section>"


def _accuracy(evaluation: Mapping[str, Any]) -> str:
    columns = [
        ("knn", f"{evaluation['k']}-NN"),
        ("few_label", f"{evaluation['per_class']} labels a class"),
        ("linear", "linear, all labels"),
    ]
    columns = [(key, head) for key, head in columns if any(row.get(key) is not None for row in evaluation["rows"])]
    body = []
    for row in evaluation["rows"]:
        pool = f" <small>{escape(row['pool'])} pooling</small>" if row.get("pool") else ""
        cells = "".join(_bar(row.get(key), row.get(f"{key}_std")) for key, _ in columns)
        body.append(f"<tr><th scope='row'>{escape(row['name'])}{pool}</th>{cells}</tr>")
    heads = "".join(f"<th scope='col'>{escape(head)}</th>" for _, head in columns)
    return (
        f"<div class='scroll'><table><thead><tr><th></th>{heads}</tr></thead><tbody>{''.join(body)}</tbody></table>"
        f"</div><p class='note'>{escape(evaluation.get('note', ''))}</p>"
    )


def _bar(value: float | None, std: float | None) -> str:
    if value is None:
        return "<td>–</td>"
    spread = f" <small>± {100 * std:.1f}</small>" if std is not None else ""
    return f"<td><span class='bar' style='--v:{100 * value:.1f}%'></span>{100 * value:.1f}&nbsp;%{spread}</td>"


def _reconstructions(items: Sequence[Reconstruction], note: str) -> str:
    if not items:
        return ""
    triples = "".join(
        "<div class='triple'>" + "".join(_picture(p, n) for p, n in zip(item, item._fields, strict=True)) + "</div>"
        for item in items
    )
    return (
        f"<div class='triples'>{triples}</div><p class='note'>From left to right: the image, what the encoder "
        f"saw of it, and what the objective made of that. {escape(note)}</p>"
    )


def _queries(queries: Sequence[Query]) -> str:
    if not queries:
        return ""
    rows = []
    for query in queries:
        cells = []
        for near in query.neighbours:
            kind = "" if query.label is None else " same" if near.label == query.label else " other"
            label = f"<b>{escape(near.label)}</b> " if near.label is not None else ""
            caption = f"{label}{near.similarity:.2f}"
            alt = f"neighbour {near.label or ''}"
            cells.append(
                f"<figure class='near{kind}'>{_picture(near.image, alt)}<figcaption>{caption}</figcaption></figure>"
            )
        caption = f"<b>{escape(query.label)}</b>" if query.label is not None else "image"
        rows.append(
            f"<div class='query'><figure>{_picture(query.image, 'query')}<figcaption>{caption}</figcaption></figure>"
            f"<div class='nears'>{''.join(cells)}</div></div>"
        )
    labelled = any(query.label is not None for query in queries)
    marks = " Underlined in green: the same class; dashed in red: another." if labelled else ""
    return (
        f"<div class='queries'>{''.join(rows)}</div><p class='note'>Left: an image. Right: the images most similar to "
        f"it, with the cosine of their features.{marks}</p>"
    )


def _failures(failures: Sequence[tuple[str, str]], most: int = 200) -> str:
    if not failures:
        return ""
    rows = "".join(f"<tr><td>{escape(n)}</td><td>{escape(reason)}</td></tr>" for n, reason in failures[:most])
    more = f"<p class='note'>and {len(failures) - most:,} more</p>" if len(failures) > most else ""
    count = f"<p>{len(failures):,} could not be decoded.</p>"
    return f"{count}<div class='scroll'><table class='failures'><tbody>{rows}</tbody></table></div>{more}"


def _picture(pixels: np.ndarray, alt: str) -> str:
    """An <img> with its PNG inside; pictures of few pixels are enlarged without smoothing."""
    pixels = np.asarray(pixels)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in (1, 3):
        raise ValueError(f"pixels: got {pixels.dtype} {list(pixels.shape)}; allowed: uint8 [H, W, 1 or 3]")
    buffer = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    crisp = " class='crisp'" if max(pixels.shape[:2]) <= 64 else ""
    return f"<img{crisp} src='data:image/png;base64,{data}' alt='{escape(alt, quote=True)}'>"
