"""python -m kernels.profile: formulas, providers, and all it does on a GPU, run on a CPU."""

import csv
import json
import math
from types import SimpleNamespace

import pytest
import torch

import kernels.profile.__main__ as command
from kernels import POOL_MODES
from kernels.profile import bench, calculated, providers, random_inputs, system, targets, timing
from kernels.profile.accuracy import float64_results, relative_errors
from kernels.profile.bench import BenchSettings, CaseResult, Measured, measure_case
from kernels.profile.cases import Case, default_cases, parse_shape
from kernels.profile.memory import Memory, measure_memory, saved_for_backward
from kernels.profile.providers import PROVIDERS, TORCH_POOLS, Provider
from kernels.profile.random_inputs import make_inputs, outputs_and_gradients, rotating_inputs
from kernels.profile.results import rows_of, write_csv, write_json
from kernels.profile.roofline import (
    MODES,
    POOLED_FROM,
    WAYS,
    Peaks,
    floor_s,
    model_flops,
    saved_bytes,
    steps,
)
from kernels.profile.timing import Timing, phases, time_call

CPU = torch.device("cpu")
SMALL = "C=24,F=40,D=16,grid=6x7,dtype=fp32"
H200 = Peaks(flops=790e12, bandwidth=4.3e12)
# n, GFLOP forward, then eager, compile and fused: microseconds forward and backward; megabytes
# kept for backward by eager, compile, save and recompute. 64 tiles at the usual widths.
ROOFLINE = [
    (8, 123, (220, 207, 183), (422, 391, 346), (240, 211, 66, 9)),
    (12, 277, (465, 435, 381), (918, 849, 747), (405, 341, 149, 21)),
    (16, 493, (807, 754, 658), (1613, 1490, 1308), (636, 523, 264, 38)),
]


def near(expected: float) -> object:
    """Within 3 %, or what rounding to whole numbers may hide."""
    return pytest.approx(expected, rel=0.03, abs=0.5)


@pytest.mark.parametrize(("n", "gflop", "forward", "backward", "saved"), ROOFLINE)
def test_roofline_of_an_h200(n, gflop, forward, backward, saved):
    case = Case((n,), (1.0,))
    assert model_flops(case, "forward") / 1e9 == near(gflop)
    for mode, floors in (("forward", forward), ("backward", backward)):
        for way, microseconds in zip(("eager", "compile", "fused"), floors, strict=True):
            assert 1e6 * floor_s(case, way, mode, H200) == near(microseconds), (mode, way)
    ways = ("eager", "compile", "cublas", "recompute")
    assert [saved_bytes(case, way) / 1e6 for way in ways] == [near(value) for value in saved]
    assert saved_bytes(case, "fused") == saved_bytes(case, "cublas")


def test_the_op_as_it_ships_lies_between_compile_and_perfect_fusion():
    for case in default_cases():
        for mode in MODES:
            fused, cublas = (floor_s(case, way, mode, H200) for way in ("fused", "cublas"))
            assert fused < cublas < floor_s(case, "eager", mode, H200)
        assert floor_s(case, "recompute", "both", H200) > floor_s(case, "cublas", "both", H200)


def test_matrix_products_of_the_steps_are_those_of_the_model():
    for case in default_cases():
        for way in WAYS:
            for mode in MODES:
                flops = sum(step.flops for step in steps(case, way, mode))
                repeated = 4.0 * case.rows * case.channels * case.hidden
                extra = repeated if way == "recompute" and mode != "forward" else 0.0
                assert flops == pytest.approx(model_flops(case, mode) + extra)


def test_few_rows_are_bound_by_the_weights():
    case = parse_shape("T=1,n=1")
    weights = (2 * 1152 * 3456 + 3456 * 2048) * 2
    assert floor_s(case, "fused", "forward", H200) == pytest.approx(weights / 4.3e12, rel=0.1)


def test_resizing_costs_torch_the_upsampled_patches_unless_n_divides_the_grid():
    for way in ("eager", "compile"):
        floors = {
            (n, pool): floor_s(Case((n,), (1.0,), pool=pool), way, "both", H200)
            for n in (9, 12)
            for pool in ("adaptive", "resize")
        }
        assert floors[9, "adaptive"] == floors[9, "resize"]
        upsampled = 64 * 36 * 36 * 1152 * 2
        more = floors[12, "resize"] - floors[12, "adaptive"]
        assert more == pytest.approx(4 * upsampled / 4.3e12)


def test_every_pooling_mode_has_a_way_in_torch_and_a_floor():
    assert tuple(TORCH_POOLS) == tuple(POOLED_FROM) == POOL_MODES


