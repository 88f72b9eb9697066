"""What a step reports: loss per token count, speed, FLOPs, padding, waiting, memory.

docs/long_runs.md says what each key of `metrics.jsonl` is.
"""

import resource
import time
import zlib
from collections.abc import Sequence

import torch

from data_pipeline.loader import IGNORE, PackedBatch, StepBatch
from training.distributed import Ranks, all_reduce_max, all_reduce_sum
from training.flops import PackCost
from training.metrics.rank_times import RankTimes

TEXT, MIXED = 0, -1  # `PackedBatch.sample_sides` of samples without images, and of several sides

FLOPS = ("flops", "hardware_flops")
COUNTS = (
    *("packs", "tokens", "image_tokens", "samples", "images", "tiles", "supervised"),
    *("bad_samples", "data_hash", "store_retries", *FLOPS),
)


class StepMeter:
    """Sums over the packs of one step, and its time; each joined over the ranks by a collective.

    Args:
        sides: token grid sides n that are trained.
        max_tokens: of a pack.
        ranks: whose sums are joined.
        datasets: names in the mixture; with several, each has its own loss too.
        cost: counts FLOPs; None: they are not reported.
        peak: FLOP/s of a rank's device, for MFU and HFU; None: neither is reported.
        window: steps over which the slowest and the fastest rank are found.
        consistency: whether packs come with divergences between their copies.
    """

    def __init__(
        self,
        sides: list[int],
        max_tokens: int,
        ranks: Ranks,
        datasets: Sequence[str] = (),
        cost: PackCost | None = None,
        peak: float | None = None,
        window: int = 1,
        consistency: bool = False,
    ) -> None:
        self.groups = [*sorted(set(sides)), TEXT, MIXED]
        self.datasets = datasets if len(datasets) > 1 else ()
        self.max_tokens = max_tokens
        self.ranks = ranks
        self.cost, self.peak, self.consistency = cost, peak, consistency
        self.rank_times = RankTimes(ranks.rank, ranks.world_size, window)
        self.start()

    def start(self) -> None:
        """Begin a step."""
        self.started = time.perf_counter()
        self.token_groups: list[torch.Tensor] = []
        self.token_datasets: list[torch.Tensor] = []
        self.token_weights: list[torch.Tensor] = []
        self.token_losses: list[torch.Tensor] = []
        self.student_weights: list[torch.Tensor] = []
        self.divergences: list[torch.Tensor] = []
        self.counts: dict[str, float] = dict.fromkeys(COUNTS, 0)

    def add(
        self,
        batch: PackedBatch,
        token_losses: torch.Tensor,
        divergences: torch.Tensor | None = None,
    ) -> None:
        """Count one pack.

        Args:
            batch: the pack, on the host.
            token_losses: float32 [K], cross-entropy of each supervised token, in order.
            divergences: float32 [K], of copies from their teachers, where there are any.
        """
        positions = (batch.labels != IGNORE).nonzero().flatten()
        sample = torch.searchsorted(batch.cu_seqlens, positions, right=True) - 1
        group_of_sample = torch.tensor([self._group(s) for s in batch.sample_sides or [TEXT]])
        self.token_groups.append(group_of_sample[sample])
        self.token_datasets.append(torch.tensor(batch.sample_datasets or [0])[sample])
        self.token_weights.append(batch.loss_weights[positions].double())
        self.token_losses.append(token_losses)  # stays on the device until `reduce`
        if self.consistency:
            assert batch.student_weights is not None and divergences is not None
            self.student_weights.append(batch.student_weights.double())
            self.divergences.append(divergences)
        self.counts["packs"] += 1
        self.counts["tokens"] += batch.planned_tokens
        self.counts["image_tokens"] += sum(n * n for n in batch.tile_sides)
        self.counts["samples"] += batch.num_samples
        self.counts["images"] += batch.num_images
        self.counts["tiles"] += len(batch.tile_sides)
        self.counts["supervised"] += len(positions)
        self.counts["bad_samples"] += len(batch.bad)
        self.counts["data_hash"] += zlib.crc32(repr((batch.sample_ids, batch.tile_sides)).encode())
        if self.cost:
            lengths = batch.cu_seqlens.diff().numpy()
            parts = self.cost.pack(lengths, batch.tile_sides, len(positions)).values()
            self.counts["flops"] += sum(part.model for part in parts)
            self.counts["hardware_flops"] += sum(part.hardware for part in parts)

    def _group(self, side: int) -> int:
        return self.groups.index(side) if side in self.groups else self.groups.index(MIXED)

    def reduce(self) -> dict[str, float]:
        """Losses and counts over all ranks, once every pack is added."""
        weights = torch.cat(self.token_weights)
        losses = torch.cat(self.token_losses).double().cpu()
        self.own_s = time.perf_counter() - self.started
        of = [{TEXT: "text", MIXED: "mixed"}.get(side, str(side * side)) for side in self.groups]
        names = [f"loss_{name}" for name in of]
        by_count = torch.cat(self.token_groups)
        sums = [_sums(by_count, weights, losses, len(names))]
        if self.datasets:
            names += [f"loss_dataset_{name}" for name in self.datasets]
            by_dataset = torch.cat(self.token_datasets)
            sums.append(_sums(by_dataset, weights, losses, len(self.datasets)))
        if self.consistency:
            students = torch.cat(self.student_weights)
            divergences = torch.cat(self.divergences).double().cpu()
            names += [f"consistency_{name}" for name in of]
            sums.append(_sums(by_count, students, divergences, len(of)))
        flat = torch.cat(sums, dim=1)  # [2, names]
        local = [*flat.flatten().tolist(), *map(float, self.counts.values())]
        total = all_reduce_sum(local, self.ranks.device)
        size, groups = len(names), len(self.groups)
        loss_sums, weight_sums = total[:size], total[size : 2 * size]
        counts = dict(zip(self.counts, total[2 * size :], strict=True))
        metrics = {"loss": sum(loss_sums[:groups]) / (sum(weight_sums[:groups]) or 1.0)}
        for name, loss, weight in zip(names, loss_sums, weight_sums, strict=True):
            if weight > 0:
                metrics[name] = loss / weight
        return metrics | {
            "padding": 1 - counts["tokens"] / (counts["packs"] * self.max_tokens),
            "tokens": counts["tokens"],
            "image_tokens": counts["image_tokens"],
            "images": counts["images"],
            "tiles": counts["tiles"],
            "samples": counts["samples"],
            "supervised_tokens": counts["supervised"],
            "bad_samples": counts["bad_samples"],
            "store_retries": counts["store_retries"],
            # Sum over packs, so that it does not depend on the world size; exact in a float64.
            "data_hash": counts["data_hash"],
            "packs": counts["packs"],
            **({key: counts[key] for key in FLOPS} if self.cost else {}),
        }

    def timing(self, metrics: dict[str, float], wait_s: float) -> dict[str, float]:
        """Speed and memory, the slowest rank's, once the optimizer step is done.

        `metrics` are those of `reduce`; `wait_s` is how long this rank waited for data.
        """
        own = [time.perf_counter() - self.started, wait_s, _memory_bytes(self.ranks.device)]
        seconds, wait_s, memory, *rank_s = all_reduce_max(
            [*own, *self.rank_times.row(self.own_s)], self.ranks.device
        )
        return {
            "step_s": seconds,
            "tokens_per_s": metrics["tokens"] / seconds,
            "images_per_s": metrics["images"] / seconds,
            "tiles_per_s": metrics["tiles"] / seconds,
            "samples_per_s": metrics["samples"] / seconds,
            "packs_per_s": metrics["packs"] / seconds,
            **self._utilisation(metrics, seconds),
            **self.rank_times.extremes(rank_s),
            "data_wait": wait_s / seconds,
            "memory_gib": memory / 2**30,
        }

    def _utilisation(self, metrics: dict[str, float], seconds: float) -> dict[str, float]:
        """MFU and HFU of the step, parts of the peak of all ranks."""
        if not (self.cost and self.peak):
            return {}
        possible = self.peak * self.ranks.world_size * seconds
        return dict(zip(("mfu", "hfu"), (metrics[key] / possible for key in FLOPS), strict=True))


def _sums(
    groups: torch.Tensor, weights: torch.Tensor, losses: torch.Tensor, size: int
) -> torch.Tensor:
    """Per group the weighted sum of the losses and the sum of the weights, float64 [2, size]."""
    sums = torch.zeros(2, size, dtype=torch.float64)
    sums[0].index_add_(0, groups, weights * losses)
    sums[1].index_add_(0, groups, weights)
    return sums


def weight_sum(batch: StepBatch) -> float:
    """Sum of the loss weights of this rank's packs."""
    return float(sum(pack.loss_weights.double().sum() for pack in batch.packs))


def _memory_bytes(device: torch.device) -> float:
    """Peak memory: of the GPU allocator, or of the process on a CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
