"""The record of the day a GPU is there: rehearsed on a CPU, cut short, continued, refused."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_pipeline.errors import InputError
from training import exit_codes
from training.gpu_record import speed_options
from training.gpu_record.__main__ import main
from training.gpu_record.fused_products import compared
from training.gpu_record.record_stages import ROOT, Places, Stage, all_stages
from training.gpu_record.shapes import SHAPES
from training.gpu_record.stage_runs import DONE, FAILED, PARTIAL, GpuRecord, run_stages
from training.health import StopRequest
from training.speed import check_settings

NEVER = float("inf")


def python(name: str, code: str, file: Path, **options) -> Stage:
    """A stage that runs `code`, in which FILE is its file."""
    command = (sys.executable, "-c", f"FILE = {str(file)!r}\n{code}")
    return Stage(name, "a test", command, 1, (file,), **options)


@pytest.fixture
def places(tmp_path: Path) -> Places:
    return Places.of("NVIDIA H100 80GB HBM3", tmp_path)


def run(stages: list[Stage], places: Places, within_s: float = NEVER) -> GpuRecord:
    with StopRequest() as stop:
        run_stages(stages, GpuRecord(places), stop, within_s)
    return GpuRecord(places)


@pytest.mark.multiprocess
def test_every_stage_is_rehearsed_end_to_end(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "training.gpu_record", "--rehearse", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    logs = [path.read_text()[-2000:] for path in tmp_path.rglob("*.log")]
    assert done.returncode == exit_codes.OK, (done.stdout, done.stderr, logs)
    places = Places.of("rehearsal", tmp_path)
    found = json.loads(places.state.read_text())["stages"]
    stages = all_stages(places, rehearse=True)
    assert {name: record["state"] for name, record in found.items()} == {
        stage.name: DONE for stage in stages
    }
    for stage in stages:
        assert all(path.exists() for path in stage.files)
        assert {"command", "commit", "machine", "versions", "date"} <= found[stage.name].keys()
    _check_training(json.loads((places.training / "train_rehearsal.json").read_text()))
    worth = json.loads((places.training / "speed_options.json").read_text())
    assert worth["options"]["recompute_tower"]["speed"] > 0
    fused = json.loads((places.kernels / "fused_gemms.json").read_text())
    assert fused["cases"][0]["ms"].keys() == {"cublas", "fused", "auto", "cublas again"}
    # Again: nothing is left to do.
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert again.returncode == exit_codes.OK
    assert again.stdout.count("done before") == len(stages)


def _check_training(found: dict) -> None:
    assert found["complete"] and found["runs"]["mixed"]["counts"] == [4, 16, 64]
    assert found["runs"]["fixed"]["counts"] == [64] and found["parameters"] > 1e5
    for one in found["runs"].values():
        together = one["together"]
        assert len(one["steps"]) == SHAPES["rehearsal"].steps
        assert {"data", "vision", "insert", "decoder", "backward"} <= one["phases"].keys()
        assert one["phases"]["backward"]["host_ms"] > 0
        rates = [sum(row[key] for row in one["steps"]) for key in ("tokens", "step_s")]
        assert together["tokens_per_s"] == pytest.approx(rates[0] / rates[1], rel=1e-3)
        assert together["memory_gib"] > 0
        insertion = one["insertion"]
        assert 0 < insertion["image_tokens"] < insertion["rows"]
        share = insertion["masked_scatter_ms"] / 1e3 * together["packs"] / together["step_s"]
        assert insertion["masked_scatter_share_of_step"] == pytest.approx(share)
    assert found["mixed_over_fixed"]["images_per_s"] > 0


def test_without_a_gpu_it_is_refused(monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["--out", str(tmp_path)]) == exit_codes.BAD_INPUT
    error = capsys.readouterr().err
    assert "GPU" in error and "--rehearse" in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_unknown_stage_is_named(capsys, tmp_path) -> None:
    assert main(["--rehearse", "--out", str(tmp_path), "--stage", "x"]) == exit_codes.BAD_INPUT
    assert "x" in capsys.readouterr().err
    assert main(["--rehearse", "--out", str(tmp_path), "--list"]) == exit_codes.OK
    assert capsys.readouterr().out.count("not begun") == len(
        all_stages(Places.of("rehearsal", tmp_path), True)
    )


def test_a_failed_stage_says_why_and_the_next_one_runs(places, tmp_path) -> None:
    bad = python("bad", "raise SystemExit('no such package')", tmp_path / "bad")
    good = python("good", "open(FILE, 'a').write('x')", tmp_path / "good")
    record = run([bad, good], places)
    assert record.state(bad) == FAILED and "no such package" in record.stages["bad"]["reason"]
    assert record.state(good) == DONE
    run([bad, good], places)  # what is done is not done again, what failed is
    assert (tmp_path / "good").read_text() == "x"


def test_a_stage_beyond_its_limit_is_ended_with_what_it_started(
    places, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr("training.gpu_record.stage_runs.LIMIT_S", 3.0)
    monkeypatch.setattr("training.gpu_record.stage_runs.GRACE_S", 0.5)
    code = """
