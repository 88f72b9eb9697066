"""python -m kernels.profile: formulas, providers, and all it does on a GPU, run on a CPU."""

import json
import math
import sys
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import kernels.profile.__main__ as command
from kernels import POOL_MODES
from kernels.profile import (
    bench,
    calculated,
    cuda_graph,
    libraries,
    providers,
    random_inputs,
    system,
    timing,
)
from kernels.profile.accuracy import float64_results, relative_errors
from kernels.profile.baselines import TORCH_POOLS, Provider
from kernels.profile.bench import BenchSettings, measure_case
from kernels.profile.calculated import assumed
from kernels.profile.cases import Case, default_cases, parse_shape, parse_sweep
from kernels.profile.commands import LAUNCHES, ncu_commands, nsys_commands
from kernels.profile.memory import measure_memory, saved_for_backward
from kernels.profile.providers import PROVIDERS
from kernels.profile.random_inputs import make_inputs, outputs_and_gradients, rotating_inputs
from kernels.profile.results import rows_of, write_csv, write_json
from kernels.profile.roofline import (
    MODES,
    POOLED_FROM,
    WAYS,
    Peaks,
    floor_s,
    in_l2,
    model_flops,
    saved_bytes,
    steps,
)
from kernels.profile.timing import phases, time_call

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


def test_what_fits_in_l2_is_bound_by_the_inputs_alone():
    """The n of the roofline's table with a cache of 60 MiB, and a case of which all fits."""
    cached = Peaks(H200.flops, H200.bandwidth, l2=60 * 2**20)
    for n, passes in ((8, 3), (12, 2), (16, 1)):
        case = Case((n,), (1.0,))
        assert in_l2(case, "cublas", "both", cached) == (passes, 7)
        bound, estimate = (floor_s(case, "cublas", "both", peaks) for peaks in (cached, H200))
        assert 0.97 * estimate < bound < estimate
        assert floor_s(case, "cublas", "both", cached.past_l2) == estimate
    small = parse_shape("T=1,n=4,C=64,F=128,D=64,grid=8x8")
    inputs = (64 * 64 + 128 * 3 * 64) * 2  # x and the matrices, in bf16
    assert in_l2(small, "eager", "forward", cached) == (4, 4)
    assert floor_s(small, "eager", "forward", cached) == pytest.approx(inputs / 4.3e12)


def test_products_of_float32_are_taken_at_their_own_rate(monkeypatch):
    case = parse_shape("T=64,n=12,dtype=fp32")
    assert 1e3 * floor_s(case, "cublas", "forward", assumed("fp32")) == pytest.approx(4.7, abs=0.2)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert calculated.products_in("fp32") == "TF32" and calculated.products_in("bf16") == "bf16"
    assert assumed("fp32").flops == assumed("bf16").flops / 2
    assert assumed("fp32", flops=1.0, bandwidth=2.0) == Peaks(1.0, 2.0, assumed("bf16").l2)


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
        ("n=1200", "n is 1200 in 'n=1200', for a tile of 27x27 patches; expected n <= 27"),
        ("n=4/9,grid=8x12", "n is 9 in 'n=4/9,grid=8x12'"),
    ],
)
def test_a_bad_shape_is_a_clear_error(shape, message, capsys):
    with pytest.raises(SystemExit) as error:
        command.main(["--shape", shape])
    assert error.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sweep", "expected"),
    [
        ("n=4..8", [4, 5, 6, 7, 8]),
        ("n=4", [4]),
        ("n=4,8..21", [4, 8, 12, 16, 20]),
        ("T=1,2,4..256", [1, 2, 4, 8, 16, 32, 64, 128, 256]),
        ("T=1,2,3..6", [1, 2, 3, 4, 5, 6]),
        ("C=64,96,144..400", [64, 96, 144, 192, 240, 288, 336, 384]),  # 3/2 is no whole factor
    ],
)
def test_a_sweep_goes_on_as_it_begins(sweep, expected):
    base = parse_shape("T=6,n=2/3,p=2/1,pool=resize")
    key, cases = parse_sweep(sweep, base)
    found = {"n": lambda c: c.ns[0], "T": lambda c: c.tiles, "C": lambda c: c.channels}[key]
    assert [found(case) for case in cases] == expected
    assert all(case.pool == "resize" and case.hidden == base.hidden for case in cases)
    assert all(case.tiles == 6 for case in cases) or key == "T"
    assert all(case.ns == (2, 3) for case in cases) or key == "n"


