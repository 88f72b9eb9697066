"""A stage that trains adapters on two ranks: resumed, handed on, on another number of ranks."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from data_pipeline.tokenizer import SPECIAL_TOKENS, load_tokenizer
from tests.ranks import RankPool
from tests.training import start_scenarios
from tests.training.start_scenarios import Outcome, Starting
from tests.training.test_new_tokens_run import STILL, evaluated, with_tokenizer
from tests.training.test_pretrained import save_llm
from training.adapters import piece_of
from training.checkpoint import read_manifest
from training.export import export
from training.model.hub import TokenFlexForConditionalGeneration
from training.zero3.saved_tensors import saved_tensors
from training.zero3.shards import Shards

pytestmark = pytest.mark.multiprocess
PARTS = ("vision_model", "projector", "language_model")
FROZEN = tuple(f"train.modules.{name}.train=false" for name in PARTS)
WHOLE = tuple(f"train.modules.{name}.train=true" for name in PARTS)
NONE = tuple(f"train.adapters.{name}=null" for name in PARTS)
LORA = (
    *(FROZEN[0], FROZEN[2], "train.precision=fp32"),
    "train.adapters.language_model={r: 3, alpha: 6, lr: 1.0e-2, dropout: 0.2}",
)
DORA = (
    *(*FROZEN[:2], "train.modules.language_model.train=new_tokens", "train.precision=bf16"),
    "train.adapters.language_model="
    "{r: 3, use_dora: true, use_rslora: true, lr: 1.0e-2, target_modules: [o_proj]}",
    "train.adapters.vision_model={r: 2, use_dora: true, use_rslora: true, lr: 1.0e-2}",
    "train.adapters.projector={r: 2, lr: 1.0e-2, target_modules: [w1, w3]}",
)
PIXELS = torch.arange(3 * 32 * 32, dtype=torch.uint8).view(1, 3, 32, 32)


@dataclass(frozen=True)
class Stage:
    """A run of two ranks over four steps."""

    corpus: Path
    settings: tuple[str, ...]
    adapters: tuple[str, ...]
    out: Path
    outcome: Outcome

    @property
    def has_dropout(self) -> bool:
        return self.adapters is LORA


def tensors(out: Path, step: int, apart: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """What a checkpoint gives; the adapters of the parts `apart` by themselves."""
    path = out / f"checkpoints/step-{step:08d}"
    manifest = read_manifest(path)
    return {
        saved.name: torch.cat([*saved.pieces()]).view(saved.shape)
        for saved in saved_tensors(path, manifest.world_size, manifest.adapters, apart)
    }


def assert_near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, check_dtype=False)


@pytest.fixture(scope="module", params=[LORA, DORA], ids=["LoRA fp32", "DoRA and rows, bf16"])
def stage(
    request: Any,
    two_ranks: RankPool,
    digits_corpus: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Stage:
    folder = tmp_path_factory.mktemp("adapters")
    tokenizer = start_scenarios.without_markers(digits_corpus / "tokenizer.model", folder)
    corpus, settings = with_tokenizer(digits_corpus, folder / "corpus", tokenizer)
    known = load_tokenizer(tokenizer).vocab_size - len(SPECIAL_TOKENS)
    narrow = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    llm = save_llm(digits_corpus, folder / "llm", **narrow, vocab_size=known)
    settings = (
        *(*settings, f"model.llm.pretrained={llm}", "train.steps=4"),
        *("data.pack.max_tokens=128", "eval.max_samples=4", "eval.max_tokens=128"),
        *("train.gradient_checkpointing=true", "train.weight_decay=0.1"),
    )
    out = folder / "stage"
    outcome = two_ranks.run(Starting(), corpus, out, *settings, *request.param)[0]
    return Stage(corpus, settings, request.param, out, outcome)


def test_adapters_move_and_what_they_lie_beside_stays(stage: Stage) -> None:
    code, said, rows = stage.outcome
    assert code == 0 and "language_model.adapters" in said, code
    assert len(rows) == 4 and rows[0]["loss"] != rows[-1]["loss"]
    trained = Shards(stage.out / "checkpoints/step-00000004", 2).shapes()
    first, last = (tensors(stage.out, step, PARTS) for step in (2, 4))
    assert first.keys() == last.keys()
    small = {name for name in last if piece_of(name)}
    assert small and small <= trained.keys()
    for name in small:
        assert not torch.equal(first[name], last[name]), name
    for name in last.keys() - trained.keys():
        assert torch.equal(first[name], last[name]) or name in stage_rows(stage), name


def stage_rows(stage: Stage) -> set[str]:
    """The tables that rows of new tokens are put into."""
    names = {"language_model.model.embed_tokens.weight", "language_model.lm_head.weight"}
    return set() if stage.has_dropout else names


def test_a_crash_changes_nothing(
    stage: Stage, one_rank: RankPool, two_ranks: RankPool, tmp_path: Path
) -> None:
    settings = (*stage.settings, *stage.adapters)
    code, *_ = two_ranks.run(Starting(crash=4), stage.corpus, tmp_path / "crash", *settings)[0]
    assert code == "crash"
    shutil.copytree(tmp_path / "crash", tmp_path / "other")
    other = (*settings, "train.adapters.language_model.r=5")
    error, *_ = one_rank.run(Starting(), stage.corpus, tmp_path / "crash", *other)[0]
    assert "train.adapters.language_model.r: 3 -> 5" in str(error), error
    code, said, rows = two_ranks.run(Starting(), stage.corpus, tmp_path / "crash", *settings)[0]
    assert code == 0 and "resumed" in said, code
    assert [row["loss"] for row in rows] == [row["loss"] for row in stage.outcome[2]]
    expected = tensors(stage.out, 4, PARTS)
    for name, value in tensors(tmp_path / "crash", 4, PARTS).items():
        assert torch.equal(value, expected[name]), name
    # Where inputs are left out at random, another number of ranks leaves out others.
    code, said, rows = one_rank.run(Starting(), stage.corpus, tmp_path / "other", *settings)[0]
    assert code == 0, code
    if not stage.has_dropout:
        losses = [row["loss"] for row in stage.outcome[2]]
        assert [row["loss"] for row in rows] == pytest.approx(losses, rel=1e-2)
        for name, value in tensors(tmp_path / "other", 4, PARTS).items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=0.1)


def test_a_later_stage_without_them_has_the_merged_weights(
    stage: Stage, one_rank: RankPool, tmp_path: Path
) -> None:
    settings = (*stage.settings, *stage.adapters, *NONE, *WHOLE, *STILL)
    settings = (*settings, f"checkpoint.init_from={stage.out}")
    code, said, _ = one_rank.run(Starting(), stage.corpus, tmp_path / "next", *settings)[0]
    assert code == 0 and "adapters of language_model are merged" in said, code
    assert "not all of" not in said
    expected, found = tensors(stage.out, 4), tensors(tmp_path / "next", 1)
    assert found.keys() == expected.keys() and not any(map(piece_of, found))
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    near = 1e-5 if stage.has_dropout else 3e-2
    assert evaluated(tmp_path / "next") == pytest.approx(evaluated(stage.out), rel=near)


def test_a_later_stage_goes_on_with_the_same_adapters(
    stage: Stage, one_rank: RankPool, tmp_path: Path
) -> None:
    still = [text for text in stage.adapters if "adapters" in text]
    still = [f"{text.partition('=')[0]}.lr=0" for text in still]
    settings = (*stage.settings, *STILL, *stage.adapters, *still)
    settings = (*settings, f"checkpoint.init_from={stage.out}")
    code, said, _ = one_rank.run(Starting(), stage.corpus, tmp_path / "next", *settings)[0]
    assert code == 0 and "adapters of language_model go on training" in said, code
    assert "not all of" not in said
    expected = tensors(stage.out, 4, PARTS)
    for name, value in tensors(tmp_path / "next", 1, PARTS).items():
        assert torch.equal(value, expected[name]), name


def test_a_later_stage_with_others_begins_from_the_merged_weights(
    stage: Stage, one_rank: RankPool, tmp_path: Path
) -> None:
    """DoRA's lengths are those of the rows of what was merged."""
    settings = (*stage.settings, *STILL, *stage.adapters, "train.precision=fp32")
    settings = (
        *settings,
        "train.adapters.language_model={r: 4, use_dora: true, lr: 0, dropout: 0}",
    )
    if stage.adapters is DORA:  # those of the other parts go on training
        settings += ("train.adapters.vision_model.lr=0", "train.adapters.projector.lr=0")
    settings = (*settings, f"checkpoint.init_from={stage.out}")
    code, said, _ = one_rank.run(Starting(), stage.corpus, tmp_path / "next", *settings)[0]
    assert code == 0 and "adapters of language_model are merged" in said, code
    expected, found = tensors(stage.out, 4), tensors(tmp_path / "next", 1)
    for name, value in expected.items():
        assert_near(found[name], value)
    near = 1e-4 if stage.has_dropout else 3e-2
    assert evaluated(tmp_path / "next") == pytest.approx(evaluated(stage.out), rel=near)


def test_the_adapter_beside_the_base_is_the_merged_model(stage: Stage, tmp_path: Path) -> None:
    """In float32, through PEFT, to rounding."""
    from peft import PeftModel

    def logits(model: Any) -> Tensor:
        with torch.no_grad():
            return model.eval()(**inputs).logits

    export(stage.out, tmp_path / "merged", dtype="fp32")
    export(stage.out, tmp_path / "base", dtype="fp32", adapter=True)
    load: Any = TokenFlexForConditionalGeneration.from_pretrained
    expected, base = load(tmp_path / "merged"), load(tmp_path / "base")
    ids = torch.full((1, 12), 9)
    ids[0, :4] = expected.config.image_token_id
    inputs = {"input_ids": ids, "pixel_values": PIXELS, "tile_sides": [2]}
    without = logits(base)
    beside: Any = PeftModel.from_pretrained(base, tmp_path / "base/adapter")
    torch.testing.assert_close(logits(beside), logits(expected), rtol=1e-4, atol=1e-5)
    assert (without - logits(expected)).abs().max() > 1e-3
    assert not any(piece_of(name) for name in load_file(tmp_path / "base/model.safetensors"))
