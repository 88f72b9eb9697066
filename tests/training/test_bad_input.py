"""What a user may get wrong, seen from the command line: one clear message, or the run goes on."""

import io
import tarfile
from pathlib import Path

import pytest

from data_pipeline.chat import ChatSettings
from data_pipeline.errors import InputError
from data_pipeline.index import build_index, load_index
from data_pipeline.tokenizer import load_tokenizer
from tests.ranks import RankPool
from tests.training import scenarios
from tests.training.test_resume import Launch
from training.distributed import Ranks
from training.metrics import read_metrics
from training.run import Run
from training.train import main

pytestmark = pytest.mark.multiprocess


def start_run(ranks: Ranks, corpus: Path, overrides: list[str]) -> str:
    """The error of setting up a run on this rank."""
    try:
        Run(scenarios.tiny_config(corpus, *overrides), ranks)
    except InputError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["data.pack.packs_per_step=3"],
            "packs_per_step is 3, which 2 ranks",
        ),
        (["data.shards=[/nowhere]"], "/nowhere"),
        (["data.tokenizer=/nowhere.model"], "/nowhere.model"),
        (["data.pack.max_tokens=8"], "raise data.pack.max_tokens"),
        (['data.chat.system="Other."'], "data_pipeline.index"),
    ],
)
def test_every_rank_gets_the_same_clear_error(
    two_ranks: RankPool, digits_corpus: Path, overrides: list[str], expected: str
) -> None:
    messages = two_ranks.run(start_run, digits_corpus, overrides)
    assert messages[0] == messages[1]
    assert expected in messages[0]


def test_a_wrong_config_is_one_line_and_exit_status_2(capsys: pytest.CaptureFixture) -> None:
    assert main(["training/configs/digits.yaml", "train.stepz=3"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: training/configs/digits.yaml: 1 problem")
    assert "train.stepz: " in error and "steps?" in error


def broken_copy(corpus: Path, out: Path, sample: int) -> str:
    """Copy the corpus, make one sample's image undecodable, index it; returns the sample's name."""
    (out / "train").mkdir(parents=True)
    (out / "tokenizer.model").write_bytes((corpus / "tokenizer.model").read_bytes())
    for shard in sorted((corpus / "train").glob("*.tar")):
        with tarfile.open(shard) as source, tarfile.open(out / "train" / shard.name, "w") as copy:
            for member in source:
                data = source.extractfile(member).read()
                if member.name == f"train-{sample:06d}.0.png":
                    # The header stays whole, so that the index takes the sample in.
                    data = data[:60] + bytes(len(data) - 60)
                copy.addfile(member, io.BytesIO(data))
    tokenizer = load_tokenizer(out / "tokenizer.model")
    chat = ChatSettings(system="")
    build_index(str(out / "train"), tokenizer, chat)
    index = load_index(str(out / "train"), tokenizer, chat)
    return next(index.name(i) for i in range(len(index)) if index.keys[i].endswith(f"{sample:06d}"))


def test_an_image_that_does_not_decode_is_named_and_shifts_nothing(
    digits_corpus: Path, tmp_path: Path
) -> None:
    name = broken_copy(digits_corpus, tmp_path / "broken", sample=7)
    overrides = [
        "train.steps=8",
        "data.eval_shards=[]",
        "data.pack.max_tokens=4096",  # the whole corpus passes by
    ]
    whole, broken = tmp_path / "whole-run", tmp_path / "broken-run"
    Launch(digits_corpus, whole, *overrides).finish()
    output = Launch(
        digits_corpus, broken, *overrides, f"data.shards=[{tmp_path / 'broken/train'}]"
    ).finish()
    assert f"warning: left out {name}" in output
    rows, expected = read_metrics(broken / "metrics.jsonl"), read_metrics(whole / "metrics.jsonl")
    hit = [row["step"] for row in rows if row["bad_samples"]]
    assert hit
    for row, undisturbed in zip(rows, expected, strict=True):
        assert row["tokens"] == undisturbed["tokens"]
        assert row["samples"] == undisturbed["samples"]
        if row["step"] < hit[0]:
            assert row["loss"] == undisturbed["loss"]
    lost = {row["supervised_tokens"] for row in rows} - {
        row["supervised_tokens"] for row in expected
    }
    assert lost  # the bad sample's answer was not trained on
