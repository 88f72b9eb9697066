"""The run's settings: one YAML file and `key=value` overrides.

The settings of the data are in data_pipeline/settings.py; this file holds those of the model, the
optimisation and the run, and joins them all into `RunConfig`.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    Field,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)

from data_pipeline.backbone_config import BackboneConfig, tile_side
from data_pipeline.backbone_folder import as_before, with_architecture
from data_pipeline.config_file import KeyProblems, Settings, load_settings
from data_pipeline.files import write_atomically
from data_pipeline.loss_weighting import LossWeighting
from data_pipeline.paths import FilePath, PathText
from data_pipeline.settings import DataSettings, Length, Seed
from data_pipeline.yaml_text import write_yaml
from kernels import POOL_MODES
from training.adapters.adapter_settings import StageAdapters
from training.optimizers.optimizer_settings import EmaSettings, OptimizerSettings

__all__ = ["DataSettings", "RunConfig", "load_config", "save_config"]


class BackboneSettings(Settings):
    """A vision tower or language model: its architecture, and weights to start from."""

    config: BackboneConfig
    """The transformers configuration, `model_type` and its fields; left out: that of the weights.
    """
    pretrained: PathText | None = None
    """Folder or hub name of the weights; null starts from random weights."""

    @model_validator(mode="before")
    @classmethod
    def _of_the_weights(cls, section: Any) -> Any:
        return with_architecture(section)


class ProjectorSettings(Settings):
    """How a tile's patches become n x n tokens."""

    method: Literal["pool", "unshuffle", "query", "pool_query", "select", "merge"] = "pool"
    """See `training.model.hub.METHODS`."""
    num_tokens: int | None = Field(None, gt=0)
    """Tokens per tile of unshuffle, which makes one number only; null: that of data.tokens."""


class ModelSettings(Settings):
    """The three parts of the model."""

    vision: BackboneSettings
    llm: BackboneSettings
    projector: ProjectorSettings = ProjectorSettings()
    pool: str = "adaptive"
    """The windows of methods that pool: a mode in `kernels.POOL_MODES`."""
    projector_hidden_ratio: int = Field(3, gt=0)
    pretrained: PathText | None = None
    """An exported or imported model folder that all three parts start from; instead of theirs."""

    @field_validator("pool")
    @classmethod
    def _known_mode(cls, mode: str) -> str:
        if mode not in POOL_MODES:
            raise ValueError(f"expected one of {', '.join(POOL_MODES)}")
        return mode

    def fingerprint(self) -> dict[str, Any]:
        """What is trained, whatever its weights came from: a checkpoint holds them.

        Without a projector of the defaults, which checkpoints of before it was a setting lack.
        """
        left_out: dict[str, Any] = {"vision": {"pretrained"}, "llm": {"pretrained"}}
        left_out["pretrained"] = True
        if self.projector == ProjectorSettings():
            left_out["projector"] = True
        return self.model_dump(mode="json", exclude=left_out)


class ModuleSettings(Settings):
    """Whether a module trains, and how fast."""

    train: bool = True
    lr: float = Field(1e-5, ge=0)
    """Peak learning rate."""

    @property
    def trains_whole(self) -> bool:
        """Whether all of it trains."""
        return self.train is True


class VisionModelSettings(ModuleSettings):
    """The same, and how the rate goes with depth."""

    layer_decay: float = Field(1.0, gt=0, le=1)
    """Each layer has this times the rate of the layer behind it; the last one nearly `lr`."""


class LanguageModelSettings(ModuleSettings):
    """The same, and one choice more."""

    train: bool | Literal["new_tokens"] = True  # type: ignore[assignment]
    """new_tokens: only the rows of tokens that are new to it, in embedding and head."""

    @field_validator("train", mode="wrap")
    @classmethod
    def _one_message(cls, value: Any, check: ValidatorFunctionWrapHandler) -> Any:
        try:
            return check(value)
        except ValidationError as error:
            raise ValueError("expected true, false or new_tokens") from error


class StageModules(Settings):
    """Which modules train in this stage."""

    vision_model: VisionModelSettings = VisionModelSettings()
    projector: ModuleSettings = ModuleSettings()
    language_model: LanguageModelSettings = LanguageModelSettings()


