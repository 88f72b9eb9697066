"""A run's fixed parts: data, tokenizer, plan, loader, evaluation set, and what it says."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_pipeline.corpus import cost_of, make_exact_builder, open_corpus, open_mixture
from data_pipeline.errors import InputError
from data_pipeline.index import build_index
from data_pipeline.loader import PackBuilder, PackedBatch, StepLoader
from data_pipeline.mixture import DatasetSettings
from data_pipeline.plan import PLAN_VERSION, EvaluationPlan, LeftOut, PlanState
from data_pipeline.prepare.demo_corpus import prepare_once
from data_pipeline.stats.advice import advice
from data_pipeline.stats.placed import Placed
from data_pipeline.storage import Storage
from data_pipeline.tokenizer import load_tokenizer
from training.checkpoint.pruning import Best
from training.config import DataSettings, RunConfig
from training.distributed import Ranks, from_main
from training.engine_interface import Engine
from training.evaluate.in_training import Evaluation, evaluate
from training.flops import PackCost
from training.metrics import MetricsLog
from training.metrics.run_curve import plot_run
from training.model.build import DTYPES
from training.model.projector_choice import choose_projector
from training.parameters import Schedule, module_table
from training.precision import has_fast_bf16
from training.side_outputs import SideFiles, attempt
from training.speed.device_copies import PackCopies


class Run:
    """Everything a training run needs besides the engine, the same on every rank.

    `files` writes what it leaves for people; None: each call by itself.
    """

    def __init__(self, config: RunConfig, ranks: Ranks, files: SideFiles | None = None) -> None:
        self.config, self.ranks = config, ranks
        self.files = files or SideFiles(background=False)
        self.schedule = Schedule.of(config.train)
        self.copies = PackCopies(ranks.device, config.train.copy_ahead)
        data = config.data
        self.named_bad: set[str] = set()
        train = config.train
        pools = config.model.projector.method == "pool"  # the others are plain PyTorch
        self.projector_impl, self.projector_obstacle = choose_projector(
            train.projector_impl if pools else "torch", ranks, DTYPES[train.precision]
        )
        if data.prepare:
            from_main(lambda: prepare_corpus(data))
        cost = cost_of(config.model.vision.config, config.model.llm.config)
        corpus = open_corpus(data, config.seed, cost, train.loss_weighting, train.epochs)
        corpus.planner.check()  # a pack too short for every sample must not wait for the engine
        self.tokenizer, self.mixture = corpus.tokenizer, corpus.mixture
        self.planner = corpus.planner
        self.loader = StepLoader(
            corpus.planner, corpus.builder, data.loader, ranks.rank, ranks.world_size
        )
        # Found out now: a mistake in the held-out shards must not wait for the last step.
        self.held_out = self._held_out() if data.eval_shards else None
        self.loss_chunks = self._slices(data.pack.max_tokens)
        if config.consistency_weight is not None:  # logits of teachers beside the students'
            self.loss_chunks *= 2
        self.pack_cost = PackCost.of(config, self.tokenizer, self.loss_chunks)
        self.fingerprints = self._fingerprints()

    def _held_out(self) -> tuple[EvaluationPlan, PackBuilder]:
        data, source = self.config.data, DatasetSettings(shards=self.config.data.eval_shards)
        mixture = open_mixture(data, self.tokenizer, {"held-out": source})
        limits = self.config.eval
        plan = EvaluationPlan(mixture, data.tiling, limits.max_tokens, limits.max_samples)
        return plan, make_exact_builder(data, mixture, self.tokenizer)

    def _slices(self, max_tokens: int) -> int:
        """Slices in which a pack's logits are computed, the same on every rank."""
        return math.ceil(max_tokens / self.config.train.loss_chunk_tokens)

    def _fingerprints(self) -> dict[str, Any]:
        """What a place in the plan and the optimizer's state depend on."""
        config = self.config
        adapters = config.train.adapters.shapes()
        decay = config.train.modules.vision_model.layer_decay
        optimizer = config.train.optimizer.state()
        return {
            "seed": config.seed,
            "data": self.mixture.fingerprint(),
            "data.plan": PLAN_VERSION,
            "data.tokenizer": self.tokenizer.fingerprint,
            "data.chat": config.data.chat.model_dump(mode="json"),
            "data.tiling": config.data.tiling.model_dump(mode="json"),
            "data.tokens": config.data.tokens.fingerprint(),
            "data.pack": config.data.pack.model_dump(mode="json"),
            "model": config.model.fingerprint(),
            "train.precision": config.train.precision,
            "trained modules": [
                name if m.trains_whole else f"{name}: {m.train}"
                for name, m in config.train.modules
                if m.train
            ],
            **({"train.adapters": adapters} if adapters else {}),
            **({"train.optimizer": optimizer} if optimizer else {}),
            **({"train.modules.vision_model.layer_decay": decay} if decay != 1 else {}),
        }

    def new_window(self, place: PlanState, saved: dict[str, Any]) -> PlanState | None:
        """Where to go on from in data that changed, if `data.allow_change` permits it."""
        if not self.config.data.allow_change:
            return None
        before, now = saved.get("data", {}), self.mixture.fingerprint()
        unchanged = {n for n in before if n in now and before[n]["shards"] == now[n]["shards"]}
        moved = place.moved_to(self.mixture, frozenset(unchanged))
        self.say(
            "warning: the data or their end changed (data.allow_change): a new window begins; "
            f"{place.step} steps of the old one come again, {len(place.carry) - len(moved.carry)} "
            "samples carried over are dropped, and datasets whose shards changed start from their "
            "beginning"
        )
        return moved

    def say(self, text: str) -> None:
        """Print on rank 0, above the progress bar."""
        if self.ranks.is_main:
            tqdm.write(text)

    def announce(self, engine: Engine) -> None:
        """Say what trains, on what, and what the data left out."""
        config = self.config
        self.say(module_table(engine.module, config.train, engine.shape))
        accumulation = config.data.pack.packs_per_step // self.ranks.world_size
        self.say(
            f"world size {self.ranks.world_size} ({self.ranks.device.type}), {accumulation} packs "
            f"of at most {config.data.pack.max_tokens} tokens per rank and step, "
            f"{len(self.mixture)} samples, token counts {config.data.tokens.describe()}"
        )
        method = config.model.projector.method
        self.say(
            f"precision: {config.train.precision}; projector: {self.projector_impl}, "
            f"{config.train.projector_backward} for backward"
            + (f"; tokens by {method}" if method != "pool" else "")
        )
        if self.projector_obstacle:
            self.say(
                "warning: the projector runs in plain PyTorch on every rank, tile sides one after "
                f"the other: {self.projector_obstacle}"
            )
        if config.train.precision == "bf16" and not has_fast_bf16(self.ranks.device):
            self.say(
                "warning: this processor is tens of times slower in bf16 than in fp32; set "
                "train.precision=fp32, or auto to leave it to the machine"
            )
        self.advise()
        if bad := self.mixture.bad:
            self.say(
                f"warning: the index left out {len(bad)} bad samples, the first "
                f"{bad[0].shard}:{bad[0].key}: {bad[0].reason}"
            )

    def advise(self) -> None:
        """Say what would help if the plan's first window fills its packs badly."""
        if not self.ranks.is_main:
            return
        window = next(self.planner.windows(), None)
        if window and window.num_steps and (text := advice(Placed.of([window]), self.config.data)):
            self.say(f"warning: {text}; see python -m data_pipeline.stats plan")

    def data_ended(self, step: int, state: PlanState) -> None:
        """Say that no step follows this one, and which samples the end of the data left out."""
        self.say(
            f"warning: the data ended after step {step} of {self.config.train.steps}: "
            "every dataset reached its data.datasets.*.repeat; lower train.steps to that, or raise "
            "a repeat and go on with data.allow_change=true"
        )
        for window in self.planner.windows(state):
            self.name_left_out(window.left_out)

    def name_left_out(self, left_out: tuple[LeftOut, ...]) -> None:
        """Say which samples fit into no pack, each once per epoch."""
        if not left_out or not self.ranks.is_main:
            return
        pack = self.config.data.pack
        names = [
            f"{self.mixture.name(sample.sample)} ({sample.tokens} tokens, {sample.tiles} tiles)"
            for sample in left_out
        ]
        self.say(
            f"warning: {len(names)} samples do not fit a pack (data.pack.max_tokens "
            f"{pack.max_tokens}, max_tiles {pack.max_tiles}) and are left out: {', '.join(names)}"
        )

    def name_bad_samples(self, packs: list[PackedBatch]) -> None:
        """Say on this rank which samples of its packs could not be used, each once."""
        for bad in (bad for pack in packs for bad in pack.bad):
            name = f"{bad.shard}:{bad.key}"
            if name not in self.named_bad:
                self.named_bad.add(name)
                tqdm.write(f"warning: left out {name}: {bad.reason}")

    def evaluate(
        self, engine: Engine, step: int, log: MetricsLog, stop: Callable[[], bool] | None = None
    ) -> Evaluation | None:
        """Accuracy and loss on the held-out shards at every trained token count, if there are any.

        None without held-out shards, and when `stop` was true on some rank.
        """
        if self.held_out is None:
            return None
        config = self.config
        sides, slices = config.data.tokens.sides, self._slices(config.eval.max_tokens)
        result = evaluate(engine, *self.held_out, sides, self.ranks, slices, stop)
        if result is None:
            return None
        log.evaluation(result.to_row(step))
        self.say(f"\nheld-out accuracy after step {step}:\n{result.table()}")
        self.say(f"{result.losses()}\n")
        if self.ranks.is_main:
            text = json.dumps({"step": step, "results": result.to_json()}, indent=1)
            self.files.replace(config.output_dir / "evaluation.json", text.encode())
        return result

    def evaluates_at(self, step: int) -> bool:
        """Whether the settings ask for an evaluation on the way after this step."""
        every, last = self.config.eval.every_steps, self.config.train.steps
        return 0 < step < last and every > 0 and step % every == 0

    def finish(self, result: Evaluation | None, saved: Path | None, best: Best | None) -> None:
        """Draw the curve and say where everything is."""
        if not self.ranks.is_main:
            return
        out = self.config.output_dir
        self.files.flush()
        accuracy = result.accuracy() if result else {}
        attempt("no curve", lambda: plot_run(out, accuracy, out / "curve.png"))
        print(f"TensorBoard log   {out / 'tensorboard'}")
        print(f"metrics           {out / 'metrics.jsonl'}")
        print(f"curve             {out / 'curve.png'}")
        print(f"checkpoint        {saved}")
        if best:
            print(f"best checkpoint   {best.path} ({best})")


def prepare_corpus(data: DataSettings) -> None:
    """Write and index the demo corpus of `data.prepare` if it is not there.

    Raises:
        InputError: it cannot be written, or what is there was written with other settings.
    """
    settings = data.prepare
    assert settings is not None
    try:
        prepare_once(settings)
    except OSError as error:
        raise InputError(
            f"cannot write the demo corpus to data.prepare.out, {settings.out}: {error}; use "
            "another folder"
        ) from error
    tokenizer = load_tokenizer(data.tokenizer)
    storage = Storage(data.storage)
    sources = [source.shards for source in data.sources.values()]
    for patterns in filter(None, (*sources, data.eval_shards)):
        build_index(patterns, tokenizer, data.chat, 1, data.index_dir, storage)
