"""The record of where time goes: it adds up, survives kills, and counts repeated steps as lost."""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.errors import InputError
from training.distributed import Ranks
from training.goodput import PHASES, Goodput, summarize, table
from training.goodput import recorder as record
from training.goodput.__main__ import main

RANKS = Ranks(0, 2, 0, torch.device("cpu"))


class Clock:
    """Stands in for the clocks of record.py; `jump` moves the wall clock only."""

    def __init__(self) -> None:
        self.now, self.wall = 1000.0, 1_700_000_000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.wall

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.wall += seconds

    def jump(self, seconds: float) -> None:
        self.wall += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(record, "time", clock)
    return clock


@contextmanager
def started(run: Path, clock: Clock, step: int, startup_s: float = 10.0) -> Iterator[Goodput]:
    """A process that has started up and goes on after `step`; killed when the block ends."""
    goodput = Goodput(run, RANKS, since=clock.time())
    clock.sleep(startup_s)
    goodput.ready(step)
    yield goodput


def train(goodput: Goodput, clock: Clock, steps: range, save_every: int = 5) -> None:
    """Steps of 2 s that wait 0.5 s for data, and saves of 1 s."""
    for step in steps:
        with goodput.phase("data_wait"):
            clock.sleep(0.5)
        clock.sleep(2.0)
        goodput.step(step)
        if step % save_every == 0:
            with goodput.phase("checkpoint_stall"):
                clock.sleep(1.0)


def killed_and_resumed(run: Path, clock: Clock) -> None:
    """Killed in step 9 (saved at 5), 40 s until the next start, which ends at step 10."""
    with started(run, clock, 0) as goodput:
        train(goodput, clock, range(1, 9))
        clock.sleep(0.7)  # of step 9, which nobody learns of
    clock.sleep(40.0)
    with started(run, clock, 5) as goodput:
        train(goodput, clock, range(6, 11))
        with goodput.phase("evaluation"):
            clock.sleep(7.0)
        with goodput.phase("other"):
            clock.sleep(3.0)
        goodput.end("finished")


def test_the_parts_add_up_to_the_wall_time(tmp_path: Path, clock: Clock) -> None:
    began = clock.wall
    killed_and_resumed(tmp_path, clock)
    seconds = summarize(tmp_path).seconds
    assert sum(seconds.values()) == pytest.approx(clock.wall - began, abs=0.01)
    expected = {
        "startup": 20.0,
        "steps": 2.0 * 10,
        "lost": 2.0 * 3,  # steps 6, 7 and 8 were done twice
        "data_wait": 0.5 * 13,
        "checkpoint_stall": 1.0 * 2,
        "evaluation": 7.0,
        "restart": 40.7,
        "other": 3.0,
    }
    assert seconds == pytest.approx(expected, abs=0.01)


def test_a_process_killed_before_its_first_step_loses_nothing(tmp_path: Path, clock: Clock) -> None:
    with started(tmp_path, clock, 0) as goodput:
        train(goodput, clock, range(1, 11))
        goodput.end("preempted")
    Goodput(tmp_path, RANKS, since=clock.time())  # killed in its start-up
    clock.sleep(5.0)
    with started(tmp_path, clock, 10) as goodput:
        train(goodput, clock, range(11, 13))
        goodput.end("finished")
    summary = summarize(tmp_path)
    assert summary.seconds["lost"] == pytest.approx(0.0, abs=0.01)
    assert summary.seconds["steps"] == pytest.approx(2.0 * 12, abs=0.01)
    assert [p.reason for p in summary.processes] == ["preempted", "killed", "finished"]
    assert summary.failures == 1


def test_falling_back_to_an_older_checkpoint_loses_the_work_of_several_processes(
    tmp_path: Path, clock: Clock
) -> None:
    for first, last in ((0, 10), (10, 20), (5, 6)):
        with started(tmp_path, clock, first) as goodput:
            train(goodput, clock, range(first + 1, last + 1))
            goodput.end("RuntimeError")
    processes = summarize(tmp_path).processes
    lost = [process.seconds["lost"] for process in processes]
    assert lost == pytest.approx([2.0 * 5, 2.0 * 10, 0.0], abs=0.01)


@pytest.mark.parametrize("jump", [-3600.0, 3600.0])
def test_a_clock_that_jumps_in_a_process_changes_no_duration(
    tmp_path: Path, clock: Clock, jump: float
) -> None:
    with started(tmp_path, clock, 0) as goodput:
        train(goodput, clock, range(1, 4))
        clock.jump(jump)
        train(goodput, clock, range(4, 7))
        goodput.end("finished")
    assert summarize(tmp_path).wall_s == pytest.approx(10 + 6 * 2.5 + 1, abs=0.01)


