"""Kill ranks inside saves and count what is broken afterwards.

    python -m tests.training.kill_in_save --trials 200 --json kill_in_save.json
    python -m tests.training.kill_in_save --trials 24 --stock      # DeepSpeed's own save

Each trial forks two gloo ranks from this warm process. They save one checkpoint after the other,
whose numbers all equal the step, and set them to the next step's as soon as `save` returns. At a
random moment one rank, or both, get SIGKILL; the other a moment later, as from a launcher. Then
`latest` must name a checkpoint that is whole, and so must every other one be: checksums, and
values. `--phases` kills at fixed places instead, one trial each.
"""

import argparse
import contextlib
import importlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from data_pipeline import files
from data_pipeline.machine import measured_on
from tests.training import checkpoint_scenarios as scenarios
from training.checkpoint import Saver, publication
from training.checkpoint import folder_layout as layout
from training.checkpoint.verify import problems_of
from training.distributed import Ranks
from training.zero3.process_group import init_distributed, quiet_libraries

LAYERS = 2
PHASES = {
    "half a shard": 1,
    "before the marker": 1,
    "before the manifest": 1,
    "before the rename": 1,
    "before latest": 2,
    "before pruning": 3,
    "inside pruning": 3,
}
"""Where a rank is killed, and the newest whole checkpoint afterwards: steps 1, 2, 3 are saved."""


