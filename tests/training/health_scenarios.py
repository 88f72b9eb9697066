"""What the tests of stops, hangs and bad losses run on every rank."""

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed.utils import safe_get_full_optimizer_state

from data_pipeline.loader import StepBatch
from data_pipeline.plan import PlanState
from tests.training.scenarios import full_parameters, tiny_config
from training.config import FaultSettings
from training.distributed import Ranks, all_reduce_sum
from training.evaluate.in_training import evaluate
from training.health.loss_guard import LossGuard, Verdict
from training.health.preemption import SIGNALS, StopRequest
from training.metrics import weight_sum
from training.model.pack_inputs import model_inputs
from training.run import Run
from training.zero3.engine import build_engine

State = dict[str, np.ndarray]


def state_of(engine: Any) -> State:
    """Parameters, moments, Adam's step counts and accumulated leftovers, whole."""
    state = full_parameters(engine)
    for name, parameter in engine.module.named_parameters():
        for key in ("exp_avg", "exp_avg_sq"):
            value = safe_get_full_optimizer_state(parameter, key)
            state[f"{name}/{key}"] = (
                np.zeros(0) if value is None else value.detach().clone().numpy()
            )
    for number, entry in enumerate(engine.deepspeed.optimizer.optimizer.state.values()):
        state[f"adam step {number}"] = np.array(float(entry["step"]))
    return state


def guarded_step(
    engine: Any, run: Run, guard: LossGuard, batch: StepBatch, factor: float, harm: str | None
) -> Verdict:
    """A step at `factor` of the peak rates; `harm` spoils it on the last rank."""
    device, harmed = run.ranks.device, run.ranks.rank == run.ranks.world_size - 1
    scale = run.ranks.world_size / all_reduce_sum([weight_sum(batch)], device)[0]
    for group in engine.param_groups:
        group["lr"] = factor * group["peak_lr"]
    loss = 0.0
    for number, pack in enumerate(batch.packs):
        if harm == "nan loss" and harmed and number == 0:
            pack.target_weights = pack.target_weights * torch.nan
        output = engine(**model_inputs(pack, device, run.loss_chunks))
        extreme = torch.inf if harm == "infinite gradient" and harmed and number == 0 else 1.0
        engine.backward(output.loss * scale * extreme, last=number + 1 == len(batch.packs))
        loss += float(output.loss.detach())
    loss = all_reduce_sum([loss * scale], device)[0]
    if harm == "infinite loss":  # with finite gradients, as of a target of probability 0
        loss = float("inf")
    return guard.update(engine, loss)


def steps_with_harm(
    ranks: Ranks, corpus: Path, harms: list[str], make_harmed: bool, overrides: list[str]
) -> tuple[list[State], list[str | None]]:
    """A good step, one for each harm (not made at all unless `make_harmed`), a good step.

    Returns the states after those that were made, and what the guard said of each.
    """
    config = tiny_config(corpus, *overrides)
    run = Run(config, ranks)
    engine = build_engine(config, run.tokenizer, ranks)
    guard = LossGuard(FaultSettings(max_skipped_steps=len(harms)))
    batches = run.loader.steps(PlanState())
    states, faults = [], []
    for number, harm in enumerate([None, *harms, None], start=1):
        batch = next(batches)
        if harm is None or make_harmed:
            faults.append(guarded_step(engine, run, guard, batch, 0.1 * number, harm).fault)
            states.append(state_of(engine))
    batches.close()
    return states, faults


def stop_one_rank(ranks: Ranks) -> tuple[bool, bool, bool]:
    """What `agree` says before and after rank 1 alone got a signal, and what rank 1 noted."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        with StopRequest() as stop:
            before = stop.agree(ranks.device)
            if ranks.rank == 1:
                os.kill(os.getpid(), signal.SIGUSR1)
            after = stop.agree(ranks.device)
            return before, after, stop.requested
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def stop_in_evaluation(ranks: Ranks, corpus: Path) -> tuple[bool, int, bool, bool]:
    """Rank 1 is told to stop before its third batch.

    Returns whether evaluation gave nothing, the batches before it left, whether the engine trains
    again, and whether asking changes nothing where nobody says stop.
    """
    config = tiny_config(corpus, "train.precision=fp32", "eval.max_tokens=128")
    run = Run(config, ranks)
    engine = build_engine(config, run.tokenizer, ranks)
    assert run.held_out is not None
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return ranks.rank == 1 and asked == 3

    result = evaluate(engine, *run.held_out, [2], ranks, stop=stop)
    before, training = asked, engine.module.training
    whole = [
        evaluate(engine, *run.held_out, [2], ranks, stop=never) for never in (None, lambda: False)
    ]
    return result is None, before, training, whole[0] == whole[1] is not None
