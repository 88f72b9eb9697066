"""The tuner, on tiny shapes in the interpreter, and the table it writes as the op reads it."""

import json

import pytest
import torch

from kernels import launch, tune
from kernels.dispatch import interpreting
from kernels.launch import LaunchConfig
from tests.kernels.inputs import DEVICE

pytestmark = pytest.mark.skipif(
    DEVICE.type == "cpu" and not interpreting(), reason="needs a GPU or TRITON_INTERPRET=1"
)
TINY = tune.Shape(channels=8, hidden=16, width=8, grid=(2, 2))


@pytest.fixture(autouse=True)
def fresh_table():
    launch._table.cache_clear()
    launch._tiles_file.cache_clear()
    yield
    launch._table.cache_clear()
    launch._tiles_file.cache_clear()


def test_every_kernel_has_a_step_that_runs_as_shipped():
    steps = tune.build_steps(4, TINY, DEVICE)
    arch = launch.architecture(DEVICE)
    assert set(steps) - {"cublas dual_gemm", "cublas gate_gemm"} == set(launch.TABLE[arch])
    for name, step in steps.items():
        assert all(torch.isfinite(result).all() for result in step()), name
    assert tune.fused_wins("dual_gemm", steps, DEVICE, min_ms=0.1) > 0


def test_the_fastest_candidate_that_is_right_replaces_the_shipped_one(monkeypatch):
    arch = launch.architecture(DEVICE)
    shipped = launch.TABLE[arch]["swiglu"][0]
    wrong, slow, fast = (LaunchConfig({"BLOCK": n}, num_warps=2) for n in (512, 1024, 256))
    times = {512: 0.1, 1024: 0.9, 256: 0.5, shipped.constants["BLOCK"]: 1.0}
    monkeypatch.setattr(tune, "candidates", lambda _: [wrong, slow, fast, shipped])

    def block() -> int:
        return launch.launch_config("swiglu", 64, DEVICE).constants["BLOCK"]

    def step():
        return (torch.full((4,), 2.0 if block() == 512 else 1.0),)

    monkeypatch.setattr(tune, "median_ms", lambda *_: times[block()])
    found = tune.tune_kernel("swiglu", step, 64, DEVICE, 1.0)
    assert found.replaces and found.best == fast and found.best_ms == 0.5
    times[256] = times[1024] = 0.99  # within what is not worth a change
    assert not tune.tune_kernel("swiglu", step, 64, DEVICE, 1.0).replaces


def test_a_real_sweep_writes_a_file_that_the_op_reads(tmp_path, monkeypatch):
    results, ratios = tune.tune(["swiglu"], (4,), TINY, DEVICE, min_ms=0.1)
    assert len(results) == 1 and not ratios
    kept = tune.Tuned(
        "swiglu", 4, 1.0, 0.0, 0.5, LaunchConfig({"BLOCK": 64}, num_warps=1), replaces=True
    )
    content = tune.tiles_file([kept], {"dual_gemm": {4: 1.5, 8: 1.2}}, DEVICE, ["tune"])
    path = tmp_path / "tiles.json"
    path.write_text(json.dumps(content))
    monkeypatch.setenv(launch.TILES_VARIABLE, str(path))
    launch._tiles_file.cache_clear()
    launch._table.cache_clear()
    arch = launch.architecture(DEVICE)
    assert launch.launch_config("swiglu", 4, DEVICE).constants == {"BLOCK": 64}
    assert launch.launch_config("swiglu", 3, DEVICE) == launch.TABLE[arch]["swiglu"][0]
    assert launch.launch_config("norm", 4, DEVICE) == launch.TABLE[arch]["norm"][0]
    assert launch.fused_by_default("dual_gemm", DEVICE)
    assert not launch.fused_by_default("gate_gemm", DEVICE)


def test_fused_is_on_only_where_it_wins_everywhere():
    content = tune.tiles_file([], {"dual_gemm": {4: 1.5, 8: 1.01}}, DEVICE, ["tune"])
    assert content["fused"] == {launch.architecture(DEVICE): []}


@pytest.mark.parametrize("text", ["{", "{}", '{"tiles": {"sm_90": {"norm": {"0": {"warps": 1}}}}}'])
def test_a_broken_table_is_named(text, tmp_path, monkeypatch):
    path = tmp_path / "tiles.json"
    path.write_text(text)
    monkeypatch.setenv(launch.TILES_VARIABLE, str(path))
    with pytest.raises(ValueError, match=r"TOKENFLEX_TILES .*tiles\.json"):
        launch.launch_config("norm", 1, DEVICE)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="tells what happens without a GPU")
def test_tuning_without_a_gpu_says_so(capsys):
    assert tune.main([]) == 2
    assert "no GPU found" in capsys.readouterr().err
