"""What keeps a long run honest: stop requests, hang detection, timeouts, bad losses."""

from training.health.loss_guard import LossGuard, Verdict
from training.health.monitor import Monitor
from training.health.preemption import StopRequest
from training.health.timeouts import set_timeout
from training.health.watchdog import Watchdog

__all__ = [
    "LossGuard",
    "Monitor",
    "StopRequest",
    "Verdict",
    "Watchdog",
    "set_timeout",
]