def test_default_cases_are_uniform_and_mixed_in_both_modes():
    cases = default_cases()
    assert [case.pool for case in cases] == ["adaptive"] * 4 + ["resize"] * 4
    assert [case.uniform for case in cases] == [True, True, True, False] * 2
    mixed = cases[3].sides
    assert [mixed.count(n) for n in (8, 12, 16)] == [13, 19, 32]
    assert mixed == cases[7].sides and mixed != tuple(sorted(mixed))
    assert all(parse_shape(case.name) == case for case in cases)


def test_shape_reads_every_key():
    text = "T=6,n=2/3,p=2/1,pool=resize,grid=5x9,C=16,F=32,D=8,dtype=fp16"
    case = parse_shape(text)
    assert sorted(case.sides) == [2, 2, 2, 2, 3, 3]
    assert (case.grid, case.channels, case.hidden, case.width) == ((5, 9), 16, 32, 8)
    assert case.torch_dtype == torch.float16
    assert parse_shape(case.name).sides == case.sides
    assert sorted(parse_shape("T=5,n=4/8").sides) == [4, 4, 4, 8, 8]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ("T=64", "no side n in 'T=64'; add for example n=12"),
        ("n", "'n' in 'n' is not KEY=VALUE"),
        ("n=12,", "'' in 'n=12,' is not KEY=VALUE"),
        ("n=12,tiles=4", "unknown key 'tiles' in 'n=12,tiles=4'; expected one of T, n, p"),
        ("n=12,n=8", "n is given twice"),
        ("n=0", "n is '0'; expected a whole number >= 1"),
        ("T=1.5,n=8", "T is '1.5'; expected a whole number >= 1"),
        ("n=8/12,p=1", "1 shares in p for 2 sides in n"),
        ("n=8/12,p=1/-1", "p is '1/-1'; expected positive numbers"),
        ("n=8,grid=27", "grid is '27'; expected rows x columns"),
        ("n=8,pool=max", "pool is 'max'; expected one of adaptive, resize"),
        ("n=8,dtype=int8", "dtype is 'int8'; expected one of bf16, fp16, fp32"),
    ],
)
def test_a_bad_shape_is_a_clear_error(shape, message, capsys):
    with pytest.raises(SystemExit) as error:
        command.main(["--shape", shape])
    assert error.value.code == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def quick_compile(monkeypatch):
    """torch.compile without generating code, which takes a C++ compiler and half a minute."""
    monkeypatch.setattr(providers, "COMPILE_BACKEND", "aot_eager")


def runnable(case: Case) -> dict[str, Provider]:
    return {name: p for name, p in PROVIDERS.items() if not p.unfit(case, CPU)}


@pytest.mark.parametrize("pool", ["adaptive", "resize"])
@pytest.mark.parametrize("sides", ["T=3,n=4", "T=5,n=2/3/5"])
def test_providers_agree_with_float64(sides, pool, quick_compile):
    case = parse_shape(f"{sides},pool={pool},{SMALL}")
    given = make_inputs(case, CPU)
    expected = float64_results(case, given, max_rows=9)
    assert expected.keys() == {"out", *random_inputs.GRADIENTS}
    found = runnable(case)
    assert {"eager_loop", "eager_grouped", "compile", "save", "recompute"} <= found.keys()
    assert ("eager_batched" in found) == (not case.uniform)
    for name, provider in found.items():
        results = outputs_and_gradients(provider.build(case, CPU), given)
        for of, error in relative_errors(results, expected).items():
            assert error < 2e-6, (name, of)


def test_a_frozen_tower_gets_no_gradient():
    case = parse_shape(f"T=3,n=2/3,{SMALL}")
    given = make_inputs(case, CPU, frozen=True)
    expected = float64_results(case, given)
    assert "x" not in expected
    call = PROVIDERS["save"].build(case, CPU)
    errors = relative_errors(outputs_and_gradients(call, given), expected)
    assert errors.keys() == expected.keys() and max(errors.values()) < 2e-6
    eager = PROVIDERS["eager_grouped"].build(case, CPU)
    assert saved_for_backward(eager, given)[1] == 0


def test_liger_missing_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(providers.importlib.util, "find_spec", lambda name: None)
    assert "pip install liger-kernel" in PROVIDERS["liger"].unfit(Case((8,), (1.0,)), CPU)


