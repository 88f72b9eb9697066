"""What is typed at a start means what the user meant, at every start, or is refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_pipeline.chat import ChatSettings
from data_pipeline.index import build_index
from data_pipeline.tokenizer import load_tokenizer
from tests.data_pipeline.small_tokenizers import save_sentencepiece
from tests.ranks import RankPool
from tests.training import start_scenarios
from tests.training.scenarios import tiny_config
from tests.training.start_scenarios import Outcome
from training.config import load_config
from training.exit_codes import PREEMPTED
from training.metrics import read_metrics
from training.start.starts import Starts

pytestmark = pytest.mark.multiprocess
Start = Callable[..., Outcome]
RATES = ("step", "loss", "lr")


@pytest.fixture(scope="module")
def start(one_rank: RankPool, digits_corpus: Path) -> Start:
    """`start(out, *overrides, crash=, stop=)`: one start of a run."""

    def call(out: Path, *overrides: str, **when: int) -> Outcome:
        function = start_scenarios.Starting(**when)
        return one_rank.run(function, digits_corpus, out, *overrides)[0]

    return call


@pytest.fixture(scope="module")
def base(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of six steps, with checkpoints of 2, 4 and 6."""
    out = tmp_path_factory.mktemp("start") / "base"
    assert start(out, "train.steps=6")[0] == 0
    return out


@pytest.fixture
def copy(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "copy"))


def steps(outcome: Outcome) -> list[int]:
    return [row["step"] for row in outcome[2]]


def rates(outcome: Outcome) -> list[Any]:
    return [[row[key] for key in RATES] for row in outcome[2]]


# checkpoint.init_from

OTHER_MODELS = {
    "model.llm.config.num_hidden_layers=1": "num_hidden_layers is 2 there and 1 here",
    "model.llm.config.rope_parameters={rope_type: default, rope_theta: 10}": "rope_parameters",
    "model.llm.config.hidden_act=relu": "hidden_act is 'silu' there and 'relu' here",
    "model.vision.config.num_attention_heads=2": "num_attention_heads is 4 there and 2 here",
    "model.vision.config.layer_norm_eps=0.1": "layer_norm_eps",
    "model.pool=resize": "pool is 'adaptive' there and 'resize' here",
}


@pytest.mark.parametrize("change", OTHER_MODELS)
def test_the_weights_of_another_model_are_refused_by_name(
    start: Start, base: Path, tmp_path: Path, change: str
) -> None:
    error, *_ = start(tmp_path / "x", f"checkpoint.init_from={base}/checkpoints", change)
    key = change.split("=")[0]
    assert isinstance(error, str) and f"{key}: {OTHER_MODELS[change]}" in error
    assert f"checkpoint.init_allow=[{key}]" in error


def test_the_same_model_in_other_words_is_the_same(
    start: Start, base: Path, tmp_path: Path
) -> None:
    """A default that one stage writes out and the other leaves to the library."""
    words = ("model.llm.config.hidden_act=silu", "model.vision.config.num_channels=3")
    code, said, _ = start(tmp_path / "x", f"checkpoint.init_from={base}", "train.steps=1", *words)
    assert code == 0 and "step-00000006" in said and "warning" not in said


def test_what_may_differ_is_named_and_what_stays_behind_too(
    start: Start, base: Path, tmp_path: Path
) -> None:
    settings = (f"checkpoint.init_from={base}", "train.steps=1")
    fewer = ("model.llm.config.num_hidden_layers=1", "checkpoint.init_allow=[model.llm]")
    code, said, _ = start(tmp_path / "x", *settings, *fewer)
    assert code == 0 and "num_hidden_layers is 2 there and 1 here" in said
    assert "language_model.model.layers.1.mlp.up_proj.weight" in said
    assert "layers.0" not in said
    more = ("model.llm.config.num_hidden_layers=3", "checkpoint.init_allow=[model]")
    error, *_ = start(tmp_path / "y", *settings, *more)
    assert "has no language_model.model.layers.2." in str(error)
    other = ("model.pool=resize", "checkpoint.init_allow=[model.llm]")
    assert "model.pool: " in str(start(tmp_path / "z", *settings, *other)[0])


