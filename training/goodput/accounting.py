"""What goodput.jsonl adds up to: seconds per part over all restarts, and how often to save."""

import math
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from data_pipeline.errors import InputError
from data_pipeline.text_table import text_table
from training.goodput.recorder import EVENTS, LIVE, PHASES, read_events

# Of these, `lost` is taken out of `steps`; `restart` lies between two processes.
PARTS = ("steps", "data_wait", "checkpoint_stall", "evaluation", "startup", "restart", "lost")
ALL_PARTS = (*PARTS, "other")
PLANNED = ("finished", "preempted")  # ends that are no failures
KILLED, RUNNING = "killed", "not ended"


@dataclass
class Process:
    """One start of the trainer.

    seconds: per part, adding up to the time from the end of the process before to its own.
    first_step, last_step: it did the steps after the first, up to the last.
    reason: how it ended.
    """

    start: float
    reason: str
    seconds: dict[str, float]
    first_step: int = 0
    last_step: int = 0
    stalls: int = 0
    ready: bool = False
    marks: list[tuple[int, float]] = field(default_factory=list)

    @property
    def wall_s(self) -> float:
        return sum(self.seconds.values())


@dataclass(frozen=True)
class Interval:
    """The checkpoint interval of Young and Daly, sqrt(2 C M) - C, and what it came from."""

    seconds: float
    steps: int
    stall_s: float
    mtbf_s: float
    mtbf_measured: bool


@dataclass
class Summary:
    """A run over all its processes; the seconds add up to its wall time."""

    processes: list[Process]
    seconds: dict[str, float]
    interval: Interval | None = None

    @property
    def wall_s(self) -> float:
        return sum(self.seconds.values())

    @property
    def goodput(self) -> float:
        """Share of the wall time in steps that count."""
        return self.seconds["steps"] / self.wall_s if self.wall_s else 0.0

    @property
    def failures(self) -> int:
        return sum(p.reason not in (*PLANNED, RUNNING) for p in self.processes)

    @property
    def stalls(self) -> int:
        return sum(process.stalls for process in self.processes)

    @property
    def stall_s(self) -> float:
        """Mean seconds that a save held training up; NaN before the first."""
        return self.seconds["checkpoint_stall"] / self.stalls if self.stalls else math.nan

    @property
    def step_s(self) -> float:
        """Mean seconds of a step with its wait for data, repeated steps included."""
        steps = sum(p.last_step - p.first_step for p in self.processes if p.ready)
        spent = sum(self.seconds[part] for part in ("steps", "lost", "data_wait"))
        return spent / steps if steps else math.nan

    def to_json(self) -> dict[str, Any]:
        return {
            "wall_s": self.wall_s,
            "goodput": self.goodput,
            "seconds": self.seconds,
            "failures": self.failures,
            "stall_s": self.stall_s if self.stalls else None,
            "step_s": self.step_s if math.isfinite(self.step_s) else None,
            "interval": vars(self.interval) if self.interval else None,
            "processes": [
                {key: value for key, value in vars(process).items() if key != "marks"}
                for process in self.processes
            ],
        }


def summarize(run: Path, mtbf_s: float | None = None) -> Summary:
    """Add up a run's record.

    Args:
        run: the output_dir.
        mtbf_s: mean seconds between failures; None: as the run itself had them.

    Raises:
        InputError: there is no record.
    """
    events = read_events(run / EVENTS)
    if not events:
        raise InputError(
            f"{run / EVENTS} holds no record; give the output_dir of a run that training.train made"
        )
    live = read_events(run / LIVE)
    # A live record that is older was taken over already.
    if live and events[-1]["event"] != "end" and live[-1]["time"] > events[-1]["time"]:
        events.append(live[-1])
    processes = _processes(events)
    _count_lost(processes)
    seconds = {part: sum(p.seconds[part] for p in processes) for part in ALL_PARTS}
    summary = Summary(processes, seconds)
    summary.interval = _interval(summary, mtbf_s)
    return summary


