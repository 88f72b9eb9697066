"""Every start of a run, in `output_dir/starts/`: its settings, and where it began.

`0001.yaml` holds the effective settings of the first start; `0001.json` its time, its step, the
explicit `checkpoint.resume` that the run follows, so that a later start can tell, and the machine.
"""

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from data_pipeline.errors import InputError
from data_pipeline.files import write_atomically
from data_pipeline.machine import measured_on
from training import checkpoint
from training.config import RunConfig, save_config
from training.distributed import from_main
from training.record.run_record import PACKAGES
from training.side_outputs import warn

FOLDER = "starts"
FOLLOWED = ("resume", "step", "time")


class Starts:
    """The starts of a run, of which this is the newest; every rank calls every method.

    followed: {"resume", "step", "time"} of the explicit `checkpoint.resume` that was followed last.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config, self.folder = config, config.output_dir / FOLDER
        self.time = datetime.now().astimezone().isoformat(timespec="seconds")
        self.followed: dict[str, Any] | None = from_main(self._followed_last)

    def find_checkpoint(self, folder: Path, say: Callable[[str], None]) -> Path | None:
        """The checkpoint to go on from, None to start anew.

        An explicit `checkpoint.resume` counts at its first start. A later one with the same value,
        as a restarted job makes it, goes on from what the run has saved since, if it has.

        Raises:
            InputError: on every rank, see `checkpoint.find`.
        """
        resume, before = self.config.checkpoint.resume, self.followed
        if resume == "auto":
            found = checkpoint.find(resume, folder)
            if before and not found:
                say(
                    f"warning: the start of {before['time']}, with checkpoint.resume="
                    f"{before['resume']}, saved nothing, and this one does not ask for it"
                )
            return found
        named = resume if resume == "never" else str(Path(resume).resolve())
        if before and before["resume"] == named:
            step = before["step"]
            saved = from_main(lambda: [p.name for p in checkpoint.finished(folder)])
            since = [name for name in saved if checkpoint.step_of(Path(name)) > step]
            if since and (path := checkpoint.find("auto", folder, after=step)):
                say(
                    f"checkpoint.resume={resume} was followed by the start of {before['time']}, at "
                    f"step {step}: this one goes on from the run's own newest checkpoint"
                )
                return path
        found = checkpoint.find(resume, folder)
        step = from_main(lambda: checkpoint.read_manifest(found).step) if found else 0
        self.followed = {"resume": named, "step": step, "time": self.time}
        return found

    def note(self, config: RunConfig, step: int, source: Path | None) -> None:
        """Write down that the run starts after `step` steps, with the weights of `source`.

        config: with the steps that its epochs are.

        `config.yaml`, the settings of what was trained last, is written if a step follows.

        Raises:
            InputError: if it cannot be written, and a later start has to know of this one.
        """
        from_main(lambda: self._note(config, step, source))

    def _note(self, config: RunConfig, step: int, source: Path | None) -> None:
        start = {
            "time": self.time,
            "step": step,
            "weights": str(source) if source else None,
            "followed": self.followed,
            **measured_on((*PACKAGES, "triton")),
        }
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            name = f"{1 + max(map(_number, self.folder.iterdir()), default=0):04}"
            save_config(config, self.folder / f"{name}.yaml")
            write_atomically(self.folder / f"{name}.json", json.dumps(start, indent=1).encode())
            current = self.config.output_dir / "config.yaml"
            if step < config.train.steps or not current.is_file():
                save_config(config, current)
        except OSError as error:
            text = f"cannot write to {self.folder}: {error}; make room there"
            if self.followed and self.followed["time"] == self.time:
                raise InputError(text) from error
            warn(text)

    def _followed_last(self) -> dict[str, Any] | None:
        """`followed` of the newest start; one that a kill or a hand left unreadable counts not."""
        for file in sorted(self.folder.glob("*.json"), key=_number, reverse=True):
            try:
                followed = json.loads(file.read_text(encoding="utf-8"))["followed"]
                return None if followed is None else {key: followed[key] for key in FOLLOWED}
            except (OSError, ValueError, TypeError, KeyError) as error:
                warn(f"{file} cannot be read and does not count: {error!r}")
        return None


def _number(file: Path) -> int:
    return int(file.stem) if file.stem.isdecimal() else 0