@pytest.mark.parametrize("sweep", ["n", "n=", "n=8..4", "n=4..x", "pool=adaptive", "n=20..30"])
def test_a_bad_sweep_is_a_clear_error(sweep, capsys):
    assert command.main(["--sweep", sweep]) == 2
    said = capsys.readouterr()
    assert "expected" in said.err and not said.out


@pytest.fixture
def quick_compile(monkeypatch):
    """torch.compile without generating code, which takes a C++ compiler and half a minute."""
    monkeypatch.setattr(providers, "COMPILE_BACKEND", "aot_eager")


def stand_in_for_quack():
    """quack.linear's two functions, by its own reference: gate and value in turn, then a linear."""

    def gated(x, weight, activation, bias, tuned):
        assert activation == "swiglu" and not tuned
        both = F.linear(x, weight, bias)
        return both, F.silu(both[..., ::2]) * both[..., 1::2]

    def linear(preact, weight, x, activation, bias, tuned):
        return F.linear(x, weight, bias)

    return SimpleNamespace(linear_gated_func=gated, gated_linear_func=linear)


class StandInForTransformerEngine(torch.nn.Module):
    """LayerNormMLP: its parameters' names, the activated half of fc1 first."""

    def __init__(self, width, hidden, eps, normalization, activation, device, params_dtype):
        super().__init__()
        assert (normalization, activation) == ("LayerNorm", "swiglu")
        self.eps = eps
        shapes = {"layer_norm_weight": (width,), "layer_norm_bias": (width,)}
        shapes |= {"fc1_weight": (2 * hidden, width), "fc1_bias": (2 * hidden,)}
        shapes |= {"fc2_weight": (width, hidden), "fc2_bias": (width,)}
        for name, shape in shapes.items():
            self.register_parameter(name, torch.nn.Parameter(torch.empty(shape)))

    def forward(self, rows):
        norm = (self.layer_norm_weight, self.layer_norm_bias, self.eps)
        normed = F.layer_norm(rows, rows.shape[-1:], *norm)
        gate, value = F.linear(normed, self.fc1_weight, self.fc1_bias).chunk(2, -1)
        return F.linear(F.silu(gate) * value, self.fc2_weight, self.fc2_bias)


class StandInForLiger:
    @staticmethod
    def apply(gate, value):
        return F.silu(gate) * value


@pytest.mark.parametrize("build", [libraries.liger, libraries.quack, libraries.transformer_engine])
def test_libraries_are_given_the_weights_as_they_take_them(build, monkeypatch):
    te = SimpleNamespace(LayerNormMLP=StandInForTransformerEngine)
    liger = SimpleNamespace(LigerSiLUMulFunction=StandInForLiger)
    for name, module in (
        *(("quack.linear", stand_in_for_quack()), ("transformer_engine.pytorch", te)),
        ("liger_kernel.ops.swiglu", liger),
    ):
        parts = name.split(".")
        for i in range(1, len(parts)):
            package = SimpleNamespace(__path__=[], **{parts[i]: module})
            monkeypatch.setitem(sys.modules, ".".join(parts[:i]), package)
        monkeypatch.setitem(sys.modules, name, module)
    case = parse_shape("T=5,n=2/3/5,C=24,F=40,D=24,grid=6x7,dtype=fp32")
    given = make_inputs(case, CPU)
    found = outputs_and_gradients(build(case, CPU), given)
    for of, error in relative_errors(found, float64_results(case, given)).items():
        assert error < 2e-6, of


def test_what_cannot_run_says_why_and_what_to_do(monkeypatch):
    case = Case((8,), (1.0,))
    gpu = torch.device("cuda")
    monkeypatch.setattr(libraries.importlib.util, "find_spec", lambda name: None)
    for name, package in (("liger", "liger-kernel"), ("quack", "quack-kernels"), ("te", "engine")):
        assert "pip install" in (why := PROVIDERS[name].unfit(case, gpu)) and package in why
    monkeypatch.setattr(libraries.importlib.util, "find_spec", lambda name: "there")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert "sm_90" in PROVIDERS["quack"].unfit(case, gpu)
    assert "D=1152" in PROVIDERS["te"].unfit(case, gpu)
    assert PROVIDERS["te"].unfit(parse_shape("n=8,D=1152"), gpu) is None
    for name in ("liger", "fused", "graph", "compile_max"):
        assert "needs a GPU" in PROVIDERS[name].unfit(case, CPU)


