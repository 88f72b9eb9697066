"""The phases of a preflight: each rank reports, rank 0 judges, and no wait is without end."""

import json
import os
import socket
import sys
import time
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.text_table import text_table
from training import exit_codes
from training.config import RunConfig

if TYPE_CHECKING:
    from training.preflight.rank_checks import RankReport

BAD_NODE = 1
# Clocks further apart make times in logs and locks, and shards' modification times, misleading.
MAX_SKEW_S = 1.0
MARKER = ".preflight-shared"
# The shares of the time limit at which the phases end.
NODES_END, COMPARE_END, REDUCE_END = 0.6, 0.7, 0.9
NETWORK = "check NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME in slurm/site.sh, and the firewall"

Answers = dict[int, dict[str, Any]]


class Board:
    """A key-value store on rank 0 through which ranks report; no wait for it is without end.

    Args:
        timeout_s: seconds from now in which everything is to be over.

    Raises:
        RuntimeError: if rank 0 cannot be reached in the first phase.
    """

    def __init__(self, rank: int, world_size: int, timeout_s: float) -> None:
        from torch.distributed import TCPStore

        self.rank, self.world_size = rank, world_size
        self.started, self.timeout_s = time.monotonic(), timeout_s
        address, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), os.environ.get("MASTER_PORT", 0)
        if world_size == 1:  # whatever a shell has exported for other runs: there is nobody to meet
            address, port = "127.0.0.1", 0
        wait = timedelta(seconds=self.left(NODES_END))
        self.store = TCPStore(address, int(port), None, rank == 0, wait, wait_for_workers=False)

    def left(self, share: float) -> float:
        """Seconds until this share of the time limit is used up, 0.1 at least."""
        return max(self.started + share * self.timeout_s - time.monotonic(), 0.1)

    def put(self, key: str, value: Any) -> None:
        self.store.set(key, json.dumps(value))

    def get(self, key: str, share: float) -> Any:
        """The value at `key` once it is there; None if it does not come in time."""
        try:
            self.store.wait([key], timedelta(seconds=self.left(share)))
            return json.loads(self.store.get(key))
        except RuntimeError:  # not in time, or rank 0 is gone
            return None

    def gather(self, phase: str, share: float) -> Answers:
        """What the ranks reported in a phase, of those that did in time; when it was received."""
        answers: Answers = {}
        for rank in range(self.world_size):
            answer = self.get(f"{phase}/{rank}", share)
            if answer is not None:
                answers[rank] = answer | {"received": time.time()}
        return answers


def node_of(rank: int) -> str:
    """The node of any rank, where slurm/lib.sh has said it."""
    nodes = os.environ.get("JOB_NODES", "").split()
    return nodes[rank] if rank < len(nodes) else f"of rank {rank}"


def end_phase(board: Board, phase: str, share: float, report: "RankReport") -> int:
    """Hand in this rank's report; rank 0 judges all; returns its verdict, an exit status."""
    board.put(f"{phase}/{board.rank}", asdict(report) | {"sent": time.time()})
    if board.rank == 0:
        answers = board.gather(phase, share)
        verdict, problems = judge(phase, answers, board.world_size)
        for problem in problems:
            print(f"error: {problem}", file=sys.stderr, flush=True)
        board.put(f"{phase}/verdict", verdict)
    verdict = board.get(f"{phase}/verdict", 1.0)
    return BAD_NODE if verdict is None else verdict


def judge(phase: str, answers: Answers, world_size: int) -> tuple[int, list[str]]:
    """The exit status that the reports of a phase mean, and a line for every problem."""
    silent = [rank for rank in range(world_size) if rank not in answers]
    problems = [f"node {node_of(rank)}: rank {rank} gave no report ({phase})" for rank in silent]
    reports = list(answers.values())
    if phase == "nodes":
        print_table(reports)
        notes = [f"warning: node {r['node']}: {note}" for r in reports for note in r["notes"]]
        print(*dict.fromkeys(notes), sep="\n", end="\n" * bool(notes), flush=True)
        checked = [report for report in reports if report["index"] or report["wrong"]]
        wrong = [report for report in checked if report["wrong"]]
        if wrong and len(wrong) == len(checked):  # on every node: not the nodes are to blame
            return exit_codes.BAD_INPUT, [wrong[0]["wrong"], *problems]
        problems += [f"node {report['node']}: {report['wrong']}" for report in wrong]
    if phase == "compare":
        problems += [line for report in reports if (line := clock_problem(report, reports[0]))]
    problems += [f"node {r['node']}: {problem}" for r in reports for problem in r["problems"]]
    return BAD_NODE if problems else exit_codes.OK, list(dict.fromkeys(problems))


