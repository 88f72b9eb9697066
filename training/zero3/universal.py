"""A checkpoint's shards made whole, once: DeepSpeed's universal format beside them.

`CHECKPOINT/universal/` holds what `deepspeed.checkpoint.ds_to_universal` makes of the shards, one
file per parameter and state, and `files.json` with their sizes and checksums, which is written
last. The folder is renamed into place, so that a killed conversion leaves nothing that is read.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_pipeline.errors import InputError
from data_pipeline.files import check_whole, move_into_place, write_atomically
from training.zero3.pickles import scan_pickle

FOLDER = "universal"
SEAL = "files.json"
TEMPORARY = "tmp-universal-"

# In a process of its own: it maps the shards into memory and holds no GPU. It dies with rank 0 (1
# is PR_SET_PDEATHSIG), not of the signals that Slurm sends to a job's every process.
GUARD = """
import ctypes, signal
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
"""
# It asks for Adam's two moments of every shard. Muon has one: zeros, which take no memory, stand
# for the other, and the load drops them again.
CONVERT = """
import torch
from torch.utils.serialization import config
config.load.mmap = True
from deepspeed.checkpoint import ds_to_universal
load = torch.load
def filled(*args, **options):
    loaded = load(*args, **options)
    zero = loaded.get("optimizer_state_dict") if isinstance(loaded, dict) else None
    for state in (zero or {}).get("optimizer_state_dict", {}).get("state", {}).values():
        state.setdefault("exp_avg_sq", torch.zeros(()).expand(state["exp_avg"].shape))
    return loaded
torch.load = filled
ds_to_universal.main(ds_to_universal.parse_arguments())
"""


def convert_once(path: Path) -> Path:
    """The universal form of a verified checkpoint, made now unless a whole one is there.

    For one rank to call. Reads and writes every shard about twice, one parameter at a time.

    Raises:
        InputError: if the disk is full or not writable, or DeepSpeed cannot convert the shards.
        RuntimeError: if the process that converts is killed.
    """
    folder = path / FOLDER
    if is_whole(folder):
        return folder
    try:
        for leftover in [*path.glob(TEMPORARY + "*"), folder]:
            shutil.rmtree(leftover, ignore_errors=True)
        _check_space(path)
        # A name of its own: an orphan of a killed run may still write to the one before.
        temporary = path / f"{TEMPORARY}{os.getpid()}"
        temporary.mkdir()
        try:
            _run_deepspeed(path, temporary / FOLDER)
            _seal(temporary / FOLDER)
            move_into_place(temporary / FOLDER, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise InputError(
            f"{path} cannot be converted for another number of ranks: {error}. Make room, or copy "
            "the checkpoint to a folder that can be written and name it in checkpoint.resume"
        ) from error
    return folder


def is_whole(folder: Path) -> bool:
    """Whether a conversion ended there, and holds exactly the files it wrote, unchanged."""
    try:
        files = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        if _names(folder) != files.keys() | {SEAL}:
            return False
        for name in _progress(files, f"checking {folder}"):
            check_whole(folder / name, files[name])
            scan_pickle(folder / name)
    except (InputError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return True


def _check_space(path: Path) -> None:
    """OSError unless fragments, merged tensors and DeepSpeed's copies fit beside each other."""
    sizes = {file.name: file.stat().st_size for file in path.glob("*.pt")}
    states = [size for name, size in sizes.items() if name.endswith("_optim_states.pt")]
    needed = sum(sizes.values()) + sum(states) + max(states, default=0)
    free = shutil.disk_usage(path).free
    if free < needed:
        raise OSError(f"{needed / 1e9:.1f} GB needed on its disk, {free / 1e9:.1f} GB free")


def _run_deepspeed(path: Path, output: Path) -> None:
    """Let DeepSpeed write the universal form of `path` to `output`."""
    # DeepSpeed takes a path for a glob and a regular expression, so it gets "." and never `path`.
    folders = ["--input_folder", ".", "--output_folder", str(output.relative_to(path))]
    workers = ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    done = subprocess.run(
        [sys.executable, "-c", GUARD + CONVERT, *folders, *workers],
        cwd=path,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        # Its progress bars are for a terminal; elsewhere it only speaks when it fails.
        stderr=None if sys.stderr.isatty() else subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode < 0:
        # Out of memory, say: not a mistake in the settings, so a restart may help.
        raise RuntimeError(f"the conversion of {path} was killed by signal {-done.returncode}")
    if done.returncode:
        reason = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise InputError(
            f"DeepSpeed cannot convert {path} for another number of ranks (exit code "
            f"{done.returncode}): {' '.join(reason)}. Start as many ranks as saved it"
        )


def _seal(folder: Path) -> None:
    """Flush every file to disk, and write down sizes and checksums."""
    for copy in folder.glob("*_model_states.pt"):
        if not copy.name.startswith("zero_pp_rank_0_"):
            copy.unlink()  # only rank 0's is read
    files: dict[str, Any] = {}
    for name in _progress(sorted(_names(folder)), f"checksums of {folder.parent.parent}"):
        scan_pickle(folder / name)
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            files[name] = {"bytes": file.tell(), "sha256": digest}
    write_atomically(folder / SEAL, json.dumps(files, indent=1).encode())


def _names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def _progress(items: Any, text: str) -> Any:
    return tqdm(items, desc=text, disable=None, leave=False)