def test_a_clock_set_back_between_processes_leaves_no_negative_restart(
    tmp_path: Path, clock: Clock
) -> None:
    with started(tmp_path, clock, 0) as goodput:
        train(goodput, clock, range(1, 4))
        goodput.end("preempted")
    clock.jump(-3600.0)
    with started(tmp_path, clock, 3) as goodput:
        train(goodput, clock, range(4, 7))
        goodput.end("finished")
    summary = summarize(tmp_path)
    assert all(value >= 0 for value in summary.seconds.values())
    assert summary.seconds["steps"] == pytest.approx(12.0, abs=0.01)


def test_young_and_daly(tmp_path: Path, clock: Clock) -> None:
    killed_and_resumed(tmp_path, clock)
    given = summarize(tmp_path, mtbf_s=3600.0).interval
    assert given is not None and not given.mtbf_measured
    assert given.seconds == pytest.approx(math.sqrt(2 * 1.0 * 3600) - 1.0, rel=1e-3)
    assert given.steps == round(given.seconds / 2.5)
    measured = summarize(tmp_path).interval
    assert measured is not None and measured.mtbf_measured
    assert measured.mtbf_s == pytest.approx(summarize(tmp_path).wall_s)  # one failure


def test_what_is_missing_for_an_interval_is_said(tmp_path: Path, clock: Clock) -> None:
    with started(tmp_path, clock, 0) as goodput:
        train(goodput, clock, range(1, 4))
        goodput.end("finished")
    text = table(summarize(tmp_path))
    assert "the run had not yet a checkpoint or a failure (or --mtbf-hours)" in text


def test_lines_cut_short_are_left_out(tmp_path: Path, clock: Clock) -> None:
    killed_and_resumed(tmp_path, clock)
    expected = summarize(tmp_path).seconds
    with (tmp_path / record.EVENTS).open("a") as file:
        event = json.loads((tmp_path / record.EVENTS).read_text().splitlines()[-1])
        for broken in (
            {"time": "noon"},
            {"step": None},
            {"seconds": 3},
            {"seconds": {"steps": ""}},
        ):
            file.write(json.dumps(event | broken) + "\n")
        file.write('{"event": "st')
    assert summarize(tmp_path).seconds == expected
    with started(tmp_path, clock, 10) as goodput:
        goodput.end("finished")
    assert len(summarize(tmp_path).processes) == 3


def test_ranks_but_the_first_record_nothing(tmp_path: Path) -> None:
    goodput = Goodput(tmp_path / "out", Ranks(1, 2, 1, torch.device("cpu")))
    goodput.ready(0)
    with goodput.phase("checkpoint_stall"):
        goodput.step(1)
    goodput.end("finished")
    assert not (tmp_path / "out").exists()


@pytest.mark.multiprocess
def test_a_process_killed_for_real_loses_at_most_a_second(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys, time; from pathlib import Path; import torch\n"
        "from training.distributed import Ranks; from training.goodput import Goodput\n"
        "goodput = Goodput(Path(sys.argv[1]), Ranks(0, 1, 0, torch.device('cpu')))\n"
        "goodput.ready(0)\n"
        "for step in range(1, 31): time.sleep(0.05); goodput.step(step)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    began = time.time()
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], env=os.environ, timeout=60)
    ended = time.time()
    Goodput(tmp_path, RANKS, since=time.time()).end("finished")
    killed = summarize(tmp_path).processes[0]
    assert killed.reason == "killed"
    # Its imports count as start-up; the system tells a process's start to the second.
    assert began - 1.1 <= killed.start <= began + 1.1
    assert killed.start + killed.wall_s >= ended - 2.5
    assert killed.last_step >= 10


def test_the_command_prints_a_table_and_draws_a_picture(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    killed_and_resumed(tmp_path, clock)
    main([str(tmp_path), "--failures-per-day", "24"])
    output = capsys.readouterr().out
    assert "killed" in output and "finished" in output and "(given)" in output
    assert "83.9 s = 34 steps" in output  # sqrt(2 * 1 s * 1 h) - 1 s
    assert (tmp_path / "goodput.png").read_bytes().startswith(b"\x89PNG")
    main([str(tmp_path), "--json"])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert set(PHASES) <= set(found["seconds"])
    assert found["wall_s"] == pytest.approx(sum(found["seconds"].values()))


def test_a_folder_without_a_record_and_a_rate_of_zero_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"goodput\.jsonl .*no record.*output_dir"):
        main([str(tmp_path)])
    with pytest.raises(InputError, match=r"--mtbf-hours is 0\.0.* above 0"):
        main([str(tmp_path), "--mtbf-hours", "0"])