@pytest.mark.parametrize("pool", ["adaptive", "resize"])
@pytest.mark.parametrize(
    ("way", "name"), [("eager", "eager_grouped"), ("cublas", "save"), ("recompute", "recompute")]
)
def test_saved_memory_is_what_is_calculated(way, name, pool):
    case = parse_shape(f"T=4,n=5,C=256,F=768,D=32,grid=9x8,dtype=fp32,pool={pool}")
    provider = PROVIDERS[name]
    memory = measure_memory(provider.build(case, CPU), make_inputs(case, CPU), CPU)
    # The op also keeps the layout of the tiles, a few hundred bytes.
    assert memory.saved + memory.saved_x == pytest.approx(saved_bytes(case, way), rel=5e-3)
    assert (memory.saved_x > 0) == (way == "eager" and pool == "adaptive")
    assert memory.peak is None and memory.held is None


def test_only_the_timed_part_is_timed_and_inputs_rotate(monkeypatch):
    case = parse_shape(f"T=2,n=2,{SMALL}")
    monkeypatch.setattr(random_inputs, "l2_bytes", lambda device: 40_000)
    sets = rotating_inputs(case, CPU)
    size = sum(t.nbytes for t in (sets[0].x, *sets[0].weights, sets[0].grad))
    assert (len(sets) - 1) * size <= 3 * 40_000 < len(sets) * size
    assert not torch.equal(sets[0].x, sets[1].x)
    seen: list[int] = []

    def call(x, weights):
        seen.append(next(i for i, given in enumerate(sets) if given.x is x))
        return PROVIDERS["eager_grouped"].build(case, CPU)(x, weights)

    for mode, before, after in (("forward", 0, 1), ("backward", 1, 1), ("both", 0, 1)):
        seen.clear()
        prepare, timed = phases(call, sets, mode)
        state = prepare(len(sets) + 1)
        assert len(seen) == before
        result = timed(state)
        assert len(seen) == after and set(seen) == {1}
        assert isinstance(result, torch.Tensor) == (mode == "forward")
    assert all(leaf.grad is None for leaf in sets[1].leaves)


def test_quantiles_and_enough_repeats(monkeypatch):
    assert timing.quantiles([5.0, 1.0, 2.0, 3.0, 4.0]) == pytest.approx((1.8, 3.0, 4.2))
    monkeypatch.setattr(timing, "sample", lambda prepare, timed, device, count: [2.0] * count)
    found = time_call(lambda i: None, lambda state: None, CPU, min_ms=200.0)
    assert (found.median_ms, found.repeats) == (2.0, 100)
    assert time_call(lambda i: None, lambda state: None, CPU, min_ms=1.0).repeats == 10


class FakeEvent:
    """Records where in the sequence of calls it lies; times are places."""

    log: list[object] = []  # noqa: RUF012

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.log.append(self)

    def elapsed_time(self, end: "FakeEvent") -> float:
        return float(self.log.index(end) - self.log.index(self))


@pytest.fixture
def fake_gpu(monkeypatch):
    """What the measuring asks of torch.cuda, without one."""
    FakeEvent.log = []
    properties = SimpleNamespace(
        name="NVIDIA H200",
        major=9,
        minor=0,
        multi_processor_count=132,
        total_memory=141 << 30,
        L2_cache_size=60 << 20,
        uuid="12345678-90ab",
    )
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return torch.device("cuda", 0)


def test_an_output_folder_that_cannot_be_written_is_an_error(tmp_path, capsys):
    (file := tmp_path / "file").write_text("kept")
    for out in (file, file / "folder"):
        assert command.main(["--shape", "n=2", "--out", str(out), "--no-compile-report"]) == 2
        assert "--out: " in (error := capsys.readouterr().err) and str(out) in error
    assert file.read_text() == "kept"


def test_events_enclose_the_timed_part_only(fake_gpu, monkeypatch):
    """The GPU idles after what is prepared and before the clock starts: the host gets ahead."""
    log = FakeEvent.log
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("idle"))
    samples = timing.sample(
        lambda i: log.append(f"prepare {i}"), lambda state: log.append("timed"), fake_gpu, 3
    )
    assert samples == [2.0] * 3  # start, timed, end
    assert [entry for entry in log if isinstance(entry, str)] == [
        f"{what}" for i in range(3) for what in (f"prepare {i}", "idle", "timed")
    ]


def test_memory_on_a_gpu_is_counted_from_before_the_call(fake_gpu, monkeypatch):
    case = parse_shape(f"T=2,n=2,{SMALL}")
    given = make_inputs(case, CPU)
    out_bytes = case.rows * case.width * 4
    allocated = iter([1000, 1000 + out_bytes + 700])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: next(allocated))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 6000)
    memory = measure_memory(PROVIDERS["eager_grouped"].build(case, CPU), given, fake_gpu)
    assert (memory.held, memory.peak) == (700, 5000)


