"""What the tests of resharding run on every rank: engines whose whole state can be compared."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed
from deepspeed.runtime.zero import GatheredParameters
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import nn

from data_pipeline.plan import PlanState
from tests.training.scenarios import one_step, tiny_config
from training import checkpoint
from training.checkpoint.folder_layout import Manifest
from training.checkpoint.progress import new_rng_state
from training.config import RunConfig
from training.distributed import Ranks
from training.metrics import StepMeter
from training.model import build
from training.run import Run
from training.zero3 import elastic
from training.zero3.elastic import load_resharded, sub_groups
from training.zero3.engine import build_engine
from training.zero3.shards import Shards

SAVED, STEPS = 1, 3
FP32 = ["train.precision=fp32"]
RICH = [
    "data.pack.packs_per_step=12",
    "data.pack.max_tokens=256",
    f"train.steps={STEPS}",
    "train.weight_decay=0.1",
    "train.modules.vision_model.train=false",
    "train.modules.projector.lr=3.0e-3",
    "model.llm.config.tie_word_embeddings=true",
    "model.vision.config.hidden_size=32",
    "model.vision.config.intermediate_size=64",
    "model.llm.config.hidden_size=32",
    "model.llm.config.intermediate_size=64",
    # Many sub-groups, cut elsewhere at every world size.
    "deepspeed.extra={zero_optimization: {sub_group_size: 2000}}",
]


class Extra(nn.Module):
    """What the model has not: sizes that no world size divides, one of them 1; a running buffer."""

    seen: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))
        self.shift = nn.Parameter(torch.randn(7) * 0.1)
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.seen += torch.arange(3, device=features.device) + 1
        return features * self.gain + self.shift.sum()


@contextmanager
def with_extra() -> Iterator[None]:
    """Models built meanwhile send what their projector returns through an `Extra`."""
    real = build.build_model

    def build_model(config: RunConfig, *args: Any, **named: Any) -> nn.Module:
        model = real(config, *args, **named)
        model.projector.extra = Extra().to(model.dtype)
        model.projector.register_forward_hook(lambda module, _, out: module.extra(out))
        return model

    with patch("training.zero3.engine.build_model", build_model):
        yield


def new_engine(config: RunConfig, ranks: Ranks, seed: int = 0) -> tuple[Run, Any]:
    """A run and its engine, whose initial weights come from `seed`."""
    run = Run(config, ranks)
    with with_extra():
        engine = build_engine(config.model_copy(update={"seed": seed}), run.tokenizer, ranks)
    return run, engine


def weights(engine: Any) -> dict[str, Any]:
    """What the model computes with: every parameter, whole, in the model's precision."""
    values = {}
    for name, parameter in engine.module.named_parameters():
        with GatheredParameters([parameter]):
            values[f"weight {name}"] = parameter.detach().float().clone().numpy()
    return values


def whole_state(engine: Any) -> dict[str, Any]:
    """Everything a resumed engine must share with the saved one, whole, by name."""
    state: dict[str, Any] = weights(engine)
    moments = {name: m for _, names, _, m in sub_groups(engine.deepspeed) for name in names}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            master = safe_get_full_fp32_param(parameter)
            state[f"master {name}"] = master.detach().clone().numpy()
            for key in {"exp_avg", "exp_avg_sq"} & moments[name].keys():
                moment = safe_get_full_optimizer_state(parameter, key)
                state[f"{key} {name}"] = moment.detach().clone().numpy()
    for _, names, _, adam in sub_groups(engine.deepspeed):
        state |= {f"step {name}": float(adam["step"]) for name in names}
    for number, group in enumerate(engine.param_groups):
        state |= {f"group {number} {key}": v for key, v in group.items() if key != "params"}
    for name in engine.deepspeed._get_buffer_names():
        state[f"buffer {name}"] = engine.module.get_buffer(name).float().clone().numpy()
    for key in ("global_steps", "global_samples", "skipped_steps"):
        state[key] = getattr(engine.deepspeed, key)
    return state


def train(
    engine: Any, run: Run, plan: PlanState, first: int, steps: int
) -> tuple[list[tuple[float, list[int]]], PlanState]:
    """(loss, sample ids of all ranks) of `steps` steps, and the place in the plan afterwards."""
    data = run.config.data
    meter = StepMeter(data.tokens.sides, data.pack.max_tokens, run.ranks)
    batches, rows = run.loader.steps(plan), []
    for step in range(first, first + steps):
        meter.start()
        batch = next(batches)
        ids: list[Any] = [None] * run.ranks.world_size
        mine = [[int(i) for i in pack.sample_ids] for pack in batch.packs]
        torch.distributed.all_gather_object(ids, mine)
        loss = one_step(engine, batch, step, meter, run)["loss"]
        rows.append((loss, sorted(i for packs in ids for pack in packs for i in pack)))
        plan = batch.state
    batches.close()
    return rows, plan


