"""What lies in the shards of a ZeRO-3 checkpoint, read without opening more than is needed."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from data_pipeline.errors import InputError

MOMENTS = ("exp_avg", "exp_avg_sq")


class Shards:
    """The files of a checkpoint, each mapped into memory when it is first needed."""

    def __init__(self, path: Path, world_size: int) -> None:
        self.path, self.world_size = path, world_size
        self._loaded: dict[Path, dict[str, Any]] = {}

    def model(self, rank: int) -> dict[str, Any]:
        """The module, frozen fragments, buffers and client state of one saved rank."""
        return self._load(self.path / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")

    def own(self) -> dict[str, Any]:
        """What this rank saved, or rank 0 where there were fewer ranks."""
        rank = torch.distributed.get_rank()
        return self.model(rank if rank < self.world_size else 0)

    def optimizer(self) -> dict[str, Any]:
        """The optimizer's state dict of saved rank 0; steps and options are the same on all."""
        return self._zero(0)["optimizer_state_dict"]

    def masters(self, rank: int) -> list[torch.Tensor]:
        """The flat master weights of a saved rank, a tensor per sub-group."""
        groups: list[torch.Tensor] = self._zero(rank)["fp32_flat_groups"]
        return groups

    def averages(self, rank: int) -> list[torch.Tensor]:
        """The same of the moving average of the master weights.

        Raises:
            InputError: there is none.
        """
        averages: list[torch.Tensor] = (self.model(rank).get("ema") or {}).get("averages") or []
        if not averages:
            raise InputError(
                f"{self.path} holds no moving average of the weights: it was saved without "
                "train.ema, or before its first update"
            )
        return averages

    def places(self) -> dict[str, int]:
        """Where every trained parameter begins in each saved rank's part, all groups in a row."""
        places, start = {}, 0
        for name, shape in self.shapes().items():
            places[name] = start
            start += -(-math.prod(shape) // self.world_size)
        return places

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every trained parameter."""
        return {
            name: tuple(shape)
            for sub_group in self.model(0)["param_shapes"]
            for name, shape in sub_group.items()
        }

    def steps(self) -> dict[str, Any]:
        """Adam's step of every trained parameter."""
        state = self.optimizer()["state"]
        return {
            name: state[number]["step"]
            for number, sub_group in enumerate(self.model(0)["param_shapes"])
            for name in sub_group
        }

    def moments(self) -> dict[str, frozenset[str]]:
        """Which of the `MOMENTS` there are of every trained parameter."""
        state = self.optimizer()["state"]
        return {
            name: frozenset(MOMENTS).intersection(state[number])
            for number, sub_group in enumerate(self.model(0)["param_shapes"])
            for name in sub_group
        }

    def groups(self) -> list[dict[str, Any]]:
        """Options of every parameter group."""
        return [options_of(group) for group in self.optimizer()["param_groups"]]

    def frozen(self, name: str, size: int, start: int, stop: int) -> Iterator[torch.Tensor]:
        """Elements `start` to `stop` of a frozen parameter of `size` elements, in order."""
        part = -(-size // self.world_size)
        while start < stop:
            rank, offset = divmod(start, part)
            end = min(stop, (rank + 1) * part)
            fragments = self.model(rank)["frozen_param_fragments"] or {}
            if name not in fragments:
                raise InputError(
                    f"{self.path} holds no frozen parameter {name}; resume with the model and the "
                    "trained modules that saved it"
                )
            yield fragments[name].flatten()[offset : offset + end - start]
            start = end

    def _zero(self, rank: int) -> dict[str, Any]:
        (path,) = self.path.glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        return self._load(path)["optimizer_state_dict"]

    def _load(self, path: Path) -> dict[str, Any]:
        if path not in self._loaded:
            # The caller has scanned these pickles.
            self._loaded[path] = torch.load(path, "cpu", weights_only=False, mmap=True)
        return self._loaded[path]


def piece_of_flat(
    groups: Callable[[int], list[torch.Tensor]], world_size: int, size: int, start: int
) -> Iterator[torch.Tensor]:
    """The `size` elements of a parameter in order; it begins at `start` in each rank's groups."""
    part = -(-size // world_size)
    for rank in range(world_size):
        left, offset = min(part, size - rank * part), start
        for group in groups(rank):
            if left > 0 and offset < len(group):
                piece = group[offset : offset + left]
                yield piece
                left, offset = left - len(piece), offset + len(piece)
            offset -= len(group)


def options_of(group: dict[str, Any]) -> dict[str, Any]:
    """A parameter group without its parameters: learning rate, weight decay and the like."""
    return {key: value for key, value in group.items() if key != "params"}
