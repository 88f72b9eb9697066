"""What a run writes beside its checkpoints: nothing of it may end or slow training."""

from training.side_outputs.console import attempt, shout, unfailing_console, warn
from training.side_outputs.rows import encode_row, keep_rows, read_rows
from training.side_outputs.side_files import SideFiles

__all__ = [
    "SideFiles",
    "attempt",
    "encode_row",
    "keep_rows",
    "read_rows",
    "shout",
    "unfailing_console",
    "warn",
]
