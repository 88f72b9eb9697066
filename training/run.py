"""A run's fixed parts: data, tokenizer, plan, loader, evaluation set, and what it says."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_pipeline.errors import InputError
from data_pipeline.files import write_atomically
from data_pipeline.index import Index, build_index, load_index
from data_pipeline.loader import PackBuilder, PackedBatch, StepLoader
from data_pipeline.plan import Planner
from data_pipeline.prepare import prepare_demo
from data_pipeline.tokenizer import load_tokenizer
from kernels import implementation
from training.build import DTYPES
from training.config import PrepareSettings, RunConfig, save_config
from training.distributed import Ranks, from_main
from training.evaluate import Evaluation, evaluate
from training.metrics import MetricsLog
from training.plots import plot_run
from training.precision import has_fast_bf16
from training.stages import module_table


def check_prepared(settings: PrepareSettings) -> None:
    """InputError if the demo corpus on disk was written with other settings."""
    report = settings.out / "prepare.json"
    found = json.loads(report.read_text(encoding="utf-8")) if report.is_file() else {}
    wanted = {
        "format": settings.format,
        "seed": settings.seed,
        "train": settings.train_samples,
        "eval": settings.eval_samples,
    }
    there = {
        key: found[key]["samples"] if key in ("train", "eval") else found[key]
        for key in wanted
        if key in found
    }
    if there != wanted:
        raise InputError(
            f"{settings.out} was prepared with {there or 'something else'}, data.prepare asks for "
            f"{wanted}; remove the folder, or name another in data.prepare.out"
        )


class Run:
    """Everything a training run needs besides the engine, the same on every rank."""

    def __init__(self, config: RunConfig, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        data = config.data
        self.named_bad: set[str] = set()
        self.projector_impl = self._projector_impl()
        if data.prepare:
            from_main(self._prepare)
        self.tokenizer = load_tokenizer(data.tokenizer)
        self.index = load_index(data.shards, self.tokenizer, data.chat)
        self.planner = Planner(self.index, data.tiling, data.tokens, data.pack, config.seed)
        self.loader = StepLoader(
            self.planner, self._builder(self.index), data.loader, ranks.rank, ranks.world_size
        )
        # Found out now: a mistake in the held-out shards must not wait for the last step.
        self.held_out = self._held_out() if data.eval_shards else None
        self.loss_chunks = self._slices(data.pack.max_tokens)
        self.fingerprints = self._fingerprints()

    def _projector_impl(self) -> str:
        """What will run the projector; InputError where what was asked for cannot."""
        train = self.config.train
        try:
            return implementation(train.projector_impl, self.ranks.device, DTYPES[train.precision])
        except ValueError as error:
            raise InputError(f"train.projector_impl: {error}") from error

    def _held_out(self) -> tuple[Planner, PackBuilder]:
        data = self.config.data
        index = load_index(data.eval_shards, self.tokenizer, data.chat)
        pack = data.pack.model_copy(update={"max_tokens": self.config.eval.max_tokens})
        planner = Planner(index, data.tiling, data.tokens, pack, self.config.seed)
        return planner, self._builder(index)

    def _slices(self, max_tokens: int) -> int:
        """Slices in which a pack's logits are computed, the same on every rank."""
        return math.ceil(max_tokens / self.config.train.loss_chunk_tokens)

    def _builder(self, index: Index) -> PackBuilder:
        data = self.config.data
        return PackBuilder(
            index, self.tokenizer, data.chat, data.tiling, self.config.train.loss_weighting
        )

    def _prepare(self) -> None:
        """Write and index the demo corpus if it is not there."""
        data, settings = self.config.data, self.config.data.prepare
        assert settings is not None
        if settings.out.exists():
            check_prepared(settings)
        else:
            prepare_demo(
                settings.format,
                settings.out,
                train_samples=settings.train_samples,
                eval_samples=settings.eval_samples,
                seed=settings.seed,
            )
        tokenizer = load_tokenizer(data.tokenizer)
        for patterns in filter(None, (data.shards, data.eval_shards)):
            build_index(patterns, tokenizer, data.chat)

    def _fingerprints(self) -> dict[str, Any]:
        """What a place in the plan and the optimizer's state depend on."""
        config = self.config
        # Where pretrained weights came from no longer matters once a checkpoint holds them.
        sources = {"vision": {"pretrained"}, "llm": {"pretrained"}}
        return {
            "seed": config.seed,
            "data.shards": self.index.fingerprint,
            "data.tokenizer": self.tokenizer.fingerprint,
            "data.chat": config.data.chat.model_dump(mode="json"),
            "data.tiling": config.data.tiling.model_dump(mode="json"),
            "data.tokens": config.data.tokens.model_dump(mode="json"),
            "data.pack": config.data.pack.model_dump(mode="json"),
            "model": config.model.model_dump(mode="json", exclude=sources),
            "train.precision": config.train.precision,
            "trained modules": [name for name, m in config.train.modules if m.train],
        }

    def say(self, text: str) -> None:
        """Print on rank 0, above the progress bar."""
        if self.ranks.is_main:
            tqdm.write(text)

    def announce(self, engine: Any) -> None:
        """Save the effective settings; say what trains, on what, and what the data left out."""
        config = self.config
        if self.ranks.is_main:
            config.output_dir.mkdir(parents=True, exist_ok=True)
            save_config(config, config.output_dir / "config.yaml")
        self.say(module_table(engine.module, config.train.modules))
        accumulation = config.data.pack.packs_per_step // self.ranks.world_size
        self.say(
            f"world size {self.ranks.world_size} ({self.ranks.device.type}), {accumulation} packs "
            f"of at most {config.data.pack.max_tokens} tokens per rank and step, {len(self.index)} "
            f"samples, token counts {config.data.tokens.counts} at "
            f"{config.data.tokens.probabilities}"
        )
        self.say(
            f"precision: {config.train.precision}; projector: {self.projector_impl}, "
            f"{config.train.projector_backward} for backward"
        )
        if config.train.precision == "bf16" and not has_fast_bf16(self.ranks.device):
            self.say(
                "warning: this processor is tens of times slower in bf16 than in fp32; set "
                "train.precision=fp32, or auto to leave it to the machine"
            )
        if self.index.bad:
            first = self.index.bad[0]
            self.say(
                f"warning: the index left out {len(self.index.bad)} bad samples, the first "
                f"{first.shard}:{first.key}: {first.reason}"
            )
        if self.planner.too_long:
            sample, tokens = self.planner.too_long[0]
            self.say(
                f"warning: {len(self.planner.too_long)} samples do not fit a pack and are left "
                f"out, the first {self.index.name(sample)} with {tokens} tokens; raise "
                f"data.pack.max_tokens ({config.data.pack.max_tokens}) to keep them"
            )

    def name_bad_samples(self, packs: list[PackedBatch]) -> None:
        """Say on this rank which samples of its packs could not be used, each once."""
        for bad in (bad for pack in packs for bad in pack.bad):
            name = f"{bad.shard}:{bad.key}"
            if name not in self.named_bad:
                self.named_bad.add(name)
                tqdm.write(f"warning: left out {name}: {bad.reason}")

    def evaluate(
        self, engine: Any, step: int, log: MetricsLog, stop: Callable[[], bool] | None = None
    ) -> Evaluation | None:
        """Accuracy on the held-out shards at every trained token count, if there are any.

        None without held-out shards, and when `stop` was true on some rank.
        """
        if self.held_out is None:
            return None
        config = self.config
        sides, slices = config.data.tokens.sides, self._slices(config.eval.max_tokens)
        result = evaluate(engine, *self.held_out, sides, self.ranks, slices, stop)
        if result is None:
            return None
        for row in result.to_json():
            name = f"accuracy/{row['detail']}/{row['num_image_tokens']}"
            log.scalar(name, row["accuracy"], step)
        self.say(f"\nheld-out accuracy after step {step}:\n{result.table()}\n")
        if self.ranks.is_main:
            text = json.dumps({"step": step, "results": result.to_json()}, indent=1)
            write_atomically(config.output_dir / "evaluation.json", text.encode())
        return result

    def finish(self, result: Evaluation | None, saved: Path | None) -> None:
        """Draw the curve and say where everything is."""
        if not self.ranks.is_main:
            return
        out = self.config.output_dir
        plot_run(out / "metrics.jsonl", result.accuracy() if result else {}, out / "curve.png")
        print(f"TensorBoard log   {out / 'tensorboard'}")
        print(f"metrics           {out / 'metrics.jsonl'}")
        print(f"curve             {out / 'curve.png'}")
        print(f"checkpoint        {saved}")