@pytest.mark.parametrize("frozen", [False, True])
def test_the_steps_of_a_graph_are_the_op_with_the_layout_given(frozen, monkeypatch):
    """What is captured, captured once for each set of inputs; a graph itself needs a GPU."""
    case = parse_shape(f"T=5,n=2/3/5,{SMALL}")
    captured = []

    def capture(steps, inputs):
        captured.append(inputs[0].data_ptr())
        return steps

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", capture)
    call, op = cuda_graph.replayed(case, CPU), PROVIDERS["save"].build(case, CPU)
    sets = [make_inputs(case, CPU, seed, frozen) for seed in (0, 1)]
    for given in (*sets, sets[0]):
        found, expected = outputs_and_gradients(call, given), outputs_and_gradients(op, given)
        assert found.keys() == expected.keys() and ("x" in found) != frozen
        assert all(torch.equal(found[name], expected[name]) for name in found)
    assert captured == [given.x.data_ptr() for given in sets]


def runnable(case: Case) -> dict[str, Provider]:
    return {name: p for name, p in PROVIDERS.items() if not p.unfit(case, CPU)}


@pytest.mark.parametrize("pool", ["adaptive", "resize"])
@pytest.mark.parametrize("sides", ["T=3,n=4", "T=5,n=2/3/5"])
def test_providers_agree_with_float64(sides, pool, quick_compile):
    case = parse_shape(f"{sides},pool={pool},{SMALL}")
    given = make_inputs(case, CPU)
    expected = float64_results(case, given)
    assert expected.keys() == {"out", "x", *given.weights._fields}
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


@pytest.mark.parametrize("pool", ["adaptive", "resize"])
@pytest.mark.parametrize(
    ("way", "name"), [("eager", "eager_grouped"), ("cublas", "save"), ("recompute", "recompute")]
)
def test_saved_memory_is_what_is_calculated(way, name, pool):
    case = parse_shape(f"T=4,n=5,C=256,F=768,D=32,grid=9x8,dtype=fp32,pool={pool}")
    provider = PROVIDERS[name]
    memory = measure_memory(provider.build(case, CPU), make_inputs(case, CPU), CPU)
    # The op also keeps the layout of the tiles and their shapes, a few hundred bytes.
    layout = 0 if way == "eager" else case.layout(CPU).table.nbytes + 4 * 4 * 8
    assert memory.saved + memory.saved_x == pytest.approx(saved_bytes(case, way) + layout, rel=1e-3)
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


def test_quartiles_and_enough_repeats(monkeypatch):
    leads = []

    def sample(prepare, timed, device, count, per_lead):
        leads.append(per_lead)
        return [2.0 + i % 5 for i in range(count)]

    monkeypatch.setattr(timing, "sample", sample)
    found = time_call(lambda i: None, lambda state: None, CPU, min_ms=400.0)
    assert (found.lowest_ms, found.q1_ms, found.median_ms, found.q3_ms) == (2.0, 3.0, 4.0, 5.0)
    assert found.repeats == 100 and set(leads) == {1}
    assert time_call(lambda i: None, lambda state: None, CPU, min_ms=1.0).repeats == 10
    leads.clear()
    time_call(lambda i: None, lambda state: None, CPU, 1.0, rest=False)
    assert set(leads) == {0}


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


def test_a_sustained_run_never_rests(fake_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: FakeEvent.log.append("idle"))
    samples = timing.sample(lambda i: None, lambda state: None, fake_gpu, 3, per_lead=0)
    assert len(samples) == 3 and "idle" not in FakeEvent.log


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


SMI = """\
#!/bin/sh
echo "$*" >> "$0.asked"
case "$*" in
    *clocks_event_reasons*) [ -n "$OLD_DRIVER" ] && exit 2 ;;
    *driver_version*) echo 580.1; exit ;;
esac
case "$*" in
    *loop-ms*) echo "1980, 3201, 300.5, 40, 0x0000000000000001"
               echo "1410, 3201, [N/A], 60, 0x0000000000000024"
               printf "1410, 32"; exec sleep 60 ;;
esac
echo 700
"""


