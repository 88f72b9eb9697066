"""Which checkpoint to resume from: the newest that all ranks find whole."""

from pathlib import Path

import torch.distributed

from data_pipeline.errors import InputError
from training.checkpoint.folder_layout import (
    LATEST,
    candidates,
    finished,
    read_manifest,
    set_aside,
    step_of,
)
from training.checkpoint.verify import check_unlisted, share, verify_files
from training.distributed import from_main
from training.side_outputs import warn


def find(resume: str, folder: Path, after: int = -1) -> Path | None:
    """The checkpoint that `checkpoint.resume` (auto, never, or a folder) means, None to start anew.

    Every rank calls this, holding the folder's lock (`Saver`). Each verifies a part of the files,
    and a checkpoint that is bad for one is bad for all: `auto` then goes on to the one before and
    renames the bad one to `bad-...`, so that it is neither resumed nor counted later. Of those
    after step `after` None says that none is whole.

    Raises:
        InputError: on every rank, if the named checkpoint is bad or all that there are.
    """
    if resume == "never":
        return None
    if resume != "auto":
        path = Path(resume)
        verify_together(path, "checkpoint.resume")
        return path
    # One rank decides what there is: on a shared file system others may not see it yet.
    newest_first = from_main(lambda: [p for p in candidates(folder)[::-1] if step_of(p) > after])
    from_main(lambda: _compare_latest(folder, newest_first))
    problems: dict[Path, str] = {}
    for path in newest_first:
        problem = problem_together(path)
        if problem is None:
            from_main(lambda: _set_aside(problems))
            return path
        problems[path] = problem
    if problems and after < 1:
        raise InputError(
            f"{folder} has no whole checkpoint: {'; '.join(problems.values())}. Remove the folder "
            "to start anew, or name a checkpoint elsewhere in checkpoint.resume"
        )
    from_main(lambda: _set_aside(problems))
    return None


def problem_together(path: Path) -> str | None:
    """What is wrong with a checkpoint for any rank, the same on every rank; None if nothing."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    problem: str | None = None
    try:
        manifest = from_main(lambda: read_manifest(path))
        from_main(lambda: check_unlisted(path, manifest))
    except InputError as error:
        return str(error)  # on every rank
    try:
        verify_files(path, share(manifest.files, rank, world_size))
    except InputError as error:
        problem = f"{error} (found by rank {rank})"
    problems: list[str | None] = [None] * world_size
    torch.distributed.all_gather_object(problems, problem)
    return next(filter(None, problems), None)


def verify_together(path: Path, setting: str) -> None:
    """InputError on every rank unless the checkpoint that a setting names is whole."""
    if problem := problem_together(path):
        words = "auto (the newest of output_dir), never, or " * (setting == "checkpoint.resume")
        raise InputError(
            f"{setting}={path}: {problem}; give {words}another checkpoint, a folder like "
            "runs/digits/checkpoints/step-00000100 (`python -m training.checkpoint list DIR`)"
        )


def _compare_latest(folder: Path, newest_first: list[Path]) -> None:
    """Say so if `latest` is not what a resume goes by: it may be older, empty or dangling."""
    latest = folder / LATEST
    if not newest_first and not latest.exists():
        return
    try:
        named = latest.read_text(errors="replace").strip()
    except OSError:
        named = ""
    if not newest_first or named != newest_first[0].name:
        newest = newest_first[0].name if newest_first else "none"
        warn(f"{latest} names {named or 'nothing'}; the newest checkpoint there is {newest}")


def _set_aside(problems: dict[Path, str]) -> None:
    """Rename the bad checkpoints and say what was wrong with each."""
    for path, problem in problems.items():
        try:
            name = set_aside(path).name
        except OSError as error:
            name = f"{path.name}, as it cannot be renamed ({error.strerror})"
        warn(f"not resuming from {path.name}: {problem}; kept as {name}")


def refuse_later(folder: Path, step: int) -> None:
    """InputError if the folder holds checkpoints after `step`, where a run is about to start.

    They would be taken for newer than this run's own, by pruning and by the next resume.
    """
    later = [path.name for path in finished(folder) if step_of(path) > step]
    if later:
        raise InputError(
            f"{folder} holds {later[-1]}, later than step {step} where this run starts; go on "
            "from it with checkpoint.resume=auto, remove the later checkpoints, or use another "
            "output_dir"
        )