def die(*_: Any, **__: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(phase: str, rank: int, step: int) -> None:
    """Replace what the phase is about by this rank's death, in the save of `step`."""
    if step != max(PHASES[phase], 2):
        return
    if phase == "half a shard" and rank == 1:
        publication.write_shard = _half_a_shard
    elif phase == "before the marker" and rank == 1:
        publication.write_atomically = die
    elif phase == "before the manifest" and rank == 0:
        publication.publish = die
    elif phase in ("before the rename", "before latest") and rank == 0:
        # move_into_place() syncs the folder before it renames it, and its parent afterwards.
        inside = phase == "before the rename"
        _die_at(files, "sync_folder", lambda path: path.name.startswith("tmp-") == inside)
    elif phase == "before pruning" and rank == 0:
        publication.to_prune = die
    elif phase == "inside pruning" and rank == 0:
        _die_at(shutil, "rmtree", lambda path: "tmp-old" in path.name and path.exists())


def _half_a_shard(path: Path, state: Any) -> Any:
    torch.save(state, path)
    os.truncate(path, path.stat().st_size // 2)
    die()


def _die_at(module: Any, name: str, when: Callable[[Path], bool]) -> None:
    real = getattr(module, name)
    setattr(module, name, lambda path, **kw: die() if when(Path(path)) else real(path, **kw))


def serve(
    rank: int, port: int, folder: Path, pipe: Connection, width: int, stock: bool, phase: str | None
) -> None:
    """A rank: build an engine and save until killed, telling the parent what is published."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    quiet_libraries()
    ranks = init_distributed(timeout_s=60)
    engine = scenarios.build(width, LAYERS)
    if phase == "imports":
        if rank == 0:
            pipe.send(list(sys.modules))
        return
    scenarios.train(engine, rank)  # Adam has its moments from the first step on
    save = save_stock if stock else save_ours
    save(engine, ranks, folder, pipe, phase)


def save_ours(engine: Any, ranks: Ranks, folder: Path, pipe: Connection, phase: str | None) -> None:
    with Saver(folder, scenarios.settings(keep=2), ranks) as saver:
        for step in range(1, 10**6):
            if phase:
                arm(phase, ranks.rank, step)
            scenarios.fill(engine, step)
            started = time.perf_counter()
            saver.save(engine, scenarios.progress(step), scenarios.FINGERPRINTS)
            scenarios.fill(engine, -1)  # as the next step overwrites what the snapshot was of
            saver.wait()
            pipe.send((step, time.perf_counter() - started))


def save_stock(engine: Any, ranks: Ranks, folder: Path, pipe: Connection, _: str | None) -> None:
    for step in range(1, 10**6):
        scenarios.fill(engine, step)
        started = time.perf_counter()
        engine.deepspeed.save_checkpoint(str(folder), tag=layout.step_name(step))
        pipe.send((step, time.perf_counter() - started))


def fork_ranks(folder: Path, *args: Any) -> tuple[list[int], list[Connection]]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    pids, pipes = [], []
    for rank in range(2):
        ours, theirs = Pipe(duplex=False)
        pid = os.fork()
        if pid == 0:
            folder.parent.mkdir(parents=True, exist_ok=True)
            log = os.open(folder.parent / f"rank-{rank}.log", os.O_CREAT | os.O_WRONLY)
            os.dup2(log, 1)
            os.dup2(log, 2)
            try:
                serve(rank, port, folder, theirs, *args)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        theirs.close()
        pids.append(pid)
        pipes.append(ours)
    return pids, pipes


def last_message(pipe: Connection, message: Any) -> Any:
    try:
        while pipe.poll():
            message = pipe.recv()
    except EOFError:
        pass
    return message


def warm_up(folder: Path) -> None:
    """Import here what a rank imports, so that the forks need not: seconds each."""
    import deepspeed  # noqa: F401

    pids, pipes = fork_ranks(folder, 32, False, "imports")
    for name in pipes[0].recv():
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    for pid in pids:
        os.waitpid(pid, 0)


def trial(folder: Path, chance: random.Random, width: int, stock: bool) -> dict[str, Any]:
    """Kill at a random moment; what was published by then, and what is broken."""
    pids, pipes = fork_ranks(folder, width, stock, None)
    try:
        pipes[0].poll(60)
        message = pipes[0].recv()  # the first save, which also tells how long one takes
        pipes[0].poll(60)
        message = pipes[0].recv()
        delay = chance.uniform(0, 2 * message[1])
        time.sleep(delay)
    finally:
        victims = chance.choice([pids[:1], pids[1:], pids])
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    step = last_message(pipes[0], message)[0]
    broken = check_stock(folder) if stock else check_ours(folder, step)
    half_done = any(folder.glob("tmp-*")) if not stock else None
    return {"published": step, "delay_s": delay, "half_written": half_done, "broken": broken}


def check_ours(folder: Path, published: int) -> list[str]:
    """What is broken among our checkpoints; step `published` or a later one must be there."""
    problems = []
    paths = layout.candidates(folder)
    named = (folder / "latest").read_text() if (folder / "latest").exists() else ""
    if folder / named not in paths:
        problems.append(f"latest names {named!r}")
    if not paths or layout.step_of(paths[-1]) < published:
        problems.append(f"step {published} was published and is gone")
    for path in paths:
        problems += problems_of(path) or wrong_values(path, layout.step_of(path))
    return problems


def check_stock(folder: Path) -> list[str]:
    """Whether the checkpoint that `latest` names can be loaded."""
    latest = folder / "latest"
    named = latest.read_text() if latest.exists() else ""
    if not named:
        return ["latest is empty"]
    path = folder / named
    files = list(path.glob("*.pt"))
    if len(files) != 4:
        return [f"{named} has {len(files)} of 4 shards"]
    try:
        return wrong_values(path, layout.step_of(path))
    except Exception as error:
        return [f"{named}: {error}"]


def wrong_values(path: Path, step: int) -> list[str]:
    """The shards whose masters or moments are not all `step`."""
    wrong = []
    for file in path.glob("*.pt"):
        saved = torch.load(file, weights_only=False)
        if optimizer := saved.get("optimizer_state_dict"):
            tensors = list(optimizer["fp32_flat_groups"])
            for state in optimizer["optimizer_state_dict"]["state"].values():
                tensors += [state["exp_avg"], state["exp_avg_sq"]]
            if not all(bool((tensor == step).all()) for tensor in tensors):
                wrong.append(f"{file} does not hold the values of step {step}")
    return wrong


def die_in(phase: str, folder: Path, width: int = 32) -> None:
    """Run until the phase's rank has killed itself, then end the other."""
    pids, _ = fork_ranks(folder, width, False, phase)
    deadline = time.monotonic() + 60
    dead: list[int] = []
    while not dead and time.monotonic() < deadline:
        dead = [pid for pid in pids if os.waitpid(pid, os.WNOHANG)[0]]
        time.sleep(0.01)
    for pid in [pid for pid in pids if pid not in dead]:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.training.kill_in_save")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--width", type=int, default=1024, help="size of the model's matrices")
    parser.add_argument("--stock", action="store_true", help="DeepSpeed's own save, to compare")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--phases", type=Path, help="instead: one folder per fixed phase in here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        warm_up(Path(folder) / "checkpoints")
    if args.phases:
        for phase in PHASES:
            die_in(phase, args.phases / phase / "checkpoints")
        return 0
    chance, results, started = random.Random(args.seed), [], time.monotonic()
    for _ in tqdm(range(args.trials), unit="kill", disable=None):
        with tempfile.TemporaryDirectory(prefix="kill-in-save-") as folder:
            path = Path(folder) / "checkpoints"
            results.append(trial(path, chance, args.width, args.stock))
    broken = [result for result in results if result["broken"]]
    summary = {
        "save": "DeepSpeed" if args.stock else "ours",
        "trials": args.trials,
        "broken": len(broken),
        "left half-written": None
        if args.stock
        else sum(result["half_written"] for result in results),
        "seconds per trial": round((time.monotonic() - started) / args.trials, 2),
        **measured_on(("torch", "deepspeed")),
        "examples": [result["broken"] for result in broken[:5]],
    }
    print(json.dumps(summary, indent=1))
    if args.json:
        args.json.write_text(json.dumps({**summary, "results": results}, indent=1))
    return 1 if broken and not args.stock else 0


if __name__ == "__main__":
    sys.exit(main())
