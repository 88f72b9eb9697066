"""A stage that trains the rows of new tokens beside a frozen language model, and later ones."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from data_pipeline.chat import ChatSettings
from data_pipeline.index import build_index
from data_pipeline.tokenizer import SPECIAL_TOKENS, load_tokenizer
from tests.ranks import RankPool
from tests.training import start_scenarios
from tests.training.start_scenarios import Outcome, Starting
from tests.training.test_pretrained import save_llm
from training.checkpoint import read_manifest
from training.export import export
from training.model import PackedTokenFlex
from training.zero3.saved_tensors import saved_tensors
from training.zero3.shards import Shards

pytestmark = pytest.mark.multiprocess
ROWS = "train.modules.language_model.train=new_tokens"
UNTIED = ("model.llm.config.tie_word_embeddings=false", "train.precision=fp32")
TIED = ("model.llm.config.tie_word_embeddings=true", "train.precision=bf16")
STILL = (
    *(f"train.modules.{name}.lr=0" for name in ("vision_model", "projector", "language_model")),
    "train.steps=1",
)


@dataclass(frozen=True)
class Stage:
    """A run of two ranks over four steps, from pretrained weights that know none of the markers."""

    corpus: Path
    weights: dict[str, Tensor]
    settings: tuple[str, ...]
    out: Path
    outcome: Outcome
    new: list[int]

    def tensors(self, step: int = 4) -> dict[str, Tensor]:
        return tensors(self.out, step)


def tensors(out: Path, step: int) -> dict[str, Tensor]:
    """What a checkpoint gives to a later stage or an export."""
    path = out / f"checkpoints/step-{step:08d}"
    world_size = read_manifest(path).world_size
    return {
        saved.name: torch.cat([*saved.pieces()]).view(saved.shape)
        for saved in saved_tensors(path, world_size)
    }


def evaluated(out: Path) -> list[float]:
    rows = (out / "evaluations.jsonl").read_text().splitlines()
    return [json.loads(rows[-1])["loss"]]


@pytest.fixture(scope="module", params=[UNTIED, TIED], ids=["untied fp32", "tied bf16"])
def stage(
    request: Any,
    two_ranks: RankPool,
    digits_corpus: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Stage:
    folder = tmp_path_factory.mktemp("new tokens")
    tokenizer = start_scenarios.without_markers(digits_corpus / "tokenizer.model", folder)
    corpus, settings = with_tokenizer(digits_corpus, folder / "corpus", tokenizer)
    known = load_tokenizer(tokenizer).vocab_size - len(SPECIAL_TOKENS)
    narrow = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    tied = request.param is TIED
    llm = save_llm(
        digits_corpus, folder / "llm", **narrow, vocab_size=known, tie_word_embeddings=tied
    )
    settings = (
        *(*settings, *request.param, f"model.llm.pretrained={llm}", "train.steps=4"),
        *("data.pack.max_tokens=128", "train.loss_chunk_tokens=50"),
        *("eval.max_samples=4", "eval.max_tokens=128", "train.gradient_checkpointing=true"),
        *("train.modules.vision_model.train=false", "train.weight_decay=0.1"),
    )
    out = folder / "stage"
    outcome = two_ranks.run(Starting(), corpus, out, *settings, ROWS)[0]
    new = [*range(known, known + len(SPECIAL_TOKENS))]
    dtype = torch.bfloat16 if tied else torch.float32
    weights = load_file(llm / "model.safetensors")
    weights = {name: value.to(dtype).float() for name, value in weights.items()}
    return Stage(corpus, weights, settings, out, outcome, new)


def with_tokenizer(corpus: Path, folder: Path, tokenizer: Path) -> tuple[Path, tuple[str, ...]]:
    """A copy of the corpus indexed with another tokenizer, and the settings that take it."""
    shutil.copytree(corpus, folder)
    for part in ("train", "eval"):
        build_index(str(folder / part), load_tokenizer(tokenizer), ChatSettings(system=""))
    return folder, (f"data.tokenizer={tokenizer}", f"data.eval_shards=[{folder / 'eval'}]")


def test_new_rows_move_and_all_others_stay(stage: Stage) -> None:
    code, said, rows = stage.outcome
    assert code == 0 and "rows of 5 new tokens train: " in said and "<IMG_CONTEXT>" in said, code
    assert len(rows) == 4
    first, last = stage.tensors(2), stage.tensors()
    for name, value in stage.weights.items():
        found = last[f"language_model.{name}"]
        assert torch.equal(found[: len(value)], value), name
        if len(found) > len(value):
            moved = (found[stage.new] != first[f"language_model.{name}"][stage.new]).any(1)
            # No embedding of <IMG_CONTEXT> is seen: features stand in its place.
            assert moved.sum() >= len(stage.new) - (name != "lm_head.weight"), name


def test_the_optimizer_holds_no_other_rows(stage: Stage) -> None:
    path = stage.out / "checkpoints/step-00000004"
    shards, width = Shards(path, 2), 32
    tables = {n: s for n, s in shards.shapes().items() if n.startswith("language_model.")}
    tied = len(tables) == 1
    assert [*tables.values()] == [(len(stage.new), width)] * (1 if tied else 2)
    moments = sum(
        part["exp_avg"].numel()
        for rank in range(2)
        for part in shards._zero(rank)["optimizer_state_dict"]["state"].values()
    )
    projector = sum(
        value.numel() for name, value in stage.tensors().items() if name.startswith("projector.")
    )
    assert projector < moments <= projector + len(tables) * len(stage.new) * width + 64


def test_a_crash_and_other_ranks_go_on_with_the_same_rows(
    stage: Stage, one_rank: RankPool, two_ranks: RankPool, tmp_path: Path
) -> None:
    settings = (*stage.settings, ROWS)
    code, *_ = two_ranks.run(Starting(crash=4), stage.corpus, tmp_path / "crash", *settings)[0]
    assert code == "crash"
    shutil.copytree(tmp_path / "crash", tmp_path / "other")
    whole = "train.modules.language_model.train=true"
    error, *_ = two_ranks.run(Starting(), stage.corpus, tmp_path / "crash", *settings, whole)[0]
    assert "trained modules" in str(error) and "language_model: new_tokens" in str(error)
    # The weights need not be there any more.
    settings = (*settings, "model.llm.pretrained=null")
    code, said, rows = two_ranks.run(Starting(), stage.corpus, tmp_path / "crash", *settings)[0]
    assert code == 0 and "rows of 5 new tokens train" in said, code
    assert [row["loss"] for row in rows] == [row["loss"] for row in stage.outcome[2]]
    for name, value in tensors(tmp_path / "crash", 4).items():
        assert torch.equal(value, stage.tensors()[name]), name
    code, said, rows = one_rank.run(Starting(), stage.corpus, tmp_path / "other", *settings)[0]
    assert code == 0, code
    near = 1e-5 if "train.precision=fp32" in stage.settings else 1e-2
    losses = [row["loss"] for row in stage.outcome[2]]
    assert [row["loss"] for row in rows] == pytest.approx(losses, rel=near)
    for name, value in tensors(tmp_path / "other", 4).items():
        torch.testing.assert_close(value, stage.tensors()[name], rtol=0, atol=10 * near)


def test_a_later_stage_trains_the_whole_language_model_from_there(
    stage: Stage, one_rank: RankPool, tmp_path: Path
) -> None:
    """The masters of the rows are in those of the embedding."""
    settings = (*stage.settings, *STILL, f"checkpoint.init_from={stage.out}")
    code, said, _ = one_rank.run(Starting(), stage.corpus, tmp_path / "next", *settings)[0]
    assert code == 0 and "was not taken" not in said and "not all of" not in said, code
    path = tmp_path / "next/checkpoints/step-00000001"
    embedding = "language_model.model.embed_tokens.weight"
    assert embedding in Shards(path, 1).shapes()
    found = tensors(tmp_path / "next", 1)
    assert found.keys() == stage.tensors().keys()
    for name, value in stage.tensors().items():
        assert torch.equal(found[name], value), name
    near = 1e-5 if "train.precision=fp32" in stage.settings else 2e-2
    assert evaluated(tmp_path / "next") == pytest.approx(evaluated(stage.out), rel=near)


def test_a_later_stage_trains_the_rows_again(
    stage: Stage, one_rank: RankPool, tmp_path: Path
) -> None:
    settings = (*stage.settings, *STILL, ROWS, f"checkpoint.init_from={stage.out}")
    settings = (*settings, "model.llm.pretrained=null")
    code, said, _ = one_rank.run(Starting(), stage.corpus, tmp_path / "next", *settings)[0]
    assert code == 0 and "rows of 5 new tokens train" in said, code
    for name, value in tensors(tmp_path / "next", 1).items():
        assert torch.equal(value, stage.tensors()[name]), name


def test_rows_that_an_earlier_stage_had_not(
    digits_corpus: Path, one_rank: RankPool, tmp_path: Path
) -> None:
    before = ("train.steps=1", *UNTIED)
    assert one_rank.run(Starting(), digits_corpus, tmp_path / "base", *before)[0][0] == 0
    larger = start_scenarios.with_more_tokens(digits_corpus / "tokenizer.model", tmp_path, 3)
    corpus, settings = with_tokenizer(digits_corpus, tmp_path / "corpus", larger)
    settings = (*settings, *before, ROWS, "data.eval_shards=[]")
    settings = (*settings, f"checkpoint.init_from={tmp_path / 'base'}", "train.weight_decay=0")
    settings = (*settings, "checkpoint.init_allow=[data.tokenizer]")
    code, said, _ = one_rank.run(Starting(), corpus, tmp_path / "next", *settings)[0]
    assert code == 0 and "rows of 3 new tokens train: <new0>, <new1>, <new2>" in said, code
    earlier, later = tensors(tmp_path / "base", 1), tensors(tmp_path / "next", 1)
    for name in (n for n in earlier if n.startswith("language_model.")):
        assert torch.equal(later[name][: len(earlier[name])], earlier[name]), name
    # A checkpoint knows which tokens they are, and wins over what could be found out now.
    settings = (*settings, "checkpoint.init_from=null")
    code, said, _ = one_rank.run(Starting(), corpus, tmp_path / "next", *settings)[0]
    assert code == 0 and "rows of 3 new tokens train" in said and "resumed" in said, code


def test_the_exported_model_has_the_rows_in_place(stage: Stage, tmp_path: Path) -> None:
    export(stage.out, tmp_path / "model")
    stored = load_file(tmp_path / "model/model.safetensors")
    assert not any("new_rows" in name for name in stored)
    model: Any = PackedTokenFlex.from_pretrained(tmp_path / "model")
    weights, expected = dict(model.named_parameters()), stage.tensors()
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(weights[name], value.to(weights[name])), name