import signal, subprocess, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # hangs
child = subprocess.Popen(["sleep", "600"])
open(FILE, "w").write(str(child.pid))
time.sleep(600)
"""
    stage = python("slow", code, tmp_path / "child", goes_on=False)
    record = run([stage], places)
    assert record.state(stage) == PARTIAL and "limit" in record.stages["slow"]["reason"]
    child = Path("/proc") / (tmp_path / "child").read_text() / "stat"
    assert not child.exists() or child.read_text().split()[2] == "Z"


def test_a_stage_that_goes_on_gets_more_turns(places, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("training.gpu_record.stage_runs.LIMIT_S", 2.0)
    code = """
import os, time
with open(FILE, "a") as rows:
    rows.write("x")
if os.path.getsize(FILE) < 3:
    time.sleep(600)
"""
    stage = python("long", code, tmp_path / "rows")
    assert run([stage], places).state(stage) == DONE
    assert (tmp_path / "rows").read_text() == "xxx"


def test_a_signal_ends_the_stage_and_the_same_command_goes_on(places, tmp_path) -> None:
    code = """
import os, time
rows = open(FILE, "a")
rows.write("x"); rows.flush()
if os.path.getsize(FILE) == 1:
    time.sleep(600)
"""
    stage = python("slow", code, tmp_path / "rows")
    after = python("after", "open(FILE, 'w')", tmp_path / "after")
    program = f"""
import sys
from tests.training.test_gpu_record import Path, Places, python, run
places = Places.of("NVIDIA H100 80GB HBM3", Path({str(tmp_path)!r}))
run([python("slow", {code!r}, Path({str(tmp_path / "rows")!r})),
     python("after", "open(FILE, 'w')", Path({str(tmp_path / "after")!r}))], places)
