"""Sharded checkpoints of any engine: written aside, published by rename, verified on resume.

`Saver` writes them, `find` picks the newest whole one, `load` resumes from it. `folder_layout.py`
describes the folder; `python -m training.checkpoint --help` looks after one offline.
"""

from training.checkpoint.find import find, refuse_later, verify_together
from training.checkpoint.folder_layout import (
    MANIFEST,
    TEMPORARY,
    Manifest,
    checkpoints_at,
    finished,
    manifest_hash,
    read_manifest,
    step_of,
)
from training.checkpoint.progress import Progress, new_rng_state, restore_rng
from training.checkpoint.pruning import best
from training.checkpoint.resume import load, place_of, setting_changes
from training.checkpoint.saver import Saver
from training.checkpoint.verify import verify_files

__all__ = [
    "MANIFEST",
    "TEMPORARY",
    "Manifest",
    "Progress",
    "Saver",
    "best",
    "checkpoints_at",
    "find",
    "finished",
    "load",
    "manifest_hash",
    "new_rng_state",
    "place_of",
    "read_manifest",
    "refuse_later",
    "restore_rng",
    "setting_changes",
    "step_of",
    "verify_files",
    "verify_together",
]
