"""The estimate as text, as a picture and as JSON."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_pipeline.errors import InputError
from data_pipeline.plotting import BLUE, picture
from data_pipeline.text_table import text_table
from training.config import LAYERED, RunConfig
from training.estimate.fitting import RESERVED, largest_that_fits, remedies, room
from training.estimate.rank_memory import MemoryModel
from training.estimate.speed import Cluster, StepTime, step_time
from training.estimate.workload import Workload

RANKS = tuple(2**power for power in range(11))
GIB = 2**30


@dataclass(frozen=True)
class Estimate:
    """All that was found for a config on a cluster."""

    config: RunConfig
    cluster: Cluster
    memory: MemoryModel
    work: Workload
    weights: float

    def packs(self, ranks: int) -> int:
        """Of a step on so many GPUs: as many as set, or the next multiple of the GPUs."""
        return -(-self.config.data.pack.packs_per_step // ranks) * ranks

    def time(self, ranks: int) -> StepTime:
        """Of a step on so many GPUs."""
        packs = self.packs(ranks)
        return step_time(self.cluster, ranks, self.memory, self.work, packs, self.weights)

    def check_fits(self) -> None:
        """InputError, saying what would help, where a GPU's memory does not hold it."""
        needed, fits = self.memory.on(self.cluster.ranks).peak, room(self.cluster)
        if needed <= fits:
            return
        changes = remedies(self.memory, self.config, self.cluster)
        raise InputError(
            f"the config needs {needed / GIB:.1f} GiB on each of {self.cluster.ranks} "
            f"{self.cluster.gpu.key}, which have {fits / GIB:.1f} for it; each of these would make "
            f"it fit: {'; '.join(changes) or 'none; take a larger GPU or a smaller model'}"
        )


def memory_table(estimate: Estimate) -> str:
    """Parts of a rank's memory at its peak."""
    parts = estimate.memory.on(estimate.cluster.ranks)
    rows = [("part", "GPU GiB", "host GiB")]
    kinds = sorted({*parts.device, *parts.host}, key=lambda kind: -parts.device[kind])
    small = [kind for kind in kinds if max(parts.device[kind], parts.host[kind]) < parts.peak / 1e4]
    for kind in (kind for kind in kinds if kind not in small):
        rows.append((kind, f"{parts.device[kind] / GIB:.2f}", f"{parts.host[kind] / GIB:.2f}"))
    rows.append(("all", f"{parts.peak / GIB:.2f}", f"{parts.host.total() / GIB:.2f}"))
    return text_table(rows)


def ranks_table(estimate: Estimate) -> str:
    """From one GPU to 1024."""
    rows = [("GPUs", "GPU GiB", "fits", "step s", "tokens/s", "MFU %", "binds")]
    more = False
    for ranks in _numbers(estimate):
        raised = estimate.packs(ranks) != estimate.config.data.pack.packs_per_step
        more |= raised
        peak, time = estimate.memory.on(ranks).peak, estimate.time(ranks)
        rows.append(
            (
                f"{ranks}{'*' if raised else ' '}",
                f"{peak / GIB:.1f}",
                "yes" if peak <= room(estimate.cluster) else "no",
                f"{time.step_s:.3g}",
                f"{time.tokens_per_s:,.0f}",
                f"{100 * time.mfu:.1f}",
                time.binds,
            )
        )
    note = "\n* with data.pack.packs_per_step raised to a multiple of the GPUs" if more else ""
    return text_table(rows, left=(6,)) + note


def _numbers(estimate: Estimate) -> list[int]:
    return sorted({*RANKS, estimate.cluster.ranks})


def checkpointing_ways(recomputed: tuple[str, ...]) -> tuple[str, str]:
    """The activation checkpointing that is set, and the other way that `other` stands for."""
    if recomputed == LAYERED:
        return "with activation checkpointing", "without"
    some = f" but of {recomputed[0]}" if recomputed else ""
    return f"without activation checkpointing{some}", "with it for all layers" if some else "with"


def text(estimate: Estimate) -> str:
    """The whole report."""
    cluster, memory, config = estimate.cluster, estimate.memory, estimate.config
    time = estimate.time(cluster.ranks)
    worst = max(estimate.work.worst, key=lambda pack: (pack.tokens, pack.tiles))
    lines = [
        f"packs: {estimate.work.source}; memory at {worst.tokens} tokens and {worst.tiles} tiles, "
        f"time at the mean of {estimate.work.tokens:.0f} tokens and "
        f"{estimate.work.flops.model / 1e12:.3g} TFLOP",
        "",
        f"memory of a rank at its peak, {cluster.ranks} x {cluster.gpu.key} "
        f"({cluster.gpu.memory_gb:g} GB, {RESERVED / 1e9:g} of them reserved):",
        memory_table(estimate),
    ]
    if memory.other is not None:
        now, other = memory.within.total(), memory.other
        ways = checkpointing_ways(config.train.recomputed)
        lines += [
            f"beyond what stays between steps: {now / GIB:.2f} GiB {ways[0]}, "
            f"{other / GIB:.2f} {ways[1]}"
        ]
    if largest := largest_that_fits(memory, cluster, worst.tokens, worst.tiles):
        lines.append(
            f"largest that fits: data.pack.max_tokens {largest.max_tokens} with {worst.tiles} "
            f"tiles; data.pack.max_tiles {largest.max_tiles} with {worst.tokens} tokens"
        )
    lines += [
        "",
        f"a step sends, per GPU: {time.link_bytes / 1e9:.1f} GB over the links of its node, "
        f"{time.network_bytes / 1e9:.1f} GB over the network",
        f"calculated at {100 * cluster.efficiency:.0f} % of {cluster.gpu.bf16_tflops:g} TFLOP/s, "
        f"links of {cluster.gpu.link_gb_per_s:g} and a network of {cluster.network_gb_per_s:g} "
        "GB/s per GPU; nothing of it was measured:",
        ranks_table(estimate),
    ]
    return "\n".join(lines)


def plot(estimate: Estimate, out: Path) -> None:
    """Memory and speed against the number of GPUs, as a picture."""
    ranks = _numbers(estimate)
    with picture(out, (12, 4.5), columns=2) as (_, axes):
        peaks = [estimate.memory.on(n).peak / GIB for n in ranks]
        axes[0].plot(ranks, peaks, "o-", color=BLUE, label="peak of a GPU")
        axes[0].axhline(room(estimate.cluster) / GIB, color="black", linestyle="--", label="room")
        axes[0].set(xscale="log", xlabel="GPUs", ylabel="GiB", ylim=(0, None))
        axes[0].legend()
        times = [estimate.time(n) for n in ranks]
        axes[1].plot(ranks, [time.tokens_per_s for time in times], "o-", color=BLUE)
        axes[1].set(xscale="log", yscale="log", xlabel="GPUs", ylabel="tokens/s, calculated")


def to_json(estimate: Estimate) -> dict[str, Any]:
    """The same for a file; bytes and seconds."""
    parts = estimate.memory.on(estimate.cluster.ranks)
    return {
        "gpu": asdict(estimate.cluster.gpu),
        "ranks": estimate.cluster.ranks,
        "memory": {"device": dict(parts.device), "host": dict(parts.host), "peak": parts.peak},
        "packs": estimate.work.source,
        "by_ranks": {
            str(n): {
                "peak": estimate.memory.on(n).peak,
                **asdict(time := estimate.time(n)),
                "step_s": time.step_s,
                "binds": time.binds,
            }
            for n in _numbers(estimate)
        },
    }