def test_the_machine_is_described(fake_gpu, monkeypatch):
    asked = []

    def output(line):
        asked.append(line)
        return (
            "580.1" if "driver" in str(line) else "1980 MHz, 1980 MHz, 3201 MHz, 300 W, 700 W, 40"
        )

    monkeypatch.setattr(system, "_output", output)
    machine = system.describe_machine(fake_gpu, ["python", "-m", "kernels.profile"])
    assert machine["device"] == "NVIDIA H200" and machine["driver"] == "580.1"
    assert machine["datasheet"] == {"bf16_tflops": 989, "tb_per_s": 4.8}
    assert "--id=GPU-12345678-90ab" in asked[-1]
    assert system.clocks(fake_gpu)["power.limit"] == "700 W"
    assert system.datasheet("NVIDIA GH200 480GB") is None
    assert random_inputs.l2_bytes(fake_gpu) == 60 << 20


def result_of(case: Case, both_ms: dict[str, float], **changes) -> CaseResult:
    errors = {"out": 1e-3, "x": 2e-3}
    result = CaseResult(case, H200, frozen=False, **changes)
    for name, milliseconds in both_ms.items():
        memory = Memory(saved_bytes(case, PROVIDERS[name].way), 0, None, None)
        result.measured[name] = Measured(dict(errors), memory)
        result.measured[name].timings["both"] = Timing(milliseconds, 1, 1, 10, 1)
    return result


def test_targets_are_judged_by_ratios_of_one_run():
    case = Case((12,), (1.0,))
    result = result_of(case, {"eager_grouped": 1.2, "compile": 1.0, "save": 1.0, "recompute": 1.0})
    result.pool_norm = Timing(1.0, 1.0, 1.0, 10, 1.0)
    result.measured["save"].errors["x"] = math.nan
    result.measured["recompute"].errors["x"] = 5e-3
    found = {target.what: target for target in targets.judge([result])}
    assert found["speed over eager_grouped, fwd+bwd"].met is True
    assert found["speed over compile, fwd+bwd"].met is False
    assert found["saved memory over eager_grouped, save"].measured == pytest.approx(0.367, abs=1e-3)
    assert found["saved memory over eager_grouped, recompute"].met is True
    assert found["error over eager_grouped, save"].met is False
    assert found["error over eager_grouped, recompute"].measured == pytest.approx(2.5)
    assert found["pool + norm kernel over copy bandwidth"].met is False

    mixed = Case((8, 12, 16), (0.2, 0.3, 0.5))
    found = {t.what: t for t in targets.judge([result_of(mixed, {"eager_loop": 4.0, "save": 1.0})])}
    assert found["speed over eager_loop, fwd+bwd"].met is True
    assert found["speed over eager_grouped, fwd+bwd"].met is None
    assert found["pool + norm kernel over copy bandwidth"].met is None
    resized = [t.what for t in targets.judge([result_of(Case((8,), (1.0,), pool="resize"), {})])]
    assert "speed over eager_grouped, fwd+bwd" in resized and len(resized) == 4


def broken(case, device):
    def call(x, weights):
        raise RuntimeError("no such kernel\nmore")

    return call


def test_a_provider_that_fails_is_named_and_the_others_are_measured(monkeypatch):
    monkeypatch.setitem(PROVIDERS, "compile", Provider("compile", "", "compile", broken))
    case = parse_shape(f"T=2,n=2,{SMALL}")
    result = measure_case(case, BenchSettings(("compile", "save"), ("both",), 0.1), CPU, H200)
    assert result.failed == {"compile": "RuntimeError: no such kernel"}
    assert result.measured.keys() == {"save"} and result.repeated == "save"
    assert [row["provider"] for row in rows_of(result)] == ["save", "pool_norm"]


