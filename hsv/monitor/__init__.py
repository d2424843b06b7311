"""What a run writes down while it trains: scalar logs and measures of collapse."""

from hsv.monitor.collapse import collapse_verdict, effective_rank, feature_spread, verdicts
from hsv.monitor.metrics import MetricLog, read_metrics

__all__ = ["MetricLog", "collapse_verdict", "effective_rank", "feature_spread", "read_metrics", "verdicts"]
