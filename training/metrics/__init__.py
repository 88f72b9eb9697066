"""What a run says of its steps: measured, written down, drawn."""

from training.metrics.loggers import Loggers, check_loggers
from training.metrics.metrics_log import MetricsLog, read_evaluations, read_metrics, step_line
from training.metrics.step_meter import StepMeter, weight_sum

__all__ = [
    "Loggers",
    "MetricsLog",
    "StepMeter",
    "check_loggers",
    "read_evaluations",
    "read_metrics",
    "step_line",
    "weight_sum",
]
