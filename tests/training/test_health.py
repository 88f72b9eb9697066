"""Stop requests, hung ranks, timeouts, and losses that are not finite."""

import json
import math
import multiprocessing
import os
import pty
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.ranks import RankPool
from tests.training import hang, health_scenarios
from tests.training.scenarios import tiny_config
from training.config import FaultSettings
from training.distributed import Ranks
from training.exit_codes import PREEMPTED, STUCK
from training.goodput import summarize
from training.health.loss_guard import LossGuard
from training.health.monitor import Monitor
from training.health.preemption import SIGNALS, StopRequest
from training.health.suspects import WAITING, describe
from training.run import Run

ONE = Ranks(0, 1, 0, torch.device("cpu"))


# Stop requests


@pytest.fixture
def handlers() -> Iterator[None]:
    """Puts the signal handlers back that a stop request leaves ignored."""
    earlier = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in earlier.items():
        signal.signal(number, handler)


INTERRUPTED = """
import os, signal, sys, time
from training.health.preemption import AGAIN_S, StopRequest

with StopRequest() as stop:
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)  # as a launcher passes it on
    assert stop.requested
    print("noted", flush=True)
    time.sleep(1.2 * AGAIN_S)
    os.kill(os.getpid(), signal.SIGINT)
    print("still there", flush=True)
"""

HUNG_UP = """
import os, signal, sys
from training.health.preemption import StopRequest

with StopRequest() as stop:
    open(sys.argv[1] + ".ready", "w").close()
    signal.pause()
    print("a word to nobody", flush=True)
    open(sys.argv[1], "w").write(f"saved after {stop.reason}")
"""

IGNORED = """
import os, signal
from training.health.preemption import StopRequest

with StopRequest() as stop:
    os.kill(os.getpid(), signal.SIGHUP)
    assert not stop.requested
"""


def test_a_second_interrupt_ends_at_once() -> None:
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True)
    assert done.returncode == -signal.SIGINT and done.stdout == "noted\n"
    assert "SIGINT: stopping at the next step boundary; Ctrl-C again ends at once" in done.stderr


def test_a_terminal_that_is_gone_does_not_end_a_run_before_it_saves(tmp_path: Path) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-c", HUNG_UP, str(tmp_path / "saved")])
    deadline = time.monotonic() + 120
    while not (tmp_path / "saved.ready").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(0.2)
    os.close(terminal)  # the kernel sends SIGHUP, and every write there fails
    while not (ended := os.waitpid(pid, os.WNOHANG))[0] and time.monotonic() < deadline:
        time.sleep(0.1)
    assert ended[0] == pid and os.waitstatus_to_exitcode(ended[1]) == 0
    assert (tmp_path / "saved").read_text() == "saved after SIGHUP"


def test_what_nohup_ignores_stays_ignored() -> None:
    ignored = f"import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n{IGNORED}"
    assert subprocess.run([sys.executable, "-c", ignored]).returncode == 0


@pytest.mark.parametrize("first", SIGNALS)
def test_a_signal_is_noted_and_a_second_does_nothing(
    handlers: None, capfd: pytest.CaptureFixture[str], first: signal.Signals
) -> None:
    with StopRequest() as stop:
        assert not stop.requested and not stop()
        os.kill(os.getpid(), first)
        assert stop() and stop.requested and stop.reason == first.name
        for number in SIGNALS:
            os.kill(os.getpid(), number)
        assert stop.reason == first.name
    os.kill(os.getpid(), signal.SIGTERM)  # while the process ends: its exit code must stay
    text = capfd.readouterr().err
    assert f"{first.name}: stopping at the next step boundary" in text
    assert f"SIGTERM again: already stopping after {first.name}" in text


