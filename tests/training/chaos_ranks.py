"""Starts of a small training job, each two gloo ranks forked from one process that has imported it.

Every rank runs `training.train`'s own main(), in a process group of its own, with two additions: it
notes what it trained on in each step, and a save can be held half-way.
"""

import json
import multiprocessing.connection
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.ranks import forkserver
from tests.training.scenarios import DIGITS, tiny_overrides
from training import exit_codes, train
from training.checkpoint import TEMPORARY, finished, publication
from training.checkpoint.folder_layout import step_of

RANKS, EVERY = 2, 4
# The longer one also holds while saving: a rank that is stopped there is noticed late.
STEP_TIMEOUT_S, STARTUP_TIMEOUT_S = 5.0, 40.0
START_LIMIT_S = 120.0
# How long a launcher lets the other ranks live once one has ended: those that were asked to stop
# end by themselves; one that is stopped cannot.
GRACE_S = {exit_codes.OK: 30.0, exit_codes.PREEMPTED: 20.0, exit_codes.STUCK: 0.5}
CRASH_GRACE_S = 3.0


class Job:
    """A run in `out`, started as often as it takes; its notes lie in `out`.starts/."""

    def __init__(self, corpus: Path, out: Path, steps: int) -> None:
        self.out, self.checkpoints = out, out / "checkpoints"
        self.starts: list[Start] = []
        self.argv = [
            DIGITS,
            *tiny_overrides(corpus),
            f"output_dir={out}",
            f"train.steps={steps}",
            "train.log_every=1",
            f"checkpoint.every_steps={EVERY}",
            f"faults.startup_timeout_s={STARTUP_TIMEOUT_S}",
            f"faults.step_timeout_s={STEP_TIMEOUT_S}",
        ]

    def start(self) -> "Start":
        folder = self.out.with_suffix(".starts") / f"{len(self.starts):02d}"
        self.starts.append(Start(folder, self.checkpoints, self.argv))
        return self.starts[-1]

    def close(self) -> None:
        for start in self.starts:
            start.kill(signal.SIGKILL)


class Start:
    """The ranks of one start of the job."""

    def __init__(self, folder: Path, checkpoints: Path, argv: list[str]) -> None:
        self.folder, self.checkpoints = folder, checkpoints
        self.limit = time.monotonic() + START_LIMIT_S
        folder.mkdir(parents=True)
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            port = server.getsockname()[1]
        arguments = [(folder, rank, port, argv) for rank in range(RANKS)]
        self.processes = [forkserver().Process(target=rank_main, args=args) for args in arguments]
        for process in self.processes:
            process.start()

    def kill(self, number: signal.Signals, rank: int | None = None) -> None:
        """Send a signal to the process group of a rank that lives, or of all."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            if process.exitcode is None and process.pid is not None:
                try:
                    os.killpg(process.pid, number)
                except ProcessLookupError:  # it is ending, or has no group of its own yet
                    process.kill() if number == signal.SIGKILL else None

    def wait_until(self, condition: Callable[[], Any]) -> None:
        """AssertionError, with what the ranks said, if they end or the time is up before."""
        while not condition():
            alive = all(process.exitcode is None for process in self.processes)
            assert alive and time.monotonic() < self.limit, (
                f"too late for the fault: exit codes {self.codes()}\n{self.said()}"
            )
            time.sleep(0.005)

    def codes(self) -> list[int | None]:
        """Exit codes, negative for a signal, None while alive."""
        return [process.exitcode for process in self.processes]

    def finish(self) -> list[int]:
        """Wait for the end of all ranks, as a launcher: one that fails takes the others along."""
        sentinels = [process.sentinel for process in self.processes]
        if multiprocessing.connection.wait(sentinels, max(0.0, self.limit - time.monotonic())):
            first = next(code for code in self.wait_for_codes() if code is not None)
            deadline = time.monotonic() + GRACE_S.get(first, CRASH_GRACE_S)
            for process in self.processes:
                process.join(max(0.0, deadline - time.monotonic()))
        self.kill(signal.SIGKILL)
        for process in self.processes:
            process.join()
        return [int(process.exitcode) for process in self.processes]

    def wait_for_codes(self) -> list[int | None]:
        """Exit codes once there is one: the sentinel may be a moment earlier."""
        while all(code is None for code in self.codes()):
            time.sleep(0.005)
        return self.codes()

    def said(self, rank: int | None = None) -> str:
        """What a rank, or all of them, wrote to stdout and stderr."""
        chosen = range(RANKS) if rank is None else [rank]
        return "\n".join((self.folder / f"log-{r}").read_text(errors="replace") for r in chosen)

    def steps(self, rank: int = 0) -> list[dict[str, Any]]:
        """What the rank noted of each step that it did in this start."""
        path = self.folder / f"steps-{rank}"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def last_step(self) -> int:
        """The last step that any rank completed in this start, else where it resumed."""
        done = [row["step"] for rank in range(RANKS) for row in self.steps(rank)]
        return max(done, default=self.resumed_at())

    def resumed_at(self) -> int:
        found = re.search(r"^resumed from .* at step (\d+)$", self.said(0), re.MULTILINE)
        return int(found[1]) if found else 0

    def saved(self) -> list[int]:
        """The steps of the finished checkpoints, oldest first."""
        return [step_of(path) for path in finished(self.checkpoints)]

    def saving(self) -> list[int]:
        """The steps of saves that are under way, or were cut short."""
        found = self.checkpoints.glob(TEMPORARY + "step-*")
        return [int(path.name.rpartition("-")[2]) for path in found]

    def hold_saves(self, ranks: list[int]) -> None:
        """Let these ranks stop within the first shard that they write from now on."""
        for rank in ranks:
            (self.folder / f"hold-{rank}").touch()

    def held(self) -> list[int]:
        return [rank for rank in range(RANKS) if (self.folder / f"held-{rank}").exists()]

    def release_saves(self) -> None:
        for rank in range(RANKS):
            (self.folder / f"hold-{rank}").unlink(missing_ok=True)


def rank_main(folder: Path, rank: int, port: int, argv: list[str]) -> None:
    """A rank's process."""
    os.setpgid(0, 0)
    log = os.open(folder / f"log-{rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(RANKS),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    train.train_step = _noting(train.train_step, folder / f"steps-{rank}")
    publication.write_shard = _held(publication.write_shard, folder, rank)
    sys.exit(train.main(argv))


def _noting(train_step: Callable[..., Any], path: Path) -> Callable[..., Any]:
    """`train_step`, and a line with the step's samples, loss and gradient norm."""
    file = path.open("a", buffering=1)

    def noted(engine: Any, batch: Any, denominator: float, step: int, *rest: Any) -> Any:
        metrics = train_step(engine, batch, denominator, step, *rest)
        samples = [list(map(int, pack.sample_ids)) for pack in batch.packs]
        row = {"step": step, "samples": samples}
        row |= {name: metrics[name] for name in ("loss", "grad_norm", "data_hash")}
        file.write(json.dumps(row) + "\n")
        return metrics

    return noted


def _held(write_shard: Callable[..., Any], folder: Path, rank: int) -> Callable[..., Any]:
    """`write_shard`, which stops half-way as long as the file hold-RANK is there."""
    hold = folder / f"hold-{rank}"

    def write(path: Path, state: Any) -> Any:
        if hold.exists():
            write_shard(path, state)
            os.truncate(path, path.stat().st_size // 2)
            (folder / f"held-{rank}").touch()
            while hold.exists():
                time.sleep(0.01)
        return write_shard(path, state)

    return write