def test_another_tokenizer_of_the_same_size_is_refused(
    start: Start, base: Path, digits_corpus: Path, tmp_path: Path
) -> None:
    shutil.copytree(digits_corpus / "train", tmp_path / "train")
    other = save_sentencepiece(tmp_path)
    build_index(str(tmp_path / "train"), load_tokenizer(other), ChatSettings(system=""))
    own = (f"data.tokenizer={other}", f"data.shards=[{tmp_path / 'train'}]")
    error, *_ = start(tmp_path / "x", f"checkpoint.init_from={base}/checkpoints", *own)
    assert "data.tokenizer: " in str(error) and "init_allow=[data.tokenizer]" in str(error)
    copied = shutil.copytree(base, tmp_path / "copy")
    error, *_ = start(copied, "train.steps=6", *own, "data.allow_change=true")
    assert "data.tokenizer: " in str(error) and "allow_change" not in str(error)


def test_a_vocabulary_that_grew_keeps_the_rows_of_before(
    start: Start, one_rank: RankPool, base: Path, digits_corpus: Path, tmp_path: Path
) -> None:
    shutil.copytree(digits_corpus / "train", tmp_path / "train")
    larger = start_scenarios.with_more_tokens(digits_corpus / "tokenizer.model", tmp_path, 3)
    build_index(str(tmp_path / "train"), load_tokenizer(larger), ChatSettings(system=""))
    own = (f"data.tokenizer={larger}", f"data.shards=[{tmp_path / 'train'}]", "train.steps=1")
    settings = (*own, f"checkpoint.init_from={base}", "train.precision=fp32")
    error, *_ = start(tmp_path / "x", *settings)
    assert "init_allow=[data.tokenizer]" in str(error)
    code, said, rows = start(tmp_path / "x", *settings, "checkpoint.init_allow=[data.tokenizer]")
    assert code == 0 and "embed_tokens.weight has" in said and "lm_head.weight has" in said, code
    assert rows[0]["loss"] < start(tmp_path / "y", *own)[2][0]["loss"]


def test_an_unfinished_stage_and_one_that_is_not_there(
    start: Start, base: Path, tmp_path: Path
) -> None:
    path = base / "checkpoints/step-00000004"
    code, said, _ = start(tmp_path / "x", f"checkpoint.init_from={path}", "train.steps=1")
    assert code == 0 and "is unfinished: step 4 of 6" in said
    for setting in ("init_from", "resume"):
        error, *_ = start(tmp_path / "y", f"checkpoint.{setting}={tmp_path / 'none'}")
        assert f"{tmp_path / 'none'} does not exist" in str(error)
        error, *_ = start(tmp_path / "y", f"checkpoint.{setting}={path.parent / 'latest'}")
        assert "latest is a file, no checkpoint; it names step-00000006" in str(error)
        assert ("give auto" in str(error)) == (setting == "resume")
    error, *_ = start(tmp_path / "y", f"checkpoint.resume={base}")
    assert "is not a checkpoint, as" in str(error) and "step-00000006 is" in str(error)


@pytest.mark.parametrize("place", ["checkpoints", "checkpoints/step-00000004", "checkpoints/new"])
def test_no_run_lies_among_the_checkpoints_of_another(
    start: Start, base: Path, tmp_path: Path, place: str
) -> None:
    """It would start anew instead of going on, and go with a checkpoint that is pruned."""
    before = sorted(base.rglob("*"))
    (tmp_path / "link").symlink_to(base)
    error, *_ = start(tmp_path / "link" / place, "train.steps=1")
    assert f"output_dir={base.resolve()}," in str(error) and "checkpoint.init_from=" in str(error)
    assert sorted(base.rglob("*")) == before


def test_a_stage_of_an_older_version_says_what_is_not_known(
    start: Start, base: Path, tmp_path: Path
) -> None:
    old = start_scenarios.as_older(base / "checkpoints/step-00000006", tmp_path / "step-00000006")
    code, said, _ = start(tmp_path / "x", f"checkpoint.init_from={old}", "train.steps=1")
    assert code == 0 and "does not record its model and tokenizer: not compared" in said
    assert "does not record of how many" in said
    noted_less = start_scenarios.as_older(
        base / "checkpoints/step-00000004", tmp_path / "old/step-00000004", with_fingerprints=True
    )
    code, said, _ = start(tmp_path / "y", f"checkpoint.resume={noted_less}", "train.steps=5")
    assert code == 0 and "does not record its schedule" in said
    assert "does not record its settings" in said


