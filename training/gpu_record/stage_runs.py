"""Running the stages one after another, each in a process group with a time limit, and the record.

What became of a stage is on disk when it ends: done, partial (cut short by its limit or a signal;
what it wrote stays) or failed, with the reason.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from data_pipeline.errors import InputError
from data_pipeline.files import write_atomically
from data_pipeline.machine import measured_on
from training import exit_codes
from training.gpu_record.record_stages import LIMIT_S, ROOT, Places, Stage
from training.health import StopRequest
from training.record.run_record import PACKAGES

DONE, PARTIAL, FAILED = "done", "partial", "failed"
GRACE_S = 10.0  # between asking a stage to end and killing it
_POLL_S = 0.2
_TAIL = 400
_TURNS = 4  # of a stage that its limit ends, and that goes on


class GpuRecord:
    """The state file of a record: name of the stage -> what became of it."""

    def __init__(self, places: Places) -> None:
        self.places = places
        self.stages: dict[str, dict[str, Any]] = {}
        if places.state.exists():
            try:
                self.stages = json.loads(places.state.read_text(encoding="utf-8"))["stages"]
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(
                    f"{places.state} is no state of a record ({error!r}); remove it, or name "
                    "another folder with --out"
                ) from error

    def state(self, stage: Stage) -> str:
        """done, partial, failed, or "not begun"."""
        return str(self.stages.get(stage.name, {}).get("state", "not begun"))

    def note(self, stage: Stage, **found: Any) -> None:
        """Write what became of a stage, with the machine, versions and commit it ran on."""
        self.stages[stage.name] = found | measured_on((*PACKAGES, "triton"))
        write_atomically(
            self.places.state, json.dumps({"stages": self.stages}, indent=1).encode() + b"\n"
        )

    def forget(self, stage: Stage) -> None:
        """Remove what the stage wrote."""
        self.stages.pop(stage.name, None)
        for path in stage.files:
            if path.is_dir():
                shutil.rmtree(path)
            path.unlink(missing_ok=True)


def run_stages(
    stages: Iterable[Stage], record: GpuRecord, stop: StopRequest, within_s: float
) -> None:
    """Run what is not done, until all have been tried, a signal came, or the time is over."""
    deadline = time.monotonic() + within_s
    for stage in stages:
        if record.state(stage) == DONE:
            print(f"{stage.name}: done before", flush=True)
        for _ in range(_TURNS if stage.goes_on else 1):
            left = deadline - time.monotonic()
            if record.state(stage) == DONE:
                break
            if stop.requested:
                print(f"{stage.name}: not run, asked to stop")
                break
            if left < stage.expected_s:
                print(f"{stage.name}: not run, takes about {stage.expected_s} s, {left:.0f} s left")
                break
            run_stage(stage, record, stop, min(left, LIMIT_S))
            if record.state(stage) == FAILED:
                break


def run_stage(stage: Stage, record: GpuRecord, stop: StopRequest, limit_s: float) -> None:
    """Run one stage and note what became of it."""
    log = record.places.work / f"{stage.name}.log"
    for path in (log, *stage.files):
        path.parent.mkdir(parents=True, exist_ok=True)
    print(f"{stage.name}: {stage.says}; about {stage.expected_s} s on a GPU, log {log}", flush=True)
    record.note(stage, state=PARTIAL, reason="did not end: killed, or the machine went away")
    began, command = time.monotonic(), stage.command
    code = _run(command, stage, log, stop, limit_s)
    if code == exit_codes.OUT_OF_MEMORY and stage.otherwise:
        command = (*stage.command, *stage.otherwise)
        print(f"{stage.name}: out of GPU memory, again with {' '.join(stage.otherwise)}")
        code = _run(command, stage, log, stop, limit_s - (time.monotonic() - began))
    state, reason = _outcome(code, stop, limit_s, log)
    seconds = round(time.monotonic() - began, 1)
    record.note(
        stage,
        state=state,
        reason=reason,
        seconds=seconds,
        command=_as_typed(command, stage),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        files=[_shown(path) for path in stage.files if path.exists()],
    )
    print(f"{stage.name}: {state} after {seconds:.0f} s{reason and ': ' + reason}", flush=True)


def _run(
    command: tuple[str, ...], stage: Stage, log: Path, stop: StopRequest, limit_s: float
) -> int | None:
    """The exit code, or None where the stage had to be ended."""
    deadline = time.monotonic() + limit_s
    with log.open("ab") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=_environment(stage),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that what it started ends with it
        )
        try:
            while process.poll() is None and time.monotonic() < deadline and not stop.requested:
                time.sleep(_POLL_S)
            return process.poll()
        finally:
            _end(process)


def _environment(stage: Stage) -> dict[str, str]:
    """Without what would make it another measurement."""
    foreign = ("TRITON_INTERPRET", "TOKENFLEX_TILES", "PYTEST_ADDOPTS")
    return {k: v for k, v in os.environ.items() if k not in foreign} | stage.environment


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Ask the process group to end, then kill it."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def _outcome(code: int | None, stop: StopRequest, limit_s: float, log: Path) -> tuple[str, str]:
    if code == 0:
        return DONE, ""
    if code is None:
        cause = stop.reason if stop.requested else f"its limit of {limit_s:.0f} s"
        return (
            PARTIAL,
            f"ended by {cause}; what it wrote stays, and the same command goes on with it",
        )
    text = log.read_text(encoding="utf-8", errors="replace").strip()[-_TAIL:]
    return FAILED, f"exit code {code}; the end of {_shown(log)}: {text}"


def _as_typed(command: tuple[str, ...], stage: Stage) -> str:
    """The command as a person would type it in the root."""
    words = ["python" if word == sys.executable else _shown(word) for word in command]
    settings = [f"{key}={_shown(value)}" for key, value in stage.environment.items()]
    return " ".join([*settings, shlex.join(words)])


def _shown(path: Path | str) -> str:
    return str(path).removeprefix(f"{ROOT}/")
