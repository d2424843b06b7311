"""One HTML page that shows a run."""

from hsv.report.page import Report, render
from hsv.report.write import write_report

__all__ = ["Report", "render", "write_report"]
