"""Ranks that train nothing but hang as told; rank 1 is the one that hangs."""

import os
import re
import signal
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed

from training.config import FaultSettings
from training.distributed import Ranks
from training.health import Watchdog, set_timeout, watchdog

FAULTS = FaultSettings(startup_timeout_s=60, step_timeout_s=4)
SLOW_S = 6.0
REPORTED_S = 1.5  # time enough for the watchdog to report where the rank is


def read_a_shard_that_never_comes() -> None:
    time.sleep(600)


def never_let_go() -> None:
    """Matching backtracks for ages in C code, which holds the GIL."""
    re.match("(a+)+$", "a" * 60 + "b")


def train(ranks: Ranks, dog: Watchdog, how: str) -> None:
    for step in range(1, 8):
        dog.beat("data_wait", step)
        if step == 4 and ranks.rank == 1:
            time.sleep(REPORTED_S)
            if how == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            elif how == "reading":
                read_a_shard_that_never_comes()
            elif how == "gil":
                never_let_go()
        if step == 4 and how == "evaluating":
            dog.beat("evaluation", step)
            time.sleep(SLOW_S * ranks.rank)
            torch.distributed.barrier()
        dog.beat("steps", step)
        torch.distributed.all_reduce(torch.ones(4))
        dog.first_step_done()
    print("done", flush=True)


def wait_for_the_other(ranks: Ranks) -> None:
    """Rank 0 prints how long it waited in collectives of two groups, and of how long it should."""
    other = torch.distributed.new_group([0, 1])
    torch.distributed.all_reduce(torch.ones(4), group=other)
    assert set_timeout(2.0)
    if ranks.rank == 1:
        time.sleep(SLOW_S)
        return
    waited = []
    for group in (None, other):
        began = time.monotonic()
        try:
            torch.distributed.all_reduce(torch.ones(4), group=group)
        except RuntimeError:
            waited.append(time.monotonic() - began)
    print(*waited, flush=True)


def main(folder: Path, how: str, rank: int, port: int) -> None:
    """A rank's process; what it says goes to `out-R` and `err-R` of the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, descriptor in (("out", 1), ("err", 2)):
        file = os.open(folder / f"{name}-{rank}", os.O_CREAT | os.O_WRONLY)
        os.dup2(file, descriptor)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group(
        "gloo", timeout=timedelta(seconds=60), rank=rank, world_size=2
    )
    ranks = Ranks(rank, 2, rank, torch.device("cpu"))
    if how == "timeout":
        wait_for_the_other(ranks)
        return
    watchdog._GIL_GRACE_S = 1.0
    with Watchdog(folder, ranks, FAULTS) as dog:
        train(ranks, dog, how)
