"""One optimizer step under ZeRO-3: the same gradients however packs are shared out, no hang."""

import re
from pathlib import Path

import numpy as np
import pytest

from tests.ranks import RankPool
from tests.training import scenarios
from training.config import load_config
from training.metrics import step_line

pytestmark = pytest.mark.multiprocess

SAMPLES = list(range(8))
PAGE = Path("docs/performance.md")
FP32 = ["train.precision=fp32"]


@pytest.fixture(scope="module")
def reference(one_rank: RankPool, digits_corpus: Path) -> tuple[float, dict[str, np.ndarray]]:
    """All samples in one pack on one rank."""
    return one_rank.run(scenarios.step_gradients, digits_corpus, [SAMPLES], FP32)[0]


def assert_same(
    found: tuple[float, dict[str, np.ndarray]], expected: tuple[float, dict[str, np.ndarray]]
) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        error = np.linalg.norm(found[1][name] - gradient)
        # The bias of the keys has no gradient but rounding: softmax ignores it.
        assert error <= 1e-4 * np.linalg.norm(gradient) + 1e-6, name
    assert sum(np.linalg.norm(g) > 1e-4 for g in expected[1].values()) > 20


def test_accumulating_packs_changes_no_gradient(
    one_rank: RankPool, digits_corpus: Path, reference: tuple
) -> None:
    packs = [[0, 1, 2], [3], [4, 5], [6, 7]]
    assert_same(one_rank.run(scenarios.step_gradients, digits_corpus, packs, FP32)[0], reference)


@pytest.mark.parametrize(
    "packs",
    [
        pytest.param([[0, 1, 2, 3, 4], [5, 6, 7]], id="one pack each"),
        pytest.param([[0, 1, 2], [3], [4, 5], [6, 7]], id="two packs each"),
        pytest.param([SAMPLES, []], id="no image on rank 1"),
        pytest.param([[], SAMPLES], id="no image on rank 0"),
    ],
)
def test_sharing_out_packs_changes_no_gradient(
    two_ranks: RankPool, digits_corpus: Path, reference: tuple, packs: list[list[int]]
) -> None:
    for result in two_ranks.run(scenarios.step_gradients, digits_corpus, packs, FP32):
        assert_same(result, reference)


def test_sliced_and_checkpointed_loss_gives_the_same_gradients(
    two_ranks: RankPool, digits_corpus: Path, reference: tuple
) -> None:
    overrides = [*FP32, "train.loss_chunk_tokens=128", "train.gradient_checkpointing=true"]
    packs = [[0, 1, 2, 3, 4, 5, 6], [7]]  # unequal numbers of supervised tokens
    for result in two_ranks.run(scenarios.step_gradients, digits_corpus, packs, overrides):
        assert_same(result, reference)


@pytest.mark.parametrize(
    "text",
    [
        {"model_type": "gemma2", "sliding_window": 16, "tie_word_embeddings": "true"},
        {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2}
        | {"moe_intermediate_size": 64, "num_hidden_layers": 1},
    ],
    ids=lambda text: text["model_type"],
)
def test_language_models_of_other_kinds_share_out_packs(
    one_rank: RankPool, two_ranks: RankPool, digits_corpus: Path, text: dict
) -> None:
    """Experts that no token of a rank has chosen must not leave the other rank waiting."""
    changes = [*FP32, *(f"model.llm.config.{key}={value}" for key, value in text.items())]
    expected = one_rank.run(scenarios.step_gradients, digits_corpus, [SAMPLES], changes)[0]
    for result in two_ranks.run(scenarios.step_gradients, digits_corpus, [SAMPLES, []], changes):
        assert_same(result, expected)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("backward", ["save", "recompute"])
def test_the_projector_with_nothing_resident_gives_the_same_gradients(
    two_ranks: RankPool, digits_corpus: Path, reference: tuple, impl: str, backward: str
) -> None:
    """Every parameter partitioned to nothing; Triton's kernels run in its interpreter."""
    how = [f"train.projector_impl={impl}", f"train.projector_backward={backward}"]
    packs = [[0, 1, 2, 3, 4], [5, 6, 7]]
    for result in two_ranks.run(scenarios.step_gradients, digits_corpus, packs, [*FP32, *how]):
        assert_same(result, reference)


