"""`training.train --dry-run`: everything that a start looks at, and the estimate, without training.

No weights are read and no parameter has values: minutes on a cluster are not spent to learn that a
path was wrong.
"""

import os
import shutil
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from data_pipeline.corpus import Corpus, cost_of, open_corpus, open_mixture
from data_pipeline.errors import InputError
from data_pipeline.loader import StepLoader
from data_pipeline.mixture import DatasetSettings
from data_pipeline.tokenizer import Tokenizer, load_tokenizer
from kernels.gpu_datasheets import find_gpu
from training import checkpoint
from training.adapters import add_adapters
from training.config import RunConfig
from training.estimate import report
from training.estimate.estimation import estimate_run
from training.estimate.speed import Cluster, gpu_named
from training.model.build import build_model
from training.parameters import freeze, module_table
from training.start.pretrained_tokenizer import check_pretrained_tokenizer

STEPS = 3
"""Steps that are planned; of the first one a rank's packs are read and decoded."""
_DEFAULT_GPU = "h100"


def dry_run(config: RunConfig, say: Callable[[str], None] = print) -> None:
    """Check a config and estimate its run, in this process, which must not be in a group.

    Raises:
        InputError: with all that was found wrong.
    """
    checks = _Checks(say)
    if config.train.precision == "auto":
        train = config.train.model_copy(update={"precision": "bf16"})
        config = config.model_copy(update={"train": train})
    tokenizer: Tokenizer | None = checks.run(
        "tokenizer", lambda: load_tokenizer(config.data.tokenizer)
    )
    corpus = None
    if tokenizer:
        if not _unprepared(config):
            corpus = checks.run("data", lambda: _open(config, say))
            checks.run("held-out data", lambda: _held_out(config, tokenizer))
        checks.run("weights", lambda: _weights(config, tokenizer, say))
    checks.run("earlier stage", lambda: _earlier(config))
    found = None
    if tokenizer or "vocab_size" in config.model.llm.config:
        found = checks.run("estimate", lambda: _estimate(config, corpus, say))
    if found:
        checks.run("free space", lambda: _space(config, found))
        if torch.cuda.is_available():
            checks.run("memory", found.check_fits)
    checks.finish()


class _Checks:
    """Runs checks one after the other, and keeps what they find."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say, self.problems = say, list[str]()

    def run(self, name: str, check: Callable[[], Any]) -> Any:
        """What the check gives; None where it found something wrong."""
        began = time.monotonic()
        try:
            found = check()
        except InputError as error:
            self.problems.append(f"{name}: {error}")
            self.say(f"{name}: not in order, see below")
            return None
        self.say(f"{name}: in order ({time.monotonic() - began:.1f} s)")
        return found

    def finish(self) -> None:
        """InputError with all that was found."""
        if self.problems:
            raise InputError(
                f"{len(self.problems)} problems: " + "\n".join(self.problems)
                if len(self.problems) > 1
                else self.problems[0]
            )


def _unprepared(config: RunConfig) -> bool:
    """Whether the first start would write the demo corpus."""
    prepare = config.data.prepare
    return prepare is not None and not prepare.out.exists()


def _ranks(config: RunConfig) -> int:
    """Those of the launcher, or as many as divide the packs of a step, up to a node of eight."""
    given = int(os.environ.get("WORLD_SIZE") or torch.cuda.device_count() or 8)
    packs = config.data.pack.packs_per_step
    return (
        given
        if "WORLD_SIZE" in os.environ
        else max(n for n in range(1, given + 1) if packs % n == 0)
    )


def _open(config: RunConfig, say: Callable[[str], None]) -> Corpus:
    """The data, its first steps planned, and the first packs of rank 0 built."""
    cost = cost_of(config.model.vision.config, config.model.llm.config)
    train = config.train
    corpus = open_corpus(config.data, config.seed, cost, train.loss_weighting, train.epochs)
    steps = [step for step, _ in islice(corpus.planner.steps(), STEPS)]
    packs = [pack for step in steps for pack in step.packs]
    say(
        f"{len(corpus.mixture):,} samples; the first {len(steps)} steps: {len(packs)} packs of "
        f"{min(p.tokens for p in packs)} to {max(p.tokens for p in packs)} tokens and up to "
        f"{max(p.num_tiles for p in packs)} tiles"
    )
    ranks = _ranks(config)
    StepLoader(corpus.planner, corpus.builder, config.data.loader, 0, ranks)  # do they divide?
    built = [corpus.builder.build(pack) for pack in steps[0].packs[::ranks]]
    for bad in (bad for pack in built for bad in pack.bad):
        say(f"warning: left out {bad.shard}:{bad.key}: {bad.reason}")
    return corpus


def _held_out(config: RunConfig, tokenizer: Tokenizer) -> None:
    if config.data.eval_shards:
        source = DatasetSettings(shards=config.data.eval_shards)
        open_mixture(config.data, tokenizer, {"held-out": source})


def _weights(config: RunConfig, tokenizer: Tokenizer, say: Callable[[str], None]) -> None:
    """The model without values; pretrained weights by their names and shapes."""
    model = build_model(config, tokenizer, on_meta=True)
    freeze(model, config.train.modules)
    add_adapters(model, config.train.adapters, config.seed)
    check_pretrained_tokenizer(config, tokenizer)
    say(module_table(model, config.train))


def _earlier(config: RunConfig) -> None:
    """InputError where the weights should come from a stage that has left none."""
    named = config.checkpoint.init_from
    if named is None or checkpoint.checkpoints_at(config.output_dir / "checkpoints"):
        return
    folder = Path(named)
    path = next(iter(checkpoint.checkpoints_at(folder)), folder)
    checkpoint.read_manifest(path)


def _estimate(
    config: RunConfig, corpus: Corpus | None, say: Callable[[str], None]
) -> report.Estimate:
    here = torch.cuda.is_available()
    gpu = (find_gpu(torch.cuda.get_device_name()) if here else None) or gpu_named(_DEFAULT_GPU)
    ranks = _ranks(config)
    gpus = min(ranks, int(os.environ.get("LOCAL_WORLD_SIZE") or torch.cuda.device_count() or 8))
    cluster = Cluster(gpu, gpus, -(-ranks // gpus))
    found = estimate_run(config, cluster, thorough=False, say=say, corpus=corpus)
    say(report.text(found))
    return found


def _space(config: RunConfig, found: report.Estimate) -> None:
    """InputError where the checkpoints that the run will keep would fill the disk."""
    resident, ranks = found.memory.resident, found.memory.ranks
    each = ranks * sum(resident[kind] for kind in ("parameters", "masters", "optimizer"))
    each += ranks * resident["masters"] * (config.train.ema is not None)
    kept = config.checkpoint.keep + (config.checkpoint.keep_best is not None) + 1
    folder = _existing(config.output_dir.absolute())
    free = shutil.disk_usage(folder).free
    if free < kept * each:
        raise InputError(
            f"{folder} has {free / 1e9:.1f} GB free; {kept} checkpoints of about "
            f"{each / 1e9:.1f} GB are needed: make room, lower checkpoint.keep, or use another "
            "output_dir"
        )


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.exists())
