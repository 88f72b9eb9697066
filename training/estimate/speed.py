"""How long a step may take, calculated: FLOPs, bytes over links, the optimizer's traffic."""

from dataclasses import dataclass

from data_pipeline.errors import InputError
from kernels.gpu_datasheets import GPUS, GpuDatasheet
from training.estimate.rank_memory import MemoryModel
from training.estimate.workload import Workload

_ADAM_BYTES = 32
"""Per weight: master and two moments read and written, gradient read, weight written."""
_ADAM_STATE = 8
"""Of it the two moments, once; other optimizers have less."""
_OFFLOAD_BYTES = 6
"""Per weight over PCIe with the optimizer on the host: fp32 gradient out, bf16 weight in."""
_HOST_BYTES_PER_S = 200e9


@dataclass(frozen=True)
class Cluster:
    """Nodes of equal GPUs.

    gpus: of a node. efficiency: part of the peak that matrix products and attention reach.
    network_gb_per_s, pcie_gb_per_s: of each GPU, in one direction.
    """

    gpu: GpuDatasheet
    gpus: int
    nodes: int
    efficiency: float = 0.5
    network_gb_per_s: float = 50.0
    pcie_gb_per_s: float = 25.0

    @property
    def ranks(self) -> int:
        """GPUs of all nodes."""
        return self.gpus * self.nodes


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step and what they come from.

    link_bytes, network_bytes: that a GPU sends over the links of its node, and its share of what
    leaves the node. binds: what a step would be shorter without.
    """

    compute_s: float
    link_s: float
    network_s: float
    optimizer_s: float
    link_bytes: float
    network_bytes: float
    tokens_per_s: float
    mfu: float

    @property
    def step_s(self) -> float:
        """Collectives hide behind compute, or compute behind them; the optimizer comes after."""
        return max(self.compute_s, self.link_s, self.network_s) + self.optimizer_s

    @property
    def binds(self) -> str:
        """What takes longest."""
        parts = {
            "compute": self.compute_s,
            "links of a node": self.link_s,
            "network": self.network_s,
            "optimizer": self.optimizer_s,
        }
        return max(parts, key=lambda name: parts[name])


def step_time(
    cluster: Cluster,
    ranks: int,
    memory: MemoryModel,
    work: Workload,
    packs_per_step: int,
    weights: float,
) -> StepTime:
    """A step of `packs_per_step` mean packs on so many GPUs like the cluster's, on full nodes.

    weights: those that train.
    """
    gpu, on_node = cluster.gpu, min(ranks, cluster.gpus)
    packs = packs_per_step / ranks
    peak = gpu.bf16_tflops * 1e12
    compute = packs * work.flops.hardware / (peak * cluster.efficiency)
    sent = packs * (memory.gathered + memory.reduced) * (ranks - 1) / ranks
    outside = sent / on_node if ranks > on_node else 0.0
    update = _update_bytes(memory)
    optimizer = update * weights / ranks / (gpu.tb_per_s * 1e12)
    if memory.offload_optimizer:
        optimizer = weights / ranks * _OFFLOAD_BYTES / (cluster.pcie_gb_per_s * 1e9)
        # All GPUs of a node share its memory.
        optimizer += update * weights / ranks * on_node / _HOST_BYTES_PER_S
    link = sent / (gpu.link_gb_per_s * 1e9)
    network = outside / (cluster.network_gb_per_s * 1e9)
    seconds = max(compute, link, network) + optimizer
    return StepTime(
        compute,
        link,
        network,
        optimizer,
        sent,
        outside,
        packs_per_step * work.tokens / seconds,
        packs * work.flops.model / (peak * seconds),
    )


def _update_bytes(memory: MemoryModel) -> float:
    """Per weight that trains; what Muon computes with is not counted."""
    masters, state = memory.resident["masters"], memory.resident["optimizer"]
    held = min(4 * state / masters, _ADAM_STATE) if masters and state else _ADAM_STATE
    return _ADAM_BYTES - 2 * (_ADAM_STATE - held)


def gpu_named(key: str) -> GpuDatasheet:
    """The GPU that a user names; InputError, naming all, where none is known of that name."""
    for gpu in GPUS:
        if key.lower() in (gpu.key, gpu.name.lower()):
            return gpu
    known = ", ".join(gpu.key for gpu in GPUS)
    raise InputError(f"no GPU {key!r} is known; give one of {known}")