def print_table(reports: list[dict[str, Any]]) -> None:
    """One line per rank."""
    rows = [("node", "rank", "device", "free space", "index")]
    for report in reports:
        free = f"{report['free_gib']:.1f} GiB" if report["free_gib"] else ""
        device = report["device"] or "failed"
        rows.append((report["node"], str(report["rank"]), device, free, report["index"]))
    print(text_table(rows, left=(0, 2, 4)), flush=True)


def clock_problem(report: dict[str, Any], main: dict[str, Any]) -> str:
    """Whether a rank's clock is off, for sure: a message takes time, but arrives after it left."""
    ahead, behind = report["sent"] - report["received"], main["started"] - report["seen"]
    for seconds, word in ((ahead, "ahead of"), (behind, "behind")):
        if seconds > MAX_SKEW_S:
            return f"node {report['node']}: its clock is {seconds:.1f} s {word} {main['node']}'s"
    return ""


def compare(board: Board, report: "RankReport", folder: Path) -> None:
    """Look at the clock when rank 0 says so, and for the file that rank 0 has written."""
    marker = folder / MARKER
    if board.rank == 0:
        report.started = time.time()
        marker.write_text(str(report.started))
        board.put("start", [report.started, report.node])
    start = board.get("start", COMPARE_END)
    report.seen = time.time()
    if start is None:
        report.problems.append("rank 0 gave no start signal")
    elif not marker.is_file() or marker.read_text() != str(start[0]):
        report.problems.append(
            f"output_dir {folder} is not that of {start[1]}: all nodes must share it"
        )


def preflight(config: RunConfig, timeout_s: float) -> int:
    """All checks of this rank; returns the exit status, on every rank that of rank 0."""
    from training import distributed
    from training.preflight.rank_checks import RankReport

    rank, world_size, _ = distributed.rank_from_environment()
    report = RankReport(rank, os.environ.get("SLURMD_NODENAME") or socket.gethostname())
    try:
        board = Board(rank, world_size, timeout_s)
    except RuntimeError as error:
        print(
            f"error: node {report.node}: cannot reach rank 0 at {os.environ.get('MASTER_ADDR')}:"
            f"{os.environ.get('MASTER_PORT')} ({str(error).splitlines()[0]}); {NETWORK}",
            file=sys.stderr,
            flush=True,
        )
        return BAD_NODE
    status = run_phases(board, config, report)
    if status == exit_codes.OK:
        board.put(f"bye/{rank}", {})
        if rank == 0:  # the others still read the verdict from here
            board.gather("bye", 1.0)
            print(f"all is well after {time.monotonic() - board.started:.1f} s", flush=True)
    return status


def run_phases(board: Board, config: RunConfig, report: "RankReport") -> int:
    """One phase after the other, until one finds a problem; returns the exit status."""
    from training.preflight.rank_checks import all_reduce, check_node, within

    device = check_node(report, config)
    if status := end_phase(board, "nodes", NODES_END, report):
        return status
    compare(board, report, config.output_dir)
    status = end_phase(board, "compare", COMPARE_END, report)
    if board.rank == 0:
        (config.output_dir / MARKER).unlink()
    if status:
        return status

    def reduce() -> None:
        left = board.left(REDUCE_END)
        speed = all_reduce(board.store, board.rank, board.world_size, device, left)
        if board.rank == 0:
            print(speed, flush=True)

    within(board.left(REDUCE_END), f"all-reduce ({NETWORK})", reduce, report)
    return end_phase(board, "all-reduce", REDUCE_END + 0.05, report)
