"""The tuner, on tiny shapes in the interpreter, and the table it writes as the op reads it."""

import json
import signal
import subprocess
import sys
import time
import warnings

import pytest
import torch

from kernels import launch, token_adaptive_projector, tune
from kernels.dispatch import interpreting
from kernels.launch import LaunchConfig, launch_config
from kernels.profile.cases import parse_shape
from kernels.profile.random_inputs import make_inputs
from kernels.profile.timing import LEAD_CYCLES
from kernels.tune_trials import BY_CUBLAS, TimedStep, build_steps, candidates
from tests.kernels.inputs import DEVICE

pytestmark = pytest.mark.skipif(
    DEVICE.type == "cpu" and not interpreting(), reason="needs a GPU or TRITON_INTERPRET=1"
)
SHAPE = "T=2,n=2/1,grid=2x2,C=8,F=16,D=8"
TINY = "T=2,n=1,grid=1x1,C=8,F=16,D=8"  # the interpreter is slow
KERNELS = list(launch.TABLE[launch.architecture(DEVICE)])
LIKE = torch.empty(1, dtype=torch.bfloat16, device=DEVICE)
ODD = LaunchConfig({"BLOCK": 64}, num_warps=1)


def forget():
    launch._measured.cache_clear()
    launch._tiles_file.cache_clear()


@pytest.fixture(autouse=True)
def fresh_table(monkeypatch):
    monkeypatch.delenv(launch.TILES_VARIABLE, raising=False)
    forget()
    yield
    forget()


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """Writes a table of (kernel, rows, situation, kept, fused) and has the op read it."""

    def serve(*entries, **target):
        records = [
            {"kernel": k, "rows": m, "situation": s, "kept": vars(config), "fused": fused}
            for k, m, s, config, fused in entries
        ]
        table = {"target": launch.describe_target(DEVICE) | target, "measured": records}
        path = tmp_path / "tiles.json"
        path.write_text(json.dumps(table))
        monkeypatch.setenv(launch.TILES_VARIABLE, str(path))
        forget()

    return serve


def test_every_kernel_has_a_step_that_runs_as_shipped():
    steps = build_steps(parse_shape(SHAPE), DEVICE)
    assert {name.partition(" ")[0] for name in steps} == set(KERNELS)
    for name, step in steps.items():
        assert all(torch.isfinite(result).all() for result in step.run()), name
    for name in ("dual_gemm", "gate_gemm"):
        ours, theirs = steps[name].run(), steps[name + BY_CUBLAS].run()
        assert max(map(tune.row_error, ours, theirs)) < 0.05
    no_fused = build_steps(parse_shape(SHAPE + ",dtype=fp32"), DEVICE)
    assert not any("gemm" in name for name in no_fused)


def test_every_shipped_configuration_is_among_those_tried():
    for kernels in launch.TABLE.values():
        for kernel, buckets in kernels.items():
            assert all(config in candidates(kernel) for config in buckets.values()), kernel


def test_tuning_takes_less_than_ten_minutes():
    """2 s to compile each, then 20 samples of at most 2 ms and one lead of about 2 ms."""
    tried = sum(len(list(candidates(kernel))) for kernel in KERNELS)
    sampled_s = tried * len(tune.default_cases()) * (20 * 2e-3 + LEAD_CYCLES / 2e9)
    assert 2 * tried + sampled_s < 600


@pytest.mark.parametrize("count, leads", [(20, 1), (21, 2), (5, 1)])
def test_the_gpu_idles_once_for_twenty_samples(count, leads, monkeypatch):
    slept = []

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            pass

        def elapsed_time(self, end):
            return 1.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    timed = tune.sample(lambda _: None, lambda _: None, torch.device("cuda"), count, per_lead=20)
    assert len(timed) == count and slept == [LEAD_CYCLES] * leads


def test_the_fastest_candidate_that_is_right_replaces_the_shipped_one(monkeypatch):
    _, shipped = launch.shipped_config("swiglu", 64, DEVICE)
    wrong, slow, fast = (LaunchConfig({"BLOCK": n}, num_warps=2) for n in (512, 1024, 256))
    times = {512: 0.1, 1024: 0.9, 256: 0.5, shipped.constants["BLOCK"]: 1.0}
    monkeypatch.setattr(tune, "candidates", lambda _: [wrong, slow, fast, shipped])

    def block() -> int:
        return launch_config("swiglu", 64, LIKE, F=8).constants["BLOCK"]

    def run():
        result = torch.ones(65536, 4)
        result[-1] = 0.0 if block() == 512 else 1.0  # one row of many
        return (result,)

    monkeypatch.setattr(tune, "median_ms", lambda *_: times[block()])
    found = tune.tune_kernel("swiglu", 64, TimedStep(run), DEVICE, 1)
    assert found["kept"] == found["best"] == fast and found["best_ms"] == 0.5
    times[256] = times[1024] = 0.99  # within what is not worth a change
    assert tune.tune_kernel("swiglu", 64, TimedStep(run), DEVICE, 1)["kept"] == shipped