"""
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    while not (tmp_path / "rows").exists() or not (tmp_path / "rows").read_text():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    record = GpuRecord(places)
    assert record.state(stage) == PARTIAL and "SIGTERM" in record.stages["slow"]["reason"]
    assert record.state(after) == "not begun"
    record = run([stage, after], places)
    assert record.state(stage) == record.state(after) == DONE
    assert (tmp_path / "rows").read_text() == "xx"


def test_out_of_memory_is_tried_again_as_the_stage_says(places, tmp_path) -> None:
    code = f"import sys; raise SystemExit(0 if '--offload' in sys.argv else {12})"
    stage = python("large", code, tmp_path / "none", otherwise=("--offload",))
    record = run([stage], places)
    assert exit_codes.OUT_OF_MEMORY == 12
    assert record.state(stage) == DONE and record.stages["large"]["command"].endswith("--offload")


def test_no_stage_is_begun_that_would_not_end_in_time(places, tmp_path) -> None:
    stage = python("stage", "open(FILE, 'w')", tmp_path / "file")
    assert run([stage], places, within_s=0.5).state(stage) == "not begun"
    assert run([stage], places, within_s=60).state(stage) == DONE


def test_again_removes_what_was_measured(places, tmp_path) -> None:
    stage = python("stage", "open(FILE, 'a').write('x')", tmp_path / "file")
    record = run([stage], places)
    record.forget(stage)
    assert record.state(stage) == "not begun" and not (tmp_path / "file").exists()


def test_results_lie_in_a_folder_named_after_the_gpu() -> None:
    places = Places.of("NVIDIA H100 80GB HBM3", None)
    assert places.kernels == ROOT / "kernels" / "results" / "h100-80gb-hbm3"
    assert places.state == ROOT / "training" / "results" / "h100-80gb-hbm3" / "gpu_record.json"
    for stage in all_stages(places, rehearse=False):
        assert stage.expected_s <= 480 and stage.files


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("counts", ["mixed", "fixed"])
def test_every_shape_is_a_valid_config(name, counts, tmp_path) -> None:
    shape = SHAPES[name]
    config = shape.config(tmp_path, counts)
    assert config.data.tokens.counts[-1] == shape.fixed
    assert config.model.llm.pretrained is None and config.model.vision.pretrained is None
    if name != "rehearsal":
        assert config.data.pack.max_tokens == 8192 and config.train.gradient_checkpointing
        assert config.model.llm.config["num_hidden_layers"] == {"1.5b": 28, "3b": 36}[name]


def test_a_fused_product_is_faster_only_beyond_the_noise() -> None:
    ms = {"cublas": 1.0, "cublas again": 1.1, "fused": 0.95, "auto": 0.8}
    assert compared(ms)["faster"] == ["auto"]
    assert compared(ms | {"cublas again": 1.0})["faster"] == ["fused", "auto"]


def test_a_setting_is_faster_only_beyond_the_noise() -> None:
    def run(tokens_per_s: float, memory_gib: float = 10.0) -> dict[str, float]:
        return {"tokens_per_s": tokens_per_s, "memory_gib": memory_gib}

    runs = {"base": run(100.0), "base_again": run(104.0), "liger": run(110.0, 8.0)}
    runs |= {"compile": run(107.0), "prefetch": run(96.0), "fa3": run(99.0)}
    found = speed_options.compared(runs)
    assert found["noise"] == pytest.approx(0.04)
    verdicts = {name: option["verdict"] for name, option in found["options"].items()}
    expected = {"liger": "faster", "compile": "the same", "prefetch": "slower", "fa3": "slower"}
    assert verdicts == expected
    assert found["options"]["liger"]["memory"] == 0.8
    assert found["not_measured"] == ["no_copy_ahead", "recompute_decoder", "recompute_tower"]
    alone = speed_options.compared({"base": run(100.0), "liger": run(200.0)})
    assert "unknown" in alone["options"]["liger"]["verdict"]
    with pytest.raises(InputError, match="base_again"):
        speed_options.compared({"liger": run(1.0)})


@pytest.mark.parametrize("name", speed_options.OPTIONS)
def test_every_setting_for_speed_has_a_run_of_its_own(name, tmp_path) -> None:
    config = SHAPES["1.5b"].config(tmp_path, "mixed", speed_options.OPTIONS[name])
    check_settings(config)  # of the shape that is measured none is refused
    stages = all_stages(Places.of("NVIDIA H100 80GB HBM3", tmp_path), rehearse=False)
    (stage,) = [stage for stage in stages if stage.name == f"speed_{name}"]
    for setting in speed_options.OPTIONS[name]:
        assert stage.command[stage.command.index(setting) - 1] == "--set"


def test_rows_of_tests_are_kept_and_those_passed_left_out(tmp_path) -> None:
    (tmp_path / "test_some.py").write_text(
        "import os\n\ndef test_good(): pass\n\ndef test_mended(): assert os.environ.get('MENDED')\n"
    )
    rows, command = tmp_path / "rows.jsonl", [sys.executable, "-m", "pytest", "-q", "-n0"]
    command += ["-p", "tests.result_rows", "--rows", str(rows), "--rootdir", str(tmp_path)]
    command += [str(tmp_path / "test_some.py")]
    codes = [
        subprocess.run(
            command, cwd=ROOT, env={**os.environ, "MENDED": mended}, capture_output=True
        ).returncode
        for mended in ("", "1", "1")
    ]
    assert codes == [1, 0, 0]
    outcomes = [json.loads(line) for line in rows.read_text().splitlines()]
    names = [(row["test"].rpartition("::")[2], row["outcome"]) for row in outcomes]
    assert names == [("test_good", "passed"), ("test_mended", "failed"), ("test_mended", "passed")]
    assert "MENDED" in outcomes[1]["message"]
