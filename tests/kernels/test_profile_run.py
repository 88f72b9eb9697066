"""python -m kernels.profile as it is run: case by case, stopped, resumed, compared, judged."""

import math
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import kernels.profile.__main__ as command
from kernels.profile import bench, command_line, measured_run, providers, timing
from kernels.profile.baselines import Provider
from kernels.profile.bench import expected_s
from kernels.profile.cases import Case, default_cases, parse_shape
from kernels.profile.compare import changes
from kernels.profile.providers import PROVIDERS
from kernels.profile.results import SCHEMA, calculated_case, read_results, write_json
from kernels.profile.roofline import MODES, Peaks, floor_s, saved_bytes
from kernels.profile.targets import judge

CPU = torch.device("cpu")
SMALL = "C=24,F=40,D=16,grid=6x7,dtype=fp32"
H200 = Peaks(flops=790e12, bandwidth=4.3e12, l2=60 * 2**20)
SHAPES = [f"T=2,n=2,{SMALL}", f"T=3,n=2/3,p=0.5/0.5,pool=resize,{SMALL}"]
LINE = ["--device=cpu", "--min-ms=0.1"]


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(timing, "WARMUP_MS", 0.1)
    monkeypatch.setattr(providers, "COMPILE_BACKEND", "aot_eager")  # no C++ compiler
    monkeypatch.setattr(
        measured_run, "measure_peaks", partial(timing.measure_peaks, sizes=(64, 4096))
    )


def broken(case, device):
    def call(x, weights):
        raise RuntimeError("no such kernel\nmore")

    return call


def test_a_run_measures_prints_and_writes_everything(tmp_path, monkeypatch, capsys, fast):
    fused = Provider("fused", "", "fused", broken)
    monkeypatch.setitem(PROVIDERS, "fused", fused)
    out = tmp_path / "out"
    line = [*LINE, *(f"--shape={shape}" for shape in SHAPES), f"--out={out}"]
    assert command.main(line) == 1  # since one fails
    printed = capsys.readouterr()
    first = printed.out.splitlines()[1]
    assert first.startswith("2 cases to measure") and " s on a GPU" in first
    assert "ceilings measured in this run" in printed.out and "A/A, save timed" in printed.out
    assert "liger skipped: " in printed.out and "kernels of save" in printed.out
    assert "fused: RuntimeError: no such kernel" in printed.err
    pictures = ["speedup.png", "parts.png"]
    names = ["results.json", "results.csv", "report.html", *pictures]
    assert printed.out.split()[-len(names) :] == [str(out / name) for name in names]
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in pictures)

    content = read_results(out)
    assert content["machine"]["torch"] == torch.__version__ and content["kind"] == "measured"
    assert [record["case"] for record in content["cases"]] == [parse_shape(s).name for s in SHAPES]
    both = {"eager_loop", "eager_grouped", "compile", "save", "recompute"}
    for record, expected in zip(content["cases"], (both, both | {"eager_batched"}), strict=True):
        assert record["providers"].keys() == expected and record["failed"].keys() == {"fused"}
        assert record["noise"].keys() == set(MODES) and record["skipped"]
        for found in record["providers"].values():
            assert max(found["errors"].values()) < 1e-5
            for times in found["timings"].values():
                order = [times[k] for k in ("lowest_ms", "q1_ms", "median_ms", "q3_ms")]
                assert order[0] > 0 and order == sorted(order) and times["repeats"] >= 10
            kernels = found["kernels"]["kernels"]
            assert sum(kernel["share"] for kernel in kernels) == pytest.approx(1.0)
    traces = sorted(path.name for path in (out / "traces").iterdir())
    kept = [f"{parse_shape(s).name.replace('/', '_')}-save.json.gz" for s in SHAPES]
    assert traces == sorted(kept)
    rows = (out / "results.csv").read_text().splitlines()
    assert len(rows) == 1 + 3 * (5 + 6) and rows[0].startswith("case,tokens,frozen_vit,provider")


