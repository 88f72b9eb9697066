"""A short run of a method of making tokens on every rank: trained, saved, resumed, evaluated."""

from pathlib import Path
from typing import Any

from data_pipeline.errors import InputError
from data_pipeline.plan import PlanState
from tests.training.export_scenarios import recorded
from tests.training.scenarios import full_parameters, one_step, tiny_config
from training import checkpoint
from training.config import RunConfig, save_config
from training.distributed import Ranks
from training.metrics import MetricsLog, StepMeter
from training.model.hub import METHODS
from training.run import Run
from training.zero3.engine import build_engine


def config_of(name: str, corpus: Path, out: Path) -> RunConfig:
    """A model of some thousand parameters; all of them partitioned."""
    counts = [16] if METHODS[name].fixed else [1, 4, 16]
    return tiny_config(
        corpus,
        f"output_dir={out}",
        f"model.projector.method={name}",
        f"data.tokens.counts={counts}",
        f"data.tokens.probabilities={[1 / len(counts)] * len(counts)}",
        "data.pack.max_tokens=128",
        "eval.max_samples=4",
        "train.steps=4",
        "model.llm.config.num_hidden_layers=1",
        "model.llm.config.intermediate_size=64",
        "model.vision.config.intermediate_size=64",
    )


def train_resume(ranks: Ranks, corpus: Path, out: Path, name: str) -> dict[str, Any]:
    """Two steps, a checkpoint, one more; the same step from the checkpoint; the evaluation."""
    config = config_of(name, corpus, out)
    if ranks.is_main:
        save_config(config, out / "config.yaml")
    run = Run(config, ranks)
    engine = build_engine(config, run.tokenizer, ranks)
    _, plan = _train(run, engine, PlanState(), 1, 2)
    with checkpoint.Saver(out / "checkpoints", config.checkpoint, ranks) as saver:
        saver.save(engine, checkpoint.Progress(2, plan), run.fingerprints, wait=True)
    log = MetricsLog(out, ranks, 2, 0)
    with recorded() as outcomes:
        run.evaluate(engine, 2, log)
    log.close()
    found: dict[str, Any] = {"outcomes": outcomes, "saved": full_parameters(engine)}
    found["loss"], _ = _train(run, engine, plan, 3, 1)
    found["parameters"] = full_parameters(engine)

    (path,) = checkpoint.checkpoints_at(out)
    again = Run(config, ranks)
    engine = build_engine(config.model_copy(update={"seed": 9}), again.tokenizer, ranks)
    progress = checkpoint.load(engine, path, again.fingerprints)
    found["resumed loss"], _ = _train(again, engine, progress.plan, 3, 1)
    found["resumed parameters"] = full_parameters(engine)
    other = Run(config_of("pool", corpus, out), ranks)
    try:
        checkpoint.load(engine, path, other.fingerprints)
    except InputError as error:
        found["refused"] = str(error)
    return found


def _train(run: Run, engine: Any, plan: PlanState, first: int, steps: int) -> tuple[float, Any]:
    data = run.config.data
    meter = StepMeter(data.tokens.sides, data.pack.max_tokens, run.ranks)
    batches, loss = run.loader.steps(plan), 0.0
    for step in range(first, first + steps):
        meter.start()
        batch = next(batches)
        loss = one_step(engine, batch, step, meter, run)["loss"]
        plan = batch.state
    batches.close()
    return loss, plan
