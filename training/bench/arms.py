"""The arms that are compared: what each is called, and how its ranks are started."""

import importlib.util
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import InputError


@dataclass(frozen=True)
class Arm:
    """One way to train the workload.

    module: of its ranks. options: behind its two paths. environment: name of the environment beside
    this one that its package is in, where this one has not got it.
    """

    name: str
    says: str
    module: str
    options: tuple[str, ...] = ()
    takes_workers: bool = False
    package: str | None = None

    def python(self) -> str | None:
        """The Python that has its package; None if none has."""
        if self.package is None or importlib.util.find_spec(self.package) is not None:
            return sys.executable
        beside = Path(f"{sys.prefix}-{self.package}")
        return str(beside / "bin" / "python") if (beside / "installed").exists() else None

    def version(self) -> str | None:
        """Of its package, in whatever Python has it."""
        if self.package is None or (python := self.python()) is None:
            return None
        code = f"from importlib import metadata; print(metadata.version({self.package!r}))"
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def command(self, ranks: int, workers: int, folder: Path, out: Path) -> list[str]:
        """Starts its ranks on the workload in `folder`; what they noted is written to `out`."""
        more = ("--workers", str(workers)) if self.takes_workers else ()
        launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks))
        python = self.python() or sys.executable
        return [python, *launcher, "-m", self.module, str(folder), str(out), *self.options, *more]


OURS = "packed"
ARMS = {
    arm.name: arm
    for arm in (
        Arm(OURS, "this trainer", "training.bench.packed_arm"),
        Arm("padded", "its model, padded batches", "training.bench.padded_arm"),
        Arm(
            "grouped",
            "its model, padded batches grouped by length",
            "training.bench.padded_arm",
            ("--grouped",),
        ),
        Arm(
            "transformers",
            "transformers' Trainer, grouped by length",
            "training.bench.trainer_arm",
            takes_workers=True,
        ),
        Arm(
            "trl",
            "TRL's SFTTrainer, grouped by length",
            "training.bench.trainer_arm",
            ("--trl",),
            takes_workers=True,
            package="trl",
        ),
    )
}


def chosen_arms(names: str | None) -> list[Arm]:
    """The arms of these names, separated by commas; None: all that are installed.

    Raises:
        InputError: an arm is not known, or its package is not installed.
    """
    if names is None:
        found = [arm for arm in ARMS.values() if arm.python()]
        for arm in ARMS.values():
            if arm not in found:
                print(f"left out: {arm.name}, {arm.package} is not installed (make extras)")
        return found
    asked = list(dict.fromkeys(names.split(",")))
    for name in asked:
        if name not in ARMS:
            raise InputError(f"--arms: there is no {name!r}; name any of {', '.join(ARMS)}")
        if not ARMS[name].python():
            raise InputError(
                f"--arms: {name} needs {ARMS[name].package}, which is not installed; run make "
                "extras, or leave it out"
            )
    return [ARMS[name] for name in asked]