@pytest.fixture
def fake_smi(tmp_path, monkeypatch):
    (script := tmp_path / "nvidia-smi").write_text(SMI)
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return tmp_path / "nvidia-smi.asked"


def test_the_machine_is_described(fake_gpu, fake_smi):
    machine = system.describe_machine(fake_gpu, ["python", "-m", "kernels.profile"])
    assert machine["device"] == "NVIDIA H200" and machine["driver"] == "580.1"
    assert machine["datasheet"] == {"bf16_tflops": 989, "tb_per_s": 4.8}
    assert machine["power.limit"] == "700" and machine["command"] == "python -m kernels.profile"
    assert machine["torch"] == torch.__version__ and machine["transformer_engine"] is None
    assert all("--id=GPU-12345678-90ab" in line for line in fake_smi.read_text().splitlines())
    assert random_inputs.l2_bytes(fake_gpu) == 60 << 20


@pytest.mark.parametrize("old_driver", ["", "1"])
def test_clocks_power_and_throttling_are_watched_while_timing(
    old_driver, fake_gpu, fake_smi, monkeypatch
):
    monkeypatch.setenv("OLD_DRIVER", old_driver)
    with system.watched(fake_gpu) as found:
        deadline = time.monotonic() + 60
        while not fake_smi.exists() or "loop-ms" not in fake_smi.read_text():
            assert time.monotonic() < deadline
    assert ("clocks_throttle_reasons" in fake_smi.read_text()) == bool(old_driver)
    if found["throttled"]:  # the script was given the time to print
        assert found["clocks.sm"] == [1410, 1695, 1980] and found["power.draw"] == [300.5] * 3
        assert found["throttled"] == ["power cap", "thermal, software"]


def test_what_the_gpu_did_is_summed_up():
    lines = ["1980, 3201, 300.5, 40, 0x1", "1410, 3201, [N/A], 60, 0x24", "1410, 32"]
    found = system._summary([line.split(", ") for line in lines])
    assert found["clocks.sm"] == [1410, 1695, 1980] and found["power.draw"] == [300.5] * 3
    assert found["throttled"] == ["power cap", "thermal, software"]
    part = [["1980", "3201", "[N/A]", "40", "[N/A]"]]
    assert system._summary([]) == system._summary(part) == {"throttled": []}