def test_another_beginning_of_a_run_that_has_checkpoints_is_refused(
    start: Start, base: Path, copy: Path, tmp_path: Path
) -> None:
    error, *_ = start(copy, "train.steps=6", f"checkpoint.init_from={base}")
    assert f"checkpoint.init_from={base}, but" in str(error) and "other weights" in str(error)
    error, *_ = start(copy, "train.steps=6", f"model.llm.pretrained={base}")
    assert f"model.llm.pretrained={base}, but" in str(error)
    out = tmp_path / "next"
    first = (f"checkpoint.init_from={base}/checkpoints", "train.steps=2")
    assert start(out, *first)[0] == 0
    assert start(out, *first)[0] == 0  # the same command
    same = f"checkpoint.init_from={copy}/checkpoints/step-00000006"  # a copy of it
    assert start(out, first[1], same)[0] == 0
    assert start(out, first[1])[0] == 0  # none
    error, *_ = start(out, first[1], f"checkpoint.init_from={base}/checkpoints/step-00000004")
    assert f"began from {base}/checkpoints" in str(error)


# checkpoint.resume


@pytest.mark.parametrize("end", [{"stop": 5}, {"crash": 5}, {"crash": 3}], ids=str)
def test_an_explicit_checkpoint_is_followed_once(
    start: Start, base: Path, tmp_path: Path, end: dict[str, int]
) -> None:
    """After a signal, a crash, a crash before anything was saved: the same command goes on."""
    out = tmp_path / "x"
    same = (f"checkpoint.resume={base}/checkpoints/step-00000002", "train.steps=6")
    first, said, _ = start(out, *same, **end)
    assert first in (PREEMPTED, "crash") and "resumed from" in said
    saved = sorted(path.name for path in (out / "checkpoints").glob("step-*"))
    outcome = start(out, *same)
    newest = out / "checkpoints" / saved[-1] if saved else base / "checkpoints/step-00000002"
    assert outcome[0] == 0 and f"resumed from {newest} at step" in outcome[1]
    assert ("was followed by the start of" in outcome[1]) == bool(saved)
    assert bool(saved) == (end != {"crash": 3})
    assert (
        steps(outcome)[-1] == 6
        and rates(outcome)[-1] == rates((0, "", read_metrics(base / "metrics.jsonl")))[-1]
    )