STARTING = """
import datetime, os, signal, sys, threading, torch.distributed
from training.health.preemption import StopRequest
from training.health.slow_start import SlowStart

store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
number = signal.Signals[sys.argv[1]]
with StopRequest() as stop, SlowStart(wait_s=float(sys.argv[2])) as start:
    threading.Timer(0.5, os.kill, (os.getpid(), number)).start()
    try:
        # As in a collective: no handler runs meanwhile.
        store.wait(["never"], datetime.timedelta(seconds=float(sys.argv[3])))
    except torch.distributed.DistStoreError:
        pass
    start.over()
    os.kill(os.getpid(), signal.SIGUSR1)
    print("noted", stop.reason, signal.set_wakeup_fd(-1), flush=True)
"""


@pytest.mark.parametrize("number", ["SIGUSR1", "SIGTERM"])
def test_a_start_that_waits_for_others_ends_after_a_signal(number: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STARTING, number, "0.2", "100"], capture_output=True, text=True
    )
    assert done.returncode == PREEMPTED and not done.stdout, done.stderr
    assert f"{number}: asked to stop while the run was starting" in done.stderr


def test_a_start_that_is_over_soon_leaves_it_to_the_first_step() -> None:
    done = subprocess.run(
        [sys.executable, "-c", STARTING, "SIGTERM", "100", "1"], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout == "noted SIGTERM -1\n", done.stderr


def test_without_a_signal_the_handlers_are_put_back(handlers: None) -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopRequest():
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.multiprocess
def test_ranks_agree_to_stop_if_one_was_asked(two_ranks: RankPool) -> None:
    results = two_ranks.run(health_scenarios.stop_one_rank)
    assert results == [(False, True, False), (False, True, True)]


@pytest.mark.multiprocess
def test_evaluation_is_left_by_all_ranks_together(two_ranks: RankPool, digits_corpus: Path) -> None:
    for result in two_ranks.run(health_scenarios.stop_in_evaluation, digits_corpus):
        assert result == (True, 3, True, True)


class StuckData:
    """A loader whose packs, or whose windows, stop coming after `good` of them."""

    def __init__(self, corpus: Path, where: str, good: int, monkeypatch: Any) -> None:
        self.run = Run(tiny_config(corpus, "data.loader.prefetch_steps=1"), ONE)
        self.release, self.left = threading.Event(), good
        target, name = (
            (self.run.loader._builder, "build")
            if where == "pack"
            else (self.run.loader._planner, "windows")
        )
        real = getattr(target, name)

        def build(pack: Any) -> Any:
            self._pass()
            return real(pack)

        def windows(state: Any) -> Any:
            for window in real(state):
                self._pass()
                yield window

        monkeypatch.setattr(target, name, build if where == "pack" else windows)

    def _pass(self) -> None:
        self.left -= 1
        if self.left < 0:
            self.release.wait(60)


@pytest.mark.parametrize("where", ["pack", "plan"])
def test_waiting_for_data_that_does_not_come_notices_the_stop(
    digits_corpus: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    stuck = StuckData(digits_corpus, where, 4, monkeypatch)
    stop = threading.Event()
    batches = stuck.run.loader.steps(stop=stop.is_set)
    try:
        first = next(batches, None)
        assert first is not None and first.packs
        timer = threading.Timer(0.5, stop.set)
        timer.start()
        began = time.monotonic()
        assert len(list(islice(batches, 100))) < 100  # those that were ready; then it ends
        assert 0.2 < time.monotonic() - began < 5.0
    finally:
        stuck.release.set()
        batches.close()


def test_a_stop_does_not_hold_back_steps_that_are_ready(digits_corpus: Path) -> None:
    loader = Run(tiny_config(digits_corpus), ONE).loader
    expected, found = loader.steps(), loader.steps(stop=lambda: False)
    for _ in range(3):
        one, other = next(expected), next(found)
        assert one.state == other.state
        assert [p.sample_ids for p in one.packs] == [p.sample_ids for p in other.packs]
    expected.close()
    found.close()


# Hung ranks

HANGS = ("stopped", "reading", "gil", "evaluating", "timeout")


class Hang:
    """Two ranks of which the second hangs `how`."""

    def __init__(self, context: Any, folder: Path, how: str) -> None:
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            port = server.getsockname()[1]
        self.folder = folder / how
        arguments = [(self.folder, how, rank, port) for rank in range(2)]
        self.ranks = [context.Process(target=hang.main, args=args) for args in arguments]
        for rank in self.ranks:
            rank.start()

    def finish(self, rank: int) -> tuple[int, str, str]:
        """The rank's exit code, and what it said on stdout and stderr."""
        self.ranks[rank].join(timeout=60)
        out, error = ((self.folder / f"{name}-{rank}").read_text() for name in ("out", "err"))
        return self.ranks[rank].exitcode, out, error


@pytest.fixture(scope="module")
def hangs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Hang]]:
    """All of them side by side, for they mostly wait; forked from a process that has imported."""
    folder = tmp_path_factory.mktemp("hangs")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.training.hang"])
    started = {how: Hang(context, folder, how) for how in HANGS}
    yield started
    for hung in started.values():
        for rank in hung.ranks:
            rank.kill()