def test_nothing_is_watched_on_a_cpu_or_without_nvidia_smi(fake_gpu, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    for device in (CPU, fake_gpu):
        with system.watched(device) as found:
            pass
        assert found == {}


def test_nsight_sees_one_call_after_two_in_a_named_range(monkeypatch):
    log, case = [], parse_shape(f"T=2,n=2,{SMALL}")

    @contextmanager
    def noted(what):
        log.append(f"{what} begins")
        yield
        log.append("ends")

    def build(case, device):
        def call(x, weights):
            log.append("call")
            return PROVIDERS["eager_grouped"].build(case, CPU)(x, weights)

        return call

    monkeypatch.setitem(PROVIDERS, "save", Provider("save", "", "cublas", build))
    monkeypatch.setattr(bench, "rotating_inputs", lambda case, *_: [make_inputs(case, CPU)])
    monkeypatch.setattr(bench, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda.nvtx, "range", noted)
    monkeypatch.setattr(torch.cuda.profiler, "profile", lambda: noted("profiler"))
    settings = BenchSettings(("save", "liger"), ("forward", "both"), 0.1)
    bench.run_once(case, settings, gpu := torch.device("cuda"))
    expected = ["call", "call", "profiler begins", "save begins", "call", "ends", "ends"]
    assert log == expected
    log.clear()
    monkeypatch.setattr(bench, "time_call", lambda *_, rest: timing.Timing(1, 1, 1, 1, 1, rest))
    bench._time_modes("save", build(case, CPU), [], settings, gpu)
    assert log == ["save: forward begins", "ends", "save: both begins", "ends"]


def broken(case, device):
    def call(x, weights):
        raise RuntimeError("no such kernel\nmore")

    return call


def test_a_provider_that_fails_is_named_and_the_others_are_measured(monkeypatch):
    monkeypatch.setitem(PROVIDERS, "compile", Provider("compile", "", "compile", broken))
    case = parse_shape(f"T=2,n=2,{SMALL}")
    record = measure_case(case, BenchSettings(("compile", "save"), ("both",), 0.1), CPU, H200)
    assert record["failed"] == {"compile": "RuntimeError: no such kernel"}
    assert record["providers"].keys() == {"save"} and record["repeated"] == "save"
    assert [row["provider"] for row in rows_of(record)] == ["save"]


def test_a_lost_gpu_ends_the_run(monkeypatch):
    def lost(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(bench, "synchronize", lost)
    monkeypatch.setitem(PROVIDERS, "compile", Provider("compile", "", "compile", broken))
    with pytest.raises(bench.DeviceLostError, match="compile on T=2"):
        measure_case(
            parse_shape(f"T=2,n=2,{SMALL}"), BenchSettings(("compile",), ("both",)), CPU, H200
        )


def test_the_profilers_commands_name_what_one_call_launches(monkeypatch):
    """Counted by a recorder in the place of Triton's launch."""
    pytest.importorskip("triton")
    from triton.runtime.interpreter import GridExecutor
    from triton.runtime.jit import JITFunction

    from kernels import launch, triton_impl
    from kernels.passes import Needs, backward, forward

    launched = []
    monkeypatch.setattr(JITFunction, "run", lambda self, *a, **k: launched.append(self.__name__))
    monkeypatch.setattr(
        GridExecutor, "__call__", lambda self, *a, **k: launched.append(self.fn.__name__)
    )
    monkeypatch.setattr(launch, "architecture", lambda _: "sm_90")
    case = parse_shape("T=2,n=2/3,C=32,F=64,D=32,grid=6x7,dtype=bf16")
    given, layout = make_inputs(case, CPU), case.layout(CPU)
    for name, keep in (("save", "save"), ("recompute", "recompute"), ("fused", "save")):
        for frozen in (False, True):
            launched.clear()
            fused = name == "fused"
            with torch.no_grad():
                x, weights = given.x.flatten(0, 1), given.weights
                _, saved = forward(triton_impl, x, layout, weights, keep, fused, 1e-5)
                needs = Needs(not frozen, True, True, True)
                backward(triton_impl, given.grad, layout, weights, saved, needs, fused)
            found = [kernel.removesuffix("_kernel") for kernel in launched]
            expected = [k for k in LAUNCHES[name] if not (frozen and k == "pool_backward")]
            assert sorted(k for k in found if k != "column_sum") == sorted(expected)
            (line,) = ncu_commands([case], BenchSettings((name,), MODES, frozen=frozen))
            assert f"--launch-count {len(expected)} " in line and "--launch-skip 0" in line
            assert "--clock-control base" in line and ("--frozen-vit" in line) == frozen
            (pattern,) = [part for part in line.split("'") if part.startswith("regex:")]
            names = pattern.removeprefix("regex:^(").removesuffix(")$").split("|")
            assert set(names) == set(launched) - {"column_sum_kernel"}


def test_the_profilers_commands_can_be_run(capsys):
    shape = f"T=2,n=2/3,p=0.5/0.5,pool=adaptive,{SMALL}"
    line = ["--shape", shape, "--device", "cpu", "--provider", "save", "--provider", "eager_loop"]
    assert command.main([*line, "--print-ncu", "--print-nsys"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == ["ncu", "ncu", "nsys", "nsys"]
    assert "--kernel-name" in printed[0] and "--kernel-name" not in printed[1]
    assert "--capture-range=cudaProfilerApi" in printed[2]
    for text in printed:
        assert "--once" in text and "--provider=" in text
        _, _, options = text.partition("python -m kernels.profile ")
        assert command.main(["--device", "cpu", *options.split()]) == 0
    assert ncu_commands([parse_shape(shape)], BenchSettings(("liger",), MODES))
    assert nsys_commands([parse_shape(shape)], BenchSettings(("liger",), MODES))


def test_numbers_that_are_not_finite_stay_valid_json(tmp_path):
    write_json(tmp_path / "a.json", {"a": [math.nan, 1.0], "b": math.inf})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": ["nan", 1.0], "b": "inf"}
    write_csv(tmp_path / "a.csv", [{"a": 1}, {"b": 2}])
    assert (tmp_path / "a.csv").read_text().splitlines() == ["a,b", "1,", ",2"]