def test_a_quick_run_has_few_cases_and_providers(tmp_path):
    gpu = torch.device("cuda", 0)

    def settings_for(*line):
        return command_line.settings_of(command_line.parser("").parse_args(line), tmp_path)

    sweeps, cases = command_line.cases_of(command_line.parser("").parse_args(["--quick"]), None)
    settings = settings_for("--quick")
    assert [len(set(case.sides)) for case in cases] == [1, 3] and not sweeps
    assert expected_s(cases, settings, gpu) < 90
    full = settings_for()
    assert 120 < expected_s(default_cases(), full, gpu) < 900
    assert expected_s(default_cases()[:4], full, gpu) < expected_s(default_cases(), full, gpu)
    assert "compile_max" not in full.providers and "graph" in full.providers
    hot = settings_for("--sustained")
    assert hot.sustained and hot.min_ms == 5000


KILLED = """
import os, signal, sys
import kernels.profile.__main__ as command
from functools import partial
from kernels.profile import bench, measured_run, timing
measured = bench.measure_case
measured_run.measure_peaks = partial(timing.measure_peaks, sizes=(64, 4096))
def one_then_killed(case, *rest):
    if case.ns == (3,):
        os.kill(os.getpid(), getattr(signal, sys.argv.pop()))
    return measured(case, *rest)
measured_run.measure_case = one_then_killed
signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
sys.exit(command.main(sys.argv[1:-1]))
"""


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
def test_a_killed_run_is_kept_and_resumed(name, tmp_path, capsys, fast, monkeypatch):
    line = [*LINE, "--provider=save", "--mode=both", "--no-trace", f"--out={tmp_path}", "--resume"]
    line += [f"--shape=T=2,n={n},{SMALL}" for n in (2, 3, 4)]
    process = [sys.executable, "-c", KILLED, *line, name]
    ran = subprocess.run(process, capture_output=True, text=True)
    assert ran.returncode in (-signal.SIGKILL, 128 + signal.SIGTERM), ran.stderr
    kept = read_results(tmp_path)
    assert [record["case"][:7] for record in kept["cases"]] == ["T=2,n=2"]

    seen: list[str] = []
    measure = measured_run.measure_case

    def noted(case, *rest):
        seen.append(case.name[:7])
        return measure(case, *rest)

    monkeypatch.setattr(measured_run, "measure_case", noted)
    assert command.main(line) == 0
    assert "2 cases to measure, 1 there already" in capsys.readouterr().out
    assert seen == ["T=2,n=3", "T=2,n=4"]
    content = read_results(tmp_path)
    assert content["cases"][0] == kept["cases"][0] and len(content["cases"]) == 3
    assert command.main(line) == 0 and len(seen) == 2  # nothing is left: the page is written again

    assert command.main([*line, "--frozen-vit"]) == 2
    said = capsys.readouterr().err
    assert "--resume" in said and "frozen is True, was False" in said and "--out" in said
    assert read_results(tmp_path) == content
    assert command.main([*LINE, "--resume"]) == 2 and "--out" in capsys.readouterr().err


def test_a_case_that_fails_is_measured_again_on_resume(tmp_path, monkeypatch, fast, capsys):
    measure = measured_run.measure_case

    def out_of_memory(case, *rest):
        raise torch.OutOfMemoryError("CUDA out of memory")

    line = [*LINE, f"--shape={SHAPES[0]}", f"--out={tmp_path}", "--resume", "--provider=save"]
    monkeypatch.setattr(measured_run, "measure_case", out_of_memory)
    assert command.main(line) == 1
    assert "use fewer tiles" in capsys.readouterr().err and read_results(tmp_path)["failures"]
    monkeypatch.setattr(measured_run, "measure_case", measure)
    assert command.main(line) == 0 and not read_results(tmp_path)["failures"]


