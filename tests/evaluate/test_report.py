import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Never

import numpy as np
import pytest

from hsv.evaluate import evaluate
from hsv.report import Report, render, write_report
from hsv.report.charts import Series, figure, number
from hsv.report.page import Neighbour, Query, Reconstruction

VOID = {"meta", "link", "img", "line", "polyline", "polygon", "circle", "i"}


class Balance(HTMLParser):
    """Every tag is closed, and nothing points outside the page."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        for name, value in attrs:
            assert name not in ("src", "href") or value.startswith("data:")
        if tag not in VOID - {"i"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check(page: str) -> list[str]:
    parser = Balance()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    assert "http" not in re.sub(r"<pre>.*?</pre>", "", page, flags=re.S)
    return parser.seen


def test_a_run_becomes_one_page_that_asks_for_nothing(run_dir: Path) -> None:
    evaluate(run_dir, "digits", limit=100, draws=1)
    (run_dir / "failures.jsonl").write_text('{"name": "a&b.jpg", "reason": "truncated <x>"}\n')
    path = write_report(run_dir)
    page = path.read_text()
    seen = check(page)
    assert path == run_dir / "report.html"
    assert "small &lt;run&gt;" in page and "a&amp;b.jpg" in page and "truncated &lt;x&gt;" in page
    for title in ("Accuracy", "Training", "Reconstruction", "Nearest neighbours", "Files left out", "Config"):
        assert f"<h2>{title}" in page
    assert seen.count("img") == 8 * 3 + 6 * 6
    assert seen.count("svg") >= 4


def test_missing_data_leaves_the_pictures_out_and_says_so(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object, **__: object) -> Never:
        raise ValueError("data: the disk is elsewhere")

    monkeypatch.setattr("hsv.report.write.open_source", gone)
    page = write_report(run_dir, output=tmp_path / "r.html").read_text()
    check(page)
    assert "pictures left out: data: the disk is elsewhere" in page and "<img" not in page


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="checkpoint"):
        write_report(tmp_path)


def test_an_empty_report_is_a_page_and_everything_is_escaped() -> None:
    check(render(Report("t")))
    pixels = np.zeros((8, 8, 1), np.uint8)
    query = Query(pixels, "<q>", [Neighbour(pixels, 0.5, "<n>")])
    report = Report("<t>", "<s>", [("<f>", "<v>")], {"<g>": {"<name>": [(1, 1.0), (2, 2.0)]}}, queries=[query])
    report.reconstructions = {"<mae>": ([Reconstruction(pixels, pixels, pixels)], "<note>")}
    report.warnings, report.config = ["<w>"], "</pre><script>"
    page = render(report)
    check(page)
    for text in ("<mae>", "<note>", "<w>", "<q>", "<n>", "<t>", "<s>", "<f>", "<v>", "<g>", "<name>", "</pre><script>"):
        assert text not in page
    report.queries = [Query(pixels.astype(float), None, [])]
    with pytest.raises(ValueError, match="pixels: got float64"):
        render(report)


@pytest.mark.parametrize(
    "points",
    [
        [(1, 0.5)],
        [(1, 3.0), (2, 3.0)],
        [(s, math.nan if s == 3 else None if s == 4 else 1 / s) for s in range(1, 9)],
        [(s, -5.0 + s) for s in range(1000)],
        [(s, 0.0) for s in range(5)],
        [(10**6 + s, 1e-9 * s) for s in range(5)],
    ],
)
@pytest.mark.parametrize("log", [False, True])
def test_charts_stay_inside_their_frame(points: Series, log: bool) -> None:
    svg = figure("loss", {"a": points, "b": points[:1]}, log=log)
    check(svg)
    assert "nan" not in svg and "inf" not in svg
    for pair in " ".join(re.findall(r" points='([^']*)'", svg)).split():
        x, y = map(float, pair.split(","))
        assert 0 <= x <= 420 and 0 <= y <= 240


def test_a_chart_puts_values_where_they_belong() -> None:
    svg = figure("loss", {"a": [(0, 0.0), (5, 10.0), (10, 0.0)]})
    line = [tuple(map(float, p.split(","))) for p in re.search(r"polyline[^>]* points='([^']*)'", svg)[1].split()]
    assert line[1][0] == pytest.approx((line[0][0] + line[2][0]) / 2)
    assert line[1][1] < line[0][1] == line[2][1]
    assert figure("empty", {"a": [(1, None), (2, math.nan)]}) == ""


@pytest.mark.parametrize(
    "value, text",
    [(0, "0"), (1, "1"), (0.001, "0.001"), (0.0005, "0.0005"), (123.456, "123"), (2000.4, "2000"), (1.5e-8, "1.5e-8"),
     (-0.25, "-0.25"), (99999, "99999"), (3e7, "3e7"), (10, "10")],
)  # fmt: skip
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text


def test_many_objectives_stay_readable() -> None:
    """No chart has more curves than there are colours, and the cosines of many pairs are one table."""
    names = [f"o{i}" for i in range(8)]
    losses = {name: [(1, 1.0), (2, 0.5)] for name in names}
    cosines = {f"{a}·{b}": [(1, 0.25)] for j, b in enumerate(names) for a in names[:j]}
    page = render(Report("t", curves={"loss": losses, "gradient_cosine": cosines}))
    check(page)
    assert page.count("<figcaption>loss ") == 2 and page.count("<td>+0.25</td>") == 28
    few = render(Report("t", curves={"gradient_cosine": dict(list(cosines.items())[:3])}))
    assert "<td>+0.25" not in few and few.count("<figcaption>gradient cosine ") == 1
