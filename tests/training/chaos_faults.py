"""Ten ways to disturb a running job, and what each must lead to."""

import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.training.chaos_ranks import EVERY, RANKS, Start
from training import exit_codes
from training.checkpoint import finished
from training.checkpoint import folder_layout as layout

KILLED = -signal.SIGKILL
CRASHED = "crashed"
"""Any exit code that a launcher takes for a crash."""


@dataclass(frozen=True)
class Fault:
    """A disturbance of a start, and of what the job has on disk once its ranks have ended.

    strike: does it, once the step is reached; returns the rank it struck, None for all of them.
    codes: how the struck rank must end, and the other one.
    says: what the ranks must have said; `{rank}` in the pattern is the struck one, `{other}` not.
    damage: done to the checkpoints before the next start; what that one must say of it.
    lost_checkpoints: how many of the newest checkpoints the damage makes unusable.
    """

    name: str
    strike: Callable[[Start, random.Random], int | None]
    codes: tuple[int, int | str] = (KILLED, CRASHED)
    says: tuple[str, ...] = ()
    damage: Callable[[Path, random.Random], str] | None = None
    lost_checkpoints: int = 0

    @property
    def asks(self) -> bool:
        """Whether the job is asked to stop, so that no step may be lost."""
        return self.codes[0] == exit_codes.PREEMPTED

    def check(self, rank: int | None, codes: list[int], said: str) -> None:
        """AssertionError unless the ranks ended as this fault makes them."""
        struck = 0 if rank is None else rank
        text = f"{self.name}: exit codes {codes}\n{said}"
        assert codes[struck] == self.codes[0], text
        other = codes[1 - struck]
        if self.codes[1] == CRASHED:
            assert other not in (exit_codes.OK, exit_codes.BAD_INPUT, exit_codes.PREEMPTED), text
        else:
            assert other == self.codes[1], text
        for pattern in self.says:
            pattern = pattern.format(rank=struck, other=1 - struck)
            assert re.search(pattern, said, re.MULTILINE), f"no {pattern!r} in {text}"


def kill(*victims: int) -> Callable[[Start, random.Random], int | None]:
    """SIGKILL one of these ranks, anywhere within a step."""

    def strike(start: Start, chance: random.Random) -> int:
        time.sleep(chance.uniform(0, 0.3))
        rank = chance.choice(victims)
        start.kill(signal.SIGKILL, rank)
        return rank

    return strike


def kill_in_save(start: Start, chance: random.Random) -> int:
    """SIGKILL a rank that has written half of a shard."""
    rank = chance.randrange(RANKS)
    start.hold_saves([rank])
    start.wait_until(start.held)
    start.kill(signal.SIGKILL, rank)
    return rank


def ask_one(start: Start, chance: random.Random) -> int:
    time.sleep(chance.uniform(0, 0.3))
    rank = chance.randrange(RANKS)
    start.kill(signal.SIGUSR1, rank)
    return rank


def ask_all_twice(start: Start, chance: random.Random) -> None:
    """SIGTERM to all ranks, and another signal while they write what they save for it."""
    start.wait_until(lambda: start.last_step() % EVERY in (1, 2) and not start.saving())
    start.hold_saves(list(range(RANKS)))
    start.kill(signal.SIGTERM)
    start.wait_until(lambda: len(start.held()) == RANKS)
    start.kill(chance.choice([signal.SIGTERM, signal.SIGUSR1]))
    start.wait_until(lambda: start.said().count("again: already stopping after") == RANKS)
    start.release_saves()


def stop_process(start: Start, chance: random.Random) -> int:
    time.sleep(chance.uniform(0, 0.3))
    rank = chance.randrange(RANKS)
    start.kill(signal.SIGSTOP, rank)
    return rank


def newest_shard(checkpoints: Path, chance: random.Random) -> Path:
    return chance.choice(sorted(finished(checkpoints)[-1].glob("*.pt")))


def truncate(checkpoints: Path, chance: random.Random) -> str:
    file = newest_shard(checkpoints, chance)
    size = file.stat().st_size
    left = chance.randrange(size)
    with file.open("r+b") as stream:
        stream.truncate(left)
    return f"not resuming from {file.parent.name}: .*{file.name} has {left} bytes, {size} were"


def flip_bit(checkpoints: Path, chance: random.Random) -> str:
    file = newest_shard(checkpoints, chance)
    place, bit = chance.randrange(file.stat().st_size), 1 << chance.randrange(8)
    with file.open("r+b") as stream:
        stream.seek(place)
        byte = stream.read(1)[0]
        stream.seek(place)
        stream.write(bytes([byte ^ bit]))
    return f"not resuming from {file.parent.name}: .*{file.name} is damaged: its sha256"


def leave_partial(checkpoints: Path, chance: random.Random) -> str:
    """`latest` emptied; half of a newer checkpoint under its own name and under a temporary one."""
    newest = finished(checkpoints)[-1]
    (checkpoints / layout.LATEST).write_bytes(b"")
    partial = layout.step_name(layout.step_of(newest) + EVERY)
    for name in (partial, layout.TEMPORARY + partial):
        folder = checkpoints / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        shutil.copy(newest_shard(checkpoints, chance), folder)
    return f"latest names nothing; .*not resuming from {partial}: .*was never finished"


def delete_manifest(checkpoints: Path, chance: random.Random) -> str:
    newest = finished(checkpoints)[-1]
    (newest / layout.MANIFEST).unlink()
    return f"not resuming from {newest.name}: .*{layout.MANIFEST} is missing"


STOPPED = (exit_codes.PREEMPTED, exit_codes.PREEMPTED)
ASKED = r"^asked to stop after step (\d+); the newest checkpoint is \S*/step-0*\1$"
FIRST = "^{}: stopping at the next step boundary"
STUCK = (
    r"^error: rank {other} on \S+ made no progress for \d+ s in step .* No longer alive: "
    r"rank {rank} on .* silent for"
)

FAULTS = [
    Fault("kill -9 of rank 0", kill(0)),
    Fault("kill -9 of rank 1", kill(1)),
    Fault("kill -9 inside a save", kill_in_save),
    Fault("USR1 to one rank", ask_one, STOPPED, (FIRST.format("SIGUSR1"), ASKED)),
    Fault(
        "TERM to all, again in the save", ask_all_twice, STOPPED, (FIRST.format("SIGTERM"), ASKED)
    ),
    Fault("SIGSTOP of a rank", stop_process, (KILLED, exit_codes.STUCK), (STUCK,)),
    Fault("newest truncated", kill(0, 1), damage=truncate, lost_checkpoints=1),
    Fault("bit flipped in the newest", kill(0, 1), damage=flip_bit, lost_checkpoints=1),
    Fault("latest empty, partial tags left", kill(0, 1), damage=leave_partial),
    Fault("manifest of the newest deleted", kill(0, 1), damage=delete_manifest, lost_checkpoints=1),
]
