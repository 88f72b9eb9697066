"""What an arm notes of its steps on every rank, joined and written by rank 0."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.files import write_atomically
from training.distributed import gather


@dataclass
class ArmStep:
    """One optimizer step, of one rank or of all.

    samples: their ids. tokens: of them; slots: the positions that were computed for them.
    supervised: tokens with a label. loss: this rank's part of the mean over all ranks' supervised
    tokens. end: of the step, in seconds of the machine's clock. compute: seconds of forward,
    backward and optimizer, where they are told apart; wait: for data, likewise.
    """

    samples: list[int] = field(default_factory=list)
    tokens: int = 0
    slots: int = 0
    supervised: int = 0
    loss: float = 0.0
    end: float = 0.0
    compute: float | None = None
    wait: float | None = None


@dataclass
class ArmRecord:
    """The steps of one rank, and what the model scored before the first and after the last.

    began: when the first step did. memory_gib: most that the process had held by the last one.
    """

    steps: list[ArmStep] = field(default_factory=list)
    began: float = 0.0
    memory_gib: float = 0.0
    held_out_before: float = 0.0
    held_out_after: float = 0.0

    def end_step(self, step: ArmStep) -> None:
        """Note a step that ends now."""
        step.end, self.memory_gib = time.perf_counter(), peak_memory()
        self.steps.append(step)

    def write(self, out: Path, is_main: bool) -> None:
        """Join all ranks' steps and write them; every rank must call this."""
        ranks: list[ArmRecord] = gather(self)
        steps = zip(*(rank.steps for rank in ranks), strict=True)
        found: dict[str, Any] = {
            **asdict(self),
            "steps": [asdict(joined(parts)) for parts in steps],
            "memory_gib": max(rank.memory_gib for rank in ranks),
        }
        if is_main:
            write_atomically(out, json.dumps(found).encode())


def joined(parts: Sequence[ArmStep]) -> ArmStep:
    """The step of all ranks: it ends with the slowest; other times are means."""

    def mean(values: list[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known else None

    return ArmStep(
        sorted(sample for part in parts for sample in part.samples),
        sum(part.tokens for part in parts),
        sum(part.slots for part in parts),
        sum(part.supervised for part in parts),
        sum(part.loss for part in parts),
        max(part.end for part in parts),
        mean([part.compute for part in parts]),
        mean([part.wait for part in parts]),
    )


def peak_memory() -> float:
    """Most memory this process has held, in GiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 2**20
    raise OSError("/proc/self/status has no VmHWM: memory is measured on Linux only")