def waited(error: str) -> float:
    """The seconds without progress that the message names."""
    return float(error.split("made no progress for ")[1].split()[0])


@pytest.mark.multiprocess
def test_a_stopped_rank_is_named_by_the_other(hangs: dict[str, Hang]) -> None:
    code, _, error = hangs["stopped"].finish(0)
    assert code == STUCK, error
    assert "error: rank 0 on" in error and "in step 4 (steps)" in error
    assert f"raise faults.step_timeout_s ({hang.FAULTS.step_timeout_s:g})" in error
    blame = error.split("No longer alive: ")[1]
    pid = hangs["stopped"].ranks[1].pid
    assert blame.startswith(
        f"rank 1 on {socket.gethostname()} (process {pid}), last seen in step 4 (da"
    )
    assert waited(error) <= hang.FAULTS.step_timeout_s + 2
    assert hangs["stopped"].ranks[1].exitcode is None  # it cannot speak for itself
    stacks = (hangs["stopped"].folder / "stacks-rank-00000.txt").read_text()
    assert "in all_reduce" in stacks and "in train" in stacks and "watchdog.py" in stacks


@pytest.mark.multiprocess
def test_a_rank_that_hangs_alone_is_named_by_both_and_shows_where(hangs: dict[str, Hang]) -> None:
    for rank in range(2):
        code, _, error = hangs["reading"].finish(rank)
        if code != STUCK:  # the other one's end has broken the connection first
            assert rank == 0 and hangs["reading"].finish(1)[0] == STUCK, error
            continue
        assert "The others wait for rank 1" in error, error
        assert "in step 4 (data_wait), in hang.py:" in error
        assert "read_a_shard_that_never_comes" in error
    stacks = hangs["reading"].folder / "stacks-rank-00001.txt"
    assert "read_a_shard_that_never_comes" in stacks.read_text()


@pytest.mark.multiprocess
def test_a_rank_whose_c_code_holds_the_gil_is_ended_too(hangs: dict[str, Hang]) -> None:
    code, _, error = hangs["gil"].finish(1)
    assert code == 1  # a crash, which a launcher starts again, too
    assert "Timeout" in error and "never_let_go" in error
    assert "No longer alive: rank 1" in hangs["gil"].finish(0)[2]


@pytest.mark.multiprocess
def test_a_phase_that_may_take_long_is_left_alone(hangs: dict[str, Hang]) -> None:
    assert hang.FAULTS.step_timeout_s + 1 < hang.SLOW_S
    for rank in range(2):
        code, out, error = hangs["evaluating"].finish(rank)
        assert (code, out) == (0, "done\n"), error
    report = json.loads((hangs["evaluating"].folder / "rank-00001.json").read_text())
    assert report["rank"] == 1 and report["host"] == socket.gethostname()