def test_the_error_is_that_of_the_worst_row():
    expected = torch.randn(4096, 32, generator=torch.Generator().manual_seed(0))
    found = expected.clone()
    found[7, 3] += 0.5
    assert tune.row_error(expected, expected) == 0.0
    assert tune.row_error(found, expected) == pytest.approx(
        (0.5 / expected[7].norm()).item(), rel=1e-4
    )
    found[7] = torch.nan
    assert not tune.row_error(found, expected) < 1.0
    sums = torch.tensor([100.0, 1e-4, -90.0])  # a sum that cancels is no row of its own
    assert tune.row_error(sums + torch.tensor([0.0, 1e-4, 0.0]), sums) < 1e-4
    assert tune.row_error(torch.tensor([100.0, 1e-4, 90.0]), sums) > 1.0
    assert tune.row_error(torch.zeros(3), torch.zeros(3)) == 0.0


def test_every_measured_m_gets_what_was_kept_for_it(serve):
    _, shipped = launch.shipped_config("swiglu", 1, DEVICE)
    kept = {300: shipped, 720: ODD, 1500: shipped, 1600: ODD, 11760: shipped}
    serve(*(("swiglu", rows, "bfloat16 F=16", entry, False) for rows, entry in kept.items()))
    served = {rows: launch_config("swiglu", rows, LIKE, F=16) for rows in range(1, 60000)}
    assert all(served[rows] == entry for rows, entry in kept.items())
    assert {rows for rows, entry in served.items() if entry == ODD} == {
        *range(720, 1500),
        *range(1600, launch.REACH * 1600 + 1),  # what nothing near was measured for is shipped
    }


def test_measured_entries_do_not_hide_shipped_ones_for_more_rows(serve):
    arch = launch.TABLE[launch.architecture(DEVICE)]["gate_gemm"]
    small = LaunchConfig(arch[0].constants, num_warps=8)
    serve(("gate_gemm", 2000, "bfloat16 D=8 F=16", small, False))
    sizes = {"D": 8, "F": 16}
    assert launch_config("gate_gemm", 4095, LIKE, **sizes) == small
    assert launch_config("gate_gemm", 4096, LIKE, **sizes) == arch[12]


def test_another_situation_runs_as_shipped_and_warns_once(serve):
    _, shipped = launch.shipped_config("swiglu", 4, DEVICE)
    serve(("swiglu", 4, "bfloat16 F=16", ODD, False))
    for like, width in ((LIKE, 24), (LIKE.half(), 16), (LIKE.float(), 16)):
        with pytest.warns(UserWarning, match=r"swiglu measured for bfloat16 F=16.*--shape"):
            assert launch_config("swiglu", 4, like, F=width) == shipped
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert launch_config("swiglu", 4, LIKE, F=24) == shipped  # has been said
        assert launch_config("swiglu", 4, LIKE, F=16) == ODD
        assert launch_config("norm", 4, LIKE, C=16)  # was not to be measured


def test_a_table_of_other_hardware_is_refused_or_used_with_a_warning(serve):
    _, shipped = launch.shipped_config("swiglu", 4, DEVICE)
    entry = ("swiglu", 4, "bfloat16 F=16", ODD, False)
    serve(entry, arch="sm_70")
    with pytest.warns(UserWarning, match="sm_70.*none of it is used"):
        assert launch_config("swiglu", 4, LIKE, F=16) == shipped
    for target in ({"device": "a card"}, {"triton": "2.0"}):
        serve(entry, **target)
        with pytest.warns(UserWarning, match=f"{next(iter(target.values()))}.*it is used"):
            assert launch_config("swiglu", 4, LIKE, F=16) == ODD


def test_fused_products_are_taken_where_they_won(serve):
    sizes = {"C": 8, "F": 16}
    assert not launch.fused_by_default("dual_gemm", 64, LIKE, **sizes)
    serve(
        *(
            ("dual_gemm", rows, "bfloat16 C=8 F=16", LaunchConfig({}), wins)
            for rows, wins in ((64, True), (128, False), (512, True))
        )
    )
    taken = [m for m in range(1, 4096) if launch.fused_by_default("dual_gemm", m, LIKE, **sizes)]
    assert taken == [*range(64, 128), *range(512, 512 * launch.REACH + 1)]