def _processes(events: list[dict[str, Any]]) -> list[Process]:
    processes: list[Process] = []
    ended = 0.0
    for event in events:
        if event["event"] == "start":
            restart = max(0.0, event["start"] - ended) if processes else 0.0
            seconds = dict.fromkeys(ALL_PARTS, 0.0) | {"restart": restart}
            processes.append(Process(event["start"], KILLED, seconds))
        if not processes:
            continue
        process = processes[-1]
        process.seconds |= {phase: event["seconds"][phase] for phase in PHASES}
        process.first_step, process.last_step = event["first_step"], event["step"]
        process.stalls = event["stalls"]
        process.ready |= event["event"] == "ready"
        process.marks.append((event["step"], event["seconds"]["steps"]))
        process.reason = event.get("reason", KILLED)
        ended = event["time"]
    if processes and events[-1]["event"] != "end":
        processes[-1].reason = RUNNING  # or killed, which its next start will tell
    return processes


def _count_lost(processes: list[Process]) -> None:
    """Move the time of steps that a later process did again from `steps` to `lost`."""
    kept = math.inf
    for process in reversed(processes):
        if not process.ready:
            continue
        if process.last_step >= kept:
            lost = process.seconds["steps"] - _seconds_at(process.marks, kept)
            process.seconds["lost"] = lost
            process.seconds["steps"] -= lost
        kept = min(kept, process.first_step)


def _seconds_at(marks: list[tuple[int, float]], step: float) -> float:
    """Seconds in steps when `step` was done, between the two nearest records."""
    before = max((m for m in marks if m[0] <= step), key=lambda m: (m[0], -m[1]))
    after = min((m for m in marks if m[0] > step), default=before)
    share = (step - before[0]) / (after[0] - before[0]) if after[0] > before[0] else 0.0
    return before[1] + share * (after[1] - before[1])


def _interval(summary: Summary, mtbf_s: float | None) -> Interval | None:
    measured = mtbf_s is None
    if mtbf_s is None and summary.failures:
        mtbf_s = summary.wall_s / summary.failures
    if mtbf_s is None or not summary.stalls or not math.isfinite(summary.step_s):
        return None
    stall = summary.stall_s
    seconds = max(math.sqrt(2 * stall * mtbf_s) - stall, stall)
    return Interval(seconds, max(1, round(seconds / summary.step_s)), stall, mtbf_s, measured)


def table(summary: Summary) -> str:
    """The run as text: a row per process and one for all, then the interval."""
    columns = [part for part in ALL_PARTS if summary.seconds[part] >= 0.05 or part == "steps"]
    header = ["start", "did steps", *(part.replace("_", " ") for part in columns), "wall", "ended"]
    rows = [header]
    for process in summary.processes:
        began = datetime.fromtimestamp(process.start).isoformat(" ", "seconds")
        steps = f"{process.first_step + 1}-{process.last_step}"
        if process.last_step == process.first_step:
            steps = "none"
        cells = (duration(process.seconds[part]) for part in columns)
        rows.append([began, steps, *cells, duration(process.wall_s), process.reason])
    cells = (duration(summary.seconds[part]) for part in columns)
    rows.append(["all", "", *cells, duration(summary.wall_s), ""])
    shares = (summary.seconds[part] / (summary.wall_s or 1) for part in columns)
    rows.append(["share", "", *(f"{share:.1%}" for share in shares), "", ""])
    return "\n".join([text_table(rows, left=(len(header) - 1,)), "", *_conclusions(summary)])


def _conclusions(summary: Summary) -> list[str]:
    lines = [
        f"goodput {summary.goodput:.1%}: steps that count, of the wall time; measured on rank 0, "
        "where waiting for another rank's data is part of the step"
    ]
    interval = summary.interval
    if interval:
        source = "measured" if interval.mtbf_measured else "given"
        lines.append(
            f"checkpoint interval of Young and Daly: {duration(interval.seconds)} = "
            f"{interval.steps} steps, from a stall of {interval.stall_s:.3g} s per save (measured, "
            f"{summary.stalls} saves), {summary.step_s:.3g} s per step (measured) and a failure "
            f"every {duration(interval.mtbf_s)} ({source})"
        )
    else:
        missing = [
            *(["a checkpoint"] if not summary.stalls else []),
            *(["a step"] if not math.isfinite(summary.step_s) else []),
            *(["a failure (or --mtbf-hours)"] if not summary.failures else []),
        ]
        lines.append(f"no checkpoint interval: the run had not yet {' or '.join(missing)}")
    return lines


def duration(seconds: float) -> str:
    """As 12.3 s, 4 min 05 s or 3 h 20 min."""
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 100:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
