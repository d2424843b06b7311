"""Progress in a file: whole lines, seldom, and nothing when it is over."""

import io
import time

import pytest

from hsv import bar


@pytest.mark.parametrize("options", [{}, {"leave": False}])
def test_where_there_is_no_terminal_lines_are_few_and_whole(monkeypatch: pytest.MonkeyPatch, options: dict) -> None:
    err = io.StringIO()
    monkeypatch.setattr("sys.stderr", err)
    monkeypatch.setattr(bar, "LINE_SECONDS", 0.1)
    begun = time.monotonic()
    with bar.progress_bar(total=50, unit=" images", **options) as shown:
        for _ in range(50):
            time.sleep(0.01)
            shown.update(1)
            shown.set_postfix_str("loss 1.000", refresh=False)
    text, most = err.getvalue(), (time.monotonic() - begun) / 0.1
    lines = text.splitlines()
    assert 1 <= len(lines) <= most and text.endswith("\n") and "\r" not in text
    assert all("/50 [" in line and "loss 1.000" in line for line in lines)


def test_what_is_over_soon_leaves_no_line(monkeypatch: pytest.MonkeyPatch) -> None:
    err = io.StringIO()
    monkeypatch.setattr("sys.stderr", err)
    with bar.progress_bar(total=2) as shown:
        shown.update(2)
    assert not err.getvalue()
