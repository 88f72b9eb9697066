"""The checks of a rank by itself, and the all-reduce of all."""

import os
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from data_pipeline.corpus import open_mixture
from data_pipeline.errors import InputError
from data_pipeline.tokenizer import load_tokenizer
from kernels import triton_obstacle
from training import distributed
from training.config import RunConfig
from training.speed import obstacles

GIB = 1 << 30
# Large enough that bandwidth, not latency, decides.
ALL_REDUCE_BYTES = {"cuda": 256 << 20, "cpu": 16 << 20}
ROUNDS = 5


@dataclass
class RankReport:
    """What one rank found: `problems` are its node's, `wrong` is a setting's.

    notes: what ends nothing.
    """

    rank: int
    node: str
    device: str = ""
    free_gib: float = 0.0
    """Free space of output_dir; 0 on ranks that do not check it."""
    index: str = ""
    started: float = 0.0
    """Of rank 0: its clock when it gave the sign to compare; of others, 0."""
    seen: float = 0.0
    """The rank's clock when it saw that sign."""
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    wrong: str = ""


def check_node(report: RankReport, config: RunConfig) -> torch.device:
    """This rank's own checks, those of the file system once per node; returns its device."""
    devices = [torch.device("cpu")]

    def check() -> None:
        on_cpu = config.train.device == "cpu"
        if not on_cpu and (problem := distributed.unseen_gpus()):
            report.problems.append(problem.partition(": ")[2])  # its node is named anyway
            return
        devices.append(distributed.local_device(int(os.environ.get("LOCAL_RANK", 0)), on_cpu))
        check_device(report, devices[-1])

    within(15, "device", check, report)
    if devices[-1].type == "cuda":
        pools = config.model.projector.method == "pool"
        impl = config.train.projector_impl if pools else "torch"
        what = "trial launch of a Triton kernel"
        within(15, what, lambda: check_projector(report, devices[-1], impl), report)
    for setting, obstacle in obstacles(config, devices[-1]):
        report.problems += [f"{setting}: {obstacle}"] if obstacle else []
    if os.environ.get("LOCAL_RANK", "0") == "0":
        folder = config.output_dir
        within(5, f"output_dir {folder}", lambda: check_folder(report, folder), report)
        within(15, "index of data.shards", lambda: check_index(report, config), report)
    return devices[-1]


def within(seconds: float, what: str, check: Callable[[], object], report: RankReport) -> None:
    """Run a check in a thread, since a broken file system or driver never returns."""

    def run() -> None:
        try:
            check()
        except InputError as error:
            report.wrong = report.wrong or str(error)
        except Exception as error:  # whatever a driver raises
            report.problems.append(f"{what}: {error or type(error).__name__}")

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        report.problems.append(f"{what}: no answer within {seconds:.0f} s")


def check_device(report: RankReport, device: torch.device) -> None:
    """Compute on this rank's GPU."""
    if device.type == "cpu":
        report.device = "CPU"
        return
    torch.cuda.set_device(device)  # this thread's
    ones = torch.ones(512, 512, device=device)
    if float((ones @ ones).sum()) != 512.0**3:
        raise RuntimeError("a matrix product came out wrong")
    free, total = torch.cuda.mem_get_info(device)
    report.device = f"{torch.cuda.get_device_name(device)} {device.index}"
    if free < 0.9 * total:
        report.problems.append(
            f"{device} has {free / GIB:.1f} of {total / GIB:.1f} GiB free: another program uses it"
        )


def check_projector(report: RankReport, device: torch.device, setting: str) -> None:
    """Launch one of the projector's kernels, if it is to run them on this rank's GPU."""
    if device.type == "cpu" or setting == "torch":
        return
    torch.cuda.set_device(device)  # this thread's
    if not (obstacle := triton_obstacle(device)):
        return
    if setting == "triton":
        report.problems.append(f"train.projector_impl is 'triton', but {obstacle}")
    else:
        report.notes.append(f"all ranks would run the projector in plain PyTorch: {obstacle}")


def check_folder(report: RankReport, folder: Path) -> None:
    """Write to output_dir and look at its free space."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".preflight-") as file:
        file.write(b"x")
        file.flush()
        os.fsync(file.fileno())
    state = os.statvfs(folder)
    report.free_gib = state.f_bavail * state.f_frsize / GIB


def check_index(report: RankReport, config: RunConfig) -> None:
    """Load the index of every training shard, as training would."""
    data = config.data
    if data.prepare and not data.prepare.out.exists():
        report.index = "written at the start"
        return
    mixture = open_mixture(data, load_tokenizer(data.tokenizer), data.sources)
    report.index = f"{len(mixture)} samples"


def all_reduce(
    store: dist.Store, rank: int, world_size: int, device: torch.device, timeout_s: float
) -> str:
    """Time an all-reduce of all ranks; returns a line that says how fast it was."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # this thread's
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("group", store),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
    )
    size = ALL_REDUCE_BYTES[device.type]
    tensor = torch.ones(size // 4, device=device)
    dist.all_reduce(tensor)
    if float(tensor[-1]) != world_size:
        raise RuntimeError(f"the sum of {world_size} ones came out as {float(tensor[-1])}")
    started = time.perf_counter()
    for _ in range(ROUNDS):
        dist.all_reduce(tensor.fill_(1.0))
    float(tensor[-1])  # waits for the GPU
    seconds = (time.perf_counter() - started) / ROUNDS
    bus = 2 * (world_size - 1) / world_size * size / seconds / 1e9
    return (
        f"all-reduce of {size >> 20} MiB over {world_size} ranks ({backend}): "
        f"{1000 * seconds:.1f} ms, bus bandwidth {bus:.2f} GB/s"
    )
