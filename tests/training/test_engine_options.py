"""`deepspeed.extra`: what the trainer owns is refused by name, as is what nobody knows."""

from typing import Any

import pytest
from deepspeed.runtime.config import _REMOVED_TOP_LEVEL_CONFIG_KEYS, DeepSpeedConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from data_pipeline.errors import InputError
from training.config import RunConfig, load_config
from training.train import main
from training.zero3 import extra as module
from training.zero3.ds_config import deepspeed_config
from training.zero3.extra import OWNED, OWNED_ZERO, check_extra, refusals

DIGITS = "training/configs/digits.yaml"


def run_config(extra: str, *more: str) -> RunConfig:
    return load_config(DIGITS, [f"deepspeed.extra={extra}", *more])


@pytest.mark.parametrize(
    ("extra", "key", "expected"),
    [
        ("{gradient_accumulation_steps: 3}", "gradient_accumulation_steps", "packs_per_step"),
        ("{train_batch_size: 48}", "train_batch_size", "packs_per_step"),
        ("{optimizer: {type: Lion}}", "optimizer", r"train\.modules"),
        ("{scheduler: {type: WarmupLR}}", "scheduler", r"train\.warmup_fraction"),
        ("{bf16: {enabled: true}}", "bf16", r"train\.precision"),
        ("{gradient_clipping: 2}", "gradient_clipping", r"train\.clip_grad_norm"),
        ("{prescale_gradients: true}", "prescale_gradients", "denominator"),
        ("{zero_optimization: {stage: 1}}", "zero_optimization.stage", "stage 3"),
        (
            "{zero_optimization: {stage3_param_persistence_threshold: 9}}",
            "zero_optimization.stage3_param_persistence_threshold",
            r"deepspeed\.param_persistence_threshold",
        ),
        (
            "{zero_optimization: {offload_param: {pin_memory: true}}}",
            "zero_optimization.offload_param",
            r"deepspeed\.offload_params=cpu",
        ),
        ("{zero_optimisation: {}}", "zero_optimisation", "mean zero_optimization"),
        (
            "{zero_optimization: {overlap_com: true}}",
            "zero_optimization.overlap_com",
            "mean overlap_comm",
        ),
        (
            "{zero_optimization: {leaf_module: {clases: [x]}}}",
            "zero_optimization.leaf_module.clases",
            "mean classes",
        ),
        ("{zero_optimization: {sub_group_size: auto}}", "sub_group_size", "Hugging Face"),
        ("{zero_optimization: {sub_group_size: 2.5}}", "sub_group_size", "integer.*2.5"),
        ("{zero_optimization: {sub_group_size: yes}}", "sub_group_size", "number"),
        ("{zero_optimization: 3}", "zero_optimization", "found 3"),
        ("{wall_clock_breakdown: sure}", "wall_clock_breakdown", "boolean.*sure"),
        ("{communication_data_type: fp8}", "communication_data_type", "bf16.*fp8"),
        ("{timers: {throughput: {enable: false}}}", "timers.throughput.enable", "mean enabled"),
        ("{flops_profiler: {profile_step: x}}", "flops_profiler.profile_step", "integer"),
    ],
)
def test_an_option_that_may_not_be_set_is_named(extra: str, key: str, expected: str) -> None:
    with pytest.raises(InputError, match=rf"deepspeed\.extra\.\S*{key}: .*{expected}"):
        check_extra(run_config(extra))


def test_offloading_is_tuned_where_it_is_on() -> None:
    tuned = "{zero_optimization: {offload_optimizer: {ratio: 0.5, device: nvme}}}"
    with pytest.raises(InputError, match=r"offload_optimizer\.device: .*deepspeed\.offload_opt"):
        check_extra(run_config(tuned, "deepspeed.offload_optimizer=cpu"))
    check_extra(run_config(tuned.replace(", device: nvme", ""), "deepspeed.offload_optimizer=cpu"))


def test_what_may_be_set_reaches_the_engine() -> None:
    config = run_config(
        "{zero_optimization: {stage3_prefetch_bucket_size: 4e6, overlap_comm: true}, timers: }"
    )
    check_extra(config)
    made = deepspeed_config(config, 1)
    assert made["zero_optimization"]["stage3_prefetch_bucket_size"] == 4_000_000
    assert made["zero_optimization"]["stage"] == 3 and "timers" not in made


def test_the_models_sizes_decide_what_nobody_sets() -> None:
    def zero(*more: str, extra: str = "{}") -> dict[str, Any]:
        config = run_config(extra, "deepspeed.param_persistence_threshold=null", *more)
        found: dict[str, Any] = deepspeed_config(config, 1)["zero_optimization"]
        return found

    bucket, persistent, live = (
        f"stage3_{name}"
        for name in ("prefetch_bucket_size", "param_persistence_threshold", "max_live_parameters")
    )
    assert zero()[persistent] == 100_000 and bucket not in zero()
    widths = ("model.llm.config.hidden_size=128", "model.vision.config.hidden_size=64")
    asked = ("deepspeed.prefetch=model", "model.llm.config.vocab_size=500", *widths)
    made = zero(*asked)
    llm = load_config(DIGITS, list(widths)).model.llm.config
    heads, groups = int(llm["num_attention_heads"]), int(llm["num_key_value_heads"])
    layer = 2 * 128 * (128 // heads) * (heads + groups) + 3 * 128 * int(llm["intermediate_size"])
    assert (made[bucket], made[persistent]) == (14_745, 1280)
    assert made[live] == made["stage3_max_reuse_distance"] == 128 * 500 + 2 * layer
    own = zero(
        *asked,
        "deepspeed.param_persistence_threshold=100000",
        extra=f"{{zero_optimization: {{{bucket}: 7}}}}",
    )
    assert (own[bucket], own[persistent]) == (7, 100_000)


class Recorder(dict):
    """A configuration that notes what it is asked for."""

    def __init__(self, content: dict[str, Any]) -> None:
        super().__init__(content)
        self.asked: set[str] = set()

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def keys(self) -> Any:
        return self

    def __copy__(self) -> "Recorder":
        return self


def test_every_option_that_deepspeed_reads_is_free_or_has_an_owner() -> None:
    recorder = Recorder({"train_micro_batch_size_per_gpu": 1})
    DeepSpeedConfig(recorder)
    free = set(module._model().model_fields)
    assert len(recorder.asked) > 40
    read = recorder.asked - set(_REMOVED_TOP_LEVEL_CONFIG_KEYS)
    assert read <= free | OWNED.keys()
    assert not free & OWNED.keys()
    names = set(DeepSpeedZeroConfig.model_fields)
    assert OWNED_ZERO.keys() - {f"stage3_{name}" for name in names} <= names


def test_what_deepspeed_refuses_at_its_start_is_an_input_error() -> None:
    with pytest.raises(InputError, match=r"deepspeed\.extra=.*no such op"), refusals({"a": 1}):
        raise ValueError("no such op")
    with pytest.raises(ValueError, match="a bug"), refusals({}):
        raise ValueError("a bug")


def test_the_trainer_ends_with_one_error_and_exit_status_2(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([DIGITS, "deepspeed.extra={fp16: {enabled: true}}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: deepspeed.extra") and "train.precision" in error