@pytest.mark.parametrize(
    ("preset", "trained"),
    [
        ("stage1_align", {"projector"}),
        ("stage2_pretrain", {"vision_model", "projector", "language_model"}),
        ("stage3_finetune", {"vision_model", "projector", "language_model"}),
        (None, {"projector", "language_model"}),
    ],
)
def test_frozen_parameters_keep_their_bytes_and_the_others_change(
    two_ranks: RankPool, digits_corpus: Path, preset: str | None, trained: set[str]
) -> None:
    names = ("vision_model", "projector", "language_model")
    if preset:  # what the shipped stage says, on the small model
        modules = dict(load_config(f"training/configs/{preset}.yaml").train.modules)
        train = {name: modules[name].train for name in names}
    else:
        train = {name: name in trained for name in names}
    overrides = [f"train.modules.{name}.train={str(train[name]).lower()}" for name in names]
    before, after = two_ranks.run(scenarios.train_steps, digits_corpus, 2, overrides)[0]
    assert before.keys() == after.keys()
    for name in before:
        same = np.array_equal(before[name], after[name])
        if name.split(".")[0] not in trained:
            assert same, name
        elif "k_proj.bias" not in name and "embed_tokens" not in name:
            assert not same, name


def test_offloading_to_the_host_changes_no_gradient(
    two_ranks: RankPool, digits_corpus: Path, reference: tuple
) -> None:
    overrides = [*FP32, "deepspeed.offload_optimizer=cpu", "deepspeed.offload_params=cpu"]
    packs = [[0, 1, 2], [3], [4, 5], [6, 7]]
    for result in two_ranks.run(scenarios.step_gradients, digits_corpus, packs, overrides):
        assert_same(result, reference)


def test_tied_embeddings_train(two_ranks: RankPool, digits_corpus: Path) -> None:
    overrides = ["model.llm.config.tie_word_embeddings=true"]
    before, after = two_ranks.run(scenarios.train_steps, digits_corpus, 2, overrides)[0]
    assert not any("lm_head" in name for name in before)
    name = "language_model.model.embed_tokens.weight"
    assert not np.array_equal(before[name], after[name])


def test_nan_on_one_rank_stops_every_rank_before_the_update(
    two_ranks: RankPool, digits_corpus: Path
) -> None:
    for message, unchanged in two_ranks.run(scenarios.nan_step, digits_corpus):
        assert "the loss is nan in step 1, which changed no weight" in message
        assert ".tar:" in message  # names samples
        assert unchanged


def test_the_flops_of_a_step_do_not_depend_on_who_trains_its_packs(
    one_rank: RankPool, two_ranks: RankPool, digits_corpus: Path
) -> None:
    alone = one_rank.run(scenarios.step_metrics, digits_corpus, 1e12)[0]
    shared = two_ranks.run(scenarios.step_metrics, digits_corpus, 1e12)
    assert shared[0] == shared[1]
    for key in ("flops", "hardware_flops", "packs", "tokens"):
        assert shared[0][key] == pytest.approx(alone[key], rel=1e-12)
    for found, ranks in ((alone, 1), (shared[0], 2)):
        assert found["mfu"] == pytest.approx(found["flops"] / (ranks * 1e12 * found["step_s"]))
        assert found["hfu"] > found["mfu"]
        assert found["packs_per_s"] == pytest.approx(2 / found["step_s"])
    assert {shared[0]["slowest_rank"], shared[0]["fastest_rank"]} == {0, 1}
    patterns = [key.replace("*", ".+") for key in re.findall(r"`(\w+\*?)`", PAGE.read_text())]
    assert not [key for key in shared[0] if not any(re.fullmatch(p, key) for p in patterns)]
    assert "slowest_rank" not in alone
    assert "MFU" in step_line(1, 1, shared[0]) and "last by" in step_line(1, 1, shared[0])


def test_without_a_known_peak_there_is_no_mfu(one_rank: RankPool, digits_corpus: Path) -> None:
    found = one_rank.run(scenarios.step_metrics, digits_corpus, None)[0]
    assert found["flops"] > 0 and not {"mfu", "hfu"} & found.keys()
    assert "MFU" not in step_line(1, 1, found)
