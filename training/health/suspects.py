"""Which rank keeps the others waiting, read off what every rank last reported."""

import sys
import threading
from types import FrameType
from typing import Any

from training.zero3 import PACKAGE

_MOST_NAMED = 4
# A main thread whose innermost Python frame is here waits for other ranks, most likely.
_COLLECTIVES = ("/torch/distributed/", f"/{PACKAGE}/", "/training/distributed.py")
_LIBRARIES = ("/site-packages/", "/lib/python", "<")
WAITING = "waiting for other ranks "
_WRAPPERS = ("wrapped_fn", "wrapper", "decorate_context")


def main_thread_place() -> str:
    """Where the main thread is, as `in loader.py:120 steps`; says if it waits for other ranks."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return "unknown"
    while frame.f_back and frame.f_code.co_name in _WRAPPERS:
        frame = frame.f_back
    waiting = any(part in frame.f_code.co_filename for part in _COLLECTIVES)
    own: FrameType | None = frame
    while own and any(part in own.f_code.co_filename for part in _LIBRARIES):
        own = own.f_back
    text = _name(frame)
    if own is not None and own is not frame:
        text += f", called from {_name(own)}"
    return f"{WAITING if waiting else ''}in {text}"


def _name(frame: FrameType) -> str:
    file = frame.f_code.co_filename.rsplit("/", 1)[-1]
    return f"{file}:{frame.f_lineno} {frame.f_code.co_name}"


def describe(
    reports: dict[int, dict[str, Any]], world_size: int, now: float, silent_after_s: float
) -> str:
    """Name the ranks that the others most likely wait for.

    In this order: ranks that left no report; ranks that stopped reporting (the process is stopped
    or gone, or its node); ranks in no collective while others wait in one; ranks furthest behind.

    Args:
        reports: by rank, `Watchdog.status` as last written.
        world_size: ranks there should be.
        now: this host's time; hosts' clocks agree within `silent_after_s`.
        silent_after_s: age from which a report counts as a sign of no life.
    """
    missing = [rank for rank in range(world_size) if rank not in reports]
    if missing:
        return f"No sign of life from {_some(f'rank {rank}' for rank in missing)}"
    rows = list(reports.values())
    silent = [row for row in rows if now - row["alive"] > silent_after_s]
    if silent:
        names = (f"{_who(row)}, silent for {now - row['alive']:.0f} s" for row in silent)
        return f"No longer alive: {_some(names)}"
    busy = [row for row in rows if not row["place"].startswith(WAITING)]
    if busy and len(busy) < len(rows):
        return f"The others wait for {_some(map(_who, busy))}"
    behind = min(row["step"] for row in rows)
    late = sorted((row for row in rows if row["step"] == behind), key=lambda row: row["time"])
    if behind < max(row["step"] for row in rows):
        return f"Furthest behind: {_some(map(_who, late))}"
    return f"All ranks are in step {behind}; longest without progress: {_who(late[0])}"


def _who(row: dict[str, Any]) -> str:
    return (
        f"rank {row['rank']} on {row['host']} (process {row['pid']}), last seen in step "
        f"{row['step']} ({row['phase']}), {row['place']}"
    )


def _some(names: Any) -> str:
    """The first few of many."""
    names = list(names)
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return "; ".join(names[:_MOST_NAMED]) + more