def test_a_lost_gpu_ends_the_run_but_keeps_the_record(tmp_path, monkeypatch, fast, capsys):
    measure = measured_run.measure_case

    def lost(case, *rest):
        if case.uniform:
            return measure(case, *rest)
        raise bench.DeviceLostError("save")

    monkeypatch.setattr(measured_run, "measure_case", lost)
    shapes = [SHAPES[0], SHAPES[1], f"T=2,n=4,{SMALL}"]
    line = [*LINE, *(f"--shape={s}" for s in shapes), f"--out={tmp_path}", "--provider=save"]
    assert command.main(line) == 1 and "stopped answering" in capsys.readouterr().err
    assert len(read_results(tmp_path)["cases"]) == 1


def test_an_output_folder_that_cannot_be_written_is_an_error(tmp_path, capsys):
    (file := tmp_path / "file").write_text("kept")
    for out in (file, file / "folder"):
        assert command.main(["--shape", "n=2", "--out", str(out)]) == 2
        assert "--out: " in (error := capsys.readouterr().err) and str(out) in error
    assert file.read_text() == "kept"


def test_without_a_gpu_it_calculates_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line = [f"--out={tmp_path}", "--peak-tflops=312", "--bandwidth=2"]
    assert command.main([*line, "--shape=T=64,n=12"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("No GPU was found: nothing was timed.")
    assert "312 TFLOP/s in bf16 and 2 TB/s" in printed and "--peak-tflops" in printed
    assert "405 / 341 / 149 / 21" in printed and "2 of 7" in printed and "no bounds" in printed
    content = read_results(tmp_path)
    assert content["kind"] == "calculated" and content["cases"][0]["peaks"]["flops"] == 312e12
    assert (tmp_path / "parts.png").stat().st_size > 10_000
    assert "nothing was timed" in (tmp_path / "report.html").read_text()

    write_json(tmp_path / "results.json", measured := content_of(recorded(Case((12,), (1.0,)), {})))
    assert command.main(["--shape=n=12", f"--out={tmp_path}"]) == 2
    assert "holds measurements" in capsys.readouterr().err
    assert read_results(tmp_path)["kind"] == measured["kind"]

    write_json(tmp_path / "results.json", content)  # nor the other way round
    assert command.main([*LINE, "--resume", f"--out={tmp_path}", f"--shape={SHAPES[0]}"]) == 2
    assert "kind is 'measured', was 'calculated'" in capsys.readouterr().err


def test_a_sweep_is_one_line_of_cases(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line = ["--shape=T=64,n=8/12", "--sweep=n=4..6", "--sweep=T=1,2,4..16", f"--out={tmp_path}"]
    assert command.main(line) == 0
    sweeps = read_results(tmp_path)["sweeps"]
    assert [(s["key"], s["values"]) for s in sweeps] == [("n", [4, 5, 6]), ("T", [1, 2, 4, 8, 16])]
    for sweep in sweeps:
        for what in ("time", "speedup"):
            assert (tmp_path / f"sweep-{sweep['key']}-{what}.png").stat().st_size > 10_000
        assert not (tmp_path / f"sweep-{sweep['key']}-host.png").exists()  # of which none knows
    assert not (tmp_path / "speedup.png").exists()  # no case stands alone


def recorded(case: Case, both_ms: dict[str, float], spread: float = 0.01, again: float = 1.0):
    """A record as `measure_case` makes it."""
    record = calculated_case(case, H200, False, MODES) | {"repeated": "save", "skipped": {}}
    record |= {"failed": {}, "noise": {"both": again}, "providers": {}}
    for name, ms in both_ms.items():
        quartiles = {"q1_ms": ms * (1 - spread), "median_ms": ms, "q3_ms": ms * (1 + spread)}
        record["providers"][name] = {
            "errors": {"out": 1e-3, "x": 2e-3},
            "memory": {"saved": saved_bytes(case, PROVIDERS[name].way), "saved_x": 0, "peak": None},
            "timings": {"both": quartiles | {"lowest_ms": ms, "repeats": 10, "host_ms": 0.1}},
        }
    return record


def content_of(*records, **machine):
    known = {"torch": "2", "triton": "3", "device": "H200", "commit": "a"} | machine
    return {"schema": SCHEMA, "kind": "measured", "machine": known, "cases": list(records)}


@pytest.mark.parametrize("pool", ["adaptive", "resize"])
def test_targets_follow_the_floors(pool):
    """No limit may ask for more than the floors let expect, none for memory below the count."""
    for case in (c for c in default_cases() if c.pool == pool):
        plain = H200.past_l2
        ways = {"eager_grouped": "eager", "compile": "compile"}
        found = {t.what: t for t in judge(recorded(case, {}))}
        for other, way in ways.items():
            ratio = floor_s(case, way, "both", plain) / floor_s(case, "cublas", "both", plain)
            limit = found[f"speed over {other}, fwd+bwd"].limit
            assert limit <= max(ratio, 1.0) and limit - 1 == pytest.approx(0.9 * (ratio - 1))
        assert ("speed over eager_loop, fwd+bwd" in found) == (not case.uniform)
        count = saved_bytes(case, "cublas") / saved_bytes(case, "eager")
        assert count < found["saved memory over eager_grouped, save"].limit < 1.02 * count
    by_case = {c.name: {t.what: t.limit for t in judge(recorded(c, {}))} for c in default_cases()}
    large = by_case["T=64,n=16,pool=adaptive"]
    assert large["speed over compile, fwd+bwd"] == pytest.approx(1, abs=5e-3)
    assert large["saved memory over eager_grouped, save"] > 0.415
    mixed = by_case[default_cases()[3].name]
    assert mixed["speed over eager_grouped, fwd+bwd"] == pytest.approx(1.3, abs=0.01)
    resized = by_case["T=64,n=12,pool=resize"]
    assert resized["speed over eager_grouped, fwd+bwd"] == pytest.approx(1.2, abs=0.02)


def test_targets_are_judged_by_ratios_of_one_run():
    case = Case((12,), (1.0,))
    record = recorded(case, {"eager_grouped": 1.2, "compile": 0.9, "save": 1.0, "recompute": 1.0})
    kernel = {"name": "pool_norm_kernel", "roof": 0.6}
    record["providers"]["save"]["kernels"] = {"kernels": [kernel]}
    record["providers"]["save"]["errors"]["x"] = "nan"  # as a file has it
    record["providers"]["recompute"]["errors"]["x"] = 5e-3
    found = {target.what: target for target in judge(record)}
    assert found["speed over eager_grouped, fwd+bwd"].met is True
    assert found["speed over compile, fwd+bwd"].met is False
    assert found["saved memory over eager_grouped, save"].measured == pytest.approx(0.367, abs=1e-3)
    assert found["saved memory over eager_grouped, recompute"].met is True
    assert found["error over eager_grouped, save"].met is False
    assert math.isnan(found["error over eager_grouped, save"].measured)
    assert found["error over eager_grouped, recompute"].measured == pytest.approx(2.5)
    assert found["pool + norm kernel over copy bandwidth"].met is False

    mixed = Case((8, 12, 16), (0.2, 0.3, 0.5))
    found = {t.what: t for t in judge(recorded(mixed, {"eager_loop": 4.0, "save": 1.0}))}
    assert found["speed over eager_loop, fwd+bwd"].met is True
    assert found["speed over eager_grouped, fwd+bwd"].met is None
    assert found["pool + norm kernel over copy bandwidth"].met is None


def write(path: Path, content) -> str:
    write_json(path, content)
    return str(path)


def test_a_comparison_knows_the_noise_of_both_runs(tmp_path, capsys):
    case = Case((12,), (1.0,))
    times = {"compile": 1.0, "save": 1.0, "recompute": 1.0}
    old = content_of(recorded(case, times), recorded(Case((8,), (1.0,)), times))
    after = {"compile": 1.07, "save": 1.02, "recompute": 0.8, "fused": 1.0}
    quiet = content_of(recorded(case, after), commit="b")
    loud = content_of(recorded(case, after, again=1.09))
    spread = content_of(recorded(case, after, spread=0.08))
    by = {change.provider: change for change in changes(old, quiet)}
    assert by["compile"].by == pytest.approx(0.07) and by["compile"].noise == pytest.approx(0.01)
    assert by["compile"].slower_by_more_than(0.05) and not by["save"].slower_by_more_than(0.05)
    files = [write(tmp_path / f"{n}.json", c) for n, c in (("old", old), ("quiet", quiet))]
    assert command.main(["--compare", *files]) == 0
    assert command.main(["--compare", *files, "--fail-above", "10%"]) == 0
    capsys.readouterr()
    assert command.main(["--compare", *files, "--fail-above", "5%"]) == 1
    lines = capsys.readouterr().out.splitlines()
    told = {line.split()[1]: line for line in lines if line.startswith("T=64,n=12")}
    assert "SLOWER by more than 5%" in told["compile"] and "+7.0%" in told["compile"]
    assert told["save"].endswith("slower") and told["recompute"].endswith("faster")
    assert "commit: a -> b" in lines and any(
        "new run" in line and "fused" in line for line in lines
    )
    assert sum("only in the old run: T=64,n=8" in line for line in lines) == 3
    for name, content in (("loud", loud), ("spread", spread)):
        file = write(tmp_path / f"{name}.json", content)
        assert command.main(["--compare", files[0], file, "--fail-above", "0.05"]) == 0
        assert "noise" in capsys.readouterr().out


def test_what_cannot_be_compared_is_refused_first(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    case = Case((12,), (1.0,))
    good = content_of(recorded(case, {"save": 1.0}))
    old = write(tmp_path / "schema.json", good | {"schema": SCHEMA + 1})
    (torn := tmp_path / "torn.json").write_text('{"schema"')
    for file, said in (
        *((old, f"schema {SCHEMA + 1}, this version reads {SCHEMA}"), (torn, "cannot be read")),
        (tmp_path / "none", "cannot be read"),
        (write(tmp_path / "good.json", good), "was measured on T=64,n=12"),
    ):
        assert command.main(["--compare", str(file), f"--shape={SHAPES[0]}"]) == 2
        printed = capsys.readouterr()
        assert said in printed.err and not printed.out
    assert command.main(["--compare", *["x"] * 3]) == 2


def test_a_run_is_compared_on_the_cases_of_the_run_before(tmp_path, fast, capsys):
    before, after = tmp_path / "before", tmp_path / "after"
    line = [*LINE, "--provider=save", "--mode=both", "--no-trace"]
    assert command.main([*line, f"--shape={SHAPES[0]}", f"--out={before}"]) == 0
    content = read_results(before)
    times = content["cases"][0]["providers"]["save"]["timings"]["both"]
    times |= {key: times[key] * 1e-6 for key in ("q1_ms", "median_ms", "q3_ms")}
    content["cases"][0]["noise"] = {"both": 1.0}
    write_json(before / "results.json", content)
    capsys.readouterr()
    assert command.main([*line, f"--out={after}", f"--compare={before}", "--fail-above=5%"]) == 1
    assert "SLOWER by more than 5%" in capsys.readouterr().out
    assert [r["case"] for r in read_results(after)["cases"]] == [parse_shape(SHAPES[0]).name]
    assert (after / "compare.html").is_file()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_run_on_the_gpu(tmp_path):
    shapes = ["--shape=T=4,n=12", "--shape=T=4,n=8/12/16,pool=resize"]
    assert command.main([*shapes, f"--out={tmp_path}", "--min-ms=5"]) == 0
    content = read_results(tmp_path)
    assert content["machine"]["device"] == torch.cuda.get_device_name()
    for record in content["cases"]:
        assert not record["failed"]
        assert record["providers"].keys() >= {"save", "fused", "compile", "graph"}
        kernels = record["providers"]["save"]["kernels"]["kernels"]
        assert "pool_norm_kernel" in {kernel["name"] for kernel in kernels}
