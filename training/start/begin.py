"""The start of a run: which checkpoint, whether the settings fit it, the engine, what is noted."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from data_pipeline.plan import PlanState
from training import checkpoint
from training.checkpoint import Manifest, Progress
from training.distributed import from_main
from training.engine_interface import Engine
from training.health import Monitor
from training.health.loss_guard import WINDOW
from training.metrics import read_metrics
from training.run import Run
from training.speed import make_faster
from training.start.changes import check_origin, describe_changes, origin_of
from training.start.earlier_stage import earlier_stage, take_weights
from training.start.epochs import settle_end
from training.start.extension import continued
from training.start.new_tokens import settle_new_tokens
from training.start.pretrained_tokenizer import check_pretrained_tokenizer
from training.start.starts import Starts
from training.zero3.engine import build_engine


def start(run: Run, saver: checkpoint.Saver, monitor: Monitor) -> tuple[Engine, Progress]:
    """The engine, with the weights that the config says, and where the run goes on from.

    Raises:
        InputError: on every rank, where the settings and what is on disk mean different things.
    """
    folder, starts, place = saver.folder, Starts(run.config), PlanState()
    saved = starts.find_checkpoint(folder, run.say)
    stage = None if saved else earlier_stage(run)
    manifest = from_main(lambda: checkpoint.read_manifest(saved)) if saved else None
    from_main(lambda: checkpoint.refuse_later(folder, manifest.step if manifest else 0))
    if saved and manifest:
        # Told now: a model of billions of parameters need not be built for that.
        place = checkpoint.place_of(manifest, saved, run.fingerprints, run.new_window)
        from_main(lambda: check_origin(manifest.run.get("origin"), run, saved))
    place = settle_end(run, manifest, place)
    if manifest:
        run.schedule = continued(manifest, run)
    if not (saved or stage):
        from_main(lambda: check_pretrained_tokenizer(run.config, run.tokenizer))
    new_tokens = settle_new_tokens(run, manifest, stage)
    pretrained = not (saved or stage)
    engine: Engine = build_engine(run.config, run.tokenizer, run.ranks, pretrained, new_tokens)
    if run.config.model.projector.method == "pool":
        projector: Any = engine.module.projector
        projector.impl = run.projector_impl  # what every rank can run
    make_faster(engine.module, run.config)
    progress = Progress()
    if saved and manifest:
        progress = checkpoint.load(engine, saved, run.fingerprints, lambda *_: place)
        progress = replace(progress, plan=place)
        run.say(f"resumed from {saved} at step {progress.step}")
        run.say(describe_changes(manifest, run.config, saved))
    else:
        if stage:
            take_weights(engine, stage, run)
        if run.config.train.adapters.drop_out:
            # Ranks leave out other inputs, and the same ones at every start.
            checkpoint.restore_rng(checkpoint.new_rng_state(run.config.seed, 0, run.ranks.rank))
    saver.check_space(engine)
    monitor.guard.restore(from_main(lambda: rows_before(run.config.output_dir, progress.step)))
    saver.about_run = about(run, manifest, stage) | {"new_tokens": new_tokens}
    starts.note(run.config, progress.step, saved or stage)
    run.announce(engine)
    return engine, progress


def about(run: Run, manifest: Manifest | None, stage: Path | None) -> dict[str, Any]:
    """What the run's checkpoints are to say of it."""
    if manifest:
        origin = manifest.run.get("origin")
    else:
        origin = from_main(lambda: origin_of(run.config, stage))
    return {
        "settings": run.config.model_dump(mode="json"),
        "origin": origin,
        "schedule": asdict(run.schedule),
        "vocab_size": run.tokenizer.vocab_size,
    }


def rows_before(output_dir: Path, step: int) -> list[dict[str, Any]]:
    """The metrics of the last steps up to `step`, as many as the guard compares with."""
    rows = read_metrics(output_dir / "metrics.jsonl")
    return [row for row in rows if row["step"] <= step][-WINDOW:]
