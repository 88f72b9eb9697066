"""Sharded checkpoints of any engine: written aside, published by rename, verified on resume.

`Saver` writes them, `find` picks the newest whole one, `load` resumes from it, `start_from` takes
only its weights. `folder_layout.py` describes the folder; `python -m training.checkpoint --help`
looks after one offline.
"""

from training.checkpoint.find import find, refuse_later
from training.checkpoint.folder_layout import MANIFEST, TEMPORARY, finished, read_manifest
from training.checkpoint.progress import Progress
from training.checkpoint.pruning import best
from training.checkpoint.resume import load, start_from
from training.checkpoint.saver import Saver
from training.checkpoint.verify import verify_files

__all__ = [
    "MANIFEST",
    "TEMPORARY",
    "Progress",
    "Saver",
    "best",
    "find",
    "finished",
    "load",
    "read_manifest",
    "refuse_later",
    "start_from",
    "verify_files",
]
