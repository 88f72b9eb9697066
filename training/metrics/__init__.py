"""What a run says of its steps: measured, written down, drawn."""

from training.metrics.metrics_log import MetricsLog, read_evaluations, read_metrics, step_line
from training.metrics.step_meter import StepMeter, weight_sum

__all__ = [
    "MetricsLog",
    "StepMeter",
    "read_evaluations",
    "read_metrics",
    "step_line",
    "weight_sum",
]
