"""Look after a checkpoint folder offline, without a GPU or a process group.

python -m training.checkpoint list runs/digits/checkpoints
python -m training.checkpoint verify runs/digits/checkpoints            # or one checkpoint
python -m training.checkpoint prune runs/digits/checkpoints --keep 2 --dry-run
"""

import argparse
import sys
from datetime import datetime
from pathlib import Path

from tqdm import tqdm

from data_pipeline.cli import run_cli
from data_pipeline.errors import InputError
from data_pipeline.paths import path_argument
from training.checkpoint.folder_layout import (
    BAD,
    LATEST,
    MANIFEST,
    TEMPORARY,
    candidates,
    finished,
    read_manifest,
    remove,
)
from training.checkpoint.lock import FolderLock
from training.checkpoint.pruning import best, to_prune
from training.checkpoint.saver import gigabytes
from training.checkpoint.verify import problems_of


def main(argv: list[str] | None = None) -> int:
    args = _parse_args(argv)
    if not args.path.is_dir():
        raise InputError(f"{args.path} is not a folder; give one like runs/digits/checkpoints")
    return args.run(args)


def _parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m training.checkpoint",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    show = commands.add_parser("list", help="what is in a folder: step, time, ranks, size, kind")
    show.set_defaults(run=_list)
    verify = commands.add_parser(
        "verify", help="check every checksum and pickle; exit status 1 names what is broken"
    )
    verify.set_defaults(run=_verify)
    prune = commands.add_parser(
        "prune",
        help="remove all but the newest checkpoints and that of checkpoint.keep_best",
    )
    prune.set_defaults(run=_prune)
    for command in (show, verify, prune):
        command.add_argument("path", type=path_argument, help="a run's checkpoints folder")
    prune.add_argument("--keep", type=int, required=True, help="newest ones to keep, at least 1")
    prune.add_argument(
        "--keep-every", type=int, default=0, metavar="M", help="also keep multiples of M steps"
    )
    prune.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    return parser.parse_args(argv)


def _list(args: argparse.Namespace) -> int:
    latest, top = args.path / LATEST, best(args.path)
    newest = latest.read_text(errors="replace").strip() if latest.is_file() else ""
    print(f"{'step':>9}  {'saved':16}  {'ranks':>5}  {'size':>10}  {'files':>5}  kind")
    for path in candidates(args.path):
        try:
            manifest = read_manifest(path)
        except InputError as error:
            print(f"{path.name.removeprefix('step-').lstrip('0') or '0':>9}  damaged: {error}")
            continue
        saved = datetime.fromtimestamp((path / MANIFEST).stat().st_mtime)
        kind = "finished, latest" if path.name == newest else "finished"
        kind += f", best ({top})" if top and top.path == path else ""
        print(
            f"{manifest.step:>9}  {saved:%Y-%m-%d %H:%M}  {manifest.world_size:>5}  "
            f"{gigabytes(manifest.total_bytes):>10}  {len(manifest.files):>5}  {kind}"
        )
    for path in sorted([*args.path.glob(BAD + "*"), *args.path.glob(TEMPORARY + "*")]):
        kind = "damaged, set aside" if path.name.startswith(BAD) else "leftover or being written"
        print(f"{path.name}: {kind}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    paths = candidates(args.path) or [args.path]
    broken = 0
    for path in paths:
        with tqdm(
            desc=path.name,
            total=_size(path),
            unit="B",
            unit_scale=True,
            disable=None,
            leave=False,
        ) as bar:
            problems = problems_of(path, bar.update)
        broken += bool(problems)
        for problem in problems:
            print(f"{path.name}: broken: {problem}")
        if not problems:
            print(f"{path.name}: whole, {gigabytes(_size(path))}")
    if broken:
        print(f"{broken} of {len(paths)} broken", file=sys.stderr)
    return 1 if broken else 0


def _size(path: Path) -> int:
    try:
        return read_manifest(path).total_bytes
    except InputError:
        return 0


def _prune(args: argparse.Namespace) -> int:
    if args.keep < 1 or args.keep_every < 0:
        raise InputError(f"--keep {args.keep} --keep-every {args.keep_every}: expected at least 1")
    lock = FolderLock(args.path)
    if not args.dry_run:
        lock.acquire()  # not under a running job
    doomed = to_prune(args.path, args.keep, args.keep_every)
    for path in tqdm(doomed, desc="removing", disable=None, leave=False):
        size = gigabytes(_size(path))
        if not args.dry_run:
            remove(path)
        tqdm.write(f"{'would remove' if args.dry_run else 'removed'} {path.name}, {size}")
    print(f"{len(finished(args.path)) - args.dry_run * len(doomed)} checkpoints kept")
    lock.release()
    return 0


if __name__ == "__main__":
    run_cli(lambda: sys.exit(main()))
