"""A run's fixed parts: data, tokenizer, plan, loader, evaluation set, and what it says."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch.distributed
from tqdm import tqdm

from data_pipeline.files import write_atomically
from data_pipeline.index import Index, build_index, load_index
from data_pipeline.loader import PackBuilder, PackedBatch, StepLoader
from data_pipeline.plan import Planner
from data_pipeline.prepare import prepare_demo
from data_pipeline.tokenizer import load_tokenizer
from training.config import PrepareSettings, RunConfig, save_config
from training.distributed import Ranks
from training.evaluate import Evaluation, evaluate
from training.metrics import MetricsLog
from training.plots import plot_run
from training.stages import module_table


class Run:
    """Everything a training run needs besides the engine, the same on every rank."""

    def __init__(self, config: RunConfig, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        data = config.data
        self.named_bad: set[str] = set()
        if data.prepare:
            self._prepare(data.prepare)
        self.tokenizer = load_tokenizer(data.tokenizer)
        self.index = load_index(data.shards, self.tokenizer, data.chat)
        self.planner = Planner(self.index, data.tiling, data.tokens, data.pack, config.seed)
        self.loader = StepLoader(
            self.planner, self._builder(self.index), data.loader, ranks.rank, ranks.world_size
        )
        self.loss_chunks = math.ceil(data.pack.max_tokens / config.train.loss_chunk_tokens)
        self.fingerprints = self._fingerprints()

    def _builder(self, index: Index) -> PackBuilder:
        data = self.config.data
        return PackBuilder(
            index, self.tokenizer, data.chat, data.tiling, self.config.train.loss_weighting
        )

    def _prepare(self, settings: PrepareSettings) -> None:
        """Rank 0 writes and indexes the demo corpus if it is not there; the others wait."""
        data = self.config.data
        if self.ranks.is_main:
            if not settings.out.exists():
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
        torch.distributed.barrier()

    def _fingerprints(self) -> dict[str, Any]:
        """What a place in the plan and the optimizer's state depend on."""
        config = self.config
        architecture = json.dumps(config.model.model_dump(mode="json"), sort_keys=True)
        return {
            "seed": config.seed,
            "data.shards": self.index.fingerprint,
            "data.tokenizer": self.tokenizer.fingerprint,
            "data.chat": config.data.chat.model_dump(mode="json"),
            "data.tiling": config.data.tiling.model_dump(mode="json"),
            "data.tokens": config.data.tokens.model_dump(mode="json"),
            "data.pack": config.data.pack.model_dump(mode="json"),
            "model": hashlib.sha256(architecture.encode()).hexdigest()[:16],
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

    def evaluate(self, engine: Any, step: int, log: MetricsLog) -> Evaluation | None:
        """Accuracy on the held-out shards at every trained token count, if there are any."""
        config = self.config
        if not config.data.eval_shards:
            return None
        data = config.data
        index = load_index(data.eval_shards, self.tokenizer, data.chat)
        pack = data.pack.model_copy(update={"max_tokens": config.eval.max_tokens})
        planner = Planner(index, data.tiling, data.tokens, pack, config.seed)
        result = evaluate(engine, planner, self._builder(index), data.tokens.sides, self.ranks)
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
