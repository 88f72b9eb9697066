"""DeepSpeed ZeRO-3 as an engine: around the model, and behind the trainer's interface."""

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from transformers.integrations import HfDeepSpeedConfig

from data_pipeline.errors import InputError
from data_pipeline.tokenizer import Tokenizer
from training.adapters import StageAdapters, add_adapters
from training.config import RunConfig
from training.distributed import Ranks
from training.engine_interface import Engine
from training.model.build import build_model
from training.model.new_rows import train_new_rows
from training.optimizers import EmaSettings
from training.parameters import freeze, recompute_activations
from training.speed.compiled_layers import layers_of
from training.zero3.compatibility import fix_zero3_initialization
from training.zero3.ds_config import deepspeed_config
from training.zero3.elastic import load_resharded
from training.zero3.extra import refusals
from training.zero3.frozen import frozen_hashes
from training.zero3.host_average import HostAverage
from training.zero3.initial_weights import load_weights
from training.zero3.muon import ShardedMuon
from training.zero3.optimizers import make_optimizer
from training.zero3.shards import Shards
from training.zero3.snapshot import HostBuffers, snapshot_bytes, take_snapshot
from training.zero3.whole_layers import gather_whole


class Zero3Engine(Engine):
    """The interface over a DeepSpeed engine, which is `deepspeed` here."""

    def __init__(self, deepspeed: Any, ema: EmaSettings | None = None) -> None:
        self.deepspeed = deepspeed
        self.average = HostAverage(deepspeed, ema) if ema else None
        self._buffers = HostBuffers()

    @property
    def module(self) -> nn.Module:
        module: nn.Module = self.deepspeed.module
        return module

    def shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        return _whole_shape(parameter)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = self.deepspeed.optimizer.param_groups
        return groups

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        return self.deepspeed(*args, **inputs)

    def train(self) -> None:
        self.deepspeed.train()

    def eval(self) -> None:
        self.deepspeed.eval()

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        self.deepspeed.backward(loss, scale_wrt_gas=False)
        if not last:
            self.deepspeed.step()  # accumulates

    def step(self) -> float:
        self.deepspeed.step()  # leaves out by itself what is not finite
        if self.average and not self.deepspeed.optimizer.overflow:
            self.average.update()
        return float(self.deepspeed.get_global_grad_norm())

    def skip(self) -> None:
        """The base's; DeepSpeed counts it in its `skipped_steps`, as its own skips."""
        optimizer = self.deepspeed.optimizer
        # DeepSpeed's own way out for gradients that are not finite: -1 stands for such a norm.
        invalid = torch.tensor(-1.0, device=optimizer.device)
        optimizer._get_norm_groups = lambda: [invalid]
        try:
            self.deepspeed.step()
        finally:
            del optimizer._get_norm_groups
        if not optimizer.overflow:
            raise RuntimeError(
                "this version of DeepSpeed made a step that should have been left out: the "
                "weights are spoiled; go on from the last checkpoint with "
                "faults.max_skipped_steps=0"
            )

    def snapshot_bytes(self) -> int:
        if self.deepspeed.zero_nvme_offload_optimizer():
            raise InputError(
                "the optimizer is offloaded to NVMe, which checkpoints do not cover; set "
                "deepspeed.offload_optimizer=cpu"
            )
        return snapshot_bytes(self.deepspeed, self.average is not None)

    def snapshot(self, rng: dict[str, Any]) -> dict[str, Any]:
        client = {"rng": rng} | ({"ema": self.average.state()} if self.average else {})
        return take_snapshot(self.deepspeed, client, self._buffers)

    def frozen_hashes(self) -> dict[str, str]:
        return frozen_hashes(self.deepspeed)

    def load(self, path: Path, world_size: int, frozen: dict[str, str]) -> dict[str, Any] | None:
        # DeepSpeed brings back the saved learning rates and the like, too.
        own = [{k: v for k, v in group.items() if k != "params"} for group in self.param_groups]
        if world_size == torch.distributed.get_world_size():
            rng = self._load_same(path)
        else:
            rng = load_resharded(self.deepspeed, path, world_size, frozen)
            if self.average:
                self.average.load_resharded(Shards(path, world_size), torch.distributed.get_rank())
        for group, options in zip(self.param_groups, own, strict=True):
            group.update(options)
        return rng

    def _load_same(self, path: Path) -> dict[str, Any] | None:
        loaded, state = self.deepspeed.load_checkpoint(str(path.parent), tag=path.name)
        if loaded is None:
            raise InputError(
                f"DeepSpeed found no checkpoint in {path}; remove the folder and resume"
            )
        if self.average:
            self.average.load(state.get("ema"))
        rng: dict[str, Any] = state["rng"]
        return rng

    def load_weights(
        self,
        path: Path,
        world_size: int,
        vocabulary: int = 0,
        adapters: StageAdapters | None = None,
        apart: Collection[str] = (),
    ) -> list[str]:
        return load_weights(self.deepspeed, path, world_size, vocabulary, adapters, apart)


def _whole_shape(parameter: Any) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def build_engine(
    config: RunConfig,
    tokenizer: Tokenizer,
    ranks: Ranks,
    pretrained: bool = True,
    new_tokens: Sequence[int] = (),
) -> Zero3Engine:
    """Build the model partitioned from the start and wrap it in ZeRO-3.

    `pretrained=False` leaves out the pretrained weights, where a checkpoint will replace them.
    `new_tokens` are the ids whose rows train beside a frozen language model.
    """
    import deepspeed

    torch.manual_seed(config.seed)
    ds_config = deepspeed_config(config, ranks.world_size)
    fix_zero3_initialization()
    with refusals(config.deepspeed.extra):
        # Alive while the model is built: transformers then builds and loads it under zero.Init.
        hf_config = HfDeepSpeedConfig(ds_config)
        model = build_model(config, tokenizer, pretrained, whole=_whole)
        model.train()  # from_pretrained leaves evaluation mode, in which nothing is checkpointed
        freeze(model, config.train.modules)
        add_adapters(model, config.train.adapters, config.seed)
        del hf_config  # by which PEFT knows that a matrix is to be gathered
        if new_tokens:
            train_new_rows(model, new_tokens, _rows)
        if config.train.recomputed:
            recompute_activations(model, config.train.recomputed)
        gather_whole(layers_of(model, config.train.compiled))
        optimizer = make_optimizer(model, config, ranks, _whole_shape)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)
        if isinstance(optimizer, ShardedMuon):
            optimizer.follow(engine.optimizer)
    return Zero3Engine(engine, config.train.ema)


def _rows(parameter: nn.Parameter, ids: Tensor) -> Tensor:
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([parameter]):
        return parameter.detach()[ids.to(parameter.device)].clone()


def _whole(parameter: nn.Parameter) -> AbstractContextManager[Any]:
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters([parameter], modifier_rank=0)