@pytest.mark.parametrize("text", ["{", "{}", '{"target": {}, "measured": []}', "[1]"])
def test_a_broken_table_is_named(text, tmp_path, monkeypatch):
    path = tmp_path / "tiles.json"
    path.write_text(text)
    monkeypatch.setenv(launch.TILES_VARIABLE, str(path))
    with pytest.raises(ValueError, match=r"TOKENFLEX_TILES .*tiles\.json"):
        launch_config("norm", 1, LIKE, C=8)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="tells what happens without a GPU")
def test_tuning_without_a_gpu_says_so(capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert tune.main([]) == 2
    assert "no GPU found" in capsys.readouterr().err


def test_what_cannot_be_written_or_gone_on_with_is_an_error(tmp_path, capsys):
    (file := tmp_path / "other.json").write_text('{"measured": [{"kernel": "norm"}]}')
    assert tune.main(["--out", str(file)]) == 2
    assert "other.json exists and is no table" in capsys.readouterr().err
    assert tune.main(["--out", str(file / "tiles.json")]) == 2
    assert "other.json" in capsys.readouterr().err
    file.write_text('{"target": {"arch": "sm_70"}, "measured": []}')
    assert tune.main(["--out", str(file)]) == 2
    assert "measured on {'arch': 'sm_70'}" in capsys.readouterr().err
    for wrong in (["--shape", "m=3"], ["--samples", "0"]):
        with pytest.raises(SystemExit):
            tune.main(wrong)
    assert "unknown key 'm'" in capsys.readouterr().err


def test_a_rehearsal_is_stopped_goes_on_and_serves_what_it_measured(tmp_path, monkeypatch):
    path = tmp_path / "new" / "tiles.json"
    options = ["--out", str(path), "--shape", TINY, "--shape", TINY + ",pool=resize"]
    options += ["--samples", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "kernels.tune", *options], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(2)]  # the first says how many there are
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    process.stdout.close()
    assert lines[1].startswith("pool_norm")
    assert [*path.parent.iterdir()] == [path]  # nothing half written is left
    first = json.loads(path.read_text())["measured"]
    assert first[0]["kernel"] == "pool_norm"

    few = {k: [*candidates(k)][:2] for k in KERNELS}
    monkeypatch.setattr(tune, "candidates", few.__getitem__)

    def ms(*_):  # everything is faster than what is shipped
        ((kernel, (config, _)),) = launch._trial.items()
        return 1.0 if config == launch.shipped_config(kernel, 1, DEVICE)[1] else 0.5

    monkeypatch.setattr(tune, "median_ms", ms)
    started = time.monotonic()
    assert tune.main(options) == 0
    assert time.monotonic() - started < 60
    measured = json.loads(path.read_text())["measured"]
    assert measured[: len(first)] == first
    keys = [(record["kernel"], record["rows"], record["situation"]) for record in measured]
    assert len(set(keys)) == len(keys) and {kernel for kernel, *_ in keys} == set(KERNELS)
    assert sum(kernel.startswith("pool") for kernel, *_ in keys) == 4  # both modes
    assert sum(kernel == "column_sum" for kernel, *_ in keys) == 2  # of the gates, of the norm

    monkeypatch.setenv(launch.TILES_VARIABLE, str(path))
    kept = {key: record["kept"] for key, record in zip(keys, measured, strict=True)}
    served = _served_to_the_op(monkeypatch)
    assert {kernel for kernel, *_ in served} == set(KERNELS)
    assert served == {key: kept[key] for key in served}
    changed = {
        key[0] for key in served if kept[key] != vars(launch.shipped_config(*key[:2], DEVICE)[1])
    }
    assert changed >= set(KERNELS) - {record["kernel"] for record in first}


def _served_to_the_op(monkeypatch):
    """What the launches of the op at `TINY` look up, and get."""
    served = {}

    def spy(kernel, rows, like, **sizes):
        config = launch_config(kernel, rows, like, **sizes)
        served[kernel, rows, launch._situation(like, sizes)] = vars(config)
        return config

    for name, module in list(sys.modules.items()):
        if name.startswith("kernels.triton_impl.") and hasattr(module, "launch_config"):
            monkeypatch.setattr(module, "launch_config", spy)
    case = parse_shape(TINY)
    inputs = make_inputs(case, DEVICE)
    ways = (("cublas", "save", "adaptive"), ("fused", "recompute", "resize"))
    for gemm, backward, pool in (*ways, ("fused", "save", "adaptive")):
        options = {"grid": case.grid, "pool": pool, "impl": "triton"}
        out = token_adaptive_projector(
            inputs.x, case.sides, *inputs.weights, gemm=gemm, backward=backward, **options
        )
        torch.autograd.grad(out, inputs.leaves, inputs.grad)
    return served
