"""Persistent groups of gloo ranks, so that many multi-rank tests share one start-up."""

import multiprocessing
import multiprocessing.forkserver
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


class RankPool:
    """`world_size` processes in one process group that run test functions side by side."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.connections: list[Connection] = []
        self.processes: list[Any] = []

    def run(self, function: Callable[..., Any], *args: Any, timeout_s: float = 180.0) -> list[Any]:
        """Call `function(ranks, *args)` on every rank; returns the results in rank order.

        A rank that raises, dies or takes longer than `timeout_s` fails the test; the group is then
        started anew for the next one.
        """
        if not self.processes:
            self._start()
        for connection in self.connections:
            connection.send((function, args))
        results, errors = [], []
        for rank, connection in enumerate(self.connections):
            if not connection.poll(timeout_s if not errors else 5.0):
                errors.append(f"rank {rank} did not answer within {timeout_s} s")
                continue
            try:
                ok, value = connection.recv()
            except EOFError:
                errors.append(f"rank {rank} died")
                continue
            results.append(value) if ok else errors.append(f"rank {rank}: {value}")
        if errors:
            self.close()
            raise AssertionError("\n".join(errors))
        return results

    def _start(self) -> None:
        context = forkserver()
        port = free_port()
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, rank, self.world_size, port), daemon=True
            )
            process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.connections, self.processes = [], []


# Imported once, in the process that ranks are forked from: for each anew it takes half a minute.
PRELOAD = [
    "training.train",
    "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.zero.muon.original_muon",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.siglip.modeling_siglip",
]


def free_port() -> int:
    """A port for MASTER_PORT."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def forkserver() -> Any:
    """The context that makes ranks; their parent sees no GPU and has imported the trainer."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    hidden = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    before = {name: os.environ.get(name) for name in hidden}
    os.environ |= hidden
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    return context


def _serve(connection: Connection, rank: int, world_size: int, port: int) -> None:
    """A rank's process: answer calls until the test session ends."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    from training.zero3.process_group import init_distributed, quiet_libraries

    quiet_libraries()
    ranks = init_distributed(timeout_s=120)
    while True:
        try:
            function, args = connection.recv()
        except EOFError:
            return
        try:
            connection.send((True, function(ranks, *args)))
        except BaseException:
            connection.send((False, traceback.format_exc()))
