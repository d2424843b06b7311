"""What a run writes down while it trains: scalar logs and measures of collapse."""

from hsv.monitor.collapse import effective_rank, feature_spread
from hsv.monitor.metrics import MetricLog, read_metrics

__all__ = ["MetricLog", "effective_rank", "feature_spread", "read_metrics"]