_Beta = Annotated[float, Field(ge=0, lt=1)]
_Layered = Literal["vision_model", "language_model"]
LAYERED: tuple[_Layered, ...] = get_args(_Layered)
"""The modules that consist of layers."""


def _chosen_modules(setting: bool | list[_Layered]) -> tuple[str, ...]:
    if isinstance(setting, bool):
        return LAYERED if setting else ()
    return tuple(name for name in LAYERED if name in setting)


class ConsistencySettings(Settings):
    """What `data.tokens.schedule=consistency` adds to the loss."""

    weight: float = Field(1.0, ge=0)
    """Of the divergence KL(copy of the most tokens || another) beside that copy's cross-entropy."""


class TrainSettings(Length, extra="forbid"):
    """Optimisation: an optimizer, linear warm-up, a decay, clipping."""

    steps: int = Field(0, gt=0)
    """Or `epochs`; 0, which cannot be given, until a start has counted how many steps those are."""
    extend: Literal["stretch", "constant", "decay"] | None = None
    """On resume with another schedule: as if it had been so from the start; the old one, then its
    last rate; or a warm-up from the rate reached and a decay over the steps left."""
    modules: StageModules = StageModules()
    adapters: StageAdapters = StageAdapters()
    optimizer: OptimizerSettings = OptimizerSettings()
    ema: EmaSettings | None = None
    loss_weighting: LossWeighting = "sqrt"
    """How much a supervised token counts: 1, 1/n, 1/sqrt(n); see `data_pipeline.loss_weighting`."""
    consistency: ConsistencySettings = ConsistencySettings()
    warmup_fraction: float = Field(0.03, ge=0, lt=1)
    min_lr_fraction: float = Field(0.0, ge=0, le=1)
    schedule: Literal["cosine", "linear", "wsd"] = "cosine"
    """How learning rates fall after the warm-up: along a cosine or a line from there to the end; or
    not until the last `decay_fraction` of the steps, and then along a line."""
    decay_fraction: float = Field(0.1, gt=0, le=1)
    """Of wsd alone."""
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[_Beta, _Beta] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    clip_grad_norm: float = Field(1.0, ge=0)
    """Largest gradient norm; 0 does not clip."""
    precision: Literal["auto", "bf16", "fp32"] = "bf16"
    """auto: bf16 where the device computes it at full speed (GPUs, new CPUs), else fp32."""
    device: Literal["auto", "cpu"] = "auto"
    """auto: the GPUs, or the CPU of a machine without; GPUs that PyTorch does not see are an error,
    unless the CPU is asked for."""
    gradient_checkpointing: bool | list[_Layered] = False
    """Whose layers keep their inputs only and are computed again in backward: all, or of
    [vision_model, language_model]. Of the projector that is `projector_backward`."""
    projector_backward: Literal["save", "recompute"] = "save"
    """Keep the projector's gates for backward, or compute them again: a seventh of the memory."""
    projector_impl: Literal["auto", "triton", "torch"] = "auto"
    """What runs the projector; auto: the Triton kernels where every rank can launch them, else
    PyTorch."""
    decoder_impl: Literal["transformers", "liger"] = "transformers"
    """Whose norms, rotary positions and SwiGLU the language model has; liger: Triton kernels."""
    compile_layers: bool | list[_Layered] = False
    """Whose layers `torch.compile` compiles: all, or of [vision_model, language_model]."""
    copy_ahead: bool = True
    """Copy the next pack to the GPU while this one is computed, for the room of one pack more."""
    flash_attention: Literal["torch", "fa3"] = "torch"
    """Which FlashAttention runs in bf16 on a GPU: PyTorch's own, or FlashAttention 3."""
    log_every: int = Field(10, gt=0)
    """Print every this many steps; every step is recorded."""
    loss_chunk_tokens: int = Field(4096, gt=0)
    """Most tokens per slice of the logits; a pack's loss runs in ceil(max_tokens / this) slices."""

    @field_validator("gradient_checkpointing", "compile_layers", mode="wrap")
    @classmethod
    def _switch_or_modules(
        cls, value: Any, check: ValidatorFunctionWrapHandler, info: ValidationInfo
    ) -> Any:
        try:
            return check(value)
        except ValidationError as error:
            text = f"expected true, false or a list of {', '.join(LAYERED)}"
            if info.field_name == "gradient_checkpointing":
                text += "; of the projector that is train.projector_backward=recompute"
            raise ValueError(text) from error

    @property
    def recomputed(self) -> tuple[str, ...]:
        """The modules whose layers are computed again in backward."""
        return _chosen_modules(self.gradient_checkpointing)

    @property
    def compiled(self) -> tuple[str, ...]:
        """The modules whose layers are compiled."""
        return _chosen_modules(self.compile_layers)

    @model_validator(mode="after")
    def _ends(self) -> "TrainSettings":
        if not self.steps and self.epochs is None:
            raise ValueError("give steps, or epochs: where the run ends")
        if self.schedule == "wsd" and self.warmup_fraction + self.decay_fraction > 1:
            raise ValueError(
                f"warmup_fraction ({self.warmup_fraction}) and decay_fraction "
                f"({self.decay_fraction}) are more than the whole run; lower one"
            )
        return self

    @model_validator(mode="after")
    def _something_trains(self) -> "TrainSettings":
        if not (self.adapters.given or any(module.train for _, module in self.modules)):
            text = "every module is frozen; set train: true for at least one, or give it adapters"
            raise KeyProblems([("modules", text)])
        return self

    @model_validator(mode="after")
    def _decayed_layers_train(self) -> "TrainSettings":
        tower = self.modules.vision_model
        if tower.layer_decay != 1 and not tower.train:
            text = (
                f"layer_decay={tower.layer_decay:g} has no effect on a tower that does not train; "
                "set train: true there, or leave it out (adapters have a rate of their own)"
            )
            raise KeyProblems([("modules.vision_model.layer_decay", text)])
        return self

    @model_validator(mode="after")
    def _adapters_lie_beside_what_is_frozen(self) -> "TrainSettings":
        text = "it trains as a whole: set train.modules.{0}.train=false, or leave its adapters out"
        whole = [name for name in self.adapters.given if getattr(self.modules, name).trains_whole]
        if whole:
            raise KeyProblems([(f"adapters.{name}", text.format(name)) for name in whole])
        return self


