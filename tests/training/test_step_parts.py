"""python -m training.step_parts: parts at a config's shapes, their FLOPs, and runs that go on."""

import csv
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import training.step_parts.__main__ as command
from data_pipeline.errors import InputError
from data_pipeline.yaml_text import write_yaml
from kernels.profile import __main__ as projector_command
from kernels.profile import measured_run, timing
from kernels.profile.results import read_results
from kernels.profile.run_tables import Table
from tests.training.test_flops import IMAGE, LENGTHS, ON_CPU, TEXT, VISION
from training.config import RunConfig, load_config
from training.flops import PackCost
from training.model.build import model_config
from training.step_parts.part_cases import PARTS, PartMaker
from training.step_parts.part_tables import parts_table, rows_of_parts
from training.step_parts.step_pack import StepPack, find_pack
from training.step_parts.step_part import StepPart

CPU = torch.device("cpu")
SIDES = (8, 4, 2, 8, 6, 1, 3)
PACK = StepPack(tuple(LENGTHS), SIDES, 144, 300, "of a test")
FAST = ["--device=cpu", "--min-ms=0.1"]


@pytest.fixture
def config(tmp_path: Path) -> str:
    """A model of a few thousand parameters whose data is not there."""
    settings = {
        "output_dir": str(tmp_path / "run"),
        "data": {
            "shards": [str(tmp_path / "none")],
            "tokenizer": str(tmp_path / "none.model"),
            "tiling": {"tile_size": 32, "max_tiles": 2},
            "tokens": {"counts": [4, 16], "probabilities": [0.5, 0.5]},
            "pack": {"max_tokens": 256, "packs_per_step": 1},
        },
        "model": {"vision": {"config": VISION}, "llm": {"config": TEXT}},
        "train": {"steps": 1, "precision": "fp32", "loss_chunk_tokens": 128},
    }
    path = tmp_path / "config.yaml"
    path.write_text(write_yaml(settings))
    return str(path)


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "WARMUP_MS", 0.1)
    monkeypatch.setattr(
        measured_run, "measure_peaks", partial(timing.measure_peaks, sizes=(64, 4096))
    )


def parts(config: RunConfig) -> dict[str, StepPart]:
    maker = PartMaker(config, PACK, "fp32")
    return {name: getattr(maker, name)() for name in PARTS}


