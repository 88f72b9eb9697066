"""What the tests of optimizers run on every rank: steps beside a computation on whole matrices."""

from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from torch import Tensor

from data_pipeline.plan import PlanState
from tests.training.elastic_scenarios import RICH, SAVED, STEPS, new_engine, train, whole_state
from tests.training.scenarios import tiny_config
from training import checkpoint
from training.distributed import Ranks
from training.zero3.elastic import sub_groups


def of_float64(matrix: Tensor) -> Tensor:
    """Muon's direction by its singular values alone, at the root mean square of AdamW's steps."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.norm().clamp(min=1e-30)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return 0.2 * float(max(matrix.shape)) ** 0.5 * (u @ torch.diag(s) @ v)


class Reference:
    """A parameter in float64, whole, and the optimizer's steps on it, as in the papers."""

    def __init__(self, value: Tensor) -> None:
        self.value, self.first = value.double(), value.double()
        self.m, self.v = torch.zeros_like(self.value), torch.zeros_like(self.value)

    def step(self, gradient: Tensor, group: dict[str, Any], number: int) -> None:
        g, lr = gradient.double(), group["lr"]
        self.value = self.value * (1 - lr * group["weight_decay"])
        if group.get("muon"):
            mu = group["momentum"]
            self.m = mu * self.m + (1 - mu) * g
            self.value = self.value - lr * of_float64(mu * self.m + (1 - mu) * g)
            return
        one, two = group["betas"]
        self.m, self.v = one * self.m + (1 - one) * g, two * self.v + (1 - two) * g * g
        m, v = self.m / (1 - one**number), self.v / (1 - two**number)
        self.value = self.value - lr * m / (v.sqrt() + group["eps"])

    def error(self, found: Tensor) -> float:
        """Of the way that the parameter has gone."""
        way = (self.value - self.first).norm()
        return float((found.double() - self.value).norm() / way.clamp(min=1e-12))


def two_steps(ranks: Ranks, corpus: Path, overrides: list[str]) -> dict[str, Any]:
    """How far two steps of the engine are from those of the reference, by parameter."""
    settings = [*RICH, "train.clip_grad_norm=0", "train.eps=1.0e-6", *overrides]
    run, engine = new_engine(tiny_config(corpus, *settings), ranks)
    inner, parameters = engine.deepspeed, dict(engine.module.named_parameters())
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    references = {n: Reference(safe_get_full_fp32_param(p).clone()) for n, p in trained.items()}
    groups = {name: group for group, names, _, _ in sub_groups(inner) for name in names}
    real, done = inner.step, 0

    def step_both() -> None:
        nonlocal done
        if inner.is_gradient_accumulation_boundary():
            done += 1
            for name, parameter in trained.items():
                gradient = safe_get_full_grad(parameter).clone()
                references[name].step(gradient, engine.param_groups[groups[name]], done)
        real()

    inner.step = step_both
    train(engine, run, PlanState(), 1, 2)
    kinds = [bool(engine.param_groups[groups[name]].get("muon")) for name in trained]
    return {
        "errors": {n: r.error(safe_get_full_fp32_param(trained[n])) for n, r in references.items()},
        "matrices": sum(kinds),
        "others": len(kinds) - sum(kinds),
    }


def resume(ranks: Ranks, corpus: Path, path: Path, overrides: list[str]) -> dict[str, Any]:
    """As the trainer does, into an engine of other initial weights: its state, the steps after."""
    run, engine = new_engine(tiny_config(corpus, *RICH, *overrides), ranks, seed=9)
    progress = checkpoint.load(engine, path, run.fingerprints)
    state = whole_state(engine)
    rows, _ = train(engine, run, progress.plan, SAVED + 1, STEPS - SAVED)
    after = {float(adam["step"]) for _, _, _, adam in sub_groups(engine.deepspeed)}
    return {"state": state, "rows": rows, "after": after}


def averaged(ranks: Ranks, corpus: Path, folder: Path, overrides: list[str]) -> dict[str, Any]:
    """As `elastic_scenarios.save`: masters after each step, the averages saved and at the end."""
    run, engine = new_engine(tiny_config(corpus, *RICH, *overrides), ranks)
    masters, plan = [], PlanState()
    for step in range(1, STEPS + 1):
        _, plan = train(engine, run, plan, step, 1)
        flat = engine.deepspeed.optimizer.fp32_partitioned_groups_flat
        masters.append([m.detach().clone() for m in flat])
        if step == STEPS - 1:
            with checkpoint.Saver(folder, run.config.checkpoint, ranks) as saver:
                progress = checkpoint.Progress(step, plan)
                saver.save(engine, progress, run.fingerprints, wait=True)
            saved = [a.clone() for a in engine.average.averages]
    return {"masters": masters, "saved": saved, "end": engine.average.averages}


def average_resumed(ranks: Ranks, corpus: Path, path: Path, overrides: list[str]) -> dict[str, Any]:
    """The average as loaded, how many steps it counts, and after one step more."""
    run, engine = new_engine(tiny_config(corpus, *RICH, *overrides), ranks, seed=9)
    progress = checkpoint.load(engine, path, run.fingerprints)
    loaded, steps = [a.clone() for a in engine.average.averages], engine.average.steps
    train(engine, run, progress.plan, progress.step + 1, 1)
    sizes = [[p.ds_numel for p in g] for g in engine.deepspeed.optimizer.fp16_groups]
    return {"loaded": loaded, "steps": steps, "end": engine.average.averages, "sizes": sizes}