def save(ranks: Ranks, corpus: Path, folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Train, save after `SAVED` steps, go on to `STEPS`: the state as saved, the steps after it."""
    run, engine = new_engine(tiny_config(corpus, *RICH, *overrides), ranks)
    _, plan = train(engine, run, PlanState(), 1, SAVED)
    torch.manual_seed(100 + ranks.rank)
    rng = torch.get_rng_state()
    with checkpoint.Saver(folder, run.config.checkpoint, ranks) as saver:
        saver.save(engine, checkpoint.Progress(SAVED, plan), run.fingerprints, wait=True)
    state = whole_state(engine)
    rows, _ = train(engine, run, plan, SAVED + 1, STEPS - SAVED)
    return {"state": state, "rows": rows, "rng": rng.numpy()}


def resume(ranks: Ranks, corpus: Path, path: Path, overrides: list[str]) -> dict[str, Any]:
    """Load into an engine of other initial weights, go on to `STEPS`: its state, those steps."""
    run, engine = new_engine(tiny_config(corpus, *RICH, *overrides), ranks, seed=9)
    before, manifest = weights(engine), checkpoint.read_manifest(path)
    rng = load_resharded(engine.deepspeed, path, manifest.world_size, manifest.frozen)
    rng = rng or new_rng_state(manifest.fingerprints["seed"], manifest.step, ranks.rank)
    state = whole_state(engine)
    rows, _ = train(engine, run, PlanState.from_dict(manifest.plan), SAVED + 1, STEPS - SAVED)
    after = {float(adam["step"]) for _, _, _, adam in sub_groups(engine.deepspeed)}
    return {
        "before": before,
        "state": state,
        "rows": rows,
        "rng": rng["torch"].numpy(),
        "after": after,
    }


def resume_and_save(
    ranks: Ranks, corpus: Path, path: Path, folder: Path, overrides: list[str]
) -> list[dict[str, Any]]:
    """Resume as the trainer does, train, save; a second engine then resumes from that."""
    states = []
    for seed, steps in ((9, 1), (11, 0)):
        run, engine = new_engine(tiny_config(corpus, *RICH, *overrides), ranks, seed)
        progress = checkpoint.load(engine, path, run.fingerprints)
        assert not engine.deepspeed.load_universal_checkpoint()
        if steps:
            _, plan = train(engine, run, progress.plan, progress.step + 1, steps)
            progress = checkpoint.Progress(progress.step + steps, plan)
            with checkpoint.Saver(folder, run.config.checkpoint, ranks) as saver:
                saver.save(engine, progress, run.fingerprints, wait=True)
        path = folder / f"step-{progress.step:08d}"
        states.append({"state": whole_state(engine), "progress": progress})
    return states


def faults(ranks: Ranks, corpus: Path, path: Path) -> dict[str, str]:
    """The error of a load, by what was left out of it or done to it."""
    _, engine = new_engine(tiny_config(corpus, *RICH, *FP32), ranks, seed=9)
    manifest = checkpoint.read_manifest(path)
    tower = next(iter(manifest.frozen))
    other_tower = replace(manifest, frozen=manifest.frozen | {tower: "0" * 64})
    shapes = Shards(path, manifest.world_size).shapes()
    fewer = {name: shape for name, shape in shapes.items() if "extra.gain" not in name}
    cases: dict[str, tuple[Any, Manifest]] = {
        "frozen": (patch.object(elastic, "_restore_frozen"), manifest),
        "groups": (patch.object(elastic, "_restore_groups"), manifest),
        "buffers": (patch.object(elastic, "_restore_buffers"), manifest),
        "steps": (patch.object(elastic, "_restore_steps"), manifest),
        "other tower": (nullcontext(), other_tower),
        "other model": (patch.object(Shards, "shapes", lambda self: fewer), manifest),
        "DeepSpeed fails": (
            patch.object(engine.deepspeed, "load_checkpoint", side_effect=OSError),
            manifest,
        ),
        "nothing": (nullcontext(), manifest),
    }
    errors = {}
    for name, (broken, described) in cases.items():
        engine.module.get_buffer("projector.extra.seen").zero_()
        try:
            with broken:
                load_resharded(engine.deepspeed, path, described.world_size, described.frozen)
            errors[name] = ""
        except (RuntimeError, ValueError, OSError) as error:
            errors[name] = f"{type(error).__name__}: {error}"
        assert not engine.deepspeed.load_universal_checkpoint(), name
    return errors


def same(found: Any, expected: Any) -> bool:
    if isinstance(expected, np.ndarray):
        return found.dtype == expected.dtype and np.array_equal(found, expected)
    return found == expected