def test_all_parts_are_measured_and_written(
    config: str, fast: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert command.main([config, *FAST, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "256 tokens in" in printed and "lognormal" in printed
    assert "liger" in printed and "pip install liger-kernel" in printed
    content = read_results(out)
    assert [record["case"] for record in content["cases"]] == list(PARTS)
    for record in content["cases"]:
        (found,) = record["providers"].values()
        assert found["timings"].keys() == {"forward", "both"} and found["kernels"]["kernels"]
        assert not record["failed"] and record["noise"]
    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert sum(float(row["share"]) for row in rows) == pytest.approx(1.0)
    times = {row["part"]: int(row["times"]) for row in rows}
    layers = TEXT["num_hidden_layers"]
    assert times == {
        **{"vision": VISION["num_hidden_layers"], "projector": 1, "attention": layers},
        **{"mlp": layers, "norms": 2 * layers + 1, "loss": 1},
    }
    for row in rows:
        known = row["gb_per_s"] if row["part"] == "norms" else row["tflops"]
        assert float(known) > 0 and float(row["roof"]) > 0
    page = (out / "report.html").read_text()
    assert "The parts of a training step" in page and "kernels of ours" in page

    assert command.main([config, *FAST, "--out", str(out), "--compare", str(out)]) == 0
    assert "old ms" in capsys.readouterr().out
    assert projector_command.main(["--compare", str(out), str(out)]) == 2
    assert "training.step_parts --compare" in capsys.readouterr().err


@pytest.mark.parametrize(
    "frozen", [[], ["vision_model"], ["vision_model", "language_model"]], ids=str
)
def test_flops_are_those_that_pytorch_counts(config: str, frozen: list[str]) -> None:
    settings = load_config(
        config, ["train.loss_chunk_tokens=512", *(f"train.modules.{f}.train=false" for f in frozen)]
    )
    for part in parts(settings).values():
        module = part.build(CPU)
        call, inputs = part.ours(module, CPU), part.inputs(module, CPU)[0]
        with FlopCounterMode(display=False, custom_mapping=ON_CPU) as counter:
            result = call(inputs.x, inputs.weights)
            if part.modes[-1] == "both":
                result.backward(inputs.grad)
        expected = part.flops(part.modes[-1])
        # It counts the masked pairs, too, and the scores that attention computes once more.
        width = TEXT["hidden_size"]
        if part.name == "attention":
            expected += 14 * width * sum(n * n for n in LENGTHS) - 3 * part.attention
        elif part.name == "vision" and part.trains:
            expected += part.attention / 2
        assert counter.get_total_flops() == expected, part.name


def test_the_parts_are_the_step(config: str) -> None:
    """Their FLOPs, as often as they run, are those of the pack; of the tower the patches lack."""
    settings = load_config(config, [])
    found = parts(settings)
    full = model_config(settings.model, 300, IMAGE)
    whole = PackCost(full, settings.train, 1).pack(LENGTHS, SIDES, PACK.supervised)
    flops = {name: part.times * part.flops("both") for name, part in found.items()}
    assert flops["attention"] + flops["mlp"] == whole["decoder"].model
    assert flops["projector"] == whole["projector"].model
    assert flops["loss"] == whole["loss"].model
    patches = 2 * 2.0 * 3 * 4 * 4 * VISION["hidden_size"] * 64 * len(SIDES)
    assert flops["vision"] + patches == whole["vision"].model


def test_bytes_and_what_runs_again(config: str) -> None:
    settings = load_config(
        config, ["train.gradient_checkpointing=true", "train.modules.vision_model.train=false"]
    )
    found = parts(settings)
    tokens, width = sum(LENGTHS), TEXT["hidden_size"]
    x, weight = 4 * tokens * width, 4 * width
    assert found["norms"].bytes("forward") == 2 * x + weight
    assert found["norms"].bytes("both") == 5 * x + 3 * weight
    assert found["vision"].modes == ("forward",) and not found["vision"].again
    assert found["mlp"].again and not found["loss"].again


def test_a_time_counts_as_often_as_it_is_taken() -> None:
    def record(name: str, times: int, again: bool, forward: float, both: float) -> dict[str, Any]:
        shape = {"about": "", "times": times, "again": again}
        shape |= {"flops": {"forward": 1e9, "both": 3e9}, "bytes": {"forward": 1, "both": 3}}
        timings = {"forward": {"median_ms": forward}, "both": {"median_ms": both}}
        peaks = {"flops": 6e12, "bandwidth": 1e12, "l2": 0}
        ours = {"timings": timings, "memory": {}}
        return {
            "case": name,
            "shape": shape,
            "peaks": peaks,
            "providers": {"ours": ours},
            "skipped": {},
        }

    records = [record("mlp", 2, True, 1.0, 2.0), record("loss", 1, False, 1.0, 4.0)]
    records[0]["providers"]["liger"] = {"timings": {}, "memory": {}}  # failed while it was timed
    mlp, loss = rows_of_parts(records)
    assert (mlp["pack_ms"], loss["pack_ms"]) == (6.0, 4.0)
    assert (mlp["share"], loss["share"]) == (0.6, 0.4)
    assert mlp["tflops"] == 1.5 and mlp["roof"] == 0.25
    assert isinstance(parts_table(records, True), Table)


KILLED = """
import os, signal, sys
import training.step_parts.__main__ as command
from functools import partial
from kernels.profile import measured_run, timing
measured = command.measure_part
measured_run.measure_peaks = partial(timing.measure_peaks, sizes=(64, 4096))
def one_then_killed(part, *rest):
    if part.name == "loss":
        os.kill(os.getpid(), signal.SIGKILL)
    return measured(part, *rest)
command.measure_part = one_then_killed
command.main(sys.argv[1:])
"""


def test_a_killed_run_goes_on(
    config: str,
    fast: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    line = [config, *FAST, "--quick", "--what=norms,loss", "--resume", f"--out={out}"]
    ran = subprocess.run([sys.executable, "-c", KILLED, *line], capture_output=True, text=True)
    assert ran.returncode == -signal.SIGKILL, ran.stderr
    kept = read_results(out)
    assert [record["case"] for record in kept["cases"]] == ["norms"]
    assert command.main(line) == 0
    assert "1 cases to measure, 1 there already" in capsys.readouterr().out
    content = read_results(out)
    assert content["cases"][0] == kept["cases"][0] and content["cases"][1]["case"] == "loss"
    assert command.main([*line, "model.llm.config.intermediate_size=80"]) == 2
    assert "intermediate_size is 80, was 160" in capsys.readouterr().err


def test_without_a_gpu_floors_are_calculated(
    config: str, fast: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkey = pytest.MonkeyPatch()
    monkey.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "out"
    try:
        line = ["--what", "norms,mlp", "--config", config, "--out", str(out)]
        assert projector_command.main(line) == 0  # hands over
        assert "Calculated, not measured" in capsys.readouterr().out
        content = read_results(out)
        assert [record["case"] for record in content["cases"]] == ["norms", "mlp"]
        assert content["kind"] == "calculated step"
        assert command.main([config, *FAST, "--what=norms", "--out", str(out)]) == 0
        assert command.main([config, "--out", str(out)]) == 2  # would replace measurements
        assert "name another" in capsys.readouterr().err
    finally:
        monkey.undo()


def test_a_part_that_is_not_there(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = f"--out={tmp_path / 'out'}"
    assert command.main([config, "--what=norm", out]) == 2
    assert "norm is no part" in (said := capsys.readouterr().err) and "norms" in said
    neox = {key: value for key, value in TEXT.items() if key != "num_key_value_heads"}
    line = [config, f"model.llm.config={neox | {'model_type': 'gpt_neox'}}", out]
    assert command.main([*line, "--what=attention"]) == 2
    assert "gpt_neox" in (said := capsys.readouterr().err) and "Leave attention out" in said
    text = [config, "data.pack.max_tokens=4", out]
    assert command.main([*text, "--what=projector"]) == 2
    assert "no image" in capsys.readouterr().err
    assert command.main([*text]) == 0
    assert "left out: --what projector" in capsys.readouterr().out
    assert projector_command.main(["--what", "loss"]) == 2
    assert "--config" in capsys.readouterr().err


def test_the_pack_is_of_the_plan_where_there_is_one(digits_corpus: Path, config: str) -> None:
    overrides = [
        f"data.shards=[{digits_corpus / 'train'}]",
        f"data.tokenizer={digits_corpus / 'tokenizer.model'}",
        'data.chat.system=""',
    ]
    pack = find_pack(load_config(config, overrides), 0.5)
    assert pack.source == "of the plan" and 0 < pack.tokens <= 256
    assert set(pack.sides) == {2, 4} and 0 < pack.supervised < pack.tokens
    with pytest.raises(InputError, match=r"vocab_size"):
        llm = {key: value for key, value in TEXT.items() if key != "vocab_size"}
        find_pack(load_config(config, [f"model.llm.config={llm}"]), 0.5)
