"""TensorBoard events, encoded here and written as all side files are.

torch's SummaryWriter ends the run when its disk is full, and holds it up when that is slow.
"""

import io
import os
import re
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from training.side_outputs import SideFiles


class EventFile:
    """The events file of one start, which takes back what earlier ones said of later steps."""

    def __init__(self, folder: Path, first_step: int, files: SideFiles) -> None:
        self.files = files
        name = f"events.out.tfevents.{_stamp(folder):010d}.{socket.gethostname()}.{os.getpid()}.0"
        self.path = folder / name
        purge = SessionLog(status=SessionLog.START)
        self._write(Event(file_version="brain.Event:2"))
        self._write(Event(step=first_step + 1, session_log=purge))

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Add the values of a step by their tags."""
        found = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._write(Event(step=step, summary=Summary(value=found)))

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        self.files.append(self.path, record.getvalue())


def _stamp(folder: Path) -> int:
    """The time in seconds; after that of all files there, which are read in this order."""
    names = folder.glob("events.out.tfevents.*")
    stamps = [re.search(r"tfevents\.(\d+)", path.name) for path in names]
    return max([int(time.time()), *(int(found[1]) + 1 for found in stamps if found)])
