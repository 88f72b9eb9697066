"""python -m training.evaluate: metrics, the rows of every sample, resuming, budgets, bad input."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.chat import ChatSettings
from data_pipeline.corpus import make_builder
from data_pipeline.index import build_index
from data_pipeline.mixture import Mixture
from data_pipeline.plan import EvaluationPlan
from data_pipeline.settings import DataSettings
from data_pipeline.tokenizer import load_tokenizer
from tests.ranks import RankPool
from tests.training.exported import make_folder
from training.distributed import Ranks
from training.evaluate.__main__ import main
from training.evaluate.budget import decide, parse_budget
from training.evaluate.examples import HeldOut
from training.evaluate.forced_decoding import ForcedAnswer, forced_answer
from training.evaluate.in_training import evaluate
from training.evaluate.scorers import levenshtein, score_text
from training.evaluate.summary import resample_means
from training.generate import LoadedModel, load_model
from training.model import PackedTokenFlex

COUNTS = ["4", "9", "16"]
QUICK = ["--latency-samples", "0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    # Taught so little that some answers are right and some are not.
    return make_folder(tmp_path_factory.mktemp("exported"), steps=25)


@pytest.fixture(scope="module")
def complete(
    folder: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """The folder and results.json of a whole evaluation."""
    out = tmp_path_factory.mktemp("evaluation") / "whole"
    assert main(command(folder, out, "--latency-samples", "3")) == 0
    return out, results(out)


def command(folder: tuple[Path, Path], out: Path, *more: str) -> list[str]:
    model, shards = folder
    return [str(model), str(shards), "--num-image-tokens", *COUNTS, "--out", str(out), *more]


def results(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())


def rows(out: Path) -> dict[tuple[int, int], dict[str, Any]]:
    """(count, sample) -> row; a second one of the same fails."""
    found: dict[tuple[int, int], dict[str, Any]] = {}
    for path in out.glob("rows/*.jsonl"):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            key = int(path.name.split("-")[0]), row["sample"]
            assert key not in found
            found[key] = row
    return found


@pytest.mark.parametrize(
    ("metric", "answer", "references", "score"),
    [
        ("exact", " red ", ["red"], 1),
        ("exact", "Red", ["red"], 0),
        ("exact", "b", ["a", "b"], 1),
        ("anls", "Hello  World", ["hello world"], 1),
        ("anls", "helo", ["hello"], 0.8),
        ("anls", "hexxx", ["hello"], 0),
        ("anls", "heyy", ["help"], 0),  # one half exactly: the paper has NL < 0.5
        ("anls", "abcxy", ["abcde"], 0.6),
        ("anls", "", [""], 1),
        ("anls", "42", ["41", "42"], 1),
        ("relaxed", "105", ["100"], 1),
        ("relaxed", "94.9", ["100"], 0),
        ("relaxed", "1,050", ["1000"], 1),
        ("relaxed", "50%", ["0.5"], 1),
        ("relaxed", "0.1", ["0"], 0),
        ("relaxed", "Blue", ["blue"], 1),
        ("choice", "(B) a dog", ["B"], 1),
        ("choice", "b", ["B"], 1),
        ("choice", "The answer is C.", ["C"], 1),
        ("choice", "A cat sits there", ["B"], 0),
        ("choice", "Dog.", ["dog"], 1),
        ("choice", "cat", ["B"], 0),
    ],
)
def test_metrics(metric: str, answer: str, references: list[str], score: float) -> None:
    assert score_text(metric, answer, references) == pytest.approx(score)


@pytest.mark.parametrize(
    ("predicted", "exact", "right", "decoded"),
    [
        ([5, 6, 5, 2], True, 3, [5, 6, 5]),
        ([5, 6, 5, 7], False, 3, [5, 6, 5, 7]),  # it goes on instead of ending
        ([5, 9, 5, 2], False, 2, [5, 9]),
        ([2, 6, 5, 2], False, 2, [2]),
    ],
)
def test_what_greedy_decoding_gives_is_read_off_the_predictions(
    predicted: list[int], exact: bool, right: int, decoded: list[int]
) -> None:
    found = forced_answer(torch.tensor(predicted), torch.tensor([5, 6, 5, 2]))
    assert found == ForcedAnswer(exact, 3, right, decoded)


def test_levenshtein() -> None:
    assert levenshtein("kitten", "sitting") == levenshtein("sitting", "kitten") == 3
    assert levenshtein("", "abc") == 3


@pytest.fixture
def process_group(tmp_path: Path) -> Any:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("method", ["forced", "generated"])
def test_the_trainers_own_evaluation_counts_the_same_samples_right(
    folder, complete, tmp_path, process_group, method
):
    out = complete[0]
    if method == "generated":
        out = tmp_path / "generated"
        assert main(command(folder, out, *QUICK, "--generate")) == 0
    held_out = HeldOut(load_model(str(folder[0])), [str(folder[1])])
    engine = PackedTokenFlex.from_pretrained(folder[0])
    data = DataSettings(
        shards=["unused"],
        tokenizer=str(folder[0]),
        chat=held_out.chat,
        tiling=held_out.tiling,
        pack={"max_tokens": 512, "packs_per_step": 1},
    )
    mixture = Mixture.of(held_out.index)
    builder = make_builder(data, mixture, held_out.tokenizer)
    plan = EvaluationPlan(mixture, held_out.tiling, 512)
    ranks = Ranks(0, 1, 0, torch.device("cpu"))
    found = evaluate(engine, plan, builder, [2, 3, 4], ranks).accuracy()
    by_count = {entry["num_image_tokens"]: entry for entry in results(out)["counts"]}
    seen = []
    for detail in ("plain", "wide"):
        for count, accuracy in found[detail].items():
            assert by_count[count]["by_detail"][detail]["accuracy"] == accuracy
            seen.append(accuracy)
    assert 0 < np.mean(seen) < 1  # neither everything nor nothing is right


def test_results_table_and_plot(complete, capsys):
    out, found = complete
    assert [entry["num_image_tokens"] for entry in found["counts"]] == [4, 9, 16]
    assert [entry["trained"] for entry in found["counts"]] == [True, False, True]
    written = rows(out)
    for entry in found["counts"]:
        own = [row for (count, _), row in written.items() if count == entry["num_image_tokens"]]
        scores = [row["score"] for row in own if "bad" not in row]
        assert entry["samples"] == len(scores) == 23
        assert entry["accuracy"] == pytest.approx(np.mean(scores))
        assert entry["low"] <= entry["accuracy"] <= entry["high"]
        assert 0 < entry["latency"]["first_token_ms"] <= entry["latency"]["answer_ms"]
        # 2 layers of keys and values, 2 heads of 8 numbers of 4 bytes.
        tokens = [r["prompt_tokens"] + r["answer_tokens"] for r in own if "bad" not in r]
        assert entry["kv_cache_mib"] == pytest.approx(np.mean(tokens) * 2 * 2 * 2 * 8 * 4 / 2**20)
    flops = [entry["gflop"] for entry in found["counts"]]
    assert flops == sorted(flops) and flops[0] < flops[-1]
    assert [bad["name"] for bad in found["bad"]] == ["000001.tar:7"]
    anls = [row for row in written.values() if row.get("metric") == "anls"]
    assert len(anls) == 3 * 3 and all(isinstance(row["answer"], str) for row in anls)
    chosen = [row for row in written.values() if row.get("metric") == "choice"]
    assert len(chosen) == 3 and all(row["label"] in "ABCD" for row in chosen if row["score"])
    assert all(entry["ambiguous"] == 0 for entry in found["counts"])
    with Image.open(out / "accuracy.png") as picture:
        assert picture.size == (900, 540)
    table = (out / "table.txt").read_text()
    assert "unseen" in table and "95 % interval" in table


def test_a_second_call_computes_nothing_and_more_counts_are_added(
    folder, complete, tmp_path, monkeypatch
):
    out = tmp_path / "copy"
    shutil.copytree(complete[0], out)
    before = rows(out)
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("rows/*")}
    latency = (out / "latency.json").read_bytes()
    assert main(command(folder, out, "--latency-samples", "3")) == 0
    assert {path: path.stat().st_mtime_ns for path in out.glob("rows/*")} == stamps
    assert (out / "latency.json").read_bytes() == latency
    arguments = [str(folder[0]), str(folder[1]), "--out", str(out), *QUICK]
    assert main([*arguments, "--num-image-tokens", "1", "4"]) == 0
    after = rows(out)
    assert {key: after[key] for key in before} == before
    assert len(after) == len(before) + 24
    assert [entry["num_image_tokens"] for entry in results(out)["counts"]] == [1, 4]


def test_a_killed_run_goes_on(folder, complete, tmp_path):
    out = tmp_path / "killed"
    arguments = [sys.executable, "-m", "training.evaluate", *command(folder, out, *QUICK)]
    process = subprocess.Popen([*arguments, "--batch-tokens", "1"])
    deadline = time.monotonic() + 60
    while len(list(out.glob("rows/*"))) < 3 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = rows(out)
    assert 0 < len(kept) < 72
    with next(out.glob("rows/9-*")).open("ab") as file:
        file.write(b'{"sample": 3, "na')  # what a full disk, or a kill of the machine, leaves
    assert main(command(folder, out, *QUICK)) == 0
    whole = rows(out)
    assert {key: whole[key] for key in kept} == kept
    assert whole == rows(complete[0])


def on_a_rank(ranks: Ranks, arguments: list[str]) -> int:
    return main(arguments)


@pytest.mark.multiprocess
def test_two_ranks_share_the_samples_out(folder, complete, tmp_path, two_ranks: RankPool):
    out = tmp_path / "two"
    arguments = command(folder, out, *QUICK, "--batch-tokens", "200")
    assert two_ranks.run(on_a_rank, arguments) == [0, 0]
    assert rows(out) == rows(complete[0])
    names = {path.name for path in out.glob("rows/*")}
    assert names == {f"{count}-rank{rank}.jsonl" for count in COUNTS for rank in (0, 1)}
    for found, expected in zip(results(out)["counts"], complete[1]["counts"], strict=True):
        assert {**found, "latency": None} == {**expected, "latency": None}
    # One process goes on with what two began.
    lost = out / "rows" / "9-rank1.jsonl"
    lost.unlink()
    assert main(command(folder, out, *QUICK)) == 0
    assert rows(out) == rows(complete[0]) and not lost.exists()


def test_rows_that_are_lost_or_twice_are_noticed(folder, complete, tmp_path, capsys):
    out = tmp_path / "copy"
    shutil.copytree(complete[0], out)
    path = out / "rows" / "9-rank0.jsonl"
    shutil.copy(path, out / "rows" / "9-rank1.jsonl")
    assert main(command(folder, out, *QUICK)) == 2
    assert "has two rows at 9 tokens" in capsys.readouterr().err
    (out / "rows" / "9-rank1.jsonl").unlink()
    path.write_text("no json\n" + path.read_text())
    assert main(command(folder, out, *QUICK)) == 2
    assert "line 1 is damaged" in capsys.readouterr().err


def test_another_model_or_setting_is_refused(folder, complete, tmp_path, capsys):
    out = tmp_path / "copy"
    shutil.copytree(complete[0], out)
    assert main(command(folder, out, *QUICK, "--max-new-tokens", "7")) == 2
    assert "max_new_tokens: 128 there, 7 now" in capsys.readouterr().err
    other = tmp_path / "model"
    shutil.copytree(folder[0], other)
    data = bytearray((other / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (other / "model.safetensors").write_bytes(data)
    assert main(command((other, folder[1]), out, *QUICK)) == 2
    assert "holds an evaluation of something else (model: " in capsys.readouterr().err


def test_bad_input_is_one_line(folder, tmp_path, capsys):
    out = tmp_path / "out"
    base = [str(folder[0]), str(folder[1]), "--out", str(out), *QUICK]
    wrong = {
        ("--num-image-tokens", "5"): "num_image_tokens is 5, but the tokens of a tile are a square",
        ("--num-image-tokens", "25"): "4 x 4 patches; give at most 16",
        ("--budget", "speed=1"): "--budget is 'speed=1'; give latency=50ms",
        ("--budget", "accuracy=120%"): "a share of the best",
        ("--tokenizer", "missing.model"): "missing.model does not exist",
    }
    for arguments, message in wrong.items():
        assert main([*base, *arguments]) == 2
        assert message in capsys.readouterr().err
    assert main([str(tmp_path), *base[1:]]) == 2
    assert "has no config.json" in capsys.readouterr().err
    assert main([base[0], str(tmp_path / "nothing"), *base[2:]]) == 2
    assert not out.exists()


def test_budgets(folder, complete, capsys):
    out = complete[0]
    assert main(command(folder, out, "--latency-samples", "3", "--budget", "latency=0.001ms")) == 1
    assert "no count is in time; the fastest" in capsys.readouterr().out
    assert results(out)["budgets"][0]["count"] is None

    accuracy, times = [0.5, 0.796, 0.8, 0.8], [10.0, 20.0, 30.0, 40.0]
    entries = [
        {"num_image_tokens": n, "accuracy": a, "latency": {"answer_ms": t}}
        for n, a, t in zip([4, 9, 16, 25], accuracy, times, strict=True)
    ]
    resampled = np.tile(np.array(accuracy)[:, None], (1, 10))
    resampled[1, :3] = 0.7
    decision = decide(parse_budget("accuracy=99%"), entries, resampled)
    assert decision.count == 9 and "70 % of the bootstrap" in decision.reason
    assert decide(parse_budget("accuracy=99.9%"), entries, resampled).count == 16
    assert decide(parse_budget("latency=0.035s"), entries, resampled).count == 16
    assert decide(parse_budget("latency=100ms"), entries, resampled).count == 16
    assert decide(parse_budget("latency=20ms"), entries, resampled).count == 9


def test_the_bootstrap_is_seeded_and_as_wide_as_the_theory():
    scores = np.random.default_rng(0).integers(0, 2, (2, 400)).astype(float)
    means = resample_means(scores, 4000, seed=1)
    np.testing.assert_array_equal(means, resample_means(scores, 4000, seed=1))
    assert not np.array_equal(means, resample_means(scores, 4000, seed=2))
    expected = scores.std(axis=1) / np.sqrt(400)
    np.testing.assert_allclose(means.std(axis=1), expected, rtol=0.05)
    np.testing.assert_allclose(means.mean(axis=1), scores.mean(axis=1), atol=0.003)
    # The same resamples for both rows: equal rows have equal means.
    same = resample_means(scores[[0, 0]], 50, seed=1)
    np.testing.assert_array_equal(same[0], same[1])


def test_samples_longer_than_the_context_are_wrong_and_counted(
    folder, complete, tmp_path, monkeypatch, capsys
):
    before = {key: row for key, row in rows(complete[0]).items() if "bad" not in row}
    context = int(np.median([row["prompt_tokens"] for row in before.values()]))
    monkeypatch.setattr(LoadedModel, "context", property(lambda loaded: context))
    assert main(command(folder, tmp_path / "out", *QUICK)) == 0
    after = rows(tmp_path / "out")
    forced, longer = 0, 0
    for key, row in before.items():
        room = context - row["prompt_tokens"] + 1
        exact = row["metric"] == "exact"
        if room < (row["answer_tokens"] if exact else 1):
            assert after[key]["too_long"] and after[key]["score"] == 0
            forced += exact and row["score"] == 1
            longer += 1
        elif exact:
            assert after[key] == row
        else:  # generated, up to the end of the context
            assert row["answer"].startswith(after[key]["answer"])
    assert forced  # they were right as if there were no context
    counted = {e["num_image_tokens"]: e["too_long"] for e in results(tmp_path / "out")["counts"]}
    assert sum(counted.values()) == longer
    assert "longer than the context, counted as wrong: {" in capsys.readouterr().out


def test_the_number_of_tiles_can_be_set(folder, complete, tmp_path, capsys):
    assert main(command(folder, tmp_path / "out", *QUICK, "--max-tiles", "1")) == 0
    before, after = rows(complete[0]), rows(tmp_path / "out")
    fewer = 0
    for key, row in after.items():
        if "bad" not in row:
            images = 2 if row["sample"] % 6 == 5 else 1
            assert row["tiles"] == images
            lost = before[key]["tiles"] - images
            assert before[key]["prompt_tokens"] - row["prompt_tokens"] == lost * key[0]
            fewer += lost > 0
    assert fewer
    assert main(command(folder, tmp_path / "out", *QUICK)) == 2
    assert "'max_tiles': 1" in capsys.readouterr().err


def test_another_system_turn_needs_an_index_made_with_it(folder, tmp_path, capsys):
    arguments = command(folder, tmp_path / "out", *QUICK, "--system", "Be brief.")
    assert main(arguments) == 2
    assert "index" in capsys.readouterr().err
    chat = ChatSettings(system="Be brief.")
    index = tmp_path / "index"
    build_index(str(folder[1]), load_tokenizer(folder[0]), chat, index_dir=index)
    assert main([*arguments, "--index-dir", str(index), "--limit", "3"]) == 0
    more = len(load_tokenizer(folder[0]).encode("Be brief."))
    assert results(tmp_path / "out")["counts"][0]["prompt_tokens"] > more


def test_progress_is_noted_for_slurm(folder, complete, tmp_path, monkeypatch):
    monkeypatch.setenv("PROGRESS_FILE", str(tmp_path / "progress"))
    assert main(command(folder, tmp_path / "out", *QUICK)) == 0
    assert (tmp_path / "progress").read_text() == "72"
