"""Muon on ZeRO-3's shards: the momentum stays where it is, matrices are whole one per rank.

DeepSpeed has a Muon of its own, which is not used: it clips updates instead of gradients, keeps the
momentum in the precision of the communication, moves it in steps that are left out, and has no
elastic checkpoint.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from training.optimizers.orthogonal import muon_direction


class ShardedMuon(torch.optim.AdamW):
    """Muon for the parameter groups that have `muon`, AdamW for the others.

    DeepSpeed calls `step` for one flat shard at a time, on all ranks in the same order.

    Args:
        groups: as AdamW takes them; `muon` in those of matrices, which have `momentum`, too.
        device: what matrices are whole on.
    """

    def __init__(self, groups: list[dict[str, Any]], device: torch.device, **options: Any) -> None:
        super().__init__([{"muon": False, **group} for group in groups], **options)
        self._device = device
        self._zero: Any = None

    def follow(self, zero: Any) -> None:
        """Know what lies in the shards of this ZeRO-3 optimizer of DeepSpeed."""
        self._zero = zero
        self._numbers = {id(flat): n for n, flat in enumerate(zero.fp32_partitioned_groups_flat)}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update the shards that the groups hold now."""
        groups = self.param_groups
        for group in groups:
            if group["muon"]:
                for flat in group["params"]:
                    self._update(flat, group)
        try:
            self.param_groups = [group for group in groups if not group["muon"]]
            return super().step(closure)
        finally:
            self.param_groups = groups

    def _update(self, flat: Tensor, group: dict[str, Any]) -> None:
        state = self.state[flat]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(flat)
        state["step"] += 1
        gradient: Any = flat.grad
        momentum = state["exp_avg"].lerp_(gradient, 1 - group["momentum"])
        update = gradient.lerp(momentum, group["momentum"])  # Nesterov's
        self._orthogonalise(update, self._numbers[id(flat)])
        flat.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])

    def _orthogonalise(self, update: Tensor, number: int) -> None:
        """Replace this rank's parts of a sub-group's matrices by those of their directions."""
        zero, place = self._zero, 0
        ranks = zero.sub_group_process_groups[number]
        pieces = []
        for parameter in zero.fp16_groups[number]:
            size = parameter.partition_numel()
            pieces.append((tuple(parameter.ds_shape), update[place : place + size]))
            place += size
        count = torch.distributed.get_world_size(ranks)
        for start in range(0, len(pieces), count):
            _share_out(pieces[start : start + count], ranks, self._device)


def _share_out(pieces: Sequence[tuple[Any, Tensor]], ranks: Any, device: torch.device) -> None:
    """Each rank gets one matrix of as many as there are ranks, whole, and gives its parts back."""
    count, rank = torch.distributed.get_world_size(ranks), torch.distributed.get_rank(ranks)
    parts = [len(piece) for _, piece in pieces] + [0] * (count - len(pieces))
    sent = torch.cat([piece for _, piece in pieces]).to(device)
    mine = [parts[rank]] * count
    whole = sent.new_empty(sum(mine))
    torch.distributed.all_to_all_single(whole, sent, mine, parts, group=ranks)
    if whole.numel():
        shape = pieces[rank][0]
        matrix = whole[: shape[0] * shape[1]].view(shape)
        matrix.copy_(muon_direction(matrix, _dtype(device)))
    torch.distributed.all_to_all_single(sent, whole, parts, mine, group=ranks)
    for (_, piece), new in zip(pieces, sent.split(parts[: len(pieces)]), strict=True):
        piece.copy_(new)


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32
