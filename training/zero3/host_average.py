"""A moving average of the master weights, each rank's of its own ZeRO-3 shard, in host memory."""

from typing import Any

import torch

from training.optimizers.optimizer_settings import EmaSettings
from training.zero3.shards import Shards, piece_of_flat


class HostAverage:
    """After every `every` steps that changed weights: average = decay * average + rest * masters.

    It begins as the masters at its first update. Steps that were left out do not count.
    """

    def __init__(self, engine: Any, settings: EmaSettings) -> None:
        self._engine, self._settings = engine, settings
        self.steps = 0
        self.averages: list[torch.Tensor] = []

    @property
    def _masters(self) -> list[torch.Tensor]:
        masters: list[torch.Tensor] = self._engine.optimizer.fp32_partitioned_groups_flat
        return masters

    def update(self) -> None:
        """Count a step, and take it in where it is one of `every`."""
        self.steps += 1
        if self.steps % self._settings.every:
            return
        if not self.averages:
            self.averages = [m.detach().to("cpu", torch.float32, copy=True) for m in self._masters]
            return
        for average, master in zip(self.averages, self._masters, strict=True):
            average.lerp_(master.detach().to("cpu"), 1 - self._settings.decay)

    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"steps": self.steps, "averages": self.averages}

    def load(self, state: dict[str, Any] | None) -> None:
        """Go on from what as many ranks saved; None: it begins now."""
        if state:
            self.steps = state["steps"]
            self.averages = [average.cpu() for average in state["averages"]]

    def load_resharded(self, shards: Shards, rank: int) -> None:
        """Go on from what another number of ranks saved."""
        saved = shards.model(0).get("ema")
        if not saved:
            return
        self.steps, self.averages = saved["steps"], []
        if not saved["averages"]:
            return
        places, optimizer = shards.places(), self._engine.optimizer
        for master, parameters in zip(self._masters, optimizer.fp16_groups, strict=True):
            average, place = torch.zeros_like(master, device="cpu", dtype=torch.float32), 0
            for parameter in parameters:
                size, part = parameter.ds_numel, parameter.partition_numel()
                start = places[optimizer.param_names[parameter]]
                pieces = piece_of_flat(shards.averages, shards.world_size, size, start)
                mine = torch.cat([*pieces])[rank * part : (rank + 1) * part]
                average[place : place + len(mine)] = mine
                place += part
            self.averages.append(average)