@pytest.mark.multiprocess
def test_the_timeout_holds_for_every_process_group(hangs: dict[str, Hang]) -> None:
    code, out, error = hangs["timeout"].finish(0)
    assert code == 0, error
    seconds = [float(text) for text in out.split()]
    assert len(seconds) == 2 and all(1.5 < value < 4.0 for value in seconds), out


def report(rank: int, step: int, place: str = "a.py:1 f", **more: float) -> dict[str, Any]:
    row = {"rank": rank, "host": f"n{rank}", "pid": 7, "step": step, "phase": "steps"}
    return row | {"time": 100.0, "alive": 100.0, "place": place} | more


@pytest.mark.parametrize(
    ("reports", "expected"),
    [
        pytest.param([report(0, 9)], "No sign of life from rank 1; rank 2", id="no file"),
        pytest.param(
            [report(0, 9), report(1, 9, alive=60.0), report(2, 9)],
            "No longer alive: rank 1 on n1 (process 7), last seen in step 9 (steps), a.py",
            id="stopped",
        ),
        pytest.param(
            [report(0, 9, WAITING + "x"), report(1, 9, WAITING + "x"), report(2, 9)],
            "The others wait for rank 2 on n2",
            id="not in a collective",
        ),
        pytest.param(
            [report(0, 9), report(1, 8), report(2, 9)], "Furthest behind: rank 1", id="behind"
        ),
        pytest.param(
            [report(0, 9, time=90.0), report(1, 9, time=80.0), report(2, 9)],
            "All ranks are in step 9; longest without progress: rank 1",
            id="all the same",
        ),
    ],
)
def test_the_suspect_is_named(reports: list[dict[str, Any]], expected: str) -> None:
    by_rank = {row["rank"]: row for row in reports}
    assert describe(by_rank, 3, now=101.0, silent_after_s=5.0).startswith(expected)


# All together


def test_the_monitor_waits_longer_where_a_phase_may_take_long(
    tmp_path: Path, digits_corpus: Path, monkeypatch: pytest.MonkeyPatch, handlers: None
) -> None:
    timeouts: list[float] = []
    monkeypatch.setattr("training.health.monitor.set_timeout", timeouts.append)
    settings = ["faults.startup_timeout_s=900", "faults.step_timeout_s=100"]
    config = tiny_config(digits_corpus, f"output_dir={tmp_path}", *settings)
    with Monitor(config, ONE) as monitor:
        monitor.ready(10)
        assert monitor.watchdog.timeout_s == 900
        with monitor.phase("data_wait"):
            pass
        monitor.step_done(11)
        assert monitor.watchdog.timeout_s == 100
        with monitor.phase("checkpoint_stall"):
            assert monitor.watchdog.timeout_s == 900
        with monitor.phase("data_wait"):
            assert monitor.watchdog.timeout_s == 100
        os.kill(os.getpid(), signal.SIGUSR1)
        with monitor.phase("evaluation"):
            assert monitor.between_batches()()
        monitor.outcome = "preempted"
    # Longer than the watchdog's, so that it speaks first.
    assert [round(seconds, -2) for seconds in timeouts] == [900, 100, 900, 100, 900, 100]
    assert all(seconds > round(seconds, -2) for seconds in timeouts)
    summary = summarize(tmp_path)
    assert [process.reason for process in summary.processes] == ["preempted"]
    assert (summary.processes[0].first_step, summary.processes[0].last_step) == (10, 11)
    assert summary.stalls == 1


def test_the_monitor_records_what_ended_a_run(tmp_path: Path, digits_corpus: Path) -> None:
    config = tiny_config(digits_corpus, f"output_dir={tmp_path}")
    with pytest.raises(ZeroDivisionError), Monitor(config, ONE):
        raise ZeroDivisionError
    assert summarize(tmp_path).processes[0].reason == "ZeroDivisionError"