@pytest.mark.parametrize("text", ["null", "[]", "{}", '{"followed": 3}', '{"followed": {}}', "{"])
def test_a_note_of_a_start_that_is_broken_does_not_count(
    text: str, tmp_path: Path, digits_corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(digits_corpus, f"output_dir={tmp_path}")
    followed = {"resume": "never", "step": 0, "time": "noon"}
    (tmp_path / "starts").mkdir()
    (tmp_path / "starts/0001.json").write_text(json.dumps({"followed": followed}))
    (tmp_path / "starts/0002.json").write_text(text)
    assert Starts(config).followed == followed
    assert "0002.json cannot be read and does not count" in capsys.readouterr().err


def test_never_starts_anew_once(start: Start, tmp_path: Path) -> None:
    same = ("checkpoint.resume=never", "train.steps=6")
    assert start(tmp_path / "x", *same, stop=3)[0] == PREEMPTED
    outcome = start(tmp_path / "x", *same)
    assert outcome[0] == 0 and "at step 3" in outcome[1] and steps(outcome) == [1, 2, 3, 4, 5, 6]
    starts = sorted((tmp_path / "x" / "starts").iterdir())
    assert [file.name for file in starts] == ["0001.json", "0001.yaml", "0002.json", "0002.yaml"]


def test_another_explicit_checkpoint_is_another_meaning(
    start: Start, base: Path, tmp_path: Path
) -> None:
    out = tmp_path / "x"
    places = [f"checkpoint.resume={base}/checkpoints/step-0000000{n}" for n in (2, 4)]
    assert start(out, places[0], "train.steps=6", stop=5)[0] == PREEMPTED
    for other in (places[1], "checkpoint.resume=never"):
        error, *_ = start(out, other, "train.steps=6")
        assert "holds step-00000005, later than step" in str(error)
        assert "checkpoint.resume=auto" in str(error)
    assert start(out, places[0], "train.steps=6")[0] == 0  # the refused ones left no trace


def test_a_later_checkpoint_that_is_damaged_leads_back_to_the_explicit_one(
    start: Start, base: Path, tmp_path: Path
) -> None:
    out = tmp_path / "x"
    same = (f"checkpoint.resume={base}/checkpoints/step-00000004", "train.steps=6")
    assert start(out, *same, stop=5)[0] == PREEMPTED
    (out / "checkpoints/step-00000005/manifest.json").write_text("{}")
    code, said, _ = start(out, *same)
    assert code == 0 and f"resumed from {base}/checkpoints/step-00000004" in said


# train.steps


def test_a_changed_schedule_is_a_choice(start: Start, base: Path, copy: Path) -> None:
    settings = (copy / "config.yaml").read_text()
    error, *_ = start(copy, "train.steps=12")
    for text in (
        "train.steps 6 -> 12",
        "train.extend",
        "stretch",
        "constant",
        "decay",
        "lr 2.27e-04 -> ",
    ):
        assert text in str(error)
    error, *_ = start(copy, "train.steps=5")
    assert "train.steps=5 lies behind step 6" in str(error)
    shutil.rmtree(copy / "checkpoints/step-00000006")
    error, *_ = start(copy, "train.steps=6", "train.min_lr_fraction=0.5")
    assert "train.min_lr_fraction 0.02 -> 0.5: choose what follows step 4" in str(error)
    assert (copy / "config.yaml").read_text() == settings


@pytest.mark.parametrize("how", ["stretch", "constant", "decay"])
def test_an_extended_run_goes_on_as_chosen_after_every_restart(
    start: Start, base: Path, copy: Path, tmp_path: Path, how: str
) -> None:
    longer = ("train.steps=12", f"train.extend={how}", "train.warmup_fraction=0.25")
    whole = start(Path(shutil.copytree(copy, tmp_path / "whole")), *longer)
    assert whole[0] == 0 and f"train.extend={how}" in whole[1] and "train.steps 6 -> 12" in whole[1]
    assert start(copy, *longer, crash=7)[0] == "crash"  # before anything was saved
    assert start(copy, *longer, stop=9)[0] == PREEMPTED
    parts = start(copy, *longer)
    assert parts[0] == 0 and "train.extend" not in parts[1]
    assert rates(parts) == rates(whole)
    lr = [row["lr"] for row in whole[2]]
    peak = 2e-3
    if how == "constant":
        assert lr[6:] == [lr[5]] * 6
    elif how == "stretch":
        assert lr[6] == max(lr[6:]) < peak and lr[6] > lr[5]
    else:  # ceil(0.25 * 6) steps up, then down
        assert lr[5] < lr[6] < lr[7] == pytest.approx(peak) and lr[7:] == sorted(lr[7:])[::-1]
    other = next(name for name in ("stretch", "decay") if name != how)
    error, *_ = start(copy, longer[0], longer[2], f"train.extend={other}")
    assert how == "stretch" or f"this run was changed with {how} at step 6" in str(error)


# What differs


def test_what_differs_is_listed_and_kept_per_start(start: Start, copy: Path) -> None:
    rate = "train.modules.projector.lr=1.0e-3"
    code, said, _ = start(copy, "train.steps=6", rate, "faults.spike_sigma=5")
    assert code == 0
    assert "settings that differ from those of step-00000006:" in said
    assert "  train.modules.projector.lr: 0.002 -> 0.001 (from here on)" in said
    assert "  faults.spike_sigma: 6.0 -> 5.0 (from here on)" in said
    newest = load_config(copy / "starts/0002.yaml")
    assert newest.train.modules.projector.lr == 1e-3
    # Nothing was trained with them.
    assert load_config(copy / "config.yaml").train.modules.projector.lr == 2e-3
    assert json.loads((copy / "starts/0002.json").read_text())["step"] == 6
    assert yaml.safe_load((copy / "starts/0001.yaml").read_text())["train"]["steps"] == 6