OFFLOAD_OPTIMIZER = "deepspeed.offload_optimizer=cpu"
"""The override that keeps the optimizer in host memory, for advice."""


class DeepSpeedSettings(Settings):
    """ZeRO-3 options; `extra` is merged into the DeepSpeed configuration."""

    offload_optimizer: Literal["none", "cpu"] = "none"
    offload_params: Literal["none", "cpu"] = "none"
    prefetch: Literal["fixed", "model"] = "fixed"
    """How far ahead weights are gathered: by the presets, or from the model's sizes."""
    param_persistence_threshold: int | None = Field(None, ge=0)
    """Parameters of fewer elements stay whole on every rank; null: 100,000, or as `prefetch`."""
    extra: dict[str, Any] = Field({})
    """The engine checks them before it starts."""


class CheckpointSettings(Settings):
    """When to save, what to keep, where to resume from."""

    every_steps: int = Field(1000, gt=0)
    keep: int = Field(2, ge=2)
    """Newest checkpoints to keep; two at least, should the newest be damaged."""
    keep_every_steps: int = Field(0, ge=0)
    """Also keep every checkpoint whose step is a multiple of this; 0: none."""
    keep_best: Literal["accuracy", "loss"] | None = None
    """Also keep the checkpoint whose evaluation was best by this: mean over the token counts."""
    background: bool = True
    """Write while training goes on; false: each save waits until its checkpoint is published."""
    resume: PathText = "auto"
    """`auto` (newest checkpoint of output_dir, if any), `never`, or a checkpoint folder; the last
    two count at their first start, and later starts go on from the run's own checkpoints."""
    init_from: PathText | None = None
    """Weights of an earlier stage to start a new run from: a checkpoint, or a folder of them."""
    init_allow: list[str] = Field(default_factory=list)
    """What may differ from that stage or pretrained weights: model.pool, data.tokenizer, ..."""

    @field_validator("resume", mode="before")
    @classmethod
    def _no_switch(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError("expected auto, never, or a checkpoint's folder")
        return value

    @field_validator("init_allow")
    @classmethod
    def _known_places(cls, names: list[str]) -> list[str]:
        for name in names:
            if name != "data.tokenizer" and name.split(".")[0] != "model":
                raise ValueError(
                    f"{name!r}: expected data.tokenizer, model, or a part as model.pool"
                )
        return names


_LONGEST_S = 30 * 24 * 3600  # more is no limit, and what waits cannot count as far


class FaultSettings(Settings):
    """When a rank is taken for stuck, and what happens to a loss that is not finite or leaps."""

    startup_timeout_s: float = Field(1800, gt=0, le=_LONGEST_S)
    """Longest wait for another rank until the first step is done, and while saving."""
    step_timeout_s: float = Field(300, gt=0, le=_LONGEST_S)
    """Longest wait afterwards; above the longest step, and its wait for data."""
    max_skipped_steps: int = Field(0, ge=0)
    """Steps with a non-finite loss or gradient to leave out at most; 0: stop at the first."""
    spike_sigma: float = Field(6.0, ge=0)
    """Report a loss this many standard deviations above the recent mean; 0: never."""


class EvalSettings(Settings):
    """Evaluation after the last step; `every_steps` adds more on the way."""

    every_steps: int = Field(0, ge=0)
    """0 evaluates at the end only."""
    max_tokens: int = Field(8192, gt=0)
    """Pack length in evaluation."""
    max_samples: int = Field(0, ge=0)
    """Most held-out samples to score, the same ones each time; 0: all."""


class ProfileSettings(Settings):
    """Steps to trace, for `output_dir`/profile: a Chrome trace and a table of phases."""

    steps: tuple[Annotated[int, Field(gt=0)], Annotated[int, Field(gt=0)]] | None = None
    """The first and the last, as [10, 13]; null: none."""
    ranks: list[Annotated[int, Field(ge=0)]] = Field([0])
    shapes: bool = False
    """Also the shapes of every operation's tensors, which makes a trace much larger."""
    memory: bool = False
    """Also every allocation on the GPU, for pytorch.org/memory_viz."""

    @field_validator("steps")
    @classmethod
    def _in_order(cls, steps: tuple[int, int] | None) -> tuple[int, int] | None:
        if steps and steps[0] > steps[1]:
            raise ValueError(f"{list(steps)}: expected the first step and then the last")
        return steps


class MetricsSettings(Settings):
    """Where the scalars of TensorBoard are logged, too, each by the package of its name."""

    loggers: list[Literal["wandb", "mlflow", "trackio"]] = Field([])
    project: str = Field("tokenflex", min_length=1)
    """W&B's and trackio's project, MLflow's experiment."""
    name: str | None = Field(None, min_length=1)
    """What the run is called there; null: as the folder `output_dir`."""

    @field_validator("loggers")
    @classmethod
    def _each_once(cls, names: list[str]) -> list[str]:
        if len(set(names)) < len(names):
            raise ValueError(f"{names}: expected each once")
        return names


class RunConfig(Settings):
    """Everything a run depends on."""

    output_dir: FilePath
    seed: Seed = 0
    data: DataSettings
    model: ModelSettings
    train: TrainSettings
    deepspeed: DeepSpeedSettings = DeepSpeedSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    faults: FaultSettings = FaultSettings()
    eval: EvalSettings = EvalSettings()
    profile: ProfileSettings = ProfileSettings()
    metrics: MetricsSettings = MetricsSettings()

    @model_validator(mode="after")
    def _profiled_steps_come(self) -> "RunConfig":
        asked, steps = self.profile.steps, self.train.steps
        if asked and 0 < steps < asked[1]:
            raise ValueError(
                f"profile.steps is {list(asked)} but the run ends at train.steps={steps}; give "
                "earlier ones"
            )
        return self

    @model_validator(mode="after")
    def _consistency_is_trained(self) -> "RunConfig":
        tokens, weight = self.data.tokens, self.train.consistency.weight
        if tokens.schedule == "consistency" and len(tokens.trained_sides) < 2:
            raise ValueError(
                f"data.tokens.schedule=consistency compares counts, but data.tokens.counts="
                f"{tokens.counts} trains one; give more, or another schedule"
            )
        if tokens.schedule != "consistency" and weight != ConsistencySettings().weight:
            raise ValueError(
                f"train.consistency.weight={weight:g} has no effect with data.tokens.schedule="
                f"{tokens.schedule}; set data.tokens.schedule=consistency or leave it out"
            )
        return self

    @property
    def consistency_weight(self) -> float | None:
        """Of the divergence between counts; None where the loss has none."""
        consistent = self.data.tokens.schedule == "consistency"
        return self.train.consistency.weight if consistent else None

    @property
    def optimizer_on_host(self) -> bool:
        """Whether the optimizer is kept in host memory."""
        return self.deepspeed.offload_optimizer != "none"

    @model_validator(mode="after")
    def _the_best_can_be_known(self) -> "RunConfig":
        steps = sorted((self.eval.every_steps, self.checkpoint.every_steps))
        if self.checkpoint.keep_best is None:
            return self
        if not steps[0] or steps[1] % steps[0]:
            raise ValueError(
                "checkpoint.keep_best compares checkpoints that are evaluated: make one of "
                f"eval.every_steps ({self.eval.every_steps}) and checkpoint.every_steps "
                f"({self.checkpoint.every_steps}) a multiple of the other"
            )
        return self

    @field_validator("output_dir")
    @classmethod
    def _no_pattern(cls, folder: Path) -> Path:
        if found := set("[]*?") & set(str(folder)):
            raise ValueError(
                f"{folder} holds {' '.join(sorted(found))}, which are taken for a pattern when "
                "checkpoints are looked for; use another name"
            )
        return folder

    @model_validator(mode="after")
    def _something_to_evaluate(self) -> "RunConfig":
        if self.eval.every_steps and not self.data.eval_shards:
            raise ValueError(
                f"eval.every_steps is {self.eval.every_steps} but data.eval_shards is empty: give "
                "held-out shards, or set eval.every_steps=0"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _architectures_of_before(cls, settings: Any) -> Any:
        return as_before(settings)

    @model_validator(mode="after")
    def _tiles_fit_the_tower(self) -> "RunConfig":
        self.data.fit_tiles_to(self.model.vision.config)
        tower = self.model.vision.config
        if (side := tile_side(tower)) != self.data.tiling.tile_size:
            key = "num_patches and patch_size make" if "num_patches" in tower else "image_size is"
            raise ValueError(
                f"data.tiling.tile_size is {self.data.tiling.tile_size} but "
                f"model.vision.config.{key} {side}; make them equal"
            )
        return self

    @model_validator(mode="after")
    def _method_makes_the_counts(self) -> "RunConfig":
        projector, counts = self.model.projector, self.data.tokens.counts
        if projector.method != "unshuffle":
            return self
        fixed = projector.num_tokens or counts[0]
        if counts != [fixed]:
            raise ValueError(
                f"model.projector.method is unshuffle, which makes one number of tokens, but "
                f"data.tokens.counts is {counts} and model.projector.num_tokens "
                f"{projector.num_tokens}: give data.tokens.counts=[{fixed}] "
                "data.tokens.probabilities=[1], or another method"
            )
        filled = projector.model_copy(update={"num_tokens": fixed})
        self.model = self.model.model_copy(update={"projector": filled})
        return self

    @model_validator(mode="after")
    def _kernels_have_the_method(self) -> "RunConfig":
        method, train = self.model.projector.method, self.train
        for key, value, others in (
            ("projector_impl", train.projector_impl, "auto"),
            ("projector_backward", train.projector_backward, "save"),
        ):
            if method != "pool" and value in ("triton", "recompute"):
                raise ValueError(
                    f"train.{key} is {value}, which only the method pool has, but "
                    f"model.projector.method is {method}: set train.{key}={others}"
                )
        if method != "pool" and train.adapters.projector:
            raise ValueError(
                "train.adapters.projector stands beside the matrices of the method pool, but "
                f"model.projector.method is {method}: leave these adapters out, or train the "
                "projector (train.modules.projector.train=true)"
            )
        return self


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a YAML file, apply `key.sub=value` overrides (values are YAML) and check everything.

    Raises:
        InputError: naming the file and, for every problem found, the key and what was expected.
    """
    return load_settings(RunConfig, path, overrides)


def save_config(config: RunConfig, path: Path) -> None:
    """Write the effective settings as YAML, whole or not at all, for `load_config`."""
    write_atomically(path, write_yaml(config.model_dump(mode="json")).encode())