# Losses that are not finite, or leap


class Engine:
    """Counts steps; what an engine would say of the gradients' norm."""

    def __init__(self, norm: float) -> None:
        self.norm, self.steps = norm, 0

    def step(self) -> float:
        self.steps += 1
        return self.norm


@pytest.mark.parametrize(("cap", "stops"), [(0, [True]), (2, [False, False, True])])
def test_steps_are_left_out_up_to_the_cap(cap: int, stops: list[bool]) -> None:
    guard = LossGuard(FaultSettings(max_skipped_steps=cap))
    verdicts = [guard.update(Engine(math.inf), 1.0) for _ in stops]
    assert [verdict.stop for verdict in verdicts] == stops
    assert all(verdict.fault == "the gradient norm is inf" for verdict in verdicts)
    good = Engine(0.5)
    assert guard.update(good, 1.0).fault is None
    assert good.steps == 1 and guard.skipped == len(stops)


def test_the_cap_holds_over_restarts() -> None:
    guard = LossGuard(FaultSettings(max_skipped_steps=2))
    guard.restore([{"loss": 1.0, "skipped_steps": 1}, {"loss": math.nan, "skipped_steps": 2}])
    assert guard.update(Engine(math.nan), 1.0).stop


def test_a_leap_of_the_loss_is_reported_once() -> None:
    guard = LossGuard(FaultSettings())
    rng = np.random.default_rng(0)
    for loss in 2.0 + 0.1 * rng.standard_normal(300):
        assert guard.spike(float(loss)) is None
    message = guard.spike(9.0)
    assert message is not None and message.startswith("the loss is 9, ")
    assert "mean of the last 100 steps" in message
    assert guard.spike(2.0) is None


@pytest.mark.parametrize(
    ("settings", "earlier", "loss"),
    [
        pytest.param({}, [2.0] * 19, 9.0, id="too few to compare with"),
        pytest.param({"spike_sigma": 0.0}, [2.0] * 99, 9.0, id="off"),
        pytest.param({}, [2.0] * 99, 2.0001, id="rounding"),
        pytest.param({}, [2.0] * 99, math.nan, id="not finite"),
    ],
)
def test_no_leap_is_reported(settings: dict, earlier: list[float], loss: float) -> None:
    guard = LossGuard(FaultSettings(**settings))
    assert [guard.spike(value) for value in [*earlier, loss]] == [None] * (len(earlier) + 1)


def test_losses_that_are_not_finite_do_not_spoil_the_mean() -> None:
    guard = LossGuard(FaultSettings())
    for loss in [2.0, 2.1, math.nan, math.inf] * 25:
        guard.spike(loss)
    assert guard.spike(9.0) is not None


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("precision", "harms"),
    [("fp32", ["nan loss", "infinite loss", "infinite gradient"]), ("bf16", ["infinite gradient"])],
)
def test_a_step_left_out_changes_nothing_then_or_later(
    two_ranks: RankPool, digits_corpus: Path, precision: str, harms: list[str]
) -> None:
    """Parameters, moments and Adam's step count, whole, bitwise; two packs per rank."""
    overrides = [f"train.precision={precision}", "data.pack.packs_per_step=4"]

    def run(make_harmed: bool) -> list[Any]:
        steps = health_scenarios.steps_with_harm
        return two_ranks.run(steps, digits_corpus, harms, make_harmed, overrides)

    reference, _ = run(False)[0]
    for states, faults in run(True):
        assert [fault is None for fault in faults] == [True, *(False for _ in harms), True]
        first, last = states[0], states[-1]
        for harm, state in zip(harms, states[1:-1], strict=True):
            assert all(np.array_equal(first[name], state[name]) for name in first), harm
        assert all(np.array_equal(reference[-1][name], last[name]) for name in first)
        assert sum(not np.array_equal(first[name], last[name]) for name in first) > 100