def test_a_lost_gpu_ends_the_run(monkeypatch):
    def lost(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(bench, "synchronize", lost)
    monkeypatch.setitem(PROVIDERS, "compile", Provider("compile", "", "compile", broken))
    with pytest.raises(bench.DeviceLostError, match="compile on T=2"):
        measure_case(
            parse_shape(f"T=2,n=2,{SMALL}"), BenchSettings(("compile",), ("both",)), CPU, H200
        )


def test_all_that_a_gpu_run_does(tmp_path, monkeypatch, capsys, quick_compile):
    monkeypatch.setattr(timing, "WARMUP_MS", 0.1)
    monkeypatch.setattr(timing.measure_peaks, "__defaults__", (64, 2**12))
    monkeypatch.setitem(PROVIDERS, "fused", Provider("fused", "", "fused", broken))
    shapes = [f"T=2,n=2,{SMALL}", f"T=3,n=2/3,pool=resize,{SMALL}"]
    line = [*(f"--shape={shape}" for shape in shapes), f"--out={tmp_path}/out", "--min-ms=0.1"]
    arguments = command._parser().parse_args(line)
    assert command.run_measured(arguments, arguments.shape, CPU) == 1  # since one fails
    printed = capsys.readouterr()
    assert "ceilings measured in this run" in printed.out
    assert "A/A, save timed again" in printed.out
    assert "pip install liger-kernel" in printed.out or "needs a GPU" in printed.out
    assert "targets" in printed.out and "speed over eager_loop" not in printed.out
    assert "fused: RuntimeError: no such kernel" in printed.err
    files = [f"{tmp_path}/out/{n}" for n in ("results.json", "results.csv", "roofline.png")]
    assert printed.out.split()[-4:] == [*files, f"{tmp_path}/out/trace.json"]

    recorded = json.loads((tmp_path / "out/results.json").read_text())
    assert recorded["machine"]["torch"] == torch.__version__
    assert len(recorded["cases"]) == 2 and len(recorded["failures"]) == 2
    with (tmp_path / "out/results.csv").open() as file:
        rows = list(csv.DictReader(file))
    timed = {(row["provider"], row["mode"]) for row in rows if row["pool"] == "resize"}
    names = ("eager_loop", "eager_grouped", "eager_batched", "compile", "save", "recompute")
    assert timed == {(name, mode) for name in names for mode in MODES} | {("pool_norm", "kernel")}
    assert all(float(row["median_ms"]) > 0 and float(row["tflops"]) > 0 for row in rows)
    assert (tmp_path / "out/roofline.png").read_bytes().startswith(b"\x89PNG")
    events = json.loads((tmp_path / "out/trace.json").read_text())["traceEvents"]
    assert {f"{name}: backward" for name in names} <= {event.get("name") for event in events}


def test_without_a_gpu_it_calculates_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line = ["--no-compile-report", f"--out={tmp_path}", "--peak-tflops=312", "--bandwidth=2"]
    assert command.main([*line, "--shape=T=64,n=12"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("No GPU was found: nothing was timed.")
    assert "assumed 312 TFLOP/s and 2 TB/s" in printed and "--peak-tflops" in printed
    assert "405 / 341 / 149 / 21" in printed
    recorded = json.loads((tmp_path / "calculated.json").read_text())
    assert recorded["kind"].startswith("calculated") and recorded["assumed"]["tflops"] == 312
    assert {row["kind"] for row in recorded["cases"]} == {"calculated"}
    assert (tmp_path / "calculated.csv").read_text().startswith("kind,case,tokens")
    assert (tmp_path / "calculated.png").stat().st_size > 10_000


def test_the_compile_report_is_printed_or_its_failure(monkeypatch, capsys):
    report = pytest.importorskip("kernels.compile_report")
    monkeypatch.setattr(calculated, "interpreting", lambda: False)
    monkeypatch.setattr(report, "compile_all", lambda: [])
    monkeypatch.setattr(report, "format_summary", lambda results: "kernel  registers")
    assert calculated._print_compile_report() is True
    assert "kernel  registers" in capsys.readouterr().out

    def fail():
        raise OSError("ptxas not found")

    monkeypatch.setattr(report, "compile_all", fail)
    assert calculated._print_compile_report() is False
    assert "COMPILE REPORT FAILED: OSError: ptxas not found" in capsys.readouterr().out


def test_numbers_that_are_not_finite_stay_valid_json(tmp_path):
    write_json(tmp_path / "a.json", {"a": [math.nan, 1.0], "b": math.inf})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": ["nan", 1.0], "b": "inf"}
    write_csv(tmp_path / "a.csv", [{"a": 1}, {"b": 2}])
    assert (tmp_path / "a.csv").read_text().splitlines() == ["a,b", "1,", ",2"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_run_on_the_gpu(tmp_path, capsys):
    shapes = ["--shape=T=4,n=12", "--shape=T=4,n=8/12/16,pool=resize"]
    assert command.main([*shapes, f"--out={tmp_path}", "--min-ms=5"]) == 0
    recorded = json.loads((tmp_path / "results.json").read_text())
    assert recorded["machine"]["device"] == torch.cuda.get_device_name()
    for case in recorded["cases"]:
        assert not case["failed"]
        assert {row["provider"] for row in case["measurements"]} >= {"save", "fused", "compile"}
    assert (tmp_path / "trace.json").is_file()
