"""How a rank's process ends."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.errors import InputError
from data_pipeline.storage import StoreError, StoreOutage
from tests.ranks import free_port
from training import exit_codes, train
from training.exit_codes import CRASH, PREEMPTED

ROOT = Path(__file__).parents[2]

# Rank 0's thread of gloo waits for the GIL, to free a tensor, when the interpreter goes down.
BUSY_GLOO = """
import sys, time, torch
from training.zero3.process_group import init_distributed
from training.exit_codes import run_rank

class Slow:
    def __del__(self):
        time.sleep(0.5)

slow = Slow()

def main():
    if init_distributed().is_main:
        sys.setswitchinterval(1000)
        torch.distributed.all_reduce(torch.ones(1), async_op=True)
        end = time.monotonic() + 2
        while time.monotonic() < end:
            pass
    else:
        time.sleep(0.5)
        torch.distributed.all_reduce(torch.ones(1))
        time.sleep(3)
    return 0  # without a word: a write gives the thread the GIL

run_rank(main)
"""

HUNG_THREAD = """
import threading, time
from training.exit_codes import run_rank

def main():
    threading.Thread(target=time.sleep, args=(1000,)).start()
    raise OSError("the disk is gone")

run_rank(main)
"""


def start(
    program: str, rank: int = 0, world_size: int = 1, *arguments: str
) -> subprocess.Popen[str]:
    settings = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ranks = {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        cwd=ROOT,
        env=os.environ | settings | ranks,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.multiprocess
def test_a_thread_of_gloo_cannot_abort_a_run_that_ended_well(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    processes = [start(BUSY_GLOO, rank, 2) for rank in range(2)]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors


def test_a_crash_is_told_and_does_not_wait_for_a_thread() -> None:
    process = start(HUNG_THREAD)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 1
    assert error.startswith("Traceback")
    assert error.endswith("OSError: the disk is gone\n")


def test_argparse_may_end_it() -> None:
    process = start("import sys; from training.exit_codes import run_rank; run_rank(sys.exit)")
    assert process.wait(timeout=120) == 0


def test_a_store_that_fails_may_be_back_and_a_wrong_setting_stays_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def end(error: Exception) -> int:
        def fail(*given: object) -> int:
            raise error

        monkeypatch.setattr(train, "load_config", fail)
        return train.main(["config.yaml"])

    assert end(StoreOutage("s3://a/0.tar: 503 (tried 5 times)")) == exit_codes.CRASH
    assert capsys.readouterr().err == "error: s3://a/0.tar: 503 (tried 5 times)\n"
    assert end(StoreError("s3://a/0.tar: refused")) == exit_codes.BAD_INPUT
    assert end(InputError("data.shards")) == exit_codes.BAD_INPUT


WAITING = """
import sys
from training import distributed, exit_codes
from training.train import main

distributed.MISSING_AFTER_S = 0.2
exit_codes.run_rank(lambda: main(sys.argv[1:]))
"""


@pytest.mark.multiprocess
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_waits_for_another_says_so_and_ends_on_a_signal(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rank: int
) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    arguments = ("training/configs/digits.yaml", f"output_dir={tmp_path}")
    process = start(WAITING, rank, 2, *arguments)
    assert process.stderr is not None
    said = process.stderr.readline()
    assert f"for rank {1 - rank} of 2 (this is rank {rank})" in said
    process.terminate()
    _, rest = process.communicate(timeout=30)
    assert process.returncode == PREEMPTED, said + rest
    assert f"asked to stop while waiting for rank {1 - rank}" in rest


@pytest.mark.multiprocess
def test_a_rank_that_does_not_come_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    short = "faults.startup_timeout_s=1"
    process = start(WAITING, 0, 3, "training/configs/digits.yaml", f"output_dir={tmp_path}", short)
    _, error = process.communicate(timeout=120)
    assert process.returncode == CRASH  # starting again may help
    assert "rank 1, 2 of 3 (this is rank 0) has not come" in error and "startup_timeout_s" in error
